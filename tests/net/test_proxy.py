"""The way out through a proxy: real ones, and ones that answer anything but what they should."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import socket
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snitun_sync.errors import UsageError
from snitun_sync.net.dialing import blocking_dial
from snitun_sync.net.proxy import MAX_HEAD_BYTES, Proxy, parse_proxy
from snitun_sync.protocol.names import Address
from tests.interop.peers import missing
from tests.support import WAIT_S, Program, free_port, reset, wait_until

RELAY = Address("relay.example", 8443)
BEHIND = b"the relay's first bytes"
USER = "user"
WRONG_LOGIN = "refuses the user or password"
NO_LOGIN = "wants a user and password"
HTTP_OK = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy\r\n\r\n"
SOCKS_OK = b"\5\0" + b"\5\0\0\1\x7f\0\0\1\0\x50"
SOCKS_LOGIN_OK = b"\5\2\1\0" + SOCKS_OK[2:]


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    wait_until(lambda: sorted(os.listdir("/proc/self/fd")) == before, "all descriptors are closed")


# --- as text ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown", "user", "password"),
    [
        ("http://proxy.example", "http://proxy.example:1080", b"", b""),
        ("HTTP://proxy.example:3128/", "http://proxy.example:3128", b"", b""),
        ("http://[::1]", "http://[::1]:1080", b"", b""),
        ("socks5://[2001:db8::1]:9", "socks5://[2001:db8::1]:9", b"", b""),
        ("socks5h://192.0.2.1", "socks5://192.0.2.1:1080", b"", b""),
        ("http://me@proxy.example:80", "http://proxy.example:80", b"me", b""),
        ("http://@proxy.example:80", "http://proxy.example:80", b"", b""),
        ("http://me:a:b@proxy.example", "http://proxy.example:1080", b"me", b"a:b"),
        ("http://me:a@b/c%@proxy.example", "http://proxy.example:1080", b"me", b"a@b/c%"),
        ("http://m%65%3a:%40%ff%C3%a4ä%zz@h:1", "http://h:1", b"me:", b"@\xff\xc3\xa4\xc3\xa4%zz"),
        ("http://me:\udcff@h:1", "http://h:1", b"me", b"\xff"),  # as in sys.argv
    ],
)
def test_proxies_as_text(text: str, shown: str, user: bytes, password: bytes) -> None:
    proxy = parse_proxy(text)
    assert str(proxy) == shown
    assert (proxy._user, proxy._password) == (user, password)


def test_a_password_of_its_own_overrides() -> None:
    for text in ("http://me@h:1", "http://me:other@h:1"):
        assert parse_proxy(text, password="s%65cret \r\n")._password == b"s%65cret "
    assert parse_proxy("http://me:other@h:1", password="")._password == b""
    assert parse_proxy("http://h:1", password="\n")._password == b""


@pytest.mark.parametrize(
    ("text", "password", "words"),
    [
        ("", None, "no scheme"),
        ("proxy.example:3128", None, "no scheme"),
        ("me:hunter2@proxy.example:3128", None, "no scheme"),
        ("me:hunter2://@proxy.example:3128", None, "no scheme"),
        ("https://me:hunter2@proxy.example", None, "the scheme 'https'"),
        ("socks4://me:hunter2@proxy.example", None, "the scheme 'socks4'"),
        ("http://", None, "no HOST or HOST:PORT behind http://"),
        ("http://me:hunter2", None, "no HOST or HOST:PORT behind http://"),
        ("http://me:hunter2@", None, "no HOST or HOST:PORT behind http://"),
        ("http://me:hunter2@:3128", None, "no HOST or HOST:PORT behind http://"),
        ("http://me:hunter2@proxy.example:0", None, "no HOST or HOST:PORT"),
        ("http://me:hunter2@proxy.example:65536", None, "no HOST or HOST:PORT"),
        ("http://me:hunter2@proxy.example/path", None, "no HOST or HOST:PORT"),
        ("http://me:hunter2@2001:db8::1", None, "no HOST or HOST:PORT"),
        ("socks5://me:hunter2@unix:/tmp/socket", None, "no HOST or HOST:PORT behind socks5://"),
        ("http://proxy.example", "hunter2", "a password without a user"),
        ("http://:hunter2@proxy.example", None, "a password without a user"),
        (f"socks5://me:{'hunter2' * 40}@h", None, "more than 255 bytes"),
        ("socks5://me@h", "hunter2" * 40, "more than 255 bytes"),
        (f"socks5://{'me' * 128}:hunter2@h", None, "more than 255 bytes"),
    ],
)
def test_what_is_no_proxy(text: str, password: str | None, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_proxy(text, password=password)
    message = str(caught.value)
    assert message.startswith("--proxy: ")
    assert words in message
    assert "expected http://[USER[:PASSWORD]@]HOST[:PORT] or socks5://" in message
    assert "hunter2" not in message
    assert "me" not in message.replace("scheme", "").split(";")[0].split()


def test_the_longest_login_for_socks() -> None:
    login, sock = "x" * 255, Answers(SOCKS_LOGIN_OK)
    with sock:
        sock.open(parse_proxy(f"socks5://{login}:{login}@h"))
        field = b"\xff" + login.encode()
        assert sock.sent().startswith(b"\5\2\0\2\1" + field + field)


# --- proxies by hand --------------------------------------------------------------------


class Answers:
    """A connection to a proxy that gives one answer, whatever it is asked, and then ends."""

    def __init__(self, answer: bytes = b"", *, is_ended: bool = True) -> None:
        self.sock, self.far = socket.socketpair()
        self.far.sendall(answer)
        if is_ended:
            self.far.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        self.far.close()

    def open(self, proxy: Proxy, address: Address = RELAY, timeout_s: float = WAIT_S) -> None:
        proxy.blocking_open(self.sock, address, time.monotonic() + timeout_s)

    def sent(self) -> bytes:
        """Return all that the proxy was sent."""
        self.sock.shutdown(socket.SHUT_WR)
        data = b""
        while piece := self.far.recv(65536):
            data += piece
        return data

    def rest(self) -> bytes:
        """Return what the answer was followed by, and was left in the socket."""
        self.sock.setblocking(True)
        data = b""
        while piece := self.sock.recv(65536):
            data += piece
        return data


def proxy_for(scheme: str, login: str = "") -> Proxy:
    return parse_proxy(f"{scheme}://{login}proxy.example:3128")


def failure(proxy: Proxy, answer: bytes, address: Address = RELAY, **options: float) -> str:
    """Return what `blocking_open` says about this answer, behind the proxy's name."""
    with Answers(answer) as sock, pytest.raises(OSError, match=r"^the proxy ") as caught:
        sock.open(proxy, address, **options)
    start = f"the proxy {proxy} "
    assert str(caught.value).startswith(start)
    assert "hunter2" not in str(caught.value)
    return str(caught.value)[len(start) :]


