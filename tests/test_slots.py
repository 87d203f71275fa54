"""Many to many: Token Transforming, self-slimming, and what gates learn in them and in semantic tokens."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import MODES, model, needs_golden, quick, recorded
from test_fusion import both, make, run

import tokred
from tokred import config as defaults
from tokred import losses
from tokred import tokens as tk
from tokred.nn import vit
from tokred.reducers import sit, stvit, transforming

RNGS = {"reduce": jax.random.key(0), "dropout": jax.random.key(1)}


def begin(reducer, tokens, keep):
  """Parameters as they are made."""
  init = functools.partial(reducer.init, jax.random.key(0), keep=keep, train=False, mode="gather")
  return jax.jit(init, compiler_options=quick())(tokens)["params"]


# Token Transforming.


def test_transforming():
  """Anchors 1 and 3 of four tokens behind CLS, importance (0.4, 0.1, 0.3, 0.1), tau = 0.5.

  x_1 = (1, 0), x_2 = (2, 0), x_3 = (0, 1), x_4 = (0, 3): cosines are 1 within a pair, 0 between.  Row of anchor 1,
  with e = exp(2): (0.4 e, 0.1 e, 0.3, 0.1) / (0.5 e + 0.4) = (0.721847, 0.180462, 0.073269, 0.024423), so
  y_1 = (0.721847 + 2 x 0.180462, 0.073269 + 3 x 0.024423) = (1.082770, 0.146537).  Row of anchor 3:
  (0.4, 0.1, 0.3 e, 0.1 e) / (0.4 e + 0.5) = (0.115753, 0.028938, 0.641481, 0.213827), y_3 = (0.173630, 1.282962).
  All sizes are 1: so are the rows' sums, and both slots get 4 / 2.
  """
  x = [[[9, 9], [1, 0], [2, 0], [0, 1], [0, 3]]]
  tokens = make(x, prefix=1, cls_attention=[[0.1, 0.4, 0.1, 0.3, 0.1]])
  out, _ = both(transforming.Transforming(temperature=0.5), tokens, 3)
  np.testing.assert_allclose(out.x[0], [[9, 9], [1.082770, 0.146537], [0.173630, 1.282962]], atol=1e-5)
  np.testing.assert_allclose(out.size[0], [1, 2, 2], rtol=1e-6)
  assert out.owner[0].tolist() == [0, 1, 1, 2, 2] and out.position[0].tolist() == [0, 1, 3]


def test_transforming_cold_is_a_partition():
  """As tau goes to 0 every slot is its anchor's own value: cos(x_i, x_i) beats all that is not parallel to it."""
  x = np.random.default_rng(0).normal(size=(2, 9, 4))
  attention = jax.nn.softmax(jnp.asarray(np.random.default_rng(1).normal(size=(2, 9))))
  tokens = make(x, prefix=1, cls_attention=attention)
  out, _ = both(transforming.Transforming(temperature=1e-4), tokens, 5)
  np.testing.assert_allclose(out.x, tk.take(tokens.x, out.position), atol=1e-5)
  np.testing.assert_allclose(out.size.sum(1), 9, rtol=1e-6)


# Self-slimming.


def slimming(arrays):
  """The authors' parameters in our trees."""
  dense = lambda name: {"kernel": arrays[f"{name}.weight"].T, "bias": arrays[f"{name}.bias"]}
  norm = lambda name: {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}
  slim = dict(norm=norm("tsm.weight.0"), in_proj=dense("tsm.weight.1"), scale=arrays["tsm.scale"].reshape(()))
  slim |= dict(slots=arrays["tsm.weight.3.weight"].T)  # without its bias, which cancels
  reverse = dict(norm1=norm("rtsm.norm1"), token_mlp=dense("rtsm.mlp1.fc2"), norm2=norm("rtsm.norm2"))
  reverse |= dict(slots=arrays["rtsm.mlp1.fc1.weight"], bias=arrays["rtsm.mlp1.fc1.bias"])
  reverse |= dict(mlp1=dense("rtsm.mlp2.fc1"), mlp2=dense("rtsm.mlp2.fc2"))
  return {"params": slim}, {"params": reverse}


