"""What the service manager is told: sd_notify(3), sd_watchdog_enabled(3); for Type=notify.

Each message is one datagram of lines NAME=value, sent to the socket that the environment
names. The program never waits for the manager, nor does it fail because of it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from functools import partial

from ..protocol.names import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from .loop import Loop, Timer

# A state that isn't taken is sent again, for longer than the manager waits for a start (90 s).
RETRY_S = 0.5
RETRIES = 200
# The manager ignores datagrams of more than 4096 bytes.
STATUS_CHARACTERS = 512
# sockaddr_un(7), without the zero byte at the end
MAX_SOCKET_BYTES = 107
MAX_WATCHDOG_S = 86400.0

log = logging.getLogger("snitun_sync")


class Notifier:
    """Tells the service manager how this process is; whoever has it closes it.

    A status that isn't taken goes with the next message of any kind; a state (ready, reloading,
    stopping) comes later, unless the next one overtakes it.
    """

    def __init__(self, loop: Loop, address: bytes, watchdog_s: float = 0.0) -> None:
        """Send to the unix socket `address`; WATCHDOG=1 every `watchdog_s` seconds, if not 0.

        Raises OSError where no socket can be had.
        """
        self._loop, self._address, self._watchdog_s = loop, address, watchdog_s
        self._sock: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._status = ""
        self._told: str | None = ""  # the status that was taken last
        self._retry: Timer | None = None
        self._next_watchdog: Timer | None = None

    @classmethod
    def from_environment(cls, loop: Loop, environment: MutableMapping[str, str]) -> Notifier | None:
        """Return a notifier if NOTIFY_SOCKET, a path or @NAME, asks for one; else None.

        It is taken out of the environment, and WATCHDOG_USEC and WATCHDOG_PID with it: they
        aren't for child processes. What is malformed is said in the log.
        """
        name = environment.pop("NOTIFY_SOCKET", "")
        usec = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", "")
        if not name:
            return None
        address = os.fsencode(name)
        if name[0] not in "/@" or not 2 <= len(address) <= MAX_SOCKET_BYTES:
            log.warning("NOTIFY_SOCKET: %s; expected a path from / on, or @NAME", shown(name))
            return None
        if name[0] == "@":
            address = b"\0" + address[1:]
        watchdog_s = _watchdog_s(usec) if pid in ("", str(os.getpid())) else 0.0
        try:
            return cls(loop, address, watchdog_s)
        except OSError as error:
            log.warning("NOTIFY_SOCKET: can't be used: %s", error.strerror or error)
            return None

    def begin(self) -> None:
        """Start the watchdog's timer: the manager hears from it for as long as the loop turns."""
        if self._watchdog_s and self._sock is not None:
            self._next_watchdog = self._loop.call_later(self._watchdog_s, self._watchdog)

    def close(self) -> None:
        """Say nothing any more; harmless when it is closed already."""
        for timer in (self._next_watchdog, self._retry):
            if timer is not None:
                timer.cancel()
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def ready(self, status: str) -> None:
        """Say that the process serves, for the first time or after `reloading`."""
        self._status, self._told = _line(status), None
        self._announce("READY=1")

    def status(self, text: str) -> None:
        """Say in words how the process is, if that isn't what the manager knows already."""
        self._status = _line(text)
        if self._status != self._told:
            self._tell("")

    def reloading(self) -> None:
        """Say that the configuration is read anew; `ready` comes then."""
        self._announce(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the process ends."""
        self._announce("STOPPING=1")

    def _watchdog(self) -> None:
        # One that isn't taken is soon followed by another: the manager waits for two at most.
        delay_s = self._watchdog_s if self._tell("WATCHDOG=1") else self._watchdog_s / 4
        self._next_watchdog = self._loop.call_later(delay_s, self._watchdog)

    def _announce(self, state: str, retries: int = RETRIES) -> None:
        """Send `state`, again and again until it is taken, or until there is another."""
        if self._retry is not None:
            self._retry.cancel()
        if self._sock is None or self._tell(state):
            return
        if retries:
            again = partial(self._announce, state, retries - 1)
            self._retry = self._loop.call_later(RETRY_S, again)
        else:
            name = state.partition("\n")[0]
            log.warning("NOTIFY_SOCKET: nobody takes what is sent there: %s", name)

    def _tell(self, state: str) -> bool:
        """Send `state`, if not empty, and the status, if new; return whether it was taken."""
        if self._sock is None:
            return False
        lines = [state] if state else []
        if self._status != self._told:
            lines.append(f"STATUS={self._status}")
        try:
            self._sock.sendto("\n".join(lines).encode(errors="replace"), self._address)
        except OSError:  # the manager's queue is full, or it is just being started anew
            return False
        self._told = self._status
        return True


def _watchdog_s(usec: str) -> float:
    """Return how often the watchdog wants to hear from us, half of its limit; 0.0 if it doesn't."""
    if not usec:
        return 0.0
    if not (usec.isascii() and usec.isdigit() and len(usec) <= 20 and int(usec)):
        log.warning("WATCHDOG_USEC: %s; expected a number of microseconds", shown(usec))
        return 0.0
    return min(int(usec) / 2e6, MAX_WATCHDOG_S)


def _line(text: str) -> str:
    return " ".join(text.splitlines())[:STATUS_CHARACTERS]
