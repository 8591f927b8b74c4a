"""The first weights of a run: drawn, or those of other models.

conversion/init_from.py says which are which; here they are read, cast or
quantised, and placed on the devices.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from codet5p_jax.array_typing import Tree
from codet5p_jax.conversion.init_from import (
    Initialisation,
    listed,
    plan_initialisation,
    with_all_tokens,
)
from codet5p_jax.conversion.sources import WeightSource, open_source
from codet5p_jax.data.vocabularies import Vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.layers.quantization import store
from codet5p_jax.training.checkpoints.fingerprint import (
    digest_array,
    fingerprint_tree,
    join_digests,
)
from codet5p_jax.training.checkpoints.layout import (
    flatten,
    nest,
    stack_leaves,
    unstack_leaves,
)
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.distributed import agree
from codet5p_jax.training.train_step import TrainState, TrainStep


def frozen_paths(abstract_frozen: Tree) -> list[str]:
  """Paths in a checkpoint of the parameters that a run leaves as they are."""
  return _parameters(unstack_leaves(flatten(abstract_frozen)))


def check_frozen(
    initialisation: Initialisation,
    abstract_frozen: Tree,
    init_from: Sequence[Any],
) -> None:
  """Checks that frozen parameters are known to come from somewhere.

  Training around a decoder that knows nothing is seldom meant, and what is
  drawn has no other place than the run's own files: so it is all of what is
  frozen, on demand, or nothing.

  Raises:
    UserError: a frozen parameter has no source.
  """
  frozen = frozen_paths(abstract_frozen)
  drawn = [path for path in frozen if path not in initialisation.origins]
  if drawn and not init_from:
    raise UserError(
        f'expected INIT_FROM to say where the {len(frozen)} frozen parameters '
        f'come from, found nothing; add a gin file such as '
        f"initial_weights/codegen.gin, or set INIT_FROM=[('fresh','.*',None)] "
        f'to have them drawn'
    )
  if drawn and initialisation.origins:
    raise UserError(
        f'expected every frozen parameter to have a source, found that '
        f'INIT_FROM lets {listed(drawn)} be drawn; give a source, or make '
        f'them TRAINABLE'
    )


def plan_first_state(
    init_from: Sequence[Any],
    train_step: TrainStep,
    vocabulary: Vocabulary,
    resumes: bool,
) -> Initialisation:
  """Plans where a run's weights come from, and checks it; reads no array.

  Args:
    init_from: see conversion/init_from.py.
    train_step: of the run.
    vocabulary: of the run.
    resumes: there is a checkpoint: only what is frozen is read from sources.

  Raises:
    UserError: a source cannot be used, a parameter is unaccounted for, or the
      vocabulary is not that of the source.
  """
  frozen = train_step.abstract_state.frozen_params
  initialisation = plan_initialisation(
      init_from,
      train_step.config.model,
      open_source,
      needed=frozen_paths(frozen) if resumes else None,
  )
  check_frozen(initialisation, frozen, init_from)
  for source in initialisation.sources():
    _check_vocabulary(source, vocabulary)
  return initialisation


@dataclasses.dataclass(frozen=True)
class Frozen:
  """What identifies the parameters that a run leaves as they are.

  Attributes:
    fingerprint: of all of them; None where there are none.
    digests: of each, by path, where they are read from other weights.
  """

  fingerprint: str | None = None
  digests: Mapping[str, str] = dataclasses.field(default_factory=dict)


def first_state(
    initialisation: Initialisation,
    train_step: TrainStep,
    saved: Checkpoints,
    step: int | None = None,
) -> tuple[TrainState, Frozen]:
  """The newest whole checkpoint's state, or a first one; and what is frozen.

  The newest one is that of the run that owns the folder: newer ones that are
  damaged are set aside, see `Checkpoints.resume`.

  Args:
    initialisation: see `plan_first_state`.
    train_step: of the run.
    saved: of the run.
    step: of the checkpoint, 0 for a first state; None for the newest.

  Raises:
    UserError: a source or every checkpoint is damaged, or the checkpoint was
      trained beside other frozen parameters.
  """
  if step is None:
    saved.require_fresh()
    resumes = saved.newest_step() is not None
  else:
    resumes = step > 0
  target, frozen = train_step.abstract_state, Frozen()
  if initialisation.origins:
    names = train_step.axis_names
    given, digests = load_given(initialisation, target.frozen_params, names)
    if digests:
      frozen = Frozen(join_digests(digests.items()), digests)
    if not resumes:
      more, trained = load_given(initialisation, target.params, names)
      _agree_upon(digests | trained)
      return train_step.init({**given, **more}), frozen
    _agree_upon(digests)
    target = dataclasses.replace(target, frozen_params=nest(given))
  elif not resumes or jax.tree.leaves(target.frozen_params):
    target = train_step.init({})
    if jax.tree.leaves(target.frozen_params):
      frozen = Frozen(fingerprint_tree(target.frozen_params))
    if not resumes:
      return target, frozen
  if step is None:
    restored = saved.resume(target, frozen_fingerprint=frozen.fingerprint)
  else:
    restored = saved.restore(
        step, target, frozen_fingerprint=frozen.fingerprint
    )
  state, _, _ = restored
  return state, frozen


def _agree_upon(digests: Mapping[str, str]) -> None:
  """Every process reads the sources, which may lie on a disk of its own."""
  agree({'weights in INIT_FROM': join_digests(digests.items())})


def load_given(
    initialisation: Initialisation,
    abstract: Tree,
    axis_names: Mapping[str, Sequence[str | None]],
) -> tuple[dict[str, jax.Array], dict[str, str]]:
  """Reads the given parameters of a tree, one at a time, onto the devices.

  Args:
    initialisation: where they come from.
    abstract: `jax.ShapeDtypeStruct` with shardings: parameters of a TrainState,
      or a part of them, scanned or unrolled. An int8 leaf is quantised here,
      before it reaches a device.
    axis_names: of the parameters, by their path in `abstract`.

  Returns:
    {path in `abstract`: array} of those that have a source, and {path in a
    checkpoint: `digest_array` of what was read}, before any cast.

  Raises:
    UserError: a source is damaged, or holds NaN or an infinite number.
  """
  targets = flatten(abstract)
  stacks = _stacks(targets)
  arrays: dict[str, jax.Array] = {}
  digests: dict[str, str] = {}
  for paths in stacks:
    layers = unstack_leaves({path: targets[path] for path in paths})
    names = _parameters(layers)
    given = [name for name in names if name in initialisation.origins]
    if not given:
      continue
    if len(given) < len(names):
      raise UserError(
          f'expected a source for every layer of a stack, found none for '
          f'{listed([name for name in names if name not in given])}; give '
          f'them one, or set SCAN_LAYERS=False'
      )
    placed = {}
    for name in given:
      origin = initialisation.origins[name]
      array = origin.read()
      digests[name] = digest_array(name, array)
      origin.source.require_finite(origin.path, array)
      array = with_all_tokens(array, initialisation.shapes[name])
      array = _with_padding(array, layers[name].shape)
      if layers[name].dtype == np.int8:
        # A layer's own axes are the last of its stack's.
        axes = axis_names[paths[0]][-array.ndim :]
        parts = store(name, array, axes, 'int8')
      else:
        parts = {name: array.astype(layers[name].dtype)}
      for path, part in parts.items():
        placed[path] = _place(part, layers[path])
    like = nest({path: targets[path] for path in paths})
    arrays |= flatten(stack_leaves(placed, like))
  return arrays, digests


def parts_table(
    initialisation: Initialisation, state: TrainState
) -> list[dict[str, Any]]:
  """What a model is made of, one row per part, origin and treatment.

  Args:
    initialisation: of the model.
    state: its arrays or their shapes.

  Returns:
    Rows with `part` (the longest path that the parameters share), `parameters`
    (their number, padding left out), `trainable`, `dtype`, `bytes` in memory,
    and `source`.
  """
  rows: dict[tuple, dict[str, Any]] = {}
  for is_trainable, tree in (
      (True, state.params), (False, state.frozen_params)
  ):
    leaves = unstack_leaves(flatten(tree))
    for path in leaves:
      name = path.removesuffix('_scale')
      name = name if name in initialisation.shapes else path
      origin = initialisation.origins.get(name)
      source = 'drawn' if origin is None else origin.source.name
      row = rows.setdefault(
          (path.split('/')[0], is_trainable, source),
          {'paths': [], 'parameters': 0, 'dtypes': {}, 'bytes': 0},
      )
      row['paths'].append(name)
      if path == name:
        row['parameters'] += int(np.prod(initialisation.shapes[name]))
      size = leaves[path].size * leaves[path].dtype.itemsize
      dtype = str(leaves[path].dtype)
      row['dtypes'][dtype] = row['dtypes'].get(dtype, 0) + size
      row['bytes'] += size
  return [
      {
          'part': _common_path(row['paths']),
          'parameters': row['parameters'],
          'trainable': is_trainable,
          # The one that most of its bytes have: norms of an int8 part are not.
          'dtype': max(row['dtypes'], key=row['dtypes'].__getitem__),
          'bytes': row['bytes'],
          'source': source,
      }
      for (_, is_trainable, source), row in rows.items()
  ]


def format_parts(rows: Sequence[Mapping[str, Any]]) -> str:
  """The rows of `parts_table` as lines of text."""
  lines = [
      f'{"part":36}{"parameters":>16}  {"":9}  {"dtype":8}  {"memory":>9}  from'
  ]
  for row in rows:
    treatment = 'trainable' if row['trainable'] else 'frozen'
    lines.append(
        f'{row["part"]:36}{row["parameters"]:16,}  {treatment:9}  '
        f'{row["dtype"]:8}  {row["bytes"] / 1e9:6.3f} GB  {row["source"]}'
    )
  return '\n'.join(lines)


def _parameters(layers: Mapping[str, Any]) -> list[str]:
  """Paths of the parameters among leaves: an int8 kernel's scale is none."""
  return [
      path
      for path in layers
      if not (path.endswith('_scale') and path.removesuffix('_scale') in layers)
  ]


