"""What a model sees in images: the five likeliest classes of each.

    python -m tokred.predict --model=exported cat.jpg dog.png [--show | --show=FILE.png]

`--model` is whatever `tokred.load` takes: a run directory, an export of any format, a Hugging Face directory.  `--show`
also writes a picture of the tokens that survive each block, beside the first image or as FILE.png.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

from tokred.data import images as pictures
from tokred.data import label_names
from tokred.data.batches import mean_std, normalise
from tokred.data.folder import read
from tokred.export import Exported
from tokred.loading import load
from tokred.model import Model, Reader, freeze

TOP = 5


def read_image(path: str | os.PathLike[str] | BinaryIO, config: ConfigDict) -> np.ndarray:
  """A file as a model sees it in evaluation, before normalisation: uint8 (height, width, channels).

  Raises:
    ValueError: there is no such file, or it is no image; names it.
  """
  if isinstance(path, (str, os.PathLike)) and not Path(path).is_file():
    raise ValueError(f"image {str(path)!r}: no such file")
  try:
    array = read(path)
  except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(
      f"image {str(path)!r} cannot be read: no image, or a damaged one ({type(error).__name__})"
    ) from None
  array = pictures.with_channels(array, config.model.channels)
  return pictures.fit(array, tuple(config.model.image_size), config.data.crop_fraction, config.data.resize)


def predict(
  model: Model | Exported, images: np.ndarray | Sequence[str | os.PathLike[str]], top: int = TOP
) -> list[list[tuple[str, float]]]:
  """The likeliest classes of each image.

  Args:
    model: with parameters, or an exported function.
    images: (B, height, width, channels), uint8 or normalised float32; or files.
    top: how many classes, at most.

  Raises:
    ValueError: the model has no head, an image cannot be read, or an argument is of another kind.

  Returns:
    For each image (name, probability), the likeliest first; the index where the name is not known.
  """
  if isinstance(model, Reader):
    raise ValueError("a vision-language model has no classes: it answers questions, by eval.py or model.write")
  if not isinstance(top, (int, np.integer)) or top < 1:
    raise ValueError(f"top={top!r}; valid: 1 or more classes")
  if not model.config.model.num_classes:
    raise ValueError("config.model.num_classes=0: the model has no head, so its logits are features and no classes")
  if not isinstance(images, (np.ndarray, jax.Array)):
    if not isinstance(images, (list, tuple)) or not all(isinstance(path, (str, os.PathLike)) for path in images):
      raise ValueError(f"images are a {type(images).__name__}; valid: an array, or a list of files")
    if not images:
      raise ValueError("images are an empty list; valid: one file or more")
    images = np.stack([read_image(path, model.config) for path in images])
  if images.dtype == np.uint8 and isinstance(model, Model):
    images = _normalised(images, model.config)
  logits = np.asarray(model(images).logits, np.float64)
  share = np.exp(logits - logits.max(-1, keepdims=True))
  share /= share.sum(-1, keepdims=True)
  names = label_names(model.config.data)
  names = names if len(names) == share.shape[1] else tuple(map(str, range(share.shape[1])))
  order = np.argsort(-share, axis=-1, kind="stable")[:, :top]
  return [[(names[c], float(row[c])) for c in best] for row, best in zip(share, order, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(prog="python -m tokred.predict", description="The likeliest classes of images.")
  parser.add_argument("--model", required=True, help="run directory, export or weights: what tokred.load takes")
  parser.add_argument("--show", nargs="?", const="", metavar="FILE.png", help="write a picture of surviving tokens")
  parser.add_argument("images", nargs="+")
  flags = parser.parse_args(argv)
  logging.set_verbosity(logging.WARNING)  # else JAX tells of every backend that this machine does not have
  if flags.show and not flags.show.endswith(".png"):
    sys.exit(f"tokred.predict: --show={flags.show!r} must end in .png; give --show behind the images to name none")
  try:
    model = load(flags.model)
    if isinstance(model, Exported) and flags.show is not None:
      raise ValueError(
        f"{flags.model} is a function without parameters, so --show cannot look inside; export orbax too"
      )
    if isinstance(model, Model):
      model = freeze(model)
    config = model.config
    if config.model.name == "vlm":
      raise ValueError(f"{flags.model} is a vision-language model: it answers questions, by eval.py or model.write")
    pixels = np.stack([read_image(path, config) for path in flags.images])
    answers = predict(model, pixels)
    for path, answer in zip(flags.images, answers, strict=True):
      print(path)
      for name, share in answer:
        print(f"  {share:7.2%}  {name}")
    if flags.show is not None:
      first = Path(flags.images[0])
      print(f"picture: {_show(model, pixels, answers, flags.show or first.with_name(f'{first.stem}_tokens.png'))}")
  except (ValueError, OSError) as error:
    sys.exit(f"tokred.predict: {' '.join(str(error).split())}")


def _normalised(pixels: np.ndarray, config: ConfigDict) -> np.ndarray:
  return normalise(pixels, mean_std(config.data, config.model.channels)).astype(np.float32)


def _show(
  model: Model, pixels: np.ndarray, answers: list[list[tuple[str, float]]], path: str | os.PathLike[str]
) -> Path:
  from tokred import viz  # matplotlib takes a second to import

  return viz.save_survivors(model, _normalised(pixels, model.config), path, titles=[answer[0][0] for answer in answers])


if __name__ == "__main__":
  main()
