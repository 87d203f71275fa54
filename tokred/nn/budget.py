"""How many tokens of a prompt are where in a language stack: text stays, and the prompts of a batch differ.

A share is one of a row's own visual tokens, so that a prompt gets in any batch what it gets alone; a number counts all
tokens of a row, text included.  Shapes are those of the row that keeps most.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokred import cost
from tokred.config import nearest
from tokred.layout import Sites, Spot, Stack
from tokred.nn.decoder_scope import ROUTE
from tokred.nn.received import FEATURES, RECEIVED
from tokred.rates import Rows, Shares, Threshold
from tokred.reducers.base import REGISTRY
from tokred.sites import parse
from tokred.tokens import VISUAL, Array

PLACES = ("before", "around", "ahead", "attn", "after")
PROVIDED = ("last_attention", "last_attention_ahead", "query", "key", "value", "update", "self_attention")
PROVIDED += ("text_attention", VISUAL)


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


def layout(sites: Mapping[str, Any], depth: int, length: int, heads: int) -> Sites:
  """Validates the sites of a language stack; how many tokens arrive is known with a prompt only.

  Args:
    sites: `config.sites`, those of this stack.
    depth: layers.
    length: the longest prompt.
    heads: of keys and values.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  out = parse(sites, Stack(depth, max(length, 2), 0, has_cls=False, name="llm", heads=heads))
  for spot in out.spots:
    field = f"sites.{spot.site}"
    if spot.place not in PLACES:
      raise ValueError(f"{field}.place={spot.place!r} is not available in the llm; {nearest(spot.place, PLACES)}")
    if spot.place == "around" and not spot.type.decodes:
      valid = sorted(name for name, cls in REGISTRY.items() if cls.decodes)
      raise ValueError(
        f"{field}.reducer={spot.reducer!r} has no rule for the tokens that are written, and so cannot stand around a "
        f"layer of the llm; valid: {', '.join(valid)}"
      )
    _check_rate(spot, field)
    if spot.proportional:
      raise ValueError(f"{field}.proportional=True is not available in the llm; valid: False")
    if spot.until > spot.layer:
      raise ValueError(f"{field}.until={spot.until}: in the llm tokens go round one layer; valid: {spot.layer}")
    if spot.place in ("ahead", "attn", "after") and (scope := out.at(spot.layer, "around")):
      raise ValueError(
        f"{field}.layers has {spot.layer}, where tokens go round because of sites.{scope[0].site}; valid: other layers"
      )
    options = dict(spot.options)
    if not spot.layer <= options.get("guide", spot.layer) < depth and options["guide"] != -1:
      raise ValueError(
        f"{field}.guide={options['guide']} is no layer behind it; valid: {spot.layer} to {depth - 1}, or -1"
      )
    for need in spot.module(parent=None).needed():
      known = (*PROVIDED, ROUTE) if spot.place == "around" else PROVIDED
      if need not in known or (need.endswith("_ahead") and spot.place not in ("before", "around")):
        valid = [name for name in PROVIDED if not name.endswith("_ahead") or spot.place == "before"]
        raise ValueError(
          f"{field}.reducer={spot.reducer!r} reads {need}, which the llm does not have at place={spot.place!r}; valid: "
          f"scores of {', '.join(valid)}"
        )
  return out


def _check_rate(spot: Spot, field: str) -> None:
  counted = spot.budget is not None or spot.rate == "learned"
  if spot.rate not in ("fixed", "threshold", "learned") or not counted:
    raise ValueError(
      f"{field}.rate={spot.rate!r}: in the llm tokens are counted by a fixed keep, a threshold, or learned shares, not "
      "by r"
    )


def needs(sites: Sites, layer: int) -> tuple[str, ...]:
  """Features of FEATURES that the block of a layer leaves behind."""
  return tuple(n for n in sites.needs(layer) if n in FEATURES and not n.endswith("_ahead"))


