"""The relay follows the session master's list of revoked tokens."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable

import pytest
import trustme
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from snitun_sync.errors import UsageError
from snitun_sync.net.openmetrics import render
from snitun_sync.protocol import frame
from snitun_sync.protocol.aes import load
from snitun_sync.protocol.device import new_id
from snitun_sync.protocol.hello import ALERT_UNRECOGNIZED_NAME
from snitun_sync.protocol.revocations import Revocations
from snitun_sync.protocol.token import Fernet, new_fernet_key
from snitun_sync.server import Server
from snitun_sync.server import revocations as revocations_module
from snitun_sync.status_command import table
from tests.services import Raw, raw_client
from tests.support import (
    HOSTNAME,
    PROJECT,
    WAIT_S,
    Credentials,
    Device,
    Endpoint,
    Program,
    client,
    client_hello,
    free_port,
    module,
    relay,
    wait_until,
)

FOREVER = 4_000_000_000
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations_module, "LEAST_PAUSE_S", 0.05)


class Master:
    """A session master's list over HTTPS; what it answers can be anything else, too."""

    def __init__(self, folder: Path, key: str) -> None:
        self.key, self.serial = key, 1
        self.entries: dict[str, tuple[int, int]] = {}
        self.answer: Callable[[], Answer] | None = None
        """What is answered instead of the list, at once."""
        self.asked: list[dict[str, str]] = []
        """The fields of all requests."""
        self.targets: set[str] = set()
        self._changed = threading.Condition()
        self._is_over = False
        authority = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca_file)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost", "master.example.test").configure_cert(self._context)
        self.port = free_port()
        self._http: ThreadingHTTPServer | None = None
        self._thread = threading.Thread()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def __enter__(self) -> Master:
        master = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                master.targets.add(self.path)
                master.asked.append({name.lower(): text for name, text in self.headers.items()})
                status, fields, body = master._answer(self.headers.get("If-None-Match", ""))
                self.send_response(status)
                for name, text in {"Content-Length": str(len(body)), **fields}.items():
                    self.send_header(name, text)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_request(self, *arguments: object) -> None:
                pass

        class Http(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: object) -> None:
                pass

            def finish_request(self, request: Any, client_address: Any) -> None:
                request.settimeout(WAIT_S)
                with contextlib.suppress(OSError):
                    tls = master._context.wrap_socket(request, server_side=True)
                    with tls:
                        Handler(tls, client_address, self)

        self._is_over = False
        self._http = Http(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._http is not None
        self._http.shutdown()
        self._thread.join(WAIT_S)
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._http.server_close()

    @property
    def etag(self) -> str:
        return f'"{self.serial}-{self.key[:4]}"'

    @property
    def list(self) -> bytes:
        return Revocations(self.serial, int(time.time()), self.entries).sign(self.key).encode()

    def _answer(self, etag: str) -> Answer:
        with self._changed:
            while etag == self.etag and self.answer is None and not self._is_over:
                self._changed.wait(WAIT_S)
            if self.answer is not None:
                return self.answer()
            if etag == self.etag:
                return 304, {"ETag": etag}, b""
            return 200, {"ETag": self.etag, "Content-Type": "application/jose"}, self.list

    def change(self, **what: Any) -> None:
        """Change attributes, and wake who waits."""
        with self._changed:
            for name, value in what.items():
                setattr(self, name, value)
            self._changed.notify_all()

    def revoke(self, *device_ids: str, before: int = 0) -> None:
        """Refuse the tokens of devices."""
        before = before or int(time.time()) + 1
        entries = {**self.entries, **dict.fromkeys(device_ids, (before, FOREVER))}
        self.change(entries=entries, serial=self.serial + 1)


class Known(Credentials):
    """A ticket of a device that the session master knows."""

    def __init__(self, folder: Path, name: str = HOSTNAME, *, created: float = 0, **more: Any):
        super().__init__(folder, hostname=name, **more)
        self.device_id = self.payload.device_id = new_id(os.urandom)
        self.seal(created or time.time())

    def seal(self, created: float) -> None:
        """Make the token anew."""
        fernet = Fernet([self.fernet_key], load())
        self.token = fernet.seal(self.payload.to_json(), created, os.urandom)


@pytest.fixture
def known(tmp_path: Path) -> Known:
    return Known(tmp_path)


@pytest.fixture
def master(tmp_path: Path, known: Known) -> Iterator[Master]:
    with Master(tmp_path, known.fernet_key) as master:
        yield master


def new_server(master: Master, folder: Path | str = "", **options: Any) -> Server:
    return Server(
        options.pop("keys", [master.key]),
        ["127.0.0.1:0"],
        revocations=options.pop("url", master.url),
        revocations_ca=master.ca_file,
        state_dir=str(folder),
        **options,
    )


@contextlib.contextmanager
def following(master: Master, folder: Path | str = "", **options: Any) -> Iterator[Server]:
    """Run a relay; it knows the list."""
    with new_server(master, folder, **options) as server:
        wait_until(lambda: figures(server)["serial"] == master.serial, "the relay has the list")
        yield server


def figures(server: Server) -> dict[str, Any]:
    assert server.follower is not None
    return server.follower.report()


@contextlib.contextmanager
def connected(known: Credentials, server: Server) -> Iterator[Raw]:
    with raw_client(known, server.ports[0]) as raw:
        wait_until(lambda: known.payload.hostname in server.routes)
        yield raw


def is_refused(known: Credentials, server: Server) -> bool:
    """Tell whether a client gets no challenge."""
    with socket.create_connection(("127.0.0.1", server.ports[0]), WAIT_S) as sock:
        sock.sendall(known.token.encode())
        try:
            return sock.recv(1) == b""
        except ConnectionResetError:
            return True


# --- what a list does ---------------------------------------------------------------------


def test_a_revoked_tunnel_is_cut_with_its_devices(
    master: Master, known: Known, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Known(tmp_path, "other.example.test", fernet_key=known.fernet_key)
    with following(master) as server, connected(known, server) as raw:
        with connected(other, server) as beside, Device(server.ports[0]) as device:
            device.sock.sendall(client_hello())
            assert raw.receive_flow(frame.NEW)
            # Held for a device that takes nothing: it is cut as well.
            device.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            channel = next(iter(server.bridges.all)).channel.id
            raw.send(frame.DATA, channel, data=bytes(8_000_000))
            wait_until(lambda: server.bridges.held_bytes > 0)
            master.revoke(known.device_id)
            assert raw.receive_flow(frame.GOAWAY)[1][:4] == frame.REVOKED
            with pytest.raises(EOFError):
                raw.receive()
            with pytest.raises(ConnectionResetError):
                while device.sock.recv(65536):
                    pass
            wait_until(lambda: not server.bridges.all and not server.bridges.held_bytes)
            assert set(server.routes) == {"other.example.test"}
            raw.sock.close()
            wait_until(lambda: len(server.registrations) == len(server.tunnels) == 1)
            # It is as if the name had never been there.
            with socket.create_connection(("127.0.0.1", server.ports[0]), WAIT_S) as late:
                late.sendall(client_hello())
                assert late.recv(100) == ALERT_UNRECOGNIZED_NAME
            assert is_refused(known, server)
            wait_until(lambda: server.refused_clients == 1)
            assert f"the token for {HOSTNAME}, device {known.device_id}, was rev" in caplog.text
            beside.send(frame.PING, b"still there.....", b"ping")
            assert beside.receive_flow(frame.PING)[0] == b"still there....."
        report = figures(server)
        assert (report["refused_tokens"], report["cut_tunnels"], report["entries"]) == (1, 1, 1)
        assert not is_refused(other, server)


def test_a_former_tunnel_is_cut_as_well_by_a_relay_that_drains(
    master: Master, known: Known
) -> None:
    with following(master) as server, connected(known, server) as former:
        with Device(server.ports[0]) as device:
            device.sock.sendall(client_hello())
            assert former.receive_flow(frame.NEW)
            with connected(known, server) as raw:
                wait_until(lambda: server.takeovers == 1)
                end = threading.Thread(target=server.stop, args=(3600,))
                end.start()
                wait_until(server.ready)
                assert len(server.bridges.all) == 1
                master.revoke(known.device_id)
                former.wait_for_end()
                raw.wait_for_end()
            with pytest.raises(ConnectionResetError):
                device.sock.recv(1)
            end.join(WAIT_S)
        assert figures(server)["cut_tunnels"] == 2


def test_the_token_made_after_rotate_in_the_same_second_counts(
    master: Master, known: Known
) -> None:
    now = int(time.time())
    with following(master) as server:
        known.seal(now)
        with connected(known, server) as old:
            master.revoke(known.device_id, before=now + 1)
            old.wait_for_end()
        assert is_refused(known, server)
        known.seal(now + 1)
        with connected(known, server) as new:
            master.revoke("a" * 16)
            wait_until(lambda: figures(server)["serial"] == 3)
            new.send(frame.PING, b"still there.....", b"ping")
            assert new.receive_flow(frame.PING)[0] == b"still there....."


def test_a_client_in_its_handshake_and_one_without_an_id(
    master: Master, known: Known, tmp_path: Path
) -> None:
    ticket = Credentials(tmp_path, hostname="x.example.test", fernet_key=known.fernet_key)
    with following(master) as server, connected(ticket, server):
        with socket.create_connection(("127.0.0.1", server.ports[0]), WAIT_S) as sock:
            sock.sendall(known.token.encode())
            assert len(sock.recv(100)) == 32  # the challenge
            master.revoke(known.device_id)
            assert sock.recv(100) == b""
        assert set(server.routes) == {"x.example.test"}
        wait_until(lambda: len(server.registrations) == 1)


def test_our_client_is_told(master: Master, known: Known, endpoint: Endpoint) -> None:
    arguments = ("--revocations", master.url, "--revocations-ca", master.ca_file)
    program, port = relay(known, *arguments)
    with program:
        program.wait_for("revocations: serial 1, 0 devices")
        known.at(f"127.0.0.1:{port}")
        with client(known, endpoint.address) as peer:
            master.revoke(known.device_id)
            peer.wait_for("the token was revoked")
            program.wait_for(f"its token was revoked, device {known.device_id}")


# --- how it is followed ---------------------------------------------------------------------


def test_polls_wait_and_say_what_is_known(master: Master) -> None:
    with following(master):
        wait_until(lambda: len(master.asked) == 2)
        assert master.targets == {"/v1/revocations?wait=30"}
        assert "if-none-match" not in master.asked[0]
        assert master.asked[1]["if-none-match"] == '"1-' + master.key[:4] + '"'


def test_after_news_it_is_asked_again_at_once(
    master: Master, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations_module, "LEAST_PAUSE_S", 3600.0)
    with following(master):
        for count in (2, 3):
            wait_until(lambda count=count: len(master.asked) == count)  # type: ignore[misc]
            master.revoke(known.device_id)


def test_a_url_with_a_path_is_taken_as_it_is(master: Master) -> None:
    with following(master, url=f"{master.url}/other/list"):
        assert master.targets == {"/other/list?wait=30"}


def test_the_end_ends_the_poll_that_is_under_way(master: Master) -> None:

    def workers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "snitun-worker"]

    with following(master):
        wait_until(lambda: len(master.asked) == 2)
        assert workers()
    wait_until(lambda: not workers(), "the worker is gone, though its poll had time left")


@pytest.mark.parametrize("status", [200, 304])
def test_immediate_answers_make_no_busy_loop(
    master: Master, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast a session master answers, the next poll begins a while after the last one."""
    monkeypatch.setattr(revocations_module, "LEAST_PAUSE_S", 0.2)
    times: list[float] = []

    def answer() -> Answer:
        times.append(time.monotonic())
        return (200, {}, master.list) if status == 200 or len(times) == 1 else (304, {}, b"")

    master.answer = answer
    with following(master):
        wait_until(lambda: len(times) >= 6)
    # More than so many would have come without a pause; a slow machine only lets fewer come.
    assert times[5] - times[0] > 4 * 0.2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, {}, b"nothing"), "answered with status 404"),
        ((302, {"Location": "/v1/revocations"}, b""), "answered with status 302"),
        ((500, {}, b"x" * 100_000), "answered with status 500"),
        ((200, {}, b""), "no list of revocations"),
        ((200, {}, b"<html>log in</html>"), "no list of revocations"),
        ((200, {}, "wrong key"), "matches none of the Fernet keys"),
        ((200, {}, "cut"), "matches none of the Fernet keys"),
        ((200, {}, "older"), "an older list: serial 4, and 5 is known"),
        ((200, {"Content-Length": "99"}, b"short"), "lacks its last 94 bytes|no whole answer"),
        ((200, {"Content-Length": str(2**40)}, b""), f"{2**40} bytes, expected at most"),
        ((200, {}, b"\xff\0\n" * 1000), "no list of revocations"),
    ],
)
def test_what_is_no_list_changes_nothing(
    master: Master,
    known: Known,
    answer: Any,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    master.serial = 4
    older = master.list
    master.serial = 5
    master.entries = {known.device_id: (FOREVER, FOREVER)}
    status, fields, body = answer
    others = {
        "wrong key": lambda: Revocations(9, 9, {}).sign(new_fernet_key(os.urandom)).encode(),
        "cut": lambda: master.list[:-3],
        "older": lambda: older,
    }
    body = others[body]() if isinstance(body, str) else body
    with following(master) as server:
        master.change(answer=lambda: (status, fields, body))
        wait_until(lambda: figures(server)["failure"])
        assert re.search(words, figures(server)["failure"])
        assert figures(server)["serial"] == 5
        assert figures(server)["away_since"] is not None
        assert "no news of revocations since" in server.summary()
        assert is_refused(known, server)
        master.change(answer=None, entries={}, serial=6)
        wait_until(lambda: figures(server)["serial"] == 6)
        report = figures(server)
        assert report["failure"] is report["away_since"] is None
        assert report["refused_lists"] >= (status == 200 and "Content-Length" not in fields)
        assert "is back" in caplog.text
        assert not is_refused(known, server)


def test_a_master_that_is_away(
    tmp_path: Path, known: Known, caplog: pytest.LogCaptureFixture
) -> None:
    master = Master(tmp_path, known.fernet_key)
    with new_server(master) as server:
        wait_until(lambda: figures(server)["failure"])
        assert "Connection refused" in figures(server)["failure"]
        assert "until one comes from" in caplog.text
        follower = server.follower
        assert follower is not None
        since, failed_each_s = follower.away_since, follower._pause_s
        wait_until(lambda: follower._pause_s > failed_each_s)  # it has failed again
        assert follower.away_since == since
        with connected(known, server) as raw:
            master.revoke(known.device_id)
            with master:
                raw.wait_for_end()
                assert is_refused(known, server)
    with new_server(master, url=f"https://127.0.0.1:{master.port}") as server, master:
        wait_until(lambda: figures(server)["failure"])
        wait_until(lambda: "isn't trusted" in (figures(server)["failure"] or ""))


def test_a_list_signed_by_a_key_that_comes_later(
    master: Master, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations_module, "LONGEST_PAUSE_S", 3600.0)
    with following(master) as server:
        former, new = master.key, new_fernet_key(os.urandom)
        monkeypatch.setattr(revocations_module, "LEAST_PAUSE_S", 3600.0)
        server.follower._pause_s = 3600.0  # type: ignore[union-attr]
        master.change(key=new)
        master.revoke(known.device_id)
        wait_until(lambda: "none of the Fernet keys" in (figures(server)["failure"] or ""))
        assert not is_refused(known, server)
        server.reconfigure([new, former])
        wait_until(lambda: figures(server)["serial"] == 2, "asked again as the keys changed")
        assert is_refused(known, server)


@pytest.mark.parametrize("is_used", [True, False])
def test_the_master_behind_a_route_of_the_same_relay(
    tmp_path: Path, known: Known, is_used: bool
) -> None:
    """Its list counts while the relay drains, too; but its own poll isn't waited for."""
    master, port = Master(tmp_path, known.fernet_key), free_port()
    server = Server(
        [master.key],
        [f"127.0.0.1:{port}"],
        revocations=f"https://localhost:{port}",
        revocations_ca=master.ca_file,
        routes=[f"localhost=127.0.0.1:{master.port}"],
    )
    with master, server:
        with connected(known, server) as raw:
            wait_until(lambda: figures(server)["serial"] == 1 and len(master.asked) == 2)
            end = threading.Thread(target=server.stop, args=(3600,))
            if is_used:
                with Device(port) as device:
                    device.sock.sendall(client_hello())
                    assert raw.receive_flow(frame.NEW)
                    end.start()
                    wait_until(server.ready)
                    master.revoke(known.device_id)
                    raw.wait_for_end()
            else:
                end.start()
        assert server.wait(WAIT_S)
        end.join(WAIT_S)


# --- what is kept -----------------------------------------------------------------------------


def test_the_list_outlives_the_relay(tmp_path: Path, known: Known) -> None:
    folder = tmp_path / "state" / "relay"
    master = Master(tmp_path, known.fernet_key)
    master.revoke(known.device_id)
    with master, following(master, folder):
        kept = folder / "revocations"
        assert kept.read_bytes().count(b".") == 2
        assert kept.stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o777 == 0o700
        assert [path.name for path in folder.iterdir()] == ["revocations"]
    with new_server(master, folder) as server:
        assert figures(server)["serial"] == 2
        wait_until(lambda: figures(server)["failure"])
        assert is_refused(known, server)
        master.serial, master.entries = 1, {}
        with master:
            wait_until(lambda: "an older list" in (figures(server)["failure"] or ""))
        assert is_refused(known, server)


@pytest.mark.parametrize("damage", ["cut", "empty", "key", "folder"])
def test_a_kept_list_that_can_not_be_used(
    tmp_path: Path, known: Known, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    master = Master(tmp_path, known.fernet_key)
    master.revoke(known.device_id)
    kept = tmp_path / "revocations"
    kept.write_bytes(master.list)
    if damage == "cut":
        kept.write_bytes(master.list[:-1])
    elif damage == "empty":
        kept.write_bytes(b"")
    elif damage == "folder":
        kept.unlink()
        kept.mkdir()
    keys = [new_fernet_key(os.urandom)] if damage == "key" else [master.key]
    with new_server(master, tmp_path, keys=keys) as server:
        assert caplog.text.count(f"{kept} isn't used: ") == 1
        assert figures(server)["serial"] is None


def test_a_folder_that_can_not_be_written(
    master: Master, known: Known, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full, or something is in the way: what is known counts all the same."""
    folder = tmp_path / "state"
    folder.write_text("no folder")
    with following(master, folder) as server:
        for _ in range(2):
            master.revoke(known.device_id)
            wait_until(lambda: figures(server)["serial"] == master.serial)
        assert is_refused(known, server)
        assert caplog.text.count("can't be kept in") == 1
        folder.unlink()
        master.revoke(known.device_id)
        wait_until((folder / "revocations").exists)


def test_a_full_disk(master: Master, known: Known, tmp_path: Path) -> None:
    """A half is never left behind, and the former list stays."""
    kept = tmp_path / "revocations"
    with following(master, tmp_path) as server:
        wait_until(kept.exists)
        former = kept.read_bytes()
        (tmp_path / "revocations.new").symlink_to("/dev/full")
        master.revoke(known.device_id)
        wait_until(lambda: figures(server)["serial"] == 2)
        assert kept.read_bytes() == former
        assert not os.path.lexists(tmp_path / "revocations.new")


# --- many -------------------------------------------------------------------------------------


def test_many_entries_hold_nobody_up(master: Master, known: Known) -> None:
    ids = [new_id(os.urandom) for _ in range(5000)]
    with following(master) as server, connected(known, server) as raw:
        master.revoke(*ids)
        wait_until(lambda: figures(server)["entries"] == len(ids))
        raw.send(frame.PING, b"still there.....", b"ping")
        assert raw.receive_flow(frame.PING)[0] == b"still there....."
        master.revoke(known.device_id)
        raw.wait_for_end()


def test_figures_and_rows(master: Master) -> None:
    with following(master) as server:
        text = render(server.metrics())
        assert list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
        assert "snitun_server_revocations_serial 1\n" in text
        assert "snitun_server_revocations_current 1\n" in text
        rows = [row for row in table(server.report()) if row.startswith("revocations")]
        assert rows == [f"revocations   serial 1, 0 devices; refused 0, cut 0, {master.url}"]
        master.change(answer=lambda: (503, {}, b""))
        wait_until(lambda: figures(server)["failure"])
        assert "snitun_server_revocations_current 0\n" in render(server.metrics())
        row = next(row for row in table(server.report()) if row.startswith("revocations"))
        assert "; AWAY since 2" in row
        assert "status 503" in row


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"revocations": "http://master.example"}, "--revocations: http://"),
        ({"revocations": "master.example"}, "--revocations: 'master.example'; expected https"),
        ({"revocations_ca": "x"}, "--revocations-ca: only with --revocations"),
    ],
)
def test_options(known: Known, options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Server([known.fernet_key], **options)  # type: ignore[arg-type]


def test_the_state_folder_of_systemd(known: Known) -> None:
    command = module("snitun_sync.server", "--check", "--fernet-key-file", known.key_file)
    for name, shown in (("STATE_DIRECTORY", "default"), ("SNITUN_STATE_DIR", "$SNITUN_STATE_DIR")):
        with Program(*command, env={name: "/var/lib/a"}) as program:
            assert program.wait() == 0
            assert f"state-dir = /var/lib/a   ({shown})" in program.output


def test_who_asks_for_none_of_it_loads_none_of_it(known: Known) -> None:
    code = (
        "import sys; from snitun_sync.server import Server; "
        "Server([sys.argv[1]], ['127.0.0.1:0']).start().stop(); print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, known.fernet_key]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    ours = {f"snitun_sync.{name}" for name in ("server.routes", "server.revocations", "net.https")}
    assert not ({"ssl", "http", *ours} & set(done.stdout.split()))


def test_keys_are_read_again_when_the_file_changes(known: Known, endpoint: Endpoint) -> None:
    program, port = relay(known)
    former = known.key_file.read_text()
    with program:
        known.at(f"127.0.0.1:{port}")
        known.fernet_key = new_fernet_key(os.urandom)
        known.seal(time.time())
        known.at(f"127.0.0.1:{port}")
        known.key_file.write_text(f"{known.fernet_key}\n{former}")
        program.wait_for("the Fernet keys were read again")
        with client(known, endpoint.address):
            known.key_file.write_text("no key\n")
            program.wait_for("the former keys stay")
            known.key_file.unlink()
            program.wait_for("the former keys stay", 2)
            assert program.output.count("the former keys stay") == 2
