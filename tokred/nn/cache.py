"""Keys and values of a language model's past; every layer has as many slots as tokens reached it."""

import jax
import jax.numpy as jnp
from flax import struct

from tokred.tokens import Array


@struct.dataclass
class Cache:
  """What decoding reads.  A layer's prompt stands first, padding behind it, then what has been appended.

  Where `there` is None a layer holds its whole prompt and all that has been appended; where tokens go round a layer, or
  heads evict, it says which slots hold something.
  """

  k: tuple[Array, ...]  # by layer: (B, heads, slots + room, d), turned to their positions
  v: tuple[Array, ...]
  length: tuple[Array, ...]  # by layer: (B,) int32 tokens of each prompt
  position: tuple[Array, ...]  # by layer: (B,) int32 position of the first token that is appended
  step: Array  # () int32 tokens appended so far, the same in every row
  slots: tuple[int, ...] = struct.field(pytree_node=False, default=())  # by layer: room of the prompt
  there: tuple[Array | None, ...] = ()  # by layer: (B, heads or 1, slots + room) bool

  @property
  def room(self) -> int:
    """Tokens that can be appended in all."""
    return self.k[0].shape[2] - self.slots[0]

  @property
  def nbytes(self) -> int:
    """Bytes of keys and values."""
    return sum(a.size * a.dtype.itemsize for a in (*self.k, *self.v))

  @property
  def held(self) -> Array:
    """Bytes of the keys and values that each row has use for: (B,) float32; the rest are padding, or evicted."""
    total = jnp.zeros(self.k[0].shape[:1], jnp.float32)
    for layer, k in enumerate(self.k):
      share = self.holds(layer).mean(1).sum(-1)  # slots, of a mean head
      total = total + share * 2 * k.shape[1] * k.shape[3] * k.dtype.itemsize
    return total

  def holds(self, layer: int) -> Array:
    """Which slots of a layer hold something: (B, heads or 1, slots + room) bool."""
    place, slots = jnp.arange(self.k[layer].shape[2]), self.slots[layer]
    written = (place >= slots) & (place < slots + self.step)
    there = self.there[layer] if self.there else None
    if there is None:
      return ((place < self.length[layer][:, None]) | written)[:, None]
    return there & ((place < slots) | written)

  def append(self, layer: int, k: Array, v: Array, there: Array | None = None) -> "Cache":
    """With one more token of a layer, k and v (B, heads, 1, d); `advance` when all layers have it.

    Args:
      layer: which.
      k: key.
      v: value.
      there: (B,) bool, whether the token goes through this layer; None: it does.
    """
    at = self.slots[layer] + self.step
    put = lambda to, a: jax.lax.dynamic_update_slice_in_dim(to, a.astype(to.dtype), at, axis=2)
    swap = lambda all_, a: (*all_[:layer], a, *all_[layer + 1 :])
    cache = self.replace(k=swap(self.k, put(self.k[layer], k)), v=swap(self.v, put(self.v[layer], v)))
    if not self.there or self.there[layer] is None:
      return cache
    old = self.there[layer]
    new = jnp.ones(len(old), bool) if there is None else there
    new = jnp.broadcast_to(new[:, None, None], (*old.shape[:2], 1))
    return cache.replace(there=swap(self.there, put(old, new)))

  def advance(self) -> "Cache":
    return self.replace(step=self.step + 1)

  def attend(self, layer: int, q: Array) -> Array:
    """One query's average of a layer's values, the token just appended included: (B, H, 1, d) to the same."""
    k, v = self.k[layer], self.v[layer]
    batch, heads, _, dim = q.shape
    there = self.replace(step=self.step + 1).holds(layer)
    own = jnp.arange(k.shape[2]) == self.slots[layer] + self.step
    there = there | own  # of a token that goes round, which nobody reads, too: no row is empty
    q = q.reshape(batch, k.shape[1], -1, dim) * dim**-0.5
    logits = jnp.einsum("bhgd,bhjd->bhgj", q, k, preferred_element_type=jnp.float32)
    weight = jax.nn.softmax(jnp.where(there[:, :, None], logits, -jnp.inf))
    out = jnp.einsum("bhgj,bhjd->bhgd", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(batch, heads, 1, dim).astype(v.dtype)


def filled(k: Array, room: int) -> Array:
  """Keys or values of a prompt, (B, heads, N, d), with room for as many more."""
  return jnp.pad(k, ((0, 0), (0, 0), (0, room), (0, 0)))
