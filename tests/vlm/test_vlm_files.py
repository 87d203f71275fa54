"""Files of vision-language models: names of all releases, full sizes, errors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from vlms import GOLDEN, needs_golden, parameters

from tokred import sharding
from tokred.pretrained.rules import Lazy, compare, translate, writing
from tokred.pretrained.vlm import KINDS, abstract, found_only, load_vlm, open_vlm, read_vlm, spelt

TOWER = "vision_tower.encoder.layers.0.layer_norm1.bias"


@pytest.mark.parametrize(
  "names",
  [
    (TOWER, f"model.{TOWER}", "vision_tower.vision_model" + TOWER[12:], "model.vision_tower.vision_model" + TOWER[12:]),
    ("vision_tower.blocks.0.attn.qkv.bias", "visual.blocks.0.attn.qkv.bias", "model.visual.blocks.0.attn.qkv.bias"),
    ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
    ("language_model.norm.weight", "model.norm.weight", "language_model.model.norm.weight"),
    ("language_model.norm.weight", "model.language_model.norm.weight", "model.language_model.model.norm.weight"),
    ("language_model.lm_head.weight", "lm_head.weight"),
    ("image_newline", "model.image_newline"),
  ],
)
def test_names_of_all_releases_are_one(names):
  assert {spelt(name) for name in names} == {names[0]}


RENAMED = {  # as transformers 4 wrote them, and as 4.52 to 4.57 had them in memory
  "llava_next": lambda n: n.replace("vision_tower.", "vision_tower.vision_model."),
  "llava_clip_llama": lambda n: "lm_head.weight" if "lm_head" in n else "model." + n.replace("model.layers", "layers"),
  "qwen2_5_vl": lambda n: n if "lm_head" in n else "model." + n.replace("model.", "language_model."),
}


@needs_golden
@pytest.mark.parametrize("name", RENAMED)
def test_other_releases_load_the_same(name, tmp_path):
  state = {RENAMED[name](n): a for n, a in load_file(GOLDEN / "hf" / name / "model.safetensors").items()}
  shards = [dict(list(state.items())[i::2]) for i in range(2)]
  for i, shard in enumerate(shards):
    save_file(shard, tmp_path / f"model-{i}.safetensors")
  places = {key: f"model-{i}.safetensors" for i, shard in enumerate(shards) for key in shard}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
  (tmp_path / "config.json").write_text((GOLDEN / "hf" / name / "config.json").read_text())
  _, params = load_vlm(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, parameters(name))
  (tmp_path / "model-1.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"names 'model-1.safetensors', which is not there"):
    open_vlm(tmp_path)


@needs_golden
@pytest.mark.parametrize("name", RENAMED)
def test_written_names_are_those_that_were_read(name):
  """Grouped heads of the language model are read only."""
  found = open_vlm(GOLDEN / "hf" / name)
  grouped = found.llm.num_kv_heads < found.llm.num_heads
  own = {n: a for n, a in found.arrays().items() if not (grouped and n.startswith("llm/"))}
  back = translate(own, writing(found.rows()), axis=0)
  assert back.keys() == {n for n in found.state if not (grouped and n.startswith("language_model."))}
  for key, array in back.items():
    np.testing.assert_array_equal(array.read(), found.state[key].read())


@needs_golden
@pytest.mark.thorough
@pytest.mark.parametrize("mesh", [None, dict(data=1, fsdp=4, tensor=2)])
def test_reducers_that_learn_are_drawn_and_the_rest_is_read(mesh):
  mesh = mesh and sharding.make_mesh(mesh)
  site = dict(reducer="gumbel", layers=(1,), keep=0.5)
  _, params = load_vlm(GOLDEN / "hf" / "llava_clip_llama", {"a": site}, mesh=mesh, param_dtype="bfloat16")
  own = params["tower"]["block_1"].pop("reduce")
  assert all(leaf.dtype == "bfloat16" and np.isfinite(leaf).all() for leaf in jax.tree.leaves(own))
  assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(own))
  read = jax.tree.map(lambda a: a.astype("bfloat16"), parameters("llava_clip_llama"))
  jax.tree.map(np.testing.assert_array_equal, params, read)


SEVEN = {  # config.json of the public checkpoints
  "llava": dict(
    model_type="llava", image_token_index=32000, projector_hidden_act="gelu", vision_feature_layer=-2,
    vision_feature_select_strategy="default", vocab_size=32064,
    text_config=dict(model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5, vocab_size=32064),
    vision_config=dict(
      model_type="clip_vision_model", hidden_size=1024, image_size=336, intermediate_size=4096, num_attention_heads=16,
      num_hidden_layers=24, patch_size=14, projection_dim=768, vocab_size=32000,
    ),
  ),
  "qwen2_5_vl": dict(
    model_type="qwen2_5_vl", hidden_size=3584, image_token_id=151655, intermediate_size=18944, vocab_size=152064,
    max_position_embeddings=128000, num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4,
    rms_norm_eps=1e-6, rope_theta=1e6, sliding_window=32768, use_sliding_window=False, video_token_id=151656,
    tie_word_embeddings=False, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
    vision_config=dict(
      depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=3420, num_heads=16, in_chans=3,
      out_hidden_size=3584, patch_size=14, spatial_merge_size=2, window_size=112, tokens_per_second=2,
      fullatt_block_indexes=[7, 15, 23, 31], temporal_patch_size=2,
    ),
  ),
}  # fmt: skip


def linear(name, out, inner, bias=True):
  return {f"{name}.weight": (out, inner)} | ({f"{name}.bias": (out,)} if bias else {})


def language(prefix, head, width, depth, mlp, kv, vocab, bias):
  state = {f"{prefix}embed_tokens.weight": (vocab, width), f"{prefix}norm.weight": (width,), head: (vocab, width)}
  for i in range(depth):
    at = f"{prefix}layers.{i}."
    for name, out in (("q", width), ("k", kv), ("v", kv)):
      state |= linear(f"{at}self_attn.{name}_proj", out, width, bias)
    state |= linear(f"{at}self_attn.o_proj", width, width, False) | linear(f"{at}mlp.down_proj", width, mlp, False)
    state |= linear(f"{at}mlp.gate_proj", mlp, width, False) | linear(f"{at}mlp.up_proj", mlp, width, False)
    state |= {f"{at}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
  return state


def theirs(name):
  """Names and shapes in the public shards."""
  if name == "llava":
    at = "vision_tower.vision_model."
    state = {
      f"{at}{name}.{kind}": (1024,) for name in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")
    }
    state |= {f"{at}embeddings.class_embedding": (1024,), f"{at}embeddings.patch_embedding.weight": (1024, 3, 14, 14)}
    state |= {f"{at}embeddings.position_embedding.weight": (577, 1024)}
    for i in range(24):
      layer = f"{at}encoder.layers.{i}."
      state |= linear(layer + "mlp.fc1", 4096, 1024) | linear(layer + "mlp.fc2", 1024, 4096)
      for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        state |= linear(f"{layer}self_attn.{part}", 1024, 1024)
      state |= {f"{layer}layer_norm{n}.{kind}": (1024,) for n in (1, 2) for kind in ("weight", "bias")}
    state |= linear("multi_modal_projector.linear_1", 4096, 1024) | linear("multi_modal_projector.linear_2", 4096, 4096)
    head = "language_model.lm_head.weight"
    return state | language("language_model.model.", head, 4096, 32, 11008, 4096, 32064, False)
  state = {"visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14), "visual.merger.ln_q.weight": (1280,)}
  state |= linear("visual.merger.mlp.0", 5120, 5120) | linear("visual.merger.mlp.2", 3584, 5120)
  for i in range(32):
    at = f"visual.blocks.{i}."
    state |= linear(at + "attn.qkv", 3840, 1280) | linear(at + "attn.proj", 1280, 1280)
    state |= linear(at + "mlp.gate_proj", 3420, 1280) | linear(at + "mlp.up_proj", 3420, 1280)
    state |= linear(at + "mlp.down_proj", 1280, 3420) | {f"{at}norm{n}.weight": (1280,) for n in (1, 2)}
  return state | language("model.", "lm_head.weight", 3584, 28, 18944, 512, 152064, True)


UNSEEN = 12_596_224 + 2 * 1024  # the layer behind the feature layer, and the norm behind that
COUNTS = {"llava": (7_063_427_072, UNSEEN), "qwen2_5_vl": (8_292_166_656, 0)}


@pytest.mark.parametrize("name", SEVEN)
def test_full_sizes_map_and_every_matrix_is_sharded(name):
  """Eight devices: each name of the shards finds its place, and a device holds an eighth of nearly all of it."""
  mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=2))
  files = read_vlm(SEVEN[name])
  module = files.make(dtype="bfloat16", param_dtype="bfloat16")
  tree = abstract(module, mesh, "bfloat16")
  shapes = theirs(name)
  total, unseen = COUNTS[name]
  assert sum(np.prod(shape) for shape in shapes.values()) == total
  state = {n: Lazy(s, np.dtype(np.float32), lambda: None) for n, s in shapes.items()}
  state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = Lazy((64,), np.dtype(np.float32), lambda: None)
  compare(tree, dataclasses.replace(files, state=found_only(files, state)).arrays())
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  assert sum(leaf.size for _, leaf in leaves) == total - unseen
  mine = 0
  for path, leaf in leaves:
    split = int(np.prod([mesh.shape[axis] for axis in leaf.sharding.spec if axis]))
    mine += leaf.size // split
    assert leaf.ndim == 1 or leaf.size < 2**14 or split >= 4, sharding.path_name(path)
    assert split == 8 or leaf.size < 2**25, sharding.path_name(path)
  assert mine < 1.1 * total / 8 and leaves[0][1].dtype == "bfloat16"


TINY = dict(
  model_type="llava", image_token_index=3,
  text_config=dict(model_type="llama", vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
  vision_config=dict(model_type="siglip_vision_model", hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
  vision_feature_select_strategy="full",
)  # fmt: skip
QWEN = SEVEN["qwen2_5_vl"]


@pytest.mark.parametrize(
  "config, message",
  [
    (
      dict(model_type="lava"),
      r"config.json: model_type='lava' is not a vision-language model .*; did you mean 'llava'",
    ),
    (TINY | dict(vision_feature_layer=-5), r"vision_feature_layer=-5; valid: one of the tower's 3 layers, as -2"),
    (TINY | dict(vision_feature_layer=[-2, -1]), r"vision_feature_layer=\[-2, -1\]; valid: one of"),
    (
      TINY | dict(vision_feature_select_strategy="default"),
      r"select_strategy='default'; valid: 'full': this tower has",
    ),
    (TINY | dict(projector_hidden_act="relu"), r"projector_hidden_act='relu' and .*; valid: 'gelu' and true"),
    (TINY | dict(image_token_index=32), r"image_token_id=32; valid: 0 to 31, the vocabulary"),
    (TINY | dict(vision_config=dict(model_type="beit")), r"model_type='beit' is not an architecture that tokred knows"),
    (
      QWEN | dict(hidden_size=3584 * 2, num_attention_heads=56),
      r"leaves tokens of width 3584, but hidden_size=7168; vali",
    ),
    (QWEN | dict(vision_config=QWEN["vision_config"] | dict(window_size=14)), r"window_size=14; valid: 28 pixels"),
    (QWEN | dict(rope_scaling=dict(type="mrope", mrope_section=[1, 2, 3])), r"mrope_section=\[1, 2, 3\] must add up"),
  ],
)
def test_configs_that_cannot_be_read(config, message):
  with pytest.raises(ValueError, match=message):
    read_vlm(config)
  assert read_vlm(TINY).model["depth"] == 2 and "llava" in KINDS


def test_a_tower_of_qwen_turns_by_its_own_theta():
  assert read_vlm(QWEN).tower.theta == 1e4
  own = QWEN["vision_config"] | dict(rope_parameters=dict(rope_type="axial", rope_theta=50.0))
  assert read_vlm(QWEN | dict(vision_config=own)).tower.theta == 50.0


def test_directories_that_cannot_be_read(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"has no config.json; valid: a directory in the layout of transformers"):
    open_vlm(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config.json is damaged .*; fetch it again"):
    open_vlm(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(TINY))
  with pytest.raises(FileNotFoundError, match=r"has no weights; valid: model.safetensors, or shards"):
    open_vlm(tmp_path)
  save_file({"lm_head.weight": np.zeros((32, 32), np.float32)}, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"do not fit their config.json: missing: llm/block_0/attn/proj/kernel, .* more"):
    load_vlm(tmp_path)
