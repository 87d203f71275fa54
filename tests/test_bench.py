"""tokred.bench: order of turns, arithmetic of the rows, the honest sentence; nothing depends on the machine's speed."""

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import tokred
from tokred import bench
from tokred.bench import Row, Timing, compare, format_table, interleave, main
from tokred.config import default


class Handle:
  """What tokred.load returns, as far as the benchmark looks."""

  def __init__(self, flops, output=None):
    self.config = default()
    self.config.model.update(dict(image_size=(4, 6), channels=3))
    self.flops, self.shapes, self.output = flops, [], output

  def __call__(self, images):
    assert isinstance(images, jax.Array) and images.dtype == jnp.float32
    self.shapes.append(images.shape)
    return {"logits": images.sum((1, 2, 3))} if self.output is None else self.output


def row(**fields):
  base = Row(8, 200.0, 100.0, 40.0, 80.0, 2.0, 1.9, 2.1, 2.5, True, 10, 0.5, 1.25, "float32", "cpu, 2 cores", "0.0")
  return dataclasses.replace(base, **fields)


@pytest.fixture
def clock(monkeypatch):
  """A clock that only moves when told."""
  now = [0.0]
  monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
  return now


def test_turns_alternate_after_the_warm_up():
  calls = []
  functions = {name: lambda name=name: calls.append(name) for name in "ABC"}
  interleave(functions, rounds=3, warmup=2, min_seconds=0.0)
  assert "".join(calls) == "AABBCC" + "ABC" + "CBA" + "ABC"


def test_seconds_per_call_by_hand(clock):
  costs = {"slow": iter([9.0, 3.0, 1.0, 2.0]), "fast": iter([9.0, 0.5, 0.25, 1.0])}  # the first is the warm-up

  def spend(name):
    clock[0] += next(costs[name])

  times = interleave({n: lambda n=n: spend(n) for n in costs}, rounds=3, warmup=1, min_seconds=0.0)
  assert times["slow"] == Timing(2.0, 1.0, 3.0, (3.0, 1.0, 2.0))
  assert times["fast"] == Timing(0.5, 0.25, 1.0, (0.5, 0.25, 1.0))
  assert list(times) == ["slow", "fast"]


def test_short_functions_are_repeated_within_a_turn(clock):
  calls = []

  def spend():
    calls.append(1)
    clock[0] += 0.25

  times = interleave({"f": spend}, rounds=2, warmup=0, min_seconds=0.9)  # four calls a turn
  assert len(calls) == 8 and times["f"] == Timing(0.25, 0.25, 0.25, (0.25, 0.25))


def test_arrays_are_waited_for(monkeypatch):
  waited = []
  monkeypatch.setattr(bench.jax, "block_until_ready", waited.append)
  interleave({"f": lambda: "result"}, rounds=2, warmup=1, min_seconds=0.0)
  assert waited == ["result"] * 3


def test_compare_measures_both_at_every_batch_size():
  model, dense = Handle(1e9), Handle(2.5e9)
  rows = compare(model, dense, (1, 3), rounds=2, min_seconds=0.0)
  assert [r.batch_size for r in rows] == [1, 3]
  assert set(model.shapes) == set(dense.shapes) == {(1, 4, 6, 3), (3, 4, 6, 3)}
  for r in rows:
    assert r.promised == 2.5 and r.rounds == 2 and r.dtype == "float32" and r.jax_version == jax.__version__
    assert r.speedup_low <= r.speedup <= r.speedup_high
    assert r.images_per_second == pytest.approx(1e3 * r.batch_size / r.latency_ms)
    assert r.pays == (r.speedup_low > 1)


def test_a_baseline_of_another_dtype_is_told():
  model, dense = Handle(1e9), Handle(2.5e9)
  model.config.model.dtype = "bfloat16"
  rows = compare(model, dense, (1,), rounds=1, min_seconds=0.0)
  assert rows[0].dtype == "bfloat16 against float32" and "bfloat16 against float32, jax" in format_table(rows)


def test_learned_rates_are_measured_as_they_ship(monkeypatch):
  """Frozen, and gathered: 10 of 17 tokens leave the block, in mask mode 17 would."""
  fields = dict(variant="mu/2", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(8, 8), num_classes=10)
  sites = dict(rates=dict(reducer="topk", layers=(0,), rate="learned"))
  learned = tokred.build(dict(model=fields, sites=sites)).init(0)
  timing, seen = Timing(1.0, 1.0, 1.0, (1.0,)), []

  def once(functions, **unused):
    seen.extend(function() for function in functions.values())
    return dict.fromkeys(functions, timing)

  monkeypatch.setattr(bench, "interleave", once)
  (r,) = compare(learned, learned.with_sites({}), (1,))
  frozen = tokred.freeze(learned)
  assert [out.tokens.x.shape[1] for out in seen] == [frozen.counts[-1], 17] == [10, 17]
  assert r.gflops == frozen.flops / 1e9


