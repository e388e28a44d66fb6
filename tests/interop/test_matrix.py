"""Our client at their relay and their client at our relay, as real processes, row by row."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import pytest

from snitun_sync.protocol.cipher import CIPHERS
from tests.interop.conftest import ROWS
from tests.interop.peers import NEWEST, published_client, published_relay
from tests.support import (
    MIB,
    Credentials,
    Device,
    Endpoint,
    Program,
    client,
    download,
    in_threads,
    pattern_sha256,
    relay,
    upload,
    wait_until,
)

BULK = 64 * MIB
SLOW = 20 * MIB
# More than a peer holds before it pauses; less than our client holds before it stops reading.
STALLED = 15 * MIB // 2
# 64 KiB each so long: some 10 MiB/s, which both sides outrun by far.
SLOW_S = 0.006

# The old releases are version 0 with aes-cbc, whatever the token says.
OLD = [
    (release, role, 0, "aes-cbc", "")
    for release in ("0.39.1", "0.40.0")
    for role in ("client", "relay")
]
# A newer ticket at an older relay: it ignores the version.
IGNORED = [(release, "client", 2, "aes-cbc", "") for release in ("0.39.1", "0.40.0")]
NEW = [
    (NEWEST, role, version, cipher, "")
    for version in (0, 1, 2)
    for cipher in CIPHERS
    for role in ("client", "relay")
]
OTHER_PACKAGE = [
    (NEWEST, role, 2, cipher, "cryptography") for cipher in CIPHERS for role in ("client", "relay")
]


class Row:
    """Two processes, a relay and a client, one of them ours."""

    def __init__(
        self, folder: Path, release: str, role: str, version: int, cipher: str, package: str
    ) -> None:
        self.version, self.role = version, role
        self.endpoint = Endpoint()
        self.credentials = Credentials(folder, version=version, cipher=cipher)
        env = {"SNITUN_CRYPTO": package} if package else None
        if role == "client":
            self.theirs, self.port = published_relay(release, self.credentials)
            self.ours = client(self.credentials, self.endpoint.address, env=env)
        else:
            self.ours, self.port = relay(self.credentials, listen="*:0", env=env)
            self.theirs = published_client(release, self.credentials, self.port, self.endpoint)
            self.ours.wait_for("tunnel up")
        # A published relay leads a name to its client a moment after the handshake.
        wait_until(self._is_routed)

    def _is_routed(self) -> bool:
        try:
            with Device(self.port, "ECHO") as device:
                device.exchange()
        except (AssertionError, OSError):
            return False
        return True

    def close(self) -> None:
        """End both processes."""
        for program in (self.ours, self.theirs):
            program.stop()
        self.endpoint.close()

    def said(self, text: str) -> int:
        """Return how often our process has logged `text`."""
        return self.ours.output.count(text)

    # --- what every pair must do ------------------------------------------------------

    def bulk(self) -> None:
        """64 MiB each way."""
        download(self.port, BULK)
        upload(self.port, BULK)

    def crowd(self) -> None:
        """30 connections at once, half of them each way."""
        jobs: tuple[Callable[..., None], ...] = (download, upload)
        in_threads(30, lambda number: jobs[number % 2](self.port, MIB))

    def slow_device(self) -> None:
        """A device that reads slowly gets the last byte."""
        download(self.port, SLOW, pause_s=SLOW_S, receive_buffer=65536)

    def slow_endpoint(self) -> None:
        """An endpoint that reads slowly gets the last byte."""
        self.endpoint.slow_s = SLOW_S
        try:
            upload(self.port, SLOW)
        finally:
            self.endpoint.slow_s = 0.0

    def pause_and_resume(self) -> None:
        """A device and an endpoint that don't read at all for a while; others go on."""
        by_us, by_them = "pausing the peer", "paused by the peer"
        stalled_device, stalled_endpoint = (
            (by_them, by_us) if self.role == "client" else (by_us, by_them)
        )
        before = self.said(stalled_device)
        with Device(self.port, f"SOURCE {SLOW}", receive_buffer=65536) as device:
            self._wait_for_stall(stalled_device, before)
            with Device(self.port, "ECHO") as other:
                other.exchange()
            assert device.receive_all() == (SLOW, pattern_sha256(SLOW))
        before = self.said(stalled_endpoint)
        self.endpoint.go_on.clear()
        job = threading.Thread(target=upload, args=(self.port, STALLED))
        job.start()
        self._wait_for_stall(stalled_endpoint, before)
        with Device(self.port, "ECHO") as other:
            other.exchange()
        self.endpoint.go_on.set()
        job.join(60)
        assert not job.is_alive()

    def _wait_for_stall(self, text: str, before: int) -> None:
        if self.version:
            wait_until(lambda: self.said(text) > before, text)
        else:
            time.sleep(1)  # nothing tells of it: there is no PAUSE
            assert not self.said("paus")

    def ipv6_devices(self) -> None:
        """A device with an IPv6 address gets through, and is known by it."""
        with Device(self.port, "ECHO", host="::1") as device:
            device.exchange()
        if self.role == "client":
            self.ours.wait_for("of ::1 ended")


