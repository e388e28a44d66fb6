"""Real networks for the tests: hosts that are network namespaces, and real faults between them.

    client  .2 ── 10.77.1.0/24, fd77:77:77:1::/64 ── .1 ┐
    relay   .2 ── 10.77.2.0/24, fd77:77:77:2::/64 ── .1 ├ router
    device  .2 ── 10.77.3.0/24, fd77:77:77:3::/64 ── .1 ┘

All faults are on the way between client and relay; a device's way to the relay stays whole.
Only root can do this, with ip and tc (iproute2) and nft (nftables): see `require_network`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, TypeVar

import pytest
from dnslib import AAAA, QTYPE, RCODE, RR, A, DNSRecord  # type: ignore[import-untyped]

from tests.support import Program, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    Result = TypeVar("Result")

# The hosts around the router, and the number of the network of each.
NETWORKS = {"client": 1, "relay": 2, "device": 3}
HOSTS = (*NETWORKS, "router")
HOST_NUMBER = 2
GATEWAYS = {"main": 1, "other": 253, "dead": 254}
"""The last part of the addresses that `change_route` knows."""
_NOBODY = "02:00:00:00:00:fe"  # a link address that no host has

# Packets are as long as a real line's: else losing one would lose up to 64 KiB.
_LINK = "gso_max_segs 1"

_WAYS = {
    "to_relay": 'iifname "client" oifname "relay"',
    "to_client": 'iifname "relay" oifname "client"',
}
_REJECTIONS = {
    "icmp": "reject with icmpx host-unreachable",
    "reset": "meta l4proto tcp reject with tcp reset",
}
_FILTER = """\
flush ruleset
table inet faults {{
  counter dropped {{ }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    {rules}
  }}
}}
"""
_DROP = "counter name dropped drop"
_LOSS = "numgen random mod 10000 < {} " + _DROP  # in hundredths of a percent
# The queue of a slow line, as long as such lines have it; and what it lets through at once.
QUEUE_MS = 200
BURST_BYTES = 16 * 1024

DNS_PORT = 53
_RECORDS = {"A": (socket.AF_INET, A), "AAAA": (socket.AF_INET6, AAAA)}

_NAMESPACES = Path("/run/netns")
_SETTINGS = Path("/etc/netns")
_NAME = re.compile(r"snitun-(\d+)-\d+-[a-z]+")
_numbers = itertools.count()
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


def require_network() -> None:
    """Skip the test, and say why, where no `Network` can be made; for tests and fixtures."""
    if reason := missing():
        pytest.skip(reason)


@functools.cache
def missing() -> str:
    """Return what it is that a `Network` needs and that isn't here; "" if all is."""
    if os.geteuid():
        return "only root can make network namespaces"
    for command in ("ip", "tc", "nft"):
        if not shutil.which(command):
            return f"no command {command} here"
    name = f"snitun-{os.getpid()}-{next(_numbers)}-probe"
    rules = [_LOSS.format(1), *_REJECTIONS.values()]
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "-batch", "-", stdin=f"addr add {_ip6(1, 1)}/64 dev lo\n")
        _run("ip", "netns", "exec", name, "nft", "-f", "-", stdin=_filter(rules))
        _run("tc", "-n", name, *_slow_line("lo", 1))
    except RuntimeError as error:
        return str(error)
    finally:
        _remove(name)
    return ""


