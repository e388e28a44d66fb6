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
import sys
import time
from wsgiref.handlers import format_date_time
from wsgiref.util import FileWrapper, is_hop_by_hop

from ..errors import MisuseError, ViolationError
from ..protocol.http_head import END, NAME, VALUE, parse_head

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from ..protocol.http_head import Fields

    Environ = dict[str, Any]
    Headers = list[tuple[str, str]]
    # The argument types are the application's: more than one spelling of them is in use.
    Application = Callable[..., Iterable[bytes]]

log = logging.getLogger("snitun_sync")

HEAD_BYTES = 64 * 1024
FIELDS = 100
# From a head's first byte to its last; and for each step of a body or an answer.
HEAD_S = 20.0
STEP_S = 60.0
# What the application leaves of a body is read to this extent: the next request comes behind it.
DRAIN_BYTES = 256 * 1024
DRAIN_S = 10.0
# The size of a chunk, its extensions; a line of a trailer.
LINE_BYTES = 4096
TRAILER_LINES = 100
RECEIVE_BYTES = 64 * 1024

_ABSOLUTE = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+;=%-]+)(?::([0-9]{0,5}))?", re.ASCII)
_LENGTH = re.compile(r"[0-9]{1,18}")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[\t ]*(;[\t -~\x80-\xff]*)?")
# No 1xx: those are this server's own.
_STATUS = re.compile(r"[2-9][0-9]{2}( [\t -~\x80-\xff]*)?")
_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
}


