"""How many tokens survive: fixed, scheduled over training, learned, or as many as pass a threshold, learned or not.

Counts that are known on the host are Python ints, computed in float64 as the papers' code does; what is traced is a
learned expectation or a comparison.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from tokred.tokens import Array, Tokens, of_prompt, straight_through

RATES = ("fixed", "scheduled", "learned", "threshold", "learned_threshold")
LEARNED = ("learned", "learned_threshold")
SHARES = 32  # that a learned rate of a language model chooses among


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
  """Keep rate that falls from 1 at `begin` to `keep` at `end` along a half cosine.  (EViT, arXiv:2202.07800)

  Where both are one step it is `keep` from that step on.
  """
  if step < begin:
    return 1.0
  if step >= end:
    return float(keep)
  progress = (step - begin) / (end - begin)
  return keep + (1.0 - keep) * 0.5 * (1.0 + math.cos(math.pi * progress))


def geometric(step: float, start: float, stop: float, begin: float, end: float) -> float:
  """From `start` at step `begin` to `stop` at step `end`, by the same factor in every step."""
  progress = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
  return start * (stop / start) ** progress


def candidates(patches: int, granularity: int) -> tuple[int, ...]:
  """Counts that a learned rate chooses among, descending: patches - granularity k, as long as positive."""
  return tuple(range(patches, 0, -granularity))


def tilted(counts: Sequence[int], mean: float) -> tuple[float, ...]:
  """Logits b c_k of the flattest distribution over counts c_k with this expectation; all 0 where it is their mean.

  Args:
    counts: at least two, descending.
    mean: strictly between the least and the most of them.
  """
  c = np.asarray(counts, np.float64)

  def logits(b: float) -> np.ndarray:
    return b * (c - c.mean())

  def excess(b: float) -> float:
    weight = np.exp(logits(b) - logits(b).max())
    return float(weight @ c / weight.sum()) - mean

  low, high = -64.0, 64.0
  for _ in range(100):
    b = (low + high) / 2
    low, high = (low, b) if excess(b) > 0 else (b, high)
  return tuple(logits((low + high) / 2).tolist())


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


def soft_topk(score: Array, k: Array | float, steps: int = 64) -> Array:
  """sigmoid(s_i + t), with t such that they add up to k: weights in (0, 1) that learn.  (Zhu et al., 2025,
  VisionSelector)

  t comes from bisection, and its gradient from the sum that it keeps: dt = -sum_i w'_i ds_i / sum_i w'_i.

  Args:
    score: (..., N), computed in float32.
    k: between 0 and N, a number or (...).
    steps: of bisection.
  """
  score, k = score.astype(jnp.float32), jnp.asarray(k, jnp.float32)[..., None]
  fixed = jax.lax.stop_gradient(score)
  reach = 30.0  # sigmoid(-30) is nothing in float32
  low, high = -fixed.max(-1, keepdims=True) - reach, -fixed.min(-1, keepdims=True) + reach

  def halve(_: int, span: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = span
    middle = (low + high) / 2
    few = jax.nn.sigmoid(fixed + middle).sum(-1, keepdims=True) < k
    return jnp.where(few, middle, low), jnp.where(few, high, middle)

  low, high = jax.lax.fori_loop(0, steps, halve, (low, high))
  t = (low + high) / 2
  slope = jax.nn.sigmoid(fixed + t)
  slope = (slope * (1.0 - slope)).sum(-1, keepdims=True)
  sums = jax.nn.sigmoid(score + t).sum(-1, keepdims=True)  # its value is k but for rounding; its gradient moves t
  shift = (sums - jax.lax.stop_gradient(sums)) / jnp.maximum(slope, jnp.finfo(jnp.float32).tiny)
  return jax.nn.sigmoid(score + t - shift)


def flowcut_count(cls: Array, n: int, target: int, layers_left: int) -> Array:
  """Tokens that FlowCut takes away: round((n - target) / sqrt(layers left) (1 - (H / ln n)^2)), H the entropy of CLS's
  attention in nats; the most of the batch, a float32 scalar.  (Tong et al., 2025, FlowCut)

  Args:
    cls: (B, n) attention of CLS to the tokens that are left; it is made to add up to 1.
    n: how many these are.
    target: how many shall be left in the end.
    layers_left: blocks that follow, this one counted.
  """
  share = cls / cls.sum(1, keepdims=True)
  entropy = -(share * jnp.log(jnp.maximum(share, jnp.finfo(jnp.float32).tiny))).sum(1)
  gone = (n - target) / math.sqrt(layers_left) * (1.0 - jnp.square(entropy / math.log(n)))
  return jnp.clip(jnp.round(gone).max(), 0, n - target)


class Learned(nn.Module):
  """A distribution over candidate counts.  (Chen et al., 2023, DiffRate, arXiv:2305.17997)

  rho = softmax(theta), n = ceil(sum_k c_k rho_k) + protected; theta starts at 0, so an untrained rate keeps half, or
  where the flattest distribution with n = initial + protected is.
  """

  counts: tuple[int, ...]  # candidates, unprotected tokens, descending
  protected: int
  initial: int = 0  # unprotected tokens; 0: half

  @nn.compact
  def __call__(self, n: int) -> tuple[Array, Array]:
    """For n tokens: how many survive (float32 scalar, gradient of the expectation) and survival by rank (n,)."""
    logits = self.param("logits", self.first, (len(self.counts),), jnp.float32)
    return (
      kept_count(logits, self.counts) + self.protected,
      survival(logits, self.counts, n, self.protected),
    )

  def first(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """The initial logits; half a token below `initial`, for counts are rounded up."""
    inside = min(max(self.initial - 0.5, self.counts[-1] + 0.5), self.counts[0] - 0.5)
    return jnp.asarray(tilted(self.counts, inside) if self.initial and len(self.counts) > 1 else np.zeros(shape), dtype)


@struct.dataclass
class Threshold:
  """As many tokens as score at least `value`, but no more than `capacity`; counts differ between images."""

  value: float | Array
  capacity: int = struct.field(pytree_node=False, default=0)
  most: Array | None = None  # (B,) int32: no more than so many in each row
  whole: bool = struct.field(pytree_node=False, default=True)  # also counted is what stands behind a prompt

  def count(self, tokens: Tokens, score: Array) -> Array:
    """(B,) int32 counts, protected tokens included."""
    counted = tokens.alive if self.whole else of_prompt(tokens)
    passes = counted & (tokens.protected | (score >= self.value))
    count = jnp.minimum(passes.sum(1, dtype=jnp.int32), self.capacity)
    return count if self.most is None else jnp.minimum(count, self.most)


@struct.dataclass
class Rows:
  """A count for each row, no more than `capacity`."""

  count: Array  # (B,) int32, protected tokens included
  capacity: int = struct.field(pytree_node=False, default=0)


def soft_threshold(score: Array, free: Array, count: Array, temperature: float, newton: int = 0) -> Array:
  """t with sum over the free of sigmoid((s - t) / tau) = count, (B,) float32, differentiable in s and in the count.

  Bisection, and then the gradient of what it has solved; 60 halvings are exact in float32.  Newton's steps from the
  median are those of QTSplus; where the sum is nearly flat they run away.

  Args:
    score: (B, N).
    free: (B, N) bool.
    count: (B,) float32; at most the number of the free, which is met only in the limit.
    temperature: tau.
    newton: steps of Newton's instead.
  """
  score = jnp.where(free, score.astype(jnp.float32), 0.0)
  fixed, total = jax.lax.stop_gradient(score), free.sum(1).astype(jnp.float32)
  count = jnp.clip(count, 1e-3, jnp.maximum(total - 1e-3, 1e-3))

  def excess(score: Array, t: Array) -> tuple[Array, Array]:
    chance = jnp.where(free, jax.nn.sigmoid((score - t[:, None]) / temperature), 0.0)
    return chance.sum(1) - count, jnp.where(free, chance * (1 - chance), 0.0).sum(1) / temperature

  if newton:
    t = jnp.nanmedian(jnp.where(free, score, jnp.nan), axis=1)
    for _ in range(newton):
      gap, slope = excess(score, t)
      t = t + gap / jnp.maximum(slope, 1e-12)
    return t
  reach = 20.0 * temperature

  def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = ends
    t = 0.5 * (low + high)
    more = excess(fixed, t)[0] > 0  # too many pass: higher
    return jnp.where(more, t, low), jnp.where(more, high, t)

  low, high = fixed.min(1) - reach, fixed.max(1) + reach
  t = jax.lax.stop_gradient(sum(jax.lax.fori_loop(0, 60, halve, (low, high))) / 2)
  gap, slope = excess(score, t)
  step = gap / jnp.maximum(jax.lax.stop_gradient(slope), 1e-6)
  return t + step - jax.lax.stop_gradient(step)


@struct.dataclass
class Shares:
  """What a learned share of a prompt's visual tokens is taken of."""

  text: Array  # (B,) int32 protected tokens
  free: Array  # (B,) int32 the others, at the language model's input


