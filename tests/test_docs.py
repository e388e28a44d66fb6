"""docs/client.md has every option, field, metric and exit code."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snitun_sync import program, status_command
from snitun_sync.client import cli
from tests.services import Services
from tests.support import PROJECT

TEXT = (PROJECT / "docs" / "client.md").read_text("utf-8")


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from (name for name in action.option_strings if name.startswith("--"))


def keys(report: Any) -> Iterator[str]:
    """Yield the names of all fields but those that are data themselves."""
    if isinstance(report, dict):
        for name, value in report.items():
            yield name
            if name not in ("failures", "refused_channels"):
                yield from keys(value)
    elif isinstance(report, list):
        for value in report:
            yield from keys(value)


@pytest.mark.parametrize("parser", [cli.parser(), status_command.parser("snitun-client")])
def test_every_option(parser: argparse.ArgumentParser) -> None:
    for name in set(options(parser)) - {"--help", "--version"}:
        assert f"`{name}" in TEXT, name


def test_every_field_and_metric(tmp_path: Path) -> None:
    with Services(tmp_path) as services, services.device("ECHO") as device:
        device.exchange()
        report = services.client.report()
        for name in set(keys(report)):
            assert f"`{name}`" in TEXT, name
        for family in services.client.metrics():
            suffix = {"counter": "_total", "info": "_info"}.get(family[1], "")
            assert f"`{family[0]}{suffix}" in TEXT, family[0]


def test_every_exit_code() -> None:
    codes = {value for name, value in vars(program).items() if name.startswith("EXIT_")}
    found = set(map(int, re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)))
    assert found == codes
