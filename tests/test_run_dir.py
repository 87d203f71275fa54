import errno
import fcntl
import json
import subprocess
import sys

import numpy as np
import pytest

from tokred import checkpoint, run_dir
from tokred.config import complete, default


def test_config_round_trip(tmp_path):
  config = complete(
    {
      "sites": {"prune": {"reducer": "topk", "layers": (3, 6), "keep": 0.5, "nested": ((1, 2), (3, 4))}},
      "optim": {"multipliers": ((".*/rate/.*", 10.0),)},
    }
  )
  run_dir.check_config(tmp_path / "run", config)  # nothing there yet
  run_dir.write_config(tmp_path / "run", config)
  read = run_dir.read_config(tmp_path / "run")
  assert read.to_dict() == config.to_dict()
  assert read.sites.prune.nested == ((1, 2), (3, 4)) and read.is_locked
  run_dir.check_config(tmp_path / "run", config)
  checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(1, {"params": np.zeros(2)}, data_state={}, config=default())
  checkpoints.close()
  assert run_dir.read_config(tmp_path / "checkpoints" / "1").to_dict() == default().to_dict()
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_config_of_another_run(tmp_path):
  run_dir.write_config(tmp_path, complete({"sites": {"prune": {"keep": 0.5}}}))
  allowed = {"train": {"log_every": 1, "keep_checkpoints": 9}, "mesh": {"fsdp": 2}, "data": {"num_workers": 4}}
  run_dir.check_config(tmp_path, complete({"sites": {"prune": {"keep": 0.5}}} | allowed))
  with pytest.raises(ValueError) as error:
    run_dir.check_config(tmp_path, complete({"seed": 3, "sites": {"prune": {"keep": 0.7}, "merge": {"keep": 8}}}))
  text = str(error.value)
  assert "config.seed: 0 there, 3 here" in text
  assert "config.sites.prune.keep: 0.5 there, 0.7 here" in text
  assert "config.sites.merge.keep: 'absent' there, 8 here" in text
  assert "another --workdir" in text


def test_one_run_at_a_time(tmp_path, monkeypatch):
  run, told = tmp_path / "run", r"workdir='.*run': another run trains there; .* another --workdir"
  with run_dir.locked(run):
    with pytest.raises(ValueError, match=told), run_dir.locked(run):
      pass
    with run_dir.locked(tmp_path / "other"):
      pass
  code = f"from tokred import run_dir\nwith run_dir.locked({str(run)!r}):\n  print(flush=True)\n  input()"
  with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
    process.stdout.readline()
    with pytest.raises(ValueError, match=told), run_dir.locked(run):
      pass
    process.kill()
    process.wait()
    with run_dir.locked(run):
      pass

  def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", no_locks)  # as on some network file systems
  with run_dir.locked(run), run_dir.locked(run):
    pass


def test_checkpoints_of_no_config(tmp_path):
  """They would go on with whatever config the command brings."""
  checkpoints = checkpoint.Checkpoints(tmp_path / checkpoint.FOLDER)
  checkpoints.save(7, {"params": np.zeros(2)}, data_state={}, config=default())
  checkpoints.close()
  with pytest.raises(
    ValueError, match=r"holds checkpoints but no config.json, .*checkpoints/7/config/metadata has .*or"
  ):
    run_dir.check_config(tmp_path, default())
  (tmp_path / "config.json").write_text((tmp_path / "checkpoints" / "7" / "config" / "metadata").read_text())
  run_dir.check_config(tmp_path, default())


def test_unreadable_config(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config.json does not exist; valid: a run directory"):
    run_dir.read_config(tmp_path)
  (tmp_path / "config.json").write_text('{"seed": ')
  with pytest.raises(ValueError, match=r"config.json is not JSON"):
    run_dir.check_config(tmp_path, default())
  (tmp_path / "config.json").write_text(json.dumps({"sed": 1}))
  with pytest.raises(ValueError, match=r"config.sed is not a field; did you mean 'seed'"):
    run_dir.read_config(tmp_path)
