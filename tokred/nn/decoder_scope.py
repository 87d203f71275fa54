"""Tokens that go round a layer of a language model, and keys and values that some heads do without."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from tokred import tokens as tk
from tokred.layout import Spot
from tokred.rates import Rows, Threshold
from tokred.tokens import APPENDED, Array, Tokens

INDEX = "state/index"  # a token's place in its row's sequence
ROUTE = "route_ahead"  # what the shared router says of each token


class SharedRouter(nn.Module):
  """One router for all layers, text and images: (B, N, D) to its two logits, (B, N, 2) float32, round and through.

  (Luo et al., 2024, gamma-MoD, arXiv:2410.13859)
  """

  @nn.compact
  def __call__(self, x: Array) -> Array:
    start = nn.initializers.normal(0.02)
    kernel = self.param("kernel", start, (x.shape[-1], 2), jnp.float32)
    return jnp.einsum("bnd,dc->bnc", x.astype(jnp.float32), kernel, precision="highest")


@struct.dataclass
class Scope:
  """What goes round a layer while others go through."""

  outer: Tokens  # that arrived
  weight: Array  # (B, N) float32 of each token's update
  mlp: Array | None  # (B, K) float32 of what the MLP gives to those inside; None: 1

  def leave(self, inner: Tokens) -> Tokens:
    """All that arrived, with what the layer did to those inside."""
    return tk.bypass(self.outer, inner, self.weight)


def enter(run: Callable[[Tokens], tuple[Tokens, dict[str, Any]]], outer: Tokens, spot: Spot) -> tuple[Tokens, Scope]:
  """Those that go in, whose owners count the tokens of `outer` as sources.

  Args:
    run: the reducer: Tokens to Tokens, in the order of the sequence, and what it reports.
    outer: N tokens.
    spot: around the layer.
  """
  text = spot.module(parent=None).text
  index = jnp.broadcast_to(jnp.arange(outer.x.shape[1], dtype=jnp.int32), outer.mask.shape)
  protected = jnp.zeros_like(outer.protected) if text else outer.protected
  inner, report = run(outer.replace(owner=index, protected=protected))
  read = lambda name: next((v for key, r in report.items() if key.endswith(name) for v in r.values()), None)
  weight, mlp = read("/update_weight"), read("/mlp_weight")
  one = jnp.ones(outer.mask.shape, jnp.float32)
  weight = one if weight is None else jnp.where(protected, 1.0, weight)  # text goes through as ever
  if mlp is not None:
    mlp = jnp.where(protected, 1.0, mlp)
    member = jnp.where(inner.owner >= 0, inner.owner, inner.x.shape[1])  # each stands for itself alone
    place = tk.inverse(tk.rank(member))[:, : inner.x.shape[1]]
    mlp = jnp.where(inner.alive, tk.take(mlp, place), 0.0)
  return inner, Scope(outer, weight, mlp)


def one_more(x: Array, spot: Spot, route: Array | None) -> tuple[Tokens, dict[str, Any]]:
  """A token that decoding appends, and the counts with which it decides for itself.

  Args:
    x: (B, 1, D).
    spot: around the layer.
    route: (B, 1, 2) of the shared router, if the spot reads it.
  """
  one, zero = jnp.ones(x.shape[:2], bool), jnp.zeros(x.shape[:2], jnp.int32)
  feats = {INDEX: zero, APPENDED: one} | ({} if route is None else {ROUTE: route})
  tokens = Tokens(x, one, one.astype(jnp.float32), zero, zero, one, feats)
  nothing = zero[:, 0]  # of the prompt, of which there is nothing here
  keep = Threshold(spot.threshold, 1, nothing) if spot.rate == "threshold" else Rows(nothing, 1)
  return tokens, {spot.site: (keep,) * (spot.index + 1)}


def gated(mix: Any, q: Array, k: Array, v: Array, gate: Array, mask: Array, order: Array) -> Array:
  """Attention to keys that each head holds or has evicted; a token always sees itself.

  Args:
    mix: `attention.attend`.
    q: (B, H, N, d).
    k: (B, heads, N, d); so is v.
    v: see k.
    gate: (B, heads, N) float32, 1 held and 0 evicted, straight-through.
    mask: (B, N) of the tokens, bool or float32: the dead have kept their places in the sequence.
    order: (B, N) int32 these places.

  Returns:
    (B, H, N, d).
  """
  batch, heads, n, dim = k.shape
  gate = gate * mask[:, None]
  flat = lambda a: a.reshape(batch * heads, -1, n, dim)
  order = jnp.repeat(order, heads, axis=0)
  out = mix(flat(q), flat(k), flat(v), mask=gate.reshape(batch * heads, n), causal=order)
  return out.reshape(q.shape)
