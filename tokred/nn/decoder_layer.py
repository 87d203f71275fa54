"""A layer of a language model, with places for reducers before, in and behind it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from ml_collections import ConfigDict

from tokred import tokens as tk
from tokred.layout import Sites, Spot
from tokred.nn import attention, budget
from tokred.nn.block import ACTIVATIONS
from tokred.nn.cache import Cache
from tokred.nn.decoder_scope import INDEX, ROUTE, Scope, SharedRouter, enter, gated, one_more
from tokred.nn.received import FEATURES
from tokred.nn.reduce import Reduce
from tokred.nn.rope import Rope, rotate
from tokred.nn.unmerge import Places
from tokred.tokens import Array, Tokens, of_prompt

SEGMENT = "state/segment"  # which of the texts that share a row


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


def language(config: ConfigDict) -> Shape:
  """Sizes of `config.llm`.

  Raises:
    ValueError: rope_scale does not have the numbers that rope_type asks for.
  """
  c, heads, names = config, max(config.num_heads, 1), ("factor", "low", "high", "original")
  wanted = {"linear": 1, "llama3": 4}.get(c.rope_type, 0)
  if len(c.rope_scale) != wanted:
    raise ValueError(
      f"config.llm.rope_scale={tuple(c.rope_scale)!r} of rope_type={c.rope_type!r}; valid: {names[:wanted] or '()'}"
    )
  if not c.head_dim and c.width % heads:
    raise ValueError(
      f"config.llm.num_heads={c.num_heads} does not divide width={c.width}; valid: a divisor, or head_dim"
    )
  if not c.norm_eps >= 0:
    raise ValueError(f"config.llm.norm_eps={c.norm_eps}; valid: 0 or more")
  rope = Rope(c.rope_theta, c.rope_type, **dict(zip(names, c.rope_scale, strict=False)))
  return Shape(
    vocab=c.vocab, width=c.width, depth=c.depth, mlp_dim=c.mlp_dim or 4 * c.width, num_heads=c.num_heads,
    num_kv_heads=c.num_kv_heads or c.num_heads, head_dim=c.head_dim or c.width // heads, norm_eps=c.norm_eps,
    rope=rope, qkv_bias=c.qkv_bias, proj_bias=c.proj_bias, mlp_bias=c.mlp_bias, qk_norm=c.qk_norm, tied=c.tied,
    activation=c.activation, max_length=c.max_length,
  )  # fmt: skip


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

  def __call__(self, x: Array, position: Array, places: Places | None = None) -> tuple[Array, Array, Array]:
    """(B, N, D) and (B, N[, axis]) to queries (B, H, N, d), keys and values (B, heads, N, d); or at all `places`."""
    q, k, v = self.qkv(x)
    if self.shape.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    if places is not None:
      q, k, v, position = *map(places.expand, (q, k, v)), places.position
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


@struct.dataclass
class Past:
  """What a layer's cache needs of a prompt."""

  k: Array  # (B, heads, K, d)
  v: Array
  inside: Tokens  # that k and v are of
  outside: Tokens  # that arrived, before some of them went round
  holds: Array | None  # (B, heads, K) bool; None: every head holds all