class Network:
    """The hosts at the head of this file, each with its own network and its own resolv.conf.

    Its end ends all processes in it, whoever started them. What is open in this process
    belongs to who opened it.
    """

    def __init__(self) -> None:
        number = next(_numbers)
        self.names = {host: f"snitun-{os.getpid()}-{number}-{host}" for host in HOSTS}
        """The namespaces, by host."""
        self.client_ip, self.client_ip6 = _ip(1, HOST_NUMBER), _ip6(1, HOST_NUMBER)
        self.relay_ip, self.relay_ip6 = _ip(2, HOST_NUMBER), _ip6(2, HOST_NUMBER)
        self.device_ip, self.device_ip6 = _ip(3, HOST_NUMBER), _ip6(3, HOST_NUMBER)
        self.router_ip, self.router_ip6 = _ip(1, GATEWAYS["main"]), _ip6(1, GATEWAYS["main"])
        """The router as the client sees it."""
        self._gateway = "main"
        self._faults: dict[str, list[str]] = {}
        self._programs: list[Program] = []
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> Network:
        _sweep()
        with contextlib.ExitStack() as ending:
            # The last of these is the first to be called.
            ending.callback(self._reap)
            for name in self.names.values():
                ending.callback(_remove, name)
                _run("ip", "netns", "add", name)
            for host in HOSTS:
                # No time is spent on looking for others that have the same address.
                self.inside(host, functools.partial(_set, "ipv6/conf/default/accept_dad", "0"))
            self._connect_hosts()
            self._ending = ending.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def _reap(self) -> None:
        for program in self._programs:
            program.kill()

    def _connect_hosts(self) -> None:
        lines = ["link set lo up"]
        for host, number in NETWORKS.items():
            peer = f"type veth peer name eth0 {_LINK} netns {self.names[host]}"
            lines += [f"link add {host} {_LINK} {peer}", f"link set {host} up"]
            for gateway in (GATEWAYS["main"], GATEWAYS["other"]):
                lines.append(f"addr add {_ip(number, gateway)}/24 dev {host}")
                lines.append(f"addr add {_ip6(number, gateway)}/64 dev {host} nodad")
        self._ip("router", *lines)
        for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            self.inside("router", functools.partial(_set, path, "1"))
        for host in NETWORKS:
            self._ip(host, "link set lo up", "link set eth0 up")
            self._configure(host)
        for host in HOSTS:
            (_SETTINGS / self.names[host]).mkdir(parents=True)
            self.set_nameserver(host)

    def _configure(self, host: str) -> None:
        """Give the host its addresses and routes; those that it has stay as they are."""
        number, gateway = NETWORKS[host], self._gateway if host == "client" else "main"
        via, via6 = _ip(number, GATEWAYS[gateway]), _ip6(number, GATEWAYS[gateway])
        lines = [
            f"addr replace {getattr(self, f'{host}_ip')}/24 dev eth0",
            f"addr replace {getattr(self, f'{host}_ip6')}/64 dev eth0 nodad",
            f"route replace 0.0.0.0/0 via {via} dev eth0",
            f"route replace ::/0 via {via6} dev eth0",
        ]
        if gateway == "dead":
            # Else the kernel would learn that nobody answers, and say so after 3 s.
            lines += [
                f"neigh replace {address} lladdr {_NOBODY} dev eth0 nud permanent"
                for address in (via, via6)
            ]
        self._ip(host, *lines)

    def _ip(self, host: str, *lines: str) -> None:
        _run("ip", "-n", self.names[host], "-batch", "-", stdin="\n".join(lines) + "\n")

    # --- who is in it ----------------------------------------------------------

    def run(self, host: str, *command: str | Path, **options: Any) -> Program:
        """Start a program on `host`; `options` are those of `Program`."""
        program = Program("ip", "netns", "exec", self.names[host], *command, **options)
        self._programs.append(program)
        return program

    def inside(self, host: str, function: Callable[[], Result]) -> Result:
        """Call `function()` on a thread that is on `host`; return or raise what it does.

        Sockets made there stay on that host, whoever uses them then; so do threads and
        processes started there, but names they resolve as this machine does.
        """

        return in_network(_NAMESPACES / self.names[host], function)

    def set_nameserver(self, host: str, *addresses: str, options: str = "") -> None:
        """Let programs on `host` ask these for names, by resolv.conf(5); those that run, too."""
        lines = [f"nameserver {address}\n" for address in addresses]
        if options:
            lines.append(f"options {options}\n")
        # Written, not replaced: programs that run have this very file mounted.
        (_SETTINGS / self.names[host] / "resolv.conf").write_text("".join(lines))

    # --- faults between client and relay ---------------------------------------

    def drop(self, direction: str = "both", ip_version: int = 0) -> None:
        """Let packets vanish: a black hole for "both", "to_relay" or "to_client".

        `ip_version` 4 or 6 spares those of the other one.
        """
        match = f"meta nfproto ipv{ip_version} " if ip_version else ""
        self._fault("drop", direction, match + _DROP)

    def loss(self, percent: float, direction: str = "both") -> None:
        """Let so many packets vanish, by chance."""
        self._fault("loss", direction, _LOSS.format(round(100 * percent)))

    def reject(self, answer: str, direction: str = "both") -> None:
        """Refuse packets: by "icmp" (host unreachable), or by a TCP "reset", which spares UDP."""
        self._fault("reject", direction, _REJECTIONS[answer])

    def heal(self) -> None:
        """Let all packets through again: no `drop`, no `loss`, no `reject`."""
        self._faults.clear()
        self._apply_faults()

    @property
    def dropped(self) -> int:
        """How many packets have vanished since the last change of these faults."""
        shown = json.loads(self._nft("-j", "list", "counters"))["nftables"]
        return next(int(entry["counter"]["packets"]) for entry in shown if "counter" in entry)

    def _fault(self, kind: str, direction: str, rule: str) -> None:
        """Have this fault instead of an earlier one of its kind."""
        ways = _WAYS.values() if direction == "both" else [_WAYS[direction]]
        self._faults[kind] = [f"{way} {rule}" for way in ways]
        self._apply_faults()

    def _apply_faults(self) -> None:
        self._nft("-f", "-", stdin=_filter(list(itertools.chain(*self._faults.values()))))

    def _nft(self, *arguments: str, stdin: str = "") -> str:
        name = self.names["router"]
        return _run("ip", "netns", "exec", name, "nft", *arguments, stdin=stdin)

    # --- faults of the client's own line ---------------------------------------

    def remove_address(self) -> None:
        """Take the client's IPv4 address away, and the routes with it."""
        self._ip("client", f"addr del {self.client_ip}/24 dev eth0")

    def add_address(self) -> None:
        """Give the client its IPv4 address and its routes again."""
        self._configure("client")

    def change_address(self, gap_s: float = 0.0) -> None:
        """Give the client another IPv4 address, a new `client_ip`, so long after the old one."""
        self.remove_address()
        time.sleep(gap_s)
        self.client_ip = _ip(1, int(self.client_ip.rpartition(".")[2]) + 1)
        self.add_address()

    def change_route(self, gateway: str) -> None:
        """Let the client's default routes lead through another of GATEWAYS.

        "main" is the router, "other" is the router by another address, and what goes
        to "dead" vanishes.
        """
        self._gateway = gateway
        self._configure("client")

    def link_down(self) -> None:
        """Take the client's interface down: no routes, no IPv6 address, nothing comes or goes."""
        self._ip("client", "link set eth0 down")

    def link_up(self) -> None:
        """Take the client's interface up again, with its addresses and routes."""
        self._ip("client", "link set eth0 up")
        self._configure("client")

    def rate(self, mbit: float) -> None:
        """Let no more than `mbit` Mbit/s through to and from the client; 0 is no limit."""
        for host, device in (("client", "eth0"), ("router", "client")):
            _run("tc", "-n", self.names[host], *_slow_line(device, mbit))


