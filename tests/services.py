"""Server and Client inside the test's process, and hand-made peers that speak frame by frame."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from snitun_sync.client import Client
from snitun_sync.net.endpoint import Endpoint as ToService
from snitun_sync.protocol import frame
from snitun_sync.protocol.aes import load
from snitun_sync.protocol.cipher import unit_cipher
from snitun_sync.protocol.handshake import ClientHandshake, Handshake, RelayHandshake
from snitun_sync.server import Server
from tests.support import WAIT_S, Credentials, Device, Endpoint, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snitun_sync.net.loop import Timer
    from snitun_sync.net.service import Service


def connector(client: Client) -> ToService:
    """Return who opens the connections of a client's only endpoint."""
    found = client.endpoints.routes[0].connector
    assert isinstance(found, ToService)
    return found


def on_loop(service: Service, function: Callable[[], Any]) -> Any:
    """Return what `function()` returns on the service's own thread."""
    results: list[Any] = []
    service.loop.call_soon_threadsafe(lambda: results.append(function()))
    wait_until(lambda: results)
    return results[0]


def let_expire(service: Service, timer: Timer | None) -> None:
    """Let a timer's time come now."""
    assert timer is not None

    def expire() -> None:
        callback = timer.callback
        assert callback is not None, "it has come already, or was cancelled"
        timer.cancel()
        callback()

    on_loop(service, expire)


def is_idle(service: Service) -> bool:
    """Tell whether no channel, nothing held and no timer but the tunnels' own is left."""
    timers = {t._timer for t in service.tunnels}
    expiries = sum(1 for t in service.tunnels if hasattr(t._owner, "_expiry"))
    return (
        not service.bridges.all
        and not service.bridges.held_bytes
        and not service.bridges.holding_tunnels
        and not getattr(service, "arrivals", ())
        and service.loop.timer_count <= len(timers) + expiries
        and all(not t.mux.channels and not t.mux._fences and not t._queue for t in service.tunnels)
    )


class Services:
    """Our relay and our client, connected."""

    def __init__(self, folder: Path, endpoint: Endpoint | None = None, **options: Any) -> None:
        self.endpoint = endpoint or Endpoint()
        client_options = {
            name: options.pop(name)
            for name in ("endpoint_address", "client_budget_bytes", "crypto", "client_options")
            if name in options
        }
        crypto = client_options.get("crypto", "")
        server_options = (
            {"budget_bytes": options.pop("budget_bytes")} if "budget_bytes" in options else {}
        )
        server_options.update(options.pop("server_options", {}))
        self.credentials = Credentials(folder, **options)
        self.server = Server(
            [self.credentials.fernet_key], ["127.0.0.1:0"], crypto=crypto, **server_options
        ).start()
        self.port = self.server.ports[0]
        budget = client_options.get("client_budget_bytes")
        self.client = Client(
            self.credentials.at(f"127.0.0.1:{self.port}"),
            client_options.get("endpoint_address", self.endpoint.address),
            crypto=crypto,
            **({"budget_bytes": budget} if budget else {}),
            **client_options.get("client_options", {}),
        ).start()
        assert self.client.wait_until_up(WAIT_S)

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop()
        self.server.stop()
        self.endpoint.close()

    def device(self, command: str = "", **options: Any) -> Device:
        """Connect a device."""
        return Device(self.port, command, **options)

    def wait_until_idle(self) -> None:
        """Wait until nothing is left in either of them."""
        for service in (self.server, self.client):
            wait_until(lambda service=service: is_idle(service), f"{service} is idle")  # type: ignore[misc]


