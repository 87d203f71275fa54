"""A budget shared out among the crops of a large image, by what a thumbnail of it finds important: HiRED, GlobalCom2.

A tower sees the 1 + h w crops of an image as consecutive rows of its batch, the thumbnail first.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, finish_rows, keep_top, num_kept, on_host, ranks, register
from tokred.scores import SCORES, memory
from tokred.tokens import Array, Plan, Tokens, restore

CELLS = ("grid", "chunks")


def laid_out(source: int, prefix: int = -1, patch_grid: tuple[int, ...] = ()) -> tuple[tuple[int, int], int]:
  """How the patches of an input lie, and how many tokens stand before them, on the host.

  Args:
    source: tokens that there are of the input.
    prefix: as a site says it; below 0: none, or CLS.
    patch_grid: likewise, (rows, columns); (): a square.

  Returns:
    (rows, columns), and the tokens before them.

  Raises:
    ValueError: the tokens are no such grid, or not all of it, as in the scope of a router.
  """
  side = math.isqrt(max(source - max(prefix, 0), 0))
  rows, columns = patch_grid or (side, side)
  before = source - rows * columns
  if before not in ((prefix,) if prefix >= 0 else (0, 1)):
    raise ValueError(
      f"patch_grid={patch_grid}, prefix={prefix}: {source} tokens are not all patches of such an input; valid: a place "
      "where they all are, outside of the scope of a router, and their (rows, columns), or () for a square"
    )
  return (rows, columns), before


def on_grid(tokens: Tokens, score: Array, grid: tuple[int, int]) -> Array:
  """(B, N) on the (rows, columns) of patches, (B, rows, columns) float32; 0 where none is left."""
  score = jnp.where(tokens.alive, score.astype(jnp.float32), 0.0)
  return restore(score, tokens.owner)[:, -math.prod(grid) :].reshape(-1, *grid)


def cell_sums(thumbnail: Array, grid: tuple[int, int], cells: str = "grid") -> Array:
  """Sums over the h w cells that the crops are of a thumbnail, (I, h w) float32.

  Args:
    thumbnail: (I, rows, columns) float32.
    grid: (h, w) crops.
    cells: "grid": rectangles of rows // h x columns // w, of which the last take what is left; "chunks": the runs of a
      raster that is cut into h w equal parts, as HiRED's code has it.
  """
  (rows, columns), (h, w) = thumbnail.shape[1:], grid
  if cells == "chunks":
    cell = jnp.arange(rows * columns) * (h * w) // (rows * columns)
  else:
    at = lambda length, parts: jnp.minimum(jnp.arange(length) // max(length // parts, 1), parts - 1)
    cell = (at(rows, h)[:, None] * w + at(columns, w)).reshape(-1)
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
  source: int = 0  # tokens of a crop at the input, which the site fills in; 0: not known
  prefix: int = -1  # likewise, how many stand before the patches; below 0: none, or CLS
  patch_grid: tuple[int, ...] = ()  # likewise, (rows, columns) of the patches of a crop; (): a square

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.grid and not (len(self.grid) == 2 and min(self.grid) >= 1):
      raise ValueError(f"grid={self.grid} must be (rows, columns) of crops, or () for none")
    if not 0.0 < self.share <= 1.0:
      raise ValueError(f"share={self.share} must be above 0.0 and at most 1.0")
    if self.score not in SCORES:
      raise ValueError(f"score={self.score!r} is not a score; {nearest(self.score, SCORES)}")
    if self.grid and self.source and not self.patch_grid:
      raise ValueError(f"grid={self.grid} is of crops of one size, but images have their own here; valid: ()")
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


def hired_budget(n: int, crops: int, share: float, alpha: float) -> tuple[int, int, int]:
  """Tokens for the thumbnail, for all crops together, and how many of the thumbnail's best vote for crops."""
  total = int((1 + crops) * n * share)
  thumbnail = min(int(total * alpha), n)
  return thumbnail, min(total - thumbnail, crops * n), int(n * (1.0 - alpha))


