"""A layer of a language model, with places for reducers before, in and behind it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred import tokens as tk
from tokred.layout import Sites
from tokred.nn import attention, budget
from tokred.nn.block import ACTIVATIONS
from tokred.nn.cache import Cache
from tokred.nn.rope import Rope, rotate
from tokred.sites import Reduce
from tokred.tokens import Array, Tokens

INDEX = "state/index"  # a token's place in its row's sequence


@dataclasses.dataclass(frozen=True)
class Shape:
  """The sizes of a language model, all static."""

  vocab: int
  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  norm_eps: float = 1e-6
  rope: Rope = dataclasses.field(default_factory=Rope)
  qkv_bias: bool = False  # Qwen2
  proj_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False  # Qwen3
  tied: bool = False  # the head is the table of embeddings
  activation: str = "silu"
  max_length: int = 4096  # positions that the model was trained for


class GroupedProjection(nn.Module):
  """Queries, keys and values of grouped heads: (B, N, D) to (B, H, N, d) and twice (B, heads, N, d).

  The kernel is (D, G + 2, heads, d): the G = H / heads queries that share a key and a value, then those; a mesh that
  splits heads keeps them together.  (Ainslie et al., 2023, GQA, arXiv:2305.13245)
  """

  shape: Shape
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array, Array]:
    s = self.shape
    group = s.num_heads // s.num_kv_heads
    size = (group + 2, s.num_kv_heads, s.head_dim)

    def kernel(key: Array, *_: Any) -> Array:
      flat = (s.width, (group + 2) * s.num_kv_heads * s.head_dim)
      return nn.initializers.lecun_normal()(key, flat, self.param_dtype).reshape(s.width, *size)

    out = jnp.einsum("bnw,wche->bhcne", x.astype(self.dtype), self.param("kernel", kernel).astype(self.dtype))
    if s.qkv_bias:
      bias = self.param("bias", nn.initializers.zeros, size, self.param_dtype).astype(self.dtype)
      out = out + bias.swapaxes(0, 1)[None, :, :, None]
    q = out[:, :, :group].reshape(x.shape[0], s.num_heads, x.shape[1], s.head_dim)
    return q, out[:, :, group], out[:, :, group + 1]


class Attention(nn.Module):
  """Causal self-attention in its steps; queries and keys are turned to their tokens' positions."""

  shape: Shape
  dtype: Any
  param_dtype: Any

  def setup(self) -> None:
    kinds, s = dict(dtype=self.dtype, param_dtype=self.param_dtype), self.shape
    self.qkv = GroupedProjection(s, **kinds)
    self.proj = nn.DenseGeneral(s.width, axis=(-2, -1), use_bias=s.proj_bias, **kinds)
    if s.qk_norm:
      self.q_norm, self.k_norm = (nn.RMSNorm(epsilon=s.norm_eps, **kinds) for _ in range(2))

  def __call__(self, x: Array, position: Array) -> tuple[Array, Array, Array]:
    """(B, N, D) and (B, N[, axis]) to queries (B, H, N, d), keys and values (B, heads, N, d)."""
    q, k, v = self.qkv(x)
    if self.shape.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    angle = self.shape.rope.angles(position, self.shape.head_dim)
    return rotate(q, angle), rotate(k, angle), v

  def out(self, heads: Array) -> Array:
    """(B, H, N, d) to (B, N, D)."""
    return self.proj(heads.swapaxes(1, 2))


class GatedMlp(nn.Module):
  """fc2(act(gate x) * fc1 x).  (Shazeer, 2020, arXiv:2002.05202)"""

  shape: Shape
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    s = self.shape
    dense = functools.partial(nn.Dense, use_bias=s.mlp_bias, dtype=self.dtype, param_dtype=self.param_dtype)
    h = ACTIVATIONS[s.activation](dense(s.mlp_dim, name="gate")(x)) * dense(s.mlp_dim, name="fc1")(x)
    return dense(s.width, name="fc2")(h)


