"""Tests of what a wrong name or value in a configuration is answered with."""

import sys
import textwrap

import gin
import pytest

from codet5p_jax import configuration
from codet5p_jax import errors
from codet5p_jax import gin_paths

FILES = {
    'toy_model.py': '''
        import dataclasses


        @dataclasses.dataclass(frozen=True)
        class Config:
          width: int
          depth: int = 2


        def optimizer(learning_rate: float = 1e-3):
          return learning_rate
    ''',
    'toy_runs/__init__.py': '',
    'toy_runs/fit.py': '''
        def fit(model, model_dir: str, train_steps: int = 1, objectives=(),
                optimizer=None, shuffle: bool = False):
          return model, model_dir, train_steps, objectives, optimizer, shuffle
    ''',
    'broken_module.py': 'raise ValueError("broken inside")',
    'model.gin': '''
        from __gin__ import dynamic_registration
        import toy_model

        MODEL = @toy_model.Config()
        WIDTH = 64
        toy_model.Config.width = %WIDTH
    ''',
    'run.gin': '''
        from __gin__ import dynamic_registration
        import toy_model
        from toy_runs import fit

        TRAIN_STEPS = 4
        MODEL_DIR = %gin.REQUIRED
        fit.fit:
          model = %MODEL
          model_dir = %MODEL_DIR
          train_steps = %TRAIN_STEPS
          objectives = [@toy_model.Config()]
          optimizer = @toy_model.optimizer
    ''',
}


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

  for name, text in FILES.items():
    write(name, text)
  yield write
  for name in set(sys.modules) - before:
    if name.startswith(('toy_', 'broken_')):
      del sys.modules[name]
  gin.clear_config()


def fit_with(macros=None, bindings=(), gin_files=('model.gin', 'run.gin')):
  from toy_runs import fit
  configuration.load(gin_files, macros, bindings, fit.fit)
  return configuration.call(fit.fit)


def refusal(*arguments, **keywords) -> str:
  with pytest.raises(errors.UserError) as error:
    fit_with(*arguments, **keywords)
  message = str(error.value)
  assert '\n' not in message
  assert 'onfigurable' not in message
  return message


@pytest.mark.parametrize('macros, message', [
    ({'TRAIN_STEP': '4'},
     'no loaded gin file has a macro TRAIN_STEP; did you mean TRAIN_STEPS? '
     'known are MODEL, MODEL_DIR, OBJECTIVES, OPTIMIZER, '
     'SHUFFLE, TRAIN_STEPS, WIDTH'),
    ({'QQQ': '4'},
     'no loaded gin file has a macro QQQ; known are MODEL, MODEL_DIR, '
     'OBJECTIVES, OPTIMIZER, SHUFFLE, TRAIN_STEPS, WIDTH'),
    ({'TRAIN_STEPS': '1k'},
     "TRAIN_STEPS expects a whole number, found '1k'; give TRAIN_STEPS=value"),
    ({'WIDTH': 1.5},
     'WIDTH expects a whole number, found 1.5; give WIDTH=value'),
    ({'MODEL': '@toy_model.Confg()'},
     'MODEL: toy_model has no Confg; did you mean Config?'),
    ({'MODEL': '@other.Config()'},
     'MODEL: no loaded gin file imports other.Config; did you mean '
     'toy_model.Config?'),
    ({'MODEL': '@@'},
     'MODEL expects @module.name, @module.name() or %MACRO after the first '
     'sign, found @@'),
    ({'TRAIN_STEPS': '%WIDTH', 'WIDTH': '%TRAIN_STEPS'},
     'WIDTH: WIDTH takes its value from itself, by WIDTH and TRAIN_STEPS; give '
     'it one'),
])
def test_a_wrong_macro_is_explained(toys, macros, message):
  assert refusal({'MODEL_DIR': 'x', **macros}) == message


@pytest.mark.parametrize('binding, message', [
    ('fit.train_step=4',
     '--gin.fit.train_step: fit.fit has no parameter train_step; did you mean '
     'train_steps?'),
    ('Config.dept=4',
     '--gin.Config.dept: toy_model.Config has no parameter dept; did you mean '
     'depth?'),
    ('fti.train_steps=4',
     '--gin.fti.train_steps: no loaded gin file imports fti; did you mean '
     'fit?'),
    ('fit.train_steps=many',
     "--gin.fit.train_steps expects a whole number, found 'many'; give "
     '--gin.fit.train_steps=value'),
    ('fit.train_steps',
     'expected --gin.function.parameter=value, found --gin.fit.train_steps'),
])
def test_a_wrong_binding_is_explained(toys, binding, message):
  assert refusal({'MODEL_DIR': 'x'}, [binding]) == message


