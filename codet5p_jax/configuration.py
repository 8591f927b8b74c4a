"""Runs and models from gin files, for `main` and for notebooks.

This is the only module that imports gin. Nothing is decorated: a gin file
imports the modules whose functions and dataclasses it configures, and calls
them `module.name`.

    from __gin__ import dynamic_registration
    from codet5p_jax.models import t5
    from codet5p_jax.runs import train

    TRAIN_STEPS = 1000
    MODEL = @t5.T5Config()
    t5.T5Config.emb_dim = 768
    train.train:
      model_dir = %MODEL_DIR
      train_steps = %TRAIN_STEPS

Macros, in capitals, are what people set, by `KEY=value`; one without a value,
or set to `%gin.REQUIRED`, is asked for when a run needs it. A parameter of the
run that no gin file binds takes the macro of its own name in capitals (`model`
takes `MODEL`). So `info` and `precompile` need no gin files beside those of the
model and of the training that they look at. In a notebook:

    configuration.load(['models/tiny.gin', 'runs/finetune.gin'],
                       {'TRAIN_STEPS': 10})
    model = configuration.macro('MODEL')
    configuration.call(train.train, model_dir='/tmp/run')
"""

import os
import pathlib
import re
import tokenize
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import gin
from gin import config_parser

from codet5p_jax import arguments
from codet5p_jax import configured_names
from codet5p_jax import errors
from codet5p_jax import gin_paths

_REGISTRATION = '__gin__.dynamic_registration'
_FIRST_LINE = 'from __gin__ import dynamic_registration'

# gin keeps one configuration per process, and so does this module: the names
# of the loaded files, and what was called since: function, scopes, arguments.
_names = configured_names.ConfiguredNames()
_called: list[tuple[Callable, list[str], Collection[str]]] = []

# `include` in a gin file finds its file as --gin_file does. gin's own readers
# must go: one of them logs an error for every file that it does not find.
gin.config._FILE_READERS[:] = [
    (lambda name: open(gin_paths.locate(name), encoding='utf-8'),
     lambda name: gin_paths.find(name) is not None)]
# A notebook that reloads a module configures its functions anew.
gin.enter_interactive_mode()


def load(
    gin_files: Sequence[str | os.PathLike],
    macros: Mapping[str, object] | None = None,
    bindings: Sequence[str] = (),
    run: Callable | None = None,
    given: Collection[str] = (),
) -> None:
  """Replaces the configuration by that of some gin files and what overrides it.

  Args:
    gin_files: looked up in the current folder, then among the shipped ones
      (gin_paths.gin_folder()). Later files override earlier ones.
    macros: macro name to value. A string is read as on the command line: a
      literal, `@reference`, `%MACRO`, or a string without quotes.
    bindings: texts such as `train.train_steps=4`, values read likewise.
    run: the function that will be called. Its parameters, in capitals, are
      macros too.
    given: parameters of `run` that its caller will pass.

  Raises:
    UserError: a file is missing or malformed, or a name or value is wrong.
  """
  global _names
  _names = names = configured_names.ConfiguredNames()
  _called.clear()
  gin.clear_config()
  gin_files = [os.fspath(gin_file) for gin_file in gin_files]
  for gin_file in gin_files:
    _survey(gin_file, names)
  macros = dict(macros or {})
  for binding in bindings:
    key, equals, value = binding.partition('=')
    if equals and re.fullmatch(r'\w+', key):  # T5X writes macros so, too.
      macros[key] = value
  lines = []
  for parameter in run and arguments.parameters(run) or ():
    if parameter not in given:
      lines += names.bind_to_macro(run, parameter, macros)
  for key, value in macros.items():
    names.check_settable(key)
    value = _read_value(value, names.macro_hints(key), key)
    names.define(key, value, f'{key}: ')
    lines.append(f'{key} = {value!r}')
  for binding in bindings:
    if not re.match(r'\w+=', binding):
      lines.append(_bind(binding, names))
  names.check_macros()
  # Full names mean the same whatever aliases the files use.
  imports = sorted({f'import {home}' for name, home in names.homes.items()
                    if any(name in line for line in lines)})
  try:
    for gin_file in gin_files:
      gin.parse_config_file(gin_file)
    gin.parse_config([_FIRST_LINE, *imports, *lines])
  except (SyntaxError, ValueError) as error:  # What only gin checks: rare.
    raise errors.UserError(' '.join(str(error).split())) from None


