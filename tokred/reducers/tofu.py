"""ToFu: prunes in early blocks, and later merges without losing length.  (Kim et al., 2023, arXiv:2312.01026)"""

import math
from typing import Any, ClassVar

import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import finish, merge_into, register
from tokred.reducers.tome import ToMe
from tokred.tokens import Array, Plan, Tokens

NORMS = ("mlerp", "target")


def length(x: Array) -> Array:
  """||x|| along the last axis in float32; its gradient at zero is zero."""
  square = jnp.square(x.astype(jnp.float32)).sum(-1)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


@register("tofu")
class ToFu(ToMe):
  """ToMe's matching; blocks up to floor(early L) drop the r sources that it would merge, the others merge them so:

  MLERP:  x <- xbar max_i ||x_i|| / ||xbar||,  xbar = sum(s x) / sum(s)

  A mean is shorter than what it is the mean of, and a network that has not seen such features reads them worse.
  norm="target" is the one re-implementation in public (in the repository of PiToMe): it divides by the length that the
  destination had *before* the mean, takes the plain mean, and leaves sizes as they are.
  """

  conserves: ClassVar[bool] = False  # lengths are the point, and what is pruned takes its size along

  early: float = 0.5  # below 0: no block prunes
  norm: str = "mlerp"  # mlerp, target
  layer: int = 0
  depth: int = 1

  @property
  def prunes(self) -> bool:
    return self.layer <= self.early * self.depth

  def needed(self) -> tuple[str, ...]:
    if self.norm not in NORMS:
      raise ValueError(f"norm={self.norm!r} is not a way to rescale; {nearest(self.norm, NORMS)}")
    return super().needed()

  def count(self, keep: float, n: int, protected: int, source: int) -> int:
    return max(n - math.floor(n - n * keep), self.fewest(n, protected))  # of all, as there; at most half go

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    plan, report = super().plan(tokens, keep, train=train)
    if self.prunes:
      stays = plan.owner == jnp.arange(plan.owner.shape[1])
      return plan.replace(owner=jnp.where(stays, plan.owner, -1), weight=None), report
    if self.norm == "target":
      plan = merge_into(tokens, plan.owner, plan.order, jnp.ones_like(tokens.size))
    return plan, report

  def __call__(
    self, tokens: Tokens, keep: Any, *, train: bool, mode: str, survival: Array | None = None
  ) -> tuple[Tokens, dict[str, Array]]:
    plan, report = self.plan(tokens, keep, train=train and mode == "mask")
    if self.prunes:
      return finish(tokens, plan, keep, mode, survival), report
    # What a group must know of its members travels with its owner; (B, N) each, 0 where a token stands alone.
    norms = length(jnp.where(tokens.alive[..., None], tokens.x, 0))
    member = plan.owner[:, None] == jnp.arange(norms.shape[1])[None, :, None]  # (B, owner, member)
    shared = member.sum(-1) > 1
    longest = jnp.where(shared, jnp.where(member, norms[:, None], 0.0).max(-1), 0.0)
    carried = {"tofu/longest": longest, "tofu/target": norms, "tofu/size": tokens.size}
    out = finish(tokens.replace(feats=tokens.feats | carried), plan, keep, mode, survival)
    feats = {name: value for name, value in out.feats.items() if name not in carried}
    longest, target, size = (out.feats[name] for name in carried)
    target = target if self.norm == "target" else length(jnp.where(longest[..., None] > 0, out.x, 0))
    stretch = jnp.where((longest > 0) & (target > 0), longest / jnp.where(target > 0, target, 1.0), 1.0)
    x = (out.x.astype(jnp.float32) * stretch[..., None]).astype(out.x.dtype)
    return out.replace(x=x, size=size if self.norm == "target" else out.size, feats=feats), report
