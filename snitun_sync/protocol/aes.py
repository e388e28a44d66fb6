"""The one place that knows the crypto package, with direct_cbc.py behind it.

pycryptodome is the default (as `Crypto`, or as `Cryptodome`, Debian's name for
it); `cryptography` serves when that is missing or asked for. Both give the same
few operations; nothing else in snitun_sync knows which one is at work.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from ..errors import AuthenticationError, ConfigurationError
from .direct_cbc import direct_cbc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Transform = Callable[[bytes], bytes]
    """Encrypts or decrypts the next whole blocks of one CBC stream."""
    Aead = Callable[[bytes, bytes], bytes]
    """Takes a nonce and a text; returns the text sealed (tag at its end) or opened."""

TAG_SIZE = 16
BACKENDS = ("pycryptodome", "cryptography")


class Aes:
    """The operations that SniTun needs from a crypto package.

    Keys have 16 or 32 bytes, CBC's initial vectors 16, AEAD nonces 12. The
    functions returned keep what they need; they are not thread-safe.
    """

    name: str

    def cbc_encryptor(self, key: bytes, iv: bytes) -> Transform:
        """Return the encrypting end of a CBC stream without padding."""
        raise NotImplementedError

    def cbc_decryptor(self, key: bytes, iv: bytes) -> Transform:
        """Return the decrypting end of a CBC stream without padding."""
        raise NotImplementedError

    def gcm(self, key: bytes) -> tuple[Aead, Aead]:
        """Return AES-GCM's seal and open; open raises AuthenticationError."""
        raise NotImplementedError

    def gcm_siv(self, key: bytes) -> tuple[Aead, Aead]:
        """Return AES-GCM-SIV's seal and open (RFC 8452).

        Raises ConfigurationError where the installed package can't do it.
        """
        raise NotImplementedError

    def sha256(self, data: bytes) -> bytes:
        """Return the SHA-256 of `data`."""
        raise NotImplementedError


class _Pycryptodome(Aes):
    name = "pycryptodome"

    def __init__(self, *, may_use_other: bool) -> None:
        self._aes, self._sha256 = _import_pycryptodome()
        self._may_use_other = may_use_other
        self._direct = direct_cbc(self._aes)

    def cbc_encryptor(self, key: bytes, iv: bytes) -> Transform:
        if self._direct is not None:
            return self._direct.stream(key, iv, is_encrypting=True)
        encrypt: Transform = self._aes.new(key, self._aes.MODE_CBC, iv).encrypt
        return encrypt

    def cbc_decryptor(self, key: bytes, iv: bytes) -> Transform:
        if self._direct is not None:
            return self._direct.stream(key, iv, is_encrypting=False)
        decrypt: Transform = self._aes.new(key, self._aes.MODE_CBC, iv).decrypt
        return decrypt

    def gcm(self, key: bytes) -> tuple[Aead, Aead]:
        new, mode = self._aes.new, self._aes.MODE_GCM

        def seal(nonce: bytes, plaintext: bytes) -> bytes:
            ciphertext, tag = new(key, mode, nonce=nonce).encrypt_and_digest(plaintext)
            return bytes(ciphertext + tag)

        def open_(nonce: bytes, sealed: bytes) -> bytes:
            cipher = new(key, mode, nonce=nonce)
            try:
                plaintext = cipher.decrypt_and_verify(sealed[:-TAG_SIZE], sealed[-TAG_SIZE:])
            except ValueError:
                raise AuthenticationError("AES-GCM: the tag doesn't match") from None
            return bytes(plaintext)

        return seal, open_

    def gcm_siv(self, key: bytes) -> tuple[Aead, Aead]:
        if self._may_use_other:
            try:
                return load("cryptography").gcm_siv(key)
            except ConfigurationError:
                pass
        raise _no_gcm_siv("pycryptodome doesn't have it")

    def sha256(self, data: bytes) -> bytes:
        hashlib = sys.modules.get("hashlib")  # where it is loaded, as in the relay, it is faster
        if hashlib is not None:
            return bytes(hashlib.sha256(data).digest())
        return bytes(self._sha256.new(data).digest())


