"""Reduction inside a language model: recorded numbers, the cache, unequal prompts, both modes, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from languages import batch, forward, golden, needs_golden, recorded, tiny

from tokred.nn import budget, decoder
from tokred.nn.generate import generate
from tokred.sites import parse

FASTV = dict(stack="llm", reducer="topk", score="last_attention", layers=(2,), place="before", keep=1 / 3)
PDROP = dict(
  stack="llm", reducer="topk", score="last_attention_ahead", layers=(2, 4), place="before", keep=0.5, position="reindex"
)
SPAN = slice(6, 42)  # of the image, in the recorded prompts


def fixed(**sites):
  return tuple((name, tuple(site.items())) for name, site in sites.items())


def prompt(module, params):
  """Embeddings of the recorded prompts, with the image's features in their places."""
  io = recorded("hf/llava_clip_llama/io")
  x = np.array(params["embed"]["embedding"])[io["input_ids"]]
  x[:, SPAN] = recorded("llava_reduce/fastervlm_9")["projected"]
  protected = np.ones(x.shape[:2], bool)
  protected[:, SPAN] = False
  return io, jnp.asarray(x), protected


@needs_golden
def test_recorded_fastv():
  module, params = golden("llava_clip_llama", fixed(fastv=FASTV))
  _, x, protected = prompt(module, params)
  known = budget.census(protected | True, protected)
  _, out = forward(module, params, known, x=x, protected=protected)
  wanted = recorded("llava_reduce/fastv_K2_12")
  kept = np.asarray(out.aux["owner/2"])[:, SPAN] >= 0
  np.testing.assert_array_equal([np.flatnonzero(row) for row in kept], wanted["kept"])
  np.testing.assert_allclose(out.logits, wanted["logits"], atol=2e-4)
  assert out.tokens.x.shape[1] == 27
  np.testing.assert_array_equal(out.tokens.position[0, 6:18], wanted["kept"][0] + 6)


@needs_golden
def test_recorded_pyramid():
  module, params = golden("llava_clip_llama", fixed(pdrop=PDROP))
  _, x, protected = prompt(module, params)
  known = budget.census(protected | True, protected)
  _, out = forward(module, params, known, x=x, protected=protected)
  wanted = recorded("llava_reduce/pdrop_2_4")
  for layer, stage in ((2, 0), (4, 1)):
    kept = np.asarray(out.aux[f"owner/{layer}"])[:, SPAN] >= 0
    np.testing.assert_array_equal([np.flatnonzero(row) for row in kept], wanted[f"kept_stage{stage}"])
  np.testing.assert_allclose(out.logits, wanted["logits"], atol=2e-4)
  np.testing.assert_array_equal(out.tokens.position, np.arange(24)[None].repeat(2, 0))


@needs_golden
@pytest.mark.thorough
def test_recorded_text_with_a_share_of_all():
  module, params = golden("llava_clip_llama", fixed(fastv=FASTV | dict(keep=1.0, position="reindex")))
  io, x, protected = prompt(module, params)
  out = generate(module, params, x=x, protected=protected, max_new_tokens=12)
  np.testing.assert_array_equal(out.tokens, io["gen_tokens"])


@needs_golden
def test_a_share_of_all_is_the_dense_model():
  module, params = golden("llava_clip_llama", fixed(fastv=FASTV | dict(keep=1.0, position="reindex")))
  io, x, protected = prompt(module, params)
  logits, _ = forward(module, params, budget.census(protected | True, protected), x=x, protected=protected)
  np.testing.assert_allclose(logits, io["logits"], atol=2e-4)


BEFORE = dict(FASTV, layers=(1, 2), keep=(0.6, 0.5))
SITES = {
  "mixed": dict(a=dict(FASTV, layers=(1,), keep=0.6), b=dict(PDROP, layers=(2,))),  # both policies
  "before": dict(a=BEFORE),
  "anew": dict(a=dict(BEFORE, position="reindex")),
  "number": dict(a=dict(PDROP, layers=(1,), keep=9)),
  "attn_after": dict(
    a=dict(FASTV, layers=(0,), place="attn", score="key_norm", keep=0.6, position="reindex"),
    b=dict(FASTV, layers=(1,), place="after", keep=0.5),
  ),
  "mmr": dict(a=dict(stack="llm", reducer="mmr", score="key_norm", layers=(0, 1), keep=0.6)),
  "threshold": dict(a=dict(FASTV, layers=(1,), score="key_norm", rate="threshold", threshold=5.5, keep=0.8)),
}
QUICKLY = ("mixed", "threshold")
ALL = [*QUICKLY, *(pytest.param(name, marks=pytest.mark.thorough) for name in SITES if name not in QUICKLY)]


