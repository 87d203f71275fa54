"""The methods' authors' own outputs, on micro models with their weights (shared/golden/vit)."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden import (
  GOLDEN,
  MODELS,
  MODES,
  backbone,
  check_forward,
  check_sources,
  forward,
  like,
  model,
  needs_golden,
  quick,
  recorded,
  reported,
  traced,
  value_and_grads,
)

import tokred
from tokred import cost, losses, pretrained, rates
from tokred import tokens as tk
from tokred.nn import attention
from tokred.reducers import REGISTRY, base, diffrate, gumbel, tome, topk

pytestmark = needs_golden


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights, name", [("public_vit", "dense"), ("public_dist", "dist_dense")])
def test_dense(weights, name, mode):
  arrays, _ = recorded(name)
  check_forward(arrays, *forward(model(weights), backbone(weights), arrays["images"], mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tome_a", "tome_b", "tome_c", "tome_d", "tome_e", "dist_tome_a"])
def test_tome(name, mode):
  weights = "public_dist" if name.startswith("dist") else "public_vit"
  arrays, settings = recorded(name)
  r = settings["r"] if isinstance(settings["r"], int) else tuple(settings["r"])
  site = dict(reducer="tome", layers=tuple(range(MODELS[weights]["depth"])), r=r)
  if not settings["prop_attn"]:
    site["proportional"] = False
  module = model(weights, dict(merge=site))
  asked = rates.tome_schedule(r, 6) if not (isinstance(r, tuple) and len(r) > 2) else list(r)
  assert asked[: len(arrays["r_per_layer"])] == arrays["r_per_layer"].tolist()
  output, blocks = forward(module, backbone(weights), arrays["images"], mode)
  check_forward(arrays, output, blocks)
  check_sources(arrays, blocks, order=True)
  counts = np.asarray(output.counts)
  before = np.concatenate([[module.shape.num_tokens], counts[:-1]])
  np.testing.assert_array_equal(before - counts, arrays["r_effective"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["evit_a", "evit_b", "evit_c", "evit_d"])
def test_evit(name, mode):
  arrays, settings = recorded(name)
  rate = settings["keep_rate_model"]
  layers = tuple(layer for layer, keep in enumerate(rate) if keep < 1)
  keep = tuple(settings["call_kwargs"].get("keep_rate", rate[layer]) for layer in layers)
  fuse = settings["fuse_token"]
  module = model("public_vit", dict(prune=dict(reducer="topk", layers=layers, keep=keep, fuse=fuse)))
  output, blocks = forward(module, backbone("public_vit"), arrays["images"], mode)
  check_forward(arrays, output, blocks, tokens=False)
  check_kept(arrays, blocks, {layer: layer for layer in layers}, fuse)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dynamicvit_eval_a", "dynamicvit_eval_b"])
def test_dynamicvit_inference(name, mode):
  arrays, settings = recorded(name)
  layers = tuple(settings["pruning_loc"])
  module = model("public_vit", dict(prune=dict(reducer="gumbel", layers=layers, keep=tuple(settings["token_ratio"]))))
  params = with_predictors(module, layers, "gumbel")
  output, blocks = forward(module, params, arrays["images"], mode)
  check_forward(arrays, output, blocks, tokens=False)
  check_kept(arrays, blocks, dict(enumerate(layers)), False)
  for stage, score in enumerate(reported(output, "prune", "score")):
    theirs = arrays[f"pred_logprob_{stage}"][..., 0]
    ours = np.asarray(score)[:, 1 : theirs.shape[1] + 1]
    np.testing.assert_allclose(np.sort(ours, 1), np.sort(theirs, 1), atol=2e-5)


def check_kept(arrays, blocks, layers, fuse):
  """Kept sets: the recorded indices count the patches that arrive; a fused token has no place and counts as -1."""
  batch, n = blocks[0].owner.shape
  theirs = np.tile(np.arange(n), (batch, 1))  # original position by place
  label = theirs.copy()  # ours by original position: a fused token takes over the position of one that it holds
  for key, layer in layers.items():
    kept = arrays[f"kept_idx_{key}"]
    theirs = np.concatenate([theirs[:, :1], np.take_along_axis(theirs, kept + 1, 1)], axis=1)
    position = np.asarray(blocks[layer].position)[:, : theirs.shape[1] + fuse]
    if fuse:
      theirs = np.concatenate([theirs, np.full((batch, 1), -1)], axis=1)
      np.put_along_axis(label, position[:, -1:], -1, axis=1)
    ours = np.take_along_axis(label, position, axis=1)
    np.testing.assert_array_equal(np.sort(ours, 1), np.sort(theirs, 1), err_msg=f"layer {layer}")


def predictor_rules(layers, reducer):
  """The authors' predictors in our tree."""
  names = {
    "in_conv.0": "norm",
    "in_conv.1": "in_proj",
    "out_conv.0": "out1",
    "out_conv.2": "out2",
    "out_conv.4": "out3",
  }
  rules = []
  for stage, layer in enumerate(layers):
    for theirs, ours in names.items():
      old = rf"score_predictor\.{stage}\.{theirs}".replace("conv.", r"conv\.")
      new = f"block_{layer}/reduce/prune/{reducer}/predictor/{ours}"
      if ours == "norm":
        rules.append((old + r"\.weight", new + "/scale", None))
      else:
        rules.append((old + r"\.weight", new + "/kernel", np.transpose))
      rules.append((old + r"\.bias", new + "/bias", None))
  return rules


