"""Alarms: signs in the metrics that learned reduction has collapsed, each with what to try.

Methods that learn what to drop fail in silence: the loss is finite, and the selector has stopped selecting.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from tokred import losses
from tokred.layout import Sites, Spot, walk
from tokred.nn.vit import Output, ViT

PATIENCE = 3  # reports in a row before an alarm is raised: a router that starts at zero has no choice yet
NEARLY = 0.98


class Alarms:
  """Remembers what was seen, so that each alarm is raised once, after `PATIENCE` reports in a row.

  Args:
    sites: of the model that trains.
    mode: in which it trains.
    freeze_step: `config.rates.freeze_step`; behind it training gathers, and selectors are what they shall be.
  """

  def __init__(self, sites: Sites, mode: str = "mask", freeze_step: int = 0):
    self.sites, self.mode, self._seen = sites, mode, dict[str, int]()
    self.frozen = mode == "gather" and freeze_step > 0

  def new(self, metrics: Mapping[str, float]) -> list[str]:
    """The messages that are due after this report of metrics."""
    found = collapsed(self.sites, metrics)
    idle = [name for name, norm in metrics.items() if name.startswith("grad_norm/") and norm == 0]
    found |= {name: untaught(name, self.mode) for name in idle if not self.frozen}
    self._seen = {name: self._seen.get(name, 0) + 1 for name in found}
    return [text for name, text in found.items() if self._seen[name] == PATIENCE]


def collapsed(sites: Sites, metrics: Mapping[str, float]) -> dict[str, str]:
  """What looks collapsed in one report: {name: message}.

  Args:
    sites: of the model that trains.
    metrics: by name; read are `counts/<spot>`, `overlap/<spot>`, `kept/<spot>`, and whether `global_ratio` is a term of
      the loss: it lets single selectors keep all or none, so that those of a site are judged together.
  """
  spots = [spot for spot in sites.spots if f"counts/{spot.label}" in metrics]
  counts = {spot: metrics[f"counts/{spot.label}"] for spot in spots}
  together = "global_ratio" in metrics and "keep_ratio" not in metrics
  selectors: dict[str, list[Spot]] = {}
  for spot in spots:
    decides = spot.rate == "threshold" or (spot.rate == "fixed" and spot.type.decides)
    if decides and spot.keep > spot.protected + 1:
      selectors.setdefault(spot.site if together else spot.label, []).append(spot)
  out = {
    f"selector/{name}": text
    for name, group in selectors.items()
    if (text := selector(name, group, [counts[spot] for spot in group]))
  }
  out |= {f"router/{s.label}": text for s in spots if (text := router(s, metrics.get(f"overlap/{s.label}")))}
  out |= {f"kept/{s.label}": text for s in spots if (text := reconstruction(s, metrics.get(f"kept/{s.label}")))}
  learned = [spot for spot in spots if spot.rate == "learned"]
  reach = arriving(sites, counts) if learned else {}
  out |= {f"rate/{s.label}": text for s in learned if (text := rate(s, counts[s], reach[s], sites.stack.depth))}
  if learned and (text := rates_idle(learned, [counts[spot] for spot in learned])):
    out["rate"] = text
  for site in dict.fromkeys(spot.site for spot in spots if spot.rate == "learned_threshold"):
    group = [spot for spot in spots if spot.site == site]
    if text := thresholds(group, [counts[spot] for spot in group], sites.stack.depth):
      out[f"threshold/{site}"] = text
  return out


def selector(name: str, spots: Sequence[Spot], counts: Sequence[float]) -> str:
  """Selectors that decide by themselves how many stay, and keep all or none; "" where they do not.

  Args:
    name: of the spot, or of the site whose spots are judged together.
    spots: where.
    counts: tokens that each lets through, mean over images, protected ones counted.
  """
  protected, arrive = sum(spot.protected for spot in spots), sum(spot.arriving for spot in spots)
  allowed, free = sum(spot.keep for spot in spots), arrive - protected
  kept, wanted = (sum(counts) - protected) / free, (allowed - protected) / free
  if kept >= NEARLY and wanted < 0.9:
    return (
      f"{name} keeps all its tokens, where {allowed} of {arrive} are wanted; try a larger "
      "config.loss.keep_ratio (global_ratio), a higher learning rate for it (config.optim.multipliers), or a higher "
      "temperature"
    )
  if kept <= min(1 - NEARLY, wanted / 2):
    return (
      f"{name} keeps none of its tokens, where {allowed} of {arrive} are wanted; try a larger "
      "config.loss.keep_ratio (global_ratio), a lower learning rate for it (config.optim.multipliers), "
      "config.optim.clip_groups, or to hold it at the start (config.optim.freeze_until)"
    )
  return ""


def reconstruction(spot: Spot, kept: float | None) -> str:
  """A selector that learns by a loss of its own, and would keep all or none whatever the count; "" otherwise.

  Args:
    spot: where.
    kept: of `selected`; None: not known.
  """
  share = dict(spot.options).get("share") or (spot.keep - spot.protected) / max(spot.arriving - spot.protected, 1)
  if kept is None or min(1 - NEARLY, share / 2) < kept < (NEARLY if share < 0.9 else 2.0):
    return ""
  word, size, other = ("all", "larger", "smaller") if kept >= NEARLY else ("none", "smaller", "larger")
  return (
    f"{spot.label} would keep {word} of its tokens ({kept:.0%}), where {share:.0%} are wanted, so that those it ships "
    f"are next to arbitrary; try a {size} config.sites.{spot.site}.weight, a {other} share, or another learning rate "
    "for it (config.optim.multipliers)"
  )


def router(spot: Spot, overlap: float | None) -> str:
  """A router that takes the same tokens of every image; "" where it does not.

  Args:
    spot: where.
    overlap: of `overlaps`; None: not known.
  """
  share = (spot.keep - spot.protected) / max(spot.arriving - spot.protected, 1)
  if overlap is None or overlap < NEARLY or share > 0.9:
    return ""
  more = ", gate='sigmoid', or config.loss.router=0.01" if hasattr(spot.type, "gate") else ""
  return (
    f"{spot.label} takes the same tokens of every image ({overlap:.0%} in common): its choice does not depend on the "
    "input; try a higher learning rate for it (config.optim.multipliers), less weight decay on it "
    f"(config.optim.no_decay){more}"
  )


def untaught(name: str, mode: str) -> str:
  """A reducer whose parameters have no gradient at all; `name` is that of its norm, `mode` that of training."""
  start = f"{name.removeprefix('grad_norm/')} learns nothing, its gradient is 0: "
  if mode == "gather":
    return start + (
      "config.train.mode='gather' takes tokens away, and who is gone teaches nothing; try mode='mask' (with "
      "config.rates.freeze_step where rates are learned), a term of config.loss for it, or config.optim.freeze"
    )
  return start + (
    "no term of config.loss reads it, and what it decides teaches it nothing; try rate='fixed' (a threshold that is "
    "given has no gradient), a term for it (keep_ratio, recalibration), a layer behind which its tokens are read, or "
    "config.optim.freeze"
  )


def arriving(sites: Sites, counts: Mapping[Spot, float]) -> dict[Spot, float]:
  """Tokens that reach each spot, where so many leave those that are known."""
  reach = {}

  def leave(spots: Sequence[Spot], n: float) -> float:
    for spot in spots:
      reach[spot] = n
      back = spot.type.recovers
      n = spot.module().recovered(n, sites.stack.num_tokens) if back else min(n, counts.get(spot, spot.keep))
    return n

  walk(sites.stack.depth, sites.at, sites.stack.num_tokens, leave)
  return reach


def rate(spot: Spot, count: float, arrive: float, depth: int) -> str:
  """A learned rate that has gone down to its smallest count, or to that of its reducer; "" where it has not.

  In the last block that is no collapse: what stays there is read by nobody but the head.

  Args:
    spot: where.
    count: tokens that it lets through, as many as the reducer can leave at least.
    arrive: tokens that reach it.
    depth: blocks.
  """
  smallest, fewest = spot.protected + spot.candidates[-1], spot.module().fewest(math.ceil(arrive), spot.protected)
  if spot.layer >= depth - 1 or count > max(smallest, fewest):
    return ""
  if fewest > smallest:
    return (
      f"the rate of {spot.label} is at the lower bound of {spot.reducer!r}, {fewest} of {arrive:.0f} tokens: "
      "config.loss.budget cannot move it any more; try a larger config.loss.target, a lower learning rate for rates "
      "(config.optim.multipliers), or more layers for the site"
    )
  return (
    f"the rate of {spot.label} is at its lower bound, {count:.0f} tokens: what comes behind it has nothing left to "
    "decide; try a lower learning rate for rates (config.optim.multipliers), a smaller config.loss.budget, a larger "
    "config.loss.target, or a site that begins later"
  )


def rates_idle(spots: Sequence[Spot], counts: Sequence[float]) -> str:
  """Learned rates that let every token through, all of them; "" where one does not."""
  if any(count < spot.arriving for spot, count in zip(spots, counts, strict=True)):
    return ""
  return (
    f"learned rates are at their upper bound: all {spots[0].arriving} tokens pass everywhere; try a larger "
    "config.loss.budget, a config.loss.target below 1, or a higher learning rate for rates (config.optim.multipliers)"
  )


def thresholds(spots: Sequence[Spot], counts: Sequence[float], depth: int) -> str:
  """Learned thresholds of a site that let every token through, all of them, or one that lets none; "" otherwise.

  Many begin with all.  In the last block none is no collapse, as for `rate`; behind the first there are none to judge.
  """
  site = f"config.sites.{spots[0].site}"
  if all(count >= spot.arriving for spot, count in zip(spots, counts, strict=True)):
    return (
      f"the learned thresholds of {spots[0].site} lie below all scores: all {spots[0].arriving} tokens pass "
      "everywhere; try a larger config.loss.budget, a config.loss.target below 1, a higher learning rate for rates "
      f"(config.optim.multipliers), or {site}.threshold and softness of the size of the scores"
    )
  for spot, count in zip(spots, counts, strict=True):
    if spot.layer < depth - 1 and count - spot.protected <= (1 - NEARLY) * (spot.arriving - spot.protected):
      return (
        f"the learned threshold of {spot.label} lies above all scores: {count:.0f} of {spot.arriving} tokens are "
        "left, and what comes behind it has nothing to decide; try a lower learning rate for rates "
        f"(config.optim.multipliers), a smaller config.loss.budget, a larger config.loss.target, or {site}.threshold "
        "and softness of the size of the scores"
      )
  return ""


def overlaps(module: ViT, output: Output) -> dict[str, jax.Array]:
  """How much of a router's choice two images of the batch have in common, by `overlap/<spot>`.

  With p_j the share of images whose token j is chosen, it is sum p_j^2 / sum p_j over the tokens that had a choice to
  be made: 1 where all images agree, the capacity where they choose independently.  Only for routers that tokens reach
  in the order of the input, and for DyT's dispatchers by the tokens that they rank first.
  """
  out, moved = {}, False
  for spot in module.sites.spots:
    reported = {name: output.aux.get(f"reduce/{spot.site}/{name}", {}).get(spot.index) for name in ("chosen", "first")}
    chosen = reported["first"] if reported["chosen"] is None else reported["chosen"]
    if chosen is not None and not moved and chosen.shape[0] > 1:
      free = output.aux[f"reduce/{spot.site}/free"][spot.index]
      p = jnp.where(free, chosen, False).mean(0, dtype=jnp.float32)
      out[f"overlap/{spot.label}"] = jnp.square(p).sum() / jnp.maximum(p.sum(), 1e-6)
    moved = moved or not module.sites.scoped(spot)
  return out


def selected(module: ViT, output: Output) -> dict[str, jax.Array]:
  """What selectors with a loss of their own would keep, a share, and their error, by `kept/<spot>`, `error/<spot>`."""
  reports = {name: losses.reported(module, output, name) for name in ("kept", "error")}
  return {f"{name}/{s.label}": value.mean() for name, found in reports.items() for s, value in found.items()}
