"""PROXY headers: byte for byte, as another implementation reads them, and within their limits."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.result import ProxyResultIPv4, ProxyResultIPv6, ProxyResultLocal
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from snitun_sync.errors import MisuseError, ViolationError
from snitun_sync.protocol.proxy_protocol import read_header, version_1, version_2

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


UNKNOWN = [bytes(4), bytes(16), packed("::ffff:0.0.0.0")]
# Addresses with runs of zeros, too.
GROUPS = st.lists(st.sampled_from([0, 0, 0, 1, 0xDB8, 0xFFFF]), min_size=8, max_size=8)
DEVICES = st.one_of(
    st.binary(min_size=4, max_size=4),
    st.binary(min_size=16, max_size=16),
    GROUPS.map(lambda groups: b"".join(group.to_bytes(2, "big") for group in groups)),
    st.binary(min_size=4, max_size=4).map(lambda ip: bytes(10) + b"\xff\xff" + ip),
).filter(lambda device: device not in UNKNOWN)
LABEL = st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,20}[a-z0-9_])?", fullmatch=True)


def ip(device: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(device)
    return getattr(address, "ipv4_mapped", None) or address


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("203.0.113.7", b"PROXY TCP4 203.0.113.7 0.0.0.0 0 443\r\n"),
        ("::ffff:203.0.113.7", b"PROXY TCP4 203.0.113.7 0.0.0.0 0 443\r\n"),
        ("2001:db8::1", b"PROXY TCP6 2001:db8::1 :: 0 443\r\n"),
        ("::1", b"PROXY TCP6 ::1 :: 0 443\r\n"),
        ("2001:db8::", b"PROXY TCP6 2001:db8:: :: 0 443\r\n"),
        ("1:0:0:2::3", b"PROXY TCP6 1:0:0:2::3 :: 0 443\r\n"),
        ("1:0:2:3:4:5:6:7", b"PROXY TCP6 1:0:2:3:4:5:6:7 :: 0 443\r\n"),
        ("0.0.0.0", b"PROXY UNKNOWN\r\n"),
        ("::", b"PROXY UNKNOWN\r\n"),
        ("::ffff:0.0.0.0", b"PROXY UNKNOWN\r\n"),
    ],
)
def test_version_1_byte_for_byte(device: str, line: bytes) -> None:
    assert version_1(packed(device)) == line


@given(DEVICES)
def test_version_1_as_another_implementation_reads_it(device: bytes) -> None:
    line, address = version_1(device), ip(device)
    result = ProxyProtocolV1().unpack(line)
    assert isinstance(result, ProxyResultIPv4 if address.version == 4 else ProxyResultIPv6)
    assert result.source == (address, 0)
    assert result.dest == (type(address)(0), 443)
    assert line.split()[2].decode() == str(address)
    assert len(line) <= 107


def test_version_2_byte_for_byte() -> None:
    assert version_2(packed("203.0.113.7")) == SIGNATURE + bytes.fromhex(
        "21 11 000c  cb007107 00000000 0000 01bb"
    )
    assert version_2(packed("::ffff:203.0.113.7")) == version_2(packed("203.0.113.7"))
    assert version_2(packed("203.0.113.7"), port=0xABCD)[-4:] == bytes.fromhex("abcd 01bb")
    header = version_2(
        packed("2001:db8::1"),
        authority="a.example",
        alpn=b"h2",
        unique_id=b"\x01\x02",
        tls_version="TLSv1.3",
        tls_cipher="TLS_AES_128_GCM_SHA256",
    )
    assert header == (
        SIGNATURE
        + bytes.fromhex("21 21 0065  20010db8000000000000000000000001")
        + bytes.fromhex("00000000000000000000000000000000 0000 01bb")
        + bytes.fromhex("01 0002 6832")
        + (bytes.fromhex("02 0009") + b"a.example")
        + bytes.fromhex("05 0002 0102")
        + bytes.fromhex("20 0028 01 00000001")
        + (bytes.fromhex("21 0007") + b"TLSv1.3")
        + (bytes.fromhex("23 0016") + b"TLS_AES_128_GCM_SHA256")
    )


@pytest.mark.parametrize("device", UNKNOWN)
def test_version_2_of_an_unknown_address_tells_nothing(device: bytes) -> None:
    header = version_2(device, authority="a.example", alpn=b"h2", tls_version="TLSv1.3")
    assert header == SIGNATURE + bytes.fromhex("20 00 0000")
    assert isinstance(ProxyProtocolV2().unpack(header), ProxyResultLocal)


@given(
    device=DEVICES,
    authority=st.lists(LABEL, max_size=5).map(".".join),
    alpn=st.binary(max_size=255),
    unique_id=st.binary(max_size=128),
    tls_version=st.sampled_from(["", "TLSv1.2", "TLSv1.3"]),
    tls_cipher=st.sampled_from(["", "ECDHE-RSA-AES128-GCM-SHA256"]),
)
def test_version_2_as_another_implementation_reads_it(
    device: bytes, authority: str, alpn: bytes, unique_id: bytes, tls_version: str, tls_cipher: str
) -> None:
    header, address = (
        version_2(
            device,
            authority=authority,
            alpn=alpn,
            unique_id=unique_id,
            tls_version=tls_version,
            tls_cipher=tls_cipher,
        ),
        ip(device),
    )
    result = ProxyProtocolV2().unpack(header)
    assert isinstance(result, ProxyResultIPv4 if address.version == 4 else ProxyResultIPv6)
    assert result.source == (address, 0)
    assert result.dest == (type(address)(0), 443)
    tlv = result.tlv
    assert (tlv.authority or "", tlv.alpn or b"", tlv.unique_id) == (authority, alpn, unique_id)
    assert tlv.ssl.has_ssl is bool(tls_version)
    assert not tlv.ssl.verified
    assert not tlv.ssl.has_cert_conn
    assert tlv.ssl.version == (tls_version or None)
    assert tlv.ssl.cipher == ((tls_version and tls_cipher) or None)


def test_limits() -> None:
    device = packed("2001:db8::1")
    name = ".".join(["a" * 63] * 3 + ["b" * 61])
    assert len(name) == 253
    # nginx takes 4,096 bytes, and a header that fits a segment comes in one piece.
    largest = version_2(
        device,
        authority=name,
        alpn=b"x" * 255,
        unique_id=b"i" * 128,
        tls_version="TLSv1.3",
        tls_cipher="ECDHE-ECDSA-CHACHA20-POLY1305-SHA256",
    )
    assert len(largest) < 1200
    tlv = ProxyProtocolV2().unpack(largest).tlv
    assert (tlv.authority, tlv.alpn, tlv.unique_id) == (name, b"x" * 255, b"i" * 128)
    with pytest.raises(MisuseError, match="0x05 of 129 bytes, at most 128"):
        version_2(device, unique_id=b"i" * 129)
    with pytest.raises(MisuseError, match="0x01 of 256 bytes, at most 255"):
        version_2(device, alpn=b"x" * 256)


@pytest.mark.parametrize("name", ["a" * 254, "a" * 60000, "a\r\nb", "-", "a..b", "\0"])
def test_what_a_device_makes_up_as_a_name_is_left_out(name: str) -> None:
    device = packed("203.0.113.7")
    assert version_2(device, authority=name) == version_2(device)


# --- reading ----------------------------------------------------------------------------


def read_in_pieces(header: bytes) -> tuple[int, bytes, int]:
    """Read a header whole, byte by byte, and with bytes after it: always the same."""
    for size in range(len(header)):
        assert read_header(header[:size]) is None
    result = read_header(header)
    assert result is not None
    assert read_header(header + b"\x16\x03") == read_header(bytearray(header)) == result
    return result


@given(DEVICES, st.integers(0, 65535))
def test_what_is_written_is_read(device: bytes, port: int) -> None:
    address = ip(device).packed
    assert read_in_pieces(version_1(device)) == (len(version_1(device)), address, 0)
    header = version_2(device, port=port, authority="a.example", alpn=b"h2", tls_version="TLSv1.3")
    assert read_in_pieces(header) == (len(header), address, port)


@given(
    st.one_of(
        st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)),
        st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6)),
    ),
    st.integers(0, 65535),
    st.integers(1, 65535),
)
def test_what_another_implementation_writes_is_read(
    ips: tuple[ipaddress.IPv4Address, ipaddress.IPv4Address], port: int, to_port: int
) -> None:
    source, target = (ips[0], port), (ips[1], to_port)
    kind = ProxyResultIPv4 if ips[0].version == 4 else ProxyResultIPv6
    mapped = getattr(ips[0], "ipv4_mapped", None)
    address = (mapped or ips[0]).packed if (mapped or ips[0]) != type(mapped or ips[0])(0) else b""
    for protocol in (ProxyProtocolV1(), ProxyProtocolV2()):
        header = protocol.pack(kind(source, target, protocol=socket.SOCK_STREAM))
        assert read_in_pieces(header) == (len(header), address, port)


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN ffff:f:: ::1 65535 65535\r\n",
        SIGNATURE + bytes.fromhex("20 00 0000"),
        SIGNATURE + bytes.fromhex("20 11 000c 7f000001 7f000001 0001 0002"),
        SIGNATURE + bytes.fromhex("21 00 0000"),
        SIGNATURE + bytes.fromhex("21 12 000c 7f000001 7f000001 0001 0002"),  # UDP
        SIGNATURE + bytes.fromhex("21 31 00d8") + bytes(216),  # a unix socket
        SIGNATURE + bytes.fromhex("21 11 000c") + bytes(12),
    ],
)
def test_headers_without_a_source(header: bytes) -> None:
    assert read_in_pieces(header) == (len(header), b"", 0)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01",
        b"\r\n\r\n\r\n",
        b"PROXY\r\n",
        b"proxy UNKNOWN\r\n",
        b"PROXY UNKNOWNX\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n",
        b"PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 65536\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n",
        b"PROXY TCP4 192.0.2.256 192.0.2.2 1 2\r\n",
        b"PROXY TCP4 ::1 ::2 1 2\r\n",
        b"PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY TCP6 ::1%1 ::2 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n" + b"x" * 107,
        b"PROXY UNKNOWN " + b"x" * 93,
        SIGNATURE + bytes.fromhex("11 11 000c") + bytes(12),
        SIGNATURE + bytes.fromhex("22 11 000c") + bytes(12),
        SIGNATURE + bytes.fromhex("21 41 000c") + bytes(12),
        SIGNATURE + bytes.fromhex("21 13 000c") + bytes(12),
        SIGNATURE + bytes.fromhex("21 11 000b") + bytes(11),
        SIGNATURE + bytes.fromhex("21 21 0023") + bytes(35),
        SIGNATURE + bytes.fromhex("21 11 1001"),
    ],
)
def test_what_is_no_header(data: bytes) -> None:
    with pytest.raises(ViolationError, match="PROXY"):
        read_header(data)


@given(
    st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"!\x11"]), st.binary()
)
def test_any_bytes_are_a_header_or_none(start: bytes, rest: bytes) -> None:
    """It is read, isn't whole, or raises a ViolationError; nothing else."""
    try:
        result = read_header(start + rest)
    except ViolationError:
        return
    assert result is None or result[0] <= len(start + rest)
