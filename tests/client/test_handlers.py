"""Handlers: blocking code in this process, behind sockets like any endpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Callable

import pytest

from snitun_sync.client import handlers as module
from snitun_sync.client.handlers import Call, Handlers
from snitun_sync.errors import EndpointError, SniTunError
from snitun_sync.net.loop import Loop
from tests.services import receive_exactly
from tests.support import MIB, WAIT_S, in_threads, pattern, pattern_sha256, wait_until

if TYPE_CHECKING:
    from snitun_sync.client.handlers import Conversation

    Handle = Callable[[socket.socket, str], object]


class Target:
    """A device, with the bridge's end of its connection."""

    def __init__(self, number: int = 0) -> None:
        self.device = f"192.0.2.{number}"
        self.sock: socket.socket | None = None
        self.error: SniTunError | None = None
        self.had_ended = False
        """Whether the connection had come to a good end when it was aborted."""

    def connected(self, sock: socket.socket) -> None:
        assert not sock.getblocking()
        sock.settimeout(WAIT_S)
        self.sock = sock

    def abort(self, error: SniTunError) -> None:
        if self.sock is not None:
            self.sock.setblocking(False)
            try:
                self.had_ended = self.sock.recv(65536) == b""
            except BlockingIOError:
                pass
            self.sock.close()
        self.error = error

    def wait(self) -> socket.socket:
        """Return the connection once it is there."""
        wait_until(lambda: self.sock)
        assert self.sock is not None
        return self.sock

    def receive_all(self) -> bytes:
        """Return what comes until the end, and close."""
        data = b""
        with self.wait() as sock:
            while piece := sock.recv(65536):
                data += piece
        return data


class Rig:
    """A loop on a thread, and handlers that belong to it."""

    def __init__(self) -> None:
        self.loop = Loop()
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()
        self._handlers: list[Handlers] = []

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what `function(*args)` returns, called on the loop's thread."""
        results: list[Any] = []
        self.loop.call_soon_threadsafe(lambda: results.append(function(*args)))
        wait_until(lambda: results)
        return results[0]

    def handlers(
        self,
        make: Callable[..., Conversation],
        threads: int = 16,
        waiting: int = 512,
        **options: Any,
    ) -> Handlers:
        self._handlers.append(Handlers(self.loop, make, threads, waiting, **options))
        return self._handlers[-1]

    def serve(self, handler: Handle, *args: Any) -> Handlers:
        return self.handlers(partial(Call, handler), *args)

    def connect(self, handlers: Handlers, number: int = 0) -> Target:
        target = Target(number)
        self.call(handlers.connect, target)
        return target

    def leave(self, handlers: Handlers, target: Target) -> None:
        """As a bridge whose device has gone."""

        def leave() -> None:
            if target.sock is not None:
                target.sock.close()
            handlers.cancel(target)

        self.call(leave)

    def close(self) -> None:
        """End all as a client does, and see that nothing is left."""
        for handlers in self._handlers:
            self.call(handlers.close)
        self.loop.stop()
        self._thread.join(WAIT_S)
        for handlers in self._handlers:
            wait_until(lambda handlers=handlers: not handlers._workers._threads)  # type: ignore[misc]
            self.loop.run_calls()
            assert not handlers._served and not handlers._waiting and not handlers._parked
        assert self.loop.timer_count == 0
        self.loop.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def echo(connection: socket.socket, device: str) -> None:
    """Say who it is, then what they say, until they end."""
    connection.sendall(device.encode() + b"\n")
    while data := connection.recv(65536):
        connection.sendall(data)


class Lines:
    """Each run answers one line; "end" ends it. It counts its runs, and remembers its maker."""

    all: list[Lines] = []

    def __init__(self, connection: socket.socket, device: str) -> None:
        self._connection, self.runs, self._is_running = connection, 0, False
        self.ident = threading.get_ident()
        Lines.all.append(self)

    def run(self) -> bool:
        assert not self._is_running
        self._is_running = True
        self.runs += 1
        line = b""
        while not line.endswith(b"\n"):
            piece = self._connection.recv(1)
            if not piece:
                return False
            line += piece
        self._is_running = False
        self._connection.sendall(line.upper())
        return line != b"end\n"


