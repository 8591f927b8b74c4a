import os

import pytest

from codet5p_jax.conversion.target_folder import whole_or_nothing
from codet5p_jax.errors import UserError


def test_a_folder_appears_when_all_is_written(tmp_path):
  target = tmp_path / 'above/target'
  (tmp_path / 'above/target.partial').mkdir(parents=True)
  (tmp_path / 'above/target.partial/left').touch()
  with whole_or_nothing(target) as partial:
    assert not os.listdir(partial)
    (partial / 'file').touch()
    assert not target.exists()
  assert os.listdir(tmp_path / 'above') == ['target']
  assert os.listdir(target) == ['file']


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_nothing_is_left_of_what_fails(tmp_path, error):
  with pytest.raises(error):
    with whole_or_nothing(tmp_path / 'target') as partial:
      (partial / 'file').touch()
      raise error
  assert not os.listdir(tmp_path)


def test_faults_of_the_disk_are_one_line(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot write .*: .*free space'):
    with whole_or_nothing(tmp_path / 'file/target'):
      pass
  with pytest.raises(UserError, match='found that it exists'):
    with whole_or_nothing(tmp_path / 'file'):
      pass
