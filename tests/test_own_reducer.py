"""A reducer outside the package: trained by a recipe that imports it, then evaluated, exported, loaded and swept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

import tokred
from configs import sweep as recipe_file
from tokred import reducers, sweep
from tokred.reducers import base

ROOT = Path(__file__).parent.parent
MODULE = """
import jax.numpy as jnp
import tokred


@tokred.register("loudest")
class Loudest(tokred.Planner):
  needs = ("key",)

  def plan(self, tokens, keep, *, train):
    score = jnp.linalg.norm(tokens.feats["key"].astype(jnp.float32), axis=-1).mean(-1)
    return tokred.keep_top(tokens, score, keep), {"score": score}
"""
RECIPE = """
import my_reducer
from configs import digits


def get_config():
  config = digits.get_config("runlocal")
  config.model.update(dict(variant="mu/2", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(8, 8)))
  config.data.update(dict(train_split="train[:16]", eval_split="test[:20]"))
  config.sites.mine = dict(reducer="loudest", layers=(1,), keep=0.5)
  return config
"""
SITE = dict(reducer="loudest", layers=(1,), keep=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """With the user's module and recipe."""
  folder = tmp_path_factory.mktemp("own")
  (folder / "my_reducer.py").write_text(MODULE)
  (folder / "my_recipe.py").write_text(RECIPE)
  return folder


@pytest.fixture(scope="module")
def call(folder):
  """Runs a command where the module is on PYTHONPATH, and `told` (TOKRED_IMPORT) or not."""

  def call(*command, told=""):
    own = dict(PYTHONPATH=str(folder), TOKRED_IMPORT=told, XLA_FLAGS="--xla_backend_optimization_level=0")
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | own, capture_output=True, text=True)

  return call


@pytest.fixture(scope="module")
def workdir(folder, call):
  done = call("train.py", f"--config={folder / 'my_recipe.py'}", f"--workdir={folder / 'run'}")
  assert not done.returncode, done.stderr
  return folder / "run"


@pytest.fixture
def stranger(folder, monkeypatch):
  """This process finds the module, and has not imported it."""
  monkeypatch.syspath_prepend(folder)
  monkeypatch.delitem(sys.modules, "my_reducer", raising=False)
  before = dict(base.REGISTRY)
  yield
  sys.modules.pop("my_reducer", None)
  base.REGISTRY.clear()
  base.REGISTRY.update(before)


def test_a_command_that_is_not_told_says_how(call, workdir):
  done = call("eval.py", f"--workdir={workdir}")
  (line,) = done.stderr.strip().splitlines()
  assert done.returncode and line.startswith("eval.py: sites.mine.reducer='loudest' is not a reducer; valid: atp, ")
  assert line.endswith("one of your own is known once its module is imported, in commands by TOKRED_IMPORT=MODULE")
  done = call("eval.py", f"--workdir={workdir}", told="my_reduser")
  assert "TOKRED_IMPORT='my_reduser': No module named 'my_reduser'; valid: modules on PYTHONPATH" in done.stderr


def test_commands_that_are_told(call, workdir, folder):
  done = call("eval.py", f"--workdir={workdir}", told="my_reducer")
  assert not done.returncode and json.loads(done.stdout)["counts"] == [17, 9], done.stderr
  formats, output = "orbax,safetensors,stablehlo", f"--output={folder / 'exported'}"
  done = call("export.py", f"--workdir={workdir}", output, f"--formats={formats}", "--latency=", told="my_reducer")
  assert not done.returncode, done.stderr
  found = tokred.export.read_card(folder / "exported")["verified"]["formats"]
  assert found.keys() == set(formats.split(",")) and all(value["difference"] < 1e-5 for value in found.values())


def test_load_imports_what_the_user_names_and_nothing_else(workdir, stranger, monkeypatch):
  with pytest.raises(ValueError, match=r"'loudest' is not a reducer; .*TOKRED_IMPORT=MODULE$"):
    tokred.load(workdir)
  monkeypatch.setenv("TOKRED_IMPORT", "my_reducer,not_needed")
  assert tokred.load(workdir).counts == (17, 9)


def test_a_program_that_imported_it_exports_it(stranger, tmp_path):
  """The process that compares knows it, too."""
  import my_reducer  # noqa: F401

  model, images = micro(), np.zeros((2, 8, 8, 3), np.float32)
  tokred.export.save(model, tmp_path / "exported", ("orbax", "safetensors", "stablehlo"), images=images)
  assert len(tokred.export.read_card(tmp_path / "exported")["verified"]["formats"]) == 3


def test_a_reducer_of_a_script_is_refused_before_it_is_exported(stranger, tmp_path):
  import my_reducer

  my_reducer.Loudest.__module__ = "__main__"
  model, images = micro(), np.zeros((2, 8, 8, 3), np.float32)
  with pytest.raises(ValueError, match=r"sites.mine.reducer='loudest' is written in a script .*; valid: a module"):
    tokred.export.save(model, tmp_path / "exported", images=images)
  tokred.export.save(model, tmp_path / "exported", ("stablehlo",), images=images)


def micro():
  sizes = dict(variant="mu/2", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(8, 8), num_classes=3)
  return tokred.build(dict(model=sizes, sites=dict(mine=SITE))).init()


def test_a_sweep_finds_it(stranger, monkeypatch):
  config = recipe_file.get_config("dataset=digits,runlocal")
  config.table["mine"] = ConfigDict(dict(sites=dict(tokens=dict(reducer="loudest", layers="stages"))))
  config.methods = ("mine",)
  with pytest.raises(ValueError, match=r"needs reducer 'loudest', which is not registered; .*TOKRED_IMPORT=MODULE"):
    sweep.methods(config)
  monkeypatch.setenv("TOKRED_IMPORT", "my_reducer")
  assert sweep.methods(config) == ["mine"] and reducers.known("loudest")
  assert sweep.recipe(config, "mine", 0.9, 0).sites.tokens.reducer == "loudest"