@pytest.mark.parametrize("name", ALL)
def test_decoding_with_a_cache_is_recomputing_without(name):
  """Teacher-forced: the whole text at once, reduced by what the prompt's last token saw, and a token at a time."""
  module, params = tiny(SITES[name])
  ids, mask, protected = batch()
  known, new = budget.census(mask, protected), 4
  text = np.random.default_rng(4).integers(0, 50, (2, new)).astype(np.int32)
  whole = np.concatenate([ids, text], 1)
  there, stays = (np.concatenate([a, np.ones((2, new), bool)], 1) for a in (mask, protected))
  last = jnp.full(2, ids.shape[1] - 1)
  known_whole = dataclasses.replace(known, text=known.text + new)
  spots = {site: dict(items) for site, items in SITES[name].items()}
  if name == "number":  # counts the text too, which is longer here
    spots["a"]["keep"] += new
  longer = decoder.make(module.shape, spots)
  wanted, _ = forward(longer, params, known_whole, ids=whole, mask=there, protected=stays, last=last)

  @jax.jit
  def decode(params):
    inputs = dict(ids=ids, mask=mask, protected=protected)
    start = module.apply({"params": params}, **inputs, room=new, known=known, method="prefill")
    logits, cache = [start.logits[:, 0]], start.cache
    for i in range(new):
      more, cache = module.apply({"params": params}, text[:, i], cache, method="decode")
      logits.append(more)
    return jnp.stack(logits, 1), cache

  got, cache = decode(params)
  np.testing.assert_allclose(got, wanted[:, ids.shape[1] - 1 :], atol=1e-4)
  assert cache.slots[0] == ids.shape[1] > cache.slots[2] and cache.room == new
  assert cache.nbytes == sum(2 * 2 * 2 * 8 * 4 * (slots + new) for slots in cache.slots)


@pytest.mark.parametrize("name", ALL)
def test_unequal_prompts_get_what_they_get_alone(name):
  module, params = tiny(SITES[name])
  ids, mask, protected = batch()
  logits, out = forward(module, params, budget.census(mask, protected), ids=ids, mask=mask, protected=protected)
  for row in (0,) if name == "mixed" else (0, 1):
    own = mask[row]
    alone = dict(ids=ids[row : row + 1, own], protected=protected[row : row + 1, own])
    one, lone = forward(module, params, budget.census(alone["protected"] | True, alone["protected"]), **alone)
    np.testing.assert_array_equal(out.tokens.alive[row].sum(), lone.tokens.alive.sum())
    np.testing.assert_allclose(np.asarray(logits)[row, own], one[0], atol=1e-4)


@pytest.mark.thorough
def test_sites_leave_text_alone():
  module, params = tiny(SITES["mixed"])
  ids, mask, _ = batch()
  got = generate(module, params, ids, mask, 5)
  np.testing.assert_array_equal(got.tokens, generate(*tiny(), ids, mask, 5).tokens)


@pytest.mark.thorough
@pytest.mark.parametrize("name", SITES)
def test_unequal_prompts_write_what_they_write_alone(name):
  module, params = tiny(SITES[name])
  ids, mask, protected = batch()
  together = generate(module, params, ids, mask, 5, protected=protected)
  longer = generate(module, params, ids, mask, 5, protected=protected, cache_length=30)
  np.testing.assert_array_equal(longer.tokens, together.tokens)
  for row in range(2):
    own = mask[row]
    alone = generate(module, params, ids[row : row + 1, own], None, 5, protected=protected[row : row + 1, own])
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_text_stays_and_shapes_are_static():
  """7 and 9 visual tokens of 16; of 0.6, 5 and 6 stay; of 0.5, 3 and 3.  Slots: 16, 14, 12 as 7 - 5 and 5 - 3 tell."""
  module, params = tiny(SITES["mixed"])
  ids, mask, protected = batch()
  known = budget.census(mask, protected)
  assert known == budget.Census(free=7, text=7) and budget.capacities(module.sites, 16, known) == (14, 12)
  _, out = forward(module, params, known, ids=ids, mask=mask, protected=protected)
  stays = np.asarray(out.tokens.owner) >= 0
  assert stays[mask & protected].all()
  np.testing.assert_array_equal((stays & ~protected).sum(1), [3, 3])
  assert out.tokens.x.shape[1] == 12


