"""Worker threads: nothing that hangs holds up anything else."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from snitun_sync.errors import MisuseError
from snitun_sync.net.loop import Loop
from snitun_sync.net.workers import QUEUED_PER_KEY, THREADS, THREADS_PER_KEY, Workers
from tests.support import wait_until


class Result:
    """A result that notes that it was closed."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def hang(release: threading.Event) -> None:
    release.wait()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    yield loop
    loop.stop()
    thread.join(10)
    loop.close()


@pytest.fixture
def workers(loop: Loop) -> Iterator[Workers]:
    workers = Workers(loop)
    yield workers
    workers.close()


def test_results_and_errors_come_back_to_the_loop_s_thread(loop: Loop, workers: Workers) -> None:
    seen: list[tuple[object, object, int]] = []

    def done(result: object, error: Exception | None) -> None:
        seen.append((result, error, threading.get_ident()))

    failure = OSError("no")

    def fail() -> None:
        raise failure

    result = Result()
    workers.submit("key", lambda: result, done)
    workers.submit("key", fail, done)
    wait_until(lambda: len(seen) == 2)
    assert {(came, error) for came, error, _ in seen} == {(result, None), (None, failure)}
    assert threading.get_ident() not in {ident for *_, ident in seen}
    assert len({ident for *_, ident in seen}) == 1


def test_jobs_that_hang_don_t_delay_other_keys(workers: Workers) -> None:
    release, done = threading.Event(), []
    for _ in range(20):
        workers.submit("hanging", lambda: hang(release), lambda result, error: done.append("hung"))
    for number in range(10):
        workers.submit("good", lambda: None, lambda result, error: done.append("good"))
        wait_until(lambda count=number: len(done) > count)  # type: ignore[misc]
    assert done == ["good"] * 10
    release.set()
    wait_until(lambda: len(done) == 30)


def test_jobs_submitted_at_once_don_t_share_one_idle_thread(workers: Workers) -> None:
    release, done = threading.Event(), []
    workers.submit("first", lambda: None, lambda result, error: done.append("first"))
    wait_until(lambda: workers._idle == 1)
    with workers._condition:  # nobody wakes up before all are in the queue
        for _ in range(20):
            workers.submit("hanging", lambda: hang(release), lambda result, error: None)
        workers.submit("good", lambda: None, lambda result, error: done.append("good"))
    wait_until(lambda: done == ["first", "good"])
    release.set()


def test_threads_are_started_as_they_are_needed_and_bounded(workers: Workers) -> None:
    release = threading.Event()
    assert workers._threads == 0
    for number in range(50):
        workers.submit(number, lambda: hang(release), lambda result, error: None)
    assert workers._threads == THREADS
    release.set()


def test_one_key_never_has_all_threads(workers: Workers) -> None:
    release, lock = threading.Event(), threading.Lock()
    running = most = finished = 0

    def job() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        release.wait(0.01)
        with lock:
            running -= 1

    def done(result: object, error: Exception | None) -> None:
        nonlocal finished
        finished += 1

    for _ in range(30):
        workers.submit("key", job, done)
    wait_until(lambda: finished == 30)
    assert most == THREADS_PER_KEY < THREADS


def test_the_queue_is_bounded_for_each_key(workers: Workers) -> None:
    release, done = threading.Event(), []
    accepted = 0
    while workers.submit("key", lambda: hang(release), lambda result, error: None):
        accepted += 1
        assert accepted <= QUEUED_PER_KEY + THREADS
    assert accepted >= QUEUED_PER_KEY
    assert workers.submit("other", lambda: None, lambda result, error: done.append("other"))
    wait_until(lambda: done == ["other"])
    release.set()


def test_keys_take_turns(workers: Workers) -> None:
    release = threading.Event()
    for number in range(THREADS):  # all threads are busy
        workers.submit(number, lambda: hang(release), lambda result, error: None)
    wait_until(lambda: len(workers._active) == THREADS)
    for key in ("many", "many", "many", "one"):
        workers.submit(key, lambda: None, lambda result, error: None)
    assert [workers._next_job().key for _ in range(4)] == ["many", "one", "many", "many"]  # type: ignore[union-attr]
    release.set()


def test_a_job_that_nobody_waits_for_is_dropped(workers: Workers) -> None:
    release, done = threading.Event(), []
    jobs = [
        workers.submit(
            "key",
            lambda: hang(release),
            lambda result, error, number=number: done.append(number),  # type: ignore[misc]
        )
        for number in range(10)
    ]
    wait_until(lambda: workers._active.get("key") == THREADS_PER_KEY)
    for job in jobs[:-1]:  # some have begun: no harm
        assert job is not None
        workers.cancel(job)
        workers.cancel(job)
    release.set()
    wait_until(lambda: len(done) == THREADS_PER_KEY + 1)
    assert 9 in done
    assert not workers._waiting


def test_a_result_that_comes_too_late_is_closed(workers: Workers) -> None:
    release, started, result, done = threading.Event(), threading.Event(), Result(), []

    def job() -> Result:
        started.set()
        release.wait()
        return result

    workers.submit("key", job, lambda result, error: done.append(result))
    started.wait()
    workers.close()
    release.set()
    wait_until(lambda: result.is_closed)
    assert not done
    with pytest.raises(MisuseError):
        workers.submit("key", job, lambda result, error: None)
    wait_until(lambda: workers._threads == 0)
