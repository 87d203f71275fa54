"""The cases in which a reducer meets the laws: small tokens in some state, and a micro ViT."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokred import config as config_lib
from tokred.drafts import PLACED
from tokred.nn import attention, vit
from tokred.reducers import base
from tokred.tokens import Array, Plan, Tokens, bypass, follow

BATCH, NUM, WIDTH, HEADS = 8, 17, 16, 2  # of the tokens; the micro ViT has sizes of its own
PRIVATE = "check_reducer"  # the name under which a reducer that is not registered enters the micro ViT
COMPILER = {"xla_backend_optimization_level": 0}  # everything here compiles for longer than it runs


@contextlib.contextmanager
def registered(cls: type[base.Reducer]) -> Iterator[str]:
  """The name of a reducer class in the registry, for a while if it has none of its own."""
  for name, known in base.REGISTRY.items():
    if known is cls:
      yield name
      return
  base.REGISTRY[PRIVATE] = cls
  try:
    yield PRIVATE
  finally:
    del base.REGISTRY[PRIVATE]


@dataclasses.dataclass(frozen=True)
class Case:
  """A batch of tokens that a reducer meets."""

  name: str
  tokens: Tokens  # (8, 17, 16); the dead, where there are some, follow the alive
  num_protected: int
  programs: "Programs"

  @property
  def alive(self) -> int:
    """Tokens alive in row 0."""
    return int(np.asarray(self.tokens.mask)[0].sum())

  @property
  def tolerance(self) -> float:
    return 1e-5 if self.tokens.x.dtype == jnp.float32 else 3e-2

  def keep(self) -> int:
    """A count in reach: about three quarters of those alive."""
    return max(self.programs.module.fewest(self.alive, self.num_protected), self.alive - self.alive // 4)

  def tracked(self) -> Tokens:
    """The tokens as sources of their own: the owner of what leaves then tells who represents whom."""
    return self.tokens.replace(owner=jnp.broadcast_to(jnp.arange(NUM, dtype=jnp.int32), (BATCH, NUM)))


@dataclasses.dataclass(frozen=True)
class Result:
  """What comes out of a reducer."""

  tokens: Tokens
  report: dict[str, Array]
  after: Array  # (B, N, D) after a tiny block; on the outer tokens if the reducer goes around it


def draw(
  seed: int, needed: Sequence[str], *, protected: Sequence[int], alive: Sequence[int], earlier: bool, dtype: Any
) -> Tokens:
  """Random tokens with features; `earlier`: some are merged already, and some sources have no token."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  mask = np.arange(NUM) < np.asarray(alive)[:, None]
  logits = np.where(mask, rng.normal(size=(BATCH, NUM)), -np.inf)
  feats = {}
  for need in needed:
    if need in ("update", "mlp_update"):
      feats[need] = normal(BATCH, NUM, WIDTH)
    elif need in ("query", "key", "value"):
      feats[need] = normal(BATCH, NUM, HEADS, WIDTH // HEADS)
    else:  # attention that each token receives
      feats[need] = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
  index = np.broadcast_to(np.arange(NUM), (BATCH, NUM))
  owner = rng.integers(-1, min(alive), (BATCH, NUM)) if earlier else index
  return Tokens(
    x=normal(BATCH, NUM, WIDTH),
    mask=jnp.asarray(mask),
    size=jnp.asarray(rng.integers(1, 5, (BATCH, NUM)) if earlier else np.ones((BATCH, NUM)), jnp.float32),
    position=jnp.asarray(rng.permuted(index, axis=1) if earlier else index, jnp.int32),
    owner=jnp.asarray(owner, jnp.int32),
    protected=jnp.asarray(np.isin(index, protected)),
    feats=feats,
  )


def make_cases(module: base.Reducer) -> dict[str, Any]:
  """The cases of a reducer by name."""
  programs, needed = Programs(module), module.needed()
  layouts = {  # protected places, tokens alive in each row, some merged before, dtype
    "prefix": ((0, 1), (17,) * BATCH, False, jnp.float32),
    "later": ((0, 5), (13,) * BATCH, True, jnp.float32),
    "ragged": ((0, 5), (13, 9, 17, 10, 11, 12, 16, 17), True, jnp.float32),
    "bfloat16": ((0, 5), (13,) * BATCH, True, jnp.bfloat16),
  }
  if "cls_attention" not in needed:
    layouts["free"] = ((), (17,) * BATCH, False, jnp.float32)
  cases = {}
  for seed, (name, (protected, alive, earlier, dtype)) in enumerate(layouts.items()):
    tokens = draw(seed, needed, protected=protected, alive=alive, earlier=earlier, dtype=dtype)
    cases[name] = Case(name, tokens, len(protected), programs)
  return cases | {"model": ModelCase("model", module)}


def cut(tokens: Tokens, n: int) -> Tokens:
  """The first n tokens; the source map stays."""
  moved = jax.tree.map(lambda leaf: leaf[:, :n], tokens.replace(owner=tokens.mask))
  return moved.replace(owner=tokens.owner)


class Programs:
  """A reducer with parameters, and what is compiled of it, shared by all cases of a check."""

  def __init__(self, module: base.Reducer):
    self.module, self.traces = module, 0
    self.around = module.places[0] in ("around", "mlp")

  @functools.cached_property
  def variables(self) -> Any:
    tokens = draw(0, self.module.needed(), protected=(0,), alive=(NUM,) * BATCH, earlier=False, dtype=jnp.float32)
    rngs = {"params": jax.random.key(0), "reduce": jax.random.key(1)}
    init = lambda t: self.module.init(rngs, t, NUM, train=True, mode="mask")
    return shake(jax.jit(init, compiler_options=COMPILER)(tokens))

  def call(self, variables: Any, tokens: Tokens, keep: Any, seed: Any, mode: str, train: bool, **kwargs: Any) -> Result:
    if mode == "mask":
      self.traces += 1
    rngs, source = {"reduce": jax.random.key(seed)}, tokens.owner
    if self.around:  # a scope counts the tokens that arrive as its sources
      tokens = tokens.replace(owner=jnp.broadcast_to(jnp.arange(tokens.x.shape[1], dtype=jnp.int32), tokens.mask.shape))
    out, report = self.module.apply(variables, tokens, keep, train=train, mode=mode, rngs=rngs, **kwargs)
    report.pop("plan", None)  # for the block alone
    if not self.around:
      return Result(out, report, mix(out))
    inner = out.replace(x=mix(out))
    out = out.replace(owner=follow(source, out.owner))
    return Result(out, report, bypass(tokens, inner, report.get("update_weight")).x)

  @functools.cache  # noqa: B019 (lives as long as one check)
  def program(self, mode: str, train: bool, keep: int | None) -> Callable[..., Any]:
    """A compiled `call`; a `keep` that is given is a Python int in it, otherwise it is traced."""

    def run(variables: Any, tokens: Tokens, traced: Any, seed: Any) -> tuple[Any, ...]:
      result = self.call(variables, tokens, traced if keep is None else keep, seed, mode, train)
      return result.tokens, result.report, result.after

    return jax.jit(run, compiler_options=COMPILER)

  def run(self, tokens: Tokens, keep: Any, mode: str = "mask", *, train: bool = False, seed: int = 0) -> Result:
    """Carries the reducer out; `keep` is traced in mask mode."""
    program = self.program(mode, train, keep if mode == "gather" else None)
    return Result(*program(self.variables, tokens, jnp.asarray(keep, jnp.int32), jnp.int32(seed)))

  @functools.cache  # noqa: B019
  def planner(self, train: bool, method: str) -> Callable[..., Plan]:
    """The module's plan alone, compiled."""

    def run(variables: Any, tokens: Tokens, keep: Any) -> Plan:
      rngs = {"reduce": jax.random.key(0)}
      return self.module.apply(variables, tokens, keep, train=train, rngs=rngs, method=method)[0]

    return jax.jit(run, compiler_options=COMPILER)

  def plan(self, tokens: Tokens, keep: int, *, train: bool = False, method: str = "plan") -> Plan | None:
    """The plan that `run` carries out in mask mode, or `counted`; None for a reducer that writes none."""
    if not isinstance(self.module, base.Planner):
      return None
    return self.planner(train, method)(self.variables, tokens, jnp.int32(keep))

  @functools.cache  # noqa: B019
  def gradient(self, mode: str, train: bool, keep: int, survival: bool) -> Callable[..., Any]:
    """d (a fixed projection of what comes out) / d (variables, x, features, survival), compiled."""

    def objective(variables: Any, x: Array, feats: Any, curve: Array, tokens: Tokens) -> Array:
      kwargs = dict(survival=curve) if survival else {}
      tokens = tokens.replace(x=x, feats=feats)
      after = self.call(variables, tokens, keep, 0, mode, train, **kwargs).after
      n = int(after.shape[1]) if self.around else keep  # beyond `keep` are the dead
      after = jnp.where(tokens.alive[..., None], after, 0) if self.around else after
      return jnp.sum(after[:, :n] * jnp.cos(jnp.arange(n * WIDTH)).reshape(n, WIDTH))

    return jax.jit(jax.grad(objective, argnums=(0, 1, 2, 3)), compiler_options=COMPILER)

  def grads(self, tokens: Tokens, keep: int, mode: str = "mask", *, train: bool = False, survival: bool = False) -> Any:
    """The gradients by name."""
    curve = jnp.linspace(1.0, 0.0, tokens.x.shape[1])
    out = self.gradient(mode, train, keep, survival)(self.variables, tokens.x, tokens.feats, curve, tokens)
    return dict(zip(("variables", "x", "feats", "survival"), out, strict=True))


def mix(tokens: Tokens) -> Array:
  """A tiny block, (B, N, D): attention in which the tokens are their own queries, keys and values, and a tanh."""
  x = tokens.x
  heads = x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)
  size = jnp.where(tokens.alive, tokens.size, 1.0)
  out = attention.attend(heads, heads, heads, size=size, mask=tokens.mask, impl="matmul")
  return x + jnp.tanh(x + out.swapaxes(1, 2).reshape(x.shape))


