"""What a forward pass costs, as a differentiable function of how many tokens each layer sees.

A multiply-add is one MAC and two FLOPs.  Papers of this field print MACs and call them FLOPs ("DeiT-S has 4.6 GFLOPs");
`macs` gives their figure and `flops` what XLA counts, element-wise work included.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tokred.tokens import straight_through


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of a plain transformer encoder for images."""

  width: int
  mlp_dim: int
  num_heads: int
  patches: int  # at the input
  patch_dim: int  # channels x patch x patch
  num_tokens: int  # at the input, prefix tokens counted
  num_classes: int
  num_heads_out: int = 1  # classification heads: 2 with a distillation token
  map_pool: bool = False
  gated: bool = False  # an MLP of three layers
  head_inputs: int = 1  # vectors that a head reads: 2 for CLS and the mean of the patches


@dataclasses.dataclass(frozen=True)
class Profile:
  """Token counts along the depth; numbers or traced scalars."""

  attention: tuple[Any, ...]  # tokens in each layer's attention
  mlp: tuple[Any, ...]  # tokens in each layer's MLP
  final: Any  # tokens at the head
  extra_macs: Any = 0.0  # what the reducers compute themselves
  leaving: tuple[Any, ...] = ()  # tokens that leave each block, where it is known
  places: tuple[Any, ...] = ()  # of an image in each layer's map, where they are more than its share of a batch's rows

  @property
  def maps(self) -> Any:
    """Tokens of an image in each layer's attention, and places in its map."""
    return zip(self.attention, self.places or self.attention, strict=True)


def min_st(arriving: Any, counts: Sequence[Any]) -> Any:
  """The smallest of all; each count, binding or not, gets the whole gradient, and `arriving` none.

  Thus a rate sees the cost of what comes right after it, and is pushed also where another one binds (DiffRate, as
  its authors compute it).
  """
  if not counts:
    return arriving
  if all(isinstance(n, (int, float)) for n in (arriving, *counts)):
    return min(arriving, *counts)
  smallest = jnp.min(jnp.stack([jnp.asarray(n, jnp.float32) for n in (arriving, *counts)]))
  return straight_through(smallest, sum(jnp.asarray(n, jnp.float32) for n in counts))


def macs(sizes: Sizes, profile: Profile) -> Any:
  """Multiply-adds of one image, as the papers count: 4 N D^2 + 2 N^2 D for attention, 2 N D mlp_dim for the MLP.

  A gated MLP has 3 N D mlp_dim.  What a reducer that foresees who goes spares attention is not taken off.

  Returns:
    A float, or a float32 scalar with a gradient where the profile is traced.
  """
  d = sizes.width
  total = sizes.patches * d * sizes.patch_dim + sizes.num_heads_out * sizes.head_inputs * d * sizes.num_classes
  for n, places in profile.maps:
    total = total + 4.0 * n * d * d + 2.0 * places * places * d
  for n in profile.mlp:
    total = total + (3.0 if sizes.gated else 2.0) * n * d * sizes.mlp_dim
  if sizes.map_pool:
    total = total + 2.0 * profile.final * d * (d + 1) + 2.0 * d * d + 2.0 * d * sizes.mlp_dim
  return total + profile.extra_macs


def flops(sizes: Sizes, profile: Profile) -> Any:
  """FLOPs of one image: two a MAC, and the element-wise work of norms, softmax, GELU, biases and residuals."""
  total = 2.0 * macs(sizes, profile)
  for n, places in profile.maps:
    total = total + n * sizes.width * NORM + places * places * sizes.num_heads * SOFTMAX
  for n in profile.mlp:
    total = total + n * sizes.width * NORM + n * sizes.mlp_dim * GELU
  return total


# FLOPs an element as XLA's cost analysis counts them (bias and residual included); fitted to compiled models.
NORM, SOFTMAX, GELU = 14.0, 4.0, 5.4


