"""Vision-language models drawn at random: masked is gathered, alone is together, decoding is recomputing.

What tests/test_drawn.py is to a ViT.  `PYTHONPATH=tests python tests/vlm/test_drawn_models.py 0 50` looks at these
seeds.
"""

import dataclasses
import functools
import sys

import drawing
import jax
import numpy as np
import pytest
from golden import quick

import tokred
from tokred import tokens as tk
from tokred.drafts import POSITIONS
from tokred.nn import placeholders

IMAGE, PATCHES, DEPTH, NEW = 3, 16, 3, 3
MODEL = dict(name="vlm", variant="mu/4", image_size=(16, 16), num_classes=0, depth=DEPTH)
LLM = dict(vocab=40, width=32, depth=DEPTH, num_heads=4, num_kv_heads=2, mlp_dim=48, image_token=IMAGE)
PROJECTORS = (
  dict(name="tokenpacker", num_tokens=4),
  dict(name="quecc", num_tokens=4),
  dict(name="tokenflex", num_tokens=4),
  dict(name="queries", num_tokens=5),
)
RNGS = {"params": jax.random.key(0), "reduce": jax.random.key(1)}


def batch():
  """Rows of one image, padded in front, and of two, with NEW ids of an answer each: ids, images, slots, mask."""
  rng, image = np.random.default_rng(0), [IMAGE] * PATCHES
  rows = [[5, *image, 6, 7, 14, 15, 16], [8, *image, 9, 10, *image, 11, 12, 13, 17, 18, 19]]
  width = len(rows[1]) + 1
  ids = np.stack([np.pad(row, (width - len(row), 0)) for row in rows]).astype(np.int32)
  images = rng.normal(size=(2, 2, 16, 16, 3)).astype(np.float32)
  return ids, images, placeholders.slots(ids, IMAGE, 2, PATCHES), ids > 0


def drawn(seed):
  """A model with sites in the tower, in the language model or in both, each the first that is not refused."""
  rng = np.random.default_rng(seed)

  def add(config, name, draw):
    site = draw(rng, DEPTH)
    if name == "tower" and rng.random() < 0.3:
      site["position"] = drawing.pick(rng, POSITIONS)  # virtual goes with no site of the text
    more = config | dict(sites=config["sites"] | {name: site})
    made = drawing.accepted(functools.partial(shaped, more), more["sites"])
    return None if made is None else (more, made)

  config = dict(model=MODEL, llm=LLM, sites={})
  if rng.random() < 0.3:
    config["projector"] = drawing.pick(rng, PROJECTORS)
  for name, draw in {"tower": drawing.tower_site, "text": drawing.language_site}.items():
    if name == "tower" and rng.random() < 0.2:
      continue
    config, made = drawing.first(functools.partial(add, config, name, draw))
  return dataclasses.replace(made[0], params=drawing.parameters(made[1]))


def shaped(config):
  """A model and the shapes of its parameters."""
  model = tokred.build(config)
  ids, images, slot, mask = batch()
  init = lambda: model.module.init(RNGS, ids, images, slot=slot, mask=mask, mode="mask")
  return model, jax.eval_shape(init)["params"]


def check(seed):
  model = tokred.freeze(drawn(seed))
  with drawing.about((model.config.projector.to_dict(), model.config.sites.to_dict())):
    check_passes(model)


def check_passes(model):
  module, params = model.module, model.params
  ids, images, slot, mask = batch()
  prompt = ids.shape[1] - NEW
  known, of_prompt = module.known(ids, slot, mask), module.known(ids[:, :prompt], slot, mask[:, :prompt])
  last = np.full(2, prompt - 1)
  lone = dict(ids=ids[:1, mask[0]], images=images[:1])
  lone["slot"] = placeholders.slots(lone["ids"], IMAGE, 2, PATCHES)
  alone = module.known(lone["ids"], lone["slot"])

  def run(params, images):
    call = functools.partial(module.apply, {"params": params})
    inputs = dict(ids=ids, images=images, slot=slot, mask=mask, last=last)
    full, masked = call(**inputs, known=known), call(**inputs, mode="mask")
    own = call(**lone, known=alone, last=last[:1] - (~mask[0]).sum())
    start = call(ids[:, :prompt], images, slot=slot, mask=mask[:, :prompt], room=NEW, known=of_prompt, method="prefill")
    cache, decoded = start.cache, [start.logits[:, 0]]
    for column in range(prompt, prompt + NEW):
      logits, cache = call(ids[:, column], cache, method="decode")
      decoded.append(logits)
    at_ids = [tk.restore(out.logits, out.tokens.owner) for out in (full, masked, own)]
    return *at_ids, decoded, [out.tokens.owner for out in (full, masked)]

  program = jax.jit(run).lower(params, images).compile(compiler_options=quick())
  full, masked, own, decoded, owners = jax.tree.map(np.asarray, program(params, images))
  noise = 1 + 1e-6 * np.random.default_rng(3).normal(size=images.shape).astype(np.float32)
  near, *_, turned = jax.tree.map(np.asarray, program(params, images * noise))
  if any((a != b).any() for a, b in zip(owners, turned, strict=True)) or np.abs(near - full)[mask].max() > 1e-3:
    return  # what a millionth of the pixels turns over is a tie, which rounding decides
  text = mask & (ids != IMAGE)
  close = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=2e-4)
  if {module.position, *(spot.position for spot in module.llm.sites.spots)} == {"original"}:
    close(masked[text], full[text], err_msg="masked")
  close(own[0][text[0][mask[0]]], full[0][text[0]], err_msg="alone")
  for step, logits in enumerate(decoded):
    close(logits.reshape(2, -1), full[:, prompt - 1 + step], err_msg=f"decoded {step}")


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(12))
def test_drawn_models(seed):
  check(seed)


if __name__ == "__main__":
  drawing.look(check, sys.argv[1:])
