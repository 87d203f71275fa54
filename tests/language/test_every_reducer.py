"""What the language model accepts, all of it: cache, padding, mask and gather agree for each reducer and place."""

import jax.numpy as jnp
import pytest
from languages import batch, check_cache, learned

import tokred
from tokred.nn.budget import PLACES
from tokred.reducers import REGISTRY

SITE = dict(stack="llm", layers=(1,), keep=0.5)
OPTIONS = {  # beside its defaults, which ask for CLS (None: it is not told); without a score facility has ties
  "facility": dict(score="key_norm"),
  "gamma_mod": dict(layers=(0, 1)),
  "holov": dict(score="key_norm"),
  "mmr": dict(score="key_norm"),
  "qtsplus": dict(layers=(0,)),
  "remember": dict(score="key_norm", keep=None),
  "topk": dict(score="key_norm"),
  "visionzip": dict(score="key_norm"),
}
CASES = [
  (name, place)
  for name, cls in sorted(REGISTRY.items())
  for place in PLACES
  if "llm" in cls.stacks and place in cls.places and (place != "around" or cls.decodes)
]
FAST = (("visionzip", "before"),)  # the others take minutes together, and those of most use have files of their own


@pytest.mark.parametrize(
  "name, place", [pytest.param(*case, marks=[pytest.mark.thorough] * (case not in FAST)) for case in CASES]
)
def test_decoding_is_recomputing_alone_is_together_masked_is_gathered(name, place):
  fields = SITE | OPTIONS.get(name, {}) | dict(reducer=name, place=place)
  module, params = learned(dict(a={field: value for field, value in fields.items() if value is not None}))
  _, _, owner = check_cache(module, params)
  _, mask, protected = batch()
  assert (owner[:, :16] >= 0)[mask & protected].all()


def test_a_method_of_ones_own_is_admitted_by_what_its_class_says(monkeypatch):
  class Loud(tokred.Planner):
    """Keeps the longest tokens."""

    stacks = ("encoder", "llm")

    def plan(self, tokens, keep, *, train):
      score = jnp.linalg.norm(tokens.visible.astype(jnp.float32), axis=-1)
      return tokred.keep_top(tokens, score, keep, raster=True), {"score": score}

  monkeypatch.setitem(REGISTRY, "loud", Loud)
  module, params = learned(dict(a=SITE | dict(reducer="loud", place="before")))
  _, _, owner = check_cache(module, params)
  _, mask, protected = batch()
  # A half of 7 and of 9 visual tokens stays: 4 and 5.
  assert [(row[:16] >= 0)[there].sum() for row, there in zip(owner, mask & ~protected, strict=True)] == [4, 5]
