"""One request over HTTP and TLS: a real server, and ones that answer what they shouldn't."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Callable

import pytest
import trustme

from snitun_sync.errors import ConfigurationError, UsageError
from snitun_sync.net.https import Answer, blocking_request, parse_url
from tests.services import ConnectProxy, refusing_port
from tests.support import WAIT_S, wait_until

OPTION = "--master"
LIMIT = 4096
AUTHORITY = trustme.CA()
Serve = Callable[[socket.socket], object]


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    wait_until(lambda: sorted(os.listdir("/proc/self/fd")) == before, "all descriptors are closed")


@pytest.fixture
def ca_file(tmp_path: Path) -> str:
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


def server_context(*names: str, days: tuple[int, int] = (-1, 1)) -> ssl.SSLContext:
    """Return a server's side of TLS, with a certificate that is valid between two days from now."""
    now = datetime.datetime.now(datetime.timezone.utc)
    before, after = (now + datetime.timedelta(days=count) for count in days)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert(
        *(names or ("localhost", "127.0.0.1")), not_before=before, not_after=after
    ).configure_cert(context)
    return context


@contextlib.contextmanager
def answering(serve: Serve, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Listen, and call `serve` with each connection, TLS ended; yield the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.settimeout(WAIT_S)
            with contextlib.suppress(OSError):
                if context is not None:
                    sock = context.wrap_socket(sock, server_side=True)
                serve(sock)
            sock.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)
        listener.close()
        assert not thread.is_alive()


def head(sock: socket.socket) -> bytes:
    """Read a request's head."""
    data = b""
    while b"\r\n\r\n" not in data and (piece := sock.recv(4096)):
        data += piece
    return data


def saying(text: bytes) -> Serve:
    def serve(sock: socket.socket) -> None:
        head(sock)
        sock.sendall(text)

    return serve


def ask(url: str, path: str = "/v1", *, timeout_s: float = WAIT_S, ca_file: str = "") -> Answer:
    return blocking_request(
        parse_url(url, OPTION), path, ca_file=ca_file, timeout_s=timeout_s, limit_bytes=LIMIT
    )


# --- URLs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown", "path"),
    [
        ("https://master.example", "https://master.example", ""),
        ("HTTPS://Master.Example.:443/", "https://Master.Example.", ""),
        ("https://master.example:8443/a/b%20c/", "https://master.example:8443/a/b%20c", "/a/b%20c"),
        ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443", ""),
        ("https://[::1]/x", "https://[::1]/x", "/x"),
        ("http://localhost:8080", "http://localhost:8080", ""),
        ("http://127.1.2.3", "http://127.1.2.3", ""),
        ("http://[::1]:80", "http://[::1]", ""),
    ],
)
def test_urls(text: str, shown: str, path: str) -> None:
    url = parse_url(text, OPTION)
    assert (str(url), url.path) == (shown, path)
    assert str(parse_url(str(url), OPTION)) == shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "''; expected https"),
        ("master.example", "'master.example'; expected https"),
        ("ftp://me:secret@master.example", "a URL of another kind"),
        ("https:///path", "no host"),
        ("https://master.example/a b", "/a b'; expected"),
        ("https://master.example/a\r\nX: y", "expected https"),
        ("https://master.example/ä", "/ä'; expected"),
        ("https://me:secret@master.example", "user"),
        ("https://secret@master.example", "user"),
        ("https://master.example?secret", "query"),
        ("https://master.example/?secret", "query"),
        ("https://master.example/#secret", "query"),
        ("https://master.example:0", "port"),
        ("https://master example", "no host name"),
        ("http://master.example", "another machine"),
        ("http://127.0.0.1.example", "another machine"),
        ("http://192.0.2.1", "another machine"),
    ],
)
def test_what_is_no_url(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_url(text, OPTION)
    assert str(caught.value).startswith(f"{OPTION}: ")
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="the master's URL"):
        parse_url(text, "the master's URL")


# --- a real server ------------------------------------------------------------------------


