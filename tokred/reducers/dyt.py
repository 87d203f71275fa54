"""DyT: a dispatcher sends tokens round the MLP, and an adapter beside it serves all of them.

(Zhao et al., 2024, Dynamic Tuning, arXiv:2403.11808)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.reducers.base import Planner, decided, keep_top, register
from tokred.tokens import Array, Plan, Tokens, straight_through


def dispatch(logits: Array, noise: Array, temperature: float) -> tuple[Array, Array]:
  """Gumbel-sigmoid: the decision sigmoid((l + noise) / tau) > 1/2, bool, and the probability behind it."""
  soft = jax.nn.sigmoid((logits + noise) / temperature)
  return soft > 0.5, soft


class Adapter(nn.Module):
  """scale W_up ReLU(W_down x): nothing at the start."""

  hidden: int
  scale: float
  dropout: float

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    h = nn.relu(nn.Dense(self.hidden, dtype=x.dtype, name="down")(x))
    h = nn.Dropout(self.dropout, rng_collection="reduce", deterministic=not train)(h)
    return self.scale * nn.Dense(x.shape[-1], dtype=x.dtype, kernel_init=nn.initializers.zeros, name="up")(h)


@register("dyt")
class DyT(Planner):
  """l = w x + b;  y = ST(soft > 1/2, soft), soft = sigmoid((l + g1 - g2) / tau);  x <- x + y MLP(LN x) + Adapter(x)

  Training decides by y, and `global_ratio` of `config.loss` holds the mean share of all layers at their mean keep rate,
  so that layers may specialise: early ones send nearly all tokens through the MLP, late ones next to none.  The paper
  infers by l > 0, whose number differs between images; so does rate="threshold", threshold=0.0.  With a fixed rate the
  `keep` highest l go: a count that is the same in all layers undoes what they have learned, so let
  `tokred.calibrate.by_threshold` find those of a trained model (`python -m tokred.sweep` does).  Protected tokens go
  through the MLP.
  """

  places: ClassVar[tuple[str, ...]] = ("mlp",)
  decides: ClassVar[bool] = True

  temperature: float = 5.0
  hidden: int = 64
  scale: float = 0.1
  dropout: float = 0.1

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * width * (2 * self.hidden + 1)

  def noise(self, shape: tuple[int, ...]) -> Array:
    """Difference of two Gumbel(0, 1) samples, float32."""
    return jax.random.logistic(self.make_rng("reduce"), shape, jnp.float32)

  @nn.compact
  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    x = jnp.where(tokens.alive[..., None], tokens.x, 0)
    logits = nn.Dense(1, name="dispatcher")(x.astype(jnp.float32))[..., 0]
    residual = Adapter(self.hidden, self.scale, self.dropout, name="adapter")(x, train)
    best, free = keep_top(tokens, logits, keep), tokens.alive & ~tokens.protected
    # For alarms: what noise decides says nothing of the dispatcher.  Under "chosen" config.loss.router would teach it.
    report = {"score": logits, "residual": residual, "first": best.owner >= 0, "free": free}
    if not train:
      return best, report
    hard, soft = dispatch(logits, self.noise(logits.shape), self.temperature)
    goes = (hard | tokens.protected) & tokens.alive
    gate = jnp.where(free, straight_through(goes, soft), 1.0)  # 1 for the dead, whose earlier gates learn on
    index = jnp.arange(goes.shape[1], dtype=jnp.int32)
    # Who goes round owns itself, with a gate that is 0: the update it does without teaches the dispatcher.
    owner = jnp.where(tokens.alive, index, -1)
    order = decided(tokens, goes)
    share = jnp.where(free, gate, 0.0).sum(1) / jnp.maximum(free.sum(1), 1)
    return Plan(owner=owner, order=order, gate=gate), report | {"kept_share": share}
