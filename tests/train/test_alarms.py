"""Collapse alarms: when each is raised, and when not."""

import jax
import jax.numpy as jnp
import pytest
from micro import config, metrics

import tokred
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


def test_counts_that_are_set_are_no_collapse():
  """A-ViT's tokens halt when they will, and of 3 among 196 patches 3 are left."""
  halts = module(reducer="avit", layers=(0, 1, 2)).sites
  assert collapsed(halts, {f"counts/tokens/{layer}": 1.1 for layer in range(3)}) == {}
  c = config(dict(tokens=dict(reducer="topk", layers=(1,), keep=4)))
  with c.unlocked():
    c.model.image_size = (14, 14)
  sites = tokred.build(c).module.sites
  assert sites.stack.num_tokens == 197 and collapsed(sites, {"counts/tokens/1": 4.0}) == {}
  with c.unlocked():
    c.sites.tokens.update(dict(reducer="gumbel", place="before"))
  sites = tokred.build(c).module.sites  # 3 of 196 are 1.53 %: that few are wanted, but not half as many
  assert collapsed(sites, {"counts/tokens/1": 4.0}) == collapsed(sites, {"counts/tokens/1": 2.6}) == {}
  (text,) = collapsed(sites, {"counts/tokens/1": 2.4}).values()
  assert text.startswith("tokens/1 keeps none of its tokens, where 4 of 197 are wanted")
  (text,) = collapsed(module(reducer="topk", layers=(1,), keep=9, rate="threshold", threshold=1.0).sites, {
    "counts/tokens/1": 1.2}).values()  # fmt: skip
  assert "keeps none" in text


def test_a_selector_that_shall_keep_nearly_all_may():
  sites = module(reducer="gumbel", layers=(1,), keep=0.99).sites
  assert collapsed(sites, {"counts/tokens/1": 17.0}) == {}


def test_selectors_of_a_global_ratio_are_judged_together():
  sites = module(reducer="dyt", layers=(0, 1, 2), keep=0.25).sites  # each 4 of 16 patches and CLS
  at = lambda *counts: {f"counts/tokens/{layer}": count for layer, count in enumerate(counts)}
  # 16 + 0 + 0 of 48 patches are what is wanted, 12, and more; with a ratio of its own the first keeps all.
  special = at(17.0, 1.0, 1.0)
  assert collapsed(sites, special | {"global_ratio": 0.01}) == {}
  assert set(collapsed(sites, special)) == {"selector/tokens/0", "selector/tokens/1", "selector/tokens/2"}
  assert len(collapsed(sites, special | {"global_ratio": 0.01, "keep_ratio": 0.1})) == 3
  # 0.3 + 0.3 + 0.3 = 0.9 of 48 patches are less than 2 %, 0.96; 0.4 + 0.3 + 0.3 are more.
  (text,) = collapsed(sites, at(1.3, 1.3, 1.3) | {"global_ratio": 0.01}).values()
  assert text.startswith("tokens keeps none of its tokens, where 15 of 51 are wanted")
  assert collapsed(sites, at(1.4, 1.3, 1.3) | {"global_ratio": 0.01}) == {}
  (text,) = collapsed(sites, at(17.0, 17.0, 17.0) | {"global_ratio": 0.01}).values()
  assert text.startswith("tokens keeps all its tokens, where 15 of 51 are wanted")


def test_a_router_that_does_not_look():
  sites = module(reducer="router", layers=(1,), place="around", keep=0.5).sites
  (text,) = collapsed(sites, {"counts/tokens/1": 9.0, "overlap/tokens/1": 0.99}).values()
  assert "takes the same tokens of every image (99% in common)" in text and "config.loss.router" in text
  assert collapsed(sites, {"counts/tokens/1": 9.0, "overlap/tokens/1": 0.7}) == {}
  sites = module(reducer="dyt", layers=(1,), keep=0.5).sites
  (text,) = collapsed(sites, {"counts/tokens/1": 9.0, "overlap/tokens/1": 0.99}).values()
  assert text.endswith("less weight decay on it (config.optim.no_decay)")  # neither gate nor loss are DyT's


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


@pytest.mark.parametrize("train", [False, True])
def test_overlap_of_a_dispatcher(train):
  """One that looks at positions takes the same of every image, whatever the noise of training decides."""
  model = tokred.build(config(dict(tokens=dict(reducer="dyt", layers=(1,), keep=0.5)))).init(0)
  image = jax.random.normal(jax.random.key(0), (4, 4, 4, 1))
  streams = {"reduce": jax.random.key(1), "dropout": jax.random.key(2)}
  run = lambda params: model.module.apply({"params": params}, image, train=train, mode="mask", rngs=streams)
  looks = jax.jit(lambda params: overlaps(model.module, run(params))["overlap/tokens/1"])
  assert 0.5 < float(looks(model.params)) < 0.9
  blind = jax.tree.map(lambda leaf: leaf, model.params)
  # All tokens have the same score: the first are taken, and of the 16 patches 8 by all four images.
  blind["block_1"]["reduce"]["tokens"]["dyt"]["dispatcher"]["kernel"] *= 0
  assert float(looks(blind)) == pytest.approx(1.0)


