"""Reads weights that others wrote into our parameter tree.

A file is a flat dict of arrays.  A table of rules, (regex, replacement, transform), renames each of them and turns it
into our layout; then both trees are compared by name, and anything that is missing or left over is an error that lists
both sides.  Parameters of reducers (`.../reduce/...`) are expected absentees: a dense model never had them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file

Rule = tuple[str, str, Callable[[np.ndarray], np.ndarray] | None]  # regex of the whole name, replacement, transform

PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt", ".tar")
LISTED = 30  # names in an error message


def load_timm(path: str | Path, params_like: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of a ViT from a timm state dict.

  Args:
    path: safetensors file with timm's names: `cls_token`, `blocks.0.attn.qkv.weight`, ...; linear layers are
      (out, in) and convolutions OIHW.
    params_like: the model's parameters, concrete or abstract (`jax.eval_shape` of its init).

  Returns:
    The tree of `params_like`, in its dtypes and NamedShardings; parameters of reducers are those of `params_like`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a pickle, a damaged file, or names or shapes that do not match.
  """
  state = read_safetensors(path)
  target = traverse_util.flatten_dict(dict(params_like), sep="/")
  qkv, position = target.get("block_0/attn/qkv/kernel"), target.get("pos_embed")
  if position is not None:
    state = _positions(state, position.shape[1])
  try:
    return merge(params_like, translate(state, timm_rules(qkv.shape[2] if qkv is not None else 1)))
  except ValueError as error:
    raise ValueError(f"weights {str(path)!r} do not fit config.model: {error}") from None


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
  """All arrays of a safetensors file by name.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a pickle, a damaged file, or arrays that are not floating point.
  """
  path = Path(path)
  if path.suffix.lower() in PICKLES:
    raise ValueError(
      f"weights {str(path)!r} are a pickle, which can run code when read; valid: .safetensors.  To convert a state "
      f"dict: safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), {path.stem + '.safetensors'!r})"
    )
  if not path.is_file():
    raise FileNotFoundError(f"weights {str(path)!r}: no such file; valid: a .safetensors file")
  try:
    state = load_file(path)
  except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"weights {str(path)!r} are damaged, truncated or not safetensors ({error}); fetch the file again"
    ) from None
  for name, array in state.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(
        f"weights {str(path)!r}: {name} is {array.dtype}; valid: float64, float32, float16, bfloat16 (not quantised)"
      )
  return state


