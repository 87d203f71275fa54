"""Terms of the training loss: pure functions, each with its paper, and the dict that a training step adds up."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from tokred import cost, rates
from tokred.layout import Spot, walk
from tokred.nn.vit import Output, ViT
from tokred.tokens import Array, Tokens, take


def cross_entropy(logits: Array, target: Array, label_smoothing: float = 0.0) -> Array:
  """Mean over the batch of the cross-entropy to soft targets.

  Args:
    logits: (B, classes).
    target: (B, classes) probabilities.
    label_smoothing: share of the target that is spread over all classes.
  """
  return optax.softmax_cross_entropy(logits, optax.smooth_labels(target, label_smoothing)).mean()


def distill_logits(
  logits: Array, teacher: Array, temperature: float = 1.0, counted: Array | None = None, number: Array | None = None
) -> Array:
  """KL(teacher || student) tau^2, mean over the batch, or over some.  (Hinton et al., 2015, arXiv:1503.02531)

  Args:
    logits: (B, classes), or (B, S, vocab).
    teacher: likewise.
    temperature: tau.
    counted: (B, S) bool; None: all.
    number: see `mean_of`.
  """
  log_q = jax.nn.log_softmax(logits / temperature)
  log_p = jax.nn.log_softmax(teacher / temperature)
  each = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * temperature**2
  return each.mean() if counted is None else mean_of(each, counted, number)


def answers(
  logits: Array, ids: Array, answer: Array, label_smoothing: float = 0.0, number: Array | None = None
) -> Array:
  """Cross-entropy of the tokens of answers, each told from what stands before it; their mean over the batch.

  Args:
    logits: (B, S, vocab), of what follows each token.
    ids: (B, S) int32.
    answer: (B, S) bool, the tokens that the model shall have written.
    label_smoothing: share of the target that is spread over the vocabulary.
    number: see `mean_of`.
  """
  target = optax.smooth_labels(jax.nn.one_hot(ids[:, 1:], logits.shape[-1]), label_smoothing)
  return mean_of(optax.softmax_cross_entropy(logits[:, :-1], target), answer[:, 1:], number)


def mean_of(values: Array, counted: Array, number: Array | None = None) -> Array:
  """Mean of the values that are counted, 0 where there are none; values and counted (B, S).

  `number` replaces how many are counted, where these are a part of those that the mean is over.
  """
  number = jnp.maximum(counted.sum(), 1) if number is None else number
  return jnp.where(counted, values, 0.0).sum() / number


def distill_tokens(tokens: Tokens, teacher: Array, kl: bool = False) -> Array:
  """Distance of the survivors to the teacher's tokens at their original positions.  (DynamicViT)

  Args:
    tokens: of the student after the final norm; a survivor of a merge answers for its own place only.
    teacher: (B, S, D) the teacher's tokens after its final norm.
    kl: KL(teacher || student) of the softmax over channels, as for LV-ViT, instead of the mean squared distance.

  Returns:
    Mean over surviving unprotected tokens of the batch (and channels); 0 if none survives.
  """
  wanted = take(teacher, tokens.position, "gather").astype(jnp.float32)
  kept = (tokens.alive & ~tokens.protected).astype(jnp.float32)
  x = tokens.x.astype(jnp.float32)
  if kl:
    log_p, log_q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(x)
    distance = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
  else:
    distance = jnp.square(x - wanted).mean(-1)
  return jnp.sum(distance * kept) / jnp.maximum(kept.sum(), 1.0)


def keep_ratio(shares: Sequence[Array], targets: Sequence[float], dynamic: bool = False) -> Array:
  """Mean over selectors and batch of (share kept - target)^2.  (Rao et al., 2021, DynamicViT, arXiv:2106.02034)

  Args:
    shares: one (B,) share of the input's tokens for each selector.
    targets: one number for each.
    dynamic: of the batch's mean share, so that images may differ; theirs of the same name.
  """
  shares = [share.mean() for share in shares] if dynamic else shares
  return sum(jnp.square(s - t).mean() for s, t in zip(shares, targets, strict=True)) / len(shares)


def budget(macs: Array, dense: float, target: float) -> Array:
  """(F / F_dense - target)^2, F in any unit.  (Chen et al., 2023, DiffRate, arXiv:2305.17997)

  The paper squares the gap in GMACs with weight 5; for DeiT-S (4.6 GMACs) that is a weight of 106 here.
  """
  return jnp.square(macs / dense - target)


def consistency(features: Array, full: Array, sure: Array | None = None) -> Array:
  """Squared distance of the pooled feature to that of a pass with more tokens, which learns nothing from it.

  (Lee et al., 2024, MCTF, arXiv:2403.10030)

  Args:
    features: (B, D).
    full: (B, D).
    sure: (B,) bool, the images that count; None: all.  If none does, the distance is 0.
  """
  each = jnp.square(features - jax.lax.stop_gradient(full)).mean(-1)
  if sure is None:
    return each.mean()
  return jnp.sum(each * sure) / jnp.maximum(sure.sum(), 1)


def global_ratio(shares: Sequence[Array], targets: Sequence[float]) -> Array:
  """(Mean share over selectors and batch - mean target)^2: layers may specialise.  (DyT, arXiv:2403.11808)"""
  return jnp.square(jnp.stack(shares).mean() - sum(targets) / len(targets))


def min_ratio(shares: Sequence[Array], least: float) -> Array:
  """Sum over selectors of relu(least - share kept), mean over the batch: no layer goes without.  (DyT)

  The authors sum over the images, too: their weight is ours over the batch size.
  """
  return sum((jax.nn.relu(least - share).mean() for share in shares), jnp.zeros(()))


def halting_prior(halting: Sequence[Array], running: Sequence[Array], depth: float) -> Array:
  """Distance of mean halting probabilities q from a prior around a depth: 1/L sum_l p_l log(p_l / q_l).

  (Yin et al., 2022, A-ViT, arXiv:2112.07658)  q adds up to 1 and is clipped to [0.01, 0.99]; p is N(depth, 1), scaled
  so that the blocks before the depth have 0.98.  All of p is more than 1, as in the authors' code.

  Args:
    halting: (B, N) of each block, of the last one too, although it halts whatever is left.
    running: (B, N) float32 of each block, 1 for tokens that run through it.  The authors average over those that have
      halted too, which hold what a block makes of zeros.
    depth: centre of the prior, counted from 0.
  """
  mean = jnp.stack([mean_of(h, runs > 0) for h, runs in zip(halting, running, strict=True)])
  log_q = jnp.log(jnp.clip(mean / mean.sum(), 0.01, 0.99))
  before = max(1, math.ceil(depth - 1e-6))
  log_p = -0.5 * jnp.square(jnp.arange(len(halting)) - depth)
  log_p = log_p - jax.nn.logsumexp(log_p[:before]) + math.log(0.98)
  return jnp.mean(jnp.exp(log_p) * (log_p - log_q))


def router(logits: Sequence[Array], chosen: Sequence[Array], free: Sequence[Array]) -> Array:
  """Binary cross-entropy of each router's logits against its own choice.  (Raposo et al., 2024, arXiv:2404.02258)

  Args:
    logits: (B, N) for each router.
    chosen: (B, N) bool, what top-C took.
    free: (B, N) bool, the tokens that had a choice to be made.
  """
  total = 0.0
  for r, c, f in zip(logits, chosen, free, strict=True):
    each = optax.sigmoid_binary_cross_entropy(r, c.astype(jnp.float32))
    total = total + jnp.where(f, each, 0.0).sum() / jnp.maximum(f.sum(), 1)
  return total / len(logits)


def recalibration(recovered: Sequence[Array], teacher: Sequence[Array]) -> Array:
  """Mean over layers of the squared distance of recovered tokens to the teacher's.  (Zong et al., 2022, SiT)

  The authors' weight is 2.

  Args:
    recovered: (B, P, D) for each layer: the patches as they are before the first site, behind it what a `sit_reverse`
      reports.
    teacher: (B, P, D) for each, the patches that leave the same block of the dense teacher; they learn nothing.
  """
  pairs = zip(recovered, teacher, strict=True)
  square = lambda r, t: jnp.square(r.astype(jnp.float32) - jax.lax.stop_gradient(t).astype(jnp.float32)).mean()
  return sum(square(r, t) for r, t in pairs) / len(recovered)


def counts(module: ViT, output: Output) -> dict[str, dict[int, Array]]:
  """Tokens out by site and spot as the forward pass reported them; of a language model's learned rates their shares."""
  out = {spot.site: output.aux[f"reduce/{spot.site}/count"] for spot in module.sites.spots}
  return out | {spot.site: output.aux[f"reduce/{spot.site}/share"] for spot in shared(module)}


