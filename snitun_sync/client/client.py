"""The client: keeps one tunnel to a relay and brings its channels to the endpoint."""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import partial

from ..errors import (
    EndpointError,
    LinkError,
    LostError,
    SniTunError,
    TakenOverError,
    UnreachableError,
)
from ..net.bridge import Bridge, BridgeState
from ..net.loop import Handler
from ..net.service import Service
from ..net.sockets import blocking_connect, set_congestion_control, unpack_ip
from ..net.tuning import CLIENT_BUDGET_BYTES, CONNECT_S
from ..net.tunnel import Tunnel, TunnelState
from ..net.workers import Workers
from ..protocol.aes import load
from ..protocol.cipher import unit_cipher
from ..protocol.handshake import ClientHandshake
from ..protocol.names import parse_address
from ..protocol.ticket import RELAY_PORT, Ticket
from .endpoint import Endpoint, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from ..protocol.aes import Aes
    from ..protocol.cipher import UnitCipher
    from ..protocol.mux import Channel

log = logging.getLogger("snitun_sync")

# Reconnecting: full jitter below a limit that doubles from the first to the last.
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
# A tunnel that lived this long was a good one: the next retry is early again.
GOOD_TUNNEL_S = 60.0
# Channels that the relay opens before it has proven that it knows the key.
HELD_CHANNELS = 256


