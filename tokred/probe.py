"""What a reduced model's tokens still say of every patch: segmentation by a linear classifier on frozen features.

  python -m tokred.probe --workdir=runs/segment

A patch is the class of its image where its mean intensity exceeds a threshold, and background elsewhere.  Printed are,
for the dense model and for the reduced one with its tokens brought back to the grid in two ways (see `features`), mean
intersection over union and accuracy over the patches of the evaluation split.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from tokred.data import eval_batches
from tokred.model import Model, forward
from tokred.nn.vit import Output
from tokred.tokens import Array, restore, take


def segments(images: np.ndarray, labels: np.ndarray, patch: int, threshold: float) -> np.ndarray:
  """Labels of patches, (B, P) int32: 0 is background, 1 + label the object.

  Args:
    images: (B, height, width, channels) in [0, 1], dark where nothing is; labels: (B,) their classes.
    patch: side in pixels.
    threshold: mean intensity above which a patch is foreground.
  """
  batch, height, width, channels = images.shape
  cells = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
  foreground = cells.mean((2, 4, 5)).reshape(batch, -1) > threshold
  return np.where(foreground, 1 + labels[:, None], 0).astype(np.int32)


def features(output: Output, norm: Any, eps: float, num_prefix_tokens: int) -> dict[str, Array]:
  """Frozen features of each patch, (B, P, D), by the way in which tokens go back to where they came from.

  "restored": a patch has the value of the token that represents it (`owner`); if none does, the last value that it had
  behind a block, after the final norm.  "zeros": a patch that is no token itself has zeros, merged or dropped.

  Args:
    output: of the model, with `aux`.
    norm: parameters of the final norm.
    eps: its epsilon, `config.model.norm_eps`.
    num_prefix_tokens: source tokens before the patches.
  """
  tokens, layers = output.tokens, [name for name in output.aux if name.startswith("owner/")]
  x, found = restore(tokens.x, tokens.owner), tokens.owner >= 0
  own = found & (take(tokens.position, jnp.maximum(tokens.owner, 0)) == jnp.arange(found.shape[1]))
  zeros = jnp.where(own[..., None], x, 0)
  for name in sorted(layers, key=lambda name: -int(name.split("/")[1])):
    owner = output.aux[name]
    earlier = nn.LayerNorm(epsilon=eps).apply({"params": norm}, output.aux[name.replace("owner", "tokens")])
    x = jnp.where((~found & (owner >= 0))[..., None], restore(earlier, owner), x)
    found |= owner >= 0
  return {"restored": x[:, num_prefix_tokens:], "zeros": zeros[:, num_prefix_tokens:]}


@functools.partial(jax.jit, static_argnames=("classes", "steps"))
def fit(x: Array, labels: Array, classes: int, steps: int) -> tuple[Array, Array]:
  """Softmax regression on standardised features by Adam on all examples at once, from zero: no seed is drawn.

  Args:
    x: (M, D) float32; labels: (M,) int32, below `classes`.
    steps: of the optimiser; the learning rate falls from 0.05 along a cosine.

  Returns:
    Weights (D, classes) and biases (classes,) for features as they are given.
  """
  mean, std = x.mean(0), x.std(0) + 1e-6
  z = (x - mean) / std
  optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

  def loss(params: tuple[Array, Array]) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(z @ params[0] + params[1], labels).mean()

  def step(_: Any, state: Any) -> Any:
    params, moments = state
    updates, moments = optimizer.update(jax.grad(loss)(params), moments)
    return optax.apply_updates(params, updates), moments

  params = jnp.zeros((x.shape[1], classes)), jnp.zeros(classes)
  weight, bias = jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]
  weight = weight / std[:, None]
  return weight, bias - mean @ weight


def score(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
  """{"miou", "accuracy"}: the mean over classes that occur of |both| / |either|, and the share that is right."""
  table = np.bincount(labels.ravel() * classes + predicted.ravel(), minlength=classes**2).reshape(classes, classes)
  both, either = np.diag(table), table.sum(0) + table.sum(1) - np.diag(table)
  return {"miou": float((both / np.maximum(either, 1))[either > 0].mean()), "accuracy": float(both.sum() / table.sum())}


def collect(model: Model, split: str, examples: int, threshold: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Features (M, P, D) by name and labels (M, P) of the first `examples` images (in whole batches; 0: all of them)."""
  c = model.config
  if c.model.name != "vit":
    raise ValueError(f"config.model.name={c.model.name!r} does not classify images; valid: vit")
  if c.model.final_norm != "tokens":
    raise ValueError(f"config.model.final_norm={c.model.final_norm!r} leaves no norm for single tokens; valid: tokens")
  sizes = dict(image_size=c.model.image_size, channels=c.model.channels, num_classes=c.model.num_classes)
  batches, shape = eval_batches(c.data, split, **sizes, batch_size=c.eval.batch_size), model.module.shape
  run, maps, labels = forward(model.module, model.mode, True), [], []
  place = jax.jit(lambda output, norm: features(output, norm, c.model.norm_eps, shape.num_prefix_tokens))
  for batch in itertools.islice(batches, -(-examples // c.eval.batch_size) or None):
    keep = batch["mask"]
    out = place(run(model.params, batch["image"]), model.params["norm"])
    maps.append({name: np.asarray(value, np.float32)[keep] for name, value in out.items()})
    pixels = batch["image"][keep] * np.asarray(c.data.std, np.float32) + np.asarray(c.data.mean, np.float32)
    labels.append(segments(pixels, batch["label"][keep], shape.patch, threshold))
  return {name: np.concatenate([m[name] for m in maps]) for name in maps[0]}, np.concatenate(labels)


def probe(model: Model, examples: int = 2000, threshold: float = 0.25, steps: int = 300) -> dict[str, dict[str, float]]:
  """`score` on the evaluation split by the names of `features`, learned from the first `examples` training images."""
  classes, data = 1 + model.config.model.num_classes, model.config.data
  train, labels = collect(model, data.train_split, examples, threshold)
  test, wanted = collect(model, data.eval_split, 0, threshold)
  out = {}
  for name, x in train.items():
    weight, bias = fit(x.reshape(-1, x.shape[-1]), labels.ravel(), classes, steps)
    out[name] = score(wanted, np.asarray(test[name] @ weight + bias).argmax(-1), classes)
  return out


def main(argv: Sequence[str] | None = None) -> None:
  """The command line; prints a line for each way."""
  parser = argparse.ArgumentParser(prog="python -m tokred.probe", description="Segmentation by a linear probe.")
  parser.add_argument("--workdir", required=True, help="run directory or export: what tokred.load takes")
  parser.add_argument("--examples", type=int, default=2000, help="training images; 0: all")
  parser.add_argument("--threshold", type=float, default=0.25, help="mean intensity of a foreground patch")
  flags = parser.parse_args(argv)
  import tokred  # here, since the package must not import its own command line

  try:
    if flags.examples < 0:
      raise ValueError(f"--examples={flags.examples}; valid: 0 (all of them) or more")
    reduced, dense = tokred.freeze(tokred.load(flags.workdir)), tokred.load(flags.workdir, sites={})
    rows = {"dense": probe(dense, flags.examples, flags.threshold)["restored"]}
    rows |= probe(reduced, flags.examples, flags.threshold) if reduced.module.sites.spots else {}
  except (ValueError, OSError) as error:
    sys.exit(f"tokred.probe: {error}")
  for name, row in rows.items():
    print(f"{name:8s}  mIoU {row['miou']:.4f}  patch accuracy {row['accuracy']:.4f}")


if __name__ == "__main__":
  main()
