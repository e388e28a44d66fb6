"""The PROXY protocol: tells a service which address its connection comes from.

    version 1:  PROXY TCP4 source destination port port CR LF, with TCP6 for IPv6;
                PROXY UNKNOWN CR LF
    version 2:  | signature, 12 | version 2 and command, 1 | family, 1 | length of the rest, 2 |
                | source, 4 or 16 | destination, 4 or 16 | port, 2 | port, 2 | TLV … |
    TLV:        | type, 1 | length, 2 | value |          none where there is no value
    SSL, a TLV of TLVs:  | client, 1 | verify, 4 | TLV … |

TLVs are only written: who reads a header wants to know the address.

A tunnel's wire doesn't carry the device's port, nor the address of the relay that it came to: zeros
stand for them. Port 443 is the destination's. Source: HAProxy's doc/proxy-protocol.txt,
version of 2020-03-05.
"""

from __future__ import annotations

import re
from struct import Struct

from ..errors import MisuseError, ViolationError
from .names import is_hostname, known_ip

PORT = 443

# | signature, 12 | version and command, 1 | family and transport, 1 | length, 2 |
HEADER = Struct(">12sBBH")
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL, PROXY = 0x20, 0x21
UNSPECIFIED, TCP4, TCP6 = 0x00, 0x11, 0x21
# | source port, 2 | destination port, 2 |
PORTS = Struct(">HH")
# | type, 1 | length, 2 |
TLV = Struct(">BH")
ALPN, AUTHORITY, UNIQUE_ID, SSL, SSL_VERSION, SSL_CIPHER = 0x01, 0x02, 0x05, 0x20, 0x21, 0x23
# | client, 1 | verify, 4 |: it speaks TLS, and has shown no certificate that is verified
SSL_START = Struct(">BI").pack(0x01, 1)
MAX_UNIQUE_ID = 128
# HAProxy's limit for a name. ALPN's are as long at most.
MAX_VALUE = 255
# What is read: the longest line of version 1 with its CR LF; of version 2 all but the HEADER.
MAX_LINE = 107
MAX_REST = 4096
LINE_START = b"PROXY "
_LINE = re.compile(
    rb"PROXY (?:UNKNOWN(?: [ -~]*)?|(TCP[46]) ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+)"
    rb" (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4}))\r\n"
)


def version_1(device: bytes) -> bytes:
    """Return the line for a device's packed IP address; zeros are an unknown one."""
    address = known_ip(device)
    if not address:
        return b"PROXY UNKNOWN\r\n"
    family, anywhere = ("TCP4", "0.0.0.0") if len(address) == 4 else ("TCP6", "::")  # noqa: S104
    return f"PROXY {family} {_text(address)} {anywhere} 0 {PORT}\r\n".encode()


def version_2(
    device: bytes,
    *,
    port: int = 0,
    authority: str = "",
    alpn: bytes = b"",
    unique_id: bytes = b"",
    tls_version: str = "",
    tls_cipher: str = "",
) -> bytes:
    """Return the header for a device's packed IP address; zeros are an unknown one.

    `port`: the device's, where it is known. `authority`: the name that the device asks for;
    what is no hostname is not passed on. `alpn`: the protocol. `unique_id`: of the connection.
    `tls_version`, such as TLSv1.3, and `tls_cipher`, of OpenSSL's names: where TLS was ended
    before the service. Raises MisuseError for a `unique_id` of more than 128 bytes, and for
    more than 255 of the others.
    """
    address = known_ip(device)
    if not address:
        return HEADER.pack(SIGNATURE, LOCAL, UNSPECIFIED, 0)
    rest = address + bytes(len(address)) + PORTS.pack(port, PORT) + _tlv(ALPN, alpn)
    if is_hostname(authority):
        rest += _tlv(AUTHORITY, authority.encode())
    rest += _tlv(UNIQUE_ID, unique_id, MAX_UNIQUE_ID)
    if tls_version:
        parts = _tlv(SSL_VERSION, tls_version.encode()) + _tlv(SSL_CIPHER, tls_cipher.encode())
        rest += _tlv(SSL, SSL_START + parts)
    family = TCP4 if len(address) == 4 else TCP6
    return HEADER.pack(SIGNATURE, PROXY, family, len(rest)) + rest


