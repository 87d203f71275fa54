"""Where arrays live: the mesh of devices, and rules that shard a parameter by its path.

A rule is a pair (regex, spec). The regex matches the end of a path such as `encoder/block_0/mlp/fc1/kernel`, from a
name onwards, so that it finds the same parameter in the optimiser's state (`opt_state/0/mu/encoder/block_0/...`); the
spec names a mesh axis, or None, for each dimension. The first rule that matches counts; what no rule matches is
replicated. Reducers and backbones know nothing of this: XLA places the collectives.

Rules of your own: along a chain of layers the spec has to turn, ("fsdp", "tensor") and then ("tensor", "fsdp"), as in
those below. Two kernels behind each other that are both ("tensor", "fsdp"), with the batch over data and fsdp, give
wrong numbers where a row has few tokens (`x[:, :4] @ a @ b` in plain JAX, 0.10 to 0.12, on a mesh of 2 x 2 x 2), and
two that are both ("fsdp", "tensor") wrong gradients. Compare one step with that of one device.
"""

import collections
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tokred.config import nearest

AXES = ("data", "fsdp", "tensor")

Rules = Iterable[tuple[str, tuple[str | None, ...]]]

DEFAULT_RULES: Rules = (
  (r"attn/qkv/kernel", ("fsdp", None, "tensor", None)),  # (width, 3, heads, head_dim)
  (r"attn/qkv/bias", (None, "tensor", None)),  # (3, heads, head_dim)
  (r"attn/proj/kernel", ("tensor", None, "fsdp")),  # (heads, head_dim, width)
  (r"(mlp|projector)/(fc1|gate)/kernel", ("fsdp", "tensor")),  # (width, hidden)
  (r"(mlp|projector)/(fc1|gate)/bias", ("tensor",)),
  (r"(mlp|projector)/fc2/kernel", ("tensor", "fsdp")),  # (hidden, width)
  (r"patch_embed/kernel", (None, None, None, "fsdp")),  # (height, width, channels, width of the model)
  (r"embed/embedding", ("tensor", "fsdp")),  # (vocabulary, width)
  (r"pos_embed", (None, None, "fsdp")),  # (1, tokens, width)
  (r"llm/head/kernel", ("fsdp", "tensor")),  # (width, vocabulary)
  (r"head/kernel", ("fsdp", None)),  # (width, classes)
)


def initialize_distributed() -> None:
  """Joins the processes of a run, where the environment names them; else does nothing. A second call does nothing.

  Reads JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID; call it before anything
  touches a device. On a cluster that JAX knows (TPU pods, Slurm), `jax.distributed.initialize()` needs none of them.

  Raises:
    ValueError: only some of the three are set.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  values = {name: os.environ[name] for name in names if os.environ.get(name)}
  # JAX's own launchers set the address alone and leave the rest to its cluster detection: not ours to judge.
  if not values.keys() & set(names[1:]) or jax.distributed.is_initialized():
    return
  if len(values) < len(names):
    missing = ", ".join(name for name in names if name not in values)
    raise ValueError(f"{', '.join(values)} set without {missing}; valid: all of {', '.join(names)}, or none")
  address, count, index = (values[name] for name in names)
  # That service catches SIGTERM for a loop that asks it; ours has a handler of its own, before and behind which the
  # signal shall end the process.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(address, num_processes=int(count), process_id=int(index))


def make_mesh(config_mesh: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh (data, fsdp, tensor) over all devices of all processes.

  Axes further right vary fastest, so that `tensor`, which talks most, stays inside a host where it fits.

  Args:
    config_mesh: `config.mesh`: devices along `data`, `fsdp` and `tensor`; at most one -1, all that are left.
    devices: those to use; all by default.

  Raises:
    ValueError: sizes that do not use exactly the devices there are, or `tensor` across processes.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {axis: int(config_mesh[axis]) for axis in AXES}
  got = ", ".join(f"config.mesh.{axis}={size}" for axis, size in sizes.items())
  open_axes = [axis for axis, size in sizes.items() if size == -1]
  if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f"{got}: valid: positive integers, and at most one -1 (all devices that are left)")
  used = math.prod(size for size in sizes.values() if size != -1)
  if open_axes and len(devices) % used == 0:
    sizes[open_axes[0]] = len(devices) // used
  elif open_axes or used != len(devices):
    raise ValueError(
      f"{got}: {used} does not divide {len(devices)} devices; valid: divisors of {len(devices)}"
      if open_axes
      else f"{got} ask for {used} devices but there are {len(devices)}; valid: a product of {len(devices)}, or one -1"
    )
  local = min(collections.Counter(device.process_index for device in devices).values())
  if local % sizes["tensor"]:  # devices along it hold the same examples, and each process reads its own
    valid = ", ".join(str(n) for n in range(1, local + 1) if local % n == 0)
    raise ValueError(f"config.mesh.tensor={sizes['tensor']} spans processes of {local} devices; valid: {valid}")
  # Auto: jit propagates shardings by itself. Explicit axes, the default of newer JAX, would ask each op for one.
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def make_rules(config_mesh: Mapping[str, Any]) -> Rules:
  """`config.mesh.rules`, checked, before `DEFAULT_RULES`.

  Raises:
    ValueError: a rule that is not a pair (regex, spec), an invalid regex, an axis that the mesh does not have or that
      the spec names twice.
  """
  rules = tuple(config_mesh["rules"])
  for i, rule in enumerate(rules):
    name = f"config.mesh.rules[{i}]={rule!r}"
    if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
      raise ValueError(f"{name}: valid: (regex, (axis or None for each dimension))")
    regex, spec = rule
    try:
      re.compile(regex)
    except re.error as error:
      raise ValueError(f"{name}: {regex!r} is not a regex: {error}") from None
    if not isinstance(spec, tuple | list):
      raise ValueError(f"{name}: the spec must be a tuple with an axis or None for each dimension")
    for axis in spec:
      if axis is not None and axis not in AXES:
        raise ValueError(f"{name}: {axis!r} is not an axis of the mesh; {nearest(str(axis), AXES)}, None")
    axes = [axis for axis in spec if axis is not None]
    if len(set(axes)) < len(axes):
      raise ValueError(f"{name}: an axis may shard one dimension only")
  return (*((regex, tuple(spec)) for regex, spec in rules), *DEFAULT_RULES)


def check_used(config_mesh: Mapping[str, Any], tree: Any) -> None:
  """Checks that every rule of `config.mesh.rules` finds something in a state.

  Raises:
    ValueError: one does not.
  """
  names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  for i, (regex, spec) in enumerate(config_mesh["rules"]):
    if not any(map(_end_of_path(regex).fullmatch, names)):
      sample = [name.removeprefix("params/") for name in names if name.startswith("params/")]
      raise ValueError(
        f"config.mesh.rules[{i}]={(regex, spec)!r}: {regex!r} matches the end of no path of the state; valid are those "
        f"of {', '.join(sample[:: max(1, len(sample) // 6)][:6])}"
      )


def _end_of_path(regex: str) -> re.Pattern[str]:
  return re.compile(rf"(?:.*/)?(?:{regex})")


def path_name(path: tuple[Any, ...]) -> str:
  """A key path of `jax.tree_util` as "a/b/c": dict keys, attributes of dataclasses and named tuples, indices."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
  """The sharding of every leaf, by the first rule that matches its path.

  A dimension that its axis does not divide is replicated, so that the smallest models run on any mesh. An optimiser
  may keep statistics of lower rank under a parameter's name (adafactor's rows and columns): those are replicated too.

  Args:
    tree: pytree of arrays or `jax.ShapeDtypeStruct`: parameters, optimiser state, or a state that holds both.
    mesh: of `make_mesh`.
    rules: of `make_rules`.

  Returns:
    The same tree of `NamedSharding`.

  Raises:
    ValueError: a rule with more axes than its parameter has dimensions.
  """
  rules = [(_end_of_path(regex), regex, spec) for regex, spec in rules]

  def sharding(path, leaf) -> NamedSharding:
    name, shape = path_name(path), np.shape(leaf)
    spec: tuple[str | None, ...] = ()
    for pattern, regex, spec_of_rule in rules:
      if shape and pattern.fullmatch(name):
        spec = _fit(spec_of_rule, name, shape, regex, mesh)
        break
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def _fit(spec: tuple, name: str, shape: tuple[int, ...], regex: str, mesh: Mesh) -> tuple[str | None, ...]:
  """The spec without the axes that do not divide their dimension."""
  if len(spec) > len(shape):
    if any(part.isdigit() for part in name.split("/")):  # an index in a path: a tuple of optax, not a parameter
      return ()
    raise ValueError(
      f"the rule ({regex!r}, {spec}) has {len(spec)} axes but {name} has shape {shape}; shorten the spec"
    )
  return tuple(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape, strict=False))


