"""The client with a session master: tickets that come, renew, are refused, kept and revoked."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from snitun_sync.client import Client
from snitun_sync.client.client import ClientState
from snitun_sync.client.master import Master
from snitun_sync.client.retry import REFUSALS, Retry
from snitun_sync.client.settings import Settings
from snitun_sync.errors import (
    ConfigurationError,
    DeadLinkError,
    DeniedError,
    LostError,
    RevokedError,
    UnreadableError,
    UsageError,
)
from snitun_sync.program import MAX_CERTIFICATES_BYTES, check_certificates
from snitun_sync.protocol.device import new_id, new_secret
from snitun_sync.protocol.frame import REVOKED
from snitun_sync.protocol.ticket import Ticket
from snitun_sync.protocol.token import new_fernet_key
from snitun_sync.server import Server
from tests.masters import Masters
from tests.net.test_fetch import children
from tests.services import ConnectProxy, on_loop, refusing_port
from tests.stub_master import AUTHORITY, Reply, StubMaster
from tests.support import (
    HOSTNAME,
    PROJECT,
    WAIT_S,
    Credentials,
    Device,
    Endpoint,
    Program,
    rss_kib,
    wait_until,
)
from tests.support import module as command

TEXT = (PROJECT / "docs" / "client.md").read_text("utf-8")


class Site:
    """A relay, a session master, and clients."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        self.endpoint = Endpoint()
        self.key = new_fernet_key(os.urandom)
        self.server = Server([self.key], ["127.0.0.1:0"]).start()
        self.address = f"127.0.0.1:{self.server.ports[0]}"
        self.master = StubMaster(folder, self.key, self.address)

    def close(self) -> None:
        self.master.close()
        self.server.stop()
        self.endpoint.close()

    def settings(self, **options: Any) -> Settings:
        options = {**self.master.options, "state_dir": str(self.state), **options}
        return Settings(None, self.endpoint.address, **options)

    @contextlib.contextmanager
    def client(self, *, up: bool = True, **options: Any) -> Iterator[Client]:
        options = {**self.master.options, "state_dir": str(self.state), **options}
        with Client(None, self.endpoint.address, **options) as client:
            assert not up or client.wait_until_up(WAIT_S)
            yield client

    def arguments(self, *more: str) -> list[str | Path]:
        arguments = (*self.master.arguments, "--endpoint", self.endpoint.address, *more)
        return command("snitun_sync.client", *arguments)

    def exchange(self) -> None:
        """A device gets through."""
        with Device(self.server.ports[0], "ECHO") as device:
            device.exchange()

    @property
    def kept(self) -> dict[str, Any]:
        """What is kept of a ticket; nothing if there is none."""
        path = self.state / "ticket.json"
        found: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text())
        return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried soon, and tickets are renewed at once when a test wants it."""
    delay_s = Retry.delay_s
    monkeypatch.setattr(Retry, "delay_s", lambda *args: delay_s(*args) and 0.02)


@pytest.fixture
def child() -> None:
    """Requests are made by child processes, as usual; in the other tests on a thread: quicker."""


@pytest.fixture(autouse=True)
def _within_the_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "child" not in request.fixturenames:
        monkeypatch.setattr(sys, "executable", "")


def master_of(client: Client) -> Master:
    assert client.master is not None
    return client.master


def renew(client: Client) -> None:
    """Let the time for a renewal come."""
    client.loop.call_soon_threadsafe(master_of(client)._renew)


def failures(client: Client, kind: str) -> int:
    return client.history.failures.get(kind, 0)


def saying(status: int, headers: dict[str, str] | None = None, body: Any = b"") -> Any:
    """Return what answers so."""
    return lambda _: (status, headers or {}, body)


def only(*names: str) -> Callable[[Reply], Reply]:
    """Return what leaves no other fields in the usual answer."""

    def reply(usual: Reply) -> Reply:
        fields = usual[2]
        assert isinstance(fields, dict)
        return 200, {}, {name: fields[name] for name in names}

    return reply


# --- how it goes when all is well -------------------------------------------------------------


def test_a_ticket_comes_is_used_and_kept(site: Site, child: None) -> None:
    with ConnectProxy() as proxy:
        with site.client(proxy=f"http://{proxy.address}") as client:
            site.exchange()
            ticket = client.ticket
            assert ticket is not None
            wait_until(lambda: site.kept)
            # The proxy counts for the session master as well.
            assert proxy.targets == [f"localhost:{site.master.port}", site.address]
    (request,) = site.master.requests
    assert request["line"] == "POST /v1/token"
    assert request["authorization"] == f"Bearer {site.master.device_id}.{site.master.secret}"
    assert (request["aes_key"], request["aes_iv"]) == (ticket.aes_key.hex(), ticket.aes_iv.hex())
    assert (ticket.hostname, ticket.device_id) == (HOSTNAME, site.master.device_id)
    assert site.kept["master"] == site.master.url
    assert Ticket.from_fields(site.kept["ticket"]).token == ticket.token
    assert os.listdir(site.state) == ["ticket.json"]
    assert (site.state / "ticket.json").stat().st_mode & 0o777 == 0o600
    assert site.master.secret not in (site.state / "ticket.json").read_text()


@pytest.mark.parametrize("cipher", ["aes-cbc", "aes-gcm"])
def test_a_renewal_takes_over_once_it_is_proven(site: Site, cipher: str) -> None:
    site.master.cipher = cipher
    with site.client() as client, Device(site.server.ports[0], "ECHO") as device:
        device.exchange()
        assert client.master is not None
        left_s = client.master.renew_at - client.loop.now
        assert 0.59 * 3600 < left_s < 0.68 * 3600
        former, former_ticket = client.tunnel, client.ticket
        site.master.go_on.clear()
        renew(client)
        wait_until(lambda: len(site.master.requests) == 2)
        site.exchange()
        assert client.tunnel is former
        site.master.go_on.set()
        wait_until(lambda: client.proven == 2)
        device.exchange()  # through the former tunnel
        site.exchange()
        keys = {request["aes_key"] for request in site.master.requests}
        assert len(keys) == 2
        assert former_ticket is not None
        assert client.ticket is not None
        assert former_ticket.aes_iv != client.ticket.aes_iv
        assert not client.history.failures
        if cipher == "aes-cbc":
            token = client.ticket.token
            wait_until(lambda: site.kept["ticket"]["token"] == token)
        else:
            assert not site.state.exists()


def test_each_connection_has_a_ticket_of_its_own_with_aes_gcm(site: Site, quick: None) -> None:
    site.master.cipher = "aes-gcm"
    with site.client() as client:
        for count, error in ((2, LostError("no")), (3, RevokedError("no"))):
            for tunnel in tuple(site.server.tunnels):
                site.server.loop.call_soon_threadsafe(tunnel.finish, error)
            wait_until(lambda count=count: client.proven == count)  # type: ignore[misc]
            site.exchange()
        assert len({request["aes_key"] for request in site.master.requests}) == 3
        assert client.attempts == 3  # none of them with a key that had its connection
        assert not client._spent_keys


@pytest.mark.parametrize("is_named", [True, False])
def test_a_kept_ticket_serves_while_the_master_is_away(site: Site, is_named: bool) -> None:
    if not is_named:  # as in the field: no hostname, nor what else may be missing
        site.master.reply = only("token", "server", "valid", "throttling", "protocol_version")
    with site.client():
        wait_until(lambda: site.kept)
    site.master.reply = saying(503)
    with site.client() as client:
        site.exchange()
        assert len(site.master.requests) == 1
        assert client.master is not None
        left_s = client.master.renew_at - client.loop.now
        assert 0.5 * 3600 < left_s < 0.68 * 3600
        renew(client)
        wait_until(lambda: failures(client, "master"))
        site.exchange()
        assert "answers 503" in client.master.failure


@pytest.mark.parametrize(
    "how", ["expired", "another master", "another device", "damaged", "cut", "no token"]
)
def test_what_is_kept_and_does_not_count(
    site: Site, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with site.client():
        wait_until(lambda: site.kept)
    kept, path = site.kept, site.state / "ticket.json"
    if how == "expired":
        past = {**kept["ticket"], "valid": time.time() - 1}
        path.write_text(json.dumps({**kept, "ticket": past}))
    elif how == "another master":
        path.write_text(json.dumps({**kept, "master": "https://other.example"}))
    elif how == "another device":
        path.write_text(json.dumps({**kept, "device_id": new_id(os.urandom)}))
    elif how == "no token":
        path.write_text(json.dumps({**kept, "ticket": {**kept["ticket"], "token": ""}}))
    elif how == "damaged":
        path.write_bytes(b"\xff{")
    else:
        path.write_text(path.read_text()[:-20])
    with site.client():
        assert len(site.master.requests) == 2
        wait_until(lambda: site.kept.get("ticket") not in (None, kept["ticket"]))
    is_said = any("--state-dir" in record.message for record in caplog.records)
    assert is_said == (how in ("damaged", "cut", "no token"))


@pytest.mark.parametrize("how", ["a file", "full", "of nobody"])
def test_a_folder_that_keeps_nothing_is_a_warning(
    site: Site, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = site.folder / "place"
    if how == "a file":
        folder.touch()
    elif how == "full":
        folder.mkdir()
        (folder / "ticket.json.new").symlink_to("/dev/full")
    else:
        folder = Path("/proc/none")
    with site.client(state_dir=str(folder)) as client:
        wait_until(lambda: "can't be kept in" in caplog.text)
        renew(client)
        wait_until(lambda: client.proven == 2)
        site.exchange()
        wait_until(lambda: not folder.is_dir() or os.listdir(folder) == ["ticket.json"])
    assert caplog.text.count("can't be kept in") == 1


# --- the relay doesn't want the ticket --------------------------------------------------------


def test_a_renewal_that_is_refused_changes_nothing(site: Site, quick: None) -> None:
    """The former ticket serves on, also when its tunnel is lost; another is asked for later."""
    with site.client(reconnect_spread_s=0.1) as client:
        wait_until(lambda: site.kept)
        former, tunnel, kept = client.ticket, client.tunnel, site.kept
        site.master.fernet_keys = [new_fernet_key(os.urandom)]
        renew(client)
        wait_until(lambda: failures(client, "refused"))
        assert client.tunnel is tunnel
        assert client.state is ClientState.UP
        site.master.reply = saying(503)
        wait_until(lambda: client.ticket is former)
        assert tunnel is not None
        client.loop.call_soon_threadsafe(tunnel.end, RevokedError("lost for a test"))
        # As if the tunnel had been revoked: the former ticket doesn't count any more.
        wait_until(lambda: failures(client, "master") >= 1)
        assert not master_of(client).is_usable
        site.master.fernet_keys, site.master.reply = [site.key], lambda usual: usual
        assert client.wait_until_up(WAIT_S)
        wait_until(lambda: site.kept not in ({}, kept))


def test_a_former_ticket_reconnects_while_new_ones_are_refused(site: Site, quick: None) -> None:
    with site.client() as client:
        former, tunnel = client.ticket, client.tunnel
        site.master.fernet_keys = [new_fernet_key(os.urandom)]
        for count in range(1, 3):
            renew(client)
            wait_until(lambda count=count: failures(client, "refused") >= count)  # type: ignore[misc]
        wait_until(lambda: client.ticket is former)
        (there,) = site.server.tunnels
        site.server.loop.call_soon_threadsafe(there.finish, RevokedError("no"))
        wait_until(lambda: client.tunnel is not tunnel and client.state is ClientState.UP)
        assert client.ticket is former
        site.exchange()


def test_refused_tickets_are_replaced_ever_more_rarely(site: Site, quick: None) -> None:
    site.master.fernet_keys = [new_fernet_key(os.urandom)]
    with site.client(up=False) as client:
        wait_until(lambda: client.state is ClientState.REFUSED)
        wait_until(lambda: len(site.master.requests) > REFUSALS)
        assert not site.kept
        site.master.fernet_keys = [site.key]
        assert client.wait_until_up(WAIT_S)
        site.exchange()


def test_a_revoked_token_asks_the_master_who_says_why(
    site: Site, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    with site.client() as client:
        wait_until(lambda: site.kept)
        site.master.reply = saying(403, {}, {"message": "the device was revoked"})
        (tunnel,) = site.server.tunnels
        site.server.loop.call_soon_threadsafe(tunnel.finish, RevokedError("revoked"), REVOKED)
        wait_until(lambda: client.state is ClientState.REVOKED)
        assert failures(client, "revoked") == 1
        wait_until(lambda: not site.kept)
        assert "answers 403: 'the device was revoked'" in client.ready()
        assert client.summary().startswith("revoked since")
        assert client.retry_at > client.loop.now + 800
        assert len(site.master.requests) == 2
        # No change of the network makes it ask before its time; SIGHUP does.
        client.loop.call_soon_threadsafe(client._network_changed)
        client.reconfigure(site.settings())
        wait_until(lambda: len(site.master.requests) == 3)
        wait_until(lambda: failures(client, "master") == 2)
        assert client.state is ClientState.REVOKED
        assert client.retry_at > client.loop.now + 800
        said = [r.message for r in caplog.records if "answers 403" in r.message]
        assert len(said) == 1
        site.master.reply = lambda usual: usual
        client.reconfigure(site.settings())
        assert client.wait_until_up(WAIT_S)
        assert client.summary().startswith("up since")


def test_a_renewal_that_is_denied_leaves_the_tunnel(site: Site) -> None:
    with site.client() as client:
        wait_until(lambda: site.kept)
        site.master.reply = saying(403)
        renew(client)
        wait_until(lambda: not site.kept)
        site.exchange()
        assert client.state is ClientState.UP
        assert client.master is not None
        assert client.master.renew_at > client.loop.now + 800
        (tunnel,) = site.server.tunnels
        site.server.loop.call_soon_threadsafe(tunnel.finish, RevokedError("no"))
        wait_until(lambda: client.state is ClientState.REVOKED)
        assert client.retry_at > client.loop.now + 800
        assert len(site.master.requests) == 2


def test_the_next_server_after_a_failure(site: Site, quick: None) -> None:
    with refusing_port() as port:
        site.master.servers = [f"localhost:{port}", site.address]
        with site.client() as client:
            assert client.attempts == 2
            site.exchange()
            assert str(client.server) == site.address
    with refusing_port() as port:
        site.master.servers = [f"127.0.0.1:{port}"]
        with site.client(server=site.address, state_dir="") as client:
            assert client.attempts == 1


def test_a_renewal_stays_at_the_relay_that_serves(site: Site) -> None:
    with refusing_port() as port, site.client() as client:
        site.master.servers = [f"127.0.0.1:{port}", site.address]
        renew(client)
        wait_until(lambda: client.proven == 2)
        assert client.attempts == 2
        site.exchange()


# --- the master's answers -----------------------------------------------------------------------


def changed(**fields: Any) -> Callable[[Reply], Reply]:
    def reply(usual: Reply) -> Reply:
        assert isinstance(usual[2], dict)
        return 200, {}, {**usual[2], **fields}

    return reply


ODD: list[tuple[Callable[[Reply], Reply], str]] = [
    (saying(200, {}, b"garbage"), "server is missing"),
    (saying(200, {}, b"[" * 5000), "server is missing"),
    (saying(200, {}, b"null"), "server is missing"),
    (saying(200, {}, bytes(70_000)), "70000 bytes, expected at most 65536"),
    (saying(302, {"Location": "https://other.example/"}), "leads elsewhere"),
    (saying(500, {}, {"message": "x" * 500}), f"answers 500: '{'x' * 200}'$"),
    (saying(500, {}, {"message": 7}), "answers 500: '7'"),
    (saying(404, {}, b"<html>"), "answers 404$"),
    (changed(token="none"), "token is no Fernet token"),
    (changed(token="gA=="), "without a life"),
    (changed(token=None), "token is missing"),
    (changed(server="unix:/x"), "a unix socket"),
    (changed(servers=["a:1", "b:x"]), "servers: port 'x'"),
    (changed(servers="a:1"), "servers is a string"),
    (changed(servers=[7]), "servers is a list"),
    (changed(hostname="a b"), "hostname is 'a b'"),
    (changed(valid=None), "without a life"),
    (changed(valid=1), "without a life"),
    (changed(valid="soon"), "valid is a string"),
    (changed(valid=1e300), "valid is no time"),
    (changed(throttling=-1), "throttling is -1"),
    (changed(cipher="rot13"), "cipher is 'rot13'"),
]


def test_odd_answers_are_failures_that_say_what_is_wrong(site: Site, quick: None) -> None:
    with site.client(up=False) as client:
        for reply, words in ODD:
            asked = len(site.master.requests)
            site.master.reply = reply
            wait_until(lambda: len(site.master.requests) > asked)  # noqa: B023
            wait_until(lambda: re.search(words, master_of(client).failure), words)  # noqa: B023
        assert client.state in (ClientState.WAITING, ClientState.CONNECTING)
        site.master.reply = lambda usual: usual
        assert client.wait_until_up(WAIT_S)
        site.exchange()


def test_a_kept_ticket_whose_cipher_this_machine_lacks(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its packages have changed."""
    site.master.cipher = "aes-gcm-siv"
    with site.client():
        wait_until(lambda: site.kept)
    site.master.cipher = "aes-cbc"

    def check(_: Client, ticket: Ticket) -> None:
        if ticket.cipher == "aes-gcm-siv":
            raise ConfigurationError("aes-gcm-siv needs cryptography")

    monkeypatch.setattr(Client, "check_cipher", check)
    with site.client() as client:
        assert client.ticket is not None
        assert client.ticket.cipher == "aes-cbc"
    assert "needs cryptography; asking the session master" in caplog.text


