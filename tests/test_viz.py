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


@pytest.mark.parametrize("place", ["around", "mlp"])
def test_a_router_shows_who_goes_through_its_block(place, drawn, tmp_path):
  """Behind the block all are tokens again: it is not by the source map of blocks that one sees it."""
  model = make(route=dict(reducer="router", place=place, layers=(1,), keep=0.5))  # ceil(6 / 2) patches and CLS
  save_survivors(model, IMAGES, tmp_path / "survivors.png")
  axes = np.array(drawn[0].axes).reshape(2, 2)
  assert [axis.get_title() for axis in axes[0]] == ["image: 7 tokens", "inside block 1: 4 tokens"]
  inside = np.asarray(model.inspect(IMAGES).aux["inside"][1])
  for row, image in enumerate(IMAGES):
    grey = np.clip(image * 0.5 + 0.5, 0, 1) * np.ones(3)
    same = np.abs(axes[row, 1].images[0].get_array() - grey).max(-1) < 1e-6
    np.testing.assert_array_equal(same.reshape(2, 2, 3, 2).all((1, 3)).ravel(), inside[row, 1:] >= 0)
  assert "gone round" in drawn[0]._supxlabel.get_text()


def test_routers_inside_a_scope_and_behind_a_cut(drawn, tmp_path):
  """The sources are those of the image also where a cut came before; who goes round two things at once is not drawn."""
  cut = dict(reducer="topk", layers=(0,), keep=5)
  model = make(
    cut=cut,
    route=dict(reducer="router", layers=(1,), keep=0.5),
    mlp=dict(reducer="router", place="mlp", layers=(1,), keep=2),
  )
  aux = model.inspect(IMAGES).aux
  inside, behind = np.asarray(aux["inside"][1]), np.asarray(aux["owner/1"])
  assert ((inside >= 0).sum(1) == 3).all() and not ((inside >= 0) & (behind < 0)).any()
  save_survivors(model, IMAGES, tmp_path / "survivors.png")
  titles = [axis.get_title() for axis in drawn[0].axes[:3]]
  assert titles == ["image: 7 tokens", "block 0: 5 tokens", "inside block 1: 3 tokens"]


def test_pixels_are_drawn_as_what_they_are(model, drawn, tmp_path):
  pixels = np.random.default_rng(1).integers(0, 256, (2, 4, 6, 1), np.uint8)
  save_survivors(model, pixels, tmp_path / "survivors.png", titles=np.array(["one", "two"]))
  np.testing.assert_allclose(drawn[0].axes[0].images[0].get_array(), pixels[0] / 255 * np.ones(3), atol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(titles=["one"]), r"titles=\['one'\] for 2 images; valid: a list of as many"),
    (dict(titles="ab"), r"titles='ab' for 2 images; valid: a list"),
    (dict(ids=np.zeros((2, 3), np.int32)), "ids are given, but a model of images alone"),
    (dict(path="survivors.jpg"), r"path='survivors.jpg'; valid: a file that ends in .png"),
    (dict(path="/tmp"), r"path='/tmp'; valid: a file that ends in .png"),
    (dict(model=object()), "model is of type object, which shows no tokens; valid: a Model"),
    (dict(images=IMAGES[0]), r"images of shape \(4, 6, 1\); the model takes \(batch, 4, 6, 1\)"),
    (dict(images=IMAGES[0], titles=["one"]), r"images of shape \(4, 6, 1\)"),
  ],
)
def test_what_cannot_be_drawn(changes, message, model, tmp_path):
  given = dict(model=model, images=IMAGES, path=tmp_path / "survivors.png") | changes
  with pytest.raises(ValueError, match=message):
    save_survivors(**given)
  assert not list(tmp_path.iterdir())


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
