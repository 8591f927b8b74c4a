from codet5p_jax.decoding.stopping import cut_at_stop, tokens_until_stop

LETTERS = 'abcdefghij'


def render(tokens):
  return ''.join(LETTERS[token] for token in tokens)


def test_the_first_stop_string_cuts():
  assert cut_at_stop('a\nclass\ndef', ['\ndef', '\nclass']) == 'a'
  assert cut_at_stop('abc', ['x']) is None
  assert cut_at_stop('abc', []) is None
  assert cut_at_stop('abc', ['ab']) == ''


def test_tokens_are_counted_until_the_string_is_whole():
  tokens = [0, 1, 2, 3, 1, 2]
  assert tokens_until_stop(tokens, render, ['cd']) == 4
  assert tokens_until_stop(tokens, render, ['db', 'dbc']) == 5
  assert tokens_until_stop(tokens, render, ['a']) == 1
  assert tokens_until_stop(tokens, render, ['x']) is None
  assert tokens_until_stop(tokens, render, []) is None
