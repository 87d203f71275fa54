"""Select and Pack: rows that several images share, by hand and against images on their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import MODES, drawn, quick, reported
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokred import config as defaults
from tokred import losses
from tokred import tokens as tk
from tokred.nn import attention, vit
from tokred.reducers.spa import SPA, admit, selection_loss
from tokred.testing.laws import COLLECTIVE

SMALL = dict(variant="mu/4", width=16, depth=4, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)
ROOMY, TIGHT = 15, 4  # slots of an image on average: for all of about 6 that want in, and not for all


def test_pack_by_hand():
  # Image a is 1, 2, 3 and 0 and 2 go; image b is 4, 5, 6 and 1 goes.  Four slots: 1, 3, 5 and one that is dead.
  tokens = tk.start(jnp.arange(1.0, 7.0).reshape(2, 3, 1), 1)
  goes = jnp.asarray([[True, False, True], [False, True, False]])
  out = tk.pack(tokens, goes, 4, 2)
  np.testing.assert_array_equal(out.x[0, :3, 0], [1, 3, 5])
  np.testing.assert_array_equal(out.alive, [[True, True, True, False]])
  np.testing.assert_array_equal(out.feats["state/segment"], [[0, 0, 1, -1]])
  np.testing.assert_array_equal(out.position[0, :3], [0, 2, 1])
  np.testing.assert_array_equal(out.owner, [[0, -1, 1], [-1, 2, -1]])
  assert (tokens.images, out.images) == (1, 2)
  np.testing.assert_array_equal(tk.restore(out.x, out.owner)[..., 0], [[1, 0, 3], [0, 5, 0]])
  back = tk.bypass(tokens, out.replace(x=10 * out.x))
  np.testing.assert_array_equal(back.x[..., 0], [[10, 2, 30], [4, 50, 6]])


@pytest.mark.parametrize("group", [1, 3, 6])
def test_round_trip(group):
  rng = np.random.default_rng(0)
  x, goes = rng.normal(size=(6, 7, 2)).astype(np.float32), rng.random((6, 7)) < 0.5
  mask = np.arange(7) < rng.integers(4, 8, (6, 1))
  goes &= mask
  tokens = tk.start(jnp.where(mask[..., None], x, np.nan)).replace(mask=jnp.asarray(mask))
  out = tk.pack(tokens, jnp.asarray(goes), 7 * group, group)
  assert out.x.shape == (6 // group, 7 * group, 2) and np.isfinite(out.x).all()
  np.testing.assert_array_equal(tk.restore(out.x, out.owner), np.where(goes[..., None], x, 0))
  np.testing.assert_array_equal(out.alive.sum(1), goes.reshape(-1, 7 * group).sum(1))
  assert ("state/segment" in out.feats) == (group > 1)


@pytest.mark.parametrize("impl", ["matmul", "fused"])
@pytest.mark.parametrize("sized", [False, True])
def test_attention_stays_within_an_image(impl, sized):
  rng, counts = np.random.default_rng(0), (3, 1, 4)
  segment = np.repeat([0, 1, 2, -1], [*counts, 2])[None]
  q, k, v = (jnp.asarray(rng.normal(size=(1, 2, 10, 8)), jnp.float32) for _ in range(3))
  size = jnp.asarray(rng.uniform(0.5, 4.0, (1, 10)), jnp.float32) if sized else None
  weigh = jnp.asarray(rng.normal(size=v.shape), jnp.float32)

  def packed(q, k, v):
    out = attention.attend(q, k, v, size=size, segment=jnp.asarray(segment, jnp.int32), impl=impl)
    return (out * weigh).sum(), out

  def alone(q, k, v):
    parts = []
    for i in (0, 1, 2, -1):
      where = np.flatnonzero(segment[0] == i)
      cut = [a[:, :, where] for a in (q, k, v)]
      parts.append(attention.attend(*cut, size=None if size is None else size[:, where], impl="matmul"))
    out = jnp.concatenate(parts, axis=2)
    return (out * weigh).sum(), out

  (got, out), (want, wanted) = (
    jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True), compiler_options=quick())(q, k, v) for f in (packed, alone)
  )
  np.testing.assert_allclose(out, wanted, atol=2e-6)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  with pytest.raises(ValueError, match="a mask or segments"):
    attention.attend(q, k, v, mask=jnp.asarray(segment >= 0), segment=jnp.asarray(segment), impl=impl)


def test_overflow_drops_the_lowest_scores():
  # Two images of four tokens, the first protected; all of image a want in and two of image b: 1 + 3 and 1 + 1.  Room
  # for 2 x 2 = 4: both protected (whatever their score), then 5 and 3 of a; 3 of b is tied with it and stands behind.
  tokens = tk.start(jnp.zeros((2, 4, 1)), 1)
  score = jnp.asarray([[-9.0, 1.0, 5.0, 3.0], [-9.0, -2.0, 3.0, -1.0]])
  wants = tokens.protected | (score > 0)
  np.testing.assert_array_equal(admit(tokens, score, wants, 2, 2), [[1, 0, 1, 1], [1, 0, 0, 0]])
  np.testing.assert_array_equal(admit(tokens, score, wants, jnp.asarray([3, 2]), 2), [[1, 0, 1, 1], [1, 0, 1, 0]])
  np.testing.assert_array_equal(admit(tokens, score, wants, 2, 1), [[1, 0, 1, 0], [1, 0, 1, 0]])
  np.testing.assert_array_equal(admit(tokens, score, wants, 4, 2), wants)


def model(keep, batch=6, group=3, **fields):
  module = vit.make(
    defaults.complete({"model": SMALL}).model,
    dict(pick=dict(reducer="spa", layers=(1,), until=2, keep=keep, group=group) | fields),
  )
  images = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 16, 16, 3)), jnp.float32)
  return module, images


@pytest.fixture(scope="module")
def params():
  module, images = model(ROOMY)
  rngs = {"params": jax.random.key(0), "reduce": jax.random.key(1)}
  return drawn(lambda rngs: module.init(rngs, images, mode="mask")["params"], rngs)


def run(module, params, images, mode):
  program = jax.jit(lambda p, i: module.apply({"params": p}, i, mode=mode), compiler_options=quick())
  return program(params, images)


def went(output):
  """(B, N) bool: who was changed by blocks 1 and 2."""
  return np.asarray(output.aux["tokens/2"] != output.aux["tokens/0"]).any(-1)


def test_masked_equals_gathered_and_images_do_not_meet(params):
  module, images = model(ROOMY)
  assert module.sites.counts() == (17, ROOMY, 17, 17)
  assert module.sites.profile(16, 2).attention == (17, ROOMY, ROOMY, 17)
  masked, gathered = (run(module, params, images, mode) for mode in ("mask", "gather"))
  np.testing.assert_array_equal(gathered.counts, (17, ROOMY, 17, 17))
  assert gathered.aux["tokens/1"].shape == (2, 3 * ROOMY, 16) and gathered.aux["owner/1"].shape == (6, 17)
  counts = went(gathered).sum(1)
  assert len(set(counts)) > 1 and went(gathered)[:, 0].all()  # each image has its own; CLS always goes
  score = np.asarray(reported(gathered, "pick", "score")[0])
  np.testing.assert_array_equal(went(gathered)[:, 1:], score[:, 1:] > 0)
  for output in (masked, gathered):
    np.testing.assert_allclose(reported(output, "pick", "count")[0], counts.mean(), rtol=1e-6)
  np.testing.assert_allclose(masked.tokens.x, gathered.tokens.x, atol=1e-5)
  np.testing.assert_allclose(masked.features, gathered.features, atol=1e-5)
  # Another image in the row changes nothing, nor does a row of one's own (3 and 1 have no divisor but 1).
  other = run(module, params, images.at[0].set(0.0), "gather")
  np.testing.assert_allclose(other.tokens.x[1:], gathered.tokens.x[1:], atol=1e-5)
  single = run(model(17, group=1)[0], params, images, "gather")
  np.testing.assert_allclose(single.tokens.x, gathered.tokens.x, atol=1e-5)


def test_overflow_in_a_model(params):
  module, images = model(TIGHT)
  masked, gathered = (run(module, params, images, mode) for mode in ("mask", "gather"))
  np.testing.assert_allclose(masked.tokens.x, gathered.tokens.x, atol=1e-5)
  score = np.asarray(reported(gathered, "pick", "score")[0])
  for row in (slice(0, 3), slice(3, 6)):  # of those that want in, the best 3 x TIGHT, the three CLS counted
    goes, free = went(gathered)[row], score[row, 1:]
    assert goes.sum() == 3 * TIGHT < (free > 0).sum() + 3 and goes[:, 0].all()
    limit = np.sort(free[free > 0])[-3 * (TIGHT - 1)]
    np.testing.assert_array_equal(goes[:, 1:], free >= limit)


@pytest.mark.parametrize("mode", MODES)
def test_the_gate_learns(params, mode):
  module, images = model(9)

  def loss(params):
    rngs = {"reduce": jax.random.key(3), "dropout": jax.random.key(4)}
    output = module.apply({"params": params}, images, train=True, mode=mode, rngs=rngs)
    return output.features.sum(), output

  grads, output = jax.jit(jax.grad(loss, has_aux=True), compiler_options=quick())(params)
  gate = grads["block_1"]["reduce"]["pick"]["spa"]["gate"]
  assert np.abs(gate["kernel"]).max() > 0 and np.isfinite(gate["kernel"]).all()
  np.testing.assert_allclose(gate["bias"][0], -gate["bias"][1], rtol=1e-3, atol=1e-6)  # only the difference counts
  share = np.asarray(reported(output, "pick", "kept_share")[0])
  assert share.shape == (6,) and (share[:3] == share[0]).all() and (share[3:] == share[3]).all()
  if mode == "mask":  # there is room for all that want in
    wanted = went(output)[:, 1:].reshape(2, 48).mean(1)
    np.testing.assert_allclose(share[[0, 3]], wanted, rtol=1e-6)
    # keep_ratio by hand: 8 of 16 is the target, and each group's mean is held at it.
    config = defaults.default().loss
    config.keep_ratio = 1.0
    terms = losses.terms(config, module, output, jax.nn.one_hot(jnp.zeros(6, int), 3), None, None)
    np.testing.assert_allclose(terms["keep_ratio"], np.square(wanted - 0.5).mean(), rtol=1e-5)


def test_selection_loss_by_hand():
  # Scale 1: logits 0, 0, 2, 0 against labels 0, 1, 0, 0: three times log 2 and log(1 + e^2) = 2.126928.  Scale 2: the
  # largest logit 2 against 1: log(1 + e^-2) = 0.126928.  Mean: ((3 log 2 + 2.126928) / 4 + 0.126928) / 2.
  logits = jnp.asarray([[[0.0, 0.0], [2.0, 0.0]]])
  labels = np.zeros((1, 4, 4), np.int32)
  labels[0, 1, 3] = 1  # a pixel of the patch at the top right
  wanted = ((3 * np.log(2) + 2.126928) / 4 + 0.126928) / 2
  np.testing.assert_allclose(selection_loss(logits, jnp.asarray(labels), (1, 2)), wanted, rtol=1e-6)
  with pytest.raises(ValueError, match="has no 2 x 2 cells"):
    selection_loss(logits, jnp.zeros((1, 5, 4)), (1,))


def test_selection_loss_teaches_the_gate(params):
  """As SPA's docstring adds it: labels are boxes, and the gate's difference rises within and falls without."""
  module, images = model(ROOMY)
  labels = jnp.zeros((6, 16, 16)).at[:, :8, :8].set(1.0)

  def loss(params):
    rngs = {"reduce": jax.random.key(3), "dropout": jax.random.key(4)}
    output = module.apply({"params": params}, images, train=True, mode="mask", rngs=rngs)
    out = 0.0
    for score in output.aux["reduce/pick/score"].values():
      logits = score[:, module.shape.num_prefix_tokens :].reshape(-1, *module.shape.grid)
      out = out + 0.5 * selection_loss(logits, labels)
    return out, logits

  slope = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick())
  gate = lambda tree: tree["block_1"]["reduce"]["pick"]["spa"]["gate"]
  (before, _), grads = slope(params)
  for name, leaf in gate(grads).items():
    params = jax.tree.map(lambda a: a, params)
    gate(params)[name] = gate(params)[name] - 0.1 * leaf
  (after, logits), _ = slope(params)
  assert logits.shape == (6, 4, 4) and after < before


@pytest.mark.parametrize(
  "other, words",
  [
    (dict(reducer="topk", layers=(2,), keep=9), "sites.x acts in layer 2 at place='attn', inside the scope of sites.p"),
    (dict(reducer="dyt", layers=(1,), keep=9), "place='before' in layer 1"),
    (
      dict(reducer="topk", layers=(3,), place="before", keep=9),
      "reads cls_attention of block 2, of which only",
    ),
  ],
)
def test_nothing_acts_on_rows_that_images_share(other, words):
  sites = dict(p=dict(reducer="spa", layers=(1,), until=2, keep=9), x=other)
  with pytest.raises(ValueError, match=words):
    vit.make(defaults.complete({"model": SMALL}).model, sites)


def test_group_errors():
  with pytest.raises(ValueError, match=r"sites.pick.group=0 must be at least 1"):
    model(9, group=0)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
@pytest.mark.parametrize("mode", MODES)
def test_groups_within_a_device_need_no_collective(params, mode):
  module, images = model(TIGHT, batch=8, group=2)
  mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
  split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

  def forward(params, images):
    rngs = {"reduce": jax.random.key(3), "dropout": jax.random.key(4)}
    output = module.apply({"params": params}, images, train=True, mode=mode, rngs=rngs)
    return output.tokens.x, reported(output, "pick", "kept_share")[0]

  args = jax.device_put(params, everywhere), jax.device_put(images, split)
  compiled = jax.jit(forward, compiler_options=quick()).lower(*args).compile()
  assert not COLLECTIVE.search(compiled.as_text())
  assert compiled(*args)[0].sharding.is_equivalent_to(split, 3)


def test_a_batch_of_unknown_size_takes_images_one_by_one(params):
  module, _ = model(9)
  size = jax.export.symbolic_shape("batch")[0]
  shape = jax.ShapeDtypeStruct((size, 16, 16, 3), jnp.float32)
  exported = jax.export.export(jax.jit(lambda i: module.apply({"params": params}, i).logits))(shape)
  assert str(exported.out_avals[0].shape[0]) == "batch"


def test_where_more_want_in_than_there_is_room():
  """Scores are 40 and x: all want in.  In gather mode CLS and the best two find room, in mask mode all; the share is of
  those that want in.  At tau = 100 a token's slope is p (1 - p) / tau of a p near 1 / 2."""
  tokens = tk.start(jnp.asarray([[[9.0], [-3.0], [2.0], [1.0], [-1.0]]]), 1)
  module = SPA(group=1, temperature=100.0)

  def share(bias, mode):
    params = {"gate": dict(kernel=jnp.asarray([[1.0, 0.0]]), bias=bias)}
    out, report = module.apply({"params": params}, tokens, 3, train=True, mode=mode, rngs={"reduce": jax.random.key(0)})
    return report["kept_share"][0], (out, report["kept_share"][0])

  run = jax.jit(jax.grad(share, has_aux=True), static_argnums=1, compiler_options=quick())
  both = jnp.asarray([40.0, 0.0])
  (gathered, wanted), (masked, also) = (run(both, mode)[1] for mode in ("gather", "mask"))
  assert gathered.position.tolist() == [[0, 2, 3]] and masked.alive.all() and wanted == also == 1
  np.testing.assert_allclose(100 * run(jnp.zeros(2), "mask")[0], [0.25, -0.25], rtol=0.02)
