"""Files that are whole or not there, and manifests that tell damage."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"  # size and SHA-256 of the files beside it
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = ("No space left", "Disk quota exceeded", "File too large")  # tensorstore reports no errno


def write_whole(path: Path, content: bytes) -> None:
  """Writes under a temporary name and renames, so that readers find the old file or the new one."""
  tmp = path.with_name(f".{path.name}.tmp")
  tmp.write_bytes(content)
  os.replace(tmp, path)


def write_json(path: Path, content: Any) -> None:
  """Writes JSON, whole or not at all."""
  write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def write_manifest(folder: str | os.PathLike, leave_out: Collection[str] = ()) -> None:
  """Writes size and SHA-256 of every file under a folder into its `manifest.json`, whole or not at all."""
  folder = Path(folder)
  files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
  files = {name: path for name, path in files.items() if name not in (*leave_out, MANIFEST)}
  with ThreadPoolExecutor() as pool:  # hashing releases the GIL
    content = {
      name: {"size": path.stat().st_size, "sha256": digest}
      for (name, path), digest in zip(files.items(), pool.map(_digest, files.values()), strict=True)
    }
  write_json(folder / MANIFEST, {"files": content})


def find_damage(folder: str | os.PathLike) -> str | None:
  """How the files of a folder differ from its manifest: the first difference in words, or None. Reads everything.

  Detects accidents and edits, not forgery: who can write the files can write the manifest. Files that the manifest does
  not name are ignored.
  """
  folder = Path(folder)
  try:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    files = [(name, folder / name, entry["size"], entry["sha256"]) for name, entry in files.items()]
  except FileNotFoundError:
    return f"{MANIFEST} is missing"
  except (OSError, ValueError, TypeError, KeyError, AttributeError):
    return f"{MANIFEST} is unreadable"

  def check(entry: tuple[str, Path, int, str]) -> str | None:
    name, path, size, digest = entry
    if not path.is_file():
      return f"{name} is missing"
    if path.stat().st_size != size:
      return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None if _digest(path) == digest else f"{name} has another content than was saved (SHA-256)"

  with ThreadPoolExecutor() as pool:
    return next((found for found in pool.map(check, files) if found), None)


def remove_unfinished(folder: Path, quiet: float = 0.5, patience: float = 10.0) -> None:
  """Removes the folder of a failed save, and whatever its writers still make of it.

  Orbax raises with the first array that cannot be written, while others are on their way: they make files while the
  folder is being removed, and the folder anew when it is gone. Returns when it has stayed away for `quiet` seconds, at
  the latest after `patience` seconds.
  """
  start = seen = time.monotonic()
  while (now := time.monotonic()) < min(seen + quiet, start + patience):
    if folder.exists():
      shutil.rmtree(folder, ignore_errors=True)
      seen = now
    time.sleep(0.01)


def reason(error: Exception) -> str:
  """One line; plain words where the disk is full."""
  text = " ".join(str(error).split())
  full = next((known for known in _FULL_TEXTS if known in text), None)
  if isinstance(error, OSError) and error.errno in _FULL:
    full = error.strerror
  if full:
    return f"the disk is full ({full}): make room, then run the same command again"
  return f"{type(error).__name__}: {text[:300]}"


def _digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
