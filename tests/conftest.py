"""Eight emulated devices on the CPU, and quick compilation, set before anything imports jax."""

import os

# Everything here compiles for longer than it runs, so LLVM need not try hard.
WANTED = {"--xla_force_host_platform_device_count": "8", "--xla_backend_optimization_level": "0"}

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([flags, *(f"{k}={v}" for k, v in WANTED.items() if k not in flags)]).strip()