@pytest.mark.parametrize("name", ALL)
def test_masked_is_gathered_and_garbage_is_inert(name):
  module, params = tiny(SITES[name])
  ids, mask, protected = batch()
  x = np.array(params["embed"]["embedding"])[ids]
  gathered, _ = forward(
    module, params, budget.census(mask, protected), x=jnp.asarray(x), mask=mask, protected=protected
  )
  x[~mask] = np.nan
  masked, _ = forward(module, params, None, "mask", x=jnp.asarray(x), mask=mask, protected=protected)
  np.testing.assert_allclose(masked, gathered, atol=1e-5)
  assert np.isfinite(masked).all()


@pytest.mark.parametrize(
  "site, message",
  [
    (dict(FASTV, layers=(0,)), r"sites.s.layers has 0, but 'topk' reads last_attention of the block before; valid: fr"),
    (dict(FASTV, layers=(3,)), r"sites.s.layers has 3, but the llm has layers 0 to 2"),
    (dict(FASTV, position="orignal"), r"sites.s.position='orignal' is not a policy; did you mean 'original'"),
    (dict(FASTV, place="output"), r"sites.s.place='output' is not available in the llm; valid: after, ahead, around, "),
    (dict(FASTV, stack="encoder"), r"sites.s.stack='encoder' does not exist in this model; valid: llm"),
    (dict(FASTV, score="cls_attention"), r"sites.s.reducer='topk' scores by cls_attention, .*without a CLS token"),
    (dict(FASTV, score="pagerank"), r"sites.s.reducer='topk' reads pagerank_30, which the llm does not have at place="),
    (dict(FASTV, score="last_attention_ahead", place="after"), r"reads last_attention_ahead, .*place='after'"),
    (
      dict(FASTV, rate="learned_threshold"),
      r"sites.s.rate='learned_threshold': in the llm tokens are counted by a fix",
    ),
    (
      dict(stack="llm", reducer="mmr", score="key_norm", layers=(1,), r=2),
      r"sites.s.rate='fixed': in the llm tokens a",
    ),
    (
      dict(stack="llm", reducer="tome", layers=(1,), keep=0.5),
      r"sites.s.reducer='tome' does not suit stack='llm', but encoder; valid there: atp, attention_g",
    ),
    (
      dict(stack="llm", reducer="topk", layers=(2,), place="before", score="token_norm", rate="learned", granularity=2),
      r"sites.s.granularity=2 is of counts, but an llm learns shares; drop the field",
    ),
    (dict(FASTV, proportional=True), r"sites.s.proportional=True is not available in the llm; valid: False"),
  ],
)
def test_sites_that_cannot_be(site, message):
  with pytest.raises(ValueError, match=message):
    tiny({"s": site})


def test_an_encoder_has_no_policy_of_positions():
  from tokred.layout import Stack

  with pytest.raises(ValueError, match=r"sites.s.position='reindex' is not a policy; only sites with stack='llm'"):
    parse({"s": dict(reducer="topk", layers=(1,), keep=0.5, position="reindex")}, Stack(4, 17, 1))


def test_budgets_below_the_text():
  module, params = tiny({"s": dict(FASTV, keep=7)})
  ids, mask, protected = batch()
  with pytest.raises(ValueError, match=r"sites.s.keep=7 at layer 2, but a prompt has 7 tokens of text; valid: 8 or mo"):
    generate(module, params, ids, mask, protected=protected)
  with pytest.raises(ValueError, match=r"need known=census\(mask, protected\), counted on the host"):
    forward(module, params, ids=ids, mask=mask, protected=protected)


@pytest.mark.thorough
def test_gradients_reach_all_parameters_and_stay_finite():
  module, params = tiny(SITES["mixed"])
  ids, mask, protected = batch()

  @jax.jit
  def slope(params):
    def loss(params):
      logits, _ = forward(module, params, None, "mask", ids=ids, mask=mask, protected=protected)
      chance = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=2)[..., 0]
      return -jnp.where((mask & protected)[:, 1:], chance, 0.0).sum()

    return jax.grad(loss)(params)

  for path, leaf in jax.tree_util.tree_leaves_with_path(slope(params)):
    assert np.isfinite(leaf).all() and (np.asarray(leaf) != 0).any(), path
