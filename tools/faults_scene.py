"""What `tools/faults.py` measures: a tunnel on a network of its own, devices, and what it says.

    device, again and again ──▶ relay ──tunnel──▶ client ──▶ endpoint
                                                    │
    /ready, again and again ────────────────────────┘ unix socket

All of them are in the hosts of a `Network`, relay and client as whole processes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import ssl
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import trustme

from tests.network import Network, Resolver
from tests.support import HOSTNAME, Credentials, Endpoint, Program, client_hello

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PORT = 443
RELAY_NAME = "relay.example.test"
ANSWER_S = 15.0  # as the client has it, behind its keepalive
# How soon a device gives up, how long it waits then, and how many do so in turns.
DEVICE_LIMIT_S = 2.0
DEVICE_PAUSE_S = 0.5
DEVICES = 4
READY_EACH_S = 0.1
READY_LIMIT_S = 1.0
STALL_S = 30.0  # of the tests' own services
# A download that goes on: more than can come, at the rate of a home's line.
DOWNLOAD = f"SOURCE {10**12}"
DOWNLOAD_MBIT = 8
# Behind every loss that the client logs.
LOSS = "; next attempt in"


class FaultError(Exception):
    """It didn't come to what should have come; the text says to what."""


@dataclass(frozen=True)
class Pace:
    """How long things take in a run."""

    is_quick: bool = False
    minutes: float = 0.0
    """How long a fault lasts at least, where that can be chosen."""

    @property
    def keepalive_s(self) -> float:
        """The client's --keepalive."""
        return 2.0 if self.is_quick else 50.0

    @property
    def probe_s(self) -> float:
        """The client's --probe, where it has one."""
        return 2.0 if self.is_quick else 5.0

    @property
    def limit_s(self) -> float:
        """How long to wait for what should come: longer than anything should take."""
        return 120.0 if self.is_quick else 300.0

    def client_arguments(self) -> list[str]:
        """Return what the client is started with: nothing, for its defaults."""
        return ["--keepalive", "2s", "--reconnect-spread", "2s"] if self.is_quick else []


@dataclass
class Outcome:
    """What became of a fault; times in seconds, None for what didn't happen."""

    name: str
    noticed_s: float | None = None
    """From the fault until /ready doesn't say 200, or the client logs a loss."""
    back_s: float | None = None
    """From the end of the fault until a device gets through."""
    untrue_s: float = 0.0
    """The longest time for which /ready said 200 while no device got through."""
    attempts: int = 0
    """How often the client has tried to connect meanwhile."""
    reasons: list[str] = field(default_factory=list)
    """What /ready said when it wasn't 200, each once, without its numbers."""
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)
    """/status as it was: "before", "noticed" and "end"; what couldn't be asked is missing."""
    log: str = ""
    error: str = ""
    """What should have come and didn't; "" if all did."""
    took_s: float = 0.0


