"""Training-free selection: recorded numbers of the authors' code in both modes, the others by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import quick
from golden_vlm import needs_golden, order, recorded, reduced, tokens_of

from tokred import config as defaults
from tokred import rates, scores
from tokred.nn import budget, decoder, vit
from tokred.nn.decoder_layer import Shape
from tokred.reducers import base, coverage, crops, flashvlm, hiprune, holov, memory, prumerge, sparsevlm, visionzip
from tokred.reducers.diversity import MMR, MaxMin
from tokred.reducers.topk import TopK

DEGREE = np.pi / 180


def on_circle(*angles):
  return np.stack([np.cos(np.asarray(angles) * DEGREE), np.sin(np.asarray(angles) * DEGREE)], -1)


# VisionZip.


def zipped(g, hidden, metric, attention, dominant, contextual, **options):
  tokens = tokens_of(hidden, 1, cls_attention=attention, key=metric[:, :, None])
  options = dict(contextual=float(contextual), add=True, keep_cls=True) | options
  return reduced(visionzip.VisionZip(**options), tokens, dominant + contextual)[0]


@needs_golden
@pytest.mark.parametrize("name", ["visionzip_36", pytest.param("visionzip_49", marks=pytest.mark.thorough)])
def test_visionzip_recorded(name):
  g = recorded(name)
  kept = g["all_indices"].shape[1]  # with CLS
  out = zipped(g, g["hidden"], g["metric"], g["attn"][:, :, 0].mean(1), kept, g["contextual"])
  np.testing.assert_allclose(out.x, g["tokens"], atol=1e-5)
  np.testing.assert_array_equal(out.position[:, :kept], np.sort(g["all_indices"], 1))


@needs_golden
def test_visionzip_recorded_in_a_model():
  g = recorded("llava_reduce/visionzip_10_4")
  attention = np.pad(g["cls_attention"], ((0, 0), (1, 0)))
  out = zipped(g, g["hidden"], g["metric"], attention, *g["setting"])
  np.testing.assert_allclose(out.x, g["tokens"], atol=1e-5)
  np.testing.assert_array_equal(out.position[:, :10], g["kept_sorted"])


def test_visionzip_by_hand():
  """Six tokens, attention 6 5 1 2 3 0, four stay of which two are contextual: 0 and 1 are dominant.

  Of 2 3 4 5 every second is a target: 2 and 4, keys at 0 and 90 degrees.  3 (10 degrees) joins 2, 5 (80) joins 4: means
  (12 + 13) / 2 and (14 + 3 x 15) / 4 with size 3; added 12 + 13 and 14 + 15.
  """
  x = np.arange(10.0, 16.0)[:, None]
  tokens = tokens_of(x, state_memory=[[6, 5, 1, 2, 3, 0]], key=on_circle(0, 0, 0, 10, 90, 80)[None, :, None])
  tokens = tokens.replace(size=jnp.asarray([[1.0, 1, 1, 1, 1, 3]]))
  out, _ = reduced(visionzip.VisionZip(score="memory", contextual=2.0), tokens, 4)
  np.testing.assert_allclose(out.x[0, :, 0], [10, 11, 12.5, 14.75])
  assert order(out) == [[0, 1, 2, 4]] and np.asarray(out.owner[0]).tolist() == [0, 1, 2, 2, 3, 3]
  out, _ = reduced(visionzip.VisionZip(score="memory", contextual=0.5, add=True), tokens, 4, mask=False)
  np.testing.assert_allclose(out.x[0, :, 0], [10, 11, 25, 29])


# Attention of CLS, and what several layers say.


@needs_golden
def test_fastervlm_recorded():
  g = recorded("llava_reduce/fastervlm_9")
  tokens = tokens_of(g["projected"], cls_attention=g["scores"])
  out, _ = reduced(TopK(raster=True), tokens, g["T"])
  assert order(out) == g["kept"].tolist() == [np.flatnonzero(row).tolist() for row in g["mask"]]


def test_memory_of_several_layers_in_a_tower():
  """VTC-CLS: the mean of three layers' attention decides at the output; asked for at the fourth alone, others stay."""
  sizes = dict(variant="mu/4", width=16, depth=3, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)
  config = defaults.complete({"model": sizes}).model
  write = dict(reducer="remember", layers=(0, 1, 2))
  read = dict(reducer="topk", score="memory", place="output", keep=0.25, raster=True)
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  module = vit.make(config, dict(a=write, b=read))
  params = jax.jit(module.init, compiler_options=quick())(jax.random.key(0), images)["params"]
  params = jax.tree.map(lambda a: a * 3 if a.ndim > 1 else a, params)
  alone = vit.make(config, {f"l{i}": dict(reducer="topk", layers=(i,), keep=1.0, rate="threshold", threshold=-1.0,
                                          raster=True)
                            for i in range(3)})  # fmt: skip
  run = lambda m: jax.jit(lambda p: m.apply({"params": p}, images), compiler_options=quick())(params)
  each = run(alone).aux
  mean = np.mean([np.asarray(each[f"reduce/l{i}/score"][0])[:, 1:] for i in range(3)], 0)
  kept = run(module).tokens
  assert order(kept, 1) == np.sort(np.argsort(-mean, 1)[:, :4], 1).tolist()
  with pytest.raises(ValueError, match="score='memory' reads what a site with reducer='remember' leaves"):
    jax.eval_shape(vit.make(config, dict(b=read)).init, jax.random.key(0), images)


