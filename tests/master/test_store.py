"""The session master's database: what it promises, and what it says where it can't be used."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snitun_sync.errors import StoreError, UsageError
from snitun_sync.master import store as store_module
from snitun_sync.master.store import LEAD_S, SLACK_S, Store
from snitun_sync.master.tokens import Device, seal_token, token_length
from snitun_sync.protocol.aes import load
from snitun_sync.protocol.names import is_dns_name, normal_hostname
from snitun_sync.protocol.token import MAX_TEXT, Fernet, Payload, created, new_fernet_key
from tests.support import PROJECT, Program, in_threads, wait_until

NOW = 1_800_000_000


class Clock:
    """A clock that shows what it is told to."""

    def __init__(self) -> None:
        self.now: float = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "snitun.db")


@pytest.fixture
def store(path: str, clock: Clock) -> Iterator[Store]:
    with Store(path, clock=clock) as found:
        yield found


def raw(path: str) -> closing[sqlite3.Connection]:
    """The file as SQLite sees it, for a `with` statement."""
    return closing(sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False))


def is_whole(path: str) -> bool:
    with raw(path) as database:
        return bool(database.execute("PRAGMA integrity_check").fetchall() == [("ok",)])


# --- devices ------------------------------------------------------------------------------------


def test_only_the_right_secret_is_accepted(store: Store, path: str) -> None:
    one, secret = store.add("One.Example.test.", ["WWW.example.test", "one.example.test"])
    two, other = store.add("two.example.test")
    static, nothing = store.add("static.example.test", has_secret=False)
    assert (one.hostname, one.aliases) == ("one.example.test", ("www.example.test",))
    assert (one.has_secret, static.has_secret, nothing) == (True, False, "")
    found = store.authenticate(one.id, secret)
    assert found is not None
    assert [getattr(found, name) for name in found.__slots__] == [
        getattr(one, name) for name in one.__slots__
    ]
    unknown = "a" * 16
    for device_id, text in (
        *((one.id, other), (two.id, secret), (unknown, secret), (one.id, secret[:-1])),
        *((one.id, ""), (one.id, secret + "="), (static.id, ""), (static.id, secret), ("", "")),
        (one.id, "é" * 43),
    ):
        assert store.authenticate(device_id, text) is None
    rotated = store.rotate(one.id)
    assert store.authenticate(one.id, secret) is None
    assert store.authenticate(one.id, rotated) is not None
    store.revoke(one.id)
    found = store.authenticate(one.id, rotated)  # who asks is told that it is revoked
    assert found is not None
    assert found.revoked == NOW
    store.remove(one.id)
    assert store.authenticate(one.id, rotated) is None
    # No secret is in the file, nor in what SQLite keeps beside it.
    for name in (path, f"{path}-wal"):
        assert other.encode() not in Path(name).read_bytes()


@pytest.fixture(scope="module")
def emptied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A database for many examples, each of which leaves it without devices."""
    with Store(str(tmp_path_factory.mktemp("emptied") / "snitun.db")) as found:
        yield found


@given(text=st.text(max_size=70) | st.from_regex(r"[A-Za-z0-9_.-]{1,70}", fullmatch=True))
def test_whatever_is_no_dns_name_is_refused(emptied: Store, text: str) -> None:
    if is_dns_name(normal_hostname(text)):
        device = emptied.add(text)[0]
        try:
            assert emptied.find(text.upper()).id == emptied.find(device.id).id == device.id
            with pytest.raises(UsageError, match=f"is a name of device {device.id} "):
                emptied.add("other", [text + ("" if text.endswith(".") else ".")])
            assert len(emptied.devices()) == 1
        finally:
            emptied.remove(device.id)
    else:
        for names in ([text], ["a.test", text]):
            with pytest.raises(UsageError, match="is not a DNS name"):
                emptied.add(names[0], names[1:])
        assert not emptied.devices()


NAME = st.sampled_from(["a.test", "b.test", "c.test", "d.test"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "rename", "rotate", "revoke", "remove"]),
        st.integers(0, 3),
        st.lists(NAME, min_size=1, max_size=3),
        st.integers(-10_000, 10_000),
    ),
    max_size=20,
)


