"""MCTF against its authors' code: matching, pooling, one-step-ahead attention, training with consistency."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import (
  MODES,
  backbone,
  check_forward,
  check_sources,
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
from tokred.nn import vit
from tokred.reducers.mctf import MCTF


def site(settings, counts):
  """The site of a recorded run; `counts` are the tokens that leave each block."""
  layers = settings["activate_layer"]
  keep = tuple(counts[layer] for layer in layers)
  options = dict(pooling=("size", "attention")[settings["pooling_type"]], bidirectional=bool(settings["bidirection"]))
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
    pooling=("size", "attention")[c["pooling_type"]],
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
    run = lambda **kwargs: student.apply({"params": params}, arrays["images"], **kwargs)  # noqa: E731
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
  plan, _ = MCTF().plan(tokens, 3, train=False)
  out = tk.compact(tokens, plan, 3)
  np.testing.assert_allclose(out.x, [[[9, 9], [0.1, 1], [1, 0]]], atol=1e-6)
  np.testing.assert_array_equal(out.owner, [[0, 2, 2, 1, 1]])


SIZES = dict(variant="mu/4", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)


def micro(**options):
  site = dict(reducer="mctf", layers=(1,), keep=12) | options
  return vit.make(defaults.complete({"model": SIZES}).model, dict(merge=site))


@pytest.mark.parametrize("mode", ["mask"])  # gather mode: the options' laws
def test_attention_anew(mode):
  """Block 1 in NumPy: the map of 17 tokens, 12 tokens from it, then softmax(q k^T / sqrt(d) + log s) v of these."""
  module = micro(one_step_ahead=False)
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  params = jax.jit(module.init, compiler_options=quick())(jax.random.key(0), images)["params"]
  run = lambda params: module.apply({"params": params}, images, mode=mode)  # noqa: E731
  aux = jax.jit(run, compiler_options=quick())(params).aux
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["block_1"])

  def norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

  def attention(x, size):
    qkv = np.einsum("bnd,dche->cbhne", norm(x, p["norm1"]), p["attn"]["qkv"]["kernel"])
    q, k, v = qkv + p["attn"]["qkv"]["bias"][:, None, :, None]
    weight = size[:, None, None] * np.exp(q @ k.swapaxes(2, 3) / np.sqrt(8))
    weight = weight / weight.sum(-1, keepdims=True)
    out = np.einsum("bhnd,hde->bne", weight @ v, p["attn"]["proj"]["kernel"]) + p["attn"]["proj"]["bias"]
    return weight.mean((1, 2)), out

  x = np.asarray(aux["tokens/0"], np.float64)
  column_mean, _ = attention(x, np.ones(x.shape[:2]))
  tokens = tk.start(jnp.asarray(x, jnp.float32), 1).replace(feats={"column_mean": jnp.asarray(column_mean)})
  merged, _ = module.sites.spots[0].module().apply({}, tokens, 12, train=False, mode="gather")
  assert merged.size.max() > 1
  x = np.asarray(merged.x, np.float64)
  x = x + attention(x, np.asarray(merged.size))[1]
  mlp = p["mlp"]
  h = norm(x, p["norm2"]) @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]
  x = x + np.asarray(jax.nn.gelu(h, approximate=False)) @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]
  np.testing.assert_allclose(aux["tokens/1"][:, :12], x, atol=2e-5)
  np.testing.assert_array_equal(aux["owner/1"], merged.owner)


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