class Resolver:
    """A DNS server (UDP) on a host of a network, until `close`; a context manager, too."""

    def __init__(
        self, network: Network, names: dict[str, Sequence[str]] | None = None, host: str = "router"
    ) -> None:
        """`names` may be changed at any time: to each name its addresses, IPv4 and IPv6."""
        self.address: str = getattr(network, f"{host}_ip")
        """What `Network.set_nameserver` needs."""
        self.names = {} if names is None else names
        self.queries: list[tuple[str, str]] = []
        """What was asked for, and how: name and "A" or "AAAA"."""
        self.is_silent = False
        """Whether queries are counted, but not answered."""
        self.is_failing = False
        """Whether the answer is SERVFAIL."""
        self._is_closed = False
        self._sock = network.inside(host, self._open)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Resolver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Answer no longer."""
        self._is_closed = True
        with contextlib.suppress(OSError):  # it isn't connected; this wakes the thread anyway
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()

    def _open(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.bind((self.address, DNS_PORT))
        except OSError:
            sock.close()
            raise
        return sock

    def _serve(self) -> None:
        while True:
            query, client = self._sock.recvfrom(65536)
            if self._is_closed:
                return
            answer = self._answer(DNSRecord.parse(query))
            if not self.is_silent:
                with contextlib.suppress(OSError):  # no way back to who asked
                    self._sock.sendto(answer, client)

    def _answer(self, query: DNSRecord) -> bytes:
        name, kind = str(query.q.qname).rstrip(".").lower(), QTYPE[query.q.qtype]
        self.queries.append((name, kind))
        reply = query.reply()
        addresses = self.names.get(name)
        if self.is_failing:
            reply.header.rcode = RCODE.SERVFAIL
        elif addresses is None:
            reply.header.rcode = RCODE.NXDOMAIN
        elif kind in _RECORDS:
            family, record = _RECORDS[kind]
            for address in addresses:
                if (":" in address) == (family == socket.AF_INET6):
                    reply.add_answer(RR(query.q.qname, query.q.qtype, rdata=record(address)))
        data: bytes = reply.pack()
        return data


def in_network(path: Path, function: Callable[[], Result]) -> Result:
    """Call `function()` on a thread that is in the network namespace of `path`."""

    def call() -> Result:
        # os.setns came with Python 3.12.
        with open(path, "rb") as file:
            if _libc.setns(file.fileno(), _CLONE_NEWNET):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), file.name)
        return function()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def _ip(network: int, number: int) -> str:
    return f"10.77.{network}.{number}"


def _ip6(network: int, number: int) -> str:
    return f"fd77:77:77:{network}::{number:x}"


def _filter(rules: list[str]) -> str:
    return _FILTER.format(rules="\n    ".join(rules))


def _slow_line(device: str, mbit: float) -> list[str]:
    """Return the arguments of tc that limit what `device` sends; 0 is no limit."""
    command = ["qdisc", "replace", "dev", device, "root"]
    if not mbit:
        return [*command, "noqueue"]
    # Fast lines need more at once: as much as comes between two ticks of a slow clock.
    burst_bytes = max(BURST_BYTES, round(mbit * 1e6 / 8 / 100))
    limits = ("rate", f"{mbit}mbit", "burst", f"{burst_bytes}b", "latency", f"{QUEUE_MS}ms")
    return [*command, "tbf", *limits]


def _set(path: str, value: str) -> None:
    Path("/proc/sys/net", path).write_text(value)


def _run(*command: str, stdin: str = "") -> str:
    """Run a command to its end and return what it printed. Raises RuntimeError."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        text = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {text}")
    return done.stdout


def _sweep() -> None:
    """Remove what processes left behind that ended without doing so."""
    for folder in (_NAMESPACES, _SETTINGS):
        for path in folder.glob("snitun-*"):
            match = _NAME.fullmatch(path.name)
            if match and not os.path.exists(f"/proc/{match[1]}"):
                with contextlib.suppress(RuntimeError):  # another process does it as well
                    _remove(path.name)


def _remove(name: str) -> None:
    """End all processes in a namespace, and remove it and its settings."""
    shutil.rmtree(_SETTINGS / name, ignore_errors=True)
    if (_NAMESPACES / name).exists():
        wait_until(lambda: _kill(name), f"the processes in {name} end")
        _run("ip", "netns", "delete", name)


def _kill(name: str) -> bool:
    """Kill what is in the namespace; return whether nothing was."""
    pids = _run("ip", "netns", "pids", name).split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    return not pids
