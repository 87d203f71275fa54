"""Trains a model: python train.py --config=configs/digits.py --workdir=runs/digits [--config.a.b=value]."""

from absl import flags
from ml_collections import config_flags

from tokred import command

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, FILE.py or FILE.py:arguments.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; the same command goes on where it was left.")


def main() -> None:
  from tokred.train.loop import train  # JAX starts after flags are parsed

  summary = train(_CONFIG.value, _WORKDIR.value)
  read = f", of an image {summary['image_tokens']} read by the language model" if "image_tokens" in summary else ""
  mean = f" at most, {summary['mean_gflops']:.4g} in the mean" if "mean_gflops" in summary else ""
  print(f"accuracy {summary['accuracy']:.4f}, {summary['gflops']:.4g} GFLOPs{mean}, tokens {summary['counts']}{read}")


if __name__ == "__main__":
  command.run(main, "train.py", required=["config", "workdir"])
