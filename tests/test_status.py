"""What the real programs say of themselves: /ready, /status, /metrics, and the command status."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from snitun_sync.status_command import table
from tests.services import refusing_port
from tests.support import (
    HOSTNAME,
    PROJECT,
    WAIT_S,
    Credentials,
    Device,
    Endpoint,
    Program,
    client,
    client_hello,
    free_port,
    module,
    relay,
    wait_until,
)

TOKEN = "a token for monitors"
PROGRAMS = ("client", "server")
# The base units of https://prometheus.io/docs/practices/naming/, as far as there are any here,
# and what a name must not have: others, the type, and what is left to the server.
BASE_UNITS = ("seconds", "bytes")
NO_UNITS = (
    *("ms", "milliseconds", "us", "microseconds", "minutes", "hours", "days", "kib", "mib"),
    *("kilobytes", "megabytes", "kb", "mb", "bits", "percent"),
)
NO_PARTS = ("gauge", "counter", "metric", "metrics", "count", "sum", "bucket")


class Pair:
    """Our relay and our client as processes, each with its admin."""

    def __init__(self, folder: Path, kind: str, *arguments: str) -> None:
        self.endpoint = Endpoint()
        self.credentials = Credentials(folder)
        self.arguments = arguments
        self._admins = {
            name: f"unix:{folder}/{name}" if kind == "unix" else "127.0.0.1:0" for name in PROGRAMS
        }
        self.programs: dict[str, Program] = {}
        self.port = 0
        self.start_relay()
        self.start_client()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.endpoint.close()
        for program in reversed(tuple(self.programs.values())):
            program.stop()

    def start_relay(self) -> None:
        """Start the relay, on the same port again where there was one."""
        admin = ("--admin", self._admins["server"], *self.arguments)
        self.programs["server"], self.port = relay(
            self.credentials, *admin, listen=f"127.0.0.1:{self.port}"
        )
        self.credentials.at(f"127.0.0.1:{self.port}")

    def start_client(self) -> None:
        """Start the client; wait until it is up."""
        admin = ("--admin", self._admins["client"], *self.arguments)
        spread = ("--reconnect-spread", "0.1s")
        self.programs["client"] = client(self.credentials, self.endpoint.address, *admin, *spread)

    def admin(self, name: str) -> str:
        """Return where the program answers, as --admin takes it."""
        line = self.programs[name].wait_for(" for --admin")
        found = re.search(r"listening on (\S+) for --admin", line)
        assert found
        return found[1]

    def curl(self, name: str, path: str, *arguments: str) -> tuple[int, str, str]:
        """Return status, content type and body."""
        return curl(self.admin(name), path, *arguments)

    def report(self, name: str) -> Any:
        """Return what /status says."""
        return json.loads(self.curl(name, "/status")[2])

    def status(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command."""
        return status(name, "--admin", self.admin(name), *arguments)

    def device(self, command: str = "ECHO") -> Device:
        """Connect a device."""
        return Device(self.port, command)


