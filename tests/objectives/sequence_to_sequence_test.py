import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codet5p_jax.data.task_tokens import TaskTokens
from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.objectives.sequence_to_sequence import (
    SequenceToSequence,
    frame_pair,
)
from codet5p_jax.training.batches import evaluation_examples
from codet5p_jax.training.teacher_forcing import padded_example
from tests.training import small

FRAMED = TaskTokens(
    pad=0, bos=1, eos=2, unk=3, clm=3, match=4, tdec=5, cdec=6, sentinels=()
)
UNFRAMED = TaskTokens(
    pad=50, bos=None, eos=50, unk=50, clm=51, match=4, tdec=5, cdec=6,
    sentinels=(),
)  # fmt: skip
OBJECTIVE = SequenceToSequence(source_length=16, target_length=8)


@pytest.fixture(scope='module')
def vocabulary(small_corpus):
  return load_vocabulary(small_corpus / 'vocabulary')


@pytest.fixture
def write(tmp_path):
  """Writes lines to train.jsonl: objects as JSON, text and bytes as such."""

  def lines(*rows):
    contents = []
    for row in rows:
      text = row if isinstance(row, str | bytes) else json.dumps(row)
      content = text if isinstance(text, bytes) else text.encode()
      contents.append(content + b'\n')
    (tmp_path / 'train.jsonl').write_bytes(b''.join(contents))
    return str(tmp_path)

  return lines


def pair_example(source, target, task_tokens, *lengths):
  framed = frame_pair(source, target, task_tokens, *lengths)
  return padded_example(*framed, task_tokens.pad, *lengths)


@pytest.mark.parametrize(
    ('task_tokens', 'source', 'target', 'expected'),
    [
        pytest.param(
            FRAMED, [7, 8], [9],
            ([1, 7, 8, 2, 0], [1, 9, 2, 0], [1, 1, 1, 0]),
            id='short ones are padded',
        ),
        pytest.param(
            FRAMED, [7, 8, 9], [9, 10],
            ([1, 7, 8, 9, 2], [1, 9, 10, 2], [1, 1, 1, 1]),
            id='those that just fit are kept',
        ),
        pytest.param(
            FRAMED, [7, 8, 9, 10], [9, 10, 11, 12],
            ([1, 7, 8, 9, 2], [1, 9, 10, 2], [1, 1, 1, 1]),
            id='long ones lose their ends, never the last token',
        ),
        pytest.param(
            FRAMED, [], [],
            ([1, 2, 0, 0, 0], [1, 2, 0, 0], [1, 1, 0, 0]),
            id='empty ones are framed',
        ),
        pytest.param(
            UNFRAMED, [7, 8, 9, 10, 11], [9],
            ([7, 8, 9, 10, 11], [9, 50, 50, 50], [1, 1, 0, 0]),
            id='without a beginning, and an end that looks like padding',
        ),
        pytest.param(
            UNFRAMED, [7], [9, 10, 11, 12],
            ([7, 50, 50, 50, 50], [9, 10, 11, 50], [1, 1, 1, 1]),
            id='nothing is added around a source of CodeGen',
        ),
    ],
)  # fmt: skip
def test_pairs_are_cut_framed_and_padded(task_tokens, source, target, expected):
  example = pair_example(source, target, task_tokens, 5, 4)
  assert example['encoder_input_tokens'].tolist() == expected[0]
  assert example['decoder_target_tokens'].tolist() == expected[1]
  assert example['decoder_loss_weights'].tolist() == expected[2]


@given(
    ids=st.lists(st.integers(60, 99), max_size=12),
    length=st.integers(2, 15),
    task_tokens=st.sampled_from([FRAMED, UNFRAMED]),
)
def test_source_and_target_are_framed_as_a_loop_would(ids, length, task_tokens):
  row = [] if task_tokens.bos is None else [task_tokens.bos]
  for token in ids:
    if len(row) < length - 1:
      row.append(token)
  row.append(task_tokens.eos)
  weights = [1.0] * len(row)
  while len(row) < length:
    row.append(task_tokens.pad)
    weights.append(0.0)
  example = pair_example(ids, ids, task_tokens, length, length)
  if task_tokens.bos is not None:
    assert example['encoder_input_tokens'].tolist() == row
  assert example['decoder_target_tokens'].tolist() == row
  assert example['decoder_loss_weights'].tolist() == weights


