"""Worker threads: nothing that hangs holds up anything else."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial

import pytest

from snitun_sync.net.loop import Loop
from snitun_sync.net.workers import THREADS, Workers
from tests.support import WAIT_S, wait_until


class Result:
    """A result that notes that it was closed."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


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
    assert workers.submit(lambda: result, done)
    assert workers.submit(fail, done)
    wait_until(lambda: len(seen) == 2)
    assert {(came, error) for came, error, _ in seen} == {(result, None), (None, failure)}
    assert threading.get_ident() not in {ident for *_, ident in seen}
    assert len({ident for *_, ident in seen}) == 1


def test_jobs_that_hang_don_t_delay_others_and_are_bounded(workers: Workers) -> None:
    release, done = threading.Event(), []
    for _ in range(THREADS - 1):
        assert workers.submit(release.wait, lambda result, error: None)
    assert workers.submit(lambda: 1, lambda result, error: done.append(result))
    wait_until(lambda: done == [1])
    wait_until(lambda: workers._threads == THREADS - 1)
    assert workers.submit(release.wait, lambda result, error: None)
    assert not workers.submit(lambda: 2, lambda result, error: done.append(result))
    release.set()
    wait_until(lambda: workers._threads == 0)
    assert done == [1]


def test_where_no_thread_can_be_had(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert not workers.submit(lambda: 1, lambda result, error: None)
    assert workers._threads == 0


def test_whatever_a_job_raises_its_thread_is_free_again(loop: Loop) -> None:
    workers, errors = Workers(loop, threads=1), []
    for code in (1, 2):
        job = partial(sys.exit, code)
        assert workers.submit(job, lambda _, error: errors.append(repr(error)))
        wait_until(lambda code=code: len(errors) == code)  # type: ignore[misc]
    assert errors == ["RuntimeError('SystemExit(1)')", "RuntimeError('SystemExit(2)')"]
    workers.close()


def test_a_result_that_comes_too_late_is_closed(workers: Workers) -> None:
    release, started, result, done = threading.Event(), threading.Event(), Result(), []

    def job() -> Result:
        started.set()
        release.wait()
        return result

    workers.submit(job, lambda result, error: done.append(result))
    started.wait()
    workers.close()
    release.set()
    wait_until(lambda: result.is_closed)
    assert not done
    assert not workers.submit(job, lambda result, error: None)
    wait_until(lambda: workers._threads == 0)


def test_what_exceeds_the_threads_waits_in_its_order(loop: Loop) -> None:
    release, begun, done = threading.Event(), [], []
    workers = Workers(loop, threads=1, waiting=3)

    def job(number: int) -> int:
        begun.append(number)
        release.wait()
        return number

    def submit(number: int) -> bool:
        return workers.submit(partial(job, number), lambda result, error: done.append(result))

    assert [submit(number) for number in range(5)] == [True] * 4 + [False]
    release.set()
    wait_until(lambda: done == [0, 1, 2, 3])
    assert begun == [0, 1, 2, 3]
    wait_until(lambda: workers._threads == 0)
    workers.close()


def test_an_idle_thread_takes_the_next_job_and_ends_by_itself(loop: Loop) -> None:
    workers, idents = Workers(loop, threads=3, idle_s=300), set()
    done: list[object] = []
    for number in range(50):  # who is told that a job is done finds its thread free
        assert workers.submit(lambda: idents.add(threading.get_ident()), lambda *_: done.append(1))
        wait_until(lambda number=number: len(done) == number + 1)  # type: ignore[misc]
    assert len(idents) == workers._threads == 1

    release, started = threading.Event(), threading.Barrier(4)

    def job() -> None:
        started.wait(WAIT_S)
        release.wait()

    for _ in range(3):  # more at once than are idle
        assert workers.submit(job, lambda *_: None)
    started.wait(WAIT_S)
    assert not workers.submit(lambda: 1, lambda *_: None)
    workers._idle_s = 0.01
    release.set()
    wait_until(lambda: workers._threads == 0)
    workers.close()


def test_an_idle_thread_keeps_nothing_alive(loop: Loop) -> None:
    workers, done = Workers(loop, threads=1, idle_s=300), []
    result = Result()
    reference = weakref.ref(result)
    assert workers.submit(partial(lambda result: result, result), lambda *_: done.append(1))
    del result
    wait_until(lambda: done)
    wait_until(lambda: reference() is None)
    assert workers._threads == 1
    workers.close()
    wait_until(lambda: workers._threads == 0)


def test_nothing_is_left_open_when_close_comes_before_a_job_has_begun(loop: Loop) -> None:
    workers, release, done = Workers(loop, threads=1, waiting=1), threading.Event(), []
    results = [Result(), Result()]

    def job(result: Result) -> Result:
        release.wait()
        return result

    for result in results:
        assert workers.submit(partial(job, result), lambda *_: done.append(1))
    workers.close()
    release.set()
    wait_until(lambda: workers._threads == 0)
    assert all(result.is_closed for result in results)
    assert not done


def test_where_no_other_thread_can_be_had_jobs_wait_for_one_that_runs(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, release, done = Workers(loop, threads=2, waiting=1), threading.Event(), []

    def submit() -> bool:
        return workers.submit(release.wait, lambda *_: done.append(1))

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert not submit()  # there is none to wait for
    assert submit()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert submit()
        assert not submit()
    release.set()
    wait_until(lambda: len(done) == 2)
    workers.close()
