"""Counts for a budget, against hand arithmetic, and searches whose best answer is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokred
from tokred import calibrate, schedules
from tokred.reducers import base

# 16 patches and CLS, width 16, MLP 32: a block costs 4 N 16^2 + 2 N^2 16 for attention and 2 N 16 32 for the MLP.
MODEL = dict(variant="mu/1", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(4, 4), channels=1, num_classes=10)
CONFIG = dict(model=MODEL)


def site(**fields):
  return dict(tokens=dict(dict(reducer="topk", score="token_norm", layers=(0, 1)), **fields))


def macs(*counts):
  """By hand: (tokens in attention, in the MLP) of each block, the patches and the head."""
  attention = sum(4 * n * 256 + 2 * n * n * 16 for n, _ in counts)
  return attention + sum(2 * n * 16 * 32 for _, n in counts) + 16 * 16 * 1 + 16 * 10


def share_of(sites):
  return tokred.build(CONFIG | {"sites": sites}).macs / tokred.build(CONFIG).macs


def test_the_share_by_hand():
  module = tokred.build(CONFIG | {"sites": site(keep=1.0)}).module
  share = schedules.share(module, module.sites.spots, (9, 5))
  assert share == pytest.approx(macs((17, 9), (9, 5)) / macs((17, 17), (17, 17)), rel=1e-6)


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.6])
def test_no_other_count_comes_nearer(budget):
  (keep,) = (s["keep"] for s in schedules.at_budget(CONFIG, site(), budget).values())
  got = macs((17, keep[0]), (keep[0], keep[1])) / macs((17, 17), (17, 17))
  assert got <= budget
  for more in ((1, 0), (0, 1)):
    a, b = keep[0] + more[0], keep[1] + more[1]
    assert b > a or a > 17 or macs((17, a), (a, b)) / macs((17, 17), (17, 17)) > budget


def test_learned_counts_are_scaled_to_the_target():
  """8 and 4 unprotected tokens, and a site set by hand that lets 12 tokens through in front of them."""
  by_hand = dict(reducer="topk", score="token_norm", layers=(0,), place="after", keep=9)
  sites = dict(a_learned=dict(site(keep=(9, 5))["tokens"]), b_by_hand=by_hand)
  model = tokred.build(CONFIG | {"sites": sites}).init()
  dense = macs((17, 17), (17, 17))
  at = lambda cost: schedules.at_target(model, {"a_learned"}, cost / dense + 1e-6).sites
  down = at(macs((17, 7), (7, 4)))  # f = 3/4: 6 and 3
  assert down.a_learned.keep == (7, 4) and down.b_by_hand.keep == 9
  # f = 5/8: 5 and round(2.5) = 2, where 14/25 gives 4 and 2; what that leaves of the budget is one token of the last.
  assert at(macs((17, 6), (6, 4))).a_learned.keep == (6, 4)
  # f = 3/2: 12 and 6; the site by hand keeps attention of block 1 at 9 tokens.
  assert at(macs((17, 13), (9, 7))).a_learned.keep == (13, 7)
  gmacs = schedules.at_target(model, {"a_learned"}, macs((17, 7), (7, 4)) / 1e9 + 1e-12, "gmacs")
  assert gmacs.sites.a_learned.keep == (7, 4)
  tokens = schedules.at_target(model, {"a_learned"}, (7 + 4) / 2, "tokens")  # the mean of what leaves the blocks
  assert tokens.sites.a_learned.keep == (7, 4)
  with pytest.raises(ValueError, match=r"sites a_learned cannot go down to 0.1 in unit 'fraction', only to 0\.\d+"):
    schedules.at_target(model, {"a_learned"}, 0.1)


def test_shares_and_even_removal():
  config = CONFIG | {"model": MODEL | {"depth": 8, "image_size": (16, 16)}}
  (stages,) = schedules.at_budget(config, site(layers="stages"), 0.6).values()
  assert stages["layers"] == (2, 4, 6)
  rates = [(out - 1) / (n - 1) for n, out in zip((257, *stages["keep"]), stages["keep"], strict=False)]
  assert max(rates) - min(rates) < 0.03
  (every,) = schedules.at_budget(config, site(layers="every"), 0.6).values()
  assert every["layers"] == (1, 2, 3, 4, 5, 6, 7)
  removed = -np.diff((257, *every["keep"]))
  assert removed.max() - removed.min() <= 2


def test_learning_begins_with_the_counts_set_by_hand():
  config = CONFIG | {"model": MODEL | {"depth": 4}}
  pair = dict(reducer=("topk", "diffrate_merge"), score="token_norm", layers="every")
  by_hand = schedules.at_budget(config, dict(tokens=pair), 0.7)["tokens"]
  learned = schedules.at_budget(config, dict(tokens=dict(pair, rate="learned", initial="budget")), 0.7)["tokens"]
  assert learned == dict(pair, layers=(1, 2, 3), rate="learned", initial=by_hand["keep"])
  model = tokred.freeze(tokred.build(config | {"sites": dict(tokens=learned)}).init())
  assert model.config.sites.tokens.keep == by_hand["keep"] and "initial" not in model.config.sites.tokens


def test_counts_are_those_that_a_reducer_can_give():
  config = CONFIG | {"model": MODEL | {"depth": 6}}
  template = dict(tokens=dict(reducer="tome", layers="every"))
  (tome,) = schedules.at_budget(config, template, 0.55).values()
  for n, out in zip((17, *tome["keep"]), tome["keep"], strict=False):
    assert out >= n - (n - 1) // 2
  (fused,) = schedules.at_budget(config, dict(tokens=dict(reducer="topk", fuse=True, layers="stages")), 0.6).values()
  assert min(fused["keep"]) >= 2
  (cells,) = schedules.at_budget(config, dict(tokens=dict(reducer="stvit", layers=(2,), place="after")), 0.7).values()
  assert cells["keep"][0] - 1 in (1, 4, 9)


def test_routed_blocks_become_more_where_the_budget_asks_for_it():
  config = CONFIG | {"model": MODEL | {"depth": 6}}
  template = dict(tokens=dict(reducer="router", place="around", layers="alternate"))
  layers = [schedules.at_budget(config, template, b)["tokens"]["layers"] for b in (0.7, 0.5, 0.3)]
  assert layers == [(1, 3, 5), (1, 2, 4, 5), (1, 2, 3, 4, 5)]


def test_prune_and_merge_share_what_goes():
  config = CONFIG | {"model": MODEL | {"depth": 4}}
  template = dict(tokens=dict(reducer=("topk", "diffrate_merge"), layers="every"))
  prune, merge = schedules.at_budget(config, template, 0.7)["tokens"]["keep"]
  assert len(prune) == len(merge) == 3 and all(p > m for p, m in zip(prune, merge, strict=True))


def test_learned_rates_and_given_counts_stay():
  learned = dict(tokens=dict(reducer="topk", layers=(0, 1), rate="learned"))
  assert schedules.at_budget(CONFIG, learned, 0.6) == learned
  for budget in (60, 0.0, "a"):
    with pytest.raises(
      ValueError, match=r"budget=.*; valid: a share of the dense multiply-adds, above 0.0 and at most 1"
    ):
      schedules.at_budget(CONFIG, learned, budget)
  assert schedules.at_budget(CONFIG, site(keep=5), 0.6) == site(keep=5)


def test_counts_behind_a_site_that_was_set_by_hand():
  """9 tokens arrive behind it, and none goes where everything is allowed."""
  sites = dict(a=site(keep=9, layers=(0,))["tokens"], b=site(layers=(1,))["tokens"])
  assert schedules.at_budget(CONFIG, sites, 1.0)["b"]["keep"] == (9,)
  module = tokred.build(CONFIG | {"sites": site(r=2)}).module
  assert schedules.with_counts(site(r=2), module.sites.spots, (9, 5)) == site(keep=(9, 5))


def test_words_for_layers():
  words = {word: ways(12)[0] for word, ways in schedules.LAYERS.items()}
  assert words["stages"] == (3, 6, 9) and words["every"] == tuple(range(1, 12)) and words["alternate"][:2] == (1, 3)
  assert schedules.LAYERS["stages"](2) == schedules.LAYERS["once"](2)[:1] == [(1,)]  # block 0 has seen nothing yet


def test_errors():
  with pytest.raises(
    ValueError, match=r"sites tokens cannot go down to budget=0.1 .* only to 0\.\d+; raise the budget"
  ):
    schedules.at_budget(CONFIG, site(), 0.1)
  with pytest.raises(ValueError, match="layers='evry' is no word for layers; did you mean 'every'"):
    schedules.at_budget(CONFIG, site(layers="evry"), 0.5)


@pytest.fixture(scope="module")
def model():
  """An untrained model, but for its head, which is zero at the start."""
  made = tokred.build(CONFIG | {"sites": site(keep=1.0)}).init(0)
  rng = np.random.default_rng(0)
  params = jax.tree.map(np.asarray, made.params)
  params["head"]["kernel"] = rng.standard_normal(params["head"]["kernel"].shape).astype(np.float32)
  return tokred.Model(made.config, made.module, params)


@pytest.fixture(scope="module")
def batches():
  rng = np.random.default_rng(1)
  image = rng.standard_normal((2, 8, 4, 4, 1)).astype(np.float32)
  return [dict(image=image[0], mask=np.ones(8, bool)), dict(image=image[1], mask=np.arange(8) < 5)]


def test_the_distance_is_that_of_the_gathered_model(model, batches):
  got = calibrate.divergence(model, batches)((6, 4))
  sites = site(keep=(6, 4))
  reduced = tokred.Model(tokred.build(CONFIG | {"sites": sites}).config, tokred.build(CONFIG | {"sites": sites}).module,
                         model.params)  # fmt: skip
  dense = tokred.Model(tokred.build(CONFIG).config, tokred.build(CONFIG).module, model.params)
  log_p, log_q = (
    np.concatenate([jax.nn.log_softmax(m(b["image"]).logits)[b["mask"]] for b in batches]) for m in (dense, reduced)
  )
  assert got == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum() / 13, rel=1e-3, abs=1e-6) and got > 0
  assert calibrate.divergence(model, batches)((17, 17)) == pytest.approx(0.0, abs=1e-6)


def test_one_program_for_all_counts(model, batches, caplog):
  distance = calibrate.divergence(model, batches)
  distance((17, 17))
  with jax.log_compiles(True):
    for counts in ((9, 9), (5, 2), (17, 3)):
      distance(counts)
  assert "ompil" not in caplog.text


@pytest.mark.parametrize("search", [calibrate.greedy, calibrate.sigmoid])
def test_searches_meet_the_budget(model, batches, search):
  config = search(model, batches, 0.8)
  assert 0.76 < share_of(config.sites.to_dict()) <= 0.8 and config.is_locked
  first, second = config.sites.tokens.keep
  assert first >= second >= 2


@pytest.mark.parametrize("a", [0, 4])
def test_sigmoid_takes_a_curve_of_its_family(model, batches, a):
  """Blocks 0 and 1 of 2: n_0 = 16 / (1 + exp(-a / 2 - h)) and n_1 = 16 / (1 + exp(-h)) patches, rounded up, and CLS.

  Single tokens come back where the budget has room for them, the last block's first.
  """
  first, second = calibrate.sigmoid(model, batches, 0.8, steepness=(a,)).sites.tokens.keep
  h = np.linspace(-12, 12, 20_001)
  curves = {tuple(c) for c in (1 + np.ceil(16 / (1 + np.exp([-a / 2 - h, -h])))).T.astype(int).tolist()}
  assert any(0 <= first - top <= 1 and 0 <= second - low <= 2 for top, low in curves)
  assert (first == second) if a == 0 else (first - second >= 4)


def test_greedy_takes_what_does_not_matter(model, batches):
  """Tokens of the last block's MLP reach nobody: only CLS is read."""
  first, second = calibrate.greedy(model, batches, 0.9, step=1 / 16).sites.tokens.keep
  assert first == 17 and second < 17


