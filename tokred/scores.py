"""Pure functions that rank tokens: features in, (B, N) float32 out, higher is kept first.

What a dead token gets is anybody's guess, NaN included; who ranks must leave it out, as `ranks` does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tokred.tokens import Array, Tokens, of_prompt, take

MEMORY, RATER = "state/memory", "state/rater"  # features that `remember` writes
PAGERANK = (1, 5, 10, 30, 50)  # rounds of votes after which attention reports `pagerank_<rounds>`; 30 have converged


def cls_attention(tokens: Tokens) -> Array:
  """Attention that CLS pays to each token, averaged over heads.  (Liang et al., 2022, EViT, arXiv:2202.07800)"""
  return tokens.feats["cls_attention"].astype(jnp.float32)


def column_mean(tokens: Tokens) -> Array:
  """Attention that each token receives, the mean over heads and living queries.

  Its inverse is the informativeness of Lee et al., 2024, MCTF, arXiv:2403.10030.
  """
  return tokens.feats["column_mean"].astype(jnp.float32)


def pagerank(tokens: Tokens) -> Array:
  """Importance that tokens vote each other through attention.  (Wang et al., 2024, Zero-TPrune, arXiv:2305.17328)"""
  return tokens.feats["pagerank_30"].astype(jnp.float32)


def last_attention(tokens: Tokens) -> Array:
  """Attention that a prompt's last token pays, the mean over heads.  (Chen et al., 2024, FastV, arXiv:2403.06764)"""
  return tokens.feats["last_attention"].astype(jnp.float32)


def last_attention_ahead(tokens: Tokens) -> Array:
  """The same in the layer that follows, before it is computed.  (Xing et al., 2024, PyramidDrop, arXiv:2410.17247)"""
  return tokens.feats["last_attention_ahead"].astype(jnp.float32)


def memory(tokens: Tokens) -> Array:
  """What a `remember` site of an earlier layer wrote down: two layers in one decision, or several layers' mean.

  Raises:
    ValueError: no site has.
  """
  if MEMORY not in tokens.feats:
    raise ValueError(
      "score='memory' reads what a site with reducer='remember' leaves behind in an earlier layer of this stack, and "
      "there is none; add one to config.sites"
    )
  return tokens.feats[MEMORY].astype(jnp.float32)


