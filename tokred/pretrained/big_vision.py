"""The .npz files of vision_transformer and big_vision: AugReg ViT, SigLIP and others, as flax wrote them.

Names are paths in a flax tree; what stands before the vision tower ("params/", "params/img/") and how the layers are
kept (one by one, or stacked by a scan) differ from file to file.  GELU is flax's, in its tanh form.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokred.pretrained.arrays import open_npz
from tokred.pretrained.preprocessing import HALF
from tokred.pretrained.rules import Layout, Lazy, Row
from tokred.pretrained.source import Source, square, strip, variant

PREFIXES = ("params/", "target/", "img/")
IGNORED = (r"txt/.*", r"t", r"b", r"(opt|states?)/.*", r"t/.*")  # text tower, temperature and bias of SigLIP's loss
AXIS = Layout(lambda a: a[..., None, :, :], lambda a: a[..., 0, :, :])  # (D, H, d) <-> (D, 1, H, d), a part of ours
ROOT = "Transformer/"


def open_big_vision(path: Path) -> Source:
  """Weights of an .npz file.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a damaged file, pickled objects, or no ViT.
  """
  state = _unstacked(strip(open_npz(path), PREFIXES, IGNORED))
  shape = lambda key: state[key].shape if key in state else None
  kernel, query = shape("embedding/kernel"), next((a.shape for n, a in state.items() if "/query/kernel" in n), None)
  first = next((a.shape for n, a in state.items() if re.fullmatch(rf"{ROOT}\w+_0/\w+/Dense_0/kernel", n)), None)
  if not (kernel and query and first):
    raise ValueError(f"{path} holds no ViT of big_vision; it starts with {', '.join(sorted(state)[:3])}")
  patch, _, channels, width = kernel
  cls, count = "cls" in state, next((a.shape[1] for n, a in state.items() if n.endswith("pos_embedding")), 0)
  grid, head = square(count, (int(cls), 0)), shape("head/kernel")
  sizes = dict(width=width, depth=_depth(state), mlp_dim=first[1], num_heads=query[1])
  model = sizes | dict(
    variant=variant(**sizes, patch=patch),
    channels=channels,
    num_classes=head[1] if head else 0,
    pool="map" if "MAPHead_0/probe" in state else "cls" if cls else "avg",
    class_token=cls and "MAPHead_0/probe" in state,
    position="learned" if count else "sincos2d",
    patch_bias="embedding/bias" in state,
    activation="gelu_tanh",
    norm_eps=1e-6,
  )
  if grid:
    model |= dict(image_size=(grid[0] * patch, grid[1] * patch))
  mean, std = HALF
  data = dict(mean=mean, std=std, resize="bilinear", crop_fraction=0.0)
  ask = () if grid else ("image_size",)
  return Source(str(path), {"model": model, "data": data}, state, lambda _: rows(), grid, ask)


def _depth(state: Mapping[str, Any]) -> int:
  return 1 + max((int(m[1]) for n in state if (m := re.match(rf"{ROOT}encoderblock_(\d+)/", n))), default=-1)


def _unstacked(state: Mapping[str, Lazy]) -> dict[str, Lazy]:
  """Layers one by one, where a scan has stacked them along the first axis."""
  out: dict[str, Lazy] = {}
  for name, array in state.items():
    stacked = re.fullmatch(rf"({ROOT}encoderblock)(/.*)", name)
    for layer in range(array.shape[0] if stacked else 1):
      if stacked:
        out[f"{stacked[1]}_{layer}{stacked[2]}"] = array.map(lambda a, layer=layer: a[layer])
      else:
        out[name] = array
  return out


def rows() -> tuple[Row, ...]:
  """The table; the numbers in their names count modules as flax met them, which differ between both libraries."""
  theirs, ours = ROOT + "encoderblock_{}/", "block_{}/"
  out = [
    Row("cls", "cls_token"),
    Row("pos_embedding", "pos_embed"),
    Row(ROOT + "posembed_input/pos_embedding", "pos_embed"),
    Row("embedding/kernel", "patch_embed/kernel"),
    Row("embedding/bias", "patch_embed/bias"),
    Row(ROOT + "encoder_norm/scale", "norm/scale"),
    Row(ROOT + "encoder_norm/bias", "norm/bias"),
    Row("head/kernel", "head/kernel"),
    Row("head/bias", "head/bias"),
    Row("MAPHead_0/probe", "pool/probe"),
  ]
  blocks = ((1, 2, 3), (0, 1, 0))  # of attention, second norm and MLP: in vision_transformer, in big_vision
  for leaf in ("kernel", "bias"):
    for attention, _, mlp in blocks:
      for i, part in enumerate(("query", "key", "value")):
        layout = AXIS if leaf == "kernel" else Layout(lambda b: b[None], lambda b: b[0])
        source = f"{theirs}MultiHeadDotProductAttention_{attention}/{part}/{leaf}"
        out.append(Row(source, f"{ours}attn/qkv/{leaf}[{i}/3]", layout))
      out.append(Row(f"{theirs}MultiHeadDotProductAttention_{attention}/out/{leaf}", f"{ours}attn/proj/{leaf}"))
      for i in (0, 1):
        out.append(Row(f"{theirs}MlpBlock_{mlp}/Dense_{i}/{leaf}", f"{ours}mlp/fc{i + 1}/{leaf}"))
    for part in ("query", "key", "value", "out"):
      out.append(Row(f"MAPHead_0/MultiHeadDotProductAttention_0/{part}/{leaf}", f"pool/attn/{part}/{leaf}"))
    for i in (0, 1):
      out.append(Row(f"MAPHead_0/MlpBlock_0/Dense_{i}/{leaf}", f"pool/mlp/fc{i + 1}/{leaf}"))
  for leaf in ("scale", "bias"):
    out.append(Row(f"{theirs}LayerNorm_0/{leaf}", f"{ours}norm1/{leaf}"))
    out += [Row(f"{theirs}LayerNorm_{second}/{leaf}", f"{ours}norm2/{leaf}") for _, second, _ in blocks]
    out.append(Row(f"MAPHead_0/LayerNorm_0/{leaf}", f"pool/norm/{leaf}"))
  return tuple(out)