@needs_golden
@pytest.mark.parametrize("mode", MODES)
def test_sit(mode):
  arrays, settings = recorded("fn_sit")
  slim, reverse = slimming(arrays)
  kept = settings["kept"]
  out, _ = run(sit.SiT(), make(arrays["x"]), kept, mode, slim)
  np.testing.assert_allclose(out.x[:, :kept], arrays["slim"], atol=1e-5)
  if mode == "mask":
    assert not out.mask[:, kept:].any() and out.mask[:, :kept].all()
  back, report = run(sit.SiTReverse(), out, kept, mode, reverse)
  np.testing.assert_array_equal(back.x, out.x)
  np.testing.assert_allclose(report["recovered"], arrays["recovered"], atol=1e-5)


@needs_golden
def test_sit_in_mask_mode_takes_a_traced_count():
  arrays, _ = recorded("fn_sit")
  slim, _ = slimming(arrays)
  apply = functools.partial(sit.SiT().apply, slim, make(arrays["x"]), train=False, mode="mask")
  masked, _ = jax.jit(apply, compiler_options=quick())(jnp.int32(5))
  np.testing.assert_allclose(masked.x[:, :5], arrays["slim"][:, :5], atol=1e-5)
  assert masked.mask.sum(1).tolist() == [5, 5]
  with pytest.raises(ValueError, match=r"keep=9, but the parameters are of 7 slots"):
    run(sit.SiT(), make(arrays["x"]), 9, "gather", slim)


def slots(logits):
  """Parameters that make the slots' logits of tokens x = (1, -1) and (-1, 1) what they are asked to be.

  LN of these is (1, -1) and (-1, 1), up to 1e-5; M1 has one row (10, 0): h = 10 or -10, GELU(h) = 10 or 0.
  """
  slots = jnp.asarray(logits, jnp.float32)[None] / 10
  proj = dict(kernel=jnp.asarray([[10.0], [0.0]]), bias=jnp.zeros(1))
  norm = dict(scale=jnp.ones(2), bias=jnp.zeros(2))
  return {"params": dict(norm=norm, in_proj=proj, slots=slots, scale=jnp.float32(1))}


def test_sit_by_hand():
  """Logits of the two slots are (log 3, -log 3) for the token (1, -1) and (0, 0) for (-1, 1).

  Softmax over tokens: slot 0 takes 3/4 of (1, -1) and 1/4 of (-1, 1), which is (0.5, -0.5); slot 1 the reverse.
  Token 1 weighs most in slot 0, token 2 in slot 1; free sizes 1 and 1 stay 2 in sum.  CLS leaves the last column, with
  its logit of 5, unused.
  """
  tokens = make([[[7, 7], [1, -1], [-1, 1]]], prefix=1)
  log3 = math.log(3)
  out, _ = both(sit.SiT(), tokens, 3, slots([log3, -log3, 5.0]))
  np.testing.assert_allclose(out.x[0], [[7, 7], [0.5, -0.5], [-0.5, 0.5]], atol=1e-4)
  np.testing.assert_allclose(out.size[0], [1, 1, 1], rtol=1e-5)
  assert out.owner[0].tolist() == [0, 1, 2] and out.protected[0].tolist() == [True, False, False]
  two, _ = both(sit.SiT(), tokens, 2, slots([log3, 5.0]))
  assert two.owner[0].tolist() == [0, 1, 1]
  np.testing.assert_allclose(two.size[0], [1, 2], rtol=1e-5)


def test_sit_needs_a_count_to_begin_with():
  with pytest.raises(ValueError, match="must be a Python int where parameters are made"):
    jax.eval_shape(
      lambda keep: sit.SiT().init(jax.random.key(0), make(np.zeros((1, 4, 2))), keep, train=False, mode="mask"),
      jnp.int32(2),
    )


