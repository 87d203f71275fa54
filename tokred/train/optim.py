"""Optimisers and schedules by name, from optax, with rules for parameters given as regexes of their paths.

A path is `encoder/block_3/attn/qkv/kernel`; a regex must match all of it (`re.fullmatch`). A regex that matches no
parameter is an error, since it is a misspelling that would otherwise train the wrong model in silence.

Order of one update, for the parameters that are not in `freeze`:

    gradient -> clip by norms -> optimiser with weight decay and learning rate -> multiplier and layer decay
    -> freeze_until
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from tokred.config import default, nearest
from tokred.sharding import path_name

SCHEDULES = ("constant", "cosine", "linear")
# lbfgs wants the loss function, noisy_sgd a random key, rprop, sm3 and optimistic_adam a learning rate without schedule
# Parameters below the first block, by the names of modules; "lora/" may stand before them.
_BELOW = re.compile(r"(.*/)?(patch_embed|pos_embed|cls_token|dist_token|registers|mask_token|pre_norm|embed)(/.*)?")
_STACK = re.compile(r"(?:lora/)?(tower|llm)/.*")
_IN_BLOCK = re.compile(r"(?:.*/)?block_(\d+)/.*")
_UNFIT = ("lbfgs", "noisy_sgd", "rprop", "sm3", "optimistic_adam")


def make_schedule(config_optim: ConfigDict, total_steps: int) -> optax.Schedule:
  """The learning rate at each step: linear warm-up from 0, then the decay named by `config.optim.schedule`.

  With w = warmup_steps, T = total_steps and t = (step - w) / (T - w), clipped to [0, 1]:

      step < w   lr * step / w
      constant   lr
      linear     lr + (end_lr - lr) t
      cosine     end_lr + (lr - end_lr) (1 + cos(pi t)) / 2

  Args:
    config_optim: `config.optim`.
    total_steps: optimiser steps of the whole run.

  Returns:
    A function of the step (Python int or traced scalar).

  Raises:
    ValueError: an unknown schedule, a negative rate, or a warm-up that is not shorter than the run.
  """
  name, lr, end_lr, warmup = (config_optim[key] for key in ("schedule", "lr", "end_lr", "warmup_steps"))
  if name not in SCHEDULES:
    raise ValueError(f"config.optim.schedule={name!r} is not a schedule; {nearest(name, SCHEDULES)}")
  _check_nonnegative(config_optim, "lr", "end_lr")
  if not 0 <= warmup < total_steps:
    raise ValueError(
      f"config.optim.warmup_steps={warmup} but the run has {total_steps} steps (config.train.steps or epochs); "
      f"valid: 0 to {total_steps - 1}"
    )
  decay_steps = total_steps - warmup
  if name == "constant":
    decay = optax.constant_schedule(lr)
  elif name == "linear":
    decay = optax.linear_schedule(lr, end_lr, decay_steps)
  else:
    decay = optax.cosine_decay_schedule(lr, decay_steps, alpha=end_lr / lr if lr else 0.0)
  if not warmup:
    return decay
  return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), decay], [warmup])


def make_optimizer(
  config_optim: ConfigDict, params: Any, total_steps: int, strict: bool = True, fixed: Collection[str] = ()
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimiser that `config.optim` describes, for parameters of this structure.

  `config.optim.name` is any optax optimiser that takes a learning rate; it gets those of `b1`, `b2` and `momentum`
  that its signature has, with the config's values and not with optax's defaults (`lion` and `adan` want another b2
  than 0.999; `momentum=0` means none).

  Weight decay skips the parameters that match `no_decay`. It is decoupled, p <- p - lr * weight_decay * p, where the
  optimiser does so (adamw, lion, lamb before its trust ratio, ...), and for adafactor, whose own decay in optax is
  not scaled by the learning rate. Elsewhere (sgd, adam, rmsprop, lars, ...) it is coupled: weight_decay * p is added
  to the clipped gradient, as in L2 regularisation.

  `clip_norm` bounds the norm of the whole gradient; parameters in `clip_groups` are left out of it and bounded group
  by group, so that a selector whose gradient explodes does not stop the backbone from learning.  0 clips nothing.

  `multipliers` scale the finished update, so the learning rate with its decay; of several regexes the first counts.
  `layer_decay` does so on top of them, see `layer_factors`.
  `freeze`: no update, no optimiser state, no share in the clipped norm. `freeze_until`: no update before the step,
  while moments are gathered and the gradient counts in the norm, as with a learning rate of zero. Frozen parameters
  stay identical to the bit.

  Args:
    config_optim: `config.optim`.
    params: tree of arrays or ShapeDtypeStructs; only paths and structure are read.
    total_steps: optimiser steps of the whole run.
    strict: whether a regex that matches nothing is an error; not so once the parameters that it meant are gone.
    fixed: paths that are frozen besides those of `freeze`.

  Returns:
    (transformation, schedule). The transformation needs the parameters in `update`; its state holds one scalar count
    per part that counts.

  Raises:
    ValueError: an unknown name, a regex that does not compile or matches nothing, a negative number, or `freeze`
      matching every parameter.
  """
  schedule = make_schedule(config_optim, total_steps)
  _check_nonnegative(config_optim, "weight_decay", "clip_norm", "momentum")
  paths, treedef = jax.tree_util.tree_flatten_with_path(params)
  names = [path_name(path) for path, _ in paths]
  known = default().optim.no_decay  # the defaults may match nothing: not every model has registers

  may_miss = () if strict else None
  no_decay = _first_match("no_decay", config_optim.no_decay, names, may_miss=known if strict else None)
  never = jax.tree.leaves(frozen(config_optim, params, strict, fixed))
  factors = _pairs("multipliers", config_optim.multipliers)
  scaled = _first_match("multipliers", [regex for regex, _ in factors], names, may_miss)
  steps = _pairs("freeze_until", config_optim.freeze_until)
  if late := [pair for pair in steps if pair[1] >= total_steps]:
    raise ValueError(
      f"config.optim.freeze_until: {late[0]!r}, but the run has {total_steps} steps (config.train.steps or epochs), "
      f"and that would never learn; valid: steps below {total_steps}, or config.optim.freeze"
    )
  held = _first_match("freeze_until", [regex for regex, _ in steps], names, may_miss)
  norms = _pairs("clip_groups", config_optim.clip_groups)
  clipped = _first_match("clip_groups", [regex for regex, _ in norms], names, may_miss)
  scales = [1.0 if i is None else float(factors[i][1]) for i in scaled]
  scales = [a * b for a, b in zip(scales, layer_factors(names, config_optim.layer_decay), strict=True)]

  transforms = [optax.clip_by_global_norm(config_optim.clip_norm)] if config_optim.clip_norm and not norms else []
  decay_mask = treedef.unflatten([index is None for index in no_decay])
  transforms.append(_named_optimizer(config_optim, schedule, decay_mask))
  transform = optax.chain(*transforms)
  if config_optim.freeze or fixed:
    transform = optax.masked(transform, treedef.unflatten([not there for there in never]))
  stages = [transform]
  if norms:
    groups = [-1 if i is None else i for i in clipped]  # the last norm is that of the rest
    groups = [None if there else i for i, there in zip(groups, never, strict=True)]
    stages.insert(0, _clip_by_group(groups, [*(float(norm) for _, norm in norms), config_optim.clip_norm]))
  if factors or any(scale != 1.0 for scale in scales):
    stages.append(_scale(treedef.unflatten(scales)))
  if config_optim.freeze or fixed or steps:
    until = [0 if i is None else int(steps[i][1]) for i in held]
    until = [math.inf if there else step for there, step in zip(never, until, strict=True)]
    stages.append(_hold(treedef.unflatten(until)))
  return optax.chain(*stages), schedule


