"""Attention over weighted keys, and the features that reducers ask of it.

No (token, token) mask is made unless images share a row.

With e_ij = exp(q_i k_j / sqrt(d)) and w_j >= 0 the weight of key j:

  size     w_j = size_j                     log(w_j) is added to the logits of a key; on GPU it rides in the keys
  gate     w_j in {0, 1}, learned through   out_i = (sum_j e_ij w_j v_j + e_ii (1 - w_i) v_i) / (the same without v)
  mask     w_j in {0, 1}, nothing learned   a length per row: survivors are a prefix
  segment  w_ij = 1 where i and j are of one image, else 0; for images that share a row, instead of a mask
  causal   w_ij = 1 where j does not come after i, else 0

A gate multiplies after the exponential: the gradient then reaches keys that are switched off, which adding log(w) would
kill, and a dead token keeps itself (Rao et al., 2021, DynamicViT; Chen et al., 2023, DiffRate).  Where a dead key is
much louder than all living ones, that gradient tells of a step of 1 what only holds for a tiny one, and drowns all
others: a query whose living keys have the share s of what all would have learns by min(1, gate_cap s).

The authors of DynamicViT and DiffRate add an epsilon to the weights, gate_eps = 1e-6, and count from the largest logit
of all, dead keys included: A_ij = (w_ij + eps / N) / (sum_j w_ij + eps).  Where a dead key is far louder than the
living, all values are averaged.  Without it, as by default, the masked pass equals the gathered one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.scores import PAGERANK
from tokred.tokens import Array

IMPLEMENTATIONS = ("auto", "matmul", "fused")
GATE_CAP = 1e6  # as good as none: the authors' epsilon stands there too
SHARED = -2  # the segment of tokens that all segments of their row see


def implementation(name: str) -> str:
  """ "auto" is "fused" on GPU and TPU; on CPU two products in (batch, head, token, dim) layout are twice as fast."""
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"config.model.attention={name!r} is not an implementation; {nearest(name, IMPLEMENTATIONS)}")
  if name == "auto":
    return "matmul" if jax.default_backend() == "cpu" else "fused"
  return name


def check(name: str, gate_cap: float, gate_eps: float = 0.0) -> None:
  """Raises ValueError where `config.model.attention`, `gate_cap` or `gate_eps` is not valid."""
  implementation(name)
  if not 0.0 < gate_cap <= GATE_CAP:
    raise ValueError(f"config.model.gate_cap={gate_cap}; valid: above 0, at most {GATE_CAP:g}, which is no bound")
  if not 0.0 <= gate_eps <= 1e-3:
    raise ValueError(f"config.model.gate_eps={gate_eps}; valid: 0 (none) to 0.001; the authors have 1e-6")


def attend(
  q: Array,
  k: Array,
  v: Array,
  *,
  size: Array | None = None,
  mask: Array | None = None,
  segment: Array | None = None,
  causal: bool | Array = False,
  impl: str = "auto",
  gate_cap: float = GATE_CAP,
  gate_eps: float = 0.0,
) -> Array:
  """Softmax attention.

  Args:
    q: (B, H, N, d).
    k: (B, H, N, d), or of fewer heads, each of which serves H / heads queries in a row; so is v.
    size: (B, N) float32 positive weights of the keys; None: ones.
    mask: (B, N); bool masks dead keys (they must follow the survivors), float32 gates them and passes gradients;
      None: all alive.
    segment: (B, N) int32; tokens attend to those of the same number, -1 (nobody's) to each other, and all to those of
      SHARED.  All must be finite.
    causal: whether tokens attend only to those that do not stand behind them; (B, N) int32: that do not have a larger
      number, for tokens that stand in another order.
    impl: "auto", "matmul" or "fused".
    gate_cap: at most this does a query learn of dead keys against its living ones; at most GATE_CAP.
    gate_eps: added to a gated query's weights, spread over all keys; above 0 the implementation is "matmul".

  Returns:
    (B, H, N, d) of the dtype of v.  Rows of dead queries are finite if q, k and v are.

  Raises:
    ValueError: both a mask of who is dead and segments are given.
  """
  if mask is not None and mask.dtype == bool and segment is not None:
    raise ValueError("attend takes a mask or segments; give who is dead segment -1")
  within = None  # (B, 1, N, N)
  if segment is not None:
    within = ((segment[:, :, None] == segment[:, None]) | (segment[:, None] == SHARED))[:, None]
  fused = implementation(impl) == "fused"
  if isinstance(causal, bool) and causal and fused and within is None and (mask is None or mask.dtype == bool):
    return _fused(q, k, v, None if size is None else jnp.log(size), mask, None, gate_cap, causal=True)
  if not isinstance(causal, bool) or causal:
    order = jnp.arange(q.shape[2])[None] if isinstance(causal, bool) else causal
    past = (order[:, :, None] >= order[:, None])[:, None]
    within = past if within is None else within & past
  bias = None if size is None else jnp.log(size)
  if fused and not (gate_eps and mask is not None and mask.dtype != bool):
    return _fused(q, k, v, bias, mask, within, gate_cap)
  return _matmul(q, k, v, bias, mask, within, gate_cap, gate_eps)


def _capped(out: Array, share: Array, gate_cap: float) -> Array:
  """`out` of queries whose living keys have this share of the weight: the same, learnt less from where it is small."""
  if gate_cap >= GATE_CAP:
    return out
  learns = jnp.minimum(1.0, gate_cap * jax.lax.stop_gradient(share))
  return learns * out + jax.lax.stop_gradient((1.0 - learns) * out)


def _matmul(
  q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None, within: Array | None, gate_cap: float,
  gate_eps: float,
) -> Array:  # fmt: skip
  gate = mask if mask is not None and mask.dtype != bool else None
  k, v = (a if a.shape[1] == q.shape[1] else jnp.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
  logits = jnp.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
  if bias is not None:
    logits = logits + bias[:, None, None]
  if within is not None:
    logits = jnp.where(within, logits, -jnp.inf)
  if mask is not None and gate is None:
    logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    v = jnp.where(mask[:, None, :, None], v, 0)  # zero times NaN is NaN
  # Dividing after the product saves a pass over the map.
  product = functools.partial(jnp.einsum, "bhij,bhjd->bhid", preferred_element_type=jnp.float32)
  if gate is None:
    weight = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    return (product(weight.astype(v.dtype), v) / weight.sum(-1, keepdims=True)).astype(v.dtype)
  # So does a gate at the values; what a query that is switched off gives to itself is added.
  own = jnp.einsum("bhid,bhid->bhi", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)[..., None]
  own = own if bias is None else own + bias[:, None, :, None]  # (B, H, N, 1)
  if gate_eps:
    top = logits.max(-1, keepdims=True)  # with its gradient, for an epsilon beside the weights makes it count
  else:
    top = jnp.where(gate[:, None, :, None] > 0, -jnp.inf, own)
    top = jnp.maximum(top, jnp.where(gate[:, None, None] > 0, logits, -jnp.inf).max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)  # of those who count: their sum is 1 or more, whatever the dead say
  weight = jnp.exp(jnp.minimum(logits - top, jnp.log(GATE_CAP)))
  own = jnp.exp(own - top) * (1.0 - gate)[:, None, :, None]
  total = jnp.einsum("bhij,bj->bhi", weight, gate)[..., None] + own
  out = product(weight.astype(v.dtype), v * gate[:, None, :, None].astype(v.dtype))
  if gate_eps:
    out, total = out + gate_eps * v.mean(2, keepdims=True, dtype=jnp.float32), total + gate_eps
  return _capped((out + own * v) / total, total / (weight.sum(-1, keepdims=True) + own), gate_cap).astype(v.dtype)


def _fused(
  q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None, within: Array | None, gate_cap: float,
  causal: bool = False,
) -> Array:  # fmt: skip
  gate = mask if mask is not None and mask.dtype != bool else None
  if gate is not None and k.shape[1] != q.shape[1]:
    k, v = (jnp.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
  scale, dim = q.shape[-1] ** -0.5, q.shape[-1]
  lengths = None
  if mask is not None and gate is None:
    lengths = mask.sum(-1, dtype=jnp.int32)
    k, v = (jnp.where(mask[:, None, :, None], a, 0) for a in (k, v))
  plain_v = v
  if bias is not None:  # (q, 1 / scale) (k, log size): scaled along with the rest
    q = _append(q, jnp.full(q.shape[:3], 1 / scale, q.dtype))
    k = _append(k, jnp.broadcast_to(bias[:, None], k.shape[:3]).astype(k.dtype))
  if gate is not None:
    # Values (w v, w, 0): the last but one column is the share of the weight that is left.  One more key stands for the
    # query itself: its logit is q_i k_i, in two columns so that bfloat16 does not round it, and its value (0, 0, 1), so
    # the last column is e_ii in the same units.  (`return_residual` would give it too, but without a gradient.)
    own = jnp.einsum("bhid,bhid->bhi", q, k, preferred_element_type=jnp.float32)
    high = own.astype(q.dtype)
    q = _append(_append(q, high), (own - high.astype(jnp.float32)).astype(q.dtype))
    k = jnp.pad(k, ((0, 0), (0, 0), (0, 1), (0, 2))).at[:, :, -1, -2:].set(1)
    v = v * gate[:, None, :, None].astype(v.dtype)
    v = _append(v, jnp.broadcast_to(gate[:, None], v.shape[:3]).astype(v.dtype))
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 1), (0, 1))).at[:, :, -1, -1].set(1)
    within = None if within is None else jnp.pad(within, ((0, 0),) * 3 + ((0, 1),), constant_values=True)
  width = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8 if (bias is not None or gate is not None) else dim
  q, k, v = (jnp.pad(a, ((0, 0),) * 3 + ((0, width - a.shape[-1]),)).swapaxes(1, 2) for a in (q, k, v))
  # Left to itself, JAX takes its XLA path everywhere; cuDNN's kernel wants 16 bits and heads of at most 128.
  cudnn = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
  cudnn = cudnn and (within is None or within.shape[-1] % 2 == 0)  # nor is it trained with a mask of odd length
  out = jax.nn.dot_product_attention(
    q, k, v, mask=within, scale=scale, is_causal=causal, key_value_seq_lengths=lengths,
    implementation="cudnn" if cudnn else None,
  ).swapaxes(1, 2)  # fmt: skip
  if gate is None:
    return out[..., :dim]
  out = out.astype(jnp.float32)
  own = out[..., dim + 1] * (1.0 - gate[:, None])
  total = (out[..., dim] + own)[..., None]
  share = total / (1.0 - out[..., dim + 1] * gate[:, None])[..., None]  # who lives has itself among the keys
  out = out[..., :dim] + own[..., None] * plain_v
  drowned = total < 1 / GATE_CAP  # by the dead: what is left is divided, but teaches nothing
  plain = _capped(out / jnp.where(drowned, 1.0, total), share, gate_cap)
  rest = jax.lax.stop_gradient(out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny))
  return jnp.where(drowned, rest, plain).astype(plain_v.dtype)


def _append(a: Array, column: Array) -> Array:
  return jnp.concatenate([a, column[..., None]], axis=-1)


def cls_attention(
  q: Array, k: Array, *, size: Array | None = None, mask: Array | None = None, gate_eps: float = 0.0
) -> Array:
  """The row of CLS of the attention map, averaged over heads: (B, N) float32, one row of logits and no more."""
  logits = jnp.einsum("bhd,bhjd->bhj", q[:, :, 0], k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  if size is not None:
    logits = logits + jnp.log(size)[:, None]
  if mask is None:
    return jax.nn.softmax(logits).mean(1)
  if mask.dtype == bool:
    return jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf)).mean(1)
  if gate_eps:  # a head in which the dead are far louder says next to nothing
    weight = jnp.exp(logits - logits.max(-1, keepdims=True)) * mask[:, None]
    return ((weight + gate_eps / mask.shape[1]) / (weight.sum(-1, keepdims=True) + gate_eps)).mean(1)
  top = jax.lax.stop_gradient(jnp.where(mask[:, None] > 0, logits, -jnp.inf).max(-1, keepdims=True))
  weight = jnp.exp(jnp.minimum(logits - top, jnp.log(GATE_CAP))) * mask[:, None]
  return (weight / weight.sum(-1, keepdims=True)).mean(1)


def last_attention(
  q: Array, k: Array, *, last: Array | None = None, size: Array | None = None, mask: Array | None = None, **_: Any
) -> Array:
  """The row of one token of the causal map, averaged over heads: (B, N) float32, zero behind it.

  Args:
    q: (B, H, N, d).
    k: (B, H, N, d), or of fewer heads.
    last: (B,) int32, whose row; None: that of the token that stands last, of the living ones.
    size: (B, N) float32 weights of the keys.
    mask: (B, N), the living first; None: all.
  """
  batch, heads, n, dim = q.shape
  if last is None:
    last = jnp.full(batch, n - 1) if mask is None else jnp.maximum((mask > 0).sum(1) - 1, 0)
  row = jnp.take_along_axis(q, last[:, None, None, None], axis=2)[:, :, 0].reshape(batch, k.shape[1], -1, dim)
  logits = jnp.einsum("bhgd,bhjd->bhgj", row, k, preferred_element_type=jnp.float32) * dim**-0.5
  if size is not None:
    logits = logits + jnp.log(size)[:, None, None]
  seen = jnp.arange(n) <= last[:, None]
  return jax.nn.softmax(jnp.where(seen[:, None, None], logits, -jnp.inf)).reshape(batch, heads, n).mean(1)


ROWS = 256  # maps with more queries than this are computed in blocks of as many rows, and again in the backward pass


def vote(
  q: Array, k: Array, *, size: Array | None = None, mask: Array | None = None, rows: int = ROWS
) -> Callable[[Array], Array]:
  """The map p -> p A: every living query i gives p_i to the keys as its attention A_i tells.

  Args:
    q: (B, H, N, d); so is k.
    size: see `attend`; so is mask.
    rows: queries of a block; where N is larger no full map is held, and each call computes it again.

  Returns:
    A function of p, (B, H or 1, N) float32 to (B, H, N) float32; zero at dead keys, whatever the dead hold.
  """
  batch, heads, n, dim = q.shape
  gate = mask if mask is not None and mask.dtype != bool else None
  hard = mask if gate is None else None
  if hard is not None:  # a dead query is nobody's: any finite row will do
    q, k = (jnp.where(hard[:, None, :, None], a, 0) for a in (q, k))
    size = None if size is None else jnp.where(hard, size, 1.0)
  bias = jnp.zeros((batch, n), jnp.float32) if size is None else jnp.log(size)
  alive = jnp.ones((batch, n), jnp.float32) if mask is None else mask.astype(jnp.float32)

  def block(q: Array, first: Array | int) -> tuple[Array, Array]:
    """exp(logits) of some rows, (B, H, R, N), and their sums, (B, H, R)."""
    logits = jnp.einsum("bhid,bhjd->bhij", q * dim**-0.5, k, preferred_element_type=jnp.float32) + bias[:, None, None]
    if hard is not None:
      logits = jnp.where(hard[:, None, None], logits, -jnp.inf)
    weight = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    if gate is not None:
      own = jnp.arange(n) == first + jnp.arange(q.shape[2])[:, None]
      weight = weight * jnp.where(own, 1.0, gate[:, None, None])
    return weight, weight.sum(-1)

  def give(p: Array, weight: Array, total: Array) -> Array:
    return jnp.einsum("bhi,bhij->bhj", p / total, weight)

  if n <= rows:
    whole = block(q, 0)
    return lambda p: give(p * alive[:, None], *whole)
  blocks = -(-n // rows)

  def cut(a: Array) -> Array:  # (B, H, N, ...) to (blocks, B, H, rows, ...); the queries added at the end give nothing
    a = jnp.pad(a, ((0, 0), (0, 0), (0, blocks * rows - n), *((0, 0),) * (a.ndim - 3)))
    return jnp.moveaxis(a.reshape(*a.shape[:2], blocks, rows, *a.shape[3:]), 2, 0)

  def over_blocks(p: Array) -> Array:
    p = jnp.broadcast_to(p * alive[:, None], (batch, heads, n))

    @jax.checkpoint
    def step(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
      q, p, first = part
      return total + give(p, *block(q, first)), None

    start = jnp.zeros((batch, heads, n), jnp.float32)
    return jax.lax.scan(step, start, (cut(q), cut(p), jnp.arange(blocks) * rows))[0]

  return over_blocks


def column_mean(q: Array, k: Array, *, size: Array | None = None, mask: Array | None = None, rows: int = ROWS) -> Array:
  """Attention that each key receives, the mean over heads and living queries: (B, N) float32, in blocks of rows."""
  weight = jnp.ones(k.shape[:1] + k.shape[2:3], jnp.float32) if mask is None else mask.astype(jnp.float32)
  count = weight.sum(-1, keepdims=True)
  return vote(q, k, size=size, mask=mask, rows=rows)((1.0 / count)[:, None]).mean(1)


def pagerank(
  q: Array,
  k: Array,
  *,
  iterations: int,
  size: Array | None = None,
  mask: Array | None = None,
  spread: tuple[float, float] = (0.01, 0.7),
  rows: int = ROWS,
) -> Array:
  """Importance that tokens vote each other: (B, N) float32, zero where dead.  (Wang et al., 2024, arXiv:2305.17328)

  v_h = 1 / N;  v_h <- A_h^T v_h / ||.||_1, `iterations` times;  s = sqrt(mean over the heads in use of v_h^2)

  A head is in use if the variance of its importance lies in `spread`; if none is, all are.  The scale is our reading:
  of v, whose sum is 1, the variance could never exceed 1 / N, so it is that of N v, whose mean is 1.
  """
  batch, heads, n, _ = q.shape
  alive = jnp.ones((batch, 1, n), bool) if mask is None else (mask > 0)[:, None]
  count = alive.sum(-1, keepdims=True).astype(jnp.float32)
  receive = vote(q, k, size=size, mask=mask, rows=rows)

  def step(_: int, v: Array) -> Array:
    v = receive(v)
    return v / v.sum(-1, keepdims=True)

  v = jnp.broadcast_to(jnp.where(alive, 1.0 / count, 0.0), (batch, heads, n))
  v = jax.lax.fori_loop(0, iterations, step, v)
  variance = jnp.where(alive, jnp.square(v * count - 1.0), 0.0).sum(-1, keepdims=True) / count  # (B, H, 1)
  used = (variance >= spread[0]) & (variance <= spread[1])
  used = (used | ~used.any(1, keepdims=True)).astype(jnp.float32)
  square = (jnp.square(v) * used).sum(1) / used.sum(1)
  alive = alive[:, 0] & (square > 0)  # a root has no slope at zero
  return jnp.where(alive, jnp.sqrt(jnp.where(alive, square, 1.0)), 0.0)


FEATURES = {
  "cls_attention": lambda q, k, v, **kwargs: cls_attention(q, k, **kwargs),  # (B, N) float32
  "column_mean": lambda q, k, v, **kwargs: column_mean(q, k, **kwargs),  # (B, N) float32
  "last_attention": lambda q, k, v, **kwargs: last_attention(q, k, **kwargs),  # (B, N) float32
  "last_attention_ahead": lambda q, k, v, **kwargs: last_attention(q, k, **kwargs),
  "query": lambda q, k, v, **_: q.swapaxes(1, 2),  # (B, N, H, d)
  "key": lambda q, k, v, **_: k.swapaxes(1, 2),
  "value": lambda q, k, v, **_: v.swapaxes(1, 2),
}
FEATURES |= {  # (B, N) float32
  f"pagerank_{i}": lambda q, k, v, i=i, **kwargs: pagerank(q, k, iterations=i, **kwargs) for i in PAGERANK
}
