"""Carries out what `config.sites` asks for: the reducers of a block, and how many tokens each is told to keep."""

from collections.abc import Mapping

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
    spot = self.spot
    if spot.type.training_only and not (train or self.is_initializing()):
      return tokens, {"count": jnp.asarray(tokens.x.shape[1], jnp.float32)}
    keeps = {} if keeps is None else keeps
    options = {option: keeps[key] for option, *_ in spot.anneal if (key := f"{spot.site}.{option}") in keeps}
    reducer = spot.module(**options, name=spot.reducer)
    keep = spot.keep
    if spot.site in keeps:
      keep = keeps[spot.site][spot.index]
    if spot.rate == "learned":
      if mode == "gather":
        raise ValueError(
          f"sites.{spot.site}.rate='learned' has no integer counts yet: call tokred.freeze(model), or use mode='mask'"
        )
      if isinstance(keep, rates.Shares):
        count, survival, share = rates.LearnedShare(rates.SHARES, name="rate")(keep, tokens.x.shape[1])
        rows = rates.Rows(count, tokens.x.shape[1])
        tokens, report = reducer(tokens, rows, train=train, mode=mode, survival=survival if train else None)
        return tokens, report | {"count": count.astype(jnp.float32).mean(), "share": share}
      n = tokens.x.shape[1]
      initial = max(spot.initial - spot.protected, 0)
      count, survival = rates.Learned(spot.candidates, spot.protected, initial, name="rate")(n)
      fewest = jnp.asarray([reducer.fewest(arriving, spot.protected) for arriving in range(n + 1)], jnp.float32)
      count = jnp.maximum(count, fewest[tokens.alive.sum(1)])  # (B,): less is not to be had, and no loss asks for it
      tokens, report = reducer(
        tokens, count.astype(jnp.int32), train=train, mode=mode, survival=survival if train else None
      )
      return tokens, report | {"count": count.mean()}
    if spot.rate == "threshold" and not isinstance(keep, rates.Threshold):
      keep = rates.Threshold(spot.threshold, spot.keep)
    if spot.rate == "learned_threshold":
      keep = rates.LearnedThreshold(spot.threshold, spot.softness, spot.keep, name="rate")
    if mode == "gather" and spot.idle and spot.site not in keeps and not self.is_initializing():
      return tokens, {"count": jnp.asarray(keep, jnp.float32)}  # nothing is ranked, matched or moved
    arrived = tokens
    tokens, report = reducer(arrived, keep, train=train, mode=mode)
    if "kept_share" in report and spot.rate == "scheduled":  # what `spot.wanted` is while the count moves
      free = at_first(arrived) if spot.type.from_input else (arrived.alive & ~arrived.protected).sum(1)
      share = (keep - spot.protected) / jnp.maximum(free, 1)
      report |= {"wanted_share": jnp.minimum(share.mean(), 1.0)}
    if "count" in report:
      return tokens, report
    if isinstance(keep, rates.Rows):
      return tokens, report | {"count": keep.count.astype(jnp.float32).mean()}
    static = spot.rate != "threshold" and "kept_share" not in report and not spot.type.ragged
    count = jnp.asarray(keep, jnp.float32) if static else tokens.mask.astype(jnp.float32).sum(1).mean() / tokens.images
    return tokens, report | {"count": count}


class Reduce(nn.Module):
  """The spots of one block; their parameters live under `reduce/`."""

  spots: tuple[Spot, ...]

  @nn.compact
  def __call__(
    self, tokens: Tokens, place: str, keeps: Mapping[str, Array] | None, *, train: bool, mode: str
  ) -> tuple[Tokens, dict[str, dict[int, Array]]]:
    """Runs the spots of a place; what they report is under "reduce/<site>/<name>", by the spot's index.

    Beside it stands "alive", (B,) int32: tokens of each image that a spot lets through.
    """
    reports = {}
    for spot in self.spots:
      if spot.place == place:
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
