"""Compiles the real programs for a TPU that need not be there."""

import json
import pathlib
import tempfile
import time
from typing import Any

import flax.traverse_util
import jax
from jax.sharding import Mesh

from codet5p_jax.errors import UserError
from codet5p_jax.generation_shapes import GenerationShapes
from codet5p_jax.planning.flops import training_flops
from codet5p_jax.planning.hlo import collective_bytes, matmul_flops
from codet5p_jax.planning.topology import topology_devices
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.files import write_text
from codet5p_jax.training.objective import Objective
from codet5p_jax.training.train_step import (
    StepConfig,
    TrainStep,
    make_train_step,
    step_batch_spec,
)

REPORT_VERSION = 1


def precompile(
    topology: str,
    step_config: StepConfig | None = None,
    generation: GenerationShapes | None = None,
    report: str | None = None,
    max_peak_hbm_gb: float | None = None,
) -> dict[str, Any]:
  """Compiles programs and prints the memory and work the compiler plans.

  They are those that `train` or `generate` runs, made by the same functions
  from the same configuration. Of training, each objective is compiled as if a
  step held its micro-batches alone, in its own shape. Of generating, what
  reads the prompts ("prefill"), what makes a row of each ("rows"; the weights,
  which it has no use for, lie beside it) and what adds one token after another
  ("token").

  Args:
    topology: JAX's name of a TPU topology, such as "v5e:4x4".
    step_config: of a run that trains.
    generation: of a model that completes prompts, instead.
    report: a JSON file to write.
    max_peak_hbm_gb: the peak memory of a chip that is accepted, in 1e9 bytes.

  Returns:
    The report: for every program and for the largest of them, bytes of peak
    memory per device and per chip; for every objective also the bytes that a
    device exchanges with others, by kind, and FLOPs of matrix products per
    device: those of the compiled step, the least that such a step can do, and
    those that the remat policy adds on purpose.

  Raises:
    UserError: nothing or both are to be compiled, the topology is unknown, the
      mesh does not fit it, a program does not fit its memory or takes more than
      is accepted, or the report cannot be written.
  """
  if (step_config is None) == (generation is None):
    raise UserError(
        'expected either a run that trains or one that generates, found '
        f'{"neither" if generation is None else "both"}; give one of '
        '--gin_file=runs/pretrain.gin, runs/finetune.gin and '
        'runs/precompile_generation.gin'
    )
  config = step_config or generation
  devices, chips = topology_devices(topology)
  mesh = make_mesh(config.mesh_shape, devices)
  if step_config is not None:
    steps = _plan_training(step_config, mesh, topology)
  else:
    steps = _plan_generation(generation, mesh, topology)
  for step in steps.values():
    # Where a chip is two devices, each has half of its memory.
    step['peak_hbm_bytes_per_chip'] = (
        step['peak_hbm_bytes_per_device'] * len(devices) // chips
    )
  result = {
      'format_version': REPORT_VERSION,
      'topology': topology,
      'chips': chips,
      'devices': len(devices),
      'mesh_shape': dict(mesh.shape),
      'batch_size': config.batch_size,
      'num_microbatches': getattr(config, 'num_microbatches', 1),
      'peak_hbm_bytes_per_device': max(
          step['peak_hbm_bytes_per_device'] for step in steps.values()
      ),
      'peak_hbm_bytes_per_chip': max(
          step['peak_hbm_bytes_per_chip'] for step in steps.values()
      ),
      'steps': steps,
  }
  _print_steps(config, result)
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


