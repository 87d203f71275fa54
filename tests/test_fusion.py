"""Fusion: PiToMe, ToFu, and ToMe's other two splits; the helpers are for `test_slots`, too."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import MODES, backbone, check_forward, check_sources, forward, model, needs_golden, quick, recorded

from tokred import scores
from tokred import tokens as tk
from tokred.reducers import pitome, tofu, tome, tome_kth, tome_random, topk


def make(x, *, prefix=0, alive=None, key=None, **feats):
  """Tokens of (B, N, D); a key (B, N, d) has one head."""
  tokens = tk.start(jnp.asarray(x, jnp.float32), prefix)
  if alive is not None:
    tokens = tokens.replace(mask=jnp.asarray(alive, bool))
  feats = {name: jnp.asarray(value, jnp.float32) for name, value in feats.items()}
  if key is not None:
    feats["key"] = jnp.asarray(key, jnp.float32)[:, :, None]
  return tokens.replace(feats=feats)


def run(reducer, tokens, keep, mode="gather", variables=None):
  apply = functools.partial(reducer.apply, train=False, mode=mode)
  program = jax.jit(lambda variables, tokens: apply(variables, tokens, keep), compiler_options=quick())
  return program(variables or {}, tokens)


def both(reducer, tokens, keep, variables=None):
  """What comes out in gather mode, once mask mode has been found to agree."""
  gathered, report = run(reducer, tokens, keep, "gather", variables)
  masked, _ = run(reducer, tokens, keep, "mask", variables)
  assert masked.x.shape == tokens.x.shape
  np.testing.assert_array_equal(masked.alive, jnp.broadcast_to(jnp.arange(tokens.x.shape[1]) < keep, masked.mask.shape))
  np.testing.assert_array_equal(masked.owner, gathered.owner)
  for name in ("x", "size", "position", "protected"):
    np.testing.assert_allclose(getattr(masked, name)[:, :keep], getattr(gathered, name), atol=1e-6, err_msg=name)
  return gathered, report


def sources(tokens, k):
  return (np.asarray(tokens.owner)[:, None] == np.arange(k)[:, None]).astype(np.uint8)


def test_a_merged_token_is_as_important_as_its_most_important_member():
  """Sources 0 and 2, destinations 1 and 3: 0 is 1, and 2 is 3 turned by 10 degrees.  Of 0 and 1 the scores are .1 and
  .4, of 2 and 3 .5 and .2: as one token .4 and .5, so that the second stays, and not 1, which has .4 to .2 of 3."""
  turn = np.deg2rad(10)
  x = np.asarray([[[1, 0], [1, 0], [-np.cos(turn), np.sin(turn)], [-1, 0]]])
  tokens = make(x, key=x, column_mean=[[0.1, 0.4, 0.5, 0.2]])
  tokens = tokens.replace(feats=tokens.feats | {"state/own": tokens.feats["column_mean"]})
  for mode in MODES:
    merged, _ = run(tome.ToMe(), tokens, 2, mode)
    np.testing.assert_allclose(merged.feats["column_mean"][0, :2], [0.4, 0.5])
    np.testing.assert_allclose(merged.feats["state/own"][0, :2], [0.4, 0.2])  # what lasts is its owner's
    left, _ = run(topk.TopK(score="column_mean"), merged, 1, mode)
    np.testing.assert_array_equal(left.owner, [[-1, -1, 0, 0]])


# PiToMe.


@needs_golden
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["pitome_a", "pitome_b"])
def test_pitome(name, mode):
  arrays, settings = recorded(name)
  module = model("public_vit", dict(merge=dict(reducer="pitome", layers=tuple(range(6)), keep=settings["ratio"])))
  modules = [spot.module() for spot in module.sites.spots]
  np.testing.assert_allclose([m.margin * (1 - m.layer / m.depth) for m in modules], settings["margins"])
  assert [m.layer for m in modules if m.layer < math.ceil(m.early * m.depth)] == settings["bsm_pitome_layers"]
  output, blocks = forward(module, backbone("public_vit"), arrays["images"], mode)
  check_forward(arrays, output, blocks)
  check_sources(arrays, blocks, order=True)


@needs_golden
@pytest.mark.parametrize("case", [0, 1])
def test_pitome_function(case):
  arrays, settings = recorded("fn_pitome")
  given = settings["cases"][case]
  read = lambda name: arrays[f"c{case}_{name}"]
  prefix = int(given["class_token"])
  reducer = pitome.PiToMe(margin=given["margin"], early=float(given["use_bsm_pitome"]))
  keep = reducer.count(given["ratio"], given["N"], prefix, given["N"] - prefix)
  tokens = make(read("x"), prefix=prefix, key=read("metric")).replace(size=jnp.asarray(read("size")[..., 0]))
  assert keep == read("wavg_x").shape[1]
  out, report = both(reducer, tokens, keep)
  np.testing.assert_allclose(report["energy"][:, prefix:], read("energy"), atol=1e-6)
  np.testing.assert_allclose(out.x, read("wavg_x"), atol=1e-6)
  np.testing.assert_allclose(out.size, read("wavg_size")[..., 0], rtol=1e-6)
  np.testing.assert_array_equal(sources(out, keep), read("source"))
  plain, _ = run(reducer, tokens.replace(size=jnp.ones_like(tokens.size)), keep)
  np.testing.assert_allclose(plain.x, read("mean"), atol=1e-6)


def test_pitome_energy():
  """cos = [[1, 1, 0], [1, 1, 0], [0, 0, 1]], m = 0.5: ELU(0.5) = 0.5 and ELU(-0.5) = e^-0.5 - 1 = -0.393469.

  E_0 = E_1 = (0.5 + 0.5 - 0.393469) / 3 = 0.202177;  E_2 = (0.5 - 2 x 0.393469) / 3 = -0.095646.
  The fourth token is not free: it gives nothing.
  """
  cosine = jnp.asarray([[[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]], jnp.float32)
  got = pitome.energy(cosine, jnp.asarray([[True, True, True, False]]), 0.5)
  np.testing.assert_allclose(got[0, :3], [0.202177, 0.202177, -0.095646], atol=1e-6)


def test_pitome_is_as_steep_as_it_is_told():
  """ELU_2(-0.5) = 2 (e^-0.5 - 1) = -0.786939: of the keys above E_2 = (0.5 - 2 x 0.786939) / 3 = -0.357959."""
  tokens = make(np.ones((1, 3, 2)), key=np.eye(2)[[0, 0, 1]][None])
  _, report = run(pitome.PiToMe(margin=0.5, alpha=2.0), tokens, 2)
  np.testing.assert_allclose(report["energy"][0, 2], -0.357959, atol=1e-6)


def test_pitome_splits_all_in_the_first_half():
  """The middle block of five is an early one.  Keys as below, r = 1: token 3 is a source there, later no candidate."""
  key = np.eye(4)[[3, 0, 0, 1, 2, 2]][None]
  for layer in (2, 3):
    module = pitome.PiToMe(margin=0.5, layer=layer, depth=5)
    _, report = run(module, make(np.ones((1, 6, 2)), prefix=1, key=key), 5)
    assert bool(jnp.isfinite(report["similarity"][0, 3])) == (layer == 2)


def test_pitome_leaves_the_lonely_alone():
  """Keys of tokens 1, 2, 4, 5 are two pairs of twins, token 3 stands alone, 0 is protected: r = 2 of T = 5.

  With margin 0.5, E of a twin is (0.5 + 0.5 + 3 (-0.393469)) / 5 = -0.036, of 3 (0.5 + 4 (-0.393469)) / 5 = -0.215.
  Candidates by rank: 1, 2, 4, 5; sources 1 and 4, destinations 2 and 5.  Survivors: [0, 3, 2, 5].
  """
  axes = np.eye(4)
  key = axes[[3, 0, 0, 1, 2, 2]][None]
  x = np.arange(6.0)[None, :, None] * np.ones((1, 1, 2))
  out, _ = both(pitome.PiToMe(margin=0.5, early=0.0), make(x, prefix=1, key=key), 4)
  np.testing.assert_allclose(out.x[0, :, 0], [0, 3, 1.5, 4.5])
  np.testing.assert_allclose(out.size[0], [1, 1, 2, 2])
  assert out.owner[0].tolist() == [0, 2, 2, 1, 3, 3]


# ToFu.


@needs_golden
@pytest.mark.parametrize("mode", MODES)
def test_tofu(mode):
  arrays, settings = recorded("tofu_thirdparty_a")
  n, keep = 65, []
  for _ in range(6):
    n -= math.floor(n - n * settings["ratio"])  # of all tokens, CLS counted
    keep.append(n)
  site = dict(reducer="tofu", layers=tuple(range(6)), keep=tuple(keep), norm="target")
  module = model("public_vit", dict(reduce=site))
  strategy = ["prune" if spot.module().prunes else "tofu" for spot in module.sites.spots]
  assert strategy == settings["strategy"]
  output, blocks = forward(module, backbone("public_vit"), arrays["images"], mode)
  check_forward(arrays, output, blocks)


def pairs():
  """Source 0 matches destination 1, source 2 matches 3 a little less: with one to go it is 0 that goes into 1."""
  key = np.asarray([[[1, 0, 0], [1, 0, 0], [0, 1, 0.2], [0, 1, 0]]])
  x = np.asarray([[[3, 0], [0, 4], [5, 6], [7, 8]]])
  return make(x, key=key)


@pytest.mark.parametrize(
  "norm, merged, size",
  [
    # xbar = (1.5, 2), ||xbar|| = 2.5, the longest is 4: xbar 4 / 2.5 = (2.4, 3.2)
    ("mlerp", [2.4, 3.2], 2),
    # the destination's length before the mean is 4 too: xbar 4 / 4
    ("target", [1.5, 2.0], 1),
  ],
)
def test_tofu_keeps_length(norm, merged, size):
  out, _ = both(tofu.ToFu(norm=norm, early=-1.0), pairs(), 3)
  np.testing.assert_allclose(out.x[0], [[5, 6], merged, [7, 8]], rtol=1e-6)
  np.testing.assert_allclose(out.size[0], [1, size, 1])
  assert out.owner[0].tolist() == [1, 1, 0, 2] and set(out.feats) == {"key"}


def test_tofu_prunes_early():
  out, _ = both(tofu.ToFu(layer=2, depth=4), pairs(), 3)
  np.testing.assert_allclose(out.x[0], [[5, 6], [0, 4], [7, 8]])
  assert out.owner[0].tolist() == [-1, 1, 0, 2] and out.size.tolist() == [[1, 1, 1]]
  assert not tofu.ToFu(layer=3, depth=4).prunes


@pytest.mark.parametrize(
  "n, keep, want",
  [
    (65, 0.8, 52),  # 65 x 0.2 is 13: CLS counts, of 64 patches 12 would go
    (65, 0.5, 33),  # floor(32.5) = 32 go, as many as there are sources
    (64, 0.5, 33),  # 32 would go, but only 31 of the 63 that may go are sources
    (65, 0.3, 33),
    (65, 1.0, 65),
    (25, 0.6, 15),  # 25 x 0.6 is 15.0 in float64
  ],
)
def test_tofu_counts_its_share_of_all_tokens(n, keep, want):
  assert tofu.ToFu().count(keep, n, 1, 64) == want


def test_tofu_of_zeros_has_a_gradient():
  reducer, tokens = tofu.ToFu(early=-1.0), pairs()
  apply = functools.partial(reducer.apply, {}, keep=3, train=False, mode="gather")
  slope = jax.jit(jax.grad(lambda x: apply(tokens.replace(x=x))[0].x.sum()), compiler_options=quick())(0 * tokens.x)
  assert jnp.isfinite(slope).all()


def test_tofu_unknown_norm():
  with pytest.raises(ValueError, match=r"sites.merge.norm='mlrp' is not a way to rescale; did you mean 'mlerp'"):
    model("public_vit", dict(merge=dict(reducer="tofu", layers=(1,), r=2, norm="mlrp")))


# ToMe at even steps.


@needs_golden
@pytest.mark.parametrize("case, index", [(3, 0), (4, 1)])
def test_tome_kth(case, index):
  arrays, settings = recorded("fn_tome_bsm")
  given = settings["cases"][case]
  x, metric = arrays[f"k{index}_x"], arrays[f"k{index}_metric"]
  out, _ = both(tome_kth.ToMeKth(), make(x, key=metric), given["N"] // given["k"])
  np.testing.assert_allclose(out.x, arrays[f"k{index}_mean"], atol=1e-6)
  np.testing.assert_allclose(tk.restore(out.x, out.owner), arrays[f"k{index}_unmerge"], atol=1e-6)


def test_kth_split():
  """floor((t + 1) 3 / 7) rises at t = 2 (9 / 7), 4 (15 / 7) and 6 (21 / 7); a token that is not free has no turn."""
  free = jnp.asarray([[False, True, True, True, True, True, True, True]])
  got = tome_kth.kth_split(free, jnp.asarray([[3]]))
  assert np.flatnonzero(got[0]).tolist() == [3, 5, 7]


# ToMe at random.


def test_tome_random():
  """Two images of CLS and 16 tokens, 10 stay: 7 go into the most similar of the 9 that are not CLS.

  Who stays is whose score "random" is highest; where the seven go, NumPy's argmax of the cosines tells.
  """
  rng = np.random.default_rng(0)
  x, key = rng.normal(size=(2, 17, 4)), rng.normal(size=(2, 17, 3))
  size = rng.integers(1, 5, (2, 17)).astype(np.float32)
  tokens = make(x, prefix=1, key=key).replace(size=jnp.asarray(size))
  out, _ = both(tome_random.ToMeRandom(), tokens, 10)
  luck = np.array(scores.random(tokens))
  for row in range(2):
    stays = 1 + np.sort(np.argsort(-luck[row, 1:])[:9])
    unit = key[row] / np.linalg.norm(key[row], axis=1, keepdims=True)
    into = np.where(np.isin(np.arange(17), [0, *stays]), np.arange(17), stays[(unit @ unit[stays].T).argmax(1)])
    survivors = [0, *stays]
    for place, owner in enumerate(survivors):
      group = into == owner
      np.testing.assert_allclose(out.size[row, place], size[row, group].sum())
      mean = (size[row, group, None] * x[row, group]).sum(0) / size[row, group].sum()
      np.testing.assert_allclose(out.x[row, place], mean, rtol=1e-5)
    np.testing.assert_array_equal(out.owner[row], [survivors.index(owner) for owner in into])
    np.testing.assert_array_equal(out.position[row], survivors)
  assert out.x.shape == (2, 10, 4) and not np.array_equal(out.position[0], out.position[1])
  np.testing.assert_array_equal(out.size.sum(1), size.sum(1))


@pytest.mark.parametrize("mode", MODES)
def test_tome_random_draws_in_training(mode):
  """Another seed chooses others, the same seed the same; without a stream the choice is that of inference."""
  x = np.random.default_rng(1).normal(size=(1, 17, 4))
  tokens, reducer = make(x, prefix=1, key=x), tome_random.ToMeRandom()

  def chosen(train, **rngs):
    return reducer.apply({}, tokens, 10, train=train, mode=mode, rngs=rngs)[0].position[0, :10].tolist()

  drawn = [chosen(True, reduce=jax.random.key(seed)) for seed in (0, 0, 1, 2)]
  assert drawn[0] == drawn[1] and len({tuple(places) for places in drawn}) == 3
  assert all(places[0] == 0 and len(set(places)) == 10 for places in drawn)
  assert chosen(True) == chosen(False) == chosen(False, reduce=jax.random.key(0)) != drawn[0]
