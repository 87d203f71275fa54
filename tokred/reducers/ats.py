"""ATS: samples tokens at even steps of the cumulated attention, so that each image keeps as many as it needs.

(Fayyaz et al., 2022, arXiv:2111.15667)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.reducers.base import Planner, register
from tokred.tokens import Array, Plan, Tokens, compact, fold, inverse, rank, take


def significance(attention: Array, value: Array, free: Array) -> Array:
  """sigma_j = a_j ||v_j|| / sum: (B, N) float32 outside the gradient, zero where not free.

  Args:
    attention: (B, N), what CLS pays to each token.
    value: (B, N, H, d); the norm is over heads too.
    free: (B, N) bool, the tokens among which to sample.
  """
  value = jnp.where(free[..., None, None], jax.lax.stop_gradient(value).astype(jnp.float32), 0.0)
  mass = jnp.where(free, jax.lax.stop_gradient(attention).astype(jnp.float32), 0.0)
  mass = mass * jnp.sqrt(jnp.square(value).sum((2, 3)))
  return mass / jnp.maximum(mass.sum(1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def sample(score: Array, free: Array, levels: Array, most: int) -> tuple[Array, Array]:
  """Inverse transform sampling, which at even levels is no sampling at all.

  The CDF of the scores in ascending order, moved to [0, 1], is read backwards at `levels` even steps from its second
  value to 1; each picks the nearest entry, ties the lower, and an entry that is picked twice counts once.

  Each image is alone here.  In the authors' code an image that has fewer tokens than another of its batch is filled up
  with zeros, which count from the second such block on: there what it keeps depends on its neighbours.  And where
  levels are fewer than tokens, as in no model that they released, it looks at the most significant alone.

  Args:
    score: (B, N) float32.
    free: (B, N) bool.
    levels: (B, 1) int32, also where fewer are free.
    most: of `levels`, known beforehand.

  Returns:
    Who is picked, (B, N) bool, and the ascending rank of each score among the free, (B, N) int32.
  """
  n = score.shape[1]
  index = jnp.arange(n)
  place = rank(jnp.where(free, score, jnp.inf))
  ordered = take(jnp.where(free, score, 0.0), inverse(place))  # ascending, then zeros
  there = index < free.sum(1, keepdims=True)
  cdf = jnp.cumsum(ordered, axis=1)
  span = cdf[:, -1:] - cdf[:, :1]
  cdf = (cdf - cdf[:, :1]) / jnp.where(span > 0, span, 1.0)
  low = jnp.where(there & (cdf > 0), cdf, jnp.inf).min(1, keepdims=True)
  low = jnp.where(jnp.isfinite(low), low, 0.0)
  step = jnp.arange(most)
  level = low + step / jnp.maximum(levels - 1, 1) * (1.0 - low)  # (B, most)
  gap = jnp.where(there[:, None], jnp.abs(level[..., None] - cdf[:, None]), jnp.inf)
  nearest = jnp.where(step < levels, jnp.argmin(gap, axis=-1), -1)
  picked = (nearest[..., None] == index).any(1) & there
  return take(picked, place), place


@register("ats")
class ATS(Planner):
  """Keeps the protected and, of the others, those picked by `sample` at so many levels.

  Tokens of high significance are picked several times and kept once: `keep` is a capacity, and counts differ between
  images.  There are keep - protected levels, however few tokens are alive: the finer they are, the more are picked.
  The authors sample at levels of the input's 196 patches in every block, for which say levels=196, or keep=1.0 in all;
  where more are picked than there is room for, the most significant of them stay.  `keep` is 8 at least, as theirs.
  Behind learned rates name `levels`, for freezing lowers `keep`.

  The authors multiply only the kept rows of the attention map with the values; rows being independent, that is pruning
  after attention.  Survivors stand in ascending significance, as theirs.
  """

  needs: ClassVar[tuple[str, ...]] = ("cls_attention", "value")
  conserves: ClassVar[bool] = False
  scored: ClassVar[bool] = False
  ragged: ClassVar[bool] = True
  idles: ClassVar[bool] = False  # at a capacity of all tokens it still drops most of them
  places: ClassVar[tuple[str, ...]] = ("attn",)

  levels: int = 0  # 0: keep - protected

  def needed(self) -> tuple[str, ...]:
    if self.levels < 0:
      raise ValueError(f"levels={self.levels} must be a number of levels, or 0 for one a token of keep")
    return self.needs

  def count(self, keep: float, n: int, protected: int, source: int) -> int:
    return max(super().count(keep, n, protected, source), self.fewest(n, protected))

  def fewest(self, n: int, protected: int) -> int:
    return min(n, max(8, protected + 1))

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * width

  def __call__(
    self, tokens: Tokens, keep: Any, *, train: bool, mode: str, survival: Array | None = None
  ) -> tuple[Tokens, dict[str, Array]]:
    plan, report = self.plan(tokens, keep, train=train and mode == "mask")
    if mode == "gather":
      return compact(tokens, plan, min(keep, tokens.x.shape[1])), report
    return fold(tokens, plan, survival=survival), report

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)
    free = tokens.alive & ~tokens.protected
    score = significance(tokens.feats["cls_attention"], tokens.feats["value"], free)
    keep = jnp.minimum(jnp.asarray(keep, jnp.int32), n)
    room = (keep[:, None] if keep.ndim else keep) - (tokens.alive & tokens.protected).sum(1, keepdims=True)
    picked, place = sample(score, free, jnp.asarray([[self.levels]]) if self.levels else room, self.levels or n)
    if self.levels:
      picked = picked & (rank(jnp.where(picked, -place, n)) < room)
    stays = picked | (tokens.alive & tokens.protected)
    later = jnp.where(picked, place + n, jnp.where(free, 3 * n - place, 4 * n + index))
    order = inverse(rank(jnp.where(tokens.protected & tokens.alive, index, later)))
    owner = jnp.where(stays, index, -1)
    return Plan(owner=owner, order=order, gate=stays | ~tokens.alive), {"score": score}
