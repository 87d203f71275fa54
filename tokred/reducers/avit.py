"""A-ViT: a token stops when its halting probabilities have added up.  (Yin et al., 2022, arXiv:2112.07658)"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tokred.reducers.base import Reducer, finish, keep_top, register
from tokred.tokens import Array, Tokens


@register("avit")
class AViT(Reducer):
  """h_l = sigmoid(scale x_l[..., 0] - center), h_L = 1; a token stops in the first layer where sum h > 1 - eps.

  Its output is sum_l h_l x_l, the last layer with the remainder R = 1 - sum of the earlier h; the classifier reads that
  of CLS.  Tokens that stopped are zero and no key to others.  There is no new parameter: channel 0 of every block
  learns to halt, from `ponder` and `halting_prior` of `config.loss`.

  The site has all blocks of the stack, for in the last one the outputs are complete.  Images differ in how many tokens
  run, so a `keep` is a capacity: where more run, those that have halted least go on (without it nothing is cut, and
  nothing is faster).
  """

  relaxed: ClassVar[bool] = True  # CLS halts too: protected here means that its output stays
  conserves: ClassVar[bool] = False
  scored: ClassVar[bool] = False
  idles: ClassVar[bool] = False
  ragged: ClassVar[bool] = True
  everywhere: ClassVar[bool] = True
  places: ClassVar[tuple[str, ...]] = ("after",)

  layer: int = 0
  depth: int = 1
  scale: float = 10.0
  center: float = 30.0
  eps: float = 0.01

  def leaving(self, keep: int, n: int) -> int:
    return n if self.layer == self.depth - 1 else keep  # where the outputs are complete nothing goes

  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    x, feats, running = tokens.x.astype(jnp.float32), tokens.feats, tokens.mask.astype(jnp.float32)
    zeros = jnp.zeros_like(running)
    total, rest = feats.get("state/halting", zeros), feats.get("state/remainder", zeros + 1.0)
    output, ponder = feats.get("state/output", jnp.zeros_like(x)), feats.get("state/ponder", zeros)
    last = self.layer == self.depth - 1
    score = jax.nn.sigmoid(self.scale * x[..., 0] - self.center)
    halting = jnp.ones_like(total) if last else score
    stopped = total >= 1.0 - self.eps  # in an earlier layer
    total = total + halting
    stops, goes_on = running * (total > 1.0 - self.eps), running * (total < 1.0 - self.eps)
    output = output + x * (stops * rest + goes_on * halting)[..., None]
    ponder = ponder + running + stops * rest
    rest = rest - goes_on * halting
    report = {"halting": score, "ponder": ponder, "depth": running}
    if last:
      there = jnp.maximum(running, (stopped | tokens.protected).astype(jnp.float32))
      return tokens.replace(x=output.astype(tokens.x.dtype), mask=jax.lax.stop_gradient(there)), report
    state = dict(halting=total, remainder=rest, output=output, ponder=ponder)
    tokens = tokens.replace(
      x=tokens.x * goes_on[..., None].astype(tokens.x.dtype),
      feats=feats | {f"state/{name}": value for name, value in state.items()},
    )
    tokens = _cut(tokens, jnp.where(goes_on > 0, 1.0 - total, -1.0), keep, mode)
    running = tokens.feats["state/halting"] < 1.0 - self.eps
    return tokens.replace(mask=tokens.mask * running.astype(jnp.float32)), report


def _cut(tokens: Tokens, score: Array, keep: Any, mode: str) -> Tokens:
  """The `keep` tokens of the highest score; a float mask, for those that stopped need not stand at the end."""
  everything = tokens.replace(mask=jnp.ones(tokens.mask.shape, bool))
  if isinstance(keep, int) and keep >= tokens.x.shape[1]:
    return everything.replace(mask=jnp.ones(tokens.mask.shape, jnp.float32))
  cut = finish(everything, keep_top(everything, score, keep), keep, mode)
  return cut.replace(mask=cut.mask.astype(jnp.float32))
