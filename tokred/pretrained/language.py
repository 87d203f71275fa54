"""Language models in the layout of Hugging Face transformers: Llama, Qwen2, 2.5 and 3, alone or inside a VLM."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tokred.config import nearest
from tokred.nn import decoder
from tokred.nn.decoder_layer import Shape
from tokred.nn.rope import ROPES, Rope
from tokred.pretrained.arrays import open_directory, read_description
from tokred.pretrained.huggingface import ACTIVATIONS
from tokred.pretrained.rules import MATRIX, Layout, Row, from_heads, merge, reading, to_heads, translate
from tokred.pretrained.source import strip
from tokred.sharding import DEFAULT_RULES, abstract_sharded

PREFIXES = ("model.", "language_model.", "module.")
IGNORED = (
  r".*rotary_emb\.inv_freq", r"(vision_tower|vision_model|visual|multi_modal_projector|connector)\..*",
  r"image_newline",
)  # fmt: skip

HEAD, TABLE = "lm_head.weight", "embed_tokens.weight"
_LLAMA = dict(  # what config.json means where it is silent
  vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
  num_key_value_heads=None, head_dim=None, max_position_embeddings=2048, rms_norm_eps=1e-6, hidden_act="silu",
  attention_bias=False, mlp_bias=False, tie_word_embeddings=False, rope_theta=10_000.0,
)  # fmt: skip
_QWEN2 = _LLAMA | dict(
  vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768
)
_QWEN2_VL = _QWEN2 | dict(
  vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
  num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, mrope_section=(16, 24, 24),
)  # fmt: skip
FAMILIES: dict[str, Mapping[str, Any]] = {
  "llama": _LLAMA,
  "qwen2": _QWEN2,
  "qwen3": _QWEN2 | dict(head_dim=128),
  "qwen2_vl_text": _QWEN2_VL,
  "qwen2_5_vl_text": _QWEN2_VL,
}
WHOLE = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}  # older files have no text_config


@dataclasses.dataclass(frozen=True)
class Language:
  """A language model that lies in files."""

  path: str
  shape: Shape
  state: Mapping[str, Any]  # arrays by their names, without prefixes

  def arrays(self) -> dict[str, Any]:
    """The arrays by our paths; nothing is read yet."""
    return translate(self.state, reading(rows(self.shape)))


def open_language(path: str | os.PathLike[str]) -> Language:
  """The language model of a directory, or of the VLM that lies there; nothing but headers is read, and a tied head.

  Raises:
    FileNotFoundError: no config.json, or no weights, or a shard that is not there.
    ValueError: damaged files, or an architecture that tokred does not have.
  """
  directory = Path(path)
  config, file = read_description(directory)
  state = strip(open_directory(directory), PREFIXES, IGNORED)
  shape = with_own_head(read_shape(config, file), state)
  if shape.tied:
    state.pop(HEAD, None)
  return Language(str(directory), shape, state)


def with_own_head(shape: Shape, state: Mapping[str, Any], prefix: str = "") -> Shape:
  """The shape with a head of its own where a config.json ties it, but the files have one that is not the table.

  So transformers reads them, and only so are all arrays used; both are read here where both are there.
  """
  head, table = state.get(prefix + HEAD), state.get(prefix + TABLE)
  if not shape.tied or head is None or table is None or np.array_equal(head.read(), table.read()):
    return shape
  return dataclasses.replace(shape, tied=False)


def load_language(
  path: str | os.PathLike[str],
  sites: Mapping[str, Any] | None = None,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  attention: str = "auto",
  mesh: Mesh | None = None,
) -> tuple[decoder.Decoder, dict[str, Any]]:
  """Module and parameters of a directory.

  Args:
    path: a directory in the layout of transformers, of a language model or of a VLM that has one.
    sites: `config.sites` of the stack "llm".
    dtype: of activations.
    param_dtype: of parameters.
    attention: auto, matmul or fused.
    mesh: where parameters shall lie, each device getting its own part; None: on one device.

  Raises:
    FileNotFoundError, ValueError: see `open_language`; or arrays that do not fit, both sides listed.
  """
  found = open_language(path)
  module = decoder.make(found.shape, sites, dtype=dtype, param_dtype=param_dtype, attention=attention)
  target = abstract(module, mesh)
  try:
    return module, merge(target, found.arrays())
  except ValueError as error:
    raise ValueError(f"weights {found.path!r} do not fit their config.json: {error}") from None


def abstract(module: decoder.Decoder, mesh: Mesh | None = None) -> Any:
  """The parameters of a decoder as `jax.ShapeDtypeStruct`, with shardings where there is a mesh."""
  known = decoder.Census(0, 2)
  init = lambda: module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), known=known, mode="mask")["params"]
  return jax.eval_shape(init) if mesh is None else abstract_sharded(init, mesh=mesh, rules=DEFAULT_RULES)


def read_shape(config: Mapping[str, Any], where: str = "config.json") -> Shape:
  """Sizes from a config.json, of a language model or of a model that has one.

  Raises:
    ValueError: an architecture or a field that tokred does not have; names both.
  """
  kind, own = str(config.get("model_type")), config.get("text_config") or config.get("llm_config")
  if isinstance(own, Mapping):
    kind = str(own.get("model_type") or WHOLE.get(kind, "llama"))
  kind = WHOLE.get(kind, kind)
  if kind not in FAMILIES:
    raise ValueError(
      f"{where}: model_type={kind!r} is not a language model that tokred knows; {nearest(kind, FAMILIES)}"
    )
  given = {**(own if isinstance(own, Mapping) else config)}
  if config.get("tie_word_embeddings"):  # transformers 5 says it here alone, whatever stands in text_config
    given["tie_word_embeddings"] = True
  c = {**FAMILIES[kind], **given}
  if c.get("use_sliding_window") and "sliding_attention" in c.get("layer_types", ("sliding_attention",)):
    raise ValueError(f"{where}: use_sliding_window=true is not supported; valid: false")
  if c["hidden_act"] not in ACTIVATIONS:
    raise ValueError(f"{where}: hidden_act={c['hidden_act']!r} is unknown; {nearest(c['hidden_act'], ACTIVATIONS)}")
  for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
    if not isinstance(c[field], int) or c[field] < 1:
      raise ValueError(f"{where}: {field}={c[field]!r}; valid: a positive integer")
  heads, head_dim = c["num_attention_heads"], c["head_dim"]
  if head_dim is None:
    head_dim, rest = divmod(c["hidden_size"], heads)
    if rest:
      raise ValueError(f"{where}: num_attention_heads={heads} does not divide hidden_size={c['hidden_size']}")
  qwen2 = kind.startswith("qwen2")
  return Shape(
    vocab=c["vocab_size"], width=c["hidden_size"], depth=c["num_hidden_layers"], mlp_dim=c["intermediate_size"],
    num_heads=heads, num_kv_heads=c["num_key_value_heads"] or heads, head_dim=head_dim,
    norm_eps=c["rms_norm_eps"], rope=read_rope(c, head_dim, where), qkv_bias=qwen2 or bool(c["attention_bias"]),
    proj_bias=not qwen2 and bool(c["attention_bias"]), mlp_bias=kind == "llama" and bool(c["mlp_bias"]),
    qk_norm=kind == "qwen3", tied=bool(c["tie_word_embeddings"]), activation=ACTIVATIONS[c["hidden_act"]],
    max_length=c["max_position_embeddings"],
  )  # fmt: skip


def read_rope(c: Mapping[str, Any], head_dim: int, where: str = "config.json") -> Rope:
  """Rotary positions, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

  Raises:
    ValueError: a rope_type that tokred does not have, or one that lacks its numbers.
  """
  p = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
  kind = p.get("rope_type", p.get("type", "default"))
  sections = tuple(p.get("mrope_section") or c.get("mrope_section") or ())
  kind = "default" if kind == "mrope" and sections else kind
  if kind not in ROPES:
    raise ValueError(f"{where}: rope_type={kind!r} is not supported; {nearest(str(kind), ROPES)}")
  names = dict(
    factor="factor", low="low_freq_factor", high="high_freq_factor", original="original_max_position_embeddings"
  )
  wanted = {"default": (), "linear": ("factor",), "llama3": tuple(names)}[kind]
  if lacking := [names[field] for field in wanted if names[field] not in p]:
    raise ValueError(f"{where}: rope_type={kind!r} needs {', '.join(lacking)}")
  if (share := c.get("partial_rotary_factor", p.get("partial_rotary_factor", 1.0))) != 1.0:
    raise ValueError(f"{where}: partial_rotary_factor={share!r} is not supported; valid: 1.0")
  rope = Rope(float(p.get("rope_theta", c["rope_theta"])), kind, **{f: p[names[f]] for f in wanted}, sections=sections)
  try:
    rope.frequencies(head_dim)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None
  return rope


def rows(shape: Shape) -> tuple[Row, ...]:
  """The table: names without prefixes."""
  theirs, ours = "layers.{}.", "block_{}/"
  attn, to = theirs + "self_attn.", ours + "attn/"
  own = (_queries(shape), to_heads(shape.num_kv_heads, 1), to_heads(shape.num_kv_heads, 1))
  return (
    Row(TABLE, "embed/embedding"),
    *(
      Row(f"{attn}{name}_proj.{kind}", f"{to}qkv/{leaf}[{i}/3]", layout)
      for i, (name, layout) in enumerate(zip("qkv", own, strict=True))
      for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
    ),
    Row(attn + "o_proj.weight", to + "proj/kernel", from_heads(shape.num_heads)),
    Row(attn + "o_proj.bias", to + "proj/bias"),
    *(Row(f"{attn}{which}_norm.weight", f"{to}{which}_norm/scale") for which in "qk"),
    Row(theirs + "input_layernorm.weight", ours + "norm1/scale"),
    Row(theirs + "post_attention_layernorm.weight", ours + "norm2/scale"),
    *(
      row
      for name, leaf in (("gate", "gate"), ("up", "fc1"), ("down", "fc2"))
      for row in (
        Row(f"{theirs}mlp.{name}_proj.weight", f"{ours}mlp/{leaf}/kernel", MATRIX),
        Row(f"{theirs}mlp.{name}_proj.bias", f"{ours}mlp/{leaf}/bias"),
      )
    ),
    Row("norm.weight", "norm/scale"),
    Row(HEAD, "head/kernel", MATRIX),
  )


def _queries(shape: Shape) -> Layout:
  """(heads G d[, D]) <-> ([D, ]G, heads, d): those that share a key stand in a row in their files."""
  group = shape.num_heads // shape.num_kv_heads

  def read(w: np.ndarray) -> np.ndarray:
    return w.T.reshape(*w.shape[1:], shape.num_kv_heads, group, shape.head_dim).swapaxes(-3, -2)

  def write(w: np.ndarray) -> np.ndarray:
    return w.swapaxes(-3, -2).reshape(*w.shape[:-3], -1).T

  return Layout(read, write)


__all__ = ["FAMILIES", "IGNORED", "Language", "abstract", "load_language", "open_language", "read_shape", "rows"]
