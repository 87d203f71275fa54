import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from tokred import sharding
from tokred.config import default

ROOT = Path(__file__).parent.parent


def mesh_of(data, fsdp, tensor=1):
  return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, jax.devices()[: data * fsdp * tensor])


def init(key):
  """Parameters named as those of the ViT: width 16, 4 heads of 4, hidden 32, 10 classes."""
  normal = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
  block = {
    "attn": {
      "qkv": {"kernel": normal(0, 16, 3, 4, 4), "bias": normal(1, 3, 4, 4)},
      "proj": {"kernel": normal(2, 4, 4, 16), "bias": normal(3, 16)},
    },
    "mlp": {
      "fc1": {"kernel": normal(4, 16, 32), "bias": normal(5, 32)},
      "fc2": {"kernel": normal(6, 32, 16), "bias": normal(7, 16)},
    },
  }
  return {
    "patch_embed": {"kernel": normal(8, 2, 2, 3, 16)},
    "pos_embed": normal(9, 1, 5, 16),
    "encoder": {"block_0": block},
    "head": {"kernel": normal(10, 16, 10), "bias": normal(11, 10)},
  }


def specs(tree, mesh, rules=sharding.DEFAULT_RULES):
  leaves = jax.tree_util.tree_leaves_with_path(sharding.shardings(tree, mesh, rules))
  return {sharding.path_name(path): leaf.spec for path, leaf in leaves}


@pytest.mark.parametrize(
  "sizes, want",
  [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 8, 1), (1, 8, 1)), ((2, 2, -1), (2, 2, 2))],
)
def test_mesh_takes_all_devices(sizes, want):
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
  assert tuple(mesh.shape.items()) == tuple(zip(sharding.AXES, want, strict=True))
  assert mesh.axis_types == (AxisType.Auto,) * 3
  assert mesh.devices.flatten().tolist() == jax.devices()  # in order: neighbours share `tensor`


@pytest.mark.parametrize(
  "sizes, message",
  [
    ((3, 1, 1), "config.mesh.data=3.*ask for 3 devices but there are 8"),
    ((16, 1, 1), "config.mesh.data=16.*16 devices but there are 8"),
    ((-1, 3, 1), "config.mesh.fsdp=3.*3 does not divide 8 devices"),
    ((-1, -1, 1), "config.mesh.fsdp=-1.*at most one -1"),
    ((0, 1, 1), "config.mesh.data=0.*positive"),
    ((-2, 1, 1), "config.mesh.data=-2.*positive"),
  ],
)
def test_mesh_errors(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))


def test_default_rules():
  got = specs(jax.eval_shape(init, jax.random.key(0)), mesh_of(1, 4, 2))
  block = "encoder/block_0"
  assert got[f"{block}/attn/qkv/kernel"] == PartitionSpec("fsdp", None, "tensor", None)
  assert got[f"{block}/attn/qkv/bias"] == PartitionSpec(None, "tensor", None)
  assert got[f"{block}/attn/proj/kernel"] == PartitionSpec("tensor", None, "fsdp")
  assert got[f"{block}/attn/proj/bias"] == PartitionSpec()
  assert got[f"{block}/mlp/fc1/kernel"] == PartitionSpec("fsdp", "tensor")
  assert got[f"{block}/mlp/fc1/bias"] == PartitionSpec("tensor")
  assert got[f"{block}/mlp/fc2/kernel"] == PartitionSpec("tensor", "fsdp")
  assert got["patch_embed/kernel"] == PartitionSpec(None, None, None, "fsdp")
  assert got["pos_embed"] == PartitionSpec(None, None, "fsdp")
  assert got["head/kernel"] == PartitionSpec("fsdp", None)
  assert got["head/bias"] == PartitionSpec()


def test_axis_that_does_not_divide_is_replicated():
  tree = {"mlp": {"fc1": {"kernel": jax.ShapeDtypeStruct((6, 32), jnp.float32)}}}  # 6 is not a multiple of 4
  assert specs(tree, mesh_of(1, 4, 2)) == {"mlp/fc1/kernel": PartitionSpec(None, "tensor")}


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple


@pytest.mark.parametrize("optimiser", [optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=8)])
def test_rules_find_the_optimiser_state(optimiser):
  def make(key):
    params = init(key)
    return State(jnp.int32(0), params, optimiser.init(params))

  mesh = mesh_of(1, 4, 2)
  got = specs(jax.eval_shape(make, jax.random.key(0)), mesh)
  assert got["step"] == PartitionSpec()
  assert got["params/encoder/block_0/mlp/fc1/kernel"] == PartitionSpec("fsdp", "tensor")
  moments = {name: spec for name, spec in got.items() if name.endswith("/mu/encoder/block_0/mlp/fc1/kernel")}
  assert all(spec == PartitionSpec("fsdp", "tensor") for spec in moments.values())
  # adafactor's rows and columns have lower rank than the rule of their parameter, and stay whole
  rows = {name: spec for name, spec in got.items() if name.endswith("/v_row/encoder/block_0/attn/qkv/kernel")}
  assert all(spec == PartitionSpec() for spec in rows.values())
  assert len(moments) + len(rows) == 1


