"""Dense language models: recorded numbers, padding, positions, sharding."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from languages import TINY, forward, golden, needs_golden, recorded, tiny

from tokred import sharding
from tokred.nn import decoder
from tokred.nn.attention import attend
from tokred.nn.decoder_layer import Shape
from tokred.nn.generate import generate
from tokred.nn.rope import Rope
from tokred.pretrained.language import abstract, load_language, read_shape

TOLERANCE = 2e-4


@needs_golden
@pytest.mark.parametrize("name", ["llama_gqa", "qwen2"])
def test_recorded_logits_and_text(name):
  """The README of the golden data: 2e-4 where there is a token, and the same 12 tokens."""
  module, params = golden(name)
  io = recorded(f"hf/{name}/io")
  ids, mask = io["input_ids"], io["attention_mask"] > 0
  logits, _ = forward(module, params, ids=ids, mask=mask)
  np.testing.assert_allclose(np.asarray(logits)[mask], io["logits"][mask], atol=TOLERANCE)
  out = generate(module, params, ids, mask, max_new_tokens=12)
  np.testing.assert_array_equal(out.tokens, io["gen_tokens"])
  np.testing.assert_array_equal(out.length, 12)


@needs_golden
def test_recorded_positions_of_three_axes():
  """Qwen2.5-VL: each section of channels follows its own axis."""
  module, params = golden("qwen2_5_vl")
  io = recorded("hf/qwen2_5_vl/io")
  ids, position = io["input_ids"], np.moveaxis(io["position_ids"], 0, -1)  # (1, 20, 3)
  x = np.array(params["embed"]["embedding"])[ids]
  x[ids == 94] = io["image_features"]
  logits, _ = forward(module, params, x=jnp.asarray(x), position=jnp.asarray(position))
  np.testing.assert_allclose(logits, io["logits"], atol=TOLERANCE)


@needs_golden
@pytest.mark.thorough
def test_recorded_text_behind_three_axes():
  module, params = golden("qwen2_5_vl")
  io = recorded("hf/qwen2_5_vl/io")
  x = np.array(params["embed"]["embedding"])[io["input_ids"]]
  x[io["input_ids"] == 94] = io["image_features"]
  position = np.moveaxis(io["position_ids"], 0, -1)
  out = generate(module, params, x=jnp.asarray(x), position=position, max_new_tokens=12)
  np.testing.assert_array_equal(out.tokens, io["gen_tokens"])


def test_padding_on_either_side_changes_nothing():
  module, params = tiny()
  ids = np.random.default_rng(0).integers(0, 50, 6)
  padded, mask = np.full((3, 10), 7, np.int32), np.zeros((3, 10), bool)
  for row, before in enumerate((0, 4, 1)):
    padded[row, before : before + 6], mask[row, before : before + 6] = ids, True
  got = np.asarray(forward(module, params, ids=padded, mask=mask)[0])[mask].reshape(3, 6, -1)
  np.testing.assert_allclose(got[1:], got[:1].repeat(2, 0), atol=1e-5)


def test_llama3_frequencies_by_hand():
  """Turns over the original length: 8192 / 2 pi = 1303.8 at theta^0, which stays; of the last channel of theta = 1e6,
  dim 4: 1e-3 x 1303.8 = 1.3038 turns, so (1.3038 - 1) / (4 - 1) = 0.10127 of it stays and the rest is an eighth."""
  rope = Rope(1e6, "llama3", 8.0, 1.0, 4.0, 8192)
  share = (8192e-3 / (2 * np.pi) - 1) / 3
  np.testing.assert_allclose(rope.frequencies(4), [1.0, 1e-3 * (share + (1 - share) / 8)], rtol=1e-6)
  np.testing.assert_allclose(Rope(1e4, "linear", 4.0).frequencies(4), [0.25, 0.0025], rtol=1e-6)


@pytest.mark.parametrize("impl", ["matmul", "fused"])
def test_causal_attention_of_grouped_heads(impl):
  """Against a map with every mask spelt out; gates too, whose dead tokens keep themselves, and stand in any order."""
  rng = np.random.default_rng(1)
  q = rng.normal(size=(2, 4, 5, 8)).astype(np.float32)
  k, v = (rng.normal(size=(2, 2, 5, 8)).astype(np.float32) for _ in range(2))
  gate = np.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], np.float32)
  order = np.array([[0, 3, 1, 2, 4], [0, 1, 2, 3, 4]])

  @jax.jit
  def both(q, k, v):
    return attend(q, k, v, causal=True, impl=impl), attend(q, k, v, mask=gate, causal=order, impl=impl)

  e = np.exp(np.einsum("bhid,bhjd->bhij", q, k.repeat(2, 1)) / 8**0.5)
  plain = np.tri(5)[None]
  gated = (order[:, :, None] >= order[:, None]) * np.where(np.eye(5) > 0, 1.0, gate[:, None])
  for got, weight in zip(both(q, k, v), (plain, gated), strict=True):
    map_ = e * weight[:, None]
    wanted = np.einsum("bhij,bhjd->bhid", map_ / map_.sum(-1, keepdims=True), v.repeat(2, 1))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_bfloat16_stays_near():
  (module, params), ids = tiny(), np.arange(30, dtype=np.int32).reshape(3, 10)
  wanted, _ = forward(module, params, ids=ids, mask=ids >= 0)
  got, out = forward(dataclasses.replace(module, dtype="bfloat16"), params, ids=ids, mask=ids >= 0)
  assert got.dtype == jnp.float32 and out.tokens.x.dtype == jnp.bfloat16
  np.testing.assert_allclose(got, wanted, atol=0.1 * float(jnp.abs(wanted).max()))


SEVEN = {  # public sizes
  "llama": dict(model_type="llama", vocab_size=32064, max_position_embeddings=4096),  # as LLaVA-1.5-7B names it
  "qwen2": dict(
    model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, rope_theta=1e6,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVEN)
def test_seven_billion_parameters_are_all_sharded(name):
  """Every matrix lies in parts on eight devices; norms and biases are small."""
  mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=2))
  module = decoder.make(read_shape(SEVEN[name]))
  tree = abstract(module, mesh)
  sizes = [leaf.size for leaf in jax.tree.leaves(tree)]
  assert sum(sizes) == {"llama": 6_738_939_904, "qwen2": 7_615_616_512}[name]
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if leaf.ndim > 1 and leaf.size > 2**20:
      split = np.prod([mesh.shape[axis] for axis in leaf.sharding.spec if axis])
      assert split >= 4, sharding.path_name(path)
  assert tree["block_0"]["attn"]["qkv"]["kernel"].sharding.spec == PartitionSpec("fsdp", None, "tensor", None)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(num_kv_heads=3), r"num_kv_heads=3 does not divide num_heads=4"),
    (dict(head_dim=7), r"head_dim=7 must be even"),
    (dict(depth=0), r"config.llm.depth=0 must be 1 or more"),
    (dict(activation="silo"), r"activation='silo' is unknown; did you mean 'silu'"),
    (dict(rope=Rope(kind="yarn")), r"rope_type='yarn' is not supported; valid: default, linear, llama3"),
    (dict(rope=Rope(sections=(1, 1))), r"mrope_section=\[1, 1\] must add up to 4, half of head_dim=8"),
  ],
)
def test_sizes_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    decoder.make(Shape(**TINY | fields))


THEIRS = {
  "qwen3": dict(head_dim=24, num_key_value_heads=2),
  "llama": dict(
    num_key_value_heads=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    rope_parameters=dict(
      rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
      original_max_position_embeddings=16,
    ),
  ),
  "qwen2": dict(num_key_value_heads=4, rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=3.0)),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("name", THEIRS)
def test_live_against_transformers(name, tmp_path):
  """Random weights with every norm and bias away from its start, in shards."""
  torch = pytest.importorskip("torch")
  if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed")
  from transformers import AutoConfig, AutoModelForCausalLM

  sizes = dict(
    vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
  )  # fmt: skip
  torch.manual_seed(0)
  theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes | THEIRS[name])).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      p.add_(torch.randn_like(p) * (0.2 if p.ndim == 1 else 0.1))
  theirs.save_pretrained(tmp_path, max_shard_size="60KB")
  assert (tmp_path / "model.safetensors.index.json").exists()
  ids = np.random.default_rng(0).integers(0, 90, (2, 40))
  mask = np.ones_like(ids)
  mask[1, :9] = 0
  with torch.no_grad():
    position = np.maximum(mask.cumsum(1) - 1, 0)
    wanted = theirs(torch.tensor(ids), torch.tensor(mask), position_ids=torch.tensor(position)).logits.numpy()
    text = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=5, do_sample=False)
  module, params = load_language(tmp_path)
  got, _ = forward(module, params, ids=ids, mask=mask)
  there = mask > 0
  np.testing.assert_allclose(np.asarray(got)[there], wanted[there], atol=TOLERANCE)
  np.testing.assert_array_equal(generate(module, params, ids, mask, max_new_tokens=5).tokens, text[:, 40:].numpy())
