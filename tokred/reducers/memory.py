"""Writes a score down for a later layer: decisions that read two layers of a tower, or the mean of several."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Reducer, register
from tokred.scores import MEMORY, RATER, SCORES
from tokred.tokens import Array, Tokens

NAMES = {"memory": MEMORY, "rater": RATER}  # name -> feature
HOW = ("mean", "sum", "running", "last")


@register("remember")
class Remember(Reducer):
  """Leaves the tokens as they are, and their score in feats["state/<name>"], (B, N) float32, for a later layer.

  Scores that read it are `memory`, and `text_attention` the raters.  Of several layers it keeps their mean (VTC-CLS:
  Wang et al., 2024), their sum (TransPrune), m <- (m + s) / 2 (running, FlowCut) or the last alone.  What merges keeps
  the memory of its owner.
  """

  recovers: ClassVar[bool] = True  # asks for no count
  idles: ClassVar[bool] = False
  scored: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("attn", "before", "after")
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  score: str = "cls_attention"  # a name of tokred.scores.SCORES
  name_of: str = "memory"  # memory, rater
  how: str = "mean"  # mean, sum, running, last

  def needed(self) -> tuple[str, ...]:
    for option, valid in (("score", SCORES), ("name_of", NAMES), ("how", HOW)):
      if getattr(self, option) not in valid:
        raise ValueError(f"{option}={getattr(self, option)!r} is unknown; {nearest(getattr(self, option), valid)}")
    return SCORES[self.score][1]

  def recovered(self, n: Any, source: int) -> Any:
    return n

  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    key = NAMES[self.name_of]
    score = jax.lax.stop_gradient(SCORES[self.score][0](tokens))
    score = jnp.where(tokens.alive, score, 0.0)
    old, times = tokens.feats.get(key), tokens.feats.get(key + "_count", jnp.zeros(score.shape))
    if old is not None and self.how != "last":
      score = {"mean": (old * times + score) / (times + 1), "sum": old + score, "running": (old + score) / 2}[self.how]
    feats = tokens.feats | {key: score}
    if self.how == "mean":
      feats |= {key + "_count": times + 1}
    return tokens.replace(feats=feats), {}
