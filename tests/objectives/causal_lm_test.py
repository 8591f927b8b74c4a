import numpy as np
import pytest

from codet5p_jax.corpus.token_store import write_token_store
from codet5p_jax.data.task_tokens import TaskTokens
from codet5p_jax.data.vocabularies import Vocabulary, load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.objectives.causal_lm import CausalLM, follow_clm
from codet5p_jax.training.batches import evaluation_examples

FRAMED = TaskTokens(
    pad=0, bos=1, eos=2, unk=3, clm=9, match=4, tdec=5, cdec=6, sentinels=()
)
# As CodeGen's: one id for all of pad, end and unknown, and no beginning.
UNFRAMED = TaskTokens(
    pad=50, bos=None, eos=50, unk=50, clm=51, match=4, tdec=5, cdec=6,
    sentinels=(),
)  # fmt: skip
# Five and four tokens, each followed by the end of its document.
DOCUMENTS = ([11, 12, 13, 14, 15], [21, 22, 23, 24])


class Bytes(Vocabulary):
  """A vocabulary of 60 ids whose special tokens a test may choose."""

  def __init__(self, task_tokens):
    pieces = [bytes([index]) for index in range(60)]
    super().__init__('bytes', {}, 60, task_tokens, pieces, {})

  def encode_batch(self, texts):
    return [list(text.encode()) for text in texts]

  def encode_as_released(self, text):
    raise NotImplementedError


def write_corpus(folder, task_tokens, documents=DOCUMENTS):
  """Writes stores of given ids; returns the vocabulary they are found by."""
  vocabulary = Bytes(task_tokens)
  folder.mkdir()
  (folder / 'metadata.json').write_text('{}')
  for split in ('train', 'validation', 'test'):
    write_token_store(
        folder / 'tokens' / vocabulary.fingerprint[:16] / split,
        [(np.int32(ids), np.ones(len(ids), bool)) for ids in documents],
        task_tokens.eos,
        vocabulary.vocab_size,
        vocabulary.fingerprint,
    )
  return vocabulary


def targets(dataset):
  return [
      dataset[index]['decoder_target_tokens'].tolist()
      for index in range(len(dataset))
  ]


@pytest.mark.parametrize(
    ('task_tokens', 'expected'),
    [(FRAMED, [1, 7, 2, 8, 2]), (UNFRAMED, [7, 2, 8, 50])],
    ids=['framed', 'without a beginning'],
)
def test_the_encoder_sees_clm_and_the_decoder_learns_the_whole_row(
    task_tokens, expected
):
  row = {
      'tokens': np.array([7, 2, 8], np.int32),
      'word_starts': np.array([True, True, False]),
  }
  source, target = follow_clm(row, task_tokens)
  assert source.tolist() == [task_tokens.clm]
  assert target.tolist() == expected


@pytest.mark.parametrize(
    ('task_tokens', 'expected'),
    [
        (
            FRAMED,
            # Rows go on over the ends of documents; the last id fills no row.
            [[1, 11, 12, 13, 14, 15, 2], [1, 2, 21, 22, 23, 24, 2]],
        ),
        (UNFRAMED, [[11, 12, 13, 14, 15, 50, 50]]),
    ],
    ids=['framed', 'without a beginning'],
)
def test_rows_fill_the_target_length_and_follow_one_another(
    tmp_path, task_tokens, expected
):
  vocabulary = write_corpus(tmp_path / 'corpus', task_tokens)
  dataset = evaluation_examples(
      CausalLM(target_length=7), str(tmp_path / 'corpus'), 'train', vocabulary
  )
  assert targets(dataset) == expected


@pytest.mark.parametrize('task_tokens', [FRAMED, UNFRAMED])
def test_examples_have_the_shapes_that_the_step_is_compiled_for(
    tmp_path, task_tokens
):
  vocabulary = write_corpus(tmp_path / 'corpus', task_tokens)
  objective = CausalLM(target_length=6)
  dataset = evaluation_examples(
      objective, str(tmp_path / 'corpus'), 'test', vocabulary
  )
  spec = objective.batch_spec(3)
  assert {
      name: ((3, *array.shape), array.dtype)
      for name, array in dataset[0].items()
  } == {name: (leaf.shape, leaf.dtype) for name, leaf in spec.items()}


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_targets_laid_end_to_end_are_the_texts_of_the_split(
    small_corpus, source_files, split
):
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  dataset = evaluation_examples(
      CausalLM(target_length=34), str(small_corpus), split, vocabulary
  )
  ids = [i for row in targets(dataset) for i in row[1:-1]]
  assert len(ids) == 32 * len(dataset) > 32
  eos = vocabulary.task_tokens.eos
  first, *_ = bytes_between(ids, eos, vocabulary)
  assert first in {file.text for file in source_files}


def bytes_between(ids, eos, vocabulary):
  """Texts of the whole documents within a stream."""
  begin = 0
  for end, token in enumerate(ids):
    if token == eos:
      yield vocabulary.decode(ids[begin:end])
      begin = end + 1


def test_a_corpus_shorter_than_a_row_is_one_clear_line(tmp_path):
  vocabulary = write_corpus(tmp_path / 'corpus', FRAMED)
  objective = CausalLM(target_length=14)
  with pytest.raises(UserError, match='of 12 tokens, found 11') as error:
    objective.rows(str(tmp_path / 'corpus'), 'train', vocabulary)
  assert '\n' not in str(error.value)


def test_rows_that_have_no_room_for_a_token_are_refused():
  with pytest.raises(UserError, match='(?i)target_length'):
    CausalLM(target_length=2)


def test_tokens_of_another_vocabulary_are_refused(tmp_path):
  vocabulary = write_corpus(tmp_path / 'corpus', FRAMED)
  vocabulary.fingerprint = 'beef' * 16
  with pytest.raises(UserError, match='expected tokens of vocabulary beefbeef'):
    CausalLM(8).rows(str(tmp_path / 'corpus'), 'train', vocabulary)
