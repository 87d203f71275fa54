"""Vision-language models learn from conversations: two stages, adapters, reducers, a resumed run, a list of budgets."""

import functools
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import tokred
from tokred import data, loading, losses, sharding
from tokred.budgets import judge
from tokred.config import complete
from tokred.evaluate import evaluate
from tokred.losses import answers, reported
from tokred.model import init
from tokred.train import loop, step
from tokred.train.loop import train
from tokred.train.phase import Phase

sys.path.insert(0, str(Path(__file__).parents[2]))
from configs import vlm_easy, vlm_llava, vlm_methods

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
  """Eight images in two colours, and who asks which; one conversation has no image."""
  folder, rng = tmp_path_factory.mktemp("talks"), np.random.default_rng(0)
  for split in ("train", "test"):
    lines = []
    for number in range(8):
      red = number % 2
      pixels = rng.integers(0, 60, (20, 24, 3), np.uint8)
      pixels[..., 0] += np.uint8(180 * red)
      Image.fromarray(pixels).save(folder / f"{split}{number}.png")
      turns = ["<image>\nIs it red?", "yes" if red else "no", "Are you sure?", "I am"]
      if number == 7:
        turns = ["Who are you?", "a model"]
      said = [dict(value=text, **{"from": "human" if i % 2 == 0 else "gpt"}) for i, text in enumerate(turns)]
      lines.append(
        json.dumps(dict(id=number, conversations=said) | (dict(image=f"{split}{number}.png") if number < 7 else {}))
      )
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
  return folder


def recipe(talks, arguments="", **fields):
  config = vlm_llava.get_config(",".join(filter(None, [arguments, "runlocal"])))
  with config.unlocked():
    config.data.data_dir = str(talks)
    for name, value in fields.items():
      group, _, field = name.partition("__")
      config[group][field] = value
  return config


def parameters(path):
  return {name: np.asarray(leaf) for name, leaf in flatten_dict(tokred.load(path).params, sep="/").items()}


@pytest.fixture(scope="module")
def stage_1(talks, tmp_path_factory):
  """A run of the first stage, and its summary."""
  folder = tmp_path_factory.mktemp("stage_1")
  return folder, train(recipe(talks), folder)


def test_two_stages(talks, stage_1, tmp_path):
  """Stage 1 moves the projector alone, stage 2 with adapters the kernels that have one, with a reducer on the way."""
  drawn = tokred.build(recipe(talks)).init(0).params
  drawn = {name: np.asarray(leaf) for name, leaf in flatten_dict(drawn, sep="/").items()}
  folder, first = stage_1
  assert first["step"] == 2 and first["examples"] == 4 and 0 <= first["accuracy"] <= 1
  one = parameters(folder)
  moved = {name for name in one if not np.array_equal(one[name], drawn[name])}
  assert moved and all(name.startswith("projector/") for name in moved)
  init = f"init={folder}"
  short = dict(text__max_length=96)  # as stage 1 has it: from a run on, runlocal asks for 2048
  second = train(recipe(talks, f"{init},stage=2,tune=lora,method=gumbel,keep=0.25", **short), tmp_path / "2")
  assert second["gmacs"] < first["gmacs"]
  lines = [json.loads(line) for line in (tmp_path / "2" / "metrics.jsonl").read_text().splitlines()]
  assert all(lines[0][f"train/{term}"] >= 0 for term in ("cross_entropy", "distill_logits", "keep_ratio"))
  words = [(path / "words.json").read_text() for path in (folder, tmp_path / "2")]
  assert words[0] == words[1]  # and the second run does not need the first one's
  assert loading.read_config(tmp_path / "2").text.tokenizer == str(tmp_path / "2" / "words.json")
  two = parameters(tmp_path / "2")
  moved = {name for name in one if not np.array_equal(two[name], one[name])}
  assert any("attn/qkv" in name for name in moved) and any(name.startswith("projector/") for name in moved)
  assert not any(name.startswith("tower/block") or "norm" in name for name in moved)
  assert any("reduce" in name for name in two)
  model = tokred.load(tmp_path / "2")
  assert model.module.left() == 4 and model.mode == "gather"
  ids = np.full((1, 20), 5, np.int32)
  ids[:, 1:17] = 3
  assert model(ids, np.zeros((1, 1, 16, 16, 3), np.float32)).shape == (1, 20, 512)
  assert model.write(ids, np.zeros((1, 1, 16, 16, 3), np.float32), max_new_tokens=3).tokens.shape == (1, 3)