def test_an_ambiguous_name_is_not_guessed(toys):
  toys('toy_other.py', 'def optimizer(x=1):\n  return x\n')
  toys('other.gin', '''
      from __gin__ import dynamic_registration
      import toy_other
      OTHER = @toy_other.optimizer
  ''')
  assert refusal(
      {'MODEL_DIR': 'x'}, ['optimizer.x=2'],
      ['model.gin', 'run.gin', 'other.gin']) == (
          '--gin.optimizer.x: optimizer may be toy_model.optimizer or '
          'toy_other.optimizer; write more of the name')


HEAD = '''from __gin__ import dynamic_registration
import toy_model
from toy_runs import fit
'''


@pytest.mark.parametrize('text, message', [
    ('X = hello', "line 1: Failed to parse token 'hello'; expected NAME = "
     'value, with strings in quotes'),
    ('\nX 3', "line 2: Couldn't parse statement, expected ':' or '='; expected "
     'NAME = value, with strings in quotes'),
    ('\nX = (1,\n  2\n',
     'line 3: the file ends within a statement; close its bracket or quotes'),
    ('import toy_model', "line 1: expected 'from __gin__ import "
     "dynamic_registration' before this import; add it"),
    ('fit.fit.model = 3', "line 1: 'fit' of fit.fit is not imported; import "
     'its module in the file that names it'),
    (HEAD + 'fti.fit.model = 3',
     "line 4: 'fti' of fti.fit is not imported; did you mean fit?"),
    (HEAD + 'fit.fti.model = 3',
     'line 4: toy_runs.fit has no fti; did you mean fit?'),
    (HEAD + 'fit.train_steps = 3',
     'line 4: fit is no function or class; write fit.fit'),
    (HEAD + 'fit.fit:\n  shuffle = True\n  mdoel = 3',
     'line 6: fit.fit has no parameter mdoel; did you mean model?'),
    (HEAD + "fit.fit.train_steps = '3'",
     "line 4: fit.fit.train_steps expects a whole number, found '3'"),
    (HEAD + "N = '3'\nfit.fit.train_steps = %N",
     "line 4: N expects a whole number, found '3'"),
    (HEAD + 'X = [@toy_model.Cnfig()]',
     'line 4: toy_model has no Cnfig; did you mean Config?'),
    (HEAD + 'from toy_runs import fti',
     'line 4: no module toy_runs.fti can be imported; did you mean fit?'),
    ("include 'modle.gin'",
     'line 1: found no gin file modle.gin here or in {folder}; did you mean '
     'model.gin?'),
    ("include 'bad.gin'", 'line 1: bad.gin includes itself; remove this line'),
])
def test_a_mistake_in_a_gin_file_names_its_line(toys, text, message):
  toys('bad.gin', text)
  folder = gin_paths.gin_folder()
  assert refusal(gin_files=['bad.gin']) == (
      'bad.gin, ' + message.format(folder=folder))


def test_an_error_inside_an_imported_module_keeps_its_traceback(toys):
  toys('bad.gin', 'from __gin__ import dynamic_registration\n'
       'import broken_module\n')
  with pytest.raises(ValueError, match='broken inside'):
    fit_with(gin_files=['bad.gin'])


def test_all_that_is_missing_is_listed(toys):
  assert refusal() == (
      'fit needs a value for MODEL_DIR (run.gin, line 10); give '
      'MODEL_DIR=value, or a --gin_file that sets it')
  assert refusal(gin_files=['run.gin'], bindings=[
      'fit.train_steps=%gin.REQUIRED']) == (
          'fit needs a value for TRAIN_STEPS, MODEL (run.gin, line 9), '
          'MODEL_DIR (run.gin, line 10), --gin.Config.width; give '
          'TRAIN_STEPS=value, or a --gin_file that sets it')
  assert refusal(gin_files=[]) == (
      'fit needs a value for MODEL, MODEL_DIR; give MODEL=value, or a '
      '--gin_file that sets it')


def test_a_missing_gin_file_names_the_nearest(toys):
  assert refusal(gin_files=['modle.gin']) == (
      f'found no gin file modle.gin here or in {gin_paths.gin_folder()}; did '
      f'you mean model.gin?')
