"""Sockets that listen, and accepting connections on the loop."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat

from .loop import READ, Handler
from .sockets import os_error, set_congestion_control, tune

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..protocol.names import Address
    from .loop import Loop, Timer

    Accepted = Callable[[socket.socket, Any], object]

BACKLOG = 1024
UNIX_MODE = 0o660
# Out of descriptors or memory: accepting again at once would spin, and each line fill the log.
PAUSE_S = 1.0
LOG_EACH_S = 60.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger("snitun_sync")


class Listener(Handler):
    """One socket that listens, and hands on what it accepts."""

    __slots__ = ("_accepted", "_at_once", "_log_at", "_loop", "_pause")

    def __init__(self, loop: Loop, sock: socket.socket, accepted: Accepted, at_once: int) -> None:
        """Own `sock`; call `accepted(sock, place)`, at most `at_once` times in a turn.

        The socket that it gets is non-blocking, and its own.
        """
        super().__init__(sock)
        self._loop, self._accepted, self._at_once = loop, accepted, at_once
        self._log_at = 0.0
        self._pause: Timer | None = None

    def listen(self) -> None:
        """Begin to accept, or go on; on the loop's thread."""
        if self.sock is not None:
            self._loop.watch(self, READ)

    def finish(self) -> None:
        """Accept whoever waits already, and listen no longer."""
        for _ in range(0, BACKLOG, self._at_once):  # and not all who come meanwhile
            if self.sock is None or not self._accept():
                break
        self.close()

    def close(self) -> None:
        """Listen no longer; harmless when it is closed already."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.close_socket(self)

    def on_ready(self, events: int) -> None:
        self._accept()

    def _accept(self) -> bool:
        """Accept some connections; return whether there may be more."""
        assert self.sock is not None
        for _ in range(self._at_once):
            try:
                sock, place = self.sock.accept()
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    continue  # that one is gone already
                self._wait(error)
                return False
            sock.setblocking(False)
            self._accepted(sock, place)
        return True

    def _wait(self, error: OSError) -> None:
        now = self._loop.now
        if now >= self._log_at:
            self._log_at = now + LOG_EACH_S
            log.error("can't accept: %s; trying again every %.0f s", error, PAUSE_S)
        self._loop.watch(self, 0)
        self._pause = self._loop.call_later(PAUSE_S, self.listen)

    def fail(self, error: Exception) -> None:
        pass  # the loop has logged it; the other connections are not to blame


def listen(address: Address, congestion_control: str = "") -> list[socket.socket]:
    """Return tuned sockets that listen on `address`, one for each family of a name.

    IPv6 sockets take no IPv4: who wants both names both, or "" for all addresses.
    Where port 0 asks for any free port, all sockets get the same one. A unix socket that
    was left at a path gives way. Raises OSError, and ValueError for no possible path.
    """
    if address.path:
        return [_listen_unix(address.path)]
    infos = socket.getaddrinfo(
        address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    port = address.port
    try:
        for family, kind, protocol, _, place in sorted(set(infos)):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError:
                if len(infos) > 1 and not address.host:
                    continue  # a kernel without IPv6: all addresses are those of IPv4
                raise
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((place[0], port, *place[2:]))
            tune(sock)
            set_congestion_control(sock, congestion_control)
            sock.listen(BACKLOG)
            port = sock.getsockname()[1]
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        if os.path.lexists(path):
            _remove_stale(path)
        sock.bind(path)
        os.chmod(path, UNIX_MODE)  # before `listen`: until then nobody can connect
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Remove the socket at `path` if nobody listens on it. Raises OSError where that isn't so."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError("what is there is no socket; expected a free path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code in (0, errno.EAGAIN):  # EAGAIN: its queue is full
        raise OSError("another program listens on it already")
    if code != errno.ECONNREFUSED:
        raise os_error(code)
    os.unlink(path)
