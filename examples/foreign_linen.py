"""ToMe in a Linen transformer that knows nothing of tokred: python examples/foreign_linen.py

What a backbone must offer is little: blocks that take tokens (batch, token, width) and a mask of the keys.  Between two
of them a reducer turns `Tokens` into fewer, and `keep` says how many; in mask mode, for training, the shape stays and
`alive` tells who is left.  Both modes give the same logits, and the parameters are those of the plain transformer.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

import tokred


class Block(nn.Module):
  """Somebody's block."""

  heads: int

  @nn.compact
  def __call__(self, x, mask=None):
    h = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(self.heads)(h, mask=mask)
    h = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
    return x + nn.Dense(x.shape[-1])(h)


class Transformer(nn.Module):
  """Somebody's transformer."""

  width: int = 32
  depth: int = 3
  heads: int = 2
  classes: int = 10

  def setup(self):
    self.patches = nn.Conv(self.width, (4, 4), (4, 4))
    self.cls = self.param("cls", nn.initializers.normal(0.02), (1, 1, self.width))
    self.positions = self.param("positions", nn.initializers.normal(0.02), (1, 17, self.width))
    self.blocks = [Block(self.heads) for _ in range(self.depth)]
    self.head = nn.Dense(self.classes)

  def embed(self, images):
    """(B, 16, 16, 3) to CLS and 16 patches, (B, 17, width)."""
    x = self.patches(images).reshape(images.shape[0], -1, self.width)
    return jnp.concatenate([jnp.broadcast_to(self.cls, (len(x), 1, self.width)), x], axis=1) + self.positions

  def __call__(self, images):
    x = self.embed(images)
    for block in self.blocks:
      x = block(x)
    return self.head(x[:, 0])


# --- what concerns tokred: from here
class Reduced(Transformer):
  """The same, and after each block the 4 most similar pairs of tokens merge."""

  def setup(self):
    super().setup()
    self.merge = tokred.reducers.get("tome")()

  def __call__(self, images, train=False, mode="gather"):
    tokens = tokred.tokens.start(self.embed(images), num_prefix_tokens=1)  # CLS is never merged
    keep = tokens.x.shape[1]
    for block in self.blocks:
      x = block(tokens.x, mask=tokens.alive[:, None, None])
      tokens = tokens.replace(x=x, feats={"key": x[:, :, None]})  # what ToMe compares: keys, or the tokens themselves
      keep -= 4
      tokens, _ = self.merge(tokens, keep, train=train, mode=mode)
    return self.head(tokens.x[:, 0])


# --- to here


def main():
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  params = Transformer().init(jax.random.key(1), images)  # or a checkpoint of theirs
  for name, logits in (
    ("dense, 17 tokens", Transformer().apply(params, images)),
    ("gather, 17 to 5", Reduced().apply(params, images)),
    ("mask", Reduced().apply(params, images, mode="mask")),
  ):
    print(f"{name:18}{logits[0, :4]}")


if __name__ == "__main__":
  main()
