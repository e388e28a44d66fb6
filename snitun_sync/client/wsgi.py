"""A WSGI application behind one connection: HTTP/1.1 (RFC 9110, 9112), PEP 3333.

    head ── whole ──→ application → answer → what it left of the body → head …
     └─ not whole: run() returns True, and is called again when more has arrived

No thread waits for a request, or for the rest of one's head; one does for a body, and for a
device that takes its answer slowly. Who is served decides little: what is ambiguous, or larger
than it may be, is refused, and ends the connection. So does an answer that went wrong.
"""

from __future__ import annotations

import io
import logging
import re
import socket
import time
from wsgiref.handlers import format_date_time
from wsgiref.util import is_hop_by_hop

from ..errors import EndpointError, MisuseError, ViolationError
from ..protocol.http_head import END, NAME, VALUE, parse_head
from ..protocol.wsgi_environ import new_environ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from ..protocol.http_head import Fields

    Headers = list[tuple[str, str]]
    # The argument types are the application's: more than one spelling of them is in use.
    Application = Callable[..., Iterable[bytes]]

log = logging.getLogger("snitun_sync")

HEAD_BYTES = 64 * 1024
FIELDS = 100
# From a head's first byte to its last.
HEAD_S = 20.0
# How long a request's thread waits for the device in all, and while others wait for a thread.
# What is sent or received earns it more time, at this rate.
WAIT_S = 60.0
URGENT_S = 5.0
LEAST_BYTES_PER_S = 1024
# What the application leaves of a body is read to this extent: the next request comes behind it.
DRAIN_BYTES = 256 * 1024
# The size of a chunk, its extensions; a line of a trailer.
LINE_BYTES = 4096
TRAILER_LINES = 100
RECEIVE_BYTES = 64 * 1024

_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[\t ]*(;[\t -~\x80-\xff]*)?")
# No 1xx: those are this server's own.
_STATUS = re.compile(r"[2-9][0-9]{2}( [\t -~\x80-\xff]*)?")
_BAD = "400 Bad Request"
_TOO_LARGE = "431 Request Header Fields Too Large"
_TIMEOUT = "408 Request Timeout"


class OverError(OSError):
    """The connection can't go on. An OSError: what applications take for a device that is gone."""

    def __init__(self, status: str, why: str) -> None:
        """`status` is what the device is told if it was told nothing yet; "": it is gone."""
        super().__init__(why)
        self.status = status


