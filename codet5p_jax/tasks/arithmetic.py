"""Little programs of assignments, computed without ever running Python.

Only numbers, names that were assigned before, `+ - * / **`, signs and
parentheses have a meaning; anything else is refused.
"""

import ast
import math
import operator
from collections.abc import Mapping

_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class NotArithmetic(ValueError):
  """A text has another meaning, or none, or no finite real value."""


def parse_expression(text: str) -> ast.expr:
  """Parses an expression; what may stand in it, `evaluate` decides.

  Raises:
    NotArithmetic: it is no expression of Python.
  """
  # Space before an expression would be indentation.
  return _parse(text.strip(), 'eval').body


def evaluate(expression: ast.expr, names: Mapping[str, float]) -> float:
  """The value of an expression, in floating point, so that none is endless.

  >>> evaluate(parse_expression('-(n0 + 1) * 2 ** .5 ** 2 / 4'), {'n0': 3.0})
  -1.189207115002721

  Args:
    expression: see `parse_expression`.
    names: the values of names.

  Raises:
    NotArithmetic: it is more than arithmetic, or has no finite real value.
  """
  try:
    value = _value(expression, names)
  except (ZeroDivisionError, OverflowError, RecursionError) as error:
    raise NotArithmetic(f'it has no value: {error}') from error
  if not math.isfinite(value):
    raise NotArithmetic(f'it has no finite value: {value}')
  return value


def compute(program: str) -> dict[str, float]:
  """The values of all names after a program.

  >>> compute('n0 = 48\\nn1 = 2\\nt0 = n0 / n1\\nanswer = n0 + t0')['answer']
  72.0

  Args:
    program: assignments, one a line.

  Raises:
    NotArithmetic: it holds anything but assignments of arithmetic to names.
  """
  names: dict[str, float] = {}
  for statement in _parse(program, 'exec').body:
    match statement:
      case ast.Assign(targets=[ast.Name(id=name)], value=expression):
        names[name] = evaluate(expression, names)
      case _:
        raise NotArithmetic(f'it does more than assign: {program!r:.60}')
  return names


def _parse(text: str, mode: str) -> ast.AST:
  try:
    return ast.parse(text, mode=mode)
  except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
    raise NotArithmetic(f'it is no Python: {text!r:.60}') from error


def _value(expression: ast.expr, names: Mapping[str, float]) -> float:
  match expression:
    case ast.Constant(value=number) if type(number) in (int, float):
      return float(number)
    case ast.Name(id=name) if name in names:
      return float(names[name])
    case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _SIGNS:
      return _SIGNS[type(sign)](_value(operand, names))
    case ast.BinOp(left=left, op=operation, right=right) if (
        type(operation) in _OPERATIONS
    ):
      compute_ = _OPERATIONS[type(operation)]
      value = compute_(_value(left, names), _value(right, names))
      if isinstance(value, complex):
        raise NotArithmetic('it has no real value')
      return value
  raise NotArithmetic(f'it is no arithmetic: {ast.dump(expression):.60}')
