"""Methods x budgets x seeds from one dense checkpoint: accuracy, cost and speed in one table.

    python -m tokred.sweep --config=configs/sweep.py:dataset=digits --workdir=runs/sweep

Equal terms: every fine-tuning starts from the same weights and has the same data, steps and learning rate; every method
is given counts that cost the same share of the dense model; accuracy is that of the gathered model; speed is measured
in turns with the dense one.  What is finished is not done again, what was killed goes on where it was.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from tokred import bench, calibrate, loading, schedules
from tokred import data as tokred_data
from tokred import evaluate as tokred_evaluate
from tokred import model as tokred_model
from tokred.config import complete, default, nearest
from tokred.model import Model, freeze
from tokred.nn import vit
from tokred.rates import LEARNED
from tokred.reducers import OWN, known
from tokred.results import FIELDS, KEY, read, write
from tokred.scores import SCORES
from tokred.train.loop import train

TUNED = "+tuned"
_FIELDS = ("methods", "budgets", "seeds", "init", "dense", "finetune", "table", "calibrate", "bench")


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Runs what is missing and writes results.csv, table.md and the plots after every run.

  Args:
    config: as `configs/sweep.py` makes it.
    workdir: where everything lands.

  Returns:
    The rows of results.csv, those of earlier sweeps in the same directory included.

  Raises:
    ValueError: a field that is missing or unknown, an unknown method, one whose reducer does not exist, what `plan`
      refuses, or a checkpoint of another size, before anything is trained; at the end, what went wrong with single
      runs: the others are done then.
  """
  if missing := [name for name in _FIELDS if name not in config]:
    raise ValueError(f"config.{missing[0]} is missing; valid: a config as configs/sweep.py makes it")
  complete(config.finetune)  # that its fields exist
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
      raise ValueError(f"config.methods: {name!r} needs {missing}")
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
  search, settle = method.get("search", ""), method.get("settle", "")
  if search and (trained or not settle):  # what is settled is searched then
    model = dataclasses.replace(loading.load(init, sites=made.sites.to_dict()), config=made)
    made = _found(search, model, config, method, budget)
  if trained:
    folder = workdir / "runs" / f"{name}-{budget:g}-{seed}-{digest}"
    result = train(made, folder)
    model = freeze(_on_data(loading.load(folder), made))
  else:
    result = {"seconds": 0.0}
    model = _on_data(loading.load(init, sites=made.sites.to_dict()), made)
  if settle:  # the weights are there now, and tell how many each layer needs
    model = model.with_sites(_found(settle, model, config, method, budget).sites.to_dict())
  if settle or not trained:
    result |= tokred_evaluate.evaluate(model, mode="gather")
  row = dict(zip(KEY, (name, budget, seed), strict=True)) | {"trained": int(trained), "digest": digest}
  row |= {"accuracy": result["accuracy"], "seconds": (done or result)["seconds"]} | _cost(model, dense, result)
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


def _cost(model: Model, dense: Model, result: Mapping[str, Any]) -> dict[str, Any]:
  """Of the shapes that run; of thresholds, with which each image has counts of its own, the mean of what these cost."""
  if any(spot.rate == "threshold" for spot in model.module.sites.spots):
    counts, gflops, macs = result["counts"], result["mean_gflops"], 1e9 * result["mean_gmacs"]
  else:
    counts, gflops, macs = model.counts, model.flops / 1e9, model.macs
  return {"gflops": gflops, "share": macs / dense.macs, "counts": " ".join(f"{count:.4g}" for count in counts)}


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


def _trained(config: ConfigDict, name: str) -> bool:
  return name.endswith(TUNED) or bool(config.table[name].get("tune", False))


def _missing(method: Mapping[str, Any]) -> str:
  """What a method names and tokred does not have, or ""."""
  for site in method["sites"].values():
    for reducer in site["reducer"] if isinstance(site["reducer"], tuple) else (site["reducer"],):
      if not known(reducer):
        return f"reducer {reducer!r}, which is not registered; {OWN}"
    if "score" in site and site["score"] not in SCORES:
      return f"score {site['score']!r}, which is not registered"
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


def _found(search: str, model: Model, config: ConfigDict, method: Mapping[str, Any], budget: float) -> ConfigDict:
  """The model's config with what a search of `calibrate` has found on images."""
  m, images = model.config.model, _images(config, method)
  sizes = dict(image_size=m.image_size, channels=m.channels, num_classes=m.num_classes)
  batches = tokred_data.eval_batches(model.config.data, images["split"], batch_size=images["batch_size"], **sizes)
  return getattr(calibrate, search)(model, batches, budget)


def _images(config: ConfigDict, method: Mapping[str, Any]) -> dict[str, Any]:
  """Split and batch size of what a method's searches look at."""
  return config.calibrate.to_dict() | dict(method.get("calibrate", {}))


def _digest(config: ConfigDict, made: ConfigDict, method: Mapping[str, Any], trained: bool) -> str:
  """Short name of all that decides an accuracy, paths of data and of this sweep's own dense run left out."""
  full = made.to_dict() | {"init": config.init}
  full["data"] = {name: value for name, value in full["data"].items() if name not in ("data_dir", "num_workers")}
  full |= {"dense": config.dense.train.to_dict(), "trained": trained}
  search, settle = method.get("search", ""), method.get("settle", "")
  images = _images(config, method)
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
  from absl import flags
  from ml_collections import config_flags

  from tokred import command

  config = config_flags.DEFINE_config_file("config", None, "configs/sweep.py:arguments.", lock_config=True)
  workdir = flags.DEFINE_string("workdir", None, "Directory of the sweep; the same command goes on where it was left.")

  def sweep() -> None:
    run(config.value, workdir.value)
    print((Path(workdir.value) / "table.md").read_text())

  command.run(sweep, "tokred.sweep", required=["config", "workdir"])


if __name__ == "__main__":
  main()
