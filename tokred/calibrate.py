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
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tokred import losses
from tokred.arank import arank as arank
from tokred.arank import converted as converted
from tokred.arank import rank_of as rank_of
from tokred.data import eval_batches
from tokred.layout import Spot
from tokred.model import Model, without_sites
from tokred.nn.vit import ViT
from tokred.schedules import by_site, largest, reached, share, topped_up, with_keeps
from tokred.thresholds import by_mean, by_shift, by_threshold, in_rows, searchable, what_passes


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
  module, spots = searchable(model)
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
  module, spots = searchable(model)
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


def _lowered(module: ViT, spots: Sequence[Spot], counts: Sequence[int], index: int, taken: int) -> list[int]:
  """With `taken` tokens fewer out of one spot; those behind it never have more than arrive."""
  before = reached(module, spots, counts)[index]
  return reached(module, spots, [*counts[:index], before - taken, *counts[index + 1 :]])


def _logistic(x: float) -> float:
  return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


METHODS = {method.__name__: method for method in (greedy, sigmoid, by_threshold, by_mean, by_shift, in_rows)}


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
  passing = what_passes(model, spots, batches, tuple(spot.keep for spot in spots))
  passed = passing(np.array([spot.threshold for spot in spots], np.float32))
  by_layer = ", ".join(f"{spot.label} {spot.threshold:.4f}" for spot in spots)
  means = ", ".join(f"{count:.1f}" for count in passed.counts)
  return f"thresholds {by_layer}; mean image: {means} tokens behind them, {passed.price:.3f} of the dense cost"


if __name__ == "__main__":
  main()
