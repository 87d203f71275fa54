"""Checkpoints: the whole state of a run, its data iterator and its config, in one folder for each step.

    checkpoints/
      400/
        state/           every array of the state, by path (orbax, OCDBT)
        data/metadata    the position of the data iterator of each process, JSON
        config/metadata  the config, JSON
        manifest.json    size and SHA-256 of every file above

A step is written under a temporary name, hashed, and then renamed: at whatever moment the process dies, a folder
that is named by its step alone is whole, and its manifest came with it. So a folder without a manifest is none that a
save has finished (half deleted, or tampered with), and is refused like one whose files differ from the manifest.
Hashes are checked by `restore` and `restore_params` only, since they read everything; nothing is ever unpickled.
The directory is a path of a mounted file system, shared by all processes.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from tokred.files import MANIFEST, find_damage, reason, remove_unfinished, write_manifest

FOLDER = "checkpoints"  # inside a run directory

# Written by orbax after the manifest, when it seals the folder; the first is checked by itself, the second is a marker.
_SEALS = ("_CHECKPOINT_METADATA", "commit_success.txt")


class CheckpointError(ValueError):
  """A checkpoint that cannot be written, or must not be read."""


class Checkpoints:
  """The checkpoints of one run; the only writer of its directory.

  All processes of a run make one and call its methods together. To read the checkpoints of another run, which may still
  be training, use `restore_params`: this class removes the leftovers of interrupted saves when it starts.
  """

  def __init__(self, directory: str | os.PathLike, keep: int = 2):
    """
    Args:
      directory: the folder of the steps, usually `<workdir>/checkpoints`; made where it does not exist.
      keep: how many of the latest steps stay.

    Raises:
      ValueError: `keep` below 1.
      CheckpointError: the directory cannot be made.
    """
    if keep < 1:
      raise ValueError(f"config.train.keep_checkpoints={keep}; valid: 1 or more")
    self.directory = Path(directory).absolute()
    self._saving: int | None = None
    self._keep = keep
    quieten_orbax()
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      max_to_keep=self._keep,
      cleanup_tmp_directories=True,
      # Called in the background thread of the first process when every file is written, before the folder is renamed.
      async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
    )
    try:
      return ocp.CheckpointManager(self.directory, options=options)
    except OSError as error:
      raise CheckpointError(f"{self.directory} cannot be used for checkpoints: {reason(error)}") from error

  def save(
    self,
    step: int,
    state: Any,
    *,
    data_state: Mapping[str, Any],
    config: Mapping[str, Any] | ConfigDict,
    wait: bool = False,
  ) -> None:
    """Saves in the background; returns when the state is copied, so that its buffers may be donated.

    First waits for the save before, and raises the error that it may have met. A step that is there is left as it is.

    Args:
      step: of the optimiser.
      state: pytree of arrays; `restore_params` finds what is under its names `params`, `ema`, ...
      data_state: position of this process's data iterator, as JSON can hold it.
      config: of the run.
      wait: return only when the checkpoint is final.

    Raises:
      CheckpointError: this save or the one before failed; the last good checkpoint is untouched.
      TypeError: `data_state` is not JSON.
    """
    self.wait()
    if step in steps(self.directory):
      if (self.directory / str(step) / MANIFEST).is_file():
        return
      self._manager.delete(step)  # the rest of an interrupted deletion, met again after going back to an older step
    processes = _gather(json.dumps(dict(data_state)))
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state),
      data=ocp.args.JsonSave({"processes": processes}),
      config=ocp.args.JsonSave(plain),
    )
    self._saving = step
    with self._explain():
      _check_room(self.directory, state)
      self._manager.save(step, args=items, force=True)
    if wait:
      self.wait()

  def wait(self) -> None:
    """Returns when no save is under way.

    Raises:
      CheckpointError: the save failed.
    """
    with self._explain():
      self._manager.wait_until_finished()

  def latest_step(self) -> int | None:
    """The last step whose save is complete."""
    return max(steps(self.directory), default=None)

  def restore(self, target: Any, step: int | None = None) -> tuple[Any, dict]:
    """Reads a checkpoint onto the devices that `target` names, whichever it was saved from.

    Args:
      target: the tree that was saved, of arrays or `jax.ShapeDtypeStruct` with shardings; numpy arrays stay numpy.
      step: the latest by default.

    Returns:
      The state, and the `data_state` of this process.

    Raises:
      FileNotFoundError: there is no such step.
      CheckpointError: the checkpoint is damaged, or holds other arrays than `target`.
    """
    self.wait()
    step = self.latest_step() if step is None else step
    if step is None or step not in steps(self.directory):
      raise FileNotFoundError(f"no checkpoint{'' if step is None else f' of step {step}'} in {self.directory}")
    folder = self.directory / str(step)
    _verify(folder)
    _compare(folder, _leaves(_saved_tree(folder)), _leaves(target))
    restore_args = jax.tree.map(_restore_arg, target)
    items = ocp.args.Composite(
      state=ocp.args.PyTreeRestore(target, restore_args=restore_args), data=ocp.args.JsonRestore()
    )
    restored = self._manager.restore(step, args=items)
    return restored["state"], _own(restored["data"]["processes"], folder)

  def close(self) -> None:
    """Waits, then stops the background threads.

    Raises:
      CheckpointError: the last save failed.
    """
    try:
      self.wait()
    finally:
      self._manager.close()

  def _write_manifest(self) -> None:
    final = self.directory / str(self._saving)
    folder = final.with_name(final.name + ocp.utils.TMP_DIR_SUFFIX)
    folder = folder if folder.exists() else final  # a file system without rename, where orbax writes in place
    write_manifest(folder, leave_out=_SEALS)

  @contextlib.contextmanager
  def _explain(self) -> Iterator[None]:
    """Turns what a failed save raises into one line, and removes what it has left: the disk may be full."""
    try:
      yield
    except Exception as error:
      for _ in range(3):  # a failed manager keeps errors in several places and raises them one after another
        with contextlib.suppress(Exception):
          self._manager.close()
          break
      if jax.process_index() == 0:
        remove_unfinished(self.directory / f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}")
      self._manager = self._open()
      good = self.latest_step()
      rest = "no earlier checkpoint exists" if good is None else f"the last good checkpoint is step {good}"
      raise CheckpointError(f"{self.directory}: step {self._saving} not saved: {reason(error)}; {rest}") from error


def steps(directory: str | os.PathLike) -> list[int]:
  """The steps with a complete save, ascending; safe while another process writes there."""
  directory = Path(directory)
  if not directory.is_dir():
    return []
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def restore_params(
  path: str | os.PathLike, name: str = "params", step: int | None = None, target: Any = None
) -> dict[str, Any]:
  """One part of a saved state, without the code or the optimiser that made it.

  Args:
    path: run directory, its folder of checkpoints, or the folder of one step.
    name: the part: `params`, `ema`, ...
    step: where `path` holds several; the latest by default.
    target: tree of `jax.ShapeDtypeStruct` with shardings: the part is read straight onto these devices.

  Returns:
    Nested dict of numpy arrays, or of jax arrays as in `target`.

  Raises:
    FileNotFoundError: there is no checkpoint.
    CheckpointError: the checkpoint is damaged, has no such part, or holds other arrays than `target`.
  """
  quieten_orbax()
  folder = _step_folder(Path(path).absolute(), step)
  _verify(folder)
  tree = _saved_tree(folder)
  if not jax.tree.leaves(tree.get(name)):
    parts = ", ".join(sorted(part for part, value in tree.items() if jax.tree.leaves(value)))
    raise CheckpointError(f"{folder} has no {name!r}; it has: {parts}")
  if target is None:
    target = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), tree[name])  # no memory
  _compare(folder, _leaves({name: tree[name]}), _leaves({name: target}))
  item = {name: target}
  args = ocp.args.PyTreeRestore(item, restore_args=jax.tree.map(_restore_arg, item), partial_restore=True)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(folder / "state", args=args)[name]


def _step_folder(path: Path, step: int | None) -> Path:
  if (path / "state").is_dir():
    return path
  directory = path / FOLDER if (path / FOLDER).is_dir() else path
  found = steps(directory)
  if not found or (step is not None and step not in found):
    raise FileNotFoundError(f"no checkpoint{'' if step is None else f' of step {step}'} in {directory}")
  return directory / str(found[-1] if step is None else step)


def _verify(folder: Path) -> None:
  """Raises CheckpointError unless every file is as it was saved. One process reads; the others hear of it."""
  problem = _problem(folder) if jax.process_index() == 0 else None
  if jax.process_count() > 1:
    bad = multihost_utils.broadcast_one_to_all(np.int32(problem is not None))
    problem = problem or ("process 0 finds it damaged" if bad else None)
  if problem is None:
    return
  older = [step for step in reversed(steps(folder.parent)) if folder.name.isdecimal() and step < int(folder.name)]
  intact = next((step for step in older if _problem(folder.parent / str(step)) is None), None)
  way_out = (
    "no older step is intact" if intact is None else f"step {intact} is intact: delete {folder} to go back to it"
  )
  raise CheckpointError(f"checkpoint {folder} is damaged: {problem}; {way_out}")


def _problem(folder: Path) -> str | None:
  """What is wrong with the files of a step, or None."""
  try:
    items = json.loads((folder / _SEALS[0]).read_text())["item_handlers"].keys()
  except (OSError, ValueError, TypeError, KeyError, AttributeError):
    return f"{_SEALS[0]} is missing or unreadable"
  return find_damage(folder) if {"state", "data", "config"} <= items else f"{_SEALS[0]} does not name the items"


def _saved_tree(folder: Path) -> Any:
  """The tree of the saved state, with descriptions in place of arrays."""
  return ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  return {
    name: (tuple(leaf.shape), leaf.dtype) if hasattr(leaf, "shape") else (np.shape(leaf), np.asarray(leaf).dtype)
    for name, (_, leaf) in zip(names, leaves, strict=True)
  }


def _compare(folder: Path, saved: dict, wanted: dict) -> None:
  """Orbax would cast another dtype and say little of another tree: names both sides instead."""
  parts = []
  if absent := sorted(wanted.keys() - saved.keys()):
    parts.append(f"not in the checkpoint: {', '.join(absent)}")
  if unused := sorted(saved.keys() - wanted.keys()):
    parts.append(f"only in the checkpoint: {', '.join(unused)}")
  for name in sorted(saved.keys() & wanted.keys()):
    if saved[name] != wanted[name]:
      (shape, dtype), (wanted_shape, wanted_dtype) = saved[name], wanted[name]
      parts.append(f"{name} is {dtype}{list(shape)} there, {wanted_dtype}{list(wanted_shape)} here")
  if parts:
    raise CheckpointError(f"checkpoint {folder} is of another model or optimiser: {'; '.join(parts)}")


def _restore_arg(leaf: Any) -> ocp.RestoreArgs:
  if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
    return ocp.RestoreArgs(restore_type=np.ndarray)
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _gather(text: str) -> list[Any]:
  """The JSON of every process, parsed, in their order."""
  if jax.process_count() == 1:
    return [json.loads(text)]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - data.size)))
  return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def _own(processes: list[dict], folder: Path) -> dict:
  """The part of this process; with another number of processes only what all of them agree on can be resumed."""
  if len(processes) == jax.process_count():
    return processes[jax.process_index()]
  if all(part == processes[0] for part in processes):
    return processes[0]
  raise CheckpointError(
    f"checkpoint {folder} has the data iterators of {len(processes)} processes, each at its own place, but there are "
    f"{jax.process_count()}; resume with {len(processes)} processes"
  )


def _check_room(directory: Path, state: Any) -> None:
  """Raises OSError where a state will not fit: a write that fails half way says the same in a hundred lines."""
  needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(directory).free
  if free < needed:
    raise OSError(errno.ENOSPC, f"{free:,} bytes are free, {needed:,} needed")


def _quiet(record: logging.LogRecord) -> bool:
  """Orbax logs a page for each save, and what it raises once more: leaves warnings, and errors that are not raised."""
  orbax = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"
  if record.name == "asyncio":  # tells of every array that was not written because another one could not be
    return orbax not in record.getMessage() and "OCDBT database" not in record.getMessage()
  if orbax not in record.pathname:
    return True
  return record.levelno >= logging.WARNING and not record.exc_info


def quieten_orbax() -> None:
  """Leaves out of the log what orbax says of each save, and what it raises anyway."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_quiet)  # a filter that is there already is not added twice
  if sys.unraisablehook is sys.__unraisablehook__:
    sys.unraisablehook = _late


def _late(unraisable: Any) -> None:
  """Passes over arrays whose writing ends after a failed save was given up: the save has raised already."""
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)
