"""How channels end: every byte of an answer, resets in every state, nothing left behind."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from snitun_sync.net import bridge as bridge_module
from snitun_sync.net import bridges as bridges_module
from snitun_sync.net import tunnel as tunnel_module
from snitun_sync.net.bridge import BridgeState
from snitun_sync.protocol import frame
from tests.services import Services, on_loop, raw_client, refusing_port
from tests.support import (
    MIB,
    Credentials,
    Device,
    Endpoint,
    HungEndpoint,
    client_hello,
    download,
    in_threads,
    pattern_sha256,
    reset,
    upload,
    wait_until,
)

NEVER_S = 3600.0


@pytest.fixture(params=[0, 2])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def services(tmp_path: Path, version: int) -> Iterator[Services]:
    with Services(tmp_path, version=version) as services:
        yield services


class OneEndpoint:
    """An endpoint whose one connection the test has in its own hands."""

    def __init__(self, tmp_path: Path, **options: Any) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(30)
        address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.services = Services(tmp_path, endpoint_address=address, **options)

    def __enter__(self) -> OneEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.services.__exit__()
        self.listener.close()

    def connect(self) -> tuple[Device, socket.socket]:
        """Return a device and its connection at the endpoint, the ClientHello read."""
        device = self.services.device()
        device.sock.sendall(client_hello())
        sock, _ = self.listener.accept()
        sock.settimeout(30)
        left = len(client_hello())
        while left:
            left -= len(sock.recv(left))
        return device, sock


# --- good ends -------------------------------------------------------------------------


def test_bytes_both_ways(services: Services) -> None:
    download(services.port, 20 * MIB)
    upload(services.port, 20 * MIB)
    with services.device("ECHO") as device:
        for size in (1, 100, 5000, 70_000):
            device.exchange(bytes(size))
    services.wait_until_idle()


def test_many_at_once(services: Services) -> None:
    jobs: tuple[Callable[..., None], ...] = (download, upload)
    in_threads(30, lambda number: jobs[number % 2](services.port, MIB))
    services.wait_until_idle()


def test_a_device_that_still_sends_gets_every_byte_of_the_answer(services: Services) -> None:
    """The endpoint answers and closes with input unread, as servers do that refuse an upload."""
    size = 5 * MIB
    with services.device(f"EARLY {size}") as device:
        stop = threading.Event()

        def keep_sending() -> None:
            try:
                while not stop.is_set():
                    device.sock.send(bytes(65536))
            except OSError:
                pass

        sender = threading.Thread(target=keep_sending)
        sender.start()
        digest = device.receive_all(pause_s=0.001)
        stop.set()
        sender.join(10)
    assert digest == (size, pattern_sha256(size))
    services.wait_until_idle()


def test_a_slow_device_gets_the_last_byte(services: Services) -> None:
    download(services.port, 4 * MIB, pause_s=0.005, receive_buffer=16384)
    services.wait_until_idle()


def test_a_slow_endpoint_gets_the_last_byte(services: Services) -> None:
    services.endpoint.slow_s = 0.005
    upload(services.port, 4 * MIB)
    services.wait_until_idle()


def test_what_a_half_closed_device_has_sent_arrives(tmp_path: Path, version: int) -> None:
    with OneEndpoint(tmp_path, version=version) as one:
        device, sock = one.connect()
        device.send_pattern(3 * MIB)
        device.sock.shutdown(socket.SHUT_WR)
        received = 0
        while data := sock.recv(65536):
            received += len(data)
        assert received == 3 * MIB
        # CLOSE has no half: the device's connection is over now.
        assert device.sock.recv(1) == b""
        sock.close()
        device.sock.close()
        one.services.wait_until_idle()


def test_the_end_of_the_endpoint_reaches_the_device_at_once(tmp_path: Path, version: int) -> None:
    with OneEndpoint(tmp_path, version=version) as one:
        device, sock = one.connect()
        sock.sendall(b"goodbye")
        sock.close()
        assert device.receive_all()[0] == 7
        # The device isn't reset although it says something after the end.
        device.sock.sendall(b"late")
        device.sock.close()
        one.services.wait_until_idle()


def test_a_device_that_never_ends_is_closed_after_the_drain_time(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "DRAIN_S", 0.2)
    with OneEndpoint(tmp_path, version=version) as one:
        device, sock = one.connect()
        sock.close()
        assert device.sock.recv(1) == b""

        def is_closed() -> bool:
            try:
                device.sock.sendall(b"x")
            except (BrokenPipeError, ConnectionResetError):
                return True
            return False

        wait_until(is_closed)
        device.sock.close()
        one.services.wait_until_idle()


def test_what_is_held_at_the_end_is_not_held_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bridge_module, "STALLED_S", 0.3)
    with OneEndpoint(tmp_path) as one:
        device, sock = one.connect()
        stop_reading = one.services.server
        sent = 0
        sock.settimeout(0.3)
        try:
            while True:
                sent += sock.send(bytes(65536))
        except socket.timeout:
            pass
        one.services.client.loop.call_soon_threadsafe(end_all, one.services.client)
        wait_until(lambda: "not taken in" in caplog.text)
        wait_until(lambda: not stop_reading.bridges.all)
        with pytest.raises(ConnectionResetError):
            device.receive(sent + 1)
        device.sock.close()
        sock.close()


def end_all(service: Any) -> None:
    """End all channels of a service as if their sockets had ended."""
    for bridge in tuple(service.bridges.all):
        bridge.tunnel.mux.abort(bridge.channel)


# --- resets in every state ---------------------------------------------------------------


def test_a_device_resets_while_idle(tmp_path: Path, version: int) -> None:
    with OneEndpoint(tmp_path, version=version) as one:
        device, sock = one.connect()
        reset(device.sock)
        assert sock.recv(1) == b""
        sock.close()
        one.services.wait_until_idle()


def test_an_endpoint_resets_while_idle(tmp_path: Path, version: int) -> None:
    with OneEndpoint(tmp_path, version=version) as one:
        device, sock = one.connect()
        reset(sock)
        assert device.sock.recv(1) == b""
        device.sock.close()
        one.services.wait_until_idle()


@pytest.mark.parametrize("who", ["device", "endpoint", "both"])
@pytest.mark.parametrize("direction", ["download", "upload", "both"])
def test_resets_in_the_middle_of_a_transfer(
    tmp_path: Path, version: int, who: str, direction: str
) -> None:
    with OneEndpoint(tmp_path, version=version) as one:
        device, sock = one.connect()
        senders = {"download": [sock], "upload": [device.sock], "both": [sock, device.sock]}[
            direction
        ]

        def send(sender: socket.socket) -> None:
            try:
                while True:
                    sender.sendall(bytes(65536))
            except OSError:
                pass

        threads = [threading.Thread(target=send, args=(sender,)) for sender in senders]
        for thread in threads:
            thread.start()
        other = {sock: device.sock, device.sock: sock}
        for sender in senders:
            for _ in range(20):
                other[sender].recv(65536)
        victims = {"device": [device.sock], "endpoint": [sock], "both": [sock, device.sock]}[who]
        for victim in victims:
            # A blocked sendall on another thread keeps the socket open: end it first.
            victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            victim.close()
        for survivor in (sock, device.sock):
            if survivor not in victims:
                try:
                    while survivor.recv(1 << 20):
                        pass
                except OSError:
                    pass
                survivor.close()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        one.services.wait_until_idle()


def test_resets_before_the_endpoint_is_connected(tmp_path: Path, version: int) -> None:
    with HungEndpoint() as hung:
        with Services(tmp_path, version=version, endpoint_address=hung.address) as services:
            devices = [services.device("HANG") for _ in range(5)]
            wait_until(lambda: len(services.client.bridges.all) == 5)
            for device in devices[:4]:
                reset(device.sock)
            wait_until(lambda: len(services.server.bridges.all) == 1)
            hung.release()
            # A device that has sent something gets its connection, also when it is gone.
            for _ in range(5):
                hung.listener.accept()[0].close()
            devices[4].sock.close()
            services.wait_until_idle()


def test_resets_while_ending(tmp_path: Path, version: int) -> None:
    with OneEndpoint(tmp_path, version=version) as one:
        device, sock = one.connect()
        sock.sendall(bytes(8 * MIB)[: 64 * 1024])
        sock.close()
        wait_until(
            lambda: all(b.state is BridgeState.ENDING for b in one.services.server.bridges.all)
        )
        reset(device.sock)
        one.services.wait_until_idle()


def test_a_refused_endpoint_ends_the_device_s_connection(tmp_path: Path, version: int) -> None:
    with refusing_port() as port:
        address = f"127.0.0.1:{port}"
        with Services(tmp_path, version=version, endpoint_address=address) as services:
            with services.device("ECHO") as device:
                assert device.sock.recv(1) == b""
            services.wait_until_idle()


# --- the tunnel ends -----------------------------------------------------------------------


def test_devices_are_reset_when_the_tunnel_is_lost(services: Services) -> None:
    """What they had may be cut short: a plain end would hide it."""
    devices = [services.device("ECHO") for _ in range(5)]
    for device in devices:
        device.exchange()
    services.server.loop.call_soon_threadsafe(lose_tunnels, services.server)
    for device in devices:
        with pytest.raises(ConnectionResetError):
            device.sock.recv(1)
        device.sock.close()
    wait_until(lambda: not services.server.bridges.all and not services.client.bridges.all)
    assert services.client.wait_until_up(30)  # and back again


def lose_tunnels(service: Any) -> None:
    for tunnel in tuple(service.tunnels):
        reset(tunnel.sock.dup())
        tunnel.sock.shutdown(socket.SHUT_RDWR)


def test_stop_flushes_what_is_held(tmp_path: Path, version: int) -> None:
    size = 400_000  # less than a channel may hold before its peer is paused
    with OneEndpoint(tmp_path, version=version) as one:
        device, sock = one.connect()
        sock.sendall(bytes(size))
        client = one.services.client
        wait_until(lambda: sum(bridge.channel.sent_bytes for bridge in client.bridges.all) == size)
        client.stop()
        assert device.receive(size) == bytes(size)
        assert device.sock.recv(1) == b""
        assert sock.recv(1) == b""
        device.sock.close()
        sock.close()


# --- back-pressure -----------------------------------------------------------------------


def test_a_stalled_device_is_paused_and_costs_little(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), Services(tmp_path) as services:
        size = 20 * MIB
        with services.device(f"SOURCE {size}", receive_buffer=16384) as stalled:
            wait_until(lambda: "pausing the peer" in caplog.text)
            wait_until(lambda: "paused by the peer" in caplog.text)
            with services.device("ECHO") as other:
                for _ in range(50):
                    other.exchange()
            assert services.server.bridges.held_bytes < 2 * MIB
            assert services.client.bridges.held_bytes == 0
            assert stalled.receive_all() == (size, pattern_sha256(size))
        assert "the peer may go on" in caplog.text
        services.wait_until_idle()


def test_a_stalled_endpoint_is_paused_and_costs_little(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), Services(tmp_path) as services:
        size = 20 * MIB
        services.endpoint.go_on.clear()
        job = threading.Thread(target=upload, args=(services.port, size))
        job.start()
        wait_until(lambda: "pausing the peer" in caplog.text)
        with services.device("ECHO") as other:
            for _ in range(50):
                other.exchange()
        assert services.client.bridges.held_bytes < 2 * MIB
        services.endpoint.go_on.set()
        job.join(60)
        assert not job.is_alive()
        services.wait_until_idle()


def test_watermarks_sink_as_the_process_fills_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """More stalled devices than fit with the usual watermark: nobody is stopped nor aborted."""
    with caplog.at_level(logging.DEBUG), Services(tmp_path, budget_bytes=8 * MIB) as services:
        devices = [services.device(f"SOURCE {6 * MIB}", receive_buffer=8192) for _ in range(25)]
        wait_until(lambda: caplog.text.count("pausing the peer") >= 25)
        assert services.server.bridges.is_pressed
        assert not services.server.bridges.suspended
        in_threads(25, lambda number: receive_everything(devices[number], 6 * MIB))
        assert "aborted" not in caplog.text
        services.wait_until_idle()


def receive_everything(device: Device, size: int) -> None:
    with device:
        assert device.receive_all() == (size, pattern_sha256(size))


def test_version_0_a_short_stall_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (tunnel_module, bridges_module):
        monkeypatch.setattr(module, "SUSPEND_S", NEVER_S)  # however slow this machine is
    with Services(tmp_path, version=0, budget_bytes=4 * MIB) as services:
        devices = [services.device(f"SOURCE {20 * MIB}") for _ in range(3)]
        wait_until(lambda: services.server.bridges.suspended)
        in_threads(3, lambda number: receive_everything(devices[number], 20 * MIB))
        assert not caplog.text
        services.wait_until_idle()


def test_version_0_a_long_stall_aborts_the_channel_that_stalls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tunnel_module, "SUSPEND_S", 0.5)
    with Services(tmp_path, version=0, budget_bytes=4 * MIB) as services:
        with services.device("ECHO") as other, services.device(f"SOURCE {50 * MIB}") as stalled:
            other.exchange()
            wait_until(lambda: "aborted: it held" in caplog.text)
            other.exchange()
            with pytest.raises(ConnectionResetError):
                stalled.receive_all()
            other.exchange()
        services.wait_until_idle()
        assert caplog.text.count("aborted") == 1
        assert services.client.tunnel is not None  # it lives on
        download(services.port, MIB)


def test_version_0_several_stalls_cost_one_suspension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tunnel_module, "SUSPEND_S", 0.5)
    monkeypatch.setattr(bridges_module, "SUSPEND_S", NEVER_S)
    suspensions: list[object] = []
    real = tunnel_module.Tunnel._suspension_over

    def counted(self: Any) -> None:
        suspensions.append(self)
        # All of them have stalled for long enough now, and whoever is next when it is full again.
        monkeypatch.setattr(bridges_module, "SUSPEND_S", 0.0)
        real(self)

    monkeypatch.setattr(tunnel_module.Tunnel, "_suspension_over", counted)
    with Services(tmp_path, version=0, budget_bytes=4 * MIB) as services:
        devices = [services.device(f"SOURCE {50 * MIB}") for _ in range(6)]
        wait_until(lambda: caplog.text.count("aborted: it held") == 6)
        assert len(suspensions) == 1
        for device in devices:
            device.sock.close()
        services.wait_until_idle()


def test_a_suspended_tunnel_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client stops reading for longer than its own keepalive would allow."""
    monkeypatch.setattr(tunnel_module, "SUSPEND_S", NEVER_S)
    with Services(tmp_path, version=0, client_budget_bytes=MIB) as services:
        client = services.client
        services.endpoint.go_on.clear()
        job = threading.Thread(target=upload, args=(services.port, 20 * MIB))
        job.start()
        wait_until(lambda: client.bridges.suspended)
        tunnel = client.tunnel
        assert tunnel is not None

        def is_alive() -> bool:
            tunnel._check_at = 0.0
            assert tunnel._timer is not None
            tunnel._timer.cancel()
            tunnel._check()
            return client.tunnel is tunnel

        def is_alive_much_later() -> bool:
            """As if a PING had gone long ago, and nothing had been read since."""
            tunnel._asked_at = tunnel.received_at = tunnel.loop.now - NEVER_S
            return is_alive()

        assert on_loop(client, is_alive_much_later)
        assert client.bridges.suspended
        services.endpoint.go_on.set()
        job.join(60)
        assert not job.is_alive()
        assert on_loop(client, is_alive)
        assert not on_loop(client, is_alive_much_later)  # which is what ends any other


