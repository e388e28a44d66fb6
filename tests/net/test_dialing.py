"""Reaching the relay: by the first of its addresses that answers, and by no other."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from snitun_sync.net import dialing
from snitun_sync.net.dialing import blocking_dial
from snitun_sync.protocol.names import Address
from tests.support import WAIT_S, HungEndpoint, wait_until

if TYPE_CHECKING:
    from snitun_sync.net.sockets import Place

NAME = Address("both.example", 1)
NEVER_S = 3600.0
SYN_SENT = "02"  # linux/net/tcp_states.h


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    wait_until(lambda: sorted(os.listdir("/proc/self/fd")) == before, "all descriptors are closed")


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    """What NAME is resolved to."""
    found: list[Place] = []
    monkeypatch.setattr(dialing, "blocking_resolve", lambda address: found)
    return found


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The places to which an attempt was started."""
    seen: list[Any] = []
    start = dialing._start

    def noted(family: int, place: object) -> socket.socket:
        seen.append(place)
        return start(family, place)

    monkeypatch.setattr(dialing, "_start", noted)
    return seen


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def hung() -> Iterator[HungEndpoint]:
    with HungEndpoint() as endpoint:
        yield endpoint


@contextlib.contextmanager
def refusing() -> Iterator[Place]:
    """A place where nothing listens, and nothing else will."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield socket.AF_INET, sock.getsockname()


def place_of(endpoint: HungEndpoint) -> Place:
    return socket.AF_INET, ("127.0.0.1", endpoint.port)


def is_waiting_for(port: int) -> bool:
    """Tell whether a socket of this machine has sent a SYN to `port`, in vain so far."""
    lines = Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]
    return any(
        fields[2].endswith(f":{port:04X}") and fields[3] == SYN_SENT
        for fields in (line.split() for line in lines)
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_socket_is_connected_and_tuned(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server(
        ("::1" if ":" in host else "127.0.0.1", 0), family=family
    ) as listener:
        place = listener.getsockname()
        with blocking_dial(Address(host, place[1]), WAIT_S) as sock:
            assert sock.getpeername() == place
            assert not sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_name_without_an_address() -> None:
    with pytest.raises(socket.gaierror) as caught:
        blocking_dial(Address("no-such-name.invalid", 1), WAIT_S)
    assert "tried" not in str(caught.value)


# A kernel gives up after two minutes: without a race these two would take as long.
@pytest.mark.timeout(60)
def test_a_black_hole_doesn_t_hold_up_the_next_address(
    places: list[Place], starts: list[Any], hung: HungEndpoint, listener: socket.socket
) -> None:
    places += [place_of(hung), (socket.AF_INET, listener.getsockname())]
    with blocking_dial(NAME, NEVER_S) as sock:
        assert sock.getpeername() == listener.getsockname()
    assert starts == [place for _, place in places]
    assert not is_waiting_for(hung.port)


@pytest.mark.timeout(60)
def test_a_slow_first_address_may_still_win(
    places: list[Place], starts: list[Any], hung: HungEndpoint
) -> None:
    with HungEndpoint() as other, refusing() as refused:
        places += [place_of(hung), place_of(other), refused]

        def release() -> None:
            wait_until(lambda: len(starts) == 3 and is_waiting_for(other.port))
            hung.release()

        thread = threading.Thread(target=release)
        thread.start()
        with blocking_dial(NAME, NEVER_S) as sock:
            assert sock.getpeername() == hung.listener.getsockname()
        thread.join()
        assert not is_waiting_for(other.port)


def test_the_first_address_that_connects_ends_it(
    places: list[Place], starts: list[Any], listener: socket.socket
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        places += [(socket.AF_INET, sock.getsockname()) for sock in (listener, other)]
        blocking_dial(NAME, WAIT_S).close()
    assert starts == [listener.getsockname()]


@pytest.mark.timeout(60)
def test_after_a_failure_the_next_address_is_tried_at_once(
    places: list[Place], listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialing, "ATTEMPT_DELAY_S", NEVER_S)
    with refusing() as refused:
        # The first can't even begin, the second is refused.
        places += [(12345, None), refused, (socket.AF_INET, listener.getsockname())]
        with blocking_dial(NAME, WAIT_S) as sock:
            assert sock.getpeername() == listener.getsockname()


@pytest.mark.timeout(60)
def test_one_failure_among_attempts_that_hang(
    places: list[Place], hung: HungEndpoint, listener: socket.socket
) -> None:
    with refusing() as refused:
        places += [place_of(hung), refused, (socket.AF_INET, listener.getsockname())]
        with blocking_dial(NAME, NEVER_S) as sock:
            assert sock.getpeername() == listener.getsockname()


def test_all_addresses_refuse(places: list[Place]) -> None:
    with refusing() as first, refusing() as second:
        places += [first, second]
        with pytest.raises(ConnectionRefusedError) as caught:
            blocking_dial(NAME, WAIT_S)
        assert caught.value.strerror == "Connection refused (2 addresses tried)"
        places.pop()
        with pytest.raises(ConnectionRefusedError) as caught:
            blocking_dial(NAME, WAIT_S)
        assert caught.value.strerror == "Connection refused"


def test_what_only_this_machine_lacks_is_not_the_reason(places: list[Place]) -> None:
    with refusing() as refused:
        places += [refused, (12345, None)]
        with pytest.raises(ConnectionRefusedError, match="2 addresses tried"):
            blocking_dial(NAME, WAIT_S)
    places[:] = [(12345, None)]
    with pytest.raises(OSError, match="family") as caught:
        blocking_dial(NAME, WAIT_S)
    assert caught.value.errno == errno.EAFNOSUPPORT


@pytest.mark.timeout(60)
def test_black_holes_only(places: list[Place], starts: list[Any], hung: HungEndpoint) -> None:
    with HungEndpoint() as other:
        places += [place_of(hung), place_of(other)]
        with pytest.raises(TimeoutError) as caught:
            blocking_dial(NAME, 0.05)
        assert caught.value.strerror == "Connection timed out (2 addresses tried)"
    assert len(starts) == 2, "the timeout counts from the last attempt's start"


@pytest.mark.timeout(60)
def test_the_time_for_a_proxy_counts_from_the_last_start(
    places: list[Place],
    hung: HungEndpoint,
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places += [place_of(hung), (socket.AF_INET, listener.getsockname())]
    clock = SimpleNamespace(monotonic=itertools.count(1.0).__next__)  # a second for each turn
    monkeypatch.setattr(dialing, "time", clock)
    sock, deadline = dialing._blocking_race(NAME, 100)
    sock.close()
    assert deadline == 2 + 100


def test_an_attempt_that_fails_as_it_begins(places: list[Place], listener: socket.socket) -> None:
    places += [(socket.AF_INET, ("255.255.255.255", 1))]  # TCP has no broadcast
    with pytest.raises(OSError, match=r"denied|unreachable"):
        blocking_dial(NAME, WAIT_S)
    places += [(socket.AF_INET, listener.getsockname())]
    blocking_dial(NAME, WAIT_S).close()


@pytest.mark.timeout(60)
def test_a_name_with_very_many_addresses(
    places: list[Place], starts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialing, "ATTEMPT_DELAY_S", NEVER_S)
    with refusing() as refused:
        places += [refused] * 1000
        with pytest.raises(ConnectionRefusedError, match=r"\(32 addresses tried\)"):
            blocking_dial(NAME, WAIT_S)
    assert len(starts) == dialing.ATTEMPTS


def test_the_families_take_turns() -> None:
    def mixed(text: str) -> str:
        found: list[Place] = [(int(word[0]), word) for word in text.split()]
        return " ".join(word for _, word in dialing._interleaved(found))

    assert mixed("6a 6b 6c 4a") == "6a 4a 6b 6c"
    assert mixed("4a 4b 6a 6b 6c") == "4a 6a 4b 6b 6c"
    assert mixed("4a 4b") == "4a 4b"
    assert mixed("") == ""


@pytest.mark.timeout(60)
def test_no_descriptors_for_another_attempt(
    places: list[Place], hung: HungEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's limit is a failure like others; what was begun is freed."""
    real = socket.socket
    places += [place_of(hung), place_of(hung)]

    def limited(*arguments: Any) -> socket.socket:
        if is_waiting_for(hung.port):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(*arguments)

    monkeypatch.setattr(socket, "socket", limited)
    with pytest.raises(OSError, match="2 addresses tried"):
        blocking_dial(NAME, 0.05)
    assert not is_waiting_for(hung.port)
