"""From the tunnel to the right endpoint: names, TLS, PROXY protocol, access, health, handlers."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import select
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import pytest
import trustme
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from snitun_sync import options as options_module
from snitun_sync.client import Client, cli
from snitun_sync.client import arrival as arrival_module
from snitun_sync.client import endpoints as endpoints_module
from snitun_sync.client import health as health_module
from snitun_sync.client.settings import EndpointSettings, Settings
from snitun_sync.errors import ConfigurationError, MisuseError, SniTunError, UsageError
from snitun_sync.net import bridge as bridge_module
from snitun_sync.protocol import frame
from snitun_sync.server import Server
from tests.services import Raw, RawRelay, connector, receive_exactly, refusing_port
from tests.support import (
    HOSTNAME,
    MIB,
    WAIT_S,
    Credentials,
    HungEndpoint,
    client_hello,
    pattern,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    Serve = Callable[[socket.socket], object]

AUTHORITY = trustme.CA()
OTHER = "cam.example.test"
HOME = "a.home.example.test"
# Python 3.9 sets it: then an end that was cut looks like a good one.
IGNORE_UNEXPECTED_EOF = 1 << 7
NAMES = (OTHER, HOME, "a.b.home.example.test", "nobody.example.test")


def echo(sock: socket.socket) -> None:
    while data := sock.recv(65536):
        sock.sendall(data)


class Service:
    """A service that calls `serve` for each connection, on a thread of its own."""

    def __init__(self, serve: Serve = echo, port: int = 0) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.accepted = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT_S)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.settimeout(WAIT_S)
                self.accepted += 1
                self._threads.append(threading.Thread(target=self._one, args=(sock,)))
                self._threads[-1].start()

    def _one(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self._serve(sock)


class Site:
    """Our relay and our client, for several names."""

    def __init__(
        self,
        folder: Path,
        endpoint: str | list[str],
        prepare: Callable[[Client], object] = lambda client: None,
        **options: Any,
    ) -> None:
        self.credentials = Credentials(folder, alias=NAMES)
        self.server = Server([self.credentials.fernet_key], ["127.0.0.1:0"]).start()
        self.port = self.server.ports[0]
        self.ticket = self.credentials.at(f"127.0.0.1:{self.port}")
        self.client = Client(self.ticket, endpoint, **options)
        prepare(self.client)
        self.client.start()
        assert self.client.wait_until_up(WAIT_S)

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop()
        self.server.stop()
        assert not self.client.endpoints._stages
        assert not self.client.endpoints._handshakes

    def plain(self, hostname: str = HOSTNAME, data: bytes = b"") -> socket.socket:
        """Connect a device that sends a ClientHello, and then bytes in the clear."""
        sock = socket.create_connection(("127.0.0.1", self.port), WAIT_S)
        sock.sendall(client_hello(hostname) + data)
        return sock

    def tls(self, hostname: str = HOSTNAME, **options: Any) -> ssl.SSLSocket:
        """Connect a device that speaks TLS."""
        sock = socket.create_connection(("127.0.0.1", self.port), WAIT_S)
        context = trusting(**options)
        return context.wrap_socket(sock, server_hostname=hostname, suppress_ragged_eofs=False)


def trusting(maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    context.maximum_version = maximum
    context.set_alpn_protocols(["http/1.1"])
    context.options &= ~IGNORE_UNEXPECTED_EOF
    return context


def write_certificate(path: Path, *names: str) -> str:
    """Write certificate and key to one file, as a whole."""
    new = path.with_suffix(".new")
    new.touch(0o600)
    found = AUTHORITY.issue_cert(*(names or (HOSTNAME, *NAMES)))
    new.write_bytes(found.private_key_and_cert_chain_pem.bytes())
    os.replace(new, path)
    return str(path)


@pytest.fixture
def certificate(tmp_path: Path) -> str:
    return write_certificate(tmp_path / "tls.pem")


# --- names -----------------------------------------------------------------------------------


def found_for(endpoints: list[str], hostname: str, tmp_path: Path) -> str:
    client = Client(Credentials(tmp_path).ticket, endpoints)
    try:
        return str(client.endpoints.find(hostname))
    finally:
        client.stop()


@pytest.mark.parametrize(
    ("hostname", "address"),
    [
        ("cam.example.com", "cam.example.com at 127.0.0.1:1"),
        ("a.example.com", "*.example.com at 127.0.0.1:2"),
        ("a.b.example.com", "127.0.0.1:3"),  # one label only
        ("example.com", "127.0.0.1:3"),
        ("", "127.0.0.1:3"),
        ("*.example.com", "*.example.com at 127.0.0.1:2"),  # what a device makes up
        ("*", "127.0.0.1:3"),
    ],
)
def test_the_most_exact_name_counts(hostname: str, address: str, tmp_path: Path) -> None:
    endpoints = [
        "Cam.Example.COM.=127.0.0.1:1",
        "*.example.com=127.0.0.1:2",
        "*=127.0.0.1:3",
    ]
    assert found_for(endpoints, hostname, tmp_path) == address


def test_a_unix_socket_may_have_an_equals_sign_in_its_path(tmp_path: Path) -> None:
    assert found_for(["unix:/run/a=b"], "x.example", tmp_path) == "unix:/run/a=b"
    said = found_for(["x.example=unix:/run/a=b"], "x.example", tmp_path)
    assert said == "x.example at unix:/run/a=b"


def test_each_name_leads_to_its_own_service(tmp_path: Path) -> None:
    def say(word: bytes) -> Serve:
        def serve(sock: socket.socket) -> None:
            sock.sendall(word)
            echo(sock)

        return serve

    with (
        Service(say(b"any")) as any_one,
        Service(say(b"cam")) as cam,
        Service(say(b"home")) as home,
    ):
        endpoints = [
            any_one.address,
            f"{OTHER}={cam.address}",
            f"*.home.example.test={home.address}",
        ]
        with Site(tmp_path, endpoints) as site:
            for name, word in (
                (HOSTNAME, b"any"),
                (OTHER, b"cam"),
                (HOME, b"home"),
                ("a.b.home.example.test", b"any"),
            ):
                with site.plain(name, b"more") as device:
                    expected = word + client_hello(name) + b"more"
                    assert receive_exactly(device, len(expected)) == expected
            report = site.client.report()["endpoints"]
            assert [(e["names"], e["opened"]) for e in report] == [
                (["*"], 2),
                ([OTHER], 1),
                (["*.home.example.test"], 1),
            ]


def test_a_name_without_an_endpoint_is_closed_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Service() as service, Site(tmp_path, f"{HOSTNAME}={service.address}") as site:
        with site.plain("nobody.example.test") as device:
            assert device.recv(1) == b""
        assert site.client.limits.refused == {"name": 1}
        assert "refused 127.0.0.1: no endpoint for 'nobody.example.test'" in caplog.text
        assert not service.accepted
        with site.plain() as device:  # the others are not to blame
            assert receive_exactly(device, 5) == client_hello(HOSTNAME)[:5]


def test_a_hello_may_come_byte_by_byte(tmp_path: Path) -> None:
    with (
        Service() as service,
        RawRelay(Credentials(tmp_path)) as relay,
        Client(relay.credentials.ticket, f"{HOSTNAME}={service.address}") as client,
        relay.tunnel() as raw,
    ):
        channel = b"a device's chann"
        raw.new(channel)
        sent = client_hello(HOSTNAME) + b"and more"
        for at in range(len(sent)):
            raw.send(frame.DATA, channel, data=sent[at : at + 1])
        received = b""
        while len(received) < len(sent):
            received += raw.receive_flow(frame.DATA)[2]
        assert received == sent
        assert client.endpoints.routes[0].opened == 1


def test_what_is_no_hello_is_closed_at_once_and_what_is_none_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        RawRelay(Credentials(tmp_path)) as relay,
        Client(relay.credentials.ticket, f"{HOSTNAME}=127.0.0.1:1") as client,
        relay.tunnel() as raw,
    ):
        for number, data in enumerate((b"GET / HTTP/1.1\r\n", b"", client_hello(HOSTNAME)[:-1])):
            channel = bytes([number]) * 16
            monkeypatch.setattr(arrival_module, "HANDSHAKE_S", 0.2 if number else WAIT_S)
            raw.new(channel)
            if data:
                raw.send(frame.DATA, channel, data=data)
            assert raw.receive_flow(frame.CLOSE)[0] == channel
        assert client.limits.refused == {"hello": 3}
        assert "192.0.2.1: no TLS handshake record: type 71" in caplog.text
        assert caplog.text.count("192.0.2.1: no whole ClientHello within 0 s") == 2
        monkeypatch.setattr(arrival_module, "HANDSHAKE_S", WAIT_S)
        raw.new(b"one who goes ...")
        raw.send(frame.DATA, b"one who goes ...", data=client_hello(HOSTNAME)[:99])
        raw.send(frame.CLOSE, b"one who goes ...")
        wait_until(lambda: not client.bridges.all)
        assert client.limits.refused == {"hello": 3}  # that is its right


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"endpoint": "a b=127.0.0.1:1"}, UsageError, "--endpoint: 'a b' is no name; expected HOS"),
        ({"endpoint": "*.*.a=127.0.0.1:1"}, UsageError, "--endpoint: '*.*.a' is no name; expected"),
        ({"endpoint": "a.example="}, UsageError, "--endpoint: no host in ''; expected HOST"),
        ({"endpoint": "a=127.0.0.1"}, UsageError, "--endpoint: no port in '127.0.0.1'; expected"),
        (
            {"endpoint": ["a=127.0.0.1:1", "A.=127.0.0.1:2"]},
            UsageError,
            "--endpoint: a leads to 127.0.0.1:1 already, and here to 127.0.0.1:2; expected one",
        ),
        ({"tls_key": "x"}, UsageError, "--tls-key: only with --tls-cert"),
        (
            {"endpoint": [], "tls_cert": "x"},
            UsageError,
            "--tls-cert: only with --endpoint; a section has its own",
        ),
        ({"tls_alpn": "h2"}, UsageError, "--tls-alpn: only with --tls-cert"),
        (
            {"tls_cert": "x", "tls_alpn": "h2,,http/1.1"},
            UsageError,
            "--tls-alpn: 'h2,,http/1.1'; expected names such as h2,http/1.1",
        ),
        ({"proxy_protocol": "v3"}, UsageError, "--proxy-protocol: 'v3'; expected v1 or v2"),
        ({"health_path": "/a"}, UsageError, "--health-path: only with --health-interval"),
        (
            {"health_interval_s": 9, "health_path": "a b"},
            UsageError,
            "--health-path: 'a b'; expected a path such as /health",
        ),
        ({"health_interval_s": 0.5}, UsageError, "--health-interval: 0.5 seconds; expected 1 to"),
        ({"connect_timeout_s": 0}, UsageError, "--connect-timeout: 0 seconds; expected 0.1 to 300"),
        ({"acme_endpoint": "x"}, UsageError, "--acme-endpoint: no port in 'x'; expected HOST:PORT"),
        ({"tls_cert": "/none"}, ConfigurationError, "--tls-cert: can't read /none: No such file"),
        ({"allow": ["10.0.0.1/8"]}, UsageError, "--allow: "),
        ({"block_file": "/none"}, ConfigurationError, "--block-file: can't read /none: No such"),
    ],
)
def test_settings_that_are_wrong_are_named(
    options: dict[str, Any], error: type[SniTunError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as raised:
        Settings(Credentials(tmp_path).ticket, **options)
    assert str(raised.value).startswith(said)


def test_settings_of_one_endpoint_name_their_source() -> None:
    with pytest.raises(ConfigurationError, match=r"^\[endpoint a\] proxy-protocol: 'v9'; expected"):
        EndpointSettings("127.0.0.1:1", "a", proxy_protocol="v9", source="[endpoint a] ")


INI = """\
[client]
token-file = {ticket}
{client}

