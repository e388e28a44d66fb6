"""Handlers: an endpoint inside this very process, blocking code on a few worker threads.

    waiting ─ a thread is free → running ─ ended, or failed → over
       └──── readable ← parked ←───┘ (its run() returned True)

Each device's connection is a pair of unix sockets: the bridge has one end, the handler
the other, and what one of them doesn't take holds up the other one, as with any endpoint. (The
kernel's own size for their buffers, 208 KiB, is as fast as more, and fits a bridge's turn.) The
pair is made when the handler's turn comes: what waits costs no descriptor. A connection that
is parked, between two requests, costs no thread.
"""

from __future__ import annotations

import logging
import socket
from traceback import clear_frames

from ..errors import EndpointError, LostError
from ..net.loop import READ, Handler
from ..net.service import bounded
from ..net.workers import Workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from ..net.endpoint import Target
    from ..net.loop import Loop, Timer

    class Caller(Target, Protocol):
        """Whose connection is wanted: a device."""

        @property
        def device(self) -> str:
            """Its address as text, "" if that isn't known."""

    class Conversation(Protocol):
        """What is done with one connection; made, and run, on worker threads."""

        def run(self) -> bool:
            """Go on with it; return whether it is to be run again once more has arrived.

            Never called twice at a time. An exception cuts the connection, and nothing else; an
            EndpointError, for a reason that isn't a defect.
            """

    Make = Callable[[socket.socket, str], Conversation]

log = logging.getLogger("snitun_sync")

MOST_THREADS = 1000
MOST_WAITING = 10**6
# How long a thread stays that has nothing to do, and a connection that says nothing.
THREAD_IDLE_S = 10.0
IDLE_S = 60.0
# The same for a connection as the client stops: what was on its way is still served.
LAST_S = 1.0


class Call:
    """The conversation that is one call of `handler(connection, device_address)`.

    `connection` is a blocking socket (a unix one), the device's address is text. When the
    handler returns, the connection is closed, whatever else still refers to it. To keep it,
    take it away with `detach`.
    """

    def __init__(
        self,
        handler: Callable[[socket.socket, str], object],
        connection: socket.socket,
        device: str,
    ) -> None:
        self._handler, self._connection, self._device = handler, connection, device

    def run(self) -> bool:
        """Call the handler."""
        self._handler(self._connection, self._device)
        return False


