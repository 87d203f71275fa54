"""Accuracy of a model on a split."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from tokred import cost, memory, sharding, vqa
from tokred import tokens as tk
from tokred.data import feed, to_device
from tokred.layout import walk
from tokred.model import Model
from tokred.nn.budget import Census
from tokred.nn.vit import ViT
from tokred.nn.vlm import VLM, Known


@functools.lru_cache(maxsize=8)
def eval_step(module: ViT, mode: str) -> Any:
  """Jitted (params, batch) -> sums over the examples that are not padding."""
  ragged = any(spot.ragged for spot in module.sites.spots)
  prices = {"mean_gflops": cost.flops, "mean_gmacs": cost.macs} if ragged else {}

  def step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    output = module.apply({"params": params}, batch["image"], mode=mode)
    mask = batch["mask"].astype(jnp.float32)
    best = jnp.take_along_axis(output.logits, batch["label"][:, None], axis=1)
    rank = jnp.sum(output.logits > best, axis=1)  # classes that beat the right one
    ties = (output.logits == best) & (jnp.arange(output.logits.shape[1]) < batch["label"][:, None])
    rank = rank + ties.sum(1)  # argmax takes the first of equals
    rank = jnp.where(jnp.isnan(output.logits).any(1), output.logits.shape[1], rank)  # is no answer
    loss = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch["label"])
    counts = leaving(module, output.aux) if ragged or mode == "mask" else output.counts
    return {
      "examples": mask.sum(),
      "right": ((rank < 1) * mask).sum(),
      "right_5": ((rank < 5) * mask).sum(),
      "loss": jnp.where(batch["mask"], loss, 0).sum(),
      "counts": jnp.stack([(count * mask).sum() for count in counts]),
      "sites": counts_by_site(module, output.aux, mask),
      "costs": {name: (cost.of_each(module, output.aux, price) * mask).sum() / 1e9 for name, price in prices.items()},
    }

  return jax.jit(step)


@functools.lru_cache(maxsize=8)
def answer_step(module: VLM, mode: str) -> Any:
  """Jitted (params, batch, known) -> sums over the conversations that are not padding; `known` is static."""

  def step(params: Any, batch: dict[str, jax.Array], known: Known | None) -> dict[str, jax.Array]:
    output = module.apply({"params": params}, **vqa.inputs(batch), known=known, mode=mode)
    logits = tk.restore(output.logits, output.tokens.owner)[:, :-1]
    target, counted = batch["ids"][:, 1:], batch["answer"][:, 1:] & batch["valid"][:, None]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    right = ((logits.argmax(-1) == target) | ~counted).all(1) & batch["valid"]
    seen = ((batch["slot"] >= 0).any(2) & batch["valid"][:, None]).reshape(-1).astype(jnp.float32)  # (B R,)
    return {
      "examples": batch["valid"].sum(dtype=jnp.float32),
      "right": right.sum(dtype=jnp.float32),
      "loss": jnp.where(counted, loss, 0.0).sum(),
      "answers": counted.sum(dtype=jnp.float32),
      "images": seen.sum(),
      "sites": counts_by_site(module, output.aux, seen, batch["valid"]),
    }

  return jax.jit(step, static_argnums=2)


def answers(module: VLM, params: Any, batches: Iterable[dict[str, np.ndarray]], mode: str, mesh: Any = None) -> dict:
  """Answers to questions about images, over batches of `tokred.data.conversation_batches`.

  An answer is right if every id of it is the likeliest one behind those before it: it is then what greedy decoding
  writes, and where one is not, greedy decoding writes something else.

  Args:
    module: what to run.
    params: its parameters.
    batches: that are not packed.
    mode: "gather" or "mask".
    mesh: where the batches shall lie; None: the default device.

  Returns:
    accuracy (0 to 1, exact match), loss (mean cross-entropy of an answer's ids), examples, sites (as in `run`).

  Raises:
    ValueError: there are no examples.
  """
  place = None if mesh is None else sharding.batch_sharding(mesh)
  step, sums = answer_step(module, mode), None
  for batch in batches:
    known = _known(module, batch, mesh is not None) if mode == "gather" else None
    device = next(iter(to_device([batch], place, prefetch=0)))[0]
    out = step(params, device, known)
    sums = out if sums is None else jax.tree.map(jnp.add, sums, out)
  if sums is None or not float(sums["examples"]):
    raise ValueError("the split has no examples to evaluate")
  per = {spot.label: "images" if spot in module.sites.spots else "examples" for spot in module.spots}
  return {
    "accuracy": float(sums["right"]) / float(sums["examples"]),
    "loss": float(sums["loss"]) / float(sums["answers"]),
    "examples": int(sums["examples"]),
    "sites": {name: round(float(c) / max(float(sums[per[name]]), 1.0), 2) for name, c in sums["sites"].items()},
  }


def _known(module: VLM, batch: dict[str, np.ndarray], shared: bool) -> Known:
  """Counts of the rows that are not padding; of those of all processes where a batch is `shared`.

  It is static: processes that counted their own rows would compile programs that differ.
  """
  counts = (1, -batch["ids"].shape[1], 0)  # where all is padding
  if batch["valid"].any():
    known = module.known(*(batch[name][batch["valid"]] for name in ("ids", "slot", "mask")))
    counts = (known.length, -known.census.free, known.census.text)
  if shared and jax.process_count() > 1:
    counts = multihost_utils.process_allgather(np.array(counts, np.int32)).max(0).tolist()
  length, free, text = counts
  length = -(-length // 8) * 8  # fewer lengths, fewer compilations
  return Known(length, Census(min(-free, length), text))


@memory.advice("lower config.eval.batch_size (eval.py: --batch_size)")
def run(module: ViT, params: Any, batches: Iterable[dict[str, np.ndarray]], mode: str, mesh: Any = None) -> dict:
  """Accuracy over batches.

  Args:
    module: what to run.
    params: its parameters.
    batches: dicts of image, label and mask, as `tokred.data.eval_batches` gives them.
    mode: "gather" or "mask".
    mesh: where the batches shall lie; None: the default device.

  Returns:
    accuracy (0 to 1), accuracy_top5, loss (mean cross-entropy), examples, counts (tokens leaving each block) and sites
    (tokens that each site lets through, by "<site>/<layer>"), both means over images; padding counts for nothing.
    Where images keep different numbers of tokens also mean_gflops and mean_gmacs: what they cost by their own tokens.

  Raises:
    ValueError: there are no examples.
    MemoryError: names the field that helps.
  """
  if isinstance(module, VLM):
    return answers(module, params, batches, mode, mesh)
  place = None if mesh is None else sharding.batch_sharding(mesh)
  step, sums = eval_step(module, mode), None
  for batch, _ in to_device(batches, place, prefetch=1):
    out = step(params, batch)
    sums = out if sums is None else jax.tree.map(jnp.add, sums, out)
  if sums is None or not float(sums["examples"]):
    raise ValueError("the split has no examples to evaluate")
  examples = float(sums["examples"])
  return {
    "accuracy": float(sums["right"]) / examples,
    "accuracy_top5": float(sums["right_5"]) / examples,
    "loss": float(sums["loss"]) / examples,
    "examples": int(examples),
    "counts": [round(float(c) / examples, 2) for c in sums["counts"]],
    "sites": {name: round(float(c) / examples, 2) for name, c in sums["sites"].items()},
  } | {name: float(c) / examples for name, c in sums["costs"].items()}


def counts_by_site(
  module: ViT | VLM, aux: dict[str, Any], real: jax.Array | None = None, rows: jax.Array | None = None
) -> dict[str, jax.Array]:
  """Tokens that each spot lets through, by its label, float32: of an image, or of a language model's row, text counted.

  Args:
    module: that reported.
    aux: what it reported.
    real: (images,) float32, 1 where one is no padding: sums over these; None: means over all.
    rows: (rows,) of a language model, likewise.
  """
  out = {}
  for spot in module.spots:
    alive = aux[f"reduce/{spot.site}/alive"][spot.index].astype(jnp.float32)
    counted = real if spot in module.sites.spots else rows
    out[spot.label] = alive.mean() if counted is None else (alive * counted).sum()
  return out


def leaving(module: ViT, aux: dict[str, Any]) -> tuple[Any, ...]:
  """Tokens of each image that leave each block, as its reducers reported: (B,), or a number where none came before."""
  stack = module.sites.stack
  alive = lambda spots, n: aux[f"reduce/{spots[-1].site}/alive"][spots[-1].index]
  return walk(stack.depth, module.sites.at, stack.num_tokens, alive).leaving


def evaluate(
  model: Model, split: str | None = None, batch_size: int | None = None, mode: str | None = None
) -> dict[str, Any]:
  """A model on a split of `config.data`; see `run`.  Also reports GFLOPs and GMACs of one image.

  Args:
    model: with parameters.
    split: `config.data.eval_split` where not given.
    batch_size: `config.eval.batch_size` where not given.
    mode: "gather" or "mask"; None: gather, or mask as long as a rate is learned.
  """
  if mode not in (None, "gather", "mask"):
    raise ValueError(f"mode={mode!r} is not a mode; valid: gather, mask")
  if not isinstance(model, Model):
    raise ValueError(f"{model!r} has no parameters to evaluate; export orbax or safetensors too")
  if model.params is None:
    raise ValueError("the model has no parameters: call model.init(), or get it from tokred.load")
  result = run(model.module, model.params, _batches(model, split, batch_size), mode or model.mode)
  return result | {"gflops": model.flops / 1e9, "gmacs": model.macs / 1e9}


def examples(model: Model, number: int) -> tuple[np.ndarray, np.ndarray]:
  """The first images of the evaluation split, (number, height, width, channels) as the model takes them, and labels."""
  batch = next(iter(_batches(model, None, number)))
  return batch["image"][batch["mask"]], batch["label"][batch["mask"]]


def prompts(model: Model, number: int) -> dict[str, np.ndarray]:
  """The first questions of the evaluation split as a model is asked them, of those that show `config.text.images`.

  Returns:
    ids (rows, S) int32, mask (rows, S) bool and images (rows, R, height, width, channels) float32; rows: `number`, or
    as many as there are; S: the ids of the longest question of the split.

  Raises:
    ValueError: no question shows so many images.
  """
  batches, found = _batches(model, None, number), []
  length = batches.batch_at.layout.corpus.longest_question()
  for batch in batches:
    asked = vqa.without_answer(batch)
    whole = batch["valid"] & (asked["slot"] >= 0).all((1, 2))
    rows = (asked["ids"][whole, :length], asked["mask"][whole, :length], batch["image"][whole])
    found += zip(*rows, strict=True)
    if len(found) >= number:
      break
  if not found:
    c = model.config
    raise ValueError(
      f"config.text.images={c.text.images}: no first question of config.data.eval_split={c.data.eval_split!r} shows as "
      "many; valid: the number of most"
    )
  ids, mask, images = map(np.stack, zip(*found[:number], strict=True))
  return dict(ids=ids, mask=mask, images=images)


def _batches(model: Model, split: str | None, batch_size: int | None) -> Iterable[dict[str, np.ndarray]]:
  c = model.config
  if batch_size is not None and batch_size < 1:
    raise ValueError(f"batch_size={batch_size}; valid: 1 or more, or None for config.eval.batch_size")
  return feed(c, split or c.data.eval_split, train=False, batch_size=batch_size or c.eval.batch_size)
