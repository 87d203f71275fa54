"""Trains a model: python train.py --config=configs/digits.py --workdir=runs/digits [--config.a.b=value]."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, FILE.py or FILE.py:arguments.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; the same command goes on where it was left.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f"train.py: unexpected argument {argv[1]!r}; flags begin with --")
  logging.set_verbosity(logging.WARNING)  # else JAX tells of every backend that this machine does not have
  from tokred.train.loop import train  # JAX starts after flags are parsed

  try:
    summary = train(_CONFIG.value, _WORKDIR.value)
  except (ValueError, ArithmeticError, OSError) as error:
    sys.exit(f"train.py: {' '.join(str(error).split())}")
  read = f", of an image {summary['image_tokens']} read by the language model" if "image_tokens" in summary else ""
  mean = f" at most, {summary['mean_gflops']:.4g} in the mean" if "mean_gflops" in summary else ""
  print(f"accuracy {summary['accuracy']:.4f}, {summary['gflops']:.4g} GFLOPs{mean}, tokens {summary['counts']}{read}")


def parse(argv: list[str]) -> list[str]:
  """absl's parser; what is wrong with a flag is told in one line, also where ml_collections raises something else."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:  # of a recipe that fails it holds the traceback, which ends in what matters
    sys.exit(f"train.py: {str(error).strip().splitlines()[-1].strip()}")
  except OSError as error:  # an override behind a recipe that fails: its error wrapped anew
    sys.exit(f"train.py: {str(error).rpartition('failure to load: ')[2].strip()}")
  except (AttributeError, KeyError) as error:  # an override of a field that the config does not have
    text = error.args[0].args[0] if isinstance(error.args[0], Exception) else error.args[0]
    sys.exit(f"train.py: the config has no field {' '.join(str(text).split())}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=parse)
