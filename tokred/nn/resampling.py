"""Projectors that lay an image's tokens on the grid of its patches again and take fewer from there.

No token is ranked: each that comes out stands for a window of patches, or asks all of them.  Whatever a reducer took
away before is missing from its window; a merged token counts in the window of each patch that it represents.

Dimension letters beside those of tokens.py: S patches of the grid, M tokens out, W width of the language model.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tokred import tokens as tk
from tokred.reducers.stvit import windows
from tokred.tokens import Array, Tokens

_EPS = 1e-6


def shape_of(count: int, grid: tuple[int, int], *, even: bool = False) -> tuple[int, int]:
  """Rows and columns of `count` tokens, as near to the grid's proportions as divisors allow.

  Args:
    count: tokens out.
    grid: (rows, columns) of patches.
    even: whether each window must have as many patches.

  Raises:
    ValueError: no such shape.
  """
  rows, columns = grid
  found = [(r, count // r) for r in range(1, min(rows, count) + 1) if count % r == 0 and count // r <= columns]
  found = [(r, c) for r, c in found if not even or (rows % r == 0 and columns % c == 0)]
  if not found:
    kind = "windows of one size on" if even else "rows and columns within"
    raise ValueError(f"config.projector.num_tokens={count}: valid are {kind} a grid of {rows} x {columns} patches")
  return min(found, key=lambda s: abs(math.log(s[0] / s[1] * columns / rows)))


def on_grid(tokens: Tokens, values: Array, grid: tuple[int, int]) -> tuple[Array, Array]:
  """Values on the patches, (B, S, ...), 0 where nothing represents one, and (B, S) bool where something does."""
  if tokens.owner.shape[1] != grid[0] * grid[1]:
    raise ValueError(f"projector: tokens of {tokens.owner.shape[1]} patches on a grid of {grid[0]} x {grid[1]}")
  return tk.restore(values, tokens.owner), tokens.owner >= 0


def pool(x: Array, there: Array, member: np.ndarray) -> Array:
  """Mean over the patches of each window that are there, (B, M, D); 0 where none is."""
  share = jnp.asarray(member, jnp.float32)
  total = jnp.einsum("ms,bsd->bmd", share, x * there[..., None], precision="highest")
  return (total / jnp.maximum(jnp.einsum("ms,bs->bm", share, there.astype(jnp.float32)), 1)[..., None]).astype(x.dtype)


def laid_out(tokens: Tokens, x: Array, shape: tuple[int, int], grid: tuple[int, int], alive: Array | None) -> Tokens:
  """Tokens of windows: each stands where its first patch stood, and represents the patches that begin in it."""
  batch, member = x.shape[0], windows(shape, grid)
  first = jnp.asarray(member.argmax(1), jnp.int32)
  place = np.arange(grid[0])[:, None] * shape[0] // grid[0] * shape[1] + np.arange(grid[1]) * shape[1] // grid[1]
  owner = jnp.where(tokens.owner >= 0, jnp.asarray(place.reshape(-1), jnp.int32), -1)
  return flat(
    x, jnp.broadcast_to(first, x.shape[:2]), owner, alive, jnp.asarray(member.sum(1), jnp.float32)[None], batch
  )


def flat(x: Array, position: Array, owner: Array, alive: Array | None, size: Array, batch: int) -> Tokens:
  shape = (batch, x.shape[1])
  mask = jnp.ones(shape, bool) if alive is None else jnp.broadcast_to(alive, shape)
  return Tokens(x, mask, jnp.broadcast_to(size, shape), position, owner, jnp.zeros(shape, bool))


def draw(module: nn.Module, budgets: tuple[int, ...]) -> Array:
  """One of the budgets, of each step anew: its index, int32 ()."""
  return jax.random.randint(module.make_rng("reduce"), (), 0, len(budgets))


class Perceptron(nn.Module):
  """fc1, GELU, fc2: into the language model's width."""

  width: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = nn.gelu(nn.Dense(self.width, dtype=x.dtype, name="fc1")(x), approximate=False)
    return nn.Dense(self.width, dtype=x.dtype, name="fc2")(x)


