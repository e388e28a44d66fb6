"""The self-probe: is what devices see under our hostname what our endpoint shows?

As a device would, it opens the public hostname, through DNS and the relay, and compares the
leaf certificate that it gets with the one that the endpoint shows directly. Who has taken the
name over, or a route that leads elsewhere, can't show that one: the handshake of TLS proves
that its key is there. This brings `ssl` into memory, 4 MiB: it is loaded only where it is wanted.
"""

from __future__ import annotations

import logging
import ssl
import time
from functools import partial

from ..net.dialing import blocking_dial
from ..net.tuning import CONNECT_S
from ..protocol.names import Address
from .endpoint import reason
from .retry import FIRST_S
from .settings import PROBE_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..net.loop import Timer
    from ..net.proxy import Proxy
    from ..net.workers import Workers
    from .client import Client

log = logging.getLogger("snitun_sync")

# After a failure the next probe comes sooner.
AGAIN_S = 30.0
# So many failures in a row, and another tunnel is opened: it may lead to where this one doesn't.
RENEW_AFTER = 3


class Probe:
    """Probes again and again; of the loop's thread."""

    def __init__(self, client: Client, workers: Workers) -> None:
        self._client, self._workers = client, workers
        self._is_running = self._is_closed = False
        self._failures = 0  # in a row
        self._timer: Timer | None = None
        self.failure = ""
        """Why the last probe didn't get through, "" if it did."""
        self.checked_at: float | None = None
        """When the last probe ended, UTC Unix seconds."""
        self.took_s = 0.0
        if client._serving is not None:
            self.soon()

    def soon(self) -> None:
        """Probe in a moment: there is a tunnel, or another one."""
        self._schedule(FIRST_S)

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
        hostname = settings.ticket.hostname
        public = settings.probe_address or Address(hostname, PROBE_PORT)
        job = partial(_blocking_probe, hostname, public, settings.endpoint, settings.proxy)
        self._is_running = self._workers.submit(job, partial(self._done, time.monotonic()))
        if not self._is_running:
            self._schedule(AGAIN_S)

    def _done(self, begun_at: float, failure: str | None, error: Exception | None) -> None:
        self._is_running = False
        if self._is_closed:
            return
        self.took_s = time.monotonic() - begun_at
        client, before = self._client, self.failure
        self.failure = f"self-probe: {reason(error)}" if failure is None else failure
        self.checked_at = time.time()
        self._failures = self._failures + 1 if self.failure else 0
        if self.failure and self.failure != before:
            log.warning("%s", self.failure)
        elif before and not self.failure:
            log.info("self-probe: devices get through again")
        interval_s = client.settings.probe_s
        self._schedule(min(AGAIN_S, interval_s) if self.failure else interval_s)
        client.tell()
        tunnel = client._serving
        if tunnel is None or not self.failure:
            return
        tunnel.probe()
        if self._failures % RENEW_AFTER == 0 and client._opening is None:
            log.warning("self-probe: failed %d times; opening another tunnel", self._failures)
            client.renew()


def _blocking_probe(hostname: str, public: Address, endpoint: Address, proxy: Proxy | None) -> str:
    """Return why devices don't get through, "" if they do; for a worker thread."""
    try:
        expected = _blocking_leaf(hostname, endpoint, None)
    except (OSError, ValueError) as error:
        return f"self-probe: endpoint {endpoint} shows no certificate: {_said(error)}"
    try:
        found = _blocking_leaf(hostname, public, proxy)
    except ssl.SSLError as error:
        return f"self-probe: {public} ends the TLS handshake for {hostname}: {_said(error)}"
    except (OSError, ValueError) as error:
        return f"self-probe: can't reach {public}: {_said(error)}"
    if found != expected:
        return f"self-probe: what {public} shows for {hostname} is not the endpoint's certificate"
    return ""


def _blocking_leaf(hostname: str, address: Address, proxy: Proxy | None) -> bytes:
    """Return the certificate, in DER, that is shown for `hostname` at `address`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Who signed it doesn't matter: it is compared with the very one.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with blocking_dial(address, CONNECT_S, proxy) as sock:
        sock.settimeout(CONNECT_S)
        with context.wrap_socket(sock, server_hostname=hostname) as secured:
            certificate = secured.getpeercert(binary_form=True)
    if not certificate:
        raise OSError("no certificate")
    return certificate


def _said(error: Exception) -> str:
    """Return what an error of TLS or of the system says, without OpenSSL's file and line."""
    text = getattr(error, "reason", None) or reason(error)
    return str(text).replace("_", " ").lower() if isinstance(error, ssl.SSLError) else str(text)