def translate(state: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
  """Renames and transforms every array by the first rule whose regex matches its whole name.

  A name that no rule matches stays as it is, so that `merge` lists it as left over.

  Args:
    state: arrays by their foreign names.
    rules: the table.

  Raises:
    ValueError: two arrays end under one name, or a transform does not suit an array's shape.
  """
  out: dict[str, np.ndarray] = {}
  for source, array in state.items():
    name = source
    for pattern, replacement, transform in rules:
      match = re.fullmatch(pattern, source)
      if match:
        name = match.expand(replacement)
        try:
          array = array if transform is None else transform(array)
        except ValueError:
          raise ValueError(f"{source} of shape {array.shape} has not the layout of {name}") from None
        break
    if name in out:
      raise ValueError(f"{source} and another array both stand for {name}")
    out[name] = array
  return out


def merge(target: Mapping[str, Any], loaded: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Puts arrays into the places of a parameter tree.

  Args:
    target: nested dict of arrays or of `jax.ShapeDtypeStruct`s.
    loaded: arrays by path, "block_0/attn/qkv/kernel".

  Returns:
    The tree of `target`; every leaf in its dtype, and on its devices where it has a NamedSharding.

  Raises:
    ValueError: names on one side only, or shapes that differ; lists all of both sides.
  """
  wanted = traverse_util.flatten_dict(dict(target), sep="/")
  absent = [name for name in wanted if name not in loaded]
  kept = [name for name in absent if "reduce" in name.split("/")]
  abstract = [name for name in kept if isinstance(wanted[name], jax.ShapeDtypeStruct)]
  problems = {
    "missing": [name for name in absent if name not in kept],
    "left over": [name for name in loaded if name not in wanted],
    "of another shape": [
      f"{name} {tuple(loaded[name].shape)} for {tuple(leaf.shape)}"
      for name, leaf in wanted.items()
      if name in loaded and tuple(loaded[name].shape) != tuple(leaf.shape)
    ],
    "reducers' own and still without values (initialise them first)": abstract,
  }
  if any(problems.values()):
    raise ValueError("; ".join(f"{what}: {_listed(names)}" for what, names in problems.items() if names))
  placed = {name: leaf if name in kept else _place(loaded[name], leaf) for name, leaf in wanted.items()}
  return traverse_util.unflatten_dict(placed, sep="/")


def timm_rules(num_heads: int) -> tuple[Rule, ...]:
  """timm's VisionTransformer and DeiT: registers, LayerScale, qk-norm and the distillation token included."""
  block = r"blocks\.(\d+)\."

  def kernel(w: np.ndarray) -> np.ndarray:  # (out, in) -> (in, out)
    return w.T

  def qkv(w: np.ndarray) -> np.ndarray:  # (3 H d[, D]) -> ([D, ]3, H, d)
    return w.T.reshape(*w.shape[1:], 3, num_heads, -1)

  def heads_in(w: np.ndarray) -> np.ndarray:  # (D, H d) -> (H, d, D)
    return w.T.reshape(num_heads, -1, w.shape[0])

  def conv(w: np.ndarray) -> np.ndarray:  # OIHW -> HWIO
    return np.transpose(w, (2, 3, 1, 0))

  return (
    (r"(cls_token|dist_token|pos_embed)", r"\1", None),
    (r"reg_token", r"registers", None),
    (r"patch_embed\.proj\.weight", r"patch_embed/kernel", conv),
    (r"patch_embed\.proj\.bias", r"patch_embed/bias", None),
    (block + r"(norm[12])\.weight", r"block_\1/\2/scale", None),
    (block + r"(norm[12])\.bias", r"block_\1/\2/bias", None),
    (block + r"attn\.qkv\.weight", r"block_\1/attn/qkv/kernel", qkv),
    (block + r"attn\.qkv\.bias", r"block_\1/attn/qkv/bias", qkv),
    (block + r"attn\.([qk]_norm)\.weight", r"block_\1/attn/\2/scale", None),
    (block + r"attn\.([qk]_norm)\.bias", r"block_\1/attn/\2/bias", None),
    (block + r"attn\.proj\.weight", r"block_\1/attn/proj/kernel", heads_in),
    (block + r"attn\.proj\.bias", r"block_\1/attn/proj/bias", None),
    (block + r"mlp\.(fc[12])\.weight", r"block_\1/mlp/\2/kernel", kernel),
    (block + r"mlp\.(fc[12])\.bias", r"block_\1/mlp/\2/bias", None),
    (block + r"ls([12])\.gamma", r"block_\1/layer_scale\2", None),
    (r"norm\.weight", r"norm/scale", None),
    (r"norm\.bias", r"norm/bias", None),
    (r"(head|head_dist)\.weight", r"\1/kernel", kernel),
    (r"(head|head_dist)\.bias", r"\1/bias", None),
  )


def _positions(state: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
  """timm gives a position to every prefix token, registers too, or to none; ours has one for CLS and distillation.

  What a register gets from its position is a constant and goes into the register; where CLS has none, it gets zeros.
  """
  state = dict(state)
  position, registers = state.get("pos_embed"), state.get("reg_token")
  if position is None or position.ndim != 3:
    return state
  prefix = sum(name in state for name in ("cls_token", "dist_token"))
  if registers is not None and position.shape[1] == length + registers.shape[1]:
    own, own_end = prefix, prefix + registers.shape[1]
    state["reg_token"] = registers + position[:, own:own_end]
    state["pos_embed"] = np.concatenate([position[:, :own], position[:, own_end:]], axis=1)
  elif position.shape[1] == length - prefix:
    state["pos_embed"] = np.pad(position, ((0, 0), (prefix, 0), (0, 0)))
  return state


def _place(array: np.ndarray, leaf: Any) -> jax.Array:
  """In the leaf's dtype; sharded as the leaf is, each device getting its own part from the host."""
  array = array.astype(leaf.dtype)
  sharding = getattr(leaf, "sharding", None)
  return jax.device_put(array, sharding) if isinstance(sharding, jax.sharding.NamedSharding) else jnp.asarray(array)


def _listed(names: Sequence[str]) -> str:
  names = sorted(names)
  return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
