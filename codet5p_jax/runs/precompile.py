"""Compiles the real train step for a TPU that need not be there."""

import json
import pathlib
import time
from typing import Any

from codet5p_jax.errors import UserError
from codet5p_jax.planning.topology import topology_devices
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.files import write_text
from codet5p_jax.training.train_step import (
    StepConfig,
    make_train_step,
    step_batch_spec,
)

REPORT_VERSION = 1


def precompile(
    step_config: StepConfig, topology: str, report: str | None = None
) -> dict[str, Any]:
  """Compiles the step and prints the memory the compiler plans for it.

  The step is the one that `train` runs, made by the same function from the
  same configuration. Each objective is compiled as if a step held its
  micro-batches alone, in its own shape.

  Args:
    step_config: of the run.
    topology: JAX's name of a TPU topology, such as "v5e:4x4".
    report: a JSON file to write.

  Returns:
    The report: for every objective and for the largest of them, bytes of peak
    memory per device and per chip.

  Raises:
    UserError: the topology is unknown, the mesh does not fit it, the step does
      not fit its memory, or the report cannot be written.
  """
  devices, chips = topology_devices(topology)
  mesh = make_mesh(step_config.mesh_shape, devices)
  train_step = make_train_step(step_config, mesh)
  steps = {}
  for objective in step_config.objectives:
    counts = {objective.name: step_config.num_microbatches}
    batch = step_batch_spec(step_config, train_step, counts)
    begin = time.monotonic()
    compiled = _compile(train_step, batch, topology)
    seconds = time.monotonic() - begin
    steps[objective.name] = {
        **_memory(compiled, len(devices) // chips),
        'compile_seconds': round(seconds, 1),
    }
  result = {
      'format_version': REPORT_VERSION,
      'topology': topology,
      'chips': chips,
      'devices': len(devices),
      'mesh_shape': dict(mesh.shape),
      'batch_size': step_config.batch_size,
      'num_microbatches': step_config.num_microbatches,
      'peak_hbm_bytes_per_device': max(
          step['peak_hbm_bytes_per_device'] for step in steps.values()
      ),
      'peak_hbm_bytes_per_chip': max(
          step['peak_hbm_bytes_per_chip'] for step in steps.values()
      ),
      'steps': steps,
  }
  for name, step in steps.items():
    print(
        f'{name} on {topology} ({chips} chips), batch '
        f'{step_config.batch_size}: peak HBM '
        f'{step["peak_hbm_bytes_per_chip"] / 1e9:.2f} GB a chip '
        f'({step["argument_bytes_per_device"] / 1e9:.2f} GB arguments, '
        f'{step["temporary_bytes_per_device"] / 1e9:.2f} GB temporaries a '
        f'device), compiled in {step["compile_seconds"]:.0f} s'
    )
  if report is not None:
    _write_report(pathlib.Path(report), result)
  return result


def _compile(train_step, batch, topology):
  try:
    return train_step.step.lower(train_step.abstract_state, batch).compile()
  except Exception as error:
    message = str(error)
    if 'RESOURCE_EXHAUSTED' not in message:
      raise
    lines = [line.strip() for line in message.splitlines()]
    reason = next((x for x in lines if 'RESOURCE_EXHAUSTED' in x), lines[0])
    raise UserError(
        f'expected the step to fit the memory of {topology}, found: '
        f'{reason[:300]}; lower BATCH_SIZE, raise NUM_MICROBATCHES, set '
        f'REMAT_POLICY=full or choose a larger topology'
    ) from error


def _memory(compiled, devices_per_chip: int) -> dict[str, int]:
  analysis = compiled.memory_analysis()
  # Outputs that reuse a donated argument's memory are counted once.
  peak = (
      analysis.argument_size_in_bytes
      + analysis.output_size_in_bytes
      + analysis.temp_size_in_bytes
      + analysis.generated_code_size_in_bytes
      - analysis.alias_size_in_bytes
  )
  return {
      'peak_hbm_bytes_per_device': int(peak),
      'peak_hbm_bytes_per_chip': int(peak) * devices_per_chip,
      'argument_bytes_per_device': int(analysis.argument_size_in_bytes),
      'output_bytes_per_device': int(analysis.output_size_in_bytes),
      'aliased_bytes_per_device': int(analysis.alias_size_in_bytes),
      'temporary_bytes_per_device': int(analysis.temp_size_in_bytes),
      'program_bytes_per_device': int(analysis.generated_code_size_in_bytes),
  }


def _write_report(path: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes beside the target and renames, so no half report is ever seen."""
  try:
    write_text(path, json.dumps(result, indent=2) + '\n')
  except OSError as error:
    raise UserError(
        f'expected to write the report to {path}, found: {error.strerror}; '
        f'choose a file you may write to'
    ) from error