class WsgiConversation:
    """One device's connection; `run` it whenever there is something to read."""

    def __init__(
        self,
        app: Application,
        connection: socket.socket,
        device: str,
        *,
        scheme: str = "http",
        others_wait: Callable[[], bool] = bool,
    ) -> None:
        """`device` is its address as text, "" if unknown. The connection's owner closes it.

        `scheme`: "https" where the device's TLS has ended before it came here; `others_wait`
        tells whether others want the thread.
        """
        self.app, self.device, self.scheme = app, device, scheme
        self.received = bytearray()
        """What has come and wasn't read yet: as a head, or out of a body."""
        self._sock, self._others_wait = connection, others_wait
        self._head_until = 0.0  # when a head that has begun must be whole
        self._waited_s = 0.0  # for the device, less what it has earned since
        self.is_head = False
        """Whether the request is HEAD: no answer to it has a body."""
        self.over: OverError | None = None
        """The first error in receiving or sending, whatever the application made of it."""

    def run(self) -> bool:
        """Serve what has come; return whether to go on when more has.

        Raises EndpointError where an answer has an end that the device could take for its own.
        """
        try:
            while (head := self._read_head()) is not None:
                if not self._serve(head):
                    return False
            return True
        except ViolationError as error:
            self._refuse(_BAD, str(error))
        except OverError as error:
            self._refuse(error.status, str(error))
        return False

    def _read_head(self) -> bytes | None:
        """Return the next head without END, None if it isn't there yet."""
        received = self.received
        if END not in received:
            self._sock.settimeout(0)
            try:
                self.receive()
            except BlockingIOError:
                return None
        while received.startswith(b"\r\n"):  # some send one behind a body (RFC 9112, 2.2)
            del received[:2]
        if not received:
            return None
        self.is_head = received.startswith(b"HEAD ")
        end = received.find(END)
        if end > HEAD_BYTES or (end < 0 and len(received) > HEAD_BYTES):
            raise OverError(_TOO_LARGE, f"more than {HEAD_BYTES} bytes")
        now = time.monotonic()
        if not self._head_until:
            self._head_until = now + HEAD_S
        elif now >= self._head_until:
            raise OverError(_TIMEOUT, f"no whole request within {HEAD_S:.0f} s")
        if end < 0:
            return None
        head = bytes(received[:end])
        del received[: end + len(END)]
        self._head_until = 0.0
        return head

    def _serve(self, head: bytes) -> bool:
        """Answer one request; return whether the connection goes on."""
        if head.count(b"\r\n") > FIELDS:
            raise OverError(_TOO_LARGE, f"more than {FIELDS} fields")
        method, target, version, fields = parse_head(head)
        environ = new_environ(method, target, version, fields, self.scheme)
        self._sock.settimeout(URGENT_S)
        self._waited_s = 0.0
        body = _Body(self, _body_length(version, fields))
        body.is_awaited = (
            version == "1.1"
            and fields.get("expect", "").lower() == "100-continue"
            and not (body.is_over or self.received)
        )
        environ["REMOTE_ADDR"] = self.device
        environ["wsgi.input"] = io.BufferedReader(body)
        options = fields.get("connection", "").lower().replace(",", " ").split()
        goes_on = "close" not in options if version == "1.1" else "keep-alive" in options
        answer = _Answer(self, body, version, goes_on)
        try:
            result = self.app(environ, answer.start)
            try:
                answer.send_all(result)
            finally:
                close = getattr(result, "close", None)
                if close is not None:
                    close()
        except BaseException:  # SystemExit, too: it is the application's, and ends nothing here
            over = self.over
            if over is None:
                over = OverError("500 Internal Server Error", "")
                log.exception("the WSGI application failed: %s %r", method, environ["PATH_INFO"])
            if answer.is_whole:
                return False
            if answer.is_begun:
                raise EndpointError(f"its answer was cut: {str(over) or over.status}") from None
            raise over from None
        return answer.goes_on and body.drain()

    def _refuse(self, status: str, why: str) -> None:
        """Say why the connection ends, if there is someone to say it to."""
        log.debug("%s: answer %s, %s", self.device, status or "none", why)
        if not status:
            return
        text = f"{status}{': ' if why else ''}{why}\n".encode()
        head = _head(
            status,
            [
                ("Content-Type", "text/plain; charset=utf-8"),
                ("Content-Length", str(len(text))),
                ("Connection", "close"),
            ],
        )
        try:
            self._sock.settimeout(URGENT_S)
            self._waited_s = 0.0
            self.send(head if self.is_head else head + text)
        except OverError:
            pass  # it is gone

    # --- the connection --------------------------------------------------------------

    def receive(self) -> None:
        """Get more of what the device sends. Raises OverError, BlockingIOError between requests."""
        data = bytearray(RECEIVE_BYTES)
        size = self._step(self._sock.recv_into, data)
        if not size:
            raise self.fail("", "the device has ended its connection")
        self.received += memoryview(data)[:size]

    def send(self, data: bytes) -> None:
        """Send all of it. Raises OverError."""
        view = memoryview(data)
        while view:
            view = view[self._step(self._sock.send, view) :]

    def _step(self, move: Callable[[Any], int], data: Any) -> int:
        """Receive or send once, and return how much."""
        size = None
        while size is None:
            begin = time.monotonic()
            try:
                size = move(data)
            except BlockingIOError:
                raise
            except socket.timeout:
                pass  # others may wait by now
            except OSError as error:
                raise self.fail("", str(error)) from None
            waited_s = self._waited_s + time.monotonic() - begin
            self._waited_s = max(0.0, waited_s - (size or 0) / LEAST_BYTES_PER_S)
            if self._waited_s > WAIT_S or (self._waited_s > URGENT_S and self._others_wait()):
                raise self.fail(_TIMEOUT, f"waited {self._waited_s:.0f} s for the device")
        return size

    def fail(self, status: str, why: str) -> OverError:
        """Return the error that nothing is received or sent after."""
        self.over = self.over or OverError(status, why)
        return self.over


