"""When a client tries again: as soon as that helps it, and not together with all others.

A relay that restarts loses all its clients in one moment: they spread their first retries, and
from there on back off with full jitter below a limit that doubles ("Exponential Backoff
And Jitter", AWS Architecture Blog, 2015). Nobody tries a second time before all have tried once:
early ones that found it still away would come on top of those whose turn it is. A dead link
is this client's alone: it retries at once.
"""

from __future__ import annotations

import os

from ..errors import (
    DeadLinkError,
    DeniedError,
    RefusedError,
    RevokedError,
    SniTunError,
    TakenOverError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# The limit below which a delay is drawn, first and at most.
FIRST_S = 1.0
LAST_S = 60.0
# A tunnel that was proven for so long was a good one: what was before it is forgotten.
GOOD_S = 60.0
# So many refusals in a row are no accident; from then on retries are rarer.
REFUSALS = 3
LAST_REFUSED_S = 300.0


def fraction() -> float:
    """Return an unpredictable number from 0 to 1."""
    return int.from_bytes(os.urandom(4), "big") / 2**32


class Retry:
    """The delays of one client."""

    def __init__(self, random: Callable[[], float], spread_s: float) -> None:
        """`random` returns numbers from 0 to 1; `spread_s` is for the relay that went away."""
        self._random, self.spread_s = random, spread_s
        self._limit_s = FIRST_S
        self._rest_s = 0.0  # from the first retry to the end of the spread
        self._refusals = 0

    @property
    def is_refused(self) -> bool:
        """Whether it was refused so often that it is no accident, by relay or session master."""
        return self._refusals >= REFUSALS

    def delay_s(self, error: SniTunError, proven_s: float | None) -> float:
        """Return how long to wait after a failure.

        `proven_s` tells for how long the tunnel was proven, None an attempt that never was.
        """
        rest_s, self._rest_s = self._rest_s, 0.0
        if proven_s is None:
            is_refusal = isinstance(error, (RefusedError, DeniedError))
            self._refusals = self._refusals + 1 if is_refusal else 0
            return self._draw(self._limit_s, rest_s)
        self._refusals = 0
        if proven_s >= GOOD_S and not isinstance(error, TakenOverError):
            self.reset()
        if isinstance(error, DeadLinkError):
            return FIRST_S * self._random()
        if isinstance(error, RevokedError):  # this client's alone, too
            return self._draw(self._limit_s)
        delay_s = self._draw(max(self._limit_s, self.spread_s))
        self._rest_s = max(0.0, self.spread_s - delay_s)
        return delay_s

    def accepted(self) -> None:
        """The relay has let this client in: refusals from now on are others."""
        self._refusals = 0

    def reset(self) -> None:
        """What was before doesn't count any more."""
        self._limit_s, self._rest_s, self._refusals = FIRST_S, 0.0, 0

    def _draw(self, limit_s: float, rest_s: float = 0.0) -> float:
        last_s = LAST_REFUSED_S if self.is_refused else LAST_S
        most_s = max(last_s, self.spread_s)
        limit_s = min(limit_s, most_s)
        self._limit_s = min(2 * limit_s, last_s)
        return min(rest_s + limit_s * self._random(), most_s)
