import pytest

from codet5p_jax.training.checkpoints.steps import committed_steps, set_aside


def test_only_bare_numbers_are_steps(tmp_path):
  folder = tmp_path / 'checkpoints'
  assert committed_steps(folder) == []
  for name in (
      '7', '20', '007', '3.orbax-checkpoint-tmp', 'damaged', 'damaged/9', '٣',
      '-4', 'kept',
  ):
    (folder / name).mkdir(parents=True)
  (folder / '11').touch()  # In place of a folder: damaged, but not nothing.
  assert committed_steps(folder) == [7, 11, 20]


def test_damaged_and_half_written_ones_are_no_checkpoints(tmp_path):
  (tmp_path / 'damaged' / '5').mkdir(parents=True)
  (tmp_path / '5.orbax-checkpoint-tmp-3').mkdir()
  assert committed_steps(tmp_path) == []


def test_what_is_set_aside_keeps_its_content_and_never_replaces(tmp_path):
  places = []
  for number in range(3):
    step = tmp_path / '5'
    if number == 1:
      step.write_text('1')  # A file where a folder was.
    else:
      step.mkdir()
      (step / 'file').write_text(str(number))
    places.append(set_aside(step))
    assert not step.exists()
  assert places == [tmp_path / 'damaged' / name for name in ('5', '5-2', '5-3')]
  assert (places[0] / 'file').read_text() == '0'
  assert places[1].read_text() == '1'
  assert (places[2] / 'file').read_text() == '2'


def test_a_link_to_nowhere_is_a_place_that_is_taken(tmp_path):
  (tmp_path / 'damaged').mkdir()
  (tmp_path / 'damaged' / '5').symlink_to('nowhere')
  (tmp_path / '5').mkdir()
  assert set_aside(tmp_path / '5').name == '5-2'
  with pytest.raises(FileNotFoundError):
    set_aside(tmp_path / '6')
