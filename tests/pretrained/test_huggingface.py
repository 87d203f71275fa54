"""Directories of transformers: recorded outputs, every family with a reducer, full sizes by shape, preprocessing."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import theirs
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import tokred
from tokred import loading
from tokred.pretrained import compare, huggingface, open_source, rules
from tokred.pretrained.preprocessing import to_preprocessor
from tokred.pretrained.rules import Lazy

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "vlm" / "hf"
MERGE = dict(merge=dict(reducer="tome", layers=(0,), r=2))
SWIGLU = dict(theirs.MICRO, mlp_ratio=4, use_swiglu_ffn=True, num_register_tokens=2)
TURNED = dict(theirs.MICRO, **theirs.MLP, num_register_tokens=1, use_gated_mlp=True, hidden_act="silu")


def same_in_both_modes(model, images):
  """Mask and gather agree where tokens merge: in the first block, which has all that a family has."""
  config = model.config.to_dict() | {"sites": MERGE}
  module = tokred.build(config | {"model": config["model"] | {"depth": 1}}).module
  run = lambda p, x: [module.apply({"params": p}, x, mode=mode) for mode in ("mask", "gather")]
  masked, gathered = jax.jit(run)(model.params, images)
  np.testing.assert_array_equal(np.asarray(masked.counts, int), gathered.counts)
  assert gathered.counts[-1] < module.shape.num_tokens
  np.testing.assert_allclose(masked.logits, gathered.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}")
@pytest.mark.parametrize("name", ["vit_cls", "deit_cls", "dinov2", "clip_vision", "siglip_vision"])
def test_recorded_outputs(name):
  with np.load(GOLDEN / name / "io.npz") as file:
    recorded = dict(file)
  images = jnp.asarray(recorded["pixel_values"].transpose(0, 2, 3, 1))
  model = tokred.load(GOLDEN / name)
  out = model(images)
  wanted = recorded["logits" if name.endswith("_cls") else "pooler_output"]
  np.testing.assert_allclose(out.logits, wanted, atol=2e-4)
  last = recorded.get("last_hidden_state")
  if name == "clip_vision":  # theirs has not passed the last norm, ours has
    weights = load_file(GOLDEN / name / "model.safetensors")
    last = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
    last = last * weights["post_layernorm.weight"] + weights["post_layernorm.bias"]
  if last is not None:
    np.testing.assert_allclose(out.tokens.x, last, atol=2e-4)
  same_in_both_modes(model, images)


@pytest.mark.parametrize("kind, fields, head", [("dinov2", SWIGLU, 3), ("dinov3", TURNED, 0)])
def test_reducers_on_what_has_no_recording(tmp_path, kind, fields, head):
  theirs.write(tmp_path, kind, fields, head)
  model = tokred.load(tmp_path)
  assert model.config.model.mlp == "gated" and model.config.model.num_registers == fields["num_register_tokens"]
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 12, 3)), jnp.float32)
  same_in_both_modes(model, images)
  if head:
    assert model.params["head"]["kernel"].shape == (32, 3)  # CLS and the mean of the patches
    assert model.config.data.labels == ("kind 0", "kind 1", "kind 2")


GIANT = dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, patch_size=14, image_size=518)
FULL = {
  "vit": dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14,
              image_size=224),
  "siglip": dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, patch_size=14,
                 image_size=384),
  "dinov2": GIANT | dict(mlp_ratio=4, use_swiglu_ffn=True),
}  # fmt: skip


@pytest.mark.parametrize("kind, millions", [("vit", 632.0), ("siglip", 428.2), ("dinov2", 1136.5)])
@pytest.mark.filterwarnings("ignore:.*image_size=.384, 384. is no multiple of patch_size=14")
def test_full_sizes_by_shape(kind, millions, tmp_path, monkeypatch):
  """ViT-H/14, SigLIP So400m/14 at 384 and DINOv2-g: every array finds its place, none is read."""
  head = 1000 if kind == "vit" else 0
  shapes = theirs.shapes(kind, FULL[kind], head)
  never = lambda: pytest.fail("an array was read")
  state = {name: Lazy(shape, np.dtype(np.float32), never) for name, shape in shapes.items()}
  monkeypatch.setattr(huggingface, "open_directory", lambda directory: state)
  (tmp_path / "config.json").write_text(json.dumps(theirs.config(kind, FULL[kind], head)))
  source = open_source(tmp_path)
  made = tokred.build(source.config({}))
  target = jax.eval_shape(lambda: tokred.model.init(made.module, 0))
  loaded = source.arrays(target, made.module.shape.grid)
  compare(target, loaded)
  count = sum(np.prod(array.shape) for array in loaded.values())
  left_out = np.prod(shapes.get("embeddings.mask_token", (0,)))
  assert count == sum(np.prod(shape) for shape in shapes.values()) - left_out
  assert count / 1e6 == pytest.approx(millions, rel=1e-3)


def test_a_table_is_its_own_inverse():
  """What the rules read they write back, name by name."""
  cases = {"vit": 3, "deit": 3, "deit_teacher": 3, "dinov2": 3, "dinov3": 0, "clip": 0, "siglip": 0}
  for kind, head in cases.items():
    fields = TURNED if kind == "dinov3" else SWIGLU if kind == "dinov2" else theirs.MICRO | theirs.MLP
    state = theirs.arrays(theirs.shapes(kind, fields, head))
    state = {
      name.removeprefix("vit.").removeprefix("deit."): a for name, a in state.items() if "mask_token" not in name
    }
    state = {name.removeprefix("dinov2_with_registers."): a for name, a in state.items()}
    for i in range(2 if kind == "dinov3" else 0):
      state[f"layer.{i}.attention.k_proj.bias"] = np.zeros(16, np.float32)
    table = huggingface.rows(theirs.TYPES[kind], 2, kind == "deit_teacher")
    if kind == "dinov2":  # of both kinds of MLP that the table knows, one
      table = [row for row in table if ".mlp.fc" not in row.theirs]
    ours = rules.translate(state, rules.reading(table))
    assert not [name for name in ours if "." in name]
    back = rules.translate(ours, rules.writing(table), rules.THEIRS)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state), kind


PREFIXES = [("vision_model.",), ("model.", "vision_tower.", "vision_model."), ("module.",)]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_and_what_is_left_out(prefix, tmp_path):
  def change(state):
    others = {
      "text_model.encoder.layers.0.mlp.fc1.weight": (4, 4),
      "logit_scale": (1,),
      "visual_projection.weight": (4, 4),
    }
    return {"".join(prefix) + name: array for name, array in state.items()} | theirs.arrays(others)

  plain = theirs.write(tmp_path / "plain", "clip", theirs.MICRO | theirs.MLP)
  theirs.write(tmp_path / "other", "clip", theirs.MICRO | theirs.MLP, change=change)
  (tmp_path / "other" / "config.json").write_text(
    json.dumps(dict(model_type="clip", vision_config=theirs.MICRO | theirs.MLP))  # tower of unknown type: CLIP's
  )
  a, b = (tokred.load(tmp_path / name) for name in ("plain", "other"))
  assert a.config == b.config and jax.tree.all(jax.tree.map(np.array_equal, a.params, b.params))
  np.testing.assert_array_equal(a.params["cls_token"][0, 0], plain["embeddings.class_embedding"])


def test_shards_are_read_one_array_at_a_time_onto_their_devices(tmp_path):
  theirs.write(tmp_path, "vit", theirs.MICRO | theirs.MLP, 3)
  whole = tokred.load(tmp_path)
  theirs.shard(tmp_path)
  mesh = Mesh(np.asarray(jax.devices()[:2]), ("fsdp",))
  module = whole.module
  target = jax.eval_shape(lambda: tokred.model.init(module, 0))

  def shard(leaf):
    spec = PartitionSpec(*(["fsdp"] if leaf.shape[0] % 2 == 0 else []))
    return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

  order = []
  source = open_source(tmp_path)
  noted = {n: Lazy(a.shape, a.dtype, functools.partial(_noted, order, n, a)) for n, a in source.state.items()}
  object.__setattr__(source, "state", noted)
  loaded = source.arrays(target)
  assert not order  # headers only
  params = rules.merge(jax.tree.map(shard, target), loaded)
  assert sorted(order) == sorted(noted)  # each once
  for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(whole.params), strict=True):
    assert leaf.dtype == jnp.bfloat16 and isinstance(leaf.sharding, NamedSharding)
    np.testing.assert_allclose(leaf.astype(jnp.float32), wanted, rtol=1e-2)
  assert params["patch_embed"]["kernel"].sharding.shard_shape((4, 4, 3, 16)) == (2, 4, 3, 16)


def _noted(order, name, array):
  order.append(name)
  return array.read()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_that_are_read(dtype, tmp_path):
  import ml_dtypes

  kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
  state = theirs.write(
    tmp_path, "vit", theirs.MICRO | theirs.MLP, 3, change=lambda s: {n: a.astype(kind) for n, a in s.items()}
  )
  params = tokred.load(tmp_path).params
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  wanted = state["vit.encoder.layer.1.output.dense.weight"].astype(np.float32).T
  np.testing.assert_array_equal(params["block_1"]["mlp"]["fc2"]["kernel"], wanted)


@pytest.mark.parametrize(
  "preprocessor, wanted",
  [
    (dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3, size=dict(height=12, width=12)),
     dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resize="bicubic", crop_fraction=0.0)),
    (dict(do_center_crop=True, crop_size=dict(height=12, width=12), size=dict(shortest_edge=16), resample=2),
     dict(resize="bilinear", crop_fraction=0.75)),
    (dict(do_normalize=False, size=dict(shortest_edge=12), resample=1),
     dict(mean=(0.0,) * 3, std=(1.0,) * 3, resize="lanczos", crop_fraction=1.0)),
    # pixels times 1/127.5, then minus 1: (2 x/255 - 1) / 1 = (x/255 - 1/2) / (1/2)
    (dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3, size=12),
     dict(mean=(0.5,) * 3, std=(0.5,) * 3)),
    (dict(image_processor=dict(image_mean=[0.7] * 3, size=dict(shortest_edge=12))), dict(mean=(0.7,) * 3)),
    # one number: a square to some, the shorter side to others
    (dict(feature_extractor_type="ViTFeatureExtractor", size=12), dict(crop_fraction=0.0)),
    (dict(feature_extractor_type="CLIPFeatureExtractor", size=16, crop_size=12), dict(crop_fraction=0.75)),
    # what each processor does where its file is silent
    (dict(image_processor_type="Qwen2VLImageProcessor"), dict(resize="bicubic")),
    (dict(image_processor_type="CLIPImageProcessorFast"), dict(resize="bicubic")),
    (dict(feature_extractor_type="ViTFeatureExtractor"), dict(resize="bilinear")),
    (dict(image_processor_type="DINOv3ViTImageProcessorFast"), dict(resize="bilinear")),
  ],
)  # fmt: skip
def test_preprocessing(preprocessor, wanted, tmp_path):
  theirs.write(tmp_path, "vit", theirs.MICRO | theirs.MLP, 3, preprocessor)
  data = loading.read_config(tmp_path).data
  for field, value in wanted.items():
    assert data[field] == (pytest.approx(value) if field in ("mean", "std") else value), field


def test_the_edge_of_a_resized_image_comes_back(tmp_path):
  """224 / (224 / 400) is 399.99999999999994."""
  wanted = dict(do_center_crop=True, crop_size=dict(height=224, width=224), size=dict(shortest_edge=400))
  theirs.write(tmp_path, "vit", theirs.MICRO | theirs.MLP, 3, wanted)
  data = loading.read_config(tmp_path).data
  made = to_preprocessor(data, (224, 224))
  assert {name: made[name] for name in wanted} == wanted