class LearnedShare(nn.Module):
  """A distribution over shares of a prompt's visual tokens, so that prompts of any length learn together.

  rho = softmax(theta), q = sum_k (k / K) rho_k for k = 1 .. K, n_b = ceil(q free_b) + text_b; theta starts at 0.  As in
  `Learned`, rank j survives with probability sum_k rho_k [j < (k / K) free_b + text_b].  q is a multiple of 2^-12, so
  that a frozen share counts the same tokens on the host.
  """

  steps: int  # K

  @nn.compact
  def __call__(self, of: Shares, n: int) -> tuple[Array, Array, Array]:
    """Counts (B,) int32, survival by rank (B, n) float32, and q, a float32 scalar with its gradient."""
    logits = self.param("logits", nn.initializers.zeros, (self.steps,), jnp.float32)
    shares = jnp.arange(1, self.steps + 1, dtype=jnp.float32) / self.steps
    chance = jax.nn.softmax(logits)
    mean = jnp.sum(chance * shares)
    share = straight_through(jnp.clip(jnp.round(mean * GRAIN), 1, GRAIN) / GRAIN, mean)
    free = of.free.astype(jnp.float32)
    count = jnp.ceil(jax.lax.stop_gradient(share) * free).astype(jnp.int32) + of.text
    rank = jnp.arange(n, dtype=jnp.float32)[None, :, None] - of.text[:, None, None]
    reaches = rank < shares * free[:, None, None]  # (B, n, K)
    return count, jnp.sum(jnp.where(reaches, chance, 0.0), axis=-1), share


def frozen_share(logits: Array) -> float:
  """The share that a `LearnedShare` has learned, for `keep`."""
  chance = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
  shares = jnp.arange(1, len(chance) + 1, dtype=jnp.float32) / len(chance)
  return float(jnp.clip(jnp.round(jnp.sum(chance * shares) * GRAIN), 1, GRAIN) / GRAIN)


GRAIN = 4096.0  # shares are multiples of one part in so many: times a count below 2^12 they are exact in float32


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
