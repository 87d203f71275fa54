"""Qwen's tower on a tiny model of our own: windows, frames of different sizes, sites, errors."""

import functools

import jax
import numpy as np
import pytest

from tokred.nn import anyres, decoder, generate, qwen_vision
from tokred.nn.decoder_layer import Shape
from tokred.nn.qwen_vlm import QwenVLM
from tokred.nn.rope import Rope

IMAGE = 3
TOWER = qwen_vision.Shape(16, 2, 24, 2, patch=2, window=2, full=(1,))
TEXT = Shape(40, 16, 2, 24, 2, 1, 8, rope=Rope(100.0, sections=(2, 1, 1)), qkv_bias=True, max_length=64)
MERGED = dict(out=dict(reducer="tome", metric="token", place="output", keep=0.5))
HALF = dict(out=dict(reducer="topk", score="column_mean", place="output", keep=0.5))


@functools.cache
def model(name="none"):
  cut = dict(stack="llm", reducer="topk", score="key_norm", layers=(1,), keep=0.5)
  sites = {"none": {}, "half": HALF, "both": HALF | dict(llm=cut), "virtual": MERGED}[name]
  seen = {site: fields for site, fields in sites.items() if "stack" not in fields}
  read = {site: fields for site, fields in sites.items() if "stack" in fields}
  parts = qwen_vision.make(TOWER, seen), qwen_vision.Merger(16), decoder.make(TEXT, read)
  return QwenVLM(*parts, image_token=IMAGE, position="virtual" if name == "virtual" else "original")


@functools.cache
def parameters():
  module = model()
  params = jax.jit(lambda: module.init(jax.random.key(0), **module.example(), mode="mask"))()["params"]
  return jax.tree.map(lambda a: a * 2 if a.ndim > 1 else a, params)


ROWS = [[5, *[IMAGE] * 6, 6, 7], [8, *[IMAGE] * 4, 9, 10, *[IMAGE] * 12, 11, 12]]  # 2 x 3; 4 x 1 and 2 frames of 3 x 2
GRIDS = [(1, 4, 6), (1, 8, 2), (2, 6, 4)]


def batch(rows=(0, 1)):
  rng = np.random.default_rng(0)
  every = [rng.normal(size=(t * h * w, TOWER.patch_dim)).astype(np.float32) for t, h, w in GRIDS]
  images = {0: (0,), 1: (1, 2)}
  own = [i for row in rows for i in images[row]]
  longest = max(len(ROWS[row]) for row in rows)
  ids, mask = np.zeros((len(rows), longest), np.int32), np.zeros((len(rows), longest), bool)
  for line, there, row in zip(ids, mask, rows, strict=True):
    line[-len(ROWS[row]) :], there[-len(ROWS[row]) :] = ROWS[row], True
  patches, grids = np.concatenate([every[i] for i in own]), [GRIDS[i] for i in own]
  return anyres.frames(ids, patches, grids, TOWER, IMAGE, mask=mask)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def forward(module, params, known, mode, inputs):
  out = module.apply({"params": params}, **inputs, known=known, mode=mode)
  return out.logits, out.tokens.owner


def at_ids(module, inputs, mode="gather"):
  """Logits at ids, NaN where there is no token any more."""
  known = module.known(inputs["ids"], inputs["slot"], inputs["mask"]) if mode == "gather" else None
  logits, owner = (np.asarray(a) for a in forward(module, parameters(), known, mode, inputs))
  there = np.take_along_axis(logits, np.maximum(owner, 0)[..., None], axis=1)
  return np.where((owner >= 0)[..., None], there, np.nan)


def test_windows_by_hand():
  """3 x 5 tokens in windows of 2 x 2: the last column and the last row are cut."""
  got = qwen_vision._windows(3, 5, 2)
  wanted = [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9, -1, -1], [10, 11, -1, -1], [12, 13, -1, -1], [14, -1, -1, -1]]
  np.testing.assert_array_equal(got, wanted)


