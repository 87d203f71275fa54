"""A model as one function of images, weights included: StableHLO through `jax.export`, or an ONNX graph."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax import export as jax_export

from tokred.data.batches import mean_std
from tokred.export.folder import GRAPH_DATA, ExportError
from tokred.model import Model, build

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ONE_FILE = 1 << 30  # bytes of weights beyond which an ONNX graph keeps them in a file beside it; protobuf ends at 2 GiB


def here() -> str:
  """Which of PLATFORMS this is."""
  return jax_export.default_export_platform()


def check_platform(directory: Any, card: Mapping[str, Any]) -> None:
  """Raises ExportError where the functions of an export are for other platforms than this one."""
  if here() not in card["platforms"]:
    raise ExportError(f"{directory} was exported for {', '.join(card['platforms'])}, and this is {here()}")


def in_dtype(model: Model, dtype: str) -> Model:
  """The model with activations and stored weights of a dtype."""
  config = model.config.to_dict()
  config["model"]["dtype"] = dtype
  to = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
  return dataclasses.replace(build(config), params=jax.tree.map(lambda leaf: np.asarray(leaf, to), model.params))


def stablehlo(
  model: Model, *, batch_size: int | None = None, platforms: Sequence[str] | None = None, preprocess: bool = False
) -> bytes:
  """The serialised function of images (B, height, width, channels); see `tokred.export.save` for the arguments."""
  run = _function(model, preprocess)
  function = jax.jit(lambda images: run(model.params, images))
  return _with_symbols(
    lambda size: bytes(
      jax_export.export(function, platforms=platforms or None)(_images(model, size, preprocess)).serialize()
    ),
    batch_size,
  )


def onnx(model: Model, *, batch_size: int | None = None, preprocess: bool = False) -> tuple[Any, int]:
  """The ModelProto of the same function, and its operator set.

  With bfloat16 the weights are stored so and computed with in float32: ONNX Runtime has no bfloat16 on CPUs.
  """
  from tokred.export import onnx_graph, onnx_ops  # the extra is optional

  small = model.config.model.dtype == "bfloat16"
  model = in_dtype(model, "float32")
  weights = traverse_util.flatten_dict(model.params, sep="/")
  run = _function(model, preprocess)

  def flat(*arguments: Any) -> jax.Array:
    params = dict(zip(weights, arguments[:-1], strict=True))
    return run(traverse_util.unflatten_dict(params, sep="/"), arguments[-1])

  shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in weights.values()]
  closed = _with_symbols(
    lambda size: onnx_ops.trace(flat, *shapes, _images(model, size, preprocess)),
    batch_size,
  )
  output = "probabilities" if preprocess else "logits"
  graph = onnx_graph.convert(closed, weights, onnx_ops.evaluate, output=output, bfloat16_weights=small)
  return graph, onnx_graph.OPSET


def write_onnx(graph: Any, path: Path) -> None:
  """Writes a ModelProto, its weights in a file beside it where they are many."""
  from onnx import save_model

  apart = sum(tensor.ByteSize() for tensor in graph.graph.initializer) > ONE_FILE
  save_model(graph, str(path), save_as_external_data=apart, location=GRAPH_DATA if apart else None)


def check_onnx() -> None:
  """Raises ExportError where the extra is not installed."""
  try:
    import onnx
    import onnxruntime

    del onnx, onnxruntime
  except ImportError as error:
    raise ExportError(f"formats has 'onnx', which needs {error.name}: pip install 'tokred[onnx]'") from None


def _function(model: Model, preprocess: bool) -> Callable[[Any, Any], jax.Array]:
  """(params, images) to logits, or with `preprocess` to probabilities; float32.

  Attention is written as products: an artefact shall not depend on the kernels of the device that it was made on.
  """
  config = model.config.to_dict()
  config["model"]["attention"] = "matmul"
  module = build(config).module
  mean, std = mean_std(model.config.data, model.config.model.channels)

  def run(params: Mapping[str, Any], images: Any) -> jax.Array:
    if preprocess:
      images = images.astype(jnp.float32) * (1 / (255 * std)) - mean / std
    params = jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.float32), params)  # stored as they are
    logits = module.apply({"params": params}, images).logits.astype(jnp.float32)
    return jax.nn.softmax(logits) if preprocess else logits

  return run


def _images(model: Model, size: Any, preprocess: bool) -> jax.ShapeDtypeStruct:
  shape = (size, *model.config.model.image_size, model.config.model.channels)
  return jax.ShapeDtypeStruct(shape, jnp.uint8 if preprocess else jnp.float32)


def _with_symbols(trace: Callable[[Any], Any], batch_size: int | None) -> Any:
  """What `trace` makes of a batch size, which is a symbol where any is to be taken."""
  if batch_size is not None:
    return trace(batch_size)
  try:
    return trace(jax_export.symbolic_shape("batch")[0])
  except (TypeError, NotImplementedError, jax.errors.JAXTypeError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ValueError(f"batch_size=None: a reducer of config.sites needs a fixed one ({reason})") from error
