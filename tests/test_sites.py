"""config.sites: every error in one line, before anything is compiled; order, counts, tuples, schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokred.reducers  # noqa: F401 (registers)
from tokred import drafts, schedules, sites
from tokred.config import complete
from tokred.layout import Stack
from tokred.nn import reduce, vit
from tokred.reducers import base
from tokred.testing import cases

STACK = Stack(depth=4, num_tokens=17, num_protected=1)
TOPK = dict(reducer="topk", layers=(1,), keep=0.5)
DYT = dict(reducer="dyt", layers=(1,), keep=0.5)


def moving(cls):
  return [field.name for field in dataclasses.fields(cls) if field.name in cls.annealable]


def parse(stack=STACK, **named):
  return sites.parse(named, stack)


def counts(**named):
  return parse(**named).counts()


@pytest.mark.parametrize(
  "site, message",
  [
    (dict(layers=(1,), keep=0.5), r"sites.s.reducer is missing; valid: .*topk"),
    (dict(TOPK, reducer="topc"), r"sites.s.reducer='topc' is not a reducer; did you mean 'topk'\?"),
    (dict(TOPK, reducer=("topk", "tomee"), keep=((0.5,), (0.5,))), r"sites.s.reducer='tomee' .*did you mean 'tome'"),
    (
      dict(TOPK, place="mlp"),
      r"sites.s.place='mlp' does not suit reducer 'topk'; valid: attn, before, after, around, output",
    ),
    (
      dict(reducer=("sit", "sit_reverse"), layers=(1,), place="after", keep=((9,), (9,))),
      r"sites.s.reducer=\('sit', 'sit_reverse'\): 'sit_reverse' serves training alone, and needs a site of its own",
    ),
    (dict(TOPK, stack="llm"), r"sites.s.stack='llm' does not exist in this model; valid: encoder"),
    (dict(reducer="topk", keep=0.5), r"sites.s.layers is missing; valid: a tuple of block numbers from 0 to 3"),
    (dict(TOPK, layers=(1, 4)), r"sites.s.layers has 4, but the encoder has layers 0 to 3"),
    (dict(TOPK, layers=(-1, 1)), r"sites.s.layers has -1, "),
    (dict(TOPK, layers=("1",)), r"sites.s.layers has '1', "),
    (dict(TOPK, layers=(1, "2")), r"sites.s.layers has '2', "),
    (dict(reducer="pool", layers=(1,), keep=5, grid=4), r"sites.s.grid=4 must be a tuple of whole numbers"),
    (dict(reducer="stvit", layers=(1,), keep=5, grid=("4", 4)), r"sites.s.grid=\('4', 4\) must be a tuple of whole"),
    (dict(TOPK, layers=(1, 1)), r"sites.s.layers=\(1, 1\) names a layer twice"),
    (dict(TOPK, rate="lerned"), r"sites.s.rate='lerned' is not a rate; did you mean 'learned'\?"),
    (dict(TOPK, rate="learned"), r"sites.s.keep is learned: drop the field, or set sites.s.rate='fixed'"),
    (dict(TOPK, r=2), r"sites.s needs exactly one of keep \(share or number of tokens\) and r"),
    (dict(reducer="topk", layers=(1,)), r"sites.s needs exactly one of keep"),
    (dict(TOPK, rate="threshold"), r"sites.s.threshold is missing: the smallest score that stays"),
    (
      dict(reducer="stvit", layers=(1,), keep=5, rate="scheduled", schedule=(0, 9)),
      r"sites.s.rate='scheduled' moves counts, which those of \('stvit',\) cannot; valid: fixed",
    ),
    (
      dict(TOPK, place="before", score="last_attention_ahead"),
      r"sites.s.reducer='topk' reads last_attention_ahead, which only blocks of stack='llm' have ahead",
    ),
    (dict(reducer="hired", layers=(1,), keep=0.5, rate="threshold", threshold=0.1), "sites.s.rate='threshold'"),
    (dict(TOPK, rate="scheduled"), r"sites.s.rate='scheduled' needs one reducer, keep, and schedule="),
    (dict(reducer="topk", layers=(1,), r=2, rate="scheduled", schedule=(0, 9)), r"'scheduled' needs one reducer, keep"),
    (dict(TOPK, rate="scheduled", schedule=5), r"sites.s.schedule=5 must be two numbers, \(first step, last step\)"),
    (dict(TOPK, rate="scheduled", schedule=("0", 9)), r"sites.s.schedule=\('0', 9\) must be two numbers"),
    (dict(TOPK, rate="scheduled", schedule=(9, 0)), r"sites.s.schedule=\(9, 0\) must be two numbers, .*, ascending"),
    (
      dict(reducer="sit_reverse", layers=(1,), keep=0.7),
      r"sites.s.keep=0.7, but \('sit_reverse',\) takes no token away; drop the field",
    ),
    (dict(reducer="recover", place="output", r=2), r"sites.s.r=2, but \('recover',\) takes no token away; drop the f"),
    (dict(TOPK, keep=float("nan")), r"sites.s.keep=nan must be a share \(float up to 1.0\) or a number of tokens"),
    (dict(TOPK, rate=0.5), r"sites.s.rate=0.5 is not a rate; valid: fixed"),
    (
      dict(reducer="tome", layers=(1,), r="13"),
      r"sites.s.r='13' must be a number of tokens, \(r, inflection\), or a tu",
    ),
    (dict(reducer="gumbel", layers=(1,), keep=0.5, temperature=-1.0), r"sites.s.temperature=-1.0 must be above 0"),
    (dict(reducer="avit", layers=(1, 3)), r"sites.s.layers=\(1, 3\), but \('avit',\) acts in every block; valid: r"),
    (dict(DYT, anneal=5), r"sites.s.anneal=5 must hold \(option, from, to, first step, last step\), values above 0"),
    (dict(DYT, anneal=("temperature", 4.0, 1.0, 0, 9)), r"sites.s.anneal=\('temperature', .* must hold \(option"),
    (dict(DYT, anneal=(("temperature", 4.0, 1.0, 9, 0),)), r"sites.s.anneal=.* and steps ascending"),
    (dict(DYT, anneal=(("warmth", 4.0, 1.0, 0, 9),)), r"'warmth' is no option of \('dyt',\) that can move .*valid: t"),
    (dict(DYT, anneal=(("dropout", 0.3, 0.1, 0, 9),)), r"'dropout' is no option of .*; valid: temperature"),
    (dict(TOPK, anneal=(("temperature", 4.0, 1.0, 0, 9),)), r"'temperature' is no option of \('topk',\) .*valid: none"),
    (
      dict(DYT, temperature=4.0, anneal=(("temperature", 4.0, 1.0, 0, 9),)),
      r"sites.s.temperature=4.0, but sites.s.anneal ends at 1.0, which is what ships; valid: 1.0, or without",
    ),
    (
      dict(DYT, anneal=(("temperature", 4.0, 1.0, 0, 9), ("temperature", 3.0, 1.0, 9, 19))),
      r"sites.s.anneal=.* moves 'temperature' twice; valid: one entry an option",
    ),
    (dict(reducer="router", layers=(1,), rate="learned"), r"'learned' is not available at place='around'; valid: b"),
    (
      dict(TOPK, initial=9),
      r"sites.s.initial is where an encoder's learned rate begins, but rate='fixed'; drop the field",
    ),
    (
      dict(reducer="topk", layers=(1,), rate="learned", initial=1),
      r"sites.s.initial=1 must be a number of tokens from 2 to",
    ),
    (
      dict(reducer="topk", layers=(1,), rate="learned", initial="budgt"),
      r"sites.s.initial='budgt' must be a number of tok",
    ),
    (
      dict(reducer="topk", layers=(1,), rate="learned", initial=(9, 8)),
      r"sites.s.initial=\(9, 8\) has 2 entries",
    ),
    (
      dict(TOPK, schedule=(0, 9)),
      r"sites.s.schedule=\(0, 9\) is for rate='scheduled', but rate='fixed'; drop the field",
    ),
    (dict(TOPK, granularity=4), r"sites.s.granularity=4 is for rate='learned', but rate='fixed'"),
    (dict(TOPK, threshold=0.3), r"sites.s.threshold=0.3 is for rate='threshold' or 'learned_threshold', but rate='fi"),
    (
      dict(TOPK, softness=0.3),
      r"sites.s.softness=0.3 is for rate='learned_threshold' or 'threshold', but rate='fixed'",
    ),
    (dict(TOPK, layers=(0, 7), place="output"), r"sites.s.layers=\(0, 7\), but place='output' is behind all blocks"),
    (dict(TOPK, granularity=0), r"sites.s.granularity=0 must be an int of at least 1"),
    (dict(TOPK, granularity=1.5), r"sites.s.granularity=1.5 must be an int"),
    (
      dict(TOPK, place="before", layers=(0, 1)),
      r"sites.s.layers has 0, but 'topk' reads cls_attention of the block be",
    ),
    (dict(TOPK, fuze=True), r"sites.s.fuze is not a field of a site or of \('topk',\); did you mean 'fuse'\?"),
    (dict(TOPK, score="key_nrm"), r"sites.s.score='key_nrm' is not a score; did you mean 'key_norm'\?"),
    (dict(TOPK, score="key_norm", fuse=True), r"sites.s.fuse=True weighs with score='cls_attention', not 'key_norm'"),
    (dict(TOPK, reducer="router", gate="sigmiod"), r"sites.s.gate='sigmiod' is not a gate; did you mean 'sigmoid'\?"),
    (dict(reducer="tome", layers=(1,), r=(1, 2, 3)), r"sites.s.r=\(1, 2, 3\) has 3 entries for 1 layers"),
    (
      dict(reducer="tome", layers=(0, 1, 2), r=(4, 1)),
      r"sites.s.r=\(4, 1\) could be .*valid: \(4, 1, 0\) .*\(4, 1.0\)",
    ),
    (dict(reducer=("topk", "diffrate_merge"), layers=(1,), keep=0.5), r"sites.s.keep=0.5 must be a tuple with one e"),
    (dict(TOPK, keep=(0.5, 0.4)), r"sites.s.keep=\(0.5, 0.4\) has 2 entries for 1 layers"),
    (dict(TOPK, keep=True), r"sites.s.keep=True must be a share \(float up to 1.0\) or a number of tokens \(int\)"),
    (dict(TOPK, keep="half"), r"sites.s.keep='half' must be a share"),
    (dict(TOPK, keep=0.0), r"sites.s.keep=0.0 must be above 0.0 and at most 1.0"),
    (dict(TOPK, keep=-0.5), r"sites.s.keep=-0.5 must be above 0.0"),
    (dict(TOPK, keep=2.5), r"sites.s.keep=2.5 must be a share up to 1.0 or a whole number of tokens"),
    (dict(TOPK, keep=18), r"sites.s: keep=18 but only 17 tokens arrive at layer 1; lower config.sites.s.keep or move"),
    (dict(TOPK, layers=(1, 2), keep=(9, 12)), r"keep=12 but only 9 tokens arrive at layer 2"),
    (dict(TOPK, keep=1), r"sites.s: keep=1 leaves 1 of 17 tokens at layer 1, but 'topk' can go down to 2; raise"),
    (
      dict(reducer="tome", layers=(1,), keep=8),
      r"keep=8 leaves 8 of 17 tokens at layer 1, but 'tome' can go down to 9",
    ),
    (dict(reducer="tome", layers=(1,), keep=0.8, rate="threshold", threshold=0.5), r"needs reducers that score each"),
    (dict(TOPK, layers=()), r"sites.s.layers=\(\) must name at least one layer, in ascending order"),
    (dict(TOPK, layers=(2, 1)), r"sites.s.layers=\(2, 1\) must name at least one layer, in ascending order"),
    (dict(TOPK, layers=(True,)), r"sites.s.layers has True"),
    (dict(TOPK, fuse="yes"), r"sites.s.fuse='yes' must be of type bool"),
    (dict(TOPK, reducer=5), r"sites.s.reducer=5 must be a name or a tuple of names"),
    (dict(TOPK, reducer=()), r"sites.s.reducer=\(\) must be a name"),
    (dict(TOPK, rate="threshold", threshold="x"), r"sites.s.threshold='x' must be a number"),
    (dict(reducer="tome", layers=(1,), r=-1), r"sites.s.r=-1 must be a number of tokens, 0 or more"),
  ],
)
def test_errors(site, message):
  with pytest.raises(ValueError, match=message) as caught:
    parse(s=site)
  assert "\n" not in str(caught.value)


def test_error_without_cls():
  with pytest.raises(ValueError, match=r"scores by cls_attention, but config.model.pool leaves this model without a"):
    parse(Stack(4, 16, 0, has_cls=False), s=TOPK)


def test_tokens_made_anew_have_no_features():
  made = dict(reducer="recover", layers=(1,), place="before")
  read = dict(reducer="topk", layers=(1,), place="around", keep=0.5, score="value_norm")
  with pytest.raises(ValueError, match=r"sites.b.reducer='topk' reads value, which tokens that sites.a has just"):
    sites.parse(dict(a=made, b=read), STACK)
  sites.parse(dict(a=made, b=dict(read, place="attn")), STACK)
  sites.parse(dict(a=made, b=dict(read, score="token_norm")), STACK)


def test_error_of_two_sites_at_one_place():
  with pytest.raises(ValueError, match=r"sites.b and sites.a both act in layer 1 at place='attn', and names give no"):
    parse(a=TOPK, b=dict(reducer="tome", layers=(1,), r=2))


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("variant", "Q/16", r"config.model.variant='Q/16' must be size/patch; sizes: mu, Ti, S, B, L, So400m, H, g"),
    ("variant", "S16", r"config.model.variant='S16' must be size/patch"),
    ("variant", "S/0", r"config.model.variant='S/0' must be size/patch"),
    ("pool", "mean", r"config.model.pool='mean' is unknown; .*valid: avg, cls, cls_avg, map"),
    ("position", "sincos", r"config.model.position='sincos' is unknown; did you mean 'sincos2d'\?"),
    ("dtype", "float16", r"config.model.dtype='float16' is unknown; did you mean 'bfloat16'\?"),
    ("attention", "flash", r"config.model.attention='flash' is not an implementation"),
    ("num_heads", 5, r"config.model.num_heads=5 does not divide width=192"),
    (
      "image_size",
      (224, 225),
      r"config.model.image_size=\(224, 225\) must be \(height, width\), multiples of patch 16",
    ),
    ("image_size", (224,), r"config.model.image_size=\(224,\) must be"),
    ("image_size", (8, 8), r"config.model.image_size=\(8, 8\) must be"),
    ("num_classes", -1, r"config.model.num_classes=-1 must be 1 or more, or 0 for no head"),
    ("drop_path", 1.0, r"config.model.drop_path=1.0 must be in \[0, 1\)"),
  ],
)
def test_model_errors(field, value, message):
  config = complete({"model": {field: value}}).model
  with pytest.raises(ValueError, match=message):
    vit.shape(config)


def test_model_errors_of_two_fields():
  with pytest.raises(ValueError, match=r"config.model.distilled=True needs pool='cls', not 'avg'"):
    vit.shape(complete({"model": dict(distilled=True, pool="avg")}).model)
  with pytest.raises(ValueError, match=r"config.model.width=6 must be a multiple of 4 for position='sincos2d'"):
    vit.shape(complete({"model": dict(width=6, num_heads=2, position="sincos2d")}).model)


def test_counts_by_hand():
  assert counts() == (17,) * 4
  assert counts(s=dict(TOPK, layers=(1, 3))) == (17, 9, 9, 5)  # ceil(16/2)+1, ceil(8/2)+1
  assert counts(s=dict(TOPK, layers=(1, 3), keep=(12, 0.5))) == (17, 12, 12, 7)  # ceil(11/2)+1
  assert counts(s=dict(TOPK, fuse=True)) == (17, 10, 10, 10)  # the fused token on top
  assert counts(s=dict(reducer="tome", layers=range(4), r=3)) == (14, 11, 8, 5)
  assert counts(s=dict(reducer="tome", layers=range(4), r=40)) == (9, 5, 3, 2)  # half of what is not protected
  assert counts(s=dict(reducer="tome", layers=(0, 1, 2), r=(5, 2))) == (12, 10, 10, 10)  # a short list goes on with 0
  assert counts(s=dict(reducer="tome", layers=(0, 1, 2), r=(2, -1.0))) == (13, 11, 11, 11)  # 4, 2, 0
  assert counts(s=dict(reducer="gumbel", layers=(1, 2), keep=(0.7, 0.49))) == (17, 12, 8, 8)  # int(16 rho) + 1
  assert counts(s=dict(reducer="gumbel", layers=(1, 2), r=2)) == (17, 15, 13, 13)
  assert counts(s=dict(reducer="router", layers=(1, 3), keep=0.25)) == (17,) * 4  # they come back
  assert counts(s=dict(TOPK, layers=(), place="output", keep=5)) == (17,) * 4
  assert counts(s=dict(reducer="topk", layers=(1, 2), rate="learned")) == (17,) * 4


def test_order_comes_from_layer_place_and_slot_never_from_names():
  parsed = parse(
    z=dict(reducer="router", layers=(1,), keep=12),
    y=dict(reducer="gumbel", layers=(1,), keep=16),
    a=dict(TOPK, layers=(1, 3), keep=(10, 9)),
    b=dict(TOPK, place="output", layers=(), keep=4),
  )
  assert [(s.site, s.layer, s.place) for s in parsed.spots] == [
    ("y", 1, "before"), ("z", 1, "around"), ("a", 1, "attn"), ("a", 3, "attn"), ("b", -1, "output"),
  ]  # fmt: skip
  assert [(s.arriving, s.keep) for s in parsed.spots] == [(17, 16), (16, 12), (12, 10), (16, 9), (9, 4)]
  assert parsed.counts() == (17, 16, 16, 9)


def test_tuple_of_reducers_acts_in_its_order_with_children_of_its_own():
  parsed = parse(d=dict(reducer=("topk", "diffrate_merge"), layers=(0, 2), keep=((15, 12), (13, 10))))
  assert [(s.reducer, s.layer, s.keep, s.index) for s in parsed.spots] == [
    ("topk", 0, 15, 0), ("diffrate_merge", 0, 13, 1), ("topk", 2, 12, 2), ("diffrate_merge", 2, 10, 3),
  ]  # fmt: skip
  assert [s.child for s in parsed.spots[:2]] == ["d_0_topk", "d_1_diffrate_merge"]


def test_where_sizes_bias_attention():
  bias = lambda mode="mask", **sites: [parse(**sites).proportional(layer, mode) for layer in range(4)]
  assert bias(d=dict(reducer="tome", layers=(1,), r=2)) == [False, False, True, True]
  assert bias(d=dict(reducer="tome", layers=(1,), r=2, proportional=False)) == [False] * 4
  assert bias(s=TOPK) == [False] * 4 and bias(s=dict(TOPK, proportional=True)) == [False, False, True, True]
  idle = dict(reducer="tome", layers=(0, 2), keep=(17, 12))  # nothing merges in layer 0
  assert bias("gather", d=idle) == [False, False, False, True]
  assert bias("mask", d=idle) == [False, True, True, True]  # there a traced count may take its place
  others = dict(reducer="visionzip", layers=(1,), keep=12)  # merges, and asks for no bias
  assert bias("gather", d=idle, o=others) == [False, False, True, True]  # as in mask mode


def test_needs_and_masked():
  parsed = parse(a=dict(TOPK, layers=(1,)), b=dict(TOPK, score="key_norm", place="before", layers=(3,)))
  assert [parsed.needs(layer) for layer in range(4)] == [(), ("cls_attention",), ("key",), ()]
  assert [parsed.masked(layer, "mask") for layer in range(4)] == [False, False, True, True]
  assert not parsed.masked(3, "gather")
  routed = parse(r=dict(reducer="router", layers=(1,), keep=9))
  assert [routed.masked(layer, "mask") for layer in range(3)] == [False, True, False]
  ragged = parse(t=dict(TOPK, layers=(1,), rate="threshold", threshold=0.1))
  assert [ragged.masked(layer, "gather") for layer in range(3)] == [False, False, True]


def test_scheduled_counts_fall_from_all_to_keep():
  config = dict(s=dict(TOPK, layers=(1, 2), keep=(0.5, 0.25), rate="scheduled", schedule=(10, 20)), t=dict(
    reducer="tome", layers=(0,), r=1))  # fmt: skip
  assert schedules.scheduled(config, STACK, 0) == {"s": (16, 16)}  # all that arrive
  assert schedules.scheduled(config, STACK, 10) == {"s": (16, 16)}
  # half way along the cosine: 0.75 and 0.625 of 15 and 12 patches: 12 + 1, ceil(7.5) + 1
  assert schedules.scheduled(config, STACK, 15) == {"s": (13, 9)}
  assert schedules.scheduled(config, STACK, 99) == {"s": (9, 3)}
  config["s"]["keep"] = (9, 5)  # half way from the 16 that arrive: ceil(12.5) and ceil(10.5)
  assert [schedules.scheduled(config, STACK, step)["s"] for step in (0, 15, 20)] == [(16, 16), (13, 11), (9, 5)]
  # 25 (7 / 25) is 7.000000000000001 in float64, and no token more.
  late = dict(s=dict(TOPK, layers=(0,), keep=7, rate="scheduled", schedule=(10, 20)))
  assert schedules.scheduled(late, dataclasses.replace(STACK, num_tokens=25), 20) == {"s": (7,)}


@pytest.mark.parametrize("where", [dict(layers=3), dict(place="output"), dict(place="output", layers=())])
def test_scheduled_counts_of_one_spot(where):
  site = dict(reducer="topk", keep=0.5, rate="scheduled", schedule=(10, 20)) | where  # 12 and CLS are half
  assert [schedules.scheduled(dict(s=site), STACK, step)["s"] for step in (0, 15, 20)] == [
    (17,),
    (13,),
    (9,),
  ]  # 12 and CLS


MOVING = sorted(name for name, cls in base.REGISTRY.items() if moving(cls) and "encoder" in cls.stacks)


@pytest.mark.parametrize("name", MOVING)
def test_what_can_move_while_training_may_be_traced(name):
  """Where an option decides in Python, what is traced cannot take its place."""
  (option,), stack = moving(base.REGISTRY[name]), Stack(4, 17, 1)
  where = {} if base.REGISTRY[name].places[0] == "output" else dict(layers=(1,))
  spot = sites.parse(dict(s=dict(reducer=name, keep=0.5, **where)), stack).spots[0]
  case = cases.make_cases(spot.module())["prefix"]
  keeps = lambda value: {f"s.{option}": value}

  def run(tokens, value):
    step = reduce.Step(dataclasses.replace(spot, anneal=((option, 2.0, 1.0, 0, 9),)))
    rngs = {"params": jax.random.key(0), "reduce": jax.random.key(1)}
    return step.init_with_output(rngs, tokens, keeps(value), train=True, mode="mask")[0][0].x

  assert jax.eval_shape(run, case.tokens, jnp.float32(2.0)).shape == case.tokens.x.shape


def test_what_moves_while_training_ships_where_it_ends():
  config = complete({"model": dict(variant="mu/4", depth=2, image_size=(16, 16))}).model
  site = dict(reducer="transforming", layers=(0,), keep=5, score="column_mean")
  fell = vit.make(config, {"s": site | dict(anneal=(("temperature", 1, 0.5, 0, 4),))})
  images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
  params = jax.jit(fell.init)(jax.random.key(0), images)
  run = lambda keeps: np.asarray(jax.jit(fell.apply)(params, images, keeps=keeps).features)
  shipped, trained, before = (run(k) for k in (None, schedules.annealed(fell.spots, 4), {"s.temperature": 1.0}))
  np.testing.assert_allclose(shipped, trained, rtol=1e-5)
  assert np.abs(shipped - before).max() > 1e-3


def test_share_and_candidates():
  parsed = parse(s=dict(TOPK, layers=(1, 2)))
  assert [spot.share for spot in parsed.spots] == [0.5, 0.25]
  spot = parse(s=dict(reducer="topk", layers=(1,), rate="learned", granularity=5)).spots[0]
  assert spot.candidates == (16, 11, 6, 1) and spot.keep == 17


def test_profile_follows_traced_counts():
  parsed = parse(s=dict(reducer="topk", layers=(1, 2), rate="learned"))
  profile = parsed.profile(32, 2, {"s": (jnp.float32(9), jnp.float32(5))})
  assert [float(n) for n in profile.attention] == [17, 17, 9, 5] and [float(n) for n in profile.mlp] == [17, 9, 5, 5]
  routed = parse(s=dict(reducer="router", layers=(1,), keep=5)).profile(32, 2)
  assert routed.attention == (17, 5, 17, 17) and routed.mlp == (17, 5, 17, 17) and routed.final == 17


def test_a_learned_rate_does_not_gather():
  config = complete({"model": dict(variant="mu/4", depth=2, image_size=(8, 8))}).model
  model = vit.make(config, {"s": dict(reducer="topk", layers=(0,), rate="learned")})
  with pytest.raises(ValueError, match=r"sites.s.rate='learned' has no integer counts yet: call tokred.freeze"):
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), mode="gather"))


def test_no_option_of_a_reducer_has_the_name_of_a_field_of_a_site():
  for name, cls in base.REGISTRY.items():
    assert not ({field.name for field in dataclasses.fields(cls)} - drafts.PLACED) & set(drafts.FIELDS), name


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "a b"])
def test_names_of_sites_are_words(name):
  """They stand in paths of parameters and in names of metrics."""
  with pytest.raises(ValueError, match=r"config.sites has '.*'; valid: a name of letters, digits and underscores"):
    parse(**{name: TOPK})


@pytest.mark.parametrize("name, cls", [("", base.Planner), (base.Planner, base.Planner), ("new", object)])
def test_only_reducers_are_registered_and_by_a_name(name, cls):
  with pytest.raises(ValueError, match=r"^register\(.*\).*; valid: a "):
    base.register(name)(cls)
  assert "new" not in base.REGISTRY
