"""The contract of a reducer, the registry, and the plan that most reducers write."""

import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.config import nearest
from tokred.rates import LearnedThreshold, Rows, Threshold, soft_threshold
from tokred.reducers.peaks import peaks
from tokred.tokens import (
  APPENDED,
  Array,
  Plan,
  Tokens,
  average_weight,
  compact,
  fold,
  inverse,
  of_prompt,
  rank,
  straight_through,
)

REGISTRY: dict[str, type["Reducer"]] = {}
IMPORT = "TOKRED_IMPORT"  # environment: modules that register reducers, with commas between
OWN = f"one of your own is known once its module is imported, in commands by {IMPORT}=MODULE"


def register(name: str) -> Callable[[type["Reducer"]], type["Reducer"]]:
  """Class decorator: makes a reducer known to configs as `reducer=name`.

  Raises:
    ValueError: no name, something else than a class of reducers, or a name that another one has.
  """
  if not isinstance(name, str) or not name:
    raise ValueError(f"register({name!r}); valid: a name, as in @tokred.register('name')")

  def add(cls: type["Reducer"]) -> type["Reducer"]:
    if not (isinstance(cls, type) and issubclass(cls, Reducer)):
      raise ValueError(f"register({name!r}) takes a class of reducers, not {cls!r}; valid: a Reducer or a Planner")
    if name in REGISTRY and REGISTRY[name].__qualname__ != cls.__qualname__:
      raise ValueError(f"reducer {name!r} is registered already, by {REGISTRY[name].__module__}")
    REGISTRY[name] = cls
    return cls

  return add


def known(name: str) -> bool:
  """Whether a reducer has this name; before it says no, it imports the modules that TOKRED_IMPORT names.

  Raises:
    ValueError: one of these cannot be imported.
  """
  for module in filter(None, os.environ.get(IMPORT, "").split(",")):
    if name in REGISTRY:
      break
    try:
      importlib.import_module(module)
    except ImportError as error:
      raise ValueError(f"{IMPORT}={module!r}: {error}; valid: modules on PYTHONPATH, with commas between") from error
  return name in REGISTRY


def get(name: str, field: str = "reducer") -> type["Reducer"]:
  """The class registered under `name`; `field` is the config field that an error names."""
  if not known(name):
    raise ValueError(f"{field}={name!r} is not a reducer; {nearest(name, REGISTRY)}; {OWN}")
  return REGISTRY[name]