def _plan_training(
    step_config: StepConfig, mesh: Mesh, topology: str
) -> dict[str, dict[str, Any]]:
  train_step = make_train_step(step_config, mesh)
  steps = {}
  for objective in step_config.objectives:
    counts = {objective.name: step_config.num_microbatches}
    batch = step_batch_spec(step_config, train_step, counts)
    lowered = train_step.step.lower(train_step.abstract_state, batch)
    plan, compiled_text, _ = _compile(
        lowered,
        topology,
        'lower BATCH_SIZE, raise NUM_MICROBATCHES, set REMAT_POLICY=full or '
        'choose a larger topology',
    )
    exchanged = {'collective_bytes_per_device': collective_bytes(compiled_text)}
    steps[objective.name] = (
        plan | exchanged | _flops(compiled_text, train_step, objective)
    )
  return steps


def _plan_generation(
    generation: GenerationShapes, mesh: Mesh, topology: str
) -> dict[str, dict[str, Any]]:
  advice = (
      'lower BATCH_SIZE, PROMPT_LENGTH or MAX_NEW_TOKENS, or choose a larger '
      'topology'
  )
  plans = {}

  def compile_program(
      name: str, lowered: jax.stages.Lowered
  ) -> jax.stages.Compiled:
    plans[name], _, compiled = _compile(lowered, topology, advice)
    return compiled

  generation.compile_programs(mesh, compile_program)
  return plans


def _print_steps(
    config: StepConfig | GenerationShapes, result: dict[str, Any]
) -> None:
  for name, step in result['steps'].items():
    print(
        f'{name} on {result["topology"]} ({result["chips"]} chips), batch '
        f'{config.batch_size}: peak HBM '
        f'{step["peak_hbm_bytes_per_chip"] / 1e9:.2f} GB a chip '
        f'({step["argument_bytes_per_device"] / 1e9:.2f} GB arguments, '
        f'{step["temporary_bytes_per_device"] / 1e9:.2f} GB temporaries a '
        f'device), compiled in {step["compile_seconds"]:.0f} s'
    )
    if isinstance(config, StepConfig):
      exchanged = ', '.join(
          f'{size / 1e6:,.1f} MB {kind}'
          for kind, size in step['collective_bytes_per_device'].items()
      )
      print(f'{name}: exchanged by a device: {exchanged or "nothing"}')
      print(
          f'{name}: {step["matmul_flops_per_device"] / 1e12:.4g} TFLOPs of '
          f'matrix products a device, {step["matmul_flops_ratio"]:.3f} of '
          f'{step["least_flops_per_device"] / 1e12:.4g}, the least possible, '
          f'and {step["recomputed_flops_per_device"] / 1e12:.4g} that remat '
          f'policy {config.computation.remat_policy} computes again'
      )


def _compile(
    lowered: jax.stages.Lowered, topology: str, advice: str
) -> tuple[dict[str, Any], str, jax.stages.Compiled]:
  """Returns what a program takes, its optimised HLO, and itself compiled.

  The compiler writes the HLO itself: the text that JAX gives, by way of a
  serialised form, fails on asynchronous operations (RET_CHECK on async-update
  for a v6e, libtpu 0.0.52).

  Args:
    lowered: the program.
    topology: for which it is.
    advice: what to do if it does not fit.
  """
  begin = time.monotonic()
  try:
    with tempfile.TemporaryDirectory() as folder:
      compiled = lowered.compile(
          {'xla_dump_to': folder, 'xla_dump_hlo_as_text': True}
      )
      [path] = pathlib.Path(folder).glob('*.after_optimizations.txt')
      hlo_text = path.read_text()
  except Exception as error:
    message = str(error)
    if 'RESOURCE_EXHAUSTED' not in message:
      raise
    lines = [line.strip() for line in message.splitlines()]
    reason = next((x for x in lines if 'RESOURCE_EXHAUSTED' in x), lines[0])
    raise UserError(
        f'expected the program to fit the memory of {topology}, found: '
        f'{reason[:300]}; {advice}'
    ) from error
  seconds = time.monotonic() - begin
  plan = _memory(compiled) | {'compile_seconds': round(seconds, 1)}
  return plan, hlo_text, compiled


def _memory(compiled: Any) -> dict[str, int]:
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
      objective.passes(config.microbatch_rows(objective)),
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
