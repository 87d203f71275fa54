"""Training-free selection: recorded numbers of the authors' code in both modes, the others by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import quick
from golden_vlm import needs_golden, order, recorded, reduced, tokens_of

from tokred import config as defaults
from tokred import rates, scores
from tokred.nn import budget, decoder, qwen_vision, vit
from tokred.nn.decoder_layer import Shape
from tokred.reducers import base, coverage, crops, flashvlm, hiprune, holov, memory, prumerge, sparsevlm, visionzip
from tokred.reducers.diversity import MMR, MaxMin
from tokred.reducers.topk import TopK

DEGREE = np.pi / 180


def on_circle(*angles):
  return np.stack([np.cos(np.asarray(angles) * DEGREE), np.sin(np.asarray(angles) * DEGREE)], -1)


# VisionZip.


def zipped(g, hidden, metric, attention, dominant, contextual, **options):
  tokens = tokens_of(hidden, 1, cls_attention=attention, key=metric[:, :, None])
  options = dict(contextual=float(contextual), add=True, keep_cls=True) | options
  return reduced(visionzip.VisionZip(**options), tokens, dominant + contextual)[0]


@needs_golden
@pytest.mark.parametrize("name", ["visionzip_36", pytest.param("visionzip_49", marks=pytest.mark.thorough)])
def test_visionzip_recorded(name):
  g = recorded(name)
  kept = g["all_indices"].shape[1]  # with CLS
  out = zipped(g, g["hidden"], g["metric"], g["attn"][:, :, 0].mean(1), kept, g["contextual"])
  np.testing.assert_allclose(out.x, g["tokens"], atol=1e-5)
  np.testing.assert_array_equal(out.position[:, :kept], np.sort(g["all_indices"], 1))


@needs_golden
def test_visionzip_recorded_in_a_model():
  g = recorded("llava_reduce/visionzip_10_4")
  attention = np.pad(g["cls_attention"], ((0, 0), (1, 0)))
  out = zipped(g, g["hidden"], g["metric"], attention, *g["setting"])
  np.testing.assert_allclose(out.x, g["tokens"], atol=1e-5)
  np.testing.assert_array_equal(out.position[:, :10], g["kept_sorted"])


def test_visionzip_by_hand():
  """Six tokens, attention 6 5 1 2 3 0, four stay of which two are contextual: 0 and 1 are dominant.

  Of 2 3 4 5 every second is a target: 2 and 4, keys at 0 and 90 degrees.  3 (10 degrees) joins 2, 5 (80) joins 4: means
  (12 + 13) / 2 and (14 + 3 x 15) / 4 with size 3; added 12 + 13 and 14 + 15.
  """
  x = np.arange(10.0, 16.0)[:, None]
  tokens = tokens_of(x, state_memory=[[6, 5, 1, 2, 3, 0]], key=on_circle(0, 0, 0, 10, 90, 80)[None, :, None])
  tokens = tokens.replace(size=jnp.asarray([[1.0, 1, 1, 1, 1, 3]]))
  out, _ = reduced(visionzip.VisionZip(score="memory", contextual=2.0), tokens, 4)
  np.testing.assert_allclose(out.x[0, :, 0], [10, 11, 12.5, 14.75])
  assert order(out) == [[0, 1, 2, 4]] and np.asarray(out.owner[0]).tolist() == [0, 1, 2, 2, 3, 3]
  out, _ = reduced(visionzip.VisionZip(score="memory", contextual=0.5, add=True), tokens, 4, mask=False)
  np.testing.assert_allclose(out.x[0, :, 0], [10, 11, 25, 29])


# Attention of CLS, and what several layers say.


@needs_golden
def test_fastervlm_recorded():
  g = recorded("llava_reduce/fastervlm_9")
  tokens = tokens_of(g["projected"], cls_attention=g["scores"])
  out, _ = reduced(TopK(raster=True), tokens, g["T"])
  assert order(out) == g["kept"].tolist() == [np.flatnonzero(row).tolist() for row in g["mask"]]


def test_memory_of_several_layers_in_a_tower():
  """VTC-CLS: the mean of three layers' attention decides at the output; asked for at the fourth alone, others stay."""
  sizes = dict(variant="mu/4", width=16, depth=3, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)
  config = defaults.complete({"model": sizes}).model
  write = dict(reducer="remember", layers=(0, 1, 2))
  read = dict(reducer="topk", score="memory", place="output", keep=0.25, raster=True)
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  module = vit.make(config, dict(a=write, b=read))
  params = jax.jit(module.init, compiler_options=quick())(jax.random.key(0), images)["params"]
  params = jax.tree.map(lambda a: a * 3 if a.ndim > 1 else a, params)
  alone = vit.make(config, {f"l{i}": dict(reducer="topk", layers=(i,), keep=1.0, rate="threshold", threshold=-1.0,
                                          raster=True)
                            for i in range(3)})  # fmt: skip
  run = lambda m: jax.jit(lambda p: m.apply({"params": p}, images), compiler_options=quick())(params)
  each = run(alone).aux
  mean = np.mean([np.asarray(each[f"reduce/l{i}/score"][0])[:, 1:] for i in range(3)], 0)
  kept = run(module).tokens
  assert order(kept, 1) == np.sort(np.argsort(-mean, 1)[:, :4], 1).tolist()
  with pytest.raises(ValueError, match="score='memory' reads what a site with reducer='remember' leaves"):
    jax.eval_shape(vit.make(config, dict(b=read)).init, jax.random.key(0), images)


