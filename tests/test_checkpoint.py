import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokred import checkpoint, sharding
from tokred.checkpoint import CheckpointError, Checkpoints
from tokred.config import default

ROOT = Path(__file__).parent.parent
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10)))


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  opt_state: Any
  ema: Any
  rng: Any


def make_state(value: float = 0.0) -> State:
  params = {
    "encoder": {
      "mlp": {"fc1": {"kernel": jnp.arange(256.0).reshape(16, 16) + value, "bias": jnp.full((16,), value, jnp.float32)}}
    },
    "head": {"kernel": jnp.full((16, 3), value, jnp.bfloat16)},
  }
  rng = jax.random.key_data(jax.random.key(int(value)))
  return State(jnp.int32(value), params, TX.init(params), params, rng)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save(directory, *values, keep=2):
  """Checkpoints whose step and content are the values."""
  checkpoints = Checkpoints(directory, keep)
  for value in values:
    checkpoints.save(value, make_state(value), data_state={"index": 10 * value}, config=default())
  checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp("saved")
  save(directory, 1, 2, 3)
  return directory


@pytest.fixture
def folder(saved, tmp_path):
  """A copy of two good steps, 2 and 3, to damage."""
  return Path(shutil.copytree(saved, tmp_path / "copy"))


def run_python(code, **environment):
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code)],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | environment,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_restores_the_latest(saved):
  assert checkpoint.steps(saved) == [2, 3]  # keep=2
  checkpoints = Checkpoints(saved)
  assert checkpoints.latest_step() == 3
  state, data_state = checkpoints.restore(make_state())
  assert isinstance(state, State)
  assert_same(state, make_state(3))
  assert data_state == {"index": 30}
  state, data_state = checkpoints.restore(make_state(), step=2)
  assert_same(state, make_state(2))
  with pytest.raises(FileNotFoundError, match="no checkpoint of step 1 in"):
    checkpoints.restore(make_state(), step=1)
  checkpoints.close()


def test_nothing_saved_yet(tmp_path):
  checkpoints = Checkpoints(tmp_path / "new")
  assert checkpoints.latest_step() is None
  with pytest.raises(FileNotFoundError, match="no checkpoint in"):
    checkpoints.restore(make_state())
  checkpoints.close()
  with pytest.raises(FileNotFoundError, match="no checkpoint in"):
    checkpoint.restore_params(tmp_path)
  with pytest.raises(ValueError, match=r"config.train.keep_checkpoints=0"):
    Checkpoints(tmp_path, keep=0)
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="cannot be used for checkpoints"):
    Checkpoints(tmp_path / "file" / "checkpoints")


def test_saving_a_step_again_keeps_it(tmp_path):
  with_two = Checkpoints(tmp_path)
  with_two.save(1, make_state(1), data_state={}, config={}, wait=True)
  with_two.save(1, make_state(2), data_state={}, config={}, wait=True)
  assert_same(with_two.restore(make_state())[0], make_state(1))
  with pytest.raises(TypeError, match="JSON"):
    with_two.save(2, make_state(2), data_state={"x": b""}, config={})
  with_two.close()


def test_restores_on_other_meshes(tmp_path):
  def abstract(data, fsdp):
    mesh = sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": 1}, jax.devices()[: data * fsdp])
    return sharding.abstract_sharded(make_state, mesh=mesh)

  whole = make_state(0)
  checkpoints = Checkpoints(tmp_path)
  state = jax.tree.map(lambda leaf, target: jax.device_put(leaf, target.sharding), whole, abstract(8, 1))
  for step, (data, fsdp) in enumerate([(2, 4), (1, 8), (1, 1)]):
    checkpoints.save(step, state, data_state={}, config={})
    target = abstract(data, fsdp)
    state, _ = checkpoints.restore(target)
    assert jax.tree.all(jax.tree.map(lambda leaf, want: leaf.sharding == want.sharding, state, target))
    assert_same(state, whole)
  numpy, _ = checkpoints.restore(jax.tree.map(np.asarray, whole))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(numpy))
  checkpoints.close()


def test_buffers_may_be_donated_after_save(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=4)
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  for step in range(4):
    x, host = jnp.full((1 << 18,), float(step)), np.full((1 << 18,), float(step), np.float32)
    checkpoints.save(step, {"params": {"x": x, "host": host}}, data_state={}, config={})
    jax.block_until_ready(overwrite(x))
    host[:] = -1
  checkpoints.close()
  for step in range(4):
    params = checkpoint.restore_params(tmp_path, step=step)
    assert (params["x"] == step).all() and (params["host"] == step).all()


