"""Sources: splits, the digits, folders of images good and bad, TFDS without TensorFlow, and every error message."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokred import config, data, predict
from tokred.data import folder, images, talks

TFDS_DIR = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tfds"
needs_tfds = pytest.mark.skipif(not TFDS_DIR.is_dir(), reason=f"no prepared TFDS data sets in {TFDS_DIR}")


def settings(**fields):
  chosen = config.default().data
  chosen.update(fields)
  return chosen


def write_images(directory, counts, size=(6, 5), suffix=".png"):
  """One folder a class; image number i of a class is filled with i."""
  for name, count in counts.items():
    (directory / name).mkdir(parents=True)
    for i in range(count):
      Image.new("RGB", size, (i, i, i)).save(directory / name / f"{i}{suffix}")


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_digits():
  info = data.describe(settings())
  assert info == data.DataInfo("digits", 10, tuple("0123456789"), 1437, 360, 1)
  train, test = data.open_source(settings(), "train"), data.open_source(settings(), "test")
  assert train[0]["image"].shape == (8, 8, 1) and train[0]["image"].dtype == np.uint8
  assert max(train[i]["image"].max() for i in range(50)) == 255  # ink 16 of 16
  counts = np.bincount([test[i]["label"] for i in range(360)])
  assert counts.min() >= 34 and counts.max() <= 37  # 360 examples of ten classes, stratified
  assert [train[i]["label"] for i in range(8)] == [data.open_source(settings(), "train")[i]["label"] for i in range(8)]


def test_digits_splits_are_disjoint():
  everything = data.open_source(settings(), "train+test")
  assert len(everything) == 1797
  # The same drawing twice would be one of scikit-learn's own duplicates; it has none.
  assert len({everything[i]["image"].tobytes() for i in range(1797)}) == 1797


@pytest.mark.parametrize(
  ("split", "wanted"),
  [
    ("train[:90%]", range(1293)),  # 1437 * 0.9 = 1293.3
    ("train[90%:]", range(1293, 1437)),
    ("train[100:200]", range(100, 200)),
    ("train[-37:]", range(1400, 1437)),
  ],
)
def test_split_syntax(split, wanted):
  whole, part = data.open_source(settings(), "train"), data.open_source(settings(), split)
  assert len(part) == len(wanted)
  for i in (0, len(part) - 1):
    np.testing.assert_array_equal(part[i]["image"], whole[wanted[i]]["image"])


@pytest.mark.parametrize(
  ("split", "message"),
  [
    (
      "tran",
      r"config\.data\.eval_split='tran': Unknown split 'tran'.*valid: train, test, slices such as train\[:90%\]",
    ),
    ("train[:x]", r"config\.data\.eval_split='train\[:x\]': Error parsing split"),
    ("train[2000:3000]", r"config\.data\.eval_split='train\[2000:3000\]': .*incompatible with 1437 examples"),
    ("train[5:5]", r"config\.data\.eval_split='train\[5:5\]': no examples"),
  ],
)
def test_split_errors(split, message):
  with pytest.raises(ValueError, match=message) as error:
    data.describe(settings(eval_split=split))
  assert "\n" not in str(error.value)


def test_folder_with_splits(tmp_path):
  write_images(tmp_path / "train", {"cat": 4, "ant": 3})
  write_images(tmp_path / "test", {"cat": 2, "bee": 1})
  (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
  info = data.describe(settings(name="image_folder", data_dir=str(tmp_path)))
  assert info == data.DataInfo("image_folder", 3, ("ant", "bee", "cat"), 7, 3, 3)
  source = data.open_source(settings(name="image_folder", data_dir=str(tmp_path)), "train")
  assert sorted((source[i]["label"], int(source[i]["image"][0, 0, 0])) for i in range(7)) == [
    *((0, i) for i in range(3)),
    *((2, i) for i in range(4)),
  ]
  assert source[0]["image"].shape == (5, 6, 3)


def test_folder_without_splits(tmp_path):
  write_images(tmp_path, {"a": 20, "b": 20})
  chosen = settings(name="image_folder", data_dir=str(tmp_path), train_split="train[:75%]", eval_split="train[75%:]")
  assert data.describe(chosen).num_train == 30
  held_out = data.open_source(chosen, "train[75%:]")
  assert {held_out[i]["label"] for i in range(10)} == {0, 1}  # a slice holds every class
  train = data.open_source(chosen, "train[:75%]")

  def key(example):
    return example["label"], int(example["image"][0, 0, 0])

  assert len({key(train[i]) for i in range(30)} | {key(held_out[i]) for i in range(10)}) == 40
  with pytest.raises(ValueError, match=r"config\.data\.eval_split='test': Unknown split 'test'.*valid: train, slices"):
    data.describe(settings(name="image_folder", data_dir=str(tmp_path)))


def test_folder_order_hardly_changes_with_a_new_file(tmp_path):
  write_images(tmp_path, {"a": 9})
  before = [Path(file.path).name for file in folder.scan(str(tmp_path))[1]["train"]]
  Image.new("L", (2, 2)).save(tmp_path / "a" / "new.png")
  after = [Path(file.path).name for file in folder.scan(str(tmp_path))[1]["train"]]
  assert [name for name in after if name != "new.png"] == before


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_truncated_images(tmp_path, suffix):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  (tmp_path / "a").mkdir()
  for i in range(4):
    Image.fromarray(noise).save(tmp_path / "a" / f"{i}{suffix}")
  truncate(tmp_path / "a" / f"2{suffix}")
  (tmp_path / "a" / f"3{suffix}").write_bytes(b"")
  chosen = settings(name="image_folder", data_dir=str(tmp_path))
  with pytest.raises(
    ValueError, match=r"config\.data\.bad_images='error': 2 of 4 images unreadable: .*'skip'"
  ) as error:
    data.open_source(chosen, "train")
  assert f"2{suffix}" in str(error.value) and f"3{suffix}" in str(error.value) and "\n" not in str(error.value)
  chosen.bad_images = "skip"
  source = data.open_source(chosen, "train")
  assert len(source) == 2 and source.num_skipped == 2
  assert [source[i]["image"].shape for i in range(2)] == [(64, 64, 3)] * 2


def test_a_broken_link_is_an_unreadable_image(tmp_path):
  write_images(tmp_path, {"a": 1})
  (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "elsewhere.png")
  chosen = settings(name="image_folder", data_dir=str(tmp_path))
  with pytest.raises(ValueError, match=r"config\.data\.bad_images='error': 1 of 2 images unreadable: .*gone\.png"):
    data.open_source(chosen, "train")
  chosen.bad_images = "skip"
  assert data.open_source(chosen, "train").num_skipped == 1


def test_a_mended_image_is_seen(tmp_path):
  write_images(tmp_path, {"a": 2}, size=(40, 40))
  truncate(tmp_path / "a" / "1.png")
  chosen = settings(name="image_folder", data_dir=str(tmp_path), bad_images="skip")
  assert len(data.open_source(chosen, "train")) == 1
  Image.new("RGB", (3, 3)).save(tmp_path / "a" / "1.png")
  assert len(data.open_source(chosen, "train")) == 2


def test_all_images_unreadable(tmp_path):
  write_images(tmp_path, {"a": 1})
  truncate(tmp_path / "a" / "0.png")
  with pytest.raises(ValueError, match=r"config\.data\.eval_split='train': no examples"):
    data.open_source(settings(name="image_folder", data_dir=str(tmp_path), bad_images="skip"), "train")


def test_folder_errors(tmp_path):
  for directory in ("", str(tmp_path / "missing")):
    with pytest.raises(ValueError, match=r"config\.data\.data_dir='.*': no such directory"):
      data.describe(settings(name="image_folder", data_dir=directory))
  (tmp_path / "a").mkdir()
  with pytest.raises(ValueError, match=r"config\.data\.data_dir='.*': no images; valid: <class>/<image> or <split>"):
    data.describe(settings(name="image_folder", data_dir=str(tmp_path)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_modes(mode):
  grey = mode in ("1", "L", "LA", "I;16")
  picture = Image.new("L", (4, 3), 255)
  if mode == "I;16":
    picture = Image.fromarray(np.full((3, 4), 65535, np.uint16))
  image = images.to_array(picture if mode in ("L", "I;16") else picture.convert("RGB").convert(mode))
  assert image.shape == (3, 4, 1 if grey else 3) and image.dtype == np.uint8
  assert image.min() >= 254  # white stays white


def test_sixteen_bits_are_scaled():
  assert images.to_array(Image.fromarray(np.array([[256 * 7, 65535]], np.uint16)))[0, :, 0].tolist() == [7, 255]


def test_upright(tmp_path):
  """Whoever reads a file turns it as its EXIF says: folders, conversations and predictions alike."""
  exif = Image.Exif()
  exif[0x0112] = 6  # turn by 90 degrees to the right
  Image.linear_gradient("L").resize((8, 4)).convert("RGB").save(tmp_path / "photo.png", exif=exif)
  turned = folder.read(tmp_path / "photo.png")
  assert turned.shape == (8, 4, 3) and turned[0, 0, 0] > turned[0, -1, 0]  # what was below is on the left
  np.testing.assert_array_equal(talks.Files((tmp_path / "photo.png",))[0]["image"], turned)
  chosen = config.default()
  chosen.model.image_size = (8, 4)
  np.testing.assert_array_equal(predict.read_image(tmp_path / "photo.png", chosen), turned)


def test_channels():
  grey = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
  np.testing.assert_array_equal(images.with_channels(grey, 3), np.repeat(grey, 3, axis=-1))
  colour = np.array([[[200, 100, 50]]], np.uint8)
  # ITU-R 601: 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2
  assert images.with_channels(colour, 1).tolist() == [[[124]]]
  assert images.with_channels(colour, 3) is colour


def test_fit():
  image = np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)
  # Already covers 10x10: only the centre is taken, columns 5 to 14.
  np.testing.assert_array_equal(images.fit(image, (10, 10), 1.0, "bilinear"), image[:, 5:15])
  # 7 / 0.875 = 8: resized to 8x16, then rows 0 (0.5 rounds to even) to 6 and columns 4 (4.5) to 10.
  wanted = images.resize(image, (8, 16), "bicubic")[0:7, 4:11]
  np.testing.assert_array_equal(images.fit(image, (7, 7), 0.875, "bicubic"), wanted)
  # 0 cuts nothing off: the whole image is squeezed.
  np.testing.assert_array_equal(images.fit(image, (7, 7), 0.0, "bicubic"), images.resize(image, (7, 7), "bicubic"))
  square = image[:, :10]
  assert images.fit(square, (10, 10), 0.0, "bicubic") is square
  assert images.fit(square, (10, 10), 1.0, "lanczos").base is not None  # a view: nothing was resampled
  edge = np.arange(354 * 354, dtype=np.int64).reshape(354, 354, 1).astype(np.uint8)  # 224 / (224 / 354) is 353.99...
  np.testing.assert_array_equal(images.fit(edge, (224, 224), 224 / 354, "bicubic"), edge[65:289, 65:289])
  for shape in ((3, 50), (50, 3), (31, 17)):
    for size in ((8, 8), (16, 8), (7, 13)):
      assert images.fit(np.zeros((*shape, 1), np.uint8), size, 0.9, "nearest").shape == (*size, 1)


@needs_tfds
def test_tfds():
  info = data.describe(settings(name="fashion_mnist", data_dir=str(TFDS_DIR), train_split="train[:1000]"))
  assert (info.num_classes, info.num_train, info.num_eval, info.channels) == (10, 1000, 10000, 1)
  assert info.label_names[0] == "T-shirt/top"
  cifar = data.open_source(settings(name="cifar10", data_dir=str(TFDS_DIR)), "test[100:110]")
  assert len(cifar) == 10 and cifar[3]["image"].shape == (32, 32, 3) and cifar.channels == 3
  for one, other in zip(cifar.__getitems__([4, 2]), (cifar[4], cifar[2]), strict=True):
    np.testing.assert_array_equal(one["image"], other["image"])
    assert one["label"] == other["label"]
  assert data.describe(settings(name="easy_vqa", data_dir=str(TFDS_DIR))).num_classes == 13  # known from its files only


def test_easy_vqa_comes_from_its_package(tmp_path, monkeypatch):
  """A package of one image and two questions a split stands for the real one, whose files are laid out so."""
  from tokred.data.easy_vqa import EasyVqa

  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  prepare = lambda: EasyVqa(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
  with pytest.raises(ModuleNotFoundError, match="pip install easy-vqa"):
    prepare()
  package = tmp_path / "easy_vqa"
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: types.SimpleNamespace(submodule_search_locations=[package])
  )
  names = (
    "circle",
    "green",
    "red",
    "gray",
    "yes",
    "teal",
    "black",
    "rectangle",
    "yellow",
    "triangle",
    "brown",
    "blue",
    "no",
  )
  for split in ("train", "test"):
    (package / "data" / split / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64), (1, 2, 3)).save(package / "data" / split / "images" / "7.png")
    asked = [["what is it?", "circle", 7], ["is it red?", "no", 7]]
    (package / "data" / split / "questions.json").write_text(json.dumps(asked))
  (package / "data" / "answers.txt").write_text("\n".join(names))
  prepare()
  chosen = settings(name="easy_vqa", data_dir=str(tmp_path / "tfds"))
  assert data.describe(chosen).label_names == data.label_names(chosen) == names
  source = data.open_source(chosen, "test")
  assert [source[i]["label"] for i in range(2)] == [0, 12] and (source[1]["image"] == (1, 2, 3)).all()
  found = talks.open_talks(chosen, "train")
  assert [talk.turns for talk in found.talks] == [
    (("<image>\nwhat is it?", "circle"),),
    (("<image>\nis it red?", "no"),),
  ]
  assert len(found.pictures) == 1 and found.label_names == names


@needs_tfds
def test_tfds_pixels_are_those_of_its_own_decoder():
  import tensorflow_datasets as tfds

  own = tfds.data_source("cifar10", split="test[:5]", data_dir=str(TFDS_DIR), download=False)
  ours = data.open_source(settings(name="cifar10", data_dir=str(TFDS_DIR)), "test[:5]")
  for i in range(5):
    np.testing.assert_array_equal(ours[i]["image"], own[i]["image"])
    assert ours[i]["label"] == own[i]["label"]


@needs_tfds
def test_tfds_errors(tmp_path):
  with pytest.raises(
    ValueError, match=r"name='fashon_mnist': no such data set; did you mean 'fashion_mnist'\?"
  ) as error:
    data.describe(settings(name="fashon_mnist", data_dir=str(TFDS_DIR)))
  assert "valid: digits, image_folder, cifar10" in str(error.value) and "\n" not in str(error.value)
  with pytest.raises(ValueError, match=r"name='diggits': no such data set; did you mean 'digits'\?"):
    data.describe(settings(name="diggits"))
  with pytest.raises(ValueError, match=r"name='own_vqa': .* of TFDS, or with config.data.data_dir, the fold"):
    data.describe(settings(name="own_vqa"))
  with pytest.raises(
    ValueError, match=r"config\.data\.data_dir='.*': mnist is not there; valid: a directory with mnist"
  ):
    data.describe(settings(name="mnist", data_dir=str(tmp_path)))
  with pytest.raises(ValueError, match=r"config\.data\.name='cifar10:9\.9\.9': TFDS cannot open it: "):
    data.describe(settings(name="cifar10:9.9.9", data_dir=str(TFDS_DIR)))
  with pytest.raises(ValueError, match=r"config\.data\.train_split='tran': Unknown split 'tran'.*valid: train, test"):
    data.describe(settings(name="cifar10", data_dir=str(TFDS_DIR), train_split="tran"))
  with pytest.raises(ValueError, match=r"config\.data\.train_split='train\[9:1\]': .*valid: train, test"):
    data.describe(settings(name="cifar10", data_dir=str(TFDS_DIR), train_split="train[9:1]"))


def write_tfds(directory, features, file_format="array_record"):
  """Metadata of an empty data set `made`; enough for everything that is refused before examples are read."""
  import tensorflow_datasets as tfds

  version = directory / "made" / "1.0.0"
  version.mkdir(parents=True)
  identity = tfds.core.dataset_info.DatasetIdentity(
    name="made", version=tfds.core.Version("1.0.0"), data_dir=str(version), module_name="made"
  )
  info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
  info.set_file_format(file_format)
  info.set_splits(tfds.core.SplitDict([tfds.core.SplitInfo(name="train", shard_lengths=[3], num_bytes=3)]))
  info.write_to_directory(version)


def test_tfds_features(tmp_path):
  import tensorflow_datasets as tfds

  image, label = tfds.features.Image(shape=(8, 8, 1)), tfds.features.ClassLabel(num_classes=3)
  number = tfds.features.Scalar(np.int64)
  cases = {
    "unlabelled": ({"image": image, "size": number}, "data set has no label; features: .*size"),
    "text": ({"label": label}, "data set has no image; features: label"),
    "regression": ({"image": image, "label": number}, "label is not a class but .*valid: a ClassLabel"),
    "deep": (
      {"image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16), "label": label},
      "valid: an Image of uint8",
    ),
  }
  for case, (features, message) in cases.items():
    write_tfds(tmp_path / case, features)
    with pytest.raises(ValueError, match=rf"config\.data\.name='made': .*{message}"):
      data.describe(settings(name="made", data_dir=str(tmp_path / case)))
  write_tfds(tmp_path / "tfrecord", {"image": image, "label": label}, "tfrecord")
  with pytest.raises(ValueError, match=r"config\.data\.data_dir='.*': made is there as tfrecord; valid: array_record"):
    data.describe(settings(name="made", data_dir=str(tmp_path / "tfrecord")))


@needs_tfds
def test_no_tensorflow_and_no_noise():
  code = f"""
import sys
from tokred import config, data
for name, size, channels in (("digits", 8, 1), ("fashion_mnist", 28, 1), ("cifar10", 32, 3)):
  chosen = config.default().data
  chosen.update(name=name, data_dir={str(TFDS_DIR)!r}, train_split="train[:40]", eval_split="test[:10]")
  data.describe(chosen)
  batches = data.train_batches(
    chosen, image_size=(size, size), channels=channels, num_classes=10, batch_size=4, seed=0)
  next(batches)
assert "tensorflow" not in sys.modules
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout + done.stderr == ""
