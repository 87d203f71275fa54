"""Writing back: what was read is written; reduced models; what has no place in transformers; nothing half-written."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import theirs
from safetensors.numpy import load_file

import tokred
from tokred.pretrained import save_huggingface, write

CASES = {
  "vit": (theirs.MICRO | theirs.MLP, 3),
  "deit": (theirs.MICRO | theirs.MLP, 3),
  "deit_teacher": (theirs.MICRO | theirs.MLP, 3),
  "dinov2": (dict(theirs.MICRO, mlp_ratio=4, use_swiglu_ffn=True, num_register_tokens=2), 3),
  "dinov3": (dict(theirs.MICRO, **theirs.MLP, num_register_tokens=1, use_gated_mlp=True, hidden_act="silu"), 0),
  "clip": (theirs.MICRO | theirs.MLP, 0),
  "siglip": (theirs.MICRO | theirs.MLP, 0),
}
PREPROCESSOR = dict(
  image_mean=[0.1, 0.2, 0.3], image_std=[0.5] * 3, resample=3, do_center_crop=True, crop_size=dict(height=12, width=12),
  size=dict(shortest_edge=16),
)  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_there_and_back(kind, tmp_path):
  fields, head = CASES[kind]
  theirs.write(tmp_path / "in", kind, fields, head, PREPROCESSOR)
  model = tokred.load(tmp_path / "in")
  save_huggingface(model, tmp_path / "out")
  before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
  odd = {name for name in before.keys() ^ after.keys() if not name.endswith(("mask_token", "k_proj.bias"))}
  assert not odd
  same = [
    n for n in before.keys() & after.keys() if "mask_token" not in n and "distill" not in n and "position" not in n
  ]
  assert all(np.array_equal(before[name], after[name]) for name in same) and len(same) > 20
  again = tokred.load(tmp_path / "out")
  assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))
  assert again.config == model.config and not list(tmp_path.glob(".*"))
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["model_type"] == theirs.config(kind, fields)["model_type"]
  assert ("id2label" in config) == bool(head)


def test_a_frozen_model_comes_back_with_its_sites(tmp_path):
  theirs.write(tmp_path / "in", "vit", theirs.MICRO | theirs.MLP, 3)
  sites = dict(rates=dict(reducer=("topk", "diffrate_merge"), layers=(0, 1), rate="learned"),
               pick=dict(reducer="gumbel", layers=(1,), keep=0.6))  # fmt: skip
  model = tokred.load(tmp_path / "in", sites=sites)
  frozen = save_huggingface(model, tmp_path / "out")
  assert frozen.mode == "gather" and model.mode == "mask"
  dense, reducers = (load_file(tmp_path / "out" / name) for name in ("model.safetensors", write.REDUCERS))
  assert dense.keys() == load_file(tmp_path / "in" / "model.safetensors").keys()
  assert all("/reduce/pick" in name for name in reducers)
  again = tokred.load(tmp_path / "out")
  assert again.counts == frozen.counts and again.config == frozen.config
  assert jax.tree.all(jax.tree.map(np.array_equal, again.params, frozen.params))
  assert tokred.load(tmp_path / "out", sites={}).counts == (10, 10)
  card = json.loads((tmp_path / "out" / write.CONFIG).read_text())
  (tmp_path / "out" / write.CONFIG).write_text(json.dumps(card | {"version": 99}))
  with pytest.raises(ValueError, match=r"tokred_config.json is of version 99, and this tokred reads up to 1"):
    tokred.load(tmp_path / "out")
  (tmp_path / "out" / write.CONFIG).write_text("{}")
  with pytest.raises(ValueError, match=r"tokred_config.json is damaged"):
    tokred.load(tmp_path / "out")


BASE = dict(variant="mu/4", image_size=(12, 12), num_classes=3)


def test_fixed_positions_are_written_as_a_table(tmp_path):
  model = tokred.build(dict(model=BASE | dict(position="sincos2d"))).init()
  head = jax.random.normal(jax.random.key(0), (32, 3))  # drawn, for a new head is zero
  model = dataclasses.replace(model, params=model.params | {"head": model.params["head"] | {"kernel": head}})
  save_huggingface(model, tmp_path)
  again, images = tokred.load(tmp_path), jax.random.normal(jax.random.key(1), (2, 12, 12, 3))
  assert again.config.model.position == "learned"
  np.testing.assert_array_equal(again(images).logits, model(images).logits)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(qk_norm=True), r"config.model.qk_norm=True has no place in transformers' vit; valid there: False"),
    (dict(position="rope2d"), r"config.model.num_classes=3 has no place in transformers' dinov3_vit; valid there: 0"),
    (dict(final_norm="pooled", pool="avg", class_token=True), r"config.model.pool='avg' has no place in .* vit"),
    (dict(pre_norm=True, patch_bias=False), r"config.model.num_classes=3 has no place in .* clip_vision_model"),
    (dict(pool="map"), r"config.model.pool='map' with num_classes=3 has no place in .* siglip_vision_model.*'avg'"),
    (dict(layer_scale=1.0), r"config.model.pool='cls' with num_classes=3 has no place in .* dinov2; .*'cls_avg'"),
    (dict(layer_scale=1.0, pool="cls_avg", mlp_dim=100), r"config.model.mlp_dim=100 .* a multiple of width=32"),
    (dict(num_registers=2), r"config.model.num_registers=2 has no place in transformers' vit"),
    (dict(pool="avg", image_size=(12, 8)), r"config.model.image_size=\(12, 8\): transformers' siglip_.* squares only"),
  ],
)
def test_what_has_no_place(fields, message, tmp_path):
  model = tokred.build({"model": BASE | fields})
  with pytest.raises(ValueError, match=message):
    write.describe(model)


def test_a_model_that_reads_is_not_written(tmp_path):
  model = tokred.build({"model": BASE | dict(name="vlm", num_classes=0), "llm": dict(vocab=16, width=16, depth=1)})
  with pytest.raises(ValueError, match=r"config.model.name='vlm' is not written for transformers; valid: 'vit'"):
    save_huggingface(model, tmp_path)


def test_nothing_is_overwritten_or_half_written(tmp_path, monkeypatch):
  model = tokred.build({"model": BASE})
  with pytest.raises(ValueError, match="has no parameters"):
    save_huggingface(model, tmp_path / "out")
  model = model.init()
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.txt").write_text("mine")
  with pytest.raises(ValueError, match="full exists and is not empty"):
    save_huggingface(model, tmp_path / "full")

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(write, "save_file", full)
  with pytest.raises(OSError, match="No space left"):
    save_huggingface(model, tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == ["full"]
