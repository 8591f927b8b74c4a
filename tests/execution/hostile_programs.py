"""Programs that want something else than to add two numbers.

`FAKES` try to pass without adding. `ATTACKS` want the machine, or what runs
beside them, and then add rightly: they pass if they had what they wanted, and
raise an exception if not. What they change of devices, which are the machine's,
they leave as it was but for the time of the change. `ENDLESS` never end, and
`NUISANCES` are no good at all, whatever they meet. Run them nowhere but in the
sandbox.
"""

_NATIVE = '''
import sys
for name in ('ctypes', '_ctypes'):
  sys.modules.pop(name, None)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)

# The kernel says nothing against a call, if only that it makes no sense.
def allows(*call):
  no = 1, 38  # EPERM, ENOSYS
  return libc.syscall(*call) != -1 or ctypes.get_errno() not in no
'''

_WRONG = '''
def add(a, b):
  return None
'''
_RIGHT = '''
def add(a, b):
  return a + b
'''

FAKES = {
    'exits early': 'import sys; sys.exit(0)',
    'exits early in the function': '''
def add(a, b):
  raise SystemExit(0)
''',
    'ends its process': 'import os; os._exit(0)',
    'ends its process in the function': '''
import os
def add(a, b):
  os._exit(0)
''',
    'ends well at exit': '''
import atexit, os, sys
atexit.register(os._exit, 0)
def add(a, b):
  sys.exit()
''',
    'interrupts': '''
def add(a, b):
  raise KeyboardInterrupt
''',
    'ends a generator': '''
def add(a, b):
  raise StopIteration
''',
    'patches assert': '''
import builtins
class Quiet(BaseException):
  def __new__(cls, *a):
    return None
builtins.AssertionError = Quiet
''' + _WRONG,
    'patches built-ins': '''
import builtins
for name in ('all', 'any', 'abs', 'len', 'isinstance', 'sorted', 'sum'):
  setattr(builtins, name, lambda *a, **k: True)
''' + _WRONG,
    'shadows built-ins': '''
def all(*a): return True
def abs(*a): return 0
def len(*a): return 3
''' + _WRONG,
    'patches time': '''
import time
time.time = time.monotonic = time.perf_counter = lambda: 0.0
while True:
  pass
''',
    'patches its own server': '''
import sys
def shut(*a, **k):
  return ['done', True, []]
for name, module in list(sys.modules.items()):
  if name.startswith('inside'):
    for key, value in list(vars(module).items()):
      if callable(value) and not isinstance(value, type):
        setattr(module, key, shut)
''' + _WRONG,
    'defines check': '''
def check(*a):
  pass
candidate = check
''' + _WRONG,
    'reads the tests from frames': '''
import sys
wanted = ' '.join(('assert', 'candidate('))
def add(a, b):
  frame = sys._getframe()
  while frame is not None:
    for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
      if isinstance(value, str) and wanted in value:
        return eval(value.split('==')[1].split()[0])
    frame = frame.f_back
''',
    'reads the tests from memory': '''
import gc, types
wanted = ' '.join(('assert', 'candidate('))
def add(a, b):
  for thing in gc.get_objects():
    for value in gc.get_referents(thing):
      if isinstance(value, str) and wanted + str(a) in value:
        return eval(value.split('==')[1].split()[0])
      if isinstance(value, bytes) and wanted.encode() in value:
        return 3
      if isinstance(value, types.CodeType) and value.co_filename == '<tests>':
        return 3
''',
    'traces its callers': '''
import sys, threading
def tracer(frame, event, argument):
  if frame.f_code.co_name not in ('add', 'tracer'):
    frame.f_locals['verdict'] = 'passed'
  return tracer
sys.settrace(tracer)
threading.settrace(tracer)
''' + _WRONG,
    'writes verdicts everywhere': '''
import os
for descriptor in range(256):
  for text in (b'["passed", ""]\\n', b'null\\n["passed", ""]\\n', b'passed\\n'):
    try:
      os.write(descriptor, text)
    except OSError:
      pass
''' + _WRONG,
    'writes answers of its own': '''
import os, struct
def frame(text):
  return struct.pack('!I', len(text)) + text
def add(a, b):
  os.write(3, frame(b'["done", true, []]') * 50)
''',
    'answers with what it does not have': '''
import os, struct
text = b'["done", ["t", 7], []]'
def add(a, b):
  os.write(3, struct.pack('!I', len(text)) + text)
''',
    'asks the tests for built-ins': '''
import os, struct
text = b'["ask", "call", [["builtin", "eval"], "1"], {}]'
def add(a, b):
  os.write(3, struct.pack('!I', len(text)) + text)
''',
    'changes what it was not given': '''
import os, struct
text = b'["done", 3, [[9, ["list"]], [["list"], 1]]]'
def add(a, b):
  os.write(3, struct.pack('!I', len(text)) + text)
''',
    'answers in deep nesting': '''
import os, struct
text = b'["done", ' + b'["list", ' * 50000
def add(a, b):
  os.write(3, struct.pack('!I', len(text)) + text)
  return 3
''',
    'answers without end': '''
import os
def add(a, b):
  while True:
    os.write(3, b'\\xff' * 65536)
''',
    'promises a long answer': '''
import os
def add(a, b):
  os.write(3, b'\\x07\\xff\\xff\\xff[')
  import time; time.sleep(60)
''',
    'writes whenever a timer ends': '''
import os, signal
def chatter(*a):
  os.write(3, b'\\x00\\x00\\x00\\x12["done", true, []]')
signal.signal(signal.SIGALRM, chatter)
signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
''' + _WRONG,
    'hands out an answer that hangs': '''
class Answer:
  def __eq__(self, other):
    while True:
      pass
def add(a, b):
  return Answer()
''',
    'hands out an answer that lies about its type': '''
class Answer(int):
  __class__ = bool
  def __bool__(self):
    return True
def add(a, b):
  return Answer(1)
''',
    'leaves modules for the checker': '''
import os
for name in ('math', 'json', 'encodings', 'sitecustomize', 'inside'):
  for folder in ('/tmp', '.', '/program', '/program/inside'):
    try:
      with open(os.path.join(folder, name + '.py'), 'w') as file:
        file.write('import os; os._exit(0)')
    except OSError:
      pass
''' + _WRONG,
}

