"""tokred.export: the same logits in a fresh process, and one clear error for whatever happened to it since."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokred
from tokred import export, files
from tokred.export import ExportError
from tokred.export.folder import replacing

MODEL = dict(
  variant="mu/2", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(8, 8), channels=1, num_classes=4
)  # 16 patches and CLS
SITES = {
  "tome_fuse": dict(
    merge=dict(reducer="tome", layers=(0,), r=3), prune=dict(reducer="topk", layers=(1,), keep=0.5, fuse=True)
  ),
  "router_gumbel": dict(
    router=dict(reducer="router", layers=(0,), keep=0.5), cut=dict(reducer="gumbel", layers=(1,), keep=0.4)
  ),
  "diffrate": dict(rates=dict(reducer=("topk", "diffrate_merge"), layers=(0, 1), rate="learned")),
  "threshold": dict(cut=dict(reducer="topk", layers=(0,), rate="threshold", threshold=0.05, keep=12)),
}
IMAGES = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)

FRESH = """
import json, sys
import numpy as np
from tokred import export
with np.load(sys.argv[1]) as recorded:
  images = recorded["images"]
  out = {name: export.differences(name, images, recorded[name]) for name in recorded if name != "images"}
any_batch = export.load_stablehlo(sys.argv[2])
out["other"] = [float(abs(any_batch(images[:2])[0] - any_batch(images)[0]).max())]
assert not any(name.startswith(("configs", "tokred.train")) for name in sys.modules)
print(json.dumps(out))
"""


def make(sites, seed=0):
  """A model whose parameters are all random, the logits of rates and the head included."""
  model = tokred.build(dict(model=MODEL, sites=sites))
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: model.init().params)
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), jnp.float32), shapes)
  return dataclasses.replace(model, params=params)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
  """One export for every kind of reducer; the threshold's function takes batches of 3 only."""
  folder = tmp_path_factory.mktemp("exports")
  models = {name: make(sites) for name, sites in SITES.items()}
  for name, model in models.items():
    export.save(model, folder / name, batch_size=3 if name == "threshold" else None, accuracy=0.5)
  return folder, models


@pytest.fixture
def exported(exports, tmp_path):
  """A copy that a test may damage."""
  shutil.copytree(exports[0] / "tome_fuse", tmp_path / "exported")
  return tmp_path / "exported"


@pytest.fixture
def plain(tmp_path):
  """Parameters and config alone: quick to write."""
  export.save(make(SITES["tome_fuse"]), tmp_path / "exported", ("orbax",))
  return tmp_path / "exported"


def test_a_fresh_process_gives_the_logits_of_the_trained_models(exports):
  folder, models = exports
  logits = {name: np.asarray(model(IMAGES).logits) for name, model in models.items()}
  np.savez(folder / "recorded.npz", images=IMAGES, **logits)
  command = [sys.executable, "-c", FRESH, str(folder / "recorded.npz"), "tome_fuse"]
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found.pop("other")[0] < 1e-5
  assert found.keys() == SITES.keys()
  for name, by_format in found.items():
    assert by_format.keys() == {"orbax", "stablehlo"} and max(by_format.values()) < 1e-5, (name, by_format)


def test_the_card_says_what_it_is(exports):
  folder, models = exports
  card = export.read_card(folder / "diffrate")
  assert card["version"] == export.VERSION and card["formats"] == ["orbax", "stablehlo"]
  assert card["counts"] == list(models["diffrate"].counts) and card["accuracy"] == 0.5
  assert card["gflops"] == models["diffrate"].flops / 1e9
  assert card["source_config"]["sites"]["rates"]["rate"] == "learned"
  assert card["config"]["sites"]["rates"].keys() == {"reducer", "layers", "keep"}  # frozen


def test_an_export_is_plain_files(exports):
  names = {path.name for path in (exports[0] / "diffrate").iterdir()}
  assert names == {"README.md", "tokred.json", "manifest.json", "params", "model.stablehlo"}
  for path in (exports[0] / "diffrate").rglob("*"):
    assert path.is_dir() or not path.read_bytes()[:2] == b"\x80\x04", f"{path} is a pickle"


