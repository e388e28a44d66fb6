"""Opening sockets."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from snitun_sync.net import dialing as dialing_module
from snitun_sync.net.dialing import blocking_dial
from snitun_sync.net.listening import listen
from snitun_sync.net.sockets import (
    host_text,
    limit_unsent,
    pack_ip,
    path_rate,
    unpack_ip,
)
from snitun_sync.protocol.names import Address


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_connect_to_what_listens(host: str) -> None:
    sockets = listen(Address(host, 0))
    port = sockets[0].getsockname()[1]
    with blocking_dial(Address(host, port), 5) as sock:
        assert not sock.getblocking()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        limit_unsent(sock, 4096)
        assert len(path_rate(sock)) == 2
    for sock in sockets:
        sock.close()


def test_an_address_that_the_system_can_t_use_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = listener.getsockname()
        places = [(12345, place), (socket.AF_INET, place)]
        monkeypatch.setattr(dialing_module, "blocking_resolve", lambda address: places)
        blocking_dial(Address("both.example", place[1]), 5).close()
        places.pop()
        with pytest.raises(OSError, match="family"):
            blocking_dial(Address("both.example", place[1]), 5)


def test_connect_to_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "service.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with blocking_dial(Address(path=path), 5) as sock:
            assert not sock.getblocking()
    with pytest.raises(OSError, match="refused"):
        blocking_dial(Address(path=path), 5)


def test_all_addresses_of_the_machine_on_one_port() -> None:
    sockets = listen(Address("", 0))
    port = sockets[0].getsockname()[1]
    assert {sock.family for sock in sockets} == {socket.AF_INET, socket.AF_INET6}
    assert {sock.getsockname()[1] for sock in sockets} == {port}
    for host in ("127.0.0.1", "::1"):
        socket.create_connection((host, port)).close()
    for sock in sockets:
        sock.close()


def test_a_busy_port_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(OSError, match="in use"):
        listen(Address("127.0.0.1", busy.getsockname()[1]))


def test_the_rate_of_a_path_and_what_it_holds() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listener.getsockname()) as sock, listener.accept()[0] as other:
        for _ in range(200):
            sock.sendall(bytes(60_000))
            taken = 0
            while taken < 60_000:
                taken += len(other.recv(65536))
        rate, path_bytes = path_rate(sock)
        assert rate > 2**20
        assert 0 < path_bytes < 100 * 2**20
    listener.close()


def test_addresses_as_text_and_packed() -> None:
    assert host_text("192.0.2.1", 80) == "192.0.2.1:80"
    assert host_text("2001:db8::1", 80) == "[2001:db8::1]:80"
    for text in ("192.0.2.1", "2001:db8::1"):
        assert unpack_ip(pack_ip(text)) == text
    assert pack_ip("fe80::1%eth0") == pack_ip("fe80::1")
