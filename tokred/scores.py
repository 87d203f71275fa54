"""Pure functions that rank tokens: features in, (B, N) float32 out, higher is kept first.

What a dead token gets is anybody's guess, NaN included; who ranks must leave it out, as `ranks` does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tokred.tokens import Array, Tokens, take

PAGERANK = (1, 5, 10, 30, 50)  # rounds of votes after which attention reports `pagerank_<rounds>`; 30 have converged


def cls_attention(tokens: Tokens) -> Array:
  """Attention that CLS pays to each token, averaged over heads.  (Liang et al., 2022, EViT, arXiv:2202.07800)"""
  return tokens.feats["cls_attention"].astype(jnp.float32)


def column_mean(tokens: Tokens) -> Array:
  """Attention that each token receives, the mean over heads and living queries.

  Its inverse is the informativeness of Lee et al., 2024, MCTF, arXiv:2403.10030.
  """
  return tokens.feats["column_mean"].astype(jnp.float32)


def pagerank(tokens: Tokens) -> Array:
  """Importance that tokens vote each other through attention.  (Wang et al., 2024, Zero-TPrune, arXiv:2305.17328)"""
  return tokens.feats["pagerank_30"].astype(jnp.float32)


def last_attention(tokens: Tokens) -> Array:
  """Attention that a prompt's last token pays, the mean over heads.  (Chen et al., 2024, FastV, arXiv:2403.06764)"""
  return tokens.feats["last_attention"].astype(jnp.float32)


def last_attention_ahead(tokens: Tokens) -> Array:
  """The same in the layer that follows, before it is computed.  (Xing et al., 2024, PyramidDrop, arXiv:2410.17247)"""
  return tokens.feats["last_attention_ahead"].astype(jnp.float32)


def key_norm(tokens: Tokens) -> Array:
  """||k_i||, averaged over heads."""
  return jnp.linalg.norm(tokens.feats["key"].astype(jnp.float32), axis=-1).mean(-1)


def value_norm(tokens: Tokens) -> Array:
  """||v_i||, averaged over heads."""
  return jnp.linalg.norm(tokens.feats["value"].astype(jnp.float32), axis=-1).mean(-1)


def token_norm(tokens: Tokens) -> Array:
  """||x_i|| of the residual stream."""
  return jnp.linalg.norm(tokens.x.astype(jnp.float32), axis=-1)


def repr_shift(tokens: Tokens) -> Array:
  """||F(x)_i||, how far the attention branch F moves a token.  (Choi et al., 2025, arXiv:2508.00367)"""
  return jnp.linalg.norm(tokens.feats["update"].astype(jnp.float32), axis=-1)


PROBES = 4  # directions that seed `random`


def random(tokens: Tokens) -> Array:
  """Uniform on [0, 1), a fixed function of a token's original position and of its image.

  No random stream: this serves inference too, alike in mask and in gather mode and in whatever batch an image comes.
  Positions are integers and exact, but an image shows itself only in activations, which differ in their last bits
  from one compiled program to the next.  So its seed is *where* it is extreme: the positions of the tokens that reach
  farthest along four fixed directions.  Rounding moves an argmax only where the first two are nearly tied.
  """
  free = tokens.alive & ~tokens.protected
  free = jnp.where(free.any(1, keepdims=True), free, tokens.alive)
  signs = np.random.default_rng(0).choice([-1.0, 1.0], (tokens.x.shape[-1], PROBES))
  x = jnp.where(free[..., None], jax.lax.stop_gradient(tokens.x).astype(jnp.float32), 0.0)
  reach = jnp.einsum("bnd,dm->bnm", x, jnp.asarray(signs, jnp.float32), precision="highest")
  place = jnp.argmax(jnp.where(free[..., None], reach, -jnp.inf), axis=1).astype(jnp.int32)  # (B, M)
  position = tokens.position.reshape(*tokens.mask.shape, -1).astype(jnp.uint32)  # (B, N, axis)
  seed = jnp.zeros(len(place), jnp.uint32)
  for word in jnp.moveaxis(take(position, place), 0, -1).reshape(-1, len(place)):
    seed = _scramble(seed ^ word)
  state = jnp.broadcast_to(seed[:, None], tokens.mask.shape)
  for axis in range(position.shape[-1]):
    state = _scramble(state ^ position[..., axis])
  return (state >> 8).astype(jnp.float32) * 2.0**-24  # 24 bits are exact in float32


def _scramble(word: Array) -> Array:
  """A bijection of uint32 in which each bit depends on all: SplitMix's finaliser after a step of the golden ratio."""
  word = word + np.uint32(0x9E3779B9)
  word = (word ^ (word >> 16)) * np.uint32(0x21F0AAAD)
  word = (word ^ (word >> 15)) * np.uint32(0x735A2D97)
  return word ^ (word >> 15)


SCORES: dict[str, tuple[Callable[[Tokens], Array], tuple[str, ...]]] = {  # name -> function, features it reads
  "cls_attention": (cls_attention, ("cls_attention",)),
  "column_mean": (column_mean, ("column_mean",)),
  "key_norm": (key_norm, ("key",)),
  "last_attention": (last_attention, ("last_attention",)),
  "last_attention_ahead": (last_attention_ahead, ("last_attention_ahead",)),
  "pagerank": (pagerank, ("pagerank_30",)),
  "random": (random, ()),
  "repr_shift": (repr_shift, ("update",)),
  "token_norm": (token_norm, ()),
  "value_norm": (value_norm, ("value",)),
}
