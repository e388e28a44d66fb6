"""AES-CBC by pycryptodome's C functions, without the Python code that it has around them.

That code takes 2 µs for each call and 10 for each new stream, more than all else that a
small frame needs here. The functions are no public interface: `direct_cbc` tries them
out, on two streams, and where anything is not as expected pycryptodome is used as usual.
"""

from __future__ import annotations

from importlib import import_module

from ..errors import MisuseError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any


class DirectCbc:
    """The C functions, and what calling them takes."""

    def __init__(self, aes: ModuleType) -> None:
        """`aes` is pycryptodome's module Cipher.AES. Raises AttributeError and the like."""
        import ctypes  # noqa: PLC0415  loaded already, if this is how pycryptodome calls C

        if (hardware := getattr(aes, "_raw_aes_hw", None)) is not None:  # from 4.0 on
            self._start_cipher, self._stop_cipher = hardware
        elif (library := getattr(aes, "_raw_aesni_lib", None)) is not None:
            self._start_cipher = library.AESNI_start_operation
            self._stop_cipher = library.AESNI_stop_operation
        else:
            self._start_cipher = aes._raw_aes_lib.AES_start_operation
            self._stop_cipher = aes._raw_aes_lib.AES_stop_operation
        path = import_module(aes.__name__.replace("AES", "_mode_cbc")).raw_cbc_lib._name
        # PyDLL: without letting other threads run; it is over before one would start.
        library = ctypes.PyDLL(path)
        self._start, self.stop = library.CBC_start_operation, library.CBC_stop_operation
        self._functions = (library.CBC_decrypt, library.CBC_encrypt)
        pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
        self._start.argtypes = (pointer, text, size, ctypes.POINTER(pointer))
        self.stop.argtypes = (pointer,)
        for function in self._functions:
            function.argtypes = (pointer, text, text, size)
        self._pointer, self._size, self._byref = pointer, size, ctypes.byref
        self.char = ctypes.c_char

    def stream(self, key: bytes, iv: bytes, *, is_encrypting: bool) -> Stream:
        """Return one end of a CBC stream without padding."""
        cipher, state = self._pointer(), self._pointer()
        if self._start_cipher(key, self._size(len(key)), self._byref(cipher)):
            raise MisuseError(f"AES takes keys of 16 or 32 bytes, not {len(key)}")
        if self._start(cipher, iv, len(iv), self._byref(state)):
            self._stop_cipher(cipher)
            raise MisuseError(f"AES-CBC takes an initial vector of 16 bytes, not {len(iv)}")
        # The block cipher is the stream's now.
        return Stream(self, self._functions[is_encrypting], state)


class Stream:
    """Call it with whole blocks; it returns them encrypted or decrypted. Frees itself."""

    __slots__ = ("_function", "_library", "_state")

    def __init__(self, library: DirectCbc, function: Any, state: Any) -> None:
        self._library, self._function, self._state = library, function, state

    def __call__(self, data: bytes) -> bytes:
        size = len(data)
        buffer = (self._library.char * size)()
        if self._function(self._state, data, buffer, size):
            raise MisuseError(f"AES-CBC takes whole blocks, not {size} bytes")
        return buffer.raw

    def __del__(self) -> None:
        self._library.stop(self._state)


def direct_cbc(aes: ModuleType) -> DirectCbc | None:
    """Return the functions of pycryptodome's module Cipher.AES, or None if they aren't right."""
    key, data = bytes(range(32)), bytes(range(96))
    try:
        direct = DirectCbc(aes)
        encrypt = direct.stream(key, key[:16], is_encrypting=True)
        decrypt = direct.stream(key, key[:16], is_encrypting=False)
        sealed = encrypt(data[:32]) + encrypt(data[32:])
        opened = decrypt(sealed[:64]) + decrypt(sealed[64:])
    except (AttributeError, ImportError, MisuseError, OSError, TypeError, ValueError):
        return None
    is_right = sealed == aes.new(key, aes.MODE_CBC, key[:16]).encrypt(data) and opened == data
    return direct if is_right else None
