"""STViT: semantic tokens from cells of the grid, and the grid that reads from them again."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import MODES, drawn, model, quick
from test_fusion import both, make, run
from test_slots import begin

import tokred
from tokred import cost
from tokred.config import default
from tokred.reducers import stvit
from tokred.sharding import path_name


def test_windows():
  """Five into two: floor(0), ceil(2.5) is 0 to 2; floor(2.5), ceil(5) is 2 to 4."""
  rows = stvit.windows((2, 2), (5, 2)).reshape(4, 5, 2)
  assert rows[0, :, 0].tolist() == [True, True, True, False, False] and not rows[0, :, 1].any()
  assert rows[3, :, 1].tolist() == [False, False, True, True, True] and not rows[3, :, 0].any()


def test_a_grid_that_is_no_square_is_told():
  """4 x 6 patches and CLS are 25 tokens, and no grid of 5 x 5."""
  model = dict(variant="mu/1", width=16, depth=1, num_heads=2, image_size=(4, 6), channels=1, num_classes=2)
  site = dict(reducer="stvit", layers=(0,), keep=9)
  with pytest.raises(
    ValueError, match=r"^sites.s, layer 0: keep=9 .* 25 tokens at the input are a grid of 4 x 4 and 9 others"
  ):
    tokred.build(dict(model=model, sites=dict(s=site))).init()
  tokred.build(dict(model=model, sites=dict(s=dict(site, keep=10, grid=(4, 6))))).init()


@pytest.fixture(scope="module")
def grid():
  """CLS and 4 x 4 tokens whose first channel counts from 0."""
  x = np.concatenate([np.full((1, 1, 4), 100.0), np.arange(16.0)[None, :, None] * [1, -1, 2, 0]], axis=1)
  return make(np.concatenate([x, x + 1]), prefix=1)


@pytest.mark.parametrize("pool, seeds", [("max", [5, 7, 13, 15]), ("avg", [2.5, 4.5, 10.5, 12.5])])
def test_stvit_begins_as_pooling(grid, pool, seeds):
  """2 x 2 cells of a 4 x 4 grid: of 0, 1, 4, 5 the largest is 5 and the mean 2.5; LayerScale 0 refines nothing."""
  reducer = stvit.STViT(pool=pool, layer_scale=0.0)
  params = begin(reducer, grid, 5) | {"offset": jnp.ones((4, 4))}
  out, _ = both(reducer, grid, 5, {"params": params})
  np.testing.assert_allclose(out.x[0, :, 0], [100, *(np.asarray(seeds) + 1)], rtol=1e-6)
  assert out.owner[0, :5].tolist() == [0, 1, 1, 2, 2] and out.owner[0, -1] == 4
  np.testing.assert_allclose(out.size[0], [1, 4, 4, 4, 4], rtol=1e-6)


@pytest.mark.parametrize("step, offset", [("refine1", 0.0), ("refine2", 3.0)])
def test_stvit_refines_by_attention(grid, step, offset):
  """Queries of zero attend evenly to the seeds and the image: the mean of LN over both, through identities.

  The offset of the second step is in what the queries add to, and not among the keys.
  """
  reducer = stvit.STViT(pool="avg", layer_scale=0.0)
  params = begin(reducer, grid, 5)
  attend = jax.tree.map(jnp.zeros_like, params[step]["attn"])
  attend["value"]["kernel"], attend["out"]["kernel"] = jnp.eye(4)[:, None], jnp.eye(4)[None]
  offsets = jnp.arange(16.0).reshape(4, 4) * offset
  params = params | {"offset": offsets, step: params[step] | {"attn": attend, "layer_scale1": jnp.ones(4)}}
  out, _ = both(reducer, grid, 5, {"params": params})
  image = np.asarray(grid.x[0, 1:])
  seeds = image.reshape(2, 2, 2, 2, 4).mean((1, 3)).reshape(4, 4)
  every = np.concatenate([seeds, image])
  norm = (every - every.mean(1, keepdims=True)) / np.sqrt(every.var(1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(out.x[0, 1:], seeds + offsets + norm.mean(0), atol=1e-5)


def test_stvit_follows_positions(grid):
  """Tokens that have moved are pooled where they came from."""
  reducer = stvit.STViT()
  variables = {"params": begin(reducer, grid, 5)}
  order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(16)])
  moved = grid.replace(x=grid.x[:, order], position=grid.position[:, order])
  straight, turned = (run(reducer, tokens, 5, variables=variables)[0] for tokens in (grid, moved))
  np.testing.assert_allclose(turned.x, straight.x, atol=1e-6)


@pytest.mark.parametrize("pool", stvit.POOLS)
def test_stvit_of_dead_tokens(grid, pool):
  """What the dead hold changes nothing, a cell without a living token has a finite value, and so have gradients."""
  reducer = stvit.STViT(pool=pool)
  variables = {"params": begin(reducer, grid, 5)}
  alive = np.arange(17) < 9  # the upper half of the grid
  spoilt = [grid.replace(mask=jnp.tile(alive, (2, 1)), x=jnp.where(alive[:, None], grid.x, v)) for v in (0, jnp.nan)]

  def total(variables, tokens, x):
    out, _ = reducer.apply(variables, tokens.replace(x=x), 5, train=False, mode="mask")
    return jnp.square(out.x).sum(), out

  program = jax.jit(jax.value_and_grad(total, (0, 2), has_aux=True), compiler_options=quick())
  ((_, clean), _), ((_, out), slopes) = (program(variables, tokens, tokens.x) for tokens in spoilt)
  np.testing.assert_array_equal(out.x, clean.x)
  np.testing.assert_array_equal(out.owner[0], [0, 1, 1, 2, 2, 1, 1, 2, 2, *[-1] * 8])
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((out.x, out.size, slopes)))


def test_stvit_errors(grid):
  init = functools.partial(stvit.STViT().init, jax.random.key(0), train=False, mode="gather")
  with pytest.raises(
    ValueError, match=r"keep=7 must be a square and the prefix tokens: 17 tokens .* 4 x 4 and 1 other"
  ):
    init(grid, 7)
  with pytest.raises(ValueError, match="must be a Python int"):
    init(grid, jnp.int32(5))
  with pytest.raises(ValueError, match=r"sites.s.pool='mean' is not a pooling"):
    model("public_vit", dict(s=dict(reducer="stvit", layers=(1,), keep=17, pool="mean")))


def test_stvit_and_the_grid_that_comes_back():
  sites = dict(semantic=dict(reducer="stvit", layers=(2,), keep=17), back=dict(reducer="recover", place="output"))
  module = model("public_vit", sites)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 3)), jnp.float32)
  params = drawn(lambda key: module.init(key, images, mode="mask"), jax.random.key(0))
  outs = {}
  for mode in MODES:
    out = jax.jit(functools.partial(module.apply, mode=mode), compiler_options=quick())(params, images)
    outs[mode] = out.tokens
    assert out.tokens.x.shape == (2, 65, 96) and out.tokens.alive.all()
  np.testing.assert_allclose(outs["mask"].x, outs["gather"].x, atol=1e-4)


def test_stvit_in_a_model():
  """A quarter of 64 patches is 4 x 4; of 0.3, 19, the next square below is 16 too."""
  for keep in (0.25, 0.3, 17):
    module = model("public_vit", dict(semantic=dict(reducer="stvit", layers=(2,), keep=keep)))
    assert module.sites.counts() == (65, 65, 17, 17, 17, 17)
  init = functools.partial(module.init_with_output, jax.random.key(0), mode="mask")
  out, _ = jax.eval_shape(init, jnp.zeros((2, 64, 64, 3)))
  assert out.tokens.x.shape == (2, 65, 96)


def test_stvit_recover_reads_the_semantic_tokens():
  """Queries of zero attend evenly to the semantic tokens alone, not to CLS: through identities the mean of their LN.

  LN(3, 1) = (1, -1) and LN(1, 5) = (-1, 1), whose mean is 0; with the second dead it is (1, -1).  CLS stays.
  """
  tokens = make([[[7.0, 9.0], [3.0, 1.0], [1.0, 5.0]]], prefix=1)
  tokens = tokens.replace(
    owner=jnp.asarray([[0, 1, 1, 2]], jnp.int32), feats={"outer": jnp.arange(8.0).reshape(1, 4, 2)}
  )
  reducer = stvit.STViTRecover(layer_scale=0.0)
  params = begin(reducer, tokens, 3)["refine"]
  attend = jax.tree.map(jnp.zeros_like, params["attn"])
  attend["value"]["kernel"], attend["out"]["kernel"] = jnp.eye(2)[:, None], jnp.eye(2)[None]
  variables = {"params": {"refine": params | {"attn": attend, "layer_scale1": jnp.ones(2)}}}
  for alive, adds in ([[True, True, True]], [0.0, 0.0]), ([[True, True, False]], [1.0, -1.0]):
    out, _ = run(reducer, tokens.replace(mask=jnp.asarray(alive)), 3, "mask", variables)
    want = np.arange(8.0).reshape(4, 2) + adds
    np.testing.assert_allclose(out.x[0], [[7.0, 9.0], *want[1:]], atol=1e-5)
    assert out.owner.tolist() == [[0, 1, 2, 3]] and out.protected.tolist() == [[True, False, False, False]]


SCOPE = dict(reducer="stvit", layers=(2,), place="around", until=4, keep=17)


@pytest.mark.parametrize("cut", [None, dict(reducer="topk", layers=(0,), keep=0.6, score="token_norm")])
def test_stvit_around_blocks(cut):
  """Blocks 2 to 4 see 17 tokens, the last all that arrived; without LayerScale patches are what they were before."""
  sites = dict(semantic=SCOPE, back=dict(reducer="stvit_recover", layers=(4,), layer_scale=0.0))
  module = model("public_vit", sites | (dict(cut=cut) if cut else {}))
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 3)), jnp.float32)
  params = drawn(lambda key: module.init(key, images), jax.random.key(0))
  outs = [
    jax.jit(functools.partial(module.apply, mode=mode), compiler_options=quick())(params, images) for mode in MODES
  ]
  n = min(out.tokens.x.shape[1] for out in outs)
  np.testing.assert_allclose(outs[0].tokens.x[:, :n], outs[1].tokens.x[:, :n], atol=1e-4)
  for out in outs:
    before, behind = (out.aux[f"tokens/{layer}"][:, :n] for layer in (1, 4))
    np.testing.assert_allclose(behind[:, 1:], before[:, 1:], atol=1e-5)
    assert jnp.abs(behind[:, 0] - before[:, 0]).max() > 0.1  # CLS went through


def test_stvit_recover_learns():
  """What comes back teaches the semantic tokens and what came before them, also where a gate has switched them off."""
  pick = dict(reducer="gumbel", layers=(1,), place="before", keep=0.7)
  sites = dict(pick=pick, semantic=SCOPE, back=dict(reducer="stvit_recover", layers=(4,), layer_scale=0.5))
  module = model("public_vit", sites)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 3)), jnp.float32)
  rngs = {"params": jax.random.key(0), "reduce": jax.random.key(1)}
  params = drawn(lambda rngs: module.init(rngs, images, mode="mask", train=True), rngs)

  def loss(params):
    out = module.apply(params, images, mode="mask", train=True, rngs=rngs)
    return (out.tokens.x * jnp.cos(jnp.arange(96.0))).sum()

  grads = jax.jit(jax.grad(loss), compiler_options=quick())(params)["params"]
  for block, site in (("block_1", "pick"), ("block_2", "semantic"), ("block_4", "back")):
    leaves = jax.tree.leaves(grads[block]["reduce"][site])
    assert all(np.isfinite(leaf).all() for leaf in leaves) and any((leaf != 0).any() for leaf in leaves), site


def test_stvit_recover_costs_what_it_does():
  """One block's worth for 65 tokens: queries, output and MLP 10 S D^2, keys and values of 17, 2 n D^2, and 2 S n D."""
  back = dict(back=dict(reducer="stvit_recover", layers=(4,)))
  with_it, without = (cost.of(model("public_vit", dict(semantic=SCOPE) | more)) for more in (back, {}))
  assert with_it - without == (650 + 34) * 96**2 + 2 * 65 * 17 * 96


