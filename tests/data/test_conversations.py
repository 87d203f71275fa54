"""Conversations: ids by hand, packing, resuming, sharing, TFDS, tokenizers, and every error message."""

import contextlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokred import config, data
from tokred.data import packing, tokenizers
from tokred.data.conversations import Writer
from tokred.data.rows import SHARED
from tokred.data.talks import Talk

TFDS_DIR = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tfds"
needs_tfds = pytest.mark.skipif(not TFDS_DIR.is_dir(), reason=f"no prepared TFDS data sets in {TFDS_DIR}")
WORDS = tokenizers.WordTokenizer(["what", "colour", "is", "red", "blue", "and", "first", "?", "."])
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
WHAT, COLOUR, IS, RED, BLUE, AND, FIRST, ASK, STOP = range(5, 14)


def turn(question, answer):
  return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def talk(*turns, image=None):
  return {"image": image, "conversations": [said for pair in turns for said in turn(*pair)]}


TALKS = [
  talk(("<image>\nWhat colour?", "Red."), image="red.png"),
  talk(("What is red?", "Red."), ("And blue?", "Blue.")),
  talk(("First <image> and <image>: what colour is first?", "Red"), image=["red.png", "blue.png"]),
  talk(("<image>\nIs blue?", "Blue"), image="blue.png"),
  talk(("Red?", "Red")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("talks")
  Image.new("RGB", (6, 4), (255, 0, 0)).save(path / "red.png")
  Image.new("RGB", (4, 4), (0, 0, 255)).save(path / "blue.png")
  for name, talks in (("train", TALKS), ("test", TALKS[:3])):
    (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, talks)) + "\n\n")
  return path


def settings(folder, **fields):
  chosen = config.default().data
  chosen.update(dict(name="conversations", data_dir=str(folder)) | fields)
  return chosen


def batches(folder, split="train", fields=(), **changed):
  arguments = dict(
    tokenizer=WORDS, image_size=(4, 4), channels=3, num_image_tokens=2, image_token=IMAGE, max_length=16, batch_size=2,
    seed=0, train=False, images=2,
  )  # fmt: skip
  return data.conversation_batches(settings(folder, **dict(fields)), split, **(arguments | changed))


def all_rows(iterable):
  found = list(iterable)
  return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_batch_by_hand(folder):
  loader = batches(folder)
  assert len(loader) == 3  # five in twos
  rows = all_rows(loader)
  dtypes = {name: rows[name].dtype for name in ("image", "ids", "mask", "answer", "slot", "label", "valid")}
  assert dtypes == dict(
    image=np.float32, ids=np.int32, mask=bool, answer=bool, slot=np.int32, label=np.int32, valid=bool
  )
  ids = [
    [BOS, IMAGE, IMAGE, WHAT, COLOUR, ASK, RED, STOP, EOS],
    [BOS, WHAT, IS, RED, ASK, RED, STOP, EOS, AND, BLUE, ASK, BLUE, STOP, EOS],
    # The colon is unknown, 4.
    [BOS, FIRST, IMAGE, IMAGE, AND, IMAGE, IMAGE, 4, WHAT, COLOUR, IS, FIRST, ASK, RED, EOS],
    [BOS, IMAGE, IMAGE, IS, BLUE, ASK, BLUE, EOS],
    [BOS, RED, ASK, RED, EOS],
    [],
  ]
  answers = [[6, 7, 8], [5, 6, 7, 11, 12, 13], [13, 14], [6, 7], [3, 4], []]
  places = [[[1, 2], [-1, -1]], [[-1, -1]] * 2, [[2, 3], [5, 6]], [[1, 2], [-1, -1]], [[-1, -1]] * 2, [[-1, -1]] * 2]
  for row in range(6):
    assert rows["ids"][row].tolist() == ids[row] + [PAD] * (16 - len(ids[row]))
    assert rows["mask"][row].sum() == len(ids[row]) and rows["mask"][row, : len(ids[row])].all()
    assert np.flatnonzero(rows["answer"][row]).tolist() == answers[row]
    assert rows["slot"][row].tolist() == places[row]
  assert rows["valid"].tolist() == [True] * 5 + [False] and rows["index"].tolist() == [0, 1, 2, 3, 4, -1]
  red, blue = np.array([1, -1, -1]), np.array([-1, -1, 1])  # mean and deviation are 0.5
  assert rows["image"].shape == (6, 2, 4, 4, 3)
  for row, image, colour in ((0, 0, red), (2, 0, red), (2, 1, blue), (3, 0, blue), (0, 1, 0 * red), (1, 0, 0 * red)):
    np.testing.assert_allclose(rows["image"][row, image], np.broadcast_to(colour, (4, 4, 3)), atol=1e-6)


