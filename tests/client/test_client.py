"""The client against a relay made by hand: proof, replay, keepalive, retries, endpoints."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snitun_sync.client import Client
from snitun_sync.client import client as client_module
from snitun_sync.client.retry import Retry
from snitun_sync.errors import (
    ConfigurationError,
    LinkError,
    LostError,
    MisuseError,
    RefusedError,
    SniTunError,
    StrangerError,
    UnreachableError,
)
from snitun_sync.net import endpoint as endpoint_module
from snitun_sync.net import tunnel as tunnel_module
from snitun_sync.net.bridge import BridgeState
from snitun_sync.net.connecting import Connecting
from snitun_sync.net.endpoint import OPENING_LIMIT
from snitun_sync.net.tuning import PROVING_FRAMES
from snitun_sync.net.tunnel import TunnelState
from snitun_sync.protocol import frame
from snitun_sync.protocol.cipher import CIPHERS
from snitun_sync.protocol.names import IPV4_MAPPED
from tests.services import (
    Raw,
    RawRelay,
    connector,
    is_idle,
    let_expire,
    receive_exactly,
    refusing_port,
)
from tests.support import WAIT_S, Credentials, Endpoint, HungEndpoint, client_hello, wait_until

ECHO = client_hello() + b"ECHO\nhello"


@pytest.fixture
def relay(credentials: Credentials) -> Iterator[RawRelay]:
    with RawRelay(credentials) as relay:
        yield relay


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Retry, "delay_s", lambda *_: 0.02)


@contextlib.contextmanager
def running(relay: RawRelay, endpoint: str, **options: Any) -> Iterator[Client]:
    with Client(relay.credentials.ticket, endpoint, **options) as client:
        yield client


def ended(client: Client) -> SniTunError:
    """Wait until the client has ended by itself; return why."""
    with pytest.raises(SniTunError) as raised:
        assert client.wait(30), "it didn't end"
    return raised.value


# --- proof ---------------------------------------------------------------------------


def test_up_only_after_the_pong_with_the_ping_s_id(relay: RawRelay, endpoint: Endpoint) -> None:
    with running(relay, endpoint.address) as client, relay.tunnel(prove=False) as raw:
        ping_id, flow, extra, _ = raw.receive()
        assert (flow, extra[:4]) == (frame.PING, b"ping")
        raw.send(frame.PING, bytes(16), b"pong")
        raw.send(frame.PING, b"x" * 16, b"ping")
        wait_until(lambda: client.tunnel is not None and client.tunnel.mux.queued_frames)
        assert not client.wait_until_up(0.05)  # that one was read, and so was the wrong pong
        raw.sock.setblocking(False)
        with pytest.raises(BlockingIOError):  # nothing that a forger could use
            raw.sock.recv(1)
        raw.sock.settimeout(WAIT_S)
        raw.send(frame.PING, ping_id, b"pong")
        assert client.wait_until_up(10)
        assert raw.receive_flow(frame.PING)[0] == b"x" * 16  # what was held back


def test_new_is_held_until_the_relay_is_proven(relay: RawRelay, endpoint: Endpoint) -> None:
    with running(relay, endpoint.address) as client, relay.tunnel(prove=False) as raw:
        ping_id = raw.receive()[0]
        raw.new(b"c" * 16)
        raw.send(frame.DATA, b"c" * 16, data=ECHO)
        raw.send(frame.PING, b"x" * 16, b"ping")
        wait_until(lambda: client.tunnel is not None and client.tunnel.mux.queued_frames)
        assert endpoint.accepted == 0
        raw.send(frame.PING, ping_id, b"pong")
        assert raw.receive_flow(frame.DATA)[2] == b"hello"
        assert endpoint.accepted == 1


def test_held_channels_are_bounded(relay: RawRelay, endpoint: Endpoint) -> None:
    with running(relay, endpoint.address) as client, relay.tunnel(prove=False) as raw:
        ping_id = raw.receive()[0]
        ids = [os.urandom(16) for _ in range(client_module.HELD_CHANNELS + 1)]
        for channel_id in ids:
            raw.new(channel_id)
        wait_until(lambda: client.tunnel is not None and client.tunnel.mux.queued_frames)
        assert endpoint.accepted == 0
        raw.send(frame.PING, ping_id, b"pong")
        assert raw.receive_flow(frame.CLOSE)[0] == ids[-1]


def test_answers_before_the_proof_are_bounded(relay: RawRelay, endpoint: Endpoint) -> None:
    with (
        running(relay, endpoint.address, once=True) as client,
        relay.tunnel(prove=False) as raw,
    ):
        for _ in range(PROVING_FRAMES + 1):
            raw.send(frame.PING, os.urandom(16), b"ping")
        assert "too many frames before the answer" in str(ended(client))


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other))


def test_a_relay_without_a_key_can_t_reflect_the_proof_in_aes_gcm_siv(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    """A recorded challenge, and then the client's own units, which have no direction."""
    credentials = Credentials(tmp_path, cipher="aes-gcm-siv")
    with RawRelay(credentials) as relay:
        with running(relay, endpoint.address), relay.tunnel() as raw:
            challenge = raw.recorded[:60]
        with (
            running(relay, endpoint.address, once=True) as client,
            relay.accept() as sock,
        ):
            sock.sendall(challenge)
            ping = (receive_exactly(sock, 120))[60:]
            sock.sendall(ping)
            assert "our own PING came back" in str(ended(client))
            assert not client.wait_until_up(1)


