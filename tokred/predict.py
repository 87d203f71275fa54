"""What a model sees in images: the five likeliest classes of each, or what it answers to a question.

    python -m tokred.predict --model=exported cat.jpg dog.png [--show | --show=FILE.png]
    python -m tokred.predict --model=runs/easy cat.jpg --question="what is on the sofa?"

`--model` is whatever `tokred.load` takes: a run directory, an export of any format, a Hugging Face directory.  `--show`
also writes a picture of the tokens that survive each block, beside the first image or as FILE.png.  A vision-language
model is asked the same of each image.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

from tokred.data import images as pictures
from tokred.data import label_names, num_image_tokens, tokenizer
from tokred.data.batches import mean_std, normalise
from tokred.data.conversations import Writer
from tokred.data.folder import read
from tokred.data.talks import IMAGE, Talk
from tokred.export import Exported
from tokred.export.folder import LANGUAGE_CARD
from tokred.export.generation import Generation, open_generation
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
    raise ValueError("a vision-language model has no classes: it answers questions, by predict.answer")
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


def answer(model: Reader | Generation, question: str, images: Sequence[str | os.PathLike[str]], **options: Any) -> str:
  """What a vision-language model says to a question about images.

  The prompt is written as the model has learned: with `config.text.prompt` and `system`, in the ids of
  `config.text.tokenizer`.  A LLaVA directory tells no prompt: there the question brings what stands around it, such as
  "USER: <image>\\nWhat is it? ASSISTANT:".

  Args:
    model: with parameters, or an export of one, as `tokred.export.generation.open_generation` gives it.
    question: with <image> where an image stands; where it names none, the images stand before it.
    images: files, in the order of the text.
    **options: of the model's `write`: max_new_tokens, ...

  Raises:
    ValueError: no such model, a question without images, one that cannot be read, or that the model cannot take.
  """
  ids, pixels = _prompt(model.config, question, images)
  words = tokenizer(model.config)
  stop = (words.eos,) if words.eos >= 0 else ()
  said = np.asarray(model.write(ids, pixels, stop_tokens=stop, **options).tokens)[0].tolist()
  return words.decode(said[: said.index(words.eos)] if words.eos in said else said)


def _prompt(config: ConfigDict, question: str, images: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
  """Ids (1, S) and normalised images (1, R, height, width, channels) of a question."""
  m, t = config.model, config.text
  if m.name != "vlm":
    raise ValueError(f"question={question!r}: a model of images alone answers none; valid: a vision-language model")
  if not t.tokenizer:
    raise ValueError(
      "config.text.tokenizer='': nothing says which ids the model has for words; valid: a run, an export, or a LLaVA "
      "directory with its tokenizer's files"
    )
  if isinstance(images, (str, os.PathLike)):
    raise ValueError(f"images={str(images)!r}; valid: a list of files")
  question = question if IMAGE in question else f"{IMAGE}\n" * len(images) + question
  if not len(images) or question.count(IMAGE) != len(images):
    raise ValueError(
      f"question={question!r} has {question.count(IMAGE)} {IMAGE} for {len(images)} images; valid: as many"
    )
  pixels = np.stack([read_image(path, config) for path in images])
  writer = Writer(tokenizer(config), config.llm.image_token, num_image_tokens(m), t.prompt, t.system)
  line = zip(*writer(Talk(((question, ""),), tuple(range(len(images))))), strict=True)
  ids = [index for index, answers in line if not answers]
  return np.array([ids], np.int32), _normalised(pixels, config)[None]


def main(argv: Sequence[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(prog="python -m tokred.predict", description="The likeliest classes of images.")
  parser.add_argument("--model", required=True, help="run directory, export or weights: what tokred.load takes")
  parser.add_argument("--show", nargs="?", const="", metavar="FILE.png", help="write a picture of surviving tokens")
  parser.add_argument("--question", help="what a vision-language model is asked of each image")
  parser.add_argument("images", nargs="+")
  flags = parser.parse_args(argv)
  logging.set_verbosity(logging.WARNING)  # else JAX tells of every backend that this machine does not have
  if flags.show and not flags.show.endswith(".png"):
    sys.exit(f"tokred.predict: --show={flags.show!r} must end in .png; give --show behind the images to name none")
  try:
    model = open_generation(flags.model) if (Path(flags.model) / LANGUAGE_CARD).is_file() else load(flags.model)
    if isinstance(model, (Exported, Generation)) and flags.show is not None:
      raise ValueError(
        f"{flags.model} is a function without parameters, so --show cannot look inside; "
        + ("export orbax too" if isinstance(model, Exported) else "give the run that was exported")
      )
    if isinstance(model, Model):
      model = freeze(model)
    config = model.config
    if config.model.name == "vlm" and flags.question is None:
      raise ValueError(f"{flags.model} is a vision-language model: it answers a --question, and has no classes")
    if flags.question is not None:
      said = {path: answer(model, flags.question, [path]) for path in flags.images}
      print("\n".join(f"{path}\n  {words}" for path, words in said.items()))
      if flags.show is not None:
        print(f"picture: {_show_read(model, flags.question, said, _picture(flags))}")
      return
    pixels = np.stack([read_image(path, config) for path in flags.images])
    answers = predict(model, pixels)
    for path, best in zip(flags.images, answers, strict=True):
      print(path)
      for name, share in best:
        print(f"  {share:7.2%}  {name}")
    if flags.show is not None:
      print(f"picture: {_show(model, pixels, answers, _picture(flags))}")
  except (ValueError, OSError) as error:
    sys.exit(f"tokred.predict: {' '.join(str(error).split())}")


def _normalised(pixels: np.ndarray, config: ConfigDict) -> np.ndarray:
  return normalise(pixels, mean_std(config.data, config.model.channels)).astype(np.float32)


def _picture(flags: argparse.Namespace) -> Path:
  first = Path(flags.images[0])
  return Path(flags.show) if flags.show else first.with_name(f"{first.stem}_tokens.png")


def _show_read(model: Reader, question: str, said: dict[str, str], path: Path) -> Path:
  from tokred import viz  # see below

  ids, pixels = zip(*(_prompt(model.config, question, [image]) for image in said), strict=True)
  return viz.save_survivors(model, np.concatenate(pixels), path, titles=list(said.values()), ids=np.concatenate(ids))


def _show(
  model: Model, pixels: np.ndarray, answers: list[list[tuple[str, float]]], path: str | os.PathLike[str]
) -> Path:
  from tokred import viz  # matplotlib takes a second to import

  return viz.save_survivors(model, _normalised(pixels, model.config), path, titles=[answer[0][0] for answer in answers])


if __name__ == "__main__":
  main()
