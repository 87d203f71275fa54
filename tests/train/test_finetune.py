"""Fine-tuning: adapters, layer-wise rates, targets in other units, a teacher that no device holds alone."""

import functools
import importlib.util
import types
from pathlib import Path

import jax
import micro
import numpy as np
import pytest

from tokred import loading, losses, sharding
from tokred.model import build
from tokred.pretrained import resize
from tokred.train import loop
from tokred.train.loop import Stopped, train
from tokred.train.phase import Phase, check

ROOT = Path(__file__).parents[2]
HF = ROOT.parent / "shared" / "golden" / "vlm" / "hf"
LEARNED = dict(rates=micro.PAIR)


def mesh_of(config, devices):
  return sharding.make_mesh(config.mesh, jax.devices()[:devices])


@pytest.fixture(scope="module")
def dense(one_device, tmp_path_factory):
  """A run directory of the dense model."""
  folder = tmp_path_factory.mktemp("dense")
  train(micro.config(train=dict(steps=3)), folder)
  return str(folder)


def adapted(dense, **overrides):
  """Adapters beside a frozen backbone, learned rates that are frozen at step 3, and an average."""
  fields = dict(
    init=dense,
    lora=dict(rank=2),
    rates=dict(freeze_step=3),
    optim=dict(ema=0.5, layer_decay=0.5),
    loss=dict(budget=20.0, target=0.85),
  )
  return micro.config(LEARNED, **(fields | overrides))


def test_a_run_with_adapters(dense, stop_at, tmp_path):
  """Frozen kernels stay to the bit, what is loaded has them merged, and resuming equals not stopping."""
  config = adapted(dense)
  summary = train(config, tmp_path / "whole")
  before, after = micro.state(dense), micro.state(tmp_path / "whole")
  moved = {name for name in before if name.startswith("params/") and (after[name] != before[name]).any()}
  assert moved == {"params/head/kernel", "params/head/bias"}
  pairs = [name for name in after if name.startswith("params/lora/")]
  assert len(pairs) == 8 and all(np.abs(after[name]).max() > 0 for name in pairs)  # qkv and proj of two blocks
  assert not any("fc1" in name for name in after if name.startswith("opt_state"))  # no moments of what is frozen

  model = loading.load(tmp_path / "whole")
  assert "lora" not in model.params
  a, b = (after[f"ema/lora/block_1/attn/proj/kernel/{name}"] for name in "ab")
  kernel = before["params/block_1/attn/proj/kernel"] + 16 / 2 * (a @ b).reshape(2, 8, 16)
  np.testing.assert_allclose(model.params["block_1"]["attn"]["proj"]["kernel"], kernel, rtol=1e-5, atol=1e-7)
  _, batches = loop._data(model.config)
  result = loop.evaluate.run(model.module, model.params, batches, "gather")
  assert result["loss"] == pytest.approx(summary["loss"], rel=1e-5)
  again = Phase(micro.config(init=str(tmp_path / "whole")), mesh_of(config, 1), 6)
  params = loop._first_state(again)["params"]  # another run begins from the merged kernels
  np.testing.assert_array_equal(
    params["block_1"]["attn"]["proj"]["kernel"], model.params["block_1"]["attn"]["proj"]["kernel"]
  )

  stop_at(4)
  with pytest.raises(Stopped):
    train(config, tmp_path / "stopped")
  stop_at(None)
  train(config, tmp_path / "stopped")
  micro.assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_at_another_resolution_and_with_other_classes(dense):
  config = micro.config(init=dense, model=dict(image_size=(8, 8), num_classes=12))
  with pytest.warns(UserWarning, match="head/kernel of 16 features and 12 classes .* is drawn anew"):
    params = loop._first_state(Phase(config, mesh_of(config, 1), 6))["params"]
  before = micro.state(Path(dense))
  positions = resize.positions(before["params/pos_embed"], (4, 4), (8, 8))
  np.testing.assert_allclose(params["pos_embed"], positions, rtol=1e-6)
  np.testing.assert_array_equal(params["block_1"]["mlp"]["fc2"]["kernel"], before["params/block_1/mlp/fc2/kernel"])
  other = micro.config(init=dense, model=dict(num_classes=12), loss=dict(distill_logits=0.5))
  with pytest.raises(ValueError, match=r"config.loss.distill_logits=0.5, but the teacher .* has no head of .*=12"):
    loop._teacher(Phase(other, mesh_of(config, 1), 6))


def first_step(config, devices):
  """One step on a mesh of so many devices: the parameters before it, the teacher and the metrics."""
  phase = Phase(config, mesh_of(config, devices), 6)
  teacher, state = loop._teacher(phase), loop._first_state(phase)
  params = jax.device_get(loop.lora.merge(state["params"], config.lora.alpha))
  stream = loop.tokred_data.to_device(loop._data(config)[0], sharding.batch_sharding(phase.mesh), 1)
  _, metrics = phase.step(state, next(stream)[0], None, teacher)
  return params, teacher, {name: float(value) for name, value in metrics.items()}