@pytest.fixture
def lines() -> Iterator[list[Lines]]:
    Lines.all.clear()
    yield Lines.all
    Lines.all.clear()


def say(target: Target, line: bytes) -> None:
    sock = target.wait()
    sock.sendall(line)
    assert receive_exactly(sock, len(line)) == line.upper()


def test_a_handler_has_a_blocking_socket_and_the_device_s_address(rig: Rig) -> None:
    socket.setdefaulttimeout(5)
    try:
        timeouts: list[float | None] = []

        def handle(connection: socket.socket, device: str) -> None:
            timeouts.append(connection.gettimeout())
            echo(connection, device)

        handlers = rig.serve(handle)
        target = rig.connect(handlers, 7)
        target.wait().sendall(b"hello")
        target.wait().shutdown(socket.SHUT_WR)
        assert target.receive_all() == b"192.0.2.7\nhello"
        assert timeouts == [None]
    finally:
        socket.setdefaulttimeout(None)
    wait_until(lambda: not handlers._served)
    rig.leave(handlers, target)  # harmless: as each bridge does when it is over
    assert target.error is None


def test_200_slow_handlers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are threads run; what waits costs no descriptor, and nothing is lost."""
    monkeypatch.setattr(module, "THREAD_IDLE_S", 0.05)
    release, lock = threading.Event(), threading.Lock()
    running, most, threads = [0], [0], set()

    def slow(connection: socket.socket, device: str) -> None:
        with lock:
            threads.add(handlers._workers._threads)
            running[0] += 1
            most[0] = max(most[0], running[0])
        release.wait()
        connection.sendall(connection.recv(16) + device.encode())
        with lock:
            running[0] -= 1

    handlers = rig.serve(slow)
    before = descriptors()
    targets = [rig.connect(handlers, number) for number in range(200)]
    wait_until(lambda: running[0] == 16)
    # The loop answers while they hang, and 16 pairs are all that is open.
    assert rig.call(lambda: sum(target.sock is not None for target in targets)) == 16
    assert rig.call(lambda: (handlers.running, len(handlers._waiting))) == (16, 184)
    assert rig.call(lambda: sum(each.fileno() >= 0 for each in handlers._served.values())) == 16
    release.set()

    def finish(number: int) -> None:
        target = targets[number]
        target.wait().sendall(b"I am ")
        assert target.receive_all() == b"I am " + target.device.encode()

    in_threads(200, finish)
    assert most[0] == 16
    assert max(threads) == 16
    wait_until(lambda: handlers._workers._threads == 0)
    wait_until(lambda: descriptors() <= before)
    wait_until(lambda: "snitun-worker" not in {thread.name for thread in threading.enumerate()})
    assert all(target.error is None for target in targets)


def test_too_many_wait_and_who_has_gone_is_never_run(rig: Rig) -> None:
    release, ran = threading.Event(), []

    def handle(connection: socket.socket, device: str) -> None:
        release.wait()
        ran.append(device)

    handlers = rig.serve(handle, 1, 2)
    targets = [rig.connect(handlers, number) for number in range(4)]
    error = rig.call(lambda: targets[3].error)
    said = "1 threads are at work, 2 connections wait for one, and no more may"
    assert (str(error), handlers.failures) == (said, 1)
    rig.leave(handlers, targets[1])
    last = rig.connect(handlers, 4)  # has its place now
    release.set()
    for target in (targets[0], targets[2], last):
        assert target.receive_all() == b""
    assert ran == ["192.0.2.0", "192.0.2.2", "192.0.2.4"]
    assert targets[1].sock is None
    assert targets[1].error is last.error is None


@pytest.mark.parametrize("error", [ValueError("why"), SystemExit(3), OSError(5, "why")])
def test_an_exception_ends_that_connection_only(
    rig: Rig, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    def fail(connection: socket.socket, device: str) -> None:
        if device == "192.0.2.1":
            connection.sendall(b"half an ans")
            release.wait()
            raise error
        echo(connection, device)

    handlers = rig.serve(fail)
    good, bad = rig.connect(handlers, 2), rig.connect(handlers, 1)
    assert receive_exactly(bad.wait(), 11) == b"half an ans"
    release.set()
    wait_until(lambda: bad.error)
    assert str(bad.error) == f"its handler failed: {type(error).__name__}"
    assert not bad.had_ended  # a cut answer must not look like a whole one
    good.wait().shutdown(socket.SHUT_WR)
    assert good.receive_all() == b"192.0.2.2\n"
    record = next(iter(caplog.records))
    assert record.getMessage() == "defect in handler of 192.0.2.1"
    assert record.exc_text and "raise error" in record.exc_text
    assert len(caplog.records) == 1
    wait_until(lambda: rig.call(lambda: handlers.running) == 0)


def test_a_conversation_may_be_cut_without_a_defect(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    def cut(connection: socket.socket, device: str) -> None:
        connection.sendall(b"half an ans")
        raise EndpointError("its answer was cut")

    target = rig.connect(rig.serve(cut))
    wait_until(lambda: target.error)
    assert str(target.error) == "its answer was cut"
    assert not target.had_ended
    assert not caplog.records


def test_what_a_failed_handler_held_is_freed_on_its_thread(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """Freeing may block: a database's connection, a file that isn't flushed."""
    idents: list[int] = []

    class Local:
        def __del__(self) -> None:
            idents.append(threading.get_ident())

    def fail(connection: socket.socket, device: str) -> None:
        local = Local()
        idents.append(threading.get_ident())
        raise ValueError(str(local))

    target = rig.connect(rig.serve(fail))
    wait_until(lambda: target.error)
    caplog.clear()
    assert len(set(idents)) == 1
    assert len(idents) == 2


def test_a_device_that_goes_away_is_no_defect(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    begun, ended = threading.Event(), []

    def source(connection: socket.socket, _: str) -> None:
        begun.set()
        try:
            while True:
                connection.sendall(bytes(65536))
        except OSError as error:
            ended.append(error)
            raise

    handlers = rig.serve(source)
    target = rig.connect(handlers)
    assert begun.wait(WAIT_S)
    rig.leave(handlers, target)
    wait_until(lambda: rig.call(lambda: handlers.running) == 0)
    assert isinstance(ended[0], (BrokenPipeError, ConnectionResetError))
    assert target.error is None
    assert not caplog.records


def close_it(connection: socket.socket, kept: list[Any]) -> None:
    connection.close()


def keep_a_file(connection: socket.socket, kept: list[Any]) -> None:
    kept.append(connection.makefile("rwb"))


def keep_a_copy(connection: socket.socket, kept: list[Any]) -> None:
    kept.append(connection.dup())


def keep_it(connection: socket.socket, kept: list[Any]) -> None:
    kept.append(connection)


def make_it_non_blocking(connection: socket.socket, kept: list[Any]) -> None:
    connection.setblocking(False)


def leave_data_unread(connection: socket.socket, kept: list[Any]) -> None:
    connection.recv(1)


@pytest.mark.parametrize(
    "habit",
    [close_it, keep_a_file, keep_a_copy, keep_it, make_it_non_blocking, leave_data_unread],
)
def test_the_connection_is_closed_when_the_handler_returns(
    rig: Rig, habit: Callable[[socket.socket, list[Any]], None]
) -> None:
    kept: list[Any] = []

    def handle(connection: socket.socket, device: str) -> None:
        connection.sendall(b"all of it")
        connection.recv(1)
        habit(connection, kept)

    handlers = rig.serve(handle, 1)
    for _ in range(2):  # the second: nothing is wrong with the pool
        target = rig.connect(handlers)
        target.wait().sendall(b"some")
        assert receive_exactly(target.wait(), 9) == b"all of it"
        try:
            assert target.receive_all() == b""
        except ConnectionResetError:  # as from any service that leaves some unread
            assert target.wait().fileno() == -1
        assert target.error is None
    for each in kept:
        each.close()


def test_a_detached_connection_is_its_handler_s(rig: Rig) -> None:
    kept: list[int] = []
    handlers = rig.serve(lambda connection, _: kept.append(connection.detach()))
    target = rig.connect(handlers)
    wait_until(lambda: rig.call(lambda: not handlers._served))
    with socket.socket(fileno=kept[0]) as connection:
        connection.sendall(b"later")
    assert target.receive_all() == b"later"


def test_parked_connections_hold_no_thread(rig: Rig, lines: list[Lines]) -> None:
    handlers = rig.handlers(Lines, 1, waits_first=True)
    targets = [rig.connect(handlers, number) for number in range(20)]
    assert all(target.sock for target in targets)
    assert not lines
    assert handlers._workers._threads == 0  # they have said nothing yet
    for line in (b"one\n", b"two\n", b"three\n", b"end\n"):
        for target in targets:
            say(target, line)
    for target in targets:
        assert target.receive_all() == b""
    assert [conversation.runs for conversation in lines] == [4] * 20
    assert len({conversation.ident for conversation in lines}) == 1
    wait_until(lambda: rig.call(lambda: handlers._timer is None))


def test_what_comes_before_a_thread_is_free_waits_for_it(rig: Rig, lines: list[Lines]) -> None:
    handlers = rig.handlers(Lines, 1, 1, waits_first=True)
    first, second, third = (rig.connect(handlers, number) for number in range(3))
    first.wait().sendall(b"sl")
    wait_until(lambda: lines)
    assert rig.call(lambda: len(handlers._parked)) == 2  # who runs has no time limit here
    second.wait().sendall(b"quick\n")
    wait_until(lambda: rig.call(lambda: len(handlers._waiting)) == 1)
    third.wait().sendall(b"too many\n")
    wait_until(lambda: third.error)
    assert not third.had_ended
    first.wait().sendall(b"ow\n")
    assert receive_exactly(first.wait(), 5) == b"SLOW\n"
    assert receive_exactly(second.wait(), 6) == b"QUICK\n"
    assert len(lines) == 2
    for target in (first, second):
        say(target, b"end\n")
        assert target.receive_all() == b""


def test_a_parked_connection_ends_with_its_device_or_its_time(
    rig: Rig, lines: list[Lines], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    handlers = rig.handlers(Lines, 2, waits_first=True)
    leaving, ending, silent, talking = (rig.connect(handlers, number) for number in range(4))
    for target in (leaving, ending):
        say(target, b"hello\n")
    wait_until(lambda: rig.call(lambda: len(handlers._parked)) == 4)
    rig.leave(handlers, leaving)
    ending.wait().shutdown(socket.SHUT_WR)
    assert ending.receive_all() == b""
    assert [conversation.runs for conversation in lines] == [1, 1]
    assert rig.call(lambda: handlers._timer) is not None

    def be_late(late: Target) -> None:
        for served in handlers._parked:
            served.parked_until -= module.IDLE_S * (served.target is late)
        handlers._timer.cancel()  # type: ignore[union-attr]
        handlers._end_idle()

    say(talking, b"hello\n")
    wait_until(lambda: rig.call(lambda: len(handlers._parked)) == 2)
    rig.call(be_late, silent)
    assert silent.receive_all() == b""
    say(talking, b"still here\n")
    wait_until(lambda: rig.call(lambda: len(handlers._parked)) == 1)
    rig.call(be_late, talking)
    assert talking.receive_all() == b""
    assert [conversation.runs for conversation in lines] == [1, 1, 2]
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    assert rig.connect(handlers).receive_all() == b""
    wait_until(lambda: descriptors() <= before)


def test_many_that_end_at_once_take_no_thread(rig: Rig, lines: list[Lines]) -> None:
    """As when the tunnel is lost: nothing is a failure."""
    handlers = rig.handlers(Lines, 1, 1, waits_first=True)
    targets = [rig.connect(handlers, number) for number in range(20)]

    def end() -> None:
        for target in targets:
            target.wait().shutdown(socket.SHUT_WR)

    rig.call(end)
    for target in targets:
        assert target.receive_all() == b""
        assert target.error is None
    assert (handlers.failures, lines) == (0, [])


def test_as_the_client_drains_nobody_stays(
    rig: Rig, lines: list[Lines], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAST_S", WAIT_S)
    handlers = rig.handlers(Lines, waits_first=True)
    running, parked, silent = (rig.connect(handlers, number) for number in range(3))
    say(parked, b"hello\n")
    running.wait().sendall(b"a l")
    wait_until(lambda: rig.call(lambda: (handlers.running, len(handlers._parked))) == (1, 2))
    rig.call(handlers.drain)
    say(parked, b"one more\n")
    running.wait().sendall(b"ine\n")
    assert running.receive_all() == b"A LINE\n"
    assert parked.receive_all() == b""
    monkeypatch.setattr(module, "LAST_S", 0.05)
    rig.call(handlers.drain)
    assert silent.receive_all() == b""
    assert rig.connect(handlers).receive_all() == b""
    assert not handlers.failures


def test_a_conversation_that_closed_its_connection_is_not_parked(rig: Rig) -> None:
    class Closing:
        def __init__(self, connection: socket.socket, device: str) -> None:
            self._connection = connection

        def run(self) -> bool:
            self._connection.close()
            return True

    handlers = rig.handlers(Closing)
    assert rig.connect(handlers).receive_all() == b""
    wait_until(lambda: rig.call(lambda: not handlers._served))


def test_close_ends_what_waits_is_parked_or_runs(rig: Rig, lines: list[Lines]) -> None:
    before, ends = descriptors(), []
    parking = rig.handlers(Lines, 1, waits_first=True)
    parked = rig.connect(parking)
    calling = rig.serve(lambda sock, _: ends.append(sock.recv(1)), 1)
    running, waiting = rig.connect(calling), rig.connect(calling)
    running.wait()
    rig.call(parking.close)
    rig.call(calling.close)
    assert parked.receive_all() == b""
    assert not ends
    running.wait().close()  # as its bridge does
    wait_until(lambda: calling._workers._threads == 0)
    assert ends == [b""]
    assert waiting.sock is None
    for handlers in (parking, calling):
        assert str(rig.connect(handlers).error) == "stopped"
    wait_until(lambda: descriptors() <= before)


def test_where_no_thread_and_no_descriptor_can_be_had(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    handlers = rig.serve(echo)
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        target = rig.connect(handlers)
    assert str(target.error) == "no thread can be started for its handler"
    assert not target.had_ended

    handlers = rig.serve(echo, 1)
    running, *waiting = (rig.connect(handlers) for _ in range(3))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # 0 to 2 are open
    try:
        running.wait().shutdown(socket.SHUT_WR)
        assert running.receive_all() == b"192.0.2.0\n"
        for target in waiting:
            wait_until(lambda target=target: target.error)  # type: ignore[misc]
            said = "no connection to a handler can be opened: Too many open files"
            assert str(target.error) == said
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    wait_until(lambda: descriptors() <= before)
    target = rig.connect(handlers)
    target.wait().shutdown(socket.SHUT_WR)
    assert target.receive_all() == b"192.0.2.0\n"


def test_100_mb_to_a_slow_device_are_held_back(rig: Rig) -> None:
    """Never is more on its way than the kernel holds for a pair of sockets, and one piece."""
    size, piece, sent = 100 * MIB, MIB // 4, [0]

    def source(connection: socket.socket, _: str) -> None:
        for at in range(0, size, piece):
            connection.sendall(pattern(at, piece))
            sent[0] = at + piece

    target = rig.connect(rig.serve(source))
    digest, received = hashlib.sha256(), 0
    with target.wait() as sock:
        while data := sock.recv(65536):
            assert sent[0] <= received + MIB
            received += len(data)
            digest.update(data)
    assert (received, digest.hexdigest()) == (size, pattern_sha256(size))
