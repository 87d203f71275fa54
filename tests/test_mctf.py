"""MCTF against its authors' code: matching, pooling, one-step-ahead attention, training with consistency."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import (
  MODES,
  backbone,
  check_forward,
  check_sources,
  drawn,
  forward,
  model,
  needs_golden,
  quick,
  recorded,
  value_and_grads,
)

from tokred import config as defaults
from tokred import cost, losses
from tokred import tokens as tk
from tokred.model import without_sites
from tokred.nn import vit
from tokred.reducers.mctf import MCTF
from tokred.testing import check_reducer
from tokred.train import step

POOLING = ("size", "attention", "max", "mean")  # as the authors number them


def site(settings, counts):
  """The site of a recorded run; `counts` are the tokens that leave each block."""
  layers = settings["activate_layer"]
  keep = tuple(counts[layer] for layer in layers)
  options = dict(pooling=POOLING[settings["pooling_type"]], bidirectional=bool(settings["bidirection"]))
  options |= {f"tau_{name}": float(settings[f"tau_{name}"]) for name in ("sim", "info", "size")}
  place = "ahead" if settings["one_step_ahead"] else "after"
  return dict(
    options, reducer="mctf", layers=tuple(layers), keep=keep, place=place, proportional=bool(settings["prop_attn"])
  )


@needs_golden
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mctf_eval_a", "mctf_eval_b", "mctf_eval_c", "mctf_eval_d"])
def test_inference(name, mode):
  arrays, settings = recorded(name)
  module = model("public_vit", dict(merge=site(settings, arrays["tokens_per_block"].tolist())))
  output, blocks = forward(module, backbone("public_vit"), arrays["images"], mode)
  check_forward(arrays, output, blocks)
  check_sources(arrays, blocks, order=True)


@needs_golden
@pytest.mark.parametrize("case", [0, 1, 2])
def test_matching_and_pooling(case):
  arrays, settings = recorded("fn_mctf")
  c = settings["cases"][case]
  x, attention, size = (jnp.asarray(arrays[f"c{case}_{name}"]) for name in ("x", "attn", "size"))
  tokens = tk.start(x, c["num_protected"])
  tokens = tokens.replace(size=size[..., 0], feats={"column_mean": attention.mean((1, 2))})
  module = MCTF(
    tau_sim=c["tau_sim"], tau_info=c["tau_info"], tau_size=c["tau_size"], bidirectional=bool(c["bidirection"]),
    pooling=POOLING[c["pooling_type"]],
  )  # fmt: skip
  keep = c["N"] - c["r"]
  plan, _ = jax.jit(lambda t: module.plan(t, keep, train=False), compiler_options=quick())(tokens)
  out = tk.compact(tokens, plan, keep)
  source = (np.asarray(out.owner)[:, None] == np.arange(keep)[:, None]).astype(np.uint8)
  np.testing.assert_array_equal(source, arrays[f"c{case}_source"])
  if case == 0:
    np.testing.assert_allclose(out.x, arrays["c0_out_x"], atol=1e-5)
    np.testing.assert_allclose(out.size, arrays["c0_out_size"][..., 0], atol=1e-5)
  # Columns of the map are summed over what a key stands for, its rows averaged like the tokens.
  columns = jnp.einsum("bhij,bmj->bhim", attention, jnp.asarray(source, jnp.float32))
  for head in range(c["H"]):
    rows = tk.compact(tokens.replace(x=columns[:, head]), plan, keep).x
    np.testing.assert_allclose(rows, arrays[f"c{case}_out_attn"][:, head], atol=1e-6)


@needs_golden
def test_training():
  arrays, settings = recorded("mctf_train_a")
  student = model("public_vit", dict(merge=site(settings, arrays["tokens_student"].tolist())))
  target = jax.nn.one_hot(arrays["labels"], 10)
  student_weight, teacher_weight, consistency_weight = settings["task_weight"]
  config = defaults.default().loss
  config.update(dict(cross_entropy=student_weight, full_cross_entropy=teacher_weight, consistency=consistency_weight))
  config.confidence = settings["confidence_threshold"]
  keeps = dict(merge=jnp.asarray([arrays["tokens_teacher"][layer] for layer in settings["activate_layer"]], jnp.int32))

  def terms(params):
    run = lambda **kwargs: student.apply({"params": params}, arrays["images"], **kwargs)
    output, full = run(mode="gather"), run(mode="mask", keeps=keeps)
    named = losses.terms(config, student, output, target, None, full)
    values = [*(named[name] for name in ("cross_entropy", "full_cross_entropy", "consistency"))]
    return jnp.stack([*values, losses.total(config, named)]), (output.logits, full.logits)

  values, grads, (logits, full) = value_and_grads(terms, backbone("public_vit"))
  np.testing.assert_allclose(logits, arrays["logits_student"], atol=2e-5)
  np.testing.assert_allclose(full, arrays["logits_teacher"], atol=2e-5)
  wanted = [arrays[f"loss_{name}"] for name in ("student", "teacher", "consistency", "total")]
  np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-7)
  total = grads[-1]
  qkv = total["block_1/attn/qkv/kernel"].reshape(96, -1).T[:8]
  ours = dict(
    head=total["head/kernel"].T, cls_token=total["cls_token"], qkv1_rows0to8=qkv, pos_embed=total["pos_embed"]
  )
  for name, grad in ours.items():
    theirs = arrays[f"grad_{name}"]
    np.testing.assert_allclose(grad, theirs, atol=2e-5 * np.abs(theirs).max() + 1e-7, err_msg=name)


def test_what_merges_by_hand():
  # Four tokens behind CLS, places 1 to 4: a = {0, 2, 4}, b = {1, 3}.  x_1 = x_2, and x_3 is near x_4, so with r = 2 the
  # pair (2, 1) goes first and then, from b's side among what is left of a, 3 joins 4.  Sizes 1, attention equal: means.
  x = jnp.asarray([[[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.2, 1.0]]])
  tokens = tk.start(x, 1).replace(feats={"column_mean": jnp.full((1, 5), 0.2)})
  run = lambda tokens: tk.compact(tokens, MCTF().plan(tokens, 3, train=False)[0], 3)
  out = jax.jit(run, compiler_options=quick())(tokens)
  np.testing.assert_allclose(out.x, [[[9, 9], [0.1, 1], [1, 0]]], atol=1e-6)
  np.testing.assert_array_equal(out.owner, [[0, 2, 2, 1, 1]])


def order_by_angle(**options):
  """Seven tokens at the angles below, no CLS: who stands where when two have merged, and who owns each."""
  angle = jnp.asarray([[0.0, 3.0, 1.0, 1.1, 2.0, 2.3, 5.0]])
  tokens = tk.start(jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)).replace(feats={"column_mean": jnp.ones((1, 7))})

  def run(tokens):
    plan, _ = MCTF(tau_info=0.0, tau_size=0.0, **options).plan(tokens, 5, train=False)
    return plan.order[0, :5], tk.compact(tokens, plan, 5).owner[0]

  return [row.tolist() for row in jax.jit(run, compiler_options=quick())(tokens)]


def test_order_without_protected_tokens_by_hand():
  # a = {0, 2, 4, 6}, b = {1, 3, 5}.  Nearest in b, by angle: 2 to 3 (0.1), 4 to 5 (0.3), 0 to 3 (1.1), 6 to 1 (2.0).
  # One direction: 2 and 4 go, 0 and 6 stay, the more alike first, and b follows: 0 6 1 3 5.
  order, owner = order_by_angle(bidirectional=False)
  assert order == [0, 6, 1, 3, 5] and owner == [0, 2, 3, 3, 4, 4, 1]
  # Both: 2 goes to 3; left are 4 (0.3), 0 (1.1) and 6 (2.0) in this order.  Then 5 goes to 4, and of b 3 is nearer
  # (0.9 to 4) than 1 (1.0 to 4).
  order, owner = order_by_angle()
  assert order == [4, 0, 6, 3, 1] and owner == [1, 4, 3, 3, 0, 0, 2]


def test_order_follows_each_row():
  """Of two images, only the second has a protected token: there what is left of a stays in its order."""
  x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 16, 8)), jnp.float32).repeat(2, 0)
  tokens = tk.start(x).replace(feats={"column_mean": jnp.ones((2, 16))})
  tokens = tokens.replace(protected=tokens.protected.at[1, 15].set(True))
  run = lambda t: MCTF(bidirectional=False).plan(t, 12, train=False)
  plan, report = jax.jit(run, compiler_options=quick())(tokens)
  alike = np.asarray(report["similarity"])
  np.testing.assert_array_equal(plan.order[0, :4], 2 * np.argsort(-alike[0], stable=True)[4:])
  assert plan.order[1, 0] == 15 and np.all(np.diff(plan.order[1, 1:5]) > 0)


def test_how_many_can_go():
  # r is at most half of what is not protected, in both forms, and where it is a number, no fewer than 10 tokens stay.
  both, one = MCTF(), MCTF(bidirectional=False)
  for reducer in (both, one):
    assert reducer.left(40, 65, 1) == 33  # 64 / 2 go
    assert reducer.left(25, 40, 1) == 21  # floor(39 / 2) = 19 go
    assert reducer.left(6, 15, 1) == 10  # 9 would stay
    assert reducer.left(3, 9, 1) == 9 and reducer.left(3, 10, 1) == 10
    assert reducer.left(2, 15, 1) == 13
  # A share is 1 - r, of which int(r m) go: int(0.35 180) = int(62.99...) = 62, int(0.45 100) = 45, int(0.5 11) = 5.
  assert both.count(0.65, 181, 1, 180) == 119
  assert both.count(0.55, 101, 1, 100) == 56
  assert both.count(0.7, 65, 1, 64) == 46 and both.count(0.7, 46, 1, 64) == 33  # as recorded in mctf_eval_b
  assert both.count(0.5, 12, 1, 11) == 7
  assert both.count(2 / 3, 31, 1, 30) == 21  # int(1 / 3 30) = 10 go, where .333333333333 would leave one more
  assert both.count(0.1, 12, 1, 11) == 7  # half at most
  assert both.count(0.5, 10, 1, 9) == 10  # and nothing where 10 are left
  assert both.count(1.0, 12, 1, 11) == 12


def test_max_pooling_by_hand():
  # As above, 1 merges into 2 and 3 into 4 (their places 2 and 1), and each channel is the largest of two.
  x = jnp.asarray([[[9.0, 9.0], [1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.2, 0.9]]])
  tokens = tk.start(x, 1).replace(feats={"column_mean": jnp.full((1, 5), 0.2)})
  run = lambda t: MCTF(pooling="max").apply({}, t, 3, train=False, mode="gather")[0]
  out = jax.jit(run, compiler_options=quick())(tokens)
  np.testing.assert_array_equal(out.x, np.asarray([[[9, 9], [0.2, 1], [1, 0.1]]], np.float32))
  np.testing.assert_array_equal(out.size, [[1, 2, 2]])
  np.testing.assert_array_equal(out.owner, [[0, 2, 2, 1, 1]])

  def objective(x, mode):
    out, _ = MCTF(pooling="max").apply({}, tokens.replace(x=x), 3, train=True, mode=mode)
    return (out.x[:, :3] * jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).sum()

  # The largest learns, and those that are as large share it: 5 / 2 each of tokens 1 and 2.
  for mode in MODES:
    grad = jax.jit(jax.grad(objective), static_argnums=1, compiler_options=quick())(x, mode)
    np.testing.assert_array_equal(grad, [[[1, 2], [2.5, 6], [2.5, 0], [0, 4], [3, 0]]])


SIZES = dict(variant="mu/4", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)


def micro(model=None, **options):
  site = dict(reducer="mctf", layers=(1,), keep=12) | options
  return vit.make(defaults.complete({"model": SIZES | (model or {})}).model, dict(merge=site))


IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def both_modes(module):
  """What leaves block 1 and the owners, in mask and in gather mode, with random parameters."""
  params = drawn(lambda key: module.init(key, IMAGES)["params"], jax.random.key(0))
  out = {}
  for mode in MODES:
    run = lambda p, mode=mode: module.apply({"params": p}, IMAGES, mode=mode)
    aux = jax.jit(run, compiler_options=quick())(params).aux
    out[mode] = np.asarray(aux["tokens/1"]), np.asarray(aux["owner/1"])
  return params, out["mask"], out["gather"]


def test_where_nothing_merges_nothing_moves():
  """A map's rows must follow their tokens also where no token goes, for a count, a traced one, or one of each image."""
  params, (masked, _), (gathered, _) = both_modes(micro(keep=17))
  np.testing.assert_allclose(masked, gathered, atol=2e-6)
  module = micro()
  run = lambda keeps: module.apply({"params": params}, IMAGES, mode="mask", keeps=dict(merge=keeps))
  some = jax.jit(lambda keeps: run(keeps).aux["tokens/1"], compiler_options=quick())
  np.testing.assert_allclose(some(jnp.asarray([17])), gathered, atol=2e-6)
  by_row = some(jnp.asarray([[17, 12]]))
  np.testing.assert_allclose(by_row[0], gathered[0], atol=2e-6)
  np.testing.assert_allclose(by_row[1], some(jnp.asarray([12]))[1], atol=2e-6)
  dense = jax.jit(lambda: without_sites(module).apply({"params": params}, IMAGES).aux["tokens/1"])()
  np.testing.assert_allclose(gathered, dense, atol=2e-6)


