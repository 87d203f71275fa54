"""Cross-layer cache aggregation: what earlier blocks saw comes back as a few tokens.  (CLCA, 2024)"""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from tokred.config import nearest
from tokred.reducers.base import Reducer, register
from tokred.tokens import Array, Tokens, inverse, rank, take

CACHES = ("mean", "cls", "both", "none")
STATE = "state/clca"
CARRIER = "state/clca_carrier"  # (batch, token) bool


@register("clca")
class CLCA(Reducer):
  """Remembers a vector of every block; behind a recovery block all that is remembered joins the sequence.

    x <- [x, cache], cache <- ()   behind the blocks `at`, when they have reduced
    cache <- [cache, mean of x]    behind every block up to the last of them

  The vectors are the mean of the unprotected tokens, or CLS, or both, and those of `carriers`: tokens that begin as CLS
  and a learned vector, and go along from the first block on.  At 3, 6 and 9 of 12 the vectors of blocks 0 to 2, 3 to 5
  and 6 to 8 join, so that each time three tokens more (of one vector a block) go on than the reduction there left, in
  mask mode, too.  Carriers and cached vectors stand behind the survivors, represent no source token, and are protected:
  they have no part in the scoring, nor in the mean.  (In the authors' EViT a later reduction ranks them with the rest,
  and the mean counts them.)

  A site of it acts after every block, `layers=range(depth)`, beside the site that reduces.  Where tokens go round
  blocks it must meet all of them: place="before", `layers=range(1, depth)` is behind the block in front, and its scope.
  Carriers join before block 0: place="before", `layers=range(depth)`.

  Not here: the head of depth-wise convolutions over the CLS of several blocks; the quirk that after a flush the
  authors' code caches a cached copy instead of the live carrier.
  """

  conserves: ClassVar[bool] = False  # sizes of 1 join
  recovers: ClassVar[bool] = True
  idles: ClassVar[bool] = False
  scored: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("after", "before")

  layer: int = 0
  depth: int = 1
  place: str = ""  # the site fills it in
  at: tuple[int, ...] = ()  # recovery blocks, the authors' (3, 6, 9), or with depth - 2; (): quarters of the depth
  cache: str = "mean"  # mean, cls, both; none: carriers alone
  carriers: int = 0  # learned tokens

  def needed(self) -> tuple[str, ...]:
    if self.cache not in CACHES:
      raise ValueError(f"cache={self.cache!r} is not a cache; {nearest(self.cache, CACHES)}")
    if self.carriers < 0 or (self.cache == "none" and not self.carriers):
      raise ValueError(f"carriers={self.carriers} must be 0 or more, and 1 or more where cache='none'")
    if self.carriers and self.place == "after":
      raise ValueError(f"carriers={self.carriers} join before block 0; valid: place='before', layers from 0 on")
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
    return (self.block - last) * ({"both": 2, "none": 0}.get(self.cache, 1) + self.carriers)

  def recovered(self, n: Any, source: int) -> Any:
    return n + (self.carriers if self.block < 0 else self.joining)

  @nn.compact
  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    if self.carriers and self.block < 0:
      tokens = self.begin(tokens)
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
    return tokens.replace(feats=feats), {"count": tokens.alive.sum(1).astype(jnp.float32)}

  def begin(self, tokens: Tokens) -> Tokens:
    """The tokens of the input, and carriers."""
    offset = self.param("carriers", nn.initializers.normal(0.02), (self.carriers, tokens.x.shape[-1]), jnp.float32)
    marked = tokens.feats | {CARRIER: jnp.zeros(tokens.mask.shape, bool)}
    return append(tokens.replace(feats=marked), tokens.x[:, :1] + offset.astype(tokens.x.dtype), marked=CARRIER)

  def vectors(self, tokens: Tokens) -> Array:
    """What is remembered of the block that these tokens left, (B, C, D) of the dtype of x."""
    out = []
    if self.cache in ("mean", "both"):
      weight = jnp.where(tokens.protected, 0.0, tokens.mask.astype(jnp.float32))
      mean = jnp.einsum("bn,bnd->bd", weight, tokens.visible.astype(jnp.float32), precision="highest")
      out.append(mean / jnp.maximum(weight.sum(1), 1.0)[:, None])
    if self.cache in ("cls", "both"):
      out.append(tokens.x[:, 0].astype(jnp.float32))
    rows = jnp.stack(out, axis=1).astype(tokens.x.dtype) if out else tokens.x[:, :0]
    if not self.carriers:
      return rows
    if CARRIER not in tokens.feats:
      raise ValueError(f"carriers={self.carriers} join before block 0: the layers of a clca site must begin with 0")
    first = inverse(rank((~tokens.feats[CARRIER]).astype(jnp.int32)))[:, : self.carriers]
    return jnp.concatenate([rows, take(tokens.x, first)], axis=1)


def append(tokens: Tokens, vectors: Array, marked: str = "") -> Tokens:
  """N + C tokens: the survivors, the (B, C, D) vectors as protected tokens, the dead; `marked`: a feature they have."""
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
    feats={name: seat(leaf, name == marked) for name, leaf in tokens.feats.items()},
  )