def test_what_was_kept_is_deleted_once_a_thread_is_free(site: Site) -> None:
    go_on = threading.Event()
    with site.client() as client:
        wait_until(lambda: site.kept)
        wait_until(lambda: not master_of(client)._is_keeping)
        while client._workers.submit(go_on.wait, lambda *_: None):
            pass
        client.loop.call_soon_threadsafe(master_of(client)._forget)
        wait_until(lambda: master_of(client)._is_keeping)
        go_on.set()
        wait_until(lambda: not site.kept)


def test_a_cipher_that_this_machine_lacks(
    site: Site, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def check(_: Client, ticket: Ticket) -> None:
        if ticket.cipher == "aes-gcm-siv":
            raise ConfigurationError("aes-gcm-siv needs cryptography")

    monkeypatch.setattr(Client, "check_cipher", check)
    site.master.cipher = "aes-gcm-siv"
    with site.client(up=False) as client:
        wait_until(lambda: "aes-gcm-siv needs cryptography" in client.history.last)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(site: Site, quick: None, status: int) -> None:
    site.master.reply = saying(status, {"Retry-After": "120"})
    with site.client(up=False) as client:
        wait_until(lambda: client.retry_at > client.loop.now + 100)
        client.loop.call_soon_threadsafe(client._network_changed)
        assert len(site.master.requests) == 1
        assert client.state is ClientState.WAITING


def test_a_denied_renewal_and_the_end_of_the_tunnel(site: Site) -> None:
    with site.client(exit_on_refusal=True) as client:
        site.master.reply = saying(403)
        renew(client)
        wait_until(lambda: master_of(client).is_revoked)
        site.exchange()
        tunnel = client.tunnel
        assert tunnel is not None
        client.loop.call_soon_threadsafe(tunnel.end, DeadLinkError("gone"))
        with pytest.raises(DeniedError, match="answers 403"):
            client.wait(WAIT_S)


def test_a_time_to_wait_is_over_with_the_next_ticket(site: Site, quick: None) -> None:
    site.master.cipher = "aes-gcm"
    site.master.reply = saying(503, {"Retry-After": "3600"})
    with site.client(up=False) as client:
        wait_until(lambda: client.retry_at)
        site.master.reply = lambda usual: usual
        client.reconfigure(site.settings())  # as SIGHUP does: at once
        assert client.wait_until_up(WAIT_S)
        tunnel = client.tunnel
        assert tunnel is not None
        client.loop.call_soon_threadsafe(tunnel.end, DeadLinkError("gone"))
        wait_until(lambda: client.proven == 2)


def test_a_wrong_secret_is_a_refusal_and_the_file_is_read_again(site: Site, quick: None) -> None:
    right = site.master.secret_file.read_text()
    site.master.secret_file.write_text(f"{site.master.device_id}.{new_secret(os.urandom)}")

    def reply(usual: Reply) -> Reply:
        is_right = site.master.requests[-1]["authorization"] == f"Bearer {right.strip()}"
        given = site.master.requests[-1]["authorization"].partition(".")[2]
        return usual if is_right else (401, {}, {"message": f"no secret {given}"})

    site.master.reply = reply
    with site.client(up=False) as client:
        wait_until(lambda: client.state is ClientState.REFUSED)
        assert "answers 401: 'no secret [secret]'" in client.ready()
        site.master.secret_file.unlink()
        wait_until(lambda: "can't read" in client.history.last)
        site.master.secret_file.write_text("nothing")
        wait_until(lambda: "a secret without its device's id" in client.history.last)
        site.master.secret_file.write_text(right)
        assert client.wait_until_up(WAIT_S)


@pytest.mark.parametrize("days", [(2, 3), (-3, -2)])
def test_a_clock_that_is_wrong_is_named(site: Site, days: tuple[int, int]) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    before, after = (now + datetime.timedelta(days=count) for count in days)
    certificate = AUTHORITY.issue_cert("localhost", not_before=before, not_after=after)
    (site.folder / "other").mkdir()
    with StubMaster(site.folder / "other", site.key, certificate=certificate) as master:
        with site.client(up=False, **master.options) as client:
            wait_until(lambda: "by this machine's clock (20" in client.history.last)
            assert client.history.last.endswith("is the clock right?")
            assert not master.requests


# --- its life -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stop", "drain", "another ticket"])
def test_an_end_while_the_master_is_asked(site: Site, how: str, child: None) -> None:
    before = children()
    site.master.go_on.clear()
    with site.client(up=False) as client:
        wait_until(lambda: site.master.requests)
        assert children() != before
        if how == "stop":
            client.stop()
        elif how == "drain":
            client.stop(60)
        else:
            credentials = Credentials(site.folder, server=site.address, fernet_key=site.key)
            client.reconfigure(Settings(credentials.ticket, site.endpoint.address))
            assert client.wait_until_up(WAIT_S)
            assert client.ticket is not None
            assert client.ticket.token == credentials.ticket.token
        wait_until(lambda: children() == before)
        assert how == "another ticket" or client.wait(0)


def test_from_a_ticket_to_a_master_to_another_and_back(site: Site) -> None:
    credentials = Credentials(site.folder, server=site.address, fernet_key=site.key)
    (site.folder / "other").mkdir()
    ticket = Settings(credentials.ticket, site.endpoint.address)
    with StubMaster(site.folder / "other", site.key, site.address) as other:
        with Client(credentials.ticket, site.endpoint.address) as client:
            assert client.wait_until_up(WAIT_S)
            site.master.reply = saying(500)
            client.reconfigure(site.settings())
            wait_until(lambda: failures(client, "master"))
            # What was there goes on, and is what is told.
            assert client.state is ClientState.UP
            assert client.ticket is credentials.ticket
            site.exchange()
            site.master.reply = lambda usual: usual
            for count, settings in enumerate(
                (site.settings(), site.settings(**other.options), ticket), 2
            ):
                client.reconfigure(settings)
                wait_until(lambda count=count: client.proven == count)  # type: ignore[misc]
                site.exchange()
            assert client.ticket is credentials.ticket
            assert client.master is None
            assert len(other.requests) == 1
            client.reconfigure(ticket)
            site.exchange()
            assert client.proven == 4


def test_the_network_comes_back_while_a_request_hangs(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snitun_sync.client.client.PROBE_S", -1.0)
    site.master.go_on.clear()
    with site.client(up=False) as client:
        wait_until(lambda: site.master.requests)
        client.loop.call_soon_threadsafe(client._network_changed)
        wait_until(lambda: len(site.master.requests) == 2)
        site.master.go_on.set()
        assert client.wait_until_up(WAIT_S)
        assert not client.history.failures


def test_a_life_ends_by_the_loop_s_clock(site: Site, quick: None) -> None:
    """Whatever the machine's own says: the token's time counts from when it came."""
    site.master.age_s = -86400.0 * 365
    with site.client(reconnect_spread_s=0.1) as client:
        master = master_of(client)

        def let_it_end() -> float:
            left_s = master._ends_at - client.loop.now
            master._schedule(0.0)
            master._ends_at = client.loop.now
            return left_s

        assert master.is_usable
        assert 0 < on_loop(client, let_it_end) <= site.master.life_s
        assert not master.is_usable
        assert client.state is ClientState.UP  # the relay decides
        (tunnel,) = site.server.tunnels
        site.server.loop.call_soon_threadsafe(tunnel.finish, RevokedError("no"))
        wait_until(lambda: client.proven == 2)
        assert len(site.master.requests) == 2


@pytest.mark.parametrize("age_s", [-30 * 365 * 86400.0, 3000.0])
def test_a_kept_ticket_whose_time_for_renewal_is_over_or_unknown(site: Site, age_s: float) -> None:
    """As with a clock in 1970: it connects, and is renewed soon after."""
    site.master.age_s = age_s
    with site.client():
        wait_until(lambda: site.kept)
    site.master.reply = saying(503)
    with site.client() as client:
        site.exchange()
        assert client.master is not None
        assert client.master.renew_at < client.loop.now + 11
        assert client.master.is_usable


# --- what is said -----------------------------------------------------------------------------


def test_fields_metrics_and_table_have_the_master(site: Site) -> None:
    from snitun_sync.status_command import table

    with site.client() as client:
        site.exchange()
        report = client.report()
        assert report["master"]["url"] == site.master.url
        assert report["master"]["device_id"] == site.master.device_id
        for name in report["master"]:
            assert f"`{name}`" in TEXT, name
        for family in client.metrics():
            suffix = {"counter": "_total", "info": "_info"}.get(family[1], "")
            assert f"`{family[0]}{suffix}" in TEXT, family[0]
        site.master.reply = saying(503)
        renew(client)
        said = f"{site.master.url}, device {site.master.device_id}, asked again in"

        def failed() -> str:
            lines = "\n".join(table(client.report()))
            return lines if said in lines and "answers 503" in lines else ""

        lines = wait_until(failed)
        assert site.master.secret not in lines + json.dumps(client.report())
    with refusing_port() as port:
        site.state = site.folder / "none"
        with site.client(up=False, master=f"https://localhost:{port}") as client:
            wait_until(lambda: failures(client, "master"))
            report = client.report()
            assert (report["relay"], report["ticket"], report["hostname"]) == (None, None, None)
            assert "not known yet" in "\n".join(table(report))
            assert client.metrics()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"master": "http://relay.example"}, "--master: http:// to relay.example:80, another"),
        ({"device_secret_file": ""}, "--master: only with --device-secret-file"),
        ({"device_secret_file": "/none"}, "--device-secret-file: can't read /none"),
        ({"device_id": "abcdefghijklmnop"}, "--device-secret-file: .*: the secret of device"),
        ({"device_id": "home.example"}, "--device-id: 'home.example'; expected the id of a device"),
        ({"master_ca": "/none"}, "--master-ca: can't read /none"),
        ({"master_ca": "/dev/null"}, "--master-ca: /dev/null has no certificates"),
        ({"master_ca": "-"}, "--master-ca: standard input; expected a file"),
        ({"ticket": "st1.x"}, "TicketError|the ticket"),
    ],
)
def test_settings_that_are_wrong(site: Site, options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Client(**{**site.master.options, **options})


def test_files_of_certificates_to_trust(tmp_path: Path) -> None:
    """What isn't whole is refused, and nothing that OpenSSL takes."""
    path, whole = tmp_path / "ca.pem", AUTHORITY.cert_pem.bytes()
    begin, end = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"
    for data in (whole, whole.replace(b"\n", b"\r\n"), b"# \xff\n" + whole * 100, whole[:-1]):
        path.write_bytes(data)
        check_certificates(str(path), "--master-ca")
        ssl.create_default_context(cafile=str(path))
    for data, which in (
        (begin + b"garbage\n", "1 of 1"),
        (begin + b"garbage\n" + end, "1 of 1"),
        (begin + end, "1 of 1"),
        (begin + b"A\n" + end, "1 of 1"),
        (whole + whole[: len(whole) // 2], "2 of 2"),
        (whole[: len(whole) // 2] + whole, "1 of 2"),
        (whole.replace(b"\n", b"", 2).replace(b"--MII", b"--\nII"), "1 of 1"),
    ):
        path.write_bytes(data)
        with pytest.raises(ConfigurationError, match=f"--master-ca: certificate {which} in"):
            check_certificates(str(path), "--master-ca")
        with pytest.raises(ssl.SSLError):
            ssl.create_default_context(cafile=str(path))
    path.write_bytes(bytes(MAX_CERTIFICATES_BYTES + 1))
    with pytest.raises(UnreadableError, match="more than 1048576 bytes"):
        check_certificates(str(path), "--master-ca")


def test_settings_that_do_not_fit_together(tmp_path: Path) -> None:
    ticket = Credentials(tmp_path).ticket
    for name in ("device_id", "device_secret_file", "master_ca"):
        option = name.replace("_", "-")
        given: dict[str, Any] = {name: "x"}
        with pytest.raises(UsageError, match=f"--{option}: only with --master"):
            Settings(ticket, **given)
    with pytest.raises(UsageError, match="--master: a ticket is there, too"):
        Settings(ticket, master="https://master.example")
    with pytest.raises(UsageError, match="no ticket"):
        Client()


# --- the real one ----------------------------------------------------------------------------


def test_rotate_and_revoke_at_the_real_master(
    tmp_path: Path, endpoint: Endpoint, child: None
) -> None:
    with Masters(tmp_path) as masters:
        masters.master()
        relay = masters.relay()
        account = masters.add(HOSTNAME)
        relay.wait_for("revocations")
        client = masters.client(account, endpoint.address, "--reconnect-spread", "0")
        with Device(masters.relay_port, "ECHO") as device:
            device.exchange()
        masters.rotate(account)  # and the file has the new secret
        client.wait_for("the token was revoked")
        client.wait_for("ready: ", 2)
        with Device(masters.relay_port, "ECHO") as device:
            device.exchange()
        masters.device("revoke", account.device_id)
        client.wait_for("the token was revoked", 2)
        client.wait_for("answers 403")
        assert account.credential.partition(".")[2] not in client.output


# --- the program ------------------------------------------------------------------------------


def test_the_program_from_systemd_s_credentials(site: Site, child: None) -> None:
    folder = site.folder / "credentials"
    folder.mkdir()
    (folder / "snitun-device-secret").write_text(site.master.secret_file.read_text())
    (folder / "snitun-ticket").write_text("none")  # of the shipped unit; --master goes before
    environment = {
        "CREDENTIALS_DIRECTORY": str(folder),
        "STATE_DIRECTORY": f"{site.state}:/other",
        "SNITUN_MASTER": site.master.url,
        "SNITUN_MASTER_CA": str(site.master.ca_file),
        "SNITUN_ENDPOINT": site.endpoint.address,
    }
    with Program(*command("snitun_sync.client"), env=environment) as client:
        client.wait_for("ready: ")
        site.exchange()
        wait_until(lambda: site.kept)
        maps = Path(f"/proc/{client.pid}/maps").read_text()
        assert "libssl" not in maps
        assert rss_kib(client.pid) < 30 * 1024
        assert client.stop() == 0, client.output
        assert site.master.secret not in client.output
    shown = command("snitun_sync.client", "show-ticket")
    with Program(*shown, env=environment) as program:
        assert program.wait() == 0
        assert f"hostname: {HOSTNAME}" in program.output
    with Program(*shown, env={**environment, "STATE_DIRECTORY": "/none"}) as program:
        assert program.wait() == 78
        assert "no ticket of this device is kept in /none" in program.output
    asked = len(site.master.requests)
    check = command("snitun_sync.client", "--check")
    with Program(*check, env=environment) as program:
        assert program.wait() == 0
        assert f"master = {site.master.url}   ($SNITUN_MASTER)" in program.output
    site.master.ca_file.write_text("-----BEGIN CERTIFICATE-----\nnone\n")
    with Program(*check, env=environment) as program:
        assert program.wait() == 78
        assert "$SNITUN_MASTER_CA: certificate 1 of 1 in" in program.output
    assert len(site.master.requests) == asked


@pytest.mark.parametrize(
    ("reply", "arguments", "code"),
    [
        (saying(403), ["--exit-on-refusal"], 77),
        (saying(403), ["--once"], 77),
        (saying(401), ["--once"], 77),
        (saying(500), ["--once"], 69),
        (None, ["--token-file", "x"], 64),
        (None, ["--device-secret-file", "/none"], 66),
    ],
)
def test_exit_codes(site: Site, child: None, reply: Any, arguments: list[str], code: int) -> None:
    site.master.reply = reply
    with Program(*site.arguments(*arguments)) as client:
        assert client.wait() == code, client.output


def test_what_is_in_the_client_s_memory(site: Site, child: None) -> None:
    """Neither TLS nor HTTP, nor what starts processes."""
    code = f"""
from snitun_sync.client import Client
with Client(None, **{site.master.options!r}, state_dir={str(site.state)!r}) as client:
    assert client.wait_until_up({WAIT_S})
print(*sys.modules)
"""
    # Without `site`, which loads what it likes.
    code = f"import sys; sys.path[:] = {sys.path!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True
    )
    absent = {"ssl", "http", "http.client", "email", "subprocess", "hashlib", "asyncio", "shutil"}
    assert "snitun_sync.client.master" in done.stdout.split()
    assert not absent & set(done.stdout.split())