def shared(module: Any) -> list[Spot]:
  """Spots of a language model whose rate, a share of its visual tokens, is learned."""
  return [spot for spot in module.spots if spot.rate == "learned" and spot not in module.sites.spots]


def macs(module: ViT, output: Output) -> Any:
  """Multiply-adds of the pass, differentiable in learned counts."""
  return cost.of(module, counts=counts(module, output))


def dense_macs(module: ViT) -> float:
  """Multiply-adds of the same model without sites."""
  return float(cost.of(module.dense()))


UNITS = ("fraction", "gflops", "gmacs", "tokens")


def spent(module: ViT, unit: str, counts: Mapping[str, Any] | None = None) -> Any:
  """What a pass costs in a unit of `config.loss.target_unit`, differentiable in the counts.

  Args:
    module: the model.
    unit: "fraction" of the dense multiply-adds; "gmacs", which papers call GFLOPs; "gflops" as `Model.flops` counts;
      "tokens": the mean over blocks of the tokens that leave them, protected ones counted.
    counts: tokens out by site and spot, numbers or traced scalars; None: as fixed.
  """
  if unit == "tokens":
    s = getattr(module, "tower", module).shape
    leaving = module.sites.profile(s.width, s.num_heads, counts).leaving
    return sum(leaving) / len(leaving)
  price = cost.flops if unit == "gflops" else cost.macs
  return cost.of(module, price, counts) / (dense_macs(module) if unit == "fraction" else 1e9)


