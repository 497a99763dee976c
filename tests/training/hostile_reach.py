"""Attacks on what a job must not reach: files, other processes, networks, the kernel. See hostile_attack.py."""

from __future__ import annotations

from tests.training.hostile_attack import Attack, short

__all__ = ["FILES", "KERNEL", "NETWORK", "PROCESSES"]

FILES = {
    "reads secrets of the host": Attack(
        """
for path in ('/etc/shadow', '/etc/passwd', '/etc/hostname', '/root/.ssh/id_rsa', '/root/.bashrc',
             os.path.expanduser('~root/.ssh/authorized_keys'), '/var/log/syslog', '/var/run/docker.sock', VICTIM,
             '/proc/%d/environ' % HOST, '/proc/%d/maps' % HOST, '/proc/kcore',
             '/dev/mem', '/dev/kmsg', '/proc/kmsg', '/dev/sda', '/dev/vda', '/dev/nvme0n1', '/dev/fuse', '/dev/kvm'):
    tried(path, read, path)
ways = set(os.environ['ATTACK_WAYS'].split(':'))  # folders above what is mounted show, and no more
for path in ('/home', '/root', '/var', '/mnt', '/media', '/srv', '/opt', '/etc/ssh', '/tmp', '/var/tmp',
             os.path.dirname(VICTIM), os.environ['ATTACK_OTHER'], '/proc/%d/root/' % HOST):
    try:
        names = set(os.listdir(path))
    except OSError as error:
        print('held', path, error)
    else:
        print('BREACH' if names - ways else 'held', path, names - ways)
root = os.stat('/')
for pid in [name for name in os.listdir('/proc') if name.isdigit()]:
    try:
        other = os.stat('/proc/%s/root/' % pid)
    except OSError:
        continue
    if (root.st_dev, root.st_ino) != (other.st_dev, other.st_ino): print('BREACH', 'another root', pid)
""",
    ),
    "looks for the secrets of the environment": Attack(
        """
import glob
for path in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline'):
    try:
        text = open(path, 'rb').read()
    except OSError:
        continue
    if b'hunt' b'er2' in text: print('BREACH', path)
listed = {'HOME', 'LANG', 'OMP_NUM_THREADS', 'HF_HUB_OFFLINE', 'TORCHDYNAMO_DISABLE', 'CUDA_VISIBLE_DEVICES',
          'PWD', 'LC_CTYPE', 'TMPDIR'}
more = [n for n in os.environ if n not in listed and not n.startswith(('ATTACK_', 'PYTHON', 'ASI_'))]
print('BREACH' if more else 'held', more)
""",
    ),
    "reads the text that is held out, and the scorer": Attack(
        """
for name in os.environ['ATTACK_HELD_OUT'].split(':'):
    tried(name, lambda: next(iter(os.listdir(name))))
""",
    ),
    "writes where nothing may be written": Attack(
        """
import sysconfig
for place in ('/', '/usr', '/usr/bin', '/usr/lib', '/bin', '/lib', '/etc', '/dev', '/proc', '/sys',
              '/root', '/home', '/var/tmp',
              sys.prefix, sys.base_prefix, sysconfig.get_path('stdlib'), sysconfig.get_path('purelib'),
              *os.environ['ATTACK_PLACES'].split(':')):
    tried(place, write, os.path.join(place, NONCE))
tried('victim', write, VICTIM)
tried('interpreter', os.chmod, sys.executable, 0o777)
tried('remove', os.unlink, os.__file__)
tried('rename', os.rename, os.__file__, '/tmp/os.py')
tried('times', os.utime, sys.base_prefix)
""",
    ),
    "goes through links": Attack(
        """
os.symlink(VICTIM, '/tmp/result')
tried('through a link', read, '/tmp/result')
tried('write through a link', write, '/tmp/result')
for path in (VICTIM, os.__file__, '/usr/bin/env'):
    tried('hard link', os.link, path, '/tmp/hard')
tried('root', write, '/x')
for path in ('../' + NONCE, '../../' + NONCE, '../../experiments/1/' + NONCE):
    try:
        write(os.path.join('/tmp', path))
    except OSError:
        pass
""",
    ),
    "makes devices and set-uid files": Attack(
        """
import stat, subprocess
for place in ('/tmp', '/dev/shm'):
    tried('memory device', os.mknod, place + '/mem', 0o666 | stat.S_IFCHR, os.makedev(1, 1))
    tried('disk device', os.mknod, place + '/disk', 0o666 | stat.S_IFBLK, os.makedev(254, 0))
    write(place + '/id', open('/usr/bin/id', 'rb').read())
    os.chmod(place + '/id', 0o6777)
    tried('root by set-uid', lambda: b'uid=0' in subprocess.run([place + '/id'], capture_output=True).stdout or 1 / 0)
""",
    ),
}