[endpoint *.home.example.test {other}]
{section}
"""


def from_file(folder: Path, section: str, client: str = "") -> Settings:
    ticket, ini = folder / "ticket", folder / "snitun.ini"
    ticket.touch(0o600)
    ticket.write_text(Credentials(folder).ticket.to_json())
    ini.write_text(INI.format(ticket=ticket, client=client, other=OTHER, section=section))
    with pytest.MonkeyPatch.context() as patch:
        # The log would be set up for all tests behind this one.
        patch.setattr(options_module, "set_up_logging", lambda *_: None)
        with cli.parser().read(["--config", str(ini)]) as options:
            lines = [line for line in options.lines() if "[endpoint" in line]
            assert len(lines) == (len(section.split("\n")) if section else 0)
            return Settings(**cli._settings(options))


def test_sections_for_endpoints(tmp_path: Path) -> None:
    section = "address = unix:/run/a\nproxy-protocol = v2\nhealth-interval = 1m"
    only = from_file(tmp_path, section).endpoints
    assert [str(endpoint) for endpoint in only] == [
        "*.home.example.test, cam.example.test at unix:/run/a"
    ]
    assert (only[0].proxy_version, only[0].health_interval_s) == (2, 60)
    with_default = from_file(tmp_path, section, "endpoint = 127.0.0.1:1\n  b=127.0.0.1:2").endpoints
    assert [endpoint.names[0] for endpoint in with_default] == ["*", "b", "*.home.example.test"]
    assert with_default[0].proxy_version == 0  # a section stands for itself, and so do the others


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("", "no address; expected address = HOST:PORT or unix:/PATH"),
        ("address = nowhere", "address: no port in 'nowhere'; expected HOST:PORT"),
        ("adress = a:1", "adress: no such option; did you mean address?"),
        ("address = a:1\ntls-key = x", "tls-key: only with tls-cert"),
        ("address = a:1\nhealth-interval = soon", "health-interval: 'soon'; expected seconds"),
        ("address = a:1\nhealth-interval = 0.1", "health-interval: 0.1 seconds; expected 1 to"),
        ("address = a:1\nproxy-protocol = v3", "proxy-protocol: invalid choice: 'v3'"),
        ("address = a:1\ntls-cert = /none", "tls-cert: can't read /none: No such file"),
        ("address = a:1\nlisten = a:1", "listen: no such option; expected one of address"),
    ],
)
def test_a_section_that_is_wrong_is_named(section: str, said: str, tmp_path: Path) -> None:
    place = f"{tmp_path}/snitun.ini: [endpoint *.home.example.test {OTHER}]"
    with pytest.raises(ConfigurationError) as raised:
        from_file(tmp_path, section)
    assert str(raised.value).replace("]: no a", "] no a").startswith(f"{place} {said}")
    assert not isinstance(raised.value, UsageError)


# --- TLS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_ends_in_the_client(tmp_path: Path, certificate: str, version: ssl.TLSVersion) -> None:
    with Service() as service, Site(tmp_path, service.address, tls_cert=certificate) as site:
        with site.tls(maximum=version) as device:
            for at in range(0, 8 * MIB, 512 * 1024):  # not by two threads: OpenSSL can't
                data = pattern(at, 512 * 1024)
                device.sendall(data)
                assert receive_exactly(device, len(data)) == data
            assert device.version() == {"TLSv1_2": "TLSv1.2"}.get(version.name, "TLSv1.3")
        wait_until(lambda: not site.client.bridges.all and not site.server.bridges.all)
        assert not site.client.bridges.early_bytes


def test_both_sides_may_end_first(tmp_path: Path, certificate: str) -> None:
    def greet(sock: socket.socket) -> None:
        sock.sendall(b"bye")

    def answer(sock: socket.socket) -> None:
        question = b"".join(iter(lambda: sock.recv(65536), b""))  # until the device ends
        sock.sendall(b"you said " + question)

    with Service(greet) as service, Site(tmp_path, service.address, tls_cert=certificate) as site:
        with site.tls() as device:
            assert receive_exactly(device, 3) == b"bye"
            assert device.recv(1) == b""  # close_notify: a cut is an error here
    with Service(answer) as service, Site(tmp_path, service.address, tls_cert=certificate) as site:
        with site.tls() as device:
            device.sendall(b"hello")
            # `unwrap` sends close_notify, and waits for the other side's.
            with pytest.raises(ssl.SSLError, match="APPLICATION_DATA_AFTER_CLOSE_NOTIFY"):
                device.unwrap()


def test_a_slow_service_holds_up_the_device_not_the_memory(
    tmp_path: Path, certificate: str
) -> None:
    go_on = threading.Event()
    received = hashlib.sha256()

    def slow(sock: socket.socket) -> None:
        assert go_on.wait(WAIT_S)
        while data := sock.recv(65536):
            received.update(data)

    data = pattern(0, 24 * MIB)
    with Service(slow) as service, Site(tmp_path, service.address, tls_cert=certificate) as site:
        with site.tls() as device:
            sender = threading.Thread(target=device.sendall, args=(data,))
            sender.start()
            held = site.client.bridges
            wait_until(lambda: held.held_bytes > 0)
            wait_until(lambda: any(b.channel.has_paused_peer for b in tuple(held.all)))
            assert held.held_bytes < 8 * MIB
            go_on.set()
            sender.join(WAIT_S)
            device.unwrap()  # the service has read it all
    assert received.digest() == hashlib.sha256(data).digest()


def test_a_broken_record_ends_that_connection_with_an_alert(
    tmp_path: Path, certificate: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Service() as service, Site(tmp_path, service.address, tls_cert=certificate) as site:
        with site.tls() as device:
            device.sendall(b"fine")
            assert receive_exactly(device, 4) == b"fine"
            os.write(device.fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
            with pytest.raises(ssl.SSLError, match=r"(?i)bad.record.mac"):
                device.recv(1)
        wait_until(lambda: not site.client.bridges.all)
    assert "TLS: decryption failed or bad record mac" in caplog.text


def test_handshakes_that_fail_or_never_end(
    tmp_path: Path,
    certificate: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(endpoints_module, "MAX_HANDSHAKES", 3)
    with Service() as service, Site(tmp_path, service.address, tls_cert=certificate) as site:
        client = site.client
        context = ssl.create_default_context()  # it doesn't know the authority
        with pytest.raises(ssl.SSLCertVerificationError):
            sock = socket.create_connection(("127.0.0.1", site.port), WAIT_S)
            with sock, context.wrap_socket(sock, server_hostname=HOSTNAME):
                pass
        wait_until(lambda: client.limits.refused == {"tls": 1})
        assert "TLS handshake: tlsv1 alert unknown ca" in caplog.text
        with contextlib.ExitStack() as end:
            waiting = [end.enter_context(site.plain()) for _ in range(3)]
            wait_until(lambda: len(client.endpoints._handshakes) == 3)
            with site.tls() as device:  # one more: the oldest goes
                device.sendall(b"here")
                assert receive_exactly(device, 4) == b"here"
            while waiting[0].recv(65536):
                pass  # the server's part of the handshake, then the end
            assert client.limits.refused == {"tls": 1, "handshakes": 1}
        assert service.accepted == 1  # nobody else has got as far as that
        wait_until(lambda: not client.bridges.all)
        assert not client.endpoints._handshakes
        monkeypatch.setattr(arrival_module, "HANDSHAKE_S", 0.2)
        with site.plain() as device:
            while device.recv(65536):
                pass
        assert "no whole TLS handshake within 0 s" in caplog.text


class ByHand:
    """A device that speaks TLS 1.3 through a relay by hand, and makes its records itself."""

    def __init__(self, raw: Raw, folder: Path) -> None:
        context = trusting()
        context.keylog_filename = str(folder / "keys")
        self._raw, self.channel = raw, os.urandom(16)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._device = context.wrap_bio(self._incoming, self._outgoing, server_hostname=HOSTNAME)
        raw.new(self.channel)
        self._shake()
        self.send(self._outgoing.read())
        self._shake()
        self.rest = self._outgoing.read()
        """The end of the handshake, which isn't sent yet."""
        lines = (folder / "keys").read_text().split("CLIENT_TRAFFIC_SECRET_0 ")
        self._use(bytes.fromhex(lines[-1].split()[1]))

    def _shake(self) -> None:
        while True:
            try:
                self._device.do_handshake()
                return
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    return
                self._incoming.write(self._raw.receive_flow(frame.DATA)[2])

    def send(self, data: bytes) -> None:
        self._raw.send(frame.DATA, self.channel, data=data)

    def _expand(self, label: bytes, size: int) -> bytes:
        """RFC 8446, 7.1."""
        info = size.to_bytes(2, "big") + bytes([6 + len(label)]) + b"tls13 " + label + b"\0"
        return HKDFExpand(hashes.SHA384(), size, info).derive(self._secret)

    def _use(self, secret: bytes) -> None:
        self._secret, self._count = secret, 0
        self._key, self._iv = AESGCM(self._expand(b"key", 32)), self._expand(b"iv", 12)

    def record(self, kind: int, data: bytes) -> bytes:
        """RFC 8446, 5.2: for TLS_AES_256_GCM_SHA384, OpenSSL's first choice."""
        header = b"\x17\x03\x03" + (len(data) + 17).to_bytes(2, "big")
        nonce = int.from_bytes(self._iv, "big") ^ self._count
        self._count += 1
        sealed = self._key.encrypt(nonce.to_bytes(12, "big"), data + bytes([kind]), header)
        return header + sealed

    def ask_for_new_keys(self) -> bytes:
        """KeyUpdate, update_requested (RFC 8446, 4.6.3); the device's own keys change with it."""
        record = self.record(22, b"\x18\0\0\x01\x01")
        self._use(self._expand(b"traffic upd", 48))
        return record


