"""The three programs as processes: help, errors in one line, exit codes, secrets, signals."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snitun_sync import __version__, logs
from snitun_sync.logs import WARNINGS_PER_PERIOD, LogFilter, masked
from snitun_sync.protocol.ticket import Ticket
from tests.services import RawRelay, refusing_port
from tests.support import (
    HOSTNAME,
    PROJECT,
    Credentials,
    Device,
    Endpoint,
    Program,
    client,
    module,
    relay,
    tunnel,
    wait_until,
)

PROGRAMS = {"client": "snitun-client", "server": "snitun-server", "master": "snitun-master"}

# Without the tests' own settings, of which programs would warn.


def run(
    program: str, *arguments: object, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        [str(part) for part in module(f"snitun_sync.{program}", *map(str, arguments))],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=PROJECT,
        env={**os.environ, **(env or {})},
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return the error's line: the last one; there is no traceback."""
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def secrets_of(credentials: Credentials) -> list[str]:
    payload = credentials.payload
    return [
        credentials.token[10:60],
        credentials.ticket.to_line()[10:60],
        payload.aes_key.hex(),
        payload.aes_iv.hex(),
        credentials.fernet_key,
    ]


# --- help -----------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_version(program: str) -> None:
    shown = run(program, "--help")
    assert shown.returncode == 0
    assert f"usage: {PROGRAMS[program]}" in shown.stdout
    assert "exit codes (sysexits.h)" in shown.stdout
    assert run(program, "--version").stdout == f"{PROGRAMS[program]} {__version__}\n"


