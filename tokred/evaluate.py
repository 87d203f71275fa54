"""Accuracy of a model on a split."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokred import sharding
from tokred.data import eval_batches, to_device
from tokred.model import Model
from tokred.nn.vit import ViT


@functools.lru_cache(maxsize=8)
def eval_step(module: ViT, mode: str) -> Any:
  """Jitted (params, batch) -> sums over the examples that are not padding."""

  def step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    output = module.apply({"params": params}, batch["image"], mode=mode)
    mask = batch["mask"].astype(jnp.float32)
    right = (output.logits.argmax(-1) == batch["label"]).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch["label"])
    counts = jnp.stack([jnp.asarray(c, jnp.float32) for c in output.counts])
    return {
      "examples": mask.sum(),
      "right": (right * mask).sum(),
      "loss": jnp.where(batch["mask"], loss, 0).sum(),
      "counts": counts,
    }

  return jax.jit(step)


def run(module: ViT, params: Any, batches: Iterable[dict[str, np.ndarray]], mode: str, mesh: Any = None) -> dict:
  """Accuracy over batches.

  Args:
    module: what to run.
    params: its parameters.
    batches: dicts of image, label and mask, as `tokred.data.eval_batches` gives them.
    mode: "gather" or "mask".
    mesh: where the batches shall lie; None: the default device.

  Returns:
    accuracy (0 to 1), loss (mean cross-entropy), examples, and counts (tokens leaving each block, over batches).

  Raises:
    ValueError: there are no examples.
  """
  place = None if mesh is None else sharding.batch_sharding(mesh)
  step, sums, steps = eval_step(module, mode), None, 0
  for batch, _ in to_device(batches, place, prefetch=1):
    out = step(params, batch)
    sums = out if sums is None else jax.tree.map(jnp.add, sums, out)
    steps += 1
  if not steps or not float(sums["examples"]):
    raise ValueError("the split has no examples to evaluate")
  examples = float(sums["examples"])
  return {
    "accuracy": float(sums["right"]) / examples,
    "loss": float(sums["loss"]) / examples,
    "examples": int(examples),
    "counts": [round(float(c) / steps, 2) for c in sums["counts"]],
  }


def evaluate(model: Model, split: str | None = None, batch_size: int | None = None) -> dict[str, Any]:
  """A model on a split of `config.data`; see `run`.  Also reports GFLOPs and GMACs of one image."""
  if model.params is None:
    raise ValueError("the model has no parameters: call model.init(), or get it from tokred.load")
  result = run(model.module, model.params, _batches(model, split, batch_size), model.mode)
  return result | {"gflops": model.flops / 1e9, "gmacs": model.macs / 1e9}


def examples(model: Model, number: int) -> tuple[np.ndarray, np.ndarray]:
  """The first images of the evaluation split, (number, height, width, channels) as the model takes them, and labels."""
  batch = next(iter(_batches(model, None, number)))
  return batch["image"][batch["mask"]], batch["label"][batch["mask"]]


def _batches(model: Model, split: str | None, batch_size: int | None) -> Iterable[dict[str, np.ndarray]]:
  c = model.config
  return eval_batches(
    c.data,
    split or c.data.eval_split,
    image_size=c.model.image_size,
    channels=c.model.channels,
    num_classes=c.model.num_classes,
    batch_size=batch_size or c.eval.batch_size,
  )
