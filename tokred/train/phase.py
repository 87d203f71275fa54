"""What is compiled for one config: a run has two phases where rates are learned and then frozen, else one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict

from tokred import loading, lora, losses, schedules, sharding
from tokred.config import default, nearest
from tokred.data.rows import check_rows
from tokred.model import build, init, without_sites
from tokred.nn import projectors
from tokred.nn.stacks import split
from tokred.nn.vit import ViT
from tokred.nn.vlm import VLM
from tokred.rates import LEARNED
from tokred.train import optim
from tokred.train.step import State, init_state, make_step

_AT_LEAST_0: tuple[Callable, str] = (lambda value: value >= 0, "0 or more")
_AT_LEAST_1: tuple[Callable, str] = (lambda value: value >= 1, "1 or more")
_BELOW_1: tuple[Callable, str] = (lambda value: 0 <= value < 1, "0 up to, not including, 1")
_RANGES: dict[str, tuple[Callable, str]] = {
  **{f"train.{name}": _AT_LEAST_1 for name in ("batch_size", "log_every", "checkpoint_every", "keep_checkpoints")},
  **{name: _AT_LEAST_1 for name in ("eval.batch_size", "rates.multiple_of")},
  "seed": (lambda value: 0 <= value < 2**63, "0 up to, not including, 2**63"),
  **{name: _AT_LEAST_0 for name in ("train.steps", "train.eval_every", "rates.freeze_step")},
  "train.epochs": (lambda value: 0 <= value < float("inf"), "a finite number, 0 or more"),
  "train.mode": (lambda value: value in ("mask", "gather"), "mask, gather"),
  **{f"optim.{name}": _BELOW_1 for name in ("ema", "b1", "b2")},
  **{f"loss.{name}": _BELOW_1 for name in ("label_smoothing", "confidence")},
  **{f"loss.{name}": (lambda value: 0 <= value <= 1, "0 to 1") for name in ("min_share", "halting_depth")},
  "loss.temperature": (lambda value: value > 0, "above 0"),
}
TAUGHT = ("distill_logits", "distill_tokens", "distill_tokens_kl", "recalibration")  # terms that ask a teacher
_CLASSIFIER_TERMS = (
  "distill_tokens", "distill_tokens_kl", "recalibration", "consistency", "full_cross_entropy", "full_distill",
)  # fmt: skip


class Phase:
  """Module, optimiser, compiled step and the shardings of its state, for one config.

  Args:
    config: complete; `check` has seen it.
    mesh: of `tokred.sharding.make_mesh`.
    total_steps: of the whole run.
    frozen: whether rates were learned before, so that regexes of `config.optim` may look for their logits in vain.
    rows: of conversations, arguments of `VLM.known_of`; a VLM's step in gather mode needs them.

  Raises:
    ValueError: an error in the config; nothing is compiled here.
  """

  def __init__(
    self, config: ConfigDict, mesh: jax.sharding.Mesh, total_steps: int, frozen: bool = False, rows: Any = None
  ):
    self.model, self.mesh, self.mode, self.rows = build(config), mesh, config.train.mode, rows
    _check_sites(config, self.module, frozen)
    _check_ends(config, total_steps)
    self.scheduled = {spot.site for spot in self.module.sites.spots if spot.rate == "scheduled"}
    params = jax.eval_shape(lambda: init(self.module, config.seed))
    whole = jax.eval_shape(self.adapted, params)
    names = [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(whole)]
    fixed = lora.frozen(names, config.lora, None if frozen else default().lora.train)
    never = optim.frozen(config.optim, whole, not frozen, fixed)
    self.optimizer, self.schedule = optim.make_optimizer(config.optim, whole, total_steps, not frozen, fixed)
    self.frozen = {name for name, there in zip(names, jax.tree.leaves(never), strict=True) if there}
    if self.mode == "mask" and config.rates.freeze_step > total_steps:
      raise ValueError(
        f"config.rates.freeze_step={config.rates.freeze_step} but the run has {total_steps} steps (config.train.steps "
        f"or epochs), and nothing would be frozen; valid: 0 (never) to {total_steps}"
      )
    learns = [name for name in names if name not in self.frozen and "rate" not in name.split("/")]
    if 0 < config.rates.freeze_step < total_steps and not learns and not frozen:
      raise ValueError(
        f"config.rates.freeze_step={config.rates.freeze_step}: config.optim.freeze leaves only rates to learn, and "
        f"nothing behind that step; set it to {total_steps}, the last one, or to 0"
      )
    self.rules = sharding.make_rules(config.mesh)
    self.target = sharding.abstract_sharded(self.new_state, params, mesh=mesh, rules=self.rules)
    if not frozen:
      sharding.check_used(config.mesh, self.target)
    # The state comes out as it went in: else XLA chooses, and a run that is resumed would not be the same program.
    out = (self.shardings, NamedSharding(mesh, PartitionSpec()))
    taught = jax.eval_shape(lambda: init(self.teacher, config.seed))
    places = {
      sharding.path_name(path): place
      for path, place in jax.tree_util.tree_leaves_with_path(sharding.shardings(taught, mesh, self.rules))
    }
    known = self.module.known_of(*rows) if rows and self.mode == "gather" else None
    step = make_step(config, self.module, self.teacher, self.optimizer, self.mode, never, places, known)
    self.step = functools.partial(
      jax.jit(step, donate_argnums=0, out_shardings=out), seed=np.uint32(config.seed % 2**32)
    )

  @property
  def config(self) -> ConfigDict:
    return self.model.config

  @property
  def module(self) -> ViT | VLM:
    return self.model.module

  @functools.cached_property
  def teacher(self) -> ViT | VLM:
    """The dense student, with the projector that the teacher's files have."""
    c, dense = self.config, without_sites(self.module)
    path = c.teacher or c.init
    if not isinstance(dense, VLM) or not path:
      return dense
    saved = loading.read_config(path).projector
    return dense.clone(projector=projectors.projector(saved.name, FrozenConfigDict(saved), dense.llm.shape.width))

  @property
  def shardings(self) -> State:
    return jax.tree.map(lambda leaf: leaf.sharding, self.target)

  def adapted(self, params: Any) -> Any:
    """The module's parameters with the adapters of `config.lora`."""
    return lora.add(params, self.config.lora, self.config.seed)

  def new_state(self, params: Any) -> State:
    return init_state(self.adapted(params), self.optimizer, self.config.optim.ema)

  def keeps(self, step: int) -> dict[str, np.ndarray] | None:
    """What moves at a step, an input of the compiled step: counts of scheduled sites, options that are annealed."""
    now = {}
    if self.scheduled:
      seen, *_ = split(self.config.sites.to_dict())  # a language model's counts do not move
      now = schedules.scheduled(seen, self.module.sites.stack, step)
      now = {name: np.asarray(values, np.int32) for name, values in now.items()}
    options = schedules.annealed(self.module.spots, step)
    return now | {name: np.float32(value) for name, value in options.items()} or None


