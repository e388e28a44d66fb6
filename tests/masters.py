"""A session master with its relay, its clients and their devices, all as real processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import trustme

from tests.appliance import DOMAIN, Web
from tests.master.serving import Answer
from tests.support import PROJECT, WAIT_S, Program, free_port, module, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

HOST = "localhost"
# The client, which renews a token that lives for a minute after two seconds.
HASTY = """
import sys
from snitun_sync.client import cli, master
master.RENEW_FROM, master.RENEW_TO, master.LEAST_RENEWAL_S = 0.025, 0.03, 1.0
sys.exit(cli.console())
"""


@dataclass
class Account:
    """What the session master knows as a device: a client of ours."""

    hostname: str
    secret_file: Path

    @property
    def credential(self) -> str:
        """ID.SECRET."""
        return self.secret_file.read_text().strip()

    @property
    def device_id(self) -> str:
        """Its id alone."""
        return self.credential.partition(".")[0]


class Masters:
    """A session master, the relay that follows it, and their clients; all end with this."""

    def __init__(
        self, folder: Path, *, relay: str = "", is_routed: bool = False, is_hasty: bool = False
    ) -> None:
        """`relay`: what tokens name instead of this one; `is_routed`: the master is found there.

        `is_hasty`: clients renew their tokens each two seconds, instead of forty.
        """
        self.folder, self.is_routed, self._is_hasty = folder, is_routed, is_hasty
        self._relay_name = relay
        self.key_file, self.database = folder / "fernet.key", folder / "snitun.db"
        self.authority_file, self.certificate = folder / "master-ca.pem", folder / "master.pem"
        self.port, self.relay_port = free_port(), free_port()
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.authority_file))
        issued = authority.issue_cert(HOST, "master.example.com")
        write_secret(self.certificate, issued.private_key_and_cert_chain_pem.bytes().decode())
        write_secret(self.key_file, self.command("new-key"))
        self._context = ssl.create_default_context(cafile=self.authority_file)
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> Masters:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    @property
    def url(self) -> str:
        """Where clients and relays find the session master."""
        return f"https://{HOST}:{self._found_at}"

    @property
    def _found_at(self) -> int:
        return self.relay_port if self.is_routed else self.port

    # --- programs ------------------------------------------------------------------

    def master(
        self, *arguments: str | Path, before: Sequence[str] = (), is_plain: bool = False
    ) -> Program:
        """Start the session master; return it once it answers. `before` stands before it.

        `is_plain`: without TLS, which somebody else is to end.
        """
        program = self._start(
            *(*before, *module("snitun_sync.master", "serve", "--token-ttl", "60s")),
            *("--database", self.database, "--fernet-key-file", self.key_file),
            *("--listen", f"127.0.0.1:{self.port}"),
            *(() if is_plain else ("--tls-cert", self.certificate)),
            *("--relay", self._relay_name or f"127.0.0.1:{self.relay_port}"),
            *(("--proxy-protocol-from", "127.0.0.1") if self.is_routed else ()),
            *arguments,
        )
        program.wait_for("listening on")
        return program

    def relay(self, *arguments: str | Path) -> Program:
        """Start a relay that follows the session master; return it once it listens."""
        route = ("--route", f"{HOST}=127.0.0.1:{self.port},proxy-v2")
        program = self._start(
            *module("snitun_sync.server", "--fernet-key-file", self.key_file),
            *("--listen", f"127.0.0.1:{self.relay_port}", "--log-level", "debug"),
            *("--revocations", self.url, "--revocations-ca", self.authority_file),
            *("--state-dir", make_folder(self.folder / "relay")),
            *(route if self.is_routed else ()),
            *arguments,
        )
        program.wait_for(" for devices")
        return program

    def client(
        self, account: Account, endpoint: str, *arguments: str | Path, up: bool = True
    ) -> Program:
        """Start a client; return it once its tunnel is up."""
        state = make_folder(self.folder / f"client-{account.hostname}")
        hasty: list[str | Path] = [sys.executable, "-c", HASTY]
        program = self._start(
            *(hasty if self._is_hasty else module("snitun_sync.client")),
            *("--master", self.url),
            *("--master-ca", self.authority_file, "--device-secret-file", account.secret_file),
            *("--endpoint", endpoint, "--state-dir", state, "--log-level", "debug", *arguments),
        )
        if up:
            program.wait_for("ready: ")
        return program

    def _start(self, *command: str | Path) -> Program:
        return self._ending.enter_context(Program(*command))

    # --- commands --------------------------------------------------------------------

    def command(self, *arguments: str | Path) -> str:
        """Let `snitun-master` do something; return what it prints on standard output."""
        done = run_master(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def device(self, *arguments: str | Path) -> str:
        """The same for `snitun-master device …`."""
        return self.command("device", *arguments, "--database", self.database)

    def add(self, hostname: str = f"home.{DOMAIN}", *arguments: str) -> Account:
        """Add a device; its secret is in a file then."""
        file = self.folder / f"{hostname}.secret"
        write_secret(file, self.device("add", hostname, *arguments))
        return Account(hostname, file)

    def rotate(self, account: Account) -> None:
        """Give a device another secret; the file has it then."""
        write_secret(account.secret_file, self.device("rotate", account.device_id))

    # --- requests --------------------------------------------------------------------

    def connect(self, timeout_s: float = 2 * WAIT_S) -> http.client.HTTPSConnection:
        """Return a connection to the session master."""
        return http.client.HTTPSConnection(
            HOST, self._found_at, timeout=timeout_s, context=self._context
        )

    def ask(
        self, path: str, credential: str = "", fields: Any = None, headers: Any = None
    ) -> Answer:
        """Ask the session master; with `fields`, by POST."""
        connection = self.connect()
        with contextlib.closing(connection):
            return ask(connection, path, credential, fields, headers)

    def token(self, credential: str) -> Answer:
        """Ask for a token."""
        return self.ask("/v1/token", credential, new_keys())


def ask(
    connection: http.client.HTTPConnection,
    path: str,
    credential: str = "",
    fields: Any = None,
    headers: Any = None,
) -> Answer:
    """Ask on a connection that may stay open."""
    body = None if fields is None else json.dumps(fields)
    sent = {"Content-Type": "application/json", **(headers or {})}
    if credential:
        sent["Authorization"] = f"Bearer {credential}"
    connection.request("GET" if body is None else "POST", path, body, sent)
    return Answer(connection.getresponse())


def new_keys() -> dict[str, str]:
    """Return what a client chooses for its token."""
    return {"aes_key": os.urandom(32).hex(), "aes_iv": os.urandom(16).hex()}


def run_master(
    *arguments: str | Path, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a command of `snitun-master` to its end; `before` stands before it."""
    return subprocess.run(
        [*before, *map(str, module("snitun_sync.master", *arguments))],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=4 * WAIT_S,
    )