@pytest.mark.parametrize(
  "how, want", [("mean", [2.0, 3.0]), ("sum", [4, 6]), ("running", [2.0, 3.0]), ("last", [3, 4])]
)
def test_memory_by_hand(how, want):
  """Scores (1, 2) and then (3, 4)."""
  tokens = tokens_of([[1.0], [2.0]])
  module = memory.Remember(score="token_norm", how=how)
  for value in ([[1.0], [2.0]], [[3.0], [4.0]]):
    tokens, _ = module.apply({}, tokens.replace(x=jnp.asarray([value])), 2, train=False, mode="gather")
  np.testing.assert_allclose(scores.memory(tokens)[0], want)


# Diversity and coverage.


@needs_golden
@pytest.mark.parametrize("name", ["divprune_36", pytest.param("divprune_81", marks=pytest.mark.thorough)])
def test_divprune_recorded(name):
  g = recorded(name)
  module = MaxMin(metric="token", start="isolated")
  assert order(reduced(module, tokens_of(g["x"]), g["k"])[0]) == [g["order"].tolist()]


@needs_golden
def test_divprune_recorded_in_a_model():
  g, x = recorded("llava_reduce/divprune_0.25"), recorded("llava_reduce/fastervlm_9")["projected"]
  module = MaxMin(metric="token", start="isolated")
  assert order(reduced(module, tokens_of(x), 9)[0]) == g["order"].tolist()
  assert order(reduced(module.clone(raster=True), tokens_of(x), 9, mask=False)[0]) == g["kept"].tolist()


@needs_golden
@pytest.mark.parametrize("name", ["mmr_36", pytest.param("mmr_49", marks=pytest.mark.thorough)])
def test_idpruner_recorded(name):
  g = recorded(name)
  module = MMR(score="memory", metric="token", relevance=float(g["lam"]), scale="range")
  out, _ = reduced(module, tokens_of(g["x"], state_memory=g["raw_scores"][None]), g["k"])
  assert order(out) == [g["order"].tolist()]


@needs_golden
def test_idpruner_recorded_in_a_model():
  g, x = recorded("llava_reduce/idpruner_9"), recorded("llava_reduce/fastervlm_9")["projected"]
  module = MMR(metric="token", relevance=float(g["lam"]), scale="range")
  assert order(reduced(module, tokens_of(x, cls_attention=g["importance"]), g["k"])[0]) == g["order"].tolist()


def test_idpruner_takes_several_at_once():
  """Keys at 0, 10, 90, 60 degrees, scores 1 .9 .5 .4, lambda .5.  At once: 0 and 1 by score; then 2, 3 by

  .5 (.5 - .4) / .6 - .5 cos 80 = -.0035 and 0 - .5 cos 50 = -.32.  One at a time 2 is second.  lambda 0 takes the best
  first, and then the farthest.
  """
  tokens = tokens_of(on_circle(0, 10, 90, 60), cls_attention=[[1, 0.9, 0.5, 0.4]])
  module = MMR(metric="token", scale="range", at_once=2)
  assert order(reduced(module, tokens, 3)[0]) == [[0, 1, 2]]
  assert order(reduced(module.clone(at_once=1), tokens, 3, mask=False)[0]) == [[0, 2, 1]]
  assert order(reduced(module.clone(at_once=1, relevance=0.0), tokens, 3, mask=False)[0]) == [[0, 2, 3]]


