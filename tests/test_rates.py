"""Counts and their gradients against hand arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred import rates
from tokred import tokens as tk


@pytest.mark.parametrize(
  "r, depth, want",
  [
    (13, 12, [13] * 12),
    ((6, -1.0), 6, [12, 9, 7, 4, 2, 0]),
    ((16, -1.0), 12, [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
    ((13, -0.5), 12, [19, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7]),
    ((7, 1.0), 8, [0, 2, 4, 6, 8, 10, 12, 14]),
    ((8, -1.0), 24, [16, 15, 14, 13, 13, 12, 11, 11, 10, 9, 9, 8, 7, 6, 6, 5, 4, 4, 3, 2, 2, 1, 0, 0]),
    ((3, 0.3), 5, [2, 2, 3, 3, 4]),
    (5, 1, [5]),
  ],
)
def test_tome_schedule_is_the_authors(r, depth, want):
  assert rates.tome_schedule(r, depth) == want


@pytest.mark.parametrize(
  "step, want",
  [(0, 1.0), (500, 1.0), (1000, 1.0), (1150, 0.9998334812442955), (4000, 0.938167787843871), (6000, 0.85),
   (11000, 0.7), (20000, 0.7)],
)  # fmt: skip
def test_cosine_keep_is_evits_table(step, want):
  assert rates.cosine_keep(0.7, step, 1000, 11000) == pytest.approx(want, abs=1e-12)


def test_cosine_keep_of_one_step():
  assert [rates.cosine_keep(0.7, step, 10, 10) for step in (9, 10, 11)] == [1.0, 0.7, 0.7]


def test_candidates_descend_while_positive():
  assert rates.candidates(10, 4) == (10, 6, 2)
  assert rates.candidates(8, 4) == (8, 4)
  assert rates.candidates(3, 1) == (3, 2, 1)
  assert rates.candidates(5, 9) == (5,)


@pytest.mark.parametrize("granularity, want", [(4, 100), (2, 99), (1, 99)])
def test_a_uniform_rate_keeps_half_exactly(granularity, want):
  # g=4: 196, 192 .. 4 has mean 100; g=2: 196 .. 2 has mean 99; g=1: 196 .. 1 has mean 98.5, rounded up.
  counts = rates.candidates(196, granularity)
  zeros = jnp.zeros(len(counts))
  assert float(rates.kept_count(zeros, counts)) == want
  assert float(jax.jit(lambda z: rates.kept_count(z, counts))(zeros)) == want


def test_the_flattest_distribution_with_a_mean():
  # Of 2 and 1 the mean is 1.75 where 2 has 3/4: its logit is ln 3 above the other's.
  np.testing.assert_allclose(rates.tilted((2, 1), 1.75), (np.log(3) / 2, -np.log(3) / 2), rtol=1e-9)
  np.testing.assert_allclose(rates.tilted((4, 3, 2, 1), 2.5), np.zeros(4), atol=1e-9)
  counts = rates.candidates(196, 4)
  logits = rates.tilted(counts, 150.5)
  np.testing.assert_allclose(np.diff(logits, 2), 0, atol=1e-12)  # a straight line over the counts
  assert float(rates.expected(jnp.asarray(logits), counts)) == pytest.approx(150.5, abs=1e-3)


@pytest.mark.parametrize("start", [2, 9, 57, 195, 196])
@pytest.mark.parametrize("granularity", [1, 4])
def test_a_rate_begins_where_it_is_told(start, granularity):
  module = rates.Learned(rates.candidates(196, granularity), 1, start)
  logits = module.init(jax.random.key(0), 197)["params"]["logits"]
  count, chance = module.apply({"params": {"logits": logits}}, 197)
  least = 5 if granularity == 4 else 2  # half a token above the least candidate
  assert float(count) == max(start, least) + 1
  assert np.isfinite(chance).all() and (np.diff(chance) <= 0).all() and chance[0] > chance[-1] >= 0


def test_gradients_are_those_of_diffrate():
  # d pi_j / d theta_k = rho_k (1[j < c_k + 1] - pi_j);  d n / d theta_k = rho_k (c_k - E), through the ceil.
  counts, protected = (7, 5, 3, 1), 1
  theta = jnp.array([0.3, -0.2, 0.5, 0.1])
  rho = np.exp(np.asarray(theta, float)) / np.exp(np.asarray(theta, float)).sum()
  mean = (rho * counts).sum()
  np.testing.assert_allclose(rates.expected(theta, counts), mean, rtol=1e-6)
  assert float(rates.kept_count(theta, counts)) == np.ceil(mean)
  np.testing.assert_allclose(jax.grad(rates.kept_count)(theta, counts), rho * (np.array(counts) - mean), atol=1e-6)
  reach = np.arange(8)[:, None] < np.array(counts) + protected
  pi = (reach * rho).sum(1)
  got = rates.survival(theta, counts, 8, protected)
  np.testing.assert_allclose(got, pi, rtol=1e-6)
  np.testing.assert_allclose(
    jax.jacobian(rates.survival)(theta, counts, 8, protected), rho * (reach - pi[:, None]), atol=1e-6
  )


def test_survival_is_one_for_the_protected_and_does_not_rise():
  pi = np.asarray(rates.survival(jnp.array([1.0, 0.0, 2.0]), (6, 4, 2), 10, 2))
  np.testing.assert_allclose(pi[:4], 1.0, rtol=1e-6)  # 2 protected and the 2 that every candidate keeps
  assert (np.diff(pi) <= 1e-7).all() and pi[8] == pi[9] == 0.0


def test_kept_count_never_falls_below_one():
  assert float(rates.kept_count(jnp.array([0.0]), (0,))) == 1.0


def test_learned_counts_the_protected():
  module = rates.Learned((8, 4), 2)
  variables = module.init(jax.random.key(0), 10)
  assert variables["params"]["logits"].tolist() == [0.0, 0.0]
  count, survival = module.apply(variables, 10)
  assert float(count) == 6 + 2  # (8 + 4) / 2
  np.testing.assert_allclose(survival, [1.0] * 6 + [0.5] * 4)


def test_threshold_counts_what_passes_up_to_its_capacity():
  tokens = tk.start(jnp.zeros((3, 5, 2)), 1)
  tokens = tokens.replace(mask=jnp.arange(5)[None] < jnp.array([[5], [5], [3]]))
  score = jnp.array([[-9, 0.5, 0.2, 0.5, 0.9], [-9, 1, 1, 1, 1], [-9, 0.1, 0.9, 0.9, 0.9]])
  # row 0: CLS and three of at least 0.5; row 1: five pass, four fit; row 2: CLS and one of the three alive
  assert rates.Threshold(0.5, 4).count(tokens, score).tolist() == [4, 4, 2]


def test_a_learned_threshold_by_hand():
  tokens = tk.start(jnp.zeros((2, 4, 2)), 1)
  tokens = tokens.replace(mask=jnp.arange(4)[None] < jnp.array([[4], [3]]))
  score = jnp.array([[-9.0, 0.1, 0.4, 0.35], [jnp.nan, 0.2, 0.5, jnp.nan]])
  module = rates.LearnedThreshold(initial=0.3, temperature=0.1)
  variables = module.init(jax.random.key(0), tokens, score)
  assert variables["params"]["value"].tolist() == pytest.approx(0.3)
  gate, counts = module.apply(variables, tokens, score)
  assert gate.tolist() == [[1, 0, 1, 1], [1, 0, 1, 0]] and counts.tolist() == [3, 2]
  # sigmoid at -2, 1, 0.5 is 0.1192, 0.7311, 0.6225, with slopes 0.1050, 0.1966, 0.2350: -0.5366 / 0.1;
  # row 1 at -1 and 2: slopes 0.1966 and 0.1050
  slope = jax.jacobian(lambda v: module.apply(v, tokens, score)[1])(variables)["params"]["value"]
  np.testing.assert_allclose(slope, [-5.366, -3.016], atol=1e-3)
  up = jax.grad(lambda s: module.apply(variables, tokens, s)[1].sum())(score)
  np.testing.assert_allclose(up, [[0, 1.050, 1.966, 2.350], [0, 1.966, 1.050, 0]], atol=1e-3)


def test_a_learned_threshold_counts_as_the_fixed_one_does():
  tokens = tk.start(jnp.zeros((3, 6, 2)), 1)
  score = jax.random.normal(jax.random.key(1), (3, 6))
  module = rates.LearnedThreshold(initial=-0.25)
  _, counts = module.apply(module.init(jax.random.key(0), tokens, score), tokens, score)
  assert counts.tolist() == rates.Threshold(jnp.float32(-0.25), 6).count(tokens, score).tolist()


def test_soft_counts_by_hand():
  """Scores log 3 and -log 3 share a count of 1 at t = 0, as 3/4 and 1/4; slopes s' = 3/16 are alike.

  d w_i / d s_j = s'_i [i = j] - s'_i s'_j / sum s' = 3/32 where i = j, else -3/32: what one gains the other loses.  At
  tau = 2 scores twice as large do the same; t follows each by s'_i / sum s' = 1/2, and falls with the count by
  tau / sum s' = 16/3.
  """
  score = jnp.asarray([[np.log(3), -np.log(3), 9.0]], jnp.float32)
  weight = lambda s: rates.soft_topk(s, 1.0)
  np.testing.assert_allclose(weight(score[0, :2]), [0.75, 0.25], atol=1e-6)
  np.testing.assert_allclose(jax.jacobian(weight)(score[0, :2]), np.array([[3, -3], [-3, 3]]) / 32, atol=1e-6)
  free = jnp.asarray([[True, True, False]])
  level = lambda s, count: rates.soft_threshold(s, free, count, 2.0)[0]
  by_score, by_count = jax.grad(level, argnums=(0, 1))(2 * score, jnp.ones(1))
  np.testing.assert_allclose(level(2 * score, jnp.ones(1)), 0, atol=1e-5)
  np.testing.assert_allclose(by_score, [[0.5, 0.5, 0]], atol=1e-5)
  np.testing.assert_allclose(by_count, [-16 / 3], rtol=1e-4)
  slopes = jax.grad(level, argnums=(0, 1))(score, jnp.full(1, 2.0))  # all of them: met only in the limit
  assert all(np.isfinite(slope).all() for slope in slopes)
