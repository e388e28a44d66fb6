"""The event loop: sockets, timers and one receive buffer, all on one thread.

A turn of the loop waits for sockets, calls the handlers of those that are ready,
runs timers and calls from other threads, and then flushes what the turn has made
ready to be sent. Only `call_soon_threadsafe` and `stop` may be called from
another thread.

Sockets are read into one buffer that belongs to the loop. What a handler read in
a turn stays there until the flush at its end, so that it can be sent on without a
copy; a handler that finds the buffer full makes an early flush.
"""

from __future__ import annotations

import heapq
import logging
import os
import select
import socket
import time
from collections import deque
from functools import partial

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    class Flushable(Protocol):
        """Who has something to be sent at the end of the turn."""

        def flush(self) -> None:
            """Write what was queued; copy what the socket doesn't take."""

        def fail(self, error: Exception) -> None:
            """A defect: `flush` raised `error`."""


# The seconds since the machine's start: no setting of the clock changes them, and they go on
# while it sleeps, as the other side's do (CLOCK_BOOTTIME, clock_gettime(2)).
clock: Callable[[], float] = partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)


def utc_time(seconds: float) -> time.struct_time:
    """Return UTC Unix seconds as a date; in 2038 at most where the system's clock ends then."""
    try:
        return time.gmtime(seconds)
    except OverflowError:  # time_t has 32 bits, and a certificate may be valid longer
        return time.gmtime(2**31 - 1)


def utc(seconds: float) -> str:
    """Return UTC Unix seconds as people read them."""
    return time.strftime("%Y-%m-%d %H:%M:%S", utc_time(seconds))


# poll(2)'s POLLIN and POLLOUT, which are epoll's too.
READ = 1
WRITE = 4

BUFFER_BYTES = 256 * 1024
# poll(2) counts milliseconds in 31 bits: 24 days. For a later timer it is called again.
LONGEST_POLL_S = 86400.0
# A read with less room than this would be wasteful: flush first.
MIN_ROOM_BYTES = 64 * 1024
RANDOM_POOL_BYTES = 4096
# Events looked at in a turn; what is more comes in the next one.
EVENTS_AT_ONCE = 256

log = logging.getLogger("snitun_sync")


class Handler:
    """Base of all that owns a socket on the loop."""

    __slots__ = ("sock", "watched")

    def __init__(self, sock: socket.socket | None = None) -> None:
        self.sock = sock
        self.watched = 0
        """The events that the loop looks for, READ | WRITE; changed by `Loop.watch` alone."""

    def on_ready(self, events: int) -> None:
        """The socket is ready for `events`, all of them still watched."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """A defect: `on_ready` raised `error`. End whatever this handler serves."""
        raise NotImplementedError


class Timer:
    """A call to come; `cancel` it when it is no longer wanted."""

    __slots__ = ("_loop", "callback")

    def __init__(self, loop: Loop, callback: Callable[[], object]) -> None:
        self._loop = loop
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Don't call; harmless when the call has been made already."""
        if self.callback is not None:
            self.callback = None
            self._loop._timer_cancelled()


