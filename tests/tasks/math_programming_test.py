import json
import math
import os
import pathlib
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from codet5p_jax.errors import UserError
from codet5p_jax.tasks.arithmetic import NotArithmetic, compute
from codet5p_jax.tasks.math_programming import (
    MathProgramming,
    body,
    program_of_chain,
)
from codet5p_jax.tasks.problem_files import Row, read_rows
from codet5p_jax.tasks.prompts import Prepared, Prompt

TASK = MathProgramming()

MATHQA = {
    'task_id': 'MathQA/4',
    'prompt': (
        'def problem():\n    """\n    a sum of rs . 50 at 4 % ? n0 = 50.0 '
        'n1 = 4.0\n    """\n'
    ),
    'canonical_solution': (
        '    n0 = 50.0\n    n1 = 4.0\n    \n    answer = n0 * n1\n'
        '    return answer\n'
    ),
    'entry_point': 'problem',
    'test': 'assert problem() == 200.0\ndef check(x): pass\n',
    'description': 'a sum of rs . 50 at 4 % ?',
}
MATHQA_SOURCE = 'a sum of rs . 50 at 4 % ?\nn0 = 50.0\nn1 = 4.0'
MATHQA_TARGET = 'n0 = 50.0\nn1 = 4.0\n\nanswer = n0 * n1'


def prepare(fields, split='test', number=3):
  return TASK.prepare(Row(number, 'rows.jsonl', fields), split)


def gsm8k(answer, question='How many?'):
  return {'question': question, 'answer': answer}


def data(*parts):
  if not (folder := os.environ.get('CODET5P_TEST_DATA')):
    pytest.skip('CODET5P_TEST_DATA names no folder with math problems')
  return str(pathlib.Path(folder, *parts))


def result(problem, completion):
  """What the function of a problem returns, for programs written here."""
  names = {}
  exec(problem['prompt'] + completion, names)
  return names['problem']()


@pytest.mark.parametrize(
    ('answer', 'program'),
    [
        # Constants in order of appearance; equal numbers are one.
        ('<<3*4+3=15>>', 'n0 = 3\nn1 = 4\nanswer = n0 * n1 + n0'),
        # A result is called by its step, also in one that is stated otherwise.
        (
            '<<1/4=0.25>> <<.25*8=2>> <<2.0*3=6>>',
            'n0 = 1\nn1 = 4\nn2 = 8\nn3 = 3\n'
            't0 = n0 / n1\nt1 = t0 * n2\nanswer = t1 * n3',
        ),
        # The latest of steps with the same result.
        (
            '<<2+2=4>> <<8/2=4>> <<4+1=5>>',
            'n0 = 2\nn1 = 8\nn2 = 1\n'
            't0 = n0 + n0\nt1 = n1 / n0\nanswer = t1 + n2',
        ),
        # Negative results, and signs of constants.
        (
            '<<3-5=-2>> <<-2*-7=14>>',
            'n0 = 3\nn1 = 5\nn2 = 7\nt0 = n0 - n1\nanswer = t0 * -n2',
        ),
        # Parentheses stay where they matter; a value may be a fraction.
        (
            '<<(6+1)*(2*5)=70>> <<(3)/4=3/4>>',
            'n0 = 6\nn1 = 1\nn2 = 2\nn3 = 5\nn4 = 3\nn5 = 4\n'
            't0 = (n0 + n1) * (n2 * n3)\nanswer = n4 / n5',
        ),
        ('<<15=15>>', 'n0 = 15\nanswer = n0'),
    ],
)
def test_a_chain_becomes_a_program(answer, program):
  assert program_of_chain(answer) == program


def test_a_rounded_step_is_computed_exactly():
  # 3.33 is the name of ten thirds from there on.
  program = program_of_chain('<<10/3=3.33>> <<3.33*6=19.98>>')
  assert math.isclose(compute(program)['answer'], 20)


