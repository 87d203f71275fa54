"""ToMe's random split: random tokens are sources, and merge into the most similar of all others.

(Bolya et al., 2022, arXiv:2210.09461, appendix and code)
"""

from typing import ClassVar

import jax

from tokred import scores
from tokred.reducers.base import ranks, register
from tokred.reducers.tome_kth import ToMeKth
from tokred.tokens import Array, Tokens


@register("tome_random")
class ToMeRandom(ToMeKth):
  """t(i) = argmax_j kappa_i kappa_j over the tokens j that stay;  x <- sum(s x) / sum(s), s <- sum(s).

  Who stays is drawn anew in each step of training, from the `reduce` stream; at inference, and where there is no such
  stream, the score "random" decides, a fixed function of the image.  Survivors stand in their order (the authors' in
  that of the draw).
  """

  samples: ClassVar[bool] = False  # any set of `keep` tokens will do in gather mode too

  def stays(self, free: Array, count: Array, tokens: Tokens, train: bool) -> Array:
    drawn = train and self.has_rng("reduce")
    luck = jax.random.uniform(self.make_rng("reduce"), tokens.mask.shape) if drawn else scores.random(tokens)
    safe = (tokens.alive & tokens.protected).sum(1, keepdims=True)
    return free & (ranks(tokens, luck) - safe < count)