def test_help_survives_a_python_without_docstrings() -> None:
    for program in PROGRAMS:
        command = [sys.executable, "-OO", "-m", f"snitun_sync.{program}", "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT)
        assert "exit codes" in shown.stdout


def test_the_tickets_help_names_all_options() -> None:
    shown = run("master", "ticket", "--help").stdout
    for option in ("alias", "valid-for", "protocol-version", "cipher", "single-use", "json"):
        assert f"--{option}" in shown


# --- errors: one line, the exit code, no secret --------------------------------------------


def test_client_errors(tmp_path: Path, credentials: Credentials) -> None:
    ticket_file, token = credentials.ticket_file, credentials.token
    line = credentials.ticket.to_line()
    missing, broken, binary = tmp_path / "missing", tmp_path / "broken", tmp_path / "binary"
    broken.write_text(line[:-20])
    binary.write_bytes(b"\xff\xfe\x00")
    hex_file, short_hex = tmp_path / "hex", tmp_path / "short"
    hex_file.write_text("ab" * 32)
    short_hex.write_text("ab" * 5)
    bare = ["--token", token, "--server", "x", "--aes-key-file"]
    cases: list[tuple[list[object], int, str]] = [
        (["--unknown"], 64, "unrecognized arguments: --unknown; see snitun-client --help"),
        (["--tokn", token], 64, r"unrecognized arguments: --tokn \[secret\]"),
        (["--protocol-version", "3"], 64, "argument --protocol-version: invalid choice"),
        (["--log-level", "loud"], 64, "--log-level: invalid choice: 'loud'"),
        ([], 64, "no ticket: expected --token-file FILE, --token - or \\$SNITUN_TOKEN"),
        (["--token-file", missing], 66, f"--token-file: can't read {missing}: No such file"),
        (["--token-file", tmp_path], 66, f"--token-file: can't read {tmp_path}: Is a directory"),
        (["--token-file", binary], 66, f"--token-file: {binary} is no text"),
        (["--token-file", broken], 78, f"--token-file: {broken}: the .*was it cut short"),
        (["--token", line, "--token-file", ticket_file], 64, "expected one of them, found both"),
        (["--token", str(ticket_file)], 78, "--token: no ticket.*for a file there is --token-file"),
        (["--token", token[:-1]], 78, "--token: no ticket.*was it cut short"),
        (["--token", token], 64, "a bare Fernet token needs --server as well"),
        (["--token", token, "--server", "x"], 64, "needs --aes-key-file as well"),
        ([*bare, missing, "--aes-iv-file", missing], 66, "--aes-key-file: can't read"),
        (
            [*bare, short_hex, "--aes-iv-file", short_hex],
            78,
            "short has 5 bytes in hex, expected 32",
        ),
        ([*bare, broken, "--aes-iv-file", hex_file], 78, "broken is not a hex string"),
        (["--token-file", ticket_file, "--cipher", "aes-gcm"], 64, "--cipher: only with a bare"),
        (["--token-file", ticket_file, "--endpoint", "host"], 64, "--endpoint: no port in 'host'"),
        (["--token-file", ticket_file, "--server", ":1"], 64, "--server: no host in ':1'"),
        (
            ["--token-file", ticket_file, "--crypto", "x"],
            64,
            "--crypto: 'x'; expected pycryptodome or",
        ),
        (
            ["--token-file", ticket_file, "--congestion-control", "tachyon"],
            64,
            "--congestion-control: 'tachyon': No such file.*; expected one of .*reno",
        ),
        (["--token", ""], 78, "--token: no ticket.*found nothing"),
        (["--token", "x"], 78, "--token: no ticket.*found 1 characters"),
        (["--token-file", ticket_file, "--server", token], 64, r"no host name in \d+ characters"),
        (["--token-file", ticket_file, "--endpoint", "a..b:1"], 64, "--endpoint: no host name in"),
        (["--token-file", ticket_file, "--server", "a:" + "1" * 5000], 64, "port 5000 characters"),
    ]
    for arguments, code, said in cases:
        result = run("client", *arguments)
        assert re.search(f"^snitun-client: .*{said}", last_line(result)), (arguments, result.stderr)
        assert result.returncode == code, (arguments, result.stderr)
        for secret in secrets_of(credentials):
            assert secret not in result.stderr


def test_client_errors_of_the_network(
    tmp_path: Path, credentials: Credentials, endpoint: Endpoint
) -> None:
    def once(*arguments: object) -> tuple[int, str]:
        result = run(
            "client",
            *("--token-file", credentials.ticket_file, "--endpoint", endpoint.address, "--once"),
            *arguments,
        )
        return result.returncode, last_line(result)

    with refusing_port() as port:
        code, said = once("--server", f"127.0.0.1:{port}")
        assert (code, said) == (
            69,
            f"snitun-client: can't reach the relay 127.0.0.1:{port}: Connection refused",
        )
    code, said = once("--server", "relay.invalid:443")
    assert code == 69
    assert "can't reach the relay relay.invalid:443: " in said

    server, port = relay(credentials)
    with server:
        expired = Credentials(tmp_path, fernet_key=credentials.fernet_key, valid_s=-6000)
        expired.at(f"127.0.0.1:{port}")
        code, said = once()
        assert code == 77
        assert "before it sent a challenge: it refuses the token, which has expired, was" in said
        server.wait_for(f"refused: the token for {HOSTNAME} expired 60")
        # Elsewhere: the relay would take its key, once it sees that the file has changed.
        (tmp_path / "foreign").mkdir()
        foreign = Credentials(tmp_path / "foreign", server=f"127.0.0.1:{port}")
        assert once("--token-file", foreign.ticket_file)[0] == 77
        wrong_key = Credentials(tmp_path, fernet_key=credentials.fernet_key)
        wrong_key.payload.aes_key = bytes(32)
        wrong_key.at(f"127.0.0.1:{port}")
        code, said = once()
        assert code == 77
        assert "aes_key and aes_iv are not the token's" in said
        server.wait_for("the answer to the challenge is wrong")
    for secret in secrets_of(credentials):
        assert secret not in server.output


def test_an_expired_ticket_warns_and_a_lost_tunnel_ends_once(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    with RawRelay(Credentials(tmp_path, valid_s=-60)) as raw_relay:
        program = client(raw_relay.credentials, endpoint.address, "--once", up=False)
        with raw_relay.tunnel():
            program.wait_for("ready: ")
        assert program.wait() == 69
    assert "the ticket expired at" in program.output
    assert program.output.splitlines()[-1] == "snitun-client: the relay closed the connection"


def test_a_single_use_ticket_is_used_up(tmp_path: Path, endpoint: Endpoint) -> None:
    with RawRelay(Credentials(tmp_path, cipher="aes-gcm")) as raw_relay:
        program = client(raw_relay.credentials, endpoint.address, up=False)
        raw_relay.tunnel().sock.close()
        assert program.wait() == 69
    assert "serves one connection only, and this was it: get a new ticket" in program.output


def test_server_errors(tmp_path: Path, credentials: Credentials) -> None:
    keys = credentials.key_file
    missing, empty, wrong = tmp_path / "missing", tmp_path / "empty", tmp_path / "wrong"
    empty.write_text("# nothing\n\n")
    wrong.write_text(f"{credentials.fernet_key}  # good\nnot-a-key\n")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        cases: list[tuple[list[object], int, str]] = [
            ([], 64, "the following arguments are required: --fernet-key-file; see"),
            (["--fernet-key-file", missing], 66, f"--fernet-key-file: can't read {missing}"),
            (["--fernet-key-file", empty], 78, f"--fernet-key-file: {empty}: no Fernet key"),
            (["--fernet-key-file", wrong], 78, f"{wrong}: Fernet key 2 is not 32 bytes"),
            (["--fernet-key-file", keys, "--listen", "443"], 64, "--listen: no port in '443'"),
            (["--fernet-key-file", keys, "--peer-listen", "*:x"], 64, "--peer-listen: port 'x'"),
            (
                ["--fernet-key-file", keys, "--listen", f"127.0.0.1:{port}"],
                69,
                f"can't listen on 127.0.0.1:{port}: Address already in use",
            ),
            (
                ["--fernet-key-file", keys, "--listen", "relay.invalid:1"],
                69,
                "can't listen on relay",
            ),
            (["--fernet-key-file", keys, "--route", "a.example"], 64, "--route: 'a.example'; exp"),
            (["--fernet-key-file", keys, "--revocations", "a.example"], 64, "--revocations: 'a.ex"),
            (
                ["--fernet-key-file", keys, "--revocations-ca", missing],
                66,
                f"--revocations-ca: can't read {missing}",
            ),
            (["--fernet-key-file", keys, "--listen", "a..b:1"], 64, "--listen: no host name in"),
            (
                ["--fernet-key-file", keys, "--congestion-control", "x"],
                64,
                "congestion-control: 'x'",
            ),
        ]
        for arguments, code, said in cases:
            result = run("server", *arguments)
            assert said in last_line(result), (arguments, result.stderr)
            assert last_line(result).startswith("snitun-server: ")
            assert result.returncode == code
            assert credentials.fernet_key not in result.stderr


def test_a_privileged_port_says_what_it_takes(credentials: Credentials) -> None:
    command = module("snitun_sync.server", "--fernet-key-file", credentials.key_file)
    command += ["--listen", "127.0.0.1:1"]
    if os.getuid() == 0:
        command = ["setpriv", "--bounding-set=-net_bind_service", *command]
    with Program(*command) as program:
        assert program.wait() == 69
    said = "can't listen on 127.0.0.1:1: Permission denied; ports below 1024 take root or CAP_NET"
    assert said in program.output


# --- where tickets come from -----------------------------------------------------------------


@pytest.mark.parametrize("form", ["to_json", "to_line"])
@pytest.mark.parametrize("way", ["file", "stdin", "stdin file", "environment", "argument"])
def test_every_way_takes_either_form(
    tmp_path: Path, endpoint: Endpoint, form: str, way: str
) -> None:
    with RawRelay(Credentials(tmp_path)) as raw_relay:
        text = getattr(raw_relay.credentials.ticket, form)()
        file = raw_relay.credentials.ticket_file
        file.write_text(f"\n{text}\n")
        arguments = {
            "file": ["--token-file", str(file)],
            "stdin": ["--token", "-"],
            "stdin file": ["--token-file", "-"],
            "environment": [],
            "argument": ["--token", text],
        }[way]
        env = {"SNITUN_TOKEN": text} if way == "environment" else {}
        with file.open() as stdin:
            with Program(
                *module("snitun_sync.client", "--endpoint", endpoint.address, *arguments),
                env=env,
                stdin=stdin,
            ) as program:
                with raw_relay.tunnel():
                    program.wait_for("ready: ")
                    for name in ("cmdline", "environ"):
                        shown = Path(f"/proc/{program.pid}/{name}").read_bytes().decode()
                        assert raw_relay.credentials.token not in shown
                        assert text[:80] not in shown
        assert ("can be seen in ps" in program.output) == (way == "argument")
        for secret in secrets_of(raw_relay.credentials):
            assert secret not in program.output


def test_a_bare_token(tmp_path: Path, endpoint: Endpoint) -> None:
    with RawRelay(Credentials(tmp_path)) as raw_relay:
        credentials = raw_relay.credentials
        files = {
            "token": credentials.token,
            "key": credentials.payload.aes_key.hex(),
            "iv": credentials.payload.aes_iv.hex() + "\n",
        }
        for name, text in files.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o600)
        with Program(
            *module("snitun_sync.client", "--token-file", tmp_path / "token"),
            *("--server", f"127.0.0.1:{raw_relay.port}", "--endpoint", endpoint.address),
            *("--aes-key-file", tmp_path / "key", "--aes-iv-file", tmp_path / "iv"),
            *("--protocol-version", "2", "--cipher", "aes-cbc"),
        ) as program:
            with raw_relay.tunnel():
                program.wait_for("ready: ")


def test_a_secret_that_everybody_can_read_is_worth_a_warning(tmp_path: Path) -> None:
    credentials = Credentials(tmp_path)
    credentials.ticket_file.chmod(0o644)
    shown = run("client", "--token-file", credentials.ticket_file, "--once", "--server", "[::1]:1")
    assert f"{credentials.ticket_file} can be read by everybody: chmod 600 it" in shown.stderr


# --- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_both_programs_well(
    credentials: Credentials, endpoint: Endpoint, number: signal.Signals
) -> None:
    with tunnel(credentials, endpoint) as (server, peer, port):
        with Device(port, "ECHO") as device:
            device.exchange()
            peer.process.send_signal(number)
            assert device.sock.recv(1) == b""
        assert peer.wait() == 0
        assert "the client is stopping" in peer.output
        server.process.send_signal(number)
        assert server.wait() == 0
    assert "Traceback" not in peer.output + server.output


