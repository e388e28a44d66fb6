"""Metrics as text: OpenMetrics 1.0 (specification/OpenMetrics.md in prometheus/OpenMetrics)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Union

    Sample = tuple[dict[str, str], Union[int, float]]
    """Labels and the value."""
    Family = tuple[str, str, str, str, Iterable[Sample]]
    """Name, kind ("counter", "gauge" or "info"), unit ("" is none), help and samples.

    The name ends with the unit, and has no suffix: that of counters and of infos is added.
    """

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_SUFFIXES = {"counter": "_total", "info": "_info"}
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def render(families: Iterable[Family]) -> str:
    """Return the families, each of which has another name, as one exposition."""
    lines = []
    for name, kind, unit, text, samples in families:
        lines.append(f"# TYPE {name} {kind}")
        if unit:
            lines.append(f"# UNIT {name} {unit}")
        lines.append(f"# HELP {name} {text.translate(_ESCAPES)}")
        for labels, value in samples:
            pairs = ",".join(
                f'{label}="{content.translate(_ESCAPES)}"' for label, content in labels.items()
            )
            braces = f"{{{pairs}}}" if pairs else ""
            lines.append(f"{name}{_SUFFIXES.get(kind, '')}{braces} {_number(value)}")
    lines.append("# EOF\n")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Return a number as the specification writes it; True and False are 1 and 0."""
    if not isinstance(value, float):
        return str(int(value))
    if value - value != 0:  # not finite: repr would say inf and nan
        return "NaN" if value != value else "+Inf" if value > 0 else "-Inf"
    return repr(value)
