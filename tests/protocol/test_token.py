"""Fernet and the token's payload."""

from __future__ import annotations

import base64
import json
import os
import time
from typing import Any

import cryptography.fernet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snitun_sync.errors import ConfigurationError, TokenError
from snitun_sync.protocol.aes import Aes, load
from snitun_sync.protocol.token import MAX_TEXT, Fernet, Payload, TokenReader, new_fernet_key

FIELDS = {
    "valid": 4102444800.5,
    "hostname": "Home.Example.COM.",
    "alias": ["www.example.com"],
    "aes_key": "11" * 32,
    "aes_iv": "22" * 16,
    "protocol_version": 2,
    "cipher": "aes-gcm",
}


def keys(count: int) -> list[str]:
    return [new_fernet_key(os.urandom) for _ in range(count)]


def read(reader: TokenReader, *pieces: bytes) -> bytes | None:
    """Feed all pieces; nothing but the last may make the token whole."""
    answer = None
    for piece in pieces:
        assert answer is None
        answer = reader.receive(piece)
    return answer


# --- Fernet ----------------------------------------------------------------------


def test_the_specification_s_example(aes: Aes) -> None:
    # https://github.com/fernet/spec, generate.json
    key = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4="
    token = (
        "gAAAAAAdwJ6wAAECAwQFBgcICQoLDA0ODy021cpGVWKZ_eEwCGM4BLLF_5CV9dOPmrhuVUPgJobwOz7JcbmrR64j"
        "VmpU4IwqDA=="
    )
    assert Fernet([key], aes).seal(b"hello", 499162800, lambda n: bytes(range(n))) == token
    assert Fernet([key], aes).open(token.encode()) == b"hello"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=st.binary(min_size=1, max_size=300))
def test_agrees_with_cryptography_s_fernet(payload: bytes) -> None:
    key = new_fernet_key(os.urandom)
    other = cryptography.fernet.Fernet(key)
    for aes in (load("pycryptodome"), load("cryptography")):
        ours = Fernet([key], aes)
        assert other.decrypt(ours.seal(payload, time.time(), os.urandom)) == payload
        assert ours.open(other.encrypt(payload)) == payload


def test_any_key_is_accepted_and_the_first_signs(aes: Aes) -> None:
    old, new = keys(2)
    both, only_old = Fernet([new, old], aes), Fernet([old], aes)
    token = only_old.seal(b"x", 0, os.urandom).encode()
    assert both.open(token) == b"x"
    assert only_old.open(both.seal(b"x", 0, os.urandom).encode()) is None


def test_a_flipped_bit_anywhere_is_noticed(aes: Aes) -> None:
    fernet = Fernet(keys(1), aes)
    raw = base64.urlsafe_b64decode(fernet.seal(b"payload", 0, os.urandom))
    for at in range(len(raw)):
        flipped = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        assert fernet.open(base64.urlsafe_b64encode(flipped)) is None


@pytest.mark.parametrize(
    "key", ["", "short", "x" * 44, "A" * 43, "A" * 44, "Aé" * 22, "A" * 43 + "=="]
)
def test_malformed_keys_are_named_by_their_number(key: str) -> None:
    with pytest.raises(ConfigurationError, match="Fernet key 2 is not 32 bytes"):
        Fernet([new_fernet_key(os.urandom), key], load())


def test_no_keys() -> None:
    with pytest.raises(ConfigurationError, match="expected at least one"):
        Fernet([], load())


# --- the payload -----------------------------------------------------------------


def test_payload_is_read() -> None:
    payload = Payload.from_json(json.dumps({**FIELDS, "from": "the future"}).encode())
    assert payload.hostname == "home.example.com"
    assert payload.names == ("home.example.com", "www.example.com")
    assert (payload.valid, payload.protocol_version, payload.cipher) == (4102444800.5, 2, "aes-gcm")
    assert (payload.aes_key, payload.aes_iv) == (b"\x11" * 32, b"\x22" * 16)
    again = Payload.from_json(payload.to_json())
    assert all(getattr(again, name) == getattr(payload, name) for name in Payload.__slots__)


@pytest.mark.parametrize("value", [None, [], "missing"])
def test_what_may_be_missing(value: Any) -> None:
    fields = {name: FIELDS[name] for name in ("valid", "hostname", "aes_key", "aes_iv")}
    if value != "missing":
        fields |= {"alias": value, "protocol_version": None}
    payload = Payload.from_json(json.dumps(fields).encode())
    assert (payload.alias, payload.protocol_version, payload.cipher) == ((), 0, "aes-cbc")


