"""A model as users hold it: config, module and parameters; building it, and freezing what it has learned."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from tokred import cost, memory, rates
from tokred import tokens as tk
from tokred.config import complete, nearest
from tokred.layout import Spot, walk
from tokred.nn import generate, placeholders, vit, vlm
from tokred.tokens import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """`model(images)` runs it under jit; `model.module` is the Flax module for `init` and `apply`."""

  config: ConfigDict
  module: vit.ViT | vlm.VLM
  params: Any = None

  def __repr__(self) -> str:
    m, sites = self.config.model, ", ".join(self.config.sites) or "none"
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
    return f"Model({m.name} {m.variant}, sites: {sites}, mode: {self.mode}, parameters: {size:,})"

  @property
  def mode(self) -> str:
    """ "gather", or "mask" as long as a rate is learned."""
    return "mask" if any(spot.rate == "learned" for spot in self.module.spots) else "gather"

  @property
  def counts(self) -> tuple[int, ...]:
    """Tokens leaving each block; those of a learned rate as they are now."""
    return self.module.sites.counts() if self.mode == "gather" else freeze(self).counts

  @property
  def macs(self) -> float:
    """Multiply-adds of one image: what papers call FLOPs."""
    return float(cost.of(self._settled(), cost.macs))

  @property
  def flops(self) -> float:
    """FLOPs of one image, as XLA counts them."""
    return float(cost.of(self._settled(), cost.flops))

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
      ValueError: no parameters yet, or images of another shape, or that are no floating-point array.
    """
    return self._run(images, False)

  def inspect(self, images: Array) -> vit.Output:
    """The same with all that reducers report and the source map after each block, in `aux`."""
    return self._run(images, True)

  def with_sites(self, sites: Mapping[str, Any]) -> "Model":
    """The same weights with other sites; parameters that their reducers have and these weights do not are drawn anew.

    Raises:
      ValueError: an error in the sites, or no parameters yet.
    """
    self._check_params()
    made = build(self.config.to_dict() | {"sites": sites})
    target = flatten_dict(jax.eval_shape(lambda: init(made.module, self.config.seed)), sep="/")
    own = flatten_dict(self.params, sep="/")
    drawn = flatten_dict(made.init().params, sep="/") if target.keys() - own.keys() else {}
    return dataclasses.replace(made, params=unflatten_dict({n: own.get(n, drawn.get(n)) for n in target}, sep="/"))

  def _run(self, images: Array, report: bool) -> vit.Output:
    self._check_params()
    _check_images(images, self.config.model, "batch")
    output = forward(self.module, self.mode, report)(self.params, images)
    return output.replace(counts=self.module.sites.counts()) if self.mode == "gather" else output

  def _check_params(self) -> None:
    if self.params is None:
      raise ValueError("the model has no parameters: call model.init(), or get it from tokred.load")

  def _settled(self) -> Any:
    """The module with counts that are known: those of learned rates as they are now."""
    return (self if self.mode == "gather" else freeze(self)).module


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Reader(Model):
  """A vision-language model: `model(ids, images)` has logits at ids, `model.write` goes on where they end."""

  def __call__(self, ids: Array, images: Array, mask: Array | None = None, slot: Array | None = None) -> Array:
    """Logits of what follows each id.

    Args:
      ids: (B, S) int32, with `config.llm.image_token` for each patch of an image.
      images: (B, R, height, width, channels) float32, normalised; R images a row at most.
      mask: (B, S), nonzero where there is a token; padding on either side.  None: everywhere.
      slot: (B, R, patches) int32 where in its row each patch stands, -1: nowhere; None: in the order of ids.

    Returns:
      (B, S, vocab) float32; zero where a token has left.

    Raises:
      ValueError: no parameters yet, images of another shape or that are no floating-point array, or placeholders that
        are not as many as patches.
    """
    ids, images, slot = self._checked(ids, images, slot, mask)
    known = self.module.known(ids, slot, mask, self.mode) if self.mode == "gather" else None
    return read(self.module, self.mode)(self.params, known, ids, images, slot, mask)

  @property
  def macs_written(self) -> float:
    """Multiply-adds of each token that is written behind a prompt of `config.llm.prompt` ids and one image."""
    module = self._settled()
    return float(cost.writing(module.llm.shape, cost.prompt(module).cache))

  @property
  def cache_bytes(self) -> float:
    """Bytes of the keys and values of that prompt."""
    module = self._settled()
    return float(cost.cache_bytes(module.llm.shape, cost.prompt(module).cache, jnp.dtype(module.llm.dtype).itemsize))

  def write(
    self, ids: Array, images: Array, mask: Array | None = None, max_new_tokens: int = 32, slot: Array | None = None,
    **options: Any,
  ) -> generate.Generated:  # fmt: skip
    """Continues prompts; options are those of `tokred.nn.generate.generate`: stop_tokens, temperature, top_p, seed."""
    ids, images, slot = self._checked(ids, images, slot, mask)
    return generate.write(self.module, self.params, ids, images, slot, mask, max_new_tokens, **options)

  def inspect(self, ids: Array, images: Array, mask: Array | None = None) -> Any:
    """The whole output, with all that reducers report and the source map of ids after each layer, in `aux`."""
    ids, images, slot = self._checked(ids, images, None, mask)
    known = self.module.known(ids, slot, mask, self.mode)
    return read(self.module, self.mode, True)(self.params, known, ids, images, slot, mask)

  def _checked(self, ids: Any, images: Any, slot: Any, mask: Any = None) -> tuple[np.ndarray, Any, np.ndarray]:
    self._check_params()
    ids, s, token = np.asarray(ids), self.module.tower.shape, self.module.image_token
    _check_images(images, self.config.model, "batch", "images of a row")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(f"ids of dtype {ids.dtype}; the model takes the integers of a tokenizer, (batch, tokens) int32")
    if (
      ids.ndim != 2
      or not ids.size
      or len(ids) != len(images)
      or not (ids.min() >= 0 and ids.max() < self.config.llm.vocab)
    ):
      raise ValueError(
        f"ids of shape {ids.shape} from {ids.min(initial=0)} to {ids.max(initial=0)}; valid: ({len(images)}, tokens), "
        f"from 0 to {self.config.llm.vocab - 1}"
      )
    if mask is not None and np.shape(mask) != ids.shape:
      raise ValueError(f"mask of shape {np.shape(mask)} for ids of shape {ids.shape}; valid: that of ids")
    slot = placeholders.slots(ids, token, np.shape(images)[1], s.num_patches) if slot is None else np.asarray(slot)
    return ids, images, slot


