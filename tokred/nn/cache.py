"""Keys and values of a language model's past; every layer has as many slots as tokens reached it."""

import jax
import jax.numpy as jnp
from flax import struct

from tokred.tokens import Array


@struct.dataclass
class Cache:
  """What decoding reads.  A layer's prompt stands first, padding behind it, then what has been appended."""

  k: tuple[Array, ...]  # by layer: (B, heads, slots + room, d), turned to their positions
  v: tuple[Array, ...]
  length: tuple[Array, ...]  # by layer: (B,) int32 tokens of each prompt
  position: tuple[Array, ...]  # by layer: (B,) int32 position of the first token that is appended
  step: Array  # () int32 tokens appended so far, the same in every row
  slots: tuple[int, ...] = struct.field(pytree_node=False, default=())  # by layer: room of the prompt

  @property
  def room(self) -> int:
    """Tokens that can be appended in all."""
    return self.k[0].shape[2] - self.slots[0]

  @property
  def nbytes(self) -> int:
    """Bytes of keys and values."""
    return sum(a.size * a.dtype.itemsize for a in (*self.k, *self.v))

  def append(self, layer: int, k: Array, v: Array) -> "Cache":
    """With one more token of a layer, k and v (B, heads, 1, d); `advance` when all layers have it."""
    put = lambda to, a: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
      to, a.astype(to.dtype), self.slots[layer] + self.step, axis=2
    )
    swap = lambda all_, a: (*all_[:layer], a, *all_[layer + 1 :])  # noqa: E731
    return self.replace(k=swap(self.k, put(self.k[layer], k)), v=swap(self.v, put(self.v[layer], v)))

  def advance(self) -> "Cache":
    return self.replace(step=self.step + 1)

  def attend(self, layer: int, q: Array) -> Array:
    """One query's average of a layer's values, the token just appended included: (B, H, 1, d) to the same."""
    k, v = self.k[layer], self.v[layer]
    batch, heads, _, dim = q.shape
    place, slots = jnp.arange(k.shape[2]), self.slots[layer]
    there = (place < self.length[layer][:, None]) | ((place >= slots) & (place <= slots + self.step))
    q = q.reshape(batch, k.shape[1], -1, dim) * dim**-0.5
    logits = jnp.einsum("bhgd,bhjd->bhgj", q, k, preferred_element_type=jnp.float32)
    weight = jax.nn.softmax(jnp.where(there[:, None, None], logits, -jnp.inf))
    out = jnp.einsum("bhgj,bhjd->bhgd", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(batch, heads, 1, dim).astype(v.dtype)


def filled(k: Array, room: int) -> Array:
  """Keys or values of a prompt, (B, heads, N, d), with room for as many more."""
  return jnp.pad(k, ((0, 0), (0, 0), (0, room), (0, 0)))
