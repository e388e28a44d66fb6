"""One request over HTTP/1.1 and TLS (RFC 9110, 9112), for worker threads and child processes.

What it takes, `http.client` and `ssl`, is imported by the request itself: whoever only keeps a
URL keeps little memory. Redirects aren't followed, and a connection carries one request.
"""

from __future__ import annotations

import io
import re
import socket
import time

from ..errors import wrong_setting
from ..protocol.names import normal_hostname, parse_address, shown
from .dialing import blocking_dial
from .loop import utc_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from http.client import HTTPResponse
    from ssl import SSLContext

    from ..protocol.names import Address
    from .proxy import Proxy

_PORTS = {"https": 443, "http": 80}
AROUND_BYTES = 128 * 1024  # a head, and what is read ahead
# OpenSSL's reasons why it doesn't trust a certificate: x509_vfy.h, X509_V_ERR_…
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_ISSUERS = (18, 19, 20, 21)


class Url:
    """Where requests go: scheme and address, and what all paths begin with."""

    __slots__ = ("address", "option", "path", "scheme")

    def __init__(self, scheme: str, address: Address, path: str, option: str) -> None:
        """Take what `parse_url` has read; `option` is where it comes from."""
        self.scheme, self.address, self.path, self.option = scheme, address, path, option

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def authority(self) -> str:
        """HOST or HOST:PORT."""
        text = str(self.address)
        return text.removesuffix(f":{_PORTS[self.scheme]}") if self.address.host else text


