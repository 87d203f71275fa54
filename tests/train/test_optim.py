"""tokred.train.optim: numbers against hand arithmetic, regexes, frozen parameters, every error."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokred.config import default
from tokred.train.optim import ema_update, frozen, layer_factors, make_optimizer, make_schedule, optimizer_names


def optim(**fields):
  config = default().optim
  config.update(dict(name="sgd", lr=0.1, momentum=0.0, schedule="constant", weight_decay=0.0, clip_norm=0.0) | fields)
  return config


def tree():
  return {
    "encoder": {
      "block_0": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])},
      "block_1": {"kernel": jnp.array([[-0.0, 4.0]]), "bias": jnp.array([-1.0])},
    },
    "head": {"kernel": jnp.array([3.0])},
  }


def run(config, params, grads, steps=1, total_steps=10):
  """Parameters after `steps` jitted updates with the same gradients, and the last state."""
  transform, _ = make_optimizer(config, params, total_steps)

  @jax.jit
  def step(params, state):
    updates, state = transform.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = transform.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  return params, state


def ones(params):
  return jax.tree.map(jnp.ones_like, params)


def bits(x):
  return np.asarray(x).view(np.int32).tolist()


# --- schedules


@pytest.mark.parametrize(
  ("schedule", "values"),
  [
    # lr 1, end 0.1, warm-up 4 of 12 steps, so 8 steps of decay
    ("constant", {0: 0.0, 1: 0.25, 2: 0.5, 4: 1.0, 8: 1.0, 12: 1.0}),
    ("linear", {0: 0.0, 3: 0.75, 4: 1.0, 6: 0.775, 8: 0.55, 12: 0.1, 20: 0.1}),  # 6: 1 - 0.9 * 2/8
    ("cosine", {0: 0.0, 4: 1.0, 8: 0.55, 12: 0.1, 20: 0.1, 6: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2}),  # cos(pi/4)
  ],
)
def test_schedule_values(schedule, values):
  f = make_schedule(optim(schedule=schedule, lr=1.0, end_lr=0.1, warmup_steps=4), 12)
  for step, value in values.items():
    np.testing.assert_allclose(f(step), value, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(jax.jit(f)(step), value, rtol=1e-6, atol=1e-7)


def test_schedule_without_warmup_starts_at_lr():
  for name in ("constant", "cosine", "linear"):
    np.testing.assert_allclose(make_schedule(optim(schedule=name, lr=0.3), 5)(0), 0.3, rtol=1e-6)
  assert make_schedule(optim(schedule="cosine", lr=0.0), 5)(2) == 0.0


def test_schedule_drives_the_update():
  # warm-up of 2 steps to 0.1: rates 0, 0.05, 0.1 with gradient 1
  params, _ = run(optim(warmup_steps=2), {"w": jnp.array([1.0])}, {"w": jnp.array([1.0])}, steps=3)
  np.testing.assert_allclose(params["w"], [0.85], rtol=1e-6)


# --- numbers


def test_adamw_by_hand():
  # first step: m_hat = g, v_hat = g^2, so p - lr (g / (|g| + eps) + decay p) = 2 - 0.1 (1 + 0.5 * 2); bias: no decay
  params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
  config = optim(name="adamw", weight_decay=0.5)
  new, _ = run(config, params, {"kernel": jnp.array([4.0]), "bias": jnp.array([4.0])})
  np.testing.assert_allclose(new["kernel"], [1.8], rtol=1e-6)
  np.testing.assert_allclose(new["bias"], [1.9], rtol=1e-6)


def test_lion_by_hand():
  # sign(g) + decay p: 2 - 0.1 (1 + 0.5 * 2)
  new, _ = run(optim(name="lion", weight_decay=0.5), {"kernel": jnp.array([2.0])}, {"kernel": jnp.array([4.0])})
  np.testing.assert_allclose(new["kernel"], [1.8], rtol=1e-6)


def test_sgd_momentum_and_coupled_decay_by_hand():
  # g' = g + 0.5 p: 1 + 1 = 2, p = 2 - 0.1 * 2 = 1.8; then g' = 1.9, m = 0.9 * 2 + 1.9 = 3.7, p = 1.8 - 0.37 = 1.43
  config = optim(momentum=0.9, weight_decay=0.5)
  new, _ = run(config, {"kernel": jnp.array([2.0])}, {"kernel": jnp.array([1.0])}, steps=2)
  np.testing.assert_allclose(new["kernel"], [1.43], rtol=1e-6)
  bias, _ = run(config, {"bias": jnp.array([2.0])}, {"bias": jnp.array([1.0])}, steps=2)  # 2 - 0.1 - 0.19
  np.testing.assert_allclose(bias["bias"], [1.71], rtol=1e-6)


def test_adam_decay_is_coupled():
  # g' = 0 + 0.5 * 2 = 1, whose size Adam forgets: p - lr
  new, _ = run(optim(name="adam", weight_decay=0.5), {"kernel": jnp.array([2.0])}, {"kernel": jnp.array([0.0])})
  np.testing.assert_allclose(new["kernel"], [1.9], rtol=1e-6)


def test_adafactor_decay_is_scaled_by_the_learning_rate():
  params, grads = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}, {"kernel": jnp.ones(1), "bias": jnp.ones(1)}
  plain, _ = run(optim(name="adafactor"), params, grads)
  decayed, _ = run(optim(name="adafactor", weight_decay=0.5), params, grads)
  np.testing.assert_allclose(plain["kernel"] - decayed["kernel"], [0.1 * 0.5 * 2.0], rtol=1e-5)
  assert plain["bias"] == decayed["bias"]


def test_momentum_reaches_every_optimiser_that_takes_it():
  params = {"w": jnp.array([1.0])}
  for name in ("rmsprop", "adafactor", "lars"):
    transform, _ = make_optimizer(optim(name=name, momentum=0.9), params, 10)
    without, _ = make_optimizer(optim(name=name, momentum=0.0), params, 10)
    sizes = [sum(x.size for x in jax.tree.leaves(t.init(params))) for t in (transform, without)]
    assert sizes[0] > sizes[1] or name == "lars", name  # lars has its buffer in any case


@pytest.mark.parametrize("name", optimizer_names())
def test_every_name_trains_with_masks_and_frozen_parameters(name):
  params = tree()
  config = optim(name=name, weight_decay=0.1, momentum=0.9, freeze=("head/.*",), clip_norm=1.0)
  new, _ = run(config, params, jax.tree.map(lambda p: p + 0.3, params))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
  assert not np.array_equal(new["encoder"]["block_0"]["kernel"], params["encoder"]["block_0"]["kernel"])
  assert bits(new["head"]["kernel"]) == bits(params["head"]["kernel"])


def test_names_hold_the_usual_ones():
  assert {"adamw", "adam", "sgd", "lamb", "lion", "adafactor", "rmsprop", "lars"} <= set(optimizer_names())
  assert not {"lbfgs", "scale_by_learning_rate"} & set(optimizer_names())


def test_clip_norm_is_over_the_trainable_gradients():
  # gradient (3, 4) has norm 5 and is scaled to 1; the frozen 1000 must not count
  params = {"a": jnp.zeros(1), "b": jnp.zeros(1), "c": jnp.zeros(1)}
  grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0]), "c": jnp.array([1000.0])}
  new, _ = run(optim(clip_norm=1.0, freeze=("c",)), params, grads)
  np.testing.assert_allclose([new["a"][0], new["b"][0]], [-0.06, -0.08], rtol=1e-6)


# --- regexes


def test_multipliers_scale_the_whole_update_and_the_first_match_counts():
  params, grads = tree(), jax.tree.map(lambda p: p + 0.3, tree())
  base = optim(name="adamw", weight_decay=0.5)
  plain, _ = make_optimizer(base, params, 10)
  rules = ((r"encoder/block_0/.*", 0.25), (r"encoder/.*", 8.0))
  scaled, _ = make_optimizer(optim(name="adamw", weight_decay=0.5, multipliers=rules), params, 10)
  want, _ = plain.update(grads, plain.init(params), params)
  got, _ = scaled.update(grads, scaled.init(params), params)
  for block, factor in (("block_0", 0.25), ("block_1", 8.0)):  # powers of two: exact
    for leaf in ("kernel", "bias"):
      assert bits(got["encoder"][block][leaf]) == bits(factor * want["encoder"][block][leaf])
  assert bits(got["head"]["kernel"]) == bits(want["head"]["kernel"])


def test_regexes_match_the_whole_path():
  params = {"rate": jnp.ones(1), "rate_2": jnp.ones(1)}
  new, _ = run(optim(multipliers=(("rate", 0.0),)), params, ones(params))
  np.testing.assert_allclose([new["rate"][0], new["rate_2"][0]], [1.0, 0.9], rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "adafactor"])
def test_frozen_parameters_are_identical_to_the_bit_and_have_no_state(name):
  params = tree()
  grads = ones(params)
  grads["encoder"]["block_1"]["kernel"] = jnp.array([[jnp.nan, jnp.inf]])  # not even these may leak
  config = optim(name=name, momentum=0.9, weight_decay=0.5, clip_norm=1.0, freeze=(r"encoder/.*",))
  new, state = run(config, params, grads, steps=3)
  for old_leaf, new_leaf in zip(jax.tree.leaves(params["encoder"]), jax.tree.leaves(new["encoder"]), strict=True):
    assert bits(new_leaf) == bits(old_leaf)  # -0.0 among them
  assert np.isfinite(new["head"]["kernel"]).all() and new["head"]["kernel"][0] != 3.0
  assert not any("encoder" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))


def test_freeze_until_holds_then_lets_go_while_moments_are_gathered():
  # held for 2 updates, momentum 0.5 with gradient 1: m = 1, 1.5, 1.75; only the third is applied, lr 0.1
  params = {"backbone": jnp.array([-0.0, 1.0]), "head": jnp.array([1.0])}
  config = optim(momentum=0.5, freeze_until=((r"back.*", 2),))
  held, _ = run(config, params, ones(params), steps=2)
  assert bits(held["backbone"]) == bits(params["backbone"])
  np.testing.assert_allclose(held["head"], [1.0 - 0.1 * 2.5], rtol=1e-6)
  free, _ = run(config, params, ones(params), steps=3)
  np.testing.assert_allclose(free["backbone"], [-0.175, 0.825], rtol=1e-6)


def test_counts_are_scalars_and_shapes_suffice():
  params = tree()
  config = optim(name="adamw", weight_decay=0.1, clip_norm=1.0, freeze=("head/.*",), freeze_until=(("encoder/.*", 3),))
  shapes = jax.eval_shape(lambda: params)
  transform, schedule = make_optimizer(config, shapes, 10)
  state = transform.init(params)
  counts = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32]
  assert counts and all(leaf.shape == () for leaf in counts)
  np.testing.assert_allclose(schedule(3), 0.1, rtol=1e-6)


def test_state_is_deterministic():
  params = tree()
  config = optim(name="adamw", weight_decay=0.1, multipliers=(("head/.*", 2.0),), freeze_until=(("encoder/.*", 1),))
  first, second = (run(config, params, ones(params), steps=2) for _ in range(2))
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, first, second)


# --- EMA


def test_ema_by_hand():
  ema, params = {"w": jnp.array([1.0])}, {"w": jnp.array([3.0])}
  np.testing.assert_allclose(ema_update(ema, params, 0.9)["w"], [1.2], rtol=1e-6)  # 0.9 * 1 + 0.1 * 3
  np.testing.assert_allclose(ema_update(ema, params, 0.9, step=0)["w"], [2.8], rtol=1e-6)  # decay 1/10
  np.testing.assert_allclose(ema_update(ema, params, 0.9, step=8)["w"], [2.0], rtol=1e-6)  # decay 9/18
  np.testing.assert_allclose(jax.jit(ema_update)(ema, params, 0.9, 1000)["w"], [1.2], rtol=1e-6)  # 1001/1010 > 0.9


# --- errors


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(schedule="cosin"), "config.optim.schedule='cosin' is not a schedule; did you mean 'cosine'? valid: constant"),
    (dict(name="adamv"), "config.optim.name='adamv' is not an optimiser of optax that fits; did you mean 'adam"),
    (dict(name="lbfgs"), "config.optim.name='lbfgs' is not an optimiser"),
    (dict(warmup_steps=10), "config.optim.warmup_steps=10 but the run has 10 steps"),
    (dict(warmup_steps=-1), "config.optim.warmup_steps=-1"),
    (dict(lr=-0.1), "config.optim.lr=-0.1 is negative"),
    (dict(end_lr=float("nan")), "config.optim.end_lr=nan"),
    (dict(weight_decay=-1.0), "config.optim.weight_decay=-1.0 is negative"),
    (dict(clip_norm=-1.0), "config.optim.clip_norm=-1.0 is negative"),
    (dict(no_decay=("bais",)), "config.optim.no_decay: 'bais' matches none of the 5 parameters"),
    (dict(freeze=("encoder/blok_0/kernel",)), "config.optim.freeze: 'encoder/blok_0/kernel' matches none"),
    (dict(multipliers=(("hed/.*", 0.1),)), "config.optim.multipliers: 'hed/.*' matches none"),
    (dict(freeze_until=(("zzz", 1),)), "config.optim.freeze_until: 'zzz' matches none"),
    (
      dict(freeze_until=(("head/.*", 3), ("encoder/.*", 10))),
      "config.optim.freeze_until: ('encoder/.*', 10), but the run has 10 steps (config.train.steps or epochs), "
      "and that would never learn; valid: steps below 10, or config.optim.freeze",
    ),
    (dict(freeze=("(",)), "config.optim.freeze: '(' is not a regular expression"),
    (dict(freeze=(".*",)), "config.optim.freeze=('.*',) matches every parameter"),
    (dict(freeze_until=("head/.*", 3)), "config.optim.freeze_until: 'head/.*' is not a (regex, step) pair"),
    (
      dict(multipliers=(("head/.*", -1.0),)),
      "config.optim.multipliers: ('head/.*', -1.0) is not a (regex, factor) pair",
    ),
  ],
)
def test_errors_name_field_and_value(fields, message):
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    make_optimizer(optim(**fields), tree(), 10)
  assert "\n" not in str(error.value)


def test_a_misspelt_path_is_answered_with_near_ones():
  with pytest.raises(ValueError, match="encoder/block_0/kernel"):
    make_optimizer(optim(freeze=("encoder/blok_0/kernel",)), tree(), 10)
  with pytest.raises(ValueError, match="head/kernel"):
    make_optimizer(optim(freeze=("zzz",)), tree(), 10)


def test_default_no_decay_may_match_nothing():
  make_optimizer(optim(name="adamw", weight_decay=0.1), {"w": jnp.ones(1)}, 10)


def test_groups_are_clipped_on_their_own():
  """block_0 has the norm 5, block_1 the norm 10 (zeros aside), the rest (head) 2."""
  grads = {
    "encoder": {
      "block_0": {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0])},
      "block_1": {"kernel": jnp.array([[0.0, 6.0]]), "bias": jnp.array([8.0])},
    },
    "head": {"kernel": jnp.array([2.0])},
  }
  groups = ((".*/block_0/.*", 1.0), (".*/block_1/.*", 20.0))
  zeros = jax.tree.map(jnp.zeros_like, tree())
  new, _ = run(optim(lr=1.0, clip_norm=0.5, clip_groups=groups), zeros, grads)
  np.testing.assert_allclose(new["encoder"]["block_0"]["kernel"], [[-0.6, 0.0]], rtol=1e-6)  # 3 / 5
  np.testing.assert_allclose(new["encoder"]["block_0"]["bias"], [-0.8], rtol=1e-6)
  np.testing.assert_allclose(new["encoder"]["block_1"]["bias"], [-8.0], rtol=1e-6)  # 10 is below 20
  np.testing.assert_allclose(new["head"]["kernel"], [-0.5], rtol=1e-6)  # clip_norm, of the rest alone
  new, _ = run(optim(lr=1.0, clip_groups=groups, freeze=(".*/block_0/kernel",)), zeros, grads)
  np.testing.assert_allclose(new["encoder"]["block_0"]["bias"], [-1.0], rtol=1e-6)  # the frozen has no share: 4 / 4
  np.testing.assert_allclose(new["head"]["kernel"], [-2.0], rtol=1e-6)
  with pytest.raises(ValueError, match=r"config.optim.clip_groups: \('a', -1.0\) is not a \(regex, norm\) pair"):
    make_optimizer(optim(clip_groups=(("a", -1.0),)), tree(), 10)


# --- layer decay


def test_layer_decay_by_path():
  """Two blocks, decay 0.5: embeddings 0.5^3, block_0 0.5^2, block_1 0.5^1, behind them and reducers 1."""
  factors = {
    "patch_embed/kernel": 0.125,
    "pos_embed": 0.125,
    "cls_token": 0.125,
    "registers": 0.125,
    "block_0/attn/qkv/kernel": 0.25,
    "block_0/reduce/s/rate/logits": 1.0,
    "lora/block_0/attn/qkv/kernel/a": 0.25,
    "block_1/mlp/fc1/bias": 0.5,
    "norm/scale": 1.0,
    "head/kernel": 1.0,
    "reduce/out/w": 1.0,
  }
  assert layer_factors(list(factors), 0.5) == list(factors.values())
  assert layer_factors(list(factors), 0.0) == layer_factors(list(factors), 1.0) == [1.0] * len(factors)


def test_layer_decay_counts_a_tower_below_the_language_model():
  """Two blocks of text, one that sees, decay 0.5: embeddings and projector 0.5^3, what leaves the tower 0.5^4."""
  factors = {
    "llm/norm/scale": 1.0,
    "llm/block_1/mlp/fc1/kernel": 0.5,
    "llm/block_0/attn/qkv/kernel": 0.25,
    "llm/block_0/reduce/s/w": 1.0,
    "lora/llm/block_0/attn/qkv/kernel/a": 0.25,
    "llm/embed/embedding": 0.125,
    "projector/fc1/kernel": 0.125,
    "image_newline": 0.125,
    "tower/norm/scale": 0.0625,
    "tower/block_0/mlp/fc1/kernel": 0.03125,
    "tower/pre_norm/scale": 0.015625,
    "tower/patch_embed/kernel": 0.015625,
  }
  assert layer_factors(list(factors), 0.5) == list(factors.values())


def test_layer_decay_scales_the_update_beside_multipliers():
  # lr 0.1, gradient 1: block_0 0.1 * 0.5^2 * 10, block_1 0.1 * 0.5, head 0.1
  zeros = jax.tree.map(jnp.zeros_like, tree())
  new, _ = run(optim(layer_decay=0.5, multipliers=((".*/block_0/.*", 10.0),)), zeros, ones(zeros))
  np.testing.assert_allclose(new["encoder"]["block_0"]["bias"], [-0.25], rtol=1e-6)
  np.testing.assert_allclose(new["encoder"]["block_1"]["bias"], [-0.05], rtol=1e-6)
  np.testing.assert_allclose(new["head"]["kernel"], [-0.1], rtol=1e-6)


@pytest.mark.parametrize(
  ("decay", "params", "message"),
  [(1.5, tree(), "config.optim.layer_decay=1.5; valid: 0 to 1"), (0.5, {"w": 1.0}, "needs parameters named block_0")],
)
def test_layer_decay_errors(decay, params, message):
  with pytest.raises(ValueError, match=message):
    make_optimizer(optim(layer_decay=decay), params, 10)


def test_fixed_parameters_are_frozen_too():
  config, params = optim(name="adamw"), tree()
  transform, _ = make_optimizer(config, params, 10, fixed={"head/kernel"})
  state = transform.init(params)
  updates, _ = transform.update(ones(params), state, params)
  assert bits(optax.apply_updates(params, updates)["head"]["kernel"]) == bits(params["head"]["kernel"])
  assert not any("head" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
  never = frozen(optim(freeze=(".*block_0.*",)), params, fixed={"head/kernel"})
  assert never["head"]["kernel"] and never["encoder"]["block_0"]["bias"] and not never["encoder"]["block_1"]["bias"]
