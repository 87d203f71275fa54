"""Images that keep different numbers of tokens share rows: the same logits, for what the mean image costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokred
from tokred import cost, sharding
from tokred.data import to_device
from tokred.nn import shared_rows

MODEL = dict(variant="mu/4", width=16, depth=3, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=5)
CUT = dict(reducer="topk", score="token_norm", rate="threshold", threshold=40.0, keep=1.0, layers=(1,))
SITES = {
  "topk": CUT | dict(layers=(0, 1)),
  "dymu_merge": dict(reducer="dymu_merge", rate="threshold", threshold=-0.3, keep=1.0, layers=(0, 1, 2)),
  "capacity": dict(reducer="dymu_merge", rate="threshold", threshold=-0.3, keep=(12, 9), layers=(0, 1)),
  "two": dict(
    reducer=("dymu_merge", "topk"), score="column_mean", rate="threshold", threshold=(-0.3, 0.05), keep=(1.0, 1.0),
    layers=(0, 1, 2),
  ),
  "ats": dict(reducer="ats", levels=9, layers=(0, 1), keep=0.8),
  "avit": dict(reducer="avit", layers=(0, 1, 2)),
  "around": CUT | dict(place="around", until=2),
  "mlp": dict(reducer="dyt", rate="threshold", threshold=0.1, keep=1.0, layers=(0, 1), hidden=2),
}  # fmt: skip


def drawn(site, **model):
  """A model whose images keep different numbers of tokens, images, and how many they keep."""
  made = tokred.build(dict(model=MODEL | model, sites=dict(t=site))).init()
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: leaf + 0.5 * rng.normal(size=leaf.shape).astype(np.float32), made.params)
  images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
  images *= np.linspace(0.3, 2.0, 8, dtype=np.float32)[:, None, None, None]
  made = tokred.Model(made.config, made.module, params)
  aux, slots = made.inspect(images).aux, len(made.module.sites.spots) // len(site["layers"])
  alive = [np.asarray(aux["reduce/t/alive"][spot.index]) for spot in made.module.sites.spots]
  return made, images, np.stack(alive[slots - 1 :: slots])  # (layers, images)


def sharing(model, site, mean):
  return model.with_sites(dict(t=site | dict(mean=tuple(float(each) for each in mean))))


def logits(model, images, mode="gather"):
  return np.asarray(model.module.apply({"params": model.params}, images, mode=mode).logits)


def test_who_gets_a_row_by_hand():
  """Column by column: the first tokens of all images, then the second; the last of the fullest image has none."""
  alive = jnp.array([[True, False, True, True], [True, True, False, False]])
  rows = shared_rows.shared(alive, 4)
  assert rows.index.tolist() == [0, 4, 5, 2]
  assert rows.inside.tolist() == [[True, False, True, False], [True, True, False, False]]
  x = jnp.arange(8.0).reshape(2, 4, 1)
  seen = []
  out = rows.run(lambda r: [seen.append(r[0, :, 0].tolist()), r + 0.5][1], x)
  assert seen == [[0.0, 4.0, 5.0, 2.0]]
  assert out[..., 0].tolist() == [[0.5, 0.0, 2.5, 0.0], [4.5, 5.5, 0.0, 0.0]]
  spare = shared_rows.shared(alive, 7)  # rows that nobody needs hold the dead
  assert spare.index.tolist()[:5] == [0, 4, 5, 2, 3] and spare.inside.tolist() == alive.tolist()


@pytest.mark.parametrize("name", SITES)
def test_logits_are_the_same(name):
  model, images, alive = drawn(SITES[name])
  assert len(set(alive.sum(0).tolist())) > 1, "images shall differ"
  shared = sharing(model, SITES[name], alive.mean(1))
  got = logits(shared, images)
  np.testing.assert_allclose(got, logits(model, images), atol=1e-5)
  np.testing.assert_allclose(got, logits(shared, images, "mask"), atol=1e-4)


def test_what_is_spared_by_hand():
  """Behind block 1 of S/16: rows of the MLP there, and of all but attention itself in block 2."""
  site = dict(CUT, place="attn", layers=(0,))
  flops, told, mean, number = {}, {}, 50.0, 4
  for name, fields in dict(apart={}, shared=dict(mean=mean)).items():
    made = tokred.build(dict(model=dict(variant="S/16", depth=2), sites=dict(t=site | fields)))
    images = jax.ShapeDtypeStruct((number, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(lambda made=made: made.init().params)
    run = lambda p, x, made=made: made.module.apply({"params": p}, x, mode="gather").logits
    flops[name], told[name] = cost.measured(run, params, images), made.flops
  spared = 2 * (197 - mean) * number * (2 * 2 * 384 * 1536 + 4 * 384 * 384)  # two MLPs, one attention's projections
  assert 0.97 < (flops["apart"] - flops["shared"]) / spared < 1.05
  for name in flops:
    assert number * told[name] == pytest.approx(flops[name], rel=0.01), name


def test_a_batch_with_more_tokens_than_rows():
  """Eight alike: the tokens that have no row are their last, the lowest of the score; to CLS they are not there."""
  site = CUT | dict(place="after", threshold=55.0)
  model, images, alive = drawn(site)
  wide = int(np.argmax(alive[0]))
  alike, count = np.repeat(images[wide : wide + 1], 8, axis=0), int(alive[0, wide])
  assert count > 4
  fewer = sharing(model, site, [count - 2])
  fixed = model.with_sites(dict(t=dict(reducer="topk", score="token_norm", keep=count - 2, layers=(1,), place="after")))
  np.testing.assert_allclose(logits(fewer, alike), logits(fixed, alike), atol=1e-5)
  assert np.abs(logits(fewer, alike) - logits(model, alike)).max() > 1e-4
  counts = fewer.inspect(alike).aux["reduce/t/alive"][0]
  assert counts.tolist() == [count] * 8  # they go round, and are not gone


def test_an_image_alone_has_room():
  """There are never fewer rows than one image has places, whatever the mean: who serves one by one loses nothing."""
  site = CUT | dict(place="after", threshold=55.0)
  model, images, alive = drawn(site)
  fewer = sharing(model, site, [2.0])
  for image in images[:, None]:
    np.testing.assert_allclose(logits(fewer, image), logits(model, image), atol=1e-5)
  assert alive.max() > 4


def test_eight_devices_equal_one():
  model, images, alive = drawn(SITES["dymu_merge"])
  shared = sharing(model, SITES["dymu_merge"], alive.mean(1))
  mesh = sharding.make_mesh(dict(data=8, fsdp=1, tensor=1))
  run = jax.jit(lambda params, x: shared.module.apply({"params": params}, x, mode="gather").logits)
  batch, _ = next(iter(to_device([dict(image=images)], sharding.batch_sharding(mesh), prefetch=0)))
  np.testing.assert_allclose(run(shared.params, batch["image"]), logits(model, images), atol=1e-5)


def test_gradients_are_the_same():
  model, images, alive = drawn(SITES["dymu_merge"])
  shared = sharing(model, SITES["dymu_merge"], alive.mean(1))

  def gradient(made):
    loss = lambda params: jnp.sin(made.module.apply({"params": params}, images, mode="gather").logits).sum()
    return jax.jit(jax.grad(loss))(model.params)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient(shared), gradient(model))


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(mean="x"), r"sites.t.mean='x' must be a number of tokens, 1 or more"),
    (dict(mean=0.5), r"sites.t.mean=0.5 must be a number of tokens, 1 or more"),
    (dict(mean=(3, 4)), r"sites.t.mean=\(3, 4\) must be a number of tokens, 1 or more, or one for each layer"),
    (dict(rate="fixed", threshold=None, mean=5), r"sites.t.mean=5, but it is for images that keep different numbers"),
    (dict(reducer="spa", score=None, rate=None, threshold=None, place="around", mean=5), r"sites.t.mean=5, but it is"),
  ],
)
def test_errors(fields, message):
  site = {name: value for name, value in (CUT | fields).items() if value is not None}
  with pytest.raises(ValueError, match=message):
    tokred.build(dict(model=MODEL, sites=dict(t=site)))


def test_a_tower_of_a_vision_language_model():
  """Its images, some of which are padding of rows that have fewer, share rows as any others do."""
  config = dict(
    model=dict(MODEL, name="vlm", num_classes=0),
    llm=dict(vocab=40, width=32, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=48, image_token=3),
  )
  apart, site = tokred.build(config).init(), SITES["dymu_merge"] | dict(threshold=-0.8)
  apart = apart.with_sites(dict(t=site))
  ids = np.array([[5, *[3] * 16, 6, *[0] * 16, 0, 0], [8, *[3] * 16, 9, *[3] * 16, 11, 12]], np.int32)
  images = np.random.default_rng(0).normal(size=(2, 2, 16, 16, 3)).astype(np.float32)
  alive = [np.asarray(n) for n in apart.inspect(ids, images, mask=ids > 0).aux["reduce/t/alive"].values()]
  assert len(set(alive[-1].tolist())) > 1
  shared = sharing(apart, site, np.mean(alive, axis=1))
  want, got = (np.asarray(model(ids, images, ids > 0))[ids > 0] for model in (apart, shared))
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-5)
