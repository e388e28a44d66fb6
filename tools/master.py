"""The session master with relays, clients and devices: tables of what came of it.

python3 tools/master.py                  all of it; some 25 minutes
python3 tools/master.py --quick          less of everything; two minutes
python3 tools/master.py --only revoke    a part of it, see --help
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.endpoints import milliseconds, run_parts, say, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.master.serving import Answer
    from tests.masters import Account, Load, Masters
    from tests.support import Program

EXPLANATION = """\
revoke     how soon a live tunnel is cut; what an old secret, an old token, an old list are worth
renewal    50 requests a second for 5 minutes, with tokens that live for 60 s
published  the same at a relay of snitun 0.47.0; its client at ours
rotation   Fernet keys rotated and the master restarted, under load
crash      200 `device add` at once, SIGKILL meanwhile
full-disk  a database on a tmpfs of 1 MiB
start-200  200 clients ask at once
guess      10,000 wrong secrets, and the right one meanwhile

renewal, published and rotation need nginx and HAProxy, full-disk needs root."""
KIB = 1024
ADDS = 200
ASKERS = 200
GUESSERS = 50
HOSTNAME = "home.example.test"


# --- revocation --------------------------------------------------------------------------------


def revoke(folder: Path, is_quick: bool) -> str:
    """Live tunnels that end; secrets, tokens and lists that are worth nothing any more."""
    from tests.masters import Masters
    from tests.support import Endpoint, wait_until

    endpoint = Endpoint()
    rows: list[tuple[object, ...]] = [("", "tries", "ms (median / p99 / max)")]
    with contextlib.closing(endpoint), Masters(folder) as rig:
        master = rig.master()
        server = rig.relay()
        older = rig.ask("/v1/revocations").body
        for name, times in _cut(rig, endpoint.address, 2 if is_quick else 20).items():
            rows.append((name, len(times), milliseconds(times)))
        account = rig.add(HOSTNAME)
        client = rig.client(account, endpoint.address)
        credential, (token, _) = account.credential, _token(rig, account)
        assert is_accepted(rig.relay_port, token)
        rows.append(_check("the token of a device", "is accepted"))
        rig.rotate(account)
        wait_until(lambda: not is_accepted(rig.relay_port, token), "the token is refused")
        assert rig.token(credential).status == 401
        rows.append(_check("after `device rotate`: the old token, the old secret", "refused, 401"))
        client.wait_for("ready: ", 2)
        rows.append(_check("… its client, once it has the new secret", "is up again"))
        rig.device("revoke", account.device_id)
        client.wait_for("revoked")
        assert rig.token(account.credential).status == 403
        rows.append(_check("after `device revoke`: the right secret", "403"))
        master.stop()
        server.kill()
        server = rig.relay()
        assert not is_accepted(rig.relay_port, token)
        rows.append(_check("a relay restarted while the master is away: the token", "refused"))
        with replay(rig, older):
            server.wait_for("older")
            assert not is_accepted(rig.relay_port, token)
        rows.append(_check("an older list, signed by the master: the token", "refused"))
        assert rig.master()
        assert not is_accepted(rig.relay_port, token)
        rows.append(_check("the master is back: the token", "refused"))
    return table(*rows)


def _check(what: str, came: str) -> tuple[object, ...]:
    return (what, 1, came)


def _cut(rig: Masters, endpoint: str, count: int) -> dict[str, list[float]]:
    """Revoke devices with a live tunnel; return how soon what happened, in seconds."""
    from tests.support import Device

    times: dict[str, list[float]] = {}
    for number in range(count):
        account = rig.add(f"revoked{number}.example.test")
        with rig.client(account, endpoint) as client:
            with Device(rig.relay_port, "ECHO", hostname=account.hostname) as device:
                device.exchange()
                rig.device("revoke", account.hostname)
                begin = time.monotonic()
                with contextlib.suppress(ConnectionResetError):
                    assert device.sock.recv(1) == b""
                times.setdefault("`device revoke` to the end of a device's connection", []).append(
                    time.monotonic() - begin
                )
            client.wait_for("revoked")
            times.setdefault("… until the client says why", []).append(time.monotonic() - begin)
    return times


def _token(rig: Masters, account: Account) -> tuple[str, dict[str, str]]:
    """Return a token for a device, and the keys that it was asked for with."""
    from tests.masters import new_keys

    keys = new_keys()
    answer = rig.ask("/v1/token", account.credential, keys)
    assert answer.status == 200, answer.body
    return answer.fields["token"], keys


def is_accepted(port: int, token: str) -> bool:
    """Tell whether the relay answers this token with a challenge."""
    from tests.support import WAIT_S

    with socket.create_connection(("127.0.0.1", port), WAIT_S) as sock:
        sock.sendall(token.encode())
        try:
            return bool(sock.recv(1))
        except ConnectionResetError:
            return False


@contextlib.contextmanager
def replay(rig: Masters, text: bytes) -> Iterator[None]:
    """Answer everything in the master's place, and with its certificate, by this text."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(rig.certificate)
    listener = socket.create_server(("127.0.0.1", rig.port))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with (
                    contextlib.suppress(OSError),
                    context.wrap_socket(sock, server_side=True) as tls,
                ):
                    tls.recv(65536)
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n"
                    head += "Content-Type: application/jose\r\nConnection: close\r\n\r\n"
                    tls.sendall(head.encode() + text)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


