"""Primitives that work entry by entry, as ONNX: broadcasts stay held back."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokred.export.onnx_graph import Graph, Rule, Value, is_int, unsupported

ELEMENTWISE: dict[str, tuple[str, Any]] = {  # the operator and, where it is cheap to say, the same in numpy
  "add": ("Add", np.add),
  "add_any": ("Add", np.add),
  "sub": ("Sub", np.subtract),
  "mul": ("Mul", np.multiply),
  "div": ("Div", None),
  "max": ("Max", np.maximum),
  "min": ("Min", np.minimum),
  "pow": ("Pow", None),
  "neg": ("Neg", np.negative),
  "abs": ("Abs", np.abs),
  "sign": ("Sign", np.sign),
  "floor": ("Floor", None),
  "ceil": ("Ceil", None),
  "round": ("Round", None),
  "exp": ("Exp", None),
  "log": ("Log", None),
  "sqrt": ("Sqrt", None),
  "tanh": ("Tanh", None),
  "sin": ("Sin", None),
  "cos": ("Cos", None),
  "logistic": ("Sigmoid", None),
  "eq": ("Equal", np.equal),
  "lt": ("Less", np.less),
  "le": ("LessOrEqual", np.less_equal),
  "gt": ("Greater", np.greater),
  "ge": ("GreaterOrEqual", np.greater_equal),
  "and": ("And", np.logical_and),
  "or": ("Or", np.logical_or),
  "xor": ("Xor", np.logical_xor),
  "not": ("Not", np.logical_not),
}
BOOLEAN = {"Add": "Or", "Max": "Or", "Mul": "And", "Min": "And"}  # of bools
BITWISE = {"And": "BitwiseAnd", "Or": "BitwiseOr", "Xor": "BitwiseXor", "Not": "BitwiseNot"}  # of ints


def elementwise(graph: Graph, equation: Any, inputs: Sequence[Value], shape: Sequence[Any], dtype: Any) -> Value:
  """Broadcasts stay held back; constants are computed where numpy has a name for it."""
  name = equation.primitive.name
  actual = _broadcast([value.actual for value in inputs])
  op, numpy = ELEMENTWISE.get(name, (None, None))
  if numpy is not None and all(value.const is not None for value in inputs) and not _bits(name, inputs[0]):
    return Value(tuple(shape), dtype, actual, const=np.asarray(numpy(*(value.const for value in inputs)), dtype))
  if name in SPREAD:
    result = SPREAD[name](graph, equation, inputs)
    if isinstance(result, np.ndarray):
      return Value(tuple(shape), dtype, tuple(result.shape), const=result)
  else:
    if inputs[0].dtype == bool:
      op = BOOLEAN.get(op, op)
    elif _bits(name, inputs[0]):
      op = BITWISE[op]
    result = graph.node(op, *map(graph.lazy, inputs))
  return Value(tuple(shape), dtype, actual, result)


def _bits(name: str, value: Value) -> bool:
  return name in ("and", "or", "xor", "not") and value.dtype != bool


def _broadcast(shapes: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
  """Shapes of one rank, or scalars."""
  rank = max(map(len, shapes))
  shapes = [shape for shape in shapes if len(shape) == rank]
  return tuple(
    next((size for size in sizes if not (is_int(size) and size == 1)), 1) for sizes in zip(*shapes, strict=True)
  )


# What works entry by entry, but is no single operator.


def _convert(graph: Graph, equation: Any, inputs: Sequence[Value]) -> Any:
  (value,), dtype = inputs, equation.params["new_dtype"]
  if value.const is not None:
    return np.asarray(value.const).astype(dtype)
  return graph.lazy(value) if value.dtype == dtype else graph.cast(graph.lazy(value), dtype)


def _select(graph: Graph, equation: Any, inputs: Sequence[Value]) -> Any:
  which, *cases = inputs
  if which.dtype != bool or len(cases) != 2:
    raise unsupported("select_n", "with more than two cases")
  if all(value.const is not None for value in inputs):
    return np.where(which.const, cases[1].const, cases[0].const)
  return where(graph, graph.lazy(which), graph.lazy(cases[1]), graph.lazy(cases[0]), cases[0].dtype)


def where(graph: Graph, which: str, yes: str, no: str, dtype: Any) -> str:
  if np.dtype(dtype) != bool:
    return graph.node("Where", which, yes, no)
  yes, no = graph.node("And", which, yes), graph.node("And", graph.node("Not", which), no)  # ONNX Runtime has no other
  return graph.node("Or", yes, no)


def _ne(graph: Graph, equation: Any, inputs: Sequence[Value]) -> Any:
  if all(value.const is not None for value in inputs):
    return np.not_equal(inputs[0].const, inputs[1].const)
  return graph.node("Not", graph.node("Equal", *map(graph.lazy, inputs)))


def _rem(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  return graph.node("Mod", *map(graph.lazy, inputs), fmod=1)


def _clamp(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  low, value, high = map(graph.lazy, inputs)
  return graph.node("Min", graph.node("Max", value, low), high)


def _of_one(*steps: tuple[str, float | None]) -> Rule:
  """Operators after each other, each with a constant on its left or None."""

  def rule(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    name, dtype = graph.lazy(inputs[0]), inputs[0].dtype
    for op, constant in steps:
      left = () if constant is None else (graph.constant(np.asarray(constant, dtype)),)
      name = graph.node(op, *left, name)
    return name

  return rule


def _square(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  name = graph.lazy(inputs[0])
  return graph.node("Mul", name, name)


def _integer_pow(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  power = graph.constant(np.asarray(equation.params["y"], inputs[0].dtype))
  return graph.node("Pow", graph.lazy(inputs[0]), power)


def _is_finite(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  name = graph.lazy(inputs[0])
  return graph.node("Not", graph.node("Or", graph.node("IsInf", name), graph.node("IsNaN", name)))


def erf(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
  """x * sqrt(1 / 2) becomes x / sqrt(2): so written, runtimes see that it is a GELU and make one kernel of it."""
  name = graph.lazy(inputs[0])
  last = next((node for node in reversed(graph.nodes) if name in node.output), None)
  if last is not None and last.op_type == "Mul":
    for half, x in (last.input, last.input[::-1]):
      if np.array_equal(graph.initializers.get(half, 0), np.sqrt(np.float32(0.5))):
        name = graph.node("Div", x, graph.constant(np.sqrt(np.float32(2))))
  return graph.node("Erf", name)


SPREAD: dict[str, Rule] = {
  "convert_element_type": _convert,
  "select_n": _select,
  "ne": _ne,
  "rem": _rem,
  "clamp": _clamp,
  "square": _square,
  "integer_pow": _integer_pow,
  "is_finite": _is_finite,
  "rsqrt": _of_one(("Sqrt", None), ("Reciprocal", None)),
  "erf": erf,
  "erfc": _of_one(("Erf", None), ("Sub", 1.0)),
  "expm1": _of_one(("Exp", None), ("Add", -1.0)),
  "log1p": _of_one(("Add", 1.0), ("Log", None)),
  "exp2": _of_one(("Pow", 2.0)),
}
