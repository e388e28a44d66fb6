"""tools/environment.py: several processes that want one environment at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import in_threads
from tools.environment import ensure, python_with_snitun

# In place of a Python: makes the folder that comes last, with one in it that does what it is asked.
MAKES = """#!/bin/sh
for venv; do :; done
echo "$venv" >>"$0.made"
sleep 0.2
mkdir -p "$venv/bin"
echo "#!/bin/sh" >"$venv/bin/python"
chmod +x "$venv/bin/python"
"""


@pytest.mark.parametrize("kind", ["of the project", "of a release"])
def test_one_makes_it_and_the_others_wait(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, venv = tmp_path / "python", tmp_path / "cache" / "snitun-0.0.1"
    python.write_text(MAKES)
    python.chmod(0o700)
    monkeypatch.setattr("tools.environment.find_python", lambda version: str(python))

    def make(_: int) -> None:
        if kind == "of the project":
            ensure(venv, python=str(python))
        else:
            python_with_snitun(venv.parent, "0.0.1", "3.9")

    in_threads(4, make)
    assert python.with_name("python.made").read_text() == f"{venv}\n"
