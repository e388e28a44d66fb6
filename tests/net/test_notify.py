"""What a service manager hears: a datagram socket of the test's own in its place."""

from __future__ import annotations

import logging
import os
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from snitun_sync.net import notify
from snitun_sync.net.loop import Loop, Timer
from snitun_sync.net.notify import STATUS_CHARACTERS, Notifier
from tests.support import WAIT_S, has_more_than, process_counts, wait_until

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux has abstract sockets")


class Manager:
    """The service manager's end."""

    def __init__(self, address: str) -> None:
        self.name = address.replace("\0", "@")
        self._address = address
        self.open()

    def open(self) -> None:
        """Listen, after `close` once more."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self._address)
        self.sock.settimeout(WAIT_S)

    def close(self) -> None:
        """Listen no longer; a path goes too."""
        self.sock.close()
        if self._address[0] == "/":
            Path(self._address).unlink(missing_ok=True)

    def next(self) -> dict[str, str]:
        """Wait for a message; return its lines, by name, as systemd reads them."""
        lines = self.sock.recv(4097).decode().split("\n")
        pairs = [line.partition("=")[::2] for line in lines]
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def has_message(self) -> bool:
        """Tell whether one is there."""
        return bool(select.select([self.sock], [], [], 0)[0])

    def drain(self) -> None:
        """Read all that is there."""
        while self.has_message():
            self.next()

    def fill(self) -> int:
        """Fill its queue; return with how many messages."""
        count = 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            while True:
                try:
                    sock.sendto(b"FILL=1", self._address)
                except BlockingIOError:
                    return count
                count += 1


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop that the test runs, or has run by `threaded`."""
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def threaded(loop: Loop) -> Iterator[Loop]:
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    yield loop
    loop.stop()
    thread.join(WAIT_S)


def notifier_for(loop: Loop, name: str, **more: str) -> Notifier:
    environment = {"NOTIFY_SOCKET": name, "OTHER": "stays", **more}
    notifier = Notifier.from_environment(loop, environment)
    assert environment == {"OTHER": "stays"}
    assert notifier is not None
    return notifier


@pytest.fixture
def notifier(loop: Loop, manager: Manager) -> Iterator[Notifier]:
    notifier = notifier_for(loop, manager.name)
    yield notifier
    notifier.close()
    assert loop.timer_count == 0


# --- what is said -----------------------------------------------------------------


def test_a_service_s_life(manager: Manager, notifier: Notifier) -> None:
    notifier.begin()  # no watchdog: nothing
    notifier.status("connecting")
    assert manager.next() == {"STATUS": "connecting"}
    notifier.ready("up")
    assert manager.next() == {"READY": "1", "STATUS": "up"}
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    came = manager.next()
    assert before <= int(came.pop("MONOTONIC_USEC")) <= time.monotonic_ns() // 1000
    assert came == {"RELOADING": "1"}
    notifier.ready("up")
    assert manager.next() == {"READY": "1", "STATUS": "up"}
    notifier.stopping()
    assert manager.next() == {"STOPPING": "1"}
    assert not manager.has_message()


def test_a_status_is_said_when_it_is_news(manager: Manager, notifier: Notifier) -> None:
    notifier.ready("up")
    assert manager.next()["STATUS"] == "up"
    for _ in range(3):
        notifier.status("up")
    assert not manager.has_message()
    notifier.status("down")
    notifier.status("up")
    assert [manager.next(), manager.next()] == [{"STATUS": "down"}, {"STATUS": "up"}]


def test_a_status_is_one_short_line_of_utf_8(manager: Manager, notifier: Notifier) -> None:
    notifier.status("up\nREADY=1\r\nand\rmore")
    assert manager.next() == {"STATUS": "up READY=1 and more"}
    notifier.status("é" * 10_000)
    assert manager.next() == {"STATUS": "é" * STATUS_CHARACTERS}
    notifier.status("\udcff")
    assert manager.next() == {"STATUS": "?"}
    notifier.ready("x\nWATCHDOG=trigger")
    assert manager.next() == {"READY": "1", "STATUS": "x WATCHDOG=trigger"}
    notifier.status("\U0001f600" * 10_000)
    assert len(manager.sock.recv(65536)) < 4096


@linux_only
def test_an_abstract_socket(loop: Loop) -> None:
    manager = Manager(f"\0snitun-test-{os.getpid()}")
    notifier = notifier_for(loop, manager.name)
    assert manager.name[0] == "@"
    notifier.ready("up")
    assert manager.next() == {"READY": "1", "STATUS": "up"}
    notifier.close()
    manager.close()


