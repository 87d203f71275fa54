"""Primitives that change shapes, sum, multiply or sort, as ONNX."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokred.export.onnx_graph import Graph, Rule, UnsupportedError, Value, is_int, same, unsupported

REDUCTIONS = {
  "reduce_sum": "ReduceSum",
  "reduce_max": "ReduceMax",
  "reduce_min": "ReduceMin",
  "reduce_prod": "ReduceProd",
  "reduce_or": "ReduceMax",
  "reduce_and": "ReduceMin",
}


def broadcast_in_dim(graph: Graph, equation: Any, inputs: Sequence[Value]) -> Value:
  value, shape = inputs[0], tuple(equation.outvars[0].aval.shape)
  places = equation.params["broadcast_dimensions"]
  actual = [1] * len(shape)
  for axis, place in enumerate(places):
    actual[place] = value.actual[axis]
  if value.const is not None:
    return Value(shape, value.dtype, tuple(actual), const=np.reshape(value.const, actual))
  added = [axis for axis in range(len(shape)) if axis not in places]
  name = graph.node("Unsqueeze", value.name, graph.ints(*added)) if added else value.name
  return Value(shape, value.dtype, tuple(actual), name)


def iota(graph: Graph, equation: Any, inputs: Sequence[Value]) -> Value:
  shape, axis = tuple(equation.outvars[0].aval.shape), equation.params["dimension"]
  if not is_int(shape[axis]):
    raise UnsupportedError("formats has 'onnx', which cannot count the images of a batch; set batch_size")
  actual = tuple(size if place == axis else 1 for place, size in enumerate(shape))
  values = np.arange(shape[axis]).astype(equation.params["dtype"]).reshape(actual)
  return Value(shape, values.dtype, actual, const=values)


def dim_as_value(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  size = graph.node("Squeeze", graph.sizes((equation.params["dim"],)), graph.ints(0))
  return graph.cast(size, equation.outvars[0].aval.dtype)


def reshape(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  return graph.reshape(graph.full(inputs[0]), equation.outvars[0].aval.shape)


def squeeze(graph: Graph, equation: Any, inputs: Sequence[Value]) -> Value:
  value, gone = inputs[0], [axis % len(inputs[0].shape) for axis in equation.params["dimensions"]]
  left = [axis for axis in range(len(value.shape)) if axis not in gone]
  shape, actual = (tuple(sizes[axis] for axis in left) for sizes in (value.shape, value.actual))
  if value.const is not None:
    return Value(shape, value.dtype, actual, const=np.reshape(value.const, actual))
  return Value(shape, value.dtype, actual, graph.node("Squeeze", value.name, graph.ints(*gone)))


def transpose(graph: Graph, equation: Any, inputs: Sequence[Value]) -> Value:
  value, order = inputs[0], [int(axis) for axis in equation.params["permutation"]]
  shape, actual = (tuple(sizes[axis] for axis in order) for sizes in (value.shape, value.actual))
  if value.const is not None:
    return Value(shape, value.dtype, actual, const=np.transpose(value.const, order))
  return Value(shape, value.dtype, actual, graph.transpose(value.name, order))


def concatenate(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  return graph.node("Concat", *map(graph.full, inputs), axis=int(equation.params["dimension"]))


def stack(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  axis = int(equation.params["axis"])
  rows = [graph.node("Unsqueeze", graph.full(value), graph.ints(axis)) for value in inputs]
  return graph.node("Concat", *rows, axis=axis)


def unstack(graph: Graph, equation: Any, inputs: Sequence[Value]) -> list[str]:
  name, axis = graph.full(inputs[0]), int(equation.params["axis"])
  index = lambda i: graph.constant(np.array(i, np.int64))
  return [graph.node("Gather", name, index(i), axis=axis) for i in range(len(equation.outvars))]


def split(graph: Graph, equation: Any, inputs: Sequence[Value]) -> list[str]:
  sizes = equation.params["sizes"]
  out = graph.node(
    "Split", graph.full(inputs[0]), graph.ints(*sizes), outputs=len(sizes), axis=int(equation.params["axis"])
  )
  return [out] if isinstance(out, str) else out


def slice_(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  p, shape = equation.params, inputs[0].shape
  sides = zip(p["start_indices"], p["limit_indices"], range(len(shape)), p["strides"] or (1,) * len(shape), strict=True)
  shorter = [s for s in sides if not (same((0, s[1]), (s[0], shape[s[2]])) and s[3] == 1)]
  return cut(graph, graph.full(inputs[0]), *zip(*shorter, strict=True)) if shorter else graph.full(inputs[0])


def cut(graph: Graph, name: str, starts: Any, ends: Any, axes: Any, steps: Any) -> str:
  if not len(axes):
    return name
  return graph.node("Slice", name, *(graph.ints(*sizes) for sizes in (starts, ends, axes, steps)))


def rev(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  axes = equation.params["dimensions"]
  end = [np.iinfo(np.int64).min + 1] * len(axes)
  return cut(graph, graph.full(inputs[0]), [-1] * len(axes), end, axes, [-1] * len(axes))


def pad(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  config = [tuple(map(int, sides)) for sides in equation.params["padding_config"]]
  if any(inner for *_, inner in config):
    raise unsupported("pad", "between entries")
  name, value = graph.full(inputs[0]), graph.full(inputs[1])
  shorter = [axis for axis, (low, high, _) in enumerate(config) if low < 0 or high < 0]
  far = np.iinfo(np.int64).max
  ends = [config[axis][1] if config[axis][1] < 0 else far for axis in shorter]
  name = cut(graph, name, [max(0, -config[axis][0]) for axis in shorter], ends, shorter, [1] * len(shorter))
  sides = [max(0, low) for low, _, _ in config] + [max(0, high) for _, high, _ in config]
  return graph.node("Pad", name, graph.ints(*sides), value) if any(sides) else name


def reduce(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  name, axes = graph.full(inputs[0]), [int(axis) for axis in equation.params["axes"]]
  logical = inputs[0].dtype == bool
  if logical:
    name = graph.cast(name, np.int32)
  if axes:
    name = graph.node(REDUCTIONS[equation.primitive.name], name, graph.ints(*axes), keepdims=0)
  return graph.cast(name, bool) if logical else name


def arg(op: str) -> Rule:
  def rule(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    name = graph.full(inputs[0])
    name = graph.cast(name, np.int32) if inputs[0].dtype == bool else name
    return graph.cast(graph.node(op, name, axis=int(equation.params["axes"][0]), keepdims=0), np.int32)

  return rule


def cumsum(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  p = equation.params
  axis = graph.constant(np.array(p["axis"], np.int64))
  return graph.node("CumSum", graph.full(inputs[0]), axis, reverse=int(p["reverse"]))


def sort(graph: Graph, equation: Any, inputs: Sequence[Value]) -> list[str]:
  """TopK takes the lower index of equals first, so it is stable."""
  key, axis = inputs[0], int(equation.params["dimension"])
  if equation.params["num_keys"] != 1 or not is_int(key.shape[axis]):
    raise unsupported("sort", "by several keys")
  name = graph.cast(graph.full(key), np.int32) if key.dtype == bool else graph.full(key)
  k = graph.ints(key.shape[axis])
  values, index = graph.node("TopK", name, k, outputs=2, axis=axis, largest=0, sorted=1)
  values = graph.cast(values, bool) if key.dtype == bool else values
  return [values, *(graph.node("GatherElements", graph.full(rest), index, axis=axis) for rest in inputs[1:])]


def top_k(graph: Graph, equation: Any, inputs: Sequence[Value]) -> list[str]:
  k = graph.ints(int(equation.params["k"]))
  values, index = graph.node("TopK", graph.full(inputs[0]), k, outputs=2, axis=-1, largest=1, sorted=1)
  return [values, graph.cast(index, np.int32)]


def dot_general(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  """One MatMul between transposes and reshapes, of which most are none."""
  (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
  left, right = (graph.full(value) for value in inputs)
  out = equation.outvars[0].aval
  left, right = (
    name if value.dtype == out.dtype else graph.cast(name, out.dtype)
    for name, value in zip((left, right), inputs, strict=True)
  )
  shapes = [value.shape for value in inputs]
  free = lambda shape, *used: [a for a in range(len(shape)) if not any(a in u for u in used)]
  left_free, right_free = free(shapes[0], left_sum, left_batch), free(shapes[1], right_sum, right_batch)
  batch = [shapes[0][axis] for axis in left_batch]
  size = lambda shape, axes: math.prod(shape[axis] for axis in axes)
  summed = size(shapes[0], left_sum)
  left = graph.transpose(left, (*left_batch, *left_free, *left_sum))
  right = graph.transpose(right, (*right_batch, *right_sum, *right_free))
  plain = len(left_sum) == 1 and (len(left_free) == 1 or (not left_batch and left_free))
  if not plain:
    left = graph.reshape(left, (*batch, size(shapes[0], left_free), summed))
  if len(right_sum) != 1 or len(right_free) != 1:
    right = graph.reshape(right, (*batch, summed, size(shapes[1], right_free)))
  name = graph.node("MatMul", left, right)
  return name if plain and len(right_free) == 1 else graph.reshape(name, out.shape)


def layer_norm(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  x, scale, bias = inputs
  return graph.node(
    "LayerNormalization",
    graph.full(x),
    graph.full(scale),
    graph.full(bias),
    axis=-1,
    epsilon=equation.params["epsilon"],
  )


def conv(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  p = equation.params
  spec, rank = p["dimension_numbers"], len(p["window_strides"])
  if p["batch_group_count"] != 1 or set(p["lhs_dilation"]) - {1}:
    raise UnsupportedError("formats has 'onnx', which has no form of JAX's transposed convolution")
  image, kernel = (
    graph.transpose(graph.full(value), order)
    for value, order in zip(inputs, (spec.lhs_spec, spec.rhs_spec), strict=True)
  )
  pads = [int(low) for low, _ in p["padding"]] + [int(high) for _, high in p["padding"]]
  name = graph.node(
    "Conv",
    image,
    kernel,
    strides=list(map(int, p["window_strides"])),
    pads=pads,
    dilations=list(map(int, p["rhs_dilation"])),
    group=int(p["feature_group_count"]),
    kernel_shape=[int(inputs[1].shape[axis]) for axis in spec.rhs_spec[2:]],
  )
  order = [spec.out_spec.index(axis) for axis in range(rank + 2)]
  return graph.transpose(name, order)
