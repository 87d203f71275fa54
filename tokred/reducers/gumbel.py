"""DynamicViT: a small network decides which tokens to drop, trained through straight-through Gumbel decisions.

(Rao et al., 2021, arXiv:2106.02034)  Their masked softmax has an epsilon: `config.model.gate_eps`.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.reducers.base import Planner, decided, keep_top, register, soft_top
from tokred.tokens import Array, Plan, Tokens, at_first, straight_through


class Predictor(nn.Module):
  """Log-probabilities of keeping and dropping each token, (B, N, 2) float32; channel 0 keeps.

  h = GELU(W0 LN(z)); local half of h, and the mean of the other half over the tokens still alive; three-layer MLP.
  """

  @nn.compact
  def __call__(self, x: Array, weight: Array) -> Array:
    """x: (B, N, D); weight: (B, N) 1 for tokens that the mean counts, 0 for others."""
    width = x.shape[-1]
    dense = lambda features, name: nn.Dense(features, name=name)
    gelu = lambda value: nn.gelu(value, approximate=False)
    x = x.astype(jnp.float32)
    h = nn.LayerNorm(epsilon=1e-5, name="norm")(x)  # this one is 1e-5, the backbone's 1e-6
    h = gelu(dense(width, "in_proj")(h))
    local, rest = jnp.split(h, 2, axis=-1)
    pooled = jnp.einsum("bn,bnd->bd", weight, rest) / jnp.maximum(weight.sum(1), 1e-6)[:, None]
    h = jnp.concatenate([local, jnp.broadcast_to(pooled[:, None], rest.shape)], axis=-1)
    h = gelu(dense(width // 2, "out1")(h))
    h = gelu(dense(width // 4, "out2")(h))
    return jax.nn.log_softmax(dense(2, "out3")(h))


@register("gumbel")
class Gumbel(Planner):
  """Training: u <- u ST(onehot(argmax(y + g)), softmax((y + g) / tau)).  Inference: the top tokens by y_keep.

  The keep-ratio loss holds the sampled share at the site's keep rate, so that the fixed count fits.  With a learned
  rate noise decides only who stays: the top tokens by m = (y + g)_keep - (y + g)_drop, as many as the rate says, with
  the gradient of sigmoid((m - t) / tau), whose sum is the count.
  """

  places: ClassVar[tuple[str, ...]] = ("before", "output")
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")
  from_input: ClassVar[bool] = True
  decides: ClassVar[bool] = True

  temperature: float = 1.0

  def count(self, keep: float, n: int, protected: int, source: int) -> int:
    return min(n, int(source * keep) + protected)  # of the input's patches: rho, rho^2, rho^3

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * width * (width + width / 2 + width / 8) + n * width / 2

  def noise(self, shape: tuple[int, ...]) -> Array:
    """Gumbel(0, 1) samples, float32."""
    return jax.random.gumbel(self.make_rng("reduce"), shape, jnp.float32)

  @nn.compact
  def logits(self, tokens: Tokens) -> tuple[Array, Array]:
    """Those of the predictor, (B, N, 2), and what it weighs the tokens with, (B, N)."""
    weight = jnp.where(tokens.protected, 0.0, tokens.mask.astype(jnp.float32))  # with earlier decisions' gradient
    return Predictor(name="predictor")(tokens.visible, weight), weight

  def counted(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    if not train:
      return self.plan(tokens, keep, train=False)
    logits, _ = self.logits(tokens)
    noisy = logits + self.noise(logits.shape)
    plan = soft_top(tokens, noisy[..., 0] - noisy[..., 1], keep, self.temperature, train=True)
    return plan, {"score": logits[..., 0]}

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    logits, weight = self.logits(tokens)
    if not train:
      return keep_top(tokens, logits[..., 0], keep), {"score": logits[..., 0]}
    noisy = (logits + self.noise(logits.shape)) / self.temperature
    keeps = tokens.protected | (noisy[..., 0] >= noisy[..., 1])
    gate = jnp.where(tokens.protected, 1.0, straight_through(keeps, jax.nn.softmax(noisy)[..., 0]))
    kept = keeps & tokens.alive
    index = jnp.arange(kept.shape[1], dtype=jnp.int32)
    order = decided(tokens, kept)
    share = (weight * gate).sum(1) / jnp.maximum(at_first(tokens), 1)
    plan = Plan(owner=jnp.where(kept, index, -1), order=order, gate=gate)
    return plan, {"score": logits[..., 0], "kept_share": share}
