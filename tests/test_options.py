"""Where options come from, which source goes first, and what each error says."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snitun_sync import status_command
from snitun_sync.client import cli as client_cli
from snitun_sync.errors import ConfigurationError, TicketError, UnreadableError, UsageError
from snitun_sync.master import cli as master_cli
from snitun_sync.options import (
    CHECK,
    COMMAND_LINE,
    CONFIG,
    DEFAULT,
    FILE,
    FROM_ENVIRONMENT,
    SECTIONS,
    Options,
    Parser,
    duration_s,
    size_bytes,
)
from snitun_sync.protocol.ticket import Ticket
from snitun_sync.server import cli as server_cli
from tests.services import RawRelay
from tests.support import Credentials, Program, module
from tests.test_programs import last_line, run, secrets_of


def parser() -> Parser:
    """Return a parser with an option of each kind."""
    options = Parser("snitun-server", description="", epilog="x")
    options.add_argument("--listen", action="append", default=("*:443",))
    options.add_argument("--once", action="store_true")
    options.add_argument("--fernet-key-file")
    options.add_argument("--peer-listen", type=duration_s, default="1m")
    options.add_service(budget_bytes=2**23, channel_idle_s=3600)
    options.add_common()
    return options


def read(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], **environment: str
) -> tuple[Options, list[str]]:
    """Parse with this environment; return options and warnings."""
    for name in [name for name in os.environ if name.startswith("SNITUN_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = parser().parse_args(arguments, Options())
    return options, options._warnings


@pytest.fixture(autouse=True)
def _sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS, "server", (*SECTIONS["server"], "once"))


@pytest.fixture
def ini(tmp_path: Path) -> Path:
    path = tmp_path / "snitun.ini"
    path.touch(0o600)
    return path


# --- the names of all options ---------------------------------------------------------------


def keys(options: argparse.ArgumentParser) -> set[str]:
    """Return the long names of the parser's options, those of its sub-commands included."""
    found = set()
    for action in options._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices:
                found |= keys(action.choices[name])
        elif action.option_strings:
            found.add(action.option_strings[-1][2:])
    return found


