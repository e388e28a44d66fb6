"""A WSGI application behind one connection: HTTP/1.1, and what PEP 3333 asks of a server."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import logging
import select
import shutil
import socket
import subprocess
import sys
import threading
import wsgiref.validate
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snitun_sync.client import wsgi
from snitun_sync.client.wsgi import DRAIN_BYTES, FIELDS, HEAD_BYTES, LINE_BYTES, WsgiConversation
from snitun_sync.errors import EndpointError
from tests.support import MIB, PROJECT, WAIT_S, pattern, pattern_sha256, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Callable

    from _typeshed.wsgi import StartResponse, WSGIApplication

DEVICE = "192.0.2.7"
HOST = b"Host: a.example\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
LAST = b"GET /last HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"


class Served:
    """An application for connections, each on a thread of its own; at the end none is left."""

    def __init__(self, app: WSGIApplication, **options: Any) -> None:
        self.app, self.options = app, options
        self.parked = 0
        """How many times a connection was parked."""
        self.cut: list[str] = []
        """Why connections were cut."""
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stack.close()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert kind or not thread.is_alive(), "a connection isn't over"
        assert kind or not self._failures, "run() has raised"

    def serve(self, connection: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            conversation = WsgiConversation(self.app, connection, DEVICE, **self.options)
            try:
                select.select([connection], [], [])
                while conversation.run():
                    self.parked += 1
                    select.select([connection], [], [])
            except EndpointError as error:
                self.cut.append(str(error))
            except BaseException as failure:
                self._failures.append(failure)

    def connect(self) -> socket.socket:
        """Return a device's connection."""
        device, connection = socket.socketpair()
        device.settimeout(WAIT_S)
        self._stack.callback(device.close)
        self.serve(connection)
        return device

    def wait_until_parked(self, count: int) -> None:
        """Wait until connections were parked that many times."""
        wait_until(lambda: self.parked >= count)

    def http(self) -> http.client.HTTPConnection:
        """Return a device that speaks HTTP, on one connection."""
        device = http.client.HTTPConnection("a.example", timeout=WAIT_S)
        device.sock = self.connect()
        device.auto_open = False
        return device

    def listen(self) -> str:
        """Serve a port as well; return its URL."""
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        self._threads.append(thread)
        self._stack.callback(listener.close)
        self._stack.callback(listener.shutdown, socket.SHUT_RDWR)
        thread.start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.serve(listener.accept()[0])


def answers_to(
    app: WSGIApplication, data: bytes, *, is_by_byte: bool = False, **options: Any
) -> bytes:
    """Return all that is answered to a device that sends `data`, and ends."""
    device, connection = socket.socketpair()
    with device, connection:
        device.settimeout(WAIT_S)
        conversation = WsgiConversation(app, connection, DEVICE, **options)
        feeder = threading.Thread(target=send_by_byte, args=(device, data), daemon=True)
        if is_by_byte:
            feeder.start()
        else:
            device.sendall(data)
            device.shutdown(socket.SHUT_WR)
        with contextlib.suppress(EndpointError):  # cut
            while conversation.run():
                select.select([connection], [], [])
        connection.shutdown(socket.SHUT_RDWR)
        if is_by_byte:
            feeder.join(WAIT_S)
        return b"".join(iter(lambda: device.recv(65536), b""))


def send_by_byte(device: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it may be refused before its end
        for at in range(len(data)):
            device.sendall(data[at : at + 1])
        device.shutdown(socket.SHUT_WR)


class Answer(io.BytesIO):
    """An answer for http.client, which closes what it reads from too early for us."""

    def makefile(self, mode: str) -> Answer:
        return self

    def close(self) -> None:
        """Stay open."""


def parsed(data: bytes, method: str = "GET") -> tuple[int, dict[str, str], bytes, bytes]:
    """Return status, headers, body of the first answer, and what follows it."""
    answer = Answer(data)
    response = http.client.HTTPResponse(answer, method=method)  # type: ignore[arg-type]
    response.begin()
    body = response.read()
    fields = {name.lower(): value for name, value in response.getheaders()}
    return response.status, fields, body, answer.read()


class Recorder:
    """An application that answers with "ok", and keeps how it was called."""

    def __init__(self) -> None:
        self.environs: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        self.environs.append(environ)
        self.bodies.append(environ["wsgi.input"].read())
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"ok"]


def echo(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["wsgi.input"].read()]


def fixed(*data: bytes, status: str = "200 OK", headers: Any = ()) -> WSGIApplication:
    """Return an application that answers with these pieces."""

    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterator[bytes]:
        start_response(status, list(headers))
        return iter(data)

    return app


# --- requests ---------------------------------------------------------------------------


def environ_of(request: bytes, **options: Any) -> dict[str, Any]:
    recorder = Recorder()
    for is_by_byte in (False, True):
        status, _, body, rest = parsed(
            answers_to(recorder, request, is_by_byte=is_by_byte, **options)
        )
        assert (status, body, rest) == (200, b"ok", b"")
    whole, by_byte = recorder.environs
    for name in ("wsgi.input", "wsgi.errors"):
        del whole[name], by_byte[name]
    assert whole == by_byte
    return whole


