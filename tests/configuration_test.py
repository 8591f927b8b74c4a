"""Tests of loading gin files, on modules that each test makes and forgets."""

import pathlib
import sys
import textwrap

import gin
import pytest

from codet5p_jax import configuration
from codet5p_jax import errors
from codet5p_jax import gin_paths

MODULES = {
    'toy_model': '''
        import dataclasses


        @dataclasses.dataclass(frozen=True)
        class Config:
          width: int
          depth: int = 2
          rate: float = 0.5
          names: tuple[str, ...] = ()


        @dataclasses.dataclass(frozen=True)
        class Objective:
          name: str = 'plain'
          weight: float = 1.0


        def optimizer(learning_rate: float = 1e-3, schedule=None):
          return 'optimizer', learning_rate, schedule and schedule()


        def schedule(warmup: int = 10):
          return warmup
    ''',
    'toy_runs/__init__': '',
    'toy_runs/fit': '''
        from codet5p_jax import errors


        def fit(model, model_dir: str, train_steps: int = 1, objectives=(),
                optimizer=None, extra=None, shuffle: bool = False,
                operative_config=None):
          early = operative_config() if operative_config else None
          if model_dir == 'user error':
            raise errors.UserError('expected more')
          if model_dir == 'bug':
            raise KeyError('a bug')
          made = optimizer() if optimizer else None
          return {'model': model, 'model_dir': model_dir,
                  'train_steps': train_steps, 'objectives': objectives,
                  'extra': extra, 'shuffle': shuffle, 'made': made,
                  'early': early}
    ''',
    'toy_runs/look': '''
        def look(model, topology: str = 'v5e:1x1'):
          return model, topology
    ''',
}

MODEL = '''
    from __gin__ import dynamic_registration
    import toy_model

    MODEL = @toy_model.Config()
    WIDTH = 64
    toy_model.Config.width = %WIDTH
    toy_model.Config.names = ('first', 'a name so long that it makes gin break',
                              'the line of the operative configuration')
'''

RUN = '''
    # A run of a toy.
    from __gin__ import dynamic_registration
    import toy_model
    from toy_runs import fit

    TRAIN_STEPS = 4
    MODEL_DIR = %gin.REQUIRED
    fit.fit:
      model = %MODEL
      model_dir = %MODEL_DIR
      train_steps = %TRAIN_STEPS
      objectives = [@first/toy_model.Objective(), @toy_model.Objective()]
      optimizer = @slow/toy_model.optimizer
      extra = {'x': (1, -2.5e-7, None), 'y': @toy_model.Config()}
    toy_model.Objective.weight = 0.25
    first/toy_model.Objective.name = 'scoped'
    slow/toy_model.optimizer.schedule = @toy_model.schedule
    toy_model.schedule.warmup = 77
'''


