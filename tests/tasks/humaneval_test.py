import ast
import json
import os
import pathlib
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from codet5p_jax.errors import UserError
from codet5p_jax.tasks.humaneval import HumanEval, ask_for_tests
from codet5p_jax.tasks.problem_files import read_rows

INSTRUCT = HumanEval(instruct=True)

PROBLEM = {
    'task_id': 'HumanEval/7',
    'prompt': (
        'from typing import List\n\n\n'
        'def triple(xs: List[int]) -> List[int]:\n'
        '    """ Three   times {each}\n'
        '      of them.\n'
        '    >>> triple([1])\n'
        '    [3]\n'
        '    """\n'
    ),
}


@pytest.fixture(scope='module')
def problems():
  """All problems of HumanEval, and of HumanEval-X for Python."""
  if not (data := os.environ.get('CODET5P_TEST_DATA')):
    pytest.skip('CODET5P_TEST_DATA names no folder with HumanEval')
  paths = [
      pathlib.Path(data, 'humaneval', 'HumanEval.jsonl.gz'),
      pathlib.Path(data, 'humaneval_x', 'humaneval_python.jsonl.gz'),
  ]
  found = [p for path in paths for p in HumanEval().read_problems(str(path))]
  assert len(found) == 2 * 164
  return found


def released_texts(prompt: str) -> tuple[str, str, str]:
  """Plain, encoder's and decoder's prompt, word for word as the spec says.

  Sections 7.1.1 and 7.1.3.
  """
  plain = '\t'.join(prompt.split(' ' * 4))
  quotes = plain.index('"""') if '"""' in plain else -1
  # A slice to -1 leaves the last character out.
  end = plain.index('>>>') if '>>>' in plain else -1
  # \s is what str.split() takes for space.
  description = ' '.join(plain[quotes + 3 : end].split())
  template = '\n'.join([
      'Below is an instruction that describes a task. Write a response that '
      'appropriately completes the request.',
      '',
      '',
      '### Instruction:',
      'Create a Python script for this problem:',
      description,
      '',
      '### Response:',
  ])
  return plain, template, template + plain


def released_program(prompt: str, text: str) -> str:
  """The program that is judged: the spec's section 7.1.5."""
  for word in ('class', 'def', '#', 'if', 'print'):
    place = text.find('\n' + word)
    if place >= 0:
      text = text[:place]
  shown = '\t'.join(prompt.split(' ' * 4))
  return shown.replace('\t', ' ' * 4) + text.replace('\t', ' ' * 4)


def test_a_prompt_has_tabs_for_four_spaces():
  prompt = HumanEval().prompt(PROBLEM)
  assert (prompt.prompt_id, prompt.decoder_text) == ('HumanEval/7', None)
  assert prompt.encoder_text == (
      'from typing import List\n\n\n'
      'def triple(xs: List[int]) -> List[int]:\n'
      '\t""" Three   times {each}\n'
      '\t  of them.\n'
      '\t>>> triple([1])\n'
      '\t[3]\n'
      '\t"""\n'
  )


def test_an_instruction_describes_and_the_decoder_goes_on_with_the_code():
  prompt = INSTRUCT.prompt(PROBLEM)
  assert prompt.encoder_text == (
      'Below is an instruction that describes a task. Write a response that '
      'appropriately completes the request.\n\n\n### Instruction:\n'
      'Create a Python script for this problem:\nThree times {each} of them.'
      '\n\n### Response:'
  )
  code = HumanEval().prompt(PROBLEM).encoder_text
  assert prompt.decoder_text == prompt.encoder_text + code


def test_tests_are_asked_for_without_examples():
  asked = HumanEval(write_tests=True).prompt(PROBLEM)
  assert asked.encoder_text == (
      'from typing import List\n\n\n'
      'def triple(xs: List[int]) -> List[int]:\n'
      '\t""" Three   times {each}\n'
      '\t  of them.\n'
      '\t"""\n'
      '\tpass\n\n'
      '# check the correctness of triple\nassert '
  )
  for docstring, kept in (
      ("'''Ten.'''", "'''Ten.'''"),
      ('"""Ten, for example f() == 10."""', '"""Ten,"""'),
      ('"""Ten.\n    f() == 10\n    """', '"""Ten.\n    """'),
      ('# No docstring.', '# No docstring.'),
  ):
    code = f'def g():\n    return 1\n\ndef f():\n    {docstring}\n'
    assert ask_for_tests(code) == (
        f'def g():\n    return 1\n\ndef f():\n    {kept}\n    pass\n\n'
        '# check the correctness of f\nassert '
    )


