"""A request by a child process: what it tells, and that nothing is left of it."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snitun_sync.net import fetch as fetch_module
from snitun_sync.net.fetch import ANSWER_BYTES, Fetch
from tests.net.test_https import answering, head, saying
from tests.services import ConnectProxy, refusing_port
from tests.stub_master import StubMaster
from tests.support import PROJECT, WAIT_S, wait_until

OK = b"HTTP/1.1 200 OK\r\n"
HEADERS = {"Authorization": "Bearer id.Xq7zHidden"}


def children() -> set[str]:
    """Return the processes that are this one's, zombies as well."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        # A thread may have ended meanwhile: its children are another one's.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.update(Path(f"/proc/self/task/{task}/children").read_text("ascii").split())
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before, descriptors = children(), sorted(os.listdir("/proc/self/fd"))
    yield
    assert children() == before
    wait_until(lambda: sorted(os.listdir("/proc/self/fd")) == descriptors)


def post(url: str, **options: Any) -> dict[str, Any]:
    return Fetch(url, "--master", "/v1/token", '{"aes_key": ""}', **options).blocking_run(HEADERS)


@pytest.mark.parametrize("executable", [sys.executable, ""])
def test_a_request_by_a_child_and_within_the_process(
    executable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with StubMaster(tmp_path, "") as master, ConnectProxy() as proxy:
        master.reply = lambda _: (429, {"Retry-After": "7"}, "ä\xff".encode("latin-1"))
        master.answer = lambda fields: {}  # type: ignore[method-assign]
        answer = post(
            master.url,
            ca_file=str(master.ca_file),
            proxy=f"http://me@{proxy.address}",
            proxy_password="word",
        )
        assert answer == {"status": 429, "retry_after": "7", "body": "\ufffd\ufffd"}
        assert proxy.targets == [f"localhost:{master.port}"]
        assert proxy.logins == ["me:word"]
        assert master.requests[0]["authorization"] == "Bearer id.Xq7zHidden"
        assert master.requests[0]["line"] == "POST /v1/token"


def test_failures_are_said_in_one_line(tmp_path: Path) -> None:
    with StubMaster(tmp_path, "") as master, pytest.raises(ConnectionError, match="--master-ca"):
        post(master.url)
    with refusing_port() as port, pytest.raises(ConnectionError, match="refused"):
        post(f"http://127.0.0.1:{port}")
    with answering(saying(OK + b"\r\n" + bytes(ANSWER_BYTES + 1))) as port:
        with pytest.raises(ConnectionError, match="an answer of more than 65536 bytes"):
            post(f"http://127.0.0.1:{port}")
    # Six bytes of JSON for each.
    with answering(saying(OK + b"\r\n" + b"\1" * ANSWER_BYTES)) as port:
        assert post(f"http://127.0.0.1:{port}")["body"] == "\1" * ANSWER_BYTES


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "No such file or directory"),
        ("exit 1", "gave no answer"),
        ("head -n 1", "gave no answer"),
        ("exec >&-; exec sleep 1000", "gave no answer"),
        ("exec yes", "more than"),
        ("exec sleep 1000", "no answer within 0.5 s"),
    ],
)
def test_what_is_no_python(
    script: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "python"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(fetch_module, "LONGEST_S", 0.5 if "1000" in str(script) else 30.0)
    with pytest.raises(OSError, match=words):
        post("http://127.0.0.1:1")


def test_a_request_that_is_cancelled_and_whose_secrets_nobody_sees() -> None:
    asked, ended = threading.Event(), threading.Event()

    def serve(sock: Any) -> None:
        head(sock)
        asked.set()
        ended.wait(WAIT_S)

    errors: list[OSError] = []
    with answering(serve) as port:
        fetch = Fetch(
            f"http://127.0.0.1:{port}", "--master", "/v1/token", '{"aes_key": "c0ffee01"}'
        )

        def run() -> None:
            try:
                fetch.blocking_run(HEADERS)
            except OSError as error:
                errors.append(error)

        before, thread = children(), threading.Thread(target=run)
        thread.start()
        assert asked.wait(WAIT_S)
        (child,) = children() - before
        for name in ("cmdline", "environ"):
            shown = Path("/proc", child, name).read_bytes()
            assert b"-S" in shown or name == "environ"
            assert b"Xq7zHidden" not in shown
            assert b"c0ffee01" not in shown
        # A process group of its own: the terminal's Ctrl-C doesn't reach it.
        assert os.getpgid(int(child)) == int(child)
        fetch.cancel()
        thread.join()
        fetch.cancel()  # once more: whoever has the number now isn't ours
        ended.set()
    assert len(errors) == 1
    with pytest.raises(OSError, match="no answer"):
        fetch.blocking_run(HEADERS)


def test_the_child_of_a_client_that_was_killed() -> None:
    """It doesn't go on until its own time limit."""
    asked, left = threading.Event(), threading.Event()

    def serve(sock: Any) -> None:
        head(sock)
        asked.set()
        sock.settimeout(fetch_module.REQUEST_S / 2)
        if not sock.recv(1):
            left.set()

    code = f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from snitun_sync.net.fetch import Fetch
Fetch(sys.argv[1], "--master", "/x", "{{}}").blocking_run({{}})
"""
    with answering(serve) as port:
        command = [sys.executable, "-c", code, f"http://127.0.0.1:{port}"]
        with subprocess.Popen(command) as client:
            assert asked.wait(WAIT_S)
            client.kill()
            assert left.wait(WAIT_S)


@pytest.mark.parametrize("left", [0, 1, 2, 3, 4])
def test_descriptors_that_are_used_up(left: int) -> None:
    """What could be opened is closed again; `nothing_is_left` sees that."""
    limits, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for fd in taken[:left]:
            os.close(fd)
        del taken[:left]
        with pytest.raises(OSError, match="Too many open files" if left < 4 else "refused|many"):
            post("http://127.0.0.1:1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)


@pytest.mark.parametrize("how", ["no descriptors", "no children"])
def test_odd_surroundings(how: str) -> None:
    """Standard input and output are closed; or the program around reaps children by itself."""
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(PROJECT)!r})
from snitun_sync.net.fetch import Fetch
if {how == "no children"}:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
else:
    os.close(0)
    os.close(1)
answer = Fetch(sys.argv[1], "--master", "/x", "{{}}").blocking_run({{}})
assert not {{"ssl", "http.client", "subprocess"}} & set(sys.modules), sys.modules
os.write(2, answer["body"].encode())
"""
    with answering(saying(OK + b"\r\nfine")) as port:
        command = [sys.executable, "-c", code, f"http://127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stderr == "fine"


def test_the_child_imports_neither_the_client_nor_what_lies_around(tmp_path: Path) -> None:
    """Files beside the program, named like Python's own, aren't taken for them."""
    for name in ("ssl", "json", "http"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken')\n")
    code = f"""
import sys
sys.path.append({str(PROJECT)!r})
from snitun_sync.net.fetch import Fetch
print(Fetch(sys.argv[1], "--master", "/x", "{{}}").blocking_run({{}})["status"])
"""
    with answering(saying(OK + b"\r\n")) as port:
        command = [sys.executable, "-c", code, f"http://127.0.0.1:{port}"]
        folder = {"PYTHONPATH": ""}
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=PROJECT, env=folder
        )
        assert done.stdout == "200\n"
        command[1:1] = ["-I"]  # so that the parent itself takes none of them
        for folder in ({}, {"PYTHONPATH": str(tmp_path)}):
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=tmp_path, env=folder
            )
            assert done.stdout == "200\n"
    child = "import sys; import snitun_sync.net.fetch, snitun_sync.net.https; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, check=True, cwd=PROJECT
    )
    assert "snitun_sync.client" not in done.stdout.split()
