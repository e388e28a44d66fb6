"""Addresses and routes that come and go, in a network of the test's own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snitun_sync.net import netlink
from snitun_sync.net.loop import Loop
from snitun_sync.net.netlink import SEEN_LIMIT, NetworkWatch, is_change, local_address_is_gone
from tests.interop.peers import missing
from tests.support import WAIT_S, has_more_than, process_counts, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="netlink is Linux's")

CLONE_NEWNET = 0x40000000
NEWADDR, DELADDR, NEWROUTE, DELROUTE = 20, 21, 24, 25
MULTI, TENTATIVE = 0x2, 0x40
IFA_ADDRESS, IFA_LOCAL, IFA_CACHEINFO = 1, 2, 6
INET, INET6 = 2, 10
UNICAST, LOCAL, BROADCAST, ANYCAST, MULTICAST, BLACKHOLE = range(1, 7)
MAIN_TABLE, LOCAL_TABLE = 254, 255
CLONED = 0x200


IP = shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin") or ""


def ip(*commands: str) -> str:
    """Run commands of ip(8), in one process: the kernel has reported all when this returns."""
    lines = "\n".join(commands) + "\n"
    done = subprocess.run(
        [IP, "-batch", "-"], input=lines, text=True, capture_output=True, check=True
    )
    return done.stdout


@pytest.fixture
def namespace() -> Iterator[None]:
    """Let this thread, and the processes that it starts, have a network with nothing in it."""
    if not IP:
        missing("ip")
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net", "rb") as home:
        if libc.unshare(CLONE_NEWNET):
            missing(f"the right to make a network ({os.strerror(ctypes.get_errno())})")
        try:
            ip("link set lo up")
            yield
        finally:
            if libc.setns(home.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "can't go back to the machine's network")


class Watching:
    """A watch, its loop on a thread, and what it has told."""

    def __init__(self) -> None:
        self.calls = 0
        self.loop = Loop()
        self.watch = NetworkWatch(self.loop, self._changed)
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()
        self.expect(0)  # and what the network has at the start is read

    def _changed(self) -> None:
        self.calls += 1

    def expect(self, calls: int) -> None:
        """Wait until `changed` was called so often, all was read, and no more calls are due."""
        wait_until(lambda: self.calls >= calls, f"{calls} calls")
        is_due: list[bool] = []
        # The kernel has queued its messages already: they are read before this is called.
        self.loop.call_soon_threadsafe(lambda: is_due.append(self.watch._timer is not None))
        wait_until(lambda: is_due)
        assert (self.calls, is_due) == (calls, [False])

    def hold(self) -> threading.Event:
        """Hold the loop until the event is set."""
        held, release = threading.Event(), threading.Event()

        def wait() -> None:
            held.set()
            release.wait(WAIT_S)

        self.loop.call_soon_threadsafe(wait)
        assert held.wait(WAIT_S)
        return release

    def close(self) -> None:
        self.loop.stop()
        self._thread.join(WAIT_S)
        self.watch.close()
        self.watch.close()
        assert self.loop.timer_count == 0
        self.loop.close()


@pytest.fixture
def watching(namespace: None) -> Iterator[Watching]:
    watching = Watching()
    yield watching
    watching.close()


# --- a real kernel ----------------------------------------------------------------


@pytest.mark.parametrize("address", ["192.0.2.1/32", "2001:db8::1/128"])
def test_an_address_that_comes_and_one_that_goes(watching: Watching, address: str) -> None:
    # Without a route, which would be a change as well.
    ip(f"addr add {address} dev lo noprefixroute")
    watching.expect(1)
    ip(f"addr del {address} dev lo")
    watching.expect(2)
    ip(f"addr add {address} dev lo noprefixroute")
    watching.expect(3)


@pytest.mark.parametrize("address", ["192.0.2.1/24", "2001:db8::1/64"])
def test_an_address_that_lives_longer_is_no_change(namespace: None, address: str) -> None:
    ip(f"addr add {address} dev lo")  # before the watch begins
    wait_until(lambda: "tentative" not in ip("addr show lo"))
    time.sleep(0.2)  # the kernel tells that, of IPv6, a moment later
    watching = Watching()
    try:
        for life_s in (100, 100, 200):
            ip(f"addr change {address} dev lo valid_lft {life_s} preferred_lft {life_s}")
            watching.expect(0)
        ip("addr add 192.0.2.9/32 dev lo")
        watching.expect(1)
        ip("addr change 192.0.2.9/32 dev lo valid_lft 100 preferred_lft 100")
        watching.expect(1)
    finally:
        watching.close()


@pytest.mark.parametrize(
    ("family", "destination", "source"),
    [("-4", "198.51.100.0/24", "192.0.2.1"), ("-6", "2001:db8:1::/64", "2001:db8::1")],
)
def test_a_route_that_comes_changes_and_goes(
    watching: Watching, family: str, destination: str, source: str
) -> None:
    ip(f"addr add {source} dev lo")
    watching.expect(1)
    for calls, command in enumerate(("add", "replace", "del"), 2):
        mtu = "mtu 1400" if command == "replace" else ""
        # Not `ip -batch`: there, the family can't be chosen.
        words = f"{IP} {family} route {command} {destination} dev lo {mtu}"
        subprocess.run(words.split(), check=True)
        watching.expect(calls)


def test_routes_that_only_follow_addresses_don_t_count(watching: Watching) -> None:
    for command in ("add", "del"):
        ip(f"route {command} local 198.51.100.1 dev lo table local")
        ip(f"route {command} broadcast 198.51.100.2 dev lo table 100")
        watching.expect(0)
    ip("route add blackhole 198.51.100.3")
    watching.expect(1)


def test_a_cable_that_is_pulled_and_put_back(namespace: None) -> None:
    with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w", encoding="ascii") as file:
        file.write("1")  # of IPv6, addresses and routes would tell
    ip("link add this type veth peer name that")
    ip("addr add 192.0.2.1/24 dev this")
    ip("link set this up")
    ip("link set that up")
    wait_until(lambda: "LOWER_UP" in ip("link show this"))
    watching = Watching()
    try:
        for state in ("down", "up"):
            calls = watching.calls
            ip(f"link set that {state}")
            wait_until(lambda calls=calls: watching.calls > calls)  # type: ignore[misc]
    finally:
        watching.close()


def test_a_burst_is_one_call(watching: Watching) -> None:
    release = watching.hold()
    ip(*(f"addr add 192.0.2.{number}/32 dev lo" for number in range(1, 7)))
    release.set()
    watching.expect(1)


def test_what_comes_while_a_call_is_due_folds_into_it(
    watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netlink, "SETTLE_S", 1000.0)
    ip("addr add 192.0.2.1/32 dev lo")
    wait_until(lambda: watching.loop.timer_count == 1)
    timer = watching.watch._timer
    for number in range(2, 6):
        ip(f"addr add 192.0.2.{number}/32 dev lo")
    last = socket.inet_aton("192.0.2.5")
    wait_until(lambda: last in {address for _, _, address in watching.watch._seen})
    assert watching.watch._timer is timer
    assert watching.loop.timer_count == 1
    assert watching.calls == 0  # and `close` cancels the one that is due


def test_more_than_the_socket_holds_is_a_change(watching: Watching) -> None:
    ip("addr add 192.0.2.1/32 dev lo")
    watching.expect(1)
    assert watching.watch.sock is not None
    watching.watch.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # as little as can be
    refresh = "addr change 192.0.2.1/32 dev lo valid_lft 100 preferred_lft 100"
    ip(refresh)
    watching.expect(1)
    release = watching.hold()
    ip(*[refresh] * 100)  # none of them would count
    release.set()
    watching.expect(2)
    # What was seen is forgotten: an address may have gone meanwhile.
    ip(refresh)
    watching.expect(3)
    ip(refresh)
    watching.expect(3)


def test_watches_leave_nothing_behind(namespace: None) -> None:
    loop = Loop()
    before = process_counts(os.getpid())
    for _ in range(50):
        watch = NetworkWatch(loop, lambda: None)
        watch.close()
    assert not has_more_than(before, os.getpid())
    assert loop.timer_count == 0
    loop.close()


def test_a_watch_ends_when_what_it_calls_has_a_defect(namespace: None) -> None:
    loop = Loop()

    def changed() -> None:
        loop.stop()
        raise ValueError("a defect")

    watch = NetworkWatch(loop, changed)
    ip("addr add 192.0.2.1/32 dev lo")
    loop.run()
    assert watch.sock is None
    loop.close()


def test_a_system_without_netlink(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    monkeypatch.delattr(socket, "AF_NETLINK")
    with pytest.raises(OSError, match="this system has no netlink"):
        NetworkWatch(loop, lambda: None)
    loop.close()


def test_a_watch_on_a_loop_that_is_closed_leaves_no_socket() -> None:
    before = process_counts(os.getpid())
    loop = Loop()
    loop.close()
    with pytest.raises(ValueError, match="closed"):
        NetworkWatch(loop, lambda: None)
    assert not has_more_than(before, os.getpid())


# --- the parser -------------------------------------------------------------------


def message(kind: int, body: bytes, flags: int = 0) -> bytes:
    data = struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body
    return data + bytes(-len(data) % 4)


def address(
    value: bytes, *more: tuple[int, bytes], flags: int = 0x80, kind: int = IFA_ADDRESS
) -> bytes:
    body = struct.pack("=BBBBI", INET if len(value) == 4 else INET6, 64, flags, 0, 3)
    for number, data in ((kind, value), *more):
        body += struct.pack("=HH", 4 + len(data), number) + data + bytes(-len(data) % 4)
    return body


def route(kind: int = UNICAST, table: int = MAIN_TABLE, flags: int = 0) -> bytes:
    return struct.pack("=8BI", INET, 24, 0, 0, table, 2, 0, kind, flags)


ONE, TWO = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])
# `ip addr add 192.0.2.1/24 dev lo` as Linux 6.18 (little-endian) reports it: the address, its
# local route, its subnet's; and `ip route add 198.51.100.0/24 dev lo`.
RECORDED = [
    "4c000000140000008681036bfe5900000218800001000000"
    "08000100c000020108000200c0000201070003006c6f00000800080080000000"
    "14000600ffffffffffffffff6a1935006a193500",
    "3c00000018000006000000000000000002200000ff02fe0200000000"
    "08000f00ff00000008000100c000020108000700c00002010800040001000000",
    "34000000180000068681036b005a000002180000fe03fd0100000000"
    "08000f00fe00000008000100c63364000800040001000000",
]


@pytest.mark.skipif(sys.byteorder != "little", reason="recorded on a little-endian machine")
def test_recorded_bytes() -> None:
    seen: netlink.Seen = {}
    new, local, ordinary = map(bytes.fromhex, RECORDED)
    assert is_change(new, seen)
    assert seen == {(1, INET, ONE): True}
    assert not is_change(new + local, seen)
    assert is_change(new + local + ordinary, seen)


def test_an_address_is_new_once_until_it_goes() -> None:
    seen: netlink.Seen = {}
    new, gone = message(NEWADDR, address(ONE)), message(DELADDR, address(ONE))
    assert is_change(new, seen)
    assert not is_change(new, seen)
    assert not is_change(message(NEWADDR, address(ONE, (IFA_CACHEINFO, bytes(16)))), seen)
    assert is_change(message(NEWADDR, address(TWO)), seen)
    assert is_change(gone, seen)
    assert is_change(new, seen)


def test_an_address_of_the_other_end_isn_t_ours() -> None:
    for more, kind in (((IFA_LOCAL, ONE), IFA_ADDRESS), ((IFA_ADDRESS, TWO), IFA_LOCAL)):
        seen: netlink.Seen = {}
        value = TWO if kind == IFA_ADDRESS else ONE
        assert is_change(message(NEWADDR, address(value, more, kind=kind)), seen)
        assert seen == {(3, INET, ONE): True}


def test_an_address_counts_once_it_can_be_used() -> None:
    seen: netlink.Seen = {}
    assert not is_change(message(NEWADDR, address(bytes(16), flags=0x80 | TENTATIVE)), seen)
    assert is_change(message(NEWADDR, address(bytes(16))), seen)


def test_what_answers_the_request_is_remembered_but_no_change() -> None:
    seen: netlink.Seen = {}
    listed = [message(NEWADDR, address(value), MULTI) for value in (ONE, TWO)]
    assert not is_change(b"".join(listed), seen)
    assert len(seen) == 2
    assert not is_change(message(NEWADDR, address(TWO)), seen)


def test_what_is_remembered_is_bounded() -> None:
    seen: netlink.Seen = {}
    for number in range(2 * SEEN_LIMIT + 10):
        assert is_change(message(NEWADDR, address(struct.pack(">I", number))), seen)
        assert len(seen) <= SEEN_LIMIT


@pytest.mark.parametrize("kind", [NEWROUTE, DELROUTE])
def test_which_routes_matter(kind: int) -> None:
    assert is_change(message(kind, route()), {})
    assert is_change(message(kind, route(BLACKHOLE)), {})
    assert not is_change(message(kind, route(table=LOCAL_TABLE)), {})
    assert not is_change(message(kind, route(flags=CLONED)), {})
    for local in (LOCAL, BROADCAST, ANYCAST, MULTICAST):
        assert not is_change(message(kind, route(local)), {})


def test_a_link_counts_when_it_goes_up_or_down() -> None:
    seen: netlink.Seen = {}

    def link(flags: int) -> bytes:
        return message(16, struct.pack("=4xiII", 3, flags, 0))

    up, changed, down = link(0x11043), link(0x11143), link(0x1003)
    told = [is_change(data, seen) for data in (up, changed, down, down, up, changed)]
    assert told == [True, False, True, False, True, False]


def test_other_messages_are_passed_over() -> None:
    other = message(16, b"a link's") + message(3, bytes(4)) + message(2, bytes(17))
    assert not is_change(other, {})
    assert is_change(other + message(DELROUTE, route()), {})


def test_what_is_cut_short_is_ignored() -> None:
    for whole in (message(NEWADDR, address(ONE)), message(NEWROUTE, route())):
        for size in range(len(whole)):
            assert not is_change(whole[:size], {})
        assert is_change(whole + b"\1", {})
    long = message(NEWADDR, address(ONE, (IFA_CACHEINFO, bytes(16))))
    assert not is_change(message(3, bytes(4)) + long[:-1], {})
    for body in (address(ONE)[:-1], address(b""), address(bytes(5)), route()[:-1], b""):
        for kind in (NEWADDR, DELADDR, NEWROUTE) if len(body) < 12 else (NEWADDR, DELADDR):
            assert not is_change(message(kind, body), {})


def test_sizes_that_don_t_fit_end_the_reading() -> None:
    behind = message(NEWROUTE, route())
    for size in (*range(16), 17 + len(behind), 2**32 - 1):
        header = struct.pack("=I", size) + message(NEWADDR, b"")[4:]
        assert not is_change(header + behind, {})
    for size in (0, 1, 2, 3, 13, 65535):
        attribute = struct.pack("=HH", size, 77)
        body = struct.pack("=BBBBI", INET, 64, 0, 0, 3) + attribute + struct.pack("=HH", 8, 1) + ONE
        assert not is_change(message(NEWADDR, body), {})


def patched(data: bytes, at: int, value: int) -> bytes:
    """Return `data` with a size, or anything else, overwritten."""
    at %= len(data)
    return data[:at] + bytes([value]) + data[at + 1 :]


messages = st.builds(
    message,
    st.integers(0, 30) | st.integers(0, 65535),
    st.binary(max_size=80)
    | st.builds(address, st.binary(max_size=20), st.tuples(st.integers(0, 65535), st.binary())),
    st.integers(0, 65535),
)


patches = st.builds(patched, messages, st.integers(0, 200), st.integers(0, 255))


@given(st.binary() | st.lists(messages | patches | st.binary(max_size=20)).map(b"".join))
def test_any_bytes_give_a_bool_and_raise_nothing(data: bytes) -> None:
    seen: netlink.Seen = {}
    assert is_change(data, seen) in (True, False)
    assert all(len(value) in ((4, 16) if family else (0, 4, 16)) for _, family, value in seen)


# --- addresses that are gone ----------------------------------------------------------


def connected(host: str) -> socket.socket:
    """Return a connection from `host`, an IP address, to itself."""
    family, *_, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]

    def attempt() -> socket.socket | None:
        with socket.socket(family) as server, contextlib.ExitStack() as stack:
            try:
                server.bind(place)
                server.listen()
                sock = stack.enter_context(socket.socket(family))
                sock.connect(server.getsockname())
            except OSError:
                return None  # a new address of IPv6 can be used when the kernel gets round to it
            server.accept()[0].close()
            stack.pop_all()
            return sock

    sock = wait_until(attempt)
    assert isinstance(sock, socket.socket)
    return sock


def test_an_address_of_ipv4_that_is_gone(namespace: None) -> None:
    ip("addr add 192.0.2.1/32 dev lo")
    with connected("192.0.2.1") as sock:
        assert not local_address_is_gone(sock)
        ip("addr del 192.0.2.1/32 dev lo")
        assert local_address_is_gone(sock)
        ip("addr add 192.0.2.1/32 dev lo")
        assert not local_address_is_gone(sock)


def test_an_address_of_ipv6_that_is_gone(namespace: None) -> None:
    ip("addr add 2001:db8::1/128 dev lo nodad")  # else it can't be used at once
    with connected("2001:db8::1") as sock:
        assert not local_address_is_gone(sock)
        ip("addr del 2001:db8::1/128 dev lo")
        assert local_address_is_gone(sock)


def test_an_address_of_ipv4_on_a_socket_of_ipv6_that_is_gone(namespace: None) -> None:
    ip("addr add 192.0.2.1/32 dev lo")
    with socket.create_server(("192.0.2.1", 0)) as server, socket.socket(socket.AF_INET6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.connect(("::ffff:192.0.2.1", server.getsockname()[1]))
        server.accept()[0].close()
        assert sock.getsockname()[0] == "::ffff:192.0.2.1"
        assert not local_address_is_gone(sock)
        ip("addr del 192.0.2.1/32 dev lo")
        assert local_address_is_gone(sock)


def test_an_address_with_a_scope_belongs_to_its_interface(namespace: None) -> None:
    ip("link add d0 type veth peer name d1", "link set d0 up", "link set d1 up")
    ip("addr add fe80::9/64 dev d0 nodad", "addr add fe80::9/64 dev d1 nodad")
    with connected("fe80::9%d0") as sock, connected("fe80::9%d0") as other:
        assert sock.getsockname()[3] == socket.if_nametoindex("d0")
        assert not local_address_is_gone(sock)
        ip("addr del fe80::9/64 dev d0")
        assert local_address_is_gone(sock)
        ip("addr add fe80::9/64 dev d0 nodad")
        assert not local_address_is_gone(sock)
        ip("link del d0")
        assert local_address_is_gone(other)


def test_what_has_no_address_isn_t_gone() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert not local_address_is_gone(left)
    with socket.socket() as sock:
        assert not local_address_is_gone(sock)  # not connected: no address yet
    assert not local_address_is_gone(sock)  # closed
    with connected("127.0.0.1") as sock:
        assert not local_address_is_gone(sock)
