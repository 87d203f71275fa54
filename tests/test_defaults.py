"""What a config need not say: the options with which the papers' models were trained."""

import pytest

from tokred.reducers import REGISTRY

PAPERS = {
  "avit": dict(scale=10.0, center=30.0, eps=0.01),  # of DeiT-T; for S the center is 75
  "dyt": dict(temperature=5.0, hidden=64, scale=0.1, dropout=0.1),
  "gumbel": dict(temperature=1.0),
  "mctf": dict(tau_sim=1.0, tau_info=20.0, tau_size=40.0, bidirectional=True, pooling="attention", one_step_ahead=True),
  "pitome": dict(margin=0.75, alpha=1.0, early=0.5),
  "tofu": dict(early=0.5, norm="mlerp"),
  "stvit": dict(layer_scale=1e-5, pool="max"),
  "stvit_recover": dict(layer_scale=1e-5),
  "dpcknn": dict(neighbours=2, raster=True),
}
# Log of size biases attention behind these, and not behind the others: PiToMe tracks sizes and does not use them.
PROPORTIONAL = {"diffrate_merge", "kmeans", "mctf", "tofu", "tome", "tome_kth", "tome_random", "transforming"}
PLAIN = {"avit", "ats", "dpcknn", "dyt", "gumbel", "pitome", "router", "sit", "stvit", "topk", "zerotprune"}


@pytest.mark.parametrize("name", PAPERS)
def test_options(name):
  module = REGISTRY[name]()
  assert {option: getattr(module, option) for option in PAPERS[name]} == PAPERS[name]


def test_where_sizes_bias_attention():
  assert {name for name in PROPORTIONAL | PLAIN if REGISTRY[name].proportional} == PROPORTIONAL
