"""Encrypted units: both directions, replay and reflection."""

from __future__ import annotations

import os

import pytest

from snitun_sync.errors import AuthenticationError, ConfigurationError
from snitun_sync.protocol.aes import Aes, load
from snitun_sync.protocol.cipher import CIPHERS, UnitCipher, unit_cipher

KEY, IV = os.urandom(32), os.urandom(16)


def pair(name: str, aes: Aes) -> tuple[UnitCipher, UnitCipher]:
    """Return the relay's and the client's cipher of one connection."""
    if name == "aes-gcm-siv":
        aes = load("cryptography")
    relay, client = (
        unit_cipher(name, aes, KEY, IV, is_relay=is_relay, random=os.urandom)
        for is_relay in (True, False)
    )
    return relay, client


@pytest.mark.parametrize("name", CIPHERS)
def test_units_go_both_ways(aes: Aes, name: str) -> None:
    relay, client = pair(name, aes)
    for one, other in ((relay, client), (client, relay)):
        for units in ([b"a" * 32], [b"b" * 32, b"c" * 16, b"d" * 48], [b"e" * 32]):
            sealed = one.seal(units)
            assert [len(s) - one.overhead for s in sealed] == list(map(len, units))
            assert [other.open(s) for s in sealed] == units


@pytest.mark.parametrize("name", CIPHERS)
def test_many_at_once_are_the_same_stream(aes: Aes, name: str) -> None:
    relay, client = pair(name, aes)
    units = [os.urandom(32) for _ in range(100)]
    sealed = relay.seal(units[:1]) + relay.seal(units[1:60]) + relay.seal(units[60:])
    assert [client.open(s) for s in sealed] == units


def test_gcm_refuses_replay_reflection_and_gaps(aes: Aes) -> None:
    relay, client = pair("aes-gcm", aes)
    first, second, third = relay.seal([b"1" * 32, b"2" * 32, b"3" * 32])
    client.open(first)
    with pytest.raises(AuthenticationError, match=r"\(1, 0\), expected \(1, 1\)"):
        client.open(first)
    with pytest.raises(AuthenticationError, match=r"\(1, 2\), expected \(1, 1\)"):
        client.open(third)
    with pytest.raises(AuthenticationError, match=r"\(1, 1\), expected \(0, 0\)"):
        relay.open(second)
    assert client.open(second) == b"2" * 32


@pytest.mark.parametrize("name", ["aes-gcm", "aes-gcm-siv"])
def test_forged_units_are_refused(aes: Aes, name: str) -> None:
    relay, client = pair(name, aes)
    sealed = bytearray(relay.seal([b"header" * 5 + b"xx"])[0])
    sealed[20] ^= 1
    with pytest.raises(AuthenticationError):
        client.open(bytes(sealed))


def test_gcm_siv_nonces_are_random() -> None:
    relay, _ = pair("aes-gcm-siv", load())
    assert len({s[:12] for s in relay.seal([bytes(32)] * 100)}) == 100


def test_unknown_cipher() -> None:
    with pytest.raises(ConfigurationError, match="'rot13' is not known; expected aes-cbc, aes-gcm"):
        unit_cipher("rot13", load(), KEY, IV, is_relay=True, random=os.urandom)