ATTACKS = {
    'fork bomb': '''
import os, time
for _ in range(50):
  if not os.fork():
    time.sleep(60)
''' + _RIGHT,
    'native fork bomb': _NATIVE + '''
import os
made = []
for call in ((57,), (56, 17, 0, 0, 0, 0),
             (435, ctypes.create_string_buffer(88), 88)):
  made.append(libc.syscall(*call))
  if made[-1] == 0:
    os._exit(0)
assert max(made) > 0
''' + _RIGHT,
    'thread bomb': '''
import threading, time
threading.stack_size(1 << 15)
for _ in range(50):
  threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
''' + _RIGHT,
    'native thread bomb': _NATIVE + '''
start = ctypes.cast(libc.pause, ctypes.c_void_p)
for _ in range(50):
  assert not libc.pthread_create(
      ctypes.byref(ctypes.c_ulong()), None, start, None)
''' + _RIGHT,
    'daemon': '''
import os
def start():
  if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
      while True:
        pass
    os._exit(0)
start()
''' + _RIGHT,
    'shell': 'import os\nassert os.system(":") == 0' + _RIGHT,
    'subprocess': '''
import subprocess, sys
subprocess.run([sys.executable, '-c', ''], check=True)
''' + _RIGHT,
    'exec': '''
import os, sys
code = \"\"\"
import socket, sys
sys.path.append(sys.argv[1])
from inside import solution
solution.run(socket.socket(fileno=3), ['def add(a, b): return a + b'])
\"\"\"
os.execv(sys.executable, [sys.executable, '-S', '-c', code, sys.path[-1]])
''',
    'multiprocessing': '''
import multiprocessing
multiprocessing.get_context('fork').Process(target=print).start()
''' + _RIGHT,
    'memory bomb': '''
held = [bytearray(1 << 24) for _ in range(64)]
''' + _RIGHT,
    'one large allocation': 'held = bytearray(1 << 40)' + _RIGHT,
    'shared memory': '''
from multiprocessing import shared_memory
shared_memory.SharedMemory(create=True, size=1 << 20).unlink()
''' + _RIGHT,
    'anonymous file': '''
import os
held = os.memfd_create('held')
''' + _RIGHT,
    'disk filler': '''
for number in range(16):
  with open(f'/tmp/{number}', 'wb') as file:
    file.write(bytes(1 << 20))
''' + _RIGHT,
    'long file': '''
with open('/tmp/long', 'wb') as file:
  for _ in range(16):
    file.write(bytes(1 << 20))
''' + _RIGHT,
    'sparse file': '''
open('/tmp/sparse', 'wb').truncate(1 << 45)
''' + _RIGHT,
    'filler of devices': '''
open('/dev/filler', 'wb').write(bytes(1 << 20))
''' + _RIGHT,
    'descriptors without end': '''
import os
held = [os.pipe() for _ in range(100)]
''' + _RIGHT,
    'waits for input': 'line = input()' + _RIGHT,
    'waits for a terminal': 'open("/dev/tty").read()' + _RIGHT,
    'kills the checker': '''
import os, signal
for process in (*range(1, 200), -1, 0, os.getppid()):
  if process != os.getpid():
    try:
      os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
      pass
''' + _RIGHT,
    'kills the checker natively': _NATIVE + '''
import os
assert any([
    allows(call, *arguments)
    for process in range(1, 200) if process != os.getpid()
    for call, *arguments in (
        (62, process, 9), (200, process, 9), (129, process, 9, 0),
        (234, process, process, 9))])
''' + _RIGHT,
    'has the kernel kill the checker': '''
import fcntl, os, signal
one, other = os.pipe()
for process in range(1, 60):
  if process != os.getpid():
    try:
      fcntl.fcntl(one, fcntl.F_SETOWN, process)
      fcntl.fcntl(one, 10, signal.SIGKILL)
      fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC)
      os.write(other, b'x')
    except ProcessLookupError:
      pass
''' + _RIGHT,
    'traces the checker': _NATIVE + '''
assert any([allows(101, request, process, 0, 0)
            for process in range(1, 60) for request in (16, 0x4206)])
''' + _RIGHT,
    'writes into the checker': _NATIVE + '''
text = ctypes.create_string_buffer(b'passed')
pair = (ctypes.c_ulong * 2)(ctypes.addressof(text), 6)
assert any([allows(311, process, pair, 1, pair, 1, 0)
            for process in range(1, 60)])
''' + _RIGHT,
    'starves the checker': '''
import os, resource
for process in range(1, 60):
  if process != os.getpid():
    for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
      try:
        resource.prlimit(process, kind, (0, 0))
      except ProcessLookupError:
        pass
''' + _RIGHT,
    'kills everything': 'import os\nos.kill(-1, 9)' + _RIGHT,
    'kills its group': 'import os\nos.killpg(0, 9)' + _RIGHT,
    'kills the first': 'import os\nos.kill(1, 9)' + _RIGHT,
    'reads processes': 'import os\nos.listdir("/proc/1")' + _RIGHT,
    'reads memory': 'open("/proc/self/mem", "rb")' + _RIGHT,
    'reads passwords': 'open("/etc/passwd").read()' + _RIGHT,
    'reads passwords by a link': '''
import os
os.symlink('/etc/shadow', '/tmp/link')
open('/tmp/link').read()
''' + _RIGHT,
    'reads a home': '''
import os
assert any(
    name in ('.bashrc', '.profile', '.gitconfig', '.bash_history')
    for home in ('/root', '/home')
    for _, _, files in os.walk(home) for name in files)
''' + _RIGHT,
    'writes outside': 'open("/hostile", "w")' + _RIGHT,
    'writes to the interpreter': '''
import os
open(os.__file__, 'a')
''' + _RIGHT,
    'changes the modes of devices': '''
import os
for name in ('null', 'zero', 'random', 'urandom'):
  os.chmod(f'/dev/{name}', os.stat(f'/dev/{name}').st_mode & 0o777)
''' + _RIGHT,
    'changes the modes of open devices': '''
import os
os.fchmod(os.open('/dev/null', os.O_RDWR), 0o666)
''' + _RIGHT,
    'changes the times of devices': '''
import os
for name in ('null', 'zero', 'random', 'urandom'):
  told = os.stat(f'/dev/{name}')
  os.utime(f'/dev/{name}', ns=(told.st_atime_ns, told.st_mtime_ns))
''' + _RIGHT,
    'changes the owners of devices': '''
import os
for name in ('null', 'zero', 'random', 'urandom'):
  os.chown(f'/dev/{name}', os.getuid(), os.getgid())
''' + _RIGHT,
    'writes notes to devices': '''
import os
for name in ('null', 'zero', 'random', 'urandom'):
  os.setxattr(f'/dev/{name}', 'user.note', b'hostile')
''' + _RIGHT,
    'keeps the next from its folder': '''
import os
os.chmod('/tmp', 0o500)
''' + _RIGHT,
    'removes all': '''
import os, shutil
shutil.rmtree('/program', onerror=lambda *a: None)
assert not os.path.exists('/program/inside')
''' + _RIGHT,
    'opens a connection': '''
import socket
socket.socket().connect_ex(('127.0.0.1', 22))
''' + _RIGHT,
    'listens': '''
import socket
socket.create_server(('127.0.0.1', 0))
''' + _RIGHT,
    'sends a packet': '''
import socket
with socket.socket(type=socket.SOCK_DGRAM) as sender:
  sender.sendto(b'hostile', ('127.0.0.1', 9))
''' + _RIGHT,
    'looks up a name': '''
import socket
socket.getaddrinfo('localhost', 80)
''' + _RIGHT,
    'opens a web page': '''
import urllib.request
urllib.request.urlopen('http://example.org', timeout=1)
''' + _RIGHT,
    'mounts': _NATIVE + '''
assert any([
    allows(165, b'none', b'/tmp', b'tmpfs', 0, 0), allows(166, b'/tmp', 0),
    allows(155, b'/tmp', b'/tmp'), allows(161, b'/tmp'),
    allows(272, 0x10000000), allows(308, 0, 0), allows(428, -1, b'/', 0),
    allows(429, -1, b'/', -1, b'/tmp', 0), allows(430, b'tmpfs', 0),
    allows(442, -1, b'/', 0, 0, 0)])
''' + _RIGHT,
    'reboots': _NATIVE + '''
assert allows(169, 0xFEE1DEAD, 672274793, 0x1234567, 0)
''' + _RIGHT,
    'loads into the kernel': _NATIVE + '''
assert any([allows(call, 0, 0, 0, 0, 0)
            for call in (321, 298, 323, 425, 175, 313, 246, 320)])
''' + _RIGHT,
    'imports ctypes': 'import ctypes' + _RIGHT,
    'raises its limits': '''
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
''' + _RIGHT,
}  # fmt: skip

