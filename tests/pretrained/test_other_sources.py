"""timm's directories and files, .npz files of vision_transformer and big_vision, names on Hugging Face."""

import json

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import theirs
from flax import linen as nn
from safetensors.numpy import save_file

import tokred
from configs import finetune
from tokred import loading
from tokred.config import complete
from tokred.pretrained import open_source

D, H, PATCH, SIDE = 16, 2, 4, 3


def timm(**more):
  shapes = {
    "cls_token": (1, 1, D),
    "pos_embed": (1, SIDE * SIDE + 1, D),
    "patch_embed.proj.weight": (D, 3, PATCH, PATCH),
  }
  shapes |= {"patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,)}
  shapes |= {"head.weight": (5, D), "head.bias": (5,)}
  linear = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (24, D), "mlp.fc2": (D, 24), "norm1": (D,)}
  for i in range(2):
    for name, shape in (linear | {"norm2": (D,)}).items():
      shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
  return theirs.arrays(shapes | more)


def test_a_timm_directory(tmp_path):
  save_file(timm(), tmp_path / "model.safetensors")
  config = dict(
    architecture="vit_small_patch4_12",
    model_args=dict(num_heads=4),
    pretrained_cfg=dict(input_size=[3, 12, 12], mean=[0.1] * 3, std=[0.2] * 3, interpolation="bicubic", crop_pct=0.9,
                        label_names=["a", "b", "c", "d", "e"]),
  )  # fmt: skip
  (tmp_path / "config.json").write_text(json.dumps(config))
  for path in (tmp_path, tmp_path / "model.safetensors"):
    model = tokred.load(path)
    m, data = model.config.model, model.config.data
    assert (m.num_heads, m.mlp_dim, m.image_size, m.norm_eps) == (4, 24, (12, 12), 1e-6)
    assert (data.mean, data.std, data.resize) == ((0.1,) * 3, (0.2,) * 3, "bicubic")
    assert data.crop_fraction == 0.9 and data.labels == tuple("abcde")
  config |= dict(architecture="vit_small_patch16_clip_quickgelu_224", model_args={})  # six heads do not divide 16
  (tmp_path / "config.json").write_text(json.dumps(config))
  m = tokred.load(tmp_path, model=dict(num_heads=8)).config.model
  assert (m.activation, m.norm_eps, m.num_heads) == ("quick_gelu", 1e-5, 8)


def test_a_norm_behind_pooling_is_of_the_token_where_timm_says_so(tmp_path):
  state = timm()
  state |= {name.replace("norm.", "fc_norm."): state.pop(name) for name in ("norm.weight", "norm.bias")}
  save_file(state, tmp_path / "model.safetensors")
  for told, pool in (("token", "cls"), ("avg", "avg"), (None, "avg")):
    args = dict(num_heads=4, act_layer="relu")  # what is said of the activation goes before the name
    config = dict(architecture="vit_small_patch4_12", model_args=args, global_pool=told)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = tokred.load(tmp_path).config.model
    assert (model.pool, model.final_norm, model.activation) == (pool, "pooled", "relu")


def test_what_a_bare_file_does_not_tell_is_asked_for(tmp_path):
  save_file(timm(), tmp_path / "vit.safetensors")
  with pytest.raises(ValueError, match=r"does not tell config.model.num_heads; give it: model={'num_heads': ...}"):
    tokred.load(tmp_path / "vit.safetensors")
  state = timm(pos_embed=(1, 2 * 5 + 1, D))
  save_file(state, tmp_path / "wide.safetensors")
  with pytest.raises(ValueError, match=r"model={'image_size': ..., 'num_heads': ...}"):
    tokred.load(tmp_path / "wide.safetensors")
  model = tokred.load(tmp_path / "wide.safetensors", model=dict(num_heads=H, image_size=(8, 20)))
  np.testing.assert_array_equal(model.params["pos_embed"], state["pos_embed"])
  state = timm(pos_embed=(1, 2 * 4 + 1, D))  # could be 3 x 3 without a position for CLS
  save_file(state, tmp_path / "wide.safetensors")
  model = tokred.load(tmp_path / "wide.safetensors", model=dict(num_heads=H, image_size=(8, 16)))
  np.testing.assert_array_equal(model.params["pos_embed"], state["pos_embed"])


def test_a_variant_tells_the_heads_of_its_own_width_alone(tmp_path):
  """mu is the nearest to a width of 16, but 32 wide: its 2 heads say nothing of this file."""
  save_file(timm(), tmp_path / "vit.safetensors")
  message = r"num_heads \(its width is 16, that of variant='mu/4' is not\); give it: model={'num_heads': ...}"
  with pytest.raises(ValueError, match=message):
    tokred.load(tmp_path / "vit.safetensors", model=dict(variant="mu/4"))
  model = tokred.load(tmp_path / "vit.safetensors", model=dict(variant="mu/4", num_heads=4))
  assert model.module.shape.num_heads == 4
  wide = {"patch_embed.proj.weight": (32, 3, PATCH, PATCH)}  # of which no more is read
  save_file(timm(**wide), tmp_path / "wide.safetensors")
  config = open_source(tmp_path / "wide.safetensors").config(dict(variant="mu/4"))
  assert complete(config).model.num_heads == 0  # as the variant says