def test_rates_at_their_bounds():
  sites = module(reducer="topk", layers=(1, 2), rate="learned").sites
  (text,) = collapsed(sites, {"counts/tokens/1": 2.0, "counts/tokens/2": 2.0}).values()  # the last block may
  assert "the rate of tokens/1 is at its lower bound, 2 tokens" in text and "config.loss.target" in text
  (text,) = collapsed(sites, {"counts/tokens/1": 17.0, "counts/tokens/2": 17.0}).values()
  assert "all 17 tokens pass everywhere; try a larger config.loss.budget" in text
  assert collapsed(sites, {"counts/tokens/1": 17.0, "counts/tokens/2": 12.0}) == {}


def test_rates_at_the_bounds_of_their_reducers():
  """ToMe leaves 9 of 17 and 5 of 9, half of the patches and CLS, however few its rate asks for."""
  sites = module(reducer="tome", layers=(0, 1, 2), rate="learned").sites
  at = lambda *counts: {f"counts/tokens/{layer}": count for layer, count in enumerate(counts)}
  first, second = collapsed(sites, at(9.0, 5.0, 3.0)).values()  # the last block may
  assert "the rate of tokens/0 is at the lower bound of 'tome', 9 of 17 tokens: config.loss.budget cannot" in first
  assert "the rate of tokens/1 is at the lower bound of 'tome', 5 of 9 tokens" in second
  assert collapsed(sites, at(10.0, 7.0, 4.0)) == collapsed(sites, at(10.0, 12.0, 12.0)) == {}
  assert list(collapsed(sites, at(12.0, 7.0, 7.0))) == ["rate/tokens/1"]  # 7 of 12, where 9 of 17 would be the bound


def test_learned_thresholds_at_their_bounds():
  sites = module(reducer="topk", layers=(0, 1, 2), rate="learned_threshold").sites
  at = lambda *counts: {f"counts/tokens/{layer}": count for layer, count in enumerate(counts)}
  (text,) = collapsed(sites, at(17.0, 17.0, 17.0)).values()
  assert "thresholds of tokens lie below all scores: all 17 tokens pass everywhere; try a larger config.loss.b" in text
  assert "config.sites.tokens.threshold and softness" in text
  assert collapsed(sites, at(17.0, 17.0, 16.9)) == {}
  # 2 % of 16 patches are 0.32: with CLS 1.32.  Only the first is at fault, and the last block may.
  (text,) = collapsed(sites, at(9.0, 1.3, 1.3)).values()
  assert "threshold of tokens/1 lies above all scores: 1 of 17 tokens are left" in text and "loss.target" in text
  assert collapsed(sites, at(9.0, 1.4, 1.0)) == {}


def test_a_reducer_that_nothing_teaches(one_device, tmp_path, capfd):
  """A threshold that is given passes no gradient on to its scorer; by a count the scorer learns."""
  site = dict(reducer="stts", layers=(1,), place="before", keep=9)
  for name, rate in (("threshold", dict(rate="threshold", threshold=0.5)), ("fixed", {})):
    loop.train(config(dict(pick=site | rate), train=dict(steps=4)), tmp_path / name)
    norms = [line["train/grad_norm/block_1/reduce/pick"] for line in metrics(tmp_path / name)]
    told = capfd.readouterr().err.count("alarm: block_1/reduce/pick learns nothing, its gradient is 0: no term of")
    assert (norms == [0.0] * 4 and told == 1) if rate else (norms[-1] > 0 and told == 0)


def test_a_reducer_that_learns_nothing_where_tokens_are_taken_away(one_device, tmp_path, capfd):
  """In gather mode that is the cause; behind the step in which rates freeze it is meant so."""
  site = dict(reducer="stts", layers=(1,), place="before", keep=9)
  loop.train(config(dict(pick=site), train=dict(steps=4, mode="gather")), tmp_path / "gather")
  told = capfd.readouterr().err
  assert told.count("pick learns nothing, its gradient is 0: config.train.mode='gather' takes tokens away") == 1
  assert "rate='fixed'" not in told
  sites = dict(pick=site, rates=dict(reducer="topk", layers=(0,), rate="learned"))
  loop.train(config(sites, rates=dict(freeze_step=1)), tmp_path / "frozen")
  assert metrics(tmp_path / "frozen")[-1]["train/grad_norm/block_1/reduce/pick"] == 0.0
  assert "learns nothing" not in capfd.readouterr().err


def test_an_alarm_is_raised_once_and_only_when_it_lasts():
  watch = Alarms(module(reducer="gumbel", layers=(1,), keep=0.5).sites)
  bad, good = {"counts/tokens/1": 17.0}, {"counts/tokens/1": 9.0}
  assert [len(watch.new(m)) for m in (bad, bad, good, bad, bad, bad, bad)] == [0, 0, 0, 0, 0, 1, 0]


def test_the_loop_says_so(one_device, tmp_path, monkeypatch, capfd):
  """A router that cannot learn takes the first tokens of every image."""
  monkeypatch.setattr(alarms, "PATIENCE", 2)
  site = dict(router=dict(reducer="router", layers=(1,), place="around", keep=0.5))
  loop.train(config(site, train=dict(steps=3), optim=dict(freeze=(".*/router/kernel",))), tmp_path)
  assert capfd.readouterr().err.count("alarm: router/1 takes the same tokens of every image (100% in common)") == 1
  assert [line["train/overlap/router/1"] for line in metrics(tmp_path)] == [1.0, 1.0, 1.0]