def fresh() -> dict[str, str]:
  """Environment of a new process that shall know the reducers of this one, wherever their modules lie."""
  modules = sorted({cls.__module__ for cls in REGISTRY.values()} - {"__main__"})
  own = [module for module in modules if not module.startswith("tokred.reducers.")]
  return {IMPORT: ",".join(own), "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)} if own else {}


class Reducer(nn.Module):
  """Who represents whom: a module from Tokens to Tokens.

  Its dataclass fields are its options; a site sets them by name.  The fields `layer`, `depth`, `place`, `prefix`,
  `source`, `heads` and `patch_grid` are no options: where a class has them, the site fills them in (the block, from 0,
  how many there are, where in or around it, how many tokens of the input are protected, how many it has in all, in a
  language model the heads of keys and values, and rows and columns of the input's patches, () where images differ).

  A report whose name begins with "loss" (a scalar or (B,), times the reducer's own weight) is added to the loss, and
  "count", (B,), says how many tokens each row is left with, where neither `keep` nor the mask does.  What
  it puts in `feats` under a name that begins with "state/" stays there from block to block.
  """

  needs: ClassVar[tuple[str, ...]] = ()  # features that the block shall put in tokens.feats
  relaxed: ClassVar[bool] = False  # truly soft in the forward pass: its gap is logged, not tested
  conserves: ClassVar[bool] = True  # merging keeps sum(size) and the size-weighted mean
  scored: ClassVar[bool] = True  # reports a "score" of each token, so that a threshold can decide
  from_input: ClassVar[bool] = False  # keep rates count from the input's tokens, not from those that arrive
  proportional: ClassVar[bool] = False  # from here on log(size) biases attention, unless the site says otherwise
  idles: ClassVar[bool] = True  # does nothing at all where every token stays
  ragged: ClassVar[bool] = False  # counts differ between images: `keep` is a capacity
  # While training it draws who stays, and reports as "kept_share", (B,), the share of the input's unprotected tokens
  # if keep rates count from these (`from_input`), else of those that arrive.  A learned rate then needs `counted`.
  decides: ClassVar[bool] = False
  still: ClassVar[bool] = False  # `keep` is a shape of its own, which nothing may move while training
  packs: ClassVar[bool] = False  # in gather mode images share rows, and nothing else may act in its scope
  recovers: ClassVar[bool] = False  # more tokens may leave than arrive: asks for no count, see `recovered`
  training_only: ClassVar[bool] = False  # an auxiliary head: it leaves the tokens as they are, and freeze drops it
  training_params: ClassVar[tuple[str, ...]] = ()  # submodules that only training uses; freeze drops them
  everywhere: ClassVar[bool] = False  # its site has all blocks of the stack, or makes no sense
  annealable: ClassVar[tuple[str, ...]] = ("temperature",)  # options, if it has them, that may be traced: see `anneal`
  places: ClassVar[tuple[str, ...]] = ("attn", "before", "after", "output")  # where it may stand, the default first
  # "llm" for those that look at the tokens of a row that may go, whatever stands between them, and take (B,) counts.
  stacks: ClassVar[tuple[str, ...]] = ("encoder",)
  decodes: ClassVar[bool] = False  # llm, around: has a rule for the tokens that are written, as `route` is one
  text: ClassVar[bool] = False  # llm, around: text may go round, too
  answers: ClassVar[bool] = False  # llm: `keep` counts a prompt's tokens also where an answer is there to learn from

  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    """Reduces.

    Args:
      tokens: N tokens.
      keep: how many come out, protected and fused ones counted.  A Python int in gather mode; in mask mode an int, a
        traced int or (B,) counts.
      train: whether decisions may be sampled; randomness comes from the `reduce` stream.
      mode: "mask" (shapes stay) or "gather" (exactly `keep` tokens come out).

    Returns:
      The tokens and what it reports, arrays by name.
    """
    raise NotImplementedError

  def count(self, keep: float, n: int, protected: int, source: int) -> int:
    """Tokens out for a keep rate: ceil(keep x unprotected) + protected, on the host.

    Args:
      keep: in (0, 1].
      n: tokens that arrive, protected ones counted.
      protected: of these, how many are protected.
      source: unprotected tokens at the model's input.
    """
    return min(n, math.ceil(keep * (source if self.from_input else n - protected)) + protected)

  def fewest(self, n: int, protected: int) -> int:
    """The smallest `keep` that the method can reach from n tokens."""
    del n
    return max(protected, 1)

  def leaving(self, keep: int, n: int) -> int:
    """Tokens that leave where `keep` of n should: all n, where the method cuts nothing whatever it is told."""
    del n
    return keep

  def left(self, removed: int, n: int, protected: int) -> int:
    """Tokens out where `removed` should go: r is clipped to what the method can take."""
    return max(n - removed, self.fewest(n, protected))

  def recovered(self, n: Any, source: int) -> Any:
    """Tokens that leave a reducer that recovers: all that the input had.  It is asked of the protected alone, too.

    Args:
      n: tokens that arrive, a number or a traced scalar.
      source: tokens at the model's input, protected ones counted.
    """
    del n
    return source

  def needed(self) -> tuple[str, ...]:
    """Features that this instance reads; by default those of its class."""
    return self.needs

  def foresees(self) -> bool:
    """Whether it drops tokens, at `attn`, by features of attention's queries, keys and values alone.

    In gather mode it then acts before the values are averaged, and those that go ask nothing.
    """
    return False

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    """Multiply-adds of its own where n tokens arrive and `left` leave; differentiable in both."""
    del n, left, width, num_heads
    return 0.0


class Planner(Reducer):
  """A reducer that only writes a Plan, and gets mask and gather mode from it."""

  samples: ClassVar[bool] = True  # what it decides while training has no form in gather mode; there it plans as always

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    """Decides.

    Args:
      tokens: N tokens; the dead ones may hold anything.
      keep: see Reducer.
      train: whether the plan may be sampled, or soft; never so in gather mode, unless `samples` is False.
    """
    raise NotImplementedError

  def counted(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    """`plan` where a rate learns how many: `keep` stay, and they stand by rank, also where `plan` draws how many."""
    return self.plan(tokens, keep, train=train)

  @classmethod
  def draws_counts(cls) -> bool:
    """Whether it decides in training how many stay, whatever it is told: a learned rate would learn nothing."""
    return cls.decides and cls.counted is Planner.counted

  def __call__(
    self, tokens: Tokens, keep: Any, *, train: bool, mode: str, survival: Array | None = None
  ) -> tuple[Tokens, dict[str, Array]]:
    """See Reducer.

    `keep` may also be a threshold or `rates.Rows`, and `survival` is a learned rate's view of each rank (see fold).
    """
    train = train and (mode == "mask" or not self.samples)
    decide = self.plan if survival is None else self.counted
    taught: dict[str, Array] = {}
    if isinstance(keep, (LearnedThreshold, Threshold)) and train and not self.decides:
      # Who passes is settled as at inference, but a loss of the reducer's own is reported in training only.
      _, taught = self.plan(tokens, keep.capacity, train=True)
    if isinstance(keep, LearnedThreshold):
      _, report = self.plan(tokens, keep.capacity, train=False)
      gate, count = keep(tokens, self._score(report))
      count = straight_through(jnp.minimum(count, keep.capacity), count)  # where too many pass, it may still rise
      plan, report = self.plan(tokens, count.astype(jnp.int32), train=False)
      if train:  # 1 for the dead, so that a rate that took a token before goes on to learn from it
        plan = plan.replace(gate=straight_through((plan.gate > 0) | ~tokens.alive, gate))
      return finish_rows(tokens, plan, keep.capacity, mode), taught | report | {"count": count}
    if isinstance(keep, Threshold):
      draws = train and self.decides  # a decision of its own, which is to learn
      plan, report = self.plan(tokens, keep.capacity, train=draws)
      if not draws:
        plan, report = self.plan(tokens, keep.count(tokens, self._score(report)), train=False)
      return finish_rows(tokens, plan, keep.capacity, mode), taught | report
    if isinstance(keep, Rows):
      plan, report = decide(tokens, keep.count, train=train)
      return finish_rows(tokens, plan, keep.capacity, mode, survival), report
    plan, report = decide(tokens, keep, train=train)
    return finish(tokens, plan, keep, mode, survival), report

  def _score(self, report: dict[str, Array]) -> Array:
    if "score" not in report:
      raise ValueError(
        f"{type(self).__name__}.plan reports no 'score', by which thresholds decide; valid: a report "
        "{'score': (B, N)}, or scored = False in the class and another rate"
      )
    return report["score"]


def finish(tokens: Tokens, plan: Plan, keep: Any, mode: str, survival: Array | None = None) -> Tokens:
  """Carries a plan out; where nothing goes and no rate learns from the order, the tokens stay as they are."""
  tokens = peaks(tokens, plan)
  if mode == "gather":
    return tokens if keep >= tokens.x.shape[1] else compact(tokens, plan, keep)
  if survival is None:
    gone = tokens.alive & (plan.gate <= 0)
    stay = jnp.arange(plan.order.shape[1], dtype=plan.order.dtype)
    plan = plan.replace(order=jnp.where(gone.any(1, keepdims=True), plan.order, stay))
  return fold(tokens, plan, survival=survival)


def finish_rows(tokens: Tokens, plan: Plan, capacity: int, mode: str, survival: Array | None = None) -> Tokens:
  """Carries out a plan whose counts differ between images: also at full capacity some tokens are dead."""
  capacity = min(capacity, tokens.x.shape[1])
  tokens = peaks(tokens, plan)
  if mode == "gather" and plan.weight is None:
    return compact(tokens, plan, capacity)
  tokens = fold(tokens, plan, survival=survival)  # `compact` merges only what lies behind the capacity
  if mode == "mask":
    return tokens
  first = jax.tree.map(lambda leaf: leaf[:, :capacity], tokens.replace(owner=tokens.mask))
  return first.replace(owner=tokens.owner)


def ranks(tokens: Tokens, score: Array) -> Array:
  """Rank of each token, (B, N) int32, 0 the best: the protected in their order, then by score, then the dead.

  Ties go to the lower index; a NaN score counts as the worst.  `inverse` of it is the order.
  """
  score = score.astype(jnp.float32)
  limits = jnp.finfo(jnp.float32)
  key = jnp.where(jnp.isnan(score), limits.min, jnp.clip(score, limits.min, limits.max))
  key = jnp.where(tokens.protected, jnp.inf, key)
  key = jnp.where(tokens.alive, key, -jnp.inf)
  return rank(-jax.lax.stop_gradient(key))


def num_kept(tokens: Tokens, keep: Any) -> Array:
  """`keep` as (B, 1) int32 counts, no more than are alive.

  Raises:
    ValueError: a Python number that is no count; a share would round to none.
  """
  if isinstance(keep, (bool, float)) or (isinstance(keep, int) and keep < 1):
    raise ValueError(f"keep={keep!r}; valid: how many tokens stay, the protected counted: an integer, 1 or more")
  alive = tokens.alive.sum(1, keepdims=True, dtype=jnp.int32)
  keep = jnp.asarray(keep, jnp.int32)
  return jnp.minimum(keep[:, None] if keep.ndim else keep, alive)


def on_host(rule: Callable[[int], Any], count: Array, most: int) -> Array:
  """rule(count) in Python's own arithmetic, by a table: a share's floor in float32 is not always that in float64.

  Args:
    rule: an int, or a tuple of ints, for each count from 0 to `most`.
    count: (...) int32.
    most: the largest.

  Returns:
    (...) int32, or (..., numbers in a tuple).
  """
  return jnp.asarray([rule(i) for i in range(most + 1)], jnp.int32)[count]


def keep_top(tokens: Tokens, score: Array, keep: Any, *, raster: bool = False) -> Plan:
  """The plan that keeps the tokens of the highest score and drops the rest.

  Args:
    tokens: N tokens.
    score: (B, N), ranked in float32.
    keep: how many stay, the protected counted.
    raster: survivors keep their order, as causal attention needs; otherwise they stand from best to worst.
  """
  index = jnp.arange(score.shape[1], dtype=jnp.int32)
  place = ranks(tokens, score)
  kept = place < num_kept(tokens, keep)
  if raster:
    place = rank(jnp.where(kept, index, place + len(index)))
  return Plan(owner=jnp.where(kept, index, -1), order=inverse(place), gate=kept | ~tokens.alive)


def route(tokens: Tokens, score: Array, keep: Any, threshold: float) -> Plan:
  """`keep_top` among a prompt; what a language model appends to it decides for itself, by score >= threshold.

  Args:
    tokens: N tokens; without the feature `tokens.APPENDED` all are of the prompt.
    score: (B, N).
    keep: how many of the prompt stay, the protected counted.
    threshold: of what is appended; the protected stay in any case.
  """
  if APPENDED not in tokens.feats:
    return keep_top(tokens, score, keep)
  appended = tokens.feats[APPENDED]
  prompt = tokens.replace(mask=tokens.alive & ~appended)
  alone = tokens.alive & appended & (tokens.protected | (score >= threshold))
  kept = (ranks(prompt, score) < num_kept(prompt, keep)) | alone
  index = jnp.arange(score.shape[1], dtype=jnp.int32)
  return Plan(owner=jnp.where(kept, index, -1), order=decided(tokens, kept), gate=kept | ~tokens.alive)


def parts(tokens: Tokens) -> tuple[Array, Array]:
  """Text of the prompt, and visual tokens, of a language model: (B, N) bool each, alive."""
  text = of_prompt(tokens) & tokens.protected
  return text, tokens.alive & ~tokens.protected


def soft_top(tokens: Tokens, score: Array, keep: Any, temperature: float, *, train: bool) -> Plan:
  """`keep_top` whose gate has in training the gradient of sigmoid((s - t) / tau), t such that these sum to the count.

  Args:
    tokens: N tokens.
    score: (B, N).
    keep: how many stay, the protected counted.
    temperature: tau.
    train: whether the gate shall learn.
  """
  plan = keep_top(tokens, score, keep)
  if not train:
    return plan
  free = tokens.alive & ~tokens.protected
  kept = (plan.owner >= 0) & free
  t = soft_threshold(score, free, kept.sum(1).astype(jnp.float32), temperature)
  soft = jax.nn.sigmoid((jnp.where(free, score, 0.0) - t[:, None]) / temperature)
  return plan.replace(gate=jnp.where(free, straight_through(kept, soft), 1.0))


def decided(tokens: Tokens, kept: Array) -> Array:
  """Order of a decision (B, N) bool: the protected, those it keeps, the others, the dead, each in their order."""
  return inverse(rank(jnp.where(tokens.protected, -1, jnp.where(kept, 0, jnp.where(tokens.alive, 1, 2)))))


def merge_into(tokens: Tokens, owner: Array, order: Array, share: Array | None = None) -> Plan:
  """The plan that averages each token into its owner.

  Args:
    tokens: N tokens.
    owner: (B, N) int32; i where i is kept, -1 where it is dropped or dead.
    order: (B, N) int32, owners first.
    share: (B, N) weights of the mean within a group; None: the sizes.
  """
  kept = owner == jnp.arange(owner.shape[1])
  weight = average_weight(owner, tokens.size if share is None else share)
  return Plan(owner=owner, order=order, gate=kept | ~tokens.alive, weight=weight)
