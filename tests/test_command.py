"""Command lines that cannot begin: one line for each mistake, and a recipe's own errors with their place."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHOLE = """from tokred.config import default
import beside

def get_config(arguments=""):
  config = default().lock()
  {}
  return config
"""
RECIPES = {  # a recipe, and what is told of it
  "import": ("import nosuchmodule", "ModuleNotFoundError: No module named 'nosuchmodule' ({}, line 1)"),
  "syntax": ("def get_config(:", "SyntaxError: invalid syntax (recipe.py, line 1)"),
  "bug": (WHOLE.format("config.train.steps = 1 // 0"), "ZeroDivisionError: {zero} ({}, line 6)"),
  "value": (WHOLE.format("int('many')"), "ValueError: invalid literal for int() with base 10: 'many' ({}, line 6)"),
  "file": (
    WHOLE.format("open('/no/file')"),
    "FileNotFoundError: [Errno 2] No such file or directory: '/no/file' ({}, ",
  ),
  "field": (WHOLE.format("config.train.stepz = 1"), 'AttributeError: Key "stepz" does not exist'),
  "module": (WHOLE.format("beside.make()"), "NameError: name 'undefined' is not defined ({folder}/beside.py, line 2)"),
  "nothing": ("", "the file of --config has no function get_config"),
}
COMMANDS = {
  "field of a sweep": ("-m tokred.sweep --config=configs/sweep.py --config.mispelt=1", "has no field 'mispelt'"),
  "no sweep": ("-m tokred.sweep --config=configs/digits.py", "config.methods is missing; valid: a config as"),
  "argument": ("-m tokred.sweep --config=configs/sweep.py:datset=digits", "'datset' is unknown; did you mean"),
  "type": ("-m tokred.sweep --config=configs/sweep.py --config.bench.rounds=ten", "flag --config.bench.rounds=ten"),
  "eval": ("eval.py --bach_size=1", "eval.py: Unknown command line flag 'bach_size'. Did you mean: batch_size"),
  "export": ("export.py --batch_size=many", "export.py: flag --batch_size=many: invalid literal for int()"),
}  # fmt: skip


def line(*arguments):
  """The only line that a command prints before it fails."""
  done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
  return done.stderr


@pytest.mark.parametrize("override", ["--nologtostderr", "--config.train.steps=3"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_fails(name, override, tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  text, told = RECIPES[name]
  recipe = tmp_path / "recipe.py"
  recipe.write_text(text)
  (tmp_path / "beside.py").write_text("def make():\n  return undefined\n")
  found = line("train.py", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", override)
  try:
    1 // 0  # noqa: B018
  except ZeroDivisionError as error:  # worded by Python's version
    zero = str(error)
  assert found.startswith("train.py: " + told.format(recipe, folder=tmp_path, zero=zero)), found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_line_that_is_wrong(name, tmp_path):
  arguments, told = COMMANDS[name]
  assert told in line(*arguments.split(), f"--workdir={tmp_path / 'run'}")
  assert not (tmp_path / "run").exists()
