"""Hostnames and addresses as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snitun_sync.errors import ConfigurationError
from snitun_sync.protocol.names import (
    Address,
    is_hostname,
    known_ip,
    normal_hostname,
    parse_address,
)


def test_normal_form() -> None:
    assert normal_hostname("Home.EXAMPLE.com.") == "home.example.com"
    assert normal_hostname("home.example.com") == "home.example.com"
    assert normal_hostname("home..") == "home."


def test_an_address_that_is_known() -> None:
    ipv4, ipv6 = bytes([203, 0, 113, 7]), bytes.fromhex("20010db8000000000000000000000001")
    mapped = bytes.fromhex("00000000000000000000ffff")
    assert [known_ip(ip) for ip in (ipv4, mapped + ipv4, ipv6)] == [ipv4, ipv4, ipv6]
    assert {known_ip(ip) for ip in (bytes(4), bytes(16), mapped + bytes(4))} == {b""}


@pytest.mark.parametrize(
    "name",
    ["localhost", "a.b", "xn--bcher-kva.example", "_acme.example", "1.2.3.4", "a" * 63 + ".de"],
)
def test_hostnames(name: str) -> None:
    assert is_hostname(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "a..b", ".a", "a.", "A.b", "a b", "bücher.de", "-a.de", "a-.de", "a" * 64),
        *("a/b", "a." * 126 + "aa", "*.example.com", "a\0b"),
    ],
)
def test_no_hostnames(name: str) -> None:
    assert not is_hostname(name)


@pytest.mark.parametrize(
    ("text", "options", "shown"),
    [
        ("relay.example.com:8443", {}, "relay.example.com:8443"),
        ("relay.example.com", {"default_port": 443}, "relay.example.com:443"),
        ("127.0.0.1:1", {}, "127.0.0.1:1"),
        ("[::1]:443", {}, "[::1]:443"),
        ("[fe80::1%eth0]", {"default_port": 443}, "[fe80::1%eth0]:443"),
        ("unix:/run/service.sock", {"can_be_unix": True}, "unix:/run/service.sock"),
        ("*:443", {"can_be_any": True}, "*:443"),
        (":443", {"can_be_any": True}, "*:443"),
        ("[::]:0", {"can_be_any": True}, "[::]:0"),
    ],
)
def test_addresses(text: str, options: dict[str, object], shown: str) -> None:
    assert str(parse_address(text, "--x", **options)) == shown  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no host"),
        ("host", "no port"),
        ("host:", "port ''"),
        ("host:0", "port '0', not a number from 1 to 65535"),
        ("host:65536", "port '65536'"),
        ("host:٣", "port '٣'"),
        ("host:1e3", "port '1e3'"),
        ("::1:443", "an IPv6 address without brackets"),
        ("[::1", "no IPv6 address in brackets"),
        ("[::1]443", "no IPv6 address in brackets"),
        ("[host]:443", "no IPv6 address in brackets"),
        ("[::1]", "no port"),
        (":443", "no host"),
        ("two words:443", "no host name"),
        ("https://host:443", "a URL"),
        ("http://[::1]:80", "a URL"),
        ("[::g]:443", "no IPv6 address in brackets"),
        ("user@host:443", "no host name"),
        ("unix:/run/x", "a unix socket"),
    ],
)
def test_malformed_addresses(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--endpoint: ") as raised:
        parse_address(text, "--endpoint")
    assert said in str(raised.value)
    assert "expected HOST:PORT" in str(raised.value)


def test_unix_paths_are_absolute() -> None:
    with pytest.raises(ConfigurationError, match="no absolute path"):
        parse_address("unix:service.sock", "--endpoint", can_be_unix=True)


@given(st.text(max_size=30), st.booleans())
def test_fuzz_parses_or_raises_configuration_error(text: str, flag: bool) -> None:
    try:
        address = parse_address(text, "x", can_be_unix=flag, can_be_any=not flag)
    except ConfigurationError:
        return
    assert isinstance(address, Address)
