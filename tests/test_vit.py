"""The ViT's variants and options; the real sizes by shape only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred import scores
from tokred import tokens as tk
from tokred.config import complete
from tokred.nn import block, rope, vit

QUICK = {"xla_backend_optimization_level": 0}  # these programs run once: their time is that of the compiler


def make(sites=None, **fields):
  fields = dict(variant="mu/4", width=16, mlp_dim=32, depth=2, image_size=(16, 16), num_classes=5) | fields
  return vit.make(complete({"model": fields}).model, sites or {})


def images(module, batch=2):
  height, width = (side * module.shape.patch for side in module.shape.grid)
  return jnp.asarray(np.random.default_rng(0).normal(size=(batch, height, width, 3)), jnp.float32)


def params(module, seed=0):
  """Random everywhere, also where the initial value is zero."""
  rng, shapes = np.random.default_rng(seed), shapes_of(module)
  scale = lambda s: 1 / np.sqrt(max(s.shape[0], 4))
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * scale(s), s.dtype), shapes)


def shapes_of(module, **kwargs):
  return jax.eval_shape(functools.partial(module.init, mode="mask", **kwargs), jax.random.key(0), images(module, 1))


def apply(module, variables, x, **kwargs):
  return jax.jit(lambda v, x: module.apply(v, x, **kwargs), compiler_options=QUICK)(variables, x)


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  "variant, size, tokens, millions",
  [
    ("Ti/16", 224, 197, 5.717),  # timm's counts for 1000 classes
    ("S/16", 224, 197, 22.05),
    ("B/16", 224, 197, 86.57),
    ("B/32", 224, 50, 88.22),
    ("L/14", 336, 577, 304.7),
    ("So400m/14", 384, None, None),
    ("H/14", 224, 257, 632.0),
    ("g/14", 224, 257, 1012.6),
  ],
)
def test_real_sizes_by_shape(variant, size, tokens, millions):
  if tokens is None:  # 384 is no multiple of 14: SigLIP's own preprocessing crops to 378
    with pytest.raises(ValueError, match="multiples of patch 14"):
      vit.make(complete({"model": dict(variant=variant, image_size=(size, size))}).model, {})
    size, tokens, millions = 378, 729, None
  pool = "map" if variant.startswith("So") else "cls"
  config = complete({"model": dict(variant=variant, image_size=(size, size), pool=pool)}).model
  module = vit.make(config, {"s": dict(reducer="tome", layers=(0, 5, 10), r=8)} if variant in ("L/14", "Ti/16") else {})
  x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
  assert module.shape.num_tokens == tokens
  assert out.logits.shape == (2, 1000) and out.tokens.x.shape[1] == module.sites.counts()[-1]
  if millions:
    assert count(variables) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize(
  "fields, tokens, extra",
  [
    (dict(), 17, {"cls_token", "pos_embed"}),
    (dict(num_registers=3), 20, {"cls_token", "pos_embed", "registers"}),
    (dict(distilled=True), 18, {"cls_token", "dist_token", "pos_embed", "head_dist"}),
    (dict(pool="avg"), 16, {"pos_embed"}),
    (dict(pool="map", position="sincos2d"), 16, {"pool"}),
    (dict(image_size=(8, 24), num_registers=1), 14, {"cls_token", "pos_embed", "registers"}),
    (
      dict(pool="avg", class_token=True, final_norm="pooled", pre_norm=True, activation="relu", norm_eps=1e-3),
      17,
      {"cls_token", "pos_embed", "pre_norm", "fc_norm"},
    ),
  ],
  ids=["cls", "registers", "distilled", "avg", "map", "wide", "pooled"],
)
def test_options(fields, tokens, extra):
  module = make({"s": dict(reducer="tome", layers=(0,), r=3)}, **fields)
  variables = params(module)
  common = {"patch_embed", "block_0", "block_1", "head"} | (set() if "fc_norm" in extra else {"norm"})
  assert set(variables["params"]) == common | extra
  masked, gathered = (apply(module, variables, images(module), mode=mode) for mode in ("mask", "gather"))
  assert masked.tokens.x.shape == (2, tokens, 16) and gathered.counts == (tokens - 3,) * 2
  np.testing.assert_allclose(masked.logits, gathered.logits, rtol=1e-4, atol=1e-4)
  prefix = module.shape.num_prefix_tokens
  np.testing.assert_array_equal(gathered.tokens.protected.sum(1), [prefix] * 2)
  assert masked.logits.dtype == jnp.float32 and np.isfinite(masked.logits).all()


def test_distilled_logits_are_the_mean_of_both_heads():
  module = make(distilled=True, depth=1)
  variables = params(module)
  out = apply(module, variables, images(module))
  p, x = variables["params"], np.asarray(out.tokens.x)
  first, second = (x[:, i] @ p[h]["kernel"] + p[h]["bias"] for i, h in enumerate(("head", "head_dist")))
  np.testing.assert_allclose(out.logits, (first + second) / 2, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(out.aux["logits_dist"], second, rtol=1e-4, atol=1e-4)


def test_average_pool_reads_the_living_patches():
  module = make({"s": dict(reducer="topk", score="key_norm", layers=(1,), keep=6)}, pool="avg", num_registers=2)
  out = apply(module, params(module), images(module), mode="mask")
  alive = np.asarray(out.tokens.alive & ~out.tokens.protected)
  assert alive.sum(1).tolist() == [4, 4]
  want = np.stack([np.asarray(out.tokens.x)[b][alive[b]].mean(0) for b in range(2)])
  np.testing.assert_allclose(out.features, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["gather", "mask"])
def test_a_mean_counts_each_token_as_often_as_it_stands_for_patches(mode):
  """Of 16 patches that lose 6 to their likes it is sum(size x) / 16, which nobody's merging into another changes."""
  module = make({"s": dict(reducer="tome", layers=(1,), r=6)}, pool="avg", num_registers=2)
  out = apply(module, params(module), images(module), mode=mode)
  tokens = jax.tree.map(np.asarray, out.tokens)
  patches = tokens.alive & ~tokens.protected
  assert (patches.sum(1) == 10).all() and tokens.size[patches].max() > 1
  want = np.einsum("bn,bnd->bd", tokens.size * patches, np.where(patches[..., None], tokens.x, 0)) / 16
  np.testing.assert_allclose(out.features, want, atol=1e-6)