def test_sit_in_a_model():
  """int(P 0.5^i) slots and CLS; the reverse head acts in training only, and recovers the patches of each block."""
  sites = dict(
    slim=dict(reducer="sit", layers=(0, 1), keep=(0.5, 0.25)),
    undo=dict(reducer="sit_reverse", layers=(2,)),
  )
  module = model("public_vit", sites)
  assert module.sites.counts() == (33, 17, 17, 17, 17, 17)
  shape = lambda **kwargs: jax.eval_shape(
    functools.partial(module.init_with_output, jax.random.key(0), **kwargs), jnp.zeros((2, 64, 64, 3))
  )[0]
  assert shape(train=True, mode="mask").aux["reduce/undo/recovered"][0].shape == (2, 64, 96)

  slim = dict(reducer="sit", layers=(1,), keep=0.5, place="before", reverse=True)
  with pytest.raises(ValueError, match=r"sites\.slim.*reverse=True at place='before'.*'after'"):
    model("public_vit", dict(slim=slim))


@pytest.mark.thorough
def test_sit_in_stages():
  """The same slots with and without a head of their own that undoes them, and the head is SiTReverse on the slots.

  64 patches, int(64 0.5^i) slots and CLS behind block i - 1.  Behind each of the six blocks there is a head, and
  freezing drops them all: 33, 17 and 9 tokens come out as before.
  """
  slim = dict(reducer="sit", layers=(0, 1, 2), keep=(0.5, 0.25, 0.125), reverse=True)
  sites = dict(slim=slim, back=dict(reducer="sit_reverse", layers=(3, 4, 5)))
  config = dict(variant="mu/8", width=16, depth=6, num_heads=2, mlp_dim=32, image_size=(64, 64), num_classes=3)
  whole = tokred.build(dict(model=config, sites=sites)).init(0)
  assert whole.counts == (33, 17, 9, 9, 9, 9)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 3)), jnp.float32)
  run = functools.partial(whole.module.apply, {"params": whole.params}, images, train=True, rngs=RNGS)
  outs = {mode: jax.jit(functools.partial(run, mode=mode), compiler_options=quick())() for mode in MODES}
  recovered = {mode: losses.reported(whole.module, out, "recovered") for mode, out in outs.items()}
  assert [spot.layer for spot in recovered["gather"]] == [0, 1, 2, 3, 4, 5]
  for spot, found in recovered["gather"].items():
    assert found.shape == (2, 64, 16)
    np.testing.assert_allclose(recovered["mask"][spot], found, atol=5e-5)
  np.testing.assert_allclose(outs["mask"].logits, outs["gather"].logits, atol=1e-5)
  own = whole.params["block_1"]["reduce"]["slim"]["sit"]["sit_reverse"]
  leaving = tk.start(outs["gather"].aux["tokens/1"], 1).replace(owner=outs["gather"].aux["owner/1"])
  _, alone = run_reverse(own, leaving, 17)
  second = next(found for spot, found in recovered["gather"].items() if spot.layer == 1)
  np.testing.assert_allclose(alone["recovered"], second, atol=1e-5)
  frozen = tokred.freeze(whole)
  assert set(frozen.config.sites) == {"slim"} and frozen.counts == whole.counts
  assert "sit_reverse" not in str(jax.tree_util.tree_structure(frozen.params))
  np.testing.assert_array_equal(frozen(images).logits, whole(images).logits)


def run_reverse(params, tokens, keep):
  return sit.SiTReverse().apply({"params": params}, tokens, keep, train=True, mode="gather")


def test_recalibration():
  """Layer 1: (1 + 4) / 2 = 2.5; layer 2: 9 / 1 = 9; mean 5.75."""
  recovered = [jnp.asarray([[[1.0, 2.0]]]), jnp.asarray([[[3.0]]])]
  teacher = [jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 1))]
  np.testing.assert_allclose(losses.recalibration(recovered, teacher), 5.75)


