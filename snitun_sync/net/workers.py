"""A few daemon threads for what blocks: resolving names and opening connections.

A job is a function that takes and returns plain values; its result comes back
to the loop. Jobs that share a key (an endpoint, a relay) never occupy all
threads: one that hangs in the resolver or in a connect delays neither other keys
nor, as the threads are daemons, the end of the process.
"""

from __future__ import annotations

import threading
from collections import deque

from ..errors import MisuseError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop

    Done = Callable[[Any, "Exception | None"], object]

THREADS = 4
THREADS_PER_KEY = 3
QUEUE_LIMIT = 512


class _Job:
    __slots__ = ("blocking", "done", "key")

    def __init__(self, key: object, blocking: Callable[[], Any], done: Done) -> None:
        self.key, self.blocking, self.done = key, blocking, done


class Workers:
    """The threads of one loop; they are started as jobs come. Results have a `close` method."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._condition = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._active: dict[object, int] = {}
        self._threads = self._idle = 0
        self._is_closed = False

    def submit(self, key: object, blocking: Callable[[], Any], done: Done) -> bool:
        """Run `blocking()` on a thread, then `done(result, error)` on the loop's thread.

        One of the two is None. Return False, and do nothing, where too many jobs
        wait already.
        """
        with self._condition:
            if self._is_closed:
                raise MisuseError("the workers are closed")
            if len(self._jobs) >= QUEUE_LIMIT:
                return False
            self._jobs.append(_Job(key, blocking, done))
            # A job whose key is at its limit is taken by the thread that makes room for it.
            if self._active.get(key, 0) >= THREADS_PER_KEY:
                pass
            elif self._idle:
                # Counted here: until it runs, the thread must not be taken for idle again.
                self._idle -= 1
                self._condition.notify()
            elif self._threads < THREADS:
                self._threads += 1
                threading.Thread(target=self._work, name="snitun-worker", daemon=True).start()
        return True

    def close(self) -> None:
        """Let the threads end; a result that comes after this is closed, not handed over."""
        with self._condition:
            self._is_closed = True
            self._jobs.clear()
            self._condition.notify_all()

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            result, failure = None, None
            try:
                result = job.blocking()
            except Exception as error:
                failure = error
            with self._condition:
                self._active[job.key] -= 1
                if not self._active[job.key]:
                    del self._active[job.key]
                if not self._is_closed:
                    self._loop.call_soon_threadsafe(job.done, result, failure)
                elif result is not None:
                    result.close()

    def _next_job(self) -> _Job | None:
        with self._condition:
            while not self._is_closed:
                for position, job in enumerate(self._jobs):
                    if self._active.get(job.key, 0) < THREADS_PER_KEY:
                        del self._jobs[position]
                        self._active[job.key] = self._active.get(job.key, 0) + 1
                        return job
                self._idle += 1
                self._condition.wait()
            self._threads -= 1
            return None
