"""Which endpoint a device is brought to: by the hostname that it asks for.

`cam.example.com` goes before `*.example.com`, and that before `*`. Where there is only one
endpoint, and nothing has to be known of the device, nobody looks at what it sends.
"""

from __future__ import annotations

import logging
from functools import partial

from ..net.endpoint import Endpoint
from ..net.workers import Workers
from .settings import ANY, EndpointSettings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..net.bridge import Bridge
    from ..net.loop import Timer
    from ..tls import Certificate, Loaded
    from .arrival import Arrival
    from .client import Client
    from .handlers import Handlers
    from .health import Health

log = logging.getLogger("snitun_sync")

# RFC 8737: who asks for it gets a certificate that proves whom a name belongs to.
ACME_ALPN = b"acme-tls/1"
# TLS handshakes under way: each takes some 45 KiB. One more, and the oldest is dropped.
MAX_HANDSHAKES = 512
# One at a time: the others' turns come soon enough, and a second core is for the loop.
HANDSHAKE_THREADS = 1
HANDSHAKE_IDLE_S = 5.0
# How often to see whether the files of certificates have changed. They are read once they have
# stayed the same for as long: certificate and key don't change in the same moment.
WATCH_S = 3.0


class Route:
    """One endpoint: its settings, who opens connections to it, and how it is."""

    __slots__ = ("certificate", "connector", "health", "opened", "settings")

    def __init__(
        self,
        settings: EndpointSettings,
        connector: Endpoint | Handlers,
        certificate: Certificate | None = None,
    ) -> None:
        self.settings, self.connector = settings, connector
        self.certificate = certificate
        """What devices are shown, where TLS ends here."""
        self.health: Health | None = None
        self.opened = 0
        """How many devices were brought here."""

    def __str__(self) -> str:
        names = ", ".join(self.settings.names)
        return str(self.connector) if names == ANY else f"{names} at {self.connector}"

    def takes_all(self) -> bool:
        """Tell whether a device can be brought here of whom nothing is known."""
        is_plain = self.certificate is None and not self.settings.proxy_version
        return is_plain and self.settings.names == (ANY,) and isinstance(self.connector, Endpoint)

    def doubt(self) -> str:
        """Return why devices don't get through to it; "" if they do, as far as is known."""
        failure = self.certificate.doubt() if self.certificate is not None else ""
        return failure or (self.health.failure if self.health is not None else "")


