"""A relay with hundreds of clients is killed and comes back: how soon are they all back, and how
many attempts does it see in a second?

    python3 tools/storm.py                          500 clients, the relay away for 5 s
    python3 tools/storm.py --down 0.5s 15s --runs 3

The clients are real ones with the default settings, each with a ticket of its own: some of them
processes as users run them, the others in a few processes together, each with its own thread
and loop. When they try to connect is what their logs say. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import environment

if TYPE_CHECKING:
    from snitun_sync.client import Client
    from tests.support import Credentials, Program

BACK_S = 60.0
ATTEMPTS_PER_S = 100
# Of a client that isn't back by then something is wrong. (The longest delay is 60 s.)
LIMIT_S = 180.0
START_S = 120.0
# The tunnels are there for a moment before they are lost.
SETTLE_S = 1.0
BAR_WIDTH = 100

ATTEMPT, UP, FAILED = "attempt", "up", "failed"


class Event(NamedTuple):
    """What a client's log said: an attempt begins, the tunnel is up, or something failed."""

    time: float  # UTC, Unix seconds
    client: int
    kind: str
    delay_s: float = 0.0  # of FAILED: until the next attempt


def read_message(when: float, client: int, message: str) -> Event | None:
    """Return what a line of a client's log means here, None if nothing."""
    if message.startswith("connecting to the relay"):
        return Event(when, client, ATTEMPT)
    if message.startswith("ready: "):
        return Event(when, client, UP)
    _, found, delay = message.partition("; next attempt in ")
    return Event(when, client, FAILED, float(delay.split(" ")[0])) if found else None


class Watch:
    """All events of all clients, and who is up."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.changed = threading.Condition()
        self._up: set[int] = set()

    def add(self, event: Event | None) -> None:
        """Note what happened."""
        if event is None:
            return
        with self.changed:
            self.events.append(event)
            if event.kind == UP:
                self._up.add(event.client)
            elif event.kind == FAILED:
                self._up.discard(event.client)
            self.changed.notify_all()

    @property
    def up(self) -> int:
        """How many have a tunnel, as far as their logs say."""
        with self.changed:
            return len(self._up)

    def since(self, when: float) -> list[Event]:
        """Return what has happened since then, in order."""
        with self.changed:
            return sorted(event for event in self.events if event.time >= when)


# --- clients -----------------------------------------------------------------------------


class Whole:
    """One client as users run it; its log is read line by line."""

    def __init__(self, watch: Watch, number: int, credentials: Credentials, endpoint: str) -> None:
        from tests.support import PROJECT, module

        self._watch, self._number = watch, number
        self._process = subprocess.Popen(
            [
                *map(str, module("snitun_sync.client", "--token-file", credentials.ticket_file)),
                *("--endpoint", endpoint, "--log-level", "debug", "--log-format", "json"),
            ],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                fields = json.loads(line)
                when = datetime.fromisoformat(fields["time"].replace("Z", "+00:00")).timestamp()
                self._watch.add(read_message(when, self._number, fields["message"]))

    def stop(self) -> None:
        """End it."""
        self._process.terminate()

    def wait(self) -> None:
        """Wait for its end."""
        self._process.wait(30)
        self._reader.join(30)


class Crowd:
    """Some clients in a process of their own, which prints what they do."""

    def __init__(self, watch: Watch, tickets: dict[int, str], endpoint: str) -> None:
        self._watch = watch
        self._process = subprocess.Popen(
            [sys.executable, __file__, "crowd"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([endpoint, list(tickets.items())]) + "\n")
        self._process.stdin.flush()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._watch.add(Event(*json.loads(line)))

    def stop(self) -> None:
        """End it: it lives as long as its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self) -> None:
        """Wait for its end."""
        self._process.wait(60)
        self._reader.join(30)


