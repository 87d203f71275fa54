"""What image tokens cost a reader: the time to the first token, to prefill, per token, the cache, the FLOPs.

    python -m tokred.bench_vlm --model=runs/vlm [--baseline=runs/dense] --text=32 --batch_size=1 [--json=bench.json]

All functions of all models take turns, as in `tokred.bench`; prompts are random, each with one image.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokred import cost
from tokred.bench import Timing, interleave
from tokred.files import write_json
from tokred.model import Reader, freeze
from tokred.nn import placeholders


@dataclasses.dataclass(frozen=True)
class Row:
  """One model: medians of times of a batch, ratios to the first model with their quartiles over rounds."""

  name: str
  image_tokens: int  # that reach the language model
  first_ms: float  # time to the first token: tower, projector, language model
  prefill_ms: float  # of these the language model
  decode_ms: float  # per token after the first
  cache_bytes: int  # keys and values that are allocated, of the batch
  held_bytes: float  # of these what holds something, on average over rows
  gflops: float  # until the first token, of a prompt
  speedup: float  # of the first token
  speedup_low: float
  speedup_high: float
  prefill_speedup: float
  promised: float  # speed-up by FLOPs
  batch_size: int
  text: int
  new: int
  dtype: str
  device: str


def measure(
  models: Mapping[str, Reader], *, text: int = 32, batch_size: int = 1, new: int = 16, rounds: int = 10, seed: int = 0,
  min_seconds: float = 0.05,
) -> list[Row]:  # fmt: skip
  """Measures readers against the first of them.

  Args:
    models: by name, with parameters.
    text: tokens of text in a prompt, behind its image.
    batch_size: prompts at once.
    new: tokens written in a turn of decoding.
    rounds: see `tokred.bench.interleave`.
    seed: of prompts and images.
    min_seconds: see `tokred.bench.interleave`.

  Raises:
    ValueError: an argument out of its range, or something else than models with parameters.
  """
  check(models)
  for field, value, least in (("text", text, 1), ("batch_size", batch_size, 1), ("new", new, 2)):
    if not isinstance(value, int) or value < least:
      raise ValueError(f"{field}={value}; valid: {least} or more")
  calls, facts = {}, {}
  for name, model in models.items():
    model = freeze(model)
    functions, facts[name] = _functions(model, text, batch_size, new, seed)
    calls |= {f"{name}/{kind}": function for kind, function in functions.items()}
  times = interleave(calls, rounds=rounds, min_seconds=min_seconds)
  base = next(iter(models))
  return [_row(name, base, times, facts, models[name], text, batch_size, new) for name in models]


def check(models: Any) -> None:
  """Raises ValueError for what are no vision-language models with parameters, by name."""
  if not isinstance(models, Mapping) or not models:
    raise ValueError(f"models are a {type(models).__name__}, or none; valid: a dict of one model or more, by name")
  for name, model in models.items():
    if not isinstance(model, Reader):
      raise ValueError(f"model {name!r} is a {type(model).__name__}; valid: a vision-language model, of tokred.load")
    if model.params is None:
      raise ValueError(f"model {name!r} has no parameters: call model.init(), or get it from tokred.load")


def _functions(
  model: Reader, text: int, batch: int, new: int, seed: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
  """What is timed, compiled here and with its inputs on the device, and what is known without a clock."""
  module, params, s = model.module, model.params, model.module.tower.shape
  patches, rng = s.num_patches, np.random.default_rng(seed)
  words = rng.integers(0, module.llm.shape.vocab - 1, (batch, text))
  words += words >= module.image_token  # any word but the placeholder
  ids = np.concatenate([np.full((batch, patches), module.image_token), words], axis=1).astype(np.int32)
  slot = placeholders.slots(ids, module.image_token, 1, patches)
  images = rng.standard_normal((batch, 1, *model.config.model.image_size, s.channels), dtype=np.float32)
  known = module.known(ids, slot)
  ids, slot, images = jax.device_put((ids, slot, images))

  @jax.jit
  def see(params: Any, images: Any) -> Any:
    return module.apply({"params": params}, images, slot, method="see")[:2]

  @jax.jit
  def prefill(params: Any, seen: Any) -> Any:
    inputs = dict(slot=slot, room=new, known=known, method="prefill")
    out = module.apply({"params": params}, ids, (*seen, {}), **inputs)
    return out.logits, out.cache

  @jax.jit
  def first(params: Any, images: Any) -> Any:
    return prefill(params, see(params, images))

  @jax.jit
  def decode(params: Any, token: Any, cache: Any) -> Any:
    def step(state: Any, _: None) -> Any:
      token, cache = state
      logits, cache = module.apply({"params": params}, token, cache, method="decode")
      return (logits.argmax(-1).astype(jnp.int32), cache), None

    return jax.lax.scan(step, (token, cache), length=new)[0][0]  # the cache is copied once in a turn, not in each step

  seen = see(params, images)
  logits, cache = prefill(params, seen)
  token = logits[:, 0].argmax(-1).astype(jnp.int32)
  functions = dict(
    first=lambda: first(params, images), prefill=lambda: prefill(params, seen),
    decode=lambda: decode(params, token, cache),
  )  # fmt: skip
  gflops = float(cost.of(module.clone(prompt=text), cost.flops)) / 1e9
  held = float(np.mean(np.asarray(cache.held)))
  return functions, dict(gflops=gflops, cache_bytes=int(cache.nbytes), held_bytes=held * batch)


def _row(
  name: str, base: str, times: Mapping[str, Timing], facts: Mapping[str, Any], model: Reader, text: int, batch: int,
  new: int,
) -> Row:  # fmt: skip
  ratio = lambda kind: [
    b / m for b, m in zip(times[f"{base}/{kind}"].rounds, times[f"{name}/{kind}"].rounds, strict=True)
  ]
  low, middle, high = (float(q) for q in np.quantile(ratio("first"), (0.25, 0.5, 0.75)))
  device = jax.devices()[0]
  return Row(
    name=name,
    image_tokens=freeze(model).module.left(),
    first_ms=1e3 * times[f"{name}/first"].median,
    prefill_ms=1e3 * times[f"{name}/prefill"].median,
    decode_ms=1e3 * times[f"{name}/decode"].median / new,
    **facts[name],
    speedup=middle,
    speedup_low=low,
    speedup_high=high,
    prefill_speedup=float(np.median(ratio("prefill"))),
    promised=facts[base]["gflops"] / facts[name]["gflops"],
    batch_size=batch,
    text=text,
    new=new,
    dtype=str(model.config.model.dtype),
    device=f"cpu, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind,
  )


def format_table(rows: Sequence[Row]) -> str:
  """The rows as a Markdown table under a line on what was measured; empty for no rows."""
  if not rows:
    return ""
  header = (
    "model", "image tokens", "first token", "speed-up", "quartiles", "by FLOPs", "prefill", "speed-up", "per token",
    "KV cache",
  )  # fmt: skip
  table = [header] + [
    (
      row.name, str(row.image_tokens), f"{row.first_ms:.2f} ms", f"{row.speedup:.2f}",
      f"{row.speedup_low:.2f} to {row.speedup_high:.2f}", f"{row.promised:.2f}", f"{row.prefill_ms:.2f} ms",
      f"{row.prefill_speedup:.2f}", f"{row.decode_ms:.2f} ms", f"{row.held_bytes / 1e6:.3g} MB",
    )
    for row in rows
  ]  # fmt: skip
  widths = [max(len(cells[i]) for cells in table) for i in range(len(header))]
  lines = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True)) + " |" for cells in table]
  lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
  one, dtypes = rows[0], ", ".join(f"{row.name} {row.dtype}" for row in rows)
  dtypes = dtypes if len({row.dtype for row in rows}) > 1 else one.dtype
  title = (
    f"{one.device}, {dtypes}, jax {jax.__version__}; {one.batch_size} prompts of {one.text} tokens and one image, "
    f"{one.new} tokens written; medians, functions in turns"
  )
  return "\n".join([title, "", *lines])


def main(argv: Sequence[str] | None = None) -> None:
  """The command line; prints the table and, with --json, writes the rows."""
  parser = argparse.ArgumentParser(prog="python -m tokred.bench_vlm", description="What image tokens cost a reader.")
  parser.add_argument("--model", required=True, help="run directory, export or weights: what tokred.load takes")
  parser.add_argument("--baseline", help="likewise; without it the weights of --model without sites")
  parser.add_argument("--text", type=int, default=32, help="tokens of text in a prompt")
  parser.add_argument("--batch_size", type=int, default=1)
  parser.add_argument("--new", type=int, default=16, help="tokens written in a turn")
  parser.add_argument("--rounds", type=int, default=10)
  parser.add_argument("--json", help="file for the rows, as a JSON list")
  flags = parser.parse_args(argv)
  import tokred  # here, since the package must not import its own command line

  try:
    baseline = tokred.load(flags.baseline) if flags.baseline else tokred.load(flags.model, sites={})
    models = {"baseline": baseline, "model": tokred.load(flags.model)}
    if not all(isinstance(model, Reader) for model in models.values()):
      raise ValueError("config.model.name of a model is not 'vlm'; for images alone there is tokred.bench")
    sizes = dict(text=flags.text, batch_size=flags.batch_size, new=flags.new)
    rows = measure(models, **sizes, rounds=flags.rounds)
    print(format_table(rows))
    if flags.json:
      write_json(Path(flags.json), [dataclasses.asdict(row) for row in rows])
  except (ValueError, OSError) as error:
    sys.exit(f"tokred.bench_vlm: {error}")


if __name__ == "__main__":
  main()
