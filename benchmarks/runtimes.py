"""Images per second of a dense and a reduced model in tokred, StableHLO and ONNX Runtime.

    python benchmarks/runtimes.py [--model=runs/digits] [--variant=S/16] [--batch_size=16] [--rounds=9]

Without --model: random weights, ViT of the given variant at 224 and the counts of DiffRate at 2.3 G.  All take turns in
one process (tokred.bench); a speed-up is the median over rounds of two times of the same round, against the dense model
in the same runtime.  ONNX Runtime and JAX use the same number of cores: all.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np

import tokred
from tokred import bench
from tokred.reducers import diffrate

FORMATS = ("stablehlo", "onnx")


def models(args: argparse.Namespace) -> dict[str, tokred.Model]:
  if args.model:
    return {"dense": tokred.load(args.model, sites={}), "reduced": tokred.freeze(tokred.load(args.model))}
  sites = dict(rates=diffrate.site(*diffrate.SCHEDULES["deit_s_2.3g"]))
  build = lambda sites: tokred.build(dict(model=dict(variant=args.variant), sites=sites))
  params = build({}).init().params
  params["head"]["kernel"] = 0.02 * jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)  # else zero
  built = {"dense": build({}), "reduced": build(sites)}
  return {name: dataclasses.replace(model, params=params) for name, model in built.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", help="run directory, export or weights with sites; what tokred.load takes")
  parser.add_argument("--variant", default="S/16", choices=("Ti/16", "S/16", "B/16"))  # the schedule is of these
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--rounds", type=int, default=9)
  args = parser.parse_args()
  made = models(args)
  config = made["dense"].config.model
  shape = (args.batch_size, *config.image_size, config.channels)
  images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  on_device = jax.device_put(images)
  calls, logits = {}, {}
  with tempfile.TemporaryDirectory() as folder:
    for name, model in made.items():
      tokred.export.save(model, Path(folder) / name, FORMATS)
      runs = {"tokred": model} | {form: tokred.export.load(Path(folder) / name, form) for form in FORMATS}
      for runtime, run in runs.items():
        given = images if runtime == "onnx" else on_device
        calls[runtime, name] = lambda run=run, given=given: run(given).logits
        logits[runtime, name] = np.asarray(run(given).logits)
    times = bench.interleave(calls, rounds=args.rounds, min_seconds=1.0)
  device = f"{jax.devices()[0].device_kind}, batch {args.batch_size}, float32, {args.rounds} rounds"
  counts = " ".join(map(str, made["reduced"].counts))
  print(f"{device}; {made['dense'].macs / made['reduced'].macs:.2f} promised by multiply-adds; tokens {counts}")
  print("| runtime | dense images/s | reduced images/s | speed-up | largest difference from tokred |")
  print("|---|---|---|---|---|")
  for runtime in ("tokred", *FORMATS):
    pair = [times[runtime, name] for name in ("dense", "reduced")]
    rates = " | ".join(f"{args.batch_size / timing.median:.1f}" for timing in pair)
    ratio = statistics.median(d / r for d, r in zip(pair[0].rounds, pair[1].rounds, strict=True))
    off = max(np.abs(logits[runtime, name] - logits["tokred", name]).max() for name in made)
    print(f"| {runtime} | {rates} | {ratio:.2f} | {off:.1e} |", flush=True)


if __name__ == "__main__":
  main()
