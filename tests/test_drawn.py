"""Configs drawn at random keep the laws: masked is gathered, counts are as promised, rows do not meet, gradients exist.

A config that cannot be is refused with a ValueError that names a field.  `python tests/test_drawn.py 100 200` looks at
these seeds, and goes on behind one that fails.
"""

import dataclasses
import functools
import math
import sys

import drawing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import quick

import tokred
from tokred.drafts import FIELDS, PLACED
from tokred.reducers import REGISTRY
from tokred.tokens import restore

BATCH = 4
MODEL = {  # each field is drawn in one of two configs
  "image_size": ((12, 20), (8, 24), (20, 12), (24, 16)),
  "pool": ("avg", "cls_avg", "map"),
  "class_token": (True,),
  "distilled": (True,),
  "num_registers": (1, 2),
  "position": ("sincos2d", "rope2d"),
  "pre_norm": (True,),
  "final_norm": ("pooled", "none"),
  "mlp": ("gated",),
  "layer_scale": (0.5,),
  "qk_norm": (True,),
  "remat": (True,),
  "attention": ("matmul", "fused"),
  "gate_cap": (30.0,),
}
NONSENSE = (None, "", "x", 0, -1, 2.5, math.nan, math.inf, True, (), (0,), ((1, 2), (3, 4)), ("a", 1), {"a": 1}, 10**20)
ROWS = {"spa"}  # images of a group share room
TIED = {26}  # seeds: of two tokens each is as central as the other to `maxmin`, and rounding takes one
UNEVEN = {"avit", "ats", "spa", "hired", "globalcom2", "prumerge"}  # how many stay is said by the image


def drawn(seed):
  """A model with one to three sites, each the first that is not refused; every refusal must name a field."""
  rng = np.random.default_rng(seed)
  depth = int(rng.integers(2, 5))
  fixed = dict(variant="mu/4", width=16, depth=depth, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=3)

  def bare():
    fields = {field: drawing.pick(rng, values) for field, values in MODEL.items() if rng.random() < 0.3}
    return accepted(dict(model=fixed | fields, sites={}))

  def more(config, name):
    return accepted(config | dict(sites=config["sites"] | {name: drawing.tower_site(rng, depth)}))

  model = drawing.first(bare)
  for name in "abc"[: rng.integers(1, 4)]:
    model = drawing.first(functools.partial(more, model.config.to_dict(), name))
  shapes = jax.eval_shape(lambda: model.module.init(RNGS, images(model, 0), mode="mask"))["params"]
  return dataclasses.replace(model, params=drawing.parameters(shapes))


def accepted(config, traced=True):
  """The model, or None; who is refused is told by the name of a field."""

  def make():
    model = tokred.build(config)
    if config["sites"] and traced:
      jax.eval_shape(lambda: model.module.init(RNGS, images(model, 0), mode="mask"))
    return model

  return drawing.accepted(make, (config["model"], config["sites"]))


RNGS = {"params": jax.random.key(0), "reduce": jax.random.key(1), "dropout": jax.random.key(2)}


def images(model, seed):
  c = model.config.model
  return np.random.default_rng(seed).normal(size=(BATCH, *c.image_size, c.channels)).astype(np.float32)


def check(seed, gradient=True):
  model = drawn(seed)
  with drawing.about((model.config.model.to_dict(), model.config.sites.to_dict())):
    check_passes(tokred.freeze(model))
    if gradient:
      check_gradient(model)


def check_passes(model):
  """Both modes in one compilation, of a batch and of another that shares its first image."""
  run = lambda params, images: [model.module.apply({"params": params}, images, mode=m) for m in ("gather", "mask")]
  first, rng = images(model, 0), np.random.default_rng(3)
  program = jax.jit(run).lower(model.params, first).compile(compiler_options=quick())
  names, seen = {spot.reducer for spot in model.module.spots}, []
  for batch in (first, np.concatenate([first[:1], images(model, 1)[1:]])):
    outputs = program(model.params, batch)
    near = program(model.params, batch * (1 + 1e-6 * rng.normal(size=batch.shape).astype(np.float32)))
    seen.append([np.asarray(output.logits[0]) for output in outputs])
    rows = np.logical_and.reduce([alike(a, b) for a, b in zip(outputs, near, strict=True)])
    rows &= rows.all() | (not names & ROWS)  # those that share room share their ties
    check_modes(model, *outputs, rows, names)
  if rows[0] and not names & ROWS:
    np.testing.assert_allclose(*seen, atol=1e-4, err_msg="other rows")


def alike(one, other):
  """(B,) where all is decided alike; what a millionth of the pixels turns over is a tie, which rounding decides."""
  same = (np.asarray(one.tokens.owner) == np.asarray(other.tokens.owner)).all(1)
  return same & np.isclose(one.logits, other.logits, atol=1e-3, rtol=1e-3).all(1)


def check_modes(model, gathered, masked, rows, names):
  n = gathered.tokens.x.shape[1]
  alive = np.asarray(masked.tokens.alive)[rows]
  if "avit" not in names:  # whose dead stay where they stood
    np.testing.assert_array_equal(gathered.tokens.alive[rows], alive[:, :n], err_msg="alive")
    assert not alive[:, n:].any(), "alive behind what is gathered"
    np.testing.assert_array_equal(masked.tokens.owner[rows], gathered.tokens.owner[rows], err_msg="owner")
  lives = [restore(out.tokens.alive, out.tokens.owner)[rows] for out in (gathered, masked)]
  np.testing.assert_array_equal(*lives, err_msg="who is alive")
  np.testing.assert_allclose(masked.logits[rows], gathered.logits[rows], atol=1e-4, rtol=1e-4, err_msg="logits")
  assert [int(count) for count in gathered.counts] == list(model.counts), "counts"
  if not names & UNEVEN and not any(spot.rate.endswith("threshold") for spot in model.module.spots):
    np.testing.assert_allclose([float(count) for count in masked.counts], model.counts, err_msg="masked counts")


def check_gradient(model):
  def loss(params):
    out = model.module.apply({"params": params}, images(model, 0), train=True, mode="mask", rngs=RNGS)
    own = [leaf.mean() for name, r in out.aux.items() if "/loss" in name for leaf in jax.tree.leaves(r)]
    return (out.logits * jnp.cos(jnp.arange(out.logits.size)).reshape(out.logits.shape)).sum() + sum(own)

  grads = jax.jit(jax.grad(loss), compiler_options=quick())(model.params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(leaf).all(), f"gradient of {jax.tree_util.keystr(path)}"


@pytest.mark.parametrize("seed", range(2))
def test_drawn_configs_keep_the_laws(seed):
  check(seed)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", sorted(set(range(2, 40)) - TIED))
def test_more_drawn_configs_keep_the_laws(seed):
  check(seed)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(20))
def test_nonsense_is_refused_by_its_field(seed):
  """One field of a site after the other; what is taken all the same is nobody's error."""
  rng, model = np.random.default_rng(seed), dict(variant="mu/4", width=16, depth=3, num_heads=2)
  site = drawing.tower_site(rng, 3)
  names = site["reducer"] if isinstance(site["reducer"], tuple) else (site["reducer"],)
  own = {option.name for name in names for option in dataclasses.fields(REGISTRY[name])} - PLACED - {"parent", "name"}
  for field in sorted({*FIELDS, *own}):
    for value in NONSENSE:
      accepted(dict(model=model | dict(image_size=(16, 16)), sites=dict(a=site | {field: value})), traced=False)


if __name__ == "__main__":
  drawing.look(check, sys.argv[1:])
