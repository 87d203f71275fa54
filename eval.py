"""Evaluates a model, in gather mode unless asked otherwise: python eval.py --workdir=runs/digits [--split=test].

Prints one JSON object: accuracy, accuracy_top5, loss, examples, counts, sites, gflops, gmacs.
Of a vision-language model one for each method of configs/vlm_methods.py and each share of its image tokens (without
--methods as it is): accuracy (exact match of what greedy decoding writes), vqa_accuracy, choice_accuracy (the likeliest
of the data set's answers), caption_loss, image_tokens (that the language model is given; sites in it may take more),
gflops, gmacs, gmacs of a written token, bytes of a prompt's keys and values, times of prefill and decoding.
  python eval.py --workdir=runs/easy --methods=random,visionzip,divprune --keep=1.0,0.5,0.1
"""

import json
from pathlib import Path

from absl import flags

from tokred import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, or export.")
_SPLIT = flags.DEFINE_string("split", None, "In TFDS's split syntax; config.data.eval_split where not given.")
_DATASET = flags.DEFINE_string("dataset", None, "Instead of config.data.name; of the same classes.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Instead of config.data.data_dir.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "config.eval.batch_size where not given.")
_MODE = flags.DEFINE_enum("mode", "gather", ["gather", "mask"], "mask: as it was trained, to compare.")
_METHODS = flags.DEFINE_list("methods", [], "Of configs/vlm_methods.py.")
_KEEP = flags.DEFINE_list("keep", [], "Shares of an image's tokens, for --methods; 1.0: the model without sites.")
_TIMES = flags.DEFINE_bool("times", True, "Whether a vision-language model is timed too.")
_OUTPUT = flags.DEFINE_string("output", None, "File for the JSON, besides printing it.")


def main() -> None:
  import tokred
  from tokred.config import refuse
  from tokred.evaluate import evaluate
  from tokred.files import write_json

  model = tokred.load(_WORKDIR.value)
  model = tokred.freeze(model) if _MODE.value == "gather" else model
  with model.config.unlocked():
    model.config.data.name = _DATASET.value or model.config.data.name
    model.config.data.data_dir = model.config.data.data_dir if _DATA_DIR.value is None else _DATA_DIR.value
  if model.config.model.name == "vlm":
    from configs.vlm_methods import reductions
    from tokred.budgets import judge

    refuse(flags.FLAGS, ["mode"], "a vision-language model")
    refuse(flags.FLAGS, [] if _METHODS.value else ["keep"], "a model as it is, without --methods")
    models = reductions(model, _METHODS.value, _KEEP.value) if _METHODS.value else {"as it is": model}
    result = judge(models, _SPLIT.value, _BATCH_SIZE.value, times=_TIMES.value)
  else:
    refuse(flags.FLAGS, ["methods", "keep", "times"], "a model of images alone")
    result = evaluate(model, _SPLIT.value, _BATCH_SIZE.value, _MODE.value)
  print(json.dumps(result))
  if _OUTPUT.value:
    write_json(Path(_OUTPUT.value), result)


if __name__ == "__main__":
  command.run(main, "eval.py", required=["workdir"])
