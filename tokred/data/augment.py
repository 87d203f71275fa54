"""Random changes of training images: per example as (uint8 image, Generator) -> uint8 image, and mixing per batch.

Images are (height, width, 1 or 3). What a change brings in from outside the image is black.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

from tokred.data import images

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def changes(config_data: ConfigDict, image_size: tuple[int, int]) -> tuple[Change, ...]:
  """The per-example changes that `config.data` asks for, in the order in which they are made."""
  chosen = []
  if config_data.random_resized_crop:
    least, method = config_data.random_resized_crop, config_data.resize
    chosen.append(functools.partial(random_resized_crop, size=tuple(image_size), least=least, method=method))
  if config_data.pad_crop:
    chosen.append(functools.partial(pad_crop, padding=config_data.pad_crop))
  if config_data.flip:
    chosen.append(flip)
  if config_data.randaugment_layers:
    layers, magnitude = config_data.randaugment_layers, config_data.randaugment_magnitude
    chosen.append(functools.partial(randaugment, layers=layers, magnitude=magnitude))
  if config_data.random_erasing:
    chosen.append(functools.partial(random_erasing, probability=config_data.random_erasing))
  return tuple(chosen)


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors left and right, every second time."""
  return image[:, ::-1] if rng.random() < 0.5 else image


def pad_crop(image: np.ndarray, rng: np.random.Generator, *, padding: int) -> np.ndarray:
  """A random window of the original size in the image with `padding` black pixels on each side."""
  height, width, channels = image.shape
  top, left = rng.integers(0, 2 * padding, 2, endpoint=True)
  padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), np.uint8)  # np.pad takes ten times as long
  padded[padding:-padding, padding:-padding] = image
  return padded[top : top + height, left : left + width]


def random_resized_crop(
  image: np.ndarray, rng: np.random.Generator, *, size: tuple[int, int], least: float, method: str
) -> np.ndarray:
  """A random part of the image, resized to `size` (Szegedy et al., 2015, arXiv:1409.4842).

  The part has a share of the area drawn from [least, 1] and width / height drawn from [3/4, 4/3], evenly in the
  logarithm. Where ten draws do not fit into the image, it is the largest central part of an allowed shape.
  """
  height, width = image.shape[:2]
  limits = np.log([3 / 4, 4 / 3])
  for _ in range(10):
    area, ratio = height * width * rng.uniform(least, 1), math.exp(rng.uniform(*limits))
    part = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
    if 0 < part[0] <= height and 0 < part[1] <= width:
      top, left = rng.integers(0, height - part[0], endpoint=True), rng.integers(0, width - part[1], endpoint=True)
      break
  else:
    part = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    top, left = (height - part[0]) // 2, (width - part[1]) // 2
  if part == tuple(size):
    return image[top : top + part[0], left : left + part[1]]
  return images.resize(image, size, method, (left, top, left + part[1], top + part[0]))


def randaugment(image: np.ndarray, rng: np.random.Generator, *, layers: int, magnitude: float) -> np.ndarray:
  """`layers` operations drawn from fourteen, at one magnitude of 0 to 10 (Cubuk et al., 2019, arXiv:1909.13719).

  Ranges at 10 are the paper's: rotation 30 degrees, shear 0.3, shift 0.45 of the side, colour, contrast, brightness
  and sharpness 1 +- 0.9, posterising to 4 bits, solarising everything. Each is the identity at magnitude 0, as in
  most later code, but not in the paper, where an enhancement of 0.1 stands there; signs are drawn.
  """
  picture = images.to_picture(np.ascontiguousarray(image))
  for index in rng.integers(len(OPERATIONS), size=layers):
    sign = 1 if rng.random() < 0.5 else -1
    picture = OPERATIONS[index](picture, magnitude / 10, sign)
  return images.to_array(picture)


def random_erasing(image: np.ndarray, rng: np.random.Generator, *, probability: float) -> np.ndarray:
  """Fills a random rectangle with uniform noise, each pixel by itself (Zhong et al., 2017, arXiv:1708.04896).

  The rectangle has 2 % to 33 % of the area (the paper's 40 % is 33 % in the code that the field trains with) and
  height / width drawn from [0.3, 3.3], evenly in the logarithm. Where ten draws do not fit, the image stays.
  """
  if rng.random() >= probability:
    return image
  height, width, channels = image.shape
  for _ in range(10):
    area, ratio = height * width * rng.uniform(0.02, 1 / 3), math.exp(rng.uniform(*np.log([0.3, 1 / 0.3])))
    rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < rows < height and 0 < columns < width:
      top, left = rng.integers(0, height - rows, endpoint=True), rng.integers(0, width - columns, endpoint=True)
      erased = image.copy()
      noise = rng.integers(0, 256, (rows, columns, channels), dtype=np.uint8)
      erased[top : top + rows, left : left + columns] = noise
      return erased
  return image


