"""Methods x budgets x seeds from one dense checkpoint: accuracy, cost and speed in one table.

    python -m tokred.sweep --config=configs/sweep.py:dataset=digits --workdir=runs/sweep

Equal terms: every fine-tuning starts from the same weights and has the same data, steps and learning rate; every method
is given counts that cost the same share of the dense model; accuracy is that of the gathered model; speed is measured
in turns with the dense one.  What is finished is not done again, what was killed goes on where it was.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from ml_collections import ConfigDict

from tokred import bench, calibrate, loading, schedules
from tokred import data as tokred_data
from tokred import evaluate as tokred_evaluate
from tokred import model as tokred_model
from tokred.config import complete, default, nearest
from tokred.files import write_whole
from tokred.model import Model, freeze
from tokred.nn import vit
from tokred.rates import LEARNED
from tokred.reducers import REGISTRY
from tokred.scores import SCORES
from tokred.train.loop import train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TUNED = "+tuned"
KEY = ("method", "budget", "seed")
FIELDS = (
  *KEY, "trained", "accuracy", "gflops", "share", "counts", "images_per_second", "dense_images_per_second", "speedup",
  "speedup_low", "speedup_high", "batch_size", "device", "steps", "seconds", "digest",
)  # fmt: skip


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Runs what is missing and writes results.csv, table.md and the plots after every run.

  Args:
    config: as `configs/sweep.py` makes it.
    workdir: where everything lands.

  Returns:
    The rows of results.csv, those of earlier sweeps in the same directory included.

  Raises:
    ValueError: an unknown method, one whose reducer does not exist, what `plan` refuses, or a checkpoint of another
      size, before anything is trained; at the end, what went wrong with single runs: the others are done then.
  """
  workdir, runs = Path(workdir), plan(config, methods(config))
  workdir.mkdir(parents=True, exist_ok=True)
  cached = _share_compilation(workdir / "cache")
  try:
    init = config.init or str(workdir / "dense")
    if not config.init:
      train(config.dense, workdir / "dense")
    dense = _on_data(loading.load(init, sites={}), config.dense)
    _check_sizes(dense, config)
    failed = []
    for name, budget, seed in runs:
      try:
        _one(config, workdir, init, dense, name, budget, seed)
      except Exception as error:  # hours of other runs shall not be lost to one method's mistake
        failed.append(f"{name} at {budget}, seed {seed}: {type(error).__name__}: {' '.join(str(error).split())}")
        print(f"sweep: {failed[-1]}", file=sys.stderr, flush=True)
      _forget()
  finally:
    cached()
  if failed:
    raise ValueError("; ".join(failed))
  return read(workdir / "results.csv")


def methods(config: ConfigDict) -> list[str]:
  """The methods that a sweep runs: those of `config.methods`, or all of the table whose reducers exist.

  Raises:
    ValueError: a method is not in the table, or its reducer or score does not exist.
  """
  table = config.table.to_dict()
  for name in config.methods:
    base = name.removesuffix(TUNED)
    if base not in table:
      raise ValueError(f"config.methods: {name!r} is not a method of config.table; {nearest(base, table)}")
    if missing := _missing(table[base]):
      raise ValueError(f"config.methods: {name!r} needs {missing}, which is not registered")
  there = sorted((name for name, method in table.items() if not _missing(method)), key=lambda name: name != "dense")
  return list(config.methods) or there


def plan(config: ConfigDict, names: Iterable[str]) -> list[tuple[str, float, int]]:
  """(method, budget, seed) of every run: the dense model's budget is 1, and what is not trained has one seed.

  Raises:
    ValueError: budgets that are no shares, no seed, or a speed that cannot be taken.
  """
  if not config.budgets or not all(0.0 < budget < 1.0 for budget in config.budgets):
    raise ValueError(f"config.budgets={config.budgets}; valid: shares of the dense multiply-adds, above 0 and below 1")
  if not config.seeds:
    raise ValueError(f"config.seeds={config.seeds}; valid: one or more")
  for field, least in (("batch_size", 1), ("rounds", 0)):
    if config.bench[field] < least:
      raise ValueError(f"config.bench.{field}={config.bench[field]}; valid: {least} or more")
  runs = []
  for name in names:
    sites, trained = config.table[name.removesuffix(TUNED)].sites, _trained(config, name)
    budgets = config.budgets if len(sites) else (1.0,)
    runs += itertools.product((name,), map(float, budgets), config.seeds if trained else config.seeds[:1])
  return runs


