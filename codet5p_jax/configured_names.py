"""What gin files and a command line name, checked before gin acts on it.

gin's own messages for a wrong name show neither the nearest right one nor,
often, anything that the person typed. `configuration` feeds every statement
through `ConfiguredNames` first; nothing here needs gin.
"""

import dataclasses
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Collection, Iterator

from codet5p_jax import arguments
from codet5p_jax import errors


@dataclasses.dataclass(eq=False)
class Reference:
  """`@scope/module.name()` in a value; its repr is gin syntax."""

  scoped_name: str  # Given its full name by ConfiguredNames.
  evaluate: bool

  def __repr__(self) -> str:
    return f'@{self.scoped_name}' + ('()' if self.evaluate else '')


@dataclasses.dataclass(frozen=True)
class Macro:
  """`%NAME` in a value; its repr is gin syntax."""

  name: str

  def __repr__(self) -> str:
    return f'%{self.name}'


@dataclasses.dataclass(frozen=True)
class Import:
  """What a name that a gin file imports stands for."""

  module: str  # What is imported: 'codet5p_jax.models.t5'.
  bound: str  # What the name means: the same, or its root for `import a.b`.


def short_name(full_name: str) -> str:
  """`t5.T5Config` for `codet5p_jax.models.t5.T5Config`."""
  return '.'.join(full_name.split('.')[-2:])


def leaves(value: object) -> Iterator[object]:
  """Yields what the containers in a value hold, keys included."""
  if isinstance(value, dict):
    value = [*value.keys(), *value.values()]
  if isinstance(value, (list, tuple)):
    for item in value:
      yield from leaves(item)
  else:
    yield value


def import_module(name: str, place: str) -> None:
  """Imports a module that a gin file asks for.

  Raises:
    UserError: there is no such module. An error inside the module stays as it
      is, since its traceback tells where.
  """
  try:
    importlib.import_module(name)
  except ModuleNotFoundError as error:
    if not f'{name}.'.startswith(f'{error.name}.'):
      raise
    package = error.name.rpartition('.')[0]
    paths = getattr(sys.modules.get(package), '__path__', None)
    known = [module.name for module in pkgutil.iter_modules(paths)]
    leaf = error.name.rpartition('.')[-1]
    hint = arguments.nearest(leaf, known) if package else ''
    raise errors.UserError(
        f'{place}no module {error.name} can be imported{hint}') from None


