"""The client: keeps one tunnel to a relay and brings its channels to the endpoint.

At most one tunnel serves: it is proven, and new channels come through it. One more may be opening:
the first, the next after a loss, or one that takes over because the ticket has changed. A
tunnel whose place was taken is retired: its channels live on until they, or a grace
time, are over.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from enum import Enum
from functools import partial

from ..errors import (
    DeadLinkError,
    DeniedError,
    EndpointError,
    LinkError,
    LostError,
    RefusedError,
    SniTunError,
    UnreachableError,
)
from ..net.bridge import Bridge, BridgeState
from ..net.dialing import blocking_dial
from ..net.loop import Handler, utc
from ..net.netlink import NetworkWatch, local_address_is_gone
from ..net.sockets import check_congestion_control, reason, set_congestion_control, unpack_ip
from ..net.tuning import CONNECT_S, PROBE_S
from ..net.tunnel import Tunnel, TunnelState
from ..net.workers import Workers
from ..protocol.aes import load
from ..protocol.cipher import unit_cipher
from ..protocol.handshake import ClientHandshake
from .endpoints import Endpoints
from .history import History
from .limits import Limits
from .retry import FIRST_S, REFUSALS, Retry, fraction
from .serving import Serving
from .settings import ENDPOINT, Settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from typing import Any

    from ..net.loop import Timer
    from ..net.openmetrics import Family
    from ..protocol.aes import Aes
    from ..protocol.cipher import UnitCipher
    from ..protocol.mux import Channel
    from ..protocol.names import Address
    from ..protocol.ticket import Ticket
    from .master import Master, MasterSettings
    from .probe import Probe

log = logging.getLogger("snitun_sync")

# Only a resolver that hangs takes so long; a connect has less.
DIAL_S = 60.0
# Channels that the relay opens before it has proven that it knows the key.
HELD_CHANNELS = 256
# After SIGTERM: how long channels are let in that were on their way.
SETTLE_S = 0.3
# A retired tunnel: how soon it ends once it has no channels, and when it ends with them. The
# relay gives them 10 s, after a renewal as long as the former token is valid.
RETIRED_IDLE_S = 1.0
RETIRED_S = 15.0


class ClientState(Enum):
    """What the client is doing; see `Client.state`."""

    CONNECTING = "connecting"
    WAITING = "waiting"  # for the next attempt
    REFUSED = "refused"  # by relay or session master, again and again; it still tries
    REVOKED = "revoked"  # by the session master, which is asked again now and then
    UP = "up"
    STOPPING = "stopping"


class Client(Serving):
    """A client. `start` it, or `run` it on this thread; `stop` ends it.

    It reconnects by itself, whatever happens to the tunnel. It ends by itself only
    after an error that no retry mends, and where the settings say so.
    """

    def __init__(
        self,
        ticket: Ticket | str | None = None,
        endpoint: str | Sequence[str] = ENDPOINT,
        **options: Any,
    ) -> None:
        """Serve `endpoint` with a ticket, or with those of the `master` that `options` name.

        `options` are those of Settings. Raises ConfigurationError.
        """
        self.settings = settings = Settings(ticket, endpoint, **options)
        if settings.ticket is not None:  # says now what the package lacks
            _new_cipher(settings.ticket, load(settings.crypto))
        super().__init__(
            budget_bytes=settings.budget_bytes,
            crypto=settings.crypto,
            congestion_control=settings.congestion_control,
            admin=settings.admin,
            admin_token=settings.admin_token,
        )
        self._workers = Workers(self.loop)
        self.limits = Limits(self.loop, self.bridges, settings)
        self.endpoints = Endpoints(self, self._workers)
        self.retry = Retry(fraction, settings.reconnect_spread_s)
        self._serving: Tunnel | None = None
        self._opening: Tunnel | None = None
        self._retired: dict[Tunnel, Timer] = {}  # until when its channels may go on
        self._held: list[Bridge] = []  # channels of the one that is opening
        self._attempt = 0  # the number of the latest; what comes of an earlier one is dropped
        self._dial_timer: Timer | None = None  # while a worker connects
        self._dialed_at = 0.0
        self._retry_timer: Timer | None = None
        self.retry_at = 0.0
        """When the next attempt comes, in the loop's time; 0 if none waits."""
        self._spent_keys: set[bytes] = set()  # those for a single connection that had it
        self._is_refusing = False  # new channels, as it stops
        self._network: NetworkWatch | None = None
        self.probe: Probe | None = None
        self.master: Master | None = None
        """Where tickets come from, if they come from a session master."""
        if settings.master is not None:
            self._begin_master(settings.master)
        self._up = threading.Event()
        self._is_closed = False
        self._state = ClientState.CONNECTING
        self.state_since = self.started
        """UTC, Unix seconds, of the last change of `state`."""
        self.history = History()
        self.attempts = self.proven = 0
        """How many connections were tried in all, and how many tunnels were proven."""

    def wait_until_up(self, timeout_s: float | None = None) -> bool:
        """Wait until the relay has proven itself; return whether it has.

        False means that `timeout_s` seconds have passed, or that the client has ended.
        """
        return self._up.wait(timeout_s) and not self._is_closed

    def reconfigure(self, settings: Settings) -> None:
        """Go on with other settings; from any thread. Open channels stay.

        Where ticket, relay or proxy differ, another tunnel is opened, and takes over once
        it is proven. `crypto`, `admin` and `admin_token` stay as they are. Raises
        ConfigurationError.
        """
        if settings.ticket is not None:
            self.check_cipher(settings.ticket)
        if settings.congestion_control:
            check_congestion_control(settings.congestion_control)
        self._on_loop(self._reconfigure, settings)

    @property
    def ticket(self) -> Ticket | None:
        """The ticket that counts now; None where a session master hasn't given one yet."""
        return self.settings.ticket if self.master is None else self.master.ticket

    @property
    def server(self) -> Address | None:
        """The relay that the next attempt goes to; None where it isn't known yet."""
        return self.settings.server or (None if self.master is None else self.master.server)

    @property
    def tunnel(self) -> Tunnel | None:
        """The tunnel that serves, or else the one that is opening; of the loop's thread."""
        return self._serving or self._opening

    @property
    def state(self) -> ClientState:
        """What the client is doing."""
        if self._is_stopping or self._is_draining:
            return ClientState.STOPPING
        if self._serving is not None:
            return ClientState.UP
        if self.master is not None and self.master.is_revoked:
            return ClientState.REVOKED
        if self.retry.is_refused:
            return ClientState.REFUSED
        return ClientState.WAITING if self._retry_timer is not None else ClientState.CONNECTING

    @property
    def _is_dialing(self) -> bool:
        return self._dial_timer is not None

    @property
    def _needs_ticket(self) -> bool:
        """Whether the session master has to be asked before another connection."""
        return self.master is not None and not self.master.is_usable

    @property
    def _is_followed(self) -> bool:
        """Whether the relay has let a successor in: it ends the tunnel that serves then."""
        return self._opening is not None and self._opening.state is TunnelState.PROVING

    @property
    def _is_spent(self) -> bool:
        """Whether the ticket's key is for a single connection, and had it."""
        ticket = self.settings.ticket
        return ticket is not None and ticket.aes_key in self._spent_keys

    # --- connecting ------------------------------------------------------------------

    def _begin(self) -> None:
        super()._begin()
        try:
            self._network = NetworkWatch(self.loop, self._network_changed)
        except OSError as error:
            log.debug("changes of addresses and routes won't be noticed: %s", reason(error))
        if self.master is not None:
            self.master.begin()
        valid = self.ticket.valid if self.ticket is not None else None
        if valid is not None and valid <= time.time():
            log.warning(
                "by this machine's clock (%s UTC) the ticket expired at %s UTC; trying anyway",
                utc(time.time()),
                utc(valid),
            )
        self._start_probe()
        self.connect()

    def connect(self) -> None:
        """Begin an attempt; drop the one that is under way, if there is one."""
        self._drop_attempt()
        self._dialed_at = self.loop.now
        if self._is_spent:
            self.attempt_failed(LinkError("no other tunnel can be opened"))
        elif self.master is not None and self._needs_ticket:
            self.master.ask()
        else:
            self._dial()
        self._note_change()

    def _dial(self) -> None:
        settings, server = self.settings, self.server
        assert server is not None
        via = f" by the proxy {settings.proxy}" if settings.proxy is not None else ""
        level = logging.DEBUG if self.history.is_folding else logging.INFO
        log.log(level, "connecting to the relay %s%s", server, via)
        self.attempts += 1
        connect = partial(blocking_dial, server, CONNECT_S, settings.proxy)
        if self._workers.submit(connect, partial(self._connected, self._attempt, server)):
            self._dial_timer = self.loop.call_later(DIAL_S, self._dial_overdue)
        else:
            text = "no thread can be started to connect to the relay"
            self.attempt_failed(UnreachableError(text))

    def _drop_attempt(self) -> None:
        """Nothing is under way to another tunnel any more."""
        self._attempt += 1
        for timer in (self._dial_timer, self._retry_timer):
            if timer is not None:
                timer.cancel()
        self._dial_timer = self._retry_timer = None
        self.retry_at = 0.0
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.end(LostError("another attempt has begun"))

    def _dial_overdue(self) -> None:
        self._drop_attempt()
        said = f"can't reach the relay {self.server}: no answer within {DIAL_S:.0f} s"
        self.attempt_failed(UnreachableError(said))

    def _connected(
        self,
        attempt: int,
        server: Address,
        sock: socket.socket | None,
        error: Exception | None,
    ) -> None:
        if attempt != self._attempt:
            if sock is not None:
                sock.close()
            return
        self._drop_attempt()  # it is over
        if sock is None:
            text = f"can't reach the relay {server}: {reason(error)}"
            self.attempt_failed(UnreachableError(text))
            return
        # The same for the tunnel, or this were another attempt.
        settings, ticket = self.settings, self.ticket
        assert ticket is not None
        try:
            set_congestion_control(sock, settings.congestion_control)
        except OSError:
            pass  # it could be had at the start
        cipher = _new_cipher(ticket, self.aes)
        if self.master is not None:
            self.master.sent()
        elif ticket.cipher == "aes-gcm":
            self._spent_keys.add(ticket.aes_key)
        self._opening = Tunnel(
            self.loop,
            self.bridges,
            Handler(sock),
            cipher,
            ClientHandshake(cipher, self.aes, ticket.token),
            ticket.protocol_version,
            self,
            is_relay=False,
            peer=str(server),
            throttling=ticket.throttling,
            keepalive_s=settings.keepalive_s,
            channel_idle_s=settings.channel_idle_s,
        )
        self.tunnels.add(self._opening)

    def attempt_failed(self, error: SniTunError, proven_s: float | None = None) -> None:
        """An attempt or a tunnel is over: try again, unless that makes no sense."""
        was_refused = self.retry.is_refused
        delay_s = self.retry.delay_s(error, proven_s)
        self.history.add(error, proven_s)
        if self.retry.is_refused is not was_refused:
            self.history.say_next()
        reason_to_end = self._reason_to_end(error)
        plan = ""
        if self.master is not None:
            plan = self.master.attempt_failed(error, proven_s, delay_s)
        if self._serving is None and reason_to_end is not None:
            self._end(reason_to_end)
        elif self._is_spent:
            log.warning("%s; the former tunnel stays", reason_to_end)
        else:
            if not plan:
                plan = f"next attempt in {self._retry_in(delay_s):.1f} s"
                if self.retry.is_refused:
                    plan = f"it refuses this client, so attempts are rarer from now on; {plan}"
            is_revoked = self.state is ClientState.REVOKED
            self.history.say(str(error), plan, self.loop.now, is_rare=is_revoked)
        self._note_change()

    def _reason_to_end(self, error: SniTunError) -> SniTunError | None:
        """Return what the client ends with, if it has no tunnel; None where it tries again."""
        if self.settings.once:
            return error
        if self._is_spent:
            return LinkError(
                f"{error}; the ticket's cipher aes-gcm serves one connection only, and this "
                "was it: get a new ticket, or one for aes-cbc or aes-gcm-siv"
            )
        if not self.settings.exit_on_refusal:
            return None
        if self.master is not None and self.master.is_revoked:  # that is no accident
            return DeniedError(self.master.failure)
        if self.retry.is_refused:
            return RefusedError(f"refused {REFUSALS} times in a row: {error}")
        return None

    def _retry_in(self, delay_s: float) -> float:
        """Try again in that time, or later where no attempt makes sense before; return when."""
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        if self.master is not None:
            delay_s = max(delay_s, self.master.wait_s)
        self.retry_at = self.loop.now + delay_s
        self._retry_timer = self.loop.call_later(delay_s, self.connect)
        return delay_s

    def _network_changed(self) -> None:
        """An address or a route has changed: see whether the tunnels are still there."""
        if self._is_stopping:
            return
        for tunnel in tuple(self.tunnels):
            if tunnel.sock is not None and local_address_is_gone(tunnel.sock):
                tunnel.end(DeadLinkError("this machine's address of the tunnel is gone"))
            else:
                tunnel.probe()
        if self._serving is not None or self.state is ClientState.STOPPING:
            return  # which the loss may have led to
        # What failed, or hangs, may go now; who is about to prove itself has some time for it.
        hangs_s = FIRST_S if self._is_dialing else PROBE_S
        if self._retry_timer is None:
            if self._is_spent or self.loop.now <= self._dialed_at + hangs_s:
                return
            self._drop_attempt()
        elif self.retry_at <= self.loop.now + FIRST_S:
            return
        self._retry_in(FIRST_S * fraction())
        self._note_change()

    # --- what the tunnel tells its owner -----------------------------------------------

    def tunnel_up(self, tunnel: Tunnel) -> None:
        """The relay has proven that it knows the key."""
        ticket = self.ticket
        assert ticket is not None
        log.info(
            "ready: %s at the relay %s leads to %s (version %d, %s, %.0f ms)",
            ticket.hostname or "the ticket's hostname",
            tunnel.peer,
            self.endpoints,
            ticket.protocol_version,
            ticket.cipher,
            (self.loop.now - tunnel.started_at) * 1000,
        )
        former, self._serving, self._opening = self._serving, tunnel, None
        if former is not None:
            limit_s = max(RETIRED_S, self.master.proven_left_s if self.master else 0.0)
            end = partial(self._end_retired, former)
            self._retired[former] = self.loop.call_later(limit_s, end)
            self._end_idle(former)
        self.proven += 1
        self.history.say_next()
        self.retry.accepted()
        if self.master is not None:
            self.master.proven()
        held, self._held = self._held, []
        for bridge in held:
            self.endpoints.connect(bridge)
        if self.probe is not None:
            self.probe.soon()
        self._up.set()
        self._note_change()

    def _end_idle(self, tunnel: Tunnel) -> None:
        """End a retired tunnel soon, if no channel is left or comes; the relay may do it first."""
        if not tunnel.mux.channels:
            self.loop.call_later(RETIRED_IDLE_S, partial(self._end_retired, tunnel, only_idle=True))

    def _end_retired(self, tunnel: Tunnel, *, only_idle: bool = False) -> None:
        if tunnel.state is TunnelState.UP and not (only_idle and tunnel.mux.channels):
            tunnel.finish(LostError("another tunnel has taken its place"))

    def tunnel_ended(self, tunnel: Tunnel, error: SniTunError) -> None:
        """Say why, and try again."""
        self.tunnels.discard(tunnel)
        if tunnel in self._retired:
            self._retired.pop(tunnel).cancel()
        is_former = tunnel is not self._serving
        if not is_former:
            self._serving = None
            self._up.clear()
            # By our own successor, whose proof is on its way? Published relays don't say so.
            is_former = self._is_followed and not isinstance(error, DeadLinkError)
        if tunnel is self._opening:
            self._opening = None
            for bridge in tuple(self._held):
                bridge.abort(error)  # its channel is over, and its connection would come no more
            if not self._is_stopping:
                self.attempt_failed(error)
        elif tunnel.proven_at is not None:
            proven_s = self.loop.now - tunnel.proven_at
            if is_former:
                log.info("the former tunnel ended after %.0f s: %s", proven_s, error)
            else:
                self._lost(error, proven_s)
        self.tunnel_closed()

    def _lost(self, error: SniTunError, proven_s: float) -> None:
        """The tunnel that served is over."""
        if self._is_stopping or self._is_draining:
            log.info("tunnel ended after %.0f s: %s", proven_s, error)
        elif not self._is_dialing and self._opening is None and self._retry_timer is None:
            self.attempt_failed(error, proven_s)
        else:  # another one is on its way already
            self.history.add(error, proven_s)
            log.warning("%s", error)
        self._note_change()

    def channel_opened(self, tunnel: Tunnel, channel: Channel, address: bytes) -> None:
        """A device has come: connect to the endpoint, once the relay is proven."""
        access = self.settings.access
        if access is not None and (why := access.refusal(address)):
            tunnel.mux.abort(channel)
            self.limits.refuse("access", f"{unpack_ip(address)}: {why}")
            return
        if self._is_refusing or not self.limits.lets_in():
            tunnel.mux.abort(channel)
            return
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
            self.endpoints.connect(bridge)

    def channel_closed(self, bridge: Bridge) -> None:
        """A device is gone: connect no more for it."""
        if bridge in self._held:
            self._held.remove(bridge)
        self.endpoints.cancel(bridge)
        if bridge.tunnel in self._retired:
            self._end_idle(bridge.tunnel)
        super().channel_closed(bridge)

    # --- settings -------------------------------------------------------------------

    def _reconfigure(self, settings: Settings) -> None:
        former, ticket, self.settings = self.settings, self.ticket, settings
        self.bridges.limit_bytes = settings.budget_bytes
        self.limits.settings = settings
        self.endpoints.replace()
        self.retry.spread_s = settings.reconnect_spread_s
        for tunnel in tuple(self.tunnels):
            tunnel.set_limits(settings.keepalive_s, settings.channel_idle_s)
        self._start_probe()
        if settings.master != former.master:
            if self.master is not None:
                self.master.close()
            self.master = None
            if settings.master is not None:
                self._begin_master(settings.master, ticket).begin()
        if not settings.has_same_tunnel(former) or self._needs_ticket:
            self.renew()
        self._note_change()  # the endpoint is in its summary

    def renew(self) -> None:
        """Open another tunnel; it takes over once it is proven."""
        if not self._is_stopping and not self._is_draining:
            self.retry.reset()
            self.connect()

    def check_cipher(self, ticket: Ticket) -> None:
        """Raise ConfigurationError where the crypto package lacks the ticket's cipher."""
        _new_cipher(ticket, self.aes)

    def _begin_master(self, settings: MasterSettings, former: Ticket | None = None) -> Master:
        from .master import Master  # noqa: PLC0415  many have a ticket of their own

        self.master = Master(self, self._workers, settings, former)
        return self.master

    def _start_probe(self) -> None:
        if self.probe is not None and self.settings.probe_s:
            self.probe.soon()  # until then it stays as it was found
        elif self.probe is not None:
            self.probe.close()
            self.probe = None
        elif self.settings.probe_s:
            from .probe import Probe  # noqa: PLC0415  few want it

            self.probe = Probe(self, self._workers)

    # --- how it is -------------------------------------------------------------------

    def ready(self) -> str:
        """Return why no device gets through, as far as this side can know; "" if one does."""
        state, tunnel = self.state, self._serving
        if state is ClientState.STOPPING:
            return "stopping"
        if tunnel is None:
            last = self.history.last or "connecting for the first time"
            is_turned_away = state in (ClientState.REFUSED, ClientState.REVOKED)
            return (state.value if is_turned_away else "no tunnel") + f": {last}"
        silent_s = self.loop.now - tunnel.received_at
        if silent_s > self.settings.proven_s:
            return f"the relay has said nothing for {silent_s:.0f} s"
        return self.endpoints.doubt() or (self.probe.doubt() if self.probe is not None else "")

    def is_up(self) -> bool:
        return self._serving is not None

    def summary(self) -> str:
        """Return the state in one line, for people."""
        state, ticket, tunnel = self.state, self.ticket, self._serving
        since = f"since {utc(self.state_since)} UTC"
        name = (ticket is not None and ticket.hostname) or "the ticket's hostname"
        if tunnel is not None and state is ClientState.UP:
            what = f"up {since}: {name} at the relay {tunnel.peer} leads to {self.endpoints}"
            failure = self.ready()
            return f"{what}; but {failure}" if failure else what
        text = f"{state.value} {since}"
        if self.history.last and state is not ClientState.STOPPING:
            text += f": {self.history.last}"
        return text

    def report(self) -> dict[str, Any]:
        """Return what /status shows."""
        from .status import report  # noqa: PLC0415

        return report(self)

    def metrics(self) -> list[Family]:
        """Return what /metrics shows."""
        from .status import metrics  # noqa: PLC0415

        return metrics(self)

    def _note_change(self) -> None:
        """The state may have changed: note since when, and tell who wants to know."""
        state = self.state
        if state is not self._state:
            self._state, self.state_since = state, time.time()
        self.tell()

    # --- the end -------------------------------------------------------------------

    def _begin_drain(self) -> bool:
        self._give_up()
        if not self.tunnels:
            return False
        self.loop.call_later(SETTLE_S, self._refuse_channels)
        self._note_change()
        return True

    def _give_up(self) -> None:
        """Open no other tunnel any more."""
        self._drop_attempt()
        if self.master is not None:
            self.master.close()

    def _refuse_channels(self) -> None:
        self._is_refusing = True
        self.endpoints.drain()
        self._stop_if_done()

    def _is_drained(self) -> bool:
        return not self.tunnels or (self._is_refusing and not self.bridges.all)

    def _begin_stop(self) -> None:
        self._give_up()
        for tunnel in tuple(self.tunnels):
            tunnel.finish(LostError("the client is stopping"))

    def _close(self) -> None:
        if self.probe is not None:
            self.probe.close()
        if self._network is not None:
            self._network.close()
        self.endpoints.close()
        self._workers.close()
        self.loop.run_calls()  # the sockets that the workers handed over last
        super()._close()
        self._is_closed = True
        self._up.set()


def _new_cipher(ticket: Ticket, aes: Aes) -> UnitCipher:
    return unit_cipher(
        ticket.cipher,
        aes,
        ticket.aes_key,
        ticket.aes_iv,
        is_relay=False,
        random=os.urandom,
    )
