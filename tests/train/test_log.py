"""tokred.train.log: what is in the files, what a resumed run leaves, what a full disk does."""

import errno
import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tokred.train.log import MetricLog


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
  """All events of the directory, files in order of name as TensorBoard reads them."""
  found = []
  for path in sorted(workdir.glob("events.out.tfevents.*")):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("Q", data[:8])
      found.append(Event.FromString(data[12 : 12 + length]))  # after the length and its checksum
      data = data[12 + length + 4 :]
  return found


def train(workdir, first, last, resume_step=None):
  with MetricLog(workdir, resume_step=resume_step) as log:
    log.start(total_steps=10, first_step=first, images_per_step=4)
    for step in range(first + 1, last + 1):
      log.step(step)
      log.write(step, {"loss": 1.0 / step})
      if step % 2 == 0:
        log.write(step, {"accuracy": step / 10}, prefix="eval/")


def test_lines_and_events(tmp_path):
  with MetricLog(tmp_path / "run") as log:
    log.write(3, {"loss": jnp.float32(0.5), "count": np.int64(7), "speed/images_per_second": 9.0})
    log.write(3, {"accuracy": 1}, prefix="eval/")
    assert len(lines(tmp_path / "run")) == 2  # flushed at every line
  assert lines(tmp_path / "run") == [
    {"step": 3, "train/loss": 0.5, "train/count": 7.0, "speed/images_per_second": 9.0},
    {"step": 3, "eval/accuracy": 1.0},
  ]
  values = {v.tag: (e.step, v.simple_value) for e in events(tmp_path / "run") for v in e.summary.value}
  assert values == {
    "train/loss": (3, 0.5),
    "train/count": (3, 7.0),
    "speed/images_per_second": (3, 9.0),
    "eval/accuracy": (3, 1.0),
  }


def test_numbers_that_json_does_not_know_are_null_and_named(tmp_path):
  with MetricLog(tmp_path) as log:
    log.write(1, {"loss": jnp.nan, "budget": jnp.inf, "fine": 1.0})
  assert lines(tmp_path) == [
    {
      "step": 1,
      "train/loss": None,
      "train/budget": None,
      "train/fine": 1.0,
      "nonfinite": ["train/loss", "train/budget"],
    }
  ]
  assert [v.tag for e in events(tmp_path) for v in e.summary.value] == ["train/fine"]


def test_a_resumed_run_leaves_the_same_file(tmp_path):
  train(tmp_path / "unbroken", 0, 10)
  train(tmp_path / "broken", 0, 7)
  with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "train/lo')  # killed in the middle of a line
  train(tmp_path / "broken", 4, 10, resume_step=4)
  assert (tmp_path / "broken" / "metrics.jsonl").read_bytes() == (tmp_path / "unbroken" / "metrics.jsonl").read_bytes()
  assert not list((tmp_path / "broken").glob("*.partial"))


def test_tensorboard_is_told_to_forget_what_comes_again(tmp_path):
  train(tmp_path, 0, 7)
  train(tmp_path, 4, 6, resume_step=4)
  starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
  assert starts == [0, 5]
  assert len(list(tmp_path.glob("events.*"))) == 2


def test_a_new_run_starts_anew(tmp_path):
  train(tmp_path, 0, 7)
  train(tmp_path, 0, 1)
  assert lines(tmp_path) == [{"step": 1, "train/loss": 1.0}]


def test_resuming_without_a_file(tmp_path):
  train(tmp_path, 4, 5, resume_step=4)
  assert lines(tmp_path) == [{"step": 5, "train/loss": 0.2}]


def test_bar_shows_steps_images_time_left_and_loss(tmp_path, capsys):
  with MetricLog(tmp_path) as log:
    log.start(total_steps=3, first_step=1, images_per_step=4)
    log.step(2)
    log.write(2, {"loss": 0.25})
    log.message("a message")
    log.step(3)
  printed = capsys.readouterr()
  assert printed.out == ""
  last = printed.err.replace("\n", "\r").rstrip("\r").split("\r")[-1]
  for part in ("3/3", "steps/s", "images/s", "loss 0.25", "<"):
    assert part in last
  assert "a message\n" in printed.err


def test_images_a_second_leave_out_the_first_step(tmp_path, monkeypatch, capsys):
  """Two steps of a short run: one compiles for 10 s, the other takes 1 s."""
  clock = [100.0]
  monkeypatch.setattr("tokred.train.log.time.monotonic", lambda: clock[0])
  with MetricLog(tmp_path) as log:
    log.start(total_steps=2, first_step=0, images_per_step=8)
    for seconds in (10.0, 1.0):
      clock[0] += seconds
      log.step(log._done + 1)
  printed = capsys.readouterr().err
  assert "8 images/s" in printed and "2/2" in printed and printed.count("images/s") == 1


def test_speed_counts_steps_since_the_last_call(tmp_path, monkeypatch):
  clock = [100.0]
  monkeypatch.setattr("tokred.train.log.time.monotonic", lambda: clock[0])
  with MetricLog(tmp_path) as log:
    log.start(total_steps=20, first_step=10, images_per_step=8)
    log.step(14)
    clock[0] = 102.0
    assert log.speed() == {"speed/steps_per_second": 2.0, "speed/images_per_second": 16.0}
    log.step(15)
    clock[0] = 106.0
    assert log.speed() == {"speed/steps_per_second": 0.25, "speed/images_per_second": 2.0}


def test_only_the_active_process_writes(tmp_path, capsys):
  with MetricLog(tmp_path / "run", active=False) as log:
    log.start(total_steps=2, first_step=0, images_per_step=1)
    log.step(1)
    log.write(1, {"loss": 1.0} | log.speed())
    log.message("nobody hears it")
  assert not (tmp_path / "run").exists()
  assert capsys.readouterr().err == ""


def test_a_value_that_is_no_scalar(tmp_path):
  with (
    MetricLog(tmp_path) as log,
    pytest.raises(TypeError, match=r"metric 'counts' is of shape \(3,\); valid: a scalar"),
  ):
    log.write(1, {"counts": jnp.zeros(3)})
  with MetricLog(tmp_path) as log, pytest.raises(TypeError, match="metric 'name' is 'x'"):
    log.write(1, {"name": "x"})


def full(*unused):
  raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_error_and_not_a_hang(tmp_path, monkeypatch):
  monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", full)
  monkeypatch.setattr("tokred.train.log._FLUSH_SECONDS", -1.0)
  with pytest.raises(OSError, match=r"cannot write the metrics of step 2: No space left on device: .*metrics\.jsonl"):
    with MetricLog(tmp_path) as log:
      log.write(2, {"loss": 1.0})


def test_a_full_disk_found_at_the_end_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", full)
  with pytest.raises(OSError, match="No space left"):
    with MetricLog(tmp_path) as log:
      log.write(2, {"loss": 1.0})
