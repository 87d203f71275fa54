"""From conversations about images to batches of fixed shapes for a vision-language model.

A conversation is written as: bos, the system text, then for each turn the prompt around its question and the answer,
closed by eos.  Where the question says `<image>` stand as many placeholders as an image has patches.  Each piece is
encoded on its own, so that it is known which ids answer; the loss is on these, eos among them.

A batch is a pure function of the config and its number, as in `pipeline`.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from tokred.data import augment, batches, packing, pipeline
from tokred.data.batches import Batch
from tokred.data.pipeline import EvalBatches, TrainBatches
from tokred.data.rows import Corpus, Layout, about_one_image, check_rows
from tokred.data.talks import IMAGE, Talk, Talks, open_talks
from tokred.data.tokenizers import Tokenizer, WordTokenizer, read_tokenizer


def conversation_batches(
  config_data: ConfigDict,
  split: str,
  *,
  tokenizer: Tokenizer,
  image_size: tuple[int, int],
  channels: int,
  num_image_tokens: int,
  image_token: int,
  max_length: int,
  batch_size: int,
  seed: int,
  train: bool,
  process_index: int = 0,
  process_count: int = 1,
  images: int = 1,
  pack: bool = False,
  share: bool = False,
  prompt: str = "{question}",
  system: str = "",
  too_long: str = "error",
) -> TrainBatches | EvalBatches:
  """Batches of conversations: endless, shuffled and augmented, or each once in order.

  Args:
    config_data: `config.data`.
    split: in TFDS's split syntax.
    tokenizer: text to ids.
    image_size: (height, width) that the tower takes.
    channels: that it takes, 1 or 3.
    num_image_tokens: N, patches of an image and placeholders in the text.
    image_token: the id of placeholders.
    max_length: S, ids of a row.
    batch_size: B, rows of this process in a batch.
    seed: of order, packing and augmentation, not negative.
    train: endless and shuffled, or once.
    process_index: of this process.
    process_count: processes that share each global batch.
    images: R, room for images of a conversation, and in a row; a packed row has as many as the fullest.
    pack: several conversations share a row, and a batch has segment and position.
    share: those about the same image share it: a row has one image, segment SHARED, and as many conversations behind it
      as fit, each with the positions that it has alone.  Not together with `pack`.
    prompt: what stands before an answer; "{question}" in it is replaced.
    system: what stands before the first turn, where the conversation does not say.
    too_long: "error" or "skip": a conversation of more than `max_length` ids.

  Returns:
    Iterator (training) or iterable (evaluation) of dicts: image (B, R, height, width, channels) float32, normalised,
    0 where there is none; ids (B, S) int32, padded on the right; mask (B, S) bool; answer (B, S) bool, ids that belong
    to an answer; slot (B, R, N) int32, the place in ids of each patch, -1 where there is no image; label (B,) int32,
    -1 where the answer is none of `label_names`; index (B,) int32, the row's number, -1 in padding; valid (B,) bool,
    False in rows that pad the last batch.  With `pack` also segment (B, S) int32, 0, 1, ... within a row and -1 in
    padding, and position (B, S) int32, counted within each segment.

  Raises:
    ValueError: a field out of its range, data that cannot be read, or a conversation that does not fit.
  """
  pipeline.check(config_data, channels)
  _check(config_data, seed, prompt, too_long, images)
  check_rows(pack, share)
  found = open_talks(config_data, split, "train_split" if train else "eval_split")
  text = Writer(tokenizer, image_token, num_image_tokens, prompt, system)
  corpus = _encode(found, text, max_length, images, too_long)
  rows = [[index] for index in range(len(corpus))]
  if pack:
    order = np.random.default_rng((seed, 1)).permutation(len(corpus)) if train else np.arange(len(corpus))
    chosen = packing.first_fit(np.diff(corpus.starts)[order], corpus.counts[order], max_length, max_length)
    rows = [order[row].tolist() for row in chosen]
    images = max(int(corpus.counts[row].sum()) for row in rows)
  if share:
    rows = about_one_image(corpus, image_token, max_length, seed)
  layout = Layout(corpus, rows, max_length, images, num_image_tokens, image_token, tokenizer.pad, pack, share)
  resize = not (train and config_data.random_resized_crop)  # which resizes by itself
  pictures = batches.read_examples(config_data, found.pictures, image_size, channels, resize=resize)
  batch_at = TalkBatch(
    examples=pictures,
    layout=layout,
    changes=augment.changes(config_data, image_size) if train else (),
    mean_std=batches.mean_std(config_data, channels),
    image_shape=(*image_size, channels),
    batch_size=batch_size,
    seed=seed,
    process=(process_index, process_count),
    train=train,
  )
  if train:
    return TrainBatches(batch_at, config_data.num_workers)
  num_batches = -(-len(rows) // (batch_size * process_count))
  return EvalBatches(batch_at, num_batches, config_data.num_workers, found.label_names)


def open_tokenizer(
  config_data: ConfigDict, path: str, *, prompt: str = "{question}", system: str = "", image_token: int | None = None
) -> Tokenizer:
  """The tokenizer at `path`, or the words of the training split where that is "".

  Args:
    config_data: `config.data`.
    path: see `tokenizers.read_tokenizer`.
    prompt: its words belong to the vocabulary; likewise those of `system`.
    system: see `conversation_batches`.
    image_token: id of placeholders where a checkpoint's tokenizer does not say.

  Raises:
    ValueError: as `read_tokenizer` and `open_talks`.
  """
  if path:
    return read_tokenizer(path, image_token)
  found = open_talks(config_data, config_data.train_split, "train_split")
  systems = [talk.system for talk in found.talks if talk.system]
  return WordTokenizer.learn([prompt.replace("{question}", " "), system, *systems, *found.texts()])


@dataclasses.dataclass(frozen=True)
class Writer:
  """How a conversation is written in ids."""

  tokenizer: Tokenizer
  image_token: int
  num_image_tokens: int
  prompt: str = "{question}"
  system: str = ""

  def __call__(self, talk: Talk) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them answer."""
    t = self.tokenizer
    ids = [t.bos] if t.bos >= 0 else []
    ids += self._encode(talk.system or self.system)
    answer = [False] * len(ids)
    for question, reply in talk.turns:
      asked = self.question(question)
      said = [*self._encode(reply), *([t.eos] if t.eos >= 0 else [])]
      ids += asked + said
      answer += [False] * len(asked) + [True] * len(said)
    return ids, answer

  def question(self, question: str) -> list[int]:
    """Ids of a prompt, with placeholders; what a user asks of a trained model is written likewise."""
    pieces = self.prompt.replace("{question}", question).split(IMAGE)
    ids = self._encode(pieces[0].strip())
    for piece in pieces[1:]:
      ids += [self.image_token] * self.num_image_tokens + self._encode(piece.strip())
    return ids

  def _encode(self, text: str) -> list[int]:
    return list(_cached(self.tokenizer)(text)) if text else []