class Handlers:
    """The endpoint; of the loop's thread."""

    def __init__(
        self, loop: Loop, make: Make, threads: int, waiting: int, *, waits_first: bool = False
    ) -> None:
        """Run what `make(connection, device_address)` returns, on at most `threads` threads.

        At most `waiting` connections wait for one. With `waits_first` they don't even
        begin before the device has sent something. Raises ConfigurationError.
        """
        self.loop, self.make = loop, make
        self._threads = int(bounded(threads, "threads", 1, MOST_THREADS, "threads"))
        self._limit = int(bounded(waiting, "waiting", 0, MOST_WAITING, "connections"))
        self._waits_first = waits_first
        self._workers = Workers(loop, self._threads, idle_s=THREAD_IDLE_S)
        self._served: dict[Caller, _Served] = {}
        self._waiting: dict[_Served, None] = {}  # for a thread, in their order
        self._parked: dict[_Served, None] = {}  # since when they are: the oldest first
        self._timer: Timer | None = None  # while any are parked
        self._is_closed = self._is_draining = False
        self.running = 0
        """How many threads are at work."""
        self.failures = 0
        """How many connections were cut: too many waited, or the handler failed."""
        self.failure = ""
        """Why the last of them was."""

    def __str__(self) -> str:
        return "this process"

    @property
    def has_waiting(self) -> bool:
        """Whether connections wait for a thread; may be asked on any."""
        return bool(self._waiting)

    def connect(self, target: Caller) -> None:
        """Open a connection: call the target's `connected`, or its `abort`, now or later."""
        if self._is_closed:
            target.abort(LostError("stopped"))
            return
        served = self._served[target] = _Served(self, target)
        if not self._waits_first:
            self.proceed(served)
        elif (sock := self._open(served)) is not None:
            self._park(served)
            target.connected(sock)

    def cancel(self, target: Caller) -> None:
        """The target is gone: what hasn't begun never will; what runs finds its connection ended.

        Harmless when it is over already.
        """
        served = self._served.pop(target, None)
        if served is not None and not served.is_running:
            self.forget(served)

    def drain(self) -> None:
        """The client stops: serve what is under way or comes soon, and park nobody any more."""
        self._is_draining = True
        for served in self._parked:
            served.parked_until = self.loop.now + LAST_S
        if self._timer is not None:
            self._timer.cancel()
            self._end_idle()

    def close(self) -> None:
        """Run nothing any more, and close what waits or is parked.

        Who runs finds out as the bridges end. What the threads have handed over last
        is freed by one more `run_calls` of the loop.
        """
        self._is_closed = True
        self._workers.close()
        for target in tuple(self._served):
            self.cancel(target)

    def proceed(self, served: _Served) -> None:
        """Run it, at once or when its turn has come."""
        self._parked.pop(served, None)
        if self.running < self._threads:
            self._run(served)
        elif len(self._waiting) < self._limit:
            self._waiting[served] = None
        else:
            self.abort(
                served,
                f"{self.running} threads are at work, {len(self._waiting)} connections wait for "
                "one, and no more may",
            )

    def abort(self, served: _Served, why: str) -> None:
        """Cut the connection, for a reason that is not the device's."""
        self.failures += 1
        self.failure = why
        served.target.abort(EndpointError(why))  # before it could see a good end
        self.forget(served)

    def forget(self, served: _Served) -> None:
        """Free all that it has; it doesn't run."""
        self._served.pop(served.target, None)
        self._waiting.pop(served, None)
        self._parked.pop(served, None)
        if self._timer is not None and not self._parked:
            self._timer.cancel()
            self._timer = None
        served.close()

    def _open(self, served: _Served) -> socket.socket | None:
        """Make the pair and return the bridge's end; None if it can't be had."""
        try:
            sock, served.sock = socket.socketpair()
        except OSError as error:
            self.abort(served, f"no connection to a handler can be opened: {error.strerror}")
            return None
        sock.setblocking(False)
        served.sock.setblocking(True)  # whatever socket.setdefaulttimeout says
        return sock

    def _run(self, served: _Served) -> None:
        sock = None
        if served.sock is None and (sock := self._open(served)) is None:
            return
        served.is_running = self._workers.submit(served.blocking_run, self._ran)
        self.running += served.is_running
        if sock is not None:
            served.target.connected(sock)
        if not served.is_running:
            self.abort(served, "no thread can be started for its handler")

    def _ran(self, served: _Served, _: Exception | None) -> None:
        """A thread is free again."""
        self.running -= 1
        served.is_running = False
        failure, served.failure = served.failure, None
        is_gone = served.target not in self._served
        is_defect = failure is not None and not isinstance(failure, EndpointError)
        if is_defect and not (is_gone and isinstance(failure, ConnectionError)):
            device = served.target.device or "a device"
            log.error("defect in handler of %s", device, exc_info=failure)
        if is_gone:
            self.forget(served)
        elif is_defect:
            self.abort(served, f"its handler failed: {type(failure).__name__}")
        elif failure is not None:
            self.abort(served, str(failure))
        elif served.goes_on and not self._is_draining and served.fileno() >= 0:
            self._park(served)
        else:
            self.failure = ""
            self.forget(served)
        while self._waiting and self.running < self._threads:
            served = next(iter(self._waiting))
            del self._waiting[served]
            self._run(served)

    # --- who is parked ---------------------------------------------------------------

    def _park(self, served: _Served) -> None:
        idle_s = LAST_S if self._is_draining else IDLE_S
        served.parked_until = self.loop.now + idle_s
        self._parked[served] = None
        self.loop.watch(served, READ)
        if self._timer is None:
            self._timer = self.loop.call_later(idle_s, self._end_idle)

    def _end_idle(self) -> None:
        """End those whose time is over; come again when the next one's is."""
        self._timer = None
        while self._parked:
            served = next(iter(self._parked))
            left_s = served.parked_until - self.loop.now
            if left_s > 0:
                self._timer = self.loop.call_later(left_s, self._end_idle)
                return
            self.forget(served)


class _Served(Handler):
    """One device's connection. While it runs, all but `target` is the thread's."""

    __slots__ = (
        "_conversation",
        "_handlers",
        "failure",
        "goes_on",
        "is_running",
        "parked_until",
        "target",
    )

    def __init__(self, handlers: Handlers, target: Caller) -> None:
        super().__init__()
        self._handlers, self.target = handlers, target
        self._conversation: Conversation | None = None
        self.failure: BaseException | None = None
        self.goes_on = self.is_running = False
        self.parked_until = 0.0

    def blocking_run(self) -> _Served:
        """Run the conversation; for a worker thread. Return this connection, for its owner."""
        assert self.sock is not None
        self.goes_on = False
        try:
            if self._conversation is None:
                self._conversation = self._handlers.make(self.sock, self.target.device)
            self.goes_on = self._conversation.run()
        except BaseException as error:  # SystemExit, too: it would end the thread
            self.failure = error
            # What its functions still hold is freed here: on the loop's thread it could block.
            clear_frames(error.__traceback__)
        if not self.goes_on:
            self._conversation = None  # likewise
        return self

    def fileno(self) -> int:
        """Return the connection's descriptor, -1 if its handler has closed or detached it."""
        return self.sock.fileno() if self.sock is not None else -1

    def on_ready(self, events: int) -> None:
        assert self.sock is not None
        self._handlers.loop.watch(self, 0)
        try:
            is_over = not self.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            is_over = True
        if is_over:  # no thread is needed to see that
            self._handlers.forget(self)
        else:
            self._handlers.proceed(self)

    def fail(self, error: Exception) -> None:
        self._handlers.abort(self, f"a defect: {error!r}")

    def close(self) -> None:
        """Close the connection, also where a handler has left a file of it open, or a copy."""
        if self.sock is not None:
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it is closed or detached, or the other end is
        self._handlers.loop.close_socket(self)
        self._conversation = self.failure = None
