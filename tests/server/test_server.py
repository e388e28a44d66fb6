"""The relay: who arrives, where names lead, takeover, expiry."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from snitun_sync.client import Client
from snitun_sync.client import client as client_module
from snitun_sync.errors import ConfigurationError, ListenError, UsageError
from snitun_sync.net import listening
from snitun_sync.net import tunnel as tunnel_module
from snitun_sync.net.tuning import OUTPUT_LIMIT_BYTES
from snitun_sync.protocol import frame
from snitun_sync.protocol.aes import load
from snitun_sync.protocol.handshake import ClientHandshake
from snitun_sync.protocol.hello import ALERT_INTERNAL_ERROR, ALERT_UNRECOGNIZED_NAME
from snitun_sync.protocol.names import IPV4_MAPPED
from snitun_sync.protocol.token import new_fernet_key
from snitun_sync.server import Server, arrival
from snitun_sync.server import registration as registration_module
from snitun_sync.server import server as server_module
from tests.services import Raw, Services, is_idle, let_expire, on_loop, raw_client
from tests.support import (
    HOSTNAME,
    WAIT_S,
    Credentials,
    Device,
    Endpoint,
    client_hello,
    reset,
    wait_until,
)

if TYPE_CHECKING:
    from snitun_sync.net.loop import Timer


@pytest.fixture
def server(credentials: Credentials) -> Iterator[Server]:
    with Server([credentials.fernet_key], ["127.0.0.1:0"]) as server:
        yield server


def connect(server: Server, data: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.ports[0]), timeout=WAIT_S)
    if data:
        sock.sendall(data)
    return sock


def all_of(sock: socket.socket) -> bytes:
    """Return what comes until the end."""
    with sock, sock.makefile("rb") as file:
        return file.read()


def names_of(server: Server) -> set[str]:
    return set(server.routes)


# --- devices ---------------------------------------------------------------------------


def test_an_unknown_name_gets_the_alert_for_it(server: Server) -> None:
    for hello in (client_hello("unknown.example.test"), client_hello(None)):
        assert all_of(connect(server, hello)) == ALERT_UNRECOGNIZED_NAME


def test_a_known_name_whose_client_is_away_gets_another(
    server: Server, credentials: Credentials
) -> None:
    with raw_client(credentials, server.ports[0]):
        wait_until(lambda: names_of(server) == {HOSTNAME})
    wait_until(lambda: not names_of(server))
    assert all_of(connect(server, client_hello())) == ALERT_INTERNAL_ERROR


def test_what_openssl_says_of_the_alerts(server: Server, credentials: Credentials) -> None:
    context = ssl.create_default_context()
    with connect(server) as sock, pytest.raises(ssl.SSLError, match=r"(?i)unrecognized.name"):
        context.wrap_socket(sock, server_hostname="unknown.example.test")
    raw_client(credentials, server.ports[0]).sock.close()
    wait_until(lambda: not names_of(server) and server.known)
    with connect(server) as sock, pytest.raises(ssl.SSLError, match=r"(?i)internal.error"):
        context.wrap_socket(sock, server_hostname=HOSTNAME)


def test_an_alert_survives_what_the_device_still_sends(server: Server) -> None:
    with connect(server, client_hello("unknown.example.test") + bytes(200_000)) as sock:
        sock.sendall(bytes(100_000))
        assert all_of(sock) == ALERT_UNRECOGNIZED_NAME
    wait_until(lambda: not server.arrivals)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\0", b"\x17\x03\x03", b"Gg"])
def test_what_is_neither_tls_nor_a_token_is_closed(server: Server, data: bytes) -> None:
    assert all_of(connect(server, data)) == b""


def test_a_malformed_client_hello_is_closed(server: Server) -> None:
    hello = bytearray(client_hello())
    hello[5] = 2
    assert all_of(connect(server, bytes(hello))) == b""


def test_a_client_hello_in_tiny_records_and_pieces(
    server: Server, credentials: Credentials
) -> None:
    hello = client_hello()
    records = b"".join(
        b"\x16\x03\x01" + struct.pack(">H", len(part)) + part
        for part in (hello[5:30], hello[30:31], hello[31:])
    )
    with raw_client(credentials, server.ports[0]) as raw, connect(server) as device:
        for at in range(0, len(records), 7):
            device.sendall(records[at : at + 7])
            time.sleep(0.0002)
        assert raw.receive_flow(frame.DATA)[2] == records
        device.sendall(b"more")
        assert raw.receive_flow(frame.DATA)[2] == b"more"


def test_names_are_matched_without_case_and_trailing_dot(tmp_path: Path) -> None:
    with Services(tmp_path, hostname="Device.Example.TEST") as services:
        # (an SNI with a trailing dot: not every TLS library sends one, ours takes it)
        hello = client_hello("DEVICE.example.test").replace(b"device", b"DEVICE")
        with services.device() as device:
            device.sock.sendall(hello + b"ECHO\n")
            device.exchange()


def test_aliases(tmp_path: Path) -> None:
    with Services(tmp_path, alias=("www.example.test",)) as services:
        for name in (HOSTNAME, "www.example.test"):
            with services.device("ECHO", hostname=name) as device:
                device.exchange()


def test_time_limits(
    server: Server, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "HANDSHAKE_S", 0.1)
    monkeypatch.setattr(tunnel_module, "HANDSHAKE_S", 0.1)
    for data in (b"", client_hello()[:50], credentials.token[:50].encode()):
        assert all_of(connect(server, data)) == b""
    monkeypatch.setattr(arrival, "HANDSHAKE_S", WAIT_S)
    with connect(server, credentials.token.encode()) as sock:  # no answer to the challenge
        assert len(all_of(sock)) == 32
    wait_until(lambda: is_idle(server))


def test_each_channel_carries_the_device_s_address(
    server: Server, credentials: Credentials
) -> None:
    with raw_client(credentials, server.ports[0]) as raw:
        wait_until(lambda: names_of(server))
        with connect(server, client_hello() + b"hello") as device:
            _, flow, _, data = raw.receive()
            assert flow == frame.NEW
            assert frame.unpack_address(data) == bytes([127, 0, 0, 1])
            assert raw.receive_flow(frame.DATA)[2] == client_hello() + b"hello"
            device.sendall(b"more")
            assert raw.receive_flow(frame.DATA)[2] == b"more"


def test_ipv6_and_mapped_addresses(credentials: Credentials) -> None:
    with Server([credentials.fernet_key], ["*:0"]) as server:
        with raw_client(credentials, server.ports[0]) as raw:
            wait_until(lambda: names_of(server))
            for host, packed in (("::1", bytes(15) + b"\1"), ("127.0.0.1", b"\x7f\0\0\1")):
                with Device(server.ports[0], "ECHO", host=host):
                    assert frame.unpack_address(raw.receive_flow(frame.NEW)[2]) == packed


# --- clients ---------------------------------------------------------------------------


def test_a_token_in_pieces_and_its_answer_with_frames_behind_it(
    server: Server, credentials: Credentials
) -> None:
    sock = connect(server)
    for at in range(0, len(credentials.token), 50):
        sock.sendall(credentials.token[at : at + 50].encode())
        time.sleep(0.002)
    with Raw(sock, credentials, is_relay=False) as raw:
        raw.handshake()
        raw.send(frame.PING, b"p" * 16, b"ping")
        assert raw.receive_flow(frame.PING)[0] == b"p" * 16


def test_refused_tokens_are_just_closed_and_logged(
    tmp_path: Path, server: Server, credentials: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    key = credentials.fernet_key
    with caplog.at_level(logging.WARNING):
        expired = Credentials(tmp_path, fernet_key=key, valid_s=-3600).token
        other_key = [Credentials(tmp_path, hostname="a" * n + ".test").token for n in range(1, 60)]
        padded = next(token for token in other_key if token.endswith("="))
        unpadded = next(token for token in other_key if not token.endswith("="))
        for token in (expired, padded, unpadded, credentials.token + "A" * 64, "gA" + "A" * 9000):
            with connect(server, token.encode()) as sock:
                try:
                    assert all_of(sock) == b""
                except ConnectionResetError:
                    pass  # closed with input unread: there was nothing to say
    text = caplog.text
    assert re.search(f"the token for {HOSTNAME} expired 36[0-9]{{2}} s ago", text)
    assert "signature matches none of the Fernet keys" in text
    assert "matches none of the Fernet keys" in text
    assert "64 bytes came behind the token" in text
    assert "longer than 8192 characters" in text
    assert credentials.token[:30] not in text
    assert not names_of(server)


def test_the_time_for_a_token_is_never_extended(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pieces that might each be the last one of a token come for ever."""
    monkeypatch.setattr(arrival, "HANDSHAKE_S", 1.0)
    with connect(server, b"gAAA" + b"A" * 72) as sock, pytest.raises(OSError):
        for _ in range(100):  # as many as there is room for
            sock.sendall(b"A" * 64)
            time.sleep(0.3)
    wait_until(lambda: not server.arrivals)
    assert "refused: the token matches none of the Fernet keys" in caplog.text


