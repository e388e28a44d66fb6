"""A device's id and secret."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snitun_sync.errors import ConfigurationError
from snitun_sync.protocol.device import (
    is_device_id,
    new_id,
    new_secret,
    parse_credential,
    secret_bytes,
)

ID = "abcdefghijklmn27"
SECRET = "A" * 43


def test_what_is_made_is_accepted() -> None:
    device_id, secret = new_id(os.urandom), new_secret(os.urandom)
    assert is_device_id(device_id)
    assert len(secret_bytes(secret) or b"") == 32
    assert parse_credential(f" {device_id}.{secret}\n") == (device_id, secret)
    assert parse_credential(f"{secret}\n", device_id) == (device_id, secret)
    assert parse_credential(f"{device_id}.{secret}", device_id) == (device_id, secret)
    assert new_secret(os.urandom) != secret


@pytest.mark.parametrize("text", ["", "a" * 15, "a" * 17, "A" * 16, "0" * 16, "a" * 15 + "é"])
def test_what_is_no_id(text: str) -> None:
    assert not is_device_id(text)


@pytest.mark.parametrize("text", ["", "A" * 42, "A" * 44, "A" * 42 + "=", "A" * 42 + "é", "+" * 43])
def test_what_is_no_secret(text: str) -> None:
    assert secret_bytes(text) is None


def test_a_secret_is_written_in_one_way() -> None:
    assert secret_bytes(SECRET) == bytes(32)
    assert secret_bytes("A" * 42 + "B") is None


@pytest.mark.parametrize(
    ("text", "device_id", "said"),
    [
        (SECRET, "", "a secret without its device's id; expected ID.SECRET"),
        ("hello", "", "a secret without its device's id"),
        ("", "", "no secret is in it; expected ID.SECRET"),
        (f"{ID}.", "", "no secret is in it"),
        (f"{ID}.{SECRET[1:]}!", "", "a secret that isn't whole, or was changed"),
        (f"home.{SECRET}", "", "no credential; expected ID.SECRET, an id of 16 characters"),
        (f"{ID}.{SECRET}", "b" * 16, f"the secret of device {ID}; expected that of {'b' * 16}"),
        (f"{ID}.{SECRET[1:]}", "", "a secret of 42 characters; expected 43 of URL-safe base64"),
        ("", ID, "no secret is in it"),
    ],
)
def test_what_is_no_credential(text: str, device_id: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse_credential(text, device_id)
    assert said in str(raised.value)
    assert "AAAA" not in str(raised.value)


@given(st.text())
def test_any_text_is_a_credential_or_a_configuration_error(text: str) -> None:
    try:
        device_id, secret = parse_credential(text)
    except ConfigurationError:
        return
    assert is_device_id(device_id)
    assert secret_bytes(secret) is not None
