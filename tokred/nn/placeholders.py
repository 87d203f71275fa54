"""Where the patches of images stand among a prompt's ids, told on the host."""

from typing import Any

import numpy as np


def check(ids: np.ndarray, slot: np.ndarray, mask: np.ndarray, image_token: int, newline: bool = False) -> None:
  """Whether patches and placeholders of a batch are the same, but for those of newlines where the model has them.

  Raises:
    ValueError: names the row, and both numbers.
  """
  if slot.ndim != 3 or slot.shape[0] != ids.shape[0]:
    raise ValueError(f"slot of shape {slot.shape} for ids of shape {ids.shape}; valid: (batch, images, patches)")
  for row, (line, there, table) in enumerate(zip(ids, mask, slot, strict=True)):
    wanted = np.flatnonzero(there & (line == image_token))
    given = np.sort(table[table >= 0])
    if newline and len(given) and np.isin(given, wanted).all() and len(np.unique(given)) == len(given):
      continue
    if not np.array_equal(wanted, given):
      raise ValueError(
        f"row {row} has {len(wanted)} placeholders (id {image_token}) and its images {len(given)} tokens"
        + ("; valid: as many, and slot names their places" if len(wanted) != len(given) else " at other places")
      )


def slots(ids: Any, image_token: int, images: int, patches: int) -> np.ndarray:
  """Where patches stand if every image has as many: (B, images, patches) int32.

  Args:
    ids: (B, S) int32.
    image_token: the id of placeholders.
    images: R, room for images of a row.
    patches: N of an image.

  Raises:
    ValueError: a row's placeholders are no multiple of `patches`, or of more images than there is room for.
  """
  ids = np.asarray(ids)
  out = np.full((len(ids), images * patches), -1, np.int32)
  for row, line in enumerate(ids):
    there = np.flatnonzero(line == image_token)
    if len(there) % patches or len(there) > images * patches:
      raise ValueError(
        f"row {row} has {len(there)} placeholders (id {image_token}); valid: {patches} for each of up to {images} "
        "images"
      )
    out[row, : len(there)] = there
  return out.reshape(len(ids), images, patches)
