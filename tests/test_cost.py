"""FLOPs against XLA's count and against the papers' figures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred import cost
from tokred.config import complete
from tokred.cost import Profile
from tokred.nn import vit
from tokred.sites import parse


def model(sites=None, **fields):
  return vit.make(complete({"model": fields}).model, sites or {})


@pytest.mark.parametrize(
  "fields",
  [
    dict(variant="mu/4", depth=4, image_size=(16, 16), num_classes=10),
    dict(variant="mu/4", depth=2, image_size=(56, 28), num_classes=10, pool="avg", num_registers=2),
    dict(variant="mu/2", depth=1, width=64, num_heads=4, image_size=(32, 32), num_classes=10, pool="map"),
    dict(variant="Ti/16", depth=2),
    dict(variant="S/16", depth=2, distilled=True),
    dict(variant="S/14", depth=1, image_size=(56, 56), mlp="gated", activation="silu", mlp_dim=1024, pool="cls_avg"),
    dict(variant="Ti/8", depth=1, image_size=(56, 56), position="rope2d", pre_norm=True, num_classes=0),
  ],
  ids=lambda f: f"{f['variant']}-{f.get('pool', 'cls')}",
)
def test_flops_within_5_percent_of_xla(fields):
  module = model(**fields)
  images = jax.ShapeDtypeStruct((4, *complete({"model": fields}).model.image_size, 3), jnp.float32)
  params = jax.eval_shape(functools.partial(module.init, jax.random.key(0)), images)
  xla = cost.measured(lambda p, x: module.apply(p, x).logits, params, images) / 4
  s = module.shape
  ours = cost.flops(s.sizes(), module.sites.profile(s.width, s.num_heads))
  assert abs(ours / xla - 1) < 0.05, (ours, xla)


def deit_s(sites):
  shape = vit.shape(complete({"model": dict(variant="S/16")}).model)
  return shape.sizes(), parse(sites, shape.stack()).profile(shape.width, shape.num_heads)


PRUNE = {
  2.327: (197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3),
  2.905: (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
}
MERGE = {
  2.327: (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3),
  2.905: (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
}


@pytest.mark.parametrize("giga", PRUNE)
def test_macs_of_diffrates_schedules(giga):
  n, attention, mlp = 197, [], []
  for prune, merge in zip(PRUNE[giga], MERGE[giga], strict=True):
    attention.append(n)
    n = min(n, prune, merge)
    mlp.append(n)
  sizes, _ = deit_s({})
  assert cost.macs(sizes, Profile(tuple(attention), tuple(mlp), n)) / 1e9 == pytest.approx(giga, abs=1e-3)


def test_macs_of_dense_deit_and_tome():
  sizes, profile = deit_s({})
  assert cost.macs(sizes, profile) / 1e9 == pytest.approx(4.60, abs=0.01)
  sizes, profile = deit_s({"merge": dict(reducer="tome", layers=range(12), r=13)})
  assert profile.attention == tuple(197 - 13 * layer for layer in range(12))
  bare = Profile(profile.attention, profile.mlp, profile.final)  # the paper leaves the matching out
  assert cost.macs(sizes, bare) / 1e9 == pytest.approx(2.703, abs=1e-3)
  assert 0 < profile.extra_macs < 0.005 * cost.macs(sizes, bare)


def test_macs_by_hand():
  # patches 4 x width 2 x patch_dim 3 = 24; head 2 x 5 = 10; attention of 3 tokens: 4 x 3 x 4 + 2 x 9 x 2 = 84;
  # MLP of 2 tokens: 2 x 2 x 2 x 7 = 56
  sizes = cost.Sizes(width=2, mlp_dim=7, num_heads=1, patches=4, patch_dim=3, num_tokens=5, num_classes=5)
  assert cost.macs(sizes, Profile((3,), (2,), 2)) == 24 + 10 + 84 + 56
  assert cost.macs(sizes, Profile((3,), (2,), 2, extra_macs=6)) == 24 + 10 + 84 + 56 + 6
  # Attention pooling of the 2 tokens that are left: keys and values 2 x 2 x 4 and the map 2 x 2 x 2, query and output
  # 2 x 4, an MLP 2 x 2 x 7: 16 + 8 + 8 + 28; a second head 2 x 5.
  pooled = dataclasses.replace(sizes, map_pool=True, num_heads_out=2)
  assert cost.macs(pooled, Profile((3,), (2,), 2)) == 24 + 20 + 84 + 56 + 60
  # 14 FLOPs an element of a norm's input, twice, 4 an element of each head's map, 5.4 an element of the MLP.
  more = 14 * (3 * 2 + 2 * 2) + 4 * 9 * 3 + 5.4 * 2 * 7
  heads = dataclasses.replace(sizes, num_heads=3)
  assert cost.flops(heads, Profile((3,), (2,), 2)) == pytest.approx(2 * (24 + 10 + 84 + 56) + more)
  # gated: a third matrix of 2 x 2 x 7 = 28; a head that reads CLS and the mean: 10 more
  gated = dataclasses.replace(sizes, gated=True, head_inputs=2)
  assert cost.macs(gated, Profile((3,), (2,), 2)) == 24 + 20 + 84 + 56 + 28


def test_those_who_are_foreseen_to_go_ask_nothing():
  """147 of 197 tokens go behind attention: their rows of the map, 2 N D each, and of its projection, D^2, are spared.

  The score itself is a row of logits, and the map's exponentials are no multiply-adds: a few percent.  Papers, and
  `macs`, count all 197.
  """
  spared, params = {}, None
  for score in ("cls_attention", "token_norm"):
    module = model(dict(a=dict(reducer="topk", layers=(0,), keep=50, score=score)), variant="S/16", depth=1)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = params or jax.eval_shape(functools.partial(module.init, jax.random.key(0)), images)
    spared[score] = cost.measured(lambda p, x, m=module: m.apply(p, x).logits, params, images)
  expected = 2 * 147 * (2 * 197 * 384 + 384**2)
  assert 0.97 < (spared["token_norm"] - spared["cls_attention"]) / expected < 1.05


def test_min_st_hands_the_whole_gradient_to_every_count():
  value, grads = jax.value_and_grad(lambda n, a, b: 3.0 * cost.min_st(n, (a, b)), argnums=(0, 1, 2))(9.0, 7.0, 5.0)
  assert value == 15.0 and [float(g) for g in grads] == [0.0, 3.0, 3.0]
  value, grads = jax.value_and_grad(lambda n, a: cost.min_st(n, (a,)), argnums=(0, 1))(4.0, 7.0)
  assert value == 4.0 and [float(g) for g in grads] == [0.0, 1.0]  # also where it does not bind
  assert cost.min_st(4, (7, 3)) == 3 and isinstance(cost.min_st(4, (7, 3)), int) and cost.min_st(4, ()) == 4


def test_flops_are_differentiable_in_the_counts():
  shape = vit.shape(complete({"model": dict(variant="S/16")}).model)
  sites = parse({"p": dict(reducer="topk", layers=(3, 6), rate="learned")}, shape.stack())

  def flops(counts):
    return cost.flops(shape.sizes(), sites.profile(shape.width, shape.num_heads, {"p": counts}))

  counts = jnp.array([120.0, 60.0])
  value, slope = jax.value_and_grad(flops)(counts)
  step = jnp.array([1.0, -1.0])
  difference = (flops(counts + step) - flops(counts - step)) / 2
  np.testing.assert_allclose(slope @ step, difference, rtol=1e-3)
  assert (np.asarray(slope) > 0).all() and value < cost.flops(shape.sizes(), parse({}, shape.stack()).profile(384, 6))