def test_a_dataset_holds_the_pairs_in_the_order_of_the_file(write, vocabulary):
  pairs = [('def f():', 'Does f.'), ('', ''), ('\u00e9 = "<s>"\n', '\t\u6f22')]
  objective = SequenceToSequence(40, 20, 'code', 'doc')
  folder = write(*({'code': s, 'doc': t, 'id': 7} for s, t in pairs))
  dataset = evaluation_examples(objective, folder, 'train', vocabulary)
  assert len(dataset) == len(pairs)
  for index, (source, target) in enumerate(pairs):
    example = dataset[index]
    for feature, text in (
        ('encoder_input_tokens', source),
        ('decoder_target_tokens', target),
    ):
      ids = example[feature].tolist()
      assert (ids[0], ids[1 + len(vocabulary.encode(text))]) == (1, 2)
      assert vocabulary.decode(ids) == text
    # An evaluation does not count the first <s>.
    counted = len(vocabulary.encode(target)) + 1
    assert example['decoder_loss_weights'].sum() == counted


def test_examples_have_the_shapes_that_the_step_is_compiled_for(
    write, vocabulary
):
  folder = write({'source': 'a' * 99, 'target': 'b'})
  [example] = evaluation_examples(OBJECTIVE, folder, 'train', vocabulary)
  spec = OBJECTIVE.batch_spec(3)
  assert {
      name: ((3, *array.shape), array.dtype) for name, array in example.items()
  } == {name: (leaf.shape, leaf.dtype) for name, leaf in spec.items()}
  assert spec['encoder_input_tokens'].shape == (3, 16)
  assert spec['decoder_target_tokens'].shape == (3, 8)


@pytest.mark.parametrize('task_tokens', [FRAMED, UNFRAMED])
@pytest.mark.parametrize(
    ('source', 'target', 'sequence', 'weights'),
    [
        pytest.param(
            [7, 8], [9], [7, 8, 9, 'end', 'pad', 'pad'], [0, 0, 1, 1, 0, 0],
            id='the prompt is given, and one end is learned',
        ),
        pytest.param(
            [7, 8], [9, 10, 11], [7, 8, 9, 10, 11, 'end'], [0, 0, 1, 1, 1, 1],
            id='what just fits is kept',
        ),
        pytest.param(
            [7, 8], [9, 10, 11, 12], [7, 8, 9, 10, 11, 12], [0, 0, 1, 1, 1, 1],
            id='a target that is cut has not ended',
        ),
        pytest.param(
            [7, 8, 9, 10, 11], [12], [7, 8, 9, 10, 11, 12], [0] * 5 + [1],
            id='the decoder sees a source that is too long for the encoder',
        ),
        pytest.param(
            [7] * 9, [12], [7] * 6, [0] * 6,
            id='a prompt without room for its target teaches nothing',
        ),
        pytest.param(
            [], [9], [9, 'end', 'pad', 'pad', 'pad', 'pad'], [1, 1, 0, 0, 0, 0],
            id='an empty prompt',
        ),
    ],
)  # fmt: skip
def test_the_decoder_continues_the_prompt(
    task_tokens, source, target, sequence, weights
):
  class Texts:
    def __init__(self, task_tokens):
      self.task_tokens = task_tokens

    def encode(self, text):
      return [int(number) for number in text.split()]

  objective = SequenceToSequence(4, 6, prompt_to_decoder=True)
  row = {
      'source': ' '.join(map(str, source)),
      'target': ' '.join(map(str, target)),
  }
  numbers = np.random.default_rng(0)
  example = objective.example(row, numbers, Texts(task_tokens))
  ids = {'end': task_tokens.eos, 'pad': task_tokens.pad}
  kept = source[:4]
  assert example['encoder_input_tokens'].tolist() == (
      kept + [task_tokens.pad] * (4 - len(kept))
  )
  assert example['decoder_target_tokens'].tolist() == [
      ids.get(token, token) for token in sequence
  ]
  assert example['decoder_loss_weights'].tolist() == weights
  pair = objective.source_and_target(row, numbers, Texts(task_tokens))
  assert pair[0].tolist() == kept
  assert pair[1].tolist() == [ids.get(x, x) for x in sequence if x != 'pad']