@pytest.mark.parametrize(
    ("host", "target"),
    [
        ("relay.example", b"relay.example:8443"),
        ("192.0.2.1", b"192.0.2.1:8443"),
        ("2001:db8:0::1", b"[2001:db8::1]:8443"),
        ("fe80::1%eth0", b"[fe80::1]:8443"),  # the zone is this machine's own
    ],
)
def test_what_an_http_proxy_is_asked(host: str, target: bytes) -> None:
    for login, line in (
        ("", b""),
        # RFC 7617, section 2
        (
            "Aladdin:open%20sesame@",
            b"Proxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n",
        ),
    ):
        with Answers(HTTP_OK + BEHIND) as sock:
            sock.open(proxy_for("http", login), Address(host, 8443))
            assert not sock.sock.getblocking()
            request = b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (target, target, line)
            assert sock.sent() == request
            assert sock.rest() == BEHIND


@pytest.mark.parametrize(
    ("host", "target"),
    [
        ("relay.example", b"\3\x0drelay.example"),
        ("192.0.2.1", b"\1\xc0\0\2\1"),
        ("2001:db8::1", b"\4\x20\1\x0d\xb8" + bytes(11) + b"\1"),
    ],
)
def test_what_a_socks_proxy_is_asked(host: str, target: bytes) -> None:
    request = b"\5\1\0" + target + b"\x20\xfb"
    for login, answer, greeting in (
        ("", SOCKS_OK, b"\5\1\0"),
        ("me:secret@", SOCKS_OK, b"\5\2\0\2"),
        ("me:secret@", SOCKS_LOGIN_OK, b"\5\2\0\2" + b"\1\2me\6secret"),
        ("me@", SOCKS_LOGIN_OK, b"\5\2\0\2" + b"\1\2me\0"),
    ):
        with Answers(answer + BEHIND) as sock:
            sock.open(proxy_for("socks5", login), Address(host, 8443))
            assert not sock.sock.getblocking()
            assert sock.sent() == greeting + request
            assert sock.rest() == BEHIND


