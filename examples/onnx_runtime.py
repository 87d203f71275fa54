"""Runs an exported ONNX graph without JAX: python examples/onnx_runtime.py exported image.png

Needs onnxruntime, numpy and Pillow.  The export: python export.py --workdir=... --output=exported --formats=onnx
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def read(file, config):
  """The image as the model saw it in evaluation, before normalisation: uint8 (1, height, width, channels)."""
  model, data = config["model"], config["data"]
  height, width = model["image_size"]
  picture = Image.open(file)
  if picture.mode.startswith("I"):  # 16 bits, of which the upper byte counts: convert would clip at 255
    picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
  picture = picture.convert("RGB" if model["channels"] == 3 else "L")
  size = [width, height]
  if data["crop_fraction"]:  # 0: squeezed; else resized until the crop is covered
    scale = max(int(side / data["crop_fraction"]) / s for side, s in zip(size, picture.size, strict=True))
    size = [int(side * scale + 1e-6) for side in picture.size]
  if size != list(picture.size):
    picture = picture.resize(size, Image.Resampling[data["resize"].upper()])
  left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
  return np.asarray(picture.crop((left, top, left + width, top + height))).reshape(1, height, width, -1)


def main(folder, file):
  card = json.loads((Path(folder) / "tokred.json").read_text())
  data, images = card["config"]["data"], read(file, card["config"])
  if not card["preprocess"]:  # else the graph normalises, and gives probabilities
    mean, std = (np.array(data[name][: images.shape[-1]]) for name in ("mean", "std"))
    images = ((images / 255 - mean) / std).astype(np.float32)
  session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"))
  share = session.run(None, {"images": np.repeat(images, card["batch_size"] or 1, axis=0)})[0][0]
  if not card["preprocess"]:
    share = np.exp(share - share.max())
    share /= share.sum()
  labels = data["labels"] or [str(index) for index in range(len(share))]
  for index in np.argsort(-share, kind="stable")[:5]:
    print(f"{share[index]:7.2%}  {labels[index]}")


if __name__ == "__main__":
  main(*sys.argv[1:])
