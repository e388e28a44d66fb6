"""All tests and checks, in environments of their own.

    python3 tools/test.py               everything; some ten minutes
    python3 tools/test.py --quick       the package itself, with the Python of .venv alone
    python3 tools/test.py -- -k mux     the same, and what follows -- goes to pytest

Where a program or a Python is missing, its tests are skipped and say so; with CI=true
they fail.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import environment
from tools.environment import PROJECT

# How many run at once: most tests wait, for what programs and networks take their time with.
# With published releases and other people's programs, and under load.
REST = (
    *("-n", "4", "--dist", "worksteal", "tests/interop"),
    *(
        f"tests/test_{name}.py"
        for name in ("real_users", "load", "acme", "endpoints", "bench", "openapi", "master")
    ),
)
# Whole programs for a while, in networks of their own and under systemd; once is enough.
WHOLE = (
    *("-n", "6", "--dist", "worksteal"),
    *(f"tests/test_{name}.py" for name in ("faults", "network", "signals", "soak", "systemd")),
)
# The package itself.
CORE = (
    *("-n", "8", "tests"),
    *(f"--ignore={path}" for path in (*REST, *WHOLE) if path.startswith("tests")),
)
# Those in which it matters which package encrypts.
CRYPTO = ("-n", "8", *(f"tests/{name}" for name in ("protocol", "net", "client", "server")))
OTHER_PYTHONS: tuple[tuple[str, tuple[str, ...]], ...] = (("3.9", ()), ("3.13", ("-OO",)))
CACHE = PROJECT / ".cache"


class Steps:
    """Runs the steps one by one, says what is going on, and sums up."""

    def __init__(self) -> None:
        self._results: list[tuple[str, str, float]] = []

    def run(self, name: str, *command: str) -> None:
        """Run a command in the project's folder."""
        print(f"\n=== {name}", flush=True)
        begin = time.monotonic()
        done = subprocess.run(command, cwd=PROJECT, check=False)
        self._results.append(
            (name, "ok" if done.returncode == 0 else "FAILED", time.monotonic() - begin)
        )

    def missing(self, name: str, what: str) -> None:
        """A step can't run here; that is a failure in CI."""
        result = "FAILED" if os.environ.get("CI") == "true" else "skipped"
        self._results.append((f"{name}: no {what} here", result, 0.0))

    def report(self) -> int:
        """Print the results; return the exit code."""
        print("\n=== results")
        for name, result, took_s in self._results:
            print(f"{result:8} {took_s:6.0f} s  {name}")
        return int(any(result == "FAILED" for _, result, _ in self._results))


def other_python(version: str) -> Path | None:
    """Return the Python of an environment with this version; None where there is none."""
    base = environment.find_python(version)
    if base is None:
        return None
    return environment.ensure(
        CACHE / f"python-{version}",
        PROJECT / "requirements.txt",
        PROJECT / "tests" / "requirements.txt",
        python=base,
    )


def pytest_of(python: Path, *flags: str) -> tuple[str, ...]:
    """Return the command that runs pytest; what two of them remember would get mixed up."""
    return (str(python), *flags, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def prepare_releases() -> None:
    """Make environments with the published releases; where that fails, their tests say so."""
    from tests.interop.peers import RELEASES, prepare

    for release in RELEASES:
        with contextlib.suppress(subprocess.CalledProcessError):
            prepare(release)


def prepare_pythons() -> None:
    """Make environments with the other Pythons; where that fails, their steps say so."""
    for version, flags in OTHER_PYTHONS:
        python = other_python(version)
        if python:
            # One process compiles what it imports, rather than all of them at once.
            collect = (*pytest_of(python, *flags), "--collect-only", *CORE, "-n", "0")
            subprocess.run(collect, cwd=PROJECT, check=False, stdout=subprocess.DEVNULL)


def other_pythons(steps: Steps) -> None:
    """Run the package's own tests with the oldest and the newest Python."""
    for version, flags in OTHER_PYTHONS:
        name = f"tests of the package, Python {version} {' '.join(flags)}".rstrip()
        python = other_python(version)
        if python is None:
            steps.missing(name, f"Python {version}")
            continue
        steps.run(name, *pytest_of(python, *flags), *CORE)


def main() -> int:
    """Run what the arguments ask for; return the exit code."""
    parser = argparse.ArgumentParser(
        description="All tests and checks, in environments of their own (.venv and .cache)."
    )
    parser.add_argument("--quick", action="store_true", help="the package itself, one Python")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS", help="for pytest")
    options = parser.parse_args()
    environment.enter("requirements.txt", "tests/requirements.txt", "tests/requirements-all.txt")
    pytest = (sys.executable, "-m", "pytest", "-q")
    steps = Steps()
    if options.arguments:
        steps.run("pytest", *pytest, *options.arguments)
        return steps.report()
    # Programs are started by the hundred: they needn't compile themselves each time.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Others download and unpack beside the first steps.
    releases = threading.Thread(target=prepare_releases, daemon=True)
    pythons = threading.Thread(target=prepare_pythons, daemon=True)
    if not options.quick:
        releases.start()
        pythons.start()
    steps.run("ruff check", sys.executable, "-m", "ruff", "check", ".")
    steps.run("ruff format", sys.executable, "-m", "ruff", "format", "--check", "--quiet", ".")
    steps.run("mypy", sys.executable, "-m", "mypy")
    steps.run("tests of the package", *pytest, *CORE)
    if options.quick:
        return steps.report()
    releases.join()
    steps.run("tests of faults, signals and systemd", *pytest, *WHOLE)
    steps.run("tests with other programs, and under load", *pytest, *REST)
    steps.run("tests with cryptography", *pytest, "--crypto=cryptography", *CRYPTO)
    pythons.join()
    other_pythons(steps)
    return steps.report()


if __name__ == "__main__":
    sys.exit(main())
