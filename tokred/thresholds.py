"""Thresholds on images: how many tokens pass them, and where they stand for a budget.

`by_threshold` reads off a trained model how many tokens each of its layers has learned to keep, and `by_mean` how many
its thresholds leave.  `by_shift` moves thresholds, with which each image has counts of its own, until the mean image
costs the budget, and `in_rows` makes that fast.  `tokred.calibrate` offers them beside searches of counts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tokred import cost, losses
from tokred.config import complete
from tokred.layout import Spot
from tokred.model import Model, build
from tokred.nn.vit import ViT
from tokred.rates import Threshold
from tokred.schedules import as_fixed, at_target, keeping_all, largest, reached, share, with_counts, with_keeps


@dataclasses.dataclass(frozen=True)
class Passed:
  """What thresholds leave of some images."""

  counts: list[float]  # tokens out of each spot, in the mean
  most: list[int]  # and of the image that has most
  price: float  # mean of what images cost, a share of the dense cost
  lowest: float  # score of all tokens
  highest: float


def by_threshold(model: Model, batches: Iterable[Mapping[str, Any]], budget: float, halvings: int = 20) -> ConfigDict:
  """The counts by layer that a trained model decides on: those of one threshold for all layers, met by the budget.

  Where training holds only the mean share of all layers (`config.loss.global_ratio`), each has learned how many tokens
  it needs.  Spot by spot, the mean number of tokens with score >= t becomes `keep`, and bisection finds t.  Each trial
  is a pass in mask mode with the decisions of its t, so that later layers see what earlier ones leave; at the end,
  single tokens come back while there is room.

  Args:
    model: trained, with one site of one reducer that reports a score, its rate fixed; its counts do not matter.
    batches: see `tokred.calibrate.greedy`; images that the model was trained on.
    budget: share of the dense multiply-adds, in (0, 1).
    halvings: of the span of all scores.

  Returns:
    `model.config` with integers as `keep`.

  Raises:
    ValueError: a rate is not fixed, tokens have no scores or those of several reducers, or the site cannot reach the
      budget.
  """
  module, spots = searchable(model)
  if len(kinds := sorted({(spot.site, spot.reducer) for spot in spots})) > 1:
    raise ValueError(f"scores of {kinds} have no threshold in common; valid: one site of one reducer")
  passing = what_passes(model, spots, batches, keeping_all(model.config.sites[spots[0].site]))

  rounded = lambda means: reached(module, spots, [round(mean) for mean in means])
  all_pass, none_pass = passing(-math.inf), passing(math.inf)
  if (least := share(module, spots, rounded(none_pass.counts))) > budget:
    raise ValueError(f"the sites cannot go down to budget={budget} of the dense cost, only to {least:.3f}")
  if share(module, spots, rounded(all_pass.counts)) <= budget:
    return with_keeps(model, spots, rounded(all_pass.counts))
  none = float(np.nextafter(np.float32(none_pass.highest), np.float32(np.inf)))
  curve = lambda height: rounded(passing(-height).counts)
  return with_keeps(model, spots, largest(curve, -none, -all_pass.lowest, module, spots, budget, halvings))


def by_mean(model: Model, batches: Iterable[Mapping[str, Any]], budget: float) -> ConfigDict:
  """The counts that thresholds leave on average, the same for every image from here on, and scaled to the budget.

  Args:
    model: frozen, with sites whose rate is "threshold".
    batches: see `tokred.calibrate.greedy`; images that the model was trained on.
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
  config["sites"] |= {name: as_fixed(config["sites"][name]) for name in names}
  config["sites"] = with_counts(config["sites"], spots, [math.ceil(mean) for mean in means])
  return at_target(dataclasses.replace(build(config), params=model.params), names, budget)


def by_shift(model: Model, batches: Iterable[Mapping[str, Any]], budget: float, halvings: int = 30) -> ConfigDict:
  """The thresholds, all moved by one number, at which an image costs the budget in the mean, each by its own counts.

  Before a training with rate="learned_threshold" these are the thresholds that it starts from.

  Args:
    model: with one site of one reducer whose rate is "threshold" or "learned_threshold".
    batches: see `tokred.calibrate.greedy`; a thousand images or more, for each costs something else.
    budget: share of the dense multiply-adds, in (0, 1).
    halvings: of the span of all scores.

  Returns:
    `model.config` with other thresholds.

  Raises:
    ValueError: there are no thresholds, or those of several reducers, or the site cannot reach the budget.
  """
  spots, values, _ = _shifted(model, batches, budget, halvings)
  return _with_fields(model, spots[0].site, threshold=tuple(values.tolist()))


