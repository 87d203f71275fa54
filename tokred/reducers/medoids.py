"""k-medoids: of each cluster a real token stays, with its position.  (Zhao et al., 2022, CenterCLIP)"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.reducers.base import Planner, merge_into, num_kept, register
from tokred.reducers.cluster import distances
from tokred.reducers.diversity import compared, valid_metric
from tokred.tokens import Array, Plan, Tokens, inverse, rank, take


def farthest_by_distance(distance: Array, first: Array, steps: int) -> Array:
  """KKZ's start: the token of the largest `first`, then those farthest from all before: turns (B, N) int32.

  Args:
    distance: (B, N, N) float32, infinite for tokens that do not take part.
    first: (B, N).
    steps: how many.
  """
  n = distance.shape[1]
  index = jnp.arange(n)
  valid = jnp.isfinite(distance).any(-1)

  def step(time: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
    turn, near = state
    key = jnp.where(time == 0, first, near)
    key = jnp.where(valid & (turn == n), key, -jnp.inf)
    pick = jnp.argmax(key, axis=1)[:, None].astype(jnp.int32)
    chosen = (index == pick) & valid
    return jnp.where(chosen, time, turn), jnp.minimum(near, take(distance, pick)[:, 0])

  state = jnp.full(valid.shape, n, jnp.int32), jnp.full(valid.shape, jnp.inf)
  return jax.lax.fori_loop(0, steps, step, state)[0]


@register("kmedoids")
class KMedoids(Planner):
  """k medoids m from a farthest-first start at the longest token, `iterations` times

    t(i) = argmin_m ||z_i - z_m||;  m <- the member that minimises the sum of distances to its cluster

  and the medoids stay, in their order.  (Zhao et al., 2022, CenterCLIP)  With `merge` each is its cluster's mean,
  x <- sum(s x) / sum(s).
  """

  conserves: ClassVar[bool] = False
  scored: ClassVar[bool] = False
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  metric: str = "token"  # key, token
  iterations: int = 10
  merge: bool = False

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.iterations < 0:
      raise ValueError(f"iterations={self.iterations} must be 0 or more")
    return valid_metric(self.metric)

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * n * (width if self.metric == "token" else width / num_heads) + self.iterations * n * n

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)
    free, safe = tokens.alive & ~tokens.protected, tokens.alive & tokens.protected
    z = jnp.where(free[..., None], compared(tokens, self.metric), 0.0)
    distance = distances(z, free)
    count = num_kept(tokens, keep) - safe.sum(1, keepdims=True, dtype=jnp.int32)
    steps = min(keep, n) if isinstance(keep, int) else n
    start = farthest_by_distance(distance, jnp.linalg.norm(z, axis=-1), steps) < count

    def nearest(medoid: Array) -> Array:  # a medoid is its own, whatever lies where it lies
      near = jnp.argmin(jnp.where(medoid[:, None], distance, jnp.inf), axis=-1).astype(jnp.int32)
      return jnp.where(medoid, index, near)

    def step(_: int, medoid: Array) -> Array:
      owner = nearest(medoid)
      same = (owner[:, :, None] == owner[:, None]) & free[:, None] & free[:, :, None]
      total = jnp.where(free, jnp.where(same, distance, 0.0).sum(-1), jnp.inf)
      least = jnp.where(same, total[:, None], jnp.inf).min(-1)
      best = jnp.argmax(same & (total[:, None] == least[..., None]), axis=-1)  # of each token's cluster
      return free & (best == index)

    medoid = jax.lax.fori_loop(0, self.iterations, step, start & free)
    stays = medoid | safe
    member = nearest(medoid) if self.merge else -1
    owner = jnp.where(stays, index, jnp.where(free, member, -1))
    order = inverse(rank(jnp.where(stays, index, jnp.where(tokens.alive, index + n, index + 2 * n))))
    return merge_into(tokens, owner, order), {"cluster": nearest(medoid)}