@needs_golden
def test_facility_recorded():
  g = recorded("facility_36")
  out, report = reduced(coverage.Facility(), tokens_of(g["x"]), g["k"])
  assert order(out) == [g["order"].tolist()]
  np.testing.assert_allclose(report["score"][0][g["order"]], g["gains"], rtol=1e-5)


@needs_golden
def test_scope_recorded():
  g = recorded("scope_36")
  module = coverage.Facility(score="cls_attention", power=float(g["alpha"]))
  assert order(reduced(module, tokens_of(g["x"], cls_attention=g["cls_attn"]), g["k"])[0]) == g["order"].tolist()


@needs_golden
def test_mmtok_recorded():
  g = recorded("mmtok_36")
  text, n = g["text"].shape[0], 36
  pad = np.zeros((text, 24), np.float32)
  tokens = tokens_of(np.concatenate([g["text"], g["vision"]]), text,
                     state_image=np.concatenate([pad, g["vision_clip"]])[None])  # fmt: skip
  options = dict(alpha=float(g["alpha"]), text_temperature=float(g["tv_temp"]), temperature=float(g["vv_temp"]))
  out, report = reduced(coverage.MMTok(**options, raster=False), tokens, text + g["k"])
  assert order(out, text) == [g["order"].tolist()]
  np.testing.assert_allclose(report["score"][0, text:][g["order"]], g["gains"], rtol=1e-3, atol=1e-7)
  assert order(reduced(coverage.MMTok(**options), tokens, text + g["k"], mask=False)[0], text) == [
    g["kept_sorted"].tolist()
  ]
  assert n == out.owner.shape[1] - text


# Parts of the picture, layers, outliers.


@needs_golden
def test_prumerge_recorded():
  g = recorded("prumerge_iqr")
  attention = jnp.asarray(g["cls_attn"])
  np.testing.assert_allclose(
    prumerge.upper_fence(attention, jnp.ones(attention.shape, bool)), g["upper_fence"], rtol=1e-5
  )
  tokens = tokens_of(np.zeros((*attention.shape, 1)), cls_attention=attention)
  out, _ = reduced(prumerge.PruMerge(merge=False), tokens, 20, mask=False)
  assert order(out) == [np.flatnonzero(row).tolist() for row in g["keep"]]


def test_prumerge_by_hand():
  """Attention 1 1 1 1 1 9 and keys at 0 0 0 0 90 80: quartiles are 1 and 1, so that 5 alone is above the fence.

  All join it, weighed by attention: (1 + 2 + 3 + 4 + 5 + 9 x 6) / 14.
  """
  tokens = tokens_of(np.arange(1.0, 7)[:, None], cls_attention=[[1, 1, 1, 1, 1, 9]],
                     key=on_circle(0, 0, 0, 0, 90, 80)[None, :, None])  # fmt: skip
  out, _ = reduced(prumerge.PruMerge(), tokens, 3)
  assert np.asarray(out.alive[0]).tolist() == [True, False, False] and float(out.size[0, 0]) == 6.0
  np.testing.assert_allclose(out.x[0, 0], 69 / 14, rtol=1e-6)


# FlowCut.


@needs_golden
def test_flowcut_recorded():
  g = recorded("flowcut")
  arrays = (jnp.asarray(g[name]) for name in ("cls_attn", "semantic_attn", "value"))
  np.testing.assert_allclose(scores.flow(*arrays), g["score"], rtol=1e-5)
  counts = [rates.flowcut_count(jnp.asarray(g["cls_attn"]), 36, int(g["target"]), int(left)) for left in g["rpl"]]
  np.testing.assert_array_equal(counts, g["prune_num"])


def test_flowcut_by_hand():
  """CLS pays .5 .25 .25, values of one head: cls (1, 0), then (0, 1), (2, 0): v_cls . v = 0 and 2.

  softmax .1192, .8808; c = .5, .5; times the norms 1 and 2: .6192 and 2.7616.
  """
  value = np.array([[1.0, 0], [0, 1], [2, 0]])[None, :, None]
  tokens = tokens_of(np.zeros((3, 1)), 1, cls_attention=[[0.5, 0.25, 0.25]], value=value)
  np.testing.assert_allclose(scores.flowcut(tokens)[0, 1:], [0.6192, 2.7616], atol=1e-4)


# Text and vision.