def test_a_relay_without_a_key_can_t_reflect_the_proof_in_aes_cbc(
    relay: RawRelay, endpoint: Endpoint
) -> None:
    """A NEW forged from the PING's known plaintext sets the chain; then the PING comes back."""
    with running(relay, endpoint.address, once=True) as client, relay.accept() as sock:
        sock.sendall(os.urandom(32))
        both = receive_exactly(sock, 64)
        answer, ping = both[:32], both[32:]
        known = xor(ping[:16], b"\x08" + bytes(4) + frame.EXTRA_PING_GOAWAY)
        forged = xor(known, b"\x01" + (16).to_bytes(4, "big") + bytes(11))
        sock.sendall(forged + ping[16:] + answer[16:] + ping)
        assert "our own PING came back" in str(ended(client))


def test_a_channel_that_ends_before_the_proof_never_reaches_the_endpoint(
    relay: RawRelay, endpoint: Endpoint
) -> None:
    with running(relay, endpoint.address) as client, relay.tunnel(prove=False) as raw:
        ping_id = raw.receive()[0]
        raw.new(b"c" * 16)
        raw.send(frame.CLOSE, b"c" * 16)
        raw.send(frame.PING, ping_id, b"pong")
        client.wait_until_up(10)
        wait_until(lambda: is_idle(client))
        assert endpoint.accepted == 0


def test_nothing_is_left_of_a_channel_whose_relay_never_proves_itself(
    relay: RawRelay, endpoint: Endpoint
) -> None:
    with running(relay, endpoint.address) as client, relay.tunnel(prove=False) as raw:
        raw.new(b"c" * 16)
        raw.send(frame.DATA, b"c" * 16, data=b"what came before the end")
        raw.send(frame.CLOSE, b"c" * 16)
        wait_until(lambda: client.bridges.held_bytes)
        raw.sock.close()
        wait_until(lambda: not client.bridges.all and not client.bridges.held_bytes)


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("cut", ["whole", "from the second frame on"])
def test_a_recorded_relay_stream_opens_nothing_when_replayed(
    tmp_path: Path, endpoint: Endpoint, cipher: str, cut: str, quick_retries: None
) -> None:
    credentials = Credentials(tmp_path, cipher=cipher)
    with RawRelay(credentials) as relay:
        with running(relay, endpoint.address) as client, relay.tunnel() as raw:
            raw.new(b"c" * 16)
            raw.send(frame.DATA, b"c" * 16, data=ECHO)
            assert raw.receive_flow(frame.DATA)[2] == b"hello"
            recorded = raw.recorded
        accepted = endpoint.accepted
        assert accepted == 1
        # The same key again, as with a ticket that is used for years; a false relay plays it back.
        with running(relay, endpoint.address) as client, relay.accept() as false_relay:
            false_relay.sendall(recorded)
            false_relay.settimeout(1)
            with contextlib.suppress(socket.timeout, ConnectionError):
                while false_relay.recv(65536):
                    pass
            assert not client._up.is_set()
        assert endpoint.accepted == accepted


