"""How answers about images are judged: as text, and by their likelihood.

The scores of text and of logits are pure functions; `written`, `multiple_choice` and `caption_loss` run a model over
batches of `tokred.data.conversation_batches` that are not packed.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokred import tokens as tk
from tokred.nn import generate
from tokred.nn.vlm import VLM, Known
from tokred.tokens import Array

_NUMBERS = {
  word: str(number)
  for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
_ARTICLES = {"a", "an", "the"}


def normalise(text: str) -> str:
  """Text as answers are compared: in lower case, without punctuation and articles, small numbers as digits.

  A point or comma between digits stays, an apostrophe goes without a space ("don't" is "dont").
  """
  text = re.sub(r"['’`]", "", text.lower())
  text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[^\w\s.,]|_", " ", text)
  return " ".join(_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)


def exact_match(said: str, answers: Sequence[str]) -> float:
  """1 if it is one of the answers after `normalise`, else 0."""
  return float(normalise(said) in {normalise(answer) for answer in answers})


def vqa_accuracy(said: str, answers: Sequence[str]) -> float:
  """The share of people who would agree, three of them being enough.  (Antol et al., 2015, arXiv:1505.00468)

  Mean over i of min(1, number of the other answers j != i that equal it / 3), where there are four answers or more;
  with fewer an answer that one person gave is right.
  """
  said, answers = normalise(said), [normalise(answer) for answer in answers]
  same = [answer == said for answer in answers]
  if len(same) < 4:
    return float(any(same))
  return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def log_likelihood(logits: Array, ids: Array, answer: Array) -> tuple[Array, Array]:
  """What a model thinks of answers.

  Args:
    logits: (B, S, vocab), of what follows each token.
    ids: (B, S) int32.
    answer: (B, S) bool, tokens that belong to answers.

  Returns:
    (B,) float32 sum of the log-probabilities of the answer's tokens, and (B,) int32 their number.
  """
  log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
  each = jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]
  counted = answer[:, 1:]
  return jnp.where(counted, each, 0.0).sum(1), counted.sum(1, dtype=jnp.int32)


def inputs(batch: Mapping[str, Array]) -> dict[str, Array]:
  """Arguments of a VLM for a batch of conversations; a prompt ends before its first answer, which is not asked."""
  last = jnp.maximum(jnp.argmax(batch["answer"], axis=1).astype(jnp.int32) - 1, 0)
  there = {name: batch[name] for name in ("ids", "slot", "mask", "segment", "position") if name in batch}
  return there | dict(images=batch["image"], last=last)


@functools.lru_cache(maxsize=8)
def likelihood_step(module: VLM, mode: str) -> Any:
  """Jitted (params, batch, known) -> `log_likelihood` of a batch's answers; `known` is static."""

  def step(params: Any, batch: Mapping[str, Array], known: Known | None) -> tuple[Array, Array]:
    output = module.apply({"params": params}, **inputs(batch), known=known, mode=mode)
    return log_likelihood(tk.restore(output.logits, output.tokens.owner), batch["ids"], batch["answer"])

  return jax.jit(step, static_argnums=2)


def caption_loss(module: VLM, params: Any, batches: Iterable[Mapping[str, np.ndarray]], mode: str = "gather") -> float:
  """Mean negative log-likelihood of the answers' tokens, in nats.

  Raises:
    ValueError: there are no answers.
  """
  total, count = 0.0, 0
  for batch in batches:
    likelihood, length = _likelihood(module, params, batch, mode, _known(module, batch, mode))
    total, count = total - float(likelihood.sum()), count + int(length.sum())
  if not count:
    raise ValueError("the split has no answers to evaluate")
  return total / count


def multiple_choice(
  module: VLM,
  params: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  choices: Sequence[Sequence[int]],
  *,
  per_token: bool = False,
  mode: str = "gather",
) -> dict[str, Any]:
  """Which of the same choices is the likeliest answer to each question, by the sum of its log-probabilities.

  Args:
    module: what to run.
    params: its parameters.
    batches: with one turn a row and the index of the right choice as label.
    choices: ids of each, eos among them where a model writes one.
    per_token: whether the sum is divided by the number of ids, so that long choices are not punished.
    mode: "gather" or "mask".

  Returns:
    accuracy (0 to 1), examples, chosen (examples,) int32 and likelihood (examples, choices) float32.

  Raises:
    ValueError: no choices, a batch without labels, or choices that do not fit behind a question.
  """
  if not choices or not all(len(choice) for choice in choices):
    raise ValueError(f"choices of lengths {[len(choice) for choice in choices]}; valid: one or more, of ids")
  likelihoods, labels = [], []
  for batch in batches:
    valid = batch["valid"]
    if (batch["label"][valid] < 0).any():
      raise ValueError("multiple choice: a row's answer is not one of the choices (label -1); valid: an index")
    known = _known(module, with_answer(batch, max(choices, key=len)), mode)  # one compilation for all choices
    rows = [_likelihood(module, params, with_answer(batch, choice), mode, known) for choice in choices]
    each = np.stack([total / np.maximum(length, 1) if per_token else total for total, length in rows], axis=1)
    likelihoods.append(each[valid])
    labels.append(batch["label"][valid])
  if not labels or not sum(map(len, labels)):
    raise ValueError("the split has no examples to evaluate")
  likelihood, label = np.concatenate(likelihoods), np.concatenate(labels)
  chosen = likelihood.argmax(1).astype(np.int32)
  return dict(accuracy=float((chosen == label).mean()), examples=len(label), chosen=chosen, likelihood=likelihood)