def test_a_search_needs_fixed_rates(batches):
  learned = tokred.build(CONFIG | {"sites": dict(tokens=dict(reducer="topk", layers=(0, 1), rate="learned"))}).init(0)
  with pytest.raises(ValueError, match=r"a search needs sites with rate='fixed'; those of \['tokens'\] are not"):
    calibrate.greedy(learned, batches, 0.8)
  with pytest.raises(ValueError, match="the model has no parameters"):
    calibrate.sigmoid(tokred.build(CONFIG | {"sites": site(keep=1.0)}), batches, 0.8)


class Known(base.Planner):
  """Scores that are told: in block 0 of patch i of image b i + b, in block 1 i - 8, or 17 - i where `falls`."""

  places = ("mlp", "attn")
  layer: int = 0
  falls: bool = False

  def plan(self, tokens, keep, *, train):
    i = tokens.position.astype(jnp.float32)  # survivors stand from best to worst
    score = (i + jnp.arange(len(i))[:, None], 17 - i if self.falls else i - 8)[self.layer]
    return base.keep_top(tokens, score, keep), {"score": score}


def known(monkeypatch, model, **fields):
  monkeypatch.setitem(base.REGISTRY, "known", Known)
  return model.with_sites(dict(tokens=dict(reducer="known", layers=(0, 1), keep=0.5, **fields)))


