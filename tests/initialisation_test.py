import dataclasses
import re

import jax
import numpy as np
import pytest

from codet5p_jax.conversion.init_from import absolute, plan_initialisation
from codet5p_jax.conversion.sources import WeightSource
from codet5p_jax.errors import UserError
from codet5p_jax.initialisation import (
    check_frozen,
    format_parts,
    load_given,
    parts_table,
)
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.planning.parameters import parameter_shapes
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.checkpoints.fingerprint import (
    fingerprint_tree,
    join_digests,
)
from codet5p_jax.training.checkpoints.layout import (
    flatten,
    nest,
    unstack_layers,
)
from codet5p_jax.training.optimizers import SGD
from codet5p_jax.training.partition import merge_params
from codet5p_jax.training.train_step import make_train_step
from tests.training import small

MODEL = small.MODEL
DECODER_MLP = 'decoder/layers_2/mlp/wi/kernel'


class Source:
  """Weights in memory; `opened` is what `open_source` gives of a folder."""

  def __init__(self, name: str, leaves: dict[str, np.ndarray]):
    self.name = name
    self.leaves = leaves
    self.reads: list[str] = []

  def read(self, path: str) -> np.ndarray:
    self.reads.append(path)
    return self.leaves[path]

  def opened(self) -> WeightSource:
    return WeightSource(
        name=self.name,
        model=MODEL,
        vocabulary=None,
        shapes={
            path: jax.ShapeDtypeStruct(x.shape, x.dtype)
            for path, x in self.leaves.items()
        },
        read=self.read,
        load_vocabulary=lambda: None,
    )


def shapes_of(model: T5Config) -> dict[str, tuple[int, ...]]:
  return parameter_shapes(model.make_model(Computation(scan_layers=False)))


def random_source(name: str, model: T5Config = MODEL, dtype='float16'):
  rng = np.random.default_rng(len(name))
  return Source(
      name,
      {
          path: rng.normal(size=shape).astype(dtype)
          for path, shape in shapes_of(model).items()
      },
  )


@pytest.fixture
def sources():
  """{folder: Source}; what a test puts in here can be opened."""
  return {}


def plan(sources, *entries):
  for name, _, _ in entries:
    if name != 'fresh' and name not in sources:
      sources[name] = random_source(name)
  return plan_initialisation(
      list(entries), MODEL, lambda name: sources[name].opened()
  )


def refused(match, sources, *entries):
  with pytest.raises(UserError, match=match) as error:
    plan(sources, *entries)
  assert '\n' not in str(error.value)


def test_each_part_comes_from_its_own_source(sources):
  found = plan(
      sources,
      ('one', 'encoder|token_embedder', None),
      ('another', 'decoder/(?!.*cross_attention/out/kernel).*', None),
      ('fresh', '.*/cross_attention/out/kernel', None),
  )
  for path in found.shapes:
    if path.endswith('cross_attention/out/kernel'):
      assert path not in found.origins
    elif path.startswith('decoder'):
      assert found.origins[path].source.name == 'another'
    else:
      assert found.origins[path].source.name == 'one'
  assert not sources['one'].reads, 'planning reads nothing'


def test_a_map_renames_and_leaves_out(sources):
  # As an encoder is made of a decoder: other names, and a head too many.
  theirs = random_source('theirs')
  theirs.leaves = {
      f'body/{path}': x for path, x in theirs.leaves.items()
  } | {'head/kernel': np.zeros((3, 4))}
  sources['theirs'] = theirs
  found = plan(
      sources, ('theirs', '.*', (('body/(.*)', r'\1'), ('head/.*', None)))
  )
  assert found.origins[DECODER_MLP].path == f'body/{DECODER_MLP}'
  refused(
      r'42 missing .*1 unexpected \(head/kernel\)',
      sources,
      ('theirs', '.*', (('body/encoder/(.*)', r'encoder/\1'),
                        ('body/.*', None))),
  )  # fmt: skip


