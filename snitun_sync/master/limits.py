"""How many wrong secrets somebody may try: for each address, and for each device from there.

A right secret is never refused: who guesses can't lock anybody out, and 256 bits can't be guessed.
What is limited is the noise, in the log and on this machine.
"""

from __future__ import annotations

import logging
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# So many at once, and then one more in each period.
ADDRESS_FAILURES, ADDRESS_PERIOD_S = 20, 3.0
DEVICE_FAILURES, DEVICE_PERIOD_S = 10, 6.0
# Addresses, and devices at an address, that are remembered: those that failed last.
REMEMBERED = 4096
SAY_EACH_S = 60.0

log = logging.getLogger("snitun_sync")


class Failures:
    """The wrong secrets of late; from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # By address, or address and device: when all that was tried will be forgotten.
        self._until: dict[str, float] = {}
        self._left_out = 0
        self._say_at = 0.0

    def add(self, address: str, device_id: str, what: str) -> float:
        """Count and log a failure; return for how many seconds there are too many, 0 if not.

        `address` is an IP address as text; `device_id` is "" where none was named.
        """
        place, now = network(address), self._clock()
        with self._lock:
            wait_s = 0.0
            if device_id:
                key = f"{place} {device_id}"
                wait_s = self._count(key, DEVICE_FAILURES, DEVICE_PERIOD_S, now)
            if not wait_s:  # one that has the wrong file leaves its neighbours theirs
                wait_s = self._count(place, ADDRESS_FAILURES, ADDRESS_PERIOD_S, now)
            if wait_s:
                self._left_out += 1
                if now < self._say_at:
                    return wait_s
                self._say_at = now + SAY_EACH_S
                count, self._left_out = self._left_out, 0
        if wait_s:
            text = "%s: device %s: %s, and too many of that; %d such refusals since the last line"
            log.warning(text, address, device_id or "unknown", what, count)
        else:
            log.warning("%s: device %s: %s", address, device_id or "unknown", what)
        return wait_s

    def _count(self, key: str, most: int, period_s: float, now: float) -> float:
        until = max(self._until.pop(key, 0.0), now) + period_s
        wait_s = until - now - most * period_s
        # Those beyond don't count: who goes on isn't kept out for longer.
        self._until[key] = until if wait_s <= 0 else until - period_s
        if len(self._until) > REMEMBERED:
            del self._until[next(iter(self._until))]
        return max(0.0, wait_s)


def network(address: str) -> str:
    """Return what counts as one: of IPv6 the first 64 bits, which one household has."""
    if ":" not in address:
        return address
    from ipaddress import IPv6Address  # noqa: PLC0415

    try:
        ip = IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    return str(ip.ipv4_mapped or IPv6Address(int(ip) >> 64 << 64))