def test_a_tunnel_without_pong_is_given_up(relay: RawRelay, endpoint: Endpoint) -> None:
    with running(relay, endpoint.address, once=True) as client, relay.tunnel(prove=False) as raw:
        raw.new(b"c" * 16)
        tunnel = client.tunnel
        assert tunnel is not None
        wait_until(lambda: tunnel.state is TunnelState.PROVING)
        let_expire(client, tunnel._timer)
        error = ended(client)
    assert isinstance(error, UnreachableError)
    assert "no pong to the first PING within 10 s" in str(error)


# --- the handshake -------------------------------------------------------------------


def test_refused_before_the_challenge(relay: RawRelay, endpoint: Endpoint) -> None:
    with running(relay, endpoint.address, once=True) as client:
        relay.accept().close()
        error = ended(client)
    assert isinstance(error, RefusedError)
    assert "it refuses the token, which has expired, was revoked, or is signed with" in str(error)
    assert relay.credentials.token[:20] not in str(error)


def test_refused_on_the_answer(relay: RawRelay, endpoint: Endpoint) -> None:
    with running(relay, endpoint.address, once=True) as client:
        with relay.accept() as sock:
            sock.sendall(os.urandom(32))
            sock.recv(1000)
        error = ended(client)
    assert isinstance(error, RefusedError)
    assert "aes_key and aes_iv are not the token's" in str(error)


def test_no_challenge(relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that hangs or is far away refuses nobody: attempts don't get rarer."""
    monkeypatch.setattr(tunnel_module, "HANDSHAKE_S", 0.2)
    with running(relay, endpoint.address, once=True) as client, relay.accept():
        error = ended(client)
    assert isinstance(error, UnreachableError)
    assert "no challenge within" in str(error)


def test_a_relay_that_ignores_the_cipher(tmp_path: Path, endpoint: Endpoint) -> None:
    with RawRelay(Credentials(tmp_path, cipher="aes-gcm-siv")) as relay:
        with running(relay, endpoint.address, once=True) as client, relay.accept() as sock:
            tunnel = wait_until(lambda: client.tunnel)
            handshake = tunnel._handshake
            sock.sendall(os.urandom(32))
            wait_until(lambda: handshake.received_size)
            let_expire(client, tunnel._timer)
            error = str(ended(client))
    assert "32 of 60 bytes of the challenge" in error
    assert "aes-cbc" in error


def test_html_instead_of_a_challenge(relay: RawRelay, endpoint: Endpoint) -> None:
    """A captive portal answers in its own way."""
    with running(relay, endpoint.address, once=True) as client, relay.accept() as sock:
        sock.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://portal/\r\n\r\n" + b"<html>" * 1000)
        sock.shutdown(socket.SHUT_WR)
        error = ended(client)
    assert isinstance(error, StrangerError)
    assert "no relay answers at its address, but a web server: a captive portal" in str(error)
    assert endpoint.accepted == 0


# --- life --------------------------------------------------------------------------------


def test_it_comes_back_by_itself(
    relay: RawRelay, endpoint: Endpoint, quick_retries: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), running(relay, endpoint.address) as client:
        for _ in range(3):
            with relay.tunnel():
                assert client.wait_until_up(10)
            wait_until(lambda: not client._up.is_set())
        relay.accept().close()  # refused once
        with relay.tunnel() as raw:
            raw.new(b"c" * 16)
            raw.send(frame.DATA, b"c" * 16, data=ECHO)
            assert raw.receive_flow(frame.DATA)[2] == b"hello"
    reasons = [record.message for record in caplog.records if "next attempt in" in record.message]
    assert sum("the relay closed the connection;" in reason for reason in reasons) >= 3
    assert sum("it refuses the token" in reason for reason in reasons) == 1


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (frame.TAKEN_OVER + b"\x12\x67", "another connection, from 192.0.2.9:4711, took over"),
        (frame.EXPIRED, "the token has expired"),
        (frame.STOPPING, "the relay is stopping"),
        (b"????", "the relay ended the tunnel"),
    ],
)
def test_the_relay_s_last_word_is_the_reason(
    relay: RawRelay, endpoint: Endpoint, extra: bytes, said: str
) -> None:
    with running(relay, endpoint.address, once=True) as client:
        with relay.tunnel() as raw:
            raw.send(frame.GOAWAY, IPV4_MAPPED + bytes([192, 0, 2, 9]), extra)
        error = ended(client)
    assert isinstance(error, LostError)
    assert said in str(error)


