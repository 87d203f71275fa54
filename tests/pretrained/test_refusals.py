"""One clear line for everything that can be wrong with a directory of weights."""

import json

import ml_dtypes
import numpy as np
import pytest
import theirs
from safetensors.numpy import save_file

import tokred
from tokred import loading
from tokred.pretrained import open_source

FIELDS = theirs.MICRO | theirs.MLP


@pytest.fixture
def vit(tmp_path):
  directory = tmp_path / "vit"
  theirs.write(directory, "vit", FIELDS, 3)
  return directory


def refused(path, kind=ValueError, **kwargs):
  with pytest.raises(kind) as error:
    tokred.load(path, **kwargs)
  assert "\n" not in str(error.value)
  return str(error.value)


def change(directory, **fields):
  config = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(config | fields))


def test_no_config(vit):
  (vit / "config.json").unlink()
  assert "it has no config.json" in refused(vit, FileNotFoundError)
  (vit / "config.json").write_text("{")
  assert "config.json is damaged" in refused(vit)
  (vit / "config.json").write_text("{}")
  assert "neither transformers' model_type nor timm's architecture" in refused(vit)


@pytest.mark.parametrize("model", [None, dict(num_classes=3)])
def test_half_a_head(tmp_path, model):
  """It loaded without a head, as if it had none."""
  cut = lambda state: {name: array for name, array in state.items() if name != "classifier.weight"}
  theirs.write(tmp_path, "vit", FIELDS, 3, change=cut)
  assert "has the bias of a classifier (head/bias) but not its weight; fetch it again" in refused(tmp_path, model=model)


def test_shards(vit):
  names = theirs.shard(vit)
  tokred.load(vit)
  whole = (vit / names[1]).read_bytes()
  (vit / names[1]).write_bytes(whole[:-100])
  assert f"{names[1]}' are damaged, truncated or not safetensors" in refused(vit)
  save_file({"other": np.zeros(2, np.float32)}, vit / names[1])
  assert f"{names[1]} lacks" in refused(vit) and "of its index" in refused(vit)
  (vit / names[1]).unlink()
  assert f"index.json names '{names[1]}', which is not there" in refused(vit, FileNotFoundError)
  index = json.loads((vit / "model.safetensors.index.json").read_text())
  index["weight_map"] = {name: "../elsewhere.safetensors" for name in index["weight_map"]}
  (vit / "model.safetensors.index.json").write_text(json.dumps(index))
  assert "names '../elsewhere.safetensors'" in refused(vit, FileNotFoundError)
  (vit / "model.safetensors.index.json").write_text("[]")
  assert "index.json is damaged" in refused(vit)
  theirs.write(vit, "vit", FIELDS, 3)  # saved again in one file, the index of the old shards beside it
  tokred.load(vit)


@pytest.mark.parametrize(
  "dtype, name", [(np.int8, "int8"), (ml_dtypes.float8_e4m3fn, "float8_e4m3"), (np.uint8, "uint8")]
)
def test_quantised(dtype, name, tmp_path):
  theirs.write(tmp_path, "vit", FIELDS, 3, change=lambda s: s | {"classifier.bias": s["classifier.bias"].astype(dtype)})
  message = refused(tmp_path)
  assert f"classifier.bias is {name}; valid: float64, float32, float16, bfloat16 (not quantised)" in message


def test_names_on_either_side(tmp_path):
  def strange(state):
    state["vit.encoder.layer.0.odd.weight"] = state.pop("vit.layernorm.weight")
    return state

  theirs.write(tmp_path, "vit", FIELDS, 3, change=strange)
  message = refused(tmp_path)
  assert "missing: norm/scale; left over: encoder.layer.0.odd.weight" in message


def test_a_part_that_is_missing(tmp_path):
  def without_key(state):
    del state["vit.encoder.layer.1.attention.attention.key.weight"]
    return state

  theirs.write(tmp_path, "vit", FIELDS, 3, change=without_key)
  message = refused(tmp_path)
  assert (
    "missing: block_1/attn/qkv/kernel; left over: block_1/attn/qkv/kernel[0/3], block_1/attn/qkv/kernel[2/3]" in message
  )


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(model_type="beit"), "model_type='beit' is not an architecture that tokred knows: its attention adds a bias"),
    (dict(model_type="dinov4"), "model_type='dinov4' is not an architecture that tokred knows; did you mean 'dinov2'?"),
    (dict(model_type="swin"), "model_type='swin' is not an architecture"),
    (dict(hidden_act="quick_gelus"), "hidden_act='quick_gelus' is unknown; did you mean 'quick_gelu'?"),
    (dict(patch_size=[4, 2]), "patch_size=[4, 2]; valid: one number, or two that are equal"),
    (dict(image_size="large"), "image_size='large'; valid: a positive integer, or [height, width]"),
    (dict(image_size=2), "image_size=[2, 2] is smaller than patch_size=4"),
  ],
)
def test_config(fields, message, vit):
  change(vit, **fields)
  assert message in refused(vit)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(resample=4), "resample=4; valid: 0 (nearest), 1 (lanczos), 2 (bilinear), 3 (bicubic)"),
    (dict(image_processor_type="LlavaImageProcessorFast", do_pad=True), "do_pad=true makes pictures square"),
  ],
)
def test_preprocessing(fields, message, vit):
  (vit / "preprocessor_config.json").write_text(json.dumps(fields))
  assert f"{vit / 'preprocessor_config.json'}: {message}" in refused(vit)


