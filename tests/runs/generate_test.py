"""Prompts to files of samples, with a model that answers what the test says."""

import json
import pathlib
import types

import pytest

from codet5p_jax.data.vocabularies import load_vocabulary
from codet5p_jax.errors import UserError
from codet5p_jax.generation import Batch, Completion, Generator
from codet5p_jax.models.bimodal import BimodalConfig
from codet5p_jax.objectives.bimodal import Bimodal
from codet5p_jax.runs import generate as generate_run
from codet5p_jax.runs.generate import generate
from codet5p_jax.tasks.humaneval import HumanEval
from codet5p_jax.trained_model import TrainedModel
from codet5p_jax.training.run_folder import RunFolder

STEP = 12


class Answers(Generator):
  """In place of `Generator`: batches of two prompts, numbered answers."""

  def __init__(self, trained, settings, requests, batch_size, fail_after=99):
    del trained, batch_size
    if any(len(request.target) > 99 for request in requests):
      raise UserError('expected a shorter prompt')
    self.fail_after = fail_after  # Batches.
    self.batches = [
        Batch(tuple(requests[i : i + 2]), 0, settings.num_samples)
        for i in range(0, len(requests), 2)
    ]

  def complete(self, batch, tell=lambda count: None):
    if self.fail_after == 0:
      raise KeyboardInterrupt
    self.fail_after -= 1
    tell(3)
    return [
        Completion(name, sample, f'{name}.{sample}', 'eos', 3, -sample / 7)
        for name, sample in batch.names()
    ]


@pytest.fixture
def run_dir(small_corpus, tmp_path, monkeypatch):
  """The folder of a trained model without weights."""
  vocabulary = load_vocabulary(small_corpus / 'vocabulary')
  model = types.SimpleNamespace(
      decoder_start_id=0,
      prompt_to_decoder=False,
      head_counts=lambda: {'encoder': 1, 'decoder': 1},
  )
  folder = tmp_path / 'run'
  folder.mkdir()
  trained = object.__new__(TrainedModel)
  vars(trained).update(
      folder=RunFolder(folder),
      vocabulary=vocabulary,
      train_step=types.SimpleNamespace(
          mesh=types.SimpleNamespace(shape={'data': 1}),
          config=types.SimpleNamespace(
              model=model,
              objectives=(),
              computation=types.SimpleNamespace(dtype='float32'),
          ),
      ),
      step=STEP,
  )

  def load(path, mesh_shape, dtype, init_from, to_generate):
    assert to_generate and path == str(folder)
    return trained

  monkeypatch.setattr(generate_run, 'load_trained_model', load)
  monkeypatch.setattr(generate_run, 'Generator', Answers)
  return str(folder)


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def outputs(run_dir):
  return read(pathlib.Path(run_dir) / 'generation' / 'outputs.jsonl')