def with_predictors(module, layers, reducer):
  state = pretrained.read_safetensors(GOLDEN / "public_vit_dynamicvit_predictors.safetensors")
  used = {name: a for name, a in state.items() if int(name.split(".")[1]) < len(layers)}
  loaded = pretrained.translate(used, predictor_rules(layers, reducer))
  dense = traverse_util.flatten_dict(backbone("public_vit"), sep="/")
  return pretrained.merge(like(module), {**dense, **loaded})


BORDER = 96 * 192  # MACs: the authors count the patch embedding of CLS too


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["diffrate_eval_a", "diffrate_eval_b", "diffrate_eval_c"])
def test_diffrate_inference(name, mode):
  arrays, settings = recorded(name)
  module = model("public_vit", dict(reduce=diffrate.site(settings["prune"], settings["merge"])))
  output, blocks = forward(module, backbone("public_vit"), arrays["images"], mode)
  check_forward(arrays, output, blocks, tokens=False)
  check_sources(arrays, blocks, order=False)
  s = module.shape
  macs = cost.macs(s.sizes(), module.sites.profile(s.width, s.num_heads))
  np.testing.assert_allclose(macs + BORDER, arrays["flops"], rtol=1e-6)
  np.testing.assert_allclose(losses.macs(module, output) + BORDER, arrays["flops"], rtol=1e-6)


@pytest.mark.parametrize("name, macs", [("deit_s_2.3g", 2.327e9), ("deit_s_2.9g", 2.905e9)])
def test_released_schedules_cost_what_they_say(name, macs):
  module = tokred.build(dict(model=dict(variant="S/16"), sites=dict(rates=diffrate.site(*diffrate.SCHEDULES[name]))))
  np.testing.assert_allclose(module.macs, macs, rtol=5e-4)