class Block(nn.Module):
  """x + attention(norm x), x + mlp(norm x), with places for reducers before, in and behind it."""

  shape: Shape
  sites: Sites
  layer: int
  dtype: Any
  param_dtype: Any
  attention: str

  def setup(self) -> None:
    kinds, s = dict(dtype=self.dtype, param_dtype=self.param_dtype), self.shape
    self.norm1, self.norm2 = (nn.RMSNorm(epsilon=s.norm_eps, **kinds) for _ in range(2))
    self.attn, self.mlp = Attention(s, **kinds), GatedMlp(s, **kinds)
    self.reduce = Reduce(self.sites.at(self.layer, *budget.PLACES))

  def __call__(
    self, tokens: Tokens, last: Array, keeps: Mapping[str, Any], train: bool, mode: str
  ) -> tuple[Tokens, dict[str, Any], tuple[Array, Array, Tokens]]:
    """Returns the tokens, what reducers report, and keys and values with the tokens that they are of."""
    aux: dict[str, Any] = {}
    reduce = functools.partial(self._reduce, aux=aux, last=last, keeps=keeps, train=train, mode=mode)
    tokens = reduce(tokens, "before")
    q, k, v = self.attn(self.norm1(tokens.x), tokens.position)
    soft = jnp.issubdtype(tokens.mask.dtype, jnp.floating)  # a gate learns from what the dead would have given
    there, order = (tokens.mask, tokens.feats[INDEX]) if soft else (None, True)
    update = self.attn.out(attention.attend(q, k, v, mask=there, causal=order, impl=self.attention))
    feats = {name: value for name, value in tokens.feats.items() if name.startswith("state/")}
    row = {"last": place_of(tokens, last)}
    feats |= {n: attention.FEATURES[n](q, k, v, **row) for n in budget.needs(self.sites, self.layer)}
    arrived = tokens
    feats |= {"update": update} if "update" in self.sites.needs(self.layer) else {}
    tokens = reduce(tokens.replace(x=tokens.x + update, feats=feats), "attn")
    tokens = reduce(tokens.replace(x=tokens.x + self.mlp(self.norm2(tokens.x))), "after")
    return tokens, aux, (k, v, arrived)

  def decode(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
    """One more token, (B, 1, D)."""
    position = (cache.position[self.layer] + cache.step)[:, None]
    q, k, v = self.attn(self.norm1(x), position)
    cache = cache.append(self.layer, k, v)
    x = x + self.attn.out(cache.attend(self.layer, q))
    return x + self.mlp(self.norm2(x)), cache

  def _reduce(
    self, tokens: Tokens, place: str, *, aux: dict[str, Any], last: Array, keeps: Mapping, train: bool, mode: str
  ) -> Tokens:
    spots = self.sites.at(self.layer, place)
    if not spots or not keeps:
      return tokens
    if place == "before" and (wanted := budget.ahead(self.sites, self.layer)):
      heads, row = self.attn(self.norm1(tokens.x), tokens.position), {"last": place_of(tokens, last)}
      tokens = tokens.replace(feats=tokens.feats | {n: attention.FEATURES[n](*heads, **row) for n in wanted})
    tokens, report = self.reduce(tokens, place, keeps, train=train, mode=mode)
    aux.update(report)
    return in_order(tokens, any(spot.position == "reindex" for spot in spots))


def in_order(tokens: Tokens, anew: bool) -> Tokens:
  """Survivors in the order of the sequence, the dead behind them; counted anew from 0 if asked for."""
  n = tokens.x.shape[1]
  place = tk.rank(jnp.where(tokens.alive, tokens.feats[INDEX], jnp.iinfo(jnp.int32).max))
  leaves = (tokens.x, tokens.mask, tokens.size, tokens.position, tokens.protected, tokens.feats)
  x, mask, size, position, protected, feats = jax.tree.map(lambda leaf: tk.take(leaf, tk.inverse(place)), leaves)
  if anew:
    index = jnp.arange(n, dtype=jnp.int32).reshape(1, n, *(1,) * (position.ndim - 2))
    position = jnp.broadcast_to(index, position.shape)
  return Tokens(x, mask, size, position, tk.follow(tokens.owner, place), protected, feats)


def place_of(tokens: Tokens, last: Array) -> Array:
  """Where a token of the input is now: (B,) int32 to the same."""
  return jnp.maximum(tk.take(tokens.owner, last[:, None])[:, 0], 0)