def test_a_token_may_rest_where_it_could_end(
    server: Server, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "HANDSHAKE_S", 3600.0)
    token = credentials.token.encode()
    with connect(server, token[:76]) as sock:
        [coming] = wait_until(lambda: tuple(server.arrivals))

        def overdue_at() -> float:
            return due_at(server, coming._timer)

        wait_until(lambda: on_loop(server, overdue_at) < coming._deadline - 1, "the short limit")
        sock.sendall(token[76:100])
        wait_until(lambda: on_loop(server, overdue_at) > coming._deadline - 1, "more has come")
        sock.sendall(token[100:])
        assert len(sock.recv(100)) == 32


def due_at(server: Server, timer: Timer | None) -> float:
    """Return when a timer's time comes, by the loop's clock."""
    return next(when for when, _, found in server.loop._timers if found is timer)


def test_an_aes_gcm_key_serves_one_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The token crosses the wire in clear: whoever saw it must not get a second challenge."""
    credentials = Credentials(tmp_path, cipher="aes-gcm")
    with Server([credentials.fernet_key], ["127.0.0.1:0"]) as server:
        with raw_client(credentials, server.ports[0]) as raw:
            assert all_of(connect(server, credentials.token.encode())) == b""
            raw.send(frame.PING, b"p" * 16, b"ping")
            assert raw.receive_flow(frame.PING)[0] == b"p" * 16
    assert "its aes-gcm key has served a connection" in caplog.text


def test_a_wrong_answer_is_closed(
    server: Server, credentials: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(server, credentials.token.encode()) as sock:
        sock.recv(100)
        sock.sendall(os.urandom(32))
        assert sock.recv(100) == b""
    wait_until(lambda: not server.tunnels)
    assert "the answer to the challenge is wrong" in caplog.text


def test_any_of_the_keys_will_do(tmp_path: Path) -> None:
    old, new = (
        Credentials(tmp_path, hostname="old.test"),
        Credentials(tmp_path, hostname="new.test"),
    )
    with Server([new.fernet_key, old.fernet_key], ["127.0.0.1:0"]) as server:
        with raw_client(old, server.ports[0]), raw_client(new, server.ports[0]):
            wait_until(lambda: names_of(server) == {"old.test", "new.test"})


def test_ciphers_that_the_relay_lacks_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = Credentials(tmp_path, cipher="aes-gcm-siv")
    with Server([credentials.fernet_key], ["127.0.0.1:0"], crypto="pycryptodome") as server:
        assert all_of(connect(server, credentials.token.encode())) == b""
    assert "install cryptography 42" in caplog.text


def test_clients_with_a_port_of_their_own(credentials: Credentials) -> None:
    with Server([credentials.fernet_key], ["127.0.0.1:0"], ["127.0.0.1:0"]) as server:
        for_devices, for_clients = server.ports
        with raw_client(credentials, for_clients):
            wait_until(lambda: names_of(server))
            for port, data in (
                (for_devices, credentials.token.encode()),
                (for_clients, client_hello()),
            ):
                with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as sock:
                    sock.sendall(data)
                    try:
                        assert sock.recv(100) == b""
                    except ConnectionResetError:
                        pass
        assert server.takeovers == 0


def test_a_violation_ends_the_tunnel(server: Server, credentials: Credentials) -> None:
    with raw_client(credentials, server.ports[0]) as raw:
        wait_until(lambda: names_of(server))
        raw.send(frame.NEW, b"c" * 16, data=bytes(512))
        raw.wait_for_end()
    wait_until(lambda: is_idle(server))


def test_a_silent_client_is_cut(
    server: Server, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "SILENCE_S", 1.0)
    with raw_client(credentials, server.ports[0]) as raw:
        raw.wait_for_end()
    wait_until(lambda: not names_of(server))


def test_pings_without_reading_the_pongs_end_in_back_pressure(
    server: Server, credentials: Credentials
) -> None:
    """Whoever floods the relay and doesn't read can't make it hold more than a bounded queue."""
    with raw_client(credentials, server.ports[0]) as raw:
        wait_until(lambda: names_of(server))
        raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        header = frame.HEADER.pack(b"p" * 16, frame.PING, 0, b"ping".ljust(11, b"\0"))
        raw.sock.settimeout(0.5)
        with pytest.raises(socket.timeout):
            for _ in range(3000):
                raw.sock.sendall(b"".join(raw.cipher.seal([header] * 1000)))
        [tunnel] = server.tunnels
        assert len(tunnel._queue) < 2 * OUTPUT_LIMIT_BYTES


@pytest.mark.parametrize("side", ["client_options", "server_options"])
def test_idle_channels_are_cut(tmp_path: Path, side: str, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {side: {"channel_idle_s": 1.0}}
    with Services(tmp_path, **options) as services:
        with services.device("ECHO") as device, contextlib.suppress(ConnectionResetError):
            device.exchange()
            assert device.sock.recv(1) == b""
    assert "idle for 1 s" in caplog.text


# --- takeover --------------------------------------------------------------------------


def goaway(raw: Raw) -> tuple[bytes, bytes]:
    """Return the address and the extra of the GOAWAY that must come."""
    channel_id, extra, _ = raw.receive_flow(frame.GOAWAY)
    return channel_id, extra


def test_a_newer_tunnel_takes_the_name_and_says_so(
    server: Server, credentials: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), raw_client(credentials, server.ports[0]) as first:
        wait_until(lambda: names_of(server))
        with raw_client(credentials, server.ports[0]) as second:
            address, extra = goaway(first)
            port = second.sock.getsockname()[1]
            assert address == IPV4_MAPPED + bytes([127, 0, 0, 1])
            assert extra[:6] == frame.TAKEN_OVER + port.to_bytes(2, "big")
            first.wait_for_end()
            with connect(server, client_hello() + b"x"):
                assert second.receive_flow(frame.DATA)[2] == client_hello() + b"x"
            assert server.takeovers == 1
            assert f"another connection, from 127.0.0.1:{port}, took over" in caplog.text


def test_a_token_alone_takes_nothing(server: Server, credentials: Credentials) -> None:
    with raw_client(credentials, server.ports[0]) as first:
        wait_until(lambda: names_of(server))
        with connect(server, credentials.token.encode()) as sock:
            assert len(sock.recv(100)) == 32  # challenged, and not answered
            first.send(frame.PING, b"p" * 16, b"ping")
            assert first.receive_flow(frame.PING)[0] == b"p" * 16
        assert server.takeovers == 0
        with connect(server, client_hello()):
            first.receive_flow(frame.NEW)


def test_channels_of_the_old_tunnel_live_on_for_a_grace_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration_module, "TAKEOVER_GRACE_S", 3600.0)
    with Services(tmp_path) as services, services.device("ECHO") as old:
        old.exchange()
        (former,) = services.server.registrations
        with raw_client(services.credentials, services.port):
            wait_until(lambda: services.server.takeovers == 1)
            old.exchange()
            let_expire(services.server, former._grace)
            assert old.sock.recv(1) == b""


def test_a_renewed_token_lets_channels_live_on_until_the_former_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration_module, "TAKEOVER_GRACE_S", 0.0)
    monkeypatch.setattr(registration_module, "EXPIRY_CHECK_S", 0.1)
    renewed, other = tmp_path / "renewed", tmp_path / "other"
    for folder in (renewed, other):
        folder.mkdir()
    with Services(tmp_path, device_id="a" * 16) as services:
        key = services.credentials.fernet_key
        (former,) = services.server.registrations
        with services.device("ECHO") as old, services.device("ECHO") as short:
            for device in (old, short):
                device.exchange()
            following = Credentials(renewed, fernet_key=key, device_id="a" * 16)
            with raw_client(following, services.port):
                wait_until(lambda: services.server.takeovers == 1)
                for _ in range(3):
                    old.exchange()
                short.sock.close()
                old.exchange()
                former.payload.valid = time.time()
                assert old.sock.recv(1) == b""  # the former token has expired
        with raw_client(following, services.port), services.device("ECHO"):
            wait_until(lambda: services.server.routes)
            stranger = Credentials(other, fernet_key=key, device_id="b" * 16)
            with raw_client(stranger, services.port):
                # One that is another device gets no such time.
                wait_until(lambda: len(services.server.tunnels) == 1)


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_renewed_token_keeps_no_tunnel_that_has_died(tmp_path: Path, is_alive: bool) -> None:
    """An appliance without power comes back: what was open before ends, and devices see that."""
    folder = tmp_path / "renewed"
    folder.mkdir()
    known = Credentials(tmp_path, device_id="a" * 16)
    renewed = Credentials(folder, fernet_key=known.fernet_key, device_id="a" * 16)
    with Server([known.fernet_key], ["127.0.0.1:0"]) as server, contextlib.ExitStack() as stack:
        former = stack.enter_context(raw_client(known, server.ports[0]))
        wait_until(lambda: names_of(server))
        device = stack.enter_context(connect(server, client_hello()))
        former.receive_flow(frame.DATA)
        [registration] = server.registrations
        stack.enter_context(raw_client(renewed, server.ports[0]))
        wait_until(lambda: registration._grace is not None)
        assert registration._grace is not None
        ping_id, extra, _ = former.receive_flow(frame.PING)
        assert extra.startswith(b"ping")
        if is_alive:
            former.send(frame.PING, ping_id, b"pong")
            wait_until(lambda: not registration.tunnel.mux.unconfirmed_bytes)
        # The time for an answer is over.
        assert registration._grace.callback is not None
        server.loop.call_soon_threadsafe(registration._grace.callback)
        device.sendall(b"more")
        if is_alive:
            assert former.receive_flow(frame.DATA)[2] == b"more"
        else:
            assert device.recv(1) == b""
            wait_until(lambda: len(server.registrations) == 1)


def test_the_old_tunnel_ends_with_its_last_channel(tmp_path: Path) -> None:
    with Services(tmp_path) as services, services.device("ECHO") as old:
        old.exchange()
        with raw_client(services.credentials, services.port):
            wait_until(lambda: services.server.takeovers == 1)
            assert len(services.server.tunnels) == 2
            old.sock.close()
            wait_until(lambda: len(services.server.tunnels) == 1)


def test_takeover_goes_name_by_name(tmp_path: Path) -> None:
    key = new_fernet_key(os.urandom)
    both = Credentials(tmp_path, fernet_key=key, hostname="a.test", alias=("b.test",))
    only_b = Credentials(tmp_path, fernet_key=key, hostname="b.test")
    with Server([key], ["127.0.0.1:0"]) as server:
        port = server.ports[0]
        with raw_client(both, port) as first:
            wait_until(lambda: len(server.routes) == 2)
            with raw_client(only_b, port) as second:
                wait_until(lambda: server.takeovers == 1)
                for name, tunnel in (("a.test", first), ("b.test", second)):
                    with connect(server, client_hello(name)):
                        assert tunnel.receive_flow(frame.DATA)[2] == client_hello(name)
            # The second one ends, and takes with it only what led to it.
            wait_until(lambda: set(server.routes) == {"a.test"})
            with raw_client(both, port):
                goaway(first)
                first.wait_for_end()
                wait_until(lambda: len(server.tunnels) == 1)
                assert set(server.routes) == {"a.test", "b.test"}


def test_two_clients_with_one_ticket_back_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They take the name from each other in turns, and ever more rarely."""
    monkeypatch.setattr(client_module, "fraction", lambda: 1.0)  # nothing is drawn
    options = {"reconnect_spread_s": 1.0}
    said = r"another connection, from 127\.0\.0\.1:\d+, took over; next attempt in (\S+) s"

    def delays() -> list[str]:
        return re.findall(said, "\n".join(record.message for record in tuple(caplog.records)))

    with caplog.at_level(logging.INFO), Services(tmp_path, client_options=options) as services:
        with Client(services.credentials.ticket, services.endpoint.address, **options) as other:
            wait_until(lambda: len(delays()) >= 5)
            assert services.client.attempts + other.attempts >= 6
            assert services.server.takeovers >= 5
    assert delays()[:5] == ["1.0", "1.0", "2.0", "2.0", "4.0"]


