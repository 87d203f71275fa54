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
from tokred.nn import attention as kernels
from tokred.nn import budget
from tokred.nn.block import ACTIVATIONS
from tokred.nn.budget import Census
from tokred.nn.cache import Cache, filled
from tokred.nn.decoder_layer import SEGMENT, Block, Past, Shape
from tokred.nn.decoder_scope import INDEX, SharedRouter
from tokred.nn.rope import last_position
from tokred.nn.unmerge import Places
from tokred.tokens import APPENDED, VISUAL, Array, Tokens

DTYPES = ("float32", "bfloat16")


@struct.dataclass
class Output:
  """What a forward pass returns."""

  logits: Array  # (B, K, vocab) float32 of `tokens`; `tokens.restore(logits, output.tokens.owner)` has them at ids
  tokens: Tokens  # after the final norm; `owner` (B, S) tells where each token of the input is
  aux: dict[str, Any]  # "reduce/<site>/<name>": what its spots report; "owner/<layer>": (B, S) int32
  cache: Cache | None = None


@struct.dataclass
class Rows:
  """What is given, in the order in which it is given."""

  x: Array  # (B, S, D)
  gate: Array  # (B, S) 0 where there is no token; floating, it is learned through
  protected: Array  # (B, S) bool
  position: Array | None  # (B, S[, axis]) int32
  last: Array  # (B,) int32, index into S
  feats: dict[str, Array]  # (B, S) each


