"""ONNX: what JAX computes, ONNX Runtime computes, with operators that every runtime has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import export as jax_export
from jax import lax

import tokred
from tokred import tokens
from tokred.export import functions, onnx_graph, onnx_ops
from tokred.tokens import restore

MODEL = dict(variant="mu/2", width=16, depth=3, num_heads=2, mlp_dim=32, image_size=(8, 8), channels=1, num_classes=4)
SITES = {  # cut with a fused rest, merge, route, loops, and what has a shape of its own
  "evit": dict(cut=dict(reducer="topk", layers=(1,), keep=0.5, fuse=True)),
  "diffrate": dict(rates=dict(reducer=("topk", "diffrate_merge"), layers=(1,), rate="learned")),
  "tome": dict(merge=dict(reducer="tome", layers=(0, 1), r=3)),
  "router": dict(route=dict(reducer="router", layers=(1,), keep=0.5)),
  "kmeans": dict(merge=dict(reducer="kmeans", layers=(1,), keep=0.6)),
}
MORE = {
  "autoencoder": dict(cut=dict(reducer="autoencoder", place="output", keep=0.6)),
  **{name: dict(cut=dict(reducer="topk", layers=(1,), keep=0.6, score=name)) for name in ("pagerank", "repr_shift")},
  **{
    name: dict(cut=dict(reducer=name, layers=(1,), keep=0.6))
    for name in "gumbel pitome tofu mctf dpcknn maxmin mmr zerotprune transforming".split()
  },
}
IMAGES = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)


def make(sites):
  """A frozen model whose parameters are all random."""
  model = tokred.build(dict(model=MODEL, sites=sites))
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: model.init().params)
  params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes)
  return tokred.freeze(dataclasses.replace(model, params=params))


def run(graph, images):
  session = onnxruntime.InferenceSession(graph.SerializeToString())
  return session.run(None, {"images": images})


def every_node(graph):
  for node in graph.node:
    yield node
    for attribute in node.attribute:
      yield from every_node(attribute.g) if attribute.HasField("g") else ()


def check_operators(graph):
  """Constant k, nothing reduced by a scatter, operators of the default domain only."""
  constants = {tensor.name for tensor in graph.graph.initializer}
  for node in every_node(graph.graph):
    assert node.domain == "" and node.op_type not in ("ScatterND", "NonZero", "Loop", "If")
    assert not any(attribute.name == "reduction" for attribute in node.attribute), node
    assert node.op_type != "TopK" or node.input[1] in constants
  onnx.checker.check_model(graph, full_check=True)
  assert graph.opset_import[0].version == onnx_graph.OPSET


def check_model(sites, batch_size=None):
  model = make(sites)
  graph, _ = functions.onnx(model, batch_size=batch_size)
  check_operators(graph)
  wanted = np.asarray(model(IMAGES).logits)
  assert np.abs(run(graph, IMAGES)[0] - wanted).max() < 1e-5
  if batch_size is None:
    assert np.abs(run(graph, IMAGES[:1])[0] - wanted[:1]).max() < 1e-5
  return graph


@pytest.mark.parametrize("name", SITES)
def test_the_logits_of_the_model(name):
  check_model(SITES[name])


@pytest.mark.thorough
@pytest.mark.parametrize("name", MORE)
def test_the_logits_of_more_models(name):
  check_model(MORE[name])
  check_model(MORE[name], batch_size=3)


def test_a_long_row_is_sorted_by_topk(monkeypatch):
  monkeypatch.setattr(tokens, "SORTED", 4)
  graph = check_model(SITES["evit"], batch_size=3)
  assert any(node.op_type == "TopK" for node in graph.graph.node)


def test_norms_are_whole_and_weights_have_their_names():
  graph, _ = functions.onnx(make({}))
  operators = [node.op_type for node in graph.graph.node]
  assert operators.count("LayerNormalization") == 7 and not {"Sqrt", "Reciprocal"} & set(operators)
  shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
  assert shapes["block_0/attn/qkv/kernel"] == (16, 3, 2, 8)


def scatter(x):
  index = jnp.argsort(x[..., 0], axis=1).astype(jnp.int32)
  add = jax.vmap(lambda row, i, u: row.at[i].add(u, mode="promise_in_bounds"))
  put = jax.vmap(lambda row, i, u: row.at[i].set(u, unique_indices=True, mode="promise_in_bounds"))
  return add(jnp.ones_like(x), index // 2, x), add(x[..., 0], index // 2, x[..., 1]), put(x[..., 1], index, x[..., 2])


def gathers(x):
  index = jnp.argsort(x[..., 0], axis=1)
  fill = jnp.take_along_axis(x[..., 0], index + 2, axis=1, mode="fill", fill_value=7.0)
  near = jnp.take_along_axis(x[..., 0], index + 2, axis=1, mode="clip")
  table = jnp.arange(10.0).reshape(5, 2)[index]
  return fill, near, table, x[:, jnp.array([2, 0])], x[..., 1], restore(x, jnp.where(index > 1, index, -1))


def loops(x):
  total, rows = lax.scan(lambda c, y: (c + y, c * 2), x[:, 0], x.swapaxes(0, 1), reverse=True)
  window = lax.fori_loop(0, 2, lambda i, c: c + lax.dynamic_slice_in_dim(x, i + 1, 3, axis=1), x[:, :3])
  return total, rows, window, lax.fori_loop(0, 0, lambda i, c: c + 1, x * 2)


def orders(x):
  key, rest = lax.sort((x, -x), dimension=1, num_keys=1)
  best, index = lax.top_k(x, 2)
  alive = x > 0
  return key, rest, jnp.sort(alive, axis=1), best, index, x.argmin(1), alive.argmax(2), x.cumsum(1), alive.any(1)


def shapes(x):
  padded = lax.pad(x, 2.0, ((0, 0, 0), (-1, 2, 0), (1, -1, 0)))
  halves = jnp.split(x, 2, axis=2)
  return (
    padded,
    *halves,
    x[:, ::-1],
    x[:, :, 1::2],
    x[:, 1, 2:],
    jnp.stack([x, x], 1),
    *jnp.unstack(x, axis=2),
    jnp.repeat(x, 2, axis=1),
  )


def entries(x):
  n = jnp.round(x * 3).astype(jnp.int32)
  floats = jnp.clip(x, -0.5, 0.5), jnp.expm1(x), jnp.log1p(x**2), lax.rsqrt(x**2 + 1), lax.erfc(x), x**3, jnp.exp2(x)
  whole = (
    n % 3,
    lax.rem(n, 2),
    n // 2,
    n & 3,
    jnp.where(x > 0, x > 1, n > 0),
    jnp.isfinite(1 / jnp.floor(x)),
    jnp.sign(n),
  )
  return *floats, *whole, jax.nn.gelu(x), jax.nn.gelu(x, approximate=False), jax.nn.softmax(x), jax.nn.sigmoid(x)


def products(x):
  w = jnp.arange(24.0).reshape(4, 3, 2)
  image = jnp.broadcast_to(x[:, :, :, None], (*x.shape, 2))
  kernel = jnp.arange(36.0).reshape(3, 3, 2, 2)
  conv = lax.conv_general_dilated(image, kernel, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  outer = jnp.einsum("bnd,bmd->nbm", x, x), jnp.einsum("bnd,dhe->bhne", x, w), jnp.einsum("bnd,bnd->b", x, x)
  return conv, *outer, jnp.einsum("dhe,bnd->hebn", w, x), x @ jnp.ones((4,)), (x > 0).sum(1)


@pytest.mark.parametrize("size", ["any", "fixed"])
@pytest.mark.parametrize("function", [scatter, gathers, loops, orders, shapes, entries, products])
def test_primitives(function, size):
  """Each result by itself, for a graph has one."""
  x = np.random.default_rng(1).standard_normal((2, 5, 4)).astype(np.float32)
  wanted = jax.jit(function)(x)
  spec = jax.ShapeDtypeStruct((jax_export.symbolic_shape("batch")[0] if size == "any" else 2, 5, 4), jnp.float32)
  for index, value in enumerate(wanted):
    closed = onnx_ops.trace(lambda x, index=index: function(x)[index], spec)
    graph = onnx_graph.convert(closed, {}, onnx_ops.evaluate, output="out")
    check_operators(graph)
    (found,) = run(graph, x)
    assert found.dtype == value.dtype and found.shape == value.shape
    np.testing.assert_allclose(found, value, rtol=2e-5, atol=2e-5, err_msg=f"{function.__name__} {index}")


def test_bfloat16_weights_are_stored_so():
  model = functions.in_dtype(make(SITES["evit"]), "bfloat16")
  graph, _ = functions.onnx(model)
  big = {t.name: t.data_type for t in graph.graph.initializer if np.prod(t.dims) >= onnx_graph.LARGE}
  assert big["block_0/mlp/fc1/kernel"] == onnx.TensorProto.BFLOAT16
  assert onnx.TensorProto.FLOAT not in big.values()
  rounded = jax.tree.map(lambda leaf: leaf.astype(np.float32), model.params)
  wanted = dataclasses.replace(make(SITES["evit"]), params=rounded)(IMAGES).logits
  assert np.abs(run(graph, IMAGES)[0] - wanted).max() < 1e-5


def test_preprocessing_is_inside():
  model = make({})
  graph, _ = functions.onnx(model, preprocess=True)
  pixels = np.random.default_rng(0).integers(0, 256, IMAGES.shape, np.uint8)
  logits = model(((pixels / 255 - 0.5) / 0.5).astype(np.float32)).logits
  assert [value.name for value in graph.graph.output] == ["probabilities"]
  assert np.abs(run(graph, pixels)[0] - jax.nn.softmax(logits)).max() < 1e-6


def test_weights_of_a_large_graph_lie_beside_it(tmp_path, monkeypatch):
  model = make({})
  graph, _ = functions.onnx(model)
  wanted = run(graph, IMAGES)[0]
  monkeypatch.setattr(functions, "ONE_FILE", 0)
  functions.write_onnx(graph, tmp_path / "model.onnx")
  assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
  session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
  assert np.array_equal(session.run(None, {"images": IMAGES})[0], wanted)


def test_what_has_no_form_is_named():
  sites = dict(cut=dict(reducer="topk", layers=(1,), keep=0.5, score="random"))
  with pytest.raises(ValueError, match=r"formats has 'onnx', which has no form of JAX's '\w+'"):
    functions.onnx(make(sites), batch_size=2)
  with pytest.raises(ValueError, match=r"batch_size=None: a reducer of config.sites needs a fixed one"):
    functions.onnx(make(sites))
