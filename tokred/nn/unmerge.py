"""Virtual unmerging: attention as if every merged token stood at all of its places.

(Wang et al., 2025, DyMU, arXiv:2504.17040)

    a_ij = (R_i q_o(i)) . (R_j k_o(j)) / sqrt(d), j <= i;  y_i = sum_j softmax_j(a_ij) v_o(j)
    out_m = mean of y_i over o(i) = m

Projections and MLPs see the M tokens that are left, attention the S places: a language model meets the positions that
it was trained with, and less is saved.  The cache holds the S expanded keys, so that decoding goes on as always.
"""

import jax.numpy as jnp
from flax import struct

from tokred import tokens as tk
from tokred.nn.rope import last_position
from tokred.tokens import Array


@struct.dataclass
class Places:
  """Where the tokens of a reduced sequence stand in the whole one; places that nobody has are behind the others."""

  owner: Array  # (B, S) int32; the token that stands there, o(i)
  there: Array  # (B, S) bool; whether one does
  position: Array  # (B, S[, axis]) int32
  segment: Array | None = None  # (B, S) int32, -1 where nobody stands; which of the texts that share a row

  @property
  def last(self) -> Array:
    """See `last_position`."""
    return last_position(self.position, self.there)

  def expand(self, a: Array) -> Array:
    """Everyone at all of its places: (B, H, M, d) to (B, H, S, d)."""
    return tk.take(a.swapaxes(1, 2), self.owner, "gather").swapaxes(1, 2)

  def mean(self, y: Array, tokens: int) -> Array:
    """The mean over a token's places: (B, H, S, d) to (B, H, M, d), zero for who has none.

    Args:
      y: what attention gave at each place.
      tokens: M.
    """
    member = self.there[:, None] & (self.owner[:, None] == jnp.arange(tokens)[:, None])  # (B, M, S)
    share = member / jnp.maximum(member.sum(-1, keepdims=True), 1)
    y = jnp.where(self.there[:, None, :, None], y, 0)
    return jnp.einsum("bms,bhsd->bhmd", share.astype(y.dtype), y, preferred_element_type=jnp.float32).astype(y.dtype)


def places(owner: Array, position: Array, segment: Array | None = None) -> Places:
  """Those of a whole sequence, in which padding may stand anywhere.

  Args:
    owner: (B, S) int32 token that represents each place, as `Tokens.owner`; -1 where none does.
    position: (B, S[, axis]) int32.
    segment: (B, S) int32; None: one text a row.
  """
  order = tk.inverse(tk.rank((owner < 0).astype(jnp.int32)))
  owner, position = tk.take(owner, order), tk.take(position, order)
  there = owner >= 0
  segment = None if segment is None else jnp.where(there, tk.take(segment, order), -1)
  return Places(jnp.where(there, owner, 0), there, position, segment)
