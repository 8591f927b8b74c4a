"""What a process gives up before the first line of a program runs in it.

Mount, network and process namespaces are the work of bubblewrap. This is the
rest: limits of resources, and a seccomp filter, since namespaces keep no
process from forking, and none from signalling or tracing its neighbours.

A program is taken for native code: that it cannot import ctypes spares nobody
anything, as made-up bytecode does the same. It is what it finds of the kernel
that counts.
"""

import ctypes
import dataclasses
import errno
import math
import os
import platform
import resource
import struct
import sys

# By name: the number on x86_64 and on aarch64, None where there is none.
_DENIED = {
    # Processes, and what touches those of others.
    'execve': (59, 221), 'execveat': (322, 281), 'ptrace': (101, 117),
    'process_vm_readv': (310, 270), 'process_vm_writev': (311, 271),
    'kcmp': (312, 272), 'migrate_pages': (256, 238),
    'move_pages': (279, 239), 'setpriority': (141, 140),
    'ioprio_set': (251, 30), 'sched_setscheduler': (144, 119),
    'sched_setparam': (142, 118), 'sched_setattr': (314, 274),
    'sched_setaffinity': (203, 122), 'setpgid': (109, 154),
    # Namespaces and mounts.
    'unshare': (272, 97), 'setns': (308, 268), 'mount': (165, 40),
    'umount2': (166, 39), 'pivot_root': (155, 41), 'chroot': (161, 51),
    'name_to_handle_at': (303, 264), 'open_by_handle_at': (304, 265),
    # Networks; pairs of sockets are left.
    'socket': (41, 198),
    # Memory that outlives a process or that no limit counts.
    'shmget': (29, 194), 'shmat': (30, 196), 'shmctl': (31, 195),
    'semget': (64, 190), 'semctl': (66, 191), 'semop': (65, 193),
    'semtimedop': (220, 192), 'msgget': (68, 186), 'msgsnd': (69, 189),
    'msgrcv': (70, 188), 'msgctl': (71, 187), 'mq_open': (240, 180),
    'mq_unlink': (241, 181), 'mq_notify': (244, 184),
    'memfd_create': (319, 279), 'add_key': (248, 217),
    'request_key': (249, 218), 'keyctl': (250, 219),
    # Large or rarely used parts of the kernel.
    'bpf': (321, 280), 'perf_event_open': (298, 241),
    'userfaultfd': (323, 282), 'io_setup': (206, 0), 'io_submit': (209, 2),
    'vmsplice': (278, 75), 'fanotify_init': (300, 262),
    'fanotify_mark': (301, 263), 'personality': (135, 92),
    'modify_ldt': (154, None), 'iopl': (172, None), 'ioperm': (173, None),
    'lookup_dcookie': (212, 18), 'uselib': (134, None),
    'mknod': (133, None), 'mknodat': (259, 33),
    # What is said of a file. Where root starts the sandbox, its devices are the
    # machine's, and its /tmp belongs to the next program too. No error has
    # shutil.copy() go on, which ends with chmod; copyfile() and tempfile do not
    # need it. Those newer than the filter, such as fchmodat2, are absent.
    'chmod': (90, None), 'fchmod': (91, 52), 'fchmodat': (268, 53),
    'chown': (92, None), 'fchown': (93, 55), 'lchown': (94, None),
    'fchownat': (260, 54), 'utime': (132, None), 'utimes': (235, None),
    'futimesat': (261, None), 'utimensat': (280, 88), 'setxattr': (188, 5),
    'lsetxattr': (189, 6), 'fsetxattr': (190, 7), 'removexattr': (197, 14),
    'lremovexattr': (198, 15), 'fremovexattr': (199, 16),
    # The machine.
    'reboot': (169, 142), 'kexec_load': (246, 104),
    'kexec_file_load': (320, 294), 'init_module': (175, 105),
    'finit_module': (313, 273), 'delete_module': (176, 106),
    'swapon': (167, 224), 'swapoff': (168, 225), 'acct': (163, 89),
    'quotactl': (179, 60), 'syslog': (103, 116), 'settimeofday': (164, 170),
    'clock_settime': (227, 112), 'clock_adjtime': (305, 266),
    'adjtimex': (159, 171), 'sethostname': (170, 161),
    'setdomainname': (171, 162), 'vhangup': (153, 58),
}  # fmt: skip