PROCESSES = {
    "signals others": Attack(
        """
import signal
for pid in (HOST, os.getpid() + 100000, HOST - 1):
    tried('signal', os.kill, pid, signal.SIGUSR1)
for pid in range(2, 400):
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGUSR1)
            print('BREACH', pid, read('/proc/%d/cmdline' % pid))
        except OSError:
            pass
tried('group', os.killpg, HOST, signal.SIGUSR1)
import time
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
try:
    os.kill(-1, signal.SIGUSR1)
except OSError as error:
    print('held', error)
time.sleep(0.05)
""",
    ),
    "traces and reads other processes": Attack(
        """
import ctypes
for pid in {1, HOST}:
    tried('ptrace attach', syscall, 117 if ARM else 101, 16, pid, 0, 0)
    tried('ptrace seize', syscall, 117 if ARM else 101, 0x4206, pid, 0, 0)
    buffer = ctypes.create_string_buffer(64)
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 64)
    tried('process_vm_readv', syscall, 270 if ARM else 310, pid, ctypes.addressof(vector), 1,
          ctypes.addressof(vector), 1, 0)
    if pid != 1: tried('memory', opened, '/proc/%d/mem' % pid)
    tried('pidfd_getfd', lambda: syscall(438, os.pidfd_open(pid), 0, 0))
""",
    ),
    "raises its rights and limits": Attack(
        r"""
import resource
for name in ('CPU', 'FSIZE', 'NOFILE', 'NPROC', 'CORE'):
    kind = getattr(resource, 'RLIMIT_' + name)
    now = resource.getrlimit(kind)[1]
    tried(name, resource.setrlimit, kind, (now + 1000, now + 1000))
tried('nice', os.nice, -5)
tried('real time', os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(50))
tried('oom score', write, '/proc/self/oom_score_adj', b'-1000')
for call in (os.setuid, os.setgid, os.seteuid): tried(call.__name__, call, 0)
tried('groups', os.setgroups, [0])
status = dict(line.split(':\t') for line in open('/proc/self/status').read().splitlines() if ':\t' in line)
bad = [k for k in ('CapEff', 'CapPrm', 'CapAmb') if int(status[k], 16)]
print('BREACH' if bad or status['NoNewPrivs'] != '1' or os.getuid() == 0 else 'held', bad)
""",
    ),
    "runs set-uid programs, with a library of its choice": Attack(
        """
import glob, subprocess
library = (glob.glob('/usr/lib/*/libm.so.6') + [''])[0]
env = {'LD_PRELOAD': library, 'PATH': '/usr/bin'}
for line in (['su', '-c', 'id'], ['sudo', '-n', 'id'], ['mount', '-t', 'tmpfs', 'x', '/tmp'],
             ['umount', '-l', '/tmp'], ['chsh'], ['newgrp']):
    def run():
        done = subprocess.run(line, env=env, capture_output=True, stdin=subprocess.DEVNULL, timeout=5)
        if b'uid=0' in done.stdout or done.returncode == 0: return done
        raise PermissionError(done.returncode)
    tried(line[0], run)
""",
    ),
    "uses descriptors that are not its own": Attack(
        r"""
held = sorted(int(n) for n in os.listdir('/proc/self/fd'))
print('BREACH' if held[3:] != held[3:4] else 'held', held)
for number in range(3, 64): tried('descriptor', os.write, number, b'garbage')
tried('terminal', write, '/dev/tty')
try:
    os.write(1, b'\xff\xff\xff\xff garbage that is no frame\n')
except OSError:
    pass
""",
    ),
}

NETWORK = {
    "connects to the host": Attack(
        """
import socket
for family, host in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1')):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        def go():
            s = socket.socket(family, kind)
            s.settimeout(1)
            s.connect((host, PORT))
            s.send(b'hello')
            return s.recv(1)
        tried('connect', go)
tried('name', socket.getaddrinfo, 'asi-arch.invalid', 80)
tried('raw', socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)
tried('packets', socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 3)
names = [name for _, name in socket.if_nameindex()]
print('BREACH' if [n for n in names if n not in ('lo', 'sit0', 'tunl0', 'ip6tnl0')] else 'held', names)
""",
        limits=short(15),
    ),
    "connects to sockets of the file system and abstract ones": Attack(
        r"""
import socket
for path in (os.environ['ATTACK_SOCKET'], '\0' + os.environ['ATTACK_ABSTRACT'], '/run/docker.sock',
             '/var/run/docker.sock',
             '/run/dbus/system_bus_socket', '/dev/log', '/tmp/.X11-unix/X0'):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(1)
    tried(repr(path), s.connect, path)
""",
        limits=short(15),
    ),
}

