"""Virtual unmerging: attention as if every merged token stood at all of its places.

(Wang et al., 2025, DyMU, arXiv:2504.17040)
"""

import jax
import jax.numpy as jnp

from tokred.tokens import Array, take


def turned(x: Array, cos: Array, sin: Array) -> Array:
  """Rotary positions, halves turned: (B, H, N, d) by cos and sin (B or 1, N, d)."""
  first, second = jnp.split(x, 2, axis=-1)
  return x * cos[:, None] + jnp.concatenate([-second, first], axis=-1) * sin[:, None]


def unmerged_attention(
  q: Array, k: Array, v: Array, owner: Array, cos: Array, sin: Array, *, mask: Array | None = None
) -> tuple[Array, Array, Array]:
  """Attention of S source tokens of which M are computed, averaged back over the members of each.

    a_ij = (R_i q_o(i)) . (R_j k_o(j)) / sqrt(d), j <= i;  y_i = sum_j softmax_j(a_ij) v_o(j)
    out_m = mean of y_i over o(i) = m

  (Wang et al., 2025, DyMU)  Projections and MLPs see M tokens, attention S: quality without a change of what the
  language model was trained for, and less saved.  The cache holds the S expanded keys, so that decoding goes on as
  always.

  Args:
    q: (B, H, M, d), not yet turned to positions; so is k.
    k: (B, H, M, d).
    v: (B, H, M, d).
    owner: (B, S) int32 token that represents each source token, as `Tokens.owner`; -1 where none does: left out.
    cos: (B or 1, S, d) of the source tokens' positions; so is sin.
    sin: see above.
    mask: (B, S) bool source tokens that are there; None: all that have an owner.

  Returns:
    out (B, H, M, d), zero where no source token is; y (B, H, S, d); and the scores a before the mask (B, H, S, S)
    float32.
  """
  there = owner >= 0 if mask is None else (owner >= 0) & mask
  index = jnp.maximum(owner, 0)
  wide = lambda a: take(a.swapaxes(1, 2), index, "gather").swapaxes(1, 2)  # noqa: E731
  score = jnp.einsum(
    "bhid,bhjd->bhij", turned(wide(q), cos, sin), turned(wide(k), cos, sin), preferred_element_type=jnp.float32
  )
  score = score * q.shape[-1] ** -0.5
  place = jnp.arange(owner.shape[1])
  seen = (place[:, None] >= place) & there[:, None]
  seen = seen | jnp.eye(len(place), dtype=bool)  # who is not there sees itself, for a softmax of nothing is none
  weight = jax.nn.softmax(jnp.where(seen[:, None], score, -jnp.inf))
  y = jnp.einsum("bhij,bhjd->bhid", weight.astype(v.dtype), wide(v))
  member = (there[:, None] & (owner[:, None] == jnp.arange(q.shape[2])[:, None])).astype(jnp.float32)  # (B, M, S)
  member = member / jnp.maximum(member.sum(-1, keepdims=True), 1.0)
  return jnp.einsum("bms,bhsd->bhmd", member.astype(y.dtype), y), y, score
