"""How many tokens each site keeps, found without training: by arithmetic, or by search on a calibration set.

`at_budget` spreads a budget by a rule.  `greedy` and `sigmoid` try counts on images, in the manner of G-Search and
P-Sigmoid (Zhao et al., 2024, arXiv:2412.00556, there for language models): the baselines that learned rates must beat.
Both run one compiled program in mask mode whose counts are an input.  `by_threshold` reads off a trained model how many
tokens each of its layers has learned to keep, and `by_mean` how many its thresholds leave; `at_target` scales learned
counts to a budget.  `arank` tells which layers of a language model few tokens need.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tokred import losses
from tokred.arank import arank as arank
from tokred.arank import converted as converted
from tokred.arank import rank_of as rank_of
from tokred.config import complete, nearest
from tokred.layout import Spot, Stack, walk
from tokred.model import Model, build, without_sites
from tokred.nn.vit import ViT
from tokred.rates import LEARNED, Threshold
from tokred.reducers import base

# Words for `layers` in a template: the blocks for a depth, and fallbacks for budgets that are out of their reach.
LAYERS: dict[str, Callable[[int], list[tuple[int, ...]]]] = {
  "all": lambda depth: [tuple(range(depth))],
  "every": lambda depth: [tuple(range(1, depth)), tuple(range(depth))],  # all but the first
  "stages": lambda depth: [tuple(sorted({max(1, depth * i // 4) for i in (1, 2, 3)}))],
  "once": lambda depth: [(max(1, depth // 4),), (1,), (0,)],
  "last": lambda depth: [(depth - 1,)],
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
    budget: share of the dense multiply-adds, in (0, 1).

  Returns:
    `config.sites` with integers as `keep`.

  Raises:
    ValueError: the sites cannot reach the budget, or are no sites.
  """
  if begin := {name for name, site in sites.items() if site.get("initial") == "budget"}:
    fixed = {name: _fixed(site) if name in begin else site for name, site in sites.items()}
    by_hand = at_budget(config, fixed, budget)
    learned = {name: {k: v for k, v in by_hand[name].items() if k != "keep"} for name in begin}
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
    open_ = {name: site | ({} if _settled(site) else {"keep": _all(site)}) for name, site in resolved.items()}
    module = build(config | {"sites": open_}).module
    spots = [spot for spot in module.sites.spots if not _settled(resolved[spot.site])]
    if not spots:
      return resolved
    least = share(module, spots, _spread(module, spots, even, 0.0))
    if least <= budget:
      counts = _largest(lambda free: _spread(module, spots, even, free), 0.0, 1.0, module, spots, budget)  # noqa: B023
      return with_counts(resolved, spots, counts)
  raise ValueError(
    f"sites {', '.join(sites)} cannot go down to budget={budget} of the dense cost, only to {least:.3f}; "
    "raise the budget or let them act in earlier or in more layers"
  )


def greedy(model: Model, batches: Iterable[Mapping[str, Any]], budget: float, step: float = 1 / 16) -> ConfigDict:
  """Takes tokens away where it changes the dense model's answers least for what it saves, until the budget is met.

  From all tokens everywhere: of all spots that can give up `step` of the patches, the one with the smallest rise of
  KL(dense || reduced) per multiply-add saved does so; at the end, single tokens come back while there is room.

  Args:
    model: with parameters, and with sites whose rates are fixed; their counts do not matter.
    batches: dicts of image (b, height, width, channels) and mask (b,), all of one shape.
    budget: share of the dense multiply-adds, in (0, 1).
    step: share of the patches that a spot gives up at a time.

  Returns:
    `model.config` with integers as `keep`.

  Raises:
    ValueError: a rate is not fixed, or the sites cannot reach the budget.
  """
  module, spots = _searchable(model)
  distance = divergence(model, batches)
  taken = max(1, round(step * (module.shape.num_tokens - spots[0].protected)))
  counts = [module.shape.num_tokens] * len(spots)
  price, gap = share(module, spots, counts), 0.0
  while price > budget:
    best = None
    for index in range(len(spots)):
      trial = _lowered(module, spots, counts, index, taken)
      saved = price - share(module, spots, trial)
      if saved <= 0:
        continue
      far = distance(trial)
      if best is None or (far - gap) / saved < best[0]:
        best = ((far - gap) / saved, far, trial)
    if best is None:
      raise ValueError(f"the sites cannot go down to budget={budget} of the dense cost, only to {price:.3f}")
    _, gap, counts = best
    price = share(module, spots, counts)
  return _with_keeps(model, spots, _topped_up(module, spots, counts, budget))


