"""What a trained model leaves behind: a folder with everything that running it needs, checked when it is read.

    exported/
      tokred.json       format version, frozen config and the one it came from, counts, cost, accuracy
      manifest.json     size and SHA-256 of every file
      params/           the parameters (orbax)
      model.stablehlo   the whole model as a function of images, weights included (jax.export)

The folder is written under a temporary name and renamed when it is whole.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import export as jax_export
from ml_collections import ConfigDict

import tokred
from tokred import checkpoint, files
from tokred.config import complete, nearest
from tokred.model import Model, build, freeze

CARD = "tokred.json"
VERSION = 1  # of the folder's layout
FORMATS = ("orbax", "stablehlo")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PARAMS, FUNCTION = "params", "model.stablehlo"


class ExportError(ValueError):
  """An export that cannot be written, or must not be run."""


def save(
  model: Model,
  directory: str | os.PathLike[str],
  formats: Sequence[str] = FORMATS,
  *,
  batch_size: int | None = None,
  platforms: Sequence[str] | None = None,
  accuracy: float | None = None,
) -> Model:
  """Writes a model; learned rates are frozen first.

  Args:
    model: with parameters.
    directory: must not exist, or be an export, which is replaced.
    formats: any of "orbax" (parameters and config) and "stablehlo".
    batch_size: of the StableHLO function; None: any (a symbolic dimension).
    platforms: that the StableHLO function shall run on, of "cpu", "cuda", "rocm", "tpu"; None: this one.
    accuracy: of the frozen model, for the card.

  Returns:
    The frozen model, as it was written.

  Raises:
    ValueError: an unknown format or platform, no parameters, or a directory that holds something else.
    ExportError: the directory cannot be written; what was there before is still there.
  """
  for field, names, valid in (("formats", formats, FORMATS), ("platforms", platforms or PLATFORMS, PLATFORMS)):
    if isinstance(names, str) or not names:
      raise ValueError(f"{field}={names!r} must be a list of names; valid: {', '.join(valid)}")
    for name in names:
      if name not in valid:
        raise ValueError(f"{field} has {name!r}; {nearest(name, valid)}")
  if batch_size is not None and batch_size < 1:
    raise ValueError(f"batch_size={batch_size}; valid: 1 or more, or None for any")
  source, model, directory = model.config, freeze(model), Path(directory).absolute()
  if model.params is None:
    raise ValueError("the model has no parameters: call model.init(), or get it from tokred.load")
  _check_replaceable(directory)
  params = jax.tree.map(np.asarray, model.params)
  function = _stablehlo(model, params, batch_size, platforms) if "stablehlo" in formats else None
  card = {
    "version": VERSION,
    "tokred": tokred.__version__,
    "formats": list(formats),
    "counts": list(model.counts),
    "gflops": model.flops / 1e9,
    "gmacs": model.macs / 1e9,
    "accuracy": accuracy,
    "config": model.config.to_dict(),
    "source_config": source.to_dict(),
  }
  checkpoint.quieten_orbax()
  temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
  replaced = temporary.with_suffix(".old")
  try:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if "orbax" in formats:
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(temporary / PARAMS, args=ocp.args.PyTreeSave(params))
    if function is not None:
      (temporary / FUNCTION).write_bytes(function)
    (temporary / CARD).write_text(json.dumps(card, indent=2) + "\n")
    files.write_manifest(temporary)
    if directory.exists():
      os.replace(directory, replaced)
    os.replace(temporary, directory)
  except Exception as error:  # a full disk is an OSError of ours, and of other types within orbax
    if replaced.exists() and not directory.exists():
      os.replace(replaced, directory)
    raise ExportError(f"{directory} cannot be written: {files.reason(error)}") from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
  return model


def read_card(directory: str | os.PathLike[str], part: str | None = None) -> dict[str, Any]:
  """What `tokred.json` says, after every file of the export was compared with the manifest.

  Raises:
    FileNotFoundError: there is no export.
    ExportError: a newer layout, a format that it does not hold, or a file that was changed, cut short or lost.
  """
  directory = Path(directory)
  if not (directory / CARD).exists():
    raise FileNotFoundError(f"{directory} is no export: it has no {CARD}")
  try:
    card = json.loads((directory / CARD).read_text())
    version, formats = int(card["version"]), list(card["formats"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ExportError(f"{directory / CARD} is damaged ({error}); export the model again") from error
  if version > VERSION:
    raise ExportError(f"{directory} has layout {version}, this tokred reads up to {VERSION}; upgrade tokred")
  if part is not None and part not in formats:
    raise ExportError(f"{directory} holds no {part!r}; it holds: {', '.join(map(str, formats))}")
  damage = files.find_damage(directory)
  if damage:
    raise ExportError(f"{directory} is damaged: {damage}; export the model again")
  return card


def read_config(directory: str | os.PathLike[str]) -> ConfigDict:
  """The frozen config of an export."""
  return complete(read_card(directory)["config"])


def read_params(directory: str | os.PathLike[str]) -> Any:
  """Parameters of an export as a nested dict of numpy arrays."""
  read_card(directory, "orbax")
  folder = Path(directory).absolute() / PARAMS
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    return jax.tree.map(np.asarray, checkpointer.restore(folder))


def load(directory: str | os.PathLike[str]) -> Model:
  """The model of an export, run by tokred's own code."""
  model = build(read_config(directory))
  return dataclasses.replace(model, params=jax.tree.map(jnp.asarray, read_params(directory)))