class OverError(OSError):
    """The connection can't go on. An OSError: what applications take for a device that is gone."""

    def __init__(self, status: int, reason: str) -> None:
        """`status` is what the device is told if it was told nothing yet; 0: it is gone."""
        super().__init__(reason)
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
        hostname: str = "localhost",
    ) -> None:
        """`device` is its address as text, "" if unknown. The connection's owner closes it.

        `scheme`: "https" where the device's TLS has ended before it came here; `hostname`: the
        server's for a device that names none, in HTTP/1.0.
        """
        self.app, self.device, self.scheme, self.hostname = app, device, scheme, hostname
        self.received = bytearray()
        """What has come and wasn't read yet: as a head, or out of a body."""
        self._sock = connection
        self._head_until = 0.0  # when a head that has begun must be whole
        self.is_head = False
        """Whether the request is HEAD: no answer to it has a body."""
        self.over: OverError | None = None
        """The first error in receiving or sending, whatever the application made of it."""

    def run(self) -> bool:
        """Serve what has come; return whether to go on when more has. It raises nothing."""
        try:
            while (head := self._read_head()) is not None:
                if not self._serve(head):
                    return False
            return True
        except ViolationError as error:
            self._refuse(400, str(error))
        except OverError as error:
            self._refuse(error.status, str(error))
        except Exception:
            log.exception("defect in %s", type(self).__name__)
        return False

    def _read_head(self) -> bytes | None:
        """Return the next head without END, None if it isn't there yet."""
        received = self.received
        if END not in received:
            self._sock.settimeout(0)
            try:
                self._receive()
            except BlockingIOError:
                return None
        while received.startswith(b"\r\n"):  # some send one behind a body (RFC 9112, 2.2)
            del received[:2]
        if not received:
            return None
        self.is_head = received.startswith(b"HEAD ")
        end = received.find(END)
        if end > HEAD_BYTES or (end < 0 and len(received) > HEAD_BYTES):
            raise OverError(431, f"more than {HEAD_BYTES} bytes")
        now = time.monotonic()
        if not self._head_until:
            self._head_until = now + HEAD_S
        elif now >= self._head_until:
            raise OverError(408, f"no whole request within {HEAD_S:.0f} s")
        if end < 0:
            return None
        head = bytes(received[:end])
        del received[: end + len(END)]
        self._head_until = 0.0
        return head

    def _serve(self, head: bytes) -> bool:
        """Answer one request; return whether the connection goes on."""
        if head.count(b"\r\n") > FIELDS:
            raise OverError(431, f"more than {FIELDS} fields")
        method, target, version, fields = parse_head(head)
        environ = _environ(method, target, version, fields, self.hostname, self.scheme)
        self._sock.settimeout(STEP_S)
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
                over = OverError(500, "")
                log.exception("the WSGI application failed: %s %r", method, environ["PATH_INFO"])
            if not answer.is_begun:
                self._refuse(over.status, str(over))
            return False
        return answer.goes_on and self._drain(body)

    def _drain(self, body: _Body) -> bool:
        """Read what the application has left of a body; return whether it is over then."""
        self._sock.settimeout(DRAIN_S)
        buffer, left, until = bytearray(16384), DRAIN_BYTES, time.monotonic() + DRAIN_S
        try:
            while not body.is_over and left > 0 and time.monotonic() < until:
                left -= body.readinto(buffer)
        except OverError:
            return False
        return body.is_over

    def _refuse(self, status: int, why: str) -> None:
        """Say why the connection ends, if there is someone to say it to."""
        log.debug("%s: answer %d, %s", self.device, status, why)
        if not status:
            return
        text = f"{status} {_REASONS[status]}{': ' if why else ''}{why}\n".encode()
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\n"
            f"Date: {format_date_time(time.time())}\r\n"
            "Content-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(text)}\r\n"
            "Connection: close\r\n\r\n"
        )
        try:
            self._sock.settimeout(STEP_S)
            self.send(head.encode() + (b"" if self.is_head else text))
        except OSError:
            pass  # it is gone

    # --- the connection --------------------------------------------------------------

    def receive(self) -> None:
        """Wait for more of the request. Raises OverError."""
        try:
            self._receive()
        except OverError as error:
            self.over = error
            raise

    def _receive(self) -> None:
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            raise
        except socket.timeout:
            raise OverError(408, f"nothing more of the body within {STEP_S:.0f} s") from None
        except OSError as error:
            raise OverError(0, f"receiving: {error}") from None
        if not data:
            raise OverError(0, "the device has ended its connection")
        self.received += data

    def send(self, data: bytes) -> None:
        """Send all of it, however slowly it is taken. Raises OverError."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._sock.send(view) :]  # not sendall: its time limit is for all
        except OSError as error:
            self.over = OverError(0, f"sending: {error}")
            raise self.over from None


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
        self._has_chunk = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some of it, 0 bytes at its end. Raises OverError, also if it ends too early."""
        try:
            if self._is_chunked and not self._left and not self.is_over:
                self._next_chunk()
        except ViolationError as error:
            self._conversation.over = OverError(400, str(error))
            raise self._conversation.over from None
        if self.is_over:
            return 0
        received = self._received()
        size = min(len(buffer), self._left, len(received))
        with memoryview(received) as view:
            buffer[:size] = view[:size]
        del received[:size]
        self._left -= size
        self.is_over = not (self._left or self._is_chunked)
        return size

    def can_be_drained(self) -> bool:
        """Tell whether it can be read to its end, where the application doesn't."""
        is_whole = self._conversation.over is None
        return is_whole and not self.is_awaited and self._left <= DRAIN_BYTES

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
        if self._has_chunk and self._line():
            raise ViolationError("a chunk; expected CRLF behind its data")
        line = _CHUNK.fullmatch(self._line())
        if line is None:
            raise ViolationError("a chunk's first line; expected its size")
        self._left, self._has_chunk = int(line[1], 16), True
        if not self._left:
            for _ in range(TRAILER_LINES):
                if not self._line():
                    self.is_over = True
                    return
            raise ViolationError(f"a trailer; expected at most {TRAILER_LINES} lines")

    def _line(self) -> bytes:
        received = self._received()
        while (end := received.find(b"\r\n")) < 0 and len(received) <= LINE_BYTES:
            self._conversation.receive()
        if not 0 <= end <= LINE_BYTES:
            raise ViolationError(f"a chunked body; expected lines of at most {LINE_BYTES} bytes")
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
        self._left: int | None = None  # of what Content-Length said

    def start(self, status: str, headers: Headers, exc_info: Any = None) -> Callable[..., None]:
        """PEP 3333's start_response."""
        if exc_info:
            try:
                if self.is_begun:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # it refers to this frame
        elif self._status:
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
        return self.write

    def write(self, data: bytes) -> None:
        """PEP 3333's write; the head goes with the first of it."""
        self._write(data, None)

    def send_all(self, result: Iterable[bytes]) -> None:
        """Send what the application has returned, to the end of the answer."""
        is_whole = isinstance(result, (list, tuple)) and len(result) == 1
        for data in result:
            self._write(data, len(data) if is_whole else None)
            if self.is_begun and not self._has_body:
                return
        if not self.is_begun:
            # Empty; but what a GET would get isn't known by an answer to HEAD.
            self._conversation.send(self._head(None if self._conversation.is_head else 0))
        elif self._is_chunked:
            self._conversation.send(b"0\r\n\r\n")
        if self._has_body and self._left:
            raise MisuseError(f"the answer has {self._left} bytes fewer than its Content-Length")

    def _write(self, data: bytes, length: int | None) -> None:
        if not isinstance(data, bytes):
            raise MisuseError(f"{type(data).__name__} in an answer; expected bytes")
        if not data:
            return
        head = b"" if self.is_begun else self._head(length)
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
            raise MisuseError(
                f"the answer has {excess} bytes more than its Content-Length, or more"
            )

    def _head(self, length: int | None) -> bytes:
        """Return the answer's head: `length` is that of its body, if it is known by now."""
        if not self._status:
            raise MisuseError("an answer without start_response")
        status, code = self._status, self._status[:3]
        fields = {name.lower(): value for name, value in self._headers}
        is_empty = code in ("204", "304")
        self._has_body = not (is_empty or self._conversation.is_head)
        self.goes_on = self.goes_on and self._body.can_be_drained()
        self._body.is_awaited = False  # a final answer: it is too late to ask for it
        headers = self._headers
        if code == "204":  # RFC 9110, 8.6
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        elif "content-length" in fields:
            self._left = int(fields["content-length"])
        elif length is not None and not is_empty:
            headers.append(("Content-Length", str(length)))
            self._left = length
        elif self._has_body and self._version == "1.1":
            headers.append(("Transfer-Encoding", "chunked"))
            self._is_chunked = True
        elif self._has_body:
            self.goes_on = False  # its end is the connection's
        if "date" not in fields:
            headers.append(("Date", format_date_time(time.time())))
        if "server" not in fields:
            headers.append(("Server", "snitun_sync"))
        if not self.goes_on:
            headers.append(("Connection", "close"))
        elif self._version == "1.0":
            headers.append(("Connection", "keep-alive"))
        lines = [f"HTTP/1.1 {status if status[3:] else status + ' '}\r\n"]
        lines.extend(f"{name}: {value}\r\n" for name, value in headers)
        self.is_begun = True
        return "".join((*lines, "\r\n")).encode("latin-1")


