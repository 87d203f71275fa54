"""A model as users hold it: config, module and parameters; building it, and freezing what it has learned."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tokred import cost, rates
from tokred.config import complete, nearest
from tokred.layout import Spot, walk
from tokred.nn import vit
from tokred.tokens import Array

MODELS = {"vit": vit.make}


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """`model(images)` runs it under jit; `model.module` is the Flax module for `init` and `apply`."""

  config: ConfigDict
  module: vit.ViT
  params: Any = None

  def __repr__(self) -> str:
    m, sites = self.config.model, ", ".join(self.config.sites) or "none"
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
    return f"Model({m.name} {m.variant}, sites: {sites}, mode: {self.mode}, parameters: {size:,})"

  @property
  def mode(self) -> str:
    """ "gather", or "mask" as long as a rate is learned."""
    return "mask" if any(spot.rate == "learned" for spot in self.module.sites.spots) else "gather"

  @property
  def counts(self) -> tuple[int, ...]:
    """Tokens leaving each block; those of a learned rate as they are now."""
    return self.module.sites.counts() if self.mode == "gather" else freeze(self).counts

  @property
  def macs(self) -> float:
    """Multiply-adds of one image: what papers call FLOPs."""
    return self._price(cost.macs)

  @property
  def flops(self) -> float:
    """FLOPs of one image, as XLA counts them."""
    return self._price(cost.flops)

  def init(self, seed: int | None = None) -> "Model":
    """With parameters drawn anew; `config.seed` where no seed is given."""
    return dataclasses.replace(self, params=init(self.module, self.config.seed if seed is None else seed))

  def __call__(self, images: Array) -> vit.Output:
    """Classifies.

    Args:
      images: (B, height, width, channels) float32, normalised with `config.data.mean` and `std`.

    Returns:
      Output without `aux`, which `inspect` has; `counts` are ints in gather mode.

    Raises:
      ValueError: no parameters yet, or images of another shape.
    """
    return self._run(images, False)

  def inspect(self, images: Array) -> vit.Output:
    """The same with all that reducers report and the source map after each block, in `aux`."""
    return self._run(images, True)

  def _run(self, images: Array, report: bool) -> vit.Output:
    if self.params is None:
      raise ValueError("the model has no parameters: call model.init(), or get it from tokred.load")
    wanted = (*self.config.model.image_size, self.config.model.channels)
    if np.ndim(images) != 4 or np.shape(images)[1:] != wanted:
      raise ValueError(f"images of shape {np.shape(images)}; the model takes (batch, {', '.join(map(str, wanted))})")
    output = forward(self.module, self.mode, report)(self.params, images)
    return output.replace(counts=self.module.sites.counts()) if self.mode == "gather" else output

  def _price(self, price: Any) -> float:
    if self.mode == "mask":
      return freeze(self)._price(price)
    s = self.module.shape
    return float(price(s.sizes(), self.module.sites.profile(s.width, s.num_heads)))


@functools.lru_cache(maxsize=32)
def forward(module: vit.ViT, mode: str, report: bool = False) -> Any:
  """Jitted (params, images) -> Output, with an empty `aux` where no report is asked for."""

  def run(params: Any, images: Array) -> vit.Output:
    output = module.apply({"params": params}, images, mode=mode)
    return output if report else output.replace(aux={})

  return jax.jit(run)


def build(config: Mapping[str, Any] | ConfigDict) -> Model:
  """The model that a config describes, without parameters.

  Args:
    config: with the fields of `tokred.config.default()`; those that are missing take their defaults.

  Raises:
    ValueError: any error in `config.model`, `config.sites` or `config.rates`; the message names field, value and what
      is valid.
  """
  config = complete(config)
  if config.model.name not in MODELS:
    raise ValueError(f"config.model.name={config.model.name!r} is not a model; {nearest(config.model.name, MODELS)}")
  if config.rates.multiple_of < 1:
    raise ValueError(f"config.rates.multiple_of={config.rates.multiple_of}; valid: 1 or more")
  return Model(config, MODELS[config.model.name](config.model, config.sites.to_dict()))


def without_sites(module: vit.ViT) -> vit.ViT:
  """The dense module; parameters under `reduce/` mean nothing to it."""
  return module.clone(sites=type(module.sites)(module.sites.stack))


def init(module: vit.ViT, seed: int) -> Any:
  """Parameters of a module drawn from a seed, as a nested dict of float32 arrays."""
  return _draw(module, jax.random.split(jax.random.key(seed), 3))


@functools.partial(jax.jit, static_argnums=0)
def _draw(module: vit.ViT, keys: Array) -> Any:
  """Under jit, for then the forward pass that finds the shapes is never run."""
  s, patch = module.shape, module.shape.patch
  images = jnp.zeros((1, s.grid[0] * patch, s.grid[1] * patch, s.channels))
  return module.init(dict(zip(("params", "reduce", "dropout"), keys, strict=True)), images, mode="mask")["params"]


def freeze(model: Model) -> Model:
  """Learned rates become integers; everything else stays.

  Counts fall monotonically (a later rate cannot bring tokens back), are rounded to a multiple of
  `config.rates.multiple_of`, and stand in the config as a fixed `keep`.  Sites behind a learned one get their counts
  as integers too, for a share of what arrives is now a share of less.  Logits of rates leave the parameters.
  A model without learned rates comes back as it is.

  Raises:
    ValueError: the model has no parameters.
  """
  if not isinstance(model, Model):
    raise ValueError(f"{model!r} has no parameters to freeze; export orbax or safetensors too")
  model = _without_heads(model)
  spots = model.module.sites.spots
  learned = [index for index, spot in enumerate(spots) if spot.rate in rates.LEARNED]
  if not learned:
    return model
  if model.params is None:
    raise ValueError("freeze needs parameters: call model.init(), or get the model from tokred.load")
  kept = {spot.site: [] for spot in spots}
  for spot, count in zip(spots, _frozen_counts(model), strict=True):
    kept[spot.site].append(count)
  config = model.config.to_dict()
  for name in {spot.site for spot in spots[learned[0] :]}:
    site = config["sites"][name]
    gone = ("r", "granularity") + (() if site.get("rate") == "threshold" else ("rate", "schedule"))
    slots = len(site["reducer"]) if isinstance(site["reducer"], (tuple, list)) else 1
    by_slot = tuple(tuple(kept[name][slot::slots]) for slot in range(slots))
    keep = {"keep": by_slot if slots > 1 else by_slot[0]}
    config["sites"][name] = {field: value for field, value in site.items() if field not in gone} | keep
    if site.get("rate") == "learned_threshold":
      values = [float(_rate(model, spot)["value"]) for spot in spots if spot.site == name]
      config["sites"][name] |= {"rate": "threshold", "threshold": tuple(values)}
  return dataclasses.replace(build(config), params=drop_rates(model.params))


def _without_heads(model: Model) -> Model:
  """The model without what only training uses: sites of auxiliary heads, and such parts of reducers."""
  spots = model.module.sites.spots
  heads = {spot.child for spot in spots if spot.type.training_only}
  parts = {name for spot in spots for name in spot.type.training_params}
  if not heads | parts:
    return model
  gone = {spot.site for spot in spots if spot.type.training_only}
  sites = {name: site for name, site in model.config.sites.to_dict().items() if name not in gone}
  params = drop(model.params, lambda path: "reduce" in path[:-1] and path[-1] in heads | parts)
  return dataclasses.replace(build(model.config.to_dict() | {"sites": sites}), params=params)


def _frozen_counts(model: Model) -> list[int]:
  """Tokens that leave each spot."""
  sites, multiple, out = model.module.sites, model.config.rates.multiple_of, []

  def leave(spots: Sequence[Spot], n: int) -> int:
    for spot in spots:
      count = spot.keep
      if spot.rate == "learned":
        logits = jnp.asarray(_rate(model, spot)["logits"])
        count = int(rates.kept_count(logits, spot.candidates)) + spot.protected
        count = max(round(count / multiple) * multiple, spot.module().fewest(n, spot.protected))
      n = spot.module().recovered(n, sites.stack.num_tokens) if spot.type.recovers else min(n, count)
      out.append(n)
    return n

  walk(sites.stack.depth, sites.at, sites.stack.num_tokens, leave)
  return out


def _rate(model: Model, spot: Spot) -> Any:
  """Parameters of a spot's rate."""
  block = model.params[f"block_{spot.layer}"] if spot.layer >= 0 else model.params
  return block["reduce"][spot.child]["rate"]


def drop_rates(params: Any) -> Any:
  """The tree without parameters of rates, and without the branches that held nothing else."""
  return drop(params, lambda path: path[-1] == "rate" and "reduce" in path)


def drop(params: Any, unwanted: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()) -> Any:
  """The tree without the branches whose path is unwanted, and without those that held nothing else."""
  if not isinstance(params, Mapping):
    return params
  kept = {name: drop(value, unwanted, (*path, name)) for name, value in params.items() if not unwanted((*path, name))}
  return {name: value for name, value in kept.items() if not (isinstance(value, Mapping) and not value)}
