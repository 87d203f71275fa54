"""Where tokens are reduced: `config.sites`, validated and laid out by layer; `nn.reduce` carries it out.

A site is a dict with these fields; all but `reducer` and `layers` may be left out:

  reducer      a registered name, or a tuple of names that act in this order (DiffRate: ("topk", "diffrate_merge"))
  layers       the blocks it acts in, from 0, ascending; place="output" has none
  stack        "encoder", or "llm" in a language model
  place        before (a block), around (a block), ahead (of attention, whose map serves the reduced tokens), attn
               (between attention and MLP), mlp (around the MLP), after (a block), output (after the last block)
  until        around: the block behind which those that went round are back; the same block where it is not given
  keep         share (float, of the unprotected tokens that arrive) or number (int, protected ones counted) of tokens
               that come out; one for all layers, or a tuple with one a layer; for a tuple of reducers a tuple of these
  r            instead of keep: tokens removed in each layer, or (r, inflection), or a tuple with one a layer
  rate         fixed, scheduled (keep falls from 1), learned (distribution over counts), threshold (by score) or
               learned_threshold
  granularity  learned: step between candidate counts
  initial      learned: numbers of tokens, as of `keep`, that learning begins with; half of them where it is not given
  schedule     scheduled: (first step, last step) of the fall
  threshold    threshold: the smallest score that stays (a tuple: one a reducer, or one a layer and reducer); keep is
               then the capacity; of a learned_threshold where it starts
  mean         where images keep different numbers of tokens (by a threshold, or as the reducer does it): how many one
               keeps in the mean of a batch; one for all layers, or a tuple with one a layer.  In gather mode all but
               attention itself then works on so many rows a batch, and not on `keep` an image; of a batch that has
               more, the last tokens of its fullest images go round; an image alone always has room
  softness     learned_threshold: temperature of the sigmoid that lets it learn
  anneal       ((option, from, to, first step, last step), ...): an option of the reducer, such as a temperature, that
               goes geometrically from one value to the other while training; the last one is its value ever after
  position     llm: original (those that stay keep their positions) or reindex (they are counted anew from 0)
  of           llm: what a share is one of: arriving (visual tokens), or input (those that the language model got); a
               reducer whose shares are of the input elsewhere (gumbel) has them of the input here
  proportional log(size) biases attention from here on; the reducer's own rule where it is not given

Every other field is an option of the reducer, that is a field of its class.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokred.drafts import of_site
from tokred.layout import PLACES, Sites, Spot, Stack, walk
from tokred.reducers import base


def parse(sites: Mapping[str, Mapping[str, Any]], stack: Stack) -> Sites:
  """Validates `config.sites` and lays it out by layer.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  drafts = [draft for name in sorted(sites) for draft in of_site(name, dict(sites[name]), stack)]
  taken: dict[tuple[int, str], str] = {}
  for draft in drafts:
    where = (draft["layer"], draft["place"])
    if taken.setdefault(where, draft["site"]) != draft["site"]:
      raise ValueError(
        f"sites.{draft['site']} and sites.{taken[where]} both act in layer {where[0]} at place={where[1]!r}, and names "
        "give no order; make them one site whose reducer is a tuple"
      )
  last, order = stack.depth, PLACES.index
  drafts.sort(key=lambda d: (last if d["place"] == "output" else d["layer"], order(d["place"]), d["slot"]))
  left, protected, spots, index = 1.0, stack.num_protected, [], {}

  def at(layer: int, *places: str) -> list[dict[str, Any]]:
    return [draft for draft in drafts if draft["layer"] == layer and draft["place"] in places]

  def leave(here: Sequence[dict[str, Any]], n: int) -> int:
    nonlocal left, protected
    before = left
    for draft in here:
      spot, left = _count(draft, n, protected, left, stack, index.setdefault(draft["site"], 0))
      index[draft["site"]] += 1
      spots.append(spot)
      n, protected = spot.keep, _protected_behind(spot.module(), protected, stack)
    if here[0]["place"] in ("around", "mlp"):  # who goes round is back
      left = before
    return n

  walk(stack.depth, at, stack.num_tokens, leave)
  sites = Sites(stack, tuple(spots))
  _check_scopes(sites)
  _check_made_anew(sites)
  return sites


def _protected_behind(reducer: base.Reducer, protected: int, stack: Stack) -> int:
  """Protected tokens that leave, of so many that arrive: what recovers brings back the input's, or adds some."""
  return reducer.recovered(protected, stack.num_protected) if reducer.recovers else protected


