"""flax.nnx.bridge carries a tokred ViT into an NNX program."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokred.config import complete
from tokred.nn import vit


def test_bridge_gives_the_same_logits_and_gradients():
  config = complete({"model": dict(variant="mu/4", image_size=(16, 16), num_classes=5)}).model
  linen = vit.make(config, {"s": dict(reducer="tome", layers=(0,), r=4)})
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  model = nnx.jit(lambda: nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(images))()
  rng = np.random.default_rng(0)
  noisy = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape), p.dtype) / 10, nnx.state(model, nnx.Param))
  nnx.update(model, noisy)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

  loss = lambda logits: jnp.sum(logits * jnp.arange(5.0))
  want, want_grads = jax.jit(jax.value_and_grad(lambda p: loss(linen.apply({"params": p}, images).logits)))(params)
  got, grads = nnx.jit(nnx.value_and_grad(lambda m: loss(m(images).logits)))(model)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  grads = nnx.to_pure_dict(grads)
  assert jax.tree.structure(grads) == jax.tree.structure(want_grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want_grads)
