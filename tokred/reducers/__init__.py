"""Reducers, one file a method; importing this package registers them."""

from tokred.reducers import diffrate, gumbel, router, tome, topk
from tokred.reducers.base import REGISTRY, Planner, Reducer, get, keep_top, merge_into, register

__all__ = [
  "REGISTRY",
  "Planner",
  "Reducer",
  "diffrate",
  "get",
  "gumbel",
  "keep_top",
  "merge_into",
  "register",
  "router",
  "tome",
  "topk",
]
