"""SIGTERM and Ctrl-C, seen by all processes at the same step."""

import os
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

LOOK_EVERY = 10  # steps between two looks at the other processes' signals, since asking them costs a round trip
_CTRL_C = b"\nCtrl-C: leaves when this step is saved; once more to leave at once\n"


class Caught:
  """Within it, SIGTERM and the first Ctrl-C are only noted; the loop looks between steps, and gets 0 or the signal.

  Args:
    last: step behind which the loop looks no more.
  """

  def __init__(self, last: int):
    self.last = last

  def __enter__(self) -> Callable[[int], int]:
    self.asked, self.before = 0, {}
    for number in (signal.SIGTERM, signal.SIGINT):
      if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
        continue  # a job in a shell's background: its terminal's Ctrl-C is meant for others
      try:
        self.before[number] = signal.signal(number, self._note)
      except ValueError:  # not the main thread: somebody else handles signals
        break
    return self._any_asked

  def __exit__(self, *_: Any) -> None:
    for number, handler in self.before.items():
      signal.signal(number, handler)

  def _note(self, number: int, *_: Any) -> None:
    self.asked = number
    if number == signal.SIGINT:
      signal.signal(number, self.before[number])
      os.write(2, _CTRL_C)  # print may be what was interrupted

  def _any_asked(self, step: int) -> int:
    if jax.process_count() == 1:
      return self.asked
    if step % LOOK_EVERY and step != self.last:
      return 0
    return int(np.max(multihost_utils.process_allgather(np.asarray(self.asked))))  # all stop at the same step
