"""Opening sockets, and what the kernel is asked and told about them."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios

from ..errors import UsageError
from ..protocol.names import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..protocol.names import Address

    Place = tuple[int, Any]
    """An address family, and what `connect` takes in it."""

# linux/tcp.h, struct tcp_info: tcpi_min_rtt (µs) at 148, tcpi_delivery_rate (bytes/s) at 160
_TCP_INFO = struct.Struct("=148xI8xQ")
# A peer that vanished without a word is noticed after 60 + 4 · 15 seconds.
KEEPALIVE_IDLE_S = 60
KEEPALIVE_INTERVAL_S = 15
KEEPALIVE_PROBES = 4


def tune(sock: socket.socket, *, is_remote: bool = True, is_blocking: bool = True) -> None:
    """Prepare a socket for the loop: non-blocking, no Nagle, TCP keepalive.

    Connections accepted from a socket that listens have its options. The other end of
    one that isn't `is_remote` can't vanish without a word: it needs no keepalive.
    """
    if is_blocking:
        sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not is_remote:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def reset_on_close(sock: socket.socket) -> None:
    """Let `close` reset the connection: who is there sees that it was cut."""
    if sock.family != socket.AF_UNIX:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # it is reset already


def limit_unsent(sock: socket.socket, size: int) -> None:
    """Let the kernel take only `size` bytes beyond what the network takes now (Linux)."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, option, size)
        except OSError:
            pass  # it only helps


def limit_unacknowledged(sock: socket.socket, seconds: float) -> None:
    """End the connection when what was sent isn't acknowledged in this time (RFC 5482; Linux)."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None and sock.family != socket.AF_UNIX:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))
        except OSError:
            pass  # the tunnel has time limits of its own


def reason(error: Exception | None) -> str:
    """Return what an error of the system says, in its own words."""
    return str(getattr(error, "strerror", None) or error or "unknown")


def os_error(code: int) -> OSError:
    """Return the system's error number `code` with its text."""
    return OSError(code, os.strerror(code))


def check_congestion_control(name: str) -> None:
    """See whether this system can do congestion control by `name`. Raises UsageError."""
    with socket.socket() as sock:
        try:
            set_congestion_control(sock, name)
            return
        except OSError as error:
            reason = error.strerror or error
    allowed = ""
    try:
        with open("/proc/sys/net/ipv4/tcp_allowed_congestion_control", encoding="ascii") as file:
            allowed = f"; expected one of {', '.join(file.read().split())}"
    except OSError:
        pass
    raise UsageError(f"--congestion-control: {shown(name)}: {reason}{allowed}")


def set_congestion_control(sock: socket.socket, name: str) -> None:
    """Let the kernel send on `sock` by the algorithm `name`, or by the system's if "" (Linux)."""
    if name:
        option = getattr(socket, "TCP_CONGESTION", None)
        if option is None:
            raise OSError("this system has no choice")
        sock.setsockopt(socket.IPPROTO_TCP, option, name.encode(errors="replace"))


def path_rate(sock: socket.socket) -> tuple[int, int]:
    """Return the rate at which the network delivers, and the bytes that its path holds (Linux).

    The first is in bytes a second, the second is that × the least round trip. (0, 0) where
    they aren't known.
    """
    if sys.platform != "linux":
        return 0, 0
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    if len(info) < _TCP_INFO.size:
        return 0, 0
    round_trip_us, rate = _TCP_INFO.unpack(info)
    return rate, rate * round_trip_us // 1_000_000


def unacknowledged_bytes(sock: socket.socket) -> int:
    """Return how much of what was sent, the end included, the other side hasn't acknowledged."""
    buffer = bytearray(4)
    try:
        fcntl.ioctl(sock, termios.TIOCOUTQ, buffer)
    except OSError:
        return 0
    return int.from_bytes(buffer, sys.byteorder)


def blocking_resolve(address: Address) -> list[Place]:
    """Return all places that `address` stands for; for worker threads. Raises OSError."""
    return _resolve(address, 0)


def numeric_places(address: Address) -> list[Place]:
    """Return the places of a path or an IP address, which needs no resolving; [] for a name."""
    try:
        return _resolve(address, socket.AI_NUMERICHOST)
    except OSError:
        return []


def _resolve(address: Address, flags: int) -> list[Place]:
    if address.path:
        return [(socket.AF_UNIX, address.path)]
    # As bytes: a text goes through the codec for names of other scripts (0.4 MiB), which
    # are refused here anyway.
    infos = socket.getaddrinfo(
        address.host.encode(), address.port, type=socket.SOCK_STREAM, flags=flags
    )
    return [(family, place) for family, _, _, _, place in infos]


def host_text(host: str, port: int) -> str:
    """Return HOST:PORT as people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def unpack_ip(address: bytes) -> str:
    """Return a packed IP address, 4 or 16 bytes, as text."""
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def pack_ip(host: str) -> bytes:
    """Return the IP address `host` (text, maybe with an IPv6 scope) as 4 or 16 bytes."""
    if ":" in host:
        return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return socket.inet_pton(socket.AF_INET, host)
