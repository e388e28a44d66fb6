"""Names that lead straight to an address: --route NAME=HOST:PORT[,proxy-v2].

    device ⇄ relay ⇄ HOST:PORT       the device's TLS as it is, from its ClientHello on

Nothing is held here: what one socket says is looked at, offered to the other one, and taken
from the kernel only as far as that takes it. So whoever reads slowly is waited for by TCP
itself, and costs the relay no memory. Each direction ends on its own.
"""

from __future__ import annotations

import logging
import socket
import sys

from ..errors import ChannelError, EndpointError, LostError, SniTunError, UsageError
from ..net.endpoint import Endpoint
from ..net.figures import counters, gauge
from ..net.loop import READ, WRITE, Handler
from ..net.sockets import pack_ip, reset_on_close
from ..net.tuning import DRAIN_S
from ..net.workers import Workers
from ..protocol.hello import ALERT_INTERNAL_ERROR
from ..protocol.names import dns_name, parse_address, shown
from ..protocol.proxy_protocol import version_2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..net.loop import Timer
    from ..net.openmetrics import Family
    from ..protocol.names import Address
    from .arrival import Arrival
    from .server import Server

    Parsed = dict[str, tuple[Address, bool]]
    """By name, the address and whether it wants a PROXY header."""

log = logging.getLogger("snitun_sync")

PROXY_V2 = ",proxy-v2"
# What is looked at in one go.
PIECE_BYTES = 128 * 1024
# Linux needn't copy what is thrown away (tcp(7)).
_DISCARD = socket.MSG_TRUNC if sys.platform == "linux" else 0


def parse_routes(texts: Sequence[str]) -> Parsed:
    """Read the values of --route. Raises UsageError."""
    routes: Parsed = {}
    for text in texts:
        name, separator, place = text.partition("=")
        if not separator or not name:
            raise UsageError(f"--route: {shown(text)}; expected NAME=HOST:PORT, with a DNS name")
        name = dns_name(name, "--route")
        if name in routes:
            raise UsageError(f"--route: {name} is there twice")
        address = parse_address(place.removesuffix(PROXY_V2), "--route", can_be_unix=True)
        routes[name] = address, place.endswith(PROXY_V2)
    return routes


class Routes:
    """All routes of a relay, and the connections through them."""

    def __init__(self, server: Server, parsed: Parsed) -> None:
        self.server = server
        self.workers = Workers(server.loop)  # for names
        self.by_name = {
            name: Route(name, Endpoint(server.loop, self.workers, address), has_proxy)
            for name, (address, has_proxy) in parsed.items()
        }
        self.all: set[Passage] = set()
        self.places: set[object] = set()
        """What routes have connected: this side's address, and the other one's port."""
        self.buffer = memoryview(bytearray(PIECE_BYTES))

    def take(self, arrival: Arrival, hostname: str) -> bool:
        """Serve the device if a route has its name; `arrival` gives its socket away then."""
        route = self.by_name.get(hostname)
        if route is None:
            return False
        assert arrival.sock is not None
        if (arrival.host, arrival.port, arrival.sock.getsockname()[1]) in self.places:
            log.warning("the route %s leads back to this relay", route.name)
            arrival.refuse(ALERT_INTERNAL_ERROR)
        else:
            Passage(self, route, arrival)
        return True

    def report(self) -> list[dict[str, Any]]:
        """Return what /status shows."""
        return [
            {
                "name": name,
                "address": str(route.endpoint),
                "open": sum(passage.route is route for passage in self.all),
                "opened": route.opened,
                "failed": route.endpoint.failures,
                "failure": route.endpoint.failure or None,
                "received_bytes": route.received_bytes,
                "sent_bytes": route.sent_bytes,
            }
            for name, route in self.by_name.items()
        ]

    def metrics(self, prefix: str) -> list[Family]:
        """Return what /metrics shows."""
        prefix, routes = f"{prefix}_route", self.report()
        ways = ("received", "sent")  # from devices, and to them
        carried = [
            ({"route": route["name"], "direction": way}, route[f"{way}_bytes"])
            for route in routes
            for way in ways
        ]

        def counted(name: str) -> dict[str, int]:
            return {route["name"]: route[name] for route in routes}

        return [
            gauge(f"{prefix}_connections", "Devices that a route serves.", len(self.all)),
            counters(f"{prefix}_opened", "Devices so far.", "route", counted("opened")),
            counters(f"{prefix}_failed", "Address not reached.", "route", counted("failed")),
            (f"{prefix}_bytes", "counter", "bytes", "Payload by routes.", carried),
        ]

    def close(self) -> None:
        """Close all connections."""
        self.workers.close()
        for passage in tuple(self.all):
            passage.close()


