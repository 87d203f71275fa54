"""Prompts with images of any size, arranged on the host: which placeholder stands for which patch, and its position.

LLaVA-NeXT cuts an image into crops (Liu et al., 2024, LLaVA-NeXT; grids as in LLaVA-1.5-HD, arXiv:2310.03744); Qwen
reads frames of any size and gives their tokens positions on three axes (Wang et al., 2024, arXiv:2409.12191).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokred.nn import qwen_vision
from tokred.nn.qwen_vision import Frames, Shape

Size = tuple[int, int]  # height, width


def resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
  """The canvas of an image: that which shows most of its pixels, and of these the smallest; the first of equals.

  Args:
    size: (height, width) of the image in pixels.
    pinpoints: canvases to choose among, in pixels.
  """

  def shown(canvas: Size) -> tuple[int, int]:
    scale = min(canvas[1] / size[1], canvas[0] / size[0])
    pixels = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
    return pixels, pixels - canvas[0] * canvas[1]

  return max(pinpoints, key=shown)


def content(size: Size, grid: Size) -> tuple[slice, slice]:
  """Rows and columns of a grid of patches that an image of this size covers, resized into its middle."""
  if size[1] / size[0] > grid[1] / grid[0]:
    pad = (grid[0] - int(round(size[0] * (grid[1] / size[1]), 7))) // 2
    return slice(pad, grid[0] - pad), slice(0, grid[1])
  pad = (grid[1] - int(round(size[1] * (grid[0] / size[0]), 7))) // 2
  return slice(0, grid[0]), slice(pad, grid[1] - pad)


def crops(size: Size, pinpoints: Sequence[Size], tile: int, side: int, newline: bool = True) -> tuple[np.ndarray, int]:
  """Where patches of an image's crops stand among its tokens: the whole image first, then the crops line by line.

  Args:
    size: (height, width) of the image in pixels.
    pinpoints: canvases, in pixels.
    tile: pixels along each side of a crop.
    side: patches along it.
    newline: whether a token follows each line of the crops.

  Returns:
    (1 + crops, side x side) int, -1 for what lies in the canvas's margin; tokens of the image, newlines counted.
  """
  canvas = resolution(size, pinpoints)
  rows, columns = canvas[0] // tile, canvas[1] // tile
  table = np.full((rows * side, columns * side), -1)
  inside = content(size, table.shape)
  height, width = table[inside].shape
  line = width + int(newline)
  table[inside] = side * side + np.arange(height)[:, None] * line + np.arange(width)
  table = table.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(rows * columns, side * side)
  return np.concatenate([np.arange(side * side)[None], table]), side * side + height * line


def crop_slots(
  ids: Any, sizes: Sequence[Sequence[Size]], image_token: int, pinpoints: Sequence[Size], tile: int, side: int, *,
  room: int = 0, newline: bool = True,
) -> np.ndarray:  # fmt: skip
  """Where patches of crops stand in their rows' ids, for `VLM`.

  Args:
    ids: (B, S) int32.
    sizes: (height, width) in pixels of the images of each row, in the order of the prompt.
    image_token: the id of placeholders.
    pinpoints: see `crops`; likewise tile, side and newline.
    tile: see above.
    side: see above.
    room: crops of a row, where shapes shall not depend on the images; 0: as many as these need.
    newline: see above.

  Returns:
    (B, R, side x side) int32; -1: nowhere.

  Raises:
    ValueError: a row's placeholders are not as many as its images have tokens, or crops that there is no room for.
  """
  ids = np.asarray(ids)
  if len(sizes) != len(ids):
    raise ValueError(f"sizes of {len(sizes)} rows for {len(ids)} prompts")
  found = [[crops(tuple(size), pinpoints, tile, side, newline) for size in row] for row in sizes]
  need = max(sum(len(table) for table, _ in row) for row in found)
  if not need or (room and need > room):
    raise ValueError(f"the images of a row have {need} crops; valid: 1 to {room or 'any number'}")
  out = np.full((len(ids), room or need, side * side), -1, np.int32)
  for number, (line, row) in enumerate(zip(ids, found, strict=True)):
    there, wanted = np.flatnonzero(line == image_token), sum(count for _, count in row)
    if len(there) != wanted:
      raise ValueError(
        f"row {number} has {len(there)} placeholders (id {image_token}), but its {len(row)} images are {wanted} tokens"
      )
    crop = 0
    for table, count in row:
      own, there = there[:count], there[count:]
      out[number, crop : crop + len(table)] = np.where(table >= 0, own[np.maximum(table, 0)], -1)
      crop += len(table)
  return out


def frames(
  ids: Any, patches: Any, grid_thw: Any, shape: Shape, image_token: int, *, mask: Any = None, video_token: int = -1,
  tokens_per_second: float = 0.0, seconds: Sequence[float] = (), room: int = 0, windows: int = 0, tokens: int = 0,
) -> dict[str, Any]:  # fmt: skip
  """Arguments of `QwenVLM` from what the checkpoint's processor makes of a batch of prompts.

  Args:
    ids: (B, S) int32, with a placeholder for each token of an image.
    patches: (all patches, patch_dim) of all images, in the order of the prompts.
    grid_thw: (K, 3) int patches of each image or video along time, height and width.
    shape: of the tower.
    image_token: the id of placeholders.
    mask: (B, S), nonzero where there is a token; None: everywhere.
    video_token: the id of placeholders in a video.
    tokens_per_second: of the temporal axis in a video (Qwen2.5-VL); 0: its frames are counted (Qwen2-VL).
    seconds: between the frames of each video; (): 1.
    room: frames of a row, where shapes shall not depend on the images; 0: as many as these need.
    windows: of a frame, likewise.
    tokens: of a frame, likewise.

  Returns:
    ids, images, slot, mask and position (B, S, 3), as `QwenVLM` takes them.  Text goes on behind the largest position
    of what stands before it, as the paper says; transformers 5 goes on at a video's larger side, within its frames.

  Raises:
    ValueError: placeholders and grids differ, or there is no room.
  """
  ids = np.asarray(ids)
  mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) > 0
  sizes = [tuple(map(int, grid)) for grid in np.asarray(grid_thw)]
  flat = qwen_vision.arrange(patches, grid_thw, shape, windows=windows, tokens=tokens)
  position, rows, left, waits = np.zeros((*ids.shape, 3), np.int32), [], list(sizes), iter(seconds)
  for number, (line, there) in enumerate(zip(ids, mask, strict=True)):
    own, place, row, start = np.flatnonzero(there), 0, [], 0
    placeholder = np.isin(line[own], (image_token, video_token))
    while place < len(own):
      if not placeholder[place]:
        position[number, own[place]] = start
        start, place = start + 1, place + 1
        continue
      t, h, w = left.pop(0) if left else (0, 0, 0)
      h, w = h // shape.merge, w // shape.merge
      span = own[place : place + t * h * w]
      if not t or len(span) < t * h * w or not placeholder[place : place + len(span)].all():
        raise ValueError(f"row {number}: its placeholders are not as many as grid_thw says ({t} x {h} x {w} tokens)")
      paced = tokens_per_second and line[own[place]] == video_token
      pace = tokens_per_second * next(waits, 1.0) if paced else 1
      axes = np.stack(np.meshgrid((np.arange(t) * pace).astype(int), np.arange(h), np.arange(w), indexing="ij"), -1)
      position[number, span] = start + axes.reshape(-1, 3)
      start, place = int(position[number, span].max()) + 1, place + len(span)
      row += list(span.reshape(t, h * w))
    rows.append(row)
  if left:
    raise ValueError(
      f"grid_thw has {len(sizes)} images, but the prompts have placeholders for {len(sizes) - len(left)}"
    )
  need = max(map(len, rows))
  if room and need > room:
    raise ValueError(f"a prompt has {need} frames; valid: up to {room}")
  slot = np.full((len(ids), room or need, flat.place.shape[1]), -1, np.int32)
  blank = lambda a, fill: np.full((len(ids), room or need, *a.shape[1:]), fill, a.dtype)
  images, first = Frames(*(blank(getattr(flat, f), -1 if f == "place" else 0) for f in FIELDS)), 0
  for number, row in enumerate(rows):
    for index, span in enumerate(row):
      slot[number, index, : len(span)] = span
    for field in FIELDS:
      getattr(images, field)[number, : len(row)] = getattr(flat, field)[first : first + len(row)]
    first += len(row)
  ids = np.where(mask & (ids == video_token), image_token, ids).astype(np.int32)
  return dict(ids=ids, images=images, slot=slot, mask=mask, position=position)


FIELDS = ("patches", "position", "mask", "place")


def pixels(grid: Size, shape: Shape) -> Size:
  """Pixels of a frame of so many rows and columns of tokens."""
  side = shape.patch * shape.merge
  return grid[0] * side, grid[1] * side


def fitted(size: Size, side: int = 28, fewest: int = 3136, most: int = 1003520) -> Size:
  """The size that Qwen's processor gives an image: multiples of `side` pixels, within limits on their number.

  Args:
    size: (height, width) in pixels.
    side: pixels along each side of a token.
    fewest: pixels at least.
    most: pixels at most.

  Raises:
    ValueError: one side is more than 200 times as long as the other.
  """
  h, w = size
  if min(h, w) < 1 or max(h, w) > 200 * min(h, w):
    raise ValueError(f"image of {h} x {w} pixels; valid: one side at most 200 times as long as the other")
  rows, columns = (round(v / side) * side for v in size)
  if rows * columns > most:
    scale = math.sqrt(h * w / most)
    return tuple(max(side, math.floor(v / scale / side) * side) for v in size)
  if rows * columns < fewest:
    scale = math.sqrt(fewest / (h * w))
    return tuple(math.ceil(v * scale / side) * side for v in size)
  return rows, columns
