"""Tokens, the plan of one reduction, and what follows from a plan: fold, compact, restore.

Dimension letters, here and everywhere: B batch, N tokens now, S source tokens, K kept, D width, H heads, L blocks.

Every reduction is a linear map Y = W X whose rows are the survivors.  A `Plan` holds W sparsely: who represents whom
(`owner`), with which coefficient (`weight`), and in which order the survivors stand (`order`).  `fold` applies it at
full length (the dead follow the survivors), `compact` at k tokens; the first k rows of both are the same.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Tokens:
  """All that a layer knows of its tokens.

  `mask` is bool where nothing is to be learned through it and float32 (0 or 1, straight-through) where it is: the
  dtype tells attention whether a gradient must reach the tokens that are dead.
  """

  x: Array  # (B, N, D)
  mask: Array  # (B, N) bool or float32; 1 alive, 0 dead
  size: Array  # (B, N) float32; source tokens represented
  position: Array  # (B, N[, axis]) int32; original position ids
  owner: Array  # (B, S) int32; index of the token that now represents each source token, -1 if none
  protected: Array  # (B, N) bool; never removed
  feats: dict[str, Array] = struct.field(default_factory=dict)  # what reducers asked for, token axis second

  @property
  def alive(self) -> Array:
    """(B, N) bool."""
    return self.mask > 0

  @property
  def learned(self) -> bool:
    """Whether gates are to learn: then a dead token's x is what it could have said, and no garbage."""
    return jnp.issubdtype(self.mask.dtype, jnp.floating)

  @property
  def visible(self) -> Array:
    """x, zero where dead unless a gate is to learn from it: (B, N, D)."""
    return self.x if self.learned else jnp.where(self.mask[..., None], self.x, 0)

  @property
  def images(self) -> int:
    """Images that share a row: 1 unless they are packed."""
    return self.owner.shape[0] // self.x.shape[0]


@struct.dataclass
class Plan:
  """One reduction of N tokens."""

  owner: Array  # (B, N) int32; i kept, j folded into j, -1 dropped
  order: Array  # (B, N) int32; permutation: survivors first, then the others from best to worst
  gate: Array  # (B, N) bool, or float32 0/1 with a straight-through gradient; 1 kept (any value where i was dead)
  weight: Array | None = None  # (B, N) float32; coefficient of i in its owner's value; None: owners keep their value


APPENDED = "state/appended"  # (B, N) bool feature: behind the prompt, so that it must decide for itself
VISUAL = "state/visual"  # (B, N) int32 feature: which of its row's visual tokens, from 0
SOURCE = "state/source"  # (B, N) int32 feature: how many unprotected tokens its row had at first, padding not counted


def of_prompt(tokens: Tokens) -> Array:
  """(B, N) bool: alive, and not appended behind the prompt of a language model."""
  appended = tokens.feats.get(APPENDED)
  return tokens.alive if appended is None else tokens.alive & ~appended


def at_first(tokens: Tokens) -> Array:
  """(B,): unprotected tokens of each row before anything was reduced, padding not counted."""
  given = tokens.feats.get(SOURCE)
  return (~tokens.protected).sum(1) if given is None else given.max(1)


def start(x: Array, num_prefix_tokens: int = 0, position: Array | None = None) -> Tokens:
  """Tokens of a sequence that nothing has reduced yet.

  Args:
    x: (B, N, D).
    num_prefix_tokens: how many tokens at the front are protected (CLS, distillation, registers).
    position: (B, N[, axis]) int32 original position ids; None: 0 to N - 1.

  Raises:
    ValueError: x of another rank, or not as many tokens as shall be protected.
  """
  if x.ndim != 3 or not 0 <= num_prefix_tokens <= x.shape[1]:
    raise ValueError(
      f"x of shape {x.shape} and num_prefix_tokens={num_prefix_tokens}; valid: (batch, tokens, width), and 0 to tokens"
    )
  batch, n = x.shape[:2]
  index = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
  return Tokens(
    x=x,
    mask=jnp.ones((batch, n), bool),
    size=jnp.ones((batch, n), jnp.float32),
    position=index if position is None else position,
    owner=index,
    protected=index < num_prefix_tokens,
  )


