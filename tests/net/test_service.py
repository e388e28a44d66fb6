"""The life of a service: it starts once, ends once, and says why."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from itertools import islice
from pathlib import Path

import pytest

from snitun_sync.client import Client
from snitun_sync.errors import ConfigurationError, LostError, MisuseError, SniTunError, UsageError
from snitun_sync.net.service import Service
from snitun_sync.server import Server
from tests.support import WAIT_S, Credentials, Endpoint, wait_until


class Probe(Service):
    """A service that does nothing, or raises where it is told to."""

    def __init__(self, fails_in: str = "") -> None:
        super().__init__(budget_bytes=1000)
        self.fails_in = fails_in
        self.has_begun = False

    def _step(self, name: str) -> None:
        if self.fails_in == name:
            raise RuntimeError(f"in {name}")

    def _open(self) -> None:
        self._step("open")

    def _begin(self) -> None:
        self._step("begin")
        self.has_begun = True

    def _begin_stop(self) -> None:
        self._step("stop")

    def _close(self) -> None:
        super()._close()
        self._step("close")


def test_it_runs_once() -> None:
    with Probe() as probe:
        with pytest.raises(MisuseError):
            probe.start()
    assert probe.wait(0)
    with pytest.raises(MisuseError):
        probe.run()
    probe.stop()


def test_a_stop_before_the_start_ends_it_quietly() -> None:
    for start in (Probe.run, Probe.start):
        probe = Probe()
        probe.stop()
        start(probe)
        assert probe.wait(5)
        assert not probe.has_begun


def test_an_error_in_open_is_the_caller_s() -> None:
    probe = Probe("open")
    with pytest.raises(RuntimeError, match="in open"):
        probe.start()
    assert probe.loop.sock is None
    probe.stop()


@pytest.mark.parametrize("where", ["begin", "stop"])
def test_a_defect_ends_it_with_an_error(where: str) -> None:
    probe = Probe(where).start()
    probe.loop.call_soon_threadsafe(probe._stop)
    with pytest.raises(SniTunError, match=f"a defect.*in {where}"):
        probe.wait(10)
    probe.stop()
    assert probe.loop.sock is None


def test_it_ends_even_if_freeing_fails() -> None:
    probe = Probe("close")

    def stop() -> None:
        wait_until(lambda: probe.has_begun)
        probe.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(RuntimeError, match="in close"):
        probe.run()
    thread.join(10)
    assert not thread.is_alive()


def test_the_loop_s_own_defect_is_an_error() -> None:
    with pytest.raises(SniTunError, match="a defect"):
        with Probe() as probe:
            wait_until(lambda: probe.has_begun)
            os.close(probe.loop._poller.fileno())  # type: ignore[union-attr]
            probe.loop.call_soon_threadsafe(lambda: None)
            probe.wait(10)


def test_the_kernel_s_congestion_control(credentials: Credentials, endpoint: Endpoint) -> None:
    """Of the tunnel, on both sides; the system's own elsewhere."""
    key, name = credentials.fernet_key, "reno"
    with Server([key], ["127.0.0.1:0"], congestion_control=name) as server:
        ticket = credentials.at(f"127.0.0.1:{server.ports[0]}")
        with Client(ticket, endpoint.address, congestion_control=name) as client:
            assert client.wait_until_up(10)
            [tunnel] = server.tunnels
            for each in (tunnel, client.tunnel):
                assert each is not None
                assert each.sock is not None
                value = each.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
                assert value.rstrip(b"\0") == name.encode()
    with pytest.raises(UsageError, match="--congestion-control: 'tachyon'"):
        Client(credentials.ticket, endpoint.address, congestion_control="tachyon")


def test_a_signal_while_it_opens() -> None:
    """The handler runs on the thread that the end would have to be waited for on."""

    class Slow(Probe):
        def _open(self) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)

    probe = Slow()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: probe.stop())
    try:
        probe.run()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert probe.wait(0)


def test_ending_by_itself_gives_the_reason() -> None:
    with Probe() as probe:
        probe.loop.call_soon_threadsafe(probe._end, LostError("enough"))
        with pytest.raises(LostError, match="enough"):
            probe.wait(10)


def test_the_manager_hears_of_a_reload_and_of_none_after_stopping(
    credentials: Credentials, tmp_path: Path
) -> None:
    """RELOADING is always followed by READY, and STOPPING by neither."""

    def wrong() -> None:
        raise ConfigurationError("wrong")

    def defect() -> None:
        raise RuntimeError("a defect")

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(WAIT_S)
        manager.bind(str(tmp_path / "notify"))
        server = Server([credentials.fernet_key], ["127.0.0.1:0"])
        server.notify_manager({"NOTIFY_SOCKET": str(tmp_path / "notify")})

        def states(count: int) -> list[str]:
            received = (manager.recv(4096).decode() for _ in range(100))
            kinds = (text.partition("=")[0] for text in received)
            return list(islice((kind for kind in kinds if kind != "STATUS"), count))

        with server:
            assert states(1) == ["READY"]
            for read in (bool, wrong, defect):
                server.loop.call_soon_threadsafe(server.reload, read)
                assert states(2) == ["RELOADING", "READY"]
            with socket.create_connection(("127.0.0.1", server.ports[0])):
                wait_until(lambda: server.arrivals)
                stopping = threading.Thread(target=server.stop, args=(60.0,))
                stopping.start()
                assert states(1) == ["STOPPING"]
                server.loop.call_soon_threadsafe(server.reload, bool)
            stopping.join(WAIT_S)
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            states(1)
