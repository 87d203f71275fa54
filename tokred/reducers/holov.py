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


def portions(share: Array, count: Array) -> Array:
  """floor(share count), and one more each to the largest shares until it is `count`: (B, C), (B, 1) to (B, C) int32."""
  budget = jnp.floor(share * count + 1e-5).astype(jnp.int32)
  return budget + (rank(-share) < count - budget.sum(1, keepdims=True))


@register("holov")
class HoloV(Planner):
  """The raster is cut into C chunks of equal length; chunk c gets a share m_c / sum m of the tokens that stay:

    u_i = variance over j of the chunk of cos(z_i, z_j), the token itself counting 0
    m_c = mean_{i in c} (1000 a_i + alpha u_i mean(1000 a) / mean(u))

  floored, and one more each to the largest shares; within a chunk those of the highest a stay.  (Zou et al., 2025)
  What a chunk cannot take goes to the highest a elsewhere; the authors fill up with zero vectors.  Survivors keep their
  order; with raster=False they stand as the authors', chunk by chunk by descending a.
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
    total = free.sum(1, keepdims=True, dtype=jnp.int32)
    chunk = (jnp.cumsum(free, 1, dtype=jnp.int32) - 1) * self.chunks // jnp.maximum(total, 1)
    member = free[..., None] & (chunk[..., None] == jnp.arange(self.chunks))  # (B, N, C)
    attention = jnp.where(free, jax.lax.stop_gradient(SCORES[self.score][0](tokens)), 0.0)

    same = free[:, :, None] & free[:, None] & (chunk[:, :, None] == chunk[:, None])
    similar = cosines(unit(compared(tokens, self.metric), free))
    similar = jnp.where(same & ~jnp.eye(n, dtype=bool), similar, 0.0)
    size = jnp.maximum(same.sum(-1), 1)
    off = jnp.where(same, similar - (similar.sum(-1) / size)[..., None], 0.0)
    spread = jnp.where(free, jnp.square(off).sum(-1) / jnp.maximum(size - 1, 1), 0.0)
    score = 1000.0 * attention
    scale = jnp.abs(score).sum(1, keepdims=True) / jnp.maximum(spread.sum(1, keepdims=True), tiny)
    score = score + self.alpha * spread * scale
    sizes = member.sum(1, dtype=jnp.int32)  # (B, C)
    mean = jnp.where(member, score[..., None], 0.0).sum(1) / jnp.maximum(sizes, 1)
    count = num_kept(tokens, keep) - safe.sum(1, keepdims=True, dtype=jnp.int32)
    budget = portions(mean / jnp.maximum(mean.sum(1, keepdims=True), tiny), count)

    by_attention = rank(jnp.where(free, -attention, jnp.inf))
    place = rank(jnp.where(free, chunk * n + by_attention, n * (self.chunks + 1)))
    start = jnp.cumsum(sizes, axis=1) - sizes
    pick = lambda table: jnp.where(member, table[:, None], 0).sum(-1)
    chosen = free & (place - pick(start) < pick(budget))
    worth = jnp.where(chosen, -place, -n - by_attention)  # then those that fill up
    return keep_top(tokens, worth, keep, raster=self.raster), {"score": score}
