"""How images are to be prepared: preprocessor_config.json as fields of config.data."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
BILINEAR = r"$|ViT|DINOv3|Siglip2"  # processors that resample so where their file is silent; the others are bicubic
SQUEEZING = r"ViT|DINOv3|DeiT"  # those to whom a size of one number is a square, not the shorter side
FILES = ("preprocessor_config.json", "processor_config.json")


def preprocessing(directory: Path, image_size: tuple[int, int], mean_std: tuple[Any, Any]) -> dict[str, Any]:
  """Fields of config.data.

  Args:
    directory: with preprocessor_config.json, or processor_config.json of newer versions; where neither is there,
      `mean_std` and the defaults of config.data are taken.
    image_size: that the model takes.
    mean_std: of the family, where the file is silent.

  Raises:
    ValueError: a damaged file, or a way of resampling or of padding that tokred does not have.
  """
  file = next((directory / name for name in FILES if (directory / name).is_file()), None)
  mean, std = mean_std
  if file is None:
    return dict(mean=mean, std=std)
  try:
    p = json.loads(file.read_text())
    p = p.get("image_processor", p)
    if not isinstance(p, Mapping):
      raise ValueError("not a dict")
  except (ValueError, AttributeError) as error:
    raise ValueError(f"{file} is damaged ({error}); fetch it again") from None
  if p.get("do_pad") and _kind(p).startswith("LlavaImage"):  # LLaVA-NeXT's do_pad is about batches
    raise ValueError(f"{file}: do_pad=true makes pictures square with a margin, which tokred does not do; valid: false")
  if p.get("do_normalize", True):
    mean, std = (tuple(p.get(f"image_{name}") or known) for name, known in (("mean", mean), ("std", std)))
  else:
    mean, std = (0.0,) * len(mean), (1.0,) * len(std)
  factor = 255 * p.get("rescale_factor", 1 / 255) if p.get("do_rescale", True) else 255.0
  if abs(factor - 1) > 1e-6:  # (f x / 255 - m) / s, as tokred takes x / 255
    mean, std = (tuple(value / factor for value in values) for values in (mean, std))
  out = dict(mean=mean, std=std)
  resample = p.get("resample", 2 if re.match(BILINEAR, _kind(p)) else 3)
  if resample not in RESAMPLING:
    raise ValueError(f"{file}: resample={resample!r}; valid: {', '.join(f'{n} ({w})' for n, w in RESAMPLING.items())}")
  return out | dict(resize=RESAMPLING[resample], crop_fraction=_crop_fraction(p, image_size))


def _kind(p: Mapping[str, Any]) -> str:
  """The class of the processor, in older files that of the feature extractor; "" where the file does not tell."""
  return str(p.get("image_processor_type") or p.get("feature_extractor_type") or "")


def _crop_fraction(p: Mapping[str, Any], image_size: tuple[int, int]) -> float:
  """Share of the resized image's shorter side that is kept; 0 where the whole image is squeezed.

  Where DeiT's class squeezes and then cuts, the sides keep their ratio here, as in its authors' evaluation.
  """
  size = p.get("size") or {}
  if isinstance(size, int):
    size = {"height" if re.match(SQUEEZING, _kind(p)) else "shortest_edge": size}
  crop = p.get("crop_size") or {}
  crop = crop if isinstance(crop, int) else crop.get("height") or crop.get("shortest_edge")
  if not p.get("do_center_crop", bool(crop)):
    return 0.0 if "height" in size else 1.0
  resized = size.get("shortest_edge") or size.get("height") if p.get("do_resize", True) else 0
  return min((crop or min(image_size)) / resized, 1.0) if resized else 1.0


def to_preprocessor(data: Mapping[str, Any], image_size: tuple[int, int]) -> dict[str, Any]:
  """The other way round: the content of preprocessor_config.json."""
  height, width = image_size
  out = dict(
    do_normalize=True, image_mean=list(data["mean"]), image_std=list(data["std"]), do_rescale=True,
    rescale_factor=1 / 255, do_resize=True,
    resample=next(number for number, name in RESAMPLING.items() if name == data["resize"]),
  )  # fmt: skip
  if not data["crop_fraction"]:
    return out | dict(image_processor_type="ViTImageProcessor", size=dict(height=height, width=width))
  edge = int(min(height, width) / data["crop_fraction"] + 1e-6)  # of a whole number that is divided twice
  crop = dict(do_center_crop=True, crop_size=dict(height=height, width=width), size=dict(shortest_edge=edge))
  return out | crop | dict(image_processor_type="CLIPImageProcessor")