class Endpoints:
    """All endpoints of a client; of the loop's thread."""

    def __init__(self, client: Client, workers: Workers) -> None:
        self._client, self._workers = client, workers
        self.loop, self.limits = client.loop, client.limits
        self.handshakers = Workers(
            client.loop, HANDSHAKE_THREADS, waiting=MAX_HANDSHAKES, idle_s=HANDSHAKE_IDLE_S
        )
        self.routes: list[Route] = []
        self._own: list[Route] = []  # within this program: no settings change them
        self._by_name: dict[str, Route] = {}
        self._acme: Route | None = None
        self._only: Route | None = None  # where all devices go, if nobody looks at them
        self.needs_alpn = False
        """Whether it matters which protocols a device offers."""
        self._stages: dict[Bridge, Arrival | Endpoint] = {}  # who has a device's channel in hand
        self._handshakes: dict[Arrival, None] = {}  # in the order of their beginning
        self._timer: Timer | None = None
        self._seen: dict[Certificate, object] = {}  # what the last look at their files has shown
        self.replace()

    def __str__(self) -> str:
        return ", ".join(map(str, self.routes)) or "no endpoint"

    # --- settings ------------------------------------------------------------------

    def add(self, settings: EndpointSettings, handlers: Handlers) -> None:
        """Bring devices to a program within this one; it goes before what the settings say."""
        self._client.settings.add_certificate(settings)
        self._own.append(Route(settings, handlers, self._certificate(settings)))
        self.replace()

    def replace(self) -> None:
        """The client has other settings, or one more endpoint."""
        client_settings = self._client.settings
        former = {route.settings.names: route for route in self.routes}
        own = {name for route in self._own for name in route.settings.names}
        self.routes = [
            self._route(settings, former.get(settings.names))
            for settings in client_settings.endpoints
            if not own.issuperset(settings.names)
        ]
        self.routes += self._own
        kept = {route.health for route in self.routes}
        for route in former.values():
            if route.health is not None and route.health not in kept:
                route.health.close()
        for certificate in self._certificates():
            if certificate.failure:
                self._say_failure(certificate)
        self._by_name = {name: route for route in self.routes for name in route.settings.names}
        self._acme = None
        if client_settings.acme_endpoint is not None:
            settings = EndpointSettings(str(client_settings.acme_endpoint), ())
            self._acme = self._route(settings, None)
        versions = [route.settings.proxy_version for route in self.routes]
        self.needs_alpn = self._acme is not None or 2 in versions
        only = self.routes[0] if len(self.routes) == 1 and self._acme is None else None
        self._only = only if only is not None and only.takes_all() else None
        if self._timer is None and self._certificates():
            self._timer = self.loop.call_later(WATCH_S, self._look)

    def _route(self, settings: EndpointSettings, former: Route | None) -> Route:
        assert settings.address is not None
        connector = former.connector if former is not None else None
        if isinstance(connector, Endpoint):
            connector.replace(settings.address, settings.connect_timeout_s)
        else:
            connector = Endpoint(
                self.loop, self._workers, settings.address, settings.connect_timeout_s
            )
        route = Route(settings, connector, self._certificate(settings))
        if former is not None:
            route.opened = former.opened
            if route.certificate is not None and former.certificate is not None:
                route.certificate.inherit(former.certificate)
        if settings.health_interval_s:
            from .health import Health  # noqa: PLC0415  few want it

            health = former.health if former is not None else None
            if health is None or not health.is_for(settings):
                health = Health(self.loop, connector, settings, self._client.tell)
            route.health = health
        return route

    def _certificate(self, settings: EndpointSettings) -> Certificate | None:
        return self._client.settings.certificates.get(settings.tls)

    def _handlers(self) -> list[Handlers]:
        connectors = [route.connector for route in self._own]
        return [each for each in connectors if not isinstance(each, Endpoint)]

    # --- devices -------------------------------------------------------------------

    def connect(self, bridge: Bridge) -> None:
        """Bring a device to its endpoint: call the bridge's `connected`, or abort it."""
        only = self._only
        if only is not None and isinstance(only.connector, Endpoint):
            only.opened += 1
            self._stages[bridge] = only.connector
            only.connector.connect(bridge)
        else:
            from .arrival import Arrival  # noqa: PLC0415  where nobody looks, it isn't needed

            arrival = self._stages[bridge] = Arrival(self, bridge)
            arrival.begin()

    def cancel(self, bridge: Bridge) -> None:
        """The bridge is closed."""
        stage = self._stages.pop(bridge, None)
        if stage is not None:
            stage.cancel(bridge)

    def find(self, hostname: str, offered: Sequence[bytes] = ()) -> Route | None:
        """Return where a device goes that asks for `hostname`, and offers protocols by ALPN."""
        if self._acme is not None and ACME_ALPN in offered:
            return self._acme
        by_name = self._by_name
        parent = f"*.{hostname.partition('.')[2]}"
        return by_name.get(hostname) or by_name.get(parent) or by_name.get(ANY)

    def handshake_began(self, arrival: Arrival) -> None:
        """One more TLS handshake is under way."""
        self._handshakes[arrival] = None
        if len(self._handshakes) > MAX_HANDSHAKES:
            next(iter(self._handshakes)).drop()

    def handshake_ended(self, arrival: Arrival) -> None:
        """It is over; harmless when there was none."""
        self._handshakes.pop(arrival, None)

    def doubt(self) -> str:
        """Return why some devices don't get through; "" if all do, as far as is known."""
        failures = [failure for route in self.routes if (failure := route.doubt())]
        return f"endpoint down: {'; '.join(failures)}" if failures else ""

    # --- certificates --------------------------------------------------------------

    def _certificates(self) -> set[Certificate]:
        """Return those that are shown; endpoints may share one."""
        return {route.certificate for route in self.routes if route.certificate is not None}

    def _look(self) -> None:
        """See whether files of certificates have changed, and read those that have."""
        certificates = self._certificates()
        self._timer = self.loop.call_later(WATCH_S, self._look) if certificates else None
        seen, self._seen = self._seen, {}
        for certificate in certificates:
            stamp = self._seen[certificate] = certificate.stamp()
            is_quiet = seen.get(certificate) == stamp
            if is_quiet and (stamp != certificate.tried or certificate.failure):
                done = partial(self._loaded, certificate)
                self._workers.submit(certificate.blocking_load, done)  # or else the next time

    def _loaded(
        self, certificate: Certificate, loaded: Loaded | None, error: Exception | None
    ) -> None:
        if loaded is not None:
            certificate.take(loaded)
            log.info("another certificate counts from now on: %s", certificate)
        else:
            certificate.failure = str(error)
            self._say_failure(certificate)
        self._client.tell()

    def _say_failure(self, certificate: Certificate) -> None:
        """Say, if it wasn't said before, why what is in the files doesn't count."""
        if certificate.is_news:
            until = "until that has changed, no device gets through"
            then = "the former one stays" if certificate.context else until
            log.error("%s; %s", certificate.failure, then)
            certificate.is_news = False

    def drain(self) -> None:
        """The client stops: wait for nothing that devices might still want."""
        for handlers in self._handlers():
            handlers.drain()

    def close(self) -> None:
        """Free what the endpoints own."""
        for route in self.routes:
            if route.health is not None:
                route.health.close()
        for handlers in self._handlers():
            handlers.close()
        if self._timer is not None:
            self._timer.cancel()
        self.handshakers.close()
