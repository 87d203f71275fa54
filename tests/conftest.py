"""Eight emulated devices on the CPU, and quick compilation, set before anything imports jax."""

import gc
import os
import shutil
import tempfile
from importlib import metadata

import pytest

# Everything here compiles for longer than it runs, so LLVM need not try hard.
WANTED = {
  "--xla_force_host_platform_device_count": "8",
  "--xla_backend_optimization_level": "0",
  "--xla_llvm_disable_expensive_passes": "true",
  "--xla_cpu_parallel_codegen_split_count": "1",  # no second core is free
}
if metadata.version("jaxlib").startswith("0.10."):  # newer ones end the process over a flag that is gone
  WANTED["--xla_cpu_use_fusion_emitters"] = "false"  # a fifth of the time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([flags, *(f"{k}={v}" for k, v in WANTED.items() if k not in flags)]).strip()

# What a worker has compiled it need not compile again: tests jit the same model anew, and so do the processes that they
# start.  The folder is its own and new, so that neither another run nor another worker has a say in what comes out.
COMPILED = tempfile.mkdtemp(prefix="tokred-compiled-")
os.environ |= {
  "JAX_COMPILATION_CACHE_DIR": COMPILED,
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

gc.set_threshold(50_000, 50, 100)  # tracing makes objects by the million and hardly a cycle: a tenth of the time

# What `make fast` leaves out: more than 20 s of compiling, or many processes.
SLOW = (
  "test_alarms", "test_bad_input", "test_calibrate", "test_clca", "test_cli", "test_configs", "test_criteria",
  "test_demo", "test_drawn", "test_drawn_sites", "test_export", "test_export_formats", "test_language_cost",
  "test_finetune", "test_foreign", "test_fusion", "test_generate", "test_golden", "test_kills", "test_laws",
  "test_llm_sites", "test_loading", "test_loop", "test_mctf", "test_model", "test_notebook",
  "test_onnx", "test_own_reducer", "test_pairs", "test_pipeline", "test_readme",
  "test_recover", "test_router_gates", "test_routing", "test_selectors", "test_slots", "test_spa", "test_stvit",
  "test_signals", "test_sweep", "test_two_processes",
  "test_anyres", "test_arank", "test_bench_vlm", "test_conversations", "test_every_reducer", "test_export_vlm",
  "test_learned_cuts", "test_crops",
  "test_learned_shares", "test_merging", "test_methods", "test_projectors", "test_qwen", "test_recorded",
  "test_recorded_routers", "test_routers", "test_scoring", "test_segments", "test_selection", "test_training",
  "test_shared_rows", "test_video", "test_vit", "test_vlm", "test_vlm_reduce", "test_huggingface", "test_vlm_files",
)  # fmt: skip

# The longest files first: a worker takes a file at a time, and the last one should not wait for a long one.
FIRST = (
  "test_laws", "test_loop", "test_mctf", "test_golden", "test_training", "test_cli", "test_sweep", "test_two_processes",
  "test_kills", "test_pairs", "test_bad_input", "test_vit", "test_configs", "test_selectors", "test_routing",
  "test_stvit", "test_clca",
)  # fmt: skip


def pytest_unconfigure():
  shutil.rmtree(COMPILED, ignore_errors=True)


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
  for item in items:
    if item.path.stem in SLOW:
      item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
  gc.freeze()  # what tests import stays: no collection need look through it


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_go():
  """A worker compiles thousands of programs, which fill gigabytes, and XLA crashed among them."""
  yield
  import jax

  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="module")
def one_device():
  """From here to the end of a file, meshes have one of the eight devices unless a test names others; the real maker.

  To be asked for by whatever trains first, a fixture too: eight devices compile for far longer, and learn the same.
  """
  import jax

  from tokred import sharding

  real, patch = sharding.make_mesh, pytest.MonkeyPatch()
  patch.setattr(sharding, "make_mesh", lambda mesh, devices=None: real(mesh, devices or jax.devices()[:1]))
  yield real
  patch.undo()
