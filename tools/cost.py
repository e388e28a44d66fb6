"""Where a frame's microseconds go.

    python3 tools/cost.py                        a Markdown table: what each side's turns take
    python3 tools/cost.py --profile connect      the functions in which one load spends its time

A relay and a client live in this one process, and their loops turn one at a time, so that
nothing waits and caches are warm: real processes take two to three times as long. The system
calls and the crypto are then done again by themselves; the rest is the interpreter's.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import select
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import environment

if TYPE_CHECKING:
    from snitun_sync.net.service import Service

HOSTNAME = "cost.example.test"
SMALL, LARGE = 64, 128 * 1024
UNIT = 32


class Side:
    """A relay or a client that turns when it is told to, and how long it took."""

    def __init__(self, service: Service) -> None:
        self.service, self.took_s = service, 0.0
        self._loop = service.loop
        service._prepare()
        service._begin()

    def turn(self) -> bool:
        """Turn once, if there is something to do; return whether there was."""
        if not self._loop._calls and not self._loop._poller.poll(0, 1):
            return False
        begin = time.perf_counter()
        self._loop._turn()
        self.took_s += time.perf_counter() - begin
        return True


class Tunnel:
    """A relay, a client and an endpoint, connected; and the loads that they may be put under."""

    def __init__(self, crypto: str) -> None:
        from snitun_sync.client import Client
        from snitun_sync.protocol.aes import load
        from snitun_sync.protocol.ticket import Ticket
        from snitun_sync.protocol.token import Fernet, Payload, new_fernet_key
        from snitun_sync.server import Server
        from tools.load import client_hello

        self.aes = load(crypto)
        key, aes_key, aes_iv = new_fernet_key(os.urandom), os.urandom(32), os.urandom(16)
        payload = Payload(
            valid=time.time() + 86400,
            hostname=HOSTNAME,
            aes_key=aes_key,
            aes_iv=aes_iv,
            protocol_version=2,
        )
        server = Server([key], ["127.0.0.1:0"], crypto=crypto)
        self.relay = Side(server)
        self.port = server.ports[0]
        self.listener = socket.create_server(("127.0.0.1", 0))
        ticket = Ticket(
            server=f"127.0.0.1:{self.port}",
            token=Fernet([key], self.aes).seal(payload.to_json(), time.time(), os.urandom),
            aes_key=aes_key,
            aes_iv=aes_iv,
            protocol_version=2,
        )
        client = Client(ticket, f"127.0.0.1:{self.listener.getsockname()[1]}", crypto=crypto)
        self.client = Side(client)
        self.turn_until(lambda: client.wait_until_up(0))
        self.hello = client_hello(HOSTNAME)

    def turn_until(self, is_done: Callable[[], object]) -> None:
        """Let both sides turn until `is_done`, and until neither has anything to do."""
        while not is_done() or self.relay.turn() | self.client.turn():
            self.relay.turn()
            self.client.turn()

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Return a device's connection and the endpoint's side of it."""
        device = socket.create_connection(("127.0.0.1", self.port))
        device.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        device.sendall(self.hello)
        self.turn_until(lambda: select.select([self.listener], [], [], 0)[0])
        endpoint, _ = self.listener.accept()
        endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.receive(endpoint, len(self.hello))
        return device, endpoint

    def receive(self, sock: socket.socket, size: int) -> None:
        """Let both sides turn until `sock` has got that much, or its end."""
        while size:
            self.turn_until(lambda: select.select([sock], [], [], 0)[0])
            data = sock.recv(size)
            if not data:
                break
            size -= len(data)

    def exchange(self, count: int, up: int, down: int) -> None:
        """Send `up` bytes to the endpoint and `down` bytes back, `count` times."""
        device, endpoint = self.connect()
        self.relay.took_s = self.client.took_s = 0.0
        for _ in range(count):
            device.sendall(bytes(up))
            self.receive(endpoint, up)
            endpoint.sendall(bytes(down))
            self.receive(device, down)
        self.end(device, endpoint)

    def connects(self, count: int) -> None:
        """Open, answer with 2 bytes and close `count` connections."""
        self.relay.took_s = self.client.took_s = 0.0
        for _ in range(count):
            device, endpoint = self.connect()
            endpoint.send(b"OK")
            endpoint.close()
            self.receive(device, 2)
            self.receive(device, 1)  # the end
            self.end(device)

    def end(self, *sockets: socket.socket) -> None:
        """Close what a load has opened, and let both sides see it."""
        for sock in sockets:
            sock.close()
        self.turn_until(lambda: True)


