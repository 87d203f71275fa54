"""Mean pooling, the baseline that often wins."""

import math
from typing import Any, ClassVar

import jax.numpy as jnp

from tokred.reducers.base import Planner, merge_into, num_kept, on_host, register
from tokred.tokens import Array, Plan, Tokens, inverse, rank


def cells(t: Array, height: Array, width: Array, count: Array) -> Array:
  """The cell of each token of a grid that is cut into `count` rectangles: bands, and columns within a band.

  k cells are g bands, g = sqrt(k height / width) to the nearest that fits; of these band b has
  floor((b + 1) k / g) - floor(b k / g) columns.  A square number of cells of a square grid are squares.

  Args:
    t: (B, N) int32 places in the grid, row by row.
    height: (B, 1) int32; so are width and count, 1 <= count <= height * width.
    width: see above.
    count: see above.
  """
  wanted = jnp.round(jnp.sqrt(count * height / jnp.maximum(width, 1))).astype(jnp.int32)
  bands = jnp.clip(wanted, -(-count // jnp.maximum(width, 1)), jnp.maximum(jnp.minimum(height, count), 1))
  bands = jnp.maximum(bands, 1)
  row, column = t // jnp.maximum(width, 1), t % jnp.maximum(width, 1)
  band = row * bands // jnp.maximum(height, 1)
  before, after = band * count // bands, (band + 1) * count // bands
  return before + column * (after - before) // jnp.maximum(width, 1)


@register("pool")
class Pool(Planner):
  """x_cell <- sum(s x) / sum(s) over the cells of the grid, see `cells`; each keeps the place of its first token.

  What PyTorch calls adaptive average pooling, where the cells divide the grid; where they do not, its windows overlap
  and ours do not.  Free tokens count in their order; if they are no square and no `grid` is given they count as a row.
  """

  scored: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("attn", "before", "after", "output")
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  grid: tuple[int, ...] = ()  # (height, width) of the tokens that arrive; (): square

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.grid and not (len(self.grid) == 2 and min(self.grid) >= 1):
      raise ValueError(f"grid={self.grid} must be (height, width), or () for a square")
    return ()

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)
    free, safe = tokens.alive & ~tokens.protected, tokens.alive & tokens.protected
    total = free.sum(1, keepdims=True, dtype=jnp.int32)
    roots = on_host(math.isqrt, total, n)
    height = jnp.where(roots * roots == total, roots, 1)
    if self.grid:
      height = jnp.where(total == self.grid[0] * self.grid[1], self.grid[0], 1)
    count = num_kept(tokens, keep) - safe.sum(1, keepdims=True, dtype=jnp.int32)
    cell = cells(jnp.cumsum(free, 1, dtype=jnp.int32) - 1, height, total // jnp.maximum(height, 1), count)
    same = free[:, None] & (cell[:, :, None] == cell[:, None])
    first = jnp.argmax(same, axis=-1).astype(jnp.int32)
    owner = jnp.where(free, first, jnp.where(safe, index, -1))
    kind = jnp.where(safe, 0, jnp.where(owner == index, 1, jnp.where(free, 2, 3)))
    return merge_into(tokens, owner, inverse(rank(kind * n + index))), {}