def sigmoid(
  model: Model, batches: Iterable[Mapping[str, Any]], budget: float, steepness: Sequence[float] = (0, 2, 4, 8, 16, 32)
) -> ConfigDict:
  """The best of a family of curves: n_l = N / (1 + exp(a (l / L - 1/2) - h)), with h such that the budget is met.

  For a = 0 the curve is a constant; the larger a, the more abrupt the fall from all tokens to none.

  Args:
    model: with parameters, and with sites whose rates are fixed; their counts do not matter.
    batches: see `greedy`.
    budget: share of the dense multiply-adds, in (0, 1).
    steepness: the values of a that are tried.

  Returns:
    `model.config` with integers as `keep`.

  Raises:
    ValueError: a rate is not fixed, or no curve reaches the budget.
  """
  module, spots = _searchable(model)
  distance = divergence(model, batches)
  protected, n, depth = spots[0].protected, module.shape.num_tokens, module.shape.depth
  found = []
  for a in steepness:

    def curve(height: float, a: float = a) -> list[int]:
      shares = [_logistic(a * (0.5 - spot.layer / depth) + height) for spot in spots]
      return _reached(module, spots, [protected + math.ceil(f * (n - protected)) for f in shares])

    low, high = -a - 8.0, a + 8.0  # next to nothing everywhere, next to all
    if share(module, spots, curve(low)) <= budget:
      counts = _largest(curve, low, high, module, spots, budget)
      found.append((distance(counts), counts))
  if not found:
    raise ValueError(f"no curve goes down to budget={budget} of the dense cost; let the sites act in earlier layers")
  return _with_keeps(model, spots, min(found)[1])


def by_threshold(model: Model, batches: Iterable[Mapping[str, Any]], budget: float, halvings: int = 20) -> ConfigDict:
  """The counts by layer that a trained model decides on: those of one threshold for all layers, met by the budget.

  Where training holds only the mean share of all layers (`config.loss.global_ratio`), each has learned how many tokens
  it needs.  Spot by spot, the mean number of tokens with score >= t becomes `keep`, and bisection finds t.  Each trial
  is a pass in mask mode with the decisions of its t, so that later layers see what earlier ones leave; at the end,
  single tokens come back while there is room.

  Args:
    model: trained, with one site of one reducer that reports a score, its rate fixed; its counts do not matter.
    batches: see `greedy`; images that the model was trained on.
    budget: share of the dense multiply-adds, in (0, 1).
    halvings: of the span of all scores.

  Returns:
    `model.config` with integers as `keep`.

  Raises:
    ValueError: a rate is not fixed, tokens have no scores or those of several reducers, or the site cannot reach the
      budget.
  """
  module, spots = _searchable(model)
  if len(kinds := sorted({(spot.site, spot.reducer) for spot in spots})) > 1:
    raise ValueError(f"scores of {kinds} have no threshold in common; valid: one site of one reducer")
  passing = _passing(model, spots[0].site, batches)

  reached = lambda means: _reached(module, spots, [round(mean) for mean in means])  # noqa: E731
  all_pass, lowest, _ = passing(-math.inf)
  none_pass, _, highest = passing(math.inf)
  if (least := share(module, spots, reached(none_pass))) > budget:
    raise ValueError(f"the sites cannot go down to budget={budget} of the dense cost, only to {least:.3f}")
  if share(module, spots, reached(all_pass)) <= budget:
    return _with_keeps(model, spots, reached(all_pass))
  none = float(np.nextafter(np.float32(highest), np.float32(np.inf)))
  curve = lambda height: reached(passing(-height)[0])  # noqa: E731
  return _with_keeps(model, spots, _largest(curve, -none, -lowest, module, spots, budget, halvings))


