"""Tests of the seccomp filter, by an interpreter of its instructions."""

import errno
import struct

import pytest
from codet5p_jax.execution.inside import confinement

_X86, _ARM = 0xC000003E, 0xC00000B7
_ALLOWED, _KILLED = 'allowed', 'killed'
_REFUSED, _ABSENT = errno.EPERM, errno.ENOSYS
_OWN = 4321


def decide(machine, architecture, number, *arguments):
  """What the filters of a fork do with a system call: what is stricter."""
  decisions = [
      decide_by(code, architecture, number, *arguments) for code in (
          confinement.common_filter(machine),
          confinement.own_filter(machine, _OWN))]  # fmt: skip
  if _KILLED in decisions:
    return _KILLED
  return next((d for d in decisions if d != _ALLOWED), _ALLOWED)


def decide_by(program, architecture, number, *arguments):
  """What one filter does, as the kernel would run it."""
  code = list(struct.iter_unpack('HBBI', program))
  filled = (*arguments, *[0] * (6 - len(arguments)))
  data = struct.pack('<iIQ6Q', number, architecture, 0,
                     *(a % (1 << 64) for a in filled))  # fmt: skip
  accumulator, place = 0, 0
  while True:
    operation, if_true, if_false, value = code[place]
    place += 1
    match operation:
      case 0x20:
        (accumulator,) = struct.unpack_from('<I', data, value)
      case 0x06:
        break
      case 0x15 | 0x35:
        holds = {0x15: accumulator == value,
                 0x35: accumulator >= value}[operation]  # fmt: skip
        place += if_true if holds else if_false
  if value == 0x80000000:
    return _KILLED
  return _ALLOWED if value == 0x7FFF0000 else value & 0xFFFF


@pytest.mark.parametrize(('number', 'arguments', 'expected'), [
    (0, (), _ALLOWED), (1, (), _ALLOWED), (9, (), _ALLOWED),  # read write mmap
    (57, (), _REFUSED), (58, (), _REFUSED), (59, (), _REFUSED),
    (41, (), _REFUSED), (53, (), _ALLOWED),  # socket, socketpair
    (101, (), _REFUSED), (310, (), _REFUSED), (200, (), _REFUSED),
    (56, (0x3D0F00,), _REFUSED), (56, (17,), _REFUSED),  # clone
    (56, (0x1200011,), _REFUSED), (435, (), _ABSENT), (434, (), _ABSENT),
    (424, (), _ABSENT), (425, (), _ABSENT), (436, (), _ALLOWED),
    (437, (), _ALLOWED), (439, (), _ALLOWED), (999, (), _ABSENT),
    (62, (_OWN, 9), _ALLOWED), (62, (-1, 9), _REFUSED), (62, (0, 9), _REFUSED),
    (62, (1, 9), _REFUSED), (62, (-_OWN, 9), _REFUSED),
    (234, (_OWN, _OWN, 6), _ALLOWED), (234, (1, 1, 9), _REFUSED),
    (302, (0, 7), _ALLOWED), (302, (_OWN, 7), _ALLOWED),
    (302, (1, 7), _REFUSED), (72, (3, 3), _ALLOWED), (72, (3, 8), _REFUSED),
    (72, (3, 10), _REFUSED), (72, (3, 15), _REFUSED), (16, (0, 1), _ALLOWED),
    (16, (0, 0x5412), _REFUSED), (16, (3, 0x8901), _REFUSED),
    (16, (3, 0x40086602), _REFUSED), (90, (), _REFUSED), (260, (), _REFUSED),
    (280, (), _REFUSED), (189, (), _REFUSED), (191, (), _ALLOWED),  # getxattr
    (452, (), _ABSENT), (463, (), _ABSENT), (469, (), _ABSENT),
    (0x40000000, (), _KILLED), (0x40000039, (), _KILLED), (-1, (), _KILLED),
])  # fmt: skip
def test_the_filter_decides_on_x86_64(number, arguments, expected):
  assert decide('x86_64', _X86, number, *arguments) == expected


@pytest.mark.parametrize(('number', 'arguments', 'expected'), [
    (63, (), _ALLOWED), (221, (), _REFUSED), (198, (), _REFUSED),
    (199, (), _ALLOWED), (117, (), _REFUSED), (220, (0x3D0F00,), _REFUSED),
    (220, (17,), _REFUSED), (435, (), _ABSENT), (129, (_OWN, 9), _ALLOWED),
    (129, (1, 9), _REFUSED), (131, (1, 1, 9), _REFUSED),
    (261, (0, 7), _ALLOWED), (261, (1, 7), _REFUSED), (25, (3, 8), _REFUSED),
    (29, (3, 0x5452), _REFUSED), (57, (), _ALLOWED), (279, (), _REFUSED),
    (52, (), _REFUSED), (53, (), _REFUSED), (88, (), _REFUSED),
    (5, (), _REFUSED), (8, (), _ALLOWED),  # getxattr
])  # fmt: skip
def test_the_filter_decides_on_aarch64(number, arguments, expected):
  assert decide('aarch64', _ARM, number, *arguments) == expected


def test_calls_of_another_architecture_kill():
  assert decide('x86_64', 0x40000003, 11) == _KILLED  # i386's execve
  assert decide('aarch64', _X86, 0) == _KILLED


def test_every_number_belongs_to_one_call_alone():
  for column in (0, 1):
    tables = confinement._DENIED | confinement._DENIED_TO_FORKS
    numbers = [n[column] for n in tables.values()
               if n[column] is not None]  # fmt: skip
    assert len(numbers) == len(set(numbers))
    assert max(numbers) < confinement._COMMON


def test_an_unknown_machine_has_no_filter():
  with pytest.raises(NotImplementedError, match='not for riscv64'):
    confinement.common_filter('riscv64')


def test_what_forks_others_may_do_so_until_it_is_confined_itself():
  for call, arguments in ((56, (17,)), (57, ()), (62, (1, 9))):
    allowed = decide_by(
        confinement.common_filter('x86_64'), _X86, call, *arguments)
    assert allowed == _ALLOWED


def test_the_number_of_a_fork_stands_in_three_places():
  # kill, tgkill and prlimit64
  assert len(confinement.Confinement(filtered=True)._places) == 3
