"""What README shows works as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest

import tokred
from tokred import reducers

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def _block(text: str) -> str:
  (found,) = [block for block in BLOCKS if text in block]
  return found


@pytest.fixture
def distinct_keys():
  before = dict(reducers.REGISTRY)
  scope = {}
  exec(compile(_block("distinct_keys"), "README.md", "exec"), scope)
  yield scope["DistinctKeys"]
  reducers.REGISTRY.clear()
  reducers.REGISTRY.update(before)


def test_new_reducer_is_one_short_file(distinct_keys):
  assert len(_block("distinct_keys").splitlines()) <= 24


def test_new_reducer_keeps_the_laws(distinct_keys):
  tokred.testing.check_reducer(distinct_keys(), cases=("later", "model"))


def test_new_reducer_works_from_a_config(distinct_keys):
  model = {"variant": "mu/4", "depth": 3, "image_size": (16, 16), "num_classes": 3}
  site = {"reducer": "distinct_keys", "layers": (1, 2), "keep": 0.5}
  made = tokred.build({"model": model, "sites": {"mine": site}}).init(0)
  out = made(np.zeros((2, 16, 16, 3), np.float32))
  assert out.counts == (17, 9, 5)  # ceil(16 / 2) + 1, ceil(8 / 2) + 1


def test_sites_of_the_readme_parse():
  from tokred.config import default

  config = default()
  exec(_block("config.sites.drop"), {"config": config})
  for name, site in config.sites.items():
    model = tokred.build({"model": {"variant": "S/16"}, "sites": {name: site.to_dict()}})
    assert model.module.sites.spots, name


def test_counts_of_the_readme():
  config = eval(_block("tokred.build(").split("tokred.build(")[1].split(")   ")[0])
  assert tokred.build(config).counts[:2] == (184, 171)
  assert tokred.build(config).counts[-1] == 41


def test_modules_that_the_readme_names_come_with_the_package():
  """`import tokred` and the dotted name are enough, whatever else has been imported."""
  root = Path(tokred.__file__).parent
  named = {name for name in re.findall(r"tokred\.(\w+)\.", README) if (root / f"{name}.py").is_file()}
  assert {"bench", "schedules", "viz"} <= named <= set(tokred._MODULES)
  assert "calibrate" in tokred._MODULES and callable(tokred.calibrate.by_threshold)
