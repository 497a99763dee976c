"""HTTP/1.1 as the database speaks it: bounds of what comes before and beside a body, and answers in one write."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from database import protocol
from database.protocol import EnvelopeProtocol


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the length of the body; /stream with a head and, once asked for more, nothing."""
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
    start = {"type": "http.response.start", "status": 200}
    if scope["path"] == "/stream":
        await send({**start, "headers": []})
        await receive()
        return
    body = str(length).encode()
    await send({**start, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], socket.socket]]:
    """Connections to a server whose heads have to come within half a second."""
    monkeypatch.setattr(protocol, "_HEAD_SECONDS", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(_echo, http=EnvelopeProtocol, lifespan="off", log_level="critical", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection(listener.getsockname(), timeout=20))
    server.should_exit = True
    thread.join()
    listener.close()


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side ends the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            data += chunk
    return data


def sent_until_refused(connection: socket.socket, piece: bytes, most: int) -> int:
    """Bytes of `piece`, again and again, that were taken before the connection ended."""
    taken = 0
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while taken < most:
            connection.sendall(piece)
            taken += len(piece)
            time.sleep(0.001)
    return taken


@pytest.mark.parametrize("piece", [b"x" * 4096, b"a: b\r\n" * 600, b"\r\n" * 2000], ids=["one", "many", "lines"])
def test_a_head_without_end_is_refused(connect: Callable[[], socket.socket], piece: bytes) -> None:
    connection = connect()
    if piece[0] != 13:
        connection.sendall(b"GET / HTTP/1.1\r\nlong: ")
    assert sent_until_refused(connection, piece, 8 << 20) < 8 << 20


def test_a_long_head_is_refused_in_the_envelope(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"GET / HTTP/1.1\r\n")
    time.sleep(0.1)
    connection.sendall(b"long: " + b"x" * (protocol._MOST_BESIDE))
    answer = rest(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ") and json.loads(body)["success"] is False


def test_trailers_without_end_are_refused(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n")
    assert sent_until_refused(connection, b"a: b\r\n" * 600, 8 << 20) < 8 << 20


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost:"])
def test_a_head_that_does_not_come_ends_the_connection(connect: Callable[[], socket.socket], begun: bytes) -> None:
    connection = connect()
    connection.sendall(begun)
    started = time.monotonic()
    assert rest(connection).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - started < 10


def test_long_bodies_and_pauses_between_requests_are_no_heads(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 600000\r\n\r\n" + b"x" * 600_000
    for _ in range(2):
        # What follows a long body in one piece begins the next request.
        connection.sendall(post + b"GET / HTTP/1.1\r\n")
        assert connection.recv(1 << 16).endswith(b"\r\n\r\n600000")
        connection.sendall(b"Host: a\r\n\r\n")
        assert connection.recv(1 << 16).endswith(b"\r\n\r\n0")
        time.sleep(0.8)
    # A body may take its time.
    connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab")
    time.sleep(0.8)
    connection.sendall(b"cd")
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_head_alone_does_not_wait_for_a_body(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_turn(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    lengths = [1, 70_000, 3, 0, 20_000]
    requests = [
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (length, b"x" * length) for length in lengths
    ]
    last = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    connection.sendall(b"".join(requests) + last)
    answers = rest(connection).split(b"HTTP/1.1 200 OK")[1:]
    bodies = [answer.partition(b"\r\n\r\n")[2] for answer in answers]
    assert bodies == [str(length).encode() for length in [*lengths, 0]]