# --- under load ------------------------------------------------------------------------------

LOAD_HEAD = (
    *("requests", "failed", "asked once more", "slowest, ms", "long ones", "cut", "tunnels"),
)


def load_row(load: Load, client: Program) -> tuple[object, ...]:
    """Return what came of a load."""
    return (
        *(load.requests, len(load.failed), load.repeated, f"{load.slowest_s * 1000:.0f}"),
        *(load.long, len(load.cut), client.output.count("ready: ")),
    )


@contextlib.contextmanager
def loaded(
    folder: Path, is_quick: bool, *options: str, published: str = ""
) -> Iterator[tuple[Masters, Program, Program, Load]]:
    """Run all of it, and 50 requests a second; yield the rig, the master, the client, the load.

    Long requests take 15 s: less than the 20 s that two tunnels have in common.
    """
    from tests.appliance import appliance
    from tests.masters import LONG_BYTES_PER_S, Load, Masters

    folder.mkdir(exist_ok=True)
    (folder / "rig").mkdir()
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(appliance(folder))
        size = LONG_BYTES_PER_S * (3 if is_quick else 15)
        (folder / "nginx" / "file" / "long").write_bytes(bytes(size))
        rig = stack.enter_context(Masters(folder / "rig", is_hasty=is_quick))
        if published:
            from tests.interop.peers import published_relay

            key = rig.key_file.read_text().strip()
            credentials: Any = SimpleNamespace(fernet_key=key, at=lambda server: None)
            program, rig.relay_port = published_relay(published, credentials)
            stack.enter_context(program)
        else:
            rig.relay()
        master = rig.master()
        client = rig.client(rig.add(HOSTNAME, *options), service.address("https"))
        load = Load(HOSTNAME, rig.relay_port, service.authority_file).begin()
        try:
            load.go_on()
            yield rig, master, client, load
        finally:
            load.end()


def assert_whole(load: Load) -> None:
    """Nobody has noticed anything."""
    for failures in (load.failed, load.cut):
        assert not failures, (len(failures), failures[:5])
    assert load.long


def renewal(folder: Path, is_quick: bool) -> str:
    """Tokens that expire again and again; nobody notices."""
    rows: list[tuple[object, ...]] = [("cipher", *LOAD_HEAD)]
    for cipher in ("aes-cbc", "aes-gcm"):
        with loaded(folder / cipher, is_quick, "--cipher", cipher) as (_, _, client, load):
            go_on(client, load, is_quick)
            rows.append((cipher, *load_row(load, client)))
            assert client.output.count("ready: ") > 1, client.output
            assert_whole(load)
        say(" ".join(map(str, rows[-1])))
    return table(*rows)


def published(folder: Path, is_quick: bool) -> str:
    """A published relay cuts the old tunnel at once; a published client at our relay."""
    from tests.interop.peers import NEWEST

    rows: list[tuple[object, ...]] = [("", *LOAD_HEAD)]
    with loaded(folder / "relay", is_quick, published=NEWEST) as (_, _, client, load):
        go_on(client, load, is_quick)
        rows.append((f"our client at the relay of {NEWEST}", *load_row(load, client)))
        for line in (*load.failed, *load.cut):
            say(line)
        # Whoever was under way at a takeover: none of the ten threads twice.
        takeovers = client.output.count("ready: ") - 1
        assert takeovers > 0, client.output
        assert len(load.failed) <= 10 * takeovers, load.failed[:50]
        assert len(load.cut) <= takeovers, load.cut
    exchanges = published_client_gets_through(folder, 10)
    rows.append((f"the client of {NEWEST} at our relay", exchanges, 0, 0, "", 0, 0, 1))
    return table(*rows)