def test_the_recipe_asks_for_what_a_bare_file_does_not_tell(tmp_path):
  save_file(timm(pos_embed=(1, 2 * 5 + 1, D)), tmp_path / "wide.safetensors")
  ask = f"init={tmp_path / 'wide.safetensors'},dataset=digits,method=dense"
  with pytest.raises(ValueError, match=r"model={'image_size': ..., 'num_heads': ...}"):
    finetune.get_config(ask)
  config = finetune.get_config(f"{ask},image_size=12,num_heads=4")
  assert (config.model.num_heads, config.model.image_size, config.model.width) == (4, (12, 12), D)


def test_gated_mlps_and_attention_pooling_of_timm(tmp_path):
  more = {"attn_pool.latent": (1, 1, D), "attn_pool.kv.weight": (2 * D, D), "attn_pool.kv.bias": (2 * D,)}
  for name, rows, columns in (("q", D, D), ("proj", D, D), ("mlp.fc1", 24, D), ("mlp.fc2", D, 24)):
    more |= {f"attn_pool.{name}.weight": (rows, columns), f"attn_pool.{name}.bias": (rows,)}
  more |= {"attn_pool.norm.weight": (D,), "attn_pool.norm.bias": (D,), "pos_embed": (1, SIDE * SIDE, D)}
  more |= {
    f"blocks.{i}.mlp.fc1.{leaf}": (48, D)[: 2 - (leaf == "bias")] for i in range(2) for leaf in ("weight", "bias")
  }
  state = timm(**more)
  del state["cls_token"]
  save_file(state, tmp_path / "vit.safetensors")
  model = tokred.load(tmp_path / "vit.safetensors", model=dict(num_heads=H))
  m = model.config.model
  assert (m.pool, m.mlp, m.activation, m.mlp_dim, m.class_token) == ("map", "gated", "silu", 24, False)
  block, pool = model.params["block_1"], model.params["pool"]["attn"]
  np.testing.assert_array_equal(block["mlp"]["gate"]["kernel"], state["blocks.1.mlp.fc1.weight"][:24].T)
  np.testing.assert_array_equal(block["mlp"]["fc1"]["bias"], state["blocks.1.mlp.fc1.bias"][24:])
  np.testing.assert_array_equal(pool["value"]["kernel"].reshape(D, D), state["attn_pool.kv.weight"][D:].T)
  np.testing.assert_array_equal(pool["key"]["bias"].reshape(D), state["attn_pool.kv.bias"][:D])


class Block(nn.Module):
  """A block as flax modules of big_vision stand in it, written from its names."""

  first: tuple[str, str, str]

  @nn.compact
  def __call__(self, x):
    attention, norm, mlp = self.first
    y = nn.LayerNorm(name="LayerNorm_0")(x)
    x = x + nn.MultiHeadDotProductAttention(H, name=attention)(y, y)
    return x + Mlp(name=mlp)(nn.LayerNorm(name=norm)(x))


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = nn.gelu(nn.Dense(24)(x))  # Dense_0
    return nn.Dense(D)(h)


class Pool(nn.Module):
  @nn.compact
  def __call__(self, x):
    probe = self.param("probe", nn.initializers.normal(1.0), (1, 1, D))
    x = nn.MultiHeadDotProductAttention(H)(jax.numpy.tile(probe, (x.shape[0], 1, 1)), x)
    return (x + Mlp(name="MlpBlock_0")(nn.LayerNorm()(x)))[:, 0]


class Encoder(nn.Module):
  first: tuple[str, str, str]
  cls: bool

  @nn.compact
  def __call__(self, x):
    if self.cls:
      x = x + self.param("posembed", nn.initializers.normal(1.0), (1, x.shape[1], D))
    for i in range(2):
      x = Block(self.first, name=f"encoderblock_{i}")(x)
    return nn.LayerNorm(name="encoder_norm")(x)


class Flax(nn.Module):
  """ViT of vision_transformer (`cls`), or the image tower of SigLIP."""

  cls: bool

  @nn.compact
  def __call__(self, images):
    x = nn.Conv(D, (PATCH, PATCH), (PATCH, PATCH), "VALID", name="embedding")(images)
    x = x.reshape(x.shape[0], -1, D)
    if self.cls:
      token = self.param("cls", nn.initializers.normal(1.0), (1, 1, D))
      x = jax.numpy.concatenate([jax.numpy.tile(token, (x.shape[0], 1, 1)), x], 1)
      names = ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
      return nn.Dense(5, name="head")(Encoder(names, True, name="Transformer")(x)[:, 0])
    x = x + self.param("pos_embedding", nn.initializers.normal(1.0), (1, x.shape[1], D))
    names = ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
    return Pool(name="MAPHead_0")(Encoder(names, False, name="Transformer")(x))


