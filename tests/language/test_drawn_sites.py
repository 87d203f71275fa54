"""Sites of a language model drawn at random: masked is gathered, decoding is recomputing, alone is together.

What tests/test_drawn.py is to a ViT.  `PYTHONPATH=tests python tests/language/test_drawn_sites.py 0 50` looks at these
seeds.
"""

import functools
import sys

import drawing
import numpy as np
import pytest
from languages import TINY, check_cache, learned


def drawn(seed):
  """One to three sites, each the first that is not refused; every refusal must name a field."""
  rng = np.random.default_rng(seed)

  def add(sites, name):
    more = sites | {name: drawing.language_site(rng, TINY["depth"])}
    made = drawing.accepted(lambda: learned(more, seed=2), more)
    return None if made is None else (more, made)

  sites, made = {}, None
  for name in "abc"[: rng.integers(1, 4)]:
    sites, made = drawing.first(functools.partial(add, sites, name))
  return sites, made


def check(seed):
  sites, made = drawn(seed)
  with drawing.about(sites):
    check_cache(*made)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(20))
def test_drawn_sites(seed):
  check(seed)


if __name__ == "__main__":
  drawing.look(check, sys.argv[1:])
