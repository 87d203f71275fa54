"""Clusters of tokens: k-means, whose groups merge, and density peaks, whose centres stay."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.reducers.base import Planner, keep_top, merge_into, num_kept, register
from tokred.reducers.diversity import compared, farthest_first, valid_metric
from tokred.reducers.tome import unit
from tokred.tokens import Array, Plan, Tokens, inverse, rank, take


@register("kmeans")
class KMeans(Planner):
  """k-means of unit vectors: k centres c from a farthest-first start, `iterations` times

    t(i) = argmax_c cos(z_i, c);  c <- sum_{t(i) = c} s_i z_i, unit length

  and each group merges into its member nearest to the centre, x <- sum(s x) / sum(s).  (Lloyd, 1982; on the sphere
  Dhillon & Modha, 2001.)  A centre without members leaves its place to the token that fits its own group worst.
  """

  proportional: ClassVar[bool] = True
  scored: ClassVar[bool] = False

  metric: str = "key"  # key, token
  iterations: int = 5

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    return valid_metric(self.metric)

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return (2 + 2 * self.iterations) * n * n * (width if self.metric == "token" else width / num_heads)  # at most

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)
    free = tokens.alive & ~tokens.protected
    z = unit(compared(tokens, self.metric), free)
    count = num_kept(tokens, keep)
    slots = min(keep, n) if isinstance(keep, int) else n
    order = inverse(rank(farthest_first(tokens, z, keep)[0]))[:, :slots]  # slot -> token
    used = (index[:slots] < count) & ~take(tokens.protected, order)
    weight = jnp.where(free, tokens.size, 0.0)

    def fits(centre: Array) -> Array:  # (B, N, slots)
      return jnp.where(used[:, None], jnp.einsum("bnd,bsd->bns", z, centre, precision="highest"), -jnp.inf)

    def lloyd(_: int, centre: Array) -> Array:
      member = jnp.argmax(fits(centre), axis=-1)[..., None] == index[:slots]
      total = jnp.einsum("bns,bnd->bsd", jnp.where(member, weight[..., None], 0.0), z, precision="highest")
      norm = jnp.linalg.norm(total, axis=-1, keepdims=True)
      return jnp.where(norm > 1e-6, total / jnp.maximum(norm, 1e-6), centre)

    fit = fits(jax.lax.fori_loop(0, self.iterations, lloyd, take(z, order)))
    group = jnp.argmax(fit, axis=-1).astype(jnp.int32)
    member = (group[..., None] == index[:slots]) & free[..., None]
    close = jnp.where(member, fit, -jnp.inf)
    # Of two members both are as near to their mean: rounding must not choose between them.
    chief = jnp.argmax(close >= close.max(1, keepdims=True) - 1e-5, axis=1).astype(jnp.int32)  # (B, slots)
    owner = take(chief, group)
    stays = (free & (owner == index)) | tokens.protected
    worst = rank(jnp.where(free & ~stays, fit.max(-1), jnp.inf))
    stays |= free & (worst < count - stays.sum(1, keepdims=True))
    owner = jnp.where(tokens.alive, jnp.where(stays, index, owner), -1)
    order = inverse(rank(jnp.where(stays, index, jnp.where(tokens.alive, index + n, index + 2 * n))))
    return merge_into(tokens, owner, order), {"group": group}


def distances(x: Array, valid: Array) -> Array:
  """||x_i - x_j|| / sqrt(d), (B, N, N) float32, exactly symmetric and zero on the diagonal; infinite if not valid.

  Args:
    x: (B, N, d) float32.
    valid: (B, N) bool.
  """
  n, dim = x.shape[1:]
  x = jnp.where(valid[..., None], x, 0.0)
  mean = x.sum(1, keepdims=True) / jnp.maximum(valid.sum(1), 1)[:, None, None]
  x = jnp.where(valid[..., None], x - mean, 0.0)  # what tokens share would cost digits below
  square = jnp.square(x).sum(-1)
  square = square[:, :, None] + square[:, None] - 2 * jnp.einsum("bid,bjd->bij", x, x, precision="highest")
  square = (square + square.swapaxes(1, 2)) / (2 * dim)
  square = jnp.where(jnp.eye(n, dtype=bool), 0.0, jnp.maximum(square, 0.0))
  return jnp.where(valid[:, :, None] & valid[:, None], jnp.sqrt(square), jnp.inf)


def density_peaks(distance: Array, neighbours: int, noise: Array | None = None) -> Array:
  """log(rho_i delta_i): how much token i is the centre of a cluster, (B, N) float32; -inf where it has no distances.

  rho = exp(-mean over the `neighbours` nearest of distance^2) + noise;  delta = distance to the nearest denser token,
  and to the densest's the largest there is.  (Du et al., 2016; Li et al., 2024, HoT, arXiv:2311.12028)  The nearest is
  the token itself, so that 2 neighbours are one, and two tokens nearest to each other are equally dense: that is what
  the noise is for.  Without it the lower index counts as the denser, and the logarithm does not underflow.

  Args:
    distance: (B, N, N) float32, symmetric, infinite for tokens that do not take part.
    neighbours: k, the token itself counted.
    noise: (B, N) float32, HoT's is uniform on [0, 1e-6); None: none.
  """
  n = distance.shape[1]
  index = jnp.arange(n)
  valid = jnp.isfinite(distance).any(-1)
  left, total, count = distance, jnp.zeros(valid.shape), jnp.zeros(valid.shape)
  for _ in range(min(neighbours, n)):  # few; top_k of a sharded batch would gather it
    near = left.min(-1)
    total, count = total + jnp.where(jnp.isfinite(near), jnp.square(near), 0.0), count + jnp.isfinite(near)
    left = jnp.where(index == jnp.argmin(left, axis=-1)[..., None], jnp.inf, left)
  log_density = -total / jnp.maximum(count, 1.0)
  density = log_density if noise is None else jnp.exp(log_density) + noise
  mine, other = density[:, :, None], density[:, None]
  denser = valid[:, None] & (other > mine)
  if noise is None:
    denser |= valid[:, None] & (other == mine) & (index < index[:, None])
  largest = jnp.where(jnp.isfinite(distance), distance, 0.0).max((1, 2))
  delta = jnp.minimum(jnp.where(denser, distance, jnp.inf).min(-1), largest[:, None])
  return jnp.where(valid, (log_density if noise is None else jnp.log(density)) + jnp.log(delta), -jnp.inf)


@register("dpcknn")
class DPCKNN(Planner):
  """Keeps the density peaks, the tokens of largest rho delta, see `density_peaks`.

  With `merge` the others fold into the nearest peak, x <- sum(s x) / sum(s); set the site's `proportional` then.
  With `slots`, as in HoT, the k-th of the unprotected that are kept gets a second position, x <- x + e_k, e learned
  from 0 on; an image of which nothing goes stays as it is.
  """

  conserves: ClassVar[bool] = False
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  metric: str = "token"  # key, token
  neighbours: int = 2
  merge: bool = False
  raster: bool = True  # peaks keep their order, as frames must; otherwise they stand from best to worst
  slots: int = 0  # rows of e; tokens behind these keep the one position they have

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.neighbours < 1:
      raise ValueError(f"neighbours={self.neighbours} must be at least 1: the token itself")
    if self.slots < 0:
      raise ValueError(f"slots={self.slots} must be 0 or more: tokens that get a second position")
    return valid_metric(self.metric)

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * n * (width if self.metric == "token" else width / num_heads)

  @nn.compact
  def __call__(self, tokens: Tokens, keep: Any, **kwargs: Any) -> tuple[Tokens, dict[str, Array]]:
    out, report = super().__call__(tokens, keep, **kwargs)
    if not self.slots:
      return out, report
    e = self.param("slots", nn.initializers.zeros, (self.slots, out.x.shape[-1]), jnp.float32).astype(out.x.dtype)
    free = out.alive & ~out.protected
    slot = jnp.cumsum(free, axis=1) - 1
    gone = tokens.alive.sum(1, keepdims=True) > out.alive.sum(1, keepdims=True)
    second = jnp.where((free & gone & (slot < self.slots))[..., None], e[jnp.clip(slot, 0, self.slots - 1)], 0)
    return out.replace(x=out.x + second), report

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    free = tokens.alive & ~tokens.protected
    distance = distances(compared(tokens, self.metric), free)
    score = density_peaks(distance, self.neighbours)
    plan = keep_top(tokens, score, keep, raster=self.raster)
    if not self.merge:
      return plan, {"score": score}
    peak = (plan.owner >= 0) & free
    nearest = jnp.argmin(jnp.where(peak[:, None], distance, jnp.inf), axis=-1).astype(jnp.int32)
    owner = jnp.where(tokens.alive & (plan.owner < 0), nearest, plan.owner)
    return merge_into(tokens, owner, plan.order), {"score": score}