def flat_npz(module, images):
  """Random parameters, and their names as these libraries save them."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes)
  names = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  rename = {"Transformer/posembed": "Transformer/posembed_input/pos_embedding"}
  return params, {rename.get(name, name): leaf for name, leaf in names.items()}


@pytest.mark.parametrize("cls", [True, False], ids=["augreg", "siglip"])
def test_npz(cls, tmp_path):
  images = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
  module = Flax(cls)
  params, state = flat_npz(module, images)
  wanted = jax.jit(module.apply)({"params": params}, images)
  if not cls:  # both towers, as SigLIP is saved, with the layers of a scan
    blocks = {n.split("encoderblock_0")[1] for n in state if "encoderblock_0" in n}
    for leaf in blocks:
      layers = [state.pop(f"Transformer/encoderblock_{i}{leaf}") for i in range(2)]
      state[f"Transformer/encoderblock{leaf}"] = np.stack(layers)
    state = {f"params/img/{name}": a for name, a in state.items()}
    state |= {"params/txt/Embed_0/embedding": np.zeros((4, 4), np.float32), "params/t": np.zeros(1, np.float32)}
  np.savez(tmp_path / "model.npz", **state)
  model = tokred.load(tmp_path / "model.npz")
  np.testing.assert_allclose(model(images).logits, wanted, rtol=1e-4, atol=1e-4)
  m = model.config.model
  assert (m.activation, m.pool, m.num_heads) == ("gelu_tanh", "cls" if cls else "map", H)


def test_npz_of_bfloat16_and_of_objects(tmp_path):
  _, state = flat_npz(Flax(True), np.zeros((1, 12, 12, 3), np.float32))
  np.savez(tmp_path / "low.npz", **{name: a.astype(ml_dtypes.bfloat16).view("V2") for name, a in state.items()})
  low = tokred.load(tmp_path / "low.npz").params["head"]["kernel"]
  np.testing.assert_array_equal(low, state["head/kernel"].astype(ml_dtypes.bfloat16).astype(np.float32))
  np.savez(tmp_path / "objects.npz", **state | {"cls": np.array([{"a": 1}], object)})
  with pytest.raises(ValueError, match=r"objects.npz': cls is a pickled object, which can run code"):
    open_source(tmp_path / "objects.npz")
  whole = (tmp_path / "low.npz").read_bytes()
  (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=r"cut.npz' are damaged, truncated or not .npz"):
    open_source(tmp_path / "cut.npz")
  np.savez(tmp_path / "other.npz", weight=np.zeros(3, np.float32))
  with pytest.raises(ValueError, match=r"other.npz holds no ViT of big_vision; it starts with weight"):
    open_source(tmp_path / "other.npz")


def test_a_name_is_fetched_and_a_path_wins(tmp_path, monkeypatch):
  asked = []

  def snapshot_download(name, allow_patterns):
    asked.append((name, allow_patterns))
    return str(tmp_path / "cached")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  monkeypatch.chdir(tmp_path)
  theirs.write(tmp_path / "cached", "vit", theirs.MICRO | theirs.MLP, 3)
  model = tokred.load("google/vit-base-patch16-224")
  assert model.params["head"]["kernel"].shape == (16, 3)
  (name, patterns), *_ = asked
  assert name == "google/vit-base-patch16-224" and not any("bin" in p or "*.*" in p for p in patterns)
  assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"} <= set(patterns)  # a LLaVA speaks by its own
  assert loading.read_config("google/vit-base-patch16-224").model.num_classes == 3
  asked.clear()
  theirs.write(tmp_path / "google" / "vit-base-patch16-224", "vit", theirs.MICRO | theirs.MLP, 4)
  assert tokred.load("google/vit-base-patch16-224").params["head"]["kernel"].shape == (16, 4) and not asked


@pytest.mark.parametrize("error", ["OfflineModeIsEnabled", "LocalEntryNotFoundError"])
def test_a_name_that_cannot_be_fetched(error, tmp_path, monkeypatch):
  def snapshot_download(*args, **kwargs):
    raise getattr(huggingface_hub.errors, error)("no\nnetwork")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  monkeypatch.chdir(tmp_path)
  message = (
    rf"'who/knows' does not exist here, and Hugging Face does not give it \({error}: no network\); check the name"
  )
  with pytest.raises(FileNotFoundError, match=message):
    tokred.load("who/knows")
