"""The ticket: all that a client needs, as one JSON object or as one line.

    {"server": "relay.example.com:443", "token": "gAAAAA…", "aes_key": HEX, "aes_iv": HEX,
     "hostname": "home.example.com", "valid": 1790000000, "protocol_version": 2,
     "cipher": "aes-cbc", "throttling": null}

It may have more: `servers`, the relays, best first; `device_id`, the session master's name for
the client. The line is `st1.` and that object in URL-safe base64 without padding.
"""

from __future__ import annotations

from ..errors import ConfigurationError, TicketError
from .cipher import CIPHERS, IV_SIZE, KEY_SIZE
from .names import is_hostname, is_time, normal_hostname, parse_address, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

LINE_PREFIX = "st1."
TOKEN_PREFIX = "gA"  # every Fernet token of this millennium starts so
MAX_TEXT = 65536
RELAY_PORT = 443
MAX_SERVERS = 32


class Ticket:
    """The client's credential.

    `server` is HOST or HOST:PORT, `token` the relay's Fernet token, `aes_key` 32
    bytes, `aes_iv` 16, `valid` UTC Unix seconds or None where it isn't known,
    `throttling` the most DATA frames a second or None for no limit, `servers` all
    relays, best first. Raises TicketError that names the field. Its repr shows no secret.
    """

    __slots__ = (
        "aes_iv",
        "aes_key",
        "cipher",
        "device_id",
        "hostname",
        "protocol_version",
        "server",
        "servers",
        "throttling",
        "token",
        "valid",
    )

    def __init__(
        self,
        *,
        server: str,
        token: str,
        aes_key: bytes,
        aes_iv: bytes,
        hostname: str = "",
        valid: float | None = None,
        protocol_version: int = 0,
        cipher: str = "aes-cbc",
        throttling: int | None = None,
        servers: Sequence[str] = (),
        device_id: str = "",
    ) -> None:
        self.servers = tuple(servers[:MAX_SERVERS]) or (server,)
        try:
            parse_address(server, "server", default_port=RELAY_PORT)
            for other in self.servers:
                parse_address(other, "servers", default_port=RELAY_PORT)
        except ConfigurationError as error:
            raise TicketError(f"the ticket's {error}") from None
        if not is_token(token):
            raise TicketError("the ticket's token is no Fernet token (base64 that starts with gA)")
        for name, value, size in (("aes_key", aes_key, KEY_SIZE), ("aes_iv", aes_iv, IV_SIZE)):
            if len(value) != size:
                raise TicketError(f"the ticket's {name} has {len(value)} bytes, expected {size}")
        if cipher not in CIPHERS:
            raise TicketError(
                f"the ticket's cipher is {shown(cipher)}, expected one of {', '.join(CIPHERS)}"
            )
        if hostname and not is_hostname(hostname := normal_hostname(hostname)):
            raise TicketError(f"the ticket's hostname is {shown(hostname)}, expected a DNS name")
        if valid is not None and not is_time(valid):
            raise TicketError("the ticket's valid is no time in Unix seconds")
        if protocol_version < 0 or (throttling or 0) < 0:
            raise TicketError("the ticket's protocol_version or throttling is below 0")
        self.server, self.token = server, token
        self.aes_key, self.aes_iv = aes_key, aes_iv
        self.hostname, self.valid = hostname, valid
        self.protocol_version, self.cipher = min(protocol_version, 2), cipher
        self.throttling = throttling or None
        if device_id:
            from .device import is_device_id  # noqa: PLC0415  few tickets have one

            if not is_device_id(device_id):
                raise TicketError("the ticket's device_id is no device's id")
        self.device_id = device_id

    @property
    def created(self) -> int | None:
        """When the token was made, UTC Unix seconds: in a Fernet token anybody can read that."""
        import base64  # noqa: PLC0415

        try:
            start = base64.urlsafe_b64decode(self.token[:12])
        except ValueError:
            return None
        created = int.from_bytes(start[1:], "big")
        return created if len(start) == 9 and is_time(created) else None

    def __repr__(self) -> str:
        return (
            f"<Ticket {self.hostname or '?'} at {self.server}, version {self.protocol_version}, "
            f"{self.cipher}>"
        )

    @classmethod
    def parse(cls, text: str) -> Ticket:
        """Read a ticket in either form, white space around it allowed. Raises TicketError."""
        import json  # noqa: PLC0415  only a client that starts needs it

        text = text.strip()
        if len(text) > MAX_TEXT:
            raise TicketError(f"the ticket has {len(text)} characters, expected at most {MAX_TEXT}")
        if text.startswith(LINE_PREFIX):
            text = _from_line(text)
        elif not text.startswith("{"):
            raise TicketError(
                f"no ticket: expected a JSON object or a line that starts with {LINE_PREFIX!r}, "
                + ("found nothing" if not text else f"found {len(text)} characters of other text")
            )
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            raise TicketError("the ticket is not valid JSON; was it cut short?") from None
        if not isinstance(fields, dict):
            raise TicketError("the ticket's JSON is not an object")
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Ticket:
        """Read the JSON object of a ticket; unknown fields are ignored. Raises TicketError."""
        return cls(
            server=_text(fields, "server"),
            token=_text(fields, "token"),
            aes_key=_hex(fields, "aes_key"),
            aes_iv=_hex(fields, "aes_iv"),
            hostname=_text(fields, "hostname") if fields.get("hostname") is not None else "",
            valid=_number(fields, "valid"),
            protocol_version=_integer(fields, "protocol_version") or 0,
            cipher=_text(fields, "cipher") if fields.get("cipher") is not None else "aes-cbc",
            throttling=_integer(fields, "throttling"),
            servers=_texts(fields, "servers"),
            device_id=_text(fields, "device_id") if fields.get("device_id") is not None else "",
        )

    def to_json(self) -> str:
        """Return the ticket as a JSON object on one line. It holds secrets."""
        import json  # noqa: PLC0415

        fields: dict[str, Any] = {
            "server": self.server,
            "token": self.token,
            "aes_key": self.aes_key.hex(),
            "aes_iv": self.aes_iv.hex(),
            "hostname": self.hostname or None,
            "valid": self.valid,
            "protocol_version": self.protocol_version,
            "cipher": self.cipher,
            "throttling": self.throttling,
        }
        if self.servers != (self.server,):
            fields["servers"] = self.servers
        if self.device_id:
            fields["device_id"] = self.device_id
        return json.dumps(fields)

    def to_line(self) -> str:
        """Return the ticket's one-line form. It holds secrets."""
        import base64  # noqa: PLC0415

        return LINE_PREFIX + base64.urlsafe_b64encode(self.to_json().encode()).decode().rstrip("=")


