"""The endpoint: the local service, to which each channel gets a connection of its own."""

from __future__ import annotations

import logging
from functools import partial

from ..errors import EndpointError
from ..net.connecting import Connecting
from ..net.sockets import blocking_resolve, numeric_places
from ..net.tuning import CONNECT_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from ..net.bridge import Bridge
    from ..net.loop import Loop, Timer
    from ..net.sockets import Place
    from ..net.workers import Workers
    from ..protocol.names import Address

log = logging.getLogger("snitun_sync")

# Connections being opened at a time. Each takes a descriptor, and a device waits for it.
OPENING_LIMIT = 512
# How long the addresses of a name are used before it is resolved again.
RESOLVED_S = 10.0


class Endpoint:
    """Opens connections to one address, on the loop; a worker resolves a name."""

    def __init__(self, loop: Loop, workers: Workers, address: Address) -> None:
        self._loop, self._workers = loop, workers
        self._opening: dict[Bridge, Connecting | None] = {}  # None: the name comes first
        self._is_resolving = False
        self._timer: Timer | None = None  # while channels wait for a name
        self.replace(address)

    def __str__(self) -> str:
        return str(self.address)

    def replace(self, address: Address) -> None:
        """Open connections to `address` from now on."""
        self.address = address
        self._places = numeric_places(address)
        self._resolved_until = float("inf") if self._places else 0.0

    def connect(self, bridge: Bridge) -> None:
        """Open a connection for the bridge: call its `connected`, or abort it."""
        if len(self._opening) >= OPENING_LIMIT:
            bridge.abort(EndpointError(f"too many connections wait for endpoint {self}"))
        elif self._loop.now < self._resolved_until:
            self._start(bridge)
        else:
            self._opening[bridge] = None
            if self._timer is None:
                self._timer = self._loop.call_later(CONNECT_S, self._overdue)
            if not self._is_resolving:
                self._resolve()

    def cancel(self, bridge: Bridge) -> None:
        """The bridge needs no connection any more; harmless when it has one."""
        connecting = self._opening.pop(bridge, None)
        if connecting is not None:
            connecting.close()

    def _overdue(self) -> None:
        self._timer = None
        self._give_up(f"its name is not resolved within {CONNECT_S:.0f} s")

    def _give_up(self, why: str) -> None:
        """Abort the channels that wait for the name."""
        for bridge in self._waiting():
            del self._opening[bridge]
            bridge.abort(EndpointError(f"can't reach endpoint {self}: {why}"))

    def _waiting(self) -> list[Bridge]:
        return [bridge for bridge, connecting in self._opening.items() if connecting is None]

    def _resolve(self) -> None:
        address = self.address
        resolve = partial(blocking_resolve, address)
        self._is_resolving = self._workers.submit(resolve, partial(self._resolved, address))
        if not self._is_resolving:
            error = OSError("no thread can be started to resolve the name")
            self._resolved(address, None, error)

    def _resolved(
        self, address: Address, places: list[Place] | None, error: Exception | None
    ) -> None:
        self._is_resolving = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if address is not self.address:  # it was replaced meanwhile
            places = self._places
            if not places:
                self._resolve()
                return
        elif places is not None:
            self._places, self._resolved_until = places, self._loop.now + RESOLVED_S
        if places is None:
            self._give_up(reason(error))
        else:
            for bridge in self._waiting():
                self._start(bridge)

    def _start(self, bridge: Bridge) -> None:
        done = partial(self._connected, bridge)
        connecting = Connecting(self._loop, self._places, CONNECT_S, done)
        self._opening[bridge] = connecting
        try:
            connecting.start()
        except Exception as failure:
            log.exception("defect in %s", type(connecting).__name__)
            connecting.fail(failure)  # the others that wait are not to blame

    def _connected(self, bridge: Bridge, sock: socket.socket | None, error: OSError | None) -> None:
        self._opening.pop(bridge, None)
        if sock is not None:
            bridge.connected(sock)
        else:
            if self._resolved_until != float("inf"):
                self._resolved_until = 0.0  # it may have another address by now
            bridge.abort(EndpointError(f"can't reach endpoint {self}: {reason(error)}"))


def reason(error: Exception | None) -> str:
    """Return what an error of the system says, in its own words."""
    return str(getattr(error, "strerror", None) or error or "unknown")