def test_prompt_and_system_stand_around_the_question():
  words = tokenizers.WordTokenizer.learn(["user assistant hello : what red"])
  write = Writer(words, IMAGE, 1, prompt="USER: {question} ASSISTANT:", system="hello")
  ids, answer = write(Talk((("<image>\nwhat", "red"),), (0,)))
  assert words.decode(ids) == "hello user : what assistant : red"
  assert ids[:5] == [BOS, *words.encode("hello user :"), IMAGE] and ids[-1] == EOS
  assert answer == [False] * (len(ids) - 2) + [True] * 2
  assert write(Talk((("what", "red"),), (), system="red"))[0][:2] == [BOS, *words.encode("red")]


def test_lazy_images_are_those_in_memory(folder):
  assert_same(all_rows(batches(folder)), all_rows(batches(folder, fields=dict(in_memory=False))))


def test_random_crops_are_of_the_whole_image(tmp_path):
  """The left quarter of a broad image is white, and the central crop of evaluation does not show it."""
  Image.fromarray(np.repeat(np.uint8([[255, 0, 0, 0]]), 8, axis=1).repeat(8, axis=0)).save(tmp_path / "broad.png")
  for split in ("train", "test"):
    (tmp_path / f"{split}.jsonl").write_text(json.dumps(talk(("<image>\nWhat?", "Red."), image="broad.png")))
  make = lambda split, **k: batches(tmp_path, split, dict(random_resized_crop=0.2), batch_size=16, images=1, **k)
  assert next(iter(make("test")))["image"][0].max() == -1
  with contextlib.closing(make("train", train=True)) as loader:
    assert next(loader)["image"].max() == 1


def test_first_fit():
  # Room 10, one image: 6 | 6 4 (no: images) ...
  assert packing.first_fit([6, 6, 4, 4, 1], [0] * 5, 10, 1) == [[0, 2], [1, 3], [4]]
  assert packing.first_fit([6, 6, 4, 4], [1, 1, 1, 0], 10, 1) == [[0, 3], [1], [2]]
  rng = np.random.default_rng(0)
  lengths, images = rng.integers(1, 60, 5000), rng.integers(0, 3, 5000)
  rows = packing.first_fit(lengths, images, 64, 4)
  assert sorted(itertools.chain(*rows)) == list(range(5000))
  assert max(lengths[row].sum() for row in rows) <= 64 and max(images[row].sum() for row in rows) <= 4
  assert lengths.sum() / 64 / len(rows) > 0.9


def test_packing(folder):
  plain, packed = all_rows(batches(folder)), all_rows(batches(folder, pack=True, max_length=20, batch_size=3))
  assert packed["valid"].sum() == 3  # 9 + 8, 14 + 5, 15 of 20
  seen = {}
  for row, segment in itertools.product(range(3), range(2)):
    part = packed["segment"][row] == segment
    if part.any():
      line = packed["ids"][row][part].tolist()
      seen[tuple(line)] = np.flatnonzero(packed["answer"][row][part]).tolist()
      assert packed["position"][row][part].tolist() == list(range(len(line)))
  wanted = {
    tuple(ids[mask].tolist()): np.flatnonzero(answer).tolist()
    for ids, mask, answer in zip(plain["ids"], plain["mask"], plain["answer"], strict=True)
    if mask.any()
  }
  assert seen == wanted
  assert ((packed["segment"] >= 0) == packed["mask"]).all()
  first = np.flatnonzero(packed["position"][0] == 0)[:2]  # no answer is predicted from another segment
  assert not packed["answer"][0][first].any()
  assert packed["slot"][0].tolist() == [[1, 2], [10, 11]]  # the second conversation begins at 9
  np.testing.assert_allclose(packed["image"][0, 0, 0, 0], [1, -1, -1], atol=1e-6)
  np.testing.assert_allclose(packed["image"][0, 1, 0, 0], [-1, -1, 1], atol=1e-6)


