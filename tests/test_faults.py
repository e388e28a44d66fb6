"""Real faults between a whole client and its relay: the quick form of `tools/faults.py`.

The faults of a group happen at the same time, each in a network of its own. Not how long anything
took is tested, but that it was noticed, that it was called by its name and that it ended.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.network import require_network
from tools.faults import run_all
from tools.faults_list import FAULTS
from tools.faults_scene import Pace

if TYPE_CHECKING:
    from tools.faults_scene import Outcome


class Expected(NamedTuple):
    """What must become of a fault."""

    said: str
    """A pattern of what the client says; "" where it need not notice anything."""
    failures: str
    """The kinds of failures that may be counted, by /status."""


SILENCE = Expected(
    r"answered no PING|nothing for|connection timed out|No route", "dead unreachable"
)
# A reset, where the relay had something unread.
CLOSED = Expected(
    "the relay closed the connection|connection to the relay broke", "lost unreachable"
)
RESET = Expected("Connection reset by peer", "lost dead unreachable")
UNNOTICED = Expected("", "dead unreachable")
EXPECTED = {
    **{
        f"black hole {way}, {load}": SILENCE
        for way in ("both ways", "to the relay", "to the client")
        for load in ("idle", "a download")
    },
    "black hole that stays": Expected("can't reach the relay", "dead unreachable"),
    "black hole for 5 s": UNNOTICED,
    "20 % loss both ways": UNNOTICED,
    "way rejected by TCP resets": RESET,
    "way rejected by ICMP": SILENCE,
    "relay killed, back after 3 s": CLOSED,
    "relay's host loses power, back after 3 s": RESET,
    "relay stopped by SIGSTOP, resumed": SILENCE,
    "captive portal that answers HTML": Expected(
        "no relay answers at its address, but a web server: a captive portal", "lost unreachable"
    ),
    "captive portal that waits for a request": Expected("no challenge within", "lost unreachable"),
    "own address changed": Expected("address of the tunnel is gone", "dead unreachable"),
    "own address gone, the same back after 5 s": Expected(
        "address of the tunnel is gone", "dead unreachable"
    ),
    "default route to a dead gateway, and back": Expected("answered no PING", "dead unreachable"),
    "default route to another gateway": UNNOTICED,
    "cable pulled for 10 s": Expected("answered no PING", "dead unreachable"),
    "DNS gone at the start: silence": Expected("Temporary failure in name", "unreachable"),
    "DNS gone at the start: SERVFAIL": Expected("Temporary failure in name", "unreachable"),
    "DNS gone at the start: NXDOMAIN": Expected("Name or service not known", "unreachable"),
    "relay killed and back, DNS silent meanwhile": Expected(
        "Temporary failure in name", "lost unreachable"
    ),
    "relay moved to another address": CLOSED,
    "IPv6 broken at the start, IPv4 whole": UNNOTICED,
    "IPv6 breaks under the tunnel, IPv4 whole": SILENCE,
    "only by an HTTP proxy, which is gone for 3 s": Expected(
        "the proxy http://10.77.1.1:3128 can't be reached", "lost unreachable"
    ),
    "only by a SOCKS5 proxy, which is gone for 3 s": Expected(
        "the proxy socks5://10.77.1.1:3128 can't be reached", "lost unreachable"
    ),
    "client stopped by SIGSTOP, resumed": UNNOTICED,
    "client stopped, relay restarted meanwhile": CLOSED,
    "client stopped, resumed in a black hole": Expected("answered no PING", "dead unreachable"),
    "clock in 1970, then jumping by hours": UNNOTICED,
    "hostname leads to another service (DNS)": Expected(
        "self-probe: .* is not the endpoint's certificate", "dead"
    ),
    "another client takes the hostname over": Expected(
        "another connection, from 10.77.3.2:[0-9]+, took over", "lost"
    ),
}
# With nothing that could have brought the tunnel back until the client had noticed.
NOT_READY = (
    *(name for name in EXPECTED if name.startswith(("black hole b", "black hole t", "DNS"))),
    "way rejected by ICMP",
    "relay stopped by SIGSTOP, resumed",
    "own address gone, the same back after 5 s",
    "default route to a dead gateway, and back",
    "cable pulled for 10 s",
    "relay killed, back after 3 s",
    "hostname leads to another service (DNS)",
)


def test_all_are_expected() -> None:
    assert set(EXPECTED) == set(FAULTS)
    assert set(NOT_READY) < set(FAULTS)


@pytest.mark.parametrize("group", sorted({fault.group for fault in FAULTS.values()}))
def test_it_is_noticed_and_it_ends(group: str) -> None:
    require_network()
    faults = [fault for fault in FAULTS.values() if fault.group == group]
    here = [fault for fault in faults if not fault.missing()]
    outcomes = run_all(here, Pace(is_quick=True), len(here))
    wrong = [text for outcome in outcomes if (text := _wrong(outcome))]
    assert not wrong, "\n\n".join(wrong)
    if len(here) < len(faults):
        pytest.skip(", ".join(filter(None, (fault.missing() for fault in faults))))


def _wrong(outcome: Outcome) -> str:
    """Return what isn't as it should be, with all that is known; "" if all is."""
    try:
        _check(outcome)
    except (AssertionError, KeyError) as error:
        return f"{outcome.name}: {error!r}\n{outcome}\n{outcome.log}"
    return ""


