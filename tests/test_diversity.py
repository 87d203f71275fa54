"""Diverse subsets, clusters and Zero-TPrune by hand, and density peaks against their authors' output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import needs_golden, quick, recorded
from test_criteria import DEGREE, call_traced, f32, survivors, tokens_of

from tokred import scores
from tokred import tokens as tk
from tokred.rates import Threshold
from tokred.reducers import cluster, diversity, zerotprune

# Diversity.


def test_maxmin_by_hand():
  """Keys at 0, 30, 90, 180, 200 degrees; their sum is (-.074, 1.158), so that 90 degrees is the most central.

  Then distances 1 - cos to the nearest taken: 1, .5, -, 1, 1.342 -> token 4;  1, .5, -, .060, - -> token 0;
  -, .134, -, .060, - -> token 1; token 3 is last.
  """
  tokens = tokens_of(np.arange(5), angles=(0, 30, 90, 180, 200))
  position, _, _ = survivors(diversity.MaxMin(), tokens, 3)
  assert position == [2, 4, 0]
  _, report = call_traced(diversity.MaxMin(), tokens, 5)
  want = [1.0, 1 - np.cos(30 * DEGREE), 2.0, 1 - np.cos(20 * DEGREE), 1 + np.sin(20 * DEGREE)]
  np.testing.assert_allclose(report["score"][0], want, atol=1e-6)
  position, _, _ = survivors(diversity.MaxMin(raster=True), tokens, 3)
  assert position == [0, 2, 4]
  scored = tokens.replace(feats=tokens.feats | {"cls_attention": f32([[0.1, 0.5, 0.1, 0.1, 0.2]])})
  # From 30 degrees: .134, -, .5, 1.866, 1.985 -> token 4;  .134, -, .5, .06, - -> token 2
  assert survivors(diversity.MaxMin(start="cls_attention"), scored, 3)[0] == [1, 4, 2]


def test_maxmin_leaves_protected_tokens_out_of_the_comparison():
  """As above behind a CLS that has the key of token 4: it stands first, and token 4 is still taken."""
  tokens = tokens_of(np.arange(6), angles=(200, 0, 30, 90, 180, 200))
  tokens = tokens.replace(protected=jnp.arange(6)[None] < 1)
  assert survivors(diversity.MaxMin(), tokens, 4)[0] == [0, 3, 5, 1]


def test_maxmin_stops_at_a_distance():
  """Token 1 wins .134 and token 3 .060: a threshold of .1 takes four tokens, and a capacity of 3 three."""
  tokens = tokens_of(np.arange(5), angles=(0, 30, 90, 180, 200))
  for value, capacity, want in ((0.1, 5, [2, 4, 0, 1]), (0.1, 3, [2, 4, 0]), (1.2, 5, [2, 4])):
    module = diversity.MaxMin()
    keep = Threshold(value, capacity)
    out, _ = jax.jit(
      functools.partial(module.apply, {}, train=False, mode="mask"), compiler_options=quick()
    )(tokens, keep)  # fmt: skip
    assert np.asarray(out.position[0])[np.asarray(out.alive[0])].tolist() == want


def test_mmr_by_hand():
  """lambda = .5, keys at 0, 10, 90, 60 degrees, scores 1, .9, .5, .4 of the best.  Token 0 is first; then

  .5 x .9 - .5 x .985 = -.042;  .5 x .5 - 0 = .25;  .5 x .4 - .5 x .5 = -.05 -> token 2
  -.042;  .2 - .5 x .866 = -.233 -> token 1, although 3 is farther away
  """
  tokens = tokens_of(np.arange(4), angles=(0, 10, 90, 60), cls_attention=[[0.4, 0.36, 0.2, 0.16]])
  assert survivors(diversity.MMR(), tokens, 3)[0] == [0, 2, 1]
  assert survivors(diversity.MMR(relevance=1.0), tokens, 3)[0] == [0, 1, 2]
  assert survivors(diversity.MMR(relevance=0.0), tokens, 3)[0] == [0, 2, 3]  # 1 - cos: .015 and .134 are left


def test_mmr_takes_several_at_once_and_leaves_out_what_is_protected():
  """Behind CLS, whose attention to itself is 9, tokens of scores 8, 6, 4, 2 at 0, 10, 90, 60 degrees, lambda = .5.

  The first is token 1.  One at a time: .5 x 6 / 8 - .5 cos 10 = -.117, .25 - 0 = .25, .125 - .25 = -.125: token 3.
  In pairs it is token 2, for .375 is more than .25: nobody looks at what 1 has taken.  By range, (s - 2) / 6:
  .5 x 2 / 3 - .492 = -.159, .5 / 3 = .167, 0 - .25: token 3 again, then token 2, and the report says so.
  """
  tokens = tokens_of(np.arange(5), angles=(0, 0, 10, 90, 60), cls_attention=[[9, 8, 6, 4, 2]])
  tokens = tokens.replace(protected=jnp.arange(5)[None] < 1)
  position, _, report = survivors(diversity.MMR(), tokens, 3)
  assert position == [0, 1, 3]
  np.testing.assert_allclose(report["score"][0, 3], 0.25, atol=1e-6)
  position, _, report = survivors(diversity.MMR(at_once=2), tokens, 3)
  assert position == [0, 1, 2]
  position, _, report = survivors(diversity.MMR(scale="range"), tokens, 4)
  assert position == [0, 1, 3, 2]
  wins = [1.0 + 0.0, 1 / 3 - np.cos(10 * DEGREE) / 2, 1 / 6]
  np.testing.assert_allclose(report["score"][0, 1:4], wins, atol=1e-5)


def test_the_most_isolated_is_first():
  """Of 0, 10, 100, 130 and 260 degrees the nearest other is 10, 10, 30, 30 and 100 away; CLS lies beside the last."""
  tokens = tokens_of(np.arange(6), angles=(261, 0, 10, 100, 130, 260))
  tokens = tokens.replace(protected=jnp.arange(6)[None] < 1)
  assert survivors(diversity.MaxMin(start="isolated"), tokens, 2)[0] == [0, 5]


# Clusters.

spread_out = jax.jit(cluster.distances, compiler_options=quick())
peaks = jax.jit(cluster.density_peaks, static_argnums=1, compiler_options=quick())


def test_kmeans_by_hand():
  """Keys at 0, 10, 20 and 90, 100 degrees, sizes 1, 1, 2, 3, 1: two groups.

  Centres: about 12.5 degrees, nearest is 10; (3 x 90 + 100) / 4 = 92.5 degrees, nearest is 90.
  x: (8 + 4 + 2 x 2) / 4 = 4 and (3 x 10 + 2) / 4 = 8.
  """
  tokens = tokens_of((8, 4, 2, 10, 2), angles=(0, 10, 20, 90, 100)).replace(size=f32([[1, 1, 2, 3, 1]]))
  position, out, _ = survivors(cluster.KMeans(), tokens, 2)
  assert position == [1, 3]
  assert np.asarray(out.owner[0]).tolist() == [0, 0, 0, 1, 1]
  np.testing.assert_allclose(out.x[0, :, 0], [4.0, 8.0], rtol=1e-6)
  np.testing.assert_allclose(out.size[0], [4.0, 4.0])


def test_kmeans_centres_weigh_what_tokens_represent():
  """Keys at 0, 10 and 60 degrees: the centre lies at 22.7, next to 10, but where the last stands for 8 at 49.9."""
  tokens = tokens_of(np.ones(3), angles=(0, 10, 60))
  assert survivors(cluster.KMeans(), tokens, 1)[0] == [1]
  assert survivors(cluster.KMeans(), tokens.replace(size=f32([[1, 1, 8]])), 1)[0] == [2]


def test_kmeans_of_equal_tokens_still_gives_as_many_as_asked():
  tokens = tokens_of(np.ones(6), angles=(30,) * 6).replace(protected=jnp.arange(6)[None] < 1)
  position, out, _ = survivors(cluster.KMeans(), tokens, 4)
  assert position[0] == 0 and len(position) == 4
  assert float(out.size.sum()) == 6.0


LINE = (0.0, 1.0, 1.5, 6.0, 6.2)


def test_density_peaks_by_hand():
  """Points 0, 1, 1.5, 6, 6.2 on a line; to the nearest: 1, .5, .5, .2, .2; rho = exp(-d^2 / 2).

  rho: .607, .882, .882, .980, .980; of equals the first is denser.
  delta: 1 (to 1); 5 (to 6); .5 (to 1); 6.2, the largest, for the densest; .2
  """
  distance = spread_out(f32(LINE)[None, :, None], jnp.ones((1, 5), bool))
  want = np.exp([-0.5, -0.125, -0.125, -0.02, -0.02]) * [1.0, 5.0, 0.5, 6.2, 0.2]
  np.testing.assert_allclose(np.exp(peaks(distance, 2))[0], want, rtol=1e-4)


@pytest.mark.parametrize("merge", [False, True])
def test_dpcknn_by_hand(merge):
  """The peaks are 6 (6.08) and 1 (4.41); 0 and 1.5 fold into 1, mean .8333; 6.2 into 6, mean 6.1."""
  position, out, _ = survivors(cluster.DPCKNN(merge=merge), tokens_of(LINE), 2)
  assert position == [1, 3]
  np.testing.assert_allclose(out.x[0, :, 0], [2.5 / 3, 6.1] if merge else [1.0, 6.0], rtol=1e-6)
  np.testing.assert_allclose(out.size[0], [3.0, 2.0] if merge else [1.0, 1.0])
  assert np.asarray(out.owner[0]).tolist() == ([0, 0, 0, 1, 1] if merge else [-1, 0, -1, 1, -1])
  assert survivors(cluster.DPCKNN(merge=merge, raster=False), tokens_of(LINE), 2)[0] == [3, 1]


@needs_golden
def test_dpcknn_golden():
  arrays, settings = recorded("fn_hot_dpcknn")
  case, get = settings["cases"][0], lambda name: arrays[f"c0_{name}"]
  x = f32(get("x"))
  distance = spread_out(x, jnp.ones(x.shape[:2], bool))
  score = peaks(distance, case["k"], get("noise") * case["noise_scale"])
  np.testing.assert_allclose(np.exp(score), get("score"), rtol=1e-5)
  centres = np.asarray(tk.inverse(tk.rank(-score)))[:, : case["clusters"]]
  np.testing.assert_array_equal(centres, get("centers"))
  np.testing.assert_array_equal(np.sort(centres), get("centers_sorted"))
  to_centres = np.take_along_axis(np.asarray(distance), centres[:, None], axis=2)
  np.testing.assert_array_equal(to_centres.argmin(-1), get("assign"))


# Zero-TPrune.


def test_zerotprune_by_hand():
  """Importance .30, .25, .20 (the upper half: keys at 0, 90, 180 degrees), .12, .08, .05 (at 5, 45, 240 degrees).

  Similarity of the lower half to the upper: .996, .707, .5.  Four stay, so two leave: one of them (similar = .5) is
  token 3, the twin of token 0; of the others token 5 is the least important.
  """
  feats = {f"pagerank_{i}": [[0.30, 0.25, 0.20, 0.12, 0.08, 0.05]] for i in scores.PAGERANK}
  tokens = tokens_of(np.arange(6), angles=(0, 90, 180, 5, 45, 240), **feats)
  assert survivors(zerotprune.ZeroTPrune(similar=0.5), tokens, 4)[0] == [0, 1, 2, 4]
  assert survivors(zerotprune.ZeroTPrune(similar=0.0), tokens, 4)[0] == [0, 1, 2, 3]
  assert survivors(zerotprune.ZeroTPrune(similar=1.0), tokens, 4)[0] == [0, 1, 2, 5]
  _, report = call_traced(zerotprune.ZeroTPrune(similar=1.0), tokens, 1)  # five should leave, three are redundant
  assert np.asarray(report["redundant"][0]).tolist() == [False] * 3 + [True] * 3


def test_zerotprune_behind_cls():
  """Of five free tokens three are the upper half, (5 + 1) / 2: 0, 90, 90.4 degrees; the lower two are at 91 and 45.

  Four leave, of which floor(.4 x 4) = 1 is redundant: token 4, .6 degrees from token 3; that, .4 from token 2, is no
  candidate.  Three more leave by importance, and what is redundant is worse than any: 1 stays of 1, 2, 3 and 5.
  """
  feats = {f"pagerank_{i}": [[0.01, 0.95, 0.9, 0.8, 0.7, 0.05]] for i in scores.PAGERANK}
  tokens = tokens_of(np.arange(6), angles=(91, 0, 90, 90.4, 91, 45), **feats)
  tokens = tokens.replace(protected=jnp.arange(6)[None] < 1)
  module = zerotprune.ZeroTPrune(similar=0.4)
  assert survivors(module, tokens, 2)[0] == [0, 1]
  _, report = call_traced(module, tokens, 2)
  assert np.flatnonzero(report["redundant"][0]).tolist() == [4]
  assert survivors(zerotprune.ZeroTPrune(similar=1.0), tokens, 5)[0] == [0, 1, 2, 3, 5]


def test_zerotprune_votes_less_the_deeper():
  rounds = [zerotprune.ZeroTPrune(layer=layer, depth=12).needed()[-1] for layer in range(12)]
  assert rounds == ["pagerank_30"] * 4 + ["pagerank_5"] * 4 + ["pagerank_1"] * 4
  assert zerotprune.ZeroTPrune(layer=11, depth=12, iterations=50, similar=0.0).needed() == ("pagerank_50",)
