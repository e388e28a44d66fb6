"""Access lists: who is let in, as the standard library's `ipaddress` sees it, and what is wrong."""

from __future__ import annotations

import ipaddress
import tracemalloc
from pathlib import Path
from typing import Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snitun_sync.client.access import MAX_LINE, Access, read_networks
from snitun_sync.errors import ConfigurationError, UnreadableError, UsageError

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def access(allow: str = "", block: str = "") -> Access:
    """Return an Access with lists of networks in one text."""
    return Access(
        read_networks(allow.split(), "", "--allow"), read_networks(block.split(), "", "--block")
    )


def test_without_any_there_is_no_list() -> None:
    assert read_networks((), "", "--allow") is None


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("198.51.100.1", ""),
        ("198.51.100.191", ""),
        ("198.51.101.0", "not in --allow"),
        ("198.51.99.255", "not in --allow"),
        ("198.51.100.7", "in --block 198.51.100.7/32"),  # goes before --allow
        ("198.51.100.200", "in --block 198.51.100.192/26"),
        ("203.0.113.9", ""),
        ("203.0.113.8", "not in --allow"),
        ("2001:db8:7::1", ""),
        ("2001:db8:7:ffff::", "in --block 2001:db8:7:ffff::/64"),
        ("2001:db9::", "not in --allow"),
        # Mapped into IPv6, it is the same address.
        ("::ffff:198.51.100.1", ""),
        ("::ffff:198.51.100.7", "in --block 198.51.100.7/32"),
        ("::ffff:192.0.2.1", "not in --allow"),
        # The wire has no place for it, or the relay doesn't know.
        ("0.0.0.0", "its address is unknown"),
        ("::", "its address is unknown"),
        ("::ffff:0.0.0.0", "its address is unknown"),
    ],
)
def test_who_is_let_in(device: str, why: str) -> None:
    lists = access(
        allow="2001:db8::/32 203.0.113.9 198.51.100.0/24",
        block="198.51.100.7 198.51.100.192/26 2001:db8:7:ffff::/64",
    )
    assert lists.refusal(packed(device)) == why


def test_one_list_alone() -> None:
    some, other, unknown = packed("203.0.113.7"), packed("2001:db8::1"), bytes(4)
    only_block = access(block="203.0.113.0/24")
    assert only_block.refusal(some) == "in --block 203.0.113.0/24"
    assert only_block.refusal(other) == ""
    assert only_block.refusal(unknown) == "its address is unknown"
    only_allow = access(allow="203.0.113.0/24")
    assert only_allow.refusal(some) == ""
    assert only_allow.refusal(other) == "not in --allow"
    assert only_allow.refusal(unknown) == "its address is unknown"


def test_all_of_a_family() -> None:
    some, other = packed("203.0.113.7"), packed("2001:db8::1")
    assert access(allow="0.0.0.0/0").refusal(some) == ""
    assert access(allow="0.0.0.0/0").refusal(other) == "not in --allow"
    assert access(block="::/0").refusal(some) == ""
    assert access(block="::/0").refusal(other) == "in --block ::/0"
    assert access(block="::ffff:0:0/96").refusal(some) == "in --block 0.0.0.0/0"


def test_networks_mapped_into_ipv6_are_those_of_ipv4() -> None:
    lists = access(block="::ffff:203.0.113.0/120")
    for text in ("203.0.113.7", "::ffff:203.0.113.7"):
        assert lists.refusal(packed(text)) == "in --block 203.0.113.0/24"
    assert lists.refusal(packed("203.0.112.255")) == ""


def network(address: bytes, length: int) -> Network:
    return ipaddress.ip_network((address, length % (8 * len(address) + 1)), strict=False)


# Few different ones, so that some are within others, beside them, or the same.
ADDRESSES = st.one_of(
    st.lists(st.sampled_from([0, 1, 127, 128, 255]), min_size=4, max_size=4).map(bytes),
    st.lists(st.sampled_from([0, 1, 255]), min_size=16, max_size=16).map(bytes),
    st.binary(min_size=4, max_size=4),
    st.binary(min_size=16, max_size=16),
).filter(lambda address: any(address) and address[:12] != bytes(10) + b"\xff\xff")
NETWORKS = st.lists(st.builds(network, ADDRESSES, st.integers(0, 128)), max_size=12)


@given(NETWORKS, NETWORKS, st.lists(ADDRESSES, max_size=5))
def test_same_verdict_as_a_scan_with_ipaddress(
    allow: list[Network], block: list[Network], addresses: list[bytes]
) -> None:
    lists = access(" ".join(map(str, allow)), " ".join(map(str, block)))
    edges = [edge for net in allow + block for edge in (net[0], net[-1])]
    around = [
        type(edge)(int(edge) + step)
        for edge in edges
        for step in (-1, 0, 1)
        if 0 < int(edge) + step < 2**edge.max_prefixlen
    ]
    for ip in [*map(ipaddress.ip_address, addresses), *around]:
        if getattr(ip, "ipv4_mapped", None):
            continue
        blocking = [net for net in block if ip in net]
        allowing = [net for net in allow if ip in net]
        why = lists.refusal(ip.packed)
        if blocking:
            assert why == f"in --block {min(blocking, key=lambda net: net.prefixlen)}"
        else:
            assert why == ("not in --allow" if allow and not allowing else "")


