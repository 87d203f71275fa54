"""A-ViT against its authors' code and by hand: who halts, who is cut, what learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import MODES, backbone, forward, model, needs_golden, quick, recorded, reported
from test_routing import small

from tokred import config as defaults
from tokred import losses
from tokred import tokens as tk
from tokred.reducers.avit import AViT


@needs_golden
@pytest.mark.parametrize("mode", MODES)
def test_avit_halts_as_its_authors_do(mode):
  arrays, settings = recorded("avit_eval")
  halt = dict(reducer="avit", layers=tuple(range(6)), scale=settings["gate_scale"], center=settings["gate_center"])
  output, _ = forward(model("public_vit", dict(halt=halt)), backbone("public_vit"), arrays["images"], mode)
  np.testing.assert_allclose(output.logits, arrays["logits"], atol=2e-5)
  running = np.stack(reported(output, "halt", "depth"))
  halting = np.stack(reported(output, "halt", "halting"))
  np.testing.assert_allclose(halting[running > 0], arrays["halting_scores"][running > 0], atol=1e-5)
  np.testing.assert_allclose(reported(output, "halt", "ponder")[-1], arrays["rho"], atol=1e-5)
  np.testing.assert_array_equal(arrays["depth_counter"], running.sum(0))  # blocks that a token runs through


@pytest.mark.parametrize("mode", MODES)
def test_avit_by_hand(mode):
  """h = sigmoid(x_0).  Tokens of h = 1/2, 1/5 and 7/10 run through block 0, and two may go on: the first two, and not
  the third, which has halted most.  In block 1 the first has 1/2 again and stops, the other 1/5 + 3/10 goes on.

  The first: 4 / 2 + 8 / 2 = 6, and 2 layers and a remainder of 1/2.  As h rises in block 0 by h (1 - h) = 1/4, the
  remainder falls as much: the output by (4 - 8) / 4 = -1, ponder by 1/4.  The other has 0.2 x 4 + 0.3 x 8 so far.
  """
  logit = lambda h: np.log(h) - np.log(1 - h)
  tokens = tk.start(jnp.asarray([[[logit(0.5), 4], [logit(0.2), 4], [logit(0.7), 4]]], jnp.float32))
  block = lambda layer: AViT(layer=layer, depth=3, scale=1.0, center=0.0)

  def run(x):
    first, _ = block(0).apply({}, tokens.replace(x=x), 2, train=True, mode=mode)
    order = jnp.argsort(first.position[0, :2])
    known = jnp.asarray([[logit(0.5), 8], [logit(0.3), 8]], jnp.float32)
    second = first.replace(x=first.x.at[0, order].set(known))
    second, report = block(1).apply({}, second, 2, train=True, mode=mode)
    got = dict(second.feats, ponder=report["ponder"], position=first.position, mask=second.mask)
    got = {
      name.removeprefix("state/"): value[0, :2][jnp.argsort(second.position[0, :2])] for name, value in got.items()
    }
    return (got["output"][0, 1], got["ponder"][0]), got

  slopes, got = jax.jit(jax.jacobian(run, has_aux=True), compiler_options=quick())(tokens.x)
  np.testing.assert_array_equal(got["position"], [0, 1])
  np.testing.assert_array_equal(got["mask"], [0, 1])
  np.testing.assert_allclose(got["output"][:, 1], [6, 3.2], rtol=1e-6)
  np.testing.assert_allclose(got["ponder"], [2.5, 2], rtol=1e-6)
  np.testing.assert_allclose([slope[0, 0, 0] for slope in slopes], [-1, -0.25], rtol=1e-5)


def test_avit_with_a_capacity_cuts_who_has_halted_most():
  # h = sigmoid(0 x - 0) = 1/2: with eps 0.01 the sum is 1/2, 1, so every token stops in the second block; 10 of 17 go
  # on behind the first.  CLS: output = x_1 / 2 + x_2 / 2.
  halt = dict(reducer="avit", layers=(0, 1, 2, 3), scale=0.0, center=0.0, keep=(10, 10, 10, 10))
  module, params, images = small(dict(halt=halt))
  outs = {}
  for mode in MODES:
    output = jax.jit(lambda p, i, mode=mode: module.apply({"params": p}, i, mode=mode))(params, images)
    outs[mode] = output
    depth = np.stack([np.asarray(value)[:, :10].sum(1) for value in reported(output, "halt", "depth")])
    np.testing.assert_array_equal(depth, [[10, 10], [10, 10], [0, 0], [0, 0]])
  np.testing.assert_allclose(outs["mask"].features, outs["gather"].features, atol=1e-5)
  assert outs["gather"].tokens.x.shape[1] == 10


def test_avit_cuts_nothing_behind_the_last_block():
  # 17 tokens, of which 10 go on behind the first block; the 5 of the last one would be cut where outputs are complete.
  halt = dict(reducer="avit", layers=(0, 1, 2, 3), scale=0.0, center=0.0, keep=(10, 10, 10, 5))
  module, params, images = small(dict(halt=halt))
  assert jax.eval_shape(lambda: module.apply({"params": params}, images)).tokens.x.shape[1] == 10
  assert module.sites.counts() == (10, 10, 10, 10)


def test_halting_prior_by_hand():
  # Mean halting 0.2 and 0.6 are q = (1/4, 3/4); around block 1 the prior is (e^-1/2, 1) times 0.98 e^1/2, for the one
  # block before it has 0.98: p = (.98, .98 e^1/2 = 1.615747).  A token that has halted does not count.
  # (.98 log(.98 / .25) + 1.615747 log(1.615747 / .75)) / 2 = (.98 1.366092 + 1.615747 .767479) / 2 = 1.289411
  halting = [jnp.full((2, 3), 0.2), jnp.asarray([[0.6, 0.6, 9.0]] * 2)]
  running = [jnp.ones((2, 3)), jnp.asarray([[1.0, 1.0, 0.0]] * 2)]
  np.testing.assert_allclose(losses.halting_prior(halting, running, 1.0), 1.289411, rtol=1e-5)


def test_halting_prior_as_its_authors_have_it():
  # Twelve blocks, centre 8: their target is the density times .98 / (sum of the first eight), KLDivLoss("batchmean") of
  # a vector divides by its length, and only the mean halting is clamped: 9e-4 of block 0 to .01.
  mean = np.array([1e-3, 0.01, 0.02, 0.05, 0.1, 0.1, 0.1, 0.2, 0.2, 0.1, 0.1, 0.1])
  density = np.exp(-0.5 * (np.arange(12) - 8.0) ** 2) / np.sqrt(2 * np.pi)
  p, q = density * 0.98 / density[:8].sum(), np.clip(mean / mean.sum(), 0.01, 0.99)
  assert p.sum() > 3 and q[0] == 0.01
  halting, running = [jnp.full((2, 3), h) for h in mean], [jnp.ones((2, 3))] * 12
  ours = losses.halting_prior(halting, running, 12 * defaults.default().loss.halting_depth)
  np.testing.assert_allclose(ours, (p * np.log(p / q)).sum() / 12, rtol=1e-5)


def test_halting_prior_of_a_model():
  halt = dict(reducer="avit", layers=(0, 1, 2, 3), scale=1.0, center=1.0)
  module, params, images = small(dict(halt=halt))
  weights = defaults.complete(dict(loss=dict(halting_prior=1.0))).loss

  output = module.apply({"params": params}, images, train=True, mode="mask", rngs={"dropout": jax.random.key(0)})
  # The centre is 2/3 of 4 blocks, three are before it, and h of the last block is its own, not the 1 that ends all.
  halting, running = (np.stack(reported(output, "halt", name)) for name in ("halting", "depth"))
  mean = (halting * running).sum((1, 2)) / running.sum((1, 2))
  p = np.exp(-0.5 * (np.arange(4) - 8 / 3) ** 2)
  p, q = 0.98 * p / p[:3].sum(), np.clip(mean / mean.sum(), 0.01, 0.99)
  prior = losses.reports(weights, module, output)["halting_prior"]
  np.testing.assert_allclose(prior, (p * np.log(p / q)).sum() / 4, rtol=1e-5)
  assert mean[-1] < 0.9  # it was 1 there, and the prior saw nothing else