class Client(Service):
    """A client. `start` it, or `run` it on this thread; `stop` ends it.

    It reconnects by itself, whatever happens to the tunnel. It ends by itself only
    after an error that no retry mends, and after a single attempt with `once`.
    """

    def __init__(
        self,
        ticket: Ticket | str,
        endpoint: str = "127.0.0.1:443",
        *,
        server: str = "",
        once: bool = False,
        budget_bytes: int = CLIENT_BUDGET_BYTES,
        crypto: str = "",
        congestion_control: str = "",
    ) -> None:
        """Serve `endpoint` (HOST:PORT, [IPV6]:PORT or unix:/PATH) with a ticket, parsed or as text.

        `server` overrides the ticket's; `congestion_control` names one of the kernel's
        algorithms for the tunnel. Raises ConfigurationError.
        """
        self.ticket = Ticket.parse(ticket) if isinstance(ticket, str) else ticket
        address = parse_address(endpoint, "--endpoint", can_be_unix=True)
        self.server = parse_address(
            server or self.ticket.server, "--server", default_port=RELAY_PORT
        )
        self._new_cipher(load(crypto))  # says now what the crypto package lacks
        super().__init__(
            budget_bytes=budget_bytes, crypto=crypto, congestion_control=congestion_control
        )
        self._workers = Workers(self.loop)
        self.endpoint = Endpoint(self.loop, self._workers, address)
        self._once = once
        self._is_spent = False  # a single-use key has been used
        self._attempts = 0  # since the last good tunnel
        self._held: list[Bridge] = []
        self._up = threading.Event()
        self._is_closed = False
        self.tunnel: Tunnel | None = None
        """The tunnel at this moment; of the loop's thread."""

    def wait_until_up(self, timeout_s: float | None = None) -> bool:
        """Wait until the relay has proven itself; return whether it has.

        False means that `timeout_s` seconds have passed, or that the client has ended.
        """
        return self._up.wait(timeout_s) and not self._is_closed

    # --- connecting ------------------------------------------------------------------

    def _begin(self) -> None:
        valid = self.ticket.valid
        if valid is not None and valid <= time.time():
            log.warning(
                "by this machine's clock (%s UTC) the ticket expired at %s UTC; trying anyway",
                _utc(time.time()),
                _utc(valid),
            )
        self._connect()

    def _connect(self) -> None:
        log.info("connecting to the relay %s", self.server)
        self._attempts += 1
        connect = partial(blocking_connect, self.server, CONNECT_S)
        if not self._workers.submit(connect, self._connected):
            self._failed(UnreachableError("no thread can be started to connect to the relay"))

    def _connected(self, sock: socket.socket | None, error: Exception | None) -> None:
        if self._is_stopping or sock is None:
            if sock is not None:
                sock.close()
            elif not self._is_stopping:
                self._failed(
                    UnreachableError(f"can't reach the relay {self.server}: {reason(error)}")
                )
            return
        try:
            set_congestion_control(sock, self.congestion_control)
        except OSError:
            pass  # it could be had at the start
        cipher = self._new_cipher(self.aes)
        self._is_spent = self.ticket.cipher == "aes-gcm"
        self.tunnel = Tunnel(
            self.loop,
            self.bridges,
            Handler(sock),
            cipher,
            ClientHandshake(cipher, self.aes, self.ticket.token),
            self.ticket.protocol_version,
            self,
            is_relay=False,
            peer=str(self.server),
            throttling=self.ticket.throttling,
        )
        self.tunnels.add(self.tunnel)

    def _new_cipher(self, aes: Aes) -> UnitCipher:
        ticket = self.ticket
        return unit_cipher(
            ticket.cipher,
            aes,
            ticket.aes_key,
            ticket.aes_iv,
            is_relay=False,
            random=os.urandom,
        )

    def _failed(self, error: SniTunError) -> None:
        """An attempt or a tunnel is over: try again, unless that makes no sense."""
        if self._once:
            self._end(error)
        elif self._is_spent:
            self._end(
                LinkError(
                    f"{error}; the ticket's cipher aes-gcm serves one connection only, and this "
                    "was it: get a new ticket, or one for aes-cbc or aes-gcm-siv"
                )
            )
        else:
            limit_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self._attempts - 1, 16))
            delay_s = limit_s * int.from_bytes(os.urandom(4), "big") / 2**32
            log.warning("%s; next attempt in %.1f s", error, delay_s)
            self.loop.call_later(delay_s, self._retry)

    def _retry(self) -> None:
        if not self._is_stopping:
            self._connect()

    # --- what the tunnel tells its owner -----------------------------------------------

    def tunnel_up(self, tunnel: Tunnel) -> None:
        """The relay has proven that it knows the key."""
        ticket = self.ticket
        log.info(
            "ready: %s at the relay %s leads to %s (version %d, %s, %.0f ms)",
            ticket.hostname or "the ticket's hostname",
            self.server,
            self.endpoint,
            ticket.protocol_version,
            ticket.cipher,
            (self.loop.now - tunnel.started_at) * 1000,
        )
        self._up.set()
        held, self._held = self._held, []
        for bridge in held:
            self.endpoint.connect(bridge)

    def tunnel_ended(self, tunnel: Tunnel, error: SniTunError) -> None:
        """Say why, and try again."""
        self.tunnels.discard(tunnel)
        self.tunnel = None
        self._up.clear()
        self._held.clear()
        lived_s = self.loop.now - tunnel.started_at
        if self._is_stopping:
            log.info("tunnel ended after %.0f s: %s", lived_s, error)
        else:
            if lived_s >= GOOD_TUNNEL_S and not isinstance(error, TakenOverError):
                self._attempts = 0
            self._failed(error)
        self.tunnel_closed()

    def channel_opened(self, tunnel: Tunnel, channel: Channel, address: bytes) -> None:
        """A device has come: connect to the endpoint, once the relay is proven."""
        bridge = Bridge(tunnel, channel, unpack_ip(address))
        if tunnel.state is TunnelState.UP:
            # When all that came with NEW is there: it can be sent at once then.
            self.loop.call_soon(self._connect_endpoint, bridge)
        elif len(self._held) < HELD_CHANNELS:
            self._held.append(bridge)
        else:
            bridge.abort(EndpointError("too many channels before the relay has proven itself"))

    def _connect_endpoint(self, bridge: Bridge) -> None:
        if bridge.state is not BridgeState.CLOSED:
            self.endpoint.connect(bridge)

    def channel_closed(self, bridge: Bridge) -> None:
        """A device is gone: connect no more for it."""
        if bridge in self._held:
            self._held.remove(bridge)
        self.endpoint.cancel(bridge)
        super().channel_closed(bridge)

    # --- the end -------------------------------------------------------------------

    def _begin_stop(self) -> None:
        if self.tunnel is not None:
            self.tunnel.finish(LostError("the client is stopping"))

    def _close(self) -> None:
        self._workers.close()
        self.loop.run_calls()  # the sockets that the workers handed over last
        super()._close()
        self._is_closed = True
        self._up.set()


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
