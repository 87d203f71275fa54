"""Freezes and exports a model, and checks it: python export.py --workdir=runs/digits --output=exported."""

import sys

from absl import app, flags, logging

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
_FORMATS = flags.DEFINE_list("formats", ["orbax", "stablehlo"], "Formats to write.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Of the StableHLO function; any where not given.")
_PLATFORMS = flags.DEFINE_list("platforms", None, "Of the StableHLO function: cpu, cuda, rocm, tpu; this one's.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Instead of config.data.data_dir.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f"export.py: unexpected argument {argv[1]!r}; flags begin with --")
  logging.set_verbosity(logging.WARNING)  # else JAX tells of every backend that this machine does not have
  import tokred
  from tokred.evaluate import evaluate, examples

  try:
    trained = tokred.load(_WORKDIR.value)
    if _DATA_DIR.value is not None:
      with trained.config.unlocked():
        trained.config.data.data_dir = _DATA_DIR.value
    frozen = tokred.freeze(trained)
    accuracy = evaluate(frozen)["accuracy"]
    images, _ = examples(frozen, _BATCH_SIZE.value or 64)
    tokred.export.save(
      trained,
      _OUTPUT.value,
      _FORMATS.value,
      batch_size=_BATCH_SIZE.value,
      platforms=_PLATFORMS.value,
      accuracy=accuracy,
    )
    differences = tokred.export.verify(_OUTPUT.value, images, trained(images).logits)
  except (ValueError, OSError) as error:
    sys.exit(f"export.py: {' '.join(str(error).split())}")
  print(f"tokens after each block {frozen.counts}, {frozen.flops / 1e9:.4g} GFLOPs, accuracy {accuracy:.4f}")
  print(f"largest difference of the logits, from a fresh process, on {len(images)} real images: {differences}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir", "output"])
  app.run(main)
