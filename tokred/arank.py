"""ARank: layers whose attention is of low rank are those that few tokens need.  (gamma-MoD, 2024, arXiv:2410.13859)"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokred.nn.decoder_layer import Attention
from tokred.tokens import Array


def rank_of(attention: Array, tolerance: float | None = None) -> Array:
  """Numerical rank of causal maps below the diagonal.

  Args:
    attention: (..., N, N) float32.
    tolerance: singular values above it count, as a share of the largest; None: N x 2^-23, that of the linear-algebra
      libraries, by which nearly every softmax map has full rank.

  Returns:
    (...,) int32.
  """
  n = attention.shape[-1]
  values = jnp.linalg.svd(jnp.tril(attention.astype(jnp.float32), -1), compute_uv=False)
  share = n * jnp.finfo(jnp.float32).eps if tolerance is None else tolerance
  return (values > share * values[..., :1]).sum(-1, dtype=jnp.int32)


def arank(module: Any, params: Any, batches: Iterable[Mapping[str, Any]], tolerance: float | None = None) -> np.ndarray:
  """Rank of each layer's attention, the mean over heads and rows of some batches (the authors take 50 rows).

  Args:
    module: a `Decoder`, or a `VLM`, without sites in the language model.
    params: of `module`.
    batches: arguments of the module, by name; padded rows count with what they have.
    tolerance: see `rank_of`; the authors leave it to the library.

  Returns:
    (layers,) float64.
  """
  names = lambda layer, _: isinstance(layer, Attention)

  @jax.jit
  def ranks(params: Any, batch: Any) -> Array:
    kinds = dict(mode="mask", capture_intermediates=names, mutable=["intermediates"])
    out, state = module.apply({"params": params}, **batch, **kinds)
    blocks = state["intermediates"].get("llm", state["intermediates"])
    alive = out.tokens.alive  # those that are there stand first
    each = []
    for layer in range(len(blocks)):
      q, k, _ = blocks[f"block_{layer}"]["attn"]["__call__"][0]
      k = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)
      logits = jnp.einsum("bhid,bhjd->bhij", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
      n = q.shape[2]
      logits = jnp.where(jnp.arange(n)[:, None] >= jnp.arange(n), logits, -jnp.inf)
      weight = jnp.where(alive[:, None, :, None], jax.nn.softmax(logits), 0.0)
      each.append(rank_of(weight, tolerance).mean(1))
    return jnp.stack(each, 1)  # (B, layers)

  rows = [np.asarray(ranks(params, dict(batch)), np.float64) for batch in batches]
  if not rows:
    raise ValueError("arank needs at least one batch")
  return np.concatenate(rows).mean(0)


def converted(ranks: np.ndarray, count: int, spare: tuple[int, ...] = (0,)) -> tuple[int, ...]:
  """The layers of lowest rank, for a site's `layers`, ascending; ties go to the deeper layer.

  Args:
    ranks: of `arank`.
    count: how many.
    spare: layers that stay dense, counted from the end where negative.  The authors' release asks no rank: it spares
      (0, 1, 2, -1) and converts all others.

  Raises:
    ValueError: fewer layers are left than asked for.
  """
  depth = len(ranks)
  free = [layer for layer in range(depth) if layer not in {s % depth for s in spare}]
  if not 1 <= count <= len(free):
    raise ValueError(f"count={count} layers of {depth}, of which {len(free)} may be converted; valid: 1 to {len(free)}")
  return tuple(sorted(sorted(free, key=lambda layer: (ranks[layer], -layer))[:count]))
