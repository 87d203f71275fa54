"""One site of `config.sites`, field by field: checked, and drawn up as its spots, which lack only their counts."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokred import rates
from tokred.config import nearest
from tokred.layout import Stack
from tokred.reducers import base

FIELDS = ("reducer", "layers", "stack", "place", "keep", "r", "rate", "granularity", "schedule", "threshold", "initial")
FIELDS += ("proportional", "until", "softness", "anneal", "position", "of", "mean")
USED = {  # fields that only some rates read; a softness of learned thresholds stays with those that were frozen
  "granularity": ("learned",),
  "schedule": ("scheduled",),
  "softness": ("learned_threshold", "threshold"),
  "threshold": ("threshold", "learned_threshold"),
}
POSITIONS = ("original", "reindex")
WHOLES = ("arriving", "input")
# Of a reducer; its site fills them in.
PLACED = frozenset({"layer", "depth", "place", "prefix", "source", "heads", "patch_grid"})

Classes = Sequence[type[base.Reducer]]


def of_site(name: str, site: Mapping[str, Any], stack: Stack) -> list[dict[str, Any]]:
  """The spots of one site, of each layer and reducer: what `layout.Spot` holds, with keep and r as the site says them.

  Args:
    name: of the site.
    site: its fields; see `tokred.sites`.
    stack: what it sits in.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  if not re.fullmatch(r"\w+", str(name)):
    raise ValueError(f"config.sites has {name!r}; valid: a name of letters, digits and underscores")
  field = f"sites.{name}"
  names, classes = _reducers(field, site, stack)
  place = _place(field, site, names, classes)
  layers = _layers(field, site, place, names, classes, stack)
  rate = _rate(field, site, place, names, classes)
  site = _told(field, site, rate, names, classes)
  _check_counts(field, site, rate, names)
  until = _until(field, site, place, layers, stack)
  position, whole = _llm(field, site, names, classes, stack)
  anneal = _anneal(field, site, names, classes)
  ends = {option: float(end) for option, _, end, *_ in anneal}  # what training ends with is what ships
  options = _options(field, {**site, **ends}, names, classes)
  thresholds = _thresholds(field, site, names, layers)
  means = _means(field, site, rate, names, classes, layers, stack)
  granularity, softness = _rate_fields(field, site, rate, stack)
  common = dict(site=name, place=place, rate=rate, anneal=anneal, position=position, of=whole)
  common |= dict(granularity=granularity, softness=softness)
  common |= dict(proportional=site.get("proportional", any(cls.proportional for cls in classes)))
  out = []
  for where, layer in enumerate(layers):
    for slot, (reducer, cls) in enumerate(zip(names, classes, strict=True)):
      values = lambda key: _values(field, site, slot, len(names), where, len(layers), key)  # noqa: B023
      keep, removed = values("keep")
      draft = dict(common, slot=slot, layer=layer, reducer=reducer, keep=keep, r=removed)
      draft["child"] = name if len(names) == 1 else f"{name}_{slot}_{reducer}"
      draft["options"] = options[slot] + _placed(cls, layer, place, stack)
      draft["threshold"], draft["mean"] = thresholds[where * len(names) + slot], means[where]
      draft["until"] = layer if until is None else until % stack.depth
      draft["initial"] = _initial(field, site, rate, stack, values("initial")[0])
      _check_needs(field, draft, cls, stack)
      out.append(draft)
  return out


