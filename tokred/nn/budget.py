"""How many tokens of a prompt are where in a language stack: text stays, and the prompts of a batch differ.

A share is one of a row's own visual tokens, so that a prompt gets in any batch what it gets alone; a number counts all
tokens of a row, text included.  Shapes are those of the row that keeps most.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokred.config import nearest
from tokred.layout import Sites, Spot, Stack
from tokred.nn.attention import FEATURES
from tokred.rates import Rows
from tokred.sites import parse
from tokred.tokens import Array

PLACES = ("before", "attn", "after")
# Planners that look at a row's free tokens only and take a count for each row.  Those that split tokens by their places
# in a row (ToMe and its kin) would take the text into account, and the padding.
SUITED = ("dpcknn", "maxmin", "mmr", "topk")
PROVIDED = ("last_attention", "last_attention_ahead", "query", "key", "value", "update")


@dataclasses.dataclass(frozen=True)
class Census:
  """What the host knows of a batch of prompts; it makes the shapes static."""

  free: int  # tokens that may go, of the prompt that has fewest
  text: int  # tokens that may not, of the prompt that has most


def census(mask: Any, protected: Any) -> Census:
  """Counts a batch.

  Args:
    mask: (B, N) concrete; nonzero where there is a token.
    protected: (B, N) concrete; nonzero where it never leaves.
  """
  mask, protected = np.asarray(mask) > 0, np.asarray(protected) > 0
  return Census(int((mask & ~protected).sum(1).min()), int((mask & protected).sum(1).max()))


def layout(sites: Mapping[str, Any], depth: int, length: int) -> Sites:
  """Validates the sites of a language stack; how many tokens arrive is known with a prompt only.

  Args:
    sites: `config.sites`, those of this stack.
    depth: layers.
    length: the longest prompt.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  out = parse(sites, Stack(depth, max(length, 2), 0, has_cls=False, name="llm"))
  for spot in out.spots:
    field = f"sites.{spot.site}"
    if spot.place not in PLACES:
      raise ValueError(f"{field}.place={spot.place!r} is not available in the llm; {nearest(spot.place, PLACES)}")
    if spot.rate != "fixed" or spot.budget is None:
      raise ValueError(
        f"{field}.rate={spot.rate!r}: in the llm tokens are counted by a fixed keep, not by r or learned"
      )
    if spot.reducer not in SUITED:
      raise ValueError(f"{field}.reducer={spot.reducer!r} is not available in the llm; {nearest(spot.reducer, SUITED)}")
    if spot.proportional:
      raise ValueError(f"{field}.proportional=True is not available in the llm; valid: False")
    for need in spot.module(parent=None).needed():
      if need not in PROVIDED or (need.endswith("_ahead") and spot.place != "before"):
        valid = [name for name in PROVIDED if not name.endswith("_ahead") or spot.place == "before"]
        raise ValueError(
          f"{field}.reducer={spot.reducer!r} reads {need}, which the llm does not have at place={spot.place!r}; valid: "
          f"scores of {', '.join(valid)}"
        )
  return out


def needs(sites: Sites, layer: int) -> tuple[str, ...]:
  """Features of FEATURES that the block of a layer leaves behind."""
  return tuple(n for n in sites.needs(layer) if n in FEATURES and not n.endswith("_ahead"))


def ahead(sites: Sites, layer: int) -> tuple[str, ...]:
  """Features that a layer must provide before it is computed."""
  wanted = {need for spot in sites.at(layer, "before") for need in spot.module(parent=None).needed()}
  return tuple(sorted(need for need in wanted if need.endswith("_ahead")))


def capacities(sites: Sites, slots: int, known: Census) -> tuple[int, ...]:
  """Tokens that leave each spot, of the row that keeps most.

  Args:
    sites: of `layout`.
    slots: tokens of a row, padding counted.
    known: of the batch.

  Raises:
    ValueError: a number of tokens that leaves no room for a prompt's text.
  """
  n, free, out = slots, known.free, []
  for spot in sites.spots:
    if isinstance(spot.budget, float) and spot.budget <= 1.0:
      left = _share(spot, free)
      n, free = n - free + left, left
    else:
      keep, fewest = int(spot.budget), spot.module(parent=None).fewest(n, known.text)
      if keep < (fewest if known.free else known.text):
        raise ValueError(
          f"sites.{spot.site}.keep={keep} at layer {spot.layer}, but a prompt has {known.text} tokens of text; "
          f"valid: {fewest} or more, or a share of the visual tokens"
        )
      n, free = min(n, keep), max(min(free, keep - known.text), 0)
    out.append(n)
  return tuple(out)


def rows(sites: Sites, caps: tuple[int, ...], slots: int, text: Array, free: Array) -> dict[str, tuple[Rows, ...]]:
  """Counts of every row and spot, by site: what `Reduce` takes as `keeps`.

  Args:
    sites: of `layout`.
    caps: of `capacities`.
    slots: tokens of a row, padding counted.
    text: (B,) int32 protected tokens of each prompt.
    free: (B,) int32 the others.
  """
  out: dict[str, tuple[Rows, ...]] = {}
  for spot, capacity in zip(sites.spots, caps, strict=True):
    if isinstance(spot.budget, float) and spot.budget <= 1.0:  # a table: float32 would round another way than the host
      free = jnp.asarray([_share(spot, f) for f in range(slots + 1)], jnp.int32)[free]
    else:
      free = jnp.clip(int(spot.budget) - text, 0, free)
    out[spot.site] = (*out.get(spot.site, ()), Rows(text + free, capacity))
  return out


def _share(spot: Spot, free: int) -> int:
  """Of so many visual tokens, those that a share leaves, or as few as the method can reach."""
  reducer = spot.module(parent=None)
  return max(reducer.count(float(spot.budget), free, 0, free), reducer.fewest(free, 0)) if free else 0
