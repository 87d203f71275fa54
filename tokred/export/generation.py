"""A vision-language model as StableHLO: encoder, prefill and decode step, at one or more counts of image tokens.

The folder holds the weights once, in safetensors; for each count of image tokens three functions that take them as
arguments:

  encoder  (weights, images, slot) -> visual tokens, who of them is there, where each stands in the prompt
  prefill  (weights, ids, mask, slot, visual tokens, ...) -> logits of what follows, the cache's arrays
  decode   (weights, token, the cache's arrays) -> logits of what follows, the cache's arrays

All shapes are fixed: prompts are padded, and every row shows as many images as were told.  `open_generation` runs them
without the model's code; `python -m tokred.export.generation DIRECTORY FILE.npz` does so in a process of its own,
and prints the tokens by count as JSON.  `words.json` is the tokenizer of a model that learned its words from its data.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export as jax_export
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

import tokred
from tokred import files, run_dir
from tokred.config import complete, nearest
from tokred.export.folder import LANGUAGE_CARD as CARD
from tokred.export.folder import WEIGHTS, ExportError, check_replaceable, in_fresh_process, replacing
from tokred.export.functions import PLATFORMS, check_platform, here
from tokred.model import Model, Reader, build, freeze
from tokred.nn import generate
from tokred.tokens import Tokens

PARTS = ("encoder", "prefill", "decode")


def save_generation(
  models: Reader | Sequence[Reader],
  directory: str | os.PathLike[str],
  *,
  prompt_length: int,
  max_new_tokens: int,
  images: int = 1,
  batch_size: int = 1,
  platforms: Sequence[str] | None = None,
  prompts: dict[str, np.ndarray] | None = None,
  words: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
  """Freezes and writes a model at the counts of image tokens that its variants have.

  Args:
    models: one, or several that have the same parameters and leave different counts of an image.
    directory: must not exist, or be an export, which is replaced.
    prompt_length: ids of a prompt, placeholders among them; shorter ones are padded.
    max_new_tokens: that a continuation may have.
    images: of a prompt.
    batch_size: rows.
    platforms: of "cpu", "cuda", "rocm", "tpu"; None: this one.
    prompts: ids (batch, tokens) and images to compare greedy tokens with, in a fresh process, before the folder takes
      its name; also mask, if not all ids are there.  Functions for other platforms alone are not compared.
    words: file of `data.tokenizers.WordTokenizer` that the ids come from; the folder gets a copy.

  Returns:
    The card: what the file generation.json says.

  Raises:
    ValueError: an argument out of its range, models that do not go together, or a directory that holds something else.
    ExportError: the directory cannot be written, or its functions write other tokens than the model.
  """
  models = [models] if isinstance(models, Model) else list(models)
  if not models or any(not isinstance(model, Reader) or model.params is None for model in models):
    raise ValueError(f"models {models}; valid: one or more vision-language models with parameters")
  frozen = {_left(model): model for model in map(_frozen, models)}
  _check(models, frozen, directory, prompt_length, max_new_tokens, images, batch_size, platforms)
  first = next(iter(frozen.values()))
  weights = {name: np.asarray(a) for name, a in traverse_util.flatten_dict(first.params, sep="/").items()}
  s = first.module.tower.shape
  card = dict(
    tokred=tokred.__version__, counts=sorted(frozen), prompt_length=prompt_length, max_new_tokens=max_new_tokens,
    images=images, batch_size=batch_size, patches=s.num_patches, image_token=first.module.image_token,
    image_size=list(first.config.model.image_size), channels=s.channels, vocab=first.module.llm.shape.vocab,
    platforms=list(platforms or [here()]),
    config={count: model.config.to_dict() for count, model in frozen.items()}, cache_bytes={},
  )  # fmt: skip
  with replacing(Path(directory).absolute()) as temporary:
    save_file(weights, temporary / WEIGHTS, {"format": "tokred"})
    (temporary / WEIGHTS).chmod(0o644)
    for count, model in frozen.items():
      functions, card["cache_bytes"][count] = _functions(model, card, weights, platforms)
      (temporary / str(count)).mkdir()
      for name, function in functions.items():
        (temporary / str(count) / f"{name}.stablehlo").write_bytes(function)
    card = json.loads(json.dumps(card, default=list))
    files.write_json(temporary / CARD, card)
    if words is not None:
      shutil.copyfile(words, temporary / run_dir.WORDS)
    files.write_manifest(temporary)
    if prompts is not None and here() in card["platforms"]:
      write = lambda model: model.write(prompts["ids"], prompts["images"], prompts.get("mask"), max_new_tokens)
      _compare(temporary, prompts, {count: np.asarray(write(model).tokens) for count, model in frozen.items()})
  return card


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Generation:
  """What a folder holds, ready to run; `tokred.predict.answer` asks it in words."""

  card: dict[str, Any]
  config: ConfigDict  # of the model that was exported; `config.text.tokenizer` is the folder's where that has one
  weights: dict[str, jax.Array]
  functions: dict[int, dict[str, Callable[..., Any]]]  # by image tokens

  def __repr__(self) -> str:
    c = self.card
    return f"Generation(image tokens: {c['counts']} of {c['patches']}, prompts of {c['prompt_length']} ids)"

  def write(
    self,
    ids: Any,
    images: Any,
    mask: Any = None,
    *,
    count: int = 0,
    max_new_tokens: int = 0,
    stop_tokens: Sequence[int] = (),
  ) -> generate.Generated:
    """Continues prompts greedily.

    Args:
      ids: (B, S) int32 with a placeholder for each patch, B and S at most as exported.
      images: (B, R, height, width, channels) float32, normalised.
      mask: (B, S), nonzero where there is a token.  None: everywhere.
      count: image tokens that are left of an image; 0: the most that there are.
      max_new_tokens: at most; 0: as many as exported.
      stop_tokens: ids at which a row ends.

    Returns:
      What `Reader.write` returns, in numpy arrays.

    Raises:
      ValueError: what the functions do not take.
    """
    c, rows = self.card, len(ids)
    count, new = count or c["counts"][-1], max_new_tokens or c["max_new_tokens"]
    if count not in self.functions:
      raise ValueError(f"count={count}: no such count of image tokens; valid: {', '.join(map(str, c['counts']))}")
    generate.check(new, 0.0, 1.0, stop_tokens, 0)
    if new > c["max_new_tokens"]:
      raise ValueError(f"max_new_tokens={new}; valid: 1 to {c['max_new_tokens']}")
    ids, mask, images, slot = self._as_taken(np.asarray(ids), mask, np.asarray(images))
    run = self.functions[count]
    seen = run["encoder"](self.weights, images, slot)
    logits, cache = run["prefill"](self.weights, ids, mask, slot, *seen)
    out, length, done = np.zeros((rows, new), np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool)
    for step in range(new):
      token = np.asarray(logits).argmax(-1).astype(np.int32)
      out[:, step], length = np.where(done, 0, token[:rows]), length + ~done
      done |= np.isin(out[:, step], stop_tokens)
      if done.all() or step + 1 == new:
        break
      logits, cache = run["decode"](self.weights, token, cache)
    return generate.Generated(out, length)

  def _as_taken(self, ids: np.ndarray, mask: Any, images: np.ndarray) -> tuple[np.ndarray, ...]:
    c = self.card
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) > 0
    room, wanted = (c["batch_size"], c["prompt_length"]), (c["images"], *c["image_size"], c["channels"])
    if ids.ndim != 2 or not len(ids) or ids.shape[0] > room[0] or ids.shape[1] > room[1] or mask.shape != ids.shape:
      raise ValueError(f"ids of shape {ids.shape} and mask of {mask.shape}; valid: at most {room}, both alike")
    if not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(f"ids of dtype {ids.dtype}; valid: integers")
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= c["vocab"]:
      raise ValueError(f"ids from {ids.min()} to {ids.max()}; valid: 0 to {c['vocab'] - 1}")
    if images.shape != (len(ids), *wanted):
      raise ValueError(f"images of shape {images.shape}; valid: {(len(ids), *wanted)}")
    if not jnp.issubdtype(images.dtype, jnp.floating):  # pixels of 0 to 255
      raise ValueError(f"images of dtype {images.dtype}; valid: float32, normalised: (pixels / 255 - mean) / std")
    there = mask & (ids == c["image_token"])
    if (there.sum(1) != c["images"] * c["patches"]).any():
      row = int((there.sum(1) != c["images"] * c["patches"]).argmax())
      raise ValueError(
        f"row {row} has {there[row].sum()} placeholders (id {c['image_token']}); valid: {c['images'] * c['patches']}, "
        f"{c['patches']} for each of {c['images']} images"
      )
    slot = np.stack([np.flatnonzero(row) for row in there]).reshape(-1, c["images"], c["patches"]).astype(np.int32)
    fill = lambda a: np.concatenate([a, np.repeat(a[-1:], room[0] - len(a), axis=0)])
    wider = ((0, 0), (0, room[1] - ids.shape[1]))
    ids, images = np.pad(ids, wider).astype(np.int32), images.astype(np.float32)
    return fill(ids), fill(np.pad(mask, wider)), fill(images), fill(slot)


def open_generation(directory: str | os.PathLike[str]) -> Generation:
  """Reads what `save_generation` wrote.

  Raises:
    ExportError: a file is missing or has been changed, or was exported for other platforms than this one.
  """
  directory = Path(directory)
  try:
    card = json.loads((directory / CARD).read_text())
  except (OSError, ValueError) as error:
    raise ExportError(f"{directory} holds no export of a vision-language model: {error}") from None
  if damage := files.find_damage(directory):
    raise ExportError(f"{directory} is damaged: {damage}")
  check_platform(directory, card)
  read = lambda path: jax.jit(jax_export.deserialize(bytearray(path.read_bytes())).call)
  functions = {n: {name: read(directory / str(n) / f"{name}.stablehlo") for name in PARTS} for n in card["counts"]}
  config = complete(card["config"][str(card["counts"][-1])])
  if (directory / run_dir.WORDS).is_file():
    with config.unlocked():
      config.text.tokenizer = str(directory / run_dir.WORDS)
  return Generation(
    card, config, {name: jnp.asarray(a) for name, a in load_file(directory / WEIGHTS).items()}, functions
  )


def _functions(
  model: Reader, card: dict[str, Any], weights: dict[str, np.ndarray], platforms: Sequence[str] | None
) -> tuple[dict[str, bytes], int]:
  """The three functions of a variant, serialised, and the bytes of its cache."""
  module, shape = model.module, jax.ShapeDtypeStruct
  batch, images = card["batch_size"], card["images"]
  ids, slot = (batch, card["prompt_length"]), (batch, images, card["patches"])
  text = card["prompt_length"] - images * card["patches"]
  known, room = module.known_of(text, images, card["patches"]), card["max_new_tokens"] - 1
  apply = lambda flat, *a, **k: module.apply({"params": traverse_util.unflatten_dict(flat, sep="/")}, *a, **k)

  def encoder(flat: Any, images: Any, slot: Any) -> tuple[Any, ...]:
    tokens, place, _ = apply(flat, images, slot, method="see")
    return tokens.x, tokens.alive, place, dict(tokens.feats)  # what a site of the tower tells those behind it

  def prefill(
    flat: Any, ids: Any, mask: Any, slot: Any, x: Any, alive: Any, place: Any, feats: Any
  ) -> tuple[Any, list[Any]]:
    nobody = jnp.zeros(place.shape, jnp.int32)
    owner = jnp.full((x.shape[0], slot.shape[-1]), -1, jnp.int32)  # who came from where is not asked any more
    seen = Tokens(x, alive, alive.astype(jnp.float32), nobody, owner, jnp.zeros(place.shape, bool), feats)
    out = apply(flat, ids, (seen, place, {}), slot=slot, mask=mask, room=room, known=known, method="prefill")
    return out.logits[:, 0], jax.tree.leaves(out.cache)

  def start(flat: Any, *rest: Any) -> Any:
    seen, place, _ = apply(flat, *rest[2:], method="see")
    return apply(flat, rest[0], (seen, place, {}), slot=rest[3], mask=rest[1], room=room, known=known, method="prefill")

  flat = {name: shape(a.shape, a.dtype) for name, a in weights.items()}
  pixels = shape((batch, images, *card["image_size"], card["channels"]), jnp.float32)
  ids, mask, slot = shape(ids, jnp.int32), shape(ids, bool), shape(slot, jnp.int32)
  seen = jax.eval_shape(encoder, flat, pixels, slot)
  cache = jax.eval_shape(start, flat, ids, mask, pixels, slot).cache
  leaves, tree = jax.tree.flatten(cache)

  def decode(flat: Any, token: Any, leaves: list[Any]) -> tuple[Any, list[Any]]:
    logits, cache = apply(flat, token, jax.tree.unflatten(tree, leaves), method="decode")
    return logits, jax.tree.leaves(cache)

  arguments = {
    "encoder": (encoder, (flat, pixels, slot)),
    "prefill": (prefill, (flat, ids, mask, slot, *seen)),
    "decode": (decode, (flat, shape((batch,), jnp.int32), leaves)),
  }
  where = None if platforms is None else tuple(platforms)
  written = {
    name: bytes(jax_export.export(jax.jit(function), platforms=where)(*given).serialize())
    for name, (function, given) in arguments.items()
  }
  return written, cache.nbytes


def _frozen(model: Reader) -> Reader:
  """With integer counts, and attention written as products: an artefact shall not depend on a device's kernels."""
  model = freeze(model)
  config = model.config.to_dict()
  config["model"]["attention"] = "matmul"
  return dataclasses.replace(build(config), params=model.params)