def published_client_gets_through(folder: Path, exchanges: int) -> int:
    """Give a published client a token that curl has fetched; return how many exchanges it had."""
    from tests.appliance import find
    from tests.interop.peers import NEWEST, published_client
    from tests.masters import Masters, new_keys
    from tests.support import Device, Endpoint

    endpoint = Endpoint()
    (folder / "client").mkdir(parents=True)
    with contextlib.closing(endpoint), Masters(folder / "client", is_routed=True) as rig:
        master = rig.master()
        rig.relay()
        account, keys = rig.add(HOSTNAME), new_keys()
        command = (
            *(find("curl"), "--silent", "--show-error", "--fail", "--cacert"),
            *(str(rig.authority_file), "--json", json.dumps(keys)),
            *("--oauth2-bearer", account.credential, f"{rig.url}/v1/token"),
            *("--interface", "127.0.0.9"),
        )
        answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        # By the relay's route, and yet it is known who has asked.
        master.wait_for(f"127.0.0.9: device {account.device_id}")
        payload = SimpleNamespace(
            aes_key=bytes.fromhex(keys["aes_key"]),
            aes_iv=bytes.fromhex(keys["aes_iv"]),
            protocol_version=answer["protocol_version"],
            cipher=answer["cipher"],
        )
        credentials: Any = SimpleNamespace(payload=payload, token=answer["token"])
        with (
            published_client(NEWEST, credentials, rig.relay_port, endpoint),
            Device(rig.relay_port, "ECHO", hostname=HOSTNAME) as device,
        ):
            for _ in range(exchanges):
                device.exchange()
    return exchanges


def go_on(client: Program, load: Load, is_quick: bool) -> None:
    """Let the load go on for five minutes, or for three tunnels; end it."""
    if is_quick:
        client.wait_for("ready: ", 3)
        load.go_on()
    else:
        time.sleep(300)
    load.end()


def rotation(folder: Path, is_quick: bool) -> str:
    """docs/master.md's steps, one by one, while requests are made; then a restart."""
    from tests.masters import write_secret
    from tests.support import wait_until

    rows: list[tuple[object, ...]] = [("so far", *LOAD_HEAD)]
    with loaded(folder, is_quick) as (rig, master, client, load):
        account = rig.add(f"other.{HOSTNAME}")

        def step(name: str) -> None:
            # By then the client has had a token that was made after this step.
            client.wait_for("ready: ", client.output.count("ready: ") + 2, 120)
            load.go_on()
            rows.append((name, *load_row(load, client)))
            say(" ".join(map(str, rows[-1])))

        former = rig.key_file.read_text()
        step("one key")
        write_secret(rig.key_file, rig.command("new-key") + former)
        newest = rig.key_file.read_text().splitlines()[0]
        wait_until(lambda: is_signed(newest, _token(rig, account)[0]), "the new key signs")
        step("a line on top, and all tokens renewed")
        write_secret(rig.key_file, newest)
        removed = seal_by(former)
        wait_until(lambda: not is_accepted(rig.relay_port, removed), "the old key is forgotten")
        step("the last line removed")
        for name in ("stopped", "killed"):
            if name == "killed":
                master.kill()
            else:
                assert master.stop() == 0, master.output
            load.go_on()
            master = rig.master()
            step(f"the master {name}, and back")
        load.end()
        assert_whole(load)
    return table(*rows)


def is_signed(key: str, token: str) -> bool:
    """Tell whether a token is of this Fernet key."""
    from snitun_sync.protocol.aes import load
    from snitun_sync.protocol.token import Fernet

    return Fernet([key], load()).open(token.encode()) is not None


def seal_by(keys: str) -> str:
    """Return a token that somebody makes with this key."""
    from snitun_sync.protocol.aes import load
    from snitun_sync.protocol.token import Fernet, Payload

    payload = Payload(
        valid=time.time() + 3600, hostname=HOSTNAME, aes_key=bytes(32), aes_iv=bytes(16)
    )
    return Fernet(keys.split(), load()).seal(payload.to_json(), time.time(), os.urandom)


# --- the database ------------------------------------------------------------------------------