def test_later_versions_act_as_2() -> None:
    assert (
        Payload.from_json(json.dumps({**FIELDS, "protocol_version": 7}).encode()).protocol_version
        == 2
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("valid", None),
        ("valid", "soon"),
        ("valid", True),
        ("valid", float("nan")),
        ("valid", float("inf")),
        ("hostname", None),
        ("hostname", ""),
        ("hostname", "two words"),
        ("hostname", 5),
        ("alias", "one.example.com"),
        ("alias", [1]),
        ("alias", {"a": 1}),
        ("aes_key", "11" * 16),
        ("aes_key", "xy" * 32),
        ("aes_key", None),
        ("aes_iv", "22" * 15),
        ("aes_iv", 22),
        ("protocol_version", "2"),
        ("protocol_version", -1),
        ("protocol_version", 1.5),
        ("protocol_version", False),
        ("cipher", "rot13"),
        ("cipher", None),
        ("cipher", []),
    ],
)
def test_malformed_payloads_name_the_field_and_no_secret(field: str, value: Any) -> None:
    with pytest.raises(TokenError, match=f"the token's {field}") as raised:
        Payload.from_json(json.dumps({**FIELDS, field: value}).encode())
    assert "1111" not in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"5", b"{", b"[" * 100_000])
def test_payloads_that_are_no_object(data: bytes) -> None:
    with pytest.raises(TokenError, match="not"):
        Payload.from_json(data)


# --- the token at the start of a connection --------------------------------------


def tokens_of_all_paddings(fernet: Fernet) -> list[bytes]:
    """Tokens with no, one and two padding characters."""
    tokens = [fernet.seal(b"x" * size, 0, os.urandom).encode() for size in (200, 216, 232)]
    assert {len(token) - len(token.rstrip(b"=")) for token in tokens} == {0, 1, 2}
    return tokens


def test_reader_in_any_pieces(aes: Aes) -> None:
    fernet = Fernet(keys(2), aes)
    for token in tokens_of_all_paddings(fernet):
        for step in (1, 7, 64, len(token)):
            pieces = [token[at : at + step] for at in range(0, len(token), step)]
            assert read(TokenReader(fernet), *pieces) == fernet.open(token)


def test_reader_takes_nothing_behind_the_token() -> None:
    fernet = Fernet(keys(1), load())
    for token in tokens_of_all_paddings(fernet):
        for more in (b"A", b"A" * 64, b"=="):
            with pytest.raises(TokenError):
                TokenReader(fernet).receive(token + more)


def test_reader_with_another_key() -> None:
    ours, theirs = Fernet(keys(1), load()), Fernet(keys(1), load())
    for token in tokens_of_all_paddings(theirs):
        reader = TokenReader(ours)
        if token.endswith(b"="):
            with pytest.raises(TokenError, match="signature"):
                reader.receive(token)
        else:  # only more text, or none, can tell that this was all
            assert reader.receive(token) is None
            assert reader.is_plausible
            assert reader.receive(b"A") is None
            assert not reader.is_plausible


def test_reader_takes_long_tokens_and_not_longer_ones() -> None:
    fernet = Fernet(keys(1), load())
    token = fernet.seal(b"x" * 6000, 0, os.urandom).encode()
    assert 8000 < len(token) <= MAX_TEXT
    assert TokenReader(fernet).receive(token) == b"x" * 6000
    with pytest.raises(TokenError, match="longer than 8192"):
        TokenReader(fernet).receive(fernet.seal(b"x" * 6200, 0, os.urandom).encode())
    reader = TokenReader(fernet)
    with pytest.raises(TokenError, match="longer than 8192"):
        for _ in range(MAX_TEXT + 1):
            assert reader.receive(b"A") is None


@pytest.mark.parametrize("text", [b"gAAA\n", b"gAAA AAA", b"gA\x00", b"gA+/", "gAé".encode()])
def test_reader_wants_base64(text: bytes) -> None:
    with pytest.raises(TokenError, match="characters other than base64's"):
        TokenReader(Fernet(keys(1), load())).receive(text)


_FUZZED = Fernet(keys(1), load())


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=100),
            st.text("ABCgxyz0189-_=", max_size=200).map(str.encode),
            st.just(_FUZZED.seal(b"payload", 0, os.urandom).encode()),
        ),
        max_size=8,
    )
)
def test_fuzz_reader_waits_or_answers_or_raises_token_error(pieces: list[bytes]) -> None:
    reader = TokenReader(_FUZZED)
    try:
        for piece in pieces:
            answer = reader.receive(piece)
            assert answer in (None, b"payload")
            if answer is not None:
                break
    except TokenError:
        pass


@settings(max_examples=300)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(sorted(FIELDS)), inner, max_size=7)
        ),
        max_leaves=10,
    )
)
def test_fuzz_payload_is_read_or_raises_token_error(value: Any) -> None:
    try:
        Payload.from_json(json.dumps(value).encode())
    except TokenError:
        pass
