"""Learned shares in a language model: gradients, the frozen model, prompts of any length, and what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from languages import QUICK, batch, check_cache, learned, tiny

from tokred import rates
from tokred import tokens as tk

SITE = dict(stack="llm", reducer="topk", score="last_attention_ahead", layers=(0, 1), place="before")


def test_a_learned_share():
  """Its counts are those of the frozen share; the loss reaches its logits where a token goes."""
  module, params = learned(dict(a=SITE | dict(rate="learned")), depth=2)
  for layer, tilt in ((0, 0.05), (1, -0.05)):  # about 0.6 and 0.4
    params[f"block_{layer}"]["reduce"]["a"]["rate"]["logits"] = tilt * jnp.arange(32)
  ids, mask, protected = batch()
  inputs = dict(ids=ids, mask=mask, protected=protected)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def slope(params):
    def loss(params):
      out = module.apply({"params": params}, **inputs, train=True, mode="mask")
      return jax.nn.log_softmax(tk.restore(out.logits, out.tokens.owner))[:, -1, 3].sum(), out

    return jax.grad(loss, has_aux=True)(params)

  grads, out = slope(params)
  shares = []
  for layer in (0, 1):
    leaf = np.asarray(grads[f"block_{layer}"]["reduce"]["a"]["rate"]["logits"])
    assert np.isfinite(leaf).all() and (leaf != 0).any()
    shares.append(rates.frozen_share(params[f"block_{layer}"]["reduce"]["a"]["rate"]["logits"]))
  np.testing.assert_allclose([float(v) for v in out.aux["reduce/a/share"].values()], shares, atol=1e-7)
  kept = np.asarray(out.tokens.owner) >= 0
  for row in (0, 1):
    free = int((mask & ~protected)[row].sum())
    assert (kept & ~protected)[row].sum() == np.ceil(min(shares) * free)


@pytest.mark.thorough
def test_laws_of_shares_of_the_input():
  frozen, params = tiny(dict(a=SITE | dict(keep=(0.6, 0.41), of="input")), depth=2)
  _, _, owner = check_cache(frozen, params)
  _, mask, protected = batch()
  np.testing.assert_array_equal(((owner[:, :16] >= 0) & mask & ~protected).sum(1), [3, 4])  # of 7 and of 9


@pytest.mark.parametrize(
  "site, message",
  [
    (dict(SITE, keep=0.5, of="imput"), r"sites.a.of='imput' is not what a share is of; did you mean 'input'"),
    (
      dict(SITE, layers=(1,), keep=0.5, place="around"),
      r"sites.a.reducer='topk' has no rule for the tokens that are written.*; valid: gamma_mod, router$",
    ),
    (
      dict(SITE, reducer="covipal", layers=(1,), score=None, guide=0, keep=0.5),
      r"sites.a.guide=0 is no layer behind it; valid: 1 ",
    ),
    (dict(SITE, reducer="attention_gate", place="ahead", heads=3), r"sites.a.heads is not a field of a site"),
    (
      dict(SITE, reducer="router", place="around", layers=(1,), keep=0.5, frame=4, text=True),
      r"sites.a.text=True: frames are of v",
    ),
  ],
)
def test_sites_that_cannot_be(site, message):
  site = {name: value for name, value in site.items() if name != "score" or site["reducer"] == "topk"}
  with pytest.raises(ValueError, match=message):
    tiny(dict(a=site))
