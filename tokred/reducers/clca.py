"""Cross-layer cache aggregation: what earlier blocks saw comes back as a few tokens.  (CLCA, 2024)"""

from typing import Any, ClassVar

import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Reducer, register
from tokred.tokens import Array, Tokens, take

CACHES = ("mean", "cls", "both")
STATE = "state/clca"


@register("clca")
class CLCA(Reducer):
  """Remembers a vector of every block; behind a recovery block all that is remembered joins the sequence.

    x <- [x, cache], cache <- ()   behind the blocks `at`, when they have reduced
    cache <- [cache, mean of x]    behind every block up to the last of them

  The vector is the mean of the unprotected tokens, or CLS, or both.  At 3, 6 and 9 of 12 the vectors of blocks 0 to 2,
  3 to 5 and 6 to 8 join, so that each time three tokens more go on than the reduction there left, in mask mode, too.
  They stand behind the survivors, represent no source token, and are protected: carriers have no part in the scoring,
  nor in the mean.  (In the authors' EViT a later reduction ranks them with the rest, and the mean counts them.)

  A site of it acts after every block, `layers=range(depth)`, beside the site that reduces.  Where tokens go round
  blocks it must meet all of them: place="before", `layers=range(1, depth)` is behind the block in front, and its scope.

  Not here: carrier tokens of their own, of which CLS takes the place; the head of depth-wise convolutions over the CLS
  of several blocks; the quirk that after a flush the authors' code caches a cached copy instead of the live carrier.
  """

  conserves: ClassVar[bool] = False  # sizes of 1 join
  recovers: ClassVar[bool] = True
  idles: ClassVar[bool] = False
  scored: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("after", "before")

  layer: int = 0
  depth: int = 1
  place: str = "after"
  at: tuple[int, ...] = ()  # recovery blocks, the authors' (3, 6, 9), or with depth - 2; (): quarters of the depth
  cache: str = "mean"  # mean, cls, both

  def needed(self) -> tuple[str, ...]:
    if self.cache not in CACHES:
      raise ValueError(f"cache={self.cache!r} is not a cache; {nearest(self.cache, CACHES)}")
    blocks = isinstance(self.at, (tuple, list)) and all(type(block) is int and block >= 1 for block in self.at)
    if not blocks or list(self.at) != sorted({*self.at}):
      raise ValueError(f"at={self.at} must be recovery blocks in ascending order, from 1: before 1 nothing is cached")
    return ()

  @property
  def flushes(self) -> tuple[int, ...]:
    """The recovery blocks."""
    return tuple(self.at) or tuple(sorted({max(1, self.depth * quarter // 4) for quarter in (1, 2, 3)}))

  @property
  def block(self) -> int:
    """The one that the tokens come from."""
    return self.layer - (self.place == "before")

  @property
  def joining(self) -> int:
    """Vectors that join behind this block: of the blocks from the last recovery to the one before this."""
    if self.block not in self.flushes:
      return 0
    last = max((block for block in self.flushes if block < self.block), default=0)
    return (self.block - last) * (1 + (self.cache == "both"))

  def recovered(self, n: Any, source: int) -> Any:
    return n + self.joining

  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    vectors = self.vectors(tokens)
    held = tokens.feats[STATE][:, 0] if STATE in tokens.feats else vectors[:, :0]  # the same in every token
    if self.joining:
      if held.shape[1] != self.joining:
        raise ValueError(
          f"the cache holds {held.shape[1]} vectors behind block {self.block}, not {self.joining}: a clca site must "
          f"act after all blocks up to {self.flushes[-1]}, or before all from 1 on, and not where tokens go round"
        )
      tokens, held = append(tokens, held), vectors[:, :0]
    feats = {name: leaf for name, leaf in tokens.feats.items() if name != STATE}
    if 0 <= self.block < self.flushes[-1]:  # behind the last recovery nobody would read it
      held = jnp.concatenate([held, vectors], axis=1)
      feats[STATE] = jnp.broadcast_to(held[:, None], (*tokens.mask.shape, *held.shape[1:]))
    return tokens.replace(feats=feats), {"count": tokens.alive.sum(1).astype(jnp.float32).mean()}

  def vectors(self, tokens: Tokens) -> Array:
    """What is remembered of the block that these tokens left, (B, 1 or 2, D) of the dtype of x."""
    out = []
    if self.cache != "cls":
      weight = jnp.where(tokens.protected, 0.0, tokens.mask.astype(jnp.float32))
      learned = jnp.issubdtype(tokens.mask.dtype, jnp.floating)
      x = tokens.x if learned else jnp.where(tokens.mask[..., None], tokens.x, 0)
      mean = jnp.einsum("bn,bnd->bd", weight, x.astype(jnp.float32), precision="highest")
      out.append(mean / jnp.maximum(weight.sum(1), 1.0)[:, None])
    if self.cache != "mean":
      out.append(tokens.x[:, 0].astype(jnp.float32))
    return jnp.stack(out, axis=1).astype(tokens.x.dtype)


def append(tokens: Tokens, vectors: Array) -> Tokens:
  """N + C tokens: the survivors, the (B, C, D) vectors as protected tokens, the dead."""
  n, count = tokens.x.shape[1], vectors.shape[1]
  rel = jnp.arange(n + count) - tokens.alive.sum(1, keepdims=True)
  joins, which = (rel >= 0) & (rel < count), jnp.clip(rel, 0, count - 1)

  def seat(leaf: Array, new: Any) -> Array:
    leaf = jnp.pad(leaf, ((0, 0), (0, count)) + ((0, 0),) * (leaf.ndim - 2))
    return jnp.where(joins.reshape(joins.shape + (1,) * (leaf.ndim - 2)), jnp.asarray(new, leaf.dtype), leaf)

  return tokens.replace(
    x=seat(tokens.x, take(vectors, which)),
    mask=seat(tokens.mask, 1),
    size=seat(tokens.size, 1),
    position=seat(tokens.position, 0),
    protected=seat(tokens.protected, True),
    feats={name: seat(leaf, 0) for name, leaf in tokens.feats.items()},
  )
