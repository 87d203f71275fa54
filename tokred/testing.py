"""`check_reducer` takes a reducer through the laws of the contract and says which one it breaks, and where.

    from tokred.testing import check_reducer
    check_reducer(KeyNorm())

The laws are those of DESIGN.md.  Each is a function of (module, case); a case is a batch of small tokens in some state,
or a micro ViT in which the reducer stands at its default place.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tokred import config as config_lib
from tokred import tokens as tk
from tokred.nn import attention, vit
from tokred.reducers import base
from tokred.reducers.base import Planner, Reducer
from tokred.tokens import Array, Plan, Tokens

BATCH, NUM, WIDTH, HEADS = 3, 17, 16, 2
NAME = "check_reducer"  # the private name under which an unregistered reducer enters the micro ViT
FAST = {"xla_backend_optimization_level": 0}  # everything here compiles for longer than it runs
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


class LawError(AssertionError):
  """A reducer breaks a law; `law` is its number and `case` the name of the case."""

  def __init__(self, message: str, law: int, case: str):
    super().__init__(message)
    self.law, self.case = law, case


class _Broken(Exception):
  """What is wrong and where, before it is known which law and case it belongs to."""


@dataclasses.dataclass
class Case:
  """A batch of tokens that a reducer meets, and its programs, compiled once for all cases of a check."""

  name: str
  tokens: Tokens  # N = 17; the dead, where there are some, follow the alive
  num_protected: int
  programs: "Programs"

  @property
  def alive(self) -> int:
    """Tokens alive in row 0."""
    return int(self.tokens.alive[0].sum())

  @property
  def even(self) -> bool:
    """All rows have as many tokens alive: what gather mode can have."""
    return len(set(np.asarray(self.tokens.alive.sum(1)).tolist())) == 1

  @property
  def exact(self) -> bool:
    return self.tokens.x.dtype == jnp.float32

  def gathered(self) -> Tokens:
    """The same tokens without the dead."""
    cut = lambda leaf: leaf[:, : self.alive]  # noqa: E731
    t = self.tokens
    moved = jax.tree.map(cut, (t.x, t.mask, t.size, t.position, t.protected, t.feats))
    return Tokens(moved[0], moved[1], moved[2], moved[3], t.owner, moved[4], moved[5])

  def counts(self) -> tuple[int, ...]:
    """Some that the reducer can reach from the tokens alive: the fewest first."""
    fewest = self.programs.module.fewest(self.alive, self.num_protected)
    return tuple(sorted({fewest, max(fewest, self.alive - 4 + self.alive // 16 - 1 + self.alive % 2 * 0)}))

  def tracked(self) -> Tokens:
    """The same tokens, each a source of its own: what leaves then tells who represents whom."""
    return self.tokens.replace(owner=jnp.broadcast_to(jnp.arange(NUM, dtype=jnp.int32), (BATCH, NUM)))