@pytest.mark.parametrize("site", [dict(reducer="sit", keep=0.5, reverse=True), dict(reducer="sit_reverse")])
def test_recalibration_at_the_output(site):
  """What is slimmed behind the last block is taught by what leaves that block of the teacher; the first as it is."""
  fields = dict(variant="mu/8", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(32, 32), num_classes=3)
  config = defaults.complete(dict(model=fields, sites=dict(s=dict(site, place="output")), loss=dict(recalibration=2.0)))
  module = vit.make(config.model, config.sites)
  begin = functools.partial(jax.jit, compiler_options=quick())
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
  student, variables = begin(lambda: module.init_with_output(jax.random.key(0), images, train=True, mode="mask"))()
  other = jax.tree.map(lambda leaf: 1.5 * leaf, variables)
  teacher = begin(lambda: module.dense().apply(other, images))()
  found = losses.terms(config.loss, module, student, jnp.eye(3)[:2], teacher, None)["recalibration"]
  recovered = student.aux["reduce/s/recovered"][0]
  early, late = (
    jnp.square(ours - teacher.aux[f"tokens/{layer}"][:, 1:]).mean()
    for layer, ours in enumerate((student.aux["tokens/0"][:, 1:], recovered))
  )
  assert early > 0.1
  np.testing.assert_allclose(found, (early + late) / 2, rtol=1e-5)
  short = dataclasses.replace(student, aux=student.aux | {"reduce/s/recovered": {0: recovered[:, :9]}})
  with pytest.raises(ValueError, match=r"sites.s.patches=9, but the grid has 16: set it to that or drop it"):
    losses.terms(config.loss, module, short, jnp.eye(3)[:2], teacher, None)


@pytest.mark.parametrize(
  "size, registers, keep, patches", [((32, 64), 0, 0.5, 32), ((32, 64), 0, 7, 32), ((16, 16), 4, 6, 4)]
)
@pytest.mark.parametrize("own", [False, True])
def test_what_was_slimmed_comes_back_on_any_grid(size, registers, keep, patches, own):
  """The site tells how many tokens stand before the patches: on 4 x 8, and on 2 x 2 behind CLS and four registers."""
  slim, back = dict(reducer="sit", layers=(0,), keep=keep), dict(back=dict(reducer="sit_reverse", layers=(1,)))
  sites = dict(slim=dict(slim, reverse=True)) if own else dict(slim=slim, **back)
  fields = dict(variant="mu/8", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=size, num_registers=registers)
  module = vit.make(defaults.complete(dict(model=fields)).model, sites)
  init = functools.partial(module.init_with_output, train=True, mode="gather")
  out, variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((2, *size, 3)))
  (recovered,) = out.aux[f"reduce/{'slim' if own else 'back'}/recovered"].values()
  assert recovered.shape == (2, patches, 16)
  block = variables["params"]["block_0" if own else "block_1"]["reduce"]
  head = block["slim"]["sit"]["sit_reverse"] if own else block["back"]["sit_reverse"]
  assert head["slots"].shape == (4 * patches, module.sites.spots[0].keep - 1 - registers)  # no slot is left out
  out = jax.eval_shape(functools.partial(module.apply, train=False), variables, jnp.zeros((2, *size, 3)))
  assert not any("recovered" in name for name in out.aux)


def test_slots_that_are_dead_have_no_part_in_what_comes_back():
  """Whatever they hold, and whatever the norm makes of zeros: two of three slots recover what two alone do."""
  reducer, x = sit.SiTReverse(patches=3, prefix=0), np.random.default_rng(0).normal(size=(1, 3, 4))
  params = {"params": jax.tree.map(lambda a: a + 0.5, begin(reducer, make(x), 3))}
  two = make(x[:, :2]).replace(owner=jnp.asarray([[0, 1, -1]]))
  _, masked = run(reducer, make(x, alive=[[True, True, False]]), 3, "mask", params)
  _, alone = run(reducer, two, 2, "gather", params)
  np.testing.assert_allclose(masked["recovered"], alone["recovered"], rtol=1e-5)


