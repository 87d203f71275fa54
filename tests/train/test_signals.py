"""SIGTERM and Ctrl-C while a run trains; tests/train/test_kills.py has real processes."""

import os
import re
import shutil
import signal

import jax
import micro
import numpy as np
import pytest

from tokred import checkpoint
from tokred.train import loop, signals


@pytest.fixture
def foreground():
  """Ctrl-C as a terminal's own job has it; where tests run in the background it is ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_a_second_one_is_not_waited_for(foreground, one_device, monkeypatch, tmp_path, capfd):
  real, times = loop._Run._report, 1

  def report(self, last):  # while the second step is under way
    for _ in range(times if last and last[0] == 1 else 0):
      signal.raise_signal(signal.SIGINT)
    return real(self, last)

  monkeypatch.setattr(loop._Run, "_report", report)
  with pytest.raises(loop.Stopped) as stopped:
    loop.train(micro.config(), tmp_path)
  assert stopped.value.code == 130 and checkpoint.steps(tmp_path / checkpoint.FOLDER) == [2]
  assert re.search(r"Ctrl-C: leaves when .*once more.*SIGINT: saved step 2 of 6", capfd.readouterr().err, re.DOTALL)
  shutil.rmtree(tmp_path / checkpoint.FOLDER / "2")
  times = 2
  with pytest.raises(KeyboardInterrupt):
    loop.train(micro.config(), tmp_path)
  assert checkpoint.steps(tmp_path / checkpoint.FOLDER) == []
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_several_processes_look_for_signals_at_the_last_step_too(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(signals.multihost_utils, "process_allgather", lambda asked: np.array([0, asked]))
  with signals.Caught(13) as asked:
    assert not asked(10)
    os.kill(os.getpid(), signal.SIGTERM)
    assert [asked(step) for step in (11, 12, 13)] == [0, 0, signal.SIGTERM]


def test_a_job_in_the_background_is_not_for_ctrl_c():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with signals.Caught(13) as asked:
      signal.raise_signal(signal.SIGINT)
      assert not asked(10)
  finally:
    signal.signal(signal.SIGINT, before)
