"""Primitives that read or write at computed places, as ONNX."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tokred.export.onnx_entries import where
from tokred.export.onnx_graph import Graph, Value, literal, same, unsupported
from tokred.export.onnx_shapes import cut


def gather(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  """Indices along one axis: of a slice, of entries for all rows alike, or of entries for each row."""
  (data, index), numbers = inputs, equation.params["dimension_numbers"]
  sizes, batch = equation.params["slice_sizes"], [int(axis) for axis in numbers.operand_batching_dims]
  axes, name = list(map(int, numbers.start_index_map)), graph.full(data)
  gone = list(map(int, numbers.collapsed_slice_dims))
  if len(index.shape) == 1 and (index.const is not None or len(axes) == 1):
    for place, axis in enumerate(axes):
      start = index if len(axes) == 1 else literal(index.const[place : place + 1])
      name = _window(graph, name, start, axis, data.shape[axis], sizes[axis])
    return graph.node("Squeeze", name, graph.ints(*gone)) if gone else name
  if len(axes) != 1 or batch != list(range(len(batch))):
    raise unsupported("gather", "along several axes")
  (axis,) = axes
  limit, dropped = data.shape[axis], axis in gone
  if not dropped or list(map(int, numbers.start_indices_batching_dims)) != batch or (batch and axis != len(batch)):
    raise unsupported("gather", "of windows")
  name = _entries(graph, equation, name, index, limit, batch, axis)
  windows = [int(place) for place in numbers.offset_dims]
  rank = len(equation.outvars[0].aval.shape)
  behind = [place for place in range(rank) if place not in windows]  # where the axes of the indices stand
  before = 0 if batch else axis
  have = [*windows[:before], *behind, *windows[before:]]
  return graph.transpose(name, [have.index(place) for place in range(rank)])


def _entries(graph: Graph, equation: Any, data: str, index: Value, limit: Any, batch: Sequence[int], axis: int) -> str:
  """The entries, whatever the mode says of indices out of bounds."""
  mode, name = str(equation.params["mode"]), graph.full(index)
  safe = name
  if "PROMISE" not in mode:
    high, low = graph.constant(np.array(limit - 1, index.dtype)), graph.constant(np.array(0, index.dtype))
    safe = graph.node("Max", graph.node("Min", name, high), low)
  if batch:
    out = graph.node("GatherND", data, graph.cast(safe, np.int64), batch_dims=len(batch))
  else:
    out = graph.node("Gather", data, graph.node("Squeeze", safe, graph.ints(-1)), axis=axis)
  if "FILL" in mode:
    if len(equation.params["dimension_numbers"].offset_dims):
      raise unsupported("gather", "that fills windows")
    valid = graph.node("Squeeze", graph.node("Equal", safe, name), graph.ints(-1))
    out_aval = equation.outvars[0].aval
    fill = equation.params["fill_value"]
    fill = (np.nan if jax.numpy.issubdtype(out_aval.dtype, np.inexact) else 0) if fill is None else fill
    out = where(graph, valid, out, graph.constant(np.array(fill, out_aval.dtype)), out_aval.dtype)
  return out


def _window(graph: Graph, name: str, index: Value, axis: int, limit: Any, size: Any) -> str:
  """A slice of `size` entries from an index (1,), which is moved to where all of them are there."""
  if same((size,), (limit,)):
    return name
  if index.const is not None:
    start = min(max(int(index.const.reshape(())), 0), int(limit) - int(size))
    return cut(graph, name, [start], [start + int(size)], [axis], [1])
  start = graph.cast(graph.full(index), np.int64)
  start = graph.node("Max", graph.node("Min", start, graph.ints(int(limit) - int(size))), graph.ints(0))
  return graph.node("Slice", name, start, graph.node("Add", start, graph.ints(int(size))), graph.ints(axis))


def dynamic_slice(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  data, *starts = inputs
  name = graph.full(data)
  for axis, (start, size) in enumerate(zip(starts, equation.params["slice_sizes"], strict=True)):
    if start.const is None:
      start = Value((1,), start.dtype, (1,), graph.reshape(graph.full(start), (1,)))
    name = _window(graph, name, start, axis, data.shape[axis], size)
  return name


def scatter(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  """Rows (B, N, ...) get updates (B, M, ...) at indices (B, M, 1): added, or in place of what was there."""
  numbers, (data, index, update) = equation.params["dimension_numbers"], inputs
  rows = [
    list(map(int, getattr(numbers, field))) for field in ("operand_batching_dims", "scatter_indices_batching_dims")
  ]
  axes = list(map(int, numbers.scatter_dims_to_operand_dims))
  windows = list(map(int, numbers.update_window_dims))
  fits = rows == [[0], [0]] and axes == [1] and list(map(int, numbers.inserted_window_dims)) == [1]
  adds = equation.primitive.name == "scatter-add"
  if not fits or windows != list(range(2, len(data.shape))) or not (adds or equation.params["unique_indices"]):
    raise unsupported("scatter", "but along the second axis")
  if not adds and not windows:  # nothing is reduced: each entry is written once at most
    at = graph.node("Squeeze", graph.full(index), graph.ints(-1))
    return graph.node("ScatterElements", graph.full(data), at, graph.full(update), axis=1)
  at = graph.transpose(graph.full(index), (0, 2, 1))  # (B, 1, M)
  places = graph.constant(np.arange(data.shape[1], dtype=index.dtype)[None, :, None])
  chosen = graph.node("Equal", at, places)  # (B, N, M)
  out = equation.outvars[0].aval
  update_name = graph.full(update) if windows else graph.node("Unsqueeze", graph.full(update), graph.ints(2))
  if len(windows) > 1:
    update_name = graph.reshape(update_name, (*update.shape[:2], math.prod(update.shape[2:])))
  moved = graph.node("MatMul", graph.cast(chosen, np.float32), graph.cast(update_name, np.float32))
  moved = graph.reshape(moved, out.shape) if len(windows) != 1 else moved
  moved = moved if out.dtype == np.float32 else graph.cast(moved, out.dtype)
  if adds:
    zero = data.const is not None and not np.any(data.const)
    return moved if zero else graph.node("Add", graph.full(data), moved)
  hit = graph.cast(graph.node("ReduceMax", graph.cast(chosen, np.int32), graph.ints(2), keepdims=0), bool)
  hit = graph.node("Unsqueeze", hit, graph.ints(*windows))
  return where(graph, hit, moved, graph.full(data), out.dtype)
