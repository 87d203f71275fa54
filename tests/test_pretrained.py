"""Reading foreign weights: names, layouts, comparisons of both trees, and every error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from tokred import config as defaults
from tokred import pretrained
from tokred.nn import vit

WIDTH, HEADS, DEPTH, CLASSES, PATCHES = 16, 2, 2, 3, 4


def model(sites=None, **fields):
  base = dict(variant="mu/4", width=WIDTH, num_heads=HEADS, depth=DEPTH, image_size=(8, 8), num_classes=CLASSES)
  config = defaults.complete(dict(model=base | fields, sites=sites or {}))
  return vit.make(config.model, config.sites)


def like(module):
  return jax.eval_shape(lambda key: module.init(key, jnp.zeros((1, 8, 8, 3)), mode="mask"), jax.random.key(0))["params"]


def timm_state(distilled=False, registers=0, positions=None, layer_scale=False, qk_norm=False, seed=0):
  """A state dict with timm's names and torch's layouts, of random numbers."""
  rng = np.random.default_rng(seed)
  shapes = {
    "cls_token": (1, 1, WIDTH),
    "pos_embed": (1, positions or PATCHES + 1 + distilled, WIDTH),
    "patch_embed.proj.weight": (WIDTH, 3, 4, 4),
    "patch_embed.proj.bias": (WIDTH,),
    "norm.weight": (WIDTH,),
    "norm.bias": (WIDTH,),
    "head.weight": (CLASSES, WIDTH),
    "head.bias": (CLASSES,),
  }
  if distilled:
    shapes |= {"dist_token": (1, 1, WIDTH), "head_dist.weight": (CLASSES, WIDTH), "head_dist.bias": (CLASSES,)}
  if registers:
    shapes["reg_token"] = (1, registers, WIDTH)
  for i in range(DEPTH):
    block = {
      "attn.qkv": (3 * WIDTH, WIDTH),
      "attn.proj": (WIDTH, WIDTH),
      "mlp.fc1": (4 * WIDTH, WIDTH),
      "mlp.fc2": (WIDTH, 4 * WIDTH),
      "norm1": (WIDTH,),
      "norm2": (WIDTH,),
    }
    if qk_norm:
      block |= {"attn.q_norm": (WIDTH // HEADS,), "attn.k_norm": (WIDTH // HEADS,)}
    for name, size in block.items():
      shapes |= {f"blocks.{i}.{name}.weight": size, f"blocks.{i}.{name}.bias": size[:1]}
    if layer_scale:
      shapes |= {f"blocks.{i}.ls{j}.gamma": (WIDTH,) for j in (1, 2)}
  return {name: rng.normal(size=size).astype(np.float32) for name, size in shapes.items()}


def load(tmp_path, state, params_like):
  path = tmp_path / "model.safetensors"
  save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)
  return pretrained.load_timm(path, params_like)


def test_layouts(tmp_path):
  state = timm_state()
  params = load(tmp_path, state, like(model()))
  x = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
  # torch: y = x W^T + b, then the 3D outputs are [q | k | v], each split by heads.
  wanted = (x @ state["blocks.1.attn.qkv.weight"].T + state["blocks.1.attn.qkv.bias"]).reshape(5, 3, HEADS, -1)
  qkv = params["block_1"]["attn"]["qkv"]
  np.testing.assert_allclose(np.einsum("nd,dthk->nthk", x, qkv["kernel"]) + qkv["bias"], wanted, rtol=1e-5, atol=1e-5)
  wanted = x @ state["blocks.0.attn.proj.weight"].T
  ours = np.einsum("nhk,hkd->nd", x.reshape(5, HEADS, -1), params["block_0"]["attn"]["proj"]["kernel"])
  np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)
  conv = params["patch_embed"]["kernel"]  # (height, width, in, out)
  assert conv[1, 3, 2, 7] == state["patch_embed.proj.weight"][7, 2, 1, 3]
  np.testing.assert_array_equal(params["block_1"]["mlp"]["fc1"]["kernel"], state["blocks.1.mlp.fc1.weight"].T)
  np.testing.assert_array_equal(params["norm"]["scale"], state["norm.weight"])
  np.testing.assert_array_equal(params["head"]["kernel"], state["head.weight"].T)


def test_everything_timm_has(tmp_path):
  state = timm_state(distilled=True, registers=2, layer_scale=True, qk_norm=True)
  module = model(distilled=True, num_registers=2, layer_scale=1e-5, qk_norm=True)
  params = load(tmp_path, state, like(module))
  np.testing.assert_array_equal(params["registers"], state["reg_token"])
  np.testing.assert_array_equal(params["block_1"]["layer_scale2"], state["blocks.1.ls2.gamma"])
  np.testing.assert_array_equal(params["block_0"]["attn"]["k_norm"]["scale"], state["blocks.0.attn.k_norm.weight"])
  np.testing.assert_array_equal(params["head_dist"]["bias"], state["head_dist.bias"])
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, like(module))


def embedded(module, params):
  """Tokens as they enter the first block, for an image of zeros."""
  entering = []

  def catch(call, args, kwargs, context):
    if isinstance(context.module, vit.Block) and context.module.layer == 0 and context.method_name == "__call__":
      entering.append(args[0].x[0])
    return call(*args, **kwargs)

  @jax.jit
  def run(params):
    with nn.intercept_methods(catch):
      module.apply({"params": params}, jnp.zeros((1, 8, 8, 3)))
    return entering.pop()

  return run(params)


def test_positions_of_registers_and_of_none(tmp_path):
  module = model(num_registers=2)
  # A position for every prefix token: timm lays out [cls, registers, patches] and adds.
  state = timm_state(registers=2, positions=PATCHES + 3)
  patches = np.tile(state["patch_embed.proj.bias"], (PATCHES, 1))
  wanted = np.concatenate([state["cls_token"][0], state["reg_token"][0], patches]) + state["pos_embed"][0]
  params = load(tmp_path, state, like(module))
  np.testing.assert_allclose(embedded(module, params), wanted, rtol=1e-6, atol=1e-6)
  # Positions for patches only, as in DINOv2 with registers: timm adds, then puts the prefix in front.
  state = timm_state(registers=2, positions=PATCHES)
  patches = np.tile(state["patch_embed.proj.bias"], (PATCHES, 1)) + state["pos_embed"][0]
  wanted = np.concatenate([state["cls_token"][0], state["reg_token"][0], patches])
  params = load(tmp_path, state, like(module))
  np.testing.assert_allclose(embedded(module, params), wanted, rtol=1e-6, atol=1e-6)


def test_reducers_are_expected_absentees(tmp_path):
  module = model(dict(prune=dict(reducer="gumbel", layers=(1,), keep=0.5)))
  concrete = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0, leaf.dtype), like(module))
  params = load(tmp_path, timm_state(), concrete)
  ours, before = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, concrete))
  kept = [name for name in ours if "/reduce/" in name]
  assert kept and ours.keys() == before.keys()
  for name in kept:
    np.testing.assert_array_equal(ours[name], before[name])
  with pytest.raises(ValueError, match=r"reducers' own.*block_1/reduce/prune/gumbel/predictor/norm/scale"):
    load(tmp_path, timm_state(), like(module))


def test_dtype_and_sharding_follow_the_target(tmp_path):
  mesh = Mesh(np.asarray(jax.devices()[:1]), ("fsdp",))
  target = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())),
    like(model()),
  )
  state = {name: array.astype(np.float16) for name, array in timm_state().items()}
  for leaf in jax.tree.leaves(load(tmp_path, state, target)):
    assert leaf.dtype == jnp.bfloat16
    assert isinstance(leaf.sharding, NamedSharding)


def test_mismatch_names_both_sides(tmp_path):
  state = timm_state()
  state["last_norm.weight"] = state.pop("norm.weight")
  state["head.weight"] = np.zeros((7, WIDTH), np.float32)
  with pytest.raises(ValueError) as error:
    load(tmp_path, state, like(model()))
  message = str(error.value)
  assert "missing: norm/scale;" in message
  assert "left over: last_norm.weight;" in message
  assert f"of another shape: head/kernel ({WIDTH}, 7) for ({WIDTH}, {CLASSES})" in message
  assert "\n" not in message


def test_a_long_list_is_cut(tmp_path):
  with pytest.raises(ValueError, match=r"missing: block_2/attn/proj/bias, .* and \d+ more"):
    load(tmp_path, timm_state(), like(model(depth=6)))


def test_layout_that_does_not_suit(tmp_path):
  state = timm_state() | {"blocks.0.attn.qkv.weight": np.zeros((WIDTH + 1, WIDTH), np.float32)}
  with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight of shape \(17, 16\) has not the layout"):
    load(tmp_path, state, like(model()))


def test_two_arrays_for_one_place():
  with pytest.raises(ValueError, match="both stand for x"):
    pretrained.translate({"a": np.zeros(1), "b": np.zeros(1)}, [("[ab]", "x", None)])


def test_translate_takes_the_first_rule_and_leaves_the_unknown():
  rules = [(r"w(\d)", r"block_\1/w", np.transpose), (r"w.*", r"other", None)]
  out = pretrained.translate({"w1": np.zeros((2, 3)), "wx": np.zeros(4), "odd": np.zeros(5)}, rules)
  assert {name: array.shape for name, array in out.items()} == {"block_1/w": (3, 2), "other": (4,), "odd": (5,)}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "deit.pth", "model.pt"])
def test_pickles_are_refused(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b"\x80\x04")
  with pytest.raises(ValueError, match=r"pickle.*safetensors\.torch\.save_file\(torch\.load\("):
    pretrained.load_timm(path, like(model()))


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_damaged_file(tmp_path, size):
  path = tmp_path / "model.safetensors"
  save_file(timm_state(), path)
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(ValueError, match=r"model\.safetensors' are damaged, truncated or not safetensors") as error:
    pretrained.load_timm(path, like(model()))
  assert "\n" not in str(error.value)


def test_no_such_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors': no such file"):
    pretrained.load_timm(tmp_path / "nothing.safetensors", like(model()))


def test_quantised_weights_are_refused(tmp_path):
  state = timm_state() | {"head.bias": np.zeros(CLASSES, np.int8)}
  with pytest.raises(ValueError, match=r"head\.bias is int8; valid: float64"):
    load(tmp_path, state, like(model()))
