"""Weights that others wrote: read into our parameter tree from Hugging Face directories, timm's files and .npz files of
vision_transformer and big_vision, and written back as Hugging Face directories.

A table of rows (rules.py) renames every array and turns it into our layout; then both trees are compared by name, and
anything that is missing or left over is an error that lists both sides.  Parameters of reducers (`.../reduce/...`) are
expected absentees: a dense model never had them.  Arrays are read one at a time, straight to the devices where they
belong.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokred.pretrained.arrays import PICKLES, read_safetensors
from tokred.pretrained.big_vision import open_big_vision
from tokred.pretrained.hub import find
from tokred.pretrained.huggingface import open_huggingface
from tokred.pretrained.reader import ReaderSource, open_reader
from tokred.pretrained.rules import ANEW, Lazy, compare, merge, translate
from tokred.pretrained.source import Source
from tokred.pretrained.timm import open_timm
from tokred.pretrained.vlm import KINDS
from tokred.pretrained.write import save_huggingface, with_sites

__all__ = [
  "ANEW",
  "Lazy",
  "Source",
  "compare",
  "load_timm",
  "merge",
  "open_source",
  "read_safetensors",
  "save_huggingface",
  "translate",
]  # fmt: skip


def open_source(path: str | os.PathLike[str]) -> Source | ReaderSource:
  """What lies at a path: a directory of transformers or timm, a safetensors file in timm's names, or an .npz file.

  Nothing but headers is read.

  Raises:
    FileNotFoundError: nothing is there, or a file is missing.
    ValueError: a damaged or refused file, or an architecture that tokred does not have.
  """
  path = find(path)
  if path.is_file() or path.suffix in (".safetensors", ".npz", *PICKLES):
    return open_big_vision(path) if path.suffix == ".npz" else open_timm(path)
  file = path / "config.json"
  if not file.is_file():
    reason = "it has no config.json" if path.exists() else "nothing is there"
    raise FileNotFoundError(f"{path} is no run directory, export or file of weights, nor a directory of them: {reason}")
  try:
    config = json.loads(file.read_text())
  except ValueError as error:
    raise ValueError(f"{file} is damaged ({error}); fetch it again") from None
  if not isinstance(config, Mapping) or not {"model_type", "architecture"} & config.keys():
    raise ValueError(f"{file} names neither transformers' model_type nor timm's architecture; fetch it again")
  if "architecture" in config and "model_type" not in config:
    return open_timm(path, config)
  if config["model_type"] in KINDS:
    return open_reader(path)
  return with_sites(open_huggingface(path, config), path)


def load_timm(path: str | os.PathLike[str], params_like: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of a ViT from a timm state dict.

  Args:
    path: safetensors file with timm's names: `cls_token`, `blocks.0.attn.qkv.weight`, ...; linear layers are
      (out, in) and convolutions OIHW.
    params_like: the model's parameters, concrete or abstract (`jax.eval_shape` of its init).

  Returns:
    The tree of `params_like`, in its dtypes and NamedShardings; parameters of reducers are those of `params_like`.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a pickle, a damaged file, or names or shapes that do not match.
  """
  source = open_timm(Path(path))
  try:
    return merge(params_like, source.arrays(params_like, new_heads=False))
  except ValueError as error:
    raise ValueError(f"weights {str(path)!r} do not fit config.model: {error}") from None
