"""A block of a transformer, with the places where reducers act."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from tokred import tokens as tk
from tokred.layout import PLACES, Sites
from tokred.nn import attention
from tokred.nn.reduce import Reduce
from tokred.nn.rope import rope2d, turn
from tokred.nn.shared_rows import Shared, shared
from tokred.reducers.peaks import PeakPlan, peaks
from tokred.tokens import Array, Tokens


class Projection(nn.Module):
  """Queries, keys and values: (B, N, D) to some of (q, k, v), (B, H, N, d) each."""

  num_heads: int
  use_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, wanted: slice = slice(0, 3)) -> Array:
    width = x.shape[-1]
    shape = (3, self.num_heads, width // self.num_heads)

    def kernel(key: Array, *_: Any) -> Array:
      return nn.initializers.lecun_normal()(key, (width, 3 * width), jnp.float32).reshape(width, *shape)

    weight = self.param("kernel", kernel).astype(self.dtype)[:, wanted]
    out = jnp.einsum("bnd,dche->bnche", x.astype(self.dtype), weight)
    if self.use_bias:
      out = out + self.param("bias", nn.initializers.zeros, shape, jnp.float32).astype(self.dtype)[wanted]
    return out.transpose(2, 0, 3, 1, 4)


class Attention(nn.Module):
  """Multi-head self-attention in its steps, for a reducer may act between the map and the values."""

  width: int
  num_heads: int
  qkv_bias: bool = True
  qk_norm: bool = False
  dtype: Any = jnp.float32
  impl: str = "auto"
  norm_eps: float = 1e-6
  gate_cap: float = attention.GATE_CAP
  gate_eps: float = 0.0

  def setup(self) -> None:
    self.qkv = Projection(self.num_heads, self.qkv_bias, self.dtype)
    self.proj = nn.DenseGeneral(self.width, axis=(-2, -1), dtype=self.dtype)
    if self.qk_norm:
      self.q_norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)
      self.k_norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype)

  def __call__(self, x: Array) -> tuple[Array, Array, Array]:
    """(B, N, D) to queries, keys and values, (B, H, N, d) each."""
    q, k, v = self.qkv(x)
    return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

  def values(self, x: Array) -> Array:
    """Values alone, (B, H, N, d)."""
    return self.qkv(x, slice(2, 3))[0]

  def mix(
    self, q: Array, k: Array, v: Array, size: Array | None, mask: Array | None, segment: Array | None = None
  ) -> Array:
    """Each query's average of the values, (B, N, H, d)."""
    kinds = dict(impl=self.impl, gate_cap=self.gate_cap, gate_eps=self.gate_eps)
    return attention.attend(q, k, v, size=size, mask=mask, segment=segment, **kinds).swapaxes(1, 2)

  def out(self, heads: Array) -> Array:
    """(B, N, H, d) to (B, N, D)."""
    return self.proj(heads)


def gelu(x: Array) -> Array:
  """Exact GELU.  jax.nn.gelu asks for erfc, which takes three times as long on CPU and differs by 1e-7."""
  return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


ACTIVATIONS = {
  "gelu": gelu,
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
}


class Mlp(nn.Module):
  """fc2(act(fc1 x)); gated, fc2(act(gate x) * fc1 x).  (Shazeer, 2020, SwiGLU and others, arXiv:2002.05202)"""

  hidden: int
  dtype: Any = jnp.float32
  activation: str = "gelu"
  gated: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    activation = ACTIVATIONS[self.activation]
    h = nn.Dense(self.hidden, dtype=self.dtype, name="fc1")(x)
    h = activation(nn.Dense(self.hidden, dtype=self.dtype, name="gate")(x)) * h if self.gated else activation(h)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


@struct.dataclass
class Scope:
  """What goes round while others go through."""

  outer: Tokens  # that arrived
  weight: Array | None  # (B, N) of each token's update
  residual: Array | None  # (B, N, D) what every token gets, whether it went through or not

  def leave(self, inner: Tokens) -> Tokens:
    """All that arrived, with what the scope did to those inside."""
    outer = tk.bypass(self.outer, inner, self.weight)
    return outer if self.residual is None else outer.replace(x=outer.x + self.residual.astype(outer.x.dtype))