def _left(model: Reader) -> int:
  return model.module.left()


def _check(
  models: Sequence[Reader], frozen: dict[int, Reader], directory: Any, prompt_length: int, max_new_tokens: int,
  images: int, batch_size: int, platforms: Sequence[str] | None,
) -> None:  # fmt: skip
  for name, value in dict(max_new_tokens=max_new_tokens, images=images, batch_size=batch_size).items():
    if value < 1:
      raise ValueError(f"{name}={value}; valid: 1 or more")
  for platform in platforms or ():
    if platform not in PLATFORMS:
      raise ValueError(f"platforms has {platform!r}; {nearest('cuda' if platform == 'gpu' else platform, PLATFORMS)}")
  if len(frozen) < len(models):
    counts = [_left(model) for model in models]
    raise ValueError(
      f"two models leave {max(counts, key=counts.count)} tokens of an image; valid: different counts, of which sites "
      "of stack='llm' change none: such models are exported one at a time"
    )
  shapes = [jax.tree.map(np.shape, model.params) for model in frozen.values()]
  if any(other != shapes[0] for other in shapes):
    raise ValueError("models of an export must have the same parameters; valid: variants of one model")
  s = next(iter(frozen.values())).module.tower.shape
  least = images * s.num_patches + 1
  if prompt_length < least:
    raise ValueError(f"prompt_length={prompt_length}; valid: {least} or more, for {images} images and some text")
  check_replaceable(Path(directory).absolute())


def _compare(directory: Path, prompts: dict[str, np.ndarray], wanted: dict[int, np.ndarray]) -> None:
  got = in_fresh_process("tokred.export.generation", directory, **prompts)
  for count, tokens in wanted.items():
    if not np.array_equal(got[str(count)], tokens):
      raise ExportError(
        f"{directory} at {count} image tokens writes {got[str(count)]}, but the model {tokens.tolist()}"
      )


if __name__ == "__main__":
  with np.load(sys.argv[2]) as recorded:
    given = dict(recorded)
  found = open_generation(sys.argv[1])
  print(json.dumps({count: found.write(**given, count=count).tokens.tolist() for count in found.functions}))
