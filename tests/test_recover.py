"""The autoencoder's selector, what brings tokens back, and the probe that reads the map."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import MODES, quick

import tokred
from tokred import probe
from tokred import tokens as tk
from tokred.model import forward
from tokred.reducers import autoencoder, recover
from tokred.reducers.cluster import DPCKNN
from tokred.testing import check_reducer

SMALL = dict(variant="mu/4", width=16, depth=3, num_heads=2, mlp_dim=32, image_size=(16, 16), channels=1)
SMALL |= dict(num_classes=10)


def make(x, *, prefix=0, alive=None):
  tokens = tk.start(jnp.asarray(x, jnp.float32), prefix)
  return tokens if alive is None else tokens.replace(mask=jnp.asarray(alive, bool))


def build(**sites):
  data = dict(mean=(0.5,), std=(0.5,), eval_split="test[:20]", train_split="train[:40]")
  return tokred.build(dict(model=SMALL, sites=sites, data=data, eval=dict(batch_size=40))).init(0)


# The autoencoder.


def test_autoencoder_loss():
  """Token 0 is protected.  Squared errors: (1 + 1) / 2 = 1, (0 + 4) / 2 = 2, 0; mean over three 1.  One of three kept.

  share 0.5: 1 + 0.5 max(1/3, 0.5) = 1.25;  share 0.2: 1 + 0.5 / 3 = 1.1667.
  """
  z = jnp.zeros((1, 4, 2))
  again = jnp.asarray([[[9.0, 9.0], [1.0, -1.0], [0.0, 2.0], [0.0, 0.0]]])
  y, free = jnp.asarray([[1.0, 1.0, 0.0, 0.0]]), jnp.asarray([[False, True, True, True]])
  out = autoencoder.Autoencoder(parent=None).loss(z, again, y, free, 0.5)
  np.testing.assert_allclose([out["loss"][0], out["error"][0], out["kept"][0]], [1.25, 1.0, 1 / 3], rtol=1e-6)
  out = autoencoder.Autoencoder(parent=None).loss(z, again, y, free, 0.2)
  np.testing.assert_allclose(out["loss"], 1 + 0.5 / 3, rtol=1e-6)


def test_what_the_autoencoder_aims_at_by_hand():
  """CLS, four tokens and two that are dead; the logits are the bias, whatever the tokens are.

  At (-20, 20) none of the four is drawn, and the hinge is at what `keep` leaves of them, (3 - 1) / 4: 0.5 x 1 / 2.  At
  (20, -20) all are, and 0.5 x 1.  Errors are of normalised tokens, and CLS, which stays, is there to make them up.
  At (0, 0) and tau = 100 a token's slope is p (1 - p) / tau of a p near 1 / 2, up in the logit that keeps.
  """
  reducer = autoencoder.Autoencoder(num_layers=1, num_heads=1, temperature=100.0)
  x = jax.random.normal(jax.random.key(1), (1, 7, 8))
  tokens = make(x, prefix=1, alive=[[True] * 5 + [False] * 2])
  apply = functools.partial(reducer.apply, train=True, mode="mask", rngs={"reduce": jax.random.key(2)})
  begin = functools.partial(reducer.init, train=True, mode="mask")
  params = jax.jit(begin, static_argnums=2, compiler_options=quick())(jax.random.key(0), tokens, 3)["params"]

  def kept(bias, x):
    made = params | {"logits": dict(kernel=jnp.zeros((8, 2)), bias=bias)}
    report = apply({"params": made}, tokens.replace(x=x), 3)[1]
    return report["kept"], report

  slope_and_report = jax.jit(jax.jacobian(kept, has_aux=True), compiler_options=quick())
  report = lambda bias, x=x: slope_and_report(jnp.asarray(bias), x)[1]
  none = [-20.0, 20.0]
  for bias, share, hinge in ((none, 0, 0.25), ([20.0, -20.0], 1, 0.5)):
    out = report(bias)
    np.testing.assert_array_equal(out["kept"], [share])
    np.testing.assert_allclose(out["loss"] - out["error"], [hinge], rtol=1e-5)
  np.testing.assert_allclose(report(none, 3 * x)["error"], report(none)["error"], rtol=1e-4)
  assert abs(report(none, x.at[0, 0].set(x[0, 1]))["error"] - report(none)["error"]) > 1e-4
  slope, _ = slope_and_report(jnp.zeros(2), x)
  np.testing.assert_allclose(100 * slope[0], [0.25, -0.25], rtol=0.01)


def test_place_code():
  """Width 5, two frequencies 1 and 10000^(-1/2) = 0.01: sin 2, sin 0.02, cos 2, cos 0.02, and a zero."""
  code = autoencoder.place_code(jnp.asarray([[2]]), 5)
  np.testing.assert_allclose(code[0, 0], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02), 0], rtol=1e-5)


@pytest.fixture(scope="module")
def learned():
  """A selector that has seen images whose tokens 4 to 7 are always the same, and 0 to 3 never."""
  reducer = autoencoder.Autoencoder(num_layers=1, num_heads=1)
  known = jax.random.normal(jax.random.key(1), (1, 4, 8))

  def draw(key):
    news = jax.random.normal(key, (16, 4, 8))
    return make(jnp.concatenate([news, jnp.broadcast_to(known, news.shape)], axis=1))

  params = reducer.init(jax.random.key(0), draw(jax.random.key(0)), 4, train=True, mode="mask")
  optimizer = optax.adam(1e-2)

  def loss(params, key):
    data, noise = jax.random.split(key)
    _, report = reducer.apply(params, draw(data), 4, train=True, mode="mask", rngs={"reduce": noise})
    return report["loss"].mean()

  def step(state, key):
    params, moments = state
    value, grads = jax.value_and_grad(loss)(params, key)
    updates, moments = optimizer.update(grads, moments)
    return (optax.apply_updates(params, updates), moments), value

  keys = jax.random.split(jax.random.key(2), 300)
  (params, _), values = jax.jit(functools.partial(jax.lax.scan, step))((params, optimizer.init(params)), keys)
  return reducer, params, draw(jax.random.key(3)), values


def test_autoencoder_keeps_what_cannot_be_reconstructed(learned):
  reducer, params, tokens, losses = learned
  assert losses[-20:].mean() < 0.5 * losses[0]
  gathered, _ = reducer.apply(params, tokens, 4, train=False, mode="gather")
  assert (gathered.position < 4).mean() > 0.9  # by chance it is a half
  assert gathered.x.shape == (16, 4, 8)


def test_autoencoder_learns_on_frozen_features(learned):
  reducer, params, tokens, _ = learned

  def loss(params, x):
    rngs = {"reduce": jax.random.key(0)}
    _, report = reducer.apply(params, tokens.replace(x=x), 4, train=True, mode="mask", rngs=rngs)
    return report["loss"].sum()

  grads, slope = jax.jit(jax.grad(loss, (0, 1)), compiler_options=quick())(params, tokens.x)
  assert not slope.any()
  flat = jax.tree_util.tree_leaves_with_path(grads)
  assert all(np.isfinite(leaf).all() for _, leaf in flat)
  reached = {str(path[1]) for path, leaf in flat if (leaf != 0).any()}
  assert reached >= {"['selector']", "['logits']", "['reconstructor']"}


def test_autoencoder_freezes_without_its_reconstructor():
  model = build(pick=dict(reducer="autoencoder", place="output", keep=0.5, layers=(), num_heads=1))
  frozen = tokred.freeze(model)
  assert set(model.params["reduce"]["pick"]["autoencoder"]) - set(frozen.params["reduce"]["pick"]["autoencoder"]) == {
    "reconstructor"
  }
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
  np.testing.assert_array_equal(frozen(images).logits, model(images).logits)
  assert frozen(images).tokens.x.shape[1] == 9


# HoT's recovery.

QUERIES = np.asarray([[np.sqrt(2) * np.log(3), 0.0], [0.0, 1.0], [0.0, -1.0]], np.float32)


def identity(queries):
  """Parameters of Recover whose projections change nothing."""
  head = dict(kernel=np.eye(2, dtype=np.float32)[:, None], bias=np.zeros((1, 2), np.float32))
  out = dict(kernel=np.eye(2, dtype=np.float32)[None], bias=np.zeros(2, np.float32))
  return {"params": dict(queries=queries, attn=dict(query=head, key=head, value=head, out=out))}


@pytest.mark.parametrize("mode", MODES)
def test_recover(mode):
  """Keys (1, 0) and (0, 0), of three source tokens; the third token is dead in mask mode, and holds NaN.

  Query 0: logits sqrt(2) ln 3 (1, 0) / sqrt(2) = ln 3, 0: weights 3/4, 1/4; e + (0.75, 0).
  Queries 1 and 2: logits 0, 0: weights 1/2; (0, 1) + (0.5, 0) and (0, -1) + (0.5, 0).
  """
  x = [[[1.0, 0.0], [0.0, 0.0], [np.nan, np.nan]]]
  tokens = make(x, alive=[[1, 1, 0]]).replace(owner=jnp.asarray([[1, -1, 0]], jnp.int32))
  if mode == "gather":
    tokens = jax.tree.map(lambda a: a[:, :2], tokens.replace(owner=tokens.mask)).replace(owner=tokens.owner)
  out, _ = recover.Recover(num_heads=1).apply(identity(QUERIES), tokens, 3, train=False, mode=mode)
  want = [[np.sqrt(2) * np.log(3) + 0.75, 0.0], [0.5, 1.0], [0.5, -1.0]]
  np.testing.assert_allclose(out.x[0], want, rtol=1e-6)
  assert out.alive.all() and not out.protected.any() and out.size.tolist() == [[1.0, 1.0, 1.0]]
  assert out.owner.tolist() == out.position.tolist() == [[0, 1, 2]]


def test_recover_leaves_the_protected_alone():
  """Source tokens 0 and 2 are both the protected token 0, which is that of source token 0."""
  tokens = make([[[5.0, 6.0], [0.0, 0.0]]], prefix=1).replace(owner=jnp.asarray([[0, 1, 0]], jnp.int32))
  out, _ = recover.Recover(num_heads=1).apply(identity(0 * QUERIES), tokens, 3, train=False, mode="gather")
  np.testing.assert_allclose(out.x[0], [[5.0, 6.0], [2.5, 3.0], [2.5, 3.0]])
  assert out.protected.tolist() == [[True, False, False]]


def test_recover_teaches_the_gates():
  """out_0 = sum_j w_j g_j x_j / sum_j w_j g_j with w 3, 1 and g 1, 0: d out_0 / d g_1 = (x_1 - out_0) 1 / 3 = -1/3."""
  tokens = make([[[1.0, 0.0], [0.0, 0.0]]]).replace(owner=jnp.asarray([[0, 1, 1]], jnp.int32))

  def first(gate):
    gated = tokens.replace(mask=gate)
    return recover.Recover(num_heads=1).apply(identity(QUERIES), gated, 3, train=True, mode="mask")[0].x[0, 0, 0]

  np.testing.assert_allclose(jax.grad(first)(jnp.asarray([[1.0, 0.0]])), [[0.0, -1 / 3]], atol=1e-6)


def test_recover_in_a_model():
  """17 tokens, 9 of them in block 1, and 17 again before block 2."""
  cut = dict(reducer="dpcknn", layers=(1,), place="before", keep=9)
  model = build(cut=cut, back=dict(reducer="recover", layers=(2,), place="before"))
  assert model.counts == (17, 9, 17)
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
  masked = forward(model.module, "mask")(model.params, images)
  out = model(images)
  np.testing.assert_allclose(masked.tokens.x, out.tokens.x, atol=1e-5)
  assert out.tokens.x.shape == (2, 17, 16) and (out.tokens.owner == jnp.arange(17)).all()


# HoT's second position.


@pytest.mark.parametrize("mode", MODES)
def test_second_positions(mode):
  """CLS and density peaks 1, 3 of four tokens: the first of them gets 10, the second 20; with one row, only the first.

  Where all stay, nothing is added.
  """
  tokens = make([[[9.0], [0.0], [0.1], [5.0], [5.2]]], prefix=1)
  kept = lambda out: out.x[0, :3, 0] - jnp.asarray([9.0, *LINE_KEPT])
  for rows, want in (([[10.0], [20.0]], [0, 10, 20]), ([[10.0]], [0, 10, 0])):
    module = DPCKNN(slots=len(rows))
    out, _ = module.apply({"params": dict(slots=jnp.asarray(rows))}, tokens, 3, train=False, mode=mode)
    np.testing.assert_allclose(kept(out), want, atol=1e-5)
    whole, _ = module.apply({"params": dict(slots=jnp.asarray(rows))}, tokens, 5, train=False, mode=mode)
    np.testing.assert_array_equal(whole.x, tokens.x)


LINE_KEPT = (0.0, 5.0)  # pairs 0, 0.1 and 5, 5.2: of equal tokens the lower index


def test_second_positions_keep_the_laws_and_start_at_nothing():
  check_reducer(DPCKNN(slots=5), laws=[2, 3, 6, 8], cases=("later",))
  model = build(cut=dict(reducer="dpcknn", layers=(1,), keep=9, slots=8))
  rows = model.params["block_1"]["reduce"]["cut"]["dpcknn"]["slots"]
  assert rows.shape == (8, 16) and not rows.any()
  with pytest.raises(ValueError, match=r"sites\.cut\.slots=-1 must be 0 or more"):
    build(cut=dict(reducer="dpcknn", layers=(1,), keep=9, slots=-1))


# The probe.


@pytest.mark.parametrize(("method", "counts", "final"), [("topk", 33, 33), ("tome", 32, 32), ("hot", 33, 65)])
def test_segment_recipe(method, counts, final):
  """65 tokens; ToMe takes 11 in each of three blocks."""
  spec = importlib.util.spec_from_file_location("segment", Path(__file__).parents[1] / "configs" / "segment.py")
  recipe = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(recipe)
  sites = tokred.build(recipe.get_config(f"method={method}")).module.sites
  assert sites.counts()[-1] == counts and sites.profile(64, 2).final == final
  with pytest.raises(ValueError, match="method='hott' is unknown; valid: dense, topk, tome, hot"):
    recipe.get_config("method=hott")


def test_segments():
  """Patches of 2: means 1, 0.25 (not above), 0, 0.5; an image of class 3."""
  image = np.asarray([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], np.float32)[None, ..., None]
  assert probe.segments(image, np.asarray([3]), 2, 0.25).tolist() == [[4, 0, 0, 4]]


def test_score():
  """Class 0: 2 of 3, class 1: 1 of 2, class 2 does not occur: (2/3 + 1/2) / 2; right 3 of 4."""
  out = probe.score(np.asarray([0, 0, 0, 1]), np.asarray([0, 0, 1, 1]), 3)
  assert out == {"miou": pytest.approx((2 / 3 + 1 / 2) / 2), "accuracy": 0.75}


def test_fit():
  x = np.concatenate([np.random.default_rng(0).normal(size=(60, 2)) + 8 * i for i in range(3)]).astype(np.float32)
  weight, bias = probe.fit(x, np.repeat(np.arange(3), 60), 3, 100)
  assert ((x @ weight + bias).argmax(-1) == np.repeat(np.arange(3), 60)).mean() > 0.98


def test_features():
  """Sources 0 to 3, CLS first; token 1 stands at 1 and represents 2 too; 3 has gone in block 1, with x = (3, 5).

  The final norm, whose epsilon is 3, takes (3, 5) to (-1, 1) / sqrt(1 + 3).
  """
  out = make([[[7.0, 7.0], [1.0, 2.0]]], prefix=1).replace(owner=jnp.asarray([[0, 1, 1, -1]], jnp.int32))
  aux = {"owner/0": jnp.asarray([[0, 1, 1, 2]]), "tokens/0": jnp.asarray([[[0.0, 0.0], [0.0, 0.0], [3.0, 5.0]]])}
  aux |= {"owner/1": out.owner, "tokens/1": out.x}
  norm = dict(scale=jnp.ones(2), bias=jnp.zeros(2))
  maps = probe.features(tokred.nn.vit.Output(None, (), out, None, aux), norm, 3.0, 1)
  np.testing.assert_allclose(maps["restored"][0], [[1, 2], [1, 2], [-0.5, 0.5]], atol=1e-5)
  np.testing.assert_allclose(maps["zeros"][0], [[1, 2], [0, 0], [0, 0]])


def test_probe_of_a_model():
  model = build(merge=dict(reducer="tome", layers=(1,), r=6))
  out = probe.probe(model, 40, steps=20)
  assert out.keys() == {"restored", "zeros"}
  assert all(0 <= value <= 1 for row in out.values() for value in row.values())
  dense = probe.probe(dataclasses.replace(build(), params=model.params), 40, steps=20)
  assert dense["restored"] == dense["zeros"]


def test_probe_of_what_does_not_classify():
  model = tokred.build(dict(model=dict(SMALL, name="vlm", num_classes=0), llm=dict(depth=1)))
  with pytest.raises(ValueError, match=r"config.model.name='vlm' does not classify images; valid: vit"):
    probe.probe(model)
  with pytest.raises(SystemExit, match=r"tokred.probe: --examples=-1; valid: 0 \(all of them\) or more"):
    probe.main(["--workdir=nowhere", "--examples=-1"])


def test_probe_of_a_model_without_a_norm_of_tokens():
  model = tokred.build(dict(model=dict(SMALL, final_norm="pooled", pool="avg"))).init()
  with pytest.raises(ValueError, match=r"config.model.final_norm='pooled' leaves no norm .*valid: tokens"):
    probe.probe(model)
