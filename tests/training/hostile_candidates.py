"""Hostile candidates for training/check.py: honest programs with one hostile line where it runs.

They come through the static check, whose list of imports is a lint: what they need they find inside torch. So each
reaches the sandboxed worker and attacks from there.
"""

from __future__ import annotations

from tests.training.verifier_assets import BASE, CONSTRUCTED

__all__ = ["CANDIDATES", "FAST_CANDIDATES", "NEEDLES"]

_HEAD = "import torch\n"
_TOOLS = (
    "import torch\nos = torch.serialization.os\nsys = torch.serialization.sys\nctypes = torch.ctypes\n"
    "import typing\nbuiltin = typing.sys.modules\n"
)
_FORWARD = "        x = self.conv("


def _in_forward(line: str) -> str:
    return BASE.replace(_HEAD, _TOOLS, 1).replace(_FORWARD, f"        {line}\n{_FORWARD}", 1)


def _in_init(line: str) -> str:
    return BASE.replace(_HEAD, _TOOLS, 1).replace(CONSTRUCTED, f"{CONSTRUCTED}        {line}\n", 1)


def _at_import(line: str) -> str:
    return BASE.replace(_HEAD, f"{_TOOLS}{line}\n", 1)


NEEDLES = {
    "endless loop at import": "timeout",
    "memory bomb in forward": "memory",
    "endless output": "output",
    "exit in forward": "crashed",
    "segmentation fault": "crashed",
    "abort": "crashed",
    "garbage on every descriptor": "crashed",
    "closes every descriptor": "crashed",
}
"""Those that end the worker: how its job ends."""

CANDIDATES = {
    "endless loop at import": _at_import("while True: pass"),
    "memory bomb in forward": _in_forward("self.kept = [torch.ones(1 << 26) for _ in range(64)]"),
    "endless output": _in_forward("while True: sys.stderr.write('x' * 65536)"),
    "exit in forward": _in_forward("os._exit(0)"),
    "exit at import": _at_import("os._exit(0)"),
    "segmentation fault": _in_init("ctypes.string_at(0)"),
    "abort": _in_init("os.abort()"),
    "SystemExit in forward": _in_forward("raise SystemExit(0)"),
    "KeyboardInterrupt in init": _in_init("raise KeyboardInterrupt"),
    "deep recursion": _in_forward("f = lambda f: f(f) + 1; f(f)"),
    "fork bomb in init": _in_init("[os.fork() for _ in range(100)]"),
    "another program": _in_init("os.system('id > /tmp/x') and 1 / 0; os.execv('/bin/sh', ['sh', '-c', 'sleep 600'])"),
    "threads without end": _in_init(
        "t = builtin['threading']; [t.Thread(target=t.Event().wait).start() for _ in range(9999)]"
    ),
    "garbage on every descriptor": _in_forward("_write_all(b'garbage ' * 9)").replace(
        "\n\nclass DeltaNet",
        "\n\ndef _write_all(words):\n    for number in (1, *range(3, 64)):\n        try:\n"
        "            os.fstat(number).st_mode & 0o010000 and os.write(number, words)\n        except OSError:\n"
        "            pass\n\n\nclass DeltaNet",
        1,
    ),
    "closes every descriptor": _in_forward("os.closerange(0, 256)"),
    "connects to the host": _in_forward(
        "torch.distributed.TCPStore('127.0.0.1', PORT, 2, False, builtin['datetime'].timedelta(seconds=1))"
    ),
    "writes into the worker": _at_import("open(builtin['training.worker.program'].__file__, 'a').write('x')"),
    "reads the scorer": _at_import("open(builtin['training.worker'].__path__[0] + '/../scorer/heldout.py').read()"),
}
FAST_CANDIDATES = ("garbage on every descriptor",)