def test_gates_learn_where_nothing_merges():
  """A token that a gate has switched off teaches it what it does in a block without MCTF, for any pooling."""
  gate, config = dict(reducer="gumbel", layers=(0,), keep=0.6), defaults.complete({"model": SIZES}).model
  grads = {}
  for pooling in ("", "attention", "max"):
    merge = dict(merge=dict(reducer="mctf", layers=(1,), keep=10, pooling=pooling)) if pooling else {}
    module = vit.make(config, dict(gate=gate) | merge)
    if not grads:
      params = drawn(functools.partial(module.init, images=IMAGES), jax.random.key(0))["params"]
    keeps = dict(merge=jnp.asarray([17])) if pooling else None

    def objective(params, module=module, keeps=keeps):
      rngs = {"reduce": jax.random.key(1), "dropout": jax.random.key(2)}
      aux = module.apply({"params": params}, IMAGES, train=True, mode="mask", keeps=keeps, rngs=rngs).aux
      return (aux["tokens/1"][:, 0] * jnp.cos(jnp.arange(16.0))).sum()

    grads[pooling] = jax.jit(jax.grad(objective), compiler_options=quick())(params)["block_0"]
  for pooling in ("attention", "max"):
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads[""]):
      other = functools.reduce(lambda tree, key: tree[key.key], path, grads[pooling])
      scale = np.abs(leaf).max()
      np.testing.assert_allclose(other, leaf, atol=1e-5 * scale + 1e-7, err_msg=jax.tree_util.keystr(path))


