"""Tests of what exported folders name and carry as their code."""

import ast

import pytest

from codet5p_jax.conversion import remote_code

CARRYING = ('codet5p', 'codet5p_embedding', 'codet5p_bimodal')


def classes_in(file):
  tree = ast.parse(file.read_text())
  return {x.name: x for x in tree.body if isinstance(x, ast.ClassDef)}


@pytest.mark.parametrize('model_type', CARRYING)
def test_every_named_class_is_in_a_carried_file(model_type):
  code = remote_code.find_remote_code(model_type)
  carried = {file.stem: classes_in(file) for file in code.files}
  for reference in code.auto_map.values():
    module, name = reference.split('.')
    assert name in carried[module]
  assert code.auto_map['AutoModel'].split('.')[1] == code.architecture
  configuration = carried[f'configuration_{model_type}']
  assert f"model_type = '{model_type}'" in ast.unparse(
      configuration[code.auto_map['AutoConfig'].split('.')[1]]
  )


@pytest.mark.parametrize('model_type', CARRYING)
def test_carried_files_import_only_each_other_and_their_two_libraries(
    model_type
):
  code = remote_code.find_remote_code(model_type)
  names = {file.stem for file in code.files}
  for file in code.files:
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.ImportFrom) and node.level:
        assert node.module in names
      elif isinstance(node, ast.ImportFrom):
        assert node.module.split('.')[0] in {'torch', 'transformers', 'typing'}
      elif isinstance(node, ast.Import):
        assert {x.name for x in node.names} <= {'math', 'torch'}


@pytest.mark.parametrize(
    'model_type, architecture',
    [('t5', 'T5ForConditionalGeneration'), ('codegen', 'CodeGenForCausalLM')],
)
def test_what_transformers_has_needs_no_code(model_type, architecture):
  assert remote_code.find_remote_code(model_type) == remote_code.RemoteCode(
      architecture
  )


def test_all_carried_files_are_used():
  used = {
      file
      for model_type in CARRYING
      for file in remote_code.find_remote_code(model_type).files
  }
  folder = next(iter(used)).parent
  assert used == set(folder.glob('*.py'))
