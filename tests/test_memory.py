"""tokred.memory: freed blocks stay with the process, unless somebody else tunes malloc."""

import os
import platform
import subprocess
import sys

import jax
import pytest

import tokred
from tokred import memory, model
from tokred.train import loop

SMALL = dict(variant="mu/2", width=8, depth=1, num_heads=1, mlp_dim=8, image_size=(4, 4), channels=1, num_classes=2)

FAULTS = """
import resource, sys, ctypes
from tokred.memory import keep_freed
kept = keep_freed() if sys.argv[1] == "keep" else False
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def call():
  block = libc.malloc(2**27)  # above the 32 MiB from which glibc gives blocks back
  ctypes.memset(block, 1, 2**27)
  libc.free(block)
call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
call()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how, **env):
  """What `keep_freed` returned, and the page faults of a second block as large as the first."""
  clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
  done = subprocess.run(
    [sys.executable, "-c", FAULTS, how],
    env=clean | {"JAX_PLATFORMS": "cpu"} | env,
    capture_output=True,
    text=True,
    check=True,
  )
  kept, count = done.stdout.split()
  return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library gives memory back by rules of its own")
def test_a_second_call_finds_its_memory():
  assert faults("leave")[1] > 50  # 2^27 bytes are 64 huge pages, or 32768 of the usual ones
  assert faults("keep") == (True, pytest.approx(0, abs=8))


def test_who_tunes_malloc_is_left_alone():
  assert faults("keep", MALLOC_ARENA_TEST="8")[0] is False


def test_a_model_that_runs_asks_for_it(monkeypatch):
  asked = []
  monkeypatch.setattr(memory, "keep_freed", lambda: asked.append(True))
  model.forward.cache_clear()
  tokred.build(dict(model=SMALL)).init()(jax.numpy.zeros((1, 4, 4, 1)))
  assert asked == [True]


def test_a_full_device_is_told_with_what_helps(tmp_path, monkeypatch):
  """As XLA says it; with a real one some versions end the process."""

  def full(*_):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8796093022208 bytes.")

  monkeypatch.setattr(loop, "_first_state", full)
  config = dict(model=SMALL | dict(num_classes=10), data=dict(name="digits"), train=dict(steps=1))
  with pytest.raises(MemoryError, match=r"memory is full \(.*22208 bytes\); raise config.train.accumulate"):
    loop.train(config, tmp_path)
  with pytest.raises(RuntimeError, match=r"^another$"), memory.advice("take fewer"):
    raise RuntimeError("another")
