"""HoT's recovery: one learned query for each source token brings the full length back.

(Li et al., 2024, arXiv:2311.12028)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.reducers.base import Reducer, register
from tokred.tokens import Array, Tokens, restore


def own_places(tokens: Tokens) -> Array:
  """Source tokens that are a protected token still, (B, S) bool: of what it represents, the first."""
  index = jnp.arange(tokens.owner.shape[1])
  twin = (tokens.owner[:, :, None] == tokens.owner[:, None]) & (index < index[:, None])
  return restore(tokens.alive & tokens.protected, tokens.owner) & ~twin.any(-1)


class CrossAttention(nn.Module):
  """Queries (S, D) attend to (B, N, D); (B, S, D) float32.  `gate` (B, N) weighs the keys, and learns."""

  num_heads: int

  @nn.compact
  def __call__(self, queries: Array, x: Array, gate: Array) -> Array:
    heads = self.num_heads or max(x.shape[-1] // 64, 1)
    dense = lambda name: nn.DenseGeneral((heads, x.shape[-1] // heads), name=name)
    q, k, v = dense("query")(queries), dense("key")(x), dense("value")(x)
    logits = jnp.einsum("shd,bnhd->bhsn", q, k, precision="highest") * q.shape[-1] ** -0.5
    alive = (gate > 0)[:, None, None]
    logits = logits - jax.lax.stop_gradient(jnp.where(alive, logits, -jnp.inf).max(-1, keepdims=True))
    weight = jnp.exp(jnp.where(alive, logits, jnp.minimum(logits, 0.0))) * gate[:, None, None]
    weight = weight / weight.sum(-1, keepdims=True)
    out = jnp.einsum("bhsn,bnhd->bshd", weight, v, precision="highest")
    return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(out)


@register("recover")
class Recover(Reducer):
  """out = e + CrossAttn(e, x, x), e (S, D) learned: as many tokens come out as the model's input had, all alive.

  Protected tokens come out as they are: HoT has none, and a classifier reads CLS.  (So where the head reads CLS alone,
  a recovery at the output learns from `config.loss.distill_tokens` only.)  Behind it nothing has been reduced: sizes
  are 1, positions and owners 0 to S - 1.  HoT prunes by `dpcknn`, whose `slots` are its second position embedding.
  """

  conserves: ClassVar[bool] = False  # made anew
  recovers: ClassVar[bool] = True
  idles: ClassVar[bool] = False
  scored: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("output", "before", "after")

  num_heads: int = 0  # 0: heads of 64 channels
  source: int = 0  # tokens at the input, which the site fills in

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    s = self.source or 2 * n
    return (2 * n + s) * width * width + 2 * s * n * width  # queries come from parameters alone

  @nn.compact
  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    if tokens.position.ndim > 2:
      raise ValueError(f"recover needs positions (batch, token), not {tokens.position.shape}: it writes them anew")
    x = tokens.visible.astype(jnp.float32)
    batch, source = tokens.owner.shape
    e = self.param("queries", nn.initializers.normal(0.02), (source, x.shape[-1]), jnp.float32)
    update = CrossAttention(self.num_heads, name="attn")(e, x, tokens.mask.astype(jnp.float32))
    out = (e + update).astype(tokens.x.dtype)
    own = own_places(tokens)
    out = jnp.where(own[..., None], restore(tokens.x, tokens.owner), out)
    index = jnp.broadcast_to(jnp.arange(source, dtype=jnp.int32), (batch, source))
    feats = {name: restore(v, tokens.owner) for name, v in tokens.feats.items() if name.startswith("state/")}
    ones = jnp.ones((batch, source))
    return Tokens(out, ones.astype(bool), ones, index, index, own, feats), {}
