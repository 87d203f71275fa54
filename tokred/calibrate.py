"""How many tokens each site keeps, found on a calibration set without training.

`greedy` and `sigmoid` try counts on images, in the manner of G-Search and P-Sigmoid (Zhao et al., 2024,
arXiv:2412.00556, there for language models): the baselines that learned rates must beat.  Both run one compiled program
in mask mode whose counts are an input.  `by_threshold` reads off a trained model how many tokens each of its layers has
learned to keep, and `by_mean` how many its thresholds leave.  `by_shift` moves thresholds, with which each image has
counts of its own, until the mean image costs the budget, and `in_rows` makes that fast.  `arank` tells which layers of
a language model few tokens need.

  python -m tokred.calibrate --workdir=runs/dyt --method=by_threshold --budget=0.6 --output=runs/dyt_0.6

writes a trained model with the counts so found, which eval.py, export.py and `tokred.load` read.
"""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tokred import cost, losses
from tokred.arank import arank as arank
from tokred.arank import converted as converted
from tokred.arank import rank_of as rank_of
from tokred.config import complete
from tokred.data import eval_batches
from tokred.layout import Spot
from tokred.model import Model, build, without_sites
from tokred.nn.vit import ViT
from tokred.rates import Threshold
from tokred.schedules import (
  as_fixed,
  at_target,
  by_site,
  keeping_all,
  largest,
  reached,
  share,
  topped_up,
  with_counts,
  with_keeps,
)


@dataclasses.dataclass(frozen=True)
class _Passed:
  """What thresholds leave of some images."""

  counts: list[float]  # tokens out of each spot, in the mean
  most: list[int]  # and of the image that has most
  price: float  # mean of what images cost, a share of the dense cost
  lowest: float  # score of all tokens
  highest: float


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
  return with_keeps(model, spots, topped_up(module, spots, counts, budget))


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
      return reached(module, spots, [protected + math.ceil(f * (n - protected)) for f in shares])

    low, high = -a - 8.0, a + 8.0  # next to nothing everywhere, next to all
    if share(module, spots, curve(low)) <= budget:
      counts = largest(curve, low, high, module, spots, budget)
      found.append((distance(counts), counts))
  if not found:
    raise ValueError(f"no curve goes down to budget={budget} of the dense cost; let the sites act in earlier layers")
  return with_keeps(model, spots, min(found)[1])


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
  passing = _passing(model, spots, batches, keeping_all(model.config.sites[spots[0].site]))

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
  config["sites"] |= {name: as_fixed(config["sites"][name]) for name in names}
  config["sites"] = with_counts(config["sites"], spots, [math.ceil(mean) for mean in means])
  return at_target(dataclasses.replace(build(config), params=model.params), names, budget)


def by_shift(model: Model, batches: Iterable[Mapping[str, Any]], budget: float, halvings: int = 30) -> ConfigDict:
  """The thresholds, all moved by one number, at which an image costs the budget in the mean, each by its own counts.

  Before a training with rate="learned_threshold" these are the thresholds that it starts from.

  Args:
    model: with one site of one reducer whose rate is "threshold" or "learned_threshold".
    batches: see `greedy`; a thousand images or more, for each costs something else.
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


def _shifted(
  model: Model, batches: Iterable[Mapping[str, Any]], budget: float, halvings: int
) -> tuple[list[Spot], np.ndarray, _Passed]:
  """The spots that have a threshold, where it is moved to, and what that leaves."""
  spots = [spot for spot in model.module.sites.spots if spot.rate.endswith("threshold")]
  if len(kinds := sorted({(spot.site, spot.reducer) for spot in spots})) != 1:
    raise ValueError(
      f"thresholds of {kinds} cannot be moved by one number; valid: one site of one reducer with rate='threshold' or "
      "'learned_threshold'"
    )
  passing = _passing(model, spots, batches, tuple(spot.keep for spot in spots))
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
    keeps = {site: np.asarray(values, np.int32) for site, values in by_site(model.module.sites.spots, counts).items()}
    return sum(float(distance(model.params, image, wanted, mask, keeps)) for image, wanted, mask in kept) / examples

  return run


def _passing(
  model: Model, decided: Sequence[Spot], batches: Iterable[Mapping[str, Any]], capacity: Any
) -> Callable[[Any], _Passed]:
  """t -> what stays where tokens of score >= t do.

  Args:
    model: with parameters.
    decided: the spots, all of one site, for which `t` decides, a number or one a spot.
    batches: see `greedy`.
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

  def run(t: Any) -> _Passed:
    alive, price, low, high = zip(*(look(model.params, image, t) for image in images), strict=True)
    alive = np.concatenate(alive, axis=1)  # (spots, images)
    price = float(np.concatenate(price).mean())
    return _Passed(alive.mean(1).tolist(), alive.max(1).tolist(), price, float(min(low)), float(max(high)))

  return run