@pytest.mark.parametrize("host", ["::1\r\nX: y", "::1\0", "::zz", ":" * 50])
def test_nothing_can_be_smuggled_in(host: str) -> None:
    for scheme in ("http", "socks5"):
        with Answers(b"\5\0") as sock:
            with pytest.raises(
                OSError, match=r"^the proxy .* can't be asked for .* no IPv6 address"
            ):
                sock.open(proxy_for(scheme), Address(host, 8443))
            assert b"X" not in sock.sent()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200\r\n\r\n",
        b"HTTP/1.1 299 \r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\n\n",
        b"HTTP/1.1 200 OK\r\nX: \xff\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: ".ljust(MAX_HEAD_BYTES - 4, b"x") + b"\r\n\r\n",
    ],
)
def test_answers_of_http_that_are_good(answer: bytes) -> None:
    with Answers(answer + BEHIND) as sock:
        sock.open(proxy_for("http"))
        assert sock.rest() == BEHIND


@pytest.mark.parametrize(
    "bound", [b"\1" + bytes(4), b"\4" + bytes(16), b"\3\0", b"\3\xff" + bytes(255)]
)
def test_answers_of_socks_that_are_good(bound: bytes) -> None:
    with Answers(b"\5\0\5\0\0" + bound + b"\0\0" + BEHIND) as sock:
        sock.open(proxy_for("socks5"))
        assert sock.rest() == BEHIND


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 403 Forbidden by rule 7\r\n\r\n<html>", "answered 403 Forbidden by rule 7"),
        (b"HTTP/1.1 502\r\n\r\n", "answered 502"),
        (b"HTTP/1.1 301 \r\n\r\n", "answered 301"),
        (b"HTTP/1.1 500 a\x1b[2J\xffb\r\n\r\n", "answered 500 a?[2J?b"),
        (b"HTTP/1.1 500 " + b"x" * 99 + b"\r\n\r\n", "answered 500 " + "x" * 60),
        (b"HTTP/2 200 OK\r\n\r\n", "sent no answer of HTTP/1; is it an HTTP proxy?"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "sent no answer of HTTP/1; is it an HTTP proxy?"),
        (b"HTTP/1.1\r\n\r\n", "sent no answer of HTTP/1; is it an HTTP proxy?"),
        (b"X\r\nHTTP/1.1 200 OK\r\n\r\n", "sent no answer of HTTP/1; is it an HTTP proxy?"),
        (b"\r\n\r\n", "sent no answer of HTTP/1; is it an HTTP proxy?"),
        (
            b"HTTP/1.1 200 OK\r\nX: ".ljust(MAX_HEAD_BYTES * 2, b"x"),
            "sent a head of more than 16384",
        ),
        (b"x" * MAX_HEAD_BYTES + b"\r\n\r\n", "sent a head of more than 16384 bytes"),
    ],
)
def test_answers_of_http_that_are_not(answer: bytes, words: str) -> None:
    said = failure(proxy_for("http", "me:hunter2@"), answer)
    assert said == words or (words.startswith("sent a head") and said.startswith(words))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\4\0", "sent no answer of SOCKS5; is it a SOCKS5 proxy?"),
        (HTTP_OK, "sent no answer of SOCKS5; is it a SOCKS5 proxy?"),
        (b"\5\0\4\0\0\1", "sent a malformed answer"),
        (b"\5\0\5\0\0\2", "sent a malformed answer"),
        (b"\5\0\5\0\0\0", "sent a malformed answer"),
        (b"\5\0\5\1\0\0", "can't connect: general failure"),  # without an address, as some do
        (b"\5\0\5\2\0\1", "can't connect: not allowed by its rules"),
        (b"\5\0\5\3\0\1", "can't connect: network unreachable"),
        (b"\5\0\5\4\0\1", "can't connect: host unreachable"),
        (b"\5\0\5\5\0\1", "can't connect: connection refused"),
        (b"\5\0\5\6\0\1", "can't connect: time to live expired"),
        (b"\5\0\5\7\0\1", "can't connect: command not supported"),
        (b"\5\0\5\x08\0\1", "can't connect: address type not supported"),
        (b"\5\0\5\x09\0\1", "can't connect: reply code 9"),
        (b"\5\0\5\xff\0\1", "can't connect: reply code 255"),
    ],
)
def test_answers_of_socks_that_are_not(answer: bytes, words: str) -> None:
    assert failure(proxy_for("socks5"), answer) == words