def test_one_threshold_for_all_layers(monkeypatch, model, batches):
  model = known(monkeypatch, model)
  images = [dict(image=batches[0]["image"], mask=np.arange(8) < 3)]
  # With 4 < t <= 5 patches 5 to 16 of image 0 go through the first MLP, 12; 4 to 16 and 3 to 16 of images 1 and 2, 13
  # and 14: 13 in the mean, and CLS.  Through the second go 13 to 16 of all: i - 8 >= 5.
  budget = macs((17, 14), (17, 5)) / macs((17, 17), (17, 17))
  config = calibrate.by_threshold(model, images, budget + 1e-6)
  assert config.sites.tokens.keep == (14, 5) and config.is_locked
  assert share_of(config.sites.to_dict()) == pytest.approx(budget, rel=1e-6)
  # A token less is what 5 < t <= 6 costs, 13 and 4, and what is left goes to the last.
  assert calibrate.by_threshold(model, images, budget - 1e-6).sites.tokens.keep == (13, 5)
  assert calibrate.by_threshold(model, images, 1.0).sites.tokens.keep == (17, 17)
  with pytest.raises(ValueError, match=r"cannot go down to budget=0.5 of the dense cost, only to 0\.\d+"):
    calibrate.by_threshold(model, images, 0.5)  # attention alone costs more


