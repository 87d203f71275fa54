"""Language models of the Llama and Qwen families, with places for reducers between and in their layers.

Llama (Touvron et al., 2023, arXiv:2302.13971), Qwen2 (2024, arXiv:2407.10671), Qwen3 (2025, arXiv:2505.09388).

Inside, a row's tokens stand in the order of the sequence and padding behind them, whatever side it came from, so that
no attention needs a mask.  A site removes tokens of the prompt for all later layers; text is protected.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from tokred import tokens as tk
from tokred.config import nearest
from tokred.layout import Sites
from tokred.nn import budget
from tokred.nn.attention import implementation
from tokred.nn.block import ACTIVATIONS
from tokred.nn.budget import Census
from tokred.nn.cache import Cache, filled
from tokred.nn.decoder_layer import INDEX, Block, Shape
from tokred.tokens import Array, Tokens

DTYPES = ("float32", "bfloat16")


@struct.dataclass
class Output:
  """What a forward pass returns."""

  logits: Array  # (B, K, vocab) float32 of `tokens`; `tokens.restore(logits, output.tokens.owner)` has them at ids
  tokens: Tokens  # after the final norm; `owner` (B, S) tells where each token of the input is
  aux: dict[str, Any]  # "reduce/<site>/<name>": what its spots report; "owner/<layer>": (B, S) int32
  cache: Cache | None = None


class Decoder(nn.Module):
  """Embeddings, layers, norm, head."""

  shape: Shape
  sites: Sites
  dtype: str = "float32"  # of activations; norms, softmax and ranking stay float32
  param_dtype: str = "float32"
  attention: str = "auto"

  def setup(self) -> None:
    s, kinds = self.shape, dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))
    self.embed = nn.Embed(s.vocab, s.width, **kinds)
    self.block = [Block(s, self.sites, layer, **kinds, attention=self.attention) for layer in range(s.depth)]
    self.norm = nn.RMSNorm(epsilon=s.norm_eps, **kinds)
    if not s.tied:
      product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
      self.head = nn.Dense(s.vocab, use_bias=False, dot_general=product, **kinds)

  def __call__(
    self,
    ids: Array | None = None,
    *,
    x: Array | None = None,
    mask: Array | None = None,
    protected: Array | None = None,
    position: Array | None = None,
    last: Array | None = None,
    known: Census | None = None,
    train: bool = False,
    mode: str = "gather",
  ) -> Output:
    """The whole sequence at once, as in training; nothing is cached.

    Args:
      ids: (B, S) int32; or
      x: (B, S, D) embeddings instead, with images in their places.
      mask: (B, S), nonzero where there is a token; padding may be on either side.  None: everywhere.
      protected: (B, S), nonzero where a token never leaves: text.  None: everywhere.
      position: (B, S[, axis]) int32; None: counted within each row, without padding.
      last: (B,) int32 index into S of the prompt's last token, whose attention scores; None: the last that is there.
      known: counts of the batch, of `budget.census`; needed where sites act in gather mode and `mask` or `protected`
        is traced.
      train: whether reducers may sample; randomness comes from the stream "reduce".
      mode: "mask" (all stay in place) or "gather" (those that leave are gone).
    """
    tokens, aux, _ = self._forward(ids, x, mask, protected, position, last, known, train, mode, None)
    return Output(self.logits(tokens.x), tokens, aux)

  def prefill(
    self,
    ids: Array | None = None,
    *,
    room: int,
    x: Array | None = None,
    mask: Array | None = None,
    protected: Array | None = None,
    position: Array | None = None,
    known: Census | None = None,
  ) -> Output:
    """Reduces and caches prompts, with room for as many tokens more; logits (B, 1, vocab) of their last tokens."""
    tokens, aux, cache = self._forward(ids, x, mask, protected, position, None, known, False, "gather", room)
    end = jnp.maximum(tokens.alive.sum(1, dtype=jnp.int32) - 1, 0)
    return Output(self.logits(tk.take(tokens.x, end[:, None])), tokens, aux, cache)

  def decode(self, ids: Array, cache: Cache) -> tuple[Array, Cache]:
    """Appends one token to each row: (B,) int32 to logits (B, vocab) float32 of what follows, and the cache."""
    x = self.embed(ids[:, None])
    for block in self.block:
      x, cache = block.decode(x, cache)
    return self.logits(self.norm(x))[:, 0], cache.advance()

  def embeddings(self, ids: Array) -> Array:
    """(B, S) int32 to (B, S, D)."""
    return self.embed(ids)

  def logits(self, x: Array) -> Array:
    """(B, N, D) behind the final norm to (B, N, vocab) float32."""
    if not self.shape.tied:
      return self.head(x)
    table = self.embed.embedding.astype(x.dtype)
    return jnp.einsum("bnd,vd->bnv", x, table, preferred_element_type=jnp.float32)

  def _forward(
    self, ids: Any, x: Any, mask: Any, protected: Any, position: Any, last: Any, known: Census | None, train: bool,
    mode: str, room: int | None,
  ) -> tuple[Tokens, dict[str, Any], Cache | None]:  # fmt: skip
    x = self.embed(ids) if x is None else x.astype(self.dtype)
    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask > 0
    protected = jnp.ones_like(mask) if protected is None else protected > 0
    if last is None:
      last = x.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    keeps = {}
    if self.sites.spots:
      slots, caps = x.shape[1], (x.shape[1],) * len(self.sites.spots)
      if mode == "gather":
        caps = budget.capacities(self.sites, slots, known or _counted(mask, protected))
      counts = ((mask & which).sum(1, dtype=jnp.int32) for which in (protected, ~protected))
      keeps = budget.rows(self.sites, caps, slots, *counts)
    tokens = _start(x, mask, protected, position)
    # Decoding goes on at the largest position, on all axes at once, as M-RoPE does.
    axes = tuple(range(1, tokens.position.ndim))
    alive = tokens.alive.reshape(*tokens.mask.shape, *(1,) * (tokens.position.ndim - 2))
    following = jnp.where(alive, tokens.position, -1).max(axes).astype(jnp.int32) + 1
    aux: dict[str, Any] = {}
    past: list[tuple[Array, ...]] = []
    for layer, block in enumerate(self.block):
      tokens, report, (k, v, arrived) = block(tokens, last, keeps, train, mode)
      for name, values in report.items():
        aux[name] = aux.get(name, {}) | values
      aux[f"owner/{layer}"] = tokens.owner
      if room is not None:
        following = self._following(layer, ("before",), following, arrived)
        past.append((filled(k, room), filled(v, room), arrived.alive.sum(1, dtype=jnp.int32), following))
        following = self._following(layer, ("attn", "after"), following, tokens)
    tokens = tokens.replace(x=self.norm(tokens.x), feats={})
    if room is None:
      return tokens, aux, None
    k, v, length, following = zip(*past, strict=True)
    slots = tuple(a.shape[2] - room for a in k)
    return tokens, aux, Cache(k, v, length, following, jnp.zeros((), jnp.int32), slots)

  def _following(self, layer: int, places: tuple[str, ...], following: Array, tokens: Tokens) -> Array:
    """Where the sequence goes on: behind the last, once it is counted anew."""
    anew = any(spot.position == "reindex" for spot in self.sites.at(layer, *places))
    return tokens.alive.sum(1, dtype=jnp.int32) if anew else following


def _start(x: Array, mask: Array, protected: Array, position: Array | None) -> Tokens:
  """Tokens of padded rows: those that are there first, in their order."""
  place = tk.rank((~mask).astype(jnp.int32))
  order = tk.inverse(place)
  index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), mask.shape)
  there = tk.take(mask, order)
  return Tokens(
    x=jnp.where(there[..., None], tk.take(x, order), 0),
    mask=there,
    size=jnp.ones(mask.shape, jnp.float32),
    position=index if position is None else tk.take(position, order),
    owner=jnp.where(mask, place, -1),
    protected=tk.take(protected, order),
    feats={INDEX: index},
  )


def _counted(mask: Array, protected: Array) -> Census:
  if isinstance(mask, jax.core.Tracer) or isinstance(protected, jax.core.Tracer):
    raise ValueError("under jit the shapes behind a site need known=census(mask, protected), counted on the host")
  return budget.census(mask, protected)


def make(
  shape: Shape, sites: Mapping[str, Any] | None = None, *, dtype: str = "float32", param_dtype: str = "float32",
  attention: str = "auto",
) -> Decoder:  # fmt: skip
  """The module of these sizes and `config.sites`; every error of either is raised here.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  for field in ("vocab", "width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "max_length"):
    if getattr(shape, field) < 1:
      raise ValueError(f"{field}={getattr(shape, field)} must be 1 or more")
  if shape.num_heads % shape.num_kv_heads:
    raise ValueError(f"num_kv_heads={shape.num_kv_heads} does not divide num_heads={shape.num_heads}")
  if shape.head_dim % 2:
    raise ValueError(f"head_dim={shape.head_dim} must be even: rotary positions turn pairs of channels")
  if shape.activation not in ACTIVATIONS:
    raise ValueError(f"activation={shape.activation!r} is unknown; {nearest(shape.activation, ACTIVATIONS)}")
  shape.rope.frequencies(shape.head_dim)
  for field, kind in (("dtype", dtype), ("param_dtype", param_dtype)):
    if kind not in DTYPES:
      raise ValueError(f"{field}={kind!r} is unknown; {nearest(kind, DTYPES)}")
  implementation(attention)
  return Decoder(shape, budget.layout(sites or {}, shape.depth, shape.max_length), dtype, param_dtype, attention)
