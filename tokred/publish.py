"""A trained model to a folder that ships, compared and timed on real examples: what export.py does."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokred import bench, export
from tokred.data import label_names
from tokred.evaluate import evaluate, examples, prompts
from tokred.export import functions
from tokred.export.generation import save_generation
from tokred.model import Model, freeze


def classifier(
  trained: Model, dense: Model | None, output: str, formats: Sequence[str], latency: Sequence[int], **options: Any
) -> str:
  """Exports a model of images, with accuracy, times and the largest difference on its card.

  Args:
    trained: with parameters; its config says where the data lie.
    dense: what it is timed in turns with; None where it is not timed.
    output: the folder, see `export.save`; so are `formats` and the options.
    latency: batch sizes of the times.

  Returns:
    What came of it, in two lines.

  Raises:
    ValueError, OSError: see `export.save` and `evaluate`.
  """
  with trained.config.unlocked():
    trained.config.data.labels = label_names(trained.config.data)
  frozen = freeze(trained)
  if dtype := options.get("dtype"):  # the card tells of what ships
    frozen = export.in_memory(functions.in_dtype(frozen, dtype))
    dense = dense and export.in_memory(functions.in_dtype(dense, dtype))
  images, _ = examples(frozen, options.get("batch_size") or 64)
  times = bench.compare(frozen, dense, latency, rounds=5) if latency else []
  measured = dict(accuracy=evaluate(frozen)["accuracy"], latency=[dataclasses.asdict(row) for row in times])
  export.save(trained, output, formats, images=images, **measured, **options)
  found = export.read_card(output)["verified"]["formats"]
  differences = {name: values["difference"] for name, values in found.items()}
  return (
    f"tokens after each block {frozen.counts}, {frozen.flops / 1e9:.4g} GFLOPs, accuracy {measured['accuracy']:.4f}\n"
    f"largest difference from the trained model, in a fresh process, on {len(images)} real images: {differences}"
  )


def language(models: Sequence[Model], output: str, *, batch_size: int = 1, **options: Any) -> str:
  """Exports a vision-language model at the counts of image tokens that its variants have.

  Args:
    models: variants of one model; the config of the first says where the prompts lie.
    output: the folder, see `save_generation`; so are the options.
    batch_size: prompts at a time.

  Returns:
    What came of it, in a line.

  Raises:
    ValueError, OSError: see `save_generation`.
  """
  asked, images = prompts(models[0], batch_size), models[0].config.text.images
  kinds = dict(prompt_length=asked["ids"].shape[1], prompts=asked, images=images, batch_size=batch_size)
  words = models[0].config.text.tokenizer
  card = save_generation(models, output, words=words if Path(words).is_file() else None, **kinds, **options)
  told = "greedy tokens on real prompts are the same from a fresh process"
  if functions.here() not in card["platforms"]:
    told = f"for {', '.join(card['platforms'])}, and not run here"
  return f"image tokens {card['counts']}: {told}"
