"""Vision Transformer (Dosovitskiy et al., 2020, arXiv:2010.11929) with places for reducers in every block."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from ml_collections import ConfigDict, FrozenConfigDict

from tokred import cost
from tokred import tokens as tk
from tokred.config import nearest
from tokred.layout import Sites, Spot, Stack
from tokred.nn import attention
from tokred.nn.block import ACTIVATIONS, Block, Mlp
from tokred.nn.reduce import Reduce
from tokred.scores import MEMORY
from tokred.sites import parse
from tokred.tokens import Array, Tokens

VARIANTS = {  # width, depth, mlp_dim, num_heads
  "mu": (32, 1, 128, 2),
  "Ti": (192, 12, 768, 3),
  "S": (384, 12, 1536, 6),
  "B": (768, 12, 3072, 12),
  "L": (1024, 24, 4096, 16),
  "So400m": (1152, 27, 4304, 16),
  "H": (1280, 32, 5120, 16),
  "g": (1408, 40, 6144, 16),
}
CHOICES = {
  "pool": ("cls", "avg", "cls_avg", "map"),
  "position": ("learned", "sincos2d", "rope2d"),
  "final_norm": ("tokens", "pooled", "none"),
  "mlp": ("plain", "gated"),
  "activation": tuple(ACTIVATIONS),
  "dtype": ("float32", "bfloat16"),
}


@struct.dataclass
class Output:
  """What a model returns."""

  logits: Array  # (B, classes) float32; the features where there is no head
  counts: Any  # tokens leaving each block: ints in gather mode, else means over the batch, float32
  tokens: Tokens  # after the final norm
  features: Array  # (B, D) float32, what the head reads; (B, 2 D) where pool="cls_avg"
  aux: dict[str, Any]  # "reduce/<site>/<name>": what its spots report, by their index; "owner/<layer>": (B, S) int32,
  # -1 while a token goes round the block, and the same of those that are back behind it in "inside", by layer;
  # "tokens/<layer>": (B, N, D) as they leave the block


class Shape(struct.PyTreeNode):
  """The sizes of a ViT, all static."""

  width: int = struct.field(pytree_node=False)
  depth: int = struct.field(pytree_node=False)
  mlp_dim: int = struct.field(pytree_node=False)
  num_heads: int = struct.field(pytree_node=False)
  patch: int = struct.field(pytree_node=False)
  grid: tuple[int, int] = struct.field(pytree_node=False)
  num_prefix_tokens: int = struct.field(pytree_node=False)
  channels: int = struct.field(pytree_node=False)
  num_classes: int = struct.field(pytree_node=False)
  has_cls: bool = struct.field(pytree_node=False)
  pool: str = struct.field(pytree_node=False)
  distilled: bool = struct.field(pytree_node=False)
  gated: bool = struct.field(pytree_node=False)

  @property
  def num_patches(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def num_tokens(self) -> int:
    return self.num_patches + self.num_prefix_tokens

  def sizes(self) -> cost.Sizes:
    patch_dim = self.channels * self.patch**2
    return cost.Sizes(
      self.width, self.mlp_dim, self.num_heads, self.num_patches, patch_dim, self.num_tokens, self.num_classes,
      1 + self.distilled, self.pool == "map", self.gated, 1 + (self.pool == "cls_avg"),
    )  # fmt: skip

  def stack(self) -> Stack:
    return Stack(self.depth, self.num_tokens, self.num_prefix_tokens, self.has_cls, grid=self.grid)


def shape(config: ConfigDict) -> Shape:
  """Reads and validates `config.model`.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  match = re.fullmatch(r"(\w+)/(\d+)", config.variant)
  if not match or match[1] not in VARIANTS or int(match[2]) < 1:
    raise ValueError(
      f"config.model.variant={config.variant!r} must be size/patch; sizes: {', '.join(VARIANTS)}; the patch in pixels"
    )
  for field, valid in CHOICES.items():
    if config[field] not in valid:
      raise ValueError(f"config.model.{field}={config[field]!r} is unknown; {nearest(config[field], valid)}")
  attention.check(config.attention, config.gate_cap, config.gate_eps)
  for field in ("width", "depth", "mlp_dim", "num_heads", "num_registers", "layer_scale"):
    if config[field] < 0:
      raise ValueError(f"config.model.{field}={config[field]} must be 0 or more")
  if config.channels < 1:
    raise ValueError(f"config.model.channels={config.channels} must be at least 1")
  given = (config.width, config.depth, config.mlp_dim, config.num_heads)
  width, depth, mlp_dim, heads = VARIANTS[match[1]]
  if config.width and not config.mlp_dim:
    mlp_dim = 4 * config.width
  width, depth, mlp_dim, heads = (g or d for g, d in zip(given, (width, depth, mlp_dim, heads), strict=True))
  if width % heads:
    raise ValueError(f"config.model.num_heads={heads} does not divide width={width}")
  patch = int(match[2])
  if len(config.image_size) != 2 or any(not isinstance(s, int) or s < patch or s % patch for s in config.image_size):
    raise ValueError(f"config.model.image_size={config.image_size} must be (height, width), multiples of patch {patch}")
  if config.num_classes < 0:
    raise ValueError(f"config.model.num_classes={config.num_classes} must be 1 or more, or 0 for no head")
  if config.distilled and config.pool != "cls":
    raise ValueError(f"config.model.distilled=True needs pool='cls', not {config.pool!r}")
  if config.distilled and (config.final_norm == "pooled" or not config.num_classes):
    raise ValueError(
      f"config.model.distilled=True needs classes and final_norm='tokens' or 'none', not "
      f"num_classes={config.num_classes} and {config.final_norm!r}"
    )
  if config.position == "sincos2d" and width % 4:
    raise ValueError(f"config.model.width={width} must be a multiple of 4 for position='sincos2d'")
  if config.position == "rope2d" and width // heads % 4:
    raise ValueError(f"config.model.num_heads={heads}: heads of width={width} must be multiples of 4 for 'rope2d'")
  for field in ("norm_eps", "rope_theta"):
    if config[field] <= 0:
      raise ValueError(f"config.model.{field}={config[field]} must be positive")
  if not 0.0 <= config.drop_path < 1.0:
    raise ValueError(f"config.model.drop_path={config.drop_path} must be in [0, 1)")
  cls = config.class_token or config.pool in ("cls", "cls_avg")
  prefix = int(cls) + int(config.distilled) + config.num_registers
  grid = (config.image_size[0] // patch, config.image_size[1] // patch)
  return Shape(
    width, depth, mlp_dim, heads, patch, grid, prefix, config.channels, config.num_classes, cls, config.pool,
    config.distilled, config.mlp == "gated",
  )  # fmt: skip


def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
  """Fixed 2D positions, (1, height x width, D) float32.  (Chen et al., 2021, MoCo v3, arXiv:2104.02057)"""
  y, x = np.mgrid[: grid[0], : grid[1]]
  omega = 1.0 / 10_000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
  angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
  return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)[None].astype(np.float32)