class _Body(io.RawIOBase):
    """What wsgi.input reads: a request's body, to its end and no further."""

    def __init__(self, conversation: WsgiConversation, length: int | None) -> None:
        """Without a length it comes in chunks."""
        self._conversation = conversation
        self._is_chunked = length is None
        self._left = length or 0  # of the body, or of this chunk
        self.is_over = length == 0
        self.is_awaited = False
        """Whether the device sends it only when it is told to (RFC 9110, 10.1.1)."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some of it, 0 bytes at its end. Raises OverError, also if it ends too early."""
        if self._is_chunked and not self._left and not self.is_over:
            self._next_chunk()
        if self.is_over:
            return 0
        received = self._received()
        size = min(len(buffer), self._left, len(received))
        with memoryview(received) as view:
            buffer[:size] = view[:size]
        del received[:size]
        self._left -= size
        if not self._left:
            self.is_over = not self._is_chunked
            if self._is_chunked and self._line():
                raise self._conversation.fail(_BAD, "a chunk; expected CRLF behind its data")
        return size

    def can_be_drained(self) -> bool:
        """Tell whether it can be read to its end, where the application doesn't."""
        is_whole = self._conversation.over is None
        return is_whole and not self.is_awaited and self._left <= DRAIN_BYTES

    def drain(self) -> bool:
        """Read what the application has left of it; return whether it is over then."""
        buffer, left = bytearray(16 * 1024), DRAIN_BYTES
        try:
            while not self.is_over and left > 0:
                left -= self.readinto(buffer)
        except OverError:
            return False
        return self.is_over

    def _received(self) -> bytearray:
        """Return what has come, wait for it if nothing has."""
        conversation = self._conversation
        if conversation.over is not None:  # after that, the bytes mean nothing
            raise conversation.over
        if not conversation.received:
            if self.is_awaited:
                self.is_awaited = False
                conversation.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            conversation.receive()
        return conversation.received

    def _next_chunk(self) -> None:
        """Read up to where the next chunk's data begins, or the body is over."""
        line = _CHUNK.fullmatch(self._line())
        if line is None:
            raise self._conversation.fail(_BAD, "a chunk's first line; expected its size")
        self._left = int(line[1], 16)
        if not self._left:
            for _ in range(TRAILER_LINES):
                if not self._line():
                    self.is_over = True
                    return
            raise self._conversation.fail(
                _BAD, f"a trailer; expected {TRAILER_LINES} lines at most"
            )

    def _line(self) -> bytes:
        received = self._received()
        while (end := received.find(b"\r\n")) < 0 and len(received) <= LINE_BYTES:
            self._conversation.receive()
        if not 0 <= end <= LINE_BYTES:
            raise self._conversation.fail(_BAD, f"a chunk; expected lines of {LINE_BYTES} bytes")
        line = bytes(received[:end])
        del received[: end + 2]
        return line


