"""Evaluates a model in the form that ships: python eval.py --workdir=runs/digits [--split=test]."""

import json
import sys

from absl import app, flags, logging

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, or export.")
_SPLIT = flags.DEFINE_string("split", None, "In TFDS's split syntax; config.data.eval_split where not given.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Instead of config.data.data_dir.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "config.eval.batch_size where not given.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f"eval.py: unexpected argument {argv[1]!r}; flags begin with --")
  logging.set_verbosity(logging.WARNING)  # else JAX tells of every backend that this machine does not have
  import tokred
  from tokred.evaluate import evaluate

  try:
    model = tokred.freeze(tokred.load(_WORKDIR.value))
    if _DATA_DIR.value is not None:
      with model.config.unlocked():
        model.config.data.data_dir = _DATA_DIR.value
    result = evaluate(model, _SPLIT.value, _BATCH_SIZE.value)
  except (ValueError, OSError) as error:
    sys.exit(f"eval.py: {' '.join(str(error).split())}")
  print(json.dumps(result))


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir"])
  app.run(main)