def test_a_signal_while_connecting(credentials: Credentials) -> None:
    credentials.at("192.0.2.1:443")
    program = client(credentials, "127.0.0.1:1", up=False)
    program.wait_for("connecting to the relay")
    program.process.terminate()
    assert program.wait() == 0


# --- the session master ------------------------------------------------------------------------


def test_new_key_and_ticket_work_together(tmp_path: Path, endpoint: Endpoint) -> None:
    keys = tmp_path / "keys"
    keys.write_text(run("master", "new-key").stdout)
    keys.chmod(0o600)
    credentials = Credentials(tmp_path)
    credentials.key_file = keys
    server, port = relay(credentials)
    with server:
        made = run(
            "master",
            *("ticket", "--fernet-key-file", keys, "--hostname", "Home.Example.test."),
            *("--alias", "www.example.test", "--alias", HOSTNAME, "--server", f"127.0.0.1:{port}"),
        )
        assert made.stderr == ""
        assert made.stdout.startswith("st1.")
        with Program(
            *module("snitun_sync.client", "--endpoint", endpoint.address),
            env={"SNITUN_TOKEN": made.stdout},
        ) as program:
            program.wait_for("ready: home.example.test at")
            for name in ("home.example.test", "www.example.test", HOSTNAME):
                with Device(port, "ECHO", hostname=name) as device:
                    device.exchange()


