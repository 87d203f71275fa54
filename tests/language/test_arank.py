"""Which layers gamma-MoD converts: recorded ranks, a model's own, errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from languages import batch, needs_golden, recorded, tiny

from tokred.calibrate import arank, converted, rank_of


@needs_golden
def test_recorded_ranks():
  g = recorded("fn/gamma_mod_arank")
  for i in range(4):
    ranks = rank_of(jnp.asarray(g[f"attn{i}"]))
    np.testing.assert_array_equal(ranks, g[f"head_ranks{i}"])
    assert ranks.mean() == g[f"arank{i}"]
    # With a tolerance of its own the rank counts singular values above it.
    values = g[f"singular_values{i}"]
    np.testing.assert_array_equal(rank_of(jnp.asarray(g[f"attn{i}"]), 0.1), (values > 0.1 * values[:, :1]).sum(1))


def test_ranks_of_a_model():
  """Queries of zero make a layer's map uniform: full rank, but with singular values that fall off the fastest."""
  module, params = tiny()
  kernel = params["block_1"]["attn"]["qkv"]["kernel"]
  params = params | {
    "block_1": params["block_1"] | {"attn": params["block_1"]["attn"] | {"qkv": {"kernel": kernel * 0}}}
  }
  ids, mask, _ = batch()
  ranks = arank(module, params, [dict(ids=ids, mask=mask)], tolerance=0.2)
  assert ranks.shape == (3,) and ranks.argmin() == 1
  assert converted(ranks, 1) == (1,) and len(converted(ranks, 2)) == 2
  # Rows get what they get alone: 14 and 16 tokens.
  alone = [arank(module, params, [dict(ids=ids[row : row + 1, mask[row]])], tolerance=0.2) for row in (0, 1)]
  np.testing.assert_allclose(np.mean(alone, 0), ranks)


def test_layers_that_cannot_be_converted():
  with pytest.raises(ValueError, match=r"count=3 layers of 4, of which 2 may be converted; valid: 1 to 2"):
    converted(np.ones(4), 3, spare=(0, -1))