def test_the_ratio_is_of_times_of_the_same_round(monkeypatch):
  # ratios per round 3, 2, 3, 2, 1: median 2, quartiles 2 and 3; the ratio of the medians would be 5 / 3
  times = {
    "model": Timing(3.0, 1.0, 5.0, (1.0, 2.0, 3.0, 4.0, 5.0)),
    "baseline": Timing(5.0, 3.0, 9.0, (3.0, 4.0, 9.0, 8.0, 5.0)),
  }
  monkeypatch.setattr(bench, "interleave", lambda functions, **unused: times)
  (r,) = compare(Handle(1.0), Handle(3.0), (10,))
  assert (r.speedup, r.speedup_low, r.speedup_high, r.promised, r.pays) == (2.0, 2.0, 3.0, 3.0, True)
  assert (r.latency_ms, r.images_per_second, r.baseline_images_per_second) == (3000.0, pytest.approx(10 / 3), 2.0)


def test_what_jax_cannot_wait_for_is_refused():
  with pytest.raises(TypeError, match="returns SimpleNamespace, in which JAX sees no array to wait for"):
    compare(Handle(1.0, output=types.SimpleNamespace(logits=1)), Handle(1.0), (1,))


def test_bad_numbers():
  with pytest.raises(ValueError, match=r"batch_sizes=\(1, 0\)"):
    compare(Handle(1.0), Handle(1.0), (1, 0))
  with pytest.raises(ValueError, match="rounds=0"):
    interleave({}, rounds=0)


@pytest.mark.parametrize("sizes", [8, (), ("8",), (1.5,), "18"])
def test_batch_sizes_are_integers(sizes):
  with pytest.raises(ValueError, match=r"batch_sizes=.*; valid: integers, such as \(1, 8, 64\)"):
    compare(Handle(1.0), Handle(1.0), sizes)


def test_a_path_is_no_model():
  reader = tokred.build(dict(model=dict(name="vlm", variant="mu/4", image_size=(16, 16), num_classes=0)))
  with pytest.raises(ValueError, match=r"is a vision-language model, .* valid: tokred.bench_vlm.measure"):
    bench.compare(reader, reader)
  with pytest.raises(ValueError, match=r"'runs/x' is no model that can be called; valid: what tokred.load returns"):
    compare("runs/x", Handle(1.0))


def test_table_says_where_it_does_not_pay():
  slower = row(batch_size=1, speedup=0.8, speedup_low=0.7, speedup_high=0.9, pays=False)
  unclear = row(batch_size=4, speedup=1.02, speedup_low=0.98, speedup_high=1.1, pays=False)
  text = format_table([slower, unclear, row()])
  first, _, header, rule, *table = text.splitlines()
  assert first.startswith("cpu, 2 cores, float32, jax 0.0; 0.5 GFLOPs per image against 1.25; medians of 10 rounds")
  assert len({len(line) for line in [header, rule, *table[:3]]}) == 1  # columns are aligned
  assert "| 1.90 to 2.10 |" in table[2]
  assert table[4:] == [
    "Batch 1: reduction does not pay, the reduced model is slower (0.80 times the baseline's speed).",
    "Batch 4: reduction does not pay, the difference is within the spread (1.02 times).",
    "Batch 8: reduction pays, 2.00 times the baseline's speed, 80% of what its FLOPs promise.",
  ]
  assert format_table([]) == ""


def test_command_line(monkeypatch, tmp_path, capsys):
  loaded = []

  def load(path, **arguments):
    loaded.append((path, arguments))
    return Handle(1e9)

  monkeypatch.setattr(tokred, "load", load, raising=False)
  json_file = tmp_path / "rows.json"
  main(["--model=a", "--batch_sizes=2,3", "--rounds=1", f"--json={json_file}"])
  assert loaded == [("a", {}), ("a", {"sites": {}})]
  printed = capsys.readouterr().out
  assert "promised by FLOPs" in printed and "Batch 3: " in printed
  assert [Row(**r).batch_size for r in json.loads(json_file.read_text())] == [2, 3]
  main(["--model=a", "--baseline=b", "--batch_sizes=1", "--rounds=1"])
  assert loaded[2:] == [("a", {}), ("b", {})]


def test_command_line_errors_are_one_line(monkeypatch, capsys):
  def load(path):
    raise ValueError(f"{path}: no such directory")

  monkeypatch.setattr(tokred, "load", load, raising=False)
  with pytest.raises(SystemExit, match=r"tokred\.bench: nowhere: no such directory"):
    main(["--model=nowhere"])
  with pytest.raises(SystemExit):
    main(["--model=a", "--batch_sizes=1,x"])
  assert "'1,x'; valid: whole numbers with commas between" in capsys.readouterr().err
  assert "tokred.bench" in sys.modules