@pytest.mark.parametrize("patches, keep", [(0, 8), (40, 20)])
def test_a_grid_that_does_not_fit_is_told_of(patches, keep):
  """Alone it takes 33 tokens for 5 x 5 patches and 8 others."""
  want = rf"patches={patches or 25} of the 33 tokens at the input leave no slot among the {keep} that arrive"
  with pytest.raises(ValueError, match=want):
    begin(sit.SiTReverse(patches=patches), make(np.zeros((1, 33, 4))), keep)


# Gates that were learned before.


LEARNED = {
  "sit": (sit.SiT(), {}),
  "avg": (stvit.STViT(pool="avg", layer_scale=0.5), {}),
  "cls_attention": (transforming.Transforming(temperature=0.3), dict(cls_attention=0.05)),
  "token_norm": (transforming.Transforming(temperature=0.3, score="token_norm"), {}),
}


def gated(seed=0, dead=4, **feats):
  """CLS and 4 x 4 tokens, the last of which are dead, and shorter than the others; the mask is float."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(2, 17, 4))
  x[:, 17 - dead :] *= 0.2
  alive = np.arange(17) < 17 - dead
  score = {name: np.where(alive, rng.uniform(0.1, 0.2, (2, 17)), low) for name, low in feats.items()}
  return make(x, prefix=1, **score).replace(mask=jnp.tile(jnp.asarray(alive, jnp.float32), (2, 1)))


@pytest.mark.parametrize("name", LEARNED)
def test_a_gate_learns_what_its_token_gives_to_the_slots(name):
  """Values are those without a gradient, and slopes those of weights that are multiplied by the gate.

  Of the average within a cell, of the attention to it, and of the softmax over tokens.
  """
  reducer, feats = LEARNED[name]
  tokens, keep = gated(**feats), 5
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda a: a + jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype),
    jax.jit(lambda: reducer.init(jax.random.key(0), tokens, keep, train=True, mode="mask"))(),
  )
  by = jnp.asarray(rng.normal(size=(2, keep, 4)), jnp.float32)

  @functools.partial(jax.jit, compiler_options=quick())
  def both_ways(mask):
    def total(mask):
      out, _ = reducer.apply(variables, tokens.replace(mask=mask), keep, train=True, mode="mask")
      return (out.x[:, :keep] * by).sum(), out

    return jax.value_and_grad(total, has_aux=True)(mask)

  (value, out), slope = both_ways(tokens.mask)
  hard, _ = run(reducer, tokens.replace(mask=tokens.mask > 0), keep, "mask", variables)
  for field in ("x", "size", "owner"):
    np.testing.assert_allclose(getattr(out, field), getattr(hard, field), rtol=1e-5, atol=1e-6)
  for i in (1, 6, 12, 13, 16):  # two that are dead
    step = 1e-2 if tokens.mask[0, i] == 0 else -1e-2
    (moved, _), _ = both_ways(tokens.mask.at[0, i].add(step))
    np.testing.assert_allclose((moved - value) / step, slope[0, i], rtol=0.05, atol=2e-3, err_msg=str(i))
    assert abs(slope[0, i]) > 1e-4
  assert not slope[:, 0].any() and jnp.isfinite(slope).all()


@pytest.mark.parametrize("reducer", ["sit", "stvit", "transforming"])
def test_decisions_learn_through_the_slots(reducer):
  """Tokens are selected, and slots made of those that are left, before any attention sees the gates."""
  site = dict(reducer=("gumbel", reducer), place="before", layers=(1,), keep=(0.5, 5))
  fields = dict(variant="mu/8", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(32, 32), num_classes=3)
  module = vit.make(defaults.complete(dict(model=fields)).model, dict(s=site))
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
  rng, init = np.random.default_rng(1), functools.partial(module.init, mode="mask")
  shapes = jax.eval_shape(init, jax.random.key(0), images)
  params = jax.tree.map(
    lambda a: jnp.asarray(rng.normal(size=a.shape) / max((*a.shape[:1], 4)) ** 0.5, a.dtype), shapes
  )
  total = lambda params: (module.apply(params, images, train=True, mode="mask", rngs=RNGS).logits[:, 0]).sum()
  slopes = jax.jit(jax.grad(total), compiler_options=quick())(params)["params"]
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
  assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slopes["block_1"]["reduce"]["s_0_gumbel"]))


def test_attention_tells_what_a_dead_token_would_weigh():
  """A score that is 0 because the gate is has the gate's gradient already: here c_j = 0.2 m_j."""
  tokens, reducer = gated(cls_attention=0.0), transforming.Transforming(temperature=0.3)

  def total(mask):
    feats = {"cls_attention": jnp.where(tokens.mask > 0, tokens.feats["cls_attention"], 0.2 * mask)}
    return reducer.apply({}, tokens.replace(mask=mask, feats=feats), 5, train=True, mode="mask")[0].x[:, 1:5].sum()

  slope = jax.jit(jax.grad(total), compiler_options=quick())(tokens.mask)
  assert (jnp.abs(slope[:, 13:]) > 1e-3).all()