def make_folder(path: Path) -> Path:
    """Return the folder, made where there is none."""
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def write_secret(path: Path, text: str) -> None:
    """Write a file that nobody else can read, as a whole: who reads it meanwhile sees no half."""
    half = path.with_name(path.name + ".new")
    half.touch(0o600)
    half.write_text(text)
    half.rename(path)


# --- devices under load --------------------------------------------------------------------

LONG_BYTES_PER_S = 4_000_000


@dataclass
class Load:
    """Requests at a steady rate through the relay, half of them on connections that stay; and
    beside them long ones, one after the other: `/file/long`, LONG_BYTES_PER_S."""

    hostname: str
    port: int
    authority: Path
    requests: int = 0
    repeated: int = 0
    """On a connection that had been used before, and was closed without a byte of an answer:
    browsers and curl ask once more on a new one, and nobody notices."""
    failed: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    long: int = 0
    cut: list[str] = field(default_factory=list)
    """What became of long ones that didn't come to their end."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def begin(self, rate: float = 50.0, devices: int = 10) -> Load:
        """Begin, on threads of their own."""

        jobs: list[Callable[[], None]] = [self._use_long]
        for number in range(devices):
            jobs.append(partial(self._use, devices / rate, is_lasting=bool(number % 2)))
        for job in jobs:
            self._threads.append(threading.Thread(target=job, daemon=True))
            self._threads[-1].start()
        return self

    def go_on(self, count: int = 50) -> None:
        """Wait until so many more requests were answered, or failed."""
        wanted = self.requests + len(self.failed) + count
        wait_until(lambda: self.requests + len(self.failed) >= wanted, "requests go on")

    def end(self) -> Load:
        """Stop; all of them have their answer then."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(2 * WAIT_S)
            assert not thread.is_alive()
        return self

    def _use(self, period_s: float, *, is_lasting: bool) -> None:
        next_at = time.monotonic()
        with Web(self.hostname, self.port, self.authority) as device:
            while not self._is_over.wait(max(0.0, next_at - time.monotonic())):
                # Not faster later on, where it was too slow for a while.
                next_at = max(next_at + period_s, time.monotonic() - 1)
                begin = time.monotonic()
                try:
                    self._request(device)
                except OSError as error:
                    with self._lock:
                        self.failed.append(f"{time.strftime('%H:%M:%S')} {error!r}")
                    device.close()
                else:
                    with self._lock:
                        self.requests += 1
                        self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
                if not is_lasting:
                    device.close()

    def _use_long(self) -> None:
        while not self._is_over.is_set():
            try:
                with Web(self.hostname, self.port, self.authority) as device:
                    device.request("GET", "/file/long")
                    answer = device.getresponse()
                    size, got, begin = int(answer.headers["Content-Length"]), 0, time.monotonic()
                    while piece := answer.read(65536):
                        got += len(piece)
                        time.sleep(max(0.0, begin + got / LONG_BYTES_PER_S - time.monotonic()))
                if got < size:
                    raise EOFError(f"{size - got} bytes are missing")
                self.long += 1
            except (OSError, EOFError, http.client.HTTPException) as error:
                self.cut.append(f"{time.strftime('%H:%M:%S')} {error!r}")

    def _request(self, device: Web) -> None:
        was_used = device.sock is not None
        try:
            device.seen()
        except (http.client.RemoteDisconnected, BrokenPipeError, ssl.SSLEOFError):
            if not was_used:
                raise
            with self._lock:
                self.repeated += 1
            device.close()
            device.seen()
        except http.client.HTTPException as error:
            raise OSError(repr(error)) from error
