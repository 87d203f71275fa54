"""Merging that takes the largest of a group, not the mean; no method of its own."""

import jax
import jax.numpy as jnp
from flax import struct

from tokred.tokens import Array, Plan, Tokens, scatter_add, take


@struct.dataclass
class PeakPlan(Plan):
  """A plan whose owners hold no mean, but the largest value of their group, channel by channel; see `peaks`."""


def peaks(tokens: Tokens, plan: Plan) -> Tokens:
  """Tokens whose owners hold what is no mean of their group: the values of a PeakPlan, and its largest scores.

  A merged token is as important as its most important member to whoever acts next in the block: what the block gave of
  one number a token, such as cls_attention.  (Bonnaerens & Dambre, 2023, LTMP, arXiv:2307.10780)
  """
  if plan.weight is None:
    return tokens
  owns = plan.owner == jnp.arange(plan.owner.shape[1])
  scores = {
    name: jnp.where(owns, _highest(value, plan.owner), value)
    for name, value in tokens.feats.items()
    if value.ndim == 2 and jnp.issubdtype(value.dtype, jnp.floating) and "/" not in name
  }
  x = jnp.where(owns[..., None], _largest(tokens.x, plan.owner), tokens.x) if isinstance(plan, PeakPlan) else tokens.x
  return tokens.replace(x=x, feats=tokens.feats | scores)


def _highest(score: Array, owner: Array) -> Array:
  """Highest score of each group, (B, N), at its owner; -inf elsewhere."""
  member = owner[:, None] == jnp.arange(owner.shape[1])[:, None]  # (B, owner, member), fused away
  return jnp.where(member, score[:, None], -jnp.inf).max(-1)


def _largest(x: Array, owner: Array) -> Array:
  """Largest value of each group, channel by channel, at its owner; members that are as large share the gradient."""
  index, member = jnp.maximum(owner, 0), owner[..., None] >= 0
  values = jax.lax.stop_gradient(x)
  low = jnp.full_like(values, jnp.finfo(x.dtype).min)
  one = lambda row, i, update: row.at[i].max(update, mode="promise_in_bounds")
  top = member & (values == take(jax.vmap(one)(low, index, jnp.where(member, values, low)), index))
  count = scatter_add(jnp.zeros_like(x), index, top.astype(x.dtype))
  return scatter_add(jnp.zeros_like(x), index, jnp.where(top, x, 0)) / jnp.maximum(count, 1)