def test_path_name():
  tree = State(1, {"a": [2, {"b": 3}]}, optax.ScaleByAdamState(4, 5, 6))
  names = [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  assert names == ["step", "params/a/0", "params/a/1/b", "opt_state/count", "opt_state/mu", "opt_state/nu"]


def test_user_rules_come_first():
  config = default().mesh
  config.rules = ((r"mlp/fc1/kernel", (None, "fsdp")), (r"encoder/block_0/attn/.*", ()))
  got = specs(jax.eval_shape(init, jax.random.key(0)), mesh_of(1, 4, 2), sharding.make_rules(config))
  assert got["encoder/block_0/mlp/fc1/kernel"] == PartitionSpec(None, "fsdp")
  assert got["encoder/block_0/attn/qkv/kernel"] == PartitionSpec()
  assert got["encoder/block_0/mlp/fc2/kernel"] == PartitionSpec("tensor", "fsdp")


@pytest.mark.parametrize(
  "rule, message",
  [
    (("(", ("fsdp",)), r"config.mesh.rules\[0\].*not a regex"),
    ((".*", ("fdsp",)), r"config.mesh.rules\[0\].*'fdsp' is not an axis.*did you mean 'fsdp'"),
    ((".*", ("fsdp", "fsdp")), "one dimension only"),
    ((".*", "fsdp"), "tuple"),
    ((".*",), r"valid: \(regex"),
  ],
)
def test_rule_errors(rule, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_rules({"rules": (rule,)})


def test_rule_longer_than_the_rank():
  tree = {"cls_token": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
  with pytest.raises(ValueError, match=r"rule \('cls_token'.*3 axes but cls_token has shape \(4, 8\)"):
    sharding.shardings(tree, mesh_of(1, 2), (("cls_token", (None, None, "fsdp")),))


def test_check_batch():
  mesh = mesh_of(2, 4)
  sharding.check_batch(16, mesh, 2)
  with pytest.raises(ValueError, match=r"config.train.batch_size=20 .*by 16 \(mesh data=2 x fsdp=4.*valid: 16 or 32"):
    sharding.check_batch(20, mesh, 2)
  with pytest.raises(ValueError, match=r"batch_size=4 .*valid: 8$"):
    sharding.check_batch(4, mesh)
  with pytest.raises(ValueError, match="accumulate=0"):
    sharding.check_batch(8, mesh, 0)


def test_init_is_sharded_and_equal_on_any_mesh():
  make = lambda key: {"mlp": {"fc1": {"kernel": jax.random.normal(key, (16, 32))}}}
  one = sharding.init_sharded(make, jax.random.key(3), mesh=mesh_of(1, 1))["mlp"]["fc1"]["kernel"]
  many = sharding.init_sharded(make, jax.random.key(3), mesh=mesh_of(2, 2, 2))["mlp"]["fc1"]["kernel"]
  np.testing.assert_array_equal(one, many)
  assert many.addressable_shards[0].data.shape == (8, 16)  # (16 / fsdp 2, 32 / tensor 2)
  abstract = sharding.abstract_sharded(make, jax.random.key(3), mesh=mesh_of(2, 2, 2))["mlp"]["fc1"]["kernel"]
  assert (abstract.sharding, abstract.shape, abstract.dtype) == (many.sharding, many.shape, many.dtype)


def test_eight_devices_equal_one():
  def make(key):
    normal = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape) / 4
    return {"mlp": {"fc1": {"kernel": normal(0, 16, 32)}, "fc2": {"kernel": normal(1, 32, 16)}}}

  def loss(params, x):  # (batch, 16)
    return (jax.nn.gelu(x @ params["mlp"]["fc1"]["kernel"]) @ params["mlp"]["fc2"]["kernel"] ** 2).mean()

  x = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
  results = []
  for mesh in (mesh_of(1, 1), mesh_of(2, 2, 2)):
    params = sharding.init_sharded(make, jax.random.key(0), mesh=mesh)
    out = jax.tree.map(lambda leaf: leaf.sharding, params)
    grads = jax.jit(jax.grad(loss), out_shardings=out)(params, jax.device_put(x, sharding.batch_sharding(mesh)))
    results.append(jax.device_get(grads))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


def environment(count, devices):
  """That of so many processes on this machine, but for their JAX_PROCESS_ID."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  return os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": address,
    "JAX_COORDINATOR_BIND_ADDRESS": address,
    "JAX_NUM_PROCESSES": str(count),
  }


def test_two_processes_share_a_mesh():
  code = """
    import jax, numpy as np
    from tokred import sharding
    sharding.initialize_distributed()
    sharding.initialize_distributed()  # again: nothing happens
    mesh = sharding.make_mesh({"data": -1, "fsdp": 2, "tensor": 1})
    assert mesh.devices.size == 4 and jax.process_count() == 2
    try:
      sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 4})
    except ValueError as error:
      print(error)
    mine = np.arange(4, dtype=np.float32) + 4 * jax.process_index()
    x = jax.make_array_from_process_local_data(sharding.batch_sharding(mesh), mine)
    print("sum", float(jax.jit(lambda x: x.sum())(x)))
  """
  env = environment(2, devices=2)
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", textwrap.dedent(code)],
      env=env | {"JAX_PROCESS_ID": str(i)},
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=60) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for out, err in outputs:
    assert "sum 28.0" in out, err  # 0 + 1 + ... + 7
    assert "config.mesh.tensor=4 spans processes of 2 devices; valid: 1, 2" in out, err


def test_sigterm_ends_a_process_that_has_no_handler():
  code = """
    import os, signal, time
    from tokred import sharding
    sharding.initialize_distributed()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
  """
  command = [sys.executable, "-c", textwrap.dedent(code)]
  env = environment(1, devices=1) | {"JAX_PROCESS_ID": "0"}
  assert subprocess.run(command, env=env, cwd=ROOT, timeout=60).returncode == -signal.SIGTERM


def test_half_named_processes(monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES set without JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"):
    sharding.initialize_distributed()
