"""Images and labels: where they come from (`sources`), how they vary (`augment`), how they arrive (`pipeline`)."""

from tokred.data.conversations import conversation_batches, open_tokenizer
from tokred.data.feeds import feed, num_image_tokens, tokenizer
from tokred.data.pipeline import EvalBatches, TrainBatches, check, eval_batches, to_device, train_batches
from tokred.data.sources import DataInfo, Source, describe, label_names, open_source

__all__ = [
  "DataInfo",
  "EvalBatches",
  "Source",
  "TrainBatches",
  "check",
  "conversation_batches",
  "describe",
  "eval_batches",
  "feed",
  "label_names",
  "num_image_tokens",
  "open_source",
  "open_tokenizer",
  "to_device",
  "tokenizer",
  "train_batches",
]
