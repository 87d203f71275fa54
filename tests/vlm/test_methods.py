"""configs/vlm_methods.py: every method is a set of sites that a small model takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import quick

from configs import vlm_methods
from tokred import config as defaults
from tokred.nn import placeholders, vlm

TOWER = dict(variant="mu/4", width=16, depth=4, num_heads=2, mlp_dim=32, image_size=(24, 24), num_classes=0)
LLM = dict(vocab=20, width=16, depth=3, num_heads=2, mlp_dim=24, max_length=64, image_token=19)


def model(name, cls, keep=0.25):
  tower = TOWER | (dict(pool="cls") if cls else dict(pool="avg", position="sincos2d"))
  config = defaults.complete({"model": tower, "llm": LLM})
  return vlm.make(config, vlm_methods.sites(name, keep, depth=4, llm_depth=3, cls=cls))


@pytest.mark.parametrize("cls", [True, False])
def test_every_method_is_valid(cls):
  for name in vlm_methods.METHODS:
    module = model(name, cls)
    # Of 36 patches: a quarter or all; VisionDrop's half; what DyMU's four blocks leave, each rounding up.
    assert module.left() in {"visiondrop": (18,), "dymu": (10,)}.get(name, (9, 36)), name


def answer(module, mode):
  """Logits of the last token of two prompts with a picture, and tokens of the prompts in the last layer."""
  ids = np.array([[1, 2, *[19] * 36, 3, 4], [5, 6, *[19] * 36, 7, 8]], np.int32)
  images = np.random.default_rng(0).normal(size=(2, 1, 24, 24, 3)).astype(np.float32)
  slot = placeholders.slots(ids, 19, 1, 36)
  known = module.known(ids, slot)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), ids, images, slot=slot, known=known))["params"]
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / max(a.shape[0], 4) ** 0.5, a.dtype), shapes)
  given = dict(slot=slot, known=known if mode == "gather" else None, mode=mode)
  out = jax.jit(lambda p: module.apply({"params": p}, ids, images, **given), compiler_options=quick())(params)
  logits, last = np.asarray(out.logits), np.asarray(out.tokens.owner)[:, -1]
  return logits[np.arange(2), last], np.asarray(out.tokens.alive.sum(1))


@pytest.mark.thorough
@pytest.mark.parametrize("name", vlm_methods.METHODS)
def test_every_method_masks_as_it_gathers(name):
  module = model(name, cls=True)
  (gathered, count), (masked, _) = (answer(module, mode) for mode in ("gather", "mask"))
  np.testing.assert_allclose(masked, gathered, atol=1e-4)
  np.testing.assert_array_equal(count, 14 if name == "dymu" else 13)


@pytest.mark.parametrize(
  "arguments, message", [(("divprun", 0.1), "method='divprun' is unknown"), (("pool", 9), "keep=9 must")]
)
def test_errors(arguments, message):
  with pytest.raises(ValueError, match=message):
    vlm_methods.sites(*arguments, depth=4, llm_depth=3, cls=True)
