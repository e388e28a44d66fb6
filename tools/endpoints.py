"""Every kind of endpoint with real programs, under load: tables of what came of it.

python3 tools/endpoints.py               all of it; some minutes
python3 tools/endpoints.py --quick       less of everything; a minute
python3 tools/endpoints.py --only tls    kinds, acme, tls, handlers or handshakes
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import environment
from tools.load import client_hello, exchange_for, percentile

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import Program

EXPLANATION = """\
kinds       bytes equal both ways, and the address that the service sees
acme        certificates by pebble and lego through the tunnel, 50 requests a second meanwhile
tls         TLS ended by the client, against nginx that does it beside the client
handlers    200 slow handlers at once within the program, and how the loop answers meanwhile
handshakes  500 devices that never finish their TLS handshake, and how others fare meanwhile

It needs nginx, HAProxy, curl, pebble and lego."""
TICK = os.sysconf("SC_CLK_TCK")
MB = 1_000_000
MIB = 1024 * 1024
ENDPOINT = "device.example.test"
DEVICES = 8
SLOW = 200
STALLED = 500

TERMINATOR = """
daemon off; master_process off; pid {folder}/terminator.pid; error_log stderr warn;
events {{ worker_connections 2048; }}
http {{
    access_log off;
    client_body_temp_path {folder}/nginx; proxy_temp_path {folder}/nginx;
    fastcgi_temp_path {folder}/nginx; uwsgi_temp_path {folder}/nginx; scgi_temp_path {folder}/nginx;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {folder}/appliance.pem; ssl_certificate_key {folder}/appliance.pem;
        client_max_body_size 2g;
        proxy_buffering off; proxy_request_buffering off; proxy_http_version 1.1;
        location / {{ proxy_pass http://127.0.0.1:{http}; }}
    }}
}}
"""


def say(text: str) -> None:
    """Tell on stderr how far it is."""
    print(text, file=sys.stderr, flush=True)


def table(*rows: tuple[object, ...]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *rest = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join((head, "|---" * len(rows[0]) + "|", *rest))


def cpu_s(programs: list[Program]) -> float:
    """Return how many seconds of CPU the programs have taken, of all their threads."""
    ticks = 0
    for program in programs:
        fields = Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICK


def rss_mib(programs: list[Program]) -> str:
    """Return the resident memory of each, in MiB."""
    from tests.support import rss_kib

    return " + ".join(f"{rss_kib(program.pid) / 1024:.1f}" for program in programs)


def milliseconds(times_s: list[float]) -> str:
    """Return median, 99th percentile and maximum."""
    ordered = sorted(times_s)
    shares = (percentile(ordered, share) * 1000 for share in (0.5, 0.99, 1.0))
    return " / ".join(f"{value:.1f}" for value in shares)


# --- the parts -------------------------------------------------------------------------------


def kinds(folder: Path, is_quick: bool) -> str:
    """Each kind of endpoint: what it sees, and many bytes there and back."""
    from tests.appliance import INSIDE, KINDS, site

    size = (10 if is_quick else 100) * MB
    rows: list[tuple[object, ...]] = [
        ("endpoint", "works", "the service sees", f"{size // MB} MB up", f"{size // MB} MB down")
    ]
    with site(folder) as running:
        for name in (*KINDS, *INSIDE):
            try:
                up_s, down_s = running.check(name, size)
                with running.web(name, source="127.0.0.6") as device:
                    seen = device.seen()["address"]
                ways = [f"equal, {size / MB / took_s:.0f} MB/s" for took_s in (up_s, down_s)]
                rows.append((name, "yes", seen, *ways))
            except (AssertionError, OSError) as error:
                rows.append((name, "NO", repr(error), "", ""))
            say(" ".join(map(str, rows[-1])))
    return table(*rows)


def acme(folder: Path, is_quick: bool) -> str:
    """Certificates that come and change while 50 requests a second are made."""
    from tests.acme import renewed_in_use

    renewals, devices = (1 if is_quick else 5), 10
    # As a request takes some milliseconds itself.
    outcome = renewed_in_use(folder, renewals, devices / 55, devices)
    rate = outcome.requests / outcome.took_s
    return table(
        ("certificates", "requests", "a second", "failed"),
        (outcome.certificates, outcome.requests, f"{rate:.0f}", 0),
    )


def tls(folder: Path, is_quick: bool) -> str:
    """Who ends TLS: throughput, CPU, memory."""
    from tests.appliance import appliance, find, listens
    from tests.support import Credentials, Program, client, free_port, relay, wait_until

    size = (20 if is_quick else 200) * MB
    connections = 200 if is_quick else 2000
    rows: list[tuple[object, ...]] = [
        (
            *("TLS is ended by", "down, MB/s", "CPU s/GB", "up, MB/s", "CPU s/GB"),
            *("new connections/s", "CPU ms each", "idle RSS, MiB", "RSS at the end, MiB"),
        )
    ]
    with appliance(folder) as rig:
        port = free_port()
        config = folder / "terminator.conf"
        config.write_text(TERMINATOR.format(folder=folder, port=port, http=rig.at["http"]))
        (folder / "nginx" / "file" / "big").write_bytes(bytes(size))
        upload = folder / "upload"
        upload.write_bytes(bytes(size))
        ways: dict[str, tuple[str, tuple[str, ...], bool]] = {
            "the client": (rig.address("http"), ("--tls-cert", str(rig.certificate)), False),
            "nginx beside the client": (f"127.0.0.1:{port}", (), True),
            "the service (nginx)": (rig.address("https"), (), False),
        }
        for name, (endpoint, options, has_terminator) in ways.items():
            say(f"TLS is ended by {name} …")
            (folder / name).mkdir()
            credentials = Credentials(folder / name)
            with contextlib.ExitStack() as stack:
                server, at = relay(credentials, "--log-level", "info")
                stack.enter_context(server)
                credentials.at(f"127.0.0.1:{at}")
                options = (*options, "--log-level", "info")
                measured = [stack.enter_context(client(credentials, endpoint, *options))]
                if has_terminator:
                    nginx = Program(find("nginx"), "-c", config, "-p", folder)
                    measured.append(stack.enter_context(nginx))
                    wait_until(lambda: listens(port), "nginx")
                figures: list[object] = []
                idle = rss_mib(measured)
                _curl(at, rig.authority_file, "seen")  # all of it is there
                for way in (("file/big", "--output", "/dev/null"), ("file/up", "-T", str(upload))):
                    before, begin = cpu_s(measured), time.monotonic()
                    _curl(at, rig.authority_file, *way)
                    took_s, used_s = time.monotonic() - begin, cpu_s(measured) - before
                    figures += [f"{size / MB / took_s:.0f}", f"{used_s / size * 1e9:.1f}"]
                before, begin = cpu_s(measured), time.monotonic()
                _connect(at, rig.authority_file, connections)
                took_s, used_s = time.monotonic() - begin, cpu_s(measured) - before
                figures += [f"{connections / took_s:.0f}", f"{used_s / connections * 1000:.2f}"]
                rows.append((name, *figures, idle, rss_mib(measured)))
    return table(*rows)


def _curl(port: int, authority: Path, path: str, *arguments: str) -> None:
    """Let curl open a path of the endpoint."""
    from tests.appliance import find
    from tests.support import Program

    command = (
        *(find("curl"), "--silent", "--show-error", "--fail", "--cacert", str(authority)),
        *("--resolve", f"{ENDPOINT}:{port}:127.0.0.1", *arguments),
    )
    with Program(*command, f"https://{ENDPOINT}:{port}/{path}") as program:
        assert program.wait(600) == 0, program.output


def _connect(port: int, authority: Path, count: int) -> None:
    """Open connections, with a request on each."""
    from tests.appliance import Web
    from tests.support import in_threads

    def job(number: int) -> None:
        for _ in range(count // DEVICES):
            with Web(ENDPOINT, port, authority) as device:
                device.seen()

    in_threads(DEVICES, job)


def handlers(folder: Path, is_quick: bool) -> str:
    """200 handlers that take a second each; who goes another way doesn't notice."""
    from tests.appliance import DOMAIN
    from tests.support import (
        WAIT_S,
        Credentials,
        Device,
        Program,
        module,
        process_counts,
        relay,
        wait_until,
    )

    credentials = Credentials(folder, hostname=ENDPOINT, alias=(f"slow.{DOMAIN}",))
    with contextlib.ExitStack() as stack:
        echo = stack.enter_context(
            Program(sys.executable, Path(__file__).parent / "load.py", "endpoint")
        )
        server, port = relay(credentials, "--log-level", "info")
        stack.enter_context(server)
        credentials.at(f"127.0.0.1:{port}")
        wait_until(lambda: "\n" in echo.output, "the endpoint")
        endpoint = f"127.0.0.1:{echo.output.split()[0]}"
        arguments = (credentials.ticket_file, "", folder, endpoint)
        program = stack.enter_context(Program(*module("tests.applications", *map(str, arguments))))
        program.wait_for("ready: ")
        pinging = stack.enter_context(Device(port, "ECHO", hostname=ENDPOINT)).sock
        quiet_s = 2 if is_quick else 10
        before = exchange_for(pinging, quiet_s)
        slow = [
            stack.enter_context(Device(port, "SLOW", hostname=f"slow.{DOMAIN}"))
            for _ in range(SLOW)
        ]
        begin, threads, lost, during = time.monotonic(), 0, 0, list[float]()
        waiting = list(slow)
        while waiting:
            during += exchange_for(pinging, 0.1)
            threads = max(threads, process_counts(program.pid)[1])
            waiting = [device for device in waiting if not _is_readable(device.sock)]
            assert time.monotonic() < begin + 10 * WAIT_S, f"{len(waiting)} have no answer"
        took_s = time.monotonic() - begin
        for device in slow:
            lost += device.sock.recv(100) != b"done"
        after = exchange_for(pinging, quiet_s)
    return table(
        (
            *("", "ping-pong, ms (median / p99 / max)", "exchanges"),
            *("threads of the process at most", "answered"),
        ),
        ("before", milliseconds(before), len(before), "", ""),
        (
            f"{SLOW} slow handlers, {took_s:.0f} s",
            *(milliseconds(during), len(during), threads, f"{SLOW - lost} of {SLOW}"),
        ),
        ("after", milliseconds(after), len(after), "", ""),
    )


