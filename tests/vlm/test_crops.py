"""Selection that knows where patches lie: crops with their thumbnail, chunks of the raster, neighbours in the grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vlm import needs_golden, order, recorded, reduced, tokens_of

from tokred import config as defaults
from tokred.nn import qwen_vision, vit
from tokred.reducers import crops, hiprune, holov

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


# Chunks of the raster, and neighbours.


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
