"""One optimiser step: a pure function of state and batch, and the state it acts on."""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from tokred import lora, losses, tokens, vqa
from tokred.evaluate import counts_by_site
from tokred.model import without_sites
from tokred.nn.vit import ViT
from tokred.nn.vlm import VLM, Known
from tokred.sharding import path_name
from tokred.train.alarms import overlaps, selected
from tokred.train.optim import ema_update

State = dict[str, Any]  # step, params, opt_state, and ema where it is on


def init_state(params: Any, optimizer: optax.GradientTransformation, ema: float) -> State:
  """State at step 0."""
  state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(params)}
  return state | ({"ema": params} if ema else {})


def make_step(
  config: ConfigDict, module: ViT | VLM, dense: ViT | VLM, optimizer: optax.GradientTransformation, mode: str,
  frozen: Any, whole: Any, known: Known | None = None,
) -> Any:  # fmt: skip
  """The training step, to be jitted with a donated state.

  Args:
    config: the whole config; read are `loss`, `lora`, `train.accumulate` and `optim.ema`.
    module: the student.
    dense: the teacher.
    optimizer: of `tokred.train.optim.make_optimizer`.
    mode: "mask" or "gather".
    frozen: tree of bool as the parameters, of `tokred.train.optim.frozen`: no gradient of these is computed.
    whole: shardings by path that a teacher's parameters, which are spread over all devices, take on in the step.
    known: of a VLM's rows, needed in gather mode.

  Returns:
    step(state, batch, keeps, teacher, seed) -> (state, metrics): keeps are counts of scheduled sites or None, teacher
    the parameters of the dense teacher by path, or None; those that are missing are the student's own, which are frozen
    then; seed a uint32, an input so that all seeds share one program; metrics are float32 scalars, the terms of the
    loss by their names.
  """
  weights, look = config.loss, _classify if isinstance(module, ViT) else functools.partial(_answer, known=known)

  def loss(own: Any, batch: dict, rng: jax.Array, keeps: Any, teacher: Any) -> tuple[jax.Array, dict]:
    own = jax.tree.map(lambda leaf, fixed: jax.lax.stop_gradient(leaf) if fixed else leaf, own, frozen)
    params = lora.merge(own, config.lora.alpha)
    streams = dict(zip(("dropout", "reduce", "full"), jax.random.split(rng, 3), strict=True))
    taught = None if teacher is None else functools.partial(dense.apply, {"params": _overlay(own, teacher, whole)})
    output, terms, accuracy = look(weights, module, params, taught, batch, mode, keeps, streams)
    counts = {f"counts/{name}": count for name, count in counts_by_site(module, output.aux).items()}
    counts |= {f"share/{s.label}": output.aux[f"reduce/{s.site}/share"][s.index] for s in losses.shared(module)}
    metrics = terms | {"accuracy": accuracy} | counts | overlaps(module, output) | selected(module, output)
    return losses.total(weights, terms), metrics

  def step(state: State, batch: dict, keeps: Mapping[str, Any] | None, teacher: Any, seed: Any) -> tuple[State, dict]:
    rng = jax.random.fold_in(jax.random.key(seed), state["step"])
    grads, metrics = _accumulate(loss, state["params"], batch, rng, keeps, teacher, config.train.accumulate)
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    new = {
      "step": state["step"] + 1,
      "params": optax.apply_updates(state["params"], updates),
      "opt_state": opt_state,
    }
    if "ema" in state:
      new["ema"] = ema_update(state["ema"], new["params"], config.optim.ema, state["step"])
    return new, metrics | {"grad_norm": optax.tree.norm(grads)} | reducer_norms(grads, frozen)

  return step


def reducer_norms(grads: Any, frozen: Any) -> dict[str, jax.Array]:
  """Norm of the gradient of each reducer's own parameters, by where they lie: `grad_norm/block_3/reduce/select`.

  Args:
    grads: tree of gradients.
    frozen: tree of bool like it; reducers that are frozen altogether are left out.
  """
  own = collections.defaultdict(list)
  for (path, grad), fixed in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(frozen), strict=True):
    names = path_name(path).split("/")
    if "reduce" in names and not fixed:
      own["/".join(names[: names.index("reduce") + 2])].append(grad)
  return {f"grad_norm/{name}": optax.tree.norm(leaves) for name, leaves in own.items()}


def _classify(
  weights: ConfigDict, module: ViT, params: Any, teacher: Callable | None, batch: dict, mode: str, keeps: Any,
  streams: dict,
) -> tuple[Any, dict[str, jax.Array], jax.Array]:  # fmt: skip
  """Output, terms of the loss and accuracy of images with labels."""
  images = batch["image"]
  target = batch["target"] if "target" in batch else jax.nn.one_hot(batch["label"], module.shape.num_classes)
  output = module.apply({"params": params}, images, train=True, mode=mode, keeps=keeps, rngs=streams)
  taught = None if teacher is None else teacher(images)
  full = None
  if weights.consistency or weights.full_cross_entropy or weights.full_distill:
    full = _less_reduced(module, weights.less, params, images, streams["full"])
  right = output.logits.argmax(-1) == target.argmax(-1)
  return output, losses.terms(weights, module, output, target, taught, full), right.astype(jnp.float32).mean()


