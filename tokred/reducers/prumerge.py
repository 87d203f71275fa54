"""PruMerge: keeps the outliers of CLS's attention, however many there are, and merges the rest into them.

(Shang et al., 2024)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, finish_rows, keep_top, merge_into, num_kept, register
from tokred.reducers.diversity import cosines
from tokred.reducers.tome import mean_heads, unit
from tokred.scores import SCORES
from tokred.tokens import Array, Plan, Tokens


def quantile(score: Array, free: Array, q: float) -> Array:
  """Of the scores of the T free tokens, interpolated at (T - 1) q: (B,) float32."""
  ordered = jnp.sort(jnp.where(free, score, jnp.inf), axis=1)
  at = (jnp.maximum(free.sum(1), 1) - 1) * q
  low = jnp.floor(at).astype(jnp.int32)
  high = jnp.ceil(at).astype(jnp.int32)
  pick = lambda i: jnp.take_along_axis(ordered, i[:, None], axis=1)[:, 0]
  low_value, high_value = pick(low), pick(high)
  return low_value + jnp.where(high > low, (at - low) * (high_value - low_value), 0.0)


def upper_fence(score: Array, free: Array) -> Array:
  """q3 + 1.5 (q3 - q1), above which a score is an outlier: (B,) float32.  (Tukey, 1977)"""
  q1, q3 = quantile(score, free, 0.25), quantile(score, free, 0.75)
  return q3 + 1.5 * (q3 - q1)


@register("prumerge")
class PruMerge(Planner):
  """Keeps the free tokens that score above `upper_fence`, at least one; `keep` is the capacity of a row.

  With `merge` each of the others joins the most similar by keys, x <- sum(a x) / sum(a), a the score; in the paper
  every kept token takes from its nearest neighbours, which may serve several.  (Shang et al., 2024)
  """

  conserves: ClassVar[bool] = False
  ragged: ClassVar[bool] = True
  idles: ClassVar[bool] = False
  scored: ClassVar[bool] = False  # it counts by a rule of its own
  places: ClassVar[tuple[str, ...]] = ("attn", "before", "after", "output")

  score: str = "cls_attention"
  merge: bool = True

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.score not in SCORES:
      raise ValueError(f"score={self.score!r} is not a score; {nearest(self.score, SCORES)}")
    return tuple(sorted({*SCORES[self.score][1], *(("key",) if self.merge else ())}))

  def __call__(
    self, tokens: Tokens, keep: Any, *, train: bool, mode: str, survival: Array | None = None
  ) -> tuple[Tokens, dict[str, Array]]:
    plan, report = self.plan(tokens, keep, train=False)
    return finish_rows(tokens, plan, keep if mode == "gather" else 0, mode, survival), report

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    free, safe = tokens.alive & ~tokens.protected, tokens.alive & tokens.protected
    score = jnp.where(free, jax.lax.stop_gradient(SCORES[self.score][0](tokens)), 0.0)
    above = (free & (score > upper_fence(score, free)[:, None])).sum(1, dtype=jnp.int32)
    count = jnp.minimum(safe.sum(1, dtype=jnp.int32) + jnp.maximum(above, 1), num_kept(tokens, keep)[:, 0])
    plan = keep_top(tokens, score, count, raster=True)
    if not self.merge:
      return plan, {"score": score}
    similar = cosines(unit(mean_heads(jax.lax.stop_gradient(tokens.feats["key"])), free))
    chosen = (plan.owner >= 0) & free
    target = jnp.argmax(jnp.where(chosen[:, None], similar, -jnp.inf), axis=-1).astype(jnp.int32)
    target = jnp.where(chosen.any(1, keepdims=True), target, -1)
    owner = jnp.where(free & ~chosen, target, plan.owner)
    share = jnp.maximum(score, jnp.finfo(jnp.float32).tiny)
    return merge_into(tokens, owner, plan.order, jnp.where(free, share, 1.0)), {"score": score}
