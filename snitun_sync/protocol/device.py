"""A device of the session master, that is a client: its id and its secret.

ID       16 of a-z2-7: 10 random bytes in base32 (RFC 4648); no secret
SECRET   43 characters: 32 random bytes in URL-safe base64 without padding
ID.SECRET, the credential, goes into `Authorization: Bearer …`
"""

from __future__ import annotations

import base64

from ..errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ID_BYTES, ID_CHARACTERS = 10, 16
SECRET_BYTES, SECRET_CHARACTERS = 32, 43
_BASE32 = frozenset("abcdefghijklmnopqrstuvwxyz234567")


def new_id(random: Callable[[int], bytes]) -> str:
    """Return a new device's id; `random` gives unpredictable bytes."""
    return base64.b32encode(random(ID_BYTES)).decode().lower()


def new_secret(random: Callable[[int], bytes]) -> str:
    """Return a new secret; `random` gives unpredictable bytes."""
    return base64.urlsafe_b64encode(random(SECRET_BYTES)).decode().rstrip("=")


def is_device_id(text: str) -> bool:
    """Tell whether `text` has the form of a device's id."""
    return len(text) == ID_CHARACTERS and _BASE32.issuperset(text)


def secret_bytes(text: str) -> bytes | None:
    """Return the 32 bytes of a secret, None where `text` is none."""
    if len(text) != SECRET_CHARACTERS or not text.isascii():
        return None
    if not text.replace("-", "a").replace("_", "a").isalnum():
        return None
    data = base64.urlsafe_b64decode(text + "=")
    # The last character has two bits that mean nothing: there is one way to write a secret.
    is_canonical = base64.urlsafe_b64encode(data).decode().rstrip("=") == text
    return data if is_canonical else None


def parse_credential(text: str, device_id: str = "") -> tuple[str, str]:
    """Return id and secret of `ID.SECRET`, or of a secret alone where `device_id` gives the id.

    White space around it is allowed. Raises ConfigurationError, which shows nothing of it.
    """
    found_id, dot, secret = text.strip().rpartition(".")
    if not secret:
        raise ConfigurationError("no secret is in it; expected ID.SECRET")
    if not dot and not device_id:
        raise ConfigurationError("a secret without its device's id; expected ID.SECRET")
    if dot and not is_device_id(found_id):
        raise ConfigurationError(
            f"no credential; expected ID.SECRET, an id of {ID_CHARACTERS} characters (a-z, 2-7)"
        )
    if dot and device_id not in ("", found_id):
        raise ConfigurationError(f"the secret of device {found_id}; expected that of {device_id}")
    if secret_bytes(secret) is None:
        found = f"a secret of {len(secret)} characters"
        if len(secret) == SECRET_CHARACTERS:
            found = "a secret that isn't whole, or was changed"
        raise ConfigurationError(f"{found}; expected {SECRET_CHARACTERS} of URL-safe base64")
    return found_id or device_id, secret
