"""How many tokens survive: fixed, scheduled over training, learned, or as many as pass a threshold, learned or not.

Counts that are known on the host are Python ints, computed in float64 as the papers' code does; what is traced is a
learned expectation or a comparison.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from tokred.tokens import Array, Tokens, straight_through

RATES = ("fixed", "scheduled", "learned", "threshold", "learned_threshold")
LEARNED = ("learned", "learned_threshold")


def tome_schedule(r: int | float | Sequence[float], depth: int) -> list[int]:
  """Tokens that ToMe removes in each of `depth` layers.  (Bolya et al., 2022, arXiv:2210.09461)

  Args:
    r: a number (the same everywhere) or (r, inflection): from r (1 - f) to r (1 + f), linearly; -1 starts at 2r and
      ends at 0.
    depth: number of layers.
  """
  r, inflection = (r, 0.0) if isinstance(r, (int, float)) else r
  low = int(r * (1.0 - inflection))
  high = 2 * r - low
  step = (high - low) / (depth - 1) if depth > 1 else 0.0
  return [int(low + step * layer) for layer in range(depth)]


def cosine_keep(keep: float, step: float, begin: float, end: float) -> float:
  """Keep rate that falls from 1 at `begin` to `keep` at `end` along a half cosine.  (EViT, arXiv:2202.07800)"""
  if step < begin:
    return 1.0
  progress = min((step - begin) / max(end - begin, 1), 1.0)
  return keep + (1.0 - keep) * 0.5 * (1.0 + math.cos(math.pi * progress))


def geometric(step: float, start: float, stop: float, begin: float, end: float) -> float:
  """From `start` at step `begin` to `stop` at step `end`, by the same factor in every step."""
  progress = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
  return start * (stop / start) ** progress


def candidates(patches: int, granularity: int) -> tuple[int, ...]:
  """Counts that a learned rate chooses among, descending: patches - granularity k, as long as positive."""
  return tuple(range(patches, 0, -granularity))


def expected(logits: Array, counts: Sequence[int]) -> Array:
  """E = sum_k c_k softmax(logits)_k, a float32 scalar."""
  return jnp.sum(jax.nn.softmax(logits.astype(jnp.float32)) * jnp.asarray(counts, jnp.float32))


def kept_count(logits: Array, counts: Sequence[int]) -> Array:
  """ceil(E) as float32, with the gradient of E.

  A uniform distribution has an integer expectation for many sizes, and one ulp above it would keep a token more:
  hence the margin.
  """
  mean = expected(logits, counts)
  return straight_through(jnp.maximum(jnp.ceil(mean - 1e-4), 1.0), mean)


def survival(logits: Array, counts: Sequence[int], n: int, protected: int) -> Array:
  """pi_j = sum_k softmax(logits)_k [j < c_k + protected]: probability that rank j survives, (n,) float32."""
  rank = jnp.arange(n)[:, None]
  reaches = rank < jnp.asarray(counts)[None] + protected  # (n, K)
  return jnp.sum(jnp.where(reaches, jax.nn.softmax(logits.astype(jnp.float32)), 0.0), axis=-1)


class Learned(nn.Module):
  """A distribution over candidate counts.  (Chen et al., 2023, DiffRate, arXiv:2305.17997)

  rho = softmax(theta), n = ceil(sum_k c_k rho_k) + protected; theta starts at 0, so an untrained rate keeps half.
  """

  counts: tuple[int, ...]  # candidates, unprotected tokens, descending
  protected: int

  @nn.compact
  def __call__(self, n: int) -> tuple[Array, Array]:
    """For n tokens: how many survive (float32 scalar, gradient of the expectation) and survival by rank (n,)."""
    logits = self.param("logits", nn.initializers.zeros, (len(self.counts),), jnp.float32)
    return (
      kept_count(logits, self.counts) + self.protected,
      survival(logits, self.counts, n, self.protected),
    )


@struct.dataclass
class Threshold:
  """As many tokens as score at least `value`, but no more than `capacity`; counts differ between images."""

  value: float | Array
  capacity: int = struct.field(pytree_node=False, default=0)

  def count(self, tokens: Tokens, score: Array) -> Array:
    """(B,) int32 counts, protected tokens included."""
    passes = tokens.alive & (tokens.protected | (score >= self.value))
    return jnp.minimum(passes.sum(1, dtype=jnp.int32), self.capacity)


@struct.dataclass
class Rows:
  """A count for each row, no more than `capacity`."""

  count: Array  # (B,) int32, protected tokens included
  capacity: int = struct.field(pytree_node=False, default=0)


def threshold_gate(score: Array, value: Array | float, temperature: float) -> Array:
  """1 where score >= value, else 0, with the gradient of sigmoid((score - value) / temperature).

  Args:
    score: any shape.
    value: the threshold, a float or a float32 scalar.
    temperature: tau; the gradient reaches scores within a few tau of the threshold.

  Returns:
    Float32 of the score's shape.
  """
  score = score.astype(jnp.float32)
  return straight_through(score >= value, jax.nn.sigmoid((score - value) / temperature))


class LearnedThreshold(nn.Module):
  """A learned threshold, and so a number of tokens for each image.  (Bonnaerens & Dambre, 2023, LTMP, arXiv:2307.10780)

  m_i = ST(s_i >= theta, sigmoid((s_i - theta) / tau)).  The authors start theta at 0 for importances, which keeps all
  of them, and at 0.9 for similarities.  They compare with >, which differs at equality only.
  Importances that add up to 1 are small beside tau = 0.1: scale them, or lower the temperature.
  """

  initial: float = 0.0
  temperature: float = 0.1
  capacity: int = 0  # no more than so many tokens are ever wanted; 0: all

  @nn.compact
  def __call__(self, tokens: Tokens, score: Array) -> tuple[Array, Array]:
    """Who passes, for training; at inference `Threshold(value, capacity)` counts the same tokens.

    Args:
      tokens: N tokens; the dead ones may hold anything.
      score: (B, N).

    Returns:
      gate (B, N) float32, 1 for the protected and 0 for the dead, and counts (B,) float32, protected tokens included,
      with the gradient of what the budget loss shall see.
    """
    value = self.param("value", nn.initializers.constant(self.initial), (), jnp.float32)
    free = tokens.alive & ~tokens.protected
    gate = threshold_gate(jnp.where(free, score, 0.0), value, self.temperature)
    gate = jnp.where(free, gate, tokens.alive.astype(jnp.float32))
    return gate, gate.sum(1)
