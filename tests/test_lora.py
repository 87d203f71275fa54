"""tokred.lora: adapters as a function of the parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred import lora
from tokred.config import complete
from tokred.model import build, init

MICRO = dict(variant="mu/4", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(8, 8), num_classes=5)


def config(**fields):
  return complete({"model": MICRO, "lora": dict(rank=2) | fields})


def shapes(c):
  module = build(c).module
  return jax.eval_shape(lambda: init(module, 0))


def test_what_is_added():
  c = config(targets=(r"block_\d+/attn/(qkv|proj)/kernel", r"patch_embed/kernel", r"block_0/mlp/fc1/kernel"))
  added = jax.eval_shape(lambda p: lora.add(p, c.lora, 0), shapes(c))
  block = added["lora"]["block_0"]
  pair = lambda kernel: (kernel["a"].shape, kernel["b"].shape)
  assert pair(block["attn"]["qkv"]["kernel"]) == ((16, 2), (2, 48))  # (16, 3, 2, 8): 16 -> 3 x 2 x 8
  assert pair(block["attn"]["proj"]["kernel"]) == ((16, 2), (2, 16))  # (2, 8, 16): 2 x 8 -> 16
  assert pair(block["mlp"]["fc1"]["kernel"]) == ((16, 2), (2, 32))
  assert pair(added["lora"]["patch_embed"]["kernel"]) == ((48, 2), (2, 16))  # (4, 4, 3, 16): 4 x 4 x 3 -> 16
  assert "mlp" not in added["lora"]["block_1"]
  assert lora.add({"w": 1}, config(rank=0).lora, 0) == {"w": 1} == lora.merge({"w": 1}, 16.0)


@pytest.mark.parametrize("where", [np, jnp])
def test_merging_by_hand(where):
  # alpha / rank = 8 / 2 = 4; A B for qkv (D 2, 3, H 1, d 1): [[1, 0], [0, 2]] [[1, 2, 3], [4, 5, 6]] = [[1, 2, 3],
  # [8, 10, 12]], times 4; for proj (H 2, d 1, D 1): [[1, 0], [0, 2]] [[1], [3]] = [1, 6], times 4
  array = lambda *x: where.asarray(x, where.float32)
  a = array([1, 0], [0, 2])
  params = {
    "qkv": {"kernel": where.ones((2, 3, 1, 1), where.float32), "bias": array(7)},
    "proj": {"kernel": where.zeros((2, 1, 1), where.float32)},
    "lora": {
      "qkv": {"kernel": {"a": a, "b": array([1, 2, 3], [4, 5, 6])}},
      "proj": {"kernel": {"a": a, "b": array([1], [3])}},
    },
  }
  merged = lora.merge(params, 8.0)
  assert merged.keys() == {"qkv", "proj"}
  assert merged["qkv"]["kernel"][..., 0, 0].tolist() == [[5, 9, 13], [33, 41, 49]]
  assert merged["proj"]["kernel"][..., 0].tolist() == [[4], [24]]
  assert merged["qkv"]["bias"].tolist() == [7] and isinstance(merged["qkv"]["kernel"], type(a))


def test_at_step_0_it_is_the_base_model_and_a_merged_kernel_is_two_products():
  c = config(alpha=3.0)
  model = build(c).init(seed=0)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape), p.dtype) / 10, model.params)
  added = lora.add(params, c.lora, 0)
  assert jax.tree.structure(lora.merge(added, 3.0)) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, lora.merge(added, 3.0), params)  # so are the logits
  pair = added["lora"]["block_1"]["attn"]["qkv"]["kernel"]
  pair["b"] = jnp.asarray(rng.normal(size=pair["b"].shape), jnp.float32)
  merged = lora.merge(added, 3.0)["block_1"]["attn"]["qkv"]["kernel"]
  x = jnp.asarray(rng.normal(size=(3, 16)), jnp.float32)
  kernel = params["block_1"]["attn"]["qkv"]["kernel"]
  apart = jnp.einsum("nd,dche->nche", x, kernel) + 3.0 / 2 * ((x @ pair["a"]) @ pair["b"]).reshape(3, 3, 2, 8)
  np.testing.assert_allclose(jnp.einsum("nd,dche->nche", x, merged), apart, rtol=1e-4, atol=1e-4)


def test_what_is_frozen():
  names = ["block_0/attn/qkv/kernel", "block_0/attn/qkv/bias", "block_0/reduce/s/rate/logits", "head/kernel"]
  names += ["lora/block_0/attn/qkv/kernel/a", "reduce/s/w", "pos_embed"]
  assert lora.frozen(names, config().lora) == {names[0], names[1], "pos_embed"}
  assert lora.frozen(names, config(train=(".*bias",)).lora) == {names[0], names[2], names[3], names[5], names[6]}
  assert lora.frozen(names, config(rank=0).lora) == set()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(rank=-1), "config.lora.rank=-1; valid: 0"),
    (dict(rank=17), "config.lora.rank=17 is more than block_0/attn/proj/kernel has, whose matrix is (16, 16)"),
    (dict(alpha=0.0), "config.lora.alpha=0.0; valid: a finite number above 0"),
    (dict(targets=()), "config.lora.targets=() but rank=2"),
    (dict(targets=(r"blok_\d+/.*",)), r"config.lora.targets: 'blok_\\d+/.*' matches none of the"),
    (dict(targets=("(",)), "config.lora.targets: '(' is not a regular expression"),
    (dict(targets=("pos_embed",)), "config.lora.targets match pos_embed of shape (1, 5, 16); valid: kernels"),
    (dict(train=("(",)), "config.lora.train: '(' is not a regular expression"),
    (dict(train=(".*attn.*",)), "config.lora.train matches block_0/attn/proj/kernel, which config.lora.targets freeze"),
  ],
)
def test_errors_name_field_and_value(fields, message):
  c = config(**fields)
  with pytest.raises(ValueError, match=re.escape(message)):
    jax.eval_shape(lambda p: lora.add(p, c.lora, 0), shapes(c))
