"""The command `codet5p`, also `python -m codet5p_jax.main`.

A subcommand is the function of its name in the module of its name in `runs/`.
Those of training and inference take their arguments from gin files; the others
take flags, which are the arguments of the function. To add one, add its line
to `SUBCOMMANDS`.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence

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
  # last one such as 'prompts...' takes all further words, if any, as a tuple.
  flags: tuple[str, ...] = ()  # With gin: parameters that are flags as well.


SUBCOMMANDS = {
    'info': Subcommand('count the parameters of a model', gin=True),
    'train': Subcommand(
        'pretrain or fine-tune a model', gin=True,
        flags=('coordinator_address', 'num_processes', 'process_id',
               'join_seconds')),
    'evaluate': Subcommand('score a trained model on a task', gin=True),
    'generate': Subcommand(
        'complete prompts, or fill their gaps, with a trained model', gin=True,
        words=('prompts...',)),
    'precompile': Subcommand(
        'compile a step or what generates for a TPU not at hand',
        gin=True, flags=('report',)),
    'report': Subcommand('tell in words and curves how a run went'),
    'replay': Subcommand('make a step of a run again, to find what was wrong'),
    'prepare_corpus': Subcommand('make a corpus folder from source code'),
    'prepare_task': Subcommand(
        'make pairs and problems of the file of a benchmark'),
    'postprocess': Subcommand('make programs of what a model wrote'),
    'score': Subcommand(
        'score what a model wrote', words=('metric',)),
    'inspect_data': Subcommand('show decoded examples of a task'),
    'train_vocabulary': Subcommand('train a vocabulary on source code'),
    'convert': Subcommand(
        'bring a checkpoint of Hugging Face in, or a model out',
        words=('source', 'target')),
}

_WIDTH = 2 + max(map(len, SUBCOMMANDS))

_GIN_HELP = """\
  --gin_file=FILE        a gin file, here or among those below; repeatable,
                         later ones override earlier ones
  KEY=value              sets a macro of the gin files, as in TRAIN_STEPS=1000
  --gin.NAME=value       sets any parameter, as in --gin.T5Config.num_heads=8
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
    The exit status: 0, 2 after a mistake of the user, 69 where something is
    missing that may come by itself, 75 where the machine was
    about to be taken away and a run was saved, 130 after Control-C, 141 when
    nobody reads the output any more. Any other error is a bug, and is raised.
    Where several processes run together, those that wait for this one end with
    the same status.
  """
  try:
    _run(list(sys.argv[1:] if argv is None else argv))
    sys.stdout.flush()
    return 0
  except errors.UserError as error:
    words = ' '.join(str(error).split('\n'))
    print('codet5p:', words, file=sys.stderr)
    is_missing = isinstance(error, errors.Unavailable)
    return _leave(errors.UNAVAILABLE_STATUS if is_missing else 2, words)
  except errors.Preempted as notice:
    print('codet5p:', notice, file=sys.stderr)
    return _leave(errors.PREEMPTED_STATUS)  # All know.
  except KeyboardInterrupt:
    print('codet5p: interrupted', file=sys.stderr)
    return _leave(130, 'it was interrupted')
  except BrokenPipeError:
    # Python flushes standard output once more at its exit, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _leave(141, 'nobody reads its output any more')
  except Exception as error:
    words = ' '.join(f'{type(error).__name__}: {error}'.split())
    _leave(1, words, traceback.format_exc())
    raise


def _leave(status: int, words: str = '', trace: str = '') -> int:
  """Takes leave of other processes, see training/distributed.py.

  Args:
    status: to exit with.
    words: for the others.
    trace: to print if this process is not to come back from there.
  """
  if 'jax' in sys.modules:  # Otherwise it cannot be one of several.
    from codet5p_jax.training import distributed
    distributed.leave(status, words, trace)
  return status


def _run(argv: list[str]) -> None:
  name, *rest = argv or ['--help']
  if name in ('-h', '--help', 'help'):
    print(_overview())
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
  typed = _understand(argv, gin=True)
  _check_flags(name, typed.flags, SUBCOMMANDS[name].flags)
  for gin_file in typed.gin_files:
    gin_paths.locate(gin_file)
  words = _given_words(name, typed.words, required=True)
  function = _function(name)
  given = _converted(function, {**words, **typed.flags})
  if 'operative_config' in inspect.signature(function).parameters:
    given['operative_config'] = None  # Below; that it is given counts here.
  from codet5p_jax import configuration
  configuration.load(
      typed.gin_files, typed.macros, typed.bindings, function, given)
  if 'operative_config' in given:
    # A function: it is complete only once the run has built its parts.
    given['operative_config'] = configuration.operative_config
  configuration.call(function, **given)


def _run_with_flags(name: str, argv: Sequence[str]) -> None:
  """Runs a function whose arguments are the flags."""
  function = _function(name)
  parameters = inspect.signature(function).parameters
  hints = arguments.type_hints(function)
  switches = [n for n in parameters if arguments.accepts(hints.get(n), True)]
  typed = _understand(argv, gin=False, switches=switches)
  _check_flags(name, typed.flags, parameters)
  words = _given_words(name, typed.words, required=False)
  given = _converted(function, {**words, **typed.flags})
  missing = [f'--{parameter}' for parameter, p in parameters.items()
             if p.default is p.empty and parameter not in given]
  if missing:
    raise errors.UserError(
        f'{name} needs {", ".join(missing)}; give {missing[0]}=value')
  function(**given)


def _understand(
    argv: Sequence[str], gin: bool, switches: Collection[str] = ()
) -> _Typed:
  """Sorts the arguments after the subcommand.

  Args:
    argv: the arguments; all that follow `--` are words.
    gin: whether gin files, macros and bindings are meant.
    switches: the flags that need no value.

  Raises:
    UserError: an argument is malformed.
  """
  typed = _Typed([], {}, [], {}, [])
  waiting = list(argv)
  while waiting:
    argument = waiting.pop(0)
    name, equals, value = argument.partition('=')
    if argument == '--':
      typed.words += waiting
      break
    if gin and argument.startswith('--gin.'):
      typed.bindings.append(argument.removeprefix('--gin.'))
    elif re.match('--[a-z]', argument):
      flag = name[2:]
      if not equals:
        bare = flag in switches or not waiting or waiting[0].startswith('--')
        value = None if bare else waiting.pop(0)
      if not (gin and flag == 'gin_file'):
        typed.flags[flag] = value
      elif value:
        typed.gin_files.append(value)
      else:
        raise errors.UserError('--gin_file needs a file: --gin_file=FILE')
    elif gin and equals and re.fullmatch('[A-Z][A-Z0-9_]*', name):
      typed.macros[name] = value
    elif re.match('-[-A-Za-z]', argument):
      raise errors.UserError(
          f'{argument} is no flag; flags are --words_like_this=value, and text '
          f'that begins with - follows --')
    else:
      typed.words.append(argument)
  return typed


def _check_flags(
    name: str, flags: Collection[str], known: Collection[str]
) -> None:
  for flag in flags:
    if flag not in known:
      named = [*known, *(['gin_file'] if SUBCOMMANDS[name].gin else [])]
      nearest = arguments.nearest(f'--{flag}', [f'--{n}' for n in named])
      raise errors.UserError(f'{name} has no flag --{flag}{nearest}')


def _given_words(
    name: str, words: Sequence[str], required: bool
) -> dict[str, object]:
  """The words that stand without a flag, by the parameter that takes them.

  Raises:
    UserError: too few words where they are `required`, or too many.
  """
  waiting, given = list(words), {}
  expected = f'expected codet5p {name} {_usage_words(name)}'.strip()
  for parameter in SUBCOMMANDS[name].words:
    if parameter.endswith('...'):
      given[parameter.removesuffix('...')] = tuple(waiting)
      waiting = []
    elif waiting:
      given[parameter] = waiting.pop(0)
    elif required:
      raise errors.UserError(f'{expected}, found nothing after {name}')
  if waiting:
    raise errors.UserError(
        f'{expected} and macros KEY=value or flags --name=value, '
        f'found {waiting[0]}')
  return given


def _converted(
    function: Callable, typed: Mapping[str, object]
) -> dict[str, object]:
  """What was typed, as the parameters of `function` take it."""
  hints = arguments.type_hints(function)
  given = {}
  for parameter, text in typed.items():
    hint = hints.get(parameter, object)
    if text is None and not arguments.accepts(hint, True):
      raise errors.UserError(
          f'--{parameter} expects {arguments.describe(hint)}, found nothing; '
          f'give --{parameter}=value')
    text = True if text is None else text
    given[parameter] = arguments.value_for(text, [hint], f'--{parameter}')
  return given


def _function(name: str) -> Callable:
  """Imports the function of a subcommand."""
  _use_cpu_where_nothing_else_is()
  _speak_for_ourselves()
  return getattr(importlib.import_module(f'codet5p_jax.runs.{name}'), name)


def _speak_for_ourselves() -> None:
  """Shows what our runs log, and of other libraries only warnings."""
  import logging

  logging.basicConfig(
      level=logging.WARNING, format='%(message)s', stream=sys.stderr)
  logging.getLogger('codet5p_jax').setLevel(logging.INFO)
  # Where a disk is full, Orbax raises what one of its tasks found, and logs
  # hundreds of lines about all of them, with absl and asyncio.
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # Who has put another in its place knows why.
  if sys.unraisablehook is sys.__unraisablehook__:
    sys.unraisablehook = _leave_out_closed_loops


def _leave_out_closed_loops(unraisable) -> None:
  """Leaves out what TensorStore prints of writes whose task has failed."""
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def _use_cpu_where_nothing_else_is(
    devices: pathlib.Path = pathlib.Path('/dev'),
    pci: pathlib.Path = pathlib.Path('/sys/bus/pci/devices'),
) -> None:
  """Spares a machine without accelerators the search for a TPU.

  Where libtpu is installed (compiling for a TPU ahead of time needs it), JAX
  loads it to look for a TPU, and libtpu then prints errors about accelerator
  types and worker hostnames, harmless but alarming, before JAX falls back to
  the CPU. The user's own JAX_PLATFORMS is left as it is, and so is a machine
  with any sign of an accelerator: a Google PCI device other than a network
  card or a disk, or a GPU.

  Args:
    devices: the folder of device files.
    pci: the folder of PCI devices.
  """
  if 'JAX_PLATFORMS' in os.environ or not importlib.util.find_spec('libtpu'):
    return
  accelerators = ('accel*', 'vfio/[0-9]*', 'nvidia*', 'kfd', 'dxg')
  if any(any(devices.glob(pattern)) for pattern in accelerators):
    return
  for vendor in pci.glob('*/vendor'):
    kind = (vendor.parent / 'class').read_text().strip()
    is_google = vendor.read_text().strip() == '0x1ae0'
    if is_google and not kind.startswith(('0x01', '0x02')):
      return
  os.environ['JAX_PLATFORMS'] = 'cpu'


def _overview() -> str:
  lines = [f'  {name:<{_WIDTH}}{subcommand.summary}'
           for name, subcommand in SUBCOMMANDS.items()]
  return '\n'.join([
      'usage: codet5p SUBCOMMAND ...', '', codet5p_jax.__doc__.strip(), '',
      *lines, '', 'codet5p SUBCOMMAND --help says more; codet5p --version.'])


def _usage_words(name: str) -> str:
  return ' '.join(SUBCOMMANDS[name].words).upper()


def _gin_help(name: str) -> str:
  subcommand = SUBCOMMANDS[name]
  flags = [f'[--{flag}=VALUE]' for flag in subcommand.flags]
  files = textwrap.fill(
      ' '.join(gin_paths.shipped()), 80, initial_indent='  ',
      subsequent_indent='  ', break_on_hyphens=False)
  usage = filter(None, (
      'usage: codet5p', name, _usage_words(name), '--gin_file=FILE ...',
      '[KEY=value ...]', *flags))
  return '\n'.join([
      ' '.join(usage), '', f'{name}: {subcommand.summary}.', '', _GIN_HELP,
      'gin files that come with it; their macros are yours to set:', files])


def _flag_help(name: str) -> str:
  """The flags of a subcommand, from its function's signature and docstring."""
  function = _function(name)
  summary, _, rest = inspect.getdoc(function).partition('\n')
  described = _described_arguments(rest)
  hints = arguments.type_hints(function)
  usage = filter(None, ('usage: codet5p', name, _usage_words(name),
                        '[--flag=value ...]'))
  lines = [' '.join(usage), '', summary, '']
  for parameter, p in inspect.signature(function).parameters.items():
    kind = arguments.describe(hints.get(parameter, object))
    default = 'required' if p.default is p.empty else f'default {p.default!r}'
    lines.append(f'  --{parameter}  ({kind}; {default})')
    lines.append(textwrap.fill(
        described.get(parameter, ''), 80, initial_indent=' ' * 6,
        subsequent_indent=' ' * 6))
  return '\n'.join(line for line in lines if line.strip() or not line)


def _described_arguments(docstring: str) -> dict[str, str]:
  """What a Google docstring's `Args:` says of each argument."""
  section = re.search(r'^Args:\n((?:(?: .*)?\n?)*)', docstring, re.MULTILINE)
  entries = re.findall(
      r'^  (\w+): (.*(?:\n    .*)*)', section[1] if section else '',
      re.MULTILINE)
  return {name: ' '.join(text.split()) for name, text in entries}


if __name__ == '__main__':
  sys.exit(main())
