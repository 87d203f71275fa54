"""Imports run downward: each room of the package knows those below it, and neither those above nor its neighbours."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "tokred"
ROOMS = [  # from the bottom; a room may import those below it, not its neighbours
  {"command", "config", "files", "lora", "memory"},
  {"tokens"},
  {"scores"},
  {"rates", "cost"},
  {"reducers"},
  {"layout"},
  {"drafts"},
  {"sites"},
  {"nn"},
  {"arank", "losses", "sharding", "checkpoint", "model"},
  {"run_dir"},
  {"pretrained"},
  {"data", "vqa", "schedules"},
  {"thresholds"},
  {"evaluate", "export", "bench", "viz", "calibrate", "probe", "processing", "results"},
  {"loading"},
  {"train"},
  {"demo", "predict", "publish", "testing", "sweep", "bench_vlm"},
  {"budgets"},
]
PACKAGES = {"reducers", "nn", "pretrained", "data", "export", "train", "testing"}  # their files know each other


def level(room):
  return next(height for height, names in enumerate(ROOMS) if room in names)


def room_of(path):
  return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
  """Rooms that a file imports, at its top or inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level:
      raise AssertionError(f"{path}: relative import")
    else:
      continue
    for name in names:
      parts = name.split(".")
      if parts[0] == "tokred" and len(parts) > 1:
        yield parts[1]


def violations():
  for path in sorted(ROOT.rglob("*.py")):
    room = room_of(path)
    if room in ("__init__", "__main__"):
      continue  # the public API gathers all
    for other in imported(path):
      if other == room and room in PACKAGES:
        continue
      if other.startswith("_") or (ROOT / f"{other}.py").exists() or (ROOT / other).is_dir():
        if level(other) >= level(room):
          yield f"{path.relative_to(ROOT.parent)} imports {other}"


def test_every_file_has_a_room():
  known = set().union(*ROOMS) | {"__init__", "__main__"}
  assert {room_of(path) for path in ROOT.rglob("*.py")} <= known


def test_no_import_runs_upward():
  assert list(violations()) == []


def test_the_checker_sees_an_import(tmp_path):
  file = tmp_path / "a.py"
  file.write_text(
    "import jax\nfrom tokred import tokens as tk\nfrom tokred.nn import vit\ndef f():\n  import tokred.train\n"
  )
  assert sorted(imported(file)) == ["nn", "tokens", "train"]


def test_backbones_and_reducers_know_no_training():
  for path in [*(ROOT / "nn").glob("*.py"), *(ROOT / "reducers").glob("*.py")]:
    assert not {"train", "data", "sharding", "losses"} & set(imported(path)), path
