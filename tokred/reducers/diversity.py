"""Diverse subsets, one token after another: farthest-first traversal, and maximal marginal relevance.

Both take next the token of largest  worth_i - penalty max_{j taken} cos(z_i, z_j).  What is left to win never grows, so
that a threshold on it is a count.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, keep_top, register
from tokred.reducers.tome import unit
from tokred.scores import FORESEEN, SCORES
from tokred.tokens import Array, Plan, Tokens, take

STARTS = ("central", "isolated")
METRICS = {"key": ("key",), "token": ()}  # what tokens are compared by -> features that it reads


def compared(tokens: Tokens, metric: str) -> Array:
  """What tokens are compared by, (B, N, d) float32 outside the gradient: keys averaged over heads, or x."""
  if metric == "token":
    return jax.lax.stop_gradient(tokens.x).astype(jnp.float32)
  return jax.lax.stop_gradient(tokens.feats["key"]).astype(jnp.float32).mean(2)


def valid_metric(metric: str) -> tuple[str, ...]:
  """Features that a metric reads.

  Raises:
    ValueError: the metric is unknown.
  """
  if metric not in METRICS:
    raise ValueError(f"metric={metric!r} is not a metric; {nearest(metric, METRICS)}")
  return METRICS[metric]


def cosines(z: Array) -> Array:
  """(B, N, N) float32, for z of unit length (or zero)."""
  return jnp.einsum("bid,bjd->bij", z, z, precision="highest")


def take_in_turn(
  tokens: Tokens, similar: Array, first: Array, worth: Array | float, penalty: float, steps: int, at_once: int = 1
) -> tuple[Array, Array]:
  """The protected tokens in their order, then greedily; these are compared with each other only, not with CLS.

  Args:
    tokens: N tokens.
    similar: (B, N, N) float32 cosines, finite.
    first: (B, N) decides about the first of them; ties here and later go to the lower index.
    worth: (B, N) or a number.
    penalty: of the largest similarity to those taken.
    steps: how many are taken, the protected counted.
    at_once: so many of those that are not protected are taken before similarities are looked at again.

  Returns:
    The turn of each token, (B, N) int32, N for what is not taken; and what there was to win then, (B, N) float32, for
    the first as if its opposite had been taken.
  """
  n = similar.shape[1]
  index = jnp.arange(n)
  lowest, none = jnp.finfo(jnp.float32).min, -2.0  # no cosine is as low as `none`

  safe = (tokens.alive & tokens.protected).sum(1, keepdims=True, dtype=jnp.int32)

  def step(time: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
    turn, value, closest, pending = state
    closest = jnp.where((time - safe) % at_once == 0, pending, closest)
    left = worth - penalty * jnp.maximum(closest, -1.0)
    key = jnp.where(tokens.protected, jnp.inf, jnp.where(closest > none, left, first))
    key = jnp.where(turn < n, -jnp.inf, jnp.where(tokens.alive, key, lowest))
    pick = jnp.argmax(key, axis=1)[:, None].astype(jnp.int32)
    near = jnp.maximum(pending, take(similar, pick)[:, 0])
    pending = jnp.where(take(tokens.protected, pick), pending, near)
    chosen = index == pick
    return jnp.where(chosen, time, turn), jnp.where(chosen, left, value), closest, pending

  shape = tokens.mask.shape
  state = jnp.full(shape, n, jnp.int32), jnp.full(shape, lowest), jnp.full(shape, none), jnp.full(shape, none)
  turn, value, *_ = jax.lax.fori_loop(0, steps, step, state)
  return turn, value


def farthest_first(tokens: Tokens, z: Array, keep: Any, first: Array | None = None) -> tuple[Array, Array]:
  """`take_in_turn` by 1 - max cos, for z (B, N, d) of unit length; the start is the most central, or by `first`."""
  n = z.shape[1]
  if first is None:
    first = jnp.einsum("bnd,bd->bn", z, z.sum(1), precision="highest")
  steps = min(keep, n) if isinstance(keep, int) else n
  return take_in_turn(tokens, cosines(z), first, 1.0, 1.0, steps)


def isolation(tokens: Tokens, z: Array) -> Array:
  """min_{j other} (1 - cos(z_i, z_j)), (B, N) float32: how far the nearest other free token is."""
  free = tokens.alive & ~tokens.protected
  other = free[:, None] & ~jnp.eye(z.shape[1], dtype=bool)
  return 1.0 - jnp.where(other, cosines(z), -1.0).max(-1)


@register("maxmin")
class MaxMin(Planner):
  """Farthest-first: the next token is argmax_i min_{j taken} (1 - cos(z_i, z_j)).  (Gonzalez, 1985)

  The first is the most central one, argmax_i z_i . sum_j z_j, or the best by a score: on this the result depends.
  DivPrune (Alvar et al., 2025, arXiv:2503.02175) starts with the token whose nearest other is farthest: metric="token",
  start="isolated", raster=True where a language model begins.  ToDRE's first stage (Li et al., 2025, arXiv:2505.18757)
  starts with the longest: start="token_norm".
  """

  conserves: ClassVar[bool] = False
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  metric: str = "key"  # key, token
  start: str = "central"  # central, isolated, or a name of tokred.scores.SCORES
  raster: bool = False  # survivors keep their order; otherwise they stand in the order in which they were taken

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.start not in STARTS and self.start not in SCORES:
      raise ValueError(f"start={self.start!r} is not a start; {nearest(self.start, [*STARTS, *SCORES])}")
    scored = () if self.start in STARTS else SCORES[self.start][1]
    return tuple(sorted({*valid_metric(self.metric), *scored}))

  def foresees(self) -> bool:
    return self.metric == "key" and self.start in (*STARTS, *FORESEEN)

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * n * (width if self.metric == "token" else width / num_heads)

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    z = unit(compared(tokens, self.metric), tokens.alive & ~tokens.protected)
    if self.start in STARTS:
      first = isolation(tokens, z) if self.start == "isolated" else None
    else:
      first = jax.lax.stop_gradient(SCORES[self.start][0](tokens))
    turn, distance = farthest_first(tokens, z, keep, first)
    return keep_top(tokens, -turn, keep, raster=self.raster), {"score": distance}


@register("mmr")
class MMR(Planner):
  """argmax_i  lambda s_i / max s - (1 - lambda) max_{j taken} cos(z_i, z_j).  (Carbonell & Goldstein, 1998)

  lambda is `relevance`: 1 is the top of the score, 0 is `maxmin` from the token of highest score.

  IDPruner (2026, arXiv:2602.13315): scale="range", which is (s_i - min s) / (max s - min s + 1e-6), metric="token" and
  raster=True where a language model begins, by the score of a scorer that it trains; `at_once` is its parallel_k.
  """

  conserves: ClassVar[bool] = False
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  score: str = "cls_attention"  # a name of tokred.scores.SCORES
  metric: str = "key"  # key, token
  relevance: float = 0.5
  scale: str = "max"  # max, range
  at_once: int = 1  # tokens taken before similarities are looked at again: faster, and not the same
  raster: bool = False

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.score not in SCORES:
      raise ValueError(f"score={self.score!r} is not a score; {nearest(self.score, SCORES)}")
    if not 0.0 <= self.relevance <= 1.0:
      raise ValueError(f"relevance={self.relevance} must be in [0.0, 1.0]")
    if self.scale not in ("max", "range"):
      raise ValueError(f"scale={self.scale!r} is not a scale; {nearest(self.scale, ('max', 'range'))}")
    if self.at_once < 1:
      raise ValueError(f"at_once={self.at_once} must be at least 1")
    return tuple(sorted({*valid_metric(self.metric), *SCORES[self.score][1]}))

  def foresees(self) -> bool:
    return self.metric == "key" and self.score in FORESEEN

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * n * (width if self.metric == "token" else width / num_heads)

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    free = tokens.alive & ~tokens.protected
    score = jax.lax.stop_gradient(SCORES[self.score][0](tokens))
    if self.scale == "range":
      low, high = jnp.where(free, score, jnp.inf).min(1), jnp.where(free, score, -jnp.inf).max(1)
      score = jnp.where(free, (score - low[:, None]) / (high - low + 1e-6)[:, None], 0.0)
    else:
      score = jnp.where(free, score, 0.0)
      score = score / jnp.maximum(score.max(1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    z = unit(compared(tokens, self.metric), free)
    steps = min(keep, z.shape[1]) if isinstance(keep, int) else z.shape[1]
    worth = self.relevance * score
    turn, value = take_in_turn(tokens, cosines(z), score, worth, 1.0 - self.relevance, steps, self.at_once)
    return keep_top(tokens, -turn, keep, raster=self.raster), {"score": value}
