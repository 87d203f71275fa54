"""Sites of a language model drawn at random: masked is gathered, decoding is recomputing, alone is together.

What tests/test_drawn.py is to a ViT.  `python tests/language/test_drawn_sites.py 0 50` looks at these seeds.
"""

import dataclasses
import sys

import numpy as np
import pytest
from languages import check_cache, learned

from tokred.drafts import PLACED, POSITIONS, WHOLES
from tokred.nn.budget import PLACES
from tokred.reducers import REGISTRY
from tokred.scores import SCORES

DEPTH = 3
NAMES = sorted(name for name, cls in REGISTRY.items() if "llm" in cls.stacks)
OPTIONS = {  # by name; those that are not here are drawn if they are bool
  "score": tuple(SCORES),
  "metric": ("key", "token"),
  "gate": ("raw", "sigmoid"),
  "start": ("central", "isolated", "key_norm"),
  "relevance": (0.2, 0.7),
  "at_once": (2, 3),
  "grid": ((1, 7), 3),
  "patches": (2, 4),
  "merge": (True,),
  "contextual": (0.3, 2),
  "chunks": (2, 4),
  "slots": (1, 2),
  "recycled": (0.0, 0.7),
  "predictor": (0.5,),
  "temperature": (0.5,),
  "name_of": ("memory", "rater"),
  "how": ("mean", "sum", "running", "last"),
  "decode_threshold": (0.3,),
  "newton": (5,),
}
NEEDED = {  # sizes that suit the tiny model, and scores without which two tokens are tied
  "qtsplus": dict(num_heads=4, num_kv_heads=2, high=0.8),
  "covipal": dict(hidden=16),
  "glimpse": dict(hidden=16, num_heads=2),
  "atp": dict(grid=3),
  "attention_gate": dict(hidden=8),
  "facility": dict(score="key_norm"),
}


def pick(rng, values):
  return values[rng.integers(len(values))]


def draw_site(rng):
  """A site that may be refused."""
  name = pick(rng, NAMES)
  cls = REGISTRY[name]
  layers = tuple(layer for layer in range(DEPTH) if rng.random() < 0.5) or (int(rng.integers(DEPTH)),)
  share = lambda: round(float(rng.uniform(0.3, 1.0)), 2)
  keep = tuple(share() for _ in layers) if rng.random() < 0.3 else share()
  place = pick(rng, [place for place in PLACES if place in cls.places])
  site = dict(stack="llm", reducer=name, place=place, layers=layers)
  site |= dict(keep=keep) if cls.idles or rng.random() < 0.3 else {}
  site |= dict(rate="threshold", threshold=round(float(rng.uniform(-0.1, 0.6)), 2)) if rng.random() < 0.15 else {}
  site |= dict(position=pick(rng, POSITIONS)) if rng.random() < 0.4 else {}
  site |= dict(of=pick(rng, WHOLES)) if rng.random() < 0.3 else {}
  for option in dataclasses.fields(cls):
    values = OPTIONS.get(option.name, (True, False) if isinstance(option.default, bool) else ())
    if values and option.name not in PLACED and rng.random() < (0.8 if option.name == "score" else 0.4):
      site[option.name] = pick(rng, values)
  return site | NEEDED.get(name, {})


def drawn(seed):
  """One to three sites, each the first that is not refused; every refusal must name a field."""
  rng = np.random.default_rng(seed)
  sites, made = {}, None
  for name in "abc"[: rng.integers(1, 4)]:
    made = None
    while made is None:
      site = draw_site(rng)
      made = accepted(sites | {name: site})
    sites[name] = site
  return sites, *made


def accepted(sites):
  """Module and parameters, or None."""
  try:
    return learned(sites, seed=2)
  except ValueError as error:
    assert str(error).startswith(("sites.", "config.")), f"{sites}: {error!r}"
  except Exception as error:
    raise AssertionError(f"{sites}: {error!r}") from error


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(20))
def test_drawn_sites(seed):
  _, module, params = drawn(seed)
  check_cache(module, params)


if __name__ == "__main__":
  for number in range(*map(int, sys.argv[1:])):
    chosen = {}
    try:
      chosen, *both = drawn(number)
      check_cache(*both)
    except Exception as problem:
      print(number, chosen, repr(problem)[:1500], flush=True)