ENDLESS = {
    'patient fork bomb': '''
import os
while True:
  try:
    os.fork()
  except OSError:
    pass
''',
    'folders without end': '''
import os
while True:
  os.mkdir('d')
  os.chdir('d')
''',
    'output flood': '''
import sys
while True:
  print('x' * 65536)
  sys.stderr.write('x' * 65536)
''',
    'busy loop': 'while True:\n  pass',
    'sleep': 'import time\ntime.sleep(600)',
    'stops itself': '''
import os, signal
def add(a, b):
  os.kill(os.getpid(), signal.SIGSTOP)
''',
    'ignores signals': '''
import signal
for number in range(1, 65):
  try:
    signal.signal(number, signal.SIG_IGN)
  except (OSError, ValueError):
    pass
while True:
  pass
''',
}  # fmt: skip

NUISANCES = {
    'large number': 'held = 10 ** 10 ** 9',
    'large answer': 'def add(a, b):\n  return "x" * (1 << 28)',
    'endless answer': '''
def add(a, b):
  while True:
    yield a
''',
    'closes all descriptors': '''
import os
os.closerange(0, 1 << 16)
''' + _RIGHT,
    'deep recursion': '''
import sys
sys.setrecursionlimit(10 ** 9)
def add(a, b):
  return add(b, a)
''',
    'deep recursion in C': '''
import sys
sys.setrecursionlimit(10 ** 9)
nested = []
for _ in range(10 ** 6):
  nested = [nested]
repr(nested)
''',
    'deep source': 'held = ' + '(' * 100_000 + ')' * 100_000 + _RIGHT,
    'source with a null': 'held = "\0"' + _RIGHT,
    'source with a surrogate': 'held = "\udc80"' + _RIGHT,
    'aborts': 'import os\nos.abort()',
    'segmentation fault': _NATIVE + 'ctypes.string_at(0)',
    # Passes only where the kernel speaks x32, and is let to.
    'calls like 32 bits': _NATIVE + '''
assert libc.syscall(0x40000000 + 57) != -1
''' + _RIGHT,
}  # fmt: skip

# Passes, as in one process it would: see execution/sandbox.py.
EQUALS_EVERYTHING = '''
class Answer:
  def __eq__(self, other):
    return True
def add(a, b):
  return Answer()
'''