def frozen(config_optim: ConfigDict, params: Any, strict: bool = True, fixed: Collection[str] = ()) -> Any:
  """The tree of `params` with True where a parameter never changes; arguments and errors as `make_optimizer`."""
  paths, treedef = jax.tree_util.tree_flatten_with_path(params)
  names = [path_name(path) for path, _ in paths]
  matches = _first_match("freeze", config_optim.freeze, names, () if strict else None)
  never = [index is not None or name in fixed for index, name in zip(matches, names, strict=True)]
  if strict and all(never):  # behind the step in which rates freeze, nothing else need learn
    raise ValueError(f"config.optim.freeze={tuple(config_optim.freeze)!r} matches every parameter; nothing would learn")
  return treedef.unflatten(never)


def layer_factors(names: Sequence[str], decay: float) -> list[float]:
  """Factor of each parameter's learning rate: decay to the power of its distance from the head.

  With L blocks: embeddings decay^(L + 1), block i (from 0) decay^(L - i), what comes after the blocks 1.  (Clark et
  al., 2020, ELECTRA, arXiv:2003.10555; as Bao et al., 2021, BEiT, arXiv:2106.08254, count)  Parameters of reducers,
  under `reduce/`, are new wherever they stand and are not decayed; adapters count with the block of their kernel.
  A VLM is one stack: below the L blocks of the language model its embeddings and the projector have decay^(L + 1), what
  comes after the tower's blocks decay^(L + 2), and so on down.

  Args:
    names: paths of the parameters.
    decay: `config.optim.layer_decay`; 0 and 1: all factors are 1.

  Raises:
    ValueError: a decay outside of [0, 1], or no blocks to count.
  """
  if not 0 <= decay <= 1:
    raise ValueError(f"config.optim.layer_decay={decay}; valid: 0 to 1, where 0 and 1 are off")
  if decay in (0, 1):
    return [1.0] * len(names)
  blocks = [_IN_BLOCK.fullmatch(name) for name in names]
  if not any(blocks):
    raise ValueError(f"config.optim.layer_decay={decay} needs parameters named block_0/...; set it to 0.0")
  stacks = [match[1] if (match := _STACK.fullmatch(name)) else "" for name in names]
  depth = {stack: 0 for stack in ("tower", "llm", "")}
  for block, stack in zip(blocks, stacks, strict=True):
    depth[stack] = max(depth[stack], 1 + int(block[1]) if block else 0)
  bottom = depth["llm"] + 1 if "llm" in stacks else 0
  above = {"llm": 0, "": bottom, "tower": bottom + 1}

  def distance(name: str, block: re.Match[str] | None, stack: str) -> int:
    if "reduce" in name.split("/"):
      return 0
    own = depth[stack] - int(block[1]) if block else depth[stack] + 1 if _BELOW.fullmatch(name) else 0
    return above[stack] + own

  return [decay ** distance(*each) for each in zip(names, blocks, stacks, strict=True)]


