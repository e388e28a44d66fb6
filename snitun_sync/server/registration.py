"""One client at the relay: its tunnel, the names that lead to it, takeover and expiry.

A tunnel to which no name is left has been taken over: its channels live on for a
grace time, then it ends. Where the same device has another one, they have all the time
that the former token has, as long as there is somebody at its other end. A tunnel that
ends removes only the routes that still lead to it.
"""

from __future__ import annotations

import logging
import os
import time
from functools import partial

from ..errors import (
    AuthenticationError,
    RefusedError,
    SniTunError,
    TakenOverError,
    TokenError,
    ViolationError,
)
from ..net.bridge import Bridge
from ..net.sockets import host_text, pack_ip
from ..net.tuning import ANSWER_S
from ..net.tunnel import Tunnel
from ..protocol.frame import EXPIRED, REVOKED, TAKEN_OVER
from ..protocol.handshake import RelayHandshake
from ..protocol.names import IPV4_MAPPED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..net.loop import Timer
    from ..protocol.cipher import UnitCipher
    from ..protocol.mux import Channel
    from ..protocol.token import Payload
    from .arrival import Arrival
    from .server import Server

log = logging.getLogger("snitun_sync")

# How long the channels of a tunnel live on after another one has taken its names.
TAKEOVER_GRACE_S = 10.0
# The clock may be set: look again at least this often whether a token has expired.
EXPIRY_CHECK_S = 600.0

REFUSALS = (RefusedError, AuthenticationError, ViolationError)


class Registration:
    """One client at the relay: its tunnel and the names that lead to it."""

    __slots__ = (
        "_expiry",
        "_grace",
        "_server",
        "_successor",
        "created",
        "host",
        "names",
        "payload",
        "port",
        "tunnel",
    )

    def __init__(
        self,
        server: Server,
        arrival: Arrival,
        payload: Payload,
        created: int,
        cipher: UnitCipher,
    ) -> None:
        """Challenge the client, whose token is of `created`; `arrival` gives its socket away."""
        self._server = server
        self.payload, self.created = payload, created
        self.names: set[str] = set()
        self.host, self.port = arrival.host, arrival.port
        self.tunnel = Tunnel(
            server.loop,
            server.bridges,
            arrival,
            cipher,
            RelayHandshake(cipher, server.aes, os.urandom),
            payload.protocol_version,
            self,
            is_relay=True,
            peer=host_text(self.host, self.port),
            channel_idle_s=server.channel_idle_s,
        )
        arrival.close()
        self._expiry: Timer | None = None
        self._successor: Registration | None = None
        self._grace: Timer | None = None

    def __str__(self) -> str:
        return f"client {self.payload.hostname} at {self.tunnel.peer}"

    # --- what the tunnel tells its owner ---------------------------------------------

    def tunnel_up(self, tunnel: Tunnel) -> None:
        """The client has answered its challenge: its names lead to it from now on."""
        payload = self.payload
        if payload.valid <= time.time():  # since the handshake began
            self._expire()
            return
        log.info(
            "%s: tunnel up, version %d, %s, names %s",
            self,
            payload.protocol_version,
            payload.cipher,
            ", ".join(payload.names),
        )
        self._server.register(self)
        self._check_expiry()

    def tunnel_ended(self, tunnel: Tunnel, error: SniTunError) -> None:
        """The tunnel is over: no name leads to it any more."""
        server = self._server
        server.tunnels.discard(tunnel)
        server.registrations.discard(self)
        server.clients_changed()
        self._forget_names()
        for timer in (self._expiry, self._grace):
            if timer is not None:
                timer.cancel()
        level = logging.INFO
        if isinstance(error, REFUSALS):
            level = logging.WARNING
            server.refused_clients += 1
        log.log(
            level,
            "%s: tunnel ended after %.0f s: %s",
            self,
            server.loop.now - tunnel.started_at,
            error,
        )
        server.tunnel_closed()

    def fail(self, error: Exception) -> None:
        """A defect, which the loop has logged: the other clients are not to blame."""

    def channel_opened(self, tunnel: Tunnel, channel: Channel, address: bytes) -> None:
        """Never comes: a client opens no channels."""

    def channel_closed(self, bridge: Bridge) -> None:
        """One device less; the last one lets a tunnel go that has been taken over."""
        if self._successor is not None and not self.tunnel.mux.channels:
            self._server.loop.call_soon(self._finish_taken_over)
        self._server.channel_closed(bridge)

    # --- takeover and expiry -----------------------------------------------------------

    def name_lost(self, name: str, successor: Registration) -> None:
        """Another client's tunnel leads `name` now."""
        self.names.discard(name)
        if self.names or self._successor is not None:
            return
        self._successor = successor
        is_renewed = "" != self.payload.device_id == successor.payload.device_id
        level = logging.INFO if is_renewed else logging.WARNING
        text = "%s: another connection, from %s, took over"
        log.log(level, text, self, successor.tunnel.peer)
        loop = self._server.loop
        if not self.tunnel.mux.channels:
            self._finish_taken_over()
        elif is_renewed:
            # Nobody who is connected notices; unless this one has died without a word, and the
            # other one is there because of that.
            self.tunnel.mux.ping()
            self._grace = loop.call_later(ANSWER_S, partial(self._finish_if_silent, loop.now))
        else:
            self._grace = loop.call_later(TAKEOVER_GRACE_S, self._finish_taken_over)

    def _finish_if_silent(self, since: float) -> None:
        if self.tunnel.received_at <= since:
            self._finish_taken_over()

    def _finish_taken_over(self) -> None:
        successor = self._successor
        assert successor is not None
        address = pack_ip(successor.host)
        self.tunnel.finish(
            TakenOverError(f"another connection, from {successor.tunnel.peer}, took over"),
            TAKEN_OVER + successor.port.to_bytes(2, "big"),
            address if len(address) == 16 else IPV4_MAPPED + address,
        )

    def _check_expiry(self) -> None:
        left_s = self.payload.valid - time.time()
        if left_s > 0:
            self._expiry = self._server.loop.call_later(
                min(left_s, EXPIRY_CHECK_S), self._check_expiry
            )
        else:
            self._expire()

    def _expire(self) -> None:
        self._forget_names()  # at once: a device gets an alert rather than a reset
        self.tunnel.finish(TokenError("its token has expired"), EXPIRED)

    def revoke(self) -> None:
        """Its token was revoked: end the tunnel, also one that is still being opened."""
        for name in self.names:
            self._server.known.discard(name)  # it isn't away: it doesn't come back
        self._forget_names()
        device_id = self.payload.device_id
        self.tunnel.finish(TokenError(f"its token was revoked, device {device_id}"), REVOKED)

    def _forget_names(self) -> None:
        for name in self.names:
            del self._server.routes[name]
        self.names.clear()
