"""tokred.sweep: two methods at one budget on a model of seconds, going on, and what it writes."""

import csv
import json
import math
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from PIL import Image

import tokred
from tokred import results, sweep
from tokred.config import default
from tokred.rates import LEARNED

sys.path.insert(0, str(Path(__file__).parents[1]))
from configs import sweep as recipe_file


def config(**overrides):
  c = recipe_file.get_config("dataset=digits,runlocal")
  c.dense.model.update(dict(variant="mu/1", width=16, depth=3, num_heads=2, mlp_dim=32, image_size=(4, 4)))
  c.dense.data.update(dict(train_split="train[:48]", eval_split="test[:32]", pad_crop=0))
  c.dense.eval.batch_size = 32
  c.calibrate.update(dict(split="train[:16]", batch_size=16))
  c.bench.update(dict(batch_size=2, rounds=1))
  c.update(dict(budgets=(0.9,), seeds=(0,)) | overrides)
  return c.lock()


@pytest.fixture(autouse=True, scope="module")
def no_cache(one_device):
  """As users begin: a sweep has a cache of its own where none is set."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()
  yield
  jax.config.update("jax_compilation_cache_dir", before)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("sweep")
  return workdir, sweep.run(config(methods=("dense", "tome", "evit")), workdir)


def test_a_row_a_run(swept):
  workdir, rows = swept
  assert [(row["method"], row["budget"], row["seed"]) for row in rows] == [
    ("dense", 1.0, 0), ("tome", 0.9, 0), ("evit", 0.9, 0),
  ]  # fmt: skip
  dense, tome, evit = rows
  assert dense["share"] == 1.0 and dense["counts"] == "17 17 17"
  for row in (tome, evit):
    assert 0.85 < row["share"] <= 0.9 and row["gflops"] < dense["gflops"] and row["speedup"] > 0
    assert row["counts"].startswith("17 ") and 0 <= row["accuracy"] <= 1 and row["images_per_second"] > 0
  assert (tome["trained"], tome["steps"], evit["trained"], evit["steps"]) == (0, 0, 1, 2)
  assert len(list((workdir / "runs").iterdir())) == 1  # ToMe was only evaluated
  with (workdir / "results.csv").open() as file:
    assert [row["method"] for row in csv.DictReader(file)] == ["dense", "tome", "evit"]
  for name in ("accuracy_gflops.png", "accuracy_speed.png"):
    with Image.open(workdir / name) as picture:
      assert picture.format == "PNG"
  assert not list(workdir.glob(".*"))
  assert any((workdir / "cache").iterdir()) and not jax.config.jax_compilation_cache_dir


def test_finished_runs_are_skipped_and_others_added(swept, monkeypatch):
  workdir, rows = swept
  trained = []
  monkeypatch.setattr(sweep, "train", lambda c, w: trained.append(Path(w).name))
  again = sweep.run(config(methods=("tome", "evit")), workdir)
  assert trained == ["dense"] and again == rows  # which is a run like any other, and finished
  (folder,) = (workdir / "runs").iterdir()
  assert json.loads((folder / "summary.json").read_text())["accuracy"] == rows[2]["accuracy"]
  added = sweep.run(config(methods=("tome",), budgets=(0.8,)), workdir)
  assert added[:3] == rows and added[3]["budget"] == 0.8


def test_speed_is_taken_later_without_training_again(swept, tmp_path):
  c = config(methods=("tome", "evit"), init=str(swept[0] / "dense"))
  speeds = ("images_per_second", "dense_images_per_second", "speedup", "speedup_low", "speedup_high", "batch_size")
  with c.unlocked():
    c.bench.rounds = 0
  untimed = sweep.run(c, tmp_path)
  assert all(math.isnan(row["speedup"]) and not row["batch_size"] for row in untimed)
  (folder,) = (tmp_path / "runs").iterdir()
  log = (folder / "metrics.jsonl").read_bytes()
  with c.unlocked():
    c.bench.rounds = 1
  timed = sweep.run(c, tmp_path)
  rest = lambda rows: [{k: v for k, v in row.items() if k not in (*speeds, "device")} for row in rows]
  assert rest(timed) == rest(untimed) and all(row["speedup"] > 0 and row["batch_size"] == 2 for row in timed)
  assert [folder] == list((tmp_path / "runs").iterdir()) and (folder / "metrics.jsonl").read_bytes() == log
  with c.unlocked():
    c.bench.rounds = 0
  assert sweep.run(c, tmp_path) == timed  # and is not lost again


def test_a_mean_over_seeds_is_of_equal_settings(swept, tmp_path, monkeypatch):
  """Seed 2 goes with seed 1 and not with seed 0, which had another learning rate; what is not trained has one seed."""
  c, dense = config(methods=("tome", "evit"), init=str(swept[0] / "dense")), tokred.load(swept[0] / "dense")
  monkeypatch.setattr(sweep, "train", lambda *_: {"accuracy": 0.5, "seconds": 0.0})
  monkeypatch.setattr(sweep.loading, "load", lambda path, sites=None: dense.with_sites(sites or {}))
  monkeypatch.setattr(sweep.tokred_evaluate, "evaluate", lambda *_, **__: {"accuracy": 0.5, "seconds": 0.0})
  found = []
  for seed, lr in ((0, 1e-3), (1, 1e-4), (2, 1e-4)):
    with c.unlocked():
      c.seeds, c.finetune.optim.lr, c.bench.rounds = (seed,), lr, 0
    found.append([(row["method"], row["seed"]) for row in sweep.run(c, tmp_path)])
  assert found == [[("tome", 0), ("evit", 0)], [("tome", 1), ("evit", 1)], [("evit", 1), ("tome", 2), ("evit", 2)]]


def test_a_checkpoint_of_another_size_is_refused(swept, tmp_path):
  c = config(methods=("tome",), init=str(swept[0] / "dense"))
  with c.unlocked():
    c.dense.model.update(dict(depth=2, mlp_dim=64))
  with pytest.raises(ValueError, match=r"config\.init='.*dense' is of another size .* depth=3 and not 2, mlp_dim"):
    sweep.run(c, tmp_path)
  assert not (tmp_path / "results.csv").exists()


def test_the_table():
  common = dict(gflops=0.5, share=0.6, counts="65 30", speedup=1.5, device="cpu, 2 cores")
  common |= dict(images_per_second=700.0, dense_images_per_second=600.0)  # 1.5 x 600 is what the table says
  row = lambda method, seed, accuracy, **more: (
    common | dict(method=method, budget=0.6, seed=seed, accuracy=accuracy, trained=1, batch_size=8) | more
  )
  rows = [row("evit", 1, 0.97), row("dense", 0, 0.98, trained=0, budget=1.0), row("evit", 0, 0.95)]
  title, _, head, _, evit, dense = results.table(rows).splitlines()
  assert "cpu, 2 cores, batch 8" in title and head.startswith("| method | budget | trained | seeds | accuracy |")
  # mean of 95 and 97 is 96; the sample deviation is sqrt(((95-96)^2 + (97-96)^2) / 1) = 1.41
  assert evit == "| evit | 0.6 | yes | 2 | 96.00 ± 1.41 | -2.00 | 0.5 | 0.600 | 65 30 | 900 | 1.50 |"
  assert dense.startswith("| dense | 1 | no | 1 | 98.00 | +0.00 |")
  other = row("tome", 0, 0.9, dense_images_per_second=100.0, batch_size=1)  # another clock: 1.5 x 100
  lines = results.table([*rows, other]).splitlines()
  assert (
    lines[-1].endswith("| 65 30 | 150 | 1.50 |") and lines[-3] == evit and "batch 1; cpu, 2 cores, batch 8" in lines[0]
  )
  unmeasured = dict.fromkeys(("images_per_second", "dense_images_per_second", "speedup"), float("nan"))
  untimed = [row | unmeasured | dict(device="") for row in rows]  # --config.bench.rounds=0
  assert "| evit | 0.6 | yes | 2 | 96.00 ± 1.41 | -2.00 | 0.5 | 0.600 | 65 30 |  |  |" in results.table(untimed)
  assert results.plot(untimed, "speedup", "speed-up").startswith(b"\x89PNG")


def test_counts_are_settled_once_the_weights_are_there(swept, tmp_path, monkeypatch):
  """Dispatchers that are drawn anew want different counts in each block, on the same budget."""
  c = config(methods=("drawn",), budgets=(0.85,), init=str(swept[0] / "dense"))
  plain = dict(sites=c.table.dyt.sites.to_dict())
  method = plain | dict(settle=c.table.dyt.settle)
  with c.unlocked():
    c.bench.rounds = 0
    c.table["drawn"] = ConfigDict(method)
  seen, evaluate = [], sweep.tokred_evaluate.evaluate
  record = lambda model, **options: [seen.append(model), evaluate(model, **options)][1]
  monkeypatch.setattr(sweep.tokred_evaluate, "evaluate", record)
  (row,) = sweep.run(c, tmp_path)
  made = sweep.recipe(c, "drawn", 0.85, 0, c.init)
  (model,) = seen
  before, after = made.sites.tokens.keep, model.config.sites.tokens.keep
  assert max(before) - min(before) <= 1 and max(after) - min(after) > 1
  assert 0.83 < row["share"] <= 0.85 and row["share"] == model.macs / model.with_sites({}).macs
  digests = [sweep._digest(c, made, m, False) for m in (method, plain)]
  with c.unlocked():
    c.calibrate.split = "train[:8]"
  digests += [sweep._digest(c, made, m, False) for m in (method, plain)]
  assert digests[0] == row["digest"] and len(set(digests)) == 3 and digests[1] == digests[3]


def test_learned_thresholds_become_counts(swept, tmp_path):
  """What images kept in the mean, each another number, is what all keep in the end, at the budget."""
  c = config(methods=("ltmp",), budgets=(0.8,), init=str(swept[0] / "dense"))
  with c.unlocked():
    c.bench.rounds = 0
  made = sweep.recipe(c, "ltmp", 0.8, 0, c.init)
  assert (made.loss.target, made.train.mode, made.sites.tokens.rate) == (0.8, "mask", "learned_threshold")
  (row,) = sweep.run(c, tmp_path)
  assert row["trained"] and 0.75 < row["share"] <= 0.8
  *_, before, last = map(int, row["counts"].split())  # numbers, not means
  assert last <= before < 17


@pytest.mark.parametrize("method", ["tome_threshold", "tome_threshold_learned"])
def test_images_have_counts_of_their_own(method, swept, tmp_path, monkeypatch):
  """What they cost in the mean is the budget; training begins where untrained thresholds would meet it."""
  c = config(methods=(method,), budgets=(0.8,), init=str(swept[0] / "dense"))
  with c.unlocked():
    c.bench.rounds = 0
  began, train = [], sweep.train
  shipped, evaluate = [], sweep.tokred_evaluate.evaluate
  record = lambda model, **options: [shipped.append(model), evaluate(model, **options)][1]
  monkeypatch.setattr(sweep.tokred_evaluate, "evaluate", record)
  monkeypatch.setattr(sweep, "train", lambda made, folder: [began.append(made), train(made, folder)][1])
  (row,) = sweep.run(c, tmp_path)
  assert row["share"] == pytest.approx(0.8, abs=0.02) and row["trained"] == len(began)
  counts = [float(count) for count in row["counts"].split()]
  assert counts[0] == 17.0 and counts == sorted(counts, reverse=True) and any(count % 1 for count in counts)
  rows = shipped[-1].config.sites.tokens  # of the training images
  assert rows.mean == pytest.approx([1.05 * count for count in counts[1:]], rel=0.15) and max(rows.keep) <= 17
  for made in began:
    first = set(made.sites.tokens.threshold)
    assert made.sites.tokens.rate == "learned_threshold" and len(first) == 1 and first != {-0.9}


def test_rates_that_learn_to_the_end_cost_their_budget(swept, tmp_path):
  c = config(methods=("diffrate_alone",), budgets=(0.8,), init=str(swept[0] / "dense"))
  with c.unlocked():
    c.bench.rounds = 0
  made = sweep.recipe(c, "diffrate_alone", 0.8, 0, c.init)
  assert made.rates.freeze_step == made.train.steps
  (row,) = sweep.run(c, tmp_path)
  assert 0.76 < row["share"] <= 0.8
  (summary,) = (tmp_path / "runs").glob("*/summary.json")
  assert " ".join(map(str, json.loads(summary.read_text())["counts"])) == row["counts"]  # it is these that were told


def test_plan_trains_over_seeds_and_evaluates_once():
  c = config(seeds=(0, 1), budgets=(0.8, 0.9))
  assert sweep.plan(c, ["dense", "tome", "dense+tuned"]) == [
    ("dense", 1.0, 0), ("tome", 0.8, 0), ("tome", 0.9, 0), ("dense+tuned", 1.0, 0), ("dense+tuned", 1.0, 1),
  ]  # fmt: skip
  assert len(sweep.plan(c, ["evit", "tome+tuned"])) == 8


@pytest.mark.parametrize("budget", [0.0, 1.0, 60.0])
def test_a_budget_is_a_share(budget):
  """Percent, for one: 60 times the dense cost is met by reducing nothing."""
  with pytest.raises(ValueError, match=rf"budget={budget}; valid: a share .* above 0 and below 1"):
    sweep.recipe(config(), "tome", budget, 0)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("budgets", (0.6, 5.0), r"config\.budgets=\(0\.6, 5\.0\); valid: shares of the dense multiply-adds"),
    ("budgets", (), r"config\.budgets=\(\); valid: shares"),
    ("seeds", (), r"config\.seeds=\(\); valid: one or more"),
    ("bench", dict(rounds=1, batch_size=0), r"config\.bench\.batch_size=0; valid: 1 or more"),
    ("bench", dict(rounds=-1), r"config\.bench\.rounds=-1; valid: 0 or more"),
  ],
)
def test_what_cannot_be_run_is_told_before_anything_is_trained(field, value, message, tmp_path, monkeypatch):
  monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("trained"))
  with pytest.raises(ValueError, match=message):
    sweep.run(config(**{field: value}), tmp_path)
  assert not list(tmp_path.iterdir())


def test_learned_rates_have_the_budget_as_their_target():
  c = sweep.recipe(config(), "diffrate", 0.9, 3, "somewhere")
  assert (c.loss.target, c.loss.budget, c.train.mode, c.seed, c.init) == (0.9, 20.0, "mask", 3, "somewhere")
  assert 1 <= c.rates.freeze_step < 2 and "keep" not in c.sites.tokens


def test_methods_without_a_reducer_are_left_out_or_named():
  c = config()
  with c.unlocked():
    c.table["later"] = ConfigDict(dict(sites=dict(tokens=dict(reducer="nothing", layers="stages"))))
    c.table["score"] = ConfigDict(dict(sites=dict(tokens=dict(reducer="topk", score="none", layers="stages"))))
  names = sweep.methods(c)
  assert names[0] == "dense" and {"tome", "evit", "diffrate"} < set(names) and not {"later", "score"} & set(names)
  for name, missing in (("later", "reducer 'nothing'"), ("score", "score 'none'")):
    with c.unlocked():
      c.methods = (name,)
    with pytest.raises(ValueError, match=f"config.methods: '{name}' needs {missing}, which is not registered"):
      sweep.methods(c)
  with c.unlocked():
    c.methods = ("evitt+tuned",)
  with pytest.raises(ValueError, match=r"'evitt\+tuned' is not a method of config.table; did you mean 'evit'"):
    sweep.methods(c)


def test_a_misspelt_field_of_all_runs_is_told_first(tmp_path):
  c = config()
  with c.unlocked():
    c.finetune.optim.lrr = 0.1
  with pytest.raises(ValueError, match=r"config.optim.lrr is not a field; did you mean 'lr'"):
    sweep.run(c, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_one_failed_run_leaves_the_others(swept, capsys):
  workdir, rows = swept
  with pytest.raises(ValueError, match=r"tome at 0.1, seed 0: ValueError: .*cannot go down to budget=0.1"):
    sweep.run(config(methods=("tome", "dense"), budgets=(0.1,)), workdir)
  assert "sweep: tome at 0.1" in capsys.readouterr().err
  assert results.read(workdir / "results.csv")[0] == rows[0]


def test_every_method_with_its_reducer_builds():
  c = recipe_file.get_config("dataset=digits")
  for name in sweep.methods(c):
    made = sweep.recipe(c, name, 0.6, 0)
    model = tokred.build(made)
    assert made.to_dict().keys() == default().to_dict().keys()
    rates = {site.get("rate") for site in made.sites.to_dict().values()}
    later = rates & {*LEARNED, "threshold"}  # counts that are not known yet
    if not later and name != "dense":
      assert 0.5 < model.macs / tokred.build(c.dense).macs <= 0.6, name
