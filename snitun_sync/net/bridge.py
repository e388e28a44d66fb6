"""A channel and its local socket: the device's at the relay, the endpoint's at the client.

    OPEN ─ local EOF → FINISHING ─ CLOSE sent ─┐
      └──── CLOSE received, tunnel stopped ────┴→ ENDING → CLOSED
      any ─ abort ────────────────────────────────────────→ CLOSED

The socket may come later than the channel (the client has to connect); until then,
and whenever the socket is full, what arrives is held, and counted against the budget
of the process. Above the high watermark the peer is paused. In the other direction a
bridge reads only while the tunnel can take it.

ENDING is what a well-behaved end takes: what is held is flushed, the sending side
is shut down, and input is drained until the other side ends too, or 2 s after it has
taken all. (To close with unread input, or before more input, sends a reset that
destroys the last bytes at the receiver.) An abort is a reset on purpose.

A cipher may stand between the two: the channel has ciphertext then, the socket plaintext.
"""

from __future__ import annotations

import logging
import socket
from enum import Enum

from ..errors import ChannelError, EndpointError, SniTunError
from ..protocol.mux import ChannelState
from .loop import READ, WRITE, Handler
from .sockets import reset_on_close, unacknowledged_bytes
from .tuning import (
    DRAIN_S,
    FINISH_S,
    HIGH_WATERMARK_BYTES,
    IOV_MAX,
    LOW_WATERMARK_BYTES,
    STALLED_S,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from ..protocol.mux import Channel
    from .loop import Timer
    from .tunnel import Tunnel

    class Watcher(Protocol):
        """Who looks at what a bridge holds, until it is clear where its socket leads."""

        def look(self) -> None:
            """More is held."""

        def ended(self) -> None:
            """The device has gone: nothing more comes. Close the bridge, unless it is of use."""

    class Cipher(Protocol):
        """What ends the device's TLS here; see tls.py."""

        is_ended: bool
        """Whether the device has said that it sends no more."""

        def receive(self, data: bytes | memoryview) -> None:
            """Take ciphertext, and copy it."""

        def decrypt(self, into: memoryview) -> int:
            """Fill `into` with plaintext and return how much; 0: no more. Raises SniTunError."""

        def encrypt(self, data: memoryview) -> bytes:
            """Return the ciphertext of `data`. Raises SniTunError."""

        def pending(self) -> bytes:
            """Return what has to be sent besides."""

        def finish(self) -> bytes:
            """Return what says that no more is sent."""


log = logging.getLogger("snitun_sync")


class BridgeState(Enum):
    """See the head of this file."""

    OPEN = "open"
    FINISHING = "finishing"
    ENDING = "ending"
    CLOSED = "closed"


class Bridge(Handler):
    """See the head of this file. It owns its socket and frees it, also on the error path."""

    __slots__ = (
        "_first",
        "_fresh",
        "_has_eof",
        "_is_deaf",
        "_is_half_shut",
        "_is_shut",
        "_queue",
        "_timer",
        "_unacknowledged",
        "active_at",
        "channel",
        "cipher",
        "device",
        "drained_at",
        "error",
        "held_bytes",
        "opened_at",
        "state",
        "tunnel",
        "watcher",
    )

    def __init__(
        self,
        tunnel: Tunnel,
        channel: Channel,
        device: str,
        arrival: Handler | None = None,
        first: bytes = b"",
    ) -> None:
        """Bridge `channel` of `tunnel` to a socket: the arrival's, or what `connected` will bring.

        `device` is the device's address as text, for the log; `first` is what was
        read from the arrival's socket already.
        """
        super().__init__()
        if arrival is not None:
            tunnel.loop.hand_over(arrival, self)
        self.tunnel, self.channel, self.device = tunnel, channel, device
        channel.receiver = self
        self.state = BridgeState.OPEN
        self.watcher: Watcher | None = None
        """Who is told when more is held, until there is a socket; of the client."""
        self.cipher: Cipher | None = None
        """What stands between channel and socket, if anything does; of the client."""
        self.error: SniTunError | None = None
        """Why the bridge was aborted; None while it lives and when it ended well."""
        self.held_bytes = 0
        """What has been received for the socket and not yet taken by it."""
        self.opened_at = self.active_at = self.drained_at = tunnel.loop.now
        self._fresh: list[memoryview] = []  # received in this turn, still in the loop's buffer
        self._queue = bytearray()
        self._has_eof = False  # the socket has said its last word
        self._is_deaf = False  # the socket takes nothing any more; it may still be read
        self._is_shut = self._is_half_shut = False
        self._unacknowledged = 0  # bytes that the other side had not taken at the last look
        self._timer: Timer | None = None
        tunnel.bridges.all.add(self)
        tunnel.bridges.opened += 1
        tunnel.bridges.early_bytes += len(first)
        self._first = first
        self._first_ready()
        self._update()

    def __str__(self) -> str:
        return f"channel {self.channel.id.hex()[:8]} of {self.device}"

    # --- the local socket --------------------------------------------------------

    def connected(self, sock: socket.socket, preface: bytes = b"") -> None:
        """Take the connected socket; the bridge closes it at once if it has ended meanwhile.

        `preface` goes to the socket before all that the device has sent.
        """
        if self.state is BridgeState.CLOSED:
            sock.close()
            return
        self.sock = sock
        self._queue[:0] = preface
        self._write_queue()

    def on_ready(self, events: int) -> None:
        if events & WRITE:
            self._write_queue()
        if events & READ & self.watched:
            if self.state is BridgeState.ENDING:
                self._discard()
            elif self.tunnel.can_send:
                limit = self.tunnel.turn_bytes
                if self._read(limit) == limit:
                    self.tunnel.measure()
            else:
                self.tunnel.wait_for_turn(self.channel, is_new=True)
                self._update()

    def take_turn(self) -> None:
        """Read once and send it: the tunnel has room, and it is this channel's turn."""
        if self.state is BridgeState.OPEN and not self.channel.is_paused:
            limit = self.tunnel.turn_bytes
            if (self._send_first(limit) if self._first else self._read(limit)) == limit:
                self.tunnel.wait_for_turn(self.channel, is_new=False)
            self._update()

    def _first_ready(self) -> None:
        if not self._first or self.channel.is_paused or self.channel.waits_for_turn:
            return
        if self.tunnel.can_send:
            self.take_turn()
        else:
            self.tunnel.wait_for_turn(self.channel, is_new=True)
            self._update()

    def send_first(self, data: bytes) -> None:
        """Send `data` into the channel, before what the socket says next."""
        if data and self.state is BridgeState.OPEN:
            self._first += data
            self.tunnel.bridges.early_bytes += len(data)
            self._first_ready()
            if len(self._first) > HIGH_WATERMARK_BYTES:
                self.abort(ChannelError("the device asks by TLS for ever, and reads nothing"))

    def _send_first(self, limit: int) -> int:
        """Send what was read before there was a bridge, at most `limit` bytes; return how many."""
        first, self._first = self._first[:limit], self._first[limit:]
        self.tunnel.bridges.early_bytes -= len(first)
        self.tunnel.send(self.channel, first)
        return len(first)

    def _read(self, limit: int) -> int:
        """Read once, at most `limit` bytes, and send it on; return how many."""
        if self.sock is None:
            return 0  # it was its turn to send what comes first, and that has gone already
        loop, cipher = self.tunnel.loop, self.cipher
        try:
            data = loop.receive(self.sock, limit, is_kept=cipher is None)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._local_end(error)
            return 0
        if not data:
            self._local_end(None)
            return 0
        self.active_at = loop.now
        size = len(data)
        try:
            self.tunnel.send(self.channel, data if cipher is None else cipher.encrypt(data))
        except SniTunError as error:  # such as a device that leaves a message of TLS half sent
            self.abort(error)
            return 0
        return size

    def _local_end(self, error: OSError | None) -> None:
        """The socket has said its last word; deliver what it said, then CLOSE."""
        self.state = BridgeState.FINISHING
        self._has_eof = True
        if error is not None:
            self._drop_queue()
        elif self.cipher is not None:
            self.tunnel.send(self.channel, self.cipher.finish())
        self.tunnel.mux.close(self.channel)
        if self.state is BridgeState.FINISHING:
            self._timer = self.tunnel.loop.call_later(FINISH_S, self._unfinished)
        self._update()

    def _unfinished(self) -> None:
        self.abort(ChannelError(f"the peer didn't let it end for {FINISH_S:.0f} s"))

    def _write_queue(self) -> None:
        """Give the socket what is held for it."""
        if self._queue and self.sock is not None:
            try:
                size = self.sock.send(self._queue)
            except BlockingIOError:
                size = 0
            except OSError:
                self._drop_queue()
                return
            if size:
                del self._queue[:size]
                self.active_at = self.drained_at = self.tunnel.loop.now
                self._held_changed()
        if self.state is BridgeState.ENDING:
            self._end_step()
        else:
            self._half_shut()
            self._update()

    def _half_shut(self) -> None:
        """Tell the socket that the device sends no more, where it has said so by TLS."""
        if self.cipher is None or not self.cipher.is_ended or self._queue or self._is_half_shut:
            return
        if self.sock is not None:
            self._is_half_shut = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # reset meanwhile: reading tells

    def _drop_queue(self) -> None:
        """The socket takes nothing any more; what it still says is read to its end."""
        self._is_deaf = True
        self._queue.clear()
        self._held_changed()
        if self.state is BridgeState.ENDING:
            self.close()
        else:
            self._update()

    def _discard(self) -> None:
        """Read what the socket still says after its channel has ended, and forget it."""
        assert self.sock is not None
        try:
            data = self.tunnel.loop.receive(self.sock)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not data:
            self._has_eof = True
            self._end_step()

    # --- the channel -------------------------------------------------------------

    def data_received(self, payload: memoryview) -> None:
        if not self._fresh:
            self.tunnel.deliver_later(self)
        self._fresh.append(payload)

    def deliver(self) -> None:
        """Give the socket what has just arrived; hold what it doesn't take."""
        fresh = self._fresh
        if not fresh:
            return
        self._fresh = []
        if self._is_deaf or self.state is BridgeState.CLOSED:
            return
        self.active_at = self.tunnel.loop.now
        if self.cipher is not None:
            self._decrypt(fresh)
            return
        self._give(fresh)
        if self.watcher is not None:
            self.watcher.look()

    def _give(self, pieces: Sequence[memoryview]) -> None:
        sent = 0
        if self.sock is not None and not self._queue:
            try:
                if len(pieces) == 1:
                    sent = self.sock.send(pieces[0])
                else:
                    sent = self.sock.sendmsg(pieces[:IOV_MAX])
            except BlockingIOError:
                pass
            except OSError:
                self._drop_queue()
                return
        for payload in pieces:
            if sent >= len(payload):
                sent -= len(payload)
            else:
                if not self._queue:
                    self.drained_at = self.active_at
                self._queue += payload[sent:]
                sent = 0
        if self._queue:
            self._held_changed()
            self._update()

    # --- the cipher ----------------------------------------------------------------

    @property
    def held(self) -> bytearray:
        """What is held for the socket; it stays the bridge's, and changes when more comes."""
        return self._queue

    def take_held(self) -> bytes:
        """Return what is held, and hold it no longer."""
        data = bytes(self._queue)
        self._queue.clear()
        self._held_changed()
        return data

    def secure(self, cipher: Cipher) -> None:
        """Let `cipher` stand between channel and socket from now on; it has shaken hands."""
        self.cipher = cipher
        self._decrypt([memoryview(self.take_held())])

    def _decrypt(self, pieces: Sequence[memoryview]) -> None:
        """Give the socket the plaintext of what has arrived."""
        cipher, plaintext = self.cipher, self.tunnel.bridges.plaintext()
        assert cipher is not None
        if cipher.is_ended:
            return  # what may come behind the device's last word says nothing
        try:
            for piece in pieces:
                cipher.receive(piece)
                while (size := cipher.decrypt(plaintext)) and not self._is_deaf:
                    self._give([plaintext[:size]])
        except SniTunError as error:
            self.send_first(cipher.pending())  # why, for the device
            self.abort(error)
            return
        self.send_first(cipher.pending())
        self._half_shut()

    # --- the channel's life ----------------------------------------------------------

    def pause_changed(self) -> None:
        log.debug("%s: %s by the peer", self, "paused" if self.channel.is_paused else "resumed")
        self._first_ready()
        self._update()

    def channel_ended(self, *, by_peer: bool) -> None:
        self.deliver()
        if self.state is BridgeState.CLOSED:
            return
        self.state = BridgeState.ENDING
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.watcher is not None:
            self.watcher.ended()
        else:
            self._end_step()

    def _end_step(self) -> None:
        """Go on with a good end: flush, then shut down, then drain."""
        loop = self.tunnel.loop
        if self._queue:
            if self._timer is None:
                self._timer = loop.call_later(STALLED_S, self._stalled)
            self._update()
        elif self.sock is None or self._has_eof or self._is_deaf:
            self.close()
        elif not self._is_shut:
            self._is_shut = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:  # reset meanwhile
                self.close()
                return
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_later(DRAIN_S, self._drain_over)
            self._update()

    def _drain_over(self) -> None:
        """Close, unless the kernel still has something to deliver: a reset would destroy it."""
        assert self.sock is not None
        now = self.tunnel.loop.now
        before, self._unacknowledged = self._unacknowledged, unacknowledged_bytes(self.sock)
        if self._unacknowledged != before:
            self.drained_at = now
        elif not before or self.drained_at + STALLED_S <= now:
            self.close()
            return
        self._timer = self.tunnel.loop.call_later(DRAIN_S, self._drain_over)

    def _stalled(self) -> None:
        """What is held at the end doesn't drain: abort, unless some has meanwhile."""
        left = self.drained_at + STALLED_S - self.tunnel.loop.now
        if left > 0:
            self._timer = self.tunnel.loop.call_later(left, self._stalled)
        else:
            self.abort(
                ChannelError(f"{self.held_bytes} bytes at its end not taken in {STALLED_S:.0f} s")
            )

    # --- what is held -------------------------------------------------------------

    def _held_changed(self) -> None:
        held = len(self._queue)
        delta, self.held_bytes = held - self.held_bytes, held
        if not delta:
            return
        self.tunnel.held_changed(delta)
        channel, bridges = self.channel, self.tunnel.bridges
        if channel.state is ChannelState.ENDED:
            return
        if channel.has_paused_peer:
            if held <= (0 if bridges.is_pressed else LOW_WATERMARK_BYTES):
                log.debug("%s: %d bytes held, the peer may go on", self, held)
                self.tunnel.mux.resume(channel)
        else:
            self.pause_peer_above(1 if bridges.is_pressed else HIGH_WATERMARK_BYTES)

    def pause_peer_above(self, watermark: int) -> None:
        """Ask for no more DATA if this much is held."""
        channel, mux = self.channel, self.tunnel.mux
        if self.watcher is not None:
            watermark = HIGH_WATERMARK_BYTES  # it drains when the rest of a message has come
        if self.held_bytes < watermark or channel.has_paused_peer or not mux.can_pause:
            return
        if channel.state is not ChannelState.ENDED:
            log.debug("%s: %d bytes held, pausing the peer", self, self.held_bytes)
            mux.pause(channel)

    def _update(self) -> None:
        """Watch the socket for what is wanted of it now."""
        if self.sock is None:
            return
        events = 0
        if self._queue:
            events = WRITE
        if self.state is BridgeState.OPEN:
            if not self.channel.is_paused and not self.channel.waits_for_turn:
                events |= READ
        elif self.state is BridgeState.ENDING and not self._has_eof:
            events |= READ
        if events != self.watched:
            self.tunnel.loop.watch(self, events)

    # --- the end -------------------------------------------------------------------

    def abort(self, error: SniTunError) -> None:
        """End the channel and reset the socket, with what is held for either; log why."""
        if self.state is BridgeState.CLOSED:
            return
        self.error = error
        if self.sock is not None:
            reset_on_close(self.sock)
        self.state = BridgeState.CLOSED
        self.tunnel.mux.abort(self.channel)
        self._free()

    def fail(self, error: Exception) -> None:
        self.abort(SniTunError(f"a defect: {error!r}"))

    def close(self) -> None:
        """Close the socket of a channel that has ended."""
        if self.state is not BridgeState.CLOSED:
            self.state = BridgeState.CLOSED
            self._free()

    def _free(self) -> None:
        """Free all that the bridge owns; what is still held is lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fresh = []
        self._queue = bytearray()
        self._held_changed()
        self.watcher = self.cipher = None
        if self._first:
            self.tunnel.bridges.early_bytes -= len(self._first)
            self._first = b""
        self.tunnel.loop.close_socket(self)
        self.tunnel.bridges.ended(self)
        self.channel.receiver = None  # no cycle is left for the collector
        self._log_end()
        self.tunnel.channel_closed(self)

    def _log_end(self) -> None:
        # What the tunnel's own end cuts is in the tunnel's line already.
        level = logging.DEBUG
        if isinstance(self.error, (ChannelError, EndpointError)):
            level = logging.WARNING
        if log.isEnabledFor(level):
            log.log(
                level,
                "%s ended after %.1f s, %d bytes in, %d out: %s",
                self,
                self.tunnel.loop.now - self.opened_at,
                self.channel.received_bytes,
                self.channel.sent_bytes,
                self.error or "closed",
            )
