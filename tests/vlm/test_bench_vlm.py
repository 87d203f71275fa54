"""What is measured of readers: the table, the facts that need no clock, and what is refused."""

import dataclasses

import pytest

from tokred import bench_vlm, budgets, cost
from tokred.model import build

CONFIG = dict(
  model=dict(name="vlm", variant="mu/4", image_size=(16, 16), num_classes=0, depth=1),
  llm=dict(vocab=40, width=32, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=48),
)
ROW = bench_vlm.Row(
  "half", 8, 4.0, 3.0, 0.5, 4096, 2e6, 0.25, 2.0, 1.5, 2.5, 1.75, 2.25, 1, 32, 16, "float32", "cpu, 2 cores"
)


def test_table():
  title, blank, header, _, row = bench_vlm.format_table([ROW]).splitlines()
  assert title.startswith("cpu, 2 cores, float32, jax") and "1 prompts of 32 tokens and one image, 16 tokens" in title
  assert not blank and [cell.strip() for cell in header.split("|")[1:4]] == ["model", "image tokens", "first token"]
  cells = [cell.strip() for cell in row.split("|")[1:-1]]
  assert cells == ["half", "8", "4.00 ms", "2.00", "1.50 to 2.50", "2.25", "3.00 ms", "1.75", "0.50 ms", "2 MB"]
  assert bench_vlm.format_table([]) == ""
  title = bench_vlm.format_table([ROW, dataclasses.replace(ROW, name="small", dtype="bfloat16")]).splitlines()[0]
  assert title.startswith("cpu, 2 cores, half float32, small bfloat16, jax")


def test_refusals():
  for message, fields in {
    "text=0; valid: 1 or more": dict(text=0), "batch_size=0; valid: 1 or more": dict(batch_size=0),
    "new=1; valid: 2 or more": dict(new=1), "text=1.5; valid: 1": dict(text=1.5),
    "model 'a' has no parameters: call model.init": {},
  }.items():  # fmt: skip
    with pytest.raises(ValueError, match=message):
      bench_vlm.measure({"a": dataclasses.replace(build(CONFIG), params={} if fields else None)}, **fields)
  for message, models in {
    "models are a dict, or none; valid: a dict of one model": {},
    "models are a list": [build(CONFIG)],
    "model 'a' is a Model; valid: a vision-language model": {"a": build(dict(model=dict(variant="mu/4")))},
  }.items():
    for function in (bench_vlm.measure, budgets.judge):
      with pytest.raises(ValueError, match=message):
        function(models)
  with pytest.raises(SystemExit, match=r"tokred.bench_vlm: .*nowhere"):
    bench_vlm.main(["--model=nowhere"])


@pytest.mark.thorough
def test_measure():
  sites = dict(out=dict(reducer="topk", score="key_norm", layers=(-1,), place="output", keep=5))
  dense = build(CONFIG).init(0)
  models = {"dense": dense, "few": dataclasses.replace(build(CONFIG | dict(sites=sites)), params=dense.params)}
  one, other = bench_vlm.measure(models, text=6, new=2, rounds=1, min_seconds=0.0)
  assert (
    (one.image_tokens, other.image_tokens) == (16, 4) and one.speedup == 1 and min(other.first_ms, one.decode_ms) > 0
  )
  # Two layers of 2 heads with 8 channels, keys and values of 4 bytes; room for 2 tokens more.
  assert (one.held_bytes, other.held_bytes) == (2 * 2 * 2 * 8 * 4 * 22, 2 * 2 * 2 * 8 * 4 * 10)
  assert one.cache_bytes == 2 * 2 * 2 * 8 * 4 * 24
  assert other.promised == pytest.approx(one.gflops / other.gflops)
  assert one.gflops == pytest.approx(float(cost.of(dense.module.clone(prompt=6), cost.flops)) / 1e9)