def test_ids_mean_what_they_meant_where_the_weights_come_from(talks, stage_1, tmp_path):
  """Other conversations have other words: a vocabulary of theirs would give the weights of one word to another."""
  other = tmp_path / "talks"
  shutil.copytree(talks, other)
  lines = (other / "train.jsonl").read_text()
  (other / "train.jsonl").write_text(lines.replace("red", "a colour that I know"))
  config = recipe(other, train__steps=1, optim__warmup_steps=0)
  config.init = str(stage_1[0])
  assert data.tokenizer(complete(config)).words != data.tokenizer(loading.read_config(stage_1[0])).words
  train(config, tmp_path / "run")
  assert (tmp_path / "run" / "words.json").read_text() == (stage_1[0] / "words.json").read_text()
  train(config, tmp_path / "run")  # the same command goes on: nothing is left to do


def test_words_of_a_checkpoint_stay(talks, stage_1, tmp_path):
  """Whoever resumes with other data hears of it, and the run keeps the words that its ids mean."""
  shutil.copytree(talks, tmp_path / "talks")
  lines = (talks / "train.jsonl").read_text().replace("Is it red?", "Seems it scarlet?")
  (tmp_path / "talks" / "train.jsonl").write_text(lines)
  shutil.copytree(stage_1[0], tmp_path / "run")
  before = (tmp_path / "run" / "words.json").read_text()
  with pytest.raises(ValueError, match="state of the data does not fit this run: text="):
    train(recipe(tmp_path / "talks"), tmp_path / "run")
  assert (tmp_path / "run" / "words.json").read_text() == before


def test_terms_of_classifiers_are_refused(talks, stage_1, tmp_path):
  config = recipe(talks, loss__distill_tokens=1.0)
  with pytest.raises(ValueError, match=r"config.loss.distill_tokens=1.0 is no term of config.model.name='vlm'"):
    train(config, tmp_path)


def test_counts_are_of_the_images_that_there_are(talks):
  """Seven images in eight conversations, whatever the padding of the batches."""
  config = recipe(talks)
  site = dict(reducer="topk", layers=(1,), place="before", score="token_norm", rate="threshold", threshold=4.0, keep=16)
  model = tokred.build(config.to_dict() | {"sites": {"cut": site}}).init(0)
  whole, padded = ([evaluate(model, "test", size, mode)["sites"] for mode in ("gather", "mask")] for size in (8, 5))
  assert whole == padded == [{"cut/1": 16.0}] * 2  # an image keeps all its patches, a black one hardly any
  half = dict(stack="llm", reducer="topk", layers=(1,), place="before", score="token_norm", keep=0.5)
  model = tokred.build(config.to_dict() | {"sites": {"cut": half}}).init(0)
  found = evaluate(model, "test", 5, "gather")["sites"]
  batch = next(iter(data.feed(config, "test", train=False, batch_size=8)))
  text = (batch["mask"] & (batch["ids"] != 3)).sum(1)[batch["valid"]]
  left = text + -(-(batch["slot"] >= 0).sum((1, 2))[batch["valid"]] // 2)
  assert found == {"cut/1": round(float(left.mean()), 2)}  # of a row of the language model, its text counted


@pytest.mark.thorough  # projectors alone: tests/vlm/test_projectors.py
def test_another_projector_is_drawn_anew_and_the_teacher_keeps_its_own(talks, stage_1, tmp_path):
  folder, first = stage_1
  fields = dict(text__max_length=96, train__steps=1, optim__warmup_steps=0)
  config = recipe(talks, f"init={folder},method=queries,keep=0.25", **fields)
  assert config.loss.distill_logits
  with pytest.warns(UserWarning, match="has another projector: ours is drawn anew"):
    second = train(config, tmp_path)
  assert second["gmacs"] < first["gmacs"]
  (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert line["train/distill_logits"] > 0
  one, two = parameters(folder), parameters(tmp_path)
  assert two["projector/queries"].shape == (4, 32) and "projector/fc1/kernel" not in two
  np.testing.assert_array_equal(one["llm/embed/embedding"], two["llm/embed/embedding"])


@pytest.mark.thorough  # the loop is that of tests/train/test_loop.py
def test_resuming_equals_not_stopping(talks, tmp_path):
  fields = dict(train__checkpoint_every=1, optim__warmup_steps=0)
  whole = train(recipe(talks, **fields), tmp_path / "whole")
  for folder in (tmp_path / "whole" / "checkpoints").glob("1"):
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    import shutil

    shutil.copytree(folder, tmp_path / "half" / "checkpoints" / "1")
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "half" / "config.json")
  again = train(recipe(talks, **fields), tmp_path / "half")
  assert again["loss"] == whole["loss"]
  for name, leaf in parameters(tmp_path / "half").items():
    np.testing.assert_array_equal(leaf, parameters(tmp_path / "whole")[name])


def test_rates_of_tower_and_language_model_learn_under_one_budget(talks, tmp_path):
  """Both stacks give tokens away, and the frozen model costs what was asked."""
  fields = dict(
    train__steps=60, train__checkpoint_every=60, optim__lr=1e-2, optim__warmup_steps=0, rates__freeze_step=58,
    loss__target=0.85, loss__distill_logits=0.0,
  )  # fmt: skip
  config = recipe(talks, "stage=2,tune=full,method=rates", **fields)
  assert {spot.rate for spot in tokred.build(config).module.spots} == {"learned"}
  summary = train(config, tmp_path)
  line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])  # half of the tokens, in either stack
  in_llm = [name.removeprefix("train/share/") for name in line if name.startswith("train/share/")]
  assert in_llm and all(0.4 < line[f"train/share/{name}"] < 0.6 for name in in_llm)
  assert all(f"train/counts/{name}" in line and name in summary["sites"] for name in in_llm)
  model = tokred.load(tmp_path)
  tower, llm = model.module.tower.sites.counts(), [spot.budget for spot in model.module.llm.sites.spots]
  assert tower[-1] < 17 and all(0 < share < 1 for share in llm)
  assert not any("rate" in name.split("/") for name in parameters(tmp_path))
  dense = model.with_sites({})
  assert model.macs / dense.macs == pytest.approx(0.85, abs=0.03)


