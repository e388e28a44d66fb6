"""Certificates by ACME: pebble as the authority, lego on the appliance."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trustme

from tests.appliance import DOMAIN, Web, appliance, find, listens
from tests.support import (
    WAIT_S,
    Credentials,
    Program,
    client,
    free_port,
    in_threads,
    relay,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = f"acme.{DOMAIN}"


@dataclass
class Acme:
    """pebble: an authority that gives certificates by ACME (RFC 8555), for tests."""

    folder: Path
    directory: str
    trusted: Path
    """Who signed the certificate of pebble's own page."""
    roots: str

    def root(self) -> Path:
        """Write who signs the certificates that it gives to a file; return its path."""
        path = self.folder / "root.pem"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.trusted)
        host, _, port = self.roots.partition(":")
        page = http.client.HTTPSConnection(host, int(port), timeout=WAIT_S, context=context)
        with contextlib.closing(page):
            page.request("GET", "/roots/0")
            path.write_bytes(page.getresponse().read())
        return path

    def lego(self, hostname: str, port: int, *command: str) -> None:
        """Let lego get a certificate by TLS-ALPN-01, while it listens on `port`."""
        arguments: tuple[str | Path, ...] = (
            *("--accept-tos", "--email", f"admin@{hostname}", "--domains", hostname),
            *("--server", self.directory, "--path", self.folder / "lego"),
            *("--tls", "--tls.port", f"127.0.0.1:{port}", *command),
        )
        env = {"LEGO_CA_CERTIFICATES": str(self.trusted)}
        with Program(find("lego"), *arguments, env=env) as program:
            assert program.wait(60) == 0, program.output

    def files(self, hostname: str) -> tuple[Path, Path]:
        """Return where lego puts the certificate and its key."""
        folder = self.folder / "lego" / "certificates"
        return folder / f"{hostname}.crt", folder / f"{hostname}.key"


@dataclass
class Outcome:
    """What came of certificates that were renewed while devices went on."""

    certificates: int
    requests: int
    took_s: float


@contextlib.contextmanager
def acme(folder: Path, port: int) -> Iterator[Acme]:
    """Run pebble; it finds every hostname at `port` of this machine, as others do at 443."""
    pebble, names = find("pebble"), find("pebble-challtestsrv")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "pebble-authority.pem"))
    own = authority.issue_cert("127.0.0.1")
    own.private_key_pem.write_to_path(str(folder / "pebble.key"))
    own.cert_chain_pems[0].write_to_path(str(folder / "pebble.crt"))
    api, management, dns, control = (free_port() for _ in range(4))
    (folder / "pebble.json").write_text(
        f"""{{"pebble": {{
            "listenAddress": "127.0.0.1:{api}", "managementListenAddress": "127.0.0.1:{management}",
            "certificate": "{folder}/pebble.crt", "privateKey": "{folder}/pebble.key",
            "httpPort": 1, "tlsPort": {port}
        }}}}"""
    )
    # It asks again for each certificate, and without its usual pause.
    env = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_AUTHZREUSE": "0"}
    resolver = (names, "-defaultIPv4", "127.0.0.1", "-defaultIPv6", "", "-dns01")
    others = ("-http01", "", "-https01", "", "-tlsalpn01", "")
    config = ("-config", folder / "pebble.json", "-dnsserver", f"127.0.0.1:{dns}")
    with (
        Program(*resolver, f"127.0.0.1:{dns}", *others, "-management", f"127.0.0.1:{control}"),
        Program(pebble, *config, env=env),
    ):
        for listener in (api, management, control):
            wait_until(lambda listener=listener: listens(listener), "pebble")  # type: ignore[misc]
        yield Acme(
            folder,
            f"https://127.0.0.1:{api}/dir",
            folder / "pebble-authority.pem",
            f"127.0.0.1:{management}",
        )


def renewed_in_use(folder: Path, renewals: int, pause_s: float, devices: int) -> Outcome:
    """Get a certificate through the tunnel where there is none, then renew it again and again.

    Meanwhile `devices` ask for the page, each with `pause_s` seconds between two requests, half of
    them on a connection that stays. Raises what any of them runs into.
    """
    credentials = Credentials(folder, hostname=NAME)
    answering = free_port()  # where lego listens, while it has to
    requests = [0] * devices
    with contextlib.ExitStack() as stack:
        rig = stack.enter_context(appliance(folder))
        server, port = relay(credentials)
        stack.enter_context(server)
        credentials.at(f"127.0.0.1:{port}")
        authority = stack.enter_context(acme(folder, port))
        certificate, key = authority.files(NAME)
        peer = client(
            credentials,
            rig.address("http"),
            *("--tls-cert", str(certificate), "--tls-key", str(key)),
            *("--acme-endpoint", f"127.0.0.1:{answering}"),
        )
        stack.enter_context(peer)
        peer.wait_for(f"can't read {certificate}")  # it is said why nobody is served
        authority.lego(NAME, answering, "run")
        root = authority.root()

        def shown() -> bytes:
            with Web(NAME, port, root) as device:
                return device.certificate()

        def first() -> bytes:
            with contextlib.suppress(OSError):
                return shown()
            return b""

        found = [wait_until(first, "the first certificate")]
        is_over, all_are_there = threading.Event(), threading.Barrier(devices + 1, timeout=WAIT_S)

        def use(number: int) -> None:
            with Web(NAME, port, root) as device:
                device.seen()
                all_are_there.wait()
                while not is_over.wait(pause_s):
                    device.seen()
                    requests[number] += 1
                    if number % 2:
                        device.close()
                assert number % 2 or device.certificate() == found[0], "its connection was cut"

        def go_on(before: tuple[int, ...]) -> None:
            wait_until(lambda: all(map(int.__gt__, requests, before)), "all devices go on")

        def renew() -> None:
            all_are_there.wait()
            for _ in range(renewals):
                authority.lego(NAME, answering, "renew", "--days", "9999", "--no-random-sleep")
                wait_until(lambda: shown() != found[-1], "another certificate")
                found.append(shown())
                # All go on with it.
                go_on(tuple(requests))

        def job(number: int) -> None:
            try:
                renew() if number == devices else use(number)
            finally:
                is_over.set()

        begin = time.monotonic()
        in_threads(devices + 1, job)
        return Outcome(len(set(found)), sum(requests), time.monotonic() - begin)
