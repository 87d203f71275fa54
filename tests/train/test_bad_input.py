"""One line for every mistake: it names the field, the value and what is valid, and nothing was compiled for it."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import micro
import numpy as np
import pytest
from PIL import Image

import tokred
from tokred import checkpoint, run_dir
from tokred.train.loop import train

ROOT = Path(__file__).parents[2]
TFDS = ROOT.parent / "shared" / "data" / "tfds"


def site(**fields):
  return {"sites": {"prune": dict(dict(reducer="topk", layers=(1,), keep=0.5), **fields)}}


def learned(**groups):
  return {"sites": {"rates": micro.PAIR}} | groups


# What is set in the micro recipe, and what the message must say (regexes in this order).
MISTAKES = {
  "reducer": (site(reducer="tomee"), ["sites.prune.reducer='tomee'", "did you mean 'tome'"]),
  "model": ({"model": {"name": "vitt"}}, ["config.model.name='vitt'", "did you mean 'vit'"]),
  "data set": ({"data": {"name": "digitz"}}, ["config.data.name='digitz'", "did you mean 'digits'"]),
  "loss": ({"loss": {"bugdet": 1.0}}, ["config.loss.bugdet", "did you mean 'budget'"]),
  "config field": ({"train": {"batchsize": 1}}, ["config.train.batchsize", "did you mean 'batch_size'"]),
  "config group": ({"optimizer": {"lr": 1.0}}, ["config.optimizer", "did you mean 'optim'"]),
  "site field": (site(kep=0.5), ["sites.prune.kep", "did you mean 'keep'"]),
  "type": ({"train": {"steps": "many"}}, ["config.train.steps='many'", "valid: int"]),
  "nothing": ({"init": None}, ["config.init=None is of type NoneType", "valid: str"]),
  "keep of 0": (site(keep=0.0), ["sites.prune.keep=0.0", "above 0.0 and at most 1.0"]),
  "keep below 0": (site(keep=-0.5), ["sites.prune.keep=-0.5", "above 0.0"]),
  "more than arrive": (site(keep=40), ["sites.prune: keep=40", "only 17 tokens arrive at layer 1", "lower config"]),
  "layer": (site(layers=(2,)), ["sites.prune.layers has 2", "layers 0 to 1"]),
  "all tokens, meant": (site(keep=1), ["keep=1 leaves 1 of 17 tokens", r"keep \(1 is a number .* all of them are 1.0"]),
  "a site's name": ({"sites": {3: {}, "x": {}}}, ["config.sites has 3; valid: a name of letters"]),
  "rate": (site(rate="lerned"), ["sites.prune.rate='lerned'", "did you mean 'learned'"]),
  "mesh": ({"mesh": {"data": 3}}, ["config.mesh.data=3", "there are 8; valid: a product of 8"]),
  "packed and shared": ({"text": {"pack": True, "share": True}}, ["config.text.share=True and config.text.pack=True"]),
  "seed": ({"seed": 2**63}, [r"config.seed=9223372036854775808; valid: 0 up to, not including, 2\*\*63"]),
  "batch": ({"train": {"batch_size": 12}}, ["batch_size=12", "not divisible by 8", "nearest valid: 8 or 16"]),
  "micro-batch": ({"train": {"accumulate": 3}}, ["batch_size=8", "accumulate=3", "nearest valid: 24"]),
  "classes": ({"model": {"num_classes": 9}}, ["config.model.num_classes=9", "digits has 10 classes"]),
  "labels": (
    {"data": {"labels": ("a", "b")}},
    [r"config.data.labels=\('a', 'b'\) are 2 names; valid: 10, one a class"],
  ),
  "split": ({"data": {"train_split": "trian"}}, ["config.data.train_split='trian'", "valid: train, test"]),
  "no folder": ({"data": {"name": "image_folder", "data_dir": "nowhere"}}, ["config.data.data_dir='nowhere'"]),
  "optimiser": ({"optim": {"name": "adamww"}}, ["config.optim.name='adamww'", "did you mean 'adamw'"]),
  "regex": ({"optim": {"freeze": ("blocks.*",)}}, ["config.optim.freeze: 'blocks.\\*' matches none", "block_0"]),
  "frozen behind the end": (
    learned(rates={"freeze_step": 7}),
    ["config.rates.freeze_step=7 but the run has 6 steps", r"valid: 0 \(never\) to 6"],
  ),
  "counts that fall behind the end": (
    site(rate="scheduled", schedule=(0, 7)),
    [r"config.sites.prune.schedule=\(0, 7\) ends at step 7, but the run has 6 steps", "valid: up to 6"],
  ),
  "a temperature that falls behind the end": (
    site(reducer="gumbel", anneal=(("temperature", 2.0, 1.0, 0, 7),)),
    [r"config.sites.prune.anneal=.* ends at step 7, but the run has 6 steps", "valid: up to 6"],
  ),
  "adapters": (
    {"lora": {"rank": 2, "train": (r"haed/.*", r"(.*/)?reduce/.*")}},
    [r"config.lora.train: 'haed/\.\*' matches none", "valid are paths such as"],
  ),
  "mesh rule": (
    {"mesh": {"rules": ((r"no_such/kernel", ("fsdp", None)),)}},
    [r"config.mesh.rules\[0\]=.*'no_such/kernel' matches the end of no path", "valid are those of "],
  ),
  "warm-up": ({"optim": {"warmup_steps": 9}}, ["config.optim.warmup_steps=9", "valid: 0 to 5"]),
  "batch of 0": ({"train": {"batch_size": 0}}, ["config.train.batch_size=0", "1 or more"]),
  "negative steps": ({"train": {"steps": -1}}, ["config.train.steps=-1", "0 or more"]),
  "no epoch": ({"train": {"steps": 0, "epochs": 0.01}}, ["config.train.epochs=0.01", "less than one step"]),
  "no end": ({"train": {"steps": 0, "epochs": float("inf")}}, ["config.train.epochs=inf; valid: a finite number"]),
  "evaluation": ({"eval": {"batch_size": 0}}, ["config.eval.batch_size=0"]),
  "average": ({"optim": {"ema": 1.0}}, ["config.optim.ema=1.0"]),
  "moments": ({"optim": {"b1": 1.0}}, ["config.optim.b1=1.0; valid: 0 up to, not including, 1"]),
  "confidence": ({"loss": {"confidence": 40.0}}, ["config.loss.confidence=40.0; valid: 0 up to, not including, 1"]),
  "layers, not their share": ({"loss": {"halting_depth": 8.0}}, ["config.loss.halting_depth=8.0; valid: 0 to 1"]),
  "weight": ({"loss": {"cross_entropy": -1.0}}, ["config.loss.cross_entropy=-1.0"]),
  "no number": ({"loss": {"target": float("nan")}}, ["config.loss.target=nan"]),
  "mode": ({"train": {"mode": "gathr"}}, ["config.train.mode='gathr'", "mask, gather"]),
  "gather": (learned(train={"mode": "gather"}), ["config.train.mode='gather'", r"\['rates'\] is learned"]),
  "gathered threshold": (
    site(rate="learned_threshold") | {"train": {"mode": "gather"}},
    ["config.train.mode='gather'", r"\['prune'\] is learned; valid: mask"],
  ),
  "moving": (
    site(rate="scheduled", schedule=(0, 4)) | {"train": {"mode": "gather"}},
    ["static counts", r"\['prune'\]"],
  ),
  "frozen schedule": (
    site(rate="scheduled", schedule=(0, 4)) | {"rates": {"freeze_step": 3}},
    ["config.rates.freeze_step=3", r"\['prune'\] move"],
  ),
  "budget": (site() | {"loss": {"budget": 1.0}}, ["config.loss.budget=1.0", "no site has rate='learned'"]),
  "router": (site() | {"loss": {"router": 1.0}}, ["config.loss.router=1.0", "no site has reducer='router'"]),
  "keep ratio": (
    site() | {"loss": {"keep_ratio": 1.0}},
    ["config.loss.keep_ratio=1.0", "with config.train.mode='mask' no site has a reducer that dr"],
  ),
  "least share": (site() | {"loss": {"min_ratio": 1.0}}, ["config.loss.min_ratio=1.0", "reducer that draws who stays"]),
  "keep ratio of nobody": (
    site(reducer="gumbel", place="before") | {"loss": {"keep_ratio": 1.0}, "train": {"mode": "gather"}},
    ["config.loss.keep_ratio=1.0", "with config.train.mode='gather' no site has a reducer that draws"],
  ),
  "less": (
    site(rate="threshold", threshold=0.1) | {"loss": {"consistency": 1.0, "less": 2}},
    ["config.loss.less=2", r"\['prune'\] are not fixed"],
  ),
  "cells": (
    {"sites": {"s": {"reducer": "stvit", "layers": (0,), "keep": 5}}, "loss": {"consistency": 1.0, "less": 2}},
    ["config.loss.less=2 sets counts", r"\['s'\] are not fixed"],
  ),
  "consistency": ({"loss": {"consistency": 1.0}}, ["config.loss.consistency=1.0", "no sites"]),
  "teacher": ({"loss": {"distill_logits": 1.0}}, ["config.loss.distill_logits=1.0", "config.teacher"]),
  "init": ({"init": "nowhere"}, ["nowhere"]),
  "idle teacher": ({"teacher": "nowhere"}, ["config.teacher='nowhere' has nothing to teach", "distill_logits, .*''"]),
  "init and teacher": ({"teacher": "nowhere", "loss": {"distill_tokens": 1.0}}, ["nowhere"]),
  "frozen for ever": ({"optim": {"freeze": (".*",)}}, ["config.optim.freeze", "nothing would learn"]),
  "multiple": ({"rates": {"multiple_of": 0}}, ["config.rates.multiple_of=0"]),
}


def changed(changes):
  """The micro recipe as a plain dict, with changes that `complete` may not accept."""
  plain = micro.config().to_dict()
  for name, value in changes.items():
    plain[name] = plain.get(name, {}) | value if isinstance(value, dict) else value
  return plain


@pytest.fixture(scope="module")
def compilations():
  """Grows with every program that XLA compiles."""
  found = []

  def listen(event, duration, **_):
    if event.endswith("backend_compile_duration"):
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  jax.jit(lambda x: x + 1)(np.float32(0)).block_until_ready()
  assert found  # the event still has this name
  return found


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_the_config(name, compilations, tmp_path, capfd):
  changes, words = MISTAKES[name]
  before = len(compilations)
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    train(changed(changes), tmp_path / "run")
  assert re.search(".*".join(words), str(error.value)), str(error.value)
  assert "\n" not in str(error.value)
  assert len(compilations) == before
  assert not (tmp_path / "run").exists()  # so nothing is in the way of the next try
  assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["reducer", "model", "config field", "keep of 0", "more than arrive", "layer", "loss"])
def test_build_says_the_same(name, compilations):
  before = len(compilations)
  with pytest.raises(ValueError, match=".*".join(MISTAKES[name][1])):
    tokred.build(changed(MISTAKES[name][0]))
  assert len(compilations) == before


def test_data_set_without_labels(compilations, tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")
  features = {"image": tfds.features.Image(shape=(4, 4, 1))}
  metadata = tfds.core.MetadataDict()

  class Unlabelled(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    name = "unlabelled"

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), metadata=metadata)

    def _split_generators(self, manager):
      return {}

    def _generate_examples(self):
      yield from ()

  builder = Unlabelled(data_dir=tmp_path, file_format="array_record")
  splits = {name: 8 for name in ("train", "test")}
  infos = [
    tfds.core.SplitInfo(
      name=name, shard_lengths=[count], num_bytes=0, filename_template=builder._get_filename_template(name)
    )
    for name, count in splits.items()
  ]
  builder.info.set_splits(tfds.core.splits.SplitDict(infos))
  Path(builder.data_dir).mkdir(parents=True)
  builder.info.write_to_directory(builder.data_dir)
  before = len(compilations)
  with pytest.raises(ValueError, match=r"config.data.name='unlabelled': data set has no label; features: image"):
    train(micro.config(data=dict(name="unlabelled", data_dir=str(tmp_path))), tmp_path / "run")
  assert len(compilations) == before


@pytest.fixture
def folder(tmp_path):
  """A user's own images, ten classes; one of them is cut short."""
  rng = np.random.default_rng(0)
  for label in range(10):
    (tmp_path / "images" / str(label)).mkdir(parents=True)
    for number in range(4):
      pixels = rng.integers(0, 256, (4, 4), np.uint8)
      Image.fromarray(pixels).save(tmp_path / "images" / str(label) / f"{number}.png")
  cut = tmp_path / "images" / "3" / "1.png"
  cut.write_bytes(cut.read_bytes()[:50])
  return tmp_path / "images"


