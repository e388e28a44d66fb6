"""Services within the program: handlers and WSGI applications, as a client's endpoints."""

from __future__ import annotations

from functools import partial

from ..errors import MisuseError
from ..net.service import Service
from .settings import ANY, THREADS, WAITING, EndpointSettings

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from .endpoints import Endpoints
    from .handlers import Handlers
    from .wsgi import Application


class Serving(Service):
    """The part of a client that other programs give their services to."""

    endpoints: Endpoints

    def serve(
        self,
        handler: Callable[[socket.socket, str], object],
        hostname: str | Sequence[str] = ANY,
        *,
        threads: int = THREADS,
        waiting: int = WAITING,
        tls_cert: str = "",
        tls_key: str = "",
        tls_alpn: str = "",
    ) -> None:
        """Let devices that ask for `hostname` talk to `handler(connection, device_address)`.

        Before the client runs. The handler is called on one of at most `threads` threads, once
        for each connection; `waiting` more may wait for a thread. `connection` is a blocking
        socket, closed when the handler returns; an exception cuts it. `device_address` is
        the device's IP address, "" where it isn't known. `hostname`: see EndpointSettings.names;
        by default all that have no other endpoint. With `tls_cert` TLS ends here, and the
        connection has plaintext; without it the handler gets TLS as the device sends it.
        Raises ConfigurationError, and MisuseError once the client runs.
        """
        from .handlers import Call, Handlers  # noqa: PLC0415  few have handlers

        settings = EndpointSettings(
            None, hostname, tls_cert=tls_cert, tls_key=tls_key, tls_alpn=tls_alpn
        )
        self._add(settings, Handlers(self.loop, partial(Call, handler), threads, waiting))

    def serve_wsgi(
        self,
        app: Application,
        hostname: str | Sequence[str] = ANY,
        *,
        threads: int = THREADS,
        waiting: int = WAITING,
        tls_cert: str,
        tls_key: str = "",
    ) -> None:
        """Let devices that ask for `hostname` use a WSGI application (PEP 3333) over HTTPS.

        Before the client runs. All is as with `serve`; REMOTE_ADDR is the device's
        address. A connection between two requests takes no thread.
        """
        from .handlers import Handlers  # noqa: PLC0415
        from .wsgi import WsgiConversation  # noqa: PLC0415

        settings = EndpointSettings(None, hostname, tls_cert=tls_cert, tls_key=tls_key)
        make = partial(
            WsgiConversation, app, scheme="https", others_wait=lambda: handlers.has_waiting
        )
        handlers: Handlers = Handlers(self.loop, make, threads, waiting, waits_first=True)
        self._add(settings, handlers)

    def _add(self, settings: EndpointSettings, handlers: Handlers) -> None:
        if self._begun.locked():
            raise MisuseError("serve: the client runs already, or has ended")
        self.endpoints.add(settings, handlers)