@pytest.fixture
def toys(tmp_path, monkeypatch):
  """A current folder with modules and gin files; returns their writer."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  before = set(sys.modules)

  def write(name: str, text: str) -> str:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return name

  for name, text in MODULES.items():
    write(f'{name}.py', text)
  write('model.gin', MODEL)
  write('run.gin', RUN)
  yield write
  for name in set(sys.modules) - before:
    if name.startswith('toy_'):
      del sys.modules[name]
  gin.clear_config()


def fit_with(macros=None, bindings=(), gin_files=('model.gin', 'run.gin'),
             **given):
  from toy_runs import fit
  configuration.load(gin_files, macros, bindings, fit.fit, given)
  return configuration.call(fit.fit, **given)


def test_gin_files_macros_and_bindings_reach_the_function(toys):
  result = fit_with(
      {'MODEL_DIR': '/a b', 'TRAIN_STEPS': '7', 'WIDTH': 32},
      ['toy_model.Config.depth=5', 'first/Objective.weight=3',
       'fit.shuffle=true'])
  assert result['model_dir'] == '/a b'
  assert result['train_steps'] == 7
  assert result['shuffle'] is True
  assert (result['model'].width, result['model'].depth) == (32, 5)
  scoped, plain = result['objectives']
  assert (scoped.name, scoped.weight) == ('scoped', 3)
  assert (plain.name, plain.weight) == ('plain', 0.25)
  assert result['made'] == ('optimizer', 1e-3, 77)
  assert type(result['model']) is sys.modules['toy_model'].Config


def test_a_second_load_forgets_the_first(toys):
  fit_with({'MODEL_DIR': 'x', 'TRAIN_STEPS': '9'}, ['Config.depth=5'])
  result = fit_with({'MODEL_DIR': 'x'})
  assert (result['train_steps'], result['model'].depth) == (4, 2)


def test_later_gin_files_override_earlier_ones(toys):
  toys('mine.gin', "include 'run.gin'\nTRAIN_STEPS = 11\nMODEL_DIR = 'mine'\n")
  result = fit_with(gin_files=['model.gin', 'mine.gin'])
  assert (result['train_steps'], result['model_dir']) == (11, 'mine')


def test_references_and_macros_pass_through_values(toys):
  result = fit_with({
      'MODEL_DIR': 'x', 'MODEL': '@toy_model.Objective()', 'WIDTH': '%SIZE',
      'TRAIN_STEPS': '%WIDTH', 'SIZE': '3',
  }, ['fit.objectives=[@Objective(), (@Config(), 2)]'],
      gin_files=['model.gin', 'run.gin', toys('size.gin', 'SIZE = 1')])
  assert result['train_steps'] == 3
  assert result['model'].weight == 0.25
  objective, (config, two) = result['objectives']
  assert (objective.name, config.width, two) == ('plain', 3, 2)


def test_a_binding_may_name_what_a_gin_file_imports_but_does_not_use(toys):
  toys('short.gin', '''
      from __gin__ import dynamic_registration
      import toy_model as tm
      from toy_runs import fit as run
      run.fit.model_dir = 'x'
      run.fit.model = 1
  ''')
  result = fit_with(bindings=['fit.optimizer=@tm.optimizer',
                              'tm.optimizer.learning_rate=0.5'],
                    gin_files=['short.gin'])
  assert result['made'] == ('optimizer', 0.5, None)
  replayed = fit_with(
      gin_files=[toys('again.gin', configuration.operative_config())])
  assert replayed['made'] == result['made']


def test_t5x_writing_of_macros_is_understood(toys):
  assert fit_with(bindings=['MODEL_DIR="/x"'])['model_dir'] == '/x'


def test_an_unbound_parameter_takes_the_macro_of_its_name(toys):
  from toy_runs import look
  configuration.load(['model.gin'], {'TOPOLOGY': 'v5e:2x4'}, run=look.look)
  model, topology = configuration.call(look.look)
  assert (model.width, topology) == (64, 'v5e:2x4')
  toys('bound.gin', '''
      from __gin__ import dynamic_registration
      from toy_runs import look
      look.look.model = 'bound'
  ''')
  configuration.load(['model.gin', 'bound.gin'], run=look.look)
  assert configuration.call(look.look) == ('bound', 'v5e:1x1')


def test_macros_that_a_run_does_not_need_may_stay_unset(toys):
  from toy_runs import look
  configuration.load(['model.gin', 'run.gin'], run=look.look)
  assert configuration.call(look.look)[0].width == 64


def test_given_arguments_win_and_their_bindings_are_not_evaluated(toys):
  result = fit_with({}, ['toy_model.Config.width=%NOWHERE'], [
      'model.gin', 'run.gin', toys('n.gin', 'OTHER = %NOWHERE\n')],
                    model='given', model_dir='given', extra=0)
  assert (result['model'], result['model_dir']) == ('given', 'given')


def test_a_macro_can_be_had_by_itself(toys):
  configuration.load(['model.gin'], {'WIDTH': '3'})
  assert configuration.macro('MODEL').width == 3
  with pytest.raises(errors.UserError, match='did you mean MODEL?'):
    configuration.macro('MODELS')


def test_the_operative_config_replays_the_run(toys):
  first = fit_with({'MODEL_DIR': '/a b', 'TRAIN_STEPS': '7'},
                   ['first/Objective.weight=3', 'fit.shuffle=True'],
                   operative_config=configuration.operative_config)
  text = configuration.operative_config()
  # It is complete even before the run has called its optimizer.
  assert 'toy_model.schedule.warmup = 77' in first['early']
  for replay in (first['early'], text):
    again = fit_with(gin_files=[toys('replay.gin', replay)],
                     operative_config=configuration.operative_config)
    assert {**again, 'early': 0} == {**first, 'early': 0}
    assert configuration.operative_config() == text


def test_the_operative_config_states_defaults_and_keeps_macros(toys):
  fit_with({'MODEL_DIR': 'x'})
  text = configuration.operative_config()
  assert 'toy_model.Config.rate = 0.5' in text
  assert 'TRAIN_STEPS = 4' in text
  assert 'fit.fit.train_steps = %TRAIN_STEPS' in text
  assert 'MODEL/' not in text  # Where overrides would not reach.
  toys('replay.gin', text)
  changed = fit_with({'TRAIN_STEPS': '8'}, ['Config.depth=9', 'fit.extra=1'],
                     ['replay.gin'])
  assert (changed['train_steps'], changed['model'].depth) == (8, 9)
  assert (changed['extra'], changed['model_dir']) == (1, 'x')


def test_the_operative_config_leaves_out_what_the_run_does_not_use(toys):
  from toy_runs import look
  configuration.load(['model.gin', 'run.gin'], run=look.look)
  configuration.call(look.look)
  text = configuration.operative_config()
  assert 'look.look.model = %MODEL' in text
  assert 'fit.fit' not in text and 'REQUIRED' not in text


def test_errors_of_the_run_come_as_they_were_raised(toys):
  with pytest.raises(errors.UserError) as error:
    fit_with({'MODEL_DIR': 'user error'})
  assert type(error.value) is errors.UserError
  assert str(error.value) == 'expected more'
  with pytest.raises(KeyError) as bug:
    fit_with({'MODEL_DIR': 'bug'})
  assert type(bug.value) is KeyError and bug.value.args == ('a bug',)
  assert bug.traceback[-1].path.name == 'fit.py'


def test_gin_files_are_found_here_before_the_shipped_ones(
    toys, monkeypatch, tmp_path):
  shipped = tmp_path / 'shipped'
  monkeypatch.setattr(gin_paths, 'gin_folder', lambda: shipped)
  toys('shipped/models/small.gin', MODEL)
  toys('shipped/both.gin', "include 'models/small.gin'\nWIDTH = 1\n")
  assert gin_paths.shipped() == ['both.gin', 'models/small.gin']
  configuration.load(['both.gin'])
  assert configuration.macro('MODEL').width == 1
  toys('both.gin', "include 'shipped/models/small.gin'\nWIDTH = 2\n")
  configuration.load(['both.gin'])
  assert configuration.macro('MODEL').width == 2
  with pytest.raises(errors.UserError, match='did you mean models/small.gin?'):
    configuration.load(['models/smal.gin'])


def test_the_gin_folder_does_not_hide_gin_config():
  # Seen from the root of the repository, where it is called gin as well.
  assert not (gin_paths.gin_folder() / '__init__.py').exists()
  assert pathlib.Path(gin.__file__).parent != gin_paths.gin_folder()


def test_a_reloaded_module_is_configured_anew(toys):
  fit_with({'MODEL_DIR': 'x'})
  del sys.modules['toy_model'], sys.modules['toy_runs.fit']
  result = fit_with({'MODEL_DIR': 'x'})
  assert type(result['model']) is sys.modules['toy_model'].Config