@pytest.fixture
def raw_site(tmp_path: Path, certificate: str) -> Iterator[tuple[Raw, Client]]:
    """A relay by hand; TLS ends in the client, for an endpoint that echoes."""
    with (
        Service() as service,
        RawRelay(Credentials(tmp_path)) as relay,
        Client(relay.credentials.ticket, service.address, tls_cert=certificate) as client,
        relay.tunnel() as raw,
    ):
        yield raw, client
        assert client.tunnel is not None  # which no device may end
        assert client.attempts == 1


def test_a_device_may_say_one_thing_and_go(
    tmp_path: Path, certificate: str, raw_site: tuple[Raw, Client]
) -> None:
    """What comes with the handshake's last bytes, and CLOSE with it, is for the service."""
    heard = []

    def hear(sock: socket.socket) -> None:
        heard.append(b"".join(iter(lambda: sock.recv(65536), b"")))

    raw, client = raw_site
    with Service(hear) as service:
        settings = Settings(client.settings.ticket, service.address, tls_cert=certificate)
        client.reconfigure(settings)
        wait_until(lambda: client.settings is settings)
        for is_whole in (True, False):
            device = ByHand(raw, tmp_path)
            said = device.rest + device.record(23, b"one thing")
            frames: list[bytes] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(raw, "_send", frames.append)
                device.send(said if is_whole else said[:-1])
                raw.send(frame.CLOSE, device.channel)
            raw.sock.sendall(b"".join(frames))
            wait_until(lambda: not client.bridges.all)
        wait_until(lambda: heard == [b"one thing"])
        assert (service.accepted, client.bridges.early_bytes) == (1, 0)


