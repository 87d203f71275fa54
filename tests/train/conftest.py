"""Runs of these tests compile the same programs again and again: they share a cache on disk."""

import os

import jax
import pytest

from tokred.train import signals

_CACHE = {
  "jax_compilation_cache_dir": "",
  "jax_persistent_cache_min_compile_time_secs": 0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}
_QUICK = "jax_disable_most_optimizations"  # programs that run for milliseconds are not worth seconds of LLVM


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def cached(cache_dir):
  """JAX's persistent cache for the programs of this module."""
  from jax.experimental.compilation_cache import compilation_cache

  before = {name: getattr(jax.config, name) for name in _CACHE}
  for name, value in _CACHE.items():
    jax.config.update(name, value if value != "" else str(cache_dir))
  jax.config.update(_QUICK, True)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  jax.config.update(_QUICK, False)
  compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def cached_environment(cache_dir):
  """Environment of a process on one CPU device, with the same cache."""
  cache = {name.upper(): str(value) for name, value in _CACHE.items()} | {"JAX_COMPILATION_CACHE_DIR": str(cache_dir)}
  cache[_QUICK.upper()] = "1"
  return os.environ | cache | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.fixture
def stop_at(monkeypatch):
  """stop_at(step): the next run leaves after this step, as if SIGTERM had come; None: it does not."""

  def ask(step):
    class AtStep(real):
      def _any_asked(self, now):
        self.asked = self.asked or (step is not None and now >= step)
        return super()._any_asked(now)

    monkeypatch.setattr(signals, "Sigterm", AtStep)

  real = signals.Sigterm
  return ask
