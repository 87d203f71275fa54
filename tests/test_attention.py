"""Both implementations against the formula of the module's docstring in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred.nn import attention

B, H, N, DIM = 2, 2, 7, 8
ALIVE = np.arange(N) < np.array([[5], [4]])  # a prefix, as masks are


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=(B, H, N, DIM)) for _ in range(3))
  return q, k, v, rng.uniform(0.5, 4.0, (B, N))


def reference(q, k, v, size=None, mask=None, gate=None):
  """out_i = (sum_j e_ij w_j v_j + e_ii (1 - w_i) v_i) / (the same without v), by loops."""
  out = np.zeros_like(v)
  size = np.ones((B, N)) if size is None else size
  weight = np.ones((B, N)) if mask is None else mask.astype(float)
  for b in range(B):
    for h in range(H):
      for i in range(N):
        top, bottom = 0.0, 0.0
        for j in range(N):
          w = weight[b, j] if gate is None else (1.0 if i == j else gate[b, j])
          e = np.exp(q[b, h, i] @ k[b, h, j] / np.sqrt(DIM)) * size[b, j] * w
          top, bottom = top + e * v[b, h, j], bottom + e
        out[b, h, i] = top / bottom
  return out


def f32(a):
  return jnp.asarray(a, jnp.float32)


@pytest.mark.parametrize("impl", ["matmul", "fused"])
@pytest.mark.parametrize("kind", ["none", "mask", "gate"])
@pytest.mark.parametrize("sized", [False, True])
def test_equals_the_formula(impl, kind, sized):
  q, k, v, size = inputs()
  mask = {"none": None, "mask": jnp.asarray(ALIVE), "gate": f32(ALIVE)}[kind]
  got = attention.attend(f32(q), f32(k), f32(v), size=f32(size) if sized else None, mask=mask, impl=impl)
  want = reference(
    q, k, v, size if sized else None, ALIVE if kind == "mask" else None, ALIVE * 1.0 if kind == "gate" else None
  )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "mask", "gate"])
@pytest.mark.parametrize("sized", [False, True])
def test_gradients_of_both_agree_with_differences_of_the_formula(kind, sized):
  q, k, v, size = inputs(1)
  rng = np.random.default_rng(2)
  seen = ALIVE[:, None, :, None] if kind == "mask" else np.ones((B, 1, N, 1))  # outputs of the dead are nobody's
  cotangent = rng.normal(size=v.shape) * seen
  gate = ALIVE * 1.0

  def loss(impl, args):
    mask = {"none": None, "mask": jnp.asarray(ALIVE), "gate": args.get("gate")}[kind]
    out = attention.attend(args["q"], args["k"], args["v"], size=args.get("size"), mask=mask, impl=impl)
    return jnp.sum(out * f32(cotangent))

  args = {"q": q, "k": k, "v": v} | ({"size": size} if sized else {}) | ({"gate": gate} if kind == "gate" else {})
  traced = {name: f32(value) for name, value in args.items()}
  matmul, fused = (jax.grad(lambda a, impl=impl: loss(impl, a))(traced) for impl in ("matmul", "fused"))
  for name, value in matmul.items():
    np.testing.assert_allclose(value, fused[name], rtol=1e-4, atol=2e-5, err_msg=name)
  if kind == "gate":  # also where the gate is zero: a log(gate) bias would give nothing there
    assert np.abs(matmul["gate"][~ALIVE]).min() > 1e-5

  def exact(args):
    mask = ALIVE if kind == "mask" else None
    return np.sum(reference(args["q"], args["k"], args["v"], args.get("size"), mask, args.get("gate")) * cotangent)

  for name, value in args.items():  # central differences along one random direction an argument
    step = rng.normal(size=value.shape) * 1e-5
    slope = (exact(args | {name: value + step}) - exact(args | {name: value - step})) / 2
    np.testing.assert_allclose(np.sum(np.asarray(matmul[name], float) * step), slope, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("impl", ["matmul", "fused"])
@pytest.mark.parametrize("loud", [20.0, 50.0, 120.0])
def test_a_dead_key_that_drowns_the_living_spoils_nothing(impl, loud):
  """Its logits stand so far above all others that float32 has no room for both: exact outputs, finite gradients."""
  q, k, v, _ = inputs(7)
  q[..., 0], k[:, :, -1] = np.sqrt(DIM), 0.0
  k[:, :, -1, 0] = loud
  gate = f32(ALIVE)
  run = lambda q, k, v, gate: attention.attend(q, k, v, mask=gate, impl=impl)
  out, back = jax.vjp(run, f32(q), f32(k), f32(v), gate)
  living = np.broadcast_to(ALIVE[:, None], (B, H, N))
  if impl == "matmul" or loud < 88:  # beyond, the fused kernel has nothing left of the living
    np.testing.assert_allclose(
      np.asarray(out)[living], reference(q, k, v, gate=ALIVE * 1.0)[living], rtol=2e-4, atol=1e-5
    )
  for gradient in (out, *back(jnp.ones_like(out))):
    assert np.isfinite(gradient).all() and np.abs(gradient).max() < 1e9


@pytest.mark.parametrize("impl", ["matmul", "fused"])
def test_a_cap_bounds_what_a_query_learns(impl):
  """One living key of logit 0, the query itself, and a dead one of ln 9: its share is 1/10, so a cap of 2 leaves a
  fifth of the gradient, (v_dead - v_own) e_dead / e_own = 9 (5 - 1) = 36, and a cap of 20 all."""
  q, k, v = (
    jnp.zeros((1, 1, 2, 1)).at[0, 0, :, 0].set(jnp.asarray(a)) for a in ([1.0, 0.0], [0.0, np.log(9.0)], [1.0, 5.0])
  )

  def out(gate, cap):
    return attention.attend(q, k, v, mask=gate, impl=impl, gate_cap=cap)[0, 0, 0, 0]

  gate = jnp.asarray([[1.0, 0.0]])
  for cap, slope in ((1e6, 36.0), (20.0, 36.0), (2.0, 7.2)):
    value, gradient = jax.value_and_grad(out)(gate, cap)
    np.testing.assert_allclose([value, gradient[0, 1]], [1.0, slope], rtol=1e-5)


def test_an_epsilon_in_the_row_of_cls():
  """Weights of .001 and 0 of the loudest, which is dead: (.001 + eps / 2) / (.001 + eps), (eps / 2) / (.001 + eps)."""
  q, k = jnp.ones((1, 1, 2, 1)), jnp.log(jnp.asarray([1.0, 1000.0])).reshape(1, 1, 2, 1)
  mask = jnp.asarray([[1.0, 0.0]])
  np.testing.assert_allclose(attention.cls_attention(q, k, mask=mask, gate_eps=1e-3), [[0.75, 0.25]], rtol=1e-5)
  np.testing.assert_allclose(attention.cls_attention(q, k, mask=mask), [[1.0, 0.0]])


@pytest.mark.parametrize("impl", ["matmul", "fused"])
def test_an_epsilon_lets_all_values_in(impl):
  """The living key has 1/9 of the dead one's weight: (1/9 + eps (1 + 5) / 2) / (1/9 + eps), at 0.001 1.027 / 1.009."""
  q, k, v = (
    jnp.zeros((1, 1, 2, 1)).at[0, 0, :, 0].set(jnp.asarray(a)) for a in ([1.0, 0.0], [0.0, np.log(9.0)], [1.0, 5.0])
  )
  out = attention.attend(q, k, v, mask=jnp.asarray([[1.0, 0.0]]), impl=impl, gate_eps=1e-3)
  np.testing.assert_allclose(out[0, 0, 0, 0], 1.027 / 1.009, rtol=1e-6)
  with pytest.raises(ValueError, match=r"config.model.gate_eps=0.1; valid: 0 \(none\) to 0.001"):
    attention.check("auto", 1.0, 0.1)


