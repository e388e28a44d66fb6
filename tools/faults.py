"""What a client does when the network fails: real faults, and a table of what came of them.

python3 tools/faults.py             all of them with the client's defaults; some minutes
python3 tools/faults.py --quick     with short time limits; a minute or two
python3 tools/faults.py --only dns --minutes 60    DNS gone for an hour
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import environment

if TYPE_CHECKING:
    from tools.faults_list import Fault
    from tools.faults_scene import Outcome, Pace

EXPLANATION = """\
Each fault has a network of its own (client, router, relay and a device, in network
namespaces), in which relay and client run as whole processes; a device tries again and
again, and so does who asks /ready. The times are those of a fresh attempt each half second,
and of a question each tenth.

Linux only, as root. What a fault needs and isn't here leaves it out, with a line that says so;
with CI=true that is an error.
"""
JOBS = 20
HEAD = """\
| fault | noticed after | back after | /ready said 200 in vain | attempts | what it said |
|---|---:|---:|---:|---:|---|"""
_output = threading.Lock()


def say(text: str) -> None:
    """Tell on stderr how far it is."""
    with _output:
        print(text, file=sys.stderr, flush=True)


def run(fault: Fault, pace: Pace, stop: threading.Event) -> Outcome:
    """Let it happen in a network of its own; `stop` makes it fail soon."""
    from tools.faults_scene import FaultError, Scene

    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="snitun-fault-") as folder:
        error = ""
        with Scene(pace, Path(folder), lambda text: say(f"{fault.name}: {text}"), stop) as scene:
            try:
                fault.happen(scene)
                scene.wait_until_through("at the end")
            except (FaultError, AssertionError, OSError, RuntimeError) as failure:
                error = f"{type(failure).__name__}: {failure}"
            outcome = scene.outcome(fault.name)
    outcome.error, outcome.took_s = error, time.monotonic() - begin
    return outcome


def run_all(faults: list[Fault], pace: Pace, jobs: int) -> list[Outcome]:
    """Let all of them happen, `jobs` at a time."""

    stop = threading.Event()

    def job(fault: Fault) -> Outcome:
        outcome = run(fault, pace, stop)
        say(f"{fault.name}: {outcome.error or 'through again'} ({outcome.took_s:.0f} s)")
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(job, fault) for fault in faults]
        try:
            return [future.result() for future in futures]
        except BaseException:  # also Ctrl-C: what runs cleans up behind itself
            stop.set()
            for future in futures:
                future.cancel()
            raise


def markdown(outcomes: list[Outcome]) -> str:
    """Return the table."""
    lines = [HEAD]
    for outcome in outcomes:
        figures = (
            _seconds(outcome.noticed_s),
            _seconds(outcome.back_s) if not outcome.error else "FAILED",
            _seconds(outcome.untrue_s),
            str(outcome.attempts),
            outcome.error or "; ".join(outcome.reasons[:2]) or "–",
        )
        lines.append(f"| {' | '.join((outcome.name, *figures))} |".replace("\n", " "))
    return "\n".join(lines)


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.1f} s"


def main() -> int:
    """Run what the arguments ask for; return the exit code."""
    command_line = argparse.ArgumentParser(
        description="Real faults between a client and its relay, and a table of what came of them.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_argument("--quick", action="store_true", help="short time limits")
    command_line.add_argument(
        "--only", metavar="NAME", default="", help="faults whose name has this in it"
    )
    command_line.add_argument(
        "--minutes", metavar="N", type=float, default=0.0, help="let faults last so long at least"
    )
    command_line.add_argument(
        "--jobs", metavar="N", type=int, default=JOBS, help=f"faults at a time (default: {JOBS})"
    )
    command_line.add_argument("--markdown", metavar="FILE", type=Path, help="write the table, too")
    command_line.add_argument("--list", action="store_true", help="name the faults, and exit")
    options = command_line.parse_args()
    environment.enter("requirements.txt", "tests/requirements.txt")
    from tests.network import missing
    from tools.faults_list import FAULTS
    from tools.faults_scene import Pace

    chosen = [fault for fault in FAULTS.values() if options.only.lower() in fault.name.lower()]
    if not chosen:
        command_line.error(f"no fault has {options.only!r} in its name; see --list")
    if options.list:
        print("\n".join(fault.name for fault in chosen))
        return 0
    if reason := missing():
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in [name for name in os.environ if name.startswith("SNITUN_")]:
        del os.environ[name]
    skipped = [fault for fault in chosen if fault.missing()]
    for fault in skipped:
        say(f"{fault.name}: {fault.missing()}")
    pace = Pace(is_quick=options.quick, minutes=options.minutes)
    faults = [fault for fault in chosen if fault not in skipped]
    try:
        outcomes = run_all(faults, pace, options.jobs)
    except KeyboardInterrupt:
        return 130
    table = markdown(outcomes)
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n", "utf-8")
    for outcome in outcomes:
        if outcome.error:
            say(f"\n{outcome.name}: {outcome.error}\n{outcome.log}")
    has_failed = any(outcome.error for outcome in outcomes)
    return int(has_failed or (bool(skipped) and os.environ.get("CI") == "true"))


if __name__ == "__main__":
    sys.exit(main())
