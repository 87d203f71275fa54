"""Training-free merging, virtual unmerging and soft top-k: recorded numbers in both modes, the others by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import quick
from golden_vlm import needs_golden, order, recorded, reduced, tokens_of

from tokred import rates
from tokred.nn.attention import attend
from tokred.nn.rope import rotate
from tokred.nn.unmerge import places
from tokred.reducers.cluster import DPCKNN
from tokred.reducers.medoids import KMedoids
from tokred.reducers.pool import Pool
from tokred.reducers.pool import cells as pool_cells
from tokred.reducers.tome import DyMUMerge, ToMe, batch_threshold


@needs_golden
def test_pool_recorded():
  g, x = recorded("llava_reduce/pool_3x3"), recorded("llava_reduce/fastervlm_9")["projected"]
  out, _ = reduced(Pool(), tokens_of(x), g["g"] ** 2)
  np.testing.assert_allclose(out.x, g["tokens"], atol=1e-5)


def test_pool_cuts_any_count():
  """Six tokens in a grid of 2 x 3 to 4: two bands of 2 columns, 0 0 1; to 5: bands of 2 and 3 columns."""
  t, one = jnp.arange(6)[None], jnp.ones((1, 1), jnp.int32)
  cells = jax.jit(pool_cells, compiler_options=quick())
  cut = lambda k: np.asarray(cells(t, 2 * one, 3 * one, k * one))[0].tolist()
  assert cut(4) == [0, 0, 1, 2, 2, 3]
  assert cut(5) == [0, 0, 1, 2, 3, 4]
  assert cut(1) == [0] * 6 and cut(6) == list(range(6))
  for height, width in ((3, 3), (2, 5), (7, 2)):  # every cell has a token
    size = height * width
    for k in range(1, size + 1):
      got = cells(jnp.arange(size)[None], height * one, width * one, k * one)
      assert sorted(set(np.asarray(got)[0].tolist())) == list(range(k)), (height, width, k)
  out, _ = reduced(Pool(grid=(2, 3)), tokens_of(np.arange(6.0)[:, None]), 4)
  np.testing.assert_allclose(out.x[0, :, 0], [0.5, 2, 3.5, 5])
  out, _ = reduced(Pool(), tokens_of(np.arange(6.0)[:, None]), 2, mask=False)  # no square: a row
  np.testing.assert_allclose(out.x[0, :, 0], [1, 4])


@needs_golden
def test_aim_recorded():
  g = recorded("aim_merge_36")
  module = ToMe(metric="token", plain=True)
  half, _ = reduced(module, tokens_of(g["x"]), 18)
  np.testing.assert_allclose(half.x, g["half"], atol=1e-5)
  quarter, _ = reduced(module, half, 9, mask=False)
  np.testing.assert_allclose(quarter.x, g["quarter"], atol=1e-5)
  assert float(quarter.size.sum()) == 36.0


@needs_golden
def test_dymu_recorded():
  g = recorded("dymu_dtome_37")
  tokens = tokens_of(g["x"], 1)
  tau = float(g["threshold"])
  run = lambda mode: jax.jit(
    lambda t: DyMUMerge(metric="token").apply({}, t, rates.Threshold(-tau, 25), train=False, mode=mode)[0],
    compiler_options=quick(),
  )(tokens)
  for mode in ("gather", "mask"):
    out, n = run(mode), int(g["n_out"])
    assert int(out.alive.sum()) == n and bool(out.alive[0, :n].all())
    np.testing.assert_allclose(out.x[:, :n], g["merged"], atol=1e-5)
    np.testing.assert_allclose(out.size[:, :n], g["size"][..., 0])
    np.testing.assert_array_equal(np.asarray(out.owner)[0] == np.arange(n)[:, None], g["source"][0] > 0)


def test_dymu_threshold_of_a_batch():
  """Pairs .9 .2 .5 and .8 .7 -.1; one an image are two: .9 and .8 are above .7, two an image: .5 is above .2."""
  similarity = jnp.asarray([[0.9, 0.2, 0.5], [0.8, 0.7, -0.1]])
  got = [float(batch_threshold(similarity, r)) for r in (1, 2, 3)]
  np.testing.assert_allclose(got, [0.7, 0.2, 0.0], rtol=1e-6)  # of all six the last stays, and tau is not negative
  assert [int((similarity > tau).sum()) for tau in got[:2]] == [2, 4]


@needs_golden
def test_virtual_unmerging_recorded():
  g = recorded("dymu_vtu")
  owner = jnp.asarray(g["mapping"], jnp.int32)[None]
  half = g["cos"].shape[-1] // 2
  angle = jnp.arctan2(g["sin"], g["cos"]).reshape(1, owner.shape[1], -1)[..., :half]

  def run(q, k, v):
    whole = places(owner, jnp.arange(owner.shape[1])[None])
    q, k, v = rotate(whole.expand(q), angle), rotate(whole.expand(k), angle), whole.expand(v)
    y = attend(q, k, v, mask=whole.there, causal=True)
    return whole.mean(y, g["Q_un"].shape[2]), y, jnp.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5

  out, y, score = jax.jit(run, compiler_options=quick())(*(jnp.asarray(g[name]) for name in ("Q_un", "K_un", "V_un")))
  np.testing.assert_allclose(score, g["scores"], atol=2e-5)
  np.testing.assert_allclose(y, g["causal_output_full"], atol=1e-5)
  np.testing.assert_allclose(out, g["output_remerged_mean"], atol=1e-5)


def test_places_with_padding():
  """Of five places two are nobody's: 7 5 . 7 . with values 7 -> 1, 5 -> 2; the mean of who has none is 0."""
  whole = places(jnp.asarray([[1, 0, -1, 1, -1]]), jnp.asarray([[4, 5, 6, 7, 8]]))
  assert whole.position[0, :3].tolist() == [4, 5, 7] and whole.last.tolist() == [7]
  assert whole.there[0].tolist() == [True, True, True, False, False]
  expanded = whole.expand(jnp.asarray([2.0, 1.0, 9.0]).reshape(1, 1, 3, 1))
  assert expanded[0, 0, :3, 0].tolist() == [1.0, 2.0, 1.0]
  y = jnp.asarray([1.0, 2.0, 5.0, jnp.nan, jnp.nan]).reshape(1, 1, 5, 1)
  assert whole.mean(y, 3)[0, 0, :, 0].tolist() == [2.0, 3.0, 0.0]


