import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from codet5p_jax.corpus.executors import Beam, Processes
from codet5p_jax.corpus.units import Unit
from codet5p_jax.errors import UserError
from codet5p_jax.storage import StorageFault

UNITS = [Unit('files', str(number), 1) for number in range(7)]
EXECUTORS = [Processes(1), Processes(2), Beam('DirectRunner')]


@dataclasses.dataclass(frozen=True)
class Note:
  """Makes a folder a unit, or does what the path of the unit says."""

  target: str

  def folder(self, index: int) -> pathlib.Path:
    return pathlib.Path(self.target, str(index))

  def __call__(self, index: int, unit: Unit) -> None:
    if unit.path == 'mistake':
      raise UserError('a mistake')
    if unit.path == 'full':
      raise StorageFault('no room')
    if unit.path == 'bug':
      raise ZeroDivisionError
    if unit.path == 'killed':
      os.kill(os.getpid(), signal.SIGKILL)
    if unit.path == 'long':
      time.sleep(60)
    self.folder(index).mkdir()
    (self.folder(index) / unit.path).write_text(str(os.getpid()))


def with_unit(path):
  return [*UNITS[:3], Unit('files', path, 1), *UNITS[4:]]


@pytest.mark.parametrize('executor', EXECUTORS, ids=str)
def test_all_units_are_done_but_those_that_were(tmp_path, executor):
  (tmp_path / '4').mkdir()
  executor.run(Note(str(tmp_path)), UNITS, 'noting')
  for number in range(7):
    assert (tmp_path / str(number) / str(number)).exists() == (number != 4)


def test_processes_share_the_work(tmp_path):
  Processes(2).run(Note(str(tmp_path)), UNITS, 'noting')
  pids = {path.read_text() for path in tmp_path.glob('*/*')}
  assert 1 <= len(pids) <= 2 and str(os.getpid()) not in pids


@pytest.mark.parametrize('executor', EXECUTORS, ids=str)
@pytest.mark.parametrize(
    ('path', 'error', 'message'),
    [('mistake', UserError, 'a mistake'), ('full', StorageFault, 'no room')],
)
def test_a_mistake_of_the_user_stays_one(
    tmp_path, executor, path, error, message
):
  with pytest.raises(UserError, match=f'^{message}$') as raised:
    executor.run(Note(str(tmp_path)), with_unit(path), 'noting')
  assert type(raised.value) is error
  # Once it is mended, the rest is done.
  executor.run(Note(str(tmp_path)), UNITS, 'noting')
  assert len(list(tmp_path.glob('[0-9]'))) == 7


@pytest.mark.parametrize('executor', EXECUTORS[:2], ids=str)
def test_a_bug_stays_a_bug(tmp_path, executor):
  with pytest.raises(ZeroDivisionError):
    executor.run(Note(str(tmp_path)), with_unit('bug'), 'noting')


def test_a_process_that_is_killed_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match='found one killed, .* fewer --proc') as e:
    Processes(2).run(Note(str(tmp_path)), with_unit('killed'), 'noting')
  assert '\n' not in str(e.value)


def test_other_units_do_not_hold_up_an_error(tmp_path):
  begin = time.monotonic()
  units = [Unit('files', 'long', 1), Unit('files', 'mistake', 1)]
  with pytest.raises(UserError, match='a mistake'):
    Processes(2).run(Note(str(tmp_path)), units, 'noting')
  assert time.monotonic() - begin < 30


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
  program = f'''
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import executors_test as test
if __name__ == '__main__':
  units = [test.Unit('files', 'long', 1), *test.UNITS]
  test.Processes(2).run(test.Note({str(tmp_path)!r}), units, 'noting')
'''
  path = tmp_path / 'program.py'
  path.write_text(program)
  with subprocess.Popen(
      [sys.executable, str(path)], stderr=subprocess.PIPE
  ) as parent:
    while len(list(tmp_path.glob('[0-9]'))) < len(UNITS):
      assert parent.poll() is None
      time.sleep(0.02)
    begin = time.monotonic()
    parent.kill()
    # The pipe ends when the last process that holds it does.
    parent.stderr.read()
    assert time.monotonic() - begin < 20


def test_a_runner_nobody_knows_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match="'DirctRunner'; set --runner=") as error:
    Beam('DirctRunner').run(Note(str(tmp_path)), UNITS, 'noting')
  assert '\n' not in str(error.value)


def test_beam_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  with pytest.raises(UserError, match=r"pip install 'codet5p_jax\[beam\]'"):
    Beam('DirectRunner').run(Note(str(tmp_path)), UNITS, 'noting')


def test_no_process_is_too_few():
  with pytest.raises(UserError, match='processes to be at least 1, found 0'):
    Processes(0)
