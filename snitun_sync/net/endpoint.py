"""An endpoint: a local service, to which each channel gets a connection of its own."""

from __future__ import annotations

import errno
import logging
from functools import partial

from ..errors import EndpointError, SniTunError
from ..protocol.names import Address
from .connecting import Connecting
from .sockets import blocking_resolve, numeric_places, reason
from .tuning import CONNECT_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Protocol

    from .loop import Loop, Timer
    from .sockets import Place
    from .workers import Workers

    class Target(Protocol):
        """Who wants a connection: a bridge, or who goes before it."""

        def connected(self, sock: socket.socket) -> None:
            """Own the connected socket, non-blocking and tuned, from now on."""

        def abort(self, error: SniTunError) -> None:
            """There is none, for the reason given."""


log = logging.getLogger("snitun_sync")

# Connections being opened at a time. Each takes a descriptor, and a device waits for it.
OPENING_LIMIT = 512
# How long the addresses of a name are used before it is resolved again.
RESOLVED_S = 10.0
# Who isn't there keeps others waiting: no answer, or none to ARP.
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH)


class Endpoint:
    """Opens connections to one address, on the loop; a worker resolves a name."""

    def __init__(
        self, loop: Loop, workers: Workers, address: Address, timeout_s: float = CONNECT_S
    ) -> None:
        """Connect to `address`, each of its places within `timeout_s` seconds."""
        self._loop, self._workers = loop, workers
        self._opening: dict[Target, Connecting | None] = {}  # None: the name comes first
        self._is_resolving = False
        self._timer: Timer | None = None  # while channels wait for a name
        self.failures = 0
        """How many connections could not be opened."""
        self.failure = ""
        """Why the last one could not, "" if it could."""
        self._silent_until = 0.0  # it has not answered: asking again would be waiting again
        self.address = Address()
        self.replace(address, timeout_s)

    def __str__(self) -> str:
        return str(self.address)

    def replace(self, address: Address, timeout_s: float) -> None:
        """Open connections to `address` from now on."""
        self.timeout_s = timeout_s
        if str(address) == str(self.address):
            return
        self.address = address
        self.failure, self._silent_until = "", 0.0
        self._places = numeric_places(address)
        self._resolved_until = float("inf") if self._places else 0.0

    def connect(self, target: Target, *, is_check: bool = False) -> None:
        """Open a connection: call the target's `connected`, or its `abort`, now or later.

        Where the last one has waited in vain, another has to wait for that only if it
        `is_check`, or after as long again.
        """
        if self._loop.now < self._silent_until and not is_check:
            target.abort(EndpointError(self.failure))
        elif len(self._opening) >= OPENING_LIMIT:
            target.abort(EndpointError(f"too many connections wait for endpoint {self}"))
        elif self._loop.now < self._resolved_until:
            self._start(target)
        else:
            self._opening[target] = None
            if self._timer is None:
                self._timer = self._loop.call_later(self.timeout_s, self._overdue)
            if not self._is_resolving:
                self._resolve()

    def cancel(self, target: Target) -> None:
        """The target needs no connection any more; harmless when it has one."""
        connecting = self._opening.pop(target, None)
        if connecting is not None:
            connecting.close()

    def _overdue(self) -> None:
        self._timer = None
        self._silent_until = self._loop.now + self.timeout_s
        self._give_up(f"its name is not resolved within {self.timeout_s:g} s")

    def _give_up(self, why: str) -> None:
        """Abort the targets that wait for the name."""
        waiting = self._waiting()
        for target in waiting:
            del self._opening[target]
        self._failed(why, *waiting)

    def _failed(self, why: str, *targets: Target) -> None:
        """Abort `targets`, and note why: also for those that come next, where none is left."""
        self.failure = failure = f"can't reach endpoint {self}: {why}"
        self.failures += len(targets)
        for target in targets:
            target.abort(EndpointError(failure))

    def _waiting(self) -> list[Target]:
        return [target for target, connecting in self._opening.items() if connecting is None]

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
        if address is not self.address:  # it was replaced meanwhile
            places = self._places
            if not places:
                self._resolve()
                return
        elif places is not None:
            self._places, self._resolved_until = places, self._loop.now + RESOLVED_S
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if places is None:
            self._give_up(reason(error))
        else:
            for target in self._waiting():
                self._start(target)

    def _start(self, target: Target) -> None:
        done = partial(self._connected, target)
        connecting = Connecting(self._loop, self._places, self.timeout_s, done)
        self._opening[target] = connecting
        try:
            connecting.start()
        except Exception as failure:
            log.exception("defect in %s", type(connecting).__name__)
            connecting.fail(failure)  # the others that wait are not to blame

    def _connected(self, target: Target, sock: socket.socket | None, error: OSError | None) -> None:
        self._opening.pop(target, None)
        if sock is not None:
            self.failure, self._silent_until = "", 0.0
            target.connected(sock)
            return
        if self._resolved_until != float("inf"):
            self._resolved_until = 0.0  # it may have another address by now
        if error is not None and error.errno in _SILENT:
            self._silent_until = self._loop.now + self.timeout_s
        self._failed(reason(error), target)