def test_sharing_an_image(folder, tmp_path):
  """Questions about one image stand behind it, each as if alone."""
  for name in ("red.png", "blue.png"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  asked = [TALKS[0], TALKS[3], talk(("<image>\nIs red?", "Red"), image="red.png")]
  (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, asked)))
  loader = batches(tmp_path, train=True, share=True, batch_size=2, images=1)
  batch = next(loader)
  loader.close()
  row = int(batch["segment"].max(1).argmax())  # the red one
  ids, segment = batch["ids"][row], batch["segment"][row]
  assert ids[:3].tolist() == [BOS, IMAGE, IMAGE] and segment[:3].tolist() == [SHARED] * 3
  seen = {tuple(ids[segment == index].tolist()) for index in range(2)}
  assert seen == {(WHAT, COLOUR, ASK, RED, STOP, EOS), (IS, RED, ASK, RED, EOS)}
  for index in range(2):
    part = segment == index
    assert batch["position"][row][part].tolist() == list(range(3, 3 + part.sum()))
    assert not batch["answer"][row][np.flatnonzero(part)[0]]
  assert batch["slot"][row].tolist() == [[1, 2]] and batch["mask"][row].sum() == 3 + 6 + 5
  text, images, patches = loader.rows
  assert text.max() == 1 + 6 + 5 and images.tolist() == [1, 1] and patches == 2
  with pytest.raises(ValueError, match=r"config.text.share=True: conversation 1 has 0 images; valid: one"):
    batches(folder, train=True, share=True)


def test_sharing_an_image_that_stands_late(folder, tmp_path):
  """Answers before the image count, and none is told from the end of another conversation."""
  (tmp_path / "red.png").write_bytes((folder / "red.png").read_bytes())
  late = [talk(("What is red?", "Red."), ("<image> and blue?", answer), image="red.png") for answer in ("Blue", "Red")]
  last = [talk(("What colour is <image>", answer), image="red.png") for answer in ("Blue", "Red")]
  for asked, rows, answers in ((late, 1, 3 + 2 + 2), (last, 2, 2 + 2)):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, asked)))
    loader = batches(tmp_path, train=True, share=True, batch_size=rows, images=1, max_length=20)
    batch = next(loader)
    loader.close()
    assert loader.num_examples == rows and batch["answer"].sum() == answers
    row, place = np.nonzero(batch["answer"])
    told = batch["segment"][row, place - 1]
    assert ((told == batch["segment"][row, place]) | (told == SHARED)).all()


def test_training_is_a_function_of_the_number(folder):
  fields = dict(pad_crop=2)
  make = lambda **k: batches(folder, train=True, fields=fields, **k)
  one, other = make(), make()
  first = [next(one) for _ in range(5)]
  for batch in first:
    assert_same(batch, next(other))
  epoch = np.concatenate([batch["index"] for batch in first])
  assert sorted(epoch[:5]) == sorted(epoch[5:]) == [0, 1, 2, 3, 4]  # ten rows are two epochs
  again = make()
  again.set_state(json.loads(json.dumps({**one.get_state(), "batches": 3})))
  assert_same(next(again), first[3])
  assert any(not np.array_equal(a["ids"], b["ids"]) for a, b in zip(first, [next(make(seed=1))] * 5, strict=True))
  shares = [make(batch_size=1, process_index=i, process_count=2) for i in range(2)]
  assert_same(all_rows(next(share) for share in shares), first[0])
  for loader in (one, other, again, *shares):
    loader.close()
  with pytest.raises(ValueError, match=r"state of the data does not fit this run: .*rows="):
    make(max_length=17).set_state(one.get_state())
  with pytest.raises(ValueError, match="text="):
    make(prompt="what {question}").set_state(one.get_state())


