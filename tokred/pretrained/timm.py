"""State dicts of timm's VisionTransformer and DeiT: a safetensors file, beside timm's config.json or bare.

Names and shapes tell the architecture; the number of heads, the activation and the preprocessing come from the name and
`pretrained_cfg` in config.json.  Of a bare file the number of heads is asked for.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokred.config import nearest
from tokred.nn.block import ACTIVATIONS
from tokred.pretrained.arrays import open_directory, open_safetensors
from tokred.pretrained.rules import CONV, MATRIX, Lazy, Row, heads_in, heads_out, linear, norm, to_heads
from tokred.pretrained.source import Source, square, strip, variant

PREFIXES = ("model.", "module.")
HEADS = {  # by the size that a name tells
  "tiny": 3, "small": 6, "medium": 8, "betwixt": 10, "base": 12, "large": 16, "huge": 16, "so400m": 16, "giant": 16,
  "gigantic": 16,
}  # fmt: skip
ARCHITECTURES = ("vit", "deit", "deit3", "flexivit")
REFUSED = ("norm_layer", "block_fn", "attn_layer", "pool_include_prefix")  # model_args that no array shows
_ROTARY = "it turns queries and keys by rotary positions"
ODD = {"rpn": "its norms stand behind attention and MLP", "pe": _ROTARY, "rope": _ROTARY}  # by a part of the name
BEIT = "its attention adds a bias for every pair of places, which tokens that merge or leave do not have"


def open_timm(path: Path, config: Mapping[str, Any] | None = None) -> Source:
  """Weights in timm's names.

  Args:
    path: a safetensors file, or a directory that holds one beside timm's config.json.
    config: the content of that config.json; None: the one beside the file, where it is timm's.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a pickle, a damaged file, or an architecture that tokred does not have.
  """
  state = strip(open_directory(path) if path.is_dir() else open_safetensors(path), PREFIXES)
  config = _beside(path) if config is None else config
  name = str(config.get("architecture", "")).split(".")[0]
  odd = BEIT if name.startswith("beit") else next((ODD[part] for part in name.split("_") if part in ODD), "")
  if name and (odd or name.split("_")[0] not in ARCHITECTURES):
    reason = f": {odd}" if odd else ""
    known = [f"{family}_{size}_..." for family in ARCHITECTURES[:3] for size in HEADS]
    raise ValueError(
      f"{path}: architecture={name!r} is not one that tokred knows{reason}; {nearest(name, known).split('valid')[0]}"
      f"valid: {', '.join(ARCHITECTURES)}"
    )
  if any("relative_position_bias_table" in key for key in state):
    raise ValueError(f"{path} is BEiT's, which tokred does not have: {BEIT}; valid: {', '.join(ARCHITECTURES)}")
  if "pos_embed" not in state and "cls_token" in state:
    raise ValueError(f"{path} has no pos_embed: rotary or relative positions in timm's names are not read")
  pretrained = {**config, **(config.get("pretrained_cfg") or {})}
  if (told := pretrained.get("global_pool") or "token") not in ("token", "avg", "map"):
    raise ValueError(f"{path}: global_pool={told!r} is not a pooling that tokred has; valid: token, avg, map")
  fields, grid, ask = _fields(state, name, pretrained)
  args = config.get("model_args") or {}
  if strange := [arg for arg in REFUSED if args.get(arg)]:
    raise ValueError(f"{path}: model_args.{strange[0]}={args[strange[0]]!r} is not read; valid: without it")
  if activation := args.get("act_layer"):
    if activation not in ACTIVATIONS:
      raise ValueError(f"{path}: model_args.act_layer={activation!r} is unknown; {nearest(activation, ACTIVATIONS)}")
    fields["activation"] = activation
  if (given := args.get("num_heads")) or (given := _num_heads(name, fields)):
    fields["num_heads"] = given
    sizes = [fields[field] for field in ("width", "depth", "mlp_dim", "num_heads")]
    fields["variant"] = variant(*sizes, fields["patch"])
  else:
    ask = (*ask, "num_heads")
    fields["variant"] = variant(fields["width"], fields["depth"], fields["mlp_dim"], 0, fields["patch"])
  del fields["patch"]
  packed = any(key.endswith("mlp.fc1.weight") and _is_packed(key, state) for key in state)
  groups = {"model": fields, "data": _data(pretrained)}
  return Source(str(path), groups, state, lambda heads: rows(heads, packed), grid, ask)


def _beside(path: Path) -> Mapping[str, Any]:
  file = path.parent / "config.json"
  try:
    config = json.loads(file.read_text())
  except (OSError, ValueError):
    return {}
  return config if isinstance(config, Mapping) and "architecture" in config else {}


def _num_heads(name: str, fields: Mapping[str, Any]) -> int | None:
  """Where the name tells it; the giants of DINOv2 and one that pools the mean have others."""
  size = name.split("_")[1] if "_" in name else ""
  heads = HEADS.get(size)
  if size == "giant" and fields["width"] == 1536:
    heads = 24
  elif name.startswith("vit_base_patch16_gap"):
    heads = 16
  return heads if heads and fields["width"] % heads == 0 else None


def _fields(
  state: Mapping[str, Lazy], name: str, pretrained: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[int, int] | None, tuple[str, ...]]:
  """Fields of config.model with `patch`, the grid of the positions, and the fields that nothing tells."""
  shape = lambda key: state[key].shape if key in state else None
  kernel = shape("patch_embed.proj.weight")
  if kernel is None or len(kernel) != 4:
    return {"width": 0, "depth": 0, "mlp_dim": 0, "patch": 16}, None, ()  # `merge` will list what is missing
  width, channels, patch = kernel[0], kernel[1], kernel[2]
  depth = 1 + max((int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)
  fc1, fc2 = shape("blocks.0.mlp.fc1.weight"), shape("blocks.0.mlp.fc2.weight")
  gated = "blocks.0.mlp.fc1_g.weight" in state or bool(fc1 and fc2 and fc1[0] == 2 * fc2[1])
  head = shape("head.weight")
  cls, registers = "cls_token" in state, (shape("reg_token") or (1, 0))[1]
  pool = "map" if any(key.startswith("attn_pool.") for key in state) else "cls" if cls else "avg"
  told = pretrained.get("global_pool")
  if told == "avg" or (told != "token" and pool == "cls" and "fc_norm.weight" in state):
    pool = "avg"
  fields = dict(
    width=width,
    depth=depth,
    mlp_dim=fc2[1] if fc2 else 0,
    patch=patch,
    channels=channels,
    num_classes=head[0] if head else 0,
    pool=pool,
    class_token=cls and pool in ("avg", "map"),
    distilled="head_dist.weight" in state,
    num_registers=registers,
    patch_bias="patch_embed.proj.bias" in state,
    pre_norm="norm_pre.weight" in state,
    final_norm="pooled" if "fc_norm.weight" in state and "norm.weight" not in state else "tokens",
    layer_scale=1e-5 if "blocks.0.ls1.gamma" in state else 0.0,
    qkv_bias="blocks.0.attn.qkv.bias" in state,
    qk_norm="blocks.0.attn.q_norm.weight" in state,
    mlp="gated" if gated else "plain",
  )
  if gated:
    fields["activation"] = "silu"
  if name:
    fields["norm_eps"] = 1e-5 if "clip" in name.split("_") or "xp" in name else 1e-6
    fields.setdefault("activation", _activation(name))
  count = (shape("pos_embed") or (1, 0))[1]
  prefix = cls + ("dist_token" in state)
  size = pretrained.get("input_size")
  size = tuple(size[1:]) if size and len(size) == 3 else None
  grid = (size[0] // patch, size[1] // patch) if size else None
  if not grid or count - math.prod(grid) not in (prefix, prefix + registers, 0):
    grid = square(count, (prefix, 0, prefix + registers))
  if not grid:
    return fields, None, ("image_size",)
  return fields | dict(image_size=(grid[0] * patch, grid[1] * patch)), grid, ()


def _activation(name: str) -> str:
  """timm runs the older SigLIPs with the exact GELU, and so do we."""
  if "quickgelu" in name:
    return "quick_gelu"
  newer = "siglip" in name and re.search(r"patch32|large\w*_512|so400m_patch16|giantopt", name)
  return "gelu_tanh" if newer else "gelu"


def _is_packed(key: str, state: Mapping[str, Lazy]) -> bool:
  second = state.get(key.replace("fc1", "fc2"))
  return second is not None and state[key].shape[0] == 2 * second.shape[1]


def _data(pretrained: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of config.data, as far as they are told."""
  out: dict[str, Any] = {}
  for theirs, ours in (("mean", "mean"), ("std", "std"), ("label_names", "labels")):
    if pretrained.get(theirs):
      out[ours] = tuple(pretrained[theirs])
  if pretrained.get("interpolation") in ("nearest", "bilinear", "bicubic", "lanczos"):
    out["resize"] = pretrained["interpolation"]
  if pretrained.get("crop_mode") == "squash":
    out["crop_fraction"] = 0.0
  elif pretrained.get("crop_pct"):
    out["crop_fraction"] = float(pretrained["crop_pct"])
  return out