def straight_through(hard: Array, soft: Array) -> Array:
  """`hard` in the forward pass, bit for bit, with the gradient of `soft`; float32."""
  return jax.lax.stop_gradient(hard.astype(jnp.float32)) + (soft - jax.lax.stop_gradient(soft)).astype(jnp.float32)


def default_form() -> str:
  """Gathers are slow on TPU; elsewhere they beat a matrix of zeros and ones."""
  return "one_hot" if jax.default_backend() == "tpu" else "gather"


def take(values: Array, index: Array, form: str | None = None) -> Array:
  """values[b, index[b, i]], as a gather or as a product with a one-hot matrix; both give the same bits.

  Args:
    values: (B, N, ...) finite where `form` is "one_hot" (a zero does not silence a NaN in a product).
    index: (B, M) int32 in [0, N).
    form: "gather", "one_hot" or None for the backend's own.

  Returns:
    (B, M, ...) of the dtype of values.
  """
  if (form or default_form()) == "gather":
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(values, index)
  dtype = values.dtype if jnp.issubdtype(values.dtype, jnp.inexact) else jnp.float32
  one_hot = jax.nn.one_hot(index, values.shape[1], dtype=dtype)
  return jnp.einsum("bmn,bn...->bm...", one_hot, values.astype(dtype), precision="highest").astype(values.dtype)


def standing(values: Array, order: Array, place: Array, first: int = 0, form: str | None = None) -> Array:
  """Values of those who stand at places `first`, `first` + 1, ...; the gradient is gathered, too.

  JAX makes a scatter of a gather's gradient, for it does not know that each token stands in one place.

  Args:
    values: (B, N, ...).
    order: (B, M) int32; who stands there.
    place: (B, N) int32; where each token stands, the inverse of the whole order.
    first: place of the first of them.
    form: see `take`.

  Returns:
    (B, M, ...) of the dtype of values.
  """
  if not jnp.issubdtype(values.dtype, jnp.inexact):
    return take(values, order, form)
  return _standing(values, order, place, first, form)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _standing(values: Array, order: Array, place: Array, first: int, form: str | None) -> Array:
  return take(values, order, form)


def _standing_forward(values: Array, order: Array, place: Array, first: int, form: str | None) -> tuple[Array, Array]:
  return take(values, order, form), place


def _standing_backward(first: int, form: str | None, place: Array, gradient: Array) -> tuple[Array, None, None]:
  here = (place >= first) & (place < first + gradient.shape[1])
  back = take(gradient, jnp.clip(place - first, 0, gradient.shape[1] - 1), form)
  return jnp.where(here.reshape(here.shape + (1,) * (back.ndim - 2)), back, 0), None, None


_standing.defvjp(_standing_forward, _standing_backward)


SORTED = 256  # from this length on, sorting costs less than comparing every pair


def rank(key: Array) -> Array:
  """Place of each entry in the stable ascending order of its row: (B, N) to (B, N) int32; ties by index.

  A row as short as an image's is ranked by counting what comes before each entry: the pairs are compared in one fused
  loop, three times as fast on CPU as XLA's sort.  NaN has no place: replace it first.
  """
  n = key.shape[1]
  if n >= SORTED:
    return inverse(jnp.argsort(key, axis=1, stable=True).astype(jnp.int32))
  index = jnp.arange(n)
  mine, other = key[:, :, None], key[:, None, :]
  before = (other < mine) | ((other == mine) & (index < index[:, None]))
  return before.sum(-1, dtype=jnp.float32).astype(jnp.int32)