def _answer(
  weights: ConfigDict, module: VLM, params: Any, teacher: Callable | None, batch: dict, mode: str, keeps: Any,
  streams: dict, known: Known | None = None,
) -> tuple[Any, dict[str, jax.Array], jax.Array]:  # fmt: skip
  """The same of conversations: the loss is on what is answered, the accuracy that of its tokens."""
  inputs = vqa.inputs(batch)
  output = module.apply({"params": params}, **inputs, train=True, mode=mode, known=known, keeps=keeps, rngs=streams)
  logits, answer = tokens.restore(output.logits, output.tokens.owner), batch["answer"] > 0
  number = batch["answers"].sum() if "answers" in batch else None
  terms = {"cross_entropy": losses.answers(logits, batch["ids"], answer, weights.label_smoothing, number)}
  if teacher is not None:
    taught = teacher(**inputs, mode="mask")
    taught = tokens.restore(taught.logits, taught.tokens.owner)
    terms["distill_logits"] = losses.distill_logits(
      logits[:, :-1], taught[:, :-1], weights.temperature, answer[:, 1:], number
    )
  right = logits[:, :-1].argmax(-1) == batch["ids"][:, 1:]
  accuracy = losses.mean_of(right.astype(jnp.float32), answer[:, 1:], number)
  return output, terms | losses.reports(weights, module, output), accuracy


def _overlay(own: Any, teacher: Mapping[str, jax.Array], whole: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of the teacher, its frozen ones being the student's; what only the student has means nothing to it."""
  flat = traverse_util.flatten_dict(jax.lax.stop_gradient(own), sep="/")
  # Else XLA may compute with a kernel in parts, which rounds otherwise and sends activations around instead.
  gathered = {name: jax.lax.with_sharding_constraint(leaf, whole[name]) for name, leaf in teacher.items()}
  return traverse_util.unflatten_dict(flat | gathered, sep="/")


def _less_reduced(module: ViT, less: int, params: Any, images: jax.Array, rng: jax.Array) -> Any:
  """The pass that the student shall agree with; of its sites each spot removes r tokens, r drawn from 0 to `less`."""
  if less < 0:
    return without_sites(module).apply({"params": params}, images, train=True, rngs={"dropout": rng})
  removed, left, keeps = jax.random.randint(rng, (), 0, less + 1), module.sites.stack.num_tokens, {}
  for spot in module.sites.spots:
    scoped = module.sites.scoped(spot)
    count = jnp.maximum(left - removed, spot.keep)
    left = left if scoped else count
    keeps.setdefault(spot.site, []).append(count)
  keeps = {name: jnp.stack(counts) for name, counts in keeps.items()}
  # It is trained as well, so that its depth is stochastic, too; but what goes is drawn here, and by no reducer.
  rngs = {"depth": jax.random.fold_in(rng, 1)}
  return module.apply({"params": params}, images, mode="mask", keeps=keeps, rngs=rngs)


def transfer(state: State, target: Any) -> State:
  """The leaves of `state` that `target` still has, by name: what is left of it when rates are frozen.

  Args:
    state: the old state.
    target: abstract state of the new module; every leaf of it must be in the old one.
  """
  old = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
  paths, treedef = jax.tree_util.tree_flatten_with_path(target)
  return treedef.unflatten([old[path_name(path)] for path, _ in paths])


def _accumulate(loss: Any, params: Any, batch: dict, rng: Any, keeps: Any, teacher: Any, pieces: int) -> Any:
  """Mean gradient and metrics over `pieces` micro-batches; each device splits its own examples."""
  grad = jax.value_and_grad(loss, has_aux=True)
  if pieces == 1:
    (value, metrics), grads = grad(params, batch, rng, keeps, teacher)
    return grads, {"loss": value} | metrics
  if "answer" in batch:  # answers differ in length: each piece divides by its share of the batch's, not by its own
    rows = batch["answer"].shape[0]
    answers = jnp.maximum((batch["answer"][:, 1:] > 0).sum(), 1) / rows
    batch = batch | {"answers": jnp.full(rows, answers)}
  split = jax.tree.map(lambda a: a.reshape(a.shape[0] // pieces, pieces, *a.shape[1:]).swapaxes(0, 1), batch)

  def add(total: Any, piece: Any) -> tuple[Any, None]:
    (value, metrics), grads = grad(params, piece[0], piece[1], keeps, teacher)
    return jax.tree.map(lambda t, g: t + g / pieces, total, (grads, {"loss": value} | metrics)), None

  pieces_rng = jax.random.split(rng, pieces)
  first = jax.eval_shape(grad, params, jax.tree.map(lambda a: a[0], split), rng, keeps, teacher)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (first[1], {"loss": first[0][0]} | first[0][1]))
  return jax.lax.scan(add, zeros, (split, pieces_rng))[0]