@functools.lru_cache(maxsize=4)
def _cached(tokenizer: Tokenizer):
  return functools.lru_cache(maxsize=100_000)(lambda text: tuple(tokenizer.encode(text)))


def _encode(found: Talks, text: Writer, max_length: int, images: int, too_long: str) -> Corpus:
  ids, answer, pictures, label, lengths, counts, skipped = [], [], [], [], [], [], 0
  for talk in tqdm(found.talks, desc="encoding text", delay=1, leave=False):
    line, said = text(talk)
    if len(line) > max_length:
      if too_long == "skip":
        skipped += 1
        continue
      seen = len(talk.images) * text.num_image_tokens
      raise ValueError(
        f"config.text.max_length={max_length}: {talk.where} has {len(line)} ids, {seen} of them for images; valid: at "
        "least that, or config.text.too_long='skip'"
      )
    if len(talk.images) > images:
      raise ValueError(f"config.text.images={images}: {talk.where} has {len(talk.images)} images; valid: at least that")
    if line.count(text.image_token) != len(talk.images) * text.num_image_tokens:
      raise ValueError(
        f"{talk.where}: {line.count(text.image_token)} placeholders (id {text.image_token}) for {len(talk.images)} "
        f"images of {text.num_image_tokens} tokens; valid: as many, and no text that the tokenizer takes for one"
      )
    ids += line
    answer += said
    pictures += talk.images
    label.append(talk.label)
    lengths.append(len(line))
    counts.append(len(talk.images))
  if not label:
    raise ValueError(f"config.text.max_length={max_length}: every conversation is longer; valid: more")
  if skipped:
    logging.warning("config.text.too_long='skip': %d of %d conversations skipped", skipped, len(found))
  ends = lambda sizes: np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
  array = lambda values, kind: np.array(values, kind)
  return Corpus(
    array(ids, np.int32), array(answer, bool), ends(lengths), array(pictures, np.int32), ends(counts),
    array(label, np.int32),
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TalkBatch:
  """Number of a batch -> this process's share of it; plain values only, since it travels to worker processes."""

  examples: batches.Lazy | batches.Memory  # the images
  layout: Layout
  changes: tuple[augment.Change, ...]
  mean_std: tuple[np.ndarray, np.ndarray]
  image_shape: tuple[int, int, int]
  batch_size: int
  seed: int
  process: tuple[int, int]
  train: bool

  def identity(self) -> dict[str, int]:
    """What must be equal for two numbers to mean the same batch."""
    text = zlib.crc32(self.layout.corpus.ids.tobytes())
    shape = zlib.crc32(repr((self.layout.length, self.layout.images, self.layout.pack, self.layout.share)).encode())
    return {
      "seed": self.seed,
      "num_examples": len(self.layout),
      "global_batch_size": self.batch_size * self.process[1],
      "text": text,
      "rows": shape,
    }

  def __call__(self, number: int) -> Batch:
    index, count = self.process
    places = ((number * count + index) * self.batch_size + np.arange(self.batch_size)).tolist()
    out = self.layout.empty(self.batch_size)
    wanted, where = [], []  # images, and the (row, image) of the batch where each stands
    for b, place in enumerate(places):
      row = self._row_at(place)
      if row >= 0:
        seen = self.layout.fill(out, b, row)
        wanted.append(seen)
        where += [(b, r) for r in range(len(seen))]
    out["image"] = np.zeros((self.batch_size, self.layout.images, *self.image_shape), np.float32)
    if where:
      pixels, _ = self.examples.gather(np.concatenate(wanted))
      if self.changes:
        pixels = self._change(pixels, [(places[b], r) for b, r in where])
      out["image"][tuple(np.array(where).T)] = batches.normalise(pixels, self.mean_std)
    return out

  def _row_at(self, place: int) -> int:
    """Number of the row at a place of the endless order, -1 behind the end of an evaluation."""
    if not self.train:
      return place if place < len(self.layout) else -1
    epoch, rank = divmod(place, len(self.layout))
    return int(batches._epoch_order(self.seed, epoch, len(self.layout))[rank])

  def _change(self, pixels: Sequence[np.ndarray], marks: list[tuple[int, int]]) -> list[np.ndarray]:
    out = []
    for image, mark in zip(pixels, marks, strict=True):
      rng = np.random.default_rng((batches._EXAMPLE, self.seed, *mark))
      for change in self.changes:
        image = change(image, rng)
      out.append(image)
    return out


def _check(config_data: ConfigDict, seed: int, prompt: str, too_long: str, images: int) -> None:
  if seed < 0:
    raise ValueError(f"config.seed={seed}; valid: 0 or more")
  if prompt.count("{question}") != 1:
    raise ValueError(f"config.text.prompt={prompt!r}; valid: a text that says {{question}} once")
  if too_long not in ("error", "skip"):
    raise ValueError(f"config.text.too_long={too_long!r}; valid: error, skip")
  if images < 1:
    raise ValueError(f"config.text.images={images}; valid: 1 or more")
  if config_data.bad_images != "error":  # a conversation cannot do without its image
    raise ValueError(f"config.data.bad_images={config_data.bad_images!r} of conversations; valid: error")
  for field in ("mixup", "cutmix"):
    if config_data[field]:
      raise ValueError(f"config.data.{field}={config_data[field]}: conversations cannot be mixed; valid: 0")