def test_what_the_application_is_told() -> None:
    environ = environ_of(
        b"\r\nPOST /a%20b/%C3%bc%zz%2f\xe4?c=%20d?e HTTP/1.1\r\nhOST:\ta.example:8443 \r\n"
        b"Content-Type: text/x\r\nContent-Length: 3\r\nX-A: 1\r\nx-a:\xe42\r\nX-B:\r\n"
        b"X_A: smuggled\r\nContent_Length: 7\r\n\r\nabc"
    )
    assert environ["wsgi.file_wrapper"]
    del environ["wsgi.file_wrapper"]
    assert environ == {
        "REQUEST_METHOD": "POST",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/a b/Ã¼%zz/ä",
        "QUERY_STRING": "c=%20d?e",
        "REQUEST_URI": "/a%20b/%C3%bc%zz%2fä?c=%20d?e",
        "SERVER_NAME": "a.example",
        "SERVER_PORT": "8443",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": DEVICE,
        "CONTENT_TYPE": "text/x",
        "CONTENT_LENGTH": "3",
        "HTTP_HOST": "a.example:8443",
        "HTTP_X_A": "1, ä2",
        "HTTP_X_B": "",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
    }
    assert environ_of(GET)["SERVER_PORT"] == "80"


@pytest.mark.parametrize(
    ("first", "fields", "server", "path"),
    [
        (b"GET / HTTP/1.1", b"Host: a.example", ("a.example", "443"), "/"),
        (b"GET / HTTP/1.1", b"Host: a.example:", ("a.example", "443"), "/"),
        (b"GET / HTTP/1.1", b"Host: [2001:db8::1]:99", ("[2001:db8::1]", "99"), "/"),
        (b"GET / HTTP/1.0", b"Host: a.example", ("a.example", "443"), "/"),
        (b"GET http://b.example:80/p?q HTTP/1.1", b"Host: a", ("b.example", "80"), "/p"),
        (b"GET HTTPS://b.example?q HTTP/1.1", b"Host: a", ("b.example", "443"), "/"),
        (b"GET http://b.example/p HTTP/1.0", b"Host: a", ("b.example", "443"), "/p"),
        (b"GET //x/../y HTTP/1.1", b"Host: a", ("a", "443"), "//x/../y"),
        (b"OPTIONS http://b.example HTTP/1.1", b"Host: a", ("b.example", "443"), "/"),
        (b"OPTIONS /p HTTP/1.1", b"Host: a", ("a", "443"), "/p"),
    ],
)
def test_whom_the_request_is_for(
    first: bytes, fields: bytes, server: tuple[str, str], path: str
) -> None:
    request = first + b"\r\n" + fields + b"\r\n\r\n"
    environ = environ_of(request, scheme="https")
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == server
    assert environ["PATH_INFO"] == path
    assert environ["wsgi.url_scheme"] == "https"
    if b"://" in first:
        assert environ["HTTP_HOST"].startswith("b.example")


