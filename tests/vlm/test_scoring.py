"""Answers judged as text and by their likelihood: by hand, and with a tiny model against one question at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokred import budgets, vqa
from tokred.config import complete
from tokred.nn import placeholders, vlm

IMAGE, EOS = 3, 2
MODEL = dict(name="vlm", variant="mu/4", image_size=(8, 8), num_classes=0, depth=1)
LLM = dict(vocab=20, width=32, depth=2, num_heads=4, mlp_dim=48, image_token=IMAGE)
SITES = dict(out=dict(reducer="topk", score="key_norm", layers=(-1,), place="output", keep=0.5))
CHOICES = ([7, EOS], [8, 9, EOS], [10, EOS])


@functools.cache
def model():
  module = vlm.make(complete(dict(model=MODEL, llm=LLM)), SITES)
  init = jax.jit(functools.partial(module.init, mode="mask"))
  params = init(jax.random.key(0), **{name: value for name, value in inputs(batch()).items()})["params"]
  return module, jax.tree.map(lambda a: a * 3 if a.ndim > 1 else a, params)


def batch():
  """Two questions of different lengths, the first with a second turn, and a row that pads."""
  lines = [[1, *[IMAGE] * 4, 5, 6, 7, EOS, 11, 12, EOS], [1, 6, *[IMAGE] * 4, 5, 13, 10, EOS], []]
  answers = [[7, 8, 10, 11], [8, 9], []]
  ids, answer = np.zeros((3, 14), np.int32), np.zeros((3, 14), bool)
  for row, (line, said) in enumerate(zip(lines, answers, strict=True)):
    ids[row, : len(line)], answer[row, said] = line, True
  mask = np.arange(14) < np.array([len(line) for line in lines])[:, None]
  image = np.random.default_rng(0).normal(size=(3, 1, 8, 8, 3)).astype(np.float32)
  slot = placeholders.slots(np.where(mask, ids, 0), IMAGE, 1, 4)
  valid = np.array([True, True, False])
  return dict(
    ids=ids, answer=answer, mask=mask, image=image, slot=slot, valid=valid, label=np.array([0, 2, -1]),
    index=np.array([4, 5, -1]),
  )  # fmt: skip


def inputs(batch):
  return dict(ids=batch["ids"], images=batch["image"], slot=batch["slot"], mask=batch["mask"])


def test_normalise():
  assert vqa.normalise(" The  Red-ish, circle! ") == "red ish circle"
  assert vqa.normalise("Don't pay 1,000.50 (two) dollars.") == "dont pay 1,000.50 2 dollars"
  assert vqa.normalise("an apple_pie, one. ") == "apple pie 1"
  assert vqa.exact_match("The Cat.", ["dog", "cat"]) == 1 and vqa.exact_match("cats", ["cat"]) == 0


def test_vqa_accuracy():
  # Three of ten said so. Without one of these two are left, 2/3; without one of the other seven all three, 1.
  assert vqa.vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
  assert vqa.vqa_accuracy("red", ["red"] * 1 + ["blue"] * 9) == pytest.approx(9 / 10 / 3)
  assert vqa.vqa_accuracy("Red.", ["red"] * 4 + ["blue"] * 6) == 1
  assert vqa.vqa_accuracy("a red", ["red"]) == 1 and vqa.vqa_accuracy("green", ["red"] * 10) == 0


def test_log_likelihood():
  # Two words: behind id 0 their probabilities are 1/4 and 3/4, behind id 1 1/2 and 1/2.
  logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
  ids = jnp.array([[0, 1, 0, 0], [1, 1, 1, 1]])
  answer = jnp.array([[False, True, True, True], [False, False, False, True]])
  total, length = vqa.log_likelihood(logits[ids], ids, answer)
  np.testing.assert_allclose(total, np.log([0.75 * 0.5 * 0.25, 0.5]), rtol=1e-6)
  assert length.tolist() == [3, 1]


def test_answers_are_cut_and_put():
  whole = batch()
  asked = vqa.without_answer(whole)
  assert asked["ids"][0].tolist() == [1, *[IMAGE] * 4, 5, 6] + [0] * 7 and asked["mask"].sum(1).tolist() == [7, 8, 0]
  put = vqa.with_answer(whole, [8, 9, EOS])
  assert put["ids"][1].tolist() == [1, 6, *[IMAGE] * 4, 5, 13, 8, 9, EOS, 0, 0, 0]
  assert np.flatnonzero(put["answer"][1]).tolist() == [8, 9, 10] and put["mask"].sum(1)[:2].tolist() == [10, 11]
  with pytest.raises(ValueError, match=r"config.text.max_length=14: question and choice are 15 ids; valid: at least"):
    vqa.with_answer(whole, range(7))


def test_a_model_is_judged_row_by_row():
  module, params = model()
  found = vqa.multiple_choice(module, params, [batch()], CHOICES)
  per_token = vqa.multiple_choice(module, params, [batch()], CHOICES, per_token=True)
  loss = vqa.caption_loss(module, params, [batch()])
  written = list(vqa.written(module, params, [batch()], max_new_tokens=3, eos=EOS))

  @functools.partial(jax.jit, static_argnums=0)
  def whole(known, row):
    out = module.apply({"params": params}, **inputs(row), known=known)
    return jax.nn.log_softmax(vqa.tk.restore(out.logits, out.tokens.owner)[0])

  known = module.known(*(batch()[name][:2] for name in ("ids", "slot", "mask")))

  def log_p(line, row):  # alone, at the length of a batch
    one = {name: value[row : row + 1] for name, value in batch().items()}
    ids = np.zeros((1, 14), np.int32)
    ids[0, : len(line)] = line
    one |= dict(ids=ids, mask=np.arange(14)[None] < len(line))
    return np.asarray(whole(known, {k: one[k] for k in ("ids", "image", "slot", "mask")}))

  by_hand, prompts = np.zeros((2, 3)), [[1, *[IMAGE] * 4, 5, 6], [1, 6, *[IMAGE] * 4, 5, 13]]
  for row, prompt in enumerate(prompts):
    for column, choice in enumerate(CHOICES):
      line = prompt + choice
      p = log_p(line, row)
      by_hand[row, column] = sum(p[place - 1, line[place]] for place in range(len(prompt), len(line)))
  np.testing.assert_allclose(found["likelihood"], by_hand, atol=1e-4)
  np.testing.assert_allclose(per_token["likelihood"], by_hand / [2, 3, 2], atol=1e-4)
  assert found["chosen"].tolist() == by_hand.argmax(1).tolist() and found["examples"] == 2
  assert found["accuracy"] == np.mean(by_hand.argmax(1) == [0, 2])
  data, total = batch(), 0.0
  for row in range(2):
    line = data["ids"][row][data["mask"][row]].tolist()
    p = log_p(line, row)
    total -= sum(p[place - 1, line[place]] for place in np.flatnonzero(data["answer"][row]))
  assert loss == pytest.approx(total / 6, abs=1e-4)
  assert [(index, reply) for index, _, reply in written] == [(4, [7]), (5, [10])]
  for (_, said, _), (row, prompt) in zip(written, enumerate(prompts), strict=True):
    line = list(prompt)
    while len(line) < len(prompt) + 3:
      token = int(log_p(line, row)[len(line) - 1].argmax())
      if token == EOS:
        break
      line.append(token)
    assert said == line[len(prompt) :]


def test_bad_input():
  module, params = model()
  with pytest.raises(ValueError, match=r"choices of lengths \[1, 0\]; valid: one or more, of ids"):
    vqa.multiple_choice(module, params, [batch()], [[1], []])
  with pytest.raises(ValueError, match=r"a row's answer is not one of the choices \(label -1\)"):
    vqa.multiple_choice(module, params, [batch() | dict(label=np.full(3, -1))], CHOICES)
  for empty in (
    lambda: vqa.multiple_choice(module, params, [], CHOICES),
    lambda: vqa.caption_loss(module, params, []),
  ):
    with pytest.raises(ValueError, match=r"the split has no (examples|answers) to evaluate"):
      empty()
  with pytest.raises(ValueError, match="batch_size=0; valid: 1 or more"):
    budgets.judge({}, batch_size=0)
