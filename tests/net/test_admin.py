"""The admin page: what it answers, to whom, and that nothing it serves is left behind."""

from __future__ import annotations

import contextlib
import errno
import http.client
import logging
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snitun_sync.errors import ConfigurationError, ListenError
from snitun_sync.net import admin as admin_module
from snitun_sync.net import listening
from snitun_sync.net.admin import CONNECTIONS, REQUEST_BYTES, Admin
from snitun_sync.net.loop import Loop
from snitun_sync.protocol.names import Address, parse_address
from tests.support import PROJECT, WAIT_S, free_port, reset, wait_until

if TYPE_CHECKING:
    from snitun_sync.net.admin import Answer

TOKEN = "0123456789abcdef-token"
STATUS = '{"state": "größer"}\n'
LARGE = "0123456789abcdef" * (512 * 1024)  # more than the kernel holds
HOST = b"Host: localhost\r\n"
REQUEST = b"GET /status HTTP/1.1\r\n" + HOST + b"\r\n"
LARGE_REQUEST = b"GET /large HTTP/1.1\r\n" + HOST + b"\r\n"
NEEDS_CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def broken() -> Answer:
    raise RuntimeError("a page that can't")


PAGES = {
    "/status": lambda: (200, "application/json", STATUS),
    "/large": lambda: (200, "text/plain", LARGE),
    "/ready": lambda: (503, "text/plain", "not yet\n"),
    "/broken": broken,
}


