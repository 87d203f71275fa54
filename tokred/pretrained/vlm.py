"""Vision-language models in the layout of Hugging Face transformers: LLaVA-1.5, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL.

One table of rows serves reading and writing.  Releases of transformers have named the parts in several ways
(`vision_tower.vision_model.`, `model.language_model.`, `visual.`, ...): all are brought to one spelling first.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tokred.config import default, nearest
from tokred.nn import decoder, projectors, qwen_vision, vit, vlm
from tokred.nn.decoder_layer import Shape
from tokred.nn.qwen_vlm import QwenVLM
from tokred.nn.stacks import split
from tokred.pretrained import huggingface, language
from tokred.pretrained.arrays import open_directory, read_description
from tokred.pretrained.huggingface import ACTIVATIONS
from tokred.pretrained.rules import CONV, Layout, Row, from_heads, linear, merge, norm, reading, to_heads, translate
from tokred.sharding import DEFAULT_RULES, abstract_sharded

KINDS = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")
_CLIP = dict(  # the tower of a LLaVA that does not say which
  model_type="clip_vision_model", intermediate_size=4096, hidden_size=1024, patch_size=14, image_size=336,
  num_hidden_layers=24, num_attention_heads=16,
)  # fmt: skip
_LLAVA = dict(
  image_token_index=32000, vision_feature_layer=-2, vision_feature_select_strategy="default", vision_config=_CLIP,
  projector_hidden_act="gelu", multimodal_projector_bias=True,
  image_grid_pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
)  # fmt: skip
_QWEN2 = dict(
  depth=32, embed_dim=1280, hidden_size=3584, hidden_act="quick_gelu", mlp_ratio=4, num_heads=16, in_channels=3,
  patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
)  # fmt: skip
_QWEN25 = dict(
  depth=32, hidden_size=3584, hidden_act="silu", intermediate_size=3420, num_heads=16, in_channels=3, patch_size=14,
  spatial_merge_size=2, temporal_patch_size=2, window_size=112, out_hidden_size=3584, tokens_per_second=4,
  fullatt_block_indexes=(7, 15, 23, 31),
)  # fmt: skip
IGNORED = (  # parts of towers that no language model sees, and what is computed anew
  r"vision_tower\.(post_layernorm|head)\..*", r"vision_tower\.embeddings\.position_ids", r".*rotary_emb\.inv_freq",
  r".*rotary_pos_emb\.inv_freq",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Files:
  """A vision-language model that lies in files."""

  path: str
  kind: str  # model_type
  llm: Shape
  image_token: int
  state: Mapping[str, Any]  # arrays, in the spelling of `spelt`
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # LLaVA: fields of config.model
  family: str = ""  # LLaVA: of the tower
  tower: qwen_vision.Shape | None = None  # Qwen
  video_token: int = -1  # Qwen
  tokens_per_second: float = 0.0  # of the temporal axis of positions in a video; 0: frames are counted
  pinpoints: tuple[tuple[int, int], ...] = ()  # LLaVA-NeXT: (height, width) in pixels that an image may be cut into

  def rows(self) -> tuple[Row, ...]:
    """The table; names in the spelling of `spelt`."""
    if self.tower is not None:
      seen, projector = _qwen(self.tower), (("merger.mlp.0", "fc1"), ("merger.mlp.2", "fc2"))
      prefix = "vision_tower."
    else:
      heads, channels = self.model["num_heads"], self.model["channels"]
      seen = huggingface.rows(self.family, heads, channels=channels)
      projector = (("linear_1", "fc1"), ("linear_2", "fc2"))
      prefix = "multi_modal_projector."
    return (
      *(row._replace(theirs=f"vision_tower.{row.theirs}", ours=f"tower/{row.ours}") for row in seen),
      *(row for theirs, ours in projector for row in linear(prefix + theirs, f"projector/{ours}")),
      *(row._replace(theirs=f"language_model.{row.theirs}", ours=f"llm/{row.ours}") for row in language.rows(self.llm)),
      Row("image_newline", "image_newline"),
    )

  def arrays(self) -> dict[str, Any]:
    """The arrays by our paths; nothing is read yet."""
    return translate(self.state, reading(self.rows()))

  def make(
    self, sites: Mapping[str, Any] | None = None, *, dtype: str = "float32", param_dtype: str = "float32",
    attention: str = "auto",
  ) -> vlm.VLM:  # fmt: skip
    """The module, with `config.sites`; every error of these is raised here."""
    seen, read, policy = split(sites or {})
    llm = decoder.make(self.llm, read, dtype=dtype, param_dtype=param_dtype, attention=attention)
    if self.tower is not None:
      tower = qwen_vision.make(self.tower, seen, dtype=dtype, attention=attention)
      return QwenVLM(tower, qwen_vision.Merger(self.llm.width), llm, self.image_token, policy)
    tower = vit.make(self.config(dtype, attention), seen)
    projector = projectors.projector("mlp", {}, self.llm.width)
    return vlm.VLM(tower, projector, llm, self.image_token, policy, newline=self.kind == "llava_next")

  def config(self, dtype: str = "float32", attention: str = "auto") -> ConfigDict:
    """`config.model` of the tower."""
    config = default().model
    config.update(dict(self.model) | dict(dtype=dtype, attention=attention))
    return config


def open_vlm(path: str | os.PathLike[str]) -> Files:
  """The model of a directory; nothing but headers is read, and a tied head.

  Raises:
    FileNotFoundError: no config.json, or no weights, or a shard that is not there.
    ValueError: damaged files, or an architecture or a field that tokred does not have.
  """
  directory = Path(path)
  config, file = read_description(directory)
  found, state = read_vlm(config, file), open_directory(directory)
  llm = language.with_own_head(found.llm, {spelt(name): a for name, a in state.items()}, "language_model.")
  found = dataclasses.replace(found, path=str(directory), llm=llm)
  return dataclasses.replace(found, state=found_only(found, state))


def load_vlm(
  path: str | os.PathLike[str],
  sites: Mapping[str, Any] | None = None,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  attention: str = "auto",
  mesh: Mesh | None = None,
) -> tuple[vlm.VLM, dict[str, Any]]:
  """Module and parameters of a directory; parameters of reducers, which no file has, are drawn anew.

  Args:
    path: a directory in the layout of transformers.
    sites: `config.sites`, of the stacks "encoder" and "llm".
    dtype: of activations.
    param_dtype: of parameters.
    attention: auto, matmul or fused.
    mesh: where parameters shall lie, each device getting its own part; None: on one device.

  Raises:
    FileNotFoundError, ValueError: see `open_vlm`; or arrays that do not fit, both sides listed.
  """
  found = open_vlm(path)
  module = found.make(sites, dtype=dtype, param_dtype=param_dtype, attention=attention)
  target = abstract(module, mesh, param_dtype)
  try:
    return module, merge(_drawn(module, target), found.arrays())
  except ValueError as error:
    raise ValueError(f"weights {found.path!r} do not fit their config.json: {error}") from None


def abstract(module: vlm.VLM, mesh: Mesh | None = None, param_dtype: str = "float32") -> Any:
  """The parameters as `jax.ShapeDtypeStruct`, with shardings where there is a mesh."""

  def init() -> Any:
    return jax.tree.map(lambda a: a.astype(param_dtype), _init(module))

  return jax.eval_shape(init) if mesh is None else abstract_sharded(init, mesh=mesh, rules=DEFAULT_RULES)


def _init(module: vlm.VLM) -> Any:
  return module.init(jax.random.key(0), **module.example(), mode="mask")["params"]


def _drawn(module: vlm.VLM, target: Any) -> Any:
  """The target with values for reducers' parameters; XLA computes no other."""
  flat = traverse_util.flatten_dict(target, sep="/")
  own = [name for name in flat if "reduce" in name.split("/")]
  if not own:
    return target

  def init() -> dict[str, Any]:
    made = traverse_util.flatten_dict(_init(module), sep="/")
    return {name: made[name].astype(flat[name].dtype) for name in own}

  places = {name: getattr(flat[name], "sharding", None) for name in own}
  return traverse_util.unflatten_dict(flat | jax.jit(init, out_shardings=places)(), sep="/")


