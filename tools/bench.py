"""Measure tunnels side by side: throughput, latency, CPU and memory.

python3 tools/bench.py             everything; half an hour
python3 tools/bench.py --quick     whether every scenario runs; its figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import statistics
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import environment
from tools.bench_report import Result, markdown, picture
from tools.bench_scenarios import GROWTH_OF, SCENARIOS, Figures, Scenario
from tools.bench_systems import SYSTEMS, MissingError

BASE = "snitun-0.47.0"
LIMIT_S = 600  # of one scenario of one system
EXPLANATION = """\
Each system is a relay and a client between devices and an endpoint, all on this machine.
Systems take turns, scenario by scenario and round by round, so that a drift of the machine's
speed hits all alike: trust the ratios and the CPU figures, not the absolute times. Every
figure is of processes just started. CPU and memory are the kernel's own figures.

Linux only. Makes an environment of its own in .venv, and others for the published releases
of snitun in .cache/snitun-peers ($PUBLISHED_PEERS). As root, it installs the Debian packages
of other systems that are missing. What can't be had is skipped, with a line that says so;
with CI=true that is an error.
"""


def say(text: str) -> None:
    """Tell on stderr how far it is."""
    print(text, file=sys.stderr, flush=True)


def _chosen(known: dict[str, str], what: str, text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {name!r}; there are {', '.join(known)}"
            )
    return [name for name in known if name in names]


def _listed() -> tuple[dict[str, str], dict[str, str]]:
    return (
        {name: system.about for name, system in SYSTEMS.items()},
        {name: scenario.about for name, scenario in SCENARIOS.items()},
    )


def _listing() -> str:
    lines = []
    for title, abouts in zip(("systems:", "\nscenarios:"), _listed()):
        lines += [title, *(f"  {name:<25} {about}" for name, about in abouts.items())]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    systems, scenarios = _listed()
    result = argparse.ArgumentParser(
        description="Measure tunnels side by side: throughput, latency, CPU and memory.",
        epilog=f"{EXPLANATION}\n{_listing()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--systems",
        metavar="A,B",
        type=lambda text: _chosen(systems, "system", text),
        help=f"default: all; channels and tunnels-growth are of {GROWTH_OF} alone then",
    )
    result.add_argument(
        "--scenarios",
        metavar="X,Y",
        type=lambda text: _chosen(scenarios, "scenario", text),
        default=list(scenarios),
        help="default: all that a system can do",
    )
    result.add_argument("--rounds", metavar="N", type=_positive, default=3, help="default: 3")
    result.add_argument(
        "--base", metavar="SYSTEM", help=f"ratios are to this one (default: {BASE})"
    )
    result.add_argument("--quick", action="store_true", help="one round, tiny amounts")
    result.add_argument("--json", metavar="FILE", type=Path, help="write the figures")
    result.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables")
    result.add_argument("--picture", metavar="FILE.svg", type=Path, help="write the ratios as SVG")
    result.add_argument(
        "--from-json", metavar="FILE", type=Path, help="measure nothing: take saved figures"
    )
    result.add_argument("--list", action="store_true", help="list systems and scenarios")
    return result


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"not a number above 0: {text}")
    return int(text)


def available(names: list[str], skipped: list[str]) -> list[str]:
    """Return those systems that are here, after installing what can be; note the others."""
    found = []
    for name in names:
        try:
            SYSTEMS[name].check()
            found.append(name)
        except MissingError as error:
            skipped.append(f"{name} ({error})")
            say(f"skipped: {skipped[-1]}")
    return found


def _too_long(*_: object) -> NoReturn:
    raise RuntimeError(f"not done after {LIMIT_S} s")


def run_once(scenario: Scenario, system: str, amount: int, is_quick: bool) -> Figures:
    """Start the system, do it, stop the system; return the figures."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT_S)
    try:
        with scenario.place(SYSTEMS[system]) as running:
            if is_quick:
                running.idle_s = 0.1
            return scenario.run(running, amount)
    finally:
        signal.alarm(0)


def measure(options: argparse.Namespace) -> Result:
    """Measure what the options ask for."""
    rounds = 1 if options.quick else options.rounds
    skipped: list[str] = []
    systems = available(options.systems or list(SYSTEMS), skipped)
    samples: dict[str, dict[str, list[Figures]]] = {system: {} for system in systems}
    failed: set[tuple[str, str]] = set()
    for number in range(rounds):
        for name in options.scenarios:
            scenario = SCENARIOS[name]
            is_growth = len(scenario.amounts) > 1
            for step, amount in scenario.steps(name, options.quick).items():
                for system in systems:
                    if (
                        not scenario.can(SYSTEMS[system])
                        or (is_growth and not options.systems and system != GROWTH_OF)
                        or (system, step) in failed
                    ):
                        continue
                    label = f"{number + 1}/{rounds} {step:<15} {system:<24}"
                    try:
                        figures = run_once(scenario, system, amount, options.quick)
                    except MissingError as error:
                        if f"{name} ({error})" not in skipped:
                            skipped.append(f"{name} ({error})")
                            say(f"skipped: {skipped[-1]}")
                        continue
                    except Exception as error:
                        failed.add((system, step))
                        samples[system].setdefault(step, [])
                        say(f"{label} FAILED: {type(error).__name__}: {error}")
                        continue
                    samples[system].setdefault(step, []).append(figures)
                    say(f"{label} " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    medians: dict[str, dict[str, Figures | None]] = {}
    for system, by_step in samples.items():
        medians[system] = {
            step: None
            if (system, step) in failed
            else {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
            for step, runs in by_step.items()
        }
    machine = "A quick run: its figures mean nothing. " if options.quick else ""
    machine += f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} "
    machine += f"{platform.release()}, Python {platform.python_version()}"
    return {
        "machine": machine,
        "rounds": rounds,
        "base": options.base or BASE,
        "skipped": skipped,
        "systems": medians,
    }


def main(arguments: list[str] | None = None) -> int:
    """Do what the arguments ask for; return the exit code."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.base and options.base not in SYSTEMS:
        command_line.error(f"unknown system {options.base!r}; there are {', '.join(SYSTEMS)}")
    if options.list:
        print(_listing())
        return 0
    if options.picture or not options.from_json:
        environment.enter("requirements.txt", "tools/requirements-bench.txt")
    if options.from_json:
        try:
            result: Result = json.loads(options.from_json.read_text("utf-8"))
        except (OSError, ValueError) as error:
            command_line.error(f"{options.from_json}: {error}")
        result["base"] = options.base or result["base"]
    else:
        if platform.system() != "Linux":
            sys.exit("the processes' CPU and memory can be read on Linux only")
        # 10,000 tunnels; processes that are started get the same.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            result = measure(options)
        except KeyboardInterrupt:
            return 130
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    text = markdown(result)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n", "utf-8")
    if options.picture:
        try:
            picture(result, options.picture)
        except ValueError as error:
            say(str(error))
    has_failed = any(row is None for by in result["systems"].values() for row in by.values())
    is_short = bool(result["skipped"]) and os.environ.get("CI") == "true"
    return int(not options.from_json and (has_failed or is_short))


if __name__ == "__main__":
    sys.exit(main())
