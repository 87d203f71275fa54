"""How reducers rank, and how a plan is carried out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import quick

from tokred import rates
from tokred import tokens as tk
from tokred.reducers import base, peaks
from tokred.reducers.transforming import Transforming


def test_ranks_of_what_is_no_number():
  """The protected, then from infinity down to NaN, then the dead, protected or not."""
  score = jnp.asarray([[jnp.nan, -5.0, jnp.inf, 0.0, -jnp.inf, 9.0, 9.0]])
  index = jnp.arange(7)[None]
  tokens = tk.start(jnp.zeros((1, 7, 1))).replace(mask=index < 5, protected=(index == 3) | (index == 6))
  np.testing.assert_array_equal(tk.inverse(base.ranks(tokens, score))[0, :3], [3, 2, 1])
  assert set(tk.inverse(base.ranks(tokens, score))[0, 3:5].tolist()) == {0, 4}
  np.testing.assert_array_equal(tk.inverse(base.ranks(tokens, score))[0, 5:], [5, 6])


def test_ranks_tell_numbers_apart_that_bfloat16_does_not():
  tokens = tk.start(jnp.zeros((1, 3, 1)))
  np.testing.assert_array_equal(base.ranks(tokens, jnp.asarray([[1.001, 1.003, 1.002]])), [[2, 0, 1]])


@pytest.mark.parametrize("samples", [True, False])
def test_what_is_drawn_is_drawn_in_mask_mode(samples):
  """In gather mode, whose counts are fixed, a planner that samples plans as at inference, also while training."""

  class Told(base.Planner):
    def plan(self, tokens, keep, *, train):
      return base.keep_top(tokens, tokens.x[..., 0], keep), {"train": train}

  Told.samples = samples
  told = {
    (train, mode): Told(parent=None)(tk.start(jnp.zeros((1, 3, 1))), 2, train=train, mode=mode)[1]["train"]
    for train in (True, False)
    for mode in ("mask", "gather")
  }
  assert [key for key, value in told.items() if value] == [(True, "mask")] + [(True, "gather")] * (not samples)


def test_order_of_a_decision():
  """The protected, those that are kept, the others, the dead; each in their order."""
  index = jnp.arange(6)[None]
  tokens = tk.start(jnp.zeros((1, 6, 1))).replace(mask=index > 0, protected=index == 2)
  order = base.decided(tokens, jnp.asarray([[False, True, True, False, True, False]]))
  np.testing.assert_array_equal(order, [[2, 1, 4, 3, 5, 0]])


def test_an_image_of_which_nothing_goes_stays_whatever_others_do():
  tokens = tk.start(jnp.zeros((2, 3, 1)))
  score = jnp.asarray([[1.0, 2.0, 3.0]] * 2)
  out = base.finish(tokens, base.keep_top(tokens, score, jnp.asarray([3, 2])), jnp.asarray([3, 2]), "mask")
  np.testing.assert_array_equal(out.position, [[0, 1, 2], [2, 1, 0]])
  np.testing.assert_array_equal(
    base.finish(tokens, base.keep_top(tokens, score, 3), 3, "gather").position, [[0, 1, 2]] * 2
  )


def test_slots_of_an_image_of_which_nothing_goes_are_its_tokens():
  """The others' slots are mixed all the same."""
  x = jnp.asarray([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]] * 2)
  tokens = tk.start(x).replace(feats={"cls_attention": jnp.asarray([[0.2, 0.5, 0.3]] * 2)})
  apply = functools.partial(Transforming(temperature=1.0).apply, {}, train=False, mode="mask")
  out, _ = jax.jit(apply, compiler_options=quick())(tokens, jnp.asarray([3, 2]))
  np.testing.assert_array_equal(out.x[0], x[0])
  assert not (out.x[1, 0] == x[1, 1]).all()


def test_shares_are_rounded_up():
  """0.27 x 16 = 4.32 patches are 5, and CLS; of the input's 20 patches 6, where shares count from there."""

  class FromInput(base.Planner):
    from_input = True

  assert base.Planner(parent=None).count(0.27, 17, 1, 20) == 6
  assert FromInput(parent=None).count(0.27, 17, 1, 20) == 7


def test_the_largest_of_a_group_is_shared():
  """Channel by channel: 5 of two members that are alike, to each half of its slope."""
  x, owner = jnp.asarray([[[5.0, 1.0], [5.0, 2.0], [9.0, 9.0]]]), jnp.asarray([[0, 0, -1]])
  np.testing.assert_array_equal(peaks._largest(x, owner)[0, 0], [5, 2])
  slope = jax.grad(lambda x: peaks._largest(x, owner)[0, 0].sum())(x)
  np.testing.assert_array_equal(slope[0], [[0.5, 0], [0.5, 1], [0, 0]])


def test_a_soft_count_has_its_temperature_throughout():
  """The gates of `soft_top` learn as the weights of scores over tau that add up to the count."""
  score = jnp.asarray([[0.0, 1.0, -2.0, 5.0]])
  tokens = tk.start(jnp.zeros((1, 4, 1)))
  gates = lambda s: base.soft_top(tokens, s, 2, 3.0, train=True).gate
  slope, want = (jax.jacobian(f)(score) for f in (gates, lambda s: rates.soft_topk(s / 3.0, 2.0)))
  np.testing.assert_allclose(slope, want, atol=1e-5)


def test_no_more_are_kept_than_are_alive():
  tokens = tk.start(jnp.zeros((2, 3, 1))).replace(mask=jnp.asarray([[True, True, False], [True] * 3]))
  assert base.num_kept(tokens, 3).tolist() == [[2], [3]]


def test_rows_with_counts_of_their_own_merge_in_gather_mode():
  """Token 1 joins token 0 of its image, and none of the other; with room for all there is one dead."""
  tokens = tk.start(jnp.asarray([[[2.0], [4.0], [9.0]]] * 2))
  owner = jnp.asarray([[0, 0, 2], [0, 1, 2]])
  order = jnp.asarray([[0, 2, 1], [0, 1, 2]])
  out = base.finish_rows(tokens, base.merge_into(tokens, owner, order), 3, "gather")
  np.testing.assert_allclose(out.x[0, :2, 0], [3, 9])
  np.testing.assert_allclose(out.x[1, :, 0], [2, 4, 9])
  assert out.alive.tolist() == [[True, True, False], [True] * 3]