def by_mean(model: Model, batches: Iterable[Mapping[str, Any]], budget: float) -> ConfigDict:
  """The counts that thresholds leave on average, the same for every image from here on, and scaled to the budget.

  Args:
    model: frozen, with sites whose rate is "threshold".
    batches: see `greedy`; images that the model was trained on.
    budget: share of the dense multiply-adds, in (0, 1).

  Returns:
    `model.config` with rate="fixed" and integers as `keep`.

  Raises:
    ValueError: there is no threshold, or its sites cannot reach the budget.
  """
  spots = [spot for spot in model.module.sites.spots if spot.rate == "threshold"]
  if not spots:
    raise ValueError("no site has a threshold; valid: a frozen model with rate='learned_threshold' or 'threshold'")

  @jax.jit
  def look(params: Any, image: Any) -> Any:
    aux = model.module.apply({"params": params}, image, mode="mask").aux
    return len(image) * jnp.stack([aux[f"reduce/{spot.site}/count"][spot.index] for spot in spots])

  images = _images(batches)
  means = np.sum([look(model.params, image) for image in images], 0) / sum(map(len, images))
  names = dict.fromkeys(spot.site for spot in spots)
  config = model.config.to_dict()
  config["sites"] |= {name: _fixed(config["sites"][name]) for name in names}
  config["sites"] = with_counts(config["sites"], spots, [math.ceil(mean) for mean in means])
  return at_target(dataclasses.replace(build(config), params=model.params), names, budget)


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
  scaled = lambda f: _reached(module, spots, [s.protected + round(f * (s.keep - s.protected)) for s in spots])  # noqa: E731
  if (least := share(module, spots, scaled(0.0), unit)) > target:
    raise ValueError(f"sites {', '.join(sites)} cannot go down to {target:g} in unit {unit!r}, only to {least:.4g}")
  high = float(module.shape.num_tokens)  # who keeps one token keeps all
  return _with_keeps(model, spots, _largest(scaled, 0.0, high, module, spots, target, unit=unit))


def divergence(model: Model, batches: Iterable[Mapping[str, Any]]) -> Callable[[Sequence[int]], float]:
  """counts -> mean KL(dense || reduced) over the images; one program, however many counts are tried.

  Args:
    model: with parameters.
    batches: dicts of image (b, height, width, channels) and mask (b,); kept on the device with the dense logits.
  """
  dense = jax.jit(lambda params, image: without_sites(model.module).apply({"params": params}, image).logits)
  kept = [(image := jnp.asarray(b["image"]), dense(model.params, image), jnp.asarray(b["mask"])) for b in batches]
  examples = sum(int(mask.sum()) for _, _, mask in kept)
  if not examples:
    raise ValueError("there are no images to calibrate on")

  @jax.jit
  def distance(params: Any, image: Any, wanted: Any, mask: Any, keeps: Any) -> Any:
    logits = model.module.apply({"params": params}, image, mode="mask", keeps=keeps).logits
    log_p, log_q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.where(mask, jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1), 0.0))

  def run(counts: Sequence[int]) -> float:
    keeps = {site: np.asarray(values, np.int32) for site, values in _by_site(model.module.sites.spots, counts).items()}
    return sum(float(distance(model.params, image, wanted, mask, keeps)) for image, wanted, mask in kept) / examples

  return run


def _passing(
  model: Model, site: str, batches: Iterable[Mapping[str, Any]]
) -> Callable[[float], tuple[list[float], float, float]]:
  """t -> tokens of score >= t out of each spot, mean over images, and the lowest and the highest score there was."""
  config = model.config.to_dict()
  fields = {name: value for name, value in config["sites"][site].items() if name != "r"}
  config["sites"][site] = fields | dict(rate="threshold", threshold=0.0, keep=_all(fields))  # all may pass
  module = build(config).module
  images = _images(batches)
  examples = sum(map(len, images))

  @jax.jit
  def look(params: Any, image: Any, t: Any) -> Any:
    keeps = {site: (Threshold(t, module.shape.num_tokens),) * len(module.sites.spots)}
    aux = module.apply({"params": params}, image, mode="mask", keeps=keeps).aux
    every = lambda name: jnp.stack([aux[f"reduce/{site}/{name}"][spot.index] for spot in module.sites.spots])  # noqa: E731
    score = every("score")
    known = jnp.isfinite(score)
    return every("count") * len(image), jnp.where(known, score, jnp.inf).min(), jnp.where(known, score, -jnp.inf).max()

  def run(t: float) -> tuple[list[float], float, float]:
    counts, low, high = zip(*(look(model.params, image, t) for image in images), strict=True)
    return (np.sum(counts, 0) / examples).tolist(), float(min(low)), float(max(high))

  return run


def _images(batches: Iterable[Mapping[str, Any]]) -> list[Any]:
  """The images of each batch that are no padding."""
  images = [jnp.asarray(batch["image"])[np.asarray(batch["mask"], bool)] for batch in batches]
  if not any(map(len, images)):
    raise ValueError("there are no images to calibrate on")
  return [image for image in images if len(image)]


def share(module: ViT, spots: Sequence[Spot], counts: Sequence[int], unit: str = "fraction") -> float:
  """What these counts out of these spots cost: a share of the dense multiply-adds, or in a unit of `losses.UNITS`."""
  return float(losses.spent(module, unit, _by_site(spots, counts)))


