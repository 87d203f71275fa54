"""Every registered reducer keeps the laws; reducers that break one on purpose are caught, with its number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tokred
from tokred.reducers import REGISTRY, Planner, Reducer, keep_top
from tokred.reducers.ats import ATS
from tokred.reducers.base import merge_into, num_kept, ranks
from tokred.reducers.diffrate import DiffRateMerge
from tokred.reducers.hiprune import HiPrune
from tokred.reducers.mctf import MCTF
from tokred.reducers.router import Router
from tokred.reducers.spa import SPA
from tokred.reducers.tofu import ToFu
from tokred.reducers.tome import ToMe
from tokred.reducers.topk import TopK
from tokred.testing import LAWS, LawError, cases, check_reducer, laws
from tokred.testing.cases import ModelCase
from tokred.tokens import Plan, compact, fold, inverse, straight_through

LATER = ("later", "ragged")
OPTIONS = {  # modules whose options take other ways through the code, the laws that these meet, and in which states
  "fuse": (TopK(fuse=True), (3, 5, 6, 7), LATER),
  "raster": (TopK(raster=True, score="key_norm"), (7,), LATER),
  "norm": (TopK(score="token_norm"), (10,), ("bfloat16",)),
  "alone": (SPA(group=1), (2, 5, 9), LATER),
  "anew": (MCTF(one_step_ahead=False), (2, 3), ("model",)),
}


EXCEPT = {  # laws that a method breaks by what it is
  "ats": (1, 6, 10),  # samples a different number for every image, fewer than all even where all are allowed
  "avit": (1, 2, 4, 5, 6, 7),  # CLS halts too, and what stopped stays in its place; tests/test_routing.py has its own
  "dyt": (7,),  # while it trains, who goes round owns itself with a gate of 0
  "recover": (1, 2, 4, 5, 6, 7, 10),  # brings tokens back; tests/test_recover.py
  "clca": (1, 2, 4, 5, 6, 7, 10),  # adds tokens; tests/test_clca.py
  "sit": (6,),  # as many slots as tokens are still slots
  "sit_reverse": (1, 2, 8),  # leaves the tokens alone, and learns by a loss on what it recovers
  "remember": (1, 2, 3, 5, 6, 7),  # leaves all tokens, whatever it is asked, and a feature; tests/vlm/test_selection.py
  "dymu_merge": (10,),  # as ToMe: of tied pairs the sources of lowest index leave, see below
  "hired": (1, 6, 10),
  "globalcom2": (1, 6, 10),
  "prumerge": (1, 4, 6, 10),  # decide themselves how many
  "spa": (1, 2, 4, 6, 7, 9, 11),  # a gate decides how many, and images of a group share rows; tests/test_spa.py
}
# They keep square numbers of tokens, which the harness does not ask for, and end a scope; tests/test_stvit.py
UNFIT = {"stvit", "stvit_recover"}
UNFIT |= {name for name, cls in REGISTRY.items() if "encoder" not in cls.stacks}  # tests/language
UNFIT |= {"hiprune"}  # reads what another site remembers; by another score below
# Training-free, and met by numbers in both modes in tests/vlm or test_fusion.py: their laws are thorough.
RECORDED = {
  "tome_kth", "tome_random",
  "dtd", "dymu_merge", "facility", "flashvlm", "globalcom2", "hired", "holov", "kmedoids", "mmtok", "pool", "prumerge",
  "remember", "sparsevlm", "temporal_merge", "visionzip",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - UNFIT - RECORDED))
def test_registered_reducer_keeps_the_laws(name):
  """In two states; through a model: tests/test_pairs.py, in all: the test below and tests/test_readme.py."""
  check_reducer(REGISTRY[name], laws=sorted(set(_numbers(name)) & {2, 3, 5, 9}), cases=LATER)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(set(REGISTRY) - UNFIT))
def test_registered_reducer_keeps_all_laws(name):
  check_reducer(REGISTRY[name], laws=_numbers(name))


@pytest.mark.thorough
def test_hiprune_keeps_all_laws():
  check_reducer(HiPrune(middle="key_norm"))


def _numbers(name):
  return sorted({law.number for law in LAWS} - set(EXCEPT.get(name, ())))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_keep_the_laws(name):
  module, numbers, states = OPTIONS[name]
  check_reducer(module, laws=numbers, cases=states)


@pytest.mark.parametrize(
  "module", [TopK(fuse=True), TopK(raster=True, score="key_norm"), Router(gate="raw")], ids=["fuse", "raster", "raw"]
)
def test_options_mask_as_they_gather(module):
  laws.law_2_tokens(module, cases.make_cases(module)["later"])


@pytest.fixture(scope="module")
def diffrate():
  site = dict(reducer=("topk", "diffrate_merge"), place="attn", layers=(0,), keep=(15, 12))
  return ModelCase("diffrate", None, site)


@pytest.mark.parametrize("law", [laws.law_2_model, laws.law_12_export])
def test_diffrate_pair(diffrate, law):
  law(None, diffrate)


def test_gradient_reaches_both_rates_of_diffrate(diffrate):
  model = diffrate.model(rate="learned", keep=None)
  images = diffrate.images()
  variables = cases.init(model, images)
  sites = variables["params"]["block_0"]["reduce"]
  sites["site_1_diffrate_merge"]["rate"]["logits"] = jnp.linspace(0.0, 2.0, 16)  # so that it takes what pruning left

  def loss(variables):
    out = model.apply(variables, images, train=True, mode="mask")
    return out.logits[:, 0].sum(), out.counts

  program = jax.jit(jax.grad(loss, has_aux=True), compiler_options=cases.COMPILER)
  grads, counts = program(variables)
  assert float(counts[0]) < 11
  for site in ("site_0_topk", "site_1_diffrate_merge"):
    slope = np.asarray(grads["params"]["block_0"]["reduce"][site]["rate"]["logits"])
    assert np.isfinite(slope).all() and (slope != 0).any()


@pytest.mark.parametrize(
  "module", [ToFu(early=1.0), ToFu(early=-1.0), ATS(), DiffRateMerge()], ids=["prunes", "merges", "ats", "diffrate"]
)
def test_a_rate_learns_through_reducers_with_a_call_of_their_own(module):
  """The token that stands j-th has the slope of the j-th chance to survive, whatever the reducer does besides."""
  fields = dict(protected=(0, 1), alive=(9,) * cases.BATCH, earlier=False, dtype=jnp.float32)
  tokens = cases.draw(0, module.needed(), **fields)

  def mask(survival):
    return module.apply({}, tokens, 6, train=True, mode="mask", survival=survival)[0].mask[0]

  slope = jax.jit(jax.jacobian(mask), compiler_options=cases.COMPILER)(jnp.linspace(1.0, 0.2, cases.NUM))
  np.testing.assert_array_equal(slope[:9], np.eye(cases.NUM)[:9])


# Broken on purpose.


class Norm(Planner):
  """Sound; the broken ones differ in one place."""

  def score(self, tokens):
    return jnp.linalg.norm(tokens.x.astype(jnp.float32) + 1e-3, axis=-1)

  def plan(self, tokens, keep, *, train):
    return keep_top(tokens, self.score(tokens), keep), {"score": self.score(tokens)}


class OneTooMany(Norm):
  def plan(self, tokens, keep, *, train):
    return keep_top(tokens, self.score(tokens), keep + 1), {}


class HostCount(Norm):
  def plan(self, tokens, keep, *, train):
    return keep_top(tokens, self.score(tokens), int(keep)), {}


class DeadFirst(Norm):
  def __call__(self, tokens, keep, *, train, mode):
    tokens, report = super().__call__(tokens, keep, train=train, mode=mode)
    return tokens.replace(mask=tokens.mask[:, ::-1]), report


class OtherInGather(Norm):
  def __call__(self, tokens, keep, *, train, mode):
    plan = keep_top(tokens, self.score(tokens) * (-1 if mode == "gather" else 1), keep)
    return (compact(tokens, plan, keep) if mode == "gather" else fold(tokens, plan)), {}


class DrawsCounts(Norm):
  def plan(self, tokens, keep, *, train):
    return keep_top(tokens, self.score(tokens), jnp.asarray(keep) - 1 if train else keep), {}


class DrawsAtInference(Norm):
  def score(self, tokens):
    return jax.random.normal(self.make_rng("reduce"), tokens.mask.shape)


class SoftGate(Norm):
  def plan(self, tokens, keep, *, train):
    plan = keep_top(tokens, self.score(tokens), keep)
    return (plan.replace(gate=jnp.maximum(plan.gate, 0.3)) if train else plan), {}


class CountsTheDead(Norm):
  def score(self, tokens):
    return jnp.abs(tokens.x[..., 0] - tokens.x.mean((1, 2))[:, None])


class PlainMean(ToMe):
  def plan(self, tokens, keep, *, train):
    plan, report = super().plan(tokens, keep, train=train)
    return merge_into(tokens, plan.owner, plan.order, jnp.ones_like(tokens.size)), report


class Unprotected(Norm):
  def plan(self, tokens, keep, *, train):
    free = tokens.replace(protected=jnp.zeros_like(tokens.protected))
    return keep_top(free, self.score(tokens), keep), {}


class AlwaysSorts(Norm):
  def __call__(self, tokens, keep, *, train, mode):
    plan, report = self.plan(tokens, keep, train=False)
    return (compact(tokens, plan, keep) if mode == "gather" else fold(tokens, plan)), report


class LosesOwner(Norm):
  def __call__(self, tokens, keep, *, train, mode):
    out, report = super().__call__(tokens, keep, train=train, mode=mode)
    return out.replace(owner=tokens.owner), report


class OwnerWithoutHome(Norm):
  def plan(self, tokens, keep, *, train):
    plan = keep_top(tokens, self.score(tokens), keep)
    last = plan.order[:, -1:]  # dropped, and yet made the owner of what is dropped
    return plan.replace(owner=jnp.where(plan.owner < 0, last, plan.owner)), {}


class StalePosition(Norm):
  def __call__(self, tokens, keep, *, train, mode):
    out, report = super().__call__(tokens, keep, train=train, mode=mode)
    return out.replace(position=tokens.position[:, : out.x.shape[1]]), report


class InfiniteGradient(Norm):
  def plan(self, tokens, keep, *, train):
    norm = jnp.linalg.norm(tokens.x, axis=-1)  # not differentiable at zero
    plan = keep_top(tokens, norm, keep)
    return plan.replace(gate=straight_through(plan.gate, jax.nn.sigmoid(norm))), {}


class NoGradient(Norm):
  @nn.compact
  def plan(self, tokens, keep, *, train):
    score = nn.Dense(1, name="scorer")(tokens.x)[..., 0]
    return keep_top(tokens, jnp.where(tokens.alive, score, 0), keep), {}


class BatchMean(Norm):
  def score(self, tokens):
    x = jnp.where(tokens.alive[..., None], tokens.x, 0).astype(jnp.float32)
    return jnp.linalg.norm(x - x.mean((0, 1)), axis=-1)


class Upcasts(Norm):
  def __call__(self, tokens, keep, *, train, mode):
    out, report = super().__call__(tokens, keep, train=train, mode=mode)
    return out.replace(x=out.x.astype(jnp.float32)), report


class NoScore(Norm):
  def plan(self, tokens, keep, *, train):
    return keep_top(tokens, self.score(tokens), keep), {}


class LowRanking(Norm):
  def score(self, tokens):
    return jnp.square(tokens.x).sum(-1)


class TiesUp(Norm):
  def plan(self, tokens, keep, *, train):
    score = self.score(tokens)
    flip = lambda a: a[:, ::-1]
    order = inverse(ranks(tokens.replace(mask=flip(tokens.mask), protected=flip(tokens.protected)), flip(score)))
    order = score.shape[1] - 1 - order
    kept = jnp.argsort(order, axis=1) < num_kept(tokens, keep)
    index = jnp.arange(score.shape[1], dtype=jnp.int32)
    return Plan(jnp.where(kept, index, -1), order, kept | ~tokens.alive), {"score": score}


class NotWritable(Norm):
  scale: complex = 1j

  def plan(self, tokens, keep, *, train):
    return keep_top(tokens, self.score(tokens) * abs(self.scale), keep), {}


class NotExact(Norm):
  relaxed = True

  def __call__(self, tokens, keep, *, train, mode):
    tokens, report = super().__call__(tokens, keep, train=train, mode=mode)
    return (tokens.replace(x=tokens.x * 1.1) if mode == "mask" else tokens), report


BROKEN = [
  (1, OneTooMany, "tokens are alive"),
  (1, HostCount, "Concretization"),
  (1, DeadFirst, "behind a dead token"),
  (1, DrawsCounts, "where `keep` is learned"),
  (2, OtherInGather, "masked against gathered"),
  (2, DrawsAtInference, "drawn twice"),
  (2, SoftGate, "neither 0 nor 1"),
  (3, CountsTheDead, "NaN in dead tokens"),
  (4, PlainMean, "size-weighted mean"),
  (5, Unprotected, "protected token is gone, at row"),
  (6, AlwaysSorts, "keep=all"),
  (7, LosesOwner, "owner"),
  (7, OwnerWithoutHome, "plan.gate is not 1 exactly"),
  (7, StalePosition, "position is not the survivor's own"),
  (8, InfiniteGradient, "not finite"),
  (8, NoGradient, "scorer"),
  (9, BatchMean, "other rows"),
  (10, Upcasts, "dtype of x"),
  (10, NoScore, "no 'score' is reported"),
  (10, LowRanking, "float32: owner"),
  (10, TiesUp, "lower index"),
  (11, BatchMean, "all-reduce"),
  (12, NotWritable, "option"),
]


@pytest.mark.parametrize("law, cls, where", BROKEN, ids=lambda value: getattr(value, "__name__", str(value)))
def test_broken_reducer_is_caught(law, cls, where):
  """By the law that it breaks, and not by one that is broken therefore; the late ones alone, for they take long."""
  late = law in (8, 11, 12) or where in ("lower index", "float32: owner", "no 'score' is reported")
  with pytest.raises(LawError) as caught:
    check_reducer(cls, laws=(law,) if late else None)
  assert caught.value.law == law
  assert f"law {law} (" in str(caught.value) and cls.__name__ in str(caught.value)
  assert where in str(caught.value)
  assert cases.PRIVATE not in REGISTRY


def test_sound_reducer_of_a_user_passes():
  check_reducer(Norm(), laws=(1, 4, 5, 6, 7, 9, 10))


class Decides(Norm):
  """Sound: it draws how many while training, and says so."""

  decides = True

  def plan(self, tokens, keep, *, train):
    share = {"kept_share": jnp.full(len(tokens.x), 0.5)} if train else {}
    keep = tokens.alive.sum(1) // 2 + 1 if train else keep
    return keep_top(tokens, self.score(tokens), keep), {"score": self.score(tokens)} | share


def test_who_draws_counts_trains_at_no_learned_rate(monkeypatch):
  check_reducer(Decides(), laws=(1, 8))
  monkeypatch.setitem(REGISTRY, "draws", Decides)
  sizes = dict(variant="mu/4", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=5)
  build = lambda **site: tokred.build(dict(model=sizes, sites=dict(s=dict(reducer="draws", layers=(1,)) | site)))
  with pytest.raises(ValueError, match=r"sites.s.rate='learned', but 'draws' decides .* no `counted`.*; valid: fixed"):
    build(rate="learned")
  assert build(keep=0.5).counts == (17, 9)


@pytest.mark.parametrize("rate", ["threshold", "learned_threshold"])
def test_who_reports_no_score_has_no_threshold(monkeypatch, rate):
  monkeypatch.setitem(REGISTRY, "silent", NoScore)
  sizes = dict(variant="mu/4", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=5)
  site = dict(reducer="silent", layers=(1,), keep=0.5, rate=rate, threshold=0.0)
  with pytest.raises(ValueError, match=r"sites.s, layer 1: NoScore.plan reports no 'score', .*; valid: a report"):
    tokred.build(dict(model=sizes, sites=dict(s=site))).init()


def test_relaxed_reducer_is_not_held_to_law_2():
  case = cases.make_cases(NotExact())["later"]
  laws.law_2_tokens(NotExact(), case)
  laws.law_2_sampled(NotExact(), case)
  strict = type("Strict", (NotExact,), {"relaxed": False})()
  with pytest.raises(laws.Broken, match="masked against gathered"):
    laws.law_2_tokens(strict, cases.make_cases(strict)["later"])


def test_arguments():
  with pytest.raises(TypeError, match="takes a tokred Reducer"):
    check_reducer(nn.Dense(3))
  with pytest.raises(ValueError, match=r"laws has 13; valid: 1 to 12"):
    check_reducer(Norm, laws=(13,))
  with pytest.raises(ValueError, match=r"cases has 'modle'; did you mean 'model'"):
    check_reducer(Norm, laws=(2,), cases=("modle",))
  for arguments in (dict(laws=2), dict(laws=(1,), cases="prefix")):
    with pytest.raises(ValueError, match=r"valid: sequences, such as laws=\(2, 5\)"):
      check_reducer(Norm, **arguments)

  class Odd(Reducer):
    needs = ("kee",)

  with pytest.raises(ValueError, match="did you mean 'key'"):
    check_reducer(Odd)


@pytest.mark.parametrize("module", [ToMe(), DiffRateMerge()], ids=["tome", "diffrate_merge"])
def test_tied_pairs_go_to_the_lower_index(module):
  """All tokens alike: the sources of lowest index leave (ToMe), the last ranks leave (DiffRate), into the first."""
  case = cases.make_cases(module)["prefix"]
  tied = jax.tree.map(lambda a: jnp.ones_like(a), case.tokens.feats)
  plan = case.programs.plan(case.tokens.replace(x=jnp.ones_like(case.tokens.x), feats=tied), 14)
  owner = np.asarray(plan.owner[0])
  gone = (2, 4, 6) if isinstance(module, ToMe) else (14, 15, 16)
  into = 3 if isinstance(module, ToMe) else 2  # 0 and 1 are protected
  assert owner.tolist() == [into if i in gone else i for i in range(17)]
