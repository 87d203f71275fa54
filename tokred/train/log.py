"""What a run leaves to read: metrics.jsonl, TensorBoard events and the progress bar."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

_FLUSH_SECONDS = 10.0  # TensorBoard's file is synced to disk when flushed; metrics.jsonl is flushed at every line
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class MetricLog:
  """Writes the metrics of one run; a context manager.

      with MetricLog(workdir, resume_step=100) as log:
        log.start(total_steps=1000, first_step=100, images_per_step=128)
        ...
        log.step(101)
        log.write(120, {"loss": loss} | log.speed())

  `metrics.jsonl` has one JSON object a line: `{"step": 120, "train/loss": 0.5, "speed/images_per_second": 900.0}`.
  JSON knows no NaN: a number that is not finite is null, and its name is in the list `nonfinite` of that line.
  All that depends on the clock is named `speed/...`; the rest of a resumed run's file equals that of a run that was
  never stopped, provided that the metrics of a step are written before its checkpoint is.

  Args:
    workdir: run directory; made if it is missing.
    resume_step: step of the checkpoint that the run goes on from: lines of later steps, and a last line that was cut
      short, are dropped, and TensorBoard is told to forget them. None: the log starts anew.
    active: whether this process writes; None: only process 0 does. Methods of an inactive log do nothing.

  Raises:
    OSError: `workdir` cannot be written, here or in `write` (a full disk), with the path in the message.
  """

  # Not tensorboardX's SummaryWriter: its writing thread dies of a full disk in silence, and the run then waits for
  # room in its queue for ever. EventsWriter is the same writer without the thread.

  def __init__(self, workdir: str | os.PathLike[str], resume_step: int | None = None, active: bool | None = None):
    self._active = jax.process_index() == 0 if active is None else active
    self._bar: tqdm | None = None
    self._first: tuple[int, float] | None = None  # step that this process made first, and when
    self._loss: float | None = None
    self._images_per_step = 0
    self._done = self._timed_step = 0
    self._timed_at = self._flushed_at = time.monotonic()
    if not self._active:
      return
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    first_dropped = 0 if resume_step is None else resume_step + 1
    self._path = workdir / "metrics.jsonl"
    _drop_lines(self._path, first_dropped)
    self._file = self._path.open("a", encoding="utf-8")
    # the suffix keeps two starts within one second from sharing a file
    self._events = EventsWriter(str(workdir / "events"), filename_suffix=f".{os.getpid()}.{first_dropped}")
    start = SessionLog(status=SessionLog.START)  # makes TensorBoard forget this step and later ones
    self._events.write_event(Event(step=first_dropped, wall_time=time.time(), session_log=start))

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    try:
      self.close()
    except OSError:
      if error is None:  # else the first error says more
        raise

  def close(self) -> None:
    """Writes what is pending and closes bar and files; may be called twice."""
    if not self._active:
      return
    self._active = False
    if self._bar is not None:
      self._bar.close()
    try:
      self._file.close()
    finally:
      self._events.close()

  def start(self, total_steps: int, first_step: int, images_per_step: int) -> None:
    """Shows the bar.

    Args:
      total_steps: steps of the whole run.
      first_step: steps made by earlier runs, 0 for a new one.
      images_per_step: images of one step over all processes.
    """
    self._images_per_step = images_per_step
    self._done = self._timed_step = first_step
    self._timed_at = time.monotonic()
    if self._active:
      # where the bar is not a terminal's but goes to a file, every refresh stays in it
      interval = 0.1 if sys.stderr.isatty() else 5.0
      self._bar = tqdm(
        total=total_steps, initial=first_step, mininterval=interval, miniters=1, unit=" steps", bar_format=_BAR,
        file=sys.stderr, dynamic_ncols=sys.stderr.isatty(),
      )  # fmt: skip

  def step(self, step: int) -> None:
    """Moves the bar to `step` steps made."""
    moved, self._done, now = step - self._done, step, time.monotonic()
    if self._bar is None or not self._active:
      return
    if self._first is None:  # it compiles, and says nothing of the speed of others
      self._first, self._bar.n = (step, now), step
      self._bar.last_print_n, self._bar.last_print_t = step, time.time()
      self._bar.refresh()
      return
    rate = self._bar.format_dict["rate"] or (step - self._first[0]) / max(now - self._first[1], 1e-9)
    loss = "" if self._loss is None else f"loss {self._loss:.4g}, "
    self._bar.set_postfix_str(f"{loss}{rate * self._images_per_step:.0f} images/s", refresh=False)
    self._bar.update(moved)

  def speed(self) -> dict[str, float]:
    """Steps and images per second of wall-clock time, all included, since `start` or the last call."""
    now = time.monotonic()
    rate = (self._done - self._timed_step) / max(now - self._timed_at, 1e-9)
    self._timed_step, self._timed_at = self._done, now
    return {"speed/steps_per_second": rate, "speed/images_per_second": rate * self._images_per_step}

  def write(self, step: int, metrics: Mapping[str, Any], prefix: str = "train/") -> None:
    """Adds a line of metrics; `loss` of prefix `train/` is shown beside the bar.

    Args:
      step: steps made.
      metrics: scalars by name; arrays are fetched, so those of a step still running are waited for.
      prefix: put before every name, except names that begin with `speed/`.

    Raises:
      TypeError: a value that is not a scalar.
      OSError: the line could not be written.
    """
    if not self._active:
      return
    values = {(name if name.startswith("speed/") else prefix + name): _number(name, v) for name, v in metrics.items()}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    line: dict[str, Any] = {"step": int(step)} | {name: finite.get(name) for name in values}
    if len(finite) < len(values):
      line["nonfinite"] = [name for name in values if name not in finite]
    try:
      self._file.write(json.dumps(line, allow_nan=False) + "\n")
      self._file.flush()
      for name, value in finite.items():
        self._events.write_event(Event(step=int(step), wall_time=time.time(), summary=scalar(name, value)))
      if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
        self._events.flush()
        self._flushed_at = time.monotonic()
    except OSError as error:
      raise OSError(
        error.errno, f"cannot write the metrics of step {step}: {error.strerror}", str(self._path)
      ) from None
    if prefix == "train/":
      self._loss = finite.get("train/loss", self._loss)

  def message(self, text: str) -> None:
    """Prints a line above the bar."""
    if self._active:
      tqdm.write(text, file=sys.stderr)


def _number(name: str, value: Any) -> float:
  try:
    return float(value)
  except (TypeError, ValueError):
    got = f"of shape {value.shape}" if hasattr(value, "shape") else repr(value)
    raise TypeError(f"metric {name!r} is {got}; valid: a scalar") from None


def _drop_lines(path: Path, first_dropped: int) -> None:
  """Keeps the lines of steps before `first_dropped`; whole file or nothing, should the process die meanwhile."""
  if not path.exists():
    return
  kept = [
    line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _step(line) < first_dropped
  ]
  rewritten = path.with_name(path.name + ".partial")
  rewritten.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
  rewritten.replace(path)


def _step(line: str) -> float:
  """The step of a line; infinite where the line was cut short."""
  try:
    return int(json.loads(line)["step"])
  except (ValueError, TypeError, KeyError):
    return math.inf
