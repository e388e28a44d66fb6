"""The frame header and the device's address in NEW (docs/protocol.md, Frames).

header, one encrypted unit of 32 bytes of plaintext         payload
| channel id, 16 | flow, 1 | size, 4 | extra, 11 |           | size bytes |
"""

from __future__ import annotations

from struct import Struct

HEADER = Struct(">16sBI11s")
HEADER_SIZE = HEADER.size
ID_SIZE = 16
EXTRA_SIZE = 11

NEW = 0x01
DATA = 0x02
CLOSE = 0x04
PING = 0x08
PING_OLD = 0x05  # what some documents give; accepted, never sent
PAUSE = 0x16
RESUME = 0x32
GOAWAY = 0x47  # ours: the relay's last frame, says why it ends the tunnel; only to who knows it

EXTRA_PING = b"ping"
EXTRA_PONG = b"pong"
# Ours: a ping of whoever knows GOAWAY. For others what follows "ping" is filler; and a
# published 0.39.1 or 0.40.0 raises an error on a flow that it doesn't know.
EXTRA_PING_GOAWAY = b"ping" + b"goaway?"

# GOAWAY's reasons, at the start of its extra.
TAKEN_OVER = b"over"  # the id is the new client's address, IPv6 or IPv4-mapped; then its port, 2
EXPIRED = b"late"
STOPPING = b"stop"
REVOKED = b"void"

NEW_PAYLOAD_UNIT = 16  # a version 2 NEW payload is filled up to a multiple of this
MAX_NEW_PAYLOAD = 256  # published relays send 16 or 32

_ADDRESS_SIZES = {ord("4"): 4, ord("6"): 16}
UNKNOWN_ADDRESS = bytes(4)


def pack_address(address: bytes) -> bytes:
    """Return a packed IP address, 4 or 16 bytes, with its family before it: `4…` or `6…`."""
    return (b"4" if len(address) == 4 else b"6") + address


def unpack_address(data: bytes) -> bytes | None:
    """Return the packed IP address that `data` starts with, or None if it doesn't.

    `data` is NEW's extra (below version 2, IPv4 only: IPv6 doesn't fit) or its
    decrypted payload. What follows the address is filler.
    """
    size = _ADDRESS_SIZES.get(data[0]) if data else None
    if size is None or len(data) <= size:
        return None
    return bytes(data[1 : 1 + size])
