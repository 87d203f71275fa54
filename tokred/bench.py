"""Honest numbers: a reduced model against its baseline, measured in turns, with the spread beside the median.

    python -m tokred.bench --model=exported/ [--baseline=runs/digits] --batch_sizes=1,8,64 [--json=bench.json]

Machines change their speed while one looks: two models measured one after the other differ by what happened between.
So the functions take turns, A B C, C B A, ..., every ratio is of two times from the same round, and the result is the
median of those ratios, beside the ratio that the FLOPs promise.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokred.files import write_json
from tokred.model import Model, Reader, freeze


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds per call of one function; `rounds` has one mean per round, in order."""

  median: float
  minimum: float
  maximum: float
  rounds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Row:
  """One batch size of a comparison.

  Latency is the median time of one batch; images per second follow from it. `speedup` is the median over rounds of
  baseline time / model time, `speedup_low` and `speedup_high` are its quartiles, `promised` is baseline FLOPs / model
  FLOPs. `pays`: the model was the faster one in at least three rounds of four (speedup_low > 1). `dtype` is that of
  both, or "bfloat16 against float32".
  """

  batch_size: int
  images_per_second: float
  baseline_images_per_second: float
  latency_ms: float
  baseline_latency_ms: float
  speedup: float
  speedup_low: float
  speedup_high: float
  promised: float
  pays: bool
  rounds: int
  gflops: float
  baseline_gflops: float
  dtype: str
  device: str
  jax_version: str


def interleave(
  functions: Mapping[str, Callable[[], Any]], *, rounds: int = 10, warmup: int = 2, min_seconds: float = 0.05
) -> dict[str, Timing]:
  """Times functions in turns: A B C, C B A, A B C, ...

  Args:
    functions: by name; what a call returns is waited for with `jax.block_until_ready`, which sees arrays in
      containers that JAX knows, and no others.
    rounds: turns of each function that are measured.
    warmup: calls of each function before the first round, for compilation and caches.
    min_seconds: within a round a function is called again until its turn took this long.

  Returns:
    Seconds per call, by name, in the order of `functions`.

  Raises:
    ValueError: rounds below 1.
  """
  if rounds < 1:
    raise ValueError(f"rounds={rounds}; valid: 1 or more")
  for function in functions.values():
    for _ in range(warmup):
      jax.block_until_ready(function())
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for index in range(rounds):
    for name in list(functions)[:: -1 if index % 2 else 1]:
      seconds[name].append(_turn(functions[name], min_seconds))
  return {name: Timing(statistics.median(s), min(s), max(s), tuple(s)) for name, s in seconds.items()}


def compare(
  model: Any,
  baseline: Any,
  batch_sizes: Sequence[int] = (1, 8, 64),
  *,
  rounds: int = 10,
  seed: int = 0,
  min_seconds: float = 0.05,
) -> list[Row]:
  """Measures a model against a baseline at several batch sizes, on random images.

  Args:
    model: what `tokred.load` returns: called with images (batch, height, width, channels) float32, with attributes
      `config` (image size, channels, dtype) and `flops` (per image); learned rates are frozen first.
    baseline: likewise; where its config has another image size it gets images of that size.
    batch_sizes: images per call.
    rounds: see `interleave`.
    seed: of the images.
    min_seconds: see `interleave`.

  Returns:
    One row a batch size, in the given order.

  Raises:
    ValueError: something else than models, no batch sizes, or one that is no integer or below 1.
    TypeError: a model returns something without arrays that JAX could wait for: its times would be those of the
      dispatch.
  """
  for each in (model, baseline):
    if isinstance(each, Reader):
      raise ValueError("a model is a vision-language model, which takes prompts; valid: tokred.bench_vlm.measure")
    if not callable(each):
      raise ValueError(f"{each!r} is no model that can be called; valid: what tokred.load returns")
  if np.ndim(batch_sizes) != 1 or np.asarray(batch_sizes).dtype.kind not in "iu":  # float where there is none
    raise ValueError(f"batch_sizes={batch_sizes!r}; valid: integers, such as (1, 8, 64)")
  for batch_size in batch_sizes:
    if batch_size < 1:
      raise ValueError(f"batch_sizes={tuple(batch_sizes)!r}: {batch_size} images cannot be measured; valid: 1 or more")
  # What FLOPs promise is what ships: a learned rate would be timed at full length, with masks.
  model, baseline = (freeze(each) if isinstance(each, Model) else each for each in (model, baseline))
  rows = []
  for batch_size in batch_sizes:
    calls = {"model": _call(model, batch_size, seed), "baseline": _call(baseline, batch_size, seed)}
    times = interleave(calls, rounds=rounds, min_seconds=min_seconds)
    rows.append(_row(model, baseline, batch_size, times["model"], times["baseline"]))
  return rows


