"""Coverage: what is taken shall stand for all the others, or for text and image together; one token after another."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, keep_top, parts, register
from tokred.reducers.diversity import compared, cosines, valid_metric
from tokred.reducers.tome import unit
from tokred.scores import SCORES
from tokred.tokens import Array, Plan, Tokens

IMAGE = "state/image"  # what a language model's visual tokens were before the projector, (B, N, d)


def cover_in_turn(tokens: Tokens, cover: Array, worth: Array | float, steps: int) -> tuple[Array, Array]:
  """The protected in their order, then argmax_j w_j sum_m max(0, C_mj - max_{i taken} C_mi), ties the lower index.

  Where nothing is taken yet, what is covered is 0.  With w = 1 this is the greedy of facility location.

  Args:
    tokens: N tokens.
    cover: (B, M, N) float32, finite: how much token j stands for m; 0 where it should not count.
    worth: w, (B, N) or a number.
    steps: how many are taken, the protected counted.

  Returns:
    The turn of each token, (B, N) int32, N for what is not taken; and what it won then, (B, N) float32.
  """
  n = cover.shape[2]
  index, lowest = jnp.arange(n), jnp.finfo(jnp.float32).min

  def step(time: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    turn, value, best = state
    gain = worth * jnp.maximum(cover - best[..., None], 0.0).sum(1)
    key = jnp.where(tokens.protected, jnp.inf, jnp.where(tokens.alive, gain, lowest))
    pick = jnp.argmax(jnp.where(turn < n, -jnp.inf, key), axis=1)[:, None]
    chosen = index == pick
    free = (chosen & ~tokens.protected).any(1, keepdims=True)
    reached = jnp.where(chosen[:, None], cover, 0.0).sum(-1)
    best = jnp.where(free, jnp.maximum(best, reached), best)
    return jnp.where(chosen, time, turn), jnp.where(chosen, gain, value), best

  shape = tokens.mask.shape
  state = jnp.full(shape, n, jnp.int32), jnp.full(shape, lowest), jnp.zeros(cover.shape[:2])
  turn, value, _ = jax.lax.fori_loop(0, steps, step, state)
  return turn, value


class Cover(Planner):
  """The greedy of `cover_in_turn`; a class below says what is covered."""

  conserves: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("attn", "before", "after", "output")
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  raster: bool = False  # survivors keep their order; otherwise they stand in the order in which they were taken

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * n * width

  def cover(self, tokens: Tokens) -> tuple[Array, Array | float]:
    """C (B, M, N) and w of `cover_in_turn`."""
    raise NotImplementedError

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    steps = min(keep, n) if isinstance(keep, int) else n
    turn, value = cover_in_turn(tokens, *self.cover(tokens), steps)
    return keep_top(tokens, -turn, keep, raster=self.raster), {"score": value}


@register("facility")
class Facility(Cover):
  """argmax_j w_j sum_i max(0, cos(z_i, z_j) - max_{l taken} cos(z_i, z_l)).  (Cornuejols et al., 1977)

  SCOPE (Deng et al., 2025) has w_j = s_j^power with score="cls_attention"; without a score w = 1.
  """

  metric: str = "token"  # key, token
  score: str = ""  # a name of tokred.scores.SCORES
  power: float = 1.0

  def needed(self) -> tuple[str, ...]:
    if self.score and self.score not in SCORES:
      raise ValueError(f"score={self.score!r} is not a score; {nearest(self.score, SCORES)}")
    return tuple(sorted({*valid_metric(self.metric), *(SCORES[self.score][1] if self.score else ())}))

  def cover(self, tokens: Tokens) -> tuple[Array, Array | float]:
    free = tokens.alive & ~tokens.protected
    similar = cosines(unit(compared(tokens, self.metric), free))
    if not self.score:
      return similar, 1.0
    score = jax.lax.stop_gradient(SCORES[self.score][0](tokens))
    return similar, jnp.maximum(jnp.where(free, score, 0.0), 0.0) ** self.power


@register("mmtok")
class MMTok(Cover):
  """Covers the m words of a prompt and its n visual tokens at once, where the language model begins.

    C = [softmax_j(cos(t_i, x_j) / text_temperature) / m;  alpha softmax_j(cos(z_i, z_j) / temperature) / n]

  (Dong et al., 2025, arXiv:2508.18264)  Words are the protected tokens of the prompt; z are the tower's features, if
  feats["state/image"] has them, and x otherwise.
  """

  alpha: float = 0.5
  text_temperature: float = 0.02  # the authors' core; their functions' default is 0.01
  temperature: float = 0.2
  raster: bool = True

  def cover(self, tokens: Tokens) -> tuple[Array, Array | float]:
    text, free = parts(tokens)
    x = unit(jax.lax.stop_gradient(tokens.x), tokens.alive)
    z = unit(jax.lax.stop_gradient(tokens.feats[IMAGE]), tokens.alive) if IMAGE in tokens.feats else x

    def share(z: Array, rows: Array, temperature: float) -> Array:
      logits = jnp.where(free[:, None], cosines(z) / temperature, jnp.finfo(jnp.float32).min)
      covered = jnp.where(rows[..., None] & free[:, None], jax.nn.softmax(logits), 0.0)
      return covered / jnp.maximum(rows.sum(1), 1)[:, None, None]

    rows = share(x, text, self.text_temperature), self.alpha * share(z, free, self.temperature)
    return jnp.concatenate(rows, axis=1), 1.0