def read_header(data: bytes | bytearray) -> tuple[int, bytes, int] | None:
    """Read the header that a connection begins with; None if it isn't whole yet.

    Returns its length, and the source: the packed IP address and the port; b"" and 0 where it
    names none (LOCAL, UNKNOWN, no TCP over IP). Raises ViolationError for anything else.
    """
    for start, read in ((SIGNATURE, _read_version_2), (LINE_START, _read_version_1)):
        if data.startswith(start):
            return read(bytes(data[: HEADER.size + MAX_REST]))
        if start.startswith(bytes(data)):
            return None
    raise ViolationError("no PROXY header; expected one, of version 1 or 2")


def _read_version_1(data: bytes) -> tuple[int, bytes, int] | None:
    end = data.find(b"\r\n", 0, MAX_LINE) + 2
    if end < 2:
        if len(data) < MAX_LINE:
            return None
        raise ViolationError(f"a PROXY line without an end; expected {MAX_LINE} bytes at most")
    line = _LINE.fullmatch(data[:end])
    if line is None:
        raise ViolationError("a malformed PROXY line")
    if line[1] is None:
        return end, b"", 0
    from ipaddress import IPv4Address, IPv6Address  # noqa: PLC0415  few read lines

    kind = IPv4Address if line[1] == b"TCP4" else IPv6Address
    try:
        source, _ = kind(line[2].decode()), kind(line[3].decode())
    except ValueError:
        raise ViolationError("a PROXY line with a malformed address") from None
    if max(int(line[4]), int(line[5])) > 65535:
        raise ViolationError("a PROXY line with a port beyond 65535")
    return end, known_ip(source.packed), int(line[4])


def _read_version_2(data: bytes) -> tuple[int, bytes, int] | None:
    if len(data) < HEADER.size:
        return None
    _, command, family, length = HEADER.unpack_from(data)
    if command not in (LOCAL, PROXY) or family >> 4 > 3 or family & 15 > 2:
        raise ViolationError(
            f"a PROXY header of version and command 0x{command:02x}, 0x{family:02x}"
        )
    if length > MAX_REST:
        raise ViolationError(f"a PROXY header of {length} bytes; expected {MAX_REST} at most")
    end, size = HEADER.size + length, {TCP4: 4, TCP6: 16}.get(family, 0)
    if len(data) < end:
        return None
    if command == LOCAL or not size:
        return end, b"", 0
    if length < 2 * size + PORTS.size:
        raise ViolationError(f"a PROXY header of {length} bytes, too short for its addresses")
    port: int = PORTS.unpack_from(data, HEADER.size + 2 * size)[0]
    return end, known_ip(data[HEADER.size : HEADER.size + size]), port


def _tlv(kind: int, value: bytes, limit: int = MAX_VALUE) -> bytes:
    if len(value) > limit:
        raise MisuseError(f"PROXY TLV 0x{kind:02x} of {len(value)} bytes, at most {limit} can be")
    return TLV.pack(kind, len(value)) + value if value else b""


def _text(address: bytes) -> str:
    """Return a packed IP address as text (RFC 5952): services log what they get."""
    if len(address) == 4:
        return ".".join(map(str, address))
    text = "".join(f":{group:x}" for group in Struct(">8H").unpack(address)) + ":"
    for count in range(7, 1, -1):
        zeros = ":" + count * "0:"
        if zeros in text:
            text = text.replace(zeros, "::", 1)
            break
    # Colons stand at both ends: one of them too many, but where the zeros were.
    text = text if text.startswith("::") else text[1:]
    return text if text.endswith("::") else text[:-1]
