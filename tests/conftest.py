"""Eight emulated devices on the CPU, and quick compilation, set before anything imports jax."""

import os

# Everything here compiles for longer than it runs, so LLVM need not try hard.
WANTED = {"--xla_force_host_platform_device_count": "8", "--xla_backend_optimization_level": "0"}

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([flags, *(f"{k}={v}" for k, v in WANTED.items() if k not in flags)]).strip()

# What `make fast` leaves out: more than 20 s of compiling, or many processes.
SLOW = ("test_bad_input", "test_cli", "test_demo", "test_export", "test_golden", "test_kills", "test_laws")
SLOW += ("test_notebook", "test_two_processes")


def pytest_collection_modifyitems(items):
  import pytest

  for item in items:
    if item.path.stem in SLOW:
      item.add_marker(pytest.mark.slow)
