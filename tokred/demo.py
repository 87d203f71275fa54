"""`make demo`: learn keep-rates on real digits, freeze, export, and compare with the dense model.

Everything lands in `runs/demo`; an interrupted demo goes on where it stopped.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tokred import bench, export, loading, viz
from tokred.evaluate import evaluate, examples
from tokred.files import write_json
from tokred.model import Model
from tokred.train.loop import train


def run(dense_config: ConfigDict, learned_config: ConfigDict, workdir: Path, rounds: int = 15) -> dict[str, Any]:
  """Both trainings, the export and the comparison.

  Args:
    dense_config: of the dense model.
    learned_config: of the same with learned rates; its `init` is set to the dense run.
    workdir: where everything lands; trainings that are there already go on where they stopped.
    rounds: of the benchmark, see `bench.interleave`.

  Returns:
    What `summary.json` holds.
  """
  begin = time.monotonic()
  print(f"1/4  dense model: {workdir / 'dense'}", flush=True)
  train(dense_config, workdir / "dense")
  print(f"2/4  learned keep-rates, from the dense model: {workdir / 'reduced'}", flush=True)
  with learned_config.unlocked():
    learned_config.init = str(workdir / "dense")
  train(learned_config, workdir / "reduced")

  print(f"3/4  export, and the same logits from a fresh process: {workdir / 'exported'}", flush=True)
  dense, trained = loading.load(workdir / "dense"), loading.load(workdir / "reduced")
  reduced = export.save(trained, workdir / "exported")
  images, labels = examples(reduced, 64)
  difference = export.verify(workdir / "exported", images, np.asarray(trained(images).logits))

  print("4/4  accuracy and speed", flush=True)
  (row,) = bench.compare(reduced, dense, (64,), rounds=rounds)
  summary = {
    "dense": _figures(dense, row.baseline_images_per_second),
    "reduced": _figures(reduced, row.images_per_second),
    "speedup": row.speedup,
    "export": {"max_abs_diff": max(difference.values())},
    "seconds": round(time.monotonic() - begin, 1),
  }
  viz.save_survivors(reduced, images[:6], workdir / "survivors.png", titles=[f"digit {d}" for d in labels[:6]])
  write_json(workdir / "summary.json", summary)
  return summary


def table(summary: dict[str, Any]) -> str:
  """The comparison as text."""
  lines = [f"{'':10}{'accuracy':>10}{'GFLOPs':>10}{'images/s':>10}  tokens after each block"]
  for name in ("dense", "reduced"):
    s = summary[name]
    counts = " ".join(map(str, s["counts"]))
    lines.append(f"{name:10}{s['accuracy']:>10.2%}{s['gflops']:>10.4f}{s['images_per_second']:>10.0f}  {counts}")
  share = summary["reduced"]["gflops"] / summary["dense"]["gflops"]
  return "\n".join(
    [
      *lines,
      "",
      f"{share:.0%} of the FLOPs, {summary['speedup']:.2f} times the images/s (batch 64, measured in turns), "
      f"exported logits within {summary['export']['max_abs_diff']:.1e} of the trained model's",
    ]
  )


def _figures(model: Model, images_per_second: float) -> dict[str, Any]:
  result = evaluate(model)
  return {
    "accuracy": result["accuracy"],
    "gflops": model.flops / 1e9,
    "images_per_second": images_per_second,
    "counts": list(model.counts),
  }


def main() -> None:
  from configs import digits  # the recipes lie in the repository, where `make demo` runs

  workdir = Path("runs/demo")
  try:
    summary = run(digits.get_config(), digits.get_config("learned"), workdir)
  except (ValueError, ArithmeticError, OSError) as error:
    sys.exit(f"demo: {error}")
  print(f"\n{table(summary)}\n")
  print(f"picture: {workdir / 'survivors.png'}; figures: {workdir / 'summary.json'}; {summary['seconds']:.0f} s")


if __name__ == "__main__":
  main()
