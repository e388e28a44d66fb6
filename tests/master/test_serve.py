"""`snitun-master serve`: real sockets, real TLS, slow and odd clients, files that change."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snitun_sync.master.connection import HEAD_BYTES
from snitun_sync.master.service import CONNECTIONS
from snitun_sync.master.store import Store
from snitun_sync.protocol.aes import load
from snitun_sync.protocol.proxy_protocol import version_1, version_2
from snitun_sync.protocol.revocations import Revocations
from snitun_sync.protocol.token import Fernet, new_fernet_key
from tests.master.serving import KEYS, Serving, read_all
from tests.support import (
    PROJECT,
    WAIT_S,
    has_more_than,
    in_threads,
    module,
    process_counts,
    wait_until,
)

LIST = "/v1/revocations"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("plain"), has_tls=False) as serving:
        yield serving
        assert "defect" not in serving.program.output
        assert "Traceback" not in serving.program.output


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("secured")) as serving:
        yield serving
        assert "defect" not in serving.program.output
        assert "Traceback" not in serving.program.output


@pytest.fixture(params=["plain", "secured"])
def serving(request: pytest.FixtureRequest) -> Serving:
    """One without and one with TLS; tests leave them as they were."""
    found: Serving = request.getfixturevalue(request.param)
    return found


def request(serving: Serving, body: bytes = b"", **more: str) -> bytes:
    """Return a request for a token, as bytes."""
    body = body or json.dumps(KEYS).encode()
    fields = {
        "Host": "localhost",
        "Authorization": f"Bearer {serving.alice.id}.{serving.alices}",
        "Content-Length": str(len(body)),
        **more,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return b"POST /v1/token HTTP/1.1\r\n" + lines.encode("latin-1") + b"\r\n" + body


def status(answer: bytes) -> int:
    """Return the status of an answer that is whole."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines[1:])
    assert lines[0].startswith("HTTP/1.1 ")
    assert fields["connection"] == "close"
    if int(lines[0].split()[1]) >= 400:
        assert set(json.loads(body)) == {"message"}
    assert len(body) == int(fields["content-length"])
    return int(lines[0].split()[1])


# --- what is asked ---------------------------------------------------------------------


def test_a_token_and_the_list(serving: Serving) -> None:
    answer = serving.token()
    assert (answer.status, answer.fields["hostname"]) == (200, "alice.example.com")
    assert "Server" not in answer.headers  # nothing of Python
    opened = Fernet([serving.key_file.read_text()], load()).open(answer.fields["token"].encode())
    assert opened is not None
    assert json.loads(opened)["device_id"] == serving.alice.id
    found = serving.ask(LIST)
    listed = Revocations.read(found.body.decode(), [serving.key_file.read_text()])
    assert listed.serial == serving.store.serial()
    assert serving.ask(LIST, headers={"If-None-Match": found.headers["ETag"]}).status == 304
    assert serving.ask("/healthz").fields == {"status": "ok"}
    assert serving.token("Bearer x").status == 401