def read_vlm(config: Mapping[str, Any], where: str = "config.json") -> Files:
  """What a config.json tells; `path` and `state` are empty.

  Raises:
    ValueError: an architecture or a field that tokred does not have; names both.
  """
  kind = str(config.get("model_type"))
  if kind not in KINDS:
    raise ValueError(
      f"{where}: model_type={kind!r} is not a vision-language model that tokred knows; {nearest(kind, KINDS)}"
    )
  text = language.read_shape({"text_config": {}} | dict(config) if kind.startswith("llava") else config, where)
  if kind.startswith("llava"):
    return _read_llava(config, kind, text, where)
  return _read_qwen(config, kind, text, where)


def _read_llava(config: Mapping[str, Any], kind: str, text: Shape, where: str) -> Files:
  c = _LLAVA | dict(config)
  token = c.get("image_token_id", c["image_token_index"])
  family, model, depth = huggingface.tower(
    Path(where), c | dict(vision_config=dict(model_type="clip_vision_model") | c["vision_config"])
  )
  layer = c["vision_feature_layer"]
  if not isinstance(layer, int) or not 0 < (layer + depth + 1 if layer < 0 else layer) <= depth:
    raise ValueError(f"{where}: vision_feature_layer={layer!r}; valid: one of the tower's {depth} layers, as -2")
  strategy, cls = c["vision_feature_select_strategy"], family == "clip_vision_model"
  if strategy != ("default" if cls else "full"):
    valid = "'default', without the CLS token" if cls else "'full': this tower has no CLS token to leave out"
    raise ValueError(f"{where}: vision_feature_select_strategy={strategy!r}; valid: {valid}")
  if ACTIVATIONS.get(c["projector_hidden_act"]) != "gelu" or not c["multimodal_projector_bias"]:
    raise ValueError(
      f"{where}: projector_hidden_act={c['projector_hidden_act']!r} and multimodal_projector_bias="
      f"{c['multimodal_projector_bias']}; valid: 'gelu' and true"
    )
  pinpoints = tuple(tuple(size) for size in c["image_grid_pinpoints"]) if kind == "llava_next" else ()
  model |= dict(depth=layer + depth + 1 if layer < 0 else layer, final_norm="none", pool="cls" if cls else "avg")
  return Files("", kind, text, _token(token, text, where), {}, model, family, pinpoints=pinpoints)


