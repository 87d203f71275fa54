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
  softness     learned_threshold: temperature of the sigmoid that lets it learn
  anneal       ((option, from, to, first step, last step), ...): an option of the reducer, such as a temperature, that
               goes geometrically from one value to the other while training; the last one is its value ever after
  position     llm: original (those that stay keep their positions) or reindex (they are counted anew from 0)
  of           llm: what a share is one of: arriving (visual tokens), or input (those that the language model got); a
               reducer whose shares are of the input elsewhere (gumbel) has them of the input here
  proportional log(size) biases attention from here on; the reducer's own rule where it is not given

Every other field is an option of the reducer, that is a field of its class.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokred import rates
from tokred.config import nearest
from tokred.layout import PLACES, Sites, Spot, Stack, walk
from tokred.reducers import base

FIELDS = ("reducer", "layers", "stack", "place", "keep", "r", "rate", "granularity", "schedule", "threshold", "initial")
FIELDS += ("proportional", "until", "softness", "anneal", "position", "of")
USED = {  # fields that only some rates read; a softness of learned thresholds stays with those that were frozen
  "granularity": ("learned",),
  "schedule": ("scheduled",),
  "softness": ("learned_threshold", "threshold"),
  "threshold": ("threshold", "learned_threshold"),
}
POSITIONS = ("original", "reindex")
WHOLES = ("arriving", "input")
PLACED = frozenset({"layer", "depth", "place", "prefix", "source"})  # fields of a reducer that its site fills in


