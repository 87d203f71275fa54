"""VisionZip: tokens that draw attention stay, evenly spaced others collect the rest.

(Yang et al., 2024, arXiv:2412.04467)
"""

from typing import Any, ClassVar

import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, merge_into, num_kept, ranks, register
from tokred.reducers.diversity import compared, valid_metric
from tokred.reducers.tome import unit
from tokred.scores import SCORES
from tokred.tokens import Array, Plan, Tokens, group_sum, inverse, rank


def spaced(rest: Array, count: Array) -> Array:
  """Every max(1, R // count)-th of the R tokens of `rest` from the first on, no more than `count`: (B, N) bool.

  Args:
    rest: (B, N) bool.
    count: (B, 1) int32.
  """
  t = jnp.cumsum(rest, axis=1, dtype=jnp.int32) - 1
  stride = jnp.maximum(rest.sum(1, keepdims=True, dtype=jnp.int32) // jnp.maximum(count, 1), 1)
  return rest & (t % stride == 0) & (t // stride < count)


@register("visionzip")
class VisionZip(Planner):
  """Of k free tokens k - c are dominant, those of the highest score; c evenly spaced others are contextual:

    t(i) = argmax_{j contextual} cos(z_i, z_j);  x_j <- sum(s x) / sum(s) over j and the i with t(i) = j

  (Yang et al., 2024, arXiv:2412.04467)  That is what the paper says.  The authors' code adds: x_j + mean_i x_i, with
  add=True; and it hands CLS on to the language model, with keep_cls=True, which counts as a dominant token there.
  Survivors stand as theirs do: CLS, the dominant and then the contextual tokens, each in their order.

  The score is CLS's attention at the tower's output; a tower without CLS, and a language model (VisionDrop, Xu et al.,
  2025), have column_mean or visual_attention.
  """

  score: str = "cls_attention"  # a name of tokred.scores.SCORES
  metric: str = "key"  # key, token
  contextual: float = 0.16  # c: a share of k (at least 1 token), or a number of tokens
  add: bool = False
  keep_cls: bool = False  # read by the VLM, for which prefix tokens are no picture otherwise
  places: ClassVar[tuple[str, ...]] = ("attn", "before", "after", "output")
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.score not in SCORES:
      raise ValueError(f"score={self.score!r} is not a score; {nearest(self.score, SCORES)}")
    if self.contextual <= 0:
      raise ValueError(f"contextual={self.contextual} must be above 0: a share below 1, or a number of tokens")
    return tuple(sorted({*valid_metric(self.metric), *SCORES[self.score][1]}))

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * n * self.contextual * (width if self.metric == "token" else width / num_heads)  # about

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)
    score = SCORES[self.score][0](tokens)
    safe = (tokens.alive & tokens.protected).sum(1, keepdims=True, dtype=jnp.int32)
    free = num_kept(tokens, keep) - safe
    if self.contextual >= 1:
      context = jnp.full_like(free, int(self.contextual))
    else:  # rounding must not lose what is whole
      context = jnp.maximum(jnp.floor(self.contextual * free + 1e-4).astype(jnp.int32), 1)
    context = jnp.clip(context, 0, free)
    dominant = tokens.alive & (ranks(tokens, score) < safe + free - context)
    rest = tokens.alive & ~dominant
    target = spaced(rest, context)
    z = unit(compared(tokens, self.metric), rest)
    similar = jnp.einsum("bid,bjd->bij", z, z, precision="highest")
    nearest_target = jnp.argmax(jnp.where(target[:, None], similar, -jnp.inf), axis=-1).astype(jnp.int32)
    stays = dominant | target
    joins = jnp.where(target.any(1, keepdims=True), nearest_target, -1)
    owner = jnp.where(tokens.alive, jnp.where(stays, index, joins), -1)
    kind = jnp.where(dominant, 0, jnp.where(target, 1, jnp.where(tokens.alive, 2, 3)))
    plan = merge_into(tokens, owner, inverse(rank(kind * n + index)))
    if self.add:
      others = group_sum(owner, jnp.where(stays, 0.0, 1.0))  # of each target
      mine = jnp.take_along_axis(others, jnp.maximum(owner, 0), axis=1)
      plan = plan.replace(weight=jnp.where(stays, 1.0, 1.0 / jnp.maximum(mine, 1.0)))
    return plan, {"score": score}