def is_token(text: str) -> bool:
    """Tell whether `text` has the form of a Fernet token."""
    return (
        text.startswith(TOKEN_PREFIX)
        and len(text) % 4 == 0
        and text.isascii()
        and text.rstrip("=").replace("-", "a").replace("_", "a").isalnum()
    )


def _from_line(line: str) -> str:
    import base64  # noqa: PLC0415

    body = line[len(LINE_PREFIX) :]
    if not (body.isascii() and body.replace("-", "a").replace("_", "a").isalnum()):
        raise TicketError("the ticket's line has characters other than base64's; was it broken?")
    try:
        return base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)).decode()
    except ValueError:
        raise TicketError("the ticket's line is not whole; was it cut short?") from None


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise TicketError(f"the ticket's {name} is {_kind(value)}, expected a string")
    return value


def _texts(fields: dict[str, Any], name: str) -> list[str]:
    values = fields.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TicketError(f"the ticket's {name} is {_kind(values)}, expected a list of strings")
    return values


def _hex(fields: dict[str, Any], name: str) -> bytes:
    try:
        return bytes.fromhex(_text(fields, name))
    except ValueError:
        raise TicketError(f"the ticket's {name} is not a hex string") from None


def _number(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TicketError(f"the ticket's {name} is {_kind(value)}, expected a number")
    return value


def _integer(fields: dict[str, Any], name: str) -> int | None:
    value = _number(fields, name)
    if value is not None and (not isinstance(value, int) or value < 0):
        raise TicketError(f"the ticket's {name} is {value!r}, expected an integer from 0 on")
    return value


def _kind(value: Any) -> str:
    """Describe a JSON value without showing it: it may be a secret in the wrong place."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return "a string" if value else "an empty string"
    return {bool: "true or false", list: "a list", dict: "an object"}.get(type(value), "a number")