def test_a_list_of_budgets(talks):
  model = tokred.build(recipe(talks)).init(0)
  known = dict(depth=2, llm_depth=2, cls=True)
  models = {"dense": model} | {
    name: model.with_sites(vlm_methods.sites(name, 0.25, **known)) for name in ("fastervlm",)
  }
  found = judge(models, times=False)
  assert found["dense"]["image_tokens"] == 16 and found["fastervlm"]["image_tokens"] == 4
  less, whole = found["fastervlm"], found["dense"]
  assert less["gmacs"] < whole["gmacs"] and less["gmacs_written"] < whole["gmacs_written"]
  llm = models["dense"].module.llm.shape  # float32 keys and values of the prompt's text and of what is left of an image
  for each in (less, whole):
    held = models["dense"].module.prompt + each["image_tokens"]
    assert each["prompt_bytes"] == 2 * 4 * llm.num_kv_heads * llm.head_dim * llm.depth * held
  assert {"accuracy", "vqa_accuracy", "caption_loss", "examples"} <= found["dense"].keys()
  assert found["dense"]["examples"] == 4 and found["dense"]["caption_loss"] > 0


def test_loss_is_on_answers_alone():
  """Two of three ids are answers; the model gives them e^2 / (e^2 + 1) and 1/2: -log of these, and the mean."""
  logits = np.zeros((1, 3, 2), np.float32)
  logits[0, 0, 1] = 2.0
  got = answers(logits, np.array([[0, 1, 0]]), np.array([[False, True, True]]))
  np.testing.assert_allclose(got, (np.log1p(np.exp(-2.0)) + np.log(2.0)) / 2, rtol=1e-6)


def test_accumulation_is_the_mean_over_the_batch(talks):
  """Answers of 1, 6, 2 and 4 ids: a mean of means would be another loss."""
  config = recipe(talks, text__pack=False, loss__distill_logits=1.0)
  module = tokred.build(config).module
  params, teaches = init(module, 0), functools.partial(module.apply, {"params": init(module, 1)})
  batch = {name: jnp.asarray(a) for name, a in next(data.feed(config, "train", train=True, batch_size=4)).items()}
  place = jnp.arange(96)
  batch["answer"] = (place >= 2) & (place < 2 + jnp.array([1, 6, 2, 4])[:, None])

  def loss(params, batch, rng, keeps, teacher):
    _, terms, accuracy = step._answer(config.loss, module, params, teaches, batch, "mask", keeps, {})
    return losses.total(config.loss, terms), terms | {"accuracy": accuracy}

  run = jax.jit(lambda n: step._accumulate(loss, params, batch, jax.random.key(0), None, None, n), static_argnums=0)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), run(1), run(4))