def in_rows(
  model: Model, batches: Iterable[Mapping[str, Any]], budget: float, halvings: int = 30, spare: float = 0.05
) -> ConfigDict:
  """`by_shift`, and room for what is left: `mean` tokens an image in rows that a batch shares, no more than `keep`.

  Args:
    model: see `by_shift`, frozen.
    batches: likewise.
    budget: likewise.
    halvings: likewise.
    spare: share of the mean that is added, for no batch is like the mean of all images.

  Returns:
    `model.config` with other thresholds, `keep` and `mean`.

  Raises:
    ValueError: see `by_shift`.
  """
  spots, values, passed = _shifted(model, batches, budget, halvings)
  mean = tuple(min(float(most), (1.0 + spare) * count) for count, most in zip(passed.counts, passed.most, strict=True))
  fields = dict(threshold=tuple(values.tolist()), keep=tuple(passed.most), mean=mean)
  return _with_fields(model, spots[0].site, **fields)


def searchable(model: Model) -> tuple[ViT, Sequence[Spot]]:
  """Module and spots of a model whose counts may be searched.

  Raises:
    ValueError: a rate is not fixed, there is no site, or there are no parameters.
  """
  spots = model.module.sites.spots
  other = sorted({spot.site for spot in spots if spot.rate != "fixed"})
  if other or not spots:
    raise ValueError(f"a search needs sites with rate='fixed'; {f'those of {other} are not' if other else 'got none'}")
  if model.params is None:
    raise ValueError("the model has no parameters: call model.init(), or get it from tokred.load")
  return model.module, spots


def _shifted(
  model: Model, batches: Iterable[Mapping[str, Any]], budget: float, halvings: int
) -> tuple[list[Spot], np.ndarray, Passed]:
  """The spots that have a threshold, where it is moved to, and what that leaves."""
  spots = [spot for spot in model.module.sites.spots if spot.rate.endswith("threshold")]
  if len(kinds := sorted({(spot.site, spot.reducer) for spot in spots})) != 1:
    raise ValueError(
      f"thresholds of {kinds} cannot be moved by one number; valid: one site of one reducer with rate='threshold' or "
      "'learned_threshold'"
    )
  passing = what_passes(model, spots, batches, tuple(spot.keep for spot in spots))
  first = np.array([spot.threshold for spot in spots], np.float32)
  all_pass, none_pass = passing(-math.inf), passing(math.inf)
  if none_pass.price > budget:
    raise ValueError(f"the sites cannot go down to budget={budget} of the dense cost, only to {none_pass.price:.3f}")
  low = all_pass.lowest - first.max()
  high = np.nextafter(np.float32(none_pass.highest), np.float32(np.inf)) - first.min()
  if all_pass.price <= budget:
    high, halvings = low, 0
  for _ in range(halvings):
    middle = (low + high) / 2
    low, high = (low, middle) if passing(first + middle).price <= budget else (middle, high)
  values = first + np.float32(high)
  return spots, values, passing(values)


def _with_fields(model: Model, site: str, **fields: Any) -> ConfigDict:
  config = model.config.to_dict()
  kept = {name: value for name, value in config["sites"][site].items() if name != "r" or "keep" not in fields}
  config["sites"][site] = kept | fields
  return complete(config)


def what_passes(
  model: Model, decided: Sequence[Spot], batches: Iterable[Mapping[str, Any]], capacity: Any
) -> Callable[[Any], Passed]:
  """t -> what stays where tokens of score >= t do.

  Args:
    model: with parameters.
    decided: the spots, all of one site, for which `t` decides, a number or one a spot.
    batches: see `tokred.calibrate.greedy`.
    capacity: `keep` of their site.
  """
  config, site = model.config.to_dict(), decided[0].site
  fields = {name: value for name, value in config["sites"][site].items() if name not in ("r", "schedule")}
  config["sites"][site] = as_fixed(fields) | dict(rate="threshold", threshold=0.0, keep=capacity)
  module = build(config).module
  spots = [spot for spot in module.sites.spots if spot.site == site]
  images, dense = _images(batches), losses.dense_macs(module)

  @jax.jit
  def look(params: Any, image: Any, t: Any) -> Any:
    values = jnp.broadcast_to(t, len(spots))
    keeps = {site: tuple(Threshold(value, spot.keep) for value, spot in zip(values, spots, strict=True))}
    aux = module.apply({"params": params}, image, mode="mask", keeps=keeps).aux
    every = lambda name: jnp.stack([aux[f"reduce/{site}/{name}"][spot.index] for spot in spots])
    score = every("score")
    known = jnp.isfinite(score)
    span = jnp.where(known, score, jnp.inf).min(), jnp.where(known, score, -jnp.inf).max()
    return every("alive"), cost.of_each(module, aux) / dense, *span

  def run(t: Any) -> Passed:
    alive, price, low, high = zip(*(look(model.params, image, t) for image in images), strict=True)
    alive = np.concatenate(alive, axis=1)  # (spots, images)
    price = float(np.concatenate(price).mean())
    return Passed(alive.mean(1).tolist(), alive.max(1).tolist(), price, float(min(low)), float(max(high)))

  return run


def _images(batches: Iterable[Mapping[str, Any]]) -> list[Any]:
  """The images of each batch that are no padding."""
  images = [jnp.asarray(batch["image"])[np.asarray(batch["mask"], bool)] for batch in batches]
  if not any(map(len, images)):
    raise ValueError("there are no images to calibrate on")
  return [image for image in images if len(image)]