@settings(max_examples=50)
@given(STEPS)
def test_no_two_devices_have_one_name_and_what_was_revoked_stays_so(
    steps: list[tuple[str, int, list[str], int]],
) -> None:
    """Whatever happens, and wherever the clock jumps meanwhile."""
    clock = Clock()
    names: dict[str, set[str]] = {}  # by the id, those that it claims
    revoked: set[str] = set()
    known: list[str] = []
    before: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, Store(f"{folder}/db", clock=clock) as store:
        serial = store.serial()
        for what, index, wanted, jump in steps:
            clock.now += jump
            if what == "add":
                is_free = not set(wanted) & set().union(*names.values())
                try:
                    device_id = store.add(wanted[0], wanted[1:])[0].id
                except UsageError:
                    assert not is_free
                    continue
                assert is_free
                known.append(device_id)
                names[device_id] = set(wanted)
            elif not known:
                continue
            else:
                device_id = known[index % len(known)]
                others = set().union(*(own for key, own in names.items() if key != device_id))
                is_there = device_id in names
                may = is_there or (device_id in revoked and what in ("revoke", "remove"))
                may = may and not (what == "rename" and set(wanted) & others)
                try:
                    if what == "rename":
                        store.rename(device_id, wanted[0], wanted[1:])
                    else:
                        getattr(store, what)(device_id)
                except UsageError:
                    assert not may
                    continue
                assert may
                if what == "rename":
                    names[device_id] = set(wanted)
                elif what in ("revoke", "remove"):
                    names.pop(device_id, None)
                    revoked.add(device_id)
                    if what == "remove":
                        revoked.discard(device_id)
                entry = store.revocations(clock.now).entries[device_id]
                assert entry[0] > max(before.get(device_id, 0), clock.now)
                assert store.serial() > serial
                before[device_id], serial = entry[0], store.serial()
            devices = {device.id: device for device in store.devices()}
            assert set(devices) == set(names) | revoked
            for key, own in names.items():
                assert {devices[key].hostname, *devices[key].aliases} == own
                assert devices[key].tokens_before == before.get(key, 0)
            assert {key for key in devices if devices[key].revoked is not None} == revoked
        assert is_whole(f"{folder}/db")


def test_a_revoked_device_is_found_until_another_one_has_its_name(store: Store) -> None:
    first = store.add("a.test", ["b.test"])[0]
    store.revoke(first.id)
    assert store.find("A.test").id == first.id
    with pytest.raises(UsageError, match=r"no device has the id or the name 'b\.test'"):
        store.find("b.test")
    second = store.add("a.test", ["b.test"])[0]
    assert store.find("a.test").id == store.find("b.test").id == second.id
    assert store.find(first.id.upper()).id == first.id
    store.revoke(second.id)
    with pytest.raises(UsageError, match=f"2 revoked devices .* {first.id}|{second.id}"):
        store.find("a.test")
    for change in (
        store.rotate,
        lambda key: store.rename(key, "c"),
        lambda k: store.note_ticket(k, 1),
    ):
        with pytest.raises(UsageError, match=rf"device {first.id} \(a\.test\) is revoked"):
            change(first.id)
    store.remove(first.id)
    for change in (store.rotate, store.revoke, store.remove):
        with pytest.raises(UsageError, match=f"no device has the id '{first.id}'"):
            change(first.id)
    assert [line[1:] for line in store.audit(2)] == [
        (second.id, "a.test", "revoked"),
        (first.id, "a.test", "removed"),
    ]
    assert [line[3] for line in store.audit(9, first.id)] == ["added", "revoked", "removed"]


def test_many_threads_want_one_name(path: str) -> None:
    """Of two stores, as of two processes."""
    won: list[str] = []
    with Store(path) as one, Store(path) as two:

        def add(number: int) -> None:
            store = (one, two)[number % 2]
            for name in ("a.test", "b.test", "c.test"):
                try:
                    store.add(f"{number}.{name}", [name])
                    won.append(name)
                except UsageError as error:
                    assert f"{name} is a name of device" in str(error)

        in_threads(16, add)
        assert sorted(won) == ["a.test", "b.test", "c.test"]
        assert len(one.devices()) == len(two.devices()) == 3


