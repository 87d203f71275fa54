"""The batches that a config's model learns from and is judged by: images with labels, or conversations."""

import functools

from ml_collections import ConfigDict

from tokred.data import conversations, pipeline
from tokred.data.tokenizers import Tokenizer


def feed(
  config: ConfigDict, split: str, *, train: bool, batch_size: int, process_index: int = 0, process_count: int = 1
) -> pipeline.TrainBatches | pipeline.EvalBatches:
  """Batches of a split as `config.model` takes them.

  Args:
    config: the whole config; read are `model`, `data`, `seed` and, of a VLM, `text` and `llm`.
    split: in TFDS's split syntax.
    train: endless, shuffled and augmented, or each example once.
    batch_size: examples of this process in a batch.
    process_index: of this process.
    process_count: processes that share each global batch.

  Raises:
    ValueError: see `pipeline.train_batches` and `conversations.conversation_batches`.
  """
  m, common = config.model, dict(batch_size=batch_size, process_index=process_index, process_count=process_count)
  common |= dict(image_size=m.image_size, channels=m.channels)
  if m.name == "vlm":
    t = config.text
    return conversations.conversation_batches(
      config.data,
      split,
      tokenizer=tokenizer(config),
      num_image_tokens=num_image_tokens(m),
      image_token=config.llm.image_token,
      max_length=t.max_length,
      seed=config.seed,
      train=train,
      images=t.images,
      pack=t.pack and train,
      share=t.share and train,
      prompt=t.prompt,
      system=t.system,
      too_long=t.too_long,
      **common,
    )
  if train:
    return pipeline.train_batches(config.data, num_classes=m.num_classes, seed=config.seed, **common)
  return pipeline.eval_batches(config.data, split, num_classes=m.num_classes, **common)


def num_image_tokens(model: ConfigDict) -> int:
  """Placeholders of an image in the text: the patches of `config.model`."""
  patch = int(model.variant.rpartition("/")[2])
  return (model.image_size[0] // patch) * (model.image_size[1] // patch)


def tokenizer(config: ConfigDict) -> Tokenizer:
  """The tokenizer of `config.text`.

  Raises:
    ValueError: there is none, or its ids do not fit `config.llm`.
  """
  d, t = config.data, config.text
  found = _tokenizer(d.name, d.data_dir, d.train_split, t.tokenizer, t.prompt, t.system, config.llm.image_token)
  if found.size > config.llm.vocab:
    raise ValueError(f"config.llm.vocab={config.llm.vocab}: the tokenizer has {found.size} ids; valid: as many or more")
  if found.image_token not in (-1, config.llm.image_token) and config.llm.image_token < found.size:
    raise ValueError(
      f"config.llm.image_token={config.llm.image_token}: the tokenizer has placeholders of id {found.image_token}"
    )
  return found


@functools.lru_cache(maxsize=4)
def _tokenizer(
  name: str, data_dir: str, split: str, path: str, prompt: str, system: str, image_token: int
) -> Tokenizer:
  data = ConfigDict(dict(name=name, data_dir=data_dir, train_split=split))
  return conversations.open_tokenizer(data, path, prompt=prompt, system=system, image_token=image_token)