def check(config: ConfigDict) -> None:
  """Checks the numbers of a config that the rest of tokred takes for granted.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  for name, (valid, words) in _RANGES.items():
    group, _, field = name.rpartition(".")
    value = config[group][field] if group else config[field]
    if not valid(value):
      raise ValueError(f"config.{name}={value!r}; valid: {words}")
  for field, value in config.loss.items():
    if field == "target_unit":
      if value not in losses.UNITS:
        raise ValueError(f"config.loss.target_unit={value!r} is not a unit; {nearest(value, losses.UNITS)}")
    elif field == "less":
      if value < -1:
        raise ValueError(f"config.loss.less={value!r}; valid: -1, or a number of tokens, 0 or more")
    elif not 0 <= value < float("inf"):
      raise ValueError(f"config.loss.{field}={value!r}; valid: a finite number, 0 or more")
  labels, classes = config.data.labels, config.model.num_classes
  if labels and config.model.name == "vit" and len(labels) != classes:
    raise ValueError(f"config.data.labels={labels!r} are {len(labels)} names; valid: {classes}, one a class, or ()")
  check_rows(config.text.pack, config.text.share)
  if config.teacher and not any(config.loss[term] for term in TAUGHT):
    raise ValueError(
      f"config.teacher={config.teacher!r} has nothing to teach; give a term of config.loss that asks it a weight "
      f"({', '.join(TAUGHT)}), or leave it ''"
    )


def _check_ends(config: ConfigDict, total_steps: int) -> None:
  """Raises ValueError where what moves while training would not get to its end, which is what ships."""
  for name, site in config.sites.items():
    anneal = [entry[-1] for entry in site.get("anneal", ())]
    for field, end in (("schedule", site.get("schedule", (0, 0))[1]), ("anneal", max(anneal, default=0))):
      if end > total_steps:
        raise ValueError(
          f"config.sites.{name}.{field}={site[field]!r} ends at step {end}, but the run has {total_steps} steps "
          f"(config.train.steps or epochs), and what ships is its end; valid: up to {total_steps}"
        )


def _check_sites(config: ConfigDict, module: ViT, frozen: bool) -> None:
  """Raises ValueError where `config.train`, `rates` or `loss` ask for what the sites cannot do; `frozen`: see Phase."""
  spots = module.spots
  by_rate = lambda *kinds: sorted({spot.site for spot in spots if spot.rate in kinds})
  scheduled, costed = by_rate("scheduled"), by_rate(*LEARNED)
  if config.train.mode == "gather" and costed:
    raise ValueError(
      f"config.train.mode='gather' takes away the tokens that a rate learns from, but the rate of sites {costed} is "
      "learned; valid: mask (config.rates.freeze_step goes on in gather mode)"
    )
  if config.train.mode == "gather" and scheduled:
    raise ValueError(f"config.train.mode='gather' has static counts, but those of sites {scheduled} move")
  if config.rates.freeze_step and scheduled:
    raise ValueError(f"config.rates.freeze_step={config.rates.freeze_step}, but the counts of sites {scheduled} move")
  unset = lambda spot: spot.rate != "fixed" or spot.type.packs or spot.type.ragged or spot.type.still
  moving = sorted({spot.site for spot in spots if unset(spot)})
  if config.loss.less >= 0 and moving:
    raise ValueError(
      f"config.loss.less={config.loss.less} sets counts, but those of sites {moving} are not fixed; set it to -1"
    )
  _check_terms(config, module, frozen)
  if config.loss.budget:
    target, unit = config.loss.target, config.loss.target_unit
    low, high = losses.reachable(module, unit)
    if not low * (1 - 1e-6) <= target <= high * (1 + 1e-6):
      raise ValueError(
        f"config.loss.target={target:g} with target_unit={unit!r} cannot be reached: with rates at their bounds sites "
        f"{costed} leave {low:.4g} to {high:.4g} (dense: {losses.dense(module, unit):.4g}); valid: in between"
      )


def _check_terms(config: ConfigDict, module: ViT, frozen: bool) -> None:
  """Raises ValueError where a term of the loss has nothing to act on; `frozen`: see Phase."""
  loss, mode, spots = config.loss, config.train.mode, module.spots
  foreign = [term for term in _CLASSIFIER_TERMS if loss[term]] if isinstance(module, VLM) else []
  if foreign:
    raise ValueError(f"config.loss.{foreign[0]}={loss[foreign[0]]} is no term of config.model.name='vlm'; valid: 0.0")
  draws = lambda kind: kind.decides and (mode == "mask" or frozen or not getattr(kind, "samples", False))
  deciding = [spot for spot in spots if draws(spot.type)]
  for term in ("keep_ratio", "global_ratio"):
    if loss[term] and (learns := [spot for spot in deciding if spot.rate in LEARNED]):
      site, rate = f"sites.{learns[0].site}", learns[0].rate
      raise ValueError(
        f"config.loss.{term}={loss[term]} holds a selector at its keep rate, but with {site}.rate={rate!r} that is "
        f"learned; valid: 0.0 (config.loss.budget holds what is learned), or {site}.rate='fixed' with a keep"
      )
  of = lambda *names: [spot for spot in spots if spot.reducer in names]
  reverse = of("sit_reverse") + [spot for spot in spots if dict(spot.options).get("reverse")]
  drawing = f"with config.train.mode={mode!r} no site has a reducer that draws who stays, such as "
  teacher, untaught = config.teacher or config.init, "neither config.teacher nor config.init names a teacher"
  for term, there, problem in (
    ("budget", [s for s in spots if s.rate in LEARNED], "no site has rate='learned' or 'learned_threshold'"),
    ("keep_ratio", deciding, drawing + "'gumbel'"),
    ("global_ratio", deciding, drawing + "'dyt'"),
    ("min_ratio", deciding, drawing + "'dyt'"),
    ("ponder", of("avit"), "no site has reducer='avit'"),
    ("halting_prior", of("avit"), "no site has reducer='avit'"),
    ("recalibration", teacher, untaught),
    ("recalibration", reverse, "no site has reducer='sit_reverse', or 'sit' with reverse=True"),
    ("router", of("router"), "no site has reducer='router'"),
    *((term, spots, "there are no sites") for term in ("consistency", "full_cross_entropy", "full_distill")),
    *((term, teacher, untaught) for term in ("distill_logits", "distill_tokens", "distill_tokens_kl")),
  ):
    if loss[term] and not there:
      raise ValueError(f"config.loss.{term}={loss[term]} has nothing to act on: {problem}; set it to 0.0")
