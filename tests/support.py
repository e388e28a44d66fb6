"""What many tests need: an endpoint, devices, and programs as real processes.

A device sends a genuine ClientHello and then a command line, as plain bytes: the
relay looks at nothing behind the ClientHello, and the tests see every byte.

    SOURCE n    the endpoint sends n bytes of `pattern` and closes
    SINK n      the endpoint takes n bytes, answers with their SHA-256 in hex and closes
    ECHO        the endpoint sends back what it gets, until the device ends
    EARLY n     the endpoint sends n bytes of `pattern` and closes, whatever the device still sends
    HANG        the endpoint does nothing until the device ends
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

from snitun_sync.net.sockets import unacknowledged_bytes
from snitun_sync.protocol.aes import load
from snitun_sync.protocol.ticket import Ticket
from snitun_sync.protocol.token import Fernet, Payload, new_fernet_key
from tools.load import client_hello as new_client_hello

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).resolve().parent.parent
HOSTNAME = "device.example.test"
MIB = 1024 * 1024
WAIT_S = 30.0
_PATTERN = hashlib.shake_128(b"snitun_sync").digest(1021 * 64)


def pattern(start: int, size: int) -> bytes:
    """Return `size` bytes of an endless sequence, from `start` on; no two MiB of it are alike."""
    at = start % len(_PATTERN)
    return (_PATTERN * ((at + size) // len(_PATTERN) + 1))[at : at + size]


def pattern_sha256(size: int) -> str:
    """Return the SHA-256, in hex, of the first `size` bytes of `pattern`."""
    digest = hashlib.sha256()
    for at in range(0, size, MIB):
        digest.update(pattern(at, min(MIB, size - at)))
    return digest.hexdigest()


def wait_until(condition: Callable[[], Any], what: str = "", timeout_s: float = WAIT_S) -> Any:
    """Wait until `condition()` is true and return what it returned."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain: {what or condition}"
        time.sleep(0.005)
    return result


@functools.cache
def client_hello(hostname: str | None = HOSTNAME) -> bytes:
    """Return a ClientHello of this machine's OpenSSL, made once for each name."""
    return new_client_hello(hostname)


def reset(sock: socket.socket) -> None:
    """Close with a TCP reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Endpoint:
    """The service behind the client; see the head of this file for its commands."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        # Little in the kernel, so that a stall is one.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * 1024)
        self.port: int = self._listener.getsockname()[1]
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.accepted = 0
        self.open = 0
        self.slow_s = 0.0
        """How long SINK sleeps after each 64 KiB."""
        self.go_on = threading.Event()
        """While this isn't set, SINK reads nothing."""
        self.go_on.set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Listen no longer."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.accepted += 1
                self.open += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock, contextlib.suppress(OSError):
                self._command(sock)
        finally:
            with self._lock:
                self.open -= 1

    def _command(self, sock: socket.socket) -> None:
        data = b""
        while len(data) < 5 or b"\n" not in data[5 + int.from_bytes(data[3:5], "big") :]:
            piece = sock.recv(65536)
            if not piece:
                return
            data += piece
        line, _, rest = data[5 + int.from_bytes(data[3:5], "big") :].partition(b"\n")
        command, *arguments = line.decode().split()
        count = int(arguments[0]) if arguments else 0
        if command in ("SOURCE", "EARLY"):
            sent = 0
            while sent < count:
                size = min(MIB, count - sent)
                sock.sendall(pattern(sent, size))
                sent += size
            if command == "EARLY":
                # Close, as servers do that refuse an upload: with the device's data unread,
                # which is a reset. (First let the answer leave this kernel's send buffer.)
                deadline = time.monotonic() + WAIT_S
                while unacknowledged_bytes(sock) and time.monotonic() < deadline:
                    time.sleep(0.005)
                return
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        elif command == "SINK":
            self._sink(sock, rest, count)
        elif command == "ECHO":
            sock.sendall(rest)
            while rest := sock.recv(65536):
                sock.sendall(rest)
        elif command == "HANG":
            while sock.recv(65536):
                pass

    def _sink(self, sock: socket.socket, data: bytes, count: int) -> None:
        digest = hashlib.sha256()
        while True:
            digest.update(data)
            count -= len(data)
            if count <= 0:
                break
            self.go_on.wait()
            if self.slow_s:
                time.sleep(self.slow_s)
            data = sock.recv(65536)
            if not data:
                return
        sock.sendall(digest.hexdigest().encode())