def ahead(sites: Sites, layer: int) -> tuple[str, ...]:
  """Features that a layer must provide before it is computed."""
  wanted = {need for spot in sites.at(layer, "before") for need in spot.module(parent=None).needed()}
  return tuple(sorted(need for need in wanted if need.endswith("_ahead")))


def guides(sites: Sites) -> tuple[Spot, ...]:
  """Spots that learn from the attention of a deeper layer."""
  return tuple(spot for spot in sites.spots if dict(spot.options).get("guide", -1) >= 0)


def routed(sites: Sites) -> bool:
  """Whether layers share a router."""
  return any(ROUTE in spot.module(parent=None).needed() for spot in sites.spots)


def capacities(sites: Sites, slots: int, known: Census, more: bool = False) -> tuple[int, ...]:
  """Tokens that leave each spot, of the row that keeps most.

  Args:
    sites: of `layout`.
    slots: tokens of a row, padding counted.
    known: of the batch.
    more: whether tokens stand behind the prompts, which go through a layer by a rule of their own.

  Raises:
    ValueError: a number of tokens that leaves no room for a prompt's text.
  """
  n, free, out = slots, known.free, []
  for spot in sites.spots:
    share, reducer = isinstance(spot.budget, float) and spot.budget <= 1.0, spot.module(parent=None)
    if spot.place == "ahead" or spot.rate == "learned" or (more and spot.place == "around"):
      out.append(n)
      continue
    if spot.place == "around" and reducer.text:
      out.append(min(n, _share(spot, n) if share else int(spot.budget)))
      continue
    if share:
      left = min(free, _share(spot, known.free if spot.of == "input" else free))
      through, kept = n - free + left, left
    else:
      keep, fewest = int(spot.budget), reducer.fewest(n, known.text)
      if keep < (fewest if known.free else known.text):
        raise ValueError(
          f"sites.{spot.site}.keep={keep} at layer {spot.layer}, but a prompt has {known.text} tokens of text; "
          f"valid: {fewest} or more, or a share of the visual tokens"
        )
      through, kept = min(n, keep), max(min(free, keep - known.text), 0)
    out.append(through)
    if spot.place != "around":  # who goes round is back
      n, free = through, 0 if spot.ragged else kept
  return tuple(out)


