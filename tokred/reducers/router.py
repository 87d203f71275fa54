"""Mixture-of-Depths: tokens that a block does not need go round it.  (Raposo et al., 2024, arXiv:2404.02258)"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from tokred.config import nearest
from tokred.reducers.base import Planner, keep_top, register
from tokred.tokens import Array, Plan, Tokens

GATES = {
  "double_sigmoid": lambda r: 2 * jax.nn.sigmoid(r),  # 1 at the start: a pretrained block is unchanged
  "sigmoid": jax.nn.sigmoid,
  "raw": lambda r: r,  # the paper's; a routed block does nothing until the router has grown
}


@register("router")
class Router(Planner):
  """Expert choice: r_i = w x_i, T = top-C of r;  x_i <- x_i + g(r_i) f(X_T)_i for i in T, unchanged elsewhere.

  f is the block's whole update, computed among the chosen only; the gate puts w on the gradient's path.  `keep` is
  the capacity C.  An encoder sees its whole sequence, so top-C decides at inference too.  Where the choice must not
  look at other tokens, a small network learns it from each token alone, by cross-entropy, without a gradient to the
  block: its logits then rank the tokens, and with rate="threshold", threshold=0.0 each decides for itself.
  """

  needs: ClassVar[tuple[str, ...]] = ()
  places: ClassVar[tuple[str, ...]] = ("around",)

  gate: str = "double_sigmoid"  # double_sigmoid, sigmoid, raw
  predictor: float = 0.0  # weight of its loss; above 0, it decides at inference

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.gate not in GATES:
      raise ValueError(f"gate={self.gate!r} is not a gate; {nearest(self.gate, GATES)}")
    return ()

  def macs(self, n: float, width: int, num_heads: int) -> float:
    return n * width

  @nn.compact
  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    start = nn.initializers.normal(0.02) if self.gate == "raw" else nn.initializers.zeros
    w = self.param("kernel", start, (tokens.x.shape[-1],), jnp.float32)
    x = jnp.where(tokens.alive[..., None], tokens.x, 0).astype(jnp.float32)
    logits = jnp.einsum("bnd,d->bn", x, w, precision="highest")
    free, report = tokens.alive & ~tokens.protected, {}
    score = logits
    if self.predictor:
      h = nn.gelu(nn.Dense(max(x.shape[-1] // 4, 1), name="predictor_in")(jax.lax.stop_gradient(x)))
      predicted = nn.Dense(1, name="predictor_out")(h)[..., 0]
      score = logits if train else predicted
    plan = keep_top(tokens, score, keep)
    chosen = plan.owner >= 0
    if self.predictor:
      each = optax.sigmoid_binary_cross_entropy(predicted, chosen.astype(jnp.float32))
      report["loss_predictor"] = self.predictor * jnp.where(free, each, 0.0).sum(1) / jnp.maximum(free.sum(1), 1)
    # The auxiliary loss of the paper: the logit learns to tell whether top-C will take the token.
    report |= {"score": score, "chosen": chosen, "free": free}
    return plan, report | {"update_weight": GATES[self.gate](logits)}