def _check_images(images: Any, model: ConfigDict, *lead: str) -> None:
  """Raises for what is no normalised array; pixels of 0 to 255 would be taken for one."""
  if not isinstance(images, (np.ndarray, jax.Array)):
    raise ValueError(f"images are a {type(images).__name__}; the model takes an array of numpy or JAX")
  wanted, given = (*model.image_size, model.channels), np.shape(images)
  if len(given) != len(lead) + 3 or given[len(lead) :] != wanted or 0 in given:
    raise ValueError(f"images of shape {given}; the model takes ({', '.join(map(str, (*lead, *wanted)))})")
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f"images of dtype {images.dtype}; the model takes float32, normalised with config.data.mean and config.data.std: "
      "(pixels / 255 - mean) / std"
    )


MODELS: dict[str, tuple[type[Model], Callable[[ConfigDict], Any]]] = {
  "vit": (Model, lambda config: vit.make(config.model, config.sites.to_dict())),
  "vlm": (Reader, lambda config: vlm.make(config, config.sites.to_dict())),
}


@functools.lru_cache(maxsize=32)
def read(module: vlm.VLM, mode: str, report: bool = False) -> Any:
  """Jitted (params, known, ids, images, slot, mask) -> logits at ids, or the whole output; `known` is static."""

  def run(params: Any, known: Any, ids: Array, images: Array, slot: Array, mask: Any) -> Array:
    output = module.apply({"params": params}, ids, images, slot=slot, mask=mask, known=known, mode=mode)
    return output if report else tk.restore(output.logits, output.tokens.owner)

  return jax.jit(run, static_argnums=1)