@pytest.mark.parametrize(
  "how, want", [("mean", [2.0, 3.0]), ("sum", [4, 6]), ("running", [2.0, 3.0]), ("last", [3, 4])]
)
def test_memory_by_hand(how, want):
  """Scores (1, 2) and then (3, 4)."""
  tokens = tokens_of([[1.0], [2.0]])
  module = memory.Remember(score="token_norm", how=how)
  for value in ([[1.0], [2.0]], [[3.0], [4.0]]):
    tokens, _ = module.apply({}, tokens.replace(x=jnp.asarray([value])), 2, train=False, mode="gather")
  np.testing.assert_allclose(scores.memory(tokens)[0], want)


# Crops.


def hired_tokens(g):
  first, select = (g[f"{name}_layer_cls_attn"] for name in ("first", "select"))
  first, select = (a.sum(1) if a.ndim == 3 else a for a in (first, select))
  return tokens_of(np.zeros((*first.shape, 1)), cls_attention=select, state_memory=first)


@needs_golden
@pytest.mark.parametrize(
  "name", ["hired_2x2", "llava_reduce/hired_next_0.3", pytest.param("hired_1x2", marks=pytest.mark.thorough)]
)
def test_hired_recorded(name):
  g = recorded(name)
  grid = tuple(g["grid_hw"].tolist()) if "grid_hw" in g else (2, 2)
  module = crops.HiRED(share=float(g["rate"]), alpha=float(g["alpha"]), grid=grid, cells="chunks")
  out, _ = reduced(module, hired_tokens(g), 36)
  assert np.asarray(out.alive.sum(1)).tolist() == g["counts"].tolist()
  assert order(out) == [np.flatnonzero(row).tolist() for row in g["mask"]]
  if "paper_spatial_budgets" in g:
    out, _ = reduced(module.clone(cells="grid"), hired_tokens(g), 36, mask=False)
    assert np.asarray(out.alive.sum(1)).tolist() == [g["full_image_budget"], *g["paper_spatial_budgets"]]


@needs_golden
def test_hired_of_one_image_recorded():
  attention = recorded("llava_reduce/visionzip_10_4")["cls_attention"]
  out, _ = reduced(crops.HiRED(share=0.2), tokens_of(np.zeros((2, 36, 1)), cls_attention=attention), 36)
  assert order(out) == [np.flatnonzero(row).tolist() for row in recorded("llava_reduce/hired_single_0.2")["mask"]]


@pytest.mark.parametrize(
  "share, alpha, unseen, want",
  [
    (1.0, 0.1, (9, 10, 18, 27), [18, 36, 31, 36, 36]),
    (0.7, 0.5, (*range(4), *range(9, 14), *range(18, 23), *range(27, 31)), [36, 24, 19, 19, 24]),
  ],
)
def test_hired_counts_by_hand(share, alpha, unseen, want):
  """Four crops and their thumbnail, 36 tokens each; the first layer sees all but `unseen`, counted by runs of nine.

  All of 180: 18 are the thumbnail's, and of the 162 left the crops hold 144.  Votes 9, 7, 8, 8 of int(.9 x 36) = 32 are
  40.5, 31.5, 36, 36, of which a crop has 36.  Of .7 x 180 Python keeps 125 (float32: 126): 36 and 89, of which votes 5,
  4, 4, 5 of 18 are 24.7, 19.8, 19.8, 24.7.
  """
  first = np.isin(np.arange(36), unseen, invert=True) + np.zeros((5, 1))
  tokens = tokens_of(np.zeros((5, 36, 1)), cls_attention=np.random.default_rng(0).random((5, 36)), state_memory=first)
  module = crops.HiRED(share=share, alpha=alpha, grid=(2, 2), cells="chunks")
  assert reduced(module, tokens, 36)[0].alive.sum(1).tolist() == want


@pytest.mark.parametrize("cls", [crops.HiRED, crops.GlobalCom2])
def test_crops_count_as_python_does(cls):
  """int(100 x .29) is 28, for .29 is a little less; in float32 it is 29."""
  tokens = tokens_of(np.zeros((1, 100, 1)), cls_attention=np.arange(100.0)[None])
  assert order(reduced(cls(share=0.29), tokens, 100)[0]) == [list(range(72, 100))]


