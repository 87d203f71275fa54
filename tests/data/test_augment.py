"""Augmentation: what every change must keep, what it must do, and mixing by hand."""

import functools

import numpy as np
import pytest
from PIL import Image

from tokred import config
from tokred.data import augment

CHANGES = {
  "flip": augment.flip,
  "pad_crop": functools.partial(augment.pad_crop, padding=3),
  "random_resized_crop": functools.partial(augment.random_resized_crop, size=(12, 16), least=0.3, method="bilinear"),
  "randaugment": functools.partial(augment.randaugment, layers=2, magnitude=9),
  "random_erasing": functools.partial(augment.random_erasing, probability=0.9),
}


def image_of(channels, size=(12, 16), seed=0):
  return np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CHANGES)
def test_changes(name, channels):
  image = image_of(channels)
  before = image.copy()
  results = [CHANGES[name](image, np.random.default_rng(seed)) for seed in range(20)]
  again = [CHANGES[name](image, np.random.default_rng(seed)) for seed in range(20)]
  for one, other in zip(results, again, strict=True):
    assert one.shape == image.shape and one.dtype == np.uint8
    np.testing.assert_array_equal(one, other)  # the same generator, the same image
  changed = [not np.array_equal(result, image) for result in results]
  assert sum(changed) >= 5
  assert len({result.tobytes() for result in results}) > (1 if name == "flip" else 5)
  np.testing.assert_array_equal(image, before)  # never in place: examples in memory are shared


def test_flip():
  image = image_of(3)
  results = [augment.flip(image, np.random.default_rng(seed)) for seed in range(200)]
  flipped = sum(np.array_equal(result, image[:, ::-1]) for result in results)
  assert flipped + sum(np.array_equal(result, image) for result in results) == 200
  assert 70 < flipped < 130  # 100 +- 4 standard deviations of 7.1


def test_pad_crop_shifts():
  image = image_of(1) | 1  # nowhere black
  seen = set()
  for seed in range(300):
    result = augment.pad_crop(image, np.random.default_rng(seed), padding=2)
    rows, columns = result[..., 0].any(1), result[..., 0].any(0)
    down = int(rows.argmax()) - int(rows[::-1].argmax())
    right = int(columns.argmax()) - int(columns[::-1].argmax())
    inside = image[max(0, -down) : 12 - max(0, down), max(0, -right) : 16 - max(0, right)]
    np.testing.assert_array_equal(result[rows][:, columns], inside)
    seen.add((down, right))
  assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


def test_random_resized_crop_shares():
  # Pixels hold their own place, so that the corners of the result tell which part was taken.
  rows, columns = np.mgrid[0:200, 0:200].astype(np.uint8)
  image = np.stack([rows, columns, rows], -1)
  areas, ratios = [], []
  for seed in range(300):
    result = augment.random_resized_crop(
      image, np.random.default_rng(seed), size=(400, 400), least=0.25, method="nearest"
    ).astype(int)
    height, width = result[-1, 0, 0] - result[0, 0, 0] + 1, result[0, -1, 1] - result[0, 0, 1] + 1
    areas.append(height * width / 200**2)
    ratios.append(width / height)
  assert 0.24 < min(areas) < 0.3 and 0.9 < max(areas) <= 1
  assert 0.73 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.36


