"""Conversations in ids, and which of them share a row of a batch."""

import dataclasses
import itertools

import numpy as np

from tokred.data import packing
from tokred.data.batches import Batch

SHARED = -2  # the segment that all of a row see; as tokred.nn.attention has it


def check_rows(pack: bool, share: bool) -> None:
  """Raises ValueError where conversations shall share rows in two ways at once."""
  if pack and share:
    raise ValueError("config.text.share=True and config.text.pack=True; valid: one of them")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Conversations in ids, one behind the other."""

  ids: np.ndarray  # (all ids,) int32
  answer: np.ndarray  # (all ids,) bool
  starts: np.ndarray  # (conversations + 1,)
  pictures: np.ndarray  # (all mentions of images,) int32
  picture_starts: np.ndarray  # (conversations + 1,)
  label: np.ndarray  # (conversations,) int32

  def __len__(self) -> int:
    return len(self.label)

  @property
  def counts(self) -> np.ndarray:
    """Images of each conversation."""
    return np.diff(self.picture_starts)

  def longest_question(self) -> int:
    """Ids of a conversation up to its first answer, at most."""
    parts = (self.answer[start:end] for start, end in itertools.pairwise(self.starts))
    return max(int(np.append(part, True).argmax()) for part in parts)

  def shared(self, talk: int, image_token: int) -> int:
    """Ids of a conversation up to the end of its image."""
    line = self.ids[self.starts[talk] : self.starts[talk + 1]]
    return int(np.flatnonzero(line == image_token)[-1]) + 1


def about_one_image(corpus: Corpus, image_token: int, max_length: int, seed: int) -> list[list[int]]:
  """Rows of conversations that begin alike, up to the end of their one image.

  Whose answer comes right behind the image has a row alone: the image's last patch can tell one answer only.
  """
  groups: dict[tuple[int, bytes, int], list[int]] = {}
  for talk in np.random.default_rng((seed, 1)).permutation(len(corpus)).tolist():
    if corpus.counts[talk] == 1:
      common, start = corpus.shared(talk, image_token), corpus.starts[talk]
      alone = talk if corpus.answer[start + common :][:1].any() else -1
      key = (int(corpus.pictures[corpus.picture_starts[talk]]), corpus.ids[start : start + common].tobytes(), alone)
    else:
      raise ValueError(f"config.text.share=True: conversation {talk} has {corpus.counts[talk]} images; valid: one")
    groups.setdefault(key, []).append(talk)
  rows = []
  for talks in groups.values():
    common = corpus.shared(talks[0], image_token)
    lengths = [int(corpus.starts[talk + 1] - corpus.starts[talk]) - common for talk in talks]
    chosen = packing.first_fit(lengths, [0] * len(talks), max_length - common, 1)
    rows += [[talks[index] for index in row] for row in chosen]
  return rows


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which conversations make which row."""

  corpus: Corpus
  rows: list[list[int]]
  length: int
  images: int
  patches: int
  image_token: int
  pad: int
  pack: bool
  share: bool = False

  def __len__(self) -> int:
    return len(self.rows)

  def sizes(self) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens of text and images of each row, (rows,) int both, and the patches of an image."""
    c, of_row = self.corpus, lambda values: np.array([values[row].sum() for row in self.rows])
    length, images = of_row(np.diff(c.starts)), of_row(c.counts)
    if self.share:  # what they begin with stands there once
      again = images - 1
      length, images = length - again * [c.shared(row[0], self.image_token) for row in self.rows], images - again
    return length - images * self.patches, images, self.patches

  def empty(self, batch: int) -> Batch:
    out = {
      "ids": np.full((batch, self.length), self.pad, np.int32),
      "mask": np.zeros((batch, self.length), bool),
      "answer": np.zeros((batch, self.length), bool),
      "slot": np.full((batch, self.images, self.patches), -1, np.int32),
      "label": np.full(batch, -1, np.int32),
      "index": np.full(batch, -1, np.int32),
      "valid": np.zeros(batch, bool),
    }
    if self.pack or self.share:
      out["segment"] = np.full((batch, self.length), -1, np.int32)
      out["position"] = np.zeros((batch, self.length), np.int32)
    return out

  def fill(self, out: Batch, b: int, row: int) -> np.ndarray:
    """Writes row number `row` of the data into row `b` of a batch; returns its images."""
    c, start, seen, common = self.corpus, 0, [], 0
    if self.share:
      talk = self.rows[row][0]
      start = common = c.shared(talk, self.image_token)
      place, part = slice(0, common), slice(c.starts[talk], c.starts[talk] + common)
      out["ids"][b, place], out["segment"][b, place], out["position"][b, place] = c.ids[part], SHARED, np.arange(common)
      out["answer"][b, place] = c.answer[part]  # of turns before the image
    for segment, talk in enumerate(self.rows[row]):
      part = slice(c.starts[talk] + common, c.starts[talk + 1])
      place = slice(start, start + part.stop - part.start)
      out["ids"][b, place], out["answer"][b, place] = c.ids[part], c.answer[part]
      if self.pack or self.share:
        count = np.arange(common, common + place.stop - start)
        out["segment"][b, place], out["position"][b, place] = segment, count
      if not (seen and self.share):
        seen.append(c.pictures[c.picture_starts[talk] : c.picture_starts[talk + 1]])
      start = place.stop
    out["mask"][b, :start] = True
    stands = np.flatnonzero(out["ids"][b, :start] == self.image_token).reshape(-1, self.patches)
    out["slot"][b, : len(stands)] = stands
    if len(self.rows[row]) == 1:
      out["label"][b] = c.label[self.rows[row][0]]
    out["index"][b], out["valid"][b] = row, True
    return np.concatenate(seen)
