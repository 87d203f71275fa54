"""Weights for another resolution, aspect ratio or patch size."""

import numpy as np


def bicubic(size: int, wanted: int) -> np.ndarray:
  """The matrix (wanted, size) that resamples a line, antialiased where it shrinks; float64.

  Keys' kernel with a = -1/2, widened by the factor of shrinking; weights at the border are renormalised.  Thus PIL, and
  torch and jax.image where they antialias.
  """
  scale = max(size / wanted, 1.0)
  centre = (np.arange(wanted) + 0.5) * size / wanted - 0.5
  t = np.abs(centre[:, None] - np.arange(size)) / scale
  near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
  weight = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
  return weight / weight.sum(1, keepdims=True)


def bilinear(size: int, wanted: int) -> np.ndarray:
  """The matrix (wanted, size) that interpolates a line, pixel centres aligned, without antialiasing; float64."""
  centre = np.clip((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0, size - 1)
  return np.maximum(1 - np.abs(centre[:, None] - np.arange(size)), 0)


def positions(table: np.ndarray, grid: tuple[int, int], wanted: tuple[int, int]) -> np.ndarray:
  """Position embeddings for another grid of patches.

  Args:
    table: (1, prefix + height x width, D); rows of prefix tokens stay as they are.
    grid: height and width of the patches of `table`.
    wanted: those that are wanted.

  Returns:
    (1, prefix + wanted height x width, D) of the same dtype.
  """
  if grid == wanted:
    return table
  prefix = table.shape[1] - grid[0] * grid[1]
  patches = table[0, prefix:].astype(np.float64).reshape(*grid, -1)
  patches = np.einsum("ph,qw,hwd->pqd", bicubic(grid[0], wanted[0]), bicubic(grid[1], wanted[1]), patches)
  patches = patches.reshape(1, wanted[0] * wanted[1], -1).astype(table.dtype)
  return np.concatenate([table[:, :prefix], patches], axis=1)


def patch_kernel(kernel: np.ndarray, patch: int) -> np.ndarray:
  """The patch embedding for patches of another size.  (Beyer et al., 2022, FlexiViT, arXiv:2212.08013, eq. 3 and 4)

  Where B resizes a patch, the new kernel is (B^T)^+ w: of an enlarged patch it makes what the old one made of the
  original, <B x, (B^T)^+ w> = <x, w>; of a shrunk one, the nearest to it for white noise.  B = B_h (x) B_w, and so is
  its pseudo-inverse.

  Args:
    kernel: (height, width, channels, D).
    patch: wanted height and width.

  Returns:
    (patch, patch, channels, D) of the same dtype.
  """
  if kernel.shape[:2] == (patch, patch):
    return kernel
  rows, columns = (np.linalg.pinv(bilinear(size, patch)) for size in kernel.shape[:2])  # (size, patch)
  return np.einsum("hp,wq,hwcd->pqcd", rows, columns, kernel.astype(np.float64)).astype(kernel.dtype)
