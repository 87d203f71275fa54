"""Speed of reduced models against what their FLOPs promise, and of the dense one against timm's where torch is there.

    python benchmarks/inference.py [--variant=S/16] [--batch_size=16] [--rounds=25]
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/inference.py

All models take turns in one process (tokred.bench); a ratio is the median over rounds of two times of the same round.
`promised` is the ratio of multiply-adds, as papers count them.  A batch is spread over all devices; the second command
makes a device of each of two cores, so that no core waits for the other before the logits are there.  `first tokens`
has ToMe's counts and neither looks nor merges: what is left of the promise where choosing costs nothing.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import tokred
from tokred import bench, sharding
from tokred.reducers import diffrate

EVERY = tuple(range(12))


@tokred.register("first")
class First(tokred.Reducer):
  """Keeps those who stand first; in gather mode alone."""

  def __call__(self, tokens: Any, keep: int, *, train: bool, mode: str) -> tuple[Any, dict[str, Any]]:
    cut = lambda leaf: leaf[:, :keep]
    own = dict(x=cut(tokens.x), mask=cut(tokens.mask), size=cut(tokens.size), position=cut(tokens.position))
    return tokens.replace(**own, protected=cut(tokens.protected), feats={}), {}


SITES: dict[str, dict[str, Any]] = {
  "dense": {},
  "ToMe r=13": dict(merge=dict(reducer="tome", layers=EVERY, r=13)),
  "first tokens": dict(merge=dict(reducer="first", layers=EVERY, place="attn", r=13)),
  "DiffRate 2.3G": dict(rates=diffrate.site(*diffrate.SCHEDULES["deit_s_2.3g"])),
  "DiffRate 2.9G": dict(rates=diffrate.site(*diffrate.SCHEDULES["deit_s_2.9g"])),
  "EViT keep 0.7": dict(prune=dict(reducer="topk", layers=(3, 6, 9), keep=0.7, fuse=True)),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--variant", default="S/16", choices=("Ti/16", "S/16", "B/16"))  # the schedules are of these
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--rounds", type=int, default=25)
  args = parser.parse_args()
  size = (224, 224)
  images = np.random.default_rng(0).normal(size=(args.batch_size, *size, 3)).astype(np.float32)
  build = lambda sites: tokred.build(dict(model=dict(variant=args.variant, image_size=size), sites=sites))
  mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1))
  params = build({}).init().params  # one copy for all: no model finds its weights pushed out of the cache by another's
  params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  built = {name: dataclasses.replace(build(sites), params=params) for name, sites in SITES.items()}
  on_device = jax.device_put(images, sharding.batch_sharding(mesh))
  calls: dict[str, Callable[[], Any]] = {
    name: lambda model=model: model(on_device).logits for name, model in built.items()
  }
  if timm := timm_dense(args.variant, images):
    calls["timm, SDPA"] = timm
  times = bench.interleave(calls, rounds=args.rounds, min_seconds=0.25)  # short turns: the machine drifts
  dense, macs = times["dense"].rounds, built["dense"].macs
  where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  print(f"{where}, batch {args.batch_size}, float32, {args.rounds} rounds")
  print("| model | ms | GMACs | promised | measured | measured / promised |\n|---|---|---|---|---|---|")
  for name, timing in times.items():
    ratio = statistics.median(d / t for d, t in zip(dense, timing.rounds, strict=True))
    line = f"| {name} | {1e3 * timing.median:.1f} | "
    if name in built:
      promised = macs / built[name].macs
      line += f"{built[name].macs / 1e9:.3f} | {promised:.2f} | {ratio:.2f} | {ratio / promised:.2f} |"
    else:
      line += f"{macs / 1e9:.3f} | | {ratio:.2f} | |"
    print(line, flush=True)


def timm_dense(variant: str, images: np.ndarray) -> Callable[[], Any] | None:
  """timm's dense model of the same size with fused attention, or None where torch or timm is missing."""
  try:
    import timm
    import torch
  except ImportError:
    return None
  size, patch = variant.split("/")
  name = {"Ti": "tiny", "S": "small", "B": "base", "L": "large"}[size]
  model = timm.create_model(f"vit_{name}_patch{patch}_224", img_size=images.shape[1]).eval()
  nchw = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

  def run() -> None:
    with torch.inference_mode():
      model(nchw)

  return run


if __name__ == "__main__":
  main()
