"""ToMe: merges the most similar pairs of a bipartite split.  (Bolya et al., 2022, arXiv:2210.09461)"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.reducers.base import Planner, merge_into, num_kept, register
from tokred.tokens import Array, Plan, Tokens, inverse, rank


def unit(x: Array, alive: Array) -> Array:
  """x / ||x|| along the last axis in float32; zero where dead."""
  x = jnp.where(alive[..., None], x.astype(jnp.float32), 0.0)
  norm = jnp.linalg.norm(jnp.where(alive[..., None], x, 1.0), axis=-1, keepdims=True)
  return x / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)


@register("tome")
class ToMe(Planner):
  """Even places are sources a, odd ones destinations b; the r sources with the best match merge into it.

  kappa = mean over heads of k, unit length;  sim = kappa_a kappa_b^T;  t(i) = argmax_j sim_ij
  x <- sum(s x) / sum(s), s <- sum(s)

  Survivors stand as in the authors' code: the protected, the sources left over in their order, all destinations.
  (Without protected tokens that code leaves the sources by descending similarity, and so does this.)
  """

  needs: ClassVar[tuple[str, ...]] = ("key",)
  proportional: ClassVar[bool] = True
  scored: ClassVar[bool] = False

  def fewest(self, n: int, protected: int) -> int:
    return n - (n - protected) // 2

  def macs(self, n: float, width: int, num_heads: int) -> float:
    return n * n / 4 * (width / num_heads)

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)
    metric = unit(jax.lax.stop_gradient(tokens.feats["key"]).astype(jnp.float32).mean(2), tokens.alive)
    source, target = index[::2], index[1::2]
    can = tokens.alive & ~tokens.protected
    sim = jnp.einsum("bad,bcd->bac", metric[:, ::2], metric[:, 1::2], precision="highest")
    sim = jnp.where(can[:, ::2, None] & can[:, None, 1::2], sim, -jnp.inf)
    best, match = sim.max(-1), target[jnp.argmax(sim, axis=-1)]  # (B, Na)

    alive = tokens.alive.sum(1, keepdims=True)
    removed = alive - num_kept(tokens, keep)  # r
    edge_rank = rank(-best)
    merged = (edge_rank < removed) & jnp.isfinite(best)
    owner = jnp.broadcast_to(index, tokens.mask.shape)
    owner = owner.at[:, ::2].set(jnp.where(merged, match, source))
    owner = jnp.where(tokens.alive, owner, -1)

    # Places: protected, sources, destinations, merged sources (last merged first), dead.  One integer key sorts them.
    left = jnp.where(tokens.protected.any(1, keepdims=True), source, edge_rank)
    key = jnp.broadcast_to(index + 2 * n, tokens.mask.shape)
    key = key.at[:, ::2].set(jnp.where(merged, 4 * n - 1 - edge_rank, left + n))
    key = jnp.where(tokens.protected, index, key)
    key = jnp.where(tokens.alive, key, index + 4 * n)
    order = inverse(rank(key))
    return merge_into(tokens, owner, order), {"similarity": best}