@pytest.mark.parametrize("pool, cells", [("max", 1), ("avg", 2)])
def test_stvit_costs_what_it_does(pool, cells):
  """Of 65 tokens 16 cells, by 1 or 2 products of 16 x 65 x D; then twice, for 16 queries that look at 16 + 65:
  queries, output and MLP 10 K D^2, keys and values 2 (K + n) D^2, and maps 2 K (K + n) D."""
  site = dict(reducer="stvit", layers=(2,), keep=17, pool=pool)
  extra = model("public_vit", dict(semantic=site)).sites.profile(96, 3).extra_macs
  assert extra == cells * 16 * 65 * 96 + 2 * (160 * 96**2 + 2 * 81 * 96**2 + 2 * 16 * 81 * 96)


def test_its_scales_do_not_decay():
  """LayerScales are named as those of blocks: weight decay would draw 1e-5 towards nothing."""
  module = model("public_vit", dict(semantic=SCOPE, back=dict(reducer="stvit_recover", layers=(4,))))
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))["params"]
  names = {path_name(path): leaf.ndim for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
  scales = [name for name, rank in names.items() if "refine" in name and rank == 1 and not name.endswith("bias")]
  assert len(scales) == 3 * 4  # two LayerScales and two norms
  assert all(any(re.fullmatch(regex, name) for regex in default().optim.no_decay) for name in scales)


@pytest.mark.parametrize(
  "layers, scope", [((3,), SCOPE), ((4,), dict(SCOPE, place="before", until=None)), ((5,), SCOPE)]
)
def test_stvit_recover_ends_a_scope(layers, scope):
  scope = {name: value for name, value in scope.items() if value is not None}
  with pytest.raises(ValueError, match=r"sites\.back\.layers has \d, but 'stvit_recover' brings back what went round"):
    model("public_vit", dict(semantic=scope, back=dict(reducer="stvit_recover", layers=layers)))
