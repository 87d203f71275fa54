"""Arrays in files by name, read one at a time: safetensors, whole or in shards, and .npz.  No pickle is ever loaded."""

import json
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tokred.pretrained.rules import Lazy

PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt", ".tar")
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SUPPORTED = "float64, float32, float16, bfloat16 (not quantised)"


def open_safetensors(path: Path) -> dict[str, Lazy]:
  """Arrays of a safetensors file, left where they are until they are asked for.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a pickle, a damaged file, or arrays that are not floating point.
  """
  if path.suffix.lower() in PICKLES:
    raise ValueError(_pickle(path))
  if not path.is_file():
    raise FileNotFoundError(f"weights {str(path)!r}: no such file; valid: a .safetensors file")
  try:
    file = safe_open(path, framework="np")
    slices = {name: file.get_slice(name) for name in file.keys()}
    found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
  except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"weights {str(path)!r} are damaged, truncated or not safetensors ({error}); fetch the file again"
    ) from None
  for name, (_, dtype) in found.items():
    if dtype not in DTYPES and not _counter(name):
      raise ValueError(f"weights {str(path)!r}: {name} is {_spelt(dtype)}; valid: {SUPPORTED}")

  def lazy(name: str, shape: tuple[int, ...], dtype: str) -> Lazy:
    return Lazy(shape, np.dtype(DTYPES[dtype]), lambda: file.get_tensor(name))

  return {name: lazy(name, *entry) for name, entry in found.items() if entry[1] in DTYPES}


def _counter(name: str) -> bool:
  """Indices that older files hold beside the weights."""
  return name.rsplit(".", 1)[-1] in ("position_ids", "num_batches_tracked", "relative_position_index")


def _spelt(dtype: str) -> str:
  """A dtype of safetensors as users know it: F8_E4M3 is float8_e4m3, I8 is int8."""
  kind = {"F": "float", "I": "int", "U": "uint"}.get(dtype[0])
  return kind + dtype[1:].lower() if kind else dtype.lower()


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
  """All arrays of a safetensors file by name, in memory; raises as `open_safetensors` does."""
  return {name: array.read() for name, array in open_safetensors(Path(path)).items()}


def read_description(directory: Path) -> tuple[dict[str, Any], str]:
  """What a directory's config.json says, and the file's name for messages.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is no JSON object.
  """
  file = directory / "config.json"
  if not file.is_file():
    raise FileNotFoundError(f"{directory} has no config.json; valid: a directory in the layout of transformers")
  try:
    config = json.loads(file.read_text())
  except ValueError as error:
    raise ValueError(f"{file} is damaged ({error}); fetch it again") from None
  if not isinstance(config, dict):
    raise ValueError(f"{file} is damaged (no object); fetch it again")
  return config, str(file)


def open_directory(directory: Path) -> dict[str, Lazy]:
  """Arrays of a directory: `model.safetensors`, or the shards that its index names.

  Raises:
    FileNotFoundError: no weights, or a shard that is not there.
    ValueError: weights of a kind that is not read, an index or a shard that is damaged, or arrays of a dtype that is
      not supported.
  """
  if (directory / WEIGHTS).is_file():  # transformers leaves the index of older shards beside it
    return open_safetensors(directory / WEIGHTS)
  if not (directory / INDEX).is_file():
    others = sorted(p for p in directory.iterdir() if p.suffix.lower() in (*PICKLES, ".h5", ".msgpack"))
    if others:
      raise ValueError(_pickle(others[0]))
    raise FileNotFoundError(f"{directory} has no weights; valid: {WEIGHTS}, or shards and {INDEX}")
  try:
    places = json.loads((directory / INDEX).read_text())["weight_map"]
    shards = {str(file): {n for n, f in places.items() if f == file} for file in sorted(set(places.values()))}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{directory / INDEX} is damaged ({error!r}); fetch it again") from None
  out: dict[str, Lazy] = {}
  for file, names in shards.items():
    if Path(file).name != file or not (directory / file).is_file():
      raise FileNotFoundError(f"{directory / INDEX} names {file!r}, which is not there; fetch the directory again")
    shard = open_safetensors(directory / file)
    if absent := sorted(name for name in names - shard.keys() if not _counter(name)):
      raise ValueError(f"{directory / file} lacks {absent[0]} and {len(absent) - 1} more of its index; fetch it again")
    out |= {name: shard[name] for name in names if name in shard}
  return out


def open_npz(path: Path) -> dict[str, Lazy]:
  """Arrays of an .npz file; bfloat16, which numpy stores as raw bytes, is recognised.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a damaged file, pickled objects, or arrays that are not floating point.
  """
  if not path.is_file():
    raise FileNotFoundError(f"weights {str(path)!r}: no such file; valid: an .npz file")
  out: dict[str, Lazy] = {}
  try:
    with zipfile.ZipFile(path) as archive:
      for entry in archive.namelist():
        with archive.open(entry) as file:
          version = np.lib.format.read_magic(file)
          header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
          shape, _, dtype = header(file)
        name = entry.removesuffix(".npy")
        if dtype.hasobject:
          raise ValueError(f"{name} is a pickled object, which can run code when read")
        out[name] = _npz_entry(path, name, shape, dtype)
  except (zipfile.BadZipFile, OSError, EOFError, KeyError) as error:
    raise ValueError(
      f"weights {str(path)!r} are damaged, truncated or not .npz ({error}); fetch the file again"
    ) from None
  except ValueError as error:
    raise ValueError(f"weights {str(path)!r}: {error}; valid: an .npz of plain arrays") from None
  return out


def _npz_entry(path: Path, name: str, shape: tuple[int, ...], dtype: Any) -> Lazy:
  kept = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
  if kept not in [np.dtype(d) for d in DTYPES.values()]:
    raise ValueError(f"{name} is {dtype}; {SUPPORTED} are read")

  def read() -> np.ndarray:
    with np.load(path, allow_pickle=False) as file:
      return file[name].view(kept)

  return Lazy(shape, kept, read)


def _pickle(path: Path) -> str:
  """Why a file is refused, and the command that converts it."""
  if path.suffix.lower() in (".h5", ".msgpack"):
    return f"weights {str(path)!r} are not read; valid: {WEIGHTS} (in transformers: model.save_pretrained)"
  return (
    f"weights {str(path)!r} are a pickle, which can run code when read; valid: .safetensors.  To convert a state "
    f"dict: safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), {path.stem + '.safetensors'!r})"
  )
