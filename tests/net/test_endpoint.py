"""Connections to one endpoint, whose name is resolved on a worker."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from snitun_sync.errors import SniTunError
from snitun_sync.net import endpoint as endpoint_module
from snitun_sync.net.endpoint import Endpoint
from snitun_sync.net.loop import Loop
from snitun_sync.net.workers import Workers
from snitun_sync.protocol.names import parse_address
from tests.support import WAIT_S


class Target:
    """Wants a connection, and gets none."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def connected(self, sock: socket.socket) -> None:
        raise AssertionError

    def abort(self, error: SniTunError) -> None:
        self.errors.append(str(error))


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def test_a_name_that_isn_t_resolved_while_nobody_waits(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first device has gone before it was clear; the next one is told why it is turned away."""
    go_on = threading.Event()
    monkeypatch.setattr(endpoint_module, "blocking_resolve", lambda _: go_on.wait(WAIT_S) and [])
    address = parse_address("hanging.example:80", "--endpoint")
    endpoint = Endpoint(loop, Workers(loop), address, timeout_s=0.1)
    first, second = Target(), Target()
    endpoint.connect(first)
    endpoint.cancel(first)

    def look() -> None:
        if endpoint._timer is None:
            endpoint.connect(second)
            loop.stop()
        else:
            loop.call_later(0.01, look)

    look()
    loop.run()
    go_on.set()
    said = "can't reach endpoint hanging.example:80: its name is not resolved within 0.1 s"
    assert (first.errors, second.errors, endpoint.failure) == ([], [said], said)
    assert endpoint.failures == 0
