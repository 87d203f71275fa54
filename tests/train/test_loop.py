"""Whole runs, in this process: what they leave, and that stopping, accumulating and sharding change nothing."""

import functools
import json
import math
import os
import shutil
import signal

import jax
import micro
import numpy as np
import pytest
from jax.sharding import Mesh

from tokred import checkpoint, loading, run_dir, sharding
from tokred.config import complete
from tokred.model import build, freeze
from tokred.train import loop
from tokred.train import step as step_lib
from tokred.train.loop import NonFiniteLoss, Stopped, train
from tokred.train.phase import Phase

SGD = dict(name="sgd", momentum=0.0, lr=0.1, clip_norm=0.0)  # adam would blow rounding up: m / sqrt(v)
EVERY_FAMILY = dict(  # one model with all of them, since compiling is what costs
  a_gumbel=dict(reducer="gumbel", layers=(1,), place="before", keep=0.9),
  b_merge=dict(reducer="tome", layers=(1,), r=2),
  c_rates=dict(micro.PAIR, layers=(2,)),
  d_router=dict(reducer="router", layers=(3,), keep=0.7),
)


def recipes(dense):
  """Name -> config; `dense` is the run directory that some of them begin from."""
  return {
    "learned": micro.config(
      dict(rates=micro.PAIR),
      rates=dict(freeze_step=3),
      train=dict(accumulate=2, eval_every=4),
      optim=dict(ema=0.5, multipliers=((r".*/rate/.*", 100.0),)),
      loss=dict(budget=20.0, target=0.85),
    ),
    "gumbel": micro.config(
      dict(select=dict(reducer="gumbel", layers=(1,), place="before", keep=0.5)),
      init=dense,
      loss=dict(keep_ratio=2.0, distill_logits=0.5, distill_tokens=0.5),
    ),
    "router": micro.config(dict(route=dict(reducer="router", layers=(1,), keep=0.5)), loss=dict(router=0.1)),
    "consistency": micro.config(dict(merge=dict(reducer="tome", layers=(0, 1), r=2)), loss=dict(consistency=1.0)),
    "scheduled": micro.config(
      dict(prune=dict(reducer="topk", layers=(1,), keep=0.5, rate="scheduled", schedule=(0, 4)))
    ),
    "gather": micro.config(dict(prune=dict(reducer="topk", layers=(0,), keep=9)), train=dict(mode="gather")),
  }


@pytest.fixture(scope="module")
def run(one_device, tmp_path_factory):
  """run(name): the run directory and the summary of a recipe; trained once."""
  root = tmp_path_factory.mktemp("runs")

  @functools.cache
  def make(name):
    config = micro.config() if name == "dense" else recipes(str(make("dense")[0]))[name]
    return root / name, train(config, root / name)

  return make


def test_what_a_run_leaves(run):
  workdir, summary = run("dense")
  assert json.loads((workdir / "summary.json").read_text()) == summary
  assert summary.keys() == {
    "accuracy", "accuracy_top5", "loss", "examples", "counts", "sites", "gflops", "gmacs", "step", "seed", "seconds",
  }  # fmt: skip
  assert summary["accuracy"] <= summary["accuracy_top5"] <= 1 and summary["sites"] == {}
  assert summary["examples"] == 30 and summary["counts"] == [17, 17] and summary["step"] == micro.STEPS
  assert summary["gflops"] == pytest.approx(build(micro.config()).flops / 1e9)
  named = micro.config(data=dict(labels=tuple("0123456789")))
  assert loading.load(workdir).config == named == run_dir.read_config(workdir)
  assert checkpoint.steps(workdir / checkpoint.FOLDER) == [3, 6]
  assert list(workdir.glob("events.out.tfevents*"))
  lines = micro.metrics(workdir)
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert lines[0].keys() == {
    "step", "train/loss", "train/cross_entropy", "train/accuracy", "train/grad_norm", "train/lr",
  }  # fmt: skip
  assert lines[0]["train/loss"] == pytest.approx(math.log(10), abs=1e-4)  # the head begins at zero
  assert lines[1]["train/lr"] == pytest.approx(3e-3) and lines[-1]["train/loss"] < lines[0]["train/loss"]


