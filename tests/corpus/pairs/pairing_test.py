import dataclasses
import gzip
import json

import pytest

from codet5p_jax.corpus import sources
from codet5p_jax.corpus.build import CorpusSettings, build_corpus
from codet5p_jax.corpus.executors import Processes
from codet5p_jax.corpus.folder import SPLITS, pair_rows, pair_texts
from codet5p_jax.corpus.pairs import pairing
from codet5p_jax.corpus.pairs.extraction import extract_pairs
from codet5p_jax.corpus.pairs.near_duplicates import are_near, tokens_of
from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.corpus.splits import split_origins
from codet5p_jax.data.vocabularies import SentencePiece, load_vocabulary
from codet5p_jax.errors import UserError


def metadata_of(corpus_dir):
  return json.loads((corpus_dir / 'metadata.json').read_text())


def texts_of(corpus_dir, split):
  try:
    texts = pair_texts(corpus_dir, split)
  except UserError:
    return []
  return [texts[index] for index in range(len(texts))]


def expected_pairs(files):
  """The pairs of files by split, and how many are near-duplicates."""
  split_of = split_origins((file.origin for file in files), 0.05, 0.05)
  sets, result, near = [], {split: [] for split in SPLITS}, 0
  for file in files:
    for pair in extract_pairs(file):
      tokens = tokens_of(pair.code, file.language)
      if any(are_near(tokens, before) for before in sets):
        near += 1
      else:
        row = dataclasses.asdict(pair)
        for name in ('language', 'licence', 'origin', 'path'):
          row[name] = getattr(file, name)
        result[split_of[file.origin]].append(row)
      sets.append(tokens)
  return result, near


def test_a_corpus_holds_the_pairs_of_its_files_in_their_splits(
    paired_corpus, source_files
):
  expected, near = expected_pairs(source_files)
  vocabulary = load_vocabulary(paired_corpus / 'vocabulary')
  for split in SPLITS:
    texts = texts_of(paired_corpus, split)
    assert texts == expected[split]
    rows = pair_rows(paired_corpus, vocabulary, split)
    assert len(rows) == len(texts) > 1
    for index, text in enumerate(texts):
      row = rows[index]
      for side in ('text', 'code'):
        assert row[side].tolist() == vocabulary.encode(text[side])
  metadata = metadata_of(paired_corpus)
  kept = {split: len(rows) for split, rows in expected.items()}
  assert metadata['pairs'] == kept
  assert metadata['pairs_by_language'] == {'python': sum(kept.values())}
  assert metadata['pairs_dropped'] == {
      'empty': 0, 'near_duplicate': near, 'short_code': 0,
      'short_documentation': 0, 'special_method': 0, 'test': 0,
      'undocumented': 0, 'unparsable': 0,
  }  # fmt: skip
  assert metadata['pairs_dropped_by_language'] == {
      'python': {'near_duplicate': near}
  }
  assert near > 0
  assert metadata['settings']['pairs'] is True


def test_pairs_change_nothing_else(small_corpus, paired_corpus):
  found = {}
  for corpus in (small_corpus, paired_corpus):
    metadata = metadata_of(corpus)
    del metadata['settings']
    found[corpus] = [
        {k: v for k, v in metadata.items() if not k.startswith('pairs')},
        {
            path.relative_to(corpus): path.read_bytes()
            for part in ('files', 'tokens', 'vocabulary')
            for path in (corpus / part).rglob('*')
            if path.is_file()
        },
    ]
  assert found[small_corpus] == found[paired_corpus]
  assert not list(small_corpus.glob('pair*'))


FUNCTION = '''\
def {0}({1}, {2}, {3}):
  """{text}"""
  {4} = {1} + {2} * {3}
  {5} = {6}({4}, {7})
  return {5} - {8}({9})
'''


def function(name, changed, text='Computes a number.'):
  """A function of ten names, which others have but for those changed."""
  names = [name, *(f'v{i}' for i in range(1, 10))]
  for place in changed:
    names[place] = f'w{place}'
  return FUNCTION.format(*names, text=text)


def file_of(text, origin, language='python'):
  return SourceFile(text, language, 'mit', origin, 'a/path')


@pytest.fixture
def origin_of(source_files):
  """An origin of each split."""
  split_of = split_origins((file.origin for file in source_files), 0.05, 0.05)
  return {split: origin for origin, split in split_of.items()}


