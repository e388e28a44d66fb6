"""Opening a tunnel: the relay's challenge and the client's answer (docs/protocol.md, Opening).

    client → relay   the token's text
    relay → client   one unit: the challenge, SHA-256 of 40 random bytes
    client → relay   one unit: the answer, SHA-256 of the challenge

Both sides work alike: send `first()`, give `receive` what comes until `is_done`,
and pass on `rest`: frames may arrive in the same segment.
"""

from __future__ import annotations

from ..errors import AuthenticationError, StrangerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .aes import Aes
    from .cipher import UnitCipher

CHALLENGE_SIZE = 32
RANDOM_SIZE = 40  # bytes; documents that say 40 bits are wrong
# What others than relays say first. No challenge starts so, but one in 2**40.
STRANGERS = (
    (b"HTTP/", "a web server: a captive portal, or a proxy"),
    (b"SSH-2", "an SSH server"),
    (b"\x15\x03\x01\0\2", "a TLS server"),  # an alert
    (b"\x15\x03\x03\0\2", "a TLS server"),
)


class Handshake:
    """What both sides have in common: one unit to wait for."""

    __slots__ = ("_aes", "_cipher", "_received", "is_done", "rest")

    def __init__(self, cipher: UnitCipher, aes: Aes) -> None:
        self._cipher, self._aes = cipher, aes
        self._received = bytearray()
        self.is_done = False
        self.rest = b""
        """What came behind the unit, once `is_done`: the first bytes of frames."""

    @property
    def unit_size(self) -> int:
        """Bytes on the wire of the unit that is waited for."""
        return CHALLENGE_SIZE + self._cipher.overhead

    @property
    def received_size(self) -> int:
        """Bytes that have come so far."""
        return len(self._received)

    def first(self) -> bytes:
        """Return what this side sends before it waits."""
        raise NotImplementedError

    def receive(self, data: bytes | memoryview) -> bytes:
        """Take the next bytes; return what to send in answer, maybe nothing.

        Raises AuthenticationError if the other side doesn't have the key.
        """
        self._received += data
        if len(self._received) < self.unit_size:
            return b""
        self.is_done = True
        unit, self.rest = self._received[: self.unit_size], bytes(self._received[self.unit_size :])
        return self._unit_received(self._cipher.open(bytes(unit)))

    def _unit_received(self, unit: bytes) -> bytes:
        raise NotImplementedError


class ClientHandshake(Handshake):
    """The client's side."""

    __slots__ = ("_token",)

    def __init__(self, cipher: UnitCipher, aes: Aes, token: str) -> None:
        super().__init__(cipher, aes)
        self._token = token

    def first(self) -> bytes:
        return self._token.encode("ascii")

    def receive(self, data: bytes | memoryview) -> bytes:
        """Take the next bytes; return the answer to the challenge, or nothing yet.

        Raises StrangerError where something else than a relay answers.
        """
        first = bytes(self._received[:5]) + bytes(data[:5])
        for start, who in STRANGERS:
            if first.startswith(start):
                raise StrangerError(f"no relay answers at its address, but {who}")
        return super().receive(data)

    def _unit_received(self, unit: bytes) -> bytes:
        return self._cipher.seal([self._aes.sha256(unit)])[0]


class RelayHandshake(Handshake):
    """The relay's side, from the moment that the token is known to be good."""

    __slots__ = ("_challenge",)

    def __init__(self, cipher: UnitCipher, aes: Aes, random: Callable[[int], bytes]) -> None:
        super().__init__(cipher, aes)
        self._challenge = aes.sha256(random(RANDOM_SIZE))

    def first(self) -> bytes:
        return self._cipher.seal([self._challenge])[0]

    def _unit_received(self, unit: bytes) -> bytes:
        from hmac import compare_digest  # noqa: PLC0415  brings OpenSSL: no client needs it

        if not compare_digest(unit, self._aes.sha256(self._challenge)):
            raise AuthenticationError("the answer to the challenge is wrong: another key or IV")
        return b""
