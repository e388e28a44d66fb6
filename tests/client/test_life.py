"""The client's life: how it stops, takes other settings, sees the network change, how it is."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snitun_sync.client import Client
from snitun_sync.client import client as client_module
from snitun_sync.client import limits as limits_module
from snitun_sync.client.client import ClientState
from snitun_sync.client.retry import REFUSALS, Retry
from snitun_sync.client.settings import Settings
from snitun_sync.client.status import clock_doubt
from snitun_sync.errors import DeadLinkError, LinkError, RefusedError, UsageError
from snitun_sync.net import bridge as bridge_module
from snitun_sync.net import tunnel as tunnel_module
from snitun_sync.net.bridge import BridgeState
from snitun_sync.net.dialing import blocking_dial
from snitun_sync.net.tuning import PONG_S
from snitun_sync.protocol import frame
from tests.services import Raw, RawRelay, Services, on_loop, receive_exactly, refusing_port
from tests.support import (
    HOSTNAME,
    WAIT_S,
    Credentials,
    Endpoint,
    HungEndpoint,
    client_hello,
    wait_until,
)

ECHO = client_hello() + b"ECHO\nhello"


@pytest.fixture
def relay(credentials: Credentials) -> Iterator[RawRelay]:
    with RawRelay(credentials) as relay:
        yield relay


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    delay_s = Retry.delay_s
    monkeypatch.setattr(Retry, "delay_s", lambda *args: delay_s(*args) and 0.02)


# --- how it stops ----------------------------------------------------------------------


def test_open_channels_end_by_themselves_within_the_grace_time(tmp_path: Path) -> None:
    with Services(tmp_path) as services:
        with services.device("ECHO") as device:
            device.exchange()
            stopping = threading.Thread(target=services.client.stop, args=(60.0,))
            stopping.start()
            wait_until(lambda: services.client._is_refusing)
            device.exchange()
            assert services.client.state is ClientState.STOPPING
            with services.device("ECHO") as late:
                assert late.sock.recv(1) == b""
            assert stopping.is_alive()
        stopping.join(10)
        assert not stopping.is_alive()


@pytest.mark.parametrize("how", ["the grace time is over", "stop once more"])
def test_a_channel_that_doesn_t_end_is_closed(tmp_path: Path, how: str) -> None:
    with Services(tmp_path) as services, services.device("ECHO") as device:
        device.exchange()
        if how == "stop once more":
            threading.Thread(target=services.client.stop, args=(60.0,)).start()
            wait_until(lambda: services.client._is_refusing)
            services.client.stop()
        else:
            services.client.stop(0.5)
        assert services.client.wait(0)
        assert device.sock.recv(1) == b""


def test_channels_on_their_way_are_let_in_as_it_stops(relay: RawRelay, endpoint: Endpoint) -> None:
    with Client(relay.credentials.ticket, endpoint.address) as client, relay.tunnel() as raw:
        assert client.wait_until_up(10)
        stopping = threading.Thread(target=client.stop, args=(60.0,))
        stopping.start()
        wait_until(lambda: client._is_draining)
        raw.new(b"c" * 16)
        raw.send(frame.DATA, b"c" * 16, data=ECHO)
        assert raw.receive_flow(frame.DATA)[2] == b"hello"
        wait_until(lambda: client._is_refusing)
        raw.new(b"d" * 16)
        assert raw.receive_flow(frame.CLOSE)[0] == b"d" * 16
        raw.send(frame.CLOSE, b"c" * 16)
        stopping.join(10)
        assert not stopping.is_alive()


def test_the_relay_lets_devices_end_too(tmp_path: Path) -> None:
    with Services(tmp_path) as services, services.device() as waiting:
        with services.device("ECHO") as device:
            device.exchange()
            wait_until(lambda: len(services.server.arrivals) == 1)
            stopping = threading.Thread(target=services.server.stop, args=(60.0,))
            stopping.start()
            wait_until(lambda: services.server._is_draining)
            device.exchange()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", services.port))
            waiting.sock.sendall(ECHO)  # it was there before
            assert waiting.receive(5) == b"hello"
        assert stopping.is_alive()
        waiting.sock.close()
        stopping.join(10)
        assert not stopping.is_alive()


def test_a_loss_while_it_stops_ends_it(relay: RawRelay, endpoint: Endpoint) -> None:
    with Client(relay.credentials.ticket, endpoint.address) as client:
        with relay.tunnel() as raw:
            raw.new(b"c" * 16)
            raw.send(frame.DATA, b"c" * 16, data=ECHO)
            assert raw.receive_flow(frame.DATA)[2] == b"hello"
            stopping = threading.Thread(target=client.stop, args=(60.0,))
            stopping.start()
            wait_until(lambda: client._is_draining)
        stopping.join(10)
        assert not stopping.is_alive()


# --- other settings ----------------------------------------------------------------------


def test_another_ticket_takes_over_once_it_is_proven(tmp_path: Path) -> None:
    """The old tunnel's channels live on; with a ticket that is refused nothing changes."""
    with Services(tmp_path) as services, services.device("ECHO") as device:
        device.exchange()
        former, client = services.client.tunnel, services.client
        address = services.credentials.ticket.server
        (tmp_path / "stranger").mkdir()
        stranger = Credentials(tmp_path / "stranger", server=address)
        client.reconfigure(Settings(stranger.ticket, services.endpoint.address))
        wait_until(lambda: client.history.failures.get("refused"))
        assert client._serving is former
        with services.device("ECHO") as other:
            other.exchange()
        (tmp_path / "next").mkdir()
        following = Credentials(
            tmp_path / "next", server=address, fernet_key=services.credentials.fernet_key
        )
        client.reconfigure(Settings(following.ticket, services.endpoint.address))
        wait_until(lambda: client._serving is not former)
        assert client.state is ClientState.UP
        device.exchange()
        with services.device("ECHO") as other:
            other.exchange()
        device.sock.close()
        wait_until(lambda: len(client.tunnels) == 1)
        assert client.tunnel in client.tunnels
        services.wait_until_idle()