def test_attention_within_windows():
  """The same weights without windows agree on a frame that is one window, and differ on one that is two."""
  whole = qwen_vision.Shape(**{**vars(TOWER), "window": 0, "full": ()})
  patches = np.random.default_rng(1).normal(size=(48, TOWER.patch_dim))
  out = []
  for shape in (TOWER, whole):
    frames = qwen_vision.arrange(patches, [(1, 4, 4), (1, 4, 8)], shape)
    out.append(jax.jit(qwen_vision.make(shape).apply)({"params": parameters()["tower"]}, frames).tokens)
  np.testing.assert_allclose(out[0].x[0], out[1].x[0], atol=1e-4)
  assert not np.allclose(out[0].x[1], out[1].x[1], atol=1e-2)
  np.testing.assert_array_equal(out[0].position, np.arange(8)[None].repeat(2, 0))
  np.testing.assert_array_equal(out[0].alive.sum(1), [4, 8])


@pytest.mark.parametrize(
  "name", ["half", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("none", "both", "virtual"))]
)
def test_unequal_prompts_get_what_they_get_alone(name):
  """Frames of 6, 4, 6 and 6 tokens; of a half, 3, 2, 3 and 3 stay.  What is padded is garbage."""
  module, inputs = model(name), batch()
  images = inputs["images"]
  inputs["images"] = images.replace(patches=np.where(images.mask[..., None], images.patches, np.nan))
  together = at_ids(module, inputs)
  stays = np.isfinite(together[..., 0])
  if name == "half":
    np.testing.assert_array_equal((stays & (inputs["ids"] == IMAGE)).sum(1), [3, 8])
  assert stays[inputs["mask"] & (inputs["ids"] != IMAGE)].all()
  alone = batch((0,))
  np.testing.assert_allclose(together[0, -alone["ids"].shape[1] :], at_ids(module, alone)[0], atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["half", "both", "virtual"])
def test_masked_is_gathered(name):
  module, inputs = model(name), batch()
  np.testing.assert_allclose(at_ids(module, inputs, "mask"), at_ids(module, inputs), atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["none", "half", "virtual"])
def test_text_is_that_without_a_cache(name):
  """Four greedy tokens; then all at once, in a batch and alone."""
  module, inputs, new = model(name), batch(), 4
  text = np.asarray(generate.write(module, parameters(), **inputs, max_new_tokens=new).tokens)
  more = lambda a, b: np.concatenate([a, b], axis=1)
  following = inputs["position"].max((1, 2))[:, None, None] + 1 + np.arange(new)[None, :, None]
  longer = inputs | dict(
    ids=more(inputs["ids"], text), mask=more(inputs["mask"], text >= 0),
    position=more(inputs["position"], np.broadcast_to(following, (2, new, 3)).astype(np.int32)),
  )  # fmt: skip
  logits = at_ids(module, longer)[:, -new - 1 : -1]
  np.testing.assert_array_equal(logits.argmax(-1), text)
  alone = generate.write(module, parameters(), **batch((0,)), max_new_tokens=new, cache_length=30)
  np.testing.assert_array_equal(alone.tokens[0], text[0])


def test_a_selector_in_the_tower():
  """Its share is one of the tokens that a frame has, not of the 6 slots of the largest; its temperature may move."""
  site = dict(reducer="gumbel", place="output", keep=0.5, anneal=(("temperature", 4.0, 1.0, 0, 9),))
  module = QwenVLM(
    qwen_vision.make(TOWER, dict(out=site)), qwen_vision.Merger(16), decoder.make(TEXT), image_token=IMAGE
  )
  inputs, streams = batch(), dict(reduce=jax.random.key(0))
  params = jax.jit(lambda: module.init(dict(streams, params=jax.random.key(1)), **module.example(), mode="mask"))()[
    "params"
  ]

  @jax.jit
  def slope(params, temperature):
    def shares(params):
      kinds = dict(train=True, mode="mask", keeps={"out.temperature": temperature}, rngs=streams)
      share = module.apply({"params": params}, **inputs, **kinds).aux["reduce/out/kept_share"][0]
      return share.sum(), share

    grads, share = jax.grad(shares, has_aux=True)(params)
    return grads["tower"]["reduce"]["out"]["gumbel"]["predictor"]["out3"]["kernel"], share

  (warm, share), (cold, same) = slope(params, 4.0), slope(params, 1.0)
  np.testing.assert_array_equal(share, same)  # who stays is drawn by the noise, at any temperature
  count = (np.asarray(inputs["images"].place) >= 0).sum(-1).reshape(-1)
  assert count.tolist() == [6, 0, 0, 4, 6, 6]
  kept = np.asarray(share) * count
  np.testing.assert_allclose(kept, kept.round(), atol=1e-5)
  assert kept[3] in (1, 2, 4) and not np.allclose(warm, cold)  # of 6 slots 1, 2, 4 would be 2/3, 4/3, 8/3