def test_near_duplicates_are_dropped_across_units_and_splits(
    source_files, make_small_corpus, origin_of, tmp_path, monkeypatch
):
  monkeypatch.setattr(sources.units, 'TABLE_UNIT_BYTES', 9000)
  added = [
      ('train', 'one', []),
      ('test', 'one', [4]),  # 9 of 11 names, 0.82
      ('validation', 'one', [2, 3]),  # 8 of 12; but 9 of 11 of the next one
      ('train', 'two', [2, 3]),
      ('test', 'three', [7, 8]),  # 7 of 13; but it is in the last file
      ('validation', 'four', [4, 5, 6]),  # 6 of 14, and fewer of the others
  ]
  files = [
      file_of(function(name, changed), origin_of[split])
      for split, name, changed in added
  ]
  # The same of one file in another.
  files.append(file_of('x = 1\n' + files[4].text, origin_of['train']))
  others = source_files[:18], source_files[18:]
  metadata = make_small_corpus(
      [*files[:2], *others[0], *files[2:], *others[1]],
      tmp_path / 'corpus', pairs=True, min_tokens=5,
  )  # fmt: skip
  names = {
      split: [text['name'] for text in texts_of(tmp_path / 'corpus', split)
              if text['text'] == 'Computes a number.']
      for split in SPLITS
  }
  # What is trained on stays, wherever it stands.
  assert names == {
      'train': ['one', 'two', 'three'], 'validation': ['four'], 'test': []
  }  # fmt: skip
  _, near = expected_pairs(source_files)
  assert metadata['pairs_dropped']['near_duplicate'] == near + 3


def test_files_of_any_length_give_pairs_and_duplicates_none(
    source_files, make_small_corpus, origin_of, tmp_path
):
  short = file_of(
      'def short(a):\n  """Gives one more."""\n  b = a + 1\n  return b\n',
      origin_of['test'],
  )
  long = file_of(
      function('long', range(1, 10)) + 'x = y + z\n' * 2000,
      origin_of['validation'],
  )
  copy = dataclasses.replace(short, origin=origin_of['train'])
  metadata = make_small_corpus(
      [*source_files, short, long, copy], tmp_path / 'corpus', pairs=True
  )
  assert metadata['dropped']['too_short'] == 1
  assert metadata['dropped']['too_long'] == 1
  assert metadata['dropped']['duplicate'] == 1
  found = {
      text['name']: split
      for split in SPLITS
      for text in texts_of(tmp_path / 'corpus', split)
  }
  assert found['short'] == 'test' and found['long'] == 'validation'
  _, near = expected_pairs(source_files)
  assert metadata['pairs_dropped']['near_duplicate'] == near


def test_drops_are_counted_by_language_and_reason(
    source_files, make_small_corpus, origin_of, tmp_path
):
  origin = origin_of['train']
  java = '''class A {
  /** Gives what it has. */
  int f() {
    return 1;
  }
  int g() { return 2; }
  /** Makes one of them. */
  A() { }
}
'''
  files = [
      *source_files,
      file_of('print "one"\n', origin),
      file_of('print "two"\n', origin),
      file_of('def f():\n  return 1\n', origin),
      file_of(java, origin, 'java'),
      file_of('/** Adds two numbers. */\nint f() {\n  x;\n}\n', origin, 'c'),
  ]
  metadata = make_small_corpus(
      files, tmp_path / 'corpus', pairs=True, min_tokens=1
  )
  _, near = expected_pairs(source_files)
  assert metadata['pairs_dropped_by_language'] == {
      'python': {'near_duplicate': near, 'unparsable': 2, 'undocumented': 1},
      'java': {'undocumented': 1, 'special_method': 1},
  }
  assert metadata['pairs_by_language']['java'] == 1
  assert metadata['pairs_dropped']['undocumented'] == 2
  assert sum(metadata['pairs'].values()) == sum(
      metadata['pairs_by_language'].values()
  )


def test_a_split_without_pairs_is_told_and_refused_where_it_is_read(
    source_files, make_small_corpus, origin_of, tmp_path, caplog
):
  files = [
      dataclasses.replace(file, text=file.text.replace('"""', '##'))
      if file.origin == origin_of['validation']
      else file
      for file in source_files
  ]
  metadata = make_small_corpus(files, tmp_path / 'corpus', pairs=True)
  assert metadata['pairs']['validation'] == 0 < metadata['pairs']['test']
  [warning] = [r.getMessage() for r in caplog.records
               if r.name == pairing.__name__ and r.levelname == 'WARNING']
  assert warning.startswith('The validation split has no pair of text and code')
  vocabulary = load_vocabulary(tmp_path / 'corpus' / 'vocabulary')
  for arguments in [(pair_texts, 'validation'),
                    (pair_rows, vocabulary, 'validation')]:
    function_of, *others = arguments
    with pytest.raises(UserError, match='at least one pair .*; add') as error:
      function_of(tmp_path / 'corpus', *others)
    assert '\n' not in str(error.value)


def test_a_side_without_tokens_is_dropped_as_empty(
    source_files, make_small_corpus, tmp_path, monkeypatch
):
  real = SentencePiece.encode_batch

  def encode_batch(self, texts):
    texts = list(texts)
    return [[] if 'Adds beta' in text else ids
            for text, ids in zip(texts, real(self, texts), strict=True)]

  monkeypatch.setattr(SentencePiece, 'encode_batch', encode_batch)
  metadata = make_small_corpus(source_files, tmp_path / 'corpus', pairs=True)
  expected = sum(file.text.count('Adds beta') for file in source_files)
  assert metadata['pairs_dropped']['empty'] == expected > 0
  assert not any(
      'Adds beta' in text['text']
      for split in SPLITS
      for text in texts_of(tmp_path / 'corpus', split)
  )