def test_gates_learn_how_they_move_a_mean():
  """mean = sum(g x) / sum(g), so d mean / d g_i = (x_i - mean) / sum(g): with x = (1, 5, 9), g = (1, 1, 0) it is
  (1 - 3) / 2, (5 - 3) / 2, (9 - 3) / 2, and 0 for CLS."""
  module = make({"s": dict(reducer="topk", score="key_norm", layers=(1,), keep=6)}, pool="avg", class_token=True)
  tokens = tk.start(jnp.asarray([7.0, 1.0, 5.0, 9.0])[None, :, None], num_prefix_tokens=1)
  pooled = lambda gate: module._pool(tokens.replace(mask=gate), jnp.float32)[0, 0]
  gate = jnp.asarray([[1.0, 1.0, 1.0, 0.0]])
  assert pooled(gate) == 3.0
  np.testing.assert_allclose(jax.grad(pooled)(gate)[0], [0.0, -1.0, 1.0, 3.0])


def test_gates_learn_where_no_patch_is_left():
  """sum(g x) / 1 then: a finite slope, x."""
  module = make({"s": dict(reducer="topk", score="key_norm", layers=(1,), keep=6)}, pool="avg", class_token=True)
  tokens = tk.start(jnp.asarray([7.0, 1.0, 5.0])[None, :, None], num_prefix_tokens=1)
  pooled = lambda gate: module._pool(tokens.replace(mask=gate), jnp.float32)[0, 0]
  value, slope = jax.value_and_grad(pooled)(jnp.asarray([[1.0, 0.0, 0.0]]))
  assert value == 0.0
  np.testing.assert_allclose(slope[0], [0.0, 1.0, 5.0])


def test_a_query_attends_to_nothing_where_no_patch_is_left():
  """A threshold that none passes: both modes say the same of a register alone, whatever the dead hold."""
  site = dict(reducer="topk", score="key_norm", layers=(1,), rate="threshold", threshold=1e6, keep=9)
  module = make({"s": site}, pool="map", num_registers=1)
  variables, x = params(module), images(module)
  short, full = (apply(module, variables, x, mode=mode) for mode in ("gather", "mask"))
  assert full.tokens.alive.sum() == 2
  np.testing.assert_allclose(short.logits, full.logits, atol=1e-5)
  np.testing.assert_allclose(full.logits[0], full.logits[1], atol=1e-5)


