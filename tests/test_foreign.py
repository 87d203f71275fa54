"""examples/foreign_*.py: a reducer in transformers written outside tokred, in Linen and in NNX."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

FOLDER = Path(__file__).parents[1] / "examples"
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def example(name):
  spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def loss(logits):
  return jnp.sum(logits * jnp.arange(10.0))


def finite(grads):
  return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_linen():
  foreign = example("foreign_linen")
  dense, reduced = foreign.Transformer(depth=2), foreign.Reduced(depth=2)
  params = jax.jit(dense.init)(jax.random.key(1), IMAGES)
  run = jax.jit(reduced.apply, static_argnames=("train", "mode"))
  gathered, masked = (run(params, IMAGES, mode=mode) for mode in ("gather", "mask"))
  np.testing.assert_allclose(gathered, masked, rtol=1e-5, atol=1e-6)
  assert np.abs(gathered - jax.jit(dense.apply)(params, IMAGES)).max() > 1e-4  # something was merged
  grads = jax.jit(jax.grad(lambda p: loss(reduced.apply(p, IMAGES, train=True, mode="mask"))))(params)
  assert finite(grads) and np.abs(grads["params"]["patches"]["kernel"]).max() > 0


def test_nnx():
  foreign = example("foreign_nnx")

  @nnx.jit
  def make():
    rngs = nnx.Rngs(0, reduce=1)
    return foreign.Reduced(foreign.Transformer(rngs, depth=2), IMAGES, rngs)

  model = make()
  run = nnx.jit(lambda m, mode: m(IMAGES, mode=mode), static_argnames="mode")
  np.testing.assert_allclose(run(model, mode="gather"), run(model, mode="mask"), rtol=1e-5, atol=1e-6)
  grads = nnx.to_pure_dict(nnx.jit(nnx.grad(lambda m: loss(m(IMAGES, train=True, mode="mask"))))(model))
  selector = jax.tree.leaves(grads["select"])  # decisions are sampled: it learns through its gates
  assert finite(grads) and selector and all(np.abs(leaf).max() > 0 for leaf in selector)


@pytest.mark.parametrize("name", ["foreign_linen", "foreign_nnx"])
def test_what_concerns_tokred_is_short(name):
  text = (FOLDER / f"{name}.py").read_text()
  part = text[text.index("from here\n") : text.index("# --- to here")].splitlines()[1:]
  assert len([line for line in part if line.strip()]) <= 20