def of(module: Any, price: Any = macs, counts: Any = None) -> Any:
  """What a model costs, of one image or of one prompt with its images.

  Args:
    module: a ViT; or a VLM, whose language model is counted for reading `prompt` tokens of text and what is left of one
      image, its MLP being gated and its keys grouped.
    price: `macs` or `flops`.
    counts: tokens out by site and spot, numbers or traced scalars, where they differ from the static ones; of a learned
      rate in a language model the share of its visual tokens.
  """
  tower = getattr(module, "tower", module)
  s = tower.shape
  profile = tower.sites.profile(s.width, s.num_heads, counts)
  total = price(s.sizes(), profile)
  if tower is module:
    return total
  arriving = profile.final - module.dropped
  n = prompt(module, profile, counts)
  rest = (
    module.projector.macs(arriving, s.width) + reading(module.llm.shape, n.attention, n.mlp, module.whole) + n.extra
  )
  return total + (2.0 if price is flops else 1.0) * rest


def of_each(module: Any, aux: Any, price: Any = macs) -> Any:
  """What each image costs by its own tokens, (B,) float32; where all keep the same number it is what the model costs.

  Args:
    module: a ViT with sites.
    aux: what its pass reported.
    price: `macs` or `flops`.
  """
  alive = {spot.site: aux[f"reduce/{spot.site}/alive"] for spot in module.sites.spots}
  return jax.vmap(lambda counts: of(module, price, counts))(alive)


def prompt(module: Any, profile: Profile | None = None, counts: Any = None) -> Any:
  """Tokens in each layer of a VLM's language model: `tokred.nn.budget.Lengths` of `prompt` tokens of text and an image.

  Args:
    module: the VLM.
    profile: of its tower; None: with static counts.
    counts: see `of`.
  """
  s = module.tower.shape
  profile = profile or module.tower.sites.profile(s.width, s.num_heads, counts)
  return module.lengths(module.projector.left(profile.final - module.dropped), counts)


def reading(shape: Any, attention: Sequence[Any], mlp: Sequence[Any], whole: int | None = None) -> Any:
  """Multiply-adds of a language model that reads a prompt and tells what follows it.

  N D (2 H + 2 G) d + 2 N^2 H d for attention with H heads of d channels and G of keys and values, 3 N D mlp_dim for
  the gated MLP, D vocab for the one token that follows.  What a causal kernel leaves out of N^2 is counted.

  Args:
    shape: `tokred.nn.decoder_layer.Shape`.
    attention: tokens in each layer's attention, numbers or traced scalars.
    mlp: tokens in each layer's MLP.
    whole: places in the N^2 of attention where merged tokens stand at several (`tokred.nn.unmerge`); None: N.
  """
  d, total = shape.width, float(shape.width * shape.vocab)
  heads, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
  for n in attention:
    total = total + 2.0 * n * d * (heads + keys) + 2.0 * (n if whole is None else whole) ** 2 * heads
  for n in mlp:
    total = total + 3.0 * n * d * shape.mlp_dim
  return total


def writing(shape: Any, cache: Sequence[Any], through: Sequence[Any] | None = None) -> Any:
  """Multiply-adds of a language model that writes one token more.

  D (2 H + 2 G) d + 2 N H d for attention to the N keys that a layer holds, 3 D mlp_dim, and D vocab at the head.

  Args:
    shape: `tokred.nn.decoder_layer.Shape`.
    cache: keys that each layer holds, numbers or traced scalars.
    through: share of the written tokens that go through each layer; None: all.
  """
  d, total = shape.width, float(shape.width * shape.vocab)
  heads, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
  for layer, n in enumerate(cache):
    layer_macs = 2.0 * d * (heads + keys) + 2.0 * n * heads + 3.0 * d * shape.mlp_dim
    total = total + layer_macs * (1.0 if through is None else through[layer])
  return total


def cache_bytes(shape: Any, cache: Sequence[Any], itemsize: int = 2) -> Any:
  """Bytes of the keys and values of a prompt.

  Args:
    shape: `tokred.nn.decoder_layer.Shape`.
    cache: tokens that each layer holds, numbers or traced scalars.
    itemsize: bytes of a number; 2 for bfloat16.
  """
  return 2.0 * itemsize * shape.num_kv_heads * shape.head_dim * sum(cache)


def measured(function: Any, *args: Any) -> float:
  """FLOPs of a compiled function by XLA's own cost analysis."""
  analysis = jax.jit(function).lower(*args).compile().cost_analysis()
  return float((analysis[0] if isinstance(analysis, (list, tuple)) else analysis)["flops"])