def _check(outcome: Outcome) -> None:
    assert outcome.error == ""
    expected, end = EXPECTED[outcome.name], outcome.seen["end"]
    assert outcome.back_s is not None
    assert end["is_ready"]
    assert end["state"] == "up"
    # Nothing of it was a refusal, after which attempts would be rare.
    assert set(end["failures"]) <= set(expected.failures.split())
    assert "it refuses this client" not in outcome.log
    if expected.said:
        assert outcome.noticed_s is not None
        said = "\n".join((*outcome.reasons, outcome.log, *(e["reason"] for e in end["endings"])))
        assert re.search(expected.said, said, re.IGNORECASE)
    if outcome.name in NOT_READY:
        assert outcome.seen["noticed"]["is_ready"] is False
        assert outcome.reasons
    if outcome.name in MORE:
        MORE[outcome.name](outcome)


def _by_ip4_at_the_end(outcome: Outcome) -> None:
    assert outcome.seen["end"]["tunnel"]["relay_address"].startswith("10.77.2.2:")
    if "before" in outcome.seen:
        assert outcome.seen["before"]["tunnel"]["relay_address"].startswith("[fd77:")


def _was_doubted(outcome: Outcome) -> None:
    """The clock only was wrong: the tunnel stayed, and each doubt was waited for."""
    assert "before this program was written" in outcome.seen["noticed"]["clock_doubt"]
    assert outcome.seen["noticed"]["is_ready"]
    assert "by it the ticket expired" in outcome.seen["end"]["clock_doubt"]
    assert outcome.attempts == 0


def _is_up_and_not_ready(outcome: Outcome) -> None:
    """The tunnel is whole; it is the probe alone that can tell."""
    noticed = outcome.seen["noticed"]
    assert noticed["state"] == "up"
    assert "is not the endpoint's certificate" in noticed["probe"]["failure"]
    assert noticed["reason"] == noticed["probe"]["failure"]
    assert outcome.seen["end"]["probe"]["failure"] is None


def _at_the_new_address(outcome: Outcome) -> None:
    assert outcome.seen["end"]["tunnel"]["relay_address"].startswith("10.77.2.77:")


def _from_the_new_address(outcome: Outcome) -> None:
    before, end = (outcome.seen[when]["tunnel"]["local_address"] for when in ("before", "end"))
    assert before.startswith("10.77.1.2:")
    assert end.startswith("10.77.1.3:")


def _by_the_proxy(outcome: Outcome) -> None:
    assert outcome.seen["end"]["tunnel"]["relay_address"] == "10.77.1.1:3128"


MORE = {
    "IPv6 broken at the start, IPv4 whole": _by_ip4_at_the_end,
    "IPv6 breaks under the tunnel, IPv4 whole": _by_ip4_at_the_end,
    "clock in 1970, then jumping by hours": _was_doubted,
    "hostname leads to another service (DNS)": _is_up_and_not_ready,
    "relay moved to another address": _at_the_new_address,
    "own address changed": _from_the_new_address,
    "only by an HTTP proxy, which is gone for 3 s": _by_the_proxy,
    "only by a SOCKS5 proxy, which is gone for 3 s": _by_the_proxy,
}