def inverse(order: Array) -> Array:
  """The inverse permutation of each row, (B, N) int32: rank of every token in `order`, and the other way round."""
  place = jnp.arange(order.shape[1], dtype=jnp.int32)

  def one(row: Array) -> Array:  # batched by vmap, so that a sharded batch needs no collective
    return jnp.zeros_like(place).at[row].set(place, unique_indices=True, mode="promise_in_bounds")

  return jax.vmap(one)(order)


def best(score: Array, axis: int = -1) -> tuple[Array, Array]:
  """Largest entry along an axis and its index, int32; ties go to the lower one.

  Two plain reductions: XLA does not vectorise argmax on CPU.
  """
  axis %= score.ndim
  top, last = score.max(axis), score.shape[axis] - 1
  index = jax.lax.broadcasted_iota(jnp.float32, score.shape, axis)
  where = jnp.where(score == jnp.expand_dims(top, axis), index, last)  # no entry equals a NaN
  return top, where.min(axis).astype(jnp.int32)


def scatters() -> bool:
  """Whether sums over groups are scattered: on CPU they cost next to nothing; on GPU their order is not fixed."""
  return jax.default_backend() == "cpu"


def scatter_add(values: Array, index: Array, updates: Array) -> Array:
  """values[b, index[b, i]] += updates[b, i]; index (B, M) in [0, N)."""
  return jax.vmap(lambda row, i, u: row.at[i].add(u, mode="promise_in_bounds"))(values, index, updates)


def group_sum(owner: Array, values: Array) -> Array:
  """Sum over the members of each owner, (B, N) float32: out[j] = sum of values[i] over owner[i] == j."""
  if scatters():
    return scatter_add(jnp.zeros_like(values), jnp.maximum(owner, 0), jnp.where(owner >= 0, values, 0.0))
  member = owner[:, None, :] == jnp.arange(owner.shape[1])[None, :, None]  # (B, N owners, N members), fused away
  return jnp.sum(jnp.where(member, values[:, None, :], 0.0), axis=-1)


def average_weight(owner: Array, share: Array) -> Array:
  """Coefficients of the `share`-weighted mean within each group; exactly 1 where a token stands alone.

  Args:
    owner: (B, N) int32, -1 where dropped.
    share: (B, N) positive float32, such as the sizes (ToMe) or ones (plain mean).

  Returns:
    (B, N) float32, 0 where dropped.
  """
  total = take(group_sum(owner, share), jnp.maximum(owner, 0))
  return jnp.where(owner >= 0, share / jnp.where(owner >= 0, total, 1.0), 0.0)


def fold(tokens: Tokens, plan: Plan, *, survival: Array | None = None, form: str | None = None) -> Tokens:
  """Mask mode: the same N, survivors first, owners hold the merged values, the others are dead.

  Args:
    tokens: N tokens.
    plan: the reduction.
    survival: (N,) or (B, N) probability that the token of each rank survives, from a learned rate; its gradient is
      that of the gate of the token that stands there (straight-through), and zero in a row from which no token goes.
    form: see `take`.

  Returns:
    Tokens of the same shapes; the mask is float32 if it was, or if the gate is, or if `survival` is given.
  """
  place = inverse(plan.order)
  kept = plan.gate
  if survival is not None:  # beside the gradient that the gate has already
    learned = jnp.issubdtype(kept.dtype, jnp.floating)
    chance = survival[place] if survival.ndim == 1 else take(survival, place)
    # A count that takes nothing away learns nothing from the task: the authors of DiffRate skip such a step.
    takes = (tokens.alive & (kept <= 0)).any(1, keepdims=True)
    chance = jnp.where(takes, chance, jax.lax.stop_gradient(chance))
    kept = straight_through(kept, chance + kept if learned else chance)
  soft = jnp.issubdtype(tokens.mask.dtype, jnp.floating) or jnp.issubdtype(kept.dtype, jnp.floating)
  mask = tokens.mask.astype(jnp.float32) * kept.astype(jnp.float32) if soft else tokens.mask & kept
  if not soft:  # nothing learns from the dead: they are silenced, and may have been garbage
    tokens = _silence(tokens)
  x, size = tokens.x, tokens.size
  owns = plan.owner == jnp.arange(x.shape[1])
  if plan.weight is not None:
    weight = jnp.where(plan.owner >= 0, plan.weight, 0.0)  # that of a dead token may be garbage
    if scatters() and form is None:
      given = x.astype(jnp.float32) * weight[..., None]  # a sum of many in bfloat16 stops growing
      moves = (plan.owner >= 0) & ~owns
      given, total = jnp.where(moves[..., None], given, 0), jnp.where(owns[..., None], given, x)
      x = scatter_add(total, jnp.maximum(plan.owner, 0), given).astype(x.dtype)
    else:
      weight = weight.astype(x.dtype)
      merge = jax.nn.one_hot(plan.owner, x.shape[1], axis=1, dtype=x.dtype)  # (B, owner, member); a row of -1 is zero
      merged = jnp.einsum("bon,bnd->bod", merge * weight[:, None], x, precision="highest")
      x = jnp.where(owns[..., None], merged, x)
    size = jnp.where(owns, group_sum(plan.owner, size), size)
  moved = (x, mask, size, tokens.position, tokens.protected, tokens.feats)
  x, mask, size, position, protected, feats = jax.tree.map(
    lambda leaf: standing(leaf, plan.order, place, form=form), moved
  )
  return Tokens(x, mask, size, position, _follow(tokens.owner, plan.owner, place), protected, feats)


