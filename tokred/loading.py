"""Models and parameters from paths: run directories, exports, weights that others wrote."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from ml_collections import ConfigDict

from tokred import checkpoint, export, lora, pretrained, run_dir
from tokred.config import complete
from tokred.export.folder import LANGUAGE_CARD
from tokred.model import Model, build, init
from tokred.nn.vit import shape
from tokred.pretrained.source import SILENT, SIZES
from tokred.sharding import path_name


def load(
  path: str | os.PathLike[str], sites: Mapping | None = None, model: Mapping | None = None
) -> Model | export.Exported:
  """A model with its parameters; of an export without them, what runs its function (`tokred.export.Exported`).

  Args:
    path: run directory (its last checkpoint, the average where there is one), export, or weights: a directory in the
      layout of transformers or timm, a file in timm's names (.safetensors) or of big_vision (.npz), or, where nothing
      of that name lies here, a name on Hugging Face, such as "google/vit-base-patch16-224".
    sites: instead of the saved ones: {} for the dense model, or fields of `config.sites`; parameters of reducers that
      the file does not have are drawn anew.
    model: fields of `config.model` instead of the saved ones, or where files of weights do not tell.  Of such files,
      positions are resized for another `image_size`, the patch kernel for another patch, and the head is drawn anew for
      other `num_classes`, with a warning.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: it is damaged, or does not fit the config; the message lists both sides.
  """
  if (Path(path) / export.CARD).exists() and not export.has_params(path):
    if sites is not None or model:
      raise ValueError(f"{path} is a function without parameters: it takes no other sites or model; export orbax too")
    return export.load(path)
  source = _source(path)
  if model is not None and not isinstance(model, (Mapping, ConfigDict)):
    raise ValueError(f"model={model!r} must be a dict of fields of config.model, such as dict(num_classes=10)")
  model = dict(model or {})
  config = read_config(path).to_dict() if source is None else source.config(model)
  if sites is not None:
    config["sites"] = sites
  config["model"] = config["model"] | model
  made = build(config)
  target = jax.eval_shape(lambda: init(made.module, made.config.seed))
  saved = _flat(read(path)) if source is None else source.arrays(target, _grid(made.config.model))
  anew = [name for name, array in saved.items() if array is pretrained.ANEW]
  if anew or any(_is_reducer(name) for name in _flat(target).keys() - saved.keys()):
    target = init(made.module, made.config.seed)
  return dataclasses.replace(made, params=into(target, saved, str(path)))


def _source(path: str | os.PathLike[str]) -> pretrained.Source | None:
  """Files of weights, or None where a run directory or an export lies there."""
  local = Path(path)
  if (local / LANGUAGE_CARD).exists():
    raise ValueError(
      f"{path} is an export of a vision-language model; tokred.export.generation.open_generation runs it, and "
      "python -m tokred.predict asks it"
    )
  if (local / export.CARD).exists() or (local / checkpoint.FOLDER).is_dir():
    return None
  return pretrained.open_source(path)


def read_config(path: str | os.PathLike[str], model: Mapping[str, Any] | None = None) -> Any:
  """The config that was saved with the parameters of `read`, or what files of weights tell of it.

  Args:
    path: as in `load`.
    model: fields of `config.model` that the user gives; files of weights must tell the rest.  None: what they do not
      tell is as in `tokred.config.default()`.
  """
  source = _source(path)
  if source is not None:
    return complete(source.config(model or {}, strict=model is not None))
  path = Path(path)
  if (path / export.CARD).exists():
    return export.read_config(path)
  found = checkpoint.steps(path / checkpoint.FOLDER)  # the last one's config: its rates may be frozen
  config = run_dir.read_config(path / checkpoint.FOLDER / str(found[-1]) if found else path)
  if (path / run_dir.WORDS).exists():
    with config.unlocked():
      config.text.tokenizer = str(path / run_dir.WORDS)
  return config


def read(path: str | os.PathLike[str], target: Any = None, model: Any = None) -> dict[str, Any]:
  """Parameters as a nested dict of arrays.

  Args:
    path: as in `load`.
    target: the parameter tree that files of weights are fitted to; these stay in their files until `into` reads them.
    model: `config.model` of `target`, with which files of weights are compared.  Where both are given, positions, patch
      kernel and head of a run directory or export are fitted as those of such files, and a projector that is of another
      kind than the target's is drawn anew.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: it is damaged, or `model` differs from the files in sizes or in what their arrays do not show
      (activation, ...).
  """
  source = _source(path)
  if source is not None:
    if model is not None:
      source.check(model)
    loaded = source.arrays(target, None if model is None else _grid(model))
    return traverse_util.unflatten_dict(loaded, sep="/")
  path, config = Path(path), read_config(path)
  if (path / export.CARD).exists():
    params = export.read_params(path)
  else:
    params = checkpoint.restore_params(path, "ema" if config.optim.ema else "params")
    params = lora.merge(params, config.lora.alpha)
  if target is None or model is None:
    return params
  own = {name: pretrained.Lazy(a.shape, a.dtype, lambda a=a: a) for name, a in _flat(params).items()}
  told = {field: config.model[field] for field in SILENT}
  told |= {field: getattr(shape(config.model), field) for field in SIZES}
  source = pretrained.Source(str(path), {"model": told}, {}, lambda heads: (), _grid(config.model), own=own)
  source.check(model)
  if model.name == "vlm":
    return traverse_util.unflatten_dict(_projected(own, _flat(target), str(path)), sep="/")
  return traverse_util.unflatten_dict(source.arrays(target, _grid(model)), sep="/")


def _projected(own: dict[str, Any], target: Mapping[str, Any], path: str) -> dict[str, Any]:
  """Arrays of a VLM for one whose projector may be another: that is drawn anew then."""
  parts = lambda names: {name for name in names if name.startswith("projector/")}
  theirs, ours = parts(own), parts(target)
  if theirs == ours:
    return own
  warnings.warn(f"{path} has another projector: ours is drawn anew", stacklevel=4)
  return {name: array for name, array in own.items() if name not in theirs} | dict.fromkeys(ours, pretrained.ANEW)


def _grid(model: Any) -> tuple[int, int]:
  return shape(model).grid


def into(target: Any, loaded: Any, source: str) -> Any:
  """`loaded` in the structure, dtypes and shardings of `target`.

  Parameters under `reduce/` may be missing on either side: those of the target stay, others are left out.

  Args:
    target: tree of arrays or of ShapeDtypeStructs.
    loaded: nested dict of arrays, or a flat one by path.
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
