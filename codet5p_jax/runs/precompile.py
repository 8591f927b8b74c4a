"""Compiles the real train step for a TPU that need not be there."""

import json
import pathlib
import tempfile
import time
from typing import Any

import flax.traverse_util
import jax

from codet5p_jax.errors import UserError
from codet5p_jax.planning.flops import training_flops
from codet5p_jax.planning.hlo import matmul_flops
from codet5p_jax.planning.topology import topology_devices
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.files import write_text
from codet5p_jax.training.train_step import (
    Objective,
    StepConfig,
    TrainStep,
    make_train_step,
    step_batch_spec,
)

REPORT_VERSION = 1


def precompile(
    step_config: StepConfig,
    topology: str,
    report: str | None = None,
    max_peak_hbm_gb: float | None = None,
) -> dict[str, Any]:
  """Compiles the step and prints the memory and work the compiler plans.

  The step is the one that `train` runs, made by the same function from the
  same configuration. Each objective is compiled as if a step held its
  micro-batches alone, in its own shape.

  Args:
    step_config: of the run.
    topology: JAX's name of a TPU topology, such as "v5e:4x4".
    report: a JSON file to write.
    max_peak_hbm_gb: the peak memory of a chip that is accepted, in 1e9 bytes.

  Returns:
    The report: for every objective and for the largest of them, bytes of peak
    memory per device and per chip; for every objective also FLOPs of matrix
    products per device: those of the compiled step, the least that such a step
    can do, and those that the remat policy adds on purpose.

  Raises:
    UserError: the topology is unknown, the mesh does not fit it, the step does
      not fit its memory or takes more than is accepted, or the report cannot
      be written.
  """
  devices, chips = topology_devices(topology)
  mesh = make_mesh(step_config.mesh_shape, devices)
  train_step = make_train_step(step_config, mesh)
  steps = {}
  for objective in step_config.objectives:
    counts = {objective.name: step_config.num_microbatches}
    batch = step_batch_spec(step_config, train_step, counts)
    begin = time.monotonic()
    compiled, hlo_text = _compile(train_step, batch, topology)
    seconds = time.monotonic() - begin
    steps[objective.name] = {
        **_memory(compiled, len(devices) // chips),
        **_flops(hlo_text, train_step, objective),
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
  _print_steps(step_config, result)
  if report is not None:
    _write_report(pathlib.Path(report), result)
  peak = result['peak_hbm_bytes_per_chip'] / 1e9
  if max_peak_hbm_gb is not None and peak > max_peak_hbm_gb:
    raise UserError(
        f'expected a peak HBM of at most {max_peak_hbm_gb} GB a chip, found '
        f'{peak:.2f} GB; find out what takes more memory than before, or raise '
        f'MAX_PEAK_HBM_GB'
    )
  return result


def _print_steps(step_config: StepConfig, result: dict[str, Any]) -> None:
  for name, step in result['steps'].items():
    print(
        f'{name} on {result["topology"]} ({result["chips"]} chips), batch '
        f'{step_config.batch_size}: peak HBM '
        f'{step["peak_hbm_bytes_per_chip"] / 1e9:.2f} GB a chip '
        f'({step["argument_bytes_per_device"] / 1e9:.2f} GB arguments, '
        f'{step["temporary_bytes_per_device"] / 1e9:.2f} GB temporaries a '
        f'device), compiled in {step["compile_seconds"]:.0f} s'
    )
    print(
        f'{name}: {step["matmul_flops_per_device"] / 1e12:.4g} TFLOPs of '
        f'matrix products a device, {step["matmul_flops_ratio"]:.3f} of '
        f'{step["least_flops_per_device"] / 1e12:.4g}, the least possible, and '
        f'{step["recomputed_flops_per_device"] / 1e12:.4g} that remat policy '
        f'{step_config.computation.remat_policy} computes again'
    )


def _compile(train_step, batch, topology) -> tuple[jax.stages.Compiled, str]:
  """Returns the compiled step, and its optimised HLO.

  The compiler writes the HLO itself: the text that JAX gives, by way of a
  serialised form, fails on asynchronous operations (RET_CHECK on async-update
  for a v6e, libtpu 0.0.52).
  """
  try:
    lowered = train_step.step.lower(train_step.abstract_state, batch)
    with tempfile.TemporaryDirectory() as folder:
      compiled = lowered.compile(
          {'xla_dump_to': folder, 'xla_dump_hlo_as_text': True}
      )
      [path] = pathlib.Path(folder).glob('*.after_optimizations.txt')
      return compiled, path.read_text()
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


def _flops(
    hlo_text: str, train_step: TrainStep, objective: Objective
) -> dict[str, Any]:
  config = train_step.config
  planned = training_flops(
      config.model,
      objective.batch_spec(config.microbatch_rows(objective)),
      flax.traverse_util.flatten_dict(
          train_step.abstract_state.params, sep='/'
      ).keys(),
      config.computation,
  )
  devices = train_step.mesh.size
  compiled_flops = matmul_flops(hlo_text)
  least, recomputed = (
      config.num_microbatches * flops // devices
      for flops in (planned.least, planned.recomputed)
  )
  return {
      'matmul_flops_per_device': compiled_flops,
      'least_flops_per_device': least,
      'recomputed_flops_per_device': recomputed,
      'matmul_flops_ratio': round(compiled_flops / (least + recomputed), 4),
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
