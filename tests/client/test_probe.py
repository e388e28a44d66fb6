"""The self-probe, against real TLS behind a real relay: what it sees, and what it does then."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from snitun_sync.client import Client
from snitun_sync.client import probe as probe_module
from snitun_sync.client.client import ClientState
from snitun_sync.client.settings import Settings
from snitun_sync.errors import LostError
from snitun_sync.server import Server
from tests.services import ConnectProxy, on_loop, refusing_port
from tests.support import HOSTNAME, PROJECT, WAIT_S, Credentials, wait_until

AUTHORITY = trustme.CA()
NOT_OURS = "is not the endpoint's certificate"


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))  # threads of former tests may close some yet
    yield
    wait_until(lambda: before.issuperset(os.listdir("/proc/self/fd")), "all are closed")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first probe comes at once, and so does one after a failure."""
    monkeypatch.setattr(probe_module, "FIRST_S", 0.01)
    monkeypatch.setattr(probe_module, "AGAIN_S", 0.05)


class TlsEndpoint:
    """A service that speaks TLS with a certificate of its own, and sends back what it gets."""

    def __init__(self, path: Path | None = None, version: ssl.TLSVersion | None = None) -> None:
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
            self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
            self.address = f"unix:{path}"
        self._version = version
        self.names: list[str | None] = []
        """What the ClientHellos said, one after the other."""
        self.other: ssl.SSLContext | None = None
        """For who names another host, or none, where that isn't None."""
        self.versions: set[str | None] = set()
        self.says: bytes | None = None
        """What new connections hear instead of TLS, byte by byte; b"": nothing."""
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.renew()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> TlsEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        for thread in tuple(self._threads):
            thread.join(WAIT_S)

    def hang_up(self) -> None:
        """End all connections."""
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def renew(self) -> None:
        """Show another certificate from now on."""
        self._context = self._new_context()

    def _new_context(self) -> ssl.SSLContext:
        context = new_context(HOSTNAME)
        if self._version is not None:
            context.minimum_version = context.maximum_version = self._version

        def named(sock: Any, name: str | None, _: ssl.SSLContext) -> None:
            self.names.append(name)
            if name != HOSTNAME and self.other is not None:
                sock.context = self.other

        context.sni_callback = named
        return context

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.add(sock)
        try:
            with contextlib.suppress(OSError):
                if self.says is not None:
                    self._say(sock, self.says)
                    return
                # Not by the context's own wrapping of the socket: `hang_up` needs this one.
                far = socket.fromfd(sock.fileno(), sock.family, sock.type)
                with self._context.wrap_socket(far, server_side=True) as secured:
                    self.versions.add(secured.version())
                    while data := secured.recv(65536):
                        secured.sendall(data)
        finally:
            with self._lock:
                self._open.discard(sock)
            sock.close()

    def _say(self, sock: socket.socket, says: bytes) -> None:
        for at in range(len(says)):
            sock.sendall(says[at : at + 1])
            time.sleep(0.02)
        while sock.recv(65536):
            pass


def new_context(name: str) -> ssl.SSLContext:
    """Return a server's context with a certificate for `name`, which nobody else has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert(name).configure_cert(context)
    return context


class Relay(Server):
    """A relay, ended with its context."""

    def __init__(self, credentials: Credentials) -> None:
        super().__init__([credentials.fernet_key], ["127.0.0.1:0"])

    @property
    def address(self) -> str:
        """Where devices and clients find it."""
        return f"127.0.0.1:{self.ports[0]}"


@contextlib.contextmanager
def probing(
    relay: Relay, credentials: Credentials, endpoint: str, probe_address: str = "", **options: Any
) -> Iterator[Client]:
    """Run a client that probes once a second; at its own relay, if nothing else is said."""
    options.setdefault("probe_s", 1.0)
    with Client(
        credentials.at(relay.address),
        endpoint,
        probe_address=probe_address or relay.address,
        **options,
    ) as client:
        assert client.wait_until_up(WAIT_S)
        yield client
        probe = client.probe
    assert probe is None or probe._timer is None


@pytest.fixture
def relay(credentials: Credentials) -> Iterator[Relay]:
    with Relay(credentials) as relay:
        yield relay


@pytest.fixture
def elsewhere(credentials: Credentials) -> Iterator[Relay]:
    """A relay at which the client isn't: there, others may have its name, or nobody."""
    with Relay(credentials) as relay:
        yield relay


