"""The command `codet5p`, also `python -m codet5p_jax.main`.

A subcommand is the function of its name in the module of its name in `runs/`.
Those of training and inference take their arguments from gin files; the others
take flags, which are the arguments of the function. To add one, add its line
to `SUBCOMMANDS`.
"""

import dataclasses
import glob
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

import codet5p_jax
from codet5p_jax import arguments
from codet5p_jax import errors
from codet5p_jax import gin_paths

# jax, gin and the runs are imported once the arguments are understood: help
# and slips of the hand are answered at once.


@dataclasses.dataclass(frozen=True)
class Subcommand:
  """One subcommand."""

  summary: str  # A line for --help.
  gin: bool = False  # Configured by gin files; otherwise by flags.
  words: tuple[str, ...] = ()  # Parameters given without a flag, in order; a
  # last one such as 'prompts...' takes all further words, as a tuple.
  flags: tuple[str, ...] = ()  # With gin: parameters that are flags as well.


SUBCOMMANDS = {
    'info': Subcommand('count the parameters and bytes of a model', gin=True),
    'train': Subcommand('pretrain or fine-tune a model', gin=True),
    'evaluate': Subcommand('score a trained model on a task', gin=True),
    'generate': Subcommand(
        'complete prompts with a trained model', gin=True,
        words=('prompts...',)),
    'precompile': Subcommand(
        'compile a training step for a TPU that is not at hand', gin=True,
        flags=('report',)),
    'prepare_corpus': Subcommand('make a corpus folder from source code'),
}

_GIN_HELP = """\
  --gin_file=FILE        a gin file, here or among those below; repeatable,
                         later ones override earlier ones
  KEY=value              sets a macro of the gin files, as in TRAIN_STEPS=1000
  --gin.NAME=value       sets any parameter, as in --gin.T5Config.dropout_rate=0
Values are Python literals; anything else is a string and needs no quotes.
"""


@dataclasses.dataclass
class _Typed:
  """What follows the subcommand."""

  words: list[str]
  flags: dict[str, str | None]  # None where no value follows.
  gin_files: list[str]
  macros: dict[str, str]
  bindings: list[str]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a subcommand.

  Args:
    argv: the arguments, without the name of the program.

  Returns:
    The exit status: 0, 2 after a mistake of the user, 130 after Control-C, 141
    when nobody reads the output any more. Any other error is a bug, and is
    raised.
  """
  try:
    _run(list(sys.argv[1:] if argv is None else argv))
    sys.stdout.flush()
    return 0
  except errors.UserError as error:
    print('codet5p:', ' '.join(str(error).split('\n')), file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('codet5p: interrupted', file=sys.stderr)
    return 130
  except BrokenPipeError:
    # Python flushes standard output once more at its exit, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _run(argv: list[str]) -> None:
  name, *rest = argv or ['--help']
  if name in ('-h', '--help', 'help'):
    print(_overview(), end='')
  elif name == '--version':
    print(f'codet5p {codet5p_jax.__version__}')
  elif name not in SUBCOMMANDS:
    raise errors.UserError(
        f'no subcommand {name}{arguments.nearest(name, SUBCOMMANDS)}')
  elif _asks_for_help(rest):
    print(_gin_help(name) if SUBCOMMANDS[name].gin else _flag_help(name))
  elif SUBCOMMANDS[name].gin:
    _run_with_gin(name, rest)
  else:
    _run_with_flags(name, rest)


def _asks_for_help(argv: Sequence[str]) -> bool:
  before = argv[:argv.index('--')] if '--' in argv else argv
  return '-h' in before or '--help' in before


def _run_with_gin(name: str, argv: Sequence[str]) -> None:
  """Runs a function with what gin files, macros and flags give it."""
  subcommand = SUBCOMMANDS[name]
  typed = _understand(argv, gin=True)
  for flag in typed.flags:
    if flag not in subcommand.flags:
      known = ['gin_file', *subcommand.flags]
      macro = f'; a macro is set by {flag}=value' if flag.isupper() else ''
      raise errors.UserError(
          f'{name} has no flag --{flag}{macro or _nearest_flag(flag, known)}')
  given = _words_and_flags(name, typed)
  for gin_file in typed.gin_files:
    gin_paths.locate(gin_file)
  _use_cpu_where_nothing_else_is()
  from codet5p_jax import configuration
  function = _function(name)
  hints = arguments.type_hints(function)
  for flag in typed.flags:
    given[flag] = arguments.value_for(
        given[flag], [hints.get(flag, object)], f'--{flag}')
  if 'operative_config' in inspect.signature(function).parameters:
    # A function: it is complete only once the run has built its parts.
    given['operative_config'] = configuration.operative_config
  configuration.load(
      typed.gin_files, typed.macros, typed.bindings, function, given)
  configuration.call(function, **given)


def _run_with_flags(name: str, argv: Sequence[str]) -> None:
  """Runs a function whose arguments are the flags."""
  typed = _understand(argv, gin=False)
  _use_cpu_where_nothing_else_is()
  function = _function(name)
  parameters = inspect.signature(function).parameters
  hints = arguments.type_hints(function)
  for flag, text in typed.flags.items():
    if flag not in parameters:
      raise errors.UserError(
          f'{name} has no flag --{flag}{_nearest_flag(flag, parameters)}')
    if text is None and arguments.accepts(hints.get(flag, object), True):
      typed.flags[flag] = 'True'
  given = _words_and_flags(name, typed)
  for parameter, value in given.items():
    given[parameter] = arguments.value_for(
        value, [hints.get(parameter, object)], f'--{parameter}')
  missing = [f'--{parameter}' for parameter, p in parameters.items()
             if p.default is p.empty and parameter not in given]
  if missing:
    raise errors.UserError(
        f'{name} needs {" and ".join(missing)}; give {missing[0]}=value')
  function(**given)
