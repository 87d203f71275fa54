"""How much it matters where tokens go: random schedules of one reducer, all at one cost, on a dense checkpoint.

    python benchmarks/schedules.py --init=runs/sweep_dense/dense [--budget=0.6] [--reducer=tome] [--number=30]

Each schedule splits what is removed at random over the blocks (all splits as likely), and is scaled until it costs the
budget.  Printed as CSV: tokens after each block, accuracy on the test split and the mean KL(dense || reduced) there,
without training; first the schedule by hand, which removes as many in every block, and what the greedy search finds on
256 training images.  Learned counts are worth training for where these lines differ by more than seeds do.
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tokred
from tokred import calibrate, schedules
from tokred.data import feed


def measured(model: tokred.Model, dense: tokred.Model, batches: Iterable[Mapping[str, Any]]) -> Any:
  """counts -> accuracy in percent and mean KL(dense || reduced); one program serves all counts."""

  @jax.jit
  def sums(params: Any, image: Any, log_p: Any, label: Any, mask: Any, keeps: Any) -> Any:
    log_q = jax.nn.log_softmax(model.module.apply({"params": params}, image, mode="mask", keeps=keeps).logits)
    right, far = log_q.argmax(-1) == label, (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return jnp.stack([jnp.where(mask, value, 0.0).sum() for value in (right, far, mask)])

  kept = [{name: jnp.asarray(batch[name]) for name in ("image", "label", "mask")} for batch in batches]
  for batch in kept:
    batch["log_p"] = jax.nn.log_softmax(dense(batch["image"]).logits)

  def run(counts: Sequence[int]) -> tuple[float, float]:
    keeps = {site: np.asarray(n, np.int32) for site, n in schedules.by_site(model.module.sites.spots, counts).items()}
    right, far, examples = sum(np.asarray(sums(dense.params, **batch, keeps=keeps), np.float64) for batch in kept)
    return float(100 * right / examples), float(far / examples)

  return run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--init", required=True, help="a run directory or an export of a dense model")
  parser.add_argument("--budget", type=float, default=0.6)
  parser.add_argument("--reducer", default="tome")
  parser.add_argument("--number", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--counts", nargs="*", default=(), help="more of them, as 'tokens' below: '41 32 22 13 8'")
  args = parser.parse_args()
  dense = tokred.load(args.init)
  template = dict(tokens=dict(reducer=args.reducer, layers="every"))
  by_hand = dense.with_sites(schedules.at_budget(dense.config, template, args.budget))
  images = lambda split, size: list(feed(dense.config, split, train=False, batch_size=size))
  found = calibrate.greedy(by_hand, images("train[:256]", 64), args.budget)
  measure = measured(by_hand, dense, images(dense.config.data.eval_split, 500))
  module, spots = by_hand.module, by_hand.module.sites.spots
  rng, free = np.random.default_rng(args.seed), module.shape.num_tokens - spots[0].protected

  def random() -> list[int]:
    gone = np.cumsum(rng.dirichlet(np.ones(len(spots))))

    def curve(left: float) -> list[int]:
      wanted = [module.shape.num_tokens - int((1 - left) * part * free) for part in gone]
      return schedules.reached(module, spots, wanted)

    if schedules.share(module, spots, curve(0.0)) > args.budget:  # too little goes too late: drawn again
      return random()
    return schedules.largest(curve, 0.0, 1.0, module, spots, args.budget)

  def line(name: str, counts: Sequence[int]) -> float:
    accuracy, divergence = measure(counts)
    cost = schedules.share(module, spots, counts)
    print(f"{name},{' '.join(map(str, counts))},{cost:.4f},{accuracy:.2f},{divergence:.5f}", flush=True)
    return accuracy

  print("schedule,tokens,share,accuracy,divergence")
  line("by hand", [spot.keep for spot in spots])
  line("greedy", [spot.keep for spot in dense.with_sites(found.sites.to_dict()).module.sites.spots])
  for counts in args.counts:
    line("given", [int(count) for count in counts.split()])
  drawn = [line("random", random()) for _ in range(args.number)]
  low, middle, high = statistics.quantiles(drawn, n=4)
  print(f"random: best {max(drawn):.2f}, quartiles {high:.2f} {middle:.2f} {low:.2f}, worst {min(drawn):.2f}")


if __name__ == "__main__":
  main()
