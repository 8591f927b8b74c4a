import dataclasses
import json
import os
import sys
import types
from typing import Any

import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.training.run_folder import (
    append_metrics,
    check_config,
    describe,
    open_run_folder,
    read_config,
    rebuild,
    trim_metrics,
)


@dataclasses.dataclass(frozen=True)
class Model:
  num_layers: int
  dropout_rate: float = 0.1
  rules: tuple[Any, ...] = (('embed', 'data'), ('kv', None))
  inner: Any = None
  width: int = dataclasses.field(init=False, default=5)


class Plain:
  pass


@pytest.fixture(autouse=True)
def models(monkeypatch):
  """Puts the classes of this test in a module of the package."""
  module = types.ModuleType('codet5p_jax.models_of_a_test')
  for kind in (Model, Plain):
    monkeypatch.setattr(kind, '__module__', module.__name__)
    setattr(module, kind.__name__, kind)
  monkeypatch.setitem(sys.modules, module.__name__, module)
  return module


def test_nested_dataclasses_come_back_equal():
  model = Model(3, inner=Model(2, 0.0, ((1, True, 'x'),)))
  description = describe(model)
  assert description == {
      'class': 'codet5p_jax.models_of_a_test.Model',
      'fields': {
          'num_layers': 3,
          'dropout_rate': 0.1,
          'rules': [['embed', 'data'], ['kv', None]],
          'inner': {
              'class': 'codet5p_jax.models_of_a_test.Model',
              'fields': {
                  'num_layers': 2,
                  'dropout_rate': 0.0,
                  'rules': [[1, True, 'x']],
                  'inner': None,
              },
          },
      },
  }
  assert rebuild(json.loads(json.dumps(description))) == model


def test_mappings_come_back():
  config = {'model': Model(3), 'fingerprints': {'vocabulary': 'abc'}}
  assert rebuild(describe(config)) == config


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        (Model(3, inner=(1, Plain())), r'config.inner\[1\] to be None'),
        ({'a': {3}}, 'config.a to be None'),
        ({3: 'a'}, 'config to be None'),
        ({'class': 'a', 'fields': {}}, 'other keys'),
        (dataclasses.make_dataclass('Foreign', [])(), 'found .*Foreign; give'),
    ],
)
def test_what_could_not_be_rebuilt_is_not_described(value, message):
  with pytest.raises(UserError, match=message):
    describe(value)


@pytest.mark.parametrize(
    'name',
    [
        'os.path.Model',
        'codet5p_jax_of_others.Model',
        'codet5p_jax.no_such_module.Model',
        'codet5p_jax.models_of_a_test.Missing',
        'codet5p_jax.models_of_a_test.Plain',
        'Model',
    ],
)
def test_only_dataclasses_of_the_package_are_rebuilt(name):
  with pytest.raises(UserError, match=f'found {name}; use the version'):
    rebuild({'class': name, 'fields': {}})


def test_other_modules_are_not_even_imported(tmp_path, monkeypatch):
  (tmp_path / 'evil_module.py').write_text('raise SystemExit("imported")')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(UserError):
    rebuild({'class': 'evil_module.Model', 'fields': {}})


def test_unknown_and_missing_fields_are_named():
  description = describe(Model(3))
  del description['fields']['rules']
  description['fields']['depth'] = 3
  with pytest.raises(UserError, match='depth is unknown, rules is missing'):
    rebuild(description)


def test_a_run_folder_is_created_and_entered_again(tmp_path):
  config = {'model': Model(3), 'seed': 0}
  folder = open_run_folder(tmp_path / 'runs/a', config)
  assert json.loads(folder.config.read_text())['format_version'] == 1
  assert open_run_folder(tmp_path / 'runs/a', config) == folder
  assert rebuild(read_config(folder.path)) == config
  assert os.listdir(folder.path) == ['config.json']
  for part in ('vocabulary', 'events', 'checkpoints', 'model', 'compiled'):
    assert getattr(folder, part) == folder.path / part
  assert folder.metrics == folder.path / 'metrics.jsonl'
  assert folder.timeline == folder.path / 'timeline.jsonl'