# The zygote needs some of these. Threads are made by clone too, and refused: no
# limit counts those that root starts, and enough of them keep the whole machine
# from forking.
_DENIED_TO_FORKS = {
    'clone': (56, 220), 'fork': (57, None), 'vfork': (58, None),
    'tkill': (200, 130),
    'rt_sigqueueinfo': (129, 138), 'rt_tgsigqueueinfo': (297, 240),
}  # fmt: skip

# From here on numbers are the same everywhere. What is newer than this filter
# is as if the kernel had it not; so is clone3, whose flags no filter can read.
_COMMON = 424
_COMMON_ALLOWED = (436, 437, 439, 441)  # close_range, openat2, faccessat2,
# epoll_pwait2.


@dataclasses.dataclass(frozen=True)
class _Architecture:
  """How one architecture calls its kernel."""

  column: int  # Of `_DENIED`.
  audit: int  # How seccomp names it.
  kill: int
  tgkill: int
  prlimit64: int
  fcntl: int
  ioctl: int


_ARCHITECTURES = {
    'x86_64': _Architecture(0, 0xC000003E, 62, 234, 302, 72, 16),
    'aarch64': _Architecture(1, 0xC00000B7, 129, 131, 261, 25, 29),
}

# Commands that have the kernel send signals to processes of one's choice, put
# characters into a terminal, or change flags of a file.
_FCNTL_DENIED = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX
_IOCTL_DENIED = (
    0x5412, 0x5452, 0x8901, 0x8902,  # TIOCSTI, FIOASYNC, FIOSETOWN, SIOCSPGRP
    0x40086602, 0x401C5820)  # FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR # fmt: skip

_ALLOW = 0x7FFF0000
_ERROR = 0x00050000
_KILL = 0x80000000


@dataclasses.dataclass(frozen=True)
class Limits:
  """The resources of each of the two processes of a program.

  Attributes:
    memory_bytes: of address space.
    file_bytes: of a file, and of the folder for temporary files as a whole.
    open_files: descriptors.
  """

  memory_bytes: int = 1 << 30
  file_bytes: int = 1 << 26
  open_files: int = 64


def limit(limits: Limits) -> None:
  """Bounds the resources of this process, and of each of its forks."""
  for kind, most in (
      (resource.RLIMIT_AS, limits.memory_bytes),
      (resource.RLIMIT_FSIZE, limits.file_bytes),
      (resource.RLIMIT_NOFILE, limits.open_files),
      (resource.RLIMIT_CORE, 0),
  ):
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
      most = min(most, hard)
    resource.setrlimit(kind, (most, most))


class Confinement:
  """What a fork gives up before it runs anything, for good.

  Made before the fork and used after it: whatever a fork computes or touches
  costs it copies of pages, and each is one more for every program.
  """

  def __init__(self, filtered: bool) -> None:
    """Prepares it.

    Args:
      filtered: whether forks get a filter; `filter_all` was called then.
    """
    self._filter = None
    if filtered:
      # A number that no process has, to find where that of a fork belongs.
      placeholder = 0x5EC0FFEE
      code = own_filter(platform.machine(), placeholder)
      own = struct.pack('I', placeholder)
      self._places = [i for i in range(0, len(code), 4)
                      if code[i : i + 4] == own]  # fmt: skip
      self._filter = _Filter(code)

  def enter(self, seconds: float | None) -> None:
    """Confines this process, a fork.

    Args:
      seconds: of computing, if that is bounded.

    Raises:
      OSError: the kernel refuses.
    """
    if seconds is not None:
      most = math.ceil(seconds) + 1
      resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    if self._filter is None:
      end_by_signal, killed = 1, 9  # PR_SET_PDEATHSIG: with the zygote.
      _call_prctl(end_by_signal, killed, 0, 0, 0)
    else:
      for place in self._places:
        struct.pack_into('I', self._filter.code, place, os.getpid())
      self._filter.install()
    for name in ('ctypes', '_ctypes'):
      sys.modules[name] = None


def filter_all() -> None:
  """Filters this process and all its forks.

  Raises:
    OSError: the kernel has no seccomp, or refuses.
    NotImplementedError: the architecture is not known.
  """
  no_new_privileges = 38
  _call_prctl(no_new_privileges, 1, 0, 0, 0)
  _Filter(common_filter(platform.machine())).install()


