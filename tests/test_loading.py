"""tokred.loading: models from runs, exports and files of weights; with other sites; errors that list both sides."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import tokred
from tokred import loading
from tokred.train.loop import train

MODEL = dict(
  variant="mu/2", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(8, 8), channels=1, num_classes=10
)  # 16 patches and CLS
CONFIG = dict(
  model=MODEL,
  sites=dict(rates=dict(reducer=("topk", "diffrate_merge"), layers=(0, 1), rate="learned")),
  data=dict(mean=(0.5,), std=(0.5,), train_split="train[:64]", eval_split="test[:16]"),
  train=dict(steps=2, batch_size=16, log_every=1, checkpoint_every=2),
  optim=dict(warmup_steps=1, ema=0.5),
  loss=dict(budget=1.0),
  eval=dict(batch_size=16),
)
GUMBEL = dict(cut=dict(reducer="gumbel", layers=(1,), keep=0.5))
IMAGES = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def run(one_device, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "digits"
  train(CONFIG, workdir)
  return workdir


@pytest.fixture(scope="module")
def learned(run):
  return tokred.load(run)


def timm_state(seed=0):
  """A dense ViT of MODEL's sizes in timm's names and layouts."""
  rng = np.random.default_rng(seed)
  shapes = {"cls_token": (1, 1, 16), "pos_embed": (1, 17, 16), "patch_embed.proj.weight": (16, 1, 2, 2)}
  shapes |= {"patch_embed.proj.bias": (16,), "norm.weight": (16,), "norm.bias": (16,)}
  shapes |= {"head.weight": (10, 16), "head.bias": (10,)}
  linear = {"attn.qkv": (48, 16), "attn.proj": (16, 16), "mlp.fc1": (32, 16), "mlp.fc2": (16, 32)}
  for layer in range(2):
    for name, shape in linear.items():
      shapes |= {f"blocks.{layer}.{name}.weight": shape, f"blocks.{layer}.{name}.bias": shape[:1]}
    for name in ("norm1", "norm2"):
      shapes |= {f"blocks.{layer}.{name}.weight": (16,), f"blocks.{layer}.{name}.bias": (16,)}
  return {name: rng.normal(0.0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_a_run_directory_gives_the_average_of_its_last_checkpoint(run, learned):
  config = json.loads((run / "config.json").read_text())
  assert learned.config.to_dict() == tokred.build(config).config.to_dict()
  wanted = tokred.checkpoint.restore_params(run, "ema")
  assert same(learned.params, wanted) and not same(wanted, tokred.checkpoint.restore_params(run, "params"))
  assert learned.mode == "mask" and learned(IMAGES).logits.shape == (3, 10)


def test_no_sites_is_the_dense_model(run, learned):
  dense = tokred.load(run, sites={})
  assert dense.counts == (17, 17) and not dense.config.sites
  assert not any(
    "reduce" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(dense.params)
  )
  np.testing.assert_array_equal(dense.params["pos_embed"], learned.params["pos_embed"])


def test_new_reducers_are_drawn_anew(run, learned):
  model = tokred.load(run, sites=GUMBEL)
  fresh = tokred.build(model.config).init()
  assert same(model.params["block_1"]["reduce"], fresh.params["block_1"]["reduce"])
  np.testing.assert_array_equal(model.params["pos_embed"], learned.params["pos_embed"])
  assert model.counts == (17, 9)


def test_reducers_that_were_trained_stay(run, learned):
  rates = CONFIG["sites"]["rates"]
  params = tokred.load(run, sites=dict(rates=rates, cut=dict(reducer="gumbel", place="output", keep=0.2))).params
  name = "rates_0_topk"
  assert same(params["block_0"]["reduce"][name], learned.params["block_0"]["reduce"][name])
  assert "cut" in params["reduce"]


def test_an_export(learned, tmp_path):
  frozen = tokred.export.save(learned, tmp_path / "exported", ("orbax",))
  model = tokred.load(tmp_path / "exported")
  assert model.mode == "gather" and model.counts == frozen.counts == learned.counts
  assert same(model.params, frozen.params) and model.config == frozen.config
  assert tokred.load(tmp_path / "exported", sites={}).counts == (17, 17)


def test_a_file_of_weights(tmp_path):
  state = timm_state()
  save_file(state, tmp_path / "vit.safetensors")
  model = tokred.load(tmp_path / "vit.safetensors", model=MODEL)
  np.testing.assert_array_equal(model.params["head"]["kernel"], state["head.weight"].T)
  reduced = tokred.load(tmp_path / "vit.safetensors", model=MODEL, sites=GUMBEL)
  np.testing.assert_array_equal(reduced.params["head"]["kernel"], state["head.weight"].T)
  assert same(reduced.params["block_1"]["reduce"], tokred.build(reduced.config).init().params["block_1"]["reduce"])
  dense = dataclasses.replace(model, params=reduced.params)  # parameters under reduce/ mean nothing to it
  assert reduced.counts == (17, 9) and dense.counts == (17, 17)


def test_weights_that_do_not_fit_list_both_sides(tmp_path):
  state = timm_state()
  state["last_norm.weight"] = state.pop("norm.weight")
  save_file(state, tmp_path / "vit.safetensors")
  with pytest.raises(ValueError, match=r"vit\.safetensors.*config\.model: missing: norm/scale; left over: last_norm"):
    tokred.load(tmp_path / "vit.safetensors", model=MODEL)


def test_a_run_that_does_not_fit_lists_both_sides(run):
  with pytest.raises(ValueError) as caught:
    tokred.load(run, model=dict(num_classes=7, depth=1, num_registers=2), sites={})
  message = str(caught.value)
  assert "\n" not in message and "does not fit config.model" in message
  assert "missing: registers" in message and "left over: block_1/attn/proj/bias" in message
  assert "head/kernel (16, 10) for (16, 7)" in message


@pytest.mark.parametrize("field, ours", [("activation", "relu"), ("norm_eps", 1e-3), ("position", "rope2d")])
def test_a_run_that_computes_otherwise_is_no_start(run, learned, field, ours):
  """What no array shows: the arrays fit, and the network would be another."""
  model = learned.config.model.copy_and_resolve_references()
  model[field] = ours
  with pytest.raises(ValueError, match=rf"config.model.{field}=.*, but .*digits has .*; set config.model.{field}="):
    loading.read(run, learned.params, model)
  loading.read(run, learned.params, learned.config.model)


def test_fields_that_are_no_dict(run):
  for sites in ([1], "topk"):
    with pytest.raises(ValueError, match=r"config.sites=.* must be a dict of fields; valid: a dict of fields for each"):
      tokred.load(run, sites=sites)
  with pytest.raises(ValueError, match=r"model='S/16' must be a dict of fields of config.model"):
    tokred.load(run, model="S/16")


def test_paths_that_are_nothing(run, tmp_path):
  for path in (tmp_path / "absent", tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run directory, export or file of weights"):
      tokred.load(path)
  (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
  (tmp_path / "unfinished" / "config.json").write_text((run / "config.json").read_text())
  with pytest.raises(FileNotFoundError, match="no checkpoint in"):
    tokred.load(tmp_path / "unfinished")
  with pytest.raises(ValueError, match=r"sites\.cut\.reducer='gumbl'.*did you mean 'gumbel'"):
    tokred.load(run, sites=dict(cut=dict(reducer="gumbl", layers=(1,), keep=0.5)))