def _reducers(field: str, site: Mapping[str, Any], stack: Stack) -> tuple[tuple[str, ...], Classes]:
  """Names and classes of the reducers, which suit the stack."""
  if "reducer" not in site:
    raise ValueError(f"{field}.reducer is missing; valid: {', '.join(sorted(base.REGISTRY))}")
  names = tuple(site["reducer"]) if isinstance(site["reducer"], (tuple, list)) else (site["reducer"],)
  if not names or not all(isinstance(reducer, str) for reducer in names):
    raise ValueError(
      f"{field}.reducer={site['reducer']!r} must be a name or a tuple of names; {nearest('', base.REGISTRY)}"
    )
  classes = [base.get(reducer, f"{field}.reducer") for reducer in names]
  for cls, reducer in zip(classes, names, strict=True):
    if stack.name not in cls.stacks:
      others = sorted(other for other, suits in base.REGISTRY.items() if stack.name in suits.stacks)
      raise ValueError(
        f"{field}.reducer={reducer!r} does not suit stack={stack.name!r}, but {', '.join(cls.stacks)}; valid there: "
        f"{', '.join(others)}"
      )
  if site.get("stack", stack.name) != stack.name:
    raise ValueError(f"{field}.stack={site['stack']!r} does not exist in this model; valid: {stack.name}")
  if len(names) > 1 and (heads := [name for name, cls in zip(names, classes, strict=True) if cls.training_only]):
    raise ValueError(f"{field}.reducer={names}: {heads[0]!r} serves training alone, and needs a site of its own")
  return names, classes


def _place(field: str, site: Mapping[str, Any], names: tuple[str, ...], classes: Classes) -> str:
  """Where in or around a block it acts."""
  place = site.get("place") or classes[0].places[0]
  for cls, reducer in zip(classes, names, strict=True):
    if place not in cls.places:
      raise ValueError(f"{field}.place={place!r} does not suit reducer {reducer!r}; valid: {', '.join(cls.places)}")
  if place == "ahead" and len(names) > 1:
    raise ValueError(f"{field}.reducer={names}: one reducer can act ahead of attention; name one, or set place='attn'")
  return place


def _layers(
  field: str, site: Mapping[str, Any], place: str, names: tuple[str, ...], classes: Classes, stack: Stack
) -> tuple[int, ...]:
  """The blocks it acts in; (-1,) behind all of them."""
  layers = site.get("layers", () if place == "output" else None)
  if layers is None:
    raise ValueError(f"{field}.layers is missing; valid: a tuple of block numbers from 0 to {stack.depth - 1}")
  layers = tuple(layers) if isinstance(layers, (tuple, list, range)) else (layers,)
  if place == "output":
    if layers not in ((), (-1,)) and stack.name != "llm":  # which has no such place
      raise ValueError(f"{field}.layers={layers}, but place='output' is behind all blocks; drop the field")
    layers = (-1,)
  for layer in layers:
    if place != "output" and not (type(layer) is int and 0 <= layer < stack.depth):
      raise ValueError(f"{field}.layers has {layer!r}, but the {stack.name} has layers 0 to {stack.depth - 1}")
  if list(layers) != sorted(layers) or not layers:
    raise ValueError(f"{field}.layers={layers} must name at least one layer, in ascending order")
  if len(set(layers)) != len(layers):
    raise ValueError(f"{field}.layers={layers} names a layer twice")
  if len(layers) < stack.depth and any(cls.everywhere for cls in classes):
    raise ValueError(f"{field}.layers={layers}, but {names} acts in every block; valid: range({stack.depth})")
  return layers


def _rate(field: str, site: Mapping[str, Any], place: str, names: tuple[str, ...], classes: Classes) -> str:
  """Who says how many, which the reducers and the place allow."""
  rate = site.get("rate", "fixed")
  if rate not in rates.RATES:
    raise ValueError(f"{field}.rate={rate!r} is not a rate; {nearest(str(rate), rates.RATES)}")
  if rate == "learned" and (("keep" in site) or ("r" in site)):
    raise ValueError(f"{field}.keep is learned: drop the field, or set {field}.rate='fixed'")
  if rate == "scheduled" and any(cls.still for cls in classes):
    raise ValueError(f"{field}.rate='scheduled' moves counts, which those of {names} cannot; valid: fixed")
  plans = all(issubclass(cls, base.Planner) for cls in classes)
  if not plans and (rate in rates.LEARNED or rate == "threshold"):
    raise ValueError(f"{field}.rate={rate!r} needs reducers that write plans; {names} do not")
  if rate.endswith("threshold") and not all(cls.scored for cls in classes):
    raise ValueError(f"{field}.rate={rate!r} needs reducers that score each token; {names} do not")
  if rate == "learned" and place not in ("before", "ahead", "attn", "after"):
    raise ValueError(f"{field}.rate='learned' is not available at place={place!r}; valid: before, ahead, attn, after")
  if rate == "learned" and (own := [name for name, cls in zip(names, classes, strict=True) if cls.draws_counts()]):
    raise ValueError(
      f"{field}.rate='learned', but {own[0]!r} decides in training how many stay, and its class has no "
      "`counted`, which would keep as many as the rate says; valid: fixed, scheduled"
    )
  return rate


