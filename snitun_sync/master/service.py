"""The session master's own HTTP server: sockets on the loop, the WSGI application on threads.

    (PROXY header) → (TLS handshake) → head, body → application → answer → drain

Who is slow, or says nothing, takes no thread: one is needed for each step of a handshake, and
for a request that is whole. A connection carries one request.
"""

from __future__ import annotations

import io
import json
import logging
import re
import socket
from functools import partial
from ipaddress import ip_address, ip_network
from wsgiref.handlers import SimpleHandler

from ..errors import ChannelError, ListenError, UsageError, ViolationError
from ..net.listening import Listener, listen
from ..net.loop import READ, WRITE, Handler
from ..net.service import Service
from ..net.sockets import host_text, numeric_places, reason, unpack_ip
from ..net.tuning import DRAIN_S, LEAST_BUDGET_BYTES
from ..net.workers import Workers
from ..protocol.http_head import END, parse_head
from ..protocol.names import parse_address, shown
from ..protocol.proxy_protocol import read_header
from ..protocol.wsgi_environ import new_environ
from .request import BODY_BYTES, RefusalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..net.loop import Timer
    from ..net.openmetrics import Family
    from ..tls import Certificate, Loaded, TlsStream
    from .app import App

    Environ = dict[str, Any]

# More than this, and the oldest that hasn't sent its request yet has to go.
CONNECTIONS = 1024
ACCEPTS_AT_ONCE = 16
HEAD_BYTES = 16 * 1024
# From the connection to the request's last byte, however it comes.
REQUEST_S = 10.0
# For an answer, and for each MiB of it: a list of revocations may have some.
ANSWER_S = 10.0
PIECE_BYTES = 64 * 1024
APP_THREADS, APP_WAITING = 32, 1024
# The signatures of handshakes: by OpenSSL, which lets other threads run.
HANDSHAKE_THREADS = 2
IDLE_S = 30.0
# Files that change are read once they have stayed the same for so long.
WATCH_S = 3.0
LOOK_S = 1.0

_LENGTH = re.compile(r"[0-9]{1,18}")
_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    411: "Length Required",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}

log = logging.getLogger("snitun_sync")