class _Answer:
    """What the application says: one response."""

    def __init__(
        self, conversation: WsgiConversation, body: _Body, version: str, goes_on: bool
    ) -> None:
        self._conversation, self._body, self._version = conversation, body, version
        self.goes_on = goes_on
        """Whether the device and this answer let the connection go on."""
        self.is_begun = False
        """Whether the head is sent."""
        self._status, self._headers = "", [("", "")]
        self._has_body = True
        self._is_chunked = False
        self._left: int | None = None  # of what Content-Length said; 0 at any answer's end

    @property
    def is_whole(self) -> bool:
        """Whether the device has all of it."""
        return self.is_begun and (not self._has_body or self._left == 0)

    def start(self, status: str, headers: Headers, exc_info: Any = None) -> Callable[..., None]:
        """PEP 3333's start_response."""
        if exc_info and self.is_begun:
            raise exc_info[1]
        if self._status and not exc_info:
            raise MisuseError("start_response is called again, without exc_info")
        if _STATUS.fullmatch(status) is None:
            raise MisuseError(f"the status {status!r}; expected such as '200 OK'")
        for name, value in headers:
            if NAME.fullmatch(name) is None or VALUE.fullmatch(value) is None:
                raise MisuseError(f"the header {name!r}: {value!r}; expected printable text")
            if is_hop_by_hop(name):
                raise MisuseError(f"the header {name!r}: it is the server's to send")
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        if len(lengths) > 1 or not all(map(_LENGTH.fullmatch, lengths)):
            raise MisuseError(f"Content-Length {', '.join(lengths)}; expected one number")
        self._status, self._headers = status, list(headers)
        self._left = int(lengths[0]) if lengths else None
        return self.write

    def send_all(self, result: Iterable[bytes]) -> None:
        """Send what the application has returned, to the end of the answer."""
        is_one = isinstance(result, (list, tuple)) and len(result) == 1
        for data in result:
            self.write(data, len(data) if is_one else None)
            if self.is_begun and not self._has_body:
                break
        if not self.is_begun:
            # Empty; but what a GET would get isn't known by an answer to HEAD.
            self._conversation.send(self._begin(None if self._conversation.is_head else 0))
        elif self._is_chunked:
            self._conversation.send(b"0\r\n\r\n")
        if self._has_body and self._left:
            raise MisuseError(f"the answer has {self._left} bytes fewer than its Content-Length")
        self._left = 0

    def write(self, data: bytes, length: int | None = None) -> None:
        """PEP 3333's write; the head goes with the first of it, and says the `length`, if known."""
        if not isinstance(data, bytes):
            raise MisuseError(f"{type(data).__name__} in an answer; expected bytes")
        if not data:
            return
        head = b"" if self.is_begun else self._begin(length)
        excess = 0  # what is too much
        if not self._has_body:
            data = b""
        elif self._is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        elif self._left is not None:
            excess = len(data) - self._left
            data = data[: self._left]
            self._left -= len(data)
        self._conversation.send(head + data if head else data)
        if excess > 0:
            raise MisuseError(f"the answer has {excess} bytes more than its Content-Length")

    def _begin(self, length: int | None) -> bytes:
        """Return the answer's head: `length` is that of its body, if it is known by now."""
        if not self._status:
            raise MisuseError("an answer without start_response")
        code, headers = self._status[:3], self._headers
        is_empty = code in ("204", "304")
        self._has_body = not (is_empty or self._conversation.is_head)
        self.goes_on = self.goes_on and self._body.can_be_drained()
        self._body.is_awaited = False  # a final answer: it is too late to ask for it
        if code == "204":  # RFC 9110, 8.6
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        elif self._left is None and length is not None and not is_empty:
            headers.append(("Content-Length", str(length)))
            self._left = length
        elif self._left is None and self._has_body and self._version == "1.1":
            headers.append(("Transfer-Encoding", "chunked"))
            self._is_chunked = True
        elif self._left is None and self._has_body:
            self.goes_on = False  # its end is the connection's
        if not self.goes_on:
            headers.append(("Connection", "close"))
        elif self._version == "1.0":
            headers.append(("Connection", "keep-alive"))
        self.is_begun = True
        return _head(self._status, headers)


def _head(status: str, headers: Headers) -> bytes:
    """Return an answer's head, with what it must say besides."""
    names = {name.lower() for name, _ in headers}
    lines = [f"HTTP/1.1 {status if status[3:] else status + ' '}"]
    lines += (f"{name}: {value}" for name, value in headers)
    if "date" not in names:
        lines.append(f"Date: {format_date_time(time.time())}")
    return "\r\n".join((*lines, "", "")).encode("latin-1")


def _body_length(version: str, fields: Fields) -> int | None:
    """Return how long the request's body is, None if it comes in chunks (RFC 9112, 6.3)."""
    length, coding = fields.get("content-length", "0"), fields.get("transfer-encoding")
    if coding is not None:
        if "content-length" in fields or version != "1.1":
            raise ViolationError("Transfer-Encoding; expected none in 1.0 or with Content-Length")
        if coding.lower() != "chunked":
            raise OverError("501 Not Implemented", "Transfer-Encoding; expected chunked")
        return None
    if _LENGTH.fullmatch(length) is None:
        raise ViolationError("Content-Length; expected one number")
    return int(length)