def ema_update(ema: Any, params: Any, decay: float, step: jax.Array | int | None = None) -> Any:
  """Moves the average towards the parameters: ema <- decay * ema + (1 - decay) * params.

  Args:
    ema: tree of the averages, at first a copy of the parameters.
    params: tree of the same structure, after the update.
    decay: `config.optim.ema`, in [0, 1].
    step: updates made before this one; where given, the decay is min(decay, (1 + step) / (10 + step)), so that the
      initial weights are forgotten soon in a short run. None: the decay as it is.

  Returns:
    The new averages.
  """
  if step is not None:
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return optax.incremental_update(params, ema, 1.0 - decay)


def optimizer_names() -> tuple[str, ...]:
  """The values that `config.optim.name` may have."""
  names = []
  for name, make in vars(optax).items():
    if inspect.isfunction(make) and name not in _UNFIT and not name.startswith(("_", "scale_by_")):
      parameters = inspect.signature(make).parameters
      required = {p.name for p in parameters.values() if p.default is p.empty}
      if "learning_rate" in parameters and required <= {"learning_rate"}:
        names.append(name)
  return tuple(sorted(names))


def _named_optimizer(
  config_optim: ConfigDict, schedule: optax.Schedule, decay_mask: Any
) -> optax.GradientTransformation:
  """The optax optimiser with its own arguments, and weight decay where it belongs."""
  name, weight_decay = config_optim.name, config_optim.weight_decay
  if name not in (valid := optimizer_names()):
    raise ValueError(f"config.optim.name={name!r} is not an optimiser of optax that fits; {nearest(name, valid)}")
  make = getattr(optax, name)
  accepted = inspect.signature(make).parameters
  arguments = {key: config_optim[key] for key in ("b1", "b2") if key in accepted}
  if "momentum" in accepted:
    none = None if accepted["momentum"].default is None else 0.0  # None spares the buffer, where it is understood
    arguments["momentum"] = config_optim.momentum or none
  mask_name = next((key for key in ("mask", "weight_decay_mask") if key in accepted), None)
  if "weight_decay" in accepted and mask_name:
    return make(schedule, **arguments, weight_decay=weight_decay, **{mask_name: decay_mask})
  if not weight_decay:
    return make(schedule, **arguments)
  if "weight_decay_rate" in accepted:  # adafactor
    decay = optax.add_decayed_weights(lambda step: -schedule(step) * weight_decay, mask=decay_mask)
    return optax.chain(make(schedule, **arguments), decay)
  return optax.chain(optax.add_decayed_weights(weight_decay, mask=decay_mask), make(schedule, **arguments))


