"""Batches: determinism, resuming, sharding, workers, padding, the way to the device, and every error message."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tokred import config, data
from tokred.data import batches, folder

MODEL = dict(image_size=(8, 8), channels=1, num_classes=10)
TFDS_DIR = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tfds"
needs_tfds = pytest.mark.skipif(not TFDS_DIR.is_dir(), reason=f"no prepared TFDS data sets in {TFDS_DIR}")
EVERYTHING = dict(
  flip=True,
  pad_crop=1,
  random_resized_crop=0.5,
  randaugment_layers=2,
  random_erasing=0.5,
  mixup=0.8,
  cutmix=1.0,
)


def settings(**fields):
  chosen = config.default().data
  chosen.update(fields)
  return chosen


def train(chosen, batch_size=16, seed=0, **process):
  return data.train_batches(chosen, **MODEL, batch_size=batch_size, seed=seed, **process)


def take(iterator, number):
  return list(itertools.islice(iterator, number))


def assert_same(one, other):
  assert len(one) == len(other)
  for left, right in zip(one, other, strict=True):
    assert left.keys() == right.keys()
    for name in left:
      assert left[name].dtype == right[name].dtype
      np.testing.assert_array_equal(left[name], right[name])


def numbered(count):
  """A source whose images tell their own number; it stands in for the digits."""
  pixels = np.zeros((count, 8, 8, 1), np.uint8)
  pixels[:, 0, 0, 0] = np.arange(count) % 256
  pixels[:, 0, 1, 0] = np.arange(count) // 256
  return data.sources.ArraySource(pixels, np.arange(count) % 10, tuple("0123456789"))


def numbers(batch):
  """The inverse of `numbered`, with mean 0 and deviation 1."""
  values = np.rint(batch["image"][:, 0, :2, 0] * 255).astype(int)
  return (values[:, 0] + 256 * values[:, 1]).tolist()


@pytest.fixture
def of_numbers(monkeypatch):
  def replace(count):
    monkeypatch.setattr(data.pipeline, "open_source", lambda *_: numbered(count))
    return settings(mean=(0.0,), std=(1.0,))

  return replace


def test_batch():
  batch = next(train(settings()))
  assert set(batch) == {"image", "label"}
  assert batch["image"].shape == (16, 8, 8, 1) and batch["image"].dtype == np.float32
  assert batch["label"].shape == (16,) and batch["label"].dtype == np.int32
  assert batch["image"].min() == -1 and abs(batch["image"].max() - 1) < 1e-6  # (1 - 0.5) / 0.5
  with_target = next(train(settings(cutmix=1.0)))
  assert with_target["target"].shape == (16, 10) and with_target["target"].dtype == np.float32
  np.testing.assert_array_equal(with_target["label"], batch["label"])
  np.testing.assert_allclose(with_target["target"].sum(-1), 1, rtol=1e-6)


def test_normalisation():
  chosen = settings(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
  image = next(iter(data.eval_batches(chosen, "test[:2]", **{**MODEL, "channels": 3}, batch_size=2)))["image"]
  grey = data.open_source(chosen, "test[:2]")[1]["image"].astype(np.float64) / 255
  for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 1.0)]):
    np.testing.assert_allclose(image[1, ..., channel], (grey[..., 0] - mean) / std, atol=1e-6)


@pytest.mark.parametrize("in_memory", [True, False])
def test_epochs(of_numbers, in_memory):
  chosen = of_numbers(300)
  chosen.in_memory = in_memory
  seen = list(itertools.chain(*(numbers(batch) for batch in take(train(chosen, batch_size=50), 18))))
  epochs = [seen[i : i + 300] for i in range(0, 900, 300)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(300))
  assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])


def test_epochs_follow_without_a_gap(of_numbers):
  seen = list(itertools.chain(*(numbers(batch) for batch in take(train(of_numbers(30), batch_size=8), 15))))
  assert [sorted(seen[i : i + 30]) for i in range(0, 120, 30)] == [list(range(30))] * 4
  large = numbers(next(train(of_numbers(5), batch_size=12)))  # more than an epoch in one batch
  assert sorted(large[:5]) == sorted(large[5:10]) == list(range(5))


def test_deterministic():
  chosen = settings(**EVERYTHING)
  first = take(train(chosen), 3)
  assert_same(first, take(train(chosen), 3))
  other = take(train(chosen, seed=1), 3)
  assert not np.array_equal(first[0]["label"], other[0]["label"])


def test_an_example_is_changed_differently_in_every_epoch(of_numbers):
  chosen = of_numbers(4)
  chosen.randaugment_layers = 1
  chosen.random_erasing = 1.0
  batch = next(train(chosen, batch_size=40))
  assert len({image.tobytes() for image in batch["image"]}) > 30


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume(num_workers):
  chosen = settings(**EVERYTHING, num_workers=num_workers)
  whole = take(train(settings(**EVERYTHING), batch_size=400), 7)  # 1437 / 400: into the second epoch
  first = train(chosen, batch_size=400)
  before = take(first, 3)
  state = json.loads(json.dumps(first.get_state()))
  assert state["batches"] == 3  # what was yielded, not what was made ahead
  going_on = take(first, 2)
  second = train(chosen, batch_size=400)
  second.set_state(state)
  assert second.get_state() == state
  assert_same(take(second, 2), going_on)
  assert_same(before + going_on, whole[:5])  # and the number of workers does not matter
  if not num_workers:  # to start workers takes seconds
    first.set_state(state)  # back, in the middle of its way
    assert_same(take(first, 4), whole[3:])
  first.close()
  second.close()


@needs_tfds
def test_workers_read_files():
  fields = dict(name="fashion_mnist", data_dir=str(TFDS_DIR), in_memory=False)
  model = dict(image_size=(28, 28), channels=1, num_classes=10, batch_size=8)
  with_workers = data.eval_batches(settings(**fields, num_workers=2), "test[:20]", **model)
  assert_same(list(with_workers), list(data.eval_batches(settings(**fields), "test[:20]", **model)))


def running(pid):
  try:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
  except FileNotFoundError:
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of processes in /proc")
def test_workers_end_with_a_killed_parent():
  code = """
