"""Between files, PIL and uint8 arrays (height, width, channels) with 1 or 3 channels; no randomness here."""

from collections.abc import Callable

import numpy as np
from PIL import Image

RESIZE = {
  "nearest": Image.Resampling.NEAREST,
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
}


def to_array(picture: Image.Image) -> np.ndarray:
  """Pixels of a PIL image of any mode as uint8 (height, width, 1 or 3); transparency is dropped.

  Grey stays one channel, 16-bit grey keeps its upper byte, everything else becomes RGB.
  """
  if picture.mode.startswith("I"):  # convert("L") would clip at 255 instead of scaling
    return (np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8)[..., None]
  if picture.mode in ("1", "L", "LA", "La"):
    return np.asarray(picture.convert("L"))[..., None]
  if "transparency" in picture.info:  # PIL warns where a palette's alpha is dropped in one step
    picture = picture.convert("RGBA")
  return np.asarray(picture.convert("RGB"))


def to_picture(image: np.ndarray) -> Image.Image:
  """PIL image of mode L or RGB from uint8 (height, width, 1 or 3)."""
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
  """The image with 1 channel (luma, ITU-R 601) or 3 (grey repeated)."""
  if image.shape[-1] == channels:
    return image
  return to_array(to_picture(image).convert("RGB" if channels == 3 else "L"))


def resize(image: np.ndarray, size: tuple[int, int], method: str, box: tuple[float, ...] | None = None) -> np.ndarray:
  """Resamples, with antialiasing, to `size` (height, width).

  Args:
    image: uint8 (height, width, channels).
    size: wanted height and width.
    method: a key of RESIZE.
    box: left, top, right, bottom of the part to take, in pixels of `image`; all of it when None.
  """
  return to_array(to_picture(image).resize((size[1], size[0]), RESIZE[method], box))


def fit(
  image: np.ndarray, size: tuple[int, int], crop_fraction: float, method: str, corner: Callable[[float], int] = round
) -> np.ndarray:
  """The view of evaluation: resize until `size / crop_fraction` is just covered, then the central `size`.

  Where `crop_fraction` is 0 nothing is cut off: the whole image is squeezed into `size`.

  Rounding follows what the field trains with: the covering side is floored, the crop is centred by rounding; by another
  rule of its corner where `corner` is given (transformers has math.floor). An image that already has that size is not
  resampled.
  """
  height, width = image.shape[:2]
  if not crop_fraction:
    return image if (height, width) == tuple(size) else resize(image, size, method)
  # The small constants undo float error where a side over the fraction, or times the ratio, should be whole.
  covering = max(int(size[0] / crop_fraction + 1e-6) / height, int(size[1] / crop_fraction + 1e-6) / width)
  resized = (int(height * covering + 1e-6), int(width * covering + 1e-6))
  if resized != (height, width):
    image = resize(image, resized, method)
  top, left = corner((resized[0] - size[0]) / 2), corner((resized[1] - size[1]) / 2)
  return image[top : top + size[0], left : left + size[1]]
