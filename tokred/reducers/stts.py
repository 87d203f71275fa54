"""STTS: a light scorer for video, told by neighbouring frames what is redundant.

(STTS, 2026)  The authors' code was not at hand; how the score learns of the language model is a choice of ours.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.reducers.base import Planner, register, soft_top
from tokred.tokens import Array, Plan, Tokens


def likeness(x: Array, frames: int) -> Array:
  """Cosine of each token with the one in its place in the frame before; the first frame of a clip has 0.

  Args:
    x: (B, N, D), a frame a row; clips of `frames` rows, one behind the other.
    frames: rows of a clip, a divisor of B.

  Returns:
    (B, N) float32.
  """
  x = x.astype(jnp.float32)
  unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
  clips = unit.reshape(-1, frames, *x.shape[1:])
  cosine = (clips[:, 1:] * clips[:, :-1]).sum(-1)
  return jnp.pad(cosine, ((0, 0), (1, 0), (0, 0))).reshape(x.shape[:2])


@register("stts")
class STTS(Planner):
  """s = MLP(norm x), the same whatever is asked;  the top `keep` of each frame stay, here and in the language model.

  Loss, where `frames` says how many rows make a clip: `weight` (sigmoid(s) - (1 - c))^2, c the cosine with the same
  place one frame before, over the free tokens that have one; so it must be the first site that cuts.  The gate has the
  gradient of sigmoid((s - t) / tau), whose sum is the count.  With rate="threshold" frames that repeat lose more.
  """

  places: ClassVar[tuple[str, ...]] = ("before", "after", "output")
  stacks: ClassVar[tuple[str, ...]] = ("encoder",)

  hidden: int = 64
  frames: int = 1  # rows of a clip; 1: images
  weight: float = 1.0
  temperature: float = 0.1

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * self.hidden * (width + 1)

  @nn.compact
  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    x = jnp.where(tokens.alive[..., None], tokens.x, 0).astype(jnp.float32)
    h = nn.gelu(nn.Dense(self.hidden, name="fc1")(nn.LayerNorm(epsilon=1e-6, name="norm")(x)))
    score = nn.Dense(1, name="fc2")(h)[..., 0]
    report = {"score": score}
    if self.frames > 1 and train:
      if len(x) % self.frames:
        raise ValueError(f"frames={self.frames} does not divide a batch of {len(x)} frames")
      free = tokens.alive & ~tokens.protected & (jnp.arange(len(x)) % self.frames > 0)[:, None]
      wanted = 1.0 - jax.lax.stop_gradient(likeness(x, self.frames))
      each = jnp.where(free, jnp.square(jax.nn.sigmoid(score) - wanted), 0.0)
      report["loss_redundancy"] = self.weight * each.sum(1) / jnp.maximum(free.sum(1), 1)
    return soft_top(tokens, score, keep, self.temperature, train=train), report
