"""The real programs and their signals, while devices come and go; and what of them is secret."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snitun_sync.client.settings import Settings
from tests.interop.peers import NEWEST, published_relay
from tests.services import ConnectProxy, Services
from tests.support import (
    HOSTNAME,
    PROJECT,
    WAIT_S,
    Credentials,
    Device,
    Endpoint,
    Program,
    client,
    free_port,
    module,
    pattern,
    relay,
    wait_until,
)

RATE = 50  # requests a second
THREADS = 10
STAY = "; the former settings stay"


class Load:
    """Devices that come all the time, each with one exchange; how each of them ended."""

    def __init__(self, port: int) -> None:
        self.requests: list[tuple[float, str]] = []
        """When each began, by the monotonic clock, and why it failed, "" if it didn't."""
        self._port, self._has_ended = port, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(THREADS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        for thread in self._threads:
            thread.join(2 * WAIT_S)
            assert not thread.is_alive()

    def _run(self, number: int) -> None:
        interval_s = THREADS / RATE
        next_at = time.monotonic() + interval_s * number / THREADS
        while not self._has_ended.wait(max(0.0, next_at - time.monotonic())):
            begun_at, failure = time.monotonic(), ""
            try:
                self._request()
            except (OSError, AssertionError) as error:
                failure = str(error) or repr(error)
            self.requests.append((begun_at, failure))
            next_at = max(next_at + interval_s, begun_at)

    def _request(self) -> None:
        """Connect, ClientHello, exchange, end."""
        with Device(self._port, "ECHO") as device:
            device.exchange(pattern(0, 3000))
            device.sock.shutdown(1)
            assert device.sock.recv(1) == b"", "more than was sent came back"

    def wait_for_more(self, count: int = RATE) -> None:
        """Wait until so many more have ended."""
        wanted = len(self.requests) + count
        wait_until(lambda: len(self.requests) >= wanted, "requests end")

    def failures(self, until: float = float("inf")) -> list[str]:
        """Return why those failed that began before `until`; there were some."""
        before = [failure for begun_at, failure in self.requests if begun_at < until]
        assert before
        return [failure for failure in before if failure]


@contextlib.contextmanager
def running(
    credentials: Credentials, endpoint: Endpoint, *arguments: str
) -> Iterator[tuple[Program, Program, int]]:
    """Run our relay and our client, both with these arguments; yield them and the port."""
    server, port = relay(credentials, *arguments)
    with server:
        credentials.at(f"127.0.0.1:{port}")
        with client(credentials, endpoint.address, *arguments) as peer:
            yield server, peer, port


def replace_ticket(credentials: Credentials, folder: Path, **options: object) -> Credentials:
    """Put another ticket for the same relay where the first one is; return what it is."""
    folder.mkdir()
    options.setdefault("fernet_key", credentials.fernet_key)
    following = Credentials(folder, server=credentials.ticket.server, **options)  # type: ignore[arg-type]
    os.replace(following.ticket_file, credentials.ticket_file)
    return following


# --- SIGHUP: another ticket ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "cipher"), [(2, "aes-cbc"), (0, "aes-cbc"), (1, "aes-gcm"), (2, "aes-gcm-siv")]
)
def test_a_new_ticket_costs_no_request(
    tmp_path: Path, credentials: Credentials, endpoint: Endpoint, version: int, cipher: str
) -> None:
    with running(credentials, endpoint) as (server, peer, port), Load(port) as load:
        with Device(port, "ECHO") as device:
            device.exchange()
            replace_ticket(credentials, tmp_path / "next", version=version, cipher=cipher)
            peer.process.send_signal(signal.SIGHUP)
            ready = peer.wait_for("ready: ", 2)
            assert f"(version {version}, {cipher}, " in ready
            # It began in the old tunnel, and goes on there: that one waits for it.
            device.exchange(pattern(0, 100_000))
            assert "the former tunnel ended" not in peer.output
        peer.wait_for("the former tunnel ended after")
        load.wait_for_more(2 * RATE)
        assert load.failures() == []
        assert server.output.count("tunnel up") == 2
        # It is no loss, and nothing was tried again.
        assert "next attempt in" not in peer.output
    assert "Traceback" not in peer.output + server.output


