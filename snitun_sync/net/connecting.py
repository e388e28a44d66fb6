"""Opening connections on the loop, without waiting for them.

On the same machine a connection is there as soon as it is asked for: the kernel has
shaken hands before `connect` returns. Then nothing needs to be watched, and no thread.
"""

from __future__ import annotations

import errno
import socket

from .loop import WRITE, Handler
from .sockets import os_error, tune

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .loop import Loop, Timer
    from .sockets import Place

    Done = Callable[["socket.socket | None", "OSError | None"], object]

# A unix socket whose queue is full says so at once: when to ask again, first and at most.
FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0
_NON_BLOCKING = getattr(socket, "SOCK_NONBLOCK", 0)


class Connecting(Handler):
    """An attempt to connect to the first of some places that answers."""

    __slots__ = ("_done", "_left", "_loop", "_retry_s", "_timeout_s", "_timer")

    def __init__(self, loop: Loop, places: Sequence[Place], timeout_s: float, done: Done) -> None:
        """`start` calls `done(socket, error)`, one of them None, at once or later.

        Each of `places` gets `timeout_s` seconds. The socket is tuned, and the receiver's.
        """
        super().__init__()
        self._loop, self._left, self._done = loop, list(places), done
        self._timeout_s, self._retry_s = timeout_s, FIRST_RETRY_S
        self._timer: Timer | None = None

    def start(self) -> None:
        """Try the first place."""
        self._next(OSError(errno.EADDRNOTAVAIL, "no address"))

    def close(self) -> None:
        """Nobody waits any more: `done` won't be called."""
        self._left.clear()
        self._free()

    def _free(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop.close_socket(self)

    def _next(self, error: OSError) -> None:
        """Try one place after the other; `error` is what the last one said."""
        while self._left:
            family, place = self._left[0]
            try:
                self.sock = socket.socket(family, socket.SOCK_STREAM | _NON_BLOCKING)
                tune(self.sock, is_remote=_is_remote(place), is_blocking=not _NON_BLOCKING)
                code = self.sock.connect_ex(place)
                error = os_error(code)
                if code == errno.EINPROGRESS and _is_connected(self.sock):
                    code = 0
            except OSError as failure:
                code, error = failure.errno or errno.EIO, failure
            if code == 0:
                self._connected()
                return
            if code == errno.EINPROGRESS:
                self._loop.watch(self, WRITE)
                self._timer = self._loop.call_later(self._timeout_s, self._overdue)
                return
            self._free()
            if code == errno.EAGAIN and self._timeout_s > 0:
                self._timer = self._loop.call_later(self._retry_s, self.start)
                self._timeout_s -= self._retry_s
                self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
                return
            self._left.pop(0)
        self._done(None, error)

    def _connected(self) -> None:
        self._loop.watch(self, 0)
        sock, self.sock = self.sock, None
        self._free()
        self._done(sock, None)

    def on_ready(self, events: int) -> None:
        assert self.sock is not None
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._failed(code)
        else:
            self._connected()

    def _overdue(self) -> None:
        self._failed(errno.ETIMEDOUT)

    def _failed(self, code: int) -> None:
        self._free()
        self._left.pop(0)
        self._next(os_error(code))

    def fail(self, error: Exception) -> None:
        self.close()
        self._done(None, OSError(errno.EIO, f"a defect: {error!r}"))


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _is_remote(place: object) -> bool:
    """Tell whether the other end can vanish without a word: it isn't on this machine."""
    host = place[0] if isinstance(place, tuple) else ""
    return not (host == "" or host == "::1" or host.startswith("127."))
