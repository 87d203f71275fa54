"""ToMe's other split: tokens at even steps stay, all others merge into the most similar of them.

(Bolya et al., 2022, arXiv:2210.09461, appendix and code)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.reducers.base import Planner, merge_into, num_kept, register
from tokred.reducers.tome import mean_heads, unit
from tokred.tokens import Array, Plan, Tokens, best, inverse, rank


def kth_split(free: Array, count: Array) -> Array:
  """Who stays: `count` of the T free tokens at even steps; the last of every k where T = k count.

  Token t (from 0) stays where floor((t + 1) count / T) > floor(t count / T).  The authors know only whole k, and cut
  off the T mod k last tokens; here any count will do and none is cut off.

  Args:
    free: (B, N) bool.
    count: (B, 1) int32.

  Returns:
    (B, N) bool.
  """
  t, total = jnp.cumsum(free, axis=1, dtype=jnp.int32), jnp.maximum(free.sum(1, keepdims=True), 1)
  return free & (t * count // total > (t - 1) * count // total)


@register("tome_kth")
class ToMeKth(Planner):
  """t(i) = argmax_j kappa_i kappa_j over the tokens j that stay;  x <- sum(s x) / sum(s), s <- sum(s)."""

  needs: ClassVar[tuple[str, ...]] = ("key",)
  proportional: ClassVar[bool] = True
  scored: ClassVar[bool] = False

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * n * (width / num_heads)

  def stays(self, free: Array, count: Array, tokens: Tokens, train: bool) -> Array:
    """Which of the free tokens (B, N) bool are the `count` (B, 1) that the others merge into, (B, N) bool."""
    del tokens, train
    return kth_split(free, count)

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)
    free, safe = tokens.alive & ~tokens.protected, tokens.alive & tokens.protected
    count = num_kept(tokens, keep) - safe.sum(1, keepdims=True, dtype=jnp.int32)
    stays = self.stays(free, count, tokens, train)
    metric = unit(jax.lax.stop_gradient(mean_heads(tokens.feats["key"])), tokens.alive)
    similarity = jnp.einsum("bid,bjd->bij", metric, metric, precision="highest")
    _, match = best(jnp.where(stays[:, None], similarity, -jnp.inf))
    owner = jnp.where(free & ~stays, match, jnp.where(tokens.alive, index, -1))
    kind = jnp.where(safe, 0, jnp.where(stays, 1, jnp.where(free, 2, 3)))
    return merge_into(tokens, owner, inverse(rank(kind * n + index))), {}