def _bind(binding: str, names: configured_names.ConfiguredNames) -> str:
  """Notes `scope/module.function.parameter=value`; returns the gin line."""
  scope, full_name, parameter, typed = names.split(binding)
  place = f'--gin.{binding.partition("=")[0]}'
  hint = names.hint(full_name, parameter, f'{place}: ')
  value = _read_value(typed, [hint], place)
  names.bind(scope, full_name, parameter, value, f'{place}: ')
  return f'{scope}{"/" if scope else ""}{full_name}.{parameter} = {value!r}'


def _read_value(value: object, hints: Sequence[object], name: str) -> object:
  """Reads the value of a macro or binding that the user typed or passed."""
  if not isinstance(value, str):
    return arguments.value_for(value, hints, name)
  literal = arguments.parse_literal(value)
  if literal is not value or not re.match(r'[@%]|[([{].*[@%]', value):
    return arguments.value_for(value, hints, name)
  try:
    parser = config_parser.ConfigParser(value, _Delegate())
    parsed = parser.parse_value()
    if parser.current_token.string.strip():
      raise SyntaxError
    return parsed
  except (SyntaxError, tokenize.TokenError):
    if value[0] in '@%':
      raise errors.UserError(
          f'{name} expects @module.name, @module.name() or %MACRO after the '
          f'first sign, found {value}') from None
    return arguments.value_for(value, hints, name)  # '(a|b)@c' is a string.


class _Delegate(config_parser.ParserDelegate):
  """Makes gin's parser leave references and macros as they are written."""

  def configurable_reference(self, scoped_name: str, evaluate: bool):
    return configured_names.Reference(scoped_name, evaluate)

  def macro(self, name: str):
    return configured_names.Macro(name)


def _survey(
    name: str, names: configured_names.ConfiguredNames, place: str = '',
    including: tuple[pathlib.Path, ...] = (),
) -> None:
  """Notes what a gin file, and those that it includes, set and use.

  `place` says where it is included, and `including` lists the files that do,
  outermost first.

  Raises:
    UserError: naming file and line.
  """
  path = gin_paths.locate(name, place)
  if path.resolve() in including:
    raise errors.UserError(f'{place}{name} includes itself; remove this line')
  text = path.read_text(encoding='utf-8')
  try:
    statements = list(config_parser.ConfigParser(text, _Delegate()))
  except tokenize.TokenError:
    # Its own words and line differ between versions of Python.
    raise errors.UserError(
        f'{name}, line {len(text.splitlines())}: the file ends within a '
        f'statement; close its bracket or quotes') from None
  except SyntaxError as error:
    message = str(error.args[0]).splitlines()[-1].strip().rstrip('.')
    raise errors.UserError(
        f'{name}, line {error.lineno}: {message}; expected NAME = value, with '
        f'strings in quotes') from None
  imports: dict[str, configured_names.Import] = {}
  registering = False
  for statement in statements:
    here = f'{name}, line {statement.location.line_num}: '
    if isinstance(statement, config_parser.IncludeStatement):
      _survey(statement.filename, names, here, (*including, path.resolve()))
    elif isinstance(statement, config_parser.ImportStatement):
      if statement.module == _REGISTRATION:
        registering = True
        continue
      if not registering:
        raise errors.UserError(
            f"{here}expected '{_FIRST_LINE}' before this import; add it")
      configured_names.import_module(statement.module, here)
      bound = statement.bound_name()
      whole = statement.is_from or statement.alias
      imports[bound] = names.imported[bound] = configured_names.Import(
          statement.module, statement.module if whole else bound)
    elif isinstance(statement, config_parser.BindingStatement):
      scope, selector, parameter, value, _ = statement
      if parameter:
        target = names.resolve(selector, imports, here)
        names.bind(scope, target, parameter, value, here, imports)
      else:
        key = f'{scope}/{selector}' if scope else selector
        names.define(key, value, here, imports)


def call(function: Callable, **given: object) -> object:
  """Calls a function with the loaded configuration.

  Args:
    function: a run, or a class or function that a loaded gin file configures.
    **given: arguments; they win over the configuration.

  Raises:
    UserError: something that the function needs has no value. The function's
      own errors come as it raised them.
  """
  return _call(function, [], given)


def macro(name: str) -> object:
  """The value of a macro, evaluated: `macro('MODEL')` in a notebook."""
  _names.check_settable(name)
  return _call(gin.config.macro, [name], {})