def close(ours, theirs, name="", floor=1e-9):
  """To 1e-4 of the largest."""
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max() + floor, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", ["diffrate_train_a", "diffrate_train_b"])
def test_diffrate_training(name):
  arrays, settings = recorded(name)
  pair, step, weight = ("topk", "diffrate_merge"), settings["granularity"], settings["lambda_flops"]
  module = model(
    "public_vit",
    dict(
      first=dict(reducer=pair, layers=(0,), rate="learned", granularity=65),  # one candidate: all
      rest=dict(reducer=pair, layers=(1, 2, 3, 4, 5), rate="learned", granularity=step),
    ),
    gate_eps=1e-6,
  )
  paths = {  # theirs -> ours
    f"blocks.{layer}.{kind}_ddp": f"block_{layer}/reduce/{'rest' if layer else 'first'}_{slot}_{pair[slot]}/rate/logits"
    for layer in range(6)
    for slot, kind in enumerate(("prune", "merge"))
  }
  logits = {ours: arrays[f"{theirs}.selected_probability"] for theirs, ours in paths.items()}
  dense = traverse_util.flatten_dict(backbone("public_vit"), sep="/")
  params = pretrained.merge(like(module), {**dense, **logits})
  target = jax.nn.one_hot(arrays["labels"], 10)

  def terms(params):
    output, blocks = traced(
      module, params, arrays["images"], train=True, mode="mask", rngs={"reduce": jax.random.key(0)}
    )
    ce = losses.cross_entropy(output.logits, target, settings["label_smoothing"])
    macs = losses.macs(module, output) + BORDER
    return jnp.stack([ce, macs]), (output, blocks)

  (ce, macs), (ce_grad, macs_grad), (output, blocks) = value_and_grads(terms, params)
  np.testing.assert_allclose(np.stack([b.x[:, 0] for b in blocks]), arrays["cls_per_block"], atol=5e-5)
  np.testing.assert_allclose(output.logits, arrays["logits"], atol=2e-5)
  for layer, tokens in enumerate(blocks):
    np.testing.assert_array_equal(tokens.mask.sum(1), arrays[f"mask_sorted_{layer}"].sum(1))
  counts = np.stack([*reported(output, "first", "count"), *reported(output, "rest", "count")]).reshape(6, 2)
  np.testing.assert_array_equal(counts.T, [arrays["prune_kept_num"], arrays["merge_kept_num"]])
  np.testing.assert_array_equal(output.counts, arrays["last_token_number"][1:])

  # The loss is CE + 5 (F - T)^2 in GMACs; ours is (F / dense - share)^2, the same but for its weight.
  dense = losses.dense_macs(module) + BORDER
  share = arrays["target_flops_g"] * 1e9 / dense
  flops_loss, slope = jax.value_and_grad(losses.budget)(macs, dense, share)
  scale = (dense / 1e9) ** 2
  np.testing.assert_allclose(macs, arrays["flops"], rtol=1e-6)
  np.testing.assert_allclose(ce, arrays["loss_cls"], rtol=1e-5)
  np.testing.assert_allclose(flops_loss * scale, arrays["loss_flops"], rtol=2e-5)
  np.testing.assert_allclose(ce + weight * scale * flops_loss, arrays["loss_total"], rtol=1e-5)
  for theirs, ours in paths.items():
    close(ce_grad[ours], arrays[f"grad_ce.{theirs}"], theirs)
    close(macs_grad[ours], arrays[f"grad_flops.{theirs}"], theirs)
    total = ce_grad[ours] + weight * scale * slope * macs_grad[ours]
    close(total, arrays[f"grad_total.{theirs}"], theirs)
  close(ce_grad["cls_token"], arrays["grad_ce__cls_token"])
  close(ce_grad["head/kernel"].T, arrays["grad_ce__head"])
  close(ce_grad["block_1/attn/qkv/kernel"].reshape(96, -1).T[:8], arrays["grad_ce__qkv1"])


class Replay(gumbel.Gumbel):
  """The selector with recorded noise, by layer; tokens have moved, so it is looked up by their original position."""

  record: ClassVar[dict] = {}
  position: ClassVar = None

  def plan(self, tokens, keep, *, train):
    Replay.position = tokens.position
    return super().plan(tokens, keep, train=train)

  def noise(self, shape):
    noise = jnp.pad(Replay.record[self.path[0]], ((0, 0), (1, 0), (0, 0)))  # CLS needs none
    assert noise.shape == shape
    return tk.take(noise, Replay.position, "gather")


