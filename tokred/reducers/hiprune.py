"""HiPrune: objects of a middle layer with their surroundings, and what the last layers look at.

(Liu et al., 2025, arXiv:2508.00553)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, keep_top, num_kept, on_host, ranks, register
from tokred.reducers.crops import laid_out
from tokred.scores import SCORES
from tokred.tokens import Array, Plan, Tokens


def beside(patch: Array, anchor: Array, grid: tuple[int, int], wrap: bool) -> Array:
  """Whether a patch lies above, below, left or right of an anchor: (B, N) bool.

  Args:
    patch: (B, N) int32 places in a grid, row by row.
    anchor: (B, N) bool.
    grid: (rows, columns).
    wrap: neighbours by number instead, places before the first and behind the last moved into the grid: at the end of
      a row the next row's first patch counts, as in the authors' code.
  """
  rows, columns = grid
  if wrap:
    last = rows * columns - 1
    near = [jnp.clip(patch + step, 0, last)[:, None] == patch[:, :, None] for step in (-1, 1, -columns, columns)]
    return (jnp.stack(near).any(0) & anchor[:, None]).any(-1)
  row, column = patch // columns, patch % columns
  away = jnp.abs(row[:, :, None] - row[:, None]) + jnp.abs(column[:, :, None] - column[:, None])
  return ((away == 1) & anchor[:, None]).any(-1)


@register("hiprune")
class HiPrune(Planner):
  """Of k free tokens round(alpha k / 5) anchors by a middle layer, their neighbours, and the rest by the deep one.

  Scores are attention that tokens receive.  That of the middle layer is what a site reducer="remember",
  score="column_mean" has written there.  Neighbours lie above, below, left and right in the grid of patches; wrap=True
  finds them as the authors' code does, see `beside`.  Halves are rounded to the even number.  Survivors keep their
  order.
  """

  conserves: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("output", "before", "after", "attn")

  middle: str = "memory"  # names of tokred.scores.SCORES
  deep: str = "column_mean"
  alpha: float = 0.1
  wrap: bool = False
  source: int = 0  # tokens at the input, which the site fills in; 0: as many as there are owners
  prefix: int = -1  # of these before the patches, likewise; below 0: none, or CLS
  patch_grid: tuple[int, ...] = ()  # (rows, columns) of the patches, likewise; (): a square

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    for option in ("middle", "deep"):
      if getattr(self, option) not in SCORES:
        raise ValueError(f"{option}={getattr(self, option)!r} is not a score; {nearest(getattr(self, option), SCORES)}")
    if self.source and not self.patch_grid:
      raise ValueError(
        "reducer='hiprune' looks for neighbours in one grid, but images of this tower have their own; valid: a tower "
        "of one image_size"
      )
    return tuple(sorted({*SCORES[self.middle][1], *SCORES[self.deep][1]}))

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    grid, prefix = laid_out(self.source or tokens.owner.shape[1], self.prefix, self.patch_grid)
    free = tokens.alive & ~tokens.protected
    safe = (tokens.alive & tokens.protected).sum(1, keepdims=True, dtype=jnp.int32)
    middle, deep = (
      ranks(tokens, jax.lax.stop_gradient(SCORES[name][0](tokens))) - safe for name in (self.middle, self.deep)
    )
    count = on_host(lambda k: round(k * self.alpha / 5), jnp.maximum(num_kept(tokens, keep) - safe, 0), n)
    anchor = free & (middle < count)
    buffer = free & ~anchor & beside(tokens.position - prefix, anchor, grid, self.wrap)
    worth = -deep - jnp.where(anchor, 0, jnp.where(buffer, n, 2 * n))
    return keep_top(tokens, worth, keep, raster=True), {"score": worth.astype(jnp.float32)}
