"""How the client reaches its relay: by the first address that answers (RFC 8305).

The addresses of a name race each other, on one thread that may block: where one of them
is a black hole, as broken IPv6 is, the others needn't wait for its end.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from itertools import zip_longest

from .sockets import blocking_resolve, os_error, tune

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..protocol.names import Address
    from .proxy import Proxy
    from .sockets import Place

ATTEMPT_DELAY_S = 0.25  # RFC 8305, section 5
ATTEMPTS = 32  # a name may have thousands of addresses
# What an attempt fails with when this machine has no way to addresses of that family.
_NO_WAY = (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def blocking_dial(address: Address, timeout_s: float, proxy: Proxy | None = None) -> socket.socket:
    """Resolve `address` and return a tuned socket connected to it; for worker threads.

    With a `proxy` it is the proxy's address that is resolved and dialled, and the proxy
    that connects the socket on to `address`. All of this, but for the resolver, is over
    `timeout_s` seconds after the last attempt's start at the latest. Raises OSError.
    """
    if proxy is None:
        return _blocking_race(address, timeout_s)[0]
    try:
        sock, deadline = _blocking_race(proxy.address, timeout_s)
    except OSError as error:
        raise OSError(f"the proxy {proxy} can't be reached: {error.strerror or error}") from None
    try:
        proxy.blocking_open(sock, address, deadline)
    except BaseException:
        sock.close()
        raise
    return sock


def _blocking_race(address: Address, timeout_s: float) -> tuple[socket.socket, float]:
    """Return the first socket that connects, and the deadline by the monotonic clock.

    An attempt starts every ATTEMPT_DELAY_S, or as soon as another one has failed.
    """
    left = _interleaved(blocking_resolve(address))[:ATTEMPTS]
    racing: dict[int, socket.socket] = {}  # by descriptor
    errors: list[OSError] = []
    poller = select.poll()
    next_at = deadline = 0.0
    try:
        while left or racing:
            now = time.monotonic()
            if left and now >= next_at:
                next_at, deadline = now + ATTEMPT_DELAY_S, now + timeout_s
                try:
                    sock = _start(*left.pop(0))
                except OSError as error:
                    errors.append(error.with_traceback(None))  # no cycle through this frame
                    next_at = now
                    continue
                racing[sock.fileno()] = sock
                poller.register(sock, select.POLLOUT)
            elif not left and now >= deadline:
                errors += [os_error(errno.ETIMEDOUT)] * len(racing)
                break
            wait_s = (next_at if left else deadline) - now
            for fd, _ in poller.poll(max(0.0, wait_s * 1000)):
                code = racing[fd].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    return racing.pop(fd), deadline
                errors.append(os_error(code))
                next_at = now
                poller.unregister(fd)
                racing.pop(fd).close()
    finally:
        for sock in racing.values():
            sock.close()
    # The last one that isn't about this machine; getaddrinfo puts what can't be reached last.
    failure = ([error for error in errors if error.errno not in _NO_WAY] or errors)[-1]
    text = failure.strerror or str(failure)
    if len(errors) > 1:
        text += f" ({len(errors)} addresses tried)"
    raise OSError(failure.errno, text)


def _start(family: int, place: object) -> socket.socket:
    """Return a tuned socket that begins to connect to `place`. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        tune(sock)
        code = sock.connect_ex(place)  # type: ignore[arg-type]
        if code in (0, errno.EINPROGRESS):
            return sock
        raise os_error(code)
    except BaseException:
        sock.close()
        raise


def _interleaved(places: list[Place]) -> list[Place]:
    """Return `places` with the families in turn, the preferred one first (RFC 8305, 4)."""
    families: dict[int, list[Place]] = {}
    for place in places:
        families.setdefault(place[0], []).append(place)
    return [place for rank in zip_longest(*families.values()) for place in rank if place]