def test_parts_without_the_state(saved, tmp_path):
  params = checkpoint.restore_params(saved)
  assert_same(params, jax.tree.map(np.asarray, make_state(3).params))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
  assert_same(checkpoint.restore_params(saved / "2", "ema"), jax.tree.map(np.asarray, make_state(2).ema))
  (tmp_path / "run").mkdir()
  shutil.copytree(saved, tmp_path / "run" / "checkpoints")
  assert_same(checkpoint.restore_params(tmp_path / "run"), params)
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
  target = sharding.abstract_sharded(lambda: make_state().params, mesh=mesh)
  sharded = checkpoint.restore_params(saved, target=target)
  assert_same(sharded, params)
  kernel = sharded["encoder"]["mlp"]["fc1"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 16)  # fsdp: 16 / 8
  with pytest.raises(CheckpointError, match="only in the checkpoint: params/head/kernel"):
    checkpoint.restore_params(saved, target={"encoder": target["encoder"]})
  with pytest.raises(CheckpointError, match="has no 'emma'; it has: ema, opt_state, params, rng, step"):
    checkpoint.restore_params(saved, "emma")


def test_another_model(saved):
  checkpoints = Checkpoints(saved)
  state = make_state()
  other = state.replace(params=state.params | {"head": {"scale": jnp.ones(3), "kernel": jnp.ones((16, 4))}}, ema=None)
  with pytest.raises(CheckpointError) as error:
    checkpoints.restore(other)
  assert "not in the checkpoint: params/head/scale; only in the checkpoint: ema/encoder/mlp/fc1/bias" in str(
    error.value
  )
  assert "params/head/kernel is bfloat16[16, 3] there, float32[16, 4] here" in str(error.value)
  checkpoints.close()


