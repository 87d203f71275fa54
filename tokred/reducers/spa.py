"""Select and Pack Attention: a gate sends tokens through, and those of several images share a row.

(Zhang et al., 2024, arXiv:2410.23608)
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from tokred.reducers.base import Reducer, ranks, register
from tokred.tokens import Array, Plan, Tokens, fold, inverse, pack, rank, straight_through


def admit(tokens: Tokens, score: Array, wants: Array, keep: Any, group: int) -> Array:
  """Who finds room: of `group` images together no more than `group` times `keep`, the best first.

  Args:
    tokens: N tokens of B images, B a multiple of group.
    score: (B, N), ranked in float32; ties go to the image that stands first, then to the lower index.
    wants: (B, N) bool; the protected have to be among these, and come first.
    keep: tokens of an image on average, the protected counted; an int, a traced int or (B,).
    group: images that share the room.

  Returns:
    (B, N) bool.
  """
  row = lambda leaf: leaf.reshape(-1, group * leaf.shape[1])
  place = ranks(tokens.replace(mask=row(wants), protected=row(tokens.protected)), row(score))
  keep = jnp.asarray(keep, jnp.int32)
  room = keep.reshape(-1, group).sum(1, keepdims=True) if keep.ndim else group * keep
  return wants & (place < room).reshape(wants.shape)


def selection_loss(logits: Array, labels: Array, scales: Sequence[int] = (1, 2, 4)) -> Array:
  """Binary cross-entropy of the gate against what should be selected, the mean over scales.

  At scale s a window of s x s patches counts as selected if any of them is, by the labels as by the gate: both are the
  largest within the window.  That is our reading; the paper's pyramid of features has a map of labels for each of its
  stages, and a plain ViT has one resolution.

  Args:
    logits: (B, h, w) keep over drop (`score` of the patches), on the grid of patches.
    labels: (B, H, W) 1 where a box or a mask is, else 0; H and W are multiples of h and w.
    scales: windows in patches; each divides h and w.

  Raises:
    ValueError: a scale or the grid does not divide.
  """

  def largest(values: Array, grid: tuple[int, int]) -> Array:
    """(B, H, W) to (B, *grid): the largest within each cell."""
    (batch, *size), (h, w) = values.shape, grid
    if not (h and w) or size[0] % h or size[1] % w:
      raise ValueError(f"selection_loss: a map of {size[0]} x {size[1]} has no {h} x {w} cells of one size")
    return values.astype(jnp.float32).reshape(batch, h, size[0] // h, w, size[1] // w).max((2, 4))

  total, (h, w) = 0.0, logits.shape[1:]
  for scale in scales:
    grid = (h // scale, w // scale)
    total = total + optax.sigmoid_binary_cross_entropy(largest(logits, grid), largest(labels, grid)).mean()
  return total / len(scales)


@register("spa")
class SPA(Reducer):
  """l = W x + b, (keep, drop);  who has l_keep > l_drop goes through the blocks of the scope, the others round it.

  In gather mode those of `group` consecutive images stand in one row of group * keep slots, and attention stays
  within an image (`tokens.pack`): each image has its own count, and `keep` is their mean.  Where more want in than
  there is room, the lowest l_keep - l_drop go round, in mask mode as well; that is all that images of a group share.
  A batch that is no multiple of `group` takes the greatest common divisor, a batch of unknown size 1; on several
  devices `group` should divide the batch of each.

  A larger group evens out more, and its attention costs more: pairs of different images are computed and thrown away,
  2 (group - 1) keep^2 D multiply-adds an image that the cost model leaves out.  A block of DeiT-S with 118 of 197
  tokens costs 1.05 of what it says with group=2, 1.34 with group=8.

  Training decides by l + g, g ~ Gumbel(0, 1) for each logit, with the gradient of softmax((l + g) / tau).  In mask mode
  nothing is packed, there is room for all, and those that go round teach the gate too; in gather mode only those that
  go in do.  `keep_ratio` of `config.loss` holds the mean share of a group at the site's, so that the room suffices.

  The paper's gate also learns from boxes or masks.  That form is no term of `config.loss`: labels come with a batch,
  which a reducer does not see, and the trainer's batches have none.  Whoever has them adds `selection_loss` to a
  loss of their own (site "pick", ahead of which nothing is reduced; scales have to divide the grid, which for 14 x 14
  are 1, 2 and 7):

    output = module.apply({"params": params}, images, train=True, mode="mask", rngs=rngs)
    for score in output.aux["reduce/pick/score"].values():
      logits = score[:, module.shape.num_prefix_tokens :].reshape(-1, *module.shape.grid)
      loss = loss + weight * selection_loss(logits, labels, scales=(1, 2, 7))
  """

  ragged: ClassVar[bool] = True
  packs: ClassVar[bool] = True
  decides: ClassVar[bool] = True
  idles: ClassVar[bool] = False  # where there is room for all, the gate still decides
  places: ClassVar[tuple[str, ...]] = ("around",)

  temperature: float = 1.0
  group: int = 8

  def needed(self) -> tuple[str, ...]:
    if self.group < 1:
      raise ValueError(f"group={self.group} must be at least 1")
    return ()

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return 2.0 * n * width

  @nn.compact
  def __call__(self, tokens: Tokens, keep: Any, *, train: bool, mode: str) -> tuple[Tokens, dict[str, Array]]:
    batch, n = tokens.mask.shape
    group = math.gcd(batch, self.group) if isinstance(batch, int) else 1  # symbolic: exported for batches of any size
    x = jnp.where(tokens.alive[..., None], tokens.x, 0).astype(jnp.float32)
    logits = nn.Dense(2, name="gate")(x)
    score = logits[..., 0] - logits[..., 1]
    noise = jax.random.gumbel(self.make_rng("reduce"), logits.shape, jnp.float32) if train else 0.0
    noisy = logits + noise
    wants = tokens.alive & (tokens.protected | (noisy[..., 0] > noisy[..., 1]))
    goes = wants if train and mode == "mask" else admit(tokens, score, wants, keep, group)
    report = {"score": score}
    soft = jax.nn.softmax(noisy / self.temperature)[..., 0]
    free = tokens.alive & ~tokens.protected
    if train:
      share = jnp.where(free, straight_through(wants, soft), 0.0).sum(1) / jnp.maximum(free.sum(1), 1)
      report["kept_share"] = jnp.repeat(share.reshape(-1, group).mean(1), group)
    if mode == "gather":
      if train:
        report["update_weight"] = jnp.where(free, straight_through(goes, soft), 1.0)
      return pack(tokens, goes, group * keep, group), report
    index = jnp.arange(n, dtype=jnp.int32)
    order = inverse(rank((~goes).astype(jnp.int32) + ~tokens.alive))  # in their own order, as in a packed row
    if not train:
      return fold(tokens, Plan(owner=jnp.where(goes, index, -1), order=order, gate=goes | ~tokens.alive)), report
    # Who goes round owns itself, with a gate that is 0: the update it does without teaches the gate.
    gate = jnp.where(tokens.protected, 1.0, straight_through(goes, soft))
    return fold(tokens, Plan(owner=jnp.where(tokens.alive, index, -1), order=order, gate=gate)), report
