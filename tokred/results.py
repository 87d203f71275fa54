"""Rows of a sweep, as it writes and shows them: results.csv, a table in Markdown, and plots."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from tokred.files import write_whole

matplotlib.use("Agg")
from matplotlib import pyplot as plt

KEY = ("method", "budget", "seed")
FIELDS = (
  *KEY, "trained", "accuracy", "gflops", "share", "counts", "images_per_second", "dense_images_per_second", "speedup",
  "speedup_low", "speedup_high", "batch_size", "device", "steps", "seconds", "digest",
)  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
  """The rows of a results.csv, numbers as numbers; none where there is no file."""
  if not path.exists():
    return []
  words, whole = ("method", "counts", "device", "digest"), ("seed", "trained", "batch_size", "steps")
  kind = lambda name: str if name in words else int if name in whole else float
  with path.open(newline="") as file:
    return [{name: kind(name)(value) for name, value in row.items()} for row in csv.DictReader(file)]


def write(workdir: Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """results.csv, table.md and the plots; each is the old file or the new one, whatever happens."""
  text = io.StringIO()
  writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  write_whole(workdir / "results.csv", text.getvalue().encode())
  write_whole(workdir / "table.md", (table(rows) + "\n").encode())
  write_whole(workdir / "accuracy_gflops.png", plot(rows, "gflops", "GFLOPs an image"))
  if any(row["batch_size"] for row in rows):
    write_whole(workdir / "accuracy_speed.png", plot(_same_clock(rows), "images_per_second", "images/s, measured"))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Markdown, a line a method and budget; mean and standard deviation over seeds.

  GFLOPs, share, images/s and speed-up are means over seeds; tokens those of the first seed, as learned rates differ.
  """
  rows, dense = _same_clock(rows), [row["accuracy"] for row in rows if row["method"] == "dense"]
  header = ["method", "budget", "trained", "seeds", "accuracy", "against dense", "GFLOPs", "share"]
  header += ["tokens after each block", "images/s", "speed-up"]
  lines = [header, ["---"] * len(header)]
  for (name, budget), group in _groups(rows).items():
    mean, spread = _mean_std([row["accuracy"] for row in group])
    gflops, cost, speed, ratio = (
      _mean_std([row[column] for row in group])[0] for column in ("gflops", "share", "images_per_second", "speedup")
    )
    cells = [name, f"{budget:g}", "yes" if group[0]["trained"] else "no", str(len(group))]
    cells.append(f"{100 * mean:.2f}" + (f" ± {100 * spread:.2f}" if len(group) > 1 else ""))
    cells.append(f"{100 * (mean - dense[0]):+.2f}" if dense else "")
    cells += [f"{gflops:.4g}", f"{cost:.3f}", group[0]["counts"]]
    cells += ["", ""] if math.isnan(speed) else [f"{speed:.0f}", f"{ratio:.2f}"]
    lines.append(cells)
  device = sorted({f"{row['device']}, batch {row['batch_size']}" for row in rows if row["device"]})
  title = "Accuracy in percent, mean ± standard deviation over seeds; speed-up in turns with the dense model"
  title += f" ({'; '.join(device)}), images/s as speed-up x the dense model's median rate." if device else "."
  return "\n".join([title, "", *("| " + " | ".join(cells) + " |" for cells in lines)])


def _same_clock(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Rows with images/s as if the machine had never changed its speed: speed-up x the dense model's median rate.

  A sweep takes hours, and other work comes and goes meanwhile; the speed-up was measured in turns.  The median is that
  of the row's device and batch size.
  """
  rates: dict[Any, list[float]] = {}
  clock = lambda row: (row["device"], row["batch_size"])
  for row in rows:
    if not math.isnan(row["dense_images_per_second"]):
      rates.setdefault(clock(row), []).append(row["dense_images_per_second"])
  median = {key: statistics.median(values) for key, values in rates.items()}
  return [dict(row) | {"images_per_second": median.get(clock(row), math.nan) * row["speedup"]} for row in rows]


def plot(rows: Sequence[Mapping[str, Any]], x: str, label: str) -> bytes:
  """PNG of accuracy against a column: a line a method through its budgets, bars of one standard deviation."""
  lines: dict[str, list[tuple[float, float, float]]] = {}
  for (name, _), group in _groups(rows).items():
    mean, spread = _mean_std([row["accuracy"] for row in group])
    lines.setdefault(name, []).append((_mean_std([row[x] for row in group])[0], 100 * mean, 100 * spread))
  figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
  colours, markers = plt.get_cmap("tab10").colors, "osD^vP*X"
  for index, (name, points) in enumerate(lines.items()):
    at, mean, spread = zip(*sorted(points), strict=True)
    style = dict(color=colours[index % 10], marker=markers[index // 10 % len(markers)], markersize=5, linewidth=1)
    axes.errorbar(at, mean, spread, capsize=2, label=name, **style)
    if name == "dense":
      axes.axhline(mean[0], color="0.6", linewidth=0.8, linestyle="--", zorder=0)
  axes.set(xlabel=label, ylabel="accuracy, %")
  axes.grid(alpha=0.3)
  axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
  file = io.BytesIO()
  figure.savefig(file, format="png", dpi=150)
  plt.close(figure)
  return file.getvalue()


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, float], list[Mapping[str, Any]]]:
  """Rows by method and budget: methods in the order in which they came, budgets from large to small, seeds sorted."""
  order = list(dict.fromkeys(row["method"] for row in rows))
  groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
  for row in sorted(rows, key=lambda r: (order.index(r["method"]), -r["budget"], r["seed"])):
    groups.setdefault((row["method"], row["budget"]), []).append(row)
  return groups


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
  """NaN where a value is: `statistics` raises there."""
  return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