def rows(
  sites: Sites, caps: tuple[int, ...], slots: int, text: Array, free: Array, asked: Array | None = None,
  train: bool = False,
) -> dict[str, tuple[Any, ...]]:  # fmt: skip
  """Counts of every row and spot, by site: what `Reduce` takes as `keeps`.

  Args:
    sites: of `layout`.
    caps: of `capacities`.
    slots: tokens of a row, padding counted.
    text: (B,) int32 protected tokens.
    free: (B,) int32 the others.
    asked: (B,) int32 protected tokens of the prompts alone, which are ranked where the rest decides for itself; None:
      all are.
    train: whether routers see what follows, as experts choose.
  """
  out: dict[str, tuple[Any, ...]] = {}
  source, asked = free, text if asked is None else asked
  for spot, capacity in zip(sites.spots, caps, strict=True):
    prompt = asked if spot.place == "around" and (spot.type.answers or not train) else text
    anyone = spot.place == "around" and spot.module(parent=None).text
    choice = prompt + free if anyone else free
    if spot.rate == "learned":
      keep: Any = Shares(text, source)
    elif spot.place == "ahead":
      keep = Rows(text + free, capacity)
    else:
      if isinstance(spot.budget, float) and spot.budget <= 1.0:
        # A table: float32 would round another way than the host.
        of = source if spot.of == "input" else choice
        left = jnp.minimum(jnp.asarray([_share(spot, f) for f in range(slots + 1)], jnp.int32)[of], choice)
      else:
        left = jnp.clip(int(spot.budget) - (0 if anyone else prompt), 0, choice)
      count = left if anyone else prompt + left
      # What is appended goes round by a rule of its own; elsewhere it is text like any other, and stays.
      asks = Threshold(spot.threshold, capacity, count, whole=spot.place != "around")
      keep = asks if spot.rate == "threshold" else Rows(count, capacity)
      free = free if spot.place == "around" else left
    out[spot.site] = (*out.get(spot.site, ()), keep)
  return out


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Tokens of a prompt in each layer, numbers or traced scalars; what `cost` reads."""

  attention: tuple[Any, ...]
  mlp: tuple[Any, ...]
  cache: tuple[Any, ...]  # keys and values that each layer holds, of a mean head
  extra: Any  # multiply-adds of the reducers themselves


def lengths(
  sites: Sites, shape: Any, text: Any, visual: Any, shares: Mapping[str, Mapping[int, Any]] | None = None
) -> Lengths:
  """Follows a prompt through the layers, in expectation: shares are not rounded, so that they can be learned.

  Args:
    sites: of `layout`.
    shape: `tokred.nn.decoder_layer.Shape`; it prices the reducers' own work.
    text: protected tokens.
    visual: the others at the input; a number or a traced scalar, so that tower and language model learn together.
    shares: by site and spot, what was reported as "share", of the visual tokens that arrive, or of those at the input
      where the rate is learned; None: rates that are learned keep all, and a threshold what its capacity holds.
  """
  n, attention, mlp, cache, extra = visual, [], [], [], 0.0

  def through(spot: Spot, n: Any) -> Any:
    known = (shares or {}).get(spot.site, {}).get(spot.index)
    if known is not None:
      known = jnp.mean(known)
      return cost.min_st(n, [known * visual]) if spot.rate == "learned" or spot.of == "input" else n * known
    if spot.rate == "learned" or spot.budget is None:
      return n
    if isinstance(spot.budget, float) and spot.budget <= 1.0:
      return cost.min_st(n, [spot.budget * visual]) if spot.of == "input" else n * spot.budget
    return cost.min_st(n, [jnp.maximum(spot.budget - text, 0)])

  def act(layer: int, place: str, n: Any) -> Any:
    """Visual tokens behind a place where n arrive, or all tokens behind one that text goes round, too."""
    nonlocal extra
    for spot in sites.at(layer, place):
      reducer, arriving = spot.module(parent=None), n
      if place == "around":
        whole = reducer.text and isinstance(spot.budget, float)
        n = (text + n) * spot.budget if whole else text + through(spot, n)
      elif place != "ahead":  # which hides keys and values, and takes nobody away
        n = through(spot, n)
      left = n if place == "around" else text + n
      extra = extra + reducer.macs(text + arriving, left, shape.width, shape.num_heads)
    return n

  for layer in range(sites.stack.depth):
    n = act(layer, "before", n)
    around = bool(sites.at(layer, "around"))
    total = act(layer, "around", n) if around else text + n
    attention.append(total)
    maps = sum(need in RECEIVED for need in needs(sites, layer))  # of which no attention makes use
    extra = extra + maps * total * total * shape.num_heads * shape.head_dim
    act(layer, "ahead", n)
    held = [(shares or {}).get(spot.site, {}).get(spot.index, 1.0) for spot in sites.at(layer, "ahead")]
    cache.append(total * jnp.mean(held[0]) if held else total)
    n = act(layer, "attn", n)
    mlp.append(total if around else text + n)
    n = act(layer, "after", n)
  return Lengths(tuple(attention), tuple(mlp), tuple(cache), extra)


def _share(spot: Spot, free: int) -> int:
  """Of so many visual tokens, those that a share leaves, or as few as the method can reach."""
  reducer, keep = spot.module(parent=None), float(spot.budget)
  count = math.ceil(keep * free) if spot.of == "input" else reducer.count(keep, free, 0, free)
  return max(count, reducer.fewest(free, 0)) if free else 0
