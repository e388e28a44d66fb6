"""The self-probe: is what devices see under our hostname what our endpoint shows?

As a device would, it opens the public hostname, through DNS and the relay, and compares the
leaf certificate that it gets with the one that the endpoint shows directly. Who has taken the
name over, or a route that leads elsewhere, can't show that one: the handshake of TLS proves
that its key is there. This brings `ssl` into memory, 4 MiB: it is loaded only where it is wanted.
"""

from __future__ import annotations

import logging
import socket
import ssl
import time
from functools import partial

from ..net.dialing import blocking_dial
from ..net.sockets import reason
from ..net.tuning import CONNECT_S
from ..protocol.names import Address
from ..tls import said_by
from .retry import FIRST_S
from .settings import PROBE_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Union

    from ..net.loop import Timer
    from ..net.proxy import Proxy
    from ..net.workers import Workers
    from .client import Client

    Expected = Union[bytes, tuple[Address, bytes], None]
    """A certificate in DER (b"": any), or which endpoint shows it, after which preface."""

log = logging.getLogger("snitun_sync")

# After a failure the next probe comes sooner.
AGAIN_S = 30.0
# So many failures in a row, and another tunnel is opened: it may lead to where this one doesn't.
# The next one comes after twice as many: each cuts the connections that outlive its takeover.
RENEW_AFTER = 3
# Only a resolver that hangs takes so long; all else has less.
OVERDUE_S = 90.0


class Probe:
    """Probes again and again; of the loop's thread."""

    def __init__(self, client: Client, workers: Workers) -> None:
        self._client, self._workers = client, workers
        self._is_running = self._is_stale = self._is_closed = False
        self._failures = 0  # in a row that another tunnel may mend
        self._timer: Timer | None = None
        self.failure = ""
        """Why the last probe didn't get through, "" if it did."""
        self.checked_at: float | None = None
        """When the last probe ended, UTC Unix seconds."""
        self.took_s = 0.0
        self._begun_at = 0.0
        if client._serving is not None:
            self.soon()

    def soon(self) -> None:
        """Probe in a moment: there is a tunnel, another one, or there are other settings.

        What is under way says nothing of them: it doesn't count.
        """
        self._is_stale = self._is_running
        self._schedule(FIRST_S)

    def doubt(self) -> str:
        """Return why it isn't sure that devices get through; "" if it is."""
        since_s = self._client.loop.now - self._begun_at
        if self._is_running and since_s > OVERDUE_S:
            return f"self-probe: under way for {since_s:.0f} s"
        return "self-probe: not done yet" if self.checked_at is None else self.failure

    def close(self) -> None:
        """Probe no more; what is under way is forgotten."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def report(self) -> dict[str, Any]:
        """Return what /status shows of it."""
        from ..net.figures import utc_text  # noqa: PLC0415

        return {
            "checked": utc_text(self.checked_at),
            "took_s": round(self.took_s, 3),
            "failure": self.failure or None,
        }

    def _schedule(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._client.loop.call_later(delay_s, self._start)

    def _start(self) -> None:
        self._timer = None
        client, settings = self._client, self._client.settings
        if self._is_running or client._serving is None:
            return  # the one that runs, or the next tunnel, goes on
        hostname = self._hostname
        public = settings.probe_address or Address(hostname, PROBE_PORT)
        job = partial(_blocking_probe, hostname, public, self._expected(), settings.proxy)
        self._begun_at = client.loop.now
        self._is_running = self._workers.submit(job, self._done)
        if not self._is_running:
            self._schedule(AGAIN_S)

    @property
    def _hostname(self) -> str:
        ticket = self._client.ticket
        return "" if ticket is None else ticket.hostname

    def _expected(self) -> Expected:
        """Return the certificate that devices should see, or how to find out on a worker thread."""
        route = self._client.endpoints.find(self._hostname)
        if route is None:
            return None
        if route.certificate is not None:
            return route.certificate.leaf
        address = route.settings.address
        return (address, route.settings.preface()) if address is not None else b""

    def _done(self, found: tuple[str, bool] | None, error: Exception | None) -> None:
        self._is_running = False
        if self._is_closed:
            return
        if self._is_stale:
            self._is_stale = False
            if self._timer is None:
                self._start()
            return
        self.took_s = self._client.loop.now - self._begun_at
        client, before = self._client, self.failure
        failure, is_local = found or (reason(error), True)
        self.failure = failure and f"self-probe: {failure}"
        self.checked_at = time.time()
        self._failures = self._failures + 1 if failure and not is_local else 0
        if self.failure and self.failure != before:
            log.warning("%s", self.failure)
        elif before and not self.failure:
            log.info("self-probe: devices get through again")
        interval_s = client.settings.probe_s
        self._schedule(min(AGAIN_S, interval_s) if self.failure else interval_s)
        client.tell()
        tunnel = client._serving
        if tunnel is None or not self._failures:
            return
        tunnel.probe()
        times, rest = divmod(self._failures, RENEW_AFTER)
        is_due = not rest and times & (times - 1) == 0  # after 1, 2, 4, 8 … times RENEW_AFTER
        if is_due and client._opening is None and not client._is_spent:
            log.warning("self-probe: failed %d times; opening another tunnel", self._failures)
            client.renew()


def _blocking_probe(
    hostname: str, public: Address, expected: Expected, proxy: Proxy | None
) -> tuple[str, bool]:
    """Return why devices don't get through, "" if they do; and whether that is the endpoint.

    For a worker thread. Where it is the endpoint, no other tunnel helps.
    """
    if not hostname:
        return "the ticket names no hostname that could be opened", True
    if expected is None:
        return f"no endpoint for {hostname}", True
    if isinstance(expected, tuple):
        endpoint, preface = expected
        try:
            expected = _blocking_leaf(hostname, endpoint, None, preface)
        except (OSError, ValueError) as error:
            return f"endpoint {endpoint} shows no certificate: {_said(error)}", True
    try:
        found = _blocking_leaf(hostname, public, proxy)
    except ssl.SSLError as error:
        return f"{public} ends the TLS handshake for {hostname}: {_said(error)}", False
    except (OSError, ValueError) as error:
        return f"can't reach {public}: {_said(error)}", False
    if expected and found != expected:
        return f"what {public} shows for {hostname} is not the endpoint's certificate", False
    return "", False


def _blocking_leaf(
    hostname: str, address: Address, proxy: Proxy | None, preface: bytes = b""
) -> bytes:
    """Return the certificate, in DER, that is shown for `hostname` at `address`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Who signed it doesn't matter: it is compared with the very one.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with blocking_dial(address, CONNECT_S, proxy) as sock:
        sock.settimeout(CONNECT_S)  # for the handshake as a whole: see ssl.SSLSocket
        sock.sendall(preface)
        with context.wrap_socket(sock, server_hostname=hostname) as secured:
            certificate = secured.getpeercert(binary_form=True)
    if not certificate:
        raise OSError("no certificate")
    return certificate


def _said(error: Exception) -> str:
    if isinstance(error, socket.timeout):
        return f"no answer within {CONNECT_S:.0f} s"
    return said_by(error)