import multiprocessing, time
from tokred import config, data
chosen = config.default().data
chosen.num_workers = 1
batches = data.train_batches(chosen, image_size=(8, 8), channels=1, num_classes=10, batch_size=4, seed=0)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""
  parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
  workers = [int(pid) for pid in parent.stdout.readline().split()]
  assert len(workers) == 1 and running(workers[0])
  os.kill(workers[0], signal.SIGTERM)  # as a scheduler does; only the parent decides
  time.sleep(0.2)
  assert running(workers[0])
  parent.kill()
  parent.wait()
  parent.stdout.close()
  deadline = time.monotonic() + 10
  while running(workers[0]) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not running(workers[0])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seed": 1}, "seed=1, here 0"),
    ({"num_examples": 9}, "num_examples=9, here 1437"),
    ({"global_batch_size": 8}, "global_batch_size=8, here 16"),
    ({"batches": -1}, "batches=-1, valid: 0 or more"),
    ({"batches": "3"}, "batches='3', valid: 0 or more"),
  ],
)
def test_state_of_another_run(change, message):
  iterator = train(settings())
  with pytest.raises(ValueError, match=f"state of the data does not fit this run: {message}"):
    iterator.set_state({**iterator.get_state(), **change})
  with pytest.raises(ValueError, match="state of the data does not fit this run: seed=None"):
    iterator.set_state({})


def test_processes_share_the_global_batch():
  chosen = settings(**EVERYTHING)
  whole = take(train(chosen, batch_size=24), 4)
  shares = [take(train(chosen, batch_size=8, process_index=i, process_count=3), 4) for i in range(3)]
  together = [{name: np.concatenate([share[step][name] for share in shares]) for name in whole[0]} for step in range(4)]
  assert_same(together, whole)


def test_processes_are_disjoint(of_numbers):
  chosen = of_numbers(60)
  seen = [
    set(itertools.chain(*(numbers(batch) for batch in take(train(chosen, 10, process_index=i, process_count=2), 3))))
    for i in range(2)
  ]
  assert len(seen[0]) == len(seen[1]) == 30 and seen[0] | seen[1] == set(range(60))