class ConfiguredNames:
  """The names that gin files set and use, each with its place.

  A place opens an error message: `runs/pretrain.gin, line 3: `.

  Attributes:
    macros: name to (value, place) of every macro that is set.
    used: name to place of every macro that is read.
    targets: full name, such as `codet5p_jax.runs.train.train`, to function.
    homes: full name to the module to import for it.
    imported: name in some gin file to its import.
    bound: full name and parameter of all that is bound outside any scope.
    offered: macros that the run has a parameter for.
  """

  def __init__(self):
    self.macros: dict[str, tuple[object, str]] = {}
    self.used: dict[str, str] = {}
    self.targets: dict[str, Callable] = {}
    self.homes: dict[str, str] = {}
    self.imported: dict[str, Import] = {}
    self.bound: set[tuple[str, str]] = set()
    self.offered: set[str] = set()
    self._consumers: list[tuple[str, object]] = []  # Macro name, annotation.

  def add_target(self, full_name: str, target: Callable, home: str) -> None:
    """Notes a function or class that can be configured."""
    self.targets.setdefault(full_name, target)
    self.homes.setdefault(full_name, home)

  def resolve(
      self, selector: str, imports: dict[str, Import], place: str
  ) -> str:
    """The full name of what a gin file with these imports calls `selector`.

    Raises:
      UserError: the file imports nothing of that name.
    """
    root, *attributes = selector.split('.')
    if root == 'gin':
      return selector
    if root not in imports:
      hint = arguments.nearest(root, imports) if imports else (
          '; import its module in the file that names it')
      raise errors.UserError(
          f"{place}'{root}' of {selector} is not imported{hint}")
    full_name = imports[root].bound
    found = sys.modules[full_name]
    for attribute in attributes:
      if not hasattr(found, attribute):
        known = [name for name in dir(found) if not name.startswith('_')
                 and callable(getattr(found, name))]
        raise errors.UserError(
            f'{place}{full_name} has no {attribute}'
            f'{arguments.nearest(attribute, known)}')
      found = getattr(found, attribute)
      full_name = f'{full_name}.{attribute}'
    if not callable(found):
      leaf = selector.rpartition('.')[-1]
      hint = f'; write {selector}.{leaf}' if hasattr(found, leaf) else ''
      raise errors.UserError(
          f'{place}{selector} is no function or class{hint}')
    self.add_target(full_name, found, imports[root].module)
    return full_name

  def find(self, selector: str, place: str) -> str:
    """The full name of what a command line calls `selector`.

    The end of a full name will do, as in `T5Config`, and so will whatever a
    loaded gin file could write.

    Raises:
      UserError: no gin file imports such a thing, or several fit.
    """
    if selector.startswith('gin.'):
      return selector
    fitting = [name for name in self.targets
               if f'.{name}'.endswith(f'.{selector}')]
    if len({id(self.targets[name]) for name in fitting}) > 1:
      raise errors.UserError(
          f'{place}{selector} may be {" or ".join(sorted(fitting))}; '
          f'write more of the name')
    if fitting:
      return fitting[0]
    if selector.split('.')[0] in self.imported:
      return self.resolve(selector, self.imported, place)
    length = 1 + selector.count('.')
    known = ['.'.join(name.split('.')[-length:]) for name in self.targets]
    raise errors.UserError(
        f'{place}no loaded gin file imports {selector}'
        f'{arguments.nearest(selector, known)}')

  def check_settable(self, macro: str) -> None:
    """Checks that a macro has a use.

    Raises:
      UserError: neither the gin files nor the run know it.
    """
    known = {*self.macros, *self.used, *self.offered} - {'gin.REQUIRED'}
    if macro not in known:
      raise errors.UserError(
          f'no loaded gin file has a macro {macro}'
          f'{arguments.did_you_mean(macro, known) or ";"} '
          f'known are {arguments.listed(known)}')

  def split(self, binding: str) -> tuple[str, str, str, str]:
    """Splits what follows `--gin.` into scope, full name, parameter and value.

    Raises:
      UserError: it is not `scope/function.parameter=value`, scope optional, or
        names no known function.
    """
    match = re.fullmatch(
        r'(?:([\w/]+)/)?([\w.]+)\.(\w+)=(.*)', binding, re.DOTALL)
    if not match:
      raise errors.UserError(
          f'expected --gin.function.parameter=value, found --gin.{binding}')
    scope, selector, parameter, typed = match.groups()
    place = f'--gin.{binding.partition("=")[0]}: '
    return scope or '', self.find(selector, place), parameter, typed

  def full_name(
      self, selector: str, place: str, imports: dict[str, Import] | None
  ) -> str:
    """As `resolve` in a gin file; without imports as `find`."""
    if imports is None:
      return self.find(selector, place)
    return self.resolve(selector, imports, place)

  def define(
      self, name: str, value: object, place: str,
      imports: dict[str, Import] | None = None,
  ) -> None:
    """Sets a macro: in a gin file with these imports, or on the command line.

    Raises:
      UserError: the value refers to something unknown.
    """
    self._note(value, place, imports)
    self.macros[name] = (value, place)

  def bind(
      self, scope: str, full_name: str, parameter: str, value: object,
      place: str, imports: dict[str, Import] | None = None,
  ) -> None:
    """Binds a parameter: in a gin file, or on the command line.

    Raises:
      UserError: there is no such parameter, or it does not take such a value.
    """
    hint = self.hint(full_name, parameter, place)
    self._note(value, place, imports)
    if not scope:
      self.bound.add((full_name, parameter))
    if isinstance(value, Macro):
      self._consumers.append((value.name, hint))
    elif not _accepts(hint, value):
      raise errors.UserError(
          f'{place}{short_name(full_name)}.{parameter} expects '
          f'{arguments.describe(hint)}, found {value!r}')

  def bind_to_macro(
      self, run: Callable, parameter: str, typed: Collection[str]
  ) -> list[str]:
    """Binds a parameter of the run to the macro of its name, where that is due.

    A macro of the gin files fills a gap only; one that only the command line
    sets can have no other purpose than the parameter.

    Args:
      run: the function.
      parameter: its parameter `name`, for the macro `NAME`.
      typed: the macros that the command line sets.

    Returns:
      The gin lines that do it: one or none.
    """
    key, full_name = parameter.upper(), f'{run.__module__}.{run.__qualname__}'
    self.add_target(full_name, run, run.__module__)
    self.offered.add(key)
    if key in self.macros or key in self.used:
      if (full_name, parameter) in self.bound:
        return []
    elif key not in typed:
      return []
    self.bind('', full_name, parameter, Macro(key), '')
    return [f'{full_name}.{parameter} = %{key}']

  def _note(
      self, value: object, place: str, imports: dict[str, Import] | None
  ) -> None:
    for leaf in leaves(value):
      if isinstance(leaf, Macro):
        self.used.setdefault(leaf.name, place)
      elif isinstance(leaf, Reference):
        *scopes, selector = leaf.scoped_name.split('/')
        leaf.scoped_name = '/'.join(
            [*scopes, self.full_name(selector, place, imports)])

  def hint(self, full_name: str, parameter: str, place: str) -> object:
    """The annotation of a parameter, `object` where it has none.

    Raises:
      UserError: there is no such parameter.
    """
    if full_name not in self.targets:  # One of gin's own, as in gin.singleton.
      return object
    known = arguments.parameters(self.targets[full_name])
    if known is not None and parameter not in known:
      raise errors.UserError(
          f'{place}{short_name(full_name)} has no parameter {parameter}'
          f'{arguments.nearest(parameter, known)}')
    return arguments.type_hints(self.targets[full_name]).get(parameter, object)

  def macro_hints(self, name: str, through: tuple = ()) -> list[object]:
    """The annotations of all parameters that a macro feeds, also by another.

    Where none is annotated, a number or a boolean that a gin file gives the
    macro says what is expected.

    Args:
      name: the macro.
      through: the macros that led here, in a recursive call.

    Raises:
      UserError: macros refer to each other in a circle.
    """
    if name in through:
      raise errors.UserError(
          f'{self.macros[name][1]}{name} takes its value from itself, by '
          f'{" and ".join(through)}; give it one')
    hints = [hint for macro, hint in self._consumers if macro == name]
    for other, (value, _) in self.macros.items():
      if isinstance(value, Macro) and value.name == name:
        hints += self.macro_hints(other, (*through, name))
    hints = [hint for hint in hints if hint is not object]
    value, _ = self.macros.get(name, (None, ''))
    if not hints and isinstance(value, (bool, int, float)):
      hints = [bool if isinstance(value, bool) else float]
    return hints

  def check_macros(self) -> None:
    """Checks the values of all macros against what they feed.

    Raises:
      UserError: naming the place of the value.
    """
    for name, (value, place) in self.macros.items():
      for hint in self.macro_hints(name):
        if not _accepts(hint, value):
          raise errors.UserError(
              f'{place}{name} expects {arguments.describe(hint)}, '
              f'found {value!r}')


def _accepts(hint: object, value: object) -> bool:
  """As arguments.accepts; what a reference or macro yields is not known yet."""
  opaque = any(isinstance(leaf, (Macro, Reference)) for leaf in leaves(value))
  return opaque or arguments.accepts(hint, value)
