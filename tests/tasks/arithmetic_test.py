import ast
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from codet5p_jax.tasks.arithmetic import (
    NotArithmetic,
    compute,
    evaluate,
    parse_expression,
)


def value(text: str, **names: float) -> float:
  return evaluate(parse_expression(text), names)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('2+3*4', 14.0),
        (' (2 + 3) * 4', 20.0),
        ('2-3-4', -5.0),
        ('2/4/4', 0.125),
        ('2**3**2', 512.0),
        ('-2**2', -4.0),
        ('+.5 - -1.', 1.5),
        ('a*b - 1', 5.0),
    ],
)
def test_an_expression_has_its_usual_value(text, expected):
  assert value(text, a=2.0, b=3.0) == expected


NUMBERS = st.integers(0, 99).map(str) | st.sampled_from(['.5', '2.', '1e3'])
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.builds('({})'.format, inner),
        st.builds('-{}'.format, inner),
        st.builds('{}{}{}'.format, inner, st.sampled_from('+-*/'), inner),
    ),
    max_leaves=8,
)


@hypothesis.given(EXPRESSIONS)
def test_values_are_python_s(text):
  try:
    expected = eval(text)  # Numbers, signs and parentheses alone.
  except ZeroDivisionError:
    with pytest.raises(NotArithmetic, match='no value'):
      value(text)
  else:
    assert math.isclose(value(text), expected, rel_tol=1e-12)


@pytest.mark.parametrize(
    'text',
    [
        '5//2', '5%2', '1<2', 'abs(1)', 'n0', '[1]', 'True', '"a"', '1j', 'x.y',
        '1 if 2 else 3', '(n:=1)', 'lambda: 1', '1, 2', '~1', 'not 1', '1 or 2',
        '', '1+', '1=1', '07', '1\n2', '\x00', '(' * 300, '$2',
    ],
)  # fmt: skip
def test_anything_else_is_refused(text):
  with pytest.raises(NotArithmetic):
    value(text)


@pytest.mark.parametrize(
    'text',
    ['1/0', '0**-1', '9**9**9', '1e308*10', '1e308*10-1e308*10', '(-8)**.5',
     '9' * 400, '1e999', '+'.join(['1'] * 5000)],
    ids=lambda text: text[:9],
)  # fmt: skip
def test_what_has_no_finite_real_value_is_refused_at_once(text):
  with pytest.raises(NotArithmetic):
    value(text)


def test_a_program_is_computed_line_by_line():
  program = 'n0 = 3\nt0 = n0 * 2\n\nn0 = t0 - 7  # Again.\nanswer = n0 / 4'
  assert compute(program) == {'n0': -1.0, 't0': 6.0, 'answer': -0.25}


@pytest.mark.parametrize(
    'program',
    [
        'a = b = 1', 'a, b = 1, 2', 'a += 1', 'import math', 'a.b = 1', '1',
        'print(1)', 'if 1:\n  a = 1', 'a = a', 'def f(): pass', 'a: int = 1',
        'a = 1\nb = __import__("os")', 'a =',
    ],
)  # fmt: skip
def test_a_program_that_does_more_is_refused(program):
  with pytest.raises(NotArithmetic):
    compute(program)


def test_nothing_is_executed(monkeypatch):
  refused = pytest.fail
  for name in ('eval', 'exec'):
    monkeypatch.setattr(f'builtins.{name}', refused)
  assert compute('a = 1 + 1')['a'] == 2
  assert isinstance(parse_expression('1'), ast.Constant)