class Scene:
    """See the head of this file; a context manager."""

    def __init__(
        self, pace: Pace, folder: Path, say: Callable[[str], object], stop: threading.Event
    ) -> None:
        """Keep files in `folder`, `say` how far it is; wait for nothing any more after `stop`."""
        self.pace, self.folder, self.say, self._stop = pace, folder, say, stop
        self.network = Network()
        self.credentials = Credentials(folder, server=f"{self.network.relay_ip}:{PORT}")
        self.relay_ip = self.network.relay_ip
        """Where devices connect."""
        self.relay: Program | None = None
        self.client: Program | None = None
        self.resolver: Resolver | None = None
        self.began_at: float | None = None
        self.healed_at: float | None = None
        self.seen: dict[str, dict[str, Any]] = {}
        self._noticed_at: float | None = None
        self._reasons: dict[str, str] = {}
        self._ready: list[tuple[float, bool]] = []
        self._tries: list[tuple[float, float, bool]] = []
        self._log_from = 0
        self._endpoint: Endpoint | TlsEndpoint | None = None
        self._authority: trustme.CA | None = None
        self._tls: ssl.SSLContext | None = None
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> Scene:
        self._ending.enter_context(self.network)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        self._ending.close()

    # --- who is in it ----------------------------------------------------------

    def use_names(self, options: str = "") -> Resolver:
        """Let the client find the relay, and its own hostname, by DNS; the router resolves."""
        network = self.network
        names: dict[str, Sequence[str]] = {
            name: [network.relay_ip] for name in (RELAY_NAME, HOSTNAME)
        }
        self.resolver = self._ending.enter_context(Resolver(network, names))
        network.set_nameserver("client", self.resolver.address, options=options)
        self.credentials.at(f"{RELAY_NAME}:{PORT}")
        return self.resolver

    def use_tls(self) -> None:
        """Let endpoint and devices speak real TLS, with an authority that devices trust."""
        self._authority = trustme.CA()
        self._tls = ssl.create_default_context()
        self._authority.configure_trust(self._tls)

    def tls_endpoint(self, host: str, authority: trustme.CA, place: tuple[str, int]) -> TlsEndpoint:
        """Return one more endpoint that shows a certificate for HOSTNAME by `authority`."""
        made = self.network.inside(host, functools.partial(TlsEndpoint, authority, place))
        self._ending.callback(made.close)
        return made

    def start_relay(self, ip: str = "") -> None:
        """Start the relay, and wait until it listens."""
        self.relay = self.network.run(
            "relay",
            *(sys.executable, "-m", "snitun_sync.server"),
            *("--fernet-key-file", self.credentials.key_file, "--listen", f"{ip or '*'}:{PORT}"),
        )
        self.relay.wait_for("listening on")

    def start(self, *arguments: str | Path, before: tuple[str, ...] = (), up: bool = True) -> None:
        """Start all that isn't there yet: `arguments` for the client, `before` its command.

        `up`: wait until a device gets through.
        """
        if self.relay is None:
            self.start_relay()
        if self._authority is not None:
            self._endpoint = self.tls_endpoint("client", self._authority, ("127.0.0.1", 0))
        else:
            self._endpoint = self.network.inside("client", Endpoint)
            self._ending.callback(self._endpoint.close)
        self.client = self.run_client(
            "client", self.credentials, self._endpoint.address, *arguments, before=before
        )
        self._thread("client", self._watch_ready)
        for number in range(DEVICES):
            self._thread("device", functools.partial(self._be_device, number))
        if up:
            self.wait_until_through("at the start")

    def run_client(
        self,
        host: str,
        credentials: Credentials,
        endpoint: str,
        *arguments: str | Path,
        before: tuple[str, ...] = (),
    ) -> Program:
        """Start a client; the one on the host "client" answers questions."""
        admin = ["--admin", f"unix:{self._admin}"] if host == "client" else []
        return self.network.run(
            host,
            *before,
            *(sys.executable, "-m", "snitun_sync.client", *admin),
            *("--token-file", credentials.ticket_file, "--endpoint", endpoint),
            *(*self.pace.client_arguments(), *arguments),
        )

    def download(self) -> None:
        """Let a device download, without an end."""
        self.network.rate(DOWNLOAD_MBIT)
        self._thread("device", self._download)
        self.wait(lambda: self.status()["channels"]["sent_bytes"] > 2**18, "the download runs")

    def command(self, host: str, *command: str) -> None:
        """Run a command to its end. Raises FaultError."""
        program = self.network.run(host, *command)
        if program.wait():
            raise FaultError(f"{' '.join(command)}: {program.output.strip()}")

    def stop_relay(self) -> None:
        """SIGKILL: no word to anybody, but the kernel closes the connections."""
        if self.relay is not None:
            self.relay.kill()

    def _thread(self, host: str, job: Callable[[], None]) -> None:
        thread = threading.Thread(target=job, daemon=True)
        self.network.inside(host, thread.start)
        self._threads.append(thread)

    # --- the course of things --------------------------------------------------

    def begin(self) -> None:
        """The fault comes now."""
        if self.client is not None:
            self.seen["before"] = self.status()
            self._log_from = len(self.client.output)
        self.began_at = time.monotonic()

    def healed(self) -> None:
        """The fault is over, or there is a way around it."""
        self.healed_at = time.monotonic()
        self.say("healed")

    def hold(self, seconds: float) -> None:
        """Let the fault last. Raises FaultError."""
        if self._stop.wait(max(seconds, 60 * self.pace.minutes)):
            raise FaultError("interrupted")

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until `condition()` is true. Raises FaultError."""
        limit_s = self.pace.limit_s
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                raise FaultError(f"waited {limit_s:.0f} s in vain: {what}")
            if self._stop.wait(0.02):
                raise FaultError("interrupted")

    def wait_until_noticed(self) -> None:
        """Wait until the client says, in whatever way, that something is wrong."""
        self.wait(lambda: self._noticed_at is not None, "the client notices it")
        assert self._noticed_at is not None and self.began_at is not None
        self.say(f"noticed after {self._noticed_at - self.began_at:.1f} s")
        self._see("noticed")

    def wait_until_not_ready(self) -> None:
        """Wait until /ready says that no device gets through."""
        self.wait(lambda: self._ready and not self._ready[-1][1], "/ready says 503")

    def wait_for_log(self, text: str) -> None:
        """Wait until the client has logged `text` since the fault began."""
        self.wait(lambda: text in self.log, f"the client logs {text!r}")

    def wait_until_through(self, when: str) -> None:
        """Wait until a device gets through that comes from now on, and /ready says so."""
        since = time.monotonic()
        self.wait(lambda: self._first_success(since), f"a device gets through {when}")
        self.wait(lambda: self._ready and self._ready[-1][1], f"/ready says 200 {when}")

    @property
    def log(self) -> str:
        """What the client has logged since the fault began."""
        return "" if self.client is None else self.client.output[self._log_from :]

    def ask(self, path: str) -> tuple[int, str]:
        """Ask the client; return status and body. Raises OSError."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(READY_LIMIT_S)
            sock.connect(str(self._admin))
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            data = b""
            while piece := sock.recv(65536):
                data += piece
        found = re.match(rb"HTTP/1\.1 (\d+)[^\r]*\r\n.*?\r\n\r\n(.*)", data, re.DOTALL)
        if found is None:
            raise OSError(f"no answer to {path}")
        return int(found[1]), found[2].decode()

    def status(self) -> dict[str, Any]:
        """Return /status, once the client gives it."""

        def is_seen() -> bool:
            self._see("now")
            return "now" in self.seen

        self.wait(is_seen, "the client answers /status")
        return self.seen.pop("now")

    def outcome(self, name: str) -> Outcome:
        """Return what became of it, with the status at the end."""
        outcome = Outcome(name, untrue_s=self._untrue_s(), log=self.log, seen=self.seen)
        outcome.reasons = list(self._reasons.values())
        if self.began_at is None:
            return outcome
        if self._noticed_at is not None:
            outcome.noticed_s = self._noticed_at - self.began_at
        if self.healed_at is not None:
            first = self._first_success(self.healed_at)
            outcome.back_s = first - self.healed_at if first is not None else None
        self._see("end")
        before, after = (self.seen.get(when, {"attempts": 0}) for when in ("before", "end"))
        outcome.attempts = after["attempts"] - before["attempts"]
        return outcome

    def _see(self, when: str) -> None:
        """Keep /status, if there is an answer."""
        with contextlib.suppress(OSError, ValueError):
            self.seen[when] = json.loads(self.ask("/status")[1])

    def _first_success(self, since: float) -> float | None:
        """Return when the first attempt ended that began after `since` and got through."""
        ends = [end for begin, end, is_through in self._tries if is_through and begin >= since]
        return min(ends, default=None)

    def _untrue_s(self) -> float:
        """Return for how long, at most, /ready said 200 while no device got through."""
        if self.began_at is None:
            return 0.0
        said = [
            (begin, end)
            for (begin, was_ready), (end, is_ready) in zip(self._ready, self._ready[1:])
            if was_ready and is_ready
        ]
        longest = 0.0
        for failing, through in self._failing(self.began_at):
            lasted = 0.0
            previous_end = 0.0
            for begin, end in said:
                begin, end = max(begin, failing), min(end, through)
                if begin < end:
                    lasted = end - begin + (lasted if begin == previous_end else 0.0)
                    previous_end = end
                    longest = max(longest, lasted)
        return longest

    def _failing(self, since: float) -> Iterator[tuple[float, float]]:
        """Yield each time without a success: from a failed attempt's begin to a good one's."""
        failing: float | None = None
        for begin, _, is_through in sorted(self._tries):
            if begin < since:
                continue
            if is_through and failing is not None:
                yield failing, begin
                failing = None
            elif not is_through and failing is None:
                failing = begin
        if failing is not None:
            yield failing, time.monotonic()

    # --- threads ---------------------------------------------------------------

    @property
    def _admin(self) -> Path:
        return self.folder / "admin.sock"

    def _watch_ready(self) -> None:
        while not self._is_over.wait(READY_EACH_S):
            try:
                status, text = self.ask("/ready")
            except FileNotFoundError:  # it has just been started
                continue
            except OSError:
                status, text = 0, "no answer"
            now = time.monotonic()
            self._ready.append((now, status == 200))
            if self.began_at is None:
                continue
            if status != 200:
                said = text.strip().partition("not ready: ")[2] or text
                self._reasons.setdefault(re.sub(r"[0-9.]+", "", said), said)
            if self._noticed_at is None and (status != 200 or LOSS in self.log):
                self._noticed_at = now

    def _be_device(self, number: int) -> None:
        self._is_over.wait(number * DEVICE_PAUSE_S)
        while not self._is_over.wait(DEVICE_PAUSE_S):
            begin = time.monotonic()
            try:
                is_through = self._try()
            except OSError:
                is_through = False
            self._tries.append((begin, time.monotonic(), is_through))

    def _try(self) -> bool:
        """Do one exchange as a device; return whether the answer came from the endpoint."""
        ip = self.resolver.names[HOSTNAME][0] if self.resolver else self.relay_ip
        with self._connect(ip) as sock:
            if self._tls is None:
                sock.sendall(client_hello() + b"ECHO\nping")
                return _read(sock, 4) == b"ping"
            with self._tls.wrap_socket(sock, server_hostname=HOSTNAME) as secured:
                secured.sendall(b"ping")
                return _read(secured, 4) == b"ping"

    @staticmethod
    def _connect(ip: str) -> socket.socket:
        return socket.create_connection((ip, PORT), DEVICE_LIMIT_S)

    def _download(self) -> None:
        while not self._is_over.is_set():
            with contextlib.suppress(OSError), self._connect(self.relay_ip) as sock:
                sock.sendall(client_hello() + DOWNLOAD.encode() + b"\n")
                while not self._is_over.is_set() and sock.recv(65536):
                    pass
            self._is_over.wait(DEVICE_PAUSE_S)


class TlsEndpoint:
    """A service that shows a certificate, and sends back what it gets."""

    def __init__(self, authority: trustme.CA, place: tuple[str, int]) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(HOSTNAME).configure_cert(self._context)
        self._listener = socket.create_server(place, backlog=128)
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Listen no longer."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(STALL_S)
            with self._context.wrap_socket(sock, server_side=True) as secured:
                while data := secured.recv(65536):
                    secured.sendall(data)


class Portal:
    """What a network says to who hasn't logged in: HTML, to everybody who comes to its port."""

    ANSWER = (
        b"HTTP/1.1 302 Found\r\nLocation: http://portal.test/\r\nConnection: close\r\n\r\n<html>"
    )

    def __init__(self, network: Network, *, is_patient: bool) -> None:
        """`is_patient`: it waits for a whole request, which a client of the tunnel never sends."""
        self._is_patient = is_patient
        place = (network.relay_ip, PORT)
        self._listener = network.inside("relay", lambda: socket.create_server(place))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no longer."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(STALL_S)
            head = sock.recv(65536)
            while self._is_patient and b"\r\n\r\n" not in head and (piece := sock.recv(65536)):
                head += piece
            sock.sendall(self.ANSWER)


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data