class _Filter:
  """A seccomp filter, as the kernel reads it."""

  def __init__(self, code: bytes) -> None:
    self.code = ctypes.create_string_buffer(code, len(code))
    self._program = ctypes.create_string_buffer(struct.pack(
        'HxxxxxxQ', len(code) // 8, ctypes.addressof(self.code)))  # fmt: skip
    self._address = ctypes.addressof(self._program)

  def install(self) -> None:
    set_seccomp, by_filter = 22, 2
    _call_prctl(set_seccomp, by_filter, self._address, 0, 0)


_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


def _call_prctl(option: int, *arguments: int) -> None:
  """Calls prctl(2).

  Raises:
    OSError: the kernel refuses.
  """
  if _prctl(option, *arguments):
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def common_filter(machine: str) -> bytes:
  """What neither the zygote nor its forks may call, in classic BPF.

  Args:
    machine: as `platform.machine()` names it.

  Raises:
    NotImplementedError: the architecture is not known.
  """
  known = _architecture(machine)
  code = [_load(4), _unless_equal(known.audit, _return(_KILL)), _load(0)]
  if machine == 'x86_64':  # The numbers of x32 begin there.
    code.append(_if_at_least(0x40000000, _return(_KILL)))
  for number in _COMMON_ALLOWED:
    code.append(_if_equal(number, _return(_ALLOW)))
  code.append(_if_at_least(_COMMON, _return(_ERROR | errno.ENOSYS)))
  for numbers in _DENIED.values():
    if numbers[known.column] is not None:
      code.append(_if_equal(numbers[known.column], _REFUSE))
  return b''.join(code) + _return(_ALLOW)


def own_filter(machine: str, own: int) -> bytes:
  """What a fork may not call beyond that: it has no power over processes.

  Args:
    machine: as `platform.machine()` names it.
    own: the process, which may signal itself.

  Raises:
    NotImplementedError: the architecture is not known.
  """
  known = _architecture(machine)
  code = [_load(0)]
  for numbers in _DENIED_TO_FORKS.values():
    if numbers[known.column] is not None:
      code.append(_if_equal(numbers[known.column], _REFUSE))
  # Arguments are of 64 bits; the kernel reads the lower 32 of these.
  first, second = 16, 24
  code += [
      _if_equal(known.prlimit64, _load(first)
                + _if_equal(0, _return(_ALLOW))
                + _unless_equal(own, _REFUSE) + _return(_ALLOW)),
      _if_equal(known.fcntl, _load(second)
                + b''.join(_if_equal(c, _REFUSE) for c in _FCNTL_DENIED)
                + _return(_ALLOW)),
      _if_equal(known.ioctl, _load(second)
                + b''.join(_if_equal(c, _REFUSE) for c in _IOCTL_DENIED)
                + _return(_ALLOW)),
  ]  # fmt: skip
  for number in (known.kill, known.tgkill):
    code.append(_if_equal(number, _load(first) + _unless_equal(own, _REFUSE)
                          + _return(_ALLOW)))  # fmt: skip
  return b''.join(code) + _return(_ALLOW)


def _architecture(machine: str) -> _Architecture:
  if machine not in _ARCHITECTURES:
    raise NotImplementedError(
        f'seccomp filters are written for {" and ".join(_ARCHITECTURES)}, not '
        f'for {machine}')  # fmt: skip
  return _ARCHITECTURES[machine]


def _instruction(code: int, value: int, if_true=0, if_false=0) -> bytes:
  return struct.pack('HBBI', code, if_true, if_false, value)


def _load(offset: int) -> bytes:
  """Loads 32 bits of the call's description: 0 number, 4 architecture, ..."""
  return _instruction(0x20, offset)


def _return(action: int) -> bytes:
  return _instruction(0x06, action)


def _if_equal(value: int, then: bytes) -> bytes:
  return _instruction(0x15, value, 0, len(then) // 8) + then


def _unless_equal(value: int, then: bytes) -> bytes:
  return _instruction(0x15, value, len(then) // 8, 0) + then


def _if_at_least(value: int, then: bytes) -> bytes:
  return _instruction(0x35, value, 0, len(then) // 8) + then


_REFUSE = _return(_ERROR | errno.EPERM)