# --- what isn't taken -------------------------------------------------------------


def test_a_state_that_isn_t_taken_comes_later(
    threaded: Loop, manager: Manager, notifier: Notifier
) -> None:
    count = manager.fill()

    def say() -> None:
        notifier.reloading()
        notifier.status("lost")
        notifier.ready("up")

    threaded.call_soon_threadsafe(say)
    wait_until(lambda: notifier._status == "up" and threaded.timer_count == 1)
    assert [manager.next() for _ in range(count)] == [{"FILL": "1"}] * count
    assert manager.next() == {"READY": "1", "STATUS": "up"}
    wait_until(lambda: threaded.timer_count == 0)
    assert not manager.has_message()


def test_a_manager_that_is_started_anew(
    threaded: Loop, manager: Manager, notifier: Notifier
) -> None:
    manager.close()  # no file: ENOENT
    threaded.call_soon_threadsafe(notifier.ready, "up")
    wait_until(lambda: notifier._retry is not None)
    first = notifier._retry
    wait_until(lambda: notifier._retry is not first)
    manager.open()
    assert manager.next() == {"READY": "1", "STATUS": "up"}
    wait_until(lambda: threaded.timer_count == 0)
    manager.sock.close()  # nobody: ECONNREFUSED
    threaded.call_soon_threadsafe(notifier.stopping)
    wait_until(lambda: threaded.timer_count == 1)
    manager.close()
    manager.open()
    assert manager.next() == {"STOPPING": "1"}


def test_a_status_that_isn_t_taken_goes_with_the_next_message(
    loop: Loop, manager: Manager, notifier: Notifier
) -> None:
    manager.fill()
    notifier.status("full")
    assert loop.timer_count == 0  # not worth one
    manager.drain()
    notifier.reloading()
    assert {"RELOADING": "1", "STATUS": "full"}.items() <= manager.next().items()
    notifier.status("full")
    assert not manager.has_message()
    manager.fill()
    notifier.status("fuller")
    manager.drain()
    notifier.status("fuller")
    assert manager.next() == {"STATUS": "fuller"}


def test_the_end_overtakes_what_waits(manager: Manager, notifier: Notifier) -> None:
    manager.fill()
    notifier.ready("up")
    manager.drain()
    notifier.stopping()
    assert manager.next() == {"STOPPING": "1", "STATUS": "up"}
    assert not manager.has_message()


def test_what_waits_is_bounded(loop: Loop, manager: Manager, notifier: Notifier) -> None:
    manager.fill()
    for _ in range(100):
        notifier.reloading()
        notifier.ready("up")
    assert loop.timer_count == 1


