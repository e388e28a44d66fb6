"""docs/openapi.json against `snitun-master serve` as it runs: nothing undocumented, no 500."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.master.serving import Serving
from tests.support import PROJECT

DOCUMENT = PROJECT / "docs" / "openapi.json"
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")

pytestmark = pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="there is no schemathesis here")


# Who guesses has to wait a second for each answer.
@pytest.mark.parametrize(("who", "examples"), [("device", 40), ("revoked", 10), ("nobody", 3)])
def test_no_answer_is_undocumented(tmp_path: Path, who: str, examples: int) -> None:
    with Serving(tmp_path, has_tls=False) as serving:
        more = ["--max-examples", str(examples), "--request-timeout", "30", "--no-color"]
        if who != "nobody":
            more += ["--header", f"Authorization: Bearer {serving.alice.id}.{serving.alices}"]
        if who == "revoked":
            serving.store.revoke(serving.alice.id)
            more += ["--phases", "fuzzing"]
        if who != "device":
            more += ["--exclude-checks", "positive_data_acceptance"]
        url = f"http://127.0.0.1:{serving.port}"
        done = subprocess.run(
            [SCHEMATHESIS, "run", DOCUMENT, "--url", url, "--checks", "all", *more],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        assert "7 passed" in done.stdout, done.stdout
        assert "defect" not in serving.program.output
        assert serving.token().status == (403 if who == "revoked" else 200)


def test_what_the_server_itself_answers_is_documented() -> None:
    by_the_server = {"400", "408", "411", "413", "431", "500", "503"}
    for path, operations in json.loads(DOCUMENT.read_text())["paths"].items():
        for method, operation in operations.items():
            assert by_the_server <= set(operation["responses"]), (path, method)