def test_learned_rates_are_frozen_and_go_on_in_gather_mode(run):
  workdir, summary = run("learned")
  names = ["train/counts/rates/1/topk", "train/counts/rates/1/diffrate_merge"]
  before, after = micro.metrics(workdir, "train/")[:3], micro.metrics(workdir, "train/")[3:]
  for line in before:
    assert line["train/budget"] >= 0 and line.keys() > set(names)
    expected = line["train/cross_entropy"] + 20 * line["train/budget"]
    assert line["train/loss"] == pytest.approx(expected, rel=1e-5)
  for line in after:
    assert "train/budget" not in line and line[names[1]] == summary["counts"][1]
  assert [line["step"] for line in micro.metrics(workdir, "eval/")] == [4]
  assert summary["counts"][0] == 17 and 2 <= summary["counts"][1] < 17
  assert not any(name.endswith("rate/logits") for name in micro.state(workdir))
  assert run_dir.read_config(workdir).sites.rates.rate == "learned"  # as the user gave it
  frozen = loading.read_config(workdir)  # as it is now
  assert frozen.train.mode == "gather" and frozen.sites.rates.keep[1] == (summary["counts"][1],)
  (prune,), (merge,) = frozen.sites.rates.keep
  more = dict(frozen.sites.rates.to_dict(), keep=((prune + 1,), (merge + 1,)))
  share = lambda sites: build(frozen.to_dict() | {"sites": sites}).macs / build(micro.config()).macs
  assert share(frozen.sites.to_dict()) <= 0.85 < share(dict(rates=more))  # a token more is more than was asked for


def test_heads_of_training_outlive_the_freezing_of_rates(run, tmp_path):
  """Its loss goes on behind `freeze_step`; what is evaluated at the end has no head."""
  sites = dict(
    cut=dict(reducer="topk", layers=(0,), rate="learned"),
    slim=dict(reducer="sit", layers=(0,), place="after", keep=0.5),
    back=dict(reducer="sit_reverse", layers=(1,)),
  )
  terms = dict(recalibration=1.0, budget=1.0, target=0.8)
  c = micro.config(sites, loss=terms, rates=dict(freeze_step=3), init=str(run("dense")[0]))
  summary = train(c, tmp_path)
  assert [line["step"] for line in micro.metrics(tmp_path, "train/recalibration")] == [1, 2, 3, 4, 5, 6]
  assert summary["sites"].keys() == {"cut/0", "slim/0"}
  model = loading.load(tmp_path)
  assert "back" in model.config.sites and "back" not in freeze(model).config.sites


def test_the_less_reduced_pass_draws_how_many_go():
  """Sites remove 2 of 17 twice.  r = 0: none go; 1: one each time; 2 and 3: no more than the sites remove."""
  model = build(micro.config(dict(merge=dict(reducer="tome", layers=(0, 1), r=2)))).init()
  shape = (2, *model.config.model.image_size, model.config.model.channels)
  images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  less = jax.jit(lambda rng: step_lib._less_reduced(model.module, 3, model.params, images, rng))
  seen = {}
  for seed in range(40):
    rng = jax.random.key(seed)
    counts = less(rng).aux["reduce/merge/count"]
    seen.setdefault(int(jax.random.randint(rng, (), 0, 4)), (int(counts[0]), int(counts[1])))
  assert seen == {0: (17, 17), 1: (16, 15), 2: (15, 13), 3: (15, 13)}


def test_rates_that_learn_to_the_end_are_told(tmp_path, capsys):
  summary = train(micro.config(dict(rates=micro.PAIR), loss=dict(budget=20.0, target=0.85)), tmp_path)
  told = capsys.readouterr().err
  keep = tuple((int(count),) for count in summary["sites"].values())  # pruned, merged
  assert f"rates are frozen: tokens leaving each block {tuple(summary['counts'])}" in told
  assert f"sites.rates.keep={keep}" in told