@pytest.fixture
def prompts_file(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  rows = [
      {'prompt': 'one'},
      {'prompt': 'two', 'prompt_id': 'second'},
      {'prompt': 'three', 'decoder_prompt': 'drei'},
      {'prompt': 'four', 'prompt_id': 7},
      {'prompt': 'five'},
  ]
  path.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
  return str(path)


def test_prompts_after_the_command_are_printed_with_their_completions(
    run_dir, capsys
):
  texts = [c.text for c in generate(['a', 'b', 'c'], run_dir)]
  assert texts == ['0.0', '1.0', '2.0']
  assert capsys.readouterr().out == 'a0.0\n\nb1.0\n\nc2.0\n\n'
  generate(['a'], run_dir, mode='encoder_decoder')
  assert capsys.readouterr().out == '0.0\n\n'


def test_a_bimodal_model_answers_by_code_and_takes_a_beginning(
    run_dir, monkeypatch, prompts_file, tmp_path, capsys
):
  trained = generate_run.load_trained_model(run_dir, (1,), None, None, True)
  model = BimodalConfig(16, 4, 1, 3, 5, 2, 1)
  monkeypatch.setattr(trained.train_step.config, 'model', model)
  monkeypatch.setattr(
      trained.train_step.config, 'objectives', [Bimodal(9, 13, 1)]
  )
  generate(['adds two numbers'], run_dir)
  [row] = outputs(run_dir)
  assert (row['mode'], row['completion']) == ('text_to_code', '0.0')
  # What is written does not go on with the prompt.
  assert capsys.readouterr().out == '0.0\n\n'
  output = tmp_path / 'samples.jsonl'
  generate([], run_dir, prompts_file, output=str(output), mode='code_to_text')
  assert [row.get('decoder_prompt') for row in read(output)] == [
      None, None, 'drei', None, None
  ]  # fmt: skip


def test_a_row_says_all_that_a_completion_depends_on(run_dir):
  generate(['a'], run_dir, num_samples=2, temperature=0.7, seed=3, top_p=0.9)
  first, second = outputs(run_dir)
  settings = first.pop('settings')
  assert first == {
      'prompt_id': '0',
      'prompt': 'a',
      'mode': 'decoder_only',
      'sample': 0,
      'completion': '0.0',
      'ended': 'eos',
      'num_tokens': 3,
      'log_probability': 0.0,
      'step': STEP,
  }
  assert (second['sample'], second['log_probability']) == (1, -1 / 7)
  assert settings == second['settings']
  assert settings['sampling'] == {
      'temperature': 0.7, 'top_k': 50, 'top_p': 0.9
  }  # fmt: skip
  assert (settings['seed'], settings['batch_size']) == (3, 32)
  assert (settings['step'], settings['dtype']) == (STEP, 'float32')


def test_outputs_of_a_mode_replace_its_former_ones(run_dir):
  generate(['a', 'b'], run_dir)
  generate(['c<extra_id_0>'], run_dir, mode='infill')
  generate(['d'], run_dir, operative_config=lambda: 'replay')
  assert [(row['prompt'], row['mode']) for row in outputs(run_dir)] == [
      ('c<extra_id_0>', 'infill'),
      ('d', 'decoder_only'),
  ]
  replay = pathlib.Path(run_dir) / 'generation' / 'operative_config.gin'
  assert replay.read_text() == 'replay'


def test_a_file_of_prompts_becomes_a_file_of_samples(
    run_dir, prompts_file, tmp_path
):
  output = tmp_path / 'samples.jsonl'
  generate(
      [], run_dir, prompts_file, output=str(output), num_samples=2,
      temperature=1.0,
  )  # fmt: skip
  rows = read(output)
  assert [(row['prompt_id'], row['sample']) for row in rows] == [
      (name, sample)
      for name in ('0', 'second', '2', '7', '4')
      for sample in (0, 1)
  ]
  assert [row['prompt'] for row in rows[::2]] == [
      'one', 'two', 'three', 'four', 'five'
  ]  # fmt: skip
  assert [row.get('decoder_prompt') for row in rows[::2]] == [
      None, None, 'drei', None, None
  ]  # fmt: skip
  assert 'decoder_prompt' not in rows[0]


def test_a_prompt_that_the_decoder_would_not_get_is_told(
    run_dir, prompts_file, tmp_path
):
  output = str(tmp_path / 'samples.jsonl')
  rows = [{'prompt': 'x<extra_id_0>', 'decoder_prompt': 'y'}]
  pathlib.Path(prompts_file).write_text(json.dumps(rows))
  with pytest.raises(UserError, match='expected no decoder_prompt in infill'):
    generate([], run_dir, prompts_file, output=output, mode='infill')


def test_a_stopped_command_goes_on_to_the_same_file(
    run_dir, prompts_file, tmp_path, monkeypatch, caplog
):
  def run(name, fail_after=99):
    monkeypatch.setattr(
        generate_run,
        'Generator',
        lambda *given: Answers(*given, fail_after=fail_after),
    )
    path = tmp_path / name
    return path, generate([], run_dir, prompts_file, output=str(path))

  whole, _ = run('whole.jsonl')
  for fail_after in (0, 1, 2):
    with pytest.raises(KeyboardInterrupt):
      run('parts.jsonl', fail_after)
    path, made = run('parts.jsonl')
    assert len(made) == 5 - 2 * fail_after
    assert path.read_bytes() == whole.read_bytes()
    path.unlink()
  caplog.set_level('INFO')
  run('whole.jsonl')
  assert 'All of the 5 samples are there.' in caplog.text


def test_other_prompts_do_not_go_into_the_same_file(
    run_dir, prompts_file, tmp_path
):
  output = str(tmp_path / 'samples.jsonl')
  generate([], run_dir, prompts_file, output=output)
  path = tmp_path / 'prompts.jsonl'
  path.write_text(path.read_text().replace('five', 'six'))
  told = r'another prompts \(.* now\); set OUTPUT'
  with pytest.raises(UserError, match=told):
    generate([], run_dir, prompts_file, output=output)


def test_a_task_makes_prompts_of_its_problems(run_dir, tmp_path):
  problems = tmp_path / 'problems.jsonl'
  problem = {'task_id': 'x/1', 'prompt': 'def f():\n    '}
  problems.write_text(json.dumps(problem))
  output = tmp_path / 'samples.jsonl'
  generate(
      [], run_dir, task=HumanEval(), problems=str(problems), output=str(output)
  )
  [row] = read(output)
  assert (row['prompt_id'], row['prompt']) == ('x/1', 'def f():\n\t')
  task = row['settings']['task']
  assert (task['name'], task['indent_with_tabs']) == ('humaneval', True)


@pytest.mark.parametrize(
    ('prompts', 'options', 'told'),
    [
        ([], {}, 'expected a prompt, found none'),
        (['a', ''], {}, 'found an empty one'),
        (['a'], {'prompts_file': 'p'}, 'found words after the command and'),
        (['a'], {'output': 'o'}, 'expected no OUTPUT'),
        ([], {'prompts_file': 'p'}, 'set OUTPUT to one'),
        ([], {'problems': 'p', 'output': 'o'}, 'expected a task'),
        (['a'], {'num_beams': 0}, 'expected one beam or more'),
        (['a'], {'temperature': -1.0}, 'set TEMPERATURE'),
        (['a'], {'mode': 'infill'}, 'expected <extra_id_0> in the prompt'),
        (['a'], {'mode': 'both'}, 'expected a mode among'),
        (['a'], {'stop_strings': 'def'}, "as a tuple, found the text 'def'"),
        (['a', 'b ' * 99], {}, 'expected a shorter prompt'),
        (['a'], {'task': HumanEval()}, 'set PROBLEMS, or leave out'),
        (
            ['a <extra_id_0>'],
            {'mode': 'infill', 'stop_strings': ['b']},
            'expected no STOP_STRINGS where gaps are filled',
        ),
    ],
)
def test_what_makes_no_sense_is_told(run_dir, prompts, options, told):
  with pytest.raises(UserError, match=told):
    generate(prompts, run_dir, **options)


@pytest.mark.parametrize(
    ('content', 'told'),
    [
        ('{"prompt": "a"}\n{"prompt": 7}\n', 'field prompt, a text, in row 2'),
        ('{"prompt": "a"}\n{"prompt": ""}\n', 'empty one in row 2'),
        ('{"prompt": "a"}\nx\n', 'expected JSON in row 2'),
        (
            '{"prompt": "a"}\n{"prompt": "b", "prompt_id": 0}\n',
            'found 0 again in row 2',
        ),
        ('', 'found an empty file'),
        ('{"prompt": "a", "decoder_prompt": ""}', 'empty one in row 1'),
        (
            '{"prompt": "a", "decoder_promt": "b"}',
            'found decoder_promt in row 1 .*; did you mean decoder_prompt?',
        ),
    ],
)
def test_a_bad_file_of_prompts_is_told(run_dir, tmp_path, content, told):
  path = tmp_path / 'prompts.jsonl'
  path.write_text(content)
  output = tmp_path / 'samples.jsonl'
  with pytest.raises(UserError, match=told):
    generate([], run_dir, str(path), output=str(output))
  assert not output.exists()