@pytest.mark.thorough
def test_no_device_holds_the_whole_teacher(dense):
  """On 8 devices each has about an eighth; where it is the frozen backbone there is one copy; the numbers are equal."""
  loss = dict(distill_logits=0.5, distill_tokens=0.5, budget=1.0, target=0.85)
  params, teacher, metrics = first_step(adapted(dense, loss=loss, optim=dict(ema=0.0)), 1)
  assert teacher.keys() == {"head/kernel", "head/bias"}
  base = micro.state(Path(dense))
  for name in ("block_0/attn/qkv/kernel", "block_1/attn/proj/kernel", "pos_embed"):  # B is zero: it begins as it was
    np.testing.assert_array_equal(functools.reduce(dict.get, name.split("/"), params), base[f"params/{name}"])

  other = adapted(dense, loss=loss, optim=dict(ema=0.0), teacher=dense + "/")  # a path of which nothing is known
  _, parts, eight = first_step(other, 8)
  assert "block_0/mlp/fc1/kernel" in parts and "block_0/mlp/fc1/kernel" not in teacher
  total = sum(leaf.nbytes for leaf in parts.values())
  held = dict.fromkeys(jax.devices(), 0)
  for leaf in parts.values():
    for shard in leaf.addressable_shards:
      held[shard.device] += shard.data.nbytes
  assert max(held.values()) == min(held.values())
  assert total / 8 <= max(held.values()) < total / 8 * 1.15  # the bias of 10 classes and such are whole everywhere
  assert metrics == pytest.approx(eight, rel=1e-5, abs=1e-6)


# Two blocks of 17 tokens; the pair in block 1 can go down to 2 tokens: of 17 + 17 leave 17 + 2 at the least.
@pytest.mark.parametrize(
  ("unit", "low", "high", "near"),
  [("tokens", 9.5, 17.0, 12.0), ("fraction", None, 1.0, 0.75), ("gmacs", None, None, 0)],
)
def test_what_can_be_reached(unit, low, high, near):
  module = build(micro.config(LEARNED)).module
  reach = losses.reachable(module, unit)
  want = tuple(bound for bound in (low, high) if bound is not None)
  assert [bound for bound, known in zip(reach, (low, high), strict=True) if known is not None] == list(want)
  if unit == "fraction":  # attention of block 1 meets 17 tokens whatever goes: only its MLP and the head save
    mlp, whole = 2 * 16 * 32, losses.dense_macs(module)
    assert reach[0] == pytest.approx(1 - 15 * mlp / whole)
  if unit == "gmacs":
    fraction, whole = losses.reachable(module, "fraction"), losses.dense(module, "gmacs")
    assert reach == pytest.approx([share * whole for share in fraction])
    assert losses.dense(module, "gflops") > 2 * whole


@pytest.mark.parametrize(
  ("loss", "message"),
  [
    (dict(target=0.1), r"config.loss.target=0.1 with target_unit='fraction' cannot be reached: .* sites \['rates'\]"),
    (dict(target=1.2), r"leave 0\.\d+ to 1 \(dense: 1\); valid: in between"),
    (dict(target=9.0, target_unit="tokens"), r"leave 9.5 to 17 \(dense: 17\)"),
    (dict(target=18.0, target_unit="tokens"), r"config.loss.target=18 with target_unit='tokens' cannot be reached"),
    (dict(target=1.0, target_unit="gflops"), r"config.loss.target=1 with target_unit='gflops' cannot be reached"),
  ],
)
def test_targets_out_of_reach(loss, message):
  config = micro.config(LEARNED, loss=dict(budget=1.0) | loss)
  with pytest.raises(ValueError, match=message):
    Phase(config, mesh_of(config, 1), 6)


def test_rates_alone_have_nothing_to_learn_behind_freeze_step():
  alone = dict(freeze=(r"(?!.*/rate/).*",))
  config = micro.config(LEARNED, optim=alone, rates=dict(freeze_step=3))
  with pytest.raises(ValueError, match=r"config.rates.freeze_step=3: config.optim.freeze leaves only rates to learn"):
    Phase(config, mesh_of(config, 1), 6)
  Phase(micro.config(LEARNED, optim=alone, rates=dict(freeze_step=6)), mesh_of(config, 1), 6)


def test_an_unknown_unit():
  with pytest.raises(ValueError, match=r"config.loss.target_unit='gflop' is not a unit; did you mean 'gflops'\?"):
    check(micro.config(loss=dict(target_unit="gflop")))


def test_budgets_in_other_units():
  """A gap is a share of the dense model in every unit: a pair that keeps 10 of 17 lets 13.5 tokens leave a block."""
  module = build(micro.config(LEARNED)).module
  count = np.float32(10.0)
  output = types.SimpleNamespace(logits=np.zeros((1, 10), np.float32), aux={"reduce/rates/count": {0: count, 1: count}})

  def term(unit, target):
    loss = micro.config(LEARNED, loss=dict(budget=1.0, target=target, target_unit=unit)).loss
    return float(losses.terms(loss, module, output, jax.nn.one_hot(np.zeros(1, int), 10), None, None)["budget"])

  assert term("tokens", 12.0) == pytest.approx((1.5 / 17) ** 2, rel=1e-5)
  whole = losses.dense(module, "gmacs")
  assert term("gmacs", 0.8 * whole) == pytest.approx(term("fraction", 0.8), rel=1e-3)


