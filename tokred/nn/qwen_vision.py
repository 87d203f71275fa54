"""The vision tower of Qwen2-VL and Qwen2.5-VL: images of any size, most blocks attending within windows.

Wang et al., 2024, Qwen2-VL, arXiv:2409.12191; Bai et al., 2025, Qwen2.5-VL, arXiv:2502.13923.

A row is one frame: a picture, or a moment of a video, whose frames never attend to each other in this tower.  The host
lays a row's patches out window by window, each window padded to its full size (`arrange`), so that attention within
windows is a reshape, and frames of different sizes share one static shape.  Four neighbouring patches leave as one
token, four times as wide; the two layers that bring it to the language model's width are the VLM's projector.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from tokred import tokens as tk
from tokred.config import nearest
from tokred.layout import Sites, Stack
from tokred.nn import attention
from tokred.nn.block import ACTIVATIONS, Attention, Mlp
from tokred.nn.reduce import Reduce
from tokred.nn.rope import rotate
from tokred.rates import Rows
from tokred.reducers.base import Planner
from tokred.sites import parse
from tokred.tokens import Array, Tokens

LONGEST = 16384  # tokens of a frame, as the published processors allow


@dataclasses.dataclass(frozen=True)
class Shape:
  """The sizes of the tower, all static."""

  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  patch: int = 14
  temporal: int = 2  # frames of a patch
  channels: int = 3
  merge: int = 2  # patches along each side of a token
  window: int = 0  # tokens along each side of a window; 0: every block attends to the whole frame
  full: tuple[int, ...] = ()  # blocks that attend to the whole frame all the same
  gated: bool = True  # Qwen2.5: gated MLP and RMSNorm; Qwen2: plain MLP and LayerNorm
  activation: str = "silu"
  norm_eps: float = 1e-6
  theta: float = 10_000.0

  @property
  def patch_dim(self) -> int:
    """Numbers of a patch: channels x temporal x patch x patch, in this order."""
    return self.channels * self.temporal * self.patch**2

  @property
  def unit(self) -> int:
    """Patches of a token."""
    return self.merge**2


@struct.dataclass
class Frames:
  """Patches of frames, window by window; of `arrange`.  M tokens of the largest frame, P patches in its windows."""

  patches: Any  # (B, P, patch_dim) float32
  position: Any  # (B, P, 2) int32; row and column of each patch
  mask: Any  # (B, P) bool; False where a window or a frame is padded
  place: Any  # (B, M) int32; where each token of the frame, row by row, is among the windows; -1 behind the last


@struct.dataclass
class Output:
  """What the tower returns."""

  tokens: Tokens  # (B, M or fewer, unit x width); `position` (B, N) numbers the tokens of a frame row by row
  aux: dict[str, Any]  # what the sites report


def grids(grid_thw: Any, shape: Shape) -> list[tuple[int, int]]:
  """Rows and columns of tokens of every frame, in order: (K, 3) patches along time, height and width.

  Raises:
    ValueError: no image, or a size that is not a multiple of a token.
  """
  grid_thw = np.asarray(grid_thw)
  if grid_thw.ndim != 2 or grid_thw.shape[1:] != (3,) or not len(grid_thw):
    raise ValueError(f"grid_thw of shape {grid_thw.shape}; valid: (images, 3), one image or more")
  out = []
  for number, (t, h, w) in enumerate(grid_thw.tolist()):
    if min(t, h, w) < 1 or h % shape.merge or w % shape.merge:
      raise ValueError(
        f"grid_thw[{number}]={[t, h, w]}: height and width must be multiples of spatial_merge_size={shape.merge}"
      )
    out += [(h // shape.merge, w // shape.merge)] * t
  return out


def arrange(patches: Any, grid_thw: Any, shape: Shape, *, windows: int = 0, tokens: int = 0) -> Frames:
  """Lays patches out for the tower, on the host.

  Args:
    patches: (all patches, patch_dim), image by image, as the checkpoint's processor flattens them: the patches of a
      token stand together.
    grid_thw: (K, 3) int patches of each image along time, height and width.
    shape: of the tower.
    windows: of a row, where shapes shall not depend on the images; 0: as many as these need.
    tokens: of a row, likewise.

  Raises:
    ValueError: patches that are not as many as the grids say, or do not fit.
  """
  patches, frames = np.asarray(patches, np.float32), grids(grid_thw, shape)
  expected = shape.unit * sum(h * w for h, w in frames)
  if patches.shape != (expected, shape.patch_dim):
    raise ValueError(f"patches of shape {patches.shape}, but grid_thw asks for {(expected, shape.patch_dim)}")
  orders = [_windows(h, w, shape.window) for h, w in frames]
  need_windows, need_tokens = max(map(len, orders)), max(h * w for h, w in frames)
  if (windows and windows < need_windows) or (tokens and tokens < need_tokens):
    raise ValueError(
      f"an image needs windows={need_windows} and tokens={need_tokens}, but the shapes have room for {windows} and "
      f"{tokens}; make it smaller"
    )
  m = tokens or need_tokens
  side = shape.window**2 or m
  units = np.full((len(frames), (windows or need_windows) * side), -1)
  for row, order in zip(units, orders, strict=True):
    for number, window in enumerate(order):
      row[number * side : number * side + len(window)] = window
  out = Frames(
    patches=np.zeros((*units.shape, shape.unit, shape.patch_dim), np.float32),
    position=np.zeros((*units.shape, shape.unit, 2), np.int32),
    mask=np.repeat(units >= 0, shape.unit, axis=1),
    place=np.full((len(frames), m), -1, np.int32),
  )
  inner = np.stack(np.mgrid[: shape.merge, : shape.merge], -1).reshape(-1, 2)
  first = 0
  for row, (h, w) in enumerate(frames):
    there = units[row] >= 0
    which = units[row, there]
    own = patches[first : first + shape.unit * h * w].reshape(h * w, shape.unit, -1)
    out.patches[row, there] = own[which]
    corner = np.stack([which // w, which % w], -1) * shape.merge
    out.position[row, there] = corner[:, None] + inner
    out.place[row, which] = np.flatnonzero(there)
    first += len(own) * shape.unit
  flat = lambda a: a.reshape(len(frames), -1, a.shape[-1])
  return out.replace(patches=flat(out.patches), position=flat(out.position))


def _windows(h: int, w: int, side: int) -> np.ndarray:
  """Tokens of each window, (windows, side x side), those that there are before the -1 of the others."""
  index = np.arange(h * w).reshape(h, w)
  if not side:
    return index.reshape(1, -1)
  index = np.pad(index, ((0, -h % side), (0, -w % side)), constant_values=-1)
  index = index.reshape(index.shape[0] // side, side, -1, side).swapaxes(1, 2).reshape(-1, side * side)
  return np.take_along_axis(index, np.argsort(index < 0, axis=1, kind="stable"), axis=1)


class Tower(nn.Module):
  """Patches, blocks, norm; four patches a token."""

  shape: Shape
  sites: Sites
  dtype: str = "float32"
  attention: str = "auto"

  @nn.compact
  def __call__(
    self, frames: Frames, *, train: bool = False, mode: str = "gather", options: Mapping[str, Array] | None = None
  ) -> Output:
    """Encodes frames.

    Args:
      frames: of `arrange`.
      train: whether reducers may sample; randomness comes from the stream "reduce".
      mode: "mask" or "gather"; a frame keeps a share of its own tokens, whatever is in the batch.
      options: values of options that move while training, by "<site>.<option>".
    """
    s, dtype = self.shape, jnp.dtype(self.dtype)
    norm = functools.partial(nn.RMSNorm if s.gated else nn.LayerNorm, epsilon=s.norm_eps, dtype=dtype)
    alive = jnp.asarray(frames.mask)
    batch, length = alive.shape
    size = s.window**2 * s.unit if s.window else length
    x = Patches(s, dtype, name="patch_embed")(jnp.where(alive[..., None], frames.patches, 0))
    angle = axial(jnp.asarray(frames.position), s.width // s.num_heads, s.theta)
    feats: dict[str, Array] = {}
    for layer in range(s.depth):
      rows = (batch, length) if layer in s.full or not s.window else (batch * length // size, size)
      part = lambda a, rows=rows: a.reshape(*rows, *a.shape[2:])
      wanted = self.sites.needs(layer) if layer == s.depth - 1 else ()
      block = Block(s, dtype, self.attention, name=f"block_{layer}")
      x, feats = block(part(x), part(angle), part(alive), wanted)
      x = x.reshape(batch, length, s.width)
    x = norm(name="norm")(x).reshape(batch, -1, s.unit * s.width)
    group = lambda a: a.reshape(batch, -1, s.unit, *a.shape[2:]).mean(2)
    feats = {name: group(a.reshape(batch, length, *a.shape[2:])) for name, a in feats.items()}
    return self._reduce(frames, x, feats, train, mode, options)

  def _reduce(
    self, frames: Frames, x: Array, feats: dict[str, Array], train: bool, mode: str, options: Mapping[str, Array] | None
  ) -> Output:
    """Tokens row by row, those that frames of other sizes do not have behind the last, and the site behind them."""
    place = jnp.asarray(frames.place)
    there = place >= 0
    moved = jax.tree.map(lambda a: tk.take(a, jnp.maximum(place, 0)), (x, feats))
    tokens = tk.start(jnp.where(there[..., None], moved[0], 0))
    spots, keeps = self.sites.at(-1, "output"), dict(options or {})
    count, slots = there.sum(1, dtype=jnp.int32), there.shape[1]
    feats = moved[1] | {tk.SOURCE: jnp.broadcast_to(count[:, None], there.shape)}
    tokens = tokens.replace(mask=there, owner=jnp.where(there, tokens.owner, -1), feats=feats)
    for spot in spots:
      table = [share(spot, n) for n in range(slots + 1)]
      count, slots = jnp.asarray(table, jnp.int32)[count], table[-1]
      keeps[spot.site] = (*keeps.get(spot.site, ()), Rows(count, slots))
    if spots:
      tokens, report = Reduce(spots, name="reduce")(tokens, "output", keeps, train=train, mode=mode)
      return Output(tokens.replace(feats={}), report)
    return Output(tokens.replace(feats={}), {})


class Patches(nn.Module):
  """(B, P, patch_dim) to (B, P, D); the kernel is that of a convolution, (patch, patch, channels x temporal, D)."""

  shape: Shape
  dtype: Any

  @nn.compact
  def __call__(self, patches: Array) -> Array:
    s = self.shape

    def init(key: Array, size: Sequence[int], dtype: Any) -> Array:
      return nn.initializers.lecun_normal()(key, (s.patch_dim, s.width), dtype).reshape(size)

    kernel = self.param("kernel", init, (s.patch, s.patch, s.channels * s.temporal, s.width), jnp.float32)
    patches = patches.reshape(*patches.shape[:2], s.channels * s.temporal, s.patch, s.patch).astype(self.dtype)
    return jnp.einsum("bncij,ijcd->bnd", patches, kernel.astype(self.dtype))


class Block(nn.Module):
  """x + attention(norm x), x + mlp(norm x), within the rows that it is given."""

  shape: Shape
  dtype: Any
  attention: str

  @nn.compact
  def __call__(self, x: Array, angle: Array, alive: Array, wanted: Sequence[str]) -> tuple[Array, dict[str, Array]]:
    """(rows, N, D), angles (rows, N, d / 2) and (rows, N) bool to the same, and the features that are wanted."""
    s = self.shape
    norm = functools.partial(nn.RMSNorm if s.gated else nn.LayerNorm, epsilon=s.norm_eps, dtype=self.dtype)
    attend = Attention(s.width, s.num_heads, dtype=self.dtype, impl=self.attention, name="attn")
    q, k, v = attend(norm(name="norm1")(x))
    q, k = rotate(q, angle), rotate(k, angle)
    # Padding attends to padding: rows without a token stay finite, and nothing of them reaches the others.
    update = attend.out(attend.mix(q, k, v, None, None, jnp.where(alive, 0, -1)))
    feats = {n: attention.FEATURES[n](q, k, v, size=None, mask=alive) for n in wanted if n in attention.FEATURES}
    feats |= {"update": update} if "update" in wanted else {}
    x = x + update
    return x + Mlp(s.mlp_dim, self.dtype, s.activation, s.gated, name="mlp")(norm(name="norm2")(x)), feats


class Merger(nn.Module):
  """The projector: fc1, GELU, fc2 for each token for itself."""

  width: int

  @nn.nowrap
  def left(self, n: int) -> int:
    """Tokens that come out where n go in."""
    return n

  @nn.compact
  def __call__(self, tokens: Tokens, grid: tuple[int, int] = (0, 0), train: bool = False) -> Tokens:
    """Tokens (B, N, unit x D) to the same of the language model's width; the grid does not matter."""
    x = nn.Dense(tokens.x.shape[-1], dtype=tokens.x.dtype, name="fc1")(tokens.x)
    return tokens.replace(x=nn.Dense(self.width, dtype=x.dtype, name="fc2")(nn.gelu(x, approximate=False)))


