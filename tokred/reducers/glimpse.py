"""GlimpsePrune: a learned glance at the picture tells which of its tokens an answer needs.

(GlimpsePrune, 2025)  Read in the authors' released code.  There the glance is a token appended to the prompt; here its
query is made of a learned embedding and the state of the prompt's last token, in the layer where tokens leave.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from tokred.reducers.autoencoder import Layers, place_code
from tokred.reducers.base import Planner, keep_top, parts, register
from tokred.tokens import Array, Plan, Tokens, straight_through, take

TARGET = "state/target"  # (B, N) float32: 1 in the region that the answer is about, 0 elsewhere, below 0 unknown


def mask_loss(logits: Array, target: Array, among: Array) -> tuple[Array, Array]:
  """Dice loss and mean binary cross-entropy of each row, (B,) float32 both; 0 where no target is known.

  Args:
    logits: (B, N).
    target: (B, N) float32 in [0, 1], below 0 where it is not known.
    among: (B, N) bool, the tokens that count.
  """
  among = among & (target >= 0)
  chance, wanted = (jnp.where(among, a, 0.0) for a in (jax.nn.sigmoid(logits), target))
  known = among.any(1)
  dice = 1.0 - (2.0 * (chance * wanted).sum(1) + 1.0) / (chance.sum(1) + wanted.sum(1) + 1.0)
  each = optax.sigmoid_binary_cross_entropy(logits, jnp.maximum(target, 0.0))
  bce = jnp.where(among, each, 0.0).sum(1) / jnp.maximum(among.sum(1), 1)
  return jnp.where(known, dice, 0.0), bce


@register("glimpse")
class Glimpse(Planner):
  """a_i = logits of a glance at token i;  h = W a + U x, then layers among visual tokens;  keep sigmoid(w h) > 1/2.

  At least one stays, and no more than `keep`.  Where a region is given (`target` of the decoder), the losses are
  dice + 0.1 x cross-entropy of the logit behind every layer; the gate is straight-through.
  """

  ragged: ClassVar[bool] = True
  idles: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("before",)
  stacks: ClassVar[tuple[str, ...]] = ("llm",)

  num_heads: int = 8
  hidden: int = 256
  num_layers: int = 1
  weight: float = 1.0  # of the dice loss
  cross_entropy: float = 0.1

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return (
      n * self.hidden * (2 * width + 12 * self.num_layers * self.hidden) + 2 * n * n * self.hidden * self.num_layers
    )

  @nn.compact
  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    text, visual = parts(tokens)
    width, dim = tokens.x.shape[-1], max(self.hidden // self.num_heads, 1)
    x = jnp.where(tokens.alive[..., None], tokens.x, 0).astype(jnp.float32)
    z = nn.RMSNorm(name="norm")(x)
    last = text.shape[1] - 1 - jnp.argmax(text[:, ::-1], axis=1)
    glance = self.param("glance", nn.initializers.normal(1.0), (width,), jnp.float32) + take(z, last[:, None])[:, 0]
    q = nn.DenseGeneral((self.num_heads, dim), name="q")(glance)
    k = nn.DenseGeneral((self.num_heads, dim), name="k")(z)
    seen = jnp.einsum("bhd,bnhd->bnh", q, k) * dim**-0.5
    h = nn.Dense(self.hidden, name="seen")(seen) + nn.Dense(self.hidden, name="state")(z)
    place = tokens.position.reshape(*tokens.mask.shape, -1)
    h = h + place_code(place, self.hidden)
    logits = []
    for i in range(self.num_layers):
      h = Layers(1, self.num_heads, name=f"layer_{i}")(h, visual)
      logits.append(nn.Dense(1, name=f"head_{i}")(h)[..., 0])
    score, report = logits[-1], {}
    if TARGET in tokens.feats:
      losses = [mask_loss(each, tokens.feats[TARGET], visual) for each in logits]
      report["loss_region"] = sum(self.weight * d + self.cross_entropy * b for d, b in losses) / len(losses)
    count = jnp.maximum((visual & (score > 0)).sum(1), 1) + tokens.alive.sum(1) - visual.sum(1)
    plan = keep_top(tokens, score, jnp.minimum(count, jnp.asarray(keep)).astype(jnp.int32))
    kept = plan.owner >= 0
    gate = jnp.where(visual, straight_through(kept, jax.nn.sigmoid(score)), 1.0)
    report |= {"score": score, "count": jnp.where(tokens.alive, gate, 0.0).sum(1)}
    return plan.replace(gate=gate) if train else plan, report
