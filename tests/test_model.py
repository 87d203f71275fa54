"""tokred.model: building from any kind of config, running, and freezing what was learned."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokred
from tokred.config import default
from tokred.model import drop_rates, without_sites

MODEL = dict(
  variant="mu/2", width=16, depth=3, num_heads=2, mlp_dim=32, image_size=(8, 8), channels=1, num_classes=4
)  # 16 patches and CLS
TOPK = dict(reducer="topk", layers=(1,), keep=0.5)
PAIR = dict(reducer=("topk", "diffrate_merge"), layers=(1, 2), rate="learned")
IMAGES = np.random.default_rng(0).standard_normal((5, 8, 8, 1)).astype(np.float32)


def make(seed=None, **sites):
  """A model with parameters; all of them random where there is a seed, even those that start at 0."""
  model = tokred.build(dict(model=MODEL, sites=sites))
  if seed is None:
    return model.init()
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: model.init().params)
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), jnp.float32), shapes)
  return dataclasses.replace(model, params=params)


def set_rate(model, child, layer, count):
  """The rate of one spot puts all its weight on one count of unprotected tokens."""
  params = jax.tree.map(lambda leaf: leaf, model.params)
  spot = next(s for s in model.module.sites.spots if s.child == child and s.layer == layer)
  logits = np.where(np.asarray(spot.candidates) == count, 50.0, 0.0).astype(np.float32)
  params[f"block_{layer}"]["reduce"][child]["rate"]["logits"] = jnp.asarray(logits)
  return dataclasses.replace(model, params=params)


def test_a_partial_dict_and_a_config_dict_build_the_same():
  config = default()
  config.model.update(MODEL)
  config.sites.a = TOPK
  of_config, of_dict = tokred.build(config), tokred.build(dict(model=MODEL, sites=dict(a=TOPK)))
  assert of_config.config == of_dict.config and of_config.module == of_dict.module
  assert tokred.build({}).module.sites.counts() == (197,) * 12  # Ti/16 at 224


def test_build_leaves_the_callers_config_alone():
  config = default()
  config.model.update(MODEL)
  model = tokred.build(config)
  with model.config.unlocked():
    model.config.model.num_classes = 7
  assert config.model.num_classes == 4


@pytest.mark.parametrize(
  "config, words",
  [
    (dict(modle={}), ("config.modle", "did you mean 'model'")),
    (dict(model=5), ("config.model=5", "variant")),
    (dict(model=dict(widht=3)), ("config.model.widht", "did you mean 'width'")),
    (dict(model=dict(num_classes="4")), ("config.model.num_classes='4'", "str", "int")),
    (dict(model=dict(name="vti")), ("config.model.name='vti'", "did you mean 'vit'")),
    (dict(model=dict(variant="Q/2")), ("config.model.variant='Q/2'", "So400m")),
    (dict(model=dict(image_size=(7, 8))), ("config.model.image_size=(7, 8)", "patch 2")),
    (dict(model=dict(num_heads=3)), ("config.model.num_heads=3", "width=16")),
    (dict(model=dict(pool="mean")), ("config.model.pool='mean'", "avg, cls, cls_avg, map")),
    (dict(model=dict(dtype="float16")), ("config.model.dtype='float16'", "bfloat16, float32")),
    (dict(model=dict(attention="flash")), ("config.model.attention='flash'", "matmul")),
    (dict(rates=dict(multiple_of=0)), ("config.rates.multiple_of=0", "1 or more")),
    (dict(sites=dict(a=TOPK | dict(reducer="topq"))), ("sites.a.reducer='topq'", "did you mean 'topk'")),
    (dict(sites=dict(a=TOPK | dict(layers=(3,)))), ("sites.a.layers has 3", "layers 0 to 2")),
    (dict(sites=dict(a=TOPK | dict(keep=99))), ("sites.a: keep=99", "17 tokens", "layer 1")),
    (dict(sites=dict(a=TOPK | dict(keep=0.0))), ("sites.a.keep=0.0", "above 0.0")),
    (dict(sites=dict(a=TOPK | dict(place="mlp"))), ("sites.a.place='mlp'", "attn, before, after, around")),
    (dict(sites=dict(a=TOPK | dict(rate="learnt"))), ("sites.a.rate='learnt'", "did you mean 'learned'")),
    (dict(sites=dict(a=TOPK | dict(scroe="x"))), ("sites.a.scroe", "did you mean 'score'")),
    (dict(sites=dict(a=TOPK, b=TOPK)), ("sites.b and sites.a", "layer 1")),
  ],
)
def test_errors_name_field_value_and_what_is_valid(config, words):
  model = config.get("model", {})
  config = config | dict(model=MODEL | model if isinstance(model, dict) else model)
  with pytest.raises(ValueError) as caught:
    tokred.build(config)
  message = str(caught.value)
  assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("config", [None, "configs/vit.py", [1]])
def test_build_takes_a_dict(config):
  with pytest.raises(ValueError, match=r"config=.* must be a dict of fields; valid: .*model, .*sites"):
    tokred.build(config)
  with pytest.raises(ValueError, match=r"config.sites=.* must be a dict of fields; valid: a dict of fields for each"):
    tokred.build(dict(sites=config))


def test_a_config_file_that_failed_tells_its_own_error():
  class Failed:  # as config_flags gives it
    def __getattr__(self, name):
      raise OSError("/nope: nothing is there")

  with pytest.raises(OSError, match=r"/nope: nothing is there"):
    tokred.build(Failed())


def test_images_of_another_shape_and_missing_parameters():
  model = tokred.build(dict(model=MODEL))
  with pytest.raises(ValueError, match=r"no parameters.*model\.init\(\)"):
    model(IMAGES)
  with pytest.raises(ValueError, match=r"no parameters.*model\.init\(\)"):
    model.with_sites({})
  with pytest.raises(ValueError, match=r"freeze needs parameters"):
    tokred.freeze(tokred.build(dict(model=MODEL, sites=dict(a=PAIR))))
  model = model.init()
  for shape in ((8, 8, 1), (2, 8, 8, 3), (2, 6, 8, 1)):
    with pytest.raises(ValueError, match=r"takes \(batch, 8, 8, 1\)"):
      model(np.zeros(shape, np.float32))


def test_images_that_are_not_normalised_yet():
  model = make()
  for images, word in ((IMAGES.astype(np.uint8), "dtype uint8"), (jnp.ones((5, 8, 8, 1), int), "dtype int32")):
    with pytest.raises(ValueError, match=rf"images of {word}; the model takes float32.*\(pixels / 255 - mean\) / std"):
      model(images)
  with pytest.raises(ValueError, match=r"images are a list; the model takes an array"):
    model(list(IMAGES))
  with pytest.raises(ValueError, match=r"images of shape \(0, 8, 8, 1\)"):
    model.inspect(IMAGES[:0])
  assert jax.eval_shape(model, jax.ShapeDtypeStruct((5, 8, 8, 1), jnp.bfloat16)).logits.shape == (5, 4)  # traced
  np.testing.assert_array_equal(model(IMAGES.astype(np.float64)).logits, model(IMAGES).logits)


def test_a_call_gives_logits_ints_and_survivors():
  model = make(0, a=TOPK)
  out = model(IMAGES)
  assert out.logits.shape == (5, 4) and out.logits.dtype == jnp.float32
  assert out.counts == (17, 9, 9) == model.counts and all(type(count) is int for count in out.counts)  # 16 / 2 + CLS
  assert out.tokens.x.shape == (5, 9, 16) and out.aux == {}
  report = model.inspect(IMAGES).aux
  assert report["owner/2"].shape == (5, 17) and report["reduce/a/score"][0].shape == (5, 17)


def test_a_learned_model_runs_in_mask_mode_at_full_length():
  model = make(a=PAIR)
  out = model(IMAGES)
  assert model.mode == "mask" and out.tokens.x.shape == (5, 17, 16)
  # an untrained rate keeps ceil of the mean candidate: (1 + ... + 16) / 16 = 8.5 -> 9, and CLS
  assert model.counts == (17, 10, 10)
  np.testing.assert_allclose([float(count) for count in out.counts], [17, 10, 10])


def test_seeds():
  model = tokred.build(dict(model=MODEL, seed=3))
  same, other = model.init(3), model.init(4)
  assert jax.tree.all(jax.tree.map(jnp.array_equal, model.init().params, same.params))
  assert not jnp.array_equal(same.params["pos_embed"], other.params["pos_embed"])
  assert model.params is None  # the handle itself does not change
  for seed in ("a", 0.5, True, 2**63):
    with pytest.raises(ValueError, match=f"seed={seed!r}; valid: an integer below 2\\*\\*63"):
      model.init(seed)


def test_repr_is_one_short_line():
  for model in (tokred.build(dict(model=MODEL)), make(rates=PAIR)):
    assert "\n" not in repr(model) and len(repr(model)) < 120
  assert "sites: rates, mode: mask" in repr(model)


def test_costs_by_hand():
  """D = 16, N = 17: attention 4 N D^2 + 2 N^2 D = 26656, MLP 2 N D 32 = 17408, patches 16 * 16 * 4, head 16 * 4."""
  dense = make()
  assert dense.macs == 3 * (26656 + 17408) + 1024 + 64
  assert dense.flops > 2 * dense.macs
  # from the MLP of block 1 on 9 tokens: attention 4 * 9 * 256 + 2 * 81 * 16 = 11808, MLP 9216
  reduced = make(a=TOPK)
  assert reduced.macs == 2 * 26656 + 11808 + 17408 + 2 * 9216 + 1024 + 64
  learned = make(a=PAIR)
  assert learned.flops == tokred.freeze(learned).flops < dense.flops


def test_no_sites_is_the_dense_model():
  model = make(0, a=dict(reducer="gumbel", layers=(1,), keep=0.5))
  dense = make()
  assert without_sites(model.module) == dense.module
  dense = dataclasses.replace(dense, params=model.params)  # parameters under reduce/ mean nothing to it
  assert dense.counts == (17, 17, 17)
  assert not np.allclose(dense(IMAGES).logits, model(IMAGES).logits)


def test_a_learned_count_is_an_images_own():
  """Where a threshold leaves few, ToMe cannot merge as many; what the batch's other images left is not asked."""
  first = dict(reducer="topk", layers=(0,), score="token_norm", rate="threshold", threshold=3.0, keep=1.0)
  model = make(2, first=first, merge=dict(reducer="tome", layers=(1,), rate="learned"))
  model = set_rate(model, "merge", 1, 4)
  alive = np.asarray(model(IMAGES).tokens.alive.sum(1))
  assert len(set(alive)) > 1
  assert alive.tolist() == [int(model(IMAGES[i : i + 1]).tokens.alive.sum()) for i in range(5)]