def test_an_anchor_carries_its_gate():
  tokens = gated(cls_attention=0.05)
  reducer = transforming.Transforming()

  def total(mask):
    out, _ = reducer.apply({}, tokens.replace(mask=mask), 5, train=True, mode="mask")
    return out.mask.sum(), out

  slope, out = jax.grad(total, has_aux=True)(tokens.mask)
  best = np.argsort(-np.asarray(tokens.feats["cls_attention"])[:, 1:])[:, :4] + 1
  want = np.zeros((2, 17))
  np.put_along_axis(want, np.concatenate([[[0], [0]], best], axis=1), 1, axis=1)
  np.testing.assert_array_equal(slope, want)
  assert out.mask.dtype == jnp.float32 and out.mask.sum(1).tolist() == [5, 5]


def test_a_gate_learns_what_its_token_makes_of_the_largest():
  """Cell 0 holds 5, 3, 9 (dead) and 1; cell 1 holds 4 alone; cell 2 holds 2, dead.

  Without 5 it is 3, a difference of 2; 3 and 1 make none; with 9 it is 9, 4 more; without 4 nothing is left, which
  counts as 0; and 2 would be 2.
  """
  x = jnp.asarray([[[5.0], [3.0], [9.0], [1.0], [4.0], [2.0]]])
  member = jnp.asarray([[[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]], bool)
  gate = jnp.asarray([[1.0, 1, 0, 1, 1, 0]])
  for learned in (False, True):
    np.testing.assert_array_equal(stvit.largest(x, member, gate, learned)[0, :, 0], [5, 4, 0])
  slope = jax.grad(lambda gate: stvit.largest(x, member, gate, True).sum())(gate)
  np.testing.assert_array_equal(slope[0], [2, 0, 4, 0, 4, 2])


@pytest.mark.parametrize("name", LEARNED)
def test_gates_of_tokens_that_are_all_dead_or_far_away_have_finite_gradients(name):
  """Cells and slots without a living token, and dead tokens a million long."""
  reducer, feats = LEARNED[name]
  for dead in (4, 16):
    tokens = gated(dead=dead, **feats)
    tokens = tokens.replace(x=jnp.where(tokens.mask[..., None] > 0, tokens.x, 5e6 * tokens.x))

    def total(variables, tokens, mask):
      out, _ = reducer.apply(variables, tokens.replace(mask=mask), 5, train=True, mode="mask")
      return jnp.square(out.x).sum() + out.size.sum() + out.mask.sum(), out

    variables = reducer.init(jax.random.key(0), tokens, 5, train=True, mode="mask")
    slopes, out = jax.jit(jax.grad(total, (0, 2), has_aux=True), compiler_options=quick())(
      variables, tokens, tokens.mask
    )  # fmt: skip
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((slopes, out.x, out.size)))