def written(
  module: VLM,
  params: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  max_new_tokens: int,
  eos: int,
) -> Iterator[tuple[int, list[int], list[int]]]:
  """Greedy answers to the first question of each row.

  Args:
    module: what to run.
    params: its parameters.
    batches: see above.
    max_new_tokens: of an answer, at most.
    eos: the id that ends one.

  Yields:
    (index, ids that were written, ids of the answer in the data), both without eos.
  """
  for batch in batches:
    valid = np.flatnonzero(batch["valid"])
    asked = without_answer(batch)
    ids, mask = asked["ids"].copy(), asked["mask"].copy()
    if not len(valid):
      continue
    rest = np.setdiff1d(np.arange(len(ids)), valid)  # rows that pad the batch ask what its first row asks
    image, slot = batch["image"].copy(), asked["slot"].copy()
    for array in (ids, mask, image, slot):
      array[rest] = array[valid[0]]
    out = generate.write(module, params, ids, image, slot, mask, max_new_tokens, stop_tokens=(eos,))
    said, length = np.asarray(out.tokens), np.asarray(out.length)
    for row in valid:
      start = int(batch["answer"][row].argmax())
      reply = batch["ids"][row][_turn(batch["answer"][row], start)]
      yield int(batch["index"][row]), _until(said[row, : length[row]], eos), _until(reply, eos)


def without_answer(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A batch cut before the first answer of each row: what a model is asked."""
  place = np.arange(batch["ids"].shape[1])
  start = np.where(batch["answer"].any(1), batch["answer"].argmax(1), place.size)
  asked = batch["mask"] & (place < start[:, None])
  slot = np.where(batch["slot"] < start[:, None, None], batch["slot"], -1)  # later turns may show other images
  return dict(batch) | dict(ids=np.where(asked, batch["ids"], 0), mask=asked, answer=np.zeros_like(asked), slot=slot)


def with_answer(batch: Mapping[str, np.ndarray], choice: Sequence[int]) -> dict[str, np.ndarray]:
  """A batch in which every row's first question is answered by `choice`, and nothing follows.

  Raises:
    ValueError: a row has no room for it.
  """
  asked = without_answer(batch)
  start, length = asked["mask"].sum(1), asked["ids"].shape[1]
  if start.max() + len(choice) > length:
    needed = start.max() + len(choice)
    raise ValueError(f"config.text.max_length={length}: question and choice are {needed} ids; valid: at least that")
  place = np.arange(length) - start[:, None]
  here = (place >= 0) & (place < len(choice))
  ids = np.where(here, np.asarray(choice, np.int32)[np.clip(place, 0, len(choice) - 1)], asked["ids"])
  return asked | dict(ids=ids.astype(np.int32), mask=asked["mask"] | here, answer=here)


def _known(module: VLM, batch: Mapping[str, np.ndarray], mode: str) -> Known | None:
  rows = (batch[name][batch["valid"]] for name in ("ids", "slot", "mask"))
  return module.known(*rows) if mode == "gather" else None


def _likelihood(
  module: VLM, params: Any, batch: Mapping[str, np.ndarray], mode: str, known: Known | None
) -> tuple[np.ndarray, np.ndarray]:
  """(B,) likelihood and length, 0 in rows that pad the batch."""
  there = {name: batch[name] for name in ("ids", "image", "slot", "mask", "answer")}
  total, length = jax.device_get(likelihood_step(module, mode)(params, there, known))
  return np.where(batch["valid"], total, 0.0), np.where(batch["valid"], length, 0)


def _turn(answer: np.ndarray, start: int) -> slice:
  """The answer that begins at `start`."""
  behind = np.flatnonzero(~answer[start:])
  return slice(start, start + int(behind[0]) if len(behind) else len(answer))


def _until(ids: np.ndarray, eos: int) -> list[int]:
  ids = [int(i) for i in ids]
  return ids[: ids.index(eos)] if eos in ids else ids
