"""The client's credential, in its two text forms."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snitun_sync.errors import TicketError
from snitun_sync.protocol.ticket import Ticket, is_token

TOKEN = "gAAAAABlU_EA" + "A" * 88
FIELDS: dict[str, Any] = {
    "server": "relay.example.com:8443",
    "token": TOKEN,
    "aes_key": "5e" * 32,
    "aes_iv": "c7" * 16,
    "hostname": "home.example.com",
    "valid": 4102444800,
    "protocol_version": 2,
    "cipher": "aes-gcm-siv",
    "throttling": 500,
}
SECRETS = (TOKEN, "5e5e5e", "c7c7c7")


def line(fields: dict[str, Any]) -> str:
    return "st1." + base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")


@pytest.mark.parametrize("form", [json.dumps, line, lambda f: json.dumps(f, indent=2)])
def test_both_forms(form: Any) -> None:
    ticket = Ticket.parse(f"\n {form({**FIELDS, 'from': 'the future'})} \n")
    assert json.loads(ticket.to_json()) == FIELDS
    for text in (ticket.to_json(), ticket.to_line()):
        again = Ticket.parse(text)
        assert all(getattr(again, name) == getattr(ticket, name) for name in Ticket.__slots__)


def test_what_may_be_missing() -> None:
    required = {name: FIELDS[name] for name in ("server", "token", "aes_key", "aes_iv")}
    ticket = Ticket.parse(json.dumps(required))
    assert (ticket.hostname, ticket.valid, ticket.protocol_version) == ("", None, 0)
    assert (ticket.cipher, ticket.throttling) == ("aes-cbc", None)
    assert Ticket.parse(ticket.to_line()).to_json() == ticket.to_json()
    nulls = dict.fromkeys(("hostname", "valid", "protocol_version", "cipher", "throttling"))
    assert Ticket.parse(json.dumps({**required, **nulls})).cipher == "aes-cbc"


def test_no_throttling_is_null_or_0() -> None:
    assert Ticket.parse(json.dumps({**FIELDS, "throttling": 0})).throttling is None


def test_repr_shows_no_secret() -> None:
    shown = repr(Ticket.parse(json.dumps(FIELDS)))
    assert "home.example.com" in shown
    assert not any(secret in shown for secret in SECRETS)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("server", None, "server is missing"),
        ("server", "", "server is an empty string"),
        (
            "server",
            "relay:port",
            "server: port 'port', not a number from 1 to 65535, in 'relay:port'",
        ),
        ("server", "https://relay", "server: a URL in 'https://relay'"),
        ("token", None, "token is missing"),
        ("token", "hello", "token is no Fernet token"),
        ("token", 5, "token is a number"),
        ("aes_key", "5e" * 16, "aes_key has 16 bytes, expected 32"),
        ("aes_key", "xy" * 32, "aes_key is not a hex string"),
        ("aes_key", ["5e" * 32], "aes_key is a list, expected a string"),
        ("aes_iv", "c7" * 15, "aes_iv has 15 bytes, expected 16"),
        ("hostname", "two words", "hostname is 'two words', expected a DNS name"),
        ("valid", "soon", "valid is a string, expected a number"),
        ("protocol_version", 1.5, "protocol_version is 1.5, expected an integer"),
        ("protocol_version", -1, "protocol_version is -1"),
        ("cipher", "rot13", "cipher is 'rot13', expected one of aes-cbc"),
        ("throttling", True, "throttling is true or false, expected a number"),
    ],
)
def test_malformed_fields_are_named(field: str, value: Any, said: str) -> None:
    for form in (json.dumps, line):
        with pytest.raises(TicketError, match=f"the ticket's {said}") as raised:
            Ticket.parse(form({**FIELDS, field: value}))
        assert not any(secret in str(raised.value) for secret in SECRETS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found nothing"),
        ("hello", "expected a JSON object or a line that starts with 'st1.'"),
        (json.dumps(FIELDS)[:-9], "not valid JSON; was it cut short"),
        (line(FIELDS)[:-9], "cut short|not valid JSON"),
        (line(FIELDS).replace("e", "!"), "characters other than base64's"),
        ("st1.", "characters other than base64's"),
        ('{"a":' * 9000, "not valid JSON"),
        ("[" + json.dumps(FIELDS) + "]", "expected a JSON object"),
        ("st1." + base64.urlsafe_b64encode(b"[1]").decode(), "not an object"),
        ("{" + "x" * 70000, "expected at most 65536"),
    ],
)
def test_other_texts(text: str, said: str) -> None:
    with pytest.raises(TicketError, match=said) as raised:
        Ticket.parse(text)
    assert not any(secret in str(raised.value) for secret in SECRETS)


@settings(max_examples=300)
@given(
    st.one_of(
        st.text(max_size=60),
        st.text(max_size=60).map(lambda text: "st1." + text),
        st.binary(max_size=60).map(lambda data: "st1." + base64.urlsafe_b64encode(data).decode()),
        st.dictionaries(
            st.sampled_from(sorted(FIELDS)),
            st.one_of(
                st.none(),
                st.integers(),
                st.text(max_size=5),
                st.sampled_from(list(FIELDS.values())),
            ),
        ).map(json.dumps),
    )
)
def test_fuzz_parses_or_raises_ticket_error(text: str) -> None:
    try:
        Ticket.parse(text)
    except TicketError:
        pass


def test_is_token() -> None:
    assert is_token(TOKEN)
    for text in ("", "gA", "gA" + "é" * 98, TOKEN + "x", TOKEN.replace("U", "!"), "hA" + TOKEN[2:]):
        assert not is_token(text)
