"""The figures of tools/bench.py as Markdown tables, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from tools.bench_scenarios import SCENARIOS, Figures

# Readable on white and on black.
GREY, OWN, OTHER = "#7d7d7d", "#2a8c82", "#8f9bb3"


class Result(TypedDict):
    """What a run found; this is what --json writes."""

    machine: str
    rounds: int
    base: str
    skipped: list[str]
    systems: dict[str, dict[str, Figures | None]]  # None: failed


def shown(value: float) -> str:
    """Return a figure with the digits that mean something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def is_better_higher(figure: str) -> bool:
    """Return whether more of it is better; rates are, everything else is a cost."""
    return figure.endswith(("/s", "per s")) and "CPU" not in figure


def _base(result: Result, step: str) -> Figures:
    return result["systems"].get(result["base"], {}).get(step) or {}


def _row(result: Result, system: str, step: str, figures: list[str]) -> list[str]:
    row = result["systems"][system][step]
    if row is None:
        return ["failed"] * len(figures)
    base = _base(result, step)
    cells = []
    for figure in figures:
        cell = shown(row[figure]) if figure in row else "-"
        reference = base.get(figure, 0.0)
        # Of a few KiB grown, or none, a ratio says nothing.
        if figure in row and reference > 0 and system != result["base"] and "grown" not in figure:
            cell += f" ({row[figure] / reference:.2f}×)"
        cells.append(cell)
    return cells


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown(result: Result) -> str:
    """Return a table for each scenario, with ratios to the base."""
    systems = result["systems"]
    lines = [f"{result['machine']}. Medians of {result['rounds']} round(s)."]
    if result["base"] in systems:
        lines[0] += f" In brackets: times {result['base']}."
    for name, scenario in SCENARIOS.items():
        steps = [
            (system, step)
            for system, by_step in systems.items()
            for step in by_step
            if step.partition("/")[0] == name
        ]
        if not steps:
            continue
        found = [systems[system][step] or {} for system, step in steps]
        figures = list(dict.fromkeys(figure for row in found for figure in row)) or ["result"]
        has_numbers = any("/" in step for _, step in steps)
        head = ["system", "number"] if has_numbers else ["system"]
        lines += ["", f"### {name}", "", f"{scenario.about[0].upper()}{scenario.about[1:]}.", ""]
        lines.append(_line(head + figures))
        lines.append("|---" * len(head[:1]) + "|---:" * (len(head) - 1 + len(figures)) + "|")
        for system, step in steps:
            number = [f"{int(step.partition('/')[2]):,}"] if has_numbers else []
            lines.append(_line([system, *number, *_row(result, system, step, figures)]))
    if result["skipped"]:
        lines += ["", *(f"Skipped: {line}." for line in result["skipped"])]
    return "\n".join(lines)


def picture(result: Result, path: Path) -> None:
    """Write an SVG: for each scenario, how many times better than the base each system is."""
    import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    settings: Any = mpl.rcParams
    settings.update({"svg.hashsalt": "snitun_sync", "svg.fonttype": "none", "font.size": 8})
    for colored in ("text.", "axes.edge", "axes.title", "xtick.", "ytick."):
        settings[f"{colored}color"] = GREY
    systems = result["systems"]
    panels = [
        name
        for name, scenario in SCENARIOS.items()
        if scenario.main and _base(result, name) and any(by.get(name) for by in systems.values())
    ]
    if not panels:
        raise ValueError(f"no picture: {result['base']}, the base of the ratios, has no figures")
    rows = -(-len(panels) // 2)
    height = rows * (0.75 + 0.17 * len(systems)) + 0.2
    figure = Figure(figsize=(9, height))
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes, name in zip(grid.flat, panels):
        _panel(axes, result, name)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"times as good as {result['base']}: the longer, the better", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.1 / height))
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def _panel(axes: Any, result: Result, name: str) -> None:
    from matplotlib.ticker import LogLocator  # type: ignore[import-not-found,unused-ignore]

    main = SCENARIOS[name].main
    reference = _base(result, name)[main]
    by_system = {system: by[name] for system, by in result["systems"].items() if name in by}
    systems = [system for system, row in by_system.items() if row is None or main in row]
    label: Any = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
    for at, system in enumerate(systems):
        row = by_system[system]
        value = row.get(main, 0.0) if row else 0.0
        if value <= 0 or reference <= 0:
            axes.annotate("failed" if row is None else "-", (1, at), **label)
            continue
        better = value / reference if is_better_higher(main) else reference / value
        color = OWN if system.startswith("snitun_sync") else OTHER
        axes.barh(at, better - 1, left=1, height=0.7, color=color)
        axes.annotate(shown(value), (max(better, 1), at), **label)
    axes.set_xscale("log", base=2)
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(systems)), systems)
    axes.set_ylim(len(systems) - 0.4, -0.6)
    axes.margins(x=0.2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}×")
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=5))
    axes.minorticks_off()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"{name}, {main}", loc="left", fontsize=8)
