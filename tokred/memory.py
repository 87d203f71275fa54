"""Where a model compiled for CPU finds the memory that its calls need, and what helps where a device has none left."""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator

import jax

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, as malloc.h numbers them


@functools.cache
def keep_freed() -> bool:
  """Has glibc keep for the next call what a call on CPU has freed; once a process.

  XLA asks for all temporaries of a call anew, and glibc takes blocks of more than 32 MiB from the system and gives them
  back each time: ViT-S at batch 16 has 11 000 page faults in a call, which cost 25 ms of 470 and, since the first block
  is as large in a reduced model, 25 of 280 there.  The process then stays as large as it ever was.

  Returns:
    Whether this was done: not where something else than a CPU computes or is not on glibc, nor where the environment
    tunes malloc itself (GLIBC_TUNABLES, MALLOC_...).
  """
  tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
  if tuned or jax.default_backend() != "cpu" or os.name != "posix":
    return False
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # macOS and musl have none
  return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, 2**30) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


@contextlib.contextmanager
def advice(text: str) -> Iterator[None]:
  """For a function that it decorates: where a device has no memory left, what to change.

  Raises:
    MemoryError: with what XLA says of the amount, and `text`.
  """
  try:
    yield
  except RuntimeError as error:  # XLA's: it has no type for this
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said and "Out of memory" not in said:
      raise
    line = next((line for line in said.splitlines() if "emory" in line), said.splitlines()[0])
    raise MemoryError(f"the device's memory is full ({line.strip().rstrip('.')}); {text}") from error