@pytest.mark.parametrize("alone", [False, True])
def test_rates_that_freeze_at_the_last_step_meet_the_target(tmp_path, capsys, alone):
  """What is told, evaluated, saved and loaded are counts that meet the target, as nearly as integers can."""
  c = micro.config(dict(rates=micro.PAIR), loss=dict(budget=20.0, target=0.85), rates=dict(freeze_step=micro.STEPS))
  if alone:
    with c.unlocked():
      c.optim.freeze = (r"^(?!.*/rate/).*",)  # as configs/methods.py has diffrate_alone: nothing is left to learn
  summary = train(c, tmp_path)
  told = capsys.readouterr().err
  assert "are scaled to the target of 0.85 fraction" in told
  assert told.count(f"rates are frozen: tokens leaving each block {tuple(summary['counts'])}") == 1
  model, dense = loading.load(tmp_path), build(micro.config())
  assert list(model.counts) == summary["counts"] and model.mode == "gather"
  (prune,), (merge,) = model.config.sites.rates.keep
  more = dict(model.config.sites.rates.to_dict(), keep=((prune + 1,), (merge + 1,)))
  assert model.macs <= 0.85 * dense.macs < build(model.config.to_dict() | {"sites": dict(rates=more)}).macs
  assert len(micro.metrics(tmp_path, "train/budget")) == micro.STEPS
  assert train(c, tmp_path) | {"seconds": 0} == summary | {"seconds": 0}  # finished: evaluated again


def test_the_average_is_what_is_evaluated_and_loaded(run):
  workdir, summary = run("learned")
  state, model = micro.state(workdir), loading.load(workdir)
  assert np.abs(state["ema/head/kernel"] - state["params/head/kernel"]).max() > 0
  np.testing.assert_array_equal(model.params["head"]["kernel"], state["ema/head/kernel"])
  _, eval_batches = loop._data(model.config)
  result = loop.evaluate.run(model.module, model.params, eval_batches, "gather")
  assert {name: result[name] for name in ("accuracy", "loss")} == pytest.approx(
    {name: summary[name] for name in ("accuracy", "loss")}, rel=1e-5
  )


@pytest.mark.parametrize(
  ("name", "terms", "counts"),
  [
    ("gumbel", {"keep_ratio": 2.0, "distill_logits": 0.5, "distill_tokens": 0.5}, {"select/1": None}),
    ("router", {"router": 0.1}, {"route/1": [9] * 6}),  # ceil(0.5 x 16) and CLS
    ("consistency", {"consistency": 1.0}, {"merge/0": [15] * 6, "merge/1": [13] * 6}),
    # 1 + ceil(16 keep(t)), keep(t) = 0.5 + 0.25 (1 + cos(pi t / 4)): 16, 14.83, 12, 9.17, 8 patches
    ("scheduled", {}, {"prune/1": [17, 16, 13, 11, 9, 9]}),
    ("gather", {}, {"prune/0": [9] * 6}),
  ],
)
def test_recipe(run, name, terms, counts):
  workdir, summary = run(name)
  lines = micro.metrics(workdir)
  assert len(lines) == micro.STEPS and math.isfinite(summary["loss"])
  more = ["overlap/route/1"] if name == "router" else []
  more += {"gumbel": ["grad_norm/block_1/reduce/select"], "router": ["grad_norm/block_1/reduce/route"]}.get(name, [])
  for line in lines:
    assert line.keys() == {"step"} | {
      f"train/{key}"
      for key in (
        "loss",
        "cross_entropy",
        "accuracy",
        "grad_norm",
        "lr",
        *terms,
        *(f"counts/{c}" for c in counts),
        *more,
      )
    }
    total = line["train/cross_entropy"] + sum(weight * line[f"train/{term}"] for term, weight in terms.items())
    assert line["train/loss"] == pytest.approx(total, rel=1e-5)
  for where, expected in counts.items():
    logged = [line[f"train/counts/{where}"] for line in lines]
    assert logged == expected if expected else all(1 <= count <= 17 for count in logged)