@pytest.mark.parametrize("place", ["attn", "before"])
def test_the_last_token_is_the_last_that_lives(place):
  sites = dict(reducer="topk", score="last_attention", layers=(1, 2), place=place, keep=(12, 7))
  module = make({"s": sites}, depth=3)
  variables, x = params(module), images(module)
  short, full = (apply(module, variables, x, mode=mode) for mode in ("gather", "mask"))
  np.testing.assert_array_equal(short.tokens.owner, full.tokens.owner)
  np.testing.assert_allclose(short.logits, full.logits, atol=1e-5)


def test_sincos2d_by_hand():
  # width 8: frequencies 1 and 1e-4; columns [sin x, cos x, sin y, cos y], rows row-major over (y, x)
  table = vit.sincos2d((2, 3), 8)[0]
  y, x = 1, 2
  want = [np.sin(x), np.sin(x * 1e-4), np.cos(x), np.cos(x * 1e-4), np.sin(y), np.sin(y * 1e-4), np.cos(y)]
  np.testing.assert_allclose(table[5], [*want, np.cos(y * 1e-4)], rtol=1e-6)
  assert table.shape == (6, 8) and table.dtype == np.float32


def test_rope2d_by_hand():
  # Grid 1 x 2, heads of 8: frequencies 1 and 100^(-1/2) = 1/10; centres (0, -1/2) and (0, 1/2) in units of 2 pi.
  table = rope.rope2d((1, 2), 1, 8, 100.0)
  quarter = np.array([0, 0, np.pi, np.pi / 10])
  np.testing.assert_allclose(table, [np.zeros(8), -np.tile(quarter, 2), np.tile(quarter, 2)], atol=1e-6)
  # By a quarter turn, channel i goes to i + 4 and that to -i; a token that moved is turned as at its old place.
  x = jnp.arange(8.0).reshape(1, 1, 1, 8)
  angles = jnp.stack([jnp.zeros(8), jnp.full(8, np.pi / 2)])
  np.testing.assert_allclose(rope.turn(x, angles, jnp.array([[1]]))[0, 0, 0], [-4, -5, -6, -7, 0, 1, 2, 3], atol=1e-6)
  np.testing.assert_array_equal(rope.turn(x, angles, jnp.array([[0]])), x)


def test_rope2d_tells_only_how_far_apart_patches_are():
  angles = jnp.asarray(rope.rope2d((3, 4), 0, 8, 100.0))
  q, k = (jnp.asarray(np.random.default_rng(i).normal(size=(1, 1, 1, 8)), jnp.float32) for i in (0, 1))
  dot = lambda i, j: (rope.turn(q, angles, jnp.array([[i]])) * rope.turn(k, angles, jnp.array([[j]]))).sum()
  np.testing.assert_allclose(dot(0, 5), dot(6, 11), rtol=1e-4)  # one down, one to the right
  assert abs(dot(0, 5) - dot(0, 6)) > 1e-2


@pytest.mark.parametrize("name", ["gelu_tanh", "quick_gelu", "silu", "relu"])
def test_activations_by_hand(name):
  x = np.array([-1.5, 0.0, 0.5, 2.0])
  sigmoid = lambda a: 1 / (1 + np.exp(-a))
  wanted = {
    "gelu_tanh": 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": x * sigmoid(1.702 * x),
    "silu": x * sigmoid(x),
    "relu": np.maximum(x, 0),
  }
  np.testing.assert_allclose(block.ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), wanted[name], atol=1e-6)


def test_gated_mlp_by_hand():
  x = jnp.array([[[1.0, 2.0]]])
  p = {name: {"kernel": jnp.full((2, 2), scale), "bias": jnp.zeros(2)} for name, scale in (("gate", 1.0), ("fc1", 0.5))}
  p["fc2"] = {"kernel": jnp.eye(2), "bias": jnp.array([0.0, 1.0])}
  # gate 3, value 1.5: relu(3) * 1.5 = 4.5
  out = block.Mlp(2, activation="relu", gated=True).apply({"params": p}, x)
  np.testing.assert_allclose(out, [[[4.5, 5.5]]])


