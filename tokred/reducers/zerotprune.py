"""Zero-TPrune: drops what is similar to a better token, then what nobody votes for; nothing is trained.

(Wang et al., 2024, arXiv:2305.17328)  The authors' code was not to be had: details are our reading of the paper.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.config import nearest
from tokred.reducers.base import Planner, keep_top, num_kept, ranks, register
from tokred.reducers.diversity import compared, cosines, valid_metric
from tokred.reducers.tome import unit
from tokred.scores import PAGERANK
from tokred.tokens import Array, Plan, Tokens, rank


def redundant(tokens: Tokens, score: Array, z: Array, drop: Array) -> Array:
  """The S-stage, (B, N) bool: the less important members of the most similar pairs.

  The free tokens are ranked by `score`; the lower half is matched with the upper, t(i) = argmax_j cos(z_i, z_j).

  Args:
    tokens: N tokens.
    score: (B, N).
    z: (B, N, d) float32 of unit length.
    drop: (B, 1) int32, how many go; no more than the lower half holds.
  """
  free = tokens.alive & ~tokens.protected
  place = ranks(tokens, score) - tokens.protected.sum(1, keepdims=True)
  upper = free & (place < (free.sum(1, keepdims=True) + 1) // 2)
  best = jnp.where(upper[:, None], cosines(z), -jnp.inf).max(-1)
  lower = free & ~upper & jnp.isfinite(best)
  return lower & (rank(jnp.where(lower, -best, jnp.inf)) < drop)


@register("zerotprune")
class ZeroTPrune(Planner):
  """S-stage, then I-stage: the tokens of lowest weighted PageRank leave.  Importance is that of the whole set in both.

  Of what leaves, the S-stage takes the share `similar`, rounded down; 0 leaves the I-stage alone.  `iterations` of
  the PageRank are by depth where it is 0: 30 in the first third of the blocks, 5 in the second, 1 in the last, since
  deep maps are nearly alike in their rows and one vote settles them.
  """

  conserves: ClassVar[bool] = False

  similar: float = 0.3
  iterations: int = 0  # 0: by depth; else one of tokred.scores.PAGERANK
  metric: str = "key"  # key, token
  layer: int = 0
  depth: int = 1

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def needed(self) -> tuple[str, ...]:
    if self.iterations and self.iterations not in PAGERANK:
      raise ValueError(f"iterations={self.iterations} is not counted; {nearest('', map(str, (0, *PAGERANK)))}")
    if not 0.0 <= self.similar <= 1.0:
      raise ValueError(f"similar={self.similar} must be in [0.0, 1.0]")
    return tuple(sorted({*(valid_metric(self.metric) if self.similar else ()), f"pagerank_{self._rounds()}"}))

  def foresees(self) -> bool:
    return self.metric == "key"

  def _rounds(self) -> int:
    return self.iterations or (30, 5, 1)[min(3 * self.layer // self.depth, 2)]

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    pairs = (width if self.metric == "token" else width / num_heads) if self.similar else 0
    return n * n * (width + self._rounds() * num_heads + pairs)  # the map, its products with v, the cosines

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    score = jax.lax.stop_gradient(tokens.feats[f"pagerank_{self._rounds()}"]).astype(jnp.float32)
    if not self.similar:
      return keep_top(tokens, score, keep), {"score": score}
    leave = tokens.alive.sum(1, keepdims=True) - num_kept(tokens, keep)
    drop = jnp.floor(leave * self.similar + 1e-4).astype(jnp.int32)  # 10 x 0.3 is 3 in any precision
    z = unit(compared(tokens, self.metric), tokens.alive & ~tokens.protected)
    gone = redundant(tokens, score, z, drop)
    return keep_top(tokens, jnp.where(gone, score - 2.0, score), keep), {"score": score, "redundant": gone}  # s <= 1
