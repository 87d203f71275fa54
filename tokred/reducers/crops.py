"""A budget shared out among the crops of a large image, by what a thumbnail of it finds important: HiRED, GlobalCom2.

A tower sees the 1 + h w crops of an image as consecutive rows of its batch, the thumbnail first.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, finish_rows, keep_top, num_kept, ranks, register
from tokred.scores import SCORES, memory
from tokred.tokens import Array, Plan, Tokens, restore

CELLS = ("grid", "chunks")


def on_grid(tokens: Tokens, score: Array) -> Array:
  """(B, N) on the square grid of patches, (B, side, side) float32; 0 where none is left."""
  side = math.isqrt(tokens.owner.shape[1])
  score = jnp.where(tokens.alive, score.astype(jnp.float32), 0.0)
  return restore(score, tokens.owner)[:, -side * side :].reshape(-1, side, side)


def cell_sums(thumbnail: Array, grid: tuple[int, int], cells: str = "grid") -> Array:
  """Sums over the h w cells that the crops are of a thumbnail, (I, h w) float32.

  Args:
    thumbnail: (I, side, side) float32.
    grid: (h, w) crops.
    cells: "grid": rectangles; "chunks": the runs of a raster that is cut into h w equal parts, as HiRED's code has it.
  """
  side, (h, w) = thumbnail.shape[1], grid
  if cells == "chunks":
    cell = jnp.arange(side * side) * (h * w) // (side * side)
  else:
    at = lambda parts: jnp.arange(side) * parts // side
    cell = (at(h)[:, None] * w + at(w)).reshape(-1)
  member = (cell[:, None] == jnp.arange(h * w)).astype(jnp.float32)
  return jnp.einsum("ip,pc->ic", thumbnail.reshape(len(thumbnail), -1), member, precision="highest")


class Crops(Planner):
  """Keeps in each crop as many tokens of the highest score as `counts` says; `keep` is the capacity of a row.

  Without a grid each image is its own only crop.
  """

  conserves: ClassVar[bool] = False
  ragged: ClassVar[bool] = True
  idles: ClassVar[bool] = False
  scored: ClassVar[bool] = False  # it counts by a rule of its own
  places: ClassVar[tuple[str, ...]] = ("attn", "before", "after", "output")

  share: float = 0.2  # of all tokens of an image, crops and thumbnail
  grid: tuple[int, ...] = ()  # (h, w) crops of an image, behind its thumbnail
  score: str = "cls_attention"

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.grid and not (len(self.grid) == 2 and min(self.grid) >= 1):
      raise ValueError(f"grid={self.grid} must be (rows, columns) of crops, or () for none")
    if not 0.0 < self.share <= 1.0:
      raise ValueError(f"share={self.share} must be above 0.0 and at most 1.0")
    if self.score not in SCORES:
      raise ValueError(f"score={self.score!r} is not a score; {nearest(self.score, SCORES)}")
    return SCORES[self.score][1]

  def counts(self, tokens: Tokens, score: Array, n: Array) -> tuple[Array, Array]:
    """Tokens of each crop (B,) int32, and the score by which they are chosen, (B, N).

    Args:
      tokens: of all crops.
      score: (B, N), 0 where not free.
      n: (B,) int32 free tokens.
    """
    raise NotImplementedError

  def __call__(
    self, tokens: Tokens, keep: Any, *, train: bool, mode: str, survival: Array | None = None
  ) -> tuple[Tokens, dict[str, Array]]:
    plan, report = self.plan(tokens, keep, train=False)
    return finish_rows(tokens, plan, keep if mode == "gather" else 0, mode, survival), report

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    h, w = self.grid or (0, 0)
    if len(tokens.x) % (1 + h * w):
      raise ValueError(f"grid={self.grid}: {len(tokens.x)} rows are no images of a thumbnail and {h * w} crops each")
    free, safe = tokens.alive & ~tokens.protected, tokens.alive & tokens.protected
    score = jnp.where(free, jax.lax.stop_gradient(SCORES[self.score][0](tokens)), 0.0)
    n = free.sum(1, dtype=jnp.int32)
    count, score = self.counts(tokens, score, n)
    count = jnp.minimum(safe.sum(1, dtype=jnp.int32) + jnp.clip(count, 0, n), num_kept(tokens, keep)[:, 0])
    return keep_top(tokens, score, count, raster=True), {"score": score}


@register("hired")
class HiRED(Crops):
  """total = floor(P n share) for P crops of n tokens; min(floor(alpha total), n) are the thumbnail's, and of the rest
  crop c gets floor(rest v_c / sum v), v_c those of the thumbnail's best floor((1 - alpha) n) that lie in its cell.

  (Arif et al., 2024, arXiv:2408.10945)  The best for v are those of the first layer's attention of CLS, which a site
  reducer="remember" at layers=(0,) has to write down; chosen are those of the last.  Their code counts cells as runs of
  the raster, which are bands and no rectangles: cells="chunks".  What the two floors lose is lost, in the paper too.
  """

  alpha: float = 0.5
  cells: str = "grid"  # grid, chunks

  def needed(self) -> tuple[str, ...]:
    if self.cells not in CELLS:
      raise ValueError(f"cells={self.cells!r} is unknown; {nearest(self.cells, CELLS)}")
    if not 0.0 < self.alpha < 1.0:
      raise ValueError(f"alpha={self.alpha} must be between 0.0 and 1.0")
    return super().needed()

  def counts(self, tokens: Tokens, score: Array, n: Array) -> tuple[Array, Array]:
    floor = lambda value: jnp.floor(value + 1e-4).astype(jnp.int32)
    if not self.grid:
      return floor(n * self.share), score
    crops = self.grid[0] * self.grid[1]
    total = floor((1 + crops) * n * self.share)
    thumbnail = jnp.minimum(floor(total * self.alpha), n)
    free = tokens.replace(protected=~(tokens.alive & ~tokens.protected), mask=tokens.alive)
    place = ranks(free, memory(tokens)) - free.protected.sum(1, keepdims=True)
    best = ~free.protected & (place < floor(n * (1.0 - self.alpha))[:, None])
    votes = cell_sums(on_grid(tokens, best.astype(jnp.float32))[:: 1 + crops], self.grid, self.cells)
    votes = votes.astype(jnp.int32)  # (I, crops)
    rest = (total - thumbnail).reshape(-1, 1 + crops)[:, :1]
    each = rest * votes // jnp.maximum(votes.sum(1, keepdims=True), 1)
    return jnp.concatenate([thumbnail.reshape(-1, 1 + crops)[:, :1], each], axis=1).reshape(-1), score


def crop_shares(sums: Array, share: float, temperature: float) -> Array:
  """share (1 + sigma_c - mean sigma), at most 1, sigma = softmax_c(sum / temperature).  (Liu et al., 2025, GlobalCom2)

  Args:
    sums: (I, crops) float32 attention of CLS of a thumbnail's cells.
    share: of the tokens that should stay on average.
    temperature: the sums are below 1, so that at the authors' 10 shares hardly differ.
  """
  sigma = jax.nn.softmax(sums / temperature)
  return jnp.minimum(share * (1.0 + sigma - sigma.mean(1, keepdims=True)), 1.0)


@register("globalcom2")
class GlobalCom2(Crops):
  """Crop c keeps floor(r_c n) tokens, r_c of `crop_shares`; the thumbnail keeps floor(share n).  (Liu et al., 2025)

  Inside a crop tokens are ranked by a_i / sum a + g_i / sum g: CLS's attention of the crop itself, and that of the
  thumbnail, enlarged bilinearly.  We enlarge the whole thumbnail, which leaves no seams.
  """

  temperature: float = 10.0

  def counts(self, tokens: Tokens, score: Array, n: Array) -> tuple[Array, Array]:
    floor = lambda value: jnp.floor(value + 1e-4).astype(jnp.int32)
    if not self.grid:
      return floor(n * self.share), score
    (h, w), tiny = self.grid, jnp.finfo(jnp.float32).tiny
    thumbnail = on_grid(tokens, score)[:: 1 + h * w]  # (I, side, side)
    images, side = thumbnail.shape[:2]
    share = crop_shares(cell_sums(thumbnail, self.grid), self.share, self.temperature)
    share = jnp.concatenate([jnp.full((images, 1), self.share), share], axis=1).reshape(-1)
    large = jax.image.resize(thumbnail, (images, side * h, side * w), "bilinear")
    large = large.reshape(images, h, side, w, side).swapaxes(2, 3).reshape(images, h * w, side * side)
    seen = jnp.concatenate([jnp.zeros((images, 1, side * side)), large], axis=1).reshape(len(score), -1)
    first = tokens.owner.shape[1] - side * side
    patch = jnp.clip(tokens.position - first, 0, side * side - 1)
    free = tokens.alive & ~tokens.protected
    globally = jnp.where(free, jnp.take_along_axis(seen, patch, axis=1), 0.0)
    each = (a / jnp.maximum(a.sum(1, keepdims=True), tiny) for a in (score, globally))
    return floor(n * share), sum(each)
