"""Tokens that halt or go round: A-ViT, DyT, scopes over several blocks, against the authors' code or by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import drawn, needs_golden, quick, recorded, reported

import tokred
from tokred import config as defaults
from tokred import losses, schedules
from tokred import tokens as tk
from tokred.nn import reduce, vit
from tokred.reducers.dyt import DyT, dispatch
from tokred.reducers.gumbel import Gumbel

SMALL = dict(variant="mu/4", width=16, depth=4, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)


def small(sites, **fields):
  config = defaults.complete({"model": SMALL | fields})
  module = vit.make(config.model, sites)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
  rngs = {"params": jax.random.key(0), "reduce": jax.random.key(1)}
  return module, drawn(lambda rngs: module.init(rngs, images, mode="mask")["params"], rngs), images


@needs_golden
@pytest.mark.parametrize("case", [0, 1])
def test_dyt_dispatcher(case):
  arrays, settings = recorded("fn_dyt")
  c = settings["cases"][case]
  get = lambda name: jnp.asarray(arrays[f"c{case}_{name}"])
  x, noise = get("x"), (get("g1") - get("g2"))[..., 0]

  def select(x, w, b):
    logits = jnp.einsum("bnd,d->bn", x[:, 1:], w[0]) + b
    hard, soft = dispatch(logits, noise, c["tau"])
    y = tk.straight_through(hard, soft) if c["hard"] else soft
    return jnp.concatenate([jnp.ones((2, 1)), y], 1), logits

  def objective(x, w):
    y, logits = select(x, w, get("b_head"))
    return jnp.sum(y * get("w")[..., 0]), (y, logits)

  grads, (y, logits) = jax.grad(objective, argnums=(0, 1), has_aux=True)(x, get("w_head"))
  np.testing.assert_allclose(logits, get("logits")[..., 0], atol=1e-6)
  np.testing.assert_allclose(y, get("select_train")[..., 0], atol=1e-6)
  chosen = logits > 0 if c["hard"] else jax.nn.sigmoid(logits)
  chosen = np.pad(np.asarray(chosen, np.float32), ((0, 0), (1, 0)), constant_values=1)
  np.testing.assert_allclose(chosen, get("select_eval")[..., 0], atol=1e-6)
  np.testing.assert_allclose(grads[0], get("grad_x"), atol=1e-6)
  np.testing.assert_allclose(grads[1], get("grad_head"), atol=1e-5)
  shares = [y[:, 1:].mean(1), get("select_eval")[:, 1:, 0].mean(1)]
  ratio = 2.0 * losses.global_ratio(shares, [c["token_target"]] * 2)
  np.testing.assert_allclose(ratio, arrays[f"c{case}_loss_token_weighted"], rtol=1e-5)
  ce = optax.softmax_cross_entropy_with_integer_labels(get("pred"), get("labels")).mean()
  np.testing.assert_allclose(ce + ratio, arrays[f"c{case}_loss_total"], rtol=1e-5)


def test_dyt_by_hand():
  """CLS, tokens of logits 2, -1, 1, -3 and one that is dead, and noise of 0, 2, -2, 0: 1 and 2 go, of 4 the half.

  (l + g) / 5 is .4, .2, -.2, -.6; its slopes sigmoid' are .240261, .247517, .247517, .228784: the share rises with the
  bias by their mean over tau, .964079 / 4 / 5 = .048204.  The adapter adds 0.1 relu(x), and in training what dropout
  leaves of it.  That who is dead has a gate of 1 lets earlier gates learn.
  """
  x = jnp.asarray([[[9.0], [2.0], [-1.0], [1.0], [-3.0], [7.0]]])
  tokens = tk.start(x, 1).replace(mask=jnp.asarray([[True] * 5 + [False]]))

  class Replay(DyT):
    def noise(self, shape):
      return jnp.asarray([[0.0, 0.0, 2.0, -2.0, 0.0, 0.0]])

  dense = lambda bias: dict(kernel=jnp.ones((1, 1)), bias=jnp.full(1, bias))

  def share(bias, x, train):
    params = dict(dispatcher=dense(bias), adapter=dict(down=dense(0.0), up=dense(0.0)))
    apply = functools.partial(Replay(hidden=1, dropout=1.0).apply, train=train, method="plan")
    plan, report = apply({"params": params}, tokens.replace(x=x), 3, rngs={"reduce": jax.random.key(0)})
    return report.get("kept_share", bias), (plan, report)

  run = jax.jit(jax.jacobian(share, has_aux=True), static_argnums=2, compiler_options=quick())
  slope, (made, report) = run(0.0, x, True)
  np.testing.assert_allclose(slope, [0.048204], rtol=1e-4)
  np.testing.assert_array_equal(report["kept_share"], [0.5])
  np.testing.assert_array_equal(made.gate, [[1, 1, 1, 0, 0, 1]])
  assert not report["residual"].any()
  _, (made, report) = run(0.0, x.astype(jnp.bfloat16), False)
  np.testing.assert_array_equal(made.gate, [[1, 1, 0, 1, 0, 1]])
  np.testing.assert_allclose(report["residual"][0, :, 0].astype(jnp.float32), [0.9, 0.2, 0, 0.1, 0, 0], rtol=0.01)
  assert report["residual"].dtype == jnp.bfloat16


def test_noise_is_that_of_the_papers():
  """A token of margin 0 goes in half of all draws.  Gumbel(0, 1) has mean .5772 and variance pi^2 / 6, the difference
  of two 0 and pi^2 / 3; of 20000 samples the means are known to .01."""
  draw = lambda module: module.apply({}, (20_000,), method="noise", rngs={"reduce": jax.random.key(0)})
  one, two = draw(Gumbel()), draw(DyT())
  np.testing.assert_allclose([one.mean(), one.var()], [0.5772, np.pi**2 / 6], atol=0.06)
  np.testing.assert_allclose([two.mean(), two.var()], [0.0, np.pi**2 / 3], atol=0.12)


def test_shares_that_images_and_layers_may_have_by_hand():
  # Two layers let 1/4 and 3/4, and 0 and 1/4 of two images' tokens through.  Held at 1/2 each: of the images, the mean
  # of 1/16, 1/16 and of 1/4, 1/16 is 7/64; of the batch, that of 0 and (1/8 - 1/2)^2 = 9/64 is 9/128.
  shares = [jnp.asarray([0.25, 0.75]), jnp.asarray([0.0, 0.25])]
  np.testing.assert_allclose(losses.keep_ratio(shares, [0.5, 0.5]), 7 / 64, rtol=1e-6)
  np.testing.assert_allclose(losses.keep_ratio(shares, [0.5, 0.5], dynamic=True), 9 / 128, rtol=1e-6)
  # At least 0.3: 0.05 and 0 are missing in the first, 0.3 and 0.05 in the second: 0.025 + 0.175.
  np.testing.assert_allclose(losses.min_ratio(shares, 0.3), 0.2, rtol=1e-6)
  assert losses.min_ratio((), 0.3).dtype == jnp.float32  # nobody draws: micro-batches carry it along nevertheless


def test_shares_of_a_model():
  module, params, images = small(dict(route=dict(reducer="dyt", layers=(1, 2), keep=0.25, hidden=4)))
  rngs = {"dropout": jax.random.key(0), "reduce": jax.random.key(1)}
  run = lambda params: module.apply({"params": params}, images, train=True, mode="mask", rngs=rngs)
  output = jax.jit(run, compiler_options=quick())(params)
  weights = dict(keep_ratio=1.0, dynamic=True, min_ratio=1.0, min_share=0.6)
  named = losses.reports(defaults.complete(dict(loss=weights)).loss, module, output)
  first, second = (np.asarray(share) for share in reported(output, "route", "kept_share"))
  wanted = ((first.mean() - 0.25) ** 2 + (second.mean() - 0.25) ** 2) / 2
  np.testing.assert_allclose(named["keep_ratio"], wanted, rtol=1e-5)
  wanted = sum(np.maximum(0.6 - share, 0).mean() for share in (first, second))
  np.testing.assert_allclose(named["min_ratio"], wanted, rtol=1e-5)
  assert wanted > 0


def test_dyt_in_a_model():
  module, params, images = small(dict(route=dict(reducer="dyt", layers=(1, 2), keep=0.5, hidden=4)))
  run = jax.jit(lambda p, keeps, mode: module.apply({"params": p}, images, mode=mode, keeps=keeps), static_argnums=2)
  gathered, masked = run(params, None, "gather"), run(params, None, "mask")
  assert gathered.counts == (17, 17, 17, 17)
  np.testing.assert_allclose(masked.logits, gathered.logits, atol=1e-5)
  np.testing.assert_allclose(masked.tokens.x, gathered.tokens.x, atol=1e-5)
  # An adapter that is new adds nothing: with all tokens through, the model is the dense one.
  whole = run(params, dict(route=jnp.asarray([17, 17])), "mask")
  dense = module.clone(sites=type(module.sites)(module.sites.stack)).apply({"params": params}, images)
  np.testing.assert_allclose(whole.tokens.x, dense.tokens.x, atol=1e-5)
  # The dispatcher learns from those that go round, too.
  loss = lambda p: module.apply(
    {"params": p}, images, train=True, mode="mask", rngs={"reduce": jax.random.key(3), "dropout": jax.random.key(4)}
  ).features.sum()
  grads = jax.jit(jax.grad(loss), compiler_options=quick())(params)["block_1"]["reduce"]["route"]["dyt"]
  assert np.abs(grads["dispatcher"]["kernel"]).max() > 0
  assert np.abs(grads["adapter"]["up"]["kernel"]).max() > 0


def test_dyt_gate_times_the_update():
  # The tokens' update is 3 for each; gates 1, 0, 1 (CLS is protected): x = 1 + 3 gate.  d x_i / d gate_i = 3 for all.
  x = jnp.ones((1, 3, 2))
  outer = tk.start(x, 1)
  gate = jnp.asarray([[1.0, 0.0, 1.0]])
  order, owner = jnp.asarray([[0, 2, 1]], jnp.int32), jnp.asarray([[0, 1, 2]], jnp.int32)

  def out(gate):
    inner = tk.fold(outer, tk.Plan(owner=owner, order=order, gate=gate))
    return tk.bypass(outer, inner.replace(x=inner.x + 3.0)).x[..., 0]

  np.testing.assert_allclose(out(gate), [[4, 1, 4]])
  np.testing.assert_allclose(jax.jacobian(lambda g: out(g)[0])(gate)[:, 0], 3 * np.eye(3))


def test_scope_over_several_blocks():
  # SkipViT: behind block 0 nine tokens go through blocks 1 and 2, the others wait; from block 3 on all are back.
  skip = dict(reducer="topk", score="token_norm", place="around", layers=(1,), until=2, keep=9)
  module, params, images = small(dict(skip=skip))
  assert module.sites.counts() == (17, 9, 17, 17)
  profile = module.sites.profile(16, 2)
  assert (profile.attention, profile.mlp) == ((17, 9, 9, 17), (17, 9, 9, 17))
  run = jax.jit(lambda mode: module.apply({"params": params}, images, mode=mode), static_argnums=0)
  gathered, masked = run("gather"), run("mask")
  np.testing.assert_allclose(masked.tokens.x, gathered.tokens.x, atol=1e-5)
  waits = np.asarray(gathered.aux["tokens/2"] == gathered.aux["tokens/0"]).all(-1)
  assert (waits.sum(1) == 8).all()
  assert not np.asarray(gathered.aux["tokens/3"] == gathered.aux["tokens/2"]).all(-1).any()


@pytest.mark.parametrize(
  "sites, words",
  [
    (dict(a=dict(reducer="topk", place="around", layers=(1,), until=4, keep=9)), "until=4 is the last block"),
    (dict(a=dict(reducer="topk", layers=(1,), until=2, keep=9)), "it needs place='around'"),
    (
      dict(
        a=dict(reducer="topk", place="around", layers=(1,), until=3, keep=9),
        b=dict(reducer="router", layers=(2,), keep=5),
      ),
      "lies in the scope of sites.a",
    ),
  ],
)
def test_scope_errors(sites, words):
  with pytest.raises(ValueError, match=words):
    vit.make(defaults.complete({"model": SMALL}).model, sites)


def test_a_capacity_binds_while_a_threshold_learns():
  # The threshold lets all 17 through, the capacity 8 of 16 and CLS; the gate still learns, and the budget sees 9.
  site = dict(reducer="topk", score="token_norm", layers=(1,), rate="learned_threshold", softness=1.0, keep=0.5)
  module, params, images = small(dict(cut=site))

  def cost(params, train):
    output = module.apply({"params": params}, images, train=train, mode="mask", rngs={"dropout": jax.random.key(0)})
    return losses.macs(module, output), (output.tokens.alive.sum(1), reported(output, "cut", "count")[0])

  grads, (alive, count) = jax.jit(jax.grad(lambda p: cost(p, True), has_aux=True))(params)
  assert alive.tolist() == [9, 9] and count == 9.0
  assert cost(params, False)[1][0].tolist() == [9, 9]
  assert grads["block_1"]["reduce"]["cut"]["rate"]["value"] != 0.0


def test_a_learned_rate_is_charged_for_what_it_can_do():
  # Every rate asks for 1 patch and CLS.  ToMe can merge half of what may go: 16 patches, 8, 4, 2 beside CLS.
  module, params, images = small(dict(merge=dict(reducer="tome", layers=(0, 1, 2), rate="learned")))
  for layer in range(3):
    rate = params[f"block_{layer}"]["reduce"]["merge"]["rate"]
    rate["logits"] = jnp.zeros_like(rate["logits"]).at[-1].set(50.0)
  output = jax.jit(lambda p: module.apply({"params": p}, images, mode="mask"))(params)
  assert [float(count) for count in reported(output, "merge", "count")] == [9.0, 5.0, 3.0]
  assert output.tokens.alive.sum(1).tolist() == [3, 3]
  full = defaults.complete(dict(model=SMALL, sites=dict(merge=dict(reducer="tome", layers=(0, 1, 2), rate="learned"))))
  frozen = tokred.freeze(dataclasses.replace(tokred.build(full), params=params))
  assert frozen.counts == (9, 5, 3, 3) and losses.macs(module, output) == pytest.approx(frozen.macs)


def test_a_rate_that_asks_for_the_least_learns_as_any_other():
  """Of 17 tokens ToMe leaves 9 at least, and as many does a rate ask for that is even over 12, 8 and 4 patches, and has
  next to nothing on 16: d n / d theta_k = (c_k - 8) / 3."""
  merge = dict(merge=dict(reducer="tome", layers=(0,), rate="learned", granularity=4))
  (spot,) = vit.make(defaults.complete({"model": SMALL}).model, merge).sites.spots
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 17, 4)), jnp.float32)
  tokens = tk.start(x, 1).replace(feats={"key": x[:, :, None]})

  def count(logits):
    params = {"params": {"rate": {"logits": logits}}}
    return reduce.Step(spot).apply(params, tokens, None, train=True, mode="mask")[1]["count"]

  value, slope = jax.jit(jax.value_and_grad(count), compiler_options=quick())(jnp.asarray([-30.0, 0, 0, 0]))
  assert value == 9
  np.testing.assert_allclose(slope, [0, 4 / 3, 0, -4 / 3], atol=1e-6)


def test_a_threshold_does_not_stop_a_decision_from_learning():
  site = dict(reducer="dyt", layers=(1,), rate="threshold", threshold=0.0, keep=1.0, hidden=4)
  module, params, images = small(dict(skip=site))
  weights = defaults.complete(dict(loss=dict(global_ratio=1.0))).loss
  rngs = {"dropout": jax.random.key(0), "reduce": jax.random.key(1)}

  def loss(params):
    output = module.apply({"params": params}, images, train=True, mode="mask", rngs=rngs)
    return losses.reports(weights, module, output)["global_ratio"]

  grads = jax.jit(jax.grad(loss))(params)["block_1"]["reduce"]["skip"]["dyt"]["dispatcher"]
  assert np.abs(grads["kernel"]).max() > 0


def test_learned_threshold_trains_freezes_and_ships():
  site = dict(reducer="topk", score="token_norm", layers=(1, 2), rate="learned_threshold", threshold=4.0, softness=1.0)
  module, params, images = small(dict(cut=site))
  value = lambda p, i: p[f"block_{i}"]["reduce"]["cut"]["rate"]["value"]

  def loss(params, target):
    output = module.apply({"params": params}, images, train=True, mode="mask", rngs={"dropout": jax.random.key(0)})
    return losses.budget(losses.macs(module, output), losses.dense_macs(module), target), output

  (_, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick())(params, 0.3)
  assert value(grads, 1) < 0 and value(grads, 2) < 0  # a higher threshold costs less
  counts = np.asarray(output.tokens.alive.sum(1))
  assert (counts < 17).any()
  full = defaults.complete(dict(model=SMALL, sites=dict(cut=site)))
  frozen = tokred.freeze(dataclasses.replace(tokred.build(full), params=params))
  assert frozen.config.sites.cut.rate == "threshold" and "rate" not in frozen.params["block_1"].get("reduce", {})
  shipped = frozen.inspect(images)
  np.testing.assert_array_equal(shipped.tokens.alive.sum(1), counts)
  np.testing.assert_allclose(shipped.features, output.features, atol=1e-5)


def test_freeze_drops_what_only_training_uses():
  sites = dict(slim=dict(reducer="sit", layers=(1,), keep=0.5), back=dict(reducer="sit_reverse", layers=(2, 3)))
  full = defaults.complete(dict(model=SMALL, sites=sites))
  model = tokred.build(full).init()
  frozen = tokred.freeze(model)
  assert list(frozen.config.sites) == ["slim"] and "reduce" not in frozen.params["block_3"]
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  np.testing.assert_allclose(frozen(images).tokens.x, model(images).tokens.x, atol=1e-6)


def test_predictor_learns_the_choice_and_makes_it():
  # Loss of a fresh predictor by hand: BCE of its logits against top-C, mean over the 16 free tokens of each image.
  module, params, images = small(dict(mod=dict(reducer="router", layers=(1,), keep=9, predictor=0.5)))
  run = jax.jit(lambda p, train: module.apply({"params": p}, images, train=train, mode="mask"), static_argnums=1)
  trained, shipped = run(params, True), run(params, False)
  predicted = np.asarray(reported(shipped, "mod", "score")[0])
  for output, score in ((trained, reported(trained, "mod", "score")[0]), (shipped, predicted)):
    chosen = np.asarray(reported(output, "mod", "chosen")[0])[:, 1:]
    assert (chosen.sum(1) == 8).all()
    assert (np.where(chosen, score[:, 1:], np.inf).min(1) >= np.where(chosen, -np.inf, score[:, 1:]).max(1)).all()
  chosen = np.asarray(reported(trained, "mod", "chosen")[0])
  wanted = 0.5 * np.mean(np.where(chosen, np.log1p(np.exp(-predicted)), np.log1p(np.exp(predicted)))[:, 1:], axis=1)
  np.testing.assert_allclose(reported(trained, "mod", "loss_predictor")[0], wanted, rtol=1e-5)
  named = losses.terms(defaults.default().loss, module, trained, jax.nn.one_hot(jnp.asarray([0, 1]), 3), None, None)
  np.testing.assert_allclose(named["reduce/mod/loss_predictor"], wanted.mean(), rtol=1e-5)


def test_annealed_temperature():
  # From 4 to 1 over 10 steps: 4 (1/4)^0.5 = 2 half way.  The gate's slope scales with 1 / temperature.
  # That of inference is the option's own.
  select = dict(reducer="dyt", layers=(1,), keep=0.5, hidden=4, temperature=1.0)
  select["anneal"] = (("temperature", 4.0, 1.0, 0, 10),)
  module, params, images = small(dict(route=select))
  assert schedules.annealed(module.sites.spots, 5) == {"route.temperature": 2.0}
  assert [schedules.annealed(module.sites.spots, step)["route.temperature"] for step in (0, 10, 99)] == [4.0, 1.0, 1.0]

  def share(params, keeps):
    rngs = {"reduce": jax.random.key(3)}
    output = module.apply({"params": params}, images, train=True, mode="mask", keeps=keeps, rngs=rngs)
    return reported(output, "route", "kept_share")[0].mean()

  slope = jax.jit(jax.grad(share), compiler_options=quick())

  def bias(temperature):
    grads = slope(params, {"route.temperature": jnp.float32(temperature)})
    return float(grads["block_1"]["reduce"]["route"]["dyt"]["dispatcher"]["bias"][0])

  assert 0 < 100 * bias(100.0) < 1.1 * 0.25 and bias(2.0) > bias(100.0)  # sigmoid' <= 1/4
