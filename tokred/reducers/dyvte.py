"""DyVTE: from the first layer that says so, a prompt goes on without its visual tokens.

(DyVTE, 2024)  Read in the authors' released code, whose constants (35, 576, a batch of 1) are not repeated.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from tokred.reducers.base import Planner, keep_top, parts, register
from tokred.tokens import Array, Plan, Tokens, straight_through, take


@register("dyvte")
class DyVTE(Planner):
  """(stay, exit) = MLP([mean of the text's states; the last one's]);  exit > stay: all visual tokens leave.

  The authors freeze the model and teach the gate by cross-entropy, whether an exit here leaves the answer as it is:
  that is `exit_loss` on what is reported as "exit".  Here the bit also has the gradient of its probability, so that the
  language model's loss and `price` times the probability to stay can teach it.
  """

  ragged: ClassVar[bool] = True
  idles: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("before",)
  stacks: ClassVar[tuple[str, ...]] = ("llm",)

  hidden: int = 64
  price: float = 0.0

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return 2.0 * width * self.hidden

  @nn.compact
  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    text, visual = parts(tokens)
    x = jnp.where(tokens.alive[..., None], tokens.x, 0).astype(jnp.float32)
    mean = jnp.where(text[..., None], x, 0.0).sum(1) / jnp.maximum(text.sum(1, keepdims=True), 1)
    last = text.shape[1] - 1 - jnp.argmax(text[:, ::-1], axis=1)
    both = jnp.concatenate([mean, take(x, last[:, None])[:, 0]], axis=-1)
    both = nn.RMSNorm(name="norm")(both)
    logits = nn.Dense(2, name="fc2")(nn.gelu(nn.Dense(self.hidden, name="fc1")(both)))  # (B, 2)
    stays = logits[:, 1] <= logits[:, 0]
    others = tokens.alive.sum(1) - visual.sum(1)
    count = jnp.where(stays, jnp.asarray(keep, jnp.int32), others).astype(jnp.int32)
    plan = keep_top(tokens, jnp.zeros(text.shape), count)
    chance = jax.nn.softmax(logits)[:, 0]
    report = {"score": jnp.broadcast_to((logits[:, 0] - logits[:, 1])[:, None], text.shape), "exit": logits}
    report |= {"loss_price": self.price * chance, "count": others + stays * visual.sum(1)}
    if train:
      kept = plan.owner >= 0
      gate = jnp.where(visual, straight_through(kept, jnp.broadcast_to(chance[:, None], kept.shape)), 1.0)
      plan = plan.replace(gate=gate)
    return plan, report


def exit_loss(logits: Array, same: Array) -> Array:
  """Cross-entropy of the gate against whether an exit leaves the answer's tokens as they are, (B,) float32.

  Args:
    logits: (B, 2), stay and exit.
    same: (B,) bool, found by running the model with and without the exit.
  """
  return optax.softmax_cross_entropy_with_integer_labels(logits, same.astype(jnp.int32))
