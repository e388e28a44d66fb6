"""Accepting, on a loop that doesn't run: what is asked for happens, and when."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from snitun_sync.net import listening
from snitun_sync.net.listening import PAUSE_S, Listener, listen
from snitun_sync.net.loop import READ, Loop
from snitun_sync.protocol.names import Address

WAITING = 5


class Accepting:
    """A listener whose queue has connections, and what it has accepted."""

    def __init__(self, at_once: int) -> None:
        self.loop = Loop()
        self.accepted: list[socket.socket] = []
        [sock] = listen(Address("127.0.0.1", 0))
        place = sock.getsockname()
        self.listener = Listener(self.loop, sock, self._accept, at_once)
        self.waiting = [socket.create_connection(place) for _ in range(WAITING)]

    def _accept(self, sock: socket.socket, place: tuple[str, int]) -> None:
        assert not sock.getblocking()
        assert place == self.waiting[len(self.accepted)].getsockname()
        self.accepted.append(sock)

    def close(self) -> None:
        self.listener.close()
        self.listener.close()
        for sock in (*self.waiting, *self.accepted):
            sock.close()
        assert not self.loop.timer_count
        self.loop.close()


@pytest.fixture
def by_two() -> Iterator[Accepting]:
    before = len(os.listdir("/proc/self/fd"))
    accepting = Accepting(at_once=2)
    yield accepting
    accepting.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_so_many_are_accepted_in_a_turn(by_two: Accepting) -> None:
    by_two.listener.listen()
    for count in (2, 4, 5, 5):
        by_two.listener.on_ready(READ)
        assert len(by_two.accepted) == count


def test_who_waits_at_the_end_comes_in(by_two: Accepting) -> None:
    by_two.listener.listen()
    by_two.listener.finish()
    assert len(by_two.accepted) == WAITING
    assert by_two.listener.sock is None
    by_two.listener.finish()
    by_two.listener.listen()  # as a timer would that came too late


def test_who_comes_again_and_again_doesnt_hold_up_the_end(
    by_two: Accepting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fast as they are accepted: at most as many come in as can have waited at first."""
    monkeypatch.setattr(listening, "BACKLOG", 20)
    place, accept = by_two.listener.sock.getsockname(), by_two.listener._accepted  # type: ignore[union-attr]

    def accept_and_come(sock: socket.socket, source: tuple[str, int]) -> None:
        accept(sock, source)
        assert len(by_two.accepted) <= 20
        by_two.waiting.append(socket.create_connection(place))

    by_two.listener._accepted = accept_and_come
    by_two.listener.listen()
    by_two.listener.finish()
    assert len(by_two.accepted) == 20


def test_it_says_once_a_minute_that_it_can_t(
    by_two: Accepting, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(sock: socket.socket) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", fail)
    by_two.loop.now = begun = 1000.0
    for passed_s, lines in ((0, 1), (1, 1), (59, 1), (60, 2), (61, 2), (120, 3)):
        by_two.loop.now = begun + passed_s
        by_two.listener.listen()
        by_two.listener.on_ready(READ)
        assert not by_two.listener.watched
        assert by_two.loop.timer_count == 1
        by_two.listener._pause.cancel()  # type: ignore[union-attr]
        expected = f"can't accept: [Errno 24] Too many open files; trying again every {PAUSE_S:g} s"
        assert caplog.messages == [expected] * lines
