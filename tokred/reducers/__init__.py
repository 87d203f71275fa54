"""Reducers, one file a method; importing this package registers them all."""

import importlib
import pkgutil

from tokred.reducers.base import OWN, REGISTRY, Planner, Reducer, get, keep_top, known, merge_into, register

__all__ = ["OWN", "REGISTRY", "Planner", "Reducer", "get", "keep_top", "known", "merge_into", "register"]

for _module in pkgutil.iter_modules(__path__):  # a new method is a new file, and nothing else
  importlib.import_module(f"{__name__}.{_module.name}")