def rows(h: int, packed: bool = False) -> tuple[Row, ...]:
  """The table: registers, LayerScale, qk-norm, gated MLPs, the distillation token and both poolings included.

  Args:
    h: attention heads.
    packed: `mlp.fc1` holds gate and value of a gated MLP, one below the other.
  """
  theirs, ours = "blocks.{}.", "block_{}/"
  fc1 = (
    Row(theirs + "mlp.fc1.weight[0/2]", ours + "mlp/gate/kernel", MATRIX),
    Row(theirs + "mlp.fc1.weight[1/2]", ours + "mlp/fc1/kernel", MATRIX),
    Row(theirs + "mlp.fc1.bias[0/2]", ours + "mlp/gate/bias"),
    Row(theirs + "mlp.fc1.bias[1/2]", ours + "mlp/fc1/bias"),
  )
  return (
    Row("cls_token", "cls_token"),
    Row("dist_token", "dist_token"),
    Row("reg_token", "registers"),
    Row("pos_embed", "pos_embed"),
    Row("patch_embed.proj.weight", "patch_embed/kernel", CONV),
    Row("patch_embed.proj.bias", "patch_embed/bias"),
    *norm("norm_pre", "pre_norm"),
    *norm(theirs + "norm1", ours + "norm1"),
    *norm(theirs + "norm2", ours + "norm2"),
    Row(theirs + "attn.qkv.weight", ours + "attn/qkv/kernel", to_heads(h, 3)),
    Row(theirs + "attn.qkv.bias", ours + "attn/qkv/bias", to_heads(h, 3)),
    *norm(theirs + "attn.q_norm", ours + "attn/q_norm"),
    *norm(theirs + "attn.k_norm", ours + "attn/k_norm"),
    *heads_out(theirs + "attn.proj", ours + "attn/proj", h),
    *(fc1 if packed else linear(theirs + "mlp.fc1", ours + "mlp/fc1")),
    *linear(theirs + "mlp.fc1_g", ours + "mlp/gate"),
    *linear(theirs + "mlp.fc1_x", ours + "mlp/fc1"),
    *linear(theirs + "mlp.fc2", ours + "mlp/fc2"),
    Row(theirs + "ls1.gamma", ours + "layer_scale1"),
    Row(theirs + "ls2.gamma", ours + "layer_scale2"),
    *norm("norm", "norm"),
    *norm("fc_norm", "fc_norm"),
    Row("attn_pool.latent", "pool/probe"),
    *heads_in("attn_pool.q", "pool/attn/query", h),
    Row("attn_pool.kv.weight[0/2]", "pool/attn/key/kernel", to_heads(h)),
    Row("attn_pool.kv.weight[1/2]", "pool/attn/value/kernel", to_heads(h)),
    Row("attn_pool.kv.bias[0/2]", "pool/attn/key/bias", to_heads(h)),
    Row("attn_pool.kv.bias[1/2]", "pool/attn/value/bias", to_heads(h)),
    *heads_out("attn_pool.proj", "pool/attn/out", h),
    *norm("attn_pool.norm", "pool/norm"),
    *linear("attn_pool.mlp.fc1", "pool/mlp/fc1"),
    *linear("attn_pool.mlp.fc2", "pool/mlp/fc2"),
    *linear("head", "head"),
    *linear("head_dist", "head_dist"),
  )
