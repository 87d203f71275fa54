"""Random models of transformers and timm against ours, there and back; skipped where they are not installed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from theirs import shapes as spelt

import tokred
from tokred.pretrained import save_huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, patch_size=4)
WIDE, SQUARE, LABELS = [12, 20], 12, dict(id2label={i: f"class {i}" for i in range(5)})
DINO = {name: size for name, size in SIZES.items() if name != "intermediate_size"} | dict(mlp_ratio=3)
CASES = {  # class, its config, image_size, changes
  "vit": ("ViTForImageClassification", "ViTConfig", WIDE, SIZES | LABELS | dict(qkv_bias=False)),
  "vit_headless": ("ViTModel", "ViTConfig", SQUARE, SIZES | dict(hidden_act="relu", num_channels=1)),
  "deit": ("DeiTForImageClassification", "DeiTConfig", WIDE, SIZES | LABELS),
  "deit_teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", SQUARE, SIZES | LABELS),
  "mae": ("ViTMAEModel", "ViTMAEConfig", SQUARE, SIZES | dict(mask_ratio=0.0)),
  "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", SQUARE, DINO | LABELS),
  "dinov2_swiglu": ("Dinov2Model", "Dinov2Config", SQUARE, DINO | dict(use_swiglu_ffn=True, num_attention_heads=3)),
  "registers": (
    "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", SQUARE,
    DINO | LABELS | dict(num_register_tokens=3, use_swiglu_ffn=True),
  ),
  "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", WIDE, SIZES | dict(num_attention_heads=3, num_register_tokens=2)),
  "dinov3_gated": (
    "DINOv3ViTModel", "DINOv3ViTConfig", SQUARE,
    SIZES | dict(use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False, rope_theta=50.0),
  ),
  "clip": ("CLIPVisionModel", "CLIPVisionConfig", SQUARE, SIZES),
  "clip_projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", SQUARE, SIZES),
  "siglip": ("SiglipVisionModel", "SiglipVisionConfig", 14, SIZES | dict(num_attention_heads=4)),
}  # fmt: skip
QUICK = ("vit", "dinov2", "registers", "dinov3", "siglip")  # the others are thorough
params = [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in CASES]


@functools.cache
def random_model(name):
  """A model with random weights everywhere, images, and its outputs."""
  kind, config_type, size, fields = CASES[name]
  torch.manual_seed(0)
  config = getattr(transformers, config_type)(image_size=size, **fields)
  model = getattr(transformers, kind)(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.randn(parameter.shape) * (0.5 if parameter.ndim > 1 else 0.3))
  sides = size if isinstance(size, list) else [size, size]
  images = torch.randn(2, config.num_channels, *sides)
  return model, images, outputs(model, images)


def outputs(model, images):
  with torch.no_grad():
    kwargs = {"noise": torch.arange(9.0).expand(2, 9)} if "MAE" in type(model).__name__ else {}
    out = model(pixel_values=images, **kwargs)
    pooled = (
      model.vision_model(pixel_values=images).pooler_output if "image_embeds" in out else out.get("pooler_output")
    )
  if "logits" in out:
    return out.logits.numpy()
  tanh = type(model).__name__ in ("ViTModel", "DeiTModel", "ViTMAEModel")  # whose pooler is another matter
  return (out.last_hidden_state[:, 0] if tanh else pooled).numpy()


def ours(model, images):
  height, width = model.config.model.image_size
  return np.asarray(model(images.numpy().transpose(0, 2, 3, 1)[:, :height, :width]).logits)


@pytest.mark.parametrize("name", params)
@pytest.mark.filterwarnings("ignore:.*is no multiple of patch_size")
def test_there_and_back(name, tmp_path):
  model, images, wanted = random_model(name)
  model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if name == "dinov2" else "1GB")
  loaded = tokred.load(tmp_path / "theirs")
  np.testing.assert_allclose(ours(loaded, images), wanted, rtol=2e-4, atol=2e-4)
  if loaded.config.model.num_classes:
    assert loaded.config.data.labels == tuple(f"class {i}" for i in range(5))
  save_huggingface(loaded, tmp_path / "back")
  kind = transformers.AutoConfig.from_pretrained(tmp_path / "back").architectures[0]
  back, report = getattr(transformers, kind).from_pretrained(tmp_path / "back", output_loading_info=True)
  missing = [key for key in report["missing_keys"] if "pooler" not in key]
  assert not missing and not report["unexpected_keys"] and not report["mismatched_keys"]
  height, width = loaded.config.model.image_size
  np.testing.assert_allclose(outputs(back.eval(), images[..., :height, :width]), wanted, rtol=2e-4, atol=2e-4)
  again = tokred.load(tmp_path / "back")
  assert jax.tree.all(jax.tree.map(np.array_equal, again.params, loaded.params))


def test_resized_positions_are_torchs(tmp_path):
  """Bicubic with antialiasing, larger and smaller, in both directions at once."""
  table = torch.randn(1, 3, 7, 9)
  for wanted in ((5, 4), (10, 13), (14, 3)):
    with torch.no_grad():
      their = torch.nn.functional.interpolate(table, size=wanted, mode="bicubic", antialias=True, align_corners=False)
    flat = table.numpy().transpose(0, 2, 3, 1).reshape(1, 63, 3)
    our = tokred.pretrained.resize.positions(flat, (7, 9), wanted)
    np.testing.assert_allclose(our, their.numpy().transpose(0, 2, 3, 1).reshape(1, -1, 3), atol=1e-5)


@pytest.mark.thorough
def test_whole_models_give_their_vision_tower(tmp_path):
  text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
  vision = SIZES | dict(image_size=12)
  for kind in ("CLIP", "Siglip"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path / kind)
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
      wanted = model.vision_model(pixel_values=images).pooler_output.numpy()
    np.testing.assert_allclose(ours(tokred.load(tmp_path / kind), images), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.thorough
def test_siglip2_and_siglip_classifiers(tmp_path):
  torch.manual_seed(0)
  config = transformers.Siglip2VisionConfig(num_patches=9, **SIZES)
  model = transformers.Siglip2VisionModel(config).eval()
  model.save_pretrained(tmp_path / "two")
  images = torch.randn(2, 3, 12, 12)
  patches = images.reshape(2, 3, 3, 4, 3, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 9, 48)
  with torch.no_grad():
    out = model(patches, torch.ones(2, 9, dtype=torch.int64), torch.tensor([[3, 3], [3, 3]]))
  np.testing.assert_allclose(ours(tokred.load(tmp_path / "two"), images), out.pooler_output, rtol=2e-4, atol=2e-4)

  config = transformers.SiglipConfig(vision_config=SIZES | dict(image_size=12), num_labels=3)
  model = transformers.SiglipForImageClassification(config).eval()
  model.save_pretrained(tmp_path / "classifier")
  loaded, wanted = tokred.load(tmp_path / "classifier"), outputs(model, images)
  np.testing.assert_allclose(ours(loaded, images), wanted, rtol=2e-4, atol=2e-4)
  save_huggingface(loaded, tmp_path / "back")
  back = transformers.SiglipForImageClassification.from_pretrained(tmp_path / "back").eval()
  np.testing.assert_allclose(outputs(back, images), wanted, rtol=2e-4, atol=2e-4)


def test_a_reduced_model_is_dense_to_transformers(tmp_path):
  _, images, wanted = random_model("vit")
  random_model("vit")[0].save_pretrained(tmp_path / "theirs")
  sites = dict(cut=dict(reducer="gumbel", layers=(1,), keep=0.5))
  reduced = save_huggingface(tokred.load(tmp_path / "theirs", sites=sites), tmp_path / "reduced")
  back = transformers.ViTForImageClassification.from_pretrained(tmp_path / "reduced").eval()
  np.testing.assert_allclose(outputs(back, images), wanted, rtol=2e-4, atol=2e-4)
  loaded = tokred.load(tmp_path / "reduced")
  assert loaded.counts == reduced.counts == (16, 8) and loaded.config == reduced.config
  np.testing.assert_array_equal(ours(loaded, images), ours(reduced, images))
  dense = dataclasses.replace(tokred.load(tmp_path / "reduced", sites={}))
  np.testing.assert_allclose(ours(dense, images), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.thorough
def test_the_names_that_other_tests_spell_out(tmp_path):
  """`theirs.shapes` against what save_pretrained writes."""
  kinds = {
    "vit": ("vit", 5), "deit": ("deit", 5), "deit_teacher": ("deit_teacher", 5), "dinov2": ("dinov2", 5),
    "registers": ("dinov2", 5), "dinov2_swiglu": ("dinov2", 0), "clip": ("clip", 0), "siglip": ("siglip", 0),
  }  # fmt: skip
  for name, (kind, head) in kinds.items():
    if isinstance(CASES[name][2], list):
      continue
    model = random_model(name)[0]
    model.save_pretrained(tmp_path / name)
    written = {n: a.shape for n, a in load_file(tmp_path / name / "model.safetensors").items()}
    assert written == spelt(kind, model.config.to_dict(), head), name