class HungEndpoint:
    """Listens, and connects nobody until `release`: while its queue is full, Linux drops SYNs."""

    def __init__(self) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(0)
        self.port = self.listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._filler = socket.create_connection(self.listener.getsockname())

    def __enter__(self) -> HungEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._filler.close()
        self.listener.close()

    def release(self) -> None:
        """Let connections in, one for each `accept`; the first may take the 3 s of a new SYN."""
        self.listener.listen(128)
        self.listener.accept()[0].close()


class Device:
    """One device's connection to a relay."""

    def __init__(
        self,
        port: int,
        command: str = "",
        *,
        host: str = "127.0.0.1",
        hostname: str | None = HOSTNAME,
        receive_buffer: int = 0,
    ) -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(WAIT_S)
        try:
            self.sock.connect((host, port))
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if command:
                self.sock.sendall(client_hello(hostname) + command.encode() + b"\n")
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def receive(self, size: int) -> bytes:
        """Return exactly `size` bytes."""
        data = bytearray()
        while len(data) < size:
            piece = self.sock.recv(min(65536, size - len(data)))
            assert piece, f"the connection ended {size - len(data)} bytes early"
            data += piece
        return bytes(data)

    def receive_all(self, pause_s: float = 0.0) -> tuple[int, str]:
        """Read until the end, with a pause after each 64 KiB; return size and SHA-256 in hex."""
        digest, size = hashlib.sha256(), 0
        while True:
            piece = self.sock.recv(65536)
            if not piece:
                return size, digest.hexdigest()
            digest.update(piece)
            size += len(piece)
            if pause_s:
                time.sleep(pause_s)

    def send_pattern(self, size: int) -> None:
        """Send the first `size` bytes of `pattern`."""
        for at in range(0, size, MIB):
            self.sock.sendall(pattern(at, min(MIB, size - at)))

    def exchange(self, message: bytes = b"ping") -> None:
        """Send a message to an ECHO endpoint and check what comes back."""
        self.sock.sendall(message)
        assert self.receive(len(message)) == message


def download(port: int, size: int, *, pause_s: float = 0.0, **options: Any) -> None:
    """Download and check every byte."""
    with Device(port, f"SOURCE {size}", **options) as device:
        assert device.receive_all(pause_s) == (size, pattern_sha256(size))


def upload(port: int, size: int, **options: Any) -> None:
    """Upload and check every byte."""
    with Device(port, f"SINK {size}", **options) as device:
        device.send_pattern(size)
        assert device.receive(64).decode() == pattern_sha256(size)


