"""tokred.demo: everything that `make demo` leaves behind, and going on after an interruption."""

import json

import pytest
from PIL import Image

from tokred import demo
from tokred.config import complete

MODEL = dict(
  variant="mu/2", width=16, depth=1, num_heads=2, mlp_dim=32, image_size=(8, 8), channels=1, num_classes=10
)  # 16 patches and CLS


def config(**groups):
  common = dict(
    model=MODEL,
    data=dict(mean=(0.5,), std=(0.5,), train_split="train[:64]", eval_split="test[:24]"),
    train=dict(steps=2, batch_size=16, log_every=1, checkpoint_every=2),
    optim=dict(warmup_steps=1),
    eval=dict(batch_size=24),
  )
  return complete(common | groups)


def configs():
  rates = dict(reducer=("topk", "diffrate_merge"), layers=(0,), rate="learned")
  return config(), config(
    sites=dict(rates=rates), loss=dict(budget=1.0, target=0.8, distill_logits=0.5), rates=dict(freeze_step=1)
  )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def summary(one_device, workdir):
  return demo.run(*configs(), workdir, rounds=2)


def test_the_summary_has_exactly_what_is_promised(summary, workdir):
  assert json.loads((workdir / "summary.json").read_text()) == summary
  assert summary.keys() == {"dense", "reduced", "speedup", "export", "seconds"}
  assert summary["export"].keys() == {"max_abs_diff"} and 0 <= summary["export"]["max_abs_diff"] < 1e-4
  for name in ("dense", "reduced"):
    assert summary[name].keys() == {"accuracy", "gflops", "images_per_second", "counts"}
    assert 0 <= summary[name]["accuracy"] <= 1 and summary[name]["images_per_second"] > 0
  dense, reduced = summary["dense"], summary["reduced"]
  assert dense["counts"] == [17] and 2 <= reduced["counts"][0] < 17
  assert reduced["gflops"] < dense["gflops"] and summary["speedup"] > 0 and summary["seconds"] > 0


def test_what_it_leaves(summary, workdir):
  names = {path.name for path in workdir.iterdir()}
  assert names == {"dense", "reduced", "exported", "survivors.png", "summary.json"}
  with Image.open(workdir / "survivors.png") as picture:
    assert picture.format == "PNG"


def test_the_table(summary):
  lines = demo.table(summary).splitlines()
  assert (
    lines[1].startswith("dense")
    and lines[2].startswith("reduced")
    and lines[2].endswith(f"  {summary['reduced']['counts'][0]}")
  )
  assert "times the images/s" in lines[-1] and "exported logits within" in lines[-1]


def test_an_interrupted_demo_goes_on(summary, workdir, capfd):
  """The trainings are finished, so that nothing of them is run again."""
  before = {name: (workdir / name / "metrics.jsonl").read_text() for name in ("dense", "reduced")}
  (workdir / "summary.json").unlink()
  again = demo.run(*configs(), workdir, rounds=2)
  assert {name: (workdir / name / "metrics.jsonl").read_text() for name in before} == before
  for name in ("dense", "reduced"):
    assert again[name]["accuracy"] == summary[name]["accuracy"] and again[name]["counts"] == summary[name]["counts"]
  printed, progress = capfd.readouterr()
  assert [line[:3] for line in printed.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
  assert "2/2" in progress  # the bars of both trainings
