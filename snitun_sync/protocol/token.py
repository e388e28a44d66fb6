"""The Fernet token that a client shows to a relay (docs/protocol.md, Token).

    0x80 | creation time, 8 | IV, 16 | AES-128-CBC(PKCS7(payload)) | HMAC-SHA256, 32

in URL-safe base64 with padding (https://github.com/fernet/spec). A Fernet key is
32 bytes in the same base64: the first 16 sign, the last 16 encrypt. The relay
needs `hashlib` for the HMAC; the client never imports this module.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from struct import Struct

from ..errors import ConfigurationError, TokenError
from .cipher import BLOCK_SIZE, CIPHERS, IV_SIZE, KEY_SIZE
from .device import is_device_id
from .names import is_hostname, is_time, normal_hostname

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from .aes import Aes

# | 0x80 | creation time, 8 | IV, 16 |
PREFIX = Struct(">BQ16s")
VERSION = 0x80
MAC_SIZE = 32
FERNET_KEY_SIZE = 32
SHORTEST = PREFIX.size + MAC_SIZE  # 57 bytes around the ciphertext
MAX_TEXT = 8192
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
# Without padding, a whole token has 57 + 48·j bytes: 76 + 64·j characters.
_UNPADDED_FIRST, _UNPADDED_STEP = SHORTEST * 4 // 3, 64


class Payload:
    """What a token says.

    `valid` is the time (UTC, Unix seconds) from which the token is refused;
    `hostname` and `alias` are in normal form; `aes_key` has 32 bytes, `aes_iv` 16;
    `device_id` is the session master's name for the client, "" where it gave none.
    """

    __slots__ = (
        "aes_iv",
        "aes_key",
        "alias",
        "cipher",
        "device_id",
        "hostname",
        "protocol_version",
        "valid",
    )

    def __init__(
        self,
        *,
        valid: float,
        hostname: str,
        aes_key: bytes,
        aes_iv: bytes,
        alias: Sequence[str] = (),
        protocol_version: int = 0,
        cipher: str = "aes-cbc",
        device_id: str = "",
    ) -> None:
        self.valid, self.hostname, self.alias = valid, hostname, tuple(alias)
        self.device_id = device_id
        self.aes_key, self.aes_iv = aes_key, aes_iv
        self.protocol_version, self.cipher = protocol_version, cipher

    @property
    def names(self) -> tuple[str, ...]:
        """All hostnames of the client, each once, the main one first."""
        return tuple(dict.fromkeys((self.hostname, *self.alias)))

    def to_json(self) -> bytes:
        """Return the JSON object that goes into a token, in the field's form."""
        fields: dict[str, Any] = {
            "valid": self.valid,
            "hostname": self.hostname,
            "alias": list(self.alias),
            "aes_key": self.aes_key.hex(),
            "aes_iv": self.aes_iv.hex(),
            "protocol_version": self.protocol_version,
        }
        if self.cipher != "aes-cbc":
            fields["cipher"] = self.cipher
        if self.device_id:  # ours; published relays ignore it
            fields["device_id"] = self.device_id
        return json.dumps(fields).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Payload:
        """Read a token's payload; unknown fields are ignored. Raises TokenError."""
        try:
            fields = json.loads(data.decode())
        except (ValueError, RecursionError):
            raise TokenError("the token's payload is not JSON") from None
        if not isinstance(fields, dict):
            raise TokenError("the token's payload is not a JSON object")
        aliases = fields.get("alias") or []
        if not isinstance(aliases, list):
            raise TokenError("the token's alias is not a list")
        return cls(
            valid=_time(fields.get("valid")),
            hostname=_name(fields.get("hostname"), "hostname"),
            alias=[_name(alias, "alias") for alias in aliases],
            aes_key=_hex(fields.get("aes_key"), "aes_key", KEY_SIZE),
            aes_iv=_hex(fields.get("aes_iv"), "aes_iv", IV_SIZE),
            protocol_version=_version(fields.get("protocol_version")),
            cipher=_cipher(fields.get("cipher", "aes-cbc")),
            device_id=_device_id(fields.get("device_id")),
        )