def test_resume_on_another_number_of_processes():
  chosen = settings(**EVERYTHING)
  one = train(chosen, batch_size=16)
  take(one, 2)
  half = train(chosen, batch_size=8, process_index=1, process_count=2)
  half.set_state(one.get_state())
  np.testing.assert_array_equal(next(half)["image"], next(one)["image"][8:])


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("process_count", [1, 3])
def test_evaluation_sees_all_once(of_numbers, process_count, in_memory):
  chosen = of_numbers(70)
  chosen.update(in_memory=in_memory, flip=True, mixup=1.0, randaugment_layers=2)  # of which nothing shows here
  parts = [
    data.eval_batches(chosen, "test", **MODEL, batch_size=8, process_index=i, process_count=process_count)
    for i in range(process_count)
  ]
  lengths = [len(list(part)) for part in parts]
  assert lengths == [len(part) for part in parts] == [-(-70 // (8 * process_count))] * process_count
  seen, padding = [], 0
  for part in parts:
    for batch in part:
      assert batch["image"].shape == (8, 8, 8, 1) and batch["mask"].shape == batch["label"].shape == (8,)
      assert batch["mask"].dtype == bool and set(batch) == {"image", "label", "mask"}
      alive = [number for number, real in zip(numbers(batch), batch["mask"], strict=True) if real]
      seen += alive
      assert [number % 10 for number in alive] == batch["label"][batch["mask"]].tolist()
      padding += int((~batch["mask"]).sum())
      assert not batch["image"][~batch["mask"]].any() and not batch["label"][~batch["mask"]].any()
  assert sorted(seen) == list(range(70)) and padding == sum(lengths) * 8 - 70


def test_evaluation_in_order(of_numbers):
  evaluation = data.eval_batches(of_numbers(20), "test", **MODEL, batch_size=5)
  once = [numbers(batch) for batch in evaluation]
  assert once == [list(range(i, i + 5)) for i in range(0, 20, 5)]
  assert once == [numbers(batch) for batch in evaluation]


def write_photos(directory):
  for split, count in (("train", 6), ("test", 4)):
    for label, name in enumerate("ab"):
      (directory / split / name).mkdir(parents=True)
      for i in range(count):
        Image.new("RGB", (10 + i, 9), (90 * label, 0, 0)).save(directory / split / name / f"{i}.png")


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("fields", [{}, {"random_resized_crop": 0.5, "flip": True}])
def test_folder_of_different_sizes(tmp_path, in_memory, fields):
  write_photos(tmp_path)
  chosen = settings(name="image_folder", data_dir=str(tmp_path), in_memory=in_memory, **fields)
  model = dict(image_size=(8, 12), channels=3, num_classes=2, batch_size=4)
  batch = next(data.train_batches(chosen, **model, seed=0))
  assert batch["image"].shape == (4, 8, 12, 3)
  red = np.array([-1, 90 / 255 / 0.5 - 1])
  np.testing.assert_allclose(batch["image"][..., 0].mean((1, 2)), red[batch["label"]], atol=1e-5)
  total = sum(int(batch["mask"].sum()) for batch in data.eval_batches(chosen, "test", **model))
  assert total == 8


def test_skipped_images_are_never_read(tmp_path):
  write_photos(tmp_path)
  broken = tmp_path / "train" / "a" / "3.png"
  broken.write_bytes(broken.read_bytes()[:40])
  chosen = settings(name="image_folder", data_dir=str(tmp_path), in_memory=False)
  model = dict(image_size=(8, 8), channels=1, num_classes=2, batch_size=11, seed=0)
  with pytest.raises(ValueError, match=r"config\.data\.bad_images='error': 1 of 12 images unreadable: .*3\.png"):
    data.train_batches(chosen, **model)
  chosen.bad_images = "skip"
  epoch = next(data.train_batches(chosen, **model))
  assert np.bincount(epoch["label"]).tolist() == [5, 6]


def test_memory_is_decoded_once(tmp_path, monkeypatch):
  write_photos(tmp_path)
  chosen = settings(name="image_folder", data_dir=str(tmp_path))
  evaluation = data.eval_batches(chosen, "test", image_size=(8, 8), channels=3, num_classes=2, batch_size=4)
  monkeypatch.setattr(folder, "read", None)  # reading now would fail
  assert len(list(evaluation)) == len(list(evaluation)) == 2


def test_too_large_for_memory(monkeypatch):
  monkeypatch.setattr(batches.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}[name])
  with pytest.raises(ValueError, match=r"config\.data\.in_memory=True: the decoded images need about .* GB"):
    train(settings())


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_to_device(prefetch):
  iterator = train(settings())
  wanted = take(train(settings()), 4)
  for step, (batch, state) in enumerate(itertools.islice(data.to_device(iterator, None, prefetch), 4)):
    assert isinstance(batch["image"], jax.Array)
    assert_same([jax.tree.map(np.asarray, batch)], wanted[step : step + 1])
    assert state["batches"] == step + 1  # of this batch, though more are on the device
    assert iterator.get_state()["batches"] == step + 1 + prefetch
  again = train(settings())
  again.set_state(state)
  assert_same(take(again, 1), take(train(settings()), 5)[4:])


def test_to_device_ends_with_the_split():
  evaluation = data.eval_batches(settings(), "test", **MODEL, batch_size=100)
  pairs = list(data.to_device(evaluation, None, 2))
  assert len(pairs) == 4 and all(state is None for _, state in pairs)
  assert sum(int(batch["mask"].sum()) for batch, _ in pairs) == 360


def test_to_device_with_a_sharding():
  devices = np.array(jax.devices())
  mesh = jax.sharding.Mesh(devices, ("data",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  size = 4 * len(devices)
  batch, _ = next(data.to_device(train(settings(mixup=1.0), size), sharding, 2))
  assert batch["image"].sharding.is_equivalent_to(sharding, 4) and batch["target"].shape == (size, 10)
  assert_same([jax.tree.map(np.asarray, batch)], take(train(settings(mixup=1.0), size), 1))


@pytest.mark.parametrize(
  ("field", "value", "valid"),
  [
    ("resize", "cubic", "nearest, bilinear, bicubic, lanczos"),
    ("crop_fraction", -0.1, "0 to 1"),
    ("crop_fraction", 1.2, "0 to 1"),
    ("pad_crop", -1, "0 or more"),
    ("random_resized_crop", 1.5, "0 to 1"),
    ("randaugment_layers", -2, "0 or more"),
    ("randaugment_magnitude", 11, "0 to 10"),
    ("random_erasing", float("nan"), "0 to 1"),
    ("mixup", -0.1, "0 or more"),
    ("cutmix", -1.0, "0 or more"),
    ("num_workers", -1, "0 or more"),
    ("prefetch", -1, "0 or more"),
    ("bad_images", "ignore", "error, skip"),
    ("std", (0.5, 0.0, 0.5), "above 0"),
    ("mean", (0.1, 0.2, 0.3), "one number for all channels, or config.model.channels=1"),
    ("std", (0.1, 0.2), "one number for all channels, or config.model.channels=1"),
  ],
)
def test_field_errors(field, value, valid):
  for make in (train, lambda chosen: data.eval_batches(chosen, "test", **MODEL, batch_size=2)):
    with pytest.raises(ValueError) as error:
      make(settings(**{field: value}))
    assert str(error.value) == f"config.data.{field}={value!r}; valid: {valid}"


def test_model_errors():
  for make in (
    lambda **changed: data.train_batches(settings(), **{**MODEL, **changed}, batch_size=2, seed=0),
    lambda **changed: data.eval_batches(settings(), "test", **{**MODEL, **changed}, batch_size=2),
  ):
    with pytest.raises(ValueError, match=r"^config\.model\.num_classes=1000: data set digits has 10 classes"):
      make(num_classes=1000)
    with pytest.raises(ValueError, match=r"^config\.model\.channels=4; valid: 1, 3$"):
      make(channels=4)
  with pytest.raises(ValueError, match=r"^config\.seed=-1; valid: 0 or more$"):
    train(settings(), seed=-1)