@pytest.mark.parametrize("impl", ["matmul", "fused"])
def test_garbage_in_dead_keys_reaches_no_living_query(impl):
  q, k, v, size = (f32(a) for a in inputs(3))
  dead = ~jnp.asarray(ALIVE)[:, None, :, None]
  clean = attention.attend(q, k, v, size=size, mask=jnp.asarray(ALIVE), impl=impl)
  k, v, q = (jnp.where(dead, jnp.nan, a) for a in (k, v, q))
  spoilt = attention.attend(q, k, v, size=size, mask=jnp.asarray(ALIVE), impl=impl)
  alive = np.broadcast_to(ALIVE[:, None], (B, H, N))
  np.testing.assert_array_equal(np.asarray(spoilt)[alive], np.asarray(clean)[alive])


@pytest.mark.parametrize("impl", ["matmul", "fused"])
def test_bfloat16_keeps_a_float32_softmax(impl):
  q, k, v, size = inputs(4)
  low = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
  got = attention.attend(*low, size=f32(size), impl=impl)
  assert got.dtype == jnp.bfloat16
  want = reference(*(np.asarray(a.astype(jnp.float32), float) for a in low), size)
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.04)


@pytest.mark.parametrize("impl", ["matmul", "fused"])
def test_logits_of_bfloat16_are_float32(impl):
  """16.0625 and 16 are one number in bfloat16, whose steps are 1/8 there: e^.0625 / (1 + e^.0625) = .51562."""
  low = lambda a: jnp.asarray(a, jnp.bfloat16)[None, None]
  q, k, v = low([[2, 2, 0, 0]] * 2), low([[16, 0.0625, 0, 0], [16, 0, 0, 0]]), low([[1, 0, 0, 0], [0, 0, 0, 0]])
  out = attention.attend(q, k, v, impl=impl)[0, 0, 0, 0].astype(jnp.float32)
  np.testing.assert_allclose(out, 0.51562, atol=2e-3)
  np.testing.assert_allclose(attention.cls_attention(q, k)[0], [0.51562, 0.48438], atol=1e-5)