def test_only_as_many_names_as_relays_take(store: Store) -> None:
    names = [f"{number:03}.{'x' * 58}.test" for number in range(200)]
    with pytest.raises(UsageError, match=r"200 names make a token of 1\d+ characters, and relays"):
        store.add(names[0], names[1:])
    while True:
        names.pop()
        try:
            device = store.add(names[0], names[1:], cipher="aes-gcm-siv")[0]
            break
        except UsageError:
            pass
    with pytest.raises(UsageError, match="names make a token of"):
        store.rename(device.id, names[0], [*names[1:], "x" * 63, "y" * 63])
    sealed = seal(store, device.id, float(NOW) + 0.123456)
    assert MAX_TEXT - 150 < len(sealed) <= token_length(device) <= MAX_TEXT


@pytest.mark.parametrize(
    "options",
    [{"throttling": -1}, {"throttling": 10**20}, {"cipher": "rot13"}, {"protocol_version": 3}],
)
def test_what_a_device_can_t_have(store: Store, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"rot13|version 3|--throttling: "):
        store.add("a.test", **options)  # type: ignore[arg-type]
    assert not store.devices()
    assert not store.audit(9)


# --- revocation ---------------------------------------------------------------------------------

KEY = new_fernet_key(os.urandom)


def seal(
    store: Store, device_id: str, valid: float, now: float = NOW, device: Device | None = None
) -> str:
    fernet, keys = Fernet([KEY], load()), {"aes_key": bytes(32), "aes_iv": bytes(16)}
    return seal_token(device or store.find(device_id), fernet, **keys, valid=valid, now=now)


def test_tokens_of_before_are_refused_and_new_ones_count(store: Store, clock: Clock) -> None:
    device = store.add("a.test", ["b.test"], cipher="aes-gcm-siv", protocol_version=1)[0]
    for jump in (0.0, 0.9, -5000, 10):  # within one second, and by a clock that goes back
        clock.now += jump
        former = seal(store, device.id, NOW + 10, clock.now)
        store.rotate(device.id)
        # Made at leisure, by somebody who has looked at the device before.
        late = seal(store, device.id, NOW + 10, clock.now + LEAD_S - 1, device)
        fresh = seal(store, device.id, NOW + 10, clock.now)
        listed = store.revocations(clock.now)
        assert listed.refuses(device.id, created(former.encode()))
        assert listed.refuses(device.id, created(late.encode()))
        assert not listed.refuses(device.id, created(fresh.encode()))
        assert created(fresh.encode()) == store.find(device.id).tokens_before
    opened = Fernet([KEY], load()).open(fresh.encode())
    assert opened is not None
    payload = Payload.from_json(opened)
    assert (payload.device_id, payload.names) == (device.id, ("a.test", "b.test"))
    assert (payload.cipher, payload.protocol_version) == ("aes-gcm-siv", 1)
    assert payload.valid == NOW + 10
    # Dated by the clock again, once that has passed what was revoked.
    later = seal(store, device.id, NOW + 99, NOW + 50.7)
    assert created(later.encode()) == NOW + 50


def test_entries_end_with_the_last_token_that_they_refuse(
    store: Store, clock: Clock, path: str
) -> None:
    store.note_token_ttl(3600)
    store.note_token_ttl(60)  # less than before: tokens of then may be around
    one, two, three = (store.add(f"{name}.test")[0] for name in ("one", "two", "three"))
    valid = store.note_ticket(two.id, NOW + 90_000)
    assert valid.id == two.id
    store.note_ticket(two.id, NOW + 10)
    for device in (one, two):
        store.revoke(device.id)
    until_one, until_two = NOW + LEAD_S + 3600 + SLACK_S, NOW + 90_000 + SLACK_S
    assert store.revocations(until_one - 1).entries == {
        one.id: (NOW + LEAD_S, until_one),
        two.id: (NOW + LEAD_S, until_two),
    }
    assert list(store.revocations(until_one).entries) == [two.id]
    assert store.revocations(until_two).entries == {}
    assert store.revocations(NOW).serial == store.serial()
    clock.now = until_one
    store.remove(three.id)  # whose names nobody has, but whose tokens somebody may have
    assert list(store.revocations(until_one).entries) == [two.id, three.id]
    # A clock that had gone too far has come back: what it ended counts again.
    assert list(store.revocations(NOW).entries) == [one.id, two.id, three.id]


