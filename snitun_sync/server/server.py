"""The relay: devices and clients arrive, hostnames lead from one to the other.

Every name leads to the newest tunnel that names it and has answered its challenge.
A tunnel to which no name is left has been taken over: its channels live on for a
grace time, then it ends. A tunnel that ends removes only the routes that still lead
to it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time

from ..errors import (
    AuthenticationError,
    ConfigurationError,
    ListenError,
    LostError,
    RefusedError,
    SniTunError,
    TakenOverError,
    TokenError,
    ViolationError,
)
from ..net.bridge import Bridge
from ..net.service import Service
from ..net.sockets import host_text, listen, pack_ip
from ..net.tuning import RELAY_BUDGET_BYTES
from ..net.tunnel import Tunnel
from ..protocol.cipher import unit_cipher
from ..protocol.frame import EXPIRED, IPV4_MAPPED, STOPPING, TAKEN_OVER
from ..protocol.handshake import RelayHandshake
from ..protocol.hello import ALERT_INTERNAL_ERROR, ALERT_UNRECOGNIZED_NAME
from ..protocol.names import parse_address
from ..protocol.token import Fernet, Payload, check_fernet_keys
from .arrival import Arrival, Listener

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..net.loop import Timer
    from ..protocol.cipher import UnitCipher
    from ..protocol.mux import Channel

log = logging.getLogger("snitun_sync")

# How long the channels of a tunnel live on after another one has taken its names.
TAKEOVER_GRACE_S = 10.0
# The clock may be set: look again at least this often whether a token has expired.
EXPIRY_CHECK_S = 600.0
# What belongs to expired tokens is looked for when there is twice as much as at the last time.
REMEMBERED_BEFORE_PRUNING = 1024

REFUSALS = (RefusedError, AuthenticationError, ViolationError)


class Server(Service):
    """A relay. `start` it, or `run` it on this thread; `stop` ends it.

    It serves devices and clients on all addresses of `listen`; with `peer_listen`
    clients have addresses of their own, and `listen` is for devices alone.
    Addresses are texts, HOST:PORT; an empty host or `*` means all of the machine.
    """

    def __init__(
        self,
        fernet_keys: Sequence[str],
        listen: Sequence[str] = ("*:443",),
        peer_listen: Sequence[str] = (),
        *,
        budget_bytes: int = RELAY_BUDGET_BYTES,
        crypto: str = "",
    ) -> None:
        """`fernet_keys` are texts, the newest first. Raises ConfigurationError."""
        self._addresses = [
            (parse_address(text, name, can_be_any=True), devices, clients)
            for name, texts, devices, clients in (
                ("--listen", listen, True, not peer_listen),
                ("--peer-listen", peer_listen, False, True),
            )
            for text in texts
        ]
        check_fernet_keys(fernet_keys)
        super().__init__(budget_bytes=budget_bytes, crypto=crypto)
        self.fernet = Fernet(fernet_keys, self.aes)
        self.arrivals: set[Arrival] = set()
        self.routes: dict[str, Registration] = {}
        """Which client a hostname leads to."""
        self.takeovers = 0
        """How often a client has lost a name to another connection."""
        self.ports: list[int] = []
        """The ports that are listened on, in the order of the addresses given."""
        self._listeners: list[Listener] = []
        self._known = Remembered()  # hostnames
        self._used_keys = Remembered()  # of aes-gcm, hashed

    # --- life ----------------------------------------------------------------------

    def _open(self) -> None:
        for address, takes_devices, takes_clients in self._addresses:
            try:
                sockets = listen(address)
            except OSError as error:
                hint = (
                    "; ports below 1024 take root or CAP_NET_BIND_SERVICE"
                    if error.errno == errno.EACCES
                    else ""
                )
                raise ListenError(
                    f"can't listen on {address}: {error.strerror or error}{hint}"
                ) from None
            self.ports.append(sockets[0].getsockname()[1])
            for sock in sockets:
                self._listeners.append(
                    Listener(self, sock, takes_devices=takes_devices, takes_clients=takes_clients)
                )

    def _begin(self) -> None:
        for listener in self._listeners:
            listener.listen()
        for (address, takes_devices, takes_clients), port in zip(self._addresses, self.ports):
            who = " and ".join(
                name
                for name, takes in (("devices", takes_devices), ("clients", takes_clients))
                if takes
            )
            log.info("listening on %s for %s", host_text(address.host or "*", port), who)

    def _begin_stop(self) -> None:
        self._close_listeners()
        for tunnel in tuple(self.tunnels):
            tunnel.finish(LostError("the relay is stopping"), STOPPING)

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            self.loop.close_socket(listener)
        for arrival in tuple(self.arrivals):
            arrival.close()

    def _close(self) -> None:
        self._close_listeners()
        super()._close()

    # --- devices -------------------------------------------------------------------

    def device_arrived(self, arrival: Arrival, hostname: str) -> None:
        """A device wants to go to `hostname`; `arrival.received` is for whoever serves it."""
        registration = self.routes.get(hostname)
        if registration is None:
            is_known = hostname in self._known
            log.debug("%s: %r is %s", arrival, hostname, "away" if is_known else "not known")
            arrival.refuse(ALERT_INTERNAL_ERROR if is_known else ALERT_UNRECOGNIZED_NAME)
            return
        log.debug("%s: TLS for %s goes to %s", arrival, hostname, registration)
        tunnel = registration.tunnel
        first = arrival.received
        channel = tunnel.mux.open(pack_ip(arrival.host))
        Bridge(tunnel, channel, str(arrival), arrival.release(), first)

    # --- clients -------------------------------------------------------------------

    def client_arrived(self, arrival: Arrival, token: bytes) -> None:
        """A client has shown a token that one of our keys signed. Raises TokenError."""
        payload = Payload.from_json(token)
        expired_s = time.time() - payload.valid
        if expired_s >= 0:
            raise TokenError(f"the token for {payload.hostname} expired {expired_s:.0f} s ago")
        if payload.cipher == "aes-gcm":
            # A second connection would start with the same nonces, and give the key away.
            key = hashlib.sha256(payload.aes_key).digest()
            if key in self._used_keys:
                raise TokenError(
                    f"the token for {payload.hostname}: its aes-gcm key has served a connection"
                )
            self._used_keys.add(key, payload.valid)
        try:
            cipher = unit_cipher(
                payload.cipher,
                self.aes,
                payload.aes_key,
                payload.aes_iv,
                is_relay=True,
                random=os.urandom,
            )
        except ConfigurationError as error:
            raise TokenError(f"the token for {payload.hostname}: {error}") from None
        registration = Registration(self, arrival, payload, cipher)
        self.tunnels.add(registration.tunnel)

    def register(self, registration: Registration) -> None:
        """Lead all names of a tunnel that has just come up to it."""
        for name in registration.payload.names:
            self._known.add(name, registration.payload.valid)
            old = self.routes.get(name)
            self.routes[name] = registration
            registration.names.add(name)
            if old is not None:
                self.takeovers += 1
                old.name_lost(name, registration)


class Remembered:
    """Things that matter as long as a token is valid; they are forgotten later."""

    def __init__(self) -> None:
        self._until: dict[object, float] = {}  # UTC, Unix seconds
        self._prune_at = REMEMBERED_BEFORE_PRUNING

    def __contains__(self, thing: object) -> bool:
        return self._until.get(thing, 0.0) > time.time()

    def add(self, thing: object, until: float) -> None:
        """Remember `thing` until that time; the latest one counts."""
        self._until[thing] = max(until, self._until.get(thing, 0.0))
        if len(self._until) >= self._prune_at:
            now = time.time()
            self._until = {thing: valid for thing, valid in self._until.items() if valid > now}
            self._prune_at = max(REMEMBERED_BEFORE_PRUNING, 2 * len(self._until))


class Registration:
    """One client at the relay: its tunnel and the names that lead to it."""

    def __init__(
        self, server: Server, arrival: Arrival, payload: Payload, cipher: UnitCipher
    ) -> None:
        """Challenge the client; `arrival` hands its socket over."""
        self._server = server
        self.payload = payload
        self.names: set[str] = set()
        self.host, self.port = arrival.host, arrival.port
        self.tunnel = Tunnel(
            server.loop,
            server.bridges,
            arrival.release(),
            cipher,
            RelayHandshake(cipher, server.aes, os.urandom),
            payload.protocol_version,
            self,
            is_relay=True,
            peer=host_text(self.host, self.port),
        )
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
        self._forget_names()
        for timer in (self._expiry, self._grace):
            if timer is not None:
                timer.cancel()
        level = logging.WARNING if isinstance(error, REFUSALS) else logging.INFO
        log.log(
            level,
            "%s: tunnel ended after %.0f s: %s",
            self,
            server.loop.now - tunnel.started_at,
            error,
        )
        server.tunnel_closed()

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
        log.warning("%s: another connection, from %s, took over", self, successor.tunnel.peer)
        if self.tunnel.mux.channels:
            self._grace = self._server.loop.call_later(TAKEOVER_GRACE_S, self._finish_taken_over)
        else:
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

    def _forget_names(self) -> None:
        for name in self.names:
            del self._server.routes[name]
        self.names.clear()
