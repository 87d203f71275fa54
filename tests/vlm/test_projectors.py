"""Projectors: the authors' numbers, arithmetic by hand, nested budgets, and every error message."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokred import sharding
from tokred import tokens as tk
from tokred.model import build
from tokred.nn import placeholders, projectors, resampling
from tokred.nn.projectors import projector

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "vlm" / "fn" / "tokenpacker.npz"
GRID = (4, 6)
W = 12


def arrive(batch=2, width=8, grid=GRID, seed=0, **feats):
  x = jax.random.normal(jax.random.key(seed), (batch, grid[0] * grid[1], width))
  return tk.start(x).replace(feats=feats)


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(modules, grid, tokens, params, key):
  """What several modules make of the same, compiled together; with a key as in training."""
  kinds = dict(train=key is not None, rngs=None if key is None else {"reduce": key})
  return [module.apply({"params": params}, tokens, grid, **kinds) for module in modules]


def parameters(module, tokens, grid=GRID):
  """Drawn without compiling anything."""
  shapes = jax.eval_shape(lambda tokens: module.init(jax.random.key(0), tokens, grid)["params"], tokens)
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * 0.3, shapes)


def run(module, tokens, grid=GRID, params=None, key=None):
  params = parameters(module, tokens, grid) if params is None else params
  return apply((module,), grid, tokens, params, key)[0], params


def moved_at(x, patch):
  x = np.array(x)
  x[0, patch] += 1
  return jnp.asarray(x)


def make(name, **fields):
  return projector(name, fields, W)


def test_windows():
  # Three of five: [0, 2), [1, 4), [3, 5): they overlap where the sides do not divide.
  np.testing.assert_array_equal(
    resampling.windows((1, 3), (1, 5)), np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 1]], bool)
  )
  two = resampling.windows((2, 2), (4, 4))
  assert np.flatnonzero(two[1]).tolist() == [2, 3, 6, 7] and two.sum() == 16
  assert resampling.shape_of(6, (4, 6)) == (2, 3)
  assert resampling.shape_of(9, (6, 6)) == (3, 3)
  assert resampling.shape_of(4, (4, 6)) == (2, 2)
  assert resampling.shape_of(3, (4, 6)) == (1, 3)
  assert resampling.shape_of(1, (4, 6), even=True) == (1, 1)


def test_mlp_by_hand():
  tokens = arrive(batch=1, width=2, grid=(1, 2))
  out, params = run(make("mlp"), tokens, (1, 2))
  hidden = tokens.x @ params["fc1"]["kernel"] + params["fc1"]["bias"]
  hidden = 0.5 * hidden * (1 + jax.scipy.special.erf(hidden / np.sqrt(2)))
  np.testing.assert_allclose(out.x, hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"], atol=1e-6)
  assert make("mlp").left(7) == 7 and make("mlp").macs(7, 2) == 7 * (2 * W + W * W)


def test_pooling_leaves_out_what_is_gone():
  # A row of four, pooled in twos: 1 and 3, 5 and 9; then the second and the third are gone.
  x = jnp.array([1.0, 3, 5, 9])[None, :, None]
  member = resampling.windows((1, 2), (1, 4))
  np.testing.assert_allclose(resampling.pool(x, jnp.ones((1, 4), bool), member)[0, :, 0], [2, 7])
  there = jnp.array([[True, False, False, True]])
  np.testing.assert_allclose(resampling.pool(x, there, member)[0, :, 0], [1, 9])
  # A merged token counts for both of its patches: (2, 2, 5, 9) in one window is 18 / 4.
  merged = tk.start(jnp.array([2.0, 5, 9])[None, :, None]).replace(owner=jnp.array([[0, 0, 1, 2]]))
  on_grid, there = resampling.on_grid(merged, merged.x, (1, 4))
  np.testing.assert_allclose(resampling.pool(on_grid, there, resampling.windows((1, 1), (1, 4)))[0, 0, 0], 4.5)


def test_tokens_of_windows():
  tokens = arrive()
  out, _ = run(make("tokenflex", num_tokens=6), tokens)
  assert out.x.shape == (2, 6, W) and out.mask.all()
  assert out.position[0].tolist() == [0, 2, 4, 12, 14, 16]  # where windows of 2 x 2 begin
  assert out.owner[0].reshape(GRID)[:, ::2].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
  gone = tokens.replace(owner=jnp.where(jnp.arange(24) < 4, -1, tokens.owner))
  assert run(make("tokenflex", num_tokens=6), gone)[0].owner[0, :6].tolist() == [-1] * 4 + [2, 2]


def test_tokenflex_by_hand():
  tokens = arrive(batch=1)
  out, params = run(make("tokenflex", num_tokens=6), tokens)
  x = np.asarray(tokens.x[0]).reshape(2, 2, 3, 2, 8).mean((1, 3)).reshape(6, 8)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  x = x * params["norm"]["scale"] + params["norm"]["bias"]
  dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
  gate, up = dense("gate", x), dense("up", x)
  np.testing.assert_allclose(out.x[0], dense("down", gate / (1 + np.exp(-gate)) * up), atol=1e-5)


def test_tokenflex_draws_a_count_in_each_step():
  tokens, module = arrive(), make("tokenflex", num_tokens=24, budgets=(1, 6, 24))
  _, params = run(module, tokens)
  seen = {}
  for seed in range(12):
    out, _ = run(module, tokens, params=params, key=jax.random.key(seed))
    seen[int(out.mask[0].sum())] = out
    assert (out.mask[0] == out.mask[1]).all() and out.owner.max() < out.mask[0].sum()
  assert set(seen) == {1, 6, 24}
  at = tuple(projectors.at_budget(module, count) for count in seen)
  for out, alone in zip(seen.values(), apply(at, GRID, tokens, params, None), strict=True):  # as in evaluation
    count = alone.x.shape[1]
    np.testing.assert_allclose(out.x[:, :count], alone.x, atol=1e-5)
    np.testing.assert_array_equal(out.position[:, :count], alone.position)


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"no golden data at {GOLDEN}")
def test_tokenpacker_as_its_authors():
  with np.load(GOLDEN) as file:
    a = dict(file)
  dense = lambda name: {
    "kernel": a[f"P_{name}.weight"].T, **({"bias": a[f"P_{name}.bias"]} if f"P_{name}.bias" in a else {})
  }  # fmt: skip
  norm = lambda name: {"scale": a[f"P_{name}.weight"], "bias": a[f"P_{name}.bias"]}
  params = {
    "query": dense("q_proj_1"), "key_1": dense("k_proj_1.0"), "key_2": dense("k_proj_1.2"),
    "value_1": dense("v_proj_1.0"), "value_2": dense("v_proj_1.2"), "norm_q": norm("ln_q_1"),
    "norm_k": norm("ln_k_1"), "norm_v": norm("ln_v_1"), "attn_out": dense("clip_attn.out_proj"),
    "mlp": {"fc1": dense("mlp.0"), "fc2": dense("mlp.2")},
  }  # fmt: skip
  thirds = zip(*(np.split(a[f"P_clip_attn.in_proj_{part}"], 3) for part in ("weight", "bias")), strict=True)
  params |= {f"attn_{name}": {"kernel": w.T, "bias": b} for name, (w, b) in zip("qkv", thirds, strict=True)}
  grid = (int(a["raw_grid"]),) * 2
  tokens = tk.start(jnp.asarray(a["x"])).replace(feats={"levels": jnp.asarray(a["x_multi"])})
  module = resampling.TokenPacker(32, 9, levels=(0, 1, 2, 3), num_heads=int(a["num_heads"]))
  out, _ = run(module, tokens, grid, jax.tree.map(jnp.asarray, params))
  np.testing.assert_allclose(out.x, a["out"], atol=2e-5)


def test_windows_are_all_that_tokenpacker_and_quecc_see():
  """A patch moves the token of its own window through its key and value; queries of TokenPacker see the same."""
  for name, count in (("tokenpacker", 6), ("quecc", 6)):
    tokens, module = arrive(batch=1), make(name, num_tokens=count)
    out, params = run(module, tokens)
    other, _ = run(module, tokens.replace(x=moved_at(tokens.x, 9)), params=params)  # row 1, column 3
    moved = np.abs(out.x - other.x)[0].max(-1) > 1e-6
    assert np.flatnonzero(moved).tolist() == [1], name


def test_quecc_listens_to_the_question():
  tokens, module = arrive(batch=1, text=jnp.ones((1, 5))), make("quecc")
  out, params = run(module, tokens)
  assert out.x.shape == (1, 1, W) and module.left(24) == 1
  question = jnp.array([[1.0, -1, 0, 2, 0]])
  assert np.abs(out.x - run(module, tokens.replace(feats={"text": question}), params=params)[0].x).max() > 1e-3
  assert "text" not in parameters(module, arrive(batch=1))


def test_sums_over_windows_are_a_depthwise_convolution_on_any_mesh():
  """flax's own, whose kernel would get twice its gradient here."""
  x, module = np.random.default_rng(0).normal(size=(8, 24, 6)).astype(np.float32), resampling.WindowSum()
  theirs = nn.Conv(6, (2, 3), (2, 3), "VALID", feature_group_count=6)
  params = jax.jit(lambda: theirs.init(jax.random.key(0), x.reshape(8, 4, 6, 6)))()
  own = jax.jit(lambda p, x: module.apply(p, x, (4, 6), (2, 3)))
  np.testing.assert_allclose(own(params, x), jax.jit(theirs.apply)(params, x.reshape(8, 4, 6, 6)), atol=1e-5)
  slope = jax.jit(jax.grad(lambda p, x: (own(p, x) ** 2).mean()))
  wanted = slope(params, x)
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  spread = jax.device_put(params, sharding.shardings(params, mesh)), jax.device_put(x, sharding.batch_sharding(mesh))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), slope(*spread), wanted)


