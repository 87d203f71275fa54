"""Recorded reductions of a vision-language model, from pixels to logits: who stays, exactly, and what it writes."""

import functools

import numpy as np
import pytest
from vlms import TOLERANCE, forward, found, needs_golden, parameters, prompt, recorded

ENCODER = dict(place="output", position="reindex")
LLM = dict(stack="llm", place="before", layers=(0,), position="reindex")
SITES = {
  "divprune_0.25": dict(a=LLM | dict(reducer="maxmin", metric="token", start="isolated", raster=True, keep=0.25)),
  "fastervlm_9": dict(a=ENCODER | dict(reducer="topk", score="cls_attention", raster=True, keep=10)),
  "fastv_K2_12": dict(
    a=dict(stack="llm", reducer="topk", score="last_attention", layers=(2,), place="before", keep=1 / 3)
  ),
  "hired_next_0.3": dict(
    a=dict(reducer="remember", score="cls_attention", layers=(0,), place="attn"),
    b=ENCODER | dict(reducer="hired", share=0.3, grid=(2, 2), cells="chunks"),
  ),
  "hired_single_0.2": dict(a=ENCODER | dict(reducer="hired", share=0.2)),
  "idpruner_9": dict(
    a=dict(reducer="remember", score="cls_attention", layers=(2,), place="attn"),
    b=LLM | dict(reducer="mmr", score="memory", metric="token", scale="range", raster=True, keep=0.25),
  ),
  "pdrop_2_4": dict(a=LLM | dict(reducer="topk", score="last_attention_ahead", layers=(2, 4), keep=0.5)),
  "pool_3x3": dict(a=LLM | dict(reducer="pool", keep=0.25)),
  "visionzip_10_4": dict(a=ENCODER | dict(reducer="visionzip", keep=14, contextual=4, add=True, keep_cls=True)),
}  # fmt: skip


KIN = (
  "divprune_0.25",
  "fastervlm_9",
  "fastv_K2_12",
  "hired_single_0.2",
  "pdrop_2_4",
  "pool_3x3",
)  # others look at much of the same


@functools.cache
def run(name):
  next_ = "next" in name
  model = "llava_next" if next_ else "llava_clip_llama"
  module = found(model).make(SITES[name])
  _, inputs = prompt(model, newline=not next_)
  _, out = forward(module, parameters(model), inputs)
  return inputs, out


@needs_golden
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.thorough) if n in KIN else n for n in SITES])
def test_recorded_reduction(name):
  inputs, out = run(name)
  wanted = recorded(f"llava_reduce/{name}")
  length = wanted["logits"].shape[1]
  np.testing.assert_array_equal(out.tokens.alive.sum(1), length)
  np.testing.assert_allclose(np.asarray(out.logits)[:, :length], wanted["logits"], atol=TOLERANCE)
  slot, owner = inputs["slot"], np.asarray(out.tokens.owner)
  stays = np.take_along_axis(owner[:, None], np.maximum(slot, 0), axis=2) >= 0
  if "kept" in wanted:
    np.testing.assert_array_equal([np.flatnonzero(row) for row in stays[:, 0]], wanted["kept"])
  if "mask" in wanted:
    mask = wanted["mask"].reshape(slot.shape)
    np.testing.assert_array_equal(stays & (slot >= 0), mask & (slot >= 0))
  if "kept_sorted" in wanted:  # what has been merged is where its owner is; 0 is CLS, at 6
    own = np.take_along_axis(owner[:, 6:], wanted["kept_sorted"][:, 1:] - 1, axis=1)
    np.testing.assert_array_equal(own, np.arange(7, 16)[None].repeat(2, 0))
  if "kept_stage0" in wanted:
    for layer, stage in ((2, 0), (4, 1)):
      kept = np.asarray(out.aux[f"owner/{layer}"])[:, 6:42] >= 0
      np.testing.assert_array_equal([np.flatnonzero(row) for row in kept], wanted[f"kept_stage{stage}"])
