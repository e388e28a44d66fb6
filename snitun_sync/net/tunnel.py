"""One connection between client and relay: socket, handshake, mux and keepalive.

    OPENING ─ challenge answered → PROVING ─ pong → UP → ENDING → ENDED
                        (the relay's side: UP at once)

Nothing so far proves to a client that the relay knows the key: a recorded stream
could be replayed to it. So it sends a PING with a random id behind its answer, and
counts as up, proven, when the pong with that id has come. Before, it sends nothing more:
whatever it answered could help somebody without the key to forge that pong. Channels
that the relay opens meanwhile are the owner's to hold.

A link that died in silence is found by keepalive: after `keepalive_s` without a byte in one
direction a PING, and the tunnel ends when no byte follows that. Only received bytes count.

Back-pressure goes three steps: PAUSE at a channel's high watermark (bridge.py);
when the process holds all that it may, the tunnel goes unread for some seconds;
then the channel that holds most and doesn't drain is aborted.
"""

from __future__ import annotations

import errno
import logging
import socket
from enum import Enum

from ..errors import (
    AuthenticationError,
    ChannelError,
    DeadLinkError,
    LostError,
    RefusedError,
    RevokedError,
    SniTunError,
    StrangerError,
    TakenOverError,
    UnreachableError,
    ViolationError,
)
from ..protocol.frame import (
    EXPIRED,
    EXTRA_PING,
    EXTRA_PING_GOAWAY,
    REVOKED,
    STOPPING,
    TAKEN_OVER,
)
from ..protocol.mux import Mux
from ..protocol.names import IPV4_MAPPED
from .bridge import Bridge
from .loop import READ, WRITE, Handler
from .sockets import host_text, limit_unacknowledged, limit_unsent, path_rate, unpack_ip
from .tuning import (
    ANSWER_S,
    CHANNEL_IDLE_S,
    DRAIN_S,
    GOAWAY_S,
    HANDSHAKE_S,
    IN_FLIGHT_BYTES,
    IN_FLIGHT_S,
    IOV_MAX,
    JOIN_BYTES,
    KEEPALIVE_S,
    LATE_S,
    LEAST_IN_FLIGHT_BYTES,
    LEAST_TURN_BYTES,
    LEAST_UNSENT_BYTES,
    LEAST_VERSION_0_TURN_BYTES,
    MEASURE_S,
    OUTPUT_LIMIT_BYTES,
    PONG_S,
    PROBE_S,
    PROVING_FRAMES,
    SILENCE_S,
    SUSPEND_S,
    THROTTLED_TURN_BYTES,
    TURN_BYTES,
    TURN_S,
    TURNS_AT_ONCE,
    UNSENT_BYTES,
    UNSENT_S,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from ..protocol.cipher import UnitCipher
    from ..protocol.handshake import Handshake
    from ..protocol.mux import Buffer, Channel
    from .bridges import Bridges
    from .loop import Loop, Timer

    class Owner(Protocol):
        """Client or relay: who opened the tunnel and is told what becomes of it."""

        def tunnel_up(self, tunnel: Tunnel) -> None:
            """The other side has proven that it has the key."""

        def tunnel_ended(self, tunnel: Tunnel, error: SniTunError) -> None:
            """The tunnel is over, for the reason given; its socket is closed."""

        def channel_opened(self, tunnel: Tunnel, channel: Channel, address: bytes) -> None:
            """The relay has opened a channel: give it a Bridge, or abort it."""

        def channel_closed(self, bridge: Bridge) -> None:
            """The bridge is closed, and all that it held is free."""

        def fail(self, error: Exception) -> None:
            """A defect: what the tunnel's end called raised `error`."""


log = logging.getLogger("snitun_sync")

# What the kernel says when its time for an acknowledgement is over: nobody closed anything.
_DEAD = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


class TunnelState(Enum):
    """See the head of this file."""

    OPENING = "opening"
    PROVING = "proving"
    UP = "up"
    ENDING = "ending"
    ENDED = "ended"


class Tunnel(Handler):
    """See the head of this file. It owns its socket, its mux and the channels in it."""

    __slots__ = (
        "_answer_s",
        "_asked_again_at",
        "_asked_at",
        "_check_at",
        "_fresh",
        "_goaway",
        "_goaway_at",
        "_handshake",
        "_in_flight_limit",
        "_interval_s",
        "_is_dirty",
        "_measure_at",
        "_next_frame_at",
        "_owner",
        "_ping_id",
        "_queue",
        "_sent_at",
        "_suspension",
        "_throttle_timer",
        "_timer",
        "_unsent_limit",
        "bridges",
        "channel_idle_s",
        "error",
        "held_bytes",
        "is_relay",
        "keepalive_s",
        "loop",
        "mux",
        "peer",
        "proven_at",
        "received_at",
        "round_trip_s",
        "started_at",
        "state",
        "turn_bytes",
    )

    def __init__(
        self,
        loop: Loop,
        bridges: Bridges,
        arrival: Handler,
        cipher: UnitCipher,
        handshake: Handshake,
        version: int,
        owner: Owner,
        *,
        is_relay: bool,
        peer: str,
        throttling: int | None = None,
        keepalive_s: float = 0.0,
        channel_idle_s: float = 0.0,
    ) -> None:
        """Start the handshake on the socket of `arrival`, which is the tunnel's now.

        The socket is connected and tuned, and maybe watched already.
        `peer` is the other side's address as text, `throttling` the most DATA frames
        to send in a second; `keepalive_s` is the client's; 0 stands for the defaults.
        """
        super().__init__()
        self.loop, self.bridges, self._owner = loop, bridges, owner
        self.is_relay, self.peer = is_relay, peer
        self.mux = Mux(cipher, version, self, is_relay=is_relay, random=loop.random)
        self.state = TunnelState.OPENING
        self.error: SniTunError | None = None
        """Why the tunnel ended: the first reason wins."""
        self.proven_at: float | None = None
        """When the other side had proven itself; None before."""
        self.round_trip_s: float | None = None
        """How long the last pong took to come."""
        self.keepalive_s = keepalive_s or KEEPALIVE_S
        self.channel_idle_s = channel_idle_s or CHANNEL_IDLE_S
        self.held_bytes = 0
        self._handshake: Handshake | None = handshake
        self._queue = bytearray()  # sealed, in the order of the wire; the socket was full
        self._fresh: list[Bridge] = []
        self._is_dirty = False
        self._interval_s = 1 / throttling if throttling else 0.0
        self.turn_bytes = THROTTLED_TURN_BYTES  # until the path is measured, if it will be
        """The most that a channel may send in its turn."""
        self._next_frame_at = 0.0
        self._throttle_timer: Timer | None = None
        self._suspension: Timer | None = None  # while the tunnel isn't read
        self._in_flight_limit = LEAST_IN_FLIGHT_BYTES
        self._unsent_limit = LEAST_UNSENT_BYTES
        self._measure_at = 0.0
        self.started_at = self.received_at = self._sent_at = loop.now
        self._ping_id = b""
        self._asked_at: float | None = None  # when the PING was sent whose pong is awaited
        self._asked_again_at = 0.0  # when the latest was sent, that one or another behind it
        self._answer_s = ANSWER_S  # how soon any byte must follow the latest
        self._check_at = 0.0
        self._goaway: SniTunError | None = None
        self._goaway_at = 0.0
        self._timer: Timer | None = loop.call_later(HANDSHAKE_S, self._handshake_overdue)
        loop.hand_over(arrival, self)
        assert self.sock is not None
        limit_unsent(self.sock, LEAST_UNSENT_BYTES)
        if not is_relay:
            limit_unacknowledged(self.sock, self.keepalive_s + ANSWER_S)
        self._write([handshake.first()])
        self._update()

    # --- opening -----------------------------------------------------------------

    def _handshake_received(self, data: memoryview) -> memoryview:
        """Take what comes before frames; return the first bytes of frames, if there are any."""
        handshake = self._handshake
        assert handshake is not None
        answer = handshake.receive(data)
        if not handshake.is_done:
            return data[:0]
        self._handshake = None
        if answer:
            self._write([answer])
        if self.is_relay:
            self._up()
        else:
            self._ping(EXTRA_PING_GOAWAY)
            self.flush()
            self.state = TunnelState.PROVING
        return memoryview(handshake.rest)

    def _handshake_overdue(self) -> None:
        self._timer = None
        handshake = self._handshake
        kind: type[SniTunError] = UnreachableError  # who says nothing refuses nobody
        if handshake is None:
            what = "no pong to the first PING"
        elif self.is_relay:
            kind, what = RefusedError, "no answer to the challenge"
        elif not handshake.received_size:
            what = "no challenge"
        else:
            kind = RefusedError
            what = (
                f"{handshake.received_size} of {handshake.unit_size} bytes of the challenge: a "
                "relay older than 0.46 ignores the ticket's cipher; use one for aes-cbc"
            )
        self.end(kind(f"{what} within {HANDSHAKE_S:.0f} s"))

    def _up(self) -> None:
        self.state = TunnelState.UP
        self.proven_at = self.loop.now
        self.output_ready()
        if self._timer is not None:
            self._timer.cancel()
        self._check()
        self._owner.tunnel_up(self)

    # --- sending -----------------------------------------------------------------

    @property
    def can_send(self) -> bool:
        """Whether a bridge may read and send now, or has to wait for its turn."""
        return (
            not self._queue
            and self.mux.unconfirmed_bytes < self._in_flight_limit
            and (not self._interval_s or self.loop.now >= self._next_frame_at)
        )

    def send(self, channel: Channel, payload: Buffer) -> None:
        """Send `payload` as one DATA frame; its buffer must stay as it is until the flush."""
        if self._interval_s:
            self._next_frame_at = max(self._next_frame_at, self.loop.now) + self._interval_s
        self.mux.send(channel, payload)

    def wait_for_turn(self, channel: Channel, *, is_new: bool) -> None:
        """Call the channel's `take_turn` when the tunnel has room and others have had theirs."""
        self.mux.wait_for_turn(channel, is_new=is_new)
        self.measure()
        self._update()

    def measure(self) -> None:
        """The tunnel is busy: fit turns and what is on its way to the rate of its path."""
        if self.loop.now < self._measure_at or self.sock is None:
            return
        self._measure_at = self.loop.now + MEASURE_S
        rate, path_bytes = path_rate(self.sock)
        if not rate:
            return
        if not self._interval_s:
            least = LEAST_TURN_BYTES if self.mux.can_pause else LEAST_VERSION_0_TURN_BYTES
            self.turn_bytes = _bounded(rate * TURN_S, least, TURN_BYTES)
        in_flight = _bounded(rate * IN_FLIGHT_S, LEAST_IN_FLIGHT_BYTES, IN_FLIGHT_BYTES)
        self._in_flight_limit = max(in_flight, 2 * path_bytes)
        self.mux.confirm_each(self._in_flight_limit // 4)
        unsent = _bounded(rate * UNSENT_S, LEAST_UNSENT_BYTES, UNSENT_BYTES)
        if not self._unsent_limit // 2 <= unsent <= self._unsent_limit:
            limit_unsent(self.sock, unsent)
            self._unsent_limit = unsent

    def output_ready(self) -> None:
        if not self._is_dirty:
            self._is_dirty = True
            self.loop.flush_later(self)

    def flush(self) -> None:
        """Write what the mux has ready; copy what the socket doesn't take."""
        self._is_dirty = False
        if self.state is TunnelState.PROVING:
            return
        pieces = self.mux.data_to_send()
        if self.sock is not None:
            self._write(pieces)
            self._update()

    def _write(self, pieces: Sequence[Buffer]) -> None:
        if not pieces or self.sock is None:
            return
        sent = 0
        if not self._queue:
            size = sum(map(len, pieces))
            try:
                if size <= JOIN_BYTES:
                    sent = self.sock.send(b"".join(pieces))
                else:
                    sent = self.sock.sendmsg(pieces[:IOV_MAX])
            except BlockingIOError:
                pass
            except OSError as error:
                # Not at once: the caller may be in the middle of something.
                self.loop.call_soon(self.end, self._link_error(error))
                return
            if sent:
                self._sent_at = self.loop.now
            if sent == size:
                return
        for piece in pieces:
            if sent >= len(piece):
                sent -= len(piece)
            else:
                self._queue += piece[sent:] if sent else piece
                sent = 0

    def _write_ready(self) -> None:
        assert self.sock is not None
        if self._queue:
            try:
                size = self.sock.send(self._queue)
            except BlockingIOError:
                return
            except OSError as error:
                self.end(self._link_error(error))
                return
            del self._queue[:size]
            self._sent_at = self.loop.now
        if self.state is TunnelState.ENDING:
            self._end_step()
        else:
            self._take_turns()
        self._update()

    def _take_turns(self) -> None:
        for _ in range(TURNS_AT_ONCE):
            if not self.can_send:
                break
            channel = self.mux.next_turn()
            if channel is None:
                break
            if channel.receiver is not None:
                channel.receiver.take_turn()

    def _throttle_over(self) -> None:
        self._throttle_timer = None
        self._take_turns()
        self._update()

    # --- receiving ---------------------------------------------------------------

    def on_ready(self, events: int) -> None:
        if events & WRITE:
            self._write_ready()
        if events & READ & self.watched:
            self._read()

    def _read(self) -> None:
        assert self.sock is not None
        try:
            data = self.loop.receive(self.sock)
        except BlockingIOError:
            return
        except OSError as error:
            self.end(self._link_error(error))
            return
        if not data:
            self.end(self._link_error(None))
            return
        self.received_at = self.loop.now
        if self.state is TunnelState.ENDING:
            return  # drained
        failure = None
        try:
            if self._handshake is not None:
                data = self._handshake_received(data)
            self.mux.receive(data)
            if self.state is TunnelState.PROVING and self.mux.queued_frames > PROVING_FRAMES:
                raise ViolationError("too many frames before the answer to the first PING")
        except (AuthenticationError, StrangerError, ViolationError) as error:
            failure = error
        fresh, self._fresh = self._fresh, []
        for bridge in fresh:
            bridge.deliver()
        if failure is not None:
            self.end(failure)
            return
        if self.bridges.is_full:
            self._relieve()
        if self.mux.has_turns:
            self._update()

    def deliver_later(self, bridge: Bridge) -> None:
        """Call `deliver` when all that has been received is parsed."""
        self._fresh.append(bridge)

    def channel_opened(self, channel: Channel, address: bytes) -> None:
        if self.state in (TunnelState.ENDING, TunnelState.ENDED):
            self.mux.abort(channel)
            return
        self._owner.channel_opened(self, channel, address)

    def channel_closed(self, bridge: Bridge) -> None:
        """A bridge of this tunnel is closed."""
        self._owner.channel_closed(bridge)

    def pong_received(self, ping_id: bytes) -> None:
        if ping_id == self._ping_id and self._asked_at is not None:
            self.round_trip_s = self.loop.now - self._asked_at
            self._asked_at = None
            if self.state is TunnelState.PROVING:
                self._up()

    def goaway_received(self, address: bytes, extra: bytes) -> None:
        if self.state in (TunnelState.OPENING, TunnelState.PROVING):
            return
        reason, port = extra[:4], int.from_bytes(extra[4:6], "big")
        if reason == TAKEN_OVER:
            text = f"another connection, from {_mapped_text(address, port)}, took over"
        elif reason == EXPIRED:
            text = "the token has expired"
        elif reason == STOPPING:
            text = "the relay is stopping"
        elif reason == REVOKED:
            text = "the token was revoked"
        else:
            text = "the relay ended the tunnel"
        kind = {TAKEN_OVER: TakenOverError, REVOKED: RevokedError}.get(reason, LostError)
        self._goaway = kind(text)
        self._goaway_at = self.loop.now

    def _link_error(self, error: OSError | None) -> SniTunError:
        """Say what the end of the connection means, EOF if `error` is None."""
        if self._goaway is not None and self.loop.now - self._goaway_at < GOAWAY_S:
            return self._goaway
        other = "client" if self.is_relay else "relay"
        how = f"the {other} closed the connection"
        if error is not None:
            how = f"the connection to the {other} broke ({error.strerror or error})"
            if error.errno in _DEAD:
                is_up = self.state is TunnelState.UP
                return DeadLinkError(how) if is_up else UnreachableError(how)
        if self.state is TunnelState.PROVING:
            return RefusedError(
                f"{how} on the answer to its challenge: aes_key and aes_iv are not the token's"
            )
        if self.state is not TunnelState.OPENING:
            return LostError(how)
        if self.is_relay:
            return RefusedError(f"{how} before it answered the challenge")
        return RefusedError(
            f"{how} before it sent a challenge: it refuses the token, "
            "which has expired, was revoked, or is signed with a Fernet key that the relay doesn't "
            "have"
        )

    # --- back-pressure -------------------------------------------------------------

    def held_changed(self, delta: int) -> None:
        """A bridge of this tunnel holds `delta` bytes more."""
        before = self.held_bytes
        self.held_bytes += delta
        self.bridges.holding_tunnels += bool(self.held_bytes) - bool(before)
        self.bridges.changed(delta)
        # Whatever others hold: with little of its own, a tunnel goes on.
        if self._suspension is not None and self._share_held < 0.5:
            self.resume_reading()

    @property
    def _share_held(self) -> float:
        """What the tunnel holds of its fair share of the budget: 1 is all of it."""
        bridges = self.bridges
        return self.held_bytes * bridges.holding_tunnels / bridges.limit_bytes

    def _relieve(self) -> None:
        """The process holds all that it may: abort what has stalled, or stop reading."""
        bridges = self.bridges
        bridges.abort_stalled(self.loop.now)
        # A tunnel that holds less than its share goes on: others are to blame.
        if bridges.is_full and self._share_held >= 1 and self._suspension is None:
            self._suspension = self.loop.call_later(SUSPEND_S, self._suspension_over)
            bridges.suspended.add(self)
            self._update()

    def _suspension_over(self) -> None:
        bridges = self.bridges
        before = len(bridges.all)
        bridges.abort_stalled(self.loop.now)
        holders = [b for b in bridges.all if b.tunnel is self and b.held_bytes]
        if holders and len(bridges.all) == before:  # all of them drain, but too slowly
            bridges.abort_one(holders)
        self.resume_reading()

    def resume_reading(self) -> None:
        """There is room again: go on reading the tunnel."""
        self.bridges.suspended.discard(self)
        if self._suspension is not None:
            self._suspension.cancel()
            self._suspension = None
            # The peer was not silent, we did not listen: its time starts anew.
            if self._asked_at is not None:
                self._asked_at = self._asked_again_at = self.loop.now
            self.received_at = self.loop.now
            self._update()

    # --- keepalive -----------------------------------------------------------------

    def probe(self) -> None:
        """Something has changed: end soon if the other side doesn't answer a PING."""
        if self.state is TunnelState.UP and not self.is_relay and self._suspension is None:
            now, asked_at = self.loop.now, self._asked_at
            if asked_at is None or self.received_at > self._asked_again_at:
                self._ping()
                self._answer_s = PROBE_S
            else:  # it owes an answer already: another question gives it no more time
                self._answer_s = min(self._answer_s, now + PROBE_S - self._asked_again_at)
            if self._timer is not None:
                self._timer.cancel()
            self._check()

    def set_limits(self, keepalive_s: float, channel_idle_s: float) -> None:
        """Take other time limits from now on; as a client."""
        self.keepalive_s, self.channel_idle_s = keepalive_s, channel_idle_s
        if self.sock is not None:
            limit_unacknowledged(self.sock, keepalive_s + ANSWER_S)
        if self.state is TunnelState.UP and self._timer is not None:
            self._timer.cancel()
            self._check()

    def _ping(self, extra: bytes = EXTRA_PING) -> None:
        ping_id = self.mux.ping(extra)
        if self._asked_at is None:  # else it is the first one's pong that is awaited
            self._ping_id, self._asked_at = ping_id, self.loop.now
        self._asked_again_at = self.loop.now
        self._answer_s = ANSWER_S

    @property
    def _alive_at(self) -> float:
        """When the other side last showed that it is there.

        By sending; or, as long as we don't read because it doesn't take what is
        queued for it, by taking something.
        """
        if len(self._queue) < OUTPUT_LIMIT_BYTES:
            return self.received_at
        return max(self.received_at, self._sent_at)

    def _check(self) -> None:
        """See whether the peer still lives, and which channels don't."""
        self._timer = None
        now, asked_at = self.loop.now, self._asked_at
        is_overdue = False
        if self._check_at and now > self._check_at + LATE_S:
            # This process or machine slept: whatever has come meanwhile is read first.
            self._check_at = 0.0
            if asked_at is not None:
                self._asked_at = self._asked_again_at = now
            elif not self.is_relay:
                self._ping()
                self._answer_s = PROBE_S
            self._timer = self.loop.call_later(1.0, self._check)
            return
        if self.is_relay:
            left_s = self._alive_at + SILENCE_S - now
            is_overdue = left_s <= 0.001
        elif asked_at is not None:
            again_at = self._asked_again_at
            answer_s = self._answer_s if self.received_at <= again_at else ANSWER_S
            left_s = min(max(self._alive_at, again_at) + answer_s, asked_at + PONG_S) - now
            is_overdue = left_s <= 0.001
        else:
            left_s = min(self.received_at, self._sent_at) + self.keepalive_s - now
            if left_s <= 0.001:
                self._ping()
                left_s = ANSWER_S
        if is_overdue and self._suspension is None:
            what = "was silent" if self._asked_at is None else "answered no PING"
            since_s = now - (self._alive_at if asked_at is None else asked_at)
            self.end(DeadLinkError(f"the other side {what} for {since_s:.0f} s"))
            return
        left_s = max(min(left_s, self.channel_idle_s), 1.0)
        self._timer, self._check_at = self.loop.call_later(left_s, self._check), now + left_s
        self._abort_idle(now - self.channel_idle_s)

    def _abort_idle(self, limit: float) -> None:
        for bridge in [b for b in self.live_bridges() if b.active_at < limit]:
            bridge.abort(ChannelError(f"idle for {self.channel_idle_s:.0f} s"))

    def live_bridges(self) -> list[Bridge]:
        """Return the bridges of channels that are open."""
        receivers = (channel.receiver for channel in self.mux.channels.values())
        return [receiver for receiver in receivers if isinstance(receiver, Bridge)]

    # --- the end -------------------------------------------------------------------

    def finish(self, error: SniTunError, goaway: bytes = b"", address: bytes = bytes(16)) -> None:
        """End well: CLOSE for every channel, a word of why, then the connection.

        `goaway` is one of frame.GOAWAY's reasons, with what belongs to it; the
        relay's side only.
        """
        if self.state in (TunnelState.ENDING, TunnelState.ENDED):
            return
        if self.state is not TunnelState.UP:
            self.end(error)
            return
        self.error = self.error or error
        for channel in tuple(self.mux.channels.values()):
            self.mux.abort(channel)
        if goaway:
            self.mux.go_away(goaway, address)
        self.state = TunnelState.ENDING
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(DRAIN_S, self._drained)
        self.flush()
        self._end_step()

    def _end_step(self) -> None:
        if self.sock is not None and not self._queue:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._drained()

    def _drained(self) -> None:
        self.end(self.error or LostError("stopped"))

    def end(self, error: SniTunError) -> None:
        """End at once; channels are reset, as what they carried may be cut short."""
        if self.state is TunnelState.ENDED:
            return
        self.state = TunnelState.ENDED
        self.error = self.error or error
        for timer in (self._timer, self._throttle_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._throttle_timer = None
        self.loop.close_socket(self)
        self.resume_reading()
        self._queue.clear()
        for bridge in self.live_bridges():
            bridge.abort(self.error)
        self._owner.tunnel_ended(self, self.error)

    def fail(self, error: Exception) -> None:
        if self.state is TunnelState.ENDED:  # its owner's code raised it
            self._owner.fail(error)
        self.end(SniTunError(f"a defect: {error!r}"))

    def _update(self) -> None:
        """Watch the socket for what is wanted of it now."""
        if self.sock is None:
            return
        events = 0
        if self._suspension is None and len(self._queue) < OUTPUT_LIMIT_BYTES:
            events = READ
        if self._queue:
            events |= WRITE
        elif self.mux.has_turns:
            if self.can_send:
                events |= WRITE
            elif self._next_frame_at > self.loop.now and self._throttle_timer is None:
                self._throttle_timer = self.loop.call_later(
                    self._next_frame_at - self.loop.now, self._throttle_over
                )
        if events != self.watched:
            self.loop.watch(self, events)


def _bounded(size: float, least: int, most: int) -> int:
    return min(max(int(size), least), most)


def _mapped_text(address: bytes, port: int) -> str:
    if address.startswith(IPV4_MAPPED):
        address = address[12:]
    return host_text(unpack_ip(address), port)
