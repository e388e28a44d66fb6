"""Prints what the matrix found as a table: release × role × version × cipher."""

from __future__ import annotations

import pytest

ROWS: dict[tuple[str, ...], list[str]] = {}
COLUMNS = ("snitun", "we are", "version", "cipher", "package")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table below the test run."""
    if not ROWS:
        return
    steps = list(dict.fromkeys(step.partition(":")[0] for row in ROWS.values() for step in row))
    lines = [[*COLUMNS, *steps]]
    for key, row in ROWS.items():
        seen = dict(step.split(":", 1) for step in row)
        lines.append([*key, *(seen.get(step, "FAILED" if step in seen else "-") for step in steps)])
    terminalreporter.section("interoperability")
    terminalreporter.write_line("| " + " | ".join(lines[0]) + " |")
    terminalreporter.write_line("|" + "---|" * len(lines[0]))
    for line in lines[1:]:
        terminalreporter.write_line("| " + " | ".join(line) + " |")
