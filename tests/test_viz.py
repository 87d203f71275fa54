"""tokred.viz: what became of each patch, and a picture that is whole or not there."""

import os

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

import tokred
from tokred import viz
from tokred.probe import features
from tokred.viz import save_survivors, survivors

MODEL = dict(
  variant="mu/2", width=16, depth=3, num_heads=2, mlp_dim=32, image_size=(4, 6), channels=1, num_classes=10
)  # 2 x 3 patches and CLS
IMAGES = np.random.default_rng(0).standard_normal((2, 4, 6, 1)).astype(np.float32)


def make(**sites):
  return tokred.build(dict(model=MODEL, sites=sites, data=dict(mean=(0.5,), std=(0.5,)))).init()


@pytest.fixture(scope="module")
def model():
  return make(
    prune=dict(reducer="topk", layers=(0,), keep=0.7), merge=dict(reducer="tome", layers=(2,), r=1)
  )  # 7 -> 6 -> 6 -> 5


@pytest.fixture
def drawn(monkeypatch):
  """The figures that are closed, as they were."""
  figures, close = [], plt.close
  monkeypatch.setattr(viz.plt, "close", lambda figure: figures.append(figure) or close(figure))
  return figures


def test_survivors_by_hand():
  """CLS is token 0; patches 0 and 3 share token 1, patch 2 has token 2, patch 1 went into CLS, patch 4 is dropped."""
  kept, shared = survivors(np.array([0, 1, 0, 2, 1, -1]), num_prefix_tokens=1)
  assert kept.tolist() == [True, True, True, True, False]
  assert shared.tolist() == [True, False, False, True, False]


def test_a_panel_for_the_image_and_each_block_that_reduces(model, drawn, tmp_path):
  path = save_survivors(model, IMAGES, tmp_path / "new" / "survivors.png", titles=["one", "two"])
  with Image.open(path) as picture:
    assert picture.format == "PNG" and min(picture.size) > 200
  assert os.listdir(path.parent) == ["survivors.png"]
  axes = np.array(drawn[0].axes).reshape(2, 3)
  assert [axis.get_title() for axis in axes[0]] == ["image: 7 tokens", "block 0: 6 tokens", "block 2: 5 tokens"]
  assert [axis.get_ylabel() for axis in axes[:, 0]] == ["one", "two"]
  for row, image in enumerate(IMAGES):
    pixels = axes[row, 1].images[0].get_array()
    grey = np.clip(image * 0.5 + 0.5, 0, 1) * np.ones(3)
    dropped = np.abs(pixels - grey).max(-1) > 1e-6
    assert dropped.reshape(2, 2, 3, 2).any((1, 3)).sum() == dropped.sum() / 4 == 1  # one whole patch
    assert len(axes[row, 1].patches) == 0 and len(axes[row, 2].patches) == 2  # a pair has two frames


def test_tokens_that_go_round_blocks_are_back_behind_them(drawn, tmp_path):
  skip = dict(reducer="topk", place="around", layers=(1,), until=2, keep=4)
  model = make(prune=dict(reducer="topk", layers=(0,), keep=6), skip=skip)
  save_survivors(model, IMAGES[:1], tmp_path / "survivors.png")
  titles = [axis.get_title() for axis in drawn[0].axes]
  assert titles == ["image: 7 tokens", "block 0: 6 tokens", "block 1: 4 tokens", "block 2: 6 tokens"]
  frozen = features(model.inspect(IMAGES), model.params["norm"], 1e-6, 1)  # of every patch
  assert all(value.shape == (2, 6, 16) and np.isfinite(value).all() for value in frozen.values())


def test_a_model_without_sites_draws_the_images(drawn, tmp_path):
  save_survivors(make(), IMAGES[:1], tmp_path / "survivors.png")
  assert len(drawn[0].axes) == 1


def test_patches_that_a_language_model_reads(drawn, tmp_path):
  """16 patches; the tower's last site leaves 8 of them, the first layer of the language model 4; CLS is not read."""
  sites = dict(
    out=dict(reducer="topk", score="key_norm", layers=(-1,), place="output", keep=9),
    llm=dict(stack="llm", reducer="topk", score="last_attention", layers=(1,), place="before", keep=0.5),
  )
  tower = dict(name="vlm", variant="mu/4", image_size=(16, 16), num_classes=0, depth=1)
  sizes = dict(vocab=40, width=32, depth=2, num_heads=4, mlp_dim=48, image_token=3)
  model = tokred.build(dict(model=tower, llm=sizes, sites=sites)).init()
  ids = np.array([[0, 0, 5, *[3] * 16, 6], [8, 9, *[3] * 16, 10, 11]], np.int32)
  images = np.random.default_rng(0).standard_normal((2, 1, 16, 16, 3)).astype(np.float32)
  save_survivors(model, images, tmp_path / "survivors.png", ids=ids, mask=ids > 0)
  axes = np.array(drawn[0].axes).reshape(2, 3)
  titles = ["image: 17 tokens", "given to the LLM: 8 tokens", "LLM layer 1: 4 tokens"]
  assert [axis.get_title() for axis in axes[0]] == titles
  left = [np.ones(16, bool), *(tinted(axis, axes[1, 0]) for axis in axes[1, 1:])]
  assert [int(kept.sum()) for kept in left] == [16, 8, 4] and not (left[2] & ~left[1]).any()
  kept = np.asarray(model.inspect(ids, images, ids > 0).tokens.owner)[1, 2:18] >= 0
  np.testing.assert_array_equal(left[2], kept)
  with pytest.raises(ValueError, match=r"ids=None: which patches a vision-language model keeps depends on its prompt"):
    save_survivors(model, images, tmp_path / "survivors.png")


def tinted(axis, image):
  """(16,) bool: the patches of a panel that are as in the image."""
  same = np.abs(axis.images[0].get_array() - image.images[0].get_array()).max(-1) < 1e-6
  return same.reshape(4, 4, 4, 4).all((1, 3)).reshape(-1)


def test_a_write_that_fails_leaves_the_old_picture(model, monkeypatch, tmp_path):
  path = tmp_path / "survivors.png"
  path.write_bytes(b"old")

  def fail(self, file, **_):
    file.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
  with pytest.raises(OSError, match="No space left"):
    save_survivors(model, IMAGES, path)
  assert os.listdir(tmp_path) == ["survivors.png"] and path.read_bytes() == b"old" and not plt.get_fignums()