def mix_alone(x: np.ndarray, size: np.ndarray) -> np.ndarray:
  """`mix` of the survivors of one row, in NumPy: (K, D) and (K,) to (K, D)."""
  heads = x.reshape(len(x), HEADS, -1).swapaxes(0, 1)
  logits = heads @ heads.swapaxes(1, 2) / np.sqrt(heads.shape[-1])
  weight = np.exp(logits - logits.max(-1, keepdims=True)) * size
  out = (weight / weight.sum(-1, keepdims=True)) @ heads
  return x + np.tanh(x + out.swapaxes(0, 1).reshape(x.shape))


def simulate(owner: np.ndarray, order: np.ndarray, sources: np.ndarray) -> np.ndarray:
  """The source map (B, S) after a plan, by following every source token on its own."""
  out = np.full_like(sources, -1)
  for row in range(len(sources)):
    places = list(order[row])
    for s, token in enumerate(sources[row]):
      if token >= 0 and owner[row, token] >= 0:
        out[row, s] = places.index(owner[row, token])
  return out


def shake(variables: Any) -> Any:
  """Parameters a little off their initial values, so that none is zero and no scores are tied."""
  rng = np.random.default_rng(7)
  return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), variables)


@dataclasses.dataclass(frozen=True)
class ModelCase:
  """A micro ViT (2 layers, 18 tokens of which CLS and a register are protected) with the reducer as a site."""

  name: str
  module: base.Reducer | None
  site: Any = None  # a site to test instead of the module

  @functools.cached_property
  def fields(self) -> dict[str, Any]:
    if self.site is not None:
      return dict(self.site)
    module, place = self.module, self.module.places[0]
    fields = [f.name for f in dataclasses.fields(module) if f.name not in {"parent", "name"} | PLACED]
    layers = (0,) if place in ("attn", "mlp", "after") else (1,)  # an attention follows
    layers = (0, 1) if module.everywhere else layers
    where = dict(place=place) | ({} if place == "output" else dict(layers=layers))
    told = not (module.recovers or module.training_only)  # others take no token away
    where |= dict(keep=max(module.fewest(18, 2), 13)) if told else {}
    name = next((name for name, cls in base.REGISTRY.items() if cls is type(module)), PRIVATE)
    return {f: getattr(module, f) for f in fields} | dict(reducer=name) | where

  def model(self, **changes: Any) -> vit.ViT:
    """The ViT; a change to None drops the field of the site."""
    site = {k: v for k, v in (self.fields | changes).items() if v is not None}
    place = site.get("place")
    pool = "avg" if place == "output" and "cls_attention" not in self.module.needed() else "cls"
    sizes = dict(variant="mu/4", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(16, 16), num_classes=5)
    config = config_lib.complete({"model": sizes | dict(num_registers=1, pool=pool)}).model
    return vit.make(config, {"site": site})

  def images(self) -> Array:
    return jnp.asarray(np.random.default_rng(3).normal(size=(3, 16, 16, 3)), jnp.float32)

  @functools.cache  # noqa: B019
  def gradient(self, mode: str, train: bool, learned: bool) -> tuple[dict[str, Array], Any]:
    """Logits and what is reported, and the gradient of a projection of the logits (and of losses reported)."""
    model = self.model(rate="learned", keep=None) if learned else self.model()
    variables = init(model, self.images())

    def objective(variables: Any, images: Array) -> tuple[Array, dict[str, Array]]:
      rngs = {"reduce": jax.random.key(0), "dropout": jax.random.key(1)}
      out = model.apply(variables, images, train=train, mode=mode, rngs=rngs)
      losses = [leaf.mean() for name, r in out.aux.items() if "/loss" in name for leaf in jax.tree.leaves(r)]
      loss = jnp.sum(out.logits * jnp.cos(jnp.arange(out.logits.size)).reshape(out.logits.shape)) + sum(losses)
      return loss, {"logits": out.logits}

    program = jax.jit(jax.grad(objective, has_aux=True), compiler_options=COMPILER)
    grads, out = program(variables, self.images())
    return out, grads["params"]

  def __hash__(self) -> int:
    return id(self)


def init(model: vit.ViT, images: Array) -> Any:
  """Variables without a zero among them: the reducers' own shaken, the backbone's drawn here, without a compilation."""
  rngs = {"params": jax.random.key(0), "reduce": jax.random.key(1), "dropout": jax.random.key(2)}
  draw_all = lambda: model.init(rngs, images, train=True, mode="mask")
  shapes, rng = jax.eval_shape(draw_all), np.random.default_rng(5)
  ours = lambda path: "'reduce'" in jax.tree_util.keystr(path)
  leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
  own = {}
  if any(ours(path) for path, _ in leaves):
    keep = lambda tree: {str(p): v for p, v in jax.tree_util.tree_flatten_with_path(tree)[0] if ours(p)}
    own = shake(jax.jit(lambda: keep(draw_all()), compiler_options=COMPILER)())

  def backbone(path: Any, leaf: Any) -> Array:
    values = rng.normal(size=leaf.shape) / np.sqrt(max(leaf.shape[0], 4))
    return jnp.asarray(values + ("scale" in jax.tree_util.keystr(path)), leaf.dtype)

  return jax.tree.unflatten(treedef, [own[str(path)] if ours(path) else backbone(path, leaf) for path, leaf in leaves])
