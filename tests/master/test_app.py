"""The session master's application, called as WSGI servers call it."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from snitun_sync.errors import ConfigurationError, UsageError
from snitun_sync.master import app as app_module
from snitun_sync.master import keys as keys_module
from snitun_sync.master import limits
from snitun_sync.master.app import App
from snitun_sync.master.keys import Keys
from snitun_sync.master.limits import Failures
from snitun_sync.master.request import BODY_BYTES, RefusalError, json_object
from snitun_sync.master.store import Store
from snitun_sync.protocol.aes import load
from snitun_sync.protocol.revocations import Revocations
from snitun_sync.protocol.token import Fernet, Payload, created, new_fernet_key
from tests.master.serving import ALICE, BOB, KEYS
from tests.support import PROJECT, wait_until

TOKEN, LIST = "/v1/token", "/v1/revocations"


class Caller:
    """An application with two devices, and who calls it."""

    def __init__(self, folder: Path) -> None:
        self.database, self.key_file = folder / "snitun.db", folder / "keys"
        self.store = Store(str(self.database))
        self.alice, self.alices = self.store.add(ALICE, ["also.example.com"], throttling=7)
        self.bob, self.bobs = self.store.add(BOB, cipher="aes-gcm", protocol_version=1)
        self.key = new_fernet_key(os.urandom)
        self.key_file.touch(0o600)
        self.key_file.write_text(self.key)
        self.keys = Keys(str(self.key_file), "--fernet-key-file", load())
        self.app = self.make()

    def make(self, **options: Any) -> App:
        """Return another application of the same store."""
        options = {"relays": ["one.example.com", "two:8443"], "token_ttl_s": 600, **options}
        return App(self.store, self.keys, **options)

    def call(
        self,
        path: str,
        method: str = "GET",
        *,
        body: bytes | None = None,
        app: Any = None,
        **more: str,
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body; `more` goes into the environ."""
        found: list[Any] = []

        def start(status: str, headers: list[tuple[str, str]], *_: Any) -> Any:
            found[:] = [status, headers]

        path, _, query = path.partition("?")
        environ = {"PATH_INFO": path, "REQUEST_METHOD": method, "QUERY_STRING": query}
        environ |= {"SCRIPT_NAME": "", "REMOTE_ADDR": "192.0.2.1"}
        if body is not None:
            environ["CONTENT_LENGTH"] = str(len(body))
        environ |= more
        setup_testing_defaults(environ)
        environ["wsgi.input"] = io.BytesIO(body or b"")  # type: ignore[assignment]
        result = validator(app or self.app)(environ, start)
        try:
            data = b"".join(result)
        finally:
            result.close()  # type: ignore[attr-defined]
        status, headers = int(found[0][:3]), dict(found[1])
        assert len(headers) == len(found[1])
        if method != "HEAD" and status != 304:
            assert int(headers["Content-Length"]) == len(data)
        if status >= 400:
            assert set(json.loads(data)) == {"message"}
            assert headers["Content-Type"] == "application/json"
        return status, headers, data

    def token(
        self, credential: str = "", fields: Any = KEYS, **more: Any
    ) -> tuple[int, dict[str, str], Any]:
        """Ask for a token, as Alice if nothing else is said."""
        credential = credential or f"Bearer {self.alice.id}.{self.alices}"
        body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
        more = {"HTTP_AUTHORIZATION": credential, **more}
        status, headers, data = self.call(TOKEN, "POST", body=body, **more)
        return status, headers, json.loads(data)

    def payload(self, token: str) -> Payload:
        """Return what a token says."""
        data = Fernet([self.keys.newest], load()).open(token.encode())
        assert data is not None
        return Payload.from_json(data)


@pytest.fixture
def caller(tmp_path: Path) -> Iterator[Caller]:
    caller = Caller(tmp_path)
    yield caller
    caller.store.close()


# --- tokens ---------------------------------------------------------------------------


