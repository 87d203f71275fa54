"""QTSplus: the question looks at the visual tokens, says which are relevant, and how many are needed.

(QTSplus, 2025)  Read in the authors' released code.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.rates import soft_threshold
from tokred.reducers.base import Planner, keep_top, parts, register
from tokred.tokens import Array, Plan, Tokens, straight_through

ROWS = 256  # queries of a block


class Heads(nn.Module):
  """Grouped queries and keys, (B, H, N, d) and (B, G, N, d), and values where they are asked for."""

  num_heads: int
  num_kv_heads: int
  values: bool

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, ...]:
    width = x.shape[-1]
    norm = lambda name: nn.RMSNorm(epsilon=1e-6, name=name)
    dim = width // self.num_heads
    project = lambda heads, name, x: nn.DenseGeneral((heads, dim), name=name)(x).swapaxes(1, 2)
    q = project(self.num_heads, "q", norm("q_norm")(x))
    keys = norm("kv_norm")(x)
    k = project(self.num_kv_heads, "k", keys)
    return (q, k, project(self.num_kv_heads, "v", keys)) if self.values else (q, k)


def _map(q: Array, k: Array, keys: Array, extra: Array | None = None) -> Array:
  """softmax over some keys, (B, G, H / G, rows, N); keys (B, N) bool, extra (B, N) added to their logits."""
  batch, _, rows, dim = q.shape
  q = q.reshape(batch, k.shape[1], -1, rows, dim) * dim**-0.5
  logits = jnp.einsum("bghid,bgjd->bghij", q, k)
  logits = logits if extra is None else logits + extra[:, None, None, None]
  return jax.nn.softmax(jnp.where(keys[:, None, None, None], logits, jnp.finfo(jnp.float32).min))


class Again(nn.Module):
  """x + attention(x), then x + FFN(x), among some tokens: (B, N, D) float32."""

  num_heads: int
  num_kv_heads: int

  @nn.compact
  def __call__(self, x: Array, among: Array, extra: Array | None) -> Array:
    q, k, v = Heads(self.num_heads, self.num_kv_heads, True, name="heads")(x)
    out = jnp.einsum("bghij,bgjd->bghid", _map(q, k, among, extra), v).reshape(q.shape).swapaxes(1, 2)
    x = x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False, name="o")(out)
    h = nn.Dense(4 * x.shape[-1], name="fc1")(nn.RMSNorm(epsilon=1e-6, name="ffn_norm")(x))
    return x + nn.Dense(x.shape[-1], name="fc2")(nn.gelu(h, approximate=False))


class Need(nn.Module):
  """rho in [low, high], (B,) float32, from the mean text, the number of visual tokens and their relevance."""

  low: float
  high: float

  @nn.compact
  def __call__(self, x: Array, r: Array, text: Array, visual: Array) -> Array:
    mean = jnp.where(text[..., None], x, 0.0).sum(1) / jnp.maximum(text.sum(1, keepdims=True), 1)
    p = r / jnp.maximum(r.sum(1, keepdims=True), 1e-12)
    entropy = -jnp.sum(jnp.where(visual, p * jnp.log(jnp.maximum(p, 1e-12)), 0.0), 1)
    count = jnp.log(jnp.maximum(visual.sum(1).astype(jnp.float32), 1.0))
    h = jnp.concatenate([mean, jnp.stack([count, r.max(1), entropy], -1)], -1)
    z = nn.Dense(1, name="fc2")(nn.gelu(nn.Dense(256, name="fc1")(h), approximate=False))[:, 0]
    return self.low + (self.high - self.low) * jax.nn.sigmoid(z)


@register("qtsplus")
class QTSplus(Planner):
  """r_i = max over heads and text of softmax_M(q k / sqrt d);  rho = MLP(text, log M, max r, entropy of r).

  The top ceil(rho M) of the M visual tokens stay, and a layer of self-attention tells them of one another.

  Training: gate = ST(top, sigmoid((r - t) / tau)) with t such that the sigmoids sum to rho M, which teaches relevance
  and budget; the release samples Gumbel noise instead, so that its count holds only on average.  The losses
  lambda_t (rho M)^2 / most^2 + lambda_m rho M / most pull the budget down; that of rho's running mean, which would need
  state, is left out.  `keep` bounds the share that may stay.
  """

  ragged: ClassVar[bool] = True
  idles: ClassVar[bool] = False
  places: ClassVar[tuple[str, ...]] = ("before",)
  stacks: ClassVar[tuple[str, ...]] = ("llm",)

  num_heads: int = 8
  num_kv_heads: int = 8
  low: float = 0.05
  high: float = 0.5
  most: int = 2560  # visual tokens of a row at most
  temperature: float = 0.1
  newton: int = 0  # steps of the release's solver; 0: bisection, which always ends at the root
  lambda_t: float = 1.0
  lambda_m: float = 1.7
  encode_again: bool = True
  repeat_last: bool = False  # as released: shorter rows are padded with their last token, and it is attended to

  def setup(self) -> None:
    self.heads = Heads(self.num_heads, self.num_kv_heads, False)
    self.need = Need(self.low, self.high)
    if self.encode_again:
      self.again = Again(self.num_heads, self.num_kv_heads)

  def count(self, keep: float, n: int, protected: int, source: int) -> int:
    free = n - protected
    return min(n, min(math.ceil(min(keep, self.high + 1e-6) * free), self.most) + protected)

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    keys = width * self.num_kv_heads / self.num_heads
    again = left * width * (10 * width + 2 * keys) + 2 * left * left * width if self.encode_again else 0.0
    return n * width * (width + keys) + n * n * width + again

  def relevance(self, x: Array, text: Array, visual: Array) -> Array:
    """(B, N) float32, zero where there is no visual token."""
    q, k = self.heads(x)
    n = x.shape[1]
    if n <= ROWS:
      top = jnp.where(text[:, None, None, :, None], _map(q, k, visual), 0.0).max((1, 2, 3))
    else:
      blocks = -(-n // ROWS)
      pad = blocks * ROWS - n
      q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0))).reshape(*q.shape[:2], blocks, ROWS, -1)
      asks = jnp.pad(text, ((0, 0), (0, pad))).reshape(len(text), blocks, ROWS)

      @jax.checkpoint
      def block(top: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        q, asks = part
        return jnp.maximum(top, jnp.where(asks[:, None, None, :, None], _map(q, k, visual), 0.0).max((1, 2, 3))), None

      start = jnp.zeros(text.shape, jnp.float32)
      top = jax.lax.scan(block, start, (jnp.moveaxis(q, 2, 0), jnp.moveaxis(asks, 1, 0)))[0]
    return jnp.where(visual, top, 0.0)

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    text, visual = parts(tokens)
    x = jnp.where(tokens.alive[..., None], tokens.x, 0).astype(jnp.float32)
    r = self.relevance(x, text, visual)
    rho = self.need(x, r, text, visual)
    total, others = visual.sum(1), tokens.alive.sum(1) - visual.sum(1)
    wanted = rho * total
    n = jnp.clip(jnp.ceil(jax.lax.stop_gradient(wanted)), 1, self.most).astype(jnp.int32)
    plan = keep_top(tokens, r, jnp.minimum(n + others, jnp.asarray(keep, jnp.int32)).astype(jnp.int32))
    report = {"score": r, "share": rho, "count": wanted + others}
    report["loss_budget"] = self.lambda_t * (wanted / self.most) ** 2 + self.lambda_m * wanted / self.most
    if train:
      t = soft_threshold(r, visual, wanted, self.temperature, self.newton)
      soft = jax.nn.sigmoid((r - t[:, None]) / self.temperature)
      plan = plan.replace(gate=jnp.where(visual, straight_through(plan.owner >= 0, soft), 1.0))
    return plan, report

  def __call__(self, tokens: Tokens, keep: Any, **kwargs: Any) -> tuple[Tokens, dict[str, Array]]:
    tokens, report = super().__call__(tokens, keep, **kwargs)
    if not self.encode_again:
      return tokens, report
    among, extra = parts(tokens)[1], None
    x = jnp.where(tokens.alive[..., None], tokens.x, 0).astype(jnp.float32)
    if self.repeat_last:
      count = among.sum(1, keepdims=True)
      last = jnp.argmax(jnp.where(among, tokens.position, -1), axis=1, keepdims=True)
      extra = jnp.where(jnp.arange(x.shape[1]) == last, jnp.log1p(count.max() - count), 0.0)
    x = self.again(x, among, extra)
    return tokens.replace(x=jnp.where(among[..., None], x.astype(tokens.x.dtype), tokens.x)), report
