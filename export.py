"""Freezes and exports a model, and checks it: python export.py --workdir=runs/digits --output=exported.

Of a vision-language model: encoder, prefill and decode step as StableHLO (`tokred.export.generation`), at the counts of
image tokens that it has, or at those of a method of configs/vlm_methods.py that acts in the tower:
  python export.py --workdir=runs/easy --output=exported --method=visionzip --keep=1.0,0.25 --max_new_tokens=4
"""

from absl import flags

from tokred import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, export or weights: what tokred.load takes.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
_FORMATS = flags.DEFINE_list("formats", ["orbax", "stablehlo"], "Of orbax, safetensors, stablehlo, onnx.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Of the functions; any where not given.")
_PLATFORMS = flags.DEFINE_list("platforms", None, "Of the StableHLO function: cpu, cuda, rocm, tpu; this one's.")
_DTYPE = flags.DEFINE_string("dtype", None, "Of activations and stored weights: float32, bfloat16; as it was trained.")
_PREPROCESS = flags.DEFINE_boolean("preprocess", False, "Functions take uint8 images and give probabilities.")
_LATENCY = flags.DEFINE_list("latency", ["1", "8", "64"], "Batch sizes of the card's latency table; none: --latency=")
_METHOD = flags.DEFINE_string("method", "", "Of configs/vlm_methods.py, for a vision-language model.")
_KEEP = flags.DEFINE_list("keep", [], "Shares of an image's tokens, for --method.")
_NEW = flags.DEFINE_integer("max_new_tokens", 32, "That an answer of a vision-language model may have.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Instead of config.data.data_dir.")


def main() -> None:
  import tokred
  from tokred import publish
  from tokred.config import refuse

  functions = dict(batch_size=_BATCH_SIZE.value, platforms=_PLATFORMS.value)
  functions |= dict(dtype=_DTYPE.value, preprocess=_PREPROCESS.value)
  tokred.export.check(_OUTPUT.value, _FORMATS.value, **functions)
  if not all(size.isdecimal() for size in _LATENCY.value):
    raise ValueError(f"--latency={','.join(_LATENCY.value)}; valid: batch sizes with commas between, or nothing")
  trained = tokred.load(_WORKDIR.value)
  if _DATA_DIR.value is not None:
    with trained.config.unlocked():
      trained.config.data.data_dir = _DATA_DIR.value
  if trained.config.model.name == "vlm":
    from configs.vlm_methods import reductions

    refuse(flags.FLAGS, ["formats", "dtype", "preprocess", "latency"], "a vision-language model")
    refuse(flags.FLAGS, [] if _METHOD.value else ["keep"], "a model as it is, without --method")
    models = list(reductions(trained, [_METHOD.value], _KEEP.value).values()) if _METHOD.value else [trained]
    options = dict(batch_size=_BATCH_SIZE.value or 1, platforms=_PLATFORMS.value, max_new_tokens=_NEW.value)
    told = publish.language(models, _OUTPUT.value, **options)
  else:
    refuse(flags.FLAGS, ["method", "keep", "max_new_tokens"], "a model of images alone")
    sizes = [int(size) for size in _LATENCY.value]
    dense = tokred.load(_WORKDIR.value, sites={}) if sizes else None
    told = publish.classifier(trained, dense, _OUTPUT.value, _FORMATS.value, sizes, **functions)
  print(told)


if __name__ == "__main__":
  command.run(main, "export.py", required=["workdir", "output"])
