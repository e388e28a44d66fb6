"""The networks of the tests: each fault is what it says, and nothing of them is left behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snitun_sync.net.sockets import unacknowledged_bytes
from tests.network import HOSTS, Network, Resolver, missing, require_network
from tests.services import receive_exactly
from tests.support import MIB, PROJECT, WAIT_S, pattern, wait_until

_SENT = b"0123456789"
_LOOK_UP = """
import socket, sys, time
said = ""
while True:
    try:
        infos = socket.getaddrinfo(sys.argv[1], None, type=socket.SOCK_STREAM)
        says = " ".join(sorted(info[4][0] for info in infos))
    except socket.gaierror as error:
        says = "unknown" if error.errno == socket.EAI_NONAME else "no answer"
    if says != said:
        print("it is", says + ".", flush=True)
    said = says
    time.sleep(0.02)
"""
_DIE = """
import os, signal
from tests.network import Network
with Network() as network:
    sleeping = network.run("device", "sleep", "1000")
    shell = network.run("relay", "sh", "-c", "sleep 1000 & echo started $!; wait")
    print(*network.names.values(), sleeping.pid, *shell.wait_for("started").split()[1:], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def network() -> Iterator[Network]:
    require_network()
    with Network() as network:
        yield network


def listen(network: Network, host: str, ip: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    listener = network.inside(host, lambda: socket.create_server((ip, 0), family=family))
    listener.settimeout(WAIT_S)
    return listener


def connect(network: Network, host: str, listener: socket.socket) -> socket.socket:
    place = listener.getsockname()[:2]
    return network.inside(host, lambda: socket.create_connection(place, WAIT_S))


@contextlib.contextmanager
def connection(
    network: Network, host: str = "client", ip: str = ""
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a connection from `host` to the relay."""
    with listen(network, "relay", ip or network.relay_ip) as listener:
        with connect(network, host, listener) as near, listener.accept()[0] as far:
            near.settimeout(WAIT_S)
            far.settimeout(WAIT_S)
            exchange(near, far)
            yield near, far


def exchange(one: socket.socket, other: socket.socket) -> None:
    """Send in both directions and see it come, and see that each side knows that it came."""
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(_SENT)
        assert receiver.recv(100) == _SENT
        # Else what is sent next could have to wait for this one's acknowledgement.
        wait_until(lambda sender=sender: not unacknowledged_bytes(sender))  # type: ignore[misc]


def transfer(sender: socket.socket, receiver: socket.socket) -> None:
    """Send a MiB and see all of it come."""
    data = pattern(0, MIB)
    sending = threading.Thread(target=sender.sendall, args=(data,), daemon=True)
    sending.start()
    assert receive_exactly(receiver, MIB) == data
    sending.join()


def is_silent(sock: socket.socket) -> bool:
    """Tell whether nothing has come: no byte, no end, no error."""
    return not select.select([sock], [], [], 0)[0]


def attempts(sock: socket.socket) -> int:
    """Return how often the kernel has tried again, with no answer (linux/tcp.h, struct tcp_info).

    By sending again what it sent, or where it couldn't even send, by probes.
    """
    return sum(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 4)[2:])


def send_in_vain(sender: socket.socket, receiver: socket.socket) -> None:
    """Send, and see that it doesn't come, although the kernel has tried again."""
    sender.sendall(_SENT)
    wait_until(lambda: attempts(sender), "the kernel tries again")
    assert unacknowledged_bytes(sender) == len(_SENT)
    assert is_silent(sender)
    assert is_silent(receiver)


def refusal(network: Network, host: str, listener: socket.socket) -> int:
    """Return the error of a connection that can't be made."""
    with pytest.raises(OSError) as raised:
        connect(network, host, listener).close()
    assert raised.value.errno is not None
    return raised.value.errno


# --- the hosts --------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["ip", "ip6"])
@pytest.mark.parametrize("host", ["client", "device"])
def test_the_relay_is_reached(network: Network, host: str, version: str) -> None:
    relay_ip = getattr(network, f"relay_{version}")
    with connection(network, host, relay_ip) as (near, far):
        assert near.getpeername()[0] == relay_ip
        assert far.getpeername()[0] == getattr(network, f"{host}_{version}")


def test_inside_is_there_and_nowhere_else(network: Network) -> None:
    def namespace() -> str:
        return os.readlink("/proc/thread-self/ns/net")

    here = namespace()
    seen = {network.inside(host, namespace) for host in HOSTS}
    assert len({here, *seen}) == 1 + len(HOSTS)
    assert namespace() == here
    with pytest.raises(ZeroDivisionError):
        network.inside("relay", lambda: 1 // 0)
    for host in HOSTS:
        program = network.run(host, "readlink", "/proc/self/ns/net")
        assert program.wait() == 0
        assert program.output.strip() == network.inside(host, namespace)


def test_two_networks_at_once_know_nothing_of_each_other(network: Network) -> None:
    with Network() as other, listen(network, "relay", network.relay_ip) as listener:
        connect(network, "client", listener).close()
        assert refusal(other, "client", listener) == errno.ECONNREFUSED


# --- faults between client and relay ----------------------------------------------------


@pytest.mark.parametrize("version", ["ip", "ip6"])
def test_a_black_hole_says_nothing_and_heals(network: Network, version: str) -> None:
    relay_ip = getattr(network, f"relay_{version}")
    with connection(network, ip=relay_ip) as (near, far):
        network.drop()
        far.sendall(_SENT)
        send_in_vain(near, far)
        wait_until(lambda: attempts(far))
        assert is_silent(near)
        assert network.dropped >= 4
        with connection(network, "device", relay_ip):
            pass  # a device's way is another one
        network.heal()
        assert near.recv(100) == far.recv(100) == _SENT
        exchange(near, far)
        assert network.dropped == 0


@pytest.mark.parametrize("direction", ["to_relay", "to_client"])
def test_a_black_hole_in_one_direction(network: Network, direction: str) -> None:
    with connection(network) as (near, far):
        network.drop(direction)
        sender, receiver = (near, far) if direction == "to_relay" else (far, near)
        send_in_vain(sender, receiver)
        receiver.sendall(_SENT)
        assert sender.recv(100) == _SENT
        assert is_silent(receiver)
        network.heal()
        assert receiver.recv(100) == _SENT


@pytest.mark.parametrize("version", [4, 6])
def test_a_black_hole_for_one_version_of_ip(network: Network, version: int) -> None:
    network.drop(ip_version=10 - version)
    with connection(network, ip={4: network.relay_ip, 6: network.relay_ip6}[version]) as pair:
        network.drop(ip_version=version)
        send_in_vain(*pair)


@pytest.mark.parametrize("version", ["ip", "ip6"])
def test_rejection_by_icmp(network: Network, version: str) -> None:
    with listen(network, "relay", getattr(network, f"relay_{version}")) as listener:
        network.reject("icmp")
        assert refusal(network, "client", listener) == errno.EHOSTUNREACH
        network.heal()
        connect(network, "client", listener).close()


def test_rejection_by_reset(network: Network) -> None:
    with connection(network) as (near, far):
        network.reject("reset", "to_relay")
        near.sendall(_SENT)
        with pytest.raises(ConnectionResetError):
            near.recv(100)
        assert is_silent(far)
    with listen(network, "relay", network.relay_ip) as listener:
        assert refusal(network, "client", listener) == errno.ECONNREFUSED
        network.heal()
        connect(network, "client", listener).close()


def test_loss_is_of_some_packets(network: Network) -> None:
    def datagrams() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    sent = 200  # more would fill a receive buffer
    came: list[bytes] = []
    with network.inside("relay", datagrams) as far, network.inside("client", datagrams) as near:

        def is_settled() -> bool:
            while select.select([far], [], [], 0)[0]:
                came.append(far.recv(1))
            return len(came) + network.dropped == sent

        far.bind((network.relay_ip, 0))
        network.loss(50)
        for _ in range(sent):
            near.sendto(b"", far.getsockname())
        wait_until(is_settled)
    # Fewer or more come once in 10^12 times, by chance.
    assert 50 < len(came) < 150


def test_loss_makes_tcp_send_again(network: Network) -> None:
    with connection(network) as (near, far):
        network.loss(5)
        transfer(near, far)
        assert network.dropped


def test_packets_are_as_long_as_on_a_real_line(network: Network) -> None:
    with connection(network) as (near, far):
        transfer(near, far)
    command = ["ip", "-n", network.names["router"], "-s", "-j", "link", "show", "client"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    received = shown[0]["stats64"]["rx"]
    assert MIB < received["bytes"] <= received["packets"] * 1514


# --- faults of the client's line --------------------------------------------------------


def test_another_address(network: Network) -> None:
    before = network.client_ip
    with connection(network) as (near, far), connection(network, ip=network.relay_ip6) as other:
        network.change_address()
        assert network.client_ip != before
        send_in_vain(near, far)
        send_in_vain(far, near)
        exchange(*other)
        with connection(network) as (_, new_far):
            assert new_far.getpeername()[0] == network.client_ip


def test_no_address_for_a_while(network: Network) -> None:
    with connection(network) as (near, far), listen(network, "relay", network.relay_ip) as listener:
        network.remove_address()
        assert refusal(network, "client", listener) == errno.ENETUNREACH
        send_in_vain(near, far)
        network.add_address()
        assert far.recv(100) == _SENT
        connect(network, "client", listener).close()


@pytest.mark.parametrize("version", ["ip", "ip6"])
def test_other_routes(network: Network, version: str) -> None:
    with connection(network, ip=getattr(network, f"relay_{version}")) as (near, far):
        network.change_route("other")
        exchange(near, far)
        network.change_route("dead")
        send_in_vain(near, far)
        # The way back is whole.
        far.sendall(_SENT)
        assert near.recv(100) == _SENT
        network.change_route("main")
        assert far.recv(100) == _SENT


@pytest.mark.parametrize("version", ["ip", "ip6"])
def test_a_dead_gateway_isn_t_known_to_be_dead(network: Network, version: str) -> None:
    relay_ip = getattr(network, f"relay_{version}")

    def connecting() -> socket.socket:
        # Of a gateway that doesn't answer the kernel would know after three times this.
        folder = Path("/proc/sys/net", {"ip": "ipv4", "ip6": "ipv6"}[version], "neigh/eth0")
        (folder / "retrans_time_ms").write_text("50")
        sock = socket.socket(listener.family)
        sock.setblocking(False)
        assert sock.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        return sock

    network.change_route("dead")
    with listen(network, "relay", relay_ip) as listener:
        with network.inside("client", connecting) as sock:
            wait_until(lambda: attempts(sock), "the kernel tries again")
            assert is_silent(sock)


@pytest.mark.parametrize("version", ["ip", "ip6"])
def test_the_link_goes_down_and_up(network: Network, version: str) -> None:
    relay_ip = getattr(network, f"relay_{version}")
    with (
        connection(network, ip=relay_ip) as (near, far),
        listen(network, "relay", relay_ip) as listener,
    ):
        network.link_down()
        assert refusal(network, "client", listener) == errno.ENETUNREACH
        send_in_vain(near, far)
        network.link_up()
        assert far.recv(100) == _SENT
        connect(network, "client", listener).close()


def test_a_slow_line_holds_packets_back(network: Network) -> None:
    def held_back(host: str, device: str) -> int:
        """Return how often a packet had to wait (tc-tbf(8): overlimits)."""
        command = ["tc", "-s", "-n", network.names[host], "qdisc", "show", "dev", device]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return int(words[words.index("overlimits") + 1])

    with connection(network) as (near, far):
        network.rate(20)
        assert not held_back("client", "eth0")
        transfer(near, far)
        assert held_back("client", "eth0")
        assert not held_back("router", "client")
        transfer(far, near)
        assert held_back("router", "client")
        network.rate(0)
        assert not held_back("client", "eth0")
        exchange(near, far)


# --- names ------------------------------------------------------------------------------


def test_names_as_a_program_sees_them(network: Network) -> None:
    name = "relay.example.test"
    with Resolver(network) as resolver:
        network.set_nameserver("client", resolver.address, options="timeout:1 attempts:1")
        with network.run("client", sys.executable, "-c", _LOOK_UP, name) as program:
            program.wait_for("it is unknown.")
            resolver.names[name] = [network.relay_ip]
            program.wait_for(f"it is {network.relay_ip}.")
            resolver.names[name] = [network.relay_ip6, network.device_ip]
            program.wait_for(f"it is {network.device_ip} {network.relay_ip6}.")
            assert {(name, "A"), (name, "AAAA")} == set(resolver.queries)
            resolver.is_failing = True
            program.wait_for("it is no answer.")
            resolver.is_failing = False
            program.wait_for(f"it is {network.device_ip} {network.relay_ip6}.", 2)
            resolver.is_silent = True
            program.wait_for("it is no answer.", 2)
            count = len(resolver.queries)
            wait_until(lambda: len(resolver.queries) > count)
            with Resolver(network, {name: ["192.0.2.1"]}, "relay") as other:
                network.set_nameserver("client", other.address)
                program.wait_for("it is 192.0.2.1.")


def test_hosts_have_no_nameserver_of_this_machine(network: Network) -> None:
    for host in HOSTS:
        assert network.run(host, "cat", "/etc/resolv.conf").wait() == 0
        assert network._programs[-1].output == ""


# --- what is left behind ----------------------------------------------------------------


def left_of(network: Network) -> list[Path]:
    places = (Path("/run/netns"), Path("/etc/netns"))
    return [
        place / name
        for place in places
        for name in network.names.values()
        if (place / name).exists()
    ]


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that only waits for its parent has no command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


def test_nothing_is_left_behind_after_a_failure() -> None:
    require_network()
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), Network() as network:
        sleeping = network.run("device", "sleep", "1000")
        shell = network.run("relay", "sh", "-c", "sleep 1000 & echo started $!; wait")
        pids = [sleeping.pid, shell.pid, int(shell.wait_for("started").split()[1])]
        with Resolver(network):
            assert len(left_of(network)) == 2 * len(HOSTS)
            assert all(map(is_running, pids))
            raise ZeroDivisionError
    assert left_of(network) == []
    assert not any(map(is_running, pids))
    assert threading.active_count() == threads
    assert sleeping.process.returncode == shell.process.returncode == -9


def test_nothing_is_left_behind_where_a_network_can_t_be_made() -> None:
    require_network()
    network = Network()
    subprocess.run(["ip", "netns", "add", network.names["router"]], check=True)
    with pytest.raises(RuntimeError, match=network.names["router"]), network:
        pass
    assert left_of(network) == []


def test_what_a_killed_process_left_is_swept() -> None:
    require_network()
    command = [sys.executable, "-c", _DIE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == -9, done.stderr
    *names, one, other = done.stdout.split()
    # Another process that makes networks now may be quicker.
    with Network() as network:
        assert left_of(network)
        wait_until(lambda: not any(Path("/run/netns", name).exists() for name in names))
        wait_until(lambda: not any(Path("/etc/netns", name).exists() for name in names))
        wait_until(lambda: not is_running(int(one)) and not is_running(int(other)))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    require_network()
    monkeypatch.setenv("PATH", "/nowhere")
    assert missing.__wrapped__() == "no command ip here"
