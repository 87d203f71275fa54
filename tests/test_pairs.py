"""Methods combine: every reducer before and inside every other, every rate on every reducer that can have it.

Pairs are traced, which finds what does not fit together; a round through the pairs, one for each reducer, is
computed too, and what mask mode gives must be what gather mode gives.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import drawn, quick

from tokred import config as defaults
from tokred.nn import vit
from tokred.reducers import REGISTRY, Planner

SMALL = dict(variant="mu/4", width=16, depth=4, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)
# Planners that hold on to no more of the contract than `topk` does: they meet two others instead of all.
PLAIN = {
  "dtd", "dymu_merge", "facility", "flashvlm", "globalcom2", "hired", "hiprune", "holov", "kmedoids", "mmtok", "pool",
  "prumerge", "remember", "sparsevlm", "temporal_merge", "visionzip",
}  # fmt: skip
PLAIN |= {"stts"}
READERS = {name for name, cls in REGISTRY.items() if "encoder" not in cls.stacks}
# clca's site is one of all blocks, and stvit_recover's ends a scope.
NAMES = sorted(set(REGISTRY) - PLAIN - READERS - {"clca", "stvit_recover"})
KEEP = {"stvit": 10, "mctf": 10}  # nine and CLS, below which MCTF leaves all; the others are asked for shares
# What cannot be: two at the output, two behind a block (A-ViT acts in all), others among images that share rows.
LAST, BEHIND = ("autoencoder", "recover"), ("avit", "sit", "sit_reverse", "spa", "stvit")
REFUSED = {(a, b) for a in LAST for b in LAST} | {(a, b) for a in BEHIND for b in BEHIND if "avit" in (a, b)}
ROUNDED = ("avit", "ats", "spa")  # their counts differ between images, so neither mode's is the other's


def site(name, layer, **fields):
  """A site of one reducer, at its default place."""
  cls = REGISTRY[name]
  layers = (0, 1, 2, 3) if name == "avit" else (layer,)
  own = dict(reducer=name, place=cls.places[0]) | ({} if cls.places[0] == "output" else dict(layers=layers))
  if cls.idles and "rate" not in fields:
    own["keep"] = KEEP.get(name, 0.6)
  return own | fields


def build(**sites):
  return vit.make(defaults.complete({"model": SMALL}).model, sites)


IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
RNGS = {"params": jax.random.key(0), "reduce": jax.random.key(1), "dropout": jax.random.key(2)}


def traced(module, mode="gather", train=False):
  """Shapes of the output; parameters are made on the way, so that one trace does."""
  run = lambda: module.init_with_output(RNGS, IMAGES, mode=mode, train=train)[0]
  return jax.eval_shape(run)


def pair(first, second):
  """The second one behind the first; inside of it, where the first has a scope."""
  around = REGISTRY[first].places[0] == "around"
  inside = REGISTRY[second].places[0] != "around"
  fields = dict(until=3) if around and inside and first != "spa" else {}
  return dict(a=site(first, 1, **fields), b=site(second, 2))


def layout(first, second):
  """A module of the pair, or why there is none; a refusal must name its site."""
  try:
    return build(**pair(first, second))
  except ValueError as error:
    assert "sites." in str(error), error
    return None


def test_what_is_refused():
  assert {(a, b) for a in NAMES for b in NAMES if layout(a, b) is None} == REFUSED


def fits(first, seconds):
  for second in seconds:
    if (first, second) in REFUSED:
      continue
    module = build(**pair(first, second))
    output = traced(module)
    assert [output.aux[f"tokens/{layer}"].shape[1] for layer in range(4)] == list(module.sites.counts()), second
    assert output.logits.shape == (2, 3), second


@pytest.mark.parametrize("first", NAMES)
def test_pairs_fit(first):
  """An eighth of all pairs: each reducer comes first, and each comes second."""
  fits(first, NAMES[(-NAMES.index(first)) % 8 :: 8])


@pytest.mark.thorough
@pytest.mark.parametrize("first", NAMES)
def test_every_pair_fits(first):
  fits(first, NAMES)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_plain_planners_fit(name):
  options = dict(middle="key_norm") if name == "hiprune" else {}
  for other in ("tome", "router"):
    for layer in (1, 2):
      module = build(a=site(name, layer, **options), b=site(other, 3 - layer))
      output = traced(module)
      assert [output.aux[f"tokens/{layer}"].shape[1] for layer in range(4)] == list(module.sites.counts())


# MCTF inside a router is always computed.
ROUND = [("router", "mctf"), *((a, NAMES[(7 * i + 3) % len(NAMES)]) for i, a in enumerate(NAMES))]
ROUND = [two for two in ROUND if two not in REFUSED and not set(two) & set(ROUNDED)]


@pytest.mark.parametrize(
  "first, second", [pytest.param(*two, marks=[pytest.mark.thorough] * (i % 4 > 0)) for i, two in enumerate(ROUND)]
)
def test_pairs_mask_as_they_gather(first, second):
  module = build(**pair(first, second))
  params = drawn(lambda rngs: module.init(rngs, IMAGES, mode="mask")["params"], RNGS)
  outputs = [
    jax.jit(lambda p, mode=mode: module.apply({"params": p}, IMAGES, mode=mode), compiler_options=quick())(params)
    for mode in ("gather", "mask")
  ]
  gathered, masked = outputs
  n = gathered.tokens.x.shape[1]
  np.testing.assert_allclose(masked.tokens.x[:, :n], gathered.tokens.x, atol=2e-5)
  np.testing.assert_array_equal(masked.tokens.owner, gathered.tokens.owner)


@pytest.mark.parametrize("rate", ["learned", "threshold", "learned_threshold"])
def test_every_rate_on_every_planner(rate):
  tried = []
  for name in NAMES:
    cls = REGISTRY[name]
    fields = dict(rate=rate) | ({} if rate == "learned" else dict(threshold=0.1, keep=1.0))
    try:
      module = build(a=site(name, 1, **fields))
    except ValueError as error:
      assert not issubclass(cls, Planner) or "rate" in str(error), error
      continue
    output = traced(module, "mask", train=True)
    assert output.aux["reduce/a/count"][0].shape == ()
    tried.append(name)
  assert {"topk", "gumbel"} <= set(tried) and len(tried) >= 8


def test_a_learned_rate_on_a_learned_score():
  # DiffRate's rate over DynamicViT's predictor: both learn from one loss.
  module = build(a=dict(reducer="gumbel", layers=(1, 2), rate="learned"))
  params = drawn(lambda rngs: module.init(rngs, IMAGES, mode="mask")["params"], RNGS)

  def loss(params):
    output = module.apply({"params": params}, IMAGES, mode="mask", train=True, rngs=RNGS)
    return jnp.sum(output.features * jnp.cos(jnp.arange(32.0)).reshape(2, 16))

  grads = jax.jit(jax.grad(loss), compiler_options=quick())(params)["block_1"]["reduce"]["a"]
  for name, leaf in (("rate", grads["rate"]["logits"]), ("score", grads["gumbel"]["predictor"]["in_proj"]["kernel"])):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name