def test_a_token(caller: Caller) -> None:
    before = int(time.time())
    status, headers, answer = caller.token()
    assert (status, headers["Cache-Control"]) == (200, "no-store")
    assert before + 600 <= answer["valid"] <= time.time() + 600
    payload = caller.payload(answer.pop("token"))
    assert (payload.device_id, payload.names) == (caller.alice.id, (ALICE, "also.example.com"))
    assert (payload.aes_key, payload.aes_iv) == (b"\xab" * 32, b"\xcd" * 16)
    assert payload.valid == answer.pop("valid")
    assert answer == {
        "server": "one.example.com",
        "servers": ["one.example.com", "two:8443"],
        "throttling": 7,
        "protocol_version": 2,
        "cipher": "aes-cbc",
        "hostname": ALICE,
        "alias": ["also.example.com"],
        "device_id": caller.alice.id,
    }
    # The next one is for another device, and begins with another relay.
    status, _, answer = caller.token(f"bearer  {caller.bob.id}.{caller.bobs}")
    assert (status, answer["server"], answer["throttling"]) == (200, "two:8443", None)
    assert answer["servers"] == ["two:8443", "one.example.com"]
    payload = caller.payload(answer["token"])
    assert (payload.cipher, payload.protocol_version) == ("aes-gcm", 1)


def test_what_revoke_rotate_and_remove_do(caller: Caller) -> None:
    alice = caller.alice.id
    old = caller.token()[2]["token"]
    rotated = caller.store.rotate(alice)
    assert caller.token()[0] == 401
    status, _, answer = caller.token(f"Bearer {alice}.{rotated}")
    assert status == 200
    revocations = caller.store.revocations(time.time())
    # Of one second, perhaps.
    assert revocations.refuses(alice, created(old.encode()))
    assert not revocations.refuses(alice, created(answer["token"].encode()))
    caller.store.revoke(alice)
    for secret, status in ((rotated, 403), (caller.alices, 401)):
        assert caller.token(f"Bearer {alice}.{secret}")[0] == status
    caller.store.remove(alice)
    assert caller.token(f"Bearer {alice}.{rotated}")[0] == 401
    assert caller.token(f"Bearer {caller.bob.id}.{caller.bobs}")[0] == 200


def test_a_clock_that_went_back_leaves_new_tokens_their_life(caller: Caller) -> None:
    """They are dated behind what was revoked by the other time."""
    ahead = time.time() + 86400
    caller.store._clock = lambda: ahead
    secret = caller.store.rotate(caller.alice.id)
    answer = caller.token(f"Bearer {caller.alice.id}.{secret}")[2]
    assert created(answer["token"].encode()) > ahead
    assert answer["valid"] == created(answer["token"].encode()) + 600


def test_what_is_revoked_stays_so_for_as_long_as_its_tokens_live(caller: Caller) -> None:
    app = caller.make(token_ttl_s=20 * 86400)
    valid = caller.token(app=app)[2]["valid"]
    caller.store.revoke(caller.alice.id)
    assert caller.store.revocations(time.time()).entries[caller.alice.id][1] > valid


@pytest.mark.parametrize(
    "fields",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"[" * 16000,
        b'{"a":' * 3000,
        b"\xff\xfe{}",
        json.dumps(KEYS).encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b'{"aes_key": NaN}',
        b'{"aes_key": -Infinity}',
        b'{"n": ' + b"9" * 9000 + b"}",
        json.dumps(KEYS).encode()[:-1] + b', "aes_key": "' + b"ab" * 32 + b'"}',
        {},
        {"aes_key": KEYS["aes_key"]},
        {**KEYS, "aes_key": "ab" * 31},
        {**KEYS, "aes_key": "ab" * 16},
        {**KEYS, "aes_key": "a " * 32},
        {**KEYS, "aes_key": "zz" * 32},
        {**KEYS, "aes_key": "٣" * 64},
        {**KEYS, "aes_key": 7},
        {**KEYS, "aes_iv": None},
        {**KEYS, "aes_iv": ["cd" * 16]},
        {**KEYS, "aes_iv": "cd" * 17},
    ],
    ids=lambda fields: repr(fields)[:40],
)
def test_bodies_that_are_refused(caller: Caller, fields: Any) -> None:
    status, _, answer = caller.token(fields=fields)
    # More digits than Python 3.11 takes for a number; others go on, and miss the keys.
    assert status == 400, answer
    assert "expected" in answer["message"]
    assert "ab" * 16 not in answer["message"]


