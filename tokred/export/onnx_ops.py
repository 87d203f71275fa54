"""What each primitive of JAX becomes in ONNX: see `onnx_graph` for how.

Sorting is a TopK with a constant k.  Sums over groups, which JAX scatters, are products with matrices of zeros and ones
here: no runtime has to add where two threads write (TensorRT cannot).  Loops of fixed length are Scans.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from flax import linen as nn
from onnx import helper

from tokred.export import onnx_index, onnx_shapes
from tokred.export.onnx_entries import ELEMENTWISE, SPREAD, elementwise
from tokred.export.onnx_graph import Graph, Rule, Value, is_int, literal, static, tensor_type, unsupported

_layer_norm = jex.Primitive("layer_norm")  # of which ONNX has one kernel, where JAX has a dozen operations
_layer_norm.def_abstract_eval(lambda x, scale, bias, *, epsilon: x)


def trace(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> Any:
  """The ClosedJaxpr of a function in which LayerNorms stay whole."""

  def keep_whole(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    plain = isinstance(module, nn.LayerNorm) and context.method_name == "__call__" and module.reduction_axes == -1
    if not (plain and module.use_scale and module.use_bias and len(args) == 1 and not kwargs):
      return call(*args, **kwargs)
    params = module.variables["params"]
    return _layer_norm.bind(args[0], params["scale"], params["bias"], epsilon=module.epsilon)

  with nn.intercept_methods(keep_whole):
    return jax.make_jaxpr(function)(*shapes)


SAME = ("copy", "copy_p", "stop_gradient", "optimization_barrier", "reduce_precision", "device_put", "pvary")
INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call")
INLINED += ("custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin")


def evaluate(graph: Graph, closed: Any, inputs: Sequence[Value]) -> list[Value]:
  """Adds the equations of a jaxpr; its results."""
  jaxpr = getattr(closed, "jaxpr", closed)
  values = dict(zip(jaxpr.constvars, map(literal, getattr(closed, "consts", ())), strict=True))
  values |= dict(zip(jaxpr.invars, inputs, strict=True))

  def read(atom: Any) -> Value:
    return literal(np.asarray(atom.val, atom.aval.dtype)) if isinstance(atom, jex.Literal) else values[atom]

  for equation in jaxpr.eqns:
    arguments = [read(atom) for atom in equation.invars]
    values |= dict(zip(equation.outvars, _equation(graph, equation, arguments), strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _equation(graph: Graph, equation: Any, inputs: Sequence[Value]) -> Sequence[Value]:
  name, params = equation.primitive.name, equation.params
  if name in INLINED:
    inner = next(params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
    return evaluate(graph, inner, inputs)
  if name in SAME:
    return inputs
  shapes = [(tuple(out.aval.shape), out.aval.dtype) for out in equation.outvars]
  if name in ELEMENTWISE or name in SPREAD:
    return [elementwise(graph, equation, inputs, *shapes[0])]
  constant = all(value.const is not None and static(value.shape) for value in inputs)
  if constant and all(static(shape) for shape, _ in shapes) and name not in LAZY:
    arrays = [value.const if value.const.shape == value.shape else whole(value) for value in inputs]
    out = equation.primitive.bind(*arrays, **params)
    return [literal(array) for array in (out if equation.primitive.multiple_results else [out])]
  if name not in RULES:
    raise unsupported(name)
  out = RULES[name](graph, equation, inputs)
  if isinstance(out, Value):
    return [out]
  names = [out] if isinstance(out, str) else out
  return [Value(shape, dtype, shape, name) for name, (shape, dtype) in zip(names, shapes, strict=True)]


def whole(value: Value) -> np.ndarray:
  return np.broadcast_to(value.const, value.shape)


def _scan(graph: Graph, equation: Any, inputs: Sequence[Value]) -> list[str]:
  """A Scan, whose body sees the constants from outside; one without rows to read gets a counter."""
  p = equation.params
  if "ft_in" in p:  # JAX 0.12
    consts, carry, rows = map(list, p["ft_in"].update(list(inputs)).unpack())
  else:
    at, to = p["num_consts"], p["num_consts"] + p["num_carry"]
    consts, carry, rows = list(inputs[:at]), list(inputs[at:to]), list(inputs[to:])
  if not p["length"] and len(equation.outvars) == len(carry):  # no turn at all, which a Scan cannot have
    return [graph.full(value) for value in carry]
  counter = not rows
  rows = rows or [literal(np.arange(p["length"], dtype=np.int32))]
  named = lambda value, shape: Value(shape, value.dtype, shape, graph.name("state"))
  inner = [named(value, value.shape) for value in carry] + [named(row, row.shape[1:]) for row in rows]
  with graph.body() as nodes:
    out = evaluate(graph, p["jaxpr"], consts + (inner[:-1] if counter else inner))
    results = [graph.name("next") for _ in out]
    for value, name in zip(out, results, strict=True):
      nodes.append(helper.make_node("Identity", [graph.full(value)], [name]))
  info = lambda value, name: helper.make_tensor_value_info(
    name, tensor_type(value.dtype), [int(s) if is_int(s) else str(s) for s in value.shape]
  )
  outs = [info(value, name) for value, name in zip(out, results, strict=True)]
  body = helper.make_graph(nodes, graph.name("body"), [info(value, value.name) for value in inner], outs)
  backward = {"scan_input_directions": [1] * len(rows), "scan_output_directions": [1] * (len(out) - len(carry))}
  outputs = graph.node(
    "Scan",
    *(graph.full(value) for value in (*carry, *rows)),
    outputs=len(out),
    body=body,
    num_scan_inputs=len(rows),
    **{field: value for field, value in backward.items() if p["reverse"] and value},
  )
  return [outputs] if isinstance(outputs, str) else outputs


RULES: dict[str, Rule] = {
  "broadcast_in_dim": onnx_shapes.broadcast_in_dim,
  "iota": onnx_shapes.iota,
  "dim_as_value": onnx_shapes.dim_as_value,
  "reshape": onnx_shapes.reshape,
  "squeeze": onnx_shapes.squeeze,
  "transpose": onnx_shapes.transpose,
  "concatenate": onnx_shapes.concatenate,
  "stack": onnx_shapes.stack,
  "unstack": onnx_shapes.unstack,
  "split": onnx_shapes.split,
  "slice": onnx_shapes.slice_,
  "rev": onnx_shapes.rev,
  "pad": onnx_shapes.pad,
  **dict.fromkeys(onnx_shapes.REDUCTIONS, onnx_shapes.reduce),
  "argmax": onnx_shapes.arg("ArgMax"),
  "argmin": onnx_shapes.arg("ArgMin"),
  "cumsum": onnx_shapes.cumsum,
  "sort": onnx_shapes.sort,
  "top_k": onnx_shapes.top_k,
  "dot_general": onnx_shapes.dot_general,
  "layer_norm": onnx_shapes.layer_norm,
  "conv_general_dilated": onnx_shapes.conv,
  "gather": onnx_index.gather,
  "dynamic_slice": onnx_index.dynamic_slice,
  "scatter": onnx_index.scatter,
  "scatter-add": onnx_index.scatter,
  "scan": _scan,
}
LAZY = ("broadcast_in_dim", "iota", "squeeze", "transpose", "dim_as_value")  # rules that take constants too