def compact(tokens: Tokens, plan: Plan, k: int, *, form: str | None = None) -> Tokens:
  """Gather mode: the k tokens that stand first in the plan's order.

  Args:
    tokens: N tokens.
    plan: the reduction.
    k: how many come out, at most N; a Python int.
    form: see `take`.
  """
  place = inverse(plan.order)
  kept, gone = plan.order[:, :k], plan.order[:, k:]
  x, size = standing(tokens.x, kept, place, form=form), take(tokens.size, kept)
  if plan.weight is not None and gone.shape[1]:
    owner = take(plan.owner, gone)
    target = jnp.where(owner >= 0, take(place, jnp.maximum(owner, 0)), -1)
    weight = jnp.where(target >= 0, take(plan.weight, gone), 0.0)
    dtype, x = x.dtype, x.astype(jnp.float32) * take(plan.weight, kept)[..., None]
    # A zero weight does not silence the garbage that a dead token may hold.
    gone_x = jnp.where(target[..., None] >= 0, standing(tokens.x, gone, place, k, form), 0)
    gone_size = jnp.where(target >= 0, take(tokens.size, gone), 0.0)
    if scatters() and form is None:
      target = jnp.maximum(target, 0)
      x, size = scatter_add(x, target, gone_x * weight[..., None]), scatter_add(size, target, gone_size)
    else:
      merge = jax.nn.one_hot(target, k, axis=1, dtype=dtype)  # (B, K, gone): only the tokens that go are multiplied
      product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
      x = x + product("bkn,bnd->bkd", merge * weight[:, None].astype(dtype), gone_x)
      size = size + product("bkn,bn->bk", merge.astype(jnp.float32), gone_size)
    x = x.astype(dtype)
  mask = tokens.alive & (plan.gate > 0)
  rest = (mask, tokens.position, tokens.protected, tokens.feats)
  mask, position, protected, feats = jax.tree.map(lambda leaf: standing(leaf, kept, place, form=form), rest)
  return Tokens(x, mask, size, position, _follow(tokens.owner, plan.owner, place), protected, feats)


