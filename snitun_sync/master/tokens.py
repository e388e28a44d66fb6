"""The session master's devices, and their tokens."""

from __future__ import annotations

import os

from ..protocol.cipher import BLOCK_SIZE, IV_SIZE, KEY_SIZE
from ..protocol.token import SHORTEST, Payload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..protocol.token import Fernet


class Device:
    """One client, as the database has it.

    `aliases` are more hostnames of it; `throttling` the most DATA frames a second or None for no
    limit; tokens of it that were made before `tokens_before` are refused.
    """

    __slots__ = (
        "aliases",
        "cipher",
        "created",
        "has_secret",
        "hostname",
        "id",
        "last_seen",
        "protocol_version",
        "revoked",
        "throttling",
        "tokens_before",
    )

    def __init__(
        self,
        device_id: str,
        hostname: str,
        aliases: Sequence[str] = (),
        throttling: int | None = None,
        cipher: str = "aes-cbc",
        protocol_version: int = 2,
        created: int = 0,
        last_seen: int | None = None,
        revoked: int | None = None,
        tokens_before: int = 0,
        has_secret: bool = False,
    ) -> None:
        self.id, self.hostname, self.aliases = device_id, hostname, tuple(aliases)
        self.throttling, self.cipher = throttling, cipher
        self.protocol_version = protocol_version
        self.created, self.last_seen, self.revoked = created, last_seen, revoked
        self.tokens_before, self.has_secret = tokens_before, has_secret


def seal_token(
    device: Device, fernet: Fernet, *, aes_key: bytes, aes_iv: bytes, valid: float, now: float
) -> str:
    """Return a token of the device, for the key and IV that its client has chosen.

    It is dated behind all that was revoked of the device; `now` (UTC, Unix seconds) is when the
    device was looked up.
    """
    payload = _payload(device, aes_key, aes_iv, valid)
    return fernet.seal(payload.to_json(), max(int(now), device.tokens_before), os.urandom)


def token_length(device: Device) -> int:
    """Return how many characters a token of the device has."""
    # A time can't take more characters.
    payload = _payload(device, bytes(KEY_SIZE), bytes(IV_SIZE), 10**17).to_json()
    size = SHORTEST + (len(payload) // BLOCK_SIZE + 1) * BLOCK_SIZE
    return (size + 2) // 3 * 4


def _payload(device: Device, aes_key: bytes, aes_iv: bytes, valid: float) -> Payload:
    return Payload(
        valid=valid,
        hostname=device.hostname,
        alias=device.aliases,
        aes_key=aes_key,
        aes_iv=aes_iv,
        protocol_version=device.protocol_version,
        cipher=device.cipher,
        device_id=device.id,
    )
