"""Where examples come from: random access to {"image": uint8 (height, width, 1 or 3), "label": int}.

`open_source` is the only door. All sources know TFDS's split syntax: `train[:90%]`, `train[100:200]`, `train+test`.
"""

import contextlib
import dataclasses
import difflib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from tokred.data import folder, images


class Source(Protocol):
  """What the pipeline reads from; `__getitems__` fetches many at once, which record files do faster."""

  label_names: tuple[str, ...]
  channels: int  # of the images as stored: 1 or 3
  num_skipped: int  # unreadable examples left out

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> dict[str, Any]: ...
  def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class DataInfo:
  """What a data set says of itself; the numbers of examples are those of the configured splits."""

  name: str
  num_classes: int
  label_names: tuple[str, ...]
  num_train: int
  num_eval: int
  channels: int


def describe(config_data: ConfigDict) -> DataInfo:
  """Looks at the data set that `config.data` names, without decoding it.

  Raises:
    ValueError: unknown name or split, missing files, no labels, unreadable images where those are refused.
  """
  train = open_source(config_data, config_data.train_split, "train_split")
  held_out = open_source(config_data, config_data.eval_split, "eval_split")
  names = train.label_names
  return DataInfo(config_data.name, len(names), names, len(train), len(held_out), train.channels)


def label_names(config_data: ConfigDict) -> tuple[str, ...]:
  """Names of the classes: `config.data.labels`, or what the data set is known to say; () where nobody knows.

  Nothing is downloaded.
  """
  if config_data.labels:
    return tuple(config_data.labels)
  try:
    if config_data.name == "digits":
      return tuple(map(str, range(10)))
    if config_data.name == "image_folder":
      return folder.scan(config_data.data_dir)[0]
    with _quiet():
      return tuple(_known(config_data.name, config_data.data_dir).info.features["label"].names)
  except Exception:  # names are a courtesy: without the files of the data set indices must do
    return ()


def open_source(config_data: ConfigDict, split: str, field: str = "eval_split") -> Source:
  """The examples of `split`.

  Args:
    config_data: `config.data`.
    split: in TFDS's split syntax.
    field: the field of `config.data` that error messages shall name as the origin of `split`.

  Raises:
    ValueError: as `describe`; also a split without examples.
  """
  if config_data.name == "digits":
    source = _digits(split, field)
  elif config_data.name == "image_folder":
    source = _image_folder(config_data, split, field)
  else:
    source = _TfdsSource(config_data.name, config_data.data_dir, split, field)
  if not len(source):
    raise ValueError(f"config.data.{field}={split!r}: no examples; valid: a split that is not empty")
  return source


@dataclasses.dataclass(frozen=True)
class ArraySource:
  """Examples that are in memory already: images uint8 (example, height, width, channels), labels (example,)."""

  images: np.ndarray
  labels: np.ndarray
  label_names: tuple[str, ...]
  num_skipped: int = 0

  @property
  def channels(self) -> int:
    return self.images.shape[-1]

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self.images[index], "label": int(self.labels[index])}

  def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    return [self[index] for index in indices]


def _digits(split: str, field: str) -> ArraySource:
  """scikit-learn's handwritten digits, 8x8: a fixed stratified split into 1,437 for training and 360 for testing."""
  from sklearn import datasets, model_selection  # a second to import, and only this source needs it

  digits = datasets.load_digits()
  train, test = model_selection.train_test_split(
    np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
  )
  splits = {"train": train, "test": test}
  chosen = np.concatenate([splits[name][part] for name, part in _parts(split, splits, field)])
  pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]  # ink is 0 to 16
  return ArraySource(pixels, digits.target[chosen], tuple(str(name) for name in digits.target_names))


def _image_folder(config_data: ConfigDict, split: str, field: str) -> folder.FolderSource:
  label_names, splits = folder.scan(config_data.data_dir)
  chosen = tuple(file for name, part in _parts(split, splits, field) for file in splits[name][part])
  files, num_skipped = folder.keep_readable(chosen, config_data.bad_images)
  return folder.FolderSource(files, label_names, num_skipped)


def _parts(split: str, splits: dict[str, Sequence], field: str) -> list[tuple[str, slice]]:
  """Names and slices that a split in TFDS's syntax asks for."""
  import tensorflow_datasets as tfds

  infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[len(x)], num_bytes=0) for name, x in splits.items()}
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
  except ValueError as error:
    raise _split_error(split, splits, field, error) from None
  return [(part.splitname, slice(part.from_, part.to)) for part in parts]


def _split_error(split: str, splits: Sequence[str], field: str, error: Exception) -> ValueError:
  name = sorted(splits, key=lambda name: name != "train")[0]
  return ValueError(
    f"config.data.{field}={split!r}: {_first_line(error)}; valid: {', '.join(splits)}, slices such as {name}[:90%] or "
    f"{name}[100:200], and sums of them"
  )