def _told(field: str, site: Mapping[str, Any], rate: str, names: tuple[str, ...], classes: Classes) -> dict[str, Any]:
  """The site with keep=1.0 where nobody says how many, and nobody needs to."""
  if all(cls.recovers or cls.training_only for cls in classes):
    for key in ("keep", "r"):
      if key in site:
        raise ValueError(f"{field}.{key}={site[key]!r}, but {names} takes no token away; drop the field")
  open_ended = rate == "learned_threshold" or not any(cls.idles for cls in classes)
  if not open_ended or "r" in site:
    return dict(site)
  return {"keep": 1.0 if len(classes) == 1 else (1.0,) * len(classes), **site}


def _check_counts(field: str, site: Mapping[str, Any], rate: str, names: tuple[str, ...]) -> None:
  """The fields that a rate cannot do without."""
  if rate != "learned" and ("keep" in site) == ("r" in site):
    raise ValueError(f"{field} needs exactly one of keep (share or number of tokens) and r (tokens removed)")
  if rate == "threshold" and "threshold" not in site:
    raise ValueError(f"{field}.threshold is missing: the smallest score that stays")
  if rate == "scheduled" and not ("schedule" in site and len(names) == 1 and "keep" in site):
    raise ValueError(f"{field}.rate='scheduled' needs one reducer, keep, and schedule=(first step, last step)")
  if rate == "scheduled" and not _span(site["schedule"]):
    raise ValueError(f"{field}.schedule={site['schedule']!r} must be two numbers, (first step, last step), ascending")


def _until(field: str, site: Mapping[str, Any], place: str, layers: tuple[int, ...], stack: Stack) -> int | None:
  """The last block of a scope, as it is given."""
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
  return until


def _llm(
  field: str, site: Mapping[str, Any], names: tuple[str, ...], classes: Classes, stack: Stack
) -> tuple[str, str]:
  """`position` and `of`, which language models alone have."""
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
  return position, whole


def _thresholds(
  field: str, site: Mapping[str, Any], names: tuple[str, ...], layers: tuple[int, ...]
) -> tuple[float, ...]:
  """One for each layer and reducer."""
  given = site.get("threshold", 0.0)
  given = tuple(given) if isinstance(given, (tuple, list)) else (given,) * len(names)
  given = given * len(layers) if len(given) == len(names) else given
  numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in given)
  if not numbers or len(given) != len(layers) * len(names):
    raise ValueError(f"{field}.threshold={site['threshold']!r} must be a number: the smallest score that stays")
  return tuple(map(float, given))


