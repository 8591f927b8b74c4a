"""What is written is read here as TensorBoard's own reader does."""

import errno
import os
import struct
import threading

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from codet5p_jax.errors import UserError
from codet5p_jax.training.event_file import EventFile


def masked_crc(content):
  """CRC-32C bit by bit, turned and moved as in TFRecord files."""
  crc = 0xFFFFFFFF
  for byte in content:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def read_events(path):
  """The events of a file; their checksums are right."""
  content, events = path.read_bytes(), []
  while content:
    size, size_crc = struct.unpack('<QI', content[:12])
    record, content = content[12 : 12 + size], content[12 + size :]
    (record_crc,), content = struct.unpack('<I', content[:4]), content[4:]
    assert size_crc == masked_crc(struct.pack('<Q', size))
    assert record_crc == masked_crc(record)
    events.append(Event.FromString(record))
  return events


def told(path):
  """{step: {tag: number}} of a file."""
  return {
      event.step: {x.tag: x.simple_value for x in event.summary.value}
      for event in read_events(path)
      if event.HasField('summary')
  }


def test_numbers_are_on_the_disk_when_a_write_returns(tmp_path):
  before = threading.active_count()
  events = EventFile(tmp_path / 'made' / 'events', 0)
  written = {
      5: {'train/loss': 2.5, 'train/tokens': 96.0},
      7: {'evaluation/loss': -0.75},
  }
  for step, values in written.items():
    events.write(step, values)
    [path] = (tmp_path / 'made' / 'events').iterdir()
    assert told(path)[step] == values
  assert told(path) == written
  # Nothing runs beside the run, which a full disk could end.
  assert threading.active_count() == before
  events.close()
  assert told(path) == written


def test_a_file_replaces_what_others_say_of_later_steps(tmp_path):
  EventFile(tmp_path, 40).close()
  [path] = tmp_path.iterdir()
  version, start = read_events(path)
  # TensorBoard looks at the second only in files of this version.
  assert version.file_version == 'brain.Event:2'
  assert start.session_log.status == SessionLog.START
  assert start.step == 40


def test_closing_twice_is_closing_once(tmp_path):
  events = EventFile(tmp_path, 0)
  events.write(1, {'loss': 0.5})
  events.close()
  events.close()
  [path] = tmp_path.iterdir()
  assert told(path) == {1: {'loss': 0.5}}


def test_a_full_disk_is_one_line_and_hides_nothing_at_the_end(
    tmp_path, monkeypatch
):
  events = EventFile(tmp_path, 0)

  def refuse():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  for name in ('flush', 'close'):
    monkeypatch.setattr(events._writer, name, refuse)
  with pytest.raises(UserError) as raised:
    events.write(1, {'loss': 0.5})
  assert str(raised.value) == (
      f'cannot write {tmp_path}: No space left on device; free space or mend '
      f'its permissions'
  )
  events.close()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='events: Not a directory; free space'):
    EventFile(tmp_path / 'file' / 'events', 0)
