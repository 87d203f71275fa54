"""From ids and pictures to what a vision-language model takes: ids, images and where their patches stand.

The steps of the checkpoints' own processors in numpy and PIL.  Ids come from a tokenizer, of `data.tokenizers` or the
checkpoint's, with one placeholder for each picture.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokred.data import images as pictures
from tokred.nn import anyres, placeholders
from tokred.pretrained.preprocessing import CLIP, FILES, HALF, preprocessing
from tokred.pretrained.vlm import Files, open_vlm

QWEN_PIXELS = (3136, 1003520)  # where preprocessor_config.json is silent; published ones are not


@dataclasses.dataclass(frozen=True)
class Processor:
  """What a checkpoint does to a picture, and to a prompt."""

  files: Files
  mean: tuple[float, ...]
  std: tuple[float, ...]
  resize: str = "bicubic"
  crop_fraction: float = 1.0  # LLaVA: see config.data.crop_fraction
  pixels: tuple[int, int] = QWEN_PIXELS  # Qwen: fewest and most of a picture

  def __call__(
    self, ids: Sequence[Sequence[int]], images: Sequence[Sequence[np.ndarray]], *, pad: int = 0
  ) -> dict[str, Any]:
    """Arguments of the model, `module.known` and `generate.write` for a batch of prompts.

    Args:
      ids: of each prompt, with one placeholder for each of its pictures; lengths may differ.
      images: of each prompt, uint8 (height, width, 3) of any size.
      pad: the id to fill shorter prompts with, on the left.

    Raises:
      ValueError: no picture at all, one of another kind, or as many as a prompt has no placeholders for.
    """
    counts = [sum(token == self.files.image_token for token in row) for row in ids]
    if len(images) != len(ids) or not any(map(len, images)):
      raise ValueError(
        f"images of {len(images)} prompts, {sum(map(len, images))} in all, for {len(ids)} prompts of ids"
      )
    for number, (row, count) in enumerate(zip(images, counts, strict=True)):
      if len(row) != count:
        raise ValueError(
          f"row {number} has {count} placeholders (id {self.files.image_token}) and {len(row)} images; valid: as many"
        )
      for image in row:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
          raise ValueError(f"row {number} has an image {image.dtype} of shape {image.shape}; valid: uint8 (h, w, 3)")
    kind = self._qwen if self.files.tower else self._llava_next if self.files.pinpoints else self._llava
    return kind(ids, images, pad)

  def _llava(self, ids: Any, images: Any, pad: int) -> dict[str, Any]:
    size = tuple(self.files.model["image_size"])
    view = lambda a: pictures.fit(a, size, self.crop_fraction, self.resize, math.floor)
    made = [[self._normal(view(a)) for a in row] for row in images]
    patches = num_patches(self.files)
    line, mask = self._filled(ids, [[patches] * len(row) for row in images], pad)
    stack = stacked(made, size)
    return dict(
      ids=line, images=stack, slot=placeholders.slots(line, self.files.image_token, stack.shape[1], patches), mask=mask
    )

  def _llava_next(self, ids: Any, images: Any, pad: int) -> dict[str, Any]:
    tile, side = self.files.model["image_size"][0], math.isqrt(num_patches(self.files))
    sizes = [[a.shape[:2] for a in row] for row in images]
    counts = [[anyres.crops(size, self.files.pinpoints, tile, side)[1] for size in row] for row in sizes]
    line, mask = self._filled(ids, counts, pad)
    made = [[crop for a in row for crop in self._crops(a, tile)] for row in images]
    slot = anyres.crop_slots(line, sizes, self.files.image_token, self.files.pinpoints, tile, side)
    return dict(ids=line, images=stacked(made, (tile, tile)), slot=slot, mask=mask)

  def _crops(self, image: np.ndarray, tile: int) -> list[np.ndarray]:
    """The whole image squeezed into a tile, then the tiles of its canvas, row by row."""
    height, width = anyres.resolution(image.shape[:2], self.files.pinpoints)
    scale = (height / image.shape[0], width / image.shape[1])
    if scale[1] < scale[0]:
      size = (min(math.ceil(image.shape[0] * scale[1]), height), width)
    else:
      size = (height, min(math.ceil(image.shape[1] * scale[0]), width))
    room = (height - size[0], width - size[1])
    canvas = np.pad(pictures.resize(image, size, self.resize), (*((r // 2, r - r // 2) for r in room), (0, 0)))
    rows = canvas.reshape(height // tile, tile, width // tile, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    return [self._normal(a) for a in (pictures.resize(image, (tile, tile), self.resize), *rows)]

  def _qwen(self, ids: Any, images: Any, pad: int) -> dict[str, Any]:
    s = self.files.tower
    flat, grids = [], []
    for image in (a for row in images for a in row):
      size = anyres.fitted(image.shape[:2], s.patch * s.merge, *self.pixels)
      a = self._normal(pictures.resize(image, size, self.resize))
      h, w = size[0] // s.patch, size[1] // s.patch
      a = a.reshape(h // s.merge, s.merge, s.patch, w // s.merge, s.merge, s.patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
      a = a.reshape(h * w, 3, 1, s.patch, s.patch).repeat(s.temporal, axis=2)  # a picture is a moment that lasts
      flat.append(a.reshape(h * w, -1))
      grids.append((1, h, w))
    counts = iter(h * w // s.unit for _, h, w in grids)
    line, mask = self._filled(ids, [[next(counts) for _ in row] for row in images], pad)
    return anyres.frames(line, np.concatenate(flat), grids, s, self.files.image_token, mask=mask)

  def _normal(self, image: np.ndarray) -> np.ndarray:
    return ((image / np.float32(255) - np.asarray(self.mean)) / np.asarray(self.std)).astype(np.float32)

  def _filled(self, ids: Any, counts: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Each placeholder as often as its picture has tokens, and shorter prompts filled on the left."""
    rows = [expanded(row, own, self.files.image_token) for row, own in zip(ids, counts, strict=True)]
    line = np.full((len(rows), max(map(len, rows))), pad, np.int32)
    mask = np.zeros(line.shape, bool)
    for to, there, row in zip(line, mask, rows, strict=True):
      to[line.shape[1] - len(row) :], there[line.shape[1] - len(row) :] = row, True
    return line, mask


