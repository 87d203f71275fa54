"""Foreign names to ours and back: rules, and both trees compared by name.

A table of rows (theirs, ours, layout) says what an array is called on each side and how its layout changes.  It becomes
rules (regex, replacement, transform) for reading, and the same rows turned round become those for writing.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

Transform = Callable[[np.ndarray], np.ndarray]
Rule = tuple[str, str, Transform | None]  # regex of the whole name, replacement, transform

LISTED = 30  # names in an error message
THEIRS, OURS = 0, -3  # axis along which parts of an array follow each other: rows of a matrix; q, k, v of heads
PART = re.compile(r"(.*)\[(\d+)/(\d+)\]")


@dataclasses.dataclass(frozen=True)
class Lazy:
  """An array that is still in its file; `read` fetches it, every time anew."""

  shape: tuple[int, ...]
  dtype: Any
  read: Callable[[], np.ndarray]

  def map(self, transform: Transform) -> "Lazy":
    """What `transform` will make of it; its shape is found on an array without memory."""
    blank = transform(np.broadcast_to(np.zeros((), self.dtype), self.shape))
    return Lazy(blank.shape, blank.dtype, lambda: transform(self.read()))


Arrays = Mapping[str, np.ndarray | Lazy]

ANEW = Lazy((), np.float32, lambda: np.zeros(()))  # in place of an array: the target's own value stays


class Layout(NamedTuple):
  """A change of layout, there and back."""

  read: Transform
  write: Transform


class Row(NamedTuple):
  """One array; {} stands for the same number on both sides, a name that ends with [1/3] for the second of three parts.

  The parts of one of ours follow each other along the third axis from behind (that of q, k, v), those of one of theirs
  along the first.
  """

  theirs: str
  ours: str
  layout: Layout | None = None


def reading(rows: Iterable[Row]) -> tuple[Rule, ...]:
  """Rules from their names to ours."""
  return tuple(_rule(r.theirs, r.ours, r.layout and r.layout.read, THEIRS) for r in rows)


def writing(rows: Iterable[Row]) -> tuple[Rule, ...]:
  """Rules from our names to theirs."""
  return tuple(_rule(r.ours, r.theirs, r.layout and r.layout.write, OURS) for r in rows)


def _rule(source: str, target: str, transform: Transform | None, axis: int) -> Rule:
  part = PART.fullmatch(source)
  if part:
    source, index, count = part[1], int(part[2]), int(part[3])
    whole = transform or (lambda a: a)
    transform = lambda a: whole(_part(a, index, count, axis))
  return re.escape(source).replace(r"\{\}", r"(\d+)"), target.replace("{}", r"\1"), transform


def _part(array: np.ndarray, index: int, count: int, axis: int) -> np.ndarray:
  size, rest = divmod(array.shape[axis], count)
  if rest:
    raise ValueError(f"{array.shape[axis]} is not divisible by {count}")
  return np.moveaxis(np.moveaxis(array, axis, 0)[index * size : (index + 1) * size], 0, axis)


def translate(state: Arrays, rules: Sequence[Rule], axis: int = OURS) -> dict[str, Any]:
  """Renames and transforms every array by the first rule whose regex matches its whole name.

  Where several rules have that very regex, each takes its part.  A name that no rule matches stays as it is, and so do
  parts that are not complete, so that `merge` lists them as left over.

  Args:
    state: arrays by their foreign names.
    rules: the table.
    axis: along which parts are put together, "name[0/2]" and "name[1/2]".

  Returns:
    Arrays by their new names; what is lazy stays lazy.

  Raises:
    ValueError: two arrays end under one name, or a transform does not suit an array's shape.
  """
  out: dict[str, Any] = {}
  parts: dict[str, dict[int, Any]] = {}
  for source, array in state.items():
    first = next((rule[0] for rule in rules if re.fullmatch(rule[0], source)), None)
    found = [rule for rule in rules if rule[0] == first] or [(re.escape(source), source.replace("\\", r"\\"), None)]
    for pattern, replacement, transform in found:
      name = re.fullmatch(pattern, source).expand(replacement)
      try:
        piece = array
        if transform is not None:
          piece = array.map(transform) if isinstance(array, Lazy) else transform(array)
      except ValueError:
        raise ValueError(f"{source} of shape {array.shape} has not the layout of {name}") from None
      if name in out:
        raise ValueError(f"{source} and another array both stand for {name}")
      out[name] = piece
      if part := PART.fullmatch(name):
        parts.setdefault(f"{part[1]}/{part[3]}", {})[int(part[2])] = name
  for whole, names in parts.items():
    name, count = whole.rsplit("/", 1)
    if len(names) == int(count):
      out[name] = _join([out.pop(names[i]) for i in range(len(names))], axis)
  return out


def _join(pieces: Sequence[Any], axis: int) -> Any:
  if not isinstance(pieces[0], Lazy):
    return np.concatenate(pieces, axis)
  shape = list(pieces[0].shape)
  shape[axis] = sum(piece.shape[axis] for piece in pieces)
  read = lambda: np.concatenate([piece.read() for piece in pieces], axis)
  return Lazy(tuple(shape), pieces[0].dtype, read)


def compare(target: Mapping[str, Any], loaded: Arrays) -> None:
  """Raises ValueError where names or shapes of both sides differ; the message lists both.

  Args:
    target: nested dict of arrays or of `jax.ShapeDtypeStruct`s; what is under `reduce/` may be missing in `loaded`.
    loaded: arrays by path, "block_0/attn/qkv/kernel".
  """
  wanted = traverse_util.flatten_dict(dict(target), sep="/")
  absent = [name for name in wanted if name not in loaded]
  kept = [name for name in wanted if _stays(name, loaded)]
  problems = {
    "missing": [name for name in absent if name not in kept],
    "left over": [name for name in loaded if name not in wanted],
    "of another shape": [
      f"{name} {tuple(loaded[name].shape)} for {tuple(leaf.shape)}"
      for name, leaf in wanted.items()
      if name in loaded and name not in kept and tuple(loaded[name].shape) != tuple(leaf.shape)
    ],
    "reducers' own or new and still without values (initialise them first)": [
      name for name in kept if isinstance(wanted[name], jax.ShapeDtypeStruct)
    ],
  }
  if any(problems.values()):
    raise ValueError("; ".join(f"{what}: {_listed(names)}" for what, names in problems.items() if names))


def merge(target: Mapping[str, Any], loaded: Arrays) -> dict[str, Any]:
  """Puts arrays into the places of a parameter tree, one after the other: the host holds one at a time.

  Args:
    target: nested dict of arrays or of `jax.ShapeDtypeStruct`s.
    loaded: arrays by path, "block_0/attn/qkv/kernel"; lazy ones are read when it is their turn.

  Returns:
    The tree of `target`; every leaf in its dtype, and on its devices where it has a NamedSharding.

  Raises:
    ValueError: names on one side only, or shapes that differ; lists all of both sides.
  """
  compare(target, loaded)
  wanted = traverse_util.flatten_dict(dict(target), sep="/")
  placed = {name: leaf if _stays(name, loaded) else _place(loaded[name], leaf) for name, leaf in wanted.items()}
  return traverse_util.unflatten_dict(placed, sep="/")


def _stays(name: str, loaded: Arrays) -> bool:
  """Whether the target's own value stays: a reducer's that the file does not have, or one to be drawn anew."""
  return loaded[name] is ANEW if name in loaded else "reduce" in name.split("/")


def _place(array: Any, leaf: Any) -> jax.Array:
  """In the leaf's dtype; sharded as the leaf is, each device getting its own part from the host."""
  array = (array.read() if isinstance(array, Lazy) else array).astype(leaf.dtype)
  sharding = getattr(leaf, "sharding", None)
  return jax.device_put(array, sharding) if isinstance(sharding, jax.sharding.NamedSharding) else jnp.asarray(array)


