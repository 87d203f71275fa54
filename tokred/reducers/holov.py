"""HoloV: a budget shared out among parts of the picture, so that not all of it goes where attention is.

(Zou et al., 2025)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, keep_top, num_kept, register
from tokred.reducers.diversity import compared, cosines, valid_metric
from tokred.reducers.tome import unit
from tokred.scores import SCORES
from tokred.tokens import Array, Plan, Tokens, rank


def chunk_of(free: Array, chunks: int) -> Array:
  """The chunk in which each free token lies, (B, N) int32: equal ones, but the first n mod C have a token more.

  Args:
    free: (B, N) bool, n of them in a row; what the others get means nothing.
    chunks: C; where n is less, the last are empty.
  """
  place = jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1
  small, more = jnp.divmod(free.sum(1, keepdims=True, dtype=jnp.int32), chunks)
  return jnp.maximum(place // (small + 1), (place - more) // jnp.maximum(small, 1))


def portions(share: Array, count: Array) -> Array:
  """floor(share count), and one more each to the largest shares until it is `count`: (B, C), (B, 1) to (B, C) int32."""
  budget = jnp.floor(share * count + 1e-5).astype(jnp.int32)
  return budget + (rank(-share) < count - budget.sum(1, keepdims=True))


@register("holov")
class HoloV(Planner):
  """The raster is cut into C chunks, as even as can be; chunk c gets a share m_c / sum m of the tokens that stay:

    u_i = sum over j of the chunk of (s_ij - mean_j s_ij)^2 / (n_c - 1),  s_ij = cos(z_i, z_j), s_ii = 0
    m_c = mean_{i in c} (1000 a_i + alpha u_i mean_c |1000 a| / (mean_c u + 1e-6))

  where mean_j divides by n_c - 1, too, and m_c is a_i if a chunk has but one token.  Shares are floored, and one more
  each goes to the largest; within a chunk those of the highest a stay.  (Zou et al., 2025)  All as the authors' code
  has it; scaled chunk by chunk, u all but cancels in m_c, and a alone decides.

  What a chunk cannot take goes to the highest a elsewhere; the authors fill up with zero vectors.  Survivors keep their
  order; with raster=False they stand as the authors', chunk by chunk by descending a, or in their order if all stay.
  """

  conserves: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("attn", "before", "after", "output")
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  score: str = "cls_attention"  # a
  metric: str = "token"  # z: key, token
  chunks: int = 16
  alpha: float = 0.09
  raster: bool = True

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.score not in SCORES:
      raise ValueError(f"score={self.score!r} is not a score; {nearest(self.score, SCORES)}")
    if self.chunks < 1:
      raise ValueError(f"chunks={self.chunks} must be at least 1")
    return tuple(sorted({*valid_metric(self.metric), *SCORES[self.score][1]}))

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * n / self.chunks * (width if self.metric == "token" else width / num_heads)

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n, tiny = tokens.x.shape[1], jnp.finfo(jnp.float32).tiny
    free, safe = tokens.alive & ~tokens.protected, tokens.alive & tokens.protected
    chunk = chunk_of(free, self.chunks)
    member = free[..., None] & (chunk[..., None] == jnp.arange(self.chunks))  # (B, N, C)
    sizes = member.sum(1, dtype=jnp.int32)  # (B, C)
    mean = lambda value: jnp.where(member, value[..., None], 0.0).sum(1) / jnp.maximum(sizes, 1)  # (B, N) to (B, C)
    pick = lambda table: jnp.where(member, table[:, None], 0).sum(-1)  # (B, C) to (B, N)
    attention = jnp.where(free, jax.lax.stop_gradient(SCORES[self.score][0](tokens)), 0.0)

    same = free[:, :, None] & free[:, None] & (chunk[:, :, None] == chunk[:, None])
    similar = cosines(unit(compared(tokens, self.metric), free))
    similar = jnp.where(same & ~jnp.eye(n, dtype=bool), similar, 0.0)
    others = jnp.maximum(pick(sizes) - 1, 1)
    off = jnp.where(same, similar - (similar.sum(-1) / others)[..., None], 0.0)
    spread = jnp.square(off).sum(-1) / others
    score = 1000.0 * attention
    score = score + self.alpha * spread * pick(mean(jnp.abs(score)) / (mean(spread) + 1e-6))
    score = jnp.where(pick(sizes) > 1, score, attention)
    share = mean(score)
    count = num_kept(tokens, keep) - safe.sum(1, keepdims=True, dtype=jnp.int32)
    budget = portions(share / jnp.maximum(share.sum(1, keepdims=True), tiny), count)

    by_attention = rank(jnp.where(free, -attention, jnp.inf))
    within = jnp.where(pick(budget >= sizes) > 0, jnp.arange(n), by_attention)
    place = rank(jnp.where(free, chunk * n + within, n * (self.chunks + 1)))
    start = jnp.cumsum(sizes, axis=1) - sizes
    chosen = free & (place - pick(start) < pick(budget))
    worth = jnp.where(chosen, -place, -n - by_attention)  # then those that fill up
    return keep_top(tokens, worth, keep, raster=self.raster), {"score": score}
