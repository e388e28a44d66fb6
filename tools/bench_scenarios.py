"""What tools/bench.py does to each system, and what it measures of it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable

from tools import load
from tools.bench_systems import MissingError, Running, System, program

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

Figures = dict[str, float]
MIB = 2**20
UPLINK = "10mbit"


@contextlib.contextmanager
def _up(system: System) -> Iterator[Running]:
    running = Running(system)
    try:
        yield running
    finally:
        running.close()


@contextlib.contextmanager
def _behind_slow_uplink(system: System) -> Iterator[Running]:
    """Run client and endpoint in a network namespace whose uplink is shaped."""
    ip, tc = program("ip", "iproute2"), program("tc", "iproute2")
    if os.geteuid() != 0:
        raise MissingError("root is missing")
    pid = os.getpid()
    # 198.18.0.0/15 is for measurements; each run has four addresses of its own.
    net = ipaddress.IPv4Address("198.18.0.0") + pid % 2**15 * 4
    outside, inside = str(net + 1), str(net + 2)
    name, near, far = f"snitun-bench-{pid}", f"sb{pid}o", f"sb{pid}i"

    def root(*words: str) -> None:
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")

    def remove() -> None:
        for command in ((ip, "link", "del", near), (ip, "netns", "del", name)):
            subprocess.run(command, check=False, capture_output=True)

    within = (ip, "netns", "exec", name)
    try:
        root(ip, "netns", "add", name)
        root(ip, "link", "add", near, "type", "veth", "peer", "name", far)
        root(ip, "link", "set", far, "netns", name)
        root(ip, "addr", "add", f"{outside}/30", "dev", near)
        root(ip, "link", "set", near, "up")
        root(*within, ip, "addr", "add", f"{inside}/30", "dev", far)
        root(*within, ip, "link", "set", far, "up")
        root(*within, ip, "link", "set", "lo", "up")
        shape = ("rate", UPLINK, "burst", "16k", "latency", "50ms")
        root(*within, tc, "qdisc", "add", "dev", far, "root", "tbf", *shape)
        running = Running(system, outside, within)
        try:
            yield running
        finally:
            running.close()
    finally:
        remove()


@dataclass(frozen=True)
class Scenario:
    """A thing to measure."""

    about: str
    main: str  # the figure of the picture; none if empty
    run: Callable[[Running, int], Figures]
    amounts: tuple[int, ...]  # more than one: how a figure grows
    quick: tuple[int, ...]
    can: Callable[[System], bool] = lambda _: True
    place: Callable[[System], contextlib.AbstractContextManager[Running]] = _up

    def steps(self, name: str, is_quick: bool) -> dict[str, int]:
        """Return the names under which figures are kept, and the amount that each stands for."""
        amounts = self.quick if is_quick else self.amounts
        if len(amounts) == 1:
            return {name: amounts[0]}
        return {f"{name}/{amount}": amount for amount in amounts}


def _cpu_each(before: dict[str, float], running: Running, count: float) -> dict[str, float]:
    return {role: (used - before[role]) / count for role, used in running.cpu_s().items()}


def _memory(running: Running, channels: int) -> Figures:
    figures: Figures = {}
    for role, process in running.processes.items():
        rss, private = process.memory_kib()
        figures[f"{role} RSS KiB"], figures[f"{role} private KiB"] = rss, private
    socks, grown = _hold(running, channels)
    for sock in socks:
        sock.close()
    return {**figures, **grown, "first answer s": running.connected_s}


def _hold(running: Running, channels: int) -> tuple[list[socket.socket], Figures]:
    before = running.rss_kib()
    socks = load.hold(running.target, channels)
    time.sleep(running.idle_s / 10)
    after = running.rss_kib()
    each = {f"{role} KiB/channel": (after[role] - before[role]) / channels for role in before}
    return socks, each


def _transfer(downloads: int, uploads: int) -> Callable[[Running, int], Figures]:
    def run(running: Running, mib: int) -> Figures:
        before, size = running.cpu_s(), mib * MIB // (downloads + uploads)
        seconds = load.transfer(running.target, downloads, uploads, size)
        used = _cpu_each(before, running, mib / 1024)
        figures = {f"{role} CPU s/GiB": cpu for role, cpu in used.items()}
        return {"MiB/s": mib / seconds, **figures}

    return run


def _rate(running: Running, count: int, run: Callable[[], list[float]]) -> Figures:
    before, begin = running.cpu_s(), time.perf_counter()
    took = run()
    seconds = time.perf_counter() - begin
    used = _cpu_each(before, running, count)
    return {
        "per s": count / seconds,
        "p50 µs": load.percentile(took, 0.5) * 1e6,
        "p99 µs": load.percentile(took, 0.99) * 1e6,
        **{f"{role} CPU µs": cpu * 1e6 for role, cpu in used.items()},
    }


def _pingpong(channels: int) -> Callable[[Running, int], Figures]:
    def run(running: Running, count: int) -> Figures:
        socks = load.hold(running.target, channels)
        return _rate(running, count, lambda: load.exchange(socks, count))

    return run


def _connect(concurrency: int) -> Callable[[Running, int], Figures]:
    def run(running: Running, count: int) -> Figures:
        return _rate(running, count, lambda: load.connections(running.target, concurrency, count))

    return run


def _under_load(
    running: Running, downloads: int, uploads: int, size: int, warm_s: float, seconds: float
) -> tuple[list[float], float]:
    """Return how long exchanges take while a process of its own transfers, and its bytes/s."""
    [sock] = load.hold(running.target, 1)
    target = running.target
    amounts = (downloads, uploads, size, warm_s)
    address = (target.host, str(target.port), target.hostname)
    bulk = running.helper([], "bulk", *address, *map(str, amounts))
    assert bulk.stdout is not None
    took = load.exchange_for(sock, seconds) if bulk.stdout.readline() == "READY\n" else []
    printed, said = bulk.communicate(timeout=load.STALL_S)
    if bulk.returncode:
        raise ConnectionError(said.strip().rpartition("\n")[2])
    return took, float(printed)


def _mixed(running: Running, seconds: int) -> Figures:
    took, rate = _under_load(running, 32, 32, 16 * MIB, 1, seconds)
    return {
        "p50 ms": load.percentile(took, 0.5) * 1e3,
        "p99 ms": load.percentile(took, 0.99) * 1e3,
        "MiB/s": rate / MIB,
    }


def _slow_link(running: Running, seconds: int) -> Figures:
    quiet = load.exchange(load.hold(running.target, 1), 50)
    # The queues fill for 2 s.
    busy, rate = _under_load(running, 1, 0, 10**9, 2, seconds)
    return {
        "quiet p50 ms": load.percentile(quiet, 0.5) * 1e3,
        "busy p50 ms": load.percentile(busy, 0.5) * 1e3,
        "busy max ms": busy[-1] * 1e3,
        "Mbit/s": rate * 8 / 1e6,
    }


def _wait_until_quiet(running: Running) -> None:
    """Closing may go on for some seconds after the last device has left."""
    time.sleep(running.idle_s / 2)
    for _ in range(20):
        before = sum(running.cpu_s().values())
        time.sleep(running.idle_s / 10)
        if sum(running.cpu_s().values()) - before <= 0.02:
            return


def _aborts(running: Running, count: int) -> Figures:
    # Those before are so that what remains is what leaks, not what is used again.
    load.abort_downloads(running.target, 16, max(16, count // 10), 5_000_000)
    _wait_until_quiet(running)
    before = running.rss_kib()
    load.abort_downloads(running.target, 16, count, 5_000_000)
    _wait_until_quiet(running)
    running.check()
    load.connections(running.target, 1, 1)
    after = running.rss_kib()
    figures = {f"{role} RSS KiB before": float(kib) for role, kib in before.items()}
    return {**figures, **{f"{role} KiB grown": after[role] - before[role] for role in before}}


def _tunnels(running: Running, count: int) -> Figures:
    names = (f"t{number}.example.test" for number in range(count))
    secrets = [load.tunnel_secrets(running.fernet_key, name, 2) for name in names]
    relay = running.processes["relay"]
    rss, cpu, begin = relay.memory_kib()[0], relay.cpu_s(), time.perf_counter()
    socks = load.open_tunnels((running.target.host, running.target.port), secrets)
    seconds = time.perf_counter() - begin
    # A relay may look at each tunnel once more when the 10 s for opening it are over: that is
    # of the opening, not of the idle time.
    time.sleep(running.idle_s * 1.1)
    held, idle, begin = relay.memory_kib()[0], relay.cpu_s(), time.perf_counter()
    time.sleep(running.idle_s)
    idle_share = (relay.cpu_s() - idle) / (time.perf_counter() - begin)
    took = load.connections(running.target, 1, 200)
    for sock in socks:
        sock.close()
    return {
        "relay KiB/tunnel": (held - rss) / count,
        "relay CPU µs to open": (idle - cpu) / count * 1e6,
        "opened per s": count / seconds,
        "relay CPU % idle": idle_share * 100,
        "connect p50 µs": load.percentile(took, 0.5) * 1e6,
    }


def _channels(running: Running, count: int) -> Figures:
    socks, each = _hold(running, count)
    exchanges = 10_000 if count > 10 else 3_000
    return {**each, **_rate(running, exchanges, lambda: load.exchange(socks, exchanges))}


def _has_shaped_uplink(system: System) -> bool:
    return system.has_shaped_uplink


def _speaks_snitun(system: System) -> bool:
    return system.speaks_snitun


SCENARIOS: dict[str, Scenario] = {
    "memory": Scenario(
        "memory of an idle relay and client, and its growth with 200 idle channels; the time from "
        "the client's start to the first answer",
        *("client RSS KiB", _memory, (200,), (10,)),
    ),
    "download-1": Scenario(
        "256 MiB from endpoint to device over one connection",
        *("MiB/s", _transfer(1, 0), (256,), (8,)),
    ),
    "upload-1": Scenario(
        "256 MiB from device to endpoint over one connection",
        *("MiB/s", _transfer(0, 1), (256,), (8,)),
    ),
    "download-32": Scenario(
        "256 MiB from endpoint to device over 32 connections",
        *("MiB/s", _transfer(32, 0), (256,), (8,)),
    ),
    "upload-32": Scenario(
        "256 MiB from device to endpoint over 32 connections",
        *("MiB/s", _transfer(0, 32), (256,), (8,)),
    ),
    "pingpong-1": Scenario(
        "3,000 exchanges of 64 bytes over one open channel; CPU for each",
        *("p50 µs", _pingpong(1), (3000,), (100,)),
    ),
    "pingpong-64": Scenario(
        "20,000 exchanges of 64 bytes over 64 open channels; CPU for each",
        *("per s", _pingpong(64), (20000,), (500,)),
    ),
    "connect-1": Scenario(
        "500 connections, one after the other: open, exchange 2 bytes, close; CPU for each",
        *("p50 µs", _connect(1), (500,), (20,)),
    ),
    "connect-32": Scenario(
        "3,000 connections, 32 at a time: open, exchange 2 bytes, close; CPU for each",
        *("per s", _connect(32), (3000,), (100,)),
    ),
    "mixed": Scenario(
        "exchanges of 64 bytes on one channel while 32 downloads and 32 uploads go on for 5 s",
        *("p50 ms", _mixed, (5,), (1,)),
    ),
    "slow-link": Scenario(
        "exchanges of 64 bytes without and with a download that fills the client's uplink of "
        "10 Mbit/s (Linux namespace; needs root)",
        *("busy p50 ms", _slow_link, (8,), (1,), _has_shaped_uplink, _behind_slow_uplink),
    ),
    "aborts": Scenario(
        "1,000 downloads of 5 MB that the device cuts half way, after 100 such to warm up: memory "
        "that remains",
        *("", _aborts, (1000,), (20,)),
    ),
    "tunnels": Scenario(
        "10,000 idle tunnels at one relay: memory and CPU; a device's connection through one more",
        *("relay KiB/tunnel", _tunnels, (10000,), (100,), _speaks_snitun),
    ),
    "channels": Scenario(
        "1 to 1,000 open channels in one tunnel: memory, and exchanges of 64 bytes over all",
        *("", _channels, (1, 10, 100, 1000), (1, 10)),
    ),
    "tunnels-growth": Scenario(
        "the same as tunnels for 10 to 10,000 of them",
        *("", _tunnels, (10, 100, 1000, 10000), (10, 20), _speaks_snitun),
    ),
}
# Those that show how a cost grows take long: without --systems, only this one has them.
GROWTH_OF = "snitun_sync"
