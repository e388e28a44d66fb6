"""Channels over one byte stream (docs/protocol.md, Frames and Flow control).

A Mux belongs to one tunnel, from the first byte behind the handshake. What the
tunnel receives goes in by `receive`, which calls the channels' owners; what is to
be sent is queued by the methods and comes out of `data_to_send`, its headers
encrypted in one go. Payload is passed on in the pieces in which it arrives: it is
never gathered, whatever size a frame announces.

A channel ends in one of three ways:

    close()    all that was sent, then CLOSE, as soon as the peer can take it: not
               while it has paused the channel, and behind a fence if it may be about
               to. (snitun 0.47.0 drops what it holds above 512 KiB when CLOSE comes
               between its PAUSE and its RESUME.) The fence is two PINGs, one behind the
               other's pong.
    abort()    CLOSE at once
    CLOSE from the peer; it is not answered

After that it is unknown here, and what still arrives for it is dropped.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from ..errors import ViolationError
from .frame import (
    CLOSE,
    DATA,
    EXTRA_PING,
    EXTRA_PING_GOAWAY,
    EXTRA_PONG,
    EXTRA_SIZE,
    GOAWAY,
    HEADER,
    HEADER_SIZE,
    ID_SIZE,
    MAX_NEW_PAYLOAD,
    NEW,
    NEW_PAYLOAD_UNIT,
    PAUSE,
    PING,
    PING_OLD,
    RESUME,
    UNKNOWN_ADDRESS,
    pack_address,
    unpack_address,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol, Union

    from .cipher import UnitCipher

    Buffer = Union[bytes, memoryview]

    class Receiver(Protocol):
        """Who owns a channel and takes what arrives on it."""

        def data_received(self, payload: memoryview) -> None:
            """Take payload, a part of the buffer that `Mux.receive` was given."""

        def take_turn(self) -> None:
            """Send something: it is the channel's turn (see `Mux.wait_for_turn`)."""

        def pause_changed(self) -> None:
            """Look at `Channel.is_paused`: the peer has sent PAUSE or RESUME."""

        def channel_ended(self, *, by_peer: bool) -> None:
            """The channel is over in both directions; nothing is called after this."""

    class Events(Protocol):
        """Who owns the mux: the tunnel."""

        def output_ready(self) -> None:
            """There is something in `Mux.data_to_send`."""

        def channel_opened(self, channel: Channel, address: bytes) -> None:
            """The relay has opened a channel: give it a receiver, or abort it.

            `address` is the device's, 4 or 16 bytes.
            """

        def pong_received(self, ping_id: bytes) -> None:
            """The peer has answered a PING of `Mux.ping`."""

        def goaway_received(self, address: bytes, extra: bytes) -> None:
            """The relay ends the tunnel and says why (see frame.GOAWAY)."""


# A channel that has sent this much closes behind a fence: 0.47.0 pauses at 2 MiB held,
# counting 32 bytes more for a frame. Not even its RESUME shows that it is drained: more
# may be on the way to it, and make it pause again.
FENCE_BYTES = 2 * 1024 * 1024
# A fence is that many PINGs, one after the other's pong: the PAUSE is a task of its own
# over there, and one pong can overtake it (seen in 6 of 2,000 downloads of 64 MiB).
FENCE_ROUNDS = 2
# After this much DATA a PING follows; any pong confirms that all before its PING was read.
CONFIRM_BYTES = 256 * 1024  # to begin with
# After so much from channels that have just become ready, another one gets its turn.
OLD_TURN_BYTES = 128 * 1024


class ChannelState(Enum):
    """OPEN → (FINISHING →) ENDED; changed in Mux alone."""

    OPEN = "open"
    FINISHING = "finishing"  # nothing more to send, CLOSE waits for RESUME or a fence
    ENDED = "ended"


class Channel:
    """One device's connection inside the tunnel."""

    __slots__ = (
        "counted_bytes",
        "fence",
        "fence_rounds",
        "has_paused_peer",
        "id",
        "is_paused",
        "received_bytes",
        "receiver",
        "sent_bytes",
        "state",
        "waits_for_turn",
    )

    def __init__(self, channel_id: bytes) -> None:
        self.id = channel_id
        self.receiver: Receiver | None = None
        self.state = ChannelState.OPEN
        self.is_paused = False  # by the peer: no DATA may be sent
        self.has_paused_peer = False
        self.waits_for_turn = False
        self.fence = b""  # id of the PING whose pong lets CLOSE go
        self.fence_rounds = 0  # PINGs still to be sent
        self.counted_bytes = 0  # sent, as the peer counts it
        self.sent_bytes = self.received_bytes = 0