@given(st.binary())
def test_any_body_is_an_object_or_refused(body: bytes) -> None:
    try:
        assert isinstance(json_object(body), dict)
    except RefusalError as error:
        assert error.status == 400


def test_unknown_fields_and_other_content_types_are_taken(caller: Caller) -> None:
    fields = {**KEYS, "more": [1, {"x": None}]}
    assert caller.token(fields=fields, CONTENT_TYPE="text/plain")[0] == 200


@pytest.mark.parametrize(
    "credential",
    [
        "Basic {id}.{secret}",
        "Bearer",
        "Bearer {secret}",
        "Bearer {id}.",
        "Bearer {id}.{secret}, Bearer {id}.{secret}",
        "Bearer {id}.{secret}x",
        "Bearer {other}.{secret}",
        "Bearer aaaaaaaaaaaaaaaa.{secret}",
        "Bearer \xe9.{secret}",
        "Bearer {id}." + "A" * 43,
        "Bearer {id}." + "A" * 10000,
        "Bearer {id}.{secret}\x00",
    ],
)
def test_credentials_that_are_refused(caller: Caller, credential: str) -> None:
    text = credential.format(id=caller.alice.id, secret=caller.alices, other=caller.bob.id)
    status, headers, answer = caller.token(text)
    assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    unknown = caller.token("Bearer bbbbbbbbbbbbbbbb." + "A" * 43)
    assert answer == unknown[2]  # it tells nothing of what is there