def test_a_new_ticket_at_a_published_relay(
    tmp_path: Path, credentials: Credentials, endpoint: Endpoint
) -> None:
    """It cuts the old tunnel as soon as the new one comes: that is no loss to recover from."""
    theirs, port = published_relay(NEWEST, credentials)
    with theirs, client(credentials, endpoint.address) as peer:
        wait_until(lambda: gets_through(port), "the relay knows the name")
        replace_ticket(credentials, tmp_path / "next", version=1)
        peer.process.send_signal(signal.SIGHUP)
        assert "(version 1, aes-cbc, " in peer.wait_for("ready: ", 2)
        wait_until(lambda: gets_through(port), "devices come through the new tunnel")
        assert peer.output.count("connecting to the relay") == 2
        assert "next attempt in" not in peer.output
        peer.process.send_signal(signal.SIGUSR1)
        assert "attempts      2; failed: none" in peer.wait_for("attempts      ")
        assert "WARNING" not in peer.output


def gets_through(port: int) -> bool:
    """Tell whether a device gets through to the endpoint."""
    try:
        with Device(port, "ECHO") as device:
            device.exchange()
    except (OSError, AssertionError):
        return False
    return True


# --- SIGTERM, SIGINT: the end -------------------------------------------------------------------


@pytest.mark.parametrize("which", ["client", "relay"])
def test_the_end_costs_no_request_that_began_before(
    credentials: Credentials, endpoint: Endpoint, which: str
) -> None:
    with running(credentials, endpoint, "--grace", "10s") as (server, peer, port):
        program = peer if which == "client" else server
        with Load(port) as load:
            with Device(port, "ECHO") as device:
                device.exchange()
                ended_at = time.monotonic()
                program.process.terminate()
                program.wait_for("stopping: ")
                device.exchange(pattern(0, 100_000))
                device.sock.shutdown(1)
                assert device.sock.recv(1) == b""
            assert program.wait() == 0
            load.wait_for_more()
        assert load.failures(ended_at) == []
        assert load.failures() != []
        if which == "relay":
            peer.wait_for("the relay is stopping; next attempt in")
    assert "Traceback" not in peer.output + server.output


@pytest.mark.parametrize("which", ["client", "relay"])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(
    credentials: Credentials, endpoint: Endpoint, which: str, second: signal.Signals
) -> None:
    with running(credentials, endpoint, "--grace", "1h") as (server, peer, port):
        program = peer if which == "client" else server
        with Device(port, "ECHO") as device:
            device.exchange()
            program.process.send_signal(signal.SIGINT)
            program.wait_for("stopping: 1 channels have 3600 s to end")
            device.exchange()
            assert program.process.poll() is None
            program.process.send_signal(second)
            assert program.wait() == 0
            with contextlib.suppress(ConnectionResetError):
                assert device.sock.recv(1) == b""


def test_without_channels_nothing_is_waited_for(
    credentials: Credentials, endpoint: Endpoint
) -> None:
    with running(credentials, endpoint, "--grace", "1h") as (server, peer, _):
        assert peer.stop() == 0
        assert server.stop() == 0


# --- SIGHUP: what is wrong, and what is right ----------------------------------------------------


def test_what_is_broken_is_said_in_one_line_and_all_goes_on(
    tmp_path: Path, credentials: Credentials, endpoint: Endpoint
) -> None:
    config, line = tmp_path / "snitun.ini", credentials.ticket.to_line()
    config.write_text("[client]\nmax-channels = 100\n")
    with running(credentials, endpoint, "--config", str(config)) as (server, peer, port):
        good, good_key = credentials.ticket_file.read_text(), credentials.key_file.read_text()
        cases = (
            (credentials.ticket_file, line[:-30], f"--token-file: {credentials.ticket_file}: the"),
            (credentials.ticket_file, "", f"--token-file: {credentials.ticket_file}: "),
            (credentials.ticket_file, None, f"--token-file: can't read {credentials.ticket_file}"),
            (config, "[client]\nmax-chanels = 5\n", f"{config}: [client] max-chanels: no such"),
            (config, "[client]\nmax-channels = 0\n", f"{config}: [client] max-channels: 0 channel"),
            (config, "[client]\nmax-channels = x\n", f"{config}: [client] max-channels: "),
            (config, "[client\n", f"{config}: line 1: expected "),
            (config, None, f"--config: can't read {config}: No such file"),
        )
        with Device(port, "ECHO") as device:
            for number, (file, text, said) in enumerate(cases, 1):
                former = file.read_text()
                if text is None:
                    file.unlink()
                else:
                    file.write_text(text)
                peer.process.send_signal(signal.SIGHUP)
                shown = peer.wait_for(STAY, number)
                assert f"ERROR {said}" in shown
                assert line[20:60] not in shown
                file.write_text(former)
                file.chmod(0o600)
                device.exchange()
                assert gets_through(port)
            for number, (text, said) in enumerate(
                (
                    ("no key", f"--fernet-key-file: {credentials.key_file}: "),
                    ("", f"--fernet-key-file: {credentials.key_file}: "),
                ),
                1,
            ):
                credentials.key_file.write_text(text)
                server.process.send_signal(signal.SIGHUP)
                assert f"ERROR {said}" in server.wait_for(STAY, number)
                device.exchange()
                assert gets_through(port)
            credentials.key_file.write_text(good_key)
            for program in (peer, server):
                program.process.send_signal(signal.SIGHUP)
                program.wait_for("the settings were read again")
            device.exchange()
        assert credentials.ticket_file.read_text() == good
        assert peer.output.count("ready: ") == 1
        assert server.output.count("tunnel up") == 1
        assert peer.output.count("ERROR") == len(cases)
        assert "Traceback" not in peer.output + server.output