def test_ticket_options(tmp_path: Path, credentials: Credentials) -> None:
    made = run(
        "master",
        *("ticket", "--fernet-key-file", credentials.key_file, "--hostname", "a.test", "--json"),
        *("--server", "relay.test", "--valid-for", "12h", "--protocol-version", "1"),
        *("--cipher", "aes-gcm-siv"),
    )
    fields = json.loads(made.stdout)
    assert fields["server"] == "relay.test"
    assert abs(fields["valid"] - time.time() - 12 * 3600) < 120
    assert (fields["protocol_version"], fields["cipher"]) == (1, "aes-gcm-siv")
    ticket = Ticket.parse(made.stdout)
    assert len(ticket.aes_key) == 32


def test_every_ticket_has_a_key_of_its_own(credentials: Credentials) -> None:
    arguments = ("ticket", "--fernet-key-file", credentials.key_file, "--hostname", "a.test")
    tickets = [Ticket.parse(run("master", *arguments, "--server", "b").stdout) for _ in range(3)]
    assert len({ticket.aes_key for ticket in tickets}) == 3
    assert len({ticket.aes_iv for ticket in tickets}) == 3


def test_master_errors(tmp_path: Path, credentials: Credentials) -> None:
    good = {
        "--fernet-key-file": str(credentials.key_file),
        "--hostname": "a.test",
        "--server": "b.test",
    }
    cases: list[tuple[dict[str, str], int, str]] = [
        ({"--fernet-key-file": str(tmp_path / "no")}, 66, "--fernet-key-file: can't read"),
        ({"--hostname": "two words"}, 64, "--hostname: 'two words' is not a DNS name"),
        ({"--alias": "*.test"}, 64, "--alias: '*.test' is not a DNS name"),
        ({"--server": "b.test:0"}, 64, "--server: port '0'"),
        ({"--valid-for": "forever"}, 64, "--valid-for: 'forever'; expected a number and one of"),
        ({"--valid-for": "0d"}, 64, "--valid-for: '0d'"),
        ({"--valid-for": "9999999999w"}, 64, "up to 100 years"),
        ({"--cipher": "aes-gcm"}, 64, "--cipher aes-gcm: its key must never serve two"),
        ({"--single-use": ""}, 64, "--single-use: only with --cipher aes-gcm, found aes-cbc"),
        ({"--crypto": "x"}, 64, "--crypto: 'x'; expected pycryptodome or cryptography"),
        ({"--cipher": "rot13"}, 64, "--cipher: invalid choice: 'rot13'"),
        ({"--protocol-version": "9"}, 64, "--protocol-version: invalid choice"),
    ]
    for changed, code, said in cases:
        arguments = [part for pair in {**good, **changed}.items() for part in pair if part]
        result = run("master", "ticket", *arguments)
        assert said in last_line(result), (changed, result.stderr)
        assert result.returncode == code
        assert result.stdout == ""
    result = run("master")
    assert result.returncode == 64
    assert "arguments are required: COMMAND" in last_line(result)


