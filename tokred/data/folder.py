"""A user's own directory of images: `<split>/<class>/<image>`, or `<class>/<image>` without splits.

Class names in sorted order are the label ids. A directory with none of the folders train, test, val or validation has
one split, "train", with every image: `train[:90%]` and `train[90%:]` divide it. The images of a split stand in the
order of a hash of their path, so that a slice holds every class, and a file that is added moves few others.
"""

import functools
import hashlib
import os
from concurrent import futures
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from absl import logging
from PIL import Image, ImageOps
from tqdm import tqdm

from tokred.data import images

SPLITS = ("train", "test", "val", "validation")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class File(NamedTuple):
  """An image file; size and time are there so that the memory of a check ends when the file changes."""

  path: str
  label: int
  size: int
  modified: int


class FolderSource:
  """Images of one or several splits, decoded when asked for.

  Attributes:
    label_names: class names, by label id.
    channels: of the first image, 1 or 3.
    num_skipped: unreadable images left out.
  """

  def __init__(self, files: tuple[File, ...], label_names: tuple[str, ...], num_skipped: int):
    self.label_names, self.num_skipped = label_names, num_skipped
    self._files = files
    self.channels = read(files[0].path).shape[-1] if files else 3

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> dict:
    return {"image": read(self._files[index].path), "label": self._files[index].label}

  def __getitems__(self, indices: list[int]) -> list[dict]:
    return [self[index] for index in indices]


def scan(data_dir: str) -> tuple[tuple[str, ...], dict[str, tuple[File, ...]]]:
  """Class names, and the files of each split.

  Raises:
    ValueError: no such directory, or no images in folders of classes.
  """
  root = Path(data_dir).expanduser()
  if not data_dir or not root.is_dir():
    raise ValueError(f"config.data.data_dir={data_dir!r}: no such directory; valid: a folder of <class>/<image>")
  present = [name for name in SPLITS if (root / name).is_dir()]
  roots = {name: root / name for name in present} or {"train": root}
  label_names = tuple(
    sorted({folder.name for split in roots.values() for folder in _visible(split) if folder.is_dir()})
  )
  splits = {name: _files(folder, label_names) for name, folder in roots.items()}
  if not any(splits.values()):
    wanted = f"{present[0]}/<class>/<image>" if present else "<class>/<image> or <split>/<class>/<image>"
    raise ValueError(f"config.data.data_dir={data_dir!r}: no images; valid: {wanted} with {', '.join(EXTENSIONS)}")
  return label_names, splits


def keep_readable(files: tuple[File, ...], bad_images: str) -> tuple[tuple[File, ...], int]:
  """The files that can be decoded, and the number of the others.

  Every file is decoded once here (JPEG at an eighth of its size, which reads all of its bytes), so that none stops
  a run later.

  Raises:
    ValueError: an unreadable file, and `bad_images` is "error".
  """
  bad = _unreadable(files)
  if not bad:
    return files, 0
  first = ", ".join(f"{path} ({reason})" for path, reason in list(bad.items())[:3])
  message = f"{len(bad)} of {len(files)} images unreadable: {first}{', ...' if len(bad) > 3 else ''}"
  if bad_images == "error":
    raise ValueError(f"config.data.bad_images='error': {message}; mend or remove them, or set it to 'skip'")
  logging.warning("config.data.bad_images='skip': %s; skipped", message)
  return tuple(file for file in files if file.path not in bad), len(bad)


def read(path: str | os.PathLike | BinaryIO, *, small: bool = False) -> np.ndarray:
  """Decodes an image file to uint8 (height, width, 1 or 3), upright as its EXIF says; `small`: JPEG at an eighth."""
  with Image.open(path) as picture:
    if small:
      picture.draft(picture.mode, (1, 1))
    return images.to_array(ImageOps.exif_transpose(picture))


def _visible(folder: Path) -> list[Path]:
  return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _files(split: Path, label_names: tuple[str, ...]) -> tuple[File, ...]:
  found = []
  for label, name in enumerate(label_names):
    if (split / name).is_dir():
      paths = [path for path in _visible(split / name) if path.suffix.lower() in EXTENSIONS]
      stats = [path.stat() if path.exists() else path.lstat() for path in paths]  # a broken link is a bad image
      found += [File(str(p), label, s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)]
  return tuple(sorted(found, key=lambda file: _place(Path(file.path).relative_to(split))))


def _place(path: Path) -> bytes:
  return hashlib.sha256(path.as_posix().encode()).digest()


@functools.lru_cache(maxsize=8)  # describing, training and evaluation ask for the same splits
def _unreadable(files: tuple[File, ...]) -> dict[str, str]:
  def problem(file: File) -> str:
    try:
      read(file.path, small=True)
    except Exception as error:  # PIL's decoders raise nearly every type
      return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""

  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without the GIL
    problems = list(tqdm(pool.map(problem, files), "checking images", len(files), delay=2, leave=False))
  return {file.path: reason for file, reason in zip(files, problems, strict=True) if reason}