def test_later_layers_see_what_earlier_ones_leave(monkeypatch, model, batches):
  model = known(monkeypatch, model, place="attn", falls=True)
  padding = dict(image=batches[1]["image"][:2], mask=np.zeros(2, bool))
  images = [dict(image=batches[0]["image"], mask=np.arange(8) < 1), padding]
  # t = 5: patches 5 to 16 pass in block 0, and of these 5 to 12 in block 1, 17 - i >= 5; of all 16 it would be 12.
  budget = macs((17, 13), (13, 9)) / macs((17, 17), (17, 17))
  assert calibrate.by_threshold(model, images, budget + 1e-6).sites.tokens.keep == (13, 9)


@pytest.mark.parametrize("rate", ["threshold", "learned_threshold"])
def test_thresholds_are_moved_until_the_mean_image_meets_the_budget(monkeypatch, model, batches, rate):
  """Thresholds 0 and 1 and a shift of d: patches i + b >= d go on behind block 0, and i - 8 >= 1 + d behind block 1."""
  site = dict(reducer="known", layers=(0, 1), rate=rate, threshold=(0.0, 1.0), place="mlp")
  site |= dict(keep=1.0) if rate == "threshold" else dict(softness=0.5)
  model = known(monkeypatch, model).with_sites(dict(tokens=site))
  images = [dict(image=batches[0]["image"], mask=np.arange(8) < 3)]
  # 3 < d <= 4: 13, 14 and 15 patches and CLS; behind block 1 patches 13 to 16 of all.
  costs = [macs((17, 14 + b), (17, 5)) / macs((17, 17), (17, 17)) for b in range(3)]
  config = calibrate.by_shift(model, images, np.mean(costs) + 1e-6)
  first, second = config.sites.tokens.threshold
  assert 3 < first <= 4 and second - first == pytest.approx(1.0, abs=1e-5) and config.is_locked
  assert config.sites.tokens.rate == rate and config.sites.tokens.reducer == "known"
  rows = calibrate.in_rows(model, images, np.mean(costs) + 1e-6).sites.tokens
  assert rows.threshold == (first, second) and rows.keep == (16, 5)  # what image 2 has, and all
  assert rows.mean == pytest.approx((1.05 * 15, 5.0))  # no more rows than there may be tokens
  assert max(calibrate.by_shift(model, images, 1.0).sites.tokens.threshold) <= -7.0  # all pass
  with pytest.raises(ValueError, match=r"cannot go down to budget=0.5 of the dense cost, only to 0\.\d+"):
    calibrate.by_shift(model, images, 0.5)
  with pytest.raises(ValueError, match=r"thresholds of \[\] cannot be moved .* valid: one site of one reducer"):
    calibrate.by_shift(model.with_sites({}), images, 0.5)