def post(fields: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    return b"POST / HTTP/" + version + b"\r\n" + HOST + fields + b"\r\n" + body


LENGTH_3 = b"Content-Length: 3\r\n"
CODING = b"Transfer-Encoding: chunked\r\n"
REFUSED = [
    (b"GET /\r\n\r\n", 400),
    (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n", 400),
    (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"G(T / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET a HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET / HTTP/1.0\r\n\r\n", 400),
    (b"GET /#a HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET /\x7f HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET ftp://a/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET http://u@a/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET http:///a HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"CONNECT a.example:443 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    (b"GET http://a/ HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    (post(b" folded\r\n"), 400),
    (post(b"X: a\r\n\tfolded\r\n"), 400),
    (post(b"Content-Length : 3\r\n", b"abc"), 400),
    (post(b"no colon\r\n"), 400),
    (post(b": no name\r\n"), 400),
    (post(b"X: a\rb\r\n"), 400),
    (post(b"X: a\nContent-Length: 3\r\n", b"abc"), 400),
    (post(b"X: a\0b\r\n"), 400),
    (post(LENGTH_3 + LENGTH_3, b"abc"), 400),
    (post(LENGTH_3 + b"content-length: 4\r\n", b"abc"), 400),
    (post(b"Content-Length: 3, 3\r\n", b"abc"), 400),
    (post(b"Content-Length: +3\r\n", b"abc"), 400),
    (post(b"Content-Length: 0x3\r\n", b"abc"), 400),
    (post(b"Content-Length: -1\r\n"), 400),
    (post(b"Content-Length:\r\n"), 400),
    (post(b"Content-Length: \xb2\r\n"), 400),
    (post(b"Content-Length: " + b"1" * 5000 + b"\r\n"), 400),
    (post(LENGTH_3 + CODING, b"0\r\n\r\n"), 400),
    (post(CODING, b"0\r\n\r\n", b"1.0"), 400),
    (post(CODING + CODING, b"0\r\n\r\n"), 501),
    (post(b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"), 501),
    (post(b"Transfer-Encoding: identity\r\n"), 501),
    (post(b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n"), 400),
    (post(b"X: y\r\n" * FIELDS), 431),
    (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
]


@pytest.mark.parametrize(("request_bytes", "status"), REFUSED, ids=range(len(REFUSED)))
def test_what_no_application_sees(request_bytes: bytes, status: int) -> None:
    recorder = Recorder()
    for is_by_byte in (False, True):
        answer = parsed(answers_to(recorder, request_bytes + GET, is_by_byte=is_by_byte))
        assert answer[0] == status
        assert answer[1]["connection"] == "close"
        assert answer[1]["content-type"] == "text/plain; charset=utf-8"
        assert answer[2].startswith(b"%d " % status)
        assert answer[3] == b""  # nothing behind it is served
    assert not recorder.environs
    head_only = parsed(answers_to(recorder, b"HEAD / HTTP/1.1\r\nbad\r\n\r\n"), "HEAD")
    assert (head_only[0], head_only[3]) == (400, b"")


def test_the_size_of_heads_and_lines_is_bounded() -> None:
    recorder = Recorder()
    room = HEAD_BYTES - len(b"GET / HTTP/1.1\r\n" + HOST + b"X: ")
    for size, status in ((room, 200), (room + 1, 431), (3 * HEAD_BYTES, 431)):
        with Served(recorder) as served:
            device = served.connect()
            device.sendall(b"GET / HTTP/1.1\r\n" + HOST + b"X: ")
            with contextlib.suppress(OSError):
                device.sendall(b"x" * size)
                if size <= room + 1:
                    device.sendall(b"\r\n\r\n")
                device.shutdown(socket.SHUT_WR)
            data = b""
            with contextlib.suppress(ConnectionError):  # it has left something unread
                while piece := device.recv(65536):
                    data += piece
            assert parsed(data)[0] == status
    assert len(recorder.bodies) == 1
    with Served(recorder) as served:
        device = served.connect()
        device.sendall(CHUNKED + b"1" * (LINE_BYTES + 1))  # and no end of the line
        assert read_answer(device)[0] == 400
    fields = b"X: y\r\n" * (FIELDS - 1)
    assert parsed(answers_to(recorder, b"GET / HTTP/1.1\r\n" + HOST + fields + b"\r\n"))[0] == 200


def test_a_head_must_be_whole_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread waits for it; what comes when the time is over is refused."""
    monkeypatch.setattr(wsgi, "HEAD_S", 0.0)
    recorder = Recorder()
    with Served(recorder) as served:
        device = served.connect()
        device.sendall(b"\r\n")
        served.wait_until_parked(1)
        device.sendall(GET)  # the time begins here, so that one that is whole is served
        read_answer(device)
        served.wait_until_parked(2)
        device.sendall(GET[:20])
        served.wait_until_parked(3)
        device.sendall(GET[20:])
        assert read_answer(device)[0] == 408
        assert device.recv(1) == b""
    assert len(recorder.environs) == 1


BODIES = [
    (post(LENGTH_3, b"abc"), b"abc"),
    (post(LENGTH_3, b"abc", b"1.0"), b"abc"),
    (post(b"Content-Length: 0\r\n"), b""),
    (post(b""), b""),
    (CHUNKED + b"0\r\n\r\n", b""),
    (CHUNKED + b"1\r\na\r\n0A;x=y\r\n\r\n23456789\r\n000\r\nX: y\r\n\r\n", b"a\r\n23456789"),
    (post(b"transfer-encoding: Chunked\r\n", b"3 ;a\r\nabc\r\n0\r\n\r\n"), b"abc"),
]


@pytest.mark.parametrize(("request_bytes", "body"), BODIES, ids=range(len(BODIES)))
def test_bodies(request_bytes: bytes, body: bytes) -> None:
    """Each ends by itself, for all ways to read it, and the next request comes behind it."""

    def lines(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        start_response("200 OK", [])
        return list(environ["wsgi.input"])

    def short(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        start_response("200 OK", [])
        pieces = [environ["wsgi.input"].read(2), environ["wsgi.input"].readline(3)]
        return [*pieces, *environ["wsgi.input"].readlines(), environ["wsgi.input"].read(99)]

    for app in (echo, lines, short, wsgiref.validate.validator(echo_exactly)):
        for is_by_byte in (False, True):
            data = answers_to(app, request_bytes + LAST, is_by_byte=is_by_byte)
            first = parsed(data)
            assert (first[0], first[2]) == (200, body)
            if b"HTTP/1.0" not in request_bytes:
                assert parsed(first[3])[0] == 200


def echo_exactly(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
    """Echo, as strictly as the validator wants it."""
    body = environ["wsgi.input"].read(100) + environ["wsgi.input"].read(100)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


@pytest.mark.parametrize(
    "body",
    [
        b"\r\n",
        b"x\r\n",
        b"x\r\n0\r\n\r\n",
        b"-1\r\n\r\n",
        b"0x1\r\na\r\n",
        b"1\r\nab\r\n0\r\n\r\n",
        b"1\na\n0\n\n",
        b"1;\0\r\na\r\n0\r\n\r\n",
        b"f" * 16 + b"\r\n",
        b"1;" + b"x" * LINE_BYTES + b"\r\na\r\n",
        b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n",
    ],
)
def test_bodies_that_are_none(body: bytes) -> None:
    """The application gets an OSError, whatever it makes of it; the device a 400, if nothing."""
    recorder = Recorder()
    for is_by_byte in (False, True):
        answer = parsed(answers_to(recorder, CHUNKED + body + GET, is_by_byte=is_by_byte))
        assert (answer[0], answer[3]) == (400, b"")
    assert not recorder.bodies

    def calm(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        for _ in range(2):
            with pytest.raises(OSError):
                environ["wsgi.input"].read()
        start_response("422 No", [])
        return [b"calm"]

    answer = parsed(answers_to(calm, CHUNKED + body + GET))
    assert (answer[0], answer[2], answer[3]) == (422, b"calm", b"")
    assert answer[1]["connection"] == "close"


def read_answer(device: socket.socket, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Read one answer on a connection that goes on, and not a byte more."""
    data = bytearray()
    while not data.endswith(b"\r\n\r\n"):
        piece = device.recv(1)
        assert piece, f"the connection ended behind {bytes(data)!r}"
        data += piece
    first, *lines = data.decode("latin-1").split("\r\n")[:-2]
    fields = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    assert "transfer-encoding" not in fields
    size = 0 if method == "HEAD" else int(fields.get("content-length", 0))
    body = b""
    while len(body) < size:
        body += device.recv(size - len(body))
    return int(first.split()[1]), fields, body


def test_a_body_that_waits_to_be_asked_for() -> None:
    """Expect: 100-continue: asked for when it is read, and not otherwise."""
    head = post(LENGTH_3 + b"Expect: 100-Continue\r\n")
    with Served(echo) as served:
        device = served.connect()
        device.sendall(head)
        assert read_answer(device)[0] == 100
        device.sendall(b"abc")
        assert read_answer(device)[2] == b"abc"
        for _ in range(2):
            device.sendall(head + b"abc")  # it doesn't wait
            assert read_answer(device)[::2] == (200, b"abc")
    with Served(fixed(b"no", headers=[("Content-Length", "2")])) as served:
        device = served.connect()
        device.sendall(head)
        status, fields, _ = read_answer(device)
        assert (status, fields["connection"]) == (200, "close")
        assert device.recv(1) == b""
    assert b" 100 " not in answers_to(echo, head.replace(b"1.1", b"1.0") + b"abc")


def test_a_body_that_nobody_reads() -> None:
    """What is short enough is passed over; else the connection ends, and says so."""
    app = fixed(b"ok", headers=[("Content-Length", "2")])
    with Served(app) as served:
        for goes_on, size in ((True, DRAIN_BYTES), (False, DRAIN_BYTES + 1)):
            device = served.connect()
            device.sendall(post(b"Content-Length: %d\r\n" % size))
            assert read_answer(device)[1].get("connection") == (None if goes_on else "close")
            if goes_on:
                device.sendall(b"x" * size + GET)
                assert read_answer(device)[0] == 200
            else:
                assert device.recv(1) == b""
        for chunk, goes_on in ((b"x", True), (b"x" * DRAIN_BYTES, False)):
            device = served.connect()
            data = b"%x\r\n%b\r\n" % (len(chunk), chunk)
            with contextlib.suppress(BrokenPipeError):
                device.sendall(CHUNKED + data + data + b"0\r\n\r\n" + LAST)
            answers = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := device.recv(65536):
                    answers += piece
            assert answers.count(b"HTTP/1.1 200 OK\r\n") == 1 + goes_on


# --- answers ----------------------------------------------------------------------------


def test_the_validator_finds_nothing() -> None:
    """wsgiref's, which checks every call for what PEP 3333 says."""
    pieces = [b"abc", b"", b"def"]

    def app(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        write = start_response("200 OK", [("Content-Type", "text/plain")])
        write(b"by write, ")
        return pieces

    with Served(wsgiref.validate.validator(app), scheme="https") as served:
        device = served.http()
        for method in ("GET", "POST", "PUT", "HEAD", "GET", "OPTIONS"):
            body = iter([b"x" * 1000, b"y"]) if method == "PUT" else None
            device.request(method, "/p?q", body)
            response = device.getresponse()
            assert response.status == 200
            assert response.read() == (b"" if method == "HEAD" else b"by write, abcdef")
        device.close()


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("option", [b"", b"Connection: close\r\n", b"Connection: x,Keep-Alive\r\n"])
def test_how_an_answer_ends(version: bytes, option: bytes) -> None:
    stays = b"Keep" in option or (version == b"1.1" and not option)
    request = post(option, version=version)
    length = [("Content-Length", "4")]
    for app, framing in (
        (fixed(b"ab", b"", b"cd", headers=length), "length"),
        (lambda _, start: [start("200 OK", []), [b"abcd"]][1], "length"),
        (fixed(b"ab", b"", b"cd"), "chunked" if version == b"1.1" else "end"),
    ):
        status, fields, body, rest = parsed(answers_to(app, request + request))
        assert (status, body) == (200, b"abcd")
        assert fields.get("content-length") == ("4" if framing == "length" else None)
        assert fields.get("transfer-encoding") == ("chunked" if framing == "chunked" else None)
        goes_on = stays and framing != "end"
        expected = None if goes_on and version == b"1.1" else "keep-alive" if goes_on else "close"
        assert fields.get("connection") == expected
        assert bool(rest) == goes_on
        if goes_on:
            assert parsed(rest)[2:] == (b"abcd", b"")


@pytest.mark.parametrize(
    ("method", "status", "headers", "pieces", "length"),
    [
        ("HEAD", "200 OK", [], (b"abc",), None),
        ("HEAD", "200 OK", [], (), None),
        ("HEAD", "200 OK", [("Content-Length", "3")], (b"abc",), "3"),
        ("HEAD", "200 OK", [("Content-Length", "3")], (), "3"),
        ("GET", "204 No Content", [], (), None),
        ("GET", "204 No Content", [("Content-Length", "0")], (b"abc",), None),
        ("GET", "304 Not Modified", [("content-length", "3")], (), "3"),
        ("GET", "304 Not Modified", [], (b"abc", b"def"), None),
        ("GET", "304 Not Modified", [], (), None),
        ("GET", "200", [], (), "0"),
        ("GET", "200 OK", [], (b"", b""), "0"),
    ],
)
def test_answers_without_a_body(
    method: str, status: str, headers: Any, pieces: tuple[bytes, ...], length: str | None
) -> None:
    request = method.encode() + b" / HTTP/1.1\r\n" + HOST + b"\r\n"
    data = answers_to(fixed(*pieces, status=status, headers=headers), request + request)
    head, _, rest = data.partition(b"\r\n\r\n")
    code, fields, body, _ = parsed(head + b"\r\n\r\n", method)
    assert (code, body) == (int(status[:3]), b"")
    assert fields.get("content-length") == length
    assert "transfer-encoding" not in fields
    assert head.startswith(b"HTTP/1.1 %d " % code)
    assert rest.endswith(b"\r\n\r\n") and rest.count(b"\r\n\r\n") == 1


def test_what_isn_t_sent_isn_t_made() -> None:
    pieces = iter([b"one", b"two"])  # might be endless

    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        return pieces

    assert answers_to(app, b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n").endswith(b"\r\n\r\n")
    assert list(pieces) == [b"two"]


def test_date() -> None:
    fields = parsed(answers_to(fixed(), GET))[1]
    assert "server" not in fields
    assert fields["date"].endswith(" GMT")
    mine = [("Date", "then"), ("server", "mine"), ("Set-Cookie", "a=\xe4"), ("Set-Cookie", "b=1")]
    answer = answers_to(fixed(headers=mine), GET)
    assert answer.count(b"Date: ") == 1 and b"Date: then\r\n" in answer
    assert b"server: mine\r\n" in answer
    assert b"Set-Cookie: a=\xe4\r\nSet-Cookie: b=1\r\n" in answer


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(pattern(0, 30_001))
    with path.open("rb") as file:

        def app(environ: dict[str, Any], start_response: StartResponse) -> Any:
            start_response("200 OK", [])
            return environ["wsgi.file_wrapper"](file, 4096)

        assert parsed(answers_to(app, GET))[2] == pattern(0, 30_001)
        assert file.closed


def raising(when: str, closed: list[str]) -> WSGIApplication:
    """Return an application that raises: before or after it starts, between, at its end."""

    class Pieces:
        def __iter__(self) -> Iterator[bytes]:
            if when == "first":
                raise RuntimeError("secret")
            yield b"part"
            if when == "between":
                sys.exit("secret")

        def close(self) -> None:
            closed.append(when)
            if when == "close":
                raise RuntimeError("secret")

    def app(environ: dict[str, Any], start_response: StartResponse) -> Any:
        if when == "call":
            raise RuntimeError("secret")
        write = start_response("200 OK", [("X-Secret", "secret")])
        if when == "started":
            raise RuntimeError("secret")
        if when == "written":
            write(b"part")
            raise RuntimeError("secret")
        if when == "exc_info":
            write(b"part")
            try:
                raise RuntimeError("secret")
            except RuntimeError:
                start_response("500 Oh", [], sys.exc_info())
        return Pieces()

    return app


@pytest.mark.parametrize(
    "when", ["call", "started", "first", "written", "exc_info", "between", "close"]
)
def test_an_application_that_raises(when: str, caplog: pytest.LogCaptureFixture) -> None:
    closed: list[str] = []
    answer = answers_to(raising(when, closed), GET + GET)
    assert closed == ([when] if when in ("first", "between", "close") else [])
    if when in ("call", "started", "first"):
        status, fields, body, rest = parsed(answer)
        assert (status, body, rest) == (500, b"500 Internal Server Error\n", b"")
        assert fields["connection"] == "close"
        assert b"ecret" not in answer
    else:
        assert answer.count(b"HTTP/1.1 ") == 1
        # Only where it was whole before is it said to be.
        assert answer.endswith(b"4\r\npart\r\n" + b"0\r\n\r\n" * (when == "close"))
    if when in ("written", "exc_info", "between"):  # the end must not look like the answer's own
        with Served(raising(when, closed)) as served:
            served.connect().sendall(GET.replace(b"1.1", b"1.0"))
            wait_until(lambda: served.cut)
        assert served.cut == ["its answer was cut: 500 Internal Server Error"]
        del caplog.records[1]
    (record,) = caplog.records
    assert record.getMessage() == "the WSGI application failed: GET '/'"
    assert record.exc_info is not None and record.exc_info[1] is not None
    assert str(record.exc_info[1]) == "secret"
    head = answers_to(raising(when, closed), GET.replace(b"GET", b"HEAD"))
    assert head.endswith(b"\r\n\r\n") and head.count(b"\r\n\r\n") == 1


def test_an_answer_may_be_replaced_while_nothing_is_sent() -> None:
    def app(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
        start_response("200 OK", [("X-A", "b")])
        try:
            raise ValueError
        except ValueError:
            start_response("503 Oh", [], sys.exc_info())
        return [b"sorry"]

    status, fields, body, _ = parsed(answers_to(app, GET))
    assert (status, body) == (503, b"sorry")
    assert "x-a" not in fields


def test_an_answer_s_length_is_no_lie(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing beyond it is sent, the next request isn't served, and the log tells it."""
    length = [("Content-Length", "5")]
    for pieces, sent, said in (
        ((b"abc",), b"abc", "2 bytes fewer than its Content-Length"),
        ((), b"", "5 bytes fewer than its Content-Length"),
        ((b"abcdef",), b"abcde", "1 bytes more than its Content-Length"),
        ((b"abcde", b"fg", b"h"), b"abcde", "2 bytes more than its Content-Length"),
    ):
        caplog.clear()
        head, _, body = answers_to(fixed(*pieces, headers=length), GET + GET).partition(b"\r\n\r\n")
        assert b"Content-Length: 5" in head
        with Served(fixed(*pieces, headers=length)) as served:
            device = served.connect()
            device.sendall(GET + GET)
            while device.recv(65536):
                pass
            wait_until(lambda: caplog.records[1:])
        assert bool(served.cut) == (len(sent) < 5)  # who has all of it isn't cut
        del caplog.records[1:]
        assert body == sent
        (record,) = caplog.records
        assert record.exc_info is not None
        assert said in str(record.exc_info[1])


@pytest.mark.parametrize(
    "app",
    [
        lambda environ, start: [b"never started"],
        lambda environ, start: [],
        lambda environ, start: None,
        lambda environ, start: [start("200 OK", []), ["text"]][1],
        lambda environ, start: [start("200 OK", []), start("200 OK", []), [b""]][2],
        *(
            fixed(b"x", status=status)
            for status in ("", "OK", "99 Low", "100 Continue", "1000 High", "200 a\r\nX: y", "200a")
        ),
        *(
            fixed(b"x", headers=headers)
            for headers in (
                [("X: y", "z")],
                [("X", "y\r\nZ: z")],
                [("X", "y\n")],
                [("X", "\u20ac")],
                [("", "y")],
                [("X", 1)],
                [("X",)],
                [("Connection", "close")],
                [("transfer-encoding", "chunked")],
                [("Upgrade", "websocket")],
                [("Content-Length", "-1")],
                [("Content-Length", "")],
                [("Content-Length", "1"), ("content-length", "1")],
            )
        ),
    ],
)
def test_what_an_application_must_not_say(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    status, _, body, rest = parsed(answers_to(app, GET + GET))
    assert (status, body, rest) == (500, b"500 Internal Server Error\n", b"")
    assert len(caplog.records) == 1


# --- connections ------------------------------------------------------------------------


def test_one_connection_for_many_requests() -> None:
    """Between any two of them it is parked: it holds no thread."""
    with Served(echo) as served:
        device = served.http()
        for number in range(100):
            served.wait_until_parked(number)
            device.request("POST", "/", body=b"%d" % number)
            assert device.getresponse().read() == b"%d" % number
        device.close()


def test_pipelined_requests_are_answered_in_their_order() -> None:
    requests = b"".join(post(b"Content-Length: 2\r\n", b"%02d" % n) for n in range(100))
    with Served(echo) as served:
        device = served.connect()
        device.sendall(requests + b"\r\n" + LAST)
        for number in range(100):
            assert read_answer(device)[2] == b"%02d" % number
        assert read_answer(device)[::2] == (200, b"")
        assert device.recv(1) == b""


SIZE = 20 * MIB


def digesting(environ: dict[str, Any], start_response: StartResponse) -> list[bytes]:
    """Answer with size and SHA-256 of the body."""
    digest, size = hashlib.sha256(), 0
    while piece := environ["wsgi.input"].read(100_000):
        digest.update(piece)
        size += len(piece)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{size} {digest.hexdigest()}".encode()]


def downloading(length: bool, closed: Callable[[], None]) -> WSGIApplication:
    """Answer with SIZE bytes of the pattern."""

    def pieces() -> Iterator[bytes]:
        try:
            for at in range(0, SIZE, MIB):
                yield pattern(at, MIB)
        finally:
            closed()

    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", str(SIZE))] if length else [])
        return pieces()

    return app


@pytest.mark.parametrize("is_chunked", [False, True])
def test_large_bodies_both_ways(is_chunked: bool) -> None:
    with Served(digesting) as served:
        device = served.http()
        blocks = (pattern(at, MIB) for at in range(0, SIZE, MIB))
        headers = {} if is_chunked else {"Content-Length": str(SIZE)}
        device.request("POST", "/", body=blocks, headers=headers, encode_chunked=is_chunked)
        assert device.getresponse().read() == f"{SIZE} {pattern_sha256(SIZE)}".encode()
        device.close()
    closed = threading.Event()
    with Served(downloading(not is_chunked, closed.set)) as served:
        device = served.http()
        device.request("GET", "/")
        response = device.getresponse()
        digest = hashlib.sha256()
        while piece := response.read(7001):  # in small steps: the sender has to wait
            digest.update(piece)
        assert digest.hexdigest() == pattern_sha256(SIZE)
        device.close()
    assert closed.is_set()


def test_a_device_that_leaves(caplog: pytest.LogCaptureFixture) -> None:
    """The application's reads fail, its answer is closed; that is nobody's defect."""
    caplog.set_level(logging.INFO)
    for head in (b"Content-Length: 100000\r\n", CODING):
        recorder = Recorder()
        with Served(recorder) as served:
            device = served.connect()
            device.sendall(post(head) + b"ffff\r\nand no more")
            wait_until(partial(getattr, recorder, "environs"))
        assert not recorder.bodies
    for length in (True, False):
        closed = threading.Event()
        with Served(downloading(length, closed.set)) as served:
            device = served.connect()
            device.sendall(GET)
            assert device.recv(100_000)
            device.close()
            assert closed.wait(WAIT_S)
    for part in (b"", GET[:10]):
        with Served(echo) as served:
            device = served.connect()
            device.sendall(part)
    assert not caplog.records


@pytest.mark.parametrize("others_wait", [False, True])
def test_a_device_that_stalls(
    others_wait: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may keep the thread waiting for so long, and for less while others want it."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(wsgi, "URGENT_S", 0.05)
    if not others_wait:
        monkeypatch.setattr(wsgi, "WAIT_S", 0.1)

    def serve(app: WSGIApplication) -> Served:
        return Served(app, others_wait=lambda: others_wait)

    with serve(fixed(headers=[("Content-Length", "0")])) as served:
        device = served.connect()
        device.sendall(post(LENGTH_3, b"ab"))  # which nobody reads
        assert read_answer(device)[0] == 200
        assert device.recv(1) == b""
    with serve(echo) as served:
        device = served.connect()
        device.sendall(post(LENGTH_3, b"ab"))
        assert read_answer(device)[0] == 408
        assert device.recv(1) == b""
    closed = threading.Event()
    with serve(downloading(True, closed.set)) as served:
        device = served.connect()
        device.sendall(GET)
        assert closed.wait(WAIT_S)
        wait_until(lambda: served.cut)
        assert served.cut[0].startswith("its answer was cut: waited 0 s for the device")
    assert not caplog.records


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_device_that_trickles_is_cut_too(
    is_chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes in time, and all of them take too long."""
    monkeypatch.setattr(wsgi, "WAIT_S", 0.2)
    with Served(echo) as served:
        device = served.connect()
        device.sendall(CHUNKED if is_chunked else post(b"Content-Length: 100000\r\n"))
        piece = b"1\r\na\r\n" if is_chunked else b"a"
        with contextlib.suppress(BrokenPipeError):
            while not select.select([device], [], [], 0.01)[0]:
                device.sendall(piece)
        assert read_answer(device)[0] == 408


LINES = st.sampled_from(
    [
        *(b"Host: a.example", b"Host: b", b"Host : a", b"host:a:1", b"Host: a@b", b"HOST:"),
        *(b"Content-Length: 3", b"Content-Length: 03", b"Content-Length:3 ", b"content-length: x"),
        *(b"Transfer-Encoding: chunked", b"Transfer-encoding:\tchunked", b"Transfer-Encoding: x"),
        *(b"Connection: close", b"Expect: 100-continue", b" folded", b"X: y", b"X:", b"", b"\xe4"),
    ]
)
FIRST_LINES = st.builds(
    lambda *parts: b" ".join(parts),
    st.sampled_from([b"GET", b"POST", b"HEAD", b"get", b"G\0T", b"", b"OPTIONS"]),
    st.sampled_from([b"/", b"*", b"/a?b", b"http://a/", b"http://", b"/a b", b"", b"/%", b"a"]),
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/3", b"http/1.1"]),
)
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\n ", b"\0"])
FUZZED_BODIES = st.sampled_from([b"", b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"3\nabc\n0\n\n", b"0\r\n"])
REQUESTS = st.builds(
    lambda first, lines, ends, body: (
        b"".join(a + b for a, b in zip([first, *lines, b""], ends)) + body
    ),
    st.just(b"POST / HTTP/1.1") | FIRST_LINES,
    st.lists(LINES, max_size=3).map(lambda lines: [b"Host: a", *lines]) | st.lists(LINES),
    st.just([b"\r\n"] * 20) | st.lists(ENDS, min_size=20, max_size=20),
    FUZZED_BODIES | st.binary(max_size=20),
)


def by_h11(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Return method, target and body of the first request, as another reader has them."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data.lstrip(b"\r\n"))
    body, head = b"", None
    with contextlib.suppress(h11.RemoteProtocolError):
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                return bytes(head.method), bytes(head.target), body
            else:  # it isn't whole
                break
    return None


@settings(max_examples=500)
@given(REQUESTS | st.binary(max_size=100))
def test_whatever_comes(data: bytes) -> None:
    """It is served, refused, or cut; and what is served, another reader reads likewise."""
    recorder = Recorder()
    answer = answers_to(recorder, data)
    if answer:
        assert answer.startswith(tuple(b"HTTP/1.1 %d " % n for n in (100, 200, 400, 431, 501)))
    if recorder.bodies:
        environ = recorder.environs[0]
        assert by_h11(data) == (
            environ["REQUEST_METHOD"].encode(),
            environ["REQUEST_URI"].encode("latin-1"),
            recorder.bodies[0],
        )


# --- real users -------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(pattern(0, 3 * MIB))

    def curl(*options: str) -> str:
        command = ["curl", "-sS", "--noproxy", "*", "-w", "\n%{http_code} %{num_connects}"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        return done.stdout

    expected = f"{3 * MIB} {pattern_sha256(3 * MIB)}"
    with Served(digesting) as served:
        url = served.listen()
        assert curl("-T", str(upload), url) == f"{expected}\n200 1"  # with Expect
        assert curl("-H", "Transfer-Encoding: chunked", "-T", str(upload), url) == (
            f"{expected}\n200 1"
        )
        assert curl("--http1.0", "-T", str(upload), url) == f"{expected}\n200 1"
        assert curl("-d", "", "-o", "/dev/null", url, url, "-o", "/dev/null").splitlines()[-2:] == [
            "200 1",
            "200 0",
        ]
        assert "200 1" in curl("-I", url)
        assert curl("-H", "Host:", url).endswith("\n400 1")
        closed = threading.Event()
        served.app = downloading(False, closed.set)
        target = tmp_path / "download"
        for version in ("--http1.0", "--http1.1"):
            assert curl(version, "-o", str(target), url) == "\n200 1"
            assert target.read_bytes() == pattern(0, SIZE)


def exercise(app: WSGIApplication) -> None:
    """Use an application that answers /who, and /echo with POST's body or field."""
    with Served(app, scheme="https") as served:
        device = served.http()
        for number in range(3):
            device.request("GET", f"/who/gr%C3%BCn?n={number}")
            response = device.getresponse()
            assert response.read().decode() == f"{DEVICE} grün {number} https://a.example"
            device.request("POST", "/echo", body=b"text=a+b%FC" + b"c" * 100_000)
            assert device.getresponse().read().startswith(b"100004")
            device.request("HEAD", "/who/x")
            response = device.getresponse()
            assert (response.status, response.read()) == (200, b"")
            device.request("GET", "/stream")
            assert device.getresponse().read() == b"0\n1\n2\n"
            device.request("GET", "/nowhere")
            response = device.getresponse()
            assert response.status == 404 and response.read()
        device.request("GET", "/fails")
        response = device.getresponse()
        assert response.status == 500
        assert b"secret" not in response.read()
        device.close()


def test_flask() -> None:
    import flask

    app = flask.Flask(__name__)

    @app.route("/who/<name>")
    def who(name: str) -> str:
        request = flask.request
        return f"{request.remote_addr} {name} {request.args.get('n')} {request.host_url[:-1]}"

    @app.post("/echo")
    def echo() -> str:
        return str(len(flask.request.get_data()) - len(b"text=a+b%FC") + 4)

    @app.route("/stream")
    def stream() -> Any:
        return flask.Response(f"{n}\n" for n in range(3))

    @app.route("/fails")
    def fails() -> str:
        raise RuntimeError("secret")

    exercise(app)


def test_django() -> None:
    """In a process of its own: its settings are global."""
    command = [sys.executable, "-c", "from tests.client.test_wsgi import django; django()"]
    subprocess.run(command, cwd=PROJECT, check=True, timeout=WAIT_S * 4)


def django() -> None:
    import django.conf
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpResponse, StreamingHttpResponse
    from django.urls import path

    def who(request: Any, name: str) -> Any:
        n, host = request.GET.get("n"), request.build_absolute_uri("/")[:-1]
        return HttpResponse(f"{request.META['REMOTE_ADDR']} {name} {n} {host}")

    def echo(request: Any) -> Any:
        return HttpResponse(str(len(request.body) - len(b"text=a+b%FC") + 4))

    def stream(request: Any) -> Any:
        return StreamingHttpResponse(f"{n}\n" for n in range(3))

    def fails(request: Any) -> Any:
        raise RuntimeError("secret")

    patterns = [path("who/<name>", who), path("echo", echo), path("stream", stream)]
    patterns.append(path("fails", fails))
    django.conf.settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=tuple(patterns))
    exercise(get_wsgi_application())


def test_what_it_brings_into_memory() -> None:
    code = (
        "import sys, snitun_sync.client.client; before = set(sys.modules);"
        "import snitun_sync.client.wsgi; print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    brought = {name for name in done.stdout.split() if not name.startswith("snitun_sync.")}
    assert brought <= {"io", "wsgiref", "wsgiref.handlers", "wsgiref.headers", "wsgiref.util"}
