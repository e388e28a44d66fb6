"""The list of revoked tokens: followed by long polls, kept, and held against all clients.

    worker:  GET …?wait=30 → signature and serial checked → written to the state folder
    loop:                                          tunnels cut that it refuses → the next poll

An older list than the one that is known counts for nothing, whoever signed it: somebody replays
it. While the session master is away, the last list stays in force.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from functools import partial

from ..errors import MasterError, RevokedError, SniTunError, TokenError
from ..net.figures import counter, gauge, utc_text
from ..net.https import blocking_request
from ..net.sockets import reason, reset_on_close
from ..net.state import blocking_save
from ..net.workers import Workers
from ..protocol.revocations import MAX_TEXT, Revocations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..net.https import Url
    from ..net.loop import Timer
    from ..net.openmetrics import Family
    from ..protocol.token import Payload
    from .server import Server

log = logging.getLogger("snitun_sync")

PATH = "/v1/revocations"
KEPT_NAME = "revocations"
WAIT_S = 30
# The answer may come as late as this behind the time that it was to wait.
SLACK_S = 15.0
# Between the starts of two polls, and as a first delay when one has failed.
LEAST_PAUSE_S = 1.0
# The same behind one that brought news: they seldom come alone, and none waits for a second.
NEWS_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0


class List:
    """A list, as text and as what it says, and the ETag that the session master gave it."""

    __slots__ = ("etag", "revocations", "text")

    def __init__(self, text: str, revocations: Revocations, etag: str = "") -> None:
        self.text, self.revocations, self.etag = text, revocations, etag


class Follower:
    """Follows one session master's list. All of it belongs to the loop's thread, but for polls."""

    def __init__(
        self, server: Server, url: Url, ca_file: str, state_dir: str, keys: Sequence[str]
    ) -> None:
        """`url` may lack the path; `ca_file` and `state_dir` are "" for none."""
        self.url = url
        self._server, self._ca_file, self._keys = server, ca_file, list(keys)
        self._path = os.path.join(state_dir, KEPT_NAME) if state_dir else ""
        self._workers = Workers(server.loop, threads=1)
        self._timer: Timer | None = None
        self._sock: socket.socket | None = None  # of the poll that is under way
        self._is_closed = False
        self._saved = self._unsaved = ""  # what is in the file; why something isn't: of polls
        self._began_at = 0.0
        self._pause_s = LEAST_PAUSE_S
        self.list: List | None = None
        self.checked: float | None = None
        """When the session master has last said that the list is the latest: UTC, Unix seconds."""
        self.away_since: float | None = None
        """Since when it hasn't: UTC, Unix seconds; None while it does."""
        self.failure = ""
        """Why, "" while it does."""
        self.refused_lists = self.refused_tokens = self.cut_tunnels = 0

    # --- what others ask ----------------------------------------------------------------

    def refuses(self, payload: Payload, created: int) -> bool:
        """Tell whether a token is revoked that was made at `created`."""
        return self.list is not None and self.list.revocations.refuses(payload.device_id, created)

    def check(self, payload: Payload, created: int) -> None:
        """Raise TokenError where a token is revoked that somebody shows."""
        if self.refuses(payload, created):
            self.refused_tokens += 1
            raise TokenError(
                f"the token for {payload.hostname}, device {payload.device_id}, was revoked"
            )

    def keys_changed(self, keys: Sequence[str]) -> None:
        """Take lists of these keys from now on; what was refused for its signature may count."""
        if self._keys != list(keys):
            self._keys, self._pause_s = list(keys), LEAST_PAUSE_S
            if self._timer is not None:
                self._schedule(0.0)

    # --- life ------------------------------------------------------------------------

    def read_kept(self) -> None:
        """Begin with the list of the last run; what can't be used is worth a warning."""
        try:
            if self._path and os.path.exists(self._path):
                with open(self._path, encoding="ascii", errors="replace") as file:
                    text = file.read(MAX_TEXT + 1)
                self.list = List(text, Revocations.read(text, self._keys))
                self._saved = text
        except (OSError, SniTunError) as error:
            log.warning("%s isn't used: %s", self._path, reason(error))
        if self.list is None:
            log.warning(
                "no list of revocations yet: until one comes from %s, revoked tokens are accepted",
                self.url,
            )

    def begin(self) -> None:
        """Poll from now on."""
        self._timer = None
        self._began_at = self._server.loop.now
        poll = partial(self._blocking_poll, self.list, self._keys)
        if not self._workers.submit(poll, self._polled):
            self._failed(OSError("no thread can be started"))

    def close(self) -> None:
        """Poll no more; what is under way ends at once."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._workers.close()
        if self._sock is not None:
            # A reset, so that a route of this very relay doesn't wait for the answer.
            reset_on_close(self._sock)
            try:
                socket.socket.shutdown(self._sock, socket.SHUT_RD)
            except OSError:
                pass  # it has ended

    def fail(self, error: Exception) -> None:
        """A defect, which the loop has logged: go on."""
        self._failed(error)

    # --- polls -------------------------------------------------------------------------

    def _blocking_poll(self, known: List | None, keys: Sequence[str]) -> List:
        """Return the latest list, `known` itself if it is that. Raises OSError, SniTunError."""
        answer = blocking_request(
            self.url,
            f"{'' if self.url.path else PATH}?wait={WAIT_S}",
            headers={"If-None-Match": known.etag} if known is not None and known.etag else {},
            ca_file=self._ca_file,
            timeout_s=WAIT_S + SLACK_S,
            limit_bytes=MAX_TEXT,
            opened=self._opened,
        )
        if answer.status == 304 and known is not None:
            latest = known
        elif answer.status == 200:
            text = answer.body.decode("ascii", "replace")
            latest = List(text, Revocations.read(text, keys), answer.headers.get("etag", ""))
            serials = latest.revocations.serial, known.revocations.serial if known else 0
            if serials[0] < serials[1]:
                said = f"serial {serials[0]}, and {serials[1]} is known"
                raise TokenError(f"an older list: {said}; was its database restored?")
        else:
            raise MasterError(f"{self.url.authority}: it answered with status {answer.status}")
        if self._path and latest.text != self._saved:
            self._blocking_save(latest.text)
        return latest

    def _opened(self, sock: socket.socket) -> None:
        self._sock = sock
        if self._is_closed:
            raise OSError("stopped")

    def _blocking_save(self, text: str) -> None:
        try:
            blocking_save(self._path, text)
        except OSError as error:
            if self._unsaved != reason(error):
                self._unsaved = reason(error)
                log.warning(
                    "the list of revocations can't be kept in %s: %s", self._path, self._unsaved
                )
        else:
            self._saved, self._unsaved = text, ""

    def _polled(self, latest: List | None, error: Exception | None) -> None:
        self._sock = None
        if latest is None:
            self._failed(error)
            return
        is_back = bool(self.failure)
        self.checked, self.away_since, self.failure = time.time(), None, ""
        self._pause_s = LEAST_PAUSE_S
        if is_back:
            log.info("the session master at %s is back", self.url)
            self._server.tell()
        former, self.list = self.list, latest
        found = latest.revocations
        pause_s = LEAST_PAUSE_S
        if former is None or former.revocations.serial != found.serial:
            log.info("revocations: serial %d, %d devices", found.serial, len(found.entries))
            self._apply(found)
            pause_s = NEWS_PAUSE_S
        self._schedule(max(0.0, self._began_at + pause_s - self._server.loop.now))

    def _failed(self, error: Exception | None) -> None:
        self.refused_lists += isinstance(error, TokenError)
        if not isinstance(error, (OSError, SniTunError)):
            log.error("defect in %s", type(self).__name__, exc_info=error)
        if not self.failure:
            self.away_since = time.time()
        if self.failure != reason(error):
            self.failure = reason(error)
            log.warning("no news of revocations: %s; what is known stays in force", self.failure)
            self._server.tell()
        self._schedule(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _schedule(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._is_closed:
            self._timer = self._server.loop.call_later(delay_s, self.begin)

    def _apply(self, found: Revocations) -> None:
        """Cut the tunnels that the list refuses, and the devices that go through them."""
        server, refuses = self._server, found.refuses
        revoked = {
            registration.tunnel: registration
            for registration in server.registrations
            if refuses(registration.payload.device_id, registration.created)
        }
        if not revoked:
            return
        self.cut_tunnels += len(revoked)
        for bridge in tuple(server.bridges.all):
            if bridge.tunnel in revoked:
                bridge.abort(RevokedError("the client's token was revoked"))
        for registration in revoked.values():
            registration.revoke()

    # --- how it is ---------------------------------------------------------------------

    def summary(self) -> str:
        """Return what is worth saying behind the relay's own line, "" if nothing is."""
        if self.away_since is None:
            return ""
        return f"; no news of revocations since {utc_text(self.away_since)}: {self.failure}"

    def report(self) -> dict[str, Any]:
        """Return what /status shows."""
        found = self.list.revocations if self.list is not None else None
        return {
            "url": str(self.url),
            "serial": found.serial if found else None,
            "entries": len(found.entries) if found else None,
            "time": utc_text(found.time) if found else None,
            "checked": utc_text(self.checked),
            "away_since": utc_text(self.away_since),
            "failure": self.failure or None,
            "refused_lists": self.refused_lists,
            "refused_tokens": self.refused_tokens,
            "cut_tunnels": self.cut_tunnels,
        }

    def metrics(self, prefix: str) -> list[Family]:
        """Return what /metrics shows."""
        prefix = f"{prefix}_revocations"
        found = self.list.revocations if self.list is not None else Revocations(0, 0, {})
        is_known, checked = not self.failure and self.list is not None, self.checked or 0
        return [
            gauge(f"{prefix}_current", "Whether the latest list is known.", is_known),
            gauge(f"{prefix}_checked_seconds", "When it was, UTC.", checked, "seconds"),
            gauge(f"{prefix}_serial", "Of the list that counts.", found.serial),
            gauge(f"{prefix}_devices", "Devices with revoked tokens.", len(found.entries)),
            counter(f"{prefix}_refused_lists", "Older, or not signed.", self.refused_lists),
            counter(f"{prefix}_refused_tokens", "Clients turned away.", self.refused_tokens),
            counter(f"{prefix}_cut_tunnels", "Clients that were cut.", self.cut_tunnels),
        ]
