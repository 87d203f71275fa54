"""SparseVLM: ranks by the attention of text that has to do with the picture, and recycles the best of what goes.

(Zhang et al., 2024, arXiv:2410.04417)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, merge_into, num_kept, ranks, register
from tokred.reducers.cluster import density_peaks, distances
from tokred.scores import SCORES
from tokred.tokens import Array, Plan, Tokens, inverse, rank


@register("sparsevlm")
class SparseVLM(Planner):
  """Of k visual tokens k - c are those of the highest score, and c are clusters of the next best m:

    m = floor(0.3 (T - k)) + 1 and c = floor(m / 10) + 1, for T that arrive;  each cluster is its plain mean

  (Zhang et al., 2024; code)  Clusters are density peaks.  The paper counts the c on top of its lists of k; here they
  are counted in, so that a budget is one.  The score is text's attention; a site reducer="remember", score="rater",
  name_of="rater" at layers=(0,), place="before" keeps to text that has to do with the picture.
  """

  conserves: ClassVar[bool] = False
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")

  score: str = "text_attention"
  recycled: float = 0.3  # share of those that go, out of which clusters are made; 0: none
  per_cluster: int = 10
  neighbours: int = 5  # of density peaks; the authors take as many as there are clusters

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.score not in SCORES:
      raise ValueError(f"score={self.score!r} is not a score; {nearest(self.score, SCORES)}")
    if not 0.0 <= self.recycled <= 1.0:
      raise ValueError(f"recycled={self.recycled} must be in [0.0, 1.0]")
    if self.per_cluster < 1 or self.neighbours < 1:
      raise ValueError(f"per_cluster={self.per_cluster} and neighbours={self.neighbours} must be at least 1")
    return SCORES[self.score][1]

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return 2 * n * n * width

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)
    free, safe = tokens.alive & ~tokens.protected, tokens.alive & tokens.protected
    text = safe.sum(1, keepdims=True, dtype=jnp.int32)
    count = num_kept(tokens, keep) - text
    gone = free.sum(1, keepdims=True, dtype=jnp.int32) - count
    many = jnp.floor(self.recycled * gone + 1e-4).astype(jnp.int32) + 1
    clusters = jnp.minimum(many // self.per_cluster + 1, jnp.maximum(count - 1, 0))
    clusters = jnp.where((gone > 0) & (self.recycled > 0), clusters, 0)
    score = jax.lax.stop_gradient(SCORES[self.score][0](tokens))
    place = ranks(tokens, score) - text
    best = free & (place < count - clusters)
    # As many as there are clusters at least: none is empty.
    among = free & ~best & (place < count - clusters + jnp.maximum(many, clusters)) & (clusters > 0)
    distance = distances(jax.lax.stop_gradient(tokens.x).astype(jnp.float32), among)
    peak = jnp.maximum(density_peaks(distance, self.neighbours), jnp.finfo(jnp.float32).min)  # one alone has -inf
    centre = among & (rank(jnp.where(among, -peak, jnp.inf)) < clusters)
    near = jnp.argmin(jnp.where(centre[:, None], distance, jnp.inf), axis=-1).astype(jnp.int32)
    stays = best | centre | safe
    owner = jnp.where(stays, index, jnp.where(among, near, -1))
    order = inverse(rank(jnp.where(stays, index, jnp.where(tokens.alive, place + 2 * n, index + 4 * n))))
    return merge_into(tokens, owner, order, jnp.ones_like(tokens.size)), {"score": score}