def test_budgets_of_queries_are_nested():
  tokens = arrive()
  for anchors in (0, 4):
    module = make("queries", num_tokens=10, anchors=anchors, budgets=(4, 10))
    params = parameters(module, tokens)
    at = (module, *(projectors.at_budget(module, count) for count in (7,)))
    out, *rest = apply(at, GRID, tokens, params, None)
    assert out.x.shape == (2, 10, W) and out.mask.all()
    for count, fewer in zip((7,), rest, strict=True):
      np.testing.assert_allclose(fewer.x, out.x[:, :count], atol=1e-5)
      np.testing.assert_array_equal(fewer.position, out.position[:, :count])
    drawn = {int(run(module, tokens, params=params, key=jax.random.key(s))[0].mask[0].sum()) for s in range(9)}
    assert drawn == {4, 10}
    if anchors:  # queries are conditioned on them: one patch reaches every query, through its anchor as well
      assert out.position[0, :4].tolist() == [0, 3, 12, 15] and out.owner[0].tolist()[:6] == [0, 0, 0, 1, 1, 1]
      assert {"anchor_q", "patch_q"} <= params.keys()


def test_queries_do_not_see_what_is_gone():
  tokens, module = arrive(batch=1), make("queries", num_tokens=4)
  keep = jnp.arange(24) != 5
  gone = tokens.replace(owner=jnp.where(keep, tokens.owner, -1))
  out, params = run(module, gone)
  np.testing.assert_allclose(out.x, run(module, gone.replace(x=moved_at(gone.x, 5)), params=params)[0].x, atol=1e-6)


