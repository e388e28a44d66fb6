"""Sees again and again whether an endpoint is there: by a connection, or by a GET over HTTP/1.1."""

from __future__ import annotations

import logging
import time

from ..net.loop import READ, Handler
from ..net.sockets import reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ..errors import SniTunError
    from ..net.endpoint import Endpoint
    from ..net.loop import Loop, Timer
    from .settings import EndpointSettings

log = logging.getLogger("snitun_sync")

# An endpoint that is down is looked at this often, or else how soon would it be missed no more?
AGAIN_S = 5.0
MAX_LINE = 1024


class Health(Handler):
    """One endpoint's; a target of its connections. Of the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        endpoint: Endpoint,
        settings: EndpointSettings,
        changed: Callable[[], object],
    ) -> None:
        """Call `changed()` when `failure` has changed."""
        super().__init__()
        self._loop, self._endpoint, self._settings = loop, endpoint, settings
        self._changed = changed
        self._address = str(endpoint)
        self.failure = f"endpoint {self._address} is not checked yet"
        """Why the last check has failed, "" if it hasn't."""
        self.checked_at: float | None = None
        """When the last check ended, UTC Unix seconds."""
        self._line = b""  # the answer's first
        self._timer: Timer | None = loop.call_later(0.0, self._check)

    def is_for(self, settings: EndpointSettings) -> bool:
        """Tell whether other settings are checked in the same way; then they count from now on."""
        mine, self._settings = self._settings, settings
        names = ("health_interval_s", "health_path", "proxy_version", "connect_timeout_s")
        return str(mine.address) == str(settings.address) and all(
            getattr(mine, name) == getattr(settings, name) for name in names
        )

    def close(self) -> None:
        """Check no more."""
        self._free()
        self._endpoint.cancel(self)

    def _free(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop.close_socket(self)

    def _check(self) -> None:
        self._timer, self._line = None, b""
        self._endpoint.connect(self, is_check=True)

    def connected(self, sock: socket.socket) -> None:
        """Send the request, if there is one."""
        self.sock = sock
        settings, host = self._settings, self._endpoint.address.host or "localhost"
        data = settings.preface()
        if settings.health_path:
            request = (
                f"GET {settings.health_path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            )
            data += request.encode()
        try:
            sock.send(data)  # it fits into any socket's buffer
        except OSError as error:
            self._failed(reason(error))
            return
        if not settings.health_path:
            self._done("")
            return
        self._timer = self._loop.call_later(settings.connect_timeout_s, self._overdue)
        self._loop.watch(self, READ)

    def abort(self, error: SniTunError) -> None:
        """There is no connection."""
        self._done(str(error))

    def on_ready(self, events: int) -> None:
        assert self.sock is not None
        try:
            data = self._loop.receive(self.sock, MAX_LINE)
        except BlockingIOError:
            return
        except OSError as error:
            self._failed(reason(error))
            return
        self._line += data
        line, end, _ = self._line.partition(b"\n")
        if end or not data or len(line) > MAX_LINE:
            words = line.decode("latin-1").split()
            is_http = len(words) > 1 and words[0].startswith("HTTP/1.")
            if is_http and words[1][:1] in ("2", "3"):
                self._done("")
            else:
                self._failed(f"it answers {words[1][:3]}" if is_http else "it answers no HTTP/1.1")

    def _overdue(self) -> None:
        self._failed(f"no answer within {self._settings.connect_timeout_s:g} s")

    def fail(self, error: Exception) -> None:
        self._failed(f"a defect: {error!r}")

    def _failed(self, why: str) -> None:
        what = f"GET {self._settings.health_path}" if self._settings.health_path else "connecting"
        self._done(f"endpoint {self._endpoint}: {what}: {why}")

    def _done(self, failure: str) -> None:
        self._free()
        is_first, self.checked_at = self.checked_at is None, time.time()
        before, self.failure = self.failure, failure
        interval_s = self._settings.health_interval_s
        self._timer = self._loop.call_later(
            min(AGAIN_S, interval_s) if failure else interval_s, self._check
        )
        if failure != before:
            if failure:
                log.warning("%s", failure)
            elif not is_first:
                log.info("endpoint %s is there again", self._endpoint)
            self._changed()
