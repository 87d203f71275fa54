"""What tests of training share."""

import os
import signal

import pytest

from tokred.train import signals


@pytest.fixture(scope="session")
def cached_environment():
  """Environment of a process on one CPU device, with the cache of compiled programs of tests/conftest.py."""
  quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # programs that run for milliseconds are not worth seconds of LLVM
  return os.environ | quick | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.fixture
def stop_at(monkeypatch):
  """stop_at(step): the next run leaves after this step, as if SIGTERM had come; None: it does not."""

  def ask(step):
    class AtStep(real):
      def _any_asked(self, now):
        self.asked = signal.SIGTERM if step is not None and now >= step else self.asked
        return super()._any_asked(now)

    monkeypatch.setattr(signals, "Caught", AtStep)

  real = signals.Caught
  return ask
