"""A step of a run made again: was it the data, or the hardware?"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from codet5p_jax.conversion.init_from import FRESH
from codet5p_jax.data.vocabularies import Vocabulary
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.initialisation import first_state, plan_first_state
from codet5p_jax.sharding import make_mesh
from codet5p_jax.storage import local_path
from codet5p_jax.trained_model import load_own_vocabulary, step_settings
from codet5p_jax.training.batches import (
    TrainBatches,
    batch_examples,
    data_fingerprint,
    training_examples,
    training_row_numbers,
)
from codet5p_jax.training.checkpoints.agreement import raising_together
from codet5p_jax.training.checkpoints.layout import Leaves, flatten
from codet5p_jax.training.checkpoints.save import Checkpoints
from codet5p_jax.training.checkpoints.verify import DamagedCheckpoint
from codet5p_jax.training.distributed import (
    agree,
    as_first_process,
    failing_together,
    gather_texts,
    join,
    program_digest,
)
from codet5p_jax.training.files import read_json
from codet5p_jax.training.logging import means
from codet5p_jax.training.run_folder import (
    RunFolder,
    describe,
    read_config,
    read_metrics,
    rebuild,
)
from codet5p_jax.training.shard_digests import (
    Difference,
    by_process,
    digest_shards,
    find_difference,
    number_shards,
)
from codet5p_jax.training.step_health import (
    BadSteps,
    describe_fault,
    save_batch,
)
from codet5p_jax.training.timeline import read_timeline
from codet5p_jax.training.train_step import (
    StepConfig,
    TrainState,
    TrainStep,
    make_train_step,
)

_logger = logging.getLogger(__name__)

# Leaves listed of those that are not finite.
_NAMED = 5

# Rows listed of those in a step.
_LISTED_ROWS = 16

# (updates made before, the rule of bad steps of those that follow).
_Rules = Sequence[tuple[int, BadSteps]]

_ORDINALS = ('first', 'second', 'third')


def replay(
    run_dir: str,
    step: int,
    times: int = 2,
    data_dir: str | None = None,
    mesh_shape: Sequence[int] = (1, -1, 1),
    init_from: Sequence[Any] | None = None,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
  """Computes the gradients of a step several times and compares their bits.

  From the newest whole checkpoint before the step, else from the first weights,
  the run is made again up to that step, with the same batches and the rule of
  bad steps that each session had. Then its gradients are computed from the same
  state and batch as often as asked for. Prints losses and norm, which gradients
  are not finite, and whether all were the same each time and on all devices
  that hold copies of them. The batch of a step that is bad again is written to
  `bad_steps/` in the run's folder.

  Gradients are summed over hosts, so what one of them does wrong may show on
  all: replay on each alone then tells which. Hosts alone, with as many devices
  and the same mesh, must also print the same digest of the gradients. A GPU may
  add in another order each time, unless XLA_FLAGS has
  --xla_gpu_deterministic_ops=true.

  Args:
    run_dir: the run's folder.
    step: the number of the step, as in metrics.jsonl.
    times: how often its gradients are computed.
    data_dir: by default the run's own.
    mesh_shape: (replica, data, model).
    init_from: where the weights lie that the run started from, if they were
      moved; see conversion/init_from.py.
    coordinator_address: as for `train`, where several hosts make the step.
    num_processes: of them.
    process_id: of this process, from 0 on.

  Raises:
    UserError: the folder is none of a run, or its data, or weights that are
      known, are not what they were; or a host is missing or differs from the
      others.
  """
  join(coordinator_address, num_processes, process_id)
  require_positive(step=step)
  if times < 2:
    raise UserError(
        f'expected times to be 2 or more, for something to compare, found '
        f'{times}; give a larger one'
    )
  folder = RunFolder(local_path(run_dir))
  with failing_together():
    config = _read_config_of_run(run_dir, step)
    step_config = StepConfig(
        **step_settings(config) | {'mesh_shape': tuple(mesh_shape)}
    )
    rules = _read_rules(folder, step_config.bad_steps)
    vocabulary = load_own_vocabulary(folder, config)
    data_dir = data_dir or config['data_dir']
    examples = _read_examples(step_config, data_dir, vocabulary, config['data'])
  agree({
      'program': program_digest(),
      'step to make again': json.dumps(
          describe([config, rules, step, times, mesh_shape, init_from])
      ),
  })
  mesh = make_mesh(mesh_shape)

  @functools.cache
  def train_step_of(rule: BadSteps) -> TrainStep:
    return make_train_step(
        dataclasses.replace(step_config, bad_steps=rule), mesh
    )

  train_step = train_step_of(_rule_after(step - 1, rules))
  batches = TrainBatches(step_config, train_step, examples)
  state = _saved_state(folder, train_step, vocabulary, step, init_from)
  state = _make_steps(
      state,
      lambda number: train_step_of(_rule_after(number, rules)),
      batches,
      step - 1,
  )
  batch = batches.at(step - 1)
  values, leaves, digest, difference = _compare(
      train_step, state, batch, times
  )
  hosts = gather_texts(platform.node())
  if difference is not None:
    devices = by_process(train_step.mesh.devices.flatten().tolist())
    found = _describe_difference(difference, list(leaves), devices, hosts)
  elif as_first_process(int(values['bad_steps'])):
    with failing_together():
      path = save_batch(folder, step, batch)
    found = (
        f'The same {times} times on {_counted(hosts)}: look at the data '
        f'({_listed(step_config, step, config["data"])}; the batch is in '
        f'{path}), for {describe_fault(values, train_step.config.bad_steps)}'
    )
  else:
    found = (
        f'The same {times} times on {_counted(hosts)}, and nothing wrong: if '
        f'the run left this step out, look at the hardware it had then'
    )
  lines = [
      _numbers(f'Step {step} now', values),
      *(_numbers('In the run', row) for row in _logged(folder, step)),
      _finiteness(train_step, leaves),
      f'Digest of the gradients: {digest}',
      found,
  ]
  if jax.process_index() == 0:
    print('\n'.join(lines))


def _read_config_of_run(run_dir: str, step: int) -> dict[str, Any]:
  """Reads config.json, and checks that there is such a step to make."""
  config = rebuild(read_config(run_dir))
  if 'objectives' not in config:
    raise UserError(
        f'expected a run, whose steps can be made again, found a converted '
        f'model in {run_dir}; give the folder of a run'
    )
  if step > config['train_steps']:
    raise UserError(
        f'expected a step of the run in {run_dir}, which has '
        f'{config["train_steps"]}, found step {step}; give a smaller one'
    )
  return config


def _read_rules(folder: RunFolder, first: BadSteps) -> _Rules:
  """The rules of bad steps that the sessions of a run had, in their order.

  Args:
    folder: of the run.
    first: that of config.json, which a later session may have changed.
  """
  told = [
      (session.first_step, rebuild(event['bad_steps']))
      for session in read_timeline(folder.timeline)
      for event in session.events('rule')
  ]
  return [(0, first), *told]


def _rule_after(number: int, rules: _Rules) -> BadSteps:
  """The rule of the update after so many; a later session made it again."""
  *_, rule = (rule for first, rule in rules if first <= number)
  return rule


def _read_examples(
    config: StepConfig,
    data_dir: str,
    vocabulary: Vocabulary,
    expected: Mapping[str, Any],
) -> dict[str, Any]:
  """The examples of training, by objective, of the data of the run.

  Raises:
    UserError: they are not those of `data_fingerprint` that are expected.
  """
  for objective in config.objectives:
    found = data_fingerprint(objective, data_dir, 'train', vocabulary)
    if found != (run := expected[objective.name]):
      raise UserError(
          f'expected in {data_dir} the data of {objective.name} that the run '
          f'was trained with ({run["rows"]} rows, {run["digest"][:16]}), found '
          f'others ({found["rows"]} rows, {found["digest"][:16]}); put them '
          f'back, or give --data_dir'
      )
  return {
      o.name: training_examples(o, data_dir, vocabulary, config.seed)
      for o in config.objectives
  }


def _saved_state(
    folder: RunFolder,
    train_step: TrainStep,
    vocabulary: Vocabulary,
    step: int,
    init_from: Sequence[Any] | None,
) -> TrainState:
  """The state of the newest whole checkpoint before a step, else the first.

  Raises:
    UserError: the weights that the run started from are not known, or what is
      frozen is not what it was.
  """
  with Checkpoints(folder.checkpoints) as saved:
    known = _newest_metadata(saved)
    if init_from is None:
      init_from = known['init_from'] if known else _drawn(folder, step)
    for start in itertools.chain(_steps_before(step, saved), [0]):
      initialisation = plan_first_state(
          init_from, train_step, vocabulary, resumes=start > 0
      )
      try:
        state, frozen = first_state(initialisation, train_step, saved, start)
      except DamagedCheckpoint as error:
        if error.folder != saved.step_dir(start):
          raise  # What is damaged are the weights that the run started from.
        if jax.process_index() == 0:
          _logger.warning(
              'Checkpoint %s is damaged: %s; going further back.',
              error.folder,
              error.fault,
          )
        continue
      if known and frozen.fingerprint != known['frozen_fingerprint']:
        raise UserError(
            f'expected the frozen parameters of the run, with fingerprint '
            f'{known["frozen_fingerprint"]}, found {frozen.fingerprint}; give '
            f'--init_from with those that it was trained with'
        )
      return state


def _steps_before(step: int | None, saved: Checkpoints) -> Iterator[int]:
  """Steps of checkpoints that process 0 sees, the newest first; None: all."""
  while True:
    earlier = [x for x in saved.steps() if step is None or x < step]
    step = as_first_process(max(earlier, default=None))
    if step is None:
      return
    yield step


def _newest_metadata(saved: Checkpoints) -> dict[str, Any] | None:
  """Of the newest checkpoint that still has them; None without any."""
  for step in _steps_before(None, saved):
    try:
      with raising_together(saved.step_dir(step)):
        metadata = saved.metadata(step)
    except DamagedCheckpoint:
      continue
    return metadata
  return None


def _drawn(folder: RunFolder, step: int) -> list[tuple[str, str, None]]:
  """INIT_FROM of a run that was drawn as a whole.

  Raises:
    UserError: it was not, and no checkpoint tells where its weights lie.
  """
  parts = read_json(folder.path / 'parts.json')['parts']
  sources = {part['source'] for part in parts} - {'drawn'}
  if sources:
    raise UserError(
        f'expected a checkpoint in {folder.checkpoints} from before step '
        f'{step}, or --init_from with the weights that the run started from, '
        f'found neither; give --init_from, with {" and ".join(sorted(sources))}'
    )
  return [(FRESH, '.*', None)]


def _make_steps(
    state: TrainState,
    train_step_after: Callable[[int], TrainStep],
    batches: TrainBatches,
    last: int,
) -> TrainState:
  """Makes the steps of the run from the state's own to the last.

  Args:
    state: to begin with.
    train_step_after: (updates made) to what makes the next.
    batches: of the run.
    last: updates made when it is done.
  """
  first = int(state.step)
  _logger.info('At step %d; %d more to the one asked for.', first, last - first)
  for number, batch in enumerate(batches.read(first, last), first):
    state, metrics = train_step_after(number).step(state, batch)
    jax.block_until_ready(metrics)  # Lest batches pile up on the devices.
  return state


def _compare(
    train_step: TrainStep,
    state: TrainState,
    batch: Mapping[str, Mapping[str, jax.Array]],
    times: int,
) -> tuple[dict[str, float], Leaves, str, Difference | None]:
  """Computes a step's gradients several times.

  Returns:
    The metrics, the gradients and their digest, of the last time, and where
    bits differ.
  """
  devices = train_step.mesh.devices.flatten().tolist()
  tables = []
  for _ in range(times):
    leaves = {}  # The devices may have no room for those of two times.
    grads, metrics = train_step.gradients(state, batch)
    leaves = flatten(grads)
    del grads
    tables.append(digest_shards(leaves, devices))
  difference = find_difference(
      np.stack(tables), number_shards(leaves, devices)
  )
  digest = hashlib.blake2b(tables[-1].tobytes(), digest_size=16).hexdigest()
  return means(metrics), leaves, digest, difference


def _logged(folder: RunFolder, step: int) -> list[dict[str, Any]]:
  """The row of metrics.jsonl of a step, if the run wrote one."""
  return [
      row
      for row in read_metrics(folder.metrics)
      if (row.get('step'), row.get('kind')) == (step, 'train')
  ]


def _numbers(when: str, values: Mapping[str, Any]) -> str:
  """Losses and norm; a row has texts for those that are not finite."""
  shown = [
      f'{name} {value if isinstance(value, str) else format(value, ".9g")}'
      for name, value in values.items()
      if name.endswith('/loss') or name == 'grad_norm'
  ]
  return f'{when}: {", ".join(shown)}'


def _finiteness(train_step: TrainStep, leaves: Leaves) -> str:
  """Says which gradients are not finite."""

  def are_finite(leaves):
    return {path: jnp.isfinite(x).all() for path, x in leaves.items()}

  replicated = NamedSharding(train_step.mesh, PartitionSpec())
  finite = jax.jit(are_finite, out_shardings=replicated)(leaves)
  others = [path for path, good in jax.device_get(finite).items() if not good]
  if not others:
    return 'All gradients are finite.'
  more = ', ...' if len(others) > _NAMED else ''
  return (
      f'Not finite: gradients in {len(others)} of {len(leaves)} leaves, '
      f'{", ".join(others[:_NAMED])}{more}'
  )


def _describe_difference(
    difference: Difference,
    paths: Sequence[str],
    devices: Sequence[Any],
    hosts: Sequence[str],
) -> str:
  """Names the hosts whose bits differ, and the first leaf."""
  processes = sorted(
      {devices[number].process_index for number in difference.devices}
  )
  where = _joined(f'host {hosts[p]} (process {p})' for p in processes)
  leaf = paths[difference.leaf]
  nth = (
      _ORDINALS[difference.time]
      if difference.time < len(_ORDINALS)
      else f'{difference.time + 1}th'
  )
  if difference.is_copy:
    ids = ', '.join(str(devices[number].id) for number in difference.devices)
    found = (
        f'{where}: copies of the gradients differed from those on other '
        f'devices the {nth} time (first in leaf {leaf}, on device {ids})'
    )
  else:
    found = (
        f'{where} computed other gradients the {nth} time (first in leaf '
        f'{leaf})'
    )
  if len(processes) == 1:
    return f'{found}: look at its hardware'
  return (
      f'{found}: replay on each host alone, as their gradients are summed, and '
      f'look at the hardware of the one that differs again'
  )


def _counted(hosts: Sequence[str]) -> str:
  return f'all {len(hosts)} hosts' if len(hosts) > 1 else f'host {hosts[0]}'


def _listed(config: StepConfig, step: int, data: Mapping[str, Any]) -> str:
  """The examples of a step, and the rows that they are made of.

  Args:
    config: of the run.
    step: updates made, with that of these examples.
    data: `data_fingerprint` of each objective.
  """

  def listed(name, numbers):
    row_of = training_row_numbers(data[name]['rows'], config.seed)
    rows = [str(row_of[number]) for number in numbers[:_LISTED_ROWS]]
    more = ', ...' if len(numbers) > len(rows) else ''
    return (
        f'examples {numbers.start} to {numbers.stop - 1} of {name}, made of '
        f'rows {", ".join(rows)}{more}'
    )

  return _joined(
      listed(*each) for each in batch_examples(config, step - 1).items()
  )


def _joined(words: Iterable[str]) -> str:
  *first, last = words
  return f'{", ".join(first)} and {last}' if first else last