class Answer:
    """What came back: `headers` by their names in lower case, and the whole body."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body


def parse_url(text: str, option: str) -> Url:
    """Read https://HOST[:PORT][/PATH]; http://… only where the host is this machine.

    A slash at the end doesn't count. Raises UsageError for an option (`--…`), else
    ConfigurationError; its text shows no user and no password.
    """
    expected = "expected https://HOST[:PORT][/PATH]"
    match = re.fullmatch(r"([a-zA-Z]+)://([^/?#]*)([/?#][!-~]*)?", text)
    if match is None or match[1].lower() not in _PORTS:
        found = "a URL of another kind" if set("@?#") & set(text) else shown(text)
        raise wrong_setting(option, f"{found}; {expected}")
    scheme, place, path = match[1].lower(), match[2], match[3] or ""
    if "@" in place or set("?#") & set(path):
        raise wrong_setting(option, f"a URL with user, query or fragment; {expected}")
    address = parse_address(place, option, default_port=_PORTS[scheme])
    if scheme == "http" and not _is_loopback(address.host):
        raise wrong_setting(option, f"http:// to {address}, another machine; {expected}")
    return Url(scheme, address, path.rstrip("/"), option)


def _is_loopback(host: str) -> bool:
    return normal_hostname(host) in ("localhost", "::1") or bool(
        re.fullmatch(r"127(\.[0-9]{1,3}){3}", host)
    )


def blocking_request(
    url: Url,
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    ca_file: str = "",
    proxy: Proxy | None = None,
    timeout_s: float,
    limit_bytes: int,
    opened: Callable[[socket.socket], object] | None = None,
) -> Answer:
    """Ask for `path` below `url` and return the whole answer, whatever its status.

    But for the resolver, which has limits of its own, and for the attempts to connect to one
    after the other of a name's addresses, all is over after `timeout_s` seconds. `ca_file` has
    the certificates, in PEM, that alone are trusted; "" stands for the system's. `opened` gets
    the socket: who shuts it down, on any thread, ends the request. Raises OSError, with one line
    that says what went wrong where; a body of more than `limit_bytes` is wrong as well.
    """
    # Here, not above: see the head of this file.
    import http.client  # noqa: PLC0415
    import ssl  # noqa: PLC0415

    deadline = time.monotonic() + timeout_s
    context = _context(ca_file, url.option) if url.scheme == "https" else None
    try:
        # http:// goes to this very machine, which isn't the one that a proxy would take for it.
        sock = blocking_dial(url.address, timeout_s, proxy if context is not None else None)
        try:
            if context is not None:
                name = url.address.host.partition("%")[0].rstrip(".")
                sock = context.wrap_socket(
                    sock, server_hostname=name, do_handshake_on_connect=False
                )
            if opened is not None:
                opened(sock)
            timed = _Timed(sock, deadline, limit_bytes)
            if isinstance(sock, ssl.SSLSocket):
                timed.ready().do_handshake()  # type: ignore[attr-defined]
            timed.send_all(_request(url, method, url.path + path or "/", headers or {}, body))
            with http.client.HTTPResponse(timed, method=method) as response:  # type: ignore[arg-type]
                return _blocking_answer(response, limit_bytes)
        finally:
            sock.close()
    except ssl.SSLCertVerificationError as error:
        reason = _distrust(error.verify_code, error.verify_message, url)
    except socket.timeout:
        reason = f"no whole answer within {timeout_s:g} s"
    except ssl.SSLError as error:
        text = error.reason or error.strerror or str(error)
        reason = f"TLS failed: {text.lower().replace('_', ' ')}"
    except OSError as error:
        reason = error.strerror or str(error)
    except (http.client.HTTPException, ValueError) as error:  # ValueError: a chunk of -5 bytes
        reason = f"its answer is no HTTP, or was cut short ({type(error).__name__})"
    raise ConnectionError(f"{url.authority}: {reason}")


class _Timed(io.RawIOBase):
    """What http.client needs of a socket, all of it over at a deadline.

    A socket's own time limit is that of one call: a byte a second would go on for ever. And
    for http.client a chunk of -1 bytes is all that comes, however much that is.
    """

    def __init__(self, sock: socket.socket, deadline: float, limit_bytes: int) -> None:
        self._sock, self._deadline = sock, deadline
        self._limit_bytes, self._left_bytes = limit_bytes, 2 * limit_bytes + AROUND_BYTES

    def ready(self) -> socket.socket:
        """Return the socket for one call that may take the time that is left."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise socket.timeout
        self._sock.settimeout(left_s)
        return self._sock

    def send_all(self, data: bytes) -> None:
        while data:
            data = data[self.ready().send(data) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = self.ready().recv_into(buffer)
        self._left_bytes -= size
        if self._left_bytes < 0:
            raise OSError(f"an answer of more than {self._limit_bytes} bytes")
        return size


def _blocking_answer(response: HTTPResponse, limit_bytes: int) -> Answer:
    response.begin()
    fields = {name.lower(): " ".join(text.split()) for name, text in response.getheaders()}
    if (response.length or 0) > limit_bytes:
        raise OSError(f"an answer of {response.length} bytes, expected at most {limit_bytes}")
    body = response.read(limit_bytes + 1)
    if len(body) > limit_bytes:
        raise OSError(f"an answer of more than {limit_bytes} bytes")
    if response.length:
        raise OSError(f"the answer lacks its last {response.length} bytes")
    return Answer(response.status, fields, body)


def _request(url: Url, method: str, target: str, headers: Mapping[str, str], body: bytes) -> bytes:
    fields = {"Host": url.authority, "Connection": "close", "Accept-Encoding": "identity"}
    fields.update(headers)
    if body or method == "POST":
        fields["Content-Length"] = str(len(body))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {text}" for name, text in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def _context(ca_file: str, option: str) -> SSLContext:
    import ssl  # noqa: PLC0415

    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except ssl.SSLError:
        raise OSError(f"{option}-ca: {ca_file} has no certificates (PEM)") from None
    except OSError as error:
        raise OSError(f"{option}-ca: can't read {ca_file}: {error.strerror or error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _distrust(code: int, message: str, url: Url) -> str:
    """Return why a certificate isn't trusted; whose clock is wrong has to be told so."""
    if code in (_NOT_YET_VALID, _EXPIRED):
        clock = time.strftime("%Y-%m-%d %H:%M:%S UTC", utc_time(time.time()))
        fault = "isn't valid yet" if code == _NOT_YET_VALID else "has expired"
        return (
            f"by this machine's clock ({clock}) the certificate of {url.address.host} {fault}; "
            "is the clock right?"
        )
    hint = f"; what signed it goes into {url.option}-ca" if code in _UNKNOWN_ISSUERS else ""
    return f"its certificate isn't trusted: {message.rstrip('.')}{hint}"
