"""What language models and the reducers in them cost, against hand arithmetic and against XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from languages import QUICK, TINY, tiny

from tokred import cost
from tokred.nn import budget, decoder
from tokred.nn.decoder_layer import Shape

SITE = dict(stack="llm", reducer="topk", place="before", score="token_norm")


def test_what_layers_cost():
  """Width 32, 4 heads and 2 of keys, of 8 channels; text 10, visual 20 of which 1/2 arrive at layer 1, 1/4 at layer 2.

  Layer 1 reads 20 tokens: 2 20 32 (32 + 16) + 2 20^2 32 + 3 20 32 48; it holds 20 keys: 2 2 16 20 bytes.
  """
  sites = tiny(dict(a=SITE | dict(rate="learned", layers=(1, 2))))[0].sites
  shape = Shape(**TINY)

  def price(share):
    n = budget.lengths(sites, shape, 10.0, 20.0, {"a": {0: share[0], 1: share[1]}})
    return cost.reading(shape, n.attention, n.mlp), n.cache

  (macs, n), slope = jax.value_and_grad(price, has_aux=True)(jnp.array([0.5, 0.25]))
  np.testing.assert_allclose(jnp.stack([jnp.asarray(a) for a in n]), (30, 20, 15))
  layer = lambda n: 2 * n * 32 * 48 + 2 * n * n * 32 + 3 * n * 32 * 48
  np.testing.assert_allclose(float(macs), 32 * 50 + layer(30) + layer(20) + layer(15))
  assert (np.asarray(slope) > 0).all()
  one = lambda n: 2 * 32 * 48 + 2 * n * 32 + 3 * 32 * 48
  np.testing.assert_allclose(cost.writing(shape, n), 32 * 50 + one(30) + one(20) + one(15))
  np.testing.assert_allclose(cost.cache_bytes(shape, n), 2 * 2 * 16 * 65)
  text = budget.lengths(sites, shape, 10.0, 20.0)
  np.testing.assert_allclose(text.attention, (30, 30, 30))
  assert text.extra == 0


def test_what_reducers_cost_themselves_and_text_that_goes_round():
  """Width 32, text 10, visual 20.

  The router of gamma-MoD, two classes: 2 30 32 in each layer that it serves, of whose tokens, text too, a half goes in.
  DyVTE's exit in front of layer 1, hidden 16: 2 32 16, whoever arrives; with 6 of 20 left, 16 in layers 1 and 2.
  """
  shape = Shape(**TINY)
  of = lambda **site: tiny(dict(a=dict(stack="llm") | site))[0].sites
  mod = budget.lengths(of(reducer="gamma_mod", layers=(0, 2), keep=0.5), shape, 10.0, 20.0)
  assert mod.attention == mod.mlp == mod.cache == (15, 30, 15) and mod.extra == 2 * 2 * 30 * 32
  exits = of(reducer="dyvte", layers=(1,), keep=0.3, hidden=16)
  left = budget.lengths(exits, shape, 10.0, 20.0)
  assert left.attention == (30, 16, 16) and left.extra == 2 * 32 * 16


WIDE = Shape(vocab=64, width=128, depth=3, mlp_dim=384, num_heads=4, num_kv_heads=2, head_dim=32, max_length=256)
TEXT, VISUAL = 32, 224
OWN = {  # what a reducer computes beside the layers; not atp, whose two maps XLA makes one where they are one block
  "attention_gate": dict(reducer="attention_gate", place="ahead"),
  "autoencoder": dict(reducer="autoencoder", keep=0.25),
  "covipal": dict(reducer="covipal", keep=0.25),
  "dyvte": dict(reducer="dyvte", keep=0.25),
  "gamma_mod": dict(reducer="gamma_mod", place="around", layers=(0, 2), keep=0.25),
  "glimpse": dict(reducer="glimpse", keep=0.25, hidden=64),
  "gumbel": dict(reducer="gumbel", keep=0.25),
  "qtsplus": dict(reducer="qtsplus", keep=0.25, num_heads=4, num_kv_heads=2),
  "router": dict(reducer="router", place="around", layers=(0, 2), keep=0.25),
  "router_text": dict(reducer="router", place="around", layers=(0, 2), keep=0.25, text=True),
}
FAST = ("gamma_mod", "qtsplus")


def price(site=None):
  """FLOPs of reading a prompt, by XLA's analysis and by ours."""
  ids, protected = np.zeros((1, TEXT + VISUAL), np.int32), np.zeros((1, TEXT + VISUAL), bool)
  protected[:, : TEXT // 2] = protected[:, -TEXT // 2 :] = True
  module = decoder.make(WIDE, {"a": dict(stack="llm", layers=(1,), place="before") | site} if site else {})
  rngs = dict(params=jax.random.key(0), reduce=jax.random.key(1))
  init = lambda: module.init(rngs, jnp.zeros((1, 2), jnp.int32), mode="mask", train=True)["params"]
  inputs = dict(protected=protected, room=1, known=budget.census(ids == 0, protected), method="prefill")
  read = jax.jit(lambda params: module.apply({"params": params}, ids, **inputs).logits, compiler_options=QUICK)
  xla = read.lower(jax.eval_shape(init)).compile().cost_analysis()["flops"]
  n = budget.lengths(module.sites, WIDE, float(TEXT), float(VISUAL))
  return xla, 2 * (cost.reading(WIDE, n.attention, n.mlp) + n.extra)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.thorough] * (n not in FAST)) for n in OWN])
def test_within_5_percent_of_xla(name):
  (dense, plain), (xla, ours) = price(), price(OWN[name])
  assert ours / xla == pytest.approx(plain / dense, abs=0.05)  # the dense one lacks element-wise work
