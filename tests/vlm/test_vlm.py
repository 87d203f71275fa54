"""Tower, projector and language model together, on a tiny model of our own."""

import functools

import jax
import numpy as np
import pytest

from tokred import cost
from tokred import tokens as tk
from tokred.config import complete
from tokred.nn import generate, placeholders, vlm

IMAGE = 3
MODEL = dict(name="vlm", variant="mu/4", image_size=(16, 16), num_classes=0, depth=2)
LLM = dict(vocab=40, width=32, depth=3, num_heads=4, num_kv_heads=2, mlp_dim=48, image_token=IMAGE)
SITES = {
  "none": {},
  "encoder": dict(out=dict(reducer="topk", score="key_norm", layers=(-1,), place="output", keep=0.5)),
  "merge": dict(tome=dict(reducer="tome", layers=(0, 1), r=2)),
  "reindex": dict(
    out=dict(reducer="topk", score="key_norm", layers=(-1,), place="output", keep=0.25, position="reindex", raster=True)
  ),
  "virtual": dict(tome=dict(reducer="tome", layers=(0, 1), r=4, position="virtual")),
  "both": dict(
    out=dict(reducer="topk", score="token_norm", layers=(-1,), place="output", keep=0.5),
    llm=dict(stack="llm", reducer="topk", score="last_attention", layers=(1,), place="before", keep=0.5),
  ),
}


@functools.cache
def model(name="none"):
  config = complete(dict(model=MODEL, llm=LLM))
  return vlm.make(config, SITES[name])


@functools.cache
def parameters():
  module = model()
  ids, images, slot, mask = batch()
  init = jax.jit(lambda: module.init(jax.random.key(0), ids, images, slot=slot, mask=mask, mode="mask"))
  return jax.tree.map(lambda a: a * 2 if a.ndim > 1 else a, init()["params"])


def batch():
  """A row with one image and padding in front, a row with two; 16 patches each."""
  rng = np.random.default_rng(0)
  image = [IMAGE] * 16
  rows = [[5, *image, 6, 7], [8, *image, 9, 10, *image, 11, 12, 13]]
  ids = np.zeros((2, 40), np.int32)
  mask = np.zeros((2, 40), bool)
  for row, (line, start) in enumerate(zip(rows, (21, 0), strict=True)):
    ids[row, start : start + len(line)], mask[row, start : start + len(line)] = line, True
  images = rng.normal(size=(2, 2, 16, 16, 3)).astype(np.float32)
  return ids, images, placeholders.slots(ids, IMAGE, 2, 16), mask


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def forward(module, params, known=None, mode="gather", **inputs):
  ids, images = inputs.pop("ids"), inputs.pop("images")
  out = module.apply({"params": params}, ids, images, **inputs, known=known, mode=mode)
  return tk.restore(out.logits, out.tokens.owner), out


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[pytest.mark.thorough] * (name != "virtual")) for name in SITES]
)
def test_masked_is_gathered_alone_is_together_and_decoding_is_recomputing(name):
  module, params = model(name), parameters()
  ids, images, slot, mask = batch()
  known = module.known(ids, slot, mask)
  inputs = dict(ids=ids, images=images, slot=slot, mask=mask)
  logits, out = forward(module, params, known, **inputs)
  text = mask & (ids != IMAGE)
  stays = np.asarray(out.tokens.owner) >= 0
  assert stays[text].all() and not stays[~mask].any()
  if name != "reindex":
    masked, _ = forward(module, params, None, "mask", **inputs)
    np.testing.assert_allclose(np.asarray(masked)[text], np.asarray(logits)[text], atol=1e-4)
  for row in (0, 1):
    own = mask[row]
    lone = dict(ids=ids[row : row + 1, own], images=images[row : row + 1])
    lone["slot"] = placeholders.slots(lone["ids"], IMAGE, 2, 16)
    one, _ = forward(module, params, module.known(lone["ids"], lone["slot"]), **lone)
    np.testing.assert_allclose(np.asarray(logits)[row, text[row]], np.asarray(one)[0, text[row][own]], atol=1e-4)
  got = generate.write(module, params, ids, images, slot, mask, 4)
  line = np.concatenate([ids[1, mask[1]], got.tokens[1, :3]])[None]
  again, slot = placeholders.slots(line, IMAGE, 2, 16), None
  last = np.array([int(mask[1].sum()) - 1])  # of the prompt
  whole, _ = forward(module, params, module.known(line, again), ids=line, images=images[1:], slot=again, last=last)
  np.testing.assert_array_equal(np.asarray(whole)[0, -4:].argmax(-1), got.tokens[1])