def _listed(names: Sequence[str]) -> str:
  names = sorted(names)
  return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


MATRIX = Layout(np.transpose, np.transpose)  # (out, in) <-> (in, out)
CONV = Layout(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
TOKEN = Layout(lambda v: v[None, None], lambda v: v[0, 0])  # (D,) <-> (1, 1, D)
TABLE = Layout(lambda v: v[None], lambda v: v[0])  # (N, D) <-> (1, N, D)


def to_heads(num_heads: int, packed: int = 0) -> Layout:
  """(n H d[, D]) <-> ([D, ]n, H, d) for n packed matrices; without the n where it is 0."""
  inner = (packed, num_heads) if packed else (num_heads,)

  def write(w: np.ndarray) -> np.ndarray:
    return w.reshape(*w.shape[: w.ndim - len(inner) - 1], -1).T

  return Layout(lambda w: w.T.reshape(*w.shape[1:], *inner, -1), write)


def from_heads(num_heads: int) -> Layout:
  """(D, H d) <-> (H, d, D)."""
  return Layout(lambda w: w.T.reshape(num_heads, -1, w.shape[0]), lambda w: w.reshape(-1, w.shape[-1]).T)


def linear(theirs: str, ours: str) -> tuple[Row, Row]:
  """A dense layer of torch."""
  return Row(theirs + ".weight", ours + "/kernel", MATRIX), Row(theirs + ".bias", ours + "/bias")


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
  """A layer norm of torch."""
  return Row(theirs + ".weight", ours + "/scale"), Row(theirs + ".bias", ours + "/bias")


def heads_in(theirs: str, ours: str, num_heads: int, part: str = "") -> tuple[Row, Row]:
  """A dense layer whose output is split by heads; `part` of ours, as "[0/3]"."""
  layout = to_heads(num_heads, int(bool(part)))
  return Row(theirs + ".weight", f"{ours}/kernel{part}", layout), Row(theirs + ".bias", f"{ours}/bias{part}", layout)


def heads_out(theirs: str, ours: str, num_heads: int) -> tuple[Row, Row]:
  """A dense layer that reads all heads."""
  return Row(theirs + ".weight", ours + "/kernel", from_heads(num_heads)), Row(theirs + ".bias", ours + "/bias")