def in_threads(count: int, job: Callable[[int], object]) -> None:
    """Call `job(number)` on `count` threads at once; raise what the first of them raised."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            job(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a job hangs"
    if errors:
        raise errors[0]


class Credentials:
    """A Fernet key and a ticket made with it, with the files that the programs read."""

    def __init__(
        self,
        folder: Path,
        *,
        server: str = "127.0.0.1:1",
        version: int = 2,
        cipher: str = "aes-cbc",
        hostname: str = HOSTNAME,
        alias: tuple[str, ...] = (),
        valid_s: float = 3600,
        fernet_key: str = "",
        throttling: int | None = None,
        device_id: str = "",
    ) -> None:
        self.fernet_key = fernet_key or new_fernet_key(os.urandom)
        self.payload = Payload(
            valid=time.time() + valid_s,
            hostname=hostname,
            alias=alias,
            aes_key=os.urandom(32),
            aes_iv=os.urandom(16),
            protocol_version=version,
            cipher=cipher,
            device_id=device_id,
        )
        self.token = Fernet([self.fernet_key], load()).seal(
            self.payload.to_json(), time.time(), os.urandom
        )
        self.throttling = throttling
        self.key_file, self.ticket_file = folder / "fernet.key", folder / "ticket"
        _write_secret(self.key_file, self.fernet_key)
        self.ticket = self.at(server)

    def at(self, server: str) -> Ticket:
        """Let the ticket, and its file, name the relay `server`; return the ticket."""
        payload = self.payload
        self.ticket = Ticket(
            server=server,
            token=self.token,
            aes_key=payload.aes_key,
            aes_iv=payload.aes_iv,
            hostname=payload.hostname,
            valid=payload.valid,
            protocol_version=payload.protocol_version,
            cipher=payload.cipher,
            throttling=self.throttling,
        )
        _write_secret(self.ticket_file, self.ticket.to_json())
        return self.ticket


def _write_secret(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


class Program:
    """A program as a process of its own, with all that it prints kept in `output`."""

    def __init__(
        self, *command: str | Path, env: dict[str, str] | None = None, stdin: Any = None
    ) -> None:
        self.output = ""
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=stdin or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PROJECT), **(env or {})},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process."""
        return self.process.pid

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                with self._changed:
                    self.output += line
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, text: str, count: int = 1, timeout_s: float = WAIT_S) -> str:
        """Wait until `text` was printed `count` times; return the line of the last one."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.output.count(text) >= count or not self._reader.is_alive(), timeout_s
            )
            assert self.output.count(text) >= count, f"no {text!r} in:\n{self.output}"
            return [line for line in self.output.splitlines() if text in line][-1]

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """Wait until the program has ended by itself; return its exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.wait()

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if that takes too long; return the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def module(name: str, *arguments: str | Path) -> list[str | Path]:
    """Return the command line of a module, with the flags of this Python (-O, -OO)."""
    flags = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []
    return [sys.executable, *flags, "-m", name, *arguments]


def relay(
    credentials: Credentials, *arguments: str, listen: str = "127.0.0.1:0", env: Any = None
) -> tuple[Program, int]:
    """Start our relay; return it and its port, once it listens."""
    program = Program(
        *module("snitun_sync.server", "--fernet-key-file", credentials.key_file),
        *("--listen", listen, "--log-level", "debug", *arguments),
        env=env,
    )
    line = program.wait_for(" for devices")
    return program, int(line.split(" for ")[0].rpartition(":")[2])


def client(
    credentials: Credentials, endpoint: str, *arguments: str, env: Any = None, up: bool = True
) -> Program:
    """Start our client; return it once its tunnel is up."""
    program = Program(
        *module("snitun_sync.client", "--token-file", credentials.ticket_file),
        *("--endpoint", endpoint, "--log-level", "debug", *arguments),
        env=env,
    )
    if up:
        program.wait_for("ready: ")
    return program


@contextlib.contextmanager
def tunnel(
    credentials: Credentials, endpoint: Endpoint, *, env: Any = None
) -> Iterator[tuple[Program, Program, int]]:
    """Run our relay and our client as processes; yield both and the relay's port."""
    server, port = relay(credentials, env=env)
    with server:
        credentials.at(f"127.0.0.1:{port}")
        with client(credentials, endpoint.address, env=env) as peer:
            yield server, peer, port


def process_counts(pid: int) -> tuple[int, int]:
    """Return how many descriptors and threads the process has."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def has_more_than(before: tuple[int, int], pid: int) -> bool:
    """Return whether the process has more descriptors or threads than `before`.

    Fewer mean nothing: what ended earlier may have been counted then (a thread that was joined
    is seen for some moments more).
    """
    return any(now > then for now, then in zip(process_counts(pid), before))


def rss_kib(pid: int) -> int:
    """Return the process's resident memory in KiB."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss:"))


def free_port() -> int:
    """Return a TCP port that nothing listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def examples(page: str) -> list[str]:
    """Return the indented parts of one of our Markdown files, as somebody would copy them."""
    text = (PROJECT / page).read_text("utf-8")
    found = re.findall(r"(?:^(?:    .*)?\n)+", text, re.MULTILINE)
    return [textwrap.dedent(part).strip() + "\n" for part in found if part.strip()]