# --- what strangers may cost ---------------------------------------------------------------


def test_unfinished_hellos_are_bounded(
    server: Server, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrival, "EARLY_BYTES", 200_000)
    record = b"\x16\x03\x01\x40\x00\x01\x00\xf0\x00" + bytes(15_000)
    with raw_client(credentials, server.ports[0]) as raw, contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connect(server, record))
        wait_until(lambda: server.bridges.early_bytes > 150_000)
        # An ordinary one gets through, whatever the others do.
        stack.enter_context(connect(server, client_hello()))
        assert raw.receive_flow(frame.DATA)[2] == client_hello()
        assert server.bridges.early_bytes < 220_000
    wait_until(lambda: not server.arrivals)
    assert server.bridges.early_bytes == 0


def test_first_bytes_wait_for_their_turn(
    server: Server, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that doesn't read never makes the relay queue what devices begin with."""
    hello = client_hello() + bytes(12_000)
    monkeypatch.setattr(tunnel_module, "LEAST_IN_FLIGHT_BYTES", 300_000)
    monkeypatch.setattr(tunnel_module, "path_rate", lambda sock: (0, 0))
    with raw_client(credentials, server.ports[0]) as raw, contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connect(server, hello))
        [tunnel] = server.tunnels
        wait_until(lambda: len(tunnel.mux.channels) == 100)
        assert tunnel.mux.unconfirmed_bytes < 350_000
        assert server.bridges.early_bytes > 800_000
        # All of it comes, once it is read.
        received: dict[bytes, bytes] = {}
        while len(received) < 100 or any(data != hello for data in received.values()):
            channel_id, _, data = raw.receive_flow(frame.DATA)
            received[channel_id] = received.get(channel_id, b"") + data
        assert server.bridges.early_bytes == 0
    wait_until(lambda: is_idle(server))


