"""Models and parameters from paths: run directories, exports, weight files."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from tokred import checkpoint, export, pretrained
from tokred.config import complete
from tokred.model import Model, build, init
from tokred.sharding import path_name


def load(path: str | os.PathLike[str], sites: Mapping | None = None, model: Mapping | None = None) -> Model:
  """A model with its parameters.

  Args:
    path: run directory (its last checkpoint, the average where there is one), export, or a file of weights
      (timm's names, .safetensors).
    sites: instead of the saved ones: {} for the dense model, or fields of `config.sites`; parameters of reducers that
      the file does not have are drawn anew.
    model: fields of `config.model` where the file does not say.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: it is damaged, or does not fit the config; the message lists both sides.
  """
  path = Path(path)
  config = read_config(path).to_dict()
  if sites is not None:
    config["sites"] = dict(sites)
  config["model"] = config["model"] | dict(model or {})
  made = build(config)
  target = jax.eval_shape(lambda: init(made.module, made.config.seed))
  saved = {} if path.is_file() else read(path)  # a file of weights knows no reducers
  if any(_is_reducer(name) for name in _flat(target).keys() - _flat(saved).keys()):
    target = init(made.module, made.config.seed)
  params = read(path, target) if path.is_file() else into(target, saved, str(path))
  return dataclasses.replace(made, params=params)


def read_config(path: Path) -> Any:
  """The config that was saved with the parameters of `read`."""
  if (path / export.CARD).exists():
    return export.read_config(path)
  if (path / checkpoint.FOLDER).is_dir():
    found = checkpoint.steps(path / checkpoint.FOLDER)  # the last one's config: its rates may be frozen
    return checkpoint.read_config(path / checkpoint.FOLDER / str(found[-1]) if found else path)
  if path.is_file():
    return complete({})
  raise FileNotFoundError(f"{path} is no run directory, export or file of weights")


def read(path: str | os.PathLike[str], target: Any = None) -> dict[str, Any]:
  """Parameters as a nested dict of numpy arrays; `target` names what a file of weights is to be translated to."""
  path = Path(path)
  if (path / export.CARD).exists():
    return export.read_params(path)
  if path.is_dir():
    return checkpoint.restore_params(path, "ema" if read_config(path).optim.ema else "params")
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist")
  return pretrained.load_timm(path, target)


def into(target: Any, loaded: Any, source: str) -> Any:
  """`loaded` in the structure, dtypes and shardings of `target`.

  Parameters under `reduce/` may be missing on either side: those of the target stay, others are left out.

  Args:
    target: tree of arrays or of ShapeDtypeStructs.
    loaded: nested dict of arrays.
    source: how errors name it.

  Raises:
    ValueError: names or shapes differ; lists both sides.
  """
  wanted, given = _flat(target), _flat(loaded)
  given = {name: array for name, array in given.items() if name in wanted or not _is_reducer(name)}
  try:
    return pretrained.merge(target, given)
  except ValueError as error:
    raise ValueError(f"{source} does not fit config.model: {error}") from None


def _flat(tree: Any) -> dict[str, Any]:
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_reducer(name: str) -> bool:
  return "reduce" in name.split("/")