def _is_readable(sock: socket.socket) -> bool:
    import select

    return bool(select.select([sock], [], [], 0)[0])


def handshakes(folder: Path, is_quick: bool) -> str:
    """500 TLS handshakes that never go on, again and again; others work meanwhile."""
    from tests.appliance import Web, appliance
    from tests.support import Credentials, client, relay, rss_kib

    rows: list[tuple[object, ...]] = [
        (
            "",
            "RSS of the client, MiB",
            "requests, ms (median / p99 / max)",
            "failed",
            "cut after, s",
        )
    ]
    hello = client_hello(ENDPOINT)
    credentials = Credentials(folder)
    with contextlib.ExitStack() as stack:
        rig = stack.enter_context(appliance(folder))
        server, port = relay(credentials, "--log-level", "info")
        stack.enter_context(server)
        credentials.at(f"127.0.0.1:{port}")
        options = ("--tls-cert", str(rig.certificate), "--log-level", "info")
        peer = stack.enter_context(client(credentials, rig.address("http"), *options))
        device = stack.enter_context(Web(ENDPOINT, port, rig.authority_file))

        def request() -> float:
            begin = time.monotonic()
            device.seen()
            with Web(ENDPOINT, port, rig.authority_file) as other:
                other.seen()
            return time.monotonic() - begin

        def rss() -> str:
            return f"{rss_kib(peer.pid) / 1024:.1f}"

        quiet = [request() for _ in range(100)]
        rows.append(("before", rss(), milliseconds(quiet), 0, ""))
        for turn in range(1, 2 if is_quick else 4):
            stalled: dict[socket.socket, float] = {}
            for _ in range(STALLED):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                sock.sendall(hello)
                sock.setblocking(False)
                stalled[sock] = time.monotonic()
            took, cut, most = [], [], 0
            while stalled:
                took.append(request())
                most = max(most, rss_kib(peer.pid))
                for sock in [sock for sock in stalled if _is_over(sock)]:
                    cut.append(time.monotonic() - stalled.pop(sock))
            name = f"{STALLED} stalled handshakes, turn {turn}"
            after = f"{min(cut):.1f} to {max(cut):.1f}"
            rows.append((name, f"{most / 1024:.1f}", milliseconds(took), 0, after))
            say(" ".join(map(str, rows[-1])))
        rows.append(("after", rss(), milliseconds([request() for _ in range(100)]), 0, ""))
    return table(*rows)