def dense(module: ViT, unit: str) -> float:
  """What the same model without sites costs in a unit."""
  return float(spent(module.dense(), unit))


def reachable(module: ViT, unit: str) -> tuple[float, float]:
  """What a model with learned rates costs in a unit with all of them at their lowest, and at their highest."""

  def at(lowest: bool) -> float:
    kept: dict[str, dict[int, int]] = {}

    def leave(spots: Sequence[Spot], n: int) -> int:
      for spot in spots:
        count = spot.keep if spot.rate != "learned" else n
        if lowest and spot.rate == "learned":
          count = max(min(spot.candidates) + spot.protected, spot.module().fewest(n, spot.protected))
        elif lowest and spot.rate == "learned_threshold":
          count = max(spot.protected, 1)
        n = spot.module().recovered(n, module.sites.stack.num_tokens) if spot.type.recovers else min(n, count)
        kept.setdefault(spot.site, {})[spot.index] = n
      return n

    walk(module.sites.stack.depth, module.sites.at, module.sites.stack.num_tokens, leave)
    for spot in shared(module):
      kept.setdefault(spot.site, {})[spot.index] = 1 / rates.SHARES if lowest else 1.0
    return float(spent(module, unit, kept))

  return at(True), at(False)


def terms(
  config: ConfigDict, module: ViT, output: Output, target: Array, teacher: Output | None, full: Output | None
) -> dict[str, Array]:
  """The terms whose weight is not 0, unweighted, by the names of their fields in `config.loss`.

  Args:
    config: `config.loss`.
    module: what produced `output`.
    output: of the student.
    target: (B, classes) probabilities.
    teacher: of the dense teacher, where a distillation weight is not 0.
    full: of the less reduced pass, where a weight that reads it is not 0.
  """
  out = {"cross_entropy": cross_entropy(output.logits, target, config.label_smoothing)} | reports(
    config, module, output
  )
  if config.distill_logits:
    out["distill_logits"] = distill_logits(output.logits, teacher.logits, config.temperature)
  if config.distill_tokens:
    out["distill_tokens"] = distill_tokens(output.tokens, teacher.tokens.x)
  if config.distill_tokens_kl:
    out["distill_tokens_kl"] = distill_tokens(output.tokens, teacher.tokens.x, kl=True)
  if config.recalibration:
    recovered, s = reported(module, output, "recovered"), module.shape
    leaving = lambda out, layer: out.aux[f"tokens/{layer}"][:, s.num_prefix_tokens :]
    taught = [leaving(teacher, spot.layer % s.depth) for spot in recovered]
    for (spot, ours), theirs in zip(recovered.items(), taught, strict=True):
      if ours.shape[1] != theirs.shape[1]:
        raise ValueError(
          f"sites.{spot.site}.patches={ours.shape[1]}, but the grid has {theirs.shape[1]}: set it to that or drop it"
        )
    whole = range(min(spot.layer % s.depth for spot in module.sites.spots))  # blocks that all tokens leave as they are
    ours = [leaving(output, layer) for layer in whole] + list(recovered.values())
    out["recalibration"] = recalibration(ours, [leaving(teacher, layer) for layer in whole] + taught)
  if config.consistency:
    sure = jnp.sum(jax.nn.softmax(output.logits) * (target > 0), -1) > config.confidence if config.confidence else None
    out["consistency"] = consistency(output.features, full.features, sure)
  if config.full_cross_entropy:
    out["full_cross_entropy"] = cross_entropy(full.logits, target, config.label_smoothing)
  if config.full_distill:
    out["full_distill"] = distill_logits(output.logits, jax.lax.stop_gradient(full.logits))
  return out


