"""fold, compact, restore and bypass against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred import tokens as tk
from tokred.tokens import Plan

B, N, D = 2, 9, 4


def random_case(seed, kept=5, dropped=2, dead=0):
  """Tokens with sizes, features and a source map, and a plan: `kept` owners, some members, some dropped."""
  rng = np.random.default_rng(seed)
  alive = N - dead
  owner = np.full((B, N), -1)
  order = np.zeros((B, N), int)
  for b in range(B):
    order[b] = np.concatenate([rng.permutation(alive), np.arange(alive, N)])
    chiefs, rest = order[b, :kept], order[b, kept:alive]
    owner[b, chiefs] = chiefs
    for i in rest[dropped:]:
      owner[b, i] = rng.choice(chiefs)
  gate = (owner == np.arange(N)) | (np.arange(N) >= alive)
  weight = rng.uniform(0.1, 1.0, (B, N))
  f32, i32 = lambda a: jnp.asarray(a, jnp.float32), lambda a: jnp.asarray(a, jnp.int32)
  tokens = tk.start(f32(rng.normal(size=(B, N, D))), 1).replace(
    mask=jnp.broadcast_to(jnp.arange(N) < alive, (B, N)),
    size=f32(rng.integers(1, 4, (B, N))),
    position=i32(rng.integers(0, 50, (B, N, 2))),
    owner=i32(rng.integers(-1, alive, (B, 12))),
    feats={"key": f32(rng.normal(size=(B, N, 2, 3))), "cls_attention": f32(rng.uniform(size=(B, N)))},
  )
  return tokens, Plan(i32(owner), i32(order), jnp.asarray(gate), f32(weight))


def brute_force(tokens, plan):
  """Survivors as lists of rows: x, size and the source map."""
  x, size, owner = np.asarray(tokens.x, np.float64), np.asarray(tokens.size), np.asarray(plan.owner)
  rows = []
  for b in range(B):
    chiefs = [int(j) for j in plan.order[b] if owner[b, j] == j]
    members = {j: [i for i in range(N) if owner[b, i] == j] for j in chiefs}
    weight = np.ones(N) if plan.weight is None else np.asarray(plan.weight[b], np.float64)
    value = [sum(weight[i] * x[b, i] for i in members[j]) for j in chiefs]
    total = [sum(size[b, i] for i in members[j]) for j in chiefs]
    home = {i: chiefs.index(j) for j in chiefs for i in members[j]}
    sources = [home.get(int(t), -1) if t >= 0 else -1 for t in tokens.owner[b]]
    rows.append((chiefs, np.array(value), np.array(total), sources))
  return rows


@pytest.mark.parametrize("form", ["gather", "one_hot"])
@pytest.mark.parametrize("dead", [0, 2])
@pytest.mark.parametrize("merge", [True, False])
def test_fold_and_compact_equal_brute_force(form, dead, merge):
  for seed in range(3):
    tokens, plan = random_case(seed, dropped=1, dead=dead)
    if not merge:
      plan = plan.replace(weight=None, owner=jnp.where(plan.gate & tokens.mask, plan.owner, -1))
    folded, short = tk.fold(tokens, plan, form=form), tk.compact(tokens, plan, 5, form=form)
    for b, (chiefs, value, size, sources) in enumerate(brute_force(tokens, plan)):
      for out in (folded, short):
        np.testing.assert_allclose(out.x[b, :5], value, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(out.size[b, :5], size)
        np.testing.assert_array_equal(out.owner[b], sources)
        np.testing.assert_array_equal(out.position[b, :5], tokens.position[b, np.array(chiefs)])
        np.testing.assert_array_equal(out.protected[b, :5], tokens.protected[b, np.array(chiefs)])
        np.testing.assert_array_equal(out.feats["key"][b, :5], tokens.feats["key"][b, np.array(chiefs)])
      np.testing.assert_array_equal(folded.mask[b], np.arange(N) < 5)
      assert bool(short.mask[b].all()) and short.x.shape == (B, 5, D)


def test_forms_give_the_same_bits():
  tokens, plan = random_case(3)
  for dtype in (jnp.float32, jnp.bfloat16):
    tokens = tokens.replace(x=tokens.x.astype(dtype))
    for function in (tk.fold, lambda *args, form: tk.compact(*args, 5, form=form)):
      a, b = (function(tokens, plan, form=form) for form in ("gather", "one_hot"))
      jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("function", [tk.fold, lambda tokens, plan, form: tk.compact(tokens, plan, 1, form=form)])
@pytest.mark.parametrize("form", [None, "one_hot"])
def test_a_mean_of_many_in_bfloat16(function, form):
  """The mean of 512 ones is 1; a sum in bfloat16 stops at 256, where one more is lost to rounding."""
  n = 512
  tokens = tk.start(jnp.ones((1, n, 2), jnp.bfloat16))
  first = jnp.zeros((1, n), jnp.int32)
  weight = tk.average_weight(first, tokens.size)
  plan = tk.Plan(owner=first, order=jnp.arange(n)[None], gate=jnp.arange(n)[None] == 0, weight=weight)
  out = function(tokens, plan, form=form)
  assert out.x.dtype == jnp.bfloat16 and out.size[0, 0] == n
  np.testing.assert_allclose(out.x[:, 0].astype(jnp.float32), 1.0)


def test_take_keeps_dtype_and_integers():
  index = jnp.array([[2, 0]])
  for values in (jnp.array([[1 << 20, 5, 7]], jnp.int32), jnp.array([[True, False, False]])):
    out = tk.take(values, index, "one_hot")
    assert out.dtype == values.dtype
    np.testing.assert_array_equal(out, values[:, jnp.array([2, 0])])


def test_restore_gives_every_source_its_owners_value():
  values = jnp.array([[10.0, 20.0, 30.0]])
  np.testing.assert_array_equal(tk.restore(values, jnp.array([[2, -1, 0, 2]]), fill=-5), [[30, -5, 10, 30]])
  tokens, plan = random_case(4)
  out = tk.fold(tokens.replace(owner=tk.start(tokens.x).owner), plan)
  back = np.asarray(tk.restore(out.x, out.owner))
  for b, (chiefs, value, _, _) in enumerate(brute_force(tokens, plan)):
    for i in range(N):
      j = int(plan.owner[b, i])
      np.testing.assert_allclose(back[b, i], value[chiefs.index(j)] if j >= 0 else 0.0, rtol=1e-6, atol=1e-6)


def test_bypass_brings_updates_to_members_and_leaves_the_rest():
  tokens, plan = random_case(5)
  tokens = tokens.replace(owner=tk.start(tokens.x).owner)
  inner = tk.compact(tokens, plan, 5)
  inner = inner.replace(x=inner.x + 1)
  weight = jnp.linspace(0.0, 2.0, N)[None].repeat(B, 0)
  out = tk.bypass(tokens, inner, weight)
  for b in range(B):
    for i in range(N):
      j = int(inner.owner[b, i])
      new = tokens.x[b, i] + weight[b, i] * (inner.x[b, j] - tokens.x[b, i]) if j >= 0 else tokens.x[b, i]
      np.testing.assert_allclose(out.x[b, i], new, rtol=1e-6, atol=1e-6)
  folded = tk.fold(tokens, plan)
  again = tk.bypass(tokens, folded.replace(x=folded.x + 1), weight)
  np.testing.assert_allclose(again.x, out.x, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(out.mask, tokens.mask)


def test_survivors_are_a_prefix_over_chained_reductions():
  tokens, plan = random_case(6, kept=7, dropped=0)
  once = tk.fold(tokens, plan)
  _, second = random_case(7, kept=4, dropped=1, dead=2)
  twice = tk.fold(once, second)
  np.testing.assert_array_equal(once.mask, np.arange(N)[None].repeat(B, 0) < 7)
  np.testing.assert_array_equal(twice.mask, np.arange(N)[None].repeat(B, 0) < 4)
  short = tk.compact(tk.compact(tokens, plan, 7), jax.tree.map(lambda a: a[:, :7], second), 4)
  np.testing.assert_allclose(twice.x[:, :4], short.x, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(twice.owner, short.owner)


def test_garbage_in_dead_tokens_reaches_nobody():
  tokens, plan = random_case(8, dropped=1, dead=2)
  dead = ~tokens.mask
  bad = lambda a: jnp.where(dead.reshape((B, N) + (1,) * (a.ndim - 2)), jnp.nan, a)
  spoilt = tokens.replace(x=bad(tokens.x), size=bad(tokens.size), feats=jax.tree.map(bad, tokens.feats))
  weight = bad(plan.weight)
  for function in (tk.fold, lambda *args: tk.compact(*args, 5)):
    out, clean = function(spoilt, plan.replace(weight=weight)), function(tokens, plan)
    np.testing.assert_array_equal(out.x[:, :5], clean.x[:, :5])
    np.testing.assert_array_equal(out.size[:, :5], clean.size[:, :5])


def test_gate_and_survival_pass_gradients_through_a_hard_mask():
  tokens, plan = random_case(9)

  def total(gate, survival):
    gate = tk.straight_through(plan.gate, gate)
    out = tk.fold(tokens, plan.replace(gate=gate), survival=survival)
    return jnp.sum(out.mask * (1.0 + jnp.arange(N))), out.mask

  (d_gate, d_survival), mask = jax.grad(total, argnums=(0, 1), has_aux=True)(jnp.zeros((B, N)), jnp.zeros(N))
  np.testing.assert_array_equal(mask, np.arange(N)[None].repeat(B, 0) < 5)
  np.testing.assert_allclose(d_survival, B * (1.0 + np.arange(N)))  # rank j stands at place j in each row
  for b in range(B):  # token i stands at its rank
    np.testing.assert_allclose(np.asarray(d_gate)[b, np.asarray(plan.order)[b]], 1.0 + np.arange(N))


def test_average_weight_is_the_share_within_a_group():
  owner, size = jnp.array([[0, 0, 2, -1]]), jnp.array([[1.0, 3.0, 5.0, 7.0]])
  np.testing.assert_allclose(tk.average_weight(owner, size), [[0.25, 0.75, 1.0, 0.0]])


@pytest.mark.parametrize("shape, prefix", [((4, 3), 1), ((2, 4, 4, 3), 0), ((2, 4, 3), 5), ((2, 4, 3), -1)])
def test_what_is_no_sequence_of_tokens(shape, prefix):
  with pytest.raises(ValueError, match=rf"x of shape .* and num_prefix_tokens={prefix}; valid: \(batch, tokens, width"):
    tk.start(jnp.ones(shape), prefix)


def test_start_protects_the_prefix():
  tokens = tk.start(jnp.zeros((2, 5, 3)), 2)
  np.testing.assert_array_equal(tokens.protected[0], [True, True, False, False, False])
  np.testing.assert_array_equal(tokens.owner[1], np.arange(5))
  assert tokens.mask.dtype == bool and tokens.size.dtype == jnp.float32


def test_ranks_of_long_rows():
  """A row of 256 is sorted, and a shorter one compared pair by pair; ties go to the lower index in both."""
  key = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, tk.SORTED)), jnp.float32)
  want = np.argsort(np.argsort(key, axis=1, kind="stable"), axis=1)
  np.testing.assert_array_equal(tk.rank(key), want)
  np.testing.assert_array_equal(tk.rank(key[:, :99]), np.argsort(np.argsort(key[:, :99], 1, kind="stable"), 1))
  np.testing.assert_array_equal(tk.best(jnp.asarray([[1.0, 3.0, 3.0], [2.0, 1.0, 2.0]]))[1], [1, 0])


def test_sums_over_groups_where_nothing_is_scattered(monkeypatch):
  owner, values = jnp.asarray([[1, 1, -1, 3]]), jnp.asarray([[1.0, 2.0, jnp.nan, 4.0]])
  for scatters in (True, False):
    monkeypatch.setattr(tk, "scatters", lambda scatters=scatters: scatters)
    np.testing.assert_array_equal(tk.group_sum(owner, values), [[0, 3, 0, 4]])


def test_a_rate_learns_from_rows_that_lose_tokens():
  """Row 0 keeps all and row 1 two of three: only the second tells the chances what they are worth, by its order."""
  tokens = tk.start(jnp.zeros((2, 3, 1)))
  owner = jnp.asarray([[0, 1, 2], [0, -1, 2]])
  plan = Plan(owner, jnp.asarray([[0, 1, 2], [2, 0, 1]]), owner >= 0)
  worth = jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
  total = lambda survival: (tk.fold(tokens, plan, survival=survival).mask * worth).sum()
  np.testing.assert_allclose(jax.grad(total)(jnp.zeros(3)), [4, 5, 6])
  # A row of chances for each image: they stand by rank, not by token.
  np.testing.assert_allclose(jax.grad(total)(jnp.zeros((2, 3))), [[0, 0, 0], [4, 5, 6]])


def test_slots_that_nobody_fills_are_dead():
  """Of four tokens two are alive and one of them stays: of three slots the first is alive."""
  tokens = tk.start(jnp.ones((1, 4, 2))).replace(mask=jnp.asarray([[True, True, False, False]]))
  plan = Plan(jnp.asarray([[0, -1, -1, -1]]), jnp.arange(4)[None], jnp.asarray([[True, False, True, True]]))
  assert tk.compact(tokens, plan, 3).mask.tolist() == [[True, False, False]]


def test_gradients_of_fold_and_compact_are_alike():
  tokens, plan = random_case(10, dropped=0)
  worth = jnp.asarray(np.random.default_rng(0).normal(size=(B, 5, D)), jnp.float32)
  merge = {
    "fold": lambda x: tk.fold(tokens.replace(x=x), plan),
    "compact": lambda x: tk.compact(tokens.replace(x=x), plan, 5),
  }
  slopes = [jax.jit(jax.grad(lambda x, m=m: (m(x).x[:, :5] * worth).sum()))(tokens.x) for m in merge.values()]
  np.testing.assert_allclose(*slopes, rtol=1e-5, atol=1e-6)


def test_a_gate_and_a_weight_of_an_update_are_multiplied():
  """x + 2 g (x' - x) of an update of 3: a token that goes in by 6; what stays out has the slope that it would go by."""
  outer = tk.start(jnp.zeros((1, 2, 1)))

  def out(gate):
    return tk.bypass(outer, outer.replace(x=outer.x + 3, mask=gate), jnp.full((1, 2), 2.0)).x[0, :, 0]

  gate = jnp.asarray([[1.0, 0.0]])
  np.testing.assert_allclose(out(gate), [6, 0])
  np.testing.assert_allclose(jax.jacobian(out)(gate)[:, 0], 6 * np.eye(2))


def test_tokens_at_first():
  """Three that may go; two where a feature says so, which what joined later (0) does not change."""
  tokens = tk.start(jnp.zeros((1, 4, 1)), 1)
  assert tk.at_first(tokens).tolist() == [3]
  assert tk.at_first(tokens.replace(feats={tk.SOURCE: jnp.asarray([[2, 2, 2, 0]])})).tolist() == [2]
