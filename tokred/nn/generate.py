"""Text from a language model: the prompt is reduced and cached once, then one token follows another under jit."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokred.nn.budget import Census, capacities, census
from tokred.nn.cache import Cache
from tokred.nn.decoder import Decoder
from tokred.tokens import Array


@struct.dataclass
class Generated:
  """What has been written."""

  tokens: Array  # (B, max_new_tokens) int32; zeros behind a stop token
  length: Array  # (B,) int32; the stop token counted


def generate(
  model: Decoder,
  params: Any,
  ids: Any = None,
  mask: Any = None,
  max_new_tokens: int = 32,
  temperature: float = 0.0,
  top_p: float = 1.0,
  stop_tokens: Sequence[int] = (),
  seed: int = 0,
  *,
  x: Any = None,
  protected: Any = None,
  position: Any = None,
  cache_length: int = 0,
) -> Generated:
  """Continues prompts.

  Args:
    model: a decoder; its sites reduce the prompt.
    params: of `model`.
    ids: (B, S) int32; or `x`.
    mask: (B, S), nonzero where there is a token; padding on either side.  None: everywhere.
    max_new_tokens: of each row, at most.
    temperature: 0: the likeliest token.
    top_p: samples among the likeliest tokens whose probabilities add up to it; 1: among all.
    stop_tokens: a row ends with one of these.
    seed: a row draws by seed and row number, whatever stands in the other rows.
    x: (B, S, D) embeddings instead of ids.
    protected: (B, S), nonzero where sites may take nothing away.  None: everywhere.
    position: (B, S[, axis]) int32; None: counted within each row.
    cache_length: tokens of prompt and continuation that the cache holds: prompts of different lengths then share one
      compilation.  0: as many as these need.

  Raises:
    ValueError: an argument that is not valid, or a prompt that is longer than the cache; before anything is compiled.
  """
  if (ids is None) == (x is None):
    raise ValueError("generate takes ids or x, one of them")
  given = np.asarray(ids) if x is None else x
  if given.ndim != (2 if x is None else 3) or 0 in given.shape:
    kind = "ids must be (batch, tokens)" if x is None else "x must be (batch, tokens, width)"
    raise ValueError(f"{kind}, with one token at least; got shape {given.shape}")
  if x is None and not (given.min() >= 0 and given.max() < model.shape.vocab):
    raise ValueError(f"ids from {given.min()} to {given.max()}; valid: 0 to {model.shape.vocab - 1}, the vocabulary")
  mask, protected = (_whole(name, a, given.shape[:2]) for name, a in (("mask", mask), ("protected", protected)))
  lengths = mask.sum(1)
  if not lengths.all():
    raise ValueError(f"row {int(lengths.argmin())} of mask has no token: an empty prompt")
  stop = check(max_new_tokens, temperature, top_p, stop_tokens, seed)
  slots = given.shape[1]
  if cache_length:
    longest, slots = int(lengths.max()), cache_length - max_new_tokens
    if longest > slots:
      raise ValueError(
        f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are longer than the cache: "
        f"cache_length={cache_length}; valid: {longest + max_new_tokens} or more"
      )
    kept = np.argsort(~mask, axis=1, kind="stable")[:, :slots]  # what does not fit is padding
    given, mask, protected, position = (_fit(a, kept, slots) for a in (given, mask, protected, position))
  known = census(mask, protected)
  if model.sites.spots:
    capacities(model.sites, slots, known)
  else:
    known = Census(0, 0)
  inputs = dict(ids=given if x is None else None, x=None if x is None else given)
  inputs |= dict(mask=mask, protected=protected, position=position)
  sampling = (jnp.float32(temperature), jnp.float32(top_p)) if temperature > 0 else None
  return run(model, params, inputs, stop, sampling, jax.random.key(seed), known, max_new_tokens, top_p < 1)


def write(
  model: Any, params: Any, ids: Any, images: Any, slot: Any, mask: Any = None, max_new_tokens: int = 32, *,
  stop_tokens: tuple[int, ...] = (), temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, position: Any = None,
  cache_length: int = 0,
) -> Generated:  # fmt: skip
  """Continues prompts with images; arguments as in `VLM.__call__` and `generate`.

  Raises:
    ValueError: an argument that is not valid, placeholders that do not fit, or a prompt that is longer than the cache;
      before anything is compiled.
  """
  ids, mask = np.asarray(ids), np.ones(np.shape(ids), bool) if mask is None else np.asarray(mask) > 0
  stop = check(max_new_tokens, temperature, top_p, stop_tokens, seed)
  known = model.known(ids, slot, mask)
  if cache_length:
    held = ids.shape[1] if model.position == "virtual" else known.length
    longest = held + max_new_tokens
    if longest > cache_length:
      raise ValueError(
        f"a prompt of {held} tokens, images counted, and max_new_tokens={max_new_tokens} are longer than the "
        f"cache: cache_length={cache_length}; valid: {longest} or more"
      )
    known = dataclasses.replace(known, length=min(cache_length - max_new_tokens, ids.shape[1]))
  capacities(model.llm.sites, known.length, known.census)
  inputs = dict(ids=ids, images=images, slot=slot, mask=mask, position=position)
  sampling = (jnp.float32(temperature), jnp.float32(top_p)) if temperature > 0 else None
  return run(model, params, inputs, stop, sampling, jax.random.key(seed), known, max_new_tokens, top_p < 1)


def check(max_new_tokens: int, temperature: float, top_p: float, stop_tokens: Sequence[int], seed: int) -> Array:
  """The stop tokens as an array; raises ValueError where an argument of `generate` is of another kind or range."""
  kind = lambda value: np.asarray(value).dtype.kind if np.ndim(value) == 0 else ""
  if kind(max_new_tokens) not in ("i", "u") or max_new_tokens < 1:
    raise ValueError(f"max_new_tokens={max_new_tokens!r}; valid: 1 or more")
  if kind(temperature) not in ("f", "i", "u") or not 0 <= temperature < np.inf:
    raise ValueError(f"temperature={temperature!r}; valid: 0 (the likeliest token) or more")
  if kind(top_p) not in ("f", "i", "u") or not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p!r}; valid: above 0, at most 1")
  check_seed(seed)
  stop = np.asarray(tuple(stop_tokens) if isinstance(stop_tokens, Iterable) else stop_tokens)
  if stop.ndim != 1 or (stop.size and stop.dtype.kind not in "iu"):
    raise ValueError(f"stop_tokens={stop_tokens!r}; valid: ids, such as (2,)")
  return jnp.asarray(stop, jnp.int32)


def check_seed(seed: Any) -> None:
  """Raises ValueError for what is no seed of `jax.random.key`."""
  if isinstance(seed, (bool, np.bool_)) or not isinstance(seed, (int, np.integer)) or not -(2**63) <= seed < 2**63:
    raise ValueError(f"seed={seed!r}; valid: an integer below 2**63")


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8))
def run(
  model: Any, params: Any, inputs: Any, stop: Array, sampling: Any, key: Array, known: Any, new: int, cut: bool
) -> Generated:
  """Prefill, then one token after another: what `generate` does with arguments that it has found valid."""
  start = model.apply({"params": params}, **inputs, room=new - 1, known=known, method="prefill")
  batch = start.logits.shape[0]

  def choose(logits: Array, step: Array | int) -> Array:
    return logits.argmax(-1).astype(jnp.int32) if sampling is None else sample(logits, key, step, *sampling, cut)

  def write(out: Generated, token: Array, done: Array, step: Array | int) -> tuple[Generated, Array]:
    column = jnp.where(done, 0, token)[:, None]
    tokens = jax.lax.dynamic_update_slice_in_dim(out.tokens, column, step, axis=1)
    return Generated(tokens, out.length + ~done), done | (token[:, None] == stop).any(1)

  def going(state: tuple[Any, ...]) -> Array:
    step, done = state[0], state[2]
    return (step < new) & ~done.all()

  def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
    step, token, done, out, cache = state
    logits, cache = model.apply({"params": params}, token, cache, method="decode")
    token = choose(logits, step)
    out, done = write(out, token, done, step)
    return step + 1, token, done, out, cache

  first = choose(start.logits[:, 0], 0)
  out = Generated(jnp.zeros((batch, new), jnp.int32), jnp.zeros(batch, jnp.int32))
  out, done = write(out, first, jnp.zeros(batch, bool), 0)
  if new == 1:
    return out
  cache: Cache = start.cache
  return jax.lax.while_loop(going, body, (jnp.int32(1), first, done, out, cache))[3]


def sample(
  logits: Array, key: Array, step: Array | int, temperature: Array, top_p: Array | float = 1.0, cut: bool = True
) -> Array:
  """Draws a token a row.  (Holtzman et al., 2019, nucleus sampling, arXiv:1904.09751)

  Args:
    logits: (B, V) float32.
    key: of the whole text; rows and steps draw apart.
    step: number of the token.
    temperature: above 0.
    top_p: the fewest of the likeliest tokens whose probabilities reach it.
    cut: whether top_p is below 1; a Python bool.

  Returns:
    (B,) int32.
  """
  logits = logits / temperature
  if cut:
    falling = jnp.sort(logits, axis=-1, descending=True)
    chance = jax.nn.softmax(falling)
    inside = jnp.cumsum(chance, axis=-1) - chance < top_p  # the first is always in
    least = jnp.where(inside, falling, jnp.inf).min(-1, keepdims=True)
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(jnp.arange(logits.shape[0]))
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _whole(name: str, a: Any, shape: tuple[int, ...]) -> np.ndarray:
  """(B, S) bool; ones where it is not given."""
  a = np.ones(shape, bool) if a is None else np.asarray(a) > 0
  if a.shape != shape:
    raise ValueError(f"{name} of shape {a.shape} for prompts of shape {shape}")
  return a


def _fit(a: Any, kept: np.ndarray, slots: int) -> Any:
  """Columns `kept` of (B, S, ...), then zeros up to `slots`."""
  if a is None:
    return None
  a = jnp.take_along_axis(jnp.asarray(a), kept.reshape(*kept.shape, *(1,) * (a.ndim - 2)), axis=1)
  return jnp.pad(a, ((0, 0), (0, slots - a.shape[1]), *((0, 0),) * (a.ndim - 2)))
