"""Directories in the layout of Hugging Face transformers: config.json, preprocessor_config.json, safetensors.

One table of rows serves reading and writing.  Poolers, mask tokens, decoders, text towers and projections into a common
space are left out knowingly; everything else must find its place.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokred.config import nearest
from tokred.pretrained.arrays import open_directory
from tokred.pretrained.preprocessing import CLIP, HALF, IMAGENET, preprocessing
from tokred.pretrained.rules import (
  CONV,
  MATRIX,
  TABLE,
  TOKEN,
  Layout,
  Lazy,
  Row,
  heads_in,
  heads_out,
  linear,
  norm,
  to_heads,
)
from tokred.pretrained.source import Source, strip, variant

ACTIVATIONS = {  # theirs to ours; the first of each of ours is what is written
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "silu": "silu",
  "swish": "silu",
  "relu": "relu",
}
PREFIXES = (
  "model.", "module.", "vit.", "deit.", "dinov2.", "dinov2_with_registers.", "dinov3_vit.", "vision_tower.",
  "vision_model.",
)  # fmt: skip
IGNORED = (
  r"(embeddings\.)?mask_token", r".*position_ids", r"pooler\..*", r"decoder\..*", r"(visual|text)_projection\..*",
  r"(text_model|language_model|multi_modal_projector)\..*", r"logit_(scale|bias)", r"lm_head\..*", r"image_newline",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
  """One model_type: what its config.json means where it is silent, and how its arrays are called."""

  names: str  # whose names it has: vit, clip or dinov3
  defaults: Mapping[str, Any]
  prefix: str = ""  # before all names but the head's, in a model with a head
  mean_std: tuple[Any, Any] = HALF


PLAIN = dict(
  hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="gelu",
  layer_norm_eps=1e-12, image_size=224, patch_size=16, num_channels=3, qkv_bias=True,
)  # fmt: skip
_DINOV2 = PLAIN | dict(patch_size=14, layer_norm_eps=1e-6, mlp_ratio=4, layerscale_value=1.0, use_swiglu_ffn=False)
_SIGLIP = PLAIN | dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vision_use_head=True)
_DINOV3 = PLAIN | dict(
  hidden_size=384, intermediate_size=1536, num_attention_heads=6, layer_norm_eps=1e-5, rope_theta=100.0,
  layerscale_value=1.0, use_gated_mlp=False, num_register_tokens=0,
)  # fmt: skip
FAMILIES = {
  "vit": Family("vit", PLAIN, "vit."),
  "deit": Family("vit", PLAIN, "deit.", IMAGENET),
  "vit_mae": Family("vit", PLAIN, "vit.", IMAGENET),
  "dinov2": Family("vit", _DINOV2, "dinov2.", IMAGENET),
  "dinov2_with_registers": Family("vit", _DINOV2 | dict(num_register_tokens=4), "dinov2_with_registers.", IMAGENET),
  "dinov3_vit": Family("dinov3", _DINOV3, "", IMAGENET),
  "clip_vision_model": Family(
    "clip", PLAIN | dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5), "vision_model.", CLIP
  ),
  "siglip_vision_model": Family("clip", _SIGLIP, "vision_model."),
  "siglip2_vision_model": Family("clip", _SIGLIP | dict(num_patches=256), "vision_model."),
}
WHOLE = {  # models of more than a vision tower: what the tower is where it does not say
  "clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model",
}  # fmt: skip
EXCLUDED = {
  "beit": "its attention adds a bias for every pair of places, which tokens that merge or leave do not have",
  "data2vec-vision": "its attention adds a bias for every pair of places, which tokens that merge or leave do not have",
}


def open_huggingface(directory: Path, config: Mapping[str, Any]) -> Source:
  """Weights of a directory with transformers' config.json.

  Raises:
    ValueError: an architecture or a field that tokred does not have, or weights that cannot be read.
    FileNotFoundError: weights that are not there.
  """
  name, tower = _tower(directory, config)
  family = FAMILIES[name]
  c = {**family.defaults, **tower}
  state = strip(open_directory(directory), PREFIXES, IGNORED)
  state = {name: array for name, array in state.items() if 0 not in array.shape}  # a table of no registers
  state = _with_zero_biases(state) if family.names == "dinov3" else state
  head = next((array.shape[0] for n, array in state.items() if n in ("classifier.weight", "cls_classifier.weight")), 0)
  if head and name == "clip_vision_model":
    raise ValueError(
      f"{directory}: CLIPForImageClassification reads patches that no norm has seen, which tokred has no field for; "
      "valid: CLIPVisionModel, CLIPModel"
    )
  if head and name.startswith("siglip"):  # reads the mean, so that the attention pool lies idle
    state = {n: array for n, array in state.items() if not n.startswith("head.")}
  model, grid = _fields(directory, c, name, state, head)
  labels = config.get("id2label") or {}
  labels = tuple(str(labels[key]) for key in sorted(labels, key=int)) if head else ()
  known = len(labels) == head and not all(re.fullmatch(r"LABEL_\d+", label) for label in labels)
  mean_std = tuple(values[: model["channels"]] for values in family.mean_std)
  data = preprocessing(directory, model["image_size"], mean_std)
  fields = {"model": model, "data": data | ({"labels": labels} if known else {})}
  teacher = "distillation_classifier.weight" in state
  return Source(str(directory), fields, state, lambda heads: rows(name, heads, teacher, c["num_channels"]), grid)


def tower(file: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any], int]:
  """The vision tower of a larger model: its family, fields of config.model, and how many layers it has.

  Args:
    file: config.json, for errors.
    config: what it holds; the tower's part is `vision_config`.
  """
  name, own = _tower(file.parent, config)
  fields, _ = _fields(file.parent, {**FAMILIES[name].defaults, **own}, name, {}, 0)
  return name, fields, fields["depth"]


def _tower(directory: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
  """The family of the vision tower and its part of config.json."""
  kind = str(config.get("model_type"))
  tower = config.get("vision_config")
  if isinstance(tower, Mapping):
    own = str(tower.get("model_type") or WHOLE.get(kind))
    kind, config = WHOLE.get(own, own), tower
  if kind in FAMILIES:
    return kind, config
  reason = f": {EXCLUDED[kind]}" if kind in EXCLUDED else ""
  raise ValueError(
    f"{directory / 'config.json'}: model_type={kind!r} is not an architecture that tokred knows{reason}; "
    f"{nearest(kind, [*FAMILIES, *WHOLE])}"
  )


def _patches(where: Path, c: Mapping[str, Any]) -> tuple[int, tuple[int, int]]:
  """Pixels of a patch's side, and the grid of patches."""
  patch = _pair(c["patch_size"], where, "patch_size")
  if patch[0] != patch[1]:
    raise ValueError(f"{where}: patch_size={list(patch)}; valid: one number, or two that are equal")
  patch = patch[0]
  if "num_patches" in c:  # SigLIP 2 for any aspect: its positions are a square
    side = round(c["num_patches"] ** 0.5)
    size = (side * patch, side * patch)
  else:
    size = _pair(c["image_size"], where, "image_size")
  grid = (size[0] // patch, size[1] // patch)
  if min(grid) < 1:
    raise ValueError(f"{where}: image_size={list(size)} is smaller than patch_size={patch}")
  if size != (grid[0] * patch, grid[1] * patch):
    warnings.warn(
      f"{where}: image_size={list(size)} is no multiple of patch_size={patch}; their model never sees the rest, so "
      f"config.model.image_size={(grid[0] * patch, grid[1] * patch)}",
      stacklevel=6,
    )
  return patch, grid


def _fields(
  directory: Path, c: Mapping[str, Any], name: str, state: Mapping[str, Lazy], head: int
) -> tuple[dict[str, Any], tuple[int, int]]:
  """Fields of config.model, and the grid of the positions."""
  where = directory / "config.json"
  patch, grid = _patches(where, c)
  if c["hidden_act"] not in ACTIVATIONS:
    raise ValueError(f"{where}: hidden_act={c['hidden_act']!r} is unknown; {nearest(c['hidden_act'], ACTIVATIONS)}")
  width, mlp_dim, gated = c["hidden_size"], c["intermediate_size"], c.get("use_swiglu_ffn") or c.get("use_gated_mlp")
  activation = ACTIVATIONS[c["hidden_act"]]
  if "mlp_ratio" in c:  # DINOv2 says how wide in multiples; two thirds of it where gated, in steps of 8
    mlp_dim = int(width * c["mlp_ratio"])
    if gated:
      mlp_dim, activation = (int(mlp_dim * 2 / 3) + 7) // 8 * 8, "silu"
  sizes = dict(width=width, depth=c["num_hidden_layers"], mlp_dim=mlp_dim, num_heads=c["num_attention_heads"])
  biases = [c.get(f"{which}_bias", which != "key") for which in ("query", "key", "value")]
  fields = sizes | dict(
    variant=variant(**sizes, patch=patch),
    image_size=(grid[0] * patch, grid[1] * patch),
    channels=c["num_channels"],
    num_classes=head,
    norm_eps=c["layer_norm_eps"],
    activation=activation,
    mlp="gated" if gated else "plain",
    qkv_bias=any(biases) if name == "dinov3_vit" else c["qkv_bias"],
    num_registers=c.get("num_register_tokens", 0),
    layer_scale=float(c.get("layerscale_value", 0.0)),
  )
  if name == "deit":
    teacher = "distillation_classifier.weight" in state
    fields |= dict(distilled=True) if teacher else dict(num_registers=1)
  elif name.startswith("dinov2") and head:
    fields |= dict(pool="cls_avg")
  elif name == "dinov3_vit":
    fields |= dict(position="rope2d", rope_theta=float(c["rope_theta"]))
  elif name == "clip_vision_model":
    fields |= dict(pre_norm=True, patch_bias=False)
  elif name.startswith("siglip"):
    fields |= dict(pool="map" if c["vision_use_head"] and not head else "avg")
  return fields, grid


def _pair(value: Any, where: Path, field: str) -> tuple[int, int]:
  pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
  if len(pair) != 2 or not all(isinstance(v, int) and v > 0 for v in pair):
    raise ValueError(f"{where}: {field}={value!r}; valid: a positive integer, or [height, width]")
  return pair


def rows(name: str, h: int, teacher: bool = False, channels: int = 3) -> tuple[Row, ...]:
  """The table of a family: names without the prefixes of `strip`.

  Args:
    name: a key of FAMILIES.
    h: attention heads.
    teacher: DeiT with a head of its own for the distillation token; else that token is read by nobody, a register.
    channels: of an image.
  """
  if name == "dinov3_vit":
    return _dinov3(h)
  if FAMILIES[name].names == "clip":
    return _clip(h, name, channels)
  theirs, ours = "encoder.layer.{}.", "block_{}/"
  common = (
    Row("embeddings.cls_token", "cls_token"),
    Row("embeddings.position_embeddings", "pos_embed"),
    Row("embeddings.patch_embeddings.projection.weight", "patch_embed/kernel", CONV),
    Row("embeddings.patch_embeddings.projection.bias", "patch_embed/bias"),
    *heads_in(theirs + "attention.attention.query", ours + "attn/qkv", h, "[0/3]"),
    *heads_in(theirs + "attention.attention.key", ours + "attn/qkv", h, "[1/3]"),
    *heads_in(theirs + "attention.attention.value", ours + "attn/qkv", h, "[2/3]"),
    *heads_out(theirs + "attention.output.dense", ours + "attn/proj", h),
    *norm("layernorm", "norm"),
  )
  if name.startswith("dinov2"):
    return (
      *common,
      Row("embeddings.register_tokens", "registers"),
      *norm(theirs + "norm1", ours + "norm1"),
      *norm(theirs + "norm2", ours + "norm2"),
      *_scales(theirs, ours),
      Row(theirs + "mlp.weights_in.weight[0/2]", ours + "mlp/gate/kernel", MATRIX),
      Row(theirs + "mlp.weights_in.weight[1/2]", ours + "mlp/fc1/kernel", MATRIX),
      Row(theirs + "mlp.weights_in.bias[0/2]", ours + "mlp/gate/bias"),
      Row(theirs + "mlp.weights_in.bias[1/2]", ours + "mlp/fc1/bias"),
      *linear(theirs + "mlp.weights_out", ours + "mlp/fc2"),
      *linear(theirs + "mlp.fc1", ours + "mlp/fc1"),
      *linear(theirs + "mlp.fc2", ours + "mlp/fc2"),
      *linear("classifier", "head"),
    )
  return (
    *common,
    Row("embeddings.distillation_token", "dist_token" if teacher else "registers"),
    *norm(theirs + "layernorm_before", ours + "norm1"),
    *norm(theirs + "layernorm_after", ours + "norm2"),
    *linear(theirs + "intermediate.dense", ours + "mlp/fc1"),
    *linear(theirs + "output.dense", ours + "mlp/fc2"),
    *linear("cls_classifier" if teacher else "classifier", "head"),
    *linear("distillation_classifier", "head_dist"),
  )


def _scales(theirs: str, ours: str) -> tuple[Row, Row]:
  return (
    Row(theirs + "layer_scale1.lambda1", ours + "layer_scale1"),
    Row(theirs + "layer_scale2.lambda1", ours + "layer_scale2"),
  )


def _dinov3(h: int) -> tuple[Row, ...]:
  theirs, ours = "layer.{}.", "block_{}/"
  return (
    Row("embeddings.cls_token", "cls_token"),
    Row("embeddings.register_tokens", "registers"),
    Row("embeddings.patch_embeddings.weight", "patch_embed/kernel", CONV),
    Row("embeddings.patch_embeddings.bias", "patch_embed/bias"),
    *heads_in(theirs + "attention.q_proj", ours + "attn/qkv", h, "[0/3]"),
    *heads_in(theirs + "attention.k_proj", ours + "attn/qkv", h, "[1/3]"),
    *heads_in(theirs + "attention.v_proj", ours + "attn/qkv", h, "[2/3]"),
    *heads_out(theirs + "attention.o_proj", ours + "attn/proj", h),
    *norm(theirs + "norm1", ours + "norm1"),
    *norm(theirs + "norm2", ours + "norm2"),
    *_scales(theirs, ours),
    *linear(theirs + "mlp.gate_proj", ours + "mlp/gate"),
    *linear(theirs + "mlp.up_proj", ours + "mlp/fc1"),
    *linear(theirs + "mlp.down_proj", ours + "mlp/fc2"),
    *norm("norm", "norm"),
  )


def _clip(h: int, name: str, channels: int) -> tuple[Row, ...]:
  """CLIP and SigLIP; the misspelt norm is theirs."""
  theirs, ours, pool = "encoder.layers.{}.", "block_{}/", "head.attention."
  patch = _flat_patches(channels) if name == "siglip2_vision_model" else CONV
  return (
    Row("embeddings.class_embedding", "cls_token", TOKEN),
    Row("embeddings.position_embedding.weight", "pos_embed", TABLE),
    Row("embeddings.patch_embedding.weight", "patch_embed/kernel", patch),
    Row("embeddings.patch_embedding.bias", "patch_embed/bias"),
    *norm("pre_layrnorm", "pre_norm"),
    *heads_in(theirs + "self_attn.q_proj", ours + "attn/qkv", h, "[0/3]"),
    *heads_in(theirs + "self_attn.k_proj", ours + "attn/qkv", h, "[1/3]"),
    *heads_in(theirs + "self_attn.v_proj", ours + "attn/qkv", h, "[2/3]"),
    *heads_out(theirs + "self_attn.out_proj", ours + "attn/proj", h),
    *norm(theirs + "layer_norm1", ours + "norm1"),
    *norm(theirs + "layer_norm2", ours + "norm2"),
    *linear(theirs + "mlp.fc1", ours + "mlp/fc1"),
    *linear(theirs + "mlp.fc2", ours + "mlp/fc2"),
    *norm("post_layernorm", "norm"),
    Row("head.probe", "pool/probe"),
    *(
      Row(f"{pool}in_proj_{kind}[{i}/3]", f"pool/attn/{part}/{ours_kind}", to_heads(h))
      for i, part in enumerate(("query", "key", "value"))
      for kind, ours_kind in (("weight", "kernel"), ("bias", "bias"))
    ),
    *heads_out(pool + "out_proj", "pool/attn/out", h),
    *norm("head.layernorm", "pool/norm"),
    *linear("head.mlp.fc1", "pool/mlp/fc1"),
    *linear("head.mlp.fc2", "pool/mlp/fc2"),
    *linear("classifier", "head"),
  )


def _flat_patches(channels: int) -> Layout:
  """(D, patch x patch x channels) <-> HWIO."""

  def read(w: np.ndarray) -> np.ndarray:
    side = round((w.shape[1] / channels) ** 0.5)
    return w.reshape(w.shape[0], side, side, channels).transpose(1, 2, 3, 0)

  return Layout(read, lambda w: w.transpose(3, 0, 1, 2).reshape(w.shape[3], -1))


def _with_zero_biases(state: Mapping[str, Lazy]) -> dict[str, Lazy]:
  """Biases that DINOv3 leaves out where ours has them; a zero in their place changes nothing."""
  attention = any(re.fullmatch(r"layer\.\d+\.attention\.[qkv]_proj\.bias", name) for name in state)
  kind = r"layer\.\d+\.(attention\.[qkvo]|mlp\.(gate|up|down))_proj\.weight"
  out = dict(state)
  for name, array in state.items():
    bias = name.removesuffix("weight") + "bias"
    if re.fullmatch(kind, name) and bias not in state and (attention or "attention" not in name or ".o_" in name):
      size = array.shape[:1]
      out[bias] = Lazy(size, np.dtype(np.float32), lambda size=size: np.zeros(size, np.float32))
  return out