def mix(
  image: np.ndarray, target: np.ndarray, rng: np.random.Generator, *, mixup: float, cutmix: float
) -> tuple[np.ndarray, np.ndarray]:
  """Mixes every image with its neighbour (0 with 1, 2 with 3, ...), all by the same share.

  One of the two is drawn where both are on. Mixup (Zhang et al., 2017, arXiv:1710.09412) averages the images; CutMix
  (Yun et al., 2019, arXiv:1905.04899) takes one rectangle from the neighbour. Neighbours, and not a permutation of the
  batch, because then a pair is on one process however many there are (if their shares are even): the order is random
  anyway.

  Args:
    image: float32 (batch, height, width, channels); an odd last image is paired with the first.
    target: float32 (batch, class).
    rng: generator of the batch, the same in all processes.
    mixup: alpha of the share's Beta(alpha, alpha); 0: off.
    cutmix: likewise.

  Returns:
    Mixed image and target; the target's share is that of the pixels.
  """
  cut = bool(cutmix) and not (mixup and rng.random() < 0.5)
  share = rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup)
  partner = np.arange(len(image)) ^ 1
  partner[partner == len(image)] = 0
  if not cut:
    return _average(image, image[partner], share), _average(target, target[partner], share)
  rows, columns = _rectangle(image.shape[1:3], 1 - share, rng)
  mixed = image.copy()
  mixed[:, rows, columns] = image[partner, rows, columns]
  pixels = (rows.stop - rows.start) * (columns.stop - columns.start) / (image.shape[1] * image.shape[2])
  return mixed, _average(target, target[partner], 1 - pixels)


def _average(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
  return first * np.float32(share) + second * np.float32(1 - share)


def _rectangle(size: tuple[int, int], area: float, rng: np.random.Generator) -> tuple[slice, slice]:
  """A rectangle of the image's shape with that share of its area, centred anywhere and clipped at the edges."""
  slices = []
  for side in size:
    half, centre = side * math.sqrt(area) / 2, rng.uniform(0, side)
    slices.append(slice(max(0, round(centre - half)), min(side, round(centre + half))))
  return slices[0], slices[1]


def _affine(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
  return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _enhance(enhancer: type, picture: Image.Image, level: float, sign: int) -> Image.Image:
  return enhancer(picture).enhance(1 + 0.9 * level * sign)


# RandAugment's operations: (picture, level 0 to 1, sign -1 or 1) -> picture.
OPERATIONS = (
  lambda picture, level, sign: picture,
  lambda picture, level, sign: ImageOps.autocontrast(picture),
  lambda picture, level, sign: ImageOps.equalize(picture),
  lambda picture, level, sign: picture.rotate(30 * level * sign, Image.Resampling.BILINEAR),
  lambda picture, level, sign: ImageOps.solarize(picture, 256 * (1 - level)),
  lambda picture, level, sign: ImageOps.posterize(picture, 8 - round(4 * level)),
  functools.partial(_enhance, ImageEnhance.Color),
  functools.partial(_enhance, ImageEnhance.Contrast),
  functools.partial(_enhance, ImageEnhance.Brightness),
  functools.partial(_enhance, ImageEnhance.Sharpness),
  # Shears leave the middle row or column where it is.
  lambda picture, level, sign: _affine(
    picture, (1, 0.3 * level * sign, -0.15 * level * sign * picture.height, 0, 1, 0)
  ),
  lambda picture, level, sign: _affine(picture, (1, 0, 0, 0.3 * level * sign, 1, -0.15 * level * sign * picture.width)),
  lambda picture, level, sign: _affine(picture, (1, 0, 0.45 * level * sign * picture.width, 0, 1, 0)),
  lambda picture, level, sign: _affine(picture, (1, 0, 0, 0, 1, 0.45 * level * sign * picture.height)),
)
