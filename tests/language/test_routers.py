"""Tokens that go round layers of a language model: the cache, unequal prompts, rules, what training sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from languages import QUICK, batch, check_cache, learned

from tokred import tokens as tk
from tokred.reducers.router import Router, by_frame

MOD = dict(stack="llm", reducer="router", layers=(0,), keep=0.5, gate="sigmoid")
GAMMA = dict(stack="llm", reducer="gamma_mod", layers=(0, 1), keep=0.5)
ROUTERS = {
  "vision": dict(a=MOD),
  "text": dict(a=dict(MOD, text=True)),
  "predictor": dict(a=dict(MOD, text=True, predictor=0.1, rate="threshold", threshold=0.0, keep=1.0)),
  "threshold": dict(a=dict(MOD, text=True, rate="threshold", threshold=0.1, keep=0.8, gate="raw")),
  "frame": dict(a=dict(MOD, frame=4, keep=0.25)),
  "gamma": dict(a=GAMMA),
  "gamma_release": dict(a=dict(GAMMA, rate="threshold", threshold=0.4, keep=1.0, position="reindex")),
  "behind_a_cut": dict(
    a=dict(MOD, text=True, layers=(1,)), b=dict(stack="llm", reducer="topk", score="token_norm", layers=(0,), keep=0.6)
  ),
}
FAST = ("text", "gamma_release")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.thorough] * (n not in FAST)) for n in ROUTERS])
def test_laws(name):
  module, params = learned(ROUTERS[name], depth=2)
  cache, _, _ = check_cache(module, params)
  routed = [layer for layer in range(2) if cache.there[layer] is not None]
  assert routed == sorted({s.layer for s in module.sites.spots if s.place == "around"})
  held, dense = float(cache.held.sum()), (14 + 16 + 2 * 3) * 2 * 2 * 2 * 8 * 4
  assert held < dense and all(cache.holds(layer).sum() < 14 + 16 + 6 for layer in routed)


def test_frames_are_on_their_own():
  """Of frames of 4, 4 and 2 visual tokens the best one of each goes in; text does, always."""
  free = np.array([[0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0]], bool)
  score = jnp.asarray([[9, 0, 1, 3, 2, 9, 7, 6, 5, 4, 1, 2, 9]], jnp.float32)
  tokens = tk.start(jnp.zeros((1, 13, 2))).replace(protected=jnp.asarray(~free))
  assert Router(frame=4).count(0.25, 13, 3, 10) == 6
  plan = by_frame(tokens, score, 6, 4)
  np.testing.assert_array_equal(np.flatnonzero(plan.owner[0] >= 0), [0, 3, 5, 6, 11, 12])
  assert Router(frame=4).count(0.75, 13, 3, 10) == 3 + 3 + 3 + 2  # the last frame has no more
  plan = by_frame(tokens, score, jnp.array([11]), 4)
  np.testing.assert_array_equal(np.flatnonzero(plan.owner[0] < 0), [1, 9])


@pytest.mark.parametrize("name", ["gamma", pytest.param("predictor", marks=pytest.mark.thorough)])
def test_training(name):
  """Answers always go in where the prompt is routed; gradients are finite and reach the router."""
  # By a threshold nothing is explored: training takes the best, and the predictor learns to tell them.
  sites = dict(a=dict(MOD, text=True, predictor=0.1)) if name == "predictor" else ROUTERS[name]
  module, params = learned(sites, depth=2)
  ids, mask, protected = batch()
  last = np.array([11, 11])

  @functools.partial(jax.jit, compiler_options=QUICK)
  def slope(params):
    def loss(params):
      out = module.apply({"params": params}, ids, mask=mask, protected=protected, last=last, train=True, mode="mask")
      return jax.nn.log_softmax(tk.restore(out.logits, out.tokens.owner))[:, -1, 3].sum(), out.aux

    return jax.grad(loss, has_aux=True)(params)

  grads, aux = slope(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(leaf).all(), path
  if name == "gamma":
    assert (np.asarray(grads["reduce"]["kernel"]) != 0).any()
    assert aux["reduce/a/loss_router"][0].shape == (2,)
  else:
    assert (np.asarray(grads["block_0"]["reduce"]["a"]["router"]["kernel"]) != 0).any()