def spread(tree: Any, mesh: Mesh) -> Any:
  """Shardings that leave each device its part of every array, whatever the array means: 1/N on N devices.

  For what is only read, such as a teacher: a step gathers an array where it needs it.  One axis of the mesh after the
  other cuts the dimension that is longest by then, of those that it divides; an axis that divides none copies.

  Args:
    tree: pytree of arrays or `jax.ShapeDtypeStruct`.
    mesh: of `make_mesh`.

  Returns:
    The same tree of `NamedSharding`.
  """

  def sharding(leaf: Any) -> NamedSharding:
    left, axes = list(np.shape(leaf)), [[] for _ in np.shape(leaf)]
    for axis, size in sorted(mesh.shape.items(), key=lambda item: -item[1]):
      fits = [d for d, length in enumerate(left) if size > 1 and length % size == 0]
      if fits:
        longest = max(fits, key=lambda d: left[d])
        left[longest] //= size
        axes[longest].append(axis)
    return NamedSharding(mesh, PartitionSpec(*(tuple(names) or None for names in axes)))

  return jax.tree.map(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Batches are split over `data` and `fsdp` together, along their first dimension."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
  """Checks that every device gets as many examples as the others in every micro-batch.

  Raises:
    ValueError: it does not; the message has the nearest valid sizes.
  """
  if accumulate < 1:
    raise ValueError(f"config.train.accumulate={accumulate}; valid: 1 or more")
  data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
  unit = data * fsdp * accumulate
  if batch_size >= 1 and batch_size % unit == 0:
    return
  lower = batch_size // unit * unit
  valid = f"{lower} or {lower + unit}" if lower > 0 else f"{unit}"
  raise ValueError(
    f"config.train.batch_size={batch_size} is not divisible by {unit} (mesh data={data} x fsdp={fsdp}, "
    f"config.train.accumulate={accumulate}); nearest valid: {valid}"
  )


def abstract_sharded(init: Callable[..., Any], *args: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
  """What `init(*args)` would return, as `jax.ShapeDtypeStruct` with shardings: the target of a restore."""
  tree = jax.eval_shape(init, *args)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    shardings(tree, mesh, rules),
  )


def init_sharded(init: Callable[..., Any], *args: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
  """`init(*args)`, every array sharded from its first moment: no device ever holds a whole large one."""
  tree = jax.eval_shape(init, *args)
  return jax.jit(init, out_shardings=shardings(tree, mesh, rules))(*args)
