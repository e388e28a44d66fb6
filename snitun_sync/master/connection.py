"""One connection to the session master: a client or a relay that asks, and its answer.

    (PROXY header) → (TLS handshake) → head, body → application → answer → drain

Who is slow, or says nothing, takes no thread: one is needed for each step of a handshake, and
for a request that is whole. A connection carries one request.
"""

from __future__ import annotations

import io
import logging
import re
import socket
import time
from functools import partial
from http import HTTPStatus
from wsgiref.handlers import format_date_time

from ..errors import ChannelError, ViolationError
from ..net.loop import READ, WRITE, Handler
from ..net.sockets import reason, unpack_ip
from ..net.tuning import DRAIN_S
from ..protocol.http_head import END, parse_head
from ..protocol.proxy_protocol import read_header
from ..protocol.wsgi_environ import new_environ
from .limits import network
from .request import BODY_BYTES, RefusalError, refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..net.loop import Timer
    from ..protocol.wsgi_environ import Environ
    from ..tls import TlsStream
    from .app import App
    from .request import Headers
    from .service import Master

HEAD_BYTES = 16 * 1024
# From the connection to the request's last byte, however it comes.
REQUEST_S = 10.0
# For an answer, and for each MiB of it: a list of revocations may have some.
ANSWER_S = 10.0
PIECE_BYTES = 64 * 1024

_LENGTH = re.compile(r"[0-9]{1,18}")

log = logging.getLogger("snitun_sync")


class Connection(Handler):
    """See the head of this file."""

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
        "network",
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
        self.network = network(self.peer)
        """Where it comes from, as limits have it."""
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
        if not master.take_in(self):
            sock.close()
            self.sock = None
            return
        self._timer = master.loop.call_later(REQUEST_S, self._overdue)
        if not master.expects_header(self.peer):
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
        self.network = network(self.source)
        rest = bytes(self._received[size:])
        self._received.clear()
        self._secure()
        self._take(rest)

    def _secure(self) -> None:
        certificate = self._master.certificate
        if certificate is not None:
            from ..tls import TlsStream  # noqa: PLC0415  not everybody has TLS end here

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
        blocking = partial(_blocking_answer, self._master.app, environ)
        if not self._master.workers.submit(blocking, self._answered):
            self._refuse(503, "too many requests wait", ("Retry-After", "1"))

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

    def _answered(
        self, found: tuple[list[memoryview], float] | None, error: Exception | None
    ) -> None:
        if self.sock is None:
            return
        if found is None:
            log.error("defect in the application", exc_info=error)
            self._refuse(500, "a defect; the log has more")
            return
        answer, hold_s = found
        if hold_s:
            self.can_give_way = True
            start = partial(self._start, answer)
            self._timer = self._master.loop.call_later(hold_s, start)
        else:
            self._start(answer)

    def _refuse(self, status: int, message: str, *more: tuple[str, str]) -> None:
        """Answer in place of the application: the request can't be given to it."""
        log.debug("%s: %d, %s", self.source, status, message)
        _, headers, body = refusal(status, message, *more)
        headers.append(("Content-Length", str(len(body))))
        head = _head(f"{status} {HTTPStatus(status).phrase}", headers)
        is_head = self._received.startswith(b"HEAD ") or (
            self._environ is not None and self._environ["REQUEST_METHOD"] == "HEAD"
        )
        self._received.clear()
        self._wait_for_answer()
        self._start([memoryview(head if is_head else head + body)])

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


def _blocking_answer(app: App, environ: Environ) -> tuple[list[memoryview], float]:
    """Run the application on a worker thread; return its answer, and how long to keep it back."""
    hold_s: list[float] = []
    environ["snitun.hold"] = hold_s.append
    heads: list[bytes] = []
    parts = app(environ, lambda status, headers: heads.append(_head(status, headers)))
    return [memoryview(part) for part in (*heads, *parts) if part], sum(hold_s)


def _head(status: str, headers: Headers) -> bytes:
    """Return an answer's head, with what it must say besides."""
    more = [("Date", format_date_time(time.time())), ("Connection", "close")]
    lines = (f"{name}: {value}" for name, value in (*headers, *more))
    return "\r\n".join((f"HTTP/1.1 {status}", *lines, "", "")).encode("latin-1")