class Master(Service):
    """See the head of this file."""

    def __init__(
        self,
        app: App,
        address: str,
        *,
        certificate: Certificate | None = None,
        proxies: Sequence[str] = (),
        is_insecure: bool = False,
        crypto: str = "",
    ) -> None:
        """Serve `app`, which is stopped at the end, at `address`, HOST:PORT.

        `certificate` is read; `proxies`: the networks whose connections begin with a PROXY
        header; `is_insecure`: without TLS for other machines, too. Raises ConfigurationError.
        """
        super().__init__(budget_bytes=LEAST_BUDGET_BYTES, crypto=crypto)
        self.app, self.certificate = app, certificate
        self.address = parse_address(address, "--listen", can_be_any=True)
        self._is_insecure = is_insecure or certificate is not None
        self.proxies = [_network(text) for text in proxies]
        self.port = 0
        """What is listened on once it is open."""
        self.connections: dict[Connection, None] = {}  # the oldest first
        self.workers = Workers(self.loop, APP_THREADS, waiting=APP_WAITING, idle_s=IDLE_S)
        self.handshakers = Workers(self.loop, HANDSHAKE_THREADS, waiting=CONNECTIONS, idle_s=IDLE_S)
        self.buffer = memoryview(bytearray(HEAD_BYTES))
        """For what is decrypted; of the loop's thread."""
        self._listeners: list[Listener] = []
        self._seen: object = None  # what the last look at the certificate's files has shown
        # A name is looked up when it is listened on.
        self._check([place[0] for _, place in numeric_places(self.address)])

    def _check(self, hosts: Sequence[str]) -> None:
        is_loopback = all(host == "::1" or host.startswith("127.") for host in hosts)
        if not self._is_insecure and not (is_loopback and self.address.host):
            raise UsageError(
                f"--listen: {self.address} can be reached from other machines; expected "
                "--tls-cert as well, a loopback address behind a proxy, or --insecure"
            )

    # --- life ----------------------------------------------------------------------

    def _open(self) -> None:
        try:
            sockets = listen(self.address)
        except OSError as error:
            raise ListenError(f"can't listen on {self.address}: {reason(error)}") from None
        self._listeners = [
            Listener(self.loop, sock, partial(Connection, self), ACCEPTS_AT_ONCE)
            for sock in sockets
        ]
        places = [sock.getsockname() for sock in sockets]
        self.port = places[0][1]
        self._check([place[0] for place in places])

    def _begin(self) -> None:
        super()._begin()
        for listener in self._listeners:
            listener.listen()
        log.info("%s", self.summary())
        self.loop.call_later(LOOK_S, self._look_at_keys)
        if self.certificate is not None:
            self.loop.call_later(WATCH_S, self._look_at_certificate)
        self.tell()

    def _begin_drain(self) -> bool:
        for listener in self._listeners:
            listener.finish()
        self.app.stop()
        for connection in tuple(self.connections):
            if connection.can_give_way:
                connection.close()
        return bool(self.connections)

    def _is_drained(self) -> bool:
        return not self.connections

    def _begin_stop(self) -> None:
        for listener in self._listeners:
            listener.close()
        self.app.stop()

    def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        for connection in tuple(self.connections):
            connection.close()
        self.workers.close()
        self.handshakers.close()
        super()._close()

    def connection_closed(self, connection: Connection) -> None:
        """A connection has ended."""
        self.connections.pop(connection, None)
        self._stop_if_done()

    def make_room(self) -> bool:
        """Close the oldest connection that may be, if there are too many; return success."""
        if len(self.connections) >= CONNECTIONS:
            oldest = next((one for one in self.connections if one.can_give_way), None)
            if oldest is None:
                return False
            oldest.end("others need its place")
        return True

    # --- files that change -----------------------------------------------------------

    def _look_at_keys(self) -> None:
        self.loop.call_later(LOOK_S, self._look_at_keys)
        self.app.keys.look()

    def _look_at_certificate(self) -> None:
        certificate = self.certificate
        assert certificate is not None
        self.loop.call_later(WATCH_S, self._look_at_certificate)
        seen, self._seen = self._seen, certificate.stamp()
        if seen == self._seen and (seen != certificate.tried or certificate.failure):
            self.handshakers.submit(certificate.blocking_load, self._loaded)

    def _loaded(self, loaded: Loaded | None, error: Exception | None) -> None:
        certificate = self.certificate
        assert certificate is not None
        if loaded is not None:
            certificate.take(loaded)
            log.info("another certificate counts from now on: %s", certificate)
            return
        certificate.failure = str(error)
        if certificate.is_news:
            certificate.is_news = False
            log.error("%s; the former one stays", error)

    def reconfigure(self, relays: Sequence[str], token_ttl_s: float) -> None:
        """Take these settings, and what is in the files; on the loop's thread.

        Raises ConfigurationError, and all stays as it was.
        """
        loaded = self.certificate.blocking_load() if self.certificate is not None else None
        self.app.keys.read()
        self.app.configure(relays, token_ttl_s)
        if loaded is not None and self.certificate is not None:
            self.certificate.take(loaded)

    # --- how it is -------------------------------------------------------------------

    def ready(self) -> str:
        """Return why nobody is served, "" if somebody could be."""
        return "stopping" if self._is_stopping or self._is_draining else ""

    def summary(self) -> str:
        """Return how it goes in one line, for people."""
        scheme = "http" if self.certificate is None else "https"
        listens = f"listening on {scheme}://{host_text(self.address.host or '*', self.port)}"
        return self.ready() or listens

    def report(self) -> dict[str, Any]:
        """Return how it goes, for SIGUSR1."""
        return {
            "program": "snitun-master",
            "is_ready": not self.ready(),
            "summary": self.summary(),
            "figures": {
                "requests": f"{self.app.answered} answered, {len(self.connections)} connections",
                "certificate": str(self.certificate or "none"),
            },
        }

    def metrics(self) -> list[Family]:
        """Nothing: the application answers /metrics."""
        return []