@register("hired")
class HiRED(Crops):
  """total = floor(P n share) for P crops of n tokens; t = min(floor(alpha total), n) are the thumbnail's, and of the
  rest, min(total - t, (P - 1) n), crop c gets floor(rest v_c / sum v), at most n, v_c those of the thumbnail's best
  floor((1 - alpha) n) that lie in its cell.

  (Arif et al., 2024, arXiv:2408.10945)  The best for v are those of the first layer's attention of CLS, which a site
  reducer="remember" at layers=(0,) has to write down; chosen are those of the last.  Their code counts cells as runs of
  the raster, which are bands and no rectangles: cells="chunks".  What the floors lose is lost, in the paper too; their
  code takes that of a crop in float32, where now and then it loses one more.
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
    crops, most = math.prod(self.grid), tokens.x.shape[1]
    if not self.grid:
      return on_host(lambda i: int(i * self.share), n, most), score
    of_images = lambda rows: rows[:: 1 + crops]  # (B, ...) to (I, ...)
    budget = on_host(lambda i: hired_budget(i, crops, self.share, self.alpha), n, most)
    thumbnail, rest, voters = budget.T[..., None]  # (B, 1) each
    free = tokens.replace(protected=~(tokens.alive & ~tokens.protected), mask=tokens.alive)
    place = ranks(free, memory(tokens)) - free.protected.sum(1, keepdims=True)
    patch_grid, _ = laid_out(tokens.owner.shape[1], self.prefix, self.patch_grid)
    best = on_grid(tokens, ~free.protected & (place < voters), patch_grid)
    votes = cell_sums(of_images(best), self.grid, self.cells).astype(jnp.int32)  # (I, crops)
    each = of_images(rest) * votes // jnp.maximum(votes.sum(1, keepdims=True), 1)
    return jnp.concatenate([of_images(thumbnail), each], axis=1).reshape(-1), score


def crop_shares(sums: Array, share: float, temperature: float) -> Array:
  """share (1 + sigma_c - mean sigma), at most 1, sigma = softmax_c(sum / temperature).  (Liu et al., 2025, GlobalCom2)

  Args:
    sums: (I, crops) float32 attention of CLS of a thumbnail's cells.
    share: of the tokens that should stay on average.
    temperature: the sums are below 1, so that at the authors' 10 shares hardly differ.
  """
  sigma = jax.nn.softmax(sums / temperature)
  return jnp.minimum(share * (1.0 + sigma - sigma.mean(1, keepdims=True)), 1.0)


def enlarged(thumbnail: Array, grid: tuple[int, int]) -> Array:
  """A thumbnail of one crop's size, bilinearly that of all h w: (I, rows, columns) to (I, h w, rows * columns)."""
  (images, rows, columns), (h, w) = thumbnail.shape, grid
  large = jax.image.resize(thumbnail, (images, rows * h, columns * w), "bilinear")
  return large.reshape(images, h, rows, w, columns).swapaxes(2, 3).reshape(images, h * w, rows * columns)


@register("globalcom2")
class GlobalCom2(Crops):
  """Crop c keeps floor(r_c n) tokens, r_c of `crop_shares`; the thumbnail keeps floor(share n).  (Liu et al., 2025)

  Inside a crop tokens are ranked by a_i / ||a|| + g_i / ||g||: CLS's attention of the crop itself, and that of the
  thumbnail, enlarged bilinearly.  The authors count and rank in a crop only what shows the image, to which they enlarge
  the thumbnail; of a canvas' margin a reducer knows nothing, so that ours takes part.  Survivors keep their order; the
  authors' of the thumbnail stand by descending attention.
  """

  temperature: float = 10.0

  def counts(self, tokens: Tokens, score: Array, n: Array) -> tuple[Array, Array]:
    whole = on_host(lambda i: int(i * self.share), n, tokens.x.shape[1])
    if not self.grid:
      return whole, score
    each = 1 + math.prod(self.grid)
    patch_grid, prefix = laid_out(tokens.owner.shape[1], self.prefix, self.patch_grid)
    thumbnail = on_grid(tokens, score, patch_grid)[::each]  # (I, rows, columns)
    share = crop_shares(cell_sums(thumbnail, self.grid), self.share, self.temperature)  # (I, crops)
    count = jnp.floor(n.reshape(-1, each)[:, 1:] * share + 1e-4).astype(jnp.int32)
    seen = jnp.pad(enlarged(thumbnail, self.grid), ((0, 0), (1, 0), (0, 0))).reshape(len(score), -1)
    patch = jnp.clip(tokens.position - prefix, 0, seen.shape[1] - 1)
    globally = jnp.where(tokens.alive & ~tokens.protected, jnp.take_along_axis(seen, patch, axis=1), 0.0)
    unit = lambda a: a / jnp.maximum(jnp.linalg.norm(a, axis=1, keepdims=True), 1e-12)
    return jnp.concatenate([whole[::each, None], count], axis=1).reshape(-1), unit(score) + unit(globally)
