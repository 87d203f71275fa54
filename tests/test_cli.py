"""The command lines, as a user runs them: one micro run, trained, evaluated, exported, benchmarked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tokred

ROOT = Path(__file__).parent.parent
MICRO = (
  "model.width=16", "model.depth=1", "model.num_heads=2", "model.variant=mu/2", "train.batch_size=16",
  "data.train_split=train[:64]", "data.eval_split=test[:20]", "eval.batch_size=20", "sites.rates.layers=(0,)",
  "loss.target=0.9",
)  # fmt: skip
TRAIN = ("train.py", "--config=configs/digits.py:learned,runlocal", *(f"--config.{field}" for field in MICRO))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def call():
  """Runs a command in the repository on one device."""
  environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}

  def call(*command, fails=False):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr
    for noise in ("Unable to initialize", "RuntimeWarning", "Traceback"):
      assert noise not in done.stdout + done.stderr, done.stderr
    return done.stdout + done.stderr if fails else done.stdout

  return call


@pytest.fixture(scope="module")
def workdir(folder, call):
  printed = call(*TRAIN, f"--workdir={folder / 'run'}")
  found = re.search(r"accuracy (\S+), (\S+) GFLOPs, tokens (.*)", printed)
  summary = json.loads((folder / "run" / "summary.json").read_text())
  assert summary["accuracy"] == pytest.approx(float(found[1]), abs=1e-4)
  assert summary["gflops"] == pytest.approx(float(found[2]), rel=1e-3) and summary["counts"] == json.loads(found[3])
  assert summary["step"] == 2 and summary["examples"] == 20
  return folder / "run"


@pytest.fixture(scope="module")
def exported(folder, call, workdir):
  formats = "orbax,stablehlo,onnx"
  printed = call(
    "export.py", f"--workdir={workdir}", f"--output={folder / 'exported'}", f"--formats={formats}", "--latency=1"
  )
  differences = json.loads(printed[printed.rindex("{") :].replace("'", '"'))
  assert differences.keys() == set(formats.split(",")) and max(differences.values()) < 1e-4
  assert "- labels: 0, 1, 2" in (folder / "exported" / "README.md").read_text()
  return folder / "exported"


def test_a_finished_run_is_left_as_it_is(call, workdir):
  before = (workdir / "metrics.jsonl").read_text()
  assert "accuracy" in call(*TRAIN, f"--workdir={workdir}")
  assert (workdir / "metrics.jsonl").read_text() == before


def test_eval_gives_the_accuracy_of_the_summary_as_json(call, workdir, exported):
  summary = json.loads((workdir / "summary.json").read_text())
  for path in (workdir, exported):
    result = json.loads(call("eval.py", f"--workdir={path}"))
    assert result["accuracy"] == summary["accuracy"] and result["counts"] == summary["counts"]
  assert tokred.export.read_card(exported)["accuracy"] == summary["accuracy"]
  assert json.loads(call("eval.py", f"--workdir={exported}", "--split=test[:7]"))["examples"] == 7


def test_a_result_that_cannot_be_written_is_printed_all_the_same(call, workdir, folder):
  told, error = call(
    "eval.py", f"--workdir={workdir}", f"--output={folder / 'NEW' / 'a.json'}", fails=True
  ).splitlines()
  assert json.loads(told)["examples"] == 20 and re.match("eval.py: .*No such file or directory", error)


def test_bench_prints_a_table_and_writes_json(call, exported, folder):
  command = ("-m", "tokred.bench", f"--model={exported}", "--batch_sizes=1,4", "--rounds=2")
  printed = call(*command, f"--json={folder / 'bench.json'}")
  assert "speed-up" in printed and printed.count("pay") == 2  # a sentence for each batch size
  rows = json.loads((folder / "bench.json").read_text())
  assert [row["batch_size"] for row in rows] == [1, 4] and all(row["promised"] > 1 for row in rows)


@pytest.mark.parametrize(
  "command, message",
  [
    ((*TRAIN, "--config.optim.lr=0.5", "--workdir=RUN"), "train.py: .*run of another config .*config.optim.lr"),
    ((*TRAIN, "--config.sites.rates.layers=(9,)", "--workdir=NEW"), "train.py: sites.rates.layers has 9"),
    (("eval.py", "--workdir=NEW"), "eval.py: .*NEW is no run directory, export or file of weights"),
    (("eval.py", "--workdir=RUN", "--split=tset"), "eval.py: config.data.eval_split='tset'"),
    (("eval.py", "--workdir=RUN", "--keep=0.5"), "eval.py: --keep means nothing for a model of images alone"),
    (("export.py", "--workdir=RUN", "--output=NEW", "--formats=onyx"), "export.py: formats has 'onyx'"),
    (("export.py", "--workdir=RUN", "--output=NEW", "--latency=1,b"), "export.py: --latency=1,b; valid: batch sizes"),
    (("export.py", "--workdir=RUN", "--output=RUN"), "export.py: .* is no export; choose another folder"),
    (("-m", "tokred.bench", "--model=NEW"), "tokred.bench: .*NEW is no run directory"),
  ],
  ids=("another_config", "layer", "no_run", "split", "flag", "format", "latency", "output", "bench"),
)
def test_an_error_is_one_line(call, workdir, folder, command, message):
  command = [part.replace("=RUN", f"={workdir}").replace("=NEW", f"={folder / 'NEW'}") for part in command]
  (line,) = call(*command, fails=True).strip().splitlines()
  assert re.match(message, line), line
  assert not (folder / "NEW").exists()
