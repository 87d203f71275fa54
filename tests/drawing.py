"""Sites drawn at random, for a tower or a language model, most of which are refused; and parameters."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tokred import drafts, layout, rates
from tokred.nn import budget
from tokred.reducers import REGISTRY
from tokred.reducers.router import GATES
from tokred.scores import SCORES

IN_TOWERS = sorted(name for name, cls in REGISTRY.items() if "encoder" in cls.stacks)
IN_LANGUAGE_MODELS = sorted(name for name, cls in REGISTRY.items() if "llm" in cls.stacks)
OPTIONS = {  # of reducers, by name; those that are not here are drawn if they are bool
  "score": tuple(SCORES),
  "metric": ("key", "token"),
  "gate": tuple(GATES),
  "start": ("central", "key_norm"),
  "scale": ("max", "range"),
  "norm": ("mlerp", "max"),
  "pooling": ("attention", "max"),
  "cache": ("mean", "none"),
  "carriers": (0, 1, 2),
  "relevance": (0.0, 0.7),
  "at_once": (2, 3),
  "iterations": (1, 5),
  "similar": (0.0, 0.5),
  "grid": ((2, 3), (2, 2), (1, 4)),
  "patches": (4, 6),
  "group": (1, 2),
  "early": (0.0, 0.9),
  "margin": (0.2,),
  "contextual": (0.3, 2),
  "chunks": (2, 4),
  "slots": (1, 2),
  "neighbours": (1, 3),
  "predictor": (0.5,),
  "levels": (4,),
  "alpha": (0.3,),
  "frames": (2,),
  "share": (0.5,),
  "temperature": (0.5,),
  "name_of": ("memory",),
  "how": ("mean",),
  "middle": ("key_norm",),
  "deep": ("value_norm",),
}
LANGUAGE_OPTIONS = {  # by name; those that are not here are drawn if they are bool
  "score": tuple(SCORES),
  "metric": ("key", "token"),
  "gate": ("raw", "sigmoid"),
  "start": ("central", "isolated", "key_norm"),
  "relevance": (0.2, 0.7),
  "at_once": (2, 3),
  "grid": ((1, 7), 3),
  "patches": (2, 4),
  "merge": (True,),
  "contextual": (0.3, 2),
  "chunks": (2, 4),
  "slots": (1, 2),
  "recycled": (0.0, 0.7),
  "predictor": (0.5,),
  "temperature": (0.5,),
  "name_of": ("memory", "rater"),
  "how": ("mean", "sum", "running", "last"),
  "decode_threshold": (0.3,),
  "newton": (5,),
}
NEEDED = {  # sizes that suit the tiny model, and scores without which two tokens are tied
  "qtsplus": dict(num_heads=4, num_kv_heads=2, high=0.8),
  "covipal": dict(hidden=16),
  "glimpse": dict(hidden=16, num_heads=2),
  "atp": dict(grid=3),
  "attention_gate": dict(hidden=8),
  "facility": dict(score="key_norm"),
}


def pick(rng, values):
  return values[rng.integers(len(values))]


def tower_site(rng, depth):
  """A site that may be refused."""
  names = tuple(pick(rng, IN_TOWERS) for _ in range(1 if rng.random() < 0.8 else 2))
  classes = [REGISTRY[name] for name in names]
  site = dict(reducer=names if len(names) > 1 else names[0])
  place = (
    pick(rng, classes[0].places) if rng.random() < 0.6 else pick(rng, (classes[0].places[0], pick(rng, layout.PLACES)))
  )
  layers = [layer for layer in range(depth) if rng.random() < 0.5] or [int(rng.integers(depth))]
  layers = range(depth) if any(cls.everywhere for cls in classes) else layers
  layers = layers[:1] if place == "around" and rng.random() < 0.5 else layers
  site |= dict(place=place) | ({} if place == "output" else dict(layers=tuple(layers)))
  if place == "around" and len(layers) == 1 and rng.random() < 0.6:
    site["until"] = int(rng.integers(layers[0], depth))
  rate = pick(rng, rates.RATES) if rng.random() < 0.5 else "fixed"
  site |= dict(rate=rate) if rate != "fixed" or rng.random() < 0.1 else {}
  if rate.endswith("threshold"):
    site["threshold"] = round(float(rng.uniform(-0.1, 0.3)), 2)
  if rate == "scheduled":
    site["schedule"] = (0, 10)
  if (all(cls.idles for cls in classes) and rate != "learned") or rng.random() < 0.5:
    site |= draw_count(rng, len(names), 1 if place == "output" else len(layers))
  if rng.random() < 0.2:
    site["proportional"] = bool(rng.integers(2))
  for cls in classes:
    site |= draw_options(rng, cls, OPTIONS)
  return site


def draw_count(rng, slots, layers):
  """keep or r, each in one of the forms that a site may say it in."""
  if rng.random() < 0.25:
    return dict(r=pick(rng, (1, 2, 3, (2, -1.0), tuple(int(r) for r in rng.integers(0, 4, layers)))))
  one = lambda: int(rng.integers(3, 14)) if rng.random() < 0.3 else round(float(rng.uniform(0.2, 1.0)), 2)
  some = lambda: tuple(one() for _ in range(layers)) if rng.random() < 0.3 else one()
  return dict(keep=some() if slots == 1 else tuple(some() for _ in range(slots)))


def language_site(rng, depth):
  """A site that may be refused."""
  name = pick(rng, IN_LANGUAGE_MODELS)
  cls = REGISTRY[name]
  layers = tuple(layer for layer in range(depth) if rng.random() < 0.5) or (int(rng.integers(depth)),)
  share = lambda: round(float(rng.uniform(0.3, 1.0)), 2)
  keep = tuple(share() for _ in layers) if rng.random() < 0.3 else share()
  place = pick(rng, [place for place in budget.PLACES if place in cls.places])
  site = dict(stack="llm", reducer=name, place=place, layers=layers)
  site |= dict(keep=keep) if cls.idles or rng.random() < 0.3 else {}
  site |= dict(rate="threshold", threshold=round(float(rng.uniform(-0.1, 0.6)), 2)) if rng.random() < 0.15 else {}
  site |= dict(position=pick(rng, drafts.POSITIONS)) if rng.random() < 0.4 else {}
  site |= dict(of=pick(rng, drafts.WHOLES)) if rng.random() < 0.3 else {}
  return site | draw_options(rng, cls, LANGUAGE_OPTIONS, score=0.8) | NEEDED.get(name, {})


def draw_options(rng, cls, options, **chances):
  """Some options of a reducer, by name; those that `options` does not have are drawn if they are bool."""
  drawn = {}
  for option in dataclasses.fields(cls):
    values = options.get(option.name, (True, False) if isinstance(option.default, bool) else ())
    if values and option.name not in drafts.PLACED and rng.random() < chances.get(option.name, 0.4):
      drawn[option.name] = pick(rng, values)
  return drawn


def parameters(shapes, seed=5):
  """Drawn without a compilation: no two scores are tied, and attention prefers some tokens to others."""
  rng = np.random.default_rng(seed)

  def value(path, leaf):
    values = rng.normal(size=leaf.shape) / np.sqrt(max(leaf.shape[0], 4) if leaf.shape else 4)
    return jnp.asarray(values + ("scale" in jax.tree_util.keystr(path)), leaf.dtype)

  return jax.tree_util.tree_map_with_path(value, shapes)


def first(draw):
  """What draw() gives that is no None, which it is where something is refused; some draws never are anything else."""
  for _ in range(1000):
    if (made := draw()) is not None:
      return made
  raise AssertionError("a thousand draws were refused")


@contextlib.contextmanager
def about(what):
  """Whatever fails inside tells what it was about."""
  try:
    yield
  except Exception as problem:
    problem.add_note(f"drawn: {what}")
    raise


def accepted(make, what):
  """make(), or None where it is refused, which has to name a field."""
  try:
    return make()
  except ValueError as error:
    assert str(error).startswith(("sites.", "config.")), f"{what}: {error!r}"
  except Exception as error:
    raise AssertionError(f"{what}: {error!r}") from error


def look(check, numbers):
  """check(seed) for the seeds of a range, and what fails."""
  for seed in range(*map(int, numbers)):
    try:
      check(seed)
    except Exception as problem:
      print(seed, repr(problem)[:1500], *getattr(problem, "__notes__", ()), flush=True)
