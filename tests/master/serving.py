"""`snitun-master serve` as a process, and who asks it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
from typing import TYPE_CHECKING, Any

import trustme

from snitun_sync.master.store import Store
from snitun_sync.protocol.token import new_fernet_key
from tests.support import WAIT_S, Program, module

if TYPE_CHECKING:
    from pathlib import Path

KEYS = {"aes_key": "ab" * 32, "aes_iv": "CD" * 16}
ADMIN_TOKEN = "who watches"
ALICE, BOB = "alice.example.com", "bob.example.com"


class Serving:
    """A folder with a database of two devices, keys and certificate, and who serves them."""

    def __init__(self, folder: Path, *arguments: str | Path, has_tls: bool = True) -> None:
        self.folder, self.database = folder, folder / "snitun.db"
        self.key_file, self.certificate = folder / "fernet.key", folder / "master.pem"
        self.store = Store(str(self.database))
        self.alice, self.alices = self.store.add(ALICE, ["also.example.com"], throttling=7)
        self.bob, self.bobs = self.store.add(BOB, cipher="aes-gcm", protocol_version=1)
        self.write(self.key_file, new_fernet_key(os.urandom))
        self.write(folder / "admin.token", ADMIN_TOKEN)
        self.authority = trustme.CA()
        self.leaf = self.renew()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.authority.configure_trust(self.context)
        self.has_tls = has_tls
        self.arguments = (
            *("--database", self.database, "--fernet-key-file", self.key_file),
            *("--relay", "relay.example.com", "--relay", "other.example.com:8443"),
            *("--listen", "127.0.0.1:0", "--log-level", "debug"),
            *("--admin-token-file", folder / "admin.token"),
            *(("--tls-cert", self.certificate) if has_tls else ()),
            *arguments,
        )
        self.program, self.port = self.start()

    def start(self) -> tuple[Program, int]:
        """Start the program; return it and its port."""
        program = Program(*module("snitun_sync.master", "serve", *self.arguments))
        return program, int(program.wait_for("listening on http").rpartition(":")[2])

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.stop()
        self.store.close()

    def write(self, path: Path, text: str) -> None:
        """Write a secret file, as a whole."""
        half = path.with_suffix(".half")
        half.touch(0o600)
        half.write_text(text)
        half.rename(path)

    def renew(self) -> bytes:
        """Write another certificate; return it in DER."""
        issued = self.authority.issue_cert("localhost", "127.0.0.1")
        self.write(self.certificate, issued.private_key_and_cert_chain_pem.bytes().decode())
        return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())

    def connect(self, first: bytes = b"") -> socket.socket:
        """Connect, and shake hands where it has TLS; `first` is sent before that."""
        sock = socket.create_connection(("127.0.0.1", self.port), WAIT_S)
        sock.sendall(first)
        return self.context.wrap_socket(sock, server_hostname="localhost") if self.has_tls else sock

    def talk(self, *pieces: bytes, first: bytes = b"") -> bytes:
        """Send what comes, as it is; return all that is answered."""
        with self.connect(first) as sock:
            for piece in pieces:
                sock.sendall(piece)
            return read_all(sock)

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        credential: str = "",
        body: Any = None,
        headers: Any = None,
        first: bytes = b"",
    ) -> Answer:
        """Ask once."""
        sent = {"Connection": "close", **(headers or {})}
        if credential:
            sent["Authorization"] = f"Bearer {credential}"
        connection = http.client.HTTPConnection("localhost", self.port, timeout=WAIT_S)
        connection.sock = self.connect(first)
        with contextlib.closing(connection):
            text = json.dumps(body) if isinstance(body, dict) else body
            connection.request(method, path, text, sent)
            return Answer(connection.getresponse())

    def token(self, credential: str = "", **options: Any) -> Answer:
        """Ask for a token, as Alice unless it is somebody else."""
        credential = credential or f"{self.alice.id}.{self.alices}"
        options = {"body": KEYS, **options}
        return self.ask("/v1/token", method="POST", credential=credential, **options)

    def metrics(self) -> bytes:
        """Ask how it goes."""
        return self.ask("/metrics", credential=ADMIN_TOKEN).body


class Answer:
    """What was answered."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = answer.status, answer.headers, answer.read()

    @property
    def fields(self) -> dict[str, Any]:
        """The JSON object in it."""
        assert self.headers["Content-Type"] == "application/json"
        fields: dict[str, Any] = json.loads(self.body)
        return fields


def read_all(sock: socket.socket) -> bytes:
    """Read to the end, whichever it is."""
    data = b""
    with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
        while piece := sock.recv(65536):
            data += piece
    return data
