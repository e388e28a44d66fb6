"""A session master by hand, over real TLS: as the field's, or with whatever answer a test wants."""

from __future__ import annotations

import json
import os
import socketserver
import ssl
import threading
import time
from pathlib import Path
from typing import Any, Callable, Union
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import trustme

from snitun_sync.protocol.aes import load
from snitun_sync.protocol.device import new_id, new_secret
from snitun_sync.protocol.token import Fernet, Payload
from tests.support import HOSTNAME, WAIT_S

AUTHORITY = trustme.CA()
Reply = tuple[int, dict[str, str], Union[dict[str, Any], bytes]]
"""Status, headers and body of an answer."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Who was asked hung up, or didn't like the certificate."""


class _Handler(WSGIRequestHandler):
    timeout = WAIT_S

    def log_message(self, *_: object) -> None:
        pass


class StubMaster:
    """Gives tokens for HOSTNAME, one after the other, to one device."""

    def __init__(
        self,
        folder: Path,
        fernet_key: str,
        *servers: str,
        certificate: trustme.LeafCert | None = None,
    ) -> None:
        self.fernet_keys, self.servers = [fernet_key], list(servers)
        self.device_id, self.secret = new_id(os.urandom), new_secret(os.urandom)
        self.cipher, self.life_s, self.age_s = "aes-cbc", 3600.0, 0.0
        self.reply: Callable[[Reply], Reply] = lambda usual: usual
        """What is answered instead of the usual."""
        self.requests: list[dict[str, Any]] = []
        """What was asked: the path, the headers that matter, the body's fields."""
        self.go_on = threading.Event()
        """While it isn't set nobody is answered."""
        self.go_on.set()
        self.secret_file, self.ca_file = folder / "home.secret", folder / "master-ca.pem"
        self.secret_file.touch(0o600)
        self.secret_file.write_text(f"{self.device_id}.{self.secret}\n")
        AUTHORITY.cert_pem.write_to_path(str(self.ca_file))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        (certificate or AUTHORITY.issue_cert("localhost")).configure_cert(context)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        # The handshake is done by the thread of the connection.
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._server.set_app(self._app)
        self.port = self._server.server_port
        self.url = f"https://localhost:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self._thread.start()

    def __enter__(self) -> StubMaster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Be away."""
        self.go_on.set()
        self._server.shutdown()
        self._thread.join(WAIT_S)
        self._server.server_close()

    @property
    def options(self) -> dict[str, str]:
        """What Settings take to ask it."""
        return {
            "master": self.url,
            "device_secret_file": str(self.secret_file),
            "master_ca": str(self.ca_file),
        }

    @property
    def arguments(self) -> list[str]:
        """The same for the command line."""
        return [text for name, value in self.options.items() for text in (_option(name), value)]

    def _app(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        fields = json.loads(body)
        self.requests.append(
            {
                "line": f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}",
                "authorization": environ.get("HTTP_AUTHORIZATION"),
                "type": environ["CONTENT_TYPE"],
                **fields,
            }
        )
        self.go_on.wait(WAIT_S)
        status, headers, found = self.reply((200, {}, self.answer(fields)))
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        start_response(f"{status} Said", [("Content-Length", str(len(data))), *headers.items()])
        return [data]

    def answer(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the usual answer to what was asked."""
        created = int(time.time() - self.age_s)
        payload = Payload(
            valid=created + self.life_s,
            hostname=HOSTNAME,
            aes_key=bytes.fromhex(fields["aes_key"]),
            aes_iv=bytes.fromhex(fields["aes_iv"]),
            protocol_version=2,
            cipher=self.cipher,
            device_id=self.device_id,
        )
        token = Fernet(self.fernet_keys, load()).seal(payload.to_json(), created, os.urandom)
        return {
            "token": token,
            "server": self.servers[0],
            "servers": self.servers,
            "valid": payload.valid,
            "throttling": None,
            "protocol_version": 2,
            "cipher": self.cipher,
            "hostname": HOSTNAME,
            "alias": [],
            "device_id": self.device_id,
        }


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