def test_without_a_head_the_logits_are_the_features():
  module = make(pool="cls_avg", num_classes=0, depth=1, position="rope2d", patch_bias=False)
  variables = params(module)
  assert "head" not in variables["params"] and "pos_embed" not in variables["params"]
  assert set(variables["params"]["patch_embed"]) == {"kernel"}
  out = apply(module, variables, images(module))
  np.testing.assert_array_equal(out.logits, out.features)
  both = [out.tokens.x[:, 0], out.tokens.x[:, 1:].mean(1)]
  np.testing.assert_allclose(out.logits, np.concatenate(both, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(activation="gelus"), r"config.model.activation='gelus' is unknown; did you mean 'gelu'"),
    (dict(mlp="swiglu"), r"config.model.mlp='swiglu' is unknown"),
    (dict(final_norm="token"), r"config.model.final_norm='token' is unknown; did you mean 'tokens'"),
    (dict(num_classes=-1), r"config.model.num_classes=-1 must be 1 or more, or 0 for no head"),
    (dict(norm_eps=0.0), r"config.model.norm_eps=0.0 must be positive"),
    (dict(distilled=True, num_classes=0), r"distilled=True needs classes and final_norm='tokens' or 'none'"),
    (dict(position="rope2d", num_heads=8), r"config.model.num_heads=8: heads of width=16 must be multiples of 4"),
  ],
)
def test_errors_of_what_checkpoints_bring(fields, message):
  with pytest.raises(ValueError, match=message):
    make(**fields)


def test_registers_have_no_position_and_stand_behind_cls():
  module = make(num_registers=2, depth=1)
  variables = params(module)
  assert variables["params"]["pos_embed"].shape == (1, 17, 16) and variables["params"]["registers"].shape == (1, 2, 16)
  here = lambda _, method: method == "_embed"
  run = lambda v, x: module.apply(v, x, capture_intermediates=here)[1]["intermediates"]["_embed"][0]
  p = variables["params"]
  p["patch_embed"] = jax.tree.map(jnp.zeros_like, p["patch_embed"])
  x = jax.jit(run)(variables, images(module))
  np.testing.assert_allclose(x[0, 1:3], p["registers"][0], rtol=1e-6)
  np.testing.assert_allclose(x[0, 0], p["cls_token"][0, 0] + p["pos_embed"][0, 0], rtol=1e-6)
  np.testing.assert_allclose(x[0, 3], p["pos_embed"][0, 1], rtol=1e-6)


def test_layer_scale_and_qk_norm_have_their_parameters():
  variables = shapes_of(make(layer_scale=1e-4, qk_norm=True, qkv_bias=False))["params"]["block_0"]
  assert variables["layer_scale1"].shape == variables["layer_scale2"].shape == (16,)
  assert variables["attn"]["q_norm"]["scale"].shape == (8,) and "bias" not in variables["attn"]["qkv"]
  module = make(layer_scale=1e-3)
  initial = jax.jit(module.init, compiler_options=QUICK)(jax.random.key(0), images(module))
  np.testing.assert_allclose(initial["params"]["block_1"]["layer_scale2"], 1e-3)


