"""The autoencoder's selector, what brings tokens back, and the probe that reads the map."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import MODES, quick

import tokred
from tokred import evaluate, probe
from tokred import tokens as tk
from tokred.layout import Stack
from tokred.model import forward
from tokred.reducers import autoencoder, clca, recover
from tokred.reducers.cluster import DPCKNN
from tokred.reducers.topk import TopK
from tokred.sites import parse
from tokred.testing import check_reducer

SMALL = dict(variant="mu/4", width=16, depth=3, num_heads=2, mlp_dim=32, image_size=(16, 16), channels=1)
SMALL |= dict(num_classes=10)


def make(x, *, prefix=0, alive=None):
  tokens = tk.start(jnp.asarray(x, jnp.float32), prefix)
  return tokens if alive is None else tokens.replace(mask=jnp.asarray(alive, bool))


def build(**sites):
  data = dict(mean=(0.5,), std=(0.5,), eval_split="test[:20]", train_split="train[:40]")
  return tokred.build(dict(model=SMALL, sites=sites, data=data, eval=dict(batch_size=40))).init(0)


# The autoencoder.


def test_autoencoder_loss():
  """Token 0 is protected.  Squared errors: (1 + 1) / 2 = 1, (0 + 4) / 2 = 2, 0; mean over three 1.  One of three kept.

  share 0.5: 1 + 0.5 max(1/3, 0.5) = 1.25;  share 0.2: 1 + 0.5 / 3 = 1.1667.
  """
  z = jnp.zeros((1, 4, 2))
  again = jnp.asarray([[[9.0, 9.0], [1.0, -1.0], [0.0, 2.0], [0.0, 0.0]]])
  y, free = jnp.asarray([[1.0, 1.0, 0.0, 0.0]]), jnp.asarray([[False, True, True, True]])
  out = autoencoder.Autoencoder(parent=None).loss(z, again, y, free, 0.5)
  np.testing.assert_allclose([out["loss"][0], out["error"][0], out["kept"][0]], [1.25, 1.0, 1 / 3], rtol=1e-6)
  out = autoencoder.Autoencoder(parent=None).loss(z, again, y, free, 0.2)
  np.testing.assert_allclose(out["loss"], 1 + 0.5 / 3, rtol=1e-6)


def test_place_code():
  """Width 5, two frequencies 1 and 10000^(-1/2) = 0.01: sin 2, sin 0.02, cos 2, cos 0.02, and a zero."""
  code = autoencoder.place_code(jnp.asarray([[2]]), 5)
  np.testing.assert_allclose(code[0, 0], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02), 0], rtol=1e-5)


@pytest.fixture(scope="module")
def learned():
  """A selector that has seen images whose tokens 4 to 7 are always the same, and 0 to 3 never."""
  reducer = autoencoder.Autoencoder(num_layers=1, num_heads=1)
  known = jax.random.normal(jax.random.key(1), (1, 4, 8))

  def draw(key):
    news = jax.random.normal(key, (16, 4, 8))
    return make(jnp.concatenate([news, jnp.broadcast_to(known, news.shape)], axis=1))

  params = reducer.init(jax.random.key(0), draw(jax.random.key(0)), 4, train=True, mode="mask")
  optimizer = optax.adam(1e-2)

  def loss(params, key):
    data, noise = jax.random.split(key)
    _, report = reducer.apply(params, draw(data), 4, train=True, mode="mask", rngs={"reduce": noise})
    return report["loss"].mean()

  def step(state, key):
    params, moments = state
    value, grads = jax.value_and_grad(loss)(params, key)
    updates, moments = optimizer.update(grads, moments)
    return (optax.apply_updates(params, updates), moments), value

  keys = jax.random.split(jax.random.key(2), 300)
  (params, _), values = jax.jit(functools.partial(jax.lax.scan, step))((params, optimizer.init(params)), keys)
  return reducer, params, draw(jax.random.key(3)), values


def test_autoencoder_keeps_what_cannot_be_reconstructed(learned):
  reducer, params, tokens, losses = learned
  assert losses[-20:].mean() < 0.5 * losses[0]
  gathered, _ = reducer.apply(params, tokens, 4, train=False, mode="gather")
  assert (gathered.position < 4).mean() > 0.9  # by chance it is a half
  assert gathered.x.shape == (16, 4, 8)


def test_autoencoder_learns_on_frozen_features(learned):
  reducer, params, tokens, _ = learned

  def loss(params, x):
    rngs = {"reduce": jax.random.key(0)}
    _, report = reducer.apply(params, tokens.replace(x=x), 4, train=True, mode="mask", rngs=rngs)
    return report["loss"].sum()

  grads, slope = jax.jit(jax.grad(loss, (0, 1)), compiler_options=quick())(params, tokens.x)
  assert not slope.any()
  flat = jax.tree_util.tree_leaves_with_path(grads)
  assert all(np.isfinite(leaf).all() for _, leaf in flat)
  reached = {str(path[1]) for path, leaf in flat if (leaf != 0).any()}
  assert reached >= {"['selector']", "['logits']", "['reconstructor']"}


def test_autoencoder_freezes_without_its_reconstructor():
  model = build(pick=dict(reducer="autoencoder", place="output", keep=0.5, layers=(), num_heads=1))
  frozen = tokred.freeze(model)
  assert set(model.params["reduce"]["pick"]["autoencoder"]) - set(frozen.params["reduce"]["pick"]["autoencoder"]) == {
    "reconstructor"
  }
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
  np.testing.assert_array_equal(frozen(images).logits, model(images).logits)
  assert frozen(images).tokens.x.shape[1] == 9


# HoT's recovery.

QUERIES = np.asarray([[np.sqrt(2) * np.log(3), 0.0], [0.0, 1.0], [0.0, -1.0]], np.float32)


def identity(queries):
  """Parameters of Recover whose projections change nothing."""
  head = dict(kernel=np.eye(2, dtype=np.float32)[:, None], bias=np.zeros((1, 2), np.float32))
  out = dict(kernel=np.eye(2, dtype=np.float32)[None], bias=np.zeros(2, np.float32))
  return {"params": dict(queries=queries, attn=dict(query=head, key=head, value=head, out=out))}


@pytest.mark.parametrize("mode", MODES)
def test_recover(mode):
  """Keys (1, 0) and (0, 0), of three source tokens; the third token is dead in mask mode, and holds NaN.

  Query 0: logits sqrt(2) ln 3 (1, 0) / sqrt(2) = ln 3, 0: weights 3/4, 1/4; e + (0.75, 0).
  Queries 1 and 2: logits 0, 0: weights 1/2; (0, 1) + (0.5, 0) and (0, -1) + (0.5, 0).
  """
  x = [[[1.0, 0.0], [0.0, 0.0], [np.nan, np.nan]]]
  tokens = make(x, alive=[[1, 1, 0]]).replace(owner=jnp.asarray([[1, -1, 0]], jnp.int32))
  if mode == "gather":
    tokens = jax.tree.map(lambda a: a[:, :2], tokens.replace(owner=tokens.mask)).replace(owner=tokens.owner)
  out, _ = recover.Recover(num_heads=1).apply(identity(QUERIES), tokens, 3, train=False, mode=mode)
  want = [[np.sqrt(2) * np.log(3) + 0.75, 0.0], [0.5, 1.0], [0.5, -1.0]]
  np.testing.assert_allclose(out.x[0], want, rtol=1e-6)
  assert out.alive.all() and not out.protected.any() and out.size.tolist() == [[1.0, 1.0, 1.0]]
  assert out.owner.tolist() == out.position.tolist() == [[0, 1, 2]]


def test_recover_leaves_the_protected_alone():
  """Source tokens 0 and 2 are both the protected token 0, which is that of source token 0."""
  tokens = make([[[5.0, 6.0], [0.0, 0.0]]], prefix=1).replace(owner=jnp.asarray([[0, 1, 0]], jnp.int32))
  out, _ = recover.Recover(num_heads=1).apply(identity(0 * QUERIES), tokens, 3, train=False, mode="gather")
  np.testing.assert_allclose(out.x[0], [[5.0, 6.0], [2.5, 3.0], [2.5, 3.0]])
  assert out.protected.tolist() == [[True, False, False]]


def test_recover_teaches_the_gates():
  """out_0 = sum_j w_j g_j x_j / sum_j w_j g_j with w 3, 1 and g 1, 0: d out_0 / d g_1 = (x_1 - out_0) 1 / 3 = -1/3."""
  tokens = make([[[1.0, 0.0], [0.0, 0.0]]]).replace(owner=jnp.asarray([[0, 1, 1]], jnp.int32))

  def first(gate):
    gated = tokens.replace(mask=gate)
    return recover.Recover(num_heads=1).apply(identity(QUERIES), gated, 3, train=True, mode="mask")[0].x[0, 0, 0]

  np.testing.assert_allclose(jax.grad(first)(jnp.asarray([[1.0, 0.0]])), [[0.0, -1 / 3]], atol=1e-6)


def test_recover_in_a_model():
  """17 tokens, 9 of them in block 1, and 17 again before block 2."""
  cut = dict(reducer="dpcknn", layers=(1,), place="before", keep=9)
  model = build(cut=cut, back=dict(reducer="recover", layers=(2,), place="before"))
  assert model.counts == (17, 9, 17)
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
  masked = forward(model.module, "mask")(model.params, images)
  out = model(images)
  np.testing.assert_allclose(masked.tokens.x, out.tokens.x, atol=1e-5)
  assert out.tokens.x.shape == (2, 17, 16) and (out.tokens.owner == jnp.arange(17)).all()


# HoT's second position.


@pytest.mark.parametrize("mode", MODES)
def test_second_positions(mode):
  """CLS and density peaks 1, 3 of four tokens: the first of them gets 10, the second 20; with one row, only the first.

  Where all stay, nothing is added.
  """
  tokens = make([[[9.0], [0.0], [0.1], [5.0], [5.2]]], prefix=1)
  kept = lambda out: out.x[0, :3, 0] - jnp.asarray([9.0, *LINE_KEPT])  # noqa: E731
  for rows, want in (([[10.0], [20.0]], [0, 10, 20]), ([[10.0]], [0, 10, 0])):
    module = DPCKNN(slots=len(rows))
    out, _ = module.apply({"params": dict(slots=jnp.asarray(rows))}, tokens, 3, train=False, mode=mode)
    np.testing.assert_allclose(kept(out), want, atol=1e-5)
    whole, _ = module.apply({"params": dict(slots=jnp.asarray(rows))}, tokens, 5, train=False, mode=mode)
    np.testing.assert_array_equal(whole.x, tokens.x)


LINE_KEPT = (0.0, 5.0)  # pairs 0, 0.1 and 5, 5.2: of equal tokens the lower index


def test_second_positions_keep_the_laws_and_start_at_nothing():
  check_reducer(DPCKNN(slots=5), laws=[2, 3, 6, 8], cases=("later",))
  model = build(cut=dict(reducer="dpcknn", layers=(1,), keep=9, slots=8))
  rows = model.params["block_1"]["reduce"]["cut"]["dpcknn"]["slots"]
  assert rows.shape == (8, 16) and not rows.any()
  with pytest.raises(ValueError, match=r"sites\.cut\.slots=-1 must be 0 or more"):
    build(cut=dict(reducer="dpcknn", layers=(1,), keep=9, slots=-1))


# Cross-layer cache aggregation.


def behind(block, **options):
  return clca.CLCA(layer=block, depth=7, parent=None, **(dict(at=(2, 4, 6)) | options))


@pytest.mark.parametrize("mode", MODES)
def test_clca(mode):
  """CLS 10 and patches 1, 3: behind block 0 their mean 2 is remembered, behind block 1 that of 5 and 7, 6.

  In block 2 the 7 goes; behind it 2 and 6 join the survivors 10, 5, and 5 is what is remembered of block 2 itself.
  """
  tokens = make([[[10.0], [1.0], [3.0], [np.nan], [np.nan]]], prefix=1, alive=[[1, 1, 1, 0, 0]])
  step = lambda module, tokens: module.apply({}, tokens, 3, train=False, mode=mode)[0]  # noqa: E731
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
  step = lambda n, tokens, **v: behind(n, **options).apply(v, tokens, 9, train=False, mode=mode)[0]  # noqa: E731
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
  grads = jax.grad(lambda p: jnp.square(model.module.apply({"params": p}, images).tokens.x[:, 0, 0]).sum())(
    model.params
  )
  assert (grads["block_0"]["reduce"]["cache"]["clca"]["carriers"] != 0).all()


def test_clca_around_routers():
  """Behind the block in front a scope is closed; inside of it the cache would be lost, and it says so."""
  router = dict(reducer="router", layers=(1, 3), keep=9)
  built = lambda **c: tokred.build(dict(model=DEEP, sites=dict(mod=router, cache=dict(reducer="clca", **c)))).init(0)  # noqa: E731
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


# The probe.


@pytest.mark.parametrize(("method", "counts", "final"), [("topk", 33, 33), ("tome", 32, 32), ("hot", 33, 65)])
def test_segment_recipe(method, counts, final):
  """65 tokens; ToMe takes 11 in each of three blocks."""
  spec = importlib.util.spec_from_file_location("segment", Path(__file__).parents[1] / "configs" / "segment.py")
  recipe = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(recipe)
  sites = tokred.build(recipe.get_config(f"method={method}")).module.sites
  assert sites.counts()[-1] == counts and sites.profile(64, 2).final == final
  with pytest.raises(ValueError, match="method='hott' is unknown; valid: dense, topk, tome, hot"):
    recipe.get_config("method=hott")


def test_segments():
  """Patches of 2: means 1, 0.25 (not above), 0, 0.5; an image of class 3."""
  image = np.asarray([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], np.float32)[None, ..., None]
  assert probe.segments(image, np.asarray([3]), 2, 0.25).tolist() == [[4, 0, 0, 4]]


def test_score():
  """Class 0: 2 of 3, class 1: 1 of 2, class 2 does not occur: (2/3 + 1/2) / 2; right 3 of 4."""
  out = probe.score(np.asarray([0, 0, 0, 1]), np.asarray([0, 0, 1, 1]), 3)
  assert out == {"miou": pytest.approx((2 / 3 + 1 / 2) / 2), "accuracy": 0.75}


def test_fit():
  x = np.concatenate([np.random.default_rng(0).normal(size=(60, 2)) + 8 * i for i in range(3)]).astype(np.float32)
  weight, bias = probe.fit(x, np.repeat(np.arange(3), 60), 3, 100)
  assert ((x @ weight + bias).argmax(-1) == np.repeat(np.arange(3), 60)).mean() > 0.98


def test_features():
  """Sources 0 to 3, CLS first; token 1 stands at 1 and represents 2 too; 3 has gone in block 1, with x = (3, 5).

  The final norm takes (3, 5) to (-1, 1).
  """
  out = make([[[7.0, 7.0], [1.0, 2.0]]], prefix=1).replace(owner=jnp.asarray([[0, 1, 1, -1]], jnp.int32))
  aux = {"owner/0": jnp.asarray([[0, 1, 1, 2]]), "tokens/0": jnp.asarray([[[0.0, 0.0], [0.0, 0.0], [3.0, 5.0]]])}
  aux |= {"owner/1": out.owner, "tokens/1": out.x}
  norm = dict(scale=jnp.ones(2), bias=jnp.zeros(2))
  maps = probe.features(tokred.nn.vit.Output(None, (), out, None, aux), norm, 1)
  np.testing.assert_allclose(maps["restored"][0], [[1, 2], [1, 2], [-1, 1]], atol=1e-5)
  np.testing.assert_allclose(maps["zeros"][0], [[1, 2], [0, 0], [0, 0]])


def test_probe_of_a_model():
  model = build(merge=dict(reducer="tome", layers=(1,), r=6))
  out = probe.probe(model, 40, steps=20)
  assert out.keys() == {"restored", "zeros"}
  assert all(0 <= value <= 1 for row in out.values() for value in row.values())
  dense = probe.probe(dataclasses.replace(build(), params=model.params), 40, steps=20)
  assert dense["restored"] == dense["zeros"]
