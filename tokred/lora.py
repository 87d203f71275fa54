"""Adapters of low rank beside frozen kernels, as a function of the parameters: no module knows of them.

    W' = W + (alpha / rank) A B        (Hu et al., 2021, LoRA, arXiv:2106.09685, eq. 3)

A and B stand in a subtree of their own, `lora/block_0/attn/qkv/kernel/a` and `/b`, so that optimiser, average,
shardings and checkpoints treat them as any parameter.  A step merges before it applies the module, and everything that
leaves training (evaluation, `tokred.load`, exports, another run's `init`) sees merged kernels and no subtree.

A kernel of more than two axes is the matrix from all its input axes to all its output axes: qkv (D, 3, H, d) is
D -> 3 H d with one A for the three, as adapters of a fused linear layer are; proj (H, d, D) is H d -> D.

What it saves is the optimiser's state and the gradient's memory of frozen kernels, not the backward pass itself: the
gradient of W' is computed and then projected.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

SUBTREE = "lora"
_ONE_INPUT = re.compile(r"(.*/)?(qkv|query|key|value)/kernel")  # (D, ...): their other axes are heads; else the last is


def add(params: Mapping[str, Any], config_lora: ConfigDict, seed: int) -> dict[str, Any]:
  """The parameters with their adapters: A is Gaussian of standard deviation 1 / sqrt(inputs), B is zero.

  So the merged kernels are those that came in, to the bit.

  Args:
    params: nested dict of arrays, or of tracers.
    config_lora: `config.lora`; rank 0 changes nothing.
    seed: of the draw.

  Raises:
    ValueError: a rank or scale that is none, a regex that is none or matches nothing, or a target that is no kernel.
  """
  names = targets(params, config_lora)
  if not names:
    return dict(params)
  flat, rank = traverse_util.flatten_dict(dict(params), sep="/"), config_lora.rank
  key, new = jax.random.fold_in(jax.random.key(seed), 0x10AA), {}  # another stream than that of the parameters
  for index, name in enumerate(names):
    rows, columns = _matrix(name, flat[name].shape)
    a = jax.random.normal(jax.random.fold_in(key, index), (rows, rank), jnp.float32) / math.sqrt(rows)
    new |= {f"{SUBTREE}/{name}/a": a, f"{SUBTREE}/{name}/b": jnp.zeros((rank, columns), jnp.float32)}
  return dict(params) | traverse_util.unflatten_dict(new, sep="/")


def merge(params: Mapping[str, Any], alpha: float) -> dict[str, Any]:
  """The parameters with their adapters in the kernels, and without the subtree; as they are where there is none.

  Args:
    params: nested dict of numpy or jax arrays, or of tracers; kernels keep their dtype.
    alpha: `config.lora.alpha` of the run that trained them.
  """
  if SUBTREE not in params:
    return dict(params)
  flat = traverse_util.flatten_dict({name: tree for name, tree in params.items() if name != SUBTREE}, sep="/")
  pairs = traverse_util.flatten_dict(dict(params[SUBTREE]), sep="/")
  for name in [path.removesuffix("/a") for path in pairs if path.endswith("/a")]:
    a, b, kernel = pairs[f"{name}/a"], pairs[f"{name}/b"], flat[name]
    # On the host numpy multiplies; elsewhere a default precision below float32 would differ from what is saved.
    product = a @ b if isinstance(a, np.ndarray) else jnp.matmul(a, b, precision="highest")
    flat[name] = kernel + (alpha / a.shape[-1] * product).reshape(kernel.shape).astype(kernel.dtype)
  return traverse_util.unflatten_dict(flat, sep="/")


def frozen(names: Collection[str], config_lora: ConfigDict, may_miss: Collection[str] | None = None) -> frozenset[str]:
  """Of the paths of all parameters those that do not train where there are adapters: neither these nor `train`.

  Args:
    names: the paths.
    config_lora: `config.lora`.
    may_miss: regexes of `train` that may match nothing; None: any may.

  Raises:
    ValueError: another one matches nothing.
  """
  if not config_lora.rank:
    return frozenset()
  patterns = [_compiled("train", regex) for regex in config_lora.train]
  for regex, pattern in zip(config_lora.train, patterns, strict=True):
    if may_miss is not None and regex not in may_miss and not any(map(pattern.fullmatch, names)):
      raise ValueError(
        f"config.lora.train: {regex!r} matches none of the {len(names)} parameters (all of the path must match); "
        f"valid are paths such as {', '.join(list(names)[:: max(1, len(names) // 6)][:6])}"
      )
  trains = lambda name: name.startswith(f"{SUBTREE}/") or any(p.fullmatch(name) for p in patterns)
  return frozenset(name for name in names if not trains(name))


def targets(params: Mapping[str, Any], config_lora: ConfigDict) -> list[str]:
  """Paths of the kernels that get an adapter, sorted; none where the rank is 0.

  Raises:
    ValueError: see `add`.
  """
  rank, alpha = config_lora.rank, config_lora.alpha
  if rank < 0:
    raise ValueError(f"config.lora.rank={rank}; valid: 0 (no adapters) or more")
  if not rank:
    return []
  if not 0 < alpha < math.inf:
    raise ValueError(f"config.lora.alpha={alpha}; valid: a finite number above 0")
  flat = traverse_util.flatten_dict(dict(params), sep="/")
  found: set[str] = set()
  for regex in config_lora.targets:
    pattern = _compiled("targets", regex)
    matches = {name for name in flat if pattern.fullmatch(name)}
    if not matches:
      kernels = [name for name in flat if name.endswith("/kernel")]
      raise ValueError(
        f"config.lora.targets: {regex!r} matches none of the {len(flat)} parameters (all of the path must match); "
        f"valid are kernels such as {', '.join(kernels[:6])}"
      )
    found |= matches
  if not found:
    raise ValueError(f"config.lora.targets=() but rank={rank}; valid: regexes of kernels, or config.lora.rank=0")
  for name in sorted(found):
    shape = flat[name].shape
    if not name.endswith("kernel") or len(shape) < 2:
      raise ValueError(f"config.lora.targets match {name} of shape {shape}; valid: kernels")
    if rank > min(_matrix(name, shape)):
      raise ValueError(f"config.lora.rank={rank} is more than {name} has, whose matrix is {_matrix(name, shape)}")
    if any(_compiled("train", regex).fullmatch(name) for regex in config_lora.train):
      raise ValueError(f"config.lora.train matches {name}, which config.lora.targets freeze; valid: one of them")
  return sorted(found)


def _matrix(name: str, shape: Sequence[int]) -> tuple[int, int]:
  """Inputs and outputs of a kernel."""
  inputs = 1 if _ONE_INPUT.fullmatch(name) else len(shape) - 1
  return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def _compiled(field: str, regex: Any) -> re.Pattern[str]:
  try:
    return re.compile(regex)
  except (re.error, TypeError) as error:
    raise ValueError(f"config.lora.{field}: {regex!r} is not a regular expression: {error}") from None
