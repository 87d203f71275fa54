"""easy-VQA for TFDS, which does not know it: questions about one coloured shape.  (Victor Zhou, 2019; MIT licence)

The package `easy-vqa` of PyPI carries all of it, so that nothing has to be downloaded; importing this module makes
`tfds.builder("easy_vqa")` prepare it from there.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class EasyVqa(tfds.core.GeneratorBasedBuilder):
  """38 575 questions about 4 000 images of 64 x 64 pixels to learn from, 9 673 about 1 000 others; 13 answers."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(
      dict(
        image=tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
        image_id=tfds.features.Scalar(dtype=np.int64),
        question=tfds.features.Text(),
        answer=tfds.features.Text(),
        label=tfds.features.ClassLabel(num_classes=13),
      )
    )
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager
    package = importlib.util.find_spec("easy_vqa")
    if package is None or not package.submodule_search_locations:
      raise ModuleNotFoundError("easy-VQA comes with the package easy-vqa: pip install easy-vqa")
    folder = Path(package.submodule_search_locations[0]) / "data"
    self.info.features["label"].names = (folder / "answers.txt").read_text().split()
    return {split: self._generate_examples(folder / split) for split in ("train", "test")}

  def _generate_examples(self, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, (question, answer, image) in enumerate(json.loads((folder / "questions.json").read_text())):
      picture = folder / "images" / f"{image}.png"
      yield number, dict(image=picture, image_id=image, question=question, answer=answer, label=answer)
