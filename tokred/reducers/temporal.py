"""Video: what has not changed since the frame before goes, or joins it.

Frames follow each other with `patches` free tokens each, in a row of tokens; what stands between them (text, time
stamps) is protected.  Both are for the language model's beginning, stack="llm", layers=(0,), place="before".
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.reducers.base import Planner, keep_top, merge_into, register
from tokred.reducers.tome import unit
from tokred.tokens import Array, Plan, Tokens, inverse, rank, take

FIRST = 3.0  # the change of a first frame: no cosine is as low


def before(tokens: Tokens, patches: int) -> tuple[Array, Array]:
  """The token at that place one frame earlier, (B, N) int32, in the first frame itself; and whether there is one."""
  n = tokens.x.shape[1]
  index = jnp.arange(n, dtype=jnp.int32)
  free = tokens.alive & ~tokens.protected
  listed = inverse(rank(jnp.where(free, index, index + n)))
  t = jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1
  has = free & (t >= patches)
  return jnp.where(has, take(listed, jnp.maximum(t - patches, 0)), index), has


def change(tokens: Tokens, previous: Array, has: Array) -> Array:
  """1 - cos(x_i, x_i of the frame before), (B, N) float32; FIRST where there is none."""
  z = unit(jax.lax.stop_gradient(tokens.x), tokens.alive)
  return jnp.where(has, 1.0 - (z * take(z, previous)).sum(-1), FIRST)


class Temporal(Planner):
  """What both have in common."""

  places: ClassVar[tuple[str, ...]] = ("before", "attn", "after", "output")
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  patches: int = 4  # free tokens of a frame

  def needed(self) -> tuple[str, ...]:
    if self.patches < 1:
      raise ValueError(f"patches={self.patches} must be at least 1: tokens of a frame")
    return ()

  def fewest(self, n: int, protected: int) -> int:
    return protected + min(self.patches, n - protected)


@register("dtd")
class DifferentialTokenDrop(Temporal):
  """Drops tokens that are as they were: score 1 - cos(x_i, x_i of the frame before).  (Yao et al., 2025,
  TimeChat-Online)

  The frame before is the true one, whether it stayed or not; the first stays whole.  rate="threshold" with
  threshold=1 - tau drops where the cosine is above tau, as the authors; a fixed keep the least changed.
  """

  conserves: ClassVar[bool] = False

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    score = change(tokens, *before(tokens, self.patches))
    return keep_top(tokens, score, keep, raster=True), {"score": score}


@register("temporal_merge")
class TemporalMerge(Temporal):
  """The least changed join the token at the same place one frame earlier, and with it its own: a run is its mean,
  x <- sum(s x) / sum(s), at the place and time where it began.

  So DyCoke (Tao et al., 2024) and HoliTom (Shao et al., 2025) begin, which merge within windows of four frames, or
  within segments found by dynamic programming; here the segments are a token's own, one ends where it changes.
  rate="threshold" with threshold=1 - tau merges where the cosine is above tau.
  """

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)
    previous, has = before(tokens, self.patches)
    score = change(tokens, previous, has)
    plan = keep_top(tokens, score, keep, raster=True)
    owner = jnp.where((plan.owner >= 0) | ~has, index, previous)
    for _ in range(max(n - 1, 1).bit_length()):  # each step doubles how far a token looks back
      owner = take(owner, owner)
    return merge_into(tokens, jnp.where(tokens.alive, owner, -1), plan.order), {"score": score}
