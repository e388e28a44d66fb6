"""Connections that have just come in, until it is clear what they are.

The first byte tells: 0x16 begins a TLS record, so this is a device and its
ClientHello says where it wants to go; `g` begins a token, so this is a client.
"""

from __future__ import annotations

import logging
import socket

from ..errors import HelloError, TokenError
from ..net.loop import READ, Handler
from ..net.sockets import host_text
from ..net.tuning import (
    DRAIN_S,
    EARLY_BYTES,
    EARLY_READ_BYTES,
    EARLY_SMALL_BYTES,
    HANDSHAKE_S,
)
from ..protocol.hello import HANDSHAKE_RECORD, HelloReader
from ..protocol.token import TokenReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..net.loop import Loop, Timer
    from .server import Server

log = logging.getLogger("snitun_sync")

TOKEN_START = ord("g")
# A text as long as a token that no key verifies: how long more of it may take. Whoever
# waits for its refusal has a limit of 10 s, like ours.
PLAUSIBLE_S = 5.0


class Arrival(Handler):
    """A connection of which nothing is known yet; it owns its socket until `Loop.hand_over`."""

    __slots__ = (
        "_deadline",
        "_early_bytes",
        "_hello",
        "_is_refused",
        "_server",
        "_starts",
        "_timer",
        "_token",
        "host",
        "port",
    )

    def __init__(
        self, server: Server, starts: bytes, sock: socket.socket, place: tuple[Any, ...]
    ) -> None:
        """`starts` has the first bytes of those who may come: HANDSHAKE_RECORD, TOKEN_START."""
        super().__init__(sock)
        host, self.port = place[:2]
        # A socket of both families shows IPv4 as a mapped address.
        self.host = host[7:] if host.startswith("::ffff:") and "." in host else host
        self._server, self._starts = server, starts
        self._hello: HelloReader | None = None
        self._token: TokenReader | None = None
        self._is_refused = False
        self._early_bytes = 0
        self._deadline = server.loop.now + HANDSHAKE_S
        self._timer: Timer = server.loop.call_later(HANDSHAKE_S, self._overdue)
        server.arrivals.add(self)
        server.accepted += 1
        server.loop.watch(self, READ)

    def __str__(self) -> str:
        return host_text(self.host, self.port)

    @property
    def received(self) -> bytes:
        """What a device has sent so far: its ClientHello and maybe more."""
        return bytes(self._hello.received) if self._hello is not None else b""

    def refuse(self, alert: bytes) -> None:
        """Send a TLS alert, and close once the device has seen it."""
        assert self.sock is not None
        self._is_refused = True
        self._timer.cancel()
        try:
            self.sock.send(alert)
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
        else:
            self._timer = self._loop.call_later(DRAIN_S, self.close)

    def close(self) -> None:
        """Free all that is owned still."""
        self._timer.cancel()
        self._loop.close_socket(self)
        self._server.arrivals.discard(self)
        self._server.bridges.early_bytes -= self._early_bytes
        self._early_bytes = 0
        self._server.arrival_closed()

    def fail(self, error: Exception) -> None:
        self.close()

    @property
    def _loop(self) -> Loop:
        return self._server.loop

    def on_ready(self, events: int) -> None:
        assert self.sock is not None
        data = memoryview(b"")
        try:
            data = self._loop.receive(self.sock, EARLY_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            pass
        if not data:
            if self._token is not None:
                log.warning("%s: gone before its token was whole", self)
            self.close()
        elif not self._is_refused:
            self._received(data)

    def _received(self, data: memoryview) -> None:
        if self._hello is None and self._token is None:
            if data[0] not in self._starts:
                log.debug("%s: neither TLS nor a token: first byte 0x%02x", self, data[0])
                self.close()
                return
            if data[0] == HANDSHAKE_RECORD:
                self._hello = HelloReader()
            else:
                self._token = TokenReader(self._server.fernet)
        self._early_bytes += len(data)
        self._server.bridges.early_bytes += len(data)
        if self._early_bytes > EARLY_SMALL_BYTES and self._server.bridges.early_bytes > EARLY_BYTES:
            log.debug("%s: turned away: too much to hold from too many", self)
            self.close()
            return
        try:
            if self._hello is not None:
                hostname = self._hello.receive(data)
                if hostname is not None:
                    self._server.device_arrived(self, hostname)
            elif self._token is not None:
                payload = self._token.receive(bytes(data))
                if payload is not None:
                    self._server.client_arrived(self, payload, self._token.created)
                else:
                    left_s = self._deadline - self._loop.now
                    if self._token.is_plausible:
                        left_s = min(left_s, PLAUSIBLE_S)
                    self._timer.cancel()
                    self._timer = self._loop.call_later(left_s, self._overdue)
        except HelloError as error:
            log.debug("%s: %s", self, error)
            self.close()
        except TokenError as error:
            self._server.refused_clients += 1
            log.warning("%s: refused: %s", self, error)
            self.close()

    def _overdue(self) -> None:
        if self._token is None:
            log.debug("%s: no ClientHello within %.0f s", self, HANDSHAKE_S)
            self.close()
            return
        self._server.refused_clients += 1
        if self._token.is_plausible:
            log.warning("%s: refused: the token matches none of the Fernet keys", self)
        else:
            log.warning("%s: refused: no whole token within %.0f s", self, HANDSHAKE_S)
        self.close()