def test_images_that_have_fewer_tokens_already():
  """Attention's threshold leaves each image its own count, and MCTF merges only in those with more than 11."""
  prune = dict(reducer="topk", layers=(0,), rate="threshold", threshold=0.05, keep=17)
  sites = dict(merge=dict(reducer="mctf", layers=(1,), keep=11), prune=prune)
  module = vit.make(defaults.complete({"model": SIZES}).model, sites)
  _, (masked, owner), (gathered, owners) = both_modes(module)
  left = [len(set(row) - {-1}) for row in owner]
  np.testing.assert_array_equal(owner, owners)
  for row, count in enumerate(left):
    np.testing.assert_allclose(masked[row, :count], gathered[row, :count], atol=2e-6)
  assert min(left) < 11 == max(left)


def test_the_less_reduced_pass_is_of_stochastic_depth():
  """Its seed says which branches are left out; without stochastic depth only how many tokens go depends on it."""
  images, seeds = jnp.asarray(IMAGES).repeat(4, 0), [jax.random.key(seed) for seed in range(8)]
  gone = [int(jax.random.randint(seed, (), 0, 3)) for seed in seeds]
  one, two = next((i, j) for i in range(8) for j in range(i) if gone[i] == gone[j])  # as many tokens go
  found = {}
  for rate in (0.0, 0.5):
    module = micro(dict(drop_path=rate))
    params = drawn(functools.partial(module.init, images=IMAGES), jax.random.key(0))["params"]
    less = functools.partial(step._less_reduced, module, 2, params, images)
    less = jax.jit(lambda rng, less=less: less(rng).features, compiler_options=quick())
    found[rate] = [np.asarray(less(seeds[i])) for i in (one, two, one)]
    np.testing.assert_array_equal(found[rate][0], found[rate][2])
  np.testing.assert_array_equal(found[0.0][0], found[0.0][1])
  assert (found[0.5][0] != found[0.5][1]).any()