def with_counts(sites: Mapping[str, Any], spots: Sequence[Spot], counts: Sequence[int]) -> dict[str, dict]:
  """`config.sites` with the counts of these spots, protected tokens included, as `keep`."""
  out = {name: {k: v for k, v in site.items() if k != "r"} for name, site in sites.items()}
  for name, values in _by_site(spots, counts).items():
    reducer = sites[name]["reducer"]
    slots = len(reducer) if isinstance(reducer, (tuple, list)) else 1
    by_slot = tuple(tuple(values[slot::slots]) for slot in range(slots))
    out[name]["keep"] = by_slot if slots > 1 else by_slot[0]
  return out


def _with_layers(site: Mapping[str, Any], depth: int, way: int) -> dict[str, Any]:
  site = dict(site)
  if isinstance(site.get("layers"), str):
    ways = LAYERS[site["layers"]](depth)
    site["layers"] = ways[min(way, len(ways) - 1)]
  return site


def _fixed(site: Mapping[str, Any]) -> dict[str, Any]:
  """A site whose rate is learned or a threshold, as if it were not."""
  return {name: value for name, value in site.items() if name not in ("rate", "initial", "threshold", "softness")}


def _settled(site: Mapping[str, Any]) -> bool:
  """Whether the site's counts are not for us to set."""
  names = site["reducer"] if isinstance(site["reducer"], (tuple, list)) else (site["reducer"],)
  asks = any(not (base.get(name).recovers or base.get(name).training_only) for name in names)
  return site.get("rate") in LEARNED or "keep" in site or "r" in site or not asks


def _all(site: Mapping[str, Any]) -> Any:
  """The `keep` that lets every token through."""
  return (1.0,) * len(site["reducer"]) if isinstance(site["reducer"], (tuple, list)) else 1.0


def _by_site(spots: Sequence[Spot], counts: Sequence[int]) -> dict[str, list[int]]:
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
  reducer, protected, source = spot.module(), spot.protected, stack.num_tokens - spot.protected
  fewest = min(n, reducer.fewest(n, protected))

  def gives(count: int) -> bool:
    whole = source if reducer.from_input else n - protected
    shares = ((count - protected + d) / max(whole, 1) for d in (0, 0.5, -0.5, -1))  # each rounds as it likes
    return any(reducer.count(f, n, protected, source) == count for f in shares if 0 < f <= 1)

  for count in range(min(n, wanted), fewest, -1):
    if count == n or gives(count):
      return count
  return fewest


def _reached(module: ViT, spots: Sequence[Spot], wanted: Sequence[int]) -> list[int]:
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


def _largest(
  curve: Callable[[float], list[int]], low: float, high: float, module: ViT, spots: Sequence[Spot], budget: float,
  halvings: int = 40, unit: str = "fraction",
) -> list[int]:  # fmt: skip
  """The counts of a rising family that come next to the budget, then topped up; curve(low) must be within it."""
  for _ in range(halvings):
    middle = (low + high) / 2
    low, high = (middle, high) if share(module, spots, curve(middle), unit) <= budget else (low, middle)
  return _topped_up(module, spots, curve(low), budget, unit)


def _topped_up(
  module: ViT, spots: Sequence[Spot], counts: Sequence[int], budget: float, unit: str = "fraction"
) -> list[int]:
  """Gives back a token at a time, last spots first, as long as it costs something and the budget holds."""
  counts, price, grows = list(counts), share(module, spots, counts, unit), True
  while grows:
    grows = False
    for index in reversed(range(len(spots))):
      trial = [*counts[:index], counts[index] + 1, *counts[index + 1 :]]
      if _reached(module, spots, trial) == trial and price < (dearer := share(module, spots, trial, unit)) <= budget:
        counts, price, grows = trial, dearer, True
  return counts


def _lowered(module: ViT, spots: Sequence[Spot], counts: Sequence[int], index: int, taken: int) -> list[int]:
  """With `taken` tokens fewer out of one spot; those behind it never have more than arrive."""
  before = _reached(module, spots, counts)[index]
  return _reached(module, spots, [*counts[:index], before - taken, *counts[index + 1 :]])


def _searchable(model: Model) -> tuple[ViT, Sequence[Spot]]:
  spots = model.module.sites.spots
  other = sorted({spot.site for spot in spots if spot.rate != "fixed"})
  if other or not spots:
    raise ValueError(f"a search needs sites with rate='fixed'; {f'those of {other} are not' if other else 'got none'}")
  if model.params is None:
    raise ValueError("the model has no parameters: call model.init(), or get it from tokred.load")
  return model.module, spots


def _with_keeps(model: Model, spots: Sequence[Spot], counts: Sequence[int]) -> ConfigDict:
  config = model.config.to_dict()
  return complete(config | {"sites": with_counts(config["sites"], spots, counts)})


def _logistic(x: float) -> float:
  return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
