"""What drives a tunnel from outside while it is measured: devices, the endpoint, many tunnels.

    device ──TCP──▶ relay ──tunnel──▶ client ──TCP──▶ endpoint

Every connection begins with a genuine ClientHello, because the relay routes by it. What
follows is opaque to every tunnel, so it isn't encrypted here, and TLS's own cost stays out of
the figures: the endpoint drops the ClientHello and reads a command line.

    SINK n      read n bytes, then answer OK
    SOURCE n    send n bytes, then close
    ECHO        send back what comes

Run as a program, it is a process of its own:

    load.py endpoint                              prints its port, serves until it is ended
    load.py bulk HOST PORT NAME IN OUT SIZE WARM  IN downloads and OUT uploads of SIZE bytes, again
                                                  and again; prints READY after WARM seconds, and
                                                  bytes a second once standard input ends
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import selectors
import socket
import ssl
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

CHUNK = 256 * 1024
STALL_S = 30.0
_FILL = memoryview(bytes(CHUNK))


def client_hello(hostname: str | None) -> bytes:
    """Return the ClientHello that this machine's OpenSSL makes for `hostname`, or without one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=hostname)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


class _Served:
    """A connection at the endpoint: ClientHello, command line, then work."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._head = bytearray()
        self._command = ""
        self._left = 0
        self._pending = memoryview(b"")

    def wants(self) -> int:
        is_sending = self._command == "SOURCE" or (self._command == "ECHO" and self._pending)
        return selectors.EVENT_WRITE if is_sending else selectors.EVENT_READ

    def step(self, scratch: bytearray) -> bool:
        """Read or write once; return whether the connection goes on."""
        if self._command == "SOURCE":
            self._left -= self.sock.send(_FILL[: self._left])
            return self._left > 0
        if self._pending:
            self._pending = self._pending[self.sock.send(self._pending) :]
            return True
        size = self.sock.recv_into(scratch)
        if not size:
            return False
        if self._command == "SINK":
            return self._sink(size)
        if self._command == "ECHO":
            sent = self.sock.send(memoryview(scratch)[:size])
            self._pending = memoryview(bytes(scratch[sent:size]))
            return True
        self._head += scratch[:size]
        return self._parse()

    def _sink(self, size: int) -> bool:
        self._left -= size
        if self._left <= 0:
            self.sock.sendall(b"OK")
        return self._left > 0

    def _parse(self) -> bool:
        start = 5 + int.from_bytes(self._head[3:5], "big")
        end = self._head.find(b"\n", start)
        if len(self._head) < 5 or end < 0:
            return True
        self._command, _, count = self._head[start:end].decode().partition(" ")
        self._left = int(count or 0)
        rest = bytes(self._head[end + 1 :])
        if self._command == "SINK":
            return self._sink(len(rest))
        self._pending = memoryview(rest)
        return True


def serve_endpoint(listener: socket.socket) -> None:
    """Be the endpoint until the process ends."""
    scratch = bytearray(CHUNK)
    selector = selectors.DefaultSelector()
    listener.setblocking(False)
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                with contextlib.suppress(OSError):
                    sock, _ = listener.accept()
                    sock.setblocking(False)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    selector.register(sock, selectors.EVENT_READ, _Served(sock))
                continue
            served: _Served = key.data
            try:
                goes_on = served.step(scratch)
            except BlockingIOError:
                continue
            except OSError:
                goes_on = False
            if not goes_on:
                selector.unregister(served.sock)
                served.sock.close()
            elif key.events != served.wants():
                selector.modify(served.sock, served.wants(), served)


@dataclass
class Target:
    """Where devices connect, and the hostname that they ask for."""

    host: str
    port: int
    hostname: str
    hello: bytes = field(default=b"", repr=False)

    def connect(self, command: str, timeout_s: float = STALL_S) -> socket.socket:
        """Open a device's connection, with a command for the endpoint."""
        self.hello = self.hello or client_hello(self.hostname)
        sock = socket.create_connection((self.host, self.port), timeout=timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(self.hello + command.encode() + b"\n")
        return sock


def _ready(selector: selectors.BaseSelector, what: str) -> list[selectors.SelectorKey]:
    ready = selector.select(STALL_S)
    if not ready:
        raise TimeoutError(f"{what} stalled for {STALL_S:.0f} s")
    return [key for key, _ in ready]


def _sock(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


class Bulk:
    """Downloads and uploads that go on at once."""

    def __init__(self, target: Target, downloads: int, uploads: int, size: int) -> None:
        self.moved = 0
        self._selector = selectors.DefaultSelector()
        self._target = target
        self._size = size
        self._left: dict[socket.socket, int] = {}
        self._scratch = bytearray(CHUNK)
        for command, count in (("SOURCE", downloads), ("SINK", uploads)):
            for _ in range(count):
                self.start(command)

    def start(self, command: str) -> None:
        """Begin one more."""
        sock = self._target.connect(f"{command} {self._size}")
        sock.setblocking(False)
        self._left[sock] = self._size
        event = selectors.EVENT_READ if command == "SOURCE" else selectors.EVENT_WRITE
        self._selector.register(sock, event, command)

    def is_complete(self) -> bool:
        """Whether none goes on."""
        return not self._left

    def turn(self) -> list[str]:
        """Move what can be moved; return the commands of those that are complete."""
        complete = []
        for key in _ready(self._selector, "bulk transfer"):
            sock = _sock(key)
            if self._move(sock, str(key.data)):
                self._selector.unregister(sock)
                sock.close()
                del self._left[sock]
                complete.append(str(key.data))
        return complete

    def _move(self, sock: socket.socket, command: str) -> bool:
        left = self._left[sock]
        if command == "SOURCE":
            size = sock.recv_into(self._scratch)
            if not size:
                raise ConnectionError(f"a download ended {left} bytes early")
        elif left:
            size = sock.send(_FILL[:left])
            if size == left:
                self._selector.modify(sock, selectors.EVENT_READ, command)
        else:
            if sock.recv(2) != b"OK":
                raise ConnectionError("an upload was cut short")
            return True
        self._left[sock] = left - size
        self.moved += size
        return command == "SOURCE" and size == left


def transfer(target: Target, downloads: int, uploads: int, size: int) -> float:
    """Move `size` bytes over each of so many connections; return the seconds it took."""
    begin = time.perf_counter()
    bulk = Bulk(target, downloads, uploads, size)
    while not bulk.is_complete():
        bulk.turn()
    return time.perf_counter() - begin


def bulk_until_eof(target: Target, downloads: int, uploads: int, size: int, warm_s: float) -> float:
    """Transfer until standard input ends; return bytes a second since READY was printed."""
    bulk = Bulk(target, downloads, uploads, size)
    end = time.perf_counter() + warm_s
    begin, before = end, 0
    is_warm = False
    while not select.select([0], [], [], 0)[0]:
        for command in bulk.turn():
            bulk.start(command)
        if not is_warm and time.perf_counter() >= end:
            is_warm = True
            begin, before = time.perf_counter(), bulk.moved
            print("READY", flush=True)
    return (bulk.moved - before) / (time.perf_counter() - begin)


def hold(target: Target, count: int) -> list[socket.socket]:
    """Open channels that echo, each proven by an exchange."""
    socks = []
    for _ in range(count):
        sock = target.connect("ECHO")
        sock.sendall(b"x")
        if sock.recv(1) != b"x":
            raise ConnectionError("a channel did not open")
        socks.append(sock)
    return socks


def exchange(socks: list[socket.socket], count: int, size: int = 64) -> list[float]:
    """Exchange `size` bytes, `count` times in all; return how long each took, sorted."""
    message = bytes(size)
    took: list[float] = []
    sent_at: dict[socket.socket, float] = {}
    missing = dict.fromkeys(socks, size)
    issued = 0
    with selectors.DefaultSelector() as selector:
        for sock in socks[:count]:
            selector.register(sock, selectors.EVENT_READ)
            sent_at[sock] = time.perf_counter()
            sock.sendall(message)
            issued += 1
        while len(took) < count:
            for key in _ready(selector, "an exchange"):
                sock = _sock(key)
                part = len(sock.recv(size))
                if not part:
                    raise ConnectionError("a channel was closed")
                missing[sock] -= part
                if missing[sock]:
                    continue
                now = time.perf_counter()
                took.append(now - sent_at[sock])
                missing[sock] = size
                if issued < count:
                    sent_at[sock] = now
                    sock.sendall(message)
                    issued += 1
    return sorted(took)


def exchange_for(sock: socket.socket, seconds: float) -> list[float]:
    """Exchange 64 bytes again and again; return how long each took, sorted."""
    message = bytes(64)
    took: list[float] = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        sock.sendall(message)
        missing = len(message)
        while missing:
            part = len(sock.recv(missing))
            if not part:
                raise ConnectionError("a channel was closed")
            missing -= part
        took.append(time.perf_counter() - begin)
    return sorted(took)


def connections(target: Target, concurrency: int, count: int) -> list[float]:
    """Open, exchange 2 bytes and close, `count` times; return how long each took, sorted."""
    took: list[float] = []
    begun: dict[socket.socket, float] = {}
    with selectors.DefaultSelector() as selector:

        def start() -> None:
            begin = time.perf_counter()
            sock = target.connect("SINK 2")
            sock.sendall(b"hi")
            begun[sock] = begin
            selector.register(sock, selectors.EVENT_READ)

        try:
            while len(took) < count:
                while len(begun) < concurrency and len(took) + len(begun) < count:
                    start()
                for key in _ready(selector, "a connection"):
                    sock = _sock(key)
                    if sock.recv(2) != b"OK":
                        raise ConnectionError("a connection was closed without an answer")
                    took.append(time.perf_counter() - begun.pop(sock))
                    selector.unregister(sock)
                    sock.close()
                    if len(took) + len(begun) < count:
                        start()
        finally:
            for sock in begun:
                sock.close()
    return sorted(took)


def abort_downloads(target: Target, concurrency: int, count: int, size: int) -> None:
    """Begin `count` downloads and cut each half way, with data unread."""
    scratch = bytearray(CHUNK)
    left: dict[socket.socket, int] = {}
    begun = 0
    with selectors.DefaultSelector() as selector:
        while left or begun < count:
            while len(left) < concurrency and begun < count:
                sock = target.connect(f"SOURCE {size}")
                left[sock] = size // 2
                selector.register(sock, selectors.EVENT_READ)
                begun += 1
            for key in _ready(selector, "a download"):
                sock = _sock(key)
                if left[sock] > 0:
                    part = sock.recv_into(scratch, min(CHUNK, left[sock]))
                    if not part:
                        raise ConnectionError(f"a download ended {left[sock]} bytes early")
                    left[sock] -= part
                else:  # readable: there is something that stays unread
                    selector.unregister(sock)
                    sock.close()
                    del left[sock]


# What has to be known of the wire to open a tunnel, see docs/protocol.md.
_PING = 0x08
_UNIT = 32


def tunnel_secrets(
    fernet_key: str, hostname: str, version: int | None
) -> tuple[str, bytes, bytes, float]:
    """Return a token of the relay, and what the session master puts into it."""
    from cryptography.fernet import Fernet

    key, iv, valid = os.urandom(32), os.urandom(16), time.time() + 86400
    payload = {"valid": valid, "hostname": hostname, "aes_key": key.hex(), "aes_iv": iv.hex()}
    if version is not None:
        payload["protocol_version"] = version
    return Fernet(fernet_key).encrypt(json.dumps(payload).encode()).decode(), key, iv, valid


class _Tunnel:
    """A tunnel that is being opened: challenge, answer, PING, pong."""

    def __init__(self, address: tuple[str, int], token: str, key: bytes, iv: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        cipher = Cipher(algorithms.AES(key), modes.CBC(iv))
        self._encryptor: CipherContext = cipher.encryptor()
        self._decryptor: CipherContext = cipher.decryptor()
        self._id = b""
        self._received = b""
        self.sock = socket.create_connection(address, timeout=STALL_S)
        self.sock.sendall(token.encode())

    def step(self) -> bool:
        """Take what has come; return whether the tunnel is up."""
        data = self.sock.recv(_UNIT)
        if not data:
            raise ConnectionError("the relay refused a tunnel")
        self._received += data
        while len(self._received) >= _UNIT:
            unit = self._decryptor.update(self._received[:_UNIT])
            self._received = self._received[_UNIT:]
            if not self._id:
                self._id = os.urandom(16)
                ping = self._id + bytes((_PING, 0, 0, 0, 0)) + b"ping" + os.urandom(7)
                answer = hashlib.sha256(unit).digest()
                self.sock.sendall(self._encryptor.update(answer + ping))
            elif unit[:17] == self._id + bytes((_PING,)) and unit[21:25] == b"pong":
                return True
        return False


def open_tunnels(
    address: tuple[str, int], secrets: list[tuple[str, bytes, bytes, float]], concurrency: int = 64
) -> list[socket.socket]:
    """Open a tunnel with each of these, some at a time; return their sockets once all are up."""
    waiting = iter(secrets)
    opening = 0
    socks: list[socket.socket] = []
    with selectors.DefaultSelector() as selector:
        while len(socks) < len(secrets):
            while opening < concurrency and (secret := next(waiting, None)):
                tunnel = _Tunnel(address, *secret[:3])
                selector.register(tunnel.sock, selectors.EVENT_READ, tunnel)
                opening += 1
            for key in _ready(selector, "opening tunnels"):
                tunnel = key.data
                if tunnel.step():
                    selector.unregister(tunnel.sock)
                    socks.append(tunnel.sock)
                    opening -= 1
    return socks


def percentile(ordered: list[float], share: float) -> float:
    """Return the value at `share` (0 to 1) of a sorted list."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    """Be the process that the arguments name."""
    what, *rest = sys.argv[1:]
    if what == "endpoint":
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        print(listener.getsockname()[1], flush=True)
        serve_endpoint(listener)
    host, port, hostname, downloads, uploads, size, warm_s = rest
    target = Target(host, int(port), hostname)
    print(bulk_until_eof(target, int(downloads), int(uploads), int(size), float(warm_s)))


if __name__ == "__main__":
    main()
