"""Eight emulated devices on the CPU, and quick compilation, set before anything imports jax."""

import os

# Everything here compiles for longer than it runs, so LLVM need not try hard.
WANTED = {"--xla_force_host_platform_device_count": "8", "--xla_backend_optimization_level": "0"}

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([flags, *(f"{k}={v}" for k, v in WANTED.items() if k not in flags)]).strip()

# What `make fast` leaves out: more than 20 s of compiling, or many processes.
SLOW = ("test_bad_input", "test_cli", "test_demo", "test_export", "test_golden", "test_kills", "test_laws")
SLOW += (
  "test_notebook",
  "test_two_processes",
  "test_pairs",
  "test_fusion",
  "test_criteria",
  "test_routing",
  "test_spa",
)
SLOW += ("test_export_formats", "test_recover", "test_sweep", "test_configs", "test_mctf", "test_loop")

# The longest files first: a worker takes a file at a time, and the last one should not wait for a long one.
FIRST = (
  "test_laws",
  "test_kills",
  "test_loop",
  "test_golden",
  "test_pairs",
  "test_configs",
  "test_export",
  "test_routing",
)


def pytest_collection_modifyitems(items):
  import pytest

  items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
  for item in items:
    if item.path.stem in SLOW:
      item.add_marker(pytest.mark.slow)
