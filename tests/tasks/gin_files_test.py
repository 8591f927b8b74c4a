import gin
import pytest

from codet5p_jax import configuration
from codet5p_jax.tasks.humaneval import HumanEval
from codet5p_jax.tasks.math_programming import MathProgramming
from codet5p_jax.tasks.mbpp import MBPP

TASKS = {
    'humaneval': HumanEval(),
    'mbpp': MBPP(),
    'mathqa_python': MathProgramming(),
    'gsm8k_python': MathProgramming(),
}
# Of the paper: samples, temperature, tokens of prompt and text, of text alone.
PAPER = {
    'humaneval': (200, 0.2, 800, None),
    'mathqa_python': (80, 1.2, None, 256),
    'gsm8k_python': (100, 1.2, None, 138),
}


@pytest.fixture(autouse=True)
def _forget_the_configuration():
  yield
  gin.clear_config()


@pytest.mark.parametrize('name', TASKS)
def test_the_task_of_a_file_is_the_one_that_postprocessing_makes(name):
  configuration.load([f'tasks/{name}.gin'])
  assert configuration.macro('TASK') == TASKS[name]
  # Generation stops where completions end.
  assert configuration.macro('STOP_STRINGS') == TASKS[name].stop_strings


@pytest.mark.parametrize('name', PAPER)
def test_the_settings_are_the_paper_s(name):
  configuration.load([f'tasks/{name}.gin'])
  macros = ('NUM_SAMPLES', 'TEMPERATURE', 'MAX_LENGTH', 'MAX_NEW_TOKENS')
  assert tuple(map(configuration.macro, macros)) == PAPER[name]
  sampling = ('TOP_K', 'TOP_P', 'NUM_BEAMS')
  assert tuple(map(configuration.macro, sampling)) == (50, 0.95, 1)


@pytest.mark.parametrize(
    ('name', 'lengths'), [('mathqa_python', (256, 256)),
                          ('gsm8k_python', (246, 138))],
)  # fmt: skip
def test_fine_tuning_takes_its_lengths_from_a_task(name, lengths):
  files = ['models/tiny.gin', 'runs/finetune.gin', f'tasks/{name}.gin']
  configuration.load(files)
  [objective] = configuration.macro('STEP_CONFIG').objectives
  assert (objective.source_length, objective.target_length) == lengths


def test_a_task_s_fields_are_macros():
  configuration.load(['tasks/humaneval.gin'], {'INSTRUCT': 'True'})
  assert configuration.macro('TASK') == HumanEval(instruct=True)
  macros = {'EXAMPLES': 'mbpp.jsonl', 'NUM_EXAMPLES': '3', 'NUM_ASSERTS': '1'}
  configuration.load(['tasks/mbpp.gin'], macros)
  assert configuration.macro('TASK') == MBPP('mbpp.jsonl', 3, 1)