def _body_length(version: str, fields: Fields) -> int | None:
    """Return how long the request's body is, None if it comes in chunks (RFC 9112, 6.3)."""
    length, coding = fields.get("content-length"), fields.get("transfer-encoding")
    if coding is not None:
        if length is not None or version != "1.1":
            raise ViolationError("Transfer-Encoding; expected none in 1.0 or with Content-Length")
        if coding.lower() != "chunked":
            raise OverError(501, "Transfer-Encoding; expected chunked")
        return None
    if length is None:
        return 0
    if _LENGTH.fullmatch(length) is None:
        raise ViolationError("Content-Length; expected one number")
    return int(length)


def _environ(
    method: str, target: str, version: str, fields: Fields, hostname: str, scheme: str
) -> Environ:
    """Return PEP 3333's environ, but for what is the connection's."""
    if version == "1.1" and "host" not in fields:
        raise ViolationError("no Host; expected one")
    name, port = _host(fields["host"]) if "host" in fields else (hostname, "")
    raw_target = target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:  # it counts, and Host doesn't (RFC 9112, 3.2.2)
        fields["host"], target = absolute[1], absolute[2]
        name, port = _host(absolute[1])
        if not target.startswith("/"):
            target = "*" if method == "OPTIONS" and not target else f"/{target}"
    path, _, query = target.partition("?")
    if target == "*" and method == "OPTIONS":
        path = ""  # of the server as a whole; a path that isn't empty begins with a slash
    elif not path.startswith("/") or "#" in target:
        raise ViolationError("the target; expected a path, http://… or https://…")
    environ = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": _ESCAPE.sub(_unescaped, path.encode("latin-1")).decode("latin-1"),
        "QUERY_STRING": query,
        "REQUEST_URI": raw_target,
        "SERVER_NAME": name,
        "SERVER_PORT": port or ("443" if scheme == "https" else "80"),
        "SERVER_PROTOCOL": f"HTTP/{version}",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scheme,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
        "wsgi.file_wrapper": FileWrapper,
    }
    for field, value in fields.items():
        if "_" in field:
            continue  # the same key as with "-", which a proxy may have checked
        key = field.upper().replace("-", "_")
        environ[key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"] = value
    return environ


def _host(text: str) -> tuple[str, str]:
    """Return name and port, "" where it names none."""
    host = _HOST.fullmatch(text)
    if host is None:
        raise ViolationError("Host; expected one name")
    return host[1], host[2] or ""


def _unescaped(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode())