class Running:
    """An Admin on a loop of its own; at the end nothing of it may be left."""

    def __init__(self, address: str = "127.0.0.1:0", **options: Any) -> None:
        self._descriptors = descriptor_count()
        self.loop = Loop()
        self.address = parse_address(address, "--admin", can_be_unix=True, can_be_any=True)
        self.admin = Admin(self.loop, self.address, PAGES, **options)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)

    def __enter__(self) -> Running:
        try:
            self.admin.open()
        except BaseException:
            assert not self.admin._listeners
            self.loop.close()
            # Another Admin of this process may have to close what has tried it.
            wait_until(lambda: descriptor_count() == self._descriptors)
            raise
        self.loop.call_soon(self.admin.begin)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.admin.close)
        self.loop.stop()
        self.thread.join(WAIT_S)
        assert not self.admin.connections
        assert not self.loop.timer_count
        assert list(self.loop._handlers.values()) == [self.loop]
        self.loop.close()
        assert descriptor_count() == self._descriptors

    def connect(self, receive_bytes: int = 0) -> socket.socket:
        """Return a connection; with `receive_bytes`, one that takes little until it is read."""
        if self.address.path:
            sock = socket.socket(socket.AF_UNIX)
            place: Any = self.address.path
        else:
            sock = socket.socket()
            place = ("127.0.0.1", self.admin.port)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.settimeout(WAIT_S)
        sock.connect(place)
        return sock

    def ask(self, request: bytes, *, is_by_byte: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Return status, header and body of the answer to these bytes."""
        with self.connect() as sock:
            if is_by_byte:
                for at in range(len(request)):
                    sock.send(request[at : at + 1])
            else:
                sock.sendall(request)
            return answer_on(sock)

    def wait_until_free(self) -> None:
        """Wait until no connection is left."""
        wait_until(lambda: not self.admin.connections, "no connection is left")


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no reason to fail."""
    monkeypatch.setattr(admin_module, "REQUEST_S", WAIT_S)
    monkeypatch.setattr(admin_module, "DRAIN_S", WAIT_S)


@pytest.fixture
def running() -> Iterator[Running]:
    with Running() as running:
        yield running


def descriptor_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def answer_on(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read an answer to its end, and check that it is a whole one."""
    data = b""
    while piece := sock.recv(1 << 20):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert len(fields) == len(lines)
    assert first.startswith("HTTP/1.1 ")
    assert int(fields["content-length"]) == len(body)
    assert fields["connection"] == "close"
    assert fields["cache-control"] == "no-store"
    assert fields["x-content-type-options"] == "nosniff"
    return int(first.split()[1]), fields, body


def get(path: str = "/status", fields: bytes = HOST) -> bytes:
    return f"GET {path} HTTP/1.1\r\n".encode() + fields + b"\r\n"


# --- what is answered -----------------------------------------------------------------


def test_a_page_by_http_client(running: Running) -> None:
    client = http.client.HTTPConnection("127.0.0.1", running.admin.port, timeout=WAIT_S)
    for path, status, body in (
        ("/status", 200, STATUS),
        ("/status?a=b?c", 200, STATUS),
        ("/ready", 503, "not yet\n"),
    ):
        client.request("GET", path)
        response = client.getresponse()
        assert (response.status, response.read().decode()) == (status, body)
        assert response.reason == {200: "OK", 503: "Service Unavailable"}[status]
        client.close()
    client.request("HEAD", "/status")
    response = client.getresponse()
    assert (response.status, response.headers["Allow"], response.read()) == (405, "GET", b"")
    client.close()
    with running.connect() as sock:
        sock.sendall(REQUEST.replace(b"GET", b"HEAD"))
        data = b""
        while piece := sock.recv(65536):
            data += piece
    assert data.endswith(b"\r\n\r\n")


@NEEDS_CURL
def test_pages_by_curl(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    for address, options in (("127.0.0.1:0", []), (f"unix:{path}", ["--unix-socket", str(path)])):
        with Running(address) as running:
            url = f"http://localhost:{running.admin.port or 80}"
            command = ["curl", "-sS", "--noproxy", "*", "--max-time", "30", "-w", "%{http_code}"]
            for more, expected in (
                ([f"{url}/status"], f"{STATUS}200"),
                (["--http1.0", f"{url}/ready"], "not yet\n503"),
                (["-X", "DELETE", f"{url}/status"], "Method Not Allowed: expected GET\n405"),
                (["-d", "a=b", f"{url}/status"], "Method Not Allowed: expected GET\n405"),
                (["-I", "-o", "/dev/null", f"{url}/status"], "405"),
            ):
                done = subprocess.run(
                    [*command, *options, *more], capture_output=True, text=True, check=True
                )
                assert done.stdout == expected


REQUESTS = [
    (get(), 200),
    (b"GET /status HTTP/1.0\r\nhost:\t127.0.0.1:80 \r\n\r\n", 200),
    (get(fields=HOST + b"X-Any: \xff\tand more: of it\r\nContent-Length: 0\r\n"), 200),
    (get(fields=HOST + b"X-A: 1\r\nx-a: 2\r\n"), 200),
    (get("/large"), 200),
    (get("/other"), 404),
    (get("/Status"), 404),
    (get("/status/"), 404),
    (get("/"), 404),
    (b"POST /status HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    (b"get /status HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    (b"POST /other HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\n\r\nbody", 405),
    (get(fields=HOST + b"Content-Length: 4\r\n") + b"body", 400),
    (get(fields=HOST + b"Content-Length: 0\r\nContent-Length: 4\r\n") + b"body", 400),
    (get(fields=HOST + b"Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n", 400),
    (b"\r\n\r\n", 400),
    (b"GET /status\r\n\r\n", 400),
    (b"GET  /status HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET /status HTTP/2.0\r\n" + HOST + b"\r\n", 400),
    (b"GET http://localhost/status HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    (get(fields=HOST + b"no colon\r\n"), 400),
    (get(fields=HOST + b": no name\r\n"), 400),
    (get(fields=HOST + b"space : before\r\n"), 400),
    (get(fields=HOST + b" continued\r\n"), 400),
    (get(fields=b"X-\xc9: a\r\n" + HOST), 400),
    (get(fields=HOST + b"X: a\rb\r\n"), 400),
    (get(fields=HOST + b"X: a\nHost: localhost\r\n"), 400),
    (get(fields=HOST + b"X: a\0b\r\n"), 400),
    (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
]


@pytest.mark.parametrize(("request_bytes", "status"), REQUESTS, ids=range(len(REQUESTS)))
def test_requests_whole_byte_by_byte_and_with_more_behind(
    running: Running, request_bytes: bytes, status: int
) -> None:
    answer = running.ask(request_bytes)
    assert answer[0] == status
    assert running.ask(request_bytes, is_by_byte=True) == answer
    assert running.ask(request_bytes + get("/ready") + b"\0garbage") == answer
    assert ("allow" in answer[1]) == (status == 405)
    if status >= 400:
        assert answer[2].count(b"\n") == 1
        assert answer[1]["content-type"] == "text/plain; charset=utf-8"


def test_the_size_of_a_request_is_bounded(running: Running) -> None:
    room = REQUEST_BYTES - len(get(fields=HOST + b"X: \r\n"))
    for size, status in ((room, 200), (room + 1, 431), (100_000, 431)):
        request = get(fields=HOST + b"X: " + b"x" * size + b"\r\n")
        assert running.ask(request)[0] == status
    assert running.ask(b"x" * (REQUEST_BYTES + 1))[0] == 431
    request = b"x" * (REQUEST_BYTES + 1)
    assert running.ask(request, is_by_byte=True)[0] == 431


def test_a_page_with_a_defect(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    status, _, body = running.ask(get("/broken?token=abc"))
    assert status == 500
    assert b"can't" not in body
    (record,) = caplog.records
    assert record.getMessage() == "defect in the --admin page /broken"
    assert record.exc_info is not None
    assert running.ask(REQUEST)[0] == 200


def test_a_connection_has_one_request() -> None:
    asked: list[int] = []

    def page() -> Answer:
        asked.append(1)
        return 200, "text/plain", ""

    with Running() as running, running.connect() as sock:
        running.admin._pages = {"/count": page}
        sock.sendall(get("/count"))
        assert answer_on(sock)[0] == 200
        sock.sendall(get("/count"))
        sock.shutdown(socket.SHUT_WR)
        running.wait_until_free()
    assert len(asked) == 1


@given(st.binary(max_size=300) | st.binary(max_size=80).map(lambda tail: REQUEST[:-2] + tail))
def test_any_bytes_get_an_answer(head: bytes) -> None:
    """Whatever comes: one of these answers, and 200 only for a well-formed GET of a page."""
    admin = Admin(None, Address("127.0.0.1", 1), PAGES)  # type: ignore[arg-type]
    status, _, _ = admin.answer(head)
    assert status in (200, 400, 404, 405, 421)
    assert status != 200 or head.startswith(b"GET /status HTTP/1.1\r\n")


# --- who may ask ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:65535", "192.0.2.1:9000"),
        *("localhost", "LocalHost:80", "localhost.", "[2001:db8::1]"),
    ],
)
def test_hosts_that_no_web_page_has(running: Running, host: str) -> None:
    assert running.ask(get(fields=f"Host: {host}\r\n".encode()))[0] == 200


@pytest.mark.parametrize(
    "fields",
    [
        *("", "Host:\r\n", "Host: localhost\r\nHost: localhost\r\n", "Host: evil.example\r\n"),
        *("Host: localhost.evil.example\r\n", "Host: 127.0.0.1.evil.example\r\n"),
        *("Host: 127.1\r\n", "Host: ::1\r\n", "Host: [evil:]\r\n", "Host: [::1\r\n"),
        *("Host: localhost:port\r\n", "Host: localhost, 127.0.0.1\r\n", "Host: a@localhost\r\n"),
        *("Host: unix:/run/a\r\n", "Host: :80\r\n", "Host: *:80\r\n", "Host: [\xe9:]\r\n"),
        "X-Forwarded-Host: localhost\r\n",
    ],
)
def test_other_hosts_may_be_a_web_page(running: Running, fields: str) -> None:
    status, _, body = running.ask(get(fields=fields.encode("latin-1")))
    assert status == 421
    assert b"Host" in body


def test_the_host_listened_on_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *more: Any, **options: Any) -> Any:
        return real("127.0.0.1" if host == "Relay.example" else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with Running("Relay.example:0") as running:
        assert running.ask(get(fields=b"Host: relay.example:80\r\n"))[0] == 200
        assert running.ask(get(fields=b"Host: relay2.example\r\n"))[0] == 421


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:0", "*:0"])
def test_with_a_token_nothing_goes_without_it(address: str) -> None:
    bearer = b"Authorization: Bearer " + TOKEN.encode()
    with Running(address, token=f"{TOKEN}\n") as running:
        for fields in (
            bearer,
            bearer.replace(b"Bearer ", b"bEARER  ") + b" ",
            b"Host: any.example\r\n" + bearer,
        ):
            assert running.ask(get(fields=fields + b"\r\n"))[0] == 200
        for fields in (
            b"Host: localhost",
            bearer[:-1],
            bearer + b"x",
            bearer.upper(),
            bearer + b"\r\n" + bearer,
            bearer.replace(b"Bearer", b"Basic"),
            bearer.replace(b"Bearer ", b"Bearer"),
            b"Authorization: " + TOKEN.encode(),
            b"Authorization: Bearer",
            b"Authorization:",
            b"Authorization: Bearer \xff",
        ):
            for path in ("/status", "/other"):
                status, header, body = running.ask(get(path, fields + b"\r\n"))
                assert (status, header["www-authenticate"]) == (401, "Bearer")
                assert TOKEN.encode() not in body
        assert running.ask(b"POST / HTTP/1.1\r\n\r\n")[0] == 401
        assert running.ask(b"POST / HTTP/1.1\r\n" + bearer + b"\r\n\r\n")[0] == 405


@pytest.mark.parametrize(
    "token", ["\n", "short", "123456789012345", f"{TOKEN}\n{TOKEN}", f"{TOKEN}é"]
)
def test_tokens_that_are_none(token: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--admin-token-file: .*expected") as caught:
        with Running(token=token):
            pass
    assert token.strip() == "" or token.strip() not in str(caught.value)


@pytest.mark.parametrize("address", ["0.0.0.0:{}", "[::]:{}", "*:{}"])
def test_other_machines_need_a_token(address: str) -> None:
    address = address.format(free_port())
    with pytest.raises(ConfigurationError) as caught:
        with Running(address):
            pass
    assert str(caught.value) == (
        f"--admin: {address} can be reached from other machines; expected a loopback address, "
        "or --admin-token-file as well"
    )


def test_a_name_must_not_lead_to_others_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *more: Any, **options: Any) -> Any:
        return [place for ip in ("127.0.0.1", "::") for place in real(ip, *more, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(ConfigurationError, match=r"both\.example:0 can be reached from other"):
        with Running("both.example:0"):
            pass


@pytest.mark.parametrize("address", ["localhost:0", "[::1]:0", "127.0.0.2:0"])
def test_loopback_addresses_need_no_token(address: str) -> None:
    with Running(address) as running:
        place = (running.address.host, running.admin.port)
        with socket.create_connection(place, WAIT_S) as sock:
            sock.sendall(REQUEST)
            assert answer_on(sock)[0] == 200


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ListenError, match=f"--admin: can't listen on 127.0.0.1:{port}: .*use"):
            with Running(f"127.0.0.1:{port}"):
                pass


# --- unix sockets ---------------------------------------------------------------------


def test_a_unix_socket_comes_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with Running(f"unix:{path}") as running:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert running.admin.port == 0
        assert running.ask(get(fields=b"Host: any.example\r\n"))[0] == 200
        assert running.ask(get(fields=b""))[0] == 200
    assert not path.exists()


def test_a_unix_socket_that_was_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists()
    with Running(f"unix:{path}") as running:
        assert running.ask(REQUEST)[0] == 200
    assert not path.exists()


def test_a_unix_socket_that_lives_stays(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with Running(f"unix:{path}") as running:
        with pytest.raises(ListenError, match=f"unix:{path}: another program listens"):
            with Running(f"unix:{path}"):
                pass
        assert running.ask(REQUEST)[0] == 200
    with socket.socket(socket.AF_UNIX) as full, contextlib.ExitStack() as waiting:
        full.bind(str(path))
        full.listen(0)
        for code in (0, errno.EAGAIN):
            sock = waiting.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            assert sock.connect_ex(str(path)) == code
        with pytest.raises(ListenError, match="another program listens"):
            with Running(f"unix:{path}"):
                pass
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        path.unlink()
        other.bind(str(path))
        with pytest.raises(ListenError, match="type"):
            with Running(f"unix:{path}"):
                pass
    assert path.exists()


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("precious")
    link.symlink_to(file)
    for path in (file, link, tmp_path):
        with pytest.raises(ListenError, match="no socket; expected"):
            with Running(f"unix:{path}"):
                pass
    assert file.read_text() == link.read_text() == "precious"
    for path in (tmp_path / ("long" * 40), tmp_path / "missing" / "a", Path(f"{tmp_path}/a\0b")):
        with pytest.raises(ListenError, match=f"--admin: can't listen on unix:{tmp_path}"):
            with Running(f"unix:{path}"):
                pass


def test_a_path_that_is_another_s_by_now_stays(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with Running(f"unix:{path}"):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"
    path.unlink()
    with Running(f"unix:{path}"):
        path.unlink()


# --- bounds and leaks -----------------------------------------------------------------


def test_a_slow_reader_holds_up_nobody(running: Running) -> None:
    with running.connect(receive_bytes=4096) as slow:
        slow.sendall(LARGE_REQUEST)
        wait_until(lambda: any(c.is_answering for c in list(running.admin.connections)))
        assert running.ask(REQUEST)[0] == 200
        assert answer_on(slow)[2] == LARGE.encode()
    running.wait_until_free()


def test_who_sends_on_and_reads_late_gets_the_answer(running: Running) -> None:
    """The socket isn't closed over unread bytes: that would be a reset."""
    for _ in range(20):
        with running.connect() as sock:
            sock.sendall(REQUEST + b"x" * 1_000_000)
            assert answer_on(sock)[2].decode() == STATUS
    running.wait_until_free()


def test_the_oldest_that_asks_nothing_gives_way(running: Running) -> None:
    with contextlib.ExitStack() as stack:
        early = []
        for count in range(1, CONNECTIONS + 1):
            early.append(stack.enter_context(running.connect()))
            early[-1].sendall(REQUEST[:-1])
            wait_until(lambda count=count: len(running.admin.connections) == count)  # type: ignore[misc]
        assert running.ask(REQUEST)[0] == 200
        assert early[0].recv(1) == b""
        for sock in early[1:]:
            sock.sendall(REQUEST[-1:])
            assert answer_on(sock)[0] == 200
    running.wait_until_free()


def test_who_is_being_answered_doesn_t_give_way(running: Running) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(running.connect(4096)) for _ in range(CONNECTIONS)]
        for sock in slow:
            sock.sendall(LARGE_REQUEST)
        wait_until(lambda: sum(c.is_answering for c in running.admin.connections) == CONNECTIONS)
        with running.connect() as late:
            assert late.recv(1) == b""
        assert len(answer_on(slow[0])[2]) == len(LARGE)
    running.wait_until_free()


def test_many_at_once_are_all_served(running: Running) -> None:
    with contextlib.ExitStack() as stack:
        held = threading.Event()
        running.loop.call_soon_threadsafe(held.wait)
        socks = [stack.enter_context(running.connect()) for _ in range(4 * CONNECTIONS)]
        for sock in socks:
            sock.sendall(REQUEST)
        held.set()
        for sock in socks:
            assert answer_on(sock)[0] == 200


def test_time_is_limited(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "REQUEST_S", 1.0)
    with running.connect() as silent, running.connect() as half, running.connect(4096) as slow:
        half.sendall(REQUEST[:-1])
        slow.sendall(LARGE_REQUEST)
        assert silent.recv(1) == half.recv(1) == b""
        running.wait_until_free()


def test_what_comes_after_the_answer_is_not_drained_for_ever(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_module, "DRAIN_S", 0.05)
    with running.connect() as sock:
        sock.sendall(REQUEST)
        assert answer_on(sock)[0] == 200
        running.wait_until_free()


def test_who_goes_away_leaves_nothing(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    for request in (b"", REQUEST[:-1], REQUEST, LARGE_REQUEST):
        for end in (socket.socket.close, reset):
            sock = running.connect(4096)
            sock.sendall(request)
            if request == LARGE_REQUEST:
                wait_until(lambda: any(c.is_answering for c in list(running.admin.connections)))
            end(sock)
            running.wait_until_free()
    assert not caplog.records


def test_closed_with_connections_in_every_state() -> None:
    with Running() as running, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(running.connect(4096)) for _ in range(4)]
        for sock, request in zip(socks, (b"", REQUEST[:-1], REQUEST, LARGE_REQUEST)):
            sock.sendall(request)
        wait_until(lambda: len(running.admin.connections) == 4)
        wait_until(lambda: any(c.is_answering for c in list(running.admin.connections)))
        running.loop.call_soon_threadsafe(running.admin.close)
        running.wait_until_free()
        assert socks[0].recv(1) == b""


def test_without_descriptors_it_waits_for_some(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listening, "LOG_EACH_S", 0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for pause_s in (0.05, WAIT_S):  # closed after the pause, and in it
        monkeypatch.setattr(listening, "PAUSE_S", pause_s)
        caplog.clear()
        with socket.socket() as sock:
            sock.settimeout(WAIT_S)
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            try:
                sock.connect(("127.0.0.1", running.admin.port))
                wait_until(lambda: "can't accept" in caplog.text)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            if pause_s < WAIT_S:
                sock.sendall(REQUEST)
                assert answer_on(sock)[0] == 200
        running.wait_until_free()


def test_where_it_listens_is_logged(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO)
    with Running() as running:
        wait_until(lambda: caplog.messages)
        assert caplog.messages == [f"listening on 127.0.0.1:{running.admin.port} for --admin"]
    caplog.clear()
    with Running(f"unix:{tmp_path}/a"):
        wait_until(lambda: caplog.messages == [f"listening on unix:{tmp_path}/a for --admin"])


def test_closed_before_it_is_open_and_twice() -> None:
    loop = Loop()
    admin = Admin(loop, Address("127.0.0.1", 0), PAGES)
    admin.close()
    admin.open()
    admin.close()
    admin.close()
    loop.close()


def test_it_brings_nothing_heavy_into_memory() -> None:
    code = (
        "import sys, snitun_sync.client; before = set(sys.modules);"
        "import snitun_sync.net.admin, snitun_sync.net.openmetrics;"
        "print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    brought = {f"snitun_sync.net.{name}" for name in ("admin", "listening", "openmetrics")}
    brought.add("snitun_sync.protocol.http_head")
    assert set(done.stdout.split()) == brought
