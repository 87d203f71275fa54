"""Training-free methods for a vision-language model, as sites for a share of its image tokens.

  sites = vlm_methods.sites("divprune", 0.1, depth=4, llm_depth=3, cls=False)

Methods at the tower's output and where the language model begins (layer 0) leave the share to all layers of the
language model.  Those inside it (fastv, pdrop, sparsevlm, transprune, and visiondrop, which does half of it at the
output) leave the share behind their last layer only, and save less: compare them by FLOPs, not by the share.

DyMU has the same count for every image here, as every method that is compared at a share; its own counts follow the
image, with reducer="dymu_merge", rate="threshold" and thresholds of `tokred.reducers.tome.batch_threshold`.

A tower without CLS (`cls=False`) is asked for the attention that tokens receive, the mean over all queries, instead of
that which CLS pays.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Sites = dict[str, dict[str, Any]]


class Model(NamedTuple):
  """What a method has to know."""

  keep: float  # share of the image tokens
  depth: int  # blocks of the tower
  llm_depth: int  # layers of the language model
  score: str  # attention that ranks the tower's tokens


def _output(m: Model, reducer: str | tuple[str, ...], keep: Any = None, **options: Any) -> Sites:
  return dict(prune=dict(reducer=reducer, place="output", keep=keep or m.keep, **options))


def _begin(m: Model, reducer: str, **options: Any) -> Sites:
  return dict(prune=dict(stack="llm", reducer=reducer, layers=(0,), place="before", keep=m.keep, **options))


def _inside(m: Model, reducer: str, layers: tuple[int, ...], keep: float, **options: Any) -> Sites:
  """Several layers of a language model, that leave a share all together."""
  shares = tuple(keep ** (i / len(layers)) for i in range(1, len(layers) + 1))
  return dict(cut=dict(stack="llm", reducer=reducer, layers=layers, place="before", keep=shares, of="input", **options))


def _remember(m: Model, layers: tuple[int, ...], **options: Any) -> Sites:
  return dict(memory=dict(reducer="remember", layers=layers, **dict(score=m.score) | options))


def _stages(m: Model, stages: int) -> tuple[int, ...]:
  """Layers at equal distances, as 8, 16 and 24 of 32; not the first."""
  return tuple(sorted({max(1, m.llm_depth * i // (stages + 1)) for i in range(1, stages + 1)}))


def _aim(m: Model) -> Sites:
  times = max(1, math.ceil(-math.log2(m.keep)))  # a bipartite merge takes away half at most
  return _output(m, ("tome",) * times, (m.keep ** (1 / times),) * times, metric="token", plain=True, proportional=False)


def _dymu(m: Model) -> Sites:
  if m.keep < 0.5**m.depth:
    raise ValueError(f"keep={m.keep} for dymu; valid: {0.5**m.depth:.4g} or more, for a block of {m.depth} merges half")
  each = (m.keep ** (1 / m.depth),) * m.depth
  return dict(merge=dict(reducer="tome", layers=tuple(range(m.depth)), keep=each, position="virtual"))


METHODS: dict[str, Callable[[Model], Sites]] = {
  "random": lambda m: _output(m, "topk", score="random", raster=True),
  "pool": lambda m: _output(m, "pool"),
  # At the tower's output
  "fastervlm": lambda m: _output(m, "topk", score=m.score, raster=True),
  "vtc_cls": lambda m: (
    _remember(m, tuple(range(m.depth // 2, m.depth))) | _output(m, "topk", score="memory", raster=True)
  ),
  "visionzip": lambda m: _output(m, "visionzip", score=m.score),
  "visionzip_code": lambda m: _output(m, "visionzip", score=m.score, add=True),
  "holov": lambda m: _output(m, "holov", score=m.score),
  "hiprune": lambda m: _remember(m, (m.depth // 2,), score="column_mean") | _output(m, "hiprune"),
  "scope": lambda m: _output(m, "facility", score=m.score, raster=True),
  "facility": lambda m: _output(m, "facility", raster=True),
  "kmedoids": lambda m: _output(m, "kmedoids"),
  "dpcknn": lambda m: _output(m, "dpcknn", merge=True, neighbours=5),
  "aim": _aim,
  # In its blocks; the language model attends as if nothing had merged
  "dymu": _dymu,
  # Where the language model begins
  "divprune": lambda m: _begin(m, "maxmin", metric="token", start="isolated", raster=True),
  "todre": lambda m: _begin(m, "maxmin", metric="token", start="token_norm", raster=True),
  "idpruner": lambda m: (
    _remember(m, (m.depth - 1,)) | _begin(m, "mmr", score="memory", metric="token", scale="range", raster=True)
  ),
  "mmtok": lambda m: _begin(m, "mmtok"),
  "flashvlm": lambda m: _remember(m, (m.depth - 1,)) | _begin(m, "flashvlm", score="memory"),
  # Inside it
  "fastv": lambda m: _inside(m, "topk", (min(2, m.llm_depth - 1),), m.keep, score="last_attention"),
  "pdrop": lambda m: _inside(m, "topk", _stages(m, 3), m.keep, score="last_attention_ahead", position="reindex"),
  "sparsevlm": lambda m: (
    dict(raters=dict(stack="llm", reducer="remember", layers=(0,), place="before", score="rater", name_of="rater"))
    | _inside(m, "sparsevlm", _stages(m, 3), m.keep)
  ),
  "transprune": lambda m: (
    dict(moves=dict(stack="llm", reducer="remember", layers=tuple(range(m.llm_depth)), score="transition", how="sum"))
    | _inside(m, "topk", _stages(m, 3), m.keep, score="transprune")
  ),
  "visiondrop": lambda m: (
    _output(m, "visionzip", m.keep**0.5, score="column_mean")
    | _inside(m, "visionzip", _stages(m, 2), m.keep**0.5, score="visual_attention", metric="token")
  ),
}


def _share(keep: float | str) -> float:
  try:
    share = float(keep)
  except ValueError:
    share = 0.0
  if not 0.0 < share <= 1.0:
    raise ValueError(f"keep={keep!r}; valid: shares of the image tokens, above 0 up to 1 (without sites)")
  return share


def reductions(model: Any, names: Iterable[str], keeps: Iterable[float | str]) -> dict[str, Any]:
  """A `tokred.model.Reader` with each method at each share, by "method share"; 1.0 is the model without sites."""
  c, keeps, out = model.config, list(keeps), {}
  if not keeps:
    raise ValueError("no keep is given; valid: shares of the image tokens, such as --keep=1.0,0.25")
  known = dict(depth=model.module.tower.shape.depth, llm_depth=c.llm.depth)
  known["cls"] = model.module.tower.shape.has_cls
  for keep in map(_share, keeps):
    for name in names if keep < 1 else ["dense"]:
      out[f"{name} {keep:g}"] = model.with_sites(sites(name, keep, **known) if keep < 1 else {})
  return out


def sites(name: str, keep: float, *, depth: int, llm_depth: int, cls: bool) -> Sites:
  """`config.sites` of a method.

  Args:
    name: of METHODS.
    keep: share of the image tokens, above 0 and below 1.
    depth: blocks of the tower.
    llm_depth: layers of the language model, at least 2.
    cls: whether the tower has a CLS token.

  Raises:
    ValueError: an unknown name, or a share that is none.
  """
  if name not in METHODS:
    raise ValueError(f"method={name!r} is unknown; valid: {', '.join(METHODS)}")
  if not 0.0 < keep < 1.0:
    raise ValueError(f"keep={keep} must be a share of the image tokens, above 0.0 and below 1.0")
  return METHODS[name](Model(keep, depth, llm_depth, "cls_attention" if cls else "column_mean"))