def test_what_is_not_accounted_for_is_named(sources):
  refused(
      'found nothing for token_embedder/embedding; add a source',
      sources,
      ('one', 'encoder', None),
      ('fresh', 'decoder', None),
  )
  refused(
      'gives encoder/.* from one and from fresh',
      sources,
      ('one', '.*', None),
      ('fresh', 'encoder', None),
  )
  refused("found that 'enkoder' names none", sources, ('one', 'enkoder', None))
  refused('found .*unterminated', sources, ('one', '(', None))
  refused('at place 1', sources, ('one', '.*', None), ('two', '.*', 'same'))


def test_missing_unexpected_and_misshapen_come_in_one_line(sources):
  source = sources['bad'] = random_source('bad')
  del source.leaves[DECODER_MLP]
  source.leaves['decoder/layers_3/mlp/wi/kernel'] = np.zeros((2, 2))
  source.leaves['encoder/final_layer_norm/scale'] = np.zeros(23)
  refused(
      f'1 missing .{re.escape(DECODER_MLP)}.; '
      r'1 unexpected .decoder/layers_3/mlp/wi/kernel.; '
      r'1 misshapen .encoder/final_layer_norm/scale: expected .24., found .23.',
      sources,
      ('bad', '.*', None),
  )
  both = (('decoder/layers_0/(.*)', r'decoder/layers_1/\1'),)
  refused('given twice', sources, ('one', '.*', both))
  refused('invalid group', sources, ('one', '.*', (('(.*)', r'x/\2'),)))


def test_sources_of_what_is_not_needed_are_not_opened(sources):
  found = plan_initialisation(
      [('one', 'encoder|token_embedder', None), ('nowhere', 'decoder', None)],
      MODEL,
      lambda name: random_source(name).opened() if name == 'one' else 1 / 0,
      needed=['encoder/layers_0/mlp/wi/kernel'],
  )
  assert {origin.source.name for origin in found.origins.values()} == {'one'}


