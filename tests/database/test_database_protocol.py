"""HTTP/1.1 as the database speaks it: bounds of what comes before and beside a body, and answers in one write."""

from __future__ import annotations

import asyncio
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

BODY_SECONDS = 0.6


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the length of the body; /slow once it has worked a while; /stream with a head and, once asked for
    more, nothing; /begun likewise, before it has read the body."""
    length, more = 0, scope["path"] != "/begun"
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * BODY_SECONDS)
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
    start = {"type": "http.response.start", "status": 200}
    if scope["path"] in ("/stream", "/begun"):
        await send({**start, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    body = str(length).encode()
    await send({**start, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], socket.socket]]:
    """Connections to a server whose heads have to come within half a second, and whose bodies may pause a little
    longer."""
    monkeypatch.setattr(protocol, "_HEAD_SECONDS", 0.5)
    monkeypatch.setattr(protocol, "_BODY_SECONDS", BODY_SECONDS)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(_echo, http=EnvelopeProtocol, lifespan="off", log_level="critical", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection(listener.getsockname(), timeout=20))
    # A client that left behind a paused reading is not noticed here: nothing is written to it.
    server.should_exit = server.force_exit = True
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


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("length", [60_000, 66_000, 130_000])
def test_a_whole_head_is_refused_by_its_length(
    connect: Callable[[], socket.socket], length: int, at_once: bool
) -> None:
    connection = connect()
    head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nlong: " + b"x" * length + b"\r\n\r\n"
    if not at_once:
        connection.sendall(head[:40_000])
        time.sleep(0.1)
        head = head[40_000:]
    connection.sendall(head)
    expected = b"HTTP/1.1 200 " if length < protocol._MOST_BESIDE else b"HTTP/1.1 431 "
    assert rest(connection).startswith(expected)


def test_a_long_url_is_refused(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"GET /" + b"x" * 66_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert rest(connection).startswith(b"HTTP/1.1 431 ")


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


def test_long_bodies_and_pauses_between_requests_are_no_heads(
    connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_BODY_SECONDS", 60.0)
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


HALF = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n"
CHUNK = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_body_that_does_not_go_on_ends_the_connection(connect: Callable[[], socket.socket]) -> None:
    halves = {connect(): begun for begun in (HALF % b"/", HALF % b"/" + b"ab", CHUNK + b"2\r\nab\r\n")}
    for connection, begun in halves.items():
        # Not the first of the connection, and not before it has paused for long enough.
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(1 << 16).endswith(b"\r\n\r\n0")
        connection.sendall(begun)
    for _ in range(5):
        time.sleep(0.3 * BODY_SECONDS)
        for connection in halves:
            connection.sendall(b"1\r\nx\r\n")
    started = time.monotonic()
    for connection in halves:
        head, _, body = rest(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ") and json.loads(body)["success"] is False
        assert 0.8 * BODY_SECONDS < time.monotonic() - started < 10


def test_a_body_that_does_not_go_on_gets_no_second_answer(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(HALF % b"/begun")
    answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 200 ") and b"408" not in answer


def test_no_refusal_comes_into_an_answer_that_is_sent(connect: Callable[[], socket.socket]) -> None:
    following = {connect(): b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab", connect(): b"GET / HT"}
    broken = connect()
    for connection, more in {**following, broken: b"\0\1\r\n\r\n"}.items():
        connection.sendall(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(more)
    assert rest(broken) == b"", "neither a 400 nor the rest of the answer"
    for connection in following:
        connection.settimeout(1.5 * BODY_SECONDS)
        with pytest.raises(TimeoutError):
            connection.recv(1 << 16)


def test_a_body_has_time_while_it_is_not_read_or_is_here(connect: Callable[[], socket.socket]) -> None:
    unread, here = connect(), connect()
    unread.sendall(HALF % b"/slow" + b"x" * 200_000)
    here.sendall(HALF % b"/slow" + b"x" * 100)
    time.sleep(0.2)
    here.sendall(b"x" * 299_900)
    time.sleep(3.5 * BODY_SECONDS)
    unread.sendall(b"x" * 100_000)
    for connection in (unread, here):
        assert connection.recv(1 << 16).endswith(b"\r\n\r\n300000")


def test_a_body_has_time_until_it_is_asked_for(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"POST /slow HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(b"ab")
    assert connection.recv(1 << 16).endswith(b"\r\n\r\n2")


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
