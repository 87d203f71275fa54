"""Freezes and exports a model, and checks it: python export.py --workdir=runs/digits --output=exported."""

import dataclasses
import sys

from absl import app, flags, logging

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, export or weights: what tokred.load takes.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
_FORMATS = flags.DEFINE_list("formats", ["orbax", "stablehlo"], "Of orbax, safetensors, stablehlo, onnx.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Of the functions; any where not given.")
_PLATFORMS = flags.DEFINE_list("platforms", None, "Of the StableHLO function: cpu, cuda, rocm, tpu; this one's.")
_DTYPE = flags.DEFINE_string("dtype", None, "Of activations and stored weights: float32, bfloat16; as it was trained.")
_PREPROCESS = flags.DEFINE_boolean("preprocess", False, "Functions take uint8 images and give probabilities.")
_LATENCY = flags.DEFINE_list("latency", ["1", "8", "64"], "Batch sizes of the card's latency table; none: --latency=")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Instead of config.data.data_dir.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f"export.py: unexpected argument {argv[1]!r}; flags begin with --")
  logging.set_verbosity(logging.WARNING)  # else JAX tells of every backend that this machine does not have
  import tokred
  from tokred.evaluate import evaluate, examples

  asked = dict(batch_size=_BATCH_SIZE.value, platforms=_PLATFORMS.value, dtype=_DTYPE.value)
  try:
    tokred.export.check(_OUTPUT.value, _FORMATS.value, **asked)
    trained = tokred.load(_WORKDIR.value)
    with trained.config.unlocked():
      if _DATA_DIR.value is not None:
        trained.config.data.data_dir = _DATA_DIR.value
      trained.config.data.labels = tokred.data.label_names(trained.config.data)
    frozen, sizes = tokred.freeze(trained), [int(size) for size in _LATENCY.value]
    accuracy = evaluate(frozen)["accuracy"]
    images, _ = examples(frozen, _BATCH_SIZE.value or 64)
    latency = tokred.bench.compare(frozen, tokred.load(_WORKDIR.value, sites={}), sizes, rounds=5) if sizes else []
    tokred.export.save(
      trained,
      _OUTPUT.value,
      _FORMATS.value,
      **asked,
      preprocess=_PREPROCESS.value,
      accuracy=accuracy,
      images=images,
      latency=[dataclasses.asdict(row) for row in latency],
    )
    found = tokred.export.read_card(_OUTPUT.value)["verified"]["formats"]
  except (ValueError, OSError) as error:
    sys.exit(f"export.py: {' '.join(str(error).split())}")
  differences = {name: values["difference"] for name, values in found.items()}
  print(f"tokens after each block {frozen.counts}, {frozen.flops / 1e9:.4g} GFLOPs, accuracy {accuracy:.4f}")
  print(f"largest difference of the logits, from a fresh process, on {len(images)} real images: {differences}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir", "output"])
  app.run(main)
