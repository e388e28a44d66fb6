"""From a TLS ClientHello to the hostname and the protocols that it asks for (RFC 8446 §4.1.2).

    record:     | type 22, 1 | version, 2 | length, 2 | fragment |
    handshake:  | type 1, 1 | length, 3 | body |               may span records
    body:       | version, 2 | random, 32 | session id, <1> | cipher suites, <2>
                | compression methods, <1> | extensions, <2> |
    extension:  | type, 2 | data, <2> |
    server_name, type 0:  list, <2> of | type 0, 1 | host name, <2> |   RFC 6066 §3
    ALPN, type 16:        list, <2> of | protocol, <1> |                RFC 7301 §3.1

`<n>` is a vector with its length in n bytes before it.
"""

from __future__ import annotations

from struct import Struct

from ..errors import HelloError
from .names import normal_hostname

HANDSHAKE_RECORD = 22
CLIENT_HELLO = 1
SERVER_NAME = 0
HOST_NAME = 0
ALPN = 16
MAX_FRAGMENT = 16384
MAX_HELLO = 65536  # bytes on the wire, record headers included

# | type, 1 | version, 2 | length, 2 |
RECORD = Struct(">BBxH")
# | type, 2 | length, 2 |
EXTENSION = Struct(">HH")

# Alerts (RFC 8446 §6): | type 21 | version, 2 | length, 2 | fatal | description |
ALERT_UNRECOGNIZED_NAME = b"\x15\x03\x03\x00\x02\x02\x70"
ALERT_INTERNAL_ERROR = b"\x15\x03\x03\x00\x02\x02\x50"


class HelloReader:
    """Finds the hostname in a ClientHello that comes in any pieces.

    `received` keeps all bytes taken, also those behind the ClientHello: they
    belong to whoever answers it.
    """

    __slots__ = ("_at", "_body", "_message", "received")

    def __init__(self, received: bytearray | None = None) -> None:
        """Read out of `received`, which belongs to somebody else; without it, out of an own one.

        Its owner appends to it, takes nothing away, and calls `look`.
        """
        self.received = bytearray() if received is None else received
        self._message = bytearray()  # the handshake message without record headers
        self._body = b""  # what follows its own header, once it is whole
        self._at = 0  # where the next record starts in `received`

    def receive(self, data: bytes | memoryview) -> str | None:
        """Take the next bytes, then `look`."""
        self.received += data
        return self.look()

    def look(self) -> str | None:
        """Return the hostname once a whole ClientHello has been received, else None.

        The hostname is in normal form, and "" where the device names none. Raises
        HelloError for what is no ClientHello, or for more than 64 KiB.
        """
        received = self.received
        while len(received) >= self._at + 5:
            start = self._at + 5
            kind, major, length = RECORD.unpack_from(received, self._at)
            if kind != HANDSHAKE_RECORD or major != 3 or not 0 < length <= MAX_FRAGMENT:
                raise HelloError(
                    f"no TLS handshake record: type {kind}, version {major}, length {length}"
                )
            if start + length > MAX_HELLO:
                raise HelloError(f"the ClientHello is longer than {MAX_HELLO} bytes")
            if len(received) < start + length:
                return None
            self._at = start + length
            self._message += received[start : self._at]
            if (hostname := self._hostname()) is not None:
                return hostname
        return None

    def alpn(self) -> tuple[bytes, ...]:
        """Return the protocols that a whole ClientHello offers, () for none. Raises HelloError."""
        return _protocols(_extension(self._body, ALPN)) if self._body else ()

    def _hostname(self) -> str | None:
        message = self._message
        if message[0] != CLIENT_HELLO:
            raise HelloError(f"TLS handshake message {message[0]}, expected {CLIENT_HELLO}")
        if len(message) < 4:
            return None
        end = 4 + int.from_bytes(message[1:4], "big")
        if end > MAX_HELLO:
            raise HelloError(f"the ClientHello has {end} bytes, expected at most {MAX_HELLO}")
        if len(message) < end:
            return None
        self._body = bytes(message[4:end])
        return _host_name(_extension(self._body, SERVER_NAME))


def _extension(body: bytes, wanted: int) -> bytes | None:
    """Return the data of the first extension of a type, None where there is none."""
    at = 2 + 32
    for size, name in ((1, "session id"), (2, "cipher suites"), (1, "compression methods")):
        at = _vector(body, at, size, name)[1]
    if at == len(body):
        return None  # no extensions
    extensions, at = _vector(body, at, 2, "extensions")
    if at != len(body):
        raise HelloError(f"{len(body) - at} bytes behind the ClientHello's extensions")
    found, at, end = None, 0, len(extensions)
    while at < end:
        # Written out: there are some 15 of them in front of each connection.
        if at + 4 > end:
            raise HelloError(f"an extension has {end - at} bytes, expected at least 4")
        kind, size = EXTENSION.unpack_from(extensions, at)
        at += 4 + size
        if at > end:
            raise HelloError(f"extension ends at {at}, but what holds it has {end} bytes")
        if kind == wanted and found is None:
            found = extensions[at - size : at]
    return found


def _host_name(data: bytes | None) -> str:
    if data is None:
        return ""
    names, end = _vector(data, 0, 2, "server_name")
    if end != len(data) or not names:
        raise HelloError(f"server_name has {len(data)} bytes, its list ends at {end}")
    at = 0
    while at < len(names):
        kind = names[at]
        name, at = _vector(names, at + 1, 2, "server name")
        if kind == HOST_NAME:
            try:
                return normal_hostname(name.decode("ascii"))
            except UnicodeDecodeError:
                raise HelloError("the server name is not ASCII") from None
    return ""


def _protocols(data: bytes | None) -> tuple[bytes, ...]:
    if data is None:
        return ()
    names, end = _vector(data, 0, 2, "ALPN")
    if end != len(data) or not names:
        raise HelloError(f"ALPN has {len(data)} bytes, its list ends at {end}")
    protocols, at = [], 0
    while at < len(names):
        name, at = _vector(names, at, 1, "protocol")
        if not name:
            raise HelloError("a protocol in ALPN has no name")
        protocols.append(name)
    return tuple(protocols)


def _vector(data: bytes, at: int, size: int, name: str) -> tuple[bytes, int]:
    """Return the vector at `at`, its length in `size` bytes before it, and where it ends."""
    start = at + size
    end = start + int.from_bytes(data[at:start], "big")
    if start > len(data) or end > len(data):
        raise HelloError(f"{name} ends at {end}, but what holds it has {len(data)} bytes")
    return data[start:end], end