def load_stablehlo(directory: str | os.PathLike[str]) -> Callable[[Any], jax.Array]:
  """The exported function: images (B, height, width, channels) float32 to logits (B, classes) float32."""
  read_card(directory, "stablehlo")
  return jax.jit(jax_export.deserialize((Path(directory) / FUNCTION).read_bytes()).call)


def differences(directory: str | os.PathLike[str], images: np.ndarray, logits: np.ndarray) -> dict[str, float]:
  """Largest absolute difference of each format's logits from the given ones, by format."""
  card, out = read_card(directory), {}
  if "orbax" in card["formats"]:
    out["orbax"] = float(np.abs(np.asarray(load(directory)(images).logits) - logits).max())
  if "stablehlo" in card["formats"]:
    out["stablehlo"] = float(np.abs(np.asarray(load_stablehlo(directory)(images)) - logits).max())
  return out


def verify(directory: str | os.PathLike[str], images: np.ndarray, logits: np.ndarray) -> dict[str, float]:
  """`differences`, computed in a fresh process.

  Raises:
    ExportError: the export does not run there.
  """
  with tempfile.TemporaryDirectory() as folder:
    recorded = Path(folder) / "recorded.npz"
    np.savez(recorded, images=images, logits=logits)
    command = [sys.executable, "-m", "tokred.export", str(directory), str(recorded)]
    done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    raise ExportError(f"{directory} does not run in a fresh process: {reason}")
  return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str]) -> None:
  """`python -m tokred.export DIRECTORY FILE.npz`: compares with the `images` and `logits` of the file, prints JSON."""
  directory, file = argv
  with np.load(file) as recorded:
    print(json.dumps(differences(directory, recorded["images"], recorded["logits"])))


def _check_replaceable(directory: Path) -> None:
  if not directory.exists():
    return
  names = {path.name for path in directory.iterdir()} if directory.is_dir() else {"a file"}
  if names and CARD not in names:
    raise ValueError(f"{directory} exists and is no export; choose another folder")
  if others := sorted(names - {CARD, PARAMS, FUNCTION, files.MANIFEST}):
    raise ValueError(f"{directory} is an export, but also holds {', '.join(others)}; choose another folder")


def _stablehlo(model: Model, params: Any, batch_size: int | None, platforms: Sequence[str] | None) -> bytes:
  size = jax_export.symbolic_shape("batch")[0] if batch_size is None else batch_size
  shape = (size, *model.config.model.image_size, model.config.model.channels)
  function = jax.jit(lambda images: model.module.apply({"params": params}, images).logits)
  exported = jax_export.export(function, platforms=platforms or None)(jax.ShapeDtypeStruct(shape, jnp.float32))
  return bytes(exported.serialize())


if __name__ == "__main__":
  main(sys.argv[1:])
