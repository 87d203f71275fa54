"""An autoencoder of features learns which tokens the others cannot make up for; those are kept.

("When Less is Enough", 2025, arXiv:2503.16660)  The authors' code was not at hand: what the paper's text leaves open is
a choice of ours, and is called one below.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.reducers.base import Planner, keep_top, num_kept, register
from tokred.tokens import Array, Plan, Tokens, of_prompt, straight_through


class Layers(nn.Module):
  """x + MHA(LN x), x + MLP(LN x), some times, among the tokens that are alive; (B, N, D) float32."""

  layers: int
  num_heads: int

  @nn.compact
  def __call__(self, x: Array, alive: Array) -> Array:
    """alive: (B, N) bool."""
    width, mask = x.shape[-1], alive[:, None, None]
    for i in range(self.layers):
      attend = nn.MultiHeadDotProductAttention(self.num_heads or max(width // 64, 1), name=f"attn_{i}")
      x = x + attend(nn.LayerNorm(epsilon=1e-6, name=f"norm1_{i}")(x), mask=mask)
      h = nn.Dense(4 * width, name=f"fc1_{i}")(nn.LayerNorm(epsilon=1e-6, name=f"norm2_{i}")(x))
      h = nn.gelu(h, approximate=False)
      x = x + nn.Dense(width, name=f"fc2_{i}")(h)
    return x


def place_code(position: Array, width: int) -> Array:
  """Sines and cosines of position ids: (B, N[, axis]) to (B, N, width) float32."""
  position = position.reshape(*position.shape[:2], -1)
  half = width // (2 * position.shape[-1])
  angle = position[..., None] * 10_000.0 ** (-jnp.arange(half) / max(half, 1))
  code = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*position.shape[:2], -1)
  return jnp.pad(code, ((0, 0), (0, 0), (0, width - code.shape[-1])))


class Reconstructor(nn.Module):
  """Features from those that were kept: z' = y z + (1 - y) (e + code(position)), then layers.

  e (D,) stands for what is absent.  Where it is missing the paper's layers could not tell which token they are to make
  up; that it carries its place is our choice.
  """

  layers: int
  num_heads: int

  @nn.compact
  def __call__(self, z: Array, y: Array, position: Array, alive: Array) -> Array:
    absent = self.param("absent", nn.initializers.normal(0.02), z.shape[-1:], jnp.float32)
    z = y[..., None] * z + (1 - y[..., None]) * (absent + place_code(position, z.shape[-1]))
    return Layers(self.layers, self.num_heads, name="layers")(z, alive)


@register("autoencoder")
class Autoencoder(Planner):
  """Ranks tokens by the margin of "keep" over "drop", two logits that a small transformer reads off frozen features.

    y = ST(onehot(argmax(l + g)), softmax((l + g) / tau))[keep],  g ~ Gumbel(0, 1)
    loss = mean ||R(y z + (1 - y) e) - z||^2 + weight max(mean y, share)

  z are the tokens, normalised (our choice: the error is then a part of the variance, and `weight` means the same in
  any backbone); nothing of the loss reaches them.  Means are over the free tokens of an image, so the hinge holds for
  each image (the paper may mean the batch).  Only the loss samples: what goes on is always the top `keep`, so that the
  loss alone trains the selector, in either mode.  R and e, under `reconstructor`, are for training only.  Where a
  threshold decides, `keep` is a capacity: say `share` if that is all.
  """

  samples: ClassVar[bool] = False

  places: ClassVar[tuple[str, ...]] = ("output", "before", "after")
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")
  training_params: ClassVar[tuple[str, ...]] = ("reconstructor",)

  num_layers: int = 2  # of the selector, and of the reconstructor
  num_heads: int = 0  # 0: heads of 64 channels
  temperature: float = 1.0
  weight: float = 0.5
  share: float = 0.0  # of the free tokens; keeping fewer is not rewarded; 0: that which `keep` leaves

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return self.num_layers * (12 * n * width * width + 2 * n * n * width) + 2 * n * width

  @nn.compact
  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    alive = of_prompt(tokens)
    z = jax.lax.stop_gradient(jnp.where(alive[..., None], tokens.x, 0).astype(jnp.float32))
    z = nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False)(z)
    h = Layers(self.num_layers, self.num_heads, name="selector")(z, alive)
    logits = nn.Dense(2, name="logits")(nn.LayerNorm(epsilon=1e-6, name="norm")(h))
    margin = logits[..., 0] - logits[..., 1]
    report = {"score": margin}
    if train or self.is_initializing():
      noisy = (logits + jax.random.gumbel(self.make_rng("reduce"), logits.shape)) / self.temperature
      y = straight_through(noisy[..., 0] >= noisy[..., 1], jax.nn.softmax(noisy)[..., 0])
      y = jnp.where(tokens.protected, 1.0, y)  # these stay in any case
      again = Reconstructor(self.num_layers, self.num_heads, name="reconstructor")(z, y, tokens.position, alive)
      free = alive & ~tokens.protected
      left = num_kept(tokens, keep)[:, 0] - (alive & tokens.protected).sum(1)
      report |= self.loss(z, again, y, free, self.share or left / jnp.maximum(free.sum(1), 1))
    return keep_top(tokens, margin, keep), report

  def loss(self, z: Array, again: Array, y: Array, free: Array, share: Array | float) -> dict[str, Array]:
    """Terms of each image, (B,): their weighted sum "loss", "error" and "kept" on their own."""
    mean = lambda value: jnp.where(free, value, 0.0).sum(1) / jnp.maximum(free.sum(1), 1)
    error, kept = mean(jnp.square(again - z).mean(-1)), mean(y)
    return {"loss": error + self.weight * jnp.maximum(kept, share), "error": error, "kept": kept}