def test_thresholds_become_mean_counts(monkeypatch, model, batches):
  """One for each layer, as training left them; what is behind an image's padding does not count."""
  sites = dict(tokens=dict(reducer="known", layers=(0, 1), keep=1.0, rate="threshold", threshold=(4.5, 5.0), mean=9))
  model = known(monkeypatch, model).with_sites(sites)
  images = [dict(image=batches[0]["image"], mask=np.arange(8) < 2), dict(image=batches[0]["image"], mask=np.zeros(8))]
  # Patches 5 to 16 of image 0 and 4 to 16 of image 1 pass in block 0, 12.5 and CLS, rounded up; 13 to 16 in block 1.
  budget = macs((17, 14), (17, 5)) / macs((17, 17), (17, 17))
  site = calibrate.by_mean(model, images, budget + 1e-6).sites.tokens.to_dict()
  assert site.pop("keep") == (14, 5) and site == dict(reducer="known", layers=(0, 1))
  # A larger budget scales both, 13 f and 4 f, where there are no more than 16.
  larger = macs((17, 17), (17, 9)) / macs((17, 17), (17, 17))
  assert calibrate.by_mean(model, images, larger + 1e-6).sites.tokens.keep == (17, 9)
  with pytest.raises(ValueError, match="no site has a threshold; valid: a frozen model"):
    calibrate.by_mean(known(monkeypatch, model), images, 0.8)


