"""Cross-layer cache aggregation: what is cached, when it joins, and carriers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import MODES, quick
from test_recover import SMALL, build, make

import tokred
from tokred import evaluate
from tokred import tokens as tk
from tokred.layout import Stack
from tokred.model import forward
from tokred.reducers import clca
from tokred.reducers.topk import TopK
from tokred.sites import parse


def behind(block, **options):
  return clca.CLCA(layer=block, depth=7, parent=None, **(dict(at=(2, 4, 6)) | options))


@pytest.mark.parametrize("mode", MODES)
def test_clca(mode):
  """CLS 10 and patches 1, 3: behind block 0 their mean 2 is remembered, behind block 1 that of 5 and 7, 6.

  In block 2 the 7 goes; behind it 2 and 6 join the survivors 10, 5, and 5 is what is remembered of block 2 itself.
  """
  tokens = make([[[10.0], [1.0], [3.0], [np.nan], [np.nan]]], prefix=1, alive=[[1, 1, 1, 0, 0]])

  def step(module, tokens):
    return jax.jit(lambda t: module.apply({}, t, 3, train=False, mode=mode)[0], compiler_options=quick())(tokens)

  first = step(behind(0), tokens)
  np.testing.assert_allclose(first.feats[clca.STATE][0, 0], [[2.0]])
  second = step(behind(1), first.replace(x=jnp.asarray([[[10.0], [5.0], [7.0], [np.nan], [np.nan]]])))
  np.testing.assert_allclose(second.feats[clca.STATE][0, 0], [[2.0], [6.0]])
  later = second.replace(mask=jnp.asarray([[True, True, False, False, False]]))
  if mode == "gather":
    later = jax.tree.map(lambda a: a[:, :2], later.replace(owner=later.mask)).replace(owner=later.owner)
  out = step(behind(2), later)
  np.testing.assert_allclose(out.x[0, :4, 0], [10.0, 5.0, 2.0, 6.0])
  assert out.alive[0].tolist() == [True] * 4 + [False] * 3 * (mode == "mask")
  assert out.protected[0, :4].tolist() == [True, False, True, True]
  np.testing.assert_allclose(out.feats[clca.STATE][0, 0], [[5.0]])
  assert (out.owner == tokens.owner).all()


def test_clca_counts():
  """Behind 2, 4, 6 join the two blocks since, four vectors with CLS; 12 blocks have quarters 3, 6, 9, as the authors.

  With place="before" the tokens are those of the block in front.
  """
  assert [behind(block).recovered(9, 17) for block in range(7)] == [9, 9, 11, 9, 11, 9, 11]
  assert [behind(block, place="before").recovered(9, 17) for block in range(7)] == [9, 9, 9, 11, 9, 11, 9]
  assert behind(2, cache="both").recovered(9, 17) == 13 and behind(2).recovered(17, 17) == 19
  assert behind(0, at=()).flushes == (1, 3, 5) and clca.CLCA(depth=12).flushes == (3, 6, 9)
  assert [clca.CLCA(layer=n, depth=12, at=(3, 6, 9, 10)).joining for n in (3, 6, 9, 10, 11)] == [3, 3, 3, 1, 0]
  full = make(jnp.ones((1, 3, 1)))
  assert clca.STATE not in behind(6, at=(2, 4)).apply({}, full, 3, train=False, mode="gather")[0].feats
  with pytest.raises(ValueError, match="holds 0 vectors behind block 2, not 2: a clca site must act after all blocks"):
    behind(2).apply({}, full, 3, train=False, mode="gather")
  with pytest.raises(ValueError, match="did you mean 'mean'"):
    behind(2, cache="meen").needed()
  carried = [behind(block, place="before", cache="none", carriers=2) for block in range(7)]
  assert [module.recovered(9, 17) for module in carried] == [11, 9, 9, 13, 9, 13, 9]
  assert behind(3, place="before", cache="both", carriers=1).joining == 6
  for wrong in (dict(cache="none"), dict(carriers=-1)):
    with pytest.raises(ValueError, match="must be 0 or more, and 1 or more where cache='none'"):
      behind(2, **wrong).needed()
  with pytest.raises(ValueError, match="join before block 0; valid: place='before'"):
    behind(2, carriers=1, place="after").needed()
  with pytest.raises(ValueError, match="layers of a clca site must begin with 0"):
    behind(2, place="before", carriers=1).apply({}, full, 3, train=False, mode="gather")
  for wrong in ((3, 2), (0, 3), (2, 2), (1.5,), 3):
    with pytest.raises(ValueError, match="must be recovery blocks in ascending order"):
      behind(2, at=wrong).needed()


S16 = Stack(depth=12, num_tokens=197, num_protected=1)


@pytest.mark.parametrize(
  "prune, arriving, counts",
  [
    # ceil(0.1 x 196) + CLS + fused = 22, and 3; ceil(0.1 x 21) + 4 + 1 = 8, and 3; ceil(0.1 x 4) + 7 + 1 = 9, and 3
    (dict(reducer="topk", fuse=True, keep=0.1), (197, 25, 11), (25, 11, 12)),
    # ToMe takes half of the free: 98 of 196, 49 of 98, 24 of 49; so 99 + 3, 53 + 3, 32 + 3
    (dict(reducer="tome", r=400), (197, 102, 56), (102, 56, 35)),
    (dict(reducer="topk", keep=1.0), (197, 200, 203), (200, 203, 206)),  # the sequence grows past the input's
    (dict(reducer="topk", rate="learned"), (197, 200, 203), (200, 203, 206)),
  ],
  ids=["evit", "tome", "all", "learned"],
)
def test_clca_joins_behind_each_reduction_and_its_tokens_are_protected(prune, arriving, counts):
  cache = dict(reducer="clca", layers=range(12))
  parsed = parse(dict(prune=dict(layers=(3, 6, 9)) | prune, cache=cache), S16)
  cuts = [spot for spot in parsed.spots if spot.site == "prune"]
  assert tuple(spot.arriving for spot in cuts) == arriving
  assert [spot.protected for spot in cuts] == [1, 4, 7]
  assert tuple(parsed.counts()[block] for block in (3, 6, 9)) == counts
  assert parsed.profile(384, 6).attention == (197,) * 4 + tuple(n for n in counts for _ in range(3))[:8]
  if "rate" in prune:
    assert [len(spot.candidates) for spot in cuts] == [196] * 3
    kept = (jnp.float32(50), jnp.float32(30), jnp.float32(20))
    assert [float(n) for n in parsed.profile(384, 6, {"prune": kept}).leaving[3::3]] == [53, 33, 23]


def test_recovery_ends_the_protection():
  """9 + 1 + 2 tokens, and 17 again: who joined is gone, and CLS is the protected one."""
  cut, cache = dict(reducer="topk", layers=(1, 4), keep=0.5), dict(reducer="clca", layers=range(6), at=(1, 3))
  parsed = parse(dict(cut=cut, cache=cache, back=dict(reducer="recover", layers=(4,), place="before")), Stack(6, 17, 1))
  assert parsed.counts() == (17, 10, 10, 12, 9, 9)
  assert [spot.protected for spot in parsed.spots if spot.site != "cache"] == [1, 4, 1]


DEEP = dict(SMALL, depth=5)


@pytest.mark.parametrize("prune", [dict(reducer="topk", fuse=True, keep=0.1), dict(reducer="tome", r=9)])
def test_clca_in_a_model(prune):
  """No vector that joined is ever cut, in mask mode as in gather mode."""
  cache = dict(reducer="clca", layers=range(5), at=(1, 2, 3))
  model = tokred.build(dict(model=DEEP, sites=dict(prune=dict(prune, layers=(1, 2, 3)), cache=cache))).init(0)
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
  masked, out = forward(model.module, "mask")(model.params, images), model(images)
  n = model.counts[-1]
  assert out.counts == model.counts and out.tokens.x.shape[1] == n
  np.testing.assert_array_equal(masked.counts, model.counts)
  np.testing.assert_allclose(masked.tokens.x[:, :n], out.tokens.x, atol=1e-5)
  np.testing.assert_array_equal(masked.tokens.owner, out.tokens.owner)
  assert out.tokens.protected.sum(1).tolist() == [4, 4] and n > 4  # CLS, three means, and others


@pytest.mark.parametrize("mode", MODES)
def test_clca_carriers(mode):
  """CLS 10 and a carrier that begins as 10 + 0.5; behind block 0 it is 3, behind block 1, where a patch has gone, 4.

  What was cached of them, (2, 3) and (5, 4) with the means of the patches, joins behind block 2; the one that goes on
  is still the one before them.
  """
  options, patches = dict(place="before", at=(2,), carriers=1), jnp.asarray([[1.0], [3.0]])
  tokens = make([[[10.0], *patches.tolist()]], prefix=1)

  def step(n, tokens, **variables):
    run = lambda t: behind(n, **options).apply(variables, t, 9, train=False, mode=mode)[0]
    return jax.jit(run, compiler_options=quick())(tokens)

  out = step(0, tokens, params=dict(carriers=jnp.full((1, 1), 0.5)))
  assert out.x[0, :, 0].tolist() == [10, 1, 3, 10.5] and out.protected[0].tolist() == [True, False, False, True]
  out = step(1, out.replace(x=jnp.asarray([[[10.0], [1.0], [3.0], [3.0]]])))
  assert out.feats[clca.STATE][0, 0, :, 0].tolist() == [2, 3]
  cut = TopK(score="token_norm", parent=None).apply({}, out, 3, train=False, mode=mode)[0]
  out = step(2, cut.replace(x=jnp.asarray([[[10.0], [4.0], [5.0], [np.nan]]])[:, : cut.x.shape[1]]))
  assert out.feats[clca.STATE][0, 0, :, 0].tolist() == [2, 3, 5, 4]
  out = step(3, out)
  assert out.x[0, :7, 0].tolist() == [10, 4, 5, 2, 3, 5, 4] and out.alive.sum() == 7
  assert out.feats[clca.CARRIER][0, :7].tolist() == [False, True] + [False] * 5
  assert (out.owner[0] == jnp.asarray([0, -1, 2])).all()


def test_clca_carriers_in_a_model():
  """17 and a carrier; 9 of 16 patches go on from block 1, behind which 2 join (a mean and a carrier of block 0).

  ToMe of block 3 then merges 3; behind block 2, so before it, 2 have joined again.
  """
  cache = dict(reducer="clca", layers=range(5), place="before", at=(1, 2), carriers=1)
  sites = dict(prune=dict(reducer="topk", layers=(1,), keep=11), merge=dict(reducer="tome", layers=(3,), r=3))
  model = tokred.build(dict(model=DEEP, sites=sites | dict(cache=cache))).init(0)
  assert model.counts == (18, 11, 13, 12, 12)
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
  masked, out = forward(model.module, "mask")(model.params, images), model(images)
  np.testing.assert_allclose(masked.tokens.x[:, :12], out.tokens.x, atol=1e-5)
  assert out.tokens.protected.sum(1).tolist() == [6, 6]
  loss = lambda p: jnp.square(model.module.apply({"params": p}, images).tokens.x[:, 0, 0]).sum()
  grads = jax.jit(jax.grad(loss), compiler_options=quick())(model.params)
  assert (grads["block_0"]["reduce"]["cache"]["clca"]["carriers"] != 0).all()


def test_clca_around_routers():
  """Behind the block in front a scope is closed; inside of it the cache would be lost, and it says so."""
  router = dict(reducer="router", layers=(1, 3), keep=9)
  built = lambda **c: tokred.build(dict(model=DEEP, sites=dict(mod=router, cache=dict(reducer="clca", **c)))).init(0)
  model = built(layers=range(1, 5), place="before", at=(2, 3))
  assert model.counts == (17, 17, 17, 19, 20)
  with pytest.raises(ValueError, match="holds 1 vectors behind block 2, not 2"):
    built(layers=range(5), at=(2,))
  with pytest.raises(ValueError, match=r"sites\.cache adds tokens in layer 3 at place='after', inside the scope of"):
    built(layers=range(5), at=(2, 3))


@pytest.mark.parametrize("rate", [dict(keep=9), dict(rate="learned")], ids=["fixed", "learned"])
def test_clca_counts_in_a_model(rate):
  """9 of 17 tokens leave block 0, behind block 1 one joins, and ToMe merges 3 of the 10, or none of so few."""
  cut = dict(reducer="topk", layers=(0,)) | rate
  cache = dict(reducer="clca", layers=(0, 1), at=(1,))
  model = build(cut=cut, cache=cache, merge=dict(reducer="tome", layers=(2,), r=3))
  first, second, third = model.counts
  assert second == first + 1 and third == (7 if "keep" in rate else min(second, 15))
  assert model.macs < build().macs
  if "keep" in rate:
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
    masked, out = forward(model.module, "mask")(model.params, images), model(images)
    np.testing.assert_array_equal(masked.counts, [9, 10, 7])
    np.testing.assert_allclose(masked.tokens.x[:, :7], out.tokens.x, atol=1e-5)
    assert out.tokens.protected.sum() == 4  # CLS and a mean, in two images


def test_clca_learns_with_a_rate_and_freezes():
  """What a learned rate leaves, and one more behind each; a frozen model has as many."""
  cut = dict(reducer="topk", layers=(1, 2), rate="learned")
  model = build(cut=cut, cache=dict(reducer="clca", layers=range(3), at=(1, 2)))
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))

  def loss(params):
    out = model.module.apply({"params": params}, images, train=True, mode="mask")
    return jnp.sum(out.features * jnp.cos(jnp.arange(16.0))), out

  grads, masked = jax.jit(jax.grad(loss, has_aux=True), compiler_options=quick())(model.params)
  frozen = tokred.freeze(model)
  np.testing.assert_array_equal(masked.counts, frozen.counts)
  out = frozen(images)  # what learns ranks the tokens also where all of them stay: only CLS has its place
  np.testing.assert_allclose(masked.features, out.features, atol=1e-5)
  assert masked.tokens.protected.sum() == out.tokens.protected.sum() == 6
  counts = evaluate.counts_by_site(model.module, masked.aux)
  assert [int(counts[f"cache/{layer}"]) for layer in range(3)] == list(frozen.counts)
  for block in ("block_1", "block_2"):
    slope = grads[block]["reduce"]["cut"]["rate"]["logits"]
    assert np.isfinite(slope).all() and (slope != 0).any() == (block == "block_1"), block


def test_what_joins_and_what_is_remembered_by_hand():
  """The mean of 2 and 4 is 3; a gate moves it by (x_i - 3) / 2, also that of 8, which is switched off: 5 / 2.  What
  joins represents one token each, so that the log of its size is 0."""
  tokens = tk.start(jnp.asarray([[[9.0], [2.0], [4.0], [8.0]]]), 1).replace(mask=jnp.asarray([[1.0, 1, 1, 0]]))

  def mean(mask):
    return clca.CLCA(place="after", depth=4).apply({}, tokens.replace(mask=mask), method="vectors")[0, 0, 0]

  np.testing.assert_allclose(mean(tokens.mask), 3.0)
  np.testing.assert_allclose(jax.grad(mean)(tokens.mask), [[0, -0.5, 0.5, 2.5]])
  joined = clca.append(tokens, jnp.ones((1, 2, 1)))
  assert joined.size[0, :5].tolist() == [1] * 5 and joined.mask[0].tolist() == [1, 1, 1, 1, 1, 0]