def test_hired_says_what_does_not_fit():
  tokens = tokens_of(np.zeros((4, 16, 1)), cls_attention=np.ones((4, 16)), state_memory=np.ones((4, 16)))
  with pytest.raises(ValueError, match=r"grid=\(2, 2\): 4 rows are no images of a thumbnail and 4 crops each"):
    crops.HiRED(grid=(2, 2)).apply({}, tokens, 16, train=False, mode="gather")


SIZES = dict(variant="mu/4", width=16, depth=1, num_heads=2, mlp_dim=32, num_classes=3)


def made(site, size):
  """A site's reducer in a tower for images of this size."""
  config = defaults.complete({"model": SIZES | dict(image_size=size)})
  return vit.make(config.model, dict(a=site)).sites.spots[0].module()


@pytest.mark.parametrize("cls", [crops.HiRED, crops.GlobalCom2])
def test_crops_need_all_patches(cls):
  """24 are no square, and a site says that they are 4 x 6; without one CLS may stand before a square, or nothing."""
  site = dict(reducer=cls.__name__.lower(), place="output", grid=(1, 2))
  wide, square, alone = made(site, (16, 24)), made(site, (16, 16)), cls(grid=(1, 2))
  ones = lambda n: tokens_of(np.zeros((3, n, 1)), 1, cls_attention=np.ones((3, n)), state_memory=np.ones((3, n)))
  run = lambda module, n: jax.eval_shape(lambda t: module.apply({}, t, n, train=False, mode="mask"), ones(n))
  for module, n in ((wide, 25), (square, 17), (alone, 17), (alone, 16)):
    run(module, n)
  for module, n in ((alone, 24), (square, 9)):  # 9 of 16 that have gone into a scope
    with pytest.raises(ValueError, match=rf"patch_grid=.*: {n} tokens are not all patches of such an input; valid"):
      run(module, n)


@needs_golden
def test_globalcom2_recorded():
  g = recorded("globalcom2_ratios")
  thumbnail = jnp.asarray(g["cls_attn"]).reshape(1, 24, 24)
  for h, w, share, name in ((2, 2, 0.25, "ratio_w2_h2_r25_t10"), (3, 1, 0.1, "ratio_w1_h3_r10_t10")):
    got = crops.crop_shares(crops.cell_sums(thumbnail, (h, w)), share, 10.0)
    np.testing.assert_allclose(got[0], g[name], atol=1e-6)


def test_globalcom2_by_hand():
  """A thumbnail of 4 x 4 whose right half has all attention, two crops, temperature 1, half of 16 tokens.

  sigma = softmax(0, 1) = .2689, .7311; shares .5 (1 -+ .2311) = .3845, .6155: 6 and 9 tokens.  In the right crop its
  own attention is even, and that of the thumbnail, enlarged, is largest at the right edge but one, row by row alike:
  what grows to the right stays first.
  """
  right = np.tile([0.0, 0, 1, 1], (4, 1)) / 8
  attention = np.stack([right, np.full((4, 4), 1 / 16), np.full((4, 4), 1 / 16)]).reshape(3, 16)
  module = crops.GlobalCom2(share=0.5, grid=(1, 2), temperature=1.0)
  out, _ = reduced(module, tokens_of(np.zeros((3, 16, 1)), cls_attention=attention), 16)
  assert np.asarray(out.alive.sum(1)).tolist() == [8, 6, 9]
  assert order(out)[0] == [2, 3, 6, 7, 10, 11, 14, 15]
  assert {p % 4 for p in order(out)[2]} >= {1, 2, 3} and 0 not in {p % 4 for p in order(out)[2]}


