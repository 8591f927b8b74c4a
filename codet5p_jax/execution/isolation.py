"""The command that starts a sandbox: Python in namespaces of its own."""

import dataclasses
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from codet5p_jax.errors import UserError
from codet5p_jax.execution.inside.confinement import Limits

BUBBLEWRAP = 'bubblewrap'
NONE = 'none'
KINDS = (BUBBLEWRAP, NONE)

_INSIDE = Path(__file__).parent / 'inside'
_WHERE = '/program'  # Where `inside` lies in the sandbox.
# All there is of an environment. Which order a set of texts has must not decide
# whether a program passes; that is also why the interpreter is not started with
# -I, which would leave this out.
ENVIRONMENT = {'PYTHONHASHSEED': '0'}
_START = 'import sys; sys.path.append(sys.argv[1]); from inside import zygote; '
_START += 'zygote.main(sys.argv[2])'


def sandbox_command(
    kind: str, limits: Limits, folder: Path, telling: int
) -> list[str]:
  """The command of one sandbox.

  Args:
    kind: one of KINDS.
    limits: of each process in it.
    folder: where programs may write if it is not isolated.
    telling: a descriptor for what bubblewrap tells of the first process inside.

  Raises:
    UserError: bubblewrap is missing.
  """
  if kind == NONE:
    return _python(str(_INSIDE.parent), limits, filtered=False, folder=folder)
  program = shutil.which('bwrap')
  if program is None:
    raise UserError(
        'expected bubblewrap for a sandbox, found no bwrap on this machine; '
        'install it (the Debian package is named bubblewrap: apt-get install '
        'bubblewrap), or spell out --sandbox=none to run what the model wrote '
        'with all your rights'
    )
  command = [
      program, '--unshare-all', '--die-with-parent', '--new-session',
      '--cap-drop', 'ALL', '--hostname', 'sandbox', '--info-fd', str(telling),
  ]  # fmt: skip
  for path in _readable():
    command += ['--ro-bind', str(path), str(path)]
  for path in _hidden():
    command += ['--size', '4096', '--tmpfs', str(path), '--remount-ro',
                str(path)]  # fmt: skip
  command += ['--ro-bind', str(_INSIDE), f'{_WHERE}/{_INSIDE.name}']
  for device in ('null', 'zero', 'random', 'urandom'):
    command += ['--dev-bind', f'/dev/{device}', f'/dev/{device}']
  # The root is a folder in memory too, of no bound, so it is closed last. How
  # many files /tmp may hold bubblewrap cannot say: their time alone bounds it.
  command += ['--size', str(limits.file_bytes), '--tmpfs', '/tmp',
              '--remount-ro', '/', '--chdir', '/tmp']  # fmt: skip
  return command + _python(_WHERE, limits, filtered=True, folder=Path('/tmp'))


def _python(
    path: str, limits: Limits, filtered: bool, folder: Path
) -> list[str]:
  settings = json.dumps({
      'filtered': filtered,
      'limits': dataclasses.asdict(limits),
      'folder': str(folder),
  })  # fmt: skip
  return [_interpreter(), '-P', '-s', '-S', '-B', '-c', _START, path, settings]


def _interpreter() -> str:
  """The interpreter itself, not the link in a virtual environment."""
  return os.path.realpath(getattr(sys, '_base_executable', sys.executable))


def _readable() -> Iterator[Path]:
  """An interpreter and the shared objects that it loads, nothing else."""
  base = Path(sys.base_prefix)
  shared_objects = base.glob('lib/*.so*') if base != Path('/usr') else ()
  system = map(Path, ('/lib', '/lib64', '/usr/lib', '/usr/lib64',
                      '/etc/ld.so.cache'))  # fmt: skip
  for path in (*system, Path(_interpreter()), *_standard_library(),
               *shared_objects):  # fmt: skip
    if path.exists():
      yield path


def _hidden() -> Iterator[Path]:
  """What lies within the readable, and holds packages of the user."""
  of_the_system = Path('/usr').glob('lib*/python3*')
  for library in {*_standard_library(), *of_the_system}:
    for name in ('site-packages', 'dist-packages'):
      path = library / name
      if path.is_dir():
        yield path


def _standard_library() -> set[Path]:
  # Of the interpreter itself: in a virtual environment `platstdlib` is the
  # folder of its packages.
  base = {'base': sys.base_prefix, 'platbase': sys.base_exec_prefix}
  return {
      Path(sysconfig.get_path(name, vars=base))
      for name in ('stdlib', 'platstdlib')}
