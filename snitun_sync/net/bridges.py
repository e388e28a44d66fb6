"""All bridges of a process, and the bytes that they may hold together."""

from __future__ import annotations

from ..errors import ChannelError
from .tuning import PRESSURE_OVER_SHARE, PRESSURE_SHARE, RESUME_READING_SHARE, SUSPEND_S

# One for all bridges, and none where there is no cipher.
PLAINTEXT_BYTES = 64 * 1024

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .bridge import Bridge
    from .tunnel import Tunnel


class Bridges:
    """See the head of this file."""

    __slots__ = (
        "_plaintext",
        "aborted",
        "all",
        "early_bytes",
        "ended_received_bytes",
        "ended_sent_bytes",
        "held_bytes",
        "holding_tunnels",
        "is_pressed",
        "limit_bytes",
        "opened",
        "suspended",
    )

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.all: set[Bridge] = set()
        self.early_bytes = 0
        """The relay: what has come before there was room for it in a tunnel; see EARLY_BYTES."""
        self.holding_tunnels = 0
        """How many tunnels have bridges that hold anything."""
        self.is_pressed = False
        """Whether so much is held that no channel may hold more than it has."""
        self.suspended: set[Tunnel] = set()
        """Tunnels that are not read until there is room again."""
        self.opened = self.aborted = 0
        """How many bridges there were, and how many of them didn't end well."""
        self._plaintext = memoryview(b"")
        self.ended_received_bytes = self.ended_sent_bytes = 0
        """What the channels carried that are over, as seen from the tunnel."""

    def ended(self, bridge: Bridge) -> None:
        """A bridge is over: what it carried counts."""
        self.all.discard(bridge)
        self.aborted += bridge.error is not None
        self.ended_received_bytes += bridge.channel.received_bytes
        self.ended_sent_bytes += bridge.channel.sent_bytes

    def plaintext(self) -> memoryview:
        """Return the buffer for what is on its way out of a cipher; it lasts until the next use."""
        if not self._plaintext:
            self._plaintext = memoryview(bytearray(PLAINTEXT_BYTES))
        return self._plaintext

    def carried_bytes(self) -> tuple[int, int]:
        """Return what all channels so far have received from the tunnel, and sent into it."""
        channels = [bridge.channel for bridge in self.all]
        return (
            self.ended_received_bytes + sum(channel.received_bytes for channel in channels),
            self.ended_sent_bytes + sum(channel.sent_bytes for channel in channels),
        )

    @property
    def is_full(self) -> bool:
        """Whether the budget is used up."""
        return self.held_bytes > self.limit_bytes

    def changed(self, delta: int) -> None:
        """Account for `delta` more bytes held; let tunnels go on when there is room again."""
        self.held_bytes += delta
        if self.is_pressed:
            self.is_pressed = self.held_bytes > self.limit_bytes * PRESSURE_OVER_SHARE
        elif self.held_bytes > self.limit_bytes * PRESSURE_SHARE:
            self.is_pressed = True
            for bridge in self.all:
                bridge.pause_peer_above(1)
        if self.suspended and self.held_bytes <= self.limit_bytes * RESUME_READING_SHARE:
            for tunnel in tuple(self.suspended):
                tunnel.resume_reading()

    def abort_stalled(self, now: float) -> None:
        """Abort the channels that hold most and take nothing, until there is room."""
        limit = now - SUSPEND_S
        stalled = [b for b in self.all if b.held_bytes and b.drained_at <= limit]
        while self.is_full and stalled:
            stalled.remove(self.abort_one(stalled))

    def abort_one(self, bridges: list[Bridge]) -> Bridge:
        """Abort the one that holds most, and return it."""
        worst = max(bridges, key=lambda bridge: bridge.held_bytes)
        worst.abort(
            ChannelError(
                f"aborted: it held {worst.held_bytes} bytes that were not taken, and the "
                f"process may hold {self.limit_bytes}"
            )
        )
        return worst
