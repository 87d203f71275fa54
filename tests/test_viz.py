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
