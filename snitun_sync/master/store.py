"""The session master's database: devices, what is revoked, and who changed what.

A file of SQLite that several processes use at the same time: `serve`, and each command while it
runs. What a method has changed when it returns is on the disk. Secrets are there as SHA-256 only.
All times are UTC, Unix seconds.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import sqlite3
import threading
import time
from contextlib import closing, contextmanager

from ..errors import StoreError, UsageError
from ..protocol.cipher import CIPHERS
from ..protocol.device import new_id, new_secret, secret_bytes
from ..protocol.names import is_dns_name, no_dns_name, normal_hostname, shown
from ..protocol.revocations import Revocations
from ..protocol.token import MAX_TEXT
from .tokens import Device, token_length

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

VERSION = 1
APPLICATION_ID = 0x536E6954  # "SniT", in the file's header
MAX_THROTTLING = 1_000_000
BUSY_S = 30.0
RETRY_S = 0.02
# The file beside the database is emptied once it has so many pages: 256 KiB.
CHECKPOINT_PAGES = 64
LEAST_FREE_BYTES = 64 * 1024  # what SQLite needs beside the file to open it
# A token that is being made while its device is revoked doesn't see that yet: entries refuse
# what is made until a moment later, and new tokens of the device are dated behind that moment.
LEAD_S = 5
# Entries outlive the tokens that they refuse: a relay's clock may be behind.
SLACK_S = 60
SEEN_PERIOD_S, SEEN_BUSY_S = 5.0, 1.0
# On the loop, and so before the watchdog of the service manager comes (30 s).
TTL_BUSY_S = 10.0
COMPLAINT_PERIOD_S = 60.0

SCHEMA = """
CREATE TABLE device (
    id TEXT PRIMARY KEY, hostname TEXT NOT NULL, aliases TEXT NOT NULL, throttling INTEGER,
    cipher TEXT NOT NULL, protocol_version INTEGER NOT NULL, created INTEGER NOT NULL,
    last_seen INTEGER, revoked INTEGER, tokens_before INTEGER NOT NULL, secret BLOB,
    ticket_valid INTEGER NOT NULL);
CREATE TABLE name (name TEXT PRIMARY KEY, device_id TEXT NOT NULL);
CREATE INDEX name_device ON name (device_id);
CREATE TABLE revocation (
    device_id TEXT PRIMARY KEY, created_before INTEGER NOT NULL, until INTEGER NOT NULL);
CREATE TABLE audit (
    number INTEGER PRIMARY KEY, time INTEGER NOT NULL, device_id TEXT NOT NULL,
    hostname TEXT NOT NULL, what TEXT NOT NULL);
