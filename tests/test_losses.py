"""Terms of the loss against hand arithmetic, and what learns nothing from them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred import config as defaults
from tokred import cost, losses
from tokred import tokens as tk
from tokred.nn import vit

SMALL = dict(variant="mu/4", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)


def f32(a):
  return jnp.asarray(a, jnp.float32)


def make(**sites):
  return vit.make(defaults.complete(dict(model=SMALL)).model, sites)


def weights(**terms):
  return defaults.complete(dict(loss=terms)).loss


def reported(module, terms, **aux):
  """Terms of `losses.reports` of what a site is made to report; keys "<site>__<name>"."""
  aux = {f"reduce/{name.replace('__', '/')}": value for name, value in aux.items()}
  return losses.reports(weights(**terms), module, types.SimpleNamespace(aux=aux))


def test_a_temperature_softens_both_sides():
  """At tau = 2 the teacher's (2 log 3, 0) are 3/4 and 1/4, the student's (0, 0) halves:

  KL = 3/4 log(3/2) + 1/4 log(1/2) = .304099 - .173287 = .130812, times 4.
  """
  teacher = f32([[2 * np.log(3), 0]])
  np.testing.assert_allclose(losses.distill_logits(jnp.zeros((1, 2)), teacher, 2.0), 0.523248, rtol=1e-5)
  named = losses.terms(
    weights(distill_logits=1.0, temperature=2.0), make(), types.SimpleNamespace(logits=jnp.zeros((1, 2)), aux={}),
    f32([[1, 0]]), types.SimpleNamespace(logits=teacher), None,
  )  # fmt: skip
  np.testing.assert_allclose(named["distill_logits"], 0.523248, rtol=1e-5)


def test_no_token_is_left_to_distill():
  tokens = tk.start(jnp.ones((1, 3, 2)), 1).replace(mask=f32([[1, 0, 0]]))

  def term(x):
    return losses.distill_tokens(tokens.replace(x=x), jnp.zeros((1, 3, 2)))

  value, slope = jax.value_and_grad(term)(tokens.x)
  assert value == 0 and not slope.any()


def test_what_a_fuller_pass_teaches():
  """Labels of image 0 are mixed of classes 0 and 1: the student gives them .3 + .3, more than .4; to that of image 1
  .3.  Features differ by 1 and 3 in image 0, and by 10 in image 1: only image 0 is sure, and (1 + 9) / 2 = 5.

  The fuller pass with p = 1/3 teaches the mean of sum_c p log(p / q), (.009466 + .240516) / 2 = .124991.  Smoothed
  targets are .1 / 3 + .9 t, so the student's cross-entropy is -(.483333 2 log .3 + .033333 log .4) = 1.194383 and
  -(.933333 log .3 + .033333 (log .1 + log .6)) = 1.217488.  That of a fuller pass with (1/2, 1/4, 1/4), which itself is
  sure of both labels, is (.483333 + 2 .516667) log 2 = 1.051273 and (.933333 + 2 .066667) log 2 = .739357.
  """
  student = types.SimpleNamespace(
    logits=jnp.log(f32([[0.3, 0.3, 0.4], [0.3, 0.1, 0.6]])), features=f32([[0, 0], [0, 0]]), aux={}
  )
  target = f32([[0.5, 0.5, 0], [1, 0, 0]])
  terms = weights(consistency=1.0, confidence=0.4, full_cross_entropy=1.0, full_distill=1.0, label_smoothing=0.1)

  def named(logits, features):
    full = types.SimpleNamespace(logits=logits, features=features)
    return losses.terms(terms, make(), student, target, None, full)

  even, sure = jnp.zeros((2, 3)), jnp.log(f32([[2, 1, 1], [2, 1, 1]]))
  features = f32([[1, 3], [10, 10]])
  np.testing.assert_allclose(named(even, features)["full_distill"], 0.124991, rtol=1e-4)
  got = named(sure, features)
  np.testing.assert_allclose(got["consistency"], 5.0)
  np.testing.assert_allclose(got["cross_entropy"], (1.194383 + 1.217488) / 2, rtol=1e-5)
  np.testing.assert_allclose(got["full_cross_entropy"], (1.051273 + 0.739357) / 2, rtol=1e-5)
  for name in ("consistency", "full_distill"):
    slopes = jax.grad(lambda *full, name=name: named(*full)[name], argnums=(0, 1))(even, features)
    assert not any(np.asarray(slope).any() for slope in slopes), name


def test_the_teacher_learns_nothing_from_recalibration():
  slope = jax.grad(lambda teacher: losses.recalibration([jnp.ones((1, 1, 2))], [teacher]))(jnp.zeros((1, 1, 2)))
  assert not slope.any()


def test_routers_learn_their_own_choice():
  """BCE of logits 0 and log 3 against (1, 0): log 2 and log 4, mean 1.039721; the third token had no choice.

  A second router, of one free token that it did not take: log 2.  The mean of both is .866434.
  """
  score = {0: f32([[0, np.log(3), 9]]), 1: f32([[0, 0, 0]])}
  chosen = {0: jnp.asarray([[True, False, False]]), 1: jnp.zeros((1, 3), bool)}
  free = {0: jnp.asarray([[True, True, False]]), 1: jnp.asarray([[True, False, False]])}
  route = dict(reducer="router", layers=(0, 1), keep=9)
  named = reported(make(r=route), dict(router=1.0), r__score=score, r__chosen=chosen, r__free=free)
  np.testing.assert_allclose(named["router"], 0.866434, rtol=1e-5)


def test_ponder_is_that_of_the_last_block():
  """Layers used and remainder add up from block to block; the mean is over tokens and images: (1 + 2 + 3 + 6) / 4."""
  halt = dict(reducer="avit", layers=(0, 1))
  named = reported(make(halt=halt), dict(ponder=1.0), halt__ponder={0: f32([[9, 9], [9, 9]]), 1: f32([[1, 2], [3, 6]])})
  np.testing.assert_allclose(named["ponder"], 3.0)


def test_what_reducers_report_as_loss_is_added_up_as_it_is():
  """Spots are summed, images averaged: (1 + 3) / 2 + 5 = 7; the weights of `config.loss` are for its own terms."""
  cut = dict(reducer="autoencoder", place="before", layers=(0, 1), keep=9)
  named = reported(make(cut=cut), {}, cut__loss={0: f32([1, 3]), 1: f32([5, 5])})
  np.testing.assert_allclose(named["reduce/cut/loss"], 7.0)
  assert float(losses.total(weights(cross_entropy=2.0), named | {"cross_entropy": f32(1.5)})) == 10.0


def test_answers_are_told_from_what_stands_before_them():
  """Of ids 1, 0, 1 the last is the answer: it is read off the logits of the second, (0, log 3), where 1 has 3/4."""
  logits = f32([[[9, 0], [0, np.log(3)], [5, 0]]])
  answer = jnp.asarray([[False, False, True]])
  np.testing.assert_allclose(losses.answers(logits, jnp.asarray([[1, 0, 1]]), answer), np.log(4 / 3), rtol=1e-6)


def test_costs_in_units_by_hand():
  """Of 17 tokens 9 leave block 0 and 5 block 1: 7 in the mean; FLOPs are more than twice the multiply-adds."""
  module = make(cut=dict(reducer="topk", layers=(0, 1), keep=(9, 5)))
  assert losses.spent(module, "tokens") == 7
  assert losses.dense(module, "gmacs") * 1e9 == pytest.approx(cost.of(make()))
  assert losses.dense(module, "gflops") * 1e9 == pytest.approx(cost.of(make(), cost.flops))


def test_the_least_that_rates_can_reach():
  """In block 1 a rate of 16, 12, 8 or 4 patches leaves 5 with CLS; ToMe merges 8 of 16 at most, whatever is asked."""
  learned = dict(layers=(1,), rate="learned")
  prune = make(cut=dict(learned, reducer="topk", granularity=4))
  assert losses.reachable(prune, "tokens") == ((17 + 5) / 2, 17)
  assert losses.reachable(make(cut=dict(learned, reducer="tome")), "tokens") == ((17 + 9) / 2, 17)