@hypothesis.given(
    st.lists(
        st.tuples(
            st.integers(1, 30), st.sampled_from('+-*/'), st.integers(1, 30)
        ),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_a_program_of_exact_steps_computes_what_the_last_one_states(steps):
  chain, value = '', None
  for left, sign, right in steps:
    left = left if value is None else value
    left = f'({left!r})' if left < 0 else repr(left)
    value = compute(f'x = {left}{sign}{right}')['x']
    chain += f'So <<{left}{sign}{right}={value!r}>>{value}.\n'
  assert math.isclose(
      compute(program_of_chain(chain))['answer'], value, abs_tol=1e-9
  )


@pytest.mark.parametrize(
    'answer',
    ['<<5//2=2>>', '<<x+1=2>>', '<<1+1=two>>', '<<1+1>>', '<<=2>>',
     '<<1/0=1>>'],
)
def test_a_step_that_is_no_arithmetic_is_refused(answer):
  with pytest.raises(NotArithmetic):
    program_of_chain(answer)


@pytest.mark.parametrize(
    ('answer', 'reason'),
    [
        ('Ten.\n#### 10', 'no_chain'),
        ('<<21//2=10>>10\n#### 10', 'not_arithmetic'),
        ('<<2*4=8>>8, and two.\n#### 10', 'other_answer'),
        ('<<2*4=10>>10\n#### 10', 'other_answer'),
        ('<<1/3=0.333>>\n#### 0.333', 'other_answer'),
        ('<<1/3=0.333>>\n#### 0.33325', None),
        ('<<2*600=1200>>\n#### 1,200', None),
        ('<<3-5=-2>>\n#### -2', None),
    ],
)
def test_only_programs_that_compute_the_answer_make_pairs(answer, reason):
  prepared = prepare(gsm8k(answer))
  assert prepared.reason == reason
  assert (prepared.pair is None) == (reason is not None)
  assert prepared.problem is not None


def test_gsm8k_gives_a_pair_and_a_problem():
  prepared = prepare(gsm8k('<<2*4=8>>\n#### 8', ' A """ and \\n?\n'), 'train')
  program = 'n0 = 2\nn1 = 4\nanswer = n0 * n1'
  assert prepared.pair == {'source': 'A """ and \\n?', 'target': program}
  assert prepared.problem == {
      'task_id': 'GSM8K/train/2',
      'prompt': 'def problem():\n',
      'entry_point': 'problem',
      'description': 'A """ and \\n?',
      'test': (
          'import math\n\n\ndef check(candidate):\n'
          '    assert math.isclose(candidate(), 8.0, abs_tol=0.0001)\n'
      ),
      'canonical_solution': (
          '    n0 = 2\n    n1 = 4\n    answer = n0 * n1\n    return answer\n'
      ),
  }
  # The model is asked what it was tuned on.
  prompt = TASK.prompt(prepared.problem)
  assert prompt == Prompt('GSM8K/train/2', prepared.pair['source'])


def test_the_test_of_a_problem_compares_numbers():
  problem = prepare(gsm8k('\n#### 8')).problem
  names = {}
  exec(problem['test'], names)
  for answer in (8, 8.00009, 7.99991, True * 8):
    names['check'](lambda answer=answer: answer)
  for answer in (8.0002, 7.9, math.nan, math.inf):
    with pytest.raises(AssertionError):
      names['check'](lambda answer=answer: answer)
  for answer in ('8', None):
    with pytest.raises(TypeError):
      names['check'](lambda answer=answer: answer)


def test_a_generated_program_is_what_the_function_does():
  problem = prepare(gsm8k('\n#### 8')).problem
  completion = TASK.completion(problem, 'n0 = 2\n\nanswer = n0 * 4\n\n')
  assert completion == (
      '    n0 = 2\n    \n    answer = n0 * 4\n    return answer\n'
  )
  assert result(problem, completion) == 8
  blocks = 'answer = 0\nfor i in range(4):\n  answer += i\n'
  assert result(problem, TASK.completion(problem, blocks)) == 6
  for nothing in ('', 'n0 = 2'):
    with pytest.raises(NameError):
      result(problem, TASK.completion(problem, nothing))


def test_stop_strings_end_a_program():
  task = MathProgramming(stop_strings=('\n\n',))
  assert task.completion({}, 'answer = 1\n\nanswer = 2') == body('answer = 1')
  with pytest.raises(UserError, match='at least one character'):
    MathProgramming(stop_strings=('',))


def test_mathqa_s_constants_stand_on_lines_of_their_own():
  assert TASK.prompt(MATHQA).encoder_text == MATHQA_SOURCE
  prepared = prepare(MATHQA)
  assert prepared.problem == MATHQA
  assert prepared.pair == {'source': MATHQA_SOURCE, 'target': MATHQA_TARGET}
  completion = TASK.completion(MATHQA, prepared.pair['target'])
  assert completion == MATHQA['canonical_solution']
  assert result(MATHQA, completion) == 200


def test_mathqa_as_released_gives_pairs_alone():
  fields = {
      'text': 'a sum of rs . 50 at 4 % ? n0 = 50.0 n1 = 4.0',
      'code': MATHQA_TARGET + '\n',
  }
  prepared = prepare(fields)
  assert prepared.problem is None
  assert prepared.pair == {'source': MATHQA_SOURCE, 'target': MATHQA_TARGET}
  # A problem of MBPP, for instance.
  fields['code'] = 'def answer(a):\n  return a'
  assert prepare(fields) == Prepared(None, None, 'no_answer')


def test_a_reference_program_of_another_form_makes_no_pair():
  prepared = prepare(MATHQA | {'canonical_solution': '    return 200.0\n'})
  assert (prepared.pair, prepared.reason) == (None, 'other_program')
  assert prepared.problem['task_id'] == 'MathQA/4'


def test_gsm_hard_gives_problems_alone():
  code = '\ndef solution():\n    """How?"""\n    return 3 * 4'
  fields = {'input': ' How? ', 'code': code + '\n\n\n', 'target': -12.5}
  prepared = prepare(fields)
  assert (prepared.pair, prepared.reason) == (None, 'problems_alone')
  problem = prepared.problem
  assert problem['task_id'] == 'GSM-hard/test/2'
  assert problem['description'] == 'How?'
  assert 'candidate(), -12.5, abs_tol' in problem['test']
  assert result(problem, problem['canonical_solution']) == 12


@pytest.mark.parametrize(
    ('fields', 'expected'),
    [
        ({'a': 1, 'b': 2}, 'in row 3 of rows.jsonl, found a, b; give a file'),
        ({}, 'found none; give'),
        ({'question': 'How?'}, 'the field answer, a text, .* only question'),
        (gsm8k('8'), "ends with #### and a number in row 3 .*found '8'"),
        (gsm8k('#### eight'), "and a number in row 3 .*'#### eight'"),
        (gsm8k('#### nan'), "and a number in row 3 .*'#### nan'"),
        ({'input': 'a', 'code': 'b', 'target': '1'}, 'the field target, a who'),
        ({'input': 'a', 'code': 'b', 'target': math.inf}, 'a finite number as'),
        ({'canonical_solution': 'a', 'prompt': 1}, 'the field prompt, a text'),
    ],
)
def test_a_row_of_another_kind_is_one_clear_line(fields, expected):
  with pytest.raises(UserError, match=expected) as error:
    prepare(fields)
  assert '\n' not in str(error.value)


def test_problems_need_what_prompts_and_scores_are_made_of(tmp_path):
  path = tmp_path / 'problems.jsonl'
  path.write_text(json.dumps(MATHQA))
  assert TASK.read_problems(str(path)) == [MATHQA]
  path.write_text(json.dumps({k: MATHQA[k] for k in ('task_id', 'prompt')}))
  with pytest.raises(UserError, match='the field description'):
    TASK.read_problems(str(path))


def test_every_problem_of_mathqa_is_understood():
  rows = read_rows(
      data('mathqa_python', 'mathqa-test-python_v1.jsonl.gz')
  )  # fmt: skip
  for row in rows:
    prepared = TASK.prepare(row, 'test')
    source, target = prepared.pair['source'], prepared.pair['target']
    description, *constants = source.split('\n')
    assert description == row.fields['description'].strip()
    # What is given as a constant is what the program begins with.
    assert constants == re.findall(r'^n\d+ = .*', target, re.M)
    completion = TASK.completion(row.fields, target)
    assert completion == row.fields['canonical_solution']
  assert len(rows) == 1883


def test_every_problem_of_gsm_hard_has_a_program():
  rows = read_rows(data('pal', 'gsmhardv2.jsonl.gz'))
  problems = [TASK.prepare(row, 'test').problem for row in rows]
  for p in problems:
    program = p['prompt'] + p['canonical_solution'] + p['test']
    compile(program, p['task_id'], 'exec')
  assert len({p['task_id'] for p in problems}) == 1319
