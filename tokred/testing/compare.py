"""What a law asserts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokred.tokens import Tokens


class Broken(Exception):
  """What is wrong and where; `check_reducer` adds the law, the reducer and the case."""


def same(what: str, got: Any, want: Any, tolerance: float = 0.0, where: Any = None) -> None:
  """Raises Broken unless two trees agree to `tolerance` x the largest value (or 1).

  Args:
    what: begins the message.
    got: a tree of arrays.
    want: a tree of the same shape.
    tolerance: 0: bit for bit, except that NaN equals NaN.
    where: (B, N) bool; other tokens may differ.
  """
  for (path, a), (_, b) in zip(*(jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (got, want)), strict=True):
    name = what + jax.tree_util.keystr(path)
    if a.shape != b.shape or a.dtype != b.dtype:
      raise Broken(f"{name} is {a.dtype}{list(a.shape)}, expected {b.dtype}{list(b.shape)}")
    a, b = (np.asarray(leaf.astype(jnp.float32) if leaf.dtype != bool else leaf, np.float64) for leaf in (a, b))
    with np.errstate(invalid="ignore"):
      gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    gap = np.where(np.isnan(gap), np.inf, gap)
    if where is not None:
      gap = np.where(np.asarray(where).reshape(where.shape + (1,) * (gap.ndim - 2)), gap, 0.0)
    finite = np.abs(b[np.isfinite(b)])
    limit = tolerance * max(1.0, finite.max(initial=0.0))
    if gap.size and gap.max() > limit:
      raise Broken(f"{name}: max |difference| {gap.max():.3g}, above {limit:.3g}, {spot(gap)}")


def spot(gap: np.ndarray) -> str:
  """The place of the largest entry in words."""
  index = [int(i) for i in np.unravel_index(np.argmax(gap), gap.shape)]
  words = [f"{word} {i}" for word, i in zip(("row", "token", "channel"), index, strict=False)]
  return "at " + ", ".join(words) if words else "(a scalar)"


def require(condition: Any, message: str) -> None:
  """Raises Broken with the message, and the first place where a condition over (B, N) does not hold."""
  condition = np.asarray(condition)
  if not condition.all():
    raise Broken(message + (" " + spot((~condition).astype(float)) if condition.ndim else ""))


def state(tokens: Tokens) -> dict[str, Any]:
  """The fields of tokens that are compared."""
  t = tokens
  return dict(x=t.x, size=t.size, alive=t.alive, position=t.position, protected=t.protected, feats=t.feats)