def recipe(config: ConfigDict, name: str, budget: float, seed: int, init: str = "") -> ConfigDict:
  """The training config of one run.

  Args:
    config: as `configs/sweep.py` makes it.
    name: of a method in `config.table`, with "+tuned" where it is to be fine-tuned although it needs no training.
    budget: share of the dense multiply-adds.
    seed: of the fine-tuning.
    init: the dense checkpoint.

  Raises:
    ValueError: the method is unknown, or cannot reach the budget, or this is no share.
  """
  base = name.removesuffix(TUNED)
  if base not in config.table:
    raise ValueError(f"{name!r} is not a method; {nearest(base, config.table)}")
  method, groups = config.table[base].to_dict(), default().to_dict().keys() - {"sites"}
  if method["sites"] and not 0.0 < budget < 1.0:
    raise ValueError(f"budget={budget}; valid: a share of the dense multiply-adds, above 0 and below 1")
  full = config.dense.to_dict()
  for changes in (config.finetune.to_dict(), method):
    for group, fields in changes.items():
      if group in groups:
        full[group] = full[group] | fields if isinstance(fields, dict) else fields
  full |= {"seed": seed, "init": init}
  for site in method["sites"].values():
    if site.get("rate") == "scheduled":
      site["schedule"] = tuple(round(part * full["train"]["steps"]) for part in site["schedule"])
  full["sites"] = schedules.at_budget(full, method["sites"], budget) if method["sites"] else {}
  rates = {site.get("rate") for site in full["sites"].values()}
  if rates & set(LEARNED):
    full["train"]["mode"], full["loss"]["target"] = "mask", budget
  if "learned" in rates:
    full["rates"]["freeze_step"] = max(1, int(method["freeze"] * full["train"]["steps"]))
  return complete(full)


def _one(
  config: ConfigDict, workdir: Path, init: str, dense: Model, name: str, budget: float, seed: int
) -> dict[str, Any]:
  """One run, unless results.csv has it already; of one that has no speed yet, only this is taken."""
  method, trained = config.table[name.removesuffix(TUNED)], _trained(config, name)
  made = recipe(config, name, budget, seed, init)
  digest = _digest(config, made, method, trained)
  found = {tuple(row[k] for k in KEY): row for row in read(workdir / "results.csv")}.get((name, budget, seed))
  done = found if found and found["digest"] == digest else None
  if done and (not config.bench.rounds or done["batch_size"] == config.bench.batch_size):
    return done
  print(f"sweep: {name} at {budget}, seed {seed}", flush=True)
  if search := method.get("search", ""):
    model = dataclasses.replace(loading.load(init, sites=made.sites.to_dict()), config=made)
    made = getattr(calibrate, search)(model, _calibration(config, made), budget)
  if trained:
    folder = workdir / "runs" / f"{name}-{budget:g}-{seed}-{digest}"
    result = train(made, folder)
    model = freeze(_on_data(loading.load(folder), made))
  else:
    model = _on_data(loading.load(init, sites=made.sites.to_dict()), made)
    result = tokred_evaluate.evaluate(model, mode="gather") | {"seconds": 0.0}
  if settle := method.get("settle", ""):  # the weights are there now, and tell how many each layer needs
    model = model.with_sites(getattr(calibrate, settle)(model, _calibration(config, made), budget).sites.to_dict())
    result |= tokred_evaluate.evaluate(model, mode="gather")
  row = dict(zip(KEY, (name, budget, seed), strict=True)) | {"trained": int(trained), "digest": digest}
  row |= {"accuracy": result["accuracy"], "gflops": model.flops / 1e9, "share": model.macs / dense.macs}
  row |= {"counts": " ".join(map(str, model.counts)), "seconds": (done or result)["seconds"]}
  row |= {"steps": made.train.steps if trained else 0} | _speed(config, model, dense)

  def goes_with(other: Mapping[str, Any]) -> bool:
    """A mean over seeds is one of equal settings; runs of others stay in their folders alone."""
    if (other["method"], other["budget"]) != (name, budget):
      return True
    if other["seed"] == seed or not trained:
      return False
    return other["digest"] == _digest(config, recipe(config, name, budget, other["seed"], init), method, trained)

  write(workdir, [*filter(goes_with, read(workdir / "results.csv")), row])
  return row


def _speed(config: ConfigDict, model: Model, dense: Model) -> dict[str, Any]:
  if not config.bench.rounds:
    return dict.fromkeys(FIELDS[8:13], float("nan")) | {"batch_size": 0, "device": ""}
  (row,) = bench.compare(model, dense, (config.bench.batch_size,), rounds=config.bench.rounds)
  return {
    "images_per_second": row.images_per_second,
    "dense_images_per_second": row.baseline_images_per_second,
    "speedup": row.speedup,
    "speedup_low": row.speedup_low,
    "speedup_high": row.speedup_high,
    "batch_size": row.batch_size,
    "device": row.device,
  }


