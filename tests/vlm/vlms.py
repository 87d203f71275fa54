"""Golden data of vision-language models (shared/golden/vlm, its README says what it is)."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from tokred import tokens as tk
from tokred.nn import anyres, placeholders
from tokred.pretrained.vlm import load_vlm, open_vlm

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "vlm"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}")
TOLERANCE = 2e-4


def recorded(name):
  with np.load(GOLDEN / f"{name}.npz") as file:
    return dict(file)


@functools.cache
def found(name):
  return open_vlm(GOLDEN / "hf" / name)


@functools.cache
def parameters(name):
  return load_vlm(GOLDEN / "hf" / name)[1]


def pixels(values):
  """(B, R, 3, h, w) or (B, 3, h, w) of torch to ours."""
  values = values if values.ndim == 5 else values[:, None]
  return values.transpose(0, 1, 3, 4, 2)


def prompt(name, newline=True):
  """Recorded arguments of a model."""
  io, model = recorded(f"hf/{name}/io"), found(name)
  ids = io["input_ids"].astype(np.int32)
  if name == "qwen2_5_vl":
    inputs = anyres.frames(ids, io["pixel_values"], io["image_grid_thw"], model.tower, model.image_token)
    return io, inputs
  if name == "llava_next":
    sizes = [[tuple(size)] for size in io["image_sizes"]]
    if not newline:
      whole = anyres.crops(sizes[0][0], model.pinpoints, 24, 6, newline=False)[1]
      there = np.flatnonzero(ids[0] == model.image_token)
      ids = np.delete(ids, there[whole:], axis=1)
    slot = anyres.crop_slots(ids, sizes, model.image_token, model.pinpoints, 24, 6, newline=newline)
  else:
    slot = placeholders.slots(ids, model.image_token, 1, 36)
  return io, dict(ids=ids, images=pixels(io["pixel_values"]), slot=slot)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _forward(module, params, known, mode, inputs):
  out = module.apply({"params": params}, **inputs, known=known, mode=mode)
  return tk.restore(out.logits, out.tokens.owner), out


def forward(module, params, inputs, mode="gather"):
  """The whole sequence, with logits where the ids were."""
  known = module.known(inputs["ids"], inputs["slot"], inputs.get("mask")) if mode == "gather" else None
  return _forward(module, params, known, mode, inputs)
