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
  """Remembers a vector of every block; before block 3, 6, 9, ... all of them join the sequence, and the cache is empty.

  The vector is the mean of the unprotected tokens that left the block, or CLS, or both.  A site of it acts before every
  block from 1 on, `layers=range(1, depth)`, beside any site that reduces.  Vectors that join stand behind the
  survivors; they are protected (the authors keep them out of the scoring) and represent no source token.  There are
  never more tokens than at the input: what finds no seat is left out, the latest first.

  Not here: carrier tokens of their own, of which CLS takes the place; the head of depth-wise convolutions over the CLS
  of several blocks; the quirk that after a flush the authors' code caches a cached copy instead of the live carrier.
  """

  recovers: ClassVar[bool] = True
  idles: ClassVar[bool] = False
  scored: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("before",)

  layer: int = 0
  depth: int = 1
  every: int = 3
  cache: str = "mean"  # mean, cls, both

  def needed(self) -> tuple[str, ...]:
    if self.cache not in CACHES:
      raise ValueError(f"cache={self.cache!r} is not a cache; {nearest(self.cache, CACHES)}")
    if self.every < 1:
      raise ValueError(f"every={self.every} must be at least 1: blocks from one flush to the next")
    return ()

  @property
  def flushes(self) -> bool:
    """Whether the cache joins the sequence before this block."""
    return self.layer > 0 and self.layer % self.every == 0

  def recovered(self, n: Any, source: int) -> Any:
    """Tokens that leave of n that arrive, a number or traced; `source`: tokens at the input."""
    if not self.flushes:
      return n
    grown = n + self.every * (1 + (self.cache == "both"))
    return min(grown, source) if isinstance(grown, (int, float)) else jnp.minimum(grown, source)

  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    if not 0 < self.layer <= (self.depth - 1) // self.every * self.every:
      return tokens, {}  # before block 0 there is nothing to remember, behind the last flush nobody would read it
    new = self.vectors(tokens)
    if STATE in tokens.feats:  # the same in every token, and the first one is always alive
      new = jnp.concatenate([tokens.feats[STATE][:, 0], new], axis=1)
    if not self.flushes:
      held = jnp.broadcast_to(new[:, None], (*tokens.mask.shape, *new.shape[1:]))
      return tokens.replace(feats=tokens.feats | {STATE: held}), {}
    wanted = self.every * (1 + (self.cache == "both"))
    if new.shape[1] != wanted:
      raise ValueError(
        f"the cache holds {new.shape[1]} vectors before block {self.layer}, not {wanted}: the layers of a clca site "
        "must be all blocks from 1 on"
      )
    return append(tokens, new, mode), {}

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


def append(tokens: Tokens, vectors: Array, mode: str) -> Tokens:
  """Protected tokens behind the survivors, in the seats of the dead and, in gather mode, in new ones.

  Args:
    tokens: N tokens; its `state/clca` is dropped.
    vectors: (B, C, D).
    mode: in "gather" N grows by C, to no more than the input had.
  """
  n, count = tokens.x.shape[1], vectors.shape[1]
  more = min(count, tokens.owner.shape[1] - n) if mode == "gather" else 0
  rel = jnp.arange(n + more) - tokens.alive.sum(1, keepdims=True)
  joins, which = (rel >= 0) & (rel < count), jnp.clip(rel, 0, count - 1)

  def seat(leaf: Array, new: Any) -> Array:
    leaf = jnp.pad(leaf, ((0, 0), (0, more)) + ((0, 0),) * (leaf.ndim - 2))
    return jnp.where(joins.reshape(joins.shape + (1,) * (leaf.ndim - 2)), jnp.asarray(new, leaf.dtype), leaf)

  return tokens.replace(
    x=seat(tokens.x, take(vectors, which)),
    mask=seat(tokens.mask, 1),
    size=seat(tokens.size, 1),
    position=seat(tokens.position, 0),
    protected=seat(tokens.protected, True),
    feats={name: seat(leaf, 0) for name, leaf in tokens.feats.items() if name != STATE},
  )
