"""Images and labels: where they come from (`sources`), how they vary (`augment`), how they arrive (`pipeline`)."""

from tokred.data.pipeline import EvalBatches, TrainBatches, check, eval_batches, to_device, train_batches
from tokred.data.sources import DataInfo, Source, describe, label_names, open_source

__all__ = [
  "DataInfo",
  "EvalBatches",
  "Source",
  "TrainBatches",
  "check",
  "describe",
  "eval_batches",
  "label_names",
  "open_source",
  "to_device",
  "train_batches",
]