def pack(tokens: Tokens, goes: Array, slots: int, group: int) -> Tokens:
  """Gather mode where images keep different counts: those of `group` images in a row, one image behind the other.

  Two images of three tokens, of which 0, 2 and 1 go, in three slots: x = (a0, a2, b1), state/segment = (0, 0, 1) and
  owner = ((0, -1, 1), (-1, 2, -1)), which is how `restore` brings them back.

  Args:
    tokens: N tokens of B images, B a multiple of group; what arrives must not be packed.
    goes: (B, N) bool, alive; no more than `slots` in a row, for the rest is lost.
    slots: of a row, at most group * N; a Python int.
    group: images of a row.

  Returns:
    (B / group, slots) tokens; those that go stand first, the slots behind them are dead.  `owner` is still (B, S): a
    source token's slot in the row of its image.  Where group > 1, feats["state/segment"] (B / group, slots) int32 says
    which of the row's images a slot belongs to, -1 for none: attention has to stay within it.
  """
  batch, n = goes.shape
  row = lambda leaf: leaf.reshape(batch // group, group * n, *leaf.shape[2:])
  clean = _silence(tokens.replace(mask=tokens.alive))
  place = rank((~row(goes)).astype(jnp.int32))
  order = inverse(place)[:, :slots]
  place = jnp.where(goes, place.reshape(batch, n), -1)
  moved = (clean.x, goes, clean.size, clean.position, clean.protected, clean.feats)
  x, mask, size, position, protected, feats = jax.tree.map(lambda leaf: take(row(leaf), order), moved)
  if group > 1:
    feats = feats | {"state/segment": jnp.where(mask, order // n, -1)}
  return Tokens(x, mask, size, position, follow(tokens.owner, place), protected, feats)


def restore(values: Array, owner: Array, *, fill: float = 0.0) -> Array:
  """Values back on the source grid: every source token gets its owner's.

  Args:
    values: (B, N, ...), or fewer rows if images are packed, (B / group, N, ...).
    owner: (B, S) int32; -1 where nothing represents the source token.
    fill: what those get.

  Returns:
    (B, S, ...) of the dtype of values.
  """
  packed = jnp.maximum(owner, 0).reshape(values.shape[0], -1)
  out = take(values, packed, "gather").reshape(*owner.shape, *values.shape[2:])
  found = (owner >= 0).reshape(owner.shape + (1,) * (values.ndim - 2))
  return jnp.where(found, out, jnp.asarray(fill, values.dtype))


def bypass(outer: Tokens, inner: Tokens, weight: Array | None = None) -> Tokens:
  """Exit of a scope: members take their owner's new value, the others keep theirs, and all are tokens again.

  Args:
    outer: the N tokens that arrived at the scope.
    inner: what left it; its `owner` (B, N) counts the tokens of `outer` as sources.
    weight: (B, N) multiplies each token's update; None: 1.

  Returns:
    `outer` with x + weight (x_inner - x) where a token went through.
  """
  through = (inner.owner >= 0) & restore(inner.alive | jnp.issubdtype(inner.mask.dtype, jnp.floating), inner.owner)
  update = restore(inner.x, inner.owner) - outer.x
  if jnp.issubdtype(inner.mask.dtype, jnp.floating):  # a gate learns from the update that it lets through or holds back
    gate = restore(inner.mask, inner.owner)
    weight = gate if weight is None else weight * gate
  if weight is not None:
    update = update * weight[..., None].astype(update.dtype)
  return outer.replace(x=jnp.where(through[..., None], outer.x + update, outer.x))


def follow(owner: Array, step: Array) -> Array:
  """Composes two source maps, (B, S) and (B, N): source -> token -> where that token went; -1 where it is lost."""
  return jnp.where(owner >= 0, take(step, jnp.maximum(owner, 0)), -1)


def _follow(owner: Array, step: Array, place: Array) -> Array:
  """Composes the source map (B, S) with one plan: source -> token -> its owner -> the owner's new place."""
  return follow(owner, jnp.where(step >= 0, take(place, jnp.maximum(step, 0)), -1))


def _silence(tokens: Tokens) -> Tokens:
  def clean(leaf: Array) -> Array:
    return jnp.where(tokens.mask.reshape(tokens.mask.shape + (1,) * (leaf.ndim - 2)), leaf, jnp.zeros_like(leaf))

  return tokens.replace(x=clean(tokens.x), size=clean(tokens.size), feats=jax.tree.map(clean, tokens.feats))
