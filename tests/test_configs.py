"""Every recipe in configs/, in every structural variant, builds, is locked and makes its two steps."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tokred
from tokred import losses, sweep
from tokred.config import arguments, complete, default
from tokred.train.loop import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from configs import sweep as sweep_recipe

ROOT = Path(__file__).parents[1]
TFDS = ROOT.parent / "shared" / "data" / "tfds"
RECIPES = sorted(
  path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("sweep", "vlm_methods")
)  # have tests of their own
VARIANTS = {  # arguments beside `learned` and `runlocal`
  "digits": ("",),
  "vit": ("dataset=fashion_mnist", "dataset=cifar10", "dataset=image_folder"),
}


def get_config(name, arguments=""):
  spec = importlib.util.spec_from_file_location(f"config_{name}", ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arguments)


def join(*parts):
  return ",".join(filter(None, parts))


ALL = [
  (name, variant, learned)
  for name in RECIPES
  for variant, learned in itertools.product(VARIANTS.get(name, ("",)), ("", "learned"))
  if name not in ("methods", "finetune", "vlm_llava")
  and not (learned and (name == "segment" or name.startswith("vlm_")))
]
FIRST = [(name, VARIANTS.get(name, ("",))[0]) for name in RECIPES]
METHODS = [name for name in sweep.methods(sweep_recipe.get_config()) if name != "dense"]


@pytest.mark.parametrize(("arguments", "warmup"), [("steps=100", 50), ("method=sit,steps=40", 20), ("", 200)])
def test_few_steps_of_the_small_reader(arguments, warmup):
  """A warmup that is longer than the run is refused when the data have been read."""
  assert get_config("vlm_easy", arguments).optim.warmup_steps == warmup


@pytest.fixture
def data_dir(tmp_path):
  """data_dir(config): a folder of images made here, or where the TFDS data sets lie; skips where they do not."""

  def find(config):
    if config.data.name == "digits":
      return ""
    if config.data.name == "image_folder":
      rng = np.random.default_rng(0)
      for split, label, number in itertools.product(("train", "test"), "ab", range(32)):
        folder = tmp_path / "images" / split / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{number}.jpg")
      return str(tmp_path / "images")
    if not (TFDS / config.data.name).is_dir():
      pytest.skip(f"{config.data.name} is not prepared in {TFDS}")
    return str(TFDS)

  return find


@pytest.mark.parametrize(("name", "variant", "learned"), ALL)
def test_full_size_builds(name, variant, learned):
  config = get_config(name, join(variant, learned))
  model = tokred.build(config)
  assert bool(model.module.sites.spots) == bool(learned)
  assert complete(config).is_locked
  assert config.to_dict().keys() == default().to_dict().keys()  # no field that nobody reads


def some():
  """Learned rates with the first variant only, since the others are other data; that one without is thorough.

  So are those of digits, which tests/test_demo.py trains, and CIFAR-10, read as Fashion-MNIST is.
  """
  for name, variant, learned in ALL:
    first = (name, variant) in FIRST
    if first or not learned:
      covered = first and not learned and (name, variant, "learned") in ALL
      covered |= name == "digits" or variant == "dataset=cifar10"
      yield pytest.param(name, variant, learned, marks=[pytest.mark.thorough] * covered)


@pytest.mark.parametrize(("name", "variant", "learned"), list(some()))
def test_runs_two_steps(name, variant, learned, data_dir, one_device, tmp_path):
  config = get_config(name, join(variant, learned, "runlocal"))
  with config.unlocked():
    config.data.data_dir = data_dir(config)
  summary = train(config, tmp_path / "run")
  assert summary["step"] == 2 and 0 <= summary["accuracy"] <= 1
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2]
  if learned:  # frozen after the first step
    assert "train/budget" in lines[0] and "train/budget" not in lines[1]
    assert summary["counts"][-1] < tokred.build(config).module.sites.stack.num_tokens


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds(method):
  config = get_config("methods", f"method={method},budget=0.6")
  assert tokred.build(config).module.sites.spots and config.is_locked
  assert config.to_dict().keys() == default().to_dict().keys()


SMALL = "dataset=image_folder,variant=S/16,image_size=224"


@pytest.mark.parametrize("schedule, gmacs", [("deit_s_2.3g", 2.327), ("deit_s_2.9g", 2.905)])
def test_a_released_schedule(schedule, gmacs):
  """What the authors print for DeiT-S, within the MACs of 998 classes that are missing here: 0.0004 G."""
  config = get_config("methods", f"method=diffrate_released,schedule={schedule},{SMALL}")
  model = tokred.build(config)
  assert model.macs / 1e9 == pytest.approx(gmacs, abs=1e-3)
  assert model.counts[0] in (197, 194) and model.counts[-1] == 3
  assert config.train.mode == "gather" and config.loss.budget == 0 and config.is_locked
  assert "diffrate_released" not in METHODS  # a sweep has models of other depths


@pytest.mark.parametrize(
  "arguments, message",
  [
    ("method=diffrate_released", r"schedule='' is unknown; valid: deit_s_2.3g, deit_s_2.9g"),
    (f"method=diffrate_released,schedule=deit_s_2.8g,{SMALL}", r"schedule='deit_s_2.8g' is unknown; did you mean"),
    (
      "method=diffrate_released,schedule=deit_s_2.9g",
      r"is for 12 blocks and 197 tokens, and not for the 6 blocks and 65 tokens of mu/4 at \(32, 32\); valid: .*S/16",
    ),
    ("method=tome,schedule=deit_s_2.9g", "schedule='deit_s_2.9g' is for method=diffrate_released, not 'tome'"),
    ("method=ltpm", "method='ltpm' is unknown; did you mean 'ltmp'"),
  ],
)
def test_a_schedule_that_does_not_fit_is_refused(arguments, message):
  with pytest.raises(ValueError, match=f"config argument .*{message}"):
    get_config("methods", arguments)


def test_sit_in_stages():
  """Slots of slots behind the first three blocks, a share of what arrives each, and a reverse module behind all."""
  config = get_config("methods", "method=sit_stages,budget=0.6")
  model = tokred.build(config)
  first, second, third, *rest = model.counts
  assert 65 > first > second > third and set(rest) == {third}
  assert 0.55 < model.macs / losses.dense_macs(model.module) <= 0.6
  assert config.sites.slim.reverse and config.sites.back.layers == (3, 4, 5) and config.loss.recalibration == 2.0
  shallow = get_config("methods", "method=sit_stages,budget=0.8,dataset=fashion_mnist,runlocal").sites
  assert shallow.slim.layers == (0, 1) and shallow.back.layers == (2,)


@pytest.mark.thorough
def test_learned_thresholds(one_device, tmp_path):
  """Three blocks with a threshold each for merging and for pruning; images keep different numbers afterwards."""
  config = get_config("methods", "method=ltmp,budget=0.8,runlocal")
  with config.unlocked():
    config.model.update(dict(width=16, depth=3, mlp_dim=32, image_size=(16, 16)))
    config.sites.tokens.update(dict(layers=(0, 1, 2), threshold=(-0.3, 0.0)))  # some merge at once
  summary = train(config, tmp_path / "run")
  logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert all("train/budget" in line for line in logged)
  frozen = tokred.freeze(tokred.load(tmp_path / "run"))
  site = frozen.config.sites.tokens
  assert site.rate == "threshold" and set(np.sign(site.threshold[::2])) == {-1.0}
  assert all(before != after for before, after in zip((-0.3, 0.0) * 3, site.threshold, strict=True))
  assert 2 <= summary["sites"]["tokens/2/topk"] < 17


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["mod"])
def test_methods_run_two_steps(method, one_device, tmp_path):
  config = get_config("methods", f"method={method},budget=0.6,runlocal")
  summary = train(config, tmp_path / "run")
  assert summary["step"] == 2 and 0 <= summary["accuracy"] <= 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_misspelt_argument_is_refused(name):
  with pytest.raises(
    ValueError, match=r"config argument 'runlokal' is unknown; did you mean 'runlocal'\? valid: .*runlocal"
  ):
    get_config(name, "runlokal")


@pytest.mark.parametrize("name", RECIPES)
def test_a_misspelt_field_is_refused(name):
  config = get_config(name, "runlocal" if name in ("finetune", "vlm_llava") else "").lock()  # as config_flags does
  with pytest.raises((AttributeError, KeyError), match='Did you mean "batch_size" instead of "batchsize"'):
    config.train.batchsize = 1


@pytest.mark.parametrize("name", RECIPES)
def test_docstring_has_the_command(name):
  text = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
  assert f"python train.py --config=configs/{name}.py" in text and "--workdir=" in text


def test_a_yes_or_no_is_one_of_these():
  flags = {
    text: arguments(text, flag=False).flag for text in ("", "flag", "flag=1", "flag=True", "flag=0", "flag=false")
  }
  assert list(flags.values()) == [False, True, True, True, False, False]
  with pytest.raises(ValueError, match="config argument flag='flase' must be of type bool; valid: 1, true, 0, false"):
    arguments("flag=flase", flag=False)
