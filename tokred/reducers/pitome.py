"""PiToMe: merges where tokens are crowded, and leaves alone what stands out.  (Tran et al., 2024, arXiv:2405.16148)"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.reducers.base import Planner, merge_into, num_kept, ranks, register
from tokred.reducers.tome import unit
from tokred.tokens import Array, Plan, Tokens, inverse, rank


def energy(cosine: Array, free: Array, margin: float, alpha: float = 1.0) -> Array:
  """How crowded a token's neighbourhood is: E_i = mean_j ELU_alpha(cos_ij - m) over all free j, i itself included.

  The paper keeps cos_ij where it is above the margin; the authors' code takes ELU(cos_ij - m), and we follow the code.

  Args:
    cosine: (B, N, N) float32.
    free: (B, N) bool; protected and dead tokens neither get nor give energy.
    margin: m.
    alpha: the steepness below the margin.

  Returns:
    (B, N) float32.
  """
  near = jnp.where(free[:, None], jax.nn.elu(cosine - margin, alpha), 0.0)
  return near.sum(-1) / jnp.maximum(free.sum(1, keepdims=True), 1)


@register("pitome")
class PiToMe(Planner):
  """Tokens in descending energy: even ranks are sources, odd ones destinations, and x <- sum(s x) / sum(s).

  m_l = margin (1 - l / L);  kappa = mean over heads of k, unit length, as in ToMe;  r tokens go, protected ones aside.

  First part of the depth: all tokens are split, and the r sources with the best match merge into it.  Then: the 2r
  tokens of highest energy are split, and each source merges into its best match.  The paper describes only the second;
  the released classifier does both, and so does this unless `early` is 0.

  Survivors stand as in the authors' code: the protected; then the sources left over, the most similar first, or the
  tokens that were no candidates, by descending energy; then the destinations.  Where no token goes all stay where they
  are; in the first part of the depth that code reorders them even then.
  """

  needs: ClassVar[tuple[str, ...]] = ("key",)
  scored: ClassVar[bool] = False
  proportional: ClassVar[bool] = False  # the authors' ViT tracks sizes and does not use them

  margin: float = 0.75  # in block 0
  alpha: float = 1.0
  early: float = 0.5  # share of the blocks, from the first, that split all tokens
  layer: int = 0
  depth: int = 1

  def count(self, keep: float, n: int, protected: int, source: int) -> int:
    total = n - protected
    return n - math.floor(total - total * keep)  # as the authors write it, in float64

  def fewest(self, n: int, protected: int) -> int:
    return n - (n - protected) // 2

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * n * (width / num_heads)

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)
    free = tokens.alive & ~tokens.protected
    key = jax.lax.stop_gradient(tokens.feats["key"]).astype(jnp.float32).mean(2)
    metric = unit(key, tokens.alive)
    cosine = jnp.einsum("bid,bjd->bij", metric, metric, precision="highest")
    crowd = energy(cosine, free, self.margin * (1 - self.layer / self.depth), self.alpha)

    alive = tokens.alive.sum(1, keepdims=True)
    removed = jnp.minimum(alive - num_kept(tokens, keep), free.sum(1, keepdims=True) // 2)  # r
    place = ranks(tokens, crowd) - (tokens.alive & tokens.protected).sum(1, keepdims=True, dtype=jnp.int32)
    split_all = self.layer < math.ceil(self.early * self.depth)
    candidate = free if split_all else free & (place < 2 * removed)
    source, target = candidate & (place % 2 == 0), candidate & (place % 2 == 1)
    similarity = jnp.where(source[:, :, None] & target[:, None], cosine, -jnp.inf)
    best, match = similarity.max(-1), jnp.argmax(similarity, axis=-1).astype(jnp.int32)
    edge = rank(jnp.where(jnp.isfinite(best), -best, jnp.inf))
    merged = source & (edge < removed)  # all sources, where only candidates were split
    owner = jnp.where(tokens.alive, jnp.where(merged, match, index), -1)

    # Places: protected, left over, destinations, merged sources (last merged first), dead.  One integer key sorts them.
    left = edge if split_all else place
    at = jnp.where(target, place + 2 * n, jnp.where(merged, 4 * n - 1 - edge, left + n))
    at = jnp.where(tokens.protected, index, at)
    at = jnp.where(tokens.alive, at, index + 4 * n)
    return merge_into(tokens, owner, inverse(rank(at))), {"energy": crowd, "similarity": best}