@pytest.mark.parametrize("program", ["client", "server", "master"])
def test_the_table_has_every_option(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't in SECTIONS can't be set by a file, and its variable is called unknown."""
    monkeypatch.undo()
    parsers: dict[str, list[Parser]] = {
        "client": [
            client_cli.parser(),
            client_cli.show_parser(),
            status_command.parser("snitun-client"),
        ],
        "server": [server_cli.parser(), status_command.parser("snitun-server")],
        "master": [master_cli.parser()],
    }
    found = set().union(*(keys(options) for options in parsers[program]))
    assert set(SECTIONS[program]) == found - {CONFIG, CHECK, "help", "version"}
    assert len(set(SECTIONS[program])) == len(SECTIONS[program])


# --- which source goes first ------------------------------------------------------------------

VALUES = {"log-level": ["debug", "info", "warning", "error"], "fernet-key-file": ["a", "b b", "=c"]}
VALUE = st.none() | st.integers(0, 2)


@given(st.dictionaries(st.sampled_from(sorted(VALUES)), st.tuples(VALUE, VALUE, VALUE)))
def test_the_first_source_that_says_something_counts(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, tuple[int | None, ...]]
) -> None:
    path = tmp_path_factory.mktemp("options") / "ini"
    arguments, environment, lines = ["--config", str(path)], {}, ["[server]"]
    for key, (on_line, in_environment, in_file) in said.items():
        if on_line is not None:
            arguments.append(f"--{key}={VALUES[key][on_line]}")
        if in_environment is not None:
            environment["SNITUN_" + key.upper().replace("-", "_")] = VALUES[key][in_environment]
        if in_file is not None:
            lines.append(f"{key} = {VALUES[key][in_file]}")
    path.write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as monkeypatch:
        options, _ = read(monkeypatch, arguments, **environment)
    for key, default in (("log-level", "info"), ("fernet-key-file", None)):
        attribute = key.replace("-", "_")
        found = [(rank, at) for rank, at in enumerate(said.get(key, ())) if at is not None]
        rank = found[0][0] if found else DEFAULT
        assert options.rank(attribute) == rank
        assert getattr(options, attribute) == (VALUES[key][found[0][1]] if found else default)
        sources = {
            COMMAND_LINE: f"--{key}",
            FROM_ENVIRONMENT: "$SNITUN_" + key.upper().replace("-", "_"),
            FILE: f"{path}: [server] {key}",
            DEFAULT: f"--{key}",
        }
        assert options.source(attribute) == sources[rank]


def test_lists_replace_each_other(monkeypatch: pytest.MonkeyPatch, ini: Path) -> None:
    ini.write_text("[server]\nlisten = a:1\n  b:2\n\n  # a remark\n  c:3\n")
    config = ["--config", str(ini)]
    assert read(monkeypatch, config)[0].listen == ["a:1", "b:2", "c:3"]
    in_environment = {"SNITUN_LISTEN": " d:1\te:2 "}
    assert read(monkeypatch, config, **in_environment)[0].listen == ["d:1", "e:2"]
    arguments = [*config, "--listen", "f:1", "--listen=g:2"]
    assert read(monkeypatch, arguments, **in_environment)[0].listen == ["f:1", "g:2"]
    assert read(monkeypatch, [])[0].listen == ("*:443",)


@pytest.mark.parametrize(
    ("text", "value"),
    [*zip(["yes", "true", "On", "1"], [True] * 4), *zip(["no", "FALSE", "off", "0"], [False] * 4)],
)
def test_flags(monkeypatch: pytest.MonkeyPatch, ini: Path, text: str, value: bool) -> None:
    assert read(monkeypatch, [], SNITUN_ONCE=text)[0].once is value
    ini.write_text(f"[server]\nonce = {text}\n")
    assert read(monkeypatch, [], SNITUN_CONFIG=str(ini))[0].once is value
    assert read(monkeypatch, ["--once"], SNITUN_ONCE=text)[0].once is True


def test_what_is_empty_is_not_set(monkeypatch: pytest.MonkeyPatch, ini: Path) -> None:
    ini.write_text("[server]\nlog-level =\nlisten =\n\n")
    options, warnings = read(
        monkeypatch, ["--config", str(ini)], SNITUN_LOG_LEVEL="", SNITUN_ONCE="", SNITUN_LISTEN=" "
    )
    assert (options.log_level, options.once, options.listen) == ("info", False, ("*:443",))
    assert not warnings


def test_types_apply_to_all_sources(monkeypatch: pytest.MonkeyPatch, ini: Path) -> None:
    ini.write_text("[server]\npeer-listen = 2h\n")
    assert read(monkeypatch, [])[0].peer_listen == 60.0
    assert read(monkeypatch, [], SNITUN_PEER_LISTEN="5m")[0].peer_listen == 300.0
    assert read(monkeypatch, ["--config", str(ini)])[0].peer_listen == 7200.0
    assert read(monkeypatch, ["--peer-listen", "9"])[0].peer_listen == 9.0


def test_one_file_serves_all_programs(monkeypatch: pytest.MonkeyPatch, ini: Path) -> None:
    ini.write_text("[client]\nendpoint = x:1\n[server]\nonce = 1\n[master]\nvalid-for = 90d\n")
    ini.chmod(0o644)
    options, warnings = read(monkeypatch, ["--config", str(ini)], SNITUN_ENDPOINT="y:1")
    assert options.once
    assert not warnings  # no secret in it, and $SNITUN_ENDPOINT is the client's
    ini.write_text("[client]\nendpoint = x:1\n")
    assert not read(monkeypatch, ["--config", str(ini)])[0].once


# --- errors ---------------------------------------------------------------------------------


FILE_ERRORS = [
    ("[sever]\n", r"\[sever\]: no such section; did you mean server\?"),
    (
        "[DEFAULT]\nonce = 1\n",
        r"\[DEFAULT\]: no such section; expected one of client, endpoint NAME, master, ser",
    ),
    ("[server]\nlog_level = info\n", r"\[server\] log_level: no such option; did you mean log-le"),
    ("[server]\nLISTEN = a:1\n", r"\[server\] LISTEN: no such option; did you mean listen\?"),
    ("[client]\nendpont = a:1\n", r"\[client\] endpont: no such option; did you mean endpoint\?"),
    ("[server]\nzzz = a\n", r"\[server\] zzz: no such option; expected one of admin"),
    ("[server]\nconfig = x\n", r"\[server\] config: no such option"),
    ("[server]\ncheck = yes\n", r"\[server\] check: no such option"),
    ("[server]\nhelp = yes\n", r"\[server\] help: no such option"),
    ("[server]\nversion = yes\n", r"\[server\] version: no such option"),
    ("[server]\nlog-level = %(x)s\n", r"\[server\] log-level: invalid choice: '%\(x\)s' \(choose"),
    ("[server]\nonce = maybe\n", r"\[server\] once: 'maybe'; expected yes or no"),
    ("[server]\npeer-listen = soon\n", r"\[server\] peer-listen: 'soon'; expected seconds"),
    ("[server]\ncrypto = x\n", r"\[server\] crypto: 'x'; expected pycryptodome or cryptography"),
    ("listen = a:1\n", r"line 1: expected \[client\], \[server\] or \[master\], or NAME = VALUE"),
    ("[server]\n\nlisten\n", r"line 3: expected \[client\]"),
    ("[server]\n= x\n", "line 2: expected"),
    ("[server]\nonce = 1\nonce = 0\n", r"\[server\] once: it is there twice, again in line 3"),
    ("[server]\n[server]\n", r"\[server\]: it is there twice, again in line 2"),
]


@pytest.mark.parametrize(("text", "said"), FILE_ERRORS)
def test_errors_of_the_file(
    monkeypatch: pytest.MonkeyPatch, ini: Path, text: str, said: str
) -> None:
    ini.write_text(text)
    with pytest.raises(ConfigurationError, match=f"^{re.escape(str(ini))}: {said}") as error:
        read(monkeypatch, ["--config", str(ini)])
    assert error.type is ConfigurationError


def test_a_file_that_can_t_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(UnreadableError, match=f"^--config: can't read {missing}: No such file"):
        read(monkeypatch, ["--config", missing])
    with pytest.raises(UnreadableError, match=r"^\$SNITUN_CONFIG: can't read"):
        read(monkeypatch, [], SNITUN_CONFIG=missing)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SNITUN_LOG_LEVEL", "loud", r"invalid choice: 'loud' \(choose from"),
        ("SNITUN_ONCE", "maybe", "'maybe'; expected yes or no"),
        ("SNITUN_PEER_LISTEN", "soon", "'soon'; expected seconds"),
        ("SNITUN_CRYPTO", "x", "'x'; expected pycryptodome or cryptography"),
    ],
)
def test_errors_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    with pytest.raises(UsageError, match=rf"^\${name}: {said}"):
        read(monkeypatch, [], **{name: value})


def test_variables_that_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, warnings = read(
        monkeypatch,
        [],
        SNITUN_LOGLEVEL="debug",
        SNITUN_CHECK="yes",
        SNITUN_QQ="x",
        SNITUN_VALID_FOR="1d",
        SNITUN_CONFIG="",
    )
    assert warnings == [
        "$SNITUN_CHECK: no such setting",
        "$SNITUN_LOGLEVEL: no such setting; did you mean $SNITUN_LOG_LEVEL?",
        "$SNITUN_QQ: no such setting",
    ]


def test_errors_that_come_later_get_their_source(
    monkeypatch: pytest.MonkeyPatch, ini: Path
) -> None:
    ini.write_text("[server]\nlisten = a\ncongestion-control = x\n")
    options, _ = read(
        monkeypatch, ["--config", str(ini), "--listen", "b"], SNITUN_FERNET_KEY_FILE="c"
    )
    cases: list[tuple[ConfigurationError, type[ConfigurationError], str]] = [
        (UsageError("--listen: no: x"), UsageError, "--listen: no: x"),
        (UsageError("--fernet-key-file: no"), UsageError, "$SNITUN_FERNET_KEY_FILE: no"),
        (
            UsageError("--congestion-control: no"),
            ConfigurationError,
            f"{ini}: [server] congestion-control: no",
        ),
        (
            UnreadableError("--congestion-control: no"),
            UnreadableError,
            f"{ini}: [server] congestion-control: no",
        ),
        (UsageError("--once: no"), UsageError, "--once: no"),
        (UsageError("--other: no"), UsageError, "--other: no"),
        (UsageError("--listen"), UsageError, "--listen"),
        (TicketError("fernet-key-file: no"), TicketError, "fernet-key-file: no"),
    ]
    for error, kind, text in cases:
        with pytest.raises(ConfigurationError) as raised, options:
            raise error
        assert (raised.type, str(raised.value)) == (kind, text)
    with pytest.raises(KeyError), options:
        raise KeyError("--listen: no")


# --- types ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90s", 90), ("5m", 300), ("1h", 3600), ("2d", 172800), ("1w", 604800)),
        *(("0.5", 0.5), ("0", 0), ("1.5h", 5400)),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "s", "-1", "1 s", "1S", "1y", "inf", "nan", "1e3", ".5", "1" * 11, "1s\n", "\u0661"],
)
def test_no_durations(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"; expected seconds, or a number and"):
        duration_s(text)


def test_sizes() -> None:
    sizes = [size_bytes(text) for text in ("0", "4096", "64K", "8M", "1G")]
    assert sizes == [0, 4096, 65536, 8 * 1024**2, 1024**3]
    for text in ("", "K", "1k", "1.5M", "-1", "1T", "1" * 16, "8 M", "8M\n"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"; expected bytes, or a whole"):
            size_bytes(text)


# --- in programs ------------------------------------------------------------------------------


def test_errors_of_programs_name_the_source(credentials: Credentials, ini: Path) -> None:
    ticket = credentials.ticket_file
    cases: list[tuple[str, str, dict[str, str], int, str]] = [
        ("client", "", {"SNITUN_ENDPOINT": "host"}, 64, "$SNITUN_ENDPOINT: no port in 'host'"),
        ("client", "[client]\nendpoint = host", {}, 78, "INI: [client] endpoint: no port in 'hos"),
        ("client", "[client]\nserver = :1", {}, 78, "INI: [client] server: no host in ':1'"),
        ("client", "[client]\ntoken-file = /no", {"SNITUN_TOKEN_FILE": ""}, 66, "can't read /no"),
        ("client", "[client]\ntoken = x", {"SNITUN_TOKEN_FILE": ""}, 78, "[client] token: no tic"),
        ("client", "[client]\ncipher = aes-gcm", {}, 78, "INI: [client] cipher: only with a bare"),
        ("client", "", {"SNITUN_TOKEN": "x"}, 64, "$SNITUN_TOKEN: --token-file is there, too; ex"),
        ("client", "", {"SNITUN_CONGESTION_CONTROL": "x"}, 64, "$SNITUN_CONGESTION_CONTROL: 'x'"),
        ("client", "[clent]", {}, 78, "INI: [clent]: no such section; did you mean client?"),
        ("server", "", {}, 64, "the following arguments are required: --fernet-key-file; see"),
        ("server", "[server]\nfernet-key-file = /no", {}, 66, "[server] fernet-key-file: can't"),
        (
            "server",
            f"[server]\nfernet-key-file = {credentials.key_file}\nlisten = *:1\n  443",
            {},
            78,
            "INI: [server] listen: no port in '443'",
        ),
    ]
    for program, text, environment, code, said in cases:
        ini.write_text(text)
        result = run(
            program,
            env={"SNITUN_CONFIG": str(ini), "SNITUN_TOKEN_FILE": str(ticket), **environment},
        )
        assert said.replace("INI", str(ini)) in last_line(result), (text, environment)
        assert last_line(result).startswith(f"snitun-{program}: ")
        assert result.returncode == code, result.stderr
    ini.write_text("[master]\nvalid-for = soon\nhostname = a b\n")
    arguments = ["--fernet-key-file", credentials.key_file, "--server", "b", "--config", ini]
    result = run("master", "ticket", *arguments)
    assert f"{ini}: [master] valid-for: 'soon'; expected a number and" in last_line(result)
    result = run("master", "ticket", *arguments, "--valid-for", "1d")
    assert f"{ini}: [master] hostname: 'a b' is not a DNS name" in last_line(result)
    assert result.returncode == 78
    assert run("master", "new-key", "--config", ini).returncode == 0


def test_a_secret_in_the_file_s_wrong_place_is_not_shown(
    credentials: Credentials, ini: Path
) -> None:
    line = credentials.ticket.to_line()
    for text in (
        f"{line}\n",
        f"[client]\n{line}\n",
        f"[client]\n{line} = x\n",
        f"[{line}]\n",
        f"[client]\nlog-level = {line}\n",
        f"[client]\nendpoint = {line}\n",
        f"[client]\ntoken = {line[:-9]}\n",
        f"[client]\n{credentials.fernet_key}\n",
    ):
        ini.write_text(text)
        result = run("client", "--config", ini)
        assert result.returncode in (64, 78), (text, result.stderr)
        for secret in secrets_of(credentials):
            assert secret not in result.stderr + result.stdout, text


def test_a_ticket_in_the_file(credentials: Credentials, ini: Path) -> None:
    ini.write_text(f"[client]\ntoken = {credentials.ticket.to_line()}\nonce = yes\n")
    said = f"{ini}: [client] token can be read by everybody: chmod 600 it"
    arguments = ("client", "--config", ini, "--server", "[::1]:1")
    result = run(*arguments)
    assert result.returncode == 69
    assert said not in result.stderr
    ini.chmod(0o644)
    assert said in run(*arguments).stderr


def test_which_ticket_counts(tmp_path: Path, ini: Path) -> None:
    """The source decides, not the option: one from the file is no second one."""
    tickets = [Credentials(tmp_path, hostname=f"{number}.test") for number in range(3)]
    lines = [credentials.ticket.to_line() for credentials in tickets]
    ini.write_text(f"[client]\ntoken = {lines[0]}\n")
    (tmp_path / "ticket").write_text(lines[2])
    from_file = ["--config", str(ini)]
    for arguments, environment, hostname in (
        (from_file, {}, "0.test"),
        (from_file, {"SNITUN_TOKEN": lines[1]}, "1.test"),
        (from_file, {"SNITUN_TOKEN_FILE": str(tmp_path / "ticket")}, "2.test"),
        (["--token-file", str(tmp_path / "ticket")], {"SNITUN_TOKEN": lines[1]}, "2.test"),
    ):
        shown = run("client", "show-ticket", *arguments, env=environment)
        assert f"\nhostname: {hostname}\n" in shown.stdout, shown.stderr


def test_secrets_of_the_environment_are_hidden_even_if_they_don_t_count(
    tmp_path: Path,
) -> None:
    with RawRelay(Credentials(tmp_path)) as raw_relay:
        text = raw_relay.credentials.ticket.to_line()
        command = module("snitun_sync.client", "--token", text)
        with Program(*command, env={"SNITUN_TOKEN": text}) as program:
            with raw_relay.tunnel():
                program.wait_for("ready: ")
                for name in ("cmdline", "environ"):
                    shown = Path(f"/proc/{program.pid}/{name}").read_bytes().decode()
                    assert text[:80] not in shown


def test_a_typo_in_the_environment_is_a_warning(credentials: Credentials) -> None:
    result = run("master", "new-key", env={"SNITUN_LOG_LEVL": "debug"})
    assert result.returncode == 0
    assert "$SNITUN_LOG_LEVL: no such setting; did you mean $SNITUN_LOG_LEVEL?" in result.stderr


# --- --check -----------------------------------------------------------------------------------


def test_check_of_the_client(credentials: Credentials, ini: Path) -> None:
    line = credentials.ticket.to_line()
    ini.write_text("[client]\nendpoint = unix:/run/x\nonce = yes\n")
    result = run(
        "client",
        *("--check", "--config", ini, "--cipher=aes-cbc", "--log-level", "debug"),
        env={"SNITUN_TOKEN": line},
    )
    # --cipher is for a bare token only
    assert (result.returncode, result.stdout) == (64, "")
    result = run(
        "client", "--check", "--config", ini, "--server", "b:1", env={"SNITUN_TOKEN": line}
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "snitun-client: the configuration is right"
    assert f"endpoint = unix:/run/x   ({ini}: [client] endpoint)" in lines
    assert f"once = yes   ({ini}: [client] once)" in lines
    assert "token = [secret]   ($SNITUN_TOKEN)" in lines
    assert "token-file =   (default)" in lines
    assert "server = b:1   (command line)" in lines
    assert "log-level = info   (default)" in lines
    assert not [line for line in lines if line.startswith(("check", "config", "help"))]
    for secret in secrets_of(credentials):
        assert secret not in result.stdout
    result = run("client", "--check", "--endpoint", "x", env={"SNITUN_TOKEN": line})
    assert (result.returncode, result.stdout) == (64, "")
    assert last_line(result).startswith("snitun-client: --endpoint: no port in 'x'")
    assert run("client", "--check").returncode == 64
    assert run("client", "--check", "--token-file", "/no").returncode == 66
    assert run("client", "--check", "--token", line[:-9]).returncode == 78


def test_check_of_the_server(credentials: Credentials, tmp_path: Path) -> None:
    result = run(
        *("server", "--check", "--fernet-key-file", credentials.key_file),
        env={"SNITUN_LISTEN": "127.0.0.1:1 [::1]:2"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "snitun-server: the configuration is right"
    assert "listen = 127.0.0.1:1 [::1]:2   ($SNITUN_LISTEN)" in lines
    assert "peer-listen =   (default)" in lines
    broken = tmp_path / "broken"
    broken.write_text("no key")
    result = run("server", "--check", "--fernet-key-file", broken)
    assert (result.returncode, result.stdout) == (78, "")


def test_check_leaves_nothing_open(
    credentials: Credentials, capsys: pytest.CaptureFixture[str]
) -> None:
    from snitun_sync.client import Client
    from snitun_sync.options import check_service

    before = os.listdir("/proc/self/fd")
    options = client_cli.parser().parse_args([], Options())
    check_service("x", options, lambda: Client(credentials.ticket))
    assert os.listdir("/proc/self/fd") == before
    assert capsys.readouterr().out.startswith("x: the configuration is right\n")


# --- show-ticket -------------------------------------------------------------------------------


def all_secrets(credentials: Credentials) -> list[str]:
    """Return token, key and IV as hex and base64 have them, in pieces that one would know."""
    import base64

    payload = credentials.payload
    found = [credentials.token[at : at + 12] for at in range(12, len(credentials.token) - 12, 12)]
    for data in (payload.aes_key, payload.aes_iv):
        found += [data.hex()[at : at + 8] for at in range(0, len(data.hex()), 8)]
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(data).decode().rstrip("=")
            found += [text[at : at + 8] for at in range(0, len(text) - 8, 8)]
    return found


def test_show_ticket(credentials: Credentials) -> None:
    shown = run("client", "show-ticket", "--token-file", credentials.ticket_file)
    assert (shown.returncode, shown.stderr) == (0, "")
    fields = dict(line.split(": ", 1) for line in shown.stdout.splitlines())
    assert list(fields) == [
        *("server", "hostname", "valid", "protocol version", "cipher", "throttling"),
        *("token created", "fingerprint"),
    ]
    assert fields["server"] == "127.0.0.1:1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \(in \d+ min\)", fields["valid"])
    assert re.fullmatch(r"[\d: -]+ UTC \(\d+ s ago\)", fields["token created"])
    assert (fields["protocol version"], fields["cipher"], fields["throttling"]) == (
        *("2", "aes-cbc"),
        "none",
    )
    assert re.fullmatch("[0-9a-f]{8}", fields["fingerprint"])
    as_json = run("client", "show-ticket", "--json", "--token", credentials.ticket.to_line())
    values = json.loads(as_json.stdout)
    assert values["valid"] == credentials.payload.valid
    assert abs(values["token_created"] - time.time()) < 600
    assert values["fingerprint"] == fields["fingerprint"]
    for secret in all_secrets(credentials):
        assert secret not in shown.stdout + as_json.stdout + as_json.stderr


def test_the_fingerprint_tells_tickets_apart(tmp_path: Path, credentials: Credentials) -> None:
    import hashlib

    other = Credentials(tmp_path)
    shown = [client_cli.show_ticket(one.ticket, "") for one in (credentials, other)]
    assert shown[0]["fingerprint"] != shown[1]["fingerprint"]
    assert shown[0]["fingerprint"] == hashlib.sha256(credentials.token.encode()).hexdigest()[:8]


@pytest.mark.parametrize(
    ("away_s", "said"),
    [
        (12 * 86400.0, "in 12 days"),
        (5 * 3600.0, "in 5 h"),
        (1.0, "in 1 s"),
        (119.0, "in 119 s"),
        (-3 * 3600.0, "expired 3 h ago"),
        (0.0, "expired 0 s ago"),
    ],
)
def test_how_long_a_ticket_is_valid(away_s: float, said: str) -> None:
    assert client_cli._time(1.8e9 + away_s, 1.8e9, "expired ").endswith(f" UTC ({said})")


def test_show_an_expired_ticket_that_knows_little(tmp_path: Path) -> None:
    credentials = Credentials(tmp_path, valid_s=-3 * 3600 - 60, throttling=500)
    shown = run("client", "show-ticket", "--token", "-", stdin=credentials.ticket.to_json()).stdout
    assert re.search(r"^valid: [\d: -]+ UTC \(expired 3 h ago\)$", shown, re.MULTILINE)
    assert "\nthrottling: 500\n" in shown
    for token in ("gAAA", "gA==", "gAAAAAAAAAAA", "gAAAAP__________"):
        ticket = Ticket(server="a", token=token, aes_key=bytes(32), aes_iv=bytes(16))
        values = client_cli.show_ticket(ticket, "")
        assert (values["hostname"], values["valid"]) == (None, None)
        assert values["token_created"] in (None, 0)
        fields = json.loads(ticket.to_json())
        del fields["hostname"], fields["valid"]
        shown = run("client", "show-ticket", "--token", "-", stdin=json.dumps(fields)).stdout
        assert "\nhostname: none\nvalid: none\n" in shown


def test_show_ticket_errors(tmp_path: Path, credentials: Credentials) -> None:
    result = run("client", "show-ticket")
    assert result.returncode == 64
    assert "no ticket: expected --token-file FILE" in last_line(result)
    result = run("client", "show-ticket", "--endpoint", "x:1")
    assert "snitun-client show-ticket: unrecognized arguments: --endpoint" in last_line(result)
    assert run("client", "show-ticket", "--token", "st1.abc").returncode == 78
    assert run("client", "shw-ticket").returncode == 64
    assert "usage: snitun-client show-ticket" in run("client", "show-ticket", "--help").stdout
    # The client's own settings, which the command doesn't have, are no errors.
    ini = tmp_path / "ini"
    ini.write_text(f"[client]\nendpoint = x:1\ntoken-file = {credentials.ticket_file}\n")
    assert run("client", "show-ticket", "--config", ini).returncode == 0
