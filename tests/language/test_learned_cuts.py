"""Learned pruning in a language model: the laws of each method, gradients, losses, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from languages import QUICK, batch, check_cache, learned

from tokred.nn import budget
from tokred.reducers.atp import spread
from tokred.reducers.dyvte import exit_loss
from tokred.reducers.glimpse import mask_loss
from tokred.reducers.stts import likeness

LLM = dict(stack="llm", layers=(0,), place="before")
CUTS = {
  "qtsplus": dict(LLM, reducer="qtsplus", num_heads=4, num_kv_heads=2, high=0.8),
  "covipal": dict(LLM, reducer="covipal", keep=0.5, hidden=16),
  "atp": dict(LLM, reducer="atp", layers=(1,), grid=3),
  "dyvte": dict(LLM, reducer="dyvte", layers=(0, 1)),
  "glimpse": dict(LLM, reducer="glimpse", hidden=16, num_heads=2, position="reindex"),
  "gumbel": dict(LLM, reducer="gumbel", keep=0.5),
  "autoencoder": dict(LLM, reducer="autoencoder", keep=0.5, num_layers=1),
  "attention_gate": dict(LLM, reducer="attention_gate", place="ahead", hidden=8),
}
DRAWN = {"dyvte": 2, "glimpse": 2}  # seeds of parameters with which some visual tokens stay, and not all
FAST = ("qtsplus", "attention_gate")


def made(name, **fields):
  return learned(dict(a=CUTS[name] | fields), DRAWN.get(name, 1), depth=2)


def some(names, fast=FAST):
  return [pytest.param(name, marks=[pytest.mark.thorough] * (name not in fast)) for name in names]


@pytest.mark.parametrize("name", some(CUTS))
def test_laws(name):
  module, params = made(name)
  cache, _, owner = check_cache(module, params)
  if name == "attention_gate":
    assert (np.asarray(cache.held) < 2 * 2 * 2 * 8 * 4 * np.array([17, 19])).all()
  elif name != "dyvte":
    _, mask, protected = batch()
    left = ((owner[:, :16] >= 0) & mask & ~protected).sum(1)
    assert (left > 0).all() and (left < (mask & ~protected).sum(1)).any()


def test_a_gate_does_not_hold_what_has_left():
  cut = dict(LLM, reducer="topk", score="token_norm", keep=0.6)
  module, params = learned(dict(a=cut, b=dict(CUTS["attention_gate"], text=False)), depth=1)
  check_cache(module, params)


@pytest.mark.parametrize("name", some(CUTS, ("qtsplus",)))
def test_gradients(name):
  """They are finite, and the loss on what follows reaches every parameter that decides."""
  module, params = made(name)
  ids, mask, protected = batch()
  target = np.where(np.arange(16) % 2, 1.0, 0.0)[None].repeat(2, 0).astype(np.float32)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def slope(params):
    def loss(params):
      streams, inputs = (
        dict(reduce=jax.random.key(0)),
        dict(mask=mask, protected=protected, state={"state/target": target}),
      )
      out = module.apply({"params": params}, ids, **inputs, train=True, mode="mask", rngs=streams)
      own = [v.mean() for key, r in out.aux.items() if "/loss" in key for v in r.values()]
      return jnp.where(mask[:, -1:, None], jax.nn.log_softmax(out.logits), 0)[:, -1, 3].sum() + sum(own)

    return jax.grad(loss)(params)

  deciding = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(slope(params)):
    name = jax.tree_util.keystr(path)
    assert np.isfinite(leaf).all(), name
    if "'reduce'" in name and "bias" not in name:
      deciding += 1
      assert (np.asarray(leaf) != 0).any(), name
  assert deciding


@pytest.mark.thorough
def test_covipal_learns_from_a_deeper_layer():
  """Stage 1: nothing leaves, the loss falls as the scores come to order tokens as the guide's attention does."""
  module, params = learned(dict(a=CUTS["covipal"] | dict(keep=1.0, guide=1)), depth=2)
  ids, mask, protected = batch()
  last = np.array([15, 15])

  @jax.jit
  def step(params):
    def loss(own):
      merged = params | {"block_0": params["block_0"] | {"reduce": own}}
      out = module.apply({"params": merged}, ids, mask=mask, protected=protected, last=last, train=True, mode="mask")
      return out.aux["reduce/a/loss_guide"][0].mean()

    value, slope = jax.value_and_grad(loss)(params["block_0"]["reduce"])
    own = jax.tree.map(lambda p, g: p - 0.05 * jnp.sign(g), params["block_0"]["reduce"], slope)
    return value, params | {"block_0": params["block_0"] | {"reduce": own}}

  first, params = step(params)
  for _ in range(40):
    value, params = step(params)
  assert np.isfinite(first) and value < 0.5 * first