class _Cryptography(Aes):
    name = "cryptography"

    def __init__(self) -> None:
        ciphers = import_module("cryptography.hazmat.primitives.ciphers")
        self._cipher = ciphers.Cipher
        self._algorithm = ciphers.algorithms.AES
        self._cbc = ciphers.modes.CBC

    def cbc_encryptor(self, key: bytes, iv: bytes) -> Transform:
        update: Transform = self._cipher(self._algorithm(key), self._cbc(iv)).encryptor().update
        return update

    def cbc_decryptor(self, key: bytes, iv: bytes) -> Transform:
        update: Transform = self._cipher(self._algorithm(key), self._cbc(iv)).decryptor().update
        return update

    def gcm(self, key: bytes) -> tuple[Aead, Aead]:
        return self._aead("AESGCM", key)

    def gcm_siv(self, key: bytes) -> tuple[Aead, Aead]:
        try:
            return self._aead("AESGCMSIV", key)
        except AttributeError:  # cryptography before 42
            version = import_module("cryptography").__version__
            raise _no_gcm_siv(f"cryptography {version} doesn't have it") from None
        except import_module("cryptography.exceptions").UnsupportedAlgorithm:
            raise _no_gcm_siv("the OpenSSL under cryptography doesn't have it") from None

    def _aead(self, name: str, key: bytes) -> tuple[Aead, Aead]:
        aead = import_module("cryptography.hazmat.primitives.ciphers.aead")
        invalid_tag = import_module("cryptography.exceptions").InvalidTag
        cipher = getattr(aead, name)(key)

        def seal(nonce: bytes, plaintext: bytes) -> bytes:
            return bytes(cipher.encrypt(nonce, plaintext, None))

        def open_(nonce: bytes, sealed: bytes) -> bytes:
            try:
                return bytes(cipher.decrypt(nonce, sealed, None))
            except invalid_tag:
                raise AuthenticationError(f"{name}: the tag doesn't match") from None

        return seal, open_

    def sha256(self, data: bytes) -> bytes:
        import hashlib  # noqa: PLC0415  OpenSSL is in memory already, with this package

        return hashlib.sha256(data).digest()


def _no_gcm_siv(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"cipher aes-gcm-siv: {reason}; install cryptography 42 or newer (its wheels from PyPI "
        "bring the OpenSSL 3.2 that it takes) and choose it with --crypto cryptography, or use "
        "a token with cipher aes-gcm or aes-cbc"
    )


def _import_pycryptodome() -> tuple[ModuleType, ModuleType]:
    """Return pycryptodome's modules Cipher.AES and Hash.SHA256.

    What they would pull in without need is out of sight while they load: cffi, with
    pycparser (1.7 MiB; ctypes serves them as well and as fast); ctypes.util, with
    subprocess, shutil and tempfile (1.4 MiB, to find libraries outside of pycryptodome);
    platform, which would start `file` to tell that this is not Windows. Another thread
    that imports the last two meanwhile would see them so: then they are left alone.
    """
    hidden: dict[str, ModuleType | None] = {"cffi": None}
    if sys.platform != "win32" and len(sys._current_frames()) == 1:
        hidden["ctypes.util"] = util = ModuleType("ctypes.util")
        util.find_library = _find_library  # type: ignore[attr-defined]
        hidden["platform"] = platform = ModuleType("platform")
        platform.architecture = lambda: ("", "ELF")  # type: ignore[attr-defined]
    hidden = {name: module for name, module in hidden.items() if name not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type]
    try:
        for package in ("Crypto", "Cryptodome"):
            try:
                # The name `Crypto` may also be PyCrypto, dead since 2013 and without GCM.
                if import_module(package).version_info[0] >= 3:
                    return (
                        import_module(f"{package}.Cipher.AES"),
                        import_module(f"{package}.Hash.SHA256"),
                    )
            except ImportError:
                continue
    finally:
        for name in hidden:
            del sys.modules[name]
    raise ImportError("neither Crypto nor Cryptodome")


def _find_library(name: str) -> str | None:
    """ctypes.util.find_library for whatever else of pycryptodome is imported later."""
    found: str | None = import_module("ctypes.util").find_library(name)
    return found


_loaded: dict[str, Aes] = {}


def load(name: str = "") -> Aes:
    """Return the backend `name`, "pycryptodome" or "cryptography".

    With no name it is pycryptodome, or cryptography where that is missing; and a
    cipher that pycryptodome lacks is taken from cryptography. Raises
    ConfigurationError that says what to install.
    """
    if name not in ("", *BACKENDS):
        raise ConfigurationError(
            f"crypto package {name!r} is not known; expected {' or '.join(BACKENDS)}"
        )
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name]


def _load(name: str) -> Aes:
    if name != "cryptography":
        try:
            return _Pycryptodome(may_use_other=not name)
        except ImportError:
            if name:
                raise ConfigurationError(
                    "pycryptodome is not installed: pip install pycryptodome "
                    "(Debian: apt install python3-pycryptodome)"
                ) from None
    try:
        return _Cryptography()
    except ImportError:
        raise ConfigurationError(
            "cryptography is not installed: pip install cryptography"
            if name
            else "no crypto package is installed: pip install pycryptodome "
            "(Debian: apt install python3-pycryptodome)"
        ) from None
