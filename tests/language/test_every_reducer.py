"""What the language model accepts, all of it: cache, padding, mask and gather agree for each reducer and place."""

import pytest
from languages import batch, check_cache, learned

from tokred.nn.budget import LEARNED, ROUTERS, SUITED
from tokred.reducers import REGISTRY

SITE = dict(stack="llm", layers=(1,), keep=0.5)
OPTIONS = {  # what a reducer needs beside its defaults, which ask for CLS; without a score facility has ties
  "attention_gate": dict(heads=2),
  "facility": dict(score="key_norm"),
  "gamma_mod": dict(layers=(0, 1)),
  "holov": dict(score="key_norm"),
  "mmr": dict(score="key_norm"),
  "qtsplus": dict(layers=(0,)),
  "remember": dict(score="key_norm", keep=1.0),
  "topk": dict(score="key_norm"),
  "visionzip": dict(score="key_norm"),
}
PLACES = [(name, place) for name in SUITED for place in ("attn", "before", "after") if place in REGISTRY[name].places]
PLACES += [(name, "before") for name in LEARNED] + [(name, "around") for name in ROUTERS]
PLACES += [("attention_gate", "ahead")]
FAST = (("visionzip", "before"),)  # the others take minutes together, and those of most use have files of their own


@pytest.mark.parametrize(
  "name, place", [pytest.param(*case, marks=[pytest.mark.thorough] * (case not in FAST)) for case in PLACES]
)
def test_decoding_is_recomputing_alone_is_together_masked_is_gathered(name, place):
  module, params = learned(dict(a=SITE | OPTIONS.get(name, {}) | dict(reducer=name, place=place)))
  _, _, owner = check_cache(module, params)
  _, mask, protected = batch()
  assert (owner[:, :16] >= 0)[mask & protected].all()
