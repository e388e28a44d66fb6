"""Challenge and answer, both sides."""

from __future__ import annotations

import os

import pytest

from snitun_sync.errors import AuthenticationError
from snitun_sync.protocol.aes import Aes, load
from snitun_sync.protocol.cipher import CIPHERS, unit_cipher
from snitun_sync.protocol.handshake import ClientHandshake, RelayHandshake

KEY, IV = os.urandom(32), os.urandom(16)


def pair(
    name: str, aes: Aes, client_key: bytes = KEY, client_iv: bytes = IV
) -> tuple[RelayHandshake, ClientHandshake]:
    if name == "aes-gcm-siv":
        aes = load("cryptography")
    relay = unit_cipher(name, aes, KEY, IV, is_relay=True, random=os.urandom)
    client = unit_cipher(name, aes, client_key, client_iv, is_relay=False, random=os.urandom)
    return RelayHandshake(relay, aes, os.urandom), ClientHandshake(client, aes, "gAtoken")


@pytest.mark.parametrize("name", CIPHERS)
@pytest.mark.parametrize("step", [1, 5, 1000])
def test_both_sides_agree_in_any_pieces(aes: Aes, name: str, step: int) -> None:
    relay, client = pair(name, aes)
    assert client.first() == b"gAtoken"
    challenge = relay.first() + b"frames of the relay"
    answer = b""
    for at in range(0, len(challenge), step):
        if not client.is_done:
            answer += client.receive(challenge[at : at + step])
    assert client.is_done
    assert b"frames of the relay".startswith(client.rest)
    for at in range(0, len(answer), step):
        assert not relay.is_done
        assert relay.receive(answer[at : at + step]) == b""
    assert relay.is_done
    assert relay.rest == b""


def test_the_challenge_is_another_each_time(aes: Aes) -> None:
    assert len({pair("aes-cbc", aes)[0].first() for _ in range(20)}) == 20


@pytest.mark.parametrize("name", CIPHERS)
def test_another_key(aes: Aes, name: str) -> None:
    relay, client = pair(name, aes, client_key=os.urandom(32))
    with pytest.raises(AuthenticationError):
        relay.receive(client.receive(relay.first()))


def test_another_iv(aes: Aes) -> None:
    relay, client = pair("aes-cbc", aes, client_iv=os.urandom(16))
    with pytest.raises(AuthenticationError, match="the answer to the challenge is wrong"):
        relay.receive(client.receive(relay.first()))


def test_the_challenge_sent_back_is_no_answer(aes: Aes) -> None:
    for name in CIPHERS:
        relay, _ = pair(name, aes)
        with pytest.raises(AuthenticationError):
            relay.receive(relay.first())
