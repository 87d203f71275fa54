"""A jaxpr as an ONNX graph: values, shapes and nodes; what each primitive becomes stands in `onnx_ops`.

Why not a converter: jax2onnx 0.17, the one that is kept up, needs an orbax-checkpoint older than ours, replaces
functions of `jax.numpy` for the rest of the process, and has no lowering of the gathers and scatters of a reduction.

Broadcasts are held back: a bias of shape (D,) that a jaxpr spreads over (B, N, D) stays (1, 1, D) in the graph until an
operator needs all of it, for those that work entry by entry broadcast by themselves.  What depends on constants alone
is computed here.  A batch of any size is the symbolic dimension `batch` of `jax.export`.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18  # the first with axes as inputs of all reductions, as TensorRT 10 and OpenVINO read it
IR_VERSION = 9
LARGE = 256  # entries from which a constant is known by its identity, and counts as a weight


class UnsupportedError(ValueError):
  """A model that cannot be said in ONNX."""


def unsupported(primitive: str, how: str = "") -> UnsupportedError:
  return UnsupportedError(
    f"formats has 'onnx', which has no form of JAX's {primitive!r}{how and ' '}{how} that config.model or config.sites "
    "asks for; valid: orbax, stablehlo, safetensors"
  )


@dataclasses.dataclass(frozen=True)
class Value:
  """What a variable of the jaxpr is in the graph: a tensor, or a constant that becomes one when it is used."""

  shape: tuple[Any, ...]  # as the jaxpr has it; ints and symbolic dimensions
  dtype: np.dtype
  actual: tuple[Any, ...]  # as the graph has it: 1 where a broadcast is held back
  name: str = ""
  const: Any = None  # array of shape `actual`


class Graph:
  """Nodes and constants of a graph that is being written."""

  def __init__(self, bfloat16_weights: bool = False):
    self.nodes: list[onnx.NodeProto] = []
    self.initializers: dict[str, np.ndarray] = {}
    self.batch = ""  # name of a tensor (1,) int64 with the size of the batch, where that is symbolic
    self._bfloat16 = bfloat16_weights
    self._known: dict[Any, str] = {}  # constants by content, large ones by identity
    self._kept: list[np.ndarray] = []  # an id is of use as long as its array lives
    self._outer: list[list[onnx.NodeProto]] = []  # nodes of the graphs around a loop's body
    self._count = 0

  def name(self, hint: str) -> str:
    self._count += 1
    return f"{hint}_{self._count}"

  def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
    """Adds a node; the name of its output, or a list of them."""
    names = [self.name(op.lower()) for _ in range(outputs)]
    self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
    return names[0] if outputs == 1 else names

  def constant(self, array: Any, name: str = "") -> str:
    """The name of a constant; equal ones share it."""
    array = np.asarray(array)
    key = id(array) if array.size >= LARGE else (str(array.dtype), array.shape, array.tobytes())
    if key in self._known:
      return self._known[key]
    self._known[key] = result = name = name or self.name("const")
    self._kept.append(array)
    small = array.astype(ml_dtypes.bfloat16) if self._bfloat16 and array.dtype == np.float32 else array
    if small.dtype != array.dtype and array.size >= LARGE and np.array_equal(small.astype(np.float32), array):
      array = small
      result = self._known[key] = self.name("cast")
      (self._outer or [self.nodes])[0].append(helper.make_node("Cast", [name], [result], to=TensorProto.FLOAT))
    self.initializers[name] = array
    return result

  def ints(self, *values: int) -> str:
    return self.constant(np.array(values, np.int64))

  @contextlib.contextmanager
  def body(self) -> Iterator[list[onnx.NodeProto]]:
    """Nodes that are added meanwhile belong to the body of a loop, which sees all names from outside."""
    self._outer.append(self.nodes)
    self.nodes = []
    try:
      yield self.nodes
    finally:
      self.nodes = self._outer.pop()

  def lazy(self, value: Value) -> str:
    """The name of a value's tensor, broadcasts held back."""
    return value.name if value.const is None else self.constant(value.const)

  def full(self, value: Value) -> str:
    """The name of a tensor of the value's whole shape."""
    if same(value.actual, value.shape):
      return self.lazy(value)
    if value.const is not None and static(value.shape):
      return self.constant(np.broadcast_to(value.const, value.shape))
    return self.node("Expand", self.lazy(value), self.sizes(value.shape, value.actual))

  def sizes(self, shape: Sequence[Any], known: Sequence[Any] | None = None) -> str:
    """A tensor int64 with the entries of a shape; 1 where `known` has the same entry already."""
    parts: list[Any] = []
    for axis, size in enumerate(shape):
      size = 1 if known is not None and same((known[axis],), (size,)) else size
      if is_int(size):
        parts.append(int(size))
      else:
        factor = batch_factor(size)
        parts.append(self.batch if factor == 1 else self.node("Mul", self.batch, self.ints(factor)))
    if all(isinstance(part, int) for part in parts):
      return self.ints(*parts)
    return self.node("Concat", *(self.ints(p) if isinstance(p, int) else p for p in parts), axis=0)

  def reshape(self, name: str, shape: Sequence[Any]) -> str:
    """A reshape; a symbolic dimension is inferred."""
    symbolic = [size for size in shape if not is_int(size)]
    if len(symbolic) > 1:
      return self.node("Reshape", name, self.sizes(shape))
    return self.node("Reshape", name, self.ints(*(int(size) if is_int(size) else -1 for size in shape)))

  def transpose(self, name: str, order: Sequence[int]) -> str:
    return name if list(order) == list(range(len(order))) else self.node("Transpose", name, perm=list(map(int, order)))

  def cast(self, name: str, dtype: Any) -> str:
    return self.node("Cast", name, to=tensor_type(dtype))