def _stacks(targets: Mapping[str, Any]) -> list[list[str]]:
  """Paths that are read together: a kernel and its scale."""
  return [
      [path, *([f'{path}_scale'] if f'{path}_scale' in targets else [])]
      for path in _parameters(targets)
  ]


def _with_padding(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  padding = shape[0] - array.shape[0] if shape else 0
  if not padding:
    return array
  return np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))


def _place(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
  if array.shape != target.shape:
    raise ValueError(f'expected {target.shape}, found {array.shape}')
  # Every process has the whole array and hands out the parts it needs.
  return jax.make_array_from_callback(
      array.shape, target.sharding, lambda index: array[index]
  )


def _check_vocabulary(source: WeightSource, vocabulary: Vocabulary) -> None:
  """Embeddings of one vocabulary mean nothing in another."""
  theirs = source.load_vocabulary()
  if theirs is None or theirs.fingerprint == vocabulary.fingerprint:
    return
  if (theirs.kind, vocabulary.kind) == ('codet5', 'codet5_bimodal'):
    if theirs.files == vocabulary.files:
      return  # The same, and three task tokens more.
  raise UserError(
      f'expected the vocabulary of {source.name}, from which the model starts, '
      f'found another ({vocabulary.kind}, {vocabulary.fingerprint[:16]}); set '
      f'VOCABULARY_DIR to the one of that model'
  )


def _common_path(paths: Sequence[str]) -> str:
  """The longest whole path above all of these.

  >>> _common_path(['decoder/last/query', 'decoder/last/key'])
  'decoder/last'
  """
  common = paths[0].split('/')
  for path in paths[1:]:
    words = path.split('/')
    length = next(
        (i for i, pair in enumerate(zip(common, words)) if pair[0] != pair[1]),
        min(len(common), len(words)),
    )
    common = common[:length]
  return '/'.join(common)
