"""Years of a client's life in some minutes: does anything of it stay behind?

    python3 tools/soak.py --minutes 10      10,000 connections, 50 lost tunnels, 20 reloads
    python3 tools/soak.py --minutes 10 --trace      the same, and whose memory grew

A relay and a client, as users run them, with devices and an endpoint on this machine; between
client and relay stands a forwarder that can break what goes through it. Devices exchange little,
download and upload 1 MiB, go away half-way, read slowly, come when the client is full. Meanwhile
tunnels are lost in every way there is, settings are read again, and --admin is asked all the time.

At the end, when all has gone quiet, client and relay must have the descriptors, threads and
resident memory (+1 MiB) that they had after a warm-up: the first 1/20 of the connections, a
loss of each kind but the black hole, and a reload. Exits with 1 where that isn't so. The relay is
killed in the first half only: its own figures are of the process that is left then.

The client runs with --keepalive 1s, so that black holes are found in 16 s, and with
--reconnect-spread 1s: so many losses within a minute would have it wait a minute each time.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import environment

if TYPE_CHECKING:
    import tracemalloc

    from tests.support import Credentials, Device, Endpoint

CONNECTIONS_A_MINUTE, LOSSES_A_MINUTE, RELOADS_A_MINUTE = 1000, 5, 2
LEAST_CONNECTIONS, LEAST_LOSSES, LEAST_RELOADS = 160, 6, 4
GROWTH_KIB = 1024
MIB = 1024 * 1024
DEVICES = 12  # threads
MAX_CHANNELS = 40
CROWD = MAX_CHANNELS + 5
CROWD_FIRST, CROWD_EACH = 30, 100  # connections
DEVICE_S = 5.0  # a device's patience
WAIT_S = 120.0  # for what must happen
QUIET_S = 2.5  # nothing changes for so long; closed sockets may linger for 2 s
POLL_S = 0.1
PAUSE_S = 2.0
AWAY_S = 0.3
# How a tunnel is lost.
KILL, RESET, TAKEOVER, BLACK_HOLE = "relay killed", "reset", "takeover", "black hole"
FIRST_LOSSES = (KILL, RESET, TAKEOVER, KILL, RESET, BLACK_HOLE)
LAST_LOSSES = (RESET, TAKEOVER, RESET, BLACK_HOLE)
PLAIN, TICKET, PAUSE = "reload", "reload with a new ticket", "pause"

Say = Callable[[str], None]


class Process:
    """A program whose log is read and counted, and not kept: it would be long."""

    def __init__(self, *command: str | Path) -> None:
        from tests.support import PROJECT

        self.counts: Counter[str] = Counter()
        """Lines that say READY, READ_AGAIN or LISTENING, and lines in all."""
        self.last: deque[str] = deque(maxlen=40)
        self.defects: list[str] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    READY, READ_AGAIN, LISTENING = "ready: ", "settings were read again", "for devices"

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                with self._changed:
                    self.last.append(line)
                    self.counts["lines"] += 1
                    for text in (self.READY, self.READ_AGAIN, self.LISTENING):
                        self.counts[text] += text in line
                    if "defect" in line or "Traceback" in line:
                        self.defects.append(line.rstrip())
                    self._changed.notify_all()

    def wait_for(self, text: str, count: int) -> None:
        """Wait until so many lines had this text."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.counts[text] >= count, WAIT_S):
                raise TimeoutError(f"no {text!r} ({count}) in:\n{''.join(self.last)}")

    def is_alive(self) -> bool:
        """Tell whether it runs."""
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._end()

    def stop(self) -> None:
        """SIGTERM, and wait."""
        if self.is_alive():
            self._process.terminate()
        self._end()

    def _end(self) -> None:
        try:
            self._process.wait(WAIT_S)
        finally:
            self._process.kill()
            self._reader.join(WAIT_S)


# --- between client and relay --------------------------------------------------------------


