"""LLaVA-NeXT's grids by hand, and prompts whose images do not fit."""

import numpy as np
import pytest

from tokred.nn import anyres

PINPOINTS = ((16, 32), (32, 16), (32, 32))


def test_canvas_by_hand():
  """30 x 20 fills 24 x 16 of the tall canvas, 384 pixels, and all its 600 of the large one; 60 x 20: 320 of 16 x 32's
  5 x 16 = 80 and 32 x 10 = 320 in both others, of which the tall one wastes less."""
  assert anyres.resolution((30, 20), PINPOINTS) == (32, 32)
  assert anyres.resolution((60, 20), PINPOINTS) == (32, 16)
  assert anyres.resolution((10, 30), PINPOINTS) == (16, 32)


def test_crops_by_hand():
  """10 x 30 on 16 x 32 of patches of 4: 8 columns are 30 pixels, so 10 are 2.67 rows, that is 2: one of 4 is cut off
  above and below.  After the 16 tokens of the whole come two lines of 8 and a newline each."""
  table, count = anyres.crops((10, 30), PINPOINTS, 16, 4)
  assert count == 16 + 2 * 9
  np.testing.assert_array_equal(table[0], np.arange(16))
  np.testing.assert_array_equal(table[1].reshape(4, 4), [[-1] * 4, [16, 17, 18, 19], [25, 26, 27, 28], [-1] * 4])
  np.testing.assert_array_equal(table[2].reshape(4, 4)[1:3], [[20, 21, 22, 23], [29, 30, 31, 32]])
  assert anyres.crops((10, 30), PINPOINTS, 16, 4, newline=False)[1] == 16 + 2 * 8
  assert anyres.content((30, 10), (8, 4)) == (slice(0, 8), slice(1, 3))  # 2.67 columns are 2


def test_qwen_sizes_by_hand():
  """100 x 57: 112 x 56; 10 x 10 grows to 56 x 56; 4000 x 1000 shrinks by 1.9971, to 2002.9 x 500.7."""
  assert anyres.fitted((100, 57)) == (112, 56)
  assert anyres.fitted((10, 10)) == (56, 56)
  assert anyres.fitted((4000, 1000)) == (1988, 476)
  with pytest.raises(ValueError, match=r"image of 1 x 201 pixels; valid: one side at most 200 times"):
    anyres.fitted((1, 201))


@pytest.mark.parametrize(
  "rows, sizes, message",
  [
    ([[3] * 33], [[(10, 30)]], r"row 0 has 33 placeholders \(id 3\), but its 1 images are 34 tokens"),
    ([[3] * 34], [[]], r"the images of a row have 0 crops; valid: 1 to any number"),
    ([[3] * 34], [], r"sizes of 0 rows for 1 prompts"),
    ([[3] * 34], [[(10, 30)]], None),
  ],
)
def test_placeholders_of_crops(rows, sizes, message):
  call = lambda **room: anyres.crop_slots(rows, sizes, 3, PINPOINTS, 16, 4, **room)
  if message is None:
    assert call(room=5).shape == (1, 5, 16)
    message = r"the images of a row have 3 crops; valid: 1 to 2"
    call = lambda: anyres.crop_slots(rows, sizes, 3, PINPOINTS, 16, 4, room=2)
  with pytest.raises(ValueError, match=message):
    call()