def test_spread_is_coarse_to_fine():
  """A grid of 4: its corner is in every sampling; (0, 2), (2, 0), (2, 2) in that of every second; the rest in none."""
  score = np.asarray(spread(jnp.arange(16)[None], 4)).reshape(4, 4)
  np.testing.assert_allclose(score, [[1, 0, 0.5, 0], [0, 0, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 0]])


def test_losses_of_regions_and_exits():
  """Two of four tokens are of the region.  At logits 0 dice = 1 - (2 + 1) / (2 + 2 + 1) = 0.4, cross-entropy log 2."""
  target = jnp.asarray([[1.0, 1, 0, 0, 1], [-1, -1, -1, -1, -1]])
  among = jnp.asarray([[True] * 4 + [False]] * 2)
  dice, bce = mask_loss(jnp.zeros((2, 5)), target, among)
  np.testing.assert_allclose(dice, [0.4, 0.0], atol=1e-6)
  np.testing.assert_allclose(bce, [np.log(2), 0.0], atol=1e-6)
  exits = exit_loss(jnp.asarray([[0.0, 0.0], [0.0, 2.0]]), jnp.asarray([True, False]))
  np.testing.assert_allclose(exits, [np.log(2), np.log(1 + np.e**2)], atol=1e-6)


def test_frames_that_repeat():
  """The second frame of a clip repeats the first but for its last token, which is turned; the next clip begins anew."""
  x = jnp.asarray([[[1.0, 0], [0, 2]], [[3, 0], [2, 0]], [[1, 0], [0, 1]], [[1, 1], [0, -1]]])
  np.testing.assert_allclose(likeness(x, 2), [[0, 0], [1, 0], [0, 0], [0.5**0.5, -1]], atol=1e-6)


def test_a_drawn_share_is_of_what_was_there_and_of_what_ships():
  """Gumbel in two layers: padding is no part of the share that the loss holds, and both keep rates are of the input."""
  module, params = made("gumbel", layers=(0, 1), keep=(0.75, 0.5))
  ids, mask, protected = batch()

  @functools.partial(jax.jit, compiler_options=QUICK)
  def drawn(mask):
    streams, inputs = dict(reduce=jax.random.key(0)), dict(mask=mask, protected=protected & mask)  # as `vlm` joins them
    return module.apply({"params": params}, ids, **inputs, train=True, mode="mask", rngs=streams)

  for there in (mask, mask & (np.arange(16) < 12)):
    out = drawn(there)
    alive = [np.asarray(out.aux[f"owner/{layer}"])[:, :16] >= 0 for layer in (0, 1)]
    visual = there & ~protected
    want = [(left & visual).sum(1) / visual.sum(1) for left in alive]
    share = [np.asarray(value) for _, value in sorted(out.aux["reduce/a/kept_share"].items())]
    np.testing.assert_allclose(share, want, atol=1e-6)
  assert [spot.wanted for spot in module.sites.spots] == [0.75, 0.5]
  known = budget.census(mask, protected & mask)
  out = jax.jit(lambda: module.apply({"params": params}, ids, mask=mask, protected=protected & mask, known=known))()
  left = (np.asarray(out.tokens.owner)[:, :16] >= 0) & mask & ~protected
  assert left.sum(1).tolist() == [4, 5]  # ceil(0.5 * 7) and ceil(0.5 * 9): of the input, not 3 and 4 of what arrives
  with pytest.raises(ValueError, match=r"sites\.a\.of='arriving'.*'gumbel'.*input"):
    made("gumbel", of="arriving")
