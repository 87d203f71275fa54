"""Trains a model: python train.py --config=configs/digits.py --workdir=runs/digits [--config.a.b=value]."""

import sys

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, FILE.py or FILE.py:arguments.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; the same command goes on where it was left.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f"train.py: unexpected argument {argv[1]!r}; flags begin with --")
  from tokred.train.loop import train  # JAX starts after flags are parsed

  try:
    summary = train(_CONFIG.value, _WORKDIR.value)
  except (ValueError, ArithmeticError, OSError) as error:
    sys.exit(f"train.py: {error}")
  print(f"accuracy {summary['accuracy']:.4f}, {summary['gflops']:.4g} GFLOPs, tokens {summary['counts']}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