@pytest.fixture
def endpoint() -> Iterator[TlsEndpoint]:
    with TlsEndpoint() as endpoint:
        yield endpoint


def ready(client: Client) -> str:
    """Return why the client isn't ready, "" if it is."""
    result: str = on_loop(client, client.ready)
    return result


def next_result(client: Client, count: int = 1) -> str:
    """Wait until so many probes have ended; return what the last one found."""
    for _ in range(count):
        probe = client.probe
        assert probe is not None
        before = probe.checked_at
        wait_until(lambda probe=probe, before=before: probe.checked_at != before, "a probe ends")  # type: ignore[misc]
    assert client.probe is not None
    return client.probe.failure


class TlsDevice:
    """A device that trusts the authority, and nobody else."""

    def __init__(self, relay: Relay) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        AUTHORITY.configure_trust(context)
        sock = socket.create_connection(("127.0.0.1", relay.ports[0]), WAIT_S)
        self.sock = context.wrap_socket(sock, server_hostname=HOSTNAME)

    def __enter__(self) -> TlsDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def exchange(self) -> None:
        """Send something, and see it come back."""
        self.sock.sendall(b"ping")
        assert self.sock.recv(100) == b"ping"


# --- what it sees ----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_it_gets_through(relay: Relay, credentials: Credentials, version: ssl.TLSVersion) -> None:
    with TlsEndpoint(version=version) as endpoint:
        with probing(relay, credentials, endpoint.address) as client:
            assert next_result(client) == ""
            assert ready(client) == ""
            with TlsDevice(relay) as device:
                device.exchange()
            report = on_loop(client, client.report)["probe"]
            assert report["failure"] is None
            assert report["took_s"] > 0
            assert report["checked"] is not None
        assert len(endpoint.versions) == 1
        assert len(endpoint.names) >= 2
        assert set(endpoint.names) == {HOSTNAME}


def test_an_endpoint_at_a_unix_socket(
    relay: Relay, credentials: Credentials, tmp_path: Path
) -> None:
    with TlsEndpoint(tmp_path / "socket") as endpoint:
        with probing(relay, credentials, endpoint.address) as client:
            assert next_result(client) == ""


