"""Pictures of what a model keeps."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from tokred.model import Model

matplotlib.use("Agg")  # files only: no display is asked for
from matplotlib import pyplot as plt


def survivors(owner: np.ndarray, source: int) -> tuple[np.ndarray, np.ndarray]:
  """What became of each source token.

  Args:
    owner: (S,) int32 of `Tokens.owner`, -1 where nothing represents the source token.
    source: number of prefix tokens before the patches.

  Returns:
    kept (P,) bool: something represents the patch; shared (P,) bool: that token represents other patches too.
  """
  patches = owner[source:]
  members = np.bincount(patches[patches >= 0], minlength=owner.size)
  kept = patches >= 0
  return kept, kept & (members[np.maximum(patches, 0)] > 1)


def save_survivors(
  model: Model,
  images: np.ndarray,
  path: str | os.PathLike[str],
  *,
  titles: Sequence[str] | None = None,
) -> Path:
  """Draws, a row an image and a column a block that reduces, which patches are left.

  Dropped patches are dark; patches that share a token with others have a frame, each token's in its own colour.

  Args:
    model: with parameters.
    images: (B, height, width, channels) float32, as the model takes them.
    path: of the PNG; written to a temporary name and renamed.
    titles: one a row.

  Returns:
    The path.
  """
  output, shape = model.inspect(images), model.module.shape
  owners = {int(k.split("/")[1]): np.asarray(v) for k, v in output.aux.items() if k.startswith("owner/")}
  layers = [k for k in sorted(owners) if k == 0 or (owners[k] != owners[k - 1]).any()]
  mean, std = (np.asarray(model.config.data[name], np.float32) for name in ("mean", "std"))
  pictures = np.clip(np.asarray(images) * std + mean, 0, 1)
  rows, columns = len(images), len(layers) + 1
  figure, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.6 * rows), squeeze=False)
  for row, picture in enumerate(pictures):
    _draw(axes[row, 0], picture, "image" if not row else "", titles[row] if titles else "")
    for column, layer in enumerate(layers, 1):
      owner = owners[layer][row]
      kept, shared = survivors(owner, shape.num_prefix_tokens)
      shade = np.where(kept, 1.0, 0.15).reshape(shape.grid)
      shade = np.kron(shade, np.ones((shape.patch, shape.patch)))[..., None]
      _draw(axes[row, column], picture * shade, f"block {layer}: {model.counts[layer]}" if not row else "", "")
      _frames(axes[row, column], owner[shape.num_prefix_tokens :], shared, shape)
  figure.tight_layout()
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  figure.savefig(temporary, format="png", dpi=120)
  plt.close(figure)
  os.replace(temporary, path)
  return path


def _draw(axis: Any, picture: np.ndarray, title: str, label: str) -> None:
  axis.imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
  axis.set_title(title, fontsize=7)
  axis.set_ylabel(label, fontsize=7)
  axis.set_xticks([])
  axis.set_yticks([])


def _frames(axis: Any, owner: np.ndarray, shared: np.ndarray, shape: Any) -> None:
  colours = plt.get_cmap("tab20")
  for index in np.flatnonzero(shared):
    y, x = divmod(int(index), shape.grid[1])
    corner, size = (x * shape.patch - 0.45, y * shape.patch - 0.45), shape.patch - 0.1
    axis.add_patch(plt.Rectangle(corner, size, size, fill=False, linewidth=0.9, edgecolor=colours(owner[index] % 20)))
