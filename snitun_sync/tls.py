"""TLS that ends here: the certificate that is shown, and the stream of each connection.

Only who terminates TLS loads this module: `ssl` takes 4 MiB.
"""

from __future__ import annotations

import logging
import re
import ssl
import time

from .errors import ChannelError, ConfigurationError, ExpiredError, UsageError
from .net.loop import utc
from .net.sockets import reason
from .program import file_stamp, read_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

log = logging.getLogger("snitun_sync")

# RFC 8446, 5.1. OpenSSL's buffers grow to what is put into them, and stay so for as long as the
# connection lives: what goes in or out is handed over in portions of this size.
RECORD_BYTES = 16 * 1024
# RFC 9325: for TLS 1.2, what keeps past connections secret when the key gets lost. TLS 1.3
# has nothing else.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
# x509_vfy.h: to trust the leaf itself (in Python since 3.10), and whatever its dates are.
_PARTIAL_CHAIN, _NO_CHECK_TIME = 0x80000, 0x200000
_OTHERS_KEY = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


class Loaded:
    """What is in the files of a certificate, and works."""

    def __init__(
        self,
        context: ssl.SSLContext | None = None,
        leaf: bytes = b"",
        names: tuple[str, ...] = (),
        not_before: float = 0.0,
        not_after: float = 0.0,
    ) -> None:
        self.context = context
        """What a TlsStream is made with; None where nothing counts yet."""
        self.leaf = leaf
        """The server's own certificate, in DER."""
        self.names = names
        """The hostnames and addresses that it is for."""
        self.not_before, self.not_after = not_before, not_after
        """When it is valid, UTC Unix seconds."""