def reports(config: ConfigDict, module: Any, output: Any) -> dict[str, Array]:
  """Those of the terms that read what reducers report and nothing else, of a ViT or of a VLM."""
  out, named = {}, lambda name: reported(module, output, name)
  each = functools.partial(keep_ratio, dynamic=config.dynamic)
  for name, ratio in (("keep_ratio", each), ("global_ratio", global_ratio)):
    if config[name]:
      shares, moving = named("kept_share"), named("wanted_share")
      targets = [moving.get(spot, spot.wanted) for spot in shares]
      out[name] = ratio(list(shares.values()), targets) if shares else jnp.zeros(())
  if config.min_ratio:
    out["min_ratio"] = min_ratio(list(named("kept_share").values()), config.min_share)
  if config.budget:
    if config.target_unit == "fraction":
      out["budget"] = budget(macs(module, output), dense_macs(module), config.target)
    else:  # as shares of the dense model too, so that the weight means the same in every unit
      whole = dense(module, config.target_unit)
      used = spent(module, config.target_unit, counts(module, output))
      out["budget"] = budget(used, whole, config.target / whole)
  if config.ponder:
    ponder = max(named("ponder").items(), key=lambda item: item[0].layer)[1]
    out["ponder"] = ponder.mean()
  if config.halting_prior:
    halting, running = named("halting"), named("depth")
    layers = sorted(halting, key=lambda spot: spot.layer)
    values = ([each[spot] for spot in layers] for each in (halting, running))
    out["halting_prior"] = halting_prior(*values, config.halting_depth * len(layers))
  if config.router:
    score, chosen, free = (named(name) for name in ("score", "chosen", "free"))
    out["router"] = router([score[spot] for spot in chosen], list(chosen.values()), list(free.values()))
  for name in sorted({name for name in output.aux if name.split("/")[-1].startswith("loss")}):
    out[name] = sum(jnp.mean(value) for value in output.aux[name].values())
  return out


def reported(module: ViT, output: Output, name: str) -> dict[Spot, Array]:
  """What each spot reported under a name, for those that did."""
  found = {spot: output.aux.get(f"reduce/{spot.site}/{name}", {}).get(spot.index) for spot in module.spots}
  return {spot: value for spot, value in found.items() if value is not None}


def total(config: ConfigDict, named: Mapping[str, Array]) -> Array:
  """Sum of the terms with their weights from `config.loss`; what reducers report as loss has its weight already."""
  return sum(config.get(name, 1.0) * value for name, value in named.items())