WRONG = [
    ("10.0.0.1/8", "has bits set behind the first 8; expected the network 10.0.0.0/8, or the "
     "address 10.0.0.1"),
    ("2001:db8::1/32", "expected the network 2001:db8::/32, or the address 2001:db8::1"),
    ("::ffff:203.0.113.7/120", "expected the network ::ffff:203.0.113.0/120, or the address"),
    ("example.com", "'example.com'; expected an address, or a network such as 203.0.113.0/24"),
    ("10.0.0", "expected an address"),
    ("010.0.0.1", "expected an address"),
    ("10.0.0.0-10.0.0.9", "expected an address"),
    ("[2001:db8::1]", "expected an address"),
    ("fe80::1%eth0", "expected an address"),
    ("10.0.0.0/8 192.168.0.0/16", "prefix length '8 192.168.0.0/16', not a number from 0 to 32"),
    ("10.0.0.0/33", "'10.0.0.0/33': prefix length '33', not a number from 0 to 32"),
    ("2001:db8::/129", "prefix length '129', not a number from 0 to 128"),
    ("10.0.0.0/", "prefix length '', not"),
    ("10.0.0.0/-1", "prefix length '-1', not"),
    ("10.0.0.0/255.0.0.0", "prefix length '255.0.0.0', not"),
    ("10.0.0.0/٨", "not a number"),
    ("10.0.0.0/" + "0" * 5000, "5000 characters"),
    ("10.0.0.1\0", "expected an address"),
    ("x" * 5000, "5000 characters; expected an address"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_what_is_no_network(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_networks(["10.0.0.0/8", text], "", "--allow")
    assert str(caught.value).startswith("--allow: ")
    assert said in str(caught.value)
    path = tmp_path / "list"
    path.write_text(f"# mine\n\n10.0.0.0/8\n{text}\n", "utf-8")
    with pytest.raises(ConfigurationError) as caught_too:
        read_networks([], str(path), "--block")
    assert type(caught_too.value) is ConfigurationError
    assert str(caught_too.value).startswith(f"--block-file: {path}: line 4: ")
    assert said in str(caught_too.value)


def test_a_file_and_options_together(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_bytes(
        b"# ours\r\n\r\n 203.0.113.0/24  # the office\r\n2001:db8::/32#all\r\n# \xff\n192.0.2.1"
    )
    lists = Access(read_networks([" 198.51.100.7 "], str(path), "--allow"), None)
    for text in ("203.0.113.7", "2001:db8::1", "192.0.2.1", "198.51.100.7"):
        assert lists.refusal(packed(text)) == ""
    assert lists.refusal(packed("198.51.100.8")) == "not in --allow"


def test_an_empty_list_is_a_list(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("# nobody\n")
    networks = read_networks([], str(path), "--allow")
    assert networks is not None
    assert Access(networks, None).refusal(packed("203.0.113.7")) == "not in --allow"
    assert Access(None, networks).refusal(packed("203.0.113.7")) == ""


def test_files_that_can_t_be_read(tmp_path: Path) -> None:
    for path, said in (
        (str(tmp_path / "none"), "No such file or directory"),
        (str(tmp_path), "Is a directory"),
        ("a\0b", "embedded null byte"),
    ):
        with pytest.raises(UnreadableError) as caught:
            read_networks([], path, "--allow")
        assert str(caught.value) == f"--allow-file: can't read {path}: {said}"


def test_no_line_takes_all_memory(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"line 1: {MAX_LINE} characters; expected"):
        read_networks([], "/dev/zero", "--block")
    path = tmp_path / "list"
    path.write_text("#" * (MAX_LINE - 1) + "\n10.0.0.1/8\n")
    with pytest.raises(ConfigurationError, match="line 2: "):
        read_networks([], str(path), "--block")


def test_long_lists_take_little_memory(tmp_path: Path) -> None:
    path, count = tmp_path / "list", 10_000
    path.write_text(
        "".join(f"10.{n >> 8}.{n & 255}.0/24\n2001:db8:{n:x}::/48\n" for n in range(count))
    )
    read_networks([], str(path), "--block")  # what is loaded by the first one stays
    tracemalloc.start()
    try:
        networks = read_networks([], str(path), "--block")
        assert tracemalloc.get_traced_memory()[0] < count * (5 + 17) * 1.5
    finally:
        tracemalloc.stop()
    assert networks is not None
    assert networks.find(packed("10.39.15.7")) == "10.39.15.0/24"
    assert networks.find(packed("2001:db8:270f::1")) == "2001:db8:270f::/48"
    assert networks.find(packed("10.39.16.0")) == networks.find(packed("2001:db8:2710::")) == ""
