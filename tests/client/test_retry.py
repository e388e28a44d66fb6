"""When a client tries again: spread, full jitter, refusals."""

from __future__ import annotations

import random

import hypothesis
import pytest
from hypothesis import strategies

from snitun_sync.client.retry import FIRST_S, GOOD_S, LAST_REFUSED_S, LAST_S, REFUSALS, Retry
from snitun_sync.errors import (
    DeadLinkError,
    LostError,
    RefusedError,
    SniTunError,
    StrangerError,
    TakenOverError,
    UnreachableError,
)

SPREAD_S = 10.0
LOST, DEAD = LostError("lost"), DeadLinkError("dead")
UNREACHABLE, REFUSED = UnreachableError("unreachable"), RefusedError("refused")


def latest() -> Retry:
    """Return one that always draws the longest delay."""
    return Retry(lambda: 1.0, SPREAD_S)


def test_the_limit_doubles_up_to_a_minute() -> None:
    retry = latest()
    delays = [retry.delay_s(UNREACHABLE, None) for _ in range(9)]
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_delays_have_full_jitter() -> None:
    drawn = []
    for seed in range(500):
        retry = Retry(random.Random(seed).random, SPREAD_S)
        for _ in range(4):
            delay_s = retry.delay_s(UNREACHABLE, None)
        drawn.append(delay_s)
    assert 0 <= min(drawn) < 1 < 7 < max(drawn) <= 8
    assert 3 < sum(drawn) / len(drawn) < 5


def test_a_relay_that_went_away_is_tried_within_the_spread_and_from_there_on_ever_later() -> None:
    retry = latest()
    assert retry.delay_s(LOST, GOOD_S) == SPREAD_S
    assert [retry.delay_s(UNREACHABLE, None) for _ in range(4)] == [20, 40, 60, 60]


def test_nobody_tries_a_second_time_before_all_have_tried_once() -> None:
    drawn = 0.25
    retry = Retry(lambda: drawn, SPREAD_S)
    assert retry.delay_s(LOST, GOOD_S) == 2.5
    assert retry.delay_s(UNREACHABLE, None) == 7.5 + 0.25 * 20
    assert retry.delay_s(UNREACHABLE, None) == 0.25 * 40
    retry.delay_s(LOST, GOOD_S)
    assert retry.delay_s(DEAD, GOOD_S) == 0.25 * FIRST_S  # at once, whatever was before
    retry.delay_s(LOST, GOOD_S)
    retry.reset()
    assert retry.delay_s(UNREACHABLE, None) == 0.25 * FIRST_S


@pytest.mark.parametrize("away_s", [0.5, 5, 10, 15, 60])
def test_a_restart_brings_no_storm(away_s: float) -> None:
    """Of 500 clients 50 a second try at first; never twice as many, however long it takes."""
    attempts = []
    for seed in range(500):
        retry = Retry(random.Random(seed).random, SPREAD_S)
        when = retry.delay_s(LOST, GOOD_S)
        attempts.append(when)
        while when < away_s:
            when += retry.delay_s(UNREACHABLE, None)
            attempts.append(when)
        assert when < away_s + LAST_S
    attempts.sort()
    for number, when in enumerate(attempts[:-100]):
        assert attempts[number + 100] - when >= 1


def test_a_dead_link_is_tried_at_once_and_then_as_from_the_start() -> None:
    retry = latest()
    for _ in range(5):
        retry.delay_s(UNREACHABLE, None)
    assert retry.delay_s(DEAD, GOOD_S) == FIRST_S
    assert [retry.delay_s(UNREACHABLE, None) for _ in range(3)] == [1, 2, 4]


@pytest.mark.parametrize(
    ("error", "proven_s", "next_s"),
    [
        (LOST, GOOD_S - 1, 60),  # too short to be a good one
        (LOST, GOOD_S, SPREAD_S),
        (TakenOverError("taken over"), 10 * GOOD_S, 60),  # whoever does that, does it again
    ],
)
def test_a_minute_of_health_makes_good_for_what_was_before(
    error: SniTunError, proven_s: float, next_s: float
) -> None:
    retry = latest()
    for _ in range(8):
        retry.delay_s(UNREACHABLE, None)
    assert retry.delay_s(error, proven_s) == next_s


def test_three_refusals_in_a_row_mean_refused() -> None:
    retry = latest()
    for error in (REFUSED, REFUSED, UNREACHABLE, REFUSED, REFUSED):
        retry.delay_s(error, None)
        assert not retry.is_refused
    delays = []
    for _ in range(6):
        delays.append(retry.delay_s(REFUSED, None))
        assert retry.is_refused
    assert delays == [32, 64, 128, 256, LAST_REFUSED_S, LAST_REFUSED_S]
    assert retry.delay_s(UNREACHABLE, None) == LAST_S  # something else now
    assert not retry.is_refused


@pytest.mark.parametrize("error", [StrangerError("a portal"), UNREACHABLE])
def test_what_is_no_relay_can_t_refuse(error: SniTunError) -> None:
    retry = latest()
    for _ in range(2 * REFUSALS):
        retry.delay_s(error, None)
    assert not retry.is_refused


def test_a_proven_tunnel_ends_refusals() -> None:
    retry = latest()
    for _ in range(REFUSALS):
        retry.delay_s(REFUSED, None)
    retry.delay_s(LOST, 1.0)
    assert not retry.is_refused


@hypothesis.given(
    strategies.lists(
        strategies.tuples(
            strategies.sampled_from([LOST, DEAD, UNREACHABLE, REFUSED]),
            strategies.none() | strategies.floats(0, 1e6),
            strategies.floats(0, 1),
        )
    ),
    strategies.floats(0, 100),
)
def test_no_delay_is_longer_than_its_bound(
    steps: list[tuple[SniTunError, float | None, float]], spread_s: float
) -> None:
    """Whatever happens, the next attempt is at most 60 s away, or the spread; 300 s if refused."""
    drawn = 0.0
    retry = Retry(lambda: drawn, spread_s)
    for error, proven_s, number in steps:
        drawn = number
        delay_s = retry.delay_s(error, proven_s)
        most = LAST_REFUSED_S if retry.is_refused else LAST_S
        assert 0 <= delay_s <= max(most, spread_s)