# Freezing.


def check_frozen(model, frozen):
  """The frozen model gathers integers, and its logits are those of the learned one in mask mode."""
  assert frozen.mode == "gather" and all(a >= b for a, b in zip(frozen.counts, frozen.counts[1:], strict=False))
  assert not any("rate" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(frozen.params))
  wanted, got = model(IMAGES), frozen(IMAGES)
  np.testing.assert_allclose(got.logits, wanted.logits, atol=1e-5)
  np.testing.assert_allclose(got.counts, wanted.counts)
  assert got.counts == frozen.counts == model.counts


@pytest.mark.parametrize(
  "sites",
  [
    dict(a=PAIR),
    dict(cut=dict(reducer="gumbel", layers=(1, 2), rate="learned")),
    dict(
      prune=dict(reducer="topk", layers=(0, 2), rate="learned", granularity=3, fuse=True),
      merge=dict(reducer="tome", layers=(1,), rate="learned"),
    ),
    # fixed sites before and behind a learned one: shares and r are of what arrived while it learned
    dict(
      first=dict(reducer="tome", layers=(0,), r=3),
      prune=dict(reducer="topk", layers=(1,), rate="learned"),
      last=dict(reducer="topk", layers=(2,), keep=0.5),
    ),
    # what goes round a block is back behind it
    dict(
      first=dict(reducer="router", layers=(0,), keep=0.25),
      prune=dict(reducer="topk", layers=(1,), rate="learned"),
      last=dict(reducer="router", layers=(2,), keep=0.75),
    ),
  ],
  ids=("pair", "gumbel", "fuse+tome", "tome+topk+topk", "router+topk+router"),
)
def test_frozen_equals_learned(sites):
  model = make(1, **sites)
  frozen = tokred.freeze(model)
  check_frozen(model, frozen)
  assert tokred.freeze(frozen) is frozen


