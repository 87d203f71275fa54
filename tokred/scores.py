"""Pure functions that rank tokens: features in, (B, N) float32 out, higher is kept first."""

from collections.abc import Callable

import jax.numpy as jnp

from tokred.tokens import Array, Tokens


def cls_attention(tokens: Tokens) -> Array:
  """Attention that CLS pays to each token, averaged over heads.  (Liang et al., 2022, EViT, arXiv:2202.07800)"""
  return tokens.feats["cls_attention"].astype(jnp.float32)


def key_norm(tokens: Tokens) -> Array:
  """||k_i||, averaged over heads."""
  return jnp.linalg.norm(tokens.feats["key"].astype(jnp.float32), axis=-1).mean(-1)


def token_norm(tokens: Tokens) -> Array:
  """||x_i|| of the residual stream."""
  return jnp.linalg.norm(tokens.x.astype(jnp.float32), axis=-1)


SCORES: dict[str, tuple[Callable[[Tokens], Array], tuple[str, ...]]] = {  # name -> function, features it reads
  "cls_attention": (cls_attention, ("cls_attention",)),
  "key_norm": (key_norm, ("key",)),
  "token_norm": (token_norm, ()),
}
