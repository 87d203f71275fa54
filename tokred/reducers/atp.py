"""ATP-LLaVA: two criteria and, for each prompt, two thresholds that the scores themselves suggest.

(ATP-LLaVA, 2024)  The authors' code was not at hand: what thresholds read, and the spatial score, are choices of ours.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.reducers.base import Planner, keep_top, register
from tokred.tokens import VISUAL, Array, Plan, Tokens


def spread(index: Array, side: int) -> Array:
  """How coarse a uniform sampling of a grid still has a token: 1 for its corner, 0 where only the finest has it.

  Args:
    index: (B, N) int32 place in the picture, row by row.
    side: tokens of a line of it.

  Returns:
    (B, N) float32 in [0, 1].
  """
  levels = max((side - 1).bit_length(), 1)
  row, column = jnp.divmod(index % (side * side), side)
  both = row | column | (1 << levels)
  twos = jnp.bitwise_and(both, -both)  # the largest power of two that divides both
  return jnp.log2(twos.astype(jnp.float32)) / levels


class Theta(nn.Module):
  """A threshold in (0, 1) for each row, (B,) float32, from the distribution of its scores."""

  hidden: int

  @nn.compact
  def __call__(self, score: Array, free: Array) -> Array:
    count = jnp.maximum(free.sum(1), 1)
    mean = jnp.where(free, score, 0.0).sum(1) / count
    square = jnp.where(free, jnp.square(score - mean[:, None]), 0.0).sum(1) / count
    lowest = jnp.where(free, score, 1.0).min(1)
    top = jnp.where(free, score, 0.0).max(1)
    h = jnp.stack([mean, jnp.sqrt(square + 1e-6), lowest, top, jnp.log(count.astype(jnp.float32))], -1)
    h = nn.Dense(1, name="fc2")(nn.gelu(nn.Dense(self.hidden, name="fc1")(h)))
    return jax.nn.sigmoid(h[:, 0])


@register("atp")
class ATP(Planner):
  """m = max over two scores of sigmoid(sharpness (s - theta)).

  s_r = (attention from visual tokens + from text) / 2, divided by its largest value, and s_s = place in a uniform
  sampling of the picture.  Training: m is the gate, as it is; inference: who has m > 1/2, no more than `keep`.  Loss:
  `weight` (mean m - target)^2.
  """

  needs: ClassVar[tuple[str, ...]] = ("self_attention", "text_attention", VISUAL)
  ragged: ClassVar[bool] = True
  relaxed: ClassVar[bool] = True
  idles: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("before",)
  stacks: ClassVar[tuple[str, ...]] = ("llm",)

  grid: int = 24  # tokens of a picture's line
  sharpness: float = 10.0
  hidden: int = 32
  target: float = 0.25
  weight: float = 1.0

  @nn.compact
  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    free = tokens.alive & ~tokens.protected
    score = 0.5 * (tokens.feats["self_attention"] + tokens.feats["text_attention"])
    score = jnp.where(free, score, 0.0)
    score = score / jnp.maximum(score.max(1, keepdims=True), 1e-12)
    space = jnp.where(free, spread(tokens.feats[VISUAL], self.grid), 0.0)
    thetas = [Theta(self.hidden, name=name)(s, free) for name, s in (("redundancy", score), ("space", space))]
    margin = jnp.maximum(score - thetas[0][:, None], space - thetas[1][:, None])
    gate = jnp.where(free, jax.nn.sigmoid(self.sharpness * margin), 1.0)
    count = (free & (margin > 0)).sum(1) + (tokens.alive & tokens.protected).sum(1)
    plan = keep_top(tokens, margin, jnp.minimum(jnp.maximum(count, 1), jnp.asarray(keep)).astype(jnp.int32))
    share = jnp.where(free, gate, 0.0).sum(1) / jnp.maximum(free.sum(1), 1)
    report = {"score": margin, "share": share, "loss_count": self.weight * jnp.square(share - self.target)}
    report["count"] = jnp.where(tokens.alive, gate, 0.0).sum(1)
    if train:  # nobody goes
      index = jnp.broadcast_to(jnp.arange(gate.shape[1], dtype=jnp.int32), gate.shape)
      plan = Plan(owner=jnp.where(tokens.alive, index, -1), order=index, gate=gate)
    return plan, report