class Raw:
    """One end of a tunnel by hand: a blocking socket behind the handshake."""

    def __init__(self, sock: socket.socket, credentials: Credentials, *, is_relay: bool) -> None:
        self.sock = sock
        sock.settimeout(WAIT_S)
        payload = credentials.payload
        self.cipher = unit_cipher(
            payload.cipher,
            load(),
            payload.aes_key,
            payload.aes_iv,
            is_relay=is_relay,
            random=os.urandom,
        )
        self.recorded = b""
        """All that this end has sent, sealed."""
        self._is_relay = is_relay
        self._buffer = b""

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def handshake(self, token: str = "") -> None:
        """Do this end's part of the handshake."""
        aes = load()
        shake: Handshake
        if self._is_relay:
            shake = RelayHandshake(self.cipher, aes, os.urandom)
        else:
            shake = ClientHandshake(self.cipher, aes, token)
        self._send(shake.first())
        answer = b""
        while not shake.is_done:
            data = self.sock.recv(65536)
            assert data, "the other side closed during the handshake"
            answer += shake.receive(data)
        if answer:
            self._send(answer)
        self._buffer = shake.rest

    def _send(self, data: bytes) -> None:
        self.recorded += data
        self.sock.sendall(data)

    def send(self, flow: int, channel_id: bytes, extra: bytes = b"", data: bytes = b"") -> None:
        """Send a frame; the payload of NEW is sealed as in version 2."""
        header = frame.HEADER.pack(
            channel_id, flow, len(data), extra.ljust(frame.EXTRA_SIZE, b"\0")
        )
        if flow == frame.NEW and data:
            self._send(b"".join(self.cipher.seal([header, data])))
        else:
            self._send(self.cipher.seal([header])[0] + data)

    def new(self, channel_id: bytes, address: bytes = bytes([192, 0, 2, 1])) -> None:
        """Open a channel, as in version 2."""
        self.send(frame.NEW, channel_id, data=frame.pack_address(address).ljust(16, b"\0"))

    def receive(self) -> tuple[bytes, int, bytes, bytes]:
        """Return the next frame: id, flow, extra and data."""
        unit = self._take(frame.HEADER_SIZE + self.cipher.overhead)
        channel_id, flow, size, extra = frame.HEADER.unpack(self.cipher.open(unit))
        if flow == frame.NEW and size:
            return (
                channel_id,
                flow,
                extra,
                self.cipher.open(self._take(size + self.cipher.overhead)),
            )
        return channel_id, flow, extra, self._take(size)

    def receive_flow(self, wanted: int) -> tuple[bytes, bytes, bytes]:
        """Return id, extra and data of the next frame of this flow; answer PINGs meanwhile."""
        while True:
            channel_id, flow, extra, data = self.receive()
            if flow == wanted:
                return channel_id, extra, data
            if flow == frame.PING and extra.startswith(b"ping"):
                self.send(frame.PING, channel_id, b"pong")

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = self.sock.recv(1 << 20)
            if not data:
                raise EOFError
            self._buffer += data
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def prove(self) -> None:
        """As a relay: answer the client's first PING."""
        channel_id, flow, extra, _ = self.receive()
        assert (flow, extra[:4]) == (frame.PING, b"ping")
        self.send(frame.PING, channel_id, b"pong")

    def wait_for_end(self) -> None:
        """Read until the other side has closed or reset the connection."""
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                self.receive()


def raw_client(credentials: Credentials, port: int) -> Raw:
    """Connect to a relay, do the handshake, and let it know that GOAWAY is understood."""
    raw = Raw(socket.create_connection(("127.0.0.1", port)), credentials, is_relay=False)
    raw.handshake(credentials.token)
    raw.send(frame.PING, b"first ping......", frame.EXTRA_PING_GOAWAY)
    assert raw.receive_flow(frame.PING)[0] == b"first ping......"
    return raw


class RawRelay:
    """A relay by hand: it accepts clients one by one."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(WAIT_S)
        self.port: int = self.listener.getsockname()[1]
        credentials.at(f"127.0.0.1:{self.port}")

    def __enter__(self) -> RawRelay:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def accept(self) -> socket.socket:
        """Return the next client's connection, its token read."""
        sock, _ = self.listener.accept()
        sock.settimeout(WAIT_S)
        token = b""
        while len(token) < len(self.credentials.token):
            piece = sock.recv(65536)
            assert piece
            token += piece
        assert token.decode() == self.credentials.token
        return sock

    def tunnel(self, *, prove: bool = True) -> Raw:
        """Accept a client and do the handshake; `prove`: answer its PING too."""
        raw = Raw(self.accept(), self.credentials, is_relay=True)
        raw.handshake()
        if prove:
            raw.prove()
        return raw


class ConnectProxy:
    """An HTTP proxy that knows CONNECT, and remembers who wanted what."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.targets: list[str] = []
        self.logins: list[str] = []
        """USER:PASSWORD of each request, "" where there was none."""
        self.is_refusing = False
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> ConnectProxy:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(WAIT_S)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        self._open.add(sock)
        with sock, contextlib.suppress(OSError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (piece := sock.recv(1)):
                    return
                head += piece
            login = re.search(rb"Proxy-Authorization: Basic (\S+)", head)
            self.logins.append(base64.b64decode(login[1]).decode() if login else "")
            target = head.split()[1].decode()
            self.targets.append(target)
            if self.is_refusing:
                sock.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                return
            host, _, port = target.rpartition(":")
            with socket.create_connection((host, int(port)), WAIT_S) as far:
                sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                far.settimeout(None)
                back = threading.Thread(target=_pass_on, args=(far, sock))
                back.start()
                _pass_on(sock, far)
                back.join(WAIT_S)
        self._open.discard(sock)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    """Pass on all that comes, and the end."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Return the next `size` bytes."""
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, "the other side closed the connection"
        data += piece
    return data


@contextlib.contextmanager
def refusing_port() -> Iterator[int]:
    """Yield a port that refuses connections and that nobody else gets."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]