# Rows of CodeSearchNet.


def row_of(number, partition, **changes):
  row = {
      'repo': f'owner/repo{number % 7}',
      'path': f'lib/file{number}.rb',
      'func_name': f'Box.open{number}',
      'original_string': f'def open{number}(a{number})\n    b{number}\n  end',
      'language': 'ruby',
      'docstring': f'Opens box {number}.\n\n@param a what',
      'partition': partition,
  }
  row['code'] = row['original_string']
  return {k: v for k, v in (row | changes).items() if v is not ...}


def write_table(path, rows):
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  path.write_bytes(gzip.compress(text.encode()))
  return path


def build(path, folder, **settings):
  settings = {'min_tokens': 1, 'vocab_size': 395, 'pairs': True} | settings
  return build_corpus(
      CorpusSettings((str(path),), **settings), folder, None, Processes(1)
  )


PARTITIONS = ['train', 'valid', 'train', 'test', 'train']


def test_rows_stay_in_the_split_they_were_published_in(tmp_path):
  rows = [row_of(n, PARTITIONS[n % 5], code=...) for n in range(50)]
  table = write_table(tmp_path / 'rows.jsonl.gz', rows)
  metadata = build(table, tmp_path / 'corpus')
  numbers = {'train': 30, 'validation': 10, 'test': 10}
  assert metadata['files'] == metadata['pairs'] == numbers
  assert metadata['pairs_by_language'] == {'ruby': 50}
  name_of = {'train': 'train', 'valid': 'validation', 'test': 'test'}
  for split in SPLITS:
    texts = texts_of(tmp_path / 'corpus', split)
    assert [text['path'] for text in texts] == [
        row['path'] for row in rows if name_of[row['partition']] == split
    ]
  assert texts[0] == {
      'text': 'Opens box 3.',
      'code': 'def open3(a3)\n  b3\nend',
      'language': 'ruby',
      'licence': 'unknown',
      'origin': 'owner/repo3',
      'path': 'lib/file3.rb',
      'name': 'open3',
  }


def test_rows_of_no_known_partition_are_split_by_their_repository(tmp_path):
  rows = [row_of(n, ['dev', None, 7, ...][n % 4]) for n in range(50)]
  table = write_table(tmp_path / 'rows.jsonl.gz', rows)
  metadata = build(table, tmp_path / 'corpus')
  split_of = split_origins((row['repo'] for row in rows), 0.05, 0.05)
  for split in SPLITS:
    origins = {t['origin'] for t in texts_of(tmp_path / 'corpus', split)}
    assert origins == {o for o, place in split_of.items() if place == split}
  assert metadata['origins'] == 7


def test_a_table_of_one_partition_still_has_three_splits(tmp_path):
  rows = [row_of(n, 'train') for n in range(50)]
  metadata = build(
      write_table(tmp_path / 'rows.jsonl.gz', rows), tmp_path / 'corpus'
  )
  assert metadata['pairs']['train'] > 25 and all(metadata['pairs'].values())


def test_rows_of_one_repository_stay_in_their_splits_too(tmp_path):
  rows = [row_of(n, PARTITIONS[n % 5], repo='o/r') for n in range(20)]
  metadata = build(
      write_table(tmp_path / 'rows.jsonl.gz', rows), tmp_path / 'corpus'
  )
  assert metadata['pairs'] == {'train': 12, 'validation': 4, 'test': 4}


def test_empty_sides_of_rows_are_counted_and_other_ones_are_bad(
    tmp_path, caplog
):
  rows = [row_of(n, PARTITIONS[n % 5]) for n in range(50)]
  rows[4]['docstring'] = ''
  rows[9]['docstring'] = None
  rows[14]['docstring'] = ['no', 'text']
  rows[19]['code'] = ' '
  rows[24]['code'] = None
  del rows[29]['docstring']
  metadata = build(
      write_table(tmp_path / 'rows.jsonl.gz', rows), tmp_path / 'corpus'
  )
  assert metadata['pairs_dropped'] | {'empty': 2, 'undocumented': 1} == (
      metadata['pairs_dropped']
  )
  assert metadata['dropped']['bad_row'] == 2
  assert metadata['dropped']['empty'] == 1
  assert 'the first in line 15: docstring is no text' in caplog.text
  # Bad and empty rows are no files; that with an empty side is one.
  assert metadata['pairs']['train'] == 24 and metadata['files']['train'] == 27


def test_without_pairs_rows_are_plain_documents(tmp_path):
  rows = [row_of(n, 'test', docstring=['no', 'text']) for n in range(50)]
  metadata = build(
      write_table(tmp_path / 'rows.jsonl.gz', rows), tmp_path / 'corpus',
      pairs=False,
  )  # fmt: skip
  assert sum(metadata['files'].values()) == 50
  assert metadata['files']['train'] > 25
  assert metadata['dropped']['bad_row'] == 0 and 'pairs' not in metadata