def test_an_evaluation_gives_the_prompt_no_weight_either(write, vocabulary):
  objective = SequenceToSequence(40, 40, prompt_to_decoder=True)
  folder = write({'source': 'def f():', 'target': ' return 1'})
  [example] = evaluation_examples(objective, folder, 'train', vocabulary)
  predicted = example['decoder_target_tokens'][
      example['decoder_loss_weights'] > 0
  ]
  assert vocabulary.decode(predicted.tolist()) == ' return 1'
  assert predicted[-1] == vocabulary.task_tokens.eos


def test_prompts_go_where_the_model_was_trained_to_have_them():
  for model, ours in ((small.MODEL, True), (small.COMPOSITE, False)):
    objective = SequenceToSequence(16, 8, prompt_to_decoder=ours)
    with pytest.raises(UserError, match=f'set PROMPT_TO_DECODER={not ours}'):
      objective.check_model(model)
    dataclasses.replace(
        objective, prompt_to_decoder=not ours
    ).check_model(model)


GOOD = {'source': 'a', 'target': 'b'}


@pytest.mark.parametrize(
    'line',
    [
        pytest.param('{"source": "a", ', id='cut'),
        pytest.param('', id='blank'),
        pytest.param({'source': 'a'}, id='a field missing'),
        pytest.param({'source': 'a', 'target': None}, id='null'),
        pytest.param({'source': 7, 'target': 'b'}, id='a number'),
        pytest.param(['a', 'b'], id='a list'),
        pytest.param('7', id='no object'),
        pytest.param(b'{"source": "\xff", "target": "b"}', id='not UTF-8'),
    ],
)
def test_a_line_that_is_no_pair_is_named(write, vocabulary, line):
  folder = write(GOOD, GOOD, line, GOOD)
  with pytest.raises(UserError, match='in line 3 of .*train.jsonl') as error:
    OBJECTIVE.rows(folder, 'train', vocabulary)
  assert "the texts 'source' and 'target'" in str(error.value)
  assert '\n' not in str(error.value)


def test_a_long_line_is_not_quoted_in_full(write, vocabulary):
  folder = write({'source': 'a' * 10_000})
  with pytest.raises(UserError, match='in line 1 of') as error:
    OBJECTIVE.rows(folder, 'train', vocabulary)
  assert len(str(error.value)) < 500


def test_missing_and_empty_files_are_one_clear_line(write, vocabulary):
  folder = write()
  for split, match in (
      ('train', 'train.jsonl, found an empty file; add some'),
      ('validation', 'validation.jsonl, found no such file; write one JSON'),
  ):
    with pytest.raises(UserError, match=match) as error:
      OBJECTIVE.rows(folder, split, vocabulary)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('lengths', [(1, 8), (16, 1), (0, 8), (16, -4)])
def test_lengths_without_room_for_the_frame_are_refused(lengths):
  with pytest.raises(UserError, match='(?i)_length') as error:
    SequenceToSequence(*lengths)
  assert '\n' not in str(error.value)


def test_padding_is_no_target(write, vocabulary):
  folder = write(GOOD, {'source': 'a', 'target': 'bb bb bb bb bb bb bb bb bb'})
  dataset = evaluation_examples(OBJECTIVE, folder, 'train', vocabulary)
  for example in dataset:
    np.testing.assert_array_equal(
        example['decoder_loss_weights'][1:] > 0,
        example['decoder_target_tokens'][1:] != vocabulary.task_tokens.pad,
    )