def test_paths_are_stored_as_they_are_from_anywhere(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  entries = [('one', '.*', (('a', None),)), ('fresh', 'b', None)]
  assert absolute(entries) == [
      [f'{tmp_path}/one', '.*', [['a', None]]],
      ['fresh', 'b', None],
  ]


def test_the_layers_of_a_stack_come_together(sources):
  found = plan(
      sources,
      ('one', '(?!decoder/layers_1/mlp).*', None),
      ('fresh', 'decoder/layers_1/mlp', None),
  )
  step = step_for()
  with pytest.raises(UserError, match='every layer of a stack, found none for'):
    load_given(found, step.abstract_state.params, step.axis_names)
  unrolled = step_for(
      computation=Computation(dtype='float32', scan_layers=False)
  )
  given, _ = load_given(
      found, unrolled.abstract_state.params, unrolled.axis_names
  )
  assert 'decoder/layers_1/mlp/wi/kernel' not in given


def step_for(**changes):
  config = small.step_config(SGD(0.1), **changes)
  return make_train_step(config, make_mesh((1, 4, 2)))


def gathered(tree):
  return small.to_numpy(unstack_layers(tree))


@pytest.mark.parametrize('scan_layers', [True, False])
def test_loaded_weights_are_the_sources_own(sources, scan_layers):
  found = plan(sources, ('one', '.*', None))
  step = step_for(
      trainable=('.*/cross_attention/.*',),
      computation=Computation(dtype='float32', scan_layers=scan_layers),
      frozen_dtype='bfloat16',
  )
  check_frozen(found, step.abstract_state.frozen_params, ['some'])
  params, _ = load_given(
      found, step.abstract_state.params, step.axis_names
  )
  frozen, digests = load_given(
      found, step.abstract_state.frozen_params, step.axis_names
  )
  state = step.init({**params, **frozen})
  leaves = merge_params(gathered(state.params), gathered(state.frozen_params))
  source = sources['one'].leaves
  for path, leaf in flatten(leaves).items():
    expected = source[path].astype(leaf.dtype)
    if path == 'token_embedder/embedding':  # Its rows are padded with zeros.
      assert not leaf[len(expected) :].any()
      leaf = leaf[: len(expected)]
    np.testing.assert_array_equal(leaf, expected, err_msg=path)
  # Over the bytes of the source, not over what they were cast to.
  frozen_source = {
      path: x for path, x in source.items() if '/cross_attention/' not in path
  }
  assert join_digests(digests.items()) == fingerprint_tree(nest(frozen_source))


def test_int8_is_within_half_a_step_of_the_source(sources):
  found = plan(sources, ('one', '.*', None))
  step = step_for(trainable=('encoder/.*',), frozen_dtype='int8')
  frozen, _ = load_given(
      found, step.abstract_state.frozen_params, step.axis_names
  )
  frozen = flatten(gathered(nest(frozen)))
  for name in (DECODER_MLP, 'decoder/layers_1/cross_attention/out/kernel'):
    kernel, scale = frozen[name], frozen[f'{name}_scale']
    assert kernel.dtype == np.int8
    source = sources['one'].leaves[name].astype(np.float32)
    error = np.abs(kernel * scale - source)
    assert (error <= scale / 2 * (1 + 1e-5)).all()


def test_only_what_has_no_source_is_drawn(sources):
  step = step_for()
  drawn = gathered(step.init({}).params)
  found = plan(
      sources, ('one', 'encoder', None), ('fresh', 'decoder|token.*', None)
  )
  given, _ = load_given(
      found, step.abstract_state.params, step.axis_names
  )
  assert all(path.startswith('encoder/') for path in given)
  state = gathered(step.init(given).params)
  jax.tree.map(
      np.testing.assert_array_equal, state['decoder'], drawn['decoder']
  )
  np.testing.assert_array_equal(
      state['encoder']['layers_1']['mlp']['wi']['kernel'],
      sources['one'].leaves['encoder/layers_1/mlp/wi/kernel'],
  )


def test_tokens_added_to_a_vocabulary_are_drawn(sources):
  sources['fewer'] = random_source(
      'fewer', dataclasses.replace(MODEL, vocab_size=128)
  )
  found = plan(sources, ('fewer', '.*', None))
  step = step_for()
  given, _ = load_given(
      found, step.abstract_state.params, step.axis_names
  )
  table = np.asarray(given['token_embedder/embedding'])
  theirs = sources['fewer'].leaves['token_embedder/embedding']
  np.testing.assert_array_equal(table[:128], theirs)
  assert 0.5 < table[128:131].std() < 2
  assert not table[131:].any()


def test_a_frozen_parameter_that_is_drawn_is_refused(sources):
  found = plan(
      sources, ('one', 'encoder|token.*', None), ('fresh', 'decoder', None)
  )
  step = step_for(trainable=('encoder/.*',))
  with pytest.raises(UserError, match='lets decoder/.* be drawn; give a sour'):
    check_frozen(found, step.abstract_state.frozen_params, ['some'])


def test_nan_in_a_source_is_refused(sources):
  found = plan(sources, ('one', '.*', None))
  sources['one'].leaves[DECODER_MLP][3, 4] = np.nan
  step = step_for()
  with pytest.raises(UserError, match=f'one, found NaN .* in {DECODER_MLP}'):
    load_given(found, step.abstract_state.params, step.axis_names)


def test_the_table_of_parts_counts_everything_once(sources):
  found = plan(
      sources,
      ('one', 'encoder|token.*', None),
      ('two', 'decoder', None),
  )
  step = step_for(
      trainable=('encoder/.*', '.*/cross_attention/.*'), frozen_dtype='int8'
  )
  state = step.abstract_state
  rows = parts_table(found, state)
  described = {
      (row['part'], row['trainable'], row['dtype'], row['source'])
      for row in rows
  }
  assert described == {
      ('encoder', True, 'float32', 'one'),
      ('decoder', True, 'float32', 'two'),
      ('token_embedder/embedding', False, 'int8', 'one'),
      ('decoder', False, 'int8', 'two'),
  }
  total = sum(int(np.prod(shape)) for shape in shapes_of(MODEL).values())
  assert sum(row['parameters'] for row in rows) == total
  in_memory = jax.tree.leaves((state.params, state.frozen_params))
  assert sum(row['bytes'] for row in rows) == sum(
      x.size * x.dtype.itemsize for x in in_memory
  )
  text = format_parts(rows)
  assert len(text.splitlines()) == 5 and '  frozen     int8  ' in text
