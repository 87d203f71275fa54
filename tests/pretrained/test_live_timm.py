"""Random models of timm against ours, and what a name tells; skipped where timm is not installed."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import tokred
from tokred.pretrained import compare, open_source, timm
from tokred.pretrained.rules import Lazy

torch = pytest.importorskip("torch")
their = pytest.importorskip("timm")

CASES = {  # of these architectures, small ones; what timm's config.json says of sizes goes into model_args
  "vit_small_patch14_reg4_dinov2": dict(mlp_layer="packed", img_size=28, patch_size=7),
  "vit_base_patch16_siglip_224": dict(img_size=16, patch_size=4),
  "vit_so400m_patch16_siglip_gap_256": dict(img_size=16, patch_size=4, num_classes=3),
  "vit_base_patch32_clip_quickgelu_224": dict(img_size=16, patch_size=8),
  "deit3_small_patch16_224": dict(img_size=(16, 24), patch_size=8),
  "deit_tiny_distilled_patch16_224": dict(img_size=12, patch_size=4, num_classes=5),
  "vit_base_patch16_224": dict(img_size=12, patch_size=4, global_pool="avg", qk_norm=True),
}
QUICK = ("vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224")


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in CASES]
)
def test_outputs(name, tmp_path):
  fields = dict(CASES[name])
  if fields.get("mlp_layer"):
    from timm.layers import SwiGLUPacked

    fields |= dict(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU)
  torch.manual_seed(0)
  model = their.create_model(name, embed_dim=24, depth=2, num_heads=2, **fields).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.randn(parameter.shape) * (0.5 if parameter.ndim > 1 else 0.3))
  size = model.patch_embed.img_size
  save_file({n: p.numpy() for n, p in model.state_dict().items()}, tmp_path / "model.safetensors")
  cfg = dict(model.pretrained_cfg, input_size=(3, *size))
  cfg = {key: cfg.get(key) for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
  config = dict(architecture=name, global_pool=model.global_pool, model_args=dict(num_heads=2), pretrained_cfg=cfg)
  (tmp_path / "config.json").write_text(json.dumps(config))
  images = torch.randn(2, 3, *size)
  with torch.no_grad():
    wanted = model(images)
  loaded = tokred.load(tmp_path)
  assert loaded.config.data.mean == tuple(cfg["mean"])
  ours = loaded(images.numpy().transpose(0, 2, 3, 1)).logits
  np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.thorough
def test_what_a_name_tells(tmp_path, monkeypatch):
  """Of every ninth ViT that timm can make, and of the odd ones: what we read agrees, or it is refused."""
  families = {"vit", "deit", "deit3", "flexivit"}
  names = [name for name in their.list_models() if name.split("_")[0] in families][::9]
  names += ["vit_giant_patch14_dinov2", "vit_base_patch16_gap_224", "vit_large_patch16_siglip_512"]
  activations = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "SiLU": "silu"}
  read, state = 0, {}
  monkeypatch.setattr(timm, "open_safetensors", lambda path: state)
  for name in names:
    with torch.device("meta"):
      model = their.create_model(name)
    state = {n: Lazy(tuple(p.shape), np.dtype(np.float32), lambda: None) for n, p in model.state_dict().items()}
    config = dict(architecture=name, global_pool=getattr(model, "global_pool", ""), pretrained_cfg=model.pretrained_cfg)
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    try:
      (tmp_path / "model.safetensors").touch()
      source = open_source(tmp_path / "model.safetensors")
      made = tokred.build({"model": source.config({})["model"]})
      target = _shapes(made.module)
      compare(target, source.arrays(target, made.module.shape.grid, new_heads=False))
    except ValueError:
      continue
    m, block = made.config.model, model.blocks[0]
    assert (m.num_heads, m.norm_eps) == (block.attn.num_heads, block.norm1.eps), name
    assert m.activation == activations[type(block.mlp.act).__name__], name
    assert m.pool == {"token": "cls"}.get(model.global_pool, model.global_pool), name
    read += 1
  assert read >= 10


def _shapes(module):
  import jax

  return jax.eval_shape(lambda: tokred.model.init(module, 0))
