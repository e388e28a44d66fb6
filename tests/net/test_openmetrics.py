"""Metrics as text; prometheus_client's parser is the judge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from snitun_sync.net.openmetrics import CONTENT_TYPE, render

if TYPE_CHECKING:
    from snitun_sync.net.openmetrics import Family

FAMILIES: list[Family] = [
    ("snitun", "info", "", "What runs.", [({"version": "1.0", "role": "relay"}, 1)]),
    ("snitun_tunnels", "gauge", "", "Tunnels that are up.", [({}, 3)]),
    (
        "snitun_received_bytes",
        "counter",
        "bytes",
        "Payload received.",
        [({"from": "device"}, 2**53 + 1), ({"from": "client"}, 0)],
    ),
    ("snitun_round_trip_seconds", "gauge", "seconds", "The last one.", [({}, 0.25)]),
    ("snitun_up", "gauge", "", 'Is it "up"?\nA \\ too.', [({}, True)]),
    ("snitun_nothing", "gauge", "", "No sample.", []),
]
TEXT = """\
# TYPE snitun info
# HELP snitun What runs.
snitun_info{version="1.0",role="relay"} 1
# TYPE snitun_tunnels gauge
# HELP snitun_tunnels Tunnels that are up.
snitun_tunnels 3
# TYPE snitun_received_bytes counter
# UNIT snitun_received_bytes bytes
# HELP snitun_received_bytes Payload received.
snitun_received_bytes_total{from="device"} 9007199254740993
snitun_received_bytes_total{from="client"} 0
# TYPE snitun_round_trip_seconds gauge
# UNIT snitun_round_trip_seconds seconds
# HELP snitun_round_trip_seconds The last one.
snitun_round_trip_seconds 0.25
# TYPE snitun_up gauge
# HELP snitun_up Is it \\"up\\"?\\nA \\\\ too.
snitun_up 1
# TYPE snitun_nothing gauge
# HELP snitun_nothing No sample.
# EOF
"""


def parsed(families: list[Family]) -> list[Any]:
    return list(text_string_to_metric_families(render(families)))  # type: ignore[no-untyped-call]


def test_the_text_of_all_kinds() -> None:
    assert render(FAMILIES) == TEXT
    assert render([]) == "# EOF\n"
    assert "version=1.0.0" in CONTENT_TYPE


def test_the_judge_reads_what_was_given() -> None:
    metrics = parsed(FAMILIES)
    assert len(metrics) == len(FAMILIES)
    for metric, (name, kind, unit, text, samples) in zip(metrics, FAMILIES):
        assert (metric.name, metric.type, metric.unit) == (name, kind, unit)
        assert metric.documentation == text
        assert [(sample.labels, sample.value) for sample in metric.samples] == list(samples)


def test_the_judge_refuses_what_is_wrong() -> None:
    """A unit that the name doesn't end with, a name that comes twice: it does look."""
    wrong_unit: Family = ("snitun_received", "counter", "bytes", "", [])
    for families in ([wrong_unit], [FAMILIES[1], FAMILIES[1]]):
        with pytest.raises(ValueError, match="snitun"):
            parsed(families)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_read_as_it_was_given(text: str) -> None:
    help_text = f"({text})"  # the judge drops spaces around it
    (metric,) = parsed([("snitun", "gauge", "", help_text, [({"a": text, "b": text[::-1]}, 1)])])
    assert metric.documentation == help_text
    assert metric.samples[0].labels == {"a": text, "b": text[::-1]}


@given(st.integers(-(2**63), 2**64) | st.floats())
def test_any_number_is_read_as_it_was_given(value: float) -> None:
    (metric,) = parsed([("snitun", "gauge", "", "", [({}, value)])])
    read = metric.samples[0].value
    assert read == value or (math.isnan(value) and math.isnan(read))


def test_numbers_that_are_none() -> None:
    text = render([("n", "gauge", "", "", [({}, float(name)) for name in ("inf", "-inf", "nan")])])
    assert [line.split()[1] for line in text.splitlines()[2:-1]] == ["+Inf", "-Inf", "NaN"]