@needs_golden
def test_soft_topk_recorded():
  g = recorded("soft_topk")
  run = jax.jit(rates.soft_topk, compiler_options=quick())
  for share in (20, 50):
    np.testing.assert_allclose(run(jnp.asarray(g["scores"]), 0.48 * share), g[f"w_{share}"], atol=1e-5)


def test_soft_topk_has_the_gradient_of_its_sum():
  """The sum does not move with any score; a weight moves as finite differences say."""
  score, step = jnp.asarray([0.3, -1.0, 2.0, 0.1]), 1e-2
  near = score + step * jnp.concatenate([jnp.eye(4), -jnp.eye(4)])
  run = jax.jit(lambda s: (jax.jacrev(lambda s: rates.soft_topk(s, 1.5))(s), rates.soft_topk(near, 1.5)))
  slope, (up, down) = (np.asarray(a).reshape(shape) for a, shape in zip(run(score), ((4, 4), (2, 4, 4)), strict=True))
  np.testing.assert_allclose(slope.sum(0), np.zeros(4), atol=1e-6)
  np.testing.assert_allclose(slope.T, (up - down) / (2 * step), atol=1e-4)


@needs_golden
@pytest.mark.parametrize("name", ["dpc_knn_36", pytest.param("dpc_knn_64", marks=pytest.mark.thorough)])
def test_density_peaks_recorded(name):
  g = recorded(name)
  module = DPCKNN(neighbours=int(g["k_nn"]), merge=True, raster=False)
  out, report = reduced(module, tokens_of(g["x"]), g["k_clusters"])
  np.testing.assert_allclose(np.exp(report["score"]), g["score"], rtol=1e-4)
  assert order(out) == g["centers_in_score_order"].tolist()
  np.testing.assert_array_equal(out.owner, g["assignment"])
  np.testing.assert_allclose(out.x, g["merged_mean"], atol=1e-5)


@needs_golden
def test_kmedoids_recorded():
  g = recorded("kmedoids_centerclip")
  out, report = reduced(KMedoids(), tokens_of(g["x"]), g["k"])
  assert order(out) == g["medoids_sorted"].tolist()
  place = np.array([row.index for row in order(out)])
  assigned = [[place[b](int(m)) for m in row] for b, row in enumerate(np.asarray(report["cluster"]))]
  np.testing.assert_array_equal(assigned, g["assignment"])


def test_kmedoids_by_hand():
  """0 1 2 and 10 11 12.5 on a line: the start is 12.5, the longest, and 0; medoids are 1 and 11, means 1 and 11.17."""
  tokens = tokens_of(np.array([0.0, 1, 2, 10, 11, 12.5])[:, None])
  out, _ = reduced(KMedoids(merge=True), tokens, 2)
  assert order(out) == [[1, 4]]
  np.testing.assert_allclose(out.x[0, :, 0], [1, 33.5 / 3], rtol=1e-6)
