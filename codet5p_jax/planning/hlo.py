"""What a compiled program does, read from its optimised HLO.

Matrix products: XLA's own count takes the body of a loop once, whatever the
number of rounds, and mixes in what is no matrix product. Here each product
counts as often as it runs. CPUs and GPUs call it `dot`; a TPU's compiler turns
it into a `convolution`, whose window may stand for batch axes.

Collectives: the bytes that devices exchange, by the kind of exchange.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

# `%name = type opcode(operands), attributes`. Types hold no blank before a
# word with a bracket, so the first such word is the opcode.
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'\s([a-z][\w\-]*)\(')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_ARRAY = re.compile(r'^\w+\[([\d,]*)\]')
# JAX 0.12 has `%tuple#2` stand for the element, where 0.10 takes it by an
# instruction of its own.
_ELEMENT = re.compile(r'%([\w.\-]+)#(\d+)')
_CALLED = re.compile(
    r'\b(?:calls|to_apply|body|condition|true_computation|false_computation)='
    r'%?([\w.\-]+)'
)
_CALLED_LIST = re.compile(
    r'\b(?:branch_computations|called_computations)=\{([^}]*)\}'
)
_LOOP = re.compile(r'\b(condition|body)=%?([\w.\-]+)')
_SUMMED = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')
_TYPED = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_COLLECTIVES = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
    'collective-permute', 'ragged-all-to-all', 'collective-broadcast',
)  # fmt: skip
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """One line of a computation.

  Attributes:
    opcode: such as `dot`.
    type: of its result, as it is printed.
    shape: of its result, None for a tuple.
    operands: what stands in the brackets.
    attributes: what follows them.
    is_root: whether its result is the computation's.
  """

  opcode: str
  type: str
  shape: tuple[int, ...] | None
  operands: str
  attributes: str
  is_root: bool


# The instructions of a computation, by name.
_Scope = dict[str, _Instruction]


def matmul_flops(hlo_text: str) -> int:
  """FLOPs of all matrix products of a program, on one device.

  Products inside fusions and called computations count; those of a loop's body
  as often as the loop runs. Of branches, all count.

  Args:
    hlo_text: of an optimised module, `jax.stages.Compiled.as_text()`.

  Raises:
    ValueError: there is no entry, or it cannot be told how often a loop that
      matters runs.
  """
  products = _sum(
      hlo_text, lambda *where: {'products': _product_flops(*where)}
  )
  return products['products']


def collective_bytes(hlo_text: str) -> dict[str, int]:
  """Bytes that one device exchanges with others in a program, by kind.

  Of an exchange they are those of its result, and of a reduce-scatter, whose
  result is a part, those of its operands: what a device must receive, or send,
  but for the small share that it has already. An all-reduce,
  which is a reduce-scatter and an all-gather of the same, is counted once.

  Args:
    hlo_text: as for `matmul_flops`.

  Returns:
    {"all-gather", "all-reduce", "reduce-scatter", "all-to-all" or
    "collective-permute": bytes}, of those that occur.

  Raises:
    ValueError: as `matmul_flops`.
  """
  return dict(_sum(hlo_text, _exchanged_bytes))


def _exchanged_bytes(
    instruction: _Instruction, scope: _Scope
) -> dict[str, int]:
  # What is started has its result where it is done.
  kind = instruction.opcode.removesuffix('-done')
  if kind not in _COLLECTIVES:
    return {}
  types = [instruction.type]
  if kind == 'reduce-scatter':
    types = [scope[name].type for name in _operands(instruction)]
  return {kind: sum(map(_bytes, types))}


def _bytes(type_text: str) -> int:
  """Bytes of an array, or of all in a tuple."""
  return sum(
      math.prod(_sizes(sizes)) * _item_bits(dtype) // 8
      for dtype, sizes in _TYPED.findall(type_text)
  )


def _item_bits(dtype: str) -> int:
  """Bits of a number, which its dtype's name tells: `bf16`, `f8e4m3fn`."""
  if dtype == 'pred':
    return 8
  bits = re.search(r'\d+', dtype)
  return int(bits[0]) if bits else 0  # Tokens have none.


