"""Tests of the command line, on subcommands that each test makes."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

import codet5p_jax
import codet5p_jax.runs
from codet5p_jax import configuration
from codet5p_jax import gin_paths
from codet5p_jax import main
from codet5p_jax.training import distributed

ROOT = pathlib.Path(main.__file__).parents[1]

RUNS = {
    'fit': '''
        from codet5p_jax import errors

        CALLS = []


        def fit(model: str, model_dir: str, train_steps: int = 1,
                operative_config=None):
          if model_dir == 'user error':
            raise errors.UserError('expected more,\\nfound less')
          if model_dir == 'unavailable':
            raise errors.Unavailable('expected a host,\\nfound none')
          if model_dir == 'preempted':
            raise errors.Preempted('step 3 is saved')
          if model_dir == 'bug':
            raise KeyError('a bug')
          if model_dir == 'interrupt':
            raise KeyboardInterrupt
          CALLS.append((model, model_dir, train_steps))
          open(f'{model_dir}.gin', 'w').write(operative_config())
    ''',
    'answer': '''
        CALLS = []


        def answer(prompts: tuple[str, ...], mode: str = 'short',
                   report: str | None = None):
          CALLS.append((prompts, mode, report))
    ''',
    'copy': '''
        CALLS = []


        def copy(source: str, target: str, languages: tuple[str, ...] = (),
                 limit: int | None = None, rate: float = 0.5,
                 overwrite: bool = False):
          """Copies a corpus.

          More words of it.

          Args:
            source: where from.
            target: where to; a long description goes on in lines that are
              indented once more.
            limit: at most so many.

          Raises:
            UserError: never.
          """
          CALLS.append((source, target, languages, limit, rate, overwrite))
    ''',
}


@pytest.fixture
def runs(tmp_path, monkeypatch):
  """Three subcommands; returns a function giving the calls of one."""
  monkeypatch.chdir(tmp_path)
  for name, text in RUNS.items():
    (tmp_path / f'{name}.py').write_text(textwrap.dedent(text))
  (tmp_path / 'fit.gin').write_text(textwrap.dedent('''
      from __gin__ import dynamic_registration
      from codet5p_jax.runs import fit
      MODEL = 'small'
      STEPS = 4
      fit.fit.train_steps = %STEPS
  '''))
  monkeypatch.setattr(
      codet5p_jax.runs, '__path__',
      [*codet5p_jax.runs.__path__, str(tmp_path)])
  monkeypatch.setattr(main, 'SUBCOMMANDS', {
      'fit': main.Subcommand('fits', gin=True),
      'answer': main.Subcommand(
          'answers', gin=True, words=('prompts...',), flags=('report',)),
      'copy': main.Subcommand('copies', words=('source', 'target')),
  })
  yield lambda name: sys.modules[f'codet5p_jax.runs.{name}'].CALLS
  for name in RUNS:
    sys.modules.pop(f'codet5p_jax.runs.{name}', None)
    vars(codet5p_jax.runs).pop(name, None)


@pytest.fixture
def refusal(capsys):
  """Runs the command line; returns the one line that it answers with."""

  def run(*argv: str) -> str:
    assert main.main(argv) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith('codet5p: ')
    assert printed.err.endswith('\n') and printed.err.count('\n') == 1
    return printed.err.removeprefix('codet5p: ').strip()

  return run


def test_a_run_takes_gin_files_macros_and_bindings(runs):
  assert main.main(['fit', '--gin_file=fit.gin', 'MODEL_DIR=a b']) == 0
  assert main.main(['fit', '--gin_file', 'fit.gin', 'MODEL_DIR=c', 'STEPS=5',
                    '--gin.fit.model=big model']) == 0
  assert main.main(['fit', '--gin_file=fit.gin', '--gin.MODEL_DIR=d']) == 0
  assert runs('fit') == [
      ('small', 'a b', 4), ('big model', 'c', 5), ('small', 'd', 4)]


def test_a_run_needs_no_gin_file_where_macros_say_all(runs):
  assert main.main(['fit', 'MODEL=m', 'MODEL_DIR=d']) == 0
  assert runs('fit') == [('m', 'd', 1)]


def test_the_operative_config_of_a_run_replays_it(runs, tmp_path):
  main.main(['fit', '--gin_file=fit.gin', 'MODEL_DIR=first', 'STEPS=9'])
  written = (tmp_path / 'first.gin').read_text()
  assert main.main(['fit', '--gin_file=first.gin']) == 0
  assert runs('fit') == [('small', 'first', 9)] * 2
  assert (tmp_path / 'first.gin').read_text() == written
  assert main.main(['fit', '--gin_file=first.gin', 'MODEL_DIR=second']) == 0
  assert runs('fit')[-1] == ('small', 'second', 9)
  assert (tmp_path / 'second.gin').read_text() == written.replace(
      "'first'", "'second'")


def test_words_and_flags_reach_a_gin_run(runs):
  assert main.main(['answer', 'def f(a, b):', '5', 'MODE=long',
                    '--report=out.json']) == 0
  assert main.main(['answer', '--report', 'x', '--', '-1', 'X=1']) == 0
  assert runs('answer') == [
      (('def f(a, b):', '5'), 'long', 'out.json'),
      (('-1', 'X=1'), 'short', 'x')]
  assert 'report' not in configuration.operative_config()


def test_flags_are_the_arguments_of_the_function(runs):
  assert main.main(['copy', '--source=a', '--target', 'b']) == 0
  assert main.main(['copy', 'a', '5', '--languages=python,java', '--limit=3',
                    '--rate=1e-3', '--overwrite']) == 0
  assert main.main(['copy', '--overwrite', 'a', 'b', '--limit=None']) == 0
  assert main.main(['copy', 'a', 'b', '--overwrite=false']) == 0
  assert runs('copy') == [
      ('a', 'b', (), None, 0.5, False),
      ('a', '5', ('python', 'java'), 3, 1e-3, True),
      ('a', 'b', (), None, 0.5, True),
      ('a', 'b', (), None, 0.5, False)]


@pytest.mark.parametrize('argv, message', [
    (['fti'], 'no subcommand fti; did you mean fit?'),
    (['zzz'], 'no subcommand zzz; known are answer, copy, fit'),
    (['fit', '--gin_fil=fit.gin'],
     'fit has no flag --gin_fil; did you mean --gin_file?'),
    (['fit', '--gin_file'], '--gin_file needs a file: --gin_file=FILE'),
    (['fit', '--gin_file=ftt.gin'], 'found no gin file ftt.gin here or in '
     f'{gin_paths.gin_folder()}; did you mean fit.gin?'),
    (['fit', '--gin_file=fit.gin', 'STEP=3'], 'no loaded gin file has a macro '
     'STEP; did you mean STEPS? known are MODEL, MODEL_DIR, STEPS, '
     'TRAIN_STEPS'),
    (['fit', '--gin_file=fit.gin', 'train_steps=3'], 'expected codet5p fit and '
     'macros KEY=value or flags --name=value, found train_steps=3'),
    (['fit', '--gin_file=fit.gin', '--gin.fit.train_step=3'],
     '--gin.fit.train_step: fit.fit has no parameter train_step; did you mean '
     'train_steps?'),
    (['fit', '--gin_file=fit.gin'], 'fit needs a value for MODEL_DIR; give '
     'MODEL_DIR=value, or a --gin_file that sets it'),
    (['fit', '--gin_file=fit.gin', 'MODEL_DIR=user error'],
     'expected more, found less'),
    (['fit', '-x'], '-x is no flag; flags are --words_like_this=value, and '
     'text that begins with - follows --'),
    (['copy', 'a', 'b', 'c'], 'expected codet5p copy SOURCE TARGET and macros '
     'KEY=value or flags --name=value, found c'),
    (['copy', '--sorce=a'],
     'copy has no flag --sorce; did you mean --source?'),
    (['copy', 'a'], 'copy needs --target; give --target=value'),
    (['copy', 'a', 'b', '--limit=few'], '--limit expects a whole number or '
     "None, found 'few'; give --limit=value"),
    (['copy', 'a', 'b', '--limit'], '--limit expects a whole number or None, '
     'found nothing; give --limit=value'),
])
def test_a_mistake_is_answered_in_one_line_with_status_2(
    runs, refusal, argv, message):
  assert refusal(*argv) == message


def test_an_interrupt_is_one_line_with_status_130(runs, capsys):
  argv = ['fit', '--gin_file=fit.gin', 'MODEL_DIR=interrupt']
  assert main.main(argv) == 130
  assert capsys.readouterr().err == 'codet5p: interrupted\n'


@pytest.mark.parametrize(
    ('model_dir', 'status', 'line', 'last_words'),
    [
        ('user error', 2, 'expected more, found less', True),
        ('unavailable', 69, 'expected a host, found none', True),
        # All know, and save.
        ('preempted', 75, 'step 3 is saved', False),
    ],
)
def test_other_processes_end_with_the_same_status(
    runs, capsys, monkeypatch, model_dir, status, line, last_words
):
  left = []
  monkeypatch.setattr(distributed, 'leave', lambda *words: left.append(words))
  assert main.main(
      ['fit', '--gin_file=fit.gin', f'--gin.fit.model_dir={model_dir!r}']
  ) == status
  assert capsys.readouterr().err == f'codet5p: {line}\n'
  assert left == [(status, line if last_words else '', '')]


def test_a_bug_keeps_its_traceback(runs):
  with pytest.raises(KeyError) as bug:
    main.main(['fit', '--gin_file=fit.gin', 'MODEL_DIR=bug'])
  assert bug.value.args == ('a bug',)
  assert bug.traceback[-1].path.name == 'fit.py'


def test_help_describes_flags_from_the_docstring(runs, capsys):
  assert main.main(['copy', '--help']) == 0
  printed = capsys.readouterr().out
  assert printed.startswith(
      'usage: codet5p copy SOURCE TARGET [--flag=value ...]\n\n'
      'Copies a corpus.\n')
  assert '--source  (a string; required)\n      where from.\n' in printed
  assert ('where to; a long description goes on in lines that are indented '
          'once more.') in ' '.join(printed.split())
  assert '--limit  (a whole number or None; default None)' in printed
  assert 'UserError' not in printed


def test_help_of_a_gin_run_lists_the_shipped_gin_files(runs, capsys,
                                                       monkeypatch):
  monkeypatch.setattr(main.gin_paths, 'shipped', lambda: ['runs/toy.gin'])
  assert main.main(['answer', '-h']) == 0
  printed = capsys.readouterr().out
  assert printed.startswith('usage: codet5p answer PROMPTS... --gin_file=FILE '
                            '... [KEY=value ...] [--report=VALUE]\n')
  assert 'runs/toy.gin' in printed


def test_version_and_overview(capsys):
  assert main.main(['--version']) == 0
  assert capsys.readouterr().out == f'codet5p {codet5p_jax.__version__}\n'
  assert main.main([]) == 0
  printed = capsys.readouterr().out
  assert all(f'  {name} ' in printed for name in main.SUBCOMMANDS)
  assert all(len(line) <= 80 for line in printed.splitlines())


def run_python(*arguments: str, **options) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, *arguments], text=True, capture_output=True, cwd=ROOT,
      check=False, **options)


def test_tasks_that_a_full_disk_has_ended_say_nothing():
  code = textwrap.dedent('''
      import asyncio, sys
      from codet5p_jax import main

      class Writing:
        def __del__(self):
          loop.call_soon_threadsafe(print)

      class Lost:
        def __del__(self):
          raise KeyError('told')

      loop = asyncio.new_event_loop()
      loop.close()
      main._speak_for_ourselves()
      writing, lost = Writing(), Lost()
      del writing, lost
  ''')
  finished = run_python('-c', code)
  assert finished.returncode == 0
  assert finished.stderr.count('Traceback') == 1
  assert "KeyError: 'told'" in finished.stderr


def test_help_and_slips_import_neither_jax_nor_gin():
  code = textwrap.dedent('''
      import sys
      from codet5p_jax import main
      for argv in (['--help'], ['train', '--help'], ['generate', '-h'],
                   ['--version'], ['trian'], ['train', '--gin_fil=x'],
                   ['train', '--gin_file=nothing.gin'], ['info', 'X']):
        assert main.main(argv) in (0, 2), argv
      heavy = {'jax', 'gin', 'numpy', 'tensorflow', 'seqio'}
      assert not heavy & set(sys.modules), heavy & set(sys.modules)
  ''')
  finished = run_python('-c', code)
  assert finished.returncode == 0, finished.stderr


def test_the_module_is_the_command():
  finished = run_python('-m', 'codet5p_jax.main', 'trian')
  assert finished.returncode == 2
  assert finished.stderr == (
      'codet5p: no subcommand trian; did you mean train?\n')


def test_a_closed_pipe_is_silent():
  process = subprocess.Popen(
      [sys.executable, '-m', 'codet5p_jax.main', '--help'], cwd=ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  process.stdout.close()
  _, printed = process.communicate(timeout=60)
  assert (process.returncode, printed) == (141, b'')


@pytest.mark.parametrize('found, platforms', [
    ([], 'cpu'),
    (['dev/null', 'pci/0/vendor=0x8086', 'pci/0/class=0x030000'], 'cpu'),
    # A machine in Google's cloud without a TPU: network card and disk.
    (['pci/0/vendor=0x1ae0', 'pci/0/class=0x020000',
      'pci/1/vendor=0x1ae0', 'pci/1/class=0x010802'], 'cpu'),
    (['pci/0/vendor=0x1ae0', 'pci/0/class=0x120000'], None),
    (['dev/accel0'], None),
    (['dev/vfio/0'], None),
    (['dev/nvidia0'], None),
])
def test_the_cpu_is_chosen_only_where_no_accelerator_can_be(
    found, platforms, tmp_path, monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setattr(main.importlib.util, 'find_spec', lambda name: name)
  for entry in found:
    path, _, text = entry.partition('=')
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(f'{text}\n')
  main._use_cpu_where_nothing_else_is(tmp_path / 'dev', tmp_path / 'pci')
  assert os.environ.get('JAX_PLATFORMS') == platforms


def test_the_users_choice_of_platform_is_kept(tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  main._use_cpu_where_nothing_else_is(tmp_path, tmp_path)
  assert os.environ['JAX_PLATFORMS'] == 'cuda'
  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.setattr(main.importlib.util, 'find_spec', lambda name: None)
  main._use_cpu_where_nothing_else_is(tmp_path, tmp_path)
  assert 'JAX_PLATFORMS' not in os.environ


def test_every_subcommand_has_its_function():
  for name in main.SUBCOMMANDS:
    source = (ROOT / 'codet5p_jax' / 'runs' / f'{name}.py').read_text()
    assert f'\ndef {name}(' in source
