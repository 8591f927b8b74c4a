"""The data of a run, in words and tables."""

from collections.abc import Mapping
from typing import Any

from codet5p_jax.reporting import markdown
from codet5p_jax.reporting.reported_run import ReportedRun

# What is told in words, by the key of a corpus's metadata.
_TOLD = {
    'licences': 'Licences',
    'dropped': 'Files left out',
    'pairs_dropped': 'Functions left out of the pairs of text and code',
}


def describe_data(run: ReportedRun) -> str:
  """The data in words and, of a corpus, in tables."""
  where = f'The data is in {run.config["data_dir"]}'
  if run.corpus is None:
    return f'{where}, where no metadata of a corpus is found.'
  words = [f'{where}.']
  if run.corpus.get('split_by') == 'origin':
    words.append(
        'Validation and test are whole packages or repositories, but for rows '
        'that were published with a split.'
    )
  for key, told in _TOLD.items():
    counts = _counts(run.corpus, key)
    shown = [f'{name} {number:,}' for name, number in counts.items() if number]
    if len(shown) > 12:
      shown[12:] = [f'{len(shown) - 12} more']
    if shown:
      words.append(f'{told}: {", ".join(shown)}.')
  return '\n\n'.join([
      markdown.paragraph(' '.join(words)),
      *_count_tables(run.corpus, 'split', 'files', 'tokens', 'pairs'),
      *_count_tables(
          run.corpus,
          'language',
          'languages',
          'tokens_by_language',
          'pairs_by_language',
      ),
  ])


def _count_tables(
    corpus: Mapping[str, Any],
    by: str,
    files_key: str,
    tokens_key: str,
    pairs_key: str,
) -> list[str]:
  """A table of files, tokens and pairs, if the metadata has them."""
  files, tokens = _counts(corpus, files_key), _counts(corpus, tokens_key)
  header = [by, 'files', 'tokens']
  rows = [
      [name, f'{number:,}', markdown.number(tokens.get(name), ',')]
      for name, number in files.items()
  ]
  if pairs := _counts(corpus, pairs_key):
    header.append('pairs')
    for row in rows:
      row.append(f'{pairs.get(row[0], 0):,}')
  return [markdown.table(header, rows)] if rows else []


def _counts(corpus: Mapping[str, Any], key: str) -> dict[str, int]:
  """The counts of that name in the metadata, the greatest first."""
  counts = corpus.get(key, {}).items()
  return dict(sorted(counts, key=lambda item: -item[1]))