def format_table(rows: Sequence[Row]) -> str:
  """The rows as a Markdown table under a line on device and versions, with a sentence for each batch size.

  Args:
    rows: of one `compare`.

  Returns:
    Several lines, without a newline at the end; empty for no rows.
  """
  if not rows:
    return ""
  first = rows[0]
  header = ["batch", "images/s", "baseline", "latency", "baseline", "speed-up", "quartiles", "promised by FLOPs"]
  table = [header] + [
    [
      str(row.batch_size),
      f"{row.images_per_second:.1f}",
      f"{row.baseline_images_per_second:.1f}",
      f"{row.latency_ms:.2f} ms",
      f"{row.baseline_latency_ms:.2f} ms",
      f"{row.speedup:.2f}",
      f"{row.speedup_low:.2f} to {row.speedup_high:.2f}",
      f"{row.promised:.2f}",
    ]
    for row in rows
  ]
  widths = [max(len(cells[i]) for cells in table) for i in range(len(header))]
  lines = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True)) + " |" for cells in table]
  lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
  title = (
    f"{first.device}, {first.dtype}, jax {first.jax_version}; {first.gflops:.3g} GFLOPs per image against "
    f"{first.baseline_gflops:.3g}; medians of {first.rounds} rounds in turns"
  )
  return "\n".join([title, "", *lines, "", *map(_sentence, rows)])


def main(argv: Sequence[str] | None = None) -> None:
  """The command line; prints the table and, with --json, writes the rows."""
  parser = argparse.ArgumentParser(prog="python -m tokred.bench", description="Reduced against dense, honestly.")
  parser.add_argument("--model", required=True, help="run directory, export or weights: what tokred.load takes")
  parser.add_argument("--baseline", help="likewise; without it the weights of --model without sites")
  parser.add_argument("--batch_sizes", type=_batch_sizes, default=(1, 8, 64), help="comma-separated")
  parser.add_argument("--rounds", type=int, default=10)
  parser.add_argument("--json", help="file for the rows, as a JSON list")
  flags = parser.parse_args(argv)
  import tokred  # here, since the package must not import its own command line

  try:
    model = tokred.load(flags.model)
    baseline = tokred.load(flags.baseline) if flags.baseline else tokred.load(flags.model, sites={})
    if isinstance(model, Reader):
      raise ValueError(f"{flags.model} is a vision-language model; python -m tokred.bench_vlm times these")
    rows = compare(model, baseline, flags.batch_sizes, rounds=flags.rounds)
    print(format_table(rows))
    if flags.json:
      write_json(Path(flags.json), [dataclasses.asdict(row) for row in rows])
  except (ValueError, OSError) as error:
    sys.exit(f"tokred.bench: {error}")


def _turn(function: Callable[[], Any], min_seconds: float) -> float:
  """Seconds per call over as many calls as `min_seconds` takes."""
  calls, begin = 0, time.perf_counter()
  while True:
    jax.block_until_ready(function())
    calls += 1
    elapsed = time.perf_counter() - begin
    if elapsed >= min_seconds:
      return elapsed / calls


def _call(model: Any, batch_size: int, seed: int) -> Callable[[], Any]:
  """The model on random images of its size that lie on the device already."""
  config = model.config.model
  shape = (batch_size, *config.image_size, config.channels)
  images = jax.device_put(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
  output = model(images)
  if not any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(output)):
    raise TypeError(
      f"the model returns {type(output).__name__}, in which JAX sees no array to wait for; return a pytree"
    )
  return lambda: model(images)


def _row(model: Any, baseline: Any, batch_size: int, timing: Timing, baseline_timing: Timing) -> Row:
  ratios = [b / m for m, b in zip(timing.rounds, baseline_timing.rounds, strict=True)]
  low, speedup, high = (float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
  device = jax.devices()[0]
  return Row(
    batch_size=batch_size,
    images_per_second=batch_size / timing.median,
    baseline_images_per_second=batch_size / baseline_timing.median,
    latency_ms=1e3 * timing.median,
    baseline_latency_ms=1e3 * baseline_timing.median,
    speedup=speedup,
    speedup_low=low,
    speedup_high=high,
    promised=float(baseline.flops) / float(model.flops),
    pays=low > 1.0,
    rounds=len(ratios),
    gflops=float(model.flops) / 1e9,
    baseline_gflops=float(baseline.flops) / 1e9,
    dtype=" against ".join(dict.fromkeys(str(each.config.model.dtype) for each in (model, baseline))),
    device=f"cpu, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind,
    jax_version=jax.__version__,
  )


def _sentence(row: Row) -> str:
  start = f"Batch {row.batch_size}: "
  if row.speedup_high < 1.0:
    return f"{start}reduction does not pay, the reduced model is slower ({row.speedup:.2f} times the baseline's speed)."
  if not row.pays:
    return f"{start}reduction does not pay, the difference is within the spread ({row.speedup:.2f} times)."
  share = f"{row.speedup / row.promised:.0%} of what its FLOPs promise"
  return f"{start}reduction pays, {row.speedup:.2f} times the baseline's speed, {share}."


def _batch_sizes(text: str) -> tuple[int, ...]:
  try:
    return tuple(int(size) for size in text.split(","))
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r}; valid: whole numbers with commas between, as in 1,8,64") from None


if __name__ == "__main__":
  main()
