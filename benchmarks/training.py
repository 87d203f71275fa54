"""What a training step costs: with rates that learn, and frozen at half the FLOPs, against the dense model's step.

    python benchmarks/training.py [--variant=Ti/16] [--image_size=224] [--batch_size=8] [--rounds=7]

The three steps (forward, backward, AdamW) take turns in one process; a ratio is the median over rounds.  DiffRate's
own recipe trains nothing but the rates: "rates alone" freezes the backbone.
"""

import argparse
import statistics
from typing import Any

import jax
import numpy as np

import tokred
from tokred import bench, schedules, sharding
from tokred.config import complete
from tokred.model import init
from tokred.train.phase import Phase

PAIR = dict(reducer=("topk", "diffrate_merge"), layers="every")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--variant", default="Ti/16")
  parser.add_argument("--image_size", type=int, default=224)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=7)
  args = parser.parse_args()
  size = (args.image_size, args.image_size)
  base = dict(
    model=dict(variant=args.variant, image_size=size), train=dict(batch_size=args.batch_size, mode="gather", steps=100)
  )
  rates = dict(PAIR, layers=tuple(range(1, tokred.build(base).module.shape.depth)), rate="learned")
  learned = dict(sites=dict(rates=rates), loss=dict(budget=5.0), train=base["train"] | dict(mode="mask"))
  alone = learned | dict(optim=dict(freeze=(r"^(?!.*/rate/).*",)))
  half = dict(sites=schedules.at_budget(base, dict(rates=PAIR), 0.5))
  configs = {"dense": base, "rates learn": base | learned, "rates alone": base | alone, "frozen, half": base | half}
  calls = {name: _step(complete(config), args.batch_size) for name, config in configs.items()}
  times = bench.interleave(calls, rounds=args.rounds)
  print(f"{jax.devices()[0].device_kind}, {args.variant} at {args.image_size}, batch {args.batch_size}")
  for name, timing in times.items():
    ratio = statistics.median(t / d for d, t in zip(times["dense"].rounds, timing.rounds, strict=True))
    print(f"{name:14s} {1e3 * timing.median:8.1f} ms   {ratio:.2f} of the dense step", flush=True)


def _step(config: Any, batch_size: int) -> Any:
  """A call that makes one step and keeps the state."""
  mesh = sharding.make_mesh(config.mesh)
  phase = Phase(config, mesh, total_steps=100)
  state = jax.jit(lambda: phase.new_state(init(phase.module, 0)))()
  rng, shape = np.random.default_rng(0), phase.module.shape
  batch = dict(
    image=rng.normal(size=(batch_size, *config.model.image_size, 3)).astype(np.float32),
    label=rng.integers(0, shape.num_classes, batch_size),
  )
  batch = jax.device_put(batch)

  def run() -> Any:
    nonlocal state
    state, metrics = phase.step(state, batch, phase.keeps(0), None)
    return metrics

  return run


if __name__ == "__main__":
  main()
