"""Encrypted units: how frame headers cross the wire (docs/protocol.md, Encrypted units).

| cipher      | a unit on the wire                       | overhead |
|-------------|------------------------------------------|----------|
| aes-cbc     | CBC ciphertext, a multiple of 16 bytes   | 0        |
| aes-gcm     | nonce, 12 · ciphertext · tag, 16         | 28       |
| aes-gcm-siv | the same                                 | 28       |
"""

from __future__ import annotations

from struct import Struct

from ..errors import AuthenticationError, ConfigurationError
from .aes import TAG_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .aes import Aes

CIPHERS = ("aes-cbc", "aes-gcm", "aes-gcm-siv")
BLOCK_SIZE = 16
KEY_SIZE = 32
IV_SIZE = 16
NONCE_SIZE = 12
# | direction, 4: 0 from the client, 1 from the relay | counter, 8: one for each unit |
GCM_NONCE = Struct(">IQ")


class UnitCipher:
    """Seals the units that one side sends and opens those that it receives.

    One object serves one connection, both directions, in the order of the wire.
    """

    overhead: int
    """Bytes that a unit has on the wire beyond its plaintext."""

    def seal(self, units: Sequence[bytes]) -> list[bytes]:
        """Return the wire form of each of `units`, the next ones to be sent."""
        raise NotImplementedError

    def open(self, unit: bytes) -> bytes:
        """Return the plaintext of the next unit received.

        Raises AuthenticationError where the cipher can tell that it is forged.
        """
        raise NotImplementedError


class _Cbc(UnitCipher):
    """One unpadded CBC stream in each direction, unauthenticated."""

    overhead = 0

    def __init__(self, aes: Aes, key: bytes, iv: bytes) -> None:
        self._encrypt = aes.cbc_encryptor(key, iv)
        # A plain attribute, so that a call for each frame costs no more than it must.
        self.open = aes.cbc_decryptor(key, iv)  # type: ignore[method-assign,assignment]

    def seal(self, units: Sequence[bytes]) -> list[bytes]:
        if len(units) == 1:
            return [self._encrypt(units[0])]
        sealed, pieces, start = self._encrypt(b"".join(units)), [], 0
        for unit in units:
            end = start + len(unit)
            pieces.append(sealed[start:end])
            start = end
        return pieces


class _Gcm(UnitCipher):
    """Nonces count; the peer's must be exactly the next one, so nothing can be replayed."""

    overhead = NONCE_SIZE + TAG_SIZE

    def __init__(self, aes: Aes, key: bytes, *, is_relay: bool) -> None:
        self._seal, self._open = aes.gcm(key)
        self._direction = int(is_relay)
        self._sent = self._received = 0

    def seal(self, units: Sequence[bytes]) -> list[bytes]:
        pieces = []
        for unit in units:
            nonce = GCM_NONCE.pack(self._direction, self._sent)
            self._sent += 1
            pieces.append(nonce + self._seal(nonce, unit))
        return pieces

    def open(self, unit: bytes) -> bytes:
        nonce = unit[:NONCE_SIZE]
        if nonce != GCM_NONCE.pack(1 - self._direction, self._received):
            direction, counter = GCM_NONCE.unpack(nonce)
            raise AuthenticationError(
                f"aes-gcm nonce is ({direction}, {counter}), expected "
                f"({1 - self._direction}, {self._received})"
            )
        self._received += 1
        return self._open(nonce, unit[NONCE_SIZE:])


class _GcmSiv(UnitCipher):
    """A random nonce for each unit."""

    overhead = NONCE_SIZE + TAG_SIZE

    def __init__(self, aes: Aes, key: bytes, random: Callable[[int], bytes]) -> None:
        self._seal, self._open = aes.gcm_siv(key)
        self._random = random

    def seal(self, units: Sequence[bytes]) -> list[bytes]:
        nonces = [self._random(NONCE_SIZE) for _ in units]
        return [nonce + self._seal(nonce, unit) for nonce, unit in zip(nonces, units)]

    def open(self, unit: bytes) -> bytes:
        return self._open(unit[:NONCE_SIZE], unit[NONCE_SIZE:])


def unit_cipher(
    name: str,
    aes: Aes,
    key: bytes,
    iv: bytes,
    *,
    is_relay: bool,
    random: Callable[[int], bytes],
) -> UnitCipher:
    """Return the cipher `name` (one of CIPHERS) for one new connection.

    `key` has 32 bytes, `iv` 16 (used by aes-cbc only). `random` returns as many
    unpredictable bytes as it is asked for. Raises ConfigurationError for an
    unknown name, or where the crypto package lacks the cipher.
    """
    if name == "aes-cbc":
        return _Cbc(aes, key, iv)
    if name == "aes-gcm":
        return _Gcm(aes, key, is_relay=is_relay)
    if name == "aes-gcm-siv":
        return _GcmSiv(aes, key, random)
    raise ConfigurationError(f"cipher {name!r} is not known; expected {', '.join(CIPHERS)}")