class Pair:
    """One connection that is forwarded."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self._socks = near, far
        self._running = 2
        self._lock = threading.Lock()
        self.is_held = self.is_reset = self.is_over = False
        for sock in self._socks:
            sock.settimeout(0.1)
        self._threads = [
            threading.Thread(target=self._run, args=direction, daemon=True)
            for direction in ((near, far), (far, near))
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Wait until it is over: it has ended on both sides, or is reset."""
        for thread in self._threads:
            thread.join(WAIT_S)

    def _run(self, source: socket.socket, target: socket.socket) -> None:
        from tests.support import reset

        with contextlib.suppress(OSError):
            self._pump(source, target)
        with self._lock:
            self._running -= 1
            if self._running:
                return
            self.is_over = True
        for sock in self._socks:
            if self.is_reset:
                reset(sock)
            else:
                sock.close()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        data = memoryview(b"")
        while not self.is_reset:
            if self.is_held:
                time.sleep(0.02)
                continue
            try:
                if not data:
                    data = memoryview(source.recv(65536))
                    if not data:
                        target.shutdown(socket.SHUT_WR)
                        return
                data = data[target.send(data) :]
            except socket.timeout:
                continue


class Forwarder:
    """Forwards connections to a port, and can break them."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[Pair] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                near.close()
                continue
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs = [*(pair for pair in self._pairs if not pair.is_over), Pair(near, far)]

    def hold(self, is_held: bool) -> list[Pair]:
        """Let nothing through what is connected now, or let it through again; return the pairs."""
        pairs = self._pairs
        for pair in pairs:
            pair.is_held = is_held
        return pairs

    def reset(self) -> None:
        """Reset all connections, on both sides."""
        for pair in self._pairs:
            pair.is_reset = True

    def close(self) -> None:
        """Listen no longer, forward nothing any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WAIT_S)
        self.reset()
        for pair in self._pairs:
            pair.wait()


# --- devices -------------------------------------------------------------------------------


class CutError(Exception):
    """A connection ended early: the tunnel was lost, or was away."""


class TurnedAwayError(CutError):
    """It ended without a byte: so it is when the client takes no more."""