def test_an_image_that_is_no_multiple_of_the_patch(tmp_path):
  theirs.write(tmp_path, "siglip", FIELDS | dict(image_size=14))
  with pytest.warns(
    UserWarning, match=r"image_size=\[14, 14\] is no multiple of patch_size=4; .*image_size=\(12, 12\)"
  ):
    assert tokred.load(tmp_path).config.model.image_size == (12, 12)
  with pytest.raises(ValueError, match=r"config.model.image_size=\(14, 14\) must be .*multiples of patch 4"):
    with pytest.warns(UserWarning, match="is no multiple"):
      tokred.load(tmp_path, model=dict(image_size=(14, 14)))


def test_pickles_and_other_formats(vit):
  (vit / "model.safetensors").rename(vit / "pytorch_model.bin")
  message = refused(vit)
  assert (
    "pickle" in message and "safetensors.torch.save_file(torch.load('pytorch_model.bin', weights_only=True)" in message
  )
  (vit / "pytorch_model.bin").rename(vit / "flax_model.msgpack")
  assert "flax_model.msgpack' are not read" in refused(vit)
  (vit / "flax_model.msgpack").unlink()
  assert "has no weights; valid: model.safetensors" in refused(vit, FileNotFoundError)


def test_clip_with_a_classifier(tmp_path):
  head = {"classifier.weight": (3, 16), "classifier.bias": (3,)}
  theirs.write(tmp_path, "clip", FIELDS, change=lambda state: state | theirs.arrays(head))
  assert "CLIPForImageClassification reads patches that no norm has seen" in refused(tmp_path)


@pytest.mark.parametrize(
  "name, reason",
  [
    ("beit_base_patch16_224", "its attention adds a bias"),
    ("resnet50", ""),
    ("vit_base_patch16_rpn_224", "its norms stand behind attention and MLP"),
    ("vit_pe_core_base_patch16_224", "it turns queries and keys by rotary positions"),
  ],
)
def test_timm_architectures(name, reason, tmp_path):
  save_file({"cls_token": np.zeros((1, 1, 4), np.float32)}, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps(dict(architecture=name)))
  message = refused(tmp_path)
  assert f"architecture={name!r} is not one that tokred knows" in message and reason in message


@pytest.mark.parametrize("pool", ["max", "avgmax"])
def test_timm_pooling(pool, tmp_path):
  save_file({"cls_token": np.zeros((1, 1, 4), np.float32), "pos_embed": np.zeros((1, 5, 4), np.float32)},
            tmp_path / "model.safetensors")  # fmt: skip
  (tmp_path / "config.json").write_text(json.dumps(dict(architecture="vit_tiny_patch16_224", global_pool=pool)))
  assert f"global_pool={pool!r} is not a pooling that tokred has; valid: token, avg, map" in refused(tmp_path)


@pytest.mark.parametrize(
  "args, message",
  [
    (dict(pool_include_prefix=True), "model_args.pool_include_prefix=True is not read; valid: without it"),
    (dict(act_layer="gelu_tan"), "model_args.act_layer='gelu_tan' is unknown; did you mean 'gelu_tanh'?"),
  ],
)
def test_timm_arguments(args, message, tmp_path):
  save_file({"cls_token": np.zeros((1, 1, 4), np.float32), "pos_embed": np.zeros((1, 5, 4), np.float32)},
            tmp_path / "model.safetensors")  # fmt: skip
  (tmp_path / "config.json").write_text(json.dumps(dict(architecture="vit_tiny_patch16_224", model_args=args)))
  assert message in refused(tmp_path)


def test_beit_in_a_bare_file(tmp_path):
  table = {"blocks.0.attn.relative_position_bias_table": np.zeros((9, 2), np.float32)}
  save_file(table, tmp_path / "model.safetensors")
  assert "is BEiT's, which tokred does not have" in refused(tmp_path / "model.safetensors")


def test_a_config_that_the_arrays_do_not_contradict(vit):
  model = tokred.build(dict(model=loading.read_config(vit).model.to_dict() | dict(activation="quick_gelu")))
  target = model.init().params
  with pytest.raises(ValueError, match=r"config.model.activation='quick_gelu', but .*vit has 'gelu'; set config"):
    loading.read(vit, target, model.config.model)
  loading.read(vit, target, loading.read_config(vit).model)
  open_source(vit).check(loading.read_config(vit).model)
