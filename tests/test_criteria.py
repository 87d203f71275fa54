"""Training-free criteria: scores against hand arithmetic, clustering and sampling against their authors' outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import needs_golden, quick, recorded

from tokred import scores, sites
from tokred import tokens as tk
from tokred.layout import Stack
from tokred.nn import attention
from tokred.reducers import ats, cluster, diversity, zerotprune
from tokred.reducers.topk import TopK

DEGREE = np.pi / 180


def f32(a):
  return jnp.asarray(a, jnp.float32)


def tokens_of(x, angles=None, **feats):
  """One image; x (N,) or (N, D), keys as unit vectors at these angles, in two equal heads."""
  x = f32(x)
  tokens = tk.start(x.reshape(1, len(x), -1))
  if angles is not None:
    key = np.stack([np.cos(np.asarray(angles) * DEGREE), np.sin(np.asarray(angles) * DEGREE)], -1)
    feats["key"] = f32(key)[None, :, None].repeat(2, 2)
  return tokens.replace(feats={name: f32(value) for name, value in feats.items()})


@functools.partial(jax.jit, static_argnames=("module", "keep", "mode"), compiler_options=quick())
def call(module, tokens, keep, mode):
  return module.apply({}, tokens, keep, train=False, mode=mode)


@functools.partial(jax.jit, static_argnames=("module",), compiler_options=quick())
def call_traced(module, tokens, keep):
  return module.apply({}, tokens, keep, train=False, mode="mask")


def survivors(module, tokens, keep):
  """Positions of the survivors in their order, which must be alike in both modes, and the gathered tokens."""
  gathered, report = call(module, tokens, keep, "gather")
  masked, _ = call_traced(module, tokens, keep)
  alive = np.asarray(masked.alive[0])
  assert np.asarray(gathered.mask[0]).tolist() == alive[:keep].tolist()
  position = np.asarray(gathered.position[0])[alive[:keep]].tolist()
  assert np.asarray(masked.position[0])[alive].tolist() == position
  np.testing.assert_allclose(masked.x[:, :keep][masked.alive[:, :keep]], gathered.x[gathered.mask], atol=1e-6)
  return position, gathered, report


# Features of the attention map.


def attention_inputs(n=11, seed=0):
  rng = np.random.default_rng(seed)
  q, k = rng.normal(size=(2, 2, 3, n, 8))
  return f32(q), f32(k), f32(rng.uniform(0.5, 4.0, (2, n))), np.arange(n) < np.array([[8], [5]])


def maps(q, k, size, alive):
  """Attention maps among the living by loops, float64: [image][head] of (alive, alive)."""
  out = []
  for q_image, k_image, s, n in zip(*(np.asarray(a, float) for a in (q, k, size)), alive.sum(1), strict=True):
    logits = [a[:n] @ b[:n].T / np.sqrt(a.shape[1]) for a, b in zip(q_image, k_image, strict=True)]
    weight = [np.exp(a) * s[:n] for a in logits]
    out.append([w / w.sum(1, keepdims=True) for w in weight])
  return out


@pytest.mark.parametrize("rows", [256, 4])
@pytest.mark.parametrize("kind", ["mask", "gate"])
def test_column_mean_is_that_of_the_map(rows, kind):
  q, k, size, alive = attention_inputs()
  want = np.zeros(alive.shape)
  for image, heads in enumerate(maps(q, k, size, alive)):
    want[image, : alive[image].sum()] = np.mean(heads, axis=(0, 1))
  if kind == "mask":  # garbage in the dead is nobody's
    dead = ~alive[:, None, :, None]
    q, k, size = jnp.where(dead, jnp.nan, q), jnp.where(dead, jnp.nan, k), jnp.where(alive, size, jnp.nan)
  mask = jnp.asarray(alive) if kind == "mask" else f32(alive)
  run = jax.jit(functools.partial(attention.column_mean, rows=rows), compiler_options=quick())
  np.testing.assert_allclose(run(q, k, size=size, mask=mask), want, rtol=1e-5, atol=1e-8)


def test_column_mean_has_the_same_gradient_in_blocks():
  q, k, size, alive = attention_inputs(seed=1)

  def loss(rows, q, k, gate):
    return jnp.sum(jnp.sin(jnp.arange(11)) * attention.column_mean(q, k, size=size, mask=gate, rows=rows))

  whole, blocks = (
    jax.jit(jax.grad(functools.partial(loss, rows), (0, 1, 2)), compiler_options=quick())(q, k, f32(alive))
    for rows in (256, 4)
  )
  for a, b in zip(whole, blocks, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  assert np.abs(whole[2][~alive]).min() > 1e-5  # it reaches gates that are zero


def test_pagerank_by_hand():
  """Head 0 votes by A = [[.5 .3 .2], [.6 .3 .1], [.4 .3 .3]]; head 1 is uniform.

  v1 = columns' means of A = (.5, .3, .2)
  v2 = A^T v1 = (.25 + .18 + .08, .15 + .09 + .06, .10 + .03 + .06) = (.51, .30, .19)
  Variance of 3 v2 = (1.53, .90, .57): (.53^2 + .10^2 + .43^2) / 3 = .1586; that of the uniform head is 0: not in use.
  """
  a = np.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.3, 0.3]])
  q = f32(np.stack([np.log(a), np.zeros((3, 3))])[None] * np.sqrt(3))
  k = jnp.broadcast_to(jnp.eye(3), q.shape)
  want = np.array([0.51, 0.30, 0.19])
  np.testing.assert_allclose(attention.pagerank(q, k, iterations=2), want[None], rtol=1e-5)
  both = np.sqrt((want**2 + 1 / 9) / 2)  # root of the mean square
  np.testing.assert_allclose(attention.pagerank(q, k, iterations=2, spread=(0.0, 0.7)), both[None], rtol=1e-5)
  np.testing.assert_allclose(attention.pagerank(q, k, iterations=2, spread=(0.5, 0.7)), both[None], rtol=1e-5)
  np.testing.assert_allclose(attention.pagerank(q, k, iterations=1), [[0.5, 0.3, 0.2]], rtol=1e-5)


@pytest.mark.parametrize("rows", [256, 4])
def test_pagerank_in_blocks_and_among_the_dead(rows):
  q, k, size, alive = attention_inputs(seed=2)
  want = np.zeros(alive.shape)
  for image, heads in enumerate(maps(q, k, size, alive)):
    n, found = alive[image].sum(), []
    for a in heads:
      v = np.full(n, 1 / n)
      for _ in range(5):
        v = a.T @ v / np.abs(a.T @ v).sum()
      found.append(v)
    used = [v for v in found if 0.01 <= np.var(n * v) <= 0.7] or found
    want[image, :n] = np.sqrt(np.mean(np.square(used), axis=0))
  spoilt = jnp.where(alive[:, None, :, None], q, jnp.nan)
  run = jax.jit(functools.partial(attention.pagerank, iterations=5, rows=rows), compiler_options=quick())
  np.testing.assert_allclose(run(spoilt, k, size=size, mask=jnp.asarray(alive)), want, rtol=1e-5, atol=1e-8)


def test_pagerank_has_a_finite_gradient():
  q, k, _, alive = attention_inputs(seed=3)
  slope = jax.jit(
    jax.grad(lambda q: attention.pagerank(q, k, iterations=3, mask=jnp.asarray(alive))[:, 0].sum()),
    compiler_options=quick(),
  )(q)
  assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-6


# Scores.

chance = jax.jit(scores.random, compiler_options=quick())


def test_norms_by_hand():
  """Heads (3, 4) and (0, 1): mean of 5 and 1 is 3.  An update of (2, 3, 6) is 7 long."""
  value = f32([[[[3, 4], [0, 1]], [[0, 0], [6, 8]]]])
  tokens = tokens_of(np.zeros((2, 3))).replace(feats={"value": value, "update": f32([[[2, 3, 6], [1, 2, 2]]])})
  np.testing.assert_allclose(scores.value_norm(tokens), [[3.0, 5.0]])
  np.testing.assert_allclose(scores.repr_shift(tokens), [[7.0, 3.0]])


def test_key_norm_by_hand():
  """Norms are means over heads: keys (3, 4) and (0, 1) have (5 + 1) / 2 = 3; that of all four numbers is sqrt(26).

  (0, 0) and (6, 8) have (0 + 10) / 2 = 5.  Values do not matter.
  """
  key = f32([[[[3, 4], [0, 1]], [[0, 0], [6, 8]]]])
  tokens = tokens_of(np.zeros((2, 3))).replace(feats={"key": key, "value": 9 * key})
  np.testing.assert_allclose(scores.key_norm(tokens), [[3.0, 5.0]])


def test_token_norm_by_hand():
  """The residual stream has no heads: (3, 4, 0, 1) is sqrt(9 + 16 + 1) = 5.0990 long, (-2, 4, 5, 6) sqrt(81) = 9."""
  tokens = tokens_of([[3, 4, 0, 1], [-2, 4, 5, 6]])
  np.testing.assert_allclose(scores.token_norm(tokens), [[5.0990195, 9.0]], rtol=1e-6)


def test_every_score_has_a_function_and_a_row_for_each_token():
  q = jax.ShapeDtypeStruct((2, 2, 5, 4), jnp.bfloat16)
  for name, (score, needs) in scores.SCORES.items():

    def run(q, score=score, needs=needs):
      feats = {n: attention.FEATURES[n](q, q, q, size=None, mask=None) for n in needs if n in attention.FEATURES}
      tokens = tk.start(q.reshape(2, 5, 8), 1)
      feats |= {"update": tokens.x, "mlp_update": tokens.x, scores.MEMORY: q[:, 0, :, 0]}
      return score(tokens.replace(feats=feats))

    got = jax.eval_shape(run, q)
    assert got.shape == (2, 5) and got.dtype == jnp.float32, name
    assert TopK(score=name).needed() == needs


def test_random_is_uniform_and_each_image_has_its_own():
  rng = np.random.default_rng(0)
  x = f32(rng.normal(size=(32, 65, 16)))
  tokens = tk.start(x, 1)
  got = np.asarray(chance(tokens))
  assert ((got >= 0) & (got < 1)).all()
  assert abs(got.mean() - 0.5) < 4 * np.sqrt(1 / 12 / got.size)
  np.testing.assert_allclose(np.quantile(got, [0.1, 0.25, 0.75, 0.9]), [0.1, 0.25, 0.75, 0.9], atol=0.04)
  between = np.corrcoef(got) - np.eye(32)
  assert np.abs(between).max() < 0.6  # 496 pairs of 65 numbers: 0.6 is five deviations
  along = np.corrcoef(got[:, :-1].ravel(), got[:, 1:].ravel())[0, 1]
  assert abs(along) < 0.1


def test_random_depends_on_the_image_alone():
  rng = np.random.default_rng(1)
  tokens = tk.start(f32(rng.normal(size=(4, 17, 16))), 1)
  dead = jnp.arange(17) >= 11
  masked = tokens.replace(mask=tokens.mask & ~dead, x=jnp.where(dead[:, None], jnp.nan, tokens.x))
  short = jax.tree.map(lambda a: a[:, :11], tokens.replace(owner=tokens.mask)).replace(owner=tokens.owner)
  want = np.asarray(chance(masked))[:, :11]
  np.testing.assert_array_equal(chance(short), want)
  np.testing.assert_array_equal(chance(jax.tree.map(lambda a: a[2:3], short)), want[2:3])
  moved = short.replace(x=short.x * (1 + 1e-5 * f32(rng.normal(size=short.x.shape))))
  np.testing.assert_array_equal(chance(moved), want)  # rounding does not change it
  turned = jax.tree.map(lambda a: a[:, ::-1], short.replace(owner=short.mask)).replace(owner=short.owner)
  np.testing.assert_array_equal(chance(turned), want[:, ::-1])  # nor the order of the tokens


# The best by a score.


def test_the_best_stand_by_score_or_as_they_stood():
  """|x| = 9 (CLS), 1, 4, 3, 5: of three that stay two are 4 and 5.  The fused token of EViT is counted on top."""
  tokens = tokens_of([9, 1, -4, 3, 5]).replace(protected=jnp.arange(5)[None] < 1)
  assert survivors(TopK(score="token_norm"), tokens, 3)[0] == [0, 4, 2]
  assert survivors(TopK(score="token_norm", raster=True), tokens, 3)[0] == [0, 2, 4]
  assert [TopK(fuse=True).count(keep, 17, 1, 16) for keep in (0.5, 1.0)] == [10, 17]
  assert TopK().count(0.5, 17, 1, 16) == 9 and TopK(fuse=True).fewest(17, 1) == 2


def test_the_fused_token_teaches_attention():
  """EViT: c_2 x_2 + c_3 x_3 = 0.2 x 5 + 0.1 x 7 = 1.7 of the two that go; its slope by c is what they hold."""
  tokens = tokens_of([1, 3, 5, 7]).replace(protected=jnp.arange(4)[None] < 1)

  def fused(attention):
    out, _ = TopK(fuse=True).apply(
      {}, tokens.replace(feats=dict(cls_attention=attention)), 3, train=True, mode="gather"
    )
    return out.x[0, 2, 0]

  value, slope = jax.jit(jax.value_and_grad(fused), compiler_options=quick())(f32([[0.4, 0.3, 0.2, 0.1]]))
  np.testing.assert_allclose(value, 1.7, rtol=1e-6)
  np.testing.assert_allclose(slope, [[0, 0, 5, 7]], rtol=1e-6)


# ATS.


def test_ats_by_hand():
  """Scores .05, .10, .15, .70 ascending: CDF .05, .15, .30, 1; moved to [0, 1]: 0, .1053, .2632, 1.

  Four levels from .1053 to 1: .1053, .4035, .7018, 1; nearest entries: 1, 2 (.140 against .596), 3 (.439 against
  .298), 3.  So three tokens are picked, and stand in ascending order behind CLS.  Two levels: entries 1 and 3.
  """
  attention_row = [[0.5, 0.35, 0.025, 0.05, 0.075]]  # of CLS: what it pays to itself is of no account
  value = np.full((1, 5, 1, 4), 0.5)  # norm 1
  tokens = tokens_of(np.arange(5), cls_attention=attention_row, value=value)
  tokens = tokens.replace(protected=jnp.arange(5)[None] < 1)
  position, out, report = survivors(ats.ATS(), tokens, 5)
  np.testing.assert_allclose(report["score"], [[0.0, 0.7, 0.05, 0.1, 0.15]], rtol=1e-6)
  assert position == [0, 3, 4, 1]
  assert np.asarray(out.mask[0]).tolist() == [True] * 4 + [False]
  assert survivors(ats.ATS(), tokens, 3)[0] == [0, 3, 1]


@pytest.mark.parametrize("slots", [6, 101])
def test_ats_levels_do_not_depend_on_how_many_are_left(slots):
  """Scores .01, .01, .01, .01, .96: CDF moved to [0, 1]: 0, .0101, .0202, .0303, 1.

  Five levels from .0101 to 1, .2475 apart: the entries 1, 3 (.2273 from .2576, .7424 from 1), 3 (.4747 against .4949),
  4, 4.  At 100 levels, .0100 apart, .0201 and .0301 pick entries 2 and 3: only the first is not picked.
  """
  x = np.zeros(slots)
  row = np.zeros((1, slots))
  row[0, :6] = 0.5, 0.01, 0.01, 0.96, 0.01, 0.01
  tokens = tokens_of(x, cls_attention=row, value=np.full((1, slots, 1, 4), 0.5))
  index = jnp.arange(slots)[None]
  tokens = tokens.replace(protected=index < 1, mask=index < 6)
  left = lambda keep, **options: survivors(ats.ATS(**options), tokens, keep)[0]
  if slots == 6:
    assert left(6) == [0, 2, 5, 3]
    # CLS and three: the first of those that were picked has no room.
    assert left(4, levels=100) == [0, 4, 5, 3] and left(1, levels=100) == [0]
    for keep in (4, 6):
      out = call(ats.ATS(levels=100), tokens, keep, "gather")[0]
      assert np.asarray(out.position[0])[np.asarray(out.alive[0])].tolist() == left(keep, levels=100)
  else:
    assert left(101) == [0, 2, 4, 5, 3]  # 100 levels, and 5 tokens
  assert left(6, levels=100) == [0, 2, 4, 5, 3]


def test_ats_keeps_eight():
  site = lambda **fields: dict(s=dict(reducer="ats", layers=(1,), **fields))
  stack = Stack(depth=4, num_tokens=17, num_protected=1)
  assert sites.parse(site(keep=0.2), stack).counts() == (17, 8, 8, 8)  # ceil(16 / 5) and CLS are 5
  with pytest.raises(ValueError, match=r"keep=7 leaves 7 of 17 tokens at layer 1, but 'ats' can go down to 8"):
    sites.parse(site(keep=7), stack)
  with pytest.raises(ValueError, match=r"sites.s.levels=-1 must be a number of levels, or 0"):
    sites.parse(site(keep=9, levels=-1), stack)


@needs_golden
@pytest.mark.parametrize("mode", ["gather", "mask"])
def test_ats_golden(mode):
  arrays, settings = recorded("fn_ats")
  case, get = settings["cases"][0], lambda name: arrays[f"c0_{name}"]
  n, maps = case["N"], get("attn")
  tokens = tk.start(f32(get("x")), 1)
  feats = {"cls_attention": f32(maps[:, :, 0].mean(1)), "value": f32(get("v").swapaxes(1, 2))}
  out, report = call(ats.ATS(), tokens.replace(feats=feats), case["n_ref_tokens"], mode)
  order = get("order") + 1
  np.testing.assert_allclose(np.take_along_axis(np.asarray(report["score"]), order, 1), get("scores_sorted"), rtol=1e-5)
  np.testing.assert_array_equal(np.asarray(out.mask), get("policy")[..., 0] > 0)
  np.testing.assert_array_equal(np.asarray(out.alive.sum(1)), case["kept"])
  kept = np.asarray(out.alive)
  np.testing.assert_array_equal(np.asarray(out.x)[kept], get("selected_x")[kept])
  # They multiply the kept rows of the map with all values: the rows that leave with our survivors.
  rows = np.take_along_axis(maps, np.asarray(out.position)[:, None, :, None].repeat(n, 3), axis=2)
  np.testing.assert_array_equal(rows.swapaxes(1, 2)[kept], get("selected_attn").swapaxes(1, 2)[kept])


# Errors that a user can make.


@pytest.mark.parametrize(
  "module, message",
  [
    (diversity.MaxMin(metric="keys"), "metric='keys' is not a metric; did you mean 'key'"),
    (diversity.MaxMin(start="centre"), "start='centre' is not a start"),
    (diversity.MMR(score="cls"), "score='cls' is not a score"),
    (diversity.MMR(relevance=1.5), r"relevance=1.5 must be in \[0.0, 1.0\]"),
    (cluster.KMeans(metric="x"), "metric='x' is not a metric"),
    (cluster.DPCKNN(neighbours=0), "neighbours=0 must be at least 1"),
    (zerotprune.ZeroTPrune(iterations=7), "iterations=7 is not counted; .*valid: 0, 1, 10"),
    (zerotprune.ZeroTPrune(similar=-0.1), "similar=-0.1 must be in"),
  ],
  ids=lambda value: type(value).__name__,
)
def test_errors(module, message):
  with pytest.raises(ValueError, match=message):
    module.needed()