@pytest.mark.parametrize("name", ["dynamicvit_train_a", "dynamicvit_train_b"])
def test_dynamicvit_training(name, monkeypatch):
  monkeypatch.setitem(REGISTRY, "replay", Replay)
  arrays, settings = recorded(name)
  layers, targets, weight = tuple(settings["pruning_loc"]), settings["keep_ratio"], settings["weights"]
  Replay.record = {f"block_{layer}": arrays[f"gumbel_noise_{stage}"] for stage, layer in enumerate(layers)}
  site = dict(reducer="replay", layers=layers, keep=tuple(settings["token_ratio"]))
  module = model("public_vit", dict(prune=site), gate_eps=1e-6)
  params = with_predictors(module, layers, "replay")
  teacher, _ = forward(model("public_vit"), backbone("public_vit"), arrays["images"], "gather")
  target = jax.nn.one_hot(arrays["labels"], 10)

  def terms(params):
    output, blocks = traced(module, params, arrays["images"], train=True, mode="mask")
    ratio = losses.keep_ratio(reported(output, "prune", "kept_share"), targets)
    parts = dict(
      cls=losses.cross_entropy(output.logits, target),
      ratio_sum=ratio * settings["ratio_divisor"],  # theirs is a sum over selectors, divided later
      cls_kl=losses.distill_logits(output.logits, teacher.logits),
      token_mse=losses.distill_tokens(output.tokens, teacher.tokens.x),
      token_kl=losses.distill_tokens(output.tokens, teacher.tokens.x, kl=True),
    )
    total = weight["clf"] * parts["cls"] + weight["ratio"] * ratio
    total = total + weight["distill"] * (parts["cls_kl"] + parts["token_mse"])
    return jnp.stack([total, parts["ratio_sum"]]), (parts, output, blocks)

  (total, _), grads, (parts, output, blocks) = value_and_grads(terms, params)
  np.testing.assert_allclose(output.logits, arrays["logits"], atol=2e-5)
  for part, value in parts.items():
    np.testing.assert_allclose(value, arrays[f"loss_{part}"], rtol=5e-5, err_msg=part)
  np.testing.assert_allclose(total, arrays["loss_total"], rtol=1e-5)

  np.testing.assert_allclose(np.stack([b.x[:, 0] for b in blocks]), arrays["cls_per_block"], atol=5e-5)
  alive = arrays["final_decision"] > 0
  ours, theirs = patches(output.tokens, output.tokens.x), arrays["token_features"]
  np.testing.assert_array_equal(patches(output.tokens, output.tokens.mask), alive[..., 0])
  np.testing.assert_allclose(ours, theirs, atol=5e-5)
  for stage, layer in enumerate(layers):
    np.testing.assert_array_equal(patches(blocks[layer], blocks[layer].mask), arrays[f"decision_{stage}"])

  shares = reported(output, "prune", "kept_share")  # of their "dynamic" ratio the mean over the batch
  dynamic = losses.keep_ratio(shares, targets, dynamic=True) * settings["ratio_divisor"]
  np.testing.assert_allclose(dynamic, arrays["loss_ratio_sum_dynamic"], rtol=2e-5)
  other = total + weight["ratio"] * (dynamic - parts["ratio_sum"]) / settings["ratio_divisor"]
  np.testing.assert_allclose(other, arrays["loss_total_dynamic"], rtol=1e-5)
  other = total + weight["distill"] * (parts["token_kl"] - parts["token_mse"])
  np.testing.assert_allclose(other, arrays["loss_total_kltoken"], rtol=1e-5)

  for kind, grad in zip(("total", "ratio"), grads, strict=True):
    recorded_here = [n for n in arrays if n.startswith(f"grad_{kind}.score_predictor")]
    assert len(recorded_here) == 10 * len(layers)
    for key in recorded_here:
      source = {key.removeprefix(f"grad_{kind}."): np.zeros((1, 1))}
      (ours,) = pretrained.translate(source, predictor_rules(layers, "replay"))
      close(grad[ours].T[: len(arrays[key])], arrays[key], key, floor=1e-6)  # some are sums that cancel
  close(grads[0]["cls_token"], arrays["grad_total.cls_token"])
  for key in [n for n in arrays if "attn.qkv" in n]:
    close(grads[0][f"block_{key.split('.')[2]}/attn/qkv/kernel"].reshape(96, -1).T[:8], arrays[key], key)


def patches(tokens, values):
  """Values of the patches in raster order; in mask mode all are still there."""
  place = np.argsort(tokens.position, axis=1)[:, 1:]
  return np.take_along_axis(np.asarray(values), place.reshape(place.shape + (1,) * (values.ndim - 2)), 1)


