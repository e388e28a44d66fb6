"""TLS that ends in the client: certificates in files, and streams without sockets."""

from __future__ import annotations

import datetime
import logging
import os
import random
import re
import socket
import ssl
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from snitun_sync.errors import (
    ChannelError,
    ConfigurationError,
    ExpiredError,
    SniTunError,
    UnreadableError,
    UsageError,
)
from snitun_sync.net.loop import utc
from snitun_sync.tls import RECORD_BYTES, Certificate, TlsStream
from tests.support import HOSTNAME, MIB, WAIT_S, Program, pattern

DAY_S = 86400
KEY, OTHER_KEY, RSA_KEY, AUTHORITY_KEY = (
    ec.generate_private_key(ec.SECP256R1()),
    ec.generate_private_key(ec.SECP256R1()),
    rsa.generate_private_key(65537, 2048),
    ec.generate_private_key(ec.SECP256R1()),
)


def key_pem(key: Any = KEY, passphrase: bytes = b"") -> str:
    encryption = (
        serialization.BestAvailableEncryption(passphrase)
        if passphrase
        else serialization.NoEncryption()
    )
    form = serialization.PrivateFormat.PKCS8
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, form, encryption)
    return pem.decode()


def cert_pem(
    key: Any = KEY,
    *,
    begin_s: float = -DAY_S,
    end_s: float = DAY_S,
    usage: Any = ExtendedKeyUsageOID.SERVER_AUTH,
    is_authority: bool = False,
) -> str:
    """Return a certificate that is valid from `begin_s` to `end_s` from now."""
    now = datetime.datetime.fromtimestamp(int(time.time()), datetime.timezone.utc)
    name = "the authority" if is_authority else HOSTNAME
    names = [x509.DNSName(HOSTNAME), x509.DNSName(f"*.{HOSTNAME}")]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the authority")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(seconds=begin_s))
        .not_valid_after(now + datetime.timedelta(seconds=end_s))
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    )
    pem = builder.sign(AUTHORITY_KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return pem.decode()


CERT, AUTHORITY = cert_pem(), cert_pem(AUTHORITY_KEY, is_authority=True)
NO_CERT = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
OTHERS_KEY = "--tls-key: the key in key.pem doesn't belong to the certificate in cert.pem"
EXPECTED_CERT = "expected PEM, with -----BEGIN CERTIFICATE-----"
EXPECTED_KEY = "expected PEM, with -----BEGIN PRIVATE KEY-----"


class Files:
    """Certificate and key in files of their own; `None` for one that isn't there."""

    def __init__(
        self, folder: Path, cert: Any = CERT, key: Any = None, *, alpn: Any = ("http/1.1",)
    ) -> None:
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.write(cert, key_pem() if key is None else key)
        self.certificate = Certificate(str(self.cert), str(self.key), alpn)

    def write(self, cert: Any, key: Any) -> None:
        for path, content in ((self.cert, cert), (self.key, key)):
            data = content if isinstance(content, bytes) else content.encode()
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)

    def load(self) -> Certificate:
        self.certificate.take(self.certificate.blocking_load())
        return self.certificate

    def refusal(self, kind: type[Exception] = ConfigurationError) -> str:
        """Return why the files don't count, without their folder."""
        with pytest.raises(kind) as caught:
            self.certificate.blocking_load()
        assert caught.type is kind
        return str(caught.value).replace(f"{self.cert.parent}/", "")


# --- certificates --------------------------------------------------------------------