def test_a_dispatcher_gets_its_counts(batches):
  dyt = dict(tokens=dict(reducer="dyt", layers=(0, 1), keep=0.5, hidden=2))
  model = tokred.build(CONFIG | {"sites": dyt}).init(0)
  params = jax.tree.map(np.array, model.params)
  for layer, bias in enumerate((50.0, -50.0)):
    params[f"block_{layer}"]["reduce"]["tokens"]["dyt"]["dispatcher"]["bias"][:] = bias
  # The first block wants all, the second none; the adapters' 17 x 16 x (2 x 2 + 1) are paid for in any case.
  budget = (macs((17, 17), (17, 1)) + 2 * 17 * 16 * 5) / macs((17, 17), (17, 17))
  model = dataclasses.replace(model, params=params)
  config = calibrate.by_threshold(model, batches, budget + 1e-6)
  assert config.sites.tokens.keep == (17, 1) and config.sites.tokens.hidden == 2
  assert share_of(config.sites.to_dict()) == pytest.approx(budget, rel=1e-6)


def test_thresholds_need_one_site(model, batches):
  topk = dict(reducer="topk", score="token_norm", layers=(0,), keep=9)
  two = dict(a=topk, b=dict(reducer="dyt", layers=(1,), keep=5))
  with pytest.raises(ValueError, match=r"scores of \[\('a', 'topk'\), \('b', 'dyt'\)\] have no threshold in common"):
    calibrate.by_threshold(model.with_sites(two), batches, 0.8)
  unscored = model.with_sites(dict(tokens=dict(reducer="kmeans", layers=(1,), keep=9)))
  with pytest.raises(ValueError, match="rate='threshold' needs reducers that"):
    calibrate.by_threshold(unscored, batches, 0.8)


def test_the_command_writes_a_model_with_its_counts(tmp_path, capsys):
  data = dict(name="digits", mean=(0.5,), std=(0.5,), train_split="train[:100]")
  model = tokred.build(CONFIG | {"sites": site(keep=1.0), "data": data, "eval": dict(batch_size=40)}).init(0)
  tokred.export.save(model, tmp_path / "there", ("orbax",))
  ask = lambda **flags: [f"--{k}={v}" for k, v in (dict(workdir=tmp_path / "there") | flags).items()]
  calibrate.main(ask(method="sigmoid", budget=0.7, output=tmp_path / "found", images=50))
  sizes = dict(image_size=(4, 4), channels=1, num_classes=10, batch_size=40)
  batches = list(calibrate.eval_batches(model.config.data, "train[:80]", **sizes))
  want, found = calibrate.sigmoid(model, batches, 0.7).sites, tokred.load(tmp_path / "found")
  assert found.config.sites == want and found.macs <= 0.7 * tokred.build(CONFIG).macs
  assert str(found.counts) in capsys.readouterr().out
  np.testing.assert_array_equal(found(batches[0]["image"]).logits, model.with_sites(want)(batches[0]["image"]).logits)
  cut = model.with_sites(site(rate="threshold", threshold=0.0, keep=1.0, layers=(0,)))
  tokred.export.save(cut, tmp_path / "cut", ("orbax",))
  calibrate.main(ask(workdir=tmp_path / "cut", method="by_shift", budget=0.8, output=tmp_path / "moved", images=80))
  want, moved = calibrate.by_shift(cut, batches, 0.8).sites, tokred.load(tmp_path / "moved")
  assert moved.config.sites == want and want.tokens.threshold[0] > 0
  mean = np.concatenate([np.asarray(moved.inspect(batch["image"]).tokens.alive.sum(1)) for batch in batches]).mean()
  threshold = f"thresholds tokens/0 {want.tokens.threshold[0]:.4f}"
  assert f"{threshold}; mean image: {mean:.1f} tokens behind them, 0." in capsys.readouterr().out
  wrong = {
    r"--budget=1.5 must be in \(0, 1\)": dict(method="greedy", budget=1.5, output=tmp_path / "new"),
    "no site has a threshold": dict(method="by_mean", budget=0.5, output=tmp_path / "new"),
  }
  for message, flags in wrong.items():
    with pytest.raises(SystemExit, match=f"^tokred.calibrate: .*{message}"):
      calibrate.main(ask(**flags))
  assert not (tmp_path / "new").exists()