def parse(sites: Mapping[str, Mapping[str, Any]], stack: Stack) -> Sites:
  """Validates `config.sites` and lays it out by layer.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  drafts = [draft for name in sorted(sites) for draft in _site(name, dict(sites[name]), stack)]
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
  gap = lambda s: {"before": s.layer, "around": s.layer, "after": s.layer + 1, "output": sites.stack.depth}.get(s.place)  # noqa: E731
  for index, made in enumerate(sites.spots):
    for spot in sites.spots[index + 1 :] if made.reducer == "recover" else ():
      if gap(spot) == gap(made) and (needs := spot.module(parent=None).needed()):
        raise ValueError(
          f"sites.{spot.site}.reducer={spot.reducer!r} reads {', '.join(needs)}, which tokens that sites.{made.site} "
          "has just brought back do not have; let it act behind the next attention, or by a score without features"
        )


def _site(name: str, site: dict[str, Any], stack: Stack) -> list[dict[str, Any]]:
  """Drafts of the spots of one site: everything but the counts."""
  field = f"sites.{name}"
  if "reducer" not in site:
    raise ValueError(f"{field}.reducer is missing; valid: {', '.join(sorted(base.REGISTRY))}")
  names = tuple(site["reducer"]) if isinstance(site["reducer"], (tuple, list)) else (site["reducer"],)
  if not names or not all(isinstance(reducer, str) for reducer in names):
    raise ValueError(
      f"{field}.reducer={site['reducer']!r} must be a name or a tuple of names; {nearest('', base.REGISTRY)}"
    )
  classes = [base.get(reducer, f"{field}.reducer") for reducer in names]
  place = site.get("place") or classes[0].places[0]
  for cls, reducer in zip(classes, names, strict=True):
    if place not in cls.places:
      raise ValueError(f"{field}.place={place!r} does not suit reducer {reducer!r}; valid: {', '.join(cls.places)}")
  if len(names) > 1 and (heads := [name for name, cls in zip(names, classes, strict=True) if cls.training_only]):
    raise ValueError(f"{field}.reducer={names}: {heads[0]!r} serves training alone, and needs a site of its own")
  for cls, reducer in zip(classes, names, strict=True):
    if stack.name not in cls.stacks:
      raise ValueError(
        f"{field}.stack={stack.name!r} does not suit reducer {reducer!r}; valid: {', '.join(cls.stacks)}"
      )
  if site.get("stack", stack.name) != stack.name:
    raise ValueError(f"{field}.stack={site['stack']!r} does not exist in this model; valid: {stack.name}")
  layers = site.get("layers", () if place == "output" else None)
  if layers is None:
    raise ValueError(f"{field}.layers is missing; valid: a tuple of block numbers from 0 to {stack.depth - 1}")
  layers = tuple(layers) if isinstance(layers, (tuple, list, range)) else (layers,)
  if place == "output":
    if layers not in ((), (-1,)) and stack.name != "llm":  # which has no such place
      raise ValueError(f"{field}.layers={layers}, but place='output' is behind all blocks; drop the field")
    layers = (-1,)
  if list(layers) != sorted(layers) or not layers:
    raise ValueError(f"{field}.layers={layers} must name at least one layer, in ascending order")
  for layer in layers:
    if place != "output" and not (type(layer) is int and 0 <= layer < stack.depth):
      raise ValueError(f"{field}.layers has {layer!r}, but the {stack.name} has layers 0 to {stack.depth - 1}")
  if len(set(layers)) != len(layers):
    raise ValueError(f"{field}.layers={layers} names a layer twice")
  if len(layers) < stack.depth and any(cls.everywhere for cls in classes):
    raise ValueError(f"{field}.layers={layers}, but {names} acts in every block; valid: range({stack.depth})")
  rate = site.get("rate", "fixed")
  if rate not in rates.RATES:
    raise ValueError(f"{field}.rate={rate!r} is not a rate; {nearest(rate, rates.RATES)}")
  if rate == "learned" and (("keep" in site) or ("r" in site)):
    raise ValueError(f"{field}.keep is learned: drop the field, or set {field}.rate='fixed'")
  if rate == "learned_threshold" or not any(cls.idles for cls in classes):  # these need not be told how many
    site.setdefault("keep", 1.0 if len(names) == 1 else (1.0,) * len(names))
  if rate != "learned" and ("keep" in site) == ("r" in site):
    raise ValueError(f"{field} needs exactly one of keep (share or number of tokens) and r (tokens removed)")
  if rate == "threshold" and "threshold" not in site:
    raise ValueError(f"{field}.threshold is missing: the smallest score that stays")
  if rate == "scheduled" and not ("schedule" in site and len(names) == 1 and "keep" in site):
    raise ValueError(f"{field}.rate='scheduled' needs one reducer, keep, and schedule=(first step, last step)")
  if rate == "scheduled" and any(cls.still for cls in classes):
    raise ValueError(f"{field}.rate='scheduled' moves counts, which those of {names} cannot; valid: fixed")
  if rate == "scheduled" and not _span(site["schedule"]):
    raise ValueError(f"{field}.schedule={site['schedule']!r} must be two numbers, (first step, last step), ascending")
  plans = all(issubclass(cls, base.Planner) for cls in classes)
  if not plans and (rate in rates.LEARNED or rate == "threshold"):
    raise ValueError(f"{field}.rate={rate!r} needs reducers that write plans; {names} do not")
  if rate.endswith("threshold") and not all(cls.scored for cls in classes):
    raise ValueError(f"{field}.rate={rate!r} needs reducers that score each token; {names} do not")
  if rate == "learned" and place not in ("before", "ahead", "attn", "after"):
    raise ValueError(f"{field}.rate='learned' is not available at place={place!r}; valid: before, ahead, attn, after")
  if place == "ahead" and len(names) > 1:
    raise ValueError(f"{field}.reducer={names}: one reducer can act ahead of attention; name one, or set place='attn'")
  until = site.get("until")
  if until is not None and not (
    place == "around"
    and len(layers) == 1
    and type(until) is int
    and layers[0] <= until % stack.depth
    and -stack.depth <= until < stack.depth
  ):
    raise ValueError(
      f"{field}.until={until!r} is the last block of a scope: it needs place='around', one layer, and a block from "
      f"that layer to {stack.depth - 1}, or counted from the end"
    )
  position = site.get("position", "original")
  if position not in POSITIONS or ("position" in site and stack.name != "llm"):
    valid = nearest(str(position), POSITIONS) if stack.name == "llm" else "only sites with stack='llm' have a policy"
    raise ValueError(f"{field}.position={position!r} is not a policy; {valid}")
  from_input = stack.name == "llm" and any(cls.from_input for cls in classes)
  whole = site.get("of", "input" if from_input else "arriving")
  if whole not in WHOLES or ("of" in site and stack.name != "llm"):
    valid = nearest(str(whole), WHOLES) if stack.name == "llm" else "only sites with stack='llm' have it"
    raise ValueError(f"{field}.of={whole!r} is not what a share is of; {valid}")
  if from_input and whole != "input":
    raise ValueError(f"{field}.of={whole!r}: keep rates of {names} are shares of the input; leave it out, or 'input'")
  anneal = _anneal(field, site, names, classes)
  ends = {option: float(end) for option, _, end, *_ in anneal}  # what training ends with is what ships
  options = _options(field, site | ends, names, classes)
  common = dict(position=position, of=whole, site=name, place=place, rate=rate, granularity=site.get("granularity", 1))
  common["anneal"] = anneal
  thresholds = site.get("threshold", 0.0)
  thresholds = tuple(thresholds) if isinstance(thresholds, (tuple, list)) else (thresholds,) * len(names)
  thresholds = thresholds * len(layers) if len(thresholds) == len(names) else thresholds
  numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in thresholds)
  if not numbers or len(thresholds) != len(layers) * len(names):
    raise ValueError(f"{field}.threshold={site['threshold']!r} must be a number: the smallest score that stays")
  common["softness"] = site.get("softness", 0.1)
  if not (isinstance(common["softness"], float) and common["softness"] > 0):
    raise ValueError(f"{field}.softness={common['softness']!r} must be a float above 0")
  if not (isinstance(common["granularity"], int) and common["granularity"] >= 1):
    raise ValueError(f"{field}.granularity={common['granularity']!r} must be an int of at least 1")
  for setting, valid in USED.items():
    if setting in site and rate not in valid:
      words = f"is for rate={' or '.join(map(repr, valid))}, but rate={rate!r}; drop the field"
      raise ValueError(f"{field}.{setting}={site[setting]!r} {words}")
  drafts = []
  for where, layer in enumerate(layers):
    for slot, (reducer, cls) in enumerate(zip(names, classes, strict=True)):
      child = name if len(names) == 1 else f"{name}_{slot}_{reducer}"
      keep, removed = _values(field, site, slot, len(names), where, len(layers))
      proportional = site.get("proportional", any(cls.proportional for cls in classes))
      behind = stack.depth if layer < 0 else layer
      placed = dict(layer=behind, depth=stack.depth, place=place)
      placed |= dict(prefix=stack.num_protected, source=stack.num_tokens)
      given = tuple((k, v) for k, v in placed.items() if k in PLACED & _fields(cls))
      draft = dict(common, slot=slot, layer=layer, reducer=reducer, child=child, options=options[slot] + given)
      draft["threshold"] = float(thresholds[where * len(names) + slot])
      draft["until"] = layer if until is None else until % stack.depth
      draft["initial"] = _initial(
        field, site, rate, stack, _values(field, site, slot, len(names), where, len(layers), "initial")[0]
      )
      drafts.append(dict(draft, keep=keep, r=removed, proportional=proportional))
      for need in _needed(field, cls, draft["options"]):
        if need == "cls_attention" and not stack.has_cls:
          raise ValueError(
            f"{field}.reducer={reducer!r} scores by cls_attention, but config.model.pool leaves this model without a "
            f"CLS token; set {field}.score to another score"
          )
        if need.endswith("_ahead") and stack.name != "llm":
          raise ValueError(f"{field}.reducer={reducer!r} reads {need}, which only blocks of stack='llm' have ahead")
        if place in ("before", "around") and layer == 0 and not need.endswith("_ahead"):
          raise ValueError(f"{field}.layers has 0, but {reducer!r} reads {need} of the block before; valid: from 1")
  return drafts


def _fields(cls: type[base.Reducer]) -> set[str]:
  return {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}


def _options(field: str, site: dict, names: tuple[str, ...], classes: list[type]) -> list[tuple[tuple[str, Any], ...]]:
  """Options of each reducer of a site, checked against the fields of their classes."""
  own = [_fields(cls) - PLACED for cls in classes]
  given = {key: value for key, value in site.items() if key not in FIELDS}
  for key in given:
    if not any(key in fields for fields in own):
      raise ValueError(f"{field}.{key} is not a field of a site or of {names}; {nearest(key, set(FIELDS).union(*own))}")
  for cls in classes:
    for option in dataclasses.fields(cls):
      value, kind = given.get(option.name), type(option.default)
      number = kind is float and type(value) is int
      if option.name in given and kind in (bool, int, float, str) and type(value) is not kind and not number:
        raise ValueError(f"{field}.{option.name}={value!r} must be of type {kind.__name__}")
  options = [tuple(sorted((k, v) for k, v in given.items() if k in fields)) for fields in own]
  for cls, chosen in zip(classes, options, strict=True):
    _needed(field, cls, chosen)
  return options


def _needed(field: str, cls: type[base.Reducer], options: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
  """Features that a reducer asks for; its errors name the site."""
  try:
    return cls(**dict(options)).needed()
  except ValueError as error:
    raise ValueError(f"{field}.{error}") from None


def _span(steps: Any) -> bool:
  """Whether these are a first and a last step."""
  return isinstance(steps, (tuple, list)) and len(steps) == 2 and all(map(_number, steps)) and steps[0] <= steps[1]


def _number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _anneal(field: str, site: dict, names: tuple[str, ...], classes: list[type]) -> tuple[tuple[Any, ...], ...]:
  """Options that move while training, validated."""
  given, options = site.get("anneal", ()), {option for cls in classes for option in _fields(cls) & {*cls.annealable}}
  for entry in given if isinstance(given, (tuple, list)) else (given,):
    numbers = isinstance(entry, (tuple, list)) and len(entry) == 5 and all(map(_number, entry[1:]))
    if not (numbers and min(entry[1:3]) > 0 and _span(entry[3:])):
      raise ValueError(
        f"{field}.anneal={given!r} must hold (option, from, to, first step, last step), values above 0 and steps "
        "ascending"
      )
    if len(names) > 1 or entry[0] not in options:
      raise ValueError(
        f"{field}.anneal: {entry[0]!r} is no option of {names} that can move while training; "
        f"valid: {', '.join(sorted(options)) if options and len(names) == 1 else 'none'}"
      )
    if site.get(entry[0], entry[2]) != entry[2]:
      raise ValueError(
        f"{field}.{entry[0]}={site[entry[0]]!r}, but {field}.anneal ends at {entry[2]}, which is what ships; valid: "
        f"{entry[2]}, or without the field"
      )
  return tuple(map(tuple, given))


def _initial(field: str, site: dict, rate: str, stack: Stack, initial: Any) -> int:
  """Tokens that a learned rate keeps at the beginning, validated; 0 where nobody says."""
  if "initial" not in site:
    return 0
  if rate != "learned" or stack.name == "llm":
    raise ValueError(f"{field}.initial is where an encoder's learned rate begins, but rate={rate!r}; drop the field")
  if not (type(initial) is int and stack.num_protected < initial <= stack.num_tokens):
    raise ValueError(
      f"{field}.initial={initial!r} must be a number of tokens from {stack.num_protected + 1} to {stack.num_tokens}"
    )
  return initial


def _values(
  field: str, site: dict, slot: int, slots: int, where: int, layers: int, name: str = "keep"
) -> tuple[Any, Any]:
  """keep (or `name`) and r of one spot, out of a number or of nested tuples."""
  if "r" in site:
    r = site["r"]
    if isinstance(r, (tuple, list)) and not (len(r) == 2 and isinstance(r[1], float)):
      if len(r) > layers:
        raise ValueError(f"{field}.r={r} has {len(r)} entries for {layers} layers")
      if len(r) == 2 < layers and r[1] in (-1, 0, 1):
        raise ValueError(
          f"{field}.r={r} could be counts of the first two of {layers} layers, or a mean and a slope; valid: "
          f"({r[0]}, {r[1]}, 0) for the former, ({r[0]}, {r[1]}.0) for the latter"
        )
      return None, (tuple(r) + (0,) * layers)[where]  # a short list goes on with 0, as in ToMe
    return None, rates.tome_schedule(r, layers)[where]
  keep = site.get(name)
  if slots > 1 and keep is not None:
    if not (isinstance(keep, (tuple, list)) and len(keep) == slots):
      raise ValueError(f"{field}.{name}={keep!r} must be a tuple with one entry for each of the {slots} reducers")
    keep = keep[slot]
  if isinstance(keep, (tuple, list)):
    if len(keep) != layers:
      raise ValueError(f"{field}.{name}={tuple(keep)} has {len(keep)} entries for {layers} layers")
    keep = keep[where]
  return keep, None


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
  elif isinstance(keep, bool) or not isinstance(keep, (int, float)):
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
    raise ValueError(
      f"{field}: keep={keep} leaves {count} of {arriving} tokens at layer {draft['layer']}, but {draft['reducer']!r} "
      f"can go down to {fewest}; raise config.{field}.keep"
    )
  if removed is not None:
    left = (count - protected) / source
  return Spot(**draft, budget=keep, index=index, arriving=arriving, keep=count, share=left, protected=protected), left
