"""A device's channel until it has its connection: whom it asks for, TLS, and then the endpoint.

    hello ─→ (TLS handshake) ─→ connecting ─→ the bridge goes on alone

The bridge holds meanwhile what arrives. Each step of a handshake runs on a worker thread:
the signature of an RSA key takes a small machine 10 ms and more.
"""

from __future__ import annotations

from ..errors import EndpointError, HelloError, SniTunError
from ..net.bridge import BridgeState
from ..net.sockets import pack_ip
from ..net.tuning import HANDSHAKE_S
from ..protocol.hello import HelloReader
from ..protocol.names import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from ..net.bridge import Bridge
    from ..net.endpoint import Target
    from ..net.loop import Timer
    from ..tls import TlsStream
    from .endpoints import Endpoints, Route


class Arrival:
    """See the head of this file. It is the target of the connection, for its bridge."""

    __slots__ = (
        "_bridge",
        "_endpoints",
        "_hello",
        "_is_answered",
        "_is_shaking",
        "_offered",
        "_route",
        "_stream",
        "_timer",
        "hostname",
    )

    def __init__(self, endpoints: Endpoints, bridge: Bridge) -> None:
        self._endpoints, self._bridge = endpoints, bridge
        self.hostname = ""
        """What the device asks for, in normal form, once that is known and if it says so."""
        self._hello: HelloReader | None = None
        self._offered: tuple[bytes, ...] = ()  # ALPN
        self._route: Route | None = None
        self._stream: TlsStream | None = None
        self._is_shaking = False  # a worker has the stream
        self._is_answered = False  # the first step is done
        self._timer: Timer | None = None

    @property
    def device(self) -> str:
        """The device's IP address, "" where it isn't known."""
        return self._bridge.device if any(self._address()) else ""

    def _address(self) -> bytes:
        return pack_ip(self._bridge.device)

    def begin(self) -> None:
        """Find out where the device is to be brought, and bring it there."""
        bridge = self._bridge
        self._hello = HelloReader(bridge.held)
        self._timer = self._endpoints.loop.call_later(HANDSHAKE_S, self._overdue)
        bridge.watcher = self
        self.look()
        is_early = bridge.watcher is self and bridge.state is BridgeState.OPEN
        if is_early and bridge.channel.has_paused_peer:
            # Because others hold much. But without the rest of the ClientHello it goes nowhere.
            bridge.tunnel.mux.resume(bridge.channel)

    def look(self) -> None:
        """The bridge holds more."""
        if self._stream is not None:
            self._shake()
            return
        hello, endpoints = self._hello, self._endpoints
        assert hello is not None
        try:
            hostname = hello.look()
            if hostname is None:
                return
            if endpoints.needs_alpn:
                self._offered = hello.alpn()
        except HelloError as error:
            self._refuse("hello", str(error))
            return
        self._hello, self.hostname = None, hostname
        route = endpoints.find(hostname, self._offered)
        if route is None:
            self._refuse("name", f"no endpoint for {shown(hostname) if hostname else 'no name'}")
        elif route.certificate is None:
            self._connect(route)
        elif route.certificate.context is None:
            self.abort(EndpointError(route.certificate.failure))
        else:
            from ..tls import TlsStream  # noqa: PLC0415  few need it

            self._route, self._stream = route, TlsStream(route.certificate.context)
            endpoints.handshake_began(self)
            self._shake()

    def ended(self) -> None:
        """The device has gone. It may have said something behind the handshake's last step."""
        if not (self._is_shaking and self._is_answered):
            self._bridge.close()

    def _refuse(self, name: str, why: str) -> None:
        self._endpoints.limits.refuse(name, f"{self._bridge.device}: {why}")
        self._bridge.abort(SniTunError(why))

    def _overdue(self) -> None:
        self._timer = None
        what = "ClientHello" if self._stream is None else "TLS handshake"
        self._refuse("hello", f"no whole {what} within {HANDSHAKE_S:.0f} s")

    # --- TLS -----------------------------------------------------------------------

    def _shake(self) -> None:
        """Take what has arrived, and go on with the handshake."""
        stream = self._stream
        if self._is_shaking or stream is None:
            return
        stream.receive(self._bridge.take_held())
        self._is_shaking = self._endpoints.handshakers.submit(self._blocking_shake, self._shaken)
        if not self._is_shaking:
            self._refuse("handshakes", "too many TLS handshakes wait")

    def _blocking_shake(self) -> bool:
        """Do a step of the handshake, unless the device has gone before its turn came."""
        assert self._stream is not None
        return self._bridge.state is not BridgeState.CLOSED and self._stream.handshake()

    def _shaken(self, is_done: bool | None, error: Exception | None) -> None:
        self._is_shaking, self._is_answered = False, True
        bridge, stream, route = self._bridge, self._stream, self._route
        assert stream is not None
        assert route is not None
        bridge.send_first(stream.pending())  # also the alert of one that failed
        if error is not None:
            self._refuse("tls", str(error))  # also of one who has said why, and gone
        elif bridge.state is BridgeState.CLOSED:
            pass
        elif is_done:
            bridge.secure(stream)
            if bridge.state is BridgeState.OPEN or bridge.held:
                self._connect(route)
            else:
                bridge.close()
        elif bridge.held:
            self._shake()
        elif bridge.state is not BridgeState.OPEN:
            bridge.close()

    def drop(self) -> None:
        """Others need the room: this handshake has taken longest."""
        self._refuse("handshakes", "too many TLS handshakes at a time, and this is the oldest")

    # --- the connection ------------------------------------------------------------

    def _connect(self, route: Route) -> None:
        self._settle()
        self._route = route
        route.opened += 1
        route.connector.connect(self)

    def _settle(self) -> None:
        """It is clear where it leads, or that it leads nowhere."""
        self._bridge.watcher = None
        self._endpoints.handshake_ended(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connected(self, sock: socket.socket) -> None:
        """Hand the connection to the bridge."""
        assert self._route is not None
        settings, preface = self._route.settings, b""
        if settings.proxy_version:
            preface = settings.preface(
                self._address(),
                self._stream,
                authority=self.hostname,
                alpn=b"".join(self._offered[:1]),
                unique_id=self._bridge.channel.id.hex().encode(),
            )
        self._bridge.connected(sock, preface)

    def abort(self, error: SniTunError) -> None:
        """There is no connection."""
        self._bridge.abort(error)

    def cancel(self, bridge: Target) -> None:
        """The bridge is closed."""
        self._settle()
        if self._route is not None:
            self._route.connector.cancel(self)
