"""STViT: a few semantic tokens for the whole grid, cluster seeds refined by attention.

(Chang et al., 2023, arXiv:2303.08685)  The authors' released code is of the variant on Swin; this follows it on a ViT.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tokred.config import nearest
from tokred.reducers.base import Reducer, register
from tokred.reducers.recover import own_places
from tokred.reducers.sit import seats
from tokred.reducers.transforming import shares, transform, visible
from tokred.tokens import Array, Tokens, restore, take

POOLS = ("max", "avg")


def windows(shape: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
  """Which patches belong to which window, (M, S) bool: [floor(i n / m), ceil((i + 1) n / m)) along each side.

  Windows overlap where the sides do not divide, as in adaptive pooling elsewhere.
  """
  sides = []
  for out, n in zip(shape, grid, strict=True):
    i, place = np.arange(out)[:, None], np.arange(n)[None]
    sides.append((place >= i * n // out) & (place < -(-(i + 1) * n // out)))
  rows, columns = sides
  return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(shape[0] * shape[1], grid[0] * grid[1])


def largest(x: Array, member: Array, gate: Array, learned: bool) -> Array:
  """Maximum over the tokens of each cell that are there, (B, K, D); 0 where there is none.

  A gate learns what its token makes of the maximum, which is 0 for most: x_n less the largest of the others, or 0.

  Args:
    x: (B, N, D).
    member: (B, K, N) bool, of which cells each token is.
    gate: (B, N) float32, 0 or 1.
    learned: whether the gate has a gradient.
  """
  there = (member & (gate > 0)[:, None])[..., None]
  among = jnp.where(there, x[:, None], -jnp.inf)  # (B, K, N, D)
  top = among.max(2)
  out = jnp.where(jnp.isfinite(top), top, 0.0)
  if not learned:
    return out
  first = jnp.argmax(among, axis=2)[:, :, None] == jnp.arange(x.shape[1])[:, None]
  others = jnp.where(first, jnp.where(first, -jnp.inf, among).max(2)[:, :, None], top[:, :, None])
  makes = jnp.where(jnp.isfinite(others), jax.nn.relu(x[:, None] - others), x[:, None])
  makes = jax.lax.stop_gradient(jnp.where(member[..., None], makes, 0.0))
  return out + (makes * (gate - jax.lax.stop_gradient(gate))[:, None, :, None]).sum(2)


class Refine(nn.Module):
  """q <- q + g1 MHA(LN(q), LN([s, x]));  q <- q + g2 MLP(LN(q)), with LayerScale g.

  (B, K, D), (B, K, D) and (B, N, D) to (B, K, D), float32.
  """

  num_heads: int
  layer_scale: float

  @nn.compact
  def __call__(self, q: Array, s: Array, x: Array, gate: Array) -> Array:
    """gate: (B, N) float32, 1 for the image tokens that are attended to, else 0; it learns."""
    width, norm1 = q.shape[-1], nn.LayerNorm(epsilon=1e-6, name="norm1")
    scale = lambda name: self.param(name, nn.initializers.constant(self.layer_scale), (width,), jnp.float32)
    both = norm1(jnp.concatenate([s, x], axis=1))
    gate = jnp.concatenate([jnp.ones(s.shape[:2]), gate], axis=1)[:, None, None]

    def weighed(query: Array, key: Array, value: Array) -> Array:  # (B, N, H, d) each
      logits = jnp.einsum("bkhd,bnhd->bhkn", query, key, precision="highest") * query.shape[-1] ** -0.5
      return jnp.einsum("bhkn,bnhd->bkhd", shares(logits, gate), value, precision="highest")

    attend = nn.MultiHeadDotProductAttention(self.num_heads, attention_fn=weighed, name="attn")
    q = q + scale("layer_scale1") * attend(norm1(q), both)
    h = nn.gelu(nn.Dense(4 * width, name="fc1")(nn.LayerNorm(epsilon=1e-6, name="norm2")(q)), approximate=False)
    return q + scale("layer_scale2") * nn.Dense(width, name="fc2")(h)


@register("stvit")
class STViT(Reducer):
  """K semantic tokens, K a square: s = pool(x) to sqrt(K) x sqrt(K);  s <- Refine(s, s, x);  s <- Refine(s + G, s, x).

  G (K, D) is learned, a global offset of each cluster.  `keep` counts the prefix tokens too, which pass unchanged and
  stand first: 17 with CLS gives 16.  A source token is owned by the (first) cell that it was pooled into, whose share
  of the sizes is even.  For the grid to come back, let them go around blocks: `stvit_recover` is the end of the scope.
  """

  conserves: ClassVar[bool] = False  # made by attention, not by averaging
  idles: ClassVar[bool] = False
  still: ClassVar[bool] = True
  places: ClassVar[tuple[str, ...]] = ("after", "before", "around", "output")

  grid: tuple[int, ...] = ()  # (rows, columns) of the input; (): a square.  The rest is prefix
  pool: str = "max"  # max, avg
  num_heads: int = 0  # 0: heads of 64 channels
  layer_scale: float = 1e-5
  source: int = 0  # tokens at the input, which the site fills in; 0: as many as there are owners
  prefix: int = -1  # of these before the grid, likewise; below 0: what the largest square leaves

  def count(self, keep: float, n: int, protected: int, source: int) -> int:
    return math.isqrt(math.floor(keep * (n - protected))) ** 2 + protected  # the next square below

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.pool not in POOLS:
      raise ValueError(f"pool={self.pool!r} is not a pooling; {nearest(self.pool, POOLS)}")
    if len(self.grid) not in (0, 2):
      raise ValueError(f"grid={self.grid} must be (rows, columns), or () for a square")
    return ()

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    k = left - max(self.prefix, 0)
    cells = (1 + (self.pool == "avg")) * k * n * width
    return cells + 2 * (2 * (k + n) * width**2 + 10 * k * width**2 + 2 * k * (k + n) * width)  # keys, queries, maps

  @nn.compact
  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    source, width = self.source or tokens.owner.shape[1], tokens.x.shape[-1]
    grid = tuple(self.grid) or (math.isqrt(source - max(self.prefix, 0)),) * 2
    prefix = source - grid[0] * grid[1]
    if not isinstance(keep, int):
      raise ValueError(f"keep={keep} must be a Python int: the tokens are a grid of cells")
    side = math.isqrt(max(keep - prefix, 0))
    if prefix < 0 or side < 1 or prefix + side * side != keep or self.prefix not in (-1, prefix):
      raise ValueError(
        f"keep={keep} must be a square and the prefix tokens: {source} tokens at the input are a grid of "
        f"{grid[0]} x {grid[1]} and {prefix} others; set grid or keep"
      )
    x, _, gate = visible(tokens)
    gate = jnp.where(tokens.protected, 0.0, gate)
    # Cells by position, so that tokens may have moved, merged or gone before.
    place = jnp.clip(tokens.position - prefix, 0, grid[0] * grid[1] - 1)
    member = jnp.asarray(windows((side, side), grid).T)[place].swapaxes(1, 2) & ~tokens.protected[:, None]  # (B, K, N)
    share = shares(jnp.zeros(member.shape), member * gate[:, None])
    if self.pool == "avg":
      s = jnp.einsum("bkn,bnd->bkd", share, x, precision="highest")
    else:
      s = largest(x, member, gate, jnp.issubdtype(tokens.mask.dtype, jnp.floating))
    heads = self.num_heads or max(width // 64, 1)
    s = Refine(heads, self.layer_scale, name="refine1")(s, s, x, gate)
    offset = self.param("offset", nn.initializers.normal(0.02), (side * side, width), jnp.float32)
    s = Refine(heads, self.layer_scale, name="refine2")(s + offset, s, x, gate)

    out = transform(tokens, *seats(tokens, share, keep, mode))
    count = out.protected.sum(1, keepdims=True)
    slot = jnp.arange(out.x.shape[1]) - count
    soft = take(s, jnp.clip(slot, 0, s.shape[1] - 1)).astype(out.x.dtype)
    return out.replace(x=jnp.where((out.alive & (slot >= 0))[..., None], soft, out.x)), {}


@register("stvit_recover")
class STViTRecover(Reducer):
  """The grid as it was, refined by what the semantic tokens have become:  x <- Refine(x, s, s).

  It acts behind the last block of the scope of a `stvit` at place="around": x (B, S, D) are the tokens that went round,
  s those inside.  Protected tokens went through the blocks and come out as they are.  With the authors' LayerScale of
  1e-5 the patches begin as they arrived at the scope.
  """

  needs: ClassVar[tuple[str, ...]] = ("outer",)
  conserves: ClassVar[bool] = False  # made by attention, not by averaging
  recovers: ClassVar[bool] = True
  idles: ClassVar[bool] = False
  scored: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("after",)

  num_heads: int = 0  # 0: heads of 64 channels
  layer_scale: float = 1e-5
  source: int = 0  # tokens at the input, which the site fills in

  def recovered(self, n: Any, source: int) -> Any:
    return n  # it is the scope that counts what comes back

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return (10 * self.source + 2 * n) * width * width + 2 * self.source * n * width

  @nn.compact
  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    outer = tokens.feats["outer"]
    x, _, gate = visible(tokens)
    heads = self.num_heads or max(x.shape[-1] // 64, 1)
    refine = Refine(heads, self.layer_scale, name="refine")
    grid = refine(outer.astype(jnp.float32), x[:, :0], x, jnp.where(tokens.protected, 0.0, gate)).astype(tokens.x.dtype)
    own = own_places(tokens)
    index = jnp.broadcast_to(jnp.arange(outer.shape[1], dtype=jnp.int32), outer.shape[:2])
    ones = jnp.ones(outer.shape[:2])
    x = jnp.where(own[..., None], restore(tokens.x, tokens.owner), grid)
    return Tokens(x, ones.astype(bool), ones, index, index, own, {}), {}
