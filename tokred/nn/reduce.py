"""Carries out what `config.sites` asks for: the reducers of a block, and how many tokens each is told to keep."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from tokred import rates
from tokred.layout import Spot
from tokred.tokens import Array, Tokens, at_first


class Step(nn.Module):
  """One spot: asks the rate how many, and the reducer who."""

  spot: Spot

  @nn.compact
  def __call__(
    self, tokens: Tokens, keeps: Mapping[str, Array] | None, *, train: bool, mode: str
  ) -> tuple[Tokens, dict[str, Array]]:
    spot, keeps = self.spot, keeps or {}
    if spot.type.training_only and not (train or self.is_initializing()):
      return tokens, {"count": jnp.asarray(tokens.x.shape[1], jnp.float32)}
    options = {option: keeps[key] for option, *_ in spot.anneal if (key := f"{spot.site}.{option}") in keeps}
    reducer = spot.module(**options, name=spot.reducer)
    told = keeps[spot.site][spot.index] if spot.site in keeps else None
    if spot.rate == "learned":
      keep, survival, report = self._learned(reducer, told, tokens, mode)
      tokens, own = reducer(tokens, keep, train=train, mode=mode, survival=survival if train else None)
      return tokens, own | report
    if mode == "gather" and spot.idle and told is None and not self.is_initializing():
      return tokens, {"count": jnp.asarray(spot.keep, jnp.float32)}  # nothing is ranked, matched or moved
    keep = self._keep(told)
    arrived = tokens
    tokens, report = reducer(arrived, keep, train=train, mode=mode)
    if "kept_share" in report and spot.rate == "scheduled":  # what `spot.wanted` is while the count moves
      free = at_first(arrived) if spot.type.from_input else (arrived.alive & ~arrived.protected).sum(1)
      share = (keep - spot.protected) / jnp.maximum(free, 1)
      report |= {"wanted_share": jnp.minimum(share.mean(), 1.0)}
    count = report["count"].mean() if "count" in report else self._count(keep, tokens, report)
    return tokens, report | {"count": count}

  def _learned(self, reducer: nn.Module, told: Any, tokens: Tokens, mode: str) -> tuple[Any, Array, dict[str, Array]]:
    """Counts of a learned rate, its view of each rank, and what it reports."""
    spot, n = self.spot, tokens.x.shape[1]
    if mode == "gather":
      raise ValueError(
        f"sites.{spot.site}.rate='learned' has no integer counts yet: call tokred.freeze(model), or use mode='mask'"
      )
    if isinstance(told, rates.Shares):
      count, survival, share = rates.LearnedShare(rates.SHARES, name="rate")(told, n)
      return rates.Rows(count, n), survival, {"count": count.astype(jnp.float32).mean(), "share": share}
    initial = max(spot.initial - spot.protected, 0)
    count, survival = rates.Learned(spot.candidates, spot.protected, initial, name="rate")(n)
    fewest = jnp.asarray([reducer.fewest(arriving, spot.protected) for arriving in range(n + 1)], jnp.float32)
    least = fewest[tokens.alive.sum(1)]  # (B,): less is not to be had, and no loss asks for it
    count = jnp.where(count < least, least, count)  # jnp.maximum would halve the slope where they are equal
    return count.astype(jnp.int32), survival, {"count": count.mean()}

  def _keep(self, told: Any) -> Any:
    """What the reducer is told, by all rates but the learned one."""
    spot, keep = self.spot, self.spot.keep if told is None else told
    if spot.rate == "learned_threshold":
      return rates.LearnedThreshold(spot.threshold, spot.softness, spot.keep, name="rate")
    if spot.rate == "threshold" and not isinstance(keep, rates.Threshold):
      return rates.Threshold(spot.threshold, spot.keep)
    return keep

  def _count(self, keep: Any, tokens: Tokens, report: Mapping[str, Array]) -> Array:
    """Tokens that are left of an image, in the mean of the batch."""
    if isinstance(keep, rates.Rows):
      return keep.count.astype(jnp.float32).mean()
    if not self.spot.ragged and "kept_share" not in report:
      return jnp.asarray(keep, jnp.float32)
    return tokens.mask.astype(jnp.float32).sum(1).mean() / tokens.images


class Reduce(nn.Module):
  """The spots of one block; their parameters live under `reduce/`."""

  spots: tuple[Spot, ...]

  @nn.compact
  def __call__(
    self,
    tokens: Tokens,
    place: str,
    keeps: Mapping[str, Array] | None,
    *,
    train: bool,
    mode: str,
    part: slice = slice(None),
  ) -> tuple[Tokens, dict[str, dict[int, Array]]]:
    """Runs the spots of a place, or `part` of them; what they report is under "reduce/<site>/<name>", by spot's index.

    Beside it stands "alive", (B,) int32: tokens of each image that a spot lets through.
    """
    reports = {}
    for spot in [spot for spot in self.spots if spot.place == place][part]:
      try:
        tokens, report = Step(spot, name=spot.child)(tokens, keeps, train=train, mode=mode)
      except ValueError as error:  # what depends on shapes shows only here, and a reducer does not know its site
        if str(error).startswith("sites."):
          raise
        raise ValueError(f"sites.{spot.site}, layer {spot.layer}: {error}") from error
      report |= {"alive": _alive(tokens, spot)}
      for name, value in report.items():
        if name == "plan" and place != "ahead":
          continue
        reports.setdefault(f"reduce/{spot.site}/{name}", {})[spot.index] = value
    return tokens, reports


def _alive(tokens: Tokens, spot: Spot) -> Array:
  """(B,) int32: tokens of each image, also where images share a row."""
  segment = tokens.feats.get("state/segment") if spot.type.packs else None
  if segment is None:
    return tokens.alive.sum(1, dtype=jnp.int32)
  image = jnp.arange(tokens.images)[:, None]
  return (segment[:, None] == image).sum(-1, dtype=jnp.int32).reshape(-1)
