"""The tokens of the session master's devices."""

from __future__ import annotations

import os

from ..protocol.cipher import BLOCK_SIZE, IV_SIZE, KEY_SIZE
from ..protocol.token import SHORTEST, Payload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..protocol.token import Fernet
    from .store import Device


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