def folder_config(folder, **data):
  fields = dict(name="image_folder", data_dir=str(folder), train_split="train[:20]", eval_split="train[20:]")
  return micro.config(data=fields | data, train=dict(steps=2, mode="mask"), optim=dict(warmup_steps=1))


def test_truncated_image_is_refused(folder, compilations, tmp_path):
  before = len(compilations)
  with pytest.raises(ValueError, match=r"config.data.bad_images='error': 1 of 20 images unreadable: .*/3/1.png .*skip"):
    train(folder_config(folder), tmp_path / "run")
  assert len(compilations) == before


def test_truncated_image_is_skipped_and_counted(folder, one_device, tmp_path, caplog):
  summary = train(folder_config(folder, bad_images="skip"), tmp_path / "run")
  lines = [record.getMessage() for record in caplog.records if "bad_images" in record.getMessage()]
  assert lines and all("config.data.bad_images='skip': 1 of 20 images unreadable" in line for line in lines)
  trained = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
  assert trained["step"] == 2 and summary["examples"] in (19, 20)


@pytest.fixture(scope="module")
def finished(one_device, tmp_path_factory):
  """A run directory, by micro recipe."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  train(micro.config(), workdir)
  return workdir


@pytest.fixture
def workdir(finished, tmp_path):
  return Path(shutil.copytree(finished, tmp_path / "run"))


class TestRunDirectory:
  def test_of_another_config(self, workdir, compilations):
    before, config = len(compilations), micro.config(optim=dict(lr=0.5))
    with pytest.raises(ValueError, match=r"another config \(config.optim.lr: 0.003 there, 0.5 here\); use another"):
      train(config, workdir)
    assert len(compilations) == before
    assert run_dir.read_config(workdir) == micro.config(data=dict(labels=tuple("0123456789")))

  def test_of_a_run_that_trains_now(self, workdir):
    with run_dir.locked(workdir), pytest.raises(ValueError, match=r"workdir='.*/run': another run trains there"):
      train(micro.config(), workdir)
    with run_dir.locked(workdir):
      assert tokred.load(workdir).params  # to read is always allowed
    assert train(micro.config(), workdir)["step"] == micro.STEPS

  def test_with_other_logging_is_resumed(self, workdir):
    assert train(micro.config(train=dict(log_every=2), eval=dict(batch_size=30)), workdir)["step"] == micro.STEPS

  def test_of_other_classes(self, workdir):
    """A folder that was renamed, or stands elsewhere by the alphabet: its number means another class now."""
    with pytest.raises(ValueError, match=r"config.data.labels: \('0', '1', .*'9'\) there, \('1', '0', .*'9'\) here"):
      train(micro.config(data=dict(labels=tuple("1023456789"))), workdir)

  def test_config_that_is_no_json(self, workdir):
    (workdir / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON .*use another --workdir"):
      train(micro.config(), workdir)

  @pytest.mark.parametrize("damage", ["truncated", "tampered", "deleted"])
  def test_damaged_checkpoint(self, workdir, damage):
    step = workdir / checkpoint.FOLDER / str(micro.STEPS)
    file = max((path for path in (step / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    if damage == "deleted":
      file.unlink()
    else:
      file.write_bytes(content[:-10] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    for read in (lambda: train(micro.config(), workdir), lambda: tokred.load(workdir)):
      with pytest.raises(ValueError, match=rf"checkpoint {step} is damaged: .*step 3 is intact: delete {step}"):
        read()
    shutil.rmtree(step)  # what the message advises
    assert train(micro.config(), workdir)["step"] == micro.STEPS

  def test_init_of_another_shape(self, workdir, tmp_path, compilations):
    config = micro.config(model=dict(width=48, variant="Ti/1", num_heads=0), init=str(workdir))
    told = r"run is of another size \(config.model.width: 16 there, 48 here; config.model.num_heads: 2 there, 3 here\)"
    before = len(compilations)
    with pytest.raises(ValueError, match=told):
      train(config, tmp_path / "other")
    assert len(compilations) == before and not (tmp_path / "other").exists()

  def test_teacher_of_another_shape(self, workdir, tmp_path, compilations):
    config = micro.config(model=dict(depth=3, width=32), teacher=str(workdir), loss=dict(distill_logits=1.0))
    before = len(compilations)
    with pytest.raises(ValueError, match=r"another size \(config.model.width: 16 there, 32 here; .*depth: 2 there, 3"):
      train(config, tmp_path / "other")
    assert len(compilations) == before


def command(arguments, environment, before="exec"):
  """Exit code and stderr of train.py; `before` is what the shell does first."""
  words = ["sh", "-c", before + ' "$@"', "sh", sys.executable, "train.py", *arguments]
  result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
  return result.returncode, result.stderr


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--config.train.stepz=3"], "train.py: the config has no field 'stepz' Did you mean \"steps\""),
    (["--config.data.name=digitz"], "train.py: config.data.name='digitz': no such data set; did you mean 'digits'?"),
    (["--config.mesh.data=3"], "train.py: config.mesh.data=3"),
    (["--config=configs/digits.py:lerned"], "train.py: ValueError: config argument 'lerned' is unknown; did you mean"),
    (["--config=configs/digitz.py"], "train.py: "),
    (["--workdir="], "train.py: workdir='' is no directory"),
    (["rubbish"], "train.py: unexpected argument 'rubbish'"),
  ],
)
def test_command_line_says_one_line(arguments, words, tmp_path):
  # JAX looks for accelerators here, as it does for most users, and must not tell of it.
  environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
  arguments = ["--config=configs/digits.py:runlocal", f"--workdir={tmp_path / 'run'}", *arguments]
  code, err = command(arguments, environment)
  assert code == 1
  assert err.startswith(words) and err.count("\n") == 1, err
  assert not (tmp_path / "run").exists()


def test_no_room_for_the_checkpoint(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
  message = r"step 3 not saved: the disk is full \(1,000 bytes are free, [0-9,]+ needed\): make room, then .*no earlier"
  with pytest.raises(checkpoint.CheckpointError, match=message):
    train(micro.config(), tmp_path)
  monkeypatch.undo()
  assert train(micro.config(), tmp_path)["step"] == micro.STEPS  # there is room again


def test_full_disk(cached_environment, tmp_path):
  """No file may grow beyond 100 kB: the state of this model is larger."""
  arguments = ["--config=configs/digits.py:runlocal", f"--workdir={tmp_path}", "--config.train.checkpoint_every=1"]
  arguments.append("--config.model.depth=1")  # 50,000 numbers of four bytes, and twice as many of the optimiser
  environment = {name: value for name, value in cached_environment.items() if "CACHE" not in name}
  code, err = command(arguments, environment, before="ulimit -f 200; exec")  # blocks of 512 bytes
  # Writes that other threads had begun may complain too, asyncio in the log as well, but our last word is this.
  assert code == 1 and not re.search(r"^E\d{4} (?!.*exception was never retrieved)", err, re.MULTILINE), err
  last = [line for line in err.splitlines() if line.startswith("train.py: ")][-1]
  assert re.search(r"train.py: .*step 1 not saved: the disk is full \(.*make room, then run the same command", last)
  assert checkpoint.steps(tmp_path / checkpoint.FOLDER) == []


def test_full_disk_of_the_log(workdir, monkeypatch):
  from tokred.train.log import MetricLog

  def write(*args, **kwargs):
    raise OSError(errno.ENOSPC, "cannot write the metrics of step 1: No space left on device", "metrics.jsonl")

  monkeypatch.setattr(MetricLog, "write", write)
  shutil.rmtree(workdir)
  with pytest.raises(OSError, match="cannot write the metrics of step 1: No space left"):
    train(micro.config(), workdir)