def read(path: Path) -> list[dict[str, Any]]:
  """The rows of a results.csv, numbers as numbers; none where there is no file."""
  if not path.exists():
    return []
  words, whole = ("method", "counts", "device", "digest"), ("seed", "trained", "batch_size", "steps")
  kind = lambda name: str if name in words else int if name in whole else float  # noqa: E731
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
  clock = lambda row: (row["device"], row["batch_size"])  # noqa: E731
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


def _trained(config: ConfigDict, name: str) -> bool:
  return name.endswith(TUNED) or bool(config.table[name].get("tune", False))


def _missing(method: Mapping[str, Any]) -> str:
  """What a method names and tokred does not have, or ""."""
  for site in method["sites"].values():
    for reducer in site["reducer"] if isinstance(site["reducer"], tuple) else (site["reducer"],):
      if reducer not in REGISTRY:
        return f"reducer {reducer!r}"
    if "score" in site and site["score"] not in SCORES:
      return f"score {site['score']!r}"
  return ""


def _check_sizes(dense: Model, config: ConfigDict) -> None:
  """Counts are those of `config.dense.model`, and budgets met by it: of another checkpoint they are other shares."""
  found, wanted = (dataclasses.asdict(shape) for shape in (dense.module.shape, vit.shape(config.dense.model)))
  if other := [f"{name}={found[name]} and not {wanted[name]}" for name in wanted if found[name] != wanted[name]]:
    raise ValueError(
      f"config.init={config.init!r} is of another size than config.dense.model: {', '.join(other)}; valid: the same"
    )


def _on_data(model: Model, config: ConfigDict) -> Model:
  """The model with the data of this sweep: the checkpoint may have been trained where they lay elsewhere."""
  return dataclasses.replace(model, config=complete(model.config.to_dict() | {"data": config.data.to_dict()}))


def _calibration(config: ConfigDict, made: ConfigDict) -> Iterable[dict[str, Any]]:
  m, c = made.model, config.calibrate
  common = dict(image_size=m.image_size, channels=m.channels, num_classes=m.num_classes)
  return tokred_data.eval_batches(made.data, c.split, batch_size=c.batch_size, **common)


def _digest(config: ConfigDict, made: ConfigDict, method: Mapping[str, Any], trained: bool) -> str:
  """Short name of all that decides an accuracy, paths of data and of this sweep's own dense run left out."""
  full = made.to_dict() | {"init": config.init}
  full["data"] = {name: value for name, value in full["data"].items() if name not in ("data_dir", "num_workers")}
  full |= {"dense": config.dense.train.to_dict(), "trained": trained}
  search, settle, images = method.get("search", ""), method.get("settle", ""), config.calibrate.to_dict()
  full |= {"search": (search, images) if search else ""}
  full |= {"settle": (settle, images)} if settle else {}  # others keep the names that they had before there was such
  return hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()[:8]


def _share_compilation(folder: Path) -> Any:
  """JAX's cache on disk, for seeds run the same programs; returns what switches it off again."""
  if jax.config.jax_compilation_cache_dir:
    return lambda: None
  from jax.experimental.compilation_cache import compilation_cache

  def use(path: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", path)
    compilation_cache.reset_cache()

  use(str(folder))
  return lambda: use(None)


def _forget() -> None:
  """Drops compiled programs, which hold modules and constants of runs that are over."""
  tokred_model.forward.cache_clear()
  tokred_evaluate.eval_step.cache_clear()
  jax.clear_caches()


def main() -> None:
  """The command line."""
  from absl import app, flags, logging
  from ml_collections import config_flags

  config = config_flags.DEFINE_config_file("config", None, "configs/sweep.py:arguments.", lock_config=True)
  workdir = flags.DEFINE_string("workdir", None, "Directory of the sweep; the same command goes on where it was left.")

  def command(argv: list[str]) -> None:
    if len(argv) > 1:
      sys.exit(f"tokred.sweep: unexpected argument {argv[1]!r}; flags begin with --")
    logging.set_verbosity(logging.WARNING)
    try:
      run(config.value, workdir.value)
    except (ValueError, ArithmeticError, OSError) as error:
      sys.exit(f"tokred.sweep: {' '.join(str(error).split())}")
    print((Path(workdir.value) / "table.md").read_text())

  flags.mark_flags_as_required(["config", "workdir"])
  app.run(command)


if __name__ == "__main__":
  main()
