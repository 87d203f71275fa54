"""LLaVA's directories as configs and parameters, so that they load, train and are judged like every other model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokred.pretrained.preprocessing import CLIP, HALF, preprocessing
from tokred.pretrained.vlm import Files, open_vlm

SIZES = ("vocab", "width", "depth", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "norm_eps", "max_length")
SIZES += ("qkv_bias", "proj_bias", "mlp_bias", "qk_norm", "tied", "activation")


@dataclasses.dataclass(frozen=True)
class ReaderSource:
  """What `tokred.pretrained.Source` is for a ViT."""

  path: str
  files: Files

  def config(self, model: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """A config of tokred.

    Args:
      model: fields of config.model that the user gives.
      strict: files of this kind tell all; it does not matter here.
    """
    del strict
    f, size = self.files, self.files.model["image_size"]
    rope, scale = f.llm.rope, ()
    if rope.kind != "default":
      scale = (rope.factor,) if rope.kind == "linear" else (rope.factor, rope.low, rope.high, rope.original)
    llm = {name: getattr(f.llm, name) for name in SIZES} | dict(image_token=f.image_token)
    llm |= dict(rope_theta=rope.theta, rope_type=rope.kind, rope_scale=scale)
    data = preprocessing(Path(self.path), size, CLIP if f.family.startswith("clip") else HALF)
    text = dict(tokenizer=self.path) if any(Path(self.path).glob("tokenizer*")) else {}
    seen = dict(f.config()) | dict(name="vlm") | dict(model)
    return dict(model=seen, llm=llm, projector=dict(name="mlp"), data=data, text=text)

  def check(self, model: Mapping[str, Any]) -> None:
    """Raises ValueError where fields of config.model differ from the files in what their arrays do not show."""
    for field in ("norm_eps", "activation", "final_norm", "pool", "pre_norm", "depth"):
      if field in self.files.model and model[field] != self.files.model[field]:
        raise ValueError(
          f"config.model.{field}={model[field]!r}, but {self.path} has {self.files.model[field]!r}; set it to that"
        )

  def arrays(self, target: Mapping[str, Any], grid: Any = None) -> dict[str, Any]:
    """The arrays by our paths; nothing is read yet."""
    del target, grid
    return self.files.arrays()


def open_reader(path: Path) -> ReaderSource:
  """The LLaVA of a directory; nothing but headers is read.

  Raises:
    FileNotFoundError, ValueError: see `tokred.pretrained.vlm.open_vlm`; or a model whose images have no one size.
  """
  files = open_vlm(path)
  if files.kind != "llava":
    raise ValueError(
      f"{path}: model_type={files.kind!r} has no one image size, which config.model needs; valid: llava, or "
      "tokred.pretrained.vlm.load_vlm, which gives module and parameters"
    )
  return ReaderSource(str(path), files)