class TokenFlex(nn.Module):
  """Pools the grid to a count that may differ from step to step, and translates with one gated perceptron.

  y = W_down (silu(W_gate n) * W_up n), n = LayerNorm(adaptive mean of the grid).  In training the count is one of
  `budgets`, drawn anew in each step; the places beyond it are dead, so that there is one compilation.
  (TokenFLEX: Hu et al., 2025, arXiv:2504.03154; the hidden width is not told in the abstract and is W here)
  """

  width: int
  num_tokens: int
  budgets: tuple[int, ...] = ()

  @nn.nowrap
  def left(self, n: int) -> int:
    """Tokens that come out where n go in."""
    return self.num_tokens

  @nn.nowrap
  def macs(self, n: Any, width: int) -> Any:
    """Multiply-adds for n tokens of this width."""
    return n * width + self.num_tokens * self.width * (2 * width + self.width)

  @nn.compact
  def __call__(self, tokens: Tokens, grid: tuple[int, int], train: bool = False) -> Tokens:
    x, there = on_grid(tokens, tokens.x, grid)
    norm = nn.LayerNorm(epsilon=_EPS, dtype=x.dtype, name="norm")
    gate, up, down = (nn.Dense(self.width, dtype=x.dtype, name=name) for name in ("gate", "up", "down"))

    def at(count: int) -> Tokens:
      shape = shape_of(count, grid)
      out = laid_out(tokens, pool(x, there, windows(shape, grid)), shape, grid, None)
      room = lambda a: jnp.pad(a, ((0, 0), (0, self.num_tokens - count)) + ((0, 0),) * (a.ndim - 2))
      padded = jax.tree.map(room, out.replace(owner=out.mask))
      return padded.replace(owner=out.owner)

    if train and self.budgets:
      out = jax.lax.switch(draw(self, self.budgets), [lambda count=count: at(count) for count in self.budgets])
    else:
      out = at(self.num_tokens)
    y = norm(out.x)
    return out.replace(x=down(nn.silu(gate(y)) * up(y)))


