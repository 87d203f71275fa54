"""Two processes on this machine, joined by jax.distributed, train as one process does."""

import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import micro
import pytest

import tokred
from tokred import checkpoint, evaluate, sharding
from tokred.train.loop import train

FOLDER = Path(__file__).parent
CODE = """
  import signal, sys
  import jax, micro
  from tokred.train import loop, signals
  leave = int(sys.argv[2])

  class AtStep(signals.Caught):
    def _any_asked(self, step):
      asked = jax.process_index() == 1 and 0 < leave <= step  # one of them is asked, and both leave
      self.asked = signal.SIGTERM if asked else 0
      return super()._any_asked(step)

  signals.Caught, signals.LOOK_EVERY = AtStep, 2
  summary = loop.train(micro.two_processes(), sys.argv[1])
  print("counts", summary["counts"])
"""
ANSWERS = """
  import jax, micro, tokred
  from tokred import evaluate, sharding
  sharding.initialize_distributed()
  model, share = tokred.build(micro.vlm()).init(0), slice(2 * jax.process_index(), 2 * jax.process_index() + 2)
  batches = [{name: a[share] for name, a in micro.talks(lengths).items()} for lengths in ((3, 9, 6, 24), (12, 3, 0, 0))]
  mesh = sharding.make_mesh(model.config.mesh)
  found = evaluate.run(model.module, jax.device_get(model.params), batches, "gather", mesh)
  print("loss", found["loss"], found["examples"])
"""


def two(environment, code, *arguments):
  """Exit code, stdout and stderr of both."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
  command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
  processes = [
    subprocess.Popen(
      command,
      cwd=FOLDER.parents[1],
      env=environment | names | {"JAX_PROCESS_ID": str(i), "PYTHONPATH": f"{FOLDER}:{FOLDER.parents[1]}"},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
  workdir, real = tmp_path_factory.mktemp("one"), sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", lambda mesh: real(mesh, jax.devices()[:2]))
    train(micro.two_processes(), workdir)
  return workdir


def assert_as_one(one, workdir):
  micro.assert_close(micro.state(one), micro.state(workdir), atol=2e-6)
  a, b = micro.metrics(one), micro.metrics(workdir)
  assert [line["step"] for line in a] == [line["step"] for line in b]  # written once, by process 0
  for x, y in zip(a, b, strict=True):
    assert x == pytest.approx(y, rel=1e-4, abs=1e-5)


def test_two_processes_train_stop_and_resume(one_process, cached_environment, tmp_path):
  left = two(cached_environment, CODE, tmp_path, 3)
  assert [code for code, _, _ in left] == [143, 143], left
  assert "SIGTERM: saved step 4 of 6" in left[0][2] and "SIGTERM" not in left[1][2]
  assert checkpoint.steps(tmp_path / checkpoint.FOLDER)[-1] == 4
  resumed = two(cached_environment, CODE, tmp_path, 0)
  assert [code for code, _, _ in resumed] == [0, 0], resumed
  counts = [out.splitlines()[-1] for _, out, _ in resumed]  # gloo talks before it
  assert counts[0] == counts[1] and counts[0].startswith("counts [17, ")
  assert "at step 4 of 6" in resumed[0][2]
  assert_as_one(one_process, tmp_path)
  assert (tmp_path / "summary.json").is_file() and len(list(tmp_path.glob("events*"))) == 2


def test_two_processes_answer_as_one(cached_environment):
  """Their prompts differ in length, and of the last batch one has nothing but padding."""
  model = tokred.build(micro.vlm()).init(0)
  batches = [micro.talks(lengths) for lengths in ((3, 9, 6, 24), (12, 3, 0, 0), (0, 0, 0, 0))]
  one = evaluate.run(model.module, model.params, batches, "gather")
  for code, out, err in two(cached_environment, ANSWERS):
    assert code == 0, err
    _, loss, examples = out.splitlines()[-1].split()
    assert int(examples) == one["examples"] == 6 and float(loss) == pytest.approx(one["loss"], rel=1e-5)