def test_the_log_has_ids_and_no_secrets(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = caller.token()[2]["token"]
    wrong = "B" * 42 + "A"
    caller.token(f"Bearer {caller.alice.id}.{wrong}")
    caller.store.revoke(caller.bob.id)
    caller.token(f"Bearer {caller.bob.id}.{caller.bobs}")
    text = caplog.text
    assert f"192.0.2.1: device {caller.alice.id}, {ALICE}: a token for it" in text
    assert f"192.0.2.1: device {caller.alice.id}: a wrong secret" in text
    assert f"192.0.2.1: device {caller.bob.id}, {BOB}: it was revoked" in text
    for secret in (token, wrong, caller.alices, caller.bobs, KEYS["aes_key"], KEYS["aes_iv"]):
        assert secret not in text


def test_methods_paths_and_lengths(caller: Caller) -> None:
    for path, allowed in ((TOKEN, "POST"), (LIST, "GET, HEAD"), ("/healthz", "GET, HEAD")):
        status, headers, _ = caller.call(path, "DELETE", REMOTE_ADDR="127.0.0.1")
        assert (status, headers["Allow"]) == (405, allowed)
    for path in ("/", "/v1", "/v1/token/", "/v1//token", "/V1/TOKEN", "/\xe9", "/v1/token\0"):
        assert caller.call(path)[0] == 404
    assert caller.call(TOKEN, "POST")[0] == 411
    assert caller.call(TOKEN, "POST", body=b"{}", HTTP_TRANSFER_ENCODING="chunked")[0] == 411
    assert caller.call(TOKEN, "POST", body=bytes(BODY_BYTES + 1))[0] == 413
    assert caller.call(TOKEN, "POST", CONTENT_LENGTH="9" * 30)[0] == 413
    status, _, data = caller.call(
        TOKEN,
        "POST",
        body=b"{}",
        CONTENT_LENGTH="5",
        HTTP_AUTHORIZATION=f"Bearer {caller.alice.id}.{caller.alices}",
    )
    assert (status, b"2 bytes; expected 5" in data) == (400, True)
    # HEAD is GET without the body.
    for path in (LIST, "/healthz"):
        whole, head = caller.call(path), caller.call(path, "HEAD")
        assert (whole[0], whole[1], b"") == head


def test_the_limits_of_settings(caller: Caller) -> None:
    for seconds in (59, 30 * 86400 + 1):
        with pytest.raises(UsageError, match=r"--token-ttl: .* expected 60 to 2592000"):
            caller.make(token_ttl_s=seconds)
    with pytest.raises(ConfigurationError, match="--relay: a URL in 'https://x'"):
        caller.make(relays=["https://x"])


# --- wrong secrets ----------------------------------------------------------------------


def test_who_guesses_is_slowed_and_locks_nobody_out(
    caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    held: list[float] = []
    caller.app._failures = Failures(lambda: 1000.0)  # nothing is forgotten meanwhile
    wrong = f"Bearer {caller.alice.id}.{'A' * 43}"
    statuses = [caller.token(wrong, **{"snitun.hold": held.append})[0] for _ in range(100)]
    few = limits.DEVICE_FAILURES
    assert statuses == [401] * few + [429] * (100 - few)
    assert held == [app_module.HOLD_S] * (100 - few)
    assert caplog.text.count("a wrong secret") == few + 1
    status, headers, answer = caller.token(wrong)
    assert (status, "too many wrong secrets" in answer["message"]) == (429, True)
    assert int(headers["Retry-After"]) == limits.DEVICE_PERIOD_S + 1
    # Another device has tries of its own, another address has all; a right secret needs none.
    assert caller.token(f"Bearer {caller.bob.id}.{'A' * 43}")[0] == 401
    assert caller.token(wrong, REMOTE_ADDR="192.0.2.2")[0] == 401
    assert caller.token()[0] == 200


def test_the_table_of_failures_is_bounded_and_forgets() -> None:
    now = [1000.0]
    failures = Failures(lambda: now[0])
    most = limits.ADDRESS_FAILURES
    tries = [failures.add("2001:db8:1:2::1", "", "x") for _ in range(most)]
    assert not any(tries)
    # The same household, and the same address as a map of IPv4.
    assert failures.add("2001:db8:1:2:ffff::7%eth0", "", "x") == limits.ADDRESS_PERIOD_S
    assert not failures.add("2001:db8:1:3::1", "", "x")
    for _ in range(most):
        failures.add("::ffff:192.0.2.9", "", "x")
    assert failures.add("192.0.2.9", "", "x")
    # Who goes on isn't kept out for longer.
    for _ in range(100):
        assert failures.add("192.0.2.9", "", "x") == limits.ADDRESS_PERIOD_S
    now[0] += limits.ADDRESS_PERIOD_S
    assert not failures.add("192.0.2.9", "", "x")
    assert failures.add("192.0.2.9", "", "x")
    for number in range(3 * limits.REMEMBERED):
        failures.add(f"10.0.{number // 256}.{number % 256}", "", "x")
    assert len(failures._until) == limits.REMEMBERED
    assert not failures.add("no address", "", "x")
    assert not failures.add("no:address", "", "x")


# --- revocations -------------------------------------------------------------------------


def read_list(caller: Caller, data: bytes) -> Revocations:
    return Revocations.read(data.decode(), [caller.keys.newest])


def test_the_list_of_revocations(caller: Caller) -> None:
    status, headers, data = caller.call(LIST)
    assert (status, headers["Content-Type"]) == (200, "application/jose")
    first = read_list(caller, data)
    assert (first.serial, first.entries) == (caller.store.serial(), {})
    etag = headers["ETag"]
    for known in (etag, f'W/"x", W/{etag}', "*"):
        status, headers, data = caller.call(LIST, HTTP_IF_NONE_MATCH=known)
        assert (status, headers["ETag"], data) == (304, etag, b"")
    caller.store.revoke(caller.alice.id)
    wait_until(lambda: caller.call(LIST, HTTP_IF_NONE_MATCH=etag)[0] == 200)
    second = read_list(caller, caller.call(LIST)[2])
    assert second.serial > first.serial
    assert set(second.entries) == {caller.alice.id}
    # Another process of the same database calls the list the same.
    other = caller.call(LIST, app=caller.make())
    assert other[1]["ETag"] == caller.call(LIST)[1]["ETag"]


@pytest.mark.parametrize(
    "query", ["wait=", "wait=-1", "wait=61", "wait=1.5", "wait=x", "wait=1&wait=2", "&" * 100]
)
def test_queries_that_are_refused(caller: Caller, query: str) -> None:
    assert caller.call(f"{LIST}?{query}")[0] == 400


def test_who_waits_hears_of_changes_at_once(caller: Caller) -> None:
    etag = caller.call(LIST)[1]["ETag"]
    answers: list[Any] = []

    def wait() -> None:
        answers.append(caller.call(f"{LIST}?wait=60", HTTP_IF_NONE_MATCH=etag))

    def begin(count: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=wait, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        wait_until(lambda: caller.app._waiting == min(app_module.WAITING, count), "they wait")
        return threads

    threads = begin(app_module.WAITING)
    # One more is answered at once.
    assert caller.call(f"{LIST}?wait=60", HTTP_IF_NONE_MATCH=etag)[0] == 304
    assert answers == []
    with Store(str(caller.database)) as other:  # as another process
        other.revoke(caller.bob.id)
    for thread in threads:
        thread.join(30)
    assert [answer[0] for answer in answers] == [200] * app_module.WAITING
    assert all(caller.bob.id in read_list(caller, answer[2]).entries for answer in answers)
    # Another list is there; who doesn't know it needn't wait.
    assert caller.call(f"{LIST}?wait=60", HTTP_IF_NONE_MATCH=etag)[0] == 200

    # Another key signs: that is another list, too.
    answers.clear()
    etag = caller.call(LIST)[1]["ETag"]
    threads = begin(1)
    caller.key_file.write_text(f"{new_fernet_key(os.urandom)}\n{caller.key}\n")
    caller.keys.read()
    threads[0].join(30)
    assert answers[0][0] == 200
    assert answers[0][1]["ETag"].partition("-")[0] == etag.partition("-")[0]
    assert read_list(caller, answers[0][2]).entries

    # At the end nobody waits.
    answers.clear()
    etag = caller.call(LIST)[1]["ETag"]
    threads = begin(2)
    caller.app.stop()
    for thread in threads:
        thread.join(30)
    assert [answer[0] for answer in answers] == [304, 304]


# --- keys that change ----------------------------------------------------------------------


def test_keys_change_with_their_file(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys_module, "LOOK_EACH_S", 0.0)
    monkeypatch.setattr(keys_module, "RETRY_S", 0.0)
    monkeypatch.setattr(keys_module, "QUIET_S", 0.05)
    new = new_fernet_key(os.urandom)

    def newest() -> str:
        assert caller.token()[0] == 200
        return caller.keys.newest

    caller.key_file.write_text("not a key\n")
    wait_until(lambda: newest() and caller.keys.failure)
    assert caplog.text.count("the former keys stay") == 1
    assert "Fernet key 1 is not 32 bytes" in caller.keys.failure
    caller.key_file.unlink()
    wait_until(lambda: newest() and "No such file" in caller.keys.failure)
    assert newest() == caller.key
    caller.key_file.write_text(f"{new}\n{caller.key}\n")
    wait_until(lambda: newest() == new)
    assert caller.keys.failure == ""
    assert caller.payload(caller.token()[2]["token"]).device_id == caller.alice.id
    assert caplog.text.count("the former keys stay") == 2


def test_a_key_signs_once_relays_can_know_it(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "LOOK_EACH_S", 0.0)
    monkeypatch.setattr(keys_module, "QUIET_S", 10000.0)
    caller.key_file.write_text(f"{new_fernet_key(os.urandom)}\n{caller.key}\n")
    for _ in range(3):
        caller.keys.look()
    assert caller.keys.newest == caller.key
    caller.keys.read()  # somebody has asked for it
    assert caller.keys.newest != caller.key


# --- monitoring -----------------------------------------------------------------------------


def test_metrics_are_for_this_machine_or_who_has_the_token(caller: Caller) -> None:
    caller.token()
    caller.token("Bearer x")
    caller.store.revoke(caller.bob.id)
    assert caller.call("/metrics")[0] == 403
    for header in ("HTTP_FORWARDED", "HTTP_X_FORWARDED_FOR", "HTTP_VIA"):
        more: dict[str, Any] = {"REMOTE_ADDR": "127.0.0.1", header: "x"}
        assert caller.call("/metrics", **more)[0] == 403
    # By a relay's route it may be anybody who comes from here.
    more = {"REMOTE_ADDR": "127.0.0.1", "wsgi.url_scheme": "https"}
    assert caller.call("/metrics", **more)[0] == 403
    for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        status, headers, data = caller.call("/metrics", REMOTE_ADDR=address)
        assert status == 200
    families = {f.name: f for f in text_string_to_metric_families(data.decode())}  # type: ignore[no-untyped-call]
    answers = {
        (sample.labels["path"], sample.labels["code"]): sample.value
        for sample in families["snitun_master_answers"].samples
    }
    assert answers[TOKEN, "200"] == answers[TOKEN, "401"] == 1
    assert [s.value for s in families["snitun_master_tokens"].samples] == [1]
    states = {s.labels["state"]: s.value for s in families["snitun_master_devices"].samples}
    assert states == {"active": 1, "revoked": 1}

    app = caller.make(admin_token="a token of its own\n")
    for credential in ("", "Bearer", "Bearer x", "Basic a token of its own", "Bearer \xe9"):
        more = {"HTTP_AUTHORIZATION": credential, "REMOTE_ADDR": "127.0.0.1"}
        status, headers, _ = caller.call("/metrics", app=app, **more)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    credential = "Bearer a token of its own"
    assert caller.call("/metrics", app=app, HTTP_AUTHORIZATION=credential)[0] == 200


def test_a_database_that_cannot_be_used(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    assert caller.call("/healthz")[0] == 200
    caller.store._connection.close()
    for path, method in (("/healthz", "GET"), (LIST, "GET"), (TOKEN, "POST")):
        caller.app._look_at = 0.0
        body = json.dumps(KEYS).encode() if method == "POST" else None
        credential = f"Bearer {caller.alice.id}.{caller.alices}"
        status, headers, _ = caller.call(path, method, body=body, HTTP_AUTHORIZATION=credential)
        assert (status, headers["Retry-After"]) == (503, "5")
    assert caplog.text.count("devices get no token meanwhile") == 1


# --- other WSGI servers -----------------------------------------------------------------------

SERVE = """
from wsgiref.simple_server import make_server
from snitun_sync.master.app import application
with make_server("127.0.0.1", 0, application) as server:
    print(server.server_port, flush=True)
    for _ in range(2):
        server.handle_request()
"""


def test_under_another_server_it_is_configured_by_the_environment(caller: Caller) -> None:
    import http.client

    environment = {
        **os.environ,
        "SNITUN_DATABASE": str(caller.database),
        "SNITUN_RELAY": "one.example.com two.example.com",
        "SNITUN_TOKEN_TTL": "2h",
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=PROJECT,
        env={**environment, "SNITUN_FERNET_KEY_FILE": str(caller.key_file)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        for path, status in (("/healthz", 200), (TOKEN, 401)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("POST" if path == TOKEN else "GET", path, b"{}")
            assert connection.getresponse().status == status
            connection.close()
        assert process.wait(30) == 0
    # Without it, whoever asks first is told what is missing.
    code = "from snitun_sync.master.app import application; application({}, None)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UsageError: the following arguments are required: --fernet-key-file" in done.stderr
