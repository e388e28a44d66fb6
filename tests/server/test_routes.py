"""--route: names that lead straight to an address."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import trustme
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from snitun_sync.errors import UsageError
from snitun_sync.protocol.hello import ALERT_INTERNAL_ERROR
from snitun_sync.protocol.proxy_protocol import read_header
from snitun_sync.server import Server
from snitun_sync.server import routes as routes_module
from snitun_sync.server.routes import Passage, parse_routes
from tests.services import is_idle, raw_client, refusing_port
from tests.support import (
    HOSTNAME,
    MIB,
    WAIT_S,
    Credentials,
    Device,
    Endpoint,
    HungEndpoint,
    client_hello,
    download,
    free_port,
    in_threads,
    module,
    pattern,
    pattern_sha256,
    relay,
    reset,
    wait_until,
)

NAME = "master.example.test"


class Routed:
    """A relay with one route, and what it leads to."""

    def __init__(self, credentials: Credentials, address: str, **options: Any) -> None:
        self.server = Server(
            [credentials.fernet_key], ["127.0.0.1:0"], routes=[f"{NAME}={address}"], **options
        ).start()
        self.port = self.server.ports[0]
        assert self.server.fixed_routes is not None
        self.routes = self.server.fixed_routes

    def __enter__(self) -> Routed:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        assert not self.routes.all
        assert not self.server.bridges.early_bytes

    def device(self, command: str = "", **options: Any) -> Device:
        return Device(self.port, command, hostname=NAME, **options)

    def wait_until_free(self) -> None:
        wait_until(
            lambda: (
                not self.routes.all and not self.server.bridges.early_bytes and is_idle(self.server)
            ),
            "nothing is left",
        )

    def report(self) -> dict[str, Any]:
        (report,) = self.routes.report()
        return report


@pytest.fixture
def routed(credentials: Credentials, endpoint: Endpoint) -> Iterator[Routed]:
    with Routed(credentials, endpoint.address) as routed:
        yield routed


class Target:
    """Listens, and calls `serve` with each connection on a thread of its own."""

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._serve = serve
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WAIT_S)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(WAIT_S)
            with sock, contextlib.suppress(OSError):
                self._serve(sock)


def all_of(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as file:
        return file.read()


# --- options ----------------------------------------------------------------------------


def test_routes_as_text() -> None:
    found = parse_routes(
        [
            "A.Example.=127.0.0.1:8443",
            "b.example=[::1]:1,proxy-v2",
            "c.example=unix:/run/x,proxy-v2",
        ]
    )
    assert {name: (str(address), proxy) for name, (address, proxy) in found.items()} == {
        "a.example": ("127.0.0.1:8443", False),
        "b.example": ("[::1]:1", True),
        "c.example": ("unix:/run/x", True),
    }


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["127.0.0.1:1"], "expected NAME=HOST:PORT"),
        (["a b=127.0.0.1:1"], "'a b' is not a DNS name"),
        (["192.0.2.1=127.0.0.1:1"], "is not a DNS name"),
        (["a.example=127.0.0.1"], "no port"),
        (["a.example=127.0.0.1:1,proxy-v1"], "port"),
        (["a.example=unix:x"], "no absolute path"),
        (["a.example=h:1", "A.example.=h:2"], "a.example is there twice"),
    ],
)
def test_what_is_no_route(texts: list[str], words: str, credentials: Credentials) -> None:
    with pytest.raises(UsageError, match=words):
        Server([credentials.fernet_key], routes=texts)


# --- the way ------------------------------------------------------------------------------


@pytest.mark.parametrize("has_proxy", [False, True])
def test_tls_as_it_is(credentials: Credentials, has_proxy: bool) -> None:
    """A name in upper case and with a dot, ALPN, and the device's own address and port."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME).configure_cert(context)
    context.set_alpn_protocols(["acme-tls/1", "h2"])
    seen: list[Any] = []

    def serve(sock: socket.socket) -> None:
        if has_proxy:
            header = sock.recv(16)
            header += sock.recv(int.from_bytes(header[14:16], "big"))
            seen.append(read_header(header))
            assert NAME.encode() in header
        with context.wrap_socket(sock, server_side=True) as tls:
            seen.append(tls.selected_alpn_protocol())
            tls.sendall(tls.recv(100))

    device = ssl.create_default_context()
    authority.configure_trust(device)
    device.set_alpn_protocols(["h2"])
    with Target(serve) as target:
        address = target.address + ",proxy-v2" * has_proxy
        with Routed(credentials, address) as routed:
            sock = socket.create_connection(("127.0.0.1", routed.port), WAIT_S)
            port = sock.getsockname()[1]
            with device.wrap_socket(sock, server_hostname=NAME) as tls:
                tls.sendall(b"ping")
                assert tls.recv(100) == b"ping"
            expected: list[Any] = [(28 + 3 + len(NAME), bytes([127, 0, 0, 1]), port)] * has_proxy
            assert seen == [*expected, "h2"]
            with Device(routed.port) as odd:
                odd.sock.sendall(client_hello(NAME).replace(b"master", b"MASTER"))
                wait_until(lambda: routed.report()["opened"] == 2)
            routed.wait_until_free()