def crash(folder: Path, is_quick: bool) -> str:
    """Many `device add` at once; the master and every fourth of them are killed meanwhile."""
    from tests.masters import Masters, run_master
    from tests.support import PROJECT, in_threads, module, wait_until

    count = 24 if is_quick else ADDS
    printed: dict[str, str] = {}
    with Masters(folder) as rig:
        master = rig.master()
        lock, killed = threading.Lock(), 0

        def add(number: int) -> None:
            nonlocal killed
            hostname = f"device{number}.example.test"
            command = module(
                "snitun_sync.master", "device", "add", hostname, "--database", rig.database
            )
            # In a file, as a shell would: what was printed is there, however it ends.
            output = folder / f"{number}.out"
            with open(output, "w") as file:
                process = subprocess.Popen(
                    list(map(str, command)),
                    cwd=PROJECT,
                    stdout=file,
                    stderr=subprocess.DEVNULL,
                )
                if number % 4 == 0:
                    # Somewhere on its way; the later ones of them in the middle of writing.
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(number * 0.08)
                        return
                    process.kill()
                    killed += 1
                process.wait()

        def job(number: int) -> None:
            if number < count:
                add(number)
                return
            wait_until(lambda: any(folder.glob("*.out")), "the first one")
            wait_until(lambda: any(p.stat().st_size for p in folder.glob("*.out")), "one is done")
            master.kill()

        in_threads(count + 1, job)
        for path in folder.glob("*.out"):
            if text := path.read_text().strip():
                with lock:
                    printed[f"device{path.stem}.example.test"] = text
        with contextlib.closing(sqlite3.connect(rig.database)) as database:
            (integrity,) = database.execute("PRAGMA integrity_check").fetchone()
        assert integrity == "ok"
        rig.master()
        answers = Counter(rig.token(credential).status for credential in printed.values())
        assert set(answers) == {200}, answers
        listed = json.loads(rig.device("list", "--json"))
        found = {device["hostname"] for device in listed}
        assert set(printed) <= found
        # A killed one is there as a whole, or not at all: its name is free, or taken.
        for number in range(0, count, 4):
            hostname = f"device{number}.example.test"
            done = run_master("device", "add", hostname, "--database", rig.database)
            assert (done.returncode == 0) == (hostname not in found), done.stderr
        return table(
            ("`device add`", "killed", "printed", "… of them get a token", "integrity_check"),
            (count, killed, len(printed), answers[200], integrity),
        )


def full_disk(folder: Path, is_quick: bool) -> str:
    """Fill a disk of 1 MiB, see what is said, and make room again."""
    from tests.masters import Masters, run_master
    from tests.support import Program, wait_until

    place = folder / "disk"
    place.mkdir()
    script = f"mount -t tmpfs -o size=1m,mode=700 tmpfs {place} && echo mounted && exec sleep 3600"
    rows: list[tuple[object, ...]] = [("step", "came of it")]
    with Program("unshare", "--mount", "sh", "-c", script) as disk, Masters(folder) as rig:
        disk.wait_for("mounted")
        inside = ("nsenter", "--target", str(disk.pid), "--mount", "--wd=/")
        rig.database = place / "snitun.db"
        master = rig.master(before=inside)
        filler, size = place / "filler", (750 if is_quick else 300) * KIB
        subprocess.run([*inside, "fallocate", "-l", str(size), str(filler)], check=True)
        printed: list[str] = []
        while True:
            hostname = f"device{len(printed)}.example.test"
            done = run_master("device", "add", hostname, "--database", rig.database, before=inside)
            if done.returncode:
                break
            printed.append(done.stdout.strip())
            assert len(printed) < 2000, "it never gets full"
        rows.append(("`device add` until the disk is full", f"{len(printed)} added"))
        assert (done.returncode, done.stdout) == (74, ""), done.stderr
        rows.append((f"the next one: exit code {done.returncode}", done.stderr.strip()))
        statuses = Counter(rig.token(credential).status for credential in printed)
        rows.append(("tokens for those that were added", _counted(statuses)))
        health = rig.ask("/healthz")
        rows.append(("/healthz", f"{health.status} {health.body.decode().strip()}"))
        subprocess.run([*inside, "rm", str(filler)], check=True)
        hostname = f"device{len(printed)}.example.test"
        done = run_master("device", "add", hostname, "--database", rig.database, before=inside)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.strip())
        rows.append(("room again: the same `device add`", "added"))
        statuses = Counter()
        for credential in printed:
            answer = wait_until(lambda c=credential: _granted(rig, c), "a token")  # type: ignore[misc]
            statuses[answer.status] += 1
        rows.append(("tokens for all", _counted(statuses)))
        for line in master.output.splitlines():
            if "full" in line or "disk" in line:
                rows.append(("the service's log", line))
                break
    return table(*rows)