def curl(admin: str, path: str, *arguments: str) -> tuple[int, str, str]:
    """Return status, content type and body of a page, as curl gets them."""
    where = ["--unix-socket", admin[5:]] if admin.startswith("unix:") else []
    url = f"http://{'localhost' if where else admin}{path}"
    form = "\n%{http_code} %{content_type}"
    done = subprocess.run(
        ["curl", "-s", "-S", "--max-time", "60", "-w", form, *where, *arguments, url],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    body, _, said = done.stdout.rpartition("\n")
    code, _, kind = said.partition(" ")
    return int(code), kind, body


def status(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command `status` of a program to its end."""
    return subprocess.run(
        [str(part) for part in module(f"snitun_sync.{name}", "status", *arguments)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        cwd=PROJECT,
    )


@pytest.fixture(params=["tcp", "unix"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with Pair(tmp_path, request.param) as pair:
        yield pair


@pytest.fixture
def unix_pair(tmp_path: Path) -> Iterator[Pair]:
    with Pair(tmp_path, "unix") as pair:
        yield pair


# --- the pages -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_pages_by_curl(pair: Pair, name: str) -> None:
    assert pair.curl(name, "/ready") == (200, "text/plain", "ready\n")
    code, kind, body = pair.curl(name, "/status")
    assert (code, kind) == (200, "application/json")
    report = json.loads(body)
    assert report["program"] == f"snitun-{name}"
    assert (report["is_ready"], report["reason"]) == (True, None)
    code, kind, body = pair.curl(name, "/metrics")
    assert code == 200
    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert f"snitun_{name}_ready 1\n" in body
    assert pair.curl(name, "/")[0] == 404
    assert pair.curl(name, "/ready", "-X", "POST")[0] == 405


def test_a_web_page_s_own_name_is_refused(tmp_path: Path) -> None:
    """DNS rebinding: a name that leads to this machine, but isn't its own."""
    with Pair(tmp_path, "tcp") as pair:
        for name in PROGRAMS:
            port = pair.admin(name).rpartition(":")[2]
            for path in ("/ready", "/status", "/metrics"):
                code, _, body = pair.curl(name, path, "-H", f"Host: evil.example:{port}")
                assert code == 421
                assert "ready" not in body
                assert pair.curl(name, path, "-H", f"Host: localhost:{port}")[0] == 200


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "*"])
def test_other_machines_need_a_token(
    tmp_path: Path, credentials: Credentials, name: str, host: str
) -> None:
    """Said by --check already, and nothing starts."""
    secret = {"client": "--token-file", "server": "--fernet-key-file"}[name]
    path = {"client": credentials.ticket_file, "server": credentials.key_file}[name]
    admin = f"{host}:{free_port()}"
    token_file, short_file = tmp_path / "token", tmp_path / "short"
    for file, text in ((token_file, TOKEN), (short_file, "too short")):
        file.write_text(text)
        file.chmod(0o600)
    command = module(f"snitun_sync.{name}", secret, path, "--admin", admin)
    if name == "server":
        command += ["--listen", "127.0.0.1:0"]
    for more in ([], ["--check"]):
        done = run(*command, *more)
        assert done.returncode == 78
        assert f"--admin: {admin} can be reached from other machines" in done.stderr
        done = run(*command, *more, "--admin-token-file", short_file)
        assert done.returncode == 78
        assert "--admin-token-file: a text of 9 characters" in done.stderr
    assert run(*command, "--check", "--admin-token-file", token_file).returncode == 0


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=PROJECT,
    )


def test_channels_are_listed_as_devices_have_them(unix_pair: Pair) -> None:
    """Address and bytes, on both sides of the tunnel; and nothing of them once they are over."""
    pair = unix_pair
    sizes = {"127.0.0.5": 1000, "127.0.0.6": 70_000, "127.0.0.7": 300_000}
    hello = client_hello() + b"ECHO\n"
    devices = []
    try:
        for address, size in sizes.items():
            sock = socket.create_connection(
                ("127.0.0.1", pair.port), WAIT_S, source_address=(address, 0)
            )
            devices.append(sock)
            sock.sendall(hello + bytes(size))
            got = 0
            while got < size:
                got += len(sock.recv(65536))
        up = {address: len(hello) + size for address, size in sizes.items()}

        def seen(name: str) -> dict[str, tuple[int, int]]:
            listed = pair.report(name)["channels"]["list"]
            return {
                channel["device"].partition(":")[0]: (
                    channel["received_bytes"],
                    channel["sent_bytes"],
                )
                for channel in listed
            }

        wait_until(lambda: seen("client") == {a: (up[a], sizes[a]) for a in sizes})
        wait_until(lambda: seen("server") == {a: (sizes[a], up[a]) for a in sizes})
        for name in PROGRAMS:
            channels = pair.report(name)["channels"]
            assert channels["open"] == channels["opened"] == 3
            assert all(channel["held_bytes"] == 0 for channel in channels["list"])
    finally:
        for sock in devices:
            sock.close()
    for name in PROGRAMS:
        wait_until(lambda name=name: not pair.report(name)["channels"]["open"])  # type: ignore[misc]
        channels = pair.report(name)["channels"]
        total = sum(up.values()), sum(sizes.values())
        if name == "server":
            total = total[::-1]
        assert (channels["received_bytes"], channels["sent_bytes"]) == total
        assert (channels["list"], channels["opened"], channels["aborted"]) == ([], 3, 0)