def files(step_folder):
  return sorted(path.relative_to(step_folder).as_posix() for path in step_folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted"])
def test_damage_to_any_file_is_found(folder, how):
  checkpoints = Checkpoints(folder)
  for name in files(folder / "3"):
    if name == "commit_success.txt":
      continue  # an empty mark of orbax, not read
    path = folder / "3" / name
    good = path.read_bytes()
    if not good and how != "deleted":
      continue
    if how == "deleted":
      path.unlink()
    else:
      path.write_bytes(good[:-2] if how == "truncated" else bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(CheckpointError) as error:
      checkpoints.restore(make_state())
    text = str(error.value)
    assert "\n" not in text and f"{folder / '3'} is damaged: " in text
    assert name in text or name == "manifest.json"  # a flip in there may turn up as the wrong hash of another file
    assert f"step 2 is intact: delete {folder / '3'} to go back to it" in text
    with pytest.raises(CheckpointError, match="is damaged"):
      checkpoint.restore_params(folder)
    path.write_bytes(good)
  checkpoints.restore(make_state())
  shutil.rmtree(folder / "3")  # what the message says
  assert_same(checkpoints.restore(make_state())[0], make_state(2))
  checkpoints.close()


def test_no_step_is_intact(folder):
  (folder / "2" / "manifest.json").unlink()  # as if the deletion of the old step had been interrupted
  (folder / "3" / "data" / "metadata").write_text("{}")
  with pytest.raises(CheckpointError, match=r"data/metadata has 2 bytes instead of .*no older step is intact"):
    checkpoint.restore_params(folder)


def test_leftovers_are_ignored_and_cleaned(folder):
  shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")  # a save that was killed
  shutil.rmtree(folder / "2" / "state")  # a deletion that was killed
  assert checkpoint.steps(folder) == [2, 3]
  checkpoints = Checkpoints(folder)
  assert_same(checkpoints.restore(make_state())[0], make_state(3))
  checkpoints.save(4, make_state(4), data_state={}, config={}, wait=True)
  assert sorted(path.name for path in folder.iterdir()) == ["3", "4"]
  checkpoints.close()


# One process imports everything, then forks writers and kills them: each would need seconds to start by itself.
KILLED = """
  import os, random, select, signal, sys, time
  import numpy as np
  from tokred.checkpoint import Checkpoints

  def state(step):
    return {"step": np.int32(step), "params": {str(i): np.full((64, 1024), step, np.float32) for i in range(6)}}

  def writer(pipe):
    checkpoints = Checkpoints(sys.argv[1])
    step = checkpoints.latest_step() or 0
    if step:
      restored, data_state = checkpoints.restore(state(0))
      assert data_state == {"index": step} and restored["step"] == step
      assert all((leaf == step).all() for leaf in restored["params"].values())
    for step in range(step + 1, 1 << 30):
      checkpoints.save(step, state(step), data_state={"index": step}, config={}, wait=step == 1)
      os.write(pipe, b"r")

  random.seed(0)
  latest = []
  for trial in range(8):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
      try:
        writer(write)
      except BaseException as error:
        print("writer failed", trial, repr(error), flush=True)
      os._exit(1)
    os.close(write)
    assert select.select([read], [], [], 30)[0] and os.read(read, 1) == b"r", "no writer"
    time.sleep(random.uniform(0, 0.4))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    names = os.listdir(sys.argv[1])
    latest.append(max((int(name) for name in names if name.isdecimal()), default=0))
    print(latest[-1], "during a save" if any("tmp" in name for name in names) else "between saves", flush=True)
  assert latest == sorted(latest), latest
"""


def test_sigkill_at_any_moment(tmp_path):
  process = run_python(f"import sys; sys.argv.append({str(tmp_path)!r})\n" + textwrap.dedent(KILLED))
  out, err = process.communicate(timeout=100)
  assert process.returncode == 0 and "failed" not in out, out + err
  assert "during a save" in out, out
  step = checkpoint.steps(tmp_path)[-1]
  params = checkpoint.restore_params(tmp_path)
  assert all((leaf == step).all() for leaf in params.values())


FULL = """
  import resource, signal, sys
  import numpy as np
  from absl import logging
  from tokred.checkpoint import CheckpointError, Checkpoints, restore_params

  logging.set_verbosity(logging.INFO)  # as under absl.app
  state = lambda step: {"params": {"x": np.random.default_rng(step).normal(size=1 << 18)}}
  checkpoints = Checkpoints(sys.argv[1], keep=1)  # the old one goes only when the new one is there
  checkpoints.save(1, state(1), data_state={}, config={}, wait=True)
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  free = resource.getrlimit(resource.RLIMIT_FSIZE)
  for limit in (1 << 20, 100):  # in the arrays; in the first small file
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))
    checkpoints.save(2, state(2), data_state={}, config={})  # asynchronous: the error comes later
    try:
      checkpoints.save(3, state(3), data_state={}, config={})
      checkpoints.wait()
    except CheckpointError as error:
      print(error)
    try:
      checkpoints.wait()
    except CheckpointError as error:
      print(error)
  resource.setrlimit(resource.RLIMIT_FSIZE, free)
  assert (restore_params(sys.argv[1])["x"] == state(1)["params"]["x"]).all()
  checkpoints.save(4, state(4), data_state={}, config={}, wait=True)  # room again
  checkpoints.close()
"""


def test_full_disk(tmp_path):
  # A limit on the size of files fails like a full disk, and needs no mount.
  process = run_python(f"import sys; sys.argv.append({str(tmp_path)!r})\n" + textwrap.dedent(FULL))
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  message = (
    f"{tmp_path}: step 2 not saved: the disk is full (File too large): make room, then run the same command again"
  )
  assert all(line.endswith("; the last good checkpoint is step 1") for line in out.splitlines())
  assert out.count(message) == 2, out
  assert "Traceback" not in err and " I " not in err and not err.startswith("I"), err
  assert checkpoint.steps(tmp_path) == [4] and len(list(tmp_path.iterdir())) == 1


def test_half_deleted_step_is_saved_anew(folder):
  shutil.rmtree(folder / "3" / "state")
  (folder / "3" / "manifest.json").unlink()
  checkpoints = Checkpoints(folder)
  checkpoints.save(3, make_state(3), data_state={}, config={}, wait=True)
  assert_same(checkpoints.restore(make_state())[0], make_state(3))
  checkpoints.close()


def test_two_processes(tmp_path):
  code = f"""
    import jax, numpy as np
    from tokred import sharding
    from tokred.checkpoint import CheckpointError, Checkpoints, restore_params
    sharding.initialize_distributed()
    me = jax.process_index()
    mesh = sharding.make_mesh({{"data": 1, "fsdp": -1, "tensor": 1}})
    make = lambda: {{"params": {{"mlp": {{"fc1": {{"kernel": jax.numpy.arange(64.0).reshape(16, 4)}}}}}}}}
    state = sharding.init_sharded(make, mesh=mesh)
    checkpoints = Checkpoints({str(tmp_path)!r})
    for step in (1, 2):
      checkpoints.save(step, state, data_state={{"index": [me, "x" * me]}}, config={{}})
    checkpoints.wait()
    restored, data_state = checkpoints.restore(sharding.abstract_sharded(make, mesh=mesh))
    kernel = restored["params"]["mlp"]["fc1"]["kernel"]
    for shard in kernel.addressable_shards:
      assert (np.asarray(shard.data) == np.arange(64.0).reshape(16, 4)[shard.index]).all()
    assert kernel.sharding.spec[0] == "fsdp" and data_state == {{"index": [me, "x" * me]}}
    if me == 0:
      import pathlib
      pathlib.Path({str(tmp_path)!r}, "2", "manifest.json").unlink()
    try:
      checkpoints.restore(sharding.abstract_sharded(make, mesh=mesh))
    except CheckpointError as error:
      print(me, error)
    checkpoints.close()
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
  flags = "--xla_force_host_platform_device_count=2"
  processes = [run_python(code, **names, JAX_PROCESS_ID=str(i), XLA_FLAGS=flags) for i in range(2)]
  try:
    outputs = [process.communicate(timeout=60) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (out, err) in zip(processes, outputs, strict=True):
    assert process.returncode == 0 and "is damaged" in out, err
  assert "process 0 finds it damaged" in outputs[1][0]
  # One process cannot be in two places of the data.
  checkpoints = Checkpoints(tmp_path)
  shutil.rmtree(tmp_path / "2")
  target = {"params": {"mlp": {"fc1": {"kernel": np.zeros((16, 4), np.float32)}}}}
  with pytest.raises(CheckpointError, match=r"data iterators of 2 processes.*there are 1"):
    checkpoints.restore(target)
  checkpoints.close()


def test_signal_is_left_alone(tmp_path):
  # Orbax may take SIGTERM for itself; saving on SIGTERM is the training loop's.
  before = signal.getsignal(signal.SIGTERM)
  save(tmp_path, 1)
  assert signal.getsignal(signal.SIGTERM) is before