class PatchEmbed(nn.Module):
  """A projection of each patch, (B, height, width, C) to (B, patches, D): on CPU a third faster than a convolution."""

  width: int
  patch: int
  use_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: Array) -> Array:
    batch, height, width, channels = images.shape
    p, rows, columns = self.patch, height // self.patch, width // self.patch
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, p, channels, self.width), jnp.float32)
    x = images.astype(self.dtype).reshape(batch, rows, p, columns, p * channels).swapaxes(2, 3)
    x = x.reshape(batch, rows * columns, -1) @ kernel.reshape(-1, self.width).astype(self.dtype)
    if not self.use_bias:
      return x
    return x + self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32).astype(self.dtype)


class AttentionPool(nn.Module):
  """One learned query attends to all tokens, then an MLP with a residual.  (Zhai et al., 2021, arXiv:2106.04560)"""

  num_heads: int
  hidden: int
  dtype: Any = jnp.float32
  activation: str = "gelu"
  norm_eps: float = 1e-6

  @nn.compact
  def __call__(self, x: Array, mask: Array) -> Array:
    batch, _, width = x.shape
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width), jnp.float32).astype(x.dtype)
    attend = nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype, name="attn")
    x = attend(jnp.broadcast_to(probe, (batch, 1, width)), x, mask=mask[:, None, None])
    x = jnp.where(mask.any(1)[:, None, None], x, 0)  # a softmax over none is a mean of the dead
    norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")
    return (x + Mlp(self.hidden, self.dtype, self.activation, name="mlp")(norm(x)))[:, 0]


