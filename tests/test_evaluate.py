"""tokred.evaluate: accuracy as numpy counts it, whatever the padding, the mode and the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import tokred
from tokred import sharding
from tokred.data import eval_batches
from tokred.evaluate import evaluate, run

SPLIT = "test[:37]"  # batches of 16, 16 and 5
CONFIG = dict(
  model=dict(variant="mu/2", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(8, 8), channels=1, num_classes=10),
  sites=dict(prune=dict(reducer="topk", layers=(0,), keep=0.5)),
  data=dict(mean=(0.5,), std=(0.5,), eval_split=SPLIT),
  eval=dict(batch_size=16),
)


@pytest.fixture(scope="module")
def model():
  model = tokred.build(CONFIG)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: model.init().params)
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), jnp.float32), shapes)
  return dataclasses.replace(model, params=params)


def batches(size=16, split=SPLIT):
  data = tokred.build(CONFIG).config.data
  return eval_batches(data, split, image_size=(8, 8), channels=1, num_classes=10, batch_size=size)


def test_logits_that_are_no_numbers_are_no_answers(model):
  broken = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * jnp.nan, model.params))
  result = evaluate(broken)
  assert result["accuracy"] == result["accuracy_top5"] == 0.0 and np.isnan(result["loss"])


def test_accuracy_and_loss_as_numpy_counts_them(model):
  right, losses = [], []
  for batch in batches():
    logits = np.asarray(model(batch["image"]).logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    real = batch["mask"]
    right += list((logits.argmax(1) == batch["label"])[real])
    losses += list(-log_p[np.arange(len(real)), batch["label"]][real])
  result = evaluate(model)
  assert result["examples"] == len(right) == 37
  assert result["accuracy"] == np.mean(right) and 0 < result["accuracy"] < 1
  assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
  assert result["counts"] == [9, 9] and result["gflops"] == model.flops / 1e9 and result["gmacs"] == model.macs / 1e9


def test_padding_counts_for_nothing(model):
  full = {
    "image": np.zeros((4, 8, 8, 1), np.float32),
    "label": np.array([0, 1, 2, 3], np.int32),
    "mask": np.ones(4, bool),
  }
  padded = full | {"image": full["image"].copy(), "mask": np.array([True, True, False, False])}
  padded["image"][2:] = np.nan
  label = int(np.argmax(model(full["image"]).logits[0]))
  padded["label"] = np.array([label, (label + 1) % 10, label, label], np.int32)
  result = run(model.module, model.params, [padded], "gather")
  assert result["accuracy"] == 0.5 and result["examples"] == 2 and np.isfinite(result["loss"])


def test_mask_equals_gather(model):
  gather, mask = (run(model.module, model.params, batches(), mode) for mode in ("gather", "mask"))
  assert gather["accuracy"] == mask["accuracy"] and gather["counts"] == mask["counts"]
  assert gather["loss"] == pytest.approx(mask["loss"], rel=1e-5)


def test_eight_devices_equal_one(model):
  assert jax.device_count() == 8
  mesh = sharding.make_mesh(ConfigDict(dict(data=4, fsdp=2, tensor=1, rules=())))
  one, eight = (run(model.module, model.params, batches(), "gather", m) for m in (None, mesh))
  assert one["accuracy"] == eight["accuracy"] and one["examples"] == eight["examples"]
  assert one["loss"] == pytest.approx(eight["loss"], rel=1e-5)


@pytest.mark.parametrize("mode", ["gather", "mask"])
def test_counts_are_of_the_images_alone(model, mode):
  """Padding images are flat: none of their tokens stands out, so that they keep others than the images do."""
  sites = dict(
    cut=dict(reducer="topk", layers=(1,), place="before", score="token_norm", rate="threshold", threshold=4.5, keep=1.0)
  )
  ragged = model.with_sites(sites)
  mesh = sharding.make_mesh(ConfigDict(dict(data=4, fsdp=2, tensor=1, rules=())))
  one, many, eight = (
    run(ragged.module, ragged.params, batches(size), mode, m) for size, m in ((37, None), (16, None), (24, mesh))
  )
  alive = np.asarray(ragged.inspect(next(iter(batches(37)))["image"]).tokens.alive.sum(1))
  assert one["sites"] == {"cut/1": round(float(alive.mean()), 2)} and 2 < alive.mean() < 16
  assert one["sites"] == many["sites"] == eight["sites"] and one["counts"] == many["counts"] == eight["counts"]


@pytest.mark.parametrize("mode", ["gather", "mask"])
def test_what_images_cost_by_their_own_tokens(model, mode):
  """By hand: a block costs 4 N 16^2 + 2 N^2 16 for attention and 2 N 16 32 for the MLP; 16 patches of 4 pixels."""
  cut = dict(reducer="topk", layers=(0,), place="attn", score="token_norm", rate="threshold", threshold=4.5, keep=1.0)
  ragged = model.with_sites(dict(cut=cut))
  images = np.concatenate([batch["image"][batch["mask"]] for batch in batches()])
  n = np.asarray(ragged.inspect(images).tokens.alive.sum(1), np.float64)
  assert len(set(n.tolist())) > 2
  block = lambda attention, mlp: 4 * attention * 256 + 2 * attention**2 * 16 + 2 * mlp * 16 * 32
  by_hand = 16 * 4 * 16 + 16 * 10 + block(17, n) + block(n, n)
  result = run(ragged.module, ragged.params, batches(), mode)
  gmacs, gflops = result["mean_gmacs"], result["mean_gflops"]
  assert gmacs == pytest.approx(by_hand.mean() / 1e9, rel=1e-6) and gmacs < ragged.macs / 1e9
  assert 2 * gmacs < gflops < ragged.flops / 1e9
  assert "mean_gmacs" not in run(model.module, model.params, batches(), mode)


def test_counts_of_images_that_share_a_row():
  """Two images and two of padding: where room is for all, each one's count is of those that want to go in."""
  sites = dict(go=dict(reducer="spa", layers=(0,), keep=1.0, group=4))
  model = tokred.build(CONFIG | dict(sites=sites)).init()
  gate = model.params["block_0"]["reduce"]["go"]["spa"]["gate"]
  gate["kernel"] = jax.random.normal(jax.random.key(1), gate["kernel"].shape)
  image = next(iter(batches(37)))["image"][:4] * np.array([1, 1, 0, 0], np.float32)[:, None, None, None]
  batch = dict(image=image, label=np.zeros(4, np.int32), mask=np.array([True, True, False, False]))
  wants = np.asarray(model.inspect(image).aux["reduce/go/score"][0][:, 1:] > 0).sum(1) + 1  # and CLS
  assert wants[:2].mean() != wants.mean()
  for mode in ("gather", "mask"):
    assert run(model.module, model.params, [batch], mode)["sites"] == {"go/0": wants[:2].mean()}


def test_arguments_replace_the_configs(model):
  assert evaluate(model, "test[:20]", batch_size=16)["examples"] == 20


def test_nothing_to_evaluate(model):
  with pytest.raises(ValueError, match="no examples to evaluate"):
    run(model.module, model.params, [], "gather")
  with pytest.raises(ValueError, match=r"test\[:0\].*no examples"):
    evaluate(model, "test[:0]")
  for size in (0, -3):
    with pytest.raises(ValueError, match=f"batch_size={size}; valid: 1 or more"):
      evaluate(model, batch_size=size)
