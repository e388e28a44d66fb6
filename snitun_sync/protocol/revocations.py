"""The list of revoked tokens that the session master signs and relays follow.

It is a JSON Web Signature in its compact form, with HS256 (RFC 7515, RFC 7518):

    base64url({"alg":"HS256","typ":"snitun-revocations"}) . base64url(list) . base64url(HMAC)

    list: {"serial": 1795000000123, "time": 1795000000,
           "entries": [{"device_id": ID, "created_before": 1795000000, "until": 1795086400}]}

An entry refuses the tokens of its device that were made before a time, and counts until the last
of them has expired (all times UTC, Unix seconds). The serial grows with every change. The key of
the HMAC is derived from a Fernet key by HKDF with SHA-256 (RFC 5869).
"""

from __future__ import annotations

import base64
import hmac
import json

from ..errors import TokenError
from .device import is_device_id
from .names import is_time
from .token import check_fernet_keys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

INFO = b"snitun revocations 1"
MAX_TEXT = 32 * 1024 * 1024
_LARGEST = 2**53  # what JSON's numbers hold in every language


class Revocations:
    """One list; it doesn't change."""

    __slots__ = ("entries", "serial", "time")

    def __init__(self, serial: int, time: int, entries: Mapping[str, tuple[int, int]]) -> None:
        """`entries`: by the device's id, the times `created_before` and `until`."""
        self.serial, self.time, self.entries = serial, time, entries

    def refuses(self, device_id: str, created: int) -> bool:
        """Tell whether the device's tokens that were made at `created` are revoked."""
        entry = self.entries.get(device_id)
        return entry is not None and created < entry[0]

    def sign(self, fernet_key: str) -> str:
        """Return the text for relays, signed under a Fernet key. Raises ConfigurationError."""
        fields = {
            "serial": self.serial,
            "time": self.time,
            "entries": [
                {"device_id": device_id, "created_before": before, "until": until}
                for device_id, (before, until) in self.entries.items()
            ],
        }
        signed = f"{_HEADER}.{_encoded(json.dumps(fields, separators=(',', ':')).encode())}"
        return f"{signed}.{_encoded(_signature(fernet_key, signed.encode()))}"

    @classmethod
    def read(cls, text: str, fernet_keys: Sequence[str]) -> Revocations:
        """Read what was signed under any of the keys. Raises TokenError, ConfigurationError."""
        signed, _, signature = text.strip().rpartition(".")
        header, _, body = signed.partition(".")
        if header != _HEADER or not text.isascii():
            raise TokenError("this is no list of revocations")
        given = _decoded(signature)
        # All of them are tried: how long it takes tells nothing.
        matches = [
            hmac.compare_digest(_signature(key, signed.encode()), given) for key in fernet_keys
        ]
        if not any(matches):
            raise TokenError(
                "the signature of the list of revocations matches none of the Fernet keys"
            )
        try:
            fields = json.loads(_decoded(body))
        except (ValueError, RecursionError):
            raise TokenError("the list of revocations is not JSON") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("entries"), list):
            raise TokenError("the list of revocations has no entries")
        entries = dict(map(_entry, fields["entries"]))
        serial = fields.get("serial")
        if not isinstance(serial, int) or not 0 <= serial < _LARGEST:
            raise TokenError("the serial of the list of revocations is no number")
        return cls(serial, _seconds(fields, "time"), entries)


def _entry(fields: Any) -> tuple[str, tuple[int, int]]:
    device_id = fields.get("device_id") if isinstance(fields, dict) else None
    if not isinstance(device_id, str) or not is_device_id(device_id):
        raise TokenError("an entry of the list of revocations has no device's id")
    return device_id, (_seconds(fields, "created_before"), _seconds(fields, "until"))


def _seconds(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if not is_time(value):
        raise TokenError(f"{name} in the list of revocations is no time in Unix seconds")
    return int(value)  # type: ignore[arg-type]


def _signature(fernet_key: str, signed: bytes) -> bytes:
    # HKDF: extract without salt, then expand to the one block that is needed.
    secret = hmac.digest(bytes(32), b"".join(check_fernet_keys([fernet_key])[0]), "sha256")
    return hmac.digest(hmac.digest(secret, INFO + b"\x01", "sha256"), signed, "sha256")


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return b""


_HEADER = _encoded(b'{"alg":"HS256","typ":"snitun-revocations"}')