@pytest.mark.parametrize("score", ["repr_shift", "transition"])
def test_an_update_is_what_the_attention_branch_adds(score):
  """With an MLP that adds nothing, block 1 moves a token by its LayerScaled update; stochastic depth is left out."""
  module = make({"s": dict(reducer="topk", score=score, layers=(1,), keep=17)}, layer_scale=0.1, drop_path=0.9)
  variables, x = params(module), images(module)
  variables["params"]["block_1"]["layer_scale2"] = jnp.zeros(16)
  out = apply(module, variables, x, mode="mask")
  before, after = (np.asarray(out.aux[f"tokens/{layer}"]) for layer in (0, 1))
  if score == "repr_shift":
    want = np.linalg.norm(after - before, axis=-1)
  else:  # || after || / || before || softmax(1 - cos(before, after))
    long = np.linalg.norm(before, axis=-1), np.linalg.norm(after, axis=-1)
    away = np.exp(1 - (before * after).sum(-1) / long[0] / long[1])
    want = long[1] / long[0] * away / away.sum(1, keepdims=True)
  np.testing.assert_allclose(out.aux["reduce/s/score"][0], want, rtol=1e-4)
  if score == "repr_shift":  # block 0 is never left out: block 1 meets the same tokens
    trained = apply(module, variables, x, mode="mask", train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(trained.aux["reduce/s/score"][0], want, rtol=1e-4)


@pytest.mark.parametrize("score", ["repr_shift_mlp", "transition_mlp"])
@pytest.mark.parametrize("place", ["after", "output"])
def test_an_update_is_what_the_mlp_branch_adds(score, place):
  """With attention that adds nothing, block 1 moves a token by what its MLP adds; stochastic depth is left out."""
  where = dict(place=place) if place == "output" else dict(place=place, layers=(1,))
  module = make({"s": dict(reducer="topk", score=score, keep=17, **where)}, drop_path=0.9)
  variables, x = params(module), images(module)
  variables["params"]["block_1"]["attn"]["proj"] = jax.tree.map(
    jnp.zeros_like, variables["params"]["block_1"]["attn"]["proj"]
  )
  out = apply(module, variables, x, mode="mask")
  before, after = (np.asarray(out.aux[f"tokens/{layer}"]) for layer in (0, 1))
  want = np.linalg.norm(after - before, axis=-1) if score == "repr_shift_mlp" else scores.turn(before, after)
  np.testing.assert_allclose(out.aux["reduce/s/score"][0], want, rtol=1e-4)
  if score == "repr_shift_mlp":
    trained = apply(module, variables, x, mode="mask", train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(trained.aux["reduce/s/score"][0], want, rtol=1e-4)


def test_an_update_of_those_that_go_round_the_mlp():
  """The adapter's is theirs too, and the gate is part of it."""
  sites = {"round": dict(reducer="dyt", layers=(1,), keep=9)}
  sites["s"] = dict(reducer="topk", score="repr_shift_mlp", layers=(1,), place="after", keep=5)
  module = make(sites)
  variables, x = params(module), images(module)
  variables["params"]["block_1"]["attn"]["proj"] = jax.tree.map(
    jnp.zeros_like, variables["params"]["block_1"]["attn"]["proj"]
  )
  masked, gathered = (apply(module, variables, x, mode=mode) for mode in ("mask", "gather"))
  score = np.asarray(gathered.aux["reduce/s/score"][0])
  np.testing.assert_allclose(masked.aux["reduce/s/score"][0], score, rtol=1e-4)
  where = np.asarray(gathered.aux["owner/1"])  # of those that are left, the step that they have made
  before, after = np.asarray(gathered.aux["tokens/0"]), np.asarray(gathered.aux["tokens/1"])
  for row in range(2):
    for source in np.flatnonzero(where[row] >= 0):
      step = after[row, where[row, source]] - before[row, source]
      np.testing.assert_allclose(score[row, source], np.linalg.norm(step), rtol=1e-3)


def test_an_update_that_is_not_there_yet():
  with pytest.raises(ValueError, match=r"'repr_shift_mlp' and 'transition_mlp' read what the MLP adds.*place='after'"):
    shapes_of(make({"s": dict(reducer="topk", score="repr_shift_mlp", layers=(1,), keep=5)}))


def test_owners_inside_a_scope_count_the_sources_of_the_input():
  """8 of 17 tokens go, 9 arrive at block 1, and 5 of these go through blocks 1 and 2.

  Block 2 adds nothing: what it leaves is what those inside had behind block 1, and who went round has what it had.
  """
  sites = {"cut": dict(reducer="topk", layers=(0,), keep=9)}
  sites["round"] = dict(reducer="topk", place="around", layers=(1,), until=2, keep=5, score="token_norm")
  module = make(sites, depth=3)
  variables, x = params(module), images(module)
  last = variables["params"]["block_2"]
  last["attn"]["proj"], last["mlp"]["fc2"] = jax.tree.map(jnp.zeros_like, (last["attn"]["proj"], last["mlp"]["fc2"]))
  found = {}
  for mode in ("mask", "gather"):
    aux = apply(module, variables, x, mode=mode).aux
    owners = [np.asarray(aux[f"owner/{layer}"]) for layer in range(3)]
    assert [owner.shape for owner in owners] == [(2, 17)] * 3
    assert [(owner >= 0).sum(1).tolist() for owner in owners] == [[9, 9], [5, 5], [9, 9]]
    values = [np.asarray(tk.restore(aux[f"tokens/{layer}"], owners[layer])) for layer in range(3)]
    inside = (owners[1] >= 0)[..., None]
    np.testing.assert_allclose(values[2], np.where(inside, values[1], values[0]), atol=1e-5)
    found[mode] = owners
  np.testing.assert_array_equal(found["mask"], found["gather"])


def test_an_update_behind_attention_of_merged_tokens():
  """It is that of the tokens that MCTF has merged, and twice as long where LayerScale is."""
  sites = {"m": dict(reducer="mctf", layers=(1,), keep=12)}
  sites["s"] = dict(reducer="topk", score="repr_shift", layers=(1,), keep=10)
  module = make(sites, layer_scale=0.1)
  variables, x = params(module), images(module)
  found = []
  for _ in range(2):
    masked, gathered = (apply(module, variables, x, mode=mode) for mode in ("mask", "gather"))
    score = np.asarray(gathered.aux["reduce/s/score"][0])
    np.testing.assert_allclose(masked.aux["reduce/s/score"][0][:, :12], score, rtol=1e-4)
    found.append(score)
    variables["params"]["block_1"]["layer_scale1"] *= 2
  assert found[0].shape == (2, 12) and found[0].min() > 0
  np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-4)


def test_qk_norm_makes_logits_blind_to_the_scale_of_q_and_k():
  module = make(qk_norm=True, depth=1)
  variables = params(module)
  scaled = jax.tree.map(lambda leaf: leaf, variables)
  qkv = scaled["params"]["block_0"]["attn"]["qkv"]
  scaled["params"]["block_0"]["attn"]["qkv"] = jax.tree.map(lambda a: a.at[..., :2, :, :].multiply(5.0), qkv)
  a, b = (apply(module, v, images(module)).logits for v in (variables, scaled))
  np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_drop_path_grows_with_depth_and_keeps_the_mean():
  module = make(drop_path=0.5, depth=2)
  variables, x = params(module), images(module, 1)
  run = jax.jit(
    jax.vmap(lambda key: module.apply(variables, x, train=True, rngs={"dropout": key}).features[0]),
    compiler_options=QUICK,
  )
  outs = np.asarray(run(jax.random.split(jax.random.key(0), 64)))
  # block 0 has rate 0, block 1 rate 0.5 on each of two branches: four outcomes
  assert len(np.unique(outs.round(4), axis=0)) == 4
  evaluated = apply(module, variables, x).features
  assert np.abs(evaluated - apply(make(depth=2), variables, x).features).max() == 0


def test_remat_equals_no_remat():
  sites = {"s": dict(reducer="gumbel", layers=(1,), keep=0.5)}
  plain, remat = make(sites), make(sites, remat=True)
  variables, x = params(plain), images(plain)
  assert jax.tree.structure(shapes_of(remat)) == jax.tree.structure(variables)

  def loss(v, module):
    return module.apply(v, x, mode="mask", train=True, rngs={"reduce": jax.random.key(1)}).logits.sum()

  a, b = (
    jax.jit(jax.value_and_grad(functools.partial(loss, module=m)), compiler_options=QUICK)(variables)
    for m in (plain, remat)
  )
  jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-4), a, b)