def _images(batches: Iterable[Mapping[str, Any]]) -> list[Any]:
  """The images of each batch that are no padding."""
  images = [jnp.asarray(batch["image"])[np.asarray(batch["mask"], bool)] for batch in batches]
  if not any(map(len, images)):
    raise ValueError("there are no images to calibrate on")
  return [image for image in images if len(image)]


def _lowered(module: ViT, spots: Sequence[Spot], counts: Sequence[int], index: int, taken: int) -> list[int]:
  """With `taken` tokens fewer out of one spot; those behind it never have more than arrive."""
  before = reached(module, spots, counts)[index]
  return reached(module, spots, [*counts[:index], before - taken, *counts[index + 1 :]])


def _searchable(model: Model) -> tuple[ViT, Sequence[Spot]]:
  spots = model.module.sites.spots
  other = sorted({spot.site for spot in spots if spot.rate != "fixed"})
  if other or not spots:
    raise ValueError(f"a search needs sites with rate='fixed'; {f'those of {other} are not' if other else 'got none'}")
  if model.params is None:
    raise ValueError("the model has no parameters: call model.init(), or get it from tokred.load")
  return model.module, spots


def _logistic(x: float) -> float:
  return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


METHODS = {"greedy": greedy, "sigmoid": sigmoid, "by_threshold": by_threshold, "by_mean": by_mean}
METHODS |= {"by_shift": by_shift, "in_rows": in_rows}


def main(argv: Sequence[str] | None = None) -> None:
  """The command line; prints the counts."""
  parser = argparse.ArgumentParser(prog="python -m tokred.calibrate", description="Counts found on training images.")
  parser.add_argument("--workdir", required=True, help="run directory, export or weights: what tokred.load takes")
  parser.add_argument("--method", required=True, choices=METHODS)
  parser.add_argument("--budget", required=True, type=float, help="share of the dense multiply-adds")
  parser.add_argument("--output", required=True, help="folder to write")
  parser.add_argument("--images", type=int, default=256, help="in whole batches of config.eval.batch_size")
  flags = parser.parse_args(argv)
  import tokred  # here, since the package must not import its own command line

  try:
    tokred.export.check(flags.output, ("orbax",))
    if not (0.0 < flags.budget < 1.0 and flags.images > 0):
      raise ValueError(f"--budget={flags.budget} must be in (0, 1), and --images={flags.images} 1 or more")
    model = tokred.freeze(tokred.load(flags.workdir))
    c = model.config
    if c.model.name != "vit":
      raise ValueError(f"config.model.name={c.model.name!r} of {flags.workdir}; valid: 'vit'")
    sizes = dict(image_size=c.model.image_size, channels=c.model.channels, num_classes=c.model.num_classes)
    batches = eval_batches(c.data, c.data.train_split, **sizes, batch_size=c.eval.batch_size)
    some = list(itertools.islice(batches, -(-flags.images // c.eval.batch_size)))
    model = model.with_sites(METHODS[flags.method](model, some, flags.budget).sites.to_dict())
    told = _found(model, some)
    tokred.export.save(model, flags.output, ("orbax",))
  except (ValueError, OSError) as error:
    sys.exit(f"tokred.calibrate: {' '.join(str(error).split())}")
  print(told)


def _found(model: Model, batches: Iterable[Mapping[str, Any]]) -> str:
  """Counts and cost, or thresholds and what they leave in the mean of the images."""
  spots = [spot for spot in model.module.sites.spots if spot.rate == "threshold"]
  if not spots:
    price = model.macs / losses.dense_macs(model.module)
    return f"tokens after each block {model.counts}, {price:.3f} of the dense cost"
  passing = _passing(model, spots, batches, tuple(spot.keep for spot in spots))
  passed = passing(np.array([spot.threshold for spot in spots], np.float32))
  by_layer = ", ".join(f"{spot.label} {spot.threshold:.4f}" for spot in spots)
  means = ", ".join(f"{count:.1f}" for count in passed.counts)
  return f"thresholds {by_layer}; mean image: {means} tokens behind them, {passed.price:.3f} of the dense cost"


if __name__ == "__main__":
  main()
