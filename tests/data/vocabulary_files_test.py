"""Tests of reading, checking and writing the files of a vocabulary."""

import re

import pytest

from codet5p_jax import errors
from codet5p_jax.data import vocabulary_files

ALPHABET = [
    chr(byte)
    for byte in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
] + [chr(0x100 + index) for index in range(68)]


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
  path = tmp_path / 'vocab.json'
  with pytest.raises(errors.UserError, match=re.escape(str(path))):
    vocabulary_files.read(path)


def test_a_fingerprint_depends_on_kind_names_and_contents_but_not_order():
  found = {
      vocabulary_files.fingerprint(kind, files)
      for kind, files in [
          ('k', {'a': b'1', 'b': b'2'}),
          ('k', {'b': b'2', 'a': b'1'}),
          ('l', {'a': b'1', 'b': b'2'}),
          ('k', {'a': b'12', 'b': b''}),
          ('k', {'a': b'1', 'c': b'2'}),
      ]
  }
  assert len(found) == 4


def test_pieces_come_in_the_order_of_their_ids():
  parsed = vocabulary_files.parse_pieces(b'{"b": 1, "\\u0120c": 0}', 'v')
  assert parsed == ['\u0120c', 'b']
  written = vocabulary_files.format_pieces(parsed)
  assert vocabulary_files.parse_pieces(written, 'v') == parsed


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'[1]',
        b'{}',
        b'{"a": 0, "b": 2}',
        b'{"a": 0, "b": "1"}',
        b'{"a": [0]}',
        b'\x1f\x8b\xff',
    ],
)
def test_what_is_no_vocab_json_is_an_error(content):
  with pytest.raises(errors.UserError, match='^the/path'):
    vocabulary_files.parse_pieces(content, 'the/path')


def test_only_the_first_line_of_merges_can_be_a_header():
  merges = [('#', '#'), ('##', '#version'), ('a', '\u0120')]
  written = vocabulary_files.format_merges(merges)
  assert vocabulary_files.parse_merges(written, 'm') == merges
  headless = written.split(b'\n', 1)[1].replace(b'\n', b'\r\n')
  assert vocabulary_files.parse_merges(headless, 'm') == merges


@pytest.mark.parametrize('content', [b'a b c\n', b'ab\n', b'a \n', b'\xff\xfe'])
def test_what_is_no_merges_txt_is_an_error(content):
  with pytest.raises(errors.UserError, match='^the/path'):
    vocabulary_files.parse_merges(content, 'the/path')


def test_the_alphabet_spells_all_bytes_as_gpt2_does():
  spelled = vocabulary_files.piece_bytes([*ALPHABET, '\u0120if', '\u010a'])
  assert sorted(spelled[:256]) == [bytes([byte]) for byte in range(256)]
  assert spelled[256:] == [b' if', b'\n']


def test_pieces_that_cannot_spell_every_text_are_an_error():
  with pytest.raises(errors.UserError, match='1 have none'):
    vocabulary_files.piece_bytes(ALPHABET[1:])
  with pytest.raises(errors.UserError, match='byte-level pieces'):
    vocabulary_files.piece_bytes([*ALPHABET, '\u2581def'])