# --- the metrics -----------------------------------------------------------------------------


def parsed(text: str) -> list[Any]:
    """Return the families of an exposition."""
    return list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the values by name and labels; each is there once."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in parsed(text):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def test_metrics_are_named_as_prometheus_users_expect(unix_pair: Pair) -> None:
    pair = unix_pair
    with pair.device() as device:
        device.exchange()
        pages = {name: pair.curl(name, "/metrics")[2] for name in PROGRAMS}
    for name, text in pages.items():
        assert text.endswith("# EOF\n")
        families = parsed(text)
        names = [family.name for family in families]
        assert len(names) == len(set(names)) > 10
        for family in families:
            assert re.fullmatch("[a-z][a-z0-9_]*", family.name)
            assert family.name.startswith((f"snitun_{name}_", "process_"))
            parts = family.name.split("_")
            assert not set(parts) & {*NO_UNITS, *NO_PARTS}
            assert "total" not in parts
            assert "info" not in parts
            assert family.documentation.endswith(".")
            for unit in BASE_UNITS:
                assert (parts[-1] == unit) is (family.unit == unit)
            for sample in family.samples:
                suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
                assert sample.name == family.name + suffix
                assert all(re.fullmatch("[a-z_]+", label) for label in sample.labels)
        samples(text)
        check_by_promtool(text)
    values = samples(pages["client"])
    assert values["snitun_client_channels", ()] == 1
    assert values["snitun_client_channels_opened_total", ()] == 1
    assert values["process_start_time_seconds", ()] == pytest.approx(time.time(), abs=3600)
    assert values["process_open_fds", ()] > 3
    assert values["snitun_client_channel_bytes_total", (("direction", "sent"),)] == 4
    assert values["snitun_client_round_trip_seconds", ()] > 0
    assert values["snitun_client_ticket_expiry_timestamp_seconds", ()] > time.time()
    assert samples(pages["server"])["snitun_server_tunnels", ()] == 1


def check_by_promtool(text: str) -> None:
    """Let Prometheus's own tool judge, where it is; it reads the format before OpenMetrics."""
    promtool = shutil.which("promtool")
    if promtool is None:
        return
    for kind, suffix in (("counter", "_total"), ("info", "_info")):
        for name in re.findall(f"# TYPE (\\S+) {kind}\n", text):
            text = re.sub(f"# (TYPE|HELP) {name} ", f"# \\1 {name}{suffix} ", text)
    text = text.replace("_info info\n", "_info gauge\n")
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_counters_never_fall(unix_pair: Pair) -> None:
    """Whatever ends meanwhile: channels, the tunnel, the client, the relay."""
    pair = unix_pair
    has_ended = threading.Event()
    falls: list[str] = []
    polls = dict.fromkeys(PROGRAMS, 0)

    def watch(name: str) -> None:
        last: dict[Any, float] = {}
        admin = pair.admin(name)
        while not has_ended.is_set():
            try:
                text = curl(admin, "/metrics")[2]
            except AssertionError:  # the relay is down
                last.clear()
                continue
            if "# EOF" not in text:  # it was killed while it answered
                continue
            values = samples(text)
            totals = {key: value for key, value in values.items() if key[0].endswith("_total")}
            start = values["process_start_time_seconds", ()]
            if start != last.get("start"):
                last.clear()
            falls.extend(
                f"{key}: {value} to {totals.get(key)}"
                for key, value in last.items()
                if key != "start" and totals.get(key, -1) < value
            )
            last.clear()
            last.update(totals)
            last["start"] = start
            polls[name] += 1

    def polled() -> None:
        """Wait until all that has happened was seen."""
        before = dict(polls)
        wait_until(lambda: all(polls[name] >= before[name] + 2 for name in PROGRAMS))

    watchers = [threading.Thread(target=watch, args=(name,)) for name in PROGRAMS]
    for watcher in watchers:
        watcher.start()
    try:
        for number in range(3):
            for _ in range(5):
                with pair.device() as device:
                    device.exchange(b"x" * 10_000)
            with pair.device() as cut:
                cut.exchange(b"x" * 10_000)
                polled()
                if number == 0:  # the relay ends; the client goes on
                    pair.programs["server"].kill()
                    with contextlib.suppress(ConnectionResetError):
                        assert cut.sock.recv(1) == b""
                    pair.start_relay()
                    pair.programs["client"].wait_for("ready: ", 2)
                elif number == 1:  # the client's tunnel is lost; the relay goes on
                    pair.programs["client"].kill()
                    pair.start_client()
            polled()
    finally:
        has_ended.set()
        for watcher in watchers:
            watcher.join(WAIT_S)
    assert not falls
    values = samples(pair.curl("server", "/metrics")[2])
    assert values["snitun_server_tunnels_opened_total", ()] == 2