def _read_qwen(config: Mapping[str, Any], kind: str, text: Shape, where: str) -> Files:
  old = kind == "qwen2_vl"
  c = (_QWEN2 if old else _QWEN25) | dict(config.get("vision_config") or {})
  if c["hidden_act"] not in ACTIVATIONS:
    raise ValueError(f"{where}: hidden_act={c['hidden_act']!r} is unknown; {nearest(c['hidden_act'], ACTIVATIONS)}")
  out = c["hidden_size"] if old else c["out_hidden_size"]
  if out != text.width:
    raise ValueError(f"{where}: the tower leaves tokens of width {out}, but hidden_size={text.width}; valid: the same")
  pixels = c["spatial_merge_size"] * c["patch_size"]
  window = 0 if old else c["window_size"] // pixels
  if not old and window < 1:
    raise ValueError(f"{where}: window_size={c['window_size']}; valid: {pixels} pixels, a token's, or more")
  width = c["embed_dim"] if old else c["hidden_size"]
  tower = qwen_vision.Shape(
    width=width, depth=c["depth"], mlp_dim=int(width * c["mlp_ratio"]) if old else c["intermediate_size"],
    num_heads=c["num_heads"], patch=c["patch_size"], temporal=c["temporal_patch_size"],
    channels=c.get("in_chans", c["in_channels"]), merge=c["spatial_merge_size"], window=window,
    full=() if old else tuple(c["fullatt_block_indexes"]), gated=not old, activation=ACTIVATIONS[c["hidden_act"]],
    theta=float((c.get("rope_parameters") or {}).get("rope_theta", 10_000.0)),
  )  # fmt: skip
  token, video = config.get("image_token_id", 151655), config.get("video_token_id", 151656)
  rate = 0.0 if old else float(c["tokens_per_second"])
  return Files("", kind, text, _token(token, text, where), {}, tower=tower, video_token=video, tokens_per_second=rate)


