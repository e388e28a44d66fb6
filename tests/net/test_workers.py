"""Worker threads: nothing that hangs holds up anything else."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from snitun_sync.errors import MisuseError
from snitun_sync.net.loop import Loop
from snitun_sync.net.workers import THREADS, Workers
from tests.support import wait_until


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
    with pytest.raises(MisuseError):
        workers.submit(job, lambda result, error: None)
    wait_until(lambda: workers._threads == 0)