def block_by_hand(module, mode):
  """Block 1 of a micro model in NumPy: what is left to the tests is attention to the 12 tokens that have merged.

  Returns:
    What leaves the block, by the model; the tokens that have merged; the map of all 17; functions of x: queries, keys
    and values, projection of the heads, and what comes behind attention.
  """
  params = drawn(lambda key: module.init(key, IMAGES)["params"], jax.random.key(0))
  run = lambda params: module.apply({"params": params}, IMAGES, mode=mode)
  aux = jax.jit(run, compiler_options=quick())(params).aux
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["block_1"])

  def norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

  def project(x):
    qkv = np.einsum("bnd,dche->cbhne", norm(x, p["norm1"]), p["attn"]["qkv"]["kernel"])
    return qkv + p["attn"]["qkv"]["bias"][:, None, :, None]

  def out(heads):
    return np.einsum("bhnd,hde->bne", heads, p["attn"]["proj"]["kernel"]) + p["attn"]["proj"]["bias"]

  def rest(x):
    h = norm(x, p["norm2"]) @ p["mlp"]["fc1"]["kernel"] + p["mlp"]["fc1"]["bias"]
    return x + np.asarray(jax.nn.gelu(h, approximate=False)) @ p["mlp"]["fc2"]["kernel"] + p["mlp"]["fc2"]["bias"]

  x = np.asarray(aux["tokens/0"], np.float64)
  weight = attention_map(*project(x)[:2], np.ones(x.shape[:2]))
  tokens = tk.start(jnp.asarray(x, jnp.float32), 1).replace(feats={"column_mean": jnp.asarray(weight.mean((1, 2)))})
  merge = lambda tokens: module.sites.spots[0].module().apply({}, tokens, 12, train=False, mode="gather")[0]
  merged = jax.jit(merge, compiler_options=quick())(tokens)
  assert merged.size.max() > 1
  np.testing.assert_array_equal(aux["owner/1"], merged.owner)
  return np.asarray(aux["tokens/1"])[:, :12], merged, weight, (project, out, rest)