class Devices:
    """Connections of all kinds on some threads, as many as are asked for."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.kinds: Counter[str] = Counter()
        """How many connections of each kind came to the end that was meant."""
        self.cut = 0
        """How many did not, as the tunnel was lost."""
        self.wrong: list[str] = []
        """What should never have been: other bytes than were sent."""
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._target = 0
        self._allowed = 0.0  # as many connections may have been made by now
        self._busy = 0
        self._crowd_at = CROWD_FIRST
        self._is_closed = False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(DEVICES)]
        for thread in self._threads:
            thread.start()

    @property
    def done(self) -> int:
        """How many connections came to the end that was meant."""
        return sum(self.kinds.values())

    def aim(self, target: int) -> None:
        """Go on until so many connections are done in all."""
        self._target = target

    def allow(self, count: float) -> None:
        """Don't be faster than this."""
        self._allowed = count

    def is_idle(self) -> bool:
        """Tell whether all that was asked for is done."""
        return self.done >= self._target and not self._busy

    def close(self) -> None:
        """Begin nothing more, and wait for what is under way."""
        self._is_closed = True
        for thread in self._threads:
            thread.join(WAIT_S)

    def _run(self) -> None:
        while not self._is_closed:
            with self._lock:
                may_begin = self.done + self._busy < min(self._target, self._allowed)
                self._busy += may_begin
            if not may_begin:
                time.sleep(0.02)
                continue
            try:
                self._one(next(self._numbers))
            except (CutError, OSError):
                self.cut += 1
                time.sleep(0.2)
            except Exception:
                self.wrong.append(traceback.format_exc())
            finally:
                with self._lock:
                    self._busy -= 1

    def _one(self, number: int) -> None:
        with self._lock:
            is_crowd = self.done >= self._crowd_at
            if is_crowd:
                self._crowd_at = self.done + CROWD_EACH
        if is_crowd:
            self._crowd()
            return
        turn = number % 20
        kind, job = (
            ("download of 1 MiB", self._download)
            if turn in (11, 12)
            else ("upload of 1 MiB", self._upload)
            if turn in (13, 14)
            else ("download aborted", self._abort_download)
            if turn == 15
            else ("upload aborted", self._abort_upload)
            if turn == 16
            else ("endpoint closes early", self._early)
            if turn == 17
            else ("slow reader", self._slow)
            if turn == 18
            else ("small exchange", self._exchange)
        )
        job()
        self._note(kind)

    def _note(self, kind: str, count: int = 1) -> None:
        with self._lock:
            self.kinds[kind] += count

    def _device(self, command: str, receive_buffer: int = 0) -> Device:
        from tests.support import Device

        device = Device(self._port, command, receive_buffer=receive_buffer)
        device.sock.settimeout(DEVICE_S)
        return device

    def _exchange(self) -> None:
        with self._device("ECHO") as device:
            for size in (2, 100, 3000):
                _exchange(device, os.urandom(size))

    def _download(self, receive_buffer: int = 0, pause_s: float = 0.0) -> None:
        from tests.support import pattern_sha256

        with self._device(f"SOURCE {MIB}", receive_buffer) as device:
            size, digest = device.receive_all(pause_s)
        if size < MIB:
            raise CutError
        if (size, digest) != (MIB, pattern_sha256(MIB)):
            raise ValueError(f"a download of 1 MiB: {size} bytes, or others than were sent")

    def _slow(self) -> None:
        self._download(16 * 1024, 0.01)

    def _upload(self) -> None:
        from tests.support import pattern_sha256

        with self._device(f"SINK {MIB}") as device:
            device.send_pattern(MIB)
            answer = _receive(device, 64).decode()
        if answer != pattern_sha256(MIB):
            raise ValueError(f"an upload of 1 MiB: the endpoint had {answer}")

    def _abort_download(self) -> None:
        from tests.support import reset

        with self._device(f"SOURCE {4 * MIB}") as device:
            _receive(device, 300_000)
            reset(device.sock)

    def _abort_upload(self) -> None:
        with self._device(f"SINK {4 * MIB}") as device:
            device.send_pattern(MIB)

    def _early(self) -> None:
        # What the device sends may end in a reset; the answer came before.
        with self._device("EARLY 100000") as device, contextlib.suppress(OSError):
            _receive(device, 100_000)
            device.sock.sendall(bytes(100_000))

    def _crowd(self) -> None:
        """More at once than the client takes."""
        with contextlib.ExitStack() as end:
            devices = [end.enter_context(self._device("ECHO")) for _ in range(CROWD)]
            served = 0
            for device in devices:
                try:
                    _exchange(device, b"hello")
                    served += 1
                except TurnedAwayError:
                    # The very first wasn't one too many: there is no tunnel.
                    if not served:
                        raise
                    self._note("in a crowd, turned away")
            self._note("in a crowd", served)