def test_silent_tunnels_that_fill_the_process_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each holds less than its share when it stops; whoever reads next sees to all of them."""
    monkeypatch.setattr(bridge_module, "HIGH_WATERMARK_BYTES", 1 << 30)
    monkeypatch.setattr(bridges_module, "SUSPEND_S", NEVER_S)
    with Services(tmp_path, version=0, budget_bytes=MIB) as services, contextlib.ExitStack() as end:
        raws = []
        for number in range(3):
            hostname = f"{number}.test"
            credentials = Credentials(
                tmp_path, version=0, hostname=hostname, fernet_key=services.credentials.fernet_key
            )
            raw = end.enter_context(raw_client(credentials, services.port))
            device = end.enter_context(Device(services.port, hostname=hostname))
            device.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            device.sock.sendall(client_hello(hostname))
            raws.append((raw, raw.receive_flow(frame.NEW)[0]))
        bridges = services.server.bridges
        for number, (raw, channel_id) in enumerate(raws, 1):
            tunnels = [t for t in services.server.tunnels if channel_id in t.mux.channels]
            while tunnels[0].held_bytes < MIB * 0.9 / number:
                raw.send(frame.DATA, channel_id, data=bytes(20_000))
                time.sleep(0.001)
        assert bridges.is_full
        assert len(bridges.all) == 3
        monkeypatch.setattr(bridges_module, "SUSPEND_S", 0.1)
        time.sleep(0.2)
        download(services.port, MIB)
        wait_until(lambda: not bridges.is_full)
        assert "aborted: it held" in caplog.text


def test_a_peer_that_never_lets_a_channel_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bridge_module, "FINISH_S", 0.5)
    with Services(tmp_path) as services:
        services.client.stop()  # it would take the name back
        with raw_client(services.credentials, services.port) as raw:
            with services.device() as device:
                data = client_hello() + bytes(3 * MIB)
                sender = threading.Thread(target=device.sock.sendall, args=(data,))
                sender.start()
                received = 0
                while received < len(data):
                    received += len(raw.receive_flow(frame.DATA)[2])
                sender.join(10)
            # It ends behind a fence, whose pong never comes.
            wait_until(lambda: not services.server.bridges.all)
    assert "the peer didn't let it end for" in caplog.text


def test_the_budget_is_shared_fairly_between_tunnels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One client's stalled device doesn't stop another client's tunnel."""
    monkeypatch.setattr(tunnel_module, "SUSPEND_S", NEVER_S)
    service = Endpoint()
    with Services(tmp_path, version=0, budget_bytes=4 * MIB) as services:
        from snitun_sync.client import Client

        other = Credentials(
            tmp_path, version=0, hostname="other.test", fernet_key=services.credentials.fernet_key
        ).at(f"127.0.0.1:{services.port}")
        with Client(other, service.address) as client:
            assert client.wait_until_up(30)
            with services.device(f"SOURCE {50 * MIB}"):
                wait_until(lambda: services.server.bridges.suspended)
                download(services.port, 20 * MIB, hostname="other.test")
                assert services.server.bridges.suspended
    service.close()


# --- the path ------------------------------------------------------------------------------


def test_turns_grow_again_on_a_path_that_is_never_full(services: Services) -> None:
    """They were measured when it was slow; since then nobody has had to wait for a turn."""
    tunnel = services.client.tunnel
    assert tunnel is not None

    def shrink() -> None:
        tunnel.turn_bytes, tunnel._measure_at = 4096, 0.0

    services.client.loop.call_soon_threadsafe(shrink)
    wait_until(lambda: tunnel.turn_bytes == 4096)
    download(services.port, 4 * MIB)
    assert tunnel.turn_bytes > 4096


def test_without_epoll(tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll")
    with Services(tmp_path, version=version) as services:
        download(services.port, 4 * MIB)
        upload(services.port, 4 * MIB)
        with services.device("ECHO") as device:
            device.exchange()
        services.wait_until_idle()