def open_processor(path: str | os.PathLike[str]) -> Processor:
  """The processor of a directory in the layout of transformers.

  Raises:
    FileNotFoundError, ValueError: see `pretrained.vlm.open_vlm`; or a preprocessor_config.json that is damaged.
  """
  files, directory = open_vlm(path), Path(path)
  size = tuple(files.model.get("image_size", (1, 1)))
  data = preprocessing(directory, size, CLIP if files.tower or "clip" in files.family else HALF)
  data = {key: data[key] for key in ("mean", "std", "resize", "crop_fraction") if key in data}
  file = next((directory / name for name in FILES if (directory / name).is_file()), None)
  own: Mapping[str, Any] = json.loads(file.read_text()) if file else {}
  own = own.get("image_processor", own)
  size = own.get("size") or {}
  limits = (own.get(f"{which}_pixels") or size.get(edge) for which, edge in
            (("min", "shortest_edge"), ("max", "longest_edge")))  # fmt: skip
  if not files.tower:
    return Processor(files, **data)
  return Processor(files, **data, pixels=tuple(v or d for v, d in zip(limits, QWEN_PIXELS, strict=True)))


def num_patches(files: Files) -> int:
  """Patches of an image, or of a crop."""
  patch = int(files.model["variant"].split("/")[1])
  height, width = files.model["image_size"]
  return (height // patch) * (width // patch)


def expanded(ids: Sequence[int], counts: Sequence[int], image_token: int) -> list[int]:
  """Each placeholder as often as its picture has tokens: [1, 9, 2] with counts [3] is [1, 9, 9, 9, 2].

  Raises:
    ValueError: as many placeholders as there are not counts.
  """
  if sum(token == image_token for token in ids) != len(counts):
    raise ValueError(f"{len(counts)} images for {sum(t == image_token for t in ids)} placeholders (id {image_token})")
  left = iter(counts)
  return [token for t in ids for token in ([int(t)] * next(left) if t == image_token else [int(t)])]


def stacked(rows: Sequence[Sequence[np.ndarray]], size: tuple[int, int]) -> np.ndarray:
  """Prepared images of each prompt as one array, (B, R, height, width, 3) float32; zeros where a prompt has fewer.

  Args:
    rows: float32 (height, width, 3) each, all of the size that the tower takes.
    size: that size.

  Raises:
    ValueError: no image at all, or one of another size.
  """
  most = max(map(len, rows), default=0)
  if not most:
    raise ValueError("no prompt has an image: a vision-language model needs one; valid: one or more")
  out = np.zeros((len(rows), most, *size, 3), np.float32)
  for number, row in enumerate(rows):
    for index, image in enumerate(row):
      if image.shape != out.shape[2:]:
        raise ValueError(
          f"image {index} of row {number} has shape {image.shape}, but this tower takes {out.shape[2:]}; resize it"
        )
      out[number, index] = image
  return out
