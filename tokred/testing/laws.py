"""The laws of the contract, each some functions of (module, case) that raise `Broken`; `LAWS`, below, lists them."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokred.nn import vit
from tokred.reducers import base
from tokred.testing.cases import BATCH, COMPILER, NUM, Case, ModelCase, Result, cut, draw, init, mix_alone, simulate
from tokred.testing.compare import Broken, require, same, state
from tokred.tokens import Array, Tokens, restore

COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(")


@dataclasses.dataclass(frozen=True)
class Law:
  number: int
  sentence: str
  function: Callable[[base.Reducer, Any], None]
  cases: tuple[str, ...]


def law_1_gather(module: base.Reducer, case: Case) -> None:
  n = case.alive
  for keep in {module.fewest(n, case.num_protected), case.keep()} if case.name == "prefix" else {case.keep()}:
    out = case.programs.run(cut(case.tokens, n), keep, "gather").tokens
    for name, leaf in jax.tree_util.tree_leaves_with_path(state(out)):
      require(leaf.shape[1] == keep, f"gather, keep={keep}: {leaf.shape[1]} come out in {jax.tree_util.keystr(name)}")
    require(out.alive, f"gather, keep={keep}: dead tokens come out")


def law_1_mask(module: base.Reducer, case: Case) -> None:
  run, n = case.programs.run, case.alive
  run(case.tokens, n)
  before = case.programs.traces
  for keep in range(module.fewest(n, case.num_protected), n + 1):
    out = run(case.tokens, keep).tokens
    require(out.x.shape == case.tokens.x.shape, f"mask, keep={keep}: the shape becomes {out.x.shape}")
    count = np.asarray(out.alive.sum(1))
    require(count == keep, f"mask, keep={keep}: {count.tolist()} tokens are alive,")
    _prefix(out, f"mask, keep={keep}")
  require(case.programs.traces == before, "mask: another value of `keep` compiled the program again")
  if case.name == "prefix":
    keep = case.keep()
    want = [n, keep] * (BATCH // 2)
    rows = np.asarray(run(case.tokens, want).tokens.alive.sum(1))
    require(rows == want, f"mask: counts {want} a row give {rows.tolist()},")
  out = run(case.tokens, case.keep(), train=True).tokens
  require(out.x.shape == case.tokens.x.shape, f"mask, train: the shape becomes {out.x.shape}")
  _prefix(out, "mask, train")


def law_1_learned(module: base.Reducer, case: Case) -> None:
  """Where the number is learned: how many a reducer draws of its own, that learns nothing of it and does not ship."""
  if module.ragged or case.programs.around or not _counts(module):
    return
  keep = case.keep()
  plan = case.programs.plan(case.tokens, keep, train=True, method="counted")
  kept = np.asarray((plan.owner == jnp.arange(NUM)) & case.tokens.alive)
  require(kept.sum(1) == keep, f"train, a learned rate, keep={keep}: {kept.sum(1).tolist()} tokens stay,")


def _counts(module: base.Reducer) -> bool:
  """Whether a learned rate may say how many."""
  return isinstance(module, base.Planner) and not module.draws_counts()


def _prefix(tokens: Tokens, when: str) -> None:
  alive = np.asarray(tokens.alive)
  require(alive[:, :-1] >= alive[:, 1:], f"{when}: a survivor stands behind a dead token,")


def law_2_tokens(module: base.Reducer, case: Case) -> None:
  keep, n, tol = case.keep(), case.alive, case.tolerance
  mask, gather = case.programs.run(case.tokens, keep), case.programs.run(cut(case.tokens, n), keep, "gather")
  if module.relaxed:
    count = n if case.programs.around else keep
    gap = jnp.abs(mask.after[:, :count] - gather.after[:, :count]).max()
    logging.info("%s is relaxed: masked and gathered tokens differ by %.3g", type(module).__name__, gap)
    return
  same("masked against gathered tokens: ", state(cut(mask.tokens, keep)), state(gather.tokens), tol)
  same("masked against gathered owner", mask.tokens.owner, gather.tokens.owner)
  count = n if case.programs.around else keep
  same("masked against gathered, after a block", mask.after[:, :count], gather.after[:, :count], tol)
  if case.name == "later":
    masked, gathered = case.programs.grads(case.tokens, keep), case.programs.grads(cut(case.tokens, n), keep, "gather")
    short = lambda grads: jax.tree.map(lambda leaf: leaf[:, :n], (grads["x"], grads["feats"]))
    same("gradient of tokens and features, masked against gathered", short(masked), short(gathered), 1e-4)
    same("gradient of ", masked["variables"], gathered["variables"], 1e-4)


def law_2_drawn(module: base.Reducer, case: Case) -> None:
  """What is drawn at inference is another model in either mode, and at every call."""
  keep = case.keep()
  once, again = (case.programs.run(case.tokens, keep, seed=seed).tokens for seed in (0, 1))
  same("inference, drawn twice: owner", again.owner, once.owner)
  same("inference, drawn twice: ", state(again), state(once), where=once.alive)


def law_2_sampled(module: base.Reducer, case: Case) -> None:
  """Decisions of training may differ from row to row: each row runs on with its survivors alone."""
  if module.relaxed:
    return
  soft = case.tokens.replace(mask=case.tokens.mask.astype(jnp.float32))
  for kind, tokens in (("hard", case.tokens), ("learned", soft)):
    result = case.programs.run(tokens, case.keep(), train=True)
    gate = np.asarray(result.tokens.mask, np.float32)
    require((gate == 0) | (gate == 1), f"train, {kind} mask: a gate is neither 0 nor 1 in the forward pass,")
    for row in range(0 if case.programs.around else BATCH):
      count = int(gate[row].sum())
      alone = mix_alone(*(np.asarray(a[row, :count], np.float64) for a in (result.tokens.x, result.tokens.size)))
      same(f"train, {kind} mask, row {row}: survivors among the dead against survivors alone, ",
           result.after[row, :count][None], jnp.asarray(alone, jnp.float32)[None], 1e-5)  # fmt: skip


def law_2_model(module: base.Reducer, case: ModelCase) -> None:
  (masked, g_masked), (gathered, g_gathered) = (case.gradient(mode, False, False) for mode in ("mask", "gather"))
  if module is not None and module.relaxed:
    gap = jnp.abs(masked["logits"] - gathered["logits"]).max()
    logging.info("%s is relaxed: masked and gathered logits differ by %.3g", type(module).__name__, gap)
    return
  same("micro ViT, masked against gathered ", masked, gathered, 1e-5)
  same("micro ViT, masked against gathered gradient of ", g_masked, g_gathered, 1e-4)


def law_3_tokens(module: base.Reducer, case: Case) -> None:
  run, keep, dead = case.programs.run, case.keep(), ~case.tokens.alive

  def garbage(leaf: Array) -> Array:
    return jnp.where(dead.reshape(dead.shape + (1,) * (leaf.ndim - 2)), jnp.nan, leaf).astype(leaf.dtype)

  t = case.tokens
  spoilt = t.replace(x=garbage(t.x), size=garbage(t.size), feats=jax.tree.map(garbage, t.feats))
  for mode, train in (("mask", False), ("mask", True), ("gather", False)):
    clean, dirty = (run(tokens, keep, mode, train=train) for tokens in (t, spoilt))
    when = f"{mode}{', train' if train else ''}, NaN in dead tokens: "
    same(when + "alive", dirty.tokens.alive, clean.tokens.alive)
    same(when + "owner", dirty.tokens.owner, clean.tokens.owner)
    same(when, state(dirty.tokens), state(clean.tokens), where=clean.tokens.alive)
    if clean.tokens.mask.dtype == bool:  # a learned gate lets the dead speak to the gradient
      where = t.alive if case.programs.around else clean.tokens.alive
      same(when + "after a block", dirty.after, clean.after, where=where)
    whole = [{k: v for k, v in r.report.items() if v.shape[:2] != t.mask.shape} for r in (dirty, clean)]
    same(when + "report", *whole)


def law_3_block(module: base.Reducer, case: ModelCase) -> None:
  """Through a whole block: attention must not leak either."""
  model = case.model()
  if not model.sites.masked(1, "mask"):
    return
  params = init(model, case.images())["params"]["block_1"]
  tokens = draw(1, model.sites.needs(0), protected=(0, 1), alive=(13,) * BATCH, earlier=False, dtype=jnp.float32)
  block = vit.Block(model.config, model.shape, model.sites, 1)

  @functools.partial(jax.jit, compiler_options=COMPILER)
  def run(value: Array) -> Tokens:
    fill = lambda a: jnp.where(tokens.mask.reshape(a.shape[:2] + (1,) * (a.ndim - 2)), a, value)
    spoilt = tokens.replace(x=fill(tokens.x), size=fill(tokens.size), feats=jax.tree.map(fill, tokens.feats))
    return block.apply({"params": params}, spoilt, None, None, False, "mask")[0]

  clean, dirty = run(1.0), run(jnp.nan)
  same("a block with NaN in dead tokens: alive", dirty.alive, clean.alive)
  same("a block with NaN in dead tokens: x", dirty.x, clean.x, where=clean.alive)


def law_4_conserves(module: base.Reducer, case: Case) -> None:
  if not module.conserves:
    logging.info("%s declares conserves=False: law 4 is not asked of it", type(module).__name__)
    return
  source = case.tracked()
  size, x = (np.asarray(a, np.float64) for a in (source.size, source.x))
  results = {"mask": case.programs.run(source, case.keep())}
  if case.name == "prefix":
    results["gather"] = case.programs.run(source, case.keep(), "gather")
  for mode, result in results.items():
    out = result.tokens
    member = np.asarray(out.owner)[:, None] == np.arange(out.x.shape[1])[:, None]  # (B, K, N)
    want_size = np.einsum("bkn,bn->bk", member, np.where(source.alive, size, 0))
    want_x = np.einsum("bkn,bnd->bkd", member, size[..., None] * np.where(source.alive[..., None], x, 0))
    want_x = want_x / np.maximum(want_size, 1e-9)[..., None]
    to = lambda a: jnp.asarray(a, jnp.float32)
    same(f"{mode}: size against the sum over its members", out.size, to(want_size), 1e-5, out.alive)
    same(f"{mode}: x against the size-weighted mean of its members", out.x, to(want_x), 1e-5, out.alive)


def law_5_protected(module: base.Reducer, case: Case) -> None:
  """The protected are made the least attractive: no attention, and the features of another token."""
  t = case.tracked()
  twin = lambda a: jnp.where(t.protected.reshape(a.shape[:2] + (1,) * (a.ndim - 2)), a[:, 2:3], a)
  feats = {name: jnp.where(t.protected, 0, a) if a.ndim == 2 else twin(a) for name, a in t.feats.items()}
  t, n = t.replace(x=twin(t.x), feats=feats), case.alive
  fewest = module.fewest(n, case.num_protected)
  results = {"mask": case.programs.run(t, fewest), "mask, train": case.programs.run(t, fewest, train=True)}
  if case.name == "prefix":
    results["gather"] = case.programs.run(t, fewest, "gather")
  for when, result in results.items():
    out = result.tokens
    owner = jnp.maximum(out.owner, 0)
    there = restore(out.alive & out.protected, owner) & (out.owner >= 0)
    there &= restore(out.position, owner) == t.position
    require(np.asarray(there | ~t.protected), f"{when}, keep={fewest}: a protected token is gone,")


def law_6_identity(module: base.Reducer, case: Case) -> None:
  n = case.alive
  out = case.programs.run(case.tokens, n).tokens
  same("mask, keep=all: ", state(out) | dict(owner=out.owner), state(case.tokens) | dict(owner=case.tokens.owner),
       where=case.tokens.alive)  # fmt: skip
  t = cut(case.tokens, n)
  out = case.programs.run(t, n, "gather").tokens
  same("gather, keep=all: ", state(out) | dict(owner=out.owner), state(t) | dict(owner=t.owner))


def law_7_plan(module: base.Reducer, case: Case) -> None:
  """A plan by itself: what else goes wrong may follow from it."""
  for train in (False, True):
    plan, when = case.programs.plan(case.tokens, case.keep(), train=train), "train: " if train else ""
    if plan is None:
      return
    owner, order, index = np.asarray(plan.owner), np.asarray(plan.order), np.arange(NUM)
    require((np.sort(order, 1) == index).all(1), f"{when}plan.order is no permutation,")
    chief = np.take_along_axis(owner, np.maximum(owner, 0), 1)
    require((owner == -1) | (chief == owner), f"{when}plan.owner[i] is not kept,")
    gate = np.asarray(plan.gate) == 1
    require(~np.asarray(case.tokens.alive) | ((owner == index) == gate),
            f"{when}plan.gate is not 1 exactly where plan.owner[i] == i,")  # fmt: skip


def law_7_owner(module: base.Reducer, case: Case) -> None:
  """Two reductions in a row, followed group by group in plain Python."""
  tokens, n = case.tokens, case.alive
  for step, train in enumerate((False, True)):
    keep = max(module.fewest(n, case.num_protected), n - 3 * (step + 1))
    out = case.programs.run(tokens, keep, train=train).tokens
    when, mapped, alive = f"reduction {step + 1}: ", np.asarray(out.owner), np.asarray(out.alive)
    plan = case.programs.plan(tokens, keep, train=train)
    if plan is not None:
      gone = np.asarray(tokens.alive.sum(1)) > alive.sum(1)  # else the tokens stay as they are
      order = np.where(gone[:, None], np.asarray(plan.order), np.arange(NUM))
      simulated = simulate(np.asarray(plan.owner), order, np.asarray(tokens.owner))
      require(mapped == simulated, when + "owner is not that of a simulation of the plan,")
      for name in ("position", "protected"):
        brought = np.take_along_axis(np.asarray(getattr(tokens, name)), order, 1)
        require(~alive | (np.asarray(getattr(out, name)) == brought), f"{when}{name} is not the survivor's own,")
    held = np.take_along_axis(alive, np.maximum(mapped, 0), 1)
    require((mapped == -1) | ((mapped >= 0) & (mapped < NUM) & held), when + "owner points at no living token,")
    back, x = np.asarray(restore(out.x, out.owner)), np.asarray(out.x)
    want = np.where(mapped[..., None] >= 0, x[np.arange(BATCH)[:, None], np.maximum(mapped, 0)], 0)
    require((back == want).all(-1), when + "restore does not give a source token its owner's value,")
    tokens = out.replace(mask=out.alive, feats=tokens.feats)


def law_8_finite(module: base.Reducer, case: Case) -> None:
  """With blank tokens (zeros, all alike), through masks that learn and masks that do not."""
  blank = (jnp.arange(NUM) >= 2) & (jnp.arange(NUM) < 9)
  clear = lambda a: jnp.where(blank.reshape((1, NUM) + (1,) * (a.ndim - 2)), 0, a)
  t = case.tokens.replace(x=clear(case.tokens.x), feats=jax.tree.map(clear, case.tokens.feats))
  soft = t.replace(mask=t.mask.astype(jnp.float32))
  learns = isinstance(module, base.Planner) and not case.programs.around
  grads = {
    "mask": case.programs.grads(t, case.keep()),
    "mask, train": case.programs.grads(soft, case.keep(), train=True, survival=learns),
    "gather": case.programs.grads(cut(t, case.alive), case.keep(), "gather"),
  }
  for when, tree in grads.items():
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      name = f"{when}: gradient of {jax.tree_util.keystr(path)} is not finite,"
      finite = np.isfinite(np.asarray(leaf, np.float32))
      require(finite.reshape(*finite.shape[:2], -1).all(-1) if finite.ndim > 2 else finite, name)


def law_8_model(module: base.Reducer, case: ModelCase) -> None:
  place = case.fields.get("place", "attn")
  learned = place in ("before", "attn") and (module is None or _counts(module))
  _, grads = case.gradient("mask", True, learned)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    name, leaf = jax.tree_util.keystr(path), np.asarray(leaf)
    require(np.isfinite(leaf).all(), f"micro ViT, train: gradient of {name} is not finite")
    if "'reduce'" in name:
      require((leaf != 0).any(), f"micro ViT, train: no gradient of the logits reaches {name}")


def law_9_rows(module: base.Reducer, case: Case) -> None:
  """Other rows are filled with NaN: row 0 may not change by a bit."""
  t = case.tokens
  spoil = lambda a: a.at[1:].set(jnp.nan)
  spoilt = t.replace(x=spoil(t.x), size=spoil(t.size), feats=jax.tree.map(spoil, t.feats))
  for mode, train in (("mask", False), ("mask", True), ("gather", False)):
    clean, dirty = (case.programs.run(tokens, case.keep(), mode, train=train) for tokens in (t, spoilt))
    for what in ("tokens", "report", "after"):
      first = lambda r, what=what: jax.tree.map(lambda leaf: leaf[:1] if leaf.ndim else leaf, getattr(r, what))
      same(f"{mode}{', train' if train else ''}, other rows NaN: {what}", first(dirty), first(clean))


def law_10_dtypes(module: base.Reducer, case: Case) -> None:
  out = case.programs.run(case.tokens, case.keep()).tokens
  same("dtype of x", out.x, out.x.astype(jnp.bfloat16))
  same("dtype of size", out.size, out.size.astype(jnp.float32))


def law_10_ranking(module: base.Reducer, case: Case) -> None:
  """The same values in bfloat16 and in float32 lead to the same decisions; tied ones to the lower index."""
  up = lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a
  for seed in range(6):
    t = draw(seed, module.needed(), protected=(0, 1), alive=(NUM,) * BATCH, earlier=False, dtype=jnp.bfloat16)
    t = t.replace(x=1 + t.x / 16, feats={k: 1 + v / 16 if v.ndim > 2 else v for k, v in t.feats.items()})  # near-ties
    low, high = case.programs.run(t, case.keep()), case.programs.run(jax.tree.map(up, t), case.keep())
    same("the same values ranked in bfloat16 and in float32: owner", low.tokens.owner, high.tokens.owner)
  tied = jax.tree.map(lambda a: a.at[:].set(a[:, :1]) if a.dtype != jnp.int32 else a, (t.x, t.feats))
  t = jax.tree.map(up, t.replace(x=tied[0], feats=tied[1]))
  result, plan = case.programs.run(t, case.keep()), case.programs.plan(t, case.keep())
  score = result.report.get("score")
  if module.scored and plan is not None:
    require(score is not None, "no 'score' is reported, by which thresholds decide; report it, or say scored = False")
    require(score.shape == t.mask.shape, f"the 'score' that is reported has shape {score.shape}, not (B, N)")
  if score is None or score.shape != t.mask.shape or plan is None:
    return
  rank = np.where(np.asarray(t.protected), np.inf, np.asarray(score, np.float32))
  order = np.argsort(-rank, axis=1, kind="stable")
  stays = np.asarray(plan.owner) == np.arange(NUM)
  want = np.zeros_like(stays)
  np.put_along_axis(want, order[:, : case.keep()], True, 1)
  require(stays == want, "tied scores: it is not the tokens of lower index that stay,")


def law_11_devices(module: base.Reducer, case: Case) -> None:
  devices = jax.devices()[:BATCH]
  if BATCH % len(devices) or len(devices) == 1:
    logging.warning("law 11 needs 2, 4 or 8 devices and is left out; set XLA_FLAGS as check_reducer says")
    return
  mesh = Mesh(np.array(devices), ("data",))
  place = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
  args = place(case.programs.variables), place(case.tokens, "data"), place(jnp.int32(case.keep())), place(jnp.int32(0))
  for mode, train in (("mask", True), ("gather", False)):
    program = case.programs.program(mode, train, case.keep() if mode == "gather" else None)
    compiled = program.lower(*args).compile()
    found = COLLECTIVE.search(compiled.as_text())
    require(not found, f"{mode}: the compiled reducer holds a collective: {found and found[1]}")
    eight, one = (
      Result(*jax.device_get(compiled(*args))),
      case.programs.run(case.tokens, case.keep(), mode, train=train),
    )
    same(f"{mode}: {len(devices)} devices against one, owner", eight.tokens.owner, one.tokens.owner)
    same(f"{mode}: {len(devices)} devices against one: ", state(eight.tokens), state(one.tokens), 1e-5)


def law_12_export(module: base.Reducer, case: ModelCase) -> None:
  try:
    site = json.loads(json.dumps(case.fields))
  except TypeError as error:
    raise Broken(f"an option cannot be written to a config: {error}") from None
  model = case.model()
  again = case.model(**{k: tuple(v) if isinstance(v, list) else v for k, v in site.items()})
  require(again.sites == model.sites, "the site that was read back from JSON differs from the one written")
  variables, images = init(model, case.images()), case.images()
  run = jax.jit(lambda variables, images: model.apply(variables, images).logits, compiler_options=COMPILER)
  blob = export.export(run)(variables, images).serialize()
  logits = jax.jit(export.deserialize(blob).call, compiler_options=COMPILER)(variables, images)
  same("micro ViT, exported against live logits", logits, case.gradient("gather", False, False)[0]["logits"], 1e-5)


TOKENS = ("free", "prefix", "later", "bfloat16")
EQUAL = "the masked forward pass equals the gathered one"
OWNER = "`owner` equals a brute-force simulation, `restore` follows it, and survivors bring what is theirs"
LOW = "bfloat16 works, ranking is done in float32 by the score that is reported, ties go to the lower index"
LAWS = [  # in this order: who breaks one breaks some behind it, too, and the first is named
  Law(1, "gather: exactly `keep` tokens come out", law_1_gather, TOKENS),
  Law(1, "mask: the shape stays, one compilation for all values of `keep`", law_1_mask, ("prefix", "later")),
  Law(1, "mask: exactly `keep` tokens stay where `keep` is learned", law_1_learned, ("later",)),
  Law(2, EQUAL, law_2_drawn, ("later",)),
  Law(9, "batch rows are independent", law_9_rows, ("ragged",)),
  Law(3, "dead tokens are inert", law_3_tokens, ("later", "ragged", "bfloat16")),
  Law(7, OWNER, law_7_plan, ("prefix", "ragged")),
  Law(10, LOW, law_10_dtypes, ("bfloat16",)),
  Law(2, EQUAL, law_2_tokens, TOKENS),
  Law(2, EQUAL, law_2_sampled, ("later",)),
  Law(6, "keep == all is the identity", law_6_identity, ("prefix", "later", "bfloat16")),
  Law(7, OWNER, law_7_owner, ("prefix", "ragged")),
  Law(4, "merging conserves sum(size) and the size-weighted mean", law_4_conserves, ("prefix", "later", "ragged")),
  Law(5, "protected tokens never leave", law_5_protected, ("prefix", "later", "bfloat16")),
  Law(10, LOW, law_10_ranking, ("bfloat16",)),
  Law(8, "gradients are finite everywhere", law_8_finite, ("later",)),
  Law(2, EQUAL, law_2_model, ("model",)),
  Law(3, "dead tokens are inert", law_3_block, ("model",)),
  Law(8, "gradients reach the reducer's own parameters and its rate", law_8_model, ("model",)),
  Law(11, "eight devices equal one, without a collective inside", law_11_devices, ("prefix",)),
  Law(12, "freeze, export, reload: same logits", law_12_export, ("model",)),
]
