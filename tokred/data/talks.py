"""Where conversations about images come from: LLaVA's JSON lines, or a data set of questions in TFDS.

A folder with `<split>.jsonl`, one conversation a line, images relative to the folder:

  {"id": "7", "image": "cats/1.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
   {"from": "gpt", "value": "A cat."}]}

`image` may be a list, or missing; `<image>` stands once in the text for each.  A TFDS data set needs the features
image, question and answer; with a label (ClassLabel) its names are the possible answers.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tokred.data import sources
from tokred.data.folder import read

IMAGE = "<image>"


@dataclasses.dataclass(frozen=True)
class Talk:
  """One conversation."""

  turns: tuple[tuple[str, str], ...]  # (question, answer); the questions hold IMAGE where an image stands
  images: tuple[int, ...]  # indices into the images of its source, in the order of the text
  label: int = -1  # index of the answer among the source's label_names; -1: not one of them
  where: str = ""  # for error messages
  system: str = ""  # said before the first question


@dataclasses.dataclass(frozen=True)
class Talks:
  """The conversations of a split; each image is there once, however many talk about it."""

  talks: list[Talk]
  pictures: sources.Source
  label_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.talks)

  def texts(self) -> list[str]:
    return [text.replace(IMAGE, " ") for talk in self.talks for turn in talk.turns for text in turn]


def open_talks(config_data: ConfigDict, split: str, field: str = "eval_split") -> Talks:
  """The conversations of `split`, without decoding an image.

  Args:
    config_data: `config.data`: with name "conversations" a folder of JSON lines, else a data set of TFDS.
    split: in TFDS's split syntax.
    field: the field of `config.data` that messages name as the origin of `split`.

  Raises:
    ValueError: no such data, split or image file, a line that is not a conversation; the message says which.
  """
  if config_data.name == "conversations":
    found = _folder(config_data.data_dir, split, field)
  else:
    found = _tfds(config_data.name, config_data.data_dir, split, field)
  if not len(found):
    raise ValueError(f"config.data.{field}={split!r}: no examples; valid: a split that is not empty")
  return found


@dataclasses.dataclass(frozen=True)
class Files:
  """Images in files, decoded when asked for."""

  paths: tuple[Path, ...]
  label_names: tuple[str, ...] = ()
  channels: int = 3
  num_skipped: int = 0

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = self.paths[index]
    try:
      return {"image": read(path), "label": 0}
    except (OSError, ValueError, Image.DecompressionBombError) as error:
      raise ValueError(f"{path} cannot be read as an image: {error}") from None

  def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    return [self[index] for index in indices]


@dataclasses.dataclass(frozen=True)
class _Records:
  """Images of a TFDS data set whose records repeat them."""

  records: Any
  first: np.ndarray  # (image,): the record in which each comes first
  label_names: tuple[str, ...]
  channels: int
  num_skipped: int = 0

  def __len__(self) -> int:
    return len(self.first)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.__getitems__([index])[0]

  def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    found = self.records.__getitems__([int(self.first[index]) for index in indices])
    return [{"image": sources._decode(record["image"]), "label": 0} for record in found]


def _tfds(name: str, data_dir: str, split: str, field: str) -> Talks:
  import tensorflow_datasets as tfds

  with sources._quiet():
    builder = sources._builder(name, data_dir, own=("conversations",))
    features = builder.info.features
    for feature in ("image", "question", "answer"):
      if feature not in features:
        raise ValueError(f"config.data.name={name!r}: data set has no {feature}; features: {', '.join(features)}")
    records = sources._records(builder, split, field)
  labelled = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
  names = tuple(features["label"].names) if labelled else ()
  talks, first, known = [], [], {}
  for start in range(0, len(records), 256):
    chosen = range(start, min(start + 256, len(records)))
    for number, record in zip(chosen, records.__getitems__(list(chosen)), strict=True):
      picture = known.setdefault(hashlib.blake2b(record["image"], digest_size=16).digest(), len(known))
      if picture == len(first):
        first.append(number)
      turn = (f"{IMAGE}\n{record['question'].decode()}", record["answer"].decode())
      label = int(record["label"]) if labelled else -1
      talks.append(Talk((turn,), (picture,), label, f"config.data.{field}={split!r}: example {number}"))
  channels = 1 if features["image"].shape[-1] == 1 else 3
  return Talks(talks, _Records(records, np.array(first, np.int64), names, channels), names)


class _Lines(Sequence):
  """Lines of a file that are not blank, with their numbers; read when first needed."""

  def __init__(self, path: Path):
    self.path, self._lines = path, None

  def _read(self) -> list[tuple[int, str]]:
    if self._lines is None:
      try:
        text = self.path.read_text(encoding="utf-8")
      except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{self.path} cannot be read: {error}") from None
      self._lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return self._lines

  def __len__(self) -> int:
    return len(self._read())

  def __getitem__(self, index: Any) -> Any:
    return self._read()[index]


def _folder(data_dir: str, split: str, field: str) -> Talks:
  folder = Path(data_dir).expanduser()
  splits = {path.stem: _Lines(path) for path in sorted(folder.glob("*.jsonl"))} if data_dir else {}
  if not splits:
    raise ValueError(f"config.data.data_dir={data_dir!r} has no <split>.jsonl; valid: a folder of conversations")
  talks, known = [], {}
  for name, part in sources._parts(split, splits, field):
    for number, line in splits[name][part]:
      talks.append(_parse(line, folder, known, f"{splits[name].path}:{number}"))
  return Talks(talks, Files(tuple(known)))


def _parse(line: str, folder: Path, known: dict[Path, int], where: str) -> Talk:
  """One line; images that are new get the next numbers in `known`."""
  try:
    record = json.loads(line)
    said = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    given = record.get("image") or []
  except json.JSONDecodeError as error:
    raise ValueError(f"{where}: not JSON: {error}; valid: one conversation a line") from None
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{where}: not a conversation ({type(error).__name__}: {error}); valid: "
      '{"image": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}'
    ) from None
  system = ""
  if said and said[0][0] == "system":
    system, said = said[0][1], said[1:]
  speakers = [speaker for speaker, _ in said]
  if not said or speakers != ["human", "gpt"] * (len(said) // 2) or not all(isinstance(text, str) for _, text in said):
    raise ValueError(f"{where}: speakers {speakers}; valid: human and gpt in turn, human first, each with a text")
  names = [given] if isinstance(given, str) else given
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise ValueError(f"{where}: image={given!r}; valid: a path or a list of paths")
  questions = said[::2]
  wanted = sum(text.count(IMAGE) for _, text in questions)
  if wanted != len(names):
    raise ValueError(f"{where}: {wanted} times {IMAGE} in the text, but {len(names)} images; valid: as many")
  indices = []
  for name in names:
    path = folder / name
    if path not in known:
      if not path.is_file():
        raise ValueError(f"{where}: image {name!r} is not there; valid: a path relative to {folder}")
      known[path] = len(known)
    indices.append(known[path])
  turns = tuple((question, answer) for (_, question), (_, answer) in zip(questions, said[1::2], strict=True))
  return Talk(turns, tuple(indices), -1, where, str(system))