def test_aes_gcm_with_single_use(credentials: Credentials) -> None:
    made = run(
        "master",
        *("ticket", "--fernet-key-file", credentials.key_file, "--hostname", "a.test"),
        *("--server", "b.test", "--cipher", "aes-gcm", "--single-use"),
    )
    assert Ticket.parse(made.stdout).cipher == "aes-gcm"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in which MASTER is the session master."""
    return subprocess.run(
        ["bash", "-c", command.replace("MASTER", f"{sys.executable} -m snitun_sync.master")],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        check=False,
    )


def test_a_closed_pipe_is_no_error() -> None:
    result = shell("MASTER new-key | (exec <&-; sleep 1); exit ${PIPESTATUS[0]}")
    assert (result.stderr, result.returncode) == ("", 0)


def test_a_full_disk_is_an_error() -> None:
    result = shell("MASTER new-key > /dev/full")
    assert result.stderr == "snitun-master: standard output: No space left on device\n"
    assert result.returncode == 74


def test_other_errors_of_the_system_aren_t_standard_output_s() -> None:
    code = """if True:
        from snitun_sync import program
        def body(arguments):
            open("/no/such/file")
        raise SystemExit(program.main("snitun-client", body, []))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=False
    )
    assert done.stderr == "snitun-client: [Errno 2] No such file or directory: '/no/such/file'\n"
    assert done.returncode == 70


def test_what_is_checked_and_shown_needs_standard_output_too(credentials: Credentials) -> None:
    for command in ("--check", "show-ticket"):
        ran = f"{sys.executable} -m snitun_sync.client {command}"
        ran += f" --token-file {credentials.ticket_file} > /dev/full"
        result = shell(ran)
        assert result.stderr == "snitun-client: standard output: No space left on device\n"
        assert result.returncode == 74


def test_standard_input_and_output_may_be_closed() -> None:
    result = shell(
        "MASTER ticket --fernet-key-file - --hostname a.test --server b.test <&-; exit $?"
    )
    assert last_line(result) == ("snitun-master: --fernet-key-file: standard input is closed")
    assert result.returncode == 66
    assert shell("MASTER new-key >&-").stderr == ""


def test_many_names_make_a_token_that_no_relay_takes(credentials: Credentials) -> None:
    def ticket(aliases: int) -> subprocess.CompletedProcess[str]:
        names = [f"--alias=name-{number:04}.example.com" for number in range(aliases)]
        file = credentials.key_file
        return run(
            *("master", "ticket", "--fernet-key-file", file, "--hostname", "a.test"),
            *("--server", "b.test", *names),
        )

    assert ticket(10).stderr == ""
    assert "relays of other makes take at most 2048" in ticket(60).stderr
    result = ticket(300)
    assert re.search(r"--alias: 300 names make a token of \d+ characters", last_line(result))
    assert (result.stdout, result.returncode) == ("", 64)