# A tunnel that never was busy has no lines: 1.2 KiB less.
_NO_TURNS: deque[Channel] = deque()


class Mux:
    """The channels of one tunnel; see the head of this file."""

    __slots__ = (
        "_cipher",
        "_collecting_new",
        "_confirm_bytes",
        "_confirms",
        "_current",
        "_events",
        "_fences",
        "_has_seen_pause",
        "_is_relay",
        "_left",
        "_new_bytes",
        "_new_turns",
        "_old_turns",
        "_partial",
        "_payloads",
        "_peer_knows_goaway",
        "_random",
        "_turn_is_new",
        "_unit_size",
        "_units",
        "_unpinged_bytes",
        "can_pause",
        "channels",
        "unconfirmed_bytes",
        "version",
    )

    def __init__(
        self,
        cipher: UnitCipher,
        version: int,
        events: Events,
        *,
        is_relay: bool,
        random: Callable[[int], bytes],
    ) -> None:
        """Start behind the handshake, in version 0, 1 or 2; `random` is a source of bytes."""
        self._cipher, self.version, self._events = cipher, version, events
        self._is_relay, self._random = is_relay, random
        self.channels: dict[bytes, Channel] = {}
        self.can_pause = version >= 1
        self._has_seen_pause = False
        self._peer_knows_goaway = False
        # Receiving: units are collected in _partial, payloads run through, _left bytes of them.
        self._partial = bytearray()
        self._unit_size = HEADER_SIZE + cipher.overhead
        self._collecting_new: bytes | None = None  # the id whose NEW payload is the next unit
        self._current: Channel | None = None  # whose payload it is; None: drop it
        self._left = 0
        # Sending: units in the order of the wire, each with the plain payload behind it.
        self._units: list[bytes] = []
        self._payloads: list[Buffer | None] = []
        self._fences: dict[bytes, Channel] = {}
        self.unconfirmed_bytes = 0
        """DATA that was sent and, as far as is known, not read by the peer yet."""
        self._confirm_bytes = CONFIRM_BYTES
        self._unpinged_bytes = 0  # the part of it behind the last PING
        self._confirms: dict[bytes, int] = {}  # PINGs, in order, and the bytes before each
        self._turn_is_new = False
        self._new_bytes = 0  # sent by new turns since the last old one
        self._new_turns = self._old_turns = _NO_TURNS

    # --- sending ---------------------------------------------------------------

    def open(self, address: bytes) -> Channel:
        """Open a channel for the device at `address`, 4 or 16 bytes; the relay's side only."""
        channel = Channel(self._random(ID_SIZE))
        self.channels[channel.id] = channel
        if self.version < 2:
            # IPv6 does not fit below version 2
            self._queue(
                NEW, channel.id, pack_address(address if len(address) == 4 else UNKNOWN_ADDRESS)
            )
        else:
            payload = pack_address(address)
            payload += self._random(-len(payload) % NEW_PAYLOAD_UNIT)
            self._queue(NEW, channel.id, size=len(payload))
            self._units.append(payload)
            self._payloads.append(None)
        return channel

    def send(self, channel: Channel, payload: Buffer) -> None:
        """Queue `payload` as one DATA frame; the buffer must stay as it is until `data_to_send`.

        The channel must be OPEN; one that is paused may still send what was read already.
        """
        size = len(payload)
        self._units.append(HEADER.pack(channel.id, DATA, size, self._random(EXTRA_SIZE)))
        self._payloads.append(payload)
        channel.sent_bytes += size
        channel.counted_bytes += size + HEADER_SIZE
        self.unconfirmed_bytes += size
        self._unpinged_bytes += size
        if len(self._units) == 1:
            self._events.output_ready()
        if self._turn_is_new:
            self._new_bytes += size
        if self._unpinged_bytes >= self._confirm_bytes:
            self.ping()

    def close(self, channel: Channel) -> None:
        """End the channel once all that was sent on it can be delivered."""
        if channel.state is ChannelState.OPEN:
            channel.state = ChannelState.FINISHING
            if self.version >= 1 and channel.counted_bytes >= FENCE_BYTES:
                channel.fence_rounds = FENCE_ROUNDS
            self._next_fence(channel)

    def abort(self, channel: Channel) -> None:
        """End the channel at once; what the peer holds for it may be lost."""
        if channel.state is not ChannelState.ENDED:
            self._queue(CLOSE, channel.id)
            self._end(channel, by_peer=False)

    def pause(self, channel: Channel) -> None:
        """Ask the peer to stop sending DATA on the channel; only where `can_pause`."""
        channel.has_paused_peer = True
        self._queue(PAUSE, channel.id)

    def resume(self, channel: Channel) -> None:
        """Let the peer go on."""
        channel.has_paused_peer = False
        self._queue(RESUME, channel.id)

    def ping(self, extra: bytes = EXTRA_PING) -> bytes:
        """Queue a PING; return its random id, which the pong will bear."""
        ping_id = self._random(ID_SIZE)
        self._confirms[ping_id], self._unpinged_bytes = self._unpinged_bytes, 0
        self._queue(PING, ping_id, extra)
        return ping_id

    def confirm_each(self, size: int) -> None:
        """Ask with a PING after each `size` bytes of DATA whether they were read."""
        self._confirm_bytes = size
        if self._unpinged_bytes >= size:
            self.ping()

    def go_away(self, reason: bytes, address: bytes = bytes(16)) -> None:
        """Queue the relay's last frame, why it ends the tunnel, for a client that knows it."""
        if self._peer_knows_goaway:
            self._queue(GOAWAY, address, reason)

    @property
    def queued_frames(self) -> int:
        """How many frames wait in `data_to_send`."""
        return len(self._units)

    def data_to_send(self) -> list[Buffer]:
        """Return what is to be written next, in order, and forget it: sealed units and payloads."""
        units, self._units = self._units, []
        payloads, self._payloads = self._payloads, []
        pieces: list[Buffer] = []
        for sealed, payload in zip(self._cipher.seal(units), payloads) if units else ():
            pieces.append(sealed)
            if payload is not None:
                pieces.append(payload)
        return pieces

    def _queue(self, flow: int, channel_id: bytes, extra: bytes = b"", size: int = 0) -> None:
        extra += self._random(EXTRA_SIZE - len(extra))
        self._units.append(HEADER.pack(channel_id, flow, size, extra))
        self._payloads.append(None)
        if len(self._units) == 1:
            self._events.output_ready()

    def _next_fence(self, channel: Channel) -> None:
        if channel.fence_rounds:
            channel.fence_rounds -= 1
            channel.fence = self.ping()
            self._fences[channel.fence] = channel
        else:
            channel.fence = b""
            self._close_if_possible(channel)

    def _close_if_possible(self, channel: Channel) -> None:
        if not channel.is_paused and not channel.fence:
            self.abort(channel)

    def _end(self, channel: Channel, *, by_peer: bool) -> None:
        channel.state = ChannelState.ENDED
        if channel.waits_for_turn:
            channel.waits_for_turn = False
            for turns in (self._new_turns, self._old_turns):
                if channel in turns:
                    turns.remove(channel)
        self.channels.pop(channel.id, None)
        self._fences.pop(channel.fence, None)
        if channel.receiver is not None:
            channel.receiver.channel_ended(by_peer=by_peer)

    # --- turns -----------------------------------------------------------------

    @property
    def has_turns(self) -> bool:
        """Whether a channel waits for its turn to send."""
        return bool(self._new_turns or self._old_turns)

    def wait_for_turn(self, channel: Channel, *, is_new: bool) -> None:
        """Put the channel in line: it has something to send, and the tunnel is busy.

        One that has just become ready (`is_new`) goes before those that have had a
        turn and want another: a small exchange overtakes a bulk transfer. But where
        both lines are long, each has half of the bytes.
        """
        if not channel.waits_for_turn:
            channel.waits_for_turn = True
            if self._new_turns is _NO_TURNS:
                self._new_turns, self._old_turns = deque(), deque()
            (self._new_turns if is_new else self._old_turns).append(channel)

    def next_turn(self) -> Channel | None:
        """Return the channel whose turn it is, no longer in line, or None."""
        lines = (self._new_turns, self._old_turns)
        if self._new_bytes >= OLD_TURN_BYTES:
            lines = (self._old_turns, self._new_turns)
        for turns in lines:
            while turns:
                channel = turns.popleft()
                channel.waits_for_turn = False
                if channel.state is ChannelState.OPEN:
                    self._turn_is_new = turns is self._new_turns
                    if not self._turn_is_new:
                        self._new_bytes = 0
                    return channel
        return None

    # --- receiving -------------------------------------------------------------

    def receive(self, data: memoryview) -> None:
        """Take what the tunnel has received, in any pieces, and call the channels' receivers.

        The mux keeps nothing of the buffer. Raises ViolationError or AuthenticationError; the
        tunnel must end then.
        """
        at, end = 0, len(data)
        partial = self._partial
        while at < end:
            if self._left:
                payload = data[at : at + self._left]
                at += len(payload)
                self._left -= len(payload)
                channel = self._current
                if channel is not None and channel.state is not ChannelState.ENDED:
                    channel.received_bytes += len(payload)
                    if channel.receiver is not None:
                        channel.receiver.data_received(payload)
                continue
            missing = self._unit_size - len(partial)
            if partial or end - at < missing:
                partial += data[at : at + missing]
                at += missing
                if at > end:
                    return
                unit = bytes(partial)
                partial.clear()
            else:
                unit = bytes(data[at : at + missing])
                at += missing
            plaintext = self._cipher.open(unit)
            if self._collecting_new is None:
                channel_id, flow, self._left, extra = HEADER.unpack(plaintext)
                if flow == DATA:
                    self._current = self.channels.get(channel_id)
                else:
                    self._current = None
                    self._control_received(flow, channel_id, self._left, extra)
            else:
                channel_id, self._collecting_new = self._collecting_new, None
                self._unit_size = HEADER_SIZE + self._cipher.overhead
                self._new_received(channel_id, unpack_address(plaintext))

    def _control_received(self, flow: int, channel_id: bytes, size: int, extra: bytes) -> None:
        channel = self.channels.get(channel_id)
        if flow == NEW:
            self._new_header_received(channel_id, size, extra)
        elif flow in (PING, PING_OLD):
            self._ping_received(channel_id, extra)
        elif flow == GOAWAY:
            if not self._is_relay:
                self._events.goaway_received(channel_id, extra)
        elif channel is None:
            pass  # closed here already, or a flow of the future: its payload is skipped
        elif flow == CLOSE:
            self._end(channel, by_peer=True)
        elif flow == PAUSE:
            self._has_seen_pause = True
            self.can_pause = self.version >= 1
            self._pause_received(channel, is_paused=True)
        elif flow == RESUME:
            self._pause_received(channel, is_paused=False)

    def _new_header_received(self, channel_id: bytes, size: int, extra: bytes) -> None:
        if self.version < 2 or not size:
            if self.version >= 2 and not self._has_seen_pause:
                # A relay that ignores the version: it would end the tunnel on a PAUSE.
                self.can_pause = False
            self._new_received(channel_id, unpack_address(extra))
            return
        if size > MAX_NEW_PAYLOAD or (size % NEW_PAYLOAD_UNIT and not self._cipher.overhead):
            raise ViolationError(
                f"NEW has a payload of {size} bytes, expected at most {MAX_NEW_PAYLOAD} "
                f"and a multiple of {NEW_PAYLOAD_UNIT}"
            )
        self._collecting_new = channel_id
        self._unit_size = size + self._cipher.overhead
        self._left = 0

    def _new_received(self, channel_id: bytes, address: bytes | None) -> None:
        if self._is_relay:
            return  # only relays open channels
        if channel_id in self.channels:
            raise ViolationError(f"NEW for channel {channel_id.hex()[:8]}, which is open")
        if address is None:
            self._queue(CLOSE, channel_id)
            return
        channel = self.channels[channel_id] = Channel(channel_id)
        self._events.channel_opened(channel, address)

    def _ping_received(self, ping_id: bytes, extra: bytes) -> None:
        if not extra.startswith(EXTRA_PONG):
            if ping_id in self._confirms:
                raise ViolationError("our own PING came back: somebody reflects what we send")
            self._peer_knows_goaway |= extra == EXTRA_PING_GOAWAY
            self._queue(PING, ping_id, EXTRA_PONG)
            return
        if ping_id in self._confirms:  # and so are all before it
            for confirmed in tuple(self._confirms):
                self.unconfirmed_bytes -= self._confirms.pop(confirmed)
                if confirmed == ping_id:
                    break
        if (channel := self._fences.pop(ping_id, None)) is not None:
            self._next_fence(channel)
        else:
            self._events.pong_received(ping_id)

    def _pause_received(self, channel: Channel, *, is_paused: bool) -> None:
        channel.is_paused = is_paused
        if channel.state is ChannelState.FINISHING:
            self._close_if_possible(channel)
        elif channel.receiver is not None:
            channel.receiver.pause_changed()