def test_other_settings_count_at_once(
    tmp_path: Path, credentials: Credentials, endpoint: Endpoint
) -> None:
    """Endpoint, limits, level of the log and grace time; what is open stays where it is."""
    config, other = tmp_path / "snitun.ini", Endpoint()

    def configure(address: str, *lines: str) -> None:
        text = "\n".join(
            ["[client]", f"token-file = {credentials.ticket_file}", f"endpoint = {address}", *lines]
        )
        config.write_text(text)

    server, port = relay(credentials)
    credentials.at(f"127.0.0.1:{port}")
    configure(endpoint.address, "grace = 1h")
    command = module("snitun_sync.client", "--config", config)
    with server, contextlib.closing(other), Program(*command) as peer:
        peer.wait_for("ready: ")
        with Device(port, "ECHO") as device:
            device.exchange()
            assert gets_through(port)
            assert " DEBUG " not in peer.output
            configure(other.address, "max-channels = 1", "log-level = debug", "grace = 0")
            peer.process.send_signal(signal.SIGHUP)
            peer.wait_for("the settings were read again")
            with Device(port, "ECHO") as late:
                assert late.sock.recv(1) == b""
            peer.wait_for("refused 1 channels: --max-channels 1 is reached")
            device.exchange()
            configure(other.address, "log-level = debug", "grace = 0")
            peer.process.send_signal(signal.SIGHUP)
            peer.wait_for("the settings were read again", 2)
            before = endpoint.accepted
            assert gets_through(port)
            assert (endpoint.accepted, other.accepted) == (before, 1)
            peer.wait_for(" DEBUG ")
            device.exchange()
            # No grace any more.
            peer.process.terminate()
            assert peer.wait() == 0
            assert device.sock.recv(1) == b""
        assert peer.output.count("ready: ") == 1


@pytest.mark.parametrize("section", ["client", "server", "master"])
def test_what_takes_a_restart_is_said(
    tmp_path: Path, credentials: Credentials, section: str
) -> None:
    config = tmp_path / "snitun.ini"
    credentials.at(f"127.0.0.1:{free_port()}")
    keys, listen = f"fernet-key-file = {credentials.key_file}", f"listen = 127.0.0.1:{free_port()}"
    given = {
        "client": [f"token-file = {credentials.ticket_file}"],
        "server": [keys, listen],
        "master": [keys, listen, f"database = {tmp_path / 'snitun.db'}", "relay = relay.test"],
    }[section]

    def configure(*lines: str) -> None:
        config.write_text("\n".join((f"[{section}]", *given, *lines)))

    configure()
    command = module(f"snitun_sync.{section}", *["serve"] * (section == "master"))
    with Program(*command, "--config", str(config)) as program:
        program.wait_for("next attempt" if section == "client" else "listening on")
        for number in (1, 2):  # as long as it is so
            configure("log-format = json", "log-level = debug", "crypto = cryptography")
            program.process.send_signal(signal.SIGHUP)
            program.wait_for("the settings were read again", number)
        configure("log-level = debug", "log-format = text")
        program.process.send_signal(signal.SIGHUP)
        program.wait_for("the settings were read again", 3)
    said = re.findall(r"\] (\S+) has changed: that takes a restart\n", program.output)
    assert said == ["crypto", "log-format"] * 2
    assert "defect" not in program.output