def attention_from(tokens: Tokens, rows: Array, columns: Array) -> Array:
  """Attention that each token receives, the mean over heads and some queries: (B, N) float32, in O(N^2).

  Args:
    tokens: with features `query` (B, N, H, d) and `key` (B, N, heads, d); in a language model, where "state/index"
      tells their places, they attend to what does not stand behind them.
    rows: (B, N) bool, whose attention counts.
    columns: (B, N) bool, among whom it is shared out.
  """
  clean = lambda a: jnp.where(tokens.alive[..., None, None], jax.lax.stop_gradient(a), 0).astype(jnp.float32)
  q, k = clean(tokens.feats["query"]), clean(tokens.feats["key"])
  batch, n, heads, dim = q.shape
  q = q.reshape(batch, n, k.shape[2], heads // k.shape[2], dim)
  seen = (columns & tokens.alive)[:, None]
  if "state/index" in tokens.feats:
    place = tokens.feats["state/index"]
    seen = seen & (place[:, :, None] >= place[:, None])
  seen = jnp.broadcast_to(seen, (batch, n, n))[:, None, None]
  logits = jnp.einsum("bighd,bjgd->bghij", q, k, precision="highest") * dim**-0.5
  top = jnp.where(seen, logits, -jnp.inf).max(-1, keepdims=True)
  weight = jnp.where(seen, jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
  total = weight.sum(-1, keepdims=True)
  weight = weight / jnp.where(total > 0, total, 1.0)
  rows = (rows & tokens.alive).astype(jnp.float32)
  return jnp.einsum("bghij,bi->bj", weight, rows / jnp.maximum(rows.sum(1, keepdims=True), 1.0)) / heads


def visual_attention(tokens: Tokens) -> Array:
  """Attention among the tokens that may go: in a prompt, of vision to vision.  (Xu et al., 2025, VisionDrop)"""
  free = ~tokens.protected
  return attention_from(tokens, free, free)


def text_attention(tokens: Tokens) -> Array:
  """Attention that the protected pay, in a prompt the text; only `rater`s where a site remembers these.

  (Zhang et al., 2024, SparseVLM)
  """
  text = of_prompt(tokens) & tokens.protected
  if RATER in tokens.feats:
    text = text & (tokens.feats[RATER] > 0)
  return attention_from(tokens, text, jnp.ones_like(text))


def rater(tokens: Tokens) -> Array:
  """1 for text that has to do with the image, else 0, from embeddings: `remember` it in layer 0 as name_of="rater".

  r_t = mean over visual i of softmax_t(x_i . x_t);  t rates if r_t is above the mean.  (Zhang et al., 2024, SparseVLM;
  the paper's inner products, which are not cosines)  Only text behind the images is asked, as in the authors' code,
  where a row has any.
  """
  text, free = of_prompt(tokens) & tokens.protected, tokens.alive & ~tokens.protected
  place = tokens.feats.get("state/index", jnp.arange(text.shape[1])[None])
  behind = text & (place > jnp.where(free, place, -1).max(1, keepdims=True))
  text = jnp.where(behind.any(1, keepdims=True), behind, text)
  x = jnp.where(tokens.alive[..., None], jax.lax.stop_gradient(tokens.x), 0).astype(jnp.float32)
  logits = jnp.where(text[:, None], jnp.einsum("bid,btd->bit", x, x, precision="highest"), jnp.finfo(jnp.float32).min)
  share = jnp.where(free[..., None], jax.nn.softmax(logits), 0.0).sum(1) / jnp.maximum(free.sum(1), 1)[:, None]
  mean = jnp.where(text, share, 0.0).sum(1) / jnp.maximum(text.sum(1), 1)
  return (text & (share > mean[:, None])).astype(jnp.float32)


def turn(before: Array, after: Array, alive: Array | None = None) -> Array:
  """||after|| / ||before|| softmax_i(1 - cos(before_i, after_i)): how much a sublayer makes of a token, (B, N) float32.

  (Li et al., 2025, TransPrune)
  """
  alive = jnp.ones(before.shape[:2], bool) if alive is None else alive
  before, after = (jnp.where(alive[..., None], a, 1).astype(jnp.float32) for a in (before, after))
  tiny = jnp.finfo(jnp.float32).tiny
  a, b = (jnp.maximum(jnp.linalg.norm(v, axis=-1), tiny) for v in (before, after))
  cos = (before * after).sum(-1) / a / b
  return b / a * jax.nn.softmax(jnp.where(alive, 1.0 - cos, -jnp.inf))


def transition(tokens: Tokens) -> Array:
  """`turn` of the attention branch, at place="attn": of the residual stream before and behind it.

  TransPrune adds that of the MLP; its authors' code compares what a branch reads, behind the norm, with what it adds.
  """
  x = jax.lax.stop_gradient(tokens.x)
  return turn(x - jax.lax.stop_gradient(tokens.feats["update"]), x, tokens.alive)


def transition_mlp(tokens: Tokens) -> Array:
  """`turn` of the MLP branch, behind the block."""
  x = jax.lax.stop_gradient(tokens.x)
  return turn(x - jax.lax.stop_gradient(mlp_update(tokens)), x, tokens.alive)


def mlp_update(tokens: Tokens) -> Array:
  """What the MLP of the block behind which the tokens are has added to them, (B, N, D).

  Raises:
    ValueError: they are not behind one.
  """
  if "mlp_update" not in tokens.feats:
    raise ValueError(
      "scores 'repr_shift_mlp' and 'transition_mlp' read what the MLP adds, which a ViT's block has for sites at "
      "place='after', 'output', or the next block's 'before' and 'around'; set place to one of these, or another score"
    )
  return tokens.feats["mlp_update"]


def transprune(tokens: Tokens) -> Array:
  """Transitions, remembered over layers, and attention of the prompt's last token, each as shares of their sum.

  (Li et al., 2025, TransPrune; in their code attention is that of all text behind the image, in the layer that follows)
  """
  free = tokens.alive & ~tokens.protected

  def share(score: Array) -> Array:
    score = jnp.where(free, score, 0.0)
    return score / jnp.maximum(score.sum(1, keepdims=True), jnp.finfo(jnp.float32).tiny)

  return share(memory(tokens)) + share(last_attention(tokens))


def flow(cls: Array, semantic: Array, value: Array) -> Array:
  """(c_i / sum c + m_i / sum m) ||v_i||_1, (B, N) float32.  (Tong et al., 2025, FlowCut)

  Args:
    cls: (B, N) attention of CLS, zero where it does not count; so is semantic.
    semantic: (B, N).
    value: (B, N, d), the mean over heads.
  """
  share = lambda a: a / jnp.maximum(a.sum(1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  return (share(cls) + share(semantic)) * jnp.abs(value).sum(-1)


def flowcut(tokens: Tokens) -> Array:
  """`flow` with semantic attention softmax_i(v_cls . v_i), unscaled, the mean over heads; CLS stands first.

  FlowCut halves it with the layer before: `remember` it as how="running" and rank by `memory`.
  """
  free = tokens.alive & ~tokens.protected
  value = jnp.where(tokens.alive[..., None, None], tokens.feats["value"], 0).astype(jnp.float32)
  logits = jnp.einsum("bhd,bnhd->bhn", value[:, 0], value, precision="highest")
  lowest = jnp.finfo(jnp.float32).min  # of a row without free tokens nobody asks
  semantic = jax.nn.softmax(jnp.where(free[:, None], logits, lowest)).mean(1)
  cls = cls_attention(tokens)
  return flow(*(jnp.where(free, a, 0.0) for a in (cls, semantic)), value.mean(2))


def key_norm(tokens: Tokens) -> Array:
  """||k_i||, averaged over heads."""
  return jnp.linalg.norm(tokens.feats["key"].astype(jnp.float32), axis=-1).mean(-1)


def value_norm(tokens: Tokens) -> Array:
  """||v_i||, averaged over heads."""
  return jnp.linalg.norm(tokens.feats["value"].astype(jnp.float32), axis=-1).mean(-1)


def token_norm(tokens: Tokens) -> Array:
  """||x_i|| of the residual stream."""
  return jnp.linalg.norm(tokens.x.astype(jnp.float32), axis=-1)


def repr_shift(tokens: Tokens) -> Array:
  """||F(x)_i||, how far the attention branch F moves a token.  (Choi et al., 2025, arXiv:2508.00367)"""
  return jnp.linalg.norm(tokens.feats["update"].astype(jnp.float32), axis=-1)


def repr_shift_mlp(tokens: Tokens) -> Array:
  """The same with the MLP branch for F, behind the block."""
  return jnp.linalg.norm(mlp_update(tokens).astype(jnp.float32), axis=-1)


PROBES = 4  # directions that seed `random`


def random(tokens: Tokens) -> Array:
  """Uniform on [0, 1), a fixed function of a token's original position and of its image.

  No random stream: this serves inference too, alike in mask and in gather mode and in whatever batch an image comes.
  Positions are integers and exact, but an image shows itself only in activations, which differ in their last bits
  from one compiled program to the next.  So its seed is *where* it is extreme: the positions of the tokens that reach
  farthest along four fixed directions.  Rounding moves an argmax only where the first two are nearly tied.
  """
  free = tokens.alive & ~tokens.protected
  free = jnp.where(free.any(1, keepdims=True), free, tokens.alive)
  signs = np.random.default_rng(0).choice([-1.0, 1.0], (tokens.x.shape[-1], PROBES))
  x = jnp.where(free[..., None], jax.lax.stop_gradient(tokens.x).astype(jnp.float32), 0.0)
  reach = jnp.einsum("bnd,dm->bnm", x, jnp.asarray(signs, jnp.float32), precision="highest")
  place = jnp.argmax(jnp.where(free[..., None], reach, -jnp.inf), axis=1).astype(jnp.int32)  # (B, M)
  position = tokens.position.reshape(*tokens.mask.shape, -1).astype(jnp.uint32)  # (B, N, axis)
  seed = jnp.zeros(len(place), jnp.uint32)
  for word in jnp.moveaxis(take(position, place), 0, -1).reshape(-1, len(place)):
    seed = _scramble(seed ^ word)
  state = jnp.broadcast_to(seed[:, None], tokens.mask.shape)
  for axis in range(position.shape[-1]):
    state = _scramble(state ^ position[..., axis])
  return (state >> 8).astype(jnp.float32) * 2.0**-24  # 24 bits are exact in float32


def _scramble(word: Array) -> Array:
  """A bijection of uint32 in which each bit depends on all: SplitMix's finaliser after a step of the golden ratio."""
  word = word + np.uint32(0x9E3779B9)
  word = (word ^ (word >> 16)) * np.uint32(0x21F0AAAD)
  word = (word ^ (word >> 15)) * np.uint32(0x735A2D97)
  return word ^ (word >> 15)


SCORES: dict[str, tuple[Callable[[Tokens], Array], tuple[str, ...]]] = {  # name -> function, features it reads
  "cls_attention": (cls_attention, ("cls_attention",)),
  "column_mean": (column_mean, ("column_mean",)),
  "flowcut": (flowcut, ("cls_attention", "value")),
  "key_norm": (key_norm, ("key",)),
  "last_attention": (last_attention, ("last_attention",)),
  "last_attention_ahead": (last_attention_ahead, ("last_attention_ahead",)),
  "memory": (memory, ()),
  "pagerank": (pagerank, ("pagerank_30",)),
  "random": (random, ()),
  "rater": (rater, ()),
  "repr_shift": (repr_shift, ("update",)),
  "repr_shift_mlp": (repr_shift_mlp, ("mlp_update",)),
  "text_attention": (text_attention, ("key", "query")),
  "token_norm": (token_norm, ()),
  "transition": (transition, ("update",)),
  "transition_mlp": (transition_mlp, ("mlp_update",)),
  "transprune": (transprune, ("last_attention",)),
  "value_norm": (value_norm, ("value",)),
  "visual_attention": (visual_attention, ("key", "query")),
}
# Those that read what attention's queries, keys and values tell, and nothing else.
FORESEEN = ("cls_attention", "column_mean", "flowcut", "key_norm", "pagerank", "value_norm")