def test_other_names_are_not_routed(routed: Routed) -> None:
    with Device(routed.port, "ECHO", hostname=f"x.{NAME}") as device:
        assert len(all_of(device.sock)) == 7  # an alert
    assert routed.report()["opened"] == 0


def test_a_route_goes_before_a_client(
    tmp_path: Path, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = Credentials(tmp_path, hostname=NAME, alias=(HOSTNAME,))
    with Routed(credentials, endpoint.address) as routed, raw_client(credentials, routed.port):
        wait_until(lambda: set(routed.server.routes) == {NAME, HOSTNAME})
        with routed.device("ECHO") as device:
            device.exchange()
        assert f"--route leads {NAME} elsewhere" in caplog.text
        assert f"--route leads {HOSTNAME}" not in caplog.text


def test_unix_sockets(credentials: Credentials, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with Routed(credentials, f"unix:{path}") as routed, routed.device("x") as device:
            far, _ = listener.accept()
            with far:
                assert far.recv(5) == client_hello(NAME)[:5]
                far.sendall(pattern(0, MIB // 4))
                assert device.receive(MIB // 4) == pattern(0, MIB // 4)
                device.sock.shutdown(socket.SHUT_WR)
                while far.recv(65536):
                    pass
            assert all_of(device.sock) == b""
            routed.wait_until_free()


def test_ipv6_and_names(credentials: Credentials, endpoint: Endpoint) -> None:
    ipv6 = Endpoint("::1")
    for address in (ipv6.address, f"localhost:{endpoint.port}"):
        with Routed(credentials, address) as routed:
            download(routed.port, 1000, hostname=NAME)
            assert routed.report()["opened"] == 1
    ipv6.close()


# --- bytes --------------------------------------------------------------------------------


def test_large_transfers_both_ways_at_once(routed: Routed) -> None:
    size = 100 * MIB
    with routed.device("ECHO") as device:
        sender = threading.Thread(target=device.send_pattern, args=(size,))
        sender.start()
        digest, left = hashlib.sha256(), size
        while left:
            piece = device.sock.recv(min(MIB, left))
            assert piece
            digest.update(piece)
            left -= len(piece)
        sender.join(WAIT_S)
        assert digest.hexdigest() == pattern_sha256(size)
        device.sock.shutdown(socket.SHUT_WR)
        assert device.sock.recv(1) == b""
    routed.wait_until_free()
    report = routed.report()
    assert report["sent_bytes"] == size
    assert report["received_bytes"] == size + len(client_hello(NAME)) + len(b"ECHO\n")


def test_who_reads_slowly_is_waited_for_and_costs_nothing(
    routed: Routed, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [0]
    carry = routes_module.Side.carry

    def counted(side: Any) -> None:
        turns[0] += 1
        carry(side)

    def is_quiet() -> bool:
        before = turns[0]
        return not threading.Event().wait(0.1) and turns[0] == before

    monkeypatch.setattr(routes_module.Side, "carry", counted)
    size = 40 * MIB
    with routed.device(f"SOURCE {size}") as device:
        wait_until(lambda: routed.report()["sent_bytes"] and is_quiet(), "it waits for who reads")
        assert routed.report()["sent_bytes"] < size
        assert device.receive_all() == (size, pattern_sha256(size))
    endpoint.go_on.clear()
    with routed.device(f"SINK {size}") as device:
        sender = threading.Thread(target=device.send_pattern, args=(size,))
        sender.start()
        wait_until(lambda: routed.report()["received_bytes"] and is_quiet())
        assert sender.is_alive()
        endpoint.go_on.set()
        assert device.receive(64).decode() == pattern_sha256(size)
        sender.join(WAIT_S)
    routed.wait_until_free()


def test_a_large_first_flight_to_who_reads_nothing_yet(credentials: Credentials) -> None:
    """What comes with the ClientHello is held no longer than the address needs to take it."""
    may_read = threading.Event()
    received: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        assert may_read.wait(WAIT_S)
        received.append(all_of(sock))

    with Target(serve) as target, Routed(credentials, target.address) as routed:
        with routed.device() as device:
            data = client_hello(NAME) + pattern(0, 8 * MIB)
            sender = threading.Thread(target=device.sock.sendall, args=(data,))
            sender.start()
            wait_until(lambda: routed.report()["received_bytes"] > 0)
            may_read.set()
            sender.join(WAIT_S)
            device.sock.shutdown(socket.SHUT_WR)
            wait_until(lambda: received)
            assert received[0] == data
        routed.wait_until_free()


def test_500_at_once(routed: Routed) -> None:
    def job(number: int) -> None:
        for _ in range(10):
            with routed.device("ECHO") as device:
                device.exchange(b"ping %d" % number)

    in_threads(50, job)
    assert routed.report()["opened"] == 500
    devices = [routed.device("ECHO") for _ in range(200)]
    for device in devices:
        device.exchange()
    assert routed.report()["open"] >= 200
    for device in devices:
        device.sock.close()
    routed.wait_until_free()


# --- ends ---------------------------------------------------------------------------------


def test_each_direction_ends_on_its_own(credentials: Credentials) -> None:
    received: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"the target has said all")
        sock.shutdown(socket.SHUT_WR)
        received.append(all_of(sock))

    with Target(serve) as target, Routed(credentials, target.address) as routed:
        with routed.device("x") as device:
            assert all_of(device.sock) == b"the target has said all"
            device.send_pattern(2 * MIB)
            device.sock.shutdown(socket.SHUT_WR)
            wait_until(lambda: received)
            assert received[0] == client_hello(NAME) + b"x\n" + pattern(0, 2 * MIB)
        routed.wait_until_free()


def test_a_device_that_ends_first_gets_its_answer(routed: Routed) -> None:
    with routed.device(f"SOURCE {4 * MIB}") as device:
        device.sock.shutdown(socket.SHUT_WR)
        assert device.receive_all() == (4 * MIB, pattern_sha256(4 * MIB))
    routed.wait_until_free()


def test_a_target_that_answers_early_and_closes(routed: Routed) -> None:
    """The answer comes whole, though the reset behind it cuts what the device still sends."""
    with routed.device(f"EARLY {MIB}") as device:
        stop = threading.Event()

        def send() -> None:
            while not stop.is_set():
                try:
                    device.sock.send(bytes(65536))
                except OSError:
                    return

        sender = threading.Thread(target=send)
        sender.start()
        assert device.receive(MIB) == pattern(0, MIB)
        assert device.sock.recv(1) == b""
        stop.set()
        device.sock.close()
        sender.join(WAIT_S)
    routed.wait_until_free()


def test_resets(routed: Routed, endpoint: Endpoint, credentials: Credentials) -> None:
    for command in ("HANG", f"SOURCE {64 * MIB}", "SINK 1000000"):
        device = routed.device(command)
        wait_until(lambda: endpoint.open == 1)
        reset(device.sock)
        wait_until(lambda: endpoint.open == 0)
    routed.wait_until_free()

    def reset_it(sock: socket.socket) -> None:
        sock.recv(1)
        reset(sock)

    with Target(reset_it) as target:
        with Routed(credentials, target.address) as cut, cut.device("x") as device:
            try:
                assert device.sock.recv(1) == b""
            except ConnectionResetError:
                pass
            cut.wait_until_free()


def test_a_target_that_is_down(credentials: Credentials, caplog: pytest.LogCaptureFixture) -> None:
    with refusing_port() as port, Routed(credentials, f"127.0.0.1:{port}") as routed:
        for _ in range(2):
            with routed.device("x" * 10_000) as device:
                assert all_of(device.sock) == ALERT_INTERNAL_ERROR
        routed.wait_until_free()
        report = routed.report()
        assert (report["opened"], report["failed"], report["open"]) == (2, 2, 0)
        assert "Connection refused" in report["failure"]
        assert caplog.text.count("Connection refused") == 1


def test_a_name_that_leads_nowhere(credentials: Credentials) -> None:
    with Routed(credentials, "nowhere.invalid:443") as routed, routed.device("x") as device:
        assert all_of(device.sock) == ALERT_INTERNAL_ERROR


def test_a_target_that_does_not_answer(credentials: Credentials) -> None:
    with HungEndpoint() as hung, Routed(credentials, hung.address) as routed:
        routed.routes.by_name[NAME].endpoint.timeout_s = 0.2
        with routed.device("x") as device, routed.device("y") as other:
            other.sock.close()  # gone before there is a connection
            assert all_of(device.sock) == ALERT_INTERNAL_ERROR
        routed.wait_until_free()


def test_a_route_that_leads_back_to_the_relay(
    credentials: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    routes = [f"{NAME}=127.0.0.1:{port}", f"v6.{NAME}=[::1]:{port}"]
    listen = [f"127.0.0.1:{port}", f"[::1]:{port}"]
    with Server([credentials.fernet_key], listen, routes=routes) as server:
        for hostname in (NAME, f"v6.{NAME}"):
            with Device(port, "x", hostname=hostname) as device:
                assert all_of(device.sock) == ALERT_INTERNAL_ERROR
            assert f"the route {hostname} leads back to this relay" in caplog.text
        found = server.fixed_routes
        assert found is not None
        assert [route["opened"] for route in found.report()] == [1, 1]
        wait_until(lambda: not found.all)
        assert not found.places


def test_idle_connections_end(credentials: Credentials, endpoint: Endpoint) -> None:
    with Routed(credentials, endpoint.address, channel_idle_s=1) as routed:
        with routed.device("HANG") as device, pytest.raises(ConnectionResetError):
            device.sock.recv(1)
        routed.wait_until_free()


def test_a_defect_ends_one_connection_alone(
    routed: Routed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with routed.device("ECHO") as fine, routed.device("ECHO") as unlucky:
        fine.exchange()
        unlucky.exchange()
        update = Passage.update

        def broken(passage: Passage) -> None:
            monkeypatch.setattr(Passage, "update", update)
            raise ZeroDivisionError

        monkeypatch.setattr(Passage, "update", broken)
        unlucky.sock.sendall(b"x")
        wait_until(lambda: len(routed.routes.all) == 1)
        fine.exchange()
        assert "defect in Side" in caplog.text
        caplog.clear()


# --- the program --------------------------------------------------------------------------


def test_a_device_that_comes_as_the_relay_drains(
    credentials: Credentials, endpoint: Endpoint
) -> None:
    with Routed(credentials, endpoint.address) as routed:
        hello = client_hello(NAME)
        with socket.create_connection(("127.0.0.1", routed.port), WAIT_S) as sock:
            sock.sendall(hello[:100])
            wait_until(lambda: any(arrival.received for arrival in routed.server.arrivals))
            end = threading.Thread(target=routed.server.stop, args=(WAIT_S,))
            end.start()
            wait_until(lambda: routed.server.ready() == "stopping")
            sock.sendall(hello[100:] + b"SOURCE 100000\n")
            assert all_of(sock) == pattern(0, 100000)
        end.join(WAIT_S)


def test_figures_and_two_ways_to_stop(credentials: Credentials, endpoint: Endpoint) -> None:
    """SIGTERM lets open connections end, and their end is the program's; twice, it is at once."""
    for is_hurried in (False, True):
        program, port = relay(
            credentials,
            *("--route", f"{NAME}={endpoint.address}", "--admin", "127.0.0.1:0", "--grace", "1h"),
        )
        admin = program.wait_for(" for --admin").split(" for --admin")[0].split()[-1]
        with program, Device(port, "ECHO", hostname=NAME) as device:
            device.exchange()
            status = [*module("snitun_sync.server", "status", "--admin", admin)]
            shown = subprocess.run(status, capture_output=True, text=True, check=True).stdout
            assert f"{NAME} to {endpoint.address}, 1 open, 1 so far, 0 failed" in shown
            with urllib.request.urlopen(f"http://{admin}/metrics") as answer:
                metrics = answer.read().decode()
            assert f'snitun_server_route_opened_total{{route="{NAME}"}} 1' in metrics
            assert f'{{route="{NAME}",direction="sent"}} 4' in metrics
            assert list(text_string_to_metric_families(metrics))  # type: ignore[no-untyped-call]
            program.process.terminate()
            wait_until(lambda port=port: is_refused(port))  # type: ignore[misc]
            device.exchange()
            assert program.process.poll() is None
            if is_hurried:
                program.process.terminate()
            else:
                device.sock.close()
            assert program.wait() == 0


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), WAIT_S).close()
    except ConnectionRefusedError:
        return True
    return False