@contextmanager
def running(*key: object, folder: Path) -> Iterator[Row]:
    row = Row(folder, *key)  # type: ignore[arg-type]
    try:
        yield row
    finally:
        row.close()


@pytest.mark.parametrize(
    ("release", "role", "version", "cipher", "package"), [*OLD, *NEW, *OTHER_PACKAGE]
)
def test_row(
    tmp_path: Path, release: str, role: str, version: int, cipher: str, package: str
) -> None:
    key = (release, role, version, cipher, package)
    found = ROWS.setdefault((release, role, str(version), cipher, package or "default"), [])
    with running(*key, folder=tmp_path) as row:
        steps: list[tuple[str, Callable[[], None]]] = [
            ("64 MiB both ways", row.bulk),
            ("30 at once", row.crowd),
            ("PAUSE and RESUME" if version else "stall without PAUSE", row.pause_and_resume),
            ("slow device", row.slow_device),
            ("slow endpoint", row.slow_endpoint),
        ]
        if version == 2:
            steps.append(("IPv6 device", row.ipv6_devices))
        for name, step in steps:
            found.append(f"{name}:FAILED")
            step()
            found[-1] = f"{name}:ok"
        assert "WARNING" not in row.ours.output.replace("can be read by everybody", "")


@pytest.mark.parametrize(("release", "role", "version", "cipher", "package"), IGNORED)
def test_a_version_2_ticket_at_a_relay_that_ignores_it(
    tmp_path: Path, release: str, role: str, version: int, cipher: str, package: str
) -> None:
    with running(release, role, version, cipher, package, folder=tmp_path) as row:
        row.crowd()
        row.bulk()
        row.endpoint.go_on.clear()
        job = threading.Thread(target=upload, args=(row.port, SLOW))
        job.start()
        time.sleep(1)
        row.endpoint.go_on.set()
        job.join(60)
        assert not job.is_alive()
        assert not row.said("paus")  # a PAUSE would end that relay's tunnel
        assert row.said("ready: ") == 1


@pytest.mark.parametrize("cipher", ["aes-gcm", "aes-gcm-siv"])
def test_a_relay_that_ignores_the_cipher_is_named(tmp_path: Path, cipher: str) -> None:
    credentials, endpoint = Credentials(tmp_path, cipher=cipher), Endpoint()
    server, _ = published_relay("0.39.1", credentials)
    with server:
        program: Program = client(credentials, endpoint.address, "--once", up=False)
        assert program.wait(60) == 77
    endpoint.close()
    assert "32 of 60 bytes of the challenge: a relay older than 0.46 ignores" in program.output


def test_two_of_ours_at_a_published_relay_back_off(tmp_path: Path) -> None:
    """It closes the old tunnel without a word; takeovers get rarer all the same."""
    credentials, endpoint = Credentials(tmp_path), Endpoint()
    server, _ = published_relay(NEWEST, credentials)
    with server:
        with (
            client(credentials, endpoint.address) as one,
            client(credentials, endpoint.address) as two,
        ):
            one.wait_for("next attempt", count=2)
            two.wait_for("ready: ", count=2)
            time.sleep(5)
            assert one.output.count("ready: ") + two.output.count("ready: ") < 12
    endpoint.close()


def test_published_clients_get_no_last_word(tmp_path: Path) -> None:
    """0.39.1 and 0.40.0 raise an error on a flow that they don't know."""
    for release in ("0.39.1", NEWEST):
        credentials, endpoint = Credentials(tmp_path, version=0), Endpoint()
        server, port = relay(credentials)
        with server:
            with published_client(release, credentials, port, endpoint) as peer:
                server.wait_for("tunnel up")
                server.process.terminate()
                peer.wait_for("ENDED")
                assert "Traceback" not in peer.output
        endpoint.close()
