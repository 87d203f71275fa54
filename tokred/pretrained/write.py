"""Writing back: a model as a directory that transformers loads.

    config.json, preprocessor_config.json, model.safetensors     what transformers reads: the dense model
    tokred_config.json, tokred_reducers.safetensors              where there are sites: with which `tokred.load` gives
                                                                 the reduced model back

The rows that read a family write it.  The directory is made under a temporary name and renamed when it is whole.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from tokred.model import Model, build, freeze
from tokred.nn.vit import sincos2d
from tokred.pretrained.arrays import WEIGHTS, open_safetensors
from tokred.pretrained.huggingface import ACTIVATIONS, FAMILIES, rows
from tokred.pretrained.preprocessing import to_preprocessor
from tokred.pretrained.rules import THEIRS, translate, writing
from tokred.pretrained.source import Source

CONFIG, REDUCERS, VERSION = "tokred_config.json", "tokred_reducers.safetensors", 1

ANY = None
_PLAIN = dict(  # values of config.model that a family can express; ANY: whatever it is
  pool=("cls",), distilled=(False,), num_registers=(0,), position=("learned",), patch_bias=(True,), pre_norm=(False,),
  final_norm=("tokens",), mlp=("plain",), qk_norm=(False,), qkv_bias=(True,), layer_scale=(0.0,), num_classes=ANY,
)  # fmt: skip
EXPRESSES = {
  "vit": _PLAIN | dict(qkv_bias=ANY),
  "deit": _PLAIN | dict(qkv_bias=ANY, distilled=ANY, num_registers=(0, 1)),
  "dinov2": _PLAIN | dict(qkv_bias=ANY, pool=("cls", "cls_avg"), num_registers=ANY, mlp=ANY, layer_scale=ANY),
  "dinov3_vit": _PLAIN
  | dict(position=("rope2d",), num_registers=ANY, mlp=ANY, layer_scale=ANY, qkv_bias=ANY, num_classes=(0,)),
  "clip_vision_model": _PLAIN | dict(pre_norm=(True,), patch_bias=(False,), num_classes=(0,)),
  "siglip_vision_model": _PLAIN | dict(pool=("map", "avg")),
}


def save_huggingface(model: Model, directory: str | os.PathLike[str]) -> Model:
  """Writes a model as a directory in the layout of transformers; learned rates are frozen first.

  transformers loads the dense model from it, to the same logits (or features, where there is no head).  Where the model
  has sites, `tokred.load(directory)` gives it back with them.

  Args:
    model: with parameters.
    directory: must not exist, or be empty.

  Returns:
    The frozen model, as it was written.

  Raises:
    ValueError: no parameters, a model that no architecture of transformers expresses (names the field), or a directory
      that holds something.
    OSError: it cannot be written; nothing half-written is left.
  """
  directory = Path(directory).absolute()
  if model.config.model.name != "vit":
    raise ValueError(f"config.model.name={model.config.model.name!r} is not written for transformers; valid: 'vit'")
  if model.params is None:
    raise ValueError("the model has no parameters: call model.init(), or get it from tokred.load")
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f"{directory} exists and is not empty; choose another directory")
  model = _with_table(model)
  name, config = describe(model)
  model = freeze(model)
  flat = {k: np.asarray(leaf) for k, leaf in traverse_util.flatten_dict(dict(model.params), sep="/").items()}
  reducers = {k: leaf for k, leaf in flat.items() if "reduce" in k.split("/")}
  dense = {k: leaf for k, leaf in flat.items() if k not in reducers}
  temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    temporary.mkdir(parents=True)
    _save(_to_theirs(name, dense, model, "For" in config["architectures"][0]), temporary / WEIGHTS)
    data = to_preprocessor(model.config.data, tuple(model.config.model.image_size))
    for file, content in (("config.json", config), ("preprocessor_config.json", data)):
      (temporary / file).write_text(json.dumps(content, indent=2) + "\n")
    if model.config.sites:
      own = {"version": VERSION, "config": model.config.to_dict()}
      (temporary / CONFIG).write_text(json.dumps(own, indent=2) + "\n")
      if reducers:
        _save(reducers, temporary / REDUCERS)
    os.replace(temporary, directory)  # an empty directory may be there
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return model


def with_sites(source: Source, directory: Path) -> Source:
  """A source with the config and the reducers that `save_huggingface` has put beside it.

  Raises:
    ValueError: they are damaged, or of a newer version.
  """
  file = directory / CONFIG
  if not file.is_file():
    return source
  try:
    saved = json.loads(file.read_text())
    version, config = saved["version"], dict(saved["config"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{file} is damaged ({error!r}); write the directory again") from None
  if version > VERSION:
    raise ValueError(f"{file} is of version {version}, and this tokred reads up to {VERSION}; update tokred")
  own = open_safetensors(directory / REDUCERS) if (directory / REDUCERS).is_file() else {}
  return dataclasses.replace(source, fields=config | {"init": "", "teacher": ""}, own=own)


def describe(model: Model) -> tuple[str, dict[str, Any]]:
  """The family that a model belongs to, and its config.json.

  Raises:
    ValueError: transformers has no architecture for it; names the field.
  """
  m, s = model.config.model, model.module.shape
  name = _family(m, s)
  for field, valid in EXPRESSES[name].items():
    if valid is not ANY and m[field] not in valid:
      words = " or ".join(repr(value) for value in valid)
      raise ValueError(f"config.model.{field}={m[field]!r} has no place in transformers' {name}; valid there: {words}")
  _check_head(name, m)
  square = s.grid[0] == s.grid[1]
  if not square and name not in ("vit", "deit", "dinov3_vit"):
    raise ValueError(f"config.model.image_size={tuple(m.image_size)}: transformers' {name} takes squares only")
  config = dict(
    hidden_size=s.width, num_hidden_layers=s.depth, num_attention_heads=s.num_heads, intermediate_size=s.mlp_dim,
    hidden_act=next(theirs for theirs, ours in ACTIVATIONS.items() if ours == m.activation), layer_norm_eps=m.norm_eps,
    image_size=m.image_size[0] if square else list(m.image_size), patch_size=s.patch, num_channels=s.channels,
  )  # fmt: skip
  if name in ("vit", "deit", "dinov2"):
    config["qkv_bias"] = m.qkv_bias
  if name == "dinov2":
    config |= dict(layerscale_value=1.0, use_swiglu_ffn=s.gated, mlp_ratio=_mlp_ratio(s, m.activation))
    del config["intermediate_size"]
    config |= dict(num_register_tokens=m.num_registers) if m.num_registers else dict(use_mask_token=False)
  if name == "dinov3_vit":
    biases = dict.fromkeys(("query_bias", "key_bias", "value_bias"), m.qkv_bias)
    config |= biases | dict(rope_theta=m.rope_theta, num_register_tokens=m.num_registers, use_gated_mlp=s.gated)
  if name == "siglip_vision_model":
    config["vision_use_head"] = m.pool == "map"
  kind, architecture = _architecture(name, m)
  if kind == "siglip":
    config = dict(vision_config=config | dict(model_type=name))
  if s.num_classes:
    labels = model.config.data.labels or [f"LABEL_{i}" for i in range(s.num_classes)]
    config |= dict(id2label={str(i): label for i, label in enumerate(labels)})
    config |= dict(label2id={label: i for i, label in enumerate(labels)})
  return name, dict(architectures=[architecture], model_type=kind, dtype="float32") | config


def _with_table(model: Model) -> Model:
  """The same model with fixed positions as the table that transformers stores."""
  m, s = model.config.model, model.module.shape
  if m.position != "sincos2d":
    return model
  prefix = np.zeros((1, s.has_cls + s.distilled, s.width), np.float32)
  table = np.concatenate([prefix, sincos2d(s.grid, s.width)], axis=1)
  config = model.config.to_dict()
  made = build(config | {"model": config["model"] | {"position": "learned"}})
  return dataclasses.replace(made, params=dict(model.params) | {"pos_embed": table})


def _family(m: Mapping[str, Any], s: Any) -> str:
  if m["position"] == "rope2d":
    return "dinov3_vit"
  if m["pre_norm"]:
    return "clip_vision_model"
  if not s.has_cls:
    return "siglip_vision_model"
  if m["layer_scale"]:
    return "dinov2"
  return "deit" if m["distilled"] or m["num_registers"] == 1 else "vit"


def _check_head(name: str, m: Mapping[str, Any]) -> None:
  """Raises ValueError where the head reads what transformers' head does not."""
  wanted = m["pool"]
  if name == "dinov2":
    wanted = "cls_avg" if m["num_classes"] else "cls"
  elif name == "siglip_vision_model" and m["num_classes"]:
    wanted = "avg"
  if m["pool"] != wanted:
    raise ValueError(
      f"config.model.pool={m['pool']!r} with num_classes={m['num_classes']} has no place in transformers' {name}; "
      f"valid there: {wanted!r}"
    )
  if name == "dinov3_vit" and not m["layer_scale"]:
    raise ValueError(f"config.model.layer_scale=0 has no place in transformers' {name}, which always scales its layers")
  if m["distilled"] and m["num_registers"]:
    raise ValueError(f"config.model.num_registers={m['num_registers']} has no place in transformers' {name}; valid: 0")


