"""Vision-language models against recorded numbers: from pixels to logits and to text."""

import jax
import numpy as np
import pytest
from vlms import GOLDEN, TOLERANCE, forward, found, needs_golden, parameters, prompt

from tokred import sharding
from tokred.nn import generate
from tokred.pretrained.vlm import load_vlm

NAMES = ["llava_clip_llama", "llava_next", "qwen2_5_vl"]
SOME = [n if n.startswith("qwen") else pytest.param(n, marks=pytest.mark.thorough) for n in NAMES]


@needs_golden
@pytest.mark.parametrize("name", NAMES)
def test_recorded_logits(name):
  io, inputs = prompt(name)
  logits, _ = forward(found(name).make(), parameters(name), inputs)
  there = io["attention_mask"] > 0
  np.testing.assert_allclose(np.asarray(logits)[there], io["logits"][there], atol=TOLERANCE)
  if name == "qwen2_5_vl":
    np.testing.assert_array_equal(np.moveaxis(inputs["position"], -1, 0), io["position_ids"])
    last, length = inputs["position"].max(), inputs["ids"].shape[1]
    np.testing.assert_array_equal(last + 1 - length, io["rope_delta"][0, 0])


@needs_golden
def test_recorded_features_of_qwen():
  model, (io, inputs) = found("qwen2_5_vl").make(), prompt("qwen2_5_vl")
  see = jax.jit(lambda params: model.apply({"params": params}, inputs["images"], inputs["slot"], method="see"))
  tokens, place, _ = see(parameters("qwen2_5_vl"))
  np.testing.assert_allclose(tokens.x[0], io["image_features"], atol=TOLERANCE)
  np.testing.assert_array_equal(place[0], np.flatnonzero(io["input_ids"][0] == 94))


@needs_golden
@pytest.mark.parametrize("name", SOME)
def test_recorded_text(name):
  io, inputs = prompt(name)
  out = generate.write(found(name).make(), parameters(name), **inputs, max_new_tokens=12)
  np.testing.assert_array_equal(out.tokens, io["gen_tokens"])


@needs_golden
@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_are_one(name):
  """Parameters in parts from the file on; the same logits."""
  mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=2))
  module, params = load_vlm(GOLDEN / "hf" / name, mesh=mesh)
  assert len(params["llm"]["block_0"]["mlp"]["fc1"]["kernel"].sharding.device_set) == 8
  io, inputs = prompt(name)
  logits, _ = forward(module, params, inputs)
  there = io["attention_mask"] > 0
  np.testing.assert_allclose(np.asarray(logits)[there], io["logits"][there], atol=TOLERANCE)