# --- configs/finetune.py


def recipe(arguments):
  spec = importlib.util.spec_from_file_location("finetune", ROOT / "configs" / "finetune.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arguments)


def test_the_recipe_takes_the_architecture_from_the_checkpoint(dense, tmp_path):
  config = recipe(f"init={dense},dataset=digits,budget=0.85,tune=reducers,runlocal")
  given = loading.read_config(Path(dense))
  calm = given.model.to_dict() | dict(gate_cap=config.model.gate_cap)  # the method's own
  assert config.model.to_dict() == calm and config.data.mean == given.data.mean and config.is_locked
  assert (config.loss.distill_logits, config.loss.target, config.rates.freeze_step) == (0.5, 0.85, 0)
  summary = train(config, tmp_path)
  assert summary["step"] == 2 and summary["counts"][1] < 17
  before, after = micro.state(Path(dense)), micro.state(tmp_path)
  assert all((after[name] == before[name]).all() for name in before if name.startswith("params/"))
  assert loading.load(tmp_path).config.data.labels == tuple("0123456789")


def test_the_recipe_in_its_variants():
  full = recipe("runlocal,dataset=digits")
  assert (full.optim.layer_decay, full.lora.rank, full.optim.freeze) == (0.75, 0, ())
  assert full.optim.multipliers == ((r".*/rate/.*", 0.03 / 2e-4),) and full.loss.distill_logits == 0.0
  adapters = recipe("runlocal,dataset=digits,method=evit,tune=lora")
  assert adapters.lora.rank == 8 and adapters.sites.tokens.fuse and adapters.train.mode == "gather"
  plain = recipe("runlocal,dataset=digits,method=dense,image_size=32")
  assert not len(plain.sites) and plain.model.image_size == (32, 32)
  for config in (full, adapters, plain):
    Phase(config, mesh_of(config, 1), 2)  # every regex finds what it means


needs_golden = pytest.mark.skipif(not HF.is_dir(), reason="no micro checkpoints of Hugging Face here")


@needs_golden
def test_the_recipe_from_hugging_face():
  dino = recipe(f"init={HF / 'dinov2'},dataset=digits,budget=0.8")
  assert dino.model.num_registers == 0 and dino.model.layer_scale and dino.model.num_classes == 10
  assert dino.loss.distill_logits == 0.0 and dino.data.mean == (0.485, 0.456, 0.406)  # it had no head
  siglip = recipe(f"init={HF / 'siglip_vision'},dataset=digits,budget=0.8,tune=reducers")
  assert siglip.sites.tokens.score == "column_mean"  # there is no CLS token that could tell
  for config in (dino, siglip):
    Phase(config, mesh_of(config, 1), 2000)


@needs_golden
@pytest.mark.thorough
@pytest.mark.parametrize(
  "arguments", ["dinov2,budget=0.8", "siglip_vision,budget=0.8,tune=lora", "vit_cls,budget=0.9,image_size=48"]
)
def test_the_recipe_trains_from_hugging_face(arguments, one_device, tmp_path):
  config = recipe(f"init={HF / arguments},dataset=digits,runlocal")
  with config.unlocked():
    config.lora.rank = min(config.lora.rank, 2)
    config.loss.distill_tokens = 0.5
  summary = train(config, tmp_path)
  assert summary["step"] == 2 and summary["counts"][-1] < summary["counts"][0]


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    ("dataset=digits", ValueError, "config argument init is missing; valid: a run directory"),
    ("runlocal,dataset=cifr10", ValueError, r"dataset='cifr10' is unknown; did you mean 'cifar10'\?.*with classes=N"),
    ("runlocal,dataset=image_folder", ValueError, "config argument classes is missing"),
    ("runlocal,tune=some", ValueError, "config argument tune='some' is unknown; valid: full, lora, reducers"),
    (
      "runlocal,dataset=digits,tune=reducers,method=tome",
      ValueError,
      "tune='reducers' and method='tome': this .*=full",
    ),
    ("runlocal,method=evitt", ValueError, r"config argument method='evitt' is unknown; did you mean 'evit'\?"),
    ("runlocal,dataset=digits,image_size=18", ValueError, r"config.model.image_size=\(18, 18\) must be"),
    ("init=runs/nowhere,dataset=digits", FileNotFoundError, "runs/nowhere"),
    ("init=DENSE,variant=S/16,dataset=digits", ValueError, "variant='S/16', but .* has 'mu/1' of its own; leave it"),
    ("init=DENSE,num_heads=3,dataset=digits", ValueError, "num_heads=3, but .* of its own; leave it out"),
  ],
)
def test_recipe_errors(arguments, error, message, dense):
  with pytest.raises(error, match=message):
    recipe(arguments.replace("DENSE", dense))
