"""The commands `device …`, `audit` and `ticket --database`, as real processes."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from snitun_sync.master import devices
from snitun_sync.master.store import Store
from snitun_sync.protocol.aes import load
from snitun_sync.protocol.ticket import Ticket
from snitun_sync.protocol.token import Fernet, Payload
from tests.support import PROJECT, Credentials
from tests.test_programs import last_line, run, shell

HOME = "home.example.com"
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d"
DATE = r"\d{4}-\d\d-\d\d"


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database that the commands know from their environment."""
    path = str(tmp_path / "snitun.db")
    monkeypatch.setenv("SNITUN_DATABASE", path)
    return path


def device(*arguments: str) -> str:
    """Run a command that works; return what is on its standard output."""
    done = run("master", "device", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(*arguments: str) -> Any:
    """Return what a command prints as JSON."""
    return json.loads(device(*arguments, "--json"))


def test_the_life_of_a_device(database: str) -> None:
    done = run("master", "device", "add", "Home.Example.com", "--alias", "cam.example.com")
    credential = done.stdout.strip()
    device_id, secret = credential.split(".")
    assert done.stdout == f"{device_id}.{secret}\n"
    names = "home.example.com, cam.example.com"
    said = f"device {device_id} is added: {names}; its secret is not shown again\n"
    assert done.stderr == said
    device("add", "a.test", "--throttling", "99", "--cipher", "aes-gcm", "--protocol-version=1")

    heads, first, second = device("list").splitlines()
    assert re.split(" {2,}", heads) == ["id", "added", "seen", "revoked", "names"]
    assert re.fullmatch(rf"[a-z2-7]{{16}}  {DATE}  -     -        a\.test", first)
    assert re.fullmatch(rf"{device_id}  {DATE}  -     -        {re.escape(names)}", second)
    objects = shown("list")
    assert [found["hostname"] for found in objects] == ["a.test", HOME]
    assert objects[0]["throttling"] == 99
    assert (objects[0]["cipher"], objects[0]["protocol_version"]) == ("aes-gcm", 1)
    assert objects[1]["id"] == device_id
    assert objects[1]["aliases"] == ["cam.example.com"]
    assert abs(objects[1]["created"] - time.time()) < 600

    assert device("rename", HOME, "house.test") == f"{device_id} has these names now: house.test\n"
    rotated = device("rotate", "house.test").strip()
    assert rotated.startswith(f"{device_id}.")
    again = shown("rotate", device_id)
    assert again["credential"] not in (credential, rotated)
    with Store(database) as store:
        assert [
            store.authenticate(*text.split(".")) is not None
            for text in (credential, rotated, again["credential"])
        ] == [False, False, True]
    assert shown("revoke", "house.test")["revoked"]
    lines = device("show", device_id).splitlines()
    assert lines[:3] == [f"id                {device_id}", "hostname          house.test", lines[2]]
    assert [re.sub(TIME, "TIME", line) for line in lines[2:]] == [
        "aliases           -",
        "secret            yes",
        "throttling        -",
        "cipher            aes-cbc",
        "protocol version  2",
        "added             TIME",
        "seen              -",
        "revoked           TIME",
        "",
        "TIME  added",
        "TIME  renamed: house.test, formerly home.example.com cam.example.com",
        "TIME  secret rotated",
        "TIME  secret rotated",
        "TIME  revoked",
    ]
    assert [line["what"] for line in shown("show", device_id)[0]["audit"]][-1] == "revoked"
    assert device("remove", device_id) == f"{device_id} is removed: house.test\n"
    done = run("master", "device", "show", device_id)
    assert (done.returncode, done.stdout) == (64, "")
    assert last_line(done) == f"snitun-master: no device has the id or the name '{device_id}'"

    lines = run("master", "audit", "--limit", "2").stdout.splitlines()
    assert re.split(" {2,}", lines[0]) == ["time", "device", "what"]
    assert re.fullmatch(rf"{TIME}  {device_id}  house\.test: removed", lines[2])
    found = json.loads(run("master", "audit", device_id, "--json").stdout)
    assert len(found) == 6  # also of one that is no more
    assert set(found[0]) == {"time", "device_id", "hostname", "what"}
    # No secret is anywhere but where it was printed.
    for text in (credential, rotated, again["credential"]):
        assert text.split(".")[1] not in json.dumps(found) + "".join(lines)
        assert text.split(".")[1].encode() not in Path(database).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["device", "add", "two words"], 64, "'two words' is not a DNS name"),
        (["device", "add", "a.test", "--alias", "*"], 64, "'*' is not a DNS name"),
        (["device", "add", "192.0.2.1"], 64, "'192.0.2.1' is not a DNS name; expected labels of"),
        (["device", "add", "HOME.example.com."], 64, "home.example.com is a name of device "),
        (["device", "add", "a.test", "--throttling=-1"], 64, "--throttling: -1; expected 0 to"),
        (["device", "add", "a.test", "--cipher=rot13"], 64, "--cipher: invalid choice: 'rot13'"),
        (["device", "show", "b.test"], 64, "no device has the id or the name 'b.test'"),
        (["device", "rename", "b.test", "c.test"], 64, "no device has the id or the name"),
        (["device", "rename", HOME, "c test"], 64, "'c test' is not a DNS name"),
        (["device"], 64, "arguments are required: ACTION"),
        (["audit", "--limit", "0"], 64, "--limit: 0; expected 1 to"),
        (["device", "list", "--database", "/nowhere/db"], 74, "/nowhere/db: No such file or"),
        (["device", "add", "a.test", "--database", "/"], 74, "the database /: it is a directory"),
    ],
)
def test_errors_say_what_is_wrong(
    database: str, arguments: list[str], code: int, said: str
) -> None:
    with Store(database) as store:
        store.add(HOME)
    done = run("master", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in last_line(done)
    with Store(database) as store:
        assert [found.hostname for found in store.devices()] == [HOME]


def test_only_what_adds_makes_a_database(database: str) -> None:
    for arguments in (["device", "list"], ["audit"], ["device", "revoke", HOME]):
        done = run("master", *arguments)
        assert done.returncode == 74
        assert last_line(done).endswith(f"the database {database}: No such file or directory")
        assert not os.path.exists(database)
    done = run("master", "device", "list", env={"SNITUN_DATABASE": ""})
    assert done.returncode == 64
    assert "arguments are required: --database" in last_line(done)


def test_the_database_of_the_file(database: str, tmp_path: Path) -> None:
    with Store(database) as store:
        store.add(HOME)
    ini = tmp_path / "snitun.ini"
    ini.write_text(f"[master]\ndatabase = {database}\njson = yes\n")
    done = run("master", "device", "list", "--config", ini, env={"SNITUN_DATABASE": ""})
    assert json.loads(done.stdout)[0]["hostname"] == HOME


def test_who_gets_no_secret_is_not_added(database: str) -> None:
    """Nobody would have it: standard output is full, closed, or a pipe that nobody reads."""
    full = "standard output: No space left on device"
    reader, pipe = os.pipe()
    os.close(reader)
    for where, said in (
        (">/dev/full", full),
        (">&-", "standard output: it is closed"),
        (f">/proc/{os.getpid()}/fd/{pipe}", "standard output: Broken pipe"),
    ):
        done = shell(f"MASTER device add a.test {where}")
        assert done.stderr == f"snitun-master: {said}; the device isn't added\n"
        assert done.returncode == 74
    os.close(pipe)
    with Store(database) as store:
        assert store.devices() == []
        device_id = store.add("a.test")[0].id
    done = shell("MASTER device rotate a.test --json >/dev/full")
    assert done.stderr == f"snitun-master: {full}; nobody has the new secret: rotate it again\n"
    assert done.returncode == 74
    assert device("rotate", "a.test").startswith(device_id)


def test_a_secret_in_a_file_that_others_may_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    for mode, count in ((0o600, 0), (0o644, 1)):
        secret.touch()
        secret.chmod(mode)
        with secret.open("w") as file:
            for command in (["new-key"], ["device", "add", f"a{count}.test"]):
                done = subprocess.run(
                    [sys.executable, "-m", "snitun_sync.master", *command],
                    stdout=file,
                    stderr=subprocess.PIPE,
                    cwd=PROJECT,
                    text=True,
                    check=True,
                )
                assert done.stderr.count("can be read by everybody: chmod 600 it") == count
        assert secret.read_text()


def test_nobody_reads_the_words_for_people(database: str) -> None:
    for number, where in enumerate(("2>&-", "2>/dev/full")):
        done = shell(f"MASTER device add {number}.test {where}")
        assert done.returncode == 0
        with Store(database) as store:
            assert store.authenticate(*done.stdout.strip().split("."))


# --- --help ------------------------------------------------------------------------------------

EXAMPLES = [
    (name, getattr(devices, name.upper()))
    for name in ("add", "list", "show", "rename", "rotate", "revoke", "remove", "audit")
]


@pytest.mark.parametrize(("name", "description"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_each_help_has_an_example_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, description: str
) -> None:
    """As somebody would copy it, in a folder with a database in it."""
    monkeypatch.delenv("SNITUN_DATABASE")
    command = ["audit"] if name == "audit" else ["device", name]
    assert description in run("master", *command, "--help").stdout
    if name != "add":
        with Store(str(tmp_path / "snitun.db")) as store:
            store.add(HOME)
    lines = re.findall(r"^  (umask .*|snitun-master .*)$", description, re.MULTILINE)
    assert any(f"snitun-master {' '.join(command)} " in line for line in lines)
    code = f'snitun-master() {{ "{sys.executable}" -m snitun_sync.master "$@"; }}\nset -e\n'
    done = subprocess.run(
        ["bash", "-c", code + "\n".join(lines)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if name in ("add", "rotate"):
        secret = tmp_path / "home.secret"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        with Store(str(tmp_path / "snitun.db")) as store:
            assert store.authenticate(*secret.read_text().strip().split("."))
    else:
        assert HOME in done.stdout or "house.example.com" in done.stdout


# --- ticket --database -------------------------------------------------------------------------


def ticket(credentials: Credentials, *arguments: str) -> tuple[Ticket, Payload]:
    """Make a ticket; return it, and what is in its token."""
    done = run(
        *("master", "ticket", "--fernet-key-file", credentials.key_file, "--server", "relay.test"),
        *arguments,
    )
    assert done.returncode == 0, done.stderr
    made = Ticket.parse(done.stdout)
    opened = Fernet([credentials.fernet_key], load()).open(made.token.encode())
    assert opened is not None
    return made, Payload.from_json(opened)


def test_a_ticket_adds_its_device_and_can_be_revoked(
    credentials: Credentials, database: str
) -> None:
    arguments = ("--hostname", "Home.Example.com", "--alias", "cam.example.com")
    first, payload = ticket(credentials, *arguments, "--valid-for", "90d")
    device_id = payload.device_id
    second, payload = ticket(credentials, "--hostname", HOME, "--cipher", "aes-gcm-siv")
    assert payload.device_id == device_id
    assert payload.names == (HOME, "cam.example.com")
    assert (payload.cipher, payload.valid) == (second.cipher, second.valid)
    lines = device("show", HOME).splitlines()
    assert "secret            none: it has tickets only" in lines
    assert f"until {time.strftime('%Y-%m-%d %H:%M', time.gmtime(first.valid))}" in lines[-2]
    device("rotate", HOME)
    third, _ = ticket(credentials, "--hostname", HOME)
    with Store(database) as store:
        now = time.time()
        listed = store.revocations(now)
        made = [found.created or 0 for found in (first, second, third)]
        assert [listed.refuses(device_id, created) for created in made] == [True, True, False]
        # As long as the longest of them could be used.
        assert first.valid is not None
        assert device_id in store.revocations(first.valid).entries
    device("revoke", HOME)
    with Store(database) as store:
        assert store.revocations(now).refuses(device_id, third.created or 0)
    _, payload = ticket(credentials, "--hostname", HOME)
    assert payload.device_id not in ("", device_id)


def test_a_ticket_takes_the_limit_and_the_names_of_its_device(
    credentials: Credentials, database: str
) -> None:
    with Store(database) as store:
        device_id = store.add(HOME, ["cam.example.com"], throttling=50)[0].id
    made, payload = ticket(credentials, "--hostname", HOME, "--alias", "cam.example.com")
    assert (payload.device_id, made.throttling) == (device_id, 50)
    arguments = ("--fernet-key-file", credentials.key_file, "--server", "relay.test")
    for names, said in (
        ([HOME, "--alias", "www.example.com"], f"--alias: device {device_id} has other names"),
        (["cam.example.com"], f"cam.example.com is a name of device {device_id}"),
    ):
        done = run("master", "ticket", *arguments, "--hostname", *names)
        assert (done.returncode, done.stdout) == (64, "")
        assert said in last_line(done)


def test_a_ticket_without_a_database(credentials: Credentials, database: str) -> None:
    done = run(
        *("master", "ticket", "--fernet-key-file", credentials.key_file, "--hostname", HOME),
        *("--server", "relay.test", "--json"),
        env={"SNITUN_DATABASE": ""},
    )
    token = json.loads(done.stdout)["token"].encode()
    opened = Fernet([credentials.fernet_key], load()).open(token)
    assert opened is not None
    assert b"device_id" not in opened
    assert not os.path.exists(database)
