"""Keeps the tokens of the highest score; drops the others or fuses them into one.

EViT (Liang et al., 2022, arXiv:2202.07800) is the score cls_attention with `fuse`.  It is also the prune half of
DiffRate (Chen et al., 2023, arXiv:2305.17997), with a learned rate.
"""

from typing import Any, ClassVar

import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, keep_top, num_kept, ranks, register
from tokred.scores import FORESEEN, SCORES
from tokred.tokens import Array, Plan, Tokens, inverse


@register("topk")
class TopK(Planner):
  """x <- [protected, x_i by descending score, sum over the others of c_j x_j where `fuse`].

  The fused token is EViT's: its weights c are the cls attention itself, so they add up to less than one.  One token
  alone is not fused: as many would come out as arrive, which is the identity; the authors reorder and weigh even then.
  A distillation token is protected as CLS is; theirs is scored, and may go.
  """

  conserves: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("attn", "before", "after", "around", "output")
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  score: str = "cls_attention"  # a name of tokred.scores.SCORES
  fuse: bool = False
  raster: bool = False  # survivors keep their order

  def count(self, keep: float, n: int, protected: int, source: int) -> int:
    return min(n, super().count(keep, n, protected, source) + self.fuse)  # EViT counts the fused token on top

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.score not in SCORES:
      raise ValueError(f"score={self.score!r} is not a score; {nearest(self.score, SCORES)}")
    if self.fuse and self.score != "cls_attention":
      raise ValueError(f"fuse=True weighs with score='cls_attention', not {self.score!r}")
    return SCORES[self.score][1]

  def foresees(self) -> bool:
    return not self.fuse and self.score in FORESEEN

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    score = SCORES[self.score][0](tokens)
    if not self.fuse:
      return keep_top(tokens, score, keep, raster=self.raster), {"score": score}
    index = jnp.arange(score.shape[1], dtype=jnp.int32)
    rank = ranks(tokens, score)
    order = inverse(rank)
    count = num_kept(tokens, keep)
    alive = tokens.alive.sum(1, keepdims=True)
    stays = (rank < count - 1) | (alive <= count)  # the last place is the fused token's
    slot = jnp.take_along_axis(order, count - 1, axis=1)  # the best of those that go lends its place
    owner = jnp.where(tokens.alive, jnp.where(stays, index, slot), -1)
    weight = jnp.where(stays, 1.0, score)
    return Plan(owner=owner, order=order, gate=(owner == index) | ~tokens.alive, weight=weight), {"score": score}
