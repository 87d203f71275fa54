"""Exports of every format: what loads, what runs, what the cards say, and the commands and examples that use them."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import tokred
from tokred import bench, export, predict, publish
from tokred.export import ExportError

ROOT = Path(__file__).parent.parent
MODEL = dict(variant="mu/2", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(8, 8), channels=1, num_classes=4)
SITES = dict(cut=dict(reducer="topk", layers=(0,), keep=0.5, fuse=True))
LABELS = ("ant", "bee", "cat", "dog")
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
IMAGES = ((PIXELS / 255 - 0.5) / 0.5).astype(np.float32)
ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.fixture(scope="module")
def model():
  made = tokred.build(dict(model=MODEL, sites=SITES, data=dict(labels=LABELS)))
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: made.init().params)
  return dataclasses.replace(
    made, params=jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes)
  )


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  """`full`: all formats, any batch; `baked`: functions alone, two pixel images at a time; `weights`: half as large."""
  folder = tmp_path_factory.mktemp("formats")
  row = bench.Row(8, 1.0, 2.0, 3.0, 4.0, 1.5, 1.25, 1.75, 2.0, True, 5, 0.1, 0.2, "float32", "abacus", "0")
  export.save(model, folder / "full", export.FORMATS, images=IMAGES, accuracy=0.75, latency=[dataclasses.asdict(row)])
  export.save(model, folder / "baked", ("stablehlo", "onnx"), batch_size=2, preprocess=True)
  export.save(model, folder / "weights", ("safetensors",), dtype="bfloat16")
  return folder


@pytest.fixture(scope="module")
def logits(model):
  return np.asarray(model(IMAGES).logits)


@pytest.fixture(scope="module")
def picture(folder):
  Image.fromarray(PIXELS[0, ..., 0]).save(folder / "picture.png")
  return folder / "picture.png"


def test_the_cards_tell_the_largest_difference_of_each_format(folder):
  card = export.read_card(folder / "full")
  assert card["verified"]["images"] == 5 and card["verified"]["formats"].keys() == set(export.FORMATS)
  for name, found in card["verified"]["formats"].items():
    assert found["difference"] < 1e-5 and found["agreement"] == 1.0, name
  text = (folder / "full" / "README.md").read_text()
  counts = " ".join(map(str, card["counts"]))
  for part in ("mu/2", "75.00%", "operator set 18", "cut (topk)", counts, "ant, bee, cat, dog", "| 8 | 3.00 |"):
    assert part in text, part
  assert f"{card['verified']['formats']['onnx']['difference']:.1e}" in text
  names = {path.name for path in (folder / "full").iterdir()}
  assert names == {
    "README.md",
    "tokred.json",
    "manifest.json",
    "params",
    *(f"model.{name}" for name in export.FORMATS[1:]),
  }
  assert {name.split("/")[0] for name in json.loads((folder / "full" / "manifest.json").read_text())["files"]} == (
    names - {"manifest.json"}
  )


def test_any_format_is_loaded_by_name(folder, logits):
  for name in export.FORMATS:
    loaded = export.load(folder / "full", name)
    assert isinstance(loaded, tokred.Model if name in ("orbax", "safetensors") else export.Exported)
    assert np.abs(np.asarray(loaded(IMAGES).logits) - logits).max() < 1e-5
  assert isinstance(tokred.load(folder / "full"), tokred.Model)


def test_what_a_card_tells_of_accuracy_and_speed_is_of_the_dtype_that_ships(model, tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(publish, "examples", lambda model, number: (IMAGES, None))
  monkeypatch.setattr(publish, "evaluate", lambda model: seen.append(model) or {"accuracy": 1.0})
  monkeypatch.setattr(publish.bench, "compare", lambda model, dense, *_, **__: seen.extend((model, dense)) or [])
  monkeypatch.setattr(publish.export, "save", lambda *_, **__: None)
  monkeypatch.setattr(publish.export, "read_card", lambda _: {"verified": {"formats": {}}})
  publish.classifier(model, model.with_sites({}), str(tmp_path), ("orbax",), (1,), dtype="bfloat16")
  assert [each.config.model.dtype for each in seen] == ["bfloat16"] * 3
  rounded = lambda leaf: np.array_equal(leaf, jnp.asarray(leaf, jnp.bfloat16))
  assert all(rounded(leaf) for each in seen for leaf in jax.tree.leaves(each.params))


def test_weights_alone_are_a_model(folder, logits):
  """bfloat16 has 8 bits: the logits are near."""
  loaded = tokred.load(folder / "weights")
  assert loaded.config.model.dtype == "bfloat16" and loaded.config.data.labels == LABELS
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))
  assert np.abs(np.asarray(loaded(IMAGES).logits) - logits).max() < 0.2
  sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("weights", "full")]
  assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize("name", ["stablehlo", "onnx"])
def test_a_function_alone_takes_images_as_a_model_does(folder, logits, name):
  """Five images in batches of two, normalised or not."""
  loaded = export.load(folder / "baked", name)
  for images in (IMAGES, PIXELS):
    scores = loaded(images)
    assert np.abs(np.asarray(scores.probabilities) - jax.nn.softmax(logits)).max() < 1e-6
    assert (np.asarray(scores.logits).argmax(-1) == logits.argmax(-1)).all()
  assert loaded.counts == tokred.load(folder / "full").counts and loaded.flops == tokred.load(folder / "full").flops
  assert "any" not in repr(loaded) and "batch size: 2" in repr(loaded)
  with pytest.raises(ValueError, match=r"images of shape \(2, 9, 8, 1\); the model takes \(batch, 8, 8, 1\)"):
    loaded(np.zeros((2, 9, 8, 1), np.uint8))
  with pytest.raises(ValueError, match="images of dtype int32; valid: float32"):
    loaded(PIXELS.astype(np.int32))


def test_a_function_takes_pixels_where_it_wants_floats(folder, logits):
  assert np.abs(np.asarray(export.load(folder / "full", "onnx")(PIXELS).logits) - logits).max() < 1e-5


def test_a_function_alone_is_no_model(folder, tmp_path):
  loaded = tokred.load(folder / "baked")
  assert isinstance(loaded, export.Exported) and loaded.format == "stablehlo"
  for call in (tokred.freeze, tokred.evaluate.evaluate, lambda it: export.save(it, tmp_path / "out")):
    with pytest.raises(ValueError, match=r"Exported\(.*export orbax or safetensors too"):
      call(loaded)
  with pytest.raises(ValueError, match="baked is a function without parameters: it takes no other sites"):
    tokred.load(folder / "baked", sites={})
  with pytest.raises(ExportError, match="baked holds no 'orbax'; it holds: stablehlo, onnx"):
    export.load(folder / "baked", "orbax")
  with pytest.raises(ExportError, match="baked holds no parameters; it holds: stablehlo, onnx"):
    export.read_params(folder / "baked")


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "README.md"])
def test_a_flipped_byte_is_told(folder, tmp_path, name):
  shutil.copytree(folder / "full", tmp_path / "full")
  content = bytearray((tmp_path / "full" / name).read_bytes())
  content[len(content) // 2] ^= 1
  (tmp_path / "full" / name).write_bytes(content)
  for read in (tokred.load, export.load_onnx, export.load_stablehlo):
    with pytest.raises(ExportError, match=rf"full is damaged: {name} has another content") as caught:
      read(tmp_path / "full")
    assert "\n" not in str(caught.value)


def test_an_export_that_does_not_run_is_not_left_behind(model, tmp_path, monkeypatch):
  monkeypatch.setattr(export, "_describe", lambda directory, card: (directory / "tokred.json").write_text("{"))
  with pytest.raises(ExportError, match=r"out does not run in a fresh process: .*damaged"):
    export.save(model, tmp_path / "out", ("safetensors",), images=IMAGES)
  assert not os.listdir(tmp_path)


def test_values_that_are_not_finite_are_refused(model, tmp_path):
  broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), model.params)
  with pytest.raises(ExportError, match="out: safetensors gives values that are not finite"):
    export.save(dataclasses.replace(model, params=broken), tmp_path / "out", ("safetensors",), images=IMAGES)
  assert not os.listdir(tmp_path)


def test_without_the_extra_onnx_is_refused(model, folder, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "onnxruntime", None)
  with pytest.raises(ExportError, match=r"needs onnxruntime: pip install 'tokred\[onnx\]'"):
    export.save(model, tmp_path / "out", ("onnx",))
  with pytest.raises(ExportError, match=r"needs onnxruntime: pip install 'tokred\[onnx\]'"):
    export.load(folder / "baked", "onnx")


def answers(printed):
  """{file: [(name, share)]} of what `predict` printed."""
  out, file = {}, ""
  for line in printed.splitlines():
    if line.startswith("  "):
      share, name = line.split()
      out[file].append((name, float(share.rstrip("%")) / 100))
    elif not line.startswith("picture: "):
      file = line
      out[file] = []
  return out


@pytest.mark.parametrize("name", ["full", "baked"])
def test_predict_prints_the_likeliest_classes(folder, picture, logits, capsys, name):
  predict.main([f"--model={folder / name}", str(picture)])
  ((file, found),) = answers(capsys.readouterr().out).items()
  share = np.asarray(jax.nn.softmax(logits[0]))
  assert file == str(picture) and [name for name, _ in found] == [LABELS[i] for i in np.argsort(-share)]
  np.testing.assert_allclose([share for _, share in found], np.sort(share)[::-1], atol=1e-4)


def test_predict_shows_what_survives(folder, picture, capsys):
  predict.main([f"--model={folder / 'full'}", str(picture), "--show"])
  assert Image.open(folder / "picture_tokens.png").size[0] > 100
  predict.main([f"--model={folder / 'full'}", str(picture), f"--show={folder / 'other.png'}"])
  assert (folder / "other.png").exists() and f"picture: {folder / 'other.png'}" in capsys.readouterr().out


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("--model=FOLDER/full", "FOLDER/none.png"), r"image '.*none\.png': no such file"),
    (("--model=FOLDER/full", "FOLDER/full/tokred.json"), r"image '.*tokred\.json' cannot be read: no image"),
    (("--model=FOLDER/full", "FOLDER/cut.png"), r"image '.*cut\.png' cannot be read"),
    (("--model=FOLDER/none", "FOLDER/picture.png"), r".*none is no run directory, export"),
    (("--model=FOLDER/baked", "FOLDER/picture.png", "--show"), r".*baked is a function without parameters"),
    (("--model=FOLDER/full", "FOLDER/picture.png", "--show=a.jpg"), r"--show='a\.jpg' must end in \.png"),
  ],
)
def test_predict_fails_in_one_line(folder, picture, arguments, message):
  (folder / "cut.png").write_bytes(picture.read_bytes()[:-40])
  with pytest.raises(SystemExit, match=f"tokred.predict: {message}") as caught:
    predict.main([argument.replace("FOLDER", str(folder)) for argument in arguments])
  assert "\n" not in str(caught.value)


def test_without_a_head_there_are_no_classes(tmp_path):
  headless = tokred.build(dict(model=MODEL | dict(num_classes=0))).init()
  with pytest.raises(ValueError, match=r"config\.model\.num_classes=0: the model has no head"):
    predict.predict(headless, PIXELS)
  with pytest.raises(ValueError, match=r"preprocess=True gives probabilities, but config\.model\.num_classes=0"):
    export.save(headless, tmp_path / "out", preprocess=True)


def test_files_are_read_and_arguments_of_another_kind_told(picture):
  model = tokred.build(dict(model=MODEL)).init()
  (wanted,) = predict.predict(model, predict.read_image(picture, model.config)[None], top=2)
  assert len(wanted) == 2 and predict.predict(model, [picture, str(picture)], top=2) == [wanted, wanted]
  for message, (images, top) in {
    r"images are a str; valid: an array, or a list of files": (str(picture), 1),
    r"images are a list; valid: an array": ([PIXELS], 1),
    r"images are an empty list; valid: one file": ([], 1),
    r"top=-1; valid: 1 or more": (PIXELS, -1),
    r"top=1.5; valid: 1 or more": (PIXELS, 1.5),
  }.items():
    with pytest.raises(ValueError, match=message):
      predict.predict(model, images, top)


@pytest.mark.parametrize(
  "data, labels",
  [
    (dict(labels=("a", "b")), ("a", "b")),
    (dict(name="digits"), tuple("0123456789")),
    (dict(name="image_folder", data_dir="/nowhere"), ()),
    (dict(name="no_such_set"), ()),
  ],
)
def test_label_names(data, labels):
  assert tokred.data.label_names(tokred.config.complete(dict(data=data)).data) == labels


def test_a_known_data_set_is_not_fetched_for_its_names():
  names = tokred.data.label_names(tokred.config.complete(dict(data=dict(name="fashion_mnist"))).data)
  assert names[:3] == ("T-shirt/top", "Trouser", "Pullover")


@pytest.mark.parametrize(
  "name, crop_fraction, shape, dtype",
  [("full", 1.0, (13, 20, 3), np.uint8), ("full", 0.0, (13, 20, 3), np.uint8), ("baked", 1.0, (8, 8), np.uint16)],
)
def test_the_onnx_example_runs_without_jax(folder, tmp_path, name, crop_fraction, shape, dtype):
  """On a photograph of another size and shape, which it has to fit as tokred does; on two pixel images of 16 bits."""
  photo = tmp_path / "photo.png"
  card = json.loads((folder / name / "tokred.json").read_text())
  card["config"]["data"]["crop_fraction"] = crop_fraction
  (tmp_path / "tokred.json").write_text(json.dumps(card))
  shutil.copy(folder / name / "model.onnx", tmp_path)
  Image.fromarray(np.random.default_rng(1).integers(0, np.iinfo(dtype).max, shape, dtype)).save(photo)
  block = "import sys; sys.modules.update(jax=None, flax=None, tokred=None); import runpy; sys.argv = sys.argv[1:]; "
  block += "runpy.run_path(sys.argv[0], run_name='__main__')"
  arguments = (ROOT / "examples" / "onnx_runtime.py", tmp_path, photo)
  done = subprocess.run([sys.executable, "-c", block, *map(str, arguments)], capture_output=True, text=True, cwd=folder)
  assert done.returncode == 0, done.stderr
  found = [(name, float(share.rstrip("%")) / 100) for share, name in map(str.split, done.stdout.splitlines())]
  loaded = tokred.load(folder / name)
  with loaded.config.unlocked():
    loaded.config.data.crop_fraction = crop_fraction
  (wanted,) = predict.predict(loaded, predict.read_image(photo, loaded.config)[None])
  assert [name for name, _ in found] == [name for name, _ in wanted]
  np.testing.assert_allclose([share for _, share in found], [share for _, share in wanted], atol=1e-4)


@pytest.fixture
def server(folder):
  with contextlib.closing(socket.socket()) as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, str(ROOT / "examples" / "serve_http.py"), str(folder / "full"), str(port)]
  process = subprocess.Popen(command, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
  try:
    for _ in range(600):
      with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        break
      assert process.poll() is None, process.stderr.read()
      time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
  finally:
    process.kill()
    process.communicate()


def test_the_http_example_serves(server, picture, logits):
  with urllib.request.urlopen(server, data=picture.read_bytes(), timeout=60) as answer:
    found = json.loads(answer.read())
  assert found[0][0] == LABELS[logits[0].argmax()]
  assert found[0][1] == pytest.approx(float(jax.nn.softmax(logits[0]).max()), abs=1e-4)
  with pytest.raises(urllib.error.HTTPError, match="400") as caught:
    urllib.request.urlopen(server, data=b"no image", timeout=60)
  assert "cannot be read" in json.loads(caught.value.read())["error"]
