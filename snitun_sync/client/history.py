"""What went wrong so far: counted by kind, the latest kept, and the same again folded."""

from __future__ import annotations

import logging
import time
from collections import deque
from itertools import takewhile

from ..errors import (
    DeadLinkError,
    LostError,
    MasterError,
    RefusedError,
    RevokedError,
    SniTunError,
    UnreachableError,
)

log = logging.getLogger("snitun_sync")

ENDINGS_KEPT = 10
# The same failure again and again is said this often.
SAY_AGAIN_S = 600.0
SAY_RARELY_S = 86400.0
# What a failure is called; the first that fits.
KINDS: tuple[tuple[type[SniTunError], str], ...] = (
    (UnreachableError, "unreachable"),
    (RefusedError, "refused"),
    (DeadLinkError, "dead"),
    (RevokedError, "revoked"),
    (LostError, "lost"),
    (MasterError, "master"),
    (SniTunError, "other"),
)


class Ending:
    """How a tunnel ended, or an attempt to open one; the same again is counted."""

    __slots__ = ("count", "proven_s", "reason", "time")

    def __init__(self, reason: str, proven_s: float | None) -> None:
        self.time = time.time()  # UTC, Unix seconds, of the last one
        self.reason = reason
        self.proven_s = proven_s  # for how long it was proven; None: never
        self.count = 1


class History:
    """The failures of one client."""

    def __init__(self) -> None:
        self.endings: deque[Ending] = deque(maxlen=ENDINGS_KEPT)
        """The latest last."""
        self.failures: dict[str, int] = {}
        """How many attempts and tunnels failed, by kind."""
        self._say_again_at = 0.0
        self._unsaid = 0

    @property
    def last(self) -> str:
        """The latest reason, "" if there is none."""
        return self.endings[-1].reason if self.endings else ""

    @property
    def is_folding(self) -> bool:
        """Whether the same failures come again and again, so that little is said of each."""
        return self._unsaid > 0

    def add(self, error: SniTunError, proven_s: float | None) -> None:
        """Note how an attempt or a tunnel ended; `proven_s` tells for how long it was proven."""
        text = str(error)
        kind = next(name for type_, name in KINDS if isinstance(error, type_))
        self.failures[kind] = self.failures.get(kind, 0) + 1
        ending = Ending(text, proven_s)
        since_loss = takewhile(lambda former: former.proven_s is None, reversed(self.endings))
        same = next((former for former in since_loss if former.reason == text), None)
        if proven_s is None and same is not None:
            self.endings.remove(same)
            ending.count += same.count
        else:
            self._say_again_at = 0.0
        self.endings.append(ending)

    def say(self, text: str, plan: str, now: float, *, is_rare: bool = False) -> None:
        """Log a failure, and what comes next; the same again now and then, with how many came."""
        if now < self._say_again_at:
            self._unsaid += 1
            return
        self._say_again_at = now + (SAY_RARELY_S if is_rare else SAY_AGAIN_S)
        before = f" (and {self._unsaid} failures before)" if self._unsaid else ""
        self._unsaid = 0
        log.warning("%s%s; %s", text, before, plan)

    def say_next(self) -> None:
        """Something is different now: the next failure is said."""
        self._say_again_at, self._unsaid = 0.0, 0
