"""How the service is, for people and monitors: GET over HTTP/1.1 (RFC 9110, 9112), on the loop.

A connection carries one request. What can be reached from other machines takes a token
(RFC 6750). Without one a web page must not come in by a name of its own that leads to
this machine (DNS rebinding): the Host header is an IP address, localhost or the name
that is listened on.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat

from ..errors import ConfigurationError, ListenError, ViolationError
from ..protocol.aes import load
from ..protocol.names import normal_hostname, parse_address
from .loop import READ, WRITE, Handler
from .sockets import host_text, listen, numeric_places, pack_ip
from .tuning import DRAIN_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..protocol.names import Address
    from .loop import Loop, Timer

    Answer = tuple[int, str, str]
    """Status, content type and body."""
    Fields = dict[str, list[str]]
    """Header fields: the name in lower case, and its values in the order they came."""

log = logging.getLogger("snitun_sync")

TEXT = "text/plain; charset=utf-8"
CONNECTIONS = 16
REQUEST_BYTES = 8 * 1024
# From accept to the answer's last byte; DRAIN_S may follow.
REQUEST_S = 10.0
SHORTEST_TOKEN = 16
UNIX_MODE = 0o660
# Out of descriptors or memory: accepting again at once would spin.
ACCEPT_PAUSE_S = 1.0

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_END = b"\r\n\r\n"
_CONTROLS = bytes(code for code in (*range(32), 127) if code != ord("\t"))
_NAME = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    421: "Misdirected Request",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
_MORE_FIELDS = {401: "WWW-Authenticate: Bearer\r\n", 405: "Allow: GET\r\n"}


def check(address: Address, token: str) -> None:
    """Tell what is wrong with --admin and its token before anything is opened.

    Raises ConfigurationError where other machines could come in without a token, or the
    token is no good one. What a name stands for is seen later, by `Admin.open`.
    """
    text = token.strip()
    if token and (len(text) < SHORTEST_TOKEN or not (text.isascii() and text.isprintable())):
        raise ConfigurationError(
            f"--admin-token-file: a text of {len(text)} characters; expected one line "
            f"of {SHORTEST_TOKEN} or more, all of them printable ASCII"
        )
    if not address.path:
        hosts = [place[0] for _, place in numeric_places(address)] if address.host else [""]
        _check_hosts(address, token, hosts)


def _check_hosts(address: Address, token: str, hosts: Sequence[str]) -> None:
    if not token and not all(map(_is_loopback, hosts)):
        raise ConfigurationError(
            f"--admin: {address} can be reached from other machines; expected a loopback "
            "address, or --admin-token-file as well"
        )


class Admin:
    """Listens on one address, and answers GET of some paths."""

    def __init__(
        self,
        loop: Loop,
        address: Address,
        pages: dict[str, Callable[[], Answer]],
        *,
        token: str = "",
    ) -> None:
        """`pages` has a function for each path; it is called on the loop, and must not block.

        With a `token`, the text of the file, all requests need it. "" is none: who reads an
        empty file must not come here with it.
        """
        self.loop, self.address = loop, address
        self.port = 0
        """What is listened on once it is open; 0 for a unix socket."""
        self.connections: dict[Connection, None] = {}  # the oldest first
        self._pages, self._token = pages, token
        # Digests under this key can be compared by ==: how long it takes tells nothing.
        self._key, self._expected = os.urandom(32), b""
        self._listeners: list[Listener] = []
        self._own_file: tuple[int, int] | None = None

    def open(self) -> None:
        """Listen; on the caller's thread, before the loop runs.

        Raises ListenError, and ConfigurationError as `check` does.
        """
        check(self.address, self._token)
        self._expected = self._digest(self._token.strip())
        path = self.address.path
        try:
            sockets = [_listen_unix(path)] if path else listen(self.address)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            reason = getattr(error, "strerror", None) or error
            raise ListenError(f"--admin: can't listen on {self.address}: {reason}") from None
        self._listeners = [Listener(self, sock) for sock in sockets]
        if path:
            self._own_file = _identity(path)
            return
        places = [sock.getsockname() for sock in sockets]
        try:
            _check_hosts(self.address, self._token, [place[0] for place in places])
        except ConfigurationError:
            self.close()
            raise
        self.port = places[0][1]

    def begin(self) -> None:
        """Begin to accept; on the loop's thread."""
        for listener in self._listeners:
            listener.listen()
        address = self.address
        where = address if address.path else host_text(address.host or "*", self.port)
        log.info("listening on %s for --admin", where)

    def close(self) -> None:
        """Free all that is owned, the unix socket's path as well if it is still ours."""
        if self._own_file is not None:
            # While the socket is open, no other file can have its number.
            if _identity(self.address.path) == self._own_file:
                try:
                    os.unlink(self.address.path)
                except OSError:
                    pass  # the next one to listen replaces it
            self._own_file = None
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for connection in tuple(self.connections):
            connection.close()

    def has_room(self) -> bool:
        """Tell whether one more connection can be served; the oldest may have to give way."""
        if len(self.connections) >= CONNECTIONS:
            for connection in self.connections:
                if not connection.is_answering:
                    connection.close()
                    break
        return len(self.connections) < CONNECTIONS

    def answer(self, head: bytes) -> Answer:
        """Return the answer to a request, given without the empty line at its end."""
        try:
            method, target, fields = _parse(head)
        except ViolationError as error:
            return _refusal(400, str(error))
        if self._token:
            if not self._has_token(fields):
                return _refusal(401, "expected Authorization: Bearer, and the token")
        elif not self.address.path and not self._has_known_host(fields):
            return _refusal(
                421, "expected one Host: an IP address, localhost or the name listened on"
            )
        if method != "GET":
            return _refusal(405, "expected GET")
        if "transfer-encoding" in fields or set(fields.get("content-length", ())) - {"0"}:
            return _refusal(400, "a body; expected none")
        path = target.partition("?")[0]
        page = self._pages.get(path)
        if page is None:
            return _refusal(404, f"expected one of {' '.join(self._pages)}")
        try:
            return page()
        except Exception:
            log.exception("defect in the --admin page %s", path)
            return _refusal(500, "a defect; the log has more")

    def _digest(self, token: str) -> bytes:
        # Not by hmac, which would bring OpenSSL into the client's memory.
        return load().sha256(self._key + token.encode("latin-1"))

    def _has_token(self, fields: Fields) -> bool:
        values = fields.get("authorization", ())
        if len(values) != 1:
            return False
        scheme, _, token = values[0].partition(" ")
        return scheme.lower() == "bearer" and self._digest(token.strip()) == self._expected

    def _has_known_host(self, fields: Fields) -> bool:
        values = fields.get("host", ())
        if len(values) != 1:
            return False
        try:
            host = normal_hostname(parse_address(values[0], "Host", default_port=80).host)
            if host not in ("localhost", normal_hostname(self.address.host)):
                pack_ip(host)
        except (ConfigurationError, OSError):
            return False
        return True


