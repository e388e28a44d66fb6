"""Both crypto packages do the same, and what is missing is said."""

from __future__ import annotations

import platform
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snitun_sync.errors import AuthenticationError, ConfigurationError
from snitun_sync.protocol import aes as module
from snitun_sync.protocol import direct_cbc as direct_cbc_module
from snitun_sync.protocol.aes import Aes, load
from tests.support import PROJECT

KEY, IV = bytes(range(32)), bytes(range(16))


def test_cbc_is_one_stream(aes: Aes) -> None:
    # NIST SP 800-38A, F.2.5, CBC-AES256
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    sealed = bytes.fromhex(
        "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d"
        "39f23369a9d9bacfa530e26304231461b2eb05e2c39be9fcda6c19078c6a9d1b"
    )
    encrypt, decrypt = aes.cbc_encryptor(key, IV), aes.cbc_decryptor(key, IV)
    assert encrypt(plain[:16]) + encrypt(plain[16:]) == sealed
    assert decrypt(sealed[:48]) + decrypt(sealed[48:]) == plain


def test_sha256(aes: Aes) -> None:
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert aes.sha256(b"abc").hex() == wanted


def test_gcm_opens_what_it_sealed_and_nothing_else(aes: Aes) -> None:
    seal, open_ = aes.gcm(KEY)
    sealed = seal(bytes(12), b"header")
    assert len(sealed) == 6 + module.TAG_SIZE
    assert open_(bytes(12), sealed) == b"header"
    for nonce, forged in (
        (b"x" * 12, sealed),
        (bytes(12), sealed[:-1] + b"x"),
        (bytes(12), b"x" * 22),
    ):
        with pytest.raises(AuthenticationError):
            open_(nonce, forged)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=256).map(lambda data: data[: len(data) // 16 * 16]))
def test_both_packages_agree(data: bytes) -> None:
    one, other = load("pycryptodome"), load("cryptography")
    assert one.cbc_encryptor(KEY, IV)(data) == other.cbc_encryptor(KEY, IV)(data)
    assert one.cbc_decryptor(KEY, IV)(data) == other.cbc_decryptor(KEY, IV)(data)
    assert one.gcm(KEY)[0](bytes(12), data) == other.gcm(KEY)[0](bytes(12), data)


def test_gcm_siv_is_rfc_8452() -> None:
    # RFC 8452, C.2, the second vector
    key, nonce = bytes.fromhex("01" + "00" * 31), bytes.fromhex("03" + "00" * 11)
    wanted = bytes.fromhex("c2ef328e5c71c83b843122130f7364b761e0b97427e3df28")
    seal, open_ = load("cryptography").gcm_siv(key)
    assert seal(nonce, bytes.fromhex("0100000000000000")) == wanted
    assert open_(nonce, wanted) == bytes.fromhex("0100000000000000")
    with pytest.raises(AuthenticationError):
        open_(nonce, wanted[:-1] + b"x")


def test_default_takes_gcm_siv_from_the_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_loaded", {})  # whatever --crypto says
    assert load().name == "pycryptodome"
    load().gcm_siv(KEY)


def test_what_to_install_for_gcm_siv(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"pycryptodome doesn't .*install cryptography 42"):
        load("pycryptodome").gcm_siv(KEY)
    # Debian bookworm's cryptography 38
    monkeypatch.delattr("cryptography.hazmat.primitives.ciphers.aead.AESGCMSIV")
    with pytest.raises(ConfigurationError, match=r"cryptography .* doesn't have it; install"):
        load("cryptography").gcm_siv(KEY)
    with pytest.raises(ConfigurationError, match="install cryptography 42"):
        load().gcm_siv(KEY)


def in_a_new_python(code: str) -> str:
    """Run `code` with this Python and return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout


HIDE = "import sys; sys.modules[{!r}] = None; "


def test_cryptodome_serves_where_crypto_is_missing() -> None:
    code = HIDE.format("Crypto") + (
        "from snitun_sync.protocol.aes import load; "
        "load().cbc_encryptor(bytes(32), bytes(16)); "
        "print(load().name, 'Cryptodome' in sys.modules)"
    )
    assert in_a_new_python(code) == "pycryptodome True\n"


def test_pycrypto_is_not_taken_for_pycryptodome(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("Crypto")
    old.version_info = (2, 6, 1, "final", 0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "Crypto", old)
    cipher, _ = module._import_pycryptodome()
    assert cipher.__name__.startswith("Cryptodome.")


def test_cryptography_serves_where_pycryptodome_is_missing() -> None:
    code = (
        HIDE.format("Crypto")
        + HIDE.format("Cryptodome")
        + (
            "from snitun_sync.protocol.aes import load; print(load().name)\n"
            "try: load('pycryptodome')\n"
            "except Exception as error: print(error)"
        )
    )
    printed = in_a_new_python(code)
    assert printed.startswith("cryptography\n")
    assert "pip install pycryptodome" in printed


def test_without_any_package() -> None:
    code = "".join(HIDE.format(name) for name in ("Crypto", "Cryptodome", "cryptography")) + (
        "from snitun_sync.protocol.aes import load\n"
        "for name in ('', 'cryptography'):\n"
        "  try: load(name)\n"
        "  except Exception as error: print(type(error).__name__, error)"
    )
    first, second = in_a_new_python(code).splitlines()
    assert first.startswith("ConfigurationError no crypto package")
    assert second.startswith("ConfigurationError cryptography is not installed")


def test_unknown_package() -> None:
    with pytest.raises(
        ConfigurationError, match="'openssl' is not known; expected pycryptodome or"
    ):
        load("openssl")


def test_cffi_stays_out_of_memory() -> None:
    code = (
        "import sys; from snitun_sync.protocol.aes import load; load().gcm(bytes(32)); "
        "print('cffi' in sys.modules, 'pycparser' in sys.modules); import cffi"
    )
    assert in_a_new_python(code) == "False False\n"


def test_what_pycryptodome_needs_not_stays_out_of_memory() -> None:
    code = (
        "import sys; from snitun_sync.protocol.aes import load; load(); "
        "print([name for name in ('ctypes.util', 'platform', 'shutil') if name in sys.modules]); "
        "import ctypes.util, platform; print(ctypes.util.find_library('c'), platform.system()); "
        "from Crypto.Util import _raw_api; print(_raw_api.find_library('c'))"
    )
    names, real, later = in_a_new_python(code).splitlines()
    assert names == "[]"
    assert real == f"{later} {platform.system()}"


DIRECT = (
    "import sys, {}\n"
    "from snitun_sync.errors import MisuseError\n"
    "from snitun_sync.protocol.aes import load\n"
    "aes = load('pycryptodome')\n"
    "key, iv = bytes(32), bytes(16)\n"
    "encrypt, decrypt = aes.cbc_encryptor(key, iv), aes.cbc_decryptor(key, iv)\n"
    "print(aes._direct is not None, decrypt(encrypt(b'x' * 48)) == b'x' * 48)\n"
    "for call in (lambda: encrypt(b'x' * 17), lambda: aes.cbc_encryptor(bytes(5), iv),\n"
    "             lambda: aes.cbc_encryptor(key, bytes(5))):\n"
    "    try: call()\n"
    "    except (MisuseError, ValueError): print('refused')\n"
)


@pytest.mark.parametrize(
    ("before", "is_direct"),
    [
        ("os", True),  # as in the programs
        ("cffi", False),  # pycryptodome takes it where it is loaded
    ],
)
def test_cbc_directly_and_by_the_public_interface(before: str, is_direct: bool) -> None:
    printed = in_a_new_python(DIRECT.format(before)).splitlines()
    assert printed == [f"{is_direct} True", "refused", "refused", "refused"]


def test_functions_that_do_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cipher, _ = module._import_pycryptodome()

    class Wrong(direct_cbc_module.DirectCbc):
        def __init__(self, aes: ModuleType) -> None:
            pass

        def stream(self, key: bytes, iv: bytes, *, is_encrypting: bool) -> Any:
            return lambda data: data

    monkeypatch.setattr(direct_cbc_module, "DirectCbc", Wrong)
    assert direct_cbc_module.direct_cbc(cipher) is None