@pytest.mark.parametrize("size, grid", [((7, 7), (2, 2)), ((8, 8), (3, 1)), ((9, 5), (2, 4)), ((2, 2), (1, 3))])
def test_cells_as_globalcom2_has_them(size, grid):
  """min(i // (rows // h), h - 1): 7 rows in two are 3 and 4, and 2 columns in three are 1, 1 and none."""
  thumbnail, wanted = np.random.default_rng(0).random((1, *size)), np.zeros(grid)
  for place in np.ndindex(size):
    cell = (min(i // max(n // parts, 1), parts - 1) for i, n, parts in zip(place, size, grid, strict=True))
    wanted[tuple(cell)] += thumbnail[0][place]
  np.testing.assert_allclose(crops.cell_sums(jnp.asarray(thumbnail, jnp.float32), grid)[0], wanted.ravel(), rtol=1e-5)


def test_thumbnails_are_enlarged():
  """Two rows of 0 3 6 in two columns of crops: 0 .75 2.25 3.75 5.25 6, of which each crop has a half."""
  large = crops.enlarged(jnp.asarray([[[0.0, 3, 6]] * 2]), (1, 2))
  np.testing.assert_allclose(large[0], [[0, 0.75, 2.25] * 2, [3.75, 5.25, 6] * 2], atol=1e-6)


def test_globalcom2_ranks_by_attention_of_length_one():
  """A thumbnail of 2 x 2 and one crop, attention 2 4 0 3 and 0 0 1 1, lengths 5.39 and 1.41; half of them stay.

  .37 .74 0 .56 and 0 0 .71 .71 are .37 .74 .71 1.26: 1 and 3.  Divided by the sums 9 and 2 it would be 2 and 3, for
  .22 .44 0 .33 and 0 0 .5 .5 are .22 .44 .5 .83.
  """
  tokens = tokens_of(np.zeros((2, 4, 1)), cls_attention=[[2, 4, 0, 3], [0, 0, 1, 1]])
  assert order(reduced(crops.GlobalCom2(share=0.5, grid=(1, 1)), tokens, 4)[0]) == [[1, 3], [1, 3]]


# Diversity and coverage.


@needs_golden
@pytest.mark.parametrize("name", ["divprune_36", pytest.param("divprune_81", marks=pytest.mark.thorough)])
def test_divprune_recorded(name):
  g = recorded(name)
  module = MaxMin(metric="token", start="isolated")
  assert order(reduced(module, tokens_of(g["x"]), g["k"])[0]) == [g["order"].tolist()]


@needs_golden
def test_divprune_recorded_in_a_model():
  g, x = recorded("llava_reduce/divprune_0.25"), recorded("llava_reduce/fastervlm_9")["projected"]
  module = MaxMin(metric="token", start="isolated")
  assert order(reduced(module, tokens_of(x), 9)[0]) == g["order"].tolist()
  assert order(reduced(module.clone(raster=True), tokens_of(x), 9, mask=False)[0]) == g["kept"].tolist()


@needs_golden
@pytest.mark.parametrize("name", ["mmr_36", pytest.param("mmr_49", marks=pytest.mark.thorough)])
def test_idpruner_recorded(name):
  g = recorded(name)
  module = MMR(score="memory", metric="token", relevance=float(g["lam"]), scale="range")
  out, _ = reduced(module, tokens_of(g["x"], state_memory=g["raw_scores"][None]), g["k"])
  assert order(out) == [g["order"].tolist()]


@needs_golden
def test_idpruner_recorded_in_a_model():
  g, x = recorded("llava_reduce/idpruner_9"), recorded("llava_reduce/fastervlm_9")["projected"]
  module = MMR(metric="token", relevance=float(g["lam"]), scale="range")
  assert order(reduced(module, tokens_of(x, cls_attention=g["importance"]), g["k"])[0]) == g["order"].tolist()


def test_idpruner_takes_several_at_once():
  """Keys at 0, 10, 90, 60 degrees, scores 1 .9 .5 .4, lambda .5.  At once: 0 and 1 by score; then 2, 3 by

  .5 (.5 - .4) / .6 - .5 cos 80 = -.0035 and 0 - .5 cos 50 = -.32.  One at a time 2 is second.  lambda 0 takes the best
  first, and then the farthest.
  """
  tokens = tokens_of(on_circle(0, 10, 90, 60), cls_attention=[[1, 0.9, 0.5, 0.4]])
  module = MMR(metric="token", scale="range", at_once=2)
  assert order(reduced(module, tokens, 3)[0]) == [[0, 1, 2]]
  assert order(reduced(module.clone(at_once=1), tokens, 3, mask=False)[0]) == [[0, 2, 1]]
  assert order(reduced(module.clone(at_once=1, relevance=0.0), tokens, 3, mask=False)[0]) == [[0, 2, 3]]


@needs_golden
def test_facility_recorded():
  g = recorded("facility_36")
  out, report = reduced(coverage.Facility(), tokens_of(g["x"]), g["k"])
  assert order(out) == [g["order"].tolist()]
  np.testing.assert_allclose(report["score"][0][g["order"]], g["gains"], rtol=1e-5)


@needs_golden
def test_scope_recorded():
  g = recorded("scope_36")
  module = coverage.Facility(score="cls_attention", power=float(g["alpha"]))
  assert order(reduced(module, tokens_of(g["x"], cls_attention=g["cls_attn"]), g["k"])[0]) == g["order"].tolist()


@needs_golden
def test_mmtok_recorded():
  g = recorded("mmtok_36")
  text, n = g["text"].shape[0], 36
  pad = np.zeros((text, 24), np.float32)
  tokens = tokens_of(np.concatenate([g["text"], g["vision"]]), text,
                     state_image=np.concatenate([pad, g["vision_clip"]])[None])  # fmt: skip
  options = dict(alpha=float(g["alpha"]), text_temperature=float(g["tv_temp"]), temperature=float(g["vv_temp"]))
  out, report = reduced(coverage.MMTok(**options, raster=False), tokens, text + g["k"])
  assert order(out, text) == [g["order"].tolist()]
  np.testing.assert_allclose(report["score"][0, text:][g["order"]], g["gains"], rtol=1e-3, atol=1e-7)
  assert order(reduced(coverage.MMTok(**options), tokens, text + g["k"], mask=False)[0], text) == [
    g["kept_sorted"].tolist()
  ]
  assert n == out.owner.shape[1] - text


# Parts of the picture, layers, outliers.


@needs_golden
def test_holov_recorded():
  g = recorded("holov_36")
  module = holov.HoloV(chunks=int(g["num_crops"]), raster=False)
  tokens = tokens_of(g["x"], cls_attention=g["attn"])
  out, _ = reduced(module, tokens, g["k"])
  assert order(out) == g["kept_in_output_order"].tolist()
  np.testing.assert_allclose(out.x, g["tokens"], atol=1e-6)


def test_holov_fills_up_what_a_chunk_cannot_take():
  """Two chunks of two, all alike; attention 7 1 1 1: shares .8 and .2 of 3 are 2.4 and .6, so 2 + 1 and 0.

  Three do not go into two: the third is the best elsewhere.
  """
  tokens = tokens_of(np.ones((4, 2)), cls_attention=[[0.7, 0.1, 0.1, 0.1]])
  assert order(reduced(holov.HoloV(chunks=2), tokens, 3)[0]) == [[0, 1, 2]]
  np.testing.assert_array_equal(holov.portions(jnp.asarray([[0.8, 0.2]]), jnp.asarray([[3]])), [[3, 0]])


def test_holov_stands_chunk_by_chunk():
  """Attention 1 7 1 1: again 2 + 1 and 0.  The first chunk has no room for more than it is, and stands as it stood."""
  tokens = tokens_of(np.ones((4, 2)), cls_attention=[[0.1, 0.7, 0.1, 0.1]])
  assert order(reduced(holov.HoloV(chunks=2, raster=False), tokens, 3, mask=False)[0]) == [[0, 1, 2]]


@pytest.mark.parametrize("n", [38, 8, 3])
def test_holov_cuts_evenly(n):
  """38 in 4 chunks are 10, 10, 9, 9 and 3 are 1, 1, 1 and none, as np.array_split has it."""
  free = np.random.default_rng(0).permuted(np.arange(45) < n)[None]
  wanted = np.repeat(np.arange(4), [len(part) for part in np.array_split(np.arange(n), 4)])
  np.testing.assert_array_equal(np.asarray(holov.chunk_of(jnp.asarray(free), 4))[free], wanted)


def holov_in_numpy(x, a, chunks, k):
  """What HoloV's authors do with an image, x (N, D) and a (N,): each token's score, and who stays, as they stand."""
  parts, scores = np.array_split(np.arange(len(x)), chunks), a.copy()
  for part in (part for part in parts if len(part) > 1):
    z, others = x[part] / np.linalg.norm(x[part], axis=1, keepdims=True), len(part) - 1
    similar = z @ z.T * (1 - np.eye(len(part)))
    spread = np.square(similar - similar.sum(1, keepdims=True) / others).sum(1) / others
    scores[part] = 1000 * a[part]
    scores[part] += 0.09 * spread * scores[part].mean() / (spread.mean() + 1e-6)
  share = np.array([scores[part].mean() for part in parts])
  share *= k / share.sum()
  budget = np.floor(share).astype(int)
  budget[np.argsort(-share)[: k - budget.sum()]] += 1
  sizes = [len(part) for part in parts]
  assert (budget <= sizes).all()  # otherwise they add zeros
  best = [part[np.argsort(-a[part])] for part in parts]
  stay = [(part if b == len(part) else top[:b]) for part, top, b in zip(parts, best, budget, strict=True)]
  return scores, np.concatenate(stay).tolist()


@pytest.mark.parametrize("n, k", [(38, 13), (38, 33), (6, 3)])
def test_holov_in_numpy(n, k):
  """Of 6 tokens the last two are chunks of their own: they score a and not 1000 a, and nothing of them stays."""
  rng = np.random.default_rng(n)
  x, a = rng.normal(size=(2, n, 8)), rng.uniform(1.0, 1.5, (2, n)) / n
  out, report = reduced(holov.HoloV(chunks=4, raster=False), tokens_of(x, cls_attention=a), k)
  for row in range(2):
    scores, stay = holov_in_numpy(x[row], a[row], 4, k)
    np.testing.assert_allclose(report["score"][row], scores, rtol=1e-4)
    assert order(out)[row] == stay


@needs_golden
@pytest.mark.parametrize("wrap", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_hiprune_recorded(wrap):
  g = recorded("hiprune_64")
  tokens = tokens_of(np.zeros((1, 576, 1)), state_memory=g["shallow_attn"][None], column_mean=g["deep_attn"][None])
  module = hiprune.HiPrune(alpha=float(g["alpha"]), wrap=wrap)  # its anchor has all neighbours
  out, _ = reduced(module, tokens, g["retain"])
  assert order(out) == [np.sort(g["kept"]).tolist()]


def test_hiprune_finds_neighbours():
  """A grid of 3 x 3, its anchor the last of the first row: left and below, and by number 3, the next row's first."""
  anchor = jnp.arange(9)[None] == 2
  near = lambda wrap: np.flatnonzero(hiprune.beside(jnp.arange(9)[None], anchor, (3, 3), wrap)[0]).tolist()
  assert near(False) == [1, 5]
  assert near(True) == [0, 1, 3, 5]  # 2 - 3 is moved to 0


def test_hiprune_rounds_as_python_does():
  """.1 x 25 / 5 = .5 of 25 tokens are anchors: none, and the last, which the middle layer likes best, goes as the deep

  layer's worst.  Compiled, / 5 is x .2 in float32 and .5 a little more.
  """
  tokens = tokens_of(np.zeros((1, 36, 1)), state_memory=[np.arange(36.0)], column_mean=[np.arange(36.0, 0, -1)])
  assert order(reduced(hiprune.HiPrune(), tokens, 25)[0]) == [list(range(25))]


def test_hiprune_knows_the_grid():
  """4 x 6 patches behind CLS, the anchor in the second row, 9: 3, 8, 10 and 15 are beside it."""
  site = dict(reducer="hiprune", middle="key_norm", alpha=1.0, place="output", keep=6)
  module = made(site, (16, 24)).clone(middle="memory")
  anchor, deep = np.arange(25) == 10, np.arange(25.0)
  tokens = tokens_of(np.zeros((1, 25, 1)), 1, state_memory=[anchor], column_mean=[deep])
  assert order(reduced(module, tokens, 6)[0], 1) == [[3, 8, 9, 10, 15]]
  assert made(site, (8, 32)).patch_grid == (2, 8)  # and not 4 x 4
  some = np.array([4, 9, 10, 14, 16])  # have gone into a scope: 13 has to go
  tokens = tokens_of(np.zeros((1, 5, 1)), state_memory=[anchor[some]], column_mean=[deep[some]])
  tokens = tokens.replace(position=jnp.asarray(some)[None])
  assert order(reduced(module, tokens, 4, mask=False)[0], 1) == [[3, 8, 9, 15]]
  with pytest.raises(ValueError, match=r"patch_grid=\(\), prefix=-1: 24 tokens are not all patches of such an input"):
    reduced(hiprune.HiPrune(), tokens_of(np.zeros((1, 24, 1))), 6)


@pytest.mark.parametrize(
  "site, message",
  [
    (dict(reducer="hiprune"), "sites.a.reducer='hiprune' looks for neighbours in one grid, but images"),
    (dict(reducer="globalcom2", grid=(1, 2)), r"sites.a.grid=\(1, 2\) is of crops of one size, but images"),
  ],
)
def test_images_of_their_own_size_have_no_grid(site, message):
  shape = qwen_vision.Shape(width=16, depth=1, mlp_dim=8, num_heads=2)
  with pytest.raises(ValueError, match=message):
    qwen_vision.make(shape, dict(a=site | dict(place="output", keep=0.5)))


@needs_golden
def test_prumerge_recorded():
  g = recorded("prumerge_iqr")
  attention = jnp.asarray(g["cls_attn"])
  np.testing.assert_allclose(
    prumerge.upper_fence(attention, jnp.ones(attention.shape, bool)), g["upper_fence"], rtol=1e-5
  )
  tokens = tokens_of(np.zeros((*attention.shape, 1)), cls_attention=attention)
  out, _ = reduced(prumerge.PruMerge(merge=False), tokens, 20, mask=False)
  assert order(out) == [np.flatnonzero(row).tolist() for row in g["keep"]]


def test_prumerge_by_hand():
  """Attention 1 1 1 1 1 9 and keys at 0 0 0 0 90 80: quartiles are 1 and 1, so that 5 alone is above the fence.

  All join it, weighed by attention: (1 + 2 + 3 + 4 + 5 + 9 x 6) / 14.
  """
  tokens = tokens_of(np.arange(1.0, 7)[:, None], cls_attention=[[1, 1, 1, 1, 1, 9]],
                     key=on_circle(0, 0, 0, 0, 90, 80)[None, :, None])  # fmt: skip
  out, _ = reduced(prumerge.PruMerge(), tokens, 3)
  assert np.asarray(out.alive[0]).tolist() == [True, False, False] and float(out.size[0, 0]) == 6.0
  np.testing.assert_allclose(out.x[0, 0], 69 / 14, rtol=1e-6)


# FlowCut.


@needs_golden
def test_flowcut_recorded():
  g = recorded("flowcut")
  arrays = (jnp.asarray(g[name]) for name in ("cls_attn", "semantic_attn", "value"))
  np.testing.assert_allclose(scores.flow(*arrays), g["score"], rtol=1e-5)
  counts = [rates.flowcut_count(jnp.asarray(g["cls_attn"]), 36, int(g["target"]), int(left)) for left in g["rpl"]]
  np.testing.assert_array_equal(counts, g["prune_num"])


def test_flowcut_by_hand():
  """CLS pays .5 .25 .25, values of one head: cls (1, 0), then (0, 1), (2, 0): v_cls . v = 0 and 2.

  softmax .1192, .8808; c = .5, .5; times the norms 1 and 2: .6192 and 2.7616.
  """
  value = np.array([[1.0, 0], [0, 1], [2, 0]])[None, :, None]
  tokens = tokens_of(np.zeros((3, 1)), 1, cls_attention=[[0.5, 0.25, 0.25]], value=value)
  np.testing.assert_allclose(scores.flowcut(tokens)[0, 1:], [0.6192, 2.7616], atol=1e-4)


# Text and vision.


def test_flashvlm_by_hand():
  """Text at 0 degrees; visual tokens at 10, 20, 90, 180 degrees.  Two by relevance, 0 and 1; one is diverse.

  Of 90 and 180 degrees both are equally central; the first is taken.  With as much weight on a score that is largest at
  180 degrees alone, that one leads.
  """
  tokens = tokens_of(on_circle(0, 10, 20, 90, 180), 1)
  module = flashvlm.FlashVLM(diverse=0.34)
  assert order(reduced(module, tokens, 4)[0], 1) == [[0, 1, 2]]
  shown = tokens.replace(feats={"state/memory": jnp.asarray([[0.0, 0, 0, 0, 1]])})
  assert order(reduced(flashvlm.FlashVLM(score="memory", diverse=0.0, relevance=0.2), shown, 2, mask=False)[0], 1) == [
    [3]
  ]
  a = np.array([0.0, 1.0])  # mean .5, deviation .5: -1 and 1, twice as sharp -2 and 2
  got = flashvlm.sharpened(jnp.asarray([a]), jnp.ones((1, 2), bool), 0.5)
  np.testing.assert_allclose(np.exp(got[0]), np.exp([-2, 2]) / np.exp([-2, 2]).sum(), rtol=1e-4)


def test_attention_of_text_and_of_vision():
  """Three tokens in causal order: vision 0 and 1, text 2; queries and keys so that logits are log 1, 2, 3 (d = 1).

  Text sees 1/6, 2/6, 3/6; among vision 0 sees itself, and 1 has 1/3 and 2/3: means (1 + 1/3) / 2 and 1/3.
  """
  key = np.log([1.0, 2.0, 3.0])[None, :, None, None]
  tokens = tokens_of(np.zeros((3, 1)), query=np.ones((1, 3, 1, 1)), key=key)
  tokens = tokens.replace(protected=jnp.asarray([[False, False, True]]))
  tokens.feats["state/index"] = jnp.arange(3)[None]
  np.testing.assert_allclose(scores.text_attention(tokens)[0], [1 / 6, 1 / 3, 1 / 2], rtol=1e-5)
  np.testing.assert_allclose(scores.visual_attention(tokens)[0, :2], [2 / 3, 1 / 3], rtol=1e-5)


def test_raters_by_hand():
  """Vision (1, 0); words (2, 0), (0, 0), (0, 1): shares e^2 / (e^2 + 2) = .787, .106, .106; the first is above 1/3."""
  tokens = tokens_of([[1.0, 0], [2, 0], [0, 0], [0, 1]]).replace(protected=jnp.asarray([[False, True, True, True]]))
  assert np.asarray(scores.rater(tokens)[0]).tolist() == [0, 1, 0, 0]
  last = tokens.replace(feats={"state/index": jnp.asarray([[3, 0, 1, 2]])})  # the same words in front of the image
  assert np.asarray(scores.rater(last)[0]).tolist() == [0, 1, 0, 0]
  among = tokens.replace(feats={"state/index": jnp.asarray([[1, 0, 2, 3]])})  # (2, 0) before it: .5 and .5 are left
  assert np.asarray(scores.rater(among)[0]).tolist() == [0, 0, 0, 0]
  key = np.log([[1.0, 1, 1, 1]])[..., None, None]
  tokens = tokens.replace(feats={"state/rater": jnp.asarray([[0.0, 0, 0, 0]]), "query": jnp.ones((1, 4, 1, 1)),
                                 "key": jnp.asarray(key, jnp.float32)})  # fmt: skip
  np.testing.assert_array_equal(scores.text_attention(tokens), np.zeros((1, 4)))  # nobody rates


def test_sparsevlm_recycles():
  """Seven tokens in descending score, four stay.  Three go: m = floor(.9) + 1 = 1, c = 0 + 1: three are the best, and
  one is a cluster of the next one.  With all of them recycled it is the mean of 4, 5, 6 and 7.
  """
  tokens = tokens_of(np.arange(1.0, 8)[:, None], state_memory=np.arange(7.0, 0, -1)[None])
  module = sparsevlm.SparseVLM(score="memory")
  out, _ = reduced(module, tokens, 4, mask=False)
  np.testing.assert_allclose(out.x[0, :, 0], [1, 2, 3, 4])
  out, _ = reduced(module.clone(recycled=1.0), tokens, 4)
  np.testing.assert_allclose(np.sort(out.x[0, :, 0]), [1, 2, 3, 5.5], rtol=1e-6)
  assert float(out.size.sum()) == 7.0
  out, _ = reduced(module.clone(recycled=0.0), tokens, 4, mask=False)
  assert order(out) == [[0, 1, 2, 3]]


@needs_golden
def test_transprune_recorded():
  g = recorded("transprune_ttv")
  got = scores.turn(jnp.asarray(g["before"]), jnp.asarray(g["after"]))
  np.testing.assert_allclose(got, g["weight"], rtol=1e-4, atol=1e-7)


SHAPE = Shape(vocab=20, width=16, depth=3, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8, max_length=32)
LLM = dict(stack="llm", keep=0.5)
IN_A_DECODER = {
  "sparsevlm": dict(
    a=dict(stack="llm", reducer="remember", score="rater", name_of="rater", layers=(0,), place="before"),
    b=dict(LLM, reducer="sparsevlm", layers=(1, 2), place="before"),
  ),
  "transprune": dict(
    a=dict(stack="llm", reducer="remember", score="transition", how="sum", layers=(0, 1)),
    b=dict(LLM, reducer="topk", score="transprune", layers=(1,), place="after"),
  ),
  "visiondrop": dict(
    a=dict(LLM, reducer="visionzip", score="visual_attention", metric="token", layers=(1, 2), place="before")
  ),
  "mmtok": dict(a=dict(LLM, reducer="mmtok", layers=(0,), place="before")),
}


@pytest.mark.parametrize(
  "name", ["sparsevlm", *(pytest.param(n, marks=pytest.mark.thorough) for n in IN_A_DECODER if n != "sparsevlm")]
)
def test_in_a_language_model_rows_are_what_they_are_alone(name):
  """Two prompts of 12 and 9 tokens, 6 and 4 of them visual, behind each other's padding and alone."""
  module = decoder.make(SHAPE, IN_A_DECODER[name])
  rng = np.random.default_rng(0)
  kinds = np.array([list("ttvvvvvvtttt"), list("pppttvvvvttt")])
  ids, mask, protected = rng.integers(0, 20, kinds.shape), kinds != "p", kinds != "v"
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), ids, mode="mask"))["params"]
  params = jax.tree.map(
    lambda a: jnp.asarray(rng.normal(size=a.shape) / max(a.shape[0], 4) ** 0.5, jnp.float32), shapes
  )

  def run(rows, columns, mode="gather"):
    inputs = dict(ids=ids[rows, columns], mask=mask[rows, columns], protected=protected[rows, columns])
    known = budget.census(inputs["mask"], inputs["protected"])
    apply = jax.jit(lambda p: module.apply({"params": p}, **inputs, known=known, mode=mode), compiler_options=quick())
    out = apply(params)
    last = np.asarray(out.tokens.alive).sum(1) - 1
    return np.asarray(out.logits)[np.arange(len(last)), last]

  together = run(slice(0, 2), slice(0, 12))
  np.testing.assert_allclose(run(slice(1, 2), slice(3, 12)), together[1:], atol=1e-4)
  np.testing.assert_allclose(run(slice(0, 2), slice(0, 12), "mask"), together, atol=1e-4)