class Block(nn.Module):
  """x + attention(norm x), x + mlp(norm x), with places for reducers before, in and behind it."""

  shape: Shape
  sites: Sites
  layer: int
  dtype: Any
  param_dtype: Any
  impl: str
  gate_cap: float

  def setup(self) -> None:
    kinds, s = dict(dtype=self.dtype, param_dtype=self.param_dtype), self.shape
    self.norm1, self.norm2 = (nn.RMSNorm(epsilon=s.norm_eps, **kinds) for _ in range(2))
    self.attn, self.mlp = Attention(s, **kinds), GatedMlp(s, **kinds)
    self.reduce = Reduce(self.sites.at(self.layer, *budget.PLACES))

  def __call__(
    self, tokens: Tokens, last: Array, keeps: Mapping[str, Any], train: bool, mode: str, shared: SharedRouter | None,
    places: Places | None = None,
  ) -> tuple[Tokens, dict[str, Any], Past]:  # fmt: skip
    """Returns the tokens, what reducers report, and what a cache needs."""
    aux: dict[str, Any] = {}
    reduce = functools.partial(self._reduce, aux=aux, last=last, keeps=keeps, train=train, mode=mode)
    tokens = reduce(tokens, "before")
    outside, scope = tokens, None
    if around := self.sites.at(self.layer, "around"):
      tokens, scope = self._enter(tokens, around[0], keeps, train, mode, shared, aux)
    q, k, v = self.attn(self.norm1(tokens.x), tokens.position, places)
    soft = jnp.issubdtype(tokens.mask.dtype, jnp.floating)  # a gate learns from what the dead would have given
    there, order = (tokens.mask, tokens.feats[INDEX]) if soft else (None, True)
    holds = self._gates(tokens, keeps, train, mode, aux)
    mix = functools.partial(attention.attend, impl=self.impl, gate_cap=self.gate_cap)
    if places is not None:
      there, segment = (places.there, None) if places.segment is None else (None, places.segment)
      heads = mix(q, k, v, mask=there, segment=segment, causal=True)
      heads = places.mean(heads, tokens.x.shape[1])
    elif holds is None:
      segment = tokens.feats.get(SEGMENT)
      if segment is not None and not soft:
        segment = jnp.where(tokens.alive, segment, -1)
      heads = mix(q, k, v, mask=there, segment=segment, causal=order)
    else:
      heads = gated(mix, q, k, v, holds, tokens.mask, tokens.feats[INDEX])
    update = self.attn.out(heads)
    feats = {name: value for name, value in tokens.feats.items() if name.startswith("state/")}
    feats |= {n: FEATURES[n](q, k, v, **_rows(tokens, last)) for n in budget.needs(self.sites, self.layer)}
    if train and any(dict(spot.options)["guide"] == self.layer for spot in budget.guides(self.sites)):
      given = FEATURES["text_attention"](q, k, v, **_rows(tokens, last))
      aux[f"guide/{self.layer}"] = tk.restore(given, tokens.owner)
    past = Past(k, v, tokens, outside, None if holds is None else holds > 0)
    feats |= {"update": update} if "update" in self.sites.needs(self.layer) else {}
    tokens = reduce(tokens.replace(x=tokens.x + update, feats=feats), "attn")
    update = self.mlp(self.norm2(tokens.x))
    if scope is not None and scope.mlp is not None:
      update = update * scope.mlp[..., None].astype(update.dtype)
    tokens = reduce(tokens.replace(x=tokens.x + update), "after")
    return tokens if scope is None else scope.leave(tokens), aux, past

  def decode(self, x: Array, cache: Cache, shared: SharedRouter | None) -> tuple[Array, Cache]:
    """One more token, (B, 1, D)."""
    position, goes, scope, outside = cache.position[self.layer] + cache.step, None, None, x
    if around := self.sites.at(self.layer, "around"):
      tokens, keeps = one_more(x, around[0], self._route(x, around[0], shared))
      inner, scope = enter(functools.partial(self._around, keeps=keeps, train=False, mode="mask"), tokens, around[0])
      goes = inner.alive[:, 0]
      if around[0].position == "reindex":
        position = cache.holds(self.layer)[:, 0].sum(-1, dtype=jnp.int32)
    q, k, v = self.attn(self.norm1(x), position[:, None])
    cache = cache.append(self.layer, k, v, goes)
    x = x + self.attn.out(cache.attend(self.layer, q))
    update = self.mlp(self.norm2(x))
    if scope is None:
      return x + update, cache
    x = x + (update if scope.mlp is None else update * scope.mlp[..., None].astype(update.dtype))
    weight = scope.weight[..., None].astype(x.dtype)
    return jnp.where(goes[:, None, None], outside + weight * (x - outside), outside), cache

  def _reduce(
    self, tokens: Tokens, place: str, *, aux: dict[str, Any], last: Array, keeps: Mapping, train: bool, mode: str
  ) -> Tokens:
    spots = self.sites.at(self.layer, place)
    if not spots or not keeps:
      return tokens
    if place == "before" and (wanted := budget.ahead(self.sites, self.layer)):
      heads = self.attn(self.norm1(tokens.x), tokens.position)
      tokens = tokens.replace(feats=tokens.feats | {n: FEATURES[n](*heads, **_rows(tokens, last)) for n in wanted})
    arrived = tokens.owner
    tokens, report = self.reduce(tokens, place, keeps, train=train, mode=mode)
    aux.update(report)
    aux.update({f"arrived/{spot.site}/{spot.index}": arrived for spot in budget.guides(self.sites) if spot in spots})
    return in_order(tokens, any(spot.position == "reindex" for spot in spots))

  def _around(self, tokens: Tokens, *, keeps: Mapping, train: bool, mode: str) -> tuple[Tokens, dict[str, Any]]:
    tokens, report = self.reduce(tokens, "around", keeps, train=train, mode=mode)
    anew = any(spot.position == "reindex" for spot in self.sites.at(self.layer, "around"))
    return in_order(tokens, anew), report

  def _enter(
    self, tokens: Tokens, spot: Spot, keeps: Mapping, train: bool, mode: str, shared: Any, aux: dict[str, Any]
  ) -> tuple[Tokens, Scope]:
    route = self._route(tokens.x, spot, shared)
    tokens = tokens if route is None else tokens.replace(feats=tokens.feats | {ROUTE: route})

    def run(tokens: Tokens) -> tuple[Tokens, dict[str, Any]]:
      inner, report = self._around(tokens, keeps=keeps, train=train, mode=mode)
      aux.update(report)
      return inner, report

    return enter(run, tokens, spot)

  def _route(self, x: Array, spot: Spot, shared: SharedRouter | None) -> Array | None:
    """What the shared router says of the layer's normalised input, (B, N, 2), if this spot reads it."""
    return shared(self.norm1(x)) if ROUTE in spot.module(parent=None).needed() else None

  def _gates(self, tokens: Tokens, keeps: Mapping, train: bool, mode: str, aux: dict[str, Any]) -> Array | None:
    """Keys and values that each head holds: (B, heads, N) float32, or None: all."""
    if not self.sites.at(self.layer, "ahead"):
      return None
    _, report = self.reduce(tokens, "ahead", keeps, train=train, mode=mode)
    (holds,) = next(r for name, r in report.items() if name.endswith("/holds")).values()
    aux.update({name: r for name, r in report.items() if not name.endswith("/holds")})
    return holds


def _rows(tokens: Tokens, last: Array) -> dict[str, Array]:
  """What features read of a prompt: the place of its last token, its text and its visual tokens."""
  text = of_prompt(tokens) & tokens.protected
  return {"last": place_of(tokens, last), "text": text, "visual": tokens.alive & ~tokens.protected}


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