class Certificate(Loaded):
    """A certificate with its chain and key, in PEM files that may change."""

    def __init__(
        self, cert_path: str, key_path: str, alpn: Sequence[str], option: str = "--tls-cert"
    ) -> None:
        """Nothing is read yet. `key_path` is "" where the key is in the certificate's file.

        `alpn`: the protocols that are offered, best first; `option`: how messages call
        the certificate's option, which ends in `cert`.
        """
        super().__init__()
        self.failure = ""
        """Why what is in the files doesn't count, "" if it does."""
        self.tried: object = None
        """What `stamp` said when the files were read last."""
        self.is_news = True
        """Whether that was another thing than the time before: who warned then needn't now."""
        self._path, self._option = cert_path, option
        self._key_path = key_path or cert_path
        self._key_option = f"{option[: -len('cert')]}key" if key_path else option
        self._alpn = tuple(alpn)

    def __str__(self) -> str:
        return f"{self._path}, valid until {utc(self.not_after)} UTC"

    def doubt(self) -> str:
        """Return why devices don't get a certificate, or don't take it; "" if they may."""
        if self.context is None:
            return self.failure
        now = time.time()
        return self._expired(self, now) if self.not_after <= now else ""

    def stamp(self) -> object:
        """Return what is another thing as soon as the files have changed."""
        return file_stamp(self._path), file_stamp(self._key_path)

    def take(self, loaded: Loaded) -> None:
        """Let it count, for devices that come from now on."""
        self.context, self.leaf, self.names = loaded.context, loaded.leaf, loaded.names
        self.not_before, self.not_after = loaded.not_before, loaded.not_after
        self.failure = ""

    def inherit(self, former: Certificate) -> None:
        """Go on with what counted for `former`, where nothing counts here, or not yet."""
        failure, now = self.failure, time.time()
        if self.context is not None:
            if self.not_before <= now or not former.is_valid(now):
                return
            failure = self._early(self, now)
        self.take(former)
        self.failure = failure

    def is_valid(self, now: float) -> bool:
        """Tell whether what counts is valid at a time, UTC Unix seconds."""
        return self.context is not None and self.not_before <= now < self.not_after

    def blocking_load(self) -> Loaded:
        """Read and check the files; `take` is what makes them count. Raises ConfigurationError.

        That is ExpiredError where time is the reason. One whose time hasn't come yet is taken,
        unless another one is valid: it is the clock that is wrong, of a machine that has just
        started without a battery.
        """
        before, self.tried = self.tried, self.stamp()
        self.is_news = is_news = self.tried != before
        is_one_file = self._key_path == self._path
        text = self._read(self._path, self._option, is_secret=is_news and is_one_file)
        # What is cut off ends somewhere else, and is malformed.
        blocks = [_BEGIN + part.partition(_END)[0] + _END for part in text.split(_BEGIN)[1:]]
        if not blocks:
            raise self._missing("certificate", self._path, self._option)
        chain = [
            self._trusting(block, f"{n} of {len(blocks)}") for n, block in enumerate(blocks, 1)
        ]
        if not is_one_file:
            text = self._read(self._key_path, self._key_option, is_secret=is_news)
        if " PRIVATE KEY-----" not in text:
            raise self._missing("private key", self._key_path, self._key_option)
        context = self._serving(chain)
        loaded = self._shaken(context, chain[0])
        now = time.time()
        if loaded.not_after <= now:
            raise ExpiredError(self._expired(loaded, now))
        if loaded.not_before > now:
            early = self._early(loaded, now)
            if self.is_valid(now):
                raise ExpiredError(early)
            if is_news:
                log.warning("%s; using it unless there is another one", early)
        return loaded

    # --- what is checked -------------------------------------------------------------

    def _read(self, path: str, option: str, *, is_secret: bool) -> str:
        if path == "-":
            raise UsageError(f"{option}: standard input; expected a file, to be read again")
        # What isn't ASCII may be in a comment; elsewhere it mustn't become something that fits.
        return read_bytes(path, option, is_secret=is_secret).decode("ascii", "backslashreplace")

    def _missing(self, what: str, path: str, option: str) -> ConfigurationError:
        return ConfigurationError(
            f"{option}: no {what} in {path}; expected PEM, with -----BEGIN {what.upper()}-----"
        )

    def _trusting(self, block: str, number: str) -> ssl.SSLContext:
        """Return a device that takes this very certificate, and no other."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= _PARTIAL_CHAIN | _NO_CHECK_TIME
        try:
            context.load_verify_locations(cadata=block)
        except (ssl.SSLError, ValueError):
            said = f"certificate {number} in {self._path} is malformed; expected PEM, whole"
            raise ConfigurationError(f"{self._option}: {said}") from None
        return context

    def _serving(self, chain: list[ssl.SSLContext]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        context.options |= ssl.OP_NO_RENEGOTIATION
        # Devices know best what they are quick at; all that is left is strong.
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
        context.set_alpn_protocols(self._alpn)

        def passphrase() -> str:  # or else OpenSSL would ask on the terminal
            said = f"the key in {self._key_path} is encrypted; expected one without a passphrase"
            raise ConfigurationError(f"{self._key_option}: {said}")

        try:
            context.load_cert_chain(self._path, self._key_path, passphrase)
        except OSError as error:
            said = f"the key in {self._key_path} "
            what = getattr(error, "reason", None)
            if what in _OTHERS_KEY:
                said += f"doesn't belong to the certificate in {self._path}"
                if len(chain) > 1 and chain[0].cert_store_stats()["x509_ca"]:
                    said += ", where an authority's comes first; expected the server's own first"
            elif what is None and isinstance(error, ssl.SSLError):
                said += "is malformed; expected PEM, whole"
            else:
                said += f"can't be used with the certificate in {self._path}: {said_by(error)}"
            raise ConfigurationError(f"{self._key_option}: {said}") from None
        return context

    def _shaken(self, context: ssl.SSLContext, trusting: ssl.SSLContext) -> Loaded:
        """Shake hands as a device would; return what that has shown."""
        stream, incoming, outgoing = TlsStream(context), ssl.MemoryBIO(), ssl.MemoryBIO()
        device = trusting.wrap_bio(incoming, outgoing)
        try:
            for _ in range(3):  # TLS 1.3 needs two rounds
                try:
                    device.do_handshake()
                except ssl.SSLWantReadError:
                    pass
                stream.receive(outgoing.read())
                stream.handshake()
                incoming.write(stream.pending())
            shown: dict[str, Any] = device.getpeercert() or {}
            leaf = device.getpeercert(binary_form=True) or b""
        except (ssl.SSLError, ValueError, ChannelError) as error:
            said = f"no device takes the certificate in {self._path}: {said_by(error)}"
            raise ConfigurationError(f"{self._option}: {said}") from None
        return Loaded(
            context,
            leaf,
            names=tuple(name[1] for name in shown.get("subjectAltName", ())),
            not_before=ssl.cert_time_to_seconds(shown["notBefore"]),
            not_after=ssl.cert_time_to_seconds(shown["notAfter"]),
        )

    def _by_the_clock(self, now: float) -> str:
        return f"by this machine's clock ({utc(now)} UTC) the certificate in {self._path}"

    def _early(self, loaded: Loaded, now: float) -> str:
        said = f"{self._by_the_clock(now)} is valid from {utc(loaded.not_before)} UTC on"
        return f"{self._option}: {said}; expected one that is valid"

    def _expired(self, loaded: Loaded, now: float) -> str:
        said = f"{self._by_the_clock(now)} expired at {utc(loaded.not_after)} UTC"
        return f"{self._option}: {said}; expected one that is valid"


class TlsStream:
    """The server's side of one device's TLS, without a socket: bytes in, bytes out.

    Only one thread at a time may use it, but for `receive`: a worker thread may shake
    hands meanwhile.
    """

    __slots__ = ("_incoming", "_object", "_outgoing", "_received", "is_ended")

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._received: list[memoryview] = []  # not yet given to OpenSSL
        self.is_ended = False
        """Whether the device has said that it sends no more."""

    @property
    def alpn(self) -> str:
        """The protocol that both sides speak, "" where they haven't agreed on any."""
        return self._object.selected_alpn_protocol() or ""

    @property
    def version(self) -> str:
        """Such as TLSv1.3; "" before the handshake is done, as with `cipher`."""
        return self._object.version() or ""

    @property
    def cipher(self) -> str:
        """OpenSSL's name of the cipher, such as TLS_AES_128_GCM_SHA256."""
        found = self._object.cipher()
        return found[0] if found is not None else ""

    def receive(self, data: bytes | memoryview) -> None:
        """Take ciphertext. It isn't copied: it must stay as it is until `decrypt` returns 0."""
        self._received.append(memoryview(data))

    def handshake(self) -> bool:
        """Go on with the handshake; return whether it is done. Raises ChannelError.

        In either case, what `pending` returns then has to be sent.
        """
        while True:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                if not self._feed():
                    return False
            except ssl.SSLError as error:
                raise ChannelError(f"TLS handshake: {said_by(error)}") from None
            else:
                return True

    def decrypt(self, into: memoryview) -> int:
        """Fill `into` with plaintext and return how much; 0: no more. Raises ChannelError."""
        size, tls = 0, self._object
        read: Any = tls.read  # returns how much, where it has a buffer
        while size < len(into) and not self.is_ended:
            if not (self._incoming.pending or tls.pending() or self._feed()):
                break
            try:
                count = read(len(into) - size, into[size:])
            except ssl.SSLWantReadError:
                continue  # that was a part of a record, or none with plaintext
            except ssl.SSLZeroReturnError:
                count = 0
            except ssl.SSLError as error:
                raise ChannelError(f"TLS: {said_by(error)}") from None
            if not count:
                self.is_ended = True
                self._received.clear()
            size += count
        return size

    def _feed(self) -> bool:
        """Give OpenSSL a portion of what was received; return False where there is none."""
        if not self._received:
            return False
        data = self._received.pop(0)
        self._incoming.write(data[:RECORD_BYTES])
        if len(data) > RECORD_BYTES:
            self._received.insert(0, data[RECORD_BYTES:])
        return True

    def encrypt(self, data: bytes | bytearray | memoryview) -> bytes:
        """Return what to send for `data`, and whatever else is pending. Raises ChannelError."""
        records, at = [], 0
        with memoryview(data) as plaintext:
            while at < len(plaintext):
                # Released also where an error keeps frames: else nobody could resize the buffer.
                with plaintext[at : at + RECORD_BYTES] as portion:
                    try:
                        at += self._object.write(portion)
                    except ssl.SSLError as error:
                        raise ChannelError(f"TLS: {said_by(error)}") from None
                records.append(self._outgoing.read())
        return b"".join(records)

    def pending(self) -> bytes:
        """Return what has to be sent besides: of a handshake, answers, the alert of a failure."""
        return self._outgoing.read()

    def finish(self) -> bytes:
        """Return what tells the device that no more comes. It may still send."""
        try:
            self._object.unwrap()
        except ssl.SSLError:
            pass  # it hasn't said the same yet
        return self._outgoing.read()


def said_by(error: Exception) -> str:
    """Return what an error of TLS or of the system says, without the file and line of Python."""
    text = getattr(error, "verify_message", "") or getattr(error, "reason", "") or reason(error)
    if isinstance(error, ssl.SSLError):
        text = re.sub(r" \(_ssl\.c:[0-9]+\)", "", text).replace("_", " ").lower()
    return str(text)
