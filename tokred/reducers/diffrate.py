"""The merge half of DiffRate: the least important survivors fold into their most similar betters.

(Chen et al., 2023, arXiv:2305.17997)  The prune half is `topk`; both sites have a learned rate.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred import scores
from tokred.reducers.base import Planner, finish, merge_into, num_kept, ranks, register
from tokred.reducers.tome import unit
from tokred.tokens import Array, Plan, Tokens, inverse, take


@register("diffrate_merge")
class DiffRateMerge(Planner):
  """Ranks n_m <= i < n fold into t(i) = argmax_{protected <= j < n_m} cos(x_i, x_j); the group takes the plain mean.

  A merged token's size is discounted by its similarity, s_j <- s_j + sum s_i cos(x_i, x_t(i)), so sizes are not
  conserved; while training they are at least 1 before the sum.  Matching is outside the gradient, the mean is inside.
  """

  needs: ClassVar[tuple[str, ...]] = ("cls_attention",)
  conserves: ClassVar[bool] = False
  proportional: ClassVar[bool] = True
  scored: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("attn",)

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def macs(self, n: float, width: int, num_heads: int) -> float:
    return 0.0  # depends on what goes, not on what arrives; at most n^2 / 4 width, and left out by the authors too

  def __call__(
    self, tokens: Tokens, keep: Any, *, train: bool, mode: str, survival: Array | None = None
  ) -> tuple[Tokens, dict[str, Array]]:
    plan, report = self.plan(tokens, keep, train=train and mode == "mask")
    size = jnp.where(report["merged"], tokens.size * report["similarity"], tokens.size)
    tokens = tokens.replace(size=jnp.maximum(size, 1.0) if train and mode == "mask" else size)
    return finish(tokens, plan, keep, mode, survival), {}

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    back = ranks(tokens, scores.cls_attention(tokens))
    order = inverse(back)
    alive = tokens.alive.sum(1, keepdims=True)
    count = num_kept(tokens, keep)
    low, high = (keep, keep) if isinstance(keep, int) else (0, n)  # static counts: only the pairs that matter
    low, high = min(low, n), max(min(high, n), 1)
    metric = take(unit(jax.lax.stop_gradient(tokens.x), tokens.alive), order)
    sim = jnp.einsum("bid,bjd->bij", metric[:, low:], metric[:, :high], precision="highest")
    rank = jnp.arange(n, dtype=jnp.int32)
    target = (rank < count) & ~take(tokens.protected, order)
    sim = jnp.where(target[:, None, :high], sim, -jnp.inf)
    goes = (rank >= count) & (rank < alive)

    # From ranks back to places.
    match = jnp.concatenate([jnp.broadcast_to(rank[:low], goes[:, :low].shape), jnp.argmax(sim, -1)], axis=1)
    best = jnp.concatenate([jnp.ones(goes[:, :low].shape, sim.dtype), sim.max(-1, initial=-jnp.inf)], axis=1)
    owner = jnp.where(goes, match, jnp.where(rank < count, rank, -1)).astype(jnp.int32)
    owner = take(owner, back)
    owner = jnp.where(owner >= 0, take(order, jnp.maximum(owner, 0)), -1)
    merged = take(goes, back)
    plan = merge_into(tokens, owner, order, share=jnp.ones_like(tokens.size))
    return plan, {"merged": merged, "similarity": jnp.where(merged, take(best, back), 1.0)}
