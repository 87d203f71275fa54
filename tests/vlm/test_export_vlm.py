"""A VLM shipped as StableHLO writes what the model writes, in a process of its own, at every count of image tokens."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import tokred
from tokred import evaluate, predict
from tokred.config import complete
from tokred.data.tokenizers import WordTokenizer
from tokred.export import ExportError, check
from tokred.export.generation import open_generation, save_generation
from tokred.model import Reader, build

IMAGE = 3
CONFIG = dict(
  model=dict(name="vlm", variant="mu/4", image_size=(16, 16), num_classes=0, depth=1),
  llm=dict(vocab=40, width=32, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=48, image_token=IMAGE),
)
SIZES = dict(prompt_length=24, max_new_tokens=5, batch_size=2)


def sites(count):
  return dict(  # CLS stays in the tower
    out=dict(reducer="topk", score="key_norm", layers=(-1,), place="output", keep=count + 1),
    llm=dict(stack="llm", reducer="topk", score="last_attention", layers=(1,), place="before", keep=0.5),
  )


@functools.cache
def model(count=8):
  params = build(CONFIG).init(0).params if count == 8 else model().params
  larger = lambda a: a * 2 if a.ndim > 1 else a
  params = jax.tree.map(larger, params) if count == 8 else params
  return dataclasses.replace(build(CONFIG | dict(sites=sites(count))), params=params)


@functools.cache
def prompts():
  """Two questions of different lengths, padding in front of one."""
  rng = np.random.default_rng(0)
  ids = np.array([[0, 0, 5, *[IMAGE] * 16, 6, 7], [8, 9, *[IMAGE] * 16, 10, 11, 12]], np.int32)
  return dict(ids=ids, images=rng.normal(size=(2, 1, 16, 16, 3)).astype(np.float32), mask=ids > 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("export")
  WordTokenizer(["what", "colour"]).write(path / "learned.json")
  save_generation(model(), path / "vlm", **SIZES, prompts=prompts(), words=path / "learned.json")
  return path / "vlm"


def test_what_is_shipped_writes_as_the_model(folder):
  """`save_generation` has compared the tokens in a fresh process; here a batch that is filled, and a stop."""
  p, found = prompts(), open_generation(folder)
  whole = found.write(**p).tokens
  assert whole.shape == (2, 5) and found.card["counts"] == [8]
  assert WordTokenizer.read(folder / "words.json").words[-2:] == ("what", "colour")
  assert repr(found) == "Generation(image tokens: [8] of 16, prompts of 24 ids)"  # no weights
  alone = found.write(p["ids"][1:], p["images"][1:], max_new_tokens=3).tokens
  np.testing.assert_array_equal(alone, whole[1:, :3])
  stop = int(whole[0, 1])
  end = whole[0].tolist().index(stop)
  stopped, inside = found.write(**p, stop_tokens=[stop]), model().write(**p, max_new_tokens=5, stop_tokens=[stop])
  assert stopped.length[0] == end + 1 and stopped.length.tolist() == np.asarray(inside.length).tolist()
  np.testing.assert_array_equal(stopped.tokens[0], np.where(np.arange(5) <= end, whole[0], 0))


@pytest.mark.thorough
def test_several_counts(tmp_path):
  card = save_generation([model(8), model(4)], tmp_path / "vlm", **SIZES, prompts=prompts())
  assert card["counts"] == [4, 8] and card["cache_bytes"]["4"] < card["cache_bytes"]["8"]
  found, p = open_generation(tmp_path / "vlm"), prompts()
  for count in (4, 8):
    whole = np.asarray(model(count).write(p["ids"], p["images"], p["mask"], 5).tokens)
    np.testing.assert_array_equal(found.write(**p, count=count).tokens, whole)


def test_bad_prompts(folder):
  p, found = prompts(), open_generation(folder)
  for message, changed in {
    r"count=5: no such count of image tokens; valid: 8": dict(count=5),
    r"max_new_tokens=9; valid: 1 to 5": dict(max_new_tokens=9),
    r"max_new_tokens=1.5; valid: 1 or more": dict(max_new_tokens=1.5),
    r"stop_tokens='</s>'; valid: ids": dict(stop_tokens="</s>"),
    r"ids of shape \(2, 42\) and mask of \(2, 42\); valid: at most \(2, 24\)": dict(
      ids=np.tile(p["ids"], 2), mask=np.tile(p["mask"], 2)
    ),
    r"images of shape \(2, 16, 16, 3\); valid: \(2, 1, 16, 16, 3\)": dict(images=p["images"][:, 0]),
    r"images of dtype uint8; valid: float32, normalised": dict(images=p["images"].astype(np.uint8)),
    r"ids of dtype float32; valid: integers": dict(ids=p["ids"].astype(np.float32)),
    r"ids from 3 to 9999; valid: 0 to 39": dict(ids=np.where(p["ids"] == 3, 3, 9999)),
    r"row 1 has 15 placeholders \(id 3\); valid: 16, 16 for each of 1 images": dict(
      ids=np.where(np.arange(42).reshape(2, 21) == 21 + 5, 6, p["ids"])
    ),
  }.items():
    with pytest.raises(ValueError, match=message):
      found.write(**p | changed)


def test_questions_in_words(folder, tmp_path, monkeypatch, capsys):
  """The run and its export are asked alike: bos, 16 placeholders, two words and a mark that nobody knows."""
  asked, photo = complete(model().config), tmp_path / "cat.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(photo)
  with asked.unlocked():
    asked.text.tokenizer = str(folder / "words.json")
  run, found = dataclasses.replace(model(), config=asked), open_generation(folder)
  ids, images = predict._prompt(asked, "What colour?", [photo])
  assert ids.tolist() == [[1, *[3] * 16, 5, 6, 4]] and images.shape == (1, 1, 16, 16, 3)
  said = WordTokenizer.read(folder / "words.json").decode(found.write(ids, images, stop_tokens=(2,)).tokens[0])
  assert predict.answer(found, "What colour?", [photo]) == said
  monkeypatch.setattr(Reader, "write", lambda self, *given, **options: found.write(*given, **options))
  assert predict.answer(run, "<image> what colour?", [photo]) == said
  predict.main([f"--model={folder}", str(photo), "--question=What colour?"])
  assert capsys.readouterr().out == f"{photo}\n  {said}\n"
  with pytest.raises(ValueError, match=r"config.text.tokenizer='': nothing says which ids"):
    predict.answer(model(), "What colour?", [photo])
  monkeypatch.setattr(predict, "load", lambda path: run)
  for message, arguments in {
    r"run is a vision-language model: it answers a --question": ["--model=run"],
    rf"{folder} is a function without parameters, .* give the run": [f"--model={folder}", "--show"],
    r"question='<image> or <image>' has 2 <image> for 1 images": ["--model=run", "--question=<image> or <image>"],
  }.items():
    with pytest.raises(SystemExit, match=f"tokred.predict: {message}"):
      predict.main([str(photo), *arguments])


def test_prompts_of_an_export_are_as_long_as_any_question(tmp_path):
  """Those that show no image cannot be asked of it, and the first one is not the longest."""
  Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
  lines = [("who are you", None), ("<image> what", "a.png"), ("<image> what is this", "a.png")]
  for split in ("train", "test"):
    said = [[dict(value=asked, **{"from": "human"}), dict(value="a cat", **{"from": "gpt"})] for asked, _ in lines]
    talks = [dict(conversations=turns, image=image) for turns, (_, image) in zip(said, lines, strict=True)]
    (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, talks)))
  data = dict(name="conversations", data_dir=str(tmp_path))
  for number, rows in ((1, 1), (4, 2)):
    found = evaluate.prompts(build(CONFIG | dict(data=data)), number)
    assert found["ids"].shape == (rows, 1 + 16 + 3) and found["images"].shape == (rows, 1, 16, 16, 3)
    assert found["mask"].sum(1).tolist() == [18, 20][:rows]


def test_functions_for_other_platforms_are_not_run_here(tmp_path):
  save_generation(model(), tmp_path / "new", **SIZES, prompts=prompts(), platforms=["tpu"])
  with pytest.raises(ExportError, match="new was exported for tpu, and this is cpu"):
    open_generation(tmp_path / "new")


def test_bad_exports(folder, tmp_path):
  with pytest.raises(ValueError, match=r"prompt_length=16; valid: 17 or more"):
    save_generation(model(), tmp_path / "new", **SIZES | dict(prompt_length=16))
  with pytest.raises(ValueError, match=r"batch_size=0; valid: 1 or more"):
    save_generation(model(), tmp_path / "new", **SIZES | dict(batch_size=0))
  with pytest.raises(ValueError, match=r"two models leave 8 tokens of an image; .*stack='llm' change none"):
    save_generation([model(), model(), model(4)], tmp_path / "new", **SIZES)
  for models in ([], build(dict(model=dict(variant="mu/4"))), build(CONFIG)):
    with pytest.raises(ValueError, match=r"models .*; valid: one or more vision-language models with parameters"):
      save_generation(models, tmp_path / "new", **SIZES)
  with pytest.raises(
    ValueError, match=r"formats=\('orbax', 'stablehlo'\): .* orbax, safetensors, or .*save_generation"
  ):
    tokred.export.save(model(), tmp_path / "new")
  with pytest.raises(ValueError, match=r"platforms has 'gpu'; did you mean 'cuda'"):
    save_generation(model(), tmp_path / "new", **SIZES, platforms=["gpu"])
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ValueError, match=r"exists and is no export"):
    save_generation(model(), tmp_path, **SIZES)
  with pytest.raises(ExportError, match=r"holds no export of a vision-language model"):
    open_generation(tmp_path)
  with pytest.raises(ValueError, match=r"is an export of a vision-language model; .*open_generation runs it"):
    tokred.load(folder)
  shutil.copytree(folder, tmp_path / "copy")
  check(tmp_path / "copy", ["stablehlo"])  # it may be replaced, as long as nothing else is in it
  (tmp_path / "copy" / "notes").write_text("mine")
  with pytest.raises(ValueError, match="also holds notes"):
    save_generation(model(), tmp_path / "copy", **SIZES)
  card = json.loads((tmp_path / "copy" / "generation.json").read_text())
  (tmp_path / "copy" / "generation.json").write_text(json.dumps(card | {"max_new_tokens": 9}))
  with pytest.raises(ExportError, match=r"is damaged: generation.json has"):
    open_generation(tmp_path / "copy")