def test_logins_that_fail() -> None:
    for status in (b"407 Proxy Authentication Required", b"401 Unauthorized"):
        answer = b"HTTP/1.1 %b\r\n\r\n" % status
        assert failure(proxy_for("http"), answer) == NO_LOGIN
        assert failure(proxy_for("http", "me:hunter2@"), answer) == WRONG_LOGIN
    for answer in (b"\5\xff", b"\5\2", b"\5\1"):
        assert failure(proxy_for("socks5"), answer) == NO_LOGIN
    for answer in (b"\5\xff", b"\5\1"):
        assert failure(proxy_for("socks5", "me:hunter2@"), answer) == "takes no user and password"
    assert failure(proxy_for("socks5", "me:hunter2@"), b"\5\2\1\1") == WRONG_LOGIN


@pytest.mark.parametrize(
    ("scheme", "login", "answer"),
    [
        ("http", "", HTTP_OK),
        ("socks5", "", SOCKS_OK),
        ("socks5", "me:hunter2@", SOCKS_LOGIN_OK),
        ("socks5", "", b"\5\0\5\0\0\3\5proxy\0\0"),
    ],
)
def test_answers_in_pieces_and_cut_short(scheme: str, login: str, answer: bytes) -> None:
    proxy = proxy_for(scheme, login)
    closed = "closed the connection before its answer was complete"
    for size in range(len(answer)):
        assert failure(proxy, answer[:size]) == closed, answer[:size]

    with Answers(is_ended=False) as sock:
        taken = threading.Event()

        def feed() -> None:
            for at in range(len(answer)):
                sock.far.sendall(answer[at : at + 1])
                wait_until(lambda: not waiting_bytes(sock.sock), "the byte is taken")
            taken.set()
            sock.far.sendall(BEHIND)
            sock.far.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=feed)
        thread.start()
        sock.open(proxy)
        thread.join(WAIT_S)
        assert taken.is_set()
        assert sock.rest() == BEHIND


def waiting_bytes(sock: socket.socket) -> int:
    """Return how many bytes can be read."""
    buffer = bytearray(4)
    fcntl.ioctl(sock, termios.FIONREAD, buffer)
    return int.from_bytes(buffer, sys.byteorder)


@pytest.mark.parametrize(
    ("scheme", "answer"),
    [("http", b""), ("http", HTTP_OK[:-1]), ("socks5", b""), ("socks5", SOCKS_OK[:-1])],
)
def test_silence_until_the_deadline(scheme: str, answer: bytes) -> None:
    proxy = proxy_for(scheme)
    with Answers(answer, is_ended=False) as sock:
        with pytest.raises(OSError, match=f"^the proxy {proxy} sent no whole answer in time"):
            sock.open(proxy, timeout_s=0.05)
    with Answers(HTTP_OK) as sock:
        with pytest.raises(OSError, match="in time"):
            sock.open(proxy, timeout_s=-1)
        assert sock.sent() == b"", "the deadline had passed before"


def test_headers_without_end_and_a_deadline() -> None:
    """Each line comes in time, and there would be room for minutes of them."""
    with Answers(b"HTTP/1.1 200 OK\r\n", is_ended=False) as sock:
        is_over = threading.Event()

        def drip() -> None:
            while not is_over.wait(0.01):
                sock.far.sendall(b"X")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(OSError, match="in time"):
                sock.open(proxy_for("http"), timeout_s=0.2)
        finally:
            is_over.set()
            thread.join()


def test_a_proxy_that_takes_nothing() -> None:
    """The request can't be sent as long as nobody reads."""
    with Answers(is_ended=False) as sock:
        sock.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                sock.sock.send(bytes(65536))
        with pytest.raises(OSError, match="in time"):
            sock.open(proxy_for("http"), timeout_s=0.05)


