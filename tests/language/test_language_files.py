"""Files of language models: names, shards, fields of config.json, errors."""

import json

import numpy as np
import pytest
from languages import TINY, parameters
from safetensors.numpy import save_file

from tokred.pretrained.language import load_language, open_language, read_shape
from tokred.pretrained.vlm import open_vlm

CONFIG = dict(
  model_type="qwen2", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
  num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def arrays(prefix="model.", head=False):
  rng = np.random.default_rng(0)
  shapes = {"embed_tokens.weight": (50, 32), "norm.weight": (32,)}
  layer = "layers.0."
  for name, rows in (("q", 32), ("k", 16), ("v", 16)):
    shapes |= {f"{layer}self_attn.{name}_proj.weight": (rows, 32), f"{layer}self_attn.{name}_proj.bias": (rows,)}
  shapes |= {f"{layer}self_attn.o_proj.weight": (32, 32), f"{layer}mlp.down_proj.weight": (32, 48)}
  shapes |= {f"{layer}mlp.{name}_proj.weight": (48, 32) for name in ("gate", "up")}
  shapes |= {f"{layer}{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
  out = {prefix + name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  return out | ({"lm_head.weight": out[f"{prefix}embed_tokens.weight"].copy()} if head else {})


def directory(path, config, shards):
  path.mkdir()
  (path / "config.json").write_text(json.dumps(config))
  if len(shards) == 1:
    save_file(shards[0], path / "model.safetensors")
    return path
  names = [f"model-{i}.safetensors" for i in range(len(shards))]
  for name, shard in zip(names, shards, strict=True):
    save_file(shard, path / name)
  places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
  (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
  return path


def test_queries_that_share_a_key_stand_beside_it(tmp_path):
  """Head 3 of four is the second query of the second key: rows 24 to 31 of q_proj, and 8 to 15 of k_proj."""
  state = arrays()
  _, params = load_language(directory(tmp_path / "a", CONFIG, [state]))
  kernel, bias = (params["block_0"]["attn"]["qkv"][leaf] for leaf in ("kernel", "bias"))
  assert kernel.shape == (32, 4, 2, 8)
  q, k, v = (state[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv")
  np.testing.assert_array_equal(kernel[:, 1, 1], q[24:32].T)
  np.testing.assert_array_equal(kernel[:, 2, 1], k[8:16].T)
  np.testing.assert_array_equal(kernel[:, 3, 0], v[:8].T)
  np.testing.assert_array_equal(bias[0, 1], state["model.layers.0.self_attn.q_proj.bias"][16:24])


@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model.", "model.language_model."])
def test_prefixes_shards_and_other_parts_of_a_vlm(prefix, tmp_path):
  whole = arrays(prefix, head=True)
  names = sorted(whole)
  shards = [{n: whole[n] for n in names[:5]}, {n: whole[n] for n in names[5:]}]
  for other in ("visual.blocks.0.norm1.weight", "model.vision_tower.vision_model.embeddings.x", "image_newline"):
    shards[0][other] = np.zeros(3, np.float32)
  config = dict(model_type="llava", text_config=CONFIG)
  module, params = load_language(directory(tmp_path / "a", config, shards), param_dtype="bfloat16")
  assert module.shape.tied and "head" not in params and params["norm"]["scale"].dtype == "bfloat16"


@pytest.mark.parametrize("outer", [False, True])
def test_a_head_that_is_not_the_table_is_read_though_it_is_called_tied(outer, tmp_path):
  state = arrays(head=True)
  state["lm_head.weight"] += 1.0
  config = dict(model_type="llava", image_token_index=9, text_config=CONFIG) if outer else CONFIG
  module, params = load_language(directory(tmp_path / "a", config, [state]))
  assert not module.shape.tied
  np.testing.assert_array_equal(params["head"]["kernel"], state["lm_head.weight"].T)
  found = open_vlm(tmp_path / "a") if outer else None
  assert found is None or (not found.llm.tied and "language_model.lm_head.weight" in found.state)


def test_a_missing_shard_and_a_missing_head(tmp_path):
  state = arrays()
  path = directory(tmp_path / "a", CONFIG, [state, {"model.extra": np.zeros(1, np.float32)}])
  with pytest.raises(ValueError, match=r"do not fit their config.json: left over: extra"):
    load_language(path)
  (path / "model-0.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"names 'model-0.safetensors', which is not there"):
    open_language(path)
  with pytest.raises(ValueError, match=r"do not fit their config.json: missing: head/kernel"):
    load_language(directory(tmp_path / "b", CONFIG | dict(tie_word_embeddings=False), [state]))
  with pytest.raises(FileNotFoundError, match=r"has no config.json"):
    open_language(tmp_path)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(model_type="lama"), r"config.json: model_type='lama' is not a language model .*; did you mean 'llama'"),
    (
      dict(rope_scaling=dict(type="yarn", factor=4.0)),
      r"config.json: rope_type='yarn' is not supported; valid: default",
    ),
    (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), r"rope_type='dynamic' is not supported"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), r"rope_type='llama3' needs low_freq_factor, high_freq_f"),
    (dict(rope_scaling=dict(type="mrope", mrope_section=[1, 1, 1])), r"mrope_section=\[1, 1, 1\] must add up to 4"),
    (
      dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
      r"partial_rotary_factor=0.5 is not supported; valid: 1.0",
    ),
    (dict(use_sliding_window=True), r"use_sliding_window=true is not supported; valid: false"),
    (dict(hidden_act="gelu_nwe"), r"hidden_act='gelu_nwe' is unknown; did you mean 'gelu_new'"),
    (dict(num_attention_heads=5), r"num_attention_heads=5 does not divide hidden_size=32"),
    (dict(vocab_size="many"), r"vocab_size='many'; valid: a positive integer"),
  ],
)
def test_configs_that_cannot_be_read(fields, message):
  with pytest.raises(ValueError, match=message):
    read_shape(CONFIG | fields)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_either_config_of_a_vlm_ties_the_head(kind):
  for whole, text, tied in ((True, False, True), (False, True, True), (False, False, False), (True, None, True)):
    own = CONFIG | dict(model_type="qwen2", tie_word_embeddings=text)
    own = {name: value for name, value in own.items() if value is not None}
    assert read_shape(dict(model_type=kind, tie_word_embeddings=whole, text_config=own)).tied == tied


def test_silent_fields_are_those_of_the_family():
  """LLaVA-1.5-7B names little of its Llama; old files of Qwen2.5-VL have no text_config; Llama 3 stretches RoPE."""
  llava = read_shape(
    dict(model_type="llava", text_config=dict(model_type="llama", rms_norm_eps=1e-5, vocab_size=32064))
  )
  assert (llava.width, llava.depth, llava.num_kv_heads, llava.head_dim, llava.mlp_dim) == (4096, 32, 32, 128, 11008)
  assert llava.norm_eps == 1e-5 and not (llava.qkv_bias or llava.qk_norm or llava.tied)
  scaling = dict(type="mrope", mrope_section=[16, 24, 24])
  qwen = read_shape(
    dict(model_type="qwen2_5_vl", hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, rope_theta=1e6)
    | dict(rope_scaling=scaling)
  )
  assert qwen.qkv_bias and qwen.rope.sections == (16, 24, 24) and qwen.rope.theta == 1e6
  bare = read_shape(dict(model_type="qwen2_vl"))
  assert (bare.rope.sections, bare.rope.theta, bare.norm_eps, bare.num_kv_heads) == ((16, 24, 24), 1e6, 1e-5, 8)
  three = read_shape(CONFIG | dict(model_type="qwen3"))
  assert three.head_dim == 128 and three.qk_norm and not three.qkv_bias and three.tied
  assert TINY["head_dim"] == 8 and parameters()["embed"]["embedding"].shape == (50, 32)
