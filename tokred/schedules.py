"""Counts by layer that cost what was asked for, by arithmetic, and what falls while training: schedules, in papers.

`at_budget` spreads a budget by a rule, `at_target` scales counts that were learned.  Counts found on images are in
`calibrate`.
"""

import collections
import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tokred import losses
from tokred.config import complete, nearest
from tokred.layout import Spot, Stack, walk
from tokred.model import Model, build
from tokred.nn.vit import ViT
from tokred.rates import LEARNED, cosine_keep, geometric
from tokred.reducers import base
from tokred.sites import parse

# Words for `layers` in a template: the blocks for a depth, and fallbacks for budgets that are out of their reach.
LAYERS: dict[str, Callable[[int], list[tuple[int, ...]]]] = {
  "all": lambda depth: [tuple(range(depth))],
  "every": lambda depth: [tuple(range(1, depth)), tuple(range(depth))],  # all but the first
  "stages": lambda depth: [tuple(sorted({max(1, depth * i // 4) for i in (1, 2, 3)}))],
  "once": lambda depth: [(max(1, depth // 4),), (1,), (0,)],
  "last": lambda depth: [(depth - 1,)],
  "exit": lambda depth: [(depth - 2,)],  # the end of a scope with until=-2
  "behind": lambda depth: [tuple(range(max(1, depth // 4) + 1, depth)), tuple(range(2, depth)), tuple(range(1, depth))],
  "first": lambda depth: [tuple(range(min(3, depth - 1)))],
  "rest": lambda depth: [tuple(range(min(3, depth - 1), depth))],
  "alternate": lambda depth: [  # every second block, two of three, all but the first
    tuple(range(1, depth, 2)),
    tuple(layer for layer in range(1, depth) if layer % 3),
    tuple(range(1, depth)),
  ],
}
EVEN = ("all", "every")  # each block removes the same number of tokens; elsewhere each keeps the same share


def at_budget(config: Mapping[str, Any] | ConfigDict, sites: Mapping[str, Any], budget: float) -> dict[str, dict]:
  """Sites whose counts cost a share of the dense model, and as little less than it as integers allow.

  Args:
    config: of the model; its own sites are not read.
    sites: templates: sites without keep, whose `layers` are a tuple or a word of `LAYERS`.  Where the word is one of
      `EVEN` all spots remove the same number of tokens, elsewhere, and where tokens come back, all keep the same share
      of what arrives.  Counts of sites with rate="learned" are not set: their budget is `config.loss.target`; but with
      initial="budget" they start from those that they would get with a fixed rate.
    budget: share of the dense multiply-adds, above 0; 1 is all of them.

  Returns:
    `config.sites` with integers as `keep`.

  Raises:
    ValueError: the sites cannot reach the budget, or are no sites, or the budget is no such share.
  """
  if not (isinstance(budget, numbers.Real) and 0.0 < budget <= 1.0):
    raise ValueError(f"budget={budget!r}; valid: a share of the dense multiply-adds, above 0.0 and at most 1.0")
  if begin := {name for name, site in sites.items() if site.get("initial") == "budget"}:
    fixed = {name: as_fixed(site) if name in begin else site for name, site in sites.items()}
    by_hand = at_budget(config, fixed, budget)
    learned = {name: {k: v for k, v in {**sites[name], **by_hand[name]}.items() if k != "keep"} for name in begin}
    return by_hand | {name: learned[name] | {"rate": "learned", "initial": by_hand[name]["keep"]} for name in begin}
  config = complete(config).to_dict()
  depth = build(config | {"sites": {}}).module.shape.depth
  words = {site["layers"] for site in sites.values() if isinstance(site.get("layers"), str)}
  for word in words - LAYERS.keys():
    raise ValueError(f"layers={word!r} is no word for layers; {nearest(word, LAYERS)}")
  ways = max((len(LAYERS[word](depth)) for word in words), default=1)
  even = {name for name, site in sites.items() if site.get("layers") in EVEN}
  for way in range(ways):
    resolved = {name: _with_layers(site, depth, way) for name, site in sites.items()}
    open_ = {name: site | ({} if _settled(site) else {"keep": keeping_all(site)}) for name, site in resolved.items()}
    module = build(config | {"sites": open_}).module
    spots = [spot for spot in module.sites.spots if not _settled(resolved[spot.site])]
    if not spots:
      return resolved
    least = share(module, spots, _spread(module, spots, even, 0.0))
    if least <= budget:
      counts = largest(lambda free: _spread(module, spots, even, free), 0.0, 1.0, module, spots, budget)  # noqa: B023
      return with_counts(resolved, spots, counts)
  raise ValueError(
    f"sites {', '.join(sites)} cannot go down to budget={budget} of the dense cost, only to {least:.3f}; "
    "raise the budget or let them act in earlier or in more layers"
  )


def at_target(model: Model, sites: Collection[str], target: float, unit: str = "fraction") -> ConfigDict:
  """Learned counts, scaled until they cost what was asked for, and as little less as integers allow.

  Learned rates stop where the pulls of budget and task balance, a percent beside the target, and then are rounded up.
  Of n unprotected tokens that a spot keeps, round(f n) stay, with one f for all; at the end, single tokens come back
  while there is room.

  Args:
    model: frozen.
    sites: names of those whose counts were learned.
    target: of `config.loss`.
    unit: likewise, one of `losses.UNITS`.

  Returns:
    `model.config` with integers as `keep`.

  Raises:
    ValueError: these sites cannot reach the target.
  """
  module = model.module
  spots = [spot for spot in module.sites.spots if spot.site in sites]
  scaled = lambda f: reached(module, spots, [s.protected + round(f * (s.keep - s.protected)) for s in spots])
  if (least := share(module, spots, scaled(0.0), unit)) > target:
    raise ValueError(f"sites {', '.join(sites)} cannot go down to {target:g} in unit {unit!r}, only to {least:.4g}")
  high = float(module.shape.num_tokens)  # who keeps one token keeps all
  return with_keeps(model, spots, largest(scaled, 0.0, high, module, spots, target, unit=unit))


def share(module: ViT, spots: Sequence[Spot], counts: Sequence[int], unit: str = "fraction") -> float:
  """What these counts out of these spots cost: a share of the dense multiply-adds, or in a unit of `losses.UNITS`."""
  return float(losses.spent(module, unit, by_site(spots, counts)))


def with_counts(sites: Mapping[str, Any], spots: Sequence[Spot], counts: Sequence[int]) -> dict[str, dict]:
  """`config.sites` with the counts of these spots, protected tokens included, as `keep`."""
  out = {name: {k: v for k, v in site.items() if k != "r"} for name, site in sites.items()}
  for name, values in by_site(spots, counts).items():
    reducer = sites[name]["reducer"]
    slots = len(reducer) if isinstance(reducer, (tuple, list)) else 1
    by_slot = tuple(tuple(values[slot::slots]) for slot in range(slots))
    out[name]["keep"] = by_slot if slots > 1 else by_slot[0]
  return out


def with_keeps(model: Model, spots: Sequence[Spot], counts: Sequence[int]) -> ConfigDict:
  config = model.config.to_dict()
  return complete(config | {"sites": with_counts(config["sites"], spots, counts)})


def _with_layers(site: Mapping[str, Any], depth: int, way: int) -> dict[str, Any]:
  site = dict(site)
  if isinstance(site.get("layers"), str):
    ways = LAYERS[site["layers"]](depth)
    site["layers"] = ways[min(way, len(ways) - 1)]
  return site


def as_fixed(site: Mapping[str, Any]) -> dict[str, Any]:
  """A site whose rate is learned or a threshold, as if it were not."""
  own = ("rate", "initial", "granularity", "threshold", "softness", "mean")
  return {name: value for name, value in site.items() if name not in own}


def _settled(site: Mapping[str, Any]) -> bool:
  """Whether the site's counts are not for us to set."""
  names = site["reducer"] if isinstance(site["reducer"], (tuple, list)) else (site["reducer"],)
  asks = any(not (base.get(name).recovers or base.get(name).training_only) for name in names)
  return site.get("rate") in LEARNED or "keep" in site or "r" in site or not asks


def keeping_all(site: Mapping[str, Any]) -> Any:
  """The `keep` that lets every token through."""
  return (1.0,) * len(site["reducer"]) if isinstance(site["reducer"], (tuple, list)) else 1.0


def by_site(spots: Sequence[Spot], counts: Sequence[int]) -> dict[str, list[int]]:
  out: dict[str, list[int]] = {}
  for spot, count in zip(spots, counts, strict=True):
    out.setdefault(spot.site, []).append(count)
  return out


def _follow(module: ViT, spots: Sequence[Spot], choose: Callable[[Spot, int], int]) -> list[int]:
  """Counts of these spots, where choose(spot, tokens that arrive) wants so many and gets what the reducer can give."""
  sites, chosen = module.sites, {}

  def leave(here: Sequence[Spot], n: int) -> int:
    for spot in here:
      if spot.type.recovers:
        n = spot.module().recovered(n, sites.stack.num_tokens)
      elif spot in spots and not spot.type.training_only:
        n = _reachable(spot, choose(spot, n), n, sites.stack)
      elif spot.rate == "fixed":
        n = min(n, spot.keep)
      chosen[spot] = n
    return n

  walk(sites.stack.depth, sites.at, sites.stack.num_tokens, leave)
  return [chosen[spot] for spot in spots]


def _reachable(spot: Spot, wanted: int, n: int, stack: Stack) -> int:
  """The largest count up to `wanted` that some keep rate of the reducer gives from n tokens; else its smallest."""
  reducer, protected, source = spot.module(), spot.protected, stack.num_tokens - stack.num_protected
  fewest = min(n, reducer.fewest(n, protected))

  def gives(count: int) -> bool:
    whole = source if reducer.from_input else n - protected
    shares = [(count - protected + d) / max(whole, 1) for d in (0, 0.5, -0.5, -1)]  # each rounds as it likes
    shares += [count / n, (count - 0.5) / n]  # of all, the protected too
    return any(reducer.count(f, n, protected, source) == count for f in shares if 0 < f <= 1)

  for count in range(min(n, wanted), fewest, -1):
    if count == n or gives(count):
      return count
  return fewest


def reached(module: ViT, spots: Sequence[Spot], wanted: Sequence[int]) -> list[int]:
  """The counts next to `wanted` that the reducers can give from what arrives."""
  by_spot = dict(zip(spots, wanted, strict=True))
  return _follow(module, spots, lambda spot, n: by_spot[spot])


def _spread(module: ViT, spots: Sequence[Spot], even: set[str], free: float) -> list[int]:
  """Counts for one number in [0, 1]: 0 removes whatever can be removed, 1 nothing."""
  members, total = collections.Counter(spot.site for spot in spots), module.shape.num_tokens

  def choose(spot: Spot, n: int) -> int:
    if spot.site in even and not module.sites.scoped(spot):
      place = (spot.index + 1) / members[spot.site]  # linear, down to nothing in the last block at 1/2; then steeper
      removed = 2 * (1 - free) * place if free >= 0.5 else place ** (2 * free)
      return total - math.floor(removed * (total - spot.protected))
    return spot.protected + math.ceil(free * (n - spot.protected))

  return _follow(module, spots, choose)


def largest(
  curve: Callable[[float], list[int]], low: float, high: float, module: ViT, spots: Sequence[Spot], budget: float,
  halvings: int = 40, unit: str = "fraction",
) -> list[int]:  # fmt: skip
  """The counts of a rising family that come next to the budget, then topped up; curve(low) must be within it."""
  for _ in range(halvings):
    middle = (low + high) / 2
    low, high = (middle, high) if share(module, spots, curve(middle), unit) <= budget else (low, middle)
  return topped_up(module, spots, curve(low), budget, unit)


def topped_up(
  module: ViT, spots: Sequence[Spot], counts: Sequence[int], budget: float, unit: str = "fraction"
) -> list[int]:
  """Gives back a token at a time, last spots first, as long as it costs something and the budget holds."""
  counts, price, grows = list(counts), share(module, spots, counts, unit), True
  while grows:
    grows = False
    for index in reversed(range(len(spots))):
      trial = [*counts[:index], counts[index] + 1, *counts[index + 1 :]]
      if reached(module, spots, trial) == trial and price < (dearer := share(module, spots, trial, unit)) <= budget:
        counts, price, grows = trial, dearer, True
  return counts


def scheduled(sites: Mapping[str, Mapping[str, Any]], stack: Stack, step: int) -> dict[str, tuple[int, ...]]:
  """Counts of the sites whose rate is "scheduled" at an optimiser step, by site and spot; an input of the model."""
  moving = [name for name, site in sites.items() if site.get("rate") == "scheduled"]
  idle = parse(dict(sites) | {name: dict(sites[name]) | {"keep": 1.0} for name in moving}, stack).spots
  now = dict(sites)
  for name in moving:
    site, arriving = dict(sites[name]), [spot.arriving for spot in idle if spot.site == name]
    keep = site["keep"] if isinstance(site["keep"], (tuple, list)) else (site["keep"],) * len(arriving)
    falling = (_falling(*each, step, *site["schedule"]) for each in zip(keep, arriving, strict=True))
    now[name] = site | {"keep": tuple(falling)}
  spots = parse(now, stack).spots
  return {name: tuple(spot.keep for spot in spots if spot.site == name) for name in moving}


def _falling(keep: float | int, arriving: int, step: int, begin: int, end: int) -> float | int:
  """A share falls from 1, a number from all that arrive where the site takes nothing yet."""
  if isinstance(keep, float):
    return cosine_keep(keep, step, begin, end)
  return math.ceil(arriving * cosine_keep(keep / arriving, step, begin, end) - 1e-6)


def annealed(spots: Sequence[Spot], step: int) -> dict[str, float]:
  """Options that move at an optimiser step, by "<site>.<option>"; an input of the model, beside the counts."""
  moving = {(spot.site, entry) for spot in spots for entry in spot.anneal}
  return {f"{site}.{option}": geometric(step, *path) for site, (option, *path) in moving}