def test_a_former_tunnel_at_another_relay_ends_too(
    tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RETIRED_IDLE_S", 0.05)
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with RawRelay(Credentials(one)) as first, RawRelay(Credentials(other)) as second:
        with Client(first.credentials.ticket, endpoint.address) as client:
            with first.tunnel() as raw:
                assert client.wait_until_up(10)
                client.reconfigure(Settings(second.credentials.ticket, endpoint.address))
                with second.tunnel():
                    raw.wait_for_end()
                    assert client.wait_until_up(0)


def test_the_same_ticket_again_changes_nothing(tmp_path: Path) -> None:
    with Services(tmp_path) as services, ClosingEndpoint() as other:
        client, tunnel = services.client, services.client.tunnel
        client.reconfigure(
            Settings(
                services.credentials.ticket.to_line(),
                other.address,
                keepalive_s=5,
                budget_bytes=2**20,
                max_channels=1,
                reconnect_spread_s=3,
            )
        )
        with services.device("ECHO") as device:
            device.exchange()
            assert (other.accepted, services.endpoint.accepted) == (1, 0)
            with services.device("ECHO") as second:
                assert second.sock.recv(1) == b""
        assert client.tunnel is tunnel
        assert tunnel is not None
        assert tunnel.keepalive_s == 5
        assert client.bridges.limit_bytes == 2**20
        assert client.retry.spread_s == 3


class ClosingEndpoint(Endpoint):
    """An endpoint that closes by itself."""

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_a_new_ticket_doesn_t_wait_for_the_next_attempt(
    tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Retry, "delay_s", lambda *_: 3600.0)
    with RawRelay(Credentials(tmp_path)) as relay, refusing_port() as port:
        ticket = relay.credentials.ticket
        with Client(ticket, endpoint.address, server=f"127.0.0.1:{port}") as client:
            wait_until(lambda: client.state is ClientState.WAITING)
            client.reconfigure(Settings(ticket, endpoint.address))
            with relay.tunnel():
                assert client.wait_until_up(10)


def test_an_attempt_under_way_takes_the_new_settings_too(
    relay: RawRelay, endpoint: Endpoint
) -> None:
    credentials, proxy = relay.credentials, f"http://127.0.0.1:{relay.port}"
    with Client(credentials.ticket, endpoint.address, proxy=proxy) as client:
        sock, _ = relay.listener.accept()
        with Raw(sock, credentials, is_relay=True) as raw:
            while b"\r\n\r\n" not in sock.recv(65536, socket.MSG_PEEK):
                pass
            sock.recv(65536)
            client.reconfigure(
                Settings(
                    credentials.ticket,
                    endpoint.address,
                    proxy=proxy,
                    keepalive_s=7,
                    channel_idle_s=8,
                )
            )
            on_loop(client, lambda: None)
            sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            receive_exactly(sock, len(credentials.token))
            raw.handshake()
            raw.prove()
            assert client.wait_until_up(10)
            tunnel = client.tunnel
            assert tunnel is not None
            assert (tunnel.keepalive_s, tunnel.channel_idle_s) == (7, 8)


def test_a_shorter_keepalive_counts_at_once(relay: RawRelay, endpoint: Endpoint) -> None:
    """And so does TCP's own time limit."""
    ticket = relay.credentials.ticket
    with Client(ticket, endpoint.address) as client, relay.tunnel() as raw:
        assert client.wait_until_up(10)
        client.reconfigure(Settings(ticket, endpoint.address, keepalive_s=1))
        ping_id, flow, extra, _ = raw.receive()
        assert (flow, extra[:4]) == (frame.PING, b"ping")
        raw.send(frame.PING, ping_id, b"pong")
        tunnel = client.tunnel
        assert tunnel is not None and tunnel.sock is not None
        option = tunnel.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert option == 16_000


def gcm_relay(tmp_path: Path, name: str) -> RawRelay:
    (tmp_path / name).mkdir()
    return RawRelay(Credentials(tmp_path / name, cipher="aes-gcm"))


@pytest.mark.parametrize("when", ["it serves", "it isn't proven"])
def test_a_key_for_one_connection_gets_no_other(
    tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Whatever asks for one: a second would start with the same nonces."""
    monkeypatch.setattr(client_module, "FIRST_S", 0.0)
    monkeypatch.setattr(client_module, "PROBE_S", 0.0)
    with gcm_relay(tmp_path, "one") as relay:
        ticket = relay.credentials.ticket
        with Client(ticket, endpoint.address) as client, relay.tunnel(prove=False) as raw:
            tunnel = wait_until(lambda: client.tunnel)
            if when == "it serves":
                raw.prove()
                assert client.wait_until_up(10)
                other = Settings(ticket, endpoint.address, server=f"localhost:{relay.port}")
                client.reconfigure(other)
                on_loop(client, client.renew)
                assert client.state is ClientState.UP
            else:
                on_loop(client, client._network_changed)
                raw.prove()
                assert client.wait_until_up(10)
            assert client.tunnel is tunnel
            assert client.attempts == 1


@pytest.mark.parametrize("options", [{}, {"once": True}, {"exit_on_refusal": True}])
def test_a_successor_that_fails_doesn_t_end_what_serves(
    tmp_path: Path, endpoint: Endpoint, quick_retries: None, options: dict[str, Any]
) -> None:
    with gcm_relay(tmp_path, "one") as first, gcm_relay(tmp_path, "other") as second:
        with Client(first.credentials.ticket, endpoint.address) as client:
            with first.tunnel():
                assert client.wait_until_up(10)
                client.reconfigure(Settings(second.credentials.ticket, endpoint.address, **options))
                second.tunnel(prove=False).sock.close()
                wait_until(lambda: client.history.failures.get("refused"))
                assert client.state is ClientState.UP
                assert not client.wait(0)
            with pytest.raises(LinkError):
                client.wait(30)
            assert client.history.failures["lost"] == 1


def test_a_loss_while_a_successor_is_on_its_way_is_counted(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Retry, "delay_s", lambda *_: 3600.0)
    ticket = relay.credentials.ticket
    with refusing_port() as port, Client(ticket, endpoint.address) as client:
        with relay.tunnel():
            assert client.wait_until_up(10)
            client.reconfigure(Settings(ticket, endpoint.address, server=f"127.0.0.1:{port}"))
            wait_until(lambda: client.history.failures.get("unreachable"))
        wait_until(lambda: client.state is ClientState.WAITING)
        assert client.history.failures["lost"] == 1


def test_nothing_is_opened_any_more_as_it_stops(
    relay: RawRelay, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(relay.credentials.ticket, endpoint.address) as client, relay.tunnel():
        assert client.wait_until_up(10)

        def stop() -> None:
            client.stop()
            client.loop.call_soon(client.renew)

        on_loop(client, stop)
        assert client.wait(10)
        assert client.attempts == 1
    assert "defect" not in caplog.text


def test_once_is_once_though_the_network_changes_and_an_endpoint_holds_up_the_end(
    relay: RawRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "DRAIN_S", 0.3)
    for name in ("FIRST_S", "PROBE_S"):
        monkeypatch.setattr(client_module, name, 0.0)
    monkeypatch.setattr(client_module, "local_address_is_gone", lambda _: True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with Client(relay.credentials.ticket, address, once=True) as client, relay.tunnel() as raw:
            raw.new(b"c" * 16)
            with listener.accept()[0]:
                raw.send(frame.CLOSE, b"c" * 16)
                wait_until(lambda: [b.state for b in client.bridges.all] == [BridgeState.ENDING])
                client.loop.call_soon_threadsafe(client._network_changed)
                with pytest.raises(LinkError, match="address of the tunnel is gone"):
                    client.wait(10)
            assert client.attempts == 1


def test_channels_of_a_former_tunnel_have_their_grace_too(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with RawRelay(Credentials(one)) as first, RawRelay(Credentials(other)) as second:
        with Client(first.credentials.ticket, endpoint.address) as client, first.tunnel() as raw:
            raw.new(b"c" * 16)
            raw.send(frame.DATA, b"c" * 16, data=ECHO)
            assert raw.receive_flow(frame.DATA)[2] == b"hello"
            client.reconfigure(Settings(second.credentials.ticket, endpoint.address))
            with second.tunnel():
                wait_until(lambda: client.proven == 2)
                stopping = threading.Thread(target=client.stop, args=(60.0,))
                stopping.start()
                wait_until(lambda: client._is_refusing)
            wait_until(lambda: len(client.tunnels) == 1)
            raw.send(frame.DATA, b"c" * 16, data=b" again")
            assert raw.receive_flow(frame.DATA)[2] == b" again"
            raw.send(frame.CLOSE, b"c" * 16)
            stopping.join(10)
            assert not stopping.is_alive()


def test_settings_name_the_option_that_is_wrong(credentials: Credentials) -> None:
    for options, said in (
        ({"keepalive_s": 0.0}, "--keepalive: 0 seconds; expected 1 to 75"),
        ({"max_channels": 0}, "--max-channels: 0 channels; expected 1 to 1e+06"),
        ({"budget_bytes": 5}, "--budget: 5 bytes; expected 262144 to"),
        ({"reconnect_spread_s": -1.0}, "--reconnect-spread: -1 seconds"),
        ({"admin_token": "x" * 20}, "--admin-token-file: only with --admin"),
        ({"proxy_password": "secret"}, "--proxy-password-file: only with --proxy"),
    ):
        with pytest.raises(UsageError) as raised:
            Client(credentials.ticket, "127.0.0.1:1", **options)
        assert str(raised.value).startswith(said)


# --- limits ----------------------------------------------------------------------------


def test_at_a_limit_the_new_channel_is_closed_counted_and_said_once(
    relay: RawRelay, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Client(relay.credentials.ticket, endpoint.address, max_channels=2) as client,
        relay.tunnel() as raw,
    ):
        for number in range(12):
            raw.new(bytes([number]) * 16)
        for number in range(2, 12):
            assert raw.receive_flow(frame.CLOSE)[0] == bytes([number]) * 16
        assert client.limits.refused == {"channels": 10}
        raw.send(frame.CLOSE, bytes(16))
        wait_until(lambda: len(client.bridges.all) < 2)
        raw.new(b"c" * 16)
        raw.send(frame.DATA, b"c" * 16, data=ECHO)
        assert raw.receive_flow(frame.DATA)[2] == b"hello"
    assert [r.message for r in caplog.records if "refused" in r.message] == [
        "refused 1 channels: --max-channels 2 is reached"
    ]


def test_new_channels_may_come_so_fast_and_no_faster(
    relay: RawRelay,
    endpoint: Endpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(limits_module, "LOG_EACH_S", 0.0)
    with (
        Client(relay.credentials.ticket, endpoint.address, max_new_channels=5) as client,
        relay.tunnel() as raw,
    ):
        client.wait_until_up(10)
        begin = time.monotonic()
        for number in range(50):
            raw.new(bytes([number]) * 16)
        raw.send(frame.PING, b"x" * 16, b"ping")
        raw.receive_flow(frame.PING)
        let_in = client.bridges.opened
        # That it was not faster than allowed is what the limit promises.
        assert 5 <= let_in <= 5 + 5 * (time.monotonic() - begin) + 1
        assert client.limits.refused == {"rate": 50 - let_in}
    assert "--max-new-channels 5 a second is reached" in caplog.text


def test_a_full_budget_lets_nobody_in(relay: RawRelay, endpoint: Endpoint) -> None:
    with (
        Client(relay.credentials.ticket, endpoint.address) as client,
        relay.tunnel() as raw,
    ):
        client.wait_until_up(10)
        client.bridges.held_bytes += 2**40
        raw.new(b"c" * 16)
        assert raw.receive_flow(frame.CLOSE)[0] == b"c" * 16
        client.bridges.held_bytes -= 2**40
        assert client.limits.refused == {"budget": 1}


# --- the network ---------------------------------------------------------------------------


def test_a_change_asks_the_relay_and_its_answer_is_enough(
    relay: RawRelay, endpoint: Endpoint
) -> None:
    with Client(relay.credentials.ticket, endpoint.address) as client, relay.tunnel() as raw:
        assert client.wait_until_up(10)
        client.loop.call_soon_threadsafe(client._network_changed)
        ping_id, flow, extra, _ = raw.receive()
        assert (flow, extra[:4]) == (frame.PING, b"ping")
        raw.send(frame.PING, ping_id, b"pong")
        tunnel = client.tunnel
        assert tunnel is not None
        wait_until(lambda: tunnel._asked_at is None)
        assert tunnel.round_trip_s is not None
        assert client.tunnel is tunnel


def test_without_an_answer_another_tunnel_comes_at_once(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "PROBE_S", 1.0)
    errors: list[Any] = []

    def note(_: Retry, error: Any, proven_s: float | None) -> float:
        errors.append(error)
        return 0.0

    monkeypatch.setattr(Retry, "delay_s", note)
    with Client(relay.credentials.ticket, endpoint.address) as client, relay.tunnel():
        assert client.wait_until_up(10)
        client.loop.call_soon_threadsafe(client._network_changed)
        with relay.tunnel():
            wait_until(lambda: client.proven == 2)
    assert isinstance(errors[0], DeadLinkError)
    assert "answered no PING for" in str(errors[0])


def test_changes_again_and_again_give_a_dead_link_no_more_time(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "PROBE_S", 1.0)
    with Client(relay.credentials.ticket, endpoint.address) as client, relay.tunnel():
        assert client.wait_until_up(10)

        def is_over() -> bool:
            on_loop(client, client._network_changed)
            return bool(client.history.endings)

        wait_until(is_over)
        assert "answered no PING for" in client.history.endings[0].reason


def test_changes_give_a_pong_no_more_time(relay: RawRelay, endpoint: Endpoint) -> None:
    """Not even while other bytes come, as behind a garbled header."""
    with Client(relay.credentials.ticket, endpoint.address) as client, relay.tunnel():
        assert client.wait_until_up(10)
        tunnel = client.tunnel
        assert tunnel is not None

        def change(asked_s: float) -> bool:
            now = tunnel.loop.now
            tunnel._asked_at = tunnel._asked_again_at = now - asked_s
            tunnel.received_at = now - 1
            client._network_changed()
            return client.tunnel is tunnel

        assert on_loop(client, lambda: change(PONG_S - 9))
        assert not on_loop(client, lambda: change(PONG_S + 9))
    assert "answered no PING for 99 s" in client.history.endings[0].reason


def test_an_address_that_is_gone_ends_the_tunnel_at_once(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    with Client(relay.credentials.ticket, endpoint.address) as client, relay.tunnel():
        assert client.wait_until_up(10)
        monkeypatch.setattr(client_module, "local_address_is_gone", lambda _: True)
        client.loop.call_soon_threadsafe(client._network_changed)
        with relay.tunnel():
            wait_until(lambda: client.proven == 2)
    assert "address of the tunnel is gone" in client.history.endings[0].reason


def test_a_change_hurries_an_attempt_that_waits_or_hangs(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FIRST_S", 0.05)
    monkeypatch.setattr(Retry, "delay_s", lambda *_: 3600.0)
    with HungEndpoint() as hung:
        ticket = relay.credentials.ticket
        with Client(ticket, endpoint.address, server=hung.address) as client:
            wait_until(lambda: client._is_dialing)
            client.settings = Settings(ticket, endpoint.address)  # for the next attempt
            time.sleep(0.1)
            client.loop.call_soon_threadsafe(client._network_changed)
            with relay.tunnel():
                assert client.wait_until_up(10)
            wait_until(lambda: client.state is ClientState.WAITING)
            client.loop.call_soon_threadsafe(client._network_changed)
            with relay.tunnel():
                assert client.wait_until_up(10)


def test_a_resolver_that_hangs_doesn_t_hold_the_client(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    calls: list[bool] = []

    def hang_once(*arguments: Any) -> socket.socket:
        calls.append(True)
        if len(calls) == 1:
            go_on.wait()
        return blocking_dial(*arguments)

    def delay_s(*_: object) -> float:
        monkeypatch.setattr(client_module, "DIAL_S", WAIT_S)  # for the next one
        return 0.02

    monkeypatch.setattr(client_module, "blocking_dial", hang_once)
    monkeypatch.setattr(client_module, "DIAL_S", 0.2)
    monkeypatch.setattr(Retry, "delay_s", delay_s)
    try:
        with Client(relay.credentials.ticket, endpoint.address) as client:
            wait_until(lambda: client.history.endings)
            assert "can't reach the relay" in client.history.endings[0].reason
            with relay.tunnel():
                assert client.wait_until_up(10)
                go_on.set()
                relay.listener.accept()[0].close()  # it comes late, and is closed
                assert client.state is ClientState.UP
    finally:
        go_on.set()


def test_a_tunnel_about_to_prove_itself_isn_t_dropped_at_once(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow line, changes every other second would let none come up."""
    monkeypatch.setattr(client_module, "FIRST_S", 0.0)
    monkeypatch.setattr(client_module, "PROBE_S", 3600.0)
    ticket = relay.credentials.ticket
    with Client(ticket, endpoint.address) as client, relay.tunnel(prove=False) as raw:
        wait_until(lambda: client._opening)
        on_loop(client, client._network_changed)
        raw.prove()
        assert client.wait_until_up(10)
        assert client.attempts == 1


# --- refusals, failures ---------------------------------------------------------------------


def test_refused_three_times_and_asked_to_exit(
    relay: RawRelay, endpoint: Endpoint, quick_retries: None
) -> None:
    with Client(relay.credentials.ticket, endpoint.address, exit_on_refusal=True) as client:
        for _ in range(REFUSALS):
            relay.accept().close()
        with pytest.raises(RefusedError, match="refused 3 times in a row: the relay closed"):
            client.wait(30)


def test_refused_is_a_state_and_the_client_still_tries(
    relay: RawRelay,
    endpoint: Endpoint,
    quick_retries: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Client(relay.credentials.ticket, endpoint.address) as client:
        for _ in range(REFUSALS + 2):
            relay.accept().close()
        wait_until(lambda: client.state is ClientState.REFUSED)
        assert on_loop(client, client.ready).startswith("refused: the relay closed")
        with relay.tunnel():
            assert client.wait_until_up(10)
            assert on_loop(client, client.ready) == ""
    assert caplog.text.count("it refuses this client, so attempts are rarer") == 1


def test_the_same_failure_is_said_once_and_counted(
    endpoint: Endpoint,
    credentials: Credentials,
    quick_retries: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with refusing_port() as port, caplog.at_level(logging.INFO):
        with Client(credentials.at(f"127.0.0.1:{port}"), endpoint.address) as client:
            wait_until(lambda: client.attempts > 20)
    assert caplog.text.count("Connection refused; next attempt in") == 1
    assert caplog.text.count("connecting to the relay") <= 2
    [ending] = client.history.endings
    assert ending.count >= 20


def test_failures_that_take_turns_are_folded_too(
    relay: RawRelay, endpoint: Endpoint, quick_retries: None, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(relay.credentials.ticket, endpoint.address) as client:
        for _ in range(5):
            relay.accept().close()
            with relay.accept() as sock:
                sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n<html>log in first</html>")
                wait_until(lambda: not client._opening)
        wait_until(lambda: sum(ending.count for ending in client.history.endings) == 10)
        assert [ending.count for ending in client.history.endings] == [5, 5]
    assert caplog.text.count("; next attempt in") == 2


# --- what it says of itself -------------------------------------------------------------------


def test_the_report_tells_it_all_and_no_secret(tmp_path: Path) -> None:
    with Services(tmp_path) as services, services.device("ECHO") as device:
        device.exchange(b"x" * 1000)
        client, credentials = services.client, services.credentials
        report = on_loop(client, client.report)
        text = json.dumps(report)
        for secret in (
            credentials.token[20:60],
            credentials.payload.aes_key.hex(),
            credentials.payload.aes_iv.hex(),
        ):
            assert secret not in text
        assert (report["state"], report["is_ready"], report["reason"]) == ("up", True, None)
        assert report["hostname"] == HOSTNAME
        assert report["channels"]["open"] == 1
        [channel] = report["channels"]["list"]
        assert channel["device"] == "127.0.0.1"
        assert channel["sent_bytes"] >= 1000
        assert report["tunnel"]["relay_address"] == credentials.ticket.server
        assert report["tunnel"]["round_trip_ms"] > 0
        assert 3500 < report["ticket"]["expires_in_s"] <= 3600
        assert report["memory"]["resident_bytes"] > 2**20
        assert report["clock_doubt"] is None
        server = on_loop(services.server, services.server.report)
        assert [c["hostname"] for c in server["clients"]] == [HOSTNAME]
        assert server["channels"]["list"][0]["received_bytes"] >= 1000


def test_silence_beyond_the_keepalive_is_not_ready(
    relay: RawRelay, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(relay.credentials.ticket, endpoint.address) as client, relay.tunnel():
        assert client.wait_until_up(10)
        assert on_loop(client, client.ready) == ""
        tunnel = client.tunnel
        assert tunnel is not None
        tunnel.received_at -= 66
        assert on_loop(client, client.ready).startswith("the relay has said nothing for 66 s")
        assert "; but the relay has said nothing" in on_loop(client, client.summary)


def test_doubts_about_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = Credentials(tmp_path).ticket
    now = time.time()
    assert clock_doubt(ticket, was_accepted=True) == ""
    for faked, said in (
        (1000.0, "1970-01-01T00:16:40Z, before this program was written"),
        (now - 1800, "and the ticket was made at"),
        (now + 7200, "but the relay accepted it"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda faked=faked: faked)
            assert said in clock_doubt(ticket, was_accepted=True)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 7200)
        assert clock_doubt(ticket, was_accepted=False) == ""


def test_a_client_without_a_tunnel_says_why(endpoint: Endpoint, credentials: Credentials) -> None:
    with refusing_port() as port:
        with Client(credentials.at(f"127.0.0.1:{port}"), endpoint.address) as client:
            wait_until(lambda: client.history.endings)
            assert "Connection refused" in on_loop(client, client.ready)
            report = on_loop(client, client.report)
            assert report["tunnel"] is None
            assert "Connection refused" in report["endings"][0]["reason"]
            assert "Connection refused" in report["summary"]
            assert report["failures"]["unreachable"] >= 1