def _time(value: Any) -> float:
    if not is_time(value):
        raise TokenError("the token's valid is no time in Unix seconds")
    return float(value)


def _name(value: Any, field: str) -> str:
    name = normal_hostname(value) if isinstance(value, str) else ""
    if not is_hostname(name):
        raise TokenError(f"the token's {field} is not a hostname")
    return name


def _hex(value: Any, field: str, size: int) -> bytes:
    try:
        data = bytes.fromhex(value)
    except (TypeError, ValueError):
        raise TokenError(f"the token's {field} is not a hex string") from None
    if len(data) != size:
        raise TokenError(f"the token's {field} has {len(data)} bytes, expected {size}")
    return data


def _version(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TokenError("the token's protocol_version is not an integer from 0 on")
    return min(value, 2)


def _cipher(value: Any) -> str:
    if value not in CIPHERS:
        raise TokenError(f"the token's cipher is not one of {', '.join(CIPHERS)}")
    return str(value)


def _device_id(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not is_device_id(value):
        raise TokenError("the token's device_id is no device's id")
    return value


def new_fernet_key(random: Callable[[int], bytes]) -> str:
    """Return a new Fernet key as text; `random` gives unpredictable bytes."""
    return base64.urlsafe_b64encode(random(FERNET_KEY_SIZE)).decode()


class Fernet:
    """A list of Fernet keys: the first one signs, all of them are accepted."""

    def __init__(self, keys: Sequence[str], aes: Aes) -> None:
        """Read `keys`, in base64, the newest first. Raises ConfigurationError."""
        self._keys = check_fernet_keys(keys)
        self._aes = aes

    def seal(self, payload: bytes, now: float, random: Callable[[int], bytes]) -> str:
        """Return a token around `payload`, created at `now` (UTC, Unix seconds)."""
        signing, encrypting = self._keys[0]
        iv = random(IV_SIZE)
        padding = BLOCK_SIZE - len(payload) % BLOCK_SIZE
        padded = payload + bytes([padding]) * padding
        signed = PREFIX.pack(VERSION, int(now), iv)
        signed += self._aes.cbc_encryptor(encrypting, iv)(padded)
        mac = hmac.digest(signing, signed, "sha256")
        return base64.urlsafe_b64encode(signed + mac).decode()

    def macs(self) -> list[hmac.HMAC]:
        """Return the start of an HMAC with each key."""
        return [hmac.new(signing, digestmod=hashlib.sha256) for signing, _ in self._keys]

    def open(self, text: bytes) -> bytes | None:
        """Return the payload of a whole token, or None if no key verifies it.

        Raises TokenError where the text has no token's form at all.
        """
        raw = _decode(text)
        signed, mac = raw[:-MAC_SIZE], raw[-MAC_SIZE:]
        encrypting = None
        for signing, other_half in self._keys:
            if hmac.compare_digest(hmac.digest(signing, signed, "sha256"), mac):
                encrypting = other_half
        if encrypting is None:
            return None
        version, _, iv = PREFIX.unpack_from(signed)
        padded = self._aes.cbc_decryptor(encrypting, iv)(signed[PREFIX.size :])
        # Whoever holds the signing key made what follows: errors tell nothing to others.
        if version != VERSION or not padded:
            raise TokenError("the token is empty or of another version")
        padding = padded[-1]
        if not 0 < padding <= BLOCK_SIZE or padded[-padding:] != bytes([padding]) * padding:
            raise TokenError("the token's padding is wrong")
        return bytes(padded[:-padding])


def created(text: bytes | bytearray) -> int:
    """Return when a token was made, UTC Unix seconds; `text` is one that `Fernet.open` takes."""
    return int.from_bytes(base64.urlsafe_b64decode(text[:12])[1:], "big")


def check_fernet_keys(keys: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """Return the signing and the encrypting half of each key. Raises ConfigurationError."""
    if not keys:
        raise ConfigurationError("no Fernet key; expected at least one")
    pairs = []
    for number, text in enumerate(keys, 1):
        try:
            raw = _decode_base64(text.encode())
        except (TokenError, UnicodeEncodeError):
            raw = b""
        if len(raw) != FERNET_KEY_SIZE:
            raise ConfigurationError(
                f"Fernet key {number} is not {FERNET_KEY_SIZE} bytes in URL-safe base64 "
                "(44 characters)"
            )
        pairs.append((raw[:16], raw[16:]))
    return pairs


def _decode_base64(text: bytes) -> bytes:
    body = text.rstrip(b"=")
    if len(text) % 4 or len(text) - len(body) > 2 or body.translate(None, _BASE64):
        raise TokenError("the token is not URL-safe base64 with padding")
    try:
        return base64.urlsafe_b64decode(text)
    except binascii.Error:
        raise TokenError("the token is not URL-safe base64 with padding") from None


def _decode(text: bytes) -> bytes:
    raw = _decode_base64(text)
    if len(raw) < SHORTEST or (len(raw) - SHORTEST) % BLOCK_SIZE:
        raise TokenError(f"the token has {len(raw)} bytes, not {SHORTEST} and whole blocks")
    return raw


def _may_be_whole(text: bytes) -> bool:
    size = len(text.rstrip(b"=")) * 3 // 4 - SHORTEST
    return len(text) % 4 == 0 and size > 0 and size % BLOCK_SIZE == 0


class TokenReader:
    """Finds out when the token at the start of a connection is whole.

    The wire has no mark for its end: a token is whole when its length is right
    and its signature verifies. Nothing may follow it.
    """

    __slots__ = (
        "_fernet",
        "_macs",
        "_next_length",
        "_raw",
        "_text",
        "created",
        "is_plausible",
    )

    def __init__(self, fernet: Fernet) -> None:
        self._fernet = fernet
        self._text = bytearray()
        self._next_length = _UNPADDED_FIRST
        # What is decoded, and its HMACs: no byte of it is looked at twice, whoever sends it.
        self._raw = bytearray()
        self._macs: list[hmac.HMAC] = []
        self.created = 0
        """When the token says that it was made, UTC Unix seconds; once it is whole."""
        self.is_plausible = False
        """What has come so far has a token's length, though no key verifies it."""

    def receive(self, data: bytes) -> bytes | None:
        """Take the next bytes; return the payload once the token is whole.

        Raises TokenError for what can't become a token: other characters, a
        wrong signature on a padded token, more than 8 KiB, bytes behind its end.
        """
        text = self._text
        if not text and len(data) <= MAX_TEXT and _may_be_whole(data):
            payload = self._fernet.open(data)  # it nearly always comes in one piece
            if payload is not None:
                self.created = created(data)
                return payload
        text += data
        if len(text) > MAX_TEXT:
            raise TokenError(f"the token is longer than {MAX_TEXT} characters")
        if data.translate(None, _BASE64 + b"="):
            raise TokenError("what came as a token has characters other than base64's")
        self.is_plausible = False
        padding = text.find(b"=")
        while self._next_length <= (len(text) if padding < 0 else padding):
            length = self._next_length
            self._next_length += _UNPADDED_STEP
            if self._is_signed(length):
                return self._whole(self._fernet.open(bytes(text[:length])), length)
            self.is_plausible = length == len(text)
        if padding < 0 or len(text) < (end := padding + -padding % 4):
            return None
        return self._whole(self._fernet.open(bytes(text[:end])), end)

    def _is_signed(self, length: int) -> bool:
        """Tell whether the first `length` characters, which need no padding, verify."""
        before, raw = len(self._raw), self._raw
        raw += base64.urlsafe_b64decode(self._text[before // 3 * 4 : length])
        signed = raw[max(0, before - MAC_SIZE) : -MAC_SIZE]
        found = False
        self._macs = self._macs or self._fernet.macs()
        for mac in self._macs:
            mac.update(signed)
            found |= hmac.compare_digest(mac.copy().digest(), raw[-MAC_SIZE:])
        return found

    def _whole(self, payload: bytes | None, length: int) -> bytes:
        if payload is None:
            raise TokenError("the token's signature matches none of the Fernet keys")
        if length < len(self._text):
            raise TokenError(f"{len(self._text) - length} bytes came behind the token")
        self.created = created(self._text)
        return payload
