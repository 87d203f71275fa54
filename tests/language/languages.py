"""Golden data of the language side (shared/golden/vlm, its README says what it is), and a tiny model of our own."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred import tokens as tk
from tokred.nn import budget, decoder
from tokred.nn.decoder_layer import Shape
from tokred.pretrained.language import load_language

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "vlm"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}")
QUICK = {"xla_backend_optimization_level": 0}  # everything here compiles for longer than it runs
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


def learned(sites, seed=1, **fields):
  """The tiny model with sites that have parameters, drawn so that they prefer some tokens to others."""
  module, rng = decoder.make(Shape(**TINY | fields), sites), np.random.default_rng(seed)
  streams = dict(params=jax.random.key(0), reduce=jax.random.key(1))
  init = lambda: module.init(streams, jnp.zeros((1, 2), jnp.int32), mode="mask", train=True)["params"]
  base = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(parameters(**fields))}

  def value(path, leaf):
    known = base.get(jax.tree_util.keystr(path))
    drawn = rng.normal(size=leaf.shape) * (1.0 if leaf.ndim < 2 else 2.0 / np.sqrt(leaf.shape[0]))
    return jnp.asarray(drawn, leaf.dtype) if known is None else known

  return module, jax.tree_util.tree_map_with_path(value, jax.eval_shape(init))


def batch():
  """Two prompts: 6 + 3 words around 7 visual tokens, padded on the left; 3 + 4 words around 5 of them and 4."""
  rng = np.random.default_rng(3)
  kinds = ["p" * 2 + "t" * 4 + "v" * 7 + "t" * 3, "t" * 2 + "v" * 5 + "t" * 4 + "v" * 4 + "t"]
  kinds = np.array([list(kind) for kind in kinds])
  return rng.integers(0, 50, kinds.shape).astype(np.int32), kinds != "p", kinds != "v"


def check_cache(module, params, new=3):
  """Decoding with a cache is recomputing without one, and a row gets what it gets alone; one compilation for all."""
  ids, mask, protected = batch()
  known = budget.census(mask, protected)
  text = np.random.default_rng(4).integers(0, 50, (2, new)).astype(np.int32)
  whole = np.concatenate([ids, text], 1)
  there, stays = (np.concatenate([a, np.ones((2, new), bool)], 1) for a in (mask, protected))
  last = jnp.full(2, ids.shape[1] - 1)
  longer = dataclasses.replace(known, text=known.text + new)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(params):
    call = functools.partial(module.apply, {"params": params})
    full = call(whole, mask=there, protected=stays, last=last, known=longer)
    masked = call(whole, mask=there, protected=stays, last=last, mode="mask")
    start = call(ids, mask=mask, protected=protected, room=new, known=known, method="prefill")

    def step(cache, ids):
      logits, cache = call(ids, cache, method="decode")
      return cache, logits

    cache, more = jax.lax.scan(step, start.cache, text.T)
    decoded = jnp.concatenate([start.logits, more.swapaxes(0, 1)], 1)
    own, stays_alone = mask[0], protected[:1, mask[0]]
    out = call(ids[:1, own], protected=stays_alone, known=budget.census(stays_alone | True, stays_alone))
    alone = tk.restore(out.logits, out.tokens.owner)[0]
    at_ids = [tk.restore(out.logits, out.tokens.owner) for out in (full, masked)]
    return *at_ids, decoded, alone, cache, (full.tokens.owner, masked.tokens.owner), full.aux

  full, masked, decoded, alone, cache, owners, aux = run(params)
  np.testing.assert_allclose(masked, full, atol=1e-4)
  np.testing.assert_array_equal(*(np.asarray(o) >= 0 for o in owners))
  np.testing.assert_allclose(decoded, np.asarray(full)[:, ids.shape[1] - 1 :], atol=1e-4)
  np.testing.assert_allclose(alone, np.asarray(full)[0, : ids.shape[1]][mask[0]], atol=1e-4)
  assert (np.asarray(owners[0])[there & stays] >= 0).all()
  return cache, aux, np.asarray(owners[0])