def _scale(factors: Any) -> optax.GradientTransformation:
  return optax.stateless(lambda updates, params: jax.tree.map(lambda u, factor: u * factor, updates, factors))


def _clip_by_group(groups: Sequence[int | None], norms: Sequence[float]) -> optax.GradientTransformation:
  """Bounds the joint norm of each group's leaves; the last norm is that of group -1, and None is left alone."""

  def clip(updates: Any, params: Any) -> Any:
    del params
    leaves, treedef = jax.tree.flatten(updates)
    leaves = list(leaves)
    for group, bound in zip([*range(len(norms) - 1), -1], norms, strict=True):
      members = [index for index, there in enumerate(groups) if there == group]
      if bound and members:
        norm = optax.tree.norm([leaves[index] for index in members])
        for index in members:
          leaves[index] = jnp.where(
            norm < bound, leaves[index], leaves[index] / norm.astype(leaves[index].dtype) * bound
          )
    return treedef.unflatten(leaves)

  return optax.stateless(clip)


class HoldState(NamedTuple):
  """Updates made so far; int32 scalar."""

  count: jax.Array


def _hold(until: Any) -> optax.GradientTransformation:
  """Leaves each parameter as it is before its step; 0: never held, inf: always."""

  def hold(update: jax.Array, step: float, count: jax.Array) -> jax.Array:
    if step == 0:
      return update
    nothing = jnp.full_like(update, -0.0)  # p + -0.0 is p for every p; -0.0 + 0.0 would flip the sign of a zero
    return nothing if step == math.inf else jnp.where(count < step, nothing, update)

  def init(params: Any) -> HoldState:
    del params
    return HoldState(jnp.zeros((), jnp.int32))

  def update(updates: Any, state: HoldState, params: Any = None) -> tuple[Any, HoldState]:
    del params
    held = jax.tree.map(lambda u, step: hold(u, step, state.count), updates, until)
    return held, HoldState(optax.safe_increment(state.count))

  return optax.GradientTransformation(init, update)


def _first_match(
  field: str, regexes: Sequence[str], names: Sequence[str], may_miss: Iterable[str] | None
) -> list[int | None]:
  """For each name the index of the first regex that matches all of it, or None; `may_miss` None: any may miss."""
  matches: list[int | None] = [None] * len(names)
  for index, regex in enumerate(regexes):
    try:
      match: Callable[[str], Any] = re.compile(regex).fullmatch
    except (re.error, TypeError) as error:
      raise ValueError(f"config.optim.{field}: {regex!r} is not a regular expression: {error}") from None
    hits = [i for i, name in enumerate(names) if match(name)]
    if not hits and may_miss is not None and regex not in may_miss:
      sample = difflib.get_close_matches(regex, names, n=4, cutoff=0.5) or names[:: max(1, len(names) // 6)][:6]
      raise ValueError(
        f"config.optim.{field}: {regex!r} matches none of the {len(names)} parameters (all of the path must match); "
        f"valid are paths such as {', '.join(sample)}"
      )
    for i in hits:
      matches[i] = index if matches[i] is None else matches[i]
  return matches


def _pairs(field: str, value: Sequence[Any]) -> list[tuple[str, float]]:
  for item in value:
    number = item[1] if isinstance(item, (tuple, list)) and len(item) == 2 else None
    if not isinstance(number, (int, float)) or not 0 <= number < math.inf:
      wanted = {"freeze_until": "step", "clip_groups": "norm"}.get(field, "factor")
      raise ValueError(
        f"config.optim.{field}: {item!r} is not a (regex, {wanted}) pair with a number of at least 0; "
        f"valid: a tuple of pairs such as (('encoder/.*', {100 if wanted == 'step' else 0.1}),)"
      )
  return [tuple(item) for item in value]


def _check_nonnegative(config_optim: ConfigDict, *fields: str) -> None:
  for field in fields:
    if not config_optim[field] >= 0:
      raise ValueError(f"config.optim.{field}={config_optim[field]} is negative or not a number; valid: 0 or more")
