"""Rotary positions: on a grid of patches, and of a sequence."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tokred.config import nearest
from tokred.tokens import Array


def rope2d(grid: tuple[int, int], num_prefix_tokens: int, dim: int, theta: float) -> np.ndarray:
  """Angles by which queries and keys are turned: (tokens, dim) float32, zero for prefix tokens.

  2 pi c / theta^(4 i / dim) for the centre c of a patch in [-1, 1]: rows, then columns, then both again for the other
  half of the channels.  (Simeoni et al., 2025, DINOv3, arXiv:2508.10104)
  """
  centres = [(np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1 for n in grid]
  frequency = theta ** -np.arange(0, 1, 4 / dim, dtype=np.float32)
  angles = [2 * np.pi * axis.reshape(-1, 1) * frequency for axis in np.meshgrid(*centres, indexing="ij")]
  angles = np.tile(np.concatenate(angles, axis=1), 2)
  return np.concatenate([np.zeros((num_prefix_tokens, dim)), angles]).astype(np.float32)


def turn(x: Array, angles: Array, position: Array) -> Array:
  """Rotary positions: channels i and i + d / 2 of each head are turned together.  (Su et al., 2021, arXiv:2104.09864)

  Args:
    x: (B, H, N, d) queries or keys.
    angles: (S, d) float32, of every source position.
    position: (B, N) int32; a token keeps the position it had, whoever left.
  """
  angle = jnp.take(angles, position, axis=0, mode="clip")[:, None]
  first, second = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return (x * jnp.cos(angle) + turned * jnp.sin(angle)).astype(x.dtype)


ROPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions of a language model: which frequencies its heads turn with."""

  theta: float = 10_000.0
  kind: str = "default"  # default, linear, llama3
  factor: float = 1.0  # linear, llama3: by which low frequencies are divided
  low: float = 1.0  # llama3: turns over the original length below which a frequency is low,
  high: float = 4.0  # and above which it stays
  original: int = 8192  # llama3: length before it was stretched
  sections: tuple[int, ...] = ()  # channels (of half a head) that follow each axis of the position; (): one axis

  def frequencies(self, dim: int) -> np.ndarray:
    """Radians per position: (dim / 2,) float32.  (Su et al., 2021, arXiv:2104.09864; Llama 3.1, arXiv:2407.21783)

    theta^(-2 i / dim); "llama3" divides those that turn less than `low` times over the original length by `factor`,
    leaves those that turn more than `high` times, and goes linearly between in the number of turns.

    Raises:
      ValueError: an unknown kind, or sections that do not add up to dim / 2.
    """
    if self.kind not in ROPES:
      raise ValueError(f"rope_type={self.kind!r} is not supported; {nearest(self.kind, ROPES)}")
    if self.sections and sum(self.sections) != dim // 2:
      raise ValueError(f"mrope_section={list(self.sections)} must add up to {dim // 2}, half of head_dim={dim}")
    plain = 1.0 / self.theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    if self.kind == "default":
      return plain.astype(np.float32)
    if self.kind == "linear":
      return (plain / self.factor).astype(np.float32)
    turns = self.original * plain / (2 * np.pi)
    share = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
    return ((1 - share) * plain / self.factor + share * plain).astype(np.float32)

  def angles(self, position: Array, dim: int) -> Array:
    """Angles of tokens: (B, N) or (B, N, axis) int32 positions to (B, N, dim / 2) float32.

    With several axes (time, height, width), each section of channels follows its own.  (Wang et al., 2024, Qwen2-VL,
    arXiv:2409.12191)
    """
    place = position.astype(jnp.float32)
    if position.ndim == 3:
      axis = np.repeat(np.arange(len(self.sections)), self.sections)
      place = jnp.take(place, axis, axis=2) if self.sections else place[..., :1]
    else:
      place = place[..., None]
    return place * self.frequencies(dim)


def last_position(position: Array, there: Array) -> Array:
  """The largest position over all tokens and axes; decoding goes on behind it, on all axes at once, as M-RoPE does.

  Args:
    position: (B, N[, axis]) int32.
    there: (B, N) bool, which tokens count.

  Returns:
    (B,) int32; -1 in a row without tokens.
  """
  there = there.reshape(*there.shape, *(1,) * (position.ndim - 2))
  return jnp.where(there, position, -1).max(tuple(range(1, position.ndim))).astype(jnp.int32)


def rotate(x: Array, angle: Array) -> Array:
  """Channels i and i + d / 2 of each head turned together, in float32.

  Args:
    x: (B, H, N, d) queries or keys.
    angle: (B, N, d / 2) float32.
  """
  cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
