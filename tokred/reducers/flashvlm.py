"""FlashVLM: what the text asks for and the picture shows, with some of the background.

(Cai et al., 2025, arXiv:2512.20561)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, keep_top, num_kept, parts, ranks, register
from tokred.reducers.diversity import cosines, farthest_first
from tokred.reducers.tome import unit
from tokred.scores import SCORES
from tokred.tokens import Array, Plan, Tokens


def sharpened(score: Array, free: Array, temperature: float) -> Array:
  """log softmax over the free tokens of (s - mean) / (std temperature), (B, N) float32."""
  count = jnp.maximum(free.sum(1, keepdims=True), 1)
  mean = jnp.where(free, score, 0.0).sum(1, keepdims=True) / count
  off = jnp.where(free, score - mean, 0.0)
  std = jnp.sqrt(jnp.square(off).sum(1, keepdims=True) / count)
  return jax.nn.log_softmax(jnp.where(free, off / (std + 1e-6) / temperature, jnp.finfo(jnp.float32).min / 2))


@register("flashvlm")
class FlashVLM(Planner):
  """Keeps k tokens where the language model begins: (1 - diverse) k of the highest

    s_i = exp(relevance log a_i + (1 - relevance) log b_i),  a from max_t cos(x_i, x_t) over the text, b from `score`

  and of the others floor(diverse k), farthest first.  (Cai et al., 2025, arXiv:2512.20561)  Their abstract says that
  the two are weighted in the log domain, sharpened by a temperature, and that a partition keeps some background; how is
  our reading: each is a softmax over its standardised values.  Without a score s is a alone; in a language model
  score="memory" is what the tower remembers of CLS's attention, if it is handed on.
  """

  conserves: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("before", "attn", "after", "output")
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  score: str = ""  # a name of tokred.scores.SCORES
  relevance: float = 0.5
  temperature: float = 0.5
  diverse: float = 0.1
  raster: bool = True

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.score and self.score not in SCORES:
      raise ValueError(f"score={self.score!r} is not a score; {nearest(self.score, SCORES)}")
    for option in ("relevance", "diverse"):
      if not 0.0 <= getattr(self, option) <= 1.0:
        raise ValueError(f"{option}={getattr(self, option)} must be in [0.0, 1.0]")
    if self.temperature <= 0:
      raise ValueError(f"temperature={self.temperature} must be above 0")
    return SCORES[self.score][1] if self.score else ()

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return 2 * n * n * width

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    text, free = parts(tokens)
    z = unit(jax.lax.stop_gradient(tokens.x), tokens.alive)
    asked = jnp.where(text[:, None], cosines(z), -1.0).max(-1)
    score = sharpened(asked, free, self.temperature)
    if self.score:
      shown = sharpened(jax.lax.stop_gradient(SCORES[self.score][0](tokens)), free, self.temperature)
      score = self.relevance * score + (1.0 - self.relevance) * shown
    safe = (tokens.alive & tokens.protected).sum(1, keepdims=True, dtype=jnp.int32)
    count = num_kept(tokens, keep) - safe
    few = jnp.floor(self.diverse * count + 1e-4).astype(jnp.int32)
    place = ranks(tokens, score) - safe
    best = free & (place < count - few)
    rest = tokens.replace(mask=free & ~best, protected=jnp.zeros_like(free))
    turn, _ = farthest_first(rest, unit(z, rest.mask), keep)
    n = z.shape[1]
    worth = jnp.where(best, -place, -n - turn)
    return keep_top(tokens, worth, keep, raster=self.raster), {"score": score}
