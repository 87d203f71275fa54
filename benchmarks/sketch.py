"""What a framework costs: ToMe in a page of plain JAX against tokred's, and timm's dense model where torch is there.

    python benchmarks/sketch.py [--rounds=7]

ViT-S/16 at 224 with r = 13, batch 16, float32.  The sketch does what anybody would write down: attention as two matrix
products in (batch, head, token, dim) layout, `top_k` for the best pairs, a one-hot product for the merge.  All take
turns in one process; a ratio is the median over rounds.  Weights are random, which changes no shape and no time.
"""

import argparse
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from inference import timm_dense  # beside this file

import tokred
from tokred import bench

WIDTH, HEADS, DEPTH, PATCH, SIZE, R = 384, 6, 12, 16, 224, 13


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--rounds", type=int, default=7)
  args = parser.parse_args()
  images = np.random.default_rng(0).normal(size=(args.batch_size, SIZE, SIZE, 3)).astype(np.float32)
  params, on_device, calls = weights(), jax.device_put(images), {}
  for name, r in (("sketch, dense", 0), ("sketch, ToMe", R)):
    run = jax.jit(functools.partial(forward, r=r)).lower(params, on_device).compile()
    calls[name] = functools.partial(run, params, on_device)
  site = dict(reducer="tome", layers=tuple(range(DEPTH)), r=R)
  dense = tokred.build(dict(model=dict(variant="S/16"))).init(0)
  reduced = dense.with_sites(dict(merge=site))
  calls["tokred, dense"] = lambda: dense(on_device).logits
  calls["tokred, ToMe"] = lambda: reduced(on_device).logits
  if timm := timm_dense("S/16", images):
    calls["timm, SDPA, dense"] = timm
  times = bench.interleave(calls, rounds=args.rounds)
  against = lambda name, base: statistics.median(
    b / t for t, b in zip(times[name].rounds, times[base].rounds, strict=True)
  )
  print(f"{jax.devices()[0].device_kind}, batch {args.batch_size}; {dense.macs / reduced.macs:.2f} promised")
  for name, timing in times.items():
    line = f"{name:18s} {1e3 * timing.median:8.1f} ms   {against(name, 'tokred, dense'):.2f} of tokred's dense speed"
    own = name.replace("ToMe", "dense")
    print(line + (f", {against(name, own):.2f} of its own" if own != name else ""), flush=True)


def weights() -> dict[str, Any]:
  """Random parameters: a kernel and a bias for each layer, a scale and a bias for each norm."""
  rng = np.random.default_rng(0)
  dense = lambda n, m: (jnp.asarray(rng.normal(0, 0.02, (n, m)), jnp.float32), jnp.zeros(m))
  norm = lambda: (jnp.ones(WIDTH), jnp.zeros(WIDTH))
  block = lambda: dict(
    norm1=norm(), qkv=dense(WIDTH, 3 * WIDTH), proj=dense(WIDTH, WIDTH),
    norm2=norm(), fc1=dense(WIDTH, 4 * WIDTH), fc2=dense(4 * WIDTH, WIDTH),
  )  # fmt: skip
  n = (SIZE // PATCH) ** 2 + 1
  out = dict(patch=dense(3 * PATCH**2, WIDTH), cls=jnp.zeros((1, 1, WIDTH)), position=jnp.zeros((1, n, WIDTH)))
  return out | dict(blocks=[block() for _ in range(DEPTH)], norm=norm(), head=dense(WIDTH, 1000))


def forward(params: dict[str, Any], images: jax.Array, r: int) -> jax.Array:
  """Logits of (B, 224, 224, 3); r: tokens that leave in each block."""
  batch, side = len(images), SIZE // PATCH
  x = images.reshape(batch, side, PATCH, side, PATCH, 3).transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * side, -1)
  x = jnp.concatenate([jnp.broadcast_to(params["cls"], (batch, 1, WIDTH)), linear(x, params["patch"])], axis=1)
  x, size = x + params["position"], jnp.ones((batch, side * side + 1, 1))
  for p in params["blocks"]:
    n = x.shape[1]
    qkv = linear(norm(x, p["norm1"]), p["qkv"]).reshape(batch, n, 3, HEADS, -1).transpose(2, 0, 3, 1, 4)
    q, k, v = qkv[0] * qkv.shape[-1] ** -0.5, qkv[1], qkv[2]
    logits = q @ k.swapaxes(2, 3) + (jnp.log(size)[:, None, None, :, 0] if r else 0.0)
    x = x + linear((jax.nn.softmax(logits) @ v).transpose(0, 2, 1, 3).reshape(batch, n, WIDTH), p["proj"])
    if r:
      x, size = merge(x, size, k.mean(1), min(r, (n - 1) // 2))
    h = linear(norm(x, p["norm2"]), p["fc1"])
    x = x + linear(0.5 * h * (1 + jax.lax.erf(h * np.float32(2**-0.5))), p["fc2"])
  return linear(norm(x[:, 0], params["norm"]), params["head"])


def merge(x: jax.Array, size: jax.Array, metric: jax.Array, r: int) -> tuple[jax.Array, jax.Array]:
  """The r best pairs of even and odd places become one; x (B, N, D), size (B, N, 1), metric (B, N, d)."""
  metric = metric / jnp.linalg.norm(metric, axis=-1, keepdims=True)
  similarity = metric[:, ::2] @ metric[:, 1::2].swapaxes(1, 2)
  similarity = similarity.at[:, 0].set(-jnp.inf)  # CLS
  best, match = similarity.max(-1), similarity.argmax(-1)
  order = jax.lax.top_k(best, best.shape[1])[1]
  goes, stays = order[:, :r], jnp.sort(order[:, r:], axis=1)
  pick = lambda values, index: jnp.take_along_axis(values, index[..., None], axis=1)
  into = jax.nn.one_hot(jnp.take_along_axis(match, goes, axis=1), metric.shape[1] // 2, axis=1, dtype=x.dtype)
  out = []
  for values in (x * size, size):
    even, odd = values[:, ::2], values[:, 1::2]
    out.append(jnp.concatenate([pick(even, stays), odd + into @ pick(even, goes)], axis=1))
  return out[0] / out[1], out[1]


def linear(x: jax.Array, p: tuple[jax.Array, jax.Array]) -> jax.Array:
  return x @ p[0] + p[1]


def norm(x: jax.Array, p: tuple[jax.Array, jax.Array]) -> jax.Array:
  mean = x.mean(-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6) * p[0] + p[1]


if __name__ == "__main__":
  main()
