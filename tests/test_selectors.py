"""Selectors under every rate: gradients meet where they should, losses aim at what ships, and collapse is seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import drawn, quick, reported

import tokred
from tokred import config as defaults
from tokred import losses, sites
from tokred import tokens as tk
from tokred.layout import Stack
from tokred.nn import vit
from tokred.rates import LearnedThreshold
from tokred.reducers.gumbel import Gumbel
from tokred.sharding import make_mesh
from tokred.train import alarms
from tokred.train.alarms import collapsed
from tokred.train.phase import Phase

SMALL = dict(variant="mu/4", width=16, depth=4, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
RNGS = {"params": jax.random.key(0), "reduce": jax.random.key(1), "dropout": jax.random.key(2)}


def build(**made):
  module = vit.make(defaults.complete({"model": SMALL}).model, made)
  return module, drawn(lambda rngs: module.init(rngs, IMAGES, mode="mask")["params"], RNGS)


def run(module, params, keeps=None, mode="mask", **kwargs):
  return module.apply({"params": params}, IMAGES, mode=mode, train=True, keeps=keeps, rngs=RNGS, **kwargs)


def weights(**terms):
  return defaults.complete(dict(loss=terms)).loss


# Learned thresholds.


def test_a_token_that_is_gone_still_teaches_the_threshold_that_took_it():
  """Two thresholds in a row, as LTMP's: the second has no say about tokens that the first has taken.

  Of scores 3, 2, 1, 0 behind CLS the first takes 1 and 0, the second 2.  The mask that comes out is m1 m2, and m2 = 1
  where the token was dead: d mask / d theta1 of the token of score 1 is d m1 / d theta1.
  """
  tokens = tk.start(jnp.asarray([[[0.0], [3.0], [2.0], [1.0], [0.0]]]), 1)

  class Value(Gumbel):
    def plan(self, tokens, keep, *, train):
      score = tokens.x[..., 0]
      return tokred.keep_top(tokens, score, keep), {"score": score}

  def alive(values):
    out = tokens
    for value in values:
      rate = LearnedThreshold(temperature=1.0, capacity=5, parent=None).bind({"params": {"value": value}})
      out, _ = Value(parent=None).apply({}, out, rate, train=True, mode="mask")
    return out.mask[0]

  theta = jnp.asarray([1.5, 2.5])
  gates, slope = jax.jit(lambda t: (alive(t), jax.jacobian(alive)(t)), compiler_options=quick())(theta)
  np.testing.assert_array_equal(gates, [1, 1, 0, 0, 0])
  bell = lambda t: -np.exp(-t) / (1 + np.exp(-t)) ** 2
  # The order is CLS, 3, 2, 1, 0; those that passed the first have slopes of both.
  np.testing.assert_allclose(slope[:, 0], [0, bell(1.5), 0, bell(0.5), bell(1.5)], atol=1e-6)
  np.testing.assert_allclose(slope[:, 1], [0, bell(0.5), bell(0.5), 0, 0], atol=1e-6)


# A learned rate over a score that is drawn.


def with_logits(params, value, count=16):
  """The rate of block 1 with nearly all weight on one candidate."""
  params = jax.tree.map(lambda leaf: leaf, params)
  logits = np.full(count, -9.0, np.float32)
  logits[16 - value] = 9.0
  params["block_1"]["reduce"]["cut"]["rate"]["logits"] = jnp.asarray(logits)
  return params


def test_a_learned_rate_counts_what_a_selector_draws():
  module, params = build(cut=dict(reducer="gumbel", layers=(1,), rate="learned"))
  program = jax.jit(lambda p: run(module, p), compiler_options=quick())
  for free in (4, 12):
    output = program(with_logits(params, free))
    np.testing.assert_array_equal(output.tokens.alive.sum(1), [free + 1, free + 1])
    np.testing.assert_allclose(reported(output, "cut", "count"), [free + 1])
    assert "reduce/cut/kept_share" not in output.aux


def test_ranks_of_a_learned_rate_are_those_of_the_draw():
  """Survival falls with the rank: the worst token by the perturbed margin has the least, wherever it stands."""
  tokens = tk.start(jax.random.normal(jax.random.key(4), (2, 9, 8)), 1)
  drawn = jnp.flip(jnp.arange(9.0))[None, :, None] * jnp.asarray([-3.0, 3.0])  # token 1 wants to stay least

  class Replay(Gumbel):
    def noise(self, shape):
      return jnp.broadcast_to(drawn, shape)

  module = Replay(parent=None)
  curve = jnp.linspace(1.0, 0.2, 9)
  begin = functools.partial(module.init, train=True, mode="mask", survival=curve)
  params = jax.jit(begin, compiler_options=quick())(RNGS, tokens, 4)

  @jax.jit
  def mask(survival):
    return module.apply(params, tokens, jnp.int32(4), train=True, mode="mask", survival=survival)[0]

  out = mask(curve)
  np.testing.assert_array_equal(out.position, [[0, 8, 7, 6, 5, 4, 3, 2, 1]] * 2)
  np.testing.assert_array_equal(out.mask, [[1] * 4 + [0] * 5] * 2)
  np.testing.assert_allclose(jax.jit(jax.jacobian(lambda s: mask(s).mask[0]))(curve), np.eye(9), atol=1e-6)

  # The gate learns as well: its chances add up to the count, so that what one token gains the others lose.
  def gate(params):
    return module.apply(params, tokens, jnp.int32(4), train=True, mode="mask", survival=curve)[0].mask

  slope = jax.jit(jax.jacobian(gate), compiler_options=quick())(params)["params"]["predictor"]["out2"]["kernel"]
  assert np.abs(slope).max() > 0
  np.testing.assert_allclose(slope.sum(1), 0, atol=1e-5)


def test_a_temperature_by_hand():
  """At tau = 2 logits (0, 0) with noise (0, log 9) and (log 9, 0) are (0, log 3) and (log 3, 0): p of 1/4 and 3/4 are a
  token dropped and one kept, with slopes p (1 - p) / tau = 3 / 32.  A third was dropped before: the share is 1/3.

  Where a rate says that one of the two stays, t = 0 divides margins of -log 9 and log 9: what the kept one gains the
  other loses, so that half of its slope is left.
  """
  tokens = tk.start(jnp.zeros((1, 4, 2)), 1).replace(mask=jnp.asarray([[1.0, 1.0, 1.0, 0.0]]))
  nine = np.log(9)

  class Replay(Gumbel):
    def logits(self, tokens):
      return tokens.x, tokens.mask * ~tokens.protected

    def noise(self, shape):
      return jnp.asarray([[[0, 0], [0, nine], [nine, 0], [nine, 0]]], jnp.float32)

  def run(x, method):
    apply = functools.partial(Replay(temperature=2.0).apply, {}, train=True, method=method)
    plan, report = apply(tokens.replace(x=x), 2)
    return (report["kept_share"] if method == "plan" else plan.gate)[0], (plan.gate, report)

  run = jax.jit(jax.jacobian(run, has_aux=True), static_argnums=1, compiler_options=quick())
  slope, (gate, report) = run(tokens.x, "plan")
  np.testing.assert_array_equal(gate[0, :3], [1, 0, 1])
  np.testing.assert_allclose(report["kept_share"], [1 / 3], rtol=1e-6)
  np.testing.assert_allclose(slope[0, 1:, 0], [1 / 32, 1 / 32, 0], rtol=1e-5)
  slope, (gate, _) = run(tokens.x, "counted")
  np.testing.assert_array_equal(gate[0, :3], [1, 0, 1])
  np.testing.assert_allclose(slope[2, 0, 1:3, 0], [-3 / 64, 3 / 64], rtol=1e-4)
  assert not slope[0].any() and not slope[3].any()  # CLS and the dead have no say


@pytest.mark.parametrize("rate", ["learned", "learned_threshold"])
@pytest.mark.parametrize("term", ["keep_ratio", "global_ratio"])
def test_a_share_is_not_held_where_a_rate_learns_it(term, rate):
  made = dict(model=SMALL, sites=dict(cut=dict(reducer="gumbel", layers=(1,), rate=rate)))
  made |= dict(train=dict(mode="mask"), loss={term: 2.0, "budget": 1.0, "target": 0.8})
  with pytest.raises(ValueError, match=rf"config\.loss\.{term}=2\.0.*sites\.cut\.rate='{rate}'.*valid: 0\.0"):
    Phase(defaults.complete(made), make_mesh(defaults.default().mesh, jax.devices()[:1]), 4)


# Losses for training alone.


@pytest.mark.parametrize("rate", ["threshold", "learned_threshold"])
def test_the_autoencoder_learns_under_a_threshold(rate):
  site = dict(reducer="autoencoder", place="before", layers=(1,), rate=rate, threshold=0.0, num_heads=1, keep=0.5)
  module, params = build(cut=site)

  def loss(params):
    output = run(module, params)
    return losses.reports(weights(), module, output)["reduce/cut/loss"], output

  (value, output), slope = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick())(params)
  own = slope["block_1"]["reduce"]["cut"]["autoencoder"]
  for name in ("selector", "logits", "reconstructor"):
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(own[name])), name
  # The hinge is at the capacity, and who stays is what inference keeps: no noise decides.
  error, kept = (reported(output, "cut", name)[0] for name in ("error", "kept"))
  np.testing.assert_allclose(value, (error + 0.5 * np.maximum(kept, 0.5)).mean(), rtol=1e-5)
  score = np.asarray(reported(output, "cut", "score")[0])
  assert (np.minimum((score[:, 1:] >= 0).sum(1), 8) + 1 == output.tokens.alive.sum(1)).all()


def test_the_autoencoder_learns_where_tokens_are_gathered():
  module, params = build(cut=dict(reducer="autoencoder", place="before", layers=(1,), keep=0.5, num_heads=1))
  gathered, masked = (jax.jit(lambda p, m=m: run(module, p, mode=m))(params) for m in ("gather", "mask"))
  for name in ("loss", "error", "kept"):
    np.testing.assert_allclose(*(reported(out, "cut", name)[0] for out in (gathered, masked)), rtol=1e-5)
  assert gathered.tokens.x.shape[1] == 9


def test_frames_that_repeat_lose_under_a_threshold():
  module, params = build(cut=dict(reducer="stts", layers=(1,), rate="threshold", threshold=0.0, keep=0.5, frames=2))
  output = jax.jit(lambda params: run(module, params), compiler_options=quick())(params)
  assert "reduce/cut/loss_redundancy" in losses.reports(weights(), module, output)


# What the shares that are kept aim at.


@pytest.mark.parametrize("reducer", ["gumbel", "dyt", "spa"])
@pytest.mark.parametrize("term", ["keep_ratio", "global_ratio"])
def test_a_schedule_moves_the_target(reducer, term):
  site = dict(reducer=reducer, layers=(1,), keep=0.5, rate="scheduled", schedule=(0, 1000))
  made = dict(model=SMALL, sites=dict(cut=site), train=dict(mode="mask"), loss={term: 2.0})
  phase = Phase(defaults.complete(made), make_mesh(defaults.default().mesh, jax.devices()[:1]), 1000)
  _, params = build(cut=site)

  def term_at(step):
    output = run(phase.module, params, phase.keeps(step))
    share = reported(output, "cut", "kept_share")[0]
    share = share if term == "keep_ratio" else share.mean()
    return losses.reports(phase.config.loss, phase.module, output)[term], share

  # The half cosine: all of 16, 1 / 2 + 1 / 2 (1 / 2 + 2^-1/2 / 2) = 0.927 or 15 (Gumbel cuts off: 14), half.
  early = 14 if reducer == "gumbel" else 15
  for step, wanted in ((0, 16), (250, early), (1000, 8)):
    value, share = term_at(step)
    np.testing.assert_allclose(value, np.square(np.asarray(share) - wanted / 16).mean(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reducer", ["dyt", "spa"])
@pytest.mark.parametrize("rate", ["fixed", "scheduled"])
def test_a_share_of_those_that_arrive(reducer, rate):
  """Half of 16 are left, and half of these are to go in: 4 of 8, or all of 8 where the schedule begins with more."""
  cut = dict(reducer="topk", score="token_norm", layers=(0,), keep=0.5)
  select = dict(reducer=reducer, layers=(1,), keep=0.5) | dict(rate=rate)
  select |= dict(schedule=(0, 10)) if rate == "scheduled" else {}
  module, params = build(cut=cut, select=select)
  keeps = None if rate == "fixed" else dict(select=jnp.asarray([12], jnp.int32))
  output = run(module, params, keeps)
  value = losses.reports(weights(keep_ratio=1.0), module, output)["keep_ratio"]
  share = np.asarray(reported(output, "select", "kept_share")[0])
  np.testing.assert_allclose(value, np.square(share - (0.5 if rate == "fixed" else 1.0)).mean(), rtol=1e-5)


@pytest.mark.parametrize(
  "keep, want",
  [(0.3, 0.3), (4, 3 / 8), (9, 1.0)],  # a share as it is given; a number counts CLS
)
def test_shares_wanted(keep, want):
  stack = Stack(3, 17, 1)
  cut = dict(cut=dict(reducer="topk", layers=(0,), keep=0.5))
  spot = sites.parse(cut | dict(a=dict(reducer="dyt", layers=(1,), keep=keep)), stack).spots[1]
  assert spot.wanted == pytest.approx(want, abs=1e-12)
  spot = sites.parse(cut | dict(a=dict(reducer="gumbel", layers=(1,), keep=0.3)), stack).spots[1]
  assert spot.wanted == 0.3  # of the input's


# Alarms.


def test_an_autoencoder_that_keeps_all_or_none():
  module, params = build(cut=dict(reducer="autoencoder", place="before", layers=(1,), keep=0.5, num_heads=1))
  output = jax.jit(lambda p: run(module, p))(params)
  metrics = {name: float(value) for name, value in alarms.selected(module, output).items()}
  assert set(metrics) == {"kept/cut/1", "error/cut/1"}
  assert metrics["kept/cut/1"] == pytest.approx(float(reported(output, "cut", "kept")[0].mean()))
  counts = {"counts/cut/1": 9.0}  # it always ships these
  assert collapsed(module.sites, counts | metrics) == {}
  for kept, word in ((0.99, "all"), (0.01, "none")):
    (text,) = collapsed(module.sites, counts | {"kept/cut/1": kept}).values()
    assert text.startswith(f"cut/1 would keep {word} of its tokens ({kept:.0%}), where 50% are wanted")
    assert "config.sites.cut.weight" in text
  assert collapsed(module.sites, counts | {"kept/cut/1": 0.1}) == {}


def test_an_autoencoder_aims_at_its_share():
  stack = Stack(3, 17, 1)
  at = lambda **fields: sites.parse(dict(cut=dict(reducer="autoencoder", place="before", layers=(1,), **fields)), stack)
  assert collapsed(at(keep=0.5, share=0.95), {"counts/cut/1": 9.0, "kept/cut/1": 0.99}) == {}
  assert list(collapsed(at(keep=1.0, share=0.25), {"counts/cut/1": 17.0, "kept/cut/1": 0.99})) == ["kept/cut/1"]


@pytest.mark.parametrize("keep", [0, -1, True, 0.5])
def test_a_count_that_is_none(keep):
  """A share would round to no token, and all would leave without a word."""
  tokens = tk.start(jnp.ones((1, 4, 2)), 1)
  with pytest.raises(ValueError, match=f"keep={keep!r}; valid: how many tokens stay, .*an integer, 1 or more"):
    tokred.keep_top(tokens, tokens.x[..., 0], keep)
