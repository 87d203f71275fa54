"""Recorded numbers of training-free methods (shared/golden/vlm, with a README), and how ours are run."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import quick

from tokred import tokens as tk
from tokred.tokens import Tokens

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "vlm"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}")


@functools.cache
def recorded(name):
  """Arrays of a file below fn/, or of llava_reduce/."""
  path = GOLDEN / (name if "/" in name else f"fn/{name}")
  with np.load(f"{path}.npz") as file:
    return dict(file)


def tokens_of(x, prefix=0, **feats):
  """Tokens (B, N, D) or one row (N, D), the first `prefix` protected, with features in their state names or own."""
  x = jnp.asarray(x, jnp.float32)
  x = x if x.ndim == 3 else x[None]
  feats = {name.replace("state_", "state/"): jnp.asarray(value, jnp.float32) for name, value in feats.items()}
  return tk.start(x, prefix).replace(feats=feats)


@functools.partial(jax.jit, static_argnames=("module", "keep", "mask"), compiler_options=quick())
def _run(module, tokens, keep, mask):
  run = functools.partial(module.apply, {}, tokens, train=False)
  return run(keep, mode="gather"), run(jnp.asarray(keep), mode="mask") if mask else None


def reduced(module, tokens, keep, mask=True) -> tuple[Tokens, dict]:
  """What comes out in gather mode, and the report; mask mode must give the same, where it is asked."""
  (gathered, report), masked = _run(module, tokens, int(keep), mask)
  if masked is None:
    return gathered, report
  masked = masked[0]
  k = gathered.x.shape[1]
  np.testing.assert_array_equal(masked.alive[:, :k], gathered.alive)
  assert not np.asarray(masked.alive[:, k:]).any()
  np.testing.assert_array_equal(masked.owner, gathered.owner)
  there = np.asarray(gathered.alive)
  for ours, theirs in ((masked.x, gathered.x), (masked.size, gathered.size), (masked.position, gathered.position)):
    np.testing.assert_allclose(np.asarray(ours[:, :k])[there], np.asarray(theirs)[there], atol=1e-5)
  return gathered, report


def order(tokens, prefix=0):
  """Original places of the survivors in each row, prefix tokens left out and places counted behind them."""
  rows = zip(np.asarray(tokens.position), np.asarray(tokens.alive), strict=True)
  return [[int(p) - prefix for p in row[there] if p >= prefix] for row, there in rows]
