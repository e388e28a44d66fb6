"""The session master's own HTTP server: sockets on the loop, the WSGI application on threads."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from ipaddress import ip_address, ip_network

from ..errors import (
    ConfigurationError,
    ListenError,
    StoreError,
    UsageError,
)
from ..net.listening import Listener, listen
from ..net.service import Service
from ..net.sockets import host_text, numeric_places, reason
from ..net.tuning import LEAST_BUDGET_BYTES
from ..net.workers import Workers
from ..protocol.names import parse_address, shown
from .connection import HEAD_BYTES, Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..tls import Certificate, Loaded
    from .app import App

# More than this, and somebody who has many has to close one, else the oldest that hasn't sent its
# request yet.
CONNECTIONS, MANY = 1024, 128
ACCEPTS_AT_ONCE = 16
APP_THREADS, APP_WAITING = 32, 1024
# The signatures of handshakes: by OpenSSL, which lets other threads run.
HANDSHAKE_THREADS = 2
IDLE_S = 30.0
# Files that change are read once they have stayed the same for so long.
WATCH_S = 3.0
LOOK_S = 1.0

log = logging.getLogger("snitun_sync")


class Master(Service):
    """See the head of this file."""

    def __init__(
        self,
        app: App,
        address: str,
        *,
        certificate: Certificate | None = None,
        proxies: Sequence[str] = (),
        is_insecure: bool = False,
        crypto: str = "",
    ) -> None:
        """Serve `app`, which is stopped at the end, at `address`, HOST:PORT.

        `certificate` is read; `proxies`: the networks whose connections begin with a PROXY
        header; `is_insecure`: without TLS for other machines, too. Raises ConfigurationError.
        """
        super().__init__(budget_bytes=LEAST_BUDGET_BYTES, crypto=crypto)
        self.app, self.certificate = app, certificate
        self.address = parse_address(address, "--listen", can_be_any=True)
        self._is_insecure = is_insecure or certificate is not None
        self._proxies = [_network(text) for text in proxies]
        self.port = 0
        """What is listened on once it is open."""
        self.connections: dict[Connection, None] = {}  # the oldest first
        self.workers = Workers(self.loop, APP_THREADS, waiting=APP_WAITING, idle_s=IDLE_S)
        self.handshakers = Workers(self.loop, HANDSHAKE_THREADS, waiting=CONNECTIONS, idle_s=IDLE_S)
        self.buffer = memoryview(bytearray(HEAD_BYTES))
        """For what is decrypted; of the loop's thread."""
        self._listeners: list[Listener] = []
        self._seen: object = None  # what the last look at the certificate's files has shown
        # A name is looked up when it is listened on.
        self._check([place[0] for _, place in numeric_places(self.address)])

    def _check(self, hosts: Sequence[str]) -> None:
        is_loopback = all(host == "::1" or host.startswith("127.") for host in hosts)
        if not self._is_insecure and not (is_loopback and self.address.host):
            raise UsageError(
                f"--listen: {self.address} can be reached from other machines; expected "
                "--tls-cert as well, a loopback address behind a proxy, or --insecure"
            )

    # --- life ----------------------------------------------------------------------

    def _open(self) -> None:
        try:
            sockets = listen(self.address)
        except OSError as error:
            raise ListenError(f"can't listen on {self.address}: {reason(error)}") from None
        self._listeners = [
            Listener(self.loop, sock, partial(Connection, self), ACCEPTS_AT_ONCE)
            for sock in sockets
        ]
        places = [sock.getsockname() for sock in sockets]
        self.port = places[0][1]
        self._check([place[0] for place in places])

    def _begin(self) -> None:
        super()._begin()
        for listener in self._listeners:
            listener.listen()
        log.info("%s", self.summary())
        self.loop.call_later(LOOK_S, self._look_at_keys)
        if self.certificate is not None:
            self.loop.call_later(WATCH_S, self._look_at_certificate)
        self.tell()

    def _begin_drain(self) -> bool:
        for listener in self._listeners:
            listener.finish()
        self.app.stop()
        for connection in tuple(self.connections):
            if connection.can_give_way:
                connection.close()
        return bool(self.connections)

    def _is_drained(self) -> bool:
        return not self.connections

    def _begin_stop(self) -> None:
        for listener in self._listeners:
            listener.close()
        self.app.stop()

    def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        for connection in tuple(self.connections):
            connection.close()
        self.workers.close()
        self.handshakers.close()
        super()._close()

    def connection_closed(self, connection: Connection) -> None:
        """A connection has ended."""
        del self.connections[connection]
        self._stop_if_done()

    def expects_header(self, address: str) -> bool:
        """Tell whether connections from this address begin with a PROXY header."""
        if not self._proxies:
            return False
        ip: Any = ip_address(address.partition("%")[0])
        return any(ip in network for network in self._proxies)

    def take_in(self, connection: Connection) -> bool:
        """Keep a connection, for which another one may have to go; return whether it may stay."""
        if len(self.connections) >= CONNECTIONS:
            counts = Counter(one.network for one in self.connections)
            idle = (one for one in self.connections if one.can_give_way)
            if counts[connection.network] > MANY:
                idle = (one for one in idle if one.network == connection.network)
                leaving = next(idle, None)
            else:
                many = (one for one in self.connections if counts[one.network] > MANY)
                leaving = next(many, None) or next(idle, None)
            if leaving is None:
                return False
            leaving.end("others need its place")
        self.connections[connection] = None
        return True

    # --- files that change -----------------------------------------------------------

    def _look_at_keys(self) -> None:
        self.loop.call_later(LOOK_S, self._look_at_keys)
        self.handshakers.submit(self.app.keys.look, lambda _, error: None)

    def _look_at_certificate(self) -> None:
        certificate = self.certificate
        assert certificate is not None
        self.loop.call_later(WATCH_S, self._look_at_certificate)
        seen, self._seen = self._seen, certificate.stamp()
        if seen == self._seen and (seen != certificate.tried or certificate.failure):
            self.handshakers.submit(certificate.blocking_load, self._loaded)

    def _loaded(self, loaded: Loaded | None, error: Exception | None) -> None:
        certificate = self.certificate
        assert certificate is not None
        if loaded is not None:
            certificate.take(loaded)
            log.info("another certificate counts from now on: %s", certificate)
            return
        certificate.failure = str(error)
        if certificate.is_news:
            certificate.is_news = False
            log.error("%s; the former one stays", error)

    def reconfigure(self, relays: Sequence[str], token_ttl_s: float) -> None:
        """Take these settings, and what is in the files; on the loop's thread.

        Raises ConfigurationError; what comes behind that stays as it was.
        """
        loaded = self.certificate.blocking_load() if self.certificate is not None else None
        try:
            self.app.configure(relays, token_ttl_s)
        except StoreError as error:
            raise ConfigurationError(f"--token-ttl: {error}") from None
        self.app.keys.read()
        if loaded is not None and self.certificate is not None:
            self.certificate.take(loaded)

    # --- how it is -------------------------------------------------------------------

    def ready(self) -> str:
        """Return why nobody is served, "" if somebody could be."""
        return "stopping" if self._is_stopping or self._is_draining else ""

    def summary(self) -> str:
        """Return how it goes in one line, for people."""
        scheme = "http" if self.certificate is None else "https"
        listens = f"listening on {scheme}://{host_text(self.address.host or '*', self.port)}"
        return self.ready() or listens

    def report(self) -> dict[str, Any]:
        """Return how it goes, for SIGUSR1."""
        return {
            "program": "snitun-master",
            "is_ready": not self.ready(),
            "summary": self.summary(),
            "figures": {
                "requests": f"{self.app.answered} answered, {len(self.connections)} connections",
                "certificate": str(self.certificate or "none"),
            },
        }


def _network(text: str) -> Any:
    try:
        return ip_network(text)
    except ValueError as error:
        found = shown(text) + ", which has host bits set" * ("host bits" in str(error))
        expected = "an address, or a network such as 203.0.113.0/24 or 2001:db8::/32"
        raise UsageError(f"--proxy-protocol-from: {found}; expected {expected}") from None
