"""An appliance in one program: a client with Flask, Django and a plain handler inside.

    python -m tests.applications TICKET CERTIFICATE FOLDER [ENDPOINT]

Each is found under its name in example.test, and answers as tests/appliance.py says. Without a
CERTIFICATE there is only a slow handler, which ends no TLS.
"""

from __future__ import annotations

import http.server
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snitun_sync.client import Client

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

DOMAIN = "example.test"
MIB = 1024 * 1024


def flask_application(folder: Path) -> Any:
    """Return a WSGI application made with Flask."""
    import flask

    app = flask.Flask(__name__)

    @app.get("/seen")
    def seen() -> flask.Response:
        return flask.Response(_seen(flask.request.environ), mimetype="text/plain")

    @app.put("/file/<name>")
    def put(name: str) -> tuple[str, int]:
        with open(folder / name, "wb") as file:
            shutil.copyfileobj(flask.request.stream, file)
        return "", 201

    @app.get("/file/<name>")
    def get(name: str) -> flask.Response:
        return flask.send_file(folder / name, mimetype="application/octet-stream")

    return app


def django_application(folder: Path) -> Any:
    """Return a WSGI application made with Django."""
    import django.conf
    from django.core.wsgi import get_wsgi_application
    from django.http import FileResponse, HttpResponse
    from django.urls import path

    def seen(request: Any) -> Any:
        return HttpResponse(_seen(request.META), content_type="text/plain")

    def file(request: Any, name: str) -> Any:
        if request.method == "GET":
            return FileResponse(open(folder / name, "rb"))
        with open(folder / name, "wb") as target:
            shutil.copyfileobj(request, target)
        return HttpResponse(status=201)

    patterns = (path("seen", seen), path("file/<name>", file))
    django.conf.settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=patterns)
    return get_wsgi_application()


def plain_handler(folder: Path) -> Callable[[socket.socket, str], None]:
    """Return a handler for a connection, in the way of the standard library."""

    class Service(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/seen":
                self._answer(200, f"address={self.client_address[0]}\n".encode())
            else:
                size = os.path.getsize(self._file)
                with open(self._file, "rb") as file:
                    self._head(200, size)
                    shutil.copyfileobj(file, self.wfile)

        def do_PUT(self) -> None:
            left = int(self.headers["Content-Length"])
            with open(self._file, "wb") as file:
                while left:
                    piece = self.rfile.read(min(left, MIB))
                    assert piece
                    file.write(piece)
                    left -= len(piece)
            self._answer(201, b"")

        @property
        def _file(self) -> Path:
            return folder / self.path.rpartition("/")[2]

        def _head(self, status: int, size: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(size))
            self.end_headers()

        def _answer(self, status: int, body: bytes) -> None:
            self._head(status, len(body))
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    def handler(connection: socket.socket, device: str) -> None:
        Service(connection, (device, 0), None)  # type: ignore[arg-type]

    return handler


def _seen(environ: dict[str, Any]) -> str:
    names = ("REMOTE_ADDR", "SERVER_PROTOCOL", "SERVER_NAME", "wsgi.url_scheme")
    address, protocol, server, scheme = (environ[name] for name in names)
    return f"address={address}\nprotocol={protocol}\nserver={server}\nscheme={scheme}\n"


def slow_handler(connection: socket.socket, device: str) -> None:
    """Take a second for one line."""
    while not connection.recv(65536).endswith(b"\n"):
        pass
    time.sleep(1)
    connection.sendall(b"done")


def main() -> None:
    """Be that appliance until SIGTERM."""
    logging.basicConfig(level=logging.INFO)
    ticket, certificate, folder, *endpoint = sys.argv[1:]
    client = Client(Path(ticket).read_text(), *endpoint)
    files = Path(folder)
    if certificate:
        for name, application in (("flask", flask_application), ("django", django_application)):
            (files / name).mkdir()
            client.serve_wsgi(application(files / name), f"{name}.{DOMAIN}", tls_cert=certificate)
        (files / "plain").mkdir()
        client.serve(plain_handler(files / "plain"), f"plain.{DOMAIN}", tls_cert=certificate)
    client.serve(slow_handler, f"slow.{DOMAIN}")
    signal.signal(signal.SIGTERM, lambda *_: client.stop())
    client.run()


if __name__ == "__main__":
    main()
