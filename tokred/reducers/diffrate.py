"""The merge half of DiffRate: the least important survivors fold into their most similar betters.

(Chen et al., 2023, arXiv:2305.17997)  The prune half is `topk`; both sites have a learned rate.  The epsilon of the
authors' masked softmax is `config.model.gate_eps`.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred import scores
from tokred.reducers.base import Planner, finish, merge_into, num_kept, ranks, register
from tokred.tokens import Array, Plan, Tokens, best, inverse, take

SCHEDULES = {  # the authors' for DeiT-S at 224: tokens that stay after pruning and after merging, block by block
  "deit_s_2.3g": (
    (197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3),
    (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3),
  ),
  "deit_s_2.9g": (
    (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
    (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
  ),
}


def site(prune: Sequence[int], merge: Sequence[int]) -> dict[str, Any]:
  """The site of a released schedule: `config.sites.rates = site(*SCHEDULES["deit_s_2.9g"])`.

  Args:
    prune: tokens that stay after pruning in each block, CLS counted; more than arrive take nothing away.
    merge: likewise after merging.
  """
  left, kept = math.inf, ([], [])
  for pair in zip(prune, merge, strict=True):
    for counts, count in zip(kept, pair, strict=True):
      left = min(left, count)
      counts.append(int(left))
  return dict(reducer=("topk", "diffrate_merge"), layers=tuple(range(len(prune))), keep=tuple(map(tuple, kept)))


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

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
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
    place = ranks(tokens, scores.cls_attention(tokens))
    order = inverse(place)
    count = num_kept(tokens, keep)
    low = min(keep, n) if isinstance(keep, int) else 0  # a static count: only what goes has to be matched
    going = order[:, low:]
    x = jax.lax.stop_gradient(tokens.x).astype(jnp.float32)
    length = jnp.maximum(jnp.linalg.norm(x, axis=-1), jnp.finfo(jnp.float32).tiny)
    # Nothing of (B, N, D) is normalised, and it is the smaller factor that a CPU's product packs.
    product = jnp.einsum("bjd,bgd->bjg", x, take(x, going), precision="highest")
    target = (place < count) & ~tokens.protected & tokens.alive
    best_sim, match = best(jnp.where(target[..., None], product / length[..., None], -jnp.inf), axis=1)
    best_sim = best_sim / take(length, going)
    goes = (take(place, going) >= count) & take(tokens.alive, going)
    index = jnp.arange(n, dtype=jnp.int32)
    owner = jnp.where((place < count) & tokens.alive, index, -1)
    owner = put(owner, going, jnp.where(goes, match, take(owner, going)))
    merged = put(jnp.zeros_like(tokens.alive), going, goes)
    similarity = put(jnp.ones(merged.shape, jnp.float32), going, jnp.where(goes, best_sim, 1.0))
    plan = merge_into(tokens, owner, order, share=jnp.ones_like(tokens.size))
    return plan, {"merged": merged, "similarity": similarity}


def put(values: Array, index: Array, new: Array) -> Array:
  """values[b, index[b, i]] = new[b, i]; index (B, M) in [0, N), each at most once."""
  return jax.vmap(lambda row, i, v: row.at[i].set(v, mode="promise_in_bounds", unique_indices=True))(values, index, new)