@pytest.fixture(autouse=True)
def log_is_looked_at(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No warning but those that a test takes away."""
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.name == "snitun_sync"]
    caplog.clear()
    return lines


def test_what_counts_is_what_is_in_the_files(tmp_path: Path) -> None:
    files = Files(tmp_path, CERT + AUTHORITY)
    certificate = files.certificate
    assert (certificate.context, certificate.leaf, certificate.tried) == (None, b"", None)
    loaded = certificate.blocking_load()
    assert certificate.context is None
    certificate.failure = "for a test"
    certificate.take(loaded)
    assert (certificate.failure, certificate.doubt()) == ("", "")
    assert certificate.context is loaded.context
    assert certificate.tried == certificate.stamp()
    assert certificate.leaf == ssl.PEM_cert_to_DER_cert(CERT)
    assert certificate.names == (HOSTNAME, f"*.{HOSTNAME}")
    assert certificate.not_after - certificate.not_before == 2 * DAY_S
    assert abs(certificate.not_after - time.time() - DAY_S) < 3600
    assert str(certificate) == f"{files.cert}, valid until {utc(certificate.not_after)} UTC"


def name_of(value: object) -> str | None:
    """Name a case without its keys, which are others in each process."""
    return "pem" if "-----BEGIN" in str(value) else None


@pytest.mark.parametrize(
    "text",
    [
        CERT + key_pem(),
        key_pem() + CERT + AUTHORITY,
        "Zoë's own\n" + (CERT + AUTHORITY + key_pem()).replace("\n", "\r\n"),
        cert_pem(RSA_KEY) + key_pem(RSA_KEY),
    ],
    ids=name_of,
)
def test_the_key_may_be_in_the_same_file(tmp_path: Path, text: str) -> None:
    files = Files(tmp_path, text)
    files.certificate = Certificate(str(files.cert), "", ("http/1.1",))
    certificate = files.load()
    assert exchange(Pair(certificate.context)) == (b"ping", b"pong")


@pytest.mark.parametrize(
    ("cert", "key", "line"),
    [
        (CERT, key_pem(OTHER_KEY), OTHERS_KEY),
        (CERT, key_pem(RSA_KEY), OTHERS_KEY),
        (
            AUTHORITY + CERT,
            key_pem(),
            f"{OTHERS_KEY}, where an authority's comes first; expected the server's own first",
        ),
        (
            CERT,
            key_pem(passphrase=b"secret"),
            "--tls-key: the key in key.pem is encrypted; expected one without a passphrase",
        ),
        ("", key_pem(), f"--tls-cert: no certificate in cert.pem; {EXPECTED_CERT}"),
        (b"\x30\x82\xff", key_pem(), f"--tls-cert: no certificate in cert.pem; {EXPECTED_CERT}"),
        (key_pem(), CERT, f"--tls-cert: no certificate in cert.pem; {EXPECTED_CERT}"),
        (CERT, "", f"--tls-key: no private key in key.pem; {EXPECTED_KEY}"),
        (CERT, CERT, f"--tls-key: no private key in key.pem; {EXPECTED_KEY}"),
        (
            NO_CERT,
            key_pem(),
            "--tls-cert: certificate 1 of 1 in cert.pem is malformed; expected PEM, whole",
        ),
        (
            CERT[:200],
            key_pem(),
            "--tls-cert: certificate 1 of 1 in cert.pem is malformed; expected PEM, whole",
        ),
        (
            CERT + NO_CERT,
            key_pem(),
            "--tls-cert: certificate 2 of 2 in cert.pem is malformed; expected PEM, whole",
        ),
        (
            CERT.replace("\nM", "\nÄ"),
            key_pem(),
            "--tls-cert: certificate 1 of 1 in cert.pem is malformed; expected PEM, whole",
        ),
        (
            CERT,
            key_pem().replace("\nM", "\n!"),
            "--tls-key: the key in key.pem is malformed; expected PEM, whole",
        ),
        (CERT, key_pem()[:100], "--tls-key: the key in key.pem is malformed; expected PEM, whole"),
        (
            cert_pem(usage=ExtendedKeyUsageOID.CLIENT_AUTH),
            key_pem(),
            re.compile("--tls-cert: no device takes the certificate in cert.pem: .* purpose"),
        ),
    ],
    ids=name_of,
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, cert: Any, key: Any, line: Any) -> None:
    files = Files(tmp_path)
    files.load()
    before = {**vars(files.certificate), "tried": None}
    files.write(cert, key)
    said = files.refusal()
    assert line.fullmatch(said) if isinstance(line, re.Pattern) else said == line
    assert {**vars(files.certificate), "tried": None} == before


def test_weak_keys_are_refused(tmp_path: Path) -> None:
    """The size is OpenSSL's, and the distribution's, to decide; none takes 512 bits."""
    weak = tmp_path / "weak.pem"
    request = ("req", "-x509", "-newkey", "rsa:512", "-nodes", "-subj", "/CN=weak")
    command = ["openssl", *request, "-keyout", str(weak), "-out", str(tmp_path / "weak.cert")]
    subprocess.run(command, check=True, capture_output=True)
    files = Files(tmp_path, (tmp_path / "weak.cert").read_text(), weak.read_text())
    said = files.refusal()
    assert said.startswith("--tls-key: the key in key.pem can't be used with the certificate in ")
    assert said.endswith("cert.pem: ee key too small")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.key.unlink()
    said = "--tls-key: can't read key.pem: No such file or directory"
    assert files.refusal(UnreadableError) == said
    files.cert.unlink()
    said = "--tls-cert: can't read cert.pem: No such file or directory"
    assert files.refusal(UnreadableError) == said
    files.cert.mkdir()
    assert files.refusal(UnreadableError) == "--tls-cert: can't read cert.pem: Is a directory"
    section = "/etc/snitun.ini: [endpoint cam] "
    for cert, key, name in (("a\0b", "", "cert"), (os.devnull, "", ""), ("-", "", "cert")):
        certificate = Certificate(cert, key, (), option=f"{section}tls-cert")
        assert certificate.stamp() == certificate.stamp()
        with pytest.raises(ConfigurationError, match=re.escape(f"{section}tls-{name}")) as caught:
            certificate.blocking_load()
    assert caught.type is UsageError
    files.cert.rmdir()
    files.write(CERT, b" " * 65537)
    assert files.refusal(UnreadableError) == "--tls-key: key.pem has more than 65536 bytes"


def test_expired(tmp_path: Path) -> None:
    files = Files(tmp_path, cert_pem(begin_s=-2 * DAY_S, end_s=-60))
    match = re.fullmatch(
        r"--tls-cert: by this machine's clock \((.{19}) UTC\) the certificate in cert\.pem expired "
        r"at (.{19}) UTC; expected one that is valid",
        files.refusal(ExpiredError),
    )
    assert match is not None
    clock, end = (time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S")) for text in match.groups())
    assert 59 < clock - end < 3600
    assert files.certificate.context is None
    assert files.certificate.is_news
    files.refusal(ExpiredError)
    assert not files.certificate.is_news
    files.write(CERT, key_pem(OTHER_KEY))
    files.refusal()
    assert files.certificate.is_news


def test_one_that_expires_while_it_counts(tmp_path: Path) -> None:
    certificate = Files(tmp_path).load()
    context, certificate.not_after = certificate.context, time.time() - 1
    assert re.match("--tls-cert: by this machine's clock .* expired at ", certificate.doubt())
    assert certificate.context is context


def test_a_clock_that_is_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = Files(tmp_path, cert_pem(begin_s=DAY_S, end_s=2 * DAY_S))
    assert exchange(Pair(files.load().context, is_patient=True)) == (b"ping", b"pong")
    files.load()
    [line] = warned(caplog)
    assert re.fullmatch(
        r"--tls-cert: by this machine's clock \(.{19} UTC\) the certificate in \S*/cert\.pem is "
        rf"valid from {utc(files.certificate.not_before)} UTC on; expected one that "
        r"is valid; using it unless there is another one",
        line,
    )


def test_one_that_isn_t_valid_yet_takes_no_valid_one_s_place(tmp_path: Path) -> None:
    files = Files(tmp_path)
    former = files.load()
    files.write(cert_pem(begin_s=DAY_S, end_s=2 * DAY_S), key_pem())
    with pytest.raises(ExpiredError, match="is valid from"):
        former.blocking_load()
    fresh = Certificate(str(files.cert), str(files.key), ("http/1.1",))  # as after a reload
    fresh.take(fresh.blocking_load())
    fresh.inherit(former)
    assert (fresh.leaf, fresh.context, fresh.doubt()) == (former.leaf, former.context, "")
    assert "is valid from" in fresh.failure


def test_a_key_that_everybody_can_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = Files(tmp_path)
    files.cert.chmod(0o644)
    files.load()
    assert warned(caplog) == []
    files.key.chmod(0o644)
    said = "can be read by everybody: chmod 600 it"
    for _ in range(2):
        files.load()
    assert warned(caplog) == [f"--tls-key: {files.key} {said}"]
    files.write(CERT + key_pem(), "")
    files.certificate = Certificate(str(files.cert), "", ("http/1.1",))
    files.load()
    assert warned(caplog) == [f"--tls-cert: {files.cert} {said}"]


def test_the_stamp_tells_of_every_change(tmp_path: Path) -> None:
    files = Files(tmp_path)
    stamps = [files.certificate.stamp()]
    assert files.certificate.stamp() == stamps[0]

    def replaced() -> None:
        new = tmp_path / "new"
        new.write_text(CERT)
        new.rename(files.cert)

    link = tmp_path / "link.pem"
    link.symlink_to(files.key)
    files.certificate = Certificate(str(files.cert), str(link), ())
    assert files.certificate.stamp() == stamps[0]
    for change in (
        replaced,
        lambda: files.key.chmod(0o640),
        lambda: files.key.write_text(key_pem(OTHER_KEY) + "\n"),
        files.key.unlink,
        files.cert.unlink,
    ):
        change()
        stamps.append(files.certificate.stamp())
    assert len(set(stamps)) == len(stamps)


def test_what_counted_goes_on_under_other_settings(tmp_path: Path) -> None:
    former = Files(tmp_path).load()
    later = Certificate(str(tmp_path / "nothing"), "", ())
    later.failure = "not there"
    later.inherit(former)
    assert (later.context, later.names, later.not_after, later.leaf) == (
        former.context,
        former.names,
        former.not_after,
        former.leaf,
    )
    assert (later.failure, later.doubt()) == ("not there", "")  # devices get through
    other = Files(tmp_path).load()
    context = other.context
    other.inherit(former)
    assert other.context is context is not former.context


# --- streams -------------------------------------------------------------------------


class Pair:
    """A stream and a device, whose bytes go from one to the other in portions."""

    def __init__(
        self,
        context: ssl.SSLContext | None,
        *,
        version: Any = None,
        alpn: Any = ("http/1.1",),
        portion: int = 1 << 20,
        is_patient: bool = False,
        takes: str = AUTHORITY,
        ciphers: str = "",
    ) -> None:
        assert context is not None
        self.stream = TlsStream(context)
        device = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        device.load_verify_locations(cadata=takes)
        if is_patient:
            device.verify_flags |= 0x200000
        if ciphers:
            device.set_ciphers(ciphers)
        if version is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old versions
                device.minimum_version = device.maximum_version = version
        if alpn:
            device.set_alpn_protocols(alpn)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.device = device.wrap_bio(
            self.incoming, self.outgoing, server_hostname=f"www.{HOSTNAME}"
        )
        self._portion = portion
        self._into = memoryview(bytearray(50_000))

    def shake(self) -> Pair:
        """Shake hands until both are done, or until one raises."""
        is_done = False
        for _ in range(10):
            error = None
            try:
                self.device.do_handshake()
                if is_done:
                    return self
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as found:
                error = found
            sent = self.outgoing.read()
            for at in range(0, len(sent), self._portion):
                self.stream.receive(sent[at : at + self._portion])
                is_done = self.stream.handshake()
                self.incoming.write(self.stream.pending())
            if error is not None:
                raise error
        raise AssertionError("the handshake doesn't end")

    def up(self, data: bytes) -> bytes:
        """Let the device send `data`; return what the stream makes of it."""
        at = 0
        while at < len(data):
            at += self.device.write(data[at:])
        return self.pass_up()

    def pass_up(self) -> bytes:
        sent, got = self.outgoing.read(), b""
        for at in range(0, len(sent), self._portion):
            self.stream.receive(memoryview(sent)[at : at + self._portion])
            while size := self.stream.decrypt(self._into):
                got += self._into[:size]
        return got

    def down(self, data: bytes) -> bytes:
        """Let the stream send `data`; return what the device makes of it."""
        self.incoming.write(self.stream.encrypt(data))
        return self.read()

    def read(self) -> bytes:
        """Return all that the device has got, until its end or for now."""
        got = b""
        try:
            while piece := self.device.read(1 << 20):
                got += piece
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        return got


def exchange(pair: Pair) -> tuple[bytes, bytes]:
    pair.shake()
    return pair.up(b"ping"), pair.down(b"pong")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    alpn = ("h2", "http/1.1")
    found = Files(tmp_path_factory.mktemp("tls"), CERT + AUTHORITY, alpn=alpn).load().context
    assert found is not None
    return found


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("portion", [1, 1 << 20])
@pytest.mark.parametrize("version", VERSIONS)
def test_both_versions(context: ssl.SSLContext, version: Any, portion: int) -> None:
    pair = Pair(context, version=version, portion=portion)
    assert (pair.stream.alpn, pair.stream.cipher) == ("", "")
    assert exchange(pair) == (b"ping", b"pong")
    stream, device = pair.stream, pair.device
    assert stream.version == device.version() == version.name.replace("_", ".")
    cipher = device.cipher()
    assert cipher is not None and stream.cipher == cipher[0]
    assert stream.alpn == device.selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [(("h2",), "h2"), (("http/1.1", "h2"), "h2"), (("spdy/3",), ""), ((), "")],
)
def test_alpn(context: ssl.SSLContext, offered: Any, chosen: str) -> None:
    assert Pair(context, alpn=offered).shake().stream.alpn == chosen


def test_the_device_chooses_the_cipher(context: ssl.SSLContext) -> None:
    found = []
    for name in ("ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-GCM-SHA256"):
        ciphers = f"{name}:ECDHE-ECDSA-AES256-GCM-SHA384"
        pair = Pair(context, version=ssl.TLSVersion.TLSv1_2, ciphers=ciphers)
        found.append((pair.shake().stream.cipher, name))
    assert all(cipher == name for cipher, name in found)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_byte_arrives_in_portions_of_any_size(context: ssl.SSLContext, version: Any) -> None:
    rng = random.Random(1)
    pair = Pair(context, version=version, portion=rng.randrange(1000, 100_000)).shake()
    at = 0
    while at < 8 * MIB:
        size = rng.choice((1, 100, RECORD_BYTES - 1, RECORD_BYTES, RECORD_BYTES + 1, 200_000))
        data = pattern(at, size)
        pair._portion = rng.choice((300, 1000, 5000, RECORD_BYTES, 1 << 20))
        pair._into = memoryview(bytearray(rng.choice((50, RECORD_BYTES, 262_144))))
        assert pair.up(data) == data
        assert pair.down(data) == data
        at += size


def test_data_behind_the_handshake_is_kept(context: ssl.SSLContext) -> None:
    pair = Pair(context)
    stream, data = pair.stream, pattern(0, 100_000)
    with pytest.raises(ssl.SSLWantReadError):
        pair.device.do_handshake()
    stream.receive(pair.outgoing.read())
    assert not stream.handshake()
    pair.incoming.write(stream.pending())
    pair.device.do_handshake()
    for at in range(0, len(data), RECORD_BYTES):
        pair.device.write(data[at : at + RECORD_BYTES])
    stream.receive(pair.outgoing.read())
    assert stream.handshake()
    got, into = b"", memoryview(bytearray(30_000))
    while size := stream.decrypt(into):
        got += into[:size]
    assert got == data
    assert stream.decrypt(into) == 0
    assert not stream.is_ended


@pytest.mark.parametrize("version", VERSIONS)
def test_each_side_ends_for_itself(context: ssl.SSLContext, version: Any) -> None:
    pair = Pair(context, version=version).shake()
    pair.device.write(b"last words")
    with pytest.raises(ssl.SSLWantReadError):
        pair.device.unwrap()
    assert pair.pass_up() == b"last words"
    assert pair.stream.is_ended
    pair.stream.receive(b"whatever comes behind it")
    assert pair.stream.decrypt(pair._into) == 0
    # OpenSSL's device takes nothing more, but it gets the end.
    pair.incoming.write(pair.stream.finish())
    pair.device.unwrap()

    pair = Pair(context, version=version).shake()
    pair.incoming.write(pair.stream.encrypt(b"last words") + pair.stream.finish())
    assert pair.read() == b"last words"
    assert pair.up(b"but I have more") == b"but I have more"
    assert not pair.stream.is_ended
    pair.device.unwrap()
    assert pair.pass_up() == b""
    assert pair.stream.is_ended


def test_an_error_keeps_no_buffer(context: ssl.SSLContext) -> None:
    pair = Pair(context).shake()
    pair.stream.finish()
    data = bytearray(b"too late")
    with pytest.raises(ChannelError, match="TLS: protocol is shutdown") as caught:
        pair.stream.encrypt(data)
    data.clear()  # raises BufferError where somebody looks at it
    assert caught.value.__traceback__ is not None


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"takes": cert_pem(OTHER_KEY)}, "tlsv1 alert unknown ca"),
        ({"version": ssl.TLSVersion.TLSv1_1, "ciphers": "ALL:@SECLEVEL=0"}, "unsupported protocol"),
        ({"version": ssl.TLSVersion.TLSv1_2, "ciphers": "AES128-GCM-SHA256"}, "no shared cipher"),
    ],
)
def test_a_handshake_that_fails(context: ssl.SSLContext, options: Any, line: str) -> None:
    pair = Pair(context, **options)
    with pytest.raises(ChannelError, match=f"^TLS handshake: {line}$"):
        try:
            pair.shake()
        finally:
            alert = pair.stream.pending()
    # Who sends the alert itself gets none.
    assert alert[:1] == (b"" if "alert" in line else b"\x15")
    with pytest.raises(ChannelError):
        pair.stream.handshake()


def test_a_record_that_is_broken(context: ssl.SSLContext) -> None:
    pair = Pair(context).shake()
    pair.stream.pending()
    pair.device.write(b"x" * 100)
    pair.device.write(b"y" * 100)
    sent = bytearray(pair.outgoing.read())
    sent[-1] ^= 1
    pair.stream.receive(bytes(sent))
    with pytest.raises(ChannelError, match="TLS: decryption failed or bad record mac"):
        while pair.stream.decrypt(pair._into[:100]):
            assert pair._into[:100] == b"x" * 100
    pair.incoming.write(pair.stream.pending())
    with pytest.raises(ssl.SSLError, match=r"(?i)alert bad record mac"):
        pair.device.read(1)
    with pytest.raises(ChannelError):
        pair.stream.encrypt(b"more")


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.binary(max_size=300), max_size=5), start=st.sampled_from([b"", b"\x16"]))
def test_any_bytes_instead_of_a_handshake(
    context: ssl.SSLContext, pieces: list[bytes], start: bytes
) -> None:
    """Whatever a device says: it is taken, or raises a SniTunError; nothing else."""
    stream = TlsStream(context)
    try:
        for piece in (start + b"\x03\x01", *pieces):
            stream.receive(piece)
            assert not stream.handshake()
        stream.decrypt(memoryview(bytearray(100)))
    except SniTunError as error:
        assert "_ssl" not in str(error)
    stream.pending()
    stream.finish()
    assert (stream.alpn, stream.cipher) == ("", "")


# Where, what comes in there, and how many bytes go.
CHANGE = st.tuples(st.integers(0, 2000), st.binary(max_size=20), st.integers(0, 9))


@settings(max_examples=200, deadline=None)
@given(
    version=st.sampled_from(VERSIONS),
    is_early=st.booleans(),
    changes=st.lists(CHANGE, max_size=3),
    portion=st.integers(1, 2000),
)
def test_any_change_on_the_way(
    context: ssl.SSLContext, version: Any, is_early: bool, changes: Any, portion: int
) -> None:
    """What a device has sent is received as far as it is whole, or raises a SniTunError."""
    pair = Pair(context, version=version)
    if not is_early:
        pair.shake()
        for _ in range(3):
            pair.device.write(b"a line\n" * 20)
    else:
        with pytest.raises(ssl.SSLWantReadError):
            pair.device.do_handshake()
    sent = bytearray(pair.outgoing.read())
    for at, new, removed in changes:
        sent[at : at + removed] = new
    got, into = b"", memoryview(bytearray(1000))
    try:
        for at in range(0, len(sent), portion):
            pair.stream.receive(bytes(sent[at : at + portion]))
            if is_early:
                pair.stream.handshake()
            while size := pair.stream.decrypt(into):
                got += into[:size]
        pair.stream.encrypt(b"an answer" * (not is_early))
    except SniTunError as error:
        assert "_ssl" not in str(error)
    pair.stream.pending()
    pair.stream.finish()
    assert (b"a line\n" * 60).startswith(got)
    if not is_early and not changes:
        assert len(got) == 420


def test_bytes_may_come_while_a_worker_shakes_hands(context: ssl.SSLContext) -> None:
    """The loop's thread receives; the other one is in OpenSSL."""
    pair = Pair(context)
    with pytest.raises(ssl.SSLWantReadError):
        pair.device.do_handshake()
    hello, steps = pair.outgoing.read(), []
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            steps.append(pair.stream.handshake())
        steps.append(pair.stream.handshake())

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for byte in hello:
            pair.stream.receive(bytes([byte]))
    finally:
        is_over.set()
        worker.join(WAIT_S)
    assert not any(steps)
    pair.incoming.write(pair.stream.pending())
    pair.device.do_handshake()
    pair.stream.receive(pair.outgoing.read())
    assert pair.stream.handshake()


@pytest.mark.parametrize(
    ("version", "command", "done", "expected"),
    [
        ("-tls1_3", "K", "KEYUPDATE", "<<< TLS 1.3, Handshake [length 0005], KeyUpdate"),
        ("-tls1_2", "R", "RENEGOTIATING", "no_renegotiation"),
    ],
)
def test_what_openssl_can_ask_for(
    context: ssl.SSLContext, version: str, command: str, done: str, expected: str
) -> None:
    """New keys in both directions; and no renegotiation."""
    stream, into = TlsStream(context), memoryview(bytearray(1000))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        s_client = ("openssl", "s_client", "-connect", address, version, "-msg")
        program = Program(*s_client, stdin=subprocess.PIPE)
        listener.settimeout(WAIT_S)
        sock = listener.accept()[0]

    def say(text: str) -> None:
        assert program.process.stdin is not None
        program.process.stdin.write(text)
        program.process.stdin.flush()

    def hear() -> bytes:
        while data := sock.recv(65536):
            stream.receive(data)
            size = stream.decrypt(into)
            sock.sendall(stream.pending())
            if size:
                return bytes(into[:size])
        return b""

    with program, sock:
        sock.settimeout(WAIT_S)
        is_done = False
        while not is_done:
            stream.receive(sock.recv(65536))
            is_done = stream.handshake()
            sock.sendall(stream.pending())
        say("one\n")
        assert hear() == b"one\n"
        sock.sendall(stream.encrypt(b"an answer\n"))
        program.wait_for("an answer")
        say(f"{command}\n")
        program.wait_for(done)  # what came together with it would be no command
        if command == "K":
            for number in range(3):
                say(f"{number}\n")
                assert hear() == f"{number}\n".encode()
                sock.sendall(stream.encrypt(f"answer {number}\n".encode()))
                program.wait_for(f"answer {number}")
            sock.sendall(stream.finish())
        else:
            with pytest.raises(ChannelError, match="alert"):  # it takes no for an answer
                hear()
        program.wait_for(expected)
        assert program.process.stdin is not None
        program.process.stdin.close()