# --- the command -------------------------------------------------------------------------------


def test_the_table(pair: Pair) -> None:
    with pair.device() as device:
        device.exchange(b"x" * 5000)
        shown = pair.status("client")
        assert (shown.returncode, shown.stderr) == (0, "")
        rows = dict(line.split(None, 1) for line in shown.stdout.splitlines() if line)
        assert rows["ready"].startswith("up since ")
        assert f"{HOSTNAME} at the relay 127.0.0.1:{pair.port} leads to" in rows["ready"]
        assert rows["relay"] == f"127.0.0.1:{pair.port}"
        assert rows["endpoint"] == pair.endpoint.address
        assert rows["channels"].startswith("1 open, 1 so far, 0 cut; ")
        assert re.search(r"round trip \d[\d.]* ms", rows["tunnel"])
        assert rows["127.0.0.1"].split()[-2:] == ["0", "B"]
        shown = pair.status("server")
        assert shown.returncode == 0
        rows = dict(line.split(None, 1) for line in shown.stdout.splitlines() if line)
        assert rows["clients"].startswith("1 connected, 1 hostnames, 1 tunnels so far")
        assert "1 channels, token valid until" in rows[HOSTNAME]
    for name in PROGRAMS:
        shown = pair.status(name, "--json")
        report = json.loads(shown.stdout)
        assert report["program"] == f"snitun-{name}"
        assert shown.returncode == 0
    # Of many clients some are shown, and the report has a limit, too.
    assert "…" not in "".join(table(report))
    report.update(hostnames=5000, clients=report["clients"] * 1000)
    assert list(table(report))[-1].split(None, 1) == ["…", "and 4950 more; --json has 1000"]


def test_the_exit_code_tells_whether_it_is_ready(unix_pair: Pair) -> None:
    pair = unix_pair
    pair.programs["server"].kill()
    pair.programs["client"].wait_for("next attempt in")
    shown = pair.status("client")
    assert shown.returncode == 1
    assert shown.stdout.startswith("NOT READY ")
    assert "\nreason        no tunnel: " in shown.stdout
    assert shown.stderr.startswith("snitun-client: not ready: no tunnel: ")
    shown = pair.status("client", "--json")
    assert (shown.returncode, json.loads(shown.stdout)["is_ready"]) == (1, False)
    code, _, body = pair.curl("client", "/ready")
    assert (code, body[:22]) == (503, "not ready: no tunnel: ")
    pair.start_relay()
    wait_until(lambda: pair.status("client").returncode == 0)
    admin = pair.admin("client")
    pair.programs["client"].stop()
    shown = status("client", "--admin", admin)
    assert (shown.returncode, shown.stdout) == (69, "")
    assert f"--admin: nobody answers at {admin}: No such file or directory" in shown.stderr