def test_a_clock_that_goes_back_leaves_no_token_out(store: Store, clock: Clock) -> None:
    store.note_token_ttl(1000)
    seen, ticketed, twice = (store.add(f"{name}.test")[0] for name in ("a", "b", "c"))
    store.seen(seen.id, NOW + 100)
    store._write_seen()
    store.note_ticket(ticketed.id, NOW + 5000)
    store.rotate(twice.id)
    for _ in range(2):
        clock.now -= 3600
        for device in (seen, ticketed, twice):
            store.revoke(device.id)
    assert store.revocations(NOW).entries == {
        seen.id: (NOW + 100 + LEAD_S + 1, NOW + 100 + LEAD_S + 1 + 1000 + SLACK_S),
        ticketed.id: (NOW + LEAD_S + 1, NOW + 5000 + SLACK_S),
        twice.id: (NOW + LEAD_S + 2, NOW + LEAD_S + 2 + 1000 + SLACK_S),
    }
    assert store.find(seen.id).revoked == NOW - 3600


def test_the_serial_is_seen_by_all_and_larger_than_any_before(path: str) -> None:
    started = time.time() * 1000
    with Store(path) as one, Store(path) as two:
        device = one.add("a.test")[0]
        serial = two.serial()
        assert started - 1 <= serial
        one.rotate(device.id)
        assert two.serial() == two.revocations(0).serial > serial
        serial = one.serial()
    os.remove(path)
    with Store(path) as anew:
        assert anew.serial() > serial


# --- last seen ----------------------------------------------------------------------------------


