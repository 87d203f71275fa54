"""How golden data of the ViT side is read and run (shared/golden/vit, its README says what it is)."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.interpreters import partial_eval

from tokred import config as defaults
from tokred import pretrained
from tokred.nn import vit

GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden" / "vit"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}")

MODES = ("gather", "mask")
MODELS = {
  "public_vit": dict(width=96, depth=6, num_heads=3, image_size=(64, 64), num_classes=10),
  "public_dist": dict(width=64, depth=4, num_heads=2, image_size=(48, 48), num_classes=7, distilled=True),
}


@functools.cache
def quick():
  """Compiler options: these programs run once, so that their time is the time of the compiler."""
  options = {"xla_backend_optimization_level": 0}
  older = options | {"xla_cpu_use_fusion_emitters": False}  # newer versions have no other emitters
  try:
    jax.jit(jnp.negative, compiler_options=older)(1.0)
  except jax.errors.JaxRuntimeError:
    return options
  return older


def drawn(make, streams):
  """What `make(streams)` draws, such as the parameters of a module, without the forward pass that finds their shapes.

  Its steps are carried out one by one: what draws is a program of JAX's own, which parameters of equal shape share.
  One program of them all holds a copy for each, and compiles for longer than what the model does with them.
  """
  closed, shapes = jax.make_jaxpr(make, return_shape=True)(streams)
  steps, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  given = [leaf for leaf, there in zip(jax.tree.leaves(streams), used, strict=True) if there]
  return jax.tree.unflatten(jax.tree.structure(shapes), jax.core.eval_jaxpr(steps, closed.consts, *given))


@functools.cache
def recorded(name):
  """Arrays of a file and its settings; images as ours, NHWC."""
  with np.load(GOLDEN / f"{name}.npz") as file:
    arrays = dict(file)
  settings = json.loads(str(arrays.pop("settings_json")))
  if "images" in arrays:
    arrays["images"] = arrays["images"].transpose(0, 2, 3, 1)
  return arrays, settings


def model(weights, sites=None, **options):
  config = defaults.complete(dict(model=dict(variant="mu/8", **MODELS[weights], **options), sites=sites or {}))
  return vit.make(config.model, config.sites)


@functools.cache
def backbone(weights):
  """Parameters of the dense model."""
  return pretrained.load_timm(GOLDEN / f"{weights}.safetensors", like(model(weights)))


def like(module):
  height, width = (side * module.shape.patch for side in module.shape.grid)
  init = functools.partial(module.init, mode="mask")
  return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, height, width, 3)))["params"]


def traced(module, params, images, **kwargs):
  """The output, and Tokens as they leave each block."""
  output, captured = module.apply(
    {"params": params}, images, mutable=["intermediates"],
    capture_intermediates=lambda m, _: isinstance(m, vit.Block), **kwargs,
  )  # fmt: skip
  blocks = [captured["intermediates"][f"block_{i}"]["__call__"][0][0] for i in range(module.shape.depth)]
  return output, blocks


COMPILED = {}


def forward(module, params, images, mode):
  """`traced`, compiled; in mask mode counts are arguments, and files that differ in nothing else share a program."""
  keeps, key = None, module
  if mode == "mask":
    spots = module.sites.spots
    keeps = {spot.site: tuple(s.keep for s in spots if s.site == spot.site) for spot in spots}
    plain = tuple((s.reducer, s.layer, s.options, s.place) for s in spots)
    key = (module.shape, plain, any(s.proportional for s in module.sites.spots))
  if key not in COMPILED:
    COMPILED[key] = jax.jit(functools.partial(traced, module, mode=mode), compiler_options=quick())
  return COMPILED[key](params, images, keeps=keeps)


def reported(output, site, name):
  """What the spots of a site reported, in their order."""
  report = output.aux[f"reduce/{site}/{name}"]
  return [report[index] for index in sorted(report)]


def value_and_grads(terms, params):
  """Terms (T,), the gradient of each, and what else `terms` returns."""

  def run(params):
    values, pull, aux = jax.vjp(terms, params, has_aux=True)
    (grads,) = jax.vmap(pull)(jnp.eye(len(values)))
    return values, grads, aux

  values, grads, aux = jax.jit(run, compiler_options=quick())(params)
  flat = traverse_util.flatten_dict(grads, sep="/")
  return values, [{name: np.asarray(g[i]) for name, g in flat.items()} for i in range(len(values))], aux


def check_forward(arrays, output, blocks, *, tokens=True):
  """Logits, the CLS token of every block, the token counts, and final tokens where their order is protected."""
  counts = arrays["tokens_per_block"].tolist()
  np.testing.assert_array_equal(np.asarray(output.counts), counts)
  np.testing.assert_allclose(np.stack([b.x[:, 0] for b in blocks]), arrays["cls_per_block"], atol=2e-5)
  np.testing.assert_allclose(output.logits, arrays["logits"], atol=2e-5)
  ours, theirs = np.asarray(output.tokens.x[:, : counts[-1]]), arrays["final_tokens"]
  if not tokens:
    ours, theirs = (rows_sorted(a.round(3)) for a in (ours, theirs))
  np.testing.assert_allclose(ours, theirs, atol=2e-5 if tokens else 2e-3)


def rows_sorted(a):
  """Rows of each image in lexicographic order."""
  return np.stack([rows[np.lexsort(rows.T[::-1])] for rows in np.asarray(a)])


def check_sources(arrays, blocks, *, order):
  """Sizes and source maps of every block; `order`: also in which order the tokens stand."""
  for layer, tokens in enumerate(blocks):
    if f"source_{layer}" not in arrays:
      continue
    theirs = arrays[f"source_{layer}"]
    k = theirs.shape[1]
    ours = (np.asarray(tokens.owner)[:, None] == np.arange(k)[:, None]).astype(np.uint8)
    assert (np.asarray(tokens.owner) < k).all()
    size = np.asarray(tokens.size[:, :k])
    both = [(ours, size), (theirs, arrays[f"size_{layer}"])]
    if not order:  # of a row's sources no two are alike, so a sorted row carries its size along
      both = [(np.take_along_axis(s, (i := rank(s))[..., None], 1), np.take_along_axis(z, i, 1)) for s, z in both]
    (ours, size), (theirs, wanted) = both
    np.testing.assert_array_equal(ours, theirs, err_msg=f"layer {layer}")
    np.testing.assert_allclose(size, wanted, rtol=1e-5, err_msg=f"layer {layer}")


def rank(source):
  return np.stack([np.lexsort(rows.T[::-1]) for rows in source])
