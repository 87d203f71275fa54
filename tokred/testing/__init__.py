"""`check_reducer` takes a reducer through the laws of the contract and says which one it breaks, and where.

    from tokred.testing import check_reducer
    check_reducer(KeyNorm())

A law is what every reducer promises, such as: with masks, as it learns, it does what it does with gathers, as it ships;
neither dead tokens nor other images change anything.  README has them in words ("The laws"), `LAWS` has their functions
of (module, case), in the order in which they are asked: the first that is broken is named, since others behind it break
with it.  A case is a batch of small tokens in some state, or a micro ViT in which the reducer stands at its default
place.
"""

from collections.abc import Sequence
from typing import Any

from tokred import config as config_lib
from tokred.nn import attention
from tokred.reducers import base
from tokred.testing.cases import make_cases, registered
from tokred.testing.compare import Broken
from tokred.testing.laws import LAWS, Law

__all__ = ["LAWS", "LawError", "check_reducer"]


class LawError(AssertionError):
  """A reducer breaks a law; `law` is its number, `case` the name of the case."""

  def __init__(self, message: str, law: int, case: str):
    super().__init__(message)
    self.law, self.case = law, case


def check_reducer(
  module: base.Reducer | type[base.Reducer], *, laws: Sequence[int] | None = None, cases: Sequence[str] | None = None
) -> None:
  """Runs a reducer through the laws of the contract.

  Args:
    module: an unbound reducer such as `KeyNorm()`, or its class; it need not be registered.
    laws: numbers from 1 to 12; None: all.  Law 11 needs several devices and is left out, with a word in the log, where
      there is one (XLA_FLAGS=--xla_force_host_platform_device_count=8 emulates eight on the CPU).
    cases: names of cases (prefix, later, ragged, bfloat16, free, model); None: all.

  Raises:
    LawError: names the law, the reducer, the case and the place.  Law 8 asks that the gradient of the logits reaches
      every parameter of the reducer; a parameter that learns from a loss of its own shows it by a report whose name
      begins with "loss".
    TypeError: `module` is not a reducer, or a class that cannot be built without arguments.
    ValueError: an unknown law or case, or a feature that no block provides.
  """
  module = module() if isinstance(module, type) else module
  if not isinstance(module, base.Reducer):
    raise TypeError(f"check_reducer takes a tokred Reducer or Planner, not {type(module).__name__}")
  known = sorted({law.number for law in LAWS})
  if isinstance(laws, int) or isinstance(cases, str):
    raise ValueError(f"laws={laws!r}, cases={cases!r}; valid: sequences, such as laws=(2, 5), cases=('model',)")
  for number in laws or ():
    if number not in known:
      raise ValueError(f"laws has {number!r}; valid: {known[0]} to {known[-1]}")
  for name in cases or ():
    if name not in (valid := {case for law in LAWS for case in law.cases}):
      raise ValueError(f"cases has {name!r}; {config_lib.nearest(name, valid)}")
  for need in module.needed():
    if need not in attention.FEATURES and need not in ("update", "mlp_update"):
      raise ValueError(f"needed() has {need!r}; {config_lib.nearest(need, attention.FEATURES)}")
  made = {name: case for name, case in make_cases(module).items() if cases is None or name in cases}
  with registered(type(module)):
    for law in LAWS:
      for name in law.cases:
        if name in made and (laws is None or law.number in laws):
          _enforce(law, module, made[name])


def _enforce(law: Law, module: base.Reducer, case: Any) -> None:
  where = f"law {law.number} ({law.sentence}) is broken by {module.__class__.__name__}, case {case.name}"
  try:
    law.function(module, case)
  except Broken as error:
    raise LawError(f"{where}: {error}", law.number, case.name) from None
  except Exception as error:  # a reducer that raises does not keep the law either
    raise LawError(f"{where}: {type(error).__name__}: {error}", law.number, case.name) from error
