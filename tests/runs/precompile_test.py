import dataclasses
import importlib.util
import json
import types

import jax
import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.generation_shapes import GenerationShapes
from codet5p_jax.models.computation import Computation
from codet5p_jax.models.t5 import T5Config
from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.sequence_to_sequence import SequenceToSequence
from codet5p_jax.planning.flops import training_flops
from codet5p_jax.planning.parameters import parameter_shapes
from codet5p_jax.runs import precompile as module
from codet5p_jax.runs.precompile import precompile
from codet5p_jax.sharding import make_mesh
from codet5p_jax.training.optimizers import AdamW
from codet5p_jax.training.train_step import StepConfig, make_train_step

CONFIG = StepConfig(
    model=T5Config(
        vocab_size=131,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
    ),
    objectives=(CausalLM(target_length=16, loss_tile_length=16),),
    optimizer=AdamW(1e-3, 1, 10, 0.1),
    batch_size=4,
    num_microbatches=2,
    computation=Computation(dtype='bfloat16'),
)
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='the TPU compiler, libtpu, is not installed',
)


def state_bytes(config):
  """Bytes of parameters and optimizer slots, on one device."""
  mesh = make_mesh((1, 1, 1), jax.devices()[:1])
  state = make_train_step(config, mesh).abstract_state
  kept = (state.params, state.frozen_params, state.opt_state)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


@needs_compiler
def test_the_real_step_is_compiled_for_a_chip_that_is_not_there(
    tmp_path, capsys
):
  path = tmp_path / 'report.json'
  result = precompile('v5e:1x1', CONFIG, report=str(path))
  assert json.loads(path.read_text()) == result
  assert list(tmp_path.iterdir()) == [path]
  described = {
      'format_version': 1,
      'topology': 'v5e:1x1',
      'chips': 1,
      'devices': 1,
      'mesh_shape': {'replica': 1, 'data': 1, 'model': 1},
      'batch_size': 4,
      'num_microbatches': 2,
  }
  assert described.items() <= result.items()
  step = result['steps']['causal_lm']
  arguments = step['argument_bytes_per_device']
  # Parameters and both moments, each in float32, and a batch beside them.
  assert arguments >= state_bytes(CONFIG) > 3 * 4 * 131 * 16
  # The new state is written where the old one was.
  assert step['aliased_bytes_per_device'] >= state_bytes(CONFIG)
  peak = step['peak_hbm_bytes_per_chip']
  assert peak == step['peak_hbm_bytes_per_device']
  assert peak == (
      arguments
      + step['output_bytes_per_device']
      + step['temporary_bytes_per_device']
      + step['program_bytes_per_device']
      - step['aliased_bytes_per_device']
  )
  assert result['peak_hbm_bytes_per_chip'] == peak > arguments
  told = capsys.readouterr().out
  assert f'peak HBM {peak / 1e9:.2f} GB a chip' in told
  assert step['matmul_flops_per_device'] > step['least_flops_per_device'] > 0
  assert 'of matrix products a device' in told


# Of 2 * 3 * 5 * 7 FLOPs.
PRODUCT = '''
ENTRY %main (a: f32[3,5]) -> f32[3,7] {
  %a = f32[3,5] parameter(0)
  %b = f32[5,7] parameter(1)
  ROOT %c = f32[3,7] dot(%a, %b), lhs_contracting_dims={1}
}
'''


@pytest.fixture
def compiler(monkeypatch):
  """A compiler and a pod of two chips of two devices that need no libtpu."""
  devices = jax.devices()[:4]
  monkeypatch.setattr(module, 'topology_devices', lambda name: (devices, 2))
  asked = []

  def compile_step(lowered, topology, advice):
    (_, batch), _ = lowered.args_info
    asked.append(batch)
    [name] = batch
    temporaries = {'causal_lm': 1000, 'sequence_to_sequence': 5000}[name]
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=300,
        output_size_in_bytes=210,
        temp_size_in_bytes=temporaries,
        generated_code_size_in_bytes=40,
        alias_size_in_bytes=200,
    )
    compiled = types.SimpleNamespace(memory_analysis=lambda: analysis)
    plan = module._memory(compiled) | {'compile_seconds': 0.0}
    return plan, PRODUCT, compiled

  monkeypatch.setattr(module, '_compile', compile_step)
  return asked


def test_the_largest_objective_decides_and_chips_hold_several_devices(
    compiler
):
  config = dataclasses.replace(
      CONFIG,
      objectives=(SequenceToSequence(7, 5), *CONFIG.objectives),
      batch_size=16,
  )
  result = precompile('v4:2x1x1', config)
  # 300 + 210 + 5000 + 40 - 200.
  assert result['peak_hbm_bytes_per_device'] == 5350
  assert result['peak_hbm_bytes_per_chip'] == 10_700
  assert (result['chips'], result['devices']) == (2, 4)
  peaks = {n: s['peak_hbm_bytes_per_chip'] for n, s in result['steps'].items()}
  assert peaks == {'sequence_to_sequence': 10_700, 'causal_lm': 2700}
  for name, objective in zip(result['steps'], config.objectives):
    step = result['steps'][name]
    flops = training_flops(
        config.model,
        objective.passes(16),
        parameter_shapes(config.model.make_model()),
        config.computation,
    )
    assert step['matmul_flops_per_device'] == 210
    assert step['least_flops_per_device'] == flops.least // 4
    assert step['recomputed_flops_per_device'] == 0
    assert step['matmul_flops_ratio'] == round(210 * 4 / flops.least, 4)
  # Each alone, in its own shape, with all micro-batches of a step.
  shapes = [
      {name: spec['encoder_input_tokens'].shape for name, spec in batch.items()}
      for batch in compiler
  ]
  assert shapes == [
      {'sequence_to_sequence': (2, 8, 7)},
      {'causal_lm': (2, 8, 1)},
  ]


