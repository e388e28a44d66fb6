"""Connections that have just come in, until it is clear what they are.

The first byte tells: 0x16 begins a TLS record, so this is a device and its
ClientHello says where it wants to go; `g` begins a token, so this is a client.
"""

from __future__ import annotations

import errno
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
    from ..net.loop import Loop, Timer
    from .server import Server

log = logging.getLogger("snitun_sync")

TOKEN_START = ord("g")
ACCEPTS_AT_ONCE = 64
# Out of descriptors or memory: accepting again at once would spin.
ACCEPT_PAUSE_S = 1.0
# A text as long as a token that no key verifies: how long more of it may take. Whoever
# waits for its refusal has a limit of 10 s, like ours.
PLAUSIBLE_S = 5.0

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener(Handler):
    """One socket that listens."""

    __slots__ = ("_loop", "_server", "takes_clients", "takes_devices")

    def __init__(
        self, server: Server, sock: socket.socket, *, takes_devices: bool, takes_clients: bool
    ) -> None:
        super().__init__(sock)
        self._server, self._loop = server, server.loop
        self.takes_devices, self.takes_clients = takes_devices, takes_clients

    def listen(self) -> None:
        """Begin to accept, or go on."""
        if self.sock is not None:
            self._loop.watch(self, READ)

    def accept_all(self) -> None:
        """Accept whatever waits to be."""
        while self.sock is not None and self._accept():
            pass

    def on_ready(self, events: int) -> None:
        self._accept()

    def _accept(self) -> bool:
        """Accept some connections; return whether there may be more."""
        assert self.sock is not None
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                sock, place = self.sock.accept()
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    log.error("can't accept: %s; next try in %.0f s", error, ACCEPT_PAUSE_S)
                    self._loop.watch(self, 0)
                    self._loop.call_later(ACCEPT_PAUSE_S, self.listen)
                    return False
                continue  # that one is gone already
            sock.setblocking(False)
            Arrival(self._server, self, sock, place[0], place[1])
        return True

    def fail(self, error: Exception) -> None:
        pass  # the loop has logged it; the other connections are not to blame


class Arrival(Handler):
    """A connection of which nothing is known yet; it owns its socket until `Loop.hand_over`."""

    __slots__ = (
        "_deadline",
        "_early_bytes",
        "_hello",
        "_is_refused",
        "_listener",
        "_server",
        "_timer",
        "_token",
        "host",
        "port",
    )

    def __init__(
        self, server: Server, listener: Listener, sock: socket.socket, host: str, port: int
    ) -> None:
        super().__init__(sock)
        # A socket of both families shows IPv4 as a mapped address.
        self.host = host[7:] if host.startswith("::ffff:") and "." in host else host
        self.port = port
        self._server, self._listener = server, listener
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
            if data[0] == HANDSHAKE_RECORD and self._listener.takes_devices:
                self._hello = HelloReader()
            elif data[0] == TOKEN_START and self._listener.takes_clients:
                self._token = TokenReader(self._server.fernet)
            else:
                log.debug("%s: neither TLS nor a token: first byte 0x%02x", self, data[0])
                self.close()
                return
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
                    self._server.client_arrived(self, payload)
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