def test_tome_matching():
  arrays, settings = recorded("fn_tome_bsm")
  for i, case in enumerate(settings["cases"]):
    if "kth" in case:  # another matching, which no model of the paper uses
      continue
    get = lambda name, i=i: arrays[f"c{i}_{name}"]
    module, n, prefix = tome.ToMe(), case["N"], case["class_token"] + case["distill_token"]
    tokens = tk.start(jnp.asarray(get("x")), prefix)
    tokens = tokens.replace(
      size=jnp.asarray(get("size")[..., 0]), feats={"key": jnp.asarray(get("metric"))[:, :, None]}
    )
    keep = max(n - case["r"], module.fewest(n, prefix))
    assert keep == case["out_tokens"] == n - case["r_effective"]

    @functools.partial(jax.jit, compiler_options=quick())
    def run(tokens, module=module, keep=keep):
      plan, _ = module.apply({}, tokens, keep, train=False, method="plan")
      plain = plan.replace(weight=tk.average_weight(plan.owner, jnp.ones_like(tokens.size)))
      return [(tk.compact(tokens, p, keep), tk.fold(tokens, p)) for p in (plan, plain)]

    for out, mean in zip(*run(tokens), strict=True):
      np.testing.assert_allclose(out.x[:, :keep], get("wavg_x"), rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(out.size[:, :keep], get("wavg_size")[..., 0], rtol=1e-6)
      source = np.asarray(out.owner)[:, None] == np.arange(keep)[:, None]
      np.testing.assert_array_equal(source, get("source"))
      np.testing.assert_allclose(mean.x[:, :keep], get("mean"), rtol=1e-5, atol=1e-6)
      if not case["distill_token"]:  # their unmerge forgets that the distillation token was moved to the front
        np.testing.assert_allclose(tk.restore(mean.x, mean.owner), get("unmerge_of_mean"), rtol=1e-5, atol=1e-6)


def test_tome_schedule():
  for case in recorded("fn_tome_bsm")[1]["parse_r"]:
    if "r_list" in case:
      site = dict(merge=dict(reducer="tome", layers=tuple(range(case["layers"])), r=tuple(case["r_list"])))
      spots = model("public_vit", site).sites.spots
      assert [spot.arriving - spot.keep for spot in spots] == case["out"]
    else:
      assert rates.tome_schedule((case["r"], float(case["inflect"])), case["layers"]) == case["out"]


def ordered(x, num_alive=None):
  """Tokens whose importance falls from left to right, the first of them CLS."""
  tokens = tk.start(jnp.asarray(x), 1)
  n = x.shape[1]
  alive = jnp.broadcast_to(jnp.arange(n) < (num_alive or n), tokens.mask.shape)
  return tokens.replace(mask=alive, feats={"cls_attention": jnp.broadcast_to(jnp.linspace(1.0, 0.1, n), x.shape[:2])})


@pytest.mark.parametrize("i", [0, 1])
def test_diffrate_learned_count(i):
  arrays, settings = recorded("fn_diffrate")
  case, get = settings["cases"][i], lambda name: arrays[f"c{i}_{name}"]
  counts, n = rates.candidates(case["patch_number"], case["granularity"]), case["patch_number"] + 1
  logits, w = get("logits"), get("w")
  assert list(counts) == get("candidates").tolist()
  np.testing.assert_allclose(rates.expected(logits, counts), case["expected"], rtol=1e-6)
  count, grad = jax.value_and_grad(lambda t: rates.kept_count(t, counts) + 1)(logits)
  assert count == get("kept") == case["kept"]
  close(grad, get("grad_kept"))
  np.testing.assert_allclose(rates.survival(logits, counts, n, 1), get("token_probability"), atol=1e-6)

  @functools.partial(jax.jit, compiler_options=quick())
  def masked(logits, tokens):
    def mask(logits):
      plan, _ = topk.TopK().apply({}, tokens, case["kept"], train=False, method="plan")
      return tk.fold(tokens, plan, survival=rates.survival(logits, counts, n, 1)).mask[0]

    mask, pull = jax.vjp(mask, logits)
    return mask, pull(jnp.asarray(w))[0]

  for alive in case["token_numbers"]:
    tokens = ordered(np.zeros((1, n, 1), np.float32), alive)
    soft = tokens.replace(mask=tokens.mask.astype(jnp.float32))
    mask, grad = masked(logits, soft)
    inert = np.arange(n) >= (alive or n)  # theirs are 1 there, to be multiplied by the 0 that they had already
    np.testing.assert_array_equal(mask, get(f"mask_{alive}") * ~inert)
    if not inert.any():
      close(grad, get(f"grad_mask_{alive}"))


def test_diffrate_merging_and_minimum():
  arrays, settings = recorded("fn_diffrate")
  case, least = settings["cases"][2], settings["cases"][3]["ste_min"]
  keep, n = case["kept"], case["N"]
  x = jnp.asarray(arrays["m0_x"])

  @functools.partial(jax.jit, compiler_options=quick())
  def run(tokens):
    plan, report = diffrate.DiffRateMerge().apply({}, tokens, keep, train=True, method="plan")
    tokens = tokens.replace(x=x)
    soft = tokens.replace(mask=tokens.mask.astype(jnp.float32))  # the merged keep their own values while it learns
    summed = plan.replace(weight=jnp.ones_like(tokens.size))
    mean, total = tk.compact(tokens, plan, keep), tk.compact(tokens, summed, keep)
    return report["similarity"][:, keep:], mean.x, total.x, tk.fold(soft, plan, survival=jnp.ones(n)).x

  names = ("node_max", "mean", "sum", "mean_training")
  for name, ours in zip(names, run(ordered(arrays["m0_metric"])), strict=True):
    np.testing.assert_allclose(ours, arrays[f"m0_{name}"], rtol=1e-5, atol=1e-6, err_msg=name)

  arriving, prune, merge = (jnp.float32(v) for v in least["inputs"])
  value, grads = jax.value_and_grad(lambda *v: cost.min_st(v[0], v[1:]), (0, 1, 2))(arriving, prune, merge)
  assert value == least["out"]
  assert [float(g) for g in grads] == [g or 0.0 for g in least["grads"]]


@pytest.mark.parametrize("i", [0, 1])
def test_dynamicvit_losses(i):
  arrays, settings = recorded("fn_dynamicvit")
  case, get = settings["cases"][i], lambda name: arrays[f"c{i}_{name}"]
  shares = [get(f"decision_{stage}").mean(1) for stage in range(2)]
  shares = [s.mean() for s in shares] if case["dynamic"] else shares
  tokens = tk.start(jnp.asarray(get("token"))).replace(mask=jnp.asarray(get("decision_1")))
  parts = [
    losses.cross_entropy(get("pred"), jax.nn.one_hot(get("labels"), 5)),
    losses.keep_ratio(shares, case["keep_ratio"]) * len(shares),
    losses.distill_logits(get("pred"), get("teacher_logits")),
    losses.distill_tokens(tokens, jnp.asarray(get("teacher_tokens"))),
  ]
  np.testing.assert_allclose(parts, get("parts"), rtol=1e-5)
  np.testing.assert_allclose(np.dot([1.0, 2.0 / len(shares), 0.5, 0.5], parts), get("loss"), rtol=1e-5)


@pytest.mark.parametrize("impl", ["matmul", "fused"])
def test_softmax_with_policy(impl):
  arrays, _ = recorded("fn_dynamicvit")
  scores, policy = arrays["s0_scores"], arrays["s0_policy"][..., 0]
  n = scores.shape[-1]  # q holds the scores, k and v are the identity: what comes out is the attention map
  eye = jnp.broadcast_to(jnp.eye(n), scores.shape)
  ours = attention.attend(jnp.asarray(scores) * n**0.5, eye, eye, mask=jnp.asarray(policy), impl=impl)
  np.testing.assert_allclose(ours, arrays["s0_out"], atol=2e-5)  # theirs adds 1e-6 to every weight


def test_evit_complement_and_schedule():
  arrays, settings = recorded("fn_evit")
  for point in settings["schedule"]:
    assert rates.cosine_keep(0.7, point["iter"], 1000, 11000) == pytest.approx(point["keep"], abs=1e-12)
  kept, gone = arrays["c0_idx"], arrays["c0_compl"]
  n = int(arrays["c0_N"])
  score = np.zeros((len(kept), n), np.float32)
  np.put_along_axis(score, kept, 1.0, 1)
  plan = base.keep_top(tk.start(jnp.zeros((len(kept), n, 1))), jnp.asarray(score), kept.shape[1])
  np.testing.assert_array_equal([np.flatnonzero(row < 0) for row in np.asarray(plan.owner)], np.sort(gone, 1))