KERNEL = {
    "mounts, changes its root, makes namespaces": Attack(
        """
x86, arm = (165, 166, 155, 272, 308, 56), (40, 39, 41, 97, 268, 220)
mount, umount, pivot, unshare, setns, clone = arm if ARM else x86
tried('tmpfs', syscall, mount, b'x', b'/tmp', b'tmpfs', 0, 0)
tried('remount', syscall, mount, b'x', b'/', b'', 0x20 | 0x1000, 0)
tried('proc', syscall, mount, b'x', b'/tmp', b'proc', 0, 0)
tried('umount', syscall, umount, b'/proc', 2)
tried('pivot_root', syscall, pivot, b'/tmp', b'/tmp')
tried('chroot', os.chroot, '/tmp')
tried('setns', lambda: syscall(setns, os.open('/proc/1/ns/mnt', 0), 0))
flags = {'user': 0x10000000, 'mount': 0x20000, 'pid': 0x20000000, 'net': 0x40000000, 'uts': 0x4000000}
for name, flag in flags.items():
    tried('unshare ' + name, syscall, unshare, flag)
    def made():
        if syscall(clone, flag | 17, 0, 0, 0, 0) == 0: os._exit(0)
        return 'a namespace'
    tried('clone ' + name, made)
tried('clone3', syscall, 435, 0, 0)
tried('fsopen', syscall, 430, b'tmpfs', 0)
tried('open_tree', syscall, 428, -100, b'/', 1)
""",
    ),
    "calls what was a hole before": Attack(
        """
import ctypes
buffer = ctypes.create_string_buffer(256)
at = ctypes.addressof(buffer)
calls = {
    'io_uring_setup': (425, 425), 'userfaultfd': (323, 282), 'bpf': (321, 280), 'keyctl': (250, 219),
    'add_key': (248, 217), 'perf_event_open': (298, 241), 'fanotify_init': (300, 262), 'open_by_handle_at': (304, 265),
    'name_to_handle_at': (303, 264), 'kexec_load': (246, 104), 'finit_module': (313, 273), 'kcmp': (312, 272),
    'acct': (163, 89), 'swapon': (167, 224), 'reboot': (169, 142), 'quotactl': (179, 60),
    'syslog': (103, 116), 'vmsplice': (278, 75), 'memfd_secret': (447, 447), 'move_pages': (279, 239),
}
for name, numbers in calls.items():
    try:
        print('BREACH', name, syscall(numbers[ARM], 2, at, 64, 0, 0))
    except OSError as error:
        print('held' if error.errno in (1, 38) else 'BREACH', name, error)
""",
    ),
    "changes the clock, the names and the settings of the machine": Attack(
        """
import time
tried('clock_settime', lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()))
tried('settimeofday', syscall, 170 if ARM else 164, 0, 0)
tried('adjtimex', lambda: syscall(171 if ARM else 159, 0))
import socket
tried('sethostname', socket.sethostname, NONCE)
for path in ('/proc/sysrq-trigger', '/proc/sys/kernel/hostname', '/proc/sys/kernel/panic', '/proc/sys/vm/drop_caches',
             '/sys/kernel/uevent_helper', '/sys/fs/cgroup/cgroup.procs', '/sys/power/state', '/dev/rtc0'):
    tried(path, opened, path)
""",
    ),
    "runs machine code of its own": Attack(
        """
import ctypes, mmap
if ARM:
    print('held: no code for this machine')
    sys.exit()
def run(code):
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(bytes.fromhex(code))
    result = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    if result < 0: raise OSError(-result, os.strerror(-result))
    return result
tried('ptrace(TRACEME) by hand', run, 'b86500000031ff0f05c3')
tried('unshare(CLONE_NEWUSER) by hand', run, 'b810010000bf000000100f05c3')
tried('the x32 numbers', run, 'b810010040bf000000100f05c3')
os.fork() or run('b814000000cd80c3')
os._exit(0 if os.waitstatus_to_exitcode(os.wait()[1]) in (-31, -11) else print('BREACH int 0x80', flush=True) or 0)
""",
    ),
}