def _granted(rig: Masters, credential: str) -> Answer | None:
    answer = rig.token(credential)
    return answer if answer.status == 200 else None


def _counted(statuses: Counter[int]) -> str:
    return ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))


# --- many ------------------------------------------------------------------------------------


def add_many(rig: Masters, count: int) -> list[str]:
    """Add devices without a process for each; return their credentials."""
    from snitun_sync.master.store import Store

    store = Store(str(rig.database))
    try:
        credentials = []
        for number in range(count):
            device, secret = store.add(
                f"device{number}.example.test",
                [],
                throttling=None,
                cipher="aes-cbc",
                protocol_version=2,
            )
            credentials.append(f"{device.id}.{secret}")
        return credentials
    finally:
        store.close()


def start_200(folder: Path, is_quick: bool) -> str:
    """All ask at the same moment, each on a connection of its own."""
    from tests.masters import Masters
    from tests.support import in_threads

    with Masters(folder) as rig:
        rig.master()
        credentials = add_many(rig, ASKERS)
        barrier = threading.Barrier(ASKERS)
        rows: list[tuple[object, ...]] = [
            ("turn", "clients", "tokens", "each, ms (median / p99 / max)", "all, s")
        ]
        for turn in range(1, 2 if is_quick else 6):
            times: list[float] = []

            def job(number: int, times: list[float] = times) -> None:
                barrier.wait()
                begin = time.monotonic()
                answer = rig.token(credentials[number])
                times.append(time.monotonic() - begin)
                assert answer.status == 200, answer.body

            begin = time.monotonic()
            in_threads(ASKERS, job)
            took_s = time.monotonic() - begin
            rows.append((turn, ASKERS, len(times), milliseconds(times), f"{took_s:.2f}"))
    return table(*rows)


def guess(folder: Path, is_quick: bool) -> str:
    """Wrong secrets for one device, from the address that its client has, too."""
    from snitun_sync.protocol.device import new_secret
    from tests.masters import Masters, ask, new_keys
    from tests.support import in_threads

    count = 500 if is_quick else 10_000
    statuses: Counter[int] = Counter()
    right: list[float] = []
    is_over = threading.Event()
    with Masters(folder) as rig:
        master = rig.master()
        account = rig.add(HOSTNAME)
        numbers, lock = iter(range(count)), threading.Lock()
        guessing = [True] * GUESSERS

        def guesser() -> None:
            with contextlib.closing(rig.connect()) as connection:
                for _ in numbers:
                    wrong = f"{account.device_id}.{new_secret(os.urandom)}"
                    answer = ask(connection, "/v1/token", wrong, new_keys())
                    with lock:
                        statuses[answer.status] += 1

        def owner() -> None:
            while not is_over.wait(0.2):
                begin = time.monotonic()
                answer = rig.token(account.credential)
                right.append(time.monotonic() - begin)
                assert answer.status == 200, answer.body

        def job(number: int) -> None:
            if number == GUESSERS:
                owner()
                return
            try:
                guesser()
            finally:  # also where it has failed: the owner doesn't wait for its answers
                guessing.pop()
                if not guessing:
                    is_over.set()

        begin = time.monotonic()
        in_threads(GUESSERS + 1, job)
        took_s = time.monotonic() - begin
        lines = master.output.count("\n")
    assert set(statuses) <= {401, 429}, statuses
    assert right
    return table(
        (
            *("wrong secrets", "answers", "took, s"),
            *("the right one got a token", "after, ms (median / p99 / max)", "lines in the log"),
        ),
        (
            *(count, _counted(statuses), f"{took_s:.0f}"),
            *(f"{len(right)} of {len(right)} times", milliseconds(right), lines),
        ),
    )


PARTS: dict[str, Callable[[Path, bool], str]] = {
    part.__name__.replace("_", "-"): part
    for part in (revoke, renewal, published, rotation, crash, full_disk, start_200, guess)
}


def main() -> int:
    """Run what the arguments ask for; return the exit code."""
    description = "The session master with relays and clients: tables of what came of it."
    return run_parts(description, EXPLANATION, PARTS)


if __name__ == "__main__":
    sys.exit(main())