class Block(nn.Module):
  """x + MHSA(LN x), x + MLP(LN x), with places for reducers in, before, behind and around it."""

  config: Any  # config.model, frozen
  shape: Any  # sizes: width, depth, mlp_dim, num_heads
  sites: Sites
  layer: int

  @nn.compact
  def __call__(
    self, tokens: Tokens, scope: Scope | None, keeps: Mapping[str, Array] | None, train: bool, mode: str
  ) -> tuple[Tokens, Scope | None, dict[str, Any]]:
    layer, aux = self.layer, {}
    reduce = Reduce(self.sites.at(layer, *PLACES[:-1]), name="reduce")
    run = functools.partial(_run, functools.partial(reduce, keeps=keeps, train=train, mode=mode))
    tokens = run(tokens, "before", aux)
    if self.sites.at(layer, "around"):
      tokens, scope = self._enter(tokens, "around", aux, run)
    tokens, acted = self._attend(tokens, aux, run, keeps, mode, train)
    tokens = run(tokens, "attn", aux, part=slice(acted, None))
    tokens = self._feed(tokens, aux, run, mode, train)
    if scope is not None and "outer" in self.sites.needs(layer):
      tokens = tokens.replace(feats=tokens.feats | {"outer": scope.outer.visible})
    tokens = run(tokens, "after", aux)
    if scope is not None:  # an MLP inside a scope says nothing of those that go round both
      aux.pop("inside", None)
    if self.sites.closes(layer):
      aux["inside"] = {layer: tk.follow(scope.outer.owner, tokens.owner)}
      tokens, scope = scope.leave(tokens), None
    return tokens, scope, aux

  def _enter(self, outer: Tokens, place: str, aux: dict[str, Any], run: Any) -> tuple[Tokens, Scope]:
    """Those that go in, whose owners count the tokens of `outer` as sources; what leaves is written down."""
    index = jnp.broadcast_to(jnp.arange(outer.x.shape[1], dtype=jnp.int32), outer.mask.shape)
    report: dict[str, Any] = {}
    inner = run(outer.replace(owner=index), place, report)
    aux.update(report)
    read = lambda what: next((v for name, r in report.items() if name.endswith(what) for v in r.values()), None)
    return inner, Scope(outer, read("/update_weight"), read("/residual"))

  def _attend(
    self, tokens: Tokens, aux: dict[str, Any], run: Any, keeps: Any, mode: str, train: bool
  ) -> tuple[Tokens, int]:
    """x + MHSA(LN x), with features for the reducers; those ahead of it get the map, and it gets their tokens.

    Also, how many reducers at "attn" have acted: one that foresees whom it drops spares them the asking.
    """
    c, layer, dtype, shape = self.config, self.layer, jnp.dtype(self.config.dtype), self.shape
    mask = tokens.mask if self.sites.masked(layer, mode) else None
    size = tokens.size if self.sites.proportional(layer, mode) else None
    kinds = (c.qkv_bias, c.qk_norm, dtype, c.attention, c.norm_eps, c.gate_cap, c.gate_eps)
    attend = Attention(shape.width, shape.num_heads, *kinds, name="attn")
    norm = nn.LayerNorm(epsilon=c.norm_eps, dtype=dtype, name="norm1")
    needs, ahead = self.sites.needs(layer), self.sites.at(layer, "ahead")
    segment = tokens.feats.get("state/segment")  # images share a row: it tells who is alive, too
    rows = None if ahead else self._shared(tokens, self.sites.means().attention, mode)
    mask = mask if rows is None else rows.inside
    q, k, v, size, feats = self._look(attend, norm, tokens, size, mask, rows)
    if not ahead or (mode == "gather" and ahead[0].idle and ahead[0].site not in (keeps or {})):
      run(tokens.replace(feats=feats), "ahead", aux)  # says that all stay
    else:
      inner, around = self._enter(tokens.replace(feats=feats), "ahead", aux, run)
      merged = inner.replace(owner=tk.follow(tokens.owner, inner.owner))
      if plans := aux.pop(f"reduce/{ahead[0].site}/plan", {}):  # the rows of the map that is there are pooled alike
        (plan,) = plans.values()
        update = self._ahead(attend, norm, inner, around.outer, (q, k, size, mask), plan, mode)
        feats = inner.feats | ({"update": update} if "update" in needs else {})
        return merged.replace(x=inner.x + self._drop(update, "1", train), feats=feats), 0
      tokens, mask = merged, merged.mask if mode == "mask" or mask is not None else None
      size = merged.size if ahead[0].proportional or size is not None else None
      q, k, v, size, feats = self._look(attend, norm, tokens, size, mask)
    early = mode == "gather" and mask is None and segment is None and self.sites.foreseen(layer)
    if early:
      tokens = run(tokens.replace(feats=feats | {"asking": q.swapaxes(1, 2)}), "attn", aux, part=slice(0, 1))
      feats = dict(tokens.feats)
      q = feats.pop("asking").swapaxes(1, 2)
    heads = attend.mix(q, k, v, size, mask if segment is None else None, segment)
    update = self._scale(attend.out(heads) if rows is None else rows.run(attend.out, heads), "1")
    feats |= {"update": update} if "update" in needs else {}
    return tokens.replace(x=tokens.x + self._drop(update, "1", train), feats=feats), int(early)

  def _look(
    self,
    attend: Attention,
    norm: nn.Module,
    tokens: Tokens,
    size: Array | None,
    mask: Array | None,
    rows: Shared | None = None,
  ) -> tuple[Array, Array, Array, Array | None, dict[str, Array]]:
    """Queries, keys and values, (B, H, N, d) each, the sizes that bias attention, and features for the reducers."""
    if size is not None and mask is not None and mask.dtype == bool:
      size = jnp.where(mask, size, 1.0)
    look = lambda x: attend(norm(x))
    if rows is None:
      q, k, v = look(tokens.x)
    else:
      heads_last = lambda x: tuple(each.swapaxes(1, 2) for each in look(x))
      q, k, v = (each.swapaxes(1, 2) for each in rows.run(heads_last, tokens.x))
    if self.config.position == "rope2d":
      turns = rope2d(self.shape.grid, self.shape.num_prefix_tokens, q.shape[-1], self.config.rope_theta)
      angles = jnp.asarray(turns)
      q, k = turn(q, angles, tokens.position), turn(k, angles, tokens.position)
    feats = {name: value for name, value in tokens.feats.items() if name.startswith("state/")}
    known = [name for name in self.sites.needs(self.layer) if name in attention.FEATURES]
    kinds = {n: {"gate_eps": self.config.gate_eps} if n == "cls_attention" else {} for n in known}
    feats |= {n: attention.FEATURES[n](q, k, v, size=size, mask=mask, **own) for n, own in kinds.items()}
    return q, k, v, size, feats

  def _ahead(
    self,
    attend: Attention,
    norm: nn.Module,
    inner: Tokens,
    outer: Tokens,
    seen: tuple[Any, ...],
    plan: tk.Plan,
    mode: str,
  ) -> Array:
    """What attention of the unmerged tokens adds to the merged ones, (B, N, D); `seen` is q, k, size and mask."""
    q, k, size, mask = seen
    v, count = attend.values(norm(inner.x)), inner.x.shape[1]

    def pool(heads: Array) -> Array:
      rows = outer.replace(x=heads.reshape(*heads.shape[:2], -1), feats={})
      rows = peaks(rows, plan)
      rows = tk.compact(rows, plan, count) if mode == "gather" else tk.fold(rows, plan)
      return rows.x.reshape(*rows.x.shape[:2], *heads.shape[2:])

    # A dead token is nobody's, but what it would have said teaches its gate.
    index = jnp.where(inner.owner >= 0, inner.owner, jnp.minimum(tk.inverse(plan.order), count - 1))
    if isinstance(plan, PeakPlan):  # the largest of A C is not that of A C v
      ones = jax.nn.one_hot(index, count, dtype=v.dtype)[:, None]
      kinds = dict(size=size, mask=mask, impl="matmul", gate_cap=self.config.gate_cap)
      columns = attention.attend(q, k, ones, **kinds).swapaxes(1, 2)
      heads = jnp.einsum("bmhk,bhkd->bmhd", pool(columns), v)
    else:
      heads = pool(attend.mix(q, k, tk.take(v.swapaxes(1, 2), index).swapaxes(1, 2), size, mask))
    return self._scale(attend.out(heads), "1")

  def _feed(self, tokens: Tokens, aux: dict[str, Any], run: Any, mode: str, train: bool) -> Tokens:
    """x + MLP(LN x) of those that do not go round it, with what it adds as a feature for the reducers behind it."""
    inner, around = self._enter(tokens, "mlp", aux, run) if self.sites.at(self.layer, "mlp") else (tokens, None)
    rows = self._shared(inner, self.sites.means().mlp, mode)
    update = self._mlp(inner.x) if rows is None else rows.run(self._mlp, inner.x)
    out = inner.replace(x=inner.x + self._drop(update, "2", train))
    if around is not None:
      aux["inside"] = {self.layer: tk.follow(tokens.owner, inner.owner)}
      out = around.leave(out)
    if "mlp_update" not in self.sites.needs(self.layer):
      return out
    if around is not None:
      still = around.replace(outer=tokens.replace(x=jnp.zeros_like(tokens.x)))
      update = still.leave(inner.replace(x=update)).x
    return out.replace(feats=out.feats | {"mlp_update": update})

  def _shared(self, tokens: Tokens, means: tuple[float, ...], mode: str) -> Shared | None:
    """Rows for as many tokens as images have here in the mean, where some site says so and there are more places."""
    (number, n), told = tokens.mask.shape, any(spot.mean for spot in self.sites.spots)
    if mode != "gather" or not told or type(number) is not int or "state/segment" in tokens.feats:
      return None  # an export for any batch knows no number
    rows = max(math.ceil(number * means[self.layer]), n)  # an image alone has room, whatever the mean
    return shared(tokens.alive, rows) if rows < number * n else None

  def _mlp(self, x: Array) -> Array:
    dtype = jnp.dtype(self.config.dtype)
    norm = nn.LayerNorm(epsilon=self.config.norm_eps, dtype=dtype, name="norm2")
    mlp = Mlp(self.shape.mlp_dim, dtype, self.config.activation, self.shape.gated, name="mlp")
    return self._scale(mlp(norm(x)), "2")

  def _scale(self, update: Array, name: str) -> Array:
    """LayerScale: what the branch adds, which is what a reducer reads of it."""
    if not self.config.layer_scale:
      return update
    init = nn.initializers.constant(self.config.layer_scale)
    return update * self.param(f"layer_scale{name}", init, (update.shape[-1],), jnp.float32).astype(update.dtype)

  def _drop(self, update: Array, name: str, train: bool) -> Array:
    """Stochastic depth (a whole sample's branch at a time), also where nothing else trains but a stream "depth" is."""
    rate = self.config.drop_path * self.layer / max(self.shape.depth - 1, 1)
    stream = "dropout" if train else "depth"
    return nn.Dropout(rate, broadcast_dims=(1, 2), name=f"drop_path{name}", rng_collection=stream)(
      update, deterministic=not train and not self.has_rng("depth")
    )


def _run(reduce: Any, tokens: Tokens, place: str, aux: dict[str, Any], **part: slice) -> Tokens:
  """The spots of a place, or part of them; adds what they report to `aux`."""
  tokens, report = reduce(tokens, place, **part)
  aux.update({name: aux.get(name, {}) | values for name, values in report.items()})
  return tokens
