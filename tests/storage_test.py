import errno
import os

import pytest

from codet5p_jax.errors import UserError
from codet5p_jax.storage import (
    StorageFault,
    explaining_storage_faults,
    local_path,
    storage_fault,
)


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_storage_faults_are_found_wherever_they_hide(code):
  words = os.strerror(code)
  assert storage_fault(OSError(code, 'ignored')) == words
  text = f"INTERNAL: Failed writing [os_error_code='{code}']"
  assert storage_fault(ValueError(text)) == words
  text = f'Error while serializing: I/O error: ignored (os error {code})'
  assert storage_fault(Exception(text)) == words
  with pytest.raises(StorageFault) as raised:
    with explaining_storage_faults('cannot write x', 'mend it'):
      try:
        raise OSError(code, 'ignored')
      except OSError as error:
        raise RuntimeError('while saving') from error
  assert str(raised.value) == f'cannot write x: {words}; mend it'


def test_other_errors_pass_unchanged():
  for error in (TimeoutError('slow'), ValueError('x'), UserError('y')):
    assert storage_fault(error) is None
    with pytest.raises(type(error)) as raised:
      with explaining_storage_faults('cannot write x', 'mend it'):
        raise error
    assert raised.value is error


def test_buckets_are_refused():
  with pytest.raises(UserError, match='mount the bucket'):
    local_path('gs://bucket/run')


def test_the_words_of_array_record_are_found():
  error = RuntimeError('write() failed: No space left on device; writing x')
  assert storage_fault(error) == 'No space left on device'
