"""What commands with absl's flags have in common: whatever a user can mend is told in one line."""

import functools
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging


def run(main: Callable[[], None], name: str, required: Sequence[str]) -> None:
  """Parses the command line, calls `main` and leaves the process.

  Args:
    main: the command; a ValueError, ArithmeticError, OSError or MemoryError is for the user to mend, all else a bug.
    name: of the command, before each message.
    required: flags that must be given.
  """

  def call(argv: list[str]) -> None:
    if len(argv) > 1:
      sys.exit(f"{name}: unexpected argument {argv[1]!r}; flags begin with --")
    logging.set_verbosity(logging.WARNING)  # else JAX tells of every backend that this machine does not have
    try:
      main()
    except (ValueError, ArithmeticError, OSError, MemoryError) as error:
      sys.exit(f"{name}: {' '.join(str(error).split())}")

  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process, and shows no traceback
  flags.mark_flags_as_required(required)
  app.run(call, flags_parser=functools.partial(_parse, name))


def _parse(name: str, argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      hasattr(flags.FLAGS.config, "keys")  # what stands for a file that could not be read raises here
    return rest
  except Exception as error:  # a recipe is a program, which may raise anything
    sys.exit(f"{name}: {' '.join(_told(error).split())}")


def _told(error: BaseException) -> str:
  """What is wrong with a flag, or with a recipe and where in it."""
  each: BaseException | None = error
  while each:  # absl and ml_collections wrap what a recipe raises
    frames = list(traceback.walk_tb(each.__traceback__))
    recipe = [frame for frame, _ in frames if frame.f_globals.get("__name__") == "config_config"]
    if recipe:
      folder = Path(recipe[0].f_code.co_filename).parent  # recipes share code with those beside them
      files = [(frame.f_code.co_filename, line) for frame, line in frames]
      file, line = [where for where in files if Path(where[0]).parent == folder][-1]
      return f"{type(each).__name__}: {_plain(each)} ({file}, line {line})"
    each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
  if isinstance(error, flags.Error):
    return str(error).strip().splitlines()[-1]
  if isinstance(error, OSError):
    return str(error).rpartition("failure to load: ")[2]
  if isinstance(error, (AttributeError, KeyError)):
    if getattr(error, "name", "") == "get_config":
      return "the file of --config has no function get_config; valid: a recipe such as configs/digits.py"
    return f"the config has no field {_plain(error)}"
  return f"{type(error).__name__}: {error}"


def _plain(error: BaseException) -> str:
  """Its text; ml_collections puts errors into errors."""
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  return str(error.args[0] if isinstance(error, KeyError) and error.args else error)