def _sum(
    hlo_text: str,
    measure: Callable[[_Instruction, _Scope], Mapping[str, int]],
) -> Mapping[str, int]:
  """Sums a measure over all instructions, as often as each is run."""
  computations, entry = _parse(hlo_text)

  @functools.cache
  def total(name: str) -> collections.Counter:
    scope = computations[name]
    sums = collections.Counter()
    for instruction in scope.values():
      sums.update(measure(instruction, scope))
      for called in _called(instruction):
        within = total(called)
        if any(within.values()):
          rounds = _rounds(instruction, scope, computations)
          sums.update({key: rounds * n for key, n in within.items()})
    return sums

  return total(entry)


def _parse(hlo_text: str) -> tuple[dict[str, _Scope], str]:
  """Returns the computations by name, and the name of the entry."""
  computations: dict[str, _Scope] = {}
  entry = None
  current: _Scope = {}
  types: dict[str, str] = {}
  for line in hlo_text.splitlines():
    if found := _INSTRUCTION.match(line):
      root, name, text = found.groups()
      if opcode := _OPCODE.search(text):
        operands, attributes = _split_operands(text[opcode.end() :])
        array = _ARRAY.match(text)
        types[name] = text[: opcode.start()]
        for whole, index in _ELEMENT.findall(operands):
          dtype, sizes = _TYPED.findall(types[whole])[int(index)]
          current[f'{whole}#{index}'] = _Instruction(
              'get-tuple-element',
              f'{dtype}[{sizes}]',
              _sizes(sizes),
              f'%{whole}',
              f'index={index}',
              is_root=False,
          )
        current[name] = _Instruction(
            opcode[1],
            types[name],
            array and _sizes(array[1]),
            operands,
            attributes,
            is_root=bool(root),
        )
    elif found := _COMPUTATION.match(line):
      current, types = {}, {}
      computations[found[2]] = current
      if found[1]:
        entry = found[2]
  if entry is None:
    raise ValueError('no ENTRY: this is no text of an HLO module')
  return computations, entry


def _split_operands(text: str) -> tuple[str, str]:
  """Splits behind the bracket that closes the operands."""
  depth = 1
  for place, character in enumerate(text):
    depth += (character in '({') - (character in ')}')
    if depth == 0:
      return text[:place], text[place + 1 :]
  return text, ''


def _sizes(text: str) -> tuple[int, ...]:
  return tuple(int(size) for size in text.split(',') if size)


def _called(instruction: _Instruction) -> Iterator[str]:
  """Yields the computations that an instruction runs."""
  if instruction.opcode.endswith(('-done', '-update')):
    return  # Their start has named it.
  yield from _CALLED.findall(instruction.attributes)
  for names in _CALLED_LIST.findall(instruction.attributes):
    yield from re.findall(r'[\w.\-]+', names)


