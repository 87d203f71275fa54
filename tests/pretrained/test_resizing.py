"""Weights for another resolution, aspect, patch or number of classes."""

import jax
import numpy as np
import pytest
import theirs

import tokred
from tokred.pretrained import resize


def test_the_same_size_is_the_identity():
  rng = np.random.default_rng(0)
  table, kernel = rng.normal(size=(1, 8, 5)), rng.normal(size=(4, 4, 3, 5))
  assert resize.positions(table, (2, 3), (2, 3)) is table and resize.patch_kernel(kernel, 4) is kernel
  for n in (1, 2, 7):
    np.testing.assert_allclose(resize.bicubic(n, n), np.eye(n), atol=1e-12)
    np.testing.assert_allclose(resize.bilinear(n, n), np.eye(n), atol=1e-12)


def test_bicubic_by_hand():
  # 2 to 4: centres -1/4, 1/4, 3/4, 5/4 of the source.  Keys' kernel, a = -1/2, at 1/4: 1.5/64 - 2.5/16 + 1 = 0.8671875;
  # at 3/4: 1.5*27/64 - 2.5*9/16 + 1 = 0.2265625; at 5/4: -0.5*125/64 + 2.5*25/16 - 5 + 2 = -0.0703125.
  # Row 0 has 1/4 and 5/4 in reach: 0.8671875 / 0.796875, -0.0703125 / 0.796875; row 1 has 1/4 and 3/4.
  first = np.array([0.8671875, -0.0703125]) / 0.796875
  second = np.array([0.8671875, 0.2265625]) / 1.09375
  np.testing.assert_allclose(resize.bicubic(2, 4), [first, second, second[::-1], first[::-1]])
  # 4 to 2 is widened by two: centres 1/2 and 5/2; distances 1/4, 1/4, 3/4, 5/4 in units of the kernel
  weights = np.array([0.8671875, 0.8671875, 0.2265625, -0.0703125])
  np.testing.assert_allclose(resize.bicubic(4, 2)[0], weights / weights.sum())


def test_bicubic_is_that_of_jax():
  table = np.random.default_rng(0).normal(size=(1, 1 + 35, 4)).astype(np.float32)
  for wanted in ((3, 4), (9, 14)):
    ours = resize.positions(table, (5, 7), wanted)
    image = jax.image.resize(table[0, 1:].reshape(5, 7, 4), (*wanted, 4), "cubic", antialias=True)
    np.testing.assert_array_equal(ours[:, 0], table[:, 0])  # CLS stays
    np.testing.assert_allclose(ours[0, 1:].reshape(*wanted, 4), image, atol=1e-5)
    assert ours.dtype == np.float32


def test_a_linear_ramp_stays_one_inside():
  ramp = np.arange(12.0)[None, :, None]
  ours = resize.positions(ramp, (1, 12), (1, 24))[0, :, 0]
  np.testing.assert_allclose(ours[4:20], (np.arange(4, 20) + 0.5) / 2 - 0.5)


@pytest.mark.parametrize("patch", [8, 7])
def test_a_larger_patch_gives_the_same_embedding(patch):
  """FlexiViT, eq. 3: the enlarged patch under the new kernel is the old patch under the old one."""
  rng = np.random.default_rng(0)
  kernel, image = rng.normal(size=(4, 4, 3, 6)), rng.normal(size=(4, 4, 3))
  up = resize.bilinear(4, patch)
  larger = np.einsum("ph,qw,hwc->pqc", up, up, image)
  ours = np.einsum("hwc,hwcd->d", larger, resize.patch_kernel(kernel, patch))
  np.testing.assert_allclose(ours, np.einsum("hwc,hwcd->d", image, kernel), atol=1e-9)


def test_a_smaller_patch_is_the_least_squares_solution():
  # B halves: rows (1/2, 1/2, 0, 0), (0, 0, 1/2, 1/2).  (B^T)^+ w minimises |B^T v - w|: v = (w_1 + w_2, w_3 + w_4).
  kernel = np.random.default_rng(0).normal(size=(4, 4, 1, 1))
  ours = resize.patch_kernel(kernel, 2)[..., 0, 0]
  np.testing.assert_allclose(ours, kernel[..., 0, 0].reshape(2, 2, 2, 2).sum((1, 3)), atol=1e-12)


def test_another_resolution_patch_and_head_when_loading(tmp_path):
  theirs.write(tmp_path, "vit", theirs.MICRO | theirs.MLP, 3)
  plain = tokred.load(tmp_path)
  with pytest.warns(
    UserWarning, match=r"head/kernel of 16 features and 5 classes .* is drawn anew: .* 16 features and 3"
  ):
    wide = tokred.load(tmp_path, model=dict(image_size=(16, 24), num_classes=5))
  assert wide.config.model.image_size == (16, 24) and wide.config.data.labels == ()
  wanted = resize.positions(np.asarray(plain.params["pos_embed"]), (3, 3), (4, 6))
  np.testing.assert_allclose(wide.params["pos_embed"], wanted, atol=1e-6)
  np.testing.assert_array_equal(wide.params["head"]["kernel"], np.zeros((16, 5)))  # as heads begin
  letter = plain.config.model.variant.split("/")[0]
  fine = tokred.load(
    tmp_path, model=dict(variant=f"{letter}/2", image_size=(6, 6))
  )  # as many patches, of half the side
  assert fine.module.shape.width == 16 and fine.params["pos_embed"].shape == (1, 10, 16)
  kernel = resize.patch_kernel(np.asarray(plain.params["patch_embed"]["kernel"]), 2)
  np.testing.assert_allclose(fine.params["patch_embed"]["kernel"], kernel, rtol=1e-5, atol=1e-5)
  bare = tokred.load(tmp_path, model=dict(num_classes=0))
  assert "head" not in bare.params
  with pytest.raises(ValueError, match=r"config.model.image_size=\(13, 12\) must be .* multiples of patch 4"):
    tokred.load(tmp_path, model=dict(image_size=(13, 12)))


def test_positions_are_resized_before_registers_are_folded(tmp_path):
  """DeiT without a second head: its distillation token is a register, with its position in it."""
  state = theirs.write(tmp_path, "deit", theirs.MICRO | theirs.MLP, 3)
  table = state["deit.embeddings.position_embeddings"]
  params = tokred.load(tmp_path, model=dict(image_size=(20, 8))).params
  register = state["deit.embeddings.distillation_token"][0, 0] + table[0, 1]
  np.testing.assert_allclose(params["registers"][0, 0], register, rtol=1e-6)
  patches = resize.positions(table[:, 2:], (3, 3), (5, 2))
  np.testing.assert_allclose(params["pos_embed"], np.concatenate([table[:, :1], patches], 1), atol=1e-6)


def test_what_is_added_or_resized_is_not_rounded_to_the_dtype_of_the_file(tmp_path):
  half = lambda state: {name: a.astype(np.float16) for name, a in state.items()}
  state = theirs.write(tmp_path, "deit", theirs.MICRO | theirs.MLP, 3, change=half)
  table = state["deit.embeddings.position_embeddings"].astype(np.float32)
  params = tokred.load(tmp_path, model=dict(image_size=(20, 8))).params
  register = state["deit.embeddings.distillation_token"].astype(np.float32)[0, 0] + table[0, 1]
  np.testing.assert_array_equal(params["registers"][0, 0], register)
  patches = resize.positions(table[:, 2:], (3, 3), (5, 2))
  np.testing.assert_allclose(params["pos_embed"][:, 1:], patches, atol=1e-6)
