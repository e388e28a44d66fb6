"""Much at once, for a while, as real processes. `--long` gives the stalls their full minute."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from tests.services import Services
from tests.support import (
    MIB,
    Credentials,
    Device,
    Endpoint,
    client,
    client_hello,
    download,
    has_more_than,
    in_threads,
    process_counts,
    relay,
    reset,
    rss_kib,
    tunnel,
    upload,
    wait_until,
)

GIB = 1024 * MIB


@pytest.fixture
def stall_s(request: pytest.FixtureRequest) -> float:
    """How long devices stop reading."""
    return 60.0 if request.config.getoption("--long") else 12.0


class Exchanges:
    """A channel that exchanges small messages all the time, on a thread of its own."""

    def __init__(self, port: int) -> None:
        self.count, self.longest_s = 0, 0.0
        self._device = Device(port, "ECHO")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.error: BaseException | None = None

    def __enter__(self) -> Exchanges:
        self._device.exchange()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(60)
        self._device.sock.close()

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                begin = time.monotonic()
                self._device.exchange(b"x" * 64)
                self.longest_s = max(self.longest_s, time.monotonic() - begin)
                self.count += 1
                time.sleep(0.01)
        except BaseException as error:
            self.error = error


# --- bulk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [0, 50])
@pytest.mark.parametrize("direction", [download, upload])
def test_a_gib_arrives_also_beside_others(
    credentials: Credentials, endpoint: Endpoint, direction: object, others: int
) -> None:
    assert callable(direction)
    with tunnel(credentials, endpoint) as (_, _, port):
        devices = [Device(port, "ECHO") for _ in range(others)]
        is_over = threading.Event()

        def exchange(number: int) -> None:
            if number < others:
                while not is_over.is_set():
                    devices[number].exchange(bytes(1000))
                    time.sleep(0.05)
                devices[number].sock.close()
            else:
                try:
                    direction(port, GIB)
                finally:
                    is_over.set()

        in_threads(others + 1, exchange)


# --- stalls ----------------------------------------------------------------------------------


def stalled_downloads(port: int, count: int, size: int) -> list[Device]:
    devices = [Device(port, f"SOURCE {size}") for _ in range(count)]
    for device in devices:
        device.receive(1000)
    return devices


def finish(devices: list[Device], size: int) -> list[bool]:
    """Read all downloads to their end; return which of them are whole."""
    whole = [False] * len(devices)

    def read(number: int) -> None:
        left = size - 1000
        try:
            while data := devices[number].sock.recv(1 << 18):
                left -= len(data)
        except ConnectionResetError:
            pass
        devices[number].sock.close()
        whole[number] = left == 0

    in_threads(len(devices), read)
    return whole


def test_stalled_devices_cost_little_and_get_everything(
    credentials: Credentials, endpoint: Endpoint, stall_s: float
) -> None:
    size = 300_000_000
    with tunnel(credentials, endpoint) as (server, peer, port), Exchanges(port) as other:
        programs = (server, peer)
        before = [rss_kib(program.pid) for program in programs]
        growth = [0, 0]
        devices = stalled_downloads(port, 8, size)
        deadline = time.monotonic() + stall_s
        while time.monotonic() < deadline:
            time.sleep(0.2)
            for number, program in enumerate(programs):
                growth[number] = max(growth[number], rss_kib(program.pid) - before[number])
        count = other.count
        assert all(finish(devices, size))
        assert other.error is None
        assert other.count > count > 0
        print(
            f"stalled for {stall_s:.0f} s: relay +{growth[0]} KiB, client +{growth[1]} KiB, "
            f"longest exchange beside it {other.longest_s * 1000:.0f} ms"
        )
        assert max(growth) < 8 * 1024


def test_version_0_a_short_stall_completes(tmp_path: Path, endpoint: Endpoint) -> None:
    credentials, size = Credentials(tmp_path, version=0), 300_000_000
    with tunnel(credentials, endpoint) as (server, _, port):
        devices = stalled_downloads(port, 8, size)
        time.sleep(2)  # of the 8 s that they would have
        assert all(finish(devices, size))
        assert "WARNING" not in server.output


def test_version_0_a_long_stall_aborts_what_stalls_and_nothing_else(
    tmp_path: Path, endpoint: Endpoint, stall_s: float
) -> None:
    credentials, size = Credentials(tmp_path, version=0), 300_000_000
    with tunnel(credentials, endpoint) as (server, peer, port), Exchanges(port) as other:
        devices = stalled_downloads(port, 8, size)
        time.sleep(stall_s)
        server.wait_for("aborted: it held")
        count = other.count
        wait_until(lambda: other.count > count + 10)
        whole = finish(devices, size)
        assert other.error is None
        download(port, MIB)
        aborted = server.output.count("aborted: it held")
        assert 0 < aborted == whole.count(False)
        assert peer.output.count("ready: ") == 1
        print(f"{aborted} of 8 aborted, longest exchange beside it {other.longest_s:.1f} s")


# --- nothing is left ---------------------------------------------------------------------------


def one_connection(port: int, number: int) -> None:
    """Open, exchange, close; every third one is cut by a reset half way, each in another state."""
    if number % 3:
        with Device(port, "ECHO") as device:
            device.exchange(bytes(500))
        return
    device = Device(port)
    hello = client_hello()
    state = number // 3 % 6
    if state == 1:
        device.sock.sendall(hello[:100])
    elif state == 2:
        device.sock.sendall(hello)
    elif state == 3:
        device.sock.sendall(hello + b"SOURCE 5000000\n")
        device.receive(100_000)
    elif state == 4:
        device.sock.sendall(hello + b"SINK 5000000\n" + bytes(200_000))
    elif state == 5:
        device.sock.sendall(hello + b"ECHO\n")
        device.exchange()
    reset(device.sock)


def many_connections(port: int, count: int, at_once: int) -> None:
    numbers = iter(range(count))
    lock = threading.Lock()

    def work(_: int) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            one_connection(port, number)

    in_threads(at_once, work)


def test_2000_connections_leave_no_descriptor_and_no_thread(
    credentials: Credentials, endpoint: Endpoint
) -> None:
    with tunnel(credentials, endpoint) as (server, peer, port):
        many_connections(port, 50, 10)  # workers are started, caches are warm
        wait_until(lambda: endpoint.open == 0)
        time.sleep(3)
        before = [process_counts(program.pid) for program in (server, peer)]
        many_connections(port, 2000, 200)
        wait_until(
            lambda: not any(map(has_more_than, before, (server.pid, peer.pid))),
            f"descriptors and threads as before: {before}",
        )
        wait_until(lambda: endpoint.open == 0)
        for program in (server, peer):
            assert "defect" not in program.output
            assert "Traceback" not in program.output
        print(f"relay and client have (descriptors, threads) {before} before and after")


def test_2000_connections_leave_no_channel_and_no_timer(tmp_path: Path) -> None:
    with Services(tmp_path) as services:
        many_connections(services.port, 2000, 200)
        services.wait_until_idle()


# --- restarts ------------------------------------------------------------------------------------


def test_a_relay_that_is_gone_for_a_while(credentials: Credentials, endpoint: Endpoint) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    credentials.at(f"127.0.0.1:{port}")
    with client(credentials, endpoint.address, up=False) as peer:
        peer.wait_for("can't reach the relay")
        server, _ = relay(credentials, listen=f"127.0.0.1:{port}")
        with server:
            peer.wait_for("ready: ", timeout_s=60)
