"""The event loop: order, wake-ups, stale events, the receive buffer, defects."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Callable

import pytest

from snitun_sync.net import loop as loop_module
from snitun_sync.net.loop import READ, WRITE, Handler, Loop
from tests.support import wait_until


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[Loop]:
    """A loop's turns so far."""
    found: list[Loop] = []
    turn = Loop._turn

    def counted(loop: Loop) -> None:
        found.append(loop)
        turn(loop)

    monkeypatch.setattr(Loop, "_turn", counted)
    return found


class Probe(Handler):
    """A handler that calls what it is given."""

    def __init__(self, loop: Loop, action: Callable[[Probe], object]) -> None:
        own, self.other = socket.socketpair()
        own.setblocking(False)
        super().__init__(own)
        self.loop, self.action = loop, action
        self.calls: list[int] = []
        self.failed: Exception | None = None

    def on_ready(self, events: int) -> None:
        self.calls.append(events)
        self.action(self)

    def fail(self, error: Exception) -> None:
        self.failed = error
        self.close()

    def close(self) -> None:
        self.loop.close_socket(self)
        self.other.close()


def test_timers_run_in_order_and_not_once_cancelled(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    with monkeypatch.context() as patch:
        now = loop_module.clock()
        patch.setattr(loop_module, "clock", lambda: now)  # all of them begin at one moment
        loop.call_later(0.03, loop.stop)
        loop.call_later(0.02, lambda: ran.append("second"))
        cancelled = loop.call_later(0.015, lambda: ran.append("never"))
        loop.call_later(0.01, lambda: ran.append("first"))
        loop.call_later(0.0, cancelled.cancel)
    loop.run()
    cancelled.cancel()
    assert ran == ["first", "second"]
    assert loop.timer_count == 0


def test_a_timer_may_be_years_away(loop: Loop) -> None:
    loop.call_later(1e10, loop.stop)
    threading.Timer(0.05, loop.call_soon_threadsafe, [loop.stop]).start()
    loop.run()
    assert loop.timer_count == 1


def test_cancelled_timers_don_t_pile_up(loop: Loop) -> None:
    kept = [loop.call_later(1000, lambda: None) for _ in range(10)]
    for _ in range(10_000):
        loop.call_later(1000, lambda: None).cancel()
    assert loop.timer_count == len(kept)
    assert len(loop._timers) < 200


def test_call_soon_threadsafe_wakes_the_loop(loop: Loop) -> None:
    ran: list[int] = []
    thread = threading.Thread(target=loop.run)
    thread.start()
    for number in range(1000):
        loop.call_soon_threadsafe(ran.append, number)
    wait_until(lambda: len(ran) == 1000)
    assert ran == list(range(1000))
    loop.stop()
    thread.join(10)
    assert not thread.is_alive()
    loop.close()
    loop.call_soon_threadsafe(ran.append, -1)  # harmless then


def test_an_idle_loop_sleeps(loop: Loop, turns: list[Loop]) -> None:
    thread = threading.Thread(target=loop.run)
    thread.start()
    threading.Event().wait(0.3)
    loop.stop()
    thread.join(10)
    assert len(turns) <= 2  # asleep, and woken once


def test_a_handler_that_was_closed_in_this_turn_is_not_called(loop: Loop) -> None:
    probes: list[Probe] = []

    def close_the_others(probe: Probe) -> None:
        for other in probes:
            if other is not probe:
                other.close()
        probe.close()
        loop.stop()

    for _ in range(5):
        probe = Probe(loop, close_the_others)
        probes.append(probe)
        loop.watch(probe, READ)
        probe.other.send(b"x")
    loop.run()
    assert sum(len(probe.calls) for probe in probes) == 1


def test_a_stale_event_doesn_t_reach_a_new_socket_with_the_same_number(loop: Loop) -> None:
    """A handler closes another one's socket and a new socket gets its descriptor at once."""
    late: list[Probe] = []
    probes: list[Probe] = []

    def replace(probe: Probe) -> None:
        for other in probes:
            if other is not probe:
                other.close()
        probe.sock and probe.sock.recv(1)
        if not late:
            late.append(Probe(loop, lambda p: None))
            loop.watch(late[0], READ)
            loop.call_later(0.02, loop.stop)

    for _ in range(2):
        probe = Probe(loop, replace)
        probes.append(probe)
        loop.watch(probe, READ)
        probe.other.send(b"x")
    loop.run()
    assert late[0].calls == []
    for probe in (*probes, *late):
        probe.close()


def test_only_what_is_watched_is_reported(loop: Loop) -> None:
    probe = Probe(loop, lambda p: loop.watch(p, 0))
    probe.other.send(b"x")
    loop.watch(probe, WRITE)
    loop.call_later(0.02, loop.stop)
    loop.run()
    assert probe.calls == [WRITE]
    assert probe.watched == 0
    probe.close()


def test_errors_of_an_unwatched_socket_don_t_spin(loop: Loop, turns: list[Loop]) -> None:
    probe = Probe(loop, lambda p: None)
    loop.watch(probe, READ)
    loop.watch(probe, 0)
    probe.other.close()
    loop.call_later(0.2, loop.stop)
    loop.run()
    # A timer's time may be rounded: the loop looks once or twice in vain.
    assert len(turns) < 10
    assert probe.calls == []
    probe.close()


def test_a_defect_ends_its_handler_and_not_the_loop(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    def defect(probe: Probe) -> None:
        raise RuntimeError("a defect")

    def defective_call() -> None:
        raise RuntimeError("another")

    probe = Probe(loop, defect)
    loop.watch(probe, READ)
    probe.other.send(b"x")
    loop.call_soon(defective_call)
    loop.call_later(0.0, defective_call)
    loop.call_later(0.02, loop.stop)
    with caplog.at_level(logging.ERROR):
        loop.run()
    assert isinstance(probe.failed, RuntimeError)
    assert sum("defect in" in record.message for record in caplog.records) == 3


def test_a_defect_in_a_call_with_arguments_is_its_owner_s_too(loop: Loop) -> None:
    class Owner:
        def __init__(self) -> None:
            self.failed: list[str] = []

        def call(self, text: str) -> None:
            raise RuntimeError(text)

        def fail(self, error: Exception) -> None:
            self.failed.append(str(error))

    owner = Owner()
    loop.call_later(0.0, partial(owner.call, "one"))
    loop.call_soon(partial(owner.call), "two")
    loop.call_later(0.02, loop.stop)
    loop.run()
    assert sorted(owner.failed) == ["one", "two"]


class Sink:
    """A flushable that notes what the buffer held when it was flushed."""

    def __init__(self) -> None:
        self.views: list[memoryview] = []
        self.flushed: list[bytes] = []

    def flush(self) -> None:
        self.flushed += [bytes(view) for view in self.views]
        self.views = []

    def fail(self, error: Exception) -> None:
        raise error


def test_what_is_kept_stays_until_the_flush(loop: Loop) -> None:
    sink, size = Sink(), 40_000
    one, two = socket.socketpair()
    with one, two:
        for number in range(20):
            one.sendall(bytes([number]) * size)
            data = loop.receive(two, is_kept=True)
            assert len(data) == size  # there is always room for that much
            if not sink.views:
                loop.flush_later(sink)
            sink.views.append(data)
    loop.flush()
    assert sink.flushed == [bytes([number]) * size for number in range(20)]


def test_what_is_not_kept_is_overwritten(loop: Loop) -> None:
    one, two = socket.socketpair()
    with one, two:
        one.sendall(b"abc")
        data = loop.receive(two, 1)
        assert bytes(data) == b"a"
        assert bytes(loop.receive(two, 1, is_kept=True)) == b"b"
        assert bytes(data) == b"b"
        assert bytes(loop.receive(two)) == b"c"
        assert bytes(data) == b"b"
        with pytest.raises(BlockingIOError):
            two.setblocking(False)
            loop.receive(two)
        one.close()
        assert not loop.receive(two)


def test_random_bytes_are_never_given_twice(loop: Loop) -> None:
    seen = [loop.random(size) for size in (16, 11, 4000, 5000, 16) * 200]
    assert all(len(data) == size for data, size in zip(seen, (16, 11, 4000, 5000, 16) * 200))
    assert len({data[:11] for data in seen}) == len(seen)


def test_close_twice_and_without_run() -> None:
    loop = Loop()
    loop.close()
    with contextlib.suppress(OSError):
        loop.close()
