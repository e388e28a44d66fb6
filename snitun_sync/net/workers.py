"""Daemon threads for what blocks: resolving a name, connecting to the relay.

A job is a function that takes and returns plain values; its result comes back to the
loop. Each job has a thread of its own, which ends with it: what hangs in the resolver
delays neither other jobs nor, as the threads are daemons, the end of the process.
"""

from __future__ import annotations

import threading

from ..errors import MisuseError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop

    Done = Callable[[Any, "Exception | None"], object]

THREADS = 4


class Workers:
    """The threads of one loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._threads = 0
        self._is_closed = False

    def submit(self, blocking: Callable[[], Any], done: Done) -> bool:
        """Run `blocking()` on a thread, then `done(result, error)` on the loop's thread.

        One of the two is None. Return False, and do nothing, where THREADS jobs run
        already, or where no thread can be had.
        """
        with self._lock:
            if self._is_closed:
                raise MisuseError("the workers are closed")
            if self._threads >= THREADS:
                return False
            thread = threading.Thread(
                target=self._work, args=(blocking, done), name="snitun-worker", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # the system's limit
                return False
            self._threads += 1
            return True

    def close(self) -> None:
        """Hand nothing over any more; what comes after this is closed, if it can be."""
        with self._lock:
            self._is_closed = True

    def _work(self, blocking: Callable[[], Any], done: Done) -> None:
        result, failure = None, None
        try:
            result = blocking()
        except Exception as error:
            failure = error
        with self._lock:
            self._threads -= 1
            if not self._is_closed:
                self._loop.call_soon_threadsafe(done, result, failure)
            elif (close := getattr(result, "close", None)) is not None:
                close()
