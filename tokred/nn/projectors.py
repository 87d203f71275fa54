"""What joins a tower and a language model: `projector` makes the module that `config.projector` names.

A projector takes the Tokens of an image, float (B, N, D), and the grid (rows, columns) of the patches that they came
from, and returns Tokens of the language model's width.  Their `position` is the patch where each stands, counted on the
grid; their `owner` (B, S) tells which of them represents each patch.  `left(n)` says how many come out where n go in,
before anything is compiled, and `macs(n, width)` what that costs.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from tokred.config import nearest
from tokred.nn.resampling import Queries, TokenFlex, TokenPacker
from tokred.tokens import Tokens


class MlpProjector(nn.Module):
  """A perceptron that translates each token for itself.  (LLaVA-1.5: Liu et al., 2023, arXiv:2310.03744)

  fc1, GELU, fc2, ...: `depth` linear layers in all, each of the language model's width.
  """

  width: int
  depth: int = 2

  @nn.nowrap
  def left(self, n: int) -> int:
    """Tokens that come out where n go in."""
    return n

  @nn.nowrap
  def macs(self, n: Any, width: int) -> Any:
    """Multiply-adds for n tokens of this width, a number or a traced scalar."""
    return n * self.width * (width + (self.depth - 1) * self.width)

  @nn.compact
  def __call__(self, tokens: Tokens, grid: tuple[int, int], train: bool = False) -> Tokens:
    x = tokens.x
    for layer in range(1, self.depth + 1):
      x = nn.Dense(self.width, dtype=x.dtype, name=f"fc{layer}")(x)
      x = nn.gelu(x, approximate=False) if layer < self.depth else x
    return tokens.replace(x=x)


PROJECTORS = ("mlp", "tokenflex", "tokenpacker", "quecc", "queries")


def projector(name: str, config: Mapping[str, Any], width: int) -> nn.Module:
  """The module that `config.projector` describes.

  Args:
    name: "mlp"; or, see `resampling`, "tokenflex", "tokenpacker", "quecc" (a single query), "queries" (Matryoshka
      queries, with `anchors` those of PARCEL).
    config: `config.projector`; fields that it does not have are as by default.
    width: of the language model.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  if name not in PROJECTORS:
    raise ValueError(f"config.projector.name={name!r} does not exist; {nearest(name, PROJECTORS)}")
  count, budgets, anchors = config.get("num_tokens", 0), tuple(config.get("budgets", ())), config.get("anchors", 0)
  elastic = name in ("tokenflex", "queries")
  if budgets and not elastic:
    raise ValueError(f"config.projector.budgets={budgets}: {name} has one count; valid: (), or tokenflex, queries")
  if anchors and name != "queries":
    raise ValueError(f"config.projector.anchors={anchors}: {name} has none; valid: 0, or queries")
  levels = tuple(config.get("levels", ()))
  if levels and name not in ("tokenpacker", "quecc"):
    raise ValueError(f"config.projector.levels={levels}: {name} reads one layer; valid: (), or tokenpacker, quecc")
  if name == "mlp":
    if count:
      raise ValueError(f"config.projector.num_tokens={count}: mlp keeps as many as arrive; valid: 0")
    return MlpProjector(width)
  if name == "quecc":
    return TokenPacker(width, count or 1, True, levels)
  if count < 1:
    raise ValueError(f"config.projector.num_tokens={count}: {name} chooses the count; valid: 1 or more")
  if not all(max(anchors, 1) <= budget <= count for budget in budgets):
    raise ValueError(f"config.projector.budgets={budgets}; valid: {max(anchors, 1)} to {count}, config's num_tokens")
  if anchors > count:
    raise ValueError(f"config.projector.anchors={anchors}; valid: 0 to {count}, config.projector.num_tokens")
  if name == "tokenflex":
    return TokenFlex(width, count, budgets)
  if name == "tokenpacker":
    return TokenPacker(width, count, levels=levels)
  return Queries(width, count, budgets, anchors)


def at_budget(module: nn.Module, num_tokens: int) -> nn.Module:
  """The same projector, with the same parameters, that leaves another count of an image.

  Raises:
    ValueError: the projector has one count, or not so many.
  """
  if not isinstance(module, (TokenFlex, Queries)):
    raise ValueError(f"num_tokens={num_tokens}: {type(module).__name__} has one count; valid: tokenflex, queries")
  if isinstance(module, TokenFlex):
    return module.clone(num_tokens=num_tokens, budgets=())
  bank = module.bank or module.num_tokens - module.anchors
  if not module.anchors <= num_tokens <= module.anchors + bank:
    raise ValueError(f"num_tokens={num_tokens}; valid: {module.anchors} to {module.anchors + bank}")
  return module.clone(num_tokens=num_tokens, budgets=(), bank=bank)