def test_positions_on_three_axes_by_hand():
  """Row 1: text 0; 4 x 1 tokens at 1 + (0, i, 0); text at 5 and 6; frames at 7 + (t, i, j), to 7 + 2; text from 10."""
  inputs = batch()
  wanted = [[0, 0, 0], *[[1, 1 + i, 1] for i in range(4)], [5, 5, 5], [6, 6, 6]]
  wanted += [[7 + t, 7 + i, 7 + j] for t in range(2) for i in range(3) for j in range(2)]
  np.testing.assert_array_equal(inputs["position"][1], [*wanted, [10, 10, 10], [11, 11, 11]])
  np.testing.assert_array_equal(inputs["slot"][1, :, :4], [[1, 2, 3, 4], [7, 8, 9, 10], [13, 14, 15, 16]])
  assert inputs["slot"].shape == (2, 3, 6) and (inputs["slot"][0, 1:] == -1).all()


def arguments(**changes):
  ids, patches = np.array([ROWS[0]]), np.zeros((24, TOWER.patch_dim))
  return dict(ids=ids, patches=patches, grid_thw=[(1, 4, 6)], shape=TOWER, image_token=IMAGE) | changes


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      dict(grid_thw=[(1, 4, 4)], patches=np.zeros((16, 24))),
      r"placeholders are not as many as grid_thw says \(0 x 0 x",
    ),
    (dict(grid_thw=[(1, 6, 4), (1, 2, 2)], patches=np.zeros((28, 24))), r"2 images, but the prompts have .* for 1"),
    (
      dict(grid_thw=[(1, 4, 5)]),
      r"grid_thw\[0\]=\[1, 4, 5\]: height and width must be multiples of spatial_merge_size=2",
    ),
    (dict(patches=np.zeros((20, 24))), r"patches of shape \(20, 24\), but grid_thw asks for \(24, 24\)"),
    (dict(grid_thw=[]), r"grid_thw of shape \(0,\); valid: \(images, 3\), one image or more"),
    (dict(windows=1), r"an image needs windows=2 and tokens=6, but the shapes have room for 1 and 0; make it smaller"),
  ],
)
def test_images_that_do_not_fit(changes, message):
  with pytest.raises(ValueError, match=message):
    anyres.frames(**arguments(**changes))


@pytest.mark.parametrize(
  "site, message",
  [
    (
      dict(reducer="topk", score="key_norm", layers=(0,), keep=0.5),
      r"sites.s.place='attn' is not available in a tower",
    ),
    (HALF["out"] | dict(score="cls_attention"), r"scores by cls_attention, .*without a CLS token"),
    (
      HALF["out"] | dict(rate="threshold", threshold=0.1),
      r"sites.s: frames of different sizes keep a fixed share or n",
    ),
  ],
)
def test_sites_that_cannot_be(site, message):
  with pytest.raises(ValueError, match=message):
    qwen_vision.make(TOWER, {"s": site})


def test_shapes_that_do_not_depend_on_the_images():
  room = arguments(windows=6, tokens=9)
  out = anyres.frames(**room, room=2)
  assert out["images"].patches.shape == (1, 2, 96, 24) and out["slot"].shape == (1, 2, 9)
  with pytest.raises(ValueError, match=r"heads of width=16 must be multiples of 4"):
    qwen_vision.make(qwen_vision.Shape(**{**vars(TOWER), "num_heads": 3}))