class Route:
    """One name, and what has happened there so far."""

    __slots__ = (
        "endpoint",
        "failure",
        "has_proxy",
        "name",
        "opened",
        "received_bytes",
        "sent_bytes",
    )

    def __init__(self, name: str, endpoint: Endpoint, has_proxy: bool) -> None:
        self.name, self.endpoint, self.has_proxy = name, endpoint, has_proxy
        self.opened = self.received_bytes = self.sent_bytes = 0
        """Connections of devices; bytes from them, and to them."""
        self.failure = ""
        """Why the address can't be reached, as the log has it already; "" while it can."""


class Side(Handler):
    """One socket of a passage, and the way from there to the other one."""

    __slots__ = ("carried_bytes", "first", "has_eof", "is_deaf", "is_full", "other", "passage")

    def __init__(self, passage: Passage) -> None:
        super().__init__()
        self.passage = passage
        self.other: Side = self
        self.first = b""
        """What goes before all that the socket says: it was read, or made up, already."""
        self.carried_bytes = 0
        self.has_eof = self.is_deaf = self.is_full = False
        """It says nothing any more; it takes nothing any more; it takes nothing just now."""

    def on_ready(self, events: int) -> None:
        if events & WRITE:
            self.is_full = False
            self.other.carry()
        if events & READ & self.watched:
            self.carry()
        self.passage.update()

    def carry(self) -> None:
        """Offer the other socket what this one says; take from the kernel what that takes."""
        other, passage = self.other, self.passage
        if self.first:
            size = other.take(self.first)
            self.first = self.first[size:]
            passage.early(-size)
            passage.carried(self, size)
        if other.is_full or self.has_eof or self.sock is None:
            return
        buffer = passage.routes.buffer
        try:
            size = self.sock.recv_into(buffer, 0, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:  # it was reset
            self.is_deaf, size = True, 0
        if size:
            size = other.take(buffer[:size])
            passage.carried(self, size)
            if size:
                self.sock.recv_into(buffer, size, _DISCARD)
        else:
            self.has_eof = True
            other.shut()

    def take(self, data: bytes | memoryview) -> int:
        """Return how much of `data` the socket takes: all, where it is of no use any more."""
        size = 0
        if not self.is_deaf:
            assert self.sock is not None
            try:
                size = self.sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self.is_deaf = True
        if self.is_deaf:
            self.is_full = False
            return len(data)
        self.is_full = size < len(data)
        return size

    def shut(self) -> None:
        """Tell the socket that nothing more comes."""
        try:
            if self.sock is not None:
                self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.is_deaf = True  # reset

    def fail(self, error: Exception) -> None:
        self.passage.abort(SniTunError(f"a defect: {error!r}"))


class Passage:
    """One device's connection through a route."""

    __slots__ = (
        "_active_at",
        "_early_bytes",
        "_opened_at",
        "_place",
        "_timer",
        "error",
        "name",
        "route",
        "routes",
        "sides",
    )

    def __init__(self, routes: Routes, route: Route, arrival: Arrival) -> None:
        """Connect on; the socket of `arrival` is the passage's now."""
        loop = routes.server.loop
        self.routes, self.route, self.name = routes, route, str(arrival)
        self._place: object = None
        self.error: SniTunError | None = None
        device, target = self.sides = Side(self), Side(self)
        device.other, target.other = target, device
        device.first = arrival.received
        if route.has_proxy:
            address = pack_ip(arrival.host)
            header = version_2(address, port=arrival.port, authority=route.name)
            device.first = header + device.first
        self._early_bytes = 0
        self.early(len(device.first))
        routes.all.add(self)  # before the arrival's end: a relay that stops waits for one of them
        loop.hand_over(arrival, device)
        arrival.close()
        loop.watch(device, 0)
        route.opened += 1
        self._opened_at = self._active_at = loop.now
        self._timer: Timer | None = None
        self._check_idle()
        route.endpoint.connect(self)

    def __str__(self) -> str:
        return f"{self.name}: route {self.route.name}"

    def early(self, delta: int) -> None:
        """So many bytes more are held for the address."""
        self._early_bytes += delta
        self.routes.server.bridges.early_bytes += delta

    def carried(self, side: Side, size: int) -> None:
        """So many bytes have come from a side."""
        self._active_at = self.routes.server.loop.now
        side.carried_bytes += size
        if side is self.sides[0]:
            self.route.received_bytes += size
        else:
            self.route.sent_bytes += size

    def connected(self, sock: socket.socket) -> None:
        """Own the connected socket from now on."""
        device, target = self.sides
        target.sock, self.route.failure = sock, ""
        self._place = (*sock.getsockname()[:2], self.route.endpoint.address.port)
        self.routes.places.add(self._place)
        device.carry()
        self.update()

    def update(self) -> None:
        """Something was carried, or can't be: see what comes next."""
        device, target = self.sides
        if (device.has_eof and target.has_eof) or (device.is_deaf and target.is_deaf):
            self.close()
            return
        loop = self.routes.server.loop
        for side in self.sides:
            if side.has_eof and side.is_deaf and self.error is None:
                # Closed with something unread, the other one would be reset: that may
                # overtake what was sent there.
                self._drain(LostError("reset"))
            if side.sock is not None:
                wants_read = not side.has_eof and not side.other.is_full
                loop.watch(side, READ * wants_read | WRITE * side.is_full)

    def _drain(self, error: SniTunError) -> None:
        self.error = error
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.routes.server.loop.call_later(DRAIN_S, self.close)

    def _check_idle(self) -> None:
        server = self.routes.server
        left_s = self._active_at + server.channel_idle_s - server.loop.now
        if left_s > 0:
            self._timer = server.loop.call_later(left_s, self._check_idle)
        else:
            self.abort(ChannelError(f"idle for {server.channel_idle_s:.0f} s"))

    def abort(self, error: SniTunError) -> None:
        """End it: by an alert where there is no connection to the address, else by a reset."""
        device, target = self.sides
        if target.sock is None and device.sock is not None and self.error is None:
            target.has_eof = target.is_deaf = True
            device.take(ALERT_INTERNAL_ERROR)
            device.first = b""
            self.early(-self._early_bytes)
            device.shut()
            self._drain(error)
            self.update()
            return
        for side in self.sides:
            if side.sock is not None:
                reset_on_close(side.sock)
        self.error = error
        self.close()

    def fail(self, error: Exception) -> None:
        self.abort(SniTunError(f"a defect: {error!r}"))

    def close(self) -> None:
        """Free all that is owned."""
        routes, route = self.routes, self.route
        if self not in routes.all:
            return
        routes.all.discard(self)
        routes.places.discard(self._place)
        route.endpoint.cancel(self)
        if self._timer is not None:
            self._timer.cancel()
        self.early(-self._early_bytes)
        device, target = self.sides
        for side in self.sides:
            routes.server.loop.close_socket(side)
            side.other = side  # no cycle is left for the collector
        level = logging.DEBUG
        if isinstance(self.error, EndpointError) and str(self.error) != route.failure:
            level, route.failure = logging.WARNING, str(self.error)
        log.log(
            level,
            "%s ended after %.1f s, %d bytes in, %d out: %s",
            self,
            routes.server.loop.now - self._opened_at,
            device.carried_bytes,
            target.carried_bytes,
            self.error or "closed",
        )
        routes.server.arrival_closed()
