"""Tests of the ids by role."""

import pytest

from codet5p_jax import errors
from codet5p_jax.data import task_tokens

CODET5_PIECES = ['<pad>', '<s>', '</s>', '<unk>', '<mask>'] + [
    f'piece{i}' for i in range(31_995)
]
GPT2_PIECES = [f'piece{i}' for i in range(50_256)] + ['<|endoftext|>']


@pytest.mark.parametrize('bimodal', [False, True])
def test_codet5_ids_are_those_of_the_checkpoints(bimodal):
  layout = task_tokens.codet5_layout(CODET5_PIECES, bimodal=bimodal)
  tokens = layout.task_tokens
  assert (tokens.pad, tokens.bos, tokens.eos, tokens.unk) == (0, 1, 2, 3)
  assert tokens.clm == 3
  assert (tokens.sentinel(0), tokens.sentinel(99)) == (32_099, 32_000)
  assert (tokens.match, tokens.tdec, tokens.cdec) == (32_100, 32_101, 32_102)
  assert layout.vocab_size == (32_103 if bimodal else 32_100)


def test_codegen_ids_lie_in_the_rows_that_were_never_trained():
  layout = task_tokens.codegen_layout(GPT2_PIECES)
  tokens = layout.task_tokens
  assert (tokens.pad, tokens.eos, tokens.unk) == (50_256, 50_256, 50_256)
  assert tokens.bos is None
  assert tokens.clm == 50_295
  assert (tokens.sentinel(0), tokens.sentinel(99)) == (50_296, 50_395)
  assert (tokens.match, tokens.tdec, tokens.cdec) == (50_396, 50_397, 50_398)
  assert layout.vocab_size == 51_200


def test_codegen_whitespace_follows_gpt2_from_31_spaces_to_2_tabs():
  runs = task_tokens.codegen_layout(GPT2_PIECES).whitespace
  assert runs[0] == ' ' * 31 and runs[29] == ' ' * 2
  assert runs[30] == '\t' * 9 and runs[37] == '\t' * 2 and len(runs) == 38


@pytest.mark.parametrize('k', [-1, 100])
def test_a_sentinel_that_does_not_exist_is_an_error(k):
  tokens = task_tokens.codegen_layout(GPT2_PIECES).task_tokens
  with pytest.raises(errors.UserError, match=f'sentinel {k} was asked for'):
    tokens.sentinel(k)


def test_sentinels_at_the_end_of_the_file_are_dropped():
  sentinels = list(task_tokens.SENTINEL_NAMES[::-1])
  bimodal = ['[ENC]', '[TDEC]', '[CDEC]']
  for additions in ([], sentinels, sentinels + bimodal):
    pieces = task_tokens.drop_codet5_additions(CODET5_PIECES + additions)
    assert pieces == CODET5_PIECES


def test_sentinels_in_another_order_are_an_error():
  pieces = CODET5_PIECES + list(task_tokens.SENTINEL_NAMES)
  with pytest.raises(errors.UserError, match='from <extra_id_99> down'):
    task_tokens.codet5_layout(pieces, bimodal=False)


def test_files_of_another_vocabulary_are_an_error():
  with pytest.raises(errors.UserError, match='should begin with <pad> <s>'):
    task_tokens.codet5_layout(GPT2_PIECES, bimodal=False)
  with pytest.raises(errors.UserError, match='should end with <.endoftext.>'):
    task_tokens.codegen_layout(CODET5_PIECES)
  too_many = ['piece'] * 51_100 + ['<|endoftext|>']
  with pytest.raises(errors.UserError, match='leaves no room'):
    task_tokens.codegen_layout(too_many)