def _rounds(
    instruction: _Instruction, scope: _Scope, computations: dict[str, _Scope]
) -> int:
  """How often an instruction runs what it calls.

  A CPU's compiler tells how often a loop runs. A TPU's does not: there it is
  read from how the loop counts.
  """
  if instruction.opcode != 'while':
    return 1
  if told := _TRIP_COUNT.search(instruction.attributes):
    return int(told[1])
  named = dict(_LOOP.findall(instruction.attributes))
  condition, body = (computations[named[k]] for k in ('condition', 'body'))
  try:
    compare = _root(condition)
    counter, limit = _operands(compare)
    index = _element(condition, counter)
    if compare.opcode != 'compare' or 'direction=LT' not in compare.attributes:
      raise KeyError(compare.opcode)
    [initial] = _operands(instruction)
    first = _operands(scope[initial])[index]
    grown = _origin(body, _operands(_root(body))[index])
    if grown.opcode != 'add':
      raise KeyError(grown.opcode)
    step = sum(
        0 if _element(body, name) == index else _constant(body, name)
        for name in _operands(grown)
    )
    return -(-(_constant(condition, limit) - _constant(scope, first)) // step)
  except (KeyError, IndexError, ValueError) as error:
    raise ValueError(
        f'it cannot be told how often a loop that matters runs: '
        f'{instruction.attributes[:200]}'
    ) from error


def _root(scope: _Scope) -> _Instruction:
  return next(i for i in scope.values() if i.is_root)


def _operands(instruction: _Instruction) -> list[str]:
  return re.findall(r'%([\w.\-]+(?:#\d+)?)', instruction.operands)


def _origin(scope: _Scope, name: str) -> _Instruction:
  """The instruction of that name, or the one whose result it copies."""
  while scope[name].opcode in ('copy', 'copy-start', 'copy-done', 'bitcast'):
    [name] = _operands(scope[name])
  return scope[name]


def _element(scope: _Scope, name: str) -> int | None:
  """The index of what is taken from a tuple, None for anything else."""
  instruction = _origin(scope, name)
  index = re.search(r'\bindex=(\d+)', instruction.attributes)
  is_taken = instruction.opcode == 'get-tuple-element'
  return int(index[1]) if is_taken and index else None


def _constant(scope: _Scope, name: str) -> int:
  instruction = _origin(scope, name)
  if instruction.opcode != 'constant':
    raise KeyError(name)
  return int(instruction.operands)


def _product_flops(instruction: _Instruction, scope: _Scope) -> int:
  if instruction.opcode == 'dot':
    left, _ = _operand_shapes(instruction, scope)
    summed = _SUMMED.search(instruction.attributes)
    axes = _sizes(summed[1]) if summed else ()
    return 2 * math.prod(instruction.shape) * math.prod(left[i] for i in axes)
  if instruction.opcode == 'convolution':
    return _convolution_flops(instruction, scope)
  return 0


def _operand_shapes(
    instruction: _Instruction, scope: _Scope
) -> list[tuple[int, ...]]:
  """Shapes of the two operands, printed beside their names or not."""
  if printed := re.findall(r'\w+\[([\d,]*)\]\S* %', instruction.operands):
    return [_sizes(sizes) for sizes in printed]
  return [scope[name].shape for name in _operands(instruction)]


def _convolution_flops(instruction: _Instruction, scope: _Scope) -> int:
  """As XLA counts them: only products of real inputs, none with padding."""
  attributes = instruction.attributes
  left, right = _operand_shapes(instruction, scope)
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes).groups()
  window = re.search(r'window=\{([^}]*)\}', attributes)
  settings = dict(re.findall(r'(\w+)=(\S+)', window[1] if window else ''))
  groups = {
      name: int(count)
      for name, count in re.findall(r'(\w+)_group_count=(\d+)', attributes)
  }

  def per_dimension(name, default):
    return settings[name].split('x') if name in settings else default

  spatial = sorted(c for c in labels[2] if c.isdigit())
  strides = per_dimension('stride', ['1'] * len(spatial))
  paddings = per_dimension('pad', ['0_0'] * len(spatial))
  input_dilations = per_dimension('lhs_dilate', ['1'] * len(spatial))
  kernel_dilations = per_dimension('rhs_dilate', ['1'] * len(spatial))
  places = 1
  for i, label in enumerate(spatial):
    places *= _valid_places(
        input_size=left[labels[0].index(label)],
        kernel_size=right[labels[1].index(label)],
        output_size=instruction.shape[labels[2].index(label)],
        stride=int(strides[i]),
        padding=int(paddings[i].split('_')[0]),
        input_dilation=int(input_dilations[i]),
        kernel_dilation=int(kernel_dilations[i]),
    )
  batch = left[labels[0].index('b')] // groups.get('batch', 1)
  features = left[labels[0].index('f')] // groups.get('feature', 1)
  outputs = instruction.shape[labels[2].index('f')]
  return 2 * batch * features * outputs * places


def _valid_places(
    *,
    input_size: int,
    kernel_size: int,
    output_size: int,
    stride: int,
    padding: int,
    input_dilation: int,
    kernel_dilation: int,
) -> int:
  """Pairs of a window's and an output's place that meet a real input."""
  last = (output_size - 1) * stride + (kernel_size - 1) * kernel_dilation
  if input_dilation == 1 and padding <= 0 and last - padding < input_size:
    return kernel_size * output_size  # All do; the arrays would be large.
  outputs = np.arange(output_size, dtype=np.int64) * stride - padding
  window = np.arange(kernel_size, dtype=np.int64) * kernel_dilation
  place = outputs[:, None] + window
  meets = (place >= 0) & (place % input_dilation == 0)
  return int(np.sum(meets & (place // input_dilation < input_size)))