def test_curl_asks_as_the_manual_says(serving: Serving, tmp_path: Path) -> None:
    authority = str(tmp_path / "ca.pem")
    serving.authority.cert_pem.write_to_path(authority)
    url = f"http{'s' * serving.has_tls}://localhost:{serving.port}/v1/token"
    credential = f"Authorization: Bearer {serving.alice.id}.{serving.alices}"
    done = subprocess.run(
        ["curl", "-sSf", "--cacert", authority, "-H", credential, "-d", json.dumps(KEYS), url],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["device_id"] == serving.alice.id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
        (b"GET http://other.example/healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /%68ealthz?a=%zz HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n", -200),
        (b"HEAD /nothing HTTP/1.1\r\nHost: x\r\n\r\n", -404),
        (b"HEAD / HTTP/1.1\r\n\r\n", -400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 200),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", 400),
        (b"GET /healthz HTTP/2.0\r\nHost: x\r\n\r\n", 400),
        (b"GET healthz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"\x00\xff garbage\r\n\r\n", 400),
        (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /%c3%a9%00%0d%0a HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"BREW /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"POST /v1/token HTTP/1.1\r\nHost: x\r\n\r\n", 411),
        (b"POST /v1/token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /v1/token HTTP/1.1\r\nHost: x\r\nContent-Length: 16385\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /v1/token HTTP/1.1\r\nHost: x\r\nContent-Length: -2\r\n\r\n", 400),
        (b"POST /v1/token HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 401),
        (b"GET /" + b"x" * HEAD_BYTES + b" HTTP/1.1\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (HEAD_BYTES // 6), 431),
    ],
    ids=lambda value: repr(value)[2:50] if isinstance(value, bytes) else str(value),
)  # fmt: skip
def test_requests_that_are_odd(plain: Serving, text: bytes, expected: int) -> None:
    answer = plain.talk(text)
    if expected < 0:  # no body, whatever its length
        assert answer.startswith(b"HTTP/1.1 %d " % -expected)
        assert answer.endswith(b"\r\n\r\n")
    else:
        assert status(answer) == expected


def test_a_request_in_any_pieces(serving: Serving) -> None:
    text = request(serving)
    assert status(serving.talk(*(bytes([byte]) for byte in text))) == 200
    head, _, body = text.partition(b"\r\n\r\n")
    assert status(serving.talk(head, b"\r\n\r\n" + body)) == 200


def test_who_waits_for_100_continue_gets_it(serving: Serving) -> None:
    head, _, body = request(serving, Expect="100-continue").partition(b"\r\n\r\n")
    with serving.connect() as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert status(read_all(sock)) == 200


def test_a_half_closed_connection_gets_its_answer(plain: Serving) -> None:
    with plain.connect() as sock:
        sock.sendall(request(plain))
        sock.shutdown(socket.SHUT_WR)
        assert status(read_all(sock)) == 200


def test_an_answer_isnt_lost_behind_what_is_still_sent(plain: Serving) -> None:
    """As by curl: it sends on while the answer is there already."""
    for _ in range(5):
        with plain.connect() as sock:
            sock.sendall(b"POST /v1/token HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n")
            sock.sendall(bytes(200_000))
            assert sock.recv(12) == b"HTTP/1.1 413"


def test_openssl_shakes_hands(secured: Serving) -> None:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{secured.port}", "-ign_eof"]
    for version, expected in (("-tls1_3", 0), ("-tls1_2", 0), ("-tls1_1", 1)):
        done = subprocess.run(
            [*command, "-servername", "localhost", version],
            input=b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode != 0) == expected, done.stderr
        assert (b'{"status": "ok"}' in done.stdout) != expected


def test_what_is_no_tls_is_refused(secured: Serving) -> None:
    for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", version_1(bytes(4)), b"\0" * 99):
        with socket.create_connection(("127.0.0.1", secured.port), WAIT_S) as sock:
            sock.sendall(data)
            assert read_all(sock)[:1] in (b"", b"\x15")
    assert secured.token().status == 200


# --- limits ----------------------------------------------------------------------------


def test_who_is_slow_takes_no_thread_and_is_cut(secured: Serving) -> None:
    """In the handshake, in the head, in the body: none of them hinders others; all are told."""
    text = request(secured)
    socks = []
    for size in (0, 1, len(text) // 2, len(text) - 1):
        for _ in range(40):
            sock = secured.connect()
            sock.sendall(text[:size])
            socks.append(sock)
    silent = [socket.create_connection(("127.0.0.1", secured.port), WAIT_S) for _ in range(200)]
    for sock in silent[:100]:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01")
    for _ in range(5):
        assert secured.token().status == 200
    # A byte now and then doesn't help: the time is for all of it.
    dripping = socks.pop(40)
    dripping.settimeout(0.2)

    def is_over() -> bool:
        try:
            dripping.sendall(b"O")
            dripping.recv(1)
        except socket.timeout:
            return False
        except OSError:
            pass
        return True

    wait_until(is_over)
    dripping.close()
    answers = [read_all(sock) for sock in socks]
    for sock in socks + silent:
        sock.close()
    assert not any(answers[:40])
    assert {status(answer) for answer in answers[40:]} == {408}


def test_more_connections_than_there_may_be(serving: Serving) -> None:
    told = "others need its place"
    before = serving.program.output.count(told)
    idle = [
        socket.create_connection(("127.0.0.1", serving.port), WAIT_S)
        for _ in range(CONNECTIONS + 20)
    ]
    serving.program.wait_for(told, count=before + 20)
    assert serving.token().status == 200
    # The oldest have given way.
    assert read_all(idle[0]) == b""
    # Who comes from elsewhere has a place, however long it takes: it isn't one of many there.
    patient = socket.create_connection(("127.0.0.1", serving.port), WAIT_S, ("127.0.0.2", 0))
    idle += [socket.create_connection(("127.0.0.1", serving.port), WAIT_S) for _ in idle]
    serving.program.wait_for(told, count=before + 20 + len(idle) // 2)
    if serving.has_tls:
        patient = serving.context.wrap_socket(patient, server_hostname="localhost")
    patient.sendall(request(serving))
    assert status(read_all(patient)) == 200
    for sock in (*idle, patient):
        sock.close()


def test_200_clients_at_once(secured: Serving) -> None:
    statuses: list[int] = []
    text = request(secured)
    in_threads(200, lambda _: statuses.append(status(secured.talk(text))))
    assert statuses == [200] * 200


def test_who_guesses_waits_and_the_rightful_one_does_not(plain: Serving) -> None:
    wrong = request(plain, Authorization=f"Bearer {plain.bob.id}.{'A' * 43}")
    stop, statuses = threading.Event(), []

    def guess(_: int) -> None:
        while not stop.is_set():
            statuses.append(status(plain.talk(wrong)))

    guessing = threading.Thread(target=in_threads, args=(50, guess), daemon=True)
    guessing.start()
    wait_until(lambda: statuses.count(429) >= 100)
    own = [plain.token(f"{plain.bob.id}.{plain.bobs}").status for _ in range(50)]
    stop.set()
    guessing.join(WAIT_S)
    assert own == [200] * 50
    assert statuses.count(401) < 50 < statuses.count(429)
    assert plain.program.output.count("a wrong secret") < statuses.count(429)


def test_nothing_is_left_behind(serving: Serving) -> None:
    # Threads end by themselves a while after the last request.
    before = process_counts(serving.program.pid)[0], 1000
    for number in range(50):
        with serving.connect() as sock:
            sock.sendall(request(serving)[: number * 5])
        socket.create_connection(("127.0.0.1", serving.port), WAIT_S).close()
    assert serving.token().status == 200
    wait_until(lambda: not has_more_than(before, serving.program.pid), "descriptors are free")


def test_out_of_descriptors_it_waits_for_better_times(tmp_path: Path) -> None:
    import resource

    with Serving(tmp_path, has_tls=False) as serving:
        pid = serving.program.pid
        used = process_counts(pid)[0]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 20, used + 20))
        idle = []
        for _ in range(60):
            idle.append(socket.create_connection(("127.0.0.1", serving.port), WAIT_S))
        serving.program.wait_for("can't accept: [Errno 24]")
        for sock in idle:
            sock.close()
        assert serving.token().status == 200


def is_refused(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_a_list_that_is_read_slowly(tmp_path: Path) -> None:
    """Nobody else waits for who reads slowly, and all of it arrives."""
    with Serving(tmp_path) as serving:
        connection = serving.store._connection
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO revocation VALUES (?, 1, 9999999999)",
            [[f"{n:016x}".translate(str.maketrans("0189", "zyxw"))] for n in range(20000)],
        )
        connection.execute("COMMIT")
        serving.store.revoke(serving.bob.id)
        wait_until(lambda: len(serving.ask(LIST).body) > 10**6)
        slow, texts = [], set()
        for _ in range(40):
            sock = serving.connect()
            sock.sendall(b"GET /v1/revocations HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(1) == b"H"
            slow.append(sock)
        assert serving.token().status == 200
        for sock in slow:
            texts.add((b"H" + read_all(sock)).partition(b"\r\n\r\n")[2].decode())
            sock.close()
        assert len(texts) == 1
        found = Revocations.read(texts.pop(), [serving.key_file.read_text()])
        assert len(found.entries) == 20001
        # One who reads slowly has some seconds to the end, but for a second signal.
        with serving.connect() as sock:
            sock.sendall(b"GET /v1/revocations HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(1) == b"H"
            serving.program.process.terminate()
            wait_until(lambda: is_refused(serving.port))
            serving.program.process.terminate()
            assert serving.program.wait() == 0


# --- PROXY headers -----------------------------------------------------------------------


def test_addresses_come_by_proxy_headers(tmp_path: Path) -> None:
    device = socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    with Serving(tmp_path, "--proxy-protocol-from", "127.0.0.0/8") as serving:
        output = serving.program
        for number, header in enumerate((version_1(device), version_2(device)), 1):
            assert serving.token(first=header).status == 200
            output.wait_for(f"2001:db8::7: device {serving.alice.id}", count=number)
        # In pieces, and with the ClientHello in the same segment: OpenSSL's, by hand.
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = serving.context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        with socket.create_connection(("127.0.0.1", serving.port), WAIT_S) as sock:
            header = version_2(device)
            sock.sendall(header[:20])
            time.sleep(0.05)
            sock.sendall(header[20:] + outgoing.read())
            assert sock.recv(1) == b"\x16"
        # Without one, nobody is let in from there.
        with pytest.raises(OSError):
            serving.token()
        output.wait_for("127.0.0.1: no PROXY header")
    other = tmp_path / "other"
    other.mkdir()
    with Serving(other, "--proxy-protocol-from", "192.0.2.1") as serving:
        assert serving.token().status == 200
        with pytest.raises(OSError):
            serving.token(first=version_2(device))


# --- files that change, signals ---------------------------------------------------------


def peer_certificate(serving: Serving) -> bytes | None:
    with serving.connect() as sock:
        assert isinstance(sock, ssl.SSLSocket)
        return sock.getpeercert(binary_form=True)


def test_certificate_and_keys_change_under_load(tmp_path: Path) -> None:
    with Serving(tmp_path) as serving:
        stop, answers = threading.Event(), []

        def ask(_: int) -> None:
            while not stop.wait(0.05):  # and leave other tests something of the processor
                answers.append(serving.token().status)

        load_thread = threading.Thread(target=in_threads, args=(4, ask), daemon=True)
        load_thread.start()
        old = serving.key_file.read_text()
        new = new_fernet_key(os.urandom)
        first = peer_certificate(serving)
        assert first == serving.leaf

        # By themselves, some seconds after the change.
        leaf = serving.renew()
        serving.write(serving.key_file, f"{new}\n{old}\n")

        def opens() -> Any:
            token = serving.token().fields["token"].encode()
            return Fernet([new], load()).open(token)

        wait_until(lambda: peer_certificate(serving) == leaf)
        wait_until(opens)
        # What is wrong changes nothing, and is said once.
        serving.write(serving.certificate, "no certificate")
        serving.write(serving.key_file, "no key")
        serving.program.wait_for("no certificate in")
        serving.program.wait_for("the former keys stay")
        serving.program.process.send_signal(signal.SIGHUP)
        serving.program.wait_for("the former settings stay")
        assert peer_certificate(serving) == leaf
        assert opens()
        # SIGHUP reads them at once.
        leaf = serving.renew()
        serving.write(serving.key_file, old)
        serving.program.process.send_signal(signal.SIGHUP)
        serving.program.wait_for("the settings were read again")
        assert peer_certificate(serving) == leaf
        assert not opens()
        stop.set()
        load_thread.join(WAIT_S)
        assert set(answers) == {200}
        assert serving.program.output.count("the former one stays") == 1
        serving.program.process.send_signal(signal.SIGUSR1)
        serving.program.wait_for(" answered, ")


def test_sigterm_answers_who_waits(serving: Serving) -> None:
    program, port = serving.start()
    etag = serving.ask(LIST).headers["ETag"]
    former, serving.port = serving.port, port
    try:
        with serving.connect() as waiting, serving.connect() as idle, serving.connect() as late:
            waiting.sendall(
                f"GET {LIST}?wait=60 HTTP/1.1\r\nHost: x\r\nIf-None-Match: {etag}\r\n\r\n".encode()
            )
            text = request(serving)
            late.sendall(text[:-5])
            wait_until(lambda: b"snitun_master_waiting 1" in serving.metrics())
            program.process.terminate()
            assert read_all(waiting).startswith(b"HTTP/1.1 304 ")
            assert read_all(idle) == b""
        assert program.wait() == 0
    finally:
        program.stop()
        serving.port = former
    # What is taken after a restart is the same.
    assert serving.token().status == 200


def test_a_database_in_trouble_is_said_and_mended(tmp_path: Path) -> None:
    with Serving(tmp_path, has_tls=False) as serving:
        etag = serving.ask(LIST).headers["ETag"]
        # Locked by a command that hangs: reading goes on.
        other = Store(str(serving.database))
        other._connection.execute("BEGIN IMMEDIATE")
        assert serving.token().status == 200
        assert serving.ask(LIST, headers={"If-None-Match": etag}).status == 304
        other._connection.execute("ROLLBACK")
        other.close()
        # Another process changes it, and who waits hears of that.
        answers: list[Any] = []
        headers = {"If-None-Match": etag}
        thread = threading.Thread(
            target=lambda: answers.append(serving.ask(f"{LIST}?wait=60", headers=headers)),
            daemon=True,
        )
        thread.start()
        wait_until(lambda: b"snitun_master_waiting 1" in serving.metrics())
        command = module("snitun_sync.master", "device", "revoke", serving.alice.id)
        subprocess.run(
            [*map(str, command), "--database", str(serving.database)],
            cwd=PROJECT,
            check=True,
            capture_output=True,
        )
        thread.join(WAIT_S)
        key = serving.key_file.read_text()
        assert serving.alice.id in Revocations.read(answers[0].body.decode(), [key]).entries
        assert serving.token().status == 403


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--listen", "*:0"], 64, "--listen: *:0 can be reached from other machines; expected"),
        (["--listen", "0.0.0.0:0"], 64, "can be reached from other machines"),
        (["--listen", "[::]:0"], 64, "can be reached from other machines"),
        (["--listen", "192.0.2.1:0", "--insecure"], 69, "can't listen on 192.0.2.1:0: "),
        (["--listen", "nowhere.invalid:1"], 69, "can't listen on nowhere.invalid:1: "),
        (["--proxy-protocol-from", "192.0.2.1/24"], 64, "--proxy-protocol-from: '192.0.2.1/24'"),
        (["--tls-key", "x"], 64, "--tls-key: only with --tls-cert"),
        (["--tls-cert", "/nothing"], 66, "--tls-cert: can't read /nothing: No such file"),
        (["--token-ttl", "59"], 64, "--token-ttl: 59 seconds; expected 60 to 2592000"),
        (["--relay", "https://x"], 64, "--relay: a URL in 'https://x'"),
        (["--database", "/nothing/x"], 74, "the database /nothing/x: No such file or directory"),
        (["--fernet-key-file", "/nothing"], 66, "--fernet-key-file: can't read /nothing"),
        (["--admin-token-file", "/nothing"], 66, "--admin-token-file: can't read /nothing"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong(
    plain: Serving, arguments: list[str], code: int, said: str
) -> None:
    command = module("snitun_sync.master", "serve", *plain.arguments, *arguments)
    done = subprocess.run(
        [*map(str, command)], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_check_prints_the_settings(secured: Serving) -> None:
    command = module("snitun_sync.master", "serve", *secured.arguments, "--check")
    done = subprocess.run(
        [*map(str, command)], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "snitun-master: the configuration is right" in done.stdout
    assert "relay = relay.example.com other.example.com:8443   (command line)" in done.stdout
