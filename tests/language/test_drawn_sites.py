"""Sites of a language model drawn at random: masked is gathered, decoding is recomputing, alone is together.

What tests/test_drawn.py is to a ViT.  `PYTHONPATH=tests python tests/language/test_drawn_sites.py 0 50` looks at these
seeds.
"""

import sys

import drawing
import numpy as np
import pytest
from languages import TINY, check_cache, learned


def drawn(seed):
  """One to three sites, each the first that is not refused; every refusal must name a field."""
  rng = np.random.default_rng(seed)
  sites, made = {}, None
  for name in "abc"[: rng.integers(1, 4)]:
    made = None
    while made is None:
      site = drawing.language_site(rng, TINY["depth"])
      more = sites | {name: site}
      made = drawing.accepted(lambda more=more: learned(more, seed=2), more)
    sites[name] = site
  return made


def check(seed):
  check_cache(*drawn(seed))


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(20))
def test_drawn_sites(seed):
  check(seed)


if __name__ == "__main__":
  drawing.look(check, sys.argv[1:])