def test_settings_count_as_soon_as_that_is_said(tmp_path: Path) -> None:
    """A reload is on the loop's thread: nothing else happens between it and its line in the log."""
    with Services(tmp_path) as services:
        client, server = services.client, services.server
        settings = Settings(services.credentials.ticket, "127.0.0.1:1")
        results: list[bool] = []

        def reload() -> None:
            client.reconfigure(settings)
            results.append(client.settings is settings)

        def reload_server() -> None:
            server.reconfigure([services.credentials.fernet_key], channel_idle_s=77)
            results.append(server.channel_idle_s == 77)

        client.loop.call_soon_threadsafe(reload)
        server.loop.call_soon_threadsafe(reload_server)
        wait_until(lambda: len(results) == 2)
        assert results == [True, True]


def test_the_relay_takes_a_new_key_while_tunnels_stay(
    tmp_path: Path, credentials: Credentials, endpoint: Endpoint
) -> None:
    with running(credentials, endpoint) as (server, peer, port), Device(port, "ECHO") as device:
        device.exchange()
        (tmp_path / "next").mkdir()
        name = "other.example.test"
        following = Credentials(tmp_path / "next", server=f"127.0.0.1:{port}", hostname=name)
        with client(following, endpoint.address, "--once", up=False) as refused:
            assert refused.wait() == 77
        with credentials.key_file.open("r+") as file:
            keys = f"# the newest first\n{following.fernet_key}\n{file.read()}\n"
            file.seek(0)
            file.write(keys)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("the settings were read again")
        with client(following, endpoint.address):
            with Device(port, "ECHO", hostname=name) as other:
                other.exchange()
        device.exchange()
        # The former key holds as well, until its line is gone; tunnels stay even then.
        replace_ticket(credentials, tmp_path / "renewed")
        peer.process.send_signal(signal.SIGHUP)
        peer.wait_for("ready: ", 2)
        device.exchange()
        credentials.key_file.write_text(following.fernet_key)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("the settings were read again", 2)
        assert gets_through(port)


# --- SIGUSR1 ----------------------------------------------------------------------------------


def test_the_table_in_the_log(credentials: Credentials, endpoint: Endpoint) -> None:
    with running(credentials, endpoint) as (server, peer, port), Device(port, "ECHO") as device:
        device.exchange()
        for program in (server, peer):
            program.process.send_signal(signal.SIGUSR1)
            program.wait_for("INFO channels      1 open, 1 so far, 0 cut")
            program.wait_for("INFO memory        ")
            program.wait_for("INFO 127.0.0.1")
        peer.wait_for("INFO ready         up since ")
        server.wait_for(f"INFO {HOSTNAME}")


# --- secrets ------------------------------------------------------------------------------------


def pieces_of(*secrets: str | bytes) -> set[str]:
    """Return what one would know the secrets by, in hex and base64 where they are bytes."""
    texts: list[str] = []
    for secret in secrets:
        if isinstance(secret, str):
            texts.append(secret)
            continue
        texts += [secret.hex(), base64.b64encode(secret).decode()]
        texts += [base64.urlsafe_b64encode(secret).decode(), repr(secret)[2:-1]]
    return {text[at : at + 12] for text in texts for at in range(0, len(text) - 11, 12)}