class Decoder(nn.Module):
  """Embeddings, layers, norm, head."""

  shape: Shape
  sites: Sites
  dtype: str = "float32"  # of activations; norms, softmax and ranking stay float32
  param_dtype: str = "float32"
  attention: str = "auto"
  gate_cap: float = kernels.GATE_CAP

  def setup(self) -> None:
    s, kinds = self.shape, dict(dtype=jnp.dtype(self.dtype), param_dtype=jnp.dtype(self.param_dtype))
    self.embed = nn.Embed(s.vocab, s.width, **kinds)
    mix = dict(impl=self.attention, gate_cap=self.gate_cap)
    self.block = [Block(s, self.sites, layer, **kinds, **mix) for layer in range(s.depth)]
    self.norm = nn.RMSNorm(epsilon=s.norm_eps, **kinds)
    if not s.tied:
      product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
      self.head = nn.Dense(s.vocab, use_bias=False, dot_general=product, **kinds)
    self.reduce = SharedRouter() if budget.routed(self.sites) else None

  def __call__(
    self,
    ids: Array | None = None,
    *,
    x: Array | None = None,
    mask: Array | None = None,
    protected: Array | None = None,
    position: Array | None = None,
    last: Array | None = None,
    segment: Array | None = None,
    state: Mapping[str, Array] | None = None,
    known: Census | None = None,
    places: Places | None = None,
    train: bool = False,
    mode: str = "gather",
    options: Mapping[str, Array] | None = None,
  ) -> Output:
    """The whole sequence at once, as in training; nothing is cached.

    Args:
      ids: (B, S) int32; or
      x: (B, S, D) embeddings instead, with images in their places.
      mask: (B, S), nonzero where there is a token; padding may be on either side.  None: everywhere.  Floating and
        straight-through, it gates: its gradient is that of what the dead would have given, so they must be finite.
      protected: (B, S), nonzero where a token never leaves: text.  None: everywhere.
      position: (B, S[, axis]) int32; None: counted within each row or segment, without padding.
      last: (B,) int32 index into S of the prompt's last token, whose attention scores; None: the last that is there.
      segment: (B, S) int32, a number for each of the texts that share a row, one behind the other: they do not see one
        another.  What padding has does not matter.  None: one text a row.
      state: features "state/..." of the tokens, (B, S) each, that reducers find in `tokens.feats`; "state/target" says
        which visual tokens show what the answer is about, for "glimpse" to learn from.
      known: counts of the batch, of `budget.census`; needed where sites act in gather mode and `mask` or `protected`
        is traced.
      places: where the S tokens stand in a longer sequence, in which attention takes place: virtual unmerging.
      train: whether reducers may sample; randomness comes from the stream "reduce".
      mode: "mask" (all stay in place) or "gather" (those that leave are gone).
      options: values of options that move while training, by "<site>.<option>".

    Raises:
      ValueError: texts share rows, or tokens have several places, and sites, which count by row, act here.
    """
    rows = self._rows(ids, x, mask, protected, position, last, segment, state)
    tokens, aux, _ = self._forward(rows, known, places, train, mode, options=options)
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
    state: Mapping[str, Array] | None = None,
    known: Census | None = None,
    places: Places | None = None,
  ) -> Output:
    """Reduces and caches prompts, with room for as many tokens more; logits (B, 1, vocab) of their last tokens."""
    rows = self._rows(ids, x, mask, protected, position, None, None, state)
    tokens, aux, cache = self._forward(rows, known, places, False, "gather", room)
    end = jnp.maximum(tokens.alive.sum(1, dtype=jnp.int32) - 1, 0)
    return Output(self.logits(tk.take(tokens.x, end[:, None])), tokens, aux, cache)

  def decode(self, ids: Array, cache: Cache) -> tuple[Array, Cache]:
    """Appends one token to each row: (B,) int32 to logits (B, vocab) float32 of what follows, and the cache."""
    x = self.embed(ids[:, None])
    for block in self.block:
      x, cache = block.decode(x, cache, self.reduce)
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

  def _rows(
    self, ids: Any, x: Any, mask: Any, protected: Any, position: Any, last: Any, segment: Any, state: Any
  ) -> Rows:
    if segment is not None and self.sites.spots:
      raise ValueError(
        f"sites.{self.sites.spots[0].site}.stack='llm' counts tokens by row, but several texts share one (segment): "
        "valid: rows of one text each"
      )
    x = self.embed(ids) if x is None else x.astype(self.dtype)
    gate = jnp.ones(x.shape[:2], bool) if mask is None else jnp.asarray(mask)
    mask = gate > 0
    protected = jnp.ones_like(mask) if protected is None else protected > 0
    appended = None if last is None else mask & (jnp.arange(x.shape[1]) > last[:, None])
    if last is None:
      last = x.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    feats = {SEGMENT: segment, APPENDED: appended} | dict(state or {})
    visual = mask & ~protected
    if any(VISUAL in spot.type.needs for spot in self.sites.spots):
      feats[VISUAL] = jnp.maximum(jnp.cumsum(visual, axis=1, dtype=jnp.int32) - 1, 0)
    if any(spot.type.from_input for spot in self.sites.spots):
      feats[tk.SOURCE] = jnp.broadcast_to(visual.sum(1, keepdims=True, dtype=jnp.int32), mask.shape)
    feats = {name: jnp.asarray(a) for name, a in feats.items() if a is not None}
    return Rows(x, gate, protected, position, last, feats)

  def _counts(
    self, rows: Rows, known: Census | None, train: bool, mode: str, options: Mapping[str, Array] | None
  ) -> dict[str, Any]:
    """How many tokens of each row leave each spot, and options that move."""
    if not self.sites.spots:
      return {}
    mask, protected, appended = rows.gate > 0, rows.protected, rows.feats.get(APPENDED)
    slots = mask.shape[1]
    caps = (slots,) * len(self.sites.spots)
    if mode == "gather":
      caps = budget.capacities(self.sites, slots, known or _counted(mask, protected), appended is not None)
    prompt = mask if appended is None else mask & ~appended
    pairs = ((mask, protected), (mask, ~protected), (prompt, protected))
    text, free, asked = ((a & b).sum(1, dtype=jnp.int32) for a, b in pairs)
    return budget.rows(self.sites, caps, slots, text, free, asked, train) | dict(options or {})

  def _forward(
    self, rows: Rows, known: Census | None, places: Places | None, train: bool, mode: str, room: int | None = None,
    options: Mapping[str, Array] | None = None,
  ) -> tuple[Tokens, dict[str, Any], Cache | None]:  # fmt: skip
    if places is not None and self.sites.spots:
      raise ValueError(f"sites.{self.sites.spots[0].site}.stack='llm' cannot stand where tokens have several places")
    tokens = _start(rows)
    keeps = self._counts(rows, known, train, mode, options)
    if places is not None:
      places = places.replace(owner=jnp.maximum(tk.take(tokens.owner, places.owner), 0))
    following = 1 + (last_position(tokens.position, tokens.alive) if places is None else places.last)
    aux: dict[str, Any] = {}
    past: list[tuple[Any, ...]] = []
    for layer, block in enumerate(self.block):
      tokens, report, left = block(tokens, rows.last, keeps, train, mode, self.reduce, places)
      for name, values in report.items():
        aux[name] = aux.get(name, {}) | values if isinstance(values, dict) else values
      aux[f"owner/{layer}"] = tokens.owner
      if room is not None:
        following = self._following(layer, ("before",), following, left.outside)
        there = self._there(layer, left, room)
        length = (left.inside.alive if places is None else places.there).sum(1, dtype=jnp.int32)
        past.append((filled(left.k, room), filled(left.v, room), length, following, there))
        following = self._following(layer, ("attn", "after"), following, tokens)
    self._learn(aux, (rows.gate > 0) & ~rows.protected)
    tokens = tokens.replace(x=self.norm(tokens.x), feats={})
    if room is None:
      return tokens, aux, None
    k, v, length, following, there = zip(*past, strict=True)
    slots = tuple(a.shape[2] - room for a in k)
    return tokens, aux, Cache(k, v, length, following, jnp.zeros((), jnp.int32), slots, there)

  def _learn(self, aux: dict[str, Any], visual: Array) -> None:
    """Losses of those that learn from the attention of a deeper layer, of which `aux` has what is left there."""
    for spot in budget.guides(self.sites):
      given = aux.get(f"guide/{dict(spot.options)['guide']}")
      arrived = aux.pop(f"arrived/{spot.site}/{spot.index}")
      if given is not None:
        score = tk.restore(aux[f"reduce/{spot.site}/score"][spot.index], arrived)
        loss = spot.module(parent=None).guided(score, given, visual & (arrived >= 0))
        aux.setdefault(f"reduce/{spot.site}/loss_guide", {})[spot.index] = loss

  def _there(self, layer: int, past: Past, room: int) -> Array | None:
    """Slots that hold something, (B, heads or 1, K + room), where not all that is alive or appended does."""
    if not self.sites.at(layer, "around", "ahead"):
      return None
    there = past.inside.alive[:, None]
    there = there if past.holds is None else there & past.holds
    return jnp.pad(there, ((0, 0), (0, 0), (0, room)), constant_values=True)

  def _following(self, layer: int, places: tuple[str, ...], following: Array, tokens: Tokens) -> Array:
    """Where the sequence goes on: behind the last, once it is counted anew."""
    anew = any(spot.position == "reindex" for spot in self.sites.at(layer, *places))
    return tokens.alive.sum(1, dtype=jnp.int32) if anew else following