def test_a_run_begins_from_another(run, tmp_path):
  dense, _ = run("dense")
  mesh = loop.sharding.make_mesh(micro.config().mesh)
  config = recipes(str(dense))["gumbel"]
  params = loop._first_state(Phase(config, mesh, 6))["params"]  # reduce/ is not in the dense run: drawn anew
  before = micro.state(dense)
  assert "predictor" in params["block_1"]["reduce"]["select"]["gumbel"]
  np.testing.assert_array_equal(params["block_1"]["mlp"]["fc1"]["kernel"], before["params/block_1/mlp/fc1/kernel"])
  learned, _ = run("gumbel")
  params = loop._first_state(Phase(micro.config(init=str(learned)), mesh, 6))["params"]  # and here it is left out
  assert not any("reduce" in sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
  np.testing.assert_array_equal(params["pos_embed"], micro.state(learned)["params/pos_embed"])


@pytest.mark.thorough  # so do the next test's and those of tests/train/test_kills.py
def test_same_seed_same_numbers(run, tmp_path):
  dense, _ = run("dense")
  train(micro.config(), tmp_path)
  micro.assert_same_run(dense, tmp_path)
  train(micro.config(seed=1, train=dict(steps=1), optim=dict(warmup_steps=0)), tmp_path / "other")
  other = micro.state(tmp_path / "other")
  assert np.abs(other["params/pos_embed"] - micro.state(dense)["params/pos_embed"]).max() > 0.01


def test_resuming_equals_not_stopping(run, stop_at, tmp_path, capfd):
  """Before, at and after the freezing of rates; with average and accumulation."""
  whole, summary = run("learned")
  config = recipes("")["learned"]
  for step in (2, 3, 5):
    stop_at(step)
    with pytest.raises(Stopped) as stopped:
      train(config, tmp_path)
    assert stopped.value.code == 143
    assert checkpoint.steps(tmp_path / checkpoint.FOLDER)[-1] == step
    assert f"SIGTERM: saved step {step} of 6; the same command goes on" in capfd.readouterr().err
  stop_at(None)
  resumed = train(config, tmp_path)
  assert f"resuming {tmp_path} at step 5 of 6" in capfd.readouterr().err
  micro.assert_same_run(whole, tmp_path)
  assert resumed | {"seconds": 0} == summary | {"seconds": 0}
  assert train(config, tmp_path) | {"seconds": 0} == summary | {"seconds": 0}  # finished: evaluated again, no step
  micro.assert_same_run(whole, tmp_path)


def test_a_signal_while_the_last_checkpoint_is_written(run, monkeypatch, tmp_path):
  workdir = shutil.copytree(run("dense")[0], tmp_path / "run")
  shutil.rmtree(workdir / checkpoint.FOLDER / "6")
  real, kill = checkpoint.Checkpoints.save, lambda: os.kill(os.getpid(), signal.SIGTERM)
  monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda *args, **kwargs: (real(*args, **kwargs), kill()))
  with pytest.raises(Stopped):
    train(micro.config(), workdir)
  assert checkpoint.steps(workdir / checkpoint.FOLDER)[-1] == 6


def test_accumulation_changes_rounding_only(one_device, tmp_path):
  config = micro.config(optim=SGD, train=dict(steps=3))
  train(config, tmp_path / "1")
  with config.unlocked():
    config.train.accumulate = 4
  train(config, tmp_path / "4")
  micro.assert_close(micro.state(tmp_path / "1"), micro.state(tmp_path / "4"), atol=1e-6)