class Listener(Handler):
    """One socket that listens."""

    __slots__ = ("_admin", "_pause")

    def __init__(self, admin: Admin, sock: socket.socket) -> None:
        super().__init__(sock)
        self._admin = admin
        self._pause: Timer | None = None

    def listen(self) -> None:
        """Begin to accept, or go on."""
        self._admin.loop.watch(self, READ)

    def close(self) -> None:
        """Listen no longer."""
        if self._pause is not None:
            self._pause.cancel()
        self._admin.loop.close_socket(self)

    def on_ready(self, events: int) -> None:
        # One in a turn: whoever has sent its request is served before it would have to give way.
        assert self.sock is not None
        try:
            sock, _ = self.sock.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                log.error("--admin: can't accept: %s", error)
                self._admin.loop.watch(self, 0)
                self._pause = self._admin.loop.call_later(ACCEPT_PAUSE_S, self.listen)
            return  # else it is gone already
        if self._admin.has_room():
            Connection(self._admin, sock)
        else:
            sock.close()

    def fail(self, error: Exception) -> None:
        pass  # the loop has logged it; the other connections are not to blame


class Connection(Handler):
    """Someone who asks: the request is read, the answer written, and what still comes drained."""

    __slots__ = ("_admin", "_is_answered", "_received", "_timer", "_unsent")

    def __init__(self, admin: Admin, sock: socket.socket) -> None:
        super().__init__(sock)
        sock.setblocking(False)
        self._admin = admin
        self._received = bytearray()
        self._is_answered = False
        self._unsent = memoryview(b"")
        self._timer: Timer = admin.loop.call_later(REQUEST_S, self.close)
        admin.connections[self] = None
        admin.loop.watch(self, READ)

    @property
    def is_answering(self) -> bool:
        """The answer is being written: this one can't give way to another."""
        return len(self._unsent) > 0

    def close(self) -> None:
        """Free all that is owned."""
        self._timer.cancel()
        self._admin.loop.close_socket(self)
        self._unsent = memoryview(b"")
        self._admin.connections.pop(self, None)

    def fail(self, error: Exception) -> None:
        self.close()

    def on_ready(self, events: int) -> None:
        assert self.sock is not None
        if events & WRITE:
            self._write()
            return
        data = memoryview(b"")
        try:
            data = self._admin.loop.receive(self.sock, REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            pass
        if not data:
            self.close()
        elif not self._is_answered:
            self._received += data
            self._read()

    def _read(self) -> None:
        end = self._received.find(_END)
        size = len(self._received) if end < 0 else end + len(_END)
        if size > REQUEST_BYTES:
            self._send(_refusal(431, f"more than {REQUEST_BYTES} bytes"))
        elif end >= 0:
            self._send(self._admin.answer(bytes(self._received[:end])))

    def _send(self, answer: Answer) -> None:
        status, kind, text = answer
        body = text.encode(errors="replace")
        head = (
            f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\n"
            f"Content-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\n"
            f"{_MORE_FIELDS.get(status, '')}"
            "Cache-Control: no-store\r\n"
            "X-Content-Type-Options: nosniff\r\n"
            "Connection: close\r\n\r\n"
        ).encode()
        if self._received.startswith(b"HEAD "):
            body = b""  # whatever the status (RFC 9110, 9.3.2)
        self._received.clear()
        self._is_answered = True
        self._unsent = memoryview(head + body)
        self._write()

    def _write(self) -> None:
        assert self.sock is not None
        loop = self._admin.loop
        try:
            self._unsent = self._unsent[self.sock.send(self._unsent) :]
            if not self._unsent:
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._unsent:
            loop.watch(self, WRITE)
        else:
            # Closed with something unread, the socket would send a reset, and that may
            # overtake the answer.
            loop.watch(self, READ)
            self._timer.cancel()
            self._timer = loop.call_later(DRAIN_S, self.close)


def _refusal(status: int, reason: str) -> Answer:
    return status, TEXT, f"{_REASONS[status]}: {reason}\n"


def _parse(head: bytes) -> tuple[str, str, Fields]:
    """Return method, target and fields of a request (RFC 9112, 3 and 5). Raises ViolationError."""
    bare = head.replace(b"\r\n", b"")
    if bare.translate(None, _CONTROLS) != bare:
        raise ViolationError("a control character; expected none but CR LF at the end of a line")
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.0", "HTTP/1.1") or words[1][:1] != "/":
        raise ViolationError("the first line; expected GET /PATH HTTP/1.1")
    fields: Fields = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        # This refuses lines that continue another one, too: they begin with a space.
        if not name or not colon or not _NAME.issuperset(name):
            raise ViolationError("a line of the header; expected NAME: VALUE")
        fields.setdefault(name, []).append(value.strip(" \t"))
    return words[0], words[1], fields


def _is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")


def _listen_unix(path: str) -> socket.socket:
    """Return a socket that listens on `path`; one that was left there gives way. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(path)
        os.chmod(path, UNIX_MODE)  # before `listen`: until then nobody can connect
        sock.listen(CONNECTIONS)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Remove the socket at `path` if nobody listens on it. Raises OSError where that isn't so."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError("what is there is no socket; expected a free path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code in (0, errno.EAGAIN):  # EAGAIN: its queue is full
        raise OSError("another program listens on it already")
    if code != errno.ECONNREFUSED:
        raise OSError(code, os.strerror(code))
    os.unlink(path)


def _identity(path: str) -> tuple[int, int] | None:
    """Return what tells a file from all others; None where there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