@pytest.mark.parametrize("fields, rows", [(dict(), 4), (dict(text__max_length=30, text__pack=False), 1)])
def test_epochs_count_rows(talks, tmp_path, monkeypatch, fields, rows):
  """Two of the eight conversations share a row, the one without an image goes with the seventh; or it alone fits."""

  def phase(config, mesh, total, **_):
    raise InterruptedError(total)

  monkeypatch.setattr(loop, "Phase", phase)
  fields = fields | dict(text__too_long="skip", train__steps=0, train__epochs=3.0, train__batch_size=1)
  fields["data__eval_split"] = "test"
  with pytest.raises(InterruptedError, match=f"^{3 * rows}$"):
    train(recipe(talks, **fields), tmp_path)


@pytest.fixture(scope="module")
def mixed(talks):
  """Two images, one, and none, but a long text."""
  many = " ".join(["is"] * 60)
  texts = (["<image> or <image>", "yes"], ["<image>\nIs it?", "no"], [f"{many}?", f"a model {many}"])
  folder, lines = talks / "mixed", []
  folder.mkdir()
  for turns, images in zip(texts, (["0.png", "1.png"], ["0.png"], []), strict=True):
    said = [dict(value=text, **{"from": "human" if i == 0 else "gpt"}) for i, text in enumerate(turns)]
    lines.append(json.dumps(dict(conversations=said, image=images)))
  for number in range(2):
    Image.open(talks / f"train{number}.png").save(folder / f"{number}.png")
  (folder / "train.jsonl").write_text("\n".join(lines))
  return folder


@pytest.mark.parametrize("pack", [False, True])
def test_rows_with_fewer_images_lose_no_text(mixed, pack):
  """Of 150 places a row without an image fills 120 with text, and two images are 32: what is known says so."""
  config = recipe(mixed, text__max_length=150, text__images=2, text__pack=pack, data__train_split="train")
  with config.unlocked():
    site = dict(reducer="topk", score="token_norm", keep=0.25)
    config.sites.seen = dict(site, place="output")
    if not pack:
      config.sites.read = dict(site, stack="llm", layers=(1,), place="before")
  batches, module = data.feed(config, "train", train=True, batch_size=4), tokred.build(config).module
  batch, known = next(batches), module.known_of(*batches.rows)
  counted = module.known(batch["ids"], batch["slot"], batch["mask"])
  assert known == counted and known.census.free == 0 and known.census.text > 150 - 2 * 16
  params, look = init(module, 0), functools.partial(step._answer, config.loss, module)
  run = jax.jit(lambda mode: look(params, None, batch, mode, None, {}, known)[1:], static_argnums=0)
  (one, right), (two, also_right) = run("mask"), run("gather")
  np.testing.assert_allclose(one["cross_entropy"], two["cross_entropy"], rtol=1e-5)
  assert right == also_right


@pytest.mark.parametrize("method", ["gumbel", "queries", "visionzip", "pdrop", "random"])
def test_recipes_build(method):
  config = vlm_easy.get_config(f"method={method}")
  model = tokred.build(config)
  dense = tokred.build(vlm_easy.get_config())
  assert model.macs < dense.macs and (method == "pdrop" or model.module.left() in (6, 7))


def test_a_temperature_falls_in_the_language_model():
  """Half way from 4 to 1 it is 4 (1/4)^0.5 = 2: the model learns what one with temperature=2 learns."""

  def phase(**options):
    config = vlm_easy.get_config()
    site = dict(stack="llm", layers=(0,), place="before", reducer="gumbel", keep=0.5, **options)
    with config.unlocked():
      config.model.depth, config.llm.depth, config.sites = 1, 1, dict(select=site)
      config.train.mode, config.loss.keep_ratio = "mask", 2.0
    return Phase(complete(config), sharding.make_mesh(config.mesh), 1000)

  moving, fixed = phase(anneal=(("temperature", 4.0, 1.0, 0, 10),)), phase(temperature=2.0)
  assert moving.keeps(5) == {"select.temperature": 2.0} and fixed.keeps(5) is None
  params = init(fixed.module, 0)

  def slope(phase, keeps):
    def share(params):
      out = phase.module.apply(
        {"params": params},
        **phase.module.example(),
        train=True,
        mode="mask",
        keeps=keeps,
        rngs=dict(reduce=jax.random.key(0)),
      )
      return reported(phase.module, out, "kept_share").popitem()[1].sum()

    return np.asarray(
      jax.jit(jax.grad(share))(params)["llm"]["block_0"]["reduce"]["select"]["gumbel"]["predictor"]["out3"]["kernel"]
    )

  wanted = slope(fixed, None)
  np.testing.assert_allclose(slope(moving, moving.keeps(5)), wanted, rtol=1e-5)
  assert not np.allclose(slope(moving, moving.keeps(10)), wanted)


