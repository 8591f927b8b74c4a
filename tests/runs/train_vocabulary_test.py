import pytest

from codet5p_jax import main
from codet5p_jax.data.vocabularies import SentencePiece, load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.runs.train_vocabulary import train_vocabulary


@pytest.fixture(scope='module')
def rows(source_files, write_rows, tmp_path_factory):
  """A table of source files, one of them twice."""
  folder = tmp_path_factory.mktemp('rows')
  files = [*source_files, source_files[0]]
  return str(write_rows(folder / 'rows.jsonl', files))


def test_a_vocabulary_is_that_of_the_files_without_duplicates(
    rows, source_files, tmp_path, capsys
):
  folder = tmp_path / 'vocabulary'
  flags = [f'--output_dir={folder}', f'--sources={rows}', '--vocab_size=600']
  assert main.main(['train_vocabulary', *flags]) == 0
  expected = SentencePiece.train((file.text for file in source_files), 600)
  assert load_vocabulary(folder) == expected
  assert [path.name for path in tmp_path.iterdir()] == ['vocabulary']


def test_a_sample_is_enough(rows, tmp_path):
  train_vocabulary(str(tmp_path / 'all'), [rows], 600)
  train_vocabulary(str(tmp_path / 'some'), [rows], 600, characters=20_000)
  train_vocabulary(str(tmp_path / 'same'), [rows], 600, characters=20_000)
  everything, some, same = (
      load_vocabulary(tmp_path / name) for name in ('all', 'some', 'same')
  )
  assert some == same != everything


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        ({'vocab_size': 365}, 'at least 366 pieces'),
        ({'vocab_size': 9000}, 'vocabulary of 9000 pieces'),
        ({'characters': 0}, 'characters to be at least 1'),
        ({'languages': ['java']}, 'no text|expected texts'),
    ],
)
def test_a_mistake_is_one_clear_line_and_leaves_nothing(
    rows, tmp_path, options, match
):
  with pytest.raises(UserError, match=match) as error:
    train_vocabulary(
        str(tmp_path / 'vocabulary'), [rows], **{'vocab_size': 600} | options
    )
  assert '\n' not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_overwritten(rows, tmp_path):
  (tmp_path / 'vocabulary').mkdir()
  with pytest.raises(UserError, match='found that it exists'):
    train_vocabulary(str(tmp_path / 'vocabulary'), [rows], 600)