CREATE INDEX audit_device ON audit (device_id);
CREATE TABLE number (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO number VALUES ('serial', 0), ('token_ttl', 0)"""
_DEVICE = """SELECT id, hostname, aliases, throttling, cipher, protocol_version, created, last_seen,
    revoked, tokens_before, secret FROM device"""

_DAMAGED = "it is damaged; put a copy in its place"
# What SQLite says, and what it means; Python 3.9 has no codes for errors.
_REASONS = {
    "locked": "another process has locked it for too long",
    "is full": "no space is left on its disk",
    "readonly": "it can't be written",
    "not a database": "it is no database of SQLite",
    "malformed": _DAMAGED,
    "decode": _DAMAGED,
}

_ERRORS = sqlite3.Error, UnicodeDecodeError

log = logging.getLogger("snitun_sync")


class Store:
    """The database; its methods may be called on any thread.

    They raise StoreError where the database can't be used, and UsageError where it has no such
    device, or where what is asked for can't be.
    """

    def __init__(
        self, path: str, *, must_exist: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        """Open the file `path`; it is made, for its owner only, unless it `must_exist`."""
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._seen: dict[str, int] = {}  # by the device's id, when; not written yet
        self._seen_lock = threading.Lock()
        self._seen_timer: threading.Timer | None = None
        self._complain_at = 0.0
        # It only reads. A change has one of its own: who reads doesn't wait for the disk, nor
        # for another process.
        self._connection = self._opened(must_exist)
        self._identity = self._found()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is still to be written, and close the file."""
        timer = self._seen_timer  # its thread may forget it at any time
        if timer is not None:
            timer.cancel()
        self._write_seen()
        with self._lock:
            self._connection.close()

    # --- devices ---------------------------------------------------------------------

    def add(
        self,
        hostname: str,
        aliases: Sequence[str] = (),
        *,
        throttling: int | None = None,
        cipher: str = "aes-cbc",
        protocol_version: int = 2,
        has_secret: bool = True,
    ) -> tuple[Device, str]:
        """Add a device; return it and its secret, which is "" where it is to have none."""
        if not 0 <= (throttling or 0) <= MAX_THROTTLING:
            raise UsageError(f"--throttling: {throttling}; expected 0 to {MAX_THROTTLING}")
        if cipher not in CIPHERS or protocol_version not in (0, 1, 2):
            raise UsageError(f"no cipher {shown(cipher)}, or no version {protocol_version}")
        names = _checked(hostname, aliases)
        secret = new_secret(os.urandom) if has_secret else ""
        with self._change() as (database, now):
            digest = hashlib.sha256(_bytes(secret)).digest() if secret else None
            new = new_id(os.urandom), names[0], " ".join(names[1:]), throttling or None, cipher
            row = (*new, protocol_version, now, None, None, 0, digest, 0)
            device = _device(row[:-1])
            database.execute("INSERT INTO device VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            _claim(database, device)
            _note(database, now, device, "added" if has_secret else "added, without a secret")
        return device, secret

    def devices(self) -> list[Device]:
        """Return all devices, by their names."""
        with self._reading() as database:
            return [_device(row) for row in database.execute(f"{_DEVICE} ORDER BY hostname, id")]

    def counts(self) -> tuple[int, int]:
        """Return how many devices there are, and how many of them are revoked."""
        with self._reading() as database:
            found: tuple[int, int] = database.execute(
                "SELECT count(*), count(revoked) FROM device"
            ).fetchone()
        return found

    def find(self, id_or_name: str) -> Device:
        """Return the device that has this id, or one that has this hostname or alias.

        A revoked one is found by its hostname where no other one has that.
        """
        text = normal_hostname(id_or_name).encode("ascii", "replace").decode()
        with self._reading() as database:
            rows = database.execute(
                f"{_DEVICE} LEFT JOIN name ON device_id = id AND name = :text "
                "WHERE :text IN (id, hostname, name) ORDER BY id = :text DESC, revoked IS NOT NULL",
                {"text": text},
            ).fetchall()
        found = [_device(row) for row in rows]
        if not found:
            raise UsageError(f"no device has the id or the name {shown(id_or_name)}")
        if len(found) > 1 and found[0].revoked is not None and found[0].id != text:
            ids = ", ".join(device.id for device in found)
            raise UsageError(f"{len(found)} revoked devices had the name {text}: {ids}")
        return found[0]

    def authenticate(self, device_id: str, secret: str) -> Device | None:
        """Return the device whose secret this is, None if it isn't; it may be a revoked one."""
        with self._reading() as database:
            row = database.execute(f"{_DEVICE} WHERE id = ?", [device_id]).fetchone()
        # All steps are done for an unknown id, too: no secret has a SHA-256 of zeros only.
        kept = row[-1] if row and row[-1] else bytes(32)
        is_right = hmac.compare_digest(hashlib.sha256(_bytes(secret)).digest(), kept)
        return _device(row) if is_right and row else None

    def rename(self, device_id: str, hostname: str, aliases: Sequence[str] = ()) -> None:
        """Give a device other names; its tokens of until now count no longer."""
        names = _checked(hostname, aliases)
        with self._change() as (database, now):
            device = _unrevoked(database, device_id)
            former = " ".join((device.hostname, *device.aliases))
            device.hostname, device.aliases = names[0], tuple(names[1:])
            database.execute("DELETE FROM name WHERE device_id = ?", [device_id])
            _claim(database, device)
            database.execute(
                "UPDATE device SET hostname = ?, aliases = ? WHERE id = ?",
                [names[0], " ".join(names[1:]), device_id],
            )
            _refuse_tokens(database, now, device)
            _note(database, now, device, f"renamed: {' '.join(names)}, formerly {former}")

    def rotate(self, device_id: str) -> str:
        """Return a new secret of a device; the former one and its tokens count no longer."""
        secret = new_secret(os.urandom)
        with self._change() as (database, now):
            device = _unrevoked(database, device_id)
            digest = hashlib.sha256(_bytes(secret)).digest()
            database.execute("UPDATE device SET secret = ? WHERE id = ?", [digest, device_id])
            _refuse_tokens(database, now, device)
            _note(database, now, device, "secret rotated")
        return secret

    def revoke(self, device_id: str) -> None:
        """Refuse a device and its tokens for ever; others may have its names."""
        with self._change() as (database, now):
            device = _existing(database, device_id)
            database.execute("DELETE FROM name WHERE device_id = ?", [device_id])
            database.execute(
                "UPDATE device SET revoked = coalesce(revoked, ?) WHERE id = ?", [now, device_id]
            )
            _refuse_tokens(database, now, device)
            _note(database, now, device, "revoked")

    def remove(self, device_id: str) -> None:
        """Forget a device, all but its lines in the audit log; its tokens count no longer."""
        with self._change() as (database, now):
            device = _existing(database, device_id)
            _refuse_tokens(database, now, device)
            database.execute("DELETE FROM name WHERE device_id = ?", [device_id])
            database.execute("DELETE FROM device WHERE id = ?", [device_id])
            _note(database, now, device, "removed")

    def seen(self, device_id: str, now: float) -> bool:
        """The device was here: written a few seconds later, with those of others.

        Return whether that is news: False where it was here in these seconds already.
        """
        with self._seen_lock:
            is_news = device_id not in self._seen
            self._seen[device_id] = max(int(now), self._seen.get(device_id, 0))
            if self._seen_timer is None:
                timer = threading.Timer(SEEN_PERIOD_S, self._write_seen)
                timer.daemon = True
                try:
                    timer.start()
                    self._seen_timer = timer
                except RuntimeError:
                    pass  # no thread can be had: whoever comes next tries again
        return is_news

    # --- tokens ----------------------------------------------------------------------

    def note_ticket(self, device_id: str, valid: float) -> Device:
        """A ticket that is valid until then is about to be made for the device that it returns."""
        with self._change() as (database, now):
            device = _unrevoked(database, device_id)
            database.execute(
                "UPDATE device SET ticket_valid = max(ticket_valid, ?) WHERE id = ?",
                [int(valid), device_id],
            )
            until = time.strftime("%Y-%m-%d %H:%M", time.gmtime(valid))
            _note(database, now, device, f"ticket made, valid until {until}")
        return device

    def note_token_ttl(self, seconds: float) -> None:
        """Tokens that live so long are about to be made: entries are to outlive them."""
        with self._reading() as database:
            if _number(database, "token_ttl") >= int(seconds):
                return  # a full disk is no reason not to serve
        with self._change(TTL_BUSY_S) as (database, _):
            database.execute(
                "UPDATE number SET value = max(value, ?) WHERE name = 'token_ttl'", [int(seconds)]
            )

    def serial(self) -> int:
        """Return the serial of the list of revocations."""
        with self._reading() as database:
            return _number(database, "serial")

    def revocations(self, now: float) -> Revocations:
        """Return the list of revocations, without entries that have ended.

        They stay in the database: a clock may have gone too far, and come back.
        """
        with self._reading() as database:
            # One statement, one state of the database: entries and serial belong together.
            rows = database.execute(
                """SELECT value, device_id, created_before, until FROM number
                LEFT JOIN revocation ON until > ? WHERE name = 'serial'""",
                [now],
            ).fetchall()
        entries = {row[1]: (row[2], row[3]) for row in rows if row[1] is not None}
        return Revocations(rows[0][0], int(now), entries)

    def audit(self, limit: int, device_id: str = "") -> list[tuple[int, str, str, str]]:
        """Return the latest lines of the log, the oldest first: time, device, hostname, what."""
        with self._reading() as database:
            rows = database.execute(
                """SELECT time, device_id, hostname, what FROM audit
                WHERE :id IN ('', device_id) ORDER BY number DESC LIMIT :limit""",
                {"id": device_id, "limit": limit},
            ).fetchall()
        return rows[::-1]

    # --- the file --------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Hold the lock; what SQLite raises becomes a StoreError."""
        with self._lock, self._errors():
            yield self._connection

    @contextmanager
    def _change(self, busy_s: float = 0.0) -> Iterator[tuple[sqlite3.Connection, int]]:
        """Change the database, as a whole or not at all; yield it and the time."""
        with self._errors(), closing(self._connect(busy_s or BUSY_S)) as one, _transaction(one):
            yield one, int(self._clock())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            # Commands would go on with another file than we do, and who is revoked there isn't
            # revoked here.
            if self._found() != self._identity:
                raise StoreError(
                    f"the database {self._path}: another file is in its place, or none, since it "
                    "was opened; put it back, or start this program again"
                )
            yield
        except _ERRORS as error:
            raise self._error(error) from None

    def _found(self) -> tuple[int, int] | None:
        """Return which file is there now."""
        try:
            status = os.stat(self._file)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _write_seen(self) -> None:
        """Write who was seen. It can wait until the next time."""
        with self._seen_lock:
            self._seen_timer = None
            seen = self._seen.copy()
        if not seen:
            return
        try:
            with self._change(SEEN_BUSY_S) as (database, _):
                database.executemany(
                    "UPDATE device SET last_seen = max(coalesce(last_seen, 0), ?) WHERE id = ?",
                    [(when, device_id) for device_id, when in seen.items()],
                )
        except StoreError as error:
            now = time.monotonic()
            if now >= self._complain_at:
                self._complain_at = now + COMPLAINT_PERIOD_S
                log.warning("%s; when devices were last seen isn't written", error)
            return
        with self._seen_lock:
            for device_id, when in seen.items():
                if self._seen.get(device_id) == when:
                    del self._seen[device_id]

    def _opened(self, must_exist: bool) -> sqlite3.Connection:
        try:
            # SQLite has own ideas about "" and ":memory:", and makes what a link leads to for all.
            self._file = os.path.realpath(self._path)
            has_wal = os.path.exists(f"{self._file}-wal")
            if has_wal and not os.path.exists(self._file):  # SQLite would remove it
                raise StoreError(
                    f"the database {self._path}: it isn't there, and what belongs to it, "
                    f"{self._path}-wal, is; put it back, or move that away, too"
                )
            if must_exist:
                os.stat(self._file)
            else:
                # Not opened where it exists: to close it would end all locks of this process.
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                os.close(os.open(self._file, flags, 0o600))
        except FileExistsError:
            pass
        except (OSError, ValueError) as error:  # ValueError: a zero byte
            raise StoreError(
                f"the database {self._path}: {getattr(error, 'strerror', None) or error}"
            ) from None
        deadline = time.monotonic() + BUSY_S
        while True:
            connection = None
            try:
                connection = self._connect(BUSY_S)
                self._set_up(connection)
                return connection
            except BaseException as error:
                if connection is not None:
                    connection.close()
                if not isinstance(error, _ERRORS):
                    raise
                # While others open or close the file, SQLite doesn't always wait by itself.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise self._error(error) from None
            time.sleep(RETRY_S)

    def _connect(self, busy_s: float) -> sqlite3.Connection:
        return sqlite3.connect(
            self._file, timeout=busy_s, isolation_level=None, check_same_thread=False
        )

    def _set_up(self, database: sqlite3.Connection) -> None:
        # In this order: somebody else may be making the tables.
        tables = _value(database, "SELECT count(*) FROM sqlite_master")
        version = _value(database, "PRAGMA user_version")
        if tables and _value(database, "PRAGMA application_id") != APPLICATION_ID:
            raise StoreError(f"the database {self._path}: it belongs to another program")
        if version > VERSION:
            raise StoreError(
                f"the database {self._path}: a newer version of this program made it (its form is "
                f"{version}, this version knows {VERSION})"
            )
        if (mode := _value(database, "PRAGMA journal_mode = WAL")) != "wal":
            raise StoreError(f"the database {self._path}: its file system allows {mode} only")
        if not tables:
            with _transaction(database):
                if not _value(database, "SELECT count(*) FROM sqlite_master"):
                    for statement in SCHEMA.split(";"):
                        database.execute(statement)
                    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    database.execute(f"PRAGMA user_version = {VERSION}")
                    _grow_serial(database)
        if (found := _value(database, "PRAGMA quick_check(1)")) != "ok":
            raise sqlite3.DatabaseError(f"malformed: {found}")

    def _error(self, error: BaseException) -> StoreError:
        said = str(error)
        reason = next((text for word, text in _REASONS.items() if word in said), said)
        if reason == said:  # such as "disk I/O error" or "unable to open database file"
            try:
                disk = os.statvfs(os.path.dirname(self._file))
                if os.path.isdir(self._file):
                    reason = "it is a directory"
                elif not os.access(self._file, os.R_OK | os.W_OK):
                    reason = "it can't be read and written"
                elif disk.f_bavail * disk.f_frsize < LEAST_FREE_BYTES:
                    reason = _REASONS["is full"]
            except OSError as gone:
                reason = str(gone.strerror)
        return StoreError(f"the database {self._path}: {reason}")


# --- inside a transaction ----------------------------------------------------------------


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("PRAGMA synchronous = FULL")
    database.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def _value(database: sqlite3.Connection, statement: str) -> Any:
    """Return the only value that a statement gives."""
    with closing(database.execute(statement)) as rows:
        return rows.fetchone()[0]


def _device(row: Sequence[Any]) -> Device:
    device_id, hostname, aliases, *rest, secret = row
    device = Device(device_id, hostname, aliases.split(), *rest)
    device.has_secret = secret is not None
    return device


def _existing(database: sqlite3.Connection, device_id: str) -> Device:
    row = database.execute(f"{_DEVICE} WHERE id = ?", [device_id]).fetchone()
    if row is None:
        raise UsageError(f"no device has the id {shown(device_id)}")
    return _device(row)


def _unrevoked(database: sqlite3.Connection, device_id: str) -> Device:
    device = _existing(database, device_id)
    if device.revoked is not None:
        raise UsageError(f"device {device_id} ({device.hostname}) is revoked; add another one")
    return device


def _claim(database: sqlite3.Connection, device: Device) -> None:
    if (length := token_length(device)) > MAX_TEXT:
        raise UsageError(
            f"{1 + len(device.aliases)} names make a token of {length} characters, and relays take "
            f"at most {MAX_TEXT}"
        )
    for name in (device.hostname, *device.aliases):
        row = database.execute(
            "SELECT id, hostname FROM name JOIN device ON id = device_id WHERE name = ?", [name]
        ).fetchone()
        if row is not None:
            raise UsageError(f"{name} is a name of device {row[0]} ({row[1]})")
        database.execute("INSERT INTO name VALUES (?, ?)", [name, device.id])


def _refuse_tokens(database: sqlite3.Connection, now: int, device: Device) -> None:
    """Make the entry that refuses all tokens of the device that were made until now."""
    # Clocks go backwards: nothing that was done for the device may be later, nor any token of it.
    latest, valid = database.execute(
        """SELECT max(?, coalesce(last_seen, 0), coalesce((SELECT max(time) FROM audit
        WHERE device_id = id), 0)), ticket_valid FROM device WHERE id = ?""",
        [now, device.id],
    ).fetchone()
    before = max(latest + LEAD_S, device.tokens_before + 1)
    until = max(before + _number(database, "token_ttl"), valid) + SLACK_S
    database.execute("UPDATE device SET tokens_before = ? WHERE id = ?", [before, device.id])
    database.execute(
        """INSERT INTO revocation VALUES (?, ?, ?) ON CONFLICT (device_id) DO UPDATE SET
        created_before = excluded.created_before, until = max(until, excluded.until)""",
        [device.id, before, until],
    )
    _grow_serial(database)


def _grow_serial(database: sqlite3.Connection) -> None:
    # Larger than that of any database that was here before.
    milliseconds = int(time.time() * 1000)
    database.execute(
        "UPDATE number SET value = max(value + 1, ?) WHERE name = 'serial'", [milliseconds]
    )


def _number(database: sqlite3.Connection, name: str) -> int:
    value: int = database.execute("SELECT value FROM number WHERE name = ?", [name]).fetchone()[0]
    return value


def _note(database: sqlite3.Connection, now: int, device: Device, what: str) -> None:
    database.execute(
        "INSERT INTO audit (time, device_id, hostname, what) VALUES (?, ?, ?, ?)",
        [now, device.id, device.hostname, what],
    )


def _bytes(secret: str) -> bytes:
    """Return the bytes of a secret; none, which nobody has, where it is no secret."""
    return secret_bytes(secret) or b""


def _checked(hostname: str, aliases: Sequence[str]) -> list[str]:
    """Return the names in normal form, each once. Raises UsageError."""
    names = list(dict.fromkeys(map(normal_hostname, (hostname, *aliases))))
    for name in names:
        if not is_dns_name(name):
            raise UsageError(no_dns_name(name))
    return names