def test_a_message_of_tls_that_is_left_half_sent_ends_that_device(
    tmp_path: Path, raw_site: tuple[Raw, Client], caplog: pytest.LogCaptureFixture
) -> None:
    raw, client = raw_site
    device = ByHand(raw, tmp_path)
    device.send(device.rest + device.record(23, b"x") + device.record(22, b"\x18\0\0\x01"))
    assert raw.receive_flow(frame.CLOSE)[0] == device.channel
    wait_until(lambda: not client.bridges.all)
    assert "defect" not in caplog.text


def test_a_device_that_asks_for_ever_and_reads_nothing(
    tmp_path: Path,
    raw_site: tuple[Raw, Client],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(bridge_module, "HIGH_WATERMARK_BYTES", 4096)
    raw, client = raw_site
    device = ByHand(raw, tmp_path)
    device.send(device.rest)
    raw.send(frame.PAUSE, device.channel)
    for _ in range(200):
        device.send(device.ask_for_new_keys())
    assert raw.receive_flow(frame.CLOSE)[0] == device.channel
    wait_until(lambda: not client.bridges.all)
    assert "the device asks by TLS for ever, and reads nothing" in caplog.text
    assert not client.bridges.early_bytes


def test_a_handshake_that_waits_for_its_turn_and_is_resumed(tmp_path: Path) -> None:
    """It has no socket yet, and nothing more to send when its turn comes."""
    path, pings = write_certificate(tmp_path / "tls.pem"), []
    with (
        Service(lambda sock: sock.sendall(bytes(16 * MIB))) as service,
        RawRelay(Credentials(tmp_path)) as relay,
        Client(
            relay.credentials.ticket,
            f"{OTHER}={service.address}",
            endpoints=[EndpointSettings(service.address, HOSTNAME, tls_cert=path)],
        ) as client,
        relay.tunnel() as raw,
    ):
        busy, late = b"a long download.", b"the one that res"
        raw.new(busy)
        raw.send(frame.DATA, busy, data=client_hello(OTHER))
        tunnel = client.tunnel
        assert tunnel is not None

        def is_full() -> bool:
            """Read until nothing comes any more; none of the PINGs is answered."""
            while select.select([raw.sock], [], [], 0)[0] or len(raw._buffer) > 64:
                channel_id, flow, _, _ = raw.receive()
                if flow == frame.PING:
                    pings.append(channel_id)
            return bool(tunnel.mux.unconfirmed_bytes >= tunnel._in_flight_limit)

        wait_until(is_full)
        raw.new(late)
        raw.send(frame.DATA, late, data=client_hello(HOSTNAME))
        wait_until(lambda: is_full() and client.bridges.early_bytes)
        frames: list[bytes] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(raw, "_send", frames.append)
            raw.send(frame.PAUSE, busy)
            for ping in pings:
                raw.send(frame.PING, ping, b"pong")
            raw.send(frame.RESUME, late)
        raw.sock.sendall(b"".join(frames))
        channel_id = b""
        while channel_id != late:
            channel_id, _, data = raw.receive_flow(frame.DATA)
        assert data.startswith(b"\x16\x03\x03")  # ServerHello
        wait_until(lambda: not tunnel.mux.has_turns)
        assert not client.bridges.early_bytes
        assert client.tunnel is tunnel


def test_a_hello_in_two_parts_while_others_hold_much(tmp_path: Path) -> None:
    """Who hasn't got as far as its endpoint isn't paused for what the others hold."""
    with (
        Service() as service,
        RawRelay(Credentials(tmp_path)) as relay,
        Client(relay.credentials.ticket, f"{HOSTNAME}={service.address}") as client,
        relay.tunnel() as raw,
    ):
        client.bridges.is_pressed = True  # no change of what is held tells otherwise
        client.bridges.limit_bytes = 1000
        channel, hello = b"a device's chann", client_hello(HOSTNAME)
        frames: list[bytes] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(raw, "_send", frames.append)
            raw.new(channel)
            raw.send(frame.DATA, channel, data=hello[:450])
        raw.sock.sendall(b"".join(frames))
        assert raw.receive_flow(frame.PAUSE)[0] == channel
        assert raw.receive_flow(frame.RESUME)[0] == channel
        raw.send(frame.DATA, channel, data=hello[450:])
        received = b""
        while len(received) < len(hello):
            received += raw.receive_flow(frame.DATA)[2]
        assert received == hello


# --- certificates that change ----------------------------------------------------------------


def shown(site: Site, hostname: str = HOSTNAME) -> bytes:
    """Return the certificate that a device sees."""
    with site.tls(hostname) as device:
        found = device.getpeercert(binary_form=True)
        assert found is not None
        return found


def failure_of(site: Site) -> str:
    certificate = site.client.endpoints.routes[0].certificate
    assert certificate is not None
    return certificate.failure


def test_a_certificate_is_exchanged_while_connections_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(endpoints_module, "WATCH_S", 0.05)
    caplog.set_level(logging.INFO)
    path = tmp_path / "tls.pem"
    with Service() as service:
        with Site(tmp_path, service.address, tls_cert=write_certificate(path)) as site:
            first = shown(site)
            with site.tls() as device:
                write_certificate(path)
                wait_until(lambda: "another certificate counts from now on" in caplog.text)
                second = shown(site)
                assert second != first
                path.write_text("nothing of the kind")
                wait_until(lambda: "the former one stays" in caplog.text)
                said = f"--tls-cert: no certificate in {path}; expected PEM, with -----BEGIN CERT"
                assert said in caplog.text
                assert shown(site) == second
                assert not site.client.ready()  # devices get through
                assert said in site.client.report()["endpoints"][0]["certificate"]["failure"]
                # Settings that are read again are another way to find the same out.
                with pytest.raises(ConfigurationError, match="no certificate in"):
                    Settings(site.ticket, service.address, tls_cert=str(path))
                write_certificate(path)
                wait_until(lambda: not failure_of(site))
                assert shown(site) not in (first, second)
                device.sendall(b"still here")
                assert receive_exactly(device, 10) == b"still here"
            assert caplog.text.count("the former one stays") == 1


def test_the_first_certificate_may_come_later_where_acme_can_bring_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(endpoints_module, "WATCH_S", 0.05)
    path = tmp_path / "tls.pem"

    def authority(sock: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        AUTHORITY.issue_cert(HOSTNAME).configure_cert(context)
        context.set_alpn_protocols(["acme-tls/1"])
        with context.wrap_socket(sock, server_side=True) as secured:
            secured.sendall(b"the challenge's certificate")

    with Service() as service, Service(authority) as acme:
        options: dict[str, Any] = {"tls_cert": str(path), "acme_endpoint": acme.address}
        with Site(tmp_path, service.address, **options) as site:
            said = f"--tls-cert: can't read {path}: No such file or directory"
            assert f"{said}; until that has changed, no device gets through" in caplog.text
            assert site.client.ready() == f"endpoint down: {said}"
            with site.plain() as device:
                assert device.recv(1) == b""
            context = trusting()
            context.set_alpn_protocols(["acme-tls/1"])
            sock = socket.create_connection(("127.0.0.1", site.port), WAIT_S)
            with context.wrap_socket(sock, server_hostname=HOSTNAME) as device:
                assert receive_exactly(device, 13) == b"the challenge"
            write_certificate(path)
            wait_until(lambda: not site.client.ready())
            with site.tls() as device:
                device.sendall(b"here")
                assert receive_exactly(device, 4) == b"here"
            assert (service.accepted, acme.accepted) == (1, 1)


def test_a_reload_keeps_the_certificate_that_works(
    tmp_path: Path, certificate: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Service() as service, Service() as acme:
        options: dict[str, Any] = {"tls_cert": certificate, "acme_endpoint": acme.address}
        with Site(tmp_path, service.address, **options) as site:
            first = shown(site)
            Path(certificate).unlink()
            site.client.reconfigure(Settings(site.ticket, service.address, **options))
            wait_until(lambda: failure_of(site))
            assert not site.client.ready()
            assert shown(site) == first
            assert f"can't read {certificate}: No such file or directory; the former" in caplog.text


# --- the PROXY protocol, access lists ------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "device", "header"),
    [
        ("v1", bytes([192, 0, 2, 1]), b"PROXY TCP4 192.0.2.1 0.0.0.0 0 443\r\n"),
        ("v1", bytes(4), b"PROXY UNKNOWN\r\n"),
        ("v2", bytes([192, 0, 2, 1]), b"\r\n\r\n\0\r\nQUIT\n\x21\x11"),
        ("v2", bytes(4), b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"),
    ],
)
def test_the_service_learns_the_device_s_address(
    version: str, device: bytes, header: bytes, tmp_path: Path
) -> None:
    with (
        Service() as service,
        RawRelay(Credentials(tmp_path)) as relay,
        Client(relay.credentials.ticket, service.address, proxy_protocol=version),
        relay.tunnel() as raw,
    ):
        channel = b"a device's chann"
        raw.new(channel, device)
        raw.send(frame.DATA, channel, data=client_hello(HOSTNAME))
        received = b""
        while not received.endswith(client_hello(HOSTNAME)):
            received += raw.receive_flow(frame.DATA)[2]
        assert received.startswith(header)
        if header.endswith(b"\x21\x11"):
            assert HOSTNAME.encode() in received[: -len(client_hello(HOSTNAME))]
            assert channel.hex().encode() in received


def test_who_is_not_let_in_is_closed_and_the_list_can_be_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = tmp_path / "blocked"
    listed.write_text("# nobody yet\n")
    with (
        Service() as service,
        RawRelay(Credentials(tmp_path)) as relay,
        Client(relay.credentials.ticket, service.address, block_file=str(listed)) as client,
        relay.tunnel() as raw,
    ):
        raw.new(b"the one that stays"[:16])
        raw.send(frame.DATA, b"the one that stays"[:16], data=b"hello")
        assert raw.receive_flow(frame.DATA)[2] == b"hello"
        listed.write_text("192.0.2.0/24\n")
        settings = Settings(relay.credentials.ticket, service.address, block_file=str(listed))
        client.reconfigure(settings)
        wait_until(lambda: client.settings is settings)
        raw.new(b"another one ....")
        assert raw.receive_flow(frame.CLOSE)[0] == b"another one ...."
        raw.new(b"unknown address.", bytes(4))
        assert raw.receive_flow(frame.CLOSE)[0] == b"unknown address."
        assert client.limits.refused == {"access": 2}
        assert "refused 192.0.2.1: in --block 192.0.2.0/24" in caplog.text
        assert "refused 0.0.0.0: its address is unknown" in caplog.text
        raw.send(frame.DATA, b"the one that stays"[:16], data=b"still")
        assert raw.receive_flow(frame.DATA)[2] == b"still"


def test_many_refusals_have_few_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        RawRelay(Credentials(tmp_path)) as relay,
        Client(relay.credentials.ticket, "127.0.0.1:1", allow=["::1"]) as client,
        relay.tunnel() as raw,
    ):
        for number in range(100):
            raw.new(number.to_bytes(16, "big"))
        wait_until(lambda: client.limits.refused == {"access": 100})
    assert caplog.text.count("refused 192.0.2.1: not in --allow") == 20


# --- health --------------------------------------------------------------------------------------


def test_ready_tells_an_endpoint_that_is_down_from_a_tunnel_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health_module, "AGAIN_S", 0.05)
    caplog.set_level(logging.INFO)
    with refusing_port() as port:
        site = Site(tmp_path, f"127.0.0.1:{port}", health_interval_s=1)
        down = f"endpoint down: can't reach endpoint 127.0.0.1:{port}: Connection refused"
        wait_until(lambda: site.client.ready() == down)
        assert site.client.state.value == "up"
        assert site.client.report()["endpoints"][0]["health"]["failure"] == down[15:]
        with site.plain() as device:
            assert device.recv(1) == b""
    with site, Service(port=port):
        wait_until(lambda: not site.client.ready())
        wait_until(lambda: f"endpoint 127.0.0.1:{port} is there again" in caplog.text)
        site.server.stop()
        wait_until(lambda: site.client.ready().startswith("no tunnel: "))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.0 302 Found\r\n\r\n", ""),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "GET /health?x: it answers 503"),
        (b"SSH-2.0\r\n", "GET /health?x: it answers no HTTP/1.1"),
        (b"", "GET /health?x: it answers no HTTP/1.1"),
        (b"x" * 5000, "GET /health?x: it answers no HTTP/1.1"),
        (None, "GET /health?x: no answer within 1 s"),
    ],
)
def test_health_over_http(answer: bytes | None, said: str, tmp_path: Path) -> None:
    asked = []
    over = threading.Event()

    def serve(sock: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += receive_exactly(sock, 1)
        asked.append(head)
        if answer is None:
            over.wait(WAIT_S)
        else:
            sock.sendall(answer)

    with Service(serve) as service:
        client = Client(
            Credentials(tmp_path).ticket,
            service.address,
            health_interval_s=60,
            health_path="/health?x",
            connect_timeout_s=1 if answer is None else 10,
            proxy_protocol="v1",
        )
        health = client.endpoints.routes[0].health
        assert health is not None
        assert health.failure == f"endpoint {service.address} is not checked yet"
        with client:
            wait_until(lambda: health.checked_at)
            assert health.failure == (said and f"endpoint {service.address}: {said}")
            over.set()
    head = (
        b"PROXY UNKNOWN\r\nGET /health?x HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    )
    assert asked[0] == head


def test_after_an_endpoint_was_silent_others_don_t_wait_for_it(tmp_path: Path) -> None:
    with (
        HungEndpoint() as endpoint,
        RawRelay(Credentials(tmp_path)) as relay,
        Client(relay.credentials.ticket, endpoint.address, connect_timeout_s=0.5) as client,
        relay.tunnel() as raw,
    ):
        raw.new(b"the first waits.")
        assert raw.receive_flow(frame.CLOSE)[0] == b"the first waits."
        to_service = connector(client)
        assert to_service.failures == 1
        to_service._silent_until += WAIT_S  # so that the rest can't depend on time
        raw.new(b"the second doesn")
        assert raw.receive_flow(frame.CLOSE)[0] == b"the second doesn"
        assert to_service.failures == 1  # it wasn't even tried
        to_service._silent_until = time.monotonic() - WAIT_S
        raw.new(b"the third does..")
        wait_until(lambda: to_service._opening)


# --- in this process ---------------------------------------------------------------------------


def test_a_handler_talks_to_devices(
    tmp_path: Path, certificate: str, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(connection: socket.socket, address: str) -> None:
        if connection.recv(5) == b"break":
            raise RuntimeError("on purpose")
        connection.sendall(address.encode())

    def prepare(client: Client) -> None:
        client.serve(handler, OTHER, tls_cert=certificate)
        client.serve(lambda connection, address: echo(connection))

    with Site(tmp_path, [], prepare) as site:
        with site.tls(OTHER) as device:
            device.sendall(b"hello")
            assert receive_exactly(device, 9) == b"127.0.0.1"
            assert device.recv(1) == b""
        with site.plain() as other:  # TLS as the device sends it
            assert receive_exactly(other, len(client_hello(HOSTNAME))) == client_hello(HOSTNAME)
        with site.tls(OTHER) as device:
            device.sendall(b"break")
            with pytest.raises((ConnectionError, ssl.SSLError)):
                device.recv(1)  # cut, which is no good end
        assert "RuntimeError: on purpose" in caplog.text
        with site.tls(OTHER) as device:
            device.sendall(b"hello")
            assert receive_exactly(device, 9) == b"127.0.0.1"
        site.client.reconfigure(Settings(site.ticket, "127.0.0.1:1"))
        with site.plain() as other:  # settings don't change what is within the program
            assert receive_exactly(other, len(client_hello(HOSTNAME))) == client_hello(HOSTNAME)


def test_how_serve_can_be_called_wrongly(tmp_path: Path) -> None:
    with Site(tmp_path, "127.0.0.1:1") as site:
        with pytest.raises(MisuseError, match="the client runs already"):
            site.client.serve(print)
    with pytest.raises(ConfigurationError, match=r"^threads: 0 threads; expected 1 to "):
        site.client.serve(print, threads=0)
    with pytest.raises(ConfigurationError, match=r"^waiting: -1 connections; expected 0 to "):
        site.client.serve(print, waiting=-1)


def test_a_wsgi_application_is_served(tmp_path: Path, certificate: str) -> None:
    def app(environ: dict[str, Any], start: Callable[..., object]) -> list[bytes]:
        start("200 OK", [("Content-Type", "text/plain")])
        return [f"{environ['wsgi.url_scheme']} {environ['REMOTE_ADDR']}".encode()]

    with Site(tmp_path, [], lambda client: client.serve_wsgi(app, tls_cert=certificate)) as site:
        connection = http.client.HTTPSConnection(HOSTNAME)
        connection.sock = site.tls()
        for _ in range(3):
            connection.request("GET", "/")
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"https 127.0.0.1")
        connection.close()
        assert site.client.endpoints.routes[0].opened == 1


@contextlib.contextmanager
def small_pool(folder: Path, certificate: str, gate: threading.Event) -> Iterator[Site]:
    def handler(connection: socket.socket, address: str) -> None:
        connection.sendall(connection.recv(9))
        gate.wait(WAIT_S)

    def prepare(client: Client) -> None:
        client.serve(handler, threads=2, waiting=2, tls_cert=certificate)

    with Site(folder, [], prepare) as site:
        yield site


def test_more_devices_than_threads(tmp_path: Path, certificate: str) -> None:
    gate = threading.Event()
    with small_pool(tmp_path, certificate, gate) as site, contextlib.ExitStack() as end:
        devices = [end.enter_context(site.tls()) for _ in range(4)]
        for number, device in enumerate(devices):
            device.sendall(b"device %02d" % number)
        for number in range(2):
            assert receive_exactly(devices[number], 9) == b"device %02d" % number
        with pytest.raises((ConnectionError, ssl.SSLError)), site.tls() as fifth:
            fifth.recv(1)
        gate.set()
        for number in range(2, 4):
            assert receive_exactly(devices[number], 9) == b"device %02d" % number
        assert site.client.report()["endpoints"][0]["failures"] == 1
