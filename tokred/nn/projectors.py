"""Between tower and language model: modules from a tower's tokens to tokens of the language model's width."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.config import nearest
from tokred.tokens import Tokens


class MlpProjector(nn.Module):
  """fc2(gelu(fc1 x)), token by token.  (Liu et al., 2023, LLaVA-1.5, arXiv:2310.03744)"""

  width: int  # of the language model
  dtype: Any = jnp.float32

  @nn.nowrap
  def left(self, n: int) -> int:
    """Tokens that come out where n arrive."""
    return n

  @nn.compact
  def __call__(self, tokens: Tokens, grid: tuple[int, int]) -> Tokens:
    """Translates.

    Args:
      tokens: (B, N, D) of the tower, prefix tokens left out; `position` counts them.
      grid: patches of a whole image, (height, width).
    """
    del grid
    h = nn.Dense(self.width, dtype=self.dtype, name="fc1")(tokens.x)
    return tokens.replace(x=nn.Dense(self.width, dtype=self.dtype, name="fc2")(jax.nn.gelu(h, approximate=False)))


PROJECTORS = {"mlp": lambda config, width: MlpProjector(width)}


def projector(name: str, config: Any, width: int) -> nn.Module:
  """The module of `config.projector` into a language model of this width.

  Raises:
    ValueError: an unknown name.
  """
  if name not in PROJECTORS:
    raise ValueError(f"config.projector.name={name!r} is not a projector; {nearest(name, PROJECTORS)}")
  return PROJECTORS[name](config, width)
