"""ToMe's random split: random tokens are sources, and merge into the most similar of all others.

(Bolya et al., 2022, arXiv:2210.09461, appendix and code)
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred import scores
from tokred.reducers.base import Planner, merge_into, num_kept, ranks, register
from tokred.reducers.tome import mean_heads, unit
from tokred.tokens import Array, Plan, Tokens, best, inverse, rank


@register("tome_random")
class ToMeRandom(Planner):
  """t(i) = argmax_j kappa_i kappa_j over the tokens j that stay;  x <- sum(s x) / sum(s), s <- sum(s).

  Who stays is drawn anew in each step of training, from the `reduce` stream; at inference, and where there is no such
  stream, the score "random" decides, a fixed function of the image.  Survivors stand in their order (the authors' in
  that of the draw).
  """

  needs: ClassVar[tuple[str, ...]] = ("key",)
  proportional: ClassVar[bool] = True
  scored: ClassVar[bool] = False
  samples: ClassVar[bool] = False  # any set of `keep` tokens will do in gather mode too

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def macs(self, n: float, width: int, num_heads: int) -> float:
    return n * n * (width / num_heads)

  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    n = tokens.x.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)
    drawn = train and self.has_rng("reduce")
    luck = jax.random.uniform(self.make_rng("reduce"), tokens.mask.shape) if drawn else scores.random(tokens)
    free, safe = tokens.alive & ~tokens.protected, tokens.alive & tokens.protected
    stays = free & (ranks(tokens, luck) < num_kept(tokens, keep))
    metric = unit(jax.lax.stop_gradient(mean_heads(tokens.feats["key"])), tokens.alive)
    similarity = jnp.einsum("bid,bjd->bij", metric, metric, precision="highest")
    _, match = best(jnp.where(stays[:, None], similarity, -jnp.inf))
    owner = jnp.where(free & ~stays, match, jnp.where(tokens.alive, index, -1))
    kind = jnp.where(safe, 0, jnp.where(stays, 1, jnp.where(free, 2, 3)))
    return merge_into(tokens, owner, inverse(rank(kind * n + index))), {}
