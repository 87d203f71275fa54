"""Gates from before the language model, and texts that share a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from languages import batch, forward, tiny
from test_llm_sites import FASTV


def test_a_gate_from_before_is_a_mask_with_a_gradient():
  """A floating mask computes what a bool one does; its gradient reaches the dead, and equals a finite difference."""
  module, params = tiny()
  ids, mask, _ = batch()
  gone = mask & (np.arange(16) % 3 != 1)
  gone[:, -1] = True
  position = np.broadcast_to(np.arange(16), mask.shape).astype(np.int32)
  inputs = dict(ids=ids, position=position)
  hard, _ = forward(module, params, mask=gone, **inputs)
  soft, out = forward(module, params, mask=gone.astype(np.float32), **inputs)
  np.testing.assert_allclose(soft, hard, atol=1e-5)
  assert out.tokens.mask.dtype == jnp.float32 and (np.asarray(out.tokens.alive).sum(1) == gone.sum(1)).all()

  @jax.jit
  def loss(gate):
    out = module.apply({"params": params}, mask=gate, **inputs)
    return jnp.take_along_axis(out.logits, out.tokens.owner[:, -1:, None], 1)[..., 0].sum()

  slope = np.asarray(jax.jit(jax.grad(loss))(gone.astype(np.float32)))
  assert np.isfinite(slope).all() and (slope[mask & ~gone] != 0).all()


def test_texts_that_share_a_row_are_as_if_alone():
  """Two of 5 and 7 tokens in one row, with a hole and padding; a gradient of one does not reach the other."""
  module, params = tiny()
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 50, (1, 16)).astype(np.int32)
  segment = np.array([[0] * 6 + [1] * 7 + [9] * 3], np.int32)
  mask = (np.arange(16) < 13)[None] & (np.arange(16) != 2)
  for gate in (mask, mask.astype(np.float32)):
    packed, out = forward(module, params, ids=ids, mask=gate, segment=segment)
    for number in (0, 1):
      own = mask[0] & (segment[0] == number)
      alone, _ = forward(module, params, ids=ids[:, own])
      np.testing.assert_allclose(np.asarray(packed)[:, own], alone, atol=1e-5)
  np.testing.assert_array_equal(out.tokens.position[0, :12], [*range(5), *range(7)])


def test_sites_and_texts_that_share_a_row():
  module, params = tiny({"s": FASTV})
  ids, mask, _ = batch()
  with pytest.raises(ValueError, match=r"sites.s.stack='llm' counts tokens by row, but several texts share one"):
    forward(module, params, ids=ids, mask=mask, segment=mask.astype(np.int32))
