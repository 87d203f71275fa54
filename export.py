"""Freezes and exports a model, and checks it: python export.py --workdir=runs/digits --output=exported."""

import json
import subprocess
import sys
import tempfile

from absl import app, flags, logging

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
_FORMATS = flags.DEFINE_list("formats", ["orbax", "stablehlo"], "Formats to write.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Of the StableHLO function; any where not given.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f"export.py: unexpected argument {argv[1]!r}; flags begin with --")
  logging.set_verbosity(logging.WARNING)  # else JAX tells of every backend that this machine does not have
  import numpy as np

  import tokred

  try:
    trained = tokred.load(_WORKDIR.value)
    model = tokred.export.save(trained, _OUTPUT.value, _FORMATS.value, batch_size=_BATCH_SIZE.value)
  except (ValueError, OSError) as error:
    sys.exit(f"export.py: {' '.join(str(error).split())}")
  m = model.config.model
  shape = (_BATCH_SIZE.value or 8, *m.image_size, m.channels)
  images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
  with tempfile.NamedTemporaryFile(suffix=".npz") as file:
    np.savez(file, images=images, logits=np.asarray(trained(images).logits))
    file.flush()
    command = [sys.executable, "-m", "tokred.export", _OUTPUT.value, file.name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  differences = json.loads(done.stdout.splitlines()[-1])
  print(f"tokens after each block {model.counts}, {model.flops / 1e9:.4g} GFLOPs")
  print(f"largest difference of the logits, from a fresh process: {differences}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir", "output"])
  app.run(main)