def test_flashvlm_by_hand():
  """Text at 0 degrees; visual tokens at 10, 20, 90, 180 degrees.  Two by relevance, 0 and 1; one is diverse.

  Of 90 and 180 degrees both are equally central; the first is taken.  With as much weight on a score that is largest at
  180 degrees alone, that one leads.
  """
  tokens = tokens_of(on_circle(0, 10, 20, 90, 180), 1)
  module = flashvlm.FlashVLM(diverse=0.34)
  assert order(reduced(module, tokens, 4)[0], 1) == [[0, 1, 2]]
  shown = tokens.replace(feats={"state/memory": jnp.asarray([[0.0, 0, 0, 0, 1]])})
  assert order(reduced(flashvlm.FlashVLM(score="memory", diverse=0.0, relevance=0.2), shown, 2, mask=False)[0], 1) == [
    [3]
  ]
  a = np.array([0.0, 1.0])  # mean .5, deviation .5: -1 and 1, twice as sharp -2 and 2
  got = flashvlm.sharpened(jnp.asarray([a]), jnp.ones((1, 2), bool), 0.5)
  np.testing.assert_allclose(np.exp(got[0]), np.exp([-2, 2]) / np.exp([-2, 2]).sum(), rtol=1e-4)


def test_attention_of_text_and_of_vision():
  """Three tokens in causal order: vision 0 and 1, text 2; queries and keys so that logits are log 1, 2, 3 (d = 1).

  Text sees 1/6, 2/6, 3/6; among vision 0 sees itself, and 1 has 1/3 and 2/3: means (1 + 1/3) / 2 and 1/3.
  """
  key = np.log([1.0, 2.0, 3.0])[None, :, None, None]
  tokens = tokens_of(np.zeros((3, 1)), query=np.ones((1, 3, 1, 1)), key=key)
  tokens = tokens.replace(protected=jnp.asarray([[False, False, True]]))
  tokens.feats["state/index"] = jnp.arange(3)[None]
  np.testing.assert_allclose(scores.text_attention(tokens)[0], [1 / 6, 1 / 3, 1 / 2], rtol=1e-5)
  np.testing.assert_allclose(scores.visual_attention(tokens)[0, :2], [2 / 3, 1 / 3], rtol=1e-5)


def test_raters_by_hand():
  """Vision (1, 0); words (2, 0), (0, 0), (0, 1): shares e^2 / (e^2 + 2) = .787, .106, .106; the first is above 1/3."""
  tokens = tokens_of([[1.0, 0], [2, 0], [0, 0], [0, 1]]).replace(protected=jnp.asarray([[False, True, True, True]]))
  assert np.asarray(scores.rater(tokens)[0]).tolist() == [0, 1, 0, 0]
  last = tokens.replace(feats={"state/index": jnp.asarray([[3, 0, 1, 2]])})  # the same words in front of the image
  assert np.asarray(scores.rater(last)[0]).tolist() == [0, 1, 0, 0]
  among = tokens.replace(feats={"state/index": jnp.asarray([[1, 0, 2, 3]])})  # (2, 0) before it: .5 and .5 are left
  assert np.asarray(scores.rater(among)[0]).tolist() == [0, 0, 0, 0]
  key = np.log([[1.0, 1, 1, 1]])[..., None, None]
  tokens = tokens.replace(feats={"state/rater": jnp.asarray([[0.0, 0, 0, 0]]), "query": jnp.ones((1, 4, 1, 1)),
                                 "key": jnp.asarray(key, jnp.float32)})  # fmt: skip
  np.testing.assert_array_equal(scores.text_attention(tokens), np.zeros((1, 4)))  # nobody rates


def test_sparsevlm_recycles():
  """Seven tokens in descending score, four stay.  Three go: m = floor(.9) + 1 = 1, c = 0 + 1: three are the best, and
  one is a cluster of the next one.  With all of them recycled it is the mean of 4, 5, 6 and 7.
  """
  tokens = tokens_of(np.arange(1.0, 8)[:, None], state_memory=np.arange(7.0, 0, -1)[None])
  module = sparsevlm.SparseVLM(score="memory")
  out, _ = reduced(module, tokens, 4, mask=False)
  np.testing.assert_allclose(out.x[0, :, 0], [1, 2, 3, 4])
  out, _ = reduced(module.clone(recycled=1.0), tokens, 4)
  np.testing.assert_allclose(np.sort(out.x[0, :, 0]), [1, 2, 3, 5.5], rtol=1e-6)
  assert float(out.size.sum()) == 7.0
  out, _ = reduced(module.clone(recycled=0.0), tokens, 4, mask=False)
  assert order(out) == [[0, 1, 2, 3]]


