"""Kills, some of them during a save: each time the same command, and in the end the run that was never killed."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import micro
import pytest

from tokred import checkpoint

ROOT = Path(__file__).parents[2]
STEPS, FREEZE = 80, 24
DEADLINE = 60.0  # seconds to wait for a moment to come
OVERRIDES = dict(
  model=dict(width=16, depth=2, num_heads=2, image_size="(4,4)"),
  sites=dict(rates=dict(layers="(1,)")),
  rates=dict(freeze_step=FREEZE),
  data=dict(train_split="train[:60]", eval_split="test[:30]"),
  train=dict(steps=STEPS, batch_size=8, log_every=1, checkpoint_every=5),
  optim=dict(ema=0.9),
  loss=dict(distill_logits=0.0, target=1.0),  # one patch: there is nothing to remove
)


def flags(tree, prefix="--config"):
  for name, value in tree.items():
    yield from flags(value, f"{prefix}.{name}") if isinstance(value, dict) else [f"{prefix}.{name}={value}"]


def start(workdir, environment):
  command = [sys.executable, "train.py", "--config=configs/digits.py:learned", f"--workdir={workdir}"]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where tests run in the background, and inherited
  try:
    return subprocess.Popen([*command, *flags(OVERRIDES)], cwd=ROOT, env=environment, **pipes)
  finally:
    signal.signal(signal.SIGINT, before)


def wait_until(process, happened, every=0.01):
  """Returns as soon as it has happened, looked for so often; fails if the process ends before."""
  deadline = time.monotonic() + DEADLINE
  while not happened():
    if process.poll() is not None or time.monotonic() > deadline:
      out, err = process.communicate(timeout=10)
      pytest.fail(f"the moment never came (exit {process.returncode}): {out}{err}")
    time.sleep(every)


def last_step(workdir):
  try:
    return max((line["step"] for line in micro.metrics(workdir)), default=0)
  except (OSError, ValueError):  # not there yet, or read while its last line was written
    return 0


def saving(workdir):
  folder = workdir / checkpoint.FOLDER
  return folder.is_dir() and any(not path.name.isdecimal() for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(cached_environment, tmp_path_factory):
  """The run that is never killed; it fills the cache of compiled programs, which a kill might leave half written."""
  workdir = tmp_path_factory.mktemp("whole")
  process = start(workdir, cached_environment)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert out.startswith("accuracy ")
  return workdir


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.thorough)])
def test_kills(kills, whole, cached_environment, tmp_path):
  chance, saves_hit, codes = random.Random(0), 0, []
  moments = sorted(chance.sample(range(6, STEPS - 40), kills))  # far enough from the end to come in time
  kill, ask, ctrl_c = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
  kinds = list(itertools.islice(itertools.cycle([(kill, True), (ask, False), (kill, False), (ctrl_c, True)]), kills))
  chance.shuffle(kinds)
  for moment, (number, during_save) in zip(moments, kinds, strict=True):
    process = start(tmp_path, cached_environment)
    wait_until(process, lambda moment=moment: last_step(tmp_path) >= moment)
    if during_save:
      wait_until(process, lambda: saving(tmp_path), every=0.0005)  # a save is over in no time
    else:
      time.sleep(chance.uniform(0.0, 0.02))
    process.send_signal(number)
    saves_hit += saving(tmp_path)
    _, err = process.communicate(timeout=DEADLINE)
    assert "Traceback" not in err, err
    codes.append(process.returncode)
    if process.returncode in (143, 130):
      name = "SIGTERM" if process.returncode == 143 else "SIGINT"
      assert f"{name}: saved step {checkpoint.steps(tmp_path / checkpoint.FOLDER)[-1]} of {STEPS}" in err
  assert codes.count(-kill) == kills // 2, codes
  assert set(codes) <= {-kill, 143, 130, -ask, -ctrl_c}, codes  # negative: it was not in the loop yet
  assert saves_hit >= 3 * kills // 10
  process = start(tmp_path, cached_environment)
  _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 0, err
  micro.assert_same_run(whole, tmp_path)
  left = {path.name for path in tmp_path.iterdir() if "tfevents" not in path.name}
  assert left - {"metrics.jsonl.partial"} == {".lock", "config.json", "metrics.jsonl", "checkpoints", "summary.json"}
  assert sorted(os.listdir(tmp_path / "checkpoints"), key=int) == [str(STEPS - 5), str(STEPS)]