def test_a_fixed_batch_size_is_fixed(exports):
  function = export.load_stablehlo(exports[0] / "threshold")
  with pytest.raises(ValueError, match="3"):
    function(IMAGES[:2])


def test_all_platforms_at_once(exports):
  model = exports[1]["diffrate"]
  function = export.functions.stablehlo(tokred.freeze(model), platforms=("cpu", "cuda", "tpu"))
  assert jax.export.deserialize(bytearray(function)).platforms == ("cpu", "cuda", "tpu")


def test_a_function_for_other_platforms_is_not_run_here(tmp_path):
  """Written on a CPU for a TPU: the parameters are compared, and who asks for the function is told."""
  model, folder = make({}), tmp_path / "exported"
  export.save(model, folder, platforms=("tpu",))
  assert export.compare(folder, IMAGES, np.asarray(model(IMAGES).logits)).keys() == {"orbax"}
  for read in (export.load_stablehlo, lambda path: export.load(path, "stablehlo")):
    with pytest.raises(ExportError, match="exported was exported for tpu, and this is cpu"):
      read(folder)


def test_what_went_wrong_in_the_fresh_process_is_told(tmp_path):
  """A function that fails within JAX, whose tracebacks end with a word on themselves."""
  model, folder = make({}), tmp_path / "exported"
  export.save(model, folder, ("stablehlo",), platforms=("tpu",))
  card = json.loads((folder / "tokred.json").read_text())
  (folder / "tokred.json").write_text(json.dumps(card | {"platforms": ["cpu"]}))
  files.write_manifest(folder)
  with pytest.raises(ExportError, match=r"does not run in a fresh process: ValueError: .*tpu"):
    export.verify(folder, IMAGES, np.asarray(model(IMAGES).logits))


def test_an_export_is_replaced(plain):
  other = make({}, seed=1)
  (plain / "params" / "old").write_text("of the first export")
  export.save(other, plain, ("orbax",))
  assert export.load(plain).counts == (17, 17) and not (plain / "params" / "old").exists()
  assert os.listdir(plain.parent) == ["exported"]


def test_other_folders_are_left_alone(plain, tmp_path):
  model = make({})
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "chapter").write_text("1")
  (tmp_path / "file").write_text("1")
  for name in ("thesis", "file"):
    with pytest.raises(ValueError, match=f"{name} exists and is no export; choose another folder"):
      export.save(model, tmp_path / name, ("orbax",))
  (plain / "notes").write_text("1")
  with pytest.raises(ValueError, match="also holds notes"):
    export.save(model, plain, ("orbax",))
  assert (plain / "notes").read_text() == (tmp_path / "thesis" / "chapter").read_text() == "1"


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(formats=("orbax", "stablehol")), "formats has 'stablehol'; did you mean 'stablehlo'"),
    (dict(formats="orbax"), "formats='orbax' must be a list"),
    (dict(formats=()), "must be a list of names; valid: orbax, stablehlo"),
    (dict(platforms=("cpu", "gpu")), "platforms has 'gpu'; did you mean 'cuda'. valid: cpu, cuda, rocm, tpu"),
    (dict(batch_size=0), "batch_size=0; valid: 1 or more"),
    (dict(batch_size=1.5), "batch_size=1.5; valid: 1 or more"),
    (dict(batch_size="8"), "batch_size='8'; valid: 1 or more"),
    (dict(model="runs/digits"), "freeze takes a Model, .* not 'runs/digits'"),
    (dict(formats=("orbax",), batch_size=2), "batch_size=2 is of a function, and formats=orbax has none; .* or onnx"),
    (dict(formats=("onnx",), platforms=("tpu",)), "platforms=.*formats=onnx has none; leave it out, or add stablehlo$"),
    (dict(formats=("orbax",), preprocess=True), "preprocess=True is of a function"),
    (dict(dtype="float16"), "dtype='float16'; did you mean 'bfloat16'.*valid: bfloat16, float32"),
  ],
)
def test_arguments(arguments, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    export.save(**dict(model=make({}), directory=tmp_path / "exported") | arguments)
  with pytest.raises(ValueError, match="no parameters"):
    export.save(tokred.build(dict(model=MODEL)), tmp_path / "exported")
  assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_export(plain):
  before = {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))  # no file may grow beyond
  try:
    with pytest.raises(ExportError, match=r"exported cannot be written: the disk is full \(File too large\)") as caught:
      export.save(make({}), plain, ("orbax",))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert "\n" not in str(caught.value)
  assert {path: path.read_bytes() for path in plain.rglob("*") if path.is_file()} == before
  assert os.listdir(plain.parent) == ["exported"]