# Errors that a user can make.


@pytest.mark.parametrize(
  "module, message",
  [
    (visionzip.VisionZip(contextual=0.0), "contextual=0.0 must be above 0"),
    (crops.HiRED(grid=(2,)), r"grid=\(2,\) must be \(rows, columns\)"),
    (crops.HiRED(cells="rows"), "cells='rows' is unknown"),
    (crops.GlobalCom2(share=0.0), "share=0.0 must be above"),
    (coverage.Facility(score="cls"), "score='cls' is not a score"),
    (holov.HoloV(chunks=0), "chunks=0 must be at least 1"),
    (hiprune.HiPrune(deep="columns"), "deep='columns' is not a score"),
    (flashvlm.FlashVLM(diverse=1.5), "diverse=1.5 must be in"),
    (memory.Remember(how="max"), "how='max' is unknown"),
    (MMR(at_once=0), "at_once=0 must be at least 1"),
    (MMR(scale="minmax"), "scale='minmax' is not a scale"),
    (sparsevlm.SparseVLM(recycled=2.0), "recycled=2.0 must be in"),
  ],
  ids=lambda value: type(value).__name__,
)
def test_errors(module, message):
  assert isinstance(module, base.Reducer)
  with pytest.raises(ValueError, match=message):
    module.needed()
