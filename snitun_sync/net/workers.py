"""Worker threads, for the few things that block.

A job is a function that takes and returns plain values; its result comes back to the
loop. Threads start when they are needed. As long as no more jobs are let in than there may be
threads, what hangs in the resolver delays no other job, nor, as the threads are daemons,
the end of the process.
"""

from __future__ import annotations

import threading
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop

    Done = Callable[[Any, "Exception | None"], object]
    Job = tuple[Callable[[], Any], Done]

THREADS = 4


class Workers:
    """The threads of one loop."""

    def __init__(
        self, loop: Loop, threads: int = THREADS, waiting: int = 0, idle_s: float = 0.0
    ) -> None:
        """At most `threads` jobs run at a time, and `waiting` more wait for their end.

        A thread that has nothing to do ends after `idle_s` seconds.
        """
        self._loop = loop
        self._most, self._waiting, self._idle_s = threads, waiting, idle_s
        self._changed = threading.Condition(threading.Lock())
        self._jobs: deque[Job] = deque()  # those that no thread has taken yet
        self._threads = self._free = 0  # those that are there, and those of them without a job
        self._is_closed = False

    def submit(self, blocking: Callable[[], Any], done: Done) -> bool:
        """Run `blocking()` on a thread, then `done(result, error)` on the loop's thread.

        One of the two is None. Return False, and do nothing, where all places are taken,
        where no thread can be had, or after the end, in which callbacks may still ask.
        """
        with self._changed:
            if self._is_closed:
                return False
            queued = len(self._jobs) - self._free  # beyond what free threads are about to take
            has_thread = queued < 0 or (self._threads < self._most and self._start())
            if not has_thread and (queued >= self._waiting or not self._threads):
                return False
            self._jobs.append((blocking, done))
            self._changed.notify()
            return True

    def close(self) -> None:
        """Take and hand over nothing any more; what comes after this is closed, if it can be."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _start(self) -> bool:
        thread = threading.Thread(target=self._work, name="snitun-worker", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system's limit
            return False
        self._threads += 1
        self._free += 1
        return True

    def _work(self) -> None:
        with self._changed:
            job = self._next()
        while job is not None:
            result, failure = None, None
            try:
                result = job[0]()
            except Exception as error:
                failure = error
            except BaseException as error:  # a panic of Rust: it would take the place along
                failure = RuntimeError(repr(error))
            # Under one lock: who is told that this job is done finds the thread free.
            with self._changed:
                if not self._is_closed:
                    self._loop.call_soon_threadsafe(job[1], result, failure)
                elif (close := getattr(result, "close", None)) is not None:
                    close()
                job = result = failure = None  # a free thread keeps nothing alive
                self._free += 1
                job = self._next()

    def _next(self) -> Job | None:
        """Return the calling thread's next job, None if it is to end; the lock is held."""
        if self._idle_s:
            self._changed.wait_for(lambda: self._jobs or self._is_closed, self._idle_s)
        self._free -= 1
        if self._jobs:
            return self._jobs.popleft()
        self._threads -= 1
        return None