def test_more_memory_than_is_accepted_is_one_clear_line(compiler, tmp_path):
  config = dataclasses.replace(CONFIG, batch_size=8)
  report = tmp_path / 'report.json'
  # 300 + 210 + 1000 + 40 - 200, twice: 2700 bytes.
  precompile('v4:2x1x1', config, max_peak_hbm_gb=2.7e-6)
  with pytest.raises(UserError, match='at most 2.6e-06 GB') as error:
    precompile('v4:2x1x1', config, report=str(report), max_peak_hbm_gb=2.6e-6)
  assert '\n' not in str(error.value)
  assert json.loads(report.read_text())['peak_hbm_bytes_per_chip'] == 2700


@pytest.mark.parametrize('place', ['file/report.json', 'missing/report.json'])
def test_a_report_that_cannot_be_written_is_one_clear_line(
    compiler, tmp_path, place
):
  (tmp_path / 'file').write_text('mine')
  config = dataclasses.replace(CONFIG, batch_size=8)
  with pytest.raises(UserError, match='write the report to') as error:
    precompile('v4:2x1x1', config, report=str(tmp_path / place))
  assert str(tmp_path / place) in str(error.value)
  assert '\n' not in str(error.value)
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_a_report_that_cannot_be_put_in_place_leaves_nothing(
    compiler, tmp_path
):
  (tmp_path / 'report.json').mkdir()
  config = dataclasses.replace(CONFIG, batch_size=8)
  with pytest.raises(UserError, match='write the report to'):
    precompile('v4:2x1x1', config, report=str(tmp_path / 'report.json'))
  assert [path.name for path in tmp_path.iterdir()] == ['report.json']


@pytest.mark.parametrize('name', ['v5e', 'v5e:', '4x4', 'tpu v5e:4x4', ''])
def test_what_is_no_topology_is_one_clear_line(name):
  with pytest.raises(UserError, match='set TOPOLOGY') as error:
    precompile(name, CONFIG)
  assert repr(name) in str(error.value)
  assert '\n' not in str(error.value)


@needs_compiler
@pytest.mark.parametrize('name', ['v99:2x2', 'v5e:3x5'])
def test_a_topology_that_the_compiler_does_not_know_is_one_clear_line(name):
  with pytest.raises(
      UserError, match='a topology the TPU compiler knows'
  ) as error:
    precompile(name, CONFIG)
  assert repr(name) in str(error.value)
  assert '\n' not in str(error.value)


def failing(message):
  """A program that cannot be compiled."""
  program = jax.jit(lambda: 0).lower()

  def compile_program(options):
    raise RuntimeError(message)

  program.compile = compile_program
  return program


def test_a_step_that_does_not_fit_is_one_clear_line():
  message = (
      'XLA:TPU compile permanent error.\n'
      '  RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used '
      '23.99G of 15.75G hbm. Exceeded hbm capacity by 8.25G.\n'
      'Total hbm usage >= 24.25G:\n    reserved        258.00M\n'
  )
  with pytest.raises(UserError, match='fit the memory of v5e:4x4') as error:
    module._compile(failing(message), 'v5e:4x4', 'lower BATCH_SIZE')
  assert 'Used 23.99G of 15.75G hbm' in str(error.value)
  assert 'lower BATCH_SIZE' in str(error.value)
  assert '\n' not in str(error.value)


def test_other_faults_of_the_compiler_are_not_blamed_on_memory():
  with pytest.raises(RuntimeError, match='INTERNAL: a bug'):
    module._compile(failing('INTERNAL: a bug'), 'v5e:4x4', 'wait')


@needs_compiler
def test_all_programs_that_generate_are_planned(tmp_path, capsys):
  report = tmp_path / 'report.json'
  shapes = GenerationShapes(
      CONFIG.model, batch_size=4, prompt_length=24, max_new_tokens=16
  )
  result = precompile('v5e:1x1', generation=shapes, report=str(report))
  assert json.loads(report.read_text()) == result
  prefill, rows, token = (
      result['steps'][name] for name in ('prefill', 'rows', 'token')
  )
  # The cache is handed on and, being given up, not there twice.
  assert token['argument_bytes_per_device'] > (
      prefill['argument_bytes_per_device']
  )
  cache = 2 * 2 * 4 * (24 + 16) * CONFIG.model.emb_dim  # Keys and values.
  assert token['aliased_bytes_per_device'] > cache
  assert rows['output_bytes_per_device'] > cache
  assert result['peak_hbm_bytes_per_chip'] == max(
      step['peak_hbm_bytes_per_chip'] for step in (prefill, rows, token)
  )
  shown = capsys.readouterr().out
  assert 'prefill on v5e:1x1' in shown and 'token on v5e:1x1' in shown


def test_either_training_or_generating_is_compiled():
  shapes = GenerationShapes(CONFIG.model)
  with pytest.raises(UserError, match='found neither'):
    precompile('v5e:1x1')
  with pytest.raises(UserError, match='found both'):
    precompile('v5e:1x1', CONFIG, shapes)


@needs_compiler
def test_a_batch_that_the_mesh_does_not_divide_is_told():
  shapes = GenerationShapes(
      CONFIG.model, batch_size=3, mesh_shape=(1, -1, 1)
  )
  with pytest.raises(UserError, match='set BATCH_SIZE, or MESH_SHAPE='):
    precompile('v5e:2x2', generation=shapes)