def _check_scopes(sites: Sites) -> None:
  """Scopes do not nest, their features end with them, as do new tokens, and nothing acts on images that share a row."""
  for spot in sites.spots:
    scope = sites.opening(spot)
    if "outer" in spot.module(parent=None).needed() and (
      scope is None or spot.layer != scope.until or scope.type.packs or len(sites.at(spot.layer, "after")) > 1
    ):
      raise ValueError(
        f"sites.{spot.site}.layers has {spot.layer}, but {spot.reducer!r} brings back what went round: it acts alone, "
        "behind the last block of a scope; valid: the layer that is `until` of a site with place='around'"
      )
  for scope in sites.spots:
    if scope.place != "around":
      continue
    where = f"the scope of sites.{scope.site} (layers {scope.layer} to {scope.until})"
    for spot in sites.spots:
      inside = spot is not scope and sites.opening(spot) is scope
      if inside and spot.place == "around" and spot.layer > scope.layer:
        raise ValueError(f"sites.{spot.site}.layers has {spot.layer}, which lies in {where}; scopes do not nest")
      if inside and scope.type.packs:
        raise ValueError(
          f"sites.{spot.site} acts in layer {spot.layer} at place={spot.place!r}, inside {where}, in which images "
          f"share rows; valid: other layers, or place='before' in layer {scope.layer}"
        )
      if inside and _protected_behind(spot.module(), spot.protected, sites.stack) > spot.protected:
        raise ValueError(
          f"sites.{spot.site} adds tokens in layer {spot.layer} at place={spot.place!r}, inside {where}, behind which "
          f"they would be gone; valid: other layers, or place='before' in layer {scope.until + 1}"
        )
    last = sites.at(-1, "output") if scope.until == sites.stack.depth - 1 else ()
    for spot in (*sites.at(scope.until + 1, "before", "around"), *last):
      if needs := [need for need in spot.module().needed() if not need.endswith("_ahead")]:
        raise ValueError(
          f"sites.{spot.site}.reducer={spot.reducer!r} reads {', '.join(needs)} of block {scope.until}, of which only "
          f"tokens in {where} have it; let it act behind another block, or by a score that needs no features"
        )


def _check_made_anew(sites: Sites) -> None:
  """Tokens that `recover` has made have no features before attention has seen them."""
  gap = lambda s: {"before": s.layer, "around": s.layer, "after": s.layer + 1, "output": sites.stack.depth}.get(s.place)
  for index, made in enumerate(sites.spots):
    for spot in sites.spots[index + 1 :] if made.reducer == "recover" else ():
      if gap(spot) == gap(made) and (needs := spot.module(parent=None).needed()):
        raise ValueError(
          f"sites.{spot.site}.reducer={spot.reducer!r} reads {', '.join(needs)}, which tokens that sites.{made.site} "
          "has just brought back do not have; let it act behind the next attention, or by a score without features"
        )


def _count(
  draft: dict[str, Any], arriving: int, protected: int, left: float, stack: Stack, index: int
) -> tuple[Spot, float]:
  """Fixes the static count of one spot; `left` is the share of patches that should be left before it."""
  draft = dict(draft)
  keep, removed, field = draft.pop("keep"), draft.pop("r"), f"sites.{draft['site']}"
  draft.pop("slot")
  reducer = base.REGISTRY[draft["reducer"]](**dict(draft["options"]))
  source = stack.num_tokens - stack.num_protected
  fewest = reducer.fewest(arriving, protected)
  if reducer.recovers:
    count = reducer.recovered(arriving, stack.num_tokens)
    left = 1.0 if count - _protected_behind(reducer, protected, stack) == source else left
  elif draft["rate"] == "learned":
    count = arriving
  elif removed is not None:
    if not (isinstance(removed, int) and removed >= 0):
      raise ValueError(f"{field}.r={removed!r} must be a number of tokens, 0 or more")
    count = reducer.left(removed, arriving, protected)  # r is clipped to what the method can take
  elif isinstance(keep, bool) or not isinstance(keep, (int, float)) or not math.isfinite(keep):
    raise ValueError(f"{field}.keep={keep!r} must be a share (float up to 1.0) or a number of tokens (int)")
  elif isinstance(keep, float) and keep <= 1.0:
    if keep <= 0.0:
      raise ValueError(f"{field}.keep={keep} must be above 0.0 and at most 1.0")
    count = reducer.count(keep, arriving, protected, source)
    left = keep if reducer.from_input else left * keep
  else:
    if keep != int(keep):
      raise ValueError(f"{field}.keep={keep} must be a share up to 1.0 or a whole number of tokens")
    count = int(keep)
    if count > arriving:
      raise ValueError(
        f"{field}: keep={count} but only {arriving} tokens arrive at layer {draft['layer']}; "
        f"lower config.{field}.keep or move the site earlier"
      )
    left = (count - protected) / source
  if count < fewest:
    more = " (1 is a number of tokens; all of them are 1.0)" if keep == 1 and isinstance(keep, int) else ""
    raise ValueError(
      f"{field}: keep={keep} leaves {count} of {arriving} tokens at layer {draft['layer']}, but {draft['reducer']!r} "
      f"can go down to {fewest}; raise config.{field}.keep{more}"
    )
  count = reducer.leaving(count, arriving)
  if removed is not None:
    left = (count - protected) / source
  return Spot(**draft, budget=keep, index=index, arriving=arriving, keep=count, share=left, protected=protected), left
