"""Qwen2-VL and Qwen2.5-VL: frames of any size in a prompt; see `nn/vlm.py` for the rest."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tokred import tokens as tk
from tokred.nn import qwen_vision
from tokred.nn.qwen_vision import Frames
from tokred.nn.vlm import VLM
from tokred.tokens import Array, Tokens


class QwenVLM(VLM):
  """As `VLM`; what it calls images are Frames with two leading axes, (B, R, ...), of `anyres.frames`."""

  @nn.nowrap
  def bounds(self, used: np.ndarray, patches: int, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """See VLM; every frame has a count of its own."""
    del patches
    if mode == "gather":
      table = np.arange(used.max() + 1)
      for spot in self.tower.sites.spots:
        table = np.asarray([qwen_vision.share(spot, n) for n in table.tolist()])
      used = table[used]
    return used, used

  @nn.nowrap
  def example(self) -> dict[str, Any]:
    """Arguments of the smallest call, to find the shapes of parameters with."""
    s = self.tower.shape
    patches = np.zeros((s.unit, s.patch_dim), np.float32)
    one = qwen_vision.arrange(patches, [[1, s.merge, s.merge]], s)
    ids = jnp.asarray([[self.image_token, self.image_token ^ 1]], jnp.int32)
    return dict(ids=ids, images=jax.tree.map(lambda a: a[None], one), slot=jnp.zeros((1, 1, 1), jnp.int32))

  def see(
    self, images: Frames, slot: Array, train: bool = False, mode: str = "gather", keeps: Mapping[str, Any] | None = None
  ) -> tuple[Tokens, Array, dict[str, Any]]:
    """See VLM; the four patches of a token have been put together by the tower, and the projector is Qwen's merger."""
    options = {name: value for name, value in (keeps or {}).items() if "." in name}
    if keeps and keeps.keys() - options.keys():
      raise ValueError(f"keeps={sorted(keeps)}: counts of frames of different sizes come from the sites' shares")
    if slot.shape != images.place.shape:
      raise ValueError(f"slot of shape {slot.shape}; valid: {images.place.shape}, as the frames'")
    frames = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), images)
    seen = self.tower(frames, train=train, mode=mode, options=options)
    tokens = self.projector(seen.tokens)
    return tokens, tk.take(slot.reshape(-1, slot.shape[-1]), tokens.position), seen.aux
