"""Mixture-of-Depths: who chooses in training and at inference, and that a new gate changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import MODES, drawn, quick, reported

import tokred
from tokred import config as defaults
from tokred import tokens as tk
from tokred.nn import budget, decoder, vit
from tokred.nn.decoder_layer import Shape
from tokred.rates import Rows, Threshold
from tokred.reducers.router import GATES, Router

SMALL = dict(variant="mu/4", width=16, depth=4, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)
MOD = dict(reducer="router", layers=(1, 3))


def make(**site):
  return vit.make(defaults.complete({"model": SMALL}).model, dict(mod=MOD | site))


def small(**site):
  """A ViT with routers, its fresh parameters and images."""
  module = make(**site)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
  return module, drawn(lambda key: module.init(key, images, mode="mask")["params"], jax.random.key(0)), images


def test_softmax_weighs_the_whole_sequence():
  """r = (log 3, 0, log 4, garbage): 3 / 8, 1 / 8 and 4 / 8 of the living, of which the best two go in."""
  tokens = tk.start(jnp.log(jnp.asarray([[[3.0], [1.0], [4.0], [9.0]]])))
  tokens = tokens.replace(mask=jnp.asarray([[True, True, True, False]]))
  router = functools.partial(
    Router(gate="softmax").apply, {"params": {"kernel": jnp.ones(1)}}, train=False, mode="mask"
  )
  _, report = router(tokens, 2)
  np.testing.assert_array_equal(report["chosen"], [[True, False, True, False]])
  np.testing.assert_allclose(report["update_weight"], [[3 / 8, 1 / 8, 4 / 8, 0]], rtol=1e-6)
  prompt = tokens.replace(feats={tk.APPENDED: jnp.zeros((1, 4), bool)})
  with pytest.raises(ValueError, match=r"gate='softmax' weighs all .* valid: double_sigmoid, sigmoid, tanh, raw"):
    router(prompt, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [False, True])
def test_who_chooses_by_hand(mode, rows):
  """r = (3, 2, 1, 0), and the predictor says gelu(0, 1, 2, 3) = (0, .841192, 1.954598, 2.996363).

  Two go in: 0 and 1 by r, in training; 3 and 2 by the predictor, at inference.  What it learns is (1, 1, 0, 0) at both:
  (log(1 + e^0) + log(1 + e^-.841192) + log(1 + e^1.954598) + log(1 + e^2.996363)) / 4
  = (.693147 + .358511 + 2.087047 + 3.045123) / 4 = 1.545957.  It says yes where its logit is above 0: one is right.
  """
  tokens = tk.start(jnp.asarray([[[3.0, 0], [2, 1], [1, 2], [0, 3]]]))
  params = {
    "kernel": jnp.asarray([1.0, 0.0]),
    "predictor_in": dict(kernel=jnp.asarray([[0.0], [1.0]]), bias=jnp.zeros(1)),
    "predictor_out": dict(kernel=jnp.ones((1, 1)), bias=jnp.zeros(1)),
  }
  keep = Rows(jnp.asarray([2]), 2) if rows else 2
  for train, wanted in ((True, [0, 1]), (False, [3, 2])):
    out, report = Router(predictor=2.0).apply({"params": params}, tokens, keep, train=train, mode=mode)
    assert np.asarray(out.position[0])[np.asarray(out.alive[0])].tolist() == wanted
    np.testing.assert_array_equal(np.flatnonzero(report["chosen"][0]), sorted(wanted))
    score = [3, 2, 1, 0] if train else [0, 0.841192, 1.954598, 2.996363]
    np.testing.assert_allclose(report["score"][0], score, rtol=1e-6)
    np.testing.assert_allclose(report["loss_predictor"], [2 * 1.545957], rtol=1e-6)
    np.testing.assert_allclose(report["predictor_accuracy"], [0.25])
  # Three are above .5 by the predictor, which decides in training as well, and learns that r prefers 0, 1 and 2.
  by = functools.partial(Router(predictor=2.0).apply, {"params": params}, tokens, Threshold(0.5, 4), mode=mode)
  for train in (True, False):
    _, report = by(train=train)
    np.testing.assert_array_equal(report["chosen"], [[0, 1, 1, 1]])
    np.testing.assert_allclose(report["predictor_accuracy"], [0.5])


@pytest.mark.parametrize("gate", GATES)
def test_a_router_that_does_nothing_at_zero_begins_elsewhere(gate):
  kernel = Router(gate=gate).init(jax.random.key(0), tk.start(jnp.ones((1, 3, 4))), 2, train=False, mode="mask")
  assert np.asarray(kernel["params"]["kernel"]).any() == (gate in ("raw", "tanh"))


def test_a_predictor_learns_alone():
  """r = (2, 1, 0) behind a protected token takes the first two; of yes, no and yes one is right, and the block learns
  nothing from its loss."""
  tokens = tk.start(jnp.asarray([[[3.0, 3], [2, 1], [1, -1], [0, 1]]]), 1)
  params = {
    "kernel": jnp.asarray([1.0, 0.0]),
    "predictor_in": dict(kernel=jnp.asarray([[0.0], [1.0]]), bias=jnp.zeros(1)),
    "predictor_out": dict(kernel=jnp.ones((1, 1)), bias=jnp.zeros(1)),
  }

  def loss(x):
    apply = functools.partial(Router(predictor=2.0).apply, {"params": params}, train=True, mode="mask")
    report = apply(tokens.replace(x=x), 3)[1]
    return report["loss_predictor"].sum(), report

  slope, report = jax.jit(jax.grad(loss, has_aux=True), compiler_options=quick())(tokens.x)
  assert not slope.any()
  np.testing.assert_allclose(report["predictor_accuracy"], [1 / 3], rtol=1e-6)


def test_gathered_training_is_that_of_mask_mode():
  module, params, images = small(keep=9, predictor=0.5)
  rng = np.random.default_rng(1)
  for layer in MOD["layers"]:
    router = params[f"block_{layer}"]["reduce"]["mod"]["router"]
    router["kernel"] = jnp.asarray(rng.normal(size=16), jnp.float32)

  def loss(params, mode):
    output = module.apply({"params": params}, images, train=True, mode=mode)
    named = {name: reported(output, "mod", name) for name in ("score", "chosen", "loss_predictor")}
    return output.features.sum() + sum(map(jnp.sum, named["loss_predictor"])), named

  slope = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1, compiler_options=quick())
  (gathered, ours), (masked, theirs) = (slope(params, mode) for mode in MODES)
  for score, chosen in zip(ours["score"], ours["chosen"], strict=True):
    score, chosen = np.asarray(score)[:, 1:], np.asarray(chosen)[:, 1:]
    assert (chosen.sum(1) == 8).all()
    assert (np.where(chosen, score, np.inf).min(1) > np.where(chosen, -np.inf, score).max(1)).all()
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, theirs)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), gathered, masked)
  for layer in MOD["layers"]:  # w learns from the block, the predictor from its loss
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gathered[f"block_{layer}"]["reduce"]))


@pytest.mark.parametrize(
  "options",
  [dict(MOD, gate="sigmoid", predictor=0.0), dict(MOD, gate="sigmoid", predictor=0.5), dict(reducer="gamma_mod")],
  ids=["router", "predictor", "gamma"],
)
def test_an_answer_is_gathered_as_in_mask_mode(options):
  # Text (t) and the answer (a) behind position 8 are counted, and ranked, with the visual tokens.
  kinds = np.array([list("ttvvvvvttaaa"), list("tvvvvvvvtaaa")])
  ids, protected = np.random.default_rng(0).integers(0, 50, kinds.shape).astype(np.int32), kinds != "v"
  layer = int(options["reducer"] == "gamma_mod")  # whose router stands in the layer before
  site = dict(options, stack="llm", layers=(layer,), keep=0.5, text=True)
  shape = Shape(vocab=50, width=32, depth=2, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, max_length=64)
  module = decoder.make(shape, dict(mod=site))
  params = jax.jit(lambda: module.init(jax.random.key(0), ids[:1, :2], mode="mask", train=True)["params"])()
  if not layer:
    router = params["block_0"]["reduce"]["mod"]["router"]
    router["kernel"] = jnp.asarray(np.random.default_rng(1).normal(size=32), jnp.float32)
  outputs = {}
  for mode in MODES:
    inputs = dict(mask=np.ones_like(protected), protected=protected, last=np.array([8, 8]), train=True, mode=mode)
    known = budget.census(inputs["mask"], protected) if mode == "gather" else None
    run = jax.jit(lambda p, inputs=inputs, known=known: module.apply({"params": p}, ids, known=known, **inputs))
    outputs[mode] = run(params)
  gathered, masked = outputs["gather"], outputs["mask"]
  if not layer:
    np.testing.assert_array_equal(gathered.aux["reduce/mod/chosen"][0].sum(1), [6, 6])
    np.testing.assert_array_equal(gathered.aux["reduce/mod/chosen"][0], masked.aux["reduce/mod/chosen"][0])
  logits = [tk.restore(output.logits, output.tokens.owner) for output in (gathered, masked)]
  np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_new_gate_leaves_a_pretrained_model_unchanged(mode):
  """2 sigmoid(0) = 1 and all go through: only rounding is left, for a scope ends with x + g (x' - x), not with x'."""
  module, params, images = small(keep=1.0)
  params["head"]["kernel"] = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3)) / 4, jnp.float32)  # it is zero
  router = params["block_1"]["reduce"]["mod"]["router"]
  assert set(router) == {"kernel"} and not np.asarray(router["kernel"]).any()

  def run(module):
    call = lambda p: module.apply({"params": p}, images, train=mode == "mask", mode=mode)
    return jax.jit(call, compiler_options=quick())(params)

  routed, dense = run(module), run(module.clone(sites=type(module.sites)(module.sites.stack)))
  for gate in reported(routed, "mod", "update_weight"):
    assert (np.asarray(gate) == 1.0).all()  # to the bit
  np.testing.assert_allclose(routed.logits, dense.logits, rtol=0, atol=1e-6)  # these are up to 1.6
  assert np.abs(run(make(keep=1.0, gate="sigmoid")).logits - dense.logits).max() > 1e-3  # halves what a block does


def test_only_the_mlp_is_routed():
  """Blocks 1 and 3 let 9 of 17 into their MLPs: each saves 8 rows of 2 x 16 x 32 multiply-adds and spends 17 x 16."""
  module, params, images = small(place="mlp", keep=0.5, gate="tanh")
  params["head"]["kernel"] = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3)) / 4, jnp.float32)
  outs = {mode: jax.jit(lambda p, mode=mode: module.apply({"params": p}, images, mode=mode))(params) for mode in MODES}
  np.testing.assert_allclose(outs["mask"].logits, outs["gather"].logits, atol=1e-5)
  assert outs["gather"].counts == (17, 17, 17, 17)
  sites = dict(mod=MOD | dict(place="mlp", keep=9))
  dense, routed = (tokred.build(dict(model=SMALL, sites=s)).macs for s in ({}, sites))
  assert dense - routed == 2 * (8 * 2 * 16 * 32 - 17 * 16)
  chosen, r = (np.asarray(reported(outs["gather"], "mod", name)[0]) for name in ("chosen", "score"))
  weight = np.asarray(reported(outs["gather"], "mod", "update_weight")[0])
  np.testing.assert_allclose(weight[chosen], np.tanh(r[chosen]), rtol=1e-5)
