"""Recorded numbers of Mixture-of-Depths, gamma-MoD and QTSplus."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from languages import QUICK, needs_golden, recorded

from tokred import losses, rates
from tokred import tokens as tk
from tokred.nn.attention import attend
from tokred.nn.rope import Rope, rotate
from tokred.reducers.gamma_mod import GammaMoD
from tokred.reducers.qtsplus import QTSplus
from tokred.reducers.router import Router, agreement

pytestmark = needs_golden


def update(golden, x, position, order, mask):
  """f of the recorded block: attention residual and MLP residual, among those that went in."""
  norm = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
  h = jnp.zeros_like(x)
  if str(golden["block"]) == "attn":
    split = lambda w: (norm(x) @ w).reshape(*x.shape[:2], 4, -1).swapaxes(1, 2)
    q, k, v = (split(golden[name]) for name in ("W_wq", "W_wk", "W_wv"))
    angle = Rope(1e4).angles(position, q.shape[-1])
    heads = attend(rotate(q, angle), rotate(k, angle), v, mask=mask.astype(jnp.float32), causal=order)
    h = heads.swapaxes(1, 2).reshape(x.shape) @ golden["W_wo"]
  m = jax.nn.gelu(norm(x + h) @ golden["W_w1"] + golden["W_b1"], approximate=False)
  return h + m @ golden["W_w2"] + golden["W_b2"]


@pytest.mark.parametrize("name", ["mod_mlp_raw", "mod_attn_sigmoid"])
def test_mixture_of_depths(name):
  g = recorded(f"fn/{name}")
  router = Router(gate=str(g["gate"]))
  params = {"params": {"kernel": jnp.asarray(g["w_router"])}}
  tokens = tk.start(jnp.asarray(g["x"]))
  for keep, wanted in ((int(g["k"]), "y"), (rates.Threshold(0.0, g["x"].shape[1]), "y_causal")):

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(tokens, keep=keep):
      inner, report = router.apply(params, tokens, keep, train=False, mode="mask")
      f = update(g, inner.x, inner.position, inner.position, inner.mask)
      return tk.bypass(tokens, inner.replace(x=inner.x + f), report["update_weight"]).x, report

    y, report = run(tokens)
    np.testing.assert_allclose(y, g[wanted], atol=2e-5)
    chosen = np.asarray(report["chosen"])
    if wanted == "y":
      np.testing.assert_array_equal([np.flatnonzero(row) for row in chosen], g["topk_sorted"])
      np.testing.assert_allclose(report["score"], g["router_logits"], atol=1e-5)
      aux = losses.router([report["score"]], [report["chosen"]], [report["free"]])
      np.testing.assert_allclose(aux, g["aux_bce_on_router"], atol=1e-6)
      predicted = jnp.asarray(g["x"] @ g["w_predictor"])
      loss, right = agreement(predicted, report["chosen"], report["free"])
      np.testing.assert_allclose(predicted, g["predictor_logits"], atol=1e-5)
      np.testing.assert_allclose(loss.mean(), g["predictor_bce"], atol=1e-6)
      np.testing.assert_allclose(right.mean(), g["predictor_acc"], atol=1e-6)
    else:
      np.testing.assert_array_equal(chosen, g["causal_mask"])


def test_masked_routing():
  g = recorded("fn/gamma_mod_masked_routing")
  prompt, keep = int(g["prompt_len"]), int(np.ceil(float(g["keep"]) * g["prompt_len"]))
  tokens = tk.start(jnp.asarray(g["x"]))
  feats = {"route_ahead": jnp.asarray(g["x"] @ g["w_router"])}
  feats["state/appended"] = jnp.asarray(np.arange(30) >= prompt)[None].repeat(2, 0)
  reducer = GammaMoD(weight=1.0)
  rows = rates.Rows(jnp.full(2, keep), 30)
  call = functools.partial(reducer.apply, {}, train=True, mode="mask")
  inner, report = jax.jit(call, compiler_options=QUICK)(tokens.replace(feats=feats), rows)
  np.testing.assert_allclose(report["score"], g["prob"], atol=1e-6)
  routed = np.asarray(inner.owner) >= 0
  assert routed.sum(1).tolist() == [int(g["k"])] * 2
  np.testing.assert_array_equal([np.flatnonzero(row) for row in routed], g["routed_sorted"])
  gate = np.take_along_axis(np.asarray(report["mlp_weight"]), g["routed_sorted"], 1)
  np.testing.assert_allclose(gate, g["gate"], atol=1e-6)
  np.testing.assert_allclose(report["loss_router"].mean(), g["aux_ce"], atol=1e-6)


def qtsplus(g):
  """Parameters under our names: a torch kernel is (out, in)."""
  heads, kv = int(g["n_heads"]), int(g["n_kv_heads"])

  def attention(at, values):
    out = {name: {"scale": g[f"P_{at}.{name}.weight"]} for name in ("q_norm", "kv_norm")}
    for name, n in (("q", heads), ("k", kv), ("v", kv))[: 2 + values]:
      w, b = g[f"P_{at}.{name}_proj.weight"], g[f"P_{at}.{name}_proj.bias"]
      out[name] = {"kernel": w.T.reshape(w.shape[1], n, -1), "bias": b.reshape(n, -1)}
    return out

  dense = lambda at: {"kernel": g[f"P_{at}.weight"].T, "bias": g[f"P_{at}.bias"]}
  core = "reencode_layers.0.core"
  again = {"heads": attention(core, True), "ffn_norm": {"scale": g[f"P_{core}.ffn_norm.weight"]}}
  again |= {"fc1": dense(f"{core}.ffn.net.0"), "fc2": dense(f"{core}.ffn.net.2")}
  again["o"] = {"kernel": g[f"P_{core}.o_proj.weight"].T.reshape(heads, -1, 32)}
  need = {"fc1": dense("budget.mlp.0"), "fc2": dense("budget.mlp.2")}
  return {"heads": attention("scoring_layers.0", False), "need": need, "again": again}


def test_qtsplus():
  """The recorded text of a row stands behind its visual tokens; row 0 is padded as the release does it."""
  g = recorded("fn/qtsplus")
  x = jnp.concatenate([g["Xv"], g["Qt"]], 1)
  tokens = tk.start(x).replace(protected=jnp.broadcast_to(jnp.arange(45) >= 40, (2, 45)))
  sizes = dict(num_heads=4, num_kv_heads=2, low=float(g["rho_min"]), high=float(g["rho_max"]))
  for released in (True, False):
    reducer, rows = QTSplus(**sizes, repeat_last=released), rates.Rows(jnp.full(2, 45), 25)
    call = functools.partial(reducer.apply, {"params": qtsplus(g)}, train=False, mode="gather")
    out, report = jax.jit(call, compiler_options=QUICK)(tokens, rows)
    np.testing.assert_allclose(report["score"][:, :40], g["r"], atol=1e-6)
    np.testing.assert_allclose(report["share"], g["rho"], atol=1e-6)
    for row in (0, 1):
      kept = np.flatnonzero(np.asarray(out.owner)[row, :40] >= 0)
      np.testing.assert_array_equal(kept, g[f"kept{row}"])
      assert len(kept) == g["n"][row]
      same = np.abs(np.asarray(out.x)[row, np.asarray(out.owner)[row, kept]] - g[f"Z{row}"]).max()
      assert (same < 1e-4) == (released or row == 1)
  visual = jnp.arange(45) < 40
  args = (report["score"], jnp.broadcast_to(visual, (2, 45)), report["share"] * 40, float(g["tau_s"]))
  for newton, name in ((0, "bisect60"), (10, "newton10")):
    solve = jax.jit(functools.partial(rates.soft_threshold, newton=newton), compiler_options=QUICK)
    np.testing.assert_allclose(solve(*args), g[f"threshold_{name}"], atol=1e-5)


def test_the_soft_threshold_has_the_gradient_of_its_solution():
  rng = np.random.default_rng(0)
  score, free = jnp.asarray(rng.normal(size=(1, 9)), jnp.float32), jnp.arange(9)[None] < 8
  solve = jax.jit(lambda s, c: rates.soft_threshold(s, free, c, 0.5)[0])
  slope, of_count = jax.jit(jax.grad(solve, argnums=(0, 1)))(score, jnp.array([3.0]))
  for i in (0, 3):
    step = 1e-2 * (jnp.arange(9)[None] == i)
    numeric = (solve(score + step, jnp.array([3.0])) - solve(score - step, jnp.array([3.0]))) / 2e-2
    np.testing.assert_allclose(slope[0, i], numeric, atol=2e-3)
  numeric = (solve(score, jnp.array([3.01])) - solve(score, jnp.array([2.99]))) / 2e-2
  np.testing.assert_allclose(of_count[0], numeric, rtol=1e-2)
  assert slope[0, 8] == 0