def test_writers_that_go_on_after_a_failed_save_leave_nothing(tmp_path):
  """Orbax gives up at the first array; those of the others that are under way make the folder anew for a while."""
  folder, seen = tmp_path / "unfinished", []

  def go_on():
    for i in range(20):
      with contextlib.suppress(FileNotFoundError):  # removed between the two
        folder.mkdir(exist_ok=True)
        (folder / str(i)).write_text("late")
      seen.append(i)
      time.sleep(0.02)

  folder.mkdir()
  writer = threading.Thread(target=go_on)
  writer.start()
  files.remove_unfinished(folder)
  assert len(seen) == 20 and not folder.exists()
  writer.join()
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("fails", [1, 2])
def test_a_rename_that_fails_leaves_the_old_export(plain, monkeypatch, fails):
  """The first rename of the new export moves the old one away, the second takes its place."""
  replace, calls = os.replace, []

  def break_down(source, target):
    if str(plain.parent) == os.path.dirname(source):
      calls.append(source)
      if len(calls) == fails:
        raise OSError(5, "Input/output error")
    replace(source, target)

  monkeypatch.setattr(os, "replace", break_down)
  with pytest.raises(ExportError, match=r"cannot be written: OSError: .*Input/output error"):
    export.save(make({}), plain, ("orbax",))
  assert len(calls) >= fails and os.listdir(plain.parent) == ["exported"]
  assert export.load(plain).counts == make(SITES["tome_fuse"]).counts


def test_an_interrupt_between_the_renames_leaves_the_old_export(tmp_path, monkeypatch):
  replace, calls = os.replace, []

  def interrupt(source, target):
    calls.append(source)
    if len(calls) == 2:
      raise KeyboardInterrupt
    replace(source, target)

  (tmp_path / "exported").mkdir()
  (tmp_path / "exported" / "old").write_text("")
  monkeypatch.setattr(os, "replace", interrupt)
  with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "exported") as folder:
    (folder / "new").write_text("")
  assert os.listdir(tmp_path) == ["exported"] and os.listdir(tmp_path / "exported") == ["old"]


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ExportError, match="exported cannot be written: NotADirectoryError"):
    export.save(make({}), tmp_path / "file" / "exported", ("orbax",))


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def cut(path):
  path.write_bytes(path.read_bytes()[:-1])


def edit(**fields):
  return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
  "name, damage, message",
  [
    ("model.stablehlo", flip, r"is damaged: model\.stablehlo has another content"),
    ("model.stablehlo", cut, r"is damaged: model\.stablehlo has \d+ bytes instead of \d+"),
    ("model.stablehlo", os.remove, r"is damaged: model\.stablehlo is missing"),
    ("params", flip, r"is damaged: params/.* has another content"),
    ("manifest.json", os.remove, r"is damaged: manifest\.json is missing"),
    ("tokred.json", cut, r"is damaged"),
    ("tokred.json", edit(gflops=0.1), r"is damaged: tokred\.json has"),
    ("tokred.json", edit(version=None), r"tokred\.json is damaged"),
    ("tokred.json", edit(version=export.VERSION + 1), r"has layout 3, this tokred reads up to 2; upgrade tokred"),
  ],
)
def test_damage_is_told_by_every_reader(exported, name, damage, message):
  path = exported / name
  damage(max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size) if path.is_dir() else path)
  for read in (export.load, export.load_stablehlo, tokred.load):
    with pytest.raises(ExportError, match=message) as caught:
      read(exported)
    assert "\n" not in str(caught.value)


def test_what_an_export_does_not_hold(plain, tmp_path):
  with pytest.raises(ExportError, match="holds no 'stablehlo'; it holds: orbax"):
    export.load_stablehlo(plain)
  with pytest.raises(FileNotFoundError, match=r"is no export: it has no tokred\.json"):
    export.read_card(tmp_path)
