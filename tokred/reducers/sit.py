"""Self-slimmed ViT: soft slots instead of tokens, and a head that learns them to be undone.

(Zong et al., 2022, arXiv:2111.12624)  The loss is `losses.recalibration`.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokred.reducers.base import Reducer, register
from tokred.reducers.transforming import shares, transform, visible
from tokred.tokens import Array, Tokens, inverse, rank, take


def seats(tokens: Tokens, slots: Array, keep: Any, mode: str) -> tuple[Array, Array]:
  """Rows of W for `transform`: the protected tokens in their order, then the slots.

  Args:
    tokens: N tokens.
    slots: (B, C, N) float32, rows over the free tokens that sum to 1; C at least `keep` less the protected.
    keep: how many rows are alive; see Reducer.
    mode: see Reducer.

  Returns:
    W, (B, K, N) with K = `keep` in gather mode and N in mask mode, and who is alive, (B, K) bool.
  """
  batch, n = tokens.mask.shape
  k = keep if mode == "gather" else n
  safe = tokens.alive & tokens.protected
  first = inverse(rank((~safe).astype(jnp.int32)))[:, :k]
  place, count = jnp.arange(k), safe.sum(1, keepdims=True)
  slot = jnp.clip(place - count, 0, slots.shape[1] - 1)
  weight = jnp.where((place < count)[..., None], jax.nn.one_hot(first, n), take(slots, slot))
  keep = jnp.asarray(keep)
  alive = place < (keep[:, None] if keep.ndim else keep)
  return weight, jnp.broadcast_to(alive, (batch, k))


def side(module: nn.Module, name: str, keep: Any) -> int:
  """How many slots a parameter of `module` has along its last axis; `keep` where it is being made.

  Raises:
    ValueError: `keep` is traced and would be the shape of a parameter, or exceeds it.
  """
  if module.has_variable("params", name):
    made = module.get_variable("params", name).shape[-1]
    if isinstance(keep, int) and keep > made:
      raise ValueError(f"keep={keep}, but the parameters are of {made} slots; lower the site's keep or start anew")
    return made
  if not isinstance(keep, int):
    raise ValueError(f"keep={keep} must be a Python int where parameters are made: it is the shape of one")
  return keep


@register("sit")
class SiT(Reducer):
  """Token slimming: W^T = softmax over tokens of tau M2 GELU(M1 LN(x)),  x <- W x (x itself, not LN(x)).

  Protected tokens go past it and stand first; slots follow in an order without meaning.  M2 has `keep` columns, of
  which a protected token leaves its own unused.  In mask mode fewer slots than M2 has columns may be asked for, traced
  too: the first ones live.

  The authors slim behind several blocks and undo it behind these and all later ones, in training: `reverse` is how that
  is done behind the block that slims, `sit_reverse` behind the others.
  """

  conserves: ClassVar[bool] = False  # a token has a share in many slots
  from_input: ClassVar[bool] = True
  idles: ClassVar[bool] = False  # as many slots as tokens are still slots
  places: ClassVar[tuple[str, ...]] = ("after", "before", "attn", "output")
  training_params: ClassVar[tuple[str, ...]] = ("sit_reverse",)

  reverse: bool = False  # reports what SiTReverse makes of the slots, for training
  patches: int = 0  # of SiTReverse
  prefix: int = -1  # likewise
  place: str = "after"  # where it stands, which its site fills in

  def needed(self) -> tuple[str, ...]:
    if self.reverse and self.place not in SiTReverse.places:
      raise ValueError(
        f"reverse=True at place={self.place!r}: the loss compares with what leaves a block; valid: place='after'"
      )
    return self.needs

  def count(self, keep: float, n: int, protected: int, source: int) -> int:
    return min(n, int(source * keep) + protected)

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * width * width / 2 + 1.5 * n * left * width

  @nn.compact
  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    width = tokens.x.shape[-1]
    columns = side(self, "slots", keep)
    x, _, gate = visible(tokens)
    h = nn.Dense(width // 2, name="in_proj")(nn.LayerNorm(epsilon=1e-5, name="norm")(x))
    kernel = self.param("slots", nn.initializers.lecun_normal(), (width // 2, columns), jnp.float32)
    scale = self.param("scale", nn.initializers.ones, (), jnp.float32)  # tau
    # The authors' M2 has a bias; it is the same for all tokens of a slot, and cancels in the softmax over tokens.
    logits = (scale * (nn.gelu(h, approximate=False) @ kernel)).swapaxes(1, 2)  # (B, C, N)
    slots = shares(logits.astype(jnp.float32), jnp.where(tokens.protected, 0.0, gate)[:, None])
    tokens = transform(tokens, *seats(tokens, slots, keep, mode))
    if not (self.reverse and (train or self.is_initializing())):
      return tokens, {}
    return SiTReverse(self.patches, self.prefix, name="sit_reverse")(tokens, keep, train=train, mode=mode)


@register("sit_reverse")
class SiTReverse(Reducer):
  """Undoes slimming, for training: y = TokenMLP(LN(x)^T)^T, K slots -> 4P -> P patches;  y + MLP(LN(y)).

  Tokens pass unchanged; `recovered` (B, P, D) is reported, for `losses.recalibration`.
  """

  idles: ClassVar[bool] = False
  training_only: ClassVar[bool] = True
  places: ClassVar[tuple[str, ...]] = ("after", "output")

  patches: int = 0  # P; 0: all that stand behind the prefix
  prefix: int = -1  # tokens before the patches, which the site fills in; below 0: so many that P is a square

  @nn.compact
  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    source, width = tokens.owner.shape[1], tokens.x.shape[-1]
    patches = self.patches or (math.isqrt(source) ** 2 if self.prefix < 0 else source - self.prefix)
    prefix = source - patches
    if prefix < 0 or (isinstance(keep, int) and keep <= prefix):
      raise ValueError(
        f"patches={patches} of the {source} tokens at the input leave no slot among the {keep} that arrive at "
        "sit_reverse; valid: the number of patches of the grid"
      )
    mlp = lambda x, hidden, out, name: nn.Dense(out, name=f"{name}2")(
      nn.gelu(nn.Dense(hidden, name=f"{name}1")(x), approximate=False)
    )
    x, _, gate = visible(tokens)
    x = (nn.LayerNorm(epsilon=1e-5, name="norm1")(x) * gate[..., None])[:, prefix:]
    # The dead behind the slots, all zero, need no weights.
    slots = side(self, "slots", keep - prefix if isinstance(keep, int) else keep)
    x = jnp.pad(x, ((0, 0), (0, max(slots - x.shape[1], 0)), (0, 0)))[:, :slots].swapaxes(1, 2)  # (B, D, K)
    kernel = self.param("slots", nn.initializers.lecun_normal(), (4 * patches, slots), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (4 * patches,), jnp.float32)
    h = nn.gelu(x @ kernel.T + bias, approximate=False)
    y = nn.Dense(patches, name="token_mlp")(h).swapaxes(1, 2)
    return tokens, {"recovered": y + mlp(nn.LayerNorm(epsilon=1e-5, name="norm2")(y), 4 * width, width, "mlp")}