def attend_windows(q: Array, k: Array, v: Array, member: Array | np.ndarray, heads: int) -> tuple[Array, Array]:
  """Multi-head attention in which each query sees its own window.

  Args:
    q: (B, M, D).
    k: (B, S, D).
    v: (B, S, D).
    member: (B or 1, M, S) bool.
    heads: of D / heads channels.

  Returns:
    (B, M, D) and the attention's mean over heads, (B, M, S) float32.  A query without a patch sees all alike.
  """
  split = lambda a: a.reshape(*a.shape[:2], heads, -1)
  q, k, v = split(q), split(k), split(v)
  logits = jnp.einsum("bmhd,bshd->bhms", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
  weight = jax.nn.softmax(jnp.where(member[:, None], logits, jnp.finfo(jnp.float32).min), axis=-1)
  out = jnp.einsum("bhms,bshd->bmhd", weight.astype(v.dtype), v)
  return out.reshape(*out.shape[:2], -1), weight.mean(1)


def heads_of(width: int, num_heads: int) -> int:
  """`num_heads`, or as many as have 128 channels."""
  return num_heads or max(width // 128, 1)


class TokenPacker(nn.Module):
  """Coarse queries, each of which takes the detail from its own window.

  Query: the grid resized bilinearly to (rows, columns), a linear layer without bias, LayerNorm.  Keys and values: each
  its own perceptron (two layers, GELU) of the features of several layers, LayerNorm.  Attention within the window,
  without a residual from the query, then a perceptron into the language model's width.
  (TokenPacker: Li et al., 2024, "Efficient Visual Projector for Multimodal LLM")

  With `text` it is QueCC's compressor: a vector of the question, feats["text"] (B, E), where one is given, is
  translated and added to every token, and the query is a strided depth-wise convolution of a perceptron of the grid
  instead of the resized grid; its authors take a single query.
  (QueCC: Li et al., 2024, "Inference Optimal VLMs Need Only One Visual Token but Larger Models")

  Features of the layers `levels` are read from feats["levels"] (B, S, C), on the patches; where there are none, the
  tokens themselves serve.
  """

  width: int
  num_tokens: int
  text: bool = False
  levels: tuple[int, ...] = ()  # layers of the tower, counted from 0
  num_heads: int = 0  # 0: as many as have 128 channels

  @nn.nowrap
  def left(self, n: int) -> int:
    """Tokens that come out where n go in."""
    return self.num_tokens

  @nn.nowrap
  def macs(self, n: Any, width: int) -> Any:
    """Multiply-adds for n tokens of this width."""
    m, d, c = self.num_tokens, width, max(len(self.levels), 1) * width
    queries = 2 * n * d * d + n * d if self.text else m * d * d
    return queries + n * (2 * c + 4 * d) * d + 2 * m * d * d + 2 * n * d + m * self.width * (d + self.width)

  @nn.compact
  def __call__(self, tokens: Tokens, grid: tuple[int, int], train: bool = False) -> Tokens:
    x, there = on_grid(tokens, tokens.x, grid)
    levels = tokens.feats.get("levels", x)
    d, dtype, shape = x.shape[-1], x.dtype, shape_of(self.num_tokens, grid, even=True)
    dense = lambda name, **k: nn.Dense(d, dtype=dtype, name=name, **k)
    norm = lambda name: nn.LayerNorm(epsilon=_EPS, dtype=dtype, name=name)
    if self.text:
      if "text" in tokens.feats:
        x = x + norm("norm_text")(dense("text")(tokens.feats["text"].astype(dtype)))[:, None]
      x = norm("norm_q")(dense("query_2")(nn.gelu(dense("query_1")(x), approximate=False)))
      stride = (grid[0] // shape[0], grid[1] // shape[1])
      query = WindowSum(name="query_conv")(x, grid, stride).reshape(x.shape[0], -1, d)
    else:
      coarse = (x.shape[0], *shape, d)
      query = jax.image.resize(x.reshape(-1, *grid, d), coarse, "linear", antialias=False)
      query = norm("norm_q")(dense("query", use_bias=False)(query.reshape(x.shape[0], -1, d)))
    key = norm("norm_k")(dense("key_2")(nn.gelu(dense("key_1")(levels), approximate=False)))
    value = norm("norm_v")(dense("value_2")(nn.gelu(dense("value_1")(levels), approximate=False)))
    member = jnp.asarray(windows(shape, grid))[None] & there[:, None]
    out, _ = attend_windows(
      dense("attn_q")(query), dense("attn_k")(key), dense("attn_v")(value), member, heads_of(d, self.num_heads)
    )
    out = Perceptron(self.width, name="mlp")(dense("attn_out")(out))
    return laid_out(tokens, out, shape, grid, None)


class WindowSum(nn.Module):
  """A weighted sum over each window, channel by channel: a depthwise convolution that steps by its own size.

  As products, since XLA (jax 0.10) gives the kernel of a depthwise `nn.Conv` as many times its gradient as a mesh has
  devices along `tensor`.
  """

  @nn.compact
  def __call__(self, x: Array, grid: tuple[int, int], window: tuple[int, int]) -> Array:
    """(B, rows x columns, D) to (B, rows / window rows, columns / window columns, D)."""
    (rows, columns), (height, width), d = grid, window, x.shape[-1]
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (height, width, 1, d), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (d,), jnp.float32)
    x = x.reshape(-1, rows // height, height, columns // width, width, d)
    return jnp.einsum("byhxwd,hwd->byxd", x, kernel[:, :, 0].astype(x.dtype)) + bias.astype(x.dtype)


class Queries(nn.Module):
  """Pooled anchors for the layout and a prefix of ordered queries for the rest: many budgets in one model.

  The queries of a bank see the anchors first, then all patches, each step a cross-attention with its own residual, and
  never each other: so the first m are the same however many there are, and a budget is a prefix.  In training one of
  `budgets` is drawn anew in each step and the queries beyond it are dead.
  (Matryoshka Query Transformer: Hu et al., 2024, arXiv:2405.19315, where `anchors` is 0; PARCEL: Kuzucu et al., 2026,
  arXiv:2605.30126, where the queries are conditioned on pooled anchors.  We follow their abstracts: one layer, anchors
  and queries share the perceptron.)

  Anchors stand where their windows begin; query i stands at patch i, whatever it looks at.
  """

  width: int
  num_tokens: int  # anchors among them
  budgets: tuple[int, ...] = ()  # of num_tokens, anchors among them
  anchors: int = 0
  bank: int = 0  # queries that there are; 0: num_tokens - anchors
  num_heads: int = 0

  @nn.nowrap
  def left(self, n: int) -> int:
    """Tokens that come out where n go in."""
    return self.num_tokens

  @nn.nowrap
  def macs(self, n: Any, width: int) -> Any:
    """Multiply-adds for n tokens of this width."""
    q, a, d = self.num_tokens - self.anchors, self.anchors, width
    look = lambda seen: 2 * q * d * d + 2 * seen * d * d + 2 * q * seen * d
    return n * d * bool(a) + bool(a) * look(a) + look(n) + self.num_tokens * self.width * (d + self.width)

  @nn.compact
  def __call__(self, tokens: Tokens, grid: tuple[int, int], train: bool = False) -> Tokens:
    x, there = on_grid(tokens, tokens.x, grid)
    batch, d, wanted = x.shape[0], x.shape[-1], self.num_tokens - self.anchors
    bank = self.bank or wanted
    if not 0 <= wanted <= min(bank, grid[0] * grid[1]):
      raise ValueError(
        f"config.projector.num_tokens={self.num_tokens}: {self.anchors} anchors and a bank of {bank} queries on "
        f"{grid[0] * grid[1]} patches; valid: {self.anchors} to {self.anchors + min(bank, grid[0] * grid[1])}"
      )
    query = self.param("queries", nn.initializers.normal(0.02), (bank, d), jnp.float32)[:wanted]
    query = jnp.broadcast_to(query.astype(x.dtype), (batch, wanted, d))
    shape = shape_of(self.anchors, grid) if self.anchors else (0, 0)
    anchors = jnp.zeros((batch, 0, d), x.dtype)
    if self.anchors:
      anchors = pool(x, there, windows(shape, grid))
    if self.anchors and wanted:
      query, _ = self._look(query, anchors, jnp.ones((1, 1, self.anchors), bool), "anchor")
    if wanted:
      query, seen = self._look(query, x, there[:, None], "patch")
    out = Perceptron(self.width, name="mlp")(
      nn.LayerNorm(epsilon=_EPS, dtype=x.dtype, name="norm")(jnp.concatenate([anchors, query], axis=1))
    )
    laid = laid_out(tokens, anchors, shape, grid, None) if self.anchors else None
    place = jnp.broadcast_to(jnp.arange(wanted, dtype=jnp.int32), (batch, wanted))
    owner = laid.owner if laid else jnp.where(tokens.owner >= 0, seen.argmax(1).astype(jnp.int32), -1)
    position = jnp.concatenate([laid.position, place], axis=1) if laid else place
    alive = None
    if train and self.budgets:
      count = jnp.asarray(self.budgets, jnp.int32)[draw(self, self.budgets)]
      alive = jnp.arange(self.num_tokens)[None] < count
      owner = jnp.where(owner < count, owner, -1)
    return flat(out, position, owner, alive, jnp.ones((1, 1)), batch)

  def _look(self, query: Array, seen: Array, member: Array, name: str) -> tuple[Array, Array]:
    dense = lambda part: nn.Dense(query.shape[-1], dtype=query.dtype, name=f"{name}_{part}")
    norm = lambda part: nn.LayerNorm(epsilon=_EPS, dtype=query.dtype, name=f"{name}_norm_{part}")
    seen = norm("kv")(seen)
    heads = heads_of(query.shape[-1], self.num_heads)
    out, weight = attend_windows(dense("q")(norm("q")(query)), dense("k")(seen), dense("v")(seen), member, heads)
    return query + dense("out")(out), weight
