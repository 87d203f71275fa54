"""Vision-language models: a tower sees, a projector translates, a decoder reads images in the midst of text.

LLaVA (Liu et al., 2023, arXiv:2304.08485) and its kin.  A prompt's ids hold one placeholder for each patch; what the
tower and its sites leave of an image stands in the places of its survivors, and the text around them never goes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from tokred import tokens as tk
from tokred.layout import Sites, Spot
from tokred.nn import budget, decoder, placeholders, projectors, vit
from tokred.nn.budget import Census, Lengths
from tokred.nn.cache import Cache
from tokred.nn.decoder import Decoder, Output
from tokred.nn.decoder_layer import language
from tokred.nn.stacks import split
from tokred.nn.unmerge import places
from tokred.scores import MEMORY
from tokred.tokens import Array, Tokens


@dataclasses.dataclass(frozen=True)
class Known:
  """What the host knows of a batch of prompts with images; it makes the shapes static."""

  length: int  # tokens of text and of what the tower leaves, of the row that has most
  census: Census  # of what reaches the language model


class VLM(nn.Module):
  """Tower, projector, language model."""

  tower: nn.Module
  projector: nn.Module
  llm: Decoder
  image_token: int  # the id of placeholders
  position: str = "original"  # of what the tower's sites leave: one of TOWER_POSITIONS
  prompt: int = 32  # tokens of text that multiply-adds are counted with
  newline: bool = False  # placeholders without a patch are ends of lines of them, as in LLaVA-NeXT

  def setup(self) -> None:
    if self.newline:
      width = self.llm.shape.width
      self.image_newline = self.param("image_newline", nn.initializers.normal(width**-0.5), (width,), jnp.float32)

  @property
  def sites(self) -> Sites:
    """Those of the tower; the language model has its own, `llm.sites`."""
    return self.tower.sites

  @property
  def spots(self) -> tuple[Spot, ...]:
    """All that act, in tower and language model."""
    return (*self.tower.sites.spots, *self.llm.sites.spots)

  @nn.nowrap
  def example(self) -> dict[str, Array]:
    """Arguments of the smallest call, to find the shapes of parameters with."""
    s = self.tower.shape
    patches = s.num_patches
    ids = jnp.full((1, patches + 1), self.image_token, jnp.int32).at[0, -1].set(self.image_token ^ 1)
    images = jnp.zeros((1, 1, s.grid[0] * s.patch, s.grid[1] * s.patch, s.channels))
    return dict(ids=ids, images=images, slot=jnp.arange(patches, dtype=jnp.int32)[None, None])

  @nn.nowrap
  def dense(self) -> "VLM":
    """The same without sites."""
    bare = lambda module: module.clone(sites=type(module.sites)(module.sites.stack))
    return self.clone(tower=bare(self.tower), llm=bare(self.llm), position="original")

  @nn.nowrap
  def known(self, ids: Any, slot: Any, mask: Any = None, mode: str = "gather") -> Known:
    """Counts a batch on the host.

    Args:
      ids: (B, S) int32.
      slot: (B, R, N) int32, see `__call__`.
      mask: (B, S), nonzero where there is a token; None: everywhere.
      mode: "mask" or "gather".

    Raises:
      ValueError: placeholders and places of patches differ.
    """
    ids, slot = np.asarray(ids), np.asarray(slot)
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) > 0
    placeholders.check(ids, slot, mask, self.image_token, self.newline)
    text = (mask & (ids != self.image_token)).sum(1)
    lines = (mask & (ids == self.image_token)).sum(1) - (slot >= 0).sum((1, 2))  # newlines between rows of patches
    fewest, most = self.bounds((slot >= 0).sum(2), slot.shape[2], mode)
    return Known(int((text + lines + most.sum(1)).max()), Census(int((lines + fewest.sum(1)).min()), int(text.max())))

  @nn.nowrap
  def bounds(self, used: np.ndarray, patches: int, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that reach the language model of images, at least and at most.

    Args:
      used: (B, R) int; patches of each image that have a placeholder.
      patches: of an image, those that are cut away counted.
      mode: "mask" or "gather".
    """
    kept = self.left(mode)
    ragged = any(spot.ragged for spot in self.tower.sites.spots)
    return np.maximum(used - max(patches - kept, 0), 0) * (not ragged), np.minimum(used, kept)

  @nn.nowrap
  def known_of(self, text: Any, images: Any, patches: int) -> Known:
    """The counts of any batch of these rows.

    Args:
      text: (rows,) int, tokens of text in each row; or a number.
      images: (rows,) int, images of each row, of which nothing is cut away; or a number.
      patches: N, of an image.
    """
    text, images = np.asarray(text), np.asarray(images)
    fewest, most = self.bounds(np.asarray(patches), patches, "gather")
    return Known(int((text + images * most).max()), Census(int((images * fewest).min()), int(text.max())))

  @nn.nowrap
  def left(self, mode: str = "gather") -> int:
    """Tokens of an image that reach the language model."""
    s = self.tower.sites
    spots = [spot for spot in s.spots if spot.place == "output"] if mode == "gather" else []
    n = s.stack.num_tokens if mode == "mask" else spots[-1].keep if spots else s.counts()[-1]
    return self.projector.left(n - self.dropped)

  @nn.nowrap
  def lengths(self, visual: Any, shares: Mapping[str, Any] | None = None) -> Lengths:
    """Tokens in each layer of the language model: `prompt` of text, and of so many visual ones what the sites leave.

    Args:
      visual: visual tokens that reach the language model, a number or a traced scalar.
      shares: see `budget.lengths`.
    """
    return budget.lengths(self.llm.sites, self.llm.shape, self.prompt, visual, shares)

  @property
  def whole(self) -> int | None:
    """Places in the language model's attention, of text and one image, where merged tokens stand at several."""
    s = self.tower.shape
    return self.prompt + s.num_patches if self.position == "virtual" else None

  @property
  def dropped(self) -> int:
    """Prefix tokens, which the language model does not see unless a reducer asks for it."""
    kept = any(dict(spot.options).get("keep_cls") for spot in self.tower.sites.spots)
    return 0 if kept else self.tower.shape.num_prefix_tokens

  def __call__(
    self,
    ids: Array,
    images: Array,
    *,
    slot: Array,
    mask: Array | None = None,
    position: Array | None = None,
    segment: Array | None = None,
    last: Array | None = None,
    known: Known | None = None,
    train: bool = False,
    mode: str = "gather",
    keeps: Mapping[str, Any] | None = None,
  ) -> Output:
    """The whole sequence at once, as in training; nothing is cached.

    Args:
      ids: (B, S) int32, with `image_token` where patches stand.
      images: (B, R, height, width, channels) float32, normalised; R images, or crops of one, a row.
      slot: (B, R, N) int32: where in its row's ids each patch stands, -1: nowhere (no image, or cut away).
      mask: (B, S), nonzero where there is a token; padding may be on either side.  None: everywhere.
      position: (B, S[, axis]) int32; None: counted within each row, without padding.
      segment: (B, S) int32 of packed rows; None: a row is one sequence.
      last: (B,) int32 index into S of the prompt's last token, whose attention scores; None: the last that is there.
      known: of `known`, needed in gather mode; in mask mode none.
      train: whether reducers may sample; randomness comes from the stream "reduce".
      mode: "mask" (all stay in place) or "gather" (those that leave are gone).
      keeps: counts that replace those of the tower's sites, {site: (spots,) int}, and values of options that move
        while training, by "<site>.<option>", in either stack.

    Returns:
      Output; its `tokens.owner` (B, S) tells where each token of ids is now, so that
      `tokens.restore(logits, output.tokens.owner)` has the logits at ids; `aux` tells the same of each layer, by
      "owner/<layer>", and of what the language model is given, by "owner/tower".
    """
    own, keeps = {spot.site for spot in self.llm.sites.spots}, keeps or {}
    options = {name: value for name, value in keeps.items() if name.partition(".")[0] in own}
    keeps = {name: value for name, value in keeps.items() if name not in options} or None
    joined, owner, report = self._join(ids, images, slot, mask, position, segment, known, train, mode, keeps)
    last = None if last is None else jnp.maximum(tk.take(owner, last[:, None])[:, 0], 0)
    census = known.census if known else None
    out = self.llm(**joined, last=last, known=census, train=train, mode=mode, options=options)
    return self._whole(out, owner, report)

  def prefill(
    self, ids: Array, images: Array, *, slot: Array, room: int, known: Known, mask: Array | None = None,
    position: Array | None = None,
  ) -> Output:  # fmt: skip
    """Reduces and caches prompts, with room for as many tokens more; logits (B, 1, vocab) of their last tokens.

    Instead of images it takes what `see` returned of them.
    """
    joined, owner, report = self._join(ids, images, slot, mask, position, None, known, False, "gather", None)
    return self._whole(self.llm.prefill(**joined, room=room, known=known.census), owner, report)

  def decode(self, ids: Array, cache: Cache) -> tuple[Array, Cache]:
    """Appends one token to each row: (B,) int32 to logits (B, vocab) float32 of what follows, and the cache."""
    return self.llm.decode(ids, cache)

  def see(
    self, images: Array, slot: Array, train: bool = False, mode: str = "gather", keeps: Mapping[str, Any] | None = None
  ) -> tuple[Tokens, Array, dict[str, Any]]:
    """What is left of the images, for the language model.

    Args:
      images: (B, R, height, width, channels).
      slot: (B, R, N) int32.
      train: see `__call__`; likewise mode and keeps.
      mode: see above.
      keeps: see above.

    Returns:
      (B R) rows of M tokens; where in ids each stands, (B R, M) int32, -1: nowhere; what the tower reports.
    """
    s = self.tower.shape
    size = (s.grid[0] * s.patch, s.grid[1] * s.patch, s.channels)
    if images.ndim != 5 or not images.size or images.shape[2:] != size:
      raise ValueError(f"images of shape {images.shape}; valid: (batch, images, {', '.join(map(str, size))}), resized")
    if slot.shape != (*images.shape[:2], s.num_patches):
      raise ValueError(f"slot of shape {slot.shape}; valid: {(*images.shape[:2], s.num_patches)}")
    seen = self.tower(images.reshape(-1, *images.shape[2:]), train=train, mode=mode, keeps=keeps)
    tokens, prefix = seen.tokens, self.dropped
    if prefix:  # they stand first, and nothing takes them away
      rest = jax.tree.map(lambda a: a[:, prefix:], tokens.replace(owner=tokens.x[..., 0]))
      tokens = rest.replace(owner=jnp.where(tokens.owner >= prefix, tokens.owner - prefix, -1))
    patch = tokens.position - s.num_prefix_tokens
    tokens = tokens.replace(owner=tokens.owner[:, s.num_prefix_tokens :], position=patch)
    tokens = self.projector(tokens.replace(feats=tokens.feats | self._levels(seen.aux)), s.grid, train)
    table = slot.reshape(-1, slot.shape[-1])
    place = tk.take(table, jnp.maximum(tokens.position, 0))  # a kept prefix token stands where its image begins
    return tokens, place, seen.aux

  def _levels(self, aux: Mapping[str, Any]) -> dict[str, Array]:
    """Features of the layers that the projector asks for, on the patches, side by side."""
    s, layers = self.tower.shape, getattr(self.projector, "levels", ())
    if any(not 0 <= layer < s.depth for layer in layers):
      raise ValueError(f"config.projector.levels={layers}; valid: layers 0 to {s.depth - 1} of the tower")
    of = lambda layer: tk.restore(aux[f"tokens/{layer}"], aux[f"owner/{layer}"])[:, s.num_prefix_tokens :]
    return {"levels": jnp.concatenate([of(layer) for layer in layers], axis=-1)} if layers else {}

  def _join(
    self, ids: Array, images: Array, slot: Array, mask: Any, position: Any, segment: Any, known: Known | None,
    train: bool, mode: str, keeps: Any,
  ) -> tuple[dict[str, Any], Array, dict[str, Any]]:  # fmt: skip
    """Arguments of the decoder, and where each token of ids is among its L tokens, (B, S) int32."""
    if mode == "gather" and known is None:
      raise ValueError("in gather mode the shapes need known=module.known(ids, slot, mask), counted on the host")
    batch, source = ids.shape
    mask = jnp.ones(ids.shape, bool) if mask is None else mask > 0
    visual, place, report = images if isinstance(images, tuple) else self.see(images, slot, train, mode, keeps)
    place = self._places(visual, place, source, mode)
    words, text, free = self._words(ids, slot, mask)
    row = lambda a: a.reshape(batch, -1, *a.shape[2:])
    seen, place = row(visual.mask), row(place)
    # First the text, then what is seen: so they are numbered until `order` has them as they stand.
    index = jnp.arange(source, dtype=jnp.int32)
    stands = jnp.concatenate([jnp.broadcast_to(index, ids.shape), jnp.maximum(place, 0)], axis=1)
    there = jnp.concatenate([text | free, place >= 0], axis=1)
    seen = jnp.where(place >= 0, seen, jnp.zeros_like(seen))
    where = tk.rank(jnp.where(there, stands, source))
    order = tk.inverse(where)[:, : known.length if known else source]
    if position is None:
      position = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    stands = tk.take(stands, order)
    joined = dict(
      x=tk.take(jnp.concatenate([words, row(visual.x).astype(self.llm.dtype)], axis=1), order),
      mask=tk.take(jnp.concatenate([(text | free).astype(seen.dtype), seen], axis=1), order),
      protected=tk.take(jnp.pad(text, ((0, 0), (0, place.shape[1]))), order),
      position=None if self.position == "reindex" else tk.take(position, stands),
    )
    if MEMORY in visual.feats and visual.feats[MEMORY].shape == visual.mask.shape:  # what a site of the tower remembers
      memory = jnp.pad(row(visual.feats[MEMORY]), ((0, 0), (source, 0)))
      joined["state"] = {MEMORY: tk.take(memory, order)}
    if segment is not None:
      joined["segment"] = tk.take(segment, stands)
    owner = _owners(jnp.where(text | free, index, -1), visual, slot)
    owner = tk.follow(owner, jnp.where(there, where, -1))
    if self.position == "virtual":
      joined["places"] = places(owner, position, segment)
    return joined, owner, report

  def _places(self, visual: Tokens, place: Array, source: int, mode: str) -> Array:
    """Where in ids each visual token stands that is there, (B R, M) int32; -1: nowhere."""
    if not visual.learned:
      place = jnp.where(visual.alive, place, -1)
    elif self.position == "virtual":
      raise ValueError("sites.*.position='virtual' learns no counts; valid: a fixed keep or a threshold")
    if self.position == "reindex" and mode == "gather":  # as the reducer lays them out
      turn = jnp.maximum(jnp.cumsum(place >= 0, axis=1) - 1, 0)  # some survivors may lie in an image's margin
      place = jnp.where(place < 0, -1, tk.take(jnp.sort(jnp.where(place < 0, source, place), axis=1), turn))
    return place

  def _words(self, ids: Array, slot: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Embeddings of ids, (B, S, D); which are text, and which end a line of an image, so that sites may take them."""
    text, words = mask & (ids != self.image_token), self.llm.embeddings(ids)
    if not self.newline:
      return words, text, jnp.zeros_like(text)
    nobody = jnp.zeros(ids.shape[1], bool)
    stood = jax.vmap(lambda t: nobody.at[_or_beyond(t, nobody)].set(True, mode="drop"))(slot.reshape(len(slot), -1))
    free = mask & ~text & ~stood
    return jnp.where(free[..., None], self.image_newline.astype(words.dtype), words), text, free

  def _whole(self, out: Output, owner: Array, report: Mapping[str, Any]) -> Output:
    seen = {name: value for name, value in report.items() if name.startswith("reduce/")}
    seen |= {name: tk.follow(owner, value) for name, value in out.aux.items() if name.startswith("owner/")}
    tokens = out.tokens.replace(owner=tk.follow(owner, out.tokens.owner))
    return out.replace(tokens=tokens, aux=out.aux | seen | {"owner/tower": owner})


def _owners(text: Array, visual: Tokens, slot: Array) -> Array:
  """Who represents each token of ids, (B, S) int32, -1: nobody; text before what is seen.

  Args:
    text: (B, S) int32, who represents it where it is text.
    visual: (B R) rows of M tokens, of whose N patches `owner` tells.
    slot: (B, R, N) int32: where in ids each patch stands, -1: nowhere.
  """
  (batch, source), count = text.shape, visual.x.shape[1]
  patches = visual.owner.reshape(batch, -1, visual.owner.shape[1])
  first = source + count * jnp.arange(patches.shape[1], dtype=jnp.int32)[:, None]
  patches = jnp.where(patches >= 0, patches + first, -1).reshape(batch, -1)
  put = lambda row, where, patch: row.at[_or_beyond(where, row)].set(patch, mode="drop")
  return jax.vmap(put)(text, slot.reshape(batch, -1), patches)


def _or_beyond(where: Array, row: Array) -> Array:
  """Places in a row; what is nowhere is beyond its end, and dropped there."""
  return jnp.where(where >= 0, where, len(row))


def make(config: Mapping[str, Any] | ConfigDict, sites: Mapping[str, Any]) -> VLM:
  """The module for `config.model` (the tower), `config.projector`, `config.llm` and sites.

  Raises:
    ValueError: names the field, the value and what is valid.
  """
  seen, read, policy = split(sites)
  sizes, text = vit.shape(config.model), language(config.llm)
  tower = vit.make(config.model, seen)
  kinds = dict(dtype=config.model.dtype, attention=config.model.attention, gate_cap=config.model.gate_cap)
  llm = decoder.make(text, read, **kinds)
  if not 0 <= config.llm.image_token < text.vocab:
    raise ValueError(f"config.llm.image_token={config.llm.image_token}; valid: 0 to {text.vocab - 1}, the vocabulary")
  if config.llm.prompt < 1:
    raise ValueError(f"config.llm.prompt={config.llm.prompt}; valid: 1 or more")
  if sizes.num_classes:
    raise ValueError(f"config.model.num_classes={sizes.num_classes}: a tower has no head; valid: 0")
  projector = projectors.projector(config.projector.name, FrozenConfigDict(config.projector), text.width)
  return VLM(tower, projector, llm, config.llm.image_token, policy, config.llm.prompt)