class Connection(Handler):
    """One client or relay: its request, and what it is answered."""

    __slots__ = (
        "_answer",
        "_environ",
        "_is_over",
        "_is_shaking",
        "_length",
        "_master",
        "_received",
        "_stream",
        "_timer",
        "_unsent",
        "_was_told",
        "can_give_way",
        "peer",
        "source",
    )

    def __init__(self, master: Master, sock: socket.socket, place: Any) -> None:
        super().__init__(sock)
        self._master = master
        self.peer = place[0]
        """The address of who has connected: a client or a proxy."""
        self.source = ""
        """The client's address; "" until the PROXY header is there, where one is expected."""
        self.can_give_way = True
        """Nobody waits for an answer that is under way."""
        self._received = bytearray()
        self._stream: TlsStream | None = None
        self._is_shaking = False
        self._environ: Environ | None = None  # once the head is there
        self._length = 0  # of the body
        self._was_told = False  # to go on with the body
        self._answer: list[memoryview] = []  # not encrypted yet, without empty ones
        self._unsent = memoryview(b"")
        self._is_over = False  # there is nothing more to be sent
        self._timer: Timer | None = None
        if not master.make_room():
            sock.close()
            self.sock = None
            return
        master.connections[self] = None
        self._timer = master.loop.call_later(REQUEST_S, self._overdue)
        if not _is_in(self.peer, master.proxies):
            self.source = self.peer
            self._secure()
        master.loop.watch(self, READ)

    def close(self) -> None:
        """Free all that is owned; harmless when it is closed already."""
        if self.sock is not None:
            if self._timer is not None:
                self._timer.cancel()
            self._master.loop.close_socket(self)
            self._answer, self._unsent = [], memoryview(b"")
            self._master.connection_closed(self)

    def fail(self, error: Exception) -> None:
        self.close()

    def end(self, why: str) -> None:
        """Close it, and say why in the log."""
        log.debug("%s: %s", self.source or self.peer, why)
        self.close()

    def _overdue(self) -> None:
        if self._environ is not None or (self._received and self.source):
            self._refuse(408, f"no whole request within {REQUEST_S:.0f} s")
        else:
            self.end(f"no whole request within {REQUEST_S:.0f} s")

    # --- what comes in ---------------------------------------------------------------

    def on_ready(self, events: int) -> None:
        if events & WRITE:
            self._write()
            return
        assert self.sock is not None
        try:
            data = bytes(self._master.loop.receive(self.sock, HEAD_BYTES))
        except BlockingIOError:
            return
        except OSError as error:
            self.end(reason(error))
            return
        if not data:
            self.close()
        elif self._is_over:
            pass  # it is only drained
        elif not self.source:
            self._received += data
            self._read_proxy_header()
        else:
            self._take(data)

    def _read_proxy_header(self) -> None:
        try:
            header = read_header(self._received)
        except ViolationError as error:
            log.warning("%s: %s", self.peer, error)
            self.close()
            return
        if header is None:
            return
        size, source, _ = header
        self.source = unpack_ip(source) if source else self.peer
        rest = bytes(self._received[size:])
        self._received.clear()
        self._secure()
        self._take(rest)

    def _secure(self) -> None:
        certificate = self._master.certificate
        if certificate is not None:
            from ..tls import TlsStream  # noqa: PLC0415  few serve without it, but they do

            assert certificate.context is not None
            self._stream = TlsStream(certificate.context)
            self._is_shaking = True

    def _take(self, data: bytes) -> None:
        """Take what has come: of the handshake, or of the request."""
        stream = self._stream
        if stream is None:
            self._received += data
        else:
            stream.receive(data)
            if self._is_shaking:
                # Until that step is done nothing is read: nobody can make this grow.
                self._master.loop.watch(self, 0)
                if not self._master.handshakers.submit(stream.handshake, self._shaken):
                    self.end("too many TLS handshakes wait")
                return
            try:
                self._decrypt(stream)
            except ChannelError as error:
                self.end(str(error))
                return
        self._read()

    def _shaken(self, is_done: bool | None, error: Exception | None) -> None:
        if self.sock is None:
            return
        assert self._stream is not None
        try:
            # It fits: nothing has been sent before.
            self.sock.send(self._stream.pending())
        except OSError as failure:
            error = failure
        if error is not None:
            self.end(str(error))
            return
        self._master.loop.watch(self, READ)
        if is_done:
            self._is_shaking = False
            self._take(b"")

    def _decrypt(self, stream: TlsStream) -> None:
        buffer = self._master.buffer
        # What is more than any request has is refused below.
        while len(self._received) <= HEAD_BYTES + BODY_BYTES and (size := stream.decrypt(buffer)):
            self._received += buffer[:size]
        if stream.is_ended and not self._received:
            self.end("it has ended TLS")

    def _read(self) -> None:
        """See whether the request is whole; hand it to the application then."""
        if self.sock is None:
            return
        try:
            if self._environ is None and not self._read_head():
                return
        except RefusalError as error:
            self._refuse(error.status, str(error))
            return
        except ViolationError as error:
            self._refuse(400, str(error))
            return
        environ = self._environ
        assert environ is not None
        if len(self._received) < self._length:
            if environ.get("HTTP_EXPECT", "").lower() == "100-continue" and not self._was_told:
                self._was_told = True
                self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        environ["wsgi.input"] = io.BytesIO(self._received[: self._length])
        self._received.clear()
        self._wait_for_answer()
        blocking = partial(_Gateway(environ).answer, self._master.app)
        if not self._master.workers.submit(blocking, self._answered):
            self._refuse(503, "too many requests wait", "Retry-After: 1\r\n")

    def _read_head(self) -> bool:
        """Read the head, once it is whole; return whether it is."""
        end = self._received.find(END)
        if end > HEAD_BYTES or (end < 0 and len(self._received) > HEAD_BYTES):
            raise RefusalError(431, f"more than {HEAD_BYTES} bytes in the head")
        if end < 0:
            return False
        method, target, version, fields = parse_head(bytes(self._received[:end]))
        if version == "1.0":
            fields.setdefault("host", "localhost")
        scheme = "http" if self._stream is None else "https"
        environ = new_environ(method, target, version, fields, scheme)
        length = fields.get("content-length", "0")
        if "transfer-encoding" in fields:
            raise RefusalError(411, "Transfer-Encoding; expected a Content-Length")
        if _LENGTH.fullmatch(length) is None:
            raise RefusalError(400, "Content-Length; expected one number")
        if int(length) > BODY_BYTES:
            raise RefusalError(413, f"a body of {length} bytes; expected {BODY_BYTES} at most")
        environ["REMOTE_ADDR"] = self.source
        self._environ, self._length = environ, int(length)
        del self._received[: end + len(END)]
        return True

    def _wait_for_answer(self) -> None:
        """The request is whole, or refused: read nothing more of it, and let it take its time."""
        self.can_give_way = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._master.loop.watch(self, 0)

    # --- what goes out ---------------------------------------------------------------

    def _answered(self, gateway: _Gateway | None, error: Exception | None) -> None:
        if self.sock is None:
            return
        if gateway is None:
            log.error("defect in the application", exc_info=error)
            self._refuse(500, "a defect; the log has more")
            return
        start = partial(self._start, [memoryview(part) for part in gateway.parts if part])
        if gateway.hold_s:
            self.can_give_way = True
            self._timer = self._master.loop.call_later(gateway.hold_s, start)
        else:
            start()

    def _refuse(self, status: int, message: str, more: str = "") -> None:
        """Answer in place of the application: the request can't be given to it."""
        log.debug("%s: %d, %s", self.source, status, message)
        body = json.dumps({"message": message}) + "\n"
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n"
            f"{more}"
            "Cache-Control: no-store\r\n"
            "Connection: close\r\n\r\n"
        )
        is_head = self._received.startswith(b"HEAD ") or (
            self._environ is not None and self._environ["REQUEST_METHOD"] == "HEAD"
        )
        self._received.clear()
        self._wait_for_answer()
        self._start([memoryview((head if is_head else head + body).encode())])

    def _start(self, answer: list[memoryview]) -> None:
        """Begin to send the answer."""
        self.can_give_way = False
        self._answer = answer
        limit_s = ANSWER_S * (1 + sum(map(len, answer)) // 2**20)
        overdue = partial(self.end, f"it didn't take its answer within {limit_s:.0f} s")
        self._timer = self._master.loop.call_later(limit_s, overdue)
        self._write()

    def _write(self) -> None:
        """Send what the socket takes."""
        assert self.sock is not None
        try:
            while self._unsent or self._next_piece():
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except BlockingIOError:
            self._master.loop.watch(self, WRITE)
            return
        except (OSError, ChannelError) as error:
            self.end(str(error))
            return
        # Closed with something unread, the socket would send a reset, and that may overtake
        # the answer.
        self._is_over = True
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._master.loop.watch(self, READ)
        assert self._timer is not None
        self._timer.cancel()
        self._timer = self._master.loop.call_later(DRAIN_S, self.close)

    def _next_piece(self) -> bool:
        """Take the next of the answer; return whether there was more of it."""
        if not self._answer:
            return False
        piece, rest = self._answer[0][:PIECE_BYTES], self._answer[0][PIECE_BYTES:]
        self._answer[:1] = [rest] if rest else []
        if self._stream is not None:
            data = self._stream.encrypt(piece)
            if not self._answer:
                data += self._stream.finish()
            piece = memoryview(data)
        self._unsent = piece
        return True

    def _send(self, data: bytes) -> None:
        """Send a little at once, before the answer."""
        assert self.sock is not None
        try:
            self.sock.send(data if self._stream is None else self._stream.encrypt(data))
        except (OSError, ChannelError) as error:
            self.end(str(error))


class _Gateway(SimpleHandler):
    """Runs the application on a thread, and keeps its answer."""

    http_version = "1.1"
    server_software = "snitun-master"
    os_environ: dict[str, str] = {}

    def __init__(self, environ: Environ) -> None:
        self.parts: list[bytes] = []
        self.hold_s = 0.0
        """How long the answer is to be kept back."""
        environ["snitun.hold"] = self._hold
        super().__init__(environ["wsgi.input"], io.BytesIO(), environ["wsgi.errors"], environ)

    def answer(self, app: App) -> _Gateway:
        """Run the application; return this."""
        self.run(app)
        return self

    def _hold(self, seconds: float) -> None:
        self.hold_s = seconds

    def get_scheme(self) -> str:
        scheme: str = self.base_env["wsgi.url_scheme"]
        return scheme

    def send_preamble(self) -> None:
        super().send_preamble()
        self._write(b"Connection: close\r\n")

    def _write(self, data: bytes) -> None:
        self.parts.append(data)

    def _flush(self) -> None:
        pass


def _network(text: str) -> Any:
    try:
        return ip_network(text)
    except ValueError:
        expected = "an address, or a network such as 203.0.113.0/24 or 2001:db8::/32"
        raise UsageError(f"--proxy-protocol-from: {shown(text)}; expected {expected}") from None


def _is_in(address: str, networks: Sequence[Any]) -> bool:
    if not networks:
        return False
    ip: Any = ip_address(address.partition("%")[0])
    return any(ip in network for network in networks)