def test_every_differing_field_is_named_with_both_values(tmp_path):
  folder = open_run_folder(
      tmp_path, {'model': Model(3, inner=Model(2)), 'seed': 0, 'old': 'x'}
  )
  other = {
      'model': Model(4, rules=(('embed', None), ('kv', None)), inner=Model(6)),
      'seed': False,
      'new': (1, 2),
  }
  with pytest.raises(UserError) as raised:
    check_config(folder, other)
  assert str(raised.value) == (
      f'run folder {tmp_path} has another configuration: '
      'model.num_layers: expected 4, found 3; '
      'model.rules[0][1]: expected null, found "data"; '
      'model.inner.num_layers: expected 6, found 2; '
      'seed: expected false, found 0; '
      'new: expected [1, 2], found none; '
      'old: expected none, found "x"; '
      'give the same values, or another folder'
  )


def test_fields_that_may_differ_are_passed_over(tmp_path):
  folder = open_run_folder(tmp_path, {'model': Model(3, 0.1), 'mesh': (1, 8)})
  other = {'model': Model(3, 0.2), 'mesh': (1, 4)}
  open_run_folder(tmp_path, other, may_differ=('model.dropout_rate', 'mesh'))
  assert rebuild(read_config(folder.path))['mesh'] == (1, 8)
  with pytest.raises(UserError, match='model.dropout_rate: expected 0.2'):
    open_run_folder(tmp_path, other, may_differ=('model.dropout', 'mesh'))


def test_a_tuple_of_another_length_differs_as_a_whole(tmp_path):
  folder = open_run_folder(tmp_path, {'shape': (1, 2)})
  with pytest.raises(UserError, match=r'shape: expected \[1\], found \[1, 2\]'):
    open_run_folder(folder.path, {'shape': (1,)})


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='file/run: Not a directory; free space'):
    open_run_folder(tmp_path / 'file/run', {})


def test_a_folder_of_a_newer_version_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text('{"format_version": 2}')
  with pytest.raises(UserError, match='found 2; update codet5p_jax'):
    open_run_folder(tmp_path, {})


def test_a_folder_of_another_program_is_told_to_be_converted(tmp_path):
  (tmp_path / 'config.json').write_text('{"model_type": "t5"}')
  with pytest.raises(UserError) as raised:
    read_config(tmp_path)
  assert 'no format_version' in str(raised.value)
  assert 'run `codet5p convert` on it first' in str(raised.value)


def test_metrics_are_on_disk_after_each_row(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  for step in (1, 2):
    append_metrics(path, {'step': step, 'loss': 0.5})
    assert len(path.read_text().splitlines()) == step
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot write .*: Not a directory'):
    append_metrics(tmp_path / 'file/metrics.jsonl', {})


def test_numbers_that_json_does_not_have_are_written_as_text(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  values = {'a': float('nan'), 'b': float('inf'), 'c': -float('inf'), 'd': 1.5}
  append_metrics(path, {'step': 7, **values})
  assert path.read_text() == (
      '{"step": 7, "a": "nan", "b": "inf", "c": "-inf", "d": 1.5}\n'
  )


def test_rows_after_the_restored_step_are_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  rows = [{'step': 1}, {'note': 'kept'}, {'step': 3}, {'step': 2}, {'step': 4}]
  for row in rows:
    append_metrics(path, row)
  with open(path, 'a') as file:
    file.write('{"step": 2, "lo')
  trim_metrics(path, 2)
  found = [json.loads(line) for line in path.read_text().splitlines()]
  assert found == [{'step': 1}, {'note': 'kept'}, {'step': 2}]
  append_metrics(path, {'step': 3})
  assert path.read_text().endswith('{"step": 2}\n{"step": 3}\n')


def test_a_broken_line_amid_the_metrics_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\nbroken\n{"step": 2}\n')
  with pytest.raises(UserError, match="line 2 of .*found 'broken'; delete"):
    trim_metrics(path, 5)
  assert 'broken' in path.read_text()


def test_trimming_needs_no_metrics(tmp_path):
  trim_metrics(tmp_path / 'metrics.jsonl', 5)
  assert os.listdir(tmp_path) == []
  (tmp_path / 'metrics.jsonl').touch()
  trim_metrics(tmp_path / 'metrics.jsonl', 5)
  assert (tmp_path / 'metrics.jsonl').read_text() == ''