def test_a_vote_for_oneself_has_no_gate():
  """Two tokens that look alike: A_01 = g_1 / (1 + g_1), A_00 = 1 / (1 + g_1).  What reaches 0 from itself is
  g_0 / (1 + g_1), for only who lives votes: slopes 1/2 and -1/4 where both live."""
  q = jnp.zeros((1, 1, 2, 4))
  reaches = lambda gate: attention.vote(q, q, mask=gate)(jnp.asarray([[[1.0, 0.0]]]))[0, 0, 0]
  np.testing.assert_allclose(jax.grad(reaches)(jnp.ones((1, 2))), [[0.5, -0.25]], rtol=1e-6)


@pytest.mark.parametrize("impl", ["matmul", "fused"])
def test_a_head_of_keys_serves_queries_in_a_row(impl):
  """Of four heads of queries the first two ask the first head of keys; gated or not."""
  q, k, v, _ = (f32(a) for a in inputs(6))
  four = jnp.concatenate([q, 2 * q], axis=1)
  for mask in (None, f32(ALIVE)):
    grouped = attention.attend(four, k, v, mask=mask, impl=impl)
    each = [attention.attend(four[:, i : i + 1], *(a[:, i // 2 :][:, :1] for a in (k, v)), mask=mask) for i in range(4)]
    np.testing.assert_allclose(grouped, jnp.concatenate(each, axis=1), atol=1e-5)


@pytest.mark.parametrize("impl", ["matmul", "fused"])
def test_what_is_shared_is_seen_and_does_not_look(impl):
  """Values 0, 3 and 9 of two segments and of what both see, all alike: means of 0 and 9, of 3 and 9, and 9 alone."""
  q, v = jnp.zeros((1, 1, 3, 4)), jnp.zeros((1, 1, 3, 4)).at[0, 0, :, 0].set(jnp.asarray([0.0, 3.0, 9.0]))
  out = attention.attend(q, q, v, segment=jnp.asarray([[0, 1, attention.SHARED]]), impl=impl)
  np.testing.assert_allclose(out[0, 0, :, 0], [4.5, 6, 9], rtol=1e-6)


def test_the_row_of_the_last_that_lives():
  """Of three tokens two live; the second has logits 0 and log 3: 1/4 and 3/4, and nothing behind it."""
  q = jnp.zeros((1, 1, 3, 1)).at[0, 0, :, 0].set(jnp.asarray([5.0, 1.0, 7.0]))
  k = jnp.zeros((1, 1, 3, 1)).at[0, 0, :, 0].set(jnp.asarray([0.0, np.log(3), 9.0]))
  got = attention.last_attention(q, k, mask=jnp.asarray([[True, True, False]]))
  np.testing.assert_allclose(got, [[0.25, 0.75, 0]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["none", "mask", "gate"])
def test_cls_attention_is_a_row_of_the_map(kind):
  q, k, _, size = inputs(5)
  logits = np.einsum("bhd,bhjd->bhj", q[:, :, 0], k) / np.sqrt(DIM)
  weight = np.exp(logits) * size[:, None] * (1.0 if kind == "none" else ALIVE[:, None])
  want = (weight / weight.sum(-1, keepdims=True)).mean(1)
  mask = {"none": None, "mask": jnp.asarray(ALIVE), "gate": f32(ALIVE)}[kind]
  got = attention.cls_attention(f32(q), f32(k), size=f32(size), mask=mask)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(got.sum(1), 1.0, rtol=1e-6)


def test_unknown_implementation():
  with pytest.raises(ValueError, match=r"config.model.attention='flash' is not an implementation; .*valid: auto"):
    attention.implementation("flash")