def test_a_proxy_that_resets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = parse_proxy(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with socket.create_connection(listener.getsockname()) as sock:
            reset(listener.accept()[0])
            words = f"^the proxy {proxy} failed: (Connection reset by peer|Broken pipe)$"
            with pytest.raises(OSError, match=words):
                proxy.blocking_open(sock, RELAY, time.monotonic() + WAIT_S)


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_any_answer_is_good_or_raises_an_error_with_the_proxy_s_name(scheme: str) -> None:
    """Whatever is answered: `blocking_open` returns, or raises that error; nothing else."""
    chance = random.Random(1)
    good = {"http": HTTP_OK, "socks5": SOCKS_LOGIN_OK}[scheme]
    proxy, outcomes = proxy_for(scheme, "me:hunter2@"), set()
    for _ in range(1500):
        answer = bytearray(good)
        for _ in range(chance.randrange(3)):
            answer[chance.randrange(len(answer))] = chance.randrange(256)
        with Answers(bytes(answer[: chance.randrange(2 * len(answer))])) as sock:
            try:
                sock.open(proxy)
                outcomes.add("good")
            except OSError as error:
                assert str(error).startswith(f"the proxy {proxy} ")
                assert "hunter2" not in str(error)
                outcomes.add("bad")
    assert outcomes == {"good", "bad"}


# --- dialling through a proxy ---------------------------------------------------------


def test_a_proxy_that_can_t_be_reached() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        proxy = parse_proxy(f"http://me:hunter2@127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(OSError, match=r"can't be reached: Connection refused$") as caught:
            blocking_dial(RELAY, WAIT_S, proxy)
        assert str(caught.value).startswith(f"the proxy {proxy} ")


def test_the_socket_to_a_proxy_that_fails_is_closed() -> None:
    """(What it would leave is an open descriptor.)"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = parse_proxy(f"socks5://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(OSError, match="in time"):
            blocking_dial(RELAY, 0.1, proxy)
        with listener.accept()[0] as sock:
            assert sock.recv(100) == b"\5\1\0"
            assert sock.recv(100) == b""


# --- real proxies ----------------------------------------------------------------------


class Echo:
    """A relay's place: greets whoever comes and sends back what it gets."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family)
        self.port: int = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join(WAIT_S)
        self.listener.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(ConnectionError):
                sock.sendall(BEHIND)
                while data := sock.recv(65536):
                    sock.sendall(data)


def start(*command: str | Path, port: int) -> Program:
    """Run a proxy of the system; return it once it listens."""
    if shutil.which(str(command[0])) is None:
        missing(str(command[0]))
    program = Program(*command)

    def is_up() -> bool:
        assert program.process.poll() is None, program.output
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(is_up, f"{command[0]} listens")
    except BaseException:
        program.stop()
        raise
    return program


@pytest.fixture(params=["http", "http with login", "socks5", "socks5 with login"])
def real_proxy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int, str]]:
    """A real proxy: its scheme, its port, and the password of USER if it wants one."""
    scheme, _, has_login = request.param.partition(" with ")
    password, port = "", free_port()
    if scheme == "http":
        file, login = tmp_path / "tinyproxy.conf", ""
        if has_login:
            password = "pass-word"  # letters, digits and -._ are all that it can read
            login = f"BasicAuth {USER} {password}\n"
        file.write_text(f"Port {port}\nListen 127.0.0.1\nTimeout 60\n{login}")
        program = start("tinyproxy", "-d", "-c", file, port=port)
    else:
        password = "p@ss: w/rd%41ä" if has_login else ""
        login_options = ["-u", USER, "-P", password] if has_login else []
        program = start("microsocks", "-i", "127.0.0.1", "-p", str(port), *login_options, port=port)
    with program:
        yield scheme, port, password


def test_through_a_real_proxy(real_proxy: tuple[str, int, str]) -> None:
    scheme, port, password = real_proxy
    login = f"{USER}@" if password else ""
    proxy = parse_proxy(f"{scheme}://{login}localhost:{port}", password=password)
    for listening, host in (("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "localhost"), ("::1", "::1")):
        with (
            Echo(listening) as echo,
            blocking_dial(Address(host, echo.port), WAIT_S, proxy) as sock,
        ):
            assert not sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            sock.settimeout(WAIT_S)
            sock.sendall(b"ping")
            data = b""
            while len(data) < len(BEHIND) + 4:
                piece = sock.recv(65536)
                assert piece, data
                data += piece
            assert data == BEHIND + b"ping"

    with pytest.raises(OSError, match=f"^the proxy {scheme}://localhost:{port} ") as caught:
        blocking_dial(Address("127.0.0.1", free_port()), WAIT_S, proxy)
    expected = {"http": "answered 500 ", "socks5": "can't connect: connection refused"}[scheme]
    assert expected in str(caught.value)


def test_a_real_proxy_and_a_wrong_login(real_proxy: tuple[str, int, str]) -> None:
    scheme, port, password = real_proxy
    with Echo("127.0.0.1") as echo:
        address = Address("127.0.0.1", echo.port)
        for login, words in (("", NO_LOGIN), (f"{USER}:wrong@", WRONG_LOGIN)):
            proxy = parse_proxy(f"{scheme}://{login}127.0.0.1:{port}")
            if password:
                with pytest.raises(OSError, match=f"^the proxy {proxy} {words}$"):
                    blocking_dial(address, WAIT_S, proxy)
            else:  # a login that nobody asked for does no harm
                blocking_dial(address, WAIT_S, proxy).close()