def test_when_devices_were_seen_is_written_later(
    store: Store, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = store.add("a.test")[0], store.add("b.test")[0]
    monkeypatch.setattr(store_module, "SEEN_PERIOD_S", 0.05)
    monkeypatch.setattr(store_module, "SEEN_BUSY_S", 0.01)
    with raw(path) as other:
        # Nobody who is served waits for that, and the log has one line.
        other.execute("BEGIN IMMEDIATE")
        assert store.seen(one.id, NOW + 7.5)
        assert not store.seen(one.id, NOW + 1)
        for later in (1, 2, 3):
            store.seen(two.id, NOW + later)
            wait_until(lambda: store._seen_timer is None)
        assert store.find(one.id).last_seen is None
        other.execute("ROLLBACK")
    assert "when devices were last seen isn't written" in caplog.text
    assert len(caplog.records) == 1
    # By itself, without anybody who comes later.
    assert not store.seen(two.id, NOW)
    wait_until(lambda: store.find(one.id).last_seen == NOW + 7)
    assert store.find(two.id).last_seen == NOW + 3
    wait_until(lambda: not store._seen)
    monkeypatch.setattr(store_module, "SEEN_PERIOD_S", 1000.0)
    assert store.seen(two.id, NOW + 4)
    store.close()
    with Store(path) as again:
        assert again.find(two.id).last_seen == NOW + 4


# --- the file -----------------------------------------------------------------------------------


def test_who_may_read_it(path: str) -> None:
    umask = os.umask(0)
    os.symlink(path, f"{path}.link")  # to nothing yet
    try:
        with Store(f"{path}.link") as store:
            store.add("a.test")
            for name in (path, f"{path}-wal", f"{path}-shm"):
                assert os.stat(name).st_mode & 0o777 == 0o600
    finally:
        os.umask(umask)
    assert sorted(os.listdir(os.path.dirname(path))) == ["snitun.db", "snitun.db.link"]


def refusal(path: str | Path, *, must_exist: bool = False) -> str:
    """Return what it says of the file, behind its name."""
    with pytest.raises(StoreError) as caught:
        Store(str(path), must_exist=must_exist)
    start = f"the database {path}: "
    assert str(caught.value).startswith(start)
    return str(caught.value)[len(start) :]


def test_what_is_no_database(tmp_path: Path, path: str) -> None:
    assert refusal(tmp_path) == "it is a directory"
    assert refusal(tmp_path / "no" / "db") == "No such file or directory"
    assert refusal(path, must_exist=True) == "No such file or directory"
    assert not os.path.exists(path)
    assert "embedded null" in refusal("a\0b")
    text = tmp_path / "text"
    text.write_text("[master]\ndatabase = snitun.db\n" * 100)
    assert refusal(text) == "it is no database of SQLite"
    with raw(path) as database:
        database.execute("CREATE TABLE bookmark (url)")
    before = Path(path).read_bytes()
    assert refusal(path) == "it belongs to another program"
    assert Path(path).read_bytes() == before
    (tmp_path / "empty").touch()
    with Store(str(tmp_path / "empty"), must_exist=True) as store:
        assert store.devices() == []


def test_a_newer_version_s_database(path: str) -> None:
    Store(path).close()
    with raw(path) as database:
        database.execute("PRAGMA user_version = 7")
    said = "a newer version of this program made it (its form is 7, this version knows 1)"
    assert refusal(path) == said


def test_names_that_sqlite_has_ideas_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (":memory:", "file:x?mode=memory"):
        with Store(name) as store:
            store.add("a.test")
        with Store(name, must_exist=True) as store:
            assert len(store.devices()) == 1


def test_a_database_that_is_locked(
    store: Store, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading goes on; a change waits, and says why it couldn't be made."""
    device = store.add("a.test")[0]
    store.note_token_ttl(3600)
    with raw(path) as other:
        other.execute("BEGIN IMMEDIATE")
        store.note_token_ttl(60)  # nothing changes: nothing is written, nor waited for
        with monkeypatch.context() as changed:
            changed.setattr(store_module, "BUSY_S", 0.05)
            with pytest.raises(StoreError, match=r"snitun\.db: another process has locked it for"):
                store.rotate(device.id)
            assert store.find("a.test").tokens_before == 0

        def change(number: int) -> None:
            if number:
                store.rotate(device.id)
            else:
                time.sleep(0.1)
                other.execute("ROLLBACK")

        in_threads(2, change)
    assert store.find("a.test").tokens_before


def test_another_file_in_its_place(store: Store, path: str, tmp_path: Path) -> None:
    """Who has it open says so: what commands do there would have no effect here."""
    device, secret = store.add("a.test")
    os.rename(path, tmp_path / "away")
    said = "another file is in its place, or none, since it was opened"
    with pytest.raises(StoreError, match=said):
        store.authenticate(device.id, secret)
    # What isn't in the file yet isn't lost by somebody who begins a new one.
    assert "it isn't there, and what belongs to it" in refusal(path)
    Path(path).touch()
    for attempt in (store.devices, lambda: store.rotate(device.id)):
        with pytest.raises(StoreError, match=said):
            attempt()
    os.rename(tmp_path / "away", path)
    assert store.authenticate(device.id, secret) is not None


@settings(max_examples=60)
@given(st.randoms(use_true_random=False), st.sampled_from([1, 16, 512, 8192]))
def test_a_damaged_database(whole: bytes, chance: random.Random, size: int) -> None:
    """Random bytes in it: it isn't opened, or its methods work or raise a StoreError."""
    with tempfile.TemporaryDirectory() as folder:
        at = chance.randrange(len(whole))
        damage = bytes(chance.randrange(256) for _ in range(min(size, len(whole) - at)))
        path = f"{folder}/db"
        Path(path).write_bytes(whole[:at] + damage + whole[at + len(damage) :])
        try:
            with Store(path) as store:
                store.devices()
                store.revocations(NOW).sign(KEY)
                device = store.add("new.test")[0]
                store.revoke(device.id)
        except (StoreError, UsageError) as error:
            assert "\n" not in str(error)
            assert path in str(error)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database with devices in it, revoked ones, too."""
    path = tmp_path_factory.mktemp("whole") / "db"
    with Store(str(path)) as store:
        ids = [
            store.add(f"{number}.{'x' * 40}.test", [f"{number}.test"])[0].id for number in range(80)
        ]
        for device_id in ids[::2]:
            store.revoke(device_id)
    return path.read_bytes()


def test_a_page_of_random_bytes_in_the_middle(path: str, whole: bytes) -> None:
    middle = len(whole) // 2 // 4096 * 4096
    data = whole[:middle] + os.urandom(4096) + whole[middle + 4096 :]
    Path(path).write_bytes(data)
    assert refusal(path) == "it is damaged; put a copy in its place"


def test_a_database_that_can_t_be_written(tmp_path: Path, path: str) -> None:
    with Store(path) as store:
        store.add("a.test")
    os.chmod(path, 0o400)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "snitun_sync.master",
        "device",
        "add",
        "b.test",
    ]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]

    def add(database: str | Path) -> str:
        done = subprocess.run(
            [*command, "--database", database],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (74, "")
        return done.stderr

    assert add(path) == f"snitun-master: the database {path}: it can't be written\n"
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert add(closed / "db") == f"snitun-master: the database {closed}/db: Permission denied\n"


# --- what may happen to it ----------------------------------------------------------------------

# Adds devices until it is killed; half of them as the command does, with a file opened and closed.
ADDING = """
import sys
from itertools import count
from snitun_sync.master.cli import run
from snitun_sync.master.store import Store
path, name = sys.argv[1:]
store = Store(path)
for number in count():
    if number % 2:
        run(["device", "add", f"{number}.{name}", "--database", path])
    else:
        device, secret = store.add(f"{number}.{name}")
        print(f"{device.id}.{secret}", flush=True)
"""


def test_a_change_waits_for_the_disk(store: Store) -> None:
    """No test can pull the plug: SQLite syncs with each change then, as it says."""
    with store._change() as (database, _):
        full = 2
        assert database.execute("PRAGMA synchronous").fetchone() == (full,)


def test_killed_at_any_moment_it_has_all_that_was_printed(path: str) -> None:
    printed: list[str] = []
    for number in range(8):
        name = f"{number}.test"
        with Program(sys.executable, "-c", ADDING, path, name) as program:
            wait_until(lambda: program.output.count("\n") > random.randrange(60))
            program.kill()
        printed += [line for line in program.output.splitlines() if line[16:17] == "."]
    assert is_whole(path)
    with Store(path) as store:
        for line in printed:
            assert store.authenticate(*line.split(".")) is not None
        # What was being printed, or was about to be.
        assert len(printed) <= len(store.devices()) <= len(printed) + 8


# In a mount namespace of its own, on a disk of 1 MiB: a store that stays open, as in a service,
# and the command beside it. Prints what it was told.
FULL = """
import logging, os, subprocess, sys
from snitun_sync.errors import StoreError
from snitun_sync.master.store import Store
logging.disable()
path, filler = "db", "filler"
store, kept = Store(path), []
def add(name):
    device, secret = store.add(name)
    kept.append((device.id, secret))
def command():
    arguments = "device", "add", "command.test", "--database", path
    done = subprocess.run(
        [sys.executable, "-m", "snitun_sync.master", *arguments], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr
add("first.test")
for number in range(100):  # what is beside the file doesn't grow with each of them
    add(f"early-{number}.test")
with open(filler, "wb", 0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        pass
count = 0
try:
    while True:
        add(f"{count}.test")
        count += 1
except StoreError as error:
    print(error)
for _ in range(2):
    store.seen(kept[0][0], 1)
    store._write_seen()
for device_id, secret in kept:  # reading goes on
    assert store.authenticate(device_id, secret)
code, out, err = command()
print(code, repr(out), err, end="")
os.remove(filler)
add("later.test")
code, out, err = command()
kept.append(out.strip().split("."))
store.close()
with Store(path) as again:
    for device_id, secret in kept:
        assert again.authenticate(device_id, secret)
    print(len(again.devices()) - len(kept), again.find("first.test").last_seen)
    print(again._connection.execute("PRAGMA integrity_check").fetchone()[0])
# One that can't even be opened: SQLite needs space beside it.
with open(filler, "wb", 0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        pass
print(*command())
"""


def test_a_full_disk(tmp_path: Path) -> None:
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("only root can mount a small disk")
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0" && cd "$0" && exec "$@"'
    unshare = ["unshare", "--mount", "--propagation", "private", "bash", "-c", mount]
    with Program(*unshare, tmp_path, sys.executable, "-c", FULL) as program:
        assert program.wait() == 0, program.output
    full = "the database db: no space is left on its disk"
    assert program.output.splitlines() == [
        full,
        f"74 '' snitun-master: {full}",
        "0 1",
        "ok",
        f"74  snitun-master: {full}",
        "",
    ]


def test_many_processes_at_once(tmp_path: Path, path: str) -> None:
    """24 that add a device to a file that isn't there yet: they wait for each other."""
    command = [sys.executable, "-m", "snitun_sync.master", "device", "add", "--database", path]
    programs = [Program(*command, f"{number}.test") for number in range(24)]
    for program in programs:
        assert program.wait(120) == 0, program.output
    lines = [line for program in programs for line in program.output.splitlines()]
    credentials = [line.split(".") for line in lines if line[16:17] == "."]
    assert len(credentials) == 24
    assert is_whole(path)
    with Store(path) as store:
        assert len(store.devices()) == 24
        for device_id, secret in credentials:
            assert store.authenticate(device_id, secret) is not None