@pytest.mark.parametrize("mode", ["mask", "gather"])
def test_bfloat16_follows_float32(mode):
  sites = {"s": dict(reducer="topk", layers=(0,), keep=9)}
  low, high = make(sites, dtype="bfloat16"), make(sites)
  variables = params(low)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  a, b = (apply(m, variables, images(m), mode=mode) for m in (low, high))
  assert a.tokens.x.dtype == jnp.bfloat16 and a.logits.dtype == jnp.float32 and a.tokens.size.dtype == jnp.float32
  np.testing.assert_allclose(a.logits, b.logits, atol=0.1 * np.abs(b.logits).max())


def test_one_compilation_for_all_counts():
  module = make({"s": dict(reducer="topk", layers=(0, 1), keep=(15, 12))})
  variables, x, traces = params(module), images(module), []

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(keeps):
    traces.append(1)
    return module.apply(variables, x, mode="mask", keeps=keeps)

  for first, second in ((17, 17), (15, 12), (9, 3), (2, 2)):
    out = run({"s": (jnp.int32(first), jnp.int32(second))})
    assert [float(n) for n in out.counts] == [first, second]
    gathered = make({"s": dict(reducer="topk", layers=(0, 1), keep=(first, second))})
    if first == 9:
      np.testing.assert_allclose(out.logits, apply(gathered, variables, x).logits, rtol=1e-4, atol=1e-4)
  assert len(traces) == 1


def test_reports_come_by_site_and_spot():
  sites = {"a": dict(reducer="topk", layers=(0, 1), keep=(15, 9)), "b": dict(reducer="router", layers=(1,), keep=12)}
  out = jax.eval_shape(lambda v, x: make(sites).apply(v, x, mode="mask"), shapes_of(make(sites)), images(make(sites)))
  assert set(out.aux["reduce/a/score"]) == {0, 1} and set(out.aux["reduce/b/update_weight"]) == {0}
  assert out.aux["owner/1"].shape == (2, 17)