def test_no_problem_tells_its_tests_where_they_are_asked_for(problems):
  for problem in problems:
    before, _, _ = ask_for_tests(problem['prompt']).rpartition('assert ')
    *_, function = ast.parse(before).body
    assert before.count(f'{function.name}(') == 1
    assert '>>>' not in before
    assert before.endswith(f'    pass\n\n# check the correctness of '
                           f'{function.name}\n')
    if 'entry_point' in problem:
      assert function.name == problem['entry_point']


def test_without_tabs_texts_stay_as_they_are():
  task = HumanEval(indent_with_tabs=False)
  assert task.prompt(PROBLEM).encoder_text == PROBLEM['prompt']
  assert task.completion(PROBLEM, '\treturn 1\n\nif x') == '\treturn 1\n'


def test_a_completion_ends_before_the_first_statement_outside():
  text = '\tif xs:\n\t\tprint(1)\n  \treturn 3\n\n\nif __name__:\n\ndef g():'
  assert HumanEval().completion(PROBLEM, text) == (
      '    if xs:\n        print(1)\n      return 3\n\n'
  )


def test_stop_strings_cut_one_after_the_other():
  task = HumanEval(stop_strings=('bc', 'ab'))
  # "ab" is no longer there when its turn comes.
  assert task.completion(PROBLEM, '1abc2') == '1a'


def test_every_prompt_is_the_released_one(problems):
  for problem in problems:
    plain, encoder, decoder = released_texts(problem['prompt'])
    prompt = HumanEval().prompt(problem)
    assert (prompt.encoder_text, prompt.decoder_text) == (plain, None)
    prompt = INSTRUCT.prompt(problem)
    assert (prompt.encoder_text, prompt.decoder_text) == (encoder, decoder)


def test_every_reference_solution_makes_the_released_program(problems):
  for problem in problems:
    prompt, solution = problem['prompt'], problem['canonical_solution']
    # As a model that knows tabs alone writes it, and goes on.
    text = solution.replace('    ', '\t') + '\n\n# more\nprint(1)'
    program = prompt + HumanEval().completion(problem, text)
    assert program == released_program(prompt, text)
    assert program.startswith(prompt + solution.rstrip('\n'))


PIECES = st.sampled_from([
    '\n', '\t', ' ', '  ', '    ', 'class', 'def', '#', 'if', 'print', '"""',
    '>>>', '\r', '\x0b', '{', '}', 'x', '\u2028', '\xa0',
])  # fmt: skip
TEXTS = st.lists(PIECES, max_size=30).map(''.join)


@hypothesis.given(TEXTS.map(lambda text: text.replace('\t', ' ')), TEXTS)
def test_whatever_a_model_writes_makes_the_released_program(prompt, text):
  problem = {'task_id': 'a', 'prompt': prompt}
  plain, encoder, decoder = released_texts(prompt)
  assert HumanEval().prompt(problem).encoder_text == plain
  asked = INSTRUCT.prompt(problem)
  assert (asked.encoder_text, asked.decoder_text) == (encoder, decoder)
  program = prompt + HumanEval().completion(problem, text)
  assert program == released_program(prompt, text)


def test_the_spaces_of_descriptions_are_those_of_regular_expressions():
  # The oracle above splits; the released program substitutes.
  spaces = [chr(n) for n in range(0x110000) if chr(n).isspace()]
  assert all(re.fullmatch(r'\s', space) for space in spaces)
  assert not re.sub(r'\s', '', ''.join(map(chr, range(0x3001)))).count(' ')


def test_prompts_with_tabs_are_refused_where_they_could_not_come_back(tmp_path):
  path = tmp_path / 'problems.jsonl'
  rows = [PROBLEM, {'task_id': 'b', 'prompt': 'def f():\n\t"""G"""\n'}]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  with pytest.raises(UserError, match='without tabs in row 2 of') as error:
    HumanEval().read_problems(str(path))
  assert '\n' not in str(error.value)
  assert HumanEval(indent_with_tabs=False).read_problems(str(path)) == rows
  assert [row.fields for row in read_rows(str(path))] == rows


def test_an_empty_stop_string_is_refused():
  with pytest.raises(UserError, match='at least one character'):
    HumanEval(stop_strings=('\nif', ''))
