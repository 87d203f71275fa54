"""A reader at a list of budgets: what it answers, and what that costs."""

from collections.abc import Mapping
from typing import Any

from tokred import bench_vlm, memory, vqa
from tokred.data import feed, tokenizer
from tokred.model import Reader


@memory.advice("lower config.eval.batch_size (eval.py: --batch_size)")
def judge(
  models: Mapping[str, Reader], split: str | None = None, batch_size: int | None = None, *, times: bool = True
) -> dict[str, dict[str, Any]]:
  """Answers of several models to the same questions.

  Args:
    models: by name, with parameters; the first is what times are compared with.
    split: `config.data.eval_split` where not given.
    batch_size: `config.eval.batch_size` where not given.
    times: whether they are timed as well, in turns, one prompt at a time.

  Returns:
    By name: accuracy (exact match of what greedy decoding writes with what the data set says, 0 to 1), vqa_accuracy
    (the same after normalisation, see `tokred.vqa`), choice_accuracy (which of the data set's answers is the likeliest;
    where it has a list of them), caption_loss (nats per id of an answer), examples, image_tokens (given to the
    language model, whose own sites may take more), gmacs and gflops (of reading a prompt), gmacs_written (of a token of
    the answer), prompt_bytes (keys and values of the prompt); with `times` also first_ms, prefill_ms, decode_ms,
    speedup, promised and cache_bytes of `tokred.bench_vlm.measure`.

  Raises:
    ValueError: no examples, a batch size below 1, or something else than models with parameters.
    MemoryError: names the field that helps.
  """
  if batch_size is not None and batch_size < 1:
    raise ValueError(f"batch_size={batch_size}; valid: 1 or more, or None for config.eval.batch_size")
  bench_vlm.check(models)
  out = {}
  for name, model in models.items():
    out[name] = _answers(model, split or model.config.data.eval_split, batch_size or model.config.eval.batch_size)
    out[name] |= dict(gmacs=model.macs / 1e9, gflops=model.flops / 1e9, image_tokens=model.module.left())
    out[name] |= dict(gmacs_written=model.macs_written / 1e9, prompt_bytes=model.cache_bytes)
  if times:
    prompt = next(iter(models.values())).config.llm.prompt
    for row in bench_vlm.measure(models, text=prompt):
      names = ("first_ms", "prefill_ms", "decode_ms", "speedup", "promised", "cache_bytes")
      out[row.name] |= {name: getattr(row, name) for name in names}
  return out


def _answers(model: Reader, split: str, batch_size: int) -> dict[str, Any]:
  module, words = model.module, tokenizer(model.config)
  batches = feed(model.config, split, train=False, batch_size=batch_size)
  longest, exact, agreed, count = 1, 0, 0.0, 0
  for batch in batches:
    longest = max(longest, int(batch["answer"].sum(1).max()))
  for _, said, wanted in vqa.written(module, model.params, batches, max_new_tokens=longest, eos=words.eos):
    exact, count = exact + (said == wanted), count + 1
    agreed += vqa.vqa_accuracy(words.decode(said), [words.decode(wanted)])
  if not count:
    raise ValueError(f"split {split!r} has no examples to evaluate")
  out = dict(accuracy=exact / count, vqa_accuracy=agreed / count, examples=count)
  if batches.label_names:
    ends = [words.eos] if words.eos >= 0 else []
    choices = [[*words.encode(label), *ends] for label in batches.label_names]
    out["choice_accuracy"] = vqa.multiple_choice(module, model.params, batches, choices)["accuracy"]
  return out | dict(caption_loss=vqa.caption_loss(module, model.params, batches))