class Loop(Handler):
    """See the head of this file. Not reusable: it runs once, and is closed then."""

    __slots__ = (
        "_buffer",
        "_calls",
        "_cancelled",
        "_dirty",
        "_handlers",
        "_is_stopping",
        "_poller",
        "_pool",
        "_pool_at",
        "_sequence",
        "_timers",
        "_used",
        "_waker",
        "now",
    )

    def __init__(self) -> None:
        self._waker, own = socket.socketpair()
        super().__init__(own)
        self._waker.setblocking(False)
        own.setblocking(False)
        # Not by `selectors`: its objects for each event cost more than the system call.
        self._poller = select.epoll() if hasattr(select, "epoll") else _Poll()
        self._handlers: dict[int, Handler] = {}  # by descriptor, those in the poller
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._used = 0  # bytes at the start of the buffer that wait for the flush
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = self._cancelled = 0
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._dirty: list[Flushable] = []
        self._is_stopping = False
        self._pool, self._pool_at = b"", 0
        self.now = clock()
        """The time of `clock` at the start of this turn."""
        self.watch(self, READ)

    # --- sockets ---------------------------------------------------------------

    def watch(self, handler: Handler, events: int) -> None:
        """Look for `events` (READ | WRITE, or 0) on the handler's socket from now on.

        A socket of which nothing is wanted isn't registered at all: the kernel
        would report its errors again and again.
        """
        before = handler.watched
        if events == before:
            return
        assert handler.sock is not None
        fd = handler.sock.fileno()
        if not before:
            self._poller.register(fd, events)
            self._handlers[fd] = handler
        elif events:
            self._poller.modify(fd, events)
        else:
            del self._handlers[fd]
            try:
                self._poller.unregister(fd)
            except OSError:
                pass  # the poller itself is broken: the socket must still be closed
        handler.watched = events

    def hand_over(self, old: Handler, new: Handler) -> None:
        """Give the old handler's socket to the new one, watched as it is."""
        new.sock, new.watched = old.sock, old.watched
        old.sock, old.watched = None, 0
        if new.watched:
            assert new.sock is not None
            self._handlers[new.sock.fileno()] = new

    def close_socket(self, handler: Handler) -> None:
        """Stop watching the handler's socket and close it; harmless when it has none."""
        sock = handler.sock
        if sock is not None:
            self.watch(handler, 0)
            handler.sock = None
            sock.close()

    # --- the receive buffer ----------------------------------------------------

    def receive(
        self, sock: socket.socket, limit: int = BUFFER_BYTES, *, is_kept: bool = False
    ) -> memoryview:
        """Read once from a socket, at most `limit` bytes; return them, in the receive buffer.

        They may be overwritten by the next read, or, if `is_kept`, by the flush at the end
        of the turn; one comes before it when less than MIN_ROOM_BYTES are free. Raises
        OSError, BlockingIOError where there is nothing.
        """
        used = self._used
        if used > BUFFER_BYTES - MIN_ROOM_BYTES:
            self.flush()
            used = 0
        end = used + sock.recv_into(self._buffer[used : used + limit])
        if is_kept:
            self._used = end
        return self._buffer[used:end]

    def flush_later(self, flushable: Flushable) -> None:
        """Call `flush` at the end of this turn, or earlier if the buffer runs full."""
        self._dirty.append(flushable)

    def flush(self) -> None:
        """Flush all that was registered by `flush_later`, and free the buffer."""
        while self._dirty:
            dirty, self._dirty = self._dirty, []
            for flushable in dirty:
                try:
                    flushable.flush()
                except Exception as error:
                    _defect(flushable, error)
        self._used = 0

    # --- calls and timers ------------------------------------------------------

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Call `callback(*args)` at the end of this turn, or of the next one if that has begun."""
        self._calls.append((callback, args))

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        """Call `callback(*args)` on the loop's thread soon; from any thread or signal handler."""
        self._calls.append((callback, args))
        try:
            self._waker.send(b"\0")
        except OSError:
            pass  # full: the loop will wake anyway; closed: it has ended

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Call `callback()` in `delay_s` seconds."""
        timer = Timer(self, callback)
        self._sequence += 1
        heapq.heappush(self._timers, (clock() + delay_s, self._sequence, timer))
        return timer

    def _timer_cancelled(self) -> None:
        """Drop cancelled timers once they are more than half of the heap."""
        self._cancelled += 1
        if self._cancelled > 64 and self._cancelled * 2 > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    @property
    def timer_count(self) -> int:
        """How many timers are due to run."""
        return sum(entry[2].callback is not None for entry in self._timers)

    # --- randomness ------------------------------------------------------------

    def random(self, size: int) -> bytes:
        """Return `size` unpredictable bytes from the system, drawn in larger portions."""
        start, end = self._pool_at, self._pool_at + size
        if end > len(self._pool):
            self._pool = os.urandom(RANDOM_POOL_BYTES + size)
            start, end = 0, size
        self._pool_at = end
        return self._pool[start:end]

    # --- running ---------------------------------------------------------------

    def run(self) -> None:
        """Run until `stop` is called. Who owns the loop calls `close` then."""
        while not self._is_stopping:
            self._turn()

    def close(self) -> None:
        """Free the loop's own sockets; harmless when it is done already."""
        if self.sock is not None:
            self.close_socket(self)
            self._waker.close()
            self._poller.close()

    def stop(self) -> None:
        """End `run` after this turn; from any thread."""
        self.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._is_stopping = True

    def _turn(self) -> None:
        timeout = -1.0
        if self._calls:
            timeout = 0.0
        elif self._timers:
            timeout = min(max(0.0, self._timers[0][0] - clock()), LONGEST_POLL_S)
        handlers = self._handlers
        ready = [
            (handlers[fd], events) for fd, events in self._poller.poll(timeout, EVENTS_AT_ONCE)
        ]
        self.now = now = clock()
        for handler, events in ready:
            if events & ~(READ | WRITE):
                events = READ | WRITE  # an error or a hang-up: reading or writing tells
            # An earlier handler of this turn may have closed it, or lost interest.
            events &= handler.watched
            if events:
                try:
                    handler.on_ready(events)
                except Exception as error:
                    _defect(handler, error)
        if self._timers and self._timers[0][0] <= now:
            self._run_timers()
        if self._calls:
            self.run_calls()
        if self._dirty:
            self.flush()
        self._used = 0

    def run_calls(self) -> None:
        """Run what `call_soon` has collected; once `run` is over, this is for who owns the loop."""
        for _ in range(len(self._calls)):
            callback, args = self._calls.popleft()
            self._guarded(callback, *args)

    def _run_timers(self) -> None:
        timers = self._timers
        while timers and timers[0][0] <= self.now:
            timer = heapq.heappop(timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is None:
                self._cancelled -= 1
            else:
                self._guarded(callback)
            timers = self._timers

    @staticmethod
    def _guarded(callback: Callable[..., object], *args: Any) -> None:
        try:
            callback(*args)
        except Exception as error:
            method = getattr(callback, "func", callback)  # of a partial
            _defect(getattr(method, "__self__", method), error)

    def on_ready(self, events: int) -> None:  # another thread woke the loop
        assert self.sock is not None
        try:
            while len(self.sock.recv(4096)) == 4096:
                pass
        except BlockingIOError:
            pass

    def fail(self, error: Exception) -> None:
        raise error


class _Poll:
    """poll(2) with the methods of select.epoll, for systems without that."""

    def __init__(self) -> None:
        poller = select.poll()
        self.register, self.modify = poller.register, poller.modify
        self.unregister, self._poll = poller.unregister, poller.poll

    def poll(self, timeout_s: float, limit: int) -> list[tuple[int, int]]:
        # Not limited: the order is always the same, and the last would never be served.
        return self._poll(timeout_s * 1000 if timeout_s >= 0 else None)

    def close(self) -> None:
        """Nothing to free: poll(2) has no descriptor of its own."""


def _defect(owner: object, error: Exception) -> None:
    """Log `error`, and let `owner`, whose code raised it, end what it serves."""
    log.error("defect in %s", type(owner).__name__, exc_info=error)
    fail = getattr(owner, "fail", None)
    if fail is not None:
        fail(error)