@functools.lru_cache(maxsize=32)
def forward(module: Any, mode: str, report: bool = False) -> Any:
  """Jitted (params, images) -> Output, with an empty `aux` where no report is asked for."""
  memory.keep_freed()

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
  kind, make = MODELS[config.model.name]
  return kind(config, make(config))


def without_sites(module: Any) -> Any:
  """The dense module; parameters under `reduce/` mean nothing to it."""
  return module.dense()


def init(module: Any, seed: int) -> Any:
  """Parameters of a module drawn from a seed, as a nested dict of float32 arrays.

  Raises:
    ValueError: a seed that is no integer of 64 bits.
  """
  generate.check_seed(seed)
  return _draw(module, jax.random.split(jax.random.key(seed), 3))


@functools.partial(jax.jit, static_argnums=0)
def _draw(module: Any, keys: Array) -> Any:
  """Under jit, for then the forward pass that finds the shapes is never run."""
  streams = dict(zip(("params", "reduce", "dropout"), keys, strict=True))
  return module.init(streams, **module.example(), mode="mask")["params"]


def freeze(model: Model) -> Model:
  """Learned rates become integers, and what only training uses leaves; everything else stays.

  Counts fall monotonically (a later rate cannot bring tokens back), are rounded to a multiple of
  `config.rates.multiple_of`, and stand in the config as a fixed `keep`.  Sites behind a learned one get their counts
  as integers too, for a share of what arrives is now a share of less.  Logits of rates leave the parameters.
  A model with neither comes back as it is.

  Raises:
    ValueError: no Model, or one without parameters.
  """
  if not isinstance(model, Model):
    name = type(model).__name__ if "\n" in repr(model) else repr(model)  # a module's has many lines
    raise ValueError(
      f"freeze takes a Model, as tokred.build and tokred.load give it, not {name}; of an export that is a function "
      "alone, export orbax or safetensors too"
    )
  model = _without_heads(_with_shares(model))
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
  for name in {spot.site for spot in spots[learned[0] :] if not spot.type.recovers}:
    site = config["sites"][name]
    gone = ("r", "granularity", "initial", "softness")
    gone += () if site.get("rate") == "threshold" else ("rate", "schedule")
    slots = len(site["reducer"]) if isinstance(site["reducer"], (tuple, list)) else 1
    by_slot = tuple(tuple(kept[name][slot::slots]) for slot in range(slots))
    keep = {"keep": by_slot if slots > 1 else by_slot[0]}
    config["sites"][name] = {field: value for field, value in site.items() if field not in gone} | keep
    if site.get("rate") == "learned_threshold":
      values = [float(_rate(model, spot)["value"]) for spot in spots if spot.site == name]
      config["sites"][name] |= {"rate": "threshold", "threshold": tuple(values)}
  return dataclasses.replace(build(config), params=drop_rates(model.params))


def _with_shares(model: Model) -> Model:
  """The model with learned shares of a language model's visual tokens as fixed ones; the tower may still learn."""
  spots = [s for s in model.module.spots if s.rate == "learned" and s not in model.module.sites.spots]
  if not spots:
    return model
  if model.params is None:
    raise ValueError("freeze needs parameters: call model.init(), or get the model from tokred.load")
  config = model.config.to_dict()
  for name in {spot.site for spot in spots}:
    kept, least = [], 1.0
    for spot in (spot for spot in spots if spot.site == name):
      logits = model.params["llm"][f"block_{spot.layer}"]["reduce"][spot.child]["rate"]["logits"]
      least = min(least, rates.frozen_share(logits))  # a later rate cannot bring tokens back
      kept.append(least)
    site = {field: value for field, value in config["sites"][name].items() if field not in ("rate", "granularity")}
    config["sites"][name] = site | {"keep": tuple(kept), "of": "input"}
  blocks = {name: drop_rates(block) for name, block in model.params["llm"].items()}
  return dataclasses.replace(build(config), params=dict(model.params) | {"llm": blocks})


def _without_heads(model: Model) -> Model:
  """The model without what only training uses: sites of auxiliary heads, and such parts of reducers."""
  spots = model.module.spots
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
  params = model.params.get("tower", model.params)
  block = params[f"block_{spot.layer}"] if spot.layer >= 0 else params
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
