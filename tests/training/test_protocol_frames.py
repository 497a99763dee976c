"""Frames: what is sent arrives, and whatever else arrives is a ProtocolError, never a crash or an allocation."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from training.protocol import DTYPES, Channel, Frame, ProtocolError, decode_header, encode

arrays = st.sampled_from(DTYPES).flatmap(
    lambda name: hnp.arrays(np.dtype(name), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
metas = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=20), max_size=4
)


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel, list[int]]]:
    there, back = os.pipe(), os.pipe()
    ends = [*there, *back]
    yield Channel(there[0], back[1], timeouts=True), Channel(back[0], there[1], timeouts=True), ends
    for descriptor in ends:  # some tests closed one already
        with contextlib.suppress(OSError):
            os.close(descriptor)


def carry(raw: bytes) -> Frame:
    """Reads one frame from a pipe that holds exactly `raw`."""
    read, write = os.pipe()
    try:
        writer = threading.Thread(target=lambda: (os.write(write, raw), os.close(write)))
        writer.start()
        return Channel(read, read, timeouts=True).receive(time.monotonic() + 5)
    finally:
        writer.join()
        os.close(read)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["call", "reply", "error", "event"]),
    st.integers(0, 1 << 40),
    st.text(max_size=20),
    metas,
    st.lists(arrays, max_size=3),
)
def test_a_frame_arrives_as_it_was_sent(kind: str, number: int, op: str, meta: dict, values: list[np.ndarray]) -> None:
    found = carry(b"".join(encode(Frame(kind, number, op, meta, values))))  # type: ignore[arg-type]
    assert (found.kind, found.id, found.op, found.meta) == (kind, number, op, meta)
    for sent, came in zip(values, found.arrays, strict=True):
        assert came.dtype == sent.dtype and came.shape == sent.shape
        assert came.tobytes() == sent.tobytes()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises((ProtocolError, EOFError)):
        carry(struct.pack(">I", len(raw)) + raw)
    with pytest.raises((ProtocolError, EOFError, TimeoutError)):
        carry(raw)


GOOD = {"kind": "reply", "id": 1, "op": "x", "meta": {}, "arrays": []}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "shout"},
        {"kind": ["reply"]},
        {"id": "1"},
        {"id": True},
        {"meta": []},
        {"arrays": {}},
        {"arrays": [{"dtype": "object", "shape": [1]}]},
        {"arrays": [{"dtype": ["float32"], "shape": [1]}]},
        {"arrays": [{"dtype": "float32", "shape": [-1]}]},
        {"arrays": [{"dtype": "float32", "shape": [1.5]}]},
        {"arrays": [{"dtype": "float32", "shape": [1] * 9}]},
        {"arrays": [{"dtype": "float32", "shape": [1 << 30, 1 << 30, 0]}]},
        {"arrays": [{"dtype": "float64", "shape": [1 << 29]}]},
        {"arrays": [{"dtype": "bool", "shape": [1]}] * 5000},
    ],
    ids=str,
)
def test_malformed_headers_are_refused(change: dict) -> None:
    header = {**GOOD, **change}
    if change.get("arrays") == [{"dtype": "float32", "shape": [1 << 30, 1 << 30, 0]}]:
        assert decode_header(json.dumps(header).encode())[1][0][1][-1] == 0  # it holds nothing, and so is harmless
        return
    with pytest.raises(ProtocolError):
        decode_header(json.dumps(header).encode())


def test_an_announcement_alone_allocates_nothing() -> None:
    header = {**GOOD, "arrays": [{"dtype": "float32", "shape": [1 << 28]}]}
    raw = json.dumps(header).encode()
    with pytest.raises(EOFError):
        carry(struct.pack(">I", len(raw)) + raw + b"1234")


def test_only_plain_dtypes_are_sent() -> None:
    for dtype in (np.complex64, np.float16, object):
        with pytest.raises(ProtocolError):
            encode(Frame("call", 1, "x", {}, [np.zeros(2, dtype)]))


def test_silence_and_a_full_pipe_end_at_the_deadline(pair: tuple[Channel, Channel, list[int]]) -> None:
    one, other, _ = pair
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        one.receive(started + 0.1)
    with pytest.raises(TimeoutError):  # nobody reads, so the pipe fills
        other.send(Frame("call", 1, "x", {}, [np.zeros(1 << 20)]), time.monotonic() + 0.1)
    assert 0.19 <= time.monotonic() - started < 20  # a wait is in whole milliseconds


def test_a_closed_pipe_is_the_end(pair: tuple[Channel, Channel, list[int]]) -> None:
    one, _, ends = pair
    os.close(ends[1])
    with pytest.raises(EOFError):
        one.receive(time.monotonic() + 1)