def test_silence_is_broken_by_a_ping_and_a_dead_relay_is_left(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "ANSWER_S", 1.0)
    with (
        running(relay, endpoint.address, once=True, keepalive_s=1.0) as client,
        relay.tunnel() as raw,
    ):
        for _ in range(2):
            ping_id, flow, extra, _ = raw.receive()
            assert (flow, extra[:4]) == (frame.PING, b"ping")
            raw.send(frame.PING, ping_id, b"pong")
        raw.receive()  # and now the relay is silent
        error = ended(client)
    assert "answered no PING for" in str(error)


def test_other_bytes_are_no_answer_to_a_ping(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a garbled header, which makes all that follows a payload without end."""
    monkeypatch.setattr(tunnel_module, "ANSWER_S", 1.0)
    monkeypatch.setattr(tunnel_module, "PONG_S", 2.0)
    with (
        running(relay, endpoint.address, once=True, keepalive_s=1.0) as client,
        relay.tunnel() as raw,
    ):
        raw._send(raw.cipher.seal([frame.HEADER.pack(bytes(16), 0xEE, 2**32 - 1, bytes(11))])[0])
        stop = threading.Event()

        def babble() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.1):
                    raw.sock.sendall(bytes(1000))

        thread = threading.Thread(target=babble)
        thread.start()
        assert "answered no PING for" in str(ended(client))
        stop.set()
        thread.join(10)


def test_a_last_word_that_is_none_is_forgotten(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "GOAWAY_S", 0.1)
    with running(relay, endpoint.address, once=True) as client:
        with relay.tunnel() as raw:
            raw.send(frame.GOAWAY, IPV4_MAPPED + bytes([192, 0, 2, 9]), frame.TAKEN_OVER)
            time.sleep(0.3)
        error = ended(client)
    assert "the relay closed the connection" in str(error)


def test_what_was_delivered_before_the_end_arrives_with_once(credentials: Credentials) -> None:
    """The endpoint is slow; the channel is closed, then the tunnel; nothing is lost."""
    size = 8_000_000
    with socket.create_server(("127.0.0.1", 0)) as listener, RawRelay(credentials) as relay:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with running(relay, address, once=True) as client:
            with relay.tunnel() as raw:
                raw.new(b"c" * 16)
                sock, _ = listener.accept()
                for _ in range(size // 100_000):
                    raw.send(frame.DATA, b"c" * 16, data=bytes(100_000))
                raw.send(frame.CLOSE, b"c" * 16)
                [bridge] = client.bridges.all
                wait_until(lambda: bridge.state is BridgeState.ENDING)
                assert bridge.held_bytes
            wait_until(lambda: not client.tunnels)
            with sock, sock.makefile("rb") as file:
                assert len(file.read()) == size
            assert isinstance(ended(client), LostError)


def test_a_violation_ends_the_tunnel(relay: RawRelay, endpoint: Endpoint) -> None:
    with running(relay, endpoint.address, once=True) as client, relay.tunnel() as raw:
        for _ in range(2):
            raw.new(b"c" * 16)
        assert "NEW for channel 63636363, which is open" in str(ended(client))


def test_once_and_unreachable(credentials: Credentials, endpoint: Endpoint) -> None:
    with refusing_port() as port:
        with Client(credentials.at(f"127.0.0.1:{port}"), endpoint.address, once=True) as client:
            error = ended(client)
    assert isinstance(error, UnreachableError)
    assert f"can't reach the relay 127.0.0.1:{port}: Connection refused" in str(error)


def test_server_overrides_the_ticket_s(relay: RawRelay, endpoint: Endpoint) -> None:
    relay.credentials.at("relay.invalid")
    with (
        Client(
            relay.credentials.ticket, endpoint.address, server=f"127.0.0.1:{relay.port}"
        ) as client,
        relay.tunnel(),
    ):
        assert client.wait_until_up(10)


def test_an_expired_ticket_only_warns(
    tmp_path: Path, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with RawRelay(Credentials(tmp_path, valid_s=-100)) as relay, caplog.at_level(logging.WARNING):
        with running(relay, endpoint.address) as client, relay.tunnel():
            assert client.wait_until_up(10)
    assert "the ticket expired at" in caplog.text


def test_a_gcm_ticket_serves_one_connection(tmp_path: Path, endpoint: Endpoint) -> None:
    with RawRelay(Credentials(tmp_path, cipher="aes-gcm")) as relay:
        with running(relay, endpoint.address) as client:
            with relay.tunnel():
                assert client.wait_until_up(10)
            error = ended(client)
    assert isinstance(error, LinkError)
    assert "serves one connection only" in str(error)
    assert "get a new ticket" in str(error)


def test_a_gcm_ticket_whose_token_was_never_sent_is_still_good(
    tmp_path: Path, endpoint: Endpoint, quick_retries: None
) -> None:
    credentials = Credentials(tmp_path, cipher="aes-gcm")
    with RawRelay(credentials) as relay:
        relay.listener.close()
        with Client(credentials.ticket, endpoint.address) as client:
            wait_until(lambda: client.attempts > 2)
            relay.listener = socket.create_server(("127.0.0.1", relay.port))
            relay.listener.settimeout(30)
            with relay.tunnel():
                assert client.wait_until_up(10)


def test_a_full_queue_of_connects_never_keeps_the_relay_waiting(
    relay: RawRelay, quick_retries: None
) -> None:
    """The endpoint hangs; devices come and go, and more wait; then the tunnel is lost."""
    with HungEndpoint() as hung, running(relay, hung.address) as client:
        with relay.tunnel() as raw:
            ids = [number.to_bytes(16, "big") for number in range(2 * OPENING_LIMIT)]
            for channel_id in ids:
                raw.new(channel_id)
                raw.send(frame.CLOSE, channel_id)
            raw.new(b"c" * 16)
            wait_until(lambda: [b.channel.id for b in tuple(client.bridges.all)] == [b"c" * 16])
            wait_until(lambda: len(connector(client)._opening) == 1)  # nobody waits for the others
            for number in range(OPENING_LIMIT):
                raw.new((number + 1 << 64).to_bytes(16, "big"))
            wait_until(lambda: len(client.bridges.all) > OPENING_LIMIT // 2)
        with relay.tunnel():
            assert client.wait_until_up(10)
            assert not connector(client)._opening


# --- channels and endpoints --------------------------------------------------------------


def open_echo(raw: Raw, channel_id: bytes = b"c" * 16) -> None:
    raw.new(channel_id)
    raw.send(frame.DATA, channel_id, data=ECHO)
    assert raw.receive_flow(frame.DATA)[2] == b"hello"


def test_a_refused_endpoint_ends_that_channel_only(
    relay: RawRelay, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with refusing_port() as port, caplog.at_level(logging.WARNING):
        with running(relay, f"127.0.0.1:{port}") as client, relay.tunnel() as raw:
            client.wait_until_up(10)
            raw.new(b"c" * 16)
            raw.send(frame.DATA, b"c" * 16, data=ECHO)
            assert raw.receive_flow(frame.CLOSE)[0] == b"c" * 16
            raw.send(frame.PING, b"x" * 16, b"ping")
            assert raw.receive_flow(frame.PING)[0] == b"x" * 16
            wait_until(lambda: is_idle(client))
    assert f"can't reach endpoint 127.0.0.1:{port}: Connection refused" in caplog.text


def test_an_ipv6_endpoint(relay: RawRelay) -> None:
    service = Endpoint("::1")
    with running(relay, service.address), relay.tunnel() as raw:
        open_echo(raw)
    service.close()


def test_a_unix_endpoint(relay: RawRelay, tmp_path: Path) -> None:
    path = str(tmp_path / "service.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with running(relay, f"unix:{path}") as client, relay.tunnel() as raw:
            raw.new(b"c" * 16)
            raw.send(frame.DATA, b"c" * 16, data=b"hello")
            sock, _ = listener.accept()
            assert sock.recv(100) == b"hello"
            sock.sendall(b"answer")
            assert raw.receive_flow(frame.DATA)[2] == b"answer"
            raw.send(frame.CLOSE, b"c" * 16)
            assert sock.recv(100) == b""
            sock.close()
            wait_until(lambda: is_idle(client))


def test_data_waits_for_an_endpoint_that_connects_late_even_behind_close(
    relay: RawRelay,
) -> None:
    received: list[bytes] = []
    with HungEndpoint() as hung:
        with running(relay, hung.address) as client:
            with relay.tunnel() as raw:
                for channel_id, data in ((b"a" * 16, b"last words"), (b"b" * 16, b"")):
                    raw.new(channel_id)
                    if data:
                        raw.send(frame.DATA, channel_id, data=data)
                    raw.send(frame.CLOSE, channel_id)
                raw.send(frame.PING, b"x" * 16, b"ping")
                raw.receive_flow(frame.PING)
                hung.release()
                while b"last words" not in received:  # a connection without any may come first
                    sock, _ = hung.listener.accept()
                    with sock, sock.makefile("rb") as file:
                        received.append(file.read())
                wait_until(lambda: is_idle(client))
    assert received in ([b"last words"], [b"", b"last words"])


def test_a_hung_endpoint_delays_nothing_else(relay: RawRelay, quick_retries: None) -> None:
    """Connects hang; reconnecting to the relay and stopping don't wait for them."""
    with HungEndpoint() as hung, running(relay, hung.address, connect_timeout_s=300) as client:
        with relay.tunnel() as raw:
            for number in range(20):
                raw.new(bytes([number]) * 16)
            raw.send(frame.PING, b"x" * 16, b"ping")
            raw.receive_flow(frame.PING)
        with relay.tunnel() as raw:
            assert client.wait_until_up(10)
            raw.new(b"c" * 16)
            wait_until(lambda: connector(client)._opening)
            stopping = threading.Thread(target=client.stop)
            stopping.start()
            stopping.join(WAIT_S)
            assert not stopping.is_alive()


def test_too_many_connects_are_refused(relay: RawRelay) -> None:
    with (
        HungEndpoint() as hung,
        running(relay, hung.address) as client,
        relay.tunnel() as raw,
    ):
        for _ in range(OPENING_LIMIT + 1):
            raw.new(os.urandom(16))
        raw.receive_flow(frame.CLOSE)
        raw.sock.close()
        wait_until(lambda: not client.bridges.all)


def test_an_endpoint_s_name_is_resolved_on_a_worker(
    relay: RawRelay, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Its service listens on IPv4 only: the IPv6 address of the name refuses first."""
    with running(relay, f"localhost:{endpoint.port}") as client, relay.tunnel() as raw:
        for number in range(3):
            open_echo(raw, bytes([number]) * 16)
        assert connector(client)._workers._threads <= 2
    with running(relay, "no-such-name.invalid:80"), relay.tunnel() as raw:
        for number in range(3):
            raw.new(bytes([number]) * 16)
        for _ in range(3):
            raw.receive_flow(frame.CLOSE)
    assert "can't reach endpoint no-such-name.invalid:80: " in caplog.text


def test_channels_don_t_wait_for_a_name_for_ever(
    relay: RawRelay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    monkeypatch.setattr(endpoint_module, "blocking_resolve", lambda _: release.wait(WAIT_S) and [])
    hangs = running(relay, "hanging.example:80", connect_timeout_s=0.3)
    with hangs as client, relay.tunnel() as raw:
        for number in range(2):  # the second time, the resolver hangs already
            raw.new(bytes([number]) * 16)
            assert raw.receive_flow(frame.CLOSE)[0] == bytes([number]) * 16
        assert connector(client)._workers._threads == 1
        release.set()
        wait_until(lambda: not connector(client)._is_resolving)
        assert connector(client)._timer is None
    assert "its name is not resolved within 0.3 s" in caplog.text


def test_a_defect_in_the_client_s_own_code_ends_it(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    with running(relay, endpoint.address) as client:
        monkeypatch.setattr(client, "attempt_failed", fail)
        with relay.tunnel():
            client.wait_until_up(10)
        assert "a defect: RuntimeError('no')" in str(ended(client))


def test_a_defect_in_one_connect_ends_that_channel_only(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, failures = Connecting.start, [RuntimeError("no"), RuntimeError("no")]

    def fail(connecting: Connecting) -> None:
        if failures:
            raise failures.pop()
        start(connecting)

    monkeypatch.setattr(Connecting, "start", fail)
    with running(relay, f"localhost:{endpoint.port}") as client, relay.tunnel() as raw:
        for number in range(3):  # all of them wait for the name
            raw.new(bytes([number]) * 16)
            raw.send(frame.DATA, bytes([number]) * 16, data=ECHO)
        flows = sorted(raw.receive()[1] for _ in range(3))
        assert flows == [frame.DATA, frame.CLOSE, frame.CLOSE]
        assert len(client.bridges.all) == 1


def test_a_path_that_is_too_long_says_so(relay: RawRelay, caplog: pytest.LogCaptureFixture) -> None:
    with running(relay, "unix:/" + "x" * 200), relay.tunnel() as raw:
        raw.new(b"c" * 16)
        raw.receive_flow(frame.CLOSE)
    assert "AF_UNIX path too long" in caplog.text


def test_a_unix_endpoint_whose_queue_is_full_is_asked_again(
    relay: RawRelay, tmp_path: Path
) -> None:
    path = str(tmp_path / "service.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as filler:
        listener.bind(path)
        listener.listen(0)
        filler.connect(path)
        with running(relay, f"unix:{path}") as client, relay.tunnel() as raw:
            raw.new(b"c" * 16)
            raw.send(frame.DATA, b"c" * 16, data=b"hello")
            wait_until(lambda: connector(client)._opening)
            listener.accept()[0].close()
            sock, _ = listener.accept()
            with sock:
                assert sock.recv(100) == b"hello"


# --- the library ---------------------------------------------------------------------------


def test_wrong_arguments(credentials: Credentials) -> None:
    with pytest.raises(ConfigurationError, match="--endpoint: no port"):
        Client(credentials.ticket, "localhost")
    with pytest.raises(ConfigurationError, match="no ticket"):
        Client("hello", "localhost:80")
    with pytest.raises(ConfigurationError, match="--server"):
        Client(credentials.ticket, "localhost:80", server="[::1")
    with pytest.raises(ConfigurationError, match="crypto package"):
        Client(credentials.ticket, "localhost:80", crypto="openssl")


def test_a_ticket_as_text(relay: RawRelay, endpoint: Endpoint) -> None:
    for text in (relay.credentials.ticket.to_line(), relay.credentials.ticket.to_json()):
        with Client(text, endpoint.address) as client, relay.tunnel():
            assert client.wait_until_up(10)


def test_run_and_stop_from_another_thread(relay: RawRelay, endpoint: Endpoint) -> None:
    client = Client(relay.credentials.ticket, endpoint.address)
    thread = threading.Thread(target=client.run)
    thread.start()
    with relay.tunnel():
        assert client.wait_until_up(10)
        assert not client.wait(0.01)
        client.stop()
    thread.join(10)
    assert client.wait(0)
    with pytest.raises(MisuseError, match="started already"):
        client.start()
    client.stop()  # harmless


def test_stop_before_start_and_while_connecting(credentials: Credentials) -> None:
    client = Client(credentials.at("192.0.2.1:9"), "127.0.0.1:1")
    client.stop()
    with Client(credentials.ticket, "127.0.0.1:1"):
        pass  # the connect hangs in a black hole; stop doesn't


def test_stop_closes_every_channel_and_the_connection(relay: RawRelay, endpoint: Endpoint) -> None:
    flows: list[int] = []

    def read(raw: Raw) -> None:
        with contextlib.suppress(EOFError):
            while True:
                flows.append(raw.receive()[1])

    client = Client(relay.credentials.ticket, endpoint.address).start()
    with relay.tunnel() as raw:
        open_echo(raw)
        reader = threading.Thread(target=read, args=(raw,))
        reader.start()
        client.stop()
        reader.join(10)
    assert flows == [frame.CLOSE]


def test_throttling_paces_data_frames(tmp_path: Path, endpoint: Endpoint) -> None:
    with RawRelay(Credentials(tmp_path, throttling=20)) as relay:
        with running(relay, endpoint.address), relay.tunnel() as raw:
            raw.new(b"c" * 16)
            raw.send(frame.DATA, b"c" * 16, data=client_hello() + b"SOURCE 900000\n")
            begin, frames, received = time.monotonic(), 0, 0
            while received < 900_000:
                data = raw.receive_flow(frame.DATA)[2]
                received += len(data)
                frames += 1
                assert len(data) <= 65536
            took_s = time.monotonic() - begin
    # No test fails on time: that it was not faster than allowed is what throttling promises.
    assert frames <= took_s * 20 + 2
    assert frames >= 14
