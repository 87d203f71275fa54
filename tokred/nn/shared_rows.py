"""Rows that the images of a batch share, where these keep different numbers of tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokred.tokens import Array, inverse, take


@struct.dataclass
class Shared:
  """The living tokens of a batch in rows that its images share, for what looks at one token at a time."""

  index: Array  # (T,) int32, of each row among all places of the batch
  place: Array  # (B, N) int32, the row of each token
  inside: Array  # (B, N) bool, that has one

  def run(self, function: Callable[[Array], Any], x: Array) -> Any:
    """What a function makes of x, (B, N, ...): it gets (1, T, ...) and gives what `spread` takes, or several of it."""
    rows = take(x.reshape(1, -1, *x.shape[2:]), self.index[None], "gather")
    return jax.tree.map(self.spread, function(rows))

  def spread(self, rows: Array) -> Array:
    """(1, T, ...) to (B, N, ...), zero where a token has no row."""
    spread = take(rows, self.place.reshape(1, -1), "gather").reshape(*self.place.shape, *rows.shape[2:])
    return jnp.where(self.inside.reshape(*self.inside.shape, *(1,) * (rows.ndim - 2)), spread, 0)


def shared(alive: Array, rows: int) -> Shared:
  """Rows for the living: the first token of each image, then the second ones, as many as there is room for.

  Args:
    alive: (B, N) bool.
    rows: T, at most B N.
  """
  count = lambda what: jnp.cumsum(what.T.reshape(-1), dtype=jnp.int32).reshape(alive.shape[::-1]).T
  living = count(alive)
  place = jnp.where(alive, living, living[-1, -1] + count(~alive)) - 1
  inside = alive & (place < rows)
  return Shared(inverse(place.reshape(1, -1))[0, :rows], jnp.where(inside, place, 0), inside)
