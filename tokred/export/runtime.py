"""Exported functions, run from their files: StableHLO by JAX, ONNX by ONNX Runtime."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import export as jax_export
from ml_collections import ConfigDict

from tokred import memory
from tokred.config import complete
from tokred.data.batches import mean_std, normalise
from tokred.export.folder import FUNCTION, GRAPH, ExportError, read_card
from tokred.export.functions import check_platform


@struct.dataclass
class Scores:
  """What an exported function says of images."""

  logits: Any  # (B, classes) float32; where the function gives probabilities: their logarithms
  probabilities: Any  # (B, classes) float32


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
  """A model that runs from its artefact, without tokred's own code; called as a `tokred.Model` is."""

  config: ConfigDict  # frozen
  card: dict[str, Any]
  format: str  # "stablehlo" or "onnx"
  function: Callable[[Any], Any]  # images as the artefact takes them, to what it gives

  def __repr__(self) -> str:
    m = self.config.model
    return f"Exported({m.name} {m.variant}, {self.format}, batch size: {self.card.get('batch_size') or 'any'})"

  @property
  def counts(self) -> tuple[int, ...]:
    """Tokens leaving each block."""
    return tuple(self.card["counts"])

  @property
  def flops(self) -> float:
    """FLOPs of one image."""
    return self.card["gflops"] * 1e9

  @property
  def macs(self) -> float:
    """Multiply-adds of one image."""
    return self.card["gmacs"] * 1e9

  def __call__(self, images: Any) -> Scores:
    """Classifies.

    Args:
      images: (B, height, width, channels), float32 and normalised as for a `Model`, or uint8; what the artefact does
        not take is converted.  A batch of another size than the artefact's is cut and filled.

    Raises:
      ValueError: images of another shape or dtype.
    """
    wanted = (*self.config.model.image_size, self.config.model.channels)
    if np.ndim(images) != 4 or np.shape(images)[1:] != wanted:
      raise ValueError(f"images of shape {np.shape(images)}; the model takes (batch, {', '.join(map(str, wanted))})")
    images, size = self._as_taken(images), self.card.get("batch_size")
    out = self.function(images) if size in (None, len(images)) else self._in_batches(images, size)
    if self.card.get("preprocess"):
      return Scores(jnp.log(out), out)
    return Scores(out, jax.nn.softmax(out))

  def _as_taken(self, images: Any) -> Any:
    dtype, pixels = np.dtype(images.dtype), self.card.get("preprocess", False)
    if dtype != np.uint8 and not np.issubdtype(dtype, np.floating) and dtype != jnp.bfloat16:
      raise ValueError(f"images of dtype {dtype}; valid: float32 (normalised), uint8")
    mean, std = mean_std(self.config.data, self.config.model.channels)
    if dtype == np.uint8:
      return images if pixels else normalise(np.asarray(images), (mean, std)).astype(np.float32)
    if pixels:
      return np.rint((np.asarray(images, np.float32) * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return images if dtype == np.float32 else images.astype(np.float32)

  def _in_batches(self, images: Any, size: int) -> np.ndarray:
    images, out = np.asarray(images), []
    for start in range(0, len(images), size):
      part = images[start : start + size]
      filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
      out.append(np.asarray(self.function(filled))[: len(part)])
    return np.concatenate(out)


def load_exported(directory: str | os.PathLike[str], format: str) -> Exported:
  """The function of an export; `format` is "stablehlo" or "onnx"."""
  card = read_card(directory, format)
  function = _stablehlo(directory, card) if format == "stablehlo" else _onnx(directory)
  return Exported(complete(card["config"]), card, format, function)


def load_stablehlo(directory: str | os.PathLike[str]) -> Callable[[Any], jax.Array]:
  """The exported function itself: images (B, height, width, channels) to (B, classes) float32.

  Logits of normalised float32, or with `preprocess` probabilities of uint8.
  """
  return _stablehlo(directory, read_card(directory, "stablehlo"))


def load_onnx(directory: str | os.PathLike[str]) -> Callable[[Any], np.ndarray]:
  """The ONNX graph in a session of ONNX Runtime; the same function."""
  read_card(directory, "onnx")
  return _onnx(directory)


def _stablehlo(directory: str | os.PathLike[str], card: dict[str, Any]) -> Callable[[Any], jax.Array]:
  check_platform(directory, card)
  memory.keep_freed()
  return jax.jit(jax_export.deserialize(bytearray((Path(directory) / FUNCTION).read_bytes())).call)


def _onnx(directory: str | os.PathLike[str]) -> Callable[[Any], np.ndarray]:
  try:
    import onnxruntime
  except ImportError:
    raise ExportError(f"{directory} holds ONNX, which needs onnxruntime: pip install 'tokred[onnx]'") from None
  providers = onnxruntime.get_available_providers()
  session = onnxruntime.InferenceSession(str(Path(directory) / GRAPH), providers=providers)
  return lambda images: session.run(None, {"images": np.asarray(images)})[0]
