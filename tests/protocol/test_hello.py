"""From ClientHello to hostname and protocols: genuine, cut and recut, and malformed ones."""

from __future__ import annotations

import contextlib
import ssl
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snitun_sync.errors import HelloError
from snitun_sync.protocol.hello import MAX_FRAGMENT, MAX_HELLO, HelloReader
from tests.support import client_hello


def vector(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size, "big") + data


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">H", kind) + vector(2, data)


def server_name(name: bytes, kind: int = 0) -> bytes:
    return extension(0, vector(2, bytes([kind]) + vector(2, name)))


def body(extensions: bytes | None, session: bytes = b"s" * 32) -> bytes:
    """Return a ClientHello's body."""
    data = b"\x03\x03" + b"r" * 32 + vector(1, session) + vector(2, b"\x13\x01") + vector(1, b"\0")
    return data if extensions is None else data + vector(2, extensions)


def message(content: bytes) -> bytes:
    return b"\x01" + vector(3, content)


def records(content: bytes, size: int = MAX_FRAGMENT) -> bytes:
    """Return a handshake message in records of at most `size` bytes."""
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    return b"".join(b"\x16\x03\x01" + vector(2, piece) for piece in pieces)


def read(data: bytes) -> str | None:
    return HelloReader().receive(data)


def read_alpn(data: bytes) -> tuple[bytes, ...]:
    reader = HelloReader()
    assert reader.receive(data) is not None
    return reader.alpn()


def alpn(*protocols: bytes) -> bytes:
    return extension(16, vector(2, b"".join(vector(1, name) for name in protocols)))


HELLO = records(message(body(server_name(b"home.example.com"))))


def test_of_this_machine_s_openssl() -> None:
    assert read(client_hello("home.example.com")) == "home.example.com"
    assert read(client_hello(None)) == ""


def test_byte_by_byte_and_what_comes_behind() -> None:
    hello, reader = client_hello(), HelloReader()
    for at in range(len(hello) - 1):
        assert reader.receive(hello[at : at + 1]) is None
    assert reader.receive(hello[-1:] + b"early data") == "device.example.test"
    assert reader.received == hello + b"early data"


def test_out_of_a_buffer_that_others_fill() -> None:
    hello = client_hello()
    buffer = bytearray(hello[:100])
    reader = HelloReader(buffer)
    assert reader.look() is None
    for at in range(100, len(hello)):
        assert reader.look() is None
        buffer.append(hello[at])
    buffer += b"early data"
    assert reader.look() == "device.example.test"
    assert reader.received is buffer
    assert buffer == hello + b"early data"
    empty = bytearray()
    reader = HelloReader(empty)
    empty += b"GET / HTTP/1.1"
    with pytest.raises(HelloError, match="type 71"):
        reader.look()


@given(size=st.integers(1, 2000), cuts=st.lists(st.integers(0, 3000), max_size=5))
def test_in_any_records_and_segments(size: int, cuts: list[int]) -> None:
    hello = records(client_hello()[5:], size)
    reader, edges = HelloReader(), sorted({0, len(hello), *(cut % len(hello) for cut in cuts)})
    answers = [reader.receive(hello[a:b]) for a, b in zip(edges, edges[1:])]
    assert answers == [None] * (len(answers) - 1) + ["device.example.test"]
    assert reader.received == hello


def test_with_a_post_quantum_key_share() -> None:
    # X25519MLKEM768: a share of 1,216 bytes makes the ClientHello larger than a segment.
    share = extension(51, vector(2, struct.pack(">H", 0x11EC) + vector(2, b"k" * 1216)))
    classic = extension(51, vector(2, struct.pack(">H", 0x1D) + vector(2, b"k" * 32)))
    hello = records(message(body(share + classic + server_name(b"pq.example.com"))), 700)
    assert hello.count(b"\x16\x03\x01") > 1
    assert read(hello) == "pq.example.com"


def test_names_are_case_folded_and_lose_the_trailing_dot() -> None:
    assert read(records(message(body(server_name(b"HOME.Example.Com."))))) == "home.example.com"


def test_unknown_extensions_are_skipped_and_ech_s_outer_name_is_used() -> None:
    ech = extension(0xFE0D, b"\0" + b"e" * 300)
    grease = extension(0x0A0A, b"")
    content = body(grease + ech + server_name(b"outer.example.com") + extension(0xFFFF, b"x"))
    assert read(records(message(content))) == "outer.example.com"


def test_other_kinds_of_names_are_skipped() -> None:
    names = b"\x07" + vector(2, b"other") + b"\0" + vector(2, b"host.example.com")
    assert read(records(message(body(extension(0, vector(2, names)))))) == "host.example.com"
    assert read(records(message(body(server_name(b"other", kind=7))))) == ""


def test_without_extensions_or_without_names() -> None:
    assert read(records(message(body(None)))) == ""
    assert read(records(message(body(b"")))) == ""
    assert read(records(message(body(extension(10, b"\0"))))) == ""


def test_up_to_64_kib() -> None:
    def hello(size: int) -> bytes:
        padding = b"".join(extension(21, bytes(16000)) for _ in range(3))
        padding += extension(21, bytes(size - 48012))
        return records(message(body(padding + server_name(b"big.example.com"))))

    size = MAX_HELLO - len(hello(64000)) + 64000
    assert len(hello(size)) == MAX_HELLO
    assert read(hello(size)) == "big.example.com"
    with pytest.raises(HelloError, match="longer than 65536"):
        read(hello(size + 1))


