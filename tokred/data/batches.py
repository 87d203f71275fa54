"""The pure function from the number of a batch to the batch, and the examples that it reads.

These objects travel to worker processes, so they hold plain values only.
"""

import dataclasses
import functools
import os
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from tokred.data import augment, images
from tokred.data.sources import Source

Batch = dict[str, np.ndarray]

# First entries of the seeds, so that the three kinds of generators never meet.
_ORDER, _EXAMPLE, _MIX = range(3)


def mean_std(config_data: ConfigDict, channels: int) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation, float32 (channels,); one entry, or several equal ones, stand for any number of channels."""
  fields = []
  for field in ("mean", "std"):
    value = tuple(config_data[field])
    if len(value) != channels and len(set(value)) == 1:
      value = value[:1] * channels
    if len(value) != channels:
      raise ValueError(
        f"config.data.{field}={value!r}; valid: one number for all channels, or config.model.channels={channels}"
      )
    fields.append(np.array(value, np.float32))
  return fields[0], fields[1]


def read_examples(
  config_data: ConfigDict, source: Source, image_size: tuple[int, int], channels: int, *, resize: bool
) -> "Lazy | Memory":
  """The examples of a source with the channels that the model takes and, with `resize`, its image size."""
  fit = dict(size=tuple(image_size), crop_fraction=config_data.crop_fraction, method=config_data.resize)
  lazy = Lazy(source, channels, fit if resize else None)
  return _load(lazy, config_data.name) if config_data.in_memory else lazy


def _load(lazy: "Lazy", name: str) -> "Memory":
  pixels, labels = [], []
  with tqdm(total=len(lazy), desc=f"decoding {name}", delay=1, leave=False) as bar:
    for start in range(0, len(lazy), 256):
      more, more_labels = lazy.gather(np.arange(start, min(start + 256, len(lazy))))
      pixels.extend(more)
      labels.append(more_labels)
      bar.update(len(more))
      if start == 0:
        _check_fits(sum(image.nbytes for image in more) / len(more) * len(lazy))
  same = len({image.shape for image in pixels}) == 1
  return Memory(np.stack(pixels) if same else pixels, np.concatenate(labels))


def _check_fits(num_bytes: float) -> None:
  """Refuses what the machine cannot hold, twice because the images are stacked at the end."""
  try:
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (AttributeError, ValueError, OSError):  # not every system says
    return
  if 2 * num_bytes > present:
    raise ValueError(
      f"config.data.in_memory=True: the decoded images need about {2 * num_bytes / 1e9:.0f} GB of {present / 1e9:.0f}; "
      "set it to False"
    )


@dataclasses.dataclass(frozen=True)
class Lazy:
  """Examples decoded when asked for, every time."""

  source: Source
  channels: int
  fit: dict[str, Any] | None
  in_memory = False

  def __len__(self) -> int:
    return len(self.source)

  def gather(self, indices: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    examples = self.source.__getitems__(indices.tolist())
    labels = np.array([example["label"] for example in examples], np.int32)
    return [self._prepare(example["image"]) for example in examples], labels

  def _prepare(self, image: np.ndarray) -> np.ndarray:
    image = images.with_channels(image, self.channels)
    return image if self.fit is None else images.fit(image, **self.fit)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Examples decoded and prepared; one array where all have the same size."""

  pixels: np.ndarray | list[np.ndarray]
  labels: np.ndarray
  in_memory = True

  def __len__(self) -> int:
    return len(self.labels)

  def gather(self, indices: np.ndarray) -> tuple[np.ndarray | list[np.ndarray], np.ndarray]:
    one_array = isinstance(self.pixels, np.ndarray)
    return self.pixels[indices] if one_array else [self.pixels[index] for index in indices], self.labels[indices]


@functools.lru_cache(maxsize=2)  # a batch holds the end of one epoch and the beginning of the next
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  return np.random.default_rng((_ORDER, seed, epoch)).permutation(num_examples)


@dataclasses.dataclass(frozen=True)
class TrainBatch:
  """Number of a batch -> this process's share of it; plain values only, since it travels to worker processes."""

  examples: Lazy | Memory
  changes: tuple[augment.Change, ...]
  mean_std: tuple[np.ndarray, np.ndarray]
  mixing: tuple[float, float]
  num_classes: int
  batch_size: int
  seed: int
  process: tuple[int, int]

  def identity(self) -> dict[str, int]:
    """What must be equal for two numbers to mean the same batch."""
    global_batch_size = self.batch_size * self.process[1]
    return {"seed": self.seed, "num_examples": len(self.examples), "global_batch_size": global_batch_size}

  def __call__(self, number: int) -> Batch:
    index, count = self.process
    places = (number * count + index) * self.batch_size + np.arange(self.batch_size)
    pixels, label = self.examples.gather(np.array([self._example_at(place) for place in places.tolist()]))
    if self.changes:
      pixels = [self._change(*pair) for pair in zip(pixels, places.tolist(), strict=True)]
    batch = {"image": normalise(pixels, self.mean_std), "label": label}
    if any(self.mixing):
      target = np.zeros((len(label), self.num_classes), np.float32)
      target[np.arange(len(label)), label] = 1
      rng = np.random.default_rng((_MIX, self.seed, number))
      mixup, cutmix = self.mixing
      batch["image"], batch["target"] = augment.mix(batch["image"], target, rng, mixup=mixup, cutmix=cutmix)
    return batch

  def _example_at(self, place: int) -> int:
    epoch, rank = divmod(place, len(self.examples))
    return _epoch_order(self.seed, epoch, len(self.examples))[rank]

  def _change(self, image: np.ndarray, place: int) -> np.ndarray:
    rng = np.random.default_rng((_EXAMPLE, self.seed, place))
    for change in self.changes:
      image = change(image, rng)
    return image


@dataclasses.dataclass(frozen=True)
class EvalBatch:
  """Number of a batch -> this process's share of it, padded."""

  examples: Lazy | Memory
  mean_std: tuple[np.ndarray, np.ndarray]
  image_shape: tuple[int, int, int]
  batch_size: int
  process: tuple[int, int]

  def __call__(self, number: int) -> Batch:
    index, count = self.process
    places = (number * count + index) * self.batch_size + np.arange(self.batch_size)
    mask = places < len(self.examples)
    image, label = np.zeros((self.batch_size, *self.image_shape), np.float32), np.zeros(self.batch_size, np.int32)
    if mask.any():
      pixels, label[mask] = self.examples.gather(places[mask])
      image[mask] = normalise(pixels, self.mean_std)
    return {"image": image, "label": label, "mask": mask}


def normalise(pixels: np.ndarray | list[np.ndarray], mean_std: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
  """(x / 255 - mean) / std in two passes over the batch: float32 (batch, height, width, channels)."""
  mean, std = mean_std
  image = np.asarray(pixels) * (1 / (255 * std))
  image -= mean / std
  return image
