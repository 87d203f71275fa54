"""Learnable token reduction in JAX and Flax.

Importing this package imports no model code until a name is used: a config file may import `tokred.config` alone.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
  "Model": "tokred.model",
  "Plan": "tokred.tokens",
  "Planner": "tokred.reducers",
  "Reducer": "tokred.reducers",
  "Tokens": "tokred.tokens",
  "build": "tokred.model",
  "freeze": "tokred.model",
  "keep_top": "tokred.reducers",
  "load": "tokred.loading",
  "merge_into": "tokred.reducers",
  "register": "tokred.reducers",
}
_MODULES = (
  "bench bench_vlm budgets calibrate checkpoint config cost data evaluate export losses lora model nn predict "
  "pretrained probe processing rates reducers scores schedules sharding sites sweep testing tokens train viz vqa"
).split()

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
  if name in _HOME:
    return getattr(importlib.import_module(_HOME[name]), name)
  if name in _MODULES:
    return importlib.import_module(f"tokred.{name}")
  raise AttributeError(f"module 'tokred' has no attribute {name!r}")
