"""The relay: devices and clients arrive, hostnames lead from one to the other.

Every name leads to the newest tunnel that names it and has answered its challenge.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from functools import partial

from ..errors import ConfigurationError, ListenError, LostError, TokenError, UsageError
from ..net.bridge import Bridge
from ..net.listening import Listener, listen
from ..net.service import Service, budget, channel_idle
from ..net.sockets import host_text, pack_ip
from ..net.tuning import CHANNEL_IDLE_S, RELAY_BUDGET_BYTES
from ..protocol.cipher import unit_cipher
from ..protocol.frame import STOPPING
from ..protocol.hello import ALERT_INTERNAL_ERROR, ALERT_UNRECOGNIZED_NAME, HANDSHAKE_RECORD
from ..protocol.names import parse_address
from ..protocol.token import Fernet, Payload, check_fernet_keys
from .arrival import TOKEN_START, Arrival
from .registration import Registration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..net.openmetrics import Family

log = logging.getLogger("snitun_sync")

# Connections accepted before the loop looks at other sockets.
ACCEPTS_AT_ONCE = 64
# How soon the service manager hears of clients that have come or gone.
TELL_S = 1.0
# What belongs to expired tokens is looked for when there is twice as much as at the last time.
REMEMBERED_BEFORE_PRUNING = 1024


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
        channel_idle_s: float = CHANNEL_IDLE_S,
        crypto: str = "",
        congestion_control: str = "",
        admin: str = "",
        admin_token: str = "",
        routes: Sequence[str] = (),
        revocations: str = "",
        revocations_ca: str = "",
        state_dir: str = "",
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
        self.channel_idle_s = channel_idle(channel_idle_s)
        if revocations_ca and not revocations:
            raise UsageError("--revocations-ca: only with --revocations")
        # What isn't asked for takes no memory: see the imports.
        parsed, url = None, None
        if routes:
            from .routes import Routes, parse_routes  # noqa: PLC0415

            parsed = parse_routes(routes)
        if revocations:
            from ..net.https import parse_url  # noqa: PLC0415
            from .revocations import Follower  # noqa: PLC0415

            url = parse_url(revocations, "--revocations")
        super().__init__(
            budget_bytes=budget(budget_bytes),
            crypto=crypto,
            congestion_control=congestion_control,
            admin=admin,
            admin_token=admin_token,
        )
        self.fernet = Fernet(fernet_keys, self.aes)
        self.arrivals: set[Arrival] = set()
        self.registrations: set[Registration] = set()
        """Those whose tunnels are in `tunnels`."""
        self.routes: dict[str, Registration] = {}
        """Which client a hostname leads to."""
        self.fixed_routes = None if parsed is None else Routes(self, parsed)
        """Names that lead to an address whatever clients say, if there are any."""
        self.follower = None
        """Who knows what was revoked, if that was asked for."""
        if url is not None:
            self.follower = Follower(self, url, revocations_ca, state_dir, fernet_keys)
        self.takeovers = 0
        """How often a client has lost a name to another connection."""
        self.accepted = self.refused_clients = self.refused_devices = 0
        """Connections; clients without a good token or key; devices that no client serves."""
        self.opened_tunnels = 0
        """How many clients have answered their challenge."""
        self.ports: list[int] = []
        """The ports that are listened on, in the order of the addresses given."""
        self._listeners: list[Listener] = []
        self._is_telling = False
        self.known = Remembered()
        """Hostnames of clients that are there, or may come back."""
        self._used_keys = Remembered()  # of aes-gcm, hashed

    # --- life ----------------------------------------------------------------------

    def _open(self) -> None:
        for address, takes_devices, takes_clients in self._addresses:
            try:
                sockets = listen(address, self.congestion_control)
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
            starts = bytes([HANDSHAKE_RECORD] * takes_devices + [TOKEN_START] * takes_clients)
            accepted = partial(Arrival, self, starts)
            for sock in sockets:
                self._listeners.append(Listener(self.loop, sock, accepted, ACCEPTS_AT_ONCE))
        if self.follower is not None:
            self.follower.read_kept()

    def reconfigure(
        self, fernet_keys: Sequence[str], *, channel_idle_s: float | None = None
    ) -> None:
        """Take tokens of these keys from now on; tunnels stay. From any thread.

        Raises ConfigurationError.
        """
        check_fernet_keys(fernet_keys)
        fernet = Fernet(fernet_keys, self.aes)
        idle_s = self.channel_idle_s if channel_idle_s is None else channel_idle(channel_idle_s)
        self._on_loop(self._reconfigure, fernet, list(fernet_keys), idle_s)

    def _reconfigure(
        self, fernet: Fernet, fernet_keys: Sequence[str], channel_idle_s: float
    ) -> None:
        self.fernet, self.channel_idle_s = fernet, channel_idle_s
        for tunnel in self.tunnels:
            tunnel.channel_idle_s = channel_idle_s
        if self.follower is not None:
            self.follower.keys_changed(fernet_keys)

    def _begin(self) -> None:
        super()._begin()
        for listener in self._listeners:
            listener.listen()
        for (address, takes_devices, takes_clients), port in zip(self._addresses, self.ports):
            who = " and ".join(
                name
                for name, takes in (("devices", takes_devices), ("clients", takes_clients))
                if takes
            )
            log.info("listening on %s for %s", host_text(address.host or "*", port), who)
        if self.follower is not None:
            self.follower.begin()
        self.tell()

    # --- how it is -------------------------------------------------------------------

    def ready(self) -> str:
        """Return why nobody is served, "" if somebody could be."""
        return "stopping" if self._is_stopping or self._is_draining else ""

    def summary(self) -> str:
        """Return how it goes in one line, for people."""
        if reason := self.ready():
            return reason
        listens = ", ".join(
            host_text(address.host or "*", port)
            for (address, _, _), port in zip(self._addresses, self.ports)
        )
        news = self.follower.summary() if self.follower is not None else ""
        return f"listening on {listens}; {len(self.tunnels)} clients{news}"

    def clients_changed(self) -> None:
        """A client has come or gone: the service manager hears of it, once for many."""
        if self._notifier is not None and not self._is_telling:
            self._is_telling = True
            self.loop.call_later(TELL_S, self._tell_now)

    def _tell_now(self) -> None:
        self._is_telling = False
        self.tell()

    def report(self) -> dict[str, Any]:
        """Return what /status shows."""
        from .status import report  # noqa: PLC0415  not everybody asks

        return report(self)

    def metrics(self) -> list[Family]:
        """Return what /metrics shows."""
        from .status import metrics  # noqa: PLC0415

        return metrics(self)

    # --- the end ---------------------------------------------------------------------

    def _begin_drain(self) -> bool:
        for listener in self._listeners:
            listener.finish()  # who waits in the queue came before the end
        return True

    def _is_drained(self) -> bool:
        if self.bridges.all or self.arrivals:
            return False
        if self.fixed_routes is not None and self.follower is not None:
            # Nobody is left who could be cut, and its poll may come by a route of this very relay.
            self.follower.close()
        return self.fixed_routes is None or not self.fixed_routes.all

    def arrival_closed(self) -> None:
        """It is clear what an arrival was, or it is gone; or what a route made of it is."""
        self._stop_if_done()

    def _begin_stop(self) -> None:
        self._close_parts()
        for tunnel in tuple(self.tunnels):
            tunnel.finish(LostError("the relay is stopping"), STOPPING)

    def _close_parts(self) -> None:
        for part in (*self._listeners, *self.arrivals, self.follower, self.fixed_routes):
            if part is not None:
                part.close()

    def _close(self) -> None:
        self._close_parts()
        super()._close()

    # --- devices -------------------------------------------------------------------

    def device_arrived(self, arrival: Arrival, hostname: str) -> None:
        """A device wants to go to `hostname`; `arrival.received` is for whoever serves it."""
        if self.fixed_routes is not None and self.fixed_routes.take(arrival, hostname):
            return
        registration = self.routes.get(hostname)
        if registration is None:
            self.refused_devices += 1
            is_known = hostname in self.known
            log.debug("%s: %r is %s", arrival, hostname, "away" if is_known else "not known")
            arrival.refuse(ALERT_INTERNAL_ERROR if is_known else ALERT_UNRECOGNIZED_NAME)
            return
        log.debug("%s: TLS for %s goes to %s", arrival, hostname, registration)
        tunnel = registration.tunnel
        first = arrival.received
        channel = tunnel.mux.open(pack_ip(arrival.host))
        Bridge(tunnel, channel, str(arrival), arrival, first)
        arrival.close()

    # --- clients -------------------------------------------------------------------

    def client_arrived(self, arrival: Arrival, token: bytes, created: int) -> None:
        """A client has shown a token that one of our keys signed, `created` then.

        Raises TokenError.
        """
        payload = Payload.from_json(token)
        expired_s = time.time() - payload.valid
        if expired_s >= 0:
            raise TokenError(f"the token for {payload.hostname} expired {expired_s:.0f} s ago")
        if self.follower is not None:
            self.follower.check(payload, created)
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
        registration = Registration(self, arrival, payload, created, cipher)
        self.tunnels.add(registration.tunnel)
        self.registrations.add(registration)

    def register(self, registration: Registration) -> None:
        """Lead all names of a tunnel that has just come up to it."""
        self.opened_tunnels += 1
        self.clients_changed()
        for name in registration.payload.names:
            self.known.add(name, registration.payload.valid)
            old = self.routes.get(name)
            self.routes[name] = registration
            registration.names.add(name)
            if self.fixed_routes is not None and name in self.fixed_routes.by_name:
                log.warning("%s: --route leads %s elsewhere", registration, name)
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

    def discard(self, thing: object) -> None:
        """Forget `thing` now."""
        self._until.pop(thing, None)