def test_evaluation_is_shared(folder):
  shares = [batches(folder, batch_size=1, process_index=i, process_count=2) for i in range(2)]
  assert [len(share) for share in shares] == [3, 3]
  whole = all_rows(batches(folder))
  both = [all_rows(share) for share in shares]
  for name, values in whole.items():
    np.testing.assert_array_equal(np.stack([part[name] for part in both], 1).reshape(values.shape), values)


def test_word_tokenizer(tmp_path):
  words = tokenizers.WordTokenizer.learn(["Red is red.", "blue is blue?", "Red is red."])
  assert words.words[5:] == ("red", "is", ".", "blue", "?")  # 4, 3, 2, 2, 1 times, and a tie by the alphabet
  assert words.encode("RED, blue?") == [5, 4, 8, 9]
  assert words.decode([1, 5, 6, 3, 8, 2, 0]) == "red is blue" and words.decode([4, 99]) == "<unk> <unk>"
  words.write(tmp_path / "words.json")
  assert tokenizers.read_tokenizer(tmp_path / "words.json").words == words.words


def test_checkpoint_tokenizer(tmp_path, folder):
  transformers = pytest.importorskip("transformers")
  library = pytest.importorskip("tokenizers")
  own = library.Tokenizer(library.models.WordLevel({"<s>": 0, "</s>": 1, "<u>": 2, "red": 3, "<image>": 4}, "<u>"))
  own.pre_tokenizer = library.pre_tokenizers.Whitespace()
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")
  fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
  fast.save_pretrained(tmp_path)
  read = tokenizers.read_tokenizer(tmp_path)
  assert (read.size, read.pad, read.bos, read.eos, read.image_token) == (5, 1, 0, 1, 4)
  assert read.encode("red red") == [3, 3] and read.decode(np.array([0, 4, 3, 1])) == "red"


def test_open_tokenizer_knows_the_training_split(folder):
  words = data.open_tokenizer(settings(folder), "", prompt="Question: {question}")
  assert "<unk>" not in words.decode(words.encode("question: what colour is first? red.")) and words.size == 5 + 11
  assert words.words == data.open_tokenizer(settings(folder), "", prompt="Question: {question}").words


@needs_tfds
def test_tfds():
  chosen = config.default().data
  chosen.update(dict(name="easy_vqa", data_dir=str(TFDS_DIR)))
  chosen.train_split = "train[:100]"
  words = data.open_tokenizer(chosen, "")
  loader = data.conversation_batches(
    chosen, "train[:20]", tokenizer=words, image_size=(16, 16), channels=3, num_image_tokens=4, image_token=IMAGE,
    max_length=24, batch_size=20, seed=0, train=False,
  )  # fmt: skip
  (batch,) = list(loader)
  assert len(loader.batch_at.examples) == 3  # images of twenty questions
  assert words.decode(batch["ids"][0][batch["mask"][0]]) == "what is the blue shape ? rectangle"
  for row in range(20):
    said = words.decode(batch["ids"][row][batch["answer"][row]])
    assert said == loader.label_names[batch["label"][row]]
  assert np.array_equal(batch["image"][0], batch["image"][11]) and not np.array_equal(
    batch["image"][0], batch["image"][12]
  )


