"""What stands for a value on the other side of the border.

Its operations are made there. Identity and aliasing do not cross: two copies of
one list are two lists.
"""

from typing import Any

from .border import Border


class Remote:
  """A value of the solution, as the tests see it."""

  def __init__(self, border: Border, number: int) -> None:
    object.__setattr__(self, '_border', border)
    object.__setattr__(self, '_number', number)

  def __getattr__(self, name: str) -> Any:
    return _ask(self, 'getattr', name)

  @property
  def __class__(self) -> Any:
    return _ask(self, 'class')  # For isinstance().

  @property
  def __doc__(self) -> Any:
    return _ask(self, 'getattr', '__doc__')

  @property
  def __dict__(self) -> Any:
    return _ask(self, 'getattr', '__dict__')

  def __call__(self, *arguments: Any, **keywords: Any) -> Any:
    border = object.__getattribute__(self, '_border')
    return border.ask('call', self, *arguments, **keywords)

  def __iter__(self) -> Any:
    iterator = _ask(self, 'iter')
    # Python asks for an iterator of this side; a copied one is not.
    return iterator if type(iterator) is Remote else iter(iterator)

  def __enter__(self) -> Any:
    return _ask(self, 'getattr', '__enter__')()

  def __exit__(self, *error: Any) -> Any:
    return _ask(self, 'getattr', '__exit__')(None, None, None)

  def __rpow__(self, other: Any) -> Any:
    border = object.__getattribute__(self, '_border')
    return border.ask('pow', other, self)


def _ask(remote: Remote, operation: str, *arguments: Any) -> Any:
  border = object.__getattribute__(remote, '_border')
  return border.ask(operation, remote, *arguments)


def _forward(operation: str, swapped: bool = False) -> Any:
  if swapped:
    return lambda self, other: object.__getattribute__(self, '_border').ask(
        operation, other, self)  # fmt: skip
  return lambda self, *arguments: _ask(self, operation, *arguments)


for _name in ('setattr', 'delattr', 'dir', 'len', 'next', 'getitem', 'setitem',
              'delitem', 'contains', 'reversed', 'bool', 'str', 'repr', 'hash',
              'format', 'int', 'float', 'complex', 'bytes', 'index', 'abs',
              'round', 'neg', 'pos', 'invert', 'eq', 'ne', 'lt', 'le', 'gt',
              'ge', 'iadd', 'isub', 'imul', 'imatmul', 'itruediv', 'ifloordiv',
              'imod', 'ipow', 'iand', 'ior', 'ixor'):  # fmt: skip
  setattr(Remote, f'__{_name}__', _forward(_name))
for _name in ('add', 'sub', 'mul', 'matmul', 'truediv', 'floordiv', 'mod',
              'divmod', 'lshift', 'rshift', 'and', 'or', 'xor'):  # fmt: skip
  _operation = f'{_name}_' if _name in ('and', 'or') else _name
  setattr(Remote, f'__{_name}__', _forward(_operation))
  setattr(Remote, f'__r{_name}__', _forward(_operation, swapped=True))
setattr(Remote, '__pow__', _forward('pow'))
setattr(Remote, '__instancecheck__',
        lambda self, value: object.__getattribute__(self, '_border').ask(
            'isinstance', value, self))  # fmt: skip
