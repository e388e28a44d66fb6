"""The session master's service as a WSGI application (PEP 3333): docs/openapi.json describes it.

Under any WSGI server it is `snitun_sync.master.app:application`, configured by $SNITUN_DATABASE
and the like, or by the file of $SNITUN_CONFIG; `snitun-master serve` brings a server along.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import logging
import threading
import time
from http import HTTPStatus

from ..errors import StoreError, UsageError
from ..program import read_secret
from ..protocol.aes import load
from ..protocol.cipher import IV_SIZE, KEY_SIZE
from ..protocol.names import parse_address
from ..protocol.ticket import RELAY_PORT
from .keys import Keys
from .limits import Failures
from .request import (
    JSON,
    NO_STORE,
    RefusalError,
    credential,
    hex_field,
    is_local,
    json_bytes,
    json_object,
    read_body,
    refusal,
    wait_seconds,
)
from .store import Store
from .tokens import seal_token

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from ..options import Options
    from .request import Answer, Environ

SHORTEST_TTL_S, LONGEST_TTL_S = 60, 30 * 86400
# Requests for the list that wait for a change of it; others are answered at once.
WAITING = 8
# How often the database is asked for a change, by all of them together.
POLL_S = 0.2
RETRY_AFTER_S = 5
# How long our own server keeps the answer to a guess.
HOLD_S = 1.0
COMPLAIN_EACH_S = 60.0

log = logging.getLogger("snitun_sync")


class App:
    """See the head of this file; its methods may be called on any thread."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        *,
        relays: Sequence[str],
        token_ttl_s: float,
        admin_token: str = "",
    ) -> None:
        """`relays`: where clients find one, best first, HOST[:PORT].

        `admin_token`: what who asks for /metrics must know; with "" they come from this machine,
        without TLS.
        Raises ConfigurationError, StoreError.
        """
        self.store, self.keys = store, keys
        self._admin_token = admin_token.strip().encode()
        self._relays: tuple[str, ...] = ()
        self._token_ttl_s = 0
        self.configure(relays, token_ttl_s)
        self._turn = itertools.count()
        self._failures = Failures()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._complain_at = 0.0
        self._answers: dict[tuple[str, int], int] = {}  # by path and status
        # The list of revocations, as it was looked for last.
        self._list_lock = threading.Lock()
        self._look_at, self._listed = 0.0, (-1, "")
        self._etag, self._text = "", b""
        self._waiting = 0
        self._pages = {
            "/v1/token": ("POST", self._token),
            "/v1/revocations": ("GET, HEAD", self._revocations),
            "/healthz": ("GET, HEAD", self._healthz),
            "/metrics": ("GET, HEAD", self._metrics),
        }

    def configure(self, relays: Sequence[str], token_ttl_s: float) -> None:
        """Take these settings from now on. Raises ConfigurationError, StoreError."""
        for relay in relays:
            parse_address(relay, "--relay", default_port=RELAY_PORT)
        if not SHORTEST_TTL_S <= token_ttl_s <= LONGEST_TTL_S:
            raise UsageError(
                f"--token-ttl: {token_ttl_s:.0f} seconds; expected {SHORTEST_TTL_S} to "
                f"{LONGEST_TTL_S}, 30 days"
            )
        if token_ttl_s != self._token_ttl_s:
            self.store.note_token_ttl(token_ttl_s)
        self._relays, self._token_ttl_s = tuple(relays), int(token_ttl_s)

    def stop(self) -> None:
        """Let nobody wait any more."""
        self._stopping.set()

    @property
    def answered(self) -> int:
        """How many requests have had an answer."""
        return sum(self._answers.values())

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        path = environ.get("PATH_INFO", "")
        allowed, page = self._pages.get(path, ("", None))
        is_head = environ["REQUEST_METHOD"] == "HEAD"
        try:
            if page is None:
                raise RefusalError(404, f"expected one of {' '.join(self._pages)}")
            if environ["REQUEST_METHOD"] not in allowed.split(", "):
                raise RefusalError(405, f"expected {allowed}", ("Allow", allowed))
            self.keys.look()
            status, headers, body = page(environ)
        except RefusalError as error:
            status, headers, body = refusal(error.status, str(error), *error.headers)
        except StoreError as error:
            self._complain(error)
            retry = ("Retry-After", str(RETRY_AFTER_S))
            status, headers, body = refusal(503, "the database can't be used", retry)
        except Exception:
            log.exception("defect in the answer to %s", path)
            status, headers, body = refusal(500, "a defect; the log has more")
        headers.append(("Content-Length", str(len(body))))
        with self._lock:
            key = path if page is not None else "other", status
            self._answers[key] = self._answers.get(key, 0) + 1
        start_response(f"{status} {HTTPStatus(status).phrase}", headers)
        return [] if is_head or status == 304 else [body]

    def _complain(self, error: StoreError) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._complain_at:
                return
            self._complain_at = now + COMPLAIN_EACH_S
        log.error("%s; devices get no token meanwhile", error)

    # --- tokens ----------------------------------------------------------------------

    def _token(self, environ: Environ) -> Answer:
        """POST /v1/token."""
        body = read_body(environ)  # first, so that no answer overtakes it
        address = environ.get("REMOTE_ADDR", "")
        device_id, secret = credential(environ)
        now = time.time()  # before the device is looked up: see seal_token
        device = self.store.authenticate(device_id, secret) if secret else None
        if device is None:
            what = "a wrong secret" if secret else "no credential"
            raise self._failed(environ, address, device_id, what)
        if device.revoked is not None:
            log.warning("%s: device %s, %s: it was revoked", address, device.id, device.hostname)
            raise RefusalError(403, f"device {device.id} was revoked")
        fields = json_object(body)
        key, iv = hex_field(fields, "aes_key", KEY_SIZE), hex_field(fields, "aes_iv", IV_SIZE)
        valid = max(int(now), device.tokens_before) + self._token_ttl_s
        token = seal_token(device, self.keys.fernet, aes_key=key, aes_iv=iv, valid=valid, now=now)
        relays = self._relays
        first = next(self._turn) % len(relays)
        servers = relays[first:] + relays[:first]
        answer = {
            "token": token,
            "server": servers[0],
            "servers": servers,
            "valid": valid,
            "throttling": device.throttling,
            "protocol_version": device.protocol_version,
            "cipher": device.cipher,
            "hostname": device.hostname,
            "alias": device.aliases,
            "device_id": device.id,
        }
        # One that asks again and again doesn't fill the log.
        level = logging.INFO if self.store.seen(device.id, now) else logging.DEBUG
        log.log(level, "%s: device %s, %s: a token for it", address, device.id, device.hostname)
        return 200, [JSON, NO_STORE], json_bytes(answer)

    def _failed(self, environ: Environ, address: str, device_id: str, what: str) -> RefusalError:
        wait_s = self._failures.add(address, device_id, what)
        if not wait_s:
            return RefusalError(
                401,
                "no such device, or not its secret; expected Authorization: Bearer ID.SECRET",
                ("WWW-Authenticate", "Bearer"),
            )
        hold = environ.get("snitun.hold")
        if hold is not None:
            hold(HOLD_S)
        retry = ("Retry-After", str(int(wait_s) + 1))
        return RefusalError(429, "too many wrong secrets from this address", retry)

    # --- revocations -----------------------------------------------------------------

    def _revocations(self, environ: Environ) -> Answer:
        """GET /v1/revocations."""
        wait_s = wait_seconds(environ.get("QUERY_STRING", ""))
        etag, text = self._list()
        known = environ.get("HTTP_IF_NONE_MATCH", "")
        if wait_s and etag in known:
            etag, text = self._changed_list(etag, time.monotonic() + wait_s)
        headers = [("ETag", etag), ("Cache-Control", "no-cache")]
        if etag in known or known.strip() == "*":
            return 304, headers, text
        return 200, [("Content-Type", "application/jose"), *headers], text

    def _changed_list(self, known: str, deadline: float) -> tuple[str, bytes]:
        """Wait until the list is another one; return it, or the known one at the deadline."""
        with self._lock:
            if self._waiting >= WAITING:
                deadline = 0.0
            self._waiting += 1
        try:
            while True:
                etag, text = self._list()
                left_s = deadline - time.monotonic()
                if etag != known or left_s <= 0 or self._stopping.wait(min(POLL_S, left_s)):
                    return etag, text
        finally:
            with self._lock:
                self._waiting -= 1

    def _list(self) -> tuple[str, bytes]:
        """Return the list's ETag and its text, as they were less than POLL_S ago."""
        with self._list_lock:
            now = time.monotonic()
            if now >= self._look_at:
                self.keys.look()
                key = self.keys.newest
                if (self.store.serial(), key) != self._listed:
                    revocations = self.store.revocations(time.time())
                    self._text = revocations.sign(key).encode()
                    self._listed = revocations.serial, key
                    # All processes that serve give one list one name. It tells nothing of the key.
                    digest = hashlib.sha256(b"snitun etag" + key.encode()).hexdigest()
                    self._etag = f'"{revocations.serial}-{digest[:8]}"'
                self._look_at = now + POLL_S
            return self._etag, self._text

    # --- monitoring --------------------------------------------------------------------

    def _healthz(self, environ: Environ) -> Answer:
        """GET /healthz."""
        self.store.serial()
        return 200, [JSON, NO_STORE], json_bytes({"status": "ok"})

    def _metrics(self, environ: Environ) -> Answer:
        """GET /metrics."""
        if self._admin_token:
            scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
            given = token.strip().encode("utf-8", "replace")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._admin_token):
                said = "expected Authorization: Bearer, and the token of --admin-token-file"
                raise RefusalError(401, said, ("WWW-Authenticate", "Bearer"))
        elif not is_local(environ):
            said = "only from this machine, without TLS; for others, see --admin-token-file"
            raise RefusalError(403, said)
        from ..net.openmetrics import CONTENT_TYPE  # noqa: PLC0415  few ask
        from .metrics import exposition  # noqa: PLC0415

        with self._lock:
            answers, waiting = dict(self._answers), self._waiting
        text = exposition(self.store, answers, waiting, self.keys)
        return 200, [("Content-Type", CONTENT_TYPE), NO_STORE], text.encode()


def make_app(options: Options) -> App:
    """Return the application that the options ask for. Raises ConfigurationError, StoreError."""
    keys = Keys(options.fernet_key_file, options.source("fernet_key_file"), load(options.crypto))
    store = Store(options.database)
    try:
        return App(
            store,
            keys,
            relays=options.relay,
            token_ttl_s=options.token_ttl,
            admin_token=read_secret(options.admin_token_file, "--admin-token-file"),
        )
    except BaseException:
        store.close()
        raise


# --- for other WSGI servers ------------------------------------------------------------

_made: App | None = None
_making = threading.Lock()


def application(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer as `App` does, configured by the environment when the first request comes."""
    global _made  # noqa: PLW0603
    with _making:
        if _made is None:
            from ..options import Options  # noqa: PLC0415
            from .cli import parser  # noqa: PLC0415

            # As if read again: a mistake raises, and the log is the server's.
            with parser().read(["serve"], Options()) as options:
                _made = make_app(options)
    return _made(environ, start_response)