BAD_LINES = {
  "{'a': 1}": "train.jsonl:2: not JSON",
  "[1]": "train.jsonl:2: not a conversation",
  '{"image": "red.png"}': r"train.jsonl:2: not a conversation \(KeyError: 'conversations'\)",
  json.dumps(dict(conversations=turn("a", "b")[::-1])): r"train.jsonl:2: speakers \['gpt', 'human'\]; valid: human",
  json.dumps(dict(conversations=[])): r"train.jsonl:2: speakers \[\]",
  json.dumps(talk(("<image> what", "red"))): "train.jsonl:2: 1 times <image> in the text, but 0 images; valid: as many",
  json.dumps(talk(("what", "red"), image="red.png")): "0 times <image> in the text, but 1 images",
  json.dumps(talk(("<image>", "red"), image="none.png")): "train.jsonl:2: image 'none.png' is not there; valid: a path",
  json.dumps(talk(("<image>", "red"), image=3)): "train.jsonl:2: image=3; valid: a path or a list of paths",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines(folder, tmp_path, line):
  (tmp_path / "train.jsonl").write_text(json.dumps(TALKS[4]) + "\n" + line)
  with pytest.raises(ValueError, match=BAD_LINES[line]):
    batches(tmp_path)


def test_bad_images(tmp_path):
  (tmp_path / "red.png").write_bytes(b"no image")
  (tmp_path / "train.jsonl").write_text(json.dumps(TALKS[0]))
  with pytest.raises(ValueError, match=r"red.png cannot be read as an image"):
    batches(tmp_path)


BAD_FIELDS = {
  r"config.text.max_length=9: .*train.jsonl:2 has 14 ids, 0 of them for images; valid: at least": dict(max_length=9),
  r"config.text.images=1: .*train.jsonl:3 has 2 images": dict(images=1),
  r"config.text.images=0; valid: 1 or more": dict(images=0),
  r"config.text.prompt='what'; valid: a text that says \{question\} once": dict(prompt="what"),
  r"config.text.too_long='cut'; valid: error, skip": dict(too_long="cut"),
  r"config.text.max_length=3: every conversation is longer": dict(max_length=3, too_long="skip"),
  r"config.seed=-1; valid: 0 or more": dict(seed=-1),
  r"config.data.bad_images='skip' of conversations; valid: error": dict(fields=dict(bad_images="skip")),
  r"config.data.mixup=0.2: conversations cannot be mixed; valid: 0": dict(fields=dict(mixup=0.2)),
  r"train.jsonl:1: 3 placeholders \(id 5\) for 1 images of 2 tokens": dict(image_token=WHAT),
  r"config.data.data_dir='' has no <split>.jsonl": dict(fields=dict(data_dir="")),
  r"config.data.eval_split='val': .*valid: test, train": dict(split="val"),
  r"config.data.name='conversation': .*did you mean 'conversations'\? valid: conv": dict(
    fields=dict(name="conversation")
  ),
}


@pytest.mark.parametrize("message", BAD_FIELDS)
def test_bad_fields(folder, message):
  with pytest.raises(ValueError, match=message):
    batches(folder, **BAD_FIELDS[message])


def test_too_long_may_be_skipped_and_is_counted(folder, caplog):
  assert all_rows(batches(folder, max_length=9, too_long="skip"))["valid"].sum() == 3
  assert "config.text.too_long='skip': 2 of 5 conversations skipped" in caplog.text


def test_bad_tokenizers(tmp_path):
  (tmp_path / "words.json").write_text('{"words": [1]}')
  for path, message in (("none", "is not there; valid: a JSON file of words"), ("words.json", "no list of strings")):
    with pytest.raises(ValueError, match=message):
      tokenizers.read_tokenizer(tmp_path / path)
  (tmp_path / "words.json").write_text("{")
  with pytest.raises(ValueError, match=r"valid: a file that WordTokenizer.write wrote"):
    tokenizers.read_tokenizer(tmp_path / "words.json")
  with pytest.raises(ValueError, match="one comes twice"):
    tokenizers.WordTokenizer(["red", "red"])
  with pytest.raises(ValueError, match=r"config.text.tokenizer=.*(cannot be read|is not installed)"):
    tokenizers.read_tokenizer(tmp_path)
