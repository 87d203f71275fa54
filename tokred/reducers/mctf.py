"""MCTF: merges by similarity, informativeness and size, one step ahead of attention.

(Lee et al., 2024, Multi-criteria Token Fusion with One-step-ahead Attention, arXiv:2403.10030)  The consistency with a
less reduced pass, which trains it, is in `tokred.losses`.
"""

from fractions import Fraction
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, merge_into, num_kept, register
from tokred.reducers.peaks import PeakPlan
from tokred.reducers.tome import interleave, unit
from tokred.tokens import Array, Plan, Tokens, best, inverse, rank, take

TINY = 1e-12  # attention that nobody pays is not divided by
FEW = 10  # no fewer stay where r is a number, and a ratio leaves no more than these alone
POOLING = ("attention", "size", "max", "mean")


def scarcity(value: Array, alive: Array) -> Array:
  """1 / value, the largest of each row scaled to 1; (B, N) float32, 1 where dead."""
  inverted = jnp.where(alive, 1.0 / jnp.where(alive, jnp.maximum(value, TINY), 1.0), 0.0)
  return jnp.where(alive, inverted / inverted.max(1, keepdims=True), 1.0)


@register("mctf")
class MCTF(Planner):
  """W = ((cos(x_a, x_b) + 1) / 2)^(1/tau_sim) (info_a info_b)^(1/tau_info) (bulk_a bulk_b)^(1/tau_size)

  alpha_j = mean_{h,i} A_hij,  info = 1 / alpha,  bulk = 1 / s, both with maximum 1;  tau = 0 leaves a criterion out.
  Even places are a, odd ones b.  The best r/2 of a merge into b; then, of what is left, the best of b (with what they
  have received) merge into a.  x <- sum(w x) / sum(w), s <- sum(s), with w = alpha s (pooling "attention"), s or 1; or
  x <- max x, channel by channel (pooling "max").  Survivors stand as in the authors' code, in ToMe's order.

  At place `ahead` the attention of the unmerged tokens serves the merged ones: columns are summed over what a key
  stands for, rows averaged with w.  No map is kept: A C v is attention to values repeated over each key's members, and
  the rows are averaged after it.  (With pooling "max" rows are the largest entries of a group, and need not sum to 1:
  for this one the map A C is held.)  With one_step_ahead=False the merged tokens attend anew, with their sizes.  At
  places `attn` and `after` the block is done with its attention when tokens merge.
  """

  needs: ClassVar[tuple[str, ...]] = ("column_mean",)
  proportional: ClassVar[bool] = True
  scored: ClassVar[bool] = False
  conserves: ClassVar[bool] = False  # of pooling "attention" the mean is not weighted by size alone
  places: ClassVar[tuple[str, ...]] = ("ahead", "after", "attn")

  tau_sim: float = 1.0
  tau_info: float = 20.0
  tau_size: float = 40.0
  bidirectional: bool = True
  pooling: str = "attention"  # attention, size, max, mean
  one_step_ahead: bool = True  # place ahead: the map of the unmerged tokens serves the merged ones

  def needed(self) -> tuple[str, ...]:
    if self.pooling not in POOLING:
      raise ValueError(f"pooling={self.pooling!r} is not a pooling; {nearest(self.pooling, POOLING)}")
    return self.needs

  def fewest(self, n: int, protected: int) -> int:
    return n - (n - protected) // 2 if n > FEW else n

  def left(self, removed: int, n: int, protected: int) -> int:
    return max(super().left(removed, n, protected), min(n, FEW))

  def count(self, keep: float, n: int, protected: int, source: int) -> int:
    """For a ratio r = 1 - keep, of which the authors remove int(r m) of m tokens, but no more than half."""
    ratio = float(Fraction(1.0 - keep).limit_denominator(10**6))  # 1 - 0.55 is not 0.45, nor 1 - 2 / 3 a third
    removed = int(ratio * (n - protected))
    return max(n - removed, self.fewest(n, protected))

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    own = n * n * width * (1 / 4 + 1)  # the similarities of pairs, and q k^T again for the columns' means
    return own if self.one_step_ahead else own + 3 * n * width * width  # the block projects what has merged once more

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n, alive = tokens.x.shape[1], tokens.alive
    index = jnp.arange(n, dtype=jnp.int32)
    attention = jnp.maximum(jax.lax.stop_gradient(tokens.feats["column_mean"]), TINY)
    score = self.scores(tokens, attention)  # (B, Na, Nb)
    source, target = index[::2], index[1::2]
    removed = alive.sum(1, keepdims=True) - num_kept(tokens, keep)  # r
    forward = removed // 2 if self.bidirectional else removed

    best_a, match_a = best(score)
    rank_a = rank(-best_a)
    merged_a = (rank_a < forward) & jnp.isfinite(best_a)
    left = jnp.where(merged_a[..., None], -jnp.inf, score)
    best_b, match_b = best(left, axis=1)
    rank_b = rank(-best_b)
    merged_b = (rank_b < removed - forward) & jnp.isfinite(best_b)

    owner_b = jnp.where(merged_b, source[match_b], target)
    owner_a = jnp.where(merged_a, take(owner_b, match_a), source)  # with b, if b moves on
    owner = jnp.where(alive, interleave(owner_a, owner_b, n), -1)

    # Places: protected, what is left of a (best first, if no token is protected), what is left of b (best first, if it
    # had a choice), then the merged.  Where nothing merges the authors return early, and the order stays.
    guarded = (tokens.protected & alive).any(1, keepdims=True)
    key_a = jnp.where(merged_a, 4 * n - 1 - rank_a, n + jnp.where(guarded, source, rank_a))
    key_b = jnp.where(merged_b, 5 * n - 1 - rank_b, 2 * n + (rank_b if self.bidirectional else target))
    key = jnp.where(tokens.protected, index, interleave(key_a, key_b, n))
    merges = merged_a.any(1, keepdims=True) | merged_b.any(1, keepdims=True)
    order = inverse(rank(jnp.where(alive, jnp.where(merges, key, index), index + 5 * n)))
    share = {"attention": attention * tokens.size, "size": tokens.size, "max": owner == index, "mean": 1.0}
    plan = merge_into(tokens, owner, order, share=jnp.where(alive, share[self.pooling], 1.0))
    plan = PeakPlan(**vars(plan)) if self.pooling == "max" else plan
    # At place ahead a plan that is reported tells the block to pool its rows as the tokens.
    return plan, {"similarity": best_a} | ({"plan": plan} if self.one_step_ahead else {})

  def scores(self, tokens: Tokens, attention: Array) -> Array:
    """W of every pair (a, b), (B, ceil(N/2), floor(N/2)) float32; -inf where one of them may not move."""
    can = tokens.alive & ~tokens.protected
    out = jnp.ones(())
    if self.tau_sim:
      metric = unit(jax.lax.stop_gradient(tokens.x), tokens.alive)
      cosine = jnp.einsum("bad,bcd->bac", metric[:, ::2], metric[:, 1::2], precision="highest")
      out = out * jnp.maximum((cosine + 1.0) / 2.0, 0.0) ** (1 / self.tau_sim)
    for tau, value in ((self.tau_info, attention), (self.tau_size, tokens.size)):
      if tau:
        each = scarcity(value, tokens.alive) ** (1 / tau)
        out = out * each[:, ::2, None] * each[:, None, 1::2]
    return jnp.where(can[:, ::2, None] & can[:, None, 1::2], out, -jnp.inf)