def _means(
  field: str, site: Mapping[str, Any], rate: str, names: tuple[str, ...], classes: Classes, layers: tuple[int, ...],
  stack: Stack,
) -> tuple[float, ...]:  # fmt: skip
  """Tokens of an image in the mean of a batch, for each layer; 0.0 where the site does not say."""
  if "mean" not in site:
    return (0.0,) * len(layers)
  ragged = rate.endswith("threshold") or any(cls.ragged for cls in classes)
  if not ragged or any(cls.packs for cls in classes) or stack.name == "llm":
    raise ValueError(
      f"{field}.mean={site['mean']!r}, but it is for images that keep different numbers of tokens, and {names} with "
      f"rate={rate!r} in the {stack.name} does not use it; drop the field"
    )
  given = site["mean"] if isinstance(site["mean"], (tuple, list)) else (site["mean"],) * len(layers)
  numbers = all(isinstance(mean, (int, float)) and not isinstance(mean, bool) for mean in given)
  if len(given) != len(layers) or not numbers or not all(1 <= mean < math.inf for mean in given):
    raise ValueError(f"{field}.mean={site['mean']!r} must be a number of tokens, 1 or more, or one for each layer")
  return tuple(map(float, given))


def _rate_fields(field: str, site: Mapping[str, Any], rate: str, stack: Stack) -> tuple[int, float]:
  """Step between the counts of a learned rate, and temperature of a learned threshold; no other rate reads them."""
  granularity, softness = site.get("granularity", 1), site.get("softness", 0.1)
  if not (isinstance(softness, float) and softness > 0):
    raise ValueError(f"{field}.softness={softness!r} must be a float above 0")
  if not (isinstance(granularity, int) and granularity >= 1):
    raise ValueError(f"{field}.granularity={granularity!r} must be an int of at least 1")
  if "granularity" in site and stack.name == "llm":
    raise ValueError(f"{field}.granularity={granularity!r} is of counts, but an llm learns shares; drop the field")
  for setting, valid in USED.items():
    if setting in site and rate not in valid:
      words = f"is for rate={' or '.join(map(repr, valid))}, but rate={rate!r}; drop the field"
      raise ValueError(f"{field}.{setting}={site[setting]!r} {words}")
  return granularity, softness


def _placed(cls: type[base.Reducer], layer: int, place: str, stack: Stack) -> tuple[tuple[str, Any], ...]:
  """Fields of a reducer that tell it where it stands."""
  placed = dict(layer=stack.depth if layer < 0 else layer, depth=stack.depth, place=place)
  placed |= dict(prefix=stack.num_protected, source=stack.num_tokens, heads=stack.heads, patch_grid=stack.grid)
  return tuple((key, value) for key, value in placed.items() if key in PLACED & _fields(cls))


def _check_needs(field: str, draft: Mapping[str, Any], cls: type[base.Reducer], stack: Stack) -> None:
  """What it reads is there where it stands."""
  reducer = draft["reducer"]
  for need in _needed(field, cls, draft["options"]):
    if need == "cls_attention" and not stack.has_cls:
      raise ValueError(
        f"{field}.reducer={reducer!r} scores by cls_attention, but config.model.pool leaves this model without a "
        f"CLS token; set {field}.score to another score"
      )
    if need.endswith("_ahead") and stack.name != "llm":
      raise ValueError(f"{field}.reducer={reducer!r} reads {need}, which only blocks of stack='llm' have ahead")
    if draft["place"] in ("before", "around") and draft["layer"] == 0 and not need.endswith("_ahead"):
      raise ValueError(f"{field}.layers has 0, but {reducer!r} reads {need} of the block before; valid: from 1")


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
      if option.name in given and option.type == tuple[int, ...]:
        if not (isinstance(value, (tuple, list)) and all(type(item) is int for item in value)):
          raise ValueError(f"{field}.{option.name}={value!r} must be a tuple of whole numbers")
      if option.name in given and option.name in cls.annealable and not 0 < value < math.inf:
        raise ValueError(f"{field}.{option.name}={value!r} must be above 0, and finite")
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
    if sum(other[0] == entry[0] for other in given) > 1:
      raise ValueError(f"{field}.anneal={given!r} moves {entry[0]!r} twice; valid: one entry an option")
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
    if not all(map(_number, r if isinstance(r, (tuple, list)) else (r,))):
      raise ValueError(f"{field}.r={r!r} must be a number of tokens, (r, inflection), or a tuple with one a layer")
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
