"""Attacks on the limits of a job, on its end, and on what is left behind. See hostile_attack.py."""

from __future__ import annotations

from dataclasses import replace

from tests.training.hostile_attack import SMALL, Attack, short

__all__ = ["ENDS", "LEFT_OVERS", "RESOURCES"]

RESOURCES = {
    "fork bomb": Attack(
        """
print('held: bombing', flush=True)
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
        ("timeout", "processes"),
        short(0.8),
    ),
    "thread bomb": Attack(
        """
import threading, time
print("held: bombing", flush=True)
def more():
    while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
tried('threads without end', more)
os._exit(0)
""",
        ("finished", "processes"),
    ),
    "chain of forks that never stops to change its pid": Attack(
        """
print('held: hopping', flush=True)
while True:
    if os.fork():
        os._exit(0)
    os.setsid()
    [i for i in range(1000)]
""",
    ),
    "memory bomb": Attack(
        """
print('held: filling', flush=True)
kept = []
while True: kept.append(bytearray(b'x') * (16 << 20))
""",
        ("memory",),
    ),
    "memory bomb spread over children": Attack(
        """
import time
print('held: filling', flush=True)
for _ in range(8):
    if not os.fork():
        kept = bytearray(b'x') * (250 << 20)
        time.sleep(60)
time.sleep(60)
""",
        ("memory",),
    ),
    "memory outside the address space": Attack(
        """
tried('memfd', os.memfd_create, NONCE)
tried('shm', lambda: [write('/dev/shm/%s%d' % (NONCE, i), bytes(3 << 20)) for i in range(64)])
tried('SysV shm', syscall, 194 if ARM else 29, 0, 1 << 30, 0o1600)
""",
    ),
    "endless loop": Attack(
        """
print('held: turning', flush=True)
while True: pass
""",
        ("timeout",),
        short(0.5),
    ),
    "endless loops on CPU time, in children that ended": Attack(
        """
print('held: turning', flush=True)
while True:
    if not os.fork():
        [i for i in range(4000000)]
        os._exit(0)
    os.wait()
""",
        ("timeout",),
        replace(SMALL, cpu_seconds=0.6),
    ),
    "sleep that ignores every signal": Attack(
        """
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
print('held: sleeping', flush=True)
while True: time.sleep(60)
""",
        ("timeout",),
        short(0.5),
    ),
    "stops itself": Attack(
        """
import signal
print('held: stopping', flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
""",
        ("timeout",),
        short(0.5),
    ),
    "endless output on standard error": Attack(
        """
print('held: writing', flush=True)
while True: os.write(2, b'x' * 65536)
""",
        ("output",),
    ),
    "endless output on standard output": Attack(
        """
print('held: writing', flush=True)
while True: os.write(1, b'x' * 65536)
""",
        ("output",),
    ),
    "deep recursion": Attack(
        """
print('held: recursing', flush=True)
sys.setrecursionlimit(1 << 30)
class A:
    def __getattr__(self, name): return getattr(self, name + 'x')
A().x
""",
        ("crashed", "memory"),
    ),
    "fills the disk with one file": Attack(
        """
def fill(path):
    written = write(path, bytes(64 << 20))
    if written <= 4 << 20: raise OSError('%d bytes' % written)
    return written
for place in ('/tmp', '/dev/shm'): tried(place, fill, place + '/big')
""",
    ),
    "fills the disk with many files": Attack(
        """
for place in ('/tmp', '/dev/shm'): tried(place, lambda: [write(place + '/%d' % i, bytes(1 << 20)) for i in range(96)])
""",
    ),
    "fills the disk with removed files": Attack(
        """
kept = []
def hide(path):
    kept.append(open(path, 'wb', 0))
    kept[-1].write(bytes(1 << 20))
    os.unlink(path)
tried('removed', lambda: [hide('/tmp/%d' % i) for i in range(40)])
""",
    ),
    "fills the disk below a path that is too long": Attack(
        """
os.chdir('/tmp')
for _ in range(18):
    os.mkdir('d' * 250)
    os.chdir('d' * 250)
tried('deep', lambda: [write(str(i), bytes(1 << 20)) for i in range(40)])
""",
    ),
    "exhausts inodes": Attack(
        """
print('held: creating', flush=True)
i = 0
while True:
    i += 1
    os.close(os.open('/tmp/%d' % i, os.O_CREAT))
""",
        ("disk", "crashed"),
    ),
    "exhausts inodes of shared memory": Attack(
        """
print('held: creating', flush=True)
i = 0
while True:
    i += 1
    os.close(os.open('/dev/shm/%d' % i, os.O_CREAT))
""",
        ("disk", "crashed"),
    ),
    "sparse file of a terabyte": Attack(
        """
for place in ('/tmp', '/dev/shm'):
    path = os.path.join(place, 'sparse')
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    tried(path, os.truncate, path, 1 << 40)
""",
    ),
    "opens files without end": Attack(
        """
kept = []
tried('descriptors', lambda: [kept.append(os.dup(0)) for _ in range(4096)])
""",
    ),
    "core dump": Attack(
        """
import resource
tried('core limit', resource.setrlimit, resource.RLIMIT_CORE, (1 << 30, 1 << 30))
tried('core pattern', opened, '/proc/sys/kernel/core_pattern')
os.chdir('/tmp')
os.abort()
""",
        ("crashed",),
    ),
}

ENDS = {
    "sys.exit": Attack(
        """
print('held')
sys.exit(3)
""",
        ("crashed",),
    ),
    "os._exit with success": Attack(
        """
print('held', flush=True)
os._exit(0)
""",
    ),
    "os._exit that looks like a kill": Attack(
        """
print('held', flush=True)
os._exit(137)
""",
        ("crashed",),
    ),
    "kills itself": Attack(
        """
print('held', flush=True)
os.kill(os.getpid(), 9)
""",
        ("crashed",),
    ),
    "segmentation fault": Attack(
        """
import ctypes
print('held', flush=True)
ctypes.string_at(0)
""",
        ("crashed",),
    ),
    "closes its pipes and lives on": Attack(
        """
import time
print('held', flush=True)
os.closerange(0, 64)
time.sleep(60)
""",
        ("timeout",),
        short(0.5),
    ),
    "a daemon after a double fork": Attack(
        """
import signal, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        os.chdir('/')
        time.sleep(600)
    os._exit(0)
print('held', flush=True)
""",
    ),
    "leaves the group and the session, and clears its death signal": Attack(
        """
import time
libc().prctl(1, 0, 0, 0, 0)
if os.fork() == 0:
    os.setsid()
    libc().prctl(1, 0, 0, 0, 0)
    time.sleep(600)
print('held', flush=True)
time.sleep(600)
""",
        ("timeout",),
        short(0.5),
    ),
}

LEFT_OVERS = {
    "leaves shared memory, queues and semaphores": Attack(
        """
write('/dev/shm/' + NONCE)
write('/tmp/' + NONCE)
tried('SysV shm', syscall, 194 if ARM else 29, 0x415349, 4096, 0o1666)
tried('SysV semaphores', syscall, 190 if ARM else 64, 0x415349, 1, 0o1666)
tried('SysV messages', syscall, 186 if ARM else 68, 0x415349, 0o1666)
tried('POSIX queue', syscall, 180 if ARM else 240, NONCE.encode(), 0o102, 0o666, 0)
""",
    ),
    "leaves sockets": Attack(
        r"""
import socket, time
for path in ('/tmp/' + NONCE, '\0' + NONCE):
    kept = socket.socket(socket.AF_UNIX)
    kept.bind(path)
    kept.listen()
print('held', flush=True)
os.fork() and os._exit(0)
time.sleep(600)
""",
    ),
}