@pytest.mark.parametrize(
  ("axes", "stop"),
  [(dict(data=2, fsdp=2, tensor=2), 2), pytest.param(dict(data=8), 4, marks=pytest.mark.thorough)],
)
def test_eight_devices_equal_one(axes, stop, one_device, stop_at, monkeypatch, tmp_path):
  """A model with a reducer of each family; eight devices may hand over to one in the middle."""
  config = micro.config(
    EVERY_FAMILY,
    model=dict(depth=4),
    optim=SGD,
    train=dict(steps=4),
    loss=dict(budget=1.0, target=0.7, keep_ratio=1.0, router=0.1),
  )
  train(config, tmp_path / "one")
  one = micro.state(tmp_path / "one")
  eight = complete(config)
  eight.mesh.update(axes)
  stop_at(stop)
  with monkeypatch.context() as patch, pytest.raises(Stopped):
    patch.setattr(sharding, "make_mesh", one_device)
    train(eight, tmp_path / "eight")
  stop_at(None)
  train(config, tmp_path / "eight")
  micro.assert_close(one, micro.state(tmp_path / "eight"), atol=2e-6)
  for a, b in zip(micro.metrics(tmp_path / "one"), micro.metrics(tmp_path / "eight"), strict=True):
    assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_a_sharded_state_is_sharded(one_device):
  config = micro.config(mesh=dict(data=2, fsdp=2, tensor=2))
  mesh = one_device(config.mesh)
  state = loop._first_state(Phase(config, mesh, 6))
  kernel = state["params"]["block_0"]["mlp"]["fc1"]["kernel"]
  assert isinstance(mesh, Mesh) and kernel.addressable_shards[0].data.shape == (8, 16)  # of (16, 32)


def poison(monkeypatch, step):
  """NaN images in the batch of a step."""
  real = loop.tokred_data.to_device

  def to_device(*args):
    for number, (batch, state) in enumerate(real(*args), 1):
      yield (batch | {"image": batch["image"] * np.nan} if number == step else batch), state

  monkeypatch.setattr(loop.tokred_data, "to_device", to_device)


def test_a_loss_that_is_no_number_stops_the_run(run, monkeypatch, tmp_path):
  dense, _ = run("dense")
  with monkeypatch.context() as patch:
    poison(patch, 5)
    with pytest.raises(NonFiniteLoss, match=r"step 5: cross_entropy of the loss is not finite .*checkpoint is step 3;"):
      train(micro.config(), tmp_path)
  last = micro.metrics(tmp_path)[-1]
  assert last["step"] == 5 and last["train/loss"] is None and "train/cross_entropy" in last["nonfinite"]
  assert checkpoint.steps(tmp_path / checkpoint.FOLDER) == [3]
  assert all(np.isfinite(array).all() for array in micro.state(tmp_path).values())
  train(micro.config(), tmp_path)  # the data are sound again
  micro.assert_same_run(dense, tmp_path)


def test_a_loss_that_is_no_number_is_never_saved(one_device, monkeypatch, tmp_path):
  poison(monkeypatch, 3)  # a step that saves
  with pytest.raises(NonFiniteLoss, match=r"step 3: .*no checkpoint was written before"):
    train(micro.config(), tmp_path)
  assert checkpoint.steps(tmp_path / checkpoint.FOLDER) == []


def test_a_learning_rate_too_high_stops_the_run(one_device, tmp_path):
  config = micro.config(optim=SGD | dict(lr=1e30, warmup_steps=0))
  with pytest.raises(NonFiniteLoss, match=r"lower config.optim.lr"):
    train(config, tmp_path)


def test_frozen_backbone_and_moving_rates(one_device, tmp_path):
  config = micro.config(
    dict(rates=micro.PAIR),
    train=dict(steps=3, checkpoint_every=1, keep_checkpoints=3),
    optim=dict(freeze=(r"(?!.*/rate/).*",), multipliers=((r".*_0_topk/rate/.*", 100.0), (r".*/rate/.*", 0.0))),
    loss=dict(budget=20.0, target=0.85),
  )
  train(config, tmp_path)
  first = checkpoint.restore_params(tmp_path, "params", step=1)
  last = checkpoint.restore_params(tmp_path, "params", step=3)
  moved = [
    sharding.path_name(path)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(last), strict=True)
    if (a != b).any()
  ]
  assert moved == ["block_1/reduce/rates_0_topk/rate/logits"]
