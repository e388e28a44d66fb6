"""A few daemon threads for what blocks: resolving names and opening connections.

A job is a function that takes and returns plain values; its result comes back
to the loop. Jobs that share a key (an endpoint, a relay) never occupy all
threads nor all of the queue: one that hangs in the resolver or in a connect delays
neither other keys nor, as the threads are daemons, the end of the process.
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
QUEUED_PER_KEY = 512


class Job:
    """What `Workers.submit` returns and `Workers.cancel` takes."""

    __slots__ = ("blocking", "done", "key")

    def __init__(self, key: object, blocking: Callable[[], Any], done: Done) -> None:
        self.key, self.blocking, self.done = key, blocking, done


class Workers:
    """The threads of one loop; they are started as jobs come."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._condition = threading.Condition()
        self._waiting: dict[object, deque[Job]] = {}  # by key, the next to be served first
        self._active: dict[object, int] = {}
        self._threads = self._idle = 0
        self._is_closed = False

    def submit(self, key: object, blocking: Callable[[], Any], done: Done) -> Job | None:
        """Run `blocking()` on a thread, then `done(result, error)` on the loop's thread.

        One of the two is None. Return None, and do nothing, where too many jobs
        with this key wait already, or where no thread can be had.
        """
        job = Job(key, blocking, done)
        with self._condition:
            if self._is_closed:
                raise MisuseError("the workers are closed")
            waiting = self._waiting.setdefault(key, deque())
            if len(waiting) >= QUEUED_PER_KEY:
                return None
            waiting.append(job)
            # A job whose key is at its limit is taken by the thread that makes room for it.
            if self._active.get(key, 0) >= THREADS_PER_KEY:
                pass
            elif self._idle:
                # Counted here: until it runs, the thread must not be taken for idle again.
                self._idle -= 1
                self._condition.notify()
            elif self._threads < THREADS:
                try:
                    threading.Thread(target=self._work, name="snitun-worker", daemon=True).start()
                    self._threads += 1
                except RuntimeError:  # the system's limit
                    if not self._threads:
                        del self._waiting[key]  # it was the only job
                        return None
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for the job any more: drop it, unless a thread has begun it."""
        with self._condition:
            waiting = self._waiting.get(job.key)
            if waiting is not None and job in waiting:
                waiting.remove(job)
                if not waiting:
                    del self._waiting[job.key]

    def close(self) -> None:
        """Let the threads end; what comes after this is closed, if it can be, not handed over."""
        with self._condition:
            self._is_closed = True
            self._waiting.clear()
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
                elif (close := getattr(result, "close", None)) is not None:
                    close()

    def _next_job(self) -> Job | None:
        with self._condition:
            while not self._is_closed:
                for key, waiting in self._waiting.items():
                    if self._active.get(key, 0) < THREADS_PER_KEY:
                        job = waiting.popleft()
                        del self._waiting[key]
                        if waiting:
                            self._waiting[key] = waiting  # behind the other keys
                        self._active[key] = self._active.get(key, 0) + 1
                        return job
                self._idle += 1
                self._condition.wait()
            self._threads -= 1
            return None