def test_tiny_records_don_t_get_around_the_limit() -> None:
    reader = HelloReader()
    content = b"\x01\x00\xff\x00" + bytes(MAX_HELLO)
    with pytest.raises(HelloError, match="longer than 65536"):
        for at in range(MAX_HELLO):
            assert reader.receive(records(content[at : at + 1])) is None
    assert len(reader.received) <= MAX_HELLO + 6


def test_the_protocols_that_this_machine_s_openssl_offers() -> None:
    context, outgoing = ssl.create_default_context(), ssl.MemoryBIO()
    context.set_alpn_protocols(["acme-tls/1", "h2"])
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="home.example.com")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    hello, reader = outgoing.read(), HelloReader()
    for at in range(len(hello)):
        assert reader.alpn() == ()
        reader.receive(hello[at : at + 1])
    assert reader.alpn() == (b"acme-tls/1", b"h2")
    assert read_alpn(hello + b"early data") == (b"acme-tls/1", b"h2")
    assert read_alpn(client_hello()) == ()


def test_protocols_are_any_bytes_and_the_first_list_counts() -> None:
    name, grease = server_name(b"home.example.com"), b"\x0a\x0a"
    content = body(alpn(grease, b"x" * 255) + name + alpn(b"h2"))
    assert read(records(message(content), 30)) == "home.example.com"
    assert read_alpn(records(message(content), 30)) == (grease, b"x" * 255)
    assert read_alpn(records(message(body(None)))) == ()
    assert read_alpn(HELLO) == ()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x00",  # an empty list
        vector(2, b"\x00"),  # an empty name
        vector(2, b"\x02h2\x00"),
        vector(2, b"\x03h2"),  # a name longer than the list
        b"\x00\x04\x02h2",  # a list longer than the extension
        vector(2, b"\x02h2") + b"x",  # something behind the list
    ],
)
def test_malformed_protocols_don_t_hide_the_hostname(data: bytes) -> None:
    reader = HelloReader()
    hello = records(message(body(extension(16, data) + server_name(b"home.example.com"))))
    assert reader.receive(hello) == "home.example.com"
    with pytest.raises(HelloError, match=r"ALPN|protocol"):
        reader.alpn()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no TLS handshake record: type 71"),
        (b"\x16\x02\x01\x00\x05hello", "version 2"),
        (b"\x16\x03\x01\x00\x00", "length 0"),
        (b"\x16\x03\x01\x40\x01", "length 16385"),
        (b"\x15\x03\x01\x00\x02\x02\x28", "type 21"),
        (records(b"\x02" + vector(3, b"server hello")), "message 2, expected 1"),
        (records(b"\x01\xff\xff\xff" + b"x" * 9), "expected at most 65536"),
        (HELLO[:11] + b"\x17" + HELLO[12:], None),
    ],
)
def test_what_is_no_client_hello(data: bytes, said: str | None) -> None:
    if said is None:
        assert read(data) == "home.example.com"  # only the version in it differs
    else:
        with pytest.raises(HelloError, match=said):
            read(data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x03\x03" + b"r" * 31,
        body(None)[:34] + b"\xff" + body(None)[35:],  # session id
        body(None)[:-6] + b"\xff" + body(None)[-5:],  # cipher suites
        body(None)[:-2] + b"\x09\0",  # compression methods
        body(b"")[:-2] + b"\x00\x09",  # extensions longer than the body
        body(b"") + b"x",  # something behind them
        body(b"\0"),  # half an extension
        body(struct.pack(">HH", 10, 5) + b"abc"),  # an extension longer than all of them
        body(extension(0, b"")),
        body(extension(0, b"\x00\x00")),
        body(extension(0, b"\x00\x09\x00\x00\x01a")),  # list longer than the extension
        body(extension(0, b"\x00\x04\x00\x00\x01a")[:-1]),
        body(extension(0, vector(2, b"\0" + b"\x00\x09abc"))),  # name longer than the list
        body(extension(0, vector(2, b"\0" + vector(2, b"a")) + b"x")),  # something behind the list
        body(server_name(b"b\xfccher.de")),
    ],
)
def test_every_length_is_checked_against_its_container(content: bytes) -> None:
    with pytest.raises(HelloError):
        read(records(message(content)))


@settings(max_examples=500)
@given(st.binary(max_size=300), st.integers(0, len(HELLO) - 1), st.binary(max_size=4))
def test_fuzz_waits_or_answers_or_raises_hello_error(noise: bytes, at: int, patch: bytes) -> None:
    genuine = client_hello()
    for data in (
        noise,
        HELLO[:at] + patch + HELLO[at + len(patch) :],
        HELLO[:at] + patch,
        records(message(noise)),
        records(message(body(noise))),
        genuine[: at * 3] + patch + genuine[at * 3 + len(patch) :],
        records(message(body(extension(16, noise)))),
        records(message(body(extension(16, vector(2, noise))))),
    ):
        reader = HelloReader()
        try:
            answer = reader.receive(data)
            protocols = reader.alpn()
        except HelloError:
            continue
        assert answer is None or isinstance(answer, str)
        assert isinstance(protocols, tuple)
        assert all(0 < len(name) < 256 for name in protocols)
