"""Attention-Gate: before a layer's attention each head learns which keys and values it will not need again.

(Attention-Gate, 2024)  The exact form of its loss could not be checked.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.reducers.base import Reducer, register
from tokred.tokens import Array, Tokens, of_prompt, straight_through


@register("attention_gate")
class AttentionGate(Reducer):
  """f = ST(sigmoid(g) > 1/2), g (B, heads, N) of a narrow causal attention over the prompt.

  f = 0 hides a token's key and value from every later query of that head, and from the cache; a token always sees
  itself.  What decoding appends stays.  Loss: `weight` |mean f - share|, over the tokens of the prompt.
  """

  places: ClassVar[tuple[str, ...]] = ("ahead",)
  stacks: ClassVar[tuple[str, ...]] = ("llm",)
  idles: ClassVar[bool] = False
  scored: ClassVar[bool] = False

  heads: int = 0  # of keys and values of the language model
  hidden: int = 32
  num_heads: int = 2
  text: bool = True  # whether text may be hidden, too
  share: float = 0.5
  weight: float = 1.0

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * self.hidden * (width + 4 * self.hidden + self.heads) + 2 * n * n * self.hidden

  @nn.compact
  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    prompt = of_prompt(tokens)
    prompt = prompt if self.text else prompt & ~tokens.protected
    x = jnp.where(tokens.alive[..., None], tokens.x, 0).astype(jnp.float32)
    h = nn.Dense(self.hidden, name="down")(nn.RMSNorm(name="norm")(x))
    order = jnp.arange(x.shape[1])
    past = (order[:, None] >= order[None])[None, None] & tokens.alive[:, None, None]
    past = past | jnp.eye(len(order), dtype=bool)
    h = h + nn.MultiHeadDotProductAttention(self.num_heads, name="attn")(h, mask=past)
    start = nn.initializers.constant(2.0)  # everything is held at first
    logits = nn.Dense(self.heads, bias_init=start, name="flags")(nn.gelu(h)).swapaxes(1, 2)  # (B, heads, N)
    holds = straight_through(logits > 0, jax.nn.sigmoid(logits))
    holds = jnp.where(prompt[:, None], holds, 1.0)
    mean = jnp.where(prompt[:, None], holds, 0.0).sum((1, 2)) / jnp.maximum(prompt.sum(1) * self.heads, 1)
    report = {"holds": holds, "share": mean, "loss_share": self.weight * jnp.abs(mean - self.share)}
    return tokens, report | {"count": tokens.alive.sum(1).astype(jnp.float32)}