def _mlp_ratio(s: Any, activation: str) -> int:
  """DINOv2 tells the width of its MLP as a whole multiple."""
  for ratio in range(1, 17):
    hidden = s.width * ratio
    if s.mlp_dim == ((int(hidden * 2 / 3) + 7) // 8 * 8 if s.gated else hidden):
      if s.gated and activation != "silu":
        raise ValueError(f"config.model.activation={activation!r} has no place in transformers' dinov2; valid: 'silu'")
      return ratio
  raise ValueError(
    f"config.model.mlp_dim={s.mlp_dim} has no place in transformers' dinov2; valid: a multiple of width={s.width}"
    + (", two thirds of it, rounded up to a multiple of 8" if s.gated else "")
  )


def _architecture(name: str, m: Mapping[str, Any]) -> tuple[str, str]:
  """model_type and class."""
  head = bool(m["num_classes"])
  if name == "dinov2" and m["num_registers"]:
    name = "dinov2_with_registers"
  if name == "siglip_vision_model" and head:
    return "siglip", "SiglipForImageClassification"
  stem = {
    "vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters",
    "dinov3_vit": "DINOv3ViT", "clip_vision_model": "CLIPVision", "siglip_vision_model": "SiglipVision",
  }[name]  # fmt: skip
  tail = "ForImageClassification" + ("WithTeacher" if m["distilled"] else "")
  return name, stem + (tail if head else "Model")


def _to_theirs(name: str, dense: dict[str, np.ndarray], model: Model, head: bool) -> dict[str, np.ndarray]:
  """The arrays in their names, with the few that they have and we do not."""
  m, s = model.config.model, model.module.shape
  dense = dict(dense)
  if name == "deit" and not m.distilled:  # its distillation token is our register, whose position is zero
    table = dense["pos_embed"]
    dense["pos_embed"] = np.concatenate([table[:, :1], np.zeros_like(table[:, :1]), table[:, 1:]], axis=1)
    dense.setdefault("registers", np.zeros((1, 1, s.width), np.float32))
  out = translate(dense, writing(_one_way(name, s, m.distilled)), THEIRS)
  if strange := sorted(key for key in out if "/" in key):
    raise ValueError(f"{strange[0]} has no place in transformers' {name}")
  if name == "dinov3_vit":
    out["embeddings.mask_token"] = np.zeros((1, 1, s.width), np.float32)
    out.setdefault("embeddings.register_tokens", np.zeros((1, 0, s.width), np.float32))
  elif name == "dinov2" and m.num_registers:
    out["embeddings.mask_token"] = np.zeros((1, s.width), np.float32)
  prefix = FAMILIES["dinov2_with_registers" if name == "dinov2" and m.num_registers else name].prefix if head else ""
  return {key if "classifier" in key else prefix + key: array for key, array in out.items()}


def _one_way(name: str, s: Any, teacher: bool) -> list[Any]:
  """The rows of a family without those of the other kind of MLP, which go to the same places."""
  other = ".mlp.fc" if s.gated else ".mlp.weights_"
  return [row for row in rows(name, s.num_heads, teacher) if name != "dinov2" or other not in row.theirs]


def _save(arrays: Mapping[str, np.ndarray], path: Path) -> None:
  save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata={"format": "pt"})