def _start(rows: Rows) -> Tokens:
  """Tokens of padded rows: those that are there first, in their order."""
  x, mask, more = rows.x, rows.gate, rows.feats
  soft, there = jnp.issubdtype(mask.dtype, jnp.floating), mask > 0
  place = tk.rank((~there).astype(jnp.int32))
  order = tk.inverse(place)
  index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), there.shape)
  alive = tk.take(there, order)
  # Where a gate learns, the dead keep what they hold, and the place in the sequence that they would have.
  x, index = tk.take(x, order), tk.take(index, order) if soft else index
  position = _counting(there, more.get(SEGMENT)) if rows.position is None else rows.position
  return Tokens(
    x=x if soft else jnp.where(alive[..., None], x, 0),
    mask=tk.take(mask.astype(jnp.float32), order) if soft else alive,
    size=jnp.ones(alive.shape, jnp.float32),
    position=tk.take(position, order),
    owner=jnp.where(there, place, -1),
    protected=tk.take(rows.protected, order),
    feats={INDEX: index} | {name: tk.take(a, order) for name, a in more.items()},
  )


def _counting(there: Array, segment: Array | None) -> Array:
  """Positions of those that are there, counted in each row, or in each text of a row: (B, S) int32."""
  count = jnp.cumsum(there, axis=1, dtype=jnp.int32)
  if segment is not None:  # what had been counted where the text began
    begins = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)))
    count = count - jax.lax.cummax(jnp.where(begins, count - there, 0), axis=1)
  return jnp.maximum(count - 1, 0)


def _counted(mask: Array, protected: Array) -> Census:
  if isinstance(mask, jax.core.Tracer) or isinstance(protected, jax.core.Tracer):
    raise ValueError("under jit the shapes behind a site need known=census(mask, protected), counted on the host")
  return budget.census(mask, protected)


def make(
  shape: Shape, sites: Mapping[str, Any] | None = None, *, dtype: str = "float32", param_dtype: str = "float32",
  attention: str = "auto", gate_cap: float = kernels.GATE_CAP,
) -> Decoder:  # fmt: skip
  """The module of these sizes and `config.sites`; every error of either is raised here.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  for field in ("vocab", "width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "max_length"):
    if getattr(shape, field) < 1:
      raise ValueError(f"config.llm.{field}={getattr(shape, field)} must be 1 or more")
  if shape.num_heads % shape.num_kv_heads:
    raise ValueError(f"config.llm.num_kv_heads={shape.num_kv_heads} does not divide num_heads={shape.num_heads}")
  if shape.head_dim % 2:
    raise ValueError(f"config.llm.head_dim={shape.head_dim} must be even: rotary positions turn pairs of channels")
  if shape.activation not in ACTIVATIONS:
    raise ValueError(f"config.llm.activation={shape.activation!r} is unknown; {nearest(shape.activation, ACTIVATIONS)}")
  shape.rope.frequencies(shape.head_dim)
  for field, kind in (("dtype", dtype), ("param_dtype", param_dtype)):
    if kind not in DTYPES:
      raise ValueError(f"{field}={kind!r} is unknown; {nearest(kind, DTYPES)}")
  kernels.check(attention, gate_cap)
  placed = budget.layout(sites or {}, shape.depth, shape.max_length, shape.num_kv_heads)
  return Decoder(shape, placed, dtype, param_dtype, attention, gate_cap)