def median_us(call: Callable[[], object], count: int = 300) -> float:
    """Return the median time of a call, in µs."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def system_calls_us() -> dict[str, float]:
    """Return what the system calls of a turn take by themselves, in µs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, address = listener.accept()[0], listener.getsockname()
        room, small, large = memoryview(bytearray(LARGE)), bytes(SMALL + UNIT), bytes(LARGE)
        poller = select.epoll()
        poller.register(two.fileno(), select.EPOLLIN)

        def exchange(data: bytes) -> tuple[float, float]:
            sends, receives = [], []
            for _ in range(300):
                begin = time.perf_counter()
                one.sendmsg([small[:UNIT], data])
                sends.append(time.perf_counter() - begin)
                left = UNIT + len(data)
                taken = 0.0
                while left:
                    begin = time.perf_counter()
                    left -= two.recv_into(room[:left])
                    taken += time.perf_counter() - begin
                receives.append(taken)
            return statistics.median(sends) * 1e6, statistics.median(receives) * 1e6

        def connect() -> None:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect_ex(address)
            sock.getpeername()
            poller.register(sock.fileno(), select.EPOLLIN)
            poller.unregister(sock.fileno())
            sock.close()

        def accept() -> None:
            sock = listener.accept()[0]
            sock.setblocking(False)
            poller.register(sock.fileno(), select.EPOLLIN)
            poller.unregister(sock.fileno())
            sock.close()

        send, receive = exchange(small[UNIT:])
        large_send, large_receive = exchange(large)
        one.send(b"x")
        poll = median_us(lambda: poller.poll(0, 256))
        listener.listen(1024)
        opened = median_us(connect, 200)
        accepted = median_us(accept, 200)
        one.close()
        two.close()
        poller.close()
    turn = poll + send + receive
    return {
        "pingpong client": 2 * turn,
        "pingpong relay": 2 * turn,
        "bulk client": poll + large_send + large_receive,
        "bulk relay": poll + large_send + large_receive,
        "connect client": opened + 3 * turn,
        "connect relay": accepted + 3 * turn,
    }


def crypto_us(tunnel: Tunnel) -> dict[str, float]:
    """Return what the crypto of a turn takes by itself, in µs."""
    seal = tunnel.aes.cbc_encryptor(bytes(32), bytes(16))
    open_ = tunnel.aes.cbc_decryptor(bytes(32), bytes(16))
    unit = bytes(UNIT)
    sealed, opened = median_us(lambda: seal(unit)), median_us(lambda: open_(unit))
    return {
        "pingpong client": sealed + opened,
        "pingpong relay": sealed + opened,
        "bulk client": sealed,
        "bulk relay": opened,
        # NEW with its payload and two DATA one way, DATA and CLOSE back
        "connect client": 2 * sealed + 4 * opened,
        "connect relay": 4 * sealed + 2 * opened,
    }


LOADS: dict[str, tuple[Callable[[Tunnel, int], None], int]] = {
    "pingpong": (lambda tunnel, count: tunnel.exchange(count, SMALL, SMALL), 3000),
    "bulk": (lambda tunnel, count: tunnel.exchange(count, 0, LARGE), 600),
    "connect": (Tunnel.connects, 500),
}


def table(tunnel: Tunnel) -> str:
    """Measure all loads; return a Markdown table."""
    calls, crypto = system_calls_us(), crypto_us(tunnel)
    lines = [
        "| µs for one | turns | system calls | crypto | interpreter |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, (load, count) in LOADS.items():
        best: dict[str, float] = {}
        for _ in range(5):
            load(tunnel, count)
            for who, side in (("client", tunnel.client), ("relay", tunnel.relay)):
                us = side.took_s / count * 1e6
                best[who] = min(us, best.get(who, us))
        for who, us in best.items():
            part = (calls[f"{name} {who}"], crypto[f"{name} {who}"])
            rest = us - sum(part)
            lines.append(
                f"| {name}, {who} | {us:.0f} | {part[0]:.0f} | {part[1]:.1f} | {rest:.0f} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Do what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=LOADS, help="list the functions of one load")
    parser.add_argument(
        "--crypto", choices=("pycryptodome", "cryptography"), default="pycryptodome"
    )
    options = parser.parse_args()
    environment.enter("requirements.txt", "tools/requirements-bench.txt")
    tunnel = Tunnel(options.crypto)
    if options.profile:
        load, count = LOADS[options.profile]
        profile = cProfile.Profile()
        profile.runcall(load, tunnel, count)
        pstats.Stats(profile).sort_stats("tottime").print_stats("snitun_sync|built-in|method", 40)
    else:
        print(table(tunnel))
    tunnel.client.service.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