# --- the log ----------------------------------------------------------------------------


def test_what_is_masked(credentials: Credentials) -> None:
    for secret in (credentials.token, credentials.ticket.to_line(), credentials.fernet_key):
        assert masked(f"host {secret}:443") == "host [secret]:443"
    assert masked(f"found {credentials.payload.aes_key.hex()}") == "found [secret]"
    assert masked('x {"a": "b",\n "aes_key": "00"} y') == "x [secret]"
    for plain in (f"/var/lib/{'ab' * 32}/ticket", "a-long-name" * 6 + ".example.com", "{short}"):
        assert masked(plain) == plain


def test_a_secret_in_the_wrong_place_is_not_logged(credentials: Credentials) -> None:
    short = "gAAAAABq" + "x1Y2" * 6  # a token's start, which might be a host name
    with Program(
        *module("snitun_sync.client", "--token-file", credentials.ticket_file, "--server", short)
    ) as program:
        program.wait_for("connecting to the relay")
    assert short not in program.output


def test_warnings_that_strangers_cause_are_limited(credentials: Credentials) -> None:
    server, port = relay(credentials)
    with server:
        for _ in range(3 * WARNINGS_PER_PERIOD):
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(b"gAAA not base64")
                assert sock.recv(1) == b""
        lines = server.output.count("characters other than base64's")
    assert lines == WARNINGS_PER_PERIOD


def test_the_log_tells_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    log_filter = LogFilter()
    record = logging.LogRecord("x", logging.WARNING, "", 1, "%s: no", ("someone",), None)
    passed = sum(log_filter.filter(copy.copy(record)) for _ in range(30))
    assert passed == WARNINGS_PER_PERIOD
    said: list[tuple[object, ...]] = []
    monkeypatch.setattr(logs.log, "warning", lambda *args: said.append(args))
    log_filter._period_over = 0.0
    assert log_filter.filter(record)
    assert said == [("left out %d lines like: %s", 30 - WARNINGS_PER_PERIOD, "%s: no")]


# --- kill -9 ----------------------------------------------------------------


def test_relay_and_client_come_back_from_sigkill(
    credentials: Credentials, endpoint: Endpoint
) -> None:
    server, port = relay(credentials)
    credentials.at(f"127.0.0.1:{port}")
    with client(credentials, endpoint.address) as peer:
        server.kill()
        peer.wait_for("next attempt in")
        server, _ = relay(credentials, listen=f"127.0.0.1:{port}")
        with server:
            peer.wait_for("ready: ", count=2, timeout_s=90)
            with Device(port, "ECHO") as device:
                device.exchange()
            peer.kill()
            server.wait_for("tunnel ended")

            def is_forgotten() -> bool:
                with Device(port, "ECHO") as device:
                    return device.receive_all()[0] == 7  # the alert

            wait_until(is_forgotten)


@pytest.mark.parametrize("program", ["client", "server"])
def test_what_came_from_standard_input_outlives_a_reload(
    credentials: Credentials, tmp_path: Path, program: str
) -> None:
    """Nobody waits for more of it, and the other settings count."""
    settings = tmp_path / "settings.ini"
    settings.write_text("")
    options = {
        "client": ["--proxy", "http://user@127.0.0.1:1", "--proxy-password-file", "-"],
        "server": ["--listen", "127.0.0.1:0", "--fernet-key-file", "-"],
    }[program]
    if program == "client":
        options += ["--token-file", str(credentials.ticket_file)]
    read, write = os.pipe()
    os.write(write, (credentials.fernet_key + "\n").encode())
    os.close(write)
    started = {"client": "next attempt in", "server": "listening on"}[program]
    with (
        open(read, "rb") as stdin,
        Program(
            *module(f"snitun_sync.{program}", "--config", settings, *options), stdin=stdin
        ) as running,
    ):
        running.wait_for(started)
        settings.write_text(f"[{program}]\nchannel-idle = 0\n")
        running.process.send_signal(signal.SIGHUP)
        running.wait_for("channel-idle: 0 seconds; expected 1 to")
        settings.write_text(f"[{program}]\nchannel-idle = 5\n")
        running.process.send_signal(signal.SIGHUP)
        running.wait_for("the settings were read again")
