"""From sources to batches on the device.

A batch is a pure function of the config and its number: the examples at the places [number * global batch, ...) of
an endless order, each changed by a generator made from (seed, place). So the position in the data is one integer,
whatever the number of workers; any batch can be made again; and the global batch is the same however many processes
share it (with mixup or cutmix, if their shares are even). grain runs that function ahead, in a thread or in worker
processes.
"""

import collections
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from tokred.data import augment, batches, images
from tokred.data.batches import Batch
from tokred.data.sources import Source, open_source


def train_batches(
  config_data: ConfigDict,
  *,
  image_size: tuple[int, int],
  channels: int,
  num_classes: int,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> "TrainBatches":
  """Endless shuffled, augmented batches of this process's share.

  Epochs follow one another without a gap: every example comes once in an epoch, in another order each time, and a
  batch may hold the end of one and the beginning of the next.

  Args:
    config_data: `config.data`.
    image_size: (height, width) that the model takes.
    channels: that the model takes, 1 or 3.
    num_classes: of the model.
    batch_size: examples of this process in a batch.
    seed: of order and augmentation, not negative.
    process_index: of this process.
    process_count: processes that share each global batch.

  Returns:
    Iterator of batches: image float32 (batch, height, width, channels), label int32 (batch,), and with mixup or
    cutmix on, target float32 (batch, class); label is then that of the image before mixing.

  Raises:
    ValueError: a field of `config.data` out of its range, or a data set that does not fit the model.
  """
  check(config_data, channels)
  if seed < 0:
    raise ValueError(f"config.seed={seed}; valid: 0 or more")
  source = open_source(config_data, config_data.train_split, "train_split")
  _check_classes(config_data, source, num_classes)
  resize = not config_data.random_resized_crop  # which resizes by itself
  batch_at = batches.TrainBatch(
    examples=batches.read_examples(config_data, source, image_size, channels, resize=resize),
    changes=augment.changes(config_data, image_size),
    mean_std=batches.mean_std(config_data, channels),
    mixing=(config_data.mixup, config_data.cutmix),
    num_classes=num_classes,
    batch_size=batch_size,
    seed=seed,
    process=(process_index, process_count),
  )
  return TrainBatches(batch_at, config_data.num_workers)


def eval_batches(
  config_data: ConfigDict,
  split: str,
  *,
  image_size: tuple[int, int],
  channels: int,
  num_classes: int,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> "EvalBatches":
  """All examples of a split, once, in their order, without augmentation.

  Args and errors are those of `train_batches`; `split` is in TFDS's split syntax.

  Returns:
    Iterable (again and again; a set in memory is decoded once) of `len()` full batches, as many in every process:
    image and label as in training, mask bool (batch,), False where the last batches are padded with zeros.
  """
  check(config_data, channels)
  source = open_source(config_data, split)
  _check_classes(config_data, source, num_classes)
  batch_at = batches.EvalBatch(
    examples=batches.read_examples(config_data, source, image_size, channels, resize=True),
    mean_std=batches.mean_std(config_data, channels),
    image_shape=(*image_size, channels),
    batch_size=batch_size,
    process=(process_index, process_count),
  )
  num_batches = -(-len(source) // (batch_size * process_count))
  return EvalBatches(batch_at, num_batches, config_data.num_workers, source.label_names)


class TrainBatches:
  """Iterator of training batches whose state is the number of batches that it has yielded."""

  def __init__(self, batch_at: batches.TrainBatch, num_workers: int):
    self._batch_at, self._num_workers = batch_at, num_workers
    self._number = 0
    self._iterator = None

  def __iter__(self) -> "TrainBatches":
    return self

  def __next__(self) -> Batch:
    if self._iterator is None:
      self._iterator = _run_ahead(self._batch_at, self._number, sys.maxsize, self._num_workers)
    batch = next(self._iterator)
    self._number += 1
    return batch

  @property
  def num_examples(self) -> int:
    """Of an epoch, as batches count them: images, or rows, which may hold several conversations."""
    return self._batch_at.identity()["num_examples"]

  @property
  def rows(self) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Of conversations: `Layout.sizes`; of images None."""
    return self._batch_at.layout.sizes() if hasattr(self._batch_at, "layout") else None

  def get_state(self) -> dict[str, int]:
    """What `set_state` needs to go on after the batch that was yielded last; goes into JSON."""
    return {"batches": self._number, **self._batch_at.identity()}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to where `get_state` was called, in any number of processes and workers.

    Raises:
      ValueError: the state is of another seed, data set or global batch size, so that it cannot be gone on from.
    """
    here = self._batch_at.identity()
    wrong = [f"{name}={state.get(name)!r}, here {here[name]!r}" for name in here if state.get(name) != here[name]]
    number = state.get("batches")
    if not isinstance(number, int) or number < 0:
      wrong.append(f"batches={number!r}, valid: 0 or more")
    if wrong:
      raise ValueError(f"state of the data does not fit this run: {'; '.join(wrong)}")
    self.close()
    self._number = number

  def close(self) -> None:
    """Ends thread and workers; the next batch starts them again."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None


@dataclasses.dataclass(frozen=True)
class EvalBatches:
  """Iterable of a split's batches; see `eval_batches`."""

  batch_at: Callable[[int], Batch]
  num_batches: int
  num_workers: int
  label_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return self.num_batches

  def __iter__(self) -> Iterator[Batch]:
    # To gather from memory is faster than to bring batches from another process.
    num_workers = 0 if self.batch_at.examples.in_memory else self.num_workers
    iterator = _run_ahead(self.batch_at, 0, self.num_batches, num_workers)
    try:
      yield from iterator
    finally:
      iterator.close()


def to_device(
  iterator: Iterable[Batch], sharding: jax.sharding.Sharding | None, prefetch: int
) -> Iterator[tuple[dict[str, jax.Array], dict[str, Any] | None]]:
  """Brings batches to the device, `prefetch` of them before they are asked for.

  Args:
    iterator: of batches of this process.
    sharding: of the global batch, whose first axis is that of the examples; None: the default device.
    prefetch: batches kept on the device beside the one in use.

  Yields:
    (batch, state): jax arrays, and the state to save with what was learned from them: that of `iterator` right after
    this batch; None where it has no `get_state`.
  """

  def put(array: np.ndarray) -> jax.Array:
    return jax.device_put(array) if sharding is None else jax.make_array_from_process_local_data(sharding, array)

  ready = collections.deque()
  for batch in iterator:
    state = iterator.get_state() if hasattr(iterator, "get_state") else None
    ready.append(({name: put(array) for name, array in batch.items()}, state))
    if len(ready) > prefetch:
      yield ready.popleft()
  yield from ready


def check(config_data: ConfigDict, channels: int) -> None:
  """Raises ValueError where a field of `config.data` is out of its range; the message says which, and what is valid."""
  at_least_0 = (lambda value: value >= 0, "0 or more")
  share = (lambda value: 0 <= value <= 1, "0 to 1")
  rules = {
    "resize": (lambda value: value in images.RESIZE, ", ".join(images.RESIZE)),
    "crop_fraction": (lambda value: 0 <= value <= 1, "0 to 1"),
    "pad_crop": at_least_0,
    "random_resized_crop": share,
    "randaugment_layers": at_least_0,
    "randaugment_magnitude": (lambda value: 0 <= value <= 10, "0 to 10"),
    "random_erasing": share,
    "mixup": at_least_0,
    "cutmix": at_least_0,
    "num_workers": at_least_0,
    "prefetch": at_least_0,
    "bad_images": (lambda value: value in ("error", "skip"), "error, skip"),
    "std": (lambda value: all(entry > 0 for entry in value), "above 0"),
  }
  for field, (valid, words) in rules.items():
    if not valid(config_data[field]):
      raise ValueError(f"config.data.{field}={config_data[field]!r}; valid: {words}")
  if channels not in (1, 3):
    raise ValueError(f"config.model.channels={channels}; valid: 1, 3")
  batches.mean_std(config_data, channels)


def _check_classes(config_data: ConfigDict, source: Source, num_classes: int) -> None:
  if num_classes != len(source.label_names):
    raise ValueError(
      f"config.model.num_classes={num_classes}: data set {config_data.name} has {len(source.label_names)} classes"
    )


def _run_ahead(batch_at: Callable[[int], Batch], start: int, stop: int, num_workers: int) -> Iterator[Batch]:
  """Batches `start` to `stop` in order, made ahead of their use in a thread or in worker processes."""
  dataset = grain.MapDataset.range(start, stop).map(batch_at)
  if not num_workers:
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
  if not flags.FLAGS.is_parsed():  # grain hands absl's flags to its workers, and jax has defined some
    flags.FLAGS.mark_as_parsed()
  in_worker = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
  options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
  return iter(in_worker.mp_prefetch(options, worker_init_fn=_belong_to_parent))


def _belong_to_parent(worker_index: int, worker_count: int) -> None:
  """Lets the parent alone decide when a worker ends; runs at the start of each.

  Schedulers and terminals signal all processes at once, and a run that saves on SIGTERM may need one more batch; while
  after a SIGKILL of the parent grain's workers would wait for it forever.
  """
  del worker_index, worker_count
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)

  def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()