class _TfdsSource:
  """A data set of TFDS in array_record or another format with random access; read without TensorFlow.

  TFDS hands over the encoded bytes and `images` decodes them: twice as fast, the same pixels whether OpenCV is
  installed or not, and one decoder for all sources.
  """

  num_skipped = 0

  def __init__(self, name: str, data_dir: str, split: str, field: str):
    import tensorflow_datasets as tfds

    with _quiet():
      builder = _builder(name, data_dir)
      features = builder.info.features
      if "image" not in features or "label" not in features:
        missing = "image" if "image" not in features else "label"
        raise ValueError(f"config.data.name={name!r}: data set has no {missing}; features: {', '.join(features)}")
      label, image = features["label"], features["image"]
      if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        raise ValueError(f"config.data.name={name!r}: label is not a class but {label!r}; valid: a ClassLabel")
      if not isinstance(image, tfds.features.Image) or np.dtype(image.np_dtype) != np.uint8:
        raise ValueError(f"config.data.name={name!r}: image is {image!r}; valid: an Image of uint8")
      self._records = _records(builder, split, field)
    self.label_names = tuple(label.names)
    self.channels = 1 if image.shape[-1] == 1 else 3
    if len(self) and not 0 <= self[0]["label"] < len(self.label_names):
      raise ValueError(f"config.data.{field}={split!r}: split of {name} without labels; valid: a labelled split")

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.__getitems__([index])[0]

  def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    records = self._records.__getitems__([int(index) for index in indices])
    return [{"image": _decode(record["image"]), "label": int(record["label"])} for record in records]


def _records(builder: Any, split: str, field: str) -> Any:
  """The records of a split, images encoded."""
  import tensorflow_datasets as tfds

  try:
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    len(records)  # negative, which is an error, where a slice ends before it begins
  except ValueError as error:
    raise _split_error(split, tuple(builder.info.splits), field, error) from None
  return records


def _decode(encoded: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(encoded)) as picture:
    return images.to_array(picture)


def _known(name: str, data_dir: str) -> Any:
  """TFDS's builder of a data set, whether it is prepared or not."""
  import tensorflow_datasets as tfds

  from tokred.data import easy_vqa  # noqa: F401  TFDS knows it from then on

  return tfds.builder(name, **(dict(data_dir=data_dir) if data_dir else dict(file_format="array_record")))


def _builder(name: str, data_dir: str, own: Sequence[str] = ("digits", "image_folder")) -> Any:
  """TFDS's builder of a data set that is prepared: found in `data_dir`, or downloaded where that is empty.

  `own` are the names that the caller knows besides.
  """
  import tensorflow_datasets as tfds

  try:
    builder = _known(name, data_dir)
  except tfds.core.DatasetNotFoundError:
    raise ValueError(f"config.data.name={name!r}: no such data set; {_suggest(name, data_dir, own)}") from None
  except Exception as error:  # an unknown version or configuration, or a data set whose code needs TensorFlow
    raise ValueError(f"config.data.name={name!r}: TFDS cannot open it: {_first_line(error)}") from error
  if not builder.is_prepared():
    if data_dir:
      raise ValueError(
        f"config.data.data_dir={data_dir!r}: {name} is not there; valid: a directory with {name} prepared as "
        "array_record, or '' to let TFDS download it to its own directory"
      )
    try:
      builder.download_and_prepare()
    except Exception as error:
      raise ValueError(f"config.data.name={name!r}: TFDS could not prepare it: {_first_line(error)}") from error
  random_access = tfds.core.file_adapters.FileFormat.with_random_access()
  if builder.info.file_format not in random_access:
    raise ValueError(
      f"config.data.data_dir={data_dir!r}: {name} is there as {builder.info.file_format.value}; "
      f"valid: {', '.join(sorted(known.value for known in random_access))}"
    )
  return builder


def _suggest(name: str, data_dir: str, own: Sequence[str]) -> str:
  """The nearest known names; all of TFDS's would not fit into a line."""
  import tensorflow_datasets as tfds

  local = [entry.name for entry in Path(data_dir).expanduser().glob("*/")] if data_dir else []
  known = [*own, *local, *tfds.list_builders(with_community_datasets=False)]
  close = difflib.get_close_matches(name, known, n=1)
  valid = ", ".join(dict.fromkeys([*own, *sorted(local)]))
  elsewhere = "" if data_dir else ", or with config.data.data_dir, the folder of a data set that is not in it"
  found = f"valid: {valid}, or a name in the catalogue of TFDS{elsewhere}"
  return (f"did you mean {close[0]!r}? " if close else "") + found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