def axial(position: Array, dim: int, theta: float) -> Array:
  """Angles of patches: half of the channels follows the row, half the column; (B, P, 2) to (B, P, dim / 2) float32."""
  frequency = 1.0 / theta ** (np.arange(0, dim // 2, 2, dtype=np.float32) / (dim // 2))
  return (position[..., None].astype(jnp.float32) * frequency).reshape(*position.shape[:2], -1)


def make(
  shape: Shape, sites: Mapping[str, Any] | None = None, *, dtype: str = "float32", attention: str = "auto"
) -> Tower:
  """The module of these sizes and `config.sites`; every error of either is raised here.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  for field in ("width", "depth", "mlp_dim", "num_heads", "patch", "temporal", "channels", "merge"):
    if getattr(shape, field) < 1:
      raise ValueError(f"{field}={getattr(shape, field)} must be 1 or more")
  if shape.width % (4 * shape.num_heads):
    raise ValueError(f"num_heads={shape.num_heads}: heads of width={shape.width} must be multiples of 4")
  if shape.activation not in ACTIVATIONS:
    raise ValueError(f"activation={shape.activation!r} is unknown; {nearest(shape.activation, ACTIVATIONS)}")
  out = parse(sites or {}, Stack(shape.depth, LONGEST, 0, has_cls=False))
  for spot in out.spots:
    field = f"sites.{spot.site}"
    if spot.place != "output":
      raise ValueError(f"{field}.place={spot.place!r} is not available in a tower with windows; valid: output")
    if not issubclass(spot.type, Planner) or spot.rate != "fixed" or spot.budget is None:
      raise ValueError(
        f"{field}: frames of different sizes keep a fixed share or number of their tokens (keep), by a reducer that "
        f"writes plans; got reducer={spot.reducer!r} and rate={spot.rate!r}"
      )
  return Tower(shape, out, dtype, attention)


def share(spot: Any, n: int) -> int:
  """Of so many tokens of a frame, those that stay."""
  if not n:
    return 0
  reducer = spot.module(parent=None)
  if isinstance(spot.budget, float) and spot.budget <= 1.0:
    return max(reducer.count(float(spot.budget), n, 0, n), reducer.fewest(n, 0))
  return min(n, int(spot.budget))