def _is_over(sock: socket.socket) -> bool:
    """Read what there is; tell whether the other side has ended."""
    try:
        while sock.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


PARTS: dict[str, Callable[[Path, bool], str]] = {
    part.__name__: part for part in (kinds, acme, tls, handlers, handshakes)
}


def run_parts(
    description: str, explanation: str, parts: dict[str, Callable[[Path, bool], str]]
) -> int:
    """Run what the arguments ask for, each part in a folder of its own; return the exit code."""
    command_line = argparse.ArgumentParser(
        description=description,
        epilog=explanation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_argument("--quick", action="store_true", help="less of everything")
    command_line.add_argument("--only", choices=parts, help="a part of it")
    options = command_line.parse_args()
    environment.enter("requirements.txt", "tests/requirements.txt", "tests/requirements-all.txt")
    for name in [name for name in os.environ if name.startswith("SNITUN_")]:
        del os.environ[name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    exit_code = 0
    for name, part in parts.items():
        if options.only in (None, name):
            say(f"{name} …")
            with tempfile.TemporaryDirectory(prefix="snitun-") as folder:
                try:
                    print(f"{name}\n\n{part(Path(folder), options.quick)}\n", flush=True)
                except (AssertionError, OSError) as error:
                    print(f"{name}: FAILED: {error}\n", flush=True)
                    exit_code = 1
    return exit_code


def main() -> int:
    """Run what the arguments ask for; return the exit code."""
    description = "Every kind of endpoint with real programs, and tables of what came of it."
    return run_parts(description, EXPLANATION, PARTS)


if __name__ == "__main__":
    sys.exit(main())