def test_a_manager_that_is_gone_is_given_up(
    threaded: Loop,
    manager: Manager,
    notifier: Notifier,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(notify, "RETRY_S", 0.001)
    manager.close()
    threaded.call_soon_threadsafe(notifier.reloading)
    wait_until(lambda: "nobody takes what is sent there: RELOADING=1" in caplog.text)
    assert threaded.timer_count == 0
    manager.open()
    threaded.call_soon_threadsafe(notifier.ready, "up")
    assert manager.next() == {"READY": "1", "STATUS": "up"}


# --- the watchdog -----------------------------------------------------------------


def test_the_watchdog_hears_from_a_loop_that_turns(threaded: Loop, manager: Manager) -> None:
    notifier = notifier_for(
        threaded, manager.name, WATCHDOG_USEC="20000", WATCHDOG_PID=str(os.getpid())
    )
    threaded.call_soon_threadsafe(notifier.begin)
    for _ in range(3):
        assert manager.next() == {"WATCHDOG": "1"}

    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(WAIT_S)

    threaded.call_soon_threadsafe(hold)
    assert held.wait(WAIT_S)
    manager.drain()
    # Another loop with the same interval goes on meanwhile: it tells how long it has been.
    other_manager, other_loop = Manager(manager.name + "-2"), Loop()
    other = notifier_for(other_loop, other_manager.name, WATCHDOG_USEC="20000")
    other.begin()
    thread = threading.Thread(target=other_loop.run, daemon=True)
    thread.start()
    for _ in range(5):
        assert other_manager.next() == {"WATCHDOG": "1"}
    other_loop.stop()
    thread.join(WAIT_S)
    other.close()
    other_loop.close()
    other_manager.close()

    assert not manager.has_message()
    release.set()
    assert manager.next() == {"WATCHDOG": "1"}
    assert manager.next() == {"WATCHDOG": "1"}
    threaded.call_soon_threadsafe(notifier.close)
    wait_until(lambda: threaded.timer_count == 0)


class DelaysLoop(Loop):
    """A loop that notes for how long it was to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.delays: list[float] = []

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        self.delays.append(delay_s)
        return super().call_later(delay_s, callback)


def test_a_watchdog_s_message_that_isn_t_taken_is_followed_soon(manager: Manager) -> None:
    loop = DelaysLoop()
    notifier = notifier_for(loop, manager.name, WATCHDOG_USEC="8000000")
    notifier.begin()
    manager.fill()
    notifier._watchdog()
    manager.drain()
    notifier._watchdog()
    assert manager.next() == {"WATCHDOG": "1"}
    assert loop.delays == [4, 1, 4]
    notifier.close()
    loop.close()


@pytest.mark.parametrize(
    ("usec", "pid", "interval_s"),
    [
        ("30000000", "", 15.0),
        ("30000000", "ours", 15.0),
        ("30000000", "1", 0.0),
        ("30000000", "x", 0.0),
        ("", "", 0.0),
        (str(2**64 - 1), "", notify.MAX_WATCHDOG_S),
    ],
)
def test_how_often_the_watchdog_wants_to_hear(
    loop: Loop, usec: str, pid: str, interval_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    pid = str(os.getpid()) if pid == "ours" else pid
    notifier = notifier_for(loop, "/nowhere", WATCHDOG_USEC=usec, WATCHDOG_PID=pid)
    assert notifier._watchdog_s == interval_s
    notifier.begin()
    assert loop.timer_count == bool(interval_s)
    loop.stop()
    loop.run()  # and the loop can wait that long
    notifier.close()
    assert loop.timer_count == 0
    assert not caplog.text


@pytest.mark.parametrize("usec", ["0", "-1", "1.5", "soon", "٣", "9" * 21, " "])
def test_a_malformed_watchdog_is_said_and_none(
    loop: Loop, usec: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = notifier_for(loop, "/nowhere", WATCHDOG_USEC=usec)
    notifier.begin()
    assert loop.timer_count == 0
    notifier.close()
    assert f"WATCHDOG_USEC: {usec!r}; expected a number of microseconds" in caplog.text


# --- the environment, and the end -----------------------------------------------------


def test_without_a_manager_there_is_no_notifier(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": ""}, {"WATCHDOG_USEC": "x", "WATCHDOG_PID": "1"}):
        assert Notifier.from_environment(loop, environment) is None
        assert not environment
    assert not caplog.text


@pytest.mark.parametrize("name", ["run/notify", "@", "/", "vsock:2:1234", "/" + "x" * 107])
def test_a_malformed_socket_is_said_and_none(
    loop: Loop, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {"NOTIFY_SOCKET": name}
    assert Notifier.from_environment(loop, environment) is None
    assert not environment
    said = re.escape(repr(name)) if len(name) < 100 else "108 characters"
    assert re.search(f"NOTIFY_SOCKET: {said}; expected a path", caplog.text), caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_the_longest_names(loop: Loop, tmp_path: Path) -> None:
    notifier = notifier_for(loop, "/" + "x" * 106)
    notifier.status("nobody is there")
    notifier.close()
    if sys.platform == "linux":
        manager = Manager("\0" + "x" * 106)
        notifier = notifier_for(loop, manager.name)
        notifier.ready("up")
        assert manager.next() == {"READY": "1", "STATUS": "up"}
        notifier.close()
        manager.close()


def test_no_socket_to_be_had(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> socket.socket:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socket", fail)
    assert Notifier.from_environment(loop, {"NOTIFY_SOCKET": "/run/notify"}) is None
    assert "NOTIFY_SOCKET: can't be used: Too many open files" in caplog.text


def test_after_the_end_nothing_is_said_and_nothing_left(loop: Loop, manager: Manager) -> None:
    before = process_counts(os.getpid())
    notifier = notifier_for(loop, manager.name, WATCHDOG_USEC="20000")
    manager.fill()
    notifier.begin()
    notifier.ready("up")
    assert loop.timer_count == 2
    for _ in range(2):
        notifier.close()
        assert loop.timer_count == 0
        assert not has_more_than(before, os.getpid())
    manager.drain()
    notifier.begin()
    notifier.ready("up")
    notifier.status("over")
    notifier.reloading()
    notifier.stopping()
    assert not manager.has_message()
    assert loop.timer_count == 0