def test_freeze_takes_a_model():
  for what, name in ((make().module, "ViT"), ("runs/digits", "'runs/digits'"), (None, "None")):
    with pytest.raises(ValueError, match=rf"^freeze takes a Model, .*, not {name}; .*export orbax") as caught:
      tokred.freeze(what)
    assert "\n" not in str(caught.value)


def test_the_frozen_config_is_plain_and_survives_json():
  model = make(1, a=PAIR)
  frozen = tokred.freeze(model)
  site = frozen.config.sites.a.to_dict()
  assert site.keys() == {"reducer", "layers", "keep"}
  assert [len(counts) for counts in site["keep"]] == [2, 2] and all(type(n) is int for c in site["keep"] for n in c)
  again = tokred.build(json.loads(json.dumps(frozen.config.to_dict())))
  assert again.config == frozen.config and again.module == frozen.module
  assert model.config.sites.a.rate == "learned"  # the learned model is as it was


def test_rates_freeze_to_hand_set_counts():
  model = make(0, a=PAIR)
  # 12 then 9 patches in block 1; in block 2 the prune rate asks for more than arrive, the merge rate for 5
  for layer, slot, count in ((1, 0, 12), (1, 1, 9), (2, 0, 14), (2, 1, 5)):
    model = set_rate(model, f"a_{slot}_{PAIR['reducer'][slot]}", layer, count)
  frozen = tokred.freeze(model)
  assert frozen.config.sites.a.keep == ((13, 10), (10, 6))  # and CLS
  assert frozen.counts == (17, 10, 6)
  check_frozen(model, frozen)


@pytest.mark.parametrize("multiple, counts", [(1, (17, 14, 7)), (4, (17, 16, 8)), (8, (17, 16, 8)), (32, (17, 2, 2))])
def test_counts_are_rounded_to_a_multiple(multiple, counts):
  """13 patches and 6, and CLS; 14 / 4 = 3.5 rounds to even, 7 / 4 to 2; 14 / 32 to 0, and topk keeps CLS and one."""
  site = dict(reducer="topk", layers=(1, 2), rate="learned")
  model = tokred.build(dict(model=MODEL, sites=dict(a=site), rates=dict(multiple_of=multiple))).init()
  model = set_rate(set_rate(model, "a", 1, 13), "a", 2, 6)
  assert tokred.freeze(model).counts == counts


def test_drop_rates_leaves_other_reducer_parameters():
  params = {
    "reduce": {"a": {"rate": {"logits": 0}, "gumbel": {"w": 1}}, "b": {"rate": {"logits": 0}}},
    "rate": {"w": 2},
  }
  assert drop_rates(params) == {"reduce": {"a": {"gumbel": {"w": 1}}}, "rate": {"w": 2}}