@pytest.mark.parametrize("size", [(4, 200), (200, 4), (1, 1)])
def test_random_resized_crop_of_extreme_shapes(size):
  for seed in range(5):
    result = CHANGES["random_resized_crop"](image_of(3, size), np.random.default_rng(seed))
    assert result.shape == (12, 16, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_operations(channels):
  # Not the full range, and more than 255 pixels, so that autocontrast and PIL's equalising do something.
  image = (np.random.default_rng(0).integers(0, 12, (40, 32, channels)) ** 2 + 20).astype(np.uint8)
  picture = Image.fromarray(image[..., 0] if channels == 1 else image)
  assert len(augment.OPERATIONS) == 14
  without_magnitude = (1, 2)  # autocontrast, equalise
  same = (0,) if channels == 3 else (0, 6)  # the identity; grey has no colour to change
  for index, operation in enumerate(augment.OPERATIONS):
    strong = operation(picture, 1.0, 1)
    assert strong.size == picture.size and strong.mode == picture.mode
    assert np.array_equal(np.asarray(strong), np.asarray(picture)) == (index in same)
    if index not in without_magnitude:
      np.testing.assert_array_equal(np.asarray(operation(picture, 0.0, 1)), np.asarray(picture))


def test_randaugment_geometry():
  def moved(index, sign):
    picture = Image.new("L", (21, 21))
    picture.putpixel((10, 10), 255)
    return np.argwhere(np.asarray(augment.OPERATIONS[index](picture, 0.5, sign)) > 60).tolist()

  centre = [[10, 10]]
  assert moved(3, 1) == centre  # rotation about the centre
  assert moved(10, 1) == moved(11, -1) == centre  # shears keep the middle row and column

  def column(index, level, sign):
    # Shift by 0.45 * 20 * level: at level 1/9 one pixel.
    picture = Image.new("L", (20, 20))
    picture.putpixel((10, 10), 255)
    return np.argwhere(np.asarray(augment.OPERATIONS[index](picture, level, sign)) > 200).tolist()

  assert column(12, 1 / 9, 1) == [[10, 9]] and column(12, 1 / 9, -1) == [[10, 11]]
  assert column(13, 1 / 9, 1) == [[9, 10]] and column(13, 1 / 9, -1) == [[11, 10]]


def test_random_erasing():
  image = np.zeros((40, 40, 3), np.uint8)
  erased = [augment.random_erasing(image, np.random.default_rng(seed), probability=0.5) for seed in range(200)]
  shares = [(result.any(-1)).mean() for result in erased if result.any()]
  assert 70 < len(shares) < 130
  assert min(shares) > 0.015 and max(shares) < 0.36
  for seed in range(20):
    assert augment.random_erasing(image, np.random.default_rng(seed), probability=0.0) is image


def test_changes_follow_the_config():
  chosen = config.default().data
  assert augment.changes(chosen, (8, 8)) == ()
  chosen.update(flip=True, pad_crop=2, random_resized_crop=0.5, randaugment_layers=2, random_erasing=0.5)
  names = [getattr(change, "func", change).__name__ for change in augment.changes(chosen, (8, 8))]
  assert names == ["random_resized_crop", "pad_crop", "flip", "randaugment", "random_erasing"]


def batch_of(size, classes=4):
  image = np.arange(size, dtype=np.float32)[:, None, None, None] * np.ones((1, 8, 10, 1), np.float32)
  return image, np.eye(classes, dtype=np.float32)[np.arange(size) % classes]


def test_mixup_by_hand():
  image, target = batch_of(4)
  mixed, soft = augment.mix(image, target, np.random.default_rng(3), mixup=0.4, cutmix=0.0)
  share = soft[0, 0]  # of image 0, which was class 0, with its neighbour of class 1
  assert 0 < share < 1 and mixed.dtype == soft.dtype == np.float32
  # Image 0 is all 0 and image 1 all 1: 0 * share + 1 * (1 - share), and the other way round.
  np.testing.assert_allclose(mixed[0], 1 - share, rtol=1e-6)
  np.testing.assert_allclose(mixed[1], share, rtol=1e-6)
  np.testing.assert_allclose(mixed[2], 2 * share + 3 * (1 - share), rtol=1e-6)
  np.testing.assert_allclose(soft[3], [0, 0, 1 - share, share], atol=1e-7)
  np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-6)


def test_cutmix_by_hand():
  image, target = batch_of(4)
  shares = []
  for seed in range(50):
    mixed, soft = augment.mix(image, target, np.random.default_rng(seed), mixup=0.0, cutmix=1.0)
    taken = mixed[0, ..., 0] == 1  # the pixels of image 1 in image 0
    assert set(np.unique(mixed[0])) <= {0, 1}
    rows, columns = taken.any(1), taken.any(0)
    np.testing.assert_array_equal(taken, np.outer(rows, columns))  # one rectangle
    np.testing.assert_array_equal(mixed[3, ..., 0] == 2, taken)  # the same in every image
    np.testing.assert_allclose(soft[0], [1 - taken.mean(), taken.mean(), 0, 0], atol=1e-6)
    np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-6)
    shares.append(taken.mean())
  assert np.ptp(shares) > 0.5
  np.testing.assert_array_equal(image, batch_of(4)[0])  # not in place


def test_mix_chooses_one_of_two():
  image, target = batch_of(4)
  cut = 0
  for seed in range(100):
    mixed, _ = augment.mix(image, target, np.random.default_rng(seed), mixup=1.0, cutmix=1.0)
    cut += set(np.unique(mixed[0])) <= {0, 1}
  assert 30 < cut < 70


def test_mix_of_an_odd_batch():
  image, target = batch_of(3)
  mixed, soft = augment.mix(image, target, np.random.default_rng(0), mixup=1.0, cutmix=0.0)
  share = soft[2, 2]
  np.testing.assert_allclose(mixed[2], 2 * share, rtol=1e-6)  # with image 0, all 0
  np.testing.assert_allclose(soft[2], [1 - share, 0, share, 0], atol=1e-7)
  alone, soft = augment.mix(image[:1], target[:1], np.random.default_rng(0), mixup=1.0, cutmix=0.0)
  np.testing.assert_allclose(alone, image[:1])
