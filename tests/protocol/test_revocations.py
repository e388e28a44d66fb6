"""The signed list of revocations."""

from __future__ import annotations

import base64
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from snitun_sync.errors import TokenError
from snitun_sync.protocol.revocations import Revocations
from snitun_sync.protocol.token import new_fernet_key

KEY, OTHER = new_fernet_key(bytes), new_fernet_key(lambda size: b"2" * size)
ID = "abcdefghijklmn27"
LIST = Revocations(1795000000123, 1795000000, {ID: (1794999000, 1795086400)})


def derived(key: str) -> bytes:
    """Return the HMAC's key by another implementation of RFC 5869."""
    hkdf = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"snitun revocations 1")
    secret = hkdf.derive(base64.urlsafe_b64decode(key))
    assert isinstance(secret, bytes)
    return secret


def signed(fields: Any, key: str = KEY) -> str:
    """Sign any JSON as the session master would."""
    text = json.dumps(fields, separators=(",", ":")).encode()
    return str(jwt.PyJWS().encode(text, derived(key), "HS256", {"typ": "snitun-revocations"}))


def test_another_implementation_reads_the_list() -> None:
    said = jwt.PyJWS().decode(LIST.sign(KEY), derived(KEY), algorithms=["HS256"])
    assert json.loads(said) == {
        "serial": 1795000000123,
        "time": 1795000000,
        "entries": [{"device_id": ID, "created_before": 1794999000, "until": 1795086400}],
    }


def test_any_of_the_keys_verifies() -> None:
    for keys in ([KEY], [OTHER, KEY], [KEY, OTHER]):
        read = Revocations.read(LIST.sign(KEY) + "\n", keys)
        assert (read.serial, read.time, read.entries) == (LIST.serial, LIST.time, LIST.entries)


def test_what_an_entry_refuses() -> None:
    assert LIST.refuses(ID, 1794998999)
    assert not LIST.refuses(ID, 1794999000)
    assert not LIST.refuses("b" * 16, 0)
    assert not LIST.refuses("", 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no list of revocations"),
        ("é.é.é", "no list of revocations"),
        (LIST.sign(OTHER), "matches none of the Fernet keys"),
        (LIST.sign(KEY)[:-4], "matches none"),
        (LIST.sign(KEY).replace(".", ".A", 1), "no list|matches none"),
        (str(jwt.PyJWS().encode(b"{}", derived(KEY), "HS256")), "no list of revocations"),
        (signed("x"), "has no entries"),
        (signed({"serial": 1, "time": 1}), "has no entries"),
        (signed({"serial": -1, "time": 1, "entries": []}), "serial"),
        (signed({"serial": 1, "time": "x", "entries": []}), "time in the list"),
        (signed({"serial": 1, "time": 1, "entries": [1]}), "no device's id"),
        (signed({"serial": 1, "time": 1, "entries": [{"device_id": ID}]}), "created_before"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(TokenError, match=said):
        Revocations.read(text, [KEY])


def test_the_header_is_a_constant() -> None:
    """What says how it is signed isn't taken from who may have signed it."""
    none = signed({"serial": 1, "time": 1, "entries": []})
    header = base64.urlsafe_b64encode(b'{"alg":"none","typ":"snitun-revocations"}').decode()
    with pytest.raises(TokenError, match="no list"):
        Revocations.read(f"{header}.{none.split('.')[1]}.", [KEY])


@given(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists))
def test_a_list_is_read_or_a_token_error(text: str, fields: Any) -> None:
    """Whoever made it: it is a list, or it raises TokenError; nothing else."""
    for made in (text, signed(fields), signed({"entries": fields, "serial": fields, "time": 1})):
        try:
            Revocations.read(made, [KEY])
        except TokenError:
            continue
