"""Which short sequences share a row."""

from collections.abc import Sequence

import numpy as np

_OPEN = 256  # rows that still take sequences; the fullest are closed


def first_fit(lengths: Sequence[int], images: Sequence[int], room: int, image_room: int) -> list[list[int]]:
  """Puts each sequence into the first open row that has room for it, or opens a new one.

  At most 256 rows are open; where there are more, the fullest is closed, so that the work grows with the number of
  sequences and not with its square.

  Args:
    lengths: tokens of each sequence, each at most `room`.
    images: of each sequence, each at most `image_room`.
    room: tokens of a row.
    image_room: images of a row.

  Returns:
    Rows in the order in which they were opened, each a list of indices into `lengths`; every index is in one.
  """
  rows: list[list[int]] = []
  opened = np.zeros(0, np.int64)  # indices of open rows, oldest first
  free, free_images = np.zeros(0, np.int64), np.zeros(0, np.int64)
  for index, (length, count) in enumerate(zip(lengths, images, strict=True)):
    fits = np.flatnonzero((free >= length) & (free_images >= count))
    if len(fits):
      place = fits[0]
      rows[opened[place]].append(index)
    else:
      if len(opened) == _OPEN:
        keep = np.delete(np.arange(_OPEN), free.argmin())
        opened, free, free_images = opened[keep], free[keep], free_images[keep]
      rows.append([index])
      opened = np.append(opened, len(rows) - 1)
      free, free_images = np.append(free, room), np.append(free_images, image_room)
      place = -1
    free[place] -= length
    free_images[place] -= count
  return rows