class ViT(nn.Module):
  """Patches, prefix tokens, blocks, norm, head."""

  config: Any  # config.model, frozen
  shape: Shape
  sites: Sites

  @property
  def spots(self) -> tuple[Spot, ...]:
    """All that act."""
    return self.sites.spots

  @nn.nowrap
  def example(self) -> dict[str, Array]:
    """Arguments of the smallest call, to find the shapes of parameters with."""
    s = self.shape
    return dict(images=jnp.zeros((1, s.grid[0] * s.patch, s.grid[1] * s.patch, s.channels)))

  @nn.nowrap
  def dense(self) -> "ViT":
    """The same without sites; parameters under `reduce/` mean nothing to it."""
    return self.clone(sites=Sites(self.sites.stack))

  @nn.compact
  def __call__(
    self,
    images: Array,
    *,
    train: bool = False,
    mode: str = "gather",
    keeps: Mapping[str, Array] | None = None,
  ) -> Output:
    """Classifies images.

    Args:
      images: (B, height, width, channels) float32, normalised.
      train: stochastic depth and sampled decisions; randomness from the streams "dropout" and "reduce".  A stream
        "depth" asks for stochastic depth alone.
      mode: "mask" (full length, counts may be traced) or "gather" (counts are Python ints).
      keeps: counts that replace those of a site, {site: (spots,) int}; traced only in mask mode.
    """
    s, c, dtype = self.shape, self.config, jnp.dtype(self.config.dtype)
    norm = functools.partial(nn.LayerNorm, epsilon=c.norm_eps, dtype=dtype)
    x = PatchEmbed(s.width, s.patch, c.patch_bias, dtype, name="patch_embed")(images)
    x = self._embed(x, dtype)
    x = norm(name="pre_norm")(x) if c.pre_norm else x
    tokens, aux, counts = tk.start(x, s.num_prefix_tokens), {}, []
    layer_type = nn.remat(Block, static_argnums=(4, 5)) if c.remat else Block
    scope = None
    for layer in range(s.depth):
      block = layer_type(c, s, self.sites, layer, name=f"block_{layer}")
      tokens, scope, report = block(tokens, scope, keeps, train, mode)
      aux = _extend(aux, report)
      owner = tokens.owner if scope is None else tk.follow(scope.outer.owner, tokens.owner)
      aux |= {f"owner/{layer}": owner, f"tokens/{layer}": tokens.x}
      counts.append(
        tokens.x.shape[1] // tokens.images if mode == "gather" else tokens.mask.astype(jnp.float32).sum(1).mean()
      )
    tokens, report = Reduce(self.sites.at(-1, "output"), name="reduce")(tokens, "output", keeps, train=train, mode=mode)
    feats = {name: a for name, a in tokens.feats.items() if name == MEMORY}  # a language model may read it
    tokens = tokens.replace(x=norm(name="norm")(tokens.x) if c.final_norm == "tokens" else tokens.x, feats=feats)
    pooled = self._pool(tokens, dtype)
    pooled = (norm(name="fc_norm")(pooled) if c.final_norm == "pooled" else pooled).astype(jnp.float32)
    logits = pooled
    if s.num_classes:
      logits = nn.Dense(s.num_classes, kernel_init=nn.initializers.zeros, name="head")(pooled)
    if s.distilled:
      dist = nn.Dense(s.num_classes, kernel_init=nn.initializers.zeros, name="head_dist")(
        tokens.x[:, 1].astype(jnp.float32)
      )
      aux = aux | {"logits_dist": dist}
      logits = (logits + dist) / 2
    return Output(logits, tuple(counts), tokens, pooled, _extend(aux, report))

  def _embed(self, x: Array, dtype: Any) -> Array:
    """Prefix tokens and positions; registers stand behind CLS and have no position."""
    s, c, normal = self.shape, self.config, nn.initializers.normal(0.02)
    prefix = [name for name, there in (("cls_token", s.has_cls), ("dist_token", s.distilled)) if there]
    extra = [self.param(name, normal, (1, 1, s.width), jnp.float32) for name in prefix]
    if c.position == "learned":
      position = self.param("pos_embed", normal, (1, x.shape[1] + len(prefix), s.width), jnp.float32)
    elif c.position == "sincos2d":
      position = jnp.concatenate([jnp.zeros((1, len(prefix), s.width)), sincos2d(s.grid, s.width)], axis=1)
    else:
      position = jnp.zeros((), jnp.float32)
    parts = [jnp.broadcast_to(e, (x.shape[0], 1, s.width)).astype(dtype) for e in extra]
    x = jnp.concatenate([*parts, x], axis=1) + position.astype(dtype)
    if not c.num_registers:
      return x
    registers = self.param("registers", normal, (1, c.num_registers, s.width), jnp.float32).astype(dtype)
    registers = jnp.broadcast_to(registers, (x.shape[0], c.num_registers, s.width))
    return jnp.concatenate([x[:, : len(prefix)], registers, x[:, len(prefix) :]], axis=1)

  def _pool(self, tokens: Tokens, dtype: Any) -> Array:
    """A mean counts each token as often as it stands for source tokens, as ToMe and DiffRate do with MAE's models."""
    s, c = self.shape, self.config
    if s.pool == "cls":
      return tokens.x[:, 0]
    patches = tokens.alive & ~tokens.protected
    if s.pool == "map":
      pool = AttentionPool(s.num_heads, s.mlp_dim, dtype, c.activation, c.norm_eps, name="pool")
      return pool(tokens.x, patches)
    weight = jnp.where(patches, tokens.size, 0.0)
    if tokens.learned:  # the dead teach their gates what they could have said
      weight = jnp.where(tokens.protected, 0.0, tokens.size * tokens.mask)
    total = (weight[..., None] * tokens.visible.astype(jnp.float32)).sum(1)
    whole = weight.sum(1, keepdims=True)
    mean = total / jnp.where(whole > 0, whole, 1.0)  # where no patch is left, gates still learn from finite numbers
    return mean if s.pool == "avg" else jnp.concatenate([tokens.x[:, 0].astype(jnp.float32), mean], axis=-1)


def _extend(aux: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
  return aux | {name: aux.get(name, {}) | values for name, values in report.items()}


def make(config: ConfigDict, sites: Mapping[str, Any]) -> ViT:
  """The module for `config.model` and `config.sites`; every error of either is raised here."""
  sizes = shape(config)
  return ViT(FrozenConfigDict(config), sizes, parse(sites, sizes.stack()))