@needs_golden
def test_transprune_recorded():
  g = recorded("transprune_ttv")
  got = scores.turn(jnp.asarray(g["before"]), jnp.asarray(g["after"]))
  np.testing.assert_allclose(got, g["weight"], rtol=1e-4, atol=1e-7)


SHAPE = Shape(vocab=20, width=16, depth=3, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8, max_length=32)
LLM = dict(stack="llm", keep=0.5)
IN_A_DECODER = {
  "sparsevlm": dict(
    a=dict(stack="llm", reducer="remember", score="rater", name_of="rater", layers=(0,), place="before"),
    b=dict(LLM, reducer="sparsevlm", layers=(1, 2), place="before"),
  ),
  "transprune": dict(
    a=dict(stack="llm", reducer="remember", score="transition", how="sum", layers=(0, 1)),
    b=dict(LLM, reducer="topk", score="transprune", layers=(1,), place="after"),
  ),
  "visiondrop": dict(
    a=dict(LLM, reducer="visionzip", score="visual_attention", metric="token", layers=(1, 2), place="before")
  ),
  "mmtok": dict(a=dict(LLM, reducer="mmtok", layers=(0,), place="before")),
}


@pytest.mark.parametrize(
  "name", ["sparsevlm", *(pytest.param(n, marks=pytest.mark.thorough) for n in IN_A_DECODER if n != "sparsevlm")]
)
def test_in_a_language_model_rows_are_what_they_are_alone(name):
  """Two prompts of 12 and 9 tokens, 6 and 4 of them visual, behind each other's padding and alone."""
  module = decoder.make(SHAPE, IN_A_DECODER[name])
  rng = np.random.default_rng(0)
  kinds = np.array([list("ttvvvvvvtttt"), list("pppttvvvvttt")])
  ids, mask, protected = rng.integers(0, 20, kinds.shape), kinds != "p", kinds != "v"
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), ids, mode="mask"))["params"]
  params = jax.tree.map(
    lambda a: jnp.asarray(rng.normal(size=a.shape) / max(a.shape[0], 4) ** 0.5, jnp.float32), shapes
  )

  def run(rows, columns, mode="gather"):
    inputs = dict(ids=ids[rows, columns], mask=mask[rows, columns], protected=protected[rows, columns])
    known = budget.census(inputs["mask"], inputs["protected"])
    apply = jax.jit(lambda p: module.apply({"params": p}, **inputs, known=known, mode=mode), compiler_options=quick())
    out = apply(params)
    last = np.asarray(out.tokens.alive).sum(1) - 1
    return np.asarray(out.logits)[np.arange(len(last)), last]

  together = run(slice(0, 2), slice(0, 12))
  np.testing.assert_allclose(run(slice(1, 2), slice(3, 12)), together[1:], atol=1e-4)
  np.testing.assert_allclose(run(slice(0, 2), slice(0, 12), "mask"), together, atol=1e-4)


# Errors that a user can make.


@pytest.mark.parametrize(
  "module, message",
  [
    (visionzip.VisionZip(contextual=0.0), "contextual=0.0 must be above 0"),
    (crops.HiRED(grid=(2,)), r"grid=\(2,\) must be \(rows, columns\)"),
    (crops.HiRED(cells="rows"), "cells='rows' is unknown"),
    (crops.GlobalCom2(share=0.0), "share=0.0 must be above"),
    (coverage.Facility(score="cls"), "score='cls' is not a score"),
    (holov.HoloV(chunks=0), "chunks=0 must be at least 1"),
    (hiprune.HiPrune(deep="columns"), "deep='columns' is not a score"),
    (flashvlm.FlashVLM(diverse=1.5), "diverse=1.5 must be in"),
    (memory.Remember(how="max"), "how='max' is unknown"),
    (MMR(at_once=0), "at_once=0 must be at least 1"),
    (MMR(scale="minmax"), "scale='minmax' is not a scale"),
    (sparsevlm.SparseVLM(recycled=2.0), "recycled=2.0 must be in"),
  ],
  ids=lambda value: type(value).__name__,
)
def test_errors(module, message):
  assert isinstance(module, base.Reducer)
  with pytest.raises(ValueError, match=message):
    module.needed()