def test_macs():
  assert make("tokenflex", num_tokens=6).macs(24, 8) == 24 * 8 + 6 * (2 * 8 * W + W * W)
  assert make("tokenpacker", num_tokens=6).macs(24, 8) == 64 * (6 + 6 * 24 + 2 * 6) + 2 * 24 * 8 + 6 * W * (8 + W)
  four = make("tokenpacker", num_tokens=6, levels=(0, 1, 2, 3)).macs(24, 8)
  assert four == 64 * (6 + 12 * 24 + 2 * 6) + 2 * 24 * 8 + 6 * W * (8 + W)
  assert make("queries", num_tokens=6).macs(24, 8) == 64 * 2 * (6 + 24) + 2 * 6 * 24 * 8 + 6 * W * (8 + W)


BAD = {
  r"config.projector.name='mlq' does not exist; did you mean 'mlp'\? valid: mlp, quecc": dict(name="mlq"),
  r"config.projector.num_tokens=5: mlp keeps as many as arrive; valid: 0": dict(name="mlp", num_tokens=5),
  r"config.projector.num_tokens=0: tokenflex chooses the count; valid: 1 or more": dict(name="tokenflex"),
  r"config.projector.budgets=\(2,\): tokenpacker has one count": dict(name="tokenpacker", num_tokens=4, budgets=(2,)),
  r"config.projector.budgets=\(2, 9\); valid: 1 to 4": dict(name="queries", num_tokens=4, budgets=(2, 9)),
  r"config.projector.budgets=\(2,\); valid: 3 to 4": dict(name="queries", num_tokens=4, budgets=(2,), anchors=3),
  r"config.projector.anchors=2: tokenflex has none; valid: 0": dict(name="tokenflex", num_tokens=4, anchors=2),
  r"config.projector.levels=\(1,\): tokenflex reads one layer": dict(name="tokenflex", num_tokens=4, levels=(1,)),
  r"config.projector.anchors=5; valid: 0 to 4": dict(name="queries", num_tokens=4, anchors=5),
  r"config.projector.num_tokens=7: valid are rows and columns within a grid of 4 x 6": dict(
    name="tokenflex", num_tokens=7
  ),
  r"config.projector.num_tokens=5: valid are windows of one size on a grid of 4 x 6": dict(
    name="tokenpacker", num_tokens=5
  ),
  r"config.projector.num_tokens=30: 0 anchors and a bank of 30 queries on 24 patches; valid: 0 to 24": dict(
    name="queries", num_tokens=30
  ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_fields(message):
  with pytest.raises(ValueError, match=message):
    module = make(**BAD[message])
    jax.eval_shape(lambda key, tokens: module.init(key, tokens, GRID), jax.random.key(0), arrive())


def test_bad_budgets_and_grids():
  with pytest.raises(ValueError, match=r"num_tokens=3: MlpProjector has one count; valid: tokenflex, queries"):
    projectors.at_budget(make("mlp"), 3)
  with pytest.raises(ValueError, match=r"num_tokens=12; valid: 0 to 10"):
    projectors.at_budget(make("queries", num_tokens=10), 12)
  with pytest.raises(ValueError, match=r"tokens of 24 patches on a grid of 5 x 5"):
    run(make("tokenflex", num_tokens=5), arrive(), (5, 5))


IDS = np.array([[5, *[3] * 16, 6, 7, 0], [8, 9, *[3] * 16, 10, 11]], np.int32)
IN_A_MODEL = {
  "tokenpacker": (dict(num_tokens=4, levels=(0, 1)), 4),
  "tokenflex": (dict(num_tokens=4, budgets=(1, 4)), 4),
  "queries": (dict(num_tokens=6, anchors=4, budgets=(4, 6)), 6),
  "quecc": ({}, 1),
}


@pytest.mark.parametrize(
  "name", ["tokenpacker", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("tokenflex", "queries", "quecc"))]
)
def test_in_a_model(name):
  """Gathered or masked, text has the same logits, and stands behind the image tokens that are left."""
  fields, count = IN_A_MODEL[name]
  config = dict(
    model=dict(name="vlm", variant="mu/4", image_size=(16, 16), num_classes=0, depth=2),
    projector=dict(name=name) | fields, llm=dict(vocab=40, width=32, depth=1, num_heads=4, mlp_dim=48),
  )  # fmt: skip
  model = build(config)
  images, slot = (
    np.random.default_rng(0).normal(size=(2, 1, 16, 16, 3)).astype(np.float32),
    placeholders.slots(IDS, 3, 1, 16),
  )
  known = model.module.known(IDS, slot, IDS > 0)
  shapes = jax.eval_shape(lambda: model.init(0).params)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * 0.3, shapes)

  @jax.jit
  def both(params):
    inputs = dict(slot=slot, mask=IDS > 0)
    outs = (
      model.module.apply({"params": params}, IDS, images, **inputs, known=known),
      model.module.apply({"params": params}, IDS, images, **inputs, mode="mask"),
    )
    return [(tk.restore(out.logits, out.tokens.owner), out.tokens.alive.sum(1)) for out in outs]

  (gathered, alive), (masked, _) = both(params)
  text = (IDS > 0) & (IDS != 3)
  np.testing.assert_allclose(np.asarray(gathered)[text], np.asarray(masked)[text], atol=1e-4)
  assert alive.tolist() == [3 + count, 4 + count]
