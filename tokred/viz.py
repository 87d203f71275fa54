"""Pictures of what a model keeps."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from tokred.data.batches import mean_std, normalise
from tokred.model import Model, Reader
from tokred.nn import placeholders

matplotlib.use("Agg")  # files only: no display is asked for
from matplotlib import pyplot as plt

DROPPED = np.array((0.24, 0.36, 0.62))  # a tint, since black says nothing on a dark background


def survivors(owner: np.ndarray, num_prefix_tokens: int) -> tuple[np.ndarray, np.ndarray]:
  """What became of each patch.

  Args:
    owner: (S,) int32 of `Tokens.owner`, -1 where nothing represents the source token.
    num_prefix_tokens: source tokens before the patches.

  Returns:
    kept (P,) bool: something represents the patch; shared (P,) bool: that token represents other patches too.
  """
  patches = owner[num_prefix_tokens:]
  members = np.bincount(patches[patches >= 0], minlength=owner.size)
  kept = patches >= 0
  return kept, kept & (members[np.maximum(patches, 0)] > 1)


def save_survivors(
  model: Model,
  images: np.ndarray,
  path: str | os.PathLike[str],
  *,
  titles: Sequence[str] | None = None,
  ids: np.ndarray | None = None,
  mask: np.ndarray | None = None,
) -> Path:
  """Draws, a row an image and a column a block that reduces, which patches are left.

  Dropped patches are tinted, as are those that go round a block and are back behind it ("inside block 3"); patches that
  share a token have frames, of one colour for each token.  Of a vision-language model: what reaches the language model,
  and what is left behind each of its layers that reduces.

  Args:
    model: with parameters.
    images: (B, height, width, channels), float32 as the model takes them, or uint8 of its size; of a vision-language
      model (B, R, ...).
    path: of the PNG; written to a temporary name and renamed.
    titles: one a row.
    ids: (B, S) int32 prompts of a vision-language model, as `tokred.evaluate.prompts` has them.
    mask: (B, S), nonzero where there is a token of `ids`; None: everywhere.

  Returns:
    The path.

  Raises:
    ValueError: no Model, a path that is no .png, not as many titles as rows, ids where there is no text or none where
      there is, or images that the model does not take.
  """
  path = Path(path)
  if not isinstance(model, Model):
    raise ValueError(
      f"model is of type {type(model).__name__}, which shows no tokens; valid: a Model, as tokred.build and load "
      "give it (of an export: with orbax or safetensors)"
    )
  if path.suffix.lower() != ".png":
    raise ValueError(f"path={str(path)!r}; valid: a file that ends in .png")
  if ids is not None and not isinstance(model, Reader):
    raise ValueError("ids are given, but a model of images alone reads none; leave them out")
  rows = math.prod(np.shape(images)[:-3])
  if titles is not None and (isinstance(titles, str) or len(titles) != rows):
    raise ValueError(f"titles={titles!r} for {rows} images; valid: a list of as many")
  if getattr(images, "dtype", None) == np.uint8:
    images = normalise(np.asarray(images), mean_std(model.config.data, model.config.model.channels)).astype(np.float32)
  if isinstance(model, Reader):
    shape, prefix, stages = model.module.tower.shape, 0, _read(model, ids, images, mask)
    images = np.reshape(images, (-1, *np.shape(images)[2:]))
  else:
    shape, prefix, stages = model.module.shape, model.module.shape.num_prefix_tokens, _stages(model, images)
  mean, std = (np.asarray(model.config.data[name], np.float32) for name in ("mean", "std"))
  pictures = np.clip(np.asarray(images) * std + mean, 0, 1) * np.ones(3)  # grey images become RGB
  columns = len(stages) + 1
  size = max(1.7 * columns, 5.0), 1.7 * rows + 0.6
  figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
  for row, picture in enumerate(pictures):
    _draw(
      axes[row, 0], picture, "" if row else f"image: {shape.num_tokens} tokens", "" if titles is None else titles[row]
    )
    for column, (name, owners) in enumerate(stages, 1):
      kept, shared = survivors(owners[row], prefix)
      tint = np.kron(kept.reshape(shape.grid), np.ones((shape.patch, shape.patch)))[..., None]
      title = "" if row else f"{name}: {_count(owners)} tokens"
      _draw(axes[row, column], np.where(tint, picture, 0.2 * picture + 0.8 * DROPPED), title, "")
      _frames(axes[row, column], owners[row][prefix:], shared, shape)
  gone = "dropped, or gone round" if any(name.startswith("inside") for name, _ in stages) else "dropped"
  figure.supxlabel(f"blue: {gone}; frames of one colour: merged into one token", fontsize=8)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
  finally:
    plt.close(figure)
    temporary.unlink(missing_ok=True)
  return path


def _stages(model: Model, images: np.ndarray) -> list[tuple[str, np.ndarray]]:
  """(name, owner (B, S)) after every block that changed who represents whom, and after the `output` sites.

  Where tokens are back already behind the block that they went round, inside it.
  """
  output, depth = model.inspect(images), model.module.shape.depth
  owners = [np.asarray(output.aux[f"owner/{layer}"]) for layer in range(depth)] + [np.asarray(output.tokens.owner)]
  names = [f"block {layer}" for layer in range(depth)] + ["output"]
  before, stages = np.broadcast_to(np.arange(owners[0].shape[1]), owners[0].shape), []
  for layer, (name, owner) in enumerate(zip(names, owners, strict=True)):
    inside = np.asarray(output.aux.get("inside", {}).get(layer, before))
    if not np.array_equal(inside, before):
      stages.append((f"inside {name}", inside))
    if not np.array_equal(owner, before):
      stages.append((name, owner))
    before = owner
  return stages


def _read(model: Reader, ids: Any, images: Any, mask: Any) -> list[tuple[str, np.ndarray]]:
  """(name, owner (B R, patches)) where the language model begins, and after each of its layers that changed it."""
  if ids is None:
    raise ValueError("ids=None: which patches a vision-language model keeps depends on its prompt; valid: (B, S) int32")
  output, s = model.inspect(ids, images, mask), model.module.tower.shape
  slot = placeholders.slots(ids, model.module.image_token, images.shape[1], s.num_patches)
  rows, stages, before = np.arange(len(slot))[:, None, None], [], None
  names = {"owner/tower": "given to the LLM"}
  names |= {f"owner/{layer}": f"LLM layer {layer}" for layer in range(model.config.llm.depth)}
  for name, title in names.items():
    owner = np.where(slot >= 0, np.asarray(output.aux[name])[rows, slot], -1).reshape(-1, slot.shape[-1])
    fate = [survivors(one, 0) for one in owner]  # places in the row change also where no patch has left
    if not np.array_equal(fate, before):
      stages.append((title, owner))
    before = fate
  return stages


def _count(owners: np.ndarray) -> str:
  """Tokens that are left: one number, or the range where images differ."""
  counts = [np.unique(owner[owner >= 0]).size for owner in owners]
  return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _draw(axis: Any, picture: np.ndarray, title: str, label: str) -> None:
  axis.imshow(picture)
  axis.set_title(title, fontsize=8)
  axis.set_ylabel(label, fontsize=8)
  axis.set_xticks([])
  axis.set_yticks([])


def _frames(axis: Any, owner: np.ndarray, shared: np.ndarray, shape: Any) -> None:
  colours = plt.get_cmap("tab20")
  rank = {token: place for place, token in enumerate(np.unique(owner[shared]))}  # neighbours in rank differ in colour
  inset = 0.06 * shape.patch
  for index in np.flatnonzero(shared):
    y, x = divmod(int(index), shape.grid[1])
    corner = (x * shape.patch - 0.5 + inset, y * shape.patch - 0.5 + inset)
    size, colour = shape.patch - 2 * inset, colours(rank[owner[index]] % 20)
    axis.add_patch(plt.Rectangle(corner, size, size, fill=False, linewidth=1.3, edgecolor=colour))
