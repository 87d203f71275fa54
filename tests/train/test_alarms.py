"""Collapse alarms: when each is raised, and when not."""

import jax
import jax.numpy as jnp
import pytest
from micro import config, metrics

import tokred
from tokred import sharding
from tokred.train import alarms, loop
from tokred.train.alarms import Alarms, collapsed, overlaps


def module(depth=3, **site):
  c = config(dict(tokens=site))
  with c.unlocked():
    c.model.depth = depth
  return tokred.build(c).module


def test_a_selector_that_keeps_all_or_none():
  sites = module(reducer="gumbel", layers=(1,), keep=0.5).sites  # 8 of 16 patches and CLS
  for count, word in ((17.0, "keeps all"), (1.2, "keeps none")):
    (text,) = collapsed(sites, {"counts/tokens/1": count}).values()
    assert text.startswith(f"tokens/1 {word}") and "9 of 17 are wanted; try a larger config.loss.keep_ratio" in text
  assert collapsed(sites, {"counts/tokens/1": 9.3}) == collapsed(sites, {"loss": 0.1}) == {}


def test_a_selector_that_shall_keep_nearly_all_may():
  sites = module(reducer="gumbel", layers=(1,), keep=0.99).sites
  assert collapsed(sites, {"counts/tokens/1": 17.0}) == {}


def test_a_router_that_does_not_look():
  sites = module(reducer="router", layers=(1,), place="around", keep=0.5).sites
  (text,) = collapsed(sites, {"counts/tokens/1": 9.0, "overlap/tokens/1": 0.99}).values()
  assert "takes the same tokens of every image (99% in common)" in text and "config.loss.router" in text
  assert collapsed(sites, {"counts/tokens/1": 9.0, "overlap/tokens/1": 0.7}) == {}


def test_overlap_by_hand():
  made = module(reducer="router", layers=(1,), place="around", keep=0.5)
  chosen = jnp.array([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]], bool)  # CLS has no choice
  free = jnp.array([[0, 1, 1, 1, 1]] * 2, bool)

  class Output:
    aux = {"reduce/tokens/chosen": {0: chosen}, "reduce/tokens/free": {0: free}}  # noqa: RUF012

  # p = 1, 1/2, 1/2, 0: (1 + 1/4 + 1/4) / 2
  assert float(overlaps(made, Output)["overlap/tokens/1"]) == pytest.approx(0.75)
  Output.aux = {"reduce/tokens/chosen": {0: chosen[:1]}, "reduce/tokens/free": {0: free[:1]}}
  assert overlaps(made, Output) == {}  # one image agrees with itself


def test_rates_at_their_bounds():
  sites = module(reducer="topk", layers=(1, 2), rate="learned").sites
  (text,) = collapsed(sites, {"counts/tokens/1": 2.0, "counts/tokens/2": 2.0}).values()  # the last block may
  assert "the rate of tokens/1 is at its lower bound, 2 tokens" in text and "config.loss.target" in text
  (text,) = collapsed(sites, {"counts/tokens/1": 17.0, "counts/tokens/2": 17.0}).values()
  assert "all 17 tokens pass everywhere; try a larger config.loss.budget" in text
  assert collapsed(sites, {"counts/tokens/1": 17.0, "counts/tokens/2": 12.0}) == {}


def test_an_alarm_is_raised_once_and_only_when_it_lasts():
  watch = Alarms(module(reducer="gumbel", layers=(1,), keep=0.5).sites)
  bad, good = {"counts/tokens/1": 17.0}, {"counts/tokens/1": 9.0}
  assert [len(watch.new(m)) for m in (bad, bad, good, bad, bad, bad, bad)] == [0, 0, 0, 0, 0, 1, 0]


def test_the_loop_says_so(tmp_path, monkeypatch, capfd):
  """A router that cannot learn takes the first tokens of every image."""
  real = sharding.make_mesh
  monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: real(mesh, devices or jax.devices()[:1]))
  monkeypatch.setattr(alarms, "PATIENCE", 2)
  site = dict(router=dict(reducer="router", layers=(1,), place="around", keep=0.5))
  loop.train(config(site, train=dict(steps=3), optim=dict(freeze=(".*/router/kernel",))), tmp_path)
  assert capfd.readouterr().err.count("alarm: router/1 takes the same tokens of every image (100% in common)") == 1
  assert [line["train/overlap/router/1"] for line in metrics(tmp_path)] == [1.0, 1.0, 1.0]
