"""Speed of images that keep different numbers of tokens: apart, in rows that a batch shares, and all alike.

    python benchmarks/shared_rows.py [--batch_size=16] [--rounds=15]

ViT-S/16 at 224, untrained, on made-up images of which more or less is smooth, so that ToMe by one threshold leaves
different numbers of tokens.  The threshold is moved until the mean image costs what ToMe with r=13 does.
"""

import argparse
import statistics
from typing import Any

import jax
import numpy as np

import tokred
from tokred import bench, calibrate

EVERY = tuple(range(12))
THRESHOLD = dict(reducer="dymu_merge", layers=EVERY, rate="threshold", threshold=-0.9, keep=1.0)
MODEL = dict(variant="S/16", image_size=(224, 224))


def made_up(number: int) -> np.ndarray:
  """Noise, strong in 60 to 90 % of the rows and weak in the others: (number, 224, 224, 3) float32."""
  rng = np.random.default_rng(0)
  rough = np.arange(224)[None, :, None, None] < np.linspace(0.6, 0.9, number)[:, None, None, None] * 224
  return (np.where(rough, 1.0, 0.05) * rng.normal(size=(number, 224, 224, 3))).astype(np.float32)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--rounds", type=int, default=15)
  args = parser.parse_args()
  images = made_up(args.batch_size)
  batches = [dict(image=images, mask=np.ones(len(images), bool))]
  dense = tokred.build(dict(model=MODEL)).init()
  alike = dense.with_sites(dict(merge=dict(reducer="tome", layers=EVERY, r=13)))
  share = alike.macs / dense.macs
  apart = dense.with_sites(dict(merge=THRESHOLD))
  rows = apart.with_sites(calibrate.in_rows(apart, batches, share).sites.to_dict())
  fields: dict[str, Any] = rows.config.sites.merge.to_dict()
  apart = apart.with_sites(dict(merge=THRESHOLD | dict(threshold=fields["threshold"])))
  alive = np.stack([np.asarray(n) for n in apart.inspect(images).aux["reduce/merge/alive"].values()])
  print("tokens behind each block, mean:", *alive.mean(1).round().astype(int), "  least:", *alive.min(1))
  print("most:", *alive.max(1), "  ToMe r=13:", *alike.counts)
  models = {"dense": dense, "ToMe r=13": alike, "thresholds, apart": apart, "thresholds, shared rows": rows}
  on_device = jax.device_put(images)
  calls = {name: lambda model=model: model(on_device).logits for name, model in models.items()}
  times = bench.interleave(calls, rounds=args.rounds, min_seconds=0.25)
  print("| model | ms | times as fast as dense |\n|---|---|---|")
  for name, timing in times.items():
    pairs = zip(times["dense"].rounds, timing.rounds, strict=True)
    print(f"| {name} | {1e3 * timing.median:.1f} | {statistics.median(d / t for d, t in pairs):.2f} |", flush=True)
  far = np.abs(np.asarray(calls["thresholds, apart"]()) - np.asarray(calls["thresholds, shared rows"]())).max()
  print(f"multiply-adds of the mean image promise {1 / share:.2f}; logits apart and in shared rows differ by {far:.1g}")


if __name__ == "__main__":
  main()
