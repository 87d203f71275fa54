"""gamma-MoD: one router, shared by layers and modalities, sends the tokens of a language model through or round.

(Luo et al., 2024, arXiv:2410.13859)  Which layers to convert: `tokred.calibrate.arank`.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from tokred.reducers.base import Planner, keep_top, register, route
from tokred.tokens import APPENDED, Array, Plan, Tokens


@register("gamma_mod")
class GammaMoD(Planner):
  """p = softmax(W norm(x))[through];  x <- x + attention(x_T), then x <- x + p MLP(x), for the tokens T that go in.

  Training, masked routing: what follows the prompt gets p + 1, so that T = top-k always has it, where
  k = ceil(n (1 - P (1 - keep) / n)) of n tokens with a prompt of P.  `weight` times the cross-entropy of the router's
  two classes and T is a loss.  Inference: the best `keep` of the prompt, and what is written goes in where p reaches
  `decode_threshold`.  The authors' release instead takes a prompt's tokens with p > 0.005 (rate="threshold",
  threshold=0.005, keep=1.0) and counts positions anew within the layer (position="reindex").  The router learns of
  the task through the MLP only.
  """

  needs: ClassVar[tuple[str, ...]] = ("route_ahead",)
  places: ClassVar[tuple[str, ...]] = ("around",)
  stacks: ClassVar[tuple[str, ...]] = ("llm",)
  answers: ClassVar[bool] = True
  samples: ClassVar[bool] = False
  decodes: ClassVar[bool] = True

  weight: float = 0.01
  text: bool = True  # text may go round, too
  decode_threshold: float = 0.5

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return 2 * n * width

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    logits = tokens.feats["route_ahead"].astype(jnp.float32)
    logits = jnp.where(tokens.alive[..., None], logits, 0.0)
    chance = jax.nn.softmax(logits)[..., 1]
    appended = tokens.feats.get(APPENDED)
    if train and appended is not None:
      more = (appended & tokens.alive).sum(1, dtype=jnp.int32)
      keep = jnp.asarray(keep, jnp.int32) + more
      plan = keep_top(tokens, chance + appended, keep)
    else:
      plan = route(tokens, chance, keep, self.decode_threshold)
    chosen, free = plan.owner >= 0, tokens.alive & ~tokens.protected
    each = optax.softmax_cross_entropy_with_integer_labels(logits, chosen.astype(jnp.int32))
    loss = self.weight * jnp.where(free, each, 0.0).sum(1) / jnp.maximum(free.sum(1), 1)
    return plan, {"score": chance, "loss_router": loss, "mlp_weight": chance}
