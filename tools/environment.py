"""The project's virtual environment, `.venv`: made, filled and entered by the tools.

Uses the standard library alone, so that a fresh machine with Python can begin here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).resolve().parent.parent
VENV = PROJECT / ".venv"
PYTHON = VENV / "bin" / "python"
OLDEST = (3, 9)


def enter(*requirements: str) -> None:
    """Go on in `.venv`, with these requirements files (names in the project) installed.

    Returns when this process runs in it already; otherwise it becomes a new one.
    """
    if sys.version_info < OLDEST:
        sys.exit(f"Python {'.'.join(map(str, OLDEST))} or newer is needed, this is {sys.version}")
    ensure(VENV, *(PROJECT / name for name in requirements))
    if Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(PYTHON, [str(PYTHON), *sys.argv])


def ensure(venv: Path, *requirements: Path, python: str = sys.executable) -> Path:
    """Make the environment `venv` with these requirements, if it isn't there; return its Python.

    What was installed is noted in the environment: nothing is asked of the network
    a second time.
    """
    interpreter = venv / "bin" / "python"
    with _alone(venv):
        if not _works(interpreter):
            shutil.rmtree(venv, ignore_errors=True)
            print(f"making {venv.name} …", file=sys.stderr, flush=True)
            made = subprocess.run([python, "-m", "venv", str(venv)], check=False)
            if made.returncode:
                sys.exit(f"can't make {venv}; on Debian and Ubuntu: apt install python3-venv")
        for path in requirements:
            stamp = venv / f".installed-{path.parent.name}-{path.name}"
            wanted = path.read_text("utf-8")
            if stamp.exists() and stamp.read_text("utf-8") == wanted:
                continue
            print(f"installing {path.relative_to(PROJECT)} …", file=sys.stderr, flush=True)
            command = [str(interpreter), "-m", "pip", "install", "-q", "-r", str(path)]
            if subprocess.run([*command, "--disable-pip-version-check"], check=False).returncode:
                sys.exit(f"pip can't install {path}; is there a network?")
            stamp.write_text(wanted, "utf-8")
    return interpreter


def find_python(version: str) -> str | None:
    """Return a working interpreter of a version like "3.9": this one, on the PATH, or of pyenv."""
    candidates = [sys.executable, f"python{version}"]
    for root in (os.environ.get("PYENV_ROOT"), Path.home() / ".pyenv"):
        if root:
            candidates += sorted(map(str, Path(root).glob(f"versions/{version}.*/bin/python3")))
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        try:
            found = subprocess.run(
                [candidate, "-c", code], capture_output=True, text=True, check=False
            )
        except OSError:
            continue
        if found.stdout.strip() == version:
            return candidate
    return None


def python_with_snitun(folder: Path, release: str, *versions: str) -> str | None:
    """Return a Python that has this published release, in an environment of its own in `folder`.

    It is made with the first of `versions` that is here; None if none is. Raises
    CalledProcessError where the release can't be installed.
    """
    venv = folder / f"snitun-{release}"
    python = str(venv / "bin" / "python")
    check = [python, "-c", "import snitun"]
    with _alone(venv):
        if not os.path.exists(python) or subprocess.run(check, check=False).returncode:
            base = next(filter(None, map(find_python, versions)), None)
            if base is None:
                return None
            print(f"installing snitun {release} …", file=sys.stderr, flush=True)
            install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([base, "-m", "venv", "--clear", str(venv)], check=True)
            subprocess.run([*install, f"snitun=={release}"], check=True)
    return python


@contextlib.contextmanager
def _alone(venv: Path) -> Iterator[None]:
    """Let no other process make this environment meanwhile: wait until it is done."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    with open(venv.with_name(f"{venv.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _works(interpreter: Path) -> bool:
    try:
        return subprocess.run([str(interpreter), "-c", ""], check=False).returncode == 0
    except OSError:
        return False
