"""Frames between the trusted side and the sandboxed worker: a JSON header and raw arrays, over two pipes.

A frame is a 4-byte big-endian length, that many bytes of JSON `{kind, id, op, meta, arrays: [{dtype, shape}]}`, and
then the little-endian bytes of each array in order. Nothing is unpickled, so the worst that a hostile worker can send
is a wrong number or a malformed frame, and the second is a `ProtocolError`.

Guards: five dtypes only, at most 4096 arrays of at most 8 dimensions, header and payload bounded before anything is
allocated. Not covered: the meaning of what arrives. Whoever reads a frame checks shapes and finiteness itself.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from common.errors import AsiError

__all__ = ["DTYPES", "Channel", "Frame", "Kind", "ProtocolError", "decode_header", "encode"]

Kind = Literal["call", "reply", "error", "event"]
DTYPES = ("int32", "int64", "float32", "float64", "bool")
MAX_HEADER = 8 << 20
MAX_PAYLOAD = 2 << 30
MAX_ARRAYS = 4096
MAX_DIMENSIONS = 8
_LENGTH = struct.Struct(">I")


class ProtocolError(AsiError):
    """What came over the pipe is no frame."""


@dataclass(frozen=True)
class Frame:
    """One message. `id` pairs a reply with its call; `op` names the operation of a call."""

    kind: Kind
    id: int
    op: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    arrays: list[np.ndarray] = field(default_factory=list)


def encode(frame: Frame) -> list[memoryview]:
    """The bytes of one frame, in parts: large arrays are not copied.

    Raises:
        ProtocolError: an array has another dtype than `DTYPES`, or the frame is over its bounds.
    """
    shapes, blocks = [], []
    for array in frame.arrays:
        name = array.dtype.name
        if name not in DTYPES:
            raise ProtocolError(f"expected an array of {', '.join(DTYPES)}, got {name}", "convert it before sending")
        shapes.append({"dtype": name, "shape": list(array.shape)})
        flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1)
        blocks.append(flat.view(np.uint8).data)
    header = json.dumps(
        {"kind": frame.kind, "id": frame.id, "op": frame.op, "meta": frame.meta, "arrays": shapes},
        separators=(",", ":"),
    ).encode("utf-8", "backslashreplace")
    if len(header) > MAX_HEADER or len(blocks) > MAX_ARRAYS or sum(map(len, blocks)) > MAX_PAYLOAD:
        raise ProtocolError(
            f"a frame of {len(blocks)} arrays and {len(header)} header bytes is too large", "send it in parts"
        )
    return [memoryview(_LENGTH.pack(len(header)) + header), *blocks]


def decode_header(
    raw: bytes, max_payload: int = MAX_PAYLOAD
) -> tuple[Frame, list[tuple[np.dtype[Any], tuple[int, ...]]]]:
    """The frame without its arrays, and the (dtype, shape) of each array that follows.

    Raises:
        ProtocolError: not JSON, a field is missing or of the wrong type, or the arrays are over their bounds.
    """
    try:
        header = json.loads(raw)
        kind, number, op, meta, arrays = (header[key] for key in ("kind", "id", "op", "meta", "arrays"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError(f"expected a JSON header with kind, id, op, meta and arrays, got {raw[:80]!r}") from error
    if (
        kind not in ("call", "reply", "error", "event")
        or type(number) is not int
        or not isinstance(op, str)
        or not isinstance(meta, dict)
        or not isinstance(arrays, list)
        or len(arrays) > MAX_ARRAYS
    ):
        raise ProtocolError(f"expected a frame header, got one with fields of the wrong type: {raw[:80]!r}")
    specs, total = [], 0
    for item in arrays:
        spec = _spec(item)
        size = spec[0].itemsize
        for length in spec[1]:
            size *= length
        total += size
        if total > max_payload:
            raise ProtocolError(f"expected at most {max_payload} bytes of arrays, got a header that announces {total}")
        specs.append(spec)
    return Frame(kind, number, op, meta), specs


def _spec(item: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    if not isinstance(item, dict) or item.get("dtype") not in DTYPES or not isinstance(item.get("shape"), list):
        raise ProtocolError(f"expected {{dtype, shape}} with a dtype of {', '.join(DTYPES)}, got {str(item)[:80]}")
    shape = item["shape"]
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 or n > MAX_PAYLOAD for n in shape):
        raise ProtocolError(f"expected a shape of at most {MAX_DIMENSIONS} lengths, got {str(shape)[:80]}")
    return np.dtype(item["dtype"]).newbyteorder("<"), tuple(shape)


class Channel:
    """Frames over a pair of file descriptors, with deadlines on both directions.

    Args:
        read_fd, write_fd: pipe ends; owned by the caller. They are made non-blocking where `timeouts` is set.
        max_payload: bytes of arrays accepted in one frame.
    """

    def __init__(self, read_fd: int, write_fd: int, *, timeouts: bool = False, max_payload: int = MAX_PAYLOAD) -> None:
        self.read_fd, self.write_fd, self.max_payload = read_fd, write_fd, max_payload
        if timeouts:
            os.set_blocking(read_fd, False)
            os.set_blocking(write_fd, False)

    def send(self, frame: Frame, deadline: float | None = None) -> None:
        """Writes one frame. `deadline` is a time.monotonic() value.

        Raises:
            ProtocolError: the frame is over its bounds. TimeoutError: the other side does not read. OSError: it is
                gone.
        """
        for view in encode(frame):
            while view:
                self._wait(self.write_fd, deadline, write=True)
                try:
                    view = view[os.write(self.write_fd, view[: 1 << 20]) :]
                except BlockingIOError:
                    continue

    def receive(self, deadline: float | None = None) -> Frame:
        """Reads one frame.

        Raises:
            EOFError: the other side closed the pipe. ProtocolError: malformed. TimeoutError: nothing came in time.
        """
        (length,) = _LENGTH.unpack(self._read(4, deadline))
        if length > MAX_HEADER:
            raise ProtocolError(f"expected a header of at most {MAX_HEADER} bytes, got an announcement of {length}")
        frame, specs = decode_header(bytes(self._read(length, deadline)), self.max_payload)
        for dtype, shape in specs:
            count = int(np.prod(shape, dtype=np.int64)) if shape else 1
            raw = self._read(count * dtype.itemsize, deadline)
            frame.arrays.append(np.frombuffer(raw, dtype=dtype).reshape(shape))
        return frame

    def _read(self, size: int, deadline: float | None) -> bytearray:
        """`size` bytes; the buffer grows with what really arrives, so an announcement alone allocates nothing."""
        data = bytearray()
        while len(data) < size:
            self._wait(self.read_fd, deadline, write=False)
            try:
                part = os.read(self.read_fd, min(size - len(data), 1 << 20))
            except BlockingIOError:
                continue
            if not part:
                raise EOFError("the other side closed the pipe")
            data += part
        return data

    @staticmethod
    def _wait(descriptor: int, deadline: float | None, *, write: bool) -> None:
        if deadline is None and os.get_blocking(descriptor):
            return
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        poller = select.poll()
        poller.register(descriptor, select.POLLOUT if write else select.POLLIN)
        if not poller.poll(None if left is None else max(1, int(left * 1000))):
            raise TimeoutError