Rule = Callable[[Graph, Any, Sequence[Value]], Any]  # (graph, equation, inputs) to a name, names, or a Value


def is_int(size: Any) -> bool:
  return isinstance(size, (int, np.integer))


def static(shape: Sequence[Any]) -> bool:
  return all(map(is_int, shape))


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
  return len(one) == len(other) and all(
    is_int(a) == is_int(b) and (a is b or a == b) for a, b in zip(one, other, strict=True)
  )


def batch_factor(size: Any) -> int:
  """n of the symbolic dimension n * batch."""
  found = re.fullmatch(r"(?:(\d+)\*)?batch", str(size))
  if not found:
    raise UnsupportedError(f"a tensor of size {size} along one axis has no ONNX form; export with a fixed batch_size")
  return int(found[1] or 1)


def tensor_type(dtype: Any) -> int:
  return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def literal(array: Any) -> Value:
  """A constant."""
  array = (
    array if jax.dtypes.issubdtype(getattr(array, "dtype", np.float32), jax.dtypes.extended) else np.asarray(array)
  )
  return Value(tuple(array.shape), array.dtype, tuple(array.shape), const=array)


def convert(
  closed: Any,
  weights: Mapping[str, np.ndarray],
  evaluate: Callable[[Graph, Any, Sequence[Value]], list[Value]],
  *,
  output: str,
  bfloat16_weights: bool = False,
) -> onnx.ModelProto:
  """The model of a jaxpr whose last argument is the input `images` and whose only result is `output`.

  Args:
    closed: ClosedJaxpr; the arguments before the last one are the weights.
    weights: by name, in the order of the arguments.
    evaluate: adds the equations of a jaxpr, see `onnx_ops.evaluate`.
    output: name of the result.
    bfloat16_weights: weights are stored as bfloat16 and computed with as float32.

  Raises:
    UnsupportedError: a primitive without counterpart.
  """
  graph = Graph(bfloat16_weights)
  images = closed.in_avals[-1]
  if not is_int(images.shape[0]):
    graph.batch = graph.node("Shape", "images", start=0, end=1)
  arguments = [literal(array) for array in weights.values()]
  for name, value in zip(weights, arguments, strict=True):
    if value.const.size >= LARGE:
      graph.constant(value.const, name)
  source = Value(tuple(images.shape), np.dtype(images.dtype), tuple(images.shape), "images")
  (result,) = evaluate(graph, closed, [*arguments, source])
  graph.nodes.append(helper.make_node("Identity", [graph.full(result)], [output]))
  return _model(graph, source, result, output)


def _model(graph: Graph, source: Value, result: Value, output: str) -> onnx.ModelProto:
  nodes, used = [], {output}
  for node in reversed(graph.nodes):  # what nobody reads was computed for reports
    if used & set(node.output):
      nodes.append(node)
      used |= _reads(node)
  tensors = [numpy_helper.from_array(array, name) for name, array in graph.initializers.items() if name in used]
  described = [
    helper.make_tensor_value_info(
      name, tensor_type(value.dtype), [int(s) if is_int(s) else str(s) for s in value.shape]
    )
    for name, value in (("images", source), (output, result))
  ]
  made = helper.make_graph(nodes[::-1], "tokred", described[:1], described[1:], tensors)
  opsets = [helper.make_opsetid("", OPSET)]
  return helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tokred")


def _reads(node: onnx.NodeProto) -> set[str]:
  inner = (attribute.g for attribute in node.attribute if attribute.HasField("g"))
  return set(node.input).union(*({name for n in g.node for name in _reads(n)} for g in inner))
