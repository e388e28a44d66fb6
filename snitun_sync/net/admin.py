"""How the service is, for people and monitors: GET over HTTP/1.1 (RFC 9110, 9112), on the loop.

A connection carries one request. What can be reached from other machines takes a token
(RFC 6750). Without one a web page must not come in by a name of its own that leads to
this machine (DNS rebinding): the Host header is an IP address, localhost or the name
that is listened on.
"""

from __future__ import annotations

import logging
import os
import socket

from ..errors import ConfigurationError, ListenError, ViolationError
from ..protocol.aes import load
from ..protocol.http_head import END, parse_head
from ..protocol.names import normal_hostname, parse_address
from .listening import Listener, listen
from .loop import READ, WRITE, Handler
from .sockets import host_text, numeric_places, pack_ip, reason
from .tuning import DRAIN_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..protocol.http_head import Fields
    from ..protocol.names import Address
    from .loop import Loop, Timer

    Answer = tuple[int, str, str]
    """Status, content type and body."""

log = logging.getLogger("snitun_sync")

TEXT = "text/plain; charset=utf-8"
CONNECTIONS = 16
REQUEST_BYTES = 8 * 1024
# From accept to the answer's last byte; DRAIN_S may follow.
REQUEST_S = 10.0
SHORTEST_TOKEN = 16

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
        hosts = [place[0] for _, place in numeric_places(address)]
        _check_hosts(address, token, hosts if address.host else [""])


def _check_hosts(address: Address, token: str, hosts: list[str]) -> None:
    is_loopback = all(host == "::1" or host.startswith("127.") for host in hosts)
    if not token and not is_loopback:
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
        self._own_file: os.stat_result | None = None

    def open(self) -> None:
        """Listen; on the caller's thread, before the loop runs.

        Raises ListenError, and ConfigurationError as `check` does.
        """
        check(self.address, self._token)
        self._expected = self._digest(self._token.strip())
        try:
            sockets = listen(self.address)
            self._listeners = [Listener(self.loop, sock, self._accepted, 1) for sock in sockets]
            if self.address.path:
                self._own_file = os.lstat(self.address.path)
                return
            places = [sock.getsockname() for sock in sockets]
            _check_hosts(self.address, self._token, [place[0] for place in places])
        except (ConfigurationError, OSError, ValueError) as error:
            self.close()
            if isinstance(error, ConfigurationError):
                raise
            raise ListenError(f"--admin: can't listen on {self.address}: {reason(error)}") from None
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
            try:
                # While the socket is open, no other file can have its number.
                if os.path.samestat(os.lstat(self.address.path), self._own_file):
                    os.unlink(self.address.path)
            except OSError:
                pass  # it is gone, or the next one to listen replaces it
            self._own_file = None
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for connection in tuple(self.connections):
            connection.close()

    def _accepted(self, sock: socket.socket, place: object) -> None:
        # One in a turn: who has sent its request is served before it would have to give way.
        if len(self.connections) >= CONNECTIONS:
            oldest = next((one for one in self.connections if not one.is_answering), None)
            if oldest is None:
                sock.close()
                return
            oldest.close()
        Connection(self, sock)

    def answer(self, head: bytes) -> Answer:
        """Return the answer to a request, given without the empty line at its end."""
        try:
            method, target, _, fields = parse_head(head)
            if not target.startswith("/"):
                raise ViolationError("the first line; expected GET /PATH HTTP/1.1")
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
        if "transfer-encoding" in fields or fields.get("content-length", "0") != "0":
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
        scheme, _, token = fields.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._digest(token.strip()) == self._expected

    def _has_known_host(self, fields: Fields) -> bool:
        try:
            address = parse_address(fields.get("host", ""), "Host", default_port=80)
            host = normal_hostname(address.host)
            if host not in ("localhost", normal_hostname(self.address.host)):
                pack_ip(host)
        except (ConfigurationError, OSError):
            return False
        return True


class Connection(Handler):
    """Someone who asks: the request is read, the answer written, and what still comes drained."""

    __slots__ = ("_admin", "_is_answered", "_received", "_timer", "_unsent")

    def __init__(self, admin: Admin, sock: socket.socket) -> None:
        super().__init__(sock)
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
        end = self._received.find(END)
        size = len(self._received) if end < 0 else end + len(END)
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
