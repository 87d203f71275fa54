"""ToMe: merges the most similar pairs of a bipartite split.  (Bolya et al., 2022, arXiv:2210.09461)

DyMU (Wang et al., 2025, arXiv:2504.17040) is the same up to a threshold, AIM (Zhong et al., 2024) by embeddings.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, merge_into, num_kept, register
from tokred.tokens import Array, Plan, Tokens, best, inverse, rank


def unit(x: Array, alive: Array) -> Array:
  """x / ||x|| along the last axis in float32; zero where dead."""
  x = jnp.where(alive[..., None], x.astype(jnp.float32), 0.0)
  norm = jnp.linalg.norm(jnp.where(alive[..., None], x, 1.0), axis=-1, keepdims=True)
  return x / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)


def mean_heads(key: Array) -> Array:
  """Mean over heads, (B, N, H, d) to (B, N, d) float32; a sum of slices, which XLA adds up in one pass."""
  return sum(key[:, :, head].astype(jnp.float32) for head in range(key.shape[2])) / key.shape[2]


def interleave(even: Array, odd: Array, n: int) -> Array:
  """Even and odd places back in one row, (B, n); what is a scalar or (n // 2,) is spread."""
  dtype, half = jnp.result_type(even, odd), -(-n // 2)
  even = jnp.asarray(even, dtype)
  odd = jnp.broadcast_to(jnp.asarray(odd, dtype), (*even.shape[:-1], n // 2))
  odd = jnp.pad(odd, ((0, 0),) * (odd.ndim - 1) + ((0, half - n // 2),))
  return jnp.stack([even, odd], axis=-1).reshape(*even.shape[:-1], 2 * half)[..., :n]


@register("tome")
class ToMe(Planner):
  """Even places are sources a, odd ones destinations b; the r sources with the best match merge into it.

  kappa = mean over heads of k, unit length;  sim = kappa_a kappa_b^T;  t(i) = argmax_j sim_ij
  x <- sum(s x) / sum(s), s <- sum(s)

  Survivors stand as in the authors' code: the protected, the sources left over in their order, all destinations.
  (Without protected tokens that code leaves the sources by descending similarity, and so does this.)

  AIM merges half of all tokens, and half of the rest, in front of the language model: metric="token", plain=True.
  """

  proportional: ClassVar[bool] = True
  scored: ClassVar[bool] = False

  metric: str = "key"  # key, token
  plain: bool = False  # each member counts the same, whatever it represents already; sums are not conserved then

  def needed(self) -> tuple[str, ...]:
    if self.metric not in ("key", "token"):
      raise ValueError(f"metric={self.metric!r} is not a metric; {nearest(self.metric, ('key', 'token'))}")
    return ("key",) if self.metric == "key" else ()

  def fewest(self, n: int, protected: int) -> int:
    return n - (n - protected) // 2

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * n / 4 * (width if self.metric == "token" else width / num_heads)

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n, alive = tokens.x.shape[1], tokens.alive
    index = jnp.arange(n, dtype=jnp.int32)
    metric = tokens.x.astype(jnp.float32) if self.metric == "token" else mean_heads(tokens.feats["key"])
    metric = jax.lax.stop_gradient(metric)
    length = jnp.maximum(jnp.linalg.norm(metric, axis=-1), jnp.finfo(jnp.float32).tiny)
    can = alive & ~tokens.protected
    product = jnp.einsum("bad,bcd->bac", metric[:, ::2], metric[:, 1::2], precision="highest")
    pairs = can[:, ::2, None] & can[:, None, 1::2]
    similarity, match = best(jnp.where(pairs, product / length[:, None, 1::2], -jnp.inf))  # (B, Na)
    similarity = jnp.where(similarity > -jnp.inf, similarity / length[:, ::2], -jnp.inf)

    turn = rank(-similarity)
    merged = (turn < alive.sum(1, keepdims=True) - num_kept(tokens, keep)) & (similarity > -jnp.inf)
    owner = interleave(jnp.where(merged, index[1::2][match], index[::2]), index[1::2], n)

    # Who stands where: the protected, sources left over, destinations, merged sources (last merged first), the dead.
    turn, first, merged = interleave(turn, 0, n), tokens.protected & alive, owner != index
    group = jnp.where(alive, jnp.where(first, 0, jnp.where(merged, 3, 1 + index % 2)), 4)
    by_turn = (group == 1) & ~first.any(1, keepdims=True)
    place = rank(group * n + jnp.where(merged, n - 1 - turn, jnp.where(by_turn, turn, index)))
    owner = jnp.where(alive, owner, -1)
    share = jnp.ones_like(tokens.size) if self.plain else None
    return merge_into(tokens, owner, inverse(place), share), {"similarity": similarity}


@register("dymu_merge")
class DyMUMerge(ToMe):
  """ToMe for rate="threshold": as many pairs merge as are more alike than tau, and threshold=-tau.

  A source scores -max_j sim_ij, and who cannot go 2.  (Wang et al., 2025, DyMU)  tau is calibrated: see
  `batch_threshold`.  `keep` is the capacity, at least half.
  """

  scored: ClassVar[bool] = True

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    plan, report = super().plan(tokens, keep, train=train)
    alike = report["similarity"]
    score = interleave(jnp.where(jnp.isfinite(alike), -alike, 2.0), 2.0, tokens.x.shape[1])
    return plan, report | {"score": score}


def batch_threshold(similarity: Array, r: int) -> Array:
  """The tau above which r pairs an image would merge, the average over the batch: a float32 scalar, 0 or more.

  DyMU averages it over batches, and takes r for each image of the batch together: the most similar pair that does not
  merge any more, as in the authors' code (their paper has the last one that does).

  Args:
    similarity: (B, Na), what ToMe reports; -inf for sources that cannot go.
    r: pairs of an image.
  """
  ordered = jnp.sort(similarity.reshape(-1))[::-1]
  return jnp.maximum(ordered[min(r * len(similarity), len(ordered) - 1)], 0.0)
