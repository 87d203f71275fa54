"""Attention that tokens receive from images and from text, in a causal map of which no more than a block is held."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tokred.nn import attention
from tokred.tokens import Array


def received(q: Array, k: Array, queries: Array, rows: int = attention.ROWS) -> Array:
  """Attention that each key receives, the mean over heads and some queries.

  Args:
    q: (B, H, N, d), in the order of the sequence.
    k: (B, H, N, d), or of fewer heads.
    queries: (B, N) bool, alive.
    rows: queries of a block.

  Returns:
    (B, N) float32; zero where there are no queries.
  """
  batch, heads, n, dim = q.shape
  blocks = -(-n // rows)
  pad = blocks * rows - n
  weight = queries / jnp.maximum(queries.sum(1, keepdims=True), 1)
  q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0))).reshape(batch, k.shape[1], -1, blocks, rows, dim)
  weight = jnp.pad(weight, ((0, 0), (0, pad))).reshape(batch, blocks, rows)

  @jax.checkpoint
  def step(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
    q, weight, first = part
    logits = jnp.einsum("bhgid,bhjd->bhgij", q * dim**-0.5, k, preferred_element_type=jnp.float32)
    seen = jnp.arange(n) <= first + jnp.arange(rows)[:, None]
    chance = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    return total + jnp.einsum("bi,bhgij->bj", weight, chance) / heads, None

  parts = (jnp.moveaxis(q, 3, 0), jnp.moveaxis(weight, 1, 0), jnp.arange(blocks) * rows)
  return jax.lax.scan(step, jnp.zeros((batch, n), jnp.float32), parts)[0]


def _from(which: str, q: Array, k: Array, v: Array, **kwargs: Any) -> Array:
  return received(q, k, kwargs[which])


RECEIVED = {
  "self_attention": functools.partial(_from, "visual"),  # (B, N) float32, from visual tokens
  "text_attention": functools.partial(_from, "text"),  # from a prompt's text
}
FEATURES = attention.FEATURES | RECEIVED
