"""Text to ids and back: words of a data set, or a tokenizer's files as a checkpoint brings them.

The library itself speaks in ids; whatever has the members of `Tokenizer` will do.
"""

import collections
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tokred import files

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>")  # ids 0 to 4
_WORD = re.compile(r"\w+|[^\w\s]")


class Tokenizer(Protocol):
  """What a pipeline asks of a tokenizer; an id of -1: there is none."""

  size: int  # ids are below it
  pad: int
  bos: int
  eos: int
  image_token: int

  def encode(self, text: str) -> list[int]: ...  # without bos and eos
  def decode(self, ids: Sequence[int]) -> str: ...  # without bos, eos, padding and images


class WordTokenizer:
  """Words in lower case, and punctuation marks, each with an id; spaces are forgotten."""

  pad, bos, eos, image_token, unknown = range(5)

  def __init__(self, words: Sequence[str]):
    self.words = (*_SPECIAL, *words)
    self._ids = {word: index for index, word in enumerate(self.words)}
    if len(self._ids) != len(self.words):
      raise ValueError("words of a tokenizer: one comes twice; valid: each once")

  @property
  def size(self) -> int:
    return len(self.words)

  @classmethod
  def learn(cls, texts: Iterable[str]) -> "WordTokenizer":
    """The words of `texts`, the most frequent first, equally frequent ones by the alphabet."""
    counts = collections.Counter()
    for text, times in collections.Counter(texts).items():  # questions come again and again
      for word in _WORD.findall(text.lower()):
        counts[word] += times
    return cls(sorted(counts, key=lambda word: (-counts[word], word)))

  @classmethod
  def read(cls, path: str | os.PathLike) -> "WordTokenizer":
    """What `write` wrote.

    Raises:
      ValueError: the file is not there, or holds something else.
    """
    try:
      words = json.loads(Path(path).read_text())["words"]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ValueError(f"tokenizer {str(path)!r}: {error}; valid: a file that WordTokenizer.write wrote") from None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
      raise ValueError(f"tokenizer {str(path)!r}: its words are no list of strings")
    return cls(words)

  def write(self, path: str | os.PathLike) -> None:
    """Writes the words as JSON, whole or not at all."""
    files.write_json(Path(path), {"words": list(self.words[len(_SPECIAL) :])})

  def encode(self, text: str) -> list[int]:
    return [self._ids.get(word, self.unknown) for word in _WORD.findall(text.lower())]

  def decode(self, ids: Sequence[int]) -> str:
    return " ".join(self.words[i] if i < self.size else "<unk>" for i in ids if i >= self.unknown)


class FileTokenizer:
  """A checkpoint's own tokenizer, through transformers (an optional package)."""

  def __init__(self, folder: str | os.PathLike, image_token: int | None = None):
    """
    Args:
      folder: directory with tokenizer.json or the like.
      image_token: id of placeholders; None: that of "<image>", or -1 where it has none.

    Raises:
      ValueError: transformers is not installed, or cannot read the folder.
    """
    try:
      from transformers import AutoTokenizer
    except ImportError:
      raise ValueError(
        f"config.text.tokenizer={str(folder)!r} needs the package transformers, which is not installed; valid: install "
        "it, or '' for the words of the training split"
      ) from None
    try:
      self._own = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
      line = (str(error).strip().splitlines() or [type(error).__name__])[0]
      raise ValueError(f"config.text.tokenizer={str(folder)!r} cannot be read: {line}") from error
    own = self._own
    self.size = len(own)
    self.bos, self.eos = (-1 if i is None else i for i in (own.bos_token_id, own.eos_token_id))
    self.pad = own.pad_token_id if own.pad_token_id is not None else max(self.eos, 0)
    if image_token is None:
      image_token = own.get_vocab().get("<image>", -1)
    self.image_token = image_token

  def encode(self, text: str) -> list[int]:
    return self._own.encode(text, add_special_tokens=False)

  def decode(self, ids: Sequence[int]) -> str:
    special = {self.pad, self.bos, self.eos, self.image_token}
    return self._own.decode([int(i) for i in ids if int(i) not in special], skip_special_tokens=True)


def read_tokenizer(path: str | os.PathLike, image_token: int | None = None) -> Tokenizer:
  """A word tokenizer's JSON file, or a directory of a checkpoint.

  Args:
    path: of the file or directory.
    image_token: id of placeholders where a directory's tokenizer does not say; None: "<image>".

  Raises:
    ValueError: nothing there, or it cannot be read.
  """
  if not Path(path).exists():
    raise ValueError(f"config.text.tokenizer={str(path)!r} is not there; valid: a JSON file of words, or a directory")
  return FileTokenizer(path, image_token) if Path(path).is_dir() else WordTokenizer.read(path)
