"""What a trained model leaves behind: a folder with everything that running it needs, checked when it is read.

    exported/
      README.md          the model card, for people
      tokred.json        the same for programs: format version, frozen config and the one it came from, counts, ...
      manifest.json      size and SHA-256 of every file
      params/            the parameters (orbax)
      model.safetensors  the parameters by name, "block_0/attn/qkv/kernel"
      model.stablehlo    the whole model as a function of images, weights included (jax.export)
      model.onnx         likewise, for runtimes without JAX

The folder is written under a temporary name and renamed when it is whole.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import save_file

import tokred
from tokred import checkpoint, files
from tokred.config import complete, nearest
from tokred.export import functions
from tokred.export.card import markdown
from tokred.export.folder import (
  CARD,
  FORMATS,
  FUNCTION,
  GRAPH,
  PARAMS,
  README,
  VERSION,
  WEIGHTS,
  ExportError,
  check_replaceable,
  in_fresh_process,
  read_card,
  replacing,
)
from tokred.export.functions import PLATFORMS, here
from tokred.export.runtime import Exported, Scores, load_exported, load_onnx, load_stablehlo
from tokred.model import Model, Reader, build, freeze
from tokred.pretrained.arrays import read_safetensors
from tokred.reducers import base

__all__ = [
  "CARD",
  "FORMATS",
  "PLATFORMS",
  "VERSION",
  "ExportError",
  "Exported",
  "Scores",
  "check",
  "compare",
  "differences",
  "has_params",
  "load",
  "load_exported",
  "load_onnx",
  "load_stablehlo",
  "read_card",
  "read_config",
  "read_params",
  "save",
  "verify",
]
DTYPES = ("float32", "bfloat16")


def save(
  model: Model,
  directory: str | os.PathLike[str],
  formats: Sequence[str] = ("orbax", "stablehlo"),
  *,
  batch_size: int | None = None,
  platforms: Sequence[str] | None = None,
  dtype: str | None = None,
  preprocess: bool = False,
  accuracy: float | None = None,
  images: np.ndarray | None = None,
  latency: Sequence[dict[str, Any]] = (),
) -> Model:
  """Writes a model; learned rates are frozen first.

  Args:
    model: with parameters.
    directory: must not exist, or be an export, which is replaced.
    formats: any of "orbax" and "safetensors" (parameters), "stablehlo" and "onnx" (functions).
    batch_size: of the functions; None: any (a symbolic dimension).
    platforms: that the StableHLO function shall run on, of "cpu", "cuda", "rocm", "tpu"; None: this one.
    dtype: of activations and stored weights, "float32" or "bfloat16" (ONNX graphs compute in float32); None: as the
      config says, and weights in float32.
    preprocess: functions take uint8 images of the model's size, normalise them and give probabilities.
    accuracy: of the frozen model, for the card.
    images: real ones, (B, height, width, channels) float32 as the model takes them: every format is compared with the
      model in a fresh process before the folder takes its name, and the card tells the largest difference; a StableHLO
      function that is for other platforms alone cannot be.
    latency: rows of `tokred.bench.compare` as dicts, for the card.

  Returns:
    The frozen model, as it was written.

  Raises:
    ValueError: an unknown format, platform or dtype, an argument of functions where there are none, no parameters, or
      a directory that holds something else.
    ExportError: the directory cannot be written, or does not run; what was there before is still there.
  """
  check(directory, formats, batch_size=batch_size, platforms=platforms, dtype=dtype, preprocess=preprocess)
  trained, model, directory = model, freeze(model), Path(directory).absolute()
  source = trained.config
  if model.params is None:
    raise ValueError("the model has no parameters: call model.init(), or get it from tokred.load")
  if isinstance(model, Reader) and {"stablehlo", "onnx"} & set(formats):
    raise ValueError(
      f"formats={tuple(formats)}: a vision-language model is no one function of images; valid: orbax, safetensors, or "
      "tokred.export.generation.save_generation"
    )
  if images is not None and {"orbax", "safetensors"} & set(formats):
    _check_importable(model.config.sites)
  if preprocess and not model.config.model.num_classes:
    raise ValueError("preprocess=True gives probabilities, but config.model.num_classes=0: the model has no head")
  stored = functions.in_dtype(model, dtype) if dtype else model
  stored = dataclasses.replace(stored, params=jax.tree.map(np.asarray, stored.params))
  options = dict(batch_size=batch_size, preprocess=preprocess)
  function = functions.stablehlo(stored, platforms=platforms, **options) if "stablehlo" in formats else None
  graph, opset = functions.onnx(stored, **options) if "onnx" in formats else (None, None)
  card = {
    "version": VERSION,
    "tokred": tokred.__version__,
    "formats": list(formats),
    "counts": list(model.counts),
    "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(model.params)),
    "gflops": model.flops / 1e9,
    "gmacs": model.macs / 1e9,
    "accuracy": accuracy,
    "dtype": dtype or f"{model.config.model.dtype}, weights float32",
    "batch_size": batch_size,
    "preprocess": preprocess,
    "platforms": list(platforms or [here()]),
    "opset": opset,
    "latency": list(latency),
    "config": stored.config.to_dict(),
    "source_config": source.to_dict(),
  }
  checkpoint.quieten_orbax()
  with replacing(directory) as temporary:
    _write_params(temporary, stored.params, formats)
    if function is not None:
      (temporary / FUNCTION).write_bytes(function)
    if graph is not None:
      functions.write_onnx(graph, temporary / GRAPH)
    _describe(temporary, card)
    if images is not None:
      card["verified"] = {"images": len(images), "formats": _verify(temporary, images, trained(images).logits)}
      _describe(temporary, card)
  return model if dtype is None else in_memory(stored)


def check(
  directory: str | os.PathLike[str],
  formats: Sequence[str],
  *,
  batch_size: int | None = None,
  platforms: Sequence[str] | None = None,
  dtype: str | None = None,
  preprocess: bool = False,
) -> None:
  """What `save` checks before it begins; for programs that have long work to do before.

  Raises:
    ValueError: see `save`.
  """
  for field, names, valid in (("formats", formats, FORMATS), ("platforms", platforms or PLATFORMS, PLATFORMS)):
    if isinstance(names, str) or not names:
      raise ValueError(f"{field}={names!r} must be a list of names; valid: {', '.join(valid)}")
    for name in names:
      if name not in valid:
        raise ValueError(f"{field} has {name!r}; {nearest('cuda' if name == 'gpu' else name, valid)}")
  if batch_size is not None and (not isinstance(batch_size, (int, np.integer)) or batch_size < 1):
    raise ValueError(f"batch_size={batch_size!r}; valid: 1 or more, or None for any")
  if dtype not in (None, *DTYPES):
    raise ValueError(f"dtype={dtype!r}; {nearest(dtype, DTYPES)}")
  for field, value in dict(batch_size=batch_size, preprocess=preprocess or None, platforms=platforms).items():
    takers = ("stablehlo",) if field == "platforms" else ("stablehlo", "onnx")
    if value is not None and not set(takers) & set(formats):
      raise ValueError(
        f"{field}={value!r} is of a function, and formats={','.join(formats)} has none; leave it out, or add "
        f"{' or '.join(takers)}"
      )
  check_replaceable(Path(directory).absolute())
  if "onnx" in formats:
    functions.check_onnx()


def _check_importable(sites: ConfigDict) -> None:
  """A fresh process imports modules, but neither scripts nor notebooks."""
  for name, site in sites.items():
    for reducer in (site.reducer,) if isinstance(site.reducer, str) else site.reducer:
      if base.get(reducer).__module__ == "__main__":
        raise ValueError(
          f"sites.{name}.reducer={reducer!r} is written in a script or notebook, which the fresh process that compares "
          "images cannot import; valid: a module of its own, formats without parameters, or no images"
        )


def in_memory(model: Model) -> Model:
  """With float32 parameters, as `load` gives them."""
  return dataclasses.replace(model, params=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model.params))


def _write_params(directory: Path, params: Any, formats: Sequence[str]) -> None:
  if "orbax" in formats:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      checkpointer.save(directory / PARAMS, args=ocp.args.PyTreeSave(params))
  if "safetensors" in formats:
    save_file(traverse_util.flatten_dict(params, sep="/"), directory / WEIGHTS, {"format": "tokred"})
    (directory / WEIGHTS).chmod(0o644)  # as the other files: it comes readable for its owner alone


def _describe(directory: Path, card: dict[str, Any]) -> None:
  (directory / CARD).write_text(json.dumps(card, indent=2) + "\n")
  (directory / README).write_text(markdown(card))
  files.write_manifest(directory)


def has_params(directory: str | os.PathLike[str]) -> bool:
  """Whether an export holds parameters, or functions only."""
  return bool({"orbax", "safetensors"} & set(read_card(directory)["formats"]))


def read_config(directory: str | os.PathLike[str]) -> ConfigDict:
  """The frozen config of an export."""
  return complete(read_card(directory)["config"])


def read_params(directory: str | os.PathLike[str], format: str | None = None) -> Any:
  """Parameters of an export as a nested dict of float32 numpy arrays; `format` is "orbax", "safetensors" or None."""
  card = read_card(directory, format)
  format = format or next((name for name in ("orbax", "safetensors") if name in card["formats"]), None)
  if format is None:
    raise ExportError(f"{directory} holds no parameters; it holds: {', '.join(card['formats'])}")
  if format == "safetensors":
    params = traverse_util.unflatten_dict(read_safetensors(Path(directory) / WEIGHTS), sep="/")
  else:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      params = checkpointer.restore(Path(directory).absolute() / PARAMS)
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)


def load(directory: str | os.PathLike[str], format: str | None = None) -> Model | Exported:
  """The model of an export.

  Args:
    directory: the export.
    format: "orbax" or "safetensors" for a Model, run by tokred's own code; "stablehlo" or "onnx" for what runs from
      its artefact.  None: the first of these that the export holds.

  Raises:
    FileNotFoundError: there is no export.
    ExportError: it is damaged, of a newer tokred, or does not hold the format.
  """
  card = read_card(directory, format)
  format = format or next(name for name in ("orbax", "safetensors", "stablehlo", "onnx") if name in card["formats"])
  if format in ("stablehlo", "onnx"):
    return load_exported(directory, format)
  return in_memory(dataclasses.replace(build(complete(card["config"])), params=read_params(directory, format)))


def compare(directory: str | os.PathLike[str], images: np.ndarray, logits: np.ndarray) -> dict[str, dict[str, float]]:
  """Each format against given logits, by its name; a StableHLO function for other platforms is left out.

  Returns:
    difference: the largest absolute one, of the logits, or of the probabilities where the function gives these;
    agreement: the share of images whose first class is the same.
  """
  card, out = read_card(directory), {}
  for name in card["formats"]:
    if name == "stablehlo" and here() not in card["platforms"]:
      continue
    model = load(directory, name)
    found, wanted = model(images), np.asarray(logits)
    if isinstance(model, Exported) and card.get("preprocess"):
      found, wanted = np.asarray(found.probabilities), np.asarray(jax.nn.softmax(jnp.asarray(wanted)))
    else:
      found = np.asarray(found.logits)
    agreement = np.mean(found.argmax(-1) == wanted.argmax(-1))
    out[name] = {"difference": float(np.abs(found - wanted).max()), "agreement": float(agreement)}
  return out


def differences(directory: str | os.PathLike[str], images: np.ndarray, logits: np.ndarray) -> dict[str, float]:
  """The largest difference of each format, see `compare`."""
  return {name: found["difference"] for name, found in compare(directory, images, logits).items()}


def verify(directory: str | os.PathLike[str], images: np.ndarray, logits: np.ndarray) -> dict[str, float]:
  """`differences`, computed in a fresh process.

  Raises:
    ExportError: the export does not run there.
  """
  return {name: found["difference"] for name, found in _verify(directory, images, logits).items()}


def _verify(directory: str | os.PathLike[str], images: np.ndarray, logits: Any) -> dict[str, dict[str, float]]:
  found = in_fresh_process("tokred.export", directory, images=images, logits=np.asarray(logits))
  for name, values in found.items():
    if not np.isfinite(values["difference"]):
      raise ExportError(f"{directory}: {name} gives values that are not finite")
  return found