def _receive(device: Device, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = device.sock.recv(min(65536, size - len(data)))
        if not piece:
            raise CutError if data else TurnedAwayError
        data += piece
    return bytes(data)


def _exchange(device: Device, message: bytes) -> None:
    device.sock.sendall(message)
    answer = _receive(device, len(message))
    # An alert instead: the relay knows of no client now.
    if answer != message and not answer.startswith(b"\x15\x03"):
        raise ValueError(f"sent {message!r}, received {answer!r}")
    if answer != message:
        raise CutError


# --- questions -----------------------------------------------------------------------------


class Poller:
    """Asks --admin of the client all the time."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: Counter[str] = Counter()
        """By path and status."""
        self.wrong: list[str] = []
        self._may_ask = threading.Event()
        self._is_closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Ask."""
        self._may_ask.set()

    def pause(self) -> None:
        """Ask nothing; what was asked is answered."""
        self._may_ask.clear()
        with self._lock:
            pass

    def close(self) -> None:
        """Ask no more."""
        self._is_closed = True
        self._may_ask.set()
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        for path in itertools.cycle(("/ready", "/status", "/metrics")):
            self._may_ask.wait()
            if self._is_closed:
                return
            with self._lock:
                try:
                    self._check(path, *_get(self.port, path))
                except (OSError, ValueError, http.client.HTTPException) as error:
                    self.wrong.append(f"{path}: {error!r}")
            time.sleep(POLL_S)

    def _check(self, path: str, status: int, body: str) -> None:
        self.answers[f"{path} {status}"] += 1
        if path == "/status":
            json.loads(body)
        elif path == "/metrics" and not body.endswith("# EOF\n"):
            raise ValueError(f"no whole metrics: {body[-50:]!r}")
        if status != 200 and (path, status) != ("/ready", 503):
            raise ValueError(f"status {status}: {body[:200]}")


def _get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


# --- what a process holds ------------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """What a process holds."""

    descriptors: int
    threads: int
    rss_kib: int

    @classmethod
    def of(cls, pid: int) -> Holding:
        """Look at a process."""
        from tests.support import process_counts, rss_kib

        return cls(*process_counts(pid), rss_kib(pid))

    def excess(self, start: Holding) -> list[str]:
        """Return in what it is more than it was at the start."""
        found = []
        for name in ("descriptors", "threads"):
            more = getattr(self, name) - getattr(start, name)
            if more > 0:
                found.append(f"{more} {name} more")
        if self.rss_kib > start.rss_kib + GROWTH_KIB:
            found.append(f"{self.rss_kib - start.rss_kib} KiB more; {GROWTH_KIB} are allowed")
        return found


def descriptor_kinds(pid: int) -> Counter[str]:
    """Return what a process's descriptors are."""
    kinds: dict[str, str] = {}
    for name in ("tcp", "tcp6", "udp", "udp6", "unix", "netlink"):
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{pid}/net/{name}", encoding="ascii") as file,
        ):
            column = {"unix": 6, "netlink": 9}.get(name, 9)
            for line in file.readlines()[1:]:
                fields = line.split()
                state = ""
                if name.startswith("tcp"):
                    state = " listening" if fields[3] == "0A" else " connected"
                kinds[fields[column]] = f"{name} socket{state}"
    found: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue  # closed meanwhile
        match = re.fullmatch(r"socket:\[(\d+)\]", target)
        if match:
            found[kinds.get(match[1], "socket")] += 1
        else:
            found[re.sub(r":?\[\d+\]$", "", target)] += 1
    return found


# --- the soak ------------------------------------------------------------------------------


@dataclass
class Phase:
    """A part of the work; it ends when all is done and quiet."""

    name: str
    connections: int
    losses: list[str]
    reloads: list[str]


