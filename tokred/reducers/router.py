"""Mixture-of-Depths: tokens that a block does not need go round it.  (Raposo et al., 2024, arXiv:2404.02258)"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from tokred.config import nearest
from tokred.reducers.base import Planner, decided, keep_top, num_kept, register, route
from tokred.tokens import APPENDED, Array, Plan, Tokens, inverse, of_prompt, rank, take

GATES = {
  "double_sigmoid": lambda r: 2 * jax.nn.sigmoid(r),  # 1 at the start: a pretrained block is unchanged
  "sigmoid": jax.nn.sigmoid,
  "tanh": jnp.tanh,
  "raw": lambda r: r,  # the paper's; with it, or tanh, a routed block does nothing until the router has grown
  "softmax": jax.nn.softmax,  # over the living tokens of the whole sequence, also of those that do not go in
}


def agreement(predicted: Array, chosen: Array, free: Array) -> tuple[Array, Array]:
  """Cross-entropy of a predictor with what was chosen, and how often it is right; of each row, (B,) float32.

  Args:
    predicted: (B, N) logits.
    chosen: (B, N) bool.
    free: (B, N) bool, the tokens that had a choice to be made.
  """
  each = optax.sigmoid_binary_cross_entropy(predicted, chosen.astype(jnp.float32))
  mean = lambda value: jnp.where(free, value, 0.0).sum(1) / jnp.maximum(free.sum(1), 1)
  return mean(each), mean((predicted > 0) == chosen)


def by_frame(tokens: Tokens, score: Array, keep: Any, length: int) -> Plan:
  """The plan that keeps the best of each frame, so that no frame waits for a later one.

  Args:
    tokens: N tokens; the free ones are frames, one behind the other, of which the last may be shorter.
    score: (B, N).
    keep: how many stay in all, as `Router.count` has them, the protected counted.
    length: tokens of a frame.
  """
  free, stays = tokens.alive & ~tokens.protected, tokens.alive & tokens.protected
  prompt = of_prompt(tokens) & tokens.protected
  whole, rest = jnp.divmod(free.sum(1, keepdims=True, dtype=jnp.int32), length)
  left = num_kept(tokens, keep) - prompt.sum(1, keepdims=True, dtype=jnp.int32)
  # left = whole share + min(rest, share), solved for the share
  even = (left % (whole + 1) == 0) & (left // (whole + 1) <= rest)
  share = jnp.where(even, left // (whole + 1), (left - rest) // jnp.maximum(whole, 1))
  frame = jnp.where(free, (jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1) // length, score.shape[1])
  falling = inverse(rank(-jax.lax.stop_gradient(jnp.where(free, score, -jnp.inf))))
  order = take(falling, inverse(rank(take(frame, falling))))  # by frame, and by score within
  kept = stays | (free & (inverse(order) - frame * length < share))
  index = jnp.arange(score.shape[1], dtype=jnp.int32)
  return Plan(owner=jnp.where(kept, index, -1), order=decided(tokens, kept), gate=kept | ~tokens.alive)


@register("router")
class Router(Planner):
  """Expert choice: r_i = w x_i, T = top-C of r;  x_i <- x_i + g(r_i) f(X_T)_i for i in T, unchanged elsewhere.

  f is the block's whole update, computed among the chosen only; the gate puts w on the gradient's path.  `keep` is
  the capacity C.  An encoder sees its whole sequence, so top-C decides at inference too.  Where the choice must not
  look at other tokens, a small network learns it from each token alone, by cross-entropy with top-C of r, without a
  gradient to the block.  In training r chooses, in either mode; at inference the network's logits rank the tokens, and
  with rate="threshold", threshold=0.0 each decides for itself.

  In a language model top-C ranks a prompt.  Tokens that are written later cannot wait for the best: they go in where
  their logit (the predictor's, if there is one) is at least `decode_threshold`; `config.loss.router` or the predictor
  makes 0 the right one.  With rate="threshold" the prompt does so, too: train with rate="fixed", which takes the best
  and so explores.  Text goes in unless `text` says that it may go round.  VideoLLM-MoD (Wu et al., 2024,
  arXiv:2408.16730) is `frame` with a gate of the score: the best share of each frame's tokens goes in.
  """

  needs: ClassVar[tuple[str, ...]] = ()
  places: ClassVar[tuple[str, ...]] = ("around", "mlp")
  stacks: ClassVar[tuple[str, ...]] = ("encoder", "llm")
  samples: ClassVar[bool] = False
  decodes: ClassVar[bool] = True

  gate: str = "double_sigmoid"  # double_sigmoid, sigmoid, tanh, raw, softmax (of an encoder)
  predictor: float = 0.0  # weight of its loss; above 0, it decides at inference
  text: bool = False  # llm: text may go round, too, and `keep` is a share of all tokens
  frame: int = 0  # llm: visual tokens of a frame, of which `keep` is a share; 0: of the whole prompt
  decode_threshold: float = 0.0  # llm: the smallest logit with which a token that is written goes in

  def fewest(self, n: int, protected: int) -> int:
    return protected + 1

  def count(self, keep: float, n: int, protected: int, source: int) -> int:
    if not self.frame:
      return super().count(keep, n, protected, source)
    frames, rest = divmod(n - protected, self.frame)
    share = math.ceil(keep * self.frame)
    return frames * share + min(rest, share) + protected

  def needed(self) -> tuple[str, ...]:
    if self.gate not in GATES:
      raise ValueError(f"gate={self.gate!r} is not a gate; {nearest(self.gate, GATES)}")
    if self.frame and self.text:
      raise ValueError("text=True: frames are of visual tokens only; valid: False, or frame=0")
    return ()

  def macs(self, n: float, left: float, width: int, num_heads: int) -> float:
    return n * width

  @nn.compact
  def plan(self, tokens: Tokens, keep: Any, *, train: bool) -> tuple[Plan, dict[str, Array]]:
    if self.gate == "softmax" and APPENDED in tokens.feats:
      raise ValueError(
        "gate='softmax' weighs all tokens of a sequence against each other, and a language model does not know the "
        f"next ones; valid: {', '.join(name for name in GATES if name != 'softmax')}"
      )
    start = nn.initializers.normal(0.02) if self.gate in ("raw", "tanh") else nn.initializers.zeros
    w = self.param("kernel", start, (tokens.x.shape[-1],), jnp.float32)
    x = jnp.where(tokens.alive[..., None], tokens.x, 0).astype(jnp.float32)
    logits = jnp.einsum("bnd,d->bn", x, w, precision="highest")
    free, report = tokens.alive & ~tokens.protected, {}

    def best(score: Array) -> Plan:
      if self.frame:
        return by_frame(tokens, score, keep, self.frame)
      if train:  # the whole text is there, and the best of it are taken
        return keep_top(tokens, score, keep)
      return route(tokens, score, keep, self.decode_threshold)

    score, plan = logits, best(logits)
    if self.predictor:
      h = nn.gelu(nn.Dense(max(x.shape[-1] // 4, 1), name="predictor_in")(jax.lax.stop_gradient(x)))
      predicted = nn.Dense(1, name="predictor_out")(h)[..., 0]
      loss, report["predictor_accuracy"] = agreement(predicted, plan.owner >= 0, free)
      report["loss_predictor"] = self.predictor * loss
      if not train:
        score, plan = predicted, best(predicted)
    # The auxiliary loss of the paper: the logit learns to tell whether top-C will take the token.
    report |= {"score": score, "chosen": plan.owner >= 0, "free": free}
    weighed = jnp.where(tokens.alive, logits, jnp.finfo(jnp.float32).min) if self.gate == "softmax" else logits
    return plan, report | {"update_weight": GATES[self.gate](weighed)}
