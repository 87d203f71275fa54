"""Names and shapes as transformers and others write them, spelt out without the tables that are tested."""

import json

import numpy as np
from safetensors.numpy import save_file

ENCODER = (
  "attention.attention.query",
  "attention.attention.key",
  "attention.attention.value",
  "attention.output.dense",
)
CLIP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
DINOV3 = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")


def shapes(kind, c, head=0):
  """All arrays of a checkpoint: {name: shape}; `c` is config.json, `head` the number of classes."""
  d, patch, channels = c["hidden_size"], c["patch_size"], c.get("num_channels", 3)
  hidden, side = c.get("intermediate_size", d * c.get("mlp_ratio", 4)), c["image_size"] // patch
  out, clip = {}, kind in ("clip", "siglip")

  def linear(name, rows, columns, bias=True):
    out.update({f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {}))

  def norm(name):
    out.update({f"{name}.weight": (d,), f"{name}.bias": (d,)})

  kernel = (d, channels, patch, patch)
  if clip:
    out |= {"embeddings.patch_embedding.weight": kernel}
    out |= {"embeddings.position_embedding.weight": (side * side + (kind == "clip"), d)}
    out |= {"embeddings.class_embedding": (d,)} if kind == "clip" else {"embeddings.patch_embedding.bias": (d,)}
    norm("post_layernorm")
    if kind == "clip":
      norm("pre_layrnorm")
  elif kind == "dinov3":
    out |= {"embeddings.cls_token": (1, 1, d), "embeddings.mask_token": (1, 1, d)}
    out |= {"embeddings.register_tokens": (1, c["num_register_tokens"], d)}
    out |= {"embeddings.patch_embeddings.weight": kernel, "embeddings.patch_embeddings.bias": (d,)}
    norm("norm")
  else:
    prefix = 2 if kind.startswith("deit") else 1
    out |= {"embeddings.cls_token": (1, 1, d), "embeddings.position_embeddings": (1, side * side + prefix, d)}
    out |= {"embeddings.patch_embeddings.projection.weight": kernel}
    out |= {"embeddings.patch_embeddings.projection.bias": (d,)}
    out |= {"embeddings.mask_token": (1, d)} if kind == "dinov2" else {}
    out |= {"embeddings.distillation_token": (1, 1, d)} if prefix == 2 else {}
    if kind == "dinov2" and c.get("num_register_tokens"):
      out |= {"embeddings.register_tokens": (1, c["num_register_tokens"], d)}
    norm("layernorm")
  for i in range(c["num_hidden_layers"]):
    block = {"dinov3": f"layer.{i}.", "clip": f"encoder.layers.{i}."}.get(
      "clip" if clip else kind, f"encoder.layer.{i}."
    )
    for name in CLIP if clip else DINOV3 if kind == "dinov3" else ENCODER:
      linear(block + name, d, d, bias=not name.endswith("attention.k_proj"))
    norms = ("layer_norm1", "layer_norm2") if clip else ("norm1", "norm2") if kind.startswith("dino") else ()
    for name in norms or ("layernorm_before", "layernorm_after"):
      norm(block + name)
    if kind.startswith("dino"):
      out |= {f"{block}layer_scale{j}.lambda1": (d,) for j in (1, 2)}
    if c.get("use_swiglu_ffn"):
      hidden = (int(d * c["mlp_ratio"] * 2 / 3) + 7) // 8 * 8
      linear(block + "mlp.weights_in", 2 * hidden, d)
      linear(block + "mlp.weights_out", d, hidden)
      continue
    names = {"dinov3": ("mlp.up_proj", "mlp.down_proj"), "dinov2": ("mlp.fc1", "mlp.fc2")}.get(kind)
    names = names or (("mlp.fc1", "mlp.fc2") if clip else ("intermediate.dense", "output.dense"))
    linear(block + names[0], hidden, d)
    linear(block + names[1], d, hidden)
    if c.get("use_gated_mlp"):
      linear(block + "mlp.gate_proj", hidden, d)
  if kind == "siglip":
    out |= {
      "head.probe": (1, 1, d),
      "head.attention.in_proj_weight": (3 * d, d),
      "head.attention.in_proj_bias": (3 * d,),
    }
    linear("head.attention.out_proj", d, d)
    norm("head.layernorm")
    linear("head.mlp.fc1", hidden, d)
    linear("head.mlp.fc2", d, hidden)
  stem = {"vit": "vit.", "deit": "deit.", "deit_teacher": "deit.", "dinov2": "dinov2."}.get(kind, "")
  if kind == "dinov2" and c.get("num_register_tokens"):
    stem = "dinov2_with_registers."
  out = {(stem if head else "") + name: shape for name, shape in out.items()}
  if head:
    names = ("cls_classifier", "distillation_classifier") if kind == "deit_teacher" else ("classifier",)
    for name in names:
      linear(name, head, d * (1 + (kind == "dinov2")))
  return out


TYPES = {
  "vit": "vit", "deit": "deit", "deit_teacher": "deit", "dinov2": "dinov2", "dinov3": "dinov3_vit",
  "clip": "clip_vision_model", "siglip": "siglip_vision_model",
}  # fmt: skip
MICRO = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=12)
MLP = dict(intermediate_size=24)


def arrays(sizes, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return {name: rng.normal(0, 0.3, size).astype(dtype) for name, size in sizes.items()}


def config(kind, fields, head=0):
  registers = kind == "dinov2" and fields.get("num_register_tokens")
  out = dict(model_type=TYPES[kind] + ("_with_registers" if registers else "")) | fields
  return out | (dict(id2label={str(i): f"kind {i}" for i in range(head)}) if head else {})


def write(directory, kind, fields, head=0, preprocessor=None, change=lambda state: state):
  """A directory of random weights; returns its arrays."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "config.json").write_text(json.dumps(config(kind, fields, head)))
  if preprocessor is not None:
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
  state = change(arrays(shapes(kind, fields, head)))
  save_file(state, directory / "model.safetensors")
  return state


def shard(directory, count=3):
  """Replaces model.safetensors by shards and their index; returns the shards' names."""
  from safetensors.numpy import load_file

  state = load_file(directory / "model.safetensors")
  names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
  places = {name: names[i % count] for i, name in enumerate(sorted(state))}
  for file in names:
    save_file({name: state[name] for name, place in places.items() if place == file}, directory / file)
  (directory / "model.safetensors").unlink()
  index = {"metadata": {"total_size": 0}, "weight_map": places}
  (directory / "model.safetensors.index.json").write_text(json.dumps(index))
  return names
