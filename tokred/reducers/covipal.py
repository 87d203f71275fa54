"""CoViPAL: a small module beside a frozen language model scores visual tokens by what they and the text say.

(CoViPAL, 2025)  The authors' code was not at hand: the sizes of the module and the form of its gradient are ours.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.reducers.base import Planner, parts, register, soft_top
from tokred.tokens import Array, Plan, Tokens


@register("covipal")
class CoViPAL(Planner):
  """h = W norm(x);  h_v <- h_v + attention(h_v, h_t), then + MLP;  s = w h_v;  the top `keep` visual tokens stay.

  Stage 1 (`guide` names a deeper layer, keep=1.0): loss = KL(a || softmax(s)) over the visual tokens, where a is the
  attention that text pays them there.  Stage 2: the gate has the gradient of sigmoid((s - t) / tau), whose sum is the
  count, and the language model's loss teaches the scorer.
  """

  places: ClassVar[tuple[str, ...]] = ("before",)
  stacks: ClassVar[tuple[str, ...]] = ("llm",)

  hidden: int = 256
  num_heads: int = 4
  temperature: float = 0.1
  guide: int = -1  # the layer whose attention is the target of stage 1; -1: none

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * self.hidden * (width + 12 * self.hidden) + 2 * n * n * self.hidden

  @nn.compact
  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    text, _ = parts(tokens)
    x = jnp.where(tokens.alive[..., None], tokens.x, 0).astype(jnp.float32)
    h = nn.Dense(self.hidden, name="down")(nn.RMSNorm(name="norm")(x))
    attend = nn.MultiHeadDotProductAttention(self.num_heads, name="attn")
    h = h + attend(nn.LayerNorm(name="norm1")(h), nn.LayerNorm(name="norm_text")(h), mask=text[:, None, None])
    m = nn.Dense(4 * self.hidden, name="fc1")(nn.LayerNorm(name="norm2")(h))
    h = h + nn.Dense(self.hidden, name="fc2")(nn.gelu(m))
    score = nn.Dense(1, name="score")(h)[..., 0]
    return soft_top(tokens, score, keep, self.temperature, train=train), {"score": score}

  def guided(self, score: Array, attention: Array, visual: Array) -> Array:
    """Loss of stage 1, (B,) float32.

    Args:
      score: (B, S).
      attention: (B, S) float32 that text pays; nothing of the loss reaches it.
      visual: (B, S) bool.
    """
    attention = jax.lax.stop_gradient(jnp.where(visual, attention, 0.0))
    target = attention / jnp.maximum(attention.sum(1, keepdims=True), 1e-12)
    log_q = jax.nn.log_softmax(jnp.where(visual, score, jnp.finfo(jnp.float32).min))
    log_p = jnp.log(jnp.maximum(target, 1e-12))
    return jnp.sum(jnp.where(visual, target * (log_p - log_q), 0.0), 1)