def _call(
    function: Callable, scopes: list[str], given: Mapping[str, object]
) -> object:
  """Calls `function` in a gin scope."""
  try:
    gin.get_configurable(function)
  except ValueError:  # No loaded gin file names it, as `info` often.
    gin.external_configurable(function)
  _check_complete(function, scopes, given)
  _called.append((function, scopes, tuple(given)))
  # gin would evaluate what is bound to arguments that are given, in vain.
  selector = gin.config._inverse_lookup(function).selector
  bound = gin.config._CONFIG.get(('', selector), {})
  hidden = {name: bound.pop(name) for name in given if name in bound}
  try:
    with gin.config_scope(scopes):
      return gin.get_configurable(function)(**given)
  except Exception as error:  # Every kind, to be raised again as it was.
    failure = error
  finally:
    bound.update(hidden)
  raise _undecorated(failure).with_traceback(failure.__traceback__)


def _undecorated(error: Exception) -> Exception:
  """The error as it was raised.

  gin replaces it, once for each function on the way, by one of a class of the
  same name derived from its own, which says 'In call to configurable'.
  """
  cause = error.__context__
  while (cause is not None and type(error).__bases__ == (type(cause),)
         and type(error).__name__ == type(cause).__name__):
    error, cause = cause, cause.__context__
  return error


def _reached(
    function: Callable, scopes: list[str], given: Collection[str] = (),
    evaluated: bool = True, seen: set | None = None,
) -> Iterator[tuple[Callable, list[str], dict[str, object], bool]]:
  """Yields what a call can come to use, itself first; macros are functions.

  Each as function, gin scopes, bindings with references as they are and
  without those of parameters that the caller gives, and whether gin itself
  makes the call (`@name()`).
  """
  seen = set() if seen is None else seen
  key = (function, tuple(scopes), evaluated)
  if key in seen:
    return
  seen.add(key)
  with gin.config_scope(scopes):
    bindings = gin.get_bindings(function, resolve_references=False)
  bindings = {name: v for name, v in bindings.items() if name not in given}
  yield function, scopes, bindings, evaluated
  for reference in gin.config.iterate_references(bindings):
    yield from _reached(
        reference.configurable.wrapped, reference.scopes or scopes,
        evaluated=reference.evaluate, seen=seen)


def _check_complete(
    function: Callable, scopes: list[str], given: Collection[str]
) -> None:
  """Raises a UserError that lists what a call needs and nothing sets."""
  missing: dict[str, str] = {}  # What to type, and where it is asked for.
  for target, where, bindings, evaluated in _reached(function, scopes, given):
    unset = [name for name, value in bindings.items()
             if repr(value) == '%gin.REQUIRED']
    if evaluated:
      bound = {*bindings, *(given if target is function else ())}
      unset += [
          name for name, p in (arguments.parameters(target) or {}).items()
          if p.default is p.empty and name not in bound]
    for name in unset:
      if target is gin.config.macro:
        name = '/'.join(where)
        place = _names.used.get(name, '').rpartition(':')[0]
        missing[name] = f' ({place})' if place else ''
      elif target is function:
        missing[name.upper()] = ''
      else:
        missing[f'--gin.{target.__qualname__}.{name}'] = ''
  if missing:
    listed = ', '.join(name + place for name, place in missing.items())
    raise errors.UserError(
        f'{"/".join(scopes) or function.__name__} needs a value for {listed}; '
        f'give {next(iter(missing))}=value, or a --gin_file that sets it')


def operative_config() -> str:
  """The configuration of the calls so far, as a gin file that replays them.

  It holds the defaults of all that was called, and the bindings of what was
  passed on but not called yet; not the arguments given to `call`.
  """
  values: dict[tuple[str, str], dict[str, object]] = {}

  def note(scope: str, selector: str, bindings: Mapping[str, object]) -> None:
    # gin notes a call made while it evaluates MODEL in the scope MODEL, where
    # an override of the replay would not reach. The outermost scope with the
    # same bindings says the same.
    parts = scope.split('/') if scope else []
    while parts and ('/'.join(parts), selector) not in gin.config._CONFIG:
      parts.pop()
    values.setdefault(('/'.join(parts), selector), {}).update(bindings)

  for call_ in _called:
    for target, where, bindings, _ in _reached(*call_):
      selector = gin.config._inverse_lookup(target).selector
      note('/'.join(where), selector, bindings)
  with gin.config._OPERATIVE_CONFIG_LOCK:
    for (scope, selector), bindings in gin.config._OPERATIVE_CONFIG.items():
      note(scope, selector, bindings)
    return gin.config._config_str(values)