def test_the_image_is_seen_and_dense_positions_are_the_sequence():
  module, params = model(), parameters()
  ids, images, slot, mask = batch()
  known = module.known(ids, slot, mask)
  a, out = forward(module, params, known, ids=ids, images=images, slot=slot, mask=mask)
  b, _ = forward(module, params, known, ids=ids, images=images + 1, slot=slot, mask=mask)
  assert np.abs(np.asarray(a - b))[mask].max() > 1e-3
  np.testing.assert_array_equal(out.tokens.position[0, :19], np.arange(19))
  assert known == vlm.Known(38, vlm.Census(16, 6))


def test_placeholders_must_fit():
  module = model()
  ids, _, slot, mask = batch()
  with pytest.raises(ValueError, match=r"row 0 has 15 placeholders \(id 3\) and its images 16 tokens"):
    fewer = ids.copy()
    fewer[0, 22] = 1
    module.known(fewer, slot, mask)
  with pytest.raises(ValueError, match=r"row 1 has 31 placeholders \(id 3\); valid: 16 for each of up to 2 images"):
    placeholders.slots(np.where(np.arange(40) == 1, 1, ids), IMAGE, 2, 16)


def test_a_virtual_place_is_a_place():
  """With nothing merged, attention is at the places where the tokens are: the dense model, padding or not."""
  config = complete(dict(model=MODEL, llm=LLM))
  still = vlm.make(config, dict(tome=dict(reducer="tome", layers=(0,), keep=1.0, position="virtual")))
  ids, images, slot, mask = batch()
  inputs = dict(ids=ids, images=images, slot=slot, mask=mask)
  dense, _ = forward(model(), parameters(), model().known(ids, slot, mask), **inputs)
  same, _ = forward(still, parameters(), still.known(ids, slot, mask), **inputs)
  np.testing.assert_allclose(np.asarray(same)[mask], np.asarray(dense)[mask], atol=1e-5)


def test_virtual_places_cost_what_attention_sees():
  """16 of 32 tokens of width 32 in three layers: projections and MLPs halve with the patches, N^2 stays 48^2."""
  config = complete(dict(model=MODEL, llm=LLM | dict(prompt=32)))
  site = dict(reducer="tome", layers=(0,), r=8)
  plain, virtual = (
    vlm.make(config, dict(tome=site | more)) for more in (dict(position="original"), dict(position="virtual"))
  )
  extra = 3 * 2 * (48**2 - 40**2) * 32  # layers, q k and w v, pairs, width
  assert cost.of(virtual) - cost.of(plain) == extra


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (dict(llm=dict(stack="llm", reducer="topk", layers=(1,), keep=0.5)), "goes with no site of stack='llm'"),
    (dict(out=dict(reducer="topk", place="output", keep=0.5, position="reindex")), "and with no 'reindex'"),
  ],
)
def test_virtual_places_go_alone(more, message):
  with pytest.raises(ValueError, match=f"sites.tome.position='virtual' .*{message}"):
    vlm.make(complete(dict(model=MODEL, llm=LLM)), SITES["virtual"] | more)


def test_virtual_places_learn_no_counts():
  site = dict(SITES["virtual"]["tome"], rate="learned", granularity=4)
  del site["r"]
  module = vlm.make(complete(dict(model=MODEL, llm=LLM)), dict(tome=site))
  with pytest.raises(ValueError, match=r"position='virtual' learns no counts; valid: a fixed keep or a threshold"):
    ids, images, slot, mask = batch()
    call = dict(slot=slot, mask=mask, mode="mask", train=True)
    jax.eval_shape(lambda: module.init({"params": jax.random.key(0), "reduce": jax.random.key(1)}, ids, images, **call))
