"""A learned selector in an NNX transformer that knows nothing of tokred: python examples/foreign_nnx.py

Reducers are Linen modules; `nnx.bridge.ToNNX` makes them part of an NNX one.  A selector learns through the gate of
each token, so attention must let gradients through it: here `attend` of tokred takes the place of the attention
function.  A mask of the keys, as in foreign_linen.py, is enough for methods that have nothing to learn.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import tokred
from tokred.nn.attention import attend


class Block(nnx.Module):
  """Somebody's block; queries, keys and values are (batch, token, head, dim)."""

  def __init__(self, width, heads, rngs):
    self.heads, self.norm1, self.norm2 = heads, nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
    self.qkv, self.proj = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
    self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x, attention=jax.nn.dot_product_attention):
    q, k, v = jnp.split(self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3 * self.heads, -1), 3, axis=2)
    x = x + self.proj(attention(q, k, v).reshape(x.shape))
    return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
  """Somebody's transformer."""

  def __init__(self, rngs, width=32, depth=3, heads=2, classes=10):
    self.patches = nnx.Conv(3, width, (4, 4), (4, 4), rngs=rngs)
    self.cls = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
    self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
    self.head = nnx.Linear(width, classes, rngs=rngs)

  def embed(self, images):
    """(B, 16, 16, 3) to CLS and 16 patches, (B, 17, width)."""
    x = self.patches(images).reshape(images.shape[0], 16, -1)
    return jnp.concatenate([jnp.broadcast_to(self.cls[...], (len(x), 1, x.shape[-1])), x], axis=1)

  def __call__(self, images):
    x = self.embed(images)
    for block in self.blocks:
      x = block(x)
    return self.head(x[:, 0])


# --- what concerns tokred: from here
class Reduced(nnx.Module):
  """The same with a DynamicViT selector before the second block, which leaves CLS and 8 patches."""

  def __init__(self, model, images, rngs):
    self.model, self.select = model, nnx.bridge.ToNNX(tokred.reducers.get("gumbel")(), rngs=rngs)
    self.select.lazy_init(tokred.tokens.start(model.embed(images), 1), 9, train=False, mode="mask")

  def __call__(self, images, train=False, mode="gather"):
    tokens = tokred.tokens.start(self.model.embed(images), num_prefix_tokens=1)
    for layer, block in enumerate(self.model.blocks):
      if layer == 1:
        tokens, _ = self.select(tokens, 9, train=train, mode=mode)
      tokens = tokens.replace(x=block(tokens.x, lambda *qkv, mask=tokens.mask: attention(mask, *qkv)))
    return self.model.head(tokens.x[:, 0])


def attention(mask, *qkv):
  return attend(*(a.swapaxes(1, 2) for a in qkv), mask=mask).swapaxes(1, 2)


# --- to here


def main():
  images, rngs = jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), nnx.Rngs(0, reduce=1)
  dense = Transformer(rngs)
  reduced = Reduced(dense, images, rngs)
  for name, logits in (
    ("dense, 17 tokens", dense(images)),
    ("gather, 17 to 9", reduced(images)),
    ("mask", reduced(images, mode="mask")),
  ):
    print(f"{name:18}{logits[0, :4]}")


if __name__ == "__main__":
  main()
