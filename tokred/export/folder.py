"""The folder of an export: whole or not there, and checked when it is read."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tokred import files, run_dir
from tokred.reducers import base

CARD, README = "tokred.json", "README.md"
LANGUAGE_CARD = "generation.json"  # of a vision-language model, whose functions lie in a folder for each count
VERSION = 2  # of the folder's layout; 1 had no safetensors, ONNX, preprocessing or README
PARAMS, WEIGHTS, FUNCTION, GRAPH = "params", "model.safetensors", "model.stablehlo", "model.onnx"
GRAPH_DATA = "model.onnx.data"  # weights of graphs beyond what one file of protobuf holds
OURS = {CARD, LANGUAGE_CARD, README, PARAMS, WEIGHTS, FUNCTION, GRAPH, GRAPH_DATA, files.MANIFEST, run_dir.WORDS}
FORMATS = ("orbax", "stablehlo", "safetensors", "onnx")


class ExportError(ValueError):
  """An export that cannot be written, or must not be run."""


def check_replaceable(directory: Path) -> None:
  """Raises ValueError where something other than an export would be lost."""
  if not directory.exists():
    return
  names = {path.name for path in directory.iterdir()} if directory.is_dir() else {"a file"}
  if names and not names & {CARD, LANGUAGE_CARD}:
    raise ValueError(f"{directory} exists and is no export; choose another folder")
  if others := sorted(name for name in names - OURS if not (LANGUAGE_CARD in names and name.isdecimal())):
    raise ValueError(f"{directory} is an export, but also holds {', '.join(others)}; choose another folder")


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
  """A temporary folder beside `directory` that takes its place at the end; on any error the old one stays.

  Raises:
    ExportError: what is within, or the renaming, failed; the message is one line and in plain words.
  """
  temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
  replaced = temporary.with_suffix(".old")
  try:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if directory.exists():
      os.replace(directory, replaced)
    os.replace(temporary, directory)
  except Exception as error:  # a full disk is an OSError of ours, and of other types within orbax
    files.remove_unfinished(temporary)
    if isinstance(error, ExportError):
      raise ExportError(str(error).replace(str(temporary), str(directory))) from error
    raise ExportError(f"{directory} cannot be written: {files.reason(error)}") from error
  finally:
    if replaced.exists() and not directory.exists():  # Ctrl-C is no Exception
      os.replace(replaced, directory)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


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


def in_fresh_process(module: str, directory: str | os.PathLike[str], **arrays: Any) -> Any:
  """What `python -m MODULE DIRECTORY FILE.npz` prints as JSON in its last line, in a process of its own.

  Args:
    module: of tokred.export.
    directory: the export.
    arrays: what the file holds, by name.

  Raises:
    ExportError: it failed; the message has the last line of what it said.
  """
  with tempfile.TemporaryDirectory() as folder:
    recorded = Path(folder) / "recorded.npz"
    np.savez(recorded, **arrays)
    # Unfiltered, an error ends with what happened, and not with how JAX has shortened its traceback.
    own = os.environ | {"JAX_TRACEBACK_FILTERING": "off"} | base.fresh()
    command = [sys.executable, "-m", module, str(directory), str(recorded)]
    done = subprocess.run(command, capture_output=True, text=True, env=own)
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    raise ExportError(f"{directory} does not run in a fresh process: {reason}")
  return json.loads(done.stdout.splitlines()[-1])
