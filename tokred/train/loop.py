"""The training loop: from a config to a run directory.

Order of initialisation, and why: config and data first, for their errors are cheap; then the mesh; then parameters,
sharded from their first moment; then weights of another run over them; then the optimiser, whose state has the
parameters' shardings; last the checkpoint of this run, which overwrites all of it.
"""

import contextlib
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from tokred import checkpoint, evaluate, loading, lora, memory, pretrained, rates, run_dir, schedules, sharding
from tokred import data as tokred_data
from tokred.config import complete
from tokred.files import write_json
from tokred.model import Model, build, freeze, init
from tokred.train import signals
from tokred.train.alarms import Alarms
from tokred.train.log import MetricLog
from tokred.train.phase import TAUGHT, Phase, check
from tokred.train.step import transfer


class NonFiniteLoss(FloatingPointError):
  """A term of the loss is no longer a number."""


class Stopped(SystemExit):
  """SIGTERM or Ctrl-C came; everything is saved."""


@memory.advice(
  "raise config.train.accumulate (micro-batches of a step), lower config.train.batch_size, set config.model.remat=True "
  "or dtype='bfloat16', or share parameters over devices with config.mesh.fsdp"
)
def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Trains what `config` describes, or goes on where `workdir` was left.

  Args:
    config: with the fields of `tokred.config.default()`; those that are missing take their defaults.
    workdir: run directory: config.json, metrics.jsonl, TensorBoard events, checkpoints/ and, at the end, summary.json.

  Returns:
    The summary: what `tokred.evaluate` reports of the reduced model in the form that ships, and seconds.

  Raises:
    ValueError: an error in the config, before anything is compiled, or a run directory that another config or another
      run has.
    NonFiniteLoss: names the term; the last good checkpoint stays.
    MemoryError: names fields that help.
    Stopped: after SIGTERM or Ctrl-C, when all is saved.
  """
  if not os.fspath(workdir):
    raise ValueError("workdir='' is no directory; valid: where this run shall live, such as runs/digits")
  begin, workdir = time.monotonic(), Path(workdir)
  sharding.initialize_distributed()
  config = complete(config)
  words = Path(config.init) / run_dir.WORDS
  if config.init and words.exists() and not config.text.tokenizer:
    with config.unlocked():  # ids mean what they meant where the weights come from
      config.text.tokenizer = str(words)
  if config.init and config.model.name == "vlm" and not config.text.tokenizer:
    warnings.warn(f"{config.init} has no tokenizer: words of the training split get ids of their own", stacklevel=2)
  check(config)
  build(config)  # mistakes in the model and its sites are told before data are read
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(config.train.batch_size, mesh, config.train.accumulate)
  batches, eval_batches = _data(config)
  total = _num_steps(config, batches.num_examples)
  phase = Phase(config, mesh, total, rows=batches.rows)
  for kept in (config, phase.config):  # whoever loads the model shall know what its classes are called
    with kept.unlocked():
      kept.data.labels = kept.data.labels or tuple(eval_batches.label_names)
  run_dir.check_config(workdir, config)
  teacher = _teacher(phase)
  state = None if checkpoint.steps(workdir / checkpoint.FOLDER) else _first_state(phase)
  with run_dir.locked(workdir):  # only here: what fails before leaves no run that could be in the way
    _write_words(config, workdir)
    run_dir.write_config(workdir, config)
    saved = checkpoint.Checkpoints(workdir / checkpoint.FOLDER, config.train.keep_checkpoints)
    try:
      step = saved.latest_step() or 0
      if step:
        phase = _resumed(phase, workdir / checkpoint.FOLDER / str(step), total)
        state, data_state = saved.restore(phase.target, step)
        batches.set_state(data_state)
      with MetricLog(workdir, step or None) as log:
        if step:
          log.message(f"resuming {workdir} at step {step} of {total}")
        log.start(total, step, config.train.batch_size)
        run = _Run(phase, saved, log, eval_batches, total)
        place = sharding.batch_sharding(mesh)
        stream = tokred_data.to_device(batches, place, config.data.prefetch)
        state = run.steps(step, state, stream, teacher)
        result = run.evaluate(state, final=True)
    finally:
      batches.close()
      saved.close()
    summary = result | {"step": total, "seed": config.seed, "seconds": round(time.monotonic() - begin, 1)}
    if jax.process_index() == 0:
      write_json(workdir / "summary.json", summary)
  return summary


class _Run:
  """The loop itself: steps, the freezing of rates, logging, evaluation, checkpoints, signals."""

  def __init__(self, phase: Phase, saved: checkpoint.Checkpoints, log: MetricLog, eval_batches: Any, total: int):
    self.phase, self.saved, self.log, self.eval_batches, self.total = phase, saved, log, eval_batches, total
    self.alarms = Alarms(phase.module.sites, phase.mode, phase.config.rates.freeze_step)

  def steps(self, step: int, state: Any, stream: Iterator[tuple[Any, Any]], teacher: Any) -> Any:
    """Runs to the end, and returns the state.  Metrics of a step are fetched when the next one is under way."""
    c, last = self.phase.config, None
    with signals.Caught(self.total) as asked:
      while step < self.total:
        state = self._frozen(state, step)
        batch, data_state = next(stream)
        state, metrics = self.phase.step(state, batch, self.phase.keeps(step), teacher)
        step += 1
        self._report(last)
        last = (step, metrics)
        self.log.step(step)
        if c.train.eval_every and step % c.train.eval_every == 0 and step < self.total:
          last = self._report(last)
          result = self.evaluate(state)
          self.log.write(step, {name: result[name] for name in ("accuracy", "loss")}, prefix="eval/")
        leave, done = asked(step), step == self.total
        if step % c.train.checkpoint_every == 0 or done or leave:
          last = self._report(last)  # nothing is saved that is not known to be good
          state = self._frozen(state, step) if done else state
          self.saved.save(step, state, data_state=data_state, config=self.phase.config, wait=bool(leave) or done)
          leave = leave or (done and asked(step))  # the last one may take minutes
        if leave:
          name = signal.Signals(leave).name
          self.log.message(f"{name}: saved step {step} of {self.total}; the same command goes on from there")
          raise Stopped(128 + leave)
    return state

  def evaluate(self, state: Any, final: bool = False) -> dict[str, Any]:
    """On the evaluation split: in the form that ships at the end, with whatever compiles less before."""
    params = state.get("ema", state["params"])
    model = Model(self.phase.config, self.phase.module, lora.merge(params, self.phase.config.lora.alpha))
    model = freeze(model) if final else model
    if final:
      self._tell(model)
    result = evaluate.run(model.module, model.params, self.eval_batches, model.mode, self.phase.mesh)
    if not final:
      return result
    result |= {"image_tokens": model.module.left()} if model.config.model.name == "vlm" else {}
    return result | {"counts": list(model.counts), "gflops": model.flops / 1e9, "gmacs": model.macs / 1e9}

  def _frozen(self, state: Any, step: int) -> Any:
    """At `config.rates.freeze_step` learned rates become integers, and from there on survivors are gathered."""
    if self.phase.mode == "gather" or not 0 < self.phase.config.rates.freeze_step <= step:
      return state
    frozen = self._at_target(freeze(Model(self.phase.config, self.phase.module, state["params"])))
    config, sites = complete(frozen.config), self.phase.config.sites
    with config.unlocked():
      for name in {spot.site for spot in self.phase.module.spots if spot.type.training_only}:
        config.sites[name] = sites[name]  # its loss goes on; what ships is frozen once more
      config.train.mode = "gather"
      config.loss.budget = 0.0
    self._tell(frozen)
    self.phase = Phase(config, self.phase.mesh, self.total, frozen=True, rows=self.phase.rows)
    self.alarms = Alarms(self.phase.module.sites, self.phase.mode, config.rates.freeze_step)
    return transfer(state, self.phase.target)

  def _at_target(self, frozen: Model) -> Model:
    """With counts that meet the target, where all that is learned are counts of the encoder, and any count will do."""
    c, module = self.phase.config, self.phase.module
    learned = {spot.site for spot in module.spots if spot.rate in rates.LEARNED}
    counts = {spot.site for spot in module.sites.spots if spot.rate == "learned"}
    if not c.loss.budget or learned != counts or c.rates.multiple_of > 1:
      return frozen
    met = schedules.at_target(frozen, counts, c.loss.target, c.loss.target_unit)
    self.log.message(
      f"learned counts {frozen.counts} are scaled to the target of {c.loss.target:g} {c.loss.target_unit}"
    )
    return frozen.with_sites(met.sites.to_dict())

  def _tell(self, frozen: Model) -> None:
    """The schedule that rates have learned until now, if they have; summary.json has it too."""
    learned = sorted({spot.site for spot in self.phase.module.spots if spot.rate in rates.LEARNED})
    if learned:
      keep = "; ".join(f"sites.{name}.keep={frozen.config.sites[name].keep}" for name in learned)
      leaving = f"tokens leaving each block {frozen.counts}, {frozen.flops / 1e9:.3g} GFLOPs"
      self.log.message(f"rates are frozen: {leaving}; {keep}")

  def _report(self, last: tuple[int, Any] | None) -> None:
    """Looks at the metrics of a finished step: stops at a number that is none, writes every `log_every`-th."""
    if last is None:
      return
    step, metrics = last
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
    if bad:
      self.log.write(step, metrics)
      terms = [
        name for name, value in metrics.items() if not math.isfinite(value) and name not in ("loss", "grad_norm")
      ]
      with contextlib.suppress(checkpoint.CheckpointError):  # what it would say matters less
        self.saved.wait()
      good = self.saved.latest_step()
      raise NonFiniteLoss(
        f"step {step}: {', '.join(terms) or 'only the gradient'} of the loss is not finite "
        f"(loss={metrics['loss']}, grad_norm={metrics['grad_norm']}); "
        + ("no checkpoint was written before" if good is None else f"the last good checkpoint is step {good}")
        + "; lower config.optim.lr or set config.optim.clip_norm"
      )
    c = self.phase.config
    if step % c.train.log_every == 0 or step == self.total:
      lr = float(self.phase.schedule(step - 1))
      self.log.write(step, metrics | {"lr": lr} | self.log.speed())
      for alarm in self.alarms.new(metrics):
        self.log.message(f"alarm: {alarm}")


def _resumed(phase: Phase, folder: Path, total: int) -> Phase:
  """The phase of a checkpoint: where its rates were frozen it knows better, while other fields may have changed."""
  saved, config = run_dir.read_config(folder), phase.config
  if saved.train.mode == config.train.mode:
    return phase
  with config.unlocked():
    config.sites, config.train.mode, config.loss.budget = saved.sites, saved.train.mode, saved.loss.budget
  return Phase(config, phase.mesh, total, frozen=True, rows=phase.rows)


def _num_steps(config: ConfigDict, num_examples: int) -> int:
  """`train.steps`, or `train.epochs` over so many examples."""
  c = config.train
  if c.steps:
    return c.steps
  steps = int(c.epochs * num_examples / c.batch_size)
  if steps < 1:
    raise ValueError(f"config.train.epochs={c.epochs} is less than one step of batch_size={c.batch_size}")
  return steps


def _data(config: ConfigDict) -> tuple[Any, Any]:
  """Batches of this process: endless ones to train on, and those of the evaluation split."""
  count, devices = jax.process_count(), jax.device_count()
  common = dict(process_index=jax.process_index(), process_count=count)
  size = -(-config.eval.batch_size // devices) * devices // count  # whole examples for every device
  return (
    tokred_data.feed(
      config, config.data.train_split, train=True, batch_size=config.train.batch_size // count, **common
    ),
    tokred_data.feed(config, config.data.eval_split, train=False, batch_size=size, **common),
  )


def _write_words(config: ConfigDict, workdir: Path) -> None:
  """The words that a tokenizer was made of stay with the run; those of a checkpoint, whatever the data are now."""
  if config.model.name == "vlm" and jax.process_index() == 0 and not checkpoint.steps(workdir / checkpoint.FOLDER):
    words = tokred_data.tokenizer(config)
    if hasattr(words, "write"):  # the files of a checkpoint's own tokenizer stay where they are
      workdir.mkdir(parents=True, exist_ok=True)
      words.write(workdir / run_dir.WORDS)


def _first_state(phase: Phase) -> Any:
  """State at step 0, sharded; weights of `config.init` over what was drawn."""
  c = phase.config
  if c.init:  # before anything is compiled: it may be another model's
    loaded = loading.read(c.init, jax.eval_shape(lambda: init(phase.module, c.seed)), c.model)
  params = sharding.init_sharded(lambda: init(phase.module, c.seed), mesh=phase.mesh, rules=phase.rules)
  if c.init:
    params = loading.into(params, loaded, f"config.init={c.init}")
  return jax.jit(phase.new_state, out_shardings=phase.shardings)(params)


def _teacher(phase: Phase) -> Any:
  """Parameters of the dense teacher by path, or None where no term asks for one.

  Each device holds its part of them only, and the student's frozen ones are left out where both come from one file:
  the step takes the student's.
  """
  c = phase.config
  if not any(c.loss[name] for name in TAUGHT):
    return None
  path = c.teacher or c.init
  target = jax.eval_shape(lambda: init(phase.teacher, c.seed))
  places = sharding.spread(target, phase.mesh)
  target = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), target, places)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a head that is drawn anew is told of where the student is loaded
    loaded = loading.read(path, target, c.model)
  anew = [name for name, leaf in traverse_util.flatten_dict(loaded, sep="/").items() if leaf is pretrained.ANEW]
  if anew and c.loss.distill_logits:
    raise ValueError(
      f"config.loss.distill_logits={c.loss.distill_logits}, but the teacher {path} has no head of "
      f"config.model.num_classes={c.model.num_classes}; fine-tune the dense model first and name it in config.teacher, "
      "or set the weight to 0.0"
    )
  if anew:  # nobody reads this head
    target = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), target)
  params = loading.into(target, loaded, f"config.teacher={path}")
  shared = phase.frozen if path == c.init else frozenset()
  return {name: leaf for name, leaf in traverse_util.flatten_dict(params, sep="/").items() if name not in shared}
