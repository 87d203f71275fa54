"""What a run directory holds besides its checkpoints: the config of the run, and the words that it learned from."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from tokred import checkpoint
from tokred.config import complete
from tokred.files import write_json

CONFIG = "config.json"
WORDS = "words.json"  # of a run that learned from text: what its tokenizer knows
LOCK = ".lock"  # empty; the operating system knows who holds it

# A run may be resumed with other values of these: they do not change what is learned.
_MAY_CHANGE = re.compile(
  r"train\.(log_every|eval_every|checkpoint_every|keep_checkpoints)|data\.(num_workers|prefetch|data_dir)"
  r"|mesh\..*|eval\..*"
)


def write_config(directory: str | os.PathLike, config: ConfigDict) -> None:
  """Writes `config.json` into the run directory, whole or not at all; by the first process only."""
  if jax.process_index() == 0:
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_json(Path(directory) / CONFIG, config.to_dict())


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
  """As long as one is within, or until the process dies, no other run may be; the first of several processes decides.

  Makes the directory.  Where its file system has no locks nobody is kept out.

  Raises:
    ValueError: another run is within; in all processes.
  """
  with contextlib.ExitStack() as held:
    free = True
    if jax.process_index() == 0:
      Path(directory).mkdir(parents=True, exist_ok=True)
      try:
        import fcntl  # Windows has none

        fcntl.flock(held.enter_context((Path(directory) / LOCK).open("a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        free = False
      except (ImportError, OSError):
        pass
    if jax.process_count() > 1:
      free = bool(multihost_utils.broadcast_one_to_all(np.asarray(free)))
    if not free:
      raise ValueError(f"workdir='{directory}': another run trains there; wait for its end, or use another --workdir")
    yield


def read_config(directory: str | os.PathLike) -> ConfigDict:
  """The config of a run directory, or of the folder of one step, complete and locked.

  Raises:
    FileNotFoundError: the directory has no `config.json`.
    ValueError: it is not JSON, or has fields that tokred does not know.
  """
  path = Path(directory) / CONFIG
  if (Path(directory) / "config" / "metadata").is_file():  # as `Checkpoints.save` lays it out
    path = Path(directory) / "config" / "metadata"
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; valid: a run directory, as train.py --workdir makes it")
  try:
    plain = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); restore it, or use another --workdir") from None
  return complete(plain)


def check_config(directory: str | os.PathLike, config: ConfigDict) -> None:
  """Checks that a run directory, if it holds a run, holds one of this config.

  Fields that do not change what is learned (logging, worker processes, mesh, ...) may differ.

  Raises:
    ValueError: other fields differ; the message lists them with both values.  Or there are checkpoints of no config.
  """
  if not (Path(directory) / CONFIG).is_file():
    if found := checkpoint.steps(Path(directory) / checkpoint.FOLDER):
      raise ValueError(
        f"{directory} holds checkpoints but no {CONFIG}, so that nothing tells which run they are of; restore it: "
        f"{checkpoint.FOLDER}/{found[-1]}/config/metadata has the fields of step {found[-1]}; or use another --workdir"
      )
    return
  saved, given = (flatten_dict(c.to_dict(), sep=".") for c in (read_config(directory), config))
  lines = [
    f"config.{name}: {saved.get(name, 'absent')!r} there, {given.get(name, 'absent')!r} here"
    for name in sorted(saved.keys() | given.keys())
    if saved.get(name, "absent") != given.get(name, "absent") and not _MAY_CHANGE.fullmatch(name)
  ]
  if lines:
    raise ValueError(
      f"{Path(directory)} holds a run of another config ({'; '.join(lines)}); "
      "use another --workdir, or set the fields back to resume"
    )
