"""Attention over weighted keys without a (token, token) mask, and the features that reducers ask of it.

With e_ij = exp(q_i k_j / sqrt(d)) and w_j >= 0 the weight of key j:

  size     w_j = size_j                     log(w_j) is added to the logits of a key; on GPU it rides in the keys
  gate     w_j in {0, 1}, learned through   out_i = (sum_j e_ij w_j v_j + e_ii (1 - w_i) v_i) / (the same without v)
  mask     w_j in {0, 1}, nothing learned   a length per row: survivors are a prefix

A gate multiplies after the exponential: the gradient then reaches keys that are switched off, which adding log(w) would
kill, and a dead token keeps itself (Rao et al., 2021, DynamicViT; Chen et al., 2023, DiffRate).
"""

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.tokens import Array

IMPLEMENTATIONS = ("auto", "matmul", "fused")


def implementation(name: str) -> str:
  """ "auto" is "fused" on GPU and TPU; on CPU two products in (batch, head, token, dim) layout are twice as fast."""
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"config.model.attention={name!r} is not an implementation; {nearest(name, IMPLEMENTATIONS)}")
  if name == "auto":
    return "matmul" if jax.default_backend() == "cpu" else "fused"
  return name


def attend(
  q: Array, k: Array, v: Array, *, size: Array | None = None, mask: Array | None = None, impl: str = "auto"
) -> Array:
  """Softmax attention.

  Args:
    q: (B, H, N, d); so are k and v.
    size: (B, N) float32 positive weights of the keys; None: ones.
    mask: (B, N); bool masks dead keys (they must follow the survivors), float32 gates them and passes gradients;
      None: all alive.
    impl: "auto", "matmul" or "fused".

  Returns:
    (B, H, N, d) of the dtype of v.  Rows of dead queries are finite if q, k and v are.
  """
  kernel = _fused if implementation(impl) == "fused" else _matmul
  return kernel(q, k, v, None if size is None else jnp.log(size), mask)


def _matmul(q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None) -> Array:
  gate = mask if mask is not None and mask.dtype != bool else None
  logits = jnp.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
  if bias is not None:
    logits = logits + bias[:, None, None]
  if mask is not None and gate is None:
    logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    v = jnp.where(mask[:, None, :, None], v, 0)  # zero times NaN is NaN
  # The largest logit is taken over dead keys too where gates learn, so that their exponentials stay finite.
  weight = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  if gate is not None:
    own = jnp.eye(q.shape[2], dtype=bool)
    weight = weight * jnp.where(own, 1.0, gate[:, None, None])
  # Dividing after the product saves a pass over the map.
  total = weight.sum(-1, keepdims=True)
  out = jnp.einsum("bhij,bhjd->bhid", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return (out / total).astype(v.dtype)


def _fused(q: Array, k: Array, v: Array, bias: Array | None, mask: Array | None) -> Array:
  gate = mask if mask is not None and mask.dtype != bool else None
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
  width = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8 if (bias is not None or gate is not None) else dim
  q, k, v = (jnp.pad(a, ((0, 0),) * 3 + ((0, width - a.shape[-1]),)).swapaxes(1, 2) for a in (q, k, v))
  # Left to itself, JAX takes its XLA path everywhere; cuDNN's kernel wants 16 bits and heads of at most 128.
  cudnn = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
  out = jax.nn.dot_product_attention(
    q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn" if cudnn else None
  ).swapaxes(1, 2)
  if gate is None:
    return out[..., :dim]
  out = out.astype(jnp.float32)
  own = out[..., dim + 1] * (1.0 - gate[:, None])
  total = out[..., dim] + own
  return ((out[..., :dim] + own[..., None] * plain_v) / total[..., None]).astype(plain_v.dtype)


def _append(a: Array, column: Array) -> Array:
  return jnp.concatenate([a, column[..., None]], axis=-1)


def cls_attention(q: Array, k: Array, *, size: Array | None = None, mask: Array | None = None) -> Array:
  """The row of CLS of the attention map, averaged over heads: (B, N) float32, one row of logits and no more."""
  logits = jnp.einsum("bhd,bhjd->bhj", q[:, :, 0], k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  if size is not None:
    logits = logits + jnp.log(size)[:, None]
  if mask is None:
    return jax.nn.softmax(logits).mean(1)
  if mask.dtype == bool:
    return jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf)).mean(1)
  weight = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))) * mask[:, None]
  return (weight / weight.sum(-1, keepdims=True)).mean(1)


FEATURES = {
  "cls_attention": lambda q, k, v, **kwargs: cls_attention(q, k, **kwargs),  # (B, N) float32
  "query": lambda q, k, v, **_: q.swapaxes(1, 2),  # (B, N, H, d)
  "key": lambda q, k, v, **_: k.swapaxes(1, 2),
  "value": lambda q, k, v, **_: v.swapaxes(1, 2),
}
