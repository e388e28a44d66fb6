"""What is said of failures, and how often."""

from __future__ import annotations

import pytest

from snitun_sync.client.history import SAY_AGAIN_S, History
from snitun_sync.errors import LostError, RefusedError, SniTunError, UnreachableError


def test_what_was_not_said_is_counted_and_not_as_what_comes_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    history = History()

    def fail(error: SniTunError, now: float, proven_s: float | None = None) -> None:
        history.add(error, proven_s)
        history.say(str(error), "next", now)

    for now in range(5):
        fail(UnreachableError("away"), now)
    fail(RefusedError("refused"), 5)
    fail(RefusedError("refused"), 6)
    fail(UnreachableError("away"), 7)
    fail(RefusedError("refused"), 5 + SAY_AGAIN_S)
    fail(LostError("lost"), 6 + SAY_AGAIN_S, 1.0)
    assert [record.getMessage() for record in caplog.records] == [
        "away; next",
        "refused (and 4 failures before); next",
        "refused (and 2 failures before); next",
        "lost; next",
    ]
    counts = {ending.reason: ending.count for ending in history.endings}
    assert counts == {"away": 6, "refused": 3, "lost": 1}
    assert history.failures == {"unreachable": 6, "refused": 3, "lost": 1}