def test_counts_of_the_tower_fall_beside_sites_of_the_language_model():
  """Half of 16 patches are 8; llm blocks beyond the tower's depth are no error."""
  config, site = vlm_easy.get_config(), dict(reducer="topk", score="token_norm", keep=0.5)
  falls = dict(site, layers=(1,), rate="scheduled", schedule=(0, 10), position="reindex")
  with config.unlocked():
    config.model.update(dict(variant="mu/4", image_size=(16, 16), depth=2))
    config.llm.update(dict(vocab=64, width=32, depth=3, num_heads=2, mlp_dim=64))
    config.sites = dict(seen=falls, read=dict(site, stack="llm", layers=(2,), place="before"))
    config.train.mode = "mask"
  phase = Phase(complete(config), sharding.make_mesh(config.mesh), 1000)
  assert [phase.keeps(step)["seen"].tolist() for step in (0, 10)] == [[16], [8]]


LLAVA = Path(__file__).resolve().parents[3] / "shared" / "golden" / "vlm" / "hf" / "llava_clip_llama"


@pytest.mark.skipif(not LLAVA.is_dir(), reason=f"no golden data at {LLAVA}")
def test_a_directory_of_llava_loads_and_learns(talks, tmp_path):
  model = tokred.load(LLAVA)
  with np.load(LLAVA / "io.npz") as recorded:
    ids, pixels = recorded["input_ids"], recorded["pixel_values"]
    wanted, mask = recorded["logits"], recorded["attention_mask"] > 0
    written = recorded["gen_tokens"]
  images = np.moveaxis(pixels, 1, -1)[:, None]
  np.testing.assert_allclose(np.asarray(model(ids, images, mask))[mask], wanted[mask], atol=2e-4)
  np.testing.assert_array_equal(model.write(ids, images, mask, 12).tokens, written)
  less = tokred.load(LLAVA, sites=vlm_methods.sites("fastervlm", 0.25, depth=3, llm_depth=3, cls=True))
  assert less.module.left() == 9 and less.macs < model.macs
  config = recipe(talks, f"init={LLAVA}")
  with config.unlocked():
    config.text.max_length, config.text.tokenizer = 120, ""
  with pytest.warns(UserWarning, match="llava_clip_llama has no tokenizer: words of the training split get ids"):
    summary = train(config, tmp_path / "run")
  assert summary["step"] == 2 and summary["image_tokens"] == 36


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(num_heads=5), r"config.llm.num_heads=5 does not divide width=32"),
    (dict(norm_eps=-1.0), r"config.llm.norm_eps=-1.0; valid: 0 or more"),
    (dict(prompt=-1), r"config.llm.prompt=-1; valid: 1 or more"),
  ],
)
def test_a_language_model_that_cannot_be(talks, fields, message):
  config = recipe(talks)
  config.llm.width, config.llm.num_heads = 32, 2
  config.llm.update(fields)
  with pytest.raises(ValueError, match=message):
    tokred.build(config)


def test_what_a_reader_is_given(talks):
  model = tokred.build(recipe(talks)).init()
  ids, images = np.full((1, 20), 5, np.int32), np.zeros((1, 1, 16, 16, 3), np.float32)
  ids[:, 1:17] = 3
  with pytest.raises(ValueError, match=r"mask of shape \(1, 5\) for ids of shape \(1, 20\)"):
    model(ids, images, np.ones((1, 5), bool))
  with pytest.raises(ValueError, match=r"ids of shape \(1, 0\)"):
    model(ids[:, :0], images)
  for dtype in (np.float32, bool, str):
    with pytest.raises(ValueError, match=r"ids of dtype .*; the model takes the integers of a tokenizer"):
      model(ids.astype(dtype), images)
  with pytest.raises(ValueError, match=r"images of dtype uint8; the model takes float32"):
    model.write(ids, images.astype(np.uint8))


@pytest.mark.parametrize("keep", ["1.5", "half", "0"])
def test_shares_of_image_tokens(talks, keep):
  model = tokred.build(recipe(talks))
  with pytest.raises(ValueError, match=rf"keep='{keep}'; valid: shares of the image tokens, above 0 up to 1"):
    vlm_methods.reductions(model, ["random"], [keep])
  with pytest.raises(ValueError, match=r"no keep is given; valid: shares of the image tokens, such as --keep=1.0,0.25"):
    vlm_methods.reductions(model, ["random"], [])


def test_an_unknown_method_of_a_recipe():
  with pytest.raises(ValueError, match=r"method='sti' is unknown; did you mean 'sit'"):
    vlm_easy.get_config("method=sti")