def attention_map(q, k, size):
  weight = size[:, None, None] * np.exp(q @ k.swapaxes(2, 3) / np.sqrt(8))
  return weight / weight.sum(-1, keepdims=True)


@pytest.mark.parametrize("mode", ["mask"])  # gather mode: the options' laws
def test_attention_anew(mode):
  """The map of 17 tokens, 12 tokens from it, then softmax(q k^T / sqrt(d) + log s) v of these."""
  got, merged, _, (project, out, rest) = block_by_hand(micro(one_step_ahead=False), mode)
  x = np.asarray(merged.x, np.float64)
  q, k, v = project(x)
  x = x + out(attention_map(q, k, np.asarray(merged.size)) @ v)
  np.testing.assert_allclose(got, rest(x), atol=2e-5)


@pytest.mark.parametrize("impl", ["matmul", "fused"])
@pytest.mark.parametrize("mode", MODES)
def test_max_pooling_one_step_ahead(mode, impl):
  """Columns of the map of 17 tokens are summed over a group, rows are the largest entries of a group."""
  got, merged, weight, (project, out, rest) = block_by_hand(micro(pooling="max", model=dict(attention=impl)), mode)
  member = np.asarray(merged.owner)[:, None] == np.arange(12)[:, None]  # (B, 12, 17)
  columns = np.einsum("bhij,bmj->bhim", weight, member)
  rows = np.where(member[:, None, :, :, None], columns[:, :, None], 0).max(3)
  x = np.asarray(merged.x, np.float64)
  np.testing.assert_allclose(got, rest(x + out(rows @ project(x)[2])), atol=2e-5)


def test_max_pooling_keeps_the_laws():
  check_reducer(MCTF(pooling="max"), laws=[2, 3, 8], cases=("ragged", "model"))


def test_price_of_attention_anew():
  # 17 tokens of width 16 are projected to queries, keys and values before those that are left are: 3 x 17 x 16^2.
  ahead, anew = (cost.of(micro(one_step_ahead=there)) for there in (True, False))
  assert anew - ahead == 3 * 17 * 256


def test_a_spot_that_lets_all_through_says_so():
  # What a search may find: nothing merges in block 1, and its site still reports 17 tokens of 17.
  sizes = dict(variant="mu/4", width=16, depth=3, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)
  module = vit.make(
    defaults.complete({"model": sizes}).model, dict(merge=dict(reducer="mctf", layers=(1, 2), keep=(17, 12)))
  )
  images, rngs = jnp.zeros((2, 16, 16, 3)), {"params": jax.random.key(0)}
  output = jax.eval_shape(lambda: module.init_with_output(rngs, images, mode="gather")[0])
  assert sorted(output.aux["reduce/merge/count"]) == [0, 1] and output.aux["tokens/2"].shape == (2, 12, 16)
  params = jax.eval_shape(lambda: module.init(rngs, images, mode="mask"))["params"]
  output = jax.eval_shape(lambda p: module.apply({"params": p}, images), params)
  assert sorted(output.aux["reduce/merge/count"]) == [0, 1] and output.aux["tokens/2"].shape == (2, 12, 16)