def test_secrets_stay_secret(tmp_path: Path, endpoint: Endpoint) -> None:
    """Whoever looks from outside: ps, /proc, logs, pages, commands, errors."""
    credentials = Credentials(tmp_path)
    password, admin_token = "correct-horse-battery", "staple-of-the-admin"
    token_file, config = tmp_path / "admin-token", tmp_path / "snitun.ini"
    token_file.write_text(admin_token)
    token_file.chmod(0o600)
    seen: dict[str, str] = {}

    def run(
        name: str, *command: str | Path, code: int = 0, env: dict[str, str] | None = None
    ) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=PROJECT,
            env={**os.environ, **(env or {})},
        )
        assert done.returncode == code, done.stderr
        seen[name] = done.stdout + done.stderr
        return seen[name]

    server, port = relay(
        credentials, "--admin", "127.0.0.1:0", "--admin-token-file", str(token_file)
    )
    with server, ConnectProxy() as proxy:
        credentials.at(f"127.0.0.1:{port}")
        line = credentials.ticket.to_line()
        url = f"http://appliance:{password}@{proxy.address}"
        admin = ("--admin", "127.0.0.1:0", "--admin-token-file", token_file)
        more = ("--endpoint", endpoint.address, "--log-level", "debug", *admin)
        by_line = [*module("snitun_sync.client", "--token", line, "--proxy", url), *more]
        by_environment = [*module("snitun_sync.client"), *more]
        env = {"SNITUN_TOKEN": credentials.ticket.to_json(), "SNITUN_PROXY": url}
        config.write_text(f"[client]\ntoken = {line}\nproxy = {url}\n")
        config.chmod(0o600)
        by_file = [*module("snitun_sync.client", "--config", config), *more]
        ways: list[tuple[list[str | Path], dict[str, str]]] = [
            *((by_line, {}), (by_environment, env), (by_file, {}))
        ]
        for number, (command, variables) in enumerate(ways):
            with Program(*command, env=variables) as peer:
                peer.wait_for("ready: ")
                with Device(port, "ECHO") as device:
                    device.exchange()
                    look(seen, f"client {number}", peer, admin_token)
                look(seen, f"relay {number}", server, admin_token)
                status = ("status", *where(peer), "--admin-token-file", token_file)
                run(f"status {number}", *module("snitun_sync.client", *status))
                run(f"JSON {number}", *module("snitun_sync.client", *status, "--json"))
                # A broken configuration, a proxy that refuses, a relay without that key.
                config.write_text(f"[client]\ntoken {line}\nproxy = {url}\n")
                peer.process.send_signal(signal.SIGHUP)
                peer.wait_for(STAY if command is by_file else "read again")
                config.write_text(f"[client]\ntoken = {line}\nproxy = {url}\n")
            seen[f"log {number}"] = peer.output
            run(f"check {number}", *command, "--check", env=variables)
        assert proxy.logins.count(f"appliance:{password}") == len(ways)
        ticket = ("show-ticket", "--token", line)
        run("show-ticket", *module("snitun_sync.client", *ticket))
        run("show-ticket, JSON", *module("snitun_sync.client", *ticket, "--json"))
        errors: list[tuple[list[str | Path], int]] = [
            (["--token", line[:-8]], 78),
            (["--token", line, "--proxy", url.replace("http", "ftp")], 64),
            (["--token", line, "--proxy", f"{url}/x"], 64),
            (["--token", line, "--prxy", url], 64),
            (["--tokn", line], 64),
            (["--token-file", line], 66),
            (["--token", line, "--endpoint", line], 64),
            (["--token", line, "--admin", credentials.token], 64),
            (["--token", credentials.token, "--server", "x"], 64),
            (["--config", token_file], 78),
        ]
        for number, (arguments, code) in enumerate(errors):
            run(f"error {number}", *module("snitun_sync.client", *arguments), code=code)
        proxy.is_refusing = True
        run("refused by the proxy", *by_line, "--once", code=69)
        seen["relay"] = server.output
    payload = credentials.payload
    secrets = pieces_of(
        *(credentials.token, credentials.fernet_key, password, admin_token, line[10:]),
        *(payload.aes_key, payload.aes_iv, f"appliance:{password}".encode()),
    )
    assert len(secrets) > 50
    found = [(name, piece) for name, text in seen.items() for piece in secrets if piece in text]
    assert not found
    # What was searched is what was meant to be.
    assert all(text for name, text in seen.items() if not name.endswith("environ"))
    assert f"proxy = [secret]   ({config}: [client] proxy)" in seen["check 2"]


def where(program: Program) -> tuple[str, str]:
    """Return the option that leads to the program's admin."""
    found = re.search(r"listening on (\S+) for --admin", program.wait_for(" for --admin"))
    assert found
    return "--admin", found[1]


def look(seen: dict[str, str], name: str, program: Program, admin_token: str) -> None:
    """Look at a process as others see it, and at all that it answers."""
    folder = Path(f"/proc/{program.pid}")
    for file in ("cmdline", "environ"):
        seen[f"{name} {file}"] = (folder / file).read_bytes().decode(errors="replace")
    ps = subprocess.run(
        ["ps", "eww", "-p", str(program.pid)], capture_output=True, text=True, check=True
    )
    seen[f"{name} ps"] = ps.stdout
    for path in ("/ready", "/status", "/metrics"):
        done = subprocess.run(
            [
                *("curl", "-s", "-S", "--max-time", "60"),
                *("-H", f"Authorization: Bearer {admin_token}"),
                f"http://{where(program)[1]}{path}",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        seen[f"{name} {path}"] = done.stdout
    assert json.loads(seen[f"{name} /status"])["is_ready"]
    count = program.output.count("INFO memory ")
    program.process.send_signal(signal.SIGUSR1)
    program.wait_for("INFO memory ", count + 1)