def test_certificates_that_depend_on_the_name(
    relay: Relay, credentials: Credentials, endpoint: TlsEndpoint
) -> None:
    """The endpoint is asked by the same name: who asks without sees another certificate."""
    endpoint.other = new_context("default.example.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, port = endpoint.address.split(":")

    def leaf(name: str | None) -> bytes:
        with socket.create_connection((host, int(port)), WAIT_S) as sock:
            with context.wrap_socket(sock, server_hostname=name) as secured:
                return secured.getpeercert(binary_form=True) or b""

    assert leaf(None) != leaf(HOSTNAME)
    with probing(relay, credentials, endpoint.address) as client:
        assert next_result(client) == ""


def test_a_renewed_certificate_is_the_endpoint_s(
    relay: Relay, credentials: Credentials, endpoint: TlsEndpoint
) -> None:
    with probing(relay, credentials, endpoint.address) as client:
        assert next_result(client) == ""
        endpoint.renew()
        assert next_result(client, 2) == ""  # the second one has begun after it
        assert ready(client) == ""


def test_another_client_with_our_name(
    relay: Relay,
    elsewhere: Relay,
    credentials: Credentials,
    endpoint: TlsEndpoint,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where devices are led, another one has the name: /ready says so until that is over."""
    ticket = credentials.at(elsewhere.address)
    with TlsEndpoint() as theirs, Client(ticket, theirs.address) as other:
        assert other.wait_until_up(WAIT_S)
        with probing(
            relay, credentials, endpoint.address, elsewhere.address, admin="127.0.0.1:0"
        ) as client:
            what = f"what {elsewhere.address} shows for {HOSTNAME} {NOT_OURS}"
            assert next_result(client) == f"self-probe: {what}"
            assert client.state is ClientState.UP
            assert get_ready(client) == (503, f"not ready: self-probe: {what}\n")
            assert "; but self-probe: what" in on_loop(client, client.summary)
            assert "snitun_client_probe_success 0" in get(client, "/metrics")[1]
            # Who has our name says so; and it is said once.
            assert next_result(client) == f"self-probe: {what}"
            assert caplog.text.count(NOT_OURS) == 1
            other.reconfigure(Settings(ticket, endpoint.address))
            assert next_result(client, 2) == ""
            assert get_ready(client) == (200, "ready\n")
            assert "snitun_client_probe_success 1" in get(client, "/metrics")[1]


def get(client: Client, path: str) -> tuple[int, str]:
    """Return status and body of one of the client's pages."""
    assert client.admin is not None
    connection = http.client.HTTPConnection("127.0.0.1", client.admin.port, timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        with connection.getresponse() as response:
            return response.status, response.read().decode()


def get_ready(client: Client) -> tuple[int, str]:
    return get(client, "/ready")


def test_a_relay_that_doesn_t_know_the_name(
    relay: Relay, elsewhere: Relay, credentials: Credentials, endpoint: TlsEndpoint
) -> None:
    with probing(relay, credentials, endpoint.address, elsewhere.address) as client:
        said = f"self-probe: {elsewhere.address} ends the TLS handshake for {HOSTNAME}: "
        result = next_result(client)
        assert result.startswith(said)
        assert "unrecognized name" in result
        assert ready(client) == result


def test_nobody_at_the_public_address(
    relay: Relay, credentials: Credentials, endpoint: TlsEndpoint
) -> None:
    with refusing_port() as port:
        with probing(relay, credentials, endpoint.address, f"127.0.0.1:{port}") as client:
            assert next_result(client) == (
                f"self-probe: can't reach 127.0.0.1:{port}: Connection refused"
            )


def test_who_ends_the_handshake_without_a_word(
    relay: Relay, credentials: Credentials, endpoint: TlsEndpoint
) -> None:
    """A relay without TLS of its own does that to a tunnel that is just ending."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with probing(relay, credentials, endpoint.address, f"127.0.0.1:{port}") as client:
            sock, _ = listener.accept()
            with sock:
                assert sock.recv(65536)
            result = next_result(client)
            assert result.startswith(f"self-probe: 127.0.0.1:{port} ends the TLS handshake")
            assert "eof" in result
            assert "_ssl.c" not in result


# --- the endpoint's own fault ----------------------------------------------------------------


def test_an_endpoint_without_tls(
    relay: Relay, credentials: Credentials, endpoint: TlsEndpoint
) -> None:
    endpoint.says = b"SSH-2.0-OpenSSH_9.2p1\r\n"
    with probing(relay, credentials, endpoint.address) as client:
        result = next_result(client)
        assert result.startswith(f"self-probe: endpoint {endpoint.address} shows no certificate: ")
        assert ready(client) == result
        endpoint.says = None
        assert next_result(client, 2) == ""


def test_an_endpoint_that_is_down_is_no_reason_for_another_tunnel(
    relay: Relay, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "RENEW_AFTER", 1)
    with refusing_port() as port:
        with probing(relay, credentials, f"127.0.0.1:{port}") as client:
            said = f"self-probe: endpoint 127.0.0.1:{port} shows no certificate: Connection refused"
            assert next_result(client, 3) == said
            assert client.attempts == 1


@pytest.mark.parametrize("says", [b"", b"\x16\x03\x03\x3f\xff\x02" + bytes(1000)])
def test_an_endpoint_that_never_gets_to_the_point(
    relay: Relay,
    credentials: Credentials,
    endpoint: TlsEndpoint,
    monkeypatch: pytest.MonkeyPatch,
    says: bytes,
) -> None:
    """Silent, or byte by byte: other channels go on, and it ends after one time limit."""
    with probing(relay, credentials, endpoint.address) as client, TlsDevice(relay) as device:
        device.exchange()
        assert next_result(client) == ""
        monkeypatch.setattr(probe_module, "CONNECT_S", 1.0)
        endpoint.says = says
        probe = client.probe
        assert probe is not None
        wait_until(lambda: probe._is_running)
        while not probe.failure:
            device.exchange()
        assert probe.failure == (
            f"self-probe: endpoint {endpoint.address} shows no certificate: no answer within 1 s"
        )
        endpoint.says = None
        endpoint.renew()
        wait_until(lambda: not probe.failure)
        device.exchange()


# --- how it gets there --------------------------------------------------------------------------


def test_through_a_proxy(relay: Relay, credentials: Credentials, endpoint: TlsEndpoint) -> None:
    with ConnectProxy() as proxy:
        url = f"http://user:pass@{proxy.address}"
        with probing(relay, credentials, endpoint.address, proxy=url) as client:
            assert next_result(client) == ""
        assert proxy.targets[:2] == [relay.address, relay.address]
        assert all(login == "user:pass" for login in proxy.logins)
    with ConnectProxy() as proxy:
        proxy.targets.clear()
        with probing(relay, credentials, endpoint.address, proxy=f"http://{proxy.address}") as c:
            proxy.is_refusing = True
            result = next_result(c, 2)
            assert f"can't reach {relay.address}: the proxy http://{proxy.address} " in result


# --- what it does then ---------------------------------------------------------------------------


def test_failures_open_another_tunnel_and_rarer_each_time(
    relay: Relay,
    elsewhere: Relay,
    credentials: Credentials,
    endpoint: TlsEndpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(probe_module, "RENEW_AFTER", 2)
    with probing(relay, credentials, endpoint.address, elsewhere.address) as client:
        probe, first = client.probe, client.tunnel
        assert probe is not None

        def counts() -> tuple[int, int]:
            return probe._failures, client.attempts

        with TlsDevice(relay) as device:
            device.exchange()
            wait_until(lambda: client.tunnel is not first)
            device.exchange()
        assert caplog.text.count("self-probe: failed 2 times; opening another tunnel") == 1
        wait_until(lambda: probe._failures >= 6)
        failures, attempts = on_loop(client, counts)
        due = [number for number in (2, 4, 8, 16, 32) if number <= failures]
        assert 2 <= attempts <= 1 + len(due)
        # It helps: a success, and all is forgotten.
        client.reconfigure(
            Settings(credentials.ticket, endpoint.address, probe_s=1.0, probe_address=relay.address)
        )
        wait_until(lambda: not probe.failure)
        assert probe._failures == 0
        assert client.proven == client.attempts


def test_a_ticket_for_one_connection_opens_no_other(
    relay: Relay,
    elsewhere: Relay,
    tmp_path: Path,
    endpoint: TlsEndpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe_module, "RENEW_AFTER", 1)
    credentials = Credentials(tmp_path, cipher="aes-gcm")
    relay.reconfigure([credentials.fernet_key], channel_idle_s=60)
    with probing(relay, credentials, endpoint.address, elsewhere.address) as client:
        assert "unrecognized name" in next_result(client, 2)
        assert client.attempts == 1
        assert client.state is ClientState.UP


def test_what_nobody_knows_is_not_ready(
    relay: Relay, credentials: Credentials, endpoint: TlsEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first result, and when none comes; the service manager only wants a tunnel."""
    endpoint.says = b""
    with probing(relay, credentials, endpoint.address) as client:
        probe = client.probe
        assert probe is not None
        wait_until(lambda: probe._is_running)
        assert ready(client) == "self-probe: not done yet"
        assert client.is_up()
        endpoint.says = None
        endpoint.hang_up()
        wait_until(lambda: probe.checked_at and not probe.failure)
        wait_until(lambda: ready(client) == "")
        endpoint.says = b""
        monkeypatch.setattr(probe_module, "OVERDUE_S", 0.0)
        wait_until(lambda: ready(client) == "self-probe: under way for 0 s")
        endpoint.hang_up()


def workers() -> int:
    return sum(thread.name == "snitun-worker" for thread in threading.enumerate())


def test_settings_that_come_again_and_again_take_no_more_threads(
    relay: Relay, credentials: Credentials, endpoint: TlsEndpoint
) -> None:
    """One probe is under way, whatever happens, and what was found stays until the next one."""
    with refusing_port() as port:
        with probing(relay, credentials, f"127.0.0.1:{port}") as client:
            failure = next_result(client)
            assert "Connection refused" in failure
            endpoint.says = b""
            probe = client.probe
            assert probe is not None
            for _ in range(8):
                settings = Settings(
                    credentials.ticket,
                    endpoint.address,
                    probe_s=1.0,
                    probe_address=relay.address,
                )
                client.reconfigure(settings)
                on_loop(client, lambda: None)
                wait_until(lambda: probe._is_running and probe._timer is None)
                assert workers() == 1
                assert ready(client) == failure
            assert client.probe is probe
            # What hangs belongs to former settings: it doesn't count.
            checked_at = probe.checked_at
            endpoint.says = None
            endpoint.hang_up()
            wait_until(lambda: probe.checked_at != checked_at)
            assert probe.failure == ""
            assert ready(client) == ""


@pytest.mark.parametrize("how", ["stop", "no probe any more", "another endpoint"])
def test_ended_while_one_is_under_way(
    relay: Relay, credentials: Credentials, endpoint: TlsEndpoint, how: str
) -> None:
    endpoint.says = b""
    with probing(relay, credentials, endpoint.address) as client, TlsEndpoint() as other:
        probe = client.probe
        assert probe is not None
        wait_until(lambda: probe._is_running and endpoint._open)
        if how == "stop":
            client.stop()
        else:
            probe_s = 1.0 if how == "another endpoint" else 0.0
            client.reconfigure(
                Settings(
                    credentials.ticket,
                    other.address,
                    probe_s=probe_s,
                    probe_address=relay.address,
                )
            )
            wait_until(lambda: str(client.endpoints) == other.address)
        endpoint.hang_up()
        wait_until(lambda: not workers() or client.probe)
        if how == "another endpoint":
            wait_until(lambda: probe.checked_at)
            assert probe.failure == ""
        else:
            assert probe.checked_at is None
            assert probe.failure == ""
        if how == "no probe any more":
            assert client.probe is None
            assert on_loop(client, client.report)["probe"] is None
            assert ready(client) == ""


def test_a_tunnel_that_is_lost_meanwhile(
    relay: Relay, credentials: Credentials, endpoint: TlsEndpoint
) -> None:
    """The next tunnel is probed anew, at once."""
    endpoint.says = b""
    with probing(
        relay, credentials, endpoint.address, reconnect_spread_s=0.0, probe_s=86400.0
    ) as client:
        probe = client.probe
        assert probe is not None
        wait_until(lambda: probe._is_running and endpoint._open)
        [tunnel] = relay.tunnels
        relay.loop.call_soon_threadsafe(tunnel.end, LostError("cut by the test"))
        wait_until(lambda: client.proven == 2)
        wait_until(lambda: probe._timer is None)
        endpoint.says = None
        endpoint.hang_up()
        wait_until(lambda: probe.checked_at)
        assert probe.failure == ""


@pytest.mark.parametrize("probe_s", [0.0, 1.0])
def test_ssl_is_loaded_only_where_it_is_wanted(credentials: Credentials, probe_s: float) -> None:
    with refusing_port() as port:
        credentials.at(f"127.0.0.1:{port}")
        code = f"""
import sys
from snitun_sync.client import Client
from snitun_sync.client.status import report
text = open({str(credentials.ticket_file)!r}).read()
with Client(text, probe_s={probe_s}, admin="127.0.0.1:0") as client:
    client.wait_until_up(0.5)
    client.report()
print(sorted({{"ssl", "_ssl", "asyncio"}} & set(sys.modules)))
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            cwd=PROJECT,
        )
    assert done.stdout.strip() == ("['_ssl', 'ssl']" if probe_s else "[]")