class Teller(logging.Handler):
    """Prints what clients of this process do. Each has its own thread, which tells who it is."""

    def __init__(self, clients: dict[int, Client]) -> None:
        super().__init__()
        self._clients = clients
        self._numbers: dict[int | None, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Print the event that a line is, if it is one."""
        number = self._numbers.get(record.thread)
        if number is None:
            for number, client in self._clients.items():
                if client._ident == record.thread:
                    self._numbers[record.thread] = number
                    break
            else:
                return
        event = read_message(record.created, number, record.getMessage())
        if event is not None:
            print(json.dumps(event), flush=True)


def crowd() -> None:
    """Be the process of a Crowd."""
    from snitun_sync.client import Client

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    endpoint, tickets = json.loads(sys.stdin.readline())
    clients = {number: Client(ticket, endpoint) for number, ticket in tickets}
    logger = logging.getLogger("snitun_sync")
    logger.addHandler(Teller(clients))
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for client in clients.values():
        client.start()
    sys.stdin.read()
    threads = [threading.Thread(target=client.stop) for client in clients.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- the storm ---------------------------------------------------------------------------


@dataclass
class Result:
    """What came of one kill; all times but `killed_at` are seconds after it."""

    clients: int
    down_s: float
    killed_at: float
    restarted_s: float
    events: list[Event] = field(repr=False)
    unreached: int = 0
    """How many hostnames a device could not reach in the end."""

    def __post_init__(self) -> None:
        self.attempts = sorted(e.time - self.killed_at for e in self.events if e.kind == ATTEMPT)
        self.per_client = Counter(e.client for e in self.events if e.kind == ATTEMPT)
        self.back = {e.client: e.time - self.killed_at for e in self.events if e.kind == UP}
        self.first_delays: dict[int, float] = {}
        for event in self.events:
            if event.kind == FAILED:
                self.first_delays.setdefault(event.client, event.delay_s)

    @property
    def back_s(self) -> float:
        """How long after the restart the last one was back."""
        return max(self.back.values(), default=LIMIT_S) - self.restarted_s

    @property
    def is_complete(self) -> bool:
        """Whether all are back, and devices get through to all."""
        return len(self.back) == self.clients and not self.unreached

    def per_second(self) -> list[int]:
        """Return how many attempts there were in each second after the kill."""
        counts = Counter(int(when) for when in self.attempts)
        return [counts[second] for second in range(int(self.attempts[-1]) + 1)]

    def densest(self) -> int:
        """Return how many attempts there were in the second with the most, wherever it begins."""
        most = begin = 0
        for end, when in enumerate(self.attempts):
            while when - self.attempts[begin] >= 1:
                begin += 1
            most = max(most, end - begin + 1)
        return most

    def lines(self) -> list[str]:
        """Return all that is known of it, for people."""
        per_second = self.per_second()
        scale = max(1.0, max(per_second) / BAR_WIDTH)
        counts = [self.per_client[number] for number in range(self.clients)]
        found = ["attempts in each second after the kill:"]
        for second, count in enumerate(per_second):
            mark = "  <- restarted" if second == int(self.restarted_s) else ""
            found.append(f"  {second:3} s {count:4} {'#' * round(count / scale)}{mark}")
        times = sorted(when - self.restarted_s for when in self.back.values())
        half, most = times[len(times) // 2], times[min(len(times) - 1, len(times) * 9 // 10)]
        found += [
            f"back: {len(self.back)} of {self.clients}; after the restart the half within "
            f"{half:.1f} s, 90 % within {most:.1f} s, all within {self.back_s:.1f} s",
            f"attempts: {len(self.attempts)}; at most {max(per_second)} in a second of the clock, "
            f"{self.densest()} in any second",
            f"attempts per client: {min(counts)} to {max(counts)}, {statistics.mean(counts):.2f} "
            "on average",
            f"devices get through to {self.clients - self.unreached} of {self.clients}",
        ]
        return found

    def misses(self) -> list[str]:
        """Return the targets that were missed."""
        found = []
        if not self.is_complete:
            found.append("not all are back")
        if self.back_s > BACK_S:
            found.append(f"back after {self.back_s:.1f} s, target {BACK_S:.0f} s")
        if self.densest() > ATTEMPTS_PER_S:
            found.append(f"{self.densest()} attempts in a second, target {ATTEMPTS_PER_S}")
        return found


def storm(
    down_s: float, clients: int, whole: int, processes: int, say: Callable[[str], None]
) -> Result:
    """Start `clients`, `whole` of them as processes; kill the relay, restart it, wait for all."""
    from snitun_sync.protocol.token import new_fernet_key
    from tests.support import Credentials, Endpoint, relay

    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="snitun-storm-") as name, contextlib.ExitStack() as end:
        folder = Path(name)
        key = new_fernet_key(os.urandom)
        credentials = []
        for number in range(clients):
            place = folder / str(number)
            place.mkdir()
            hostname = f"device{number}.example.test"
            credentials.append(Credentials(place, fernet_key=key, hostname=hostname))
        endpoint = Endpoint()
        end.callback(endpoint.close)

        def start_relay(port: int = 0) -> tuple[Program, int]:
            where = f"127.0.0.1:{port}"
            program, port = relay(credentials[0], "--log-level", "info", listen=where)
            end.callback(program.stop)
            return program, port

        program, port = start_relay()
        for each in credentials:
            each.at(f"127.0.0.1:{port}")
        parts: list[Whole | Crowd] = []
        try:
            for number in range(whole):
                parts.append(Whole(watch, number, credentials[number], endpoint.address))
            for part in range(processes):
                numbers = range(whole + part, clients, processes)
                tickets = {number: credentials[number].ticket.to_json() for number in numbers}
                parts.append(Crowd(watch, tickets, endpoint.address))
            if not _wait_for_all(watch, 0.0, clients, START_S, say):
                raise TimeoutError("not all clients came up at the start")
            time.sleep(SETTLE_S)
            killed_at = time.time()
            program.kill()
            say(f"the relay is killed; down for {down_s:g} s")
            time.sleep(max(0.0, killed_at + down_s - time.time()))
            restarted_s = time.time() - killed_at
            start_relay(port)
            say(f"the relay is started again, {restarted_s:.1f} s after the kill")
            _wait_for_all(watch, killed_at, clients, LIMIT_S, say)
            unreached = 0
            for each in credentials:
                unreached += not _is_reached(port, each.payload.hostname)
            events = watch.since(killed_at)
        finally:
            for each_part in parts:
                each_part.stop()
            for each_part in parts:
                each_part.wait()
    return Result(clients, down_s, killed_at, restarted_s, events, unreached)


def _wait_for_all(
    watch: Watch, since: float, clients: int, limit_s: float, say: Callable[[str], None]
) -> bool:
    """Wait until all clients have a tunnel that came up after `since`; return whether they have."""
    deadline = time.monotonic() + limit_s
    say_at = 0.0
    while time.monotonic() < deadline:
        back = len({event.client for event in watch.since(since) if event.kind == UP})
        if back == clients and watch.up == clients:
            say(f"all {clients} clients are up")
            return True
        if time.monotonic() >= say_at:
            say_at = time.monotonic() + 5
            say(f"{back} of {clients} clients are up")
        time.sleep(0.25)
    say(f"gave up after {limit_s:.0f} s")
    return False


def _is_reached(port: int, hostname: str) -> bool:
    """Tell whether a device gets through."""
    from tests.support import Device

    try:
        with Device(port, "ECHO", hostname=hostname) as device:
            device.exchange()
    except (OSError, AssertionError):
        return False
    return True


def main() -> int:
    """Run what the arguments ask for; return the exit code."""
    if sys.argv[1:] == ["crowd"]:
        crowd()
        return 0
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", metavar="N", type=int, default=500, help="default: 500")
    parser.add_argument(
        "--whole", metavar="N", type=int, default=20, help="processes of their own (default: 20)"
    )
    parser.add_argument(
        "--processes", metavar="N", type=int, default=4, help="for all others (default: 4)"
    )
    parser.add_argument(
        "--down",
        metavar="TIME",
        nargs="+",
        default=["5s"],
        help="how long the relay is away, like 5s (the default); several are tried in turn",
    )
    parser.add_argument("--runs", metavar="N", type=int, default=1, help="of each (default: 1)")
    options = parser.parse_args()
    environment.enter("requirements.txt", "tests/requirements.txt")
    from snitun_sync.options import duration_s

    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {text}", file=sys.stderr, flush=True)

    table = ["", "down s  back s  max/s of the clock  max/s in any  attempts/client  missed"]
    missed = False
    for down in options.down:
        for run in range(options.runs):
            down_s = duration_s(down)
            print(
                f"\n{options.clients} clients ({options.whole} whole processes), the relay is "
                f"away for {down_s:g} s, run {run + 1} of {options.runs}"
            )
            result = storm(down_s, options.clients, options.whole, options.processes, say)
            print("\n".join(result.lines()), flush=True)
            misses = result.misses()
            missed = missed or bool(misses)
            mean = len(result.attempts) / result.clients
            table.append(
                f"{down_s:6g} {result.back_s:7.1f} {max(result.per_second()):19} "
                f"{result.densest():13} {mean:16.2f}  {'; '.join(misses) or 'nothing'}"
            )
    print("\n".join(table))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