class Echo(BaseHTTPRequestHandler):
    """Answers with what was asked, in the status of the path's end."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", "0"))
        body = f"{self.requestline}\n{self.headers}\n".encode() + self.rfile.read(size)
        status = int(self.path.rpartition("/")[2])
        self.send_response(status)
        self.send_header("ETag", '"7-abc"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status != 304:
            self.wfile.write(body)

    def log_request(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Echo) as http:
        http.socket = server_context().wrap_socket(http.socket, server_side=True)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield http.server_port
        finally:
            http.shutdown()
            thread.join(WAIT_S)


def test_requests_over_tls(server: int, ca_file: str) -> None:
    url = parse_url(f"https://localhost:{server}/base/", OPTION)
    answer = blocking_request(
        url,
        "/200",
        method="POST",
        headers={"Authorization": "Bearer id.secret"},
        body=b"{}",
        ca_file=ca_file,
        timeout_s=WAIT_S,
        limit_bytes=LIMIT,
    )
    assert answer.status == 200
    assert answer.headers["etag"] == '"7-abc"'
    lines = answer.body.decode().split("\n")
    assert lines[0].strip() == "POST /base/200 HTTP/1.1"
    assert f"Host: localhost:{server}" in lines
    assert "Authorization: Bearer id.secret" in lines
    assert "Content-Length: 2" in lines
    assert answer.body.endswith(b"{}")
    for status in (304, 401, 503, 302):  # redirects aren't followed
        assert ask(f"https://127.0.0.1:{server}", f"/{status}", ca_file=ca_file).status == status


def test_a_request_through_a_proxy(server: int, ca_file: str) -> None:
    from snitun_sync.net.proxy import parse_proxy

    with ConnectProxy() as proxy:
        answer = blocking_request(
            parse_url(f"https://localhost:{server}", OPTION),
            "/200",
            ca_file=ca_file,
            proxy=parse_proxy(f"http://{proxy.address}"),
            timeout_s=WAIT_S,
            limit_bytes=LIMIT,
        )
        assert (answer.status, proxy.targets) == (200, [f"localhost:{server}"])
        # Without TLS to this machine alone, and not to the proxy's.
        with answering(saying(b"HTTP/1.1 200 OK\r\n\r\n")) as port:
            blocking_request(
                parse_url(f"http://localhost:{port}", OPTION),
                "/",
                proxy=parse_proxy(f"http://{proxy.address}"),
                timeout_s=WAIT_S,
                limit_bytes=LIMIT,
            )
        assert len(proxy.targets) == 1


# --- certificates -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "days", "words"),
    [
        (("other.example",), (-1, 1), "its certificate isn't trusted: Hostname mismatch"),
        ((), (2, 3), r"by this machine's clock \(20.* UTC\) the certificate of localhost isn't"),
        ((), (-3, -2), r"by this machine's clock \(20.* UTC\) the certificate of localhost has"),
    ],
)
def test_certificates_that_are_not_right(
    ca_file: str, names: tuple[str, ...], days: tuple[int, int], words: str
) -> None:
    with answering(head, server_context(*names, days=days)) as port:
        with pytest.raises(ConnectionError, match=words) as caught:
            ask(f"https://localhost:{port}", ca_file=ca_file)
        assert str(caught.value).startswith(f"localhost:{port}: ")
        assert str(caught.value).endswith("is the clock right?") == (not names)


def test_a_certificate_of_an_unknown_authority() -> None:
    with (
        answering(head, server_context()) as port,
        pytest.raises(ConnectionError, match="what signed it goes into --master-ca"),
    ):
        ask(f"https://localhost:{port}")


def test_files_that_are_no_certificates(tmp_path: Path) -> None:
    path = tmp_path / "nothing.pem"
    with pytest.raises(OSError, match=f"--master-ca: can't read {path}: No such file"):
        ask("https://localhost:1", ca_file=str(path))
    path.write_text("nothing\n")
    with pytest.raises(OSError, match=f"--master-ca: {path} has no certificates"):
        ask("https://localhost:1", ca_file=str(path))


def test_servers_without_tls(ca_file: str) -> None:
    with answering(lambda sock: sock.sendall(b"HTTP/1.1 400 No\r\n\r\n")) as port:
        with pytest.raises(ConnectionError, match="TLS failed: wrong version number"):
            ask(f"https://localhost:{port}", ca_file=ca_file)
    with answering(lambda sock: None) as port, pytest.raises(ConnectionError):
        ask(f"https://localhost:{port}", ca_file=ca_file)
    with refusing_port() as port, pytest.raises(ConnectionError, match=f"127.0.0.1:{port}: Conn"):
        ask(f"https://127.0.0.1:{port}", ca_file=ca_file)


# --- answers ------------------------------------------------------------------------------


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("text", "body"),
    [
        (OK + b"Content-Length: 3\r\n\r\nabcdef", b"abc"),
        (OK + b"\r\nto the end", b"to the end"),
        (CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", b"abcde"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 0\r\n\r\n", b""),
        (OK + b"Content-Length: 4096\r\n\r\n" + bytes(LIMIT), bytes(LIMIT)),
        (OK + b"X: folded\r\n over lines\r\n\r\n", b""),
    ],
)
def test_answers(text: bytes, body: bytes) -> None:
    with answering(saying(text)) as port:
        answer = ask(f"http://127.0.0.1:{port}")
        assert (answer.status, answer.body) == (200, body)
        assert "\n" not in "".join(answer.headers.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "RemoteDisconnected|closed connection"),
        (b"SSH-2.0-OpenSSH\r\n", "no HTTP"),
        (OK, "."),
        (OK + b"Content-Length: 30\r\n\r\nabc", "lacks its last 27 bytes"),
        (CHUNKED + b"30\r\nabc", "cut short"),
        (CHUNKED + b"zz\r\nabc", "cut short"),
        (CHUNKED + b"-5\r\nabc", "cut short"),
        (CHUNKED + b"-1\r\n" + bytes(1_000_000), "more than 4096 bytes|cut short"),
        (OK + b"Content-Length: 4097\r\n\r\n" + bytes(LIMIT + 1), "4097 bytes, expected at most"),
        (OK + b"\r\n" + bytes(LIMIT + 1), "more than 4096 bytes"),
        (CHUNKED + b"1001\r\n" + bytes(4097) + b"\r\n0\r\n\r\n", "more than 4096 bytes"),
        (OK + b"X: y\r\n" * 200 + b"\r\n", "no HTTP"),
        (OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n", "no HTTP"),
    ],
)
def test_answers_that_are_not_whole(text: bytes, words: str) -> None:
    with answering(saying(text)) as port:
        if text == OK:  # who ends in its head says that there are no more fields
            assert ask(f"http://127.0.0.1:{port}").body == b""
            return
        with pytest.raises(ConnectionError, match=words) as caught:
            ask(f"http://127.0.0.1:{port}")
        assert str(caught.value).startswith(f"127.0.0.1:{port}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_tls", [False, True])
@pytest.mark.parametrize("start", [b"", OK, OK + b"\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_byte_now_and_then_is_no_answer(start: bytes, is_tls: bool, ca_file: str) -> None:
    def drip(sock: socket.socket) -> None:
        head(sock)
        sock.sendall(start)
        while not ended.wait(0.02):
            sock.sendall(start if start.startswith(b"HTTP/1.1 100") else b"a")

    ended = threading.Event()
    with answering(drip, server_context() if is_tls else None) as port:
        url = f"http{'s' * is_tls}://localhost:{port}"
        with pytest.raises(ConnectionError, match=r"no whole answer within 0.5 s"):
            ask(url, timeout_s=0.5, ca_file=ca_file)
        ended.set()


def test_silence_in_the_handshake_and_nothing_read(ca_file: str) -> None:
    ended = threading.Event()
    with answering(lambda sock: ended.wait(WAIT_S)) as port:
        with pytest.raises(ConnectionError, match="no whole answer"):
            ask(f"https://localhost:{port}", timeout_s=0.2, ca_file=ca_file)
        with pytest.raises(ConnectionError, match="no whole answer"):
            blocking_request(
                parse_url(f"http://localhost:{port}", OPTION),
                "/",
                method="POST",
                body=bytes(20_000_000),
                timeout_s=0.2,
                limit_bytes=LIMIT,
            )
        ended.set()


def test_a_request_can_be_ended_from_another_thread() -> None:
    sockets: list[socket.socket] = []
    asked, errors = threading.Event(), []

    def serve(sock: socket.socket) -> None:
        head(sock)
        asked.set()
        sock.recv(1)

    def run(port: int) -> None:
        url = parse_url(f"http://localhost:{port}", OPTION)
        try:
            options = {"timeout_s": 600.0, "limit_bytes": LIMIT}
            blocking_request(url, "/", opened=sockets.append, **options)  # type: ignore[arg-type]
        except OSError as error:
            errors.append(error)

    with answering(serve) as port:
        thread = threading.Thread(target=run, args=(port,))
        thread.start()
        assert asked.wait(WAIT_S)
        sockets[0].shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert len(errors) == 1
