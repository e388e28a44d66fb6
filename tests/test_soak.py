"""tools/storm.py and tools/soak.py in a short form: what they check, not what they measure."""

from __future__ import annotations

import pytest

from tools import soak as soak_module
from tools import storm as storm_module
from tools.soak import BLACK_HOLE, KILL, PLAIN, TICKET, Holding, phases, soak
from tools.storm import ATTEMPT, FAILED, UP, Event, Result, read_message, storm

CLIENTS, WHOLE = 40, 3


def say(text: str) -> None:
    """Print how it goes; pytest shows it where a test fails."""
    print(text)


def test_all_clients_come_back_and_not_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a client that isn't back by then, whatever delays it has drawn, something is wrong.
    monkeypatch.setattr(storm_module, "LIMIT_S", 240.0)
    result = storm(0.5, CLIENTS, WHOLE, processes=2, say=say)
    assert result.is_complete
    assert set(result.back) == set(range(CLIENTS))
    assert set(result.first_delays) == set(range(CLIENTS))
    for number in range(CLIENTS):
        events = [event for event in result.events if event.client == number]
        assert next(e for e in events if e.kind in (ATTEMPT, FAILED)).kind == FAILED
        lost = next(event for event in events if event.kind == FAILED)
        attempt = next(event for event in events if event.kind == ATTEMPT)
        # What is drawn is waited for; one of the times may be cut to milliseconds.
        assert attempt.time >= lost.time + lost.delay_s - 0.1
    delays = sorted(result.first_delays.values())
    assert delays[-1] <= 10
    # Logged in tenths of a second: of 40 drawn from 10 s, hardly any two are the same.
    assert len(set(delays)) > CLIENTS // 2
    assert delays[0] < 5 < delays[-1]


def test_nothing_stays_behind(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak(0.1, say) == []
    said = capsys.readouterr().out
    assert "6 losses (2 relay killed, 2 reset, 2 takeover)" in said
    assert "4 reloads (1 reload, 3 reload with a new ticket)" in said


def test_what_stays_behind_is_told() -> None:
    start = Holding(descriptors=9, threads=1, rss_kib=17000)
    assert Holding(9, 1, 17000 + 1024).excess(start) == []
    assert Holding(8, 1, 16000).excess(start) == []
    assert Holding(10, 3, 18025).excess(start) == [
        "1 descriptors more",
        "2 threads more",
        "1025 KiB more; 1024 are allowed",
    ]


def test_ten_minutes_are_what_they_are_said_to_be() -> None:
    plan = phases(10)
    losses = [kind for phase in plan for kind in phase.losses]
    reloads = [kind for phase in plan for kind in phase.reloads]
    assert sum(phase.connections for phase in plan) == 10_000
    assert plan[0].connections == 500
    assert len(losses) == 50
    assert {KILL, BLACK_HOLE} < set(losses)
    assert KILL not in plan[2].losses + plan[3].losses  # that relay's memory is looked at
    assert len(reloads) == 20
    assert reloads.count(TICKET) >= 10 > 5 < reloads.count(PLAIN)
    for phase in plan:
        mixed = soak_module._mixed(phase.losses, phase.reloads)
        assert sorted(a for a in mixed if a != soak_module.PAUSE) == sorted(
            phase.losses + phase.reloads
        )


def test_what_a_log_says_of_attempts() -> None:
    assert read_message(1.0, 2, "connecting to the relay r:443") == Event(1.0, 2, ATTEMPT)
    assert read_message(1.0, 2, "ready: d at the relay r:443 leads to e") == Event(1.0, 2, UP)
    lost = "the relay closed the connection (and 3 failures before); next attempt in 2.5 s"
    assert read_message(1.0, 2, lost) == Event(1.0, 2, FAILED, 2.5)
    assert read_message(1.0, 2, "refused 1 channels: --max-channels 2 is reached") is None


def test_a_storm_is_measured_in_any_second() -> None:
    times = (0.9, 0.95, 1.05, 1.89, 1.95, 4.0)
    events = [Event(100 + when, n, ATTEMPT) for n, when in enumerate(times)]
    events += [Event(104.5, n, UP) for n in range(6)]
    result = Result(6, 1.0, killed_at=100.0, restarted_s=1.0, events=events)
    assert result.per_second() == [2, 3, 0, 0, 1]
    assert result.densest() == 4
    assert result.back_s == pytest.approx(3.5)
    assert result.misses() == []
    assert Result(7, 1.0, 100.0, 1.0, events).misses() == ["not all are back"]
    many = [Event(100 + n / 1000, n, ATTEMPT) for n in range(101)] + events[-1:]
    assert "101 attempts in a second, target 100" in Result(1, 1.0, 100.0, 1.0, many).misses()
