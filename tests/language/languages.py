"""Golden data of the language side (shared/golden/vlm, its README says what it is), and a tiny model of our own."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred import tokens as tk
from tokred.nn import decoder
from tokred.nn.decoder_layer import Shape
from tokred.pretrained.language import load_language

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "vlm"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}")
TINY = dict(vocab=50, width=32, depth=3, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, max_length=64)


def recorded(name):
  with np.load(GOLDEN / f"{name}.npz") as file:
    return dict(file)


@functools.cache
def golden(name, sites=()):
  """Module and parameters of a recorded model; sites as a tuple of (name, items)."""
  return load_language(GOLDEN / "hf" / name, {site: dict(items) for site, items in sites})


@functools.cache
def parameters(**fields):
  module = decoder.make(Shape(**TINY | fields))
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  # Larger than at the start, so that attention prefers some tokens to others.
  return jax.tree.map(lambda a: a * 2 if a.ndim > 1 else a, params)


def tiny(sites=None, **fields):
  return decoder.make(Shape(**TINY | fields), sites), parameters(**fields)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def forward(module, params, known=None, mode="gather", **inputs):
  """The whole sequence, with logits where the ids were."""
  out = module.apply({"params": params}, **inputs, known=known, mode=mode)
  return tk.restore(out.logits, out.tokens.owner), out