def test_who_answers_nothing_or_nonsense() -> None:
    with refusing_port() as port:
        shown = status("client", "--admin", f"127.0.0.1:{port}")
        assert shown.returncode == 69
        assert f"nobody answers at 127.0.0.1:{port}: Connection refused" in shown.stderr
    for said in (b"SSH-2.0-OpenSSH_9.2p1\r\n", b""):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]

            def answer(listener: socket.socket = listener, said: bytes = said) -> None:
                sock, _ = listener.accept()
                with sock:
                    sock.sendall(said)
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(65536):
                        pass

            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            shown = status("client", "--admin", f"127.0.0.1:{port}")
            thread.join(WAIT_S)
        assert shown.returncode == 69
        assert f"what answers at 127.0.0.1:{port} doesn't speak HTTP" in shown.stderr


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (200, b'{"is_ready": true}', "is no client or relay of snitun_sync"),
        (200, b"[1]", "is no client or relay of snitun_sync"),
        (200, b"<html>", "is no client or relay of snitun_sync"),
        (404, b"nothing here", "answers 404 Not Found: nothing here"),
    ],
)
def test_another_program(code: int, body: bytes, words: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        shown = status("client", "--admin", f"127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join(WAIT_S)
    assert shown.returncode == 69
    assert words in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_other_program_of_ours_is_told_from_it(unix_pair: Pair, name: str) -> None:
    """Its table has its own rows, whoever asks."""
    [other] = {*PROGRAMS} - {name}
    shown = status(name, "--admin", unix_pair.admin(other))
    assert shown.returncode == 0
    assert ("\nclients " in shown.stdout) is (other == "server")


def test_with_a_token(tmp_path: Path) -> None:
    """All pages need it, and the command takes it from a file."""
    files = {"right": tmp_path / "right", "wrong": tmp_path / "wrong"}
    for text, file in files.items():
        file.write_text(f"{TOKEN}, the {text} one\n")
        file.chmod(0o600)
    with Pair(tmp_path, "tcp", "--admin-token-file", str(files["right"])) as pair:
        for name in PROGRAMS:
            for path in ("/ready", "/status", "/metrics"):
                assert pair.curl(name, path)[0] == 401
                bearer = f"Authorization: Bearer {TOKEN}, the right one"
                assert pair.curl(name, path, "-H", bearer)[0] == 200
            shown = pair.status(name)
            assert (shown.returncode, shown.stdout) == (69, "")
            assert "answers 401 Unauthorized" in shown.stderr
            shown = pair.status(name, "--admin-token-file", str(files["wrong"]))
            assert shown.returncode == 69
            assert TOKEN not in shown.stderr
            assert pair.status(name, "--admin-token-file", str(files["right"])).returncode == 0
            missing = tmp_path / "missing"
            shown = pair.status(name, "--admin-token-file", str(missing))
            assert shown.returncode == 66
            assert f"--admin-token-file: can't read {missing}" in shown.stderr
        assert TOKEN not in pair.programs["client"].output + pair.programs["server"].output


def test_watched_until_ctrl_c(unix_pair: Pair) -> None:
    pair = unix_pair
    command = module("snitun_sync.client", "status", "--admin", pair.admin("client"))
    with Program(*command, "--watch") as program:
        program.wait_for("\033[H\033[2Jready ", 2)
        with pair.device() as device:
            device.exchange()
            program.wait_for("channels      1 open")
        program.process.send_signal(signal.SIGINT)
        assert program.wait() == 130
        assert "Traceback" not in program.output
    with Program(*command, "--watch", "--json") as program:
        program.wait_for('"is_ready": true', 2)
        program.process.send_signal(signal.SIGINT)
        program.wait()
        lines = program.output.splitlines()
    assert all(json.loads(line)["program"] == "snitun-client" for line in lines)
