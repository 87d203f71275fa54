"""SIGTERM, seen by all processes at the same step."""

import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

LOOK_EVERY = 10  # steps between two looks at the other processes' signals, since asking them costs a round trip


class Sigterm:
  """Within it, SIGTERM only sets a flag; the loop looks at it between steps.

  Args:
    last: step behind which the loop looks no more.
  """

  def __init__(self, last: int):
    self.last = last

  def __enter__(self) -> Callable[[int], bool]:
    self.asked = False
    try:
      self.before = signal.signal(signal.SIGTERM, self._note)
    except ValueError:  # not the main thread: somebody else handles signals
      self.before = None
    return self._any_asked

  def __exit__(self, *_: Any) -> None:
    if self.before is not None:
      signal.signal(signal.SIGTERM, self.before)

  def _note(self, *_: Any) -> None:
    self.asked = True

  def _any_asked(self, step: int) -> bool:
    if jax.process_count() == 1:
      return self.asked
    if step % LOOK_EVERY and step != self.last:
      return False
    return bool(np.any(multihost_utils.process_allgather(np.asarray(self.asked))))  # all stop at the same step
