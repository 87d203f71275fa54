"""Where the spots of a stack lie, and how many tokens are where: the static half of `sites`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokred import cost, rates
from tokred.reducers import base

PLACES = ("before", "around", "ahead", "attn", "mlp", "after", "output")  # in the order in which tokens meet them


@dataclasses.dataclass(frozen=True)
class Stack:
  """What a site must know of the blocks that it sits in."""

  depth: int
  num_tokens: int  # at the input, protected ones counted
  num_protected: int
  has_cls: bool = True
  name: str = "encoder"  # or llm, a decoder's
  heads: int = 0  # llm: of keys and values
  grid: tuple[int, ...] = ()  # rows and columns of the patches; (): of an image's own size, or there are none


@dataclasses.dataclass(frozen=True)
class Spot:
  """One reducer of one site in one layer."""

  site: str
  index: int  # among the site's spots, in the order in which they act
  child: str  # module name under reduce/
  layer: int
  place: str
  reducer: str
  options: tuple[tuple[str, Any], ...]
  rate: str
  arriving: int  # tokens in, where the counts are static
  keep: int  # tokens out; the capacity of a threshold; all that arrive where the rate is learned
  share: float  # unprotected tokens that should be left, as a share of those at the input
  protected: int  # of those that arrive
  until: int = -1  # around: the block behind which those that went round are back
  granularity: int = 1
  initial: int = 0  # learned: tokens that it keeps before it has learned; 0: half of the unprotected
  threshold: float = 0.0
  softness: float = 0.1
  mean: float = 0.0  # ragged: tokens out of it in the mean of a batch; 0: not known
  anneal: tuple[tuple[Any, ...], ...] = ()  # (option, from, to, first step, last step), ...
  proportional: bool = False
  budget: float | int | None = None  # `keep` as the site says it: a share, or a number; None: it says r, or learns
  position: str = "original"  # llm: what happens to the positions of those that stay
  of: str = "arriving"  # llm: or "input", what a share is one of

  @property
  def label(self) -> str:
    """Its name in metrics: "<site>/<layer>", and the reducer where the site has several."""
    return f"{self.site}/{self.layer}" + ("" if self.child == self.site else f"/{self.reducer}")

  @property
  def type(self) -> type[base.Reducer]:
    """Class of the reducer."""
    return base.REGISTRY[self.reducer]

  @property
  def idle(self) -> bool:
    """Whether it is known to let every token through, as frozen rates often do in some layers."""
    around = self.place in ("around", "mlp")
    return self.rate == "fixed" and self.keep >= self.arriving and not around and self.type.idles

  @property
  def ragged(self) -> bool:
    """Whether images keep different numbers of tokens; `keep` is then a capacity."""
    return self.rate.endswith("threshold") or self.type.ragged

  @property
  def wanted(self) -> float:
    """What a selector's "kept_share" is held at: a share of the input's unprotected tokens, or of those that arrive."""
    if self.type.from_input:
      return self.share
    if isinstance(self.budget, float) and self.budget <= 1.0:
      return self.budget
    return (self.keep - self.protected) / max(self.arriving - self.protected, 1)

  @property
  def candidates(self) -> tuple[int, ...]:
    """Counts of unprotected tokens that a learned rate chooses among."""
    return rates.candidates(self.arriving - self.protected, self.granularity)

  def module(self, **kwargs: Any) -> base.Reducer:
    """The reducer with its options."""
    return self.type(**(dict(self.options) | kwargs))


@dataclasses.dataclass(frozen=True)
class Counts:
  """Tokens along the depth; numbers or traced scalars, one a block."""

  attention: tuple[Any, ...]
  mlp: tuple[Any, ...]
  leaving: tuple[Any, ...]
  final: Any  # at the head


def walk(depth: int, at: Callable[..., Sequence[Any]], n: Any, leave: Callable[[Sequence[Any], Any], Any]) -> Counts:
  """Follows the number of tokens through a stack.

  Args:
    depth: number of blocks.
    at: (layer, *places) -> what acts there, with a field `until` for those around a block; layer -1 is the output.
    n: tokens at the input.
    leave: (what acts at one place, tokens that arrive) -> tokens that leave; asked in the order in which tokens meet
      them, for places where something acts.
  """

  def after(layer: int, place: str, n: Any) -> Any:
    here = at(layer, place)
    return leave(here, n) if here else n

  attention, mlp, leaving, outer, until = [], [], [], None, -1
  for layer in range(depth):
    n = after(layer, "before", n)
    if around := at(layer, "around"):
      outer, until = n, _field(around[0], "until")
      n = leave(around, n)
    attention.append(n)
    n = after(layer, "attn", after(layer, "ahead", n))
    mlp.append(after(layer, "mlp", n))
    n = after(layer, "after", n)
    if layer == until:
      n, until = outer, -1
    leaving.append(n)
  return Counts(tuple(attention), tuple(mlp), tuple(leaving), after(-1, "output", n))


def _field(what: Any, name: str) -> Any:
  return what[name] if isinstance(what, Mapping) else getattr(what, name)


@dataclasses.dataclass(frozen=True)
class Sites:
  """All spots of a stack in the order in which tokens meet them."""

  stack: Stack
  spots: tuple[Spot, ...] = ()

  def at(self, layer: int, *places: str) -> tuple[Spot, ...]:
    """Spots of a layer at any of these places."""
    return tuple(spot for spot in self.spots if spot.layer == layer and spot.place in places)

  def opening(self, spot: Spot) -> Spot | None:
    """The `around` spot in whose scope a spot acts, itself included."""
    for scope in self.spots:
      within = scope.layer <= spot.layer <= scope.until and (spot.layer, spot.place) != (scope.layer, "before")
      if scope.place == "around" and within:
        return scope
    return None

  def scoped(self, spot: Spot) -> bool:
    """Whether what a spot removes comes back behind its scope."""
    return spot.place == "mlp" or self.opening(spot) is not None

  def closes(self, layer: int) -> bool:
    """Whether tokens that went round come back behind this block."""
    return any(spot.place == "around" and spot.until == layer for spot in self.spots)

  def masked(self, layer: int, mode: str) -> bool:
    """Whether attention of this layer may meet dead tokens: in gather mode only where images keep different counts."""
    return any(mode == "mask" or spot.ragged for spot in self._before(layer))

  def proportional(self, layer: int, mode: str) -> bool:
    """Whether log(size) biases attention of this layer; not where nobody acts who could have changed a size.

    That may be another than the one who asks for the bias, whose own frozen count may let all through.
    """
    before = self._before(layer)
    acts = mode == "mask" or not all(spot.idle for spot in before)
    return acts and any(spot.proportional for spot in before)

  def _before(self, layer: int) -> list[Spot]:
    """Spots whose decision attention of this layer meets; a scope is over when its last block is."""

    def meets(spot: Spot) -> bool:
      if spot.place in ("output", "mlp"):
        return False
      scope = self.opening(spot)
      if scope is not None and layer > scope.until:
        return False
      return spot.layer < layer + (spot.place in ("before", "around"))

    return [spot for spot in self.spots if meets(spot)]

  def needs(self, layer: int) -> tuple[str, ...]:
    """Features that the block of this layer must provide."""
    here = self.at(layer, "ahead", "attn", "mlp", "after")
    after = self.at(layer + 1, "before", "around") + (self.at(-1, "output") if layer == self.stack.depth - 1 else ())
    return tuple(sorted({need for spot in here + after for need in spot.module(parent=None).needed()}))

  def foreseen(self, layer: int) -> bool:
    """Whether the first reducer behind attention of this layer decides by its queries, keys and values alone."""
    return any(spot.module(parent=None).foresees() for spot in self.at(layer, "attn")[:1])

  def counts(self) -> tuple[int, ...]:
    """Tokens leaving each block, where counts are static; `output` sites come after the last."""
    return walk(self.stack.depth, self.at, self.stack.num_tokens, lambda spots, n: spots[-1].keep).leaving

  def means(self) -> Counts:
    """Tokens of an image in the mean of a batch, as the sites say it; as many as there can be where they do not."""

    def leave(spots: Sequence[Spot], n: float) -> float:
      for spot in spots:
        n = spot.keep if spot.type.recovers else min(n, spot.mean or spot.keep)
      return n

    return walk(self.stack.depth, self.at, self.stack.num_tokens, leave)

  def profile(self, width: int, num_heads: int, counts: Mapping[str, Sequence[Any]] | None = None) -> cost.Profile:
    """Token counts along the depth, for `cost`.

    Args:
      width: of the stack; with `num_heads` it prices the reducers' own work.
      num_heads: of its attention.
      counts: tokens out by site and spot, numbers or traced scalars, where they differ from the static ones.
    """
    extra = 0.0

    def leave(spots: Sequence[Spot], n: Any) -> Any:
      nonlocal extra
      told = [counts[spot.site][spot.index] if counts and spot.site in counts else spot.keep for spot in spots]
      in_turn, out = any(spot.type.recovers for spot in spots), n
      for spot, count in zip(spots, told, strict=True):
        arrive = out if in_turn else n
        left = spot.module().recovered(arrive, self.stack.num_tokens) if spot.type.recovers else count
        extra, out = extra + spot.module().macs(arrive, left, width, num_heads), left
      return out if in_turn else cost.min_st(n, told)

    n = walk(self.stack.depth, self.at, self.stack.num_tokens, leave)
    if counts is None and any(spot.mean for spot in self.spots):  # images share rows
      rows = self.means()
      return cost.Profile(rows.attention, rows.mlp, n.final, extra, n.leaving, places=n.attention)
    return cost.Profile(n.attention, n.mlp, n.final, extra, n.leaving)