def phases(minutes: float) -> list[Phase]:
    """Return what is to be done: a warm-up, then the rest, in which the relay is killed first."""
    connections = max(LEAST_CONNECTIONS, round(minutes * CONNECTIONS_A_MINUTE))
    losses = max(LEAST_LOSSES, round(minutes * LOSSES_A_MINUTE)) - 5
    reloads = max(LEAST_RELOADS, round(minutes * RELOADS_A_MINUTE)) - 2
    warm, first = connections // 20, connections * 11 // 20
    first_losses = max(1, losses * 6 // 10)
    kinds = [TICKET if number % 2 else PLAIN for number in range(reloads)]
    first_reloads = reloads * 6 // 10
    return [
        Phase("warm-up", warm, [KILL, RESET, TAKEOVER], [TICKET]),
        Phase(
            "with a relay that dies",
            first,
            list(itertools.islice(itertools.cycle(FIRST_LOSSES), first_losses)),
            kinds[:first_reloads],
        ),
        Phase("warm-up of the last relay", warm, [RESET, TAKEOVER], [TICKET]),
        Phase(
            "with a relay that lives",
            connections - 2 * warm - first,
            list(itertools.islice(itertools.cycle(LAST_LOSSES), losses - first_losses)),
            kinds[first_reloads:],
        ),
    ]


class Soak:
    """All that runs, and what is done to it."""

    def __init__(
        self, folder: Path, end: contextlib.ExitStack, say: Say, trace: Path | None
    ) -> None:
        from tests.support import Credentials, Endpoint, free_port, module

        self._folder, self._end, self._say = folder, end, say
        self.endpoint: Endpoint = Endpoint()
        end.callback(self.endpoint.close)
        self._relay_port = free_port()
        self._relay_admin = free_port()
        self.forwarder = Forwarder(self._relay_port)
        end.callback(self.forwarder.close)
        self._server = f"127.0.0.1:{self.forwarder.port}"
        self.credentials: Credentials = Credentials(folder, server=self._server)
        self.relay = self._start_relay()
        self.poller = Poller(free_port())
        command = module("snitun_sync.client")
        if trace is not None:
            # Frames enough to tell who asked for the memory.
            command = [sys.executable, "-X", "tracemalloc=8", __file__, "traced", trace]
        self.client = Process(
            *command,
            *("--token-file", self.credentials.ticket_file, "--endpoint", self.endpoint.address),
            *("--admin", f"127.0.0.1:{self.poller.port}", "--max-channels", str(MAX_CHANNELS)),
            *("--keepalive", "1s", "--reconnect-spread", "1s"),
        )
        end.callback(self.client.stop)
        self.client.wait_for(Process.READY, 1)
        end.callback(self.poller.close)
        self.devices = Devices(self._relay_port)
        end.callback(self.devices.close)
        self.lost: Counter[str] = Counter()
        self.reloaded: Counter[str] = Counter()
        self.relay_defects: list[str] = []

    def _start_relay(self) -> Process:
        from tests.support import module

        relay = Process(
            *module("snitun_sync.server", "--fernet-key-file", self.credentials.key_file),
            *("--listen", f"127.0.0.1:{self._relay_port}"),
            *("--admin", f"127.0.0.1:{self._relay_admin}"),
        )
        self._end.callback(relay.stop)
        relay.wait_for(Process.LISTENING, 1)
        return relay

    def run(self, phase: Phase, seconds: float) -> tuple[Holding, Holding]:
        """Do what is to be done in about so long; return what client and relay hold then."""
        devices = self.devices
        begun = devices.done
        devices.aim(begun + phase.connections)
        self.poller.go_on()
        actions = _mixed(phase.losses, phase.reloads)
        begin, said_at, number = time.monotonic(), 0.0, 0
        while actions[number:] or not devices.is_idle():
            now = time.monotonic()
            share = (now - begin) / seconds
            devices.allow(begun + phase.connections * share)
            if now >= said_at:
                said_at = now + 15
                self._say(
                    f"{phase.name}: {devices.done - begun} of {phase.connections} connections, "
                    f"{sum(self.lost.values())} losses and {sum(self.reloaded.values())} reloads "
                    f"in all; client {Holding.of(self.client.pid).rss_kib} KiB"
                )
            if number < len(actions) and share * (len(actions) + 1) >= number + 1:
                self._act(actions[number])
                number += 1
            if not self.client.is_alive():
                raise RuntimeError(f"the client has ended:\n{''.join(self.client.last)}")
            time.sleep(0.02)
        self.poller.pause()
        self._wait_until_quiet()
        return Holding.of(self.client.pid), Holding.of(self.relay.pid)

    def _wait_until_quiet(self) -> None:
        """Wait until no device is there, and until nothing has changed for QUIET_S."""
        from tests.support import process_counts

        deadline = time.monotonic() + WAIT_S
        before: tuple[object, ...] = ()
        since = time.monotonic()
        while time.monotonic() - since < QUIET_S:
            if time.monotonic() > deadline:
                raise TimeoutError(f"it doesn't go quiet: {before}")
            counts = [process_counts(process.pid) for process in (self.client, self.relay)]
            now = (self.endpoint.open, *counts)
            if now != before or self.endpoint.open:
                before, since = now, time.monotonic()
            time.sleep(0.1)

    def _act(self, action: str) -> None:
        ready = self.client.counts[Process.READY]
        if action == PAUSE:
            self.forwarder.hold(True)
            time.sleep(PAUSE_S)
            self.forwarder.hold(False)
            return
        if action in (PLAIN, TICKET):
            self._reload(action)
            return
        held: list[Pair] = []
        if action == KILL:
            self.relay.kill()
            self.relay_defects += self.relay.defects
            time.sleep(AWAY_S)
            self.relay = self._start_relay()
        elif action == RESET:
            self.forwarder.reset()
        elif action == TAKEOVER:
            self._take_over()
        else:
            held = self.forwarder.hold(True)
        self.client.wait_for(Process.READY, ready + 1)
        for pair in held:
            pair.is_reset = True
        self.lost[action] += 1

    def _take_over(self) -> None:
        from tests.services import raw_client

        with raw_client(self.credentials, self._relay_port):
            time.sleep(AWAY_S)

    def _reload(self, action: str) -> None:
        from tests.support import Credentials

        ready = self.client.counts[Process.READY]
        read = self.client.counts[Process.READ_AGAIN]
        if action == TICKET:
            key = self.credentials.fernet_key
            self.credentials = Credentials(self._folder, fernet_key=key, server=self._server)
        self.client.signal(signal.SIGHUP)
        self.client.wait_for(Process.READ_AGAIN, read + 1)
        if action == TICKET:
            self.client.wait_for(Process.READY, ready + 1)
        self.client.signal(signal.SIGUSR1)
        self.reloaded[action] += 1

    def wrong(self) -> list[str]:
        """Return what should never have been."""
        return [
            *self.devices.wrong,
            *self.poller.wrong,
            *(f"the client's log: {line}" for line in self.client.defects),
            *(f"the relay's log: {line}" for line in self.relay_defects + self.relay.defects),
        ]


def _mixed(losses: list[str], reloads: list[str]) -> list[str]:
    """Return all of them, evenly mixed, with a pause after each fifth loss."""
    placed = [((number + 1) / (len(losses) + 1), kind) for number, kind in enumerate(losses)]
    placed += [((number + 0.5) / len(reloads), kind) for number, kind in enumerate(reloads)]
    actions: list[str] = []
    passed = 0
    for _, kind in sorted(placed):
        actions.append(kind)
        passed += kind not in (PLAIN, TICKET)
        if kind not in (PLAIN, TICKET) and passed % 5 == 0:
            actions.append(PAUSE)
    return actions


def soak(minutes: float, say: Say, trace: Path | None = None) -> list[str]:
    """Do it all; print what came of it, and return what is not as it should be."""
    plan = phases(minutes)
    connections = sum(phase.connections for phase in plan)
    rows: list[tuple[str, Holding, Holding]] = []
    with tempfile.TemporaryDirectory(prefix="snitun-soak-") as name, contextlib.ExitStack() as end:
        life = Soak(Path(name), end, say, trace)
        for number, phase in enumerate(plan):
            seconds = minutes * 60 * phase.connections / connections
            held = life.run(phase, seconds)
            rows.append((phase.name, *held))
            say(f"{phase.name} is over: client {held[0]}, relay {held[1]}")
            if trace is not None and number in (0, len(plan) - 1):
                life.client.signal(signal.SIGUSR2)
                _wait_for_file(trace, trace.with_suffix(f".{number}"))
        kinds = [descriptor_kinds(process.pid) for process in (life.client, life.relay)]
        refused = json.loads(_get(life.poller.port, "/status")[1])["refused_channels"]
        devices, poller, log_lines = life.devices, life.poller, life.client.counts["lines"]
        losses, reloads, wrong = life.lost, life.reloaded, life.wrong()

    print(f"\n{devices.done} connections ({_counted(devices.kinds)}), and {devices.cut} cut")
    print(f"channels that the client refused at a limit: {_counted(refused)}")
    print(f"{sum(losses.values())} losses ({_counted(losses)})")
    print(f"{sum(reloads.values())} reloads ({_counted(reloads)})")
    print(f"--admin of the client: {_counted(poller.answers)}; {log_lines} lines of its log\n")
    print(f"{'at the end of':28} {'client: descriptors':>20} threads RSS KiB   relay: the same")
    for phase_name, client, relay in rows:
        print(
            f"{phase_name:28} {client.descriptors:20} {client.threads:7} {client.rss_kib:7} "
            f"{relay.descriptors:7} {relay.threads:2} {relay.rss_kib:7}"
        )
    for who, found in zip(("client", "relay"), kinds):
        print(f"open in the {who}: {_counted(found)}")
    if trace is not None:
        _print_growth(trace.with_suffix(".0"), trace.with_suffix(f".{len(plan) - 1}"))
        rows[0] = (rows[0][0], replace(rows[0][1], rss_kib=rows[-1][1].rss_kib), rows[0][2])
    found_wrong = [f"client: {text}" for text in rows[-1][1].excess(rows[0][1])]
    # The last relay's start is after its own warm-up.
    found_wrong += [f"relay: {text}" for text in rows[-1][2].excess(rows[-2][2])]
    return found_wrong + wrong


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


# --- whose memory it is ----------------------------------------------------------------------


def traced(path: str) -> None:
    """Be the client, and write a snapshot of tracemalloc to `path` on SIGUSR2."""
    import gc
    import tracemalloc

    from snitun_sync.client.cli import console

    def dump(number: int, frame: object) -> None:
        gc.collect()
        tracemalloc.take_snapshot().dump(path + ".new")
        os.replace(path + ".new", path)

    signal.signal(signal.SIGUSR2, dump)
    sys.exit(console())


def _wait_for_file(path: Path, target: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {path}")
        time.sleep(0.1)
    shutil.move(path, target)


def _print_growth(start: Path, end: Path) -> None:
    import tracemalloc

    snapshots: list[tracemalloc.Snapshot] = [
        tracemalloc.Snapshot.load(str(path)).filter_traces(
            [tracemalloc.Filter(False, tracemalloc.__file__)]
        )
        for path in (start, end)
    ]
    grown = snapshots[1].compare_to(snapshots[0], "traceback")
    total = sum(difference.size_diff for difference in grown)
    print(f"\nPython's own memory grew by {total / 1024:.1f} KiB (RSS with --trace means nothing):")
    for difference in grown[:12]:
        print(f"{difference.size_diff / 1024:+9.1f} KiB {difference.count_diff:+6} blocks")
        print("\n".join(f"      {line}" for line in difference.traceback.format()[-4:]))


def main() -> int:
    """Run what the arguments ask for; return the exit code."""
    if sys.argv[1:2] == ["traced"]:
        path = sys.argv[2]
        del sys.argv[1:3]
        traced(path)
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", metavar="N", type=float, default=10.0, help="how much work (default: 10)"
    )
    parser.add_argument("--trace", action="store_true", help="say whose memory grew in the client")
    options = parser.parse_args()
    environment.enter("requirements.txt", "tests/requirements.txt")
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="snitun-soak-trace-") as folder:
        trace = Path(folder) / "trace" if options.trace else None
        found = soak(options.minutes, say, trace)
    print("\nNOT as at the start:" if found else "\nas at the start")
    for text in found:
        print(f"  {text}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
