"""A whole tunnel on this machine: relay, client and an HTTPS service, and a request through them.

python3 tools/demo.py            runs until Ctrl-C; open the URL that it prints
python3 tools/demo.py --once     exits after the request, with 0 if it was answered
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

HOSTNAME = "localhost"  # so that a browser on this machine finds the relay by the same name
START_S = 30
_output = threading.Lock()
PAGE = """<!doctype html><title>snitun_sync</title>
<h1>It works</h1>
<p>This page came from the service behind the client, through the relay, in one TLS connection
whose key only the service has.</p>
"""


def say(who: str, text: str) -> None:
    """Print what happened at one of the hops."""
    with _output:
        print(f"{who:>9} │ {text}", flush=True)


class Program:
    """A process of the demo; what it logs is shown as its hop."""

    def __init__(self, who: str, *arguments: str) -> None:
        self.who = who
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(environment.PROJECT)},
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            text = re.sub(r"^\S+ \S+ (?:DEBUG|INFO|WARNING|ERROR) ", "", line.rstrip())
            say(self.who, text)
            with self._changed:
                self.lines.append(text)
                self._changed.notify_all()
        with self._changed:
            self.lines.append("(ended)")
            self._changed.notify_all()

    def wait_for(self, *words: str) -> str:
        """Return the first line with one of `words`; give up if the program ends before."""
        with self._changed:
            self._changed.wait_for(
                lambda: any(word in line for line in self.lines for word in (*words, "(ended)")),
                START_S,
            )
            for line in self.lines:
                if any(word in line for word in words):
                    return line
        raise SystemExit(f"the {self.who} did not come up")

    def stop(self) -> None:
        """End the program."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(certificate: str) -> None:
    """The endpoint: an HTTPS service as it may run on an appliance."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = PAGE.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            print(f"{self.requestline}, answered over {self.cipher()}", file=sys.stderr, flush=True)

        def cipher(self) -> str:
            assert isinstance(self.connection, ssl.SSLSocket)
            return str(self.connection.version())

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
            # The handshake belongs on the connection's thread, not on the one that accepts.
            with (
                contextlib.suppress(OSError),
                context.wrap_socket(request, server_side=True) as tls,
            ):
                super().finish_request(tls, client_address)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server(("127.0.0.1", 0), Handler)
    print(f"listening on 127.0.0.1:{server.server_address[1]}", file=sys.stderr, flush=True)
    server.serve_forever()


def request(port: int, authority: str) -> str:
    """The device: make a verified HTTPS request to the relay's port; return the answer's status."""
    context = ssl.create_default_context(cafile=authority)
    begin = time.perf_counter()
    connection = http.client.HTTPSConnection(HOSTNAME, port, context=context, timeout=30)
    connection.connect()
    assert isinstance(connection.sock, ssl.SSLSocket)
    version = connection.sock.version()
    say("device", f"{version} with {HOSTNAME}:{port}: the certificate is the service's own")
    connection.request("GET", "/")
    answer = connection.getresponse()
    body = answer.read().decode()
    took_ms = (time.perf_counter() - begin) * 1000
    connection.close()
    say("device", f"HTTP {answer.status} {answer.reason}, {len(body)} bytes in {took_ms:.0f} ms:")
    for line in body.splitlines():
        say("", line)
    return f"{answer.status}"


@contextlib.contextmanager
def tunnel(folder: Path) -> Iterator[tuple[int, Path]]:
    """Run endpoint, relay and client; yield the relay's port and the file of the authority."""
    import trustme

    authority = trustme.CA()
    certificate, trusted = folder / "service.pem", folder / "authority.pem"
    authority.issue_cert(HOSTNAME).private_key_and_cert_chain_pem.write_to_path(str(certificate))
    authority.cert_pem.write_to_path(str(trusted))

    def master(*arguments: str, to: Path) -> None:
        command = [sys.executable, "-m", "snitun_sync.master", *arguments]
        printed = subprocess.run(command, check=True, capture_output=True, cwd=environment.PROJECT)
        with open(os.open(to, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(printed.stdout)

    key, ticket = folder / "fernet.key", folder / "ticket"
    programs: list[Program] = []

    def start(who: str, *arguments: str) -> Program:
        programs.append(Program(who, *arguments))
        return programs[-1]

    try:
        endpoint = start("endpoint", __file__, "--serve", str(certificate))
        address = endpoint.wait_for("listening on").split()[-1]
        master("new-key", to=key)
        relay = start(
            "relay",
            *("-m", "snitun_sync.server", "--listen", "127.0.0.1:0", "--log-level", "debug"),
            *("--fernet-key-file", str(key)),
        )
        found = re.search(r"127\.0\.0\.1:(\d+)", relay.wait_for("listening on"))
        assert found is not None
        port = int(found[1])
        say("master", f"a ticket for {HOSTNAME}, made with the relay's Fernet key")
        master(
            *("ticket", "--fernet-key-file", str(key), "--hostname", HOSTNAME),
            *("--server", f"127.0.0.1:{port}"),
            to=ticket,
        )
        client = start(
            "client",
            *("-m", "snitun_sync.client", "--token-file", str(ticket), "--endpoint", address),
            *("--log-level", "debug"),
        )
        client.wait_for("ready")
        yield port, trusted
    finally:
        for program in reversed(programs):
            program.stop()


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(
        description="A whole tunnel on this machine, with a real HTTPS request through it."
    )
    parser.add_argument("--once", action="store_true", help="exit after the request")
    parser.add_argument("--serve", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    environment.enter("requirements.txt", "tools/requirements.txt")
    if options.serve:
        serve(options.serve)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (
        tempfile.TemporaryDirectory(prefix="snitun-demo-") as folder,
        tunnel(Path(folder)) as (
            port,
            trusted,
        ),
    ):
        is_answered = request(port, str(trusted)) == "200"
        if not options.once:
            print(
                f"\nOpen https://{HOSTNAME}:{port}/ (the browser warns of the throw-away "
                f"certificate), or:\n  curl --cacert {trusted} https://{HOSTNAME}:{port}/\n"
                "Ctrl-C ends it.",
                flush=True,
            )
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    return 0 if is_answered else 1


if __name__ == "__main__":
    sys.exit(main())