# --- expiry ----------------------------------------------------------------------------


class Clock:
    """In place of the module `time`: a clock that can be put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def time(self) -> float:
        return time.time() + self.ahead_s


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The relay's clock, by which tokens expire."""
    clock = Clock()
    for module in (registration_module, server_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_tunnel_ends_when_its_token_expires(tmp_path: Path, wall_clock: Clock) -> None:
    valid_s = registration_module.EXPIRY_CHECK_S / 2
    credentials = Credentials(tmp_path, valid_s=valid_s)
    with Server([credentials.fernet_key], ["127.0.0.1:0"]) as server:
        with raw_client(credentials, server.ports[0]) as raw:
            wait_until(lambda: names_of(server))
            (client,) = server.registrations
            # It is looked at then, and whenever the clock may have been put forward.
            assert due_at(server, client._expiry) <= server.loop.now + valid_s
            let_expire(server, client._expiry)
            assert names_of(server)
            wall_clock.ahead_s = valid_s
            let_expire(server, client._expiry)
            assert goaway(raw)[1].startswith(frame.EXPIRED)
            raw.wait_for_end()
        wait_until(lambda: not names_of(server))
        # Its name is forgotten as well.
        assert all_of(connect(server, client_hello())) == ALERT_UNRECOGNIZED_NAME


def test_a_token_that_expires_during_the_handshake_takes_nothing(
    tmp_path: Path, wall_clock: Clock
) -> None:
    good = Credentials(tmp_path)
    with Server([good.fernet_key], ["127.0.0.1:0"]) as server:
        with raw_client(good, server.ports[0]):
            wait_until(lambda: names_of(server))
            route = server.routes[HOSTNAME]
            short = Credentials(tmp_path, fernet_key=good.fernet_key, valid_s=300)
            with Raw(connect(server), short, is_relay=False) as late:
                aes = load()
                shake = ClientHandshake(late.cipher, aes, short.token)
                late.sock.sendall(shake.first())
                answer = shake.receive(late.sock.recv(100))
                wall_clock.ahead_s = 300
                late.sock.sendall(answer)
                late.wait_for_end()
            assert server.routes == {HOSTNAME: route}
            assert server.takeovers == 0


def test_names_of_expired_tokens_don_t_pile_up(tmp_path: Path, credentials: Credentials) -> None:
    with Server([credentials.fernet_key], ["127.0.0.1:0"]) as server:
        for number in range(5000):
            server.known.add(f"{number}.test", time.time() - 1)
        assert len(server.known._until) <= server_module.REMEMBERED_BEFORE_PRUNING


# --- life ------------------------------------------------------------------------------


def test_stop_says_why(server: Server, credentials: Credentials) -> None:
    with raw_client(credentials, server.ports[0]) as raw:
        wait_until(lambda: names_of(server))
        server.loop.call_soon_threadsafe(server._stop)
        assert goaway(raw)[1].startswith(frame.STOPPING)
        raw.wait_for_end()
    assert server.wait(10)


def test_resets_at_every_step_of_an_arrival_leave_nothing(
    server: Server, credentials: Credentials
) -> None:
    token = credentials.token.encode()
    for data in (b"", client_hello()[:9], client_hello("x.test"), token[:9], token, b"\0"):
        reset(connect(server, data))
    raw = raw_client(credentials, server.ports[0])
    wait_until(lambda: names_of(server))
    reset(raw.sock)
    wait_until(lambda: is_idle(server) and not server.tunnels)


def test_out_of_descriptors_the_relay_waits_and_goes_on(
    server: Server,
    credentials: Credentials,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(listening, "PAUSE_S", 0.05)
    [listener] = server._listeners
    real = listener.sock
    assert real is not None
    accept, number, closed = real.accept, real.fileno(), real.close
    failures = [24, 23, 105]

    class Exhausted:
        """A socket whose accept fails as when there are no descriptors left."""

        def accept(self) -> tuple[socket.socket, object]:
            if failures:
                raise OSError(failures.pop(), "too many open files")
            return accept()

        def fileno(self) -> int:
            return number

        def close(self) -> None:
            closed()

    listener.sock = Exhausted()  # type: ignore[assignment]
    with raw_client(credentials, server.ports[0]):
        wait_until(lambda: names_of(server))
    assert not failures
    assert caplog.text.count("can't accept") == 1  # and not once for each of them


def test_a_busy_port(server: Server, credentials: Credentials) -> None:
    port = server.ports[0]
    with pytest.raises(ListenError, match=f"can't listen on 127.0.0.1:{port}: Address already"):
        Server([credentials.fernet_key], [f"127.0.0.1:{port}"]).start()


def test_wrong_arguments(credentials: Credentials) -> None:
    with pytest.raises(ConfigurationError, match="Fernet key 1"):
        Server(["key"], ["127.0.0.1:0"])
    with pytest.raises(ConfigurationError, match="--listen: no port"):
        Server([credentials.fernet_key], ["127.0.0.1"])
    with pytest.raises(ConfigurationError, match="--peer-listen: port"):
        Server([credentials.fernet_key], ["*:0"], ["127.0.0.1:x"])


def test_an_endpoint_on_another_name(tmp_path: Path, endpoint: Endpoint) -> None:
    with Services(tmp_path, endpoint, endpoint_address=f"localhost:{endpoint.port}") as services:
        with services.device("ECHO") as device:
            device.exchange(b"hello")


def test_bounds_of_settings(credentials: Credentials) -> None:
    keys = [credentials.fernet_key]
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"budget_bytes": 0}, "--budget: 0 bytes; expected 262144 to"),
        ({"channel_idle_s": 0}, "--channel-idle: 0 seconds; expected 1 to"),
    )
    for options, said in wrong:
        with pytest.raises(UsageError, match=said):
            Server(keys, ["127.0.0.1:0"], **options)
    with Server(keys, ["127.0.0.1:0"]) as server:
        with pytest.raises(UsageError, match="--channel-idle"):
            server.reconfigure(keys, channel_idle_s=0)