def _token(token: Any, text: Shape, where: str) -> int:
  if not isinstance(token, int) or not 0 <= token < text.vocab:
    raise ValueError(f"{where}: image_token_id={token!r}; valid: 0 to {text.vocab - 1}, the vocabulary")
  return token


def spelt(name: str) -> str:
  """A name in one spelling: vision_tower., multi_modal_projector., image_newline, or language_model. and what follows.

  `model.visual.blocks.0.norm1.weight` is vision_tower.blocks.0.norm1.weight; `language_model.model.norm.weight`,
  `model.language_model.norm.weight` and `model.norm.weight` are language_model.norm.weight.
  """
  name = re.sub(r"^((model|module)\.)+", "", name)
  if found := re.match(r"(vision_tower|visual|vision_model)\.(vision_tower\.|vision_model\.)*", name):
    return "vision_tower." + name[found.end() :]
  if name == "image_newline" or name.startswith("multi_modal_projector."):
    return name
  return "language_model." + re.sub(r"^((language_model|model)\.)+", "", name)


def found_only(files: Files, state: Mapping[str, Any]) -> dict[str, Any]:
  """Arrays in one spelling, without those that the model knowingly has no place for.

  Raises:
    ValueError: two arrays of one name.
  """
  ignored = IGNORED + ((r"language_model\.lm_head\.weight",) if files.llm.tied else ())
  drop = re.compile("|".join(f"(?:{pattern})" for pattern in ignored))
  out: dict[str, Any] = {}
  for name, array in state.items():
    short = spelt(name)
    layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", short)
    if drop.fullmatch(short) or (layer and int(layer[1]) >= files.model.get("depth", 0)):  # behind the feature layer
      continue
    if short in out:
      raise ValueError(f"{name} and another array are both called {short}")
    out[short] = array
  return out


def _qwen(shape: qwen_vision.Shape) -> tuple[Row, ...]:
  """The tower of Qwen2-VL and Qwen2.5-VL."""
  theirs, ours, h = "blocks.{}.", "block_{}/", shape.num_heads
  mlp = (
    (("gate_proj", "gate"), ("up_proj", "fc1"), ("down_proj", "fc2")) if shape.gated else (("fc1",) * 2, ("fc2",) * 2)
  )

  def read(w: np.ndarray) -> np.ndarray:  # (D, channels, time, patch, patch)
    return CONV.read(w.reshape(w.shape[0], -1, *w.shape[3:]))

  def write(w: np.ndarray) -> np.ndarray:
    return CONV.write(w).reshape(w.shape[3], shape.channels, shape.temporal, *w.shape[:2])

  return (
    Row("patch_embed.proj.weight", "patch_embed/kernel", Layout(read, write)),
    *(
      Row(f"{theirs}attn.qkv.{a}", f"{ours}attn/qkv/{b}", to_heads(h, 3))
      for a, b in (("weight", "kernel"), ("bias",) * 2)
    ),
    Row(f"{theirs}attn.proj.weight", f"{ours}attn/proj/kernel", from_heads(h)),
    Row(f"{theirs}attn.proj.bias", f"{ours}attn/proj/bias"),
    *(row for a, b in mlp for row in linear(f"{theirs}mlp.{a}", f"{ours}mlp/{b}")),
    *norm(theirs + "norm1", ours + "norm1"),
    *norm(theirs + "norm2", ours + "norm2"),
    *norm("merger.ln_q", "norm"),
  )
