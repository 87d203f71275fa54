"""What files of weights say about a model, and their arrays under our names, fitted to a parameter tree."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from tokred.nn.vit import VARIANTS, shape
from tokred.pretrained import resize
from tokred.pretrained.rules import ANEW, Arrays, Lazy, Row, reading, translate

HEADS = ("head", "head_dist")
SIZES = ("width", "depth", "mlp_dim", "num_heads")
SILENT = ("activation", "norm_eps", "rope_theta", "position")  # no name or shape of an array tells these


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights that lie in files, and what is known of their model."""

  path: str
  fields: dict[str, Any]  # config: model, data, ... as far as the files tell
  state: Arrays  # by their names
  rows: Callable[[int], tuple[Row, ...]]  # the table for a number of heads
  grid: tuple[int, int] | None = None  # patches along height and width that the positions are for
  ask: tuple[str, ...] = ()  # fields of config.model that the files do not tell
  own: Arrays = dataclasses.field(default_factory=dict)  # what has our names already: parameters of reducers

  def config(self, model: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """Fields of the config with those of `config.model` that the user sets.

    A size in `variant` that is not the file's replaces its width, depth, mlp_dim and num_heads; the same size with
    another patch changes the patch alone.  Heads that the file does not tell are the variant's where the width is.

    Raises:
      ValueError: `strict`, and the files do not tell a field that the user does not give either; it is asked for.
    """
    known, size = dict(self.fields.get("model", {})), str(model.get("variant", "")).split("/")[0]
    other = size not in ("", known.get("variant", "").split("/")[0])
    told = SIZES if other or VARIANTS.get(size, (0,))[0] == known.get("width") else ()
    missing = [field for field in self.ask if field not in model and field not in told]
    if missing and strict:
      wanted = ", ".join(f"{field!r}: ..." for field in missing)
      why = f" (its width is {known.get('width')}, that of variant={model['variant']!r} is not)" if size else ""
      raise ValueError(f"{self.path} does not tell config.model.{missing[0]}{why}; give it: model={{{wanted}}}")
    if other:
      known = {field: value for field, value in known.items() if field not in SIZES}
    out = dict(self.fields) | {"model": known | dict(model)}
    labels = out.get("data", {}).get("labels", ())
    if len(labels) != out["model"].get("num_classes", len(labels)):
      out["data"] = {field: value for field, value in out["data"].items() if field != "labels"}
    return out

  def check(self, model: Mapping[str, Any]) -> None:
    """Raises ValueError where `config.model` differs from the files in sizes, or in what their arrays do not show."""
    known, ours = self.fields.get("model", {}), shape(model)
    sizes = [(field, known.get(field), getattr(ours, field)) for field in SIZES]
    if other := [
      f"config.model.{field}: {there} there, {here} here" for field, there, here in sizes if there not in (None, here)
    ]:
      raise ValueError(f"{self.path} is of another size ({'; '.join(other)}); set the fields as there")
    turned = "rope2d" in (model["position"], known.get("position"))  # other positions show in the arrays
    for field in SILENT:
      if field not in known or model[field] == known[field]:
        continue
      if turned or field not in ("rope_theta", "position"):
        raise ValueError(
          f"config.model.{field}={model[field]!r}, but {self.path} has {known[field]!r}; "
          f"set config.model.{field}={known[field]!r}"
        )

  def arrays(
    self, target: Mapping[str, Any], grid: tuple[int, int] | None = None, new_heads: bool = True
  ) -> dict[str, Lazy]:
    """The arrays by our paths, fitted to `target`; nothing is read yet.

    Positions and the patch kernel are resized.  A head that the target does not have is left out; one of other classes
    stays the target's own (`ANEW`), with a warning that says so.

    Args:
      target: nested dict of arrays or ShapeDtypeStructs.
      grid: patches of the target along height and width; None: as many as in the file, or a square.
      new_heads: else a head that differs is left for `merge` to complain about.

    Raises:
      ValueError: half of a head.
    """
    wanted = traverse_util.flatten_dict(dict(target), sep="/")
    qkv = wanted.get("block_0/attn/qkv/kernel")
    rows = self.rows(qkv.shape[2] if qkv is not None else 1)
    loaded = translate(self.state, reading(rows)) | dict(self.own)
    for name in {"pos_embed", "registers", "patch_embed/kernel"} & loaded.keys():  # sums are not rounded to the file's
      loaded[name] = loaded[name].map(lambda a: np.asarray(a, np.float32))
    _positions(loaded, wanted, self.grid, grid)
    kernel, place = loaded.get("patch_embed/kernel"), wanted.get("patch_embed/kernel")
    if kernel is not None and place is not None and kernel.shape != place.shape and kernel.shape[2:] == place.shape[2:]:
      loaded["patch_embed/kernel"] = kernel.map(lambda w: resize.patch_kernel(w, place.shape[0]))
    if new_heads:
      self._heads(loaded, wanted)
    return loaded

  def _heads(self, loaded: dict[str, Lazy], wanted: Mapping[str, Any]) -> None:
    for head in HEADS:
      name, names = f"{head}/kernel", (f"{head}/kernel", f"{head}/bias")
      theirs, ours = (tree[name].shape if name in tree else None for tree in (loaded, wanted))
      if not theirs and names[1] in loaded:
        raise ValueError(f"{self.path} has the bias of a classifier ({names[1]}) but not its weight; fetch it again")
      if ours is None:
        for leaf in names:
          loaded.pop(leaf, None)
      elif theirs != ours:
        loaded |= dict.fromkeys(names, ANEW)
        has = f"one of {theirs[0]} features and {theirs[1]} classes" if theirs else "none"
        warnings.warn(
          f"{name} of {ours[0]} features and {ours[1]} classes (config.model.num_classes) is drawn anew: "
          f"{self.path} has {has}",
          stacklevel=4,
        )


def _positions(loaded: dict[str, Lazy], wanted: Mapping[str, Any], grid: Any, new_grid: Any) -> None:
  """Brings positions to our form: rows for CLS and distillation, then patches; and to the target's grid.

  Some give a position to every prefix token, registers too, some to none; ours has one for CLS and distillation.  What
  a register gets from its position is a constant and goes into the register; where CLS has none, it gets zeros.
  """
  table, place = loaded.get("pos_embed"), wanted.get("pos_embed")
  if table is None or place is None or len(table.shape) != 3:
    return
  registers = loaded.get("registers")
  prefix = sum(name in loaded for name in ("cls_token", "dist_token"))
  count = registers.shape[1] if registers is not None else 0
  new_patches = place.shape[1] - sum(name in wanted for name in ("cls_token", "dist_token"))
  extra = table.shape[1] - (grid[0] * grid[1] if grid else new_patches)
  if count and extra == prefix + count:
    rows = table.map(lambda t: t[:, prefix:extra])
    loaded["registers"] = Lazy(registers.shape, registers.dtype, lambda: registers.read() + rows.read())
    table = table.map(lambda t: np.concatenate([t[:, :prefix], t[:, extra:]], axis=1))
  elif extra == 0 and prefix and table.shape[1] == place.shape[1]:
    return  # the grid was a guess, and a wrong one
  elif extra == 0 and prefix:
    table = table.map(lambda t: np.pad(t, ((0, 0), (prefix, 0), (0, 0))))
  if grid and table.shape[1] == prefix + grid[0] * grid[1]:
    side = round(new_patches**0.5)
    new_grid = new_grid or (grid if grid[0] * grid[1] == new_patches else (side, side))
    table = table.map(lambda t: resize.positions(t, grid, new_grid))
  loaded["pos_embed"] = table


def square(count: int, extras: tuple[int, ...]) -> tuple[int, int] | None:
  """The square grid of the first of `extras` that leaves one of `count`, or None."""
  for extra in extras:
    side = round(max(count - extra, 0) ** 0.5)
    if side and side * side == count - extra:
      return side, side
  return None


def strip(state: Arrays, prefixes: tuple[str, ...], ignored: tuple[str, ...] = ()) -> dict[str, Any]:
  """Names without such prefixes, however many of them, and without those that match `ignored` (whole, stripped)."""
  before = re.compile("(?:" + "|".join(re.escape(p) for p in prefixes) + ")*") if prefixes else re.compile("")
  out, drop = {}, re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or "(?!)")
  for name, array in state.items():
    short = name[before.match(name).end() :]
    if drop.fullmatch(short):
      continue
    if short in out:
      raise ValueError(f"{name} and another array are both called {short}")
    out[short] = array
  return out


def variant(width: int, depth: int, mlp_dim: int, num_heads: int, patch: int) -> str:
  """The variant of these sizes, or that of the nearest width, whose sizes the explicit fields replace."""
  exact = [name for name, sizes in VARIANTS.items() if sizes == (width, depth, mlp_dim, num_heads)]
  nearest = min(VARIANTS, key=lambda name: (abs(VARIANTS[name][0] - width), name))
  return f"{exact[0] if exact else nearest}/{patch}"
